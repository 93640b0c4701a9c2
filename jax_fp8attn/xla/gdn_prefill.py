"""``gdn_prefill`` in jax.numpy: chunks of 64 tokens in WY form, all products in float32.

Chunks are counted from the first token of each sequence and taken in blocks: what does not depend on the state is
prepared for a whole block at once, then the state runs through its chunks. Symbols are those of docs/numerics.md.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import GDN_CHUNK, GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem

HARD_RESET = -30.0  # a gate from here down clears the state
CLEARED = -200.0  # exp is exactly 0, and 64 of them are still a finite sum
SUBSTITUTED_ROWS = 16
BLOCK_CHUNKS = 32
BLOCK_ELEMENTS = 1 << 22  # of the largest operand of a block

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def supports(problem: GdnProblem | GdnPoolProblem, device: Device) -> tuple[str, ...]:
    return ()


def run(problem: GdnProblem | GdnPoolProblem, arrays: GdnArrays | GdnPoolArrays) -> Any:
    return _run_pool(problem, arrays) if isinstance(problem, GdnPoolProblem) else _run_split(problem, arrays)


def _run_split(problem: GdnProblem, arrays: GdnArrays) -> Any:
    results = _forward(problem, arrays)
    if problem.transition:
        return results.final[..., : problem.k_width], results.final[..., problem.k_width :]
    given = [results.out]
    if problem.return_final_state:
        given.append(results.final)
    if problem.checkpoint_every:
        given.append(results.checkpoints)
    return tuple(given) if len(given) > 1 else given[0]


def _run_pool(problem: GdnPoolProblem, arrays: GdnPoolArrays) -> Any:
    split = problem.split
    q, k, v = jnp.split(arrays.qkv, _edges(problem), axis=1)
    starts = arrays.slots >= 0
    initial = arrays.pool[jnp.where(starts, arrays.slots, 0)]
    a_log, dt_bias = (_per_token(x, problem.tokens) for x in (arrays.A_log, arrays.dt_bias))
    results = _forward(
        split,
        GdnArrays(
            q=q.reshape(problem.tokens, problem.q_heads, problem.k_width),
            k=k.reshape(problem.tokens, problem.k_heads, problem.k_width),
            v=v.reshape(problem.tokens, problem.v_heads, problem.v_width),
            g=-jnp.exp(a_log) * jax.nn.softplus(arrays.a.astype(jnp.float32) + dt_bias),
            beta=jax.nn.sigmoid(arrays.b.astype(jnp.float32)),
            start=arrays.start,
            length=arrays.length,
            chunk_sequence=arrays.chunk_sequence,
            chunk_index=arrays.chunk_index,
            initial_state=jnp.where(starts[:, None, None, None], initial, 0),
            scale=arrays.scale,
        ),
    )
    pool = _put(arrays.pool, arrays.write_slots, results.final)
    if not problem.checkpoint_every:
        return results.out, pool
    if not problem.checkpoints_to_pool:
        return results.out, pool, results.checkpoints
    return results.out, _put(pool, _filled_only(split, arrays, arrays.checkpoint_slots), results.checkpoints)


def _edges(problem: GdnPoolProblem) -> tuple[int, int]:
    """Where k and v begin in a row of qkv."""
    k = problem.q_heads * problem.k_width
    return k, k + problem.k_heads * problem.k_width


def _per_token(x: jax.Array, tokens: int) -> jax.Array:
    """[instances, H] -> [T, H], or [1, H] for one instance."""
    return x if x.shape[0] == 1 else jnp.repeat(x, tokens // x.shape[0], axis=0, total_repeat_length=tokens)


def _put(buffer: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """buffer[rows] = values; negative rows write nothing."""
    outside = buffer.shape[0] + jnp.arange(rows.shape[0], dtype=jnp.int32)
    rows = jnp.where(rows >= 0, rows, outside)
    return buffer.at[rows].set(values.astype(buffer.dtype), mode="drop", unique_indices=True)


def _checkpoint_base(problem: GdnProblem, length: jax.Array) -> jax.Array:
    """int32 [B]: the first checkpoint row of each sequence; each instance has rows of its own."""
    count = (length // problem.checkpoint_every).reshape(problem.instances, -1)
    base = jnp.cumsum(count, axis=1, dtype=jnp.int32) - count
    own = problem.checkpoints // problem.instances
    return (base + own * jnp.arange(problem.instances, dtype=jnp.int32)[:, None]).reshape(-1)


def _filled_only(problem: GdnProblem, arrays: GdnPoolArrays, slots: jax.Array) -> jax.Array:
    """The slots of checkpoint rows that hold a checkpoint; -1 for the others."""
    own = problem.checkpoints // problem.instances
    filled = jnp.sum((arrays.length // problem.checkpoint_every).reshape(problem.instances, -1), axis=1)
    return jnp.where(jnp.arange(own) < filled[:, None], slots.reshape(problem.instances, own), -1).reshape(-1)


class _Results(NamedTuple):
    """What the call asks for, or its cotangents; the rest is None."""

    out: jax.Array | None  # [T, H, V]
    final: jax.Array | None  # [B, *state_shape]
    checkpoints: jax.Array | None  # [checkpoints, *state_shape]


class _Places(NamedTuple):
    """Where the n chunks of a block come from and go to."""

    token: jax.Array  # int32 [n, 64]; rows that are not there point past the last token
    valid: jax.Array  # bool [n, 64]
    sequence: jax.Array  # int32 [n]; 0 for a chunk that is not there
    first: jax.Array  # bool [n]: the first chunk of its sequence
    final_row: jax.Array  # int32 [n]: where the state goes after the chunk; -1: nowhere
    checkpoint_row: jax.Array | None


class _Operands(NamedTuple):
    """What a block computes with, in the dtypes of the call; rows that are not there are 0."""

    q: jax.Array | None  # [n, 64, Hq, K]
    k: jax.Array  # [n, 64, Hk, K]
    v: jax.Array  # [n, 64, Hv, V]
    g: jax.Array  # [n, 64, H]
    beta: jax.Array  # [n, 64, H]
    initial_state: jax.Array | None  # [n, *state_shape]; 0 unless the chunk is a first one
    scale: jax.Array  # [n]


class _Blocks(NamedTuple):
    """The chunk list cut into blocks."""

    sequence: jax.Array  # int32 [blocks, n]
    index: jax.Array  # int32 [blocks, n]
    used: jax.Array  # int32 []: blocks that hold a chunk
    checkpoint_base: jax.Array | None  # int32 [B]


def _blocks(problem: GdnProblem, arrays: GdnArrays) -> _Blocks:
    widest = GDN_CHUNK * problem.heads * max(problem.k_width, problem.v_width)
    size = max(1, min(BLOCK_CHUNKS, BLOCK_ELEMENTS // widest, problem.max_chunks))
    count = -(-problem.max_chunks // size)
    pad = (0, count * size - problem.max_chunks)
    sequence = jnp.pad(arrays.chunk_sequence, pad, constant_values=-1)
    chunks = jnp.sum(sequence >= 0, dtype=jnp.int32)
    base = _checkpoint_base(problem, arrays.length) if problem.checkpoint_every else None
    return _Blocks(
        sequence.reshape(count, size), jnp.pad(arrays.chunk_index, pad).reshape(count, size), -(-chunks // size), base
    )


def _places(problem: GdnProblem, arrays: GdnArrays, blocks: _Blocks, block: jax.Array) -> _Places:
    sequence, index = blocks.sequence[block], blocks.index[block]
    there = sequence >= 0
    sequence = jnp.maximum(sequence, 0)
    done = index * GDN_CHUNK
    rows = jnp.where(there, arrays.length[sequence] - done, 0)[:, None]
    offset = jnp.arange(GDN_CHUNK, dtype=jnp.int32)
    valid = offset < rows
    nowhere = problem.tokens + jnp.arange(valid.size, dtype=jnp.int32).reshape(valid.shape)
    token = jnp.where(valid, (arrays.start[sequence] + done)[:, None] + offset, nowhere)
    last = there & (rows[:, 0] <= GDN_CHUNK)
    checkpoint_row = None
    if problem.checkpoint_every:
        number, rest = jnp.divmod(done + GDN_CHUNK, problem.checkpoint_every)
        full = there & (rows[:, 0] >= GDN_CHUNK) & (rest == 0)
        checkpoint_row = jnp.where(full, blocks.checkpoint_base[sequence] + number - 1, -1)
    return _Places(token, valid, sequence, there & (index == 0), jnp.where(last, sequence, -1), checkpoint_row)


def _take(x: jax.Array, rows: jax.Array, there: jax.Array) -> jax.Array:
    """x[rows], 0 where ``there`` is False."""
    taken = x.at[rows].get(mode="clip")
    return jnp.where(there.reshape(*there.shape, *[1] * (taken.ndim - there.ndim)), taken, 0)


def _load(problem: GdnProblem, arrays: GdnArrays, places: _Places) -> _Operands:
    take = functools.partial(_take, rows=places.token, there=places.valid)
    initial = None
    if problem.has_initial_state:
        initial = _take(arrays.initial_state, places.sequence, places.first)
    return _Operands(
        q=None if problem.transition else take(arrays.q),
        k=take(arrays.k),
        v=take(arrays.v),
        g=jnp.where(places.valid[..., None], arrays.g.at[places.token].get(mode="clip"), _open_gate(problem)),
        beta=take(arrays.beta),
        initial_state=initial,
        scale=arrays.scale[_instance(problem, places)],
    )


def _open_gate(problem: GdnProblem) -> float:
    return 0.0 if problem.gate == "log" else 1.0


def _instance(problem: GdnProblem, places: _Places) -> jax.Array:
    return places.sequence // max(1, problem.sequences // problem.instances)


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """Gives each of ``heads`` heads (axis 1) the row of the group it belongs to."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


