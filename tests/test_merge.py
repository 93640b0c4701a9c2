"""merge_attn_states, its n-ary form and mask_empty_context_lse, over every implementation."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_oracles as oracle
import pytest
from implementations import PORTABLE, implementations, kernels
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_fp8attn import (
    Fp8Array,
    Fp8PerGroup,
    Fp8PerTensor,
    InvalidInputError,
    UnsupportedError,
    mask_empty_context_lse,
    merge_attn_states,
    merge_attn_states_n,
    quantize_fp8,
)
from jax_fp8attn.testing import (
    assert_bitwise_equal,
    assert_codes_close,
    assert_lse_close,
    assert_relative_error,
    assert_rows_close,
    assert_same_nonfinite,
    fp8_bytes,
)

KERNELS = kernels("merge_attn_states")
IMPLEMENTATIONS = implementations("merge_attn_states")
INF, NAN = np.inf, np.nan
T, H, D = 9, 3, 32
GROUP_SPECS = [
    Fp8PerGroup(32, "float32", "row"),
    Fp8PerGroup(32, "float32", "col"),
    Fp8PerGroup(32, "float32", "col_tma"),
    Fp8PerGroup(32, "ue8m0", "row"),
    Fp8PerGroup(32, "ue8m0", "col_tma_packed"),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def with_cases(*cases: Any) -> list[tuple[str, Any]]:
    """Every implementation with every case; the reference with the last one only."""
    return [(name, case) for name in IMPLEMENTATIONS for case in (cases[-1:] if name == "reference" else cases)]


class States(NamedTuple):
    """The four tensors of a merge."""

    prefix_output: Any
    prefix_lse: Any
    suffix_output: Any
    suffix_lse: Any

    def oracle(self, count: int | None = None, base: float = np.e) -> tuple[np.ndarray, np.ndarray]:
        outputs, lses = (self.prefix_output, self.suffix_output), (self.prefix_lse, self.suffix_lse)
        return oracle.merge(outputs, lses, count, base)


def states(tokens: int = T, heads: int = H, width: int = D, dtype: Any = np.float32, seed: int = 0) -> States:
    """Outputs and lse ~ N(0, 1); a tenth of each side's lse +inf, never both: the inputs of the upstream tests."""
    rng = np.random.default_rng(seed)
    outputs = [rng.standard_normal((tokens, heads, width), dtype=np.float32).astype(dtype) for _ in range(2)]
    prefix, suffix = rng.standard_normal((2, heads, tokens), dtype=np.float32)
    empty = rng.random((heads, tokens))
    prefix[empty < 0.1], suffix[empty > 0.9] = INF, INF
    return States(outputs[0], prefix, outputs[1], suffix)


def finite_states(*shape: int, **options: Any) -> States:
    s = states(*shape, **options)
    for lse in (s.prefix_lse, s.suffix_lse):
        lse[np.isinf(lse)] = 0.5
    return s


def exact_states(*shape: int, seed: int = 0, **options: Any) -> States:
    """lse at multiples of 200: shares of 0, 1/2 and 1, so that every implementation and shape gives the same bits."""
    s = finite_states(*shape, seed=seed, **options)
    rng = np.random.default_rng(seed + 1000)
    for lse in (s.prefix_lse, s.suffix_lse):
        lse[:] = 200 * rng.integers(-1, 2, lse.shape)
        lse[rng.random(lse.shape) < 0.1], lse[rng.random(lse.shape) < 0.1] = INF, -INF
    return s


def half_ulps(actual: Any, expected: np.ndarray) -> int:
    """Largest distance in units of the last place of a 16-bit float."""
    actual = np.asarray(actual)
    bits = [x.view(np.uint16).astype(np.int64) for x in (actual, expected.astype(np.float32).astype(actual.dtype))]
    a, e = (np.where(b & 0x8000, -(b & 0x7FFF), b) for b in bits)
    return int(np.abs(a - e).max(initial=0))


def assert_merged(out: Any, expected: np.ndarray, mass: Any = 0.0) -> None:
    """float32 within 1e-6 a row; bf16 and f16 within one step of the rounded oracle. Where the two sides cancel,
    float32 sums keep 2^-22 of the ``mass`` that is added up, not of what is left."""
    assert_same_nonfinite(out, expected)
    if out.dtype == jnp.float32:
        assert_rows_close(out, expected, worst=1e-6)
        return
    error = np.abs(np.asarray(out).astype(np.float64) - expected)
    cancelled = (error <= 2.0**-22 * mass) & (np.abs(expected) < 2.0**-7 * mass)
    kept = np.where(cancelled, np.asarray(out).astype(np.float64), expected)
    assert half_ulps(out, kept) <= 1


def assert_quantised(out: Fp8Array, expected: np.ndarray, spec: Any, scale: float = 1.0) -> None:
    """The bounds of codes and scales against the float64 merge."""
    flat = expected.reshape(expected.shape[0], -1).astype(np.float32)
    if isinstance(spec, Fp8PerTensor):
        assert_codes_close(out.flat, oracle.per_tensor(flat, scale))
        return
    scales = oracle.group_scales(flat, spec.group_size, spec.scale_format)
    if spec.scale_format == "ue8m0":
        np.testing.assert_array_equal(out.scales_2d(), scales)
    else:
        np.testing.assert_allclose(out.scales_2d(), scales, rtol=1e-6)
    assert out.scales.shape == spec.scale_shape(*scales.shape)
    assert_codes_close(out.flat, oracle.per_group(flat, scales))


