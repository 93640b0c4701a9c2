"""DeepSeek-V4 rows in FP8: 448 e4m3 codes with a power-of-two scale per tile, and 64 bf16 rotary numbers.

dequantised = stored * scale. ``docs/layouts.md`` shows every format byte by byte. Conversions are lossless, work under
jit and take any leading axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fp8attn import checks
from jax_fp8attn.quantize import E4M3, FP8_MAX, cast_fp8, round_up_to_power_of_two, ue8m0_value

WIDTH, NOPE, ROPE = 512, 448, 64
GROUPS = (64, 32)
SCALE_DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.uint8), jnp.dtype(jnp.float8_e8m0fnu))
SCALE_FLOOR = 1e-4  # the smallest scale is 2^-13

PACKED_BYTES, PACKED_SCALES = 512, 14
PAGE_ROW, PAGE_SCALES = NOPE + 2 * ROPE, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Latent:
    """Rows of 512 numbers, as a pytree of three arrays with the same leading axes.

    nope   float8_e4m3fn [..., 448]
    rope   bfloat16 [..., 64], not scaled
    scale  [..., 7] (one per 64 nope numbers) or [..., 14] (one per 32), powers of two: float32, or their E8M0 bytes
           as uint8 or float8_e8m0fnu. Byte b is 2^(b-127): byte 0 is 2^-127, byte 255 is NaN.

    Row = concat(nope * scale of its tile, rope). float32 scales are multipliers and used as they are.
    """

    nope: jax.Array
    rope: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised rows."""
        return (*self.nope.shape[:-1], WIDTH)

    @property
    def group(self) -> int:
        """Numbers that share a scale: 64 or 32."""
        return NOPE // self.scale.shape[-1]

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The rows as [..., 512]; see ``dequantize_latent``."""
        return dequantize_latent(self, dtype)

    def with_scale_dtype(self, dtype: Any) -> Fp8Latent:
        """The same rows with scales as float32, uint8 or float8_e8m0fnu.

        Lossless for powers of two from 2^-127 to 2^127 and for NaN. E8M0 has no other number: anything else raises
        ``InvalidInputError``, and under jit, where nothing can raise, becomes NaN.
        """
        op = "Fp8Latent.with_scale_dtype"
        dtype = _scale_dtype(op, dtype)
        if dtype == self.scale.dtype:
            return self
        return dataclasses.replace(self, scale=_stored(_e8m0_bytes(op, self.scale), dtype))

    def with_group(self, group: int) -> Fp8Latent:
        """The same rows with one scale per ``group`` (64 or 32) numbers.

        64 -> 32 repeats scales. 32 -> 64 keeps one of two, so both must be equal: otherwise ``InvalidInputError``, and
        under jit, where nothing can raise, a NaN scale for that tile.
        """
        op = "Fp8Latent.with_group"
        checks.option(op, "group", group, GROUPS)
        if group == self.group:
            return self
        return dataclasses.replace(self, scale=_one_of_two(op, self.scale) if group == 64 else _twice(self.scale))


jax.export.register_pytree_node_serialization(
    Fp8Latent,
    serialized_name="jax_fp8attn.Fp8Latent",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda text: (),
)


def quantize_latent(
    x: jax.Array, group: int = 64, *, scale_dtype: Any = jnp.float32, scale_floor: float = SCALE_FLOOR
) -> Fp8Latent:
    """Quantises rows x [..., 512] of any float dtype.

    Per tile of ``group`` (64 or 32) of the first 448 numbers: scale = the smallest power of two that is at least
    max(amax / 448, scale_floor), code = e4m3(x / scale). The last 64 numbers are cast to bf16.

    scale_dtype  float32, uint8 or float8_e8m0fnu
    scale_floor  1e-4 makes 2^-13 the smallest scale, as DeepSeek-V4, FlashMLA and ATOM have it;
                 1e-30 follows AITER's quantiser per 32 (but an all-zero tile keeps the smallest scale)

    NaN becomes code 0x7F, +-inf saturates, and neither touches the scale of its tile.
    """
    op = "quantize_latent"
    if not checks.is_array(x) or not x.ndim or x.shape[-1] != WIDTH or not jnp.issubdtype(x.dtype, jnp.floating):
        raise checks.invalid(op, "x", checks.describe(x), "a float array [..., 512]")
    checks.option(op, "group", group, GROUPS)
    scale_dtype = _scale_dtype(op, scale_dtype)
    if not (isinstance(scale_floor, float) and 0 < scale_floor < 1e38):
        raise checks.invalid(op, "scale_floor", repr(scale_floor), "a positive finite float")
    x = jnp.asarray(x)
    tiles = x[..., :NOPE].astype(jnp.float32).reshape(*x.shape[:-1], NOPE // group, group)
    amax = jnp.max(jnp.where(jnp.isfinite(tiles), jnp.abs(tiles), 0.0), axis=-1)
    scale = round_up_to_power_of_two(jnp.maximum(amax / FP8_MAX[E4M3], scale_floor))
    nope = cast_fp8(tiles / scale[..., None]).reshape(*x.shape[:-1], NOPE)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    stored = scale if scale_dtype == jnp.float32 else _stored((bits >> 23).astype(jnp.uint8), scale_dtype)
    return Fp8Latent(nope, x[..., NOPE:].astype(jnp.bfloat16), stored)


def dequantize_latent(latent: Fp8Latent, dtype: Any = jnp.float32) -> jax.Array:
    """Rows [..., 512] in ``dtype``.

    Exact in float32, and in bf16 as long as code * scale stays inside bf16's normal range. Where the platform flushes
    numbers below 2^-126 to zero, such products are zero.
    """
    op = "dequantize_latent"
    latent = check_latent(op, "latent", latent)
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise checks.invalid(op, "dtype", dtype.name, "bfloat16, float16, float32 or float64")
    lead = latent.nope.shape[:-1]
    exact = jnp.promote_types(dtype, jnp.float32)
    factor, rest = scale_factors(latent.scale)
    tiles = latent.nope.astype(exact).reshape(*lead, NOPE // latent.group, latent.group)
    nope = tiles * factor.astype(exact)[..., None] * rest.astype(exact)[..., None]
    return jnp.concatenate([nope.reshape(*lead, NOPE).astype(dtype), latent.rope.astype(dtype)], axis=-1)


def scale_factors(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two float32 factors whose product is the scale; neither is subnormal, because a CPU reads those as zero."""
    if scale.dtype != jnp.float32:
        byte = _bits(scale).astype(jnp.int32)
        return ue8m0_value(jnp.maximum(byte, 1)), jnp.where(byte == 0, 0.5, 1.0).astype(jnp.float32)
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    mantissa = (bits & 0x7FFFFF).astype(jnp.float32) * 2.0**-23
    subnormal = (bits & 0x7F800000) == 0
    factor = jnp.where(subnormal, jnp.where(bits < 0, -mantissa, mantissa), scale)
    return factor, jnp.where(subnormal, 2.0**-126, 1.0).astype(jnp.float32)


