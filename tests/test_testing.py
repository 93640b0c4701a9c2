"""The comparators: what they must reject, and what they must accept. A lenient comparator proves nothing."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_oracles as oracle
import pytest

from jax_fp8attn import Fp8PerGroup, Fp8PerTensor, quantize_fp8, testing

T, H, K, V, S = 6, 6, 24, 16, 40
BOUND = 6e-3  # the loosest element bound in use: bf16 compute


class Attention:
    """A dense attention in float64, with the mistakes that kernels make."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.q, self.k, self.v = (rng.standard_normal(shape) for shape in ((T, H, K), (S, H, K), (S, H, V)))
        self.sink = np.full(H, 2.0)

    def __call__(
        self, keys: int = S, width: int = K, uniform: bool = False, sink: bool = False, v_scale: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = np.einsum("thd,shd->hts", self.q[..., :width], self.k[:keys, :, :width]) * K**-0.5
        if uniform:
            scores = np.zeros_like(scores)
        power = np.exp(scores)
        total = power.sum(-1)
        share = power / (total + (np.exp(self.sink)[:, None] if sink else 0))[..., None]
        return np.einsum("hts,shd->thd", share, self.v[:keys] * v_scale), np.log(total)


attention = Attention()
OUT, LSE = attention()


class TestOutputs:
    """Row and tensor errors."""

    def test_accept_rounding(self) -> None:
        for dtype, bound in ((np.float32, 1e-6), (ml_dtypes.bfloat16, BOUND)):
            rounded = OUT.astype(dtype)
            error = testing.assert_rows_close(rounded, OUT, worst=bound, overall=bound)
            assert 0 < error <= bound
            assert 0 < testing.assert_relative_error(jnp.asarray(rounded), OUT, bound) <= bound
        assert testing.assert_rows_close(OUT, OUT, worst=0.0) == 0

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param(np.zeros_like(OUT), id="all-zero"),
            pytest.param(attention(uniform=True)[0], id="uniform-softmax"),
            pytest.param(attention(width=16)[0], id="dropped-rope-dims"),
            pytest.param(attention(keys=30)[0], id="ignored-extend-pool"),
            pytest.param(attention(sink=True)[0], id="sink-not-ignored"),
            pytest.param(attention(v_scale=1.02)[0], id="wrong-scale"),
            pytest.param(OUT.swapaxes(0, 1), id="heads-and-tokens-swapped"),
            pytest.param(OUT[:, ::-1], id="heads-reversed"),
            pytest.param(np.roll(OUT, 1, axis=0), id="shifted-by-a-token"),
            pytest.param(-OUT, id="sign"),
        ],
    )
    def test_reject_wrong_attention(self, wrong: np.ndarray) -> None:
        """R1: the negative controls of an attention op."""
        with pytest.raises(AssertionError):
            testing.assert_rows_close(wrong, OUT, worst=BOUND)
        with pytest.raises(AssertionError):
            testing.assert_relative_error(wrong, OUT, BOUND)

    def test_reject_zeros_where_the_output_is_tiny(self) -> None:
        """An absolute tolerance would let the output of a long row pass as zero."""
        tiny = OUT * 1e-6
        with pytest.raises(AssertionError, match="row"):
            testing.assert_rows_close(np.zeros_like(tiny), tiny, worst=0.5)
        testing.assert_rows_close(tiny * (1 + 1e-4), tiny, worst=2e-4)

    def test_one_bad_row_is_found_and_named(self) -> None:
        wrong = OUT.copy()
        wrong[3, 2] *= 1.05
        testing.assert_relative_error(wrong, OUT, 0.02)
        with pytest.raises(AssertionError, match=r"row \[3, 2\]"):
            testing.assert_rows_close(wrong, OUT, worst=0.02)

    def test_overall_bound(self) -> None:
        wrong = OUT * 1.01
        testing.assert_rows_close(wrong, OUT, worst=0.02)
        with pytest.raises(AssertionError, match="relative error"):
            testing.assert_rows_close(wrong, OUT, worst=0.02, overall=0.005)

    def test_rows_that_should_be_zero(self) -> None:
        expected = OUT.copy()
        expected[1] = 0
        testing.assert_rows_close(expected, expected, worst=0.0)
        wrong = expected.copy()
        wrong[1, 0, 0] = 0.1
        with pytest.raises(AssertionError, match=r"row \[1, 0\]"):
            testing.assert_rows_close(wrong, expected, worst=BOUND)

    def test_shapes_must_agree(self) -> None:
        for wrong in (OUT[:1], OUT[..., :1], OUT[None]):
            with pytest.raises(AssertionError, match="shape"):
                testing.assert_rows_close(wrong, OUT, worst=1e9)

    def test_empty_arrays(self) -> None:
        empty = np.zeros((0, H, V))
        assert testing.assert_rows_close(empty, empty, worst=0.0) == 0
        assert testing.assert_relative_error(empty, empty, 0.0) == 0

    def test_float64_survives(self) -> None:
        """Numbers beyond float32 are compared as they are."""
        big = np.array([[1e100, 1.0]])
        assert testing.as_float64(big)[0, 0] == 1e100
        with pytest.raises(AssertionError):
            testing.assert_relative_error(big * (1 + 1e-12), big, 1e-13)


