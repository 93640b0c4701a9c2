"""Rows of DeepSeek-V4 in FP8: quantiser, formats and their converters, against bytes written out by hand in numpy."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_fp8attn.errors import InvalidInputError
from jax_fp8attn.latent import (
    Fp8Latent,
    dequantize_latent,
    flashmla_page_bytes,
    from_flashmla_pages,
    pack_aiter,
    quantize_latent,
    to_flashmla_pages,
    unpack_aiter,
)
from jax_fp8attn.testing import assert_bitwise_equal

SCALE_DTYPES = ("float32", "uint8", "float8_e8m0fnu")
GROUPS = (64, 32)
DOCS = pathlib.Path(__file__).parents[1] / "docs"


quantize = jax.jit(quantize_latent, static_argnames=("group", "scale_dtype", "scale_floor"))
dequantize = jax.jit(dequantize_latent, static_argnums=1)
unpack = jax.jit(unpack_aiter, static_argnums=2, static_argnames="scale_dtype")
to_pages = jax.jit(to_flashmla_pages, static_argnums=1)
from_pages = jax.jit(from_flashmla_pages, static_argnums=1, static_argnames="scale_dtype")


def codes_of(latent: Fp8Latent) -> np.ndarray:
    return np.asarray(latent.nope).view(np.uint8)


def rope_bytes(latent: Fp8Latent) -> np.ndarray:
    return np.asarray(latent.rope).view(np.uint8)


def random_latent(rows: int, group: int = 64, scale_dtype: str = "uint8", seed: int = 0) -> Fp8Latent:
    """Any bytes that a producer may write: all codes but NaN, scale bytes 1..254."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 127, (rows, 448), dtype=np.uint8) | rng.integers(0, 2, (rows, 448), dtype=np.uint8) << 7
    rope = rng.standard_normal((rows, 64)).astype(ml_dtypes.bfloat16)
    scale = scales_from(rng.integers(1, 255, (rows, 448 // group), dtype=np.uint8), scale_dtype)
    return Fp8Latent(jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)), jnp.asarray(rope), scale)


def scales_from(byte: np.ndarray, scale_dtype: str) -> jax.Array:
    """E8M0 bytes as scales of a dtype, without the package."""
    if scale_dtype == "float32":
        return jnp.asarray(np.where(byte == 255, np.nan, np.exp2(byte - 127.0)).astype(np.float32))
    return jnp.asarray(byte.view(ml_dtypes.float8_e8m0fnu) if scale_dtype == "float8_e8m0fnu" else byte)


def scale_bytes(latent: Fp8Latent) -> np.ndarray:
    scale = np.asarray(latent.scale)
    if scale.dtype != np.float32:
        return scale.view(np.uint8)
    return (np.log2(scale) + 127).astype(np.uint8)


def exact_rows(latent: Fp8Latent) -> np.ndarray:
    """float64 rows from the bytes: the oracle of dequantisation."""
    codes = np.asarray(latent.nope).astype(np.float64)
    scale = np.asarray(latent.scale)
    if scale.dtype != np.float32:
        byte = scale.view(np.uint8).astype(np.int64)
        scale = np.where(byte == 255, np.nan, np.exp2(byte - 127.0))
    scale = np.repeat(scale.astype(np.float64), latent.group, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.concatenate([codes * scale, np.asarray(latent.rope).astype(np.float64)], axis=-1)


def expected_quantisation(x: np.ndarray, group: int, floor: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """Scale exponents and codes by the rule, in float64."""
    tiles = x[..., :448].astype(np.float64).reshape(*x.shape[:-1], -1, group)
    amax = np.abs(tiles).max(-1)
    exponent = np.ceil(np.log2(np.maximum(amax / 448, floor)))
    codes = (tiles / np.exp2(exponent)[..., None]).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return exponent, codes.view(np.uint8).reshape(*x.shape[:-1], 448)


@pytest.mark.parametrize("group", GROUPS)
def test_quantiser_follows_the_rule(group: int) -> None:
    """R1: scale = 2^ceil(log2(max(amax/448, 1e-4))) and e4m3(x / scale), over ten binades."""
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, 512)) * np.exp2(rng.integers(-20, 20, (64, 1)))).astype(np.float32)
    latent = quantize(jnp.asarray(x), group=group)
    exponent, codes = expected_quantisation(x, group)
    np.testing.assert_array_equal(np.log2(np.asarray(latent.scale, np.float64)), exponent)
    np.testing.assert_array_equal(codes_of(latent), codes)
    np.testing.assert_array_equal(np.asarray(latent.rope), x[:, 448:].astype(ml_dtypes.bfloat16))
    largest = np.abs(np.asarray(latent.nope).astype(np.float32)).reshape(64, -1, group).max(-1)
    above_floor = exponent > -13
    assert np.all((largest[above_floor] > 208) & (largest[above_floor] <= 448))


