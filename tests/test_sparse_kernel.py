"""The Hopper kernel of sparse_prefill: interpreted on a CPU, with races looked for, against float64; how its lanes
gather rows, emulated on integers."""

import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import row_lanes
import sparse_cases
import sparse_kernel_cases
from implementations import kernels
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import sparse_prefill_sm90
from jax_fp8attn.pallas.common import latent_rows
from jax_fp8attn.pallas.common.latent_rows import Gather, Pool
from jax_fp8attn.pallas.sparse_prefill_sm90 import SparseConfig
from row_lanes import SHARED, TARGET, Lanes, Vector, registers_of, rows_in, scalar
from sparse_cases import INT_MAX, Case, normal, quantize
from sparse_kernel_cases import BYTES, FP8, case, operands, slow

from jax_fp8attn.dispatch import Device
from jax_fp8attn.latent import dequantize_latent
from jax_fp8attn.problems import RowForm, SparseArrays, SparseProblem
from jax_fp8attn.quantize import E4M3
from jax_fp8attn.testing import assert_bitwise_equal
from jax_fp8attn.xla import sparse_prefill as xla

BF16, F16, F32 = (np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32))
HOPPER = Device("cuda", "H200", (9, 0))
INF, NAN = np.inf, np.nan


def kernel(interpret: Any, problem: SparseProblem, arrays: SparseArrays, cut: dict[str, Any] | None = None) -> Any:
    config = dataclasses.replace(sparse_prefill_sm90.default_config(problem), **(cut or {}))
    return jax.jit(sparse_prefill_sm90.build(problem, config, interpret))(jax.tree.map(jnp.asarray, arrays))


def interpreted(given: Case, cut: dict[str, Any] | None = None, **options: Any) -> Any:
    return run_interpreted(kernel, *operands(given, **options), cut)


def on_hardware(given: Case, cut: dict[str, Any] | None = None, **options: Any) -> Any:
    problem, arrays = operands(given, **options)
    return jax.tree.map(np.asarray, jax.jit(lambda arrays: kernel(None, problem, arrays, cut))(arrays))


def check(given: Case, cut: dict[str, Any] | None = None, run: Any = interpreted, **options: Any) -> Any:
    return sparse_kernel_cases.check(run, given, cut, **options)