def at(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


TOKENS, HEADS, WIDTHS = (256, 512, 613, 1024, 1536, 4096), (4, 8, 16, 32, 48, 64), (32, 48, 64, 96, 128, 256)
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
OPTIONS = list(itertools.product((False, True), (None, 128), DTYPES))
SMALL = [  # tokens, heads, width
    (256, 4, 32), (512, 8, 48), (613, 48, 96), (1024, 4, 64), (1536, 3, 128), (4096, 1, 256),
    (256, 16, 128), (613, 5, 20), (256, 32, 48), (256, 64, 64),
    (1, 1, 8), (2, 3, 512), (3, 5, 20), (5, 48, 8), (1, 128, 128), (5, 2, 192),
]  # fmt: skip


def chunks(tokens: int) -> Iterator[slice]:
    """Pieces that keep the float64 oracle small."""
    for start in range(0, tokens, 256):
        yield slice(start, min(start + 256, tokens))


def check_upstream_case(shape: tuple[int, int, int], option: int, implementation: str) -> None:
    quantised, count, dtype = OPTIONS[option % len(OPTIONS)]
    count = None if count is None else min(count, shape[0])
    s = states(*shape, dtype=dtype)
    scale = 0.05 if quantised else None
    out, lse = merge_attn_states(
        *s, prefill_tokens_with_context=count, output_scale=scale, return_lse=True, implementation=implementation
    )
    assert out.shape == shape and lse.shape == shape[1::-1]
    out, lse = jax.tree.map(np.asarray, (out, lse))
    for part in chunks(shape[0]):
        piece = States(s.prefix_output[part], s.prefix_lse[:, part], s.suffix_output[part], s.suffix_lse[:, part])
        local = None if count is None else max(0, count - part.start)
        expected, expected_lse = piece.oracle(local)
        assert_lse_close(lse[:, part], expected_lse)
        if quantised:
            assert_codes_close(out.values[part], oracle.per_tensor(expected, 0.05))
        else:
            outputs, lses = np.abs(piece[0::2]), piece[1::2]
            assert_merged(out[part], expected, mass=oracle.merge(outputs, lses, local)[0])


class TestUpstreamAxes:
    """Group 1."""

    @pytest.mark.parametrize(
        "case", [pytest.param(n, marks=pytest.mark.slow if n in (6, 8, 9, 12) else ()) for n in range(len(SMALL))]
    )
    def test_shapes(self, case: int) -> None:
        """R1: every value of the six upstream axes, odd shapes besides."""
        check_upstream_case(SMALL[case], 5 * case, PORTABLE[case % 8 == 7])
        for kernel in KERNELS if SMALL[case][2] % 8 == 0 else ():
            check_upstream_case(SMALL[case], 5 * case, kernel)

    @pytest.mark.slow
    @pytest.mark.parametrize("tokens", TOKENS)
    @pytest.mark.parametrize("heads", HEADS)
    def test_every_upstream_shape(self, tokens: int, heads: int) -> None:
        """R1: 216 shapes, the options cycling so that every pair of axis values occurs."""
        for number, width in enumerate(WIDTHS):
            option = 6 * TOKENS.index(tokens) + 5 * HEADS.index(heads) + 7 * number
            for name in ("xla", *KERNELS):
                check_upstream_case((tokens, heads, width), option, name)

    @pytest.mark.parametrize(("implementation", "spec"), with_cases(None, Fp8PerTensor(0.5), *GROUP_SPECS))
    def test_no_tokens_no_heads(self, spec: Any, implementation: str) -> None:
        """R3."""
        for tokens, heads in ((0, H), (T, 0)):
            s = states(tokens, heads)
            out, lse = merge_attn_states(
                *s, prefill_tokens_with_context=0, output_quant=spec, return_lse=True, implementation=implementation
            )
            assert out.shape == (tokens, heads, D) and lse.shape == (heads, tokens)
            if isinstance(spec, Fp8PerGroup):
                assert out.scales.shape == spec.scale_shape(tokens, heads)


class TestEdgeCases:
    """Groups 2 to 7, 10 and 13: the edge-case table."""

    @pytest.mark.parametrize("empty", [INF, -INF])
    @pytest.mark.parametrize("base", ["e", "2"])
    def test_one_side_empty_gives_the_other_bit_for_bit(self, empty: float, base: str, implementation: str) -> None:
        """R2, R3: -0 and subnormals included, lse too, whatever its base."""
        s = finite_states(dtype=ml_dtypes.bfloat16)
        s.prefix_output[0], s.suffix_output[0] = -0.0, -0.0
        s.prefix_output[1, 0, 0], s.suffix_output[1, 0, 0] = 1e-39, -1e-39
        s.prefix_lse[:] *= np.float32(100.7)
        options = {"return_lse": True, "lse_base": base, "implementation": implementation}
        nothing = np.full((H, T), empty, np.float32)
        out, lse = merge_attn_states(s.prefix_output, s.prefix_lse, s.suffix_output, nothing, **options)
        keep = np.abs(s.prefix_output.astype(np.float32)) != np.abs(np.float32(ml_dtypes.bfloat16(1e-39)))
        np.testing.assert_array_equal(np.asarray(out).view(np.uint16)[keep], s.prefix_output.view(np.uint16)[keep])
        assert_bitwise_equal(lse, s.prefix_lse)
        out, lse = merge_attn_states(s.prefix_output, nothing, s.suffix_output, s.suffix_lse, **options)
        np.testing.assert_array_equal(np.asarray(out).view(np.uint16)[keep], s.suffix_output.view(np.uint16)[keep])
        assert_bitwise_equal(lse, s.suffix_lse)

    @pytest.mark.parametrize(("prefix", "suffix"), [(INF, INF), (INF, -INF), (-INF, INF), (-INF, -INF)])
    def test_both_sides_empty(self, prefix: float, suffix: float, implementation: str) -> None:
        """R3: out = 0, lse = -inf whatever the outputs hold, and the next merge gives the pure suffix."""
        s = finite_states()
        s.prefix_output[1], s.suffix_output[2], s.prefix_output[3] = NAN, INF, 0.0
        p, q = np.full((H, T), prefix, np.float32), np.full((H, T), suffix, np.float32)
        out, lse = merge_attn_states(
            s.prefix_output, p, s.suffix_output, q, return_lse=True, implementation=implementation
        )
        assert_bitwise_equal(out, np.zeros((T, H, D), np.float32))
        assert_bitwise_equal(lse, np.full((H, T), -INF, np.float32))
        clean = finite_states(seed=1)
        result = merge_attn_states(
            out, lse, clean.suffix_output, clean.suffix_lse, return_lse=True, implementation=implementation
        )
        assert_bitwise_equal(result, (clean.suffix_output, clean.suffix_lse))

    @pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38])
    def test_an_empty_side_contributes_nothing(self, garbage: float, implementation: str) -> None:
        """R6: garbage behind lse = -inf does not reach the result."""
        s = finite_states()
        s.prefix_lse[:, 2], s.suffix_lse[:, 5] = -INF, INF
        clean = merge_attn_states(*s, return_lse=True, implementation=implementation)
        s.prefix_output[2], s.suffix_output[5] = garbage, garbage
        assert_bitwise_equal(merge_attn_states(*s, return_lse=True, implementation=implementation), clean)

    def test_a_vanishing_weight_contributes_nothing(self, implementation: str) -> None:
        """R6: a weight below the smallest normal float32 is 0, so that flushing hardware agrees."""
        s = finite_states()
        s.prefix_lse[:], s.suffix_lse[:] = 0, 90
        s.prefix_output[:] = NAN
        out = merge_attn_states(*s, implementation=implementation)
        assert_bitwise_equal(out, s.suffix_output)
        s.suffix_lse[:] = 80
        assert np.isnan(merge_attn_states(*s, implementation=implementation)).all()

    def test_every_context_count(self, implementation: str) -> None:
        """R6, R16, group 5: 0, 1, T-1, T and beyond, as int and traced; the prefix past the count is not read."""
        s = states()
        traces = 0

        @jax.jit
        def traced(s: States, count: jax.Array) -> Any:
            nonlocal traces
            traces += 1
            return merge_attn_states(
                *s, prefill_tokens_with_context=count, return_lse=True, implementation=implementation
            )

        for count in (0, 1, T - 1, T, 4, -7, T + 1, 2**31 - 1, -(2**31)):
            clamped = min(max(count, 0), T)
            out, lse = traced(s, jnp.int32(count))
            expected, expected_lse = s.oracle(clamped)
            assert_merged(out, expected)
            assert_lse_close(lse, expected_lse)
            dirty = s._replace(prefix_output=s.prefix_output.copy(), prefix_lse=s.prefix_lse.copy())
            dirty.prefix_output[clamped:], dirty.prefix_lse[:, clamped:] = NAN, NAN
            assert_bitwise_equal(traced(dirty, jnp.int32(count)), (out, lse))
            if count == clamped:
                host = merge_attn_states(
                    *s, prefill_tokens_with_context=count, return_lse=True, implementation=implementation
                )
                assert_bitwise_equal(host, (out, lse))
        assert traces == 1
        s = exact_states()
        none = merge_attn_states(*s, return_lse=True, implementation=implementation)
        assert_bitwise_equal(none, traced(s, jnp.int32(T)))

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int16])
    def test_counts_of_other_integer_types_are_clamped(self, dtype: Any) -> None:
        s = states()
        most = jnp.asarray(np.iinfo(dtype).max, dtype)
        assert_bitwise_equal(merge_attn_states(*s, prefill_tokens_with_context=most), merge_attn_states(*s))
        four = merge_attn_states(*s, prefill_tokens_with_context=jnp.asarray([[4]], dtype))
        assert_bitwise_equal(four, merge_attn_states(*s, prefill_tokens_with_context=4))

    def test_copied_tail_takes_the_suffix_as_it_is(self, implementation: str) -> None:
        """Group 6: suffix lse +inf becomes -inf, a NaN lse does not touch the output, -0 stays -0."""
        s = finite_states()
        s.suffix_lse[0, 5], s.suffix_lse[1, 6], s.suffix_output[7, 2, :4] = INF, NAN, -0.0
        out, lse = merge_attn_states(*s, prefill_tokens_with_context=5, return_lse=True, implementation=implementation)
        assert_bitwise_equal(out[5:], s.suffix_output[5:])
        expected = s.suffix_lse[:, 5:].copy()
        expected[0, 0] = -INF
        np.testing.assert_array_equal(lse[:, 5:], expected)

    def test_border_inside_a_tile(self) -> None:
        """Group 6: every count around multiples of 8, 16 and 32 rows of [T*H, D]."""
        s = states(50, 3, 24)
        merge = jax.jit(lambda count: merge_attn_states(*s, prefill_tokens_with_context=count))
        for count in (1, 2, 3, 5, 6, 10, 11, 15, 16, 17, 31, 32, 33, 49):
            assert_merged(merge(jnp.int32(count)), s.oracle(count)[0])

    @pytest.mark.parametrize(
        ("prefix", "suffix", "share", "lse"),
        [
            (1e4, 1e4 - 1, 0.7310585786, 1e4 + 0.3132616875),
            (88.8, 88.8, 0.5, 88.8 + np.log(2)),
            (-88.8, -88.8, 0.5, -88.8 + np.log(2)),
            (88.8, -88.8, 1.0, 88.8),
            (0.0, 103.0, 0.0, 103.0),
            (0.0, 104.0, 0.0, 104.0),
            (-1e30, -1e30, 0.5, -1e30),
            (3e38, 3e38, 0.5, 3e38),
            (-3e38, 3e38, 0.0, 3e38),
            (-3.4e38, -3.4e38, 0.5, -3.4e38),
        ],
    )
    def test_magnitudes(self, prefix: float, suffix: float, share: float, lse: float, implementation: str) -> None:
        """R2, group 7: weights come from differences, so that no lse is too large."""
        s = finite_states()
        s.prefix_output[:], s.suffix_output[:], s.prefix_lse[:], s.suffix_lse[:] = 1, 0, prefix, suffix
        out, merged = merge_attn_states(*s, return_lse=True, implementation=implementation)
        np.testing.assert_allclose(out, np.full(out.shape, share), rtol=2e-7, atol=1e-38)
        np.testing.assert_allclose(merged, np.full(merged.shape, np.float32(lse)), rtol=1e-6)

    def test_large_lse_of_base_two(self, implementation: str) -> None:
        """A conversion of the lse itself would lose its low digits: 16384 and 16383 in base 2 are 2 to 1."""
        s = finite_states()
        s.prefix_output[:], s.suffix_output[:], s.prefix_lse[:], s.suffix_lse[:] = 3, 0, 16384, 16383
        out, lse = merge_attn_states(*s, lse_base="2", return_lse=True, implementation=implementation)
        np.testing.assert_allclose(out, np.full(out.shape, 2.0), rtol=1e-6)
        np.testing.assert_allclose(lse, np.full(lse.shape, 16384 + np.log2(1.5)), rtol=1e-7)

    def test_nan_lse_gives_a_nan_row(self, implementation: str) -> None:
        """R2, group 10: nothing is hidden, nothing spreads."""
        s = finite_states()
        clean, clean_lse = merge_attn_states(*s, return_lse=True, implementation=implementation)
        s.prefix_lse[1, 4], s.suffix_lse[0, 7] = NAN, NAN
        out, lse = merge_attn_states(*s, return_lse=True, implementation=implementation)
        expected, expected_lse = np.array(clean), np.array(clean_lse)
        expected[4, 1], expected[7, 0], expected_lse[1, 4], expected_lse[0, 7] = NAN, NAN, NAN, NAN
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(lse, expected_lse)
        codes = fp8_bytes(merge_attn_states(*s, output_scale=0.05, implementation=implementation).values)
        assert (codes[4, 1] == 0x7F).all() and (codes[7, 0] == 0x7F).all() and (codes == 0x7F).sum() == 2 * D

    def test_nan_element_stays_where_it_is(self, implementation: str) -> None:
        """R2, R6, group 10."""
        s = finite_states()
        clean = np.array(merge_attn_states(*s, implementation=implementation))
        s.prefix_output[4, 1, 9], s.suffix_output[6, 2, 0] = NAN, INF
        clean[4, 1, 9], clean[6, 2, 0] = NAN, INF
        np.testing.assert_array_equal(merge_attn_states(*s, implementation=implementation), clean)

    def test_largest_half_precision_values(self, implementation: str) -> None:
        """Group 13: float32 accumulation; f16 near 65504 and bf16 3e38 stay finite."""
        for dtype, value in ((np.float16, 65504), (ml_dtypes.bfloat16, 3e38)):
            s = finite_states(dtype=dtype)
            s.prefix_output[:], s.suffix_output[:] = value, value
            s.prefix_lse[:], s.suffix_lse[:] = 1.0, 1.0
            out = merge_attn_states(*s, implementation=implementation)
            assert_bitwise_equal(out, s.prefix_output)
            s.suffix_lse[:] = 1.5
            assert half_ulps(merge_attn_states(*s, implementation=implementation), s.oracle()[0]) <= 1

    def test_out_dtype(self, implementation: str) -> None:
        s = states(dtype=ml_dtypes.bfloat16)
        out = merge_attn_states(*s, out_dtype=jnp.float32, implementation=implementation)
        assert out.dtype == jnp.float32
        assert_merged(out, s.oracle()[0])
        assert merge_attn_states(*s, implementation=implementation).dtype == jnp.bfloat16
        assert merge_attn_states(*states(), out_dtype="bfloat16", implementation=implementation).dtype == jnp.bfloat16


