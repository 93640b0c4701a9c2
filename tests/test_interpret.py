"""The race gate: every Mosaic GPU kernel in the interpreter on a CPU, and planted faults that it must report."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from interpreter import LIMIT, InterpreterError, RaceFound, run_interpreted, verdict
from jax import lax
from jax_fp8attn.pallas import merge_sm90

from jax_fp8attn import merge as merge_op
from jax_fp8attn.problems import MergeArrays, MergeProblem
from jax_fp8attn.quantize import Fp8Array, Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.reference import merge as reference_merge
from jax_fp8attn.testing import (
    assert_bitwise_equal,
    assert_codes_close,
    assert_lse_close,
    assert_rows_close,
    assert_same_nonfinite,
)

X = np.arange(256, dtype=np.float32).reshape(2, 128)
OUT = jax.ShapeDtypeStruct(X.shape, jnp.float32)


def kernel(interpret: Any, body: Callable[..., None], *arrays: Any, **options: Any) -> jax.Array:
    options.setdefault("out_type", OUT)
    return plgpu.kernel(body, interpret=interpret, **options)(*map(jnp.asarray, arrays))


def copy_in(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 1: shared memory is read before the copy into it has arrived."""

    def body(x: Any, out: Any, buffer: Any, barrier: Any) -> None:
        plgpu.copy_gmem_to_smem(x, buffer, barrier)
        if faulty:
            out[...] = buffer[...]
        plgpu.barrier_wait(barrier)
        if not faulty:
            out[...] = buffer[...]

    return kernel(interpret, body, X, scratch_types=[plgpu.SMEM(X.shape, jnp.float32), plgpu.Barrier()])


def copy_out(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 2: the copy engine reads shared memory that was not committed."""

    def body(x: Any, out: Any, buffer: Any) -> None:
        buffer[...] = x[...]
        if not faulty:
            plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out)
        plgpu.wait_smem_to_gmem(0)

    return kernel(interpret, body, X, scratch_types=[plgpu.SMEM(X.shape, jnp.float32)])


def overwrite(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 3: shared memory is written again while a copy out of it is in flight."""

    def body(x: Any, out: Any, buffer: Any) -> None:
        for row in range(2):
            buffer[...] = x[row]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, out.at[row])
            if row or not faulty:
                plgpu.wait_smem_to_gmem(0)

    return kernel(interpret, body, X, scratch_types=[plgpu.SMEM((128,), jnp.float32)])