class TestInterpreted:
    @pytest.mark.parametrize(
        ("facts", "cut", "options"),
        [
            ({"rows": FP8}, {"producer": True, "blocks": 2}, {}),
            *slow(
                ({"heads": 72}, {"producer": True, "blocks": 5}, {"out_dtype": jnp.bfloat16}),
                ({"rows": BYTES, "q": BYTES}, {"producer": False, "blocks": 1}, {}),
                ({"heads": 128, "rows": BYTES, "two": False}, {"producer": True, "blocks": 0}, {}),
                ({"heads": 5, "rows": FP8, "q": BYTES}, {"producer": True, "blocks": 1}, {}),
                ({"heads": 128, "two": False}, {"producer": False, "blocks": 3}, {}),
                ({"heads": 6}, {"producer": False, "blocks": 0}, {"out_dtype": jnp.bfloat16}),
                ({"rows": FP8}, {"producer": True, "halves": False}, {}),
            ),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, facts: dict[str, Any], cut: dict[str, Any], options: dict[str, Any]) -> None:
        check(case(**facts), cut, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize("producer", [True, False])
    def test_a_token_is_computed_alike_anywhere(self, producer: bool) -> None:
        given = case(rows=FP8)
        turned = given.but(
            q=given.q[::-1], prefix_lists=given.prefix_lists[::-1], extend_lists=given.extend_lists[::-1]
        )
        results = [interpreted(x, {"producer": producer, "blocks": 2}) for x in (given, turned)]
        assert_bitwise_equal(results[1][0][::-1], results[0][0])
        assert_bitwise_equal(results[1][1][:, ::-1], results[0][1])

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
    def test_any_scale(self, scale: float) -> None:
        """Also scores of which one outweighs all others."""
        given = case(rows=FP8).but(scale=scale)
        if scale < 1:
            check(given, {"blocks": 2})
            return
        out, lse = interpreted(given, {"blocks": 2})
        expected_lse = given.expected()[1]
        finite = np.isfinite(expected_lse)
        np.testing.assert_allclose(lse[finite], expected_lse[finite], rtol=1e-5)
        assert np.isfinite(out[:, 4:]).all()

    @pytest.mark.slow
    def test_nan_reaches_its_tokens_alone(self) -> None:
        given = case(rows=FP8)
        nope = given.prefix.nope.at[25, 3].set(jnp.nan)
        given = given.but(prefix=dataclasses.replace(given.prefix, nope=nope), sink=None)
        out, lse = interpreted(given, {"blocks": 2})
        listed = np.array([25 in x for x in given.prefix_lists])
        assert listed.any() and not listed.all()
        np.testing.assert_array_equal(np.isnan(out).all(axis=(1, 2)), listed)
        np.testing.assert_array_equal(np.isnan(out).any(axis=(1, 2)), listed)
        np.testing.assert_array_equal(np.isnan(lse), np.broadcast_to(listed, lse.shape))

    @pytest.mark.slow
    def test_instances_have_their_own_scales_and_sinks(self) -> None:
        """As under vmap."""
        given = case(rows=FP8)
        problem, arrays = operands(given)
        problem = dataclasses.replace(problem, instances=2)
        own = arrays._replace(
            softmax_scale=np.array([0.1, -0.02], F32), sink=np.concatenate([arrays.sink, -arrays.sink])
        )
        out, lse = run_interpreted(kernel, problem, own, {"blocks": 2})
        expected, expected_lse = xla.run(problem, jax.tree.map(jnp.asarray, own))
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
        error, mass = (np.linalg.norm(np.nan_to_num(x), axis=-1) for x in (out - expected, np.asarray(expected)))
        assert (error <= sparse_cases.BF16 * mass).all()

    @pytest.mark.slow
    def test_pools_without_rows(self) -> None:
        given = case(rows=FP8)
        none = jax.tree.map(lambda x: x[:0], given.prefix)
        check(given.but(prefix=none), {"blocks": 2})

    def test_no_tokens(self) -> None:
        problem, arrays = operands(case(rows=FP8))
        empty = dataclasses.replace(problem, tokens=0)
        out, lse = kernel(None, empty, arrays)
        assert out.shape == (0, 64, 512) and lse.shape == (64, 0)


PLANTED = {"producer": True, "blocks": 2}


class TestFaults:
    """What is planted is found."""

    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            ("rows published before they are stored", "RaceFound"),
            *slow(
                ("rows released before they are weighed", "RaceFound"),
                ("none", "clean"),
                ("probabilities published before they are stored", "RaceFound"),
                ("invalid rows count", "wrong result"),
                ("an index of the other pool", "wrong result"),
                ("earlier sums not rescaled", "wrong result"),
                ("sums of one consumer", "wrong result"),
            ),
        ],
    )
    def test_planted(self, fault: str, expected: str) -> None:
        wanted = None if expected == "RaceFound" else sound()
        assert verdict(faulty, fault, *operands(steep()), PLANTED, expected=wanted) == expected


def steep() -> Case:
    """Scores that grow by more than is let pass without a new maximum."""
    return case(rows=FP8).but(scale=0.5)


@functools.cache
def sound() -> Any:
    return interpreted(steep(), PLANTED)