class TestLse:
    """Group 8: layouts and bases."""

    def test_layouts_with_asymmetric_square_values(self, implementation: str) -> None:
        """H == T cannot be told by shape: the option decides."""
        s = states(4, 4, 8)
        ht = merge_attn_states(*s, return_lse=True, implementation=implementation)
        th = merge_attn_states(
            s.prefix_output, s.prefix_lse.T, s.suffix_output, s.suffix_lse.T,
            lse_layout="TH", return_lse=True, implementation=implementation,
        )  # fmt: skip
        assert_bitwise_equal(th[0], ht[0])
        assert_bitwise_equal(th[1], ht[1].T)
        expected, lse = s.oracle()
        assert_merged(ht[0], expected)
        assert_lse_close(ht[1], lse)
        wrong = merge_attn_states(*s, lse_layout="TH", implementation=implementation)
        assert np.abs(wrong - ht[0]).max() > 0.1

    def test_the_other_layout_is_named_in_the_error(self) -> None:
        s = states()
        with pytest.raises(InvalidInputError, match=r"looks like \[T, H\]: pass lse_layout='TH'"):
            merge_attn_states(s.prefix_output, s.prefix_lse.T, s.suffix_output, s.suffix_lse)
        with pytest.raises(InvalidInputError, match=r"looks like \[H, T\]: pass lse_layout='HT'"):
            merge_attn_states(*s, lse_layout="TH")

    def test_base_two_after_conversion(self, implementation: str) -> None:
        s = states()
        ln2 = np.float32(np.log(2))
        two = s._replace(prefix_lse=s.prefix_lse / ln2, suffix_lse=s.suffix_lse / ln2)
        out, lse = merge_attn_states(*two, lse_base="2", return_lse=True, implementation=implementation)
        expected, expected_lse = s.oracle()
        assert_merged(out, expected)
        assert_lse_close(np.asarray(lse) * ln2, expected_lse)
        assert_lse_close(lse, two.oracle(base=2)[1])

    @pytest.mark.parametrize(("base", "mass"), [("e", 0.02041), ("2", 0.00374)])
    def test_a_wrong_base_is_visible(self, base: str, mass: float, implementation: str) -> None:
        """3072 prefix keys and 64 suffix keys of equal probability; base 2 numbers are log2."""
        s = finite_states()
        s.prefix_output[:], s.suffix_output[:] = 0, 1
        s.prefix_lse[:], s.suffix_lse[:] = np.log2(3072), np.log2(64)
        right = merge_attn_states(*s, lse_base="2", implementation=implementation)
        np.testing.assert_allclose(right, np.full(right.shape, 64 / 3136), rtol=1e-5)
        if base == "2":
            wrong = merge_attn_states(*s, lse_base="e", implementation=implementation)
            np.testing.assert_allclose(wrong, np.full(wrong.shape, mass), rtol=2e-3)
        else:
            assert right[0, 0, 0] == pytest.approx(mass, rel=1e-3)


