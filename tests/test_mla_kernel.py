"""The Hopper kernel of mla_prefill: interpreted on a CPU, with races looked for, against the oracle."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import mla_prefill_sm90
from jax_fp8attn.pallas.mla_prefill_sm90 import MlaConfig

from jax_fp8attn import offsets
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import Fp8Array, Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.reference import mla_prefill as reference
from jax_fp8attn.testing import assert_bitwise_equal, fp8_ulps

E4M3, BF16, F32 = (np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32))
NAN, INF = np.nan, np.inf
PER_TENSOR = Fp8PerTensor(None)
LSE_BOUND = 1e-4  # products on the tensor cores keep fewer bits: there 1e-3


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths of the sequences' queries and keys, and what else differs."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int = 2
    dtype: np.dtype = E4M3
    pair: bool = False
    before: int = 3  # rows of no sequence in front of the first, and five behind the last
    options: tuple[tuple[str, Any], ...] = ()

    def problem(self) -> MlaProblem:
        return MlaProblem(
            tokens=self.before + sum(self.queries) + 5,
            keys=self.before + sum(self.keys) + 5,
            sequences=len(self.queries),
            heads=self.heads,
            q_dtype=self.dtype,
            k_dtype=self.dtype,
            v_dtype=self.dtype,
            k_rope_dtype=self.dtype if self.pair else None,
            **{"out_dtype": F32, "return_lse": True, **dict(self.options)},
        )


def case(queries: Sequence[int], keys: Sequence[int] | None = None, **facts: Any) -> Case:
    own = {field.name for field in dataclasses.fields(Case)}
    options = tuple((name, value) for name, value in facts.items() if name not in own)
    named = {name: value for name, value in facts.items() if name in own}
    return Case(tuple(queries), tuple(queries if keys is None else keys), **named, options=options)


def make_arrays(given: Case, seed: int = 0) -> MlaArrays:
    """Standard normal operands, V with a mean of 1; rows and keys of no sequence hold NaN."""
    problem, rng = given.problem(), np.random.default_rng(seed)

    def normal(*shape: int, dtype: Any = given.dtype, mean: float = 0.0) -> np.ndarray:
        return (rng.standard_normal(shape, dtype=np.float32) + mean).astype(dtype)

    cu_q, cu_k = (np.cumsum([given.before, *lengths]).astype(np.int32) for lengths in (given.queries, given.keys))
    q = normal(problem.tokens, given.heads, 192)
    k = normal(problem.keys, given.heads, 128 if given.pair else 192)
    rope = normal(problem.keys, 64) if given.pair else None
    v = normal(problem.keys, given.heads, 128, mean=1.0)
    for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k), *([(rope, cu_k)] if given.pair else [])):
        x[: cu[0]], x[cu[-1] :] = NAN, NAN
    one = np.ones(1, np.float32)
    state_lse = 2 * rng.standard_normal((given.heads, problem.tokens), dtype=np.float32) + 3
    empty = rng.random(state_lse.shape)
    state_lse[empty < 0.1], state_lse[empty > 0.9] = INF, -INF
    merges = problem.state_dtype is not None
    arrays = MlaArrays(
        q, k, rope, v, *_ranges(cu_q, problem.tokens), *_ranges(cu_k, problem.keys),
        softmax_scale=one * 192**-0.5, q_scale=one * 0.5, k_scale=one * 2.0, v_scale=one * 1.5,
        initial_out=normal(problem.tokens, given.heads, 128, dtype=problem.state_dtype or F32) if merges else None,
        initial_lse=state_lse if merges else None,
        output_scale=one * 0.01 if problem.output_quant == PER_TENSOR else None,
    )  # fmt: skip
    return jax.tree.map(np.asarray, arrays)


def _ranges(cu: np.ndarray, total: int) -> list[np.ndarray]:
    return [np.asarray(x) for x in offsets.ranges(jnp.asarray(cu), total)]


def kernel(interpret: Any, problem: MlaProblem, arrays: MlaArrays, cut: dict[str, Any] | None = None) -> Any:
    config = MlaConfig(**(cut or {}))
    return mla_prefill_sm90.build(problem, config, interpret)(jax.tree.map(jnp.asarray, arrays))


def values_of(out: Any) -> np.ndarray:
    return np.asarray(out.dequantize() if isinstance(out, Fp8Array) else out).astype(np.float64)


def check(given: Case, arrays: MlaArrays | None = None, cut: dict[str, Any] | None = None) -> Any:
    """Close to the oracle that rounds as the kernel does, and within the op's bounds of the exact one."""
    problem = given.problem()
    arrays = make_arrays(given) if arrays is None else arrays
    out, lse = run_interpreted(kernel, problem, arrays, cut, kernels=1)
    on_device = jax.tree.map(jnp.asarray, arrays)
    emulated, exact = reference.emulated(problem, on_device)[0], reference.run(problem, on_device)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact[1]))
    finite = np.isfinite(np.asarray(exact[1]))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(exact[1]))
    np.testing.assert_allclose(lse[finite], np.asarray(exact[1])[finite], atol=LSE_BOUND)
    got, near, far = values_of(out), values_of(emulated), values_of(exact[0])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(far))
    mass = lambda x: np.sqrt(np.nansum(x * x, axis=-1))  # of each row and head
    quantised = problem.output_quant is not None
    rounding = 0.04 if quantised else 2.0**-8 if problem.out_dtype == BF16 else 0.0
    assert (mass(got - far) <= (0.045 + rounding) * mass(far) + 1e-6).all()
    # the same roundings but for a few probabilities that lie between two codes
    total = lambda x: np.sqrt(np.nansum(x * x))
    assert total(got - near) <= (0.004 + rounding) * total(near) + 1e-6
    if quantised:
        assert (fp8_ulps(out.values, emulated.values) > 1).mean() < 0.005
        assert out.scales.shape == emulated.scales.shape
        np.testing.assert_allclose(out.scales_2d(), emulated.scales_2d(), rtol=0.02)
    return out, lse


