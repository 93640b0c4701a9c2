"""Who computes what in AITER's persistent MLA prefill kernel, under jit: static shapes, traced lengths, no host sync.

The queries of each sequence are cut into tiles of 256 rows, the keys that a tile sees into units of 128. All units, one
tile after the other, are dealt out evenly to the blocks that share a group of heads; what a block gets of one tile is a
segment. A segment that is a whole tile writes its rows of the output; any other writes a partial tile: 256 rows of
normalised output and their lse, to be merged afterwards. ``all_partial`` makes every segment write one, which gives the
lse of every row, and outputs in float32.

The order of tiles, cuts and records is that of AITER's own planner.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE, UNIT = 256, 128  # rows of a tile, keys of a unit
BLOCKS = 256  # that are launched: the compute units of an MI350X and MI355X; any number is right
RECORD = 8  # int32 of a work record


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static facts of a plan."""

    tokens: int
    sequences: int
    heads: int
    causal: bool
    all_partial: bool

    @property
    def clusters(self) -> int:
        """Groups of heads that have blocks of their own."""
        return math.gcd(self.heads, BLOCKS)

    @property
    def groups(self) -> int:
        """Blocks of a cluster."""
        return BLOCKS // self.clusters

    @property
    def tiles(self) -> int:
        """Room for tiles: no lengths that add up to ``tokens`` make more."""
        return self.tokens // TILE + self.sequences

    @property
    def segments(self) -> int:
        return self.tiles + self.groups

    @property
    def partials(self) -> int:
        """Room for partial tiles; a cut makes two of a tile, or one more of one that is cut already."""
        cut = self.segments - 1
        return max(1, cut if self.all_partial else min(2 * (self.groups - 1), cut))

    @property
    def extras(self) -> int:
        """Partial tiles that are not the first of their tile, at most: one a cut."""
        return self.groups - 1


class Ranges(NamedTuple):
    """Sequences as disjoint, ascending ranges."""

    q_start: jax.Array  # int32 [B]
    q_length: jax.Array
    k_start: jax.Array
    k_length: jax.Array


class Plan(NamedTuple):
    """What the kernel reads, and which partial tiles belong together."""

    work_indptr: jax.Array  # int32 [BLOCKS + 1]
    work: jax.Array  # int32 [heads * segments, 8]
    tile_of_partial: jax.Array  # int32 [partials]; ``tiles`` for one that is not used
    first_partial: jax.Array  # int32 [tiles]: of the tile; they stand one after the other
    partials_of: jax.Array  # int32 [tiles]; 0 for a tile that is whole, or of which nothing is computed
    rows: jax.Array  # int32 [tiles]; what a partial tile holds behind them is nothing


class _Tiles(NamedTuple):
    sequence: jax.Array  # int32 [tiles], like the others
    start: jax.Array  # first row, and the one behind the last
    end: jax.Array
    units: jax.Array


class _Segments(NamedTuple):
    """In order; those that are not real lie anywhere between."""

    tile: jax.Array  # int32 [segments]
    group: jax.Array
    low: jax.Array  # first unit, and the one behind the last
    high: jax.Array
    real: jax.Array  # bool [segments]


def _running(counts: jax.Array) -> jax.Array:
    """0 and the running sums: int32 [n + 1]."""
    sums = jnp.cumsum(counts, dtype=jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), sums])