def attention(q: Any, k: Any, v: Any, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dense float64 attention: out [T, H, D] and lse [H, T]; rows without a key give (0, -inf)."""
    scores = np.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    scores = np.where(visible, scores, -INF)
    top = scores.max(-1, initial=-INF)
    top = np.where(np.isneginf(top), 0, top)
    power = np.exp(scores - top[..., None])
    total = power.sum(-1)
    safe = np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        return np.einsum("hts,shd->thd", power / safe[..., None], v), np.log(total) + top


class TestAlgebra:
    """Group 9, R9: attention over parts, merged, is attention over all."""

    @pytest.mark.parametrize(("implementation", "parts"), with_cases(1, 2, 3, 7))
    def test_chunked_context(self, parts: int, implementation: str) -> None:
        """Requests of 0 and 20 context keys beside one of 33; both serving orders and a permuted one."""
        rng = np.random.default_rng(parts)
        tokens, keys, new = 37, 33, 17
        q = rng.standard_normal((tokens, 3, 16))
        k, v = rng.standard_normal((2, keys + new, 3, 16))
        context = np.where(np.arange(tokens) < 12, 33, np.where(np.arange(tokens) < 20, 20, 0))[:, None]
        visible = np.concatenate([np.arange(keys) < context, np.ones((tokens, new), bool)], 1)
        dense, dense_lse = attention(q, k, v, visible)

        def part(index: np.ndarray) -> tuple[Any, Any]:
            return tuple(np.float32(x) for x in attention(q, k[index], v[index], visible[:, index]))

        def merge(a: tuple[Any, Any], b: tuple[Any, Any]) -> tuple[Any, Any]:
            return merge_attn_states(*a, *b, return_lse=True, implementation=implementation)

        chunks = [part(index) for index in np.array_split(np.arange(keys), parts)]
        suffix = part(np.arange(keys, keys + new))
        accumulated = chunks[0]
        for chunk in chunks[1:]:
            accumulated = merge(accumulated, chunk)
        as_vllm = merge(accumulated, suffix)
        as_sglang = suffix
        for chunk in chunks:
            as_sglang = merge(chunk, as_sglang)
        permuted = suffix
        for chunk in rng.permutation(np.arange(parts)):
            permuted = merge(permuted, chunks[chunk])
        stacked = [np.stack(x) for x in zip(*chunks, suffix, strict=True)]
        at_once = merge_attn_states_n(*stacked, return_lse=True, implementation=implementation)
        for out, lse in (as_vllm, as_sglang, permuted, at_once):
            assert_rows_close(out, dense, worst=2e-6)
            assert_lse_close(lse, dense_lse)
        sorted_first = merge_attn_states(
            *accumulated, *suffix, prefill_tokens_with_context=20, implementation=implementation
        )
        assert_rows_close(sorted_first, dense, worst=2e-6)

    def test_chunks_without_keys_in_a_row(self, implementation: str) -> None:
        """Two empty chunks merged with each other, then with the causal part: exactly the causal part."""
        nothing = np.zeros((T, H, D), np.float32), np.full((H, T), -INF, np.float32)
        s = finite_states()
        empty = merge_attn_states(*nothing, *nothing, return_lse=True, implementation=implementation)
        empty = merge_attn_states(*empty, *nothing, return_lse=True, implementation=implementation)
        result = merge_attn_states(
            *empty, s.suffix_output, s.suffix_lse, return_lse=True, implementation=implementation
        )
        assert_bitwise_equal(result, (s.suffix_output, s.suffix_lse))


class TestMany:
    """merge_attn_states_n."""

    @pytest.mark.parametrize("count", [1, 5])
    def test_against_the_oracle(self, count: int, implementation: str) -> None:
        """R1, R9: with empty and all-empty rows, equal to folded pairs."""
        rng = np.random.default_rng(count)
        outputs = rng.standard_normal((count, T, H, D), dtype=np.float32)
        lses = rng.standard_normal((count, H, T), dtype=np.float32)
        lses[rng.random(lses.shape) < 0.3] = -INF
        lses[rng.random(lses.shape) < 0.1] = INF
        lses[:, 1, 2] = -INF
        outputs[:, 2, 1] = NAN
        out, lse = merge_attn_states_n(outputs, lses, return_lse=True, implementation=implementation)
        expected, expected_lse = oracle.merge(outputs, lses)
        assert_merged(out, expected)
        assert_lse_close(lse, expected_lse)
        assert not np.asarray(out)[2, 1].any() and lse[1, 2] == -INF
        folded = outputs[0], lses[0]
        if count == 1:
            return
        for n in range(1, count):
            folded = merge_attn_states(*folded, outputs[n], lses[n], return_lse=True, implementation=implementation)
        assert_rows_close(folded[0], expected, worst=2e-6)
        assert_lse_close(folded[1], expected_lse)

    def test_two_states_are_the_pair(self, implementation: str) -> None:
        s = exact_states()
        outputs, lses = np.stack(s[0::2]), np.stack(s[1::2])
        pair = merge_attn_states(*s, return_lse=True, implementation=implementation)
        assert_bitwise_equal(merge_attn_states_n(outputs, lses, return_lse=True, implementation=implementation), pair)

    @pytest.mark.parametrize(("implementation", "spec"), with_cases(Fp8PerTensor(0.05), GROUP_SPECS[2]))
    def test_quantised_in_the_other_layout_and_base(self, spec: Any, implementation: str) -> None:
        s = states()
        outputs, lses = np.stack(s[0::2]), np.stack([s.prefix_lse.T, s.suffix_lse.T])
        out, lse = merge_attn_states_n(
            outputs, lses, output_quant=spec, lse_layout="TH", lse_base="2", return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        expected, expected_lse = s.oracle(base=2)
        assert_quantised(out, expected, spec, 0.05)
        assert_lse_close(lse, expected_lse.T)

    def test_vmap(self, implementation: str) -> None:
        """R16: nested, every layout of the lse, scales per instance."""
        s = [exact_states(seed=n) for n in range(6)]
        outputs = np.stack([np.stack(x[0::2]) for x in s]).reshape(2, 3, 2, T, H, D)
        lses = np.stack([np.stack([x.prefix_lse.T, x.suffix_lse.T]) for x in s]).reshape(2, 3, 2, T, H)
        scales = np.arange(1, 4, dtype=np.float32) / 16

        def merge(outputs: Any, lses: Any, scale: Any) -> Any:
            return merge_attn_states_n(
                outputs, lses, output_scale=scale, lse_layout="TH", return_lse=True, implementation=implementation
            )

        nested = jax.vmap(jax.vmap(merge), in_axes=(0, 0, None))(outputs, lses, scales)
        for a, b in itertools.product(range(2), range(3)):
            assert_bitwise_equal(at(nested, a, b), merge(outputs[a, b], lses[a, b], scales[b]))


class TestQuantised:
    """Groups 17, 18, 23, 25: FP8 output in the same pass."""

    @pytest.mark.parametrize(("implementation", "spec"), with_cases(Fp8PerTensor(0.05), *GROUP_SPECS))
    def test_against_the_oracle(self, spec: Any, implementation: str) -> None:
        """R1: lse, a context count in the middle, and an all-empty row beside."""
        s = states(dtype=np.float32 if spec in GROUP_SPECS[:3] else ml_dtypes.bfloat16)
        s.prefix_lse[1, 2], s.suffix_lse[1, 2], s.prefix_output[2, 1] = -INF, INF, NAN
        out, lse = merge_attn_states(
            *s, prefill_tokens_with_context=T // 2 + 1, output_quant=spec, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        expected, expected_lse = s.oracle(T // 2 + 1)
        assert_quantised(out, expected, spec, getattr(spec, "scale", 1.0))
        assert_lse_close(lse, expected_lse)
        assert not fp8_bytes(out.values)[2, 1].any()
        if isinstance(spec, Fp8PerGroup):
            scale = np.asarray(out.scales_2d())[2, 1]
            assert scale == 2.0**-33 if spec.scale_format == "ue8m0" else np.isclose(scale, 2.2321430e-13, rtol=1e-6)

    @pytest.mark.parametrize(
        ("implementation", "spec"), with_cases(GROUP_SPECS[2], GROUP_SPECS[-1], Fp8PerTensor(0.05))
    )
    def test_fused_equals_merge_then_quantise(self, spec: Any, implementation: str) -> None:
        """Group 25: the same bytes as quantising the float32 result; nothing passes through bf16."""
        options = {"prefill_tokens_with_context": T // 2, "implementation": implementation}
        for s, same in ((exact_states(dtype=ml_dtypes.bfloat16), True), (states(dtype=ml_dtypes.bfloat16), False)):
            fused = merge_attn_states(*s, output_quant=spec, **options)
            apart = quantize_fp8(merge_attn_states(*s, out_dtype=jnp.float32, **options), spec)
            if same:
                assert_bitwise_equal(fused, apart)
            assert_codes_close(fused.values, apart.values)

    def test_the_float32_value_decides(self, implementation: str) -> None:
        """Group 17: a value between the tie 17/16 and its bf16 neighbours follows its own side of the tie."""
        s = finite_states(dtype=ml_dtypes.bfloat16)
        s.prefix_lse[:], s.suffix_lse[:] = 0, -8
        small = 1 / (1 + np.exp(8))
        s.prefix_output[:], s.suffix_output[:] = 17 / 16, 17 / 16
        s.prefix_output[:, 0], s.suffix_output[:, 0] = 17 / 16, 17 / 16 + 0.5
        s.prefix_output[:, 1], s.suffix_output[:, 1] = 17 / 16, 17 / 16 - 0.5
        expected, _ = s.oracle()
        assert abs(expected[0, 0, 0] - 17 / 16 - small / 2) < 1e-6
        assert (expected.astype(ml_dtypes.bfloat16)[:, :2] == ml_dtypes.bfloat16(17 / 16)).all()
        codes = fp8_bytes(merge_attn_states(*s, output_scale=1.0, implementation=implementation).values)
        assert set(codes[:, 0].ravel().tolist()) == {0x39} and set(codes[:, 1].ravel().tolist()) == {0x38}

    def test_lossless_grid(self, implementation: str) -> None:
        """R1: one side empty, values exact in e4m3: bitwise equal codes, per tensor and per group."""
        rng = np.random.default_rng(0)
        codes = (rng.integers(0, 0x7F, (T, H, D)) | rng.integers(0, 2, (T, H, D)) << 7).astype(np.uint8)
        codes[..., 3] = 0x7E
        s = finite_states()
        s.prefix_output[:] = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / 64
        s.suffix_lse[:] = -INF
        for spec in (Fp8PerTensor(1 / 64), GROUP_SPECS[1], GROUP_SPECS[3]):
            out = merge_attn_states(*s, output_quant=spec, implementation=implementation)
            np.testing.assert_array_equal(fp8_bytes(out.values), codes)
            np.testing.assert_array_equal(out.scales_2d(), np.full(out.scales_2d().shape, 1 / 64, np.float32))

    def test_output_scale_is_short_for_per_tensor(self, implementation: str) -> None:
        s = states()
        pattern = merge_attn_states(*s, output_quant=Fp8PerTensor(0.05), implementation=implementation)
        for scale in (0.05, np.float32(0.05), jnp.full((1,), 0.05), np.full((1, 1), 0.05, np.float32)):
            assert_bitwise_equal(merge_attn_states(*s, output_scale=scale, implementation=implementation), pattern)
        assert pattern.scales.shape == () and pattern.shape == (T, H, D) and pattern.flat.shape == (T, H * D)

    @pytest.mark.parametrize("scale", [0.0, -0.5, INF, NAN, 1e-30, 1e30])
    def test_hostile_scales(self, scale: float, implementation: str) -> None:
        """R7: as documented for quantize_fp8, in every implementation."""
        s = finite_states()
        s.prefix_output[0], s.suffix_output[0] = 0, 0
        out = merge_attn_states(*s, output_scale=jnp.float32(scale), implementation=implementation)
        merged = merge_attn_states(*s, implementation=implementation)
        np.testing.assert_array_equal(fp8_bytes(out.values), oracle.per_tensor(merged, scale))

    def test_fnuz_output(self) -> None:
        s = finite_states()
        out = merge_attn_states(*s, output_quant=Fp8PerTensor(2.0**-9, jnp.float8_e4m3fnuz))
        assert out.dtype == jnp.float8_e4m3fnuz
        assert float(jnp.abs(out.values.astype(jnp.float32)).max()) == 240

    @pytest.mark.parametrize(
        ("implementation", "spec"), with_cases(GROUP_SPECS[2], GROUP_SPECS[-1], Fp8PerTensor(0.05))
    )
    def test_padded_tokens(self, spec: Any, implementation: str) -> None:
        """R6, groups 12 and 23: NaN in the padded tail changes neither valid rows nor their scales, nor the padding."""
        s = states()
        valid = 6
        clean = merge_attn_states(*s, output_quant=spec, return_lse=True, implementation=implementation)
        for array, axis in zip(s, (0, 1, 0, 1), strict=True):
            array[(slice(None),) * axis + (slice(valid, None),)] = NAN
        dirty = merge_attn_states(*s, output_quant=spec, return_lse=True, implementation=implementation)
        assert_bitwise_equal(dirty[0].values[:valid], clean[0].values[:valid])
        assert_bitwise_equal(dirty[1][:, :valid], clean[1][:, :valid])
        if isinstance(spec, Fp8PerGroup):
            assert_bitwise_equal(dirty[0].scales_2d()[:valid], clean[0].scales_2d()[:valid])
            assert not np.asarray(dirty[0].scales)[:, T:].any()


class TestPromises:
    """Group 29 and the promises that hold for every op."""

    def test_deterministic_and_alone_as_in_a_batch(self, implementation: str) -> None:
        """R8: two runs, other values beside a sequence, and the sequence alone: the same bits."""
        s = states(24)
        run = lambda s: merge_attn_states(
            *s, output_quant=GROUP_SPECS[0], return_lse=True, implementation=implementation
        )
        whole, again = run(s), run(s)
        assert_bitwise_equal(again, whole)
        part = slice(5, 5 + T)
        other = states(24, seed=9)
        for mine, theirs, axis in zip(other, s, (0, 1, 0, 1), strict=True):
            index = (slice(None),) * axis + (part,)
            mine[index] = theirs[index]
        beside = run(other)
        assert_bitwise_equal(beside[0].values[part], whole[0].values[part])
        assert_bitwise_equal(beside[0].scales[part], whole[0].scales[part])
        assert_bitwise_equal(beside[1][:, part], whole[1][:, part])
        s = exact_states(24)
        whole = run(s)
        alone = run(States(s.prefix_output[part], s.prefix_lse[:, part], s.suffix_output[part], s.suffix_lse[:, part]))
        assert_bitwise_equal(alone[0].values, whole[0].values[part])
        assert_bitwise_equal(alone[0].scales, whole[0].scales[part])
        assert_bitwise_equal(alone[1], whole[1][:, part])

    def test_inputs_are_untouched(self, implementation: str) -> None:
        """R19."""
        s = states()
        arrays = States(*map(jnp.asarray, s))
        merge_attn_states(*arrays, output_scale=0.05, implementation=implementation)
        assert_bitwise_equal(arrays, s)

    def test_ten_thousand_random_cases(self, implementation: str) -> None:
        """R2: valid random inputs with empty sides, counts and scales give no NaN, and the oracle's result."""
        cases, tokens, heads, width = 10_000, 3, 2, 8
        rng = np.random.default_rng(7)
        outputs = rng.standard_normal((2, cases, tokens, heads, width), dtype=np.float32)
        outputs *= np.exp2(rng.integers(-30, 30, (2, cases, 1, 1, 1))).astype(np.float32)
        lses = rng.standard_normal((2, cases, heads, tokens), dtype=np.float32)
        lses *= np.exp2(rng.integers(-10, 15, (2, cases, 1, 1))).astype(np.float32)
        kind = rng.integers(0, 12, lses.shape)
        lses[kind == 0], lses[kind == 1] = INF, -INF
        counts = rng.integers(-1, tokens + 2, cases).astype(np.int32)
        scales = np.exp2(rng.integers(-30, 30, cases)).astype(np.float32)

        @jax.jit
        @jax.vmap
        def merge(prefix: Any, prefix_lse: Any, suffix: Any, suffix_lse: Any, count: Any, scale: Any) -> Any:
            four, options = (prefix, prefix_lse, suffix, suffix_lse), {"implementation": implementation}
            out, lse = merge_attn_states(*four, prefill_tokens_with_context=count, return_lse=True, **options)
            return out, lse, merge_attn_states(
                *four, prefill_tokens_with_context=count, output_scale=scale, **options
            ).values  # fmt: skip

        out, lse, codes = merge(outputs[0], lses[0], outputs[1], lses[1], counts, scales)
        assert not np.isnan(out).any() and not np.isnan(lse).any() and not (fp8_bytes(codes) & 0x7F == 0x7F).any()
        # one oracle call over all tokens: a token without context has an empty prefix
        flat = outputs.reshape(2, cases * tokens, heads, width)
        flat_lse = np.moveaxis(lses, 1, 2).reshape(2, heads, cases * tokens).copy()
        flat_lse[0, :, (np.arange(tokens) >= counts[:, None]).reshape(-1)] = -INF
        expected, expected_lse = oracle.merge(flat, flat_lse)
        tail = (np.arange(tokens) >= counts[:, None]).reshape(-1)
        expected[tail] = flat[1, tail]
        assert_rows_close(np.asarray(out).reshape(flat[0].shape), expected, worst=5e-6)
        assert_lse_close(np.moveaxis(np.asarray(lse), 1, 0).reshape(heads, -1), expected_lse)
        inverse = (1 / scales).repeat(tokens)[:, None, None]
        assert_codes_close(np.asarray(codes).reshape(flat[0].shape), oracle.e4m3(expected.astype(np.float32) * inverse))

    @pytest.mark.parametrize(
        ("tokens", "spec"),
        [(131072, None), (131072, Fp8PerGroup.deepgemm_sm100()), (262144, Fp8PerTensor(0.05))],
    )
    def test_index_arithmetic_beyond_two_to_the_31(self, tokens: int, spec: Any) -> None:
        """R5, group 11: 2^31 and 2^32 elements. No index over [T, H, D]; groups need the float32 result once."""
        big = jax.ShapeDtypeStruct((tokens, 128, 128), jnp.bfloat16)
        lse = jax.ShapeDtypeStruct((128, tokens), jnp.float32)
        assert big.size >= 2**31

        def merge(*four: Any) -> Any:
            options = {"prefill_tokens_with_context": tokens - 1, "output_quant": spec, "implementation": "xla"}
            return merge_attn_states(*four, **options)

        lowered = jax.jit(merge).lower(big, lse, big, lse)
        text = lowered.as_text()
        assert not any(op in text for op in ("gather", "scatter", "dynamic_slice", "dynamic_update_slice"))
        largest = max(int(line.split("tensor<")[1].split("x")[0]) for line in text.splitlines() if "iota" in line)
        assert largest == tokens < 2**31
        compiled = lowered.compile()
        shapes = [np.prod(leaf.shape, dtype=np.int64) for leaf in jax.tree.leaves(compiled.out_info)]
        assert shapes[0] == tokens * 128 * 128 >= 2**31
        temporary = 4 * big.size * isinstance(spec, Fp8PerGroup)
        assert compiled.memory_analysis().temp_size_in_bytes < temporary + big.size // 8

    def test_rows_on_both_sides_of_a_large_border(self) -> None:
        """Group 11, modest: 2^22 elements, the last row and its neighbours."""
        s = states(1024, 32, 128, dtype=ml_dtypes.bfloat16)
        out = merge_attn_states(*s, prefill_tokens_with_context=1000)
        for rows in (slice(0, 2), slice(511, 513), slice(998, 1002), slice(1022, 1024)):
            piece = States(s.prefix_output[rows], s.prefix_lse[:, rows], s.suffix_output[rows], s.suffix_lse[:, rows])
            assert_merged(out[rows], piece.oracle(max(0, 1000 - rows.start))[0])


def _subsets() -> Iterator[Any]:
    """Every subset of (prefix, its lse, suffix, its lse, count, scale); most of them in the long run only."""
    fast = ((0,), (1, 4), (5,), (2, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5))
    for size in range(1, 7):
        for subset in itertools.combinations(range(6), size):
            marks = () if subset in fast else pytest.mark.slow
            yield pytest.param(subset, marks=marks, id="".join(map(str, subset)))


SUBSETS = list(_subsets())


class TestTransforms:
    """Group 27."""

    def test_one_trace_for_all_values(self) -> None:
        """R16: lse, counts and scales change without a retrace, and without a new compilation."""
        traces = 0

        @jax.jit
        def merge(s: States, count: Any, spec: Any) -> Any:
            nonlocal traces
            traces += 1
            return merge_attn_states(*s, prefill_tokens_with_context=count, output_quant=spec, return_lse=True)

        for n, (count, scale) in enumerate(((0, 1.0), (3, 0.05), (99, 0.0), (-1, NAN))):
            merge(states(seed=n), jnp.int32(count), Fp8PerTensor(jnp.float32(scale)))
        assert traces == 1
        assert merge._cache_size() == 1

    def test_eager_calls_share_one_compilation(self) -> None:
        """R16: Python numbers are operands, too."""
        from jax_fp8attn.dispatch import execute

        s = states(7, 2, 8)
        merge_attn_states(*s, prefill_tokens_with_context=3, output_scale=0.5)
        before = execute._cache_size()
        for count, scale in ((0, 1.0), (7, 0.25), (5, 3.0)):
            merge_attn_states(*s, prefill_tokens_with_context=count, output_scale=scale)
        assert execute._cache_size() == before

    @pytest.mark.parametrize("subset", SUBSETS)
    def test_vmap_over_any_subset(self, subset: tuple[int, ...]) -> None:
        """R16: folded into the token axis, bitwise as a loop of calls."""
        many = [exact_states(seed=n) for n in range(3)]
        counts, scales = np.int32([0, 4, T]), np.float32([0.05, 1, 0.25])
        batched = [*(np.stack(x) for x in zip(*many, strict=True)), counts, scales]
        arguments = [x if n in subset else x[1] for n, x in enumerate(batched)]

        def merge(*a: Any) -> Any:
            return merge_attn_states(*a[:4], prefill_tokens_with_context=a[4], output_scale=a[5], return_lse=True)

        result = jax.vmap(merge, in_axes=[0 if n in subset else None for n in range(6)])(*arguments)
        for n in range(3):
            one = merge(*(jnp.asarray(x[n] if m in subset else x) for m, x in enumerate(arguments)))
            assert_bitwise_equal(at(result, n), one)

    @pytest.mark.parametrize(
        ("implementation", "spec"), with_cases(GROUP_SPECS[0], GROUP_SPECS[2], GROUP_SPECS[-1], None)
    )
    def test_nested_vmap_with_every_scale_layout(self, spec: Any, implementation: str) -> None:
        """R16: odd token counts, so that every instance needs its own padding; other axes than the first."""
        a, b = 2, 3
        s = [exact_states(5, seed=n) for n in range(a * b)]
        stacked = [np.stack(x).reshape(a, b, *x[0].shape) for x in zip(*s, strict=True)]
        stacked[1] = np.moveaxis(stacked[1], 1, 3)  # the inner axis of prefix_lse is its last
        counts = np.arange(a * b, dtype=np.int32).reshape(a, b)

        def merge(count: Any, *four: Any) -> Any:
            return merge_attn_states(
                *four, prefill_tokens_with_context=count, output_quant=spec, return_lse=True,
                implementation=implementation,
            )  # fmt: skip

        inner = jax.vmap(merge, in_axes=(0, 0, 2, 0, 0))
        result = jax.jit(jax.vmap(inner))(counts, *stacked)
        for i, j in itertools.product(range(a), range(b)):
            assert_bitwise_equal(at(result, i, j), merge(jnp.int32(counts[i, j]), *s[b * i + j]))

    def test_vmap_writes_no_loop(self) -> None:
        """R16."""
        s = [np.stack([x, x]) for x in states()]
        many = jax.vmap(lambda *four: merge_attn_states(*four, output_quant=GROUP_SPECS[-1]))
        assert "while" not in jax.jit(many).lower(*s).as_text()

    def test_vmap_over_no_instances(self) -> None:
        """R3."""
        empty = [np.zeros((0, *x.shape), x.dtype) for x in states()]
        out = jax.vmap(lambda *four: merge_attn_states(*four, output_quant=GROUP_SPECS[-1]))(*empty)
        assert out.values.shape == (0, T, H, D) and out.scales.shape == (0, 1, 12)

    def test_scan_over_chunks(self, implementation: str) -> None:
        """R16: the accumulation of a chunked prefill, as one scan."""
        s = [states(seed=n) for n in range(4)]
        outputs, lses = np.stack([x.prefix_output for x in s]), np.stack([x.prefix_lse for x in s])

        def step(carry: Any, chunk: Any) -> tuple[Any, None]:
            return merge_attn_states(*carry, *chunk, return_lse=True, implementation=implementation), None

        start = jnp.zeros((T, H, D)), jnp.full((H, T), -INF)
        result, _ = jax.jit(lambda *chunks: jax.lax.scan(step, start, chunks))(outputs, lses)
        looped = start
        for chunk in zip(outputs, lses, strict=True):
            looped, _ = step(looped, chunk)
        assert_rows_close(result[0], looped[0], worst=1e-6)
        assert_lse_close(result[1], looped[1])
        assert_rows_close(result[0], oracle.merge(outputs, lses)[0], worst=2e-6)

    def test_vmap_over_scan(self) -> None:
        """R16: a batch of accumulations, the merge folded inside the loop."""
        s = [[exact_states(seed=3 * b + n) for n in range(3)] for b in range(2)]
        outputs = np.stack([[x.prefix_output for x in row] for row in s])
        lses = np.stack([[x.prefix_lse for x in row] for row in s])

        def accumulate(outputs: Any, lses: Any) -> Any:
            def step(carry: Any, chunk: Any) -> tuple[Any, None]:
                return merge_attn_states(*carry, *chunk, return_lse=True), None

            return jax.lax.scan(step, (jnp.zeros((T, H, D)), jnp.full((H, T), -INF)), (outputs, lses))[0]

        many, one = jax.jit(jax.vmap(accumulate))(outputs, lses), jax.jit(accumulate)
        for b in range(2):
            assert_rows_close(at(many, b)[0], one(outputs[b], lses[b])[0], worst=1e-6)
            assert_lse_close(at(many, b)[1], one(outputs[b], lses[b])[1])

    def test_scan_of_quantised_results(self) -> None:
        s = [exact_states(seed=n) for n in range(3)]
        stacked = States(*(np.stack(x) for x in zip(*s, strict=True)))
        spec = GROUP_SPECS[-1]
        _, result = jax.lax.scan(lambda _, four: (None, merge_attn_states(*four, output_quant=spec)), None, stacked)
        for n in range(3):
            assert_bitwise_equal(at(result, n), merge_attn_states(*s[n], output_quant=spec))

    def test_remat(self) -> None:
        """R16: jax.checkpoint around a forward pass."""
        s = exact_states()
        run = lambda *four: merge_attn_states(*four, output_scale=0.05)
        assert_bitwise_equal(jax.jit(jax.checkpoint(run))(*s), run(*s))

    def test_donation(self) -> None:
        """Group 12: the output may take the prefix's memory, with the same bits."""
        s = exact_states()
        run = lambda *four: merge_attn_states(*four, return_lse=True)
        expected = run(*s)
        donated = jax.jit(run, donate_argnums=(0, 1))
        arguments = [jnp.array(x) for x in s]
        assert "tf.aliasing_output" in donated.lower(*arguments).as_text()
        assert_bitwise_equal(donated(*arguments), expected)
        assert arguments[0].is_deleted()

    @pytest.mark.parametrize("transform", ["grad", "jvp", "vjp", "remat", "vmap", "scale", "lse"])
    def test_no_derivative(self, transform: str, implementation: str) -> None:
        """R16: one clear error, whatever asks for a derivative."""
        s = States(*map(jnp.asarray, finite_states()))

        def loss(prefix: Any, lse: Any = s.prefix_lse, scale: Any = 0.5) -> jax.Array:
            out = merge_attn_states(prefix, lse, *s[2:], output_scale=scale, implementation=implementation)
            return out.dequantize().sum()

        p = s.prefix_output
        calls = {
            "grad": lambda: jax.grad(loss)(p),
            "jvp": lambda: jax.jvp(loss, (p,), (p,)),
            "vjp": lambda: jax.vjp(loss, p),
            "remat": lambda: jax.grad(jax.checkpoint(loss))(p),
            "vmap": lambda: jax.vmap(jax.grad(loss))(jnp.stack([p, p])),
            "scale": lambda: jax.grad(loss, argnums=2)(p, s.prefix_lse, 0.5),
            "lse": lambda: jax.grad(loss, argnums=1)(p, s.prefix_lse),
        }
        with pytest.raises(UnsupportedError, match="merge_attn_states has no derivative"):
            calls[transform]()

    def test_stop_gradient_is_the_way_around(self, implementation: str) -> None:
        s = States(*map(jnp.asarray, finite_states()))

        def loss(prefix: jax.Array) -> jax.Array:
            kept = merge_attn_states(jax.lax.stop_gradient(prefix), *s[1:], implementation=implementation)
            return (prefix * kept).sum()

        expected = merge_attn_states(*s, implementation=implementation)
        assert_rows_close(jax.grad(loss)(s.prefix_output), expected, worst=1e-6)

    @pytest.mark.parametrize(("implementation", "spec"), with_cases(GROUP_SPECS[-1], None))
    def test_export(self, spec: Any, implementation: str) -> None:
        """R16: for CPU and CUDA (a kernel: for CUDA alone), through bytes, and run here."""
        pytest.importorskip("flatbuffers", reason="jax.export serialises through flatbuffers")
        s = states()
        platforms = ("cpu", "cuda") if implementation in PORTABLE else ("cuda",)

        def merge(count: Any, *four: Any) -> Any:
            return merge_attn_states(
                *four, prefill_tokens_with_context=count, output_quant=spec, return_lse=True,
                implementation=implementation,
            )  # fmt: skip

        count = jnp.int32(4)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (count, *s))
        exported = jax.export.export(jax.jit(merge), platforms=platforms)(*shapes)
        loaded = jax.export.deserialize(exported.serialize())
        assert loaded.platforms == platforms
        assert_bitwise_equal(loaded.call(count, *s), jax.jit(merge)(count, *s))

    def test_float64_mode(self, implementation: str) -> None:
        """With x64 on, the reference computes in float64; results keep their types."""
        s = finite_states()
        with jax.enable_x64(True):
            out, lse = merge_attn_states(*s, return_lse=True, implementation=implementation)
            assert out.dtype == lse.dtype == jnp.float32
            expected, expected_lse = s.oracle()
            bound = 6e-8 if implementation == "reference" else 1e-6
            assert_relative_error(out, expected, bound)
            assert_lse_close(lse, expected_lse)
            assert_bitwise_equal(
                merge_attn_states(*s, prefill_tokens_with_context=jnp.int64(2**40), implementation=implementation), out
            )


