"""The calls whose kernels the compile gate builds: every form that the heuristics can choose, one call each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn import dispatch
from jax_fp8attn.quantize import Fp8PerGroup, Fp8PerTensor

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a kernel may use at most."""

    registers: int
    shared_memory: int  # bytes a block


@dataclasses.dataclass(frozen=True)
class Call:
    """A public op on shapes."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


SIZES = ((64, 8), (600, 8), (4096, 8), (4096, 32), (4096, 128))
"""Tokens and heads on every side of the bounds at which a configuration changes."""


def merge_calls() -> Iterator[Call]:
    """One call for every configuration of every input type, output and width; then the other options."""
    static, packed = Fp8PerTensor(0.5), Fp8PerGroup.deepgemm_sm100()
    words32 = Fp8PerGroup(32, "ue8m0", "col_tma_packed")
    forms = (("float32", "row"), ("ue8m0", "col_tma"))
    groups = [Fp8PerGroup(group, *form) for group in (32, 64, 128) for form in forms]
    seen: set[Any] = set()
    for dtype, spec, size in itertools.product((BF16, F32), (None, static, *groups, packed, words32), SIZES):
        yield from _new(seen, dtype=dtype, output_quant=spec, tokens=size[0], heads=size[1])
    for spec, size in itertools.product((None, static, packed), SIZES):
        yield from _new(seen, dtype=F16, output_quant=spec, tokens=size[0], heads=size[1])
    for width, size in itertools.product((8, 16, 24, 32, 48, 64, 192, 256, 512), SIZES):
        yield from _new(seen, tokens=size[0], heads=size[1], width=width, return_lse=True)
    for dtype, spec, size in itertools.product((BF16, F32), (static, *groups[1::2], packed, words32), SIZES):
        yield from _new(seen, dtype=dtype, output_quant=spec, tokens=size[0], heads=size[1], states=4)
    yield from _new(seen, output_quant=static, tokens=64, heads=8, states=1)
    options = {"return_lse": True, "lse_layout": "TH", "lse_base": "2"}
    yield _merge("TH base 2 context tail", tokens=37, context=True, output_quant=static, **options)
    yield _merge("packed context tail", tokens=39, heads=6, context=True, output_quant=packed, return_lse=True)
    yield _merge("col", tokens=68, output_quant=Fp8PerGroup(128, "float32", "col"))
    yield _merge("padding and tail", tokens=67, output_quant=Fp8PerGroup.deepgemm_sm90())
    yield _merge("N=16 packed", states=16, output_quant=packed, return_lse=True)
    yield _merge("in place", in_place=True, return_lse=True)
    yield _merge("fewer tokens than a tile", tokens=3, output_quant=packed)
    yield _merge("one token", tokens=1, output_quant=static)
    yield _merge("float32, one token", dtype=F32, tokens=1, output_quant=static)
    yield _merge(
        "tiles of heads", tokens=7, heads=16, context=True, output_quant=Fp8PerGroup.deepgemm_sm90(), **options
    )
    yield _merge("heads that fill no tile", tokens=3, heads=3, output_quant=static)


def _new(seen: set[Any], **facts: Any) -> Iterator[Call]:
    """The call with these facts, unless one with the same configuration, types and output has been there."""
    from jax_fp8attn.pallas.merge_sm90 import default_config

    spec, dtype = facts.get("output_quant"), jnp.dtype(facts.get("dtype", BF16)).name
    output = "fp8_tensor" if isinstance(spec, Fp8PerTensor) else dtype
    if isinstance(spec, Fp8PerGroup):
        output = f"fp8_group{spec.group_size}_{spec.scale_format}_{spec.scale_layout}"
    names = {"tokens": "T", "heads": "H", "width": "D", "states": "N"}
    size = " ".join(f"{short}={facts[name]}" for name, short in names.items() if name in facts)
    call = _merge(f"{dtype} to {output} {size}", **facts)
    op = "merge_attn_states" if "states" not in facts else "merge_attn_states_n"
    problem = dispatch.explain(op, *call.arguments, output_quant=spec).problem
    config = default_config(problem)
    if (dtype, output, config, problem.states) not in seen:
        seen.add((dtype, output, config, problem.states))
        yield call


def _merge(
    label: str,
    dtype: Any = BF16,
    tokens: int = 64,
    heads: int = 8,
    width: int = 128,
    states: int | None = None,
    context: bool = False,
    **options: Any,
) -> Call:
    import jax_fp8attn as fp8attn

    of = jax.ShapeDtypeStruct
    lse_shape = (tokens, heads) if options.get("lse_layout") == "TH" else (heads, tokens)
    out, lse = of((tokens, heads, width), dtype), of(lse_shape, F32)
    if states is not None:
        function = functools.partial(fp8attn.merge_attn_states_n, implementation="pallas", **options)
        return Call(label, function, (of((states, *out.shape), dtype), of((states, *lse.shape), F32)))
    if not context:
        function = functools.partial(fp8attn.merge_attn_states, implementation="pallas", **options)
        return Call(label, function, (out, lse, out, lse))

    def merge(prefix: Any, prefix_lse: Any, suffix: Any, suffix_lse: Any, count: Any) -> Any:
        return fp8attn.merge_attn_states(
            prefix, prefix_lse, suffix, suffix_lse,
            prefill_tokens_with_context=count, implementation="pallas", **options,
        )  # fmt: skip

    return Call(label, merge, (out, lse, out, lse, of((), jnp.int32)))


def mla_calls() -> Iterator[Call]:
    """Causal and not, both forms of K, every kind of output, states of both widths, splits with their merge; in bf16
    what differs there. Blocks that take several tiles, and where those are ``few`` a block a tile."""
    few = {"tokens": 512}
    packed, row64 = Fp8PerGroup.deepgemm_sm100(), Fp8PerGroup.row_major(64)
    state16, state32 = jnp.dtype(BF16), jnp.dtype(F32)
    yield _mla("causal")
    yield _mla("full pair", causal=False, pair=True)
    yield _mla("few, full pair", causal=False, pair=True, **few)
    yield _mla("float32 output", out_dtype=jnp.dtype(F32))
    yield _mla("fp8_tensor", output_quant=Fp8PerTensor(None))
    yield _mla("fp8_group128_ue8m0_packed", output_quant=packed)
    yield _mla("fp8_group64_f32_row", causal=False, output_quant=row64)
    yield _mla("bfloat16 state", state_dtype=state16)
    yield _mla("float32 state, packed", causal=False, state_dtype=state32, output_quant=packed)
    yield _mla("16 splits, bfloat16 state, packed", splits=16, state_dtype=state16, output_quant=packed)
    yield _mla("in bf16, causal", compute="bf16")
    yield _mla("in bf16, float32 state, fp8_group64_f32_row", state_dtype=state32, compute="bf16", output_quant=row64)
    yield _mla(
        "in bf16, full pair, bfloat16 state, packed", causal=False, pair=True, state_dtype=state16, compute="bf16",
        output_quant=packed,
    )  # fmt: skip


def _mla(label: str, pair: bool = False, splits: int = 1, tokens: int = 16384, **options: Any) -> Call:
    """Through ``steps_of``, which takes a number of splits: attention alone, with splits also their merge. The kernels
    that prepare its operands have calls of their own."""
    from jax_fp8attn.pallas import mla_prefill_sm90 as kernel
    from jax_fp8attn.problems import MlaArrays, MlaProblem

    heads, sequences = 2, 2
    options = {"out_dtype": jnp.dtype(BF16), "return_lse": True, "compute": "fp8", **options}
    dtype = jnp.dtype(jnp.float8_e4m3fn if options["compute"] == "fp8" else BF16)
    problem = MlaProblem(
        tokens=tokens, keys=tokens, sequences=sequences, heads=heads, q_dtype=dtype, k_dtype=dtype, v_dtype=dtype,
        k_rope_dtype=dtype if pair else None, **options,
    )  # fmt: skip
    of = jax.ShapeDtypeStruct
    one, ranges = of((1,), F32), of((sequences,), jnp.int32)
    state = problem.state_dtype
    arrays = MlaArrays(
        of((tokens, heads, 192), dtype),
        of((tokens, heads, 128 if pair else 192), dtype),
        of((tokens, 64), dtype) if pair else None,
        of((tokens, heads, 128), dtype),
        *[ranges] * 4,
        *[one] * 4,
        None if state is None else of((tokens, heads, 128), state),
        None if state is None else of((heads, tokens), F32),
        one if isinstance(problem.output_quant, Fp8PerTensor) else None,
    )
    config = kernel.default_config(problem)
    if splits > 1:  # as where tiles are few
        config = dataclasses.replace(config, splits=splits, blocks=0)
    steps = kernel.steps_of(problem, config)
    leaves, tree = jax.tree.flatten((arrays, jax.eval_shape(steps.prepare, arrays)))

    def run(*given: Any) -> Any:
        arrays, (operands, work) = jax.tree.unflatten(tree, given)
        return steps.finish(arrays, work, steps.attend(operands))

    return Call(label, run, tuple(leaves))


def mla_prepare_calls() -> Iterator[Call]:
    """Every type of values; one and several tiles a block; stores of every width; the casts."""
    from jax_fp8attn.pallas.mla_prepare_sm90 import PrepareConfig, cast

    for dtype in (jnp.float8_e4m3fn, BF16, F16, F32):
        yield _mla_prepare(jnp.dtype(dtype).name, dtype)
    for dtype, config in ((jnp.float8_e4m3fn, PrepareConfig(2, 8)), (BF16, PrepareConfig(2, 2))):
        yield _mla_prepare(f"{jnp.dtype(dtype).name} {config}", dtype, config)
    yield _mla_prepare("bfloat16 two instances", BF16, instances=2)
    of = jax.ShapeDtypeStruct
    for dtype in (BF16, F32):
        yield Call(f"cast {jnp.dtype(dtype).name}", cast, (of((512, 4, 192), dtype), of((1,), F32)))
    yield Call("cast two instances, one piece a block", cast, (of((16, 2, 192), BF16), of((2,), F32)))


def _mla_prepare(label: str, dtype: Any, config: Any = None, instances: int = 1) -> Call:
    from jax_fp8attn.pallas import mla_prepare_sm90 as kernel
    from jax_fp8attn.pallas.common import tile_list
    from jax_fp8attn.problems import MlaProblem

    fp8, keys, heads, sequences = jnp.dtype(jnp.float8_e4m3fn), 512, 4, 2
    problem = MlaProblem(
        tokens=keys, keys=keys, sequences=sequences, heads=heads, q_dtype=fp8, k_dtype=fp8, v_dtype=jnp.dtype(dtype),
        out_dtype=jnp.dtype(BF16), instances=instances,
    )  # fmt: skip

    def prepare(v: Any, scale: Any, start: Any, length: Any) -> Any:
        blocks = tile_list.key_blocks(start, length, keys, kernel.KEYS)
        return kernel.prepare_values(problem, v, scale, blocks, config)

    of = jax.ShapeDtypeStruct
    ranges = of((sequences,), jnp.int32)
    return Call(label, prepare, (of((keys, heads, 128), dtype), of((instances,), F32), ranges, ranges))


def gdn_prepare_calls() -> Iterator[Call]:
    """State heads that share q or v, norms and none, packed rows; several heads a block. With one, ptxas takes 168
    registers at most, so that three blocks fit; nvJitLink takes some more."""
    yield _gdn_prepare("1 a block", (2, 2, 4))
    yield _gdn_prepare("1 a block, no norms", (2, 2, 4), norm=False)
    yield _gdn_prepare("1 a block, own queries", (4, 2, 2))
    yield _gdn_prepare("packed, 1 a block", (2, 2, 8), packed=True)
    yield _gdn_prepare("2 a block, own queries", (4, 2, 2), 2)


def _gdn_prepare(
    label: str, counts: tuple[int, int, int], size: int = 1, norm: bool = True, packed: bool = False
) -> Call:
    from jax_fp8attn.pallas import gdn_prepare_sm90 as kernel
    from jax_fp8attn.pallas.common.gdn_chunks import chunk_list
    from jax_fp8attn.problems import GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem

    tokens, sequences, width, state_heads = 512, 2, 128, max(counts)
    names = ("q_heads", "k_heads", "v_heads")
    facts = dict(zip(names, counts, strict=True)) | {"tokens": tokens, "sequences": sequences, "qk_l2norm": norm}
    facts |= {"k_width": width, "v_width": width, "dtype": jnp.dtype(BF16), "out_dtype": jnp.dtype(BF16)}
    facts["state_dtype"] = jnp.dtype(F32)
    of, rows = jax.ShapeDtypeStruct, (tokens, state_heads)
    one, per_head, ranges = of((1,), F32), of((1, state_heads), F32), of((sequences,), jnp.int32)
    if packed:
        problem: Any = GdnPoolProblem(**facts, pool_rows=1)
        qkv = of((tokens, sum(counts) * width), BF16)
        arrays: Any = GdnPoolArrays(
            qkv, of(rows, BF16), of(rows, BF16), per_head, per_head, *[None] * 4, ranges, ranges, None, None, one
        )
    else:
        problem = GdnProblem(**facts)
        parts = [of((tokens, n, width), BF16) for n in counts]
        arrays = GdnArrays(*parts, of(rows, F32), of(rows, F32), ranges, ranges, None, None, None, one)
    leaves, tree = jax.tree.flatten(arrays)
    config = kernel.PrepareConfig(size)

    def prepare(*given: Any) -> Any:
        arrays = jax.tree.unflatten(tree, given)
        run = kernel.prepare_packed if packed else kernel.prepare
        return run(problem, arrays, chunk_list(arrays.start, arrays.length, tokens), config)

    return Call(label, prepare, tuple(leaves))


def gdn_recurrence_calls() -> Iterator[Call]:
    """Every form; outputs, states and layouts of every kind; a pool in place; checkpoints."""
    from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig

    registers, narrow, wide = (
        RecurrenceConfig(*x) for x in ((64, "registers", 3, 3), (32, "shared", 4, 2), (128, "shared", 2, 2))
    )
    state16, state32, kv = jnp.dtype(BF16), jnp.dtype(F32), {"state_layout": "kv"}
    yield _gdn_recurrence("64 in registers", registers)
    options = {"state_dtype": state16, "checkpoint_every": 128, **kv}
    yield _gdn_recurrence("64 in registers, pool kv bfloat16, checkpoints", registers, pool=True, **options)
    yield _gdn_recurrence("128 shared, kv bfloat16, checkpoints", wide, **options)
    three = dataclasses.replace(registers, output_stages=2)
    yield _gdn_recurrence("64 in registers, float32 output", three, out_dtype=state32)
    yield _gdn_recurrence("32 shared, float16 output", narrow, out_dtype=jnp.dtype(F16), **kv)
    yield _gdn_recurrence("64 in registers, transition", registers, initial=False, transition=True)


def gdn_segments_calls() -> Iterator[Call]:
    """Both passes and the fold, in every form of the first pass; a pool in place; with states and without."""
    from jax_fp8attn.pallas.gdn_prefill_sm90 import FIRST_PASS
    from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig

    narrow, registers, wide = (
        RecurrenceConfig(*x) for x in ((32, "shared", 4, 2), (64, "registers", 3, 3), (128, "shared", 2, 2))
    )
    options = {"state_dtype": jnp.dtype(BF16), "checkpoint_every": 128, "state_layout": "kv"}
    yield _gdn_recurrence("32 shared behind 64 in registers", narrow, first=FIRST_PASS[0])
    yield _gdn_recurrence("64 in registers behind 3 stages, pool", registers, pool=True, first=FIRST_PASS[1], **options)
    yield _gdn_recurrence("64 in registers behind 32 shared", registers, False, first=FIRST_PASS[2], **options)
    yield _gdn_recurrence("128 shared behind 32 shared", wide, first=FIRST_PASS[3])


def _gdn_recurrence(
    label: str, config: Any, initial: bool = True, pool: bool = False, first: Any = None, **options: Any
) -> Call:
    """Of segments, if there is a ``first`` pass."""
    from jax_fp8attn.pallas import gdn_prefill_sm90
    from jax_fp8attn.pallas import gdn_recurrence_sm90 as kernel
    from jax_fp8attn.pallas.common.gdn_chunks import CHUNK, Chunks, Prepared
    from jax_fp8attn.problems import GdnProblem

    tokens, sequences, heads, k_heads, dtype = 1024, 2, 6, 2, jnp.dtype(BF16)
    options = {"out_dtype": dtype, "state_dtype": jnp.dtype(F32), **options}
    problem = GdnProblem(
        tokens=tokens, sequences=sequences, q_heads=k_heads, k_heads=k_heads, v_heads=heads, k_width=128, v_width=128,
        dtype=dtype, has_initial_state=initial, **options,
    )  # fmt: skip
    of, count = jax.ShapeDtypeStruct, tokens // CHUNK + sequences
    each, every = of((sequences,), jnp.int32), of((count,), jnp.int32)
    shapes = ((heads, CHUNK, 128), (heads, CHUNK, 128), (heads, CHUNK, CHUNK), *[(k_heads, CHUNK, 128)] * 2)
    prepared = Prepared(
        *(of((count, *shape), BF16) for shape in shapes), of((count, heads, 2, CHUNK), F32), of((count, heads), F32)
    )
    rows = of((5, *problem.state_shape), problem.state_dtype)
    states = kernel.States(*((rows, each) if initial else (None, None)), each if pool else None)
    leaves, tree = jax.tree.flatten((Chunks(each, each, every, every), prepared, each, each, states))
    whole = gdn_prefill_sm90.GdnConfig(None, config, 4 if first else 0, first)

    def run(*given: Any) -> Any:
        chunks, prepared, start, length, states = jax.tree.unflatten(tree, given)
        if not first:
            return kernel.build(problem, config, pool)(chunks, prepared, start, length, states)
        arrays = types.SimpleNamespace(start=start, length=length)
        return gdn_prefill_sm90.recurrence(problem, arrays, chunks, prepared, states, whole)

    return Call(label, run, tuple(leaves))


def sparse_calls() -> Iterator[Call]:
    """Both kernels: rows and queries of both forms, one pool and two, scales of both kinds, head counts that fill no
    tile, outputs of both widths."""
    fp8 = {"group": 64, "scale_dtype": F32}
    bytes32 = {"group": 32, "scale_dtype": jnp.uint8}
    yield _sparse("FP8 rows, 64 heads, two pools", rows=fp8, extend=64)
    yield _sparse("FP8 rows, 72 heads, a block a tile, float32 output", rows=fp8, heads=72, blocks=0, out_dtype=F32)
    yield _sparse("E8M0 scales per 32, queries too, two pools", rows=bytes32, q=bytes32, extend=64)
    yield _sparse("bf16 rows, FP8 queries, 128 heads, two pools", q=fp8, heads=128, extend=64)
    yield _sparse("16 heads, FP8 rows, two pools", rows=fp8, heads=16, extend=64)
    yield _sparse("7 heads, bf16 rows, FP8 queries, float32 output", q=fp8, heads=7, out_dtype=F32)
    yield _sparse("32 heads, E8M0 scales per 32, queries too, two pools", bytes32, bytes32, 32, extend=64)


def _sparse(
    label: str, rows: Any = None, q: Any = None, heads: int = 64, extend: int = 0, out_dtype: Any = BF16, **cut: Any
) -> Call:
    """Through ``build``, with parts of the configuration replaced."""
    from jax_fp8attn.pallas import sparse_narrow_sm90, sparse_prefill_sm90
    from jax_fp8attn.problems import PoolForm, SparseArrays, SparsePool, SparseProblem

    tokens, prefix, entries = 64, 1024, 4096
    of = jax.ShapeDtypeStruct
    list_of = SparsePool(None, of((entries,), jnp.int32), of((tokens,), jnp.int32), of((tokens,), jnp.int32))
    given = [_latent(form, *lead) for form, lead in ((q, (tokens, heads)), (rows, (prefix,)), (rows, (extend,)))]
    pools = [PoolForm(given[1][0], count, entries) if count else None for count in (prefix, extend)]
    problem = SparseProblem(
        tokens=tokens, heads=heads, q=given[0][0], prefix=pools[0], extend=pools[1], out_dtype=jnp.dtype(out_dtype),
        has_sink=True, return_lse=True,
    )  # fmt: skip
    lists = [None if form is None else list_of._replace(rows=x) for form, (_, x) in zip(pools, given[1:], strict=True)]
    leaves, tree = jax.tree.flatten(SparseArrays(given[0][1], *lists, of((1,), F32), of((1, heads), F32)))
    kernel = sparse_narrow_sm90 if heads <= sparse_narrow_sm90.HEADS else sparse_prefill_sm90
    run = kernel.build(problem, dataclasses.replace(kernel.default_config(problem), **cut))
    return Call(label, lambda *given: run(jax.tree.unflatten(tree, given)), tuple(leaves))


def _latent(form: Any, *lead: int) -> tuple[Any, Any]:
    """Form and shapes of rows: bf16 without ``form``."""
    from jax_fp8attn.latent import NOPE, ROPE, WIDTH, Fp8Latent
    from jax_fp8attn.problems import RowForm

    of, e4m3 = jax.ShapeDtypeStruct, jnp.dtype(jnp.float8_e4m3fn)
    if form is None:
        return RowForm(jnp.dtype(BF16)), of((*lead, WIDTH), BF16)
    scales = of((*lead, NOPE // form["group"]), form["scale_dtype"])
    row_form = RowForm(e4m3, form["group"], jnp.dtype(form["scale_dtype"]))
    return row_form, Fp8Latent(of((*lead, NOPE), e4m3), of((*lead, ROPE), BF16), scales)


GATED: dict[str, tuple[Callable[[], Iterator[Call]], Budget]] = {
    "gdn_segments": (gdn_segments_calls, Budget(registers=255, shared_memory=232448)),
    "gdn_recurrence": (gdn_recurrence_calls, Budget(registers=255, shared_memory=232448)),
    "merge_attn_states": (merge_calls, Budget(registers=128, shared_memory=1024)),
    "gdn_prepare": (gdn_prepare_calls, Budget(registers=255, shared_memory=76800)),
    "mla_prepare": (mla_prepare_calls, Budget(registers=168, shared_memory=131072)),
    "mla_prefill": (mla_calls, Budget(registers=255, shared_memory=232448)),
    "sparse_prefill": (sparse_calls, Budget(registers=255, shared_memory=232448)),
}
"""Op: its calls and what each of its kernels may use."""