def faulty(interpret: Any, fault: str, problem: SparseProblem, arrays: SparseArrays, cut: dict[str, Any]) -> Any:
    """The kernel with one thing replaced."""
    consumer = sparse_prefill_sm90._Consumer
    start_values, store, copy, listed = consumer._start_values, Gather.store, Gather.copy, latent_rows.listed
    arrive, waiting = plgpu.barrier_arrive, []

    def weigh_released(self: Any, slot: int, out: Any) -> Any:
        arrive(self.smem.free.at[2 * slot + self.number])
        return start_values(self, slot, out)

    def end_without_release(self: Any, pending: Any, slot: int, state: Any, younger: int = 0) -> Any:
        return state._replace(out=pending)

    def later(what: Any) -> Any:
        return lambda *given: waiting.append((what, given))

    def arrive_first(barrier: Any) -> None:
        arrive(barrier)
        while waiting:
            what, given = waiting.pop()
            what(*given)

    def valid(numbers: Any, target: Any, plain: bool) -> None:
        target[...] = jnp.ones_like(numbers)

    def one_pool(indices: Any, rows: Any, *given: Any) -> Any:
        return listed(indices, (max(rows),) * len(rows), *given)

    publish = consumer._publish

    def publish_early(self: Any, scale: Any, scores: Any, state: Any) -> Any:
        arrive(self.smem.p_there.at[self.number])
        with mock.patch.object(plgpu, "barrier_arrive", lambda barrier: None):
            return publish(self, scale, scores, state)

    patches = {
        "none": [],
        "rows released before they are weighed": [
            (consumer, "_start_values", weigh_released), (consumer, "_end", end_without_release)
        ],
        "rows published before they are stored": [
            (Gather, "store", later(store)), (Gather, "copy", later(copy)), (plgpu, "barrier_arrive", arrive_first)
        ],
        "probabilities published before they are stored": [(consumer, "_publish", publish_early)],
        "invalid rows count": [(latent_rows, "note_valid", valid)],
        "an index of the other pool": [(latent_rows, "listed", one_pool)],
        "earlier sums not rescaled": [(consumer, "_shrunk", lambda self, out, shrink: out)],
        "sums of one consumer": [(consumer, "_total", lambda self: self.row(self.smem.sums.at[self.number]))],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches[fault]:
            stack.enter_context(mock.patch.object(*patch))
        return kernel(interpret, problem, arrays, cut)


class TestLanes:
    """Addresses, swizzles and scales of the gather, which the interpreter replaces."""

    @pytest.mark.parametrize("pool", [0, 1])
    @pytest.mark.parametrize("form", [FP8, BYTES, None], ids=str)
    def test_gather(self, form: Any, pool: int) -> None:
        counts, listed = (5, 9), np.array([0, 4, 8, -1, 3, 7, 9, INT_MAX, -(2**31), 5] * 8, np.int32)
        pools = [normal(n, count, 512) for n, count in enumerate(counts)]
        if form is not None:
            pools = [quantize(x * 2.0 ** np.arange(-4, 4).repeat(64), **form) for x in pools]
        leaves = [jax.tree.leaves(x) if form is not None else [x] for x in pools]
        lanes = Lanes([*leaves[0], *leaves[1], listed, listed[::-1]], SHARED + 4 * 64)
        refs, size = lanes.refs(), len(leaves[0])
        given = tuple(Pool(*refs[n * size : (n + 1) * size], *[None] * (3 - size)) for n in range(2))
        row_form = RowForm(BF16) if form is None else RowForm(np.dtype(E4M3), form["group"], leaves[0][-1].dtype)
        gather, half_pool = Gather(row_form, given, False), scalar(pool)
        with lanes.emulated():
            numbers = latent_rows.listed(tuple(refs[-2:]), counts, half_pool, scalar(3), scalar(60), False)
            numbers = registers_of([Vector([x.words[0]]) for x in numbers.registers])
            self.stored(gather, numbers, half_pool)
            valid = row_lanes.at(SHARED)
            latent_rows.note_valid(numbers, valid, False)
        entries = (listed, listed[::-1])[pool][3 : 3 + 64].astype(np.int64)
        there = (np.arange(64) < 57) & (entries >= 0) & (entries < counts[pool])
        rows = np.asarray(pools[pool] if form is None else dequantize_latent(pools[pool], jnp.bfloat16))
        expected = np.where(there[:, None], rows[np.where(there, entries, 0)], np.zeros((), BF16))
        assert_bitwise_equal(rows_in(lanes.shared), expected)
        assert (lanes.writes[:SHARED] == 1).all()
        np.testing.assert_array_equal(lanes.shared[SHARED:].view(np.int32), there)

    @staticmethod
    def stored(gather: Gather, numbers: Any, pool: Any) -> None:
        scales = gather.load_scales(numbers, pool) if gather.fp8 else None
        for half in range(2):
            if gather.fp8:
                gather.store(gather.load(numbers, pool, half), scales, TARGET, half)
            else:
                gather.copy(numbers, pool, TARGET, half)

    def test_queries(self) -> None:
        """Heads of a token, the last tile not full."""
        with Lanes([]).emulated():
            numbers = latent_rows.following(scalar(1000), scalar(37), False)
        row = np.concatenate([x.words[0] for x in numbers.registers]).reshape(2, 4, 8, 4).swapaxes(0, 1)
        assert (row == row[..., :1]).all()
        np.testing.assert_array_equal(row[..., 0].ravel(), [1000 + n if n < 37 else -1 for n in range(64)])

    @pytest.mark.parametrize("scale", ["uint8", "float32"])
    def test_odd_scales(self, scale: str) -> None:
        """Bytes 0 and 255, and float32 scales that are no power of two."""
        given = [0, 255, 1, 254, 127, 100, 140] if scale == "uint8" else [1e-40, NAN, 3.0, -0.1, 0.0, INF, 1.0]
        bits = np.array(given, scale).astype(np.int64) if scale == "uint8" else np.array(given, F32).view(np.int32)
        gather = Gather(RowForm(np.dtype(E4M3), 64, np.dtype(scale)), (), False)
        with Lanes([]).emulated():
            found = [gather._scale_bits(Vector([np.full(128, x)]))[0] for x in bits.astype(np.int64)]
        values = np.array(found, np.int32).view(F32)
        expected = np.array(given, F32)
        if scale == "uint8":
            expected = np.where(np.array(given) == 255, NAN, np.exp2(np.array(given) - 127.0)).astype(F32)
        np.testing.assert_array_equal(values, expected)

    def test_a_wrong_lane_is_seen(self) -> None:
        """The emulation itself."""
        with mock.patch.object(latent_rows, "_swizzled", lambda piece, row: piece), pytest.raises(AssertionError):
            self.test_gather(FP8, 0)


class TestConfig:
    @pytest.mark.parametrize("bad", [{"registers": (192, 128)}, {"registers": (196, 112)}, {"registers": (160, 168)}])
    def test_misfits_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="registers"):
            SparseConfig(**bad)

    def test_heuristics(self) -> None:
        fp8, bf16 = (operands(case(rows=rows))[0] for rows in (FP8, None))
        with mock.patch.object(jax, "__version_info__", (0, 11, 2)):
            assert sparse_prefill_sm90.default_config(fp8) == SparseConfig(True, (192, 120))
            assert sparse_prefill_sm90.default_config(bf16) == SparseConfig(True, (216, 72))
        with mock.patch.object(jax, "__version_info__", (0, 12, 0)):
            assert not sparse_prefill_sm90.default_config(fp8).producer
        assert SparseConfig().shared_memory < 232448

    def test_reasons(self) -> None:
        problem = operands(case(rows=FP8))[0]
        assert sparse_prefill_sm90.supports(problem, HOPPER) == ()
        assert "(8, 9)" in str(sparse_prefill_sm90.supports(problem, Device("cuda", "L40S", (8, 9))))
        mixed = dataclasses.replace(problem, extend=dataclasses.replace(problem.extend, form=RowForm(BF16)))
        assert any("one form" in reason for reason in sparse_prefill_sm90.supports(mixed, HOPPER))
        half = dataclasses.replace(problem, prefix=dataclasses.replace(problem.prefix, form=RowForm(F16)), extend=None)
        assert any("FP8 or bfloat16" in reason for reason in sparse_prefill_sm90.supports(half, HOPPER))