def pack_aiter(latent: Fp8Latent) -> tuple[jax.Array, jax.Array]:
    """The row of AITER's FP8 operations: (uint8 [..., 512], bf16 rope [..., 64]), one index for both.

    Bytes 0..447 are codes, 448..461 scales as E8M0 bytes (group 64: each of the 7 written twice; group 32: 14), the
    rest zeros. float32 scales must be powers of two; see ``Fp8Latent.with_scale_dtype``.
    """
    op = "pack_aiter"
    latent = check_latent(op, "latent", latent)
    scale = _e8m0_bytes(op, latent.scale)
    scale = scale if latent.group == 32 else _twice(scale)
    pad = jnp.zeros((*latent.shape[:-1], PACKED_BYTES - NOPE - PACKED_SCALES), jnp.uint8)
    return jnp.concatenate([lax.bitcast_convert_type(latent.nope, jnp.uint8), scale, pad], axis=-1), latent.rope


def unpack_aiter(rows: jax.Array, rope: jax.Array, group: int = 64, *, scale_dtype: Any = jnp.float32) -> Fp8Latent:
    """The inverse of ``pack_aiter``; the padding may hold anything.

    rows   uint8 or float8_e4m3fn [..., 512]
    rope   bf16 [..., 64]
    group  64: the two bytes of a scale must agree (``InvalidInputError``; under jit a NaN scale); 32: 14 scales
    scale_dtype  of the result: float32, uint8 or float8_e8m0fnu
    """
    op = "unpack_aiter"
    rows = checks.array(op, "rows", rows, (*_lead(rows), PACKED_BYTES), [jnp.uint8, jnp.float8_e4m3fn])
    rope = checks.array(op, "rope", rope, (*rows.shape[:-1], ROPE), [jnp.bfloat16])
    checks.option(op, "group", group, GROUPS)
    scale_dtype = _scale_dtype(op, scale_dtype)
    rows = lax.bitcast_convert_type(rows, jnp.uint8)
    scale = rows[..., NOPE : NOPE + PACKED_SCALES]
    scale = scale if group == 32 else _one_of_two(op, scale)
    return Fp8Latent(lax.bitcast_convert_type(rows[..., :NOPE], jnp.float8_e4m3fn), rope, _stored(scale, scale_dtype))


