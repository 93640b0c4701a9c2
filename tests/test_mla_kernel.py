"""The Hopper kernel of mla_prefill: interpreted on a CPU, with races looked for, against the oracle."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from implementations import kernels
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import mla_prefill_sm90, mla_prepare_sm90
from jax_fp8attn.pallas.common import tile_list
from jax_fp8attn.pallas.mla_prefill_sm90 import MlaConfig
from test_mla_prepare import plain_cast, plain_values

import jax_fp8attn as fp8attn
from jax_fp8attn import offsets
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MergeArrays, MergeProblem, MlaArrays, MlaProblem
from jax_fp8attn.quantize import Fp8Array, Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.reference import merge as reference_merge
from jax_fp8attn.reference import mla_prefill as reference
from jax_fp8attn.testing import assert_bitwise_equal, fp8_ulps, relative_error

E4M3, BF16, F32 = (np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32))
NAN, INF = np.nan, np.inf
PER_TENSOR = Fp8PerTensor(None)
LSE_BOUND = 1e-4  # interpreted
HARDWARE_LSE_BOUND = (1e-3, 2.0**-9)  # products on the tensor cores keep fewer bits: absolute, and of the largest score


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


def kernel(
    interpret: Any, problem: MlaProblem, arrays: MlaArrays, cut: dict[str, Any] | None = None, prepare: bool = True
) -> Any:
    """Without ``prepare`` its operands are made plainly, not by the kernels of ``mla_prepare_sm90``."""
    run = mla_prefill_sm90.build(problem, MlaConfig(**(cut or {})), interpret)
    with contextlib.ExitStack() as stack:
        if not prepare:
            stack.enter_context(mock.patch.object(mla_prepare_sm90, "prepare_values", plain_values))
            stack.enter_context(mock.patch.object(mla_prepare_sm90, "cast", plain_cast))
        return jax.jit(run)(jax.tree.map(jnp.asarray, arrays))


def emulated(problem: MlaProblem, arrays: MlaArrays, splits: int) -> Any:
    """The oracle that rounds as the kernel does: over the keys of every split alone, merged."""
    if splits == 1:
        return reference.emulated(problem, arrays)
    state = dataclasses.replace(problem, output_quant=None, out_dtype=F32)
    seen = reference.visibility(problem, arrays)
    parts = []
    for n in range(splits):
        given = state if n == 0 else dataclasses.replace(state, state_dtype=None)
        mine = seen & keys_of_split(problem, arrays, n, splits)
        with mock.patch.object(reference, "visibility", lambda *_, mine=mine: mine):
            parts.append(reference.emulated(given, arrays))
    merged = MergeProblem(
        splits, problem.tokens, problem.heads, 128, F32, problem.out_dtype, problem.output_quant, return_lse=True
    )
    return reference_merge.run(merged, MergeArrays(*zip(*parts, strict=True), None, arrays.output_scale))


def keys_of_split(problem: MlaProblem, arrays: MlaArrays, split: int, splits: int) -> np.ndarray:
    """bool [T, S]: the split's share of the blocks of 128 keys that each tile of 128 rows sees."""
    mine = np.zeros((problem.tokens, problem.keys), bool)
    for q_start, q_length, k_start, k_length in zip(*(np.asarray(x) for x in arrays[4:8]), strict=True):
        for first in range(0, q_length, 128):
            last = min(first + 128, q_length) - 1
            seen = min(last + 1 + k_length - q_length, k_length) if problem.causal else k_length
            blocks = -(-max(seen, 0) // 128)
            begin, end = (128 * (n * blocks // splits) for n in (split, split + 1))
            mine[q_start + first : q_start + last + 1, k_start + begin : k_start + end] = True
    return mine


def exact_of(problem: MlaProblem, arrays: MlaArrays) -> Any:
    """On the CPU: a GPU compiles the oracle's operations one by one, which takes longer than the kernel."""
    with jax.default_device(jax.devices("cpu")[0]):
        return reference.run(problem, jax.tree.map(jnp.asarray, arrays))


def values_of(out: Any) -> np.ndarray:
    return np.asarray(out.dequantize() if isinstance(out, Fp8Array) else out).astype(np.float64)


def interpreted(
    problem: MlaProblem, arrays: MlaArrays, cut: dict[str, Any] | None = None, prepare: bool = False
) -> Any:
    splits = MlaConfig(**(cut or {})).splits
    if not prepare:
        return run_interpreted(kernel, problem, arrays, cut, False, kernels=1 + (splits > 1))
    casts = [x for x in arrays[:4] if x is not None and x.dtype != E4M3 and x.size % mla_prepare_sm90.PIECE == 0]
    casts = len(casts) - (len(casts) > 0 and problem.v_dtype != F32)  # V is cast on its way, but for float32
    return run_interpreted(kernel, problem, arrays, cut, kernels=2 + casts + (splits > 1))


def on_hardware(
    problem: MlaProblem, arrays: MlaArrays, cut: dict[str, Any] | None = None, kernel: Callable[..., Any] = kernel
) -> Any:
    return jax.tree.map(np.asarray, compiled(kernel, problem, tuple((cut or {}).items()))(arrays))


@functools.cache
def compiled(kernel: Callable[..., Any], problem: MlaProblem, cut: tuple[tuple[str, Any], ...] = ()) -> Any:
    return jax.jit(lambda arrays: kernel(None, problem, arrays, dict(cut)))


def check(
    given: Case,
    arrays: MlaArrays | None = None,
    cut: dict[str, Any] | None = None,
    run: Any = interpreted,
    lse_bound: tuple[float, float] = (LSE_BOUND, 0.0),
) -> Any:
    """Close to the oracle that rounds as the kernel does, and within the op's bounds of the exact one."""
    problem = given.problem()
    arrays = make_arrays(given) if arrays is None else arrays
    splits = MlaConfig(**(cut or {})).splits
    out, lse = run(problem, arrays, cut)
    exact = exact_of(problem, arrays)
    with jax.default_device(jax.devices("cpu")[0]):
        rounded = emulated(problem, jax.tree.map(jnp.asarray, arrays), splits)[0]
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(exact[1]))
    finite = np.isfinite(np.asarray(exact[1]))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(exact[1]))
    wanted = np.asarray(exact[1])[finite]
    largest = np.abs(wanted).max(initial=0.0)
    np.testing.assert_allclose(lse[finite], wanted, rtol=0, atol=lse_bound[0] + lse_bound[1] * largest)
    got, near, far = values_of(out), values_of(rounded), values_of(exact[0])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(far))
    mass = lambda x: np.sqrt(np.nansum(x * x, axis=-1))  # of each row and head
    quantised = problem.output_quant is not None
    rounding = 0.04 if quantised else 2.0**-8 if problem.out_dtype == BF16 else 0.0
    assert (mass(got - far) <= (0.045 + rounding) * mass(far) + 1e-6).all()
    # the same roundings but for a few probabilities that lie between two codes
    total = lambda x: np.sqrt(np.nansum(x * x))
    assert total(got - near) <= (0.004 + rounding) * total(near) + 1e-6
    if quantised:
        assert (fp8_ulps(out.values, rounded.values) > 1).mean() < 0.005
        assert out.scales.shape == rounded.scales.shape
        ratio = np.asarray(out.scales_2d(), np.float64) / np.asarray(rounded.scales_2d(), np.float64)
        assert np.median(np.abs(ratio - 1)) < 0.005
        if getattr(problem.output_quant, "scale_format", "f32") == "ue8m0":  # some maxima lie beside a power of two
            assert np.isin(ratio, (0.5, 1.0, 2.0)).all() and (ratio != 1).mean() < 0.01
        else:
            np.testing.assert_allclose(ratio, 1.0, rtol=0.04)
    return out, lse


