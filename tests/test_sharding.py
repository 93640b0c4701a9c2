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


OPS = ("mla_prefill", "merge_attn_states", "sparse_prefill", "gdn_prefill")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every op has an opaque implementation on CPUs, first in the table. The problems that it was asked for."""
    problems: list[Any] = []
    for op in OPS:
        row = dispatch._by_name(op, "reference")
        module = types.ModuleType(f"opaque_{op}")
        module.supports = lambda problem, device: ()

        def run(problem: Any, arrays: Any, row: Candidate = row) -> Any:
            problems.append(problem)
            return sys.modules[row.module].run(problem, jax.tree.map(opaque, arrays))

        module.run = run
        __import__(row.module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        rows = [row for row in dispatch.CANDIDATES[op] if row.name != "pallas"]
        monkeypatch.setitem(dispatch.CANDIDATES, op, (Candidate("pallas", module.__name__, ("cpu",)), *rows))
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


class TestHeads:
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
    @pytest.mark.parametrize("name", CALLS)
    def test_a_kernel_is_cut_by_heads(self, kernels: list[Any], name: str, kind: Any) -> None:
        """R17: bitwise as on one device, and nothing moves between devices."""
        call, arguments, specs = CALLS[name]()
        want = jax.jit(call)(*arguments)
        compiled, got = sharded(call, arguments, specs, mesh_of(kind=kind))
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(want))
        assert not collectives(compiled)
        assert_by_heads(got)
        heads = "v_heads" if name.startswith("gdn") else "heads"
        assert {getattr(problem, heads) for problem in kernels} == {16, 2}
        assert "trsm" in compiled.as_text()

    @pytest.mark.parametrize("name", ["mla", "merge", "sparse"])
    def test_without_the_rule_operands_would_be_gathered(
        self, kernels: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """What the tests above are worth: the stand-in is opaque."""
        monkeypatch.setattr(partition, "by_compiler", lambda heads, problem, run: run(problem))
        compiled, _ = sharded(*CALLS[name](), mesh_of())
        assert "all-gather" in compiled.as_text()

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
    def test_words_that_straddle_devices(self, kernels: list[Any], kind: Any) -> None:
        """Four heads share a word of scales, a device has two: only scales are gathered, and all have all words."""
        call, arguments, specs = merge_call(PACKED)
        want = jax.jit(call)(*arguments)
        compiled, got = sharded(call, arguments, specs, mesh_of(kind=kind))
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(want))
        assert [(name, shape[:9]) for shape, name in collectives(compiled)] == [("all-gather", "f32[6,16]")]
        assert_by_heads(got, whole=(1,))

    @pytest.mark.parametrize("heads", [("x", "y"), ("y",)])
    def test_meshes_of_two_axes(self, kernels: list[Any], heads: tuple[str, ...]) -> None:
        """Heads over both, or over one while the other only has copies."""
        mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        call, arguments, _ = merge_call(COLUMNS)
        compiled, got = sharded(call, arguments, [P(None, heads), P(heads)] * 2, mesh)
        testing.assert_bitwise_equal(jax.tree.leaves(got), jax.tree.leaves(jax.jit(call)(*arguments)))
        assert not collectives(compiled)

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

    def test_transforms(self, kernels: list[Any]) -> None:
        """vmap folds inside the cut; scan and a cond keep it; an export of one device has no trace of it."""
        call, arguments, specs = merge_call()
        many = [jnp.stack([x, x + 1]) for x in arguments]
        lead = [P(None, *spec) for spec in specs]
        for f in (jax.vmap(call), lambda *xs: jax.lax.scan(lambda c, x: (c, call(*x)), 0, xs)[1]):
            compiled, got = sharded(f, many, lead, mesh_of())
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

    def test_gradients_in_explicit_mode(self) -> None:
        call, arguments, specs = gdn_call()
        loss = lambda *xs: jax.grad(lambda *xs: call(*xs)[0].sum(), (0, 1, 2))(*xs)
        _, got = sharded(loss, arguments, specs, mesh_of(2, AxisType.Explicit))
        testing.assert_bitwise_equal(got, jax.jit(loss)(*arguments))