def test_quantiser_at_powers_of_two_and_at_the_floor() -> None:
    """R7: the step from one scale to the next, the smallest scale 2^-13, an all-zero tile."""
    peaks = np.array(
        [448, np.nextafter(np.float32(448), np.float32(999)), 224, 224.5, 448 * 2.0**-13, 1e-3, 0], np.float32
    )
    x = np.zeros((1, 512), np.float32)
    x[0, :448:64] = peaks
    latent = quantize(jnp.asarray(x))
    np.testing.assert_array_equal(np.asarray(latent.scale)[0], np.exp2([0, 1, -1, 0, -13, -13, -13]).astype(np.float32))
    assert not codes_of(latent)[0, 384:].any()
    small = quantize(jnp.asarray(x), scale_floor=1e-30)
    np.testing.assert_array_equal(np.asarray(small.scale)[0, :6], np.exp2([0, 1, -1, 0, -13, -18]).astype(np.float32))


def test_quantiser_and_non_finite_numbers() -> None:
    """R2, R7: NaN is code 0x7F, infinities saturate, the scale is that of the finite rest."""
    x = np.ones((3, 512), np.float32)
    x[0, 5], x[1, 5], x[2, 5] = np.nan, np.inf, -np.inf
    latent = quantize(jnp.asarray(x))
    assert [int(c) for c in codes_of(latent)[:, 5]] == [0x7F, 0x7E, 0xFE]
    np.testing.assert_array_equal(np.asarray(latent.scale), np.full((3, 7), 2.0**-8, np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_requantising_what_was_dequantised_changes_nothing(dtype: str) -> None:
    x = jnp.asarray(np.random.default_rng(2).standard_normal((16, 512)), dtype)
    latent = quantize(x)
    exact = dequantize(latent)
    assert_bitwise_equal(dequantize(quantize(exact)), exact)
    assert_bitwise_equal(np.asarray(dequantize(latent, jnp.bfloat16)).astype(np.float32), np.asarray(exact))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_code_times_every_scale_byte(group: int, scale_dtype: str) -> None:
    """R7: all 256 codes under all 256 bytes: byte 0 is 2^-127 and byte 255 NaN. Results below 2^-126 may be zero."""
    tiles = 448 // group
    byte = np.resize(np.arange(256, dtype=np.uint8), (256, tiles))
    byte = (byte + np.arange(tiles, dtype=np.uint8)[None] * 37).astype(np.uint8)
    byte[:, 0] = np.arange(256)
    codes = np.resize(np.arange(256, dtype=np.uint8), (256, 448))
    codes += np.arange(256, dtype=np.uint8)[:, None] + np.uint8(0x60)
    latent = Fp8Latent(
        jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn)),
        jnp.zeros((256, 64), jnp.bfloat16),
        scales_from(byte, scale_dtype),
    )
    with np.errstate(over="ignore"):
        expected = exact_rows(latent).astype(np.float32)
    subnormal = np.abs(expected) < 2.0**-126
    actual = np.asarray(dequantize(latent))
    np.testing.assert_array_equal(np.where(subnormal, 0, actual), np.where(subnormal, 0, expected))
    assert np.all((actual[subnormal] == 0) | (actual[subnormal] == expected[subnormal]))
    of_byte_0 = actual[0, :group][~subnormal[0, :group]]
    assert byte[0, 0] == 0 and of_byte_0.size > 16 and np.nanmin(np.abs(of_byte_0)) > 0


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_scale_dtypes_hold_the_same_bytes(scale_dtype: str) -> None:
    byte = np.arange(256, dtype=np.uint8)[:, None].repeat(7, axis=1)
    stored = dataclasses.replace(random_latent(256), scale=jnp.asarray(byte))
    converted = stored.with_scale_dtype(scale_dtype)
    assert_bitwise_equal(converted.scale, scales_from(byte, scale_dtype))
    assert converted.scale.dtype == jnp.dtype(scale_dtype)
    assert_bitwise_equal(converted.with_scale_dtype("uint8"), stored)
    assert_bitwise_equal(jax.jit(lambda x: x.with_scale_dtype(scale_dtype).with_scale_dtype("uint8"))(stored), stored)