def slow(*cases: Any) -> list[Any]:
    return [pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases]


SPECS = slow(PER_TENSOR, Fp8PerGroup.deepgemm_sm90(), Fp8PerGroup.row_major(64), Fp8PerGroup.deepgemm_sm100())
STATES = [
    *slow({"state_dtype": F32}, {"state_dtype": BF16, "out_dtype": BF16}),
    {"state_dtype": F32, "output_quant": PER_TENSOR},
]


class TestInterpreted:
    @pytest.mark.parametrize(
        "given",
        [
            case((70, 0, 33, 1), (70, 5, 200, 0), heads=1, pair=True),
            *slow(
                case((70, 0, 33, 1), (70, 5, 200, 0)),
                case((40, 130), (300, 10), causal=False, pair=True),
                case((150,)),
                case((1,)),
                case((64, 65, 0, 7)),
                case((129, 64), (300, 10), pair=True, out_dtype=BF16),
                case((30,), (520,), causal=False, heads=1),
            ),
        ],
        ids=lambda c: f"{c.queries}-{c.keys}-{c.dtype}",
    )
    def test_against_the_oracle(self, given: Case) -> None:
        check(given)

    @pytest.mark.parametrize(
        "given",
        [
            *slow(
                case((40,), dtype=BF16),
                case((70, 0, 33, 1), (70, 5, 200, 0), causal=False, pair=True),
                case((150,), dtype=BF16),
                case((20, 20), dtype=F32, before=0, out_dtype=np.dtype(np.float16)),
            ),
        ],
        ids=lambda c: f"{c.queries}-{c.dtype}",
    )
    def test_with_its_preparation(self, given: Case) -> None:
        check(given, run=functools.partial(interpreted, prepare=True))

    @pytest.mark.parametrize("spec", SPECS)
    def test_quantised(self, spec: Any) -> None:
        check(case((70, 0, 33), (70, 5, 200), output_quant=spec))

    @pytest.mark.parametrize("options", STATES)
    def test_initial_state(self, options: dict[str, Any]) -> None:
        check(case((70, 0, 33), (70, 5, 200), **options))

    @pytest.mark.slow
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

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [-0.1, 0.0, 2.0, NAN])
    def test_any_scale(self, scale: float) -> None:
        given = case((70,), (200,), heads=1)
        check(given, make_arrays(given)._replace(softmax_scale=np.full(1, scale, np.float32)))

    @pytest.mark.parametrize("where", slow("q", "k", "v"))
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

    @pytest.mark.slow
    def test_a_sequence_is_computed_alike_anywhere(self) -> None:
        alone, among = case((70,), before=0), case((33, 70, 5), before=3)
        first, many = make_arrays(alone), make_arrays(among, 1)
        for x, y in zip(first[:4], many[:4], strict=True):
            if x is not None:
                y[36:106] = x[:70]
        one, all_of_them = (interpreted(c.problem(), a) for c, a in ((alone, first), (among, many)))
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

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("queries", "keys", "cut"),
        [
            ((140,), (700,), {"producer": False, "late": False}),
            ((140,), (300,), {"stages": 3}),
            ((9,), (9,), {"producer": False}),
            ((9,), (300,), {"late": False}),
        ],
    )
    def test_other_cuts(self, queries: tuple[int, ...], keys: tuple[int, ...], cut: dict[str, Any]) -> None:
        check(case(queries, keys, heads=1), cut=cut)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options", [{}, {"state_dtype": F32, "output_quant": Fp8PerGroup.row_major(64)}], ids=["plain", "state"]
    )
    def test_several_tiles_a_block(self, options: dict[str, Any]) -> None:
        """Blocks that take tiles of several heads and sequences one after the other, among them unused ones."""
        check(case((140, 0, 33, 1), (140, 5, 300, 0), **options), cut={"blocks": 3})