def two_warpgroups(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 4: one warpgroup reads what the other writes, without a barrier."""

    def body(x: Any, out: Any, buffer: Any, barrier: Any) -> None:
        @pl.when(lax.axis_index("wg") == 0)
        def _() -> None:
            buffer[...] = x[...]
            plgpu.barrier_arrive(barrier)
            if faulty:
                plgpu.barrier_wait(barrier)

        @pl.when(lax.axis_index("wg") == 1)
        def _() -> None:
            if not faulty:
                plgpu.barrier_wait(barrier)
            out[...] = buffer[...]

    scratch = [plgpu.SMEM(X.shape, jnp.float32), plgpu.Barrier()]
    return kernel(interpret, body, X, num_threads=2, thread_name="wg", scratch_types=scratch)


def two_blocks(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 5: two blocks write the same global memory."""

    def body(x: Any, out: Any) -> None:
        block = lax.axis_index("block")
        out[0 if faulty else block] = x[block]

    return kernel(interpret, body, X, grid=(2,), grid_names=("block",))


def load_past_the_end(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 6: a row that is not there, known at run time only."""

    def body(x: Any, first: Any, out: Any) -> None:
        out[...] = x[pl.ds(first[0], 2)]

    return kernel(interpret, body, X, np.full(1, 1 if faulty else 0, np.int32))


def store_past_the_end(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 6."""

    def body(x: Any, first: Any, out: Any) -> None:
        out[pl.ds(first[0], 2)] = x[...]

    return kernel(interpret, body, X, np.full(1, 1 if faulty else 0, np.int32))


def unwritten(interpret: Any, faulty: bool) -> jax.Array:
    """Fault 7: shared memory is read that nobody has written."""

    def body(x: Any, out: Any, buffer: Any) -> None:
        if not faulty:
            buffer[...] = x[...]
        out[...] = buffer[...]

    return kernel(interpret, body, X, scratch_types=[plgpu.SMEM(X.shape, jnp.float32)])


def lonely_barrier(interpret: Any, faulty: bool) -> jax.Array:
    """Two warpgroups wait for an arrival that nobody makes."""

    def body(x: Any, out: Any, barrier: Any) -> None:
        if not faulty:
            plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        row = lax.axis_index("wg")
        out[row] = x[row]

    scratch = [plgpu.Barrier(num_arrivals=2)]
    return kernel(interpret, body, X, num_threads=2, thread_name="wg", scratch_types=scratch)


FAULTS = [
    (copy_in, "RaceFound"),
    (copy_out, "RaceFound"),
    (overwrite, "RaceFound"),
    (two_warpgroups, "RaceFound"),
    (two_blocks, "RaceFound"),
    (load_past_the_end, "OutOfBounds"),
    (store_past_the_end, "OutOfBounds"),
    (unwritten, "wrong result"),
    (lonely_barrier, "Hang"),
]


def two_kernels(interpret: Any, faulty: bool) -> tuple[jax.Array, jax.Array]:
    """The detector's own state is that of the last kernel; the fault is in the first one."""
    return copy_out(interpret, faulty), copy_out(interpret, False)


def matrix_product(interpret: Any, faulty: bool) -> jax.Array:
    """The tensor core reads an operand before the copy of it has arrived."""

    def body(x: Any, out: Any, buffer: Any, barrier: Any) -> None:
        plgpu.copy_gmem_to_smem(x, buffer, barrier)
        if not faulty:
            plgpu.barrier_wait(barrier)

        def product(acc: Any) -> jax.Array:
            plgpu.wgmma(acc, buffer, buffer)
            return acc[...]

        out[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))
        if faulty:
            plgpu.barrier_wait(barrier)

    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    scratch = [plgpu.SMEM((64, 64), jnp.bfloat16, transforms=transforms), plgpu.Barrier()]
    out_type = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    return kernel(interpret, body, np.eye(64, dtype=ml_dtypes.bfloat16), out_type=out_type, scratch_types=scratch)


def copy_past_the_end(interpret: Any) -> jax.Array:
    """The copy engine reads one row that is there and one that is not."""

    def body(x: Any, first: Any, out: Any, buffer: Any, barrier: Any) -> None:
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first[0], 2)], buffer, barrier)
        plgpu.barrier_wait(barrier)
        out[...] = buffer[...]

    scratch = [plgpu.SMEM(X.shape, jnp.float32), plgpu.Barrier()]
    return kernel(interpret, body, X, np.full(1, 1, np.int32), scratch_types=scratch)


def nothing_to_interpret(interpret: Any) -> jax.Array:
    return jnp.zeros(3)


class TestBlindSpots:
    """What the gate does not see, as docs/kernels.md says. A version of jax that sees it makes these fail."""

    @pytest.mark.parametrize("faulty", [True, False])
    def test_operands_of_the_tensor_core(self, faulty: bool) -> None:
        assert verdict(matrix_product, faulty, expected=np.eye(64, dtype=np.float32)) == "clean"

    def test_copies_past_the_end(self) -> None:
        assert verdict(copy_past_the_end, expected=np.stack([X[1], np.zeros_like(X[1])])) == "clean"


class TestGate:
    """Positive controls: what the gate must report, and the same kernels without the fault."""

    @pytest.mark.parametrize(("function", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
    def test_planted_fault(self, function: Callable[..., Any], fault: str) -> None:
        """The sound kernel is clean before and after: no verdict hangs over."""
        limit = 3.0 if fault == "Hang" else LIMIT
        assert verdict(function, False, expected=X) == "clean"
        assert verdict(function, True, expected=X, limit=limit) == fault
        assert verdict(function, False, expected=X) == "clean"

    def test_unwritten_memory_is_nan(self) -> None:
        assert np.isnan(run_interpreted(unwritten, True)).all()

    def test_a_report_names_the_lines(self) -> None:
        with pytest.raises(RaceFound, match=r"RACE DETECTED[\s\S]*test_interpret\.py:\d+[\s\S]*test_interpret\.py:\d+"):
            run_interpreted(copy_in, True)

    def test_a_race_in_the_first_of_two_kernels(self) -> None:
        with pytest.raises(RaceFound):
            run_interpreted(two_kernels, True, kernels=2)
        assert_bitwise_equal(run_interpreted(two_kernels, False, kernels=2), (X, X))

    def test_a_case_that_runs_no_kernel_does_not_pass(self) -> None:
        with pytest.raises(InterpreterError, match="0 kernels were interpreted, expected 1"):
            run_interpreted(nothing_to_interpret)


BF16, F16, F32 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32))
INF, NAN = np.inf, np.nan
PER_TENSOR = Fp8PerTensor(None)
PACKED = Fp8PerGroup(128, "ue8m0", "col_tma_packed")