class TestSharding:
    """R17: heads over eight devices."""

    @pytest.mark.parametrize("spec", [None, Fp8PerTensor(0.05), GROUP_SPECS[0], GROUP_SPECS[-1]])
    def test_shard_map_over_heads(self, spec: Any) -> None:
        """Bitwise as unsharded, scales packed per shard, no collective."""
        heads = 32
        mesh = Mesh(np.asarray(jax.devices()[:8]), "h")
        s = exact_states(5, heads)
        by_head, rows = P(None, "h"), P("h")
        out = by_head
        if isinstance(spec, Fp8PerTensor):
            out = Fp8Array(by_head, P(), spec.static(), 5)
        elif spec is not None:
            out = Fp8Array(by_head, by_head if spec.scale_layout == "row" else rows, spec, 5)

        def merge(count: Any, *four: Any) -> Any:
            return merge_attn_states(*four, prefill_tokens_with_context=count, output_quant=spec, return_lse=True)

        sharded = jax.jit(
            jax.shard_map(merge, mesh=mesh, in_specs=(P(), by_head, rows, by_head, rows), out_specs=(out, rows))
        )
        arrays = [
            jax.device_put(x, NamedSharding(mesh, sharding)) for x, sharding in zip(s, (by_head, rows) * 2, strict=True)
        ]
        count = jnp.int32(3)
        assert_bitwise_equal(sharded(count, *arrays), jax.jit(merge)(count, *s))
        text = sharded.lower(count, *arrays).compile().as_text()
        assert "all-gather" not in text and "all-reduce" not in text and "all-to-all" not in text

    @pytest.mark.parametrize("spec", [None, GROUP_SPECS[0]])
    def test_partitioned_by_the_compiler(self, spec: Any) -> None:
        """The same without shard_map: operands sharded over heads stay so."""
        mesh = Mesh(np.asarray(jax.devices()[:8]), "h")
        s = exact_states(5, 32)
        arrays = [
            jax.device_put(x, NamedSharding(mesh, sharding))
            for x, sharding in zip(s, (P(None, "h"), P("h")) * 2, strict=True)
        ]
        merge = jax.jit(lambda *four: merge_attn_states(*four, output_quant=spec))
        assert_bitwise_equal(merge(*arrays), merge(*s))
        assert "all-gather" not in merge.lower(*arrays).compile().as_text()


