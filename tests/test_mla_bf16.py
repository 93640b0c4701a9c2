"""The Hopper kernel of mla_prefill in bf16: interpreted on a CPU, with races looked for, against the oracle."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import kernels
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import mla_prefill_sm90
from jax_fp8attn.pallas.mla_prefill_sm90 import BF16 as FORMAT
from jax_fp8attn.pallas.mla_prefill_sm90 import FP8, MlaConfig
from test_mla_kernel import (
    BF16,
    E4M3,
    F32,
    INF,
    NAN,
    PER_TENSOR,
    SPECS,
    STATES,
    STRESS,
    Case,
    compiled,
    exact_of,
    values_of,
)
from test_mla_kernel import case as fp8_case
from test_mla_kernel import make_arrays as standard_arrays
from test_mla_kernel import on_hardware as run_on_hardware

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import Fp8PerGroup
from jax_fp8attn.reference import mla_prefill as reference
from jax_fp8attn.testing import assert_bitwise_equal, fp8_ulps

F16 = np.dtype(np.float16)
BOUND = 0.005  # of a row, relative: P is rounded to bf16
LSE_BOUND, HARDWARE_LSE_BOUND = 1e-4, 1e-3


def case(queries: Sequence[int], keys: Sequence[int] | None = None, **facts: Any) -> Case:
    return fp8_case(queries, keys, **{"dtype": BF16, "compute": "bf16", **facts})


def make_arrays(given: Case, seed: int = 0) -> MlaArrays:
    """Rows and keys of no sequence hold NaN, some values of theirs infinities."""
    arrays = standard_arrays(given, seed)
    if given.before and given.dtype != E4M3:
        arrays.v[0], arrays.v[-1] = INF, -INF
    return arrays


def kernel(interpret: Any, problem: MlaProblem, arrays: MlaArrays, cut: dict[str, Any] | None = None) -> Any:
    config = dataclasses.replace(mla_prefill_sm90.default_config(problem), **(cut or {}))
    return jax.jit(mla_prefill_sm90.build(problem, config, interpret))(jax.tree.map(jnp.asarray, arrays))


def oracle(problem: MlaProblem, arrays: MlaArrays) -> Any:
    """On operands rounded to bf16, of which e4m3 is a part."""
    rounded = [x if x is None or x.dtype == E4M3 else x.astype(BF16) for x in arrays[:4]]
    return exact_of(problem, MlaArrays(*rounded, *arrays[4:]))


def interpreted(problem: MlaProblem, arrays: MlaArrays, cut: dict[str, Any] | None = None) -> Any:
    return run_interpreted(kernel, problem, arrays, cut, kernels=1)


on_hardware = functools.partial(run_on_hardware, kernel=kernel)


def check(
    given: Case,
    arrays: MlaArrays | None = None,
    cut: dict[str, Any] | None = None,
    run: Any = interpreted,
    lse_bound: float = LSE_BOUND,
) -> Any:
    """Within the bounds of the oracle, and no number where it has none."""
    problem = given.problem()
    arrays = make_arrays(given) if arrays is None else arrays
    out, lse = run(problem, arrays, cut)
    expected, expected_lse = oracle(problem, arrays)
    finite = np.isfinite(np.asarray(expected_lse))
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(expected_lse))
    np.testing.assert_allclose(lse[finite], np.asarray(expected_lse)[finite], atol=lse_bound)
    got, far = values_of(out), values_of(expected)
    for special in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(special(got), special(far))
    mass = lambda x: np.sqrt(np.sum(np.where(np.isfinite(x), x, 0.0) ** 2, axis=-1))  # of each row and head
    with np.errstate(invalid="ignore"):
        difference = got - far
    quantised = problem.output_quant is not None
    rounding = 0.04 if quantised else 2.0**-8 if problem.out_dtype == BF16 else 0.0
    assert (mass(difference) <= (BOUND + rounding) * mass(far) + 1e-6).all()
    if quantised:
        assert (fp8_ulps(out.values, expected.values) > 1).mean() < 0.005
        np.testing.assert_allclose(out.scales_2d(), expected.scales_2d(), rtol=0.02)
    return out, lse


@pytest.mark.slow
class TestInterpreted:
    @pytest.mark.parametrize(
        "given",
        [
            case((150,)),
            case((64, 65, 0, 7)),
            case((70, 0, 33, 1), (70, 5, 200, 0)),
            case((40, 130), (300, 10), causal=False, pair=True),
            case((1,)),
            case((129, 64), (300, 10), pair=True, out_dtype=BF16),
            case((30,), (520,), causal=False, heads=1),
            case((20, 20), dtype=F32, before=0, out_dtype=F16),
            case((150,), dtype=F16),
            case((150,), dtype=E4M3, pair=True),
        ],
        ids=lambda c: f"{c.queries}-{c.keys}-{c.dtype}",
    )
    def test_against_the_oracle(self, given: Case) -> None:
        check(given)

    @pytest.mark.parametrize("spec", [*SPECS, Fp8PerGroup.row_major(32)])
    def test_quantised(self, spec: Any) -> None:
        check(case((70, 0, 33), (70, 5, 200), output_quant=spec))

    @pytest.mark.parametrize("options", STATES)
    def test_initial_state(self, options: dict[str, Any]) -> None:
        check(case((70, 0, 33), (70, 5, 200), **options))

    def test_mixed_parts_of_k(self) -> None:
        """A part with a scale beside one without."""
        given = case((70,), (200,), pair=True)
        arrays = make_arrays(given)
        problem = dataclasses.replace(given.problem(), k_dtype=E4M3)
        arrays = arrays._replace(k=arrays.k.astype(E4M3))
        out, _ = interpreted(problem, arrays)
        expected, _ = reference.run(problem, jax.tree.map(jnp.asarray, arrays))
        np.testing.assert_allclose(out, expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("scale", [-0.1, 0.0, 2.0, NAN])
    def test_any_scale(self, scale: float) -> None:
        given = case((70,), (200,), heads=1)
        check(given, make_arrays(given)._replace(softmax_scale=np.full(1, scale, np.float32)))

    @pytest.mark.parametrize("where", ["q", "k", "v"])
    def test_nan_reaches_its_readers_alone(self, where: str) -> None:
        given = case((90, 60))
        arrays = make_arrays(given)
        getattr(arrays, where)[3 + 40, 1, 5] = NAN
        out, _ = check(given, arrays)
        rows = np.isnan(out).any(axis=-1)
        wanted = np.zeros_like(rows)
        wanted[43 : 44 if where == "q" else 93, 1] = True
        np.testing.assert_array_equal(rows, wanted)
        if where == "v":
            assert np.isnan(out[43:93, 1, 5]).all() and not np.isnan(np.delete(out, 5, axis=-1)).any()

    @pytest.mark.parametrize("causal", [True, False])
    def test_values_that_are_no_numbers(self, causal: bool) -> None:
        """In blocks that all rows see, that some see, and side by side in a column."""
        check(*with_no_numbers(causal))

    def test_a_sequence_is_computed_alike_anywhere(self) -> None:
        alone, among = case((70,), before=0), case((33, 70, 5), before=3)
        first, many = make_arrays(alone), make_arrays(among, 1)
        for x, y in zip(first[:4], many[:4], strict=True):
            if x is not None:
                y[36:106] = x[:70]
                y[:36], y[106:] = NAN, NAN
        one, all_of_them = (interpreted(c.problem(), a) for c, a in ((alone, first), (among, many)))
        assert_bitwise_equal(all_of_them[0][36:106], one[0][:70])
        assert_bitwise_equal(all_of_them[1][:, 36:106], one[1][:, :70])

    def test_nothing_to_attend_to(self) -> None:
        given = case((4,), (0,), state_dtype=F32)
        problem, arrays = given.problem(), make_arrays(given)
        problem = dataclasses.replace(problem, keys=0)
        arrays = arrays._replace(k=arrays.k[:0], v=arrays.v[:0])
        assert_bitwise_equal(kernel(None, problem, arrays), reference.run(problem, jax.tree.map(jnp.asarray, arrays)))

    @pytest.mark.parametrize(
        ("queries", "keys", "cut"),
        [
            ((140,), (700,), {"producer": False, "turn": "issued", "beside": 128}),
            ((140,), (300,), {"keys": 96, "turn": "scores", "beside": 32}),
            ((140,), (300,), {"keys": 64, "stages": 4, "beside": 64}),
            ((140,), (300,), {"keys": 80, "beside": 48}),
            ((9,), (9,), {"producer": False}),
        ],
    )
    def test_other_cuts(self, queries: tuple[int, ...], keys: tuple[int, ...], cut: dict[str, Any]) -> None:
        check(case(queries, keys, heads=1, out_dtype=BF16), cut=cut)

    @pytest.mark.parametrize("options", [{}, {"state_dtype": F32, "output_quant": Fp8PerGroup.row_major(64)}])
    def test_several_tiles_a_block(self, options: dict[str, Any]) -> None:
        """Blocks that take tiles of several heads and sequences one after the other, among them unused ones."""
        check(case((140, 0, 33, 1), (140, 5, 300, 0), **options), cut={"blocks": 3, "producer": True})


def with_no_numbers(causal: bool) -> tuple[Case, MlaArrays]:
    given = case((150, 70), (400, 70), causal=causal, heads=1)
    arrays = make_arrays(given)
    for key, column, value in (
        (20, 1, NAN), (30, 2, INF), (290, 3, -INF), (290, 70, NAN), (310, 70, INF), (330, 4, INF), (350, 4, -INF),
        (399, 5, INF), (384, 127, NAN), (400, 0, INF), (430, 64, NAN), (440, 64, -INF),
    ):  # fmt: skip
        arrays.v[3 + key, 0, column] = value
    return given, arrays


# the consumer that loads values itself does so once the other has passed the turn, which orders as the release does
WITH_PRODUCER = {"producer": True}


@pytest.mark.slow
class TestFaults:
    """What is planted is found."""

    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            ("none", "clean"),
            ("keys released before they are read", "RaceFound"),
            ("values released before they are read", "RaceFound"),
            ("values used before the other half is cleared", "RaceFound"),
            ("values not cleared", "wrong result"),
            ("what was cleared is forgotten", "wrong result"),
            ("mask one key too wide", "wrong result"),
            ("earlier sum not rescaled", "wrong result"),
        ],
    )
    def test_planted(self, fault: str, expected: str) -> None:
        given = case((150,), (420,), heads=1)
        arrays = make_arrays(given)
        arrays.v[3 + 350, 0, 5] = NAN
        sound = interpreted(given.problem(), arrays, WITH_PRODUCER)
        assert verdict(faulty, fault, given.problem(), arrays, expected=sound) == expected


def faulty(interpret: Any, fault: str, problem: MlaProblem, arrays: MlaArrays) -> Any:
    """The kernel with one thing replaced."""
    own, products, cleaner = mla_prefill_sm90._Kernel, mla_prefill_sm90._Products, mla_prefill_sm90._Cleaner
    visible, start_scores, start_values = own._visible, products.start_scores, products.start_values

    def keys_early(self: Any, slot: Any) -> Any:
        plgpu.barrier_arrive(self.smem.k_free.at[slot])
        return start_scores(self, slot)

    def values_early(self: Any, operand: Any, slot: Any, earlier: Any) -> Any:
        plgpu.barrier_arrive(self.smem.v_free.at[slot])
        return start_values(self, operand, slot, earlier)

    def cleared_early(self: Any, number: Any, slot: Any) -> None:
        self.arrive()
        self._clear_plainly(self.smem.v[1].at[slot, self.warpgroup], number * self.keys)

    unreleased = lambda self, pending, slot, younger=0: pending
    unreleased_values = lambda self, pending, slot, held=(): (pending, held) if held else pending
    patches = {
        "none": [],
        "keys released before they are read": [
            (products, "start_scores", keys_early), (products, "scores", unreleased)
        ],
        "values released before they are read": [
            (products, "start_values", values_early), (products, "weighed", unreleased_values)
        ],
        "values used before the other half is cleared": [(cleaner, "clear", cleared_early)],
        "values not cleared": [(cleaner, "clear", lambda self, number, slot: self.arrive())],
        "what was cleared is forgotten": [
            (own, "_with_nonfinite", lambda self, gmem, smem, tile, warpgroup, value: value)
        ],
        "mask one key too wide": [(own, "_visible", lambda self, tile, local: visible(self, tile, local) + 1)],
        "earlier sum not rescaled": [(own, "_shrunk", staticmethod(lambda state: state))],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches[fault]:
            stack.enter_context(mock.patch.object(*patch))
        return kernel(interpret, problem, arrays, WITH_PRODUCER)


@pytest.mark.skipif("pallas" not in kernels("mla_prefill"), reason="needs a CUDA device")
class TestHardware:
    """The same on a GPU of compute capability 9.0."""

    @staticmethod
    def check(*given: Any, **more: Any) -> Any:
        return check(*given, **more, run=on_hardware, lse_bound=HARDWARE_LSE_BOUND)

    @pytest.mark.parametrize(
        ("given", "cut"),
        [
            (case(STRESS, out_dtype=BF16), {}),
            (case(STRESS, tuple(reversed(STRESS)), causal=False, pair=True), {}),
            (case((200, 0, 33), (70, 5, 400), state_dtype=F32, output_quant=Fp8PerGroup.row_major(64)), {}),
            (case(STRESS, state_dtype=BF16, output_quant=PER_TENSOR), {"producer": True, "blocks": 5}),
            (case((40, 130), (300, 10), dtype=F16, out_dtype=BF16), {"producer": False, "turn": "issued"}),
            (case((300, 1), (900, 5), out_dtype=BF16), {"keys": 96, "turn": "scores", "beside": 32}),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, given: Case, cut: dict[str, Any]) -> None:
        self.check(given, cut=cut)

    @pytest.mark.parametrize("causal", [True, False])
    def test_values_that_are_no_numbers(self, causal: bool) -> None:
        """They reach their readers alone; so does NaN in q and k."""
        given, arrays = with_no_numbers(causal)
        self.check(given, arrays)
        for where in ("q", "k"):
            arrays = make_arrays(given)
            getattr(arrays, where)[3 + 40, 0, 5] = NAN
            self.check(given, arrays)

    NEIGHBOURS = case((300, 130, 200), (700, 130, 900), heads=4, out_dtype=BF16)

    def test_neighbours_change_nothing(self) -> None:
        """Bit for bit, whatever stands in the other sequences and behind the last."""
        problem, arrays = self.NEIGHBOURS.problem(), make_arrays(self.NEIGHBOURS)
        first = on_hardware(problem, arrays)
        for x, (begin, end) in ((arrays.q, (303, 433)), (arrays.k, (703, 833)), (arrays.v, (703, 833))):
            others = np.ones(len(x), bool)
            others[begin:end] = False
            x[others] = NAN
        second = on_hardware(problem, arrays)
        assert_bitwise_equal(second[0][303:433], first[0][303:433])
        assert_bitwise_equal(second[1][:, 303:433], first[1][:, 303:433])
        assert np.isfinite(first[0][303:433].astype(np.float32)).all()

    def test_repeats(self) -> None:
        """1000 times the same bits."""
        arrays, run = (
            jax.tree.map(jnp.asarray, make_arrays(self.NEIGHBOURS)),
            compiled(kernel, self.NEIGHBOURS.problem()),
        )
        words = lambda x: jax.lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
        same = jax.jit(lambda x, y: jnp.all(words(x) == words(y)))
        first = run(arrays)
        assert np.all(jax.tree.leaves([jax.tree.map(same, run(arrays), first) for _ in range(1000)]))


class TestConfig:
    @pytest.mark.parametrize(
        "bad",
        [
            {"keys": 136},
            {"tail": 8},
            {"keys": 144},
            {"stages": 3},
            {"stages": 1},
            {"beside": 16},
            {"beside": 160},
            {"turn": "late"},
            {"format": FP8, "keys": 96},
            {"format": FP8, "tail": 4},
            {"format": FP8, "turn": "issued"},
            {"splits": 2},
        ],
    )
    def test_misfits_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"keys|shared memory|beside|turn|tail|stages|split"):
            MlaConfig(**{"format": FORMAT, **bad})

    def test_the_format_is_the_problem_s(self) -> None:
        with pytest.raises(ValueError, match="bf16"):
            mla_prefill_sm90.build(case((8,)).problem(), MlaConfig())

    def test_heuristics(self) -> None:
        config = mla_prefill_sm90.default_config(case((8,), out_dtype=BF16).problem())
        assert (config.format, config.producer) == (FORMAT, jax.__version_info__ < (0, 12))
        keys = lambda **options: mla_prefill_sm90.default_config(case((8,), **options).problem()).keys
        assert keys(out_dtype=F32) == keys(out_dtype=BF16, state_dtype=F32) < config.keys
        assert keys(out_dtype=F32, output_quant=PER_TENSOR) == config.keys
        few = dataclasses.replace(case((8,)).problem(), tokens=256, keys=65536, heads=16)
        assert mla_prefill_sm90.default_config(few).splits == 1

    def test_reasons(self) -> None:
        problem = case((8,)).problem()
        assert mla_prefill_sm90.supports(problem, Device("cuda", "H200", (9, 0))) == ()
        assert "9.0" in mla_prefill_sm90.supports(problem, Device("cuda", "B200", (10, 0)))[0]