def make_problem(tokens: int, heads: int, width: int, dtype: Any = BF16, **options: Any) -> MergeProblem:
    options = {"states": 2, "out_dtype": dtype, "return_lse": True, **options}
    return MergeProblem(tokens=tokens, heads=heads, width=width, dtype=dtype, **options)


def make_arrays(problem: MergeProblem, count: Any = 3, seed: int = 0) -> MergeArrays:
    """Outputs ~ N(0, 1), lse ~ 3 N(0, 1), a tenth of the lse +-inf."""
    rng = np.random.default_rng(seed)
    shape = (problem.states, problem.tokens, problem.heads, problem.width)
    outputs = rng.standard_normal(shape, dtype=np.float32).astype(problem.dtype)
    order = (1, 0) if problem.lse_layout == "HT" else (0, 1)
    lses = 3 * rng.standard_normal((shape[0], *(shape[1:3][axis] for axis in order)), dtype=np.float32)
    empty = rng.random(lses.shape)
    lses[empty < 0.05], lses[empty > 0.95] = INF, -INF
    return MergeArrays(
        outputs if problem.stacked else tuple(outputs),
        lses if problem.stacked else tuple(lses),
        np.broadcast_to(np.int32(count), problem.instances) if problem.context_count else None,
        rng.uniform(0.002, 0.01, problem.instances).astype(np.float32) if problem.output_quant == PER_TENSOR else None,
    )


def on_device(arrays: MergeArrays) -> MergeArrays:
    return jax.tree.map(jnp.asarray, arrays)


def merge(interpret: Any, problem: MergeProblem, arrays: MergeArrays, cut: dict[str, Any] | None = None) -> Any:
    """The merge kernel; ``cut`` changes the default configuration."""
    config = dataclasses.replace(merge_sm90.default_config(problem), **(cut or {}))
    return merge_sm90.build(problem, config, interpret)(on_device(arrays))


def steps_apart(actual: np.ndarray, expected: np.ndarray) -> int:
    """Largest distance of finite numbers in units of the last place of a 16-bit float."""
    bits = [np.where(np.isnan(x), 0, x).astype(actual.dtype).view(np.uint16).astype(int) for x in (actual, expected)]
    a, e = (np.where(b & 0x8000, -(b & 0x7FFF), b) for b in bits)
    return int(np.abs(a - e).max(initial=0))


def assert_merged(problem: MergeProblem, actual: Any, expected: Any) -> None:
    """Values, scales with their padding, and lse, against the reference."""
    if problem.return_lse:
        (actual, lse), (expected, expected_lse) = actual, expected
        assert lse.dtype == np.float32
        assert_lse_close(lse, expected_lse)
    if isinstance(actual, Fp8Array):
        assert actual.spec == expected.spec and actual.num_tokens == expected.num_tokens
        assert_codes_close(actual.values, expected.values)
        assert_scales(actual, expected)
        return
    assert actual.dtype == expected.dtype == problem.out_dtype
    assert_same_nonfinite(actual, expected)
    if actual.dtype == np.float32:
        assert_rows_close(actual, expected, worst=1e-6)
    else:
        assert steps_apart(actual, np.asarray(expected)) <= 1


def assert_scales(actual: Fp8Array, expected: Fp8Array) -> None:
    scales, wanted = np.asarray(actual.scales), np.asarray(expected.scales)
    assert scales.shape == wanted.shape and scales.dtype == wanted.dtype
    if isinstance(actual.spec, Fp8PerTensor) or actual.spec.scale_format == "ue8m0":
        np.testing.assert_array_equal(scales, wanted)
    else:
        np.testing.assert_allclose(scales, wanted, rtol=1e-6)
    if actual.spec != PER_TENSOR and actual.spec.scale_layout.startswith("col_tma"):
        assert scales.shape[-1] % 4 == 0 and not scales[..., actual.num_tokens :].any()


