"""What the kernels of ``sparse_prefill`` read, and the tiles that their blocks of threads work off: a token and some of
its heads against the rows of its lists, in blocks of 64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import latent_rows
from jax_fp8attn.pallas.common.latent_rows import ROWS, Gather, Pool

from jax_fp8attn.latent import WIDTH, Fp8Latent
from jax_fp8attn.problems import SparseArrays, SparseProblem

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
SLACK = 8.0  # in base 2: so far scores may exceed the maximum in use
FIELDS = ("prefix_start", "prefix_end", "extend_start", "extend_end")


class Operands(NamedTuple):
    """What a kernel reads."""

    q: Pool  # bf16 [T, H, 512] as ``nope``, or FP8 with leading axis [T * H]
    pools: tuple[Pool, ...]
    indices: tuple[Any, ...]  # int32 [entries]
    lists: Any  # int32 [T, 4]: FIELDS
    scale: Any  # float32 [instances], in base 2
    sink: Any  # float32 [instances, groups, heads], in base 2; -inf: none


def operands_of(problem: SparseProblem, arrays: SparseArrays, heads: int) -> Operands:
    """For tiles of so many heads."""
    pools = [pool for pool in (arrays.prefix, arrays.extend) if pool is not None]
    bounds = [x for pool in pools for x in (pool.start, pool.end)]
    bounds += [jnp.zeros_like(bounds[0])] * (len(FIELDS) - len(bounds))
    groups = groups_of(problem, heads)
    sink = jnp.full((problem.instances, problem.heads), -jnp.inf) if arrays.sink is None else arrays.sink * LOG2E
    sink = jnp.pad(sink, ((0, 0), (0, groups * heads - problem.heads)), constant_values=-jnp.inf)
    rows, indices = (tuple(_some(x) for x in given) for given in zip(*(pool[:2] for pool in pools), strict=True))
    return Operands(
        _queries(arrays.q), tuple(map(_pool, rows)), indices,
        jnp.stack(bounds, axis=1), arrays.softmax_scale * LOG2E, sink.reshape(problem.instances, groups, heads),
    )  # fmt: skip


def _queries(q: Any) -> Pool:
    if isinstance(q, Fp8Latent):
        return _pool(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), q))
    return _pool(q.astype(jnp.bfloat16))


def _some(rows: Any) -> Any:
    """A kernel takes no array without elements: one row stands in, which no index is."""
    return jax.tree.map(lambda x: x if x.shape[0] else jnp.zeros((1, *x.shape[1:]), x.dtype), rows)


def _pool(rows: Any) -> Pool:
    return Pool(rows.nope, rows.rope, rows.scale) if isinstance(rows, Fp8Latent) else Pool(rows, None, None)


def groups_of(problem: SparseProblem, heads: int) -> int:
    """Tiles of a token."""
    return -(-problem.heads // heads)


class Tile(NamedTuple):
    """The scalars of a tile."""

    number: Any
    token: Any
    group: Any
    instance: Any
    starts: tuple[Any, Any]
    ends: tuple[Any, Any]
    prefix_blocks: Any
    blocks: Any  # at least one

    def entries(self, number: Any) -> tuple[Any, Any, Any]:
        """Pool, first entry and end of its list, of a block."""
        second = number >= self.prefix_blocks
        local = number - jnp.where(second, self.prefix_blocks, 0)
        pick = lambda pair: jnp.where(second, pair[1], pair[0])
        return second.astype(jnp.int32), pick(self.starts) + local * ROWS, pick(self.ends)


def tile_of(problem: SparseProblem, lists: Any, number: Any, groups: int) -> Tile:
    token, group = lax.div(number, groups), lax.rem(number, groups)
    starts, ends = (tuple(lists[token, n + k] for k in (0, 2)) for n in (0, 1))
    counts = [lax.div(end - start + (ROWS - 1), ROWS) for start, end in zip(starts, ends, strict=True)]
    instance = lax.div(token, problem.tokens // problem.instances)
    return Tile(number, token, group, instance, starts, ends, counts[0], jnp.maximum(counts[0] + counts[1], 1))


def row_numbers(problem: SparseProblem, gmem: Operands, tile: Tile, block: Any, interpreted: bool) -> tuple[Any, Any]:
    """Of the rows of a block, and their pool. A block past the last has none."""
    pool, first, end = tile.entries(block)
    if len(gmem.pools) == 1:
        end = jnp.where(pool > 0, first, end)
        pool = pool * 0
    rows = tuple(one.rows for one in (problem.prefix, problem.extend) if one is not None)
    return latent_rows.listed(gmem.indices, rows, pool, first, end, interpreted), pool


def gather_of(problem: SparseProblem, gmem: Operands, interpreted: bool) -> Gather:
    return Gather(problem.prefix.form, gmem.pools, interpreted)


def without_tokens(problem: SparseProblem) -> Any:
    out = jnp.zeros((0, problem.heads, WIDTH), problem.out_dtype)
    return (out, jnp.zeros((problem.heads, 0))) if problem.return_lse else out
