"""Which rows a block works on: made on the device from the offsets, so that lengths may change without a retrace."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

FIELDS = ("first_query", "rows", "first_key", "first_column", "visible", "key_count", "instance", "sequence")
"""Of a tile. ``rows`` 0: an unused slot. ``visible``: keys that the first row sees, possibly negative."""
SPLIT_FIELDS = (*FIELDS, "first_output", "skipped", "blocks")
"""Of a tile that is one of several splits. Keys are counted from its own first one: ``skipped`` of the sequence lie
before. ``blocks`` of keys, at least one."""
MANY_BOUNDS = 512  # from so many on a place among them is found by bisection


class KeyBlocks(NamedTuple):
    """Where the columns of each sequence's V^T stand: a region a sequence, in blocks of ``align`` columns."""

    first: jax.Array  # int32 [B], multiples of the alignment
    blocks: jax.Array  # int32 [columns / align, BLOCK_FIELDS]


BLOCK_FIELDS = ("first_key", "keys", "local", "owner")
"""``keys`` of the sequence are in the block, possibly 0; ``local`` is the first one's number in the sequence."""


def key_blocks(k_start: jax.Array, k_length: jax.Array, keys: int, align: int) -> KeyBlocks:
    """Regions are whole blocks; keys stand in KEY_ORDER inside each group of 16 columns."""
    sequences = k_start.shape[0]
    count = -(-k_length // align)
    last = jnp.cumsum(count)
    block = jnp.arange(-(-keys // align) + sequences, dtype=jnp.int32)
    owner = jnp.minimum((last <= block[:, None]).sum(axis=1), sequences - 1).astype(jnp.int32)
    local = (block - (last - count)[owner]) * align
    inside = jnp.clip(k_length[owner] - local, 0, align)
    first_key = jnp.where(inside > 0, k_start[owner] + local, 0)
    table = jnp.stack([x.astype(jnp.int32) for x in (first_key, inside, local, owner)], axis=1)
    return KeyBlocks(((last - count) * align).astype(jnp.int32), table)


class Work(NamedTuple):
    tiles: jax.Array  # int32 [tiles, FIELDS or SPLIT_FIELDS], unused ones last
    place: jax.Array  # int32 [splits, T]: tile * its rows + row, of every token
    token: jax.Array  # int32 [tiles * rows]: the token of every row of a sequence's tile, -1 for others


def query_tiles(problem: Any, arrays: Any, regions: Any, rows: int, align: int, splits: int = 1) -> Work:
    """Tiles of ``rows`` query rows. Every token is in one: those of no sequence are in tiles without keys.

    With ``splits`` every tile is there so many times, each time with its own blocks of ``align`` keys among those that
    its rows see, and its own rows of the output. ``token`` names the rows of the first split alone.
    """
    tokens, sequences = problem.tokens, problem.sequences
    # bounds of what lies before, in and behind each sequence, one after the other
    bounds = jnp.stack([arrays.q_start, arrays.q_start + arrays.q_length], axis=1).reshape(-1)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), bounds, jnp.full(1, tokens, jnp.int32)])
    start, length = bounds[:-1], jnp.diff(bounds)
    count = -(-length // rows)
    last = jnp.cumsum(count)
    slots, used = tokens // rows + 2 * sequences + 1, last[-1]
    # the longest tiles of a sequence first
    turned = (lambda slot: used - 1 - slot) if problem.causal else (lambda slot: slot)
    number = jnp.arange(splits * slots, dtype=jnp.int32)
    split = sum((number >= n * used).astype(jnp.int32) for n in range(1, splits)) if splits > 1 else 0
    slot = turned(number - split * used)
    there = number < splits * used
    span = jnp.minimum(_place_among(last, slot), 2 * sequences)
    local = (slot - (last - count)[span]) * rows
    owned = lax.rem(span, 2) == 1
    sequence = jnp.where(owned, lax.div(span, 2), 0)
    key_count = jnp.where(owned, arrays.k_length[sequence], 0)
    visible = jnp.where(owned, local + 1 + key_count - arrays.q_length[sequence], 0) if problem.causal else key_count
    own_rows = jnp.where(there, jnp.clip(length[span] - local, 0, rows), 0)
    seen = jnp.clip(visible + own_rows - 1, 0, key_count) if problem.causal else key_count
    blocks = -(-seen // align)
    first, end = (lax.div((split + n) * blocks, splits) for n in (0, 1))
    facts = {
        "first_query": start[span] + local,
        "first_output": start[span] + local + split * tokens,
        "rows": own_rows,
        "first_key": arrays.k_start[sequence] + first * align,
        "first_column": regions.first[sequence] + first * align,
        "visible": visible - first * align,
        "key_count": jnp.where(end > first, key_count - first * align, 0),
        "skipped": first * align,
        "blocks": jnp.maximum(end - first, 1),
        "instance": lax.div(sequence, sequences // problem.instances),
        "sequence": sequence,
    }
    table = jnp.stack([facts[name].astype(jnp.int32) for name in (FIELDS if splits == 1 else SPLIT_FIELDS)], axis=1)
    token = jnp.arange(tokens, dtype=jnp.int32)
    mine = _place_among(bounds[1:], token)
    offset = token - start[mine]
    own_slot = turned((last - count)[mine] + lax.div(offset, rows))
    own_slot = own_slot + used * jnp.arange(splits, dtype=jnp.int32)[:, None]
    place = own_slot * rows + lax.rem(offset, rows)
    of_sequence = lax.rem(mine, 2) == 1
    back = jnp.full(splits * slots * rows, -1, jnp.int32).at[place[0]].set(jnp.where(of_sequence, token, -1))
    return Work(table, place, back)


def _place_among(bounds: jax.Array, x: jax.Array) -> jax.Array:
    """How many of the ascending bounds are no more than x: one kernel for all, or for many bounds one a bisection."""
    method = "compare_all" if bounds.shape[0] < MANY_BOUNDS else "scan"
    return jnp.searchsorted(bounds, x, side="right", method=method).astype(jnp.int32)


def rows_of_tiles(x: jax.Array, work: Work) -> jax.Array:
    """[..., tiles, rows] to [splits, ..., T]."""
    return jnp.moveaxis(jnp.take(x.reshape(*x.shape[:-2], -1), work.place, axis=-1), -2, 0)


def tiles_of_rows(lse: jax.Array, work: Work) -> jax.Array:
    """lse [H, T] to [H, tiles, rows]; -inf for rows of no sequence and for +inf."""
    rows = lse[:, jnp.maximum(work.token, 0)]
    rows = jnp.where((work.token >= 0) & ~jnp.isposinf(rows), rows, -jnp.inf)
    return rows.reshape(lse.shape[0], work.tiles.shape[0], -1)