class TestNonFinite:
    """R2: positions before tolerances."""

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_moved(self, value: float) -> None:
        expected, moved = OUT.copy(), OUT.copy()
        expected[2, 1, 3], moved[2, 1, 4] = value, value
        testing.assert_rows_close(expected, expected, worst=0.0)
        for compare in (
            lambda a, e: testing.assert_rows_close(a, e, worst=1e9),
            lambda a, e: testing.assert_relative_error(a, e, 1e9),
            lambda a, e: testing.assert_lse_close(a, e, atol=1e9),
            lambda a, e: testing.assert_within_emulated(a, e, e, factor=1e9, rounding=1e9),
            testing.assert_same_nonfinite,
        ):
            for actual in (moved, OUT, np.where(np.isnan(expected), np.inf, -expected)):
                with pytest.raises(AssertionError, match=r"positions differ|shape"):
                    compare(actual, expected)

    def test_the_first_position_is_named(self) -> None:
        expected, wrong = LSE.copy(), LSE.copy()
        wrong[1, 2] = -np.inf
        with pytest.raises(AssertionError, match=r"-inf positions differ at 1 of 36 places, first at \[1, 2\]"):
            testing.assert_lse_close(wrong, expected)

    def test_a_row_of_nan_hides_no_other_row(self) -> None:
        expected = OUT.copy()
        expected[0] = np.nan
        wrong = expected.copy()
        wrong[1] = 0
        with pytest.raises(AssertionError, match=r"row \[1, "):
            testing.assert_rows_close(wrong, expected, worst=BOUND)


class TestLse:
    def test_accept(self) -> None:
        expected = LSE.copy()
        expected[2, 3] = -np.inf
        assert testing.assert_lse_close(expected.astype(np.float32), expected) < 1e-5

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param(LSE.T, id="transposed"),
            pytest.param(LSE / np.log(2), id="base-2"),
            pytest.param(LSE * np.log(2), id="from-base-2"),
            pytest.param(np.zeros_like(LSE), id="zero"),
            pytest.param(attention(keys=39)[1], id="one-key-missing"),
            pytest.param(LSE - np.log(S), id="mean-for-sum"),
            pytest.param(LSE + 1e-4, id="offset"),
            pytest.param(np.where(np.arange(36).reshape(6, 6) == 7, -np.inf, LSE), id="minus-inf"),
            pytest.param(np.where(np.arange(36).reshape(6, 6) == 7, np.inf, LSE), id="plus-inf"),
        ],
    )
    def test_reject(self, wrong: np.ndarray) -> None:
        """R1, R3."""
        with pytest.raises(AssertionError):
            testing.assert_lse_close(wrong, LSE)

    def test_reject_finite_where_a_row_is_empty(self) -> None:
        """A backend that writes a finite lse for an empty row."""
        expected = LSE.copy()
        expected[:, 1] = -np.inf
        for finite in (LSE, np.where(np.isinf(expected), -1e30, expected), np.where(np.isinf(expected), 0, expected)):
            with pytest.raises(AssertionError, match="-inf positions"):
                testing.assert_lse_close(finite, expected)