LENGTHS = (70, 0, 33, 1), (300, 5, 200, 0)


class TestSplits:
    """The keys that a tile sees in several tiles, merged by a second kernel."""

    @pytest.mark.parametrize(
        ("options", "cut"),
        [
            *slow(
                ({"state_dtype": F32, "output_quant": PER_TENSOR, "heads": 1}, {"splits": 2}),
                ({"state_dtype": F32, "output_quant": PER_TENSOR}, {"splits": 3}),
                ({}, {"splits": 2}),
                ({"causal": False}, {"splits": 3}),
                ({}, {"splits": 3, "producer": False}),
                ({"pair": True, "out_dtype": BF16}, {"splits": 3, "blocks": 5}),
                ({"causal": False, "output_quant": Fp8PerGroup.deepgemm_sm100()}, {"splits": 2}),
                ({"state_dtype": BF16, "out_dtype": BF16}, {"splits": 2}),
                ({"output_quant": Fp8PerGroup.row_major(64)}, {"splits": 9}),
            ),
        ],
    )
    def test_against_the_oracle(self, options: dict[str, Any], cut: dict[str, Any]) -> None:
        check(case(*LENGTHS, **options), cut=cut)

    @pytest.mark.slow
    def test_an_empty_side_is_exact(self) -> None:
        """Rows that see no key in any split take the state bit for bit; one split of three sees the other keys."""
        given = case((40, 20), (0, 20), heads=1, state_dtype=F32)
        arrays = make_arrays(given)
        arrays.initial_lse[:, 3:10], arrays.initial_lse[:, 50:60] = 1.0, -INF
        arrays.initial_out[50:60] = NAN
        out, lse = check(given, arrays, {"splits": 3})
        assert_bitwise_equal(out[3:10], arrays.initial_out[3:10])
        assert_bitwise_equal(lse[:, 3:10], arrays.initial_lse[:, 3:10])
        assert np.isfinite(out[50:60]).all()

    @pytest.mark.slow
    @pytest.mark.parametrize(("key", "first"), [(250, 40), (100, 0), (299, 89)])
    def test_nan_reaches_its_readers_alone(self, key: int, first: int) -> None:
        """Whichever split has it, and has the weight."""
        given, arrays = nan_in_v(key)
        out, _ = check(given, arrays, {"splits": 2})
        wanted = np.zeros(out.shape, bool)
        wanted[3 + first : 3 + 90, 0, 5] = True
        np.testing.assert_array_equal(np.isnan(out), wanted)

    @pytest.mark.slow
    def test_a_sequence_is_computed_alike_anywhere(self) -> None:
        alone, among = case((70,), (300,), before=0), case((33, 70, 5), (33, 300, 5), before=3)
        first, many = make_arrays(alone), make_arrays(among, 1)
        for x, y, rows in ((first.q, many.q, 70), (first.k, many.k, 300), (first.v, many.v, 300)):
            y[36 : 36 + rows] = x[:rows]
        one, all_of_them = (interpreted(c.problem(), a, {"splits": 2}) for c, a in ((alone, first), (among, many)))
        assert_bitwise_equal(all_of_them[0][36:106], one[0][:70])
        assert_bitwise_equal(all_of_them[1][:, 36:106], one[1][:, :70])

    @pytest.mark.slow
    def test_instances_have_their_own_scales(self) -> None:
        given = case((60, 58), (200, 198), heads=1, instances=2, output_quant=PER_TENSOR)
        arrays, pair = make_arrays(given), np.array([1, 1.5], np.float32)
        names = ("softmax_scale", "q_scale", "k_scale", "v_scale", "output_scale")
        arrays = arrays._replace(**{name: getattr(arrays, name) * pair for name in names})
        out, lse = interpreted(given.problem(), arrays, {"splits": 2})
        exact = dataclasses.replace(given.problem(), output_quant=None)
        expected, expected_lse = reference.run(exact, jax.tree.map(jnp.asarray, arrays))
        np.testing.assert_allclose(lse, expected_lse, atol=LSE_BOUND)
        np.testing.assert_array_equal(out.scales, arrays.output_scale)
        got = out.values.astype(np.float32) * np.repeat(out.scales, 63)[:, None, None]
        assert np.linalg.norm(got - expected) <= 0.06 * np.linalg.norm(expected)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("splits", [2, 3, 7])
    def test_tiles(self, causal: bool, splits: int) -> None:
        """Each row sees in its tiles, of which the splits' have their own rows of the output, what it sees at all."""
        given = case((70, 0, 133, 1, 300), (300, 5, 500, 0, 20), causal=causal)
        problem, arrays = given.problem(), jax.tree.map(jnp.asarray, make_arrays(given))
        work, regions = tiles_of(problem, arrays, splits)
        seen, tokens = np.asarray(reference.visibility(problem, arrays)), np.arange(problem.tokens)
        assert len(np.unique(work.place)) == splits * problem.tokens
        found = np.zeros(seen.shape, int)
        for split, place in enumerate(np.asarray(work.place)):
            tile = dict(zip(tile_list.SPLIT_FIELDS, np.asarray(work.tiles)[place // 128].T, strict=True))
            row, sequence = place % 128, tile["sequence"]
            assert (row < tile["rows"]).all()
            np.testing.assert_array_equal(tile["first_query"] + row, tokens)
            np.testing.assert_array_equal(tile["first_output"] + row, split * problem.tokens + tokens)
            np.testing.assert_array_equal(tile["first_key"] - tile["skipped"], np.asarray(arrays.k_start)[sequence])
            np.testing.assert_array_equal(tile["first_column"] - tile["skipped"], np.asarray(regions.first)[sequence])
            visible = np.minimum(np.minimum(tile["visible"] + row * causal, tile["key_count"]), 128 * tile["blocks"])
            for token, first, count in zip(tokens, tile["first_key"], np.maximum(visible, 0), strict=True):
                found[token, first : first + count] += 1
            mine = np.where(seen.any(axis=1) & (split == 0), tokens, -1)
            np.testing.assert_array_equal(np.where(seen.any(axis=1), np.asarray(work.token)[place], -1), mine)
        np.testing.assert_array_equal(found, seen)

    def test_many_sequences(self) -> None:
        """Places are sought by bisection there: the same ones."""
        given = case((70, 0, 133, 1), (300, 5, 500, 0))
        arrays = jax.tree.map(jnp.asarray, make_arrays(given))
        few = tiles_of(given.problem(), arrays, 2)[0]
        with mock.patch.object(tile_list, "MANY_BOUNDS", 0):
            assert_bitwise_equal(tuple(tiles_of(given.problem(), arrays, 2)[0]), tuple(few))

    def test_splits_are_balanced(self) -> None:
        """To a block of keys; of those that the tile sees, not of the sequence."""
        given = case((1024,))
        work, _ = tiles_of(given.problem(), jax.tree.map(jnp.asarray, make_arrays(given)), 3)
        tile = dict(zip(tile_list.SPLIT_FIELDS, np.asarray(work.tiles).T, strict=True))
        for number in range(8):
            mine = (tile["first_query"] == 3 + 128 * number) & (tile["rows"] == 128)
            blocks = np.where(tile["key_count"] > 0, tile["blocks"], 0)[mine]
            assert len(blocks) == 3 and blocks.sum() == number + 1 and np.ptp(blocks) <= 1


def tiles_of(problem: MlaProblem, arrays: MlaArrays, splits: int) -> tuple[Any, Any]:
    @jax.jit
    def listed(arrays: MlaArrays) -> tuple[Any, Any]:
        regions = tile_list.key_blocks(arrays.k_start, arrays.k_length, problem.keys, 128)
        return tile_list.query_tiles(problem, arrays, regions, 128, 128, splits), regions

    return listed(arrays)


def nan_in_v(key: int) -> tuple[Case, MlaArrays]:
    """NaN in one place of V; the first of two splits of the keys has no weight beside the second."""
    given = case((90,), (300,), heads=1)
    arrays = make_arrays(given)
    arrays.q[3:93], arrays.k[3:131] = 1.0, -8.0
    arrays.v[3 + key, 0, 5] = NAN
    return given, arrays


@pytest.mark.slow
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
        sound = interpreted(given.problem(), arrays)
        prepares = fault == "keys in plain order"
        found = verdict(
            faulty, fault, given.problem(), arrays, None, prepares, expected=sound, kernels=2 if prepares else 1
        )
        assert found == expected

    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            ("none", "clean"),
            ("NaN sought among the split's own keys", "wrong result"),
            ("rows of one split for all", "RaceFound"),
            ("a block of the next split", "wrong result"),
            ("a state for every split", "wrong result"),
        ],
    )
    def test_planted_in_splits(self, fault: str, expected: str) -> None:
        given, arrays = nan_in_v(100)
        cut, merges = {"splits": 2}, fault == "a state for every split"
        if merges:
            given = case((40,), (200,), heads=1, state_dtype=F32)
            arrays = make_arrays(given)
        sound = interpreted(given.problem(), arrays, cut)
        assert verdict(faulty, fault, given.problem(), arrays, cut, expected=sound, kernels=2) == expected

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fault", "expected"), [("none", "clean"), ("the next tile told while one is at work", "RaceFound")]
    )
    def test_planted_in_blocks_of_several_tiles(self, fault: str, expected: str) -> None:
        given = case((40,), (70,), heads=5)
        arrays, cut = make_arrays(given), {"blocks": 2}
        sound = interpreted(given.problem(), arrays)
        assert verdict(faulty, fault, given.problem(), arrays, cut, expected=sound) == expected