@pytest.mark.parametrize("scale", [0.0, 3.0, -1.0, np.inf, 1.0000001, 2.0**-128])
def test_float_scales_that_e8m0_does_not_have(scale: float) -> None:
    """R7: an error on the host, NaN under jit; dequantisation takes them as they are."""
    scales = np.ones((4, 7), np.float32)
    scales[2, 3] = scale
    latent = dataclasses.replace(random_latent(4), scale=jnp.asarray(scales))
    for convert in (pack_aiter, lambda x: to_flashmla_pages(x, 2), lambda x: x.with_scale_dtype("uint8")):
        with pytest.raises(InvalidInputError, match=r"scale\[2, 3\]"):
            convert(latent)
    byte = np.asarray(jax.jit(lambda x: x.with_scale_dtype("uint8").scale)(latent))
    assert byte[2, 3] == 255
    assert np.delete(byte.ravel(), 17).tolist() == [127] * 27
    row = np.asarray(dequantize(latent))[2, 192:256]
    with np.errstate(invalid="ignore"):
        expected = (exact_rows(latent)[2, 192:256]).astype(np.float32)
    expected = np.where(np.abs(expected) < 2.0**-126, 0, expected)
    np.testing.assert_array_equal(np.where(np.abs(row) < 2.0**-126, 0, row), expected)


def test_widening_scale_groups() -> None:
    """64 -> 32 repeats; 32 -> 64 wants equal halves: an error on the host, NaN under jit."""
    latent = random_latent(6)
    wide = latent.with_group(32)
    np.testing.assert_array_equal(np.asarray(wide.scale), np.repeat(np.asarray(latent.scale), 2, axis=-1))
    assert_bitwise_equal(wide.with_group(64), latent)
    assert_bitwise_equal(dequantize(wide), dequantize(latent))
    torn_bytes = np.asarray(wide.scale).copy()
    torn_bytes[4, 5] = 1
    for scale_dtype in SCALE_DTYPES:
        torn = dataclasses.replace(wide, scale=scales_from(torn_bytes, scale_dtype))
        with pytest.raises(InvalidInputError, match=r"scale\[4, 2\] differs"):
            torn.with_group(64)
        byte = np.asarray(jax.jit(lambda x: x.with_group(64).with_scale_dtype("uint8").scale)(torn))
        assert byte[4, 2] == 255
        np.testing.assert_array_equal(np.delete(byte.ravel(), 30), np.delete(np.asarray(latent.scale).ravel(), 30))