class TestMaskEmptyContextLse:
    """The finite lse that a backend may write for rows without context."""

    def test_rows_of_requests_without_context(self) -> None:
        """R3, R4: the tokens of requests 1 and 3; tokens of no request keep their lse."""
        lse = np.random.default_rng(0).standard_normal((H, 12)).astype(np.float32)
        masked = mask_empty_context_lse(lse, jnp.int32([0, 3, 5, 5, 9]), jnp.int32([0, 7, 7, 9, 9]))
        expected = lse.copy()
        expected[:, 3:5] = expected[:, 5:9] = -INF
        assert_bitwise_equal(masked, expected)

    @pytest.mark.parametrize(
        ("query", "context", "empty"),
        [
            ([0, 4, 8], [0, 0, 0], range(8)),
            ([0, 4, 8], [5, 5, 9], range(4)),
            ([-5, 4, 800], [0, 0, 1], range(4)),
            ([0, 6, 2, 8], [0, 1, 2, 2], range(6, 8)),
            ([0, 3, 6, 9], [0, 5, 3, 4], range(3, 9)),
            ([0, 4], [-9, -2], range(4)),
            ([0], [0], ()),
            ([2, 4], [0, 0], range(2, 4)),
            ([-(2**31), 2**31 - 1], [3, 3], range(12)),
        ],
    )
    def test_offsets(self, query: list[int], context: list[int], empty: Any) -> None:
        """R4: negative, decreasing and too large offsets as documented."""
        lse = np.random.default_rng(0).standard_normal((H, 12)).astype(np.float32)
        masked = jax.jit(mask_empty_context_lse)(lse, np.int32(query), np.int32(context))
        expected = lse.copy()
        expected[:, list(empty)] = -INF
        assert_bitwise_equal(masked, expected)

    def test_a_finite_lse_of_an_empty_row_is_repaired(self) -> None:
        """The bug it is for: a wrong finite lse would take a share of the result."""
        s = finite_states()
        query, context = jnp.int32([0, 4, T]), jnp.int32([0, 9, 9])
        wrong = merge_attn_states(*s)
        lse = mask_empty_context_lse(s.prefix_lse, query, context)
        right = merge_attn_states(s.prefix_output, lse, *s[2:])
        assert_bitwise_equal(right[4:], s.suffix_output[4:])
        assert_bitwise_equal(right[:4], wrong[:4])
        assert not np.array_equal(wrong[4:], right[4:])

    def test_vmap_and_one_trace(self) -> None:
        """R16."""
        lse = np.random.default_rng(0).standard_normal((4, H, 12)).astype(np.float32)
        query = np.int32([[0, 3, 12], [0, 0, 12], [0, 12, 12], [5, 6, 7]])
        context = np.int32([[0, 0, 1], [0, 1, 1], [0, 3, 3], [0, 0, 0]])
        traces = 0

        def mask(*arguments: Any) -> jax.Array:
            nonlocal traces
            traces += 1
            return mask_empty_context_lse(*arguments)

        many, one = jax.vmap(mask)(lse, query, context), jax.jit(mask)
        for n in range(4):
            assert_bitwise_equal(many[n], one(lse[n], query[n], context[n]))
        assert traces == 2