def flashmla_page_bytes(page_size: int) -> int:
    """Bytes of a FlashMLA DeepSeek-V4 page: 584 a token, rounded up to a multiple of 576."""
    return -(-page_size * (PAGE_ROW + PAGE_SCALES) // PAGE_ROW) * PAGE_ROW


def to_flashmla_pages(latent: Fp8Latent, page_size: int) -> jax.Array:
    """FlashMLA's DeepSeek-V4 cache: uint8 [..., ceil(P / page_size), flashmla_page_bytes(page_size)] of rows [..., P].

    A page holds page_size rows of 448 codes and 128 bytes of rope, then page_size times 7 E8M0 bytes and a zero, then
    zeros up to a multiple of 576 bytes. Row i lies in page i // page_size. Missing rows of the last page are zero.
    float32 scales must be powers of two, and scales per 32 equal in pairs (``Fp8Latent.with_group``).
    """
    op = "to_flashmla_pages"
    latent = check_latent(op, "latent", latent)
    if latent.nope.ndim < 2:
        raise checks.invalid(op, "latent.nope", checks.describe(latent.nope), "float8_e4m3fn [..., P, 448]")
    _check_page_size(op, page_size)
    *lead, rows, _ = latent.shape
    pages = -(-rows // page_size)
    scale = _e8m0_bytes(op, latent.scale)
    scale = scale if latent.group == 64 else _one_of_two(op, scale)
    rope = lax.bitcast_convert_type(latent.rope, jnp.uint8).reshape(*lead, rows, 2 * ROPE)
    body = jnp.concatenate([lax.bitcast_convert_type(latent.nope, jnp.uint8), rope], axis=-1)

    def paged(x: jax.Array, width: int) -> jax.Array:
        x = jnp.pad(x, [(0, 0)] * len(lead) + [(0, pages * page_size - rows), (0, width - x.shape[-1])])
        return x.reshape(*lead, pages, page_size * width)

    page = jnp.concatenate([paged(body, PAGE_ROW), paged(scale, PAGE_SCALES)], axis=-1)
    return jnp.pad(page, [(0, 0)] * (len(lead) + 1) + [(0, flashmla_page_bytes(page_size) - page.shape[-1])])


def from_flashmla_pages(pages: jax.Array, page_size: int, *, scale_dtype: Any = jnp.float32) -> Fp8Latent:
    """The inverse of ``to_flashmla_pages``: rows [..., pages * page_size], row r of page p at p * page_size + r.

    pages  uint8 [..., pages, bytes] with at least 584 * page_size bytes a page; bytes past those may hold anything.
    scale_dtype  of the result: float32, uint8 or float8_e8m0fnu
    """
    op = "from_flashmla_pages"
    _check_page_size(op, page_size)
    least = page_size * (PAGE_ROW + PAGE_SCALES)
    if not checks.is_array(pages) or pages.ndim < 2 or pages.dtype != jnp.uint8 or pages.shape[-1] < least:
        expected = f"uint8 [..., pages, bytes >= {least}]"
        raise checks.invalid(op, "pages", checks.describe(pages), expected, f"A page of {page_size} rows has {least}.")
    scale_dtype = _scale_dtype(op, scale_dtype)
    pages = jnp.asarray(pages)
    *lead, count, _ = pages.shape

    def part(first: int, width: int) -> jax.Array:
        return pages[..., first : first + page_size * width].reshape(*lead, count * page_size, width)

    body, scale = part(0, PAGE_ROW), part(page_size * PAGE_ROW, PAGE_SCALES)[..., : NOPE // 64]
    rope = body[..., NOPE:].reshape(*body.shape[:-1], ROPE, 2)
    return Fp8Latent(
        lax.bitcast_convert_type(body[..., :NOPE], jnp.float8_e4m3fn),
        lax.bitcast_convert_type(rope, jnp.bfloat16),
        _stored(scale, scale_dtype),
    )


def check_latent(op: str, argument: str, latent: Any, lead: Sequence[int | str] | None = None) -> Fp8Latent:
    """Refuses parts that do not belong together. ``lead``: the leading axes; a letter only fixes the rank."""
    if not isinstance(latent, Fp8Latent):
        raise checks.invalid(op, argument, checks.describe(latent), "an Fp8Latent", "Make one with quantize_latent.")
    lead = _lead(latent.nope) if lead is None else lead
    nope = checks.array(op, f"{argument}.nope", latent.nope, (*lead, NOPE), [jnp.float8_e4m3fn])
    lead = nope.shape[:-1]
    rope = checks.array(op, f"{argument}.rope", latent.rope, (*lead, ROPE), [jnp.bfloat16])
    scale = latent.scale
    fits = checks.is_array(scale) and scale.shape in [(*lead, NOPE // group) for group in GROUPS]
    if not fits or jnp.dtype(scale.dtype) not in SCALE_DTYPES:
        expected = f"float32, uint8 or float8_e8m0fnu [{', '.join(map(str, (*lead, '7 or 14')))}]"
        raise checks.invalid(op, f"{argument}.scale", checks.describe(scale), expected)
    return Fp8Latent(nope, rope, jnp.asarray(scale))


def _lead(x: Any) -> tuple[int | str, ...]:
    return x.shape[:-1] if checks.is_array(x) and x.ndim else ("...",)


def _check_page_size(op: str, page_size: Any) -> None:
    if not isinstance(page_size, int | np.integer) or isinstance(page_size, bool) or page_size < 1:
        raise checks.invalid(op, "page_size", repr(page_size), "an int of 1 or more, known while tracing")


def _scale_dtype(op: str, dtype: Any) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in SCALE_DTYPES:
        raise checks.invalid(op, "scale dtype", repr(dtype), "float32, uint8 or float8_e8m0fnu")
    return found


def _bits(scale: jax.Array) -> jax.Array:
    """float32 as int32, E8M0 as uint8: conversions of float8_e8m0fnu are avoided altogether."""
    return lax.bitcast_convert_type(scale, jnp.int32 if scale.dtype == jnp.float32 else jnp.uint8)


def _stored(byte: jax.Array, dtype: np.dtype) -> jax.Array:
    """E8M0 bytes as scales of ``dtype``."""
    return ue8m0_value(byte) if dtype == jnp.float32 else lax.bitcast_convert_type(byte, dtype)


def _e8m0_bytes(op: str, scale: jax.Array) -> jax.Array:
    """Scales of any dtype as uint8; a float32 that E8M0 does not have becomes NaN, or an error when it is concrete."""
    if scale.dtype != jnp.float32:
        return _bits(scale)
    bits = _bits(scale)
    exponent = bits >> 23
    byte = jnp.where(bits == 1 << 22, 0, jnp.where((bits & 0x7FFFFF == 0) & (exponent > 0), exponent, 255))
    if not isinstance(scale, jax.core.Tracer):
        lost = (byte == 255) & ~jnp.isnan(scale)
        checks.report(op, "scale", lost, "is no power of two from 2^-127 to 2^127, and E8M0 has nothing else")
    return byte.astype(jnp.uint8)


def _twice(scale: jax.Array) -> jax.Array:
    """Every scale written twice."""
    return lax.bitcast_convert_type(jnp.repeat(_bits(scale), 2, axis=-1), scale.dtype)


def _one_of_two(op: str, scale: jax.Array) -> jax.Array:
    """Every second scale; NaN where its twin differs, or an error when the scales are concrete."""
    bits = _bits(scale)
    first, second = bits[..., ::2], bits[..., 1::2]
    if not isinstance(scale, jax.core.Tracer):
        checks.report(op, "scale", first != second, "differs from its twin: a tile of 64 has one scale. Use group 32.")
    nan = 0x7FC00000 if scale.dtype == jnp.float32 else 255
    return lax.bitcast_convert_type(jnp.where(first == second, first, nan).astype(bits.dtype), scale.dtype)