class TestCodes:
    CODES = oracle.per_tensor(OUT, 0.01)

    def test_accept(self) -> None:
        assert testing.assert_codes_close(self.CODES, self.CODES) == 1.0
        near = self.CODES.copy()
        near[0, 0, 0] ^= 1
        assert 0.99 < testing.assert_codes_close(near, self.CODES) < 1
        as_type = self.CODES.view(ml_dtypes.float8_e4m3fn)
        assert testing.assert_codes_close(jnp.asarray(as_type), as_type) == 1.0

    def test_distance_in_codes(self) -> None:
        zeros, steps = [(0x00, 0x80, 0), (0x01, 0x81, 2)], [(0x38, 0x39, 1), (0x7E, 0xFE, 252)]
        nans = [(0x7E, 0x7F, 255), (0x7F, 0xFF, 0), (0xFF, 0x00, 255)]
        a, e, distance = np.array(zeros + steps + nans).T
        np.testing.assert_array_equal(testing.fp8_ulps(a.astype(np.uint8), e.astype(np.uint8)), distance)

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param(np.zeros_like(CODES), id="all-zero"),
            pytest.param(oracle.per_tensor(OUT, 0.0101), id="wrong-scale"),
            pytest.param(oracle.per_tensor(OUT, 0.02), id="half"),
            pytest.param(oracle.per_tensor(attention(uniform=True)[0], 0.01), id="uniform-softmax"),
            pytest.param(CODES ^ 0x80, id="sign"),
            pytest.param(CODES[::-1].copy(), id="tokens-reversed"),
            pytest.param(np.where(np.arange(CODES.size).reshape(CODES.shape) == 5, 0x7F, CODES), id="one-nan"),
        ],
    )
    def test_reject(self, wrong: np.ndarray) -> None:
        """R1."""
        with pytest.raises(AssertionError):
            testing.assert_codes_close(wrong.astype(np.uint8), self.CODES)

    def test_reject_many_small_differences(self) -> None:
        with pytest.raises(AssertionError, match="identical"):
            testing.assert_codes_close(self.CODES ^ 1, self.CODES)
        testing.assert_codes_close(self.CODES ^ 1, self.CODES, min_identical=0.0)

    def test_reject_what_is_no_code(self) -> None:
        with pytest.raises(AssertionError, match="codes are float32"):
            testing.assert_codes_close(OUT.astype(np.float32), self.CODES)
        with pytest.raises(AssertionError, match="shape"):
            testing.assert_codes_close(self.CODES[:1], self.CODES)

    def test_reject_swapped_and_shifted_scales(self) -> None:
        """R1: dequantised results notice scales of another group, of the neighbour tile, and of another tensor."""
        x = np.asarray(OUT * np.exp2(np.arange(H))[None, :, None], np.float32).reshape(T, -1)
        right = quantize_fp8(np.repeat(x, 2, axis=1), Fp8PerGroup(32))
        exact = testing.as_float64(np.repeat(x, 2, axis=1))
        testing.assert_rows_close(right.dequantize(), exact, worst=0.05)
        for scales in (right.scales[:, ::-1], jnp.roll(right.scales, 1, axis=1), jnp.roll(right.scales, 1, axis=0)):
            wrong = type(right)(right.values, scales, right.spec, right.num_tokens)
            with pytest.raises(AssertionError):
                testing.assert_rows_close(wrong.dequantize(), exact, worst=0.05)
        one, other = (quantize_fp8(x, Fp8PerTensor(scale)) for scale in (0.05, 0.06))
        swapped = type(one)(one.values, other.scales, one.spec, one.num_tokens)
        with pytest.raises(AssertionError):
            testing.assert_rows_close(swapped.dequantize(), exact[:, ::2], worst=0.05)