@jax.custom_jvp
def inverse_unit_lower(a: jax.Array) -> jax.Array:
    """(I + a)^-1 of strictly lower a [..., n, n]: substitution in blocks of 16 rows, then merges of neighbours.

    Never by powers of ``a``: on correlated keys they grow far beyond the inverse and cancel.
    """
    n = a.shape[-1]
    if n <= SUBSTITUTED_ROWS:
        return _substitute(a)
    h = n // 2
    top, bottom = inverse_unit_lower(jnp.stack([a[..., :h, :h], a[..., h:, h:]]))
    corner = -_matmul(_matmul(bottom, a[..., h:, :h]), top)
    upper = jnp.concatenate([top, jnp.zeros_like(top)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, bottom], axis=-1)], axis=-2)


def _substitute(a: jax.Array) -> jax.Array:
    """Row i of the inverse from the rows before it."""
    identity = jnp.zeros_like(a) + jnp.eye(a.shape[-1], dtype=a.dtype)

    def row(i: jax.Array, x: jax.Array) -> jax.Array:
        coefficients = lax.dynamic_slice_in_dim(a, i, 1, axis=-2)
        unit = lax.dynamic_slice_in_dim(x, i, 1, axis=-2)
        return lax.dynamic_update_slice_in_dim(x, unit - _matmul(coefficients, x), i, axis=-2)

    return lax.fori_loop(1, a.shape[-1], row, identity)


