"""The batches that the modules are called with: packed requests and where their caches lie. Everything is traced."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_fp8attn import checks, offsets


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Packed requests over a paged cache.

    cu_seqlens       int32 [B+1]: request b owns the tokens cu_seqlens[b] to cu_seqlens[b+1] of this call
    context_lengths  int32 [B]: its tokens that are in the cache already; limited to 0..what its table can hold
    block_tables     int32 [B, max_blocks]: the block of its positions block_size*i and on. Nothing is written for a
                     block out of range. A block that a request writes to is its own.

    Without a cache: cu_seqlens alone.
    """

    cu_seqlens: jax.Array
    context_lengths: jax.Array | None = None
    block_tables: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotBatch:
    """Packed requests over a pool with one row a request.

    cu_seqlens         int32 [B+1], as in ``PagedBatch``
    slots              int32 [B], distinct: the pool row of each request; out of range: start anew, keep nothing
    has_initial_state  bool [B]: False starts anew, whatever the row holds
    """

    cu_seqlens: jax.Array
    slots: jax.Array
    has_initial_state: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowBatch:
    """Packed requests over a pool of windows and a paged pool of compressed rows.

    cu_seqlens, context_lengths   as in ``PagedBatch``
    slots                         int32 [B], distinct: the window of each request
    block_tables                  int32 [B, max_blocks]: the blocks of its compressed rows; None without compression
    """

    cu_seqlens: jax.Array
    context_lengths: jax.Array
    slots: jax.Array
    block_tables: jax.Array | None = None


class Tokens(NamedTuple):
    """Where each token belongs; ``owner`` is -1 and the rest 0 for tokens of no request."""

    start: jax.Array  # int32 [B]
    length: jax.Array  # int32 [B]
    owner: jax.Array  # int32 [T]
    local: jax.Array  # int32 [T]: number within its request's tokens of this call


def packed_tokens(op: str, cu_seqlens: Any, total: int) -> Tokens:
    """Checks the offsets and finds every token's request."""
    cu_seqlens = checks.array(op, "batch.cu_seqlens", cu_seqlens, ("B+1",), [jnp.int32])
    if cu_seqlens.shape[0] < 2:
        raise checks.invalid(op, "batch.cu_seqlens", checks.describe(cu_seqlens), "at least one request")
    start, length = offsets.ranges(cu_seqlens, total)
    owner = offsets.owner(start, length, total)
    local = jnp.where(owner >= 0, jnp.arange(total, dtype=jnp.int32) - start[owner], 0)
    return Tokens(start, length, owner, local)


def context(op: str, lengths: Any, requests: int, most: int) -> jax.Array:
    """Checked context lengths, limited to 0..most."""
    lengths = checks.array(op, "batch.context_lengths", lengths, (requests,), [jnp.int32])
    return jnp.clip(lengths, 0, most)


def paged(tables: jax.Array, request: jax.Array, position: jax.Array, blocks: int, size: int) -> jax.Array:
    """int32 like ``position``: the block that holds it, or ``blocks`` (out of range) where there is none."""
    column = position // size
    block = jnp.asarray(tables)[jnp.maximum(request, 0), jnp.clip(column, 0, tables.shape[1] - 1)]
    there = (request >= 0) & (position >= 0) & (column < tables.shape[1]) & (block >= 0) & (block < blocks)
    return jnp.where(there, block, blocks)