def aiter_rows(latent: Fp8Latent) -> np.ndarray:
    """The packed rows, byte by byte."""
    scale = scale_bytes(latent)
    rows = np.zeros((len(scale), 512), np.uint8)
    rows[:, :448] = codes_of(latent)
    for t in range(7):
        rows[:, 448 + 2 * t] = scale[:, t] if latent.group == 64 else scale[:, 2 * t]
        rows[:, 449 + 2 * t] = scale[:, t] if latent.group == 64 else scale[:, 2 * t + 1]
    return rows


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_aiter_rows(group: int, scale_dtype: str) -> None:
    """Bytes as AITER has them, the way back, and padding that may hold anything (R6)."""
    latent = random_latent(9, group, scale_dtype)
    rows, rope = jax.jit(pack_aiter)(latent)
    np.testing.assert_array_equal(np.asarray(rows), aiter_rows(latent))
    assert_bitwise_equal(rope, latent.rope)
    dirty = np.asarray(rows).copy()
    dirty[:, 462:] = np.random.default_rng(3).integers(0, 256, (9, 50))
    for stored in (rows, jnp.asarray(dirty), jnp.asarray(dirty.view(ml_dtypes.float8_e4m3fn))):
        assert_bitwise_equal(unpack(stored, rope, group, scale_dtype=scale_dtype), latent)
        # a reader of scales per 32 reads both kinds
        assert_bitwise_equal(unpack(stored, rope, 32, scale_dtype=scale_dtype), latent.with_group(32))


def test_aiter_rows_per_32_are_no_rows_per_64() -> None:
    """One consumer read per-32 rows as per-64 ones (ROCm/aiter#5367); here that is an error."""
    rows, rope = pack_aiter(random_latent(9, 32))
    with pytest.raises(InvalidInputError, match="differs from its twin"):
        unpack_aiter(rows, rope, 64)


