"""The chunks of a batch for the gated-delta-net kernels, and what is prepared for each of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_fp8attn.problems import GDN_CHUNK as CHUNK


class Chunks(NamedTuple):
    """Chunks of 64 tokens, counted from each sequence's first token; unused ones last."""

    first: jax.Array  # int32 [B]: number of each sequence's first chunk
    count: jax.Array  # int32 [B]: chunks of each sequence
    token: jax.Array  # int32 [N]: first token of each chunk in the packed arrays
    valid: jax.Array  # int32 [N]: tokens of each chunk, 1..64; 0 for chunks that no sequence has


class Prepared(NamedTuple):
    """Operands of the recurrence over N chunks with H state heads. Rows past a chunk's ``valid`` are zero."""

    w: jax.Array  # bf16 [N, H, 64, 128]: Xg diag(beta gam) Kc, the keys' norms folded in
    u: jax.Array  # bf16 [N, H, 64, 128]: Xg diag(beta) Vc
    p: jax.Array  # bf16 [N, H, 64, 64]: scale (Qc Kc^T) * E, lower triangle with diagonal, norms folded in
    q: jax.Array  # bf16 [N, Hq, 64, 128]: raw rows
    k: jax.Array  # bf16 [N, Hk, 64, 128]: raw rows
    rows: jax.Array  # f32 [N, H, 2, 64]: scale gam_i rq_i; exp(c_n - c_i) rk_i
    total: jax.Array  # f32 [N, H]: gam_n = exp(c_n), the decay of the state over the chunk; 1 for unused chunks


def chunk_list(start: jax.Array, length: jax.Array, tokens: int) -> Chunks:
    """Of disjoint ranges of ``tokens`` tokens."""
    sequences = start.shape[0]
    count = -(-length // CHUNK)
    last = jnp.cumsum(count, dtype=jnp.int32)
    first = last - count
    number = jnp.arange(tokens // CHUNK + sequences, dtype=jnp.int32)
    if not sequences:
        return Chunks(first, count, jnp.zeros_like(number), jnp.zeros_like(number))
    owner = jnp.minimum(jnp.searchsorted(last, number, side="right", method="compare_all"), sequences - 1)
    done = (number - first[owner]) * CHUNK
    valid = jnp.clip(length[owner] - done, 0, CHUNK)
    token = jnp.where(valid > 0, start[owner] + done, 0)
    return Chunks(*(x.astype(jnp.int32) for x in (first, count, token, valid)))