def _interval(starts: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """The interval that a position lies in; the last one of several that start there."""
    place = jnp.searchsorted(starts, position, side="right", method="compare_all")  # one pass, no loop of the device
    return jnp.clip(place.astype(jnp.int32) - 1, 0, count - 1)


def _first_tiles(ranges: Ranges) -> jax.Array:
    return _running(-(-ranges.q_length // TILE))


def token_places(shape: Shape, ranges: Ranges, sequence: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tile and row of every token, int32 [T], from the sequence that it is of; anything for a token of none."""
    inside = jnp.maximum(sequence, 0)
    local = jnp.arange(shape.tokens, dtype=jnp.int32) - ranges.q_start[inside]
    number, count = local // TILE, -(-ranges.q_length // TILE)[inside]
    from_front = 2 * number < count  # tiles are visited 0, n - 1, 1, n - 2, ...
    place = jnp.where(from_front, 2 * number, 2 * (count - 1 - number) + 1)
    return jnp.clip(_first_tiles(ranges)[inside] + place, 0, shape.tiles - 1), local % TILE


def _query_tiles(shape: Shape, ranges: Ranges) -> _Tiles:
    first = _first_tiles(ranges)
    slot = jnp.arange(shape.tiles, dtype=jnp.int32)
    b = _interval(first, slot, shape.sequences)
    place = slot - first[b]
    count = first[b + 1] - first[b]
    number = jnp.where(place % 2 == 0, place // 2, count - 1 - place // 2)
    end = jnp.minimum((number + 1) * TILE, ranges.q_length[b])
    keys = ranges.k_length[b]
    visible = jnp.minimum(keys - ranges.q_length[b] + end, keys) if shape.causal else keys
    units = jnp.where(slot < first[-1], jnp.maximum(-(-visible // UNIT), 0), 0)
    return _Tiles(b, ranges.q_start[b] + number * TILE, ranges.q_start[b] + end, units)


def _cut(shape: Shape, starts: jax.Array) -> _Segments:
    """Every tile starts a segment, and every group does."""
    total = starts[-1]
    group = jnp.arange(shape.groups + 1, dtype=jnp.int32)
    cuts = group * (total // shape.groups) + jnp.minimum(group, total % shape.groups)
    low = jnp.sort(jnp.concatenate([starts[:-1], cuts[:-1]]))
    high = jnp.concatenate([low[1:], total[None]])
    return _Segments(_interval(starts, low, shape.tiles), _interval(cuts, low, shape.groups), low, high, high > low)


def build(shape: Shape, ranges: Ranges) -> Plan:
    tiles = _query_tiles(shape, ranges)
    starts = _running(tiles.units)
    segments = _cut(shape, starts)
    whole = (segments.low == starts[segments.tile]) & (segments.high == starts[segments.tile + 1])
    partial = segments.real if shape.all_partial else segments.real & ~whole
    number = _running(partial.astype(jnp.int32))[:-1]
    slot = jnp.where(partial, number, shape.partials)
    work_indptr, work = _records(shape, ranges, tiles, starts, segments, jnp.where(partial, TILE * number, -1))
    unused = jnp.full(shape.partials, shape.tiles, jnp.int32)
    tile_of_partial = unused.at[slot].set(segments.tile, mode="drop")
    partials_of = jnp.zeros(shape.tiles, jnp.int32).at[tile_of_partial].add(1, mode="drop")
    return Plan(work_indptr, work, tile_of_partial, _running(partials_of)[:-1], partials_of, tiles.end - tiles.start)


def _records(
    shape: Shape, ranges: Ranges, tiles: _Tiles, starts: jax.Array, segments: _Segments, location: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A block's records are those of its segments, head by head: (indptr, records)."""
    tile, group = segments.tile, segments.group
    b = tiles.sequence[tile]
    first = ranges.k_start[b]
    low, high = (first + (unit - starts[tile]) * UNIT for unit in (segments.low, segments.high))
    high = jnp.minimum(high, first + ranges.k_length[b])
    real = segments.real.astype(jnp.int32)
    count = jnp.zeros(shape.groups, jnp.int32).at[group].add(real)
    before = _running(count)
    rank = _running(real)[:-1] - before[group]  # in its group
    head = jnp.arange(shape.heads, dtype=jnp.int32)[:, None]
    per_cluster = shape.heads // shape.clusters
    place = per_cluster * (head // per_cluster * before[-1] + before[group]) + head % per_cluster * count[group] + rank
    room = shape.heads * shape.segments
    place = jnp.where(segments.real, place, room)  # [H, segments]
    offset = jnp.zeros_like(low)  # the kernel reads none
    fields = (b, location, tiles.start[tile], tiles.end[tile], low, high, offset, head | (head + 1) << 16)
    records = jnp.stack([jnp.broadcast_to(field, place.shape) for field in fields], axis=-1)
    work = jnp.zeros((room, RECORD), jnp.int32).at[place].set(records, mode="drop")
    return _running(jnp.tile(per_cluster * count, shape.clusters)), work
