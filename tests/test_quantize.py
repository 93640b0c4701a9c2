"""FP8 casts, scales, scale layouts and the Fp8Array pytree."""

import functools
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy_oracles as oracle
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fp8attn as fp8attn
from jax_fp8attn import quantize
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.quantize import E4M3, Fp8Array, Fp8PerGroup, Fp8PerTensor, quantize_fp8
from jax_fp8attn.testing import assert_bitwise_equal, assert_codes_close, fp8_bytes

LAYOUTS = ("row", "col", "col_tma", "col_tma_packed")
SPECS = [
    pytest.param(Fp8PerTensor(0.0625), id="static"),
    *(pytest.param(Fp8PerGroup(32, "float32", layout), id=f"float32-{layout}") for layout in LAYOUTS[:3]),
    *(pytest.param(Fp8PerGroup(32, "ue8m0", layout), id=f"ue8m0-{layout}") for layout in LAYOUTS),
]
TOKENS = (1, 2, 3, 4, 5, 31, 127, 253, 257)
FEW_SPECS = [SPECS[0], SPECS[3], SPECS[4], SPECS[-1]]
quantize_jit = jax.jit(quantize_fp8)
scales_2d = jax.jit(Fp8Array.scales_2d)
dequantize = jax.jit(Fp8Array.dequantize)
split_tokens = jax.jit(quantize.split_tokens, static_argnums=1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def hostile(*shape: int, seed: int = 0) -> np.ndarray:
    """Magnitudes over forty binades, zeros of both signs, and a few NaN and inf."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32) * np.exp2(rng.integers(-20, 20, shape)).astype(np.float32)
    kind = rng.integers(0, 200, shape)
    for value, number in ((np.nan, 0), (np.inf, 1), (-np.inf, 2), (0.0, 3), (-0.0, 4)):
        x[kind == number] = value
    return x


def one_group(value: float, spec: Fp8PerGroup) -> tuple[float, int]:
    """(scale, first code) of a group full of ``value``."""
    result = quantize_jit(jnp.full((1, spec.group_size), value, jnp.float32), spec)
    return float(scales_2d(result)[0, 0]), int(fp8_bytes(result.values)[0, 0])


def at(tree: Any, *index: int) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def exponent_bytes(scales: Any) -> np.ndarray:
    return np.asarray(scales).view(np.uint32) >> 23


class TestCast:
    """One clamp, one rounding."""

    @pytest.fixture(scope="class")
    @classmethod
    def values(cls) -> np.ndarray:
        codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        edges = [codes, (codes[1:] + codes[:-1]) / 2, np.float32([448, 449, 463.99997, 464, 464.00003, 465, 480, 1e9])]
        above = below = np.concatenate(edges)
        near = [above]
        for _ in range(4):
            above, below = np.nextafter(above, np.float32(np.inf)), np.nextafter(below, np.float32(0))
            near += [above, below]
        rng = np.random.default_rng(0)
        bits = rng.integers(0, 2**32, 700_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
        spread = rng.standard_normal(700_000) * np.exp2(rng.uniform(-12, 10, 700_000))
        positive = np.concatenate([*near, bits, spread.astype(np.float32), np.float32([np.nan, np.inf])])
        return np.concatenate([positive, -positive])

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_equals_ml_dtypes(self, values: np.ndarray, transform: Any) -> None:
        """R1, R2, R7: 2.8 million values, ties and their neighbours included, every code equal."""
        codes = fp8_bytes(transform(quantize.cast_fp8)(values))
        assert values.size > 1_000_000
        np.testing.assert_array_equal(codes, oracle.e4m3(values))

    def test_no_double_rounding_inside_a_fusion(self, values: np.ndarray) -> None:
        """A power-of-two scale before the cast changes no rounding."""
        values = values[np.isfinite(values)]
        codes = quantize_jit(values[:, None] * np.float32(0.125), Fp8PerTensor(0.125)).values
        np.testing.assert_array_equal(fp8_bytes(codes)[:, 0], oracle.e4m3(values * np.float32(0.125) * np.float32(8)))

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_every_half_precision_value(self, dtype: Any) -> None:
        values = np.arange(65536, dtype=np.uint16).view(dtype)
        codes = fp8_bytes(quantize_jit(values[None], Fp8PerTensor(1.0)).values)[0]
        np.testing.assert_array_equal(codes, oracle.e4m3(values.astype(np.float32)))

    def test_nan_is_always_0x7f(self) -> None:
        """R2, R7: negative NaN, payloads and 0*inf included."""
        bits = np.uint32([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF]).view(np.float32)
        assert set(fp8_bytes(quantize.cast_fp8(jnp.asarray(bits))).tolist()) == {0x7F}
        assert fp8_bytes(quantize_jit(jnp.zeros((1, 4)), Fp8PerTensor(0.0)).values).tolist() == [[0x7F] * 4]

    def test_fnuz_has_its_own_range(self, values: np.ndarray) -> None:
        """R7: e4m3fnuz ends at 240, its NaN is 0x80 and it has no -0."""
        codes = np.asarray(quantize_jit(values[None], Fp8PerTensor(1.0, jnp.float8_e4m3fnuz)).values).view(np.uint8)[0]
        with np.errstate(all="ignore"):
            expected = np.clip(values, -240, 240).astype(ml_dtypes.float8_e4m3fnuz).view(np.uint8)
        np.testing.assert_array_equal(codes, np.where(np.isnan(values), 0x80, expected))

    def test_float64_input(self) -> None:
        with jax.enable_x64(True):
            x = np.asarray([[1.0625, 1e300, -1e300, np.nan]], np.float64)
            assert fp8_bytes(quantize_fp8(x, Fp8PerTensor(1.0)).values).tolist() == [[0x38, 0x7E, 0xFE, 0x7F]]


class TestPerTensor:
    """Groups 15 and 16."""

    def test_golden_codes(self) -> None:
        """The static row of the golden table."""
        s = 0.05
        x = np.float32([s * 448, s * 449, s * 464, s * 465, 1e9, np.inf, -np.inf, np.nan, s * 2**-9, s * 2**-10, -0.0])
        expected = [0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0x01, 0x00, 0x80]
        for quantise in (quantize_fp8, quantize_jit):
            assert fp8_bytes(quantise(x[None], Fp8PerTensor(s)).values)[0].tolist() == expected

    @pytest.mark.parametrize("scale", [1.0, 2.0**-7, 2.0**9])
    def test_saturation_subnormals_and_ties(self, scale: float) -> None:
        units = [448, 449, 464, 465, 1e9, np.inf, -np.inf, 2**-9, 2**-10, 1.5 * 2**-9, -0.0, 17 / 16, 19 / 16, -17 / 16]
        expected = [0x7E] * 6 + [0xFE, 0x01, 0x00, 0x02, 0x80, 0x38, 0x3A, 0xB8]
        x = np.float32(units) * np.float32(scale)
        assert fp8_bytes(quantize_jit(x[None], Fp8PerTensor(scale)).values)[0].tolist() == expected

    def test_every_form_of_a_scale(self) -> None:
        x = normal(5, 32)
        pattern = quantize_fp8(x, Fp8PerTensor(0.0625))
        assert pattern.scales.shape == () and pattern.scales.dtype == jnp.float32
        half = jnp.bfloat16(0.0625)
        for scale in (jnp.float32(0.0625), jnp.full((1,), 0.0625), np.full((1, 1), 0.0625), np.float32(0.0625), half):
            assert_bitwise_equal(quantize_fp8(x, Fp8PerTensor(scale)), pattern)
        assert_bitwise_equal(jax.jit(lambda s: quantize_fp8(x, Fp8PerTensor(s)))(np.full((1, 1), 0.0625)), pattern)
        assert_bitwise_equal(quantize_fp8(x, Fp8PerTensor(1)), quantize_fp8(x, Fp8PerTensor(1.0)))

    @pytest.mark.parametrize("scale", [1e-30, 1e30, 2.0**-20, 0.05, 0.1, 1 / 3])
    @pytest.mark.parametrize("use", [0.05, 1.0, 4.0])
    def test_random_codes(self, scale: float, use: float) -> None:
        """R1: output that uses a part of the range, all of it, and more than all."""
        x = normal(64, 96, seed=1)
        x *= np.float32(scale * use * 448) / np.abs(x).max()
        assert_codes_close(quantize_jit(x, Fp8PerTensor(scale)).values, oracle.per_tensor(x, scale))

    @pytest.mark.parametrize(
        ("scale", "zero", "positive", "infinite"),
        [
            (0.0, {0x7F}, 0x7E, 0x7E),
            (1e-39, {0x7F}, 0x7E, 0x7E),
            (-0.5, {0x80}, 0xB8, 0xFE),
            (np.inf, {0x00}, 0x00, 0x7F),
            (np.nan, {0x7F}, 0x7F, 0x7F),
            (1e-30, {0x00}, 0x7E, 0x7E),
            (1e30, {0x00}, 0x00, 0x7E),
        ],
    )
    def test_hostile_scales(self, scale: float, zero: set[int], positive: int, infinite: int) -> None:
        """R7: the documented table; the sign of zero follows the sign of x."""
        x = jnp.asarray([[0.0, 0.5, -0.5, jnp.inf, -jnp.inf]])
        for quantise in (quantize_fp8, quantize_jit):
            codes = fp8_bytes(quantise(x, Fp8PerTensor(jnp.float32(scale))).values)[0].tolist()
            nan = 0x7F

            def mirrored(code: int) -> int:
                return nan if code == nan else code ^ 0x80

            assert codes[0] in zero
            assert codes[1:] == [positive, mirrored(positive), infinite, mirrored(infinite)]

    def test_dequantize(self) -> None:
        x = normal(7, 3, 16)
        result = quantize_fp8(x, Fp8PerTensor(0.05))
        expected = oracle.per_tensor(x, 0.05).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.05)
        np.testing.assert_array_equal(result.dequantize(), expected)
        assert result.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
        np.testing.assert_array_equal(scales_2d(result), np.full((1, 1), 0.05, np.float32))


class TestPerGroup:
    """Groups 19 to 21 and 24."""

    @pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
    @pytest.mark.parametrize(
        ("group", "heads", "width", "dtype"),
        [(128, 3, 128, jnp.float32), (64, 3, 128, jnp.bfloat16), (128, 2, 256, jnp.float16), (32, 5, 96, jnp.float32)],
    )
    def test_against_the_oracle(self, scale_format: str, group: int, heads: int, width: int, dtype: Any) -> None:
        """R1, R2: f32 scales within 1e-6, UE8M0 bytes exact, codes within one step and 99.5 % identical."""
        with np.errstate(over="ignore"):
            x = hostile(33, heads, width).astype(dtype)
        flat = x.reshape(33, -1)
        result = quantize_jit(x, Fp8PerGroup(group, scale_format))
        assert result.values.shape == x.shape and result.values.dtype == E4M3
        scales = oracle.group_scales(flat, group, scale_format)
        if scale_format == "ue8m0":
            np.testing.assert_array_equal(result.scales, scales)
        else:
            np.testing.assert_allclose(result.scales, scales, rtol=1e-6)
        assert_codes_close(result.flat, oracle.per_group(flat, scales))

    @pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
    def test_lossless_grid_is_bitwise(self, scale_format: str) -> None:
        """R1: values exact in e4m3 at power-of-two scales come back as the same codes."""
        rng = np.random.default_rng(3)
        sign = rng.integers(0, 2, (40, 8, 32)) << 7
        codes = (rng.integers(0, 0x7F, (40, 8, 32)) | sign).astype(np.uint8)
        codes[:, :, 5] = 0x7E
        scales = np.exp2(rng.integers(-20, 21, (40, 8, 1))).astype(np.float32)
        x = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales
        result = quantize_jit(x.reshape(40, 256), Fp8PerGroup(32, scale_format))
        np.testing.assert_array_equal(result.scales, scales[..., 0])
        np.testing.assert_array_equal(fp8_bytes(result.values).reshape(codes.shape), codes)
        np.testing.assert_array_equal(result.dequantize().reshape(x.shape), x)

    def test_golden_groups(self) -> None:
        """The group rows of the golden table."""
        f32, ue8m0 = Fp8PerGroup(128), Fp8PerGroup(128, "ue8m0")
        above = float(np.nextafter(np.float32(448), np.float32(1e9)))
        scale, code = one_group(672.0, f32)
        assert scale in (1.5, float(np.float32(1.5000001))) and code == 0x7E
        assert one_group(672.0, ue8m0) == (2.0, 0x7A)  # 336 lies between 320 and 352: the even code
        assert one_group(448.0, f32) == one_group(448.0, ue8m0) == (1.0, 0x7E)
        assert one_group(above, f32) == (float(np.float32(1.0000001)), 0x7E)
        assert one_group(above, ue8m0) == (2.0, 0x76)
        scale, code = one_group(1.0, f32)
        assert code == 0x7E and np.isclose(scale, 0.0022321430, rtol=1e-6)
        assert one_group(1.0, ue8m0) == (2.0**-8, 0x78)
        scale, code = one_group(0.0, f32)
        assert code == 0 and np.isclose(scale, 2.2321430e-13, rtol=1e-6)
        assert one_group(0.0, ue8m0) == (2.0**-33, 0)

    def test_zero_group_and_tiny_groups(self) -> None:
        """R7: byte 0x5E, and no 0/0; -0 keeps its sign."""
        x = np.zeros((4, 128), np.float32)
        x[1, 77], x[2, 5], x[3] = 1e-30, 1e-9, -0.0
        for scale_format in ("float32", "ue8m0"):
            result = quantize_jit(x, Fp8PerGroup(128, scale_format))
            codes = fp8_bytes(result.values)
            assert not codes[:2].any() and set(codes[3].tolist()) == {0x80}
            assert (np.delete(codes[2], 5) == 0).all()
            if scale_format == "ue8m0":
                assert exponent_bytes(result.scales)[:, 0].tolist() == [0x5E] * 4
                assert codes[2, 5] == oracle.e4m3(np.float32(1e-9) * np.float32(2**33))
            else:
                expected = np.float32([1e-10, 1e-10, 1e-9, 1e-10]) / 448
                np.testing.assert_allclose(result.scales[:, 0], expected, rtol=1e-6)
                assert codes[2, 5] == 0x7E

    def test_eps_is_the_smallest_amax(self) -> None:
        x = np.full((1, 128), 1e-3, np.float32)
        assert one_group(1e-3, Fp8PerGroup(128, eps=1.0))[0] == pytest.approx(1 / 448, rel=1e-6)
        scale, code = one_group(0.0, Fp8PerGroup(128, eps=1e-30))
        assert 0 < scale < 1e-32 and code == 0
        assert quantize_jit(x, Fp8PerGroup(128, "ue8m0", eps=448.0)).scales[0, 0] == 1.0

    def test_largest_element_in_every_position(self) -> None:
        x = normal(128, 128, seed=2) * np.float32(0.01)
        x[np.arange(128), np.arange(128)] = -np.exp2(np.arange(128) % 11).astype(np.float32)
        result = quantize_jit(x, Fp8PerGroup(128))
        np.testing.assert_allclose(result.scales[:, 0], np.exp2(np.arange(128) % 11) / 448, rtol=1e-6)
        assert (fp8_bytes(result.values)[np.arange(128), np.arange(128)] == 0xFE).all()

    def test_one_outlier_in_a_group(self) -> None:
        x = normal(3, 256)
        x[1, 200] = 1e6
        result = quantize_jit(x, Fp8PerGroup(128))
        scales = oracle.group_scales(x, 128, "float32")
        np.testing.assert_allclose(result.scales, scales, rtol=1e-6)
        assert result.scales[1, 1] > 1e3 * result.scales[1, 0]
        assert_codes_close(result.values, oracle.per_group(x, scales))

    def test_ue8m0_at_the_borders_of_every_binade(self) -> None:
        """Group 20: 448*2^k has byte 127+k and code 448; one float above it byte 128+k and code 224; below, as 448."""
        k = np.arange(-20, 21)
        exact = np.float32(448) * np.exp2(k).astype(np.float32)
        above, below = np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(0))
        x = np.repeat(np.stack([exact, above, below], 1).reshape(-1, 1), 32, axis=1)
        result = quantize_jit(x, Fp8PerGroup(32, "ue8m0"))
        byte = exponent_bytes(result.scales).reshape(-1, 3)
        np.testing.assert_array_equal(byte, 127 + k[:, None] + [0, 1, 0])
        assert (fp8_bytes(result.values)[:, 0].reshape(-1, 3) == [0x7E, 0x76, 0x7E]).all()

    def test_ue8m0_bytes_of_a_whole_binade(self) -> None:
        """Every float32 of the binade of 448 as largest element, and bf16's whole range: the byte is exact."""
        spec = Fp8PerGroup(32, "ue8m0")
        bits = np.arange(np.float32(256).view(np.uint32), np.float32(512).view(np.uint32), dtype=np.uint32)
        halves = np.arange(1, 0x7F80, dtype=np.uint32) << 16
        scales = jax.jit(lambda x: quantize.group_scales(x[:, None], spec))
        for amax in (bits.view(np.float32), halves.view(np.float32)):
            np.testing.assert_array_equal(exponent_bytes(scales(amax)), oracle.ue8m0_bytes(amax))

    def test_round_up_to_power_of_two(self) -> None:
        x = np.float32([1, 1.0000001, 0.99999994, 3, 4, 2**-126, 2**-126 * 1.5, 3e38, 2.0**127])
        expected = [1, 2, 1, 4, 4, 2**-126, 2**-125, 2.0**127, 2.0**127]
        np.testing.assert_array_equal(quantize.round_up_to_power_of_two(x), np.float32(expected))
        np.testing.assert_array_equal(
            quantize.ue8m0_value(jnp.asarray([1, 127, 254, 255])), np.float32([2**-126, 1, 2.0**127, np.nan])
        )

    @pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
    def test_nonfinite_elements_stay_alone(self, scale_format: str) -> None:
        """R2, R7: the scale comes from the finite elements, NaN is 0x7F, inf saturates, other groups are untouched."""
        clean = normal(6, 256, seed=5)
        dirty = clean.copy()
        dirty[0, 3], dirty[1, 4], dirty[2, 5], dirty[3, :128], dirty[4, :128] = np.nan, np.inf, -np.inf, np.nan, np.inf
        spec = Fp8PerGroup(128, scale_format)
        was, now = quantize_jit(clean, spec), quantize_jit(dirty, spec)
        np.testing.assert_allclose(now.scales, oracle.group_scales(dirty, 128, scale_format), rtol=1e-6)
        np.testing.assert_array_equal(now.scales[:, 1], was.scales[:, 1])
        np.testing.assert_array_equal(now.scales[:3], was.scales[:3])
        codes, pattern = fp8_bytes(now.values), fp8_bytes(was.values).copy()
        pattern[0, 3], pattern[1, 4], pattern[2, 5], pattern[3, :128], pattern[4, :128] = 0x7F, 0x7E, 0xFE, 0x7F, 0x7E
        np.testing.assert_array_equal(codes, pattern)
        assert (np.asarray(now.scales) > 0).all() and np.isfinite(now.scales).all()

    def test_nonfinite_elements_do_not_spill_into_the_packed_word(self) -> None:
        x = np.ones((1, 512), np.float32)
        x[0, 130], x[0, 300] = np.nan, np.inf
        words = np.asarray(quantize_jit(x, Fp8PerGroup.deepgemm_sm100()).scales).view(np.uint8)
        assert words[0, :4].tolist() == [127 - 8] * 4

    def test_extreme_magnitudes_keep_the_byte_in_range(self) -> None:
        """R7: bytes 1 to 254, also at the ends of float32."""
        big = np.float32(np.finfo(np.float32).max)
        x = np.stack([np.full(32, v, np.float32) for v in (big, -big, 1e-45, 2**-126, 448 * 2**-33, 449 * 2**-33)])
        byte = exponent_bytes(quantize_jit(x, Fp8PerGroup(32, "ue8m0")).scales)[:, 0]
        assert byte.tolist() == [247, 247, 94, 94, 94, 95]

    def test_group_and_head_order(self) -> None:
        """Distinct halves tell g = 64 from g = 128; magnitudes 2^h show a transposed scale."""
        heads = np.exp2(np.arange(4)).astype(np.float32)
        x = np.ones((3, 4, 128), np.float32) * heads[None, :, None]
        x[..., 64:] *= 64
        x *= np.exp2(-np.arange(3)).astype(np.float32)[:, None, None]
        per_token = np.exp2(-np.arange(3))[:, None]
        halves = quantize_jit(x, Fp8PerGroup(64, "ue8m0")).scales
        np.testing.assert_array_equal(halves, per_token * np.outer(heads, [2.0**-8, 2.0**-2]).reshape(1, 8))
        whole = quantize_jit(x, Fp8PerGroup(128, "ue8m0")).scales
        np.testing.assert_array_equal(whole, per_token * heads * 2.0**-2)
        wide = quantize_jit(x.reshape(3, 2, 256), Fp8PerGroup(128, "ue8m0"))
        np.testing.assert_array_equal(wide.scales, whole)

    @pytest.mark.parametrize("spec", FEW_SPECS[1:])
    def test_rows_of_two_calls_equal_one_call(self, spec: Fp8PerGroup) -> None:
        """Group 24, R8: a mixed batch, its rows quantised apart."""
        x = hostile(11, 4, 32)
        whole, decode, prefill = (quantize_jit(part, spec) for part in (x, x[:4], x[4:]))
        np.testing.assert_array_equal(
            fp8_bytes(whole.values), np.concatenate([fp8_bytes(decode.values), fp8_bytes(prefill.values)])
        )
        np.testing.assert_array_equal(scales_2d(whole), np.concatenate([scales_2d(decode), scales_2d(prefill)]))

    def test_eager_and_jit_agree(self) -> None:
        """R8: the same bits compiled and not, and twice."""
        x = hostile(64, 256)
        spec = Fp8PerGroup(32, "float32")
        assert_bitwise_equal(quantize_fp8(x, spec), quantize_jit(x, spec))
        assert_bitwise_equal(quantize_jit(x, spec), quantize_jit(x, spec))


class TestLayouts:
    """Groups 22 and 23."""

    def test_golden_words(self) -> None:
        """The packed words of s[t, j] = 2^(j-2+t), T = 3, G = 5."""
        scales = np.exp2(np.add.outer(np.arange(3), np.arange(5) - 2)).astype(np.float32)
        expected = [[0x807F7E7D, 0x81807F7E, 0x8281807F, 0], [0x81, 0x82, 0x83, 0]]
        words = np.asarray(fp8attn.pack_ue8m0(jnp.asarray(scales))).view(np.uint32)
        assert words.tolist() == expected
        spec = Fp8PerGroup.deepgemm_sm100()
        x = np.repeat(scales * 448, 128, axis=1)
        result = quantize_jit(x, spec)
        assert np.asarray(result.scales).view(np.uint32).tolist() == expected
        assert set(fp8_bytes(result.values).ravel().tolist()) == {0x7E}
        np.testing.assert_array_equal(fp8attn.unpack_ue8m0(result.scales, 3, 5), scales)

    @pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
    @pytest.mark.parametrize("tokens", TOKENS)
    def test_every_layout(self, tokens: int, part: int) -> None:
        """Exact shape, bytes and zero padding; scales_2d alike; packed equal to DeepGEMM's own form."""

        @jax.jit
        def buffers(scales: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
            result = {}
            for layout in LAYOUTS:
                spec = Fp8PerGroup(128, "ue8m0", layout)
                buffer = quantize.physical_scales(scales, spec)
                result[layout] = buffer, quantize.logical_scales(buffer, spec, *scales.shape)
            return result

        rng = np.random.default_rng(tokens)
        # every fourth pair of tokens and groups in each part
        for groups in (1, 2, 3, 5, 6, 16, 56, 128)[(part + TOKENS.index(tokens)) % 4 :: 4]:
            exponents = rng.integers(1, 255, (tokens, groups)).astype(np.uint32)
            scales = (exponents << np.uint32(23)).view(np.float32)
            shapes = {
                "row": (tokens, groups),
                "col": (groups, tokens),
                "col_tma": (groups, oracle.align4(tokens)),
                "col_tma_packed": (-(-groups // 4), oracle.align4(tokens)),
            }
            for layout, (buffer, logical) in buffers(scales).items():
                assert buffer.shape == shapes[layout] == Fp8PerGroup(128, "ue8m0", layout).scale_shape(tokens, groups)
                assert buffer.dtype == (jnp.int32 if layout == "col_tma_packed" else jnp.float32)
                assert_bitwise_equal(buffer, oracle.physical(scales, layout))
                assert_bitwise_equal(logical, scales)
                if layout == "col_tma_packed":
                    assert_bitwise_equal(buffer, oracle.deepgemm_packed(scales))

    @pytest.mark.parametrize("spec", SPECS[1:])
    def test_the_buffer_of_a_quantised_array(self, spec: Fp8PerGroup) -> None:
        """R6: padding is zero whatever the data, and one call leaves nothing behind for the next."""
        for seed in (0, 1):
            x = hostile(5, 2, 32, seed=seed)
            result = quantize_jit(x, spec)
            scales = np.asarray(quantize_jit(x, Fp8PerGroup(32, spec.scale_format)).scales)
            assert_bitwise_equal(result.scales, oracle.physical(scales, spec.scale_layout))
            assert_bitwise_equal(scales_2d(result), scales)
            if spec.scale_format == "ue8m0":
                assert not (scales.view(np.uint32) & 0x7FFFFF).any()

    def test_named_specs(self) -> None:
        assert Fp8PerGroup.deepgemm_sm90() == Fp8PerGroup(128, "float32", "col_tma")
        assert Fp8PerGroup.deepgemm_sm100() == Fp8PerGroup(128, "ue8m0", "col_tma_packed")
        assert Fp8PerGroup.row_major(64) == Fp8PerGroup(64, "float32", "row")
        assert hash(Fp8PerGroup()) == hash(Fp8PerGroup()) and Fp8PerGroup() != Fp8PerGroup(64)

    def test_deepgemm_layout_step(self) -> None:
        scales = normal(5, 3)
        assert_bitwise_equal(fp8attn.to_mn_major_tma_aligned(jnp.asarray(scales)), oracle.physical(scales, "col_tma"))

    @pytest.mark.parametrize(
        "call",
        [
            lambda: fp8attn.pack_ue8m0(jnp.ones(4)),
            lambda: fp8attn.pack_ue8m0(jnp.ones((4, 4), jnp.bfloat16)),
            lambda: fp8attn.pack_ue8m0([[1.0]]),
            lambda: fp8attn.unpack_ue8m0(jnp.ones((1, 4)), 4, 4),
            lambda: fp8attn.unpack_ue8m0(jnp.ones((1, 4), jnp.int32), 5, 4),
            lambda: fp8attn.unpack_ue8m0(jnp.ones((1, 4), jnp.int32), 4, 5),
            lambda: fp8attn.to_mn_major_tma_aligned(jnp.ones((2, 2), jnp.int32)),
        ],
    )
    def test_wrong_buffers_are_refused(self, call: Any) -> None:
        """R15."""
        with pytest.raises(InvalidInputError, match="expected"):
            call()


class TestEmpty:
    """R3."""

    @pytest.mark.parametrize("spec", FEW_SPECS)
    @pytest.mark.parametrize("shape", [(0, 2, 32), (3, 0, 32), (0, 64), (5, 0)])
    def test_no_tokens_or_no_heads(self, spec: Any, shape: tuple[int, ...]) -> None:
        result = quantize_jit(np.zeros(shape, np.float32), spec)
        groups = int(np.prod(shape[1:])) // 32
        assert result.values.shape == dequantize(result).shape == shape
        assert result.flat.shape == (shape[0], int(np.prod(shape[1:])))
        if isinstance(spec, Fp8PerGroup):
            assert result.scales.shape == spec.scale_shape(shape[0], groups)
            assert scales_2d(result).shape == (shape[0], groups)
        if shape[0] == 0:
            parts = split_tokens(result, 3)
            assert parts.values.shape == (3, *shape) and dequantize(parts).shape == (3, *shape)


class TestPytree:
    """Group 27: Fp8Array under JAX's transformations."""

    @pytest.mark.parametrize("spec", FEW_SPECS)
    def test_round_trip_through_transformations(self, spec: Any) -> None:
        """R16: tree.map, jit arguments, checkpoint and eval_shape keep the structure."""
        x = hostile(6, 2, 64)
        result = quantize_jit(x, spec)
        assert_bitwise_equal(jax.tree.map(lambda leaf: leaf, result), result)
        assert_bitwise_equal(jax.jit(lambda array: array)(result), result)
        assert_bitwise_equal(jax.checkpoint(lambda x: quantize_fp8(x, spec))(x), result)
        shapes = jax.eval_shape(lambda x: quantize_fp8(x, spec), jax.ShapeDtypeStruct(x.shape, x.dtype))
        assert jax.tree.structure(shapes) == jax.tree.structure(result)
        assert shapes.shape == x.shape and shapes.dtype == E4M3 and shapes.width == 128
        assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(result)]
        np.testing.assert_array_equal(dequantize(result), result.dequantize())

    @pytest.mark.parametrize("spec", FEW_SPECS)
    def test_vmap_equals_a_loop(self, spec: Any) -> None:
        """R16: every instance has its own scales and its own padding; nested as well."""
        x = hostile(2, 3, 5, 2, 32)
        nested = jax.jit(jax.vmap(jax.vmap(lambda x: quantize_fp8(x, spec))))(x)
        for a in range(2):
            for b in range(3):
                one = quantize_jit(x[a, b], spec)
                assert_bitwise_equal(at(nested, a, b), one)
        np.testing.assert_array_equal(dequantize(nested)[1, 2], dequantize(quantize_jit(x[1, 2], spec)))
        assert nested.flat.shape == (2, 3, 5, 64)
        unmapped = jax.vmap(lambda array: array.dequantize())(at(nested, 0))
        np.testing.assert_array_equal(unmapped, dequantize(nested)[0])

    def test_vmap_over_scales(self) -> None:
        x, scales = normal(4, 32), jnp.asarray([0.5, 1.0, 2.0])
        result = jax.vmap(lambda s: quantize_fp8(x, Fp8PerTensor(s)))(scales)
        batched_spec = jax.vmap(lambda spec: quantize_fp8(x, spec))(Fp8PerTensor(scales))
        for n in range(3):
            one = quantize_fp8(x, Fp8PerTensor(scales[n]))
            assert_bitwise_equal(at(result, n), one)
            assert_bitwise_equal(at(batched_spec, n), one)

    @pytest.mark.parametrize("spec", [SPECS[0], SPECS[-1]])
    def test_scan_stacks_and_carries(self, spec: Any) -> None:
        x = hostile(3, 5, 2, 32)
        first = quantize_jit(x[0], spec)

        def step(carry: Fp8Array, x: jax.Array) -> tuple[Fp8Array, Fp8Array]:
            return quantize_fp8(x, spec), carry

        last, stacked = jax.lax.scan(step, first, x)
        assert_bitwise_equal(last, quantize_jit(x[2], spec))
        assert_bitwise_equal(at(stacked, 2), quantize_jit(x[1], spec))
        np.testing.assert_array_equal(dequantize(stacked)[1], dequantize(quantize_jit(x[0], spec)))

    def test_donation(self) -> None:
        """An Fp8Array given away comes back bit for bit, in the same buffers."""
        result = quantize_jit(normal(8, 128), Fp8PerGroup.deepgemm_sm100())
        copy = jax.tree.map(jnp.array, result)
        flipped = jax.jit(lambda array: jax.tree.map(lambda leaf: leaf, array), donate_argnums=0)(copy)
        assert_bitwise_equal(flipped, result)

    @pytest.mark.parametrize(("spec", "tokens"), [*((spec.values[0], 5) for spec in SPECS), (SPECS[-1].values[0], 4)])
    def test_split_tokens(self, spec: Any, tokens: int) -> None:
        x = hostile(3 * tokens, 2, 32)
        parts = split_tokens(quantize_jit(x, spec), 3)
        for n in range(3):
            one = quantize_jit(x[n * tokens : (n + 1) * tokens], spec)
            assert_bitwise_equal(at(parts, n), one)

    def test_split_tokens_of_nested_folds(self) -> None:
        """One scale an instance: two folds of 2 and 3."""
        x, scales = normal(12, 32), jnp.arange(1.0, 7.0)
        folded = quantize.quantize_per_tensor(jnp.asarray(x), Fp8PerTensor(scales))
        outer = split_tokens(folded, 2)
        inner = jax.vmap(lambda part: split_tokens(part, 3))(outer)
        assert inner.scales.shape == (2, 3) and inner.values.shape == (2, 3, 2, 32)
        for a in range(2):
            for b in range(3):
                n = 3 * a + b
                one = quantize_fp8(x[2 * n : 2 * n + 2], Fp8PerTensor(scales[n]))
                assert_bitwise_equal(at(inner, a, b), one)

    def test_batched_values(self) -> None:
        """values [B, T, H, D] with their tokens counted as B*T."""
        x = hostile(6, 2, 64)
        result = quantize_jit(x, SPECS[-1].values[0])
        batched = Fp8Array(result.values.reshape(2, 3, 2, 64), result.scales, result.spec, 6)
        np.testing.assert_array_equal(fp8_bytes(batched.flat), fp8_bytes(result.flat))
        np.testing.assert_array_equal(scales_2d(batched), scales_2d(result))
        np.testing.assert_array_equal(dequantize(batched).reshape(x.shape), dequantize(result))

    def test_one_trace_for_all_scales(self) -> None:
        """R16."""
        traces = 0

        @jax.jit
        def f(x: jax.Array, spec: Fp8PerTensor) -> Fp8Array:
            nonlocal traces
            traces += 1
            return quantize_fp8(x, spec)

        for scale in (0.5, 1.0, 1e-30, 0.0):
            f(jnp.ones((2, 4)), Fp8PerTensor(jnp.float32(scale)))
        assert traces == 1

    def test_inputs_are_untouched(self) -> None:
        """R19."""
        x = hostile(4, 128)
        copy = x.copy()
        quantize_fp8(x, Fp8PerGroup())
        assert_bitwise_equal(x, copy)

    @pytest.mark.parametrize("spec", [SPECS[0], SPECS[1]])
    def test_no_derivative(self, spec: Any) -> None:
        """R16: grad, jvp and vjp raise one clear error; stop_gradient is the way around it."""

        def loss(x: jax.Array) -> jax.Array:
            return quantize_fp8(x, spec).dequantize().sum()

        x = jnp.ones((2, 32))
        for differentiate in (jax.grad(loss), lambda x: jax.jvp(loss, (x,), (x,)), jax.grad(jax.checkpoint(loss))):
            with pytest.raises(UnsupportedError, match="quantize_fp8 has no derivative"):
                differentiate(x)
        with pytest.raises(UnsupportedError, match="quantize_fp8 has no derivative"):
            jax.grad(lambda s: quantize_fp8(x, Fp8PerTensor(s)).dequantize().sum())(1.0)
        assert jax.grad(lambda x: x.sum() + loss(jax.lax.stop_gradient(x)))(x).sum() == 64

    def test_to_qarray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A qwix array of [T, H*D] codes and row-major scales, whatever the layout."""
        result = quantize_jit(hostile(5, 128), Fp8PerGroup.deepgemm_sm100())
        monkeypatch.setitem(sys.modules, "qwix", None)
        with pytest.raises(ImportError, match="pip install qwix"):
            result.to_qarray()
        monkeypatch.setitem(sys.modules, "qwix", types.SimpleNamespace(QArray=lambda **fields: fields))
        fields = result.to_qarray()
        assert fields["qvalue"].shape == (5, 128) and fields["scale"].shape == (5, 1)
        assert fields["qtype"] == E4M3 and fields["zero_point"] is None


class TestExport:
    """R16."""

    @pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[-1]])
    def test_export_for_cpu_and_cuda(self, spec: Any) -> None:
        pytest.importorskip("flatbuffers", reason="jax.export serialises through flatbuffers")
        x = hostile(6, 2, 64)
        arguments = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
        exported = jax.export.export(quantize_jit, platforms=("cpu", "cuda"))(*arguments, _shapes(spec))
        loaded = jax.export.deserialize(exported.serialize())
        assert_bitwise_equal(loaded.call(x, spec), quantize_jit(x, spec))

    def test_an_fp8_array_as_argument(self) -> None:
        pytest.importorskip("flatbuffers", reason="jax.export serialises through flatbuffers")
        array = quantize_jit(hostile(6, 2, 64), SPECS[-1].values[0])
        exported = jax.export.export(jax.jit(Fp8Array.dequantize))(array)
        assert_bitwise_equal(jax.export.deserialize(exported.serialize()).call(array), array.dequantize())


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32), tree)


class TestSharding:
    """R17: heads over eight devices, scales made and packed per shard."""

    @pytest.mark.parametrize(
        ("layout", "heads"), [("row", 16), ("col_tma", 16), ("col_tma_packed", 16), ("col_tma_packed", 32)]
    )
    def test_shard_map_over_heads(self, heads: int, layout: str) -> None:
        devices = np.asarray(jax.devices()[:8])
        assert devices.size == 8
        mesh = Mesh(devices, "h")
        spec = Fp8PerGroup(32, "ue8m0", layout)
        x = jax.device_put(hostile(5, heads, 32), NamedSharding(mesh, P(None, "h")))
        specs = Fp8Array(P(None, "h"), P(None, "h") if layout == "row" else P("h"), spec, 5)
        sharded = jax.jit(
            jax.shard_map(functools.partial(quantize_fp8, spec=spec), mesh=mesh, in_specs=P(None, "h"), out_specs=specs)
        )
        result = sharded(x)
        parts = [quantize_jit(np.asarray(part), spec) for part in np.split(np.asarray(x), 8, axis=1)]
        axis = 1 if layout == "row" else 0
        assert_bitwise_equal(result.scales, np.concatenate([part.scales for part in parts], axis))
        whole = quantize_jit(np.asarray(x), spec)
        assert_bitwise_equal(result.values, whole.values)
        if layout != "col_tma_packed" or heads % 32 == 0:
            assert_bitwise_equal(result.scales, whole.scales)
        text = sharded.lower(x).compile().as_text()
        assert "all-gather" not in text and "all-reduce" not in text
