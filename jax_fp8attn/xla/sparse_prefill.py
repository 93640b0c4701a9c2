"""``sparse_prefill`` in jax.numpy: tiles of tokens and entries, an online softmax, rows dequantised when gathered."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.dispatch import Device
from jax_fp8attn.folding import as_varying
from jax_fp8attn.latent import Fp8Latent, dequantize_latent
from jax_fp8attn.problems import SparseArrays, SparsePool, SparseProblem

# one tile shape for every call, so that a token's bits depend on its own list alone
TOKENS, ENTRIES = 16, 128


class Softmax(NamedTuple):
    """The running state of an online softmax."""

    top: jax.Array  # [b, H]
    total: jax.Array  # [b, H]
    out: jax.Array  # [b, H, 512], not yet divided by the total


def supports(problem: SparseProblem, device: Device) -> tuple[str, ...]:
    return ()


def run(problem: SparseProblem, arrays: SparseArrays) -> Any:
    tokens, rows = problem.tokens, max(problem.tokens, TOKENS)

    def block(number: jax.Array, result: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # the last block reaches back into the one before it
        first = jnp.minimum(number * TOKENS, rows - TOKENS)
        out, lse = _attend(problem, arrays, jnp.minimum(first + jnp.arange(TOKENS, dtype=jnp.int32), tokens - 1))
        out = lax.dynamic_update_slice_in_dim(result[0], out.astype(problem.out_dtype), first, axis=0)
        return out, lax.dynamic_update_slice_in_dim(result[1], lse, first, axis=0)

    out = jnp.zeros((rows, problem.heads, problem.width), problem.out_dtype)
    lse = jnp.zeros((rows, problem.heads), jnp.float32)
    if tokens:
        out, lse = lax.fori_loop(0, -(-tokens // TOKENS), block, as_varying((out, lse), arrays))
    return (out[:tokens], lse[:tokens].T) if problem.return_lse else out[:tokens]


def _attend(problem: SparseProblem, arrays: SparseArrays, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One block of b tokens over both pools: out [b, H, 512] and lse [b, H] in float32."""
    instance = token // (problem.tokens // problem.instances)
    q, scale = _take(arrays.q, token), arrays.softmax_scale[instance]
    shape = q.shape[:-1]
    state = Softmax(jnp.full(shape, -jnp.inf, q.dtype), jnp.zeros(shape, q.dtype), jnp.zeros(q.shape, q.dtype))
    state = as_varying(state, arrays)
    for pool in (arrays.prefix, arrays.extend):
        if pool is not None:
            state = _add_rows(q, scale, pool, token, state)
    empty = state.total == 0
    total = state.total
    if arrays.sink is not None:
        total = total + jnp.exp(arrays.sink[instance] - state.top)
    out = state.out / jnp.where(empty, 1.0, total)[..., None]
    # -0 too becomes 0: a step past the end of a list may have flipped the sign
    out = jnp.where(empty[..., None] | (out == 0), 0.0, out)
    return out, jnp.where(empty, -jnp.inf, state.top + jnp.log(state.total))


def _add_rows(q: jax.Array, scale: jax.Array, pool: SparsePool, token: jax.Array, state: Softmax) -> Softmax:
    """Adds the rows of one pool that the tokens list. The loop ends with the longest list of the block."""
    count, entries = jax.tree.leaves(pool.rows)[0].shape[0], pool.indices.shape[0]
    if not count or not entries:
        return state
    start = pool.start[token]
    length = pool.end[token] - start

    def step(number: jax.Array, state: Softmax) -> Softmax:
        entry = number * ENTRIES + jnp.arange(ENTRIES, dtype=jnp.int32)  # [n]
        listed = entry < length[:, None]  # [b, n]
        index = pool.indices[jnp.where(listed, start[:, None] + entry, 0)]
        valid = listed & (index >= 0) & (index < count)
        values = jnp.where(valid[..., None], _take(pool.rows, jnp.where(valid, index, 0)), 0.0)  # [b, n, 512]
        return _online_softmax(q, scale, values, valid, state)

    return lax.fori_loop(0, -(-jnp.max(length) // ENTRIES), step, state)


def _online_softmax(q: jax.Array, scale: jax.Array, values: jax.Array, valid: jax.Array, state: Softmax) -> Softmax:
    scores = _dot(q, values, contract=2) * scale[:, None, None]  # [b, H, n]
    scores = jnp.where(valid[:, None], scores, -jnp.inf)
    top = jnp.maximum(state.top, jnp.max(scores, axis=-1))
    anchor = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(scores - anchor[..., None])
    keep = jnp.exp(state.top - anchor)
    return Softmax(
        top,
        state.total * keep + jnp.sum(weights, axis=-1),
        state.out * keep[..., None] + _dot(weights, values, contract=1),
    )


def _dot(x: jax.Array, values: jax.Array, contract: int) -> jax.Array:
    """x [b, H, k] times values [b, n, 512], over the 512 (contract 2) or over n (contract 1)."""
    return lax.dot_general(
        x,
        values,
        (((2,), (contract,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _take(rows: Any, index: jax.Array) -> jax.Array:
    """rows[index] as float32 [..., 512], for an index that is in range."""
    # keeps XLA on a CPU from widening all FP8 codes, outside the loops, to gather from a float16 copy
    rows, index = lax.optimization_barrier((rows, index))
    tile = jax.tree.map(lambda x: x.at[index].get(mode="promise_in_bounds"), rows)
    return dequantize_latent(tile) if isinstance(tile, Fp8Latent) else tile.astype(jnp.float32)
