"""Offsets that a request may have sent, made harmless the same way in every op and backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def monotone(offsets: jax.Array, total: int) -> jax.Array:
    """Clamps offsets to [0, total] and replaces each by the running maximum: a decrease becomes an empty range."""
    offsets = jnp.clip(offsets, 0, total).astype(jnp.int32)
    return lax.cummax(offsets, axis=0) if offsets.shape[0] else offsets


def ranges(offsets: jax.Array, total: int) -> tuple[jax.Array, jax.Array]:
    """(start, length) of the B disjoint, ascending ranges behind B+1 offsets."""
    offsets = monotone(offsets, total)
    return offsets[:-1], offsets[1:] - offsets[:-1]


def owner(start: jax.Array, length: jax.Array, total: int) -> jax.Array:
    """int32 [total]: the range that owns each position; -1 for positions of no range."""
    position = jnp.arange(total, dtype=jnp.int32)
    if not start.shape[0]:
        return jnp.full(total, -1, jnp.int32)
    index = jnp.searchsorted(start, position, side="right").astype(jnp.int32) - 1
    safe = jnp.maximum(index, 0)
    inside = (index >= 0) & (position < start[safe] + length[safe])
    return jnp.where(inside, safe, -1)