def faulty(
    interpret: Any,
    fault: str,
    problem: MlaProblem,
    arrays: MlaArrays,
    cut: dict[str, Any] | None = None,
    prepare: bool = False,
) -> Any:
    """The kernel with one thing replaced."""
    own, products = mla_prefill_sm90._Kernel, mla_prefill_sm90._Products
    visible, start_scores, start_values = own._visible, products.start_scores, products.start_values
    tile_of, tiles_of_rows = own._tile, tile_list.tiles_of_rows

    def keys_early(self: Any, slot: Any) -> Any:
        plgpu.barrier_arrive(self.smem.k_free.at[slot])
        return start_scores(self, slot)

    def values_early(self: Any, operand: Any, slot: Any, earlier: Any = None) -> Any:
        plgpu.barrier_arrive(self.smem.v_free.at[slot])
        return start_values(self, operand, slot, earlier)

    def tile_with(**facts: Any) -> Any:
        def changed(self: Any, *given: Any) -> Any:
            tile = tile_of(self, *given)
            return tile._replace(**{name: fact(tile) for name, fact in facts.items()})

        return own, "_tile", changed

    def state_for_all(lse: Any, work: Any) -> Any:
        token = work.token[work.place[:1]]
        return tiles_of_rows(lse, work._replace(token=work.token.at[work.place].set(token)))

    def told_early(self: Any, smem: Any, taken: Any, turn: Any, before: Any) -> None:
        place = jax.lax.rem(turn, 2)
        smem.work[place, 0], smem.work[place, 1] = turn * self.blocks + jax.lax.axis_index("block"), before
        plgpu.barrier_arrive(smem.work_there.at[place])

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
        "keys in plain order": [(mla_prepare_sm90, "_in_key_order", lambda codes: codes)],
        "mask one key too wide": [(own, "_visible", lambda self, tile, local: visible(self, tile, local) + 1)],
        "earlier sum not rescaled": [(own, "_sum", lambda self, state, weighed: state.out + weighed)],
        "NaN sought among the split's own keys": [tile_with(skipped=lambda tile: 0)],
        "rows of one split for all": [tile_with(first_output=lambda tile: tile.first_query)],
        "a block of the next split": [tile_with(blocks=lambda tile: tile.blocks + 1)],
        "the next tile told while one is at work": [(own, "_take", told_early)],
        "a state for every split": [(tile_list, "tiles_of_rows", state_for_all)],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches[fault]:
            stack.enter_context(mock.patch.object(*patch))
        return kernel(interpret, problem, arrays, cut, prepare)