def flashmla_pages(latent: Fp8Latent, page_size: int, stride: int) -> np.ndarray:
    """The pages, address by address: row i at p*stride + 576*r, its scales at p*stride + 576*page_size + 8*r."""
    count = len(codes_of(latent))
    memory = np.zeros(-(-count // page_size) * stride, np.uint8)
    scale = scale_bytes(latent)
    for i in range(count):
        page, row = divmod(i, page_size)
        at = page * stride + 576 * row
        memory[at : at + 448] = codes_of(latent)[i]
        memory[at + 448 : at + 576] = rope_bytes(latent)[i]
        at = page * stride + 576 * page_size + 8 * row
        memory[at : at + 7] = scale[i]
    return memory.reshape(-1, stride)


@pytest.mark.parametrize(("page_size", "stride"), [(64, 37440), (256, 149760), (2, 1728), (61, 35712)])
def test_flashmla_pages(page_size: int, stride: int) -> None:
    """Bytes as FlashMLA has them, the way back, a last page that is not full, and garbage in the padding (R6)."""
    assert flashmla_page_bytes(page_size) == stride
    for count in (2 * page_size, page_size + 1):
        latent = random_latent(count, seed=page_size)
        pages = to_pages(latent, page_size)
        np.testing.assert_array_equal(np.asarray(pages), flashmla_pages(latent, page_size, stride))
        memory = np.asarray(pages).copy()
        memory[:, 584 * page_size :] = 0xAB
        for row in range(page_size):
            memory[:, 576 * page_size + 8 * row + 7] = 0xFF
        for scale_dtype in SCALE_DTYPES:
            back = from_pages(jnp.asarray(memory), page_size, scale_dtype=scale_dtype)
            assert back.shape == (2 * page_size, 512)
            expected = dataclasses.replace(latent, scale=scales_from(np.asarray(latent.scale), scale_dtype))
            assert_bitwise_equal(*(jax.tree.map(lambda x: np.asarray(x)[:count], y) for y in (back, expected)))
    wide = to_flashmla_pages(random_latent(5).with_group(32), page_size)
    np.testing.assert_array_equal(np.asarray(wide), flashmla_pages(random_latent(5), page_size, stride))


def documented_dumps() -> dict[str, np.ndarray]:
    """The dumps of docs/layouts*.md: lines of "offset: bytes xN", the first of a dump with its name before it."""
    dumps: dict[str, list[int]] = {}
    name = ""
    text = "\n".join(page.read_text() for page in sorted(DOCS.glob("layouts*.md")))
    for line in text.splitlines():
        found = re.match(r"(rows|rope|pages)? +(\d+): ((?:[0-9a-f]{2} ?)+)(?:x(\d+))?", line)
        if found:
            name = found[1] or name
            dump = dumps.setdefault(name, [])
            assert int(found[2]) == len(dump), line
            dump += [int(byte, 16) for byte in found[3].split()] * int(found[4] or 1)
    return {name: np.array(dump, np.uint8) for name, dump in dumps.items()}


def test_documented_bytes() -> None:
    """The dumps of docs/layouts are what the code writes."""
    x = np.zeros((1, 512), np.float32)
    for first, last, value in ((0, 64, 1), (64, 128, 448), (192, 256, -0.5), (256, 448, 1e-3), (448, 512, 1)):
        x[0, first:last] = value
    latent = quantize(jnp.asarray(x))
    rows, rope = pack_aiter(latent)
    dumps = documented_dumps()
    np.testing.assert_array_equal(np.asarray(rows)[0], dumps["rows"])
    np.testing.assert_array_equal(np.asarray(rope).view(np.uint8)[0], dumps["rope"])
    np.testing.assert_array_equal(np.asarray(to_flashmla_pages(latent, 2))[0], dumps["pages"])


def test_converters_take_leading_axes_and_jit() -> None:
    """R16: [2, 3] rows at once, under jit and vmap, equal one by one."""
    rows = random_latent(2 * 3 * 4)
    many = jax.tree.map(lambda x: x.reshape(2, 3, 4, -1), rows)

    def through(latent: Fp8Latent) -> tuple[Fp8Latent, ...]:
        packed = unpack_aiter(*pack_aiter(latent), scale_dtype=jnp.uint8)
        paged = from_flashmla_pages(to_flashmla_pages(latent, 2), 2, scale_dtype=jnp.uint8)
        again = quantize_latent(dequantize_latent(latent), scale_dtype=jnp.uint8)
        return packed, paged, again

    expected = jax.jit(through)(rows)
    for actual in (jax.jit(through)(many), jax.jit(jax.vmap(jax.vmap(through)))(many)):
        flat = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).reshape(24, -1)), actual)
        assert_bitwise_equal(flat[0], rows)
        assert_bitwise_equal(flat[1], rows)
        assert_bitwise_equal(flat[2], expected[2])
    one = jax.tree.map(lambda x: x[0], rows)
    assert one.shape == (512,)
    assert_bitwise_equal(unpack_aiter(*pack_aiter(one), scale_dtype=jnp.uint8), one)
    assert_bitwise_equal(one.dequantize(), rows.dequantize()[0])


def test_latent_is_a_frozen_pytree_that_can_be_exported() -> None:
    latent = random_latent(4, scale_dtype="float32")
    with pytest.raises(dataclasses.FrozenInstanceError):
        latent.scale = latent.scale  # type: ignore[misc]
    assert [x.shape for x in jax.tree.leaves(latent)] == [(4, 448), (4, 64), (4, 7)]
    assert latent.group == 64 and latent.shape == (4, 512)
    exported = jax.export.export(jax.jit(lambda x: x.with_group(32)))(latent)
    again = jax.export.deserialize(exported.serialize())
    assert_bitwise_equal(again.call(latent), latent.with_group(32))


def test_no_rows_at_all() -> None:
    """R3."""
    none = random_latent(0)
    assert none.dequantize().shape == (0, 512)
    assert pack_aiter(none)[0].shape == (0, 512)
    assert to_flashmla_pages(none, 4).shape == (0, 2880)
    assert quantize_latent(jnp.zeros((0, 512))).scale.shape == (0, 7)


