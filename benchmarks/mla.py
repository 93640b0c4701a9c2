"""``mla_prefill`` against FlashAttention-3: the kernel alone, and the op from the operands as they are given.

What a variant says, "<fp8 or bf16> <causal or full>" and then

    (nothing)         e4m3 (or bf16) operands in, bf16 out
    from bf16         bf16 operands, cast inside the op; FlashAttention-3 gets e4m3 ones
    to <output>       FP8 output, named as in the merge's benchmark: beside bf16 output alone, and beside bf16 output
                      and its quantisation as a program of its own
    with a state      an earlier result merged inside: beside the same without it, and beside a merge of its own
    V of mean 1       where a sum that is not exact is seen; FlashAttention-3's error is stated and not held to a bound
    in chunks         a context of S - T tokens in chunks of T, then the T new ones; e4m3 keys and values, no projection
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_fp8attn.benchmarks import merge, models, peers
from jax_fp8attn.benchmarks.models import Case
from jax_fp8attn.benchmarks.timing import Contender
from jax_fp8attn.benchmarks.trial import Trial
from jax_fp8attn.pallas import mla_prefill_sm90

from jax_fp8attn import merge_attn_states, quantize_fp8
from jax_fp8attn.dispatch import current_device
from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import E4M3, Fp8Array, Fp8PerTensor, cast_fp8

SETS = 2
CHECKED = 256  # rows, the last ones of all sequences; first and last head
BOUNDS = {"fp8": 0.035, "bf16": 0.006}  # relative L2 on standard normal operands
QUANTISED = 0.05  # and of an output in FP8, which rounds once more
SHIFTED = 0.005  # with V of mean 1
ANY = 1.0  # of peers there: their error is stated, not judged
OUTPUT_SCALE = 0.0125  # values of short rows reach 5
KERNELS = ("fp8attn_mla_prefill", "fp8attn_merge")  # attention, and the merge where the keys are split
BLOCKS = 132  # of threads that run at once: with fewer tiles of 128 rows a peer may split the keys


class _Form(NamedTuple):
    """What a variant says."""

    precision: str
    causal: bool
    extra: str

    @classmethod
    def of(cls, variant: str) -> _Form:
        precision, mask, *extra = variant.split(maxsplit=2)
        return cls(precision, mask == "causal", "".join(extra))


class _Operands(NamedTuple):
    """One set of inputs."""

    given: tuple[jax.Array, jax.Array, jax.Array]  # q, k and v of the op
    stored: tuple[jax.Array, jax.Array, jax.Array]  # as they are multiplied
    state: tuple[jax.Array, jax.Array] | tuple[None, None]  # bf16 [T, H, 128] and float32 [H, T]


class _Expected(NamedTuple):
    """The right result in float32 for some rows of the first and the last head."""

    rows: np.ndarray
    out: jax.Array  # [2, rows, 128]
    lse: jax.Array  # [2, rows]


def trial(case: Case, folder: Path | None) -> Trial:
    form, shape = _Form.of(case.variant), case.shape
    inputs = [_operands(shape, form, seed) for seed in range(SETS)]
    expected = _expected(shape, inputs[0].stored, form.causal)
    merges = peers.merges(folder) if form.extra == "in chunks" else {}
    contenders = [*_ours(shape, form, inputs), *_theirs(shape, form, inputs, peers.fa3(folder), merges)]
    merged = _merged(expected, *inputs[0].state) if form.extra == "with a state" else expected

    def error(contender: Contender, result: Any) -> float:
        return _error(result, expected if contender.name == "without a state" else merged)

    return Trial(
        contenders=contenders,
        sets=SETS,
        bytes=sum(x.nbytes for x in jax.tree.leaves((inputs[0].given, inputs[0].state))) + _bytes_out(shape, form),
        flops=2 * (192 + 128) * shape["H"] * models.mla_pairs(shape, form.causal),
        error=error,
        bound=functools.partial(_bound, form),
    )


def _operands(shape: dict[str, int], form: _Form, seed: int) -> _Operands:
    """Standard normal numbers; a state weighs as much as the keys of the call."""
    keys = jax.random.split(jax.random.key(seed), 5)
    sizes = ((shape["T"], shape["H"], 192), (shape["S"], shape["H"], 192), (shape["S"], shape["H"], 128))
    q, k, v = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys[:3], sizes, strict=True))
    if form.extra == "V of mean 1":
        v = v + 1
    given = (q, k, v)
    stored = given if form.precision == "bf16" else tuple(map(cast_fp8, given))
    state = (None, None)
    if form.extra == "with a state":
        length = shape["S"] / shape["B"]
        out = jax.random.normal(keys[3], (*q.shape[:2], 128), jnp.bfloat16) * jnp.bfloat16(length**-0.5)
        state = out, jax.random.normal(keys[4], q.shape[1::-1]) + np.float32(np.log(length))
    return _Operands(given if form.extra == "from bf16" else stored, stored, state)


def calls(case: Case) -> tuple[MlaProblem, list[MlaArrays], float]:
    """The problem of a case, what to call it with, and how far two right results may be apart."""
    form = _Form.of(case.variant)
    inputs = [_operands(case.shape, form, seed) for seed in range(SETS)]
    problem = _problem(case.shape, form, inputs[0].given, **_options(form, inputs[0]))
    given = [_arrays(case.shape, x.given, x.state) for x in inputs]
    if not isinstance(problem.output_quant, Fp8PerTensor):
        given = [arrays._replace(output_scale=None) for arrays in given]
    return problem, given, BOUNDS[form.precision]


def _bytes_out(shape: dict[str, int], form: _Form) -> int:
    """Of the output; of lse where the op returns it."""
    rows = shape["T"] * shape["H"]
    if form.extra.startswith("to "):
        return merge.bytes_out((shape["T"], shape["H"], 128), _spec(form), jnp.bfloat16)
    return 2 * 128 * rows + 4 * rows


def _spec(form: _Form) -> Any:
    spec = merge.OUTPUTS[form.extra.removeprefix("to ")]
    return Fp8PerTensor(OUTPUT_SCALE) if isinstance(spec, Fp8PerTensor) else spec


def _options(form: _Form, operands: _Operands) -> dict[str, Any]:
    """Of the problem, beyond its operands."""
    if form.extra == "with a state":
        return {"state_dtype": operands.state[0].dtype}
    return {"output_quant": _spec(form).static(), "return_lse": False} if form.extra.startswith("to ") else {}


def _problem(shape: dict[str, int], form: _Form, operands: tuple[jax.Array, ...], **options: Any) -> MlaProblem:
    q, k, v = operands
    facts = {"out_dtype": jnp.dtype(jnp.bfloat16), "causal": form.causal, "return_lse": True} | options
    return MlaProblem(
        tokens=q.shape[0], keys=k.shape[0], sequences=shape["B"], heads=shape["H"], q_dtype=q.dtype, k_dtype=k.dtype,
        v_dtype=v.dtype, compute=form.precision, **facts,
    )  # fmt: skip


def _arrays(shape: dict[str, int], operands: tuple[jax.Array, ...], state: Any = (None, None)) -> MlaArrays:
    """Of a call whose keys are all those of the shape, or those of the only sequence."""
    q, k, v = operands
    one = jnp.ones(1)
    lengths = models.mla_lengths(shape)
    if len(lengths[1]) == 1:
        lengths = (q.shape[0],), (k.shape[0],)
    ranges = [jnp.asarray(x, jnp.int32) for n in lengths for x in (np.cumsum([0, *n[:-1]]), n)]
    scales = (one * 192**-0.5, one, one, one)
    return MlaArrays(q, k, None, v, *ranges, *scales, *state, one * OUTPUT_SCALE)


def _op(problem: MlaProblem) -> Callable[[MlaArrays], Any]:
    op = mla_prefill_sm90.build(problem, mla_prefill_sm90.default_config(problem))
    quant = isinstance(problem.output_quant, Fp8PerTensor)
    return jax.jit(lambda arrays: merge.leaves(op(arrays if quant else arrays._replace(output_scale=None))))


def _ours(shape: dict[str, int], form: _Form, inputs: list[_Operands]) -> list[Contender]:
    """None where the kernel does not take the problem."""
    problem = _problem(shape, form, inputs[0].given)
    if mla_prefill_sm90.supports(problem, current_device()):
        return []
    if form.extra.startswith("to "):
        return _ours_quantised(shape, form, inputs)
    if form.extra == "with a state":
        return _ours_with_a_state(shape, form, inputs)
    if form.extra == "in chunks":
        return [_ours_in_chunks(shape, form, inputs)]
    given = [_arrays(shape, x.given) for x in inputs]
    op = _op(problem)
    whole = Contender("pallas", lambda i: op(given[i]))
    kernel = dataclasses.replace(whole, name="pallas kernel", within=whole.name, kernels=KERNELS)
    return [whole] if form.extra else [kernel, whole]


def _ours_quantised(shape: dict[str, int], form: _Form, inputs: list[_Operands]) -> list[Contender]:
    spec = _spec(form)
    given = [_arrays(shape, x.given) for x in inputs]
    fused = _op(_problem(shape, form, inputs[0].given, **_options(form, inputs[0])))
    plain = _op(_problem(shape, form, inputs[0].given, return_lse=False))
    quantise = jax.jit(lambda x: merge.leaves(quantize_fp8(x, spec)))
    return [
        Contender("pallas", lambda i: fused(given[i])),
        Contender("bf16 output", lambda i: plain(given[i])),
        Contender("unfused", lambda i: quantise(plain(given[i]))),
    ]


def _ours_with_a_state(shape: dict[str, int], form: _Form, inputs: list[_Operands]) -> list[Contender]:
    plain = [_arrays(shape, x.given) for x in inputs]
    given = [_arrays(shape, x.given, x.state) for x in inputs]
    fused = _op(_problem(shape, form, inputs[0].given, **_options(form, inputs[0])))
    alone = _op(_problem(shape, form, inputs[0].given))
    merging = jax.jit(functools.partial(merge_attn_states, return_lse=True, implementation="pallas"))
    return [
        Contender("pallas", lambda i: fused(given[i])),
        Contender("without a state", lambda i: alone(plain[i])),
        Contender("unfused", lambda i: merging(*inputs[i].state, *alone(plain[i]))),
    ]


def _cut(shape: dict[str, int], operands: tuple[Any, Any, Any]) -> list[tuple[Any, Any, Any]]:
    """q with each chunk of the context, and last with the new tokens."""
    q, k, v = operands
    tokens = shape["T"]
    return [(q, k[first : first + tokens], v[first : first + tokens]) for first in range(0, shape["S"], tokens)]


def _ours_in_chunks(shape: dict[str, int], form: _Form, inputs: list[_Operands]) -> Contender:
    """A call a chunk, each merging the result of those before."""
    chunks = [[_arrays(shape, chunk) for chunk in _cut(shape, x.given)] for x in inputs]
    full, some = form._replace(causal=False), _cut(shape, inputs[0].given)[0]
    merges = {"state_dtype": jnp.dtype(jnp.bfloat16)}
    first, last = _op(_problem(shape, full, some)), _op(_problem(shape, form, some, **merges))
    more = _op(_problem(shape, full, some, **merges))

    def call(i: int) -> Any:
        *context, own = chunks[i]
        state = first(context[0])
        for arrays in context[1:]:
            state = more(arrays._replace(initial_out=state[0], initial_lse=state[1]))
        return last(own._replace(initial_out=state[0], initial_lse=state[1]))

    return Contender("pallas", call)


def _theirs(
    shape: dict[str, int], form: _Form, inputs: list[_Operands], fa3: dict[str, Any], merges: dict[str, Any]
) -> list[Contender]:
    """FlashAttention-3; it neither merges a state nor writes FP8."""
    if not fa3 or form.extra.startswith("to ") or form.extra == "with a state":
        return []
    tensors = [tuple(map(_tensor, x.stored)) for x in inputs]
    if form.extra == "in chunks":
        triton = {name: merge for name, merge in merges.items() if name == "vllm triton"}
        pairs = [(a, b) for a in fa3 for b in triton]
        return [_fa3_in_chunks(f"{a} + {b}", fa3[a], triton[b], shape, tensors) for a, b in pairs]
    few = shape["H"] * sum(-(-n // 128) for n in models.mla_lengths(shape)[0]) < BLOCKS
    calls = []
    for name, function in fa3.items():
        name = name if form.precision == "fp8" else f"{name} bf16"
        calls.append(_fa3(name, function, shape, form, tensors, splits=1))
        if few and not form.extra:
            calls.append(_fa3(f"{name} split", function, shape, form, tensors, splits=0))
    return calls


def _tensor(x: jax.Array) -> Any:
    import torch

    kind = torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float8_e4m3fn
    return peers.to_torch(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(kind).reshape(x.shape)


def _fa3(
    name: str, function: Any, shape: dict[str, int], form: _Form, tensors: list[tuple[Any, ...]], splits: int
) -> Contender:
    import torch

    lengths = models.mla_lengths(shape)
    offsets = [torch.tensor(np.cumsum([0, *n]), device="cuda", dtype=torch.int32) for n in lengths]
    longest = tuple(map(max, lengths))
    size = (shape["T"], shape["H"], 128)
    outputs = [torch.empty(size, device="cuda", dtype=torch.bfloat16) for _ in tensors]

    def call(i: int) -> Any:
        return function(*tensors[i], outputs[i], form.causal, *offsets, longest, splits)

    return Contender(name, call, is_peer=True)


def _fa3_in_chunks(
    name: str, attend: Any, merging: Any, shape: dict[str, int], tensors: list[tuple[Any, ...]]
) -> Contender:
    """As vLLM does: the chunks of the context one after the other, each merged with those before, then the new ones."""
    import torch

    tokens = shape["T"]
    offsets = torch.tensor([0, tokens], device="cuda", dtype=torch.int32)
    cut = [_cut(shape, x) for x in tensors]

    def one(chunk: tuple[Any, Any, Any], causal: bool) -> tuple[Any, Any]:
        out = torch.empty((tokens, shape["H"], 128), device="cuda", dtype=torch.bfloat16)
        return attend(*chunk, out, causal, offsets, offsets, (tokens, tokens))

    def merged(state: tuple[Any, Any], part: tuple[Any, Any]) -> tuple[Any, Any]:
        result = torch.empty_like(state[0]), torch.empty_like(state[1])
        merging(result[0], *state, *part, None, result[1])
        return result

    def call(i: int) -> Any:
        *context, own = cut[i]
        state = one(context[0], False)
        for chunk in context[1:]:
            state = merged(state, one(chunk, False))
        return merged(state, one(own, True))

    return Contender(name, call, is_peer=True)


def _expected(shape: dict[str, int], stored: tuple[jax.Array, ...], causal: bool) -> _Expected:
    """The last rows of every sequence."""
    rows, first, end = [], [], []
    starts = [np.cumsum([0, *lengths]) for lengths in models.mla_lengths(shape)]
    for q_start, k_start, queries, keys in zip(*(x[:-1] for x in starts), *models.mla_lengths(shape), strict=True):
        local = np.arange(max(0, queries - max(1, CHECKED // shape["B"])), queries)
        rows.append(q_start + local)
        first.append(np.full(len(local), k_start))
        end.append(k_start + (np.minimum(keys, local + 1 + keys - queries) if causal else np.full(len(local), keys)))
    rows = np.concatenate(rows)
    q, k, v = stored
    heads = np.array([0, -1])
    return _Expected(rows, *_attention(q[rows][:, heads], k[:, heads], v[:, heads], *map(np.concatenate, (first, end))))


@jax.jit
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, end: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Each row over the keys from ``first`` to ``end``."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    score = jnp.einsum("qhd,khd->hqk", q, k, precision="highest") * 192**-0.5
    key = jnp.arange(k.shape[0])
    score = jnp.where((key >= first[:, None]) & (key < end[:, None]), score, -jnp.inf)
    out = jnp.einsum("hqk,khd->hqd", jax.nn.softmax(score, axis=-1), v, precision="highest")
    return out, jax.nn.logsumexp(score, axis=-1)


def _merged(expected: _Expected, out: jax.Array, lse: jax.Array) -> _Expected:
    """With an earlier result over other keys."""
    heads = np.array([0, -1])
    earlier = jnp.swapaxes(out[expected.rows][:, heads], 0, 1).astype(jnp.float32)
    both = jnp.stack([lse[heads][:, expected.rows], expected.lse])
    weights = jax.nn.softmax(both, axis=0)[..., None]
    return expected._replace(out=weights[0] * earlier + weights[1] * expected.out, lse=jnp.logaddexp(*both))


def _error(result: Any, expected: _Expected) -> float:
    out = result[0] if isinstance(result, tuple | list) else result
    if isinstance(out, Fp8Array):
        out = out.dequantize()
    elif not isinstance(out, jax.Array):
        out = jnp.from_dlpack(out)
    if out.dtype == E4M3:  # without its scale, as ``merge.leaves`` returns it
        out = out.astype(jnp.float32) * OUTPUT_SCALE
    got = jnp.swapaxes(out[expected.rows][:, np.array([0, -1])], 0, 1).astype(jnp.float32)
    return float(jnp.linalg.norm((got - expected.out).ravel()) / jnp.linalg.norm(expected.out.ravel()))


def _bound(form: _Form, contender: Contender) -> float:
    if form.extra == "V of mean 1":
        return ANY if contender.is_peer else SHIFTED
    if form.extra.startswith("to ") and contender.name != "bf16 output":
        return QUANTISED
    return BOUNDS[form.precision]