STRESS = (0, 1, 7, 63, 64, 65, 127, 128, 129, 1000, 0, 500)


def sanitized(*given: Any) -> Any:
    """A case that compute-sanitizer sees, too."""
    return pytest.param(*given, marks=pytest.mark.sanitize)


@pytest.mark.skipif("pallas" not in kernels("mla_prefill"), reason="needs a CUDA device")
class TestHardware:
    """The same on a GPU of compute capability 9.0."""

    @pytest.mark.parametrize(
        ("given", "cut"),
        [
            sanitized(case(STRESS), {}),
            sanitized(case(STRESS, tuple(reversed(STRESS)), pair=True, out_dtype=BF16), {}),
            (case(STRESS, tuple(reversed(STRESS)), causal=False), {"stages": 3}),
            (case((40, 130), (300, 10), causal=False, dtype=BF16), {"producer": False, "late": False}),
            (case((20, 300), dtype=F32, before=0, out_dtype=np.dtype(np.float16)), {}),
            (case((200, 0, 33), (70, 5, 400), output_quant=PER_TENSOR), {}),
            (case((200, 0, 33), (70, 5, 400), output_quant=Fp8PerGroup.row_major(64)), {}),
            (case((200, 0, 33), (70, 5, 400), output_quant=Fp8PerGroup.deepgemm_sm90()), {}),
            (case((200, 0, 33), (70, 5, 400), heads=4, output_quant=Fp8PerGroup.deepgemm_sm100()), {}),
            (case((200, 0, 33), (70, 5, 400), state_dtype=F32), {}),
            (case((200, 0, 33), (70, 5, 400), state_dtype=BF16, out_dtype=BF16), {"stages": 3}),
            (case((200, 0, 33), (70, 5, 400), state_dtype=F32, output_quant=PER_TENSOR), {}),
            sanitized(case(STRESS, state_dtype=F32, output_quant=Fp8PerGroup.row_major(64)), {"blocks": 5}),
            (case((130, 1, 300), (1500, 5, 2000), state_dtype=BF16, output_quant=PER_TENSOR), {"splits": 3}),
            (case((130, 1, 300), (1500, 5, 2000), causal=False), {"splits": 4}),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, given: Case, cut: dict[str, Any]) -> None:
        check(given, cut=cut, run=on_hardware, lse_bound=HARDWARE_LSE_BOUND)

    @pytest.mark.parametrize("scale", [-0.1, 0.0, 2.0, 50.0, NAN])
    def test_any_scale(self, scale: float) -> None:
        """Also one key that outweighs all, and scores of +-1e4."""
        given = case((70,), (500,), heads=1)
        arrays = make_arrays(given)._replace(softmax_scale=np.full(1, scale, np.float32))
        out, _ = on_hardware(given.problem(), arrays)
        exact = np.asarray(exact_of(given.problem(), arrays)[0])[3:73]
        if np.isnan(scale):
            assert np.isnan(out[3:73]).all()
        elif abs(scale) > 1:  # the products' own roundings move weight between keys that are nearly as good
            assert np.median(np.linalg.norm(out[3:73] - exact, axis=-1) / np.linalg.norm(exact, axis=-1)) < 0.045
        else:
            check(given, arrays, run=on_hardware, lse_bound=HARDWARE_LSE_BOUND)

    @pytest.mark.parametrize("where", ["q", "k", "v"])
    def test_nan_reaches_its_readers_alone(self, where: str) -> None:
        given = case((300, 60))
        arrays = make_arrays(given)
        getattr(arrays, where)[3 + 40, 1, 5] = NAN
        out, _ = on_hardware(given.problem(), arrays)
        wanted = np.zeros(out.shape[:2], bool)
        wanted[43 : 44 if where == "q" else 303, 1] = True
        np.testing.assert_array_equal(np.isnan(out).any(axis=-1), wanted)
        if where == "v":
            assert np.isnan(out[43:303, 1, 5]).all() and not np.isnan(np.delete(out, 5, axis=-1)).any()

    def test_neighbours_change_nothing(self) -> None:
        """Bit for bit, whatever stands in the other sequences and behind the last."""
        given = case((300, 130, 200), (700, 130, 900))
        arrays = make_arrays(given)
        first = on_hardware(given.problem(), arrays)
        for x, (begin, end) in ((arrays.q, (303, 433)), (arrays.k, (703, 833)), (arrays.v, (703, 833))):
            others = np.ones(len(x), bool)
            others[begin:end] = False
            x[others] = NAN
        second = on_hardware(given.problem(), arrays)
        assert_bitwise_equal(second[0][303:433], first[0][303:433])
        assert_bitwise_equal(second[1][:, 303:433], first[1][:, 303:433])
        assert np.isfinite(first[0][303:433]).all()

    @pytest.mark.parametrize("mean", [0.0, 1.0])
    def test_at_length(self, mean: float) -> None:
        """32768 keys; sums that only the tensor cores made would miss a mean by 0.3."""
        given = case((256,), (32768,), heads=1, causal=False)
        arrays = make_arrays(given)
        arrays = arrays._replace(v=(arrays.v.astype(np.float32) - 1 + mean).astype(E4M3))
        out, lse = on_hardware(given.problem(), arrays)
        exact = exact_of(given.problem(), arrays)
        error = out[3:259] - np.asarray(exact[0])[3:259]
        assert np.linalg.norm(error) <= (0.005 if mean else 0.03) * np.linalg.norm(np.asarray(exact[0])[3:259])
        np.testing.assert_allclose(lse[:, 3:259], np.asarray(exact[1])[:, 3:259], rtol=0, atol=1e-3)

    def test_repeats(self) -> None:
        """1000 times the same bits."""
        given = case((300, 1, 500), (900, 5, 700), heads=4)
        problem, arrays = given.problem(), jax.tree.map(jnp.asarray, make_arrays(given))
        run = jax.jit(lambda arrays: kernel(None, problem, arrays))
        bits = jax.jit(lambda x, y: jnp.all(jax.lax.bitcast_convert_type(x, jnp.int32) == y))
        first = jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.int32), run(arrays))
        same = [jax.tree.map(bits, run(arrays), first) for _ in range(1000)]
        assert np.all(jax.tree.leaves(same))

    def test_through_the_op(self) -> None:
        """Chosen by itself."""
        q, k, v = (
            jax.random.normal(jax.random.key(n), (200, 2, d), jnp.bfloat16) for n, d in enumerate((192, 192, 128))
        )
        assert fp8attn.explain("mla_prefill", q, k, v).taken == "pallas"
        out = fp8attn.mla_prefill(q, k, v)
        expected = fp8attn.mla_prefill(q, k, v, implementation="reference")
        assert relative_error(out, expected) < 0.03