@pytest.mark.skipif("pallas" not in kernels("sparse_prefill"), reason="needs a CUDA device")
class TestHardware:
    """The same on a GPU of compute capability 9.0."""

    @pytest.mark.parametrize(
        ("facts", "cut", "options"),
        [
            pytest.param({"rows": FP8}, {}, {}, marks=pytest.mark.sanitize),
            ({"rows": FP8}, {"producer": False, "blocks": 0}, {}),
            ({"rows": FP8, "two": False}, {"blocks": 0}, {"out_dtype": jnp.bfloat16}),
            ({"heads": 72, "rows": FP8, "q": FP8}, {}, {"out_dtype": jnp.bfloat16}),
            pytest.param({"heads": 128, "rows": BYTES, "q": BYTES}, {}, {}, marks=pytest.mark.sanitize),
            pytest.param({"heads": 100}, {}, {"out_dtype": jnp.bfloat16}, marks=pytest.mark.sanitize),
            ({"heads": 128}, {"producer": False}, {}),
            ({"heads": 8, "q": BYTES}, {}, {}),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, facts: dict[str, Any], cut: dict[str, Any], options: dict[str, Any]) -> None:
        check(case(**facts), cut, on_hardware, **options)

    @pytest.mark.parametrize("producer", [True, False])
    def test_repeats(self, producer: bool) -> None:
        """200 times the same bits, with more tiles than blocks and lists of all lengths."""
        rng, tokens = np.random.default_rng(0), 600
        given = Case(
            q=normal(0, tokens, 64, 512), prefix=quantize(normal(1, 4096, 512)),
            prefix_lists=[rng.integers(-9, 4100, rng.integers(0, 700)).tolist() for _ in range(tokens)],
            prefix_capacity=700 * tokens,
        )  # fmt: skip
        problem, arrays = operands(given)
        run = jax.jit(lambda arrays: kernel(None, problem, arrays, {"producer": producer}))
        arrays = jax.tree.map(jnp.asarray, arrays)
        first = run(arrays)
        check(given.but(), {"producer": producer}, lambda *_, **__: jax.tree.map(np.asarray, first))
        same = jax.jit(lambda x: jax.tree.map(lambda a, b: (a == b).all(), x, first))
        assert np.all([jax.tree.leaves(same(run(arrays))) for _ in range(200)])