@inverse_unit_lower.defjvp
def _inverse_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    x = inverse_unit_lower(primals[0])
    return x, -_matmul(x, _matmul(tangents[0], x))


def _log_gates(problem: GdnProblem, g: jax.Array) -> jax.Array:
    """Natural-log gates [n, H, 64]; hard resets are ``CLEARED``."""
    g = jnp.swapaxes(g.astype(jnp.float32), 1, 2)
    if problem.gate == "log":
        return jnp.where(g <= HARD_RESET, CLEARED, g)
    hard = g <= math.exp(HARD_RESET)
    return jnp.where(hard, CLEARED, jnp.log(jnp.where(hard, 1.0, g)))


class _Decays(NamedTuple):
    """Products of gates. Each exponent is a sum of its own gates, never a difference of long sums."""

    within: jax.Array  # [n, H, 64, 64]: from token j to token i >= j; 0 above the diagonal
    from_start: jax.Array  # [n, H, 64]: from before the chunk to token i
    to_end: jax.Array  # [n, H, 64]: from token j to the end of the chunk


def _decays(log_gates: jax.Array) -> _Decays:
    lower = jnp.tril(jnp.ones((GDN_CHUNK, GDN_CHUNK), bool))
    after = jnp.where(jnp.tril(lower, -1), log_gates[..., :, None], 0.0)  # [n, H, m, j]: gate m > j
    sums = _einsum("im,...mj->...ij", lower.astype(jnp.float32), after)
    from_start = sums[..., 0] + log_gates[..., :1]
    return _Decays(jnp.where(lower, jnp.exp(sums), 0.0), jnp.exp(from_start), jnp.exp(sums[..., -1, :]))