class TestConfig:
    @pytest.mark.parametrize(
        "bad",
        [
            {"registers": (240, 32)}, {"registers": (236, 24)}, {"stages": 5}, {"producer": False, "blocks": 9},
            {"splits": 0},
        ],
    )  # fmt: skip
    def test_misfits_are_refused(self, bad: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"registers|shared memory|producer|split"):
            MlaConfig(**bad)

    def test_heuristics(self) -> None:
        assert mla_prefill_sm90.default_config(case((8,)).problem()).producer == (jax.__version_info__ < (0, 12))

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize(
        ("tokens", "keys", "sequences", "heads", "expected"),
        [
            (256, 65536, 1, 16, 4),  # 32 tiles: 128 of the 132 multiprocessors
            (128, 65536, 1, 16, 8),
            (1, 65536, 1, 16, 8),
            (1024, 65536, 1, 16, 1),  # 128 tiles already
            (8192, 8192, 1, 16, 1),
            (128, 1024, 1, 16, 1),  # too few keys
            (256, 65536, 16, 16, 1),
            (64, 1 << 20, 1, 1, 16),
            (0, 9, 1, 1, 1),
        ],
    )
    def test_splits(self, tokens: int, keys: int, sequences: int, heads: int, expected: int, causal: bool) -> None:
        sizes = {"tokens": tokens, "keys": keys, "sequences": sequences, "heads": heads, "causal": causal}
        problem = dataclasses.replace(case((8,)).problem(), **sizes)
        assert mla_prefill_sm90.default_config(problem).splits == expected

    def test_a_spilling_split_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        few = dataclasses.replace(case((8,), state_dtype=F32).problem(), tokens=256, keys=65536, heads=16)
        for version, splits in (((0, 11, 2), True), ((0, 12, 0), False)):
            monkeypatch.setattr(jax, "__version_info__", version)
            assert (mla_prefill_sm90.default_config(few).splits > 1) == splits

    def test_reasons(self) -> None:
        problem = case((8,)).problem()
        assert mla_prefill_sm90.supports(problem, Device("cuda", "H200", (9, 0))) == ()
        (reason,) = mla_prefill_sm90.supports(problem, Device("cuda", "B200", (10, 0)))
        assert "9.0" in reason