def check_merge(problem: MergeProblem, arrays: MergeArrays, cut: dict[str, Any] | None = None) -> Any:
    """Interprets the kernel, compares it with the reference, and returns its result."""
    kernels = 1 if problem.tokens and problem.heads else 0
    actual = run_interpreted(merge, problem, arrays, cut, kernels=kernels)
    assert_merged(problem, actual, reference_merge.run(problem, on_device(arrays)))
    return actual


OUTPUTS = {
    "bf16": None,
    "tensor": PER_TENSOR,
    "packed": PACKED,
    "packed32": Fp8PerGroup(32, "ue8m0", "col_tma_packed"),
    **{
        f"{layout}-{scale_format}-{size}": Fp8PerGroup(size, scale_format, layout)
        for layout in ("row", "col", "col_tma")
        for scale_format in ("float32", "ue8m0")
        for size in (64, 128)
    },
}
SHAPES = {  # tokens, heads, width: a tile has 16 tokens of 64 or 128 columns
    "aligned": (32, 2, 128),
    "tail": (18, 3, 128),
    "short": (5, 2, 192),
    "one": (1, 3, 64),
}
QUANTISED = [name for name in OUTPUTS if name != "bf16"]


def slow(*cases: Any) -> list[Any]:
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]


class TestMerge:
    """merge_sm90 as it is, clean and right."""

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [(s, BF16) for s in SHAPES] + [("tail", F16), ("short", F32)] + slow(("one", F16), ("aligned", F32)),
        ids=str,
    )
    def test_shapes_and_dtypes(self, shape: str, dtype: Any) -> None:
        problem = make_problem(*SHAPES[shape], dtype)
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize(("dtype", "out_dtype"), [(BF16, F32), (F32, BF16), (F16, BF16)], ids=str)
    def test_other_output_dtype(self, dtype: Any, out_dtype: Any) -> None:
        problem = make_problem(5, 3, 128, dtype, out_dtype=out_dtype, return_lse=False)
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize(
        ("output", "tokens"),
        [(name, (5, 18)[n % 2]) for n, name in enumerate(QUANTISED)]
        + slow(*((name, (18, 5)[n % 2]) for n, name in enumerate(QUANTISED))),
    )
    def test_quantised(self, output: str, tokens: int) -> None:
        dtype = (BF16, F16, F32)[QUANTISED.index(output) % 3]
        problem = make_problem(tokens, 3, 128, dtype, output_quant=OUTPUTS[output])
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize("output", OUTPUTS)
    @pytest.mark.parametrize(("tokens", "heads"), [(0, 3), (5, 0)])
    def test_empty(self, output: str, tokens: int, heads: int) -> None:
        problem = make_problem(tokens, heads, 128, output_quant=OUTPUTS[output])
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize(("heads", "width"), [(3, 256), *slow((1, 128), (5, 128), (6, 128))])
    def test_packed_scales_of_any_number_of_heads(self, heads: int, width: int) -> None:
        """Bytes of groups that do not exist are zero."""
        problem = make_problem(3, heads, width, output_quant=PACKED, return_lse=False)
        out = check_merge(problem, make_arrays(problem))
        groups = heads * width // 128
        missing = out.scales.view(np.uint8).reshape(*out.scales.shape, 4)[-1, :, (groups - 1) % 4 + 1 :]
        assert not missing.any()

    @pytest.mark.parametrize("lse_base", ["e", "2"])
    @pytest.mark.parametrize("lse_layout", ["HT", "TH"])
    def test_lse_layouts_and_bases(self, lse_layout: str, lse_base: str) -> None:
        problem = make_problem(18, 3, 64, lse_layout=lse_layout, lse_base=lse_base)
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize("count", [17, *slow(0, 3, 18, 2**31 - 1, -5)])
    def test_context_count(self, count: int) -> None:
        """The prefix of the tokens past the count is not used."""
        problem = make_problem(18, 1, 64, context_count=True)
        arrays = make_arrays(problem, count)
        past = slice(max(count, 0), None)
        arrays.outputs[0][past], arrays.lses[0][:, past] = NAN, NAN
        check_merge(problem, arrays)

    @pytest.mark.parametrize("lse_layout", ["HT", "TH"])
    @pytest.mark.parametrize("states", [*slow(1), 3])
    def test_stacked_states(self, states: int, lse_layout: str) -> None:
        problem = make_problem(18, 2, 64, states=states, stacked=True, lse_layout=lse_layout)
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize(
        ("shape", "options"),
        [
            ("tail", {}),
            ("short", {"lse_layout": "TH", "context_count": True}),
            *slow(("aligned", {"return_lse": False}), ("tail", {"dtype": F32, "out_dtype": F32, "lse_base": "2"})),
        ],
        ids=str,
    )
    def test_in_place(self, shape: str, options: dict[str, Any]) -> None:
        """Blocks read and write the same memory."""
        problem = make_problem(*SHAPES[shape], **options, in_place=True)
        check_merge(problem, make_arrays(problem))

    @pytest.mark.parametrize("cut", slow({"rows": 3, "ahead": 2}, {"vector": 8}), ids=str)
    def test_other_cuts(self, cut: dict[str, int]) -> None:
        problem = make_problem(17, 4, 128, output_quant=Fp8PerGroup(128, "ue8m0", "col"))
        check_merge(problem, make_arrays(problem), cut)

    @pytest.mark.parametrize(
        ("tokens", "heads", "options"),
        [
            (1, 8, {"output_quant": PER_TENSOR}),
            *slow(
                (3, 4, {"lse_layout": "TH", "context_count": True}),
                (6, 8, {"output_quant": OUTPUTS["col_tma-float32-128"], "context_count": True}),
                (5, 16, {"output_quant": OUTPUTS["row-ue8m0-64"], "width": 64}),
                (5, 4, {"in_place": True}),
                (2, 4, {"states": 3, "stacked": True}),
            ),
        ],
        ids=str,
    )
    def test_tiles_of_heads(self, tokens: int, heads: int, options: dict[str, Any]) -> None:
        """Left-over tokens, or all of them, by tiles of heads: the bits of those merged row by row."""
        options = dict(options)
        problem = make_problem(tokens, heads, options.pop("width", 128), **options)
        arrays = make_arrays(problem, 2)
        by_row, *by_heads = (
            check_merge(problem, arrays, {"vector": 4, "rows": 1, "ahead": 1, "heads": heads})
            for heads in ("never", "leftover", "always")
        )
        for result in by_heads:
            assert_bitwise_equal(result, by_row)

    @pytest.mark.parametrize("heads", ["leftover", "always"])
    def test_tiles_of_heads_of_instances(self, heads: str) -> None:
        one = make_problem(5, 4, 128, output_quant=OUTPUTS["col_tma-float32-128"], context_count=True)
        each = [on_device(make_arrays(one, count, seed)) for seed, count in enumerate((2, 4))]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
        problem, arrays, unfold = merge_op._fold(one, stacked, 2, jax.tree.map(lambda _: True, stacked))
        cut = {"vector": 4, "rows": 1, "ahead": 1, "heads": heads}
        result = unfold(run_interpreted(merge, problem, jax.tree.map(np.asarray, arrays), cut))
        for number, own in enumerate(each):
            part = jax.tree.map(lambda x: np.asarray(x)[number], result)
            assert_merged(one, part, reference_merge.run(one, own))

    def test_several_rows_a_block_with_padded_scales(self) -> None:
        problem = make_problem(5, 3, 128, output_quant=Fp8PerGroup(128, "float32", "col_tma"))
        check_merge(problem, make_arrays(problem), {"rows": 2})

    @pytest.mark.parametrize("output", ["bf16", "tensor", "packed", "col_tma-float32-64"])
    def test_instances(self, output: str) -> None:
        """vmap as one call: each instance against a reference of its own."""
        one = make_problem(18, 3, 128, output_quant=OUTPUTS[output], context_count=True)
        each = [on_device(make_arrays(one, count, seed)) for seed, count in enumerate((4, 17))]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *each)
        problem, arrays, unfold = merge_op._fold(one, stacked, 2, jax.tree.map(lambda _: True, stacked))
        assert problem.instances == 2 and problem.tokens == 36
        result = unfold(run_interpreted(merge, problem, jax.tree.map(np.asarray, arrays)))
        for number, own in enumerate(each):
            part = jax.tree.map(lambda x: np.asarray(x)[number], result)
            assert_merged(one, part, reference_merge.run(one, own))

    @pytest.mark.parametrize("output", ["bf16", "tensor", "packed"])
    def test_hostile_values(self, output: str) -> None:
        """Garbage behind an empty side, NaN and inf elements, a NaN lse, both sides empty, full tile and tail alike."""
        problem = make_problem(18, 1, 128, output_quant=OUTPUTS[output])
        arrays = make_arrays(problem)
        (prefix, suffix), (p, q) = arrays.outputs, arrays.lses
        p[:], q[:] = 0.25, -0.5
        for first in (0, 9):
            p[0, first], prefix[first] = -INF, NAN
            q[0, first + 1], suffix[first + 1] = INF, INF
            p[0, first + 2], q[0, first + 2], prefix[first + 2], suffix[first + 2] = INF, -INF, NAN, -INF
            p[0, first + 3], prefix[first + 3], suffix[first + 3] = -INF, 1.0, -0.0
            prefix[first + 4], suffix[first + 4] = -0.0, -0.0
            prefix[first + 5, 0, 3], suffix[first + 5, 0, 70] = NAN, INF
            p[0, first + 6] = NAN
            p[0, first + 7], prefix[first + 7] = -200.0, NAN
            prefix[first + 8] *= 1e4
        out, lse = check_merge(problem, arrays)
        if output == "bf16":
            for first in (0, 9):
                assert_bitwise_equal(out[first], suffix[first])
                assert_bitwise_equal(out[first + 1], prefix[first + 1])
                assert_bitwise_equal(out[first + 2], np.zeros_like(prefix[0]))
                assert_bitwise_equal(out[first + 3 : first + 5], suffix[first + 3 : first + 5])
                assert_bitwise_equal(out[first + 7], suffix[first + 7])
                assert lse[0, first] == q[0, first] and lse[0, first + 1] == p[0, first + 1]


