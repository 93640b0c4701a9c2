"""Heads and tokens over devices: R17. Eight host devices (conftest.py); the opaque kernel is a stand-in."""

import functools
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8attn as fp8attn
from jax_fp8attn import InvalidInputError, dispatch, partition, sharding, testing
from jax_fp8attn.dispatch import Candidate
from jax_fp8attn.offsets import owner
from jax_fp8attn.problems import MergeProblem, MlaProblem, SparseProblem
from jax_fp8attn.quantize import quantize_output, to_stored
from jax_fp8attn.xla import merge

GATHERS = re.compile(r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(")
BOUND = 2e-6  # of sums in another order, float32
PACKED, COLUMNS = fp8attn.Fp8PerGroup.deepgemm_sm100(), fp8attn.Fp8PerGroup.deepgemm_sm90()


def mesh_of(devices: int = 8, kind: Any = AxisType.Auto, name: str = "x") -> jax.sharding.Mesh:
    return jax.make_mesh((devices,), (name,), axis_types=(kind,), devices=jax.devices()[:devices])


def floats(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).standard_normal(shape), dtype)


def offsets(*ends: int) -> jax.Array:
    return jnp.array(ends, jnp.int32)


def collectives(compiled: Any) -> list[tuple[str, str]]:
    return GATHERS.findall(compiled.as_text())


# heads


def opaque(x: Any) -> Any:
    """The same bits out of a custom call that the partitioner knows nothing of: it replicates what goes in."""
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    columns = x.astype(jnp.float32).reshape(x.shape[0], -1)
    unit = jnp.eye(x.shape[0], dtype=jnp.float32)
    columns = jax.lax.linalg.triangular_solve(unit, columns, left_side=True, lower=True)
    return columns.reshape(x.shape).astype(x.dtype)


def stand_in(problem: Any, arrays: Any) -> Any:
    """Every argument has a say in every result of its head, as in the op, at a fraction of the time to compile."""
    if isinstance(problem, MergeProblem):
        outputs = jax.tree.map(opaque, arrays.outputs)
        return merge.run(problem, arrays._replace(outputs=outputs))
    arrays = jax.tree.map(opaque, arrays)
    if isinstance(problem, MlaProblem):
        out = arrays.q[..., :128] * arrays.k[..., :128] + arrays.v + arrays.k_rope[:, None, :1]
        return quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype), arrays.q[..., 0].T
    if isinstance(problem, SparseProblem):
        return arrays.q * arrays.sink[0][:, None] + arrays.prefix.rows[:1, None], arrays.q[..., 0].T
    heads = lambda x: jnp.repeat(x, problem.heads // x.shape[1], axis=1)
    out = heads(arrays.q) * heads(arrays.k) + arrays.v * (arrays.g * arrays.beta)[..., None]
    return out, arrays.initial_state * out[0][:, None]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every op has an opaque implementation on CPUs, first in the table. The problems that it was asked for."""
    problems: list[Any] = []
    module = types.ModuleType("opaque_kernel")
    module.supports = lambda problem, device: ()
    module.run = lambda problem, arrays: (problems.append(problem), stand_in(problem, arrays))[1]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for op in ("mla_prefill", "merge_attn_states", "sparse_prefill", "gdn_prefill"):
        rows = [row for row in dispatch.CANDIDATES[op] if row.name != "pallas"]
        monkeypatch.setitem(dispatch.CANDIDATES, op, (Candidate("pallas", module.__name__, ("cpu",)), *rows))
    monkeypatch.setenv("JAX_FP8ATTN_IMPLEMENTATION", "pallas")  # and nothing for other platforms
    dispatch.execute.clear_cache()
    yield problems
    dispatch.execute.clear_cache()


def mla_call(spec: Any = None) -> tuple[Any, list[Any], list[P]]:
    q, k, v = (floats(12, 16, d, seed=d) for d in (192, 128, 128))

    def call(q: Any, nope: Any, rope: Any, v: Any, cu: Any) -> Any:
        return fp8attn.mla_prefill(q, (nope, rope), v, cu_seqlens_q=cu, return_lse=True, output_quant=spec)

    heads = P(None, "x")
    return call, [q, k, floats(12, 64), v, offsets(0, 5, 12)], [heads, heads, P(), heads, P()]


def merge_call(spec: Any = None, layout: str = "HT") -> tuple[Any, list[Any], list[P]]:
    shape = (16, 6) if layout == "HT" else (6, 16)
    call = lambda *states: fp8attn.merge_attn_states(
        *states, prefill_tokens_with_context=4, output_quant=spec, return_lse=True, lse_layout=layout
    )
    states = [floats(6, 16, 128, seed=1), floats(*shape, seed=1), floats(6, 16, 128, seed=2), floats(*shape, seed=2)]
    return call, states, [P(None, "x"), P("x") if layout == "HT" else P(None, "x")] * 2


def stacked_call() -> tuple[Any, list[Any], list[P]]:
    call = lambda out, lse: fp8attn.merge_attn_states_n(out, lse, return_lse=True, output_quant=COLUMNS)
    return call, [floats(3, 6, 16, 128), floats(3, 16, 6)], [P(None, None, "x"), P(None, "x")]


def sparse_call() -> tuple[Any, list[Any], list[P]]:
    call = lambda q, rows, indices, sink: fp8attn.sparse_prefill_topk(q, rows, indices, attn_sink=sink, return_lse=True)
    indices = jnp.asarray(np.random.default_rng(0).integers(0, 9, (5, 4)), jnp.int32)
    arguments = [floats(5, 16, 512), floats(9, 512), indices, floats(16)]
    return call, arguments, [P(None, "x"), P(), P(), P("x")]


def gdn_call(key_heads: int = 16) -> tuple[Any, list[Any], list[P]]:
    """Two heads of values a head of keys with 8 of these."""

    def call(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any) -> Any:
        cu = offsets(0, 7, 20)
        return fp8attn.gdn_prefill(q, k, v, -jnp.abs(g), jnp.abs(beta) / 9, cu_seqlens=cu, initial_state=state)

    q, k, v = (floats(20, h, 16, seed=s) for s, h in enumerate((key_heads, key_heads, 16)))
    arguments = [q, k, v, floats(20, 16, seed=3), floats(20, 16, seed=4), floats(2, 16, 16, 16)]
    return call, arguments, [P(None, "x")] * 6


CALLS = {
    "mla": mla_call,
    "mla, scales by column": functools.partial(mla_call, COLUMNS),
    "mla, one scale": functools.partial(mla_call, fp8attn.Fp8PerTensor(0.5)),
    "merge": functools.partial(merge_call, None, "TH"),
    "merge, words of a device": functools.partial(merge_call, fp8attn.Fp8PerGroup(32, "ue8m0", "col_tma_packed")),
    "merge of three": stacked_call,
    "sparse": sparse_call,
    "gdn": gdn_call,
    "gdn, grouped": functools.partial(gdn_call, 8),
}


def sharded(call: Any, arguments: list[Any], specs: list[P], mesh: Any) -> tuple[Any, Any]:
    """The compiled program and its result."""
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
    compiled = jax.jit(call).lower(*placed).compile()
    return compiled, compiled(*placed)


def assert_by_heads(result: Any, whole: tuple[int, ...] = ()) -> None:
    """Every leaf is sharded, but those in ``whole`` and what is one number."""
    for number, leaf in enumerate(jax.tree.leaves(result)):
        assert leaf.sharding.is_fully_replicated == (number in whole or not leaf.ndim), number


QUICK = [*((name, "auto") for name in ("mla, scales by column", "merge", "gdn, grouped")), ("merge", "explicit")]
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


class TestHeads:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            pytest.param(name, kind, id=f"{name}-{label}", marks=() if (name, label) in QUICK else pytest.mark.slow)
            for name in CALLS
            for label, kind in KINDS.items()
        ],
    )
    def test_a_kernel_is_cut_by_heads(self, kernels: list[Any], name: str, kind: Any) -> None:
        """R17: bitwise as on one device, and nothing moves between devices."""
        call, arguments, specs = CALLS[name]()
        want = jax.jit(call)(*arguments)
        compiled, got = sharded(call, arguments, specs, mesh_of(kind=kind))
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(want))
        assert not collectives(compiled)
        assert_by_heads(got)
        heads = "v_heads" if name.startswith("gdn") else "heads"
        assert {getattr(problem, heads) for problem in kernels} == {16, 2}  # of one device, and of eight
        assert "trsm" in compiled.as_text()

    @pytest.mark.parametrize("name", ["merge", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mla", "sparse"))])
    def test_without_the_rule_operands_would_be_gathered(
        self, kernels: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """What the tests above are worth: the stand-in is opaque."""
        monkeypatch.setattr(partition, "by_compiler", lambda heads, problem, run: run(problem))
        compiled, _ = sharded(*CALLS[name](), mesh_of())
        assert "all-gather" in compiled.as_text()

    @pytest.mark.parametrize(
        "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=list(KINDS)
    )
    def test_words_that_straddle_devices(self, kernels: list[Any], kind: Any) -> None:
        """Four heads share a word of scales, a device has two: only scales are gathered, and all have all words."""
        call, arguments, specs = merge_call(PACKED)
        want = jax.jit(call)(*arguments)
        compiled, got = sharded(call, arguments, specs, mesh_of(kind=kind))
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(want))
        assert [(name, shape[:9]) for shape, name in collectives(compiled)] == [("all-gather", "f32[6,16]")]
        assert_by_heads(got, whole=(1,))

    @pytest.mark.slow
    @pytest.mark.parametrize("heads", [("x", "y"), ("y",)])
    def test_meshes_of_two_axes(self, kernels: list[Any], heads: tuple[str, ...]) -> None:
        """Heads over both, or over one while the other only has copies."""
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        call, arguments, _ = merge_call(COLUMNS)
        compiled, got = sharded(call, arguments, [P(None, heads), P(heads)] * 2, mesh)
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(jax.jit(call)(*arguments)))
        assert not collectives(compiled)

    @pytest.mark.slow
    def test_heads_that_devices_do_not_divide(self, kernels: list[Any]) -> None:
        """The compiler pads, and a kernel runs whole; explicit shardings of that kind do not exist."""

        def call(*states: jax.Array) -> jax.Array:
            place = lambda x, *spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))
            out, lse = place(states[0], None, "x"), place(states[1], "x")
            return fp8attn.merge_attn_states(out, lse, out, lse)

        mesh = mesh_of()
        arguments = [floats(6, 12, 128), floats(12, 6)]
        _, got = sharded(call, arguments, [P(), P()], mesh)
        want = fp8attn.merge_attn_states(*arguments * 2)
        testing.assert_bitwise_equal(got, want)

    @pytest.mark.slow
    def test_transforms(self, kernels: list[Any]) -> None:
        """vmap folds inside the cut; scan and a cond keep it; an export of one device has no trace of it."""
        call, arguments, specs = merge_call()
        many = [jnp.stack([x, x + 1]) for x in arguments]
        lead = [P(None, *spec) for spec in specs]
        f = jax.vmap(lambda *xs: jax.lax.scan(lambda c, x: (c, call(*x)), 0, xs)[1])
        many, lead = [x[None] for x in many], [P(None, *spec) for spec in lead]
        compiled, got = sharded(f, many, lead, mesh_of(2))
        testing.assert_bitwise_equal(got, jax.jit(f)(*many))
        assert not collectives(compiled)
        exported = jax.export.export(
            jax.jit(call), disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("lapack_strsm_ffi")]
        )(*arguments)
        assert "CustomSPMDPartitioning" not in exported.mlir_module()
        testing.assert_bitwise_equal(exported.call(*arguments), jax.jit(call)(*arguments))

    def test_one_device_and_shard_map_see_nothing_of_it(self, kernels: list[Any], monkeypatch: Any) -> None:
        """The compiled program of one device is the same with and without the rule."""
        call, arguments, specs = merge_call()
        text = lambda: re.sub(r"metadata=\{[^}]*\}", "", jax.jit(lambda *x: call(*x)).lower(*arguments).as_text())
        with_rule = text()
        inside = jax.shard_map(call, mesh=mesh_of(), in_specs=tuple(specs), out_specs=(P(None, "x"), P("x")))
        assert "custom_partitioning" not in str(jax.make_jaxpr(inside)(*arguments))
        monkeypatch.setattr(partition, "by_compiler", lambda heads, problem, run: run(problem))
        dispatch.execute.clear_cache()
        assert text() == with_rule

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["mla", "merge", "gdn, grouped"])
    def test_the_portable_implementation(self, name: str) -> None:
        """R17: jax.numpy code is cut by the compiler; mla_prefill's devices agree on one flag, whether V is finite."""
        call, arguments, specs = CALLS[name]()
        compiled, got = sharded(call, arguments, specs, mesh_of())
        testing.assert_bitwise_equal(got, jax.jit(call)(*arguments))
        assert {shape for shape, _ in collectives(compiled)} <= {"pred[]"}
        assert_by_heads(got)

    def test_other_axes_in_explicit_mode(self) -> None:
        """R15: an error that names the array and the axis."""
        mesh = mesh_of(2, AxisType.Explicit)
        call, arguments, specs = merge_call()
        with pytest.raises(InvalidInputError, match=r"axis 0 of outputs\[0\] is sharded over \('x',\).*reshard"):
            sharded(call, arguments, [P("x"), *specs[1:]], mesh)
        both = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
        with pytest.raises(InvalidInputError, match="expected one way for all"):
            sharded(call, arguments, [*specs[:3], P("y")], both)

    @pytest.mark.slow
    def test_gradients_in_explicit_mode(self) -> None:
        call, arguments, specs = gdn_call()
        loss = lambda *xs: jax.grad(lambda *xs: call(*xs)[0].sum(), (0, 1, 2))(*xs)
        _, got = sharded(loss, arguments, specs, mesh_of(2, AxisType.Explicit))
        testing.assert_bitwise_equal(got, jax.jit(loss)(*arguments))


# tokens


def over_tokens(call: Any, devices: int, in_specs: Any, out_specs: Any) -> Any:
    return jax.jit(jax.shard_map(call, mesh=mesh_of(devices), in_specs=in_specs, out_specs=out_specs))


def zigzag(tokens: int, devices: int) -> np.ndarray:
    """The tokens in the order in which devices have them."""
    parts = np.arange(tokens).reshape(2 * devices, -1)
    return np.concatenate([parts[[r, 2 * devices - 1 - r]].reshape(-1) for r in range(devices)])


def mla_operands(tokens: int, heads: int = 2) -> list[jax.Array]:
    return [floats(tokens, heads, 192, seed=1), floats(tokens, heads, 192, seed=2), floats(tokens, heads, 128, seed=3)]


def dense_attention(problem: MlaProblem, arrays: Any) -> Any:
    """Quick to compile: all scores at once."""
    row, key = jnp.arange(problem.tokens)[:, None], jnp.arange(problem.keys)
    owners = [owner(arrays.q_start, arrays.q_length, problem.tokens), owner(arrays.k_start, arrays.k_length, key.size)]
    inside = owners[0] >= 0
    b = jnp.maximum(owners[0], 0)[:, None]
    seen = inside[:, None] & (owners[0][:, None] == owners[1])
    if problem.causal:
        last = row - arrays.q_start[b] + arrays.k_length[b] - arrays.q_length[b]
        seen &= key - arrays.k_start[owners[1]] <= last
    k = arrays.k
    if arrays.k_rope is not None:
        k = jnp.concatenate([k, jnp.broadcast_to(arrays.k_rope[:, None], (*k.shape[:2], 64))], axis=-1)
    scales = (arrays.q_scale, arrays.k_scale, arrays.v_scale)
    q, k, v = (to_stored(x, s).astype(jnp.float32) for x, s in zip((arrays.q, k, arrays.v), scales, strict=True))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * arrays.softmax_scale * arrays.q_scale * arrays.k_scale
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.where(seen, jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0, lse)[..., None]), 0.0)
    out, lse = jnp.einsum("hqk,khd->qhd", p, v) * arrays.v_scale, lse.T
    if problem.state_dtype is not None:
        state_lse = jnp.where(inside[:, None], arrays.initial_lse.T, -jnp.inf)
        weights, lse = merge.merge_weights([state_lse, lse])
        out = sum(w[..., None] * x for w, x in zip(weights, (arrays.initial_out, out), strict=True))
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, lse.T) if problem.return_lse else out


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mla_prefill(implementation="xla") is ``dense_attention``."""
    module = types.ModuleType("dense_attention")
    module.supports, module.run = lambda problem, device: (), dense_attention
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(dispatch.CANDIDATES, "mla_prefill", (Candidate("xla", module.__name__),))
    dispatch.execute.clear_cache()
    yield
    dispatch.execute.clear_cache()


TOKENS = P("x")
BY_TOKEN = (TOKENS, P(None, "x"))


def relative_cu(tokens: int, length: int) -> dict[str, jax.Array]:
    """Sequences of every kind: over all devices, within one, empty, of one token, none; and what is outside of all."""
    at = lambda *fractions: offsets(*(round(f * tokens) for f in fractions))
    return {
        "one": at(0, 0, 1, 1, 1),
        "many": at(0, 0.05, 0.4, 0.4, 1),
        "holes": at(0.3, 0.31, 0.55, 0.55, 0.9),
        "borders": offsets(0, length, length + 1, 2 * length + 1, tokens),
        "none": at(0.5, 0.5, 0.5, 0.5, 0.5),
        "hostile": offsets(-5, tokens // 3, 2, 10**6, 7),
    }


class TestMla:
    """Rows of a sequence over devices as on one: sums in another order."""

    @staticmethod
    def check(devices: int, length: int, layout: str = "contiguous", cus: Any = None, **options: Any) -> None:
        tokens = devices * length
        operands, order = mla_operands(tokens), np.arange(tokens)
        if layout == "zigzag":
            order = zigzag(tokens, devices)
        options = {"out_dtype": jnp.float32, "return_lse": True, **options}
        call = functools.partial(sharding.mla_prefill_cp, axis_name="x", layout=layout, **options)
        cp = over_tokens(lambda q, k, v, cu: call(q, k, v, cu_seqlens=cu), devices, (*[TOKENS] * 3, P()), BY_TOKEN)
        one = jax.jit(lambda q, k, v, cu: fp8attn.mla_prefill(q, k, v, cu_seqlens_q=cu, **options))
        for name, cu in relative_cu(tokens, length).items():
            out, lse = cp(*(x[order] for x in operands), cu)
            want, want_lse = one(*operands, cu)
            np.testing.assert_allclose(out[np.argsort(order)], want, atol=BOUND, err_msg=name)
            np.testing.assert_allclose(lse[:, np.argsort(order)], want_lse, atol=BOUND, err_msg=name)

    @pytest.mark.parametrize(
        ("devices", "length"), [(8, 7), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 24), (1, 30)))]
    )
    def test_causal(self, dense: None, devices: int, length: int) -> None:
        """R17: odd and even numbers of tokens a device."""
        self.check(devices, length)

    @pytest.mark.slow
    def test_zigzag(self, dense: None) -> None:
        self.check(8, 6, "zigzag")

    @pytest.mark.slow
    @pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
    def test_all_keys(self, dense: None, layout: str) -> None:
        self.check(2, 10, layout, causal=False)

    @pytest.mark.slow
    @pytest.mark.parametrize("devices", [3, 4])
    def test_the_portable_implementation(self, devices: int) -> None:
        self.check(devices, 25)
        self.check(devices, 26, compute="bf16", softmax_scale=0.1)

    @pytest.mark.slow
    @pytest.mark.parametrize("spec", [COLUMNS, fp8attn.Fp8PerGroup(128, "ue8m0", "row"), PACKED])
    def test_quantised(self, dense: None, spec: Any) -> None:
        """Scales in their layout for the tokens of the device, the padding of each its own; keys travel as bytes."""
        devices, length = 2, 13
        operands = mla_operands(devices * length)
        state = floats(devices * length, 2, 128, seed=4), floats(2, devices * length, seed=4)
        call = functools.partial(sharding.mla_prefill_cp, axis_name="x", output_quant=spec)
        specs = (*[TOKENS] * 3, BY_TOKEN)
        scales = TOKENS if spec.scale_layout == "row" else P(None, "x")
        cp = over_tokens(
            lambda q, k, v, state: call(q, k, v, initial_state=state, v_scale=0.5),
            devices, specs, fp8attn.Fp8Array(TOKENS, scales, spec, length),
        )  # fmt: skip
        want = fp8attn.mla_prefill(*operands, initial_state=state, v_scale=0.5, out_dtype=jnp.float32)
        compiled = cp.lower(*operands, state).compile()
        got = compiled(*operands, state)
        for device in range(devices):
            rows = slice(device * length, (device + 1) * length)
            own = jax.tree.map(lambda x: x.addressable_shards[device].data, got)
            own = jax.device_put(own, jax.devices()[0])
            assert own.scales.shape == spec.scale_shape(length, 2)
            np.testing.assert_allclose(own.dequantize(), want[rows], rtol=0.07, atol=0.02)
        moved = [shape for shape, name in collectives(compiled) if name == "collective-permute"]
        assert any(shape.startswith("u8[") for shape in moved)
        keys = [shape for shape in moved if ",192]" in shape]
        assert keys and all(shape.startswith("u8[") for shape in keys)

    @pytest.mark.slow
    def test_pairs(self, dense: None) -> None:
        """The rope part that heads share goes round the ring once."""
        q, k, v = mla_operands(16)
        call = lambda q, nope, rope, v: sharding.mla_prefill_cp(
            q, (nope, rope), v, axis_name="x", out_dtype=jnp.float32
        )
        got = over_tokens(call, 2, (TOKENS,) * 4, TOKENS)(q, k[..., :128], k[:, 0, 128:], v)
        want = fp8attn.mla_prefill(q, (k[..., :128], k[:, 0, 128:]), v, out_dtype=jnp.float32)
        np.testing.assert_allclose(got, want, atol=BOUND)

    def test_wrong_calls(self) -> None:
        """R15"""
        q, k, v = mla_operands(6)
        with pytest.raises(InvalidInputError, match=r"axis_name is 'x'.*inside jax.shard_map"):
            sharding.mla_prefill_cp(q, k, v, axis_name="x")
        run = lambda call: jax.eval_shape(over_tokens(call, 2, (TOKENS,) * 3, TOKENS), q, k, v)
        with pytest.raises(InvalidInputError, match="even number of tokens a device"):
            run(functools.partial(sharding.mla_prefill_cp, axis_name="x", layout="zigzag"))
        with pytest.raises(InvalidInputError, match="layout is 'ring'"):
            run(functools.partial(sharding.mla_prefill_cp, axis_name="x", layout="ring"))
        with pytest.raises(InvalidInputError, match="Keys are those of the same tokens"):
            run(lambda q, k, v: sharding.mla_prefill_cp(q, k[1:], v[1:], axis_name="x"))
        with pytest.raises(InvalidInputError, match="initial_state"):
            state = lambda q: (q[..., :128], q[..., 0])
            run(lambda q, k, v: sharding.mla_prefill_cp(q, k, v, axis_name="x", initial_state=state(q)))


def gdn_operands(tokens: int, sequences: int, heads: int = 2, width: int = 8) -> list[jax.Array]:
    q, k, v = (floats(tokens, heads, width, seed=seed) for seed in range(3))
    g, beta = (jnp.abs(floats(tokens, heads, seed=seed)) for seed in (3, 4))
    return [q, k / 3, v, -0.1 * g, beta / 2, floats(sequences, heads, width, width, seed=5)]


class TestGdn:
    @staticmethod
    def check(devices: int, length: int, final_state: str = "replicated", implementation: str = "reference") -> None:
        *tensors, states = gdn_operands(devices * length, 4)
        options = {"qk_l2norm": True, "state_layout": "kv", "scale": 0.5, "implementation": implementation}
        call = functools.partial(sharding.gdn_prefill_cp, axis_name="x", final_state=final_state, **options)
        cp = over_tokens(
            lambda cu, state, *tensors: call(*tensors, cu_seqlens=cu, initial_state=state),
            devices, (P(), P(), *[TOKENS] * 5), (TOKENS, TOKENS if final_state == "local" else P()),
        )  # fmt: skip
        one = jax.jit(lambda cu, s, *t: fp8attn.gdn_prefill(*t, cu_seqlens=cu, initial_state=s, **options))
        for name, cu in relative_cu(devices * length, length).items():
            # nothing of a sequence, or of what is outside, reaches another one
            for spoiled in (None, int(np.clip(cu[0], 0, devices * length - 1))):
                given = tensors if spoiled is None else [x.at[spoiled].set(jnp.nan) for x in tensors]
                o, final = cp(cu, states, *given)
                want, want_final = one(cu, states, *given)
                if final_state == "local":
                    final = jnp.nansum(final.reshape(devices, 4, *final.shape[1:]), 0)
                    want_final = jnp.nan_to_num(want_final)
                    assert spoiled is not None or name != "many" or (final != 0).any()
                rows = slice(None) if spoiled is None else clean_rows(cu, spoiled, devices * length)
                np.testing.assert_allclose(o[rows], want[rows], atol=3e-6, err_msg=name)
                np.testing.assert_allclose(final, want_final, atol=3e-6, err_msg=name)

    @pytest.mark.parametrize(("devices", "length"), [(8, 9), pytest.param(1, 20, marks=pytest.mark.slow)])
    def test_sequences_over_devices(self, devices: int, length: int) -> None:
        """R9, R17"""
        self.check(devices, length)

    @pytest.mark.slow
    def test_the_portable_implementation(self) -> None:
        self.check(2, 70, implementation="xla")

    @pytest.mark.slow
    def test_final_states_where_sequences_end(self) -> None:
        self.check(4, 33, "local")

    @pytest.mark.slow
    def test_gradients(self) -> None:
        *tensors, states = gdn_operands(16, 1)
        local = lambda state, *t: sharding.gdn_prefill_cp(*t, axis_name="x", initial_state=state)
        cp = over_tokens(local, 2, (P(), *[TOKENS] * 5), (TOKENS, P()))
        one = jax.jit(lambda state, *t: fp8attn.gdn_prefill(*t, initial_state=state))
        weights = floats(16, 2, 8, seed=6)
        grad = lambda f: jax.grad(lambda *x: jnp.vdot(weights, f(*x)[0]) + f(*x)[1].sum(), range(6))(states, *tensors)
        for got, want in zip(grad(cp), grad(one), strict=True):
            testing.assert_relative_error(got, want, 1e-5)

    @pytest.mark.slow
    def test_one_message_a_device(self) -> None:
        """What travels does not grow with the tokens: one all-gather of the transitions (and flags)."""
        *tensors, _ = gdn_operands(32, 1)
        call = functools.partial(
            sharding.gdn_prefill_cp, axis_name="x", return_final_state=False, implementation="reference"
        )
        compiled = over_tokens(call, 2, (TOKENS,) * 5, TOKENS).lower(*tensors).compile()
        assert {name for _, name in collectives(compiled)} == {"all-gather"}
        assert all("16" not in re.findall(r"\d+", shape.partition("{")[0]) for shape, _ in collectives(compiled))

    def test_wrong_calls(self) -> None:
        """R15"""
        *tensors, states = gdn_operands(8, 1)
        run = lambda call: jax.eval_shape(over_tokens(call, 2, (TOKENS,) * 5, P()), *tensors)
        with pytest.raises(InvalidInputError, match="final_state is 'all'"):
            run(functools.partial(sharding.gdn_prefill_cp, axis_name="x", final_state="all"))
        with pytest.raises(InvalidInputError, match=r"initial_state is float32\[1,2,8,7\]"):
            run(lambda *t: sharding.gdn_prefill_cp(*t, axis_name="x", initial_state=states[..., :7]))


def clean_rows(cu: jax.Array, spoiled: int, tokens: int) -> np.ndarray:
    """Tokens of other sequences than the one of the token ``spoiled``, which has the NaN rows that it has."""
    ends = np.maximum.accumulate(np.clip(np.asarray(cu), 0, tokens))
    owner = np.searchsorted(ends, np.arange(tokens), side="right")
    return owner != owner[spoiled]


class TestMerge:
    """What the devices of a decode context group have over their own keys."""

    @pytest.mark.parametrize(
        ("scatter", "layout"),
        [(True, "HT"), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, "TH"), (False, "HT")))],
    )
    def test_equals_the_merge_of_all(self, scatter: bool, layout: str) -> None:
        """Bitwise, empty states and rows with NaN in them included; each device quantises its own heads."""
        n, tokens, heads = 8, 5, 16
        outs, lses = floats(n, tokens, heads, 128), floats(n, heads, tokens)
        empty = np.random.default_rng(1).random(lses.shape) < 0.5
        empty[:, 3, 2] = True
        lses = jnp.where(empty, -jnp.inf, lses).at[0, 0, 0].set(jnp.inf)
        outs = outs.at[0, 0, 0].set(jnp.nan).at[:, 2, 3].set(jnp.nan)
        lses = lses if layout == "HT" else jnp.swapaxes(lses, 1, 2)
        options = {"return_lse": True, "lse_layout": layout}
        by_head = (P(None, "x"), P("x") if layout == "HT" else P(None, "x"))
        call = lambda out, lse: sharding.merge_attn_states_cp(
            out[0], lse[0], axis_name="x", scatter_heads=scatter, **options
        )
        alike = jax.tree.map(lambda _: P("x"), by_head)
        specs = by_head if scatter else alike
        got, lse = over_tokens(call, n, (TOKENS, TOKENS), specs)(outs, lses)
        if not scatter:
            got, lse = got[:tokens], lse[: lses.shape[1]]
        want = jax.jit(functools.partial(fp8attn.merge_attn_states_n, **options))(outs, lses)
        testing.assert_bitwise_equal((got, lse), want)
        assert not np.asarray(got)[2, 3].any()

    @pytest.mark.slow
    def test_quantised(self) -> None:
        outs, lses = floats(2, 3, 8, 128), floats(2, 8, 3)
        call = lambda out, lse: sharding.merge_attn_states_cp(out[0], lse[0], axis_name="x", output_quant=PACKED)
        specs = fp8attn.Fp8Array(P(None, "x"), P("x"), PACKED, 3)
        got = over_tokens(call, 2, (TOKENS, TOKENS), specs)(outs, lses)
        want = jax.jit(functools.partial(fp8attn.merge_attn_states_n, output_quant=PACKED))(outs, lses)
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(want))

    def test_heads_that_devices_do_not_divide(self) -> None:
        """R15"""
        call = lambda out, lse: sharding.merge_attn_states_cp(out[0], lse[0], axis_name="x")
        with pytest.raises(InvalidInputError, match=r"heads that 2 devices divide.*scatter_heads=False"):
            jax.eval_shape(over_tokens(call, 2, (TOKENS, TOKENS), P()), floats(2, 3, 5, 32), floats(2, 5, 3))
