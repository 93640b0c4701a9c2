"""``mla_prefill`` in jax.numpy: blocks of queries over blocks of keys, online softmax in float32.

A tile is a run of query rows of one sequence; its keys are taken in blocks counted from the sequence's first key, so
that a sequence is computed alike wherever it stands in a batch. Scores exist for one tile and one block at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.dispatch import Device
from jax_fp8attn.folding import as_varying
from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import E4M3, quantize_output, to_stored
from jax_fp8attn.xla.merge import merge_weights, weighted

BLOCK_Q = 128
BLOCK_K = 256

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def supports(problem: MlaProblem, device: Device) -> tuple[str, ...]:
    return ()


def notes(problem: MlaProblem) -> tuple[str, ...]:
    return ("FP8 output: separate pass inside the op",) if problem.output_quant is not None else ()


def run(problem: MlaProblem, arrays: MlaArrays) -> Any:
    if problem.tokens and problem.keys and problem.sequences and problem.heads:
        out, lse = _attention(problem, arrays)
    else:
        out = jnp.zeros((problem.tokens, problem.heads, problem.v_width), jnp.float32)
        lse = jnp.full((problem.tokens, problem.heads), -jnp.inf)
    if problem.state_dtype is not None:
        out, lse = _merge_initial_state(problem, arrays, out, lse)
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, lse.T) if problem.return_lse else out


def _merge_initial_state(
    problem: MlaProblem, arrays: MlaArrays, out: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows outside every sequence take nothing from the state."""
    inside = jnp.zeros(problem.tokens + 1, jnp.int32)
    inside = inside.at[arrays.q_start].add(1).at[arrays.q_start + arrays.q_length].add(-1)
    inside = (jnp.cumsum(inside)[:-1] > 0)[:, None]  # [T, 1]
    state_lse = arrays.initial_lse.T
    state_lse = jnp.where(inside & ~jnp.isposinf(state_lse), state_lse, -jnp.inf)
    (state_weight, weight), lse = merge_weights([state_lse, lse])
    return weighted(state_weight, arrays.initial_out) + weighted(weight, out), lse


class _Operands(NamedTuple):
    """Operands as the products see them, and what the products are multiplied with."""

    q: jax.Array
    k: jax.Array
    k_rope: jax.Array | None
    v: jax.Array
    logit_scale: jax.Array  # float32 [instances]
    v_scale: jax.Array