def faulty_merge(interpret: Any, fault: str, problem: MergeProblem, arrays: MergeArrays) -> Any:
    """The merge kernel with one thing replaced."""
    make, own, merge_row = merge_sm90._Tile, merge_sm90._Kernel, merge_sm90._Kernel._merge_row
    tokens = merge_sm90.default_config(problem).tokens

    def merge_row_with_lse(self: Any, gmem: Any, tile: Any, row: Any, inverse: Any) -> Any:
        result = merge_row(self, gmem, tile, row, inverse)
        self._store_lse(gmem, tile, row.head, row.lses[0])
        return result

    patches = {
        "none": (own, "_merge_row", merge_row),
        "same tokens in every block": (merge_sm90, "_Tile", lambda i, origin, _, *rest: make(i, origin, origin, *rest)),
        "lse of a head from every row": (own, "_merge_row", merge_row_with_lse),
        "last tile past the end": (own, "_tiles", lambda self: (-(-problem.tokens // tokens), 0)),
        "rows past the last": (own, "_row", lambda self, row_block, k: row_block * self.config.rows + k),
        "no tail": (own, "_tiles", lambda self: (problem.tokens // tokens, 0)),
        "padding not written": (own, "_zero_padding", lambda *_: None),
    }
    with mock.patch.object(*patches[fault]):
        return merge(interpret, problem, arrays)


@functools.cache
def sound_result(problem: MergeProblem) -> Any:
    return run_interpreted(merge, problem, make_arrays(problem))


PACKED_PROBLEM = make_problem(18, 5, 128, output_quant=PACKED)
THREE_ROWS_A_HEAD = make_problem(*SHAPES["short"])


class TestFaultyMerge:
    """The gate sees this kernel: faults planted in it are reported."""

    @pytest.mark.parametrize(
        ("fault", "problem", "expected"),
        [
            ("none", PACKED_PROBLEM, "clean"),
            ("none", THREE_ROWS_A_HEAD, "clean"),
            ("same tokens in every block", PACKED_PROBLEM, "RaceFound"),
            ("lse of a head from every row", THREE_ROWS_A_HEAD, "RaceFound"),
            ("last tile past the end", PACKED_PROBLEM, "OutOfBounds"),
            ("rows past the last", PACKED_PROBLEM, "OutOfBounds"),
            ("no tail", PACKED_PROBLEM, "wrong result"),
            ("padding not written", PACKED_PROBLEM, "wrong result"),
        ],
        ids=lambda x: x if isinstance(x, str) else f"{x.tokens}-{x.heads}-{x.width}",
    )
    def test_planted_fault(self, fault: str, problem: MergeProblem, expected: str) -> None:
        expected_result = sound_result(problem)
        assert verdict(faulty_merge, fault, problem, make_arrays(problem), expected=expected_result) == expected