def slow(*cases: Any) -> list[Any]:
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]


class TestInterpreted:
    @pytest.mark.parametrize(
        "given",
        [
            case((150,)),
            case((1,)),
            case((64, 65, 0, 7)),
            case((70, 0, 33, 1), (70, 5, 200, 0)),
            case((40, 130), (300, 10), causal=False, pair=True),
            case((129, 64), (300, 10), pair=True, out_dtype=BF16),
            case((30,), (520,), causal=False, heads=1),
            *slow(case((150,), dtype=BF16), case((20, 20), dtype=F32, before=0, out_dtype=np.dtype(np.float16))),
        ],
        ids=lambda c: f"{c.queries}-{c.keys}-{c.dtype}",
    )
    def test_against_the_oracle(self, given: Case) -> None:
        check(given)

    @pytest.mark.parametrize(
        "spec",
        [*slow(PER_TENSOR, Fp8PerGroup.deepgemm_sm90()), Fp8PerGroup.row_major(64), Fp8PerGroup.deepgemm_sm100()],
        ids=["tensor", "col_tma", "row64", "packed"],
    )
    def test_quantised(self, spec: Any) -> None:
        check(case((70, 0, 33), (70, 5, 200), output_quant=spec))

    @pytest.mark.parametrize(
        "options",
        [
            *slow({"state_dtype": F32}, {"state_dtype": BF16, "out_dtype": BF16}),
            {"state_dtype": F32, "output_quant": PER_TENSOR},
        ],
        ids=["f32", "bf16", "f32 to fp8"],
    )
    def test_initial_state(self, options: dict[str, Any]) -> None:
        check(case((70, 0, 33), (70, 5, 200), **options))

    def test_an_empty_side_is_exact(self) -> None:
        """Rows that see no key take the state bit for bit, whatever stands behind a state without weight is ignored."""
        given = case((40, 20), (0, 20), state_dtype=F32)
        arrays = make_arrays(given)
        arrays.initial_lse[:, 3:10], arrays.initial_lse[:, 50:60] = 1.0, -INF
        arrays.initial_out[50:60] = NAN
        out, lse = check(given, arrays)
        assert_bitwise_equal(out[3:10], arrays.initial_out[3:10])
        assert_bitwise_equal(lse[:, 3:10], arrays.initial_lse[:, 3:10])
        assert np.isfinite(out[50:60]).all()

    @pytest.mark.parametrize("scale", [-0.1, *slow(0.0, 2.0, NAN)])
    def test_any_scale(self, scale: float) -> None:
        given = case((70,), (200,), heads=1)
        check(given, make_arrays(given)._replace(softmax_scale=np.full(1, scale, np.float32)))

    @pytest.mark.parametrize("where", [*slow("q", "k"), "v"])
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

    def test_a_sequence_is_computed_alike_anywhere(self) -> None:
        alone, among = case((70,), before=0), case((33, 70, 5), before=3)
        first, many = make_arrays(alone), make_arrays(among, 1)
        for x, y in zip(first[:4], many[:4], strict=True):
            if x is not None:
                y[36:106] = x[:70]
        one, all_of_them = (
            run_interpreted(kernel, c.problem(), a, kernels=1) for c, a in ((alone, first), (among, many))
        )
        assert_bitwise_equal(all_of_them[0][36:106], one[0][:70])
        assert_bitwise_equal(all_of_them[1][:, 36:106], one[1][:, :70])

    @pytest.mark.parametrize(
        "given",
        [case((), ()), case((0,), (9,), before=0), case((4,), (0,), before=0), case((4, 3), heads=0)],
        ids=["no sequence", "no token of one", "no key", "no head"],
    )
    @pytest.mark.parametrize("options", [{}, {"state_dtype": F32, "output_quant": Fp8PerGroup.row_major()}])
    def test_nothing_to_attend_to(self, given: Case, options: dict[str, Any]) -> None:
        """As the oracle has it, with no launch."""
        given = dataclasses.replace(given, options=tuple(options.items()))
        problem, arrays = given.problem(), make_arrays(given)
        if given.before == 0:  # without the rows of no sequence
            spare = dataclasses.replace(problem, tokens=problem.tokens - 5, keys=problem.keys - 5)
            arrays = arrays._replace(
                q=arrays.q[:-5], k=arrays.k[:-5], v=arrays.v[:-5],
                initial_out=None if arrays.initial_out is None else arrays.initial_out[:-5],
                initial_lse=None if arrays.initial_lse is None else arrays.initial_lse[:, :-5],
            )  # fmt: skip
            problem = spare
        expected = reference.run(problem, jax.tree.map(jnp.asarray, arrays))
        if problem.tokens and problem.keys and problem.sequences and problem.heads:
            pytest.fail("this case has something to attend to")
        assert_bitwise_equal(kernel(None, problem, arrays), expected)

    @pytest.mark.parametrize(
        ("queries", "keys", "cut"),
        [
            ((140,), (700,), {"producer": False}),
            *slow(((140,), (300,), {"stages": 3}), ((9,), (9,), {"producer": False})),
        ],
    )
    def test_other_cuts(self, queries: tuple[int, ...], keys: tuple[int, ...], cut: dict[str, Any]) -> None:
        check(case(queries, keys, heads=1), cut=cut)

    @pytest.mark.parametrize("options", [{}, *slow({"state_dtype": F32, "output_quant": Fp8PerGroup.row_major(64)})])
    def test_several_tiles_a_block(self, options: dict[str, Any]) -> None:
        """Blocks that take tiles of several heads and sequences one after the other, among them unused ones."""
        check(case((140, 0, 33, 1), (140, 5, 300, 0), **options), cut={"blocks": 3})


