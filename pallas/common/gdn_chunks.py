"""The chunks of sequences, and what one kernel of ``gdn_prefill`` makes of them for the other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens


class Chunks(NamedTuple):
    """Chunks of 64 tokens, counted from each sequence's first token: made on the device, so that lengths may change
    without a retrace. N = T // 64 + B."""

    first: jax.Array  # int32 [B]: number of each sequence's first chunk
    count: jax.Array  # int32 [B]: chunks of each sequence
    token: jax.Array  # int32 [N]: first token of each chunk in the packed arrays
    valid: jax.Array  # int32 [N]: tokens of each chunk, 1 to 64; 0 for chunks that no sequence has


class Prepared(NamedTuple):
    """Of N chunks and H state heads; rows behind a chunk's tokens are zero."""

    w: jax.Array  # bfloat16 [N, H, 64, 128]
    u: jax.Array  # bfloat16 [N, H, 64, 128]
    p: jax.Array  # bfloat16 [N, H, 64, 64]: masked, decayed scores; their scale and the norms are in them
    q: jax.Array  # bfloat16 [N, Hq, 64, 128]: as given
    k: jax.Array  # bfloat16 [N, Hk, 64, 128]: as given
    rows: jax.Array  # float32 [N, H, 2, 64]: factors of rows of q S, and of the new values in the state
    total: jax.Array  # float32 [N, H]: decay of the state over the chunk; 1 for chunks that no sequence has


def chunk_list(start: jax.Array, length: jax.Array, tokens: int) -> Chunks:
    """Of disjoint, ascending sequences in so many packed tokens."""
    sequences = start.shape[0]
    number = jnp.arange(tokens // CHUNK + sequences, dtype=jnp.int32)
    if not sequences:
        return Chunks(start, length, jnp.zeros_like(number), jnp.zeros_like(number))
    count = -(-length // CHUNK)
    last = jnp.cumsum(count, dtype=jnp.int32)
    first = last - count
    owner = jnp.minimum(jnp.searchsorted(last, number, side="right"), sequences - 1)
    local = (number - first[owner]) * CHUNK
    valid = jnp.clip(length[owner] - local, 0, CHUNK)
    token = jnp.where(valid > 0, start[owner] + local, 0)
    return Chunks(first, *(x.astype(jnp.int32) for x in (count, token, valid)))