def _load_operands(problem: MlaProblem, arrays: MlaArrays) -> _Operands:
    fp8 = problem.compute == "fp8"
    one = jnp.ones_like(arrays.v_scale)

    def per_row(x: jax.Array, scale: jax.Array) -> jax.Array:
        """Each instance has its own scale."""
        rows = jnp.repeat(scale, x.shape[0] // problem.instances, total_repeat_length=x.shape[0])
        return rows.reshape(-1, *[1] * (x.ndim - 1))

    def load(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The operand as stored, and what its products are multiplied with."""
        if x.dtype == E4M3 or not fp8:
            return x, scale if x.dtype == E4M3 else one
        return to_stored(x, scale[0] if problem.instances == 1 else per_row(x, scale)), scale

    q, q_scale = load(arrays.q, arrays.q_scale)
    k, k_rope = arrays.k, arrays.k_rope
    if not fp8 and k_rope is not None and (k.dtype == E4M3) != (k_rope.dtype == E4M3):
        # one part has a scale and the other has not: both as true values
        k, k_rope = (x.astype(jnp.float32) * per_row(x, arrays.k_scale) if x.dtype == E4M3 else x for x in (k, k_rope))
    if k_rope is not None:
        k_rope, _ = load(k_rope, arrays.k_scale)
    k, k_scale = load(k, arrays.k_scale)
    v, v_scale = load(arrays.v, arrays.v_scale)
    return _Operands(q, k, k_rope, v, q_scale * k_scale * arrays.softmax_scale, v_scale)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Static sizes; a block never exceeds the array it is cut from."""

    q: int
    k: int
    tiles: int

    @classmethod
    def of(cls, problem: MlaProblem) -> _Blocks:
        mean = -(-problem.tokens // problem.sequences)
        q = min(BLOCK_Q, max(16, 1 << (mean - 1).bit_length()), problem.tokens)
        return cls(q, min(BLOCK_K, problem.keys), problem.tokens // q + problem.sequences)


class _Tile(NamedTuple):
    """Query rows first..first+rows of one sequence."""

    sequence: jax.Array
    local: jax.Array  # index of the first row in its sequence
    rows: jax.Array  # 0: an unused slot of the work list


def _tiles(arrays: MlaArrays, blocks: _Blocks) -> _Tile:
    per_sequence = -(-arrays.q_length // blocks.q)
    last = jnp.cumsum(per_sequence)
    slot = jnp.arange(blocks.tiles, dtype=jnp.int32)
    sequence = jnp.searchsorted(last, slot, side="right").astype(jnp.int32)
    used = slot < last[-1]
    sequence = jnp.where(used, sequence, 0)
    local = (slot - (last - per_sequence)[sequence]) * blocks.q
    rows = jnp.where(used, jnp.minimum(arrays.q_length[sequence] - local, blocks.q), 0)
    return _Tile(sequence, jnp.where(used, local, 0), rows)


def _attention(problem: MlaProblem, arrays: MlaArrays) -> tuple[jax.Array, jax.Array]:
    """float32 out [T, H, 128] and lse [T, H]."""
    operands = _load_operands(problem, arrays)
    blocks = _Blocks.of(problem)
    room = problem.tokens + blocks.q  # a whole tile fits behind the last token
    empty = (
        jnp.zeros((room, problem.heads, problem.v_width), jnp.float32),
        jnp.full((room, problem.heads), -jnp.inf, jnp.float32),
    )

    def step(results: tuple[jax.Array, jax.Array], tile: _Tile) -> tuple[tuple[jax.Array, jax.Array], None]:
        first = arrays.q_start[tile.sequence] + tile.local
        new = _tile(problem, arrays, operands, blocks, tile, first)
        return tuple(_write_rows(old, x, first, tile.rows) for old, x in zip(results, new, strict=True)), None

    out, lse = lax.scan(step, as_varying(empty, arrays), _tiles(arrays, blocks))[0]
    return out[: problem.tokens], lse[: problem.tokens]


def _read_rows(source: jax.Array, first: jax.Array, count: int) -> jax.Array:
    """float32 rows first..first+count; past the end the last one again, so that a row keeps its place in the block."""
    return source[jnp.minimum(first + jnp.arange(count, dtype=jnp.int32), source.shape[0] - 1)].astype(jnp.float32)


def _write_rows(target: jax.Array, rows: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    owned = jnp.arange(rows.shape[0]) < count
    old = lax.dynamic_slice_in_dim(target, first, rows.shape[0])
    rows = jnp.where(owned.reshape(-1, *[1] * (rows.ndim - 1)), rows, old)
    return lax.dynamic_update_slice_in_dim(target, rows, first, 0)


class _Softmax(NamedTuple):
    """The running softmax of a tile."""

    top: jax.Array  # [H, Q] largest score so far
    total: jax.Array  # [H, Q] sum of exp(score - top)
    out: jax.Array  # [H, Q, 128]


def _tile(
    problem: MlaProblem, arrays: MlaArrays, operands: _Operands, blocks: _Blocks, tile: _Tile, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """out [Q, H, 128] and lse [Q, H] of the tile whose first token is ``first``."""
    q_length, k_length = arrays.q_length[tile.sequence], arrays.k_length[tile.sequence]
    row = jnp.arange(blocks.q, dtype=jnp.int32)
    visible = tile.local + row + 1 + k_length - q_length if problem.causal else k_length
    visible = jnp.where(row < tile.rows, jnp.clip(visible, 0, k_length), 0)  # [Q] a row sees keys 0..visible
    instance = tile.sequence // (problem.sequences // problem.instances)
    q = _read_rows(operands.q, first, blocks.q)
    step = functools.partial(
        _block, operands, blocks, q, visible, arrays.k_start[tile.sequence], operands.logit_scale[instance]
    )
    heads = problem.heads
    start = _Softmax(
        jnp.full((heads, blocks.q), -jnp.inf, jnp.float32),
        jnp.zeros((heads, blocks.q), jnp.float32),
        jnp.zeros((heads, blocks.q, problem.v_width), jnp.float32),
    )
    top, total, out = lax.fori_loop(0, -(-jnp.max(visible) // blocks.k), step, as_varying(start, arrays))
    some = (visible > 0)[None]
    out = jnp.where(some[..., None], out / total[..., None] * operands.v_scale[instance], 0.0)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    return jnp.swapaxes(out, 0, 1), lse.T


def _block(
    operands: _Operands,
    blocks: _Blocks,
    q: jax.Array,
    visible: jax.Array,
    k_start: jax.Array,
    scale: jax.Array,
    number: jax.Array,
    state: _Softmax,
) -> _Softmax:
    """One block of keys: scores, running maximum, weighted values."""
    local = number * blocks.k
    first = k_start + local
    seen = local + jnp.arange(blocks.k, dtype=jnp.int32) < visible[:, None]  # [Q, K]
    k = _read_rows(operands.k, first, blocks.k)
    if operands.k_rope is not None:
        rope = _read_rows(operands.k_rope, first, blocks.k)
        rope = jnp.broadcast_to(rope[:, None], (*k.shape[:2], rope.shape[-1]))
        k = jnp.concatenate([k, rope], axis=-1)
    score = jnp.where(seen, _einsum("qhd,khd->hqk", q, k) * scale, -jnp.inf)
    top = jnp.maximum(state.top, jnp.max(score, axis=-1))
    anchor = jnp.where(jnp.isneginf(top), 0.0, top)
    p = jnp.exp(score - anchor[..., None])
    shrink = jnp.exp(state.top - anchor)
    v = _read_rows(operands.v, first, blocks.k)
    return _Softmax(
        top,
        state.total * shrink + jnp.sum(p, axis=-1),
        state.out * shrink[..., None] + weighted_values(p, seen, v),
    )


def weighted_values(p: jax.Array, seen: jax.Array, v: jax.Array) -> jax.Array:
    """p [H, Q, K] times v [K, H, D]; an unseen key adds nothing even if v holds NaN or inf there."""
    finite = jnp.isfinite(v)
    out = _einsum("hqk,khd->hqd", p, jnp.where(finite, v, 0.0))

    def add_nonfinite(key: jax.Array, out: jax.Array) -> jax.Array:
        """0 * inf and NaN of seen keys as IEEE has them."""
        there = seen[:, key, None] & ~finite[key][:, None]  # [H, Q, D]
        return out + jnp.where(there, p[..., key, None] * v[key][:, None], 0.0)

    return lax.fori_loop(0, jnp.where(jnp.all(finite), 0, v.shape[0]), add_nonfinite, out)
