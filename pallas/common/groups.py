"""Scales of quantisation groups, inside a kernel."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_fp8attn.quantize import E4M3, FP8_MAX, Fp8PerGroup

SMALLEST_BYTE = 94  # 2^-33, the power of two above quantize.SCALE_FLOOR
FINITE = (1 << 24) - (1 << 31)  # the key of zero: 2 * bits + FINITE wraps to less for infinities and NaN alone


def finite_magnitude(x: Any) -> Any:
    """What counts for the scale of a group: only finite elements."""
    magnitude = jnp.abs(x)
    return jnp.where(magnitude < jnp.inf, magnitude, 0.0)


def largest_magnitude(x: Any) -> Any:
    """[rows, width] float32 to [rows]: the largest finite magnitude, 0 where there is none, by two operations an
    element. Doubled bits have no sign; an offset makes those of finite elements the largest int32."""
    key = lax.bitcast_convert_type(x, jnp.int32) * 2 + FINITE
    key = jnp.maximum(jnp.max(key, axis=1), FINITE)
    return lax.bitcast_convert_type(lax.shift_right_logical(key - FINITE, 1), jnp.float32)


def group_scale(amax: Any, spec: Fp8PerGroup) -> tuple[Any, Any, Any]:
    """(scale, its inverse, its UE8M0 byte or None) of groups with the largest magnitudes ``amax``."""
    amax = jnp.maximum(amax, spec.eps)
    if spec.scale_format == "ue8m0":
        byte = _ue8m0_byte_of_amax(amax)
        return _power_of_two(byte), _power_of_two(254 - byte), byte
    limit = FP8_MAX[E4M3]
    return amax / limit, limit / amax, None


def _ue8m0_byte_of_amax(amax: Any) -> Any:
    """Biased exponent of the smallest power of two >= amax / 448 = amax / (1.75 * 2^8), from the bits of amax."""
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    return jnp.maximum(byte, SMALLEST_BYTE)


def _power_of_two(byte: Any) -> Any:
    return lax.bitcast_convert_type(byte << 23, jnp.float32)