class TestMerging:
    def test_reject_swapped_sides_and_an_ignored_side(self) -> None:
        """R1: the negative controls of a merge."""
        outputs = np.stack([OUT, attention(keys=20)[0]])
        lses = np.stack([LSE, LSE[::-1] - 1])
        out, lse = oracle.merge(outputs, lses)
        testing.assert_rows_close(out.astype(np.float32), out, worst=1e-6)
        wrong = [
            oracle.merge(outputs, lses[::-1])[0],
            oracle.merge(outputs, lses.swapaxes(1, 2))[0],
            oracle.merge(outputs, lses, base=2)[0],
            *outputs,
            outputs.mean(axis=0),
            outputs.sum(axis=0),
        ]
        for other in wrong:
            with pytest.raises(AssertionError):
                testing.assert_rows_close(other, out, worst=BOUND)
        for other in (np.maximum(*lses), np.logaddexp(*lses) / np.log(2), lses.sum(axis=0)):
            with pytest.raises(AssertionError):
                testing.assert_lse_close(other, lse)


class TestEmulated:
    """The rule of twice the emulated reference's error."""

    def test_accept_and_reject(self) -> None:
        rng = np.random.default_rng(1)
        noise = rng.standard_normal(OUT.shape) * 0.01
        emulated = OUT + noise
        error = testing.assert_within_emulated(OUT + 1.9 * noise, emulated, OUT)
        assert error == pytest.approx(1.9 * testing.relative_error(emulated, OUT))
        testing.assert_within_emulated(OUT, emulated, OUT)
        for wrong in (OUT + 2.1 * noise, np.zeros_like(OUT), attention(uniform=True)[0]):
            with pytest.raises(AssertionError, match="emulated reference"):
                testing.assert_within_emulated(wrong, emulated, OUT)
        testing.assert_within_emulated(OUT + 2.1 * noise, emulated, OUT, rounding=0.01)

    def test_nan_in_the_emulated_reference_excuses_nothing(self) -> None:
        wrong = OUT.copy()
        wrong[0, 0, 0] = np.nan
        with pytest.raises(AssertionError, match="NaN positions"):
            testing.assert_within_emulated(wrong, wrong, OUT)


class TestBitwise:
    def test_accept(self) -> None:
        nan = np.float32([np.nan, -0.0, 1.0])
        tree = {"a": nan, "b": (np.int8(3), np.zeros((0, 2)))}
        testing.assert_bitwise_equal(tree, {"a": nan.copy(), "b": (np.int8(3), np.zeros((0, 2)))})
        testing.assert_bitwise_equal(jnp.asarray(nan), nan)

    @pytest.mark.parametrize(
        ("actual", "expected"),
        [
            (np.float32([0.0]), np.float32([-0.0])),
            (np.float32([1.0]), np.float32([np.nextafter(np.float32(1), np.float32(2))])),
            (np.float32([1.0]), np.float64([1.0])),
            (np.float32([1.0]), np.float32([[1.0]])),
            (np.uint32([0x7FC00000]).view(np.float32), np.uint32([0xFFC00000]).view(np.float32)),
            ((np.float32(1),), [np.float32(1)]),
            ((np.float32(1), None), (np.float32(1), np.float32(1))),
        ],
    )
    def test_reject(self, actual: Any, expected: Any) -> None:
        """R8."""
        with pytest.raises(AssertionError):
            testing.assert_bitwise_equal(actual, expected)

    def test_the_first_difference_is_named(self) -> None:
        a, e = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
        a[2, 1] = 5
        with pytest.raises(AssertionError, match=r"differs at 1 of 12 places, first at \[2, 1\]: 5.0 against 0.0"):
            testing.assert_bitwise_equal(a, e)

    def test_static_fields_count(self) -> None:
        x = np.ones((2, 32), np.float32)
        with pytest.raises(AssertionError, match="structure"):
            testing.assert_bitwise_equal(
                quantize_fp8(x, Fp8PerGroup(32, "ue8m0")), quantize_fp8(x, Fp8PerGroup(32, "float32"))
            )
