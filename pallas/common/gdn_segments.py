"""Runs of chunks of long sequences, computed side by side by the gated-delta-net kernels."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax_fp8attn.pallas.common.gdn_chunks import CHUNK, Chunks


class Segments(NamedTuple):
    """R segments of a fixed number of chunks, counted from each sequence's first one; unused ones last. An empty
    sequence has one, without chunks."""

    first: jax.Array  # int32 [B]: number of each sequence's first segment
    count: jax.Array  # int32 [B]: segments of each sequence
    sequence: jax.Array  # int32 [R]
    done: jax.Array  # int32 [R]: chunks of the sequence before the segment
    chunks: jax.Array  # int32 [R]
    last: jax.Array  # bool [R]: the last one of its sequence
    there: jax.Array  # bool [R]: False for segments that no sequence has


def forgets_before(chunks: Chunks, segments: Segments, total: jax.Array, size: int) -> jax.Array:
    """int32 [R, H]: the last chunk of each segment before which nothing is left at its end, since the decay from there
    on, of ``total`` float32 [N, H], is 0 in float32; -1: all of it counts."""
    number = jnp.arange(size, dtype=jnp.int32)
    place = (chunks.first[segments.sequence] + segments.done)[:, None] + number
    own = total.T[:, jnp.minimum(place, total.shape[0] - 1)]  # [H, R, size]
    behind = (number >= number[:, None]) & (number < segments.chunks[:, None, None])  # [R, size, size]
    left = jnp.prod(jnp.where(behind, own[:, :, None], 1.0), axis=-1)  # [H, R, size]
    return jnp.max(jnp.where(left == 0, number, -1), axis=-1).T


def max_segments(tokens: int, sequences: int, size: int) -> int:
    """The most segments of ``size`` chunks that ``sequences`` ranges of ``tokens`` tokens can have."""
    return sequences + tokens // (CHUNK * size)


def segment_list(chunks: Chunks, tokens: int, size: int) -> Segments:
    """They depend on the lengths alone: a sequence's own are the same in every batch."""
    sequences = chunks.count.shape[0]
    count = jnp.maximum(1, -(-chunks.count // size))
    end = jnp.cumsum(count, dtype=jnp.int32)
    first = end - count
    number = jnp.arange(max_segments(tokens, sequences, size), dtype=jnp.int32)
    owner = jnp.minimum(jnp.sum(number[:, None] >= end, axis=1, dtype=jnp.int32), sequences - 1)
    part = number - first[owner]
    there = number < end[-1]
    done = part * size
    own = jnp.where(there, jnp.clip(chunks.count[owner] - done, 0, size), 0)
    return Segments(first, count, owner, done, own, there & (part == count[owner] - 1), there)