def _block(problem: GdnProblem, first: jax.Array, state: jax.Array, operands: _Operands) -> tuple[jax.Array, ...]:
    """One block of n chunks: state [H, K, V] -> (state, out float32 [n, 64, H, V], states after each chunk)."""
    heads = problem.heads
    q, k, v = (None if x is None else jnp.swapaxes(x.astype(jnp.float32), 1, 2) for x in operands[:3])
    if problem.qk_l2norm:
        q, k = (None if x is None else _l2norm(x, problem.l2norm_eps) for x in (q, k))
    beta = jnp.swapaxes(operands.beta.astype(jnp.float32), 1, 2)  # [n, H, 64]
    decays = _decays(_log_gates(problem, operands.g))

    strict = jnp.tril(jnp.ones((GDN_CHUNK, GDN_CHUNK), bool), -1)
    kk = _repeat_heads(_einsum("nhik,nhjk->nhij", k, k), heads)
    x = inverse_unit_lower(jnp.where(strict, beta[..., None] * kk, 0.0)) * decays.within
    k_heads, v_heads = _repeat_heads(k, heads), _repeat_heads(v, heads)
    w = _einsum("nhij,nhjk->nhik", x * (beta * decays.from_start)[..., None, :], k_heads)
    u = _einsum("nhij,nhjv->nhiv", x * beta[..., None, :], v_heads)
    if problem.transition:
        u = jnp.concatenate([jnp.zeros_like(w), u], axis=-1)

    steps = (first, _initial(problem, operands, state, first), w, u)
    steps += (k_heads * decays.to_end[..., None], decays.from_start[..., -1])
    state, (before, y, after) = lax.scan(_chunk_step, state, steps)
    if problem.transition:
        return state, None, after

    qk = _einsum("nhik,nhjk->nhij", q, _repeat_heads(k, problem.q_heads))
    scores = _repeat_heads(qk, heads) * decays.within
    history = _einsum("nhik,nhkv->nhiv", _repeat_heads(q, heads), before)
    out = decays.from_start[..., None] * history + _einsum("nhij,nhjv->nhiv", scores, y)
    return state, jnp.swapaxes(operands.scale[:, None, None, None] * out, 1, 2), after