def broken(**parts: jax.Array) -> Fp8Latent:
    return dataclasses.replace(random_latent(4), **parts)


BAD_INPUT = {
    "x no array": (lambda: quantize_latent([1.0] * 512), "x"),
    "x width": (lambda: quantize_latent(jnp.zeros((2, 511))), "x"),
    "x scalar": (lambda: quantize_latent(jnp.zeros(())), "x"),
    "x integers": (lambda: quantize_latent(jnp.zeros((2, 512), jnp.int32)), "x"),
    "group": (lambda: quantize_latent(jnp.zeros((2, 512)), 128), "group"),
    "group of another type": (lambda: quantize_latent(jnp.zeros((2, 512)), 64.0), "group"),
    "scale dtype": (lambda: quantize_latent(jnp.zeros((2, 512)), scale_dtype=jnp.bfloat16), "scale dtype"),
    "scale floor": (lambda: quantize_latent(jnp.zeros((2, 512)), scale_floor=0.0), "scale_floor"),
    "no latent": (lambda: dequantize_latent(jnp.zeros((2, 512))), "latent"),
    "target dtype": (lambda: random_latent(2).dequantize(jnp.int32), "dtype"),
    "nope dtype": (lambda: broken(nope=jnp.zeros((4, 448), jnp.float8_e4m3fnuz)).dequantize(), "latent.nope"),
    "nope width": (lambda: broken(nope=jnp.zeros((4, 512), jnp.float8_e4m3fn)).dequantize(), "latent.nope"),
    "rope rows": (lambda: broken(rope=jnp.zeros((5, 64), jnp.bfloat16)).dequantize(), "latent.rope"),
    "rope dtype": (lambda: broken(rope=jnp.zeros((4, 64), jnp.float16)).dequantize(), "latent.rope"),
    "scale width": (lambda: broken(scale=jnp.zeros((4, 8), jnp.uint8)).dequantize(), "latent.scale"),
    "scale of another dtype": (lambda: broken(scale=jnp.zeros((4, 7), jnp.bfloat16)).dequantize(), "latent.scale"),
    "scale no array": (lambda: pack_aiter(broken(scale=1.0)), "latent.scale"),
    "with_group": (lambda: random_latent(2).with_group(16), "group"),
    "with_scale_dtype": (lambda: random_latent(2).with_scale_dtype("int8"), "scale dtype"),
    "packed width": (lambda: unpack_aiter(jnp.zeros((4, 448), jnp.uint8), jnp.zeros((4, 64), jnp.bfloat16)), "rows"),
    "packed dtype": (lambda: unpack_aiter(jnp.zeros((4, 512), jnp.int8), jnp.zeros((4, 64), jnp.bfloat16)), "rows"),
    "packed rope": (lambda: unpack_aiter(jnp.zeros((4, 512), jnp.uint8), jnp.zeros((3, 64), jnp.bfloat16)), "rope"),
    "page size": (lambda: to_flashmla_pages(random_latent(4), 0), "page_size"),
    "page size no int": (lambda: from_flashmla_pages(jnp.zeros((1, 1728), jnp.uint8), 2.0), "page_size"),
    "page too short": (lambda: from_flashmla_pages(jnp.zeros((1, 1167), jnp.uint8), 2), "pages"),
    "page dtype": (lambda: from_flashmla_pages(jnp.zeros((1, 1728), jnp.int8), 2), "pages"),
    "no row axis": (lambda: to_flashmla_pages(jax.tree.map(lambda x: x[0], random_latent(1)), 2), "latent.nope"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    """R15."""
    call, argument = BAD_INPUT[case]
    with pytest.raises(InvalidInputError, match=rf"^\w+(\.\w+)?: {argument} is .*expected"):
        call()
