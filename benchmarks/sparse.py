"""``sparse_prefill`` against FlashMLA, from bf16 queries and rows that lie in one or two pools.

What a variant says: how rows are stored, and with that what there is to compare with.

    exact               FP8 rows with float32 scales
    exact byte scales   FP8 rows with E8M0 bytes for scales
    exact bf16 rows     rows of 1024 bytes

FlashMLA gets one pool, the extend rows behind the prefix, made beforehand: "flashmla bf16" rows that were dequantised,
"flashmla fp8" pages of FP8 rows. "flashmla bf16 dequantised" is charged for the pass that makes one bf16 pool of two.
Where heads are fewer than 64 it computes on 64, padded beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_fp8attn.benchmarks import peers
from jax_fp8attn.benchmarks.models import WINDOW, Case
from jax_fp8attn.benchmarks.timing import Contender
from jax_fp8attn.benchmarks.trial import Trial, offered

from jax_fp8attn import dispatch
from jax_fp8attn.latent import WIDTH, Fp8Latent, dequantize_latent, quantize_latent, to_flashmla_pages
from jax_fp8attn.problems import PoolForm, RowForm, SparseArrays, SparsePool, SparseProblem
from jax_fp8attn.quantize import E4M3
from jax_fp8attn.sparse_prefill import OP
from jax_fp8attn.testing import row_relative_l2

SETS = 2
CHECKED = 32  # tokens, all heads of each
BOUND, PEER_BOUND = 6e-3, 1e-2  # relative L2 of the worst row
RATIO = 4  # tokens of a compressed row
BLOCK = 64  # rows that lie together in a paged pool
XLA_STEPS = 256  # of 16 tokens and 128 rows: more take XLA longer than 20 ms
PAGE = 64  # rows of FlashMLA's page
MULTIPLE = 128  # of rows a list, for FlashMLA
SCALE = WIDTH**-0.5
STORED: dict[str, dict[str, Any] | None] = {
    "exact": {"group": 64},
    "exact byte scales": {"group": 64, "scale_dtype": jnp.uint8},
    "exact bf16 rows": None,
}


class Lists(NamedTuple):
    """int32 [T, rows] of each pool; -1 at the end of a list that is shorter."""

    prefix: np.ndarray
    extend: np.ndarray | None


class _Operands(NamedTuple):
    """One set of inputs."""

    arrays: SparseArrays
    lists: Lists


def trial(case: Case, folder: Path | None) -> Trial:
    shape = case.shape
    inputs = [_operands(shape, STORED[case.variant], seed) for seed in range(SETS)]
    problem = _problem(inputs[0].arrays)
    given = [x.arrays for x in inputs]
    tokens = _checked_tokens(shape["T"])
    expected = _expected(inputs[0], tokens)
    names = [name for name in offered("sparse_prefill", problem) if name != "xla" or _xla_is_quick(shape)]
    return Trial(
        contenders=[*(_ours(name, problem, given) for name in names), *_theirs(shape, inputs, peers.flashmla(folder))],
        sets=SETS,
        bytes=_bytes(problem, inputs[0]),
        flops=_flops(problem),
        error=lambda contender, result: _error(result, tokens, expected),
        bound=lambda contender: PEER_BOUND if contender.is_peer else BOUND,
    )


def lists(shape: dict[str, int], seed: int) -> Lists:
    """Random rows of the prefix pool, all of it where a token lists as many; then the window of the chunk."""
    rng = np.random.default_rng(seed)
    if "C" in shape:
        return _second_chunk(shape, rng)
    tokens, pool = shape["T"], shape["P"]
    selected = shape["topk"] - (WINDOW if "S" in shape else 0)
    if selected == pool:
        prefix = rng.permuted(np.tile(np.arange(pool), (tokens, 1)), axis=1)
    else:
        prefix = rng.integers(0, pool, (tokens, selected))
    window = np.maximum(np.arange(tokens)[:, None] - np.arange(WINDOW), 0)  # an early token lists row 0 repeatedly
    return Lists(prefix.astype(np.int32), window.astype(np.int32) if "S" in shape else None)


def _second_chunk(shape: dict[str, int], rng: np.random.Generator) -> Lists:
    """Of B requests with C tokens before: of the prefix pool the compressed rows that a token selects, in blocks that
    lie anywhere, and what of its window is older than the chunk (one ring of rows a request, before all blocks)."""
    requests, earlier, new = shape["B"], shape["C"], shape["T"] // shape["B"]
    number = np.arange(new)
    groups = (earlier + number + 1) // RATIO  # compressed rows that a token may see
    blocks_each = -(-int(groups[-1]) // BLOCK)
    blocks = rng.permutation((shape["P"] - requests * WINDOW) // BLOCK)[: requests * blocks_each]
    prefix, extend = [], []
    for request, own in enumerate(blocks.reshape(requests, blocks_each)):
        chosen = _distinct(rng, groups, shape["topk"] - WINDOW)
        compressed = np.where(chosen >= 0, requests * WINDOW + own[chosen // BLOCK] * BLOCK + chosen % BLOCK, -1)
        seen = number[:, None] - np.arange(WINDOW - 1, -1, -1)  # within the chunk
        old = np.where(seen < 0, request * WINDOW + (earlier + seen) % WINDOW, -1)
        prefix.append(np.concatenate([compressed, old], axis=1))
        extend.append(np.where(seen >= 0, request * new + seen, -1))
    return Lists(*(_gathered(np.concatenate(x)) for x in (prefix, extend)))


def _distinct(rng: np.random.Generator, below: np.ndarray, count: int) -> np.ndarray:
    """int64 [n, count]: in each row different numbers below ``below``; -1 where there are not so many."""
    keys = rng.random((len(below), max(count, int(below.max()))), np.float32)
    keys[np.arange(keys.shape[1]) >= below[:, None]] = 2.0
    chosen = np.argpartition(keys, count - 1, axis=1)[:, :count] if count else np.zeros((len(below), 0), np.int64)
    return np.where(chosen < below[:, None], chosen, -1)


def _gathered(matrix: np.ndarray) -> np.ndarray:
    """Entries before fillers, in their order, no wider than the longest list."""
    order = np.argsort(matrix < 0, axis=1, kind="stable")
    longest = int((matrix >= 0).sum(axis=1).max())
    return np.take_along_axis(matrix, order, axis=1)[:, :longest].astype(np.int32)


def _operands(shape: dict[str, int], form: dict[str, Any] | None, seed: int) -> _Operands:
    """Standard normal numbers."""
    listed = lists(shape, seed)
    counts = (shape["P"], shape.get("S", 0))
    q, prefix, extend = _drawn(shape["T"], shape["H"], counts, tuple((form or {}).items()), jax.random.key(seed))
    sink = jnp.asarray(np.linspace(-1.0, 3.0, shape["H"], dtype=np.float32)[None])
    pools = _pool(prefix, listed.prefix), _pool(extend, listed.extend) if "S" in shape else None
    return _Operands(SparseArrays(q, *pools, jnp.asarray([SCALE], jnp.float32), sink), listed)


@functools.partial(jax.jit, static_argnums=range(4))
def _drawn(tokens: int, heads: int, counts: tuple[int, int], form: tuple[Any, ...], key: jax.Array) -> tuple[Any, ...]:
    """Queries, and the rows of both pools."""
    drawn = jax.random.normal(key, (sum(counts) + tokens * heads, WIDTH), jnp.bfloat16)
    *rows, q = jnp.split(drawn, (counts[0], sum(counts)))
    stored = [quantize_latent(x, **dict(form)) if form else x for x in rows]
    return q.reshape(tokens, heads, WIDTH), *stored


def _pool(rows: Any, matrix: np.ndarray) -> SparsePool:
    bounds = np.concatenate([[0], np.cumsum((matrix >= 0).sum(axis=1))]).astype(np.int32)
    return SparsePool(rows, *map(jnp.asarray, (matrix[matrix >= 0], bounds[:-1], bounds[1:])))


def _problem(arrays: SparseArrays) -> SparseProblem:
    tokens, heads, _ = arrays.q.shape
    forms = [x and _pool_form(x) for x in (arrays.prefix, arrays.extend)]
    return SparseProblem(tokens, heads, RowForm(arrays.q.dtype), *forms, out_dtype=arrays.q.dtype, has_sink=True)


def _pool_form(pool: SparsePool) -> PoolForm:
    rows, entries = pool.rows, pool.indices.shape[0]
    if not isinstance(rows, Fp8Latent):
        return PoolForm(RowForm(rows.dtype), rows.shape[0], entries)
    return PoolForm(RowForm(jnp.dtype(E4M3), rows.group, rows.scale.dtype), rows.shape[0], entries)


def _pools(arrays: SparseArrays) -> list[SparsePool]:
    return [pool for pool in (arrays.prefix, arrays.extend) if pool is not None]


def _entries(problem: SparseProblem) -> int:
    return problem.prefix.entries + (problem.extend.entries if problem.extend else 0)


def _flops(problem: SparseProblem) -> int:
    """Scores and weighted sums, every entry with all heads."""
    return 4 * WIDTH * problem.heads * _entries(problem)


def _bytes(problem: SparseProblem, operands: _Operands) -> int:
    """Queries, lists and output, and once each row that any token lists."""
    q, sink = operands.arrays.q, operands.arrays.sink
    total = 2 * q.nbytes + sink.nbytes
    for pool, matrix in zip(_pools(operands.arrays), operands.lists, strict=False):
        row = sum(x.shape[-1] * x.dtype.itemsize for x in jax.tree.leaves(pool.rows))
        listed = np.unique(matrix[matrix >= 0]).size
        total += row * listed + sum(x.nbytes for x in (pool.indices, pool.start, pool.end))
    return total


def _xla_is_quick(shape: dict[str, int]) -> bool:
    return -(-shape["T"] // 16) * -(-shape["topk"] // 128) <= XLA_STEPS


def _ours(name: str, problem: SparseProblem, given: list[SparseArrays]) -> Contender:
    return Contender(name, lambda i: dispatch.execute(OP, problem, (name, None), given[i]))


def _checked_tokens(tokens: int) -> np.ndarray:
    """The first and the last, and others at random."""
    others = np.random.default_rng(tokens).permutation(tokens)[:CHECKED]
    return np.unique(np.concatenate([[0, tokens - 1], others]))


def _expected(operands: _Operands, tokens: np.ndarray) -> np.ndarray:
    """float32 [tokens, H, 512]."""
    picked = [matrix[tokens] for matrix in operands.lists if matrix is not None]
    arrays = operands.arrays
    rows = _gather([pool.rows for pool in _pools(arrays)], [np.maximum(x, 0) for x in picked])
    return np.asarray(_attention(arrays.q[tokens], rows, np.concatenate(picked, axis=1) >= 0, arrays.sink[0]))


@jax.jit
def _gather(pools: list[Any], indices: list[jax.Array]) -> jax.Array:
    """float32 [n, k, 512]: the rows of all pools, side by side."""
    taken = [jax.tree.map(lambda x, i=i: x[i], rows) for rows, i in zip(pools, indices, strict=True)]
    return jnp.concatenate(
        [dequantize_latent(x) if isinstance(x, Fp8Latent) else x.astype(jnp.float32) for x in taken], axis=1
    )


@jax.jit
def _attention(q: jax.Array, rows: jax.Array, there: jax.Array, sink: jax.Array) -> jax.Array:
    """q [n, H, 512] over rows [n, k, 512]; all that a token lists is there, and the sink is one more score."""
    score = jnp.einsum("nhd,nkd->nhk", q.astype(jnp.float32), rows, precision="highest") * SCALE
    score = jnp.where(there[:, None], score, -jnp.inf)
    sinks = jnp.broadcast_to(sink[:, None], (*score.shape[:2], 1))
    weights = jax.nn.softmax(jnp.concatenate([score, sinks], axis=-1), axis=-1)[..., :-1]
    return jnp.einsum("nhk,nkd->nhd", weights, jnp.where(there[..., None], rows, 0), precision="highest")


def _error(result: Any, tokens: np.ndarray, expected: np.ndarray) -> float:
    """The worst row of the tokens that are checked; infinite where any number of the whole result is no number. A peer
    may have computed more heads."""
    out = (result if isinstance(result, jax.Array) else jnp.from_dlpack(result))[:, : expected.shape[1]]
    if not bool(jnp.isfinite(out).all()):
        return float("inf")
    return float(row_relative_l2(np.asarray(out[tokens].astype(jnp.float32)), expected).max())


def _theirs(shape: dict[str, int], inputs: list[_Operands], module: Any) -> Iterator[Contender]:
    """FlashMLA, on 64 or 128 heads."""
    if module is None:
        return
    heads = -(-shape["H"] // 64) * 64
    if heads not in (64, 128):
        return
    q = [peers.to_torch(jnp.pad(x.arrays.q, ((0, 0), (0, heads - shape["H"]), (0, 0)))) for x in inputs]
    sinks = [peers.to_torch(jnp.pad(x.arrays.sink[0], (0, heads - shape["H"]))) for x in inputs]
    listed = [peers.to_torch(jnp.asarray(_one_list(x, shape["P"]))) for x in inputs]
    pools = [tuple(pool.rows for pool in _pools(x.arrays)) for x in inputs]
    rows = [peers.to_torch(_one_bf16_pool(*x))[:, None] for x in pools]

    def attend(i: int, rows: Any) -> Any:
        return module.flash_mla_sparse_fwd(q[i], rows, listed[i][:, None], SCALE, WIDTH, sinks[i])[0]

    yield Contender("flashmla bf16", lambda i: attend(i, rows[i]), is_peer=True)
    if not isinstance(pools[0][0], Fp8Latent):
        return
    if "S" in shape:
        dequantised = lambda i: peers.to_torch(_one_bf16_pool(*pools[i]))[:, None]
        yield Contender("flashmla bf16 dequantised", lambda i: attend(i, dequantised(i)), is_peer=True)
    pages = [_pages(*x) for x in pools]
    plan = module.get_mla_metadata()[0]

    def attend_fp8(i: int) -> Any:
        out, _ = module.flash_mla_with_kvcache(
            q[i][None], pages[i], None, None, WIDTH, plan, softmax_scale=SCALE, is_fp8_kvcache=True,
            indices=listed[i][None], attn_sink=sinks[i],
        )  # fmt: skip
        return out[0]

    yield Contender("flashmla fp8", attend_fp8, is_peer=True)


def _one_list(operands: _Operands, prefix_rows: int) -> np.ndarray:
    """int32 [T, a multiple of 128] over the extend rows behind the prefix."""
    prefix, extend = operands.lists
    if extend is not None:
        prefix = _gathered(np.concatenate([prefix, np.where(extend >= 0, extend + prefix_rows, -1)], axis=1))
    return np.pad(prefix, ((0, 0), (0, -prefix.shape[1] % MULTIPLE)), constant_values=-1)


@jax.jit
def _one_bf16_pool(*pools: Any) -> jax.Array:
    return jnp.concatenate([x.dequantize(jnp.bfloat16) if isinstance(x, Fp8Latent) else x for x in pools])


def _pages(*pools: Fp8Latent) -> Any:
    """FlashMLA's view of its pages: [pages, 64, 1, 584], pages a little further apart than they are long."""
    import torch

    latent = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pools)
    pages = peers.to_torch(jax.jit(functools.partial(to_flashmla_pages, page_size=PAGE))(latent))
    used = PAGE * 584
    return pages[:, :used].view(torch.float8_e4m3fn).view(len(pages), PAGE, 1, used // PAGE)