def _chunk_step(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    first, initial, w, u, k_to_end, decay = chunk
    before = jnp.where(first, initial, state)
    y = u - _einsum("hik,hkv->hiv", w, before)
    after = decay[:, None, None] * before + _einsum("hik,hiv->hkv", k_to_end, y)
    return after, (before, y, after)


def _l2norm(x: jax.Array, eps: float) -> jax.Array:
    return x * lax.rsqrt(_sum_of_squares(x) + eps)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    """Over the last axis, kept, by halves: XLA would choose the order of a reduction by the number of chunks."""
    width = 1 << (x.shape[-1] - 1).bit_length()
    squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
    while width > 1:
        width //= 2
        squares = squares[..., :width] + squares[..., width:]
    return squares


def _initial(problem: GdnProblem, operands: _Operands, state: jax.Array, first: jax.Array) -> jax.Array:
    """float32 [n, H, K, V]: the state before each first chunk."""
    if operands.initial_state is not None:
        return _from_stored(problem, operands.initial_state)
    start = jnp.zeros_like(state)
    if problem.transition:
        start = start + jnp.eye(*state.shape[1:], dtype=jnp.float32)
    return jnp.broadcast_to(start, (first.shape[0], *state.shape))


def _from_stored(problem: GdnProblem, states: jax.Array) -> jax.Array:
    """[..., *state_shape] -> float32 [..., H, K, V]."""
    states = states.astype(jnp.float32)
    return jnp.swapaxes(states, -1, -2) if problem.state_layout == "vk" else states


def _to_stored(problem: GdnProblem, states: jax.Array) -> jax.Array:
    states = states.astype(problem.state_dtype)
    return jnp.swapaxes(states, -1, -2) if problem.state_layout == "vk" else states


def _put_tokens(buffer: jax.Array, places: _Places, rows: jax.Array) -> jax.Array:
    """Writes rows [n, 64, ...] to their tokens."""
    return buffer.at[places.token].set(rows.astype(buffer.dtype), mode="drop", unique_indices=True)


def _as_varying(tree: Any, arrays: Any) -> Any:
    """Under shard_map loop carries must vary over every mesh axis that some operand varies over."""
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(arrays)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _start_state(problem: GdnProblem) -> jax.Array:
    columns = problem.v_width + (problem.k_width if problem.transition else 0)
    return jnp.zeros((problem.heads, problem.k_width, columns), jnp.float32)


def _states_without_tokens(problem: GdnProblem, arrays: GdnArrays) -> jax.Array:
    """[B, *state_shape]: the final state of every sequence if all were empty."""
    if problem.has_initial_state:
        return arrays.initial_state
    if problem.transition:
        state = _start_state(problem) + jnp.eye(*_start_state(problem).shape[1:], dtype=jnp.float32)
        return jnp.broadcast_to(state, (problem.sequences, *state.shape))
    return jnp.zeros((problem.sequences, *problem.state_shape), problem.state_dtype)


def _forward(problem: GdnProblem, arrays: GdnArrays) -> _Results:
    out = final = checkpoints = None
    if not problem.transition:
        out = jnp.zeros((problem.tokens, problem.heads, problem.v_width), problem.out_dtype)
    if problem.return_final_state:
        final = _states_without_tokens(problem, arrays)
    if problem.checkpoint_every:
        checkpoints = jnp.zeros((problem.checkpoints, *problem.state_shape), problem.state_dtype)
    results = _Results(out, final, checkpoints)
    if not problem.max_chunks:
        return results
    blocks = _blocks(problem, arrays)

    def step(block: jax.Array, carry: tuple[jax.Array, _Results]) -> tuple[jax.Array, _Results]:
        state, (out, final, checkpoints) = carry
        places = _places(problem, arrays, blocks, block)
        state, rows, after = _block(problem, places.first, state, _load(problem, arrays, places))
        after = _to_stored(problem, after)
        if out is not None:
            out = _put_tokens(out, places, rows)
        if final is not None:
            final = _put(final, places.final_row, after)
        if checkpoints is not None:
            checkpoints = _put(checkpoints, places.checkpoint_row, after)
        return state, _Results(out, final, checkpoints)

    carry = _as_varying((_start_state(problem), results), arrays)
    return lax.fori_loop(jnp.int32(0), blocks.used, step, carry)[1]


def vjp(problem: GdnProblem, arrays: GdnArrays, cotangents: Any) -> GdnArrays:
    """The cotangents of ``arrays`` (None for its integers): blocks in reverse order, each recomputed from its state.

    Saves one state a block and nothing else.
    """
    given = arrays
    arrays = _as_varying(arrays, arrays)
    cotangents = _as_varying(_sort_cotangents(problem, cotangents), arrays)
    gradients = _as_varying(_gradient_buffers(problem, arrays, cotangents), arrays)
    if problem.max_chunks:
        gradients = _reverse_blocks(problem, arrays, cotangents, gradients)
    return jax.tree.map(_summed_like, gradients, given.floats())


def _summed_like(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """Sums over the mesh axes that the primal does not vary over."""
    axes = tuple(sorted(_varying_axes(gradient) - _varying_axes(primal)))
    return lax.psum(gradient, axes) if axes else gradient


def _sort_cotangents(problem: GdnProblem, cotangents: Any) -> _Results:
    if problem.transition:
        return _Results(None, jnp.concatenate(cotangents, axis=-1), None)
    present = (True, problem.return_final_state, bool(problem.checkpoint_every))
    values = iter(cotangents if sum(present) > 1 else (cotangents,))
    return _Results(*(next(values) if p else None for p in present))


def _gradient_buffers(problem: GdnProblem, arrays: GdnArrays, cotangents: _Results) -> GdnArrays:
    """Zeros; the final state of an empty sequence is its initial state."""
    zeros = jax.tree.map(jnp.zeros_like, arrays.floats())
    if problem.has_initial_state and problem.return_final_state:
        zeros = zeros._replace(initial_state=cotangents.final)
    return zeros


def _reverse_blocks(problem: GdnProblem, arrays: GdnArrays, cotangents: _Results, gradients: GdnArrays) -> GdnArrays:
    blocks = _blocks(problem, arrays)
    start = _as_varying(_start_state(problem), arrays)
    states = jnp.zeros_like(start, shape=(blocks.sequence.shape[0], *start.shape))

    def forward(block: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        state, states = carry
        places = _places(problem, arrays, blocks, block)
        after = _block(problem, places.first, state, _load(problem, arrays, places))[0]
        return after, states.at[block].set(state)

    states = lax.fori_loop(jnp.int32(0), blocks.used, forward, (start, states))[1]

    def backward(number: jax.Array, carry: tuple[jax.Array, GdnArrays]) -> tuple[jax.Array, GdnArrays]:
        state_cotangent, gradients = carry
        block = blocks.used - 1 - number
        places = _places(problem, arrays, blocks, block)
        function = functools.partial(_block, problem, places.first)
        _, pull = jax.vjp(function, states[block], _load(problem, arrays, places))
        state_cotangent, operands = pull((state_cotangent, *_load_cotangents(problem, cotangents, places)))
        return state_cotangent, _store_gradients(problem, gradients, places, operands)

    return lax.fori_loop(jnp.int32(0), blocks.used, backward, (jnp.zeros_like(start), gradients))[1]


def _load_cotangents(problem: GdnProblem, cotangents: _Results, places: _Places) -> tuple[jax.Array | None, jax.Array]:
    """Of a block's output rows [n, 64, H, V] and of the states after its chunks [n, H, K, V], float32."""
    rows = None
    if not problem.transition:
        rows = _take(cotangents.out, places.token, places.valid).astype(jnp.float32)
    shape = (places.sequence.shape[0], *_start_state(problem).shape)
    after = _as_varying(jnp.zeros(shape, jnp.float32), cotangents)
    for states, row in ((cotangents.final, places.final_row), (cotangents.checkpoints, places.checkpoint_row)):
        if states is not None:
            after = after + _from_stored(problem, _take(states, jnp.maximum(row, 0), row >= 0))
    return rows, after


def _store_gradients(problem: GdnProblem, gradients: GdnArrays, places: _Places, operands: _Operands) -> GdnArrays:
    tokens = {
        name: _put_tokens(getattr(gradients, name), places, getattr(operands, name))
        for name in ("q", "k", "v", "g", "beta")
        if getattr(operands, name) is not None
    }
    initial = gradients.initial_state
    if problem.has_initial_state:
        initial = _put(initial, jnp.where(places.first, places.sequence, -1), operands.initial_state)
    scale = jnp.where(places.valid[:, 0], operands.scale, 0.0)
    scale = gradients.scale.at[_instance(problem, places)].add(scale)
    return gradients._replace(**tokens, initial_state=initial, scale=scale)