class TestFaults:
    """What is planted is found."""

    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            ("none", "clean"),
            ("keys released before they are read", "RaceFound"),
            ("values released before they are read", "RaceFound"),
            ("no lift in the lse", "wrong result"),
            ("keys in plain order", "wrong result"),
            ("mask one key too wide", "wrong result"),
            ("earlier sum not rescaled", "wrong result"),
        ],
    )
    def test_planted(self, fault: str, expected: str) -> None:
        given = case((150,), (420,), heads=1)
        arrays = make_arrays(given)
        sound = run_interpreted(kernel, given.problem(), arrays)
        assert verdict(faulty, fault, given.problem(), arrays, expected=sound) == expected


def faulty(interpret: Any, fault: str, problem: MlaProblem, arrays: MlaArrays) -> Any:
    """The kernel with one thing replaced."""
    own, products = mla_prefill_sm90._Kernel, mla_prefill_sm90._Products
    visible, start_scores, start_values = own._visible, products.start_scores, products.start_values

    def keys_early(self: Any, slot: Any) -> Any:
        plgpu.barrier_arrive(self.smem.k_free.at[slot])
        return start_scores(self, slot)

    def values_early(self: Any, operand: Any, slot: Any) -> Any:
        plgpu.barrier_arrive(self.smem.v_free.at[slot])
        return start_values(self, operand, slot)

    unreleased = lambda self, pending, slot, younger=0: pending
    patches = {
        "none": [],
        "keys released before they are read": [
            (products, "start_scores", keys_early), (products, "scores", unreleased)
        ],
        "values released before they are read": [
            (products, "start_values", values_early), (products, "weighed", unreleased)
        ],
        "no lift in the lse": [(mla_prefill_sm90, "LIFT", 7.0)],
        "keys in plain order": [(mla_prefill_sm90.tile_list, "KEY_ORDER", tuple(range(16)))],
        "mask one key too wide": [(own, "_visible", lambda self, tile, local: visible(self, tile, local) + 1)],
        "earlier sum not rescaled": [(own, "_sum", lambda self, state, weighed: state.out + weighed)],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches[fault]:
            stack.enter_context(mock.patch.object(*patch))
        return kernel(interpret, problem, arrays)


class TestConfig:
    @pytest.mark.parametrize(
        "bad", [{"registers": (248, 40)}, {"registers": (236, 24)}, {"stages": 5}, {"producer": False, "blocks": 9}]
    )
    def test_misfits_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"registers|shared memory|producer"):
            MlaConfig(**bad)

    def test_heuristics(self) -> None:
        assert mla_prefill_sm90.default_config(case((8,)).problem()).producer == (jax.__version_info__ < (0, 12))

    def test_reasons(self) -> None:
        problem = case((8,)).problem()
        assert mla_prefill_sm90.supports(problem, Device("cuda", "H200", (9, 0))) == ()
        (reason,) = mla_prefill_sm90.supports(problem, Device("cuda", "B200", (10, 0)))
        assert "9.0" in reason
        bf16 = dataclasses.replace(problem, compute="bf16")
        assert "bf16" in mla_prefill_sm90.supports(bf16, Device("cuda", "H200", (9, 0)))[0]
