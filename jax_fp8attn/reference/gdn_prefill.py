"""Oracle of ``gdn_prefill``: the recurrence token by token, in float32 or float64.

``emulated`` is the chunked form with bfloat16 roundings where a GPU kernel has them: the yardstick of its error.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.folding import as_varying
from jax_fp8attn.problems import GDN_CHUNK, GdnArrays, GdnPoolProblem, GdnProblem
from jax_fp8attn.reference.precision import exact_float

HARD_RESET = -30.0
HIGHEST = lax.Precision.HIGHEST


def supports(problem: Any, device: Any) -> tuple[str, ...]:
    return ()


def run(problem: GdnProblem | GdnPoolProblem, arrays: Any) -> Any:
    if isinstance(problem, GdnPoolProblem):
        return _run_pool(problem, arrays)
    if problem.transition:
        return transition(problem, arrays)
    out, final, checkpoints = sequential(problem, arrays)
    results = [out.astype(problem.out_dtype)]
    if problem.return_final_state:
        results.append(_stored(problem, final))
    if problem.checkpoint_every:
        results.append(_stored(problem, checkpoints))
    return tuple(results) if len(results) > 1 else results[0]


def sequential(problem: GdnProblem, arrays: GdnArrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unrounded o [T, H, V], final states [B, H, K, V] and checkpoints [checkpoints, H, K, V]."""
    dtype = exact_float()
    heads = problem.heads
    q, k, v = (_per_state_head(x.astype(dtype), heads) for x in arrays[:3])
    if problem.qk_l2norm:
        q, k = (x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + problem.l2norm_eps) for x in (q, k))
    decay = gates(problem, arrays.g.astype(dtype))
    beta = arrays.beta.astype(dtype)
    initial = jnp.zeros((problem.sequences, heads, problem.k_width, problem.v_width), dtype)
    if problem.has_initial_state:
        initial = _from_stored(problem, arrays.initial_state.astype(dtype))
    checkpoints = jnp.zeros((problem.checkpoints, heads, problem.k_width, problem.v_width), dtype)
    if not problem.sequences or not problem.tokens:
        return jnp.zeros((problem.tokens, heads, problem.v_width), dtype), initial, checkpoints
    sequence, position = _places(arrays, problem.tokens)
    row = _checkpoint_rows(problem, arrays.length, sequence, position)
    scale = jnp.repeat(arrays.scale.astype(dtype), problem.tokens // problem.instances)

    def token(carry: Any, t: jax.Array) -> Any:
        state, final, checkpoints = carry
        b, inside = jnp.maximum(sequence[t], 0), sequence[t] >= 0
        state = jnp.where(position[t] == 0, initial[b], state)
        state = jnp.where(decay[t, :, None, None] == 0, 0.0, decay[t, :, None, None] * state)
        recalled = jnp.einsum("hk,hkv->hv", k[t], state, precision=HIGHEST)
        new = beta[t, :, None] * (v[t] - recalled)
        state = state + k[t, :, :, None] * new[:, None, :]
        out = scale[t] * jnp.einsum("hk,hkv->hv", q[t], state, precision=HIGHEST)
        final = jnp.where(inside, final.at[b].set(state), final)
        if problem.checkpoints:
            checkpoints = jnp.where(row[t] >= 0, checkpoints.at[row[t]].set(state), checkpoints)
        return (state, final, checkpoints), jnp.where(inside, out, 0.0)

    start = as_varying((jnp.zeros_like(initial[0]), initial, checkpoints), arrays)
    (_, final, checkpoints), out = lax.scan(token, start, jnp.arange(problem.tokens))
    return out, final, checkpoints


def gates(problem: GdnProblem, g: jax.Array) -> jax.Array:
    """a_t [T, H]; a gate of -30 and less is an exact 0."""
    if problem.gate == "log":
        return jnp.where(g <= HARD_RESET, 0.0, jnp.exp(g))
    return jnp.where(g <= jnp.exp(jnp.asarray(HARD_RESET, g.dtype)), 0.0, g)


def transition(problem: GdnProblem, arrays: GdnArrays) -> tuple[jax.Array, jax.Array]:
    """M, N of every sequence: the final states of K + V columns that start from the identity and from 0."""
    k_width = problem.k_width
    wide = GdnProblem(
        tokens=problem.tokens,
        sequences=problem.sequences,
        q_heads=problem.q_heads,
        k_heads=problem.k_heads,
        v_heads=problem.v_heads,
        k_width=k_width,
        v_width=k_width + problem.v_width,
        dtype=problem.dtype,
        out_dtype=problem.out_dtype,
        state_dtype=problem.state_dtype,
        gate=problem.gate,
        qk_l2norm=problem.qk_l2norm,
        l2norm_eps=problem.l2norm_eps,
        state_layout="kv",
        has_initial_state=True,
        instances=problem.instances,
    )
    identity = jnp.eye(k_width, k_width + problem.v_width, dtype=jnp.float32)
    columns = arrays._replace(
        q=jnp.zeros((problem.tokens, problem.q_heads, k_width), arrays.k.dtype),
        v=jnp.pad(arrays.v, ((0, 0), (0, 0), (k_width, 0))),
        initial_state=jnp.broadcast_to(identity, (problem.sequences, *wide.state_shape)),
    )
    final = sequential(wide, columns)[1].astype(jnp.float32)
    return final[..., :k_width], final[..., k_width:]


def _run_pool(problem: GdnPoolProblem, arrays: Any) -> Any:
    split = problem.split
    out, final, *checkpoints = run(split, unpacked(problem, arrays))
    pool = _write(arrays.pool, arrays.write_slots, final)
    if not checkpoints:
        return out, pool
    (checkpoints,) = checkpoints
    if not problem.checkpoints_to_pool:
        return out, pool, checkpoints
    filled = jnp.sum((arrays.length // problem.checkpoint_every).reshape(problem.instances, -1), axis=1)
    number = jnp.arange(split.checkpoints) % max(1, split.checkpoints // problem.instances)
    there = number < jnp.repeat(filled, split.checkpoints // problem.instances)
    return out, _write(pool, jnp.where(there, arrays.checkpoint_slots, -1), checkpoints)


def unpacked(problem: GdnPoolProblem, arrays: Any) -> GdnArrays:
    """The packed call as a split one: columns of qkv, gates from a and b, states from the pool."""
    dtype = exact_float()
    T, K, V = problem.tokens, problem.k_width, problem.v_width
    q_end = problem.q_heads * K
    k_end = q_end + problem.k_heads * K
    per_token = T // problem.instances
    a_log, dt_bias = (jnp.repeat(x.astype(dtype), per_token, axis=0) for x in (arrays.A_log, arrays.dt_bias))
    x = arrays.a.astype(dtype) + dt_bias
    states = jnp.concatenate([jnp.zeros_like(arrays.pool[:1]), arrays.pool])
    return GdnArrays(
        q=arrays.qkv[:, :q_end].reshape(T, problem.q_heads, K),
        k=arrays.qkv[:, q_end:k_end].reshape(T, problem.k_heads, K),
        v=arrays.qkv[:, k_end:].reshape(T, problem.v_heads, V),
        g=-jnp.exp(a_log) * jnp.logaddexp(x, 0.0),
        beta=1 / (1 + jnp.exp(-arrays.b.astype(dtype))),
        start=arrays.start,
        length=arrays.length,
        chunk_sequence=arrays.chunk_sequence,
        chunk_index=arrays.chunk_index,
        initial_state=states[arrays.slots + 1],
        scale=arrays.scale,
    )


def _write(pool: jax.Array, rows: jax.Array, states: jax.Array) -> jax.Array:
    def write(i: jax.Array, pool: jax.Array) -> jax.Array:
        return jnp.where(rows[i] >= 0, pool.at[rows[i]].set(states[i]), pool)

    return lax.fori_loop(0, rows.shape[0], write, pool) if rows.shape[0] else pool


def _per_state_head(x: jax.Array, heads: int) -> jax.Array:
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def _from_stored(problem: GdnProblem, states: jax.Array) -> jax.Array:
    return jnp.swapaxes(states, -1, -2) if problem.state_layout == "vk" else states


def _stored(problem: GdnProblem, states: jax.Array) -> jax.Array:
    return _from_stored(problem, states).astype(problem.state_dtype)


def _places(arrays: GdnArrays, tokens: int) -> tuple[jax.Array, jax.Array]:
    """int32 [T]: the sequence of each token (-1: none) and its position in it."""
    t = jnp.arange(tokens)[:, None]
    inside = (t >= arrays.start) & (t < arrays.start + arrays.length)
    sequence = jnp.where(inside.any(axis=1), jnp.argmax(inside, axis=1), -1)
    return sequence, t[:, 0] - arrays.start[sequence]


def _checkpoint_rows(problem: GdnProblem, length: jax.Array, sequence: jax.Array, position: jax.Array) -> jax.Array:
    """int32 [T]: the checkpoint row that takes the state after each token; -1: none."""
    m = problem.checkpoint_every
    if not m:
        return jnp.full(problem.tokens, -1)
    count = (length // m).reshape(problem.instances, -1)
    before = (jnp.cumsum(count, axis=1) - count).reshape(-1)
    b = jnp.maximum(sequence, 0)
    instance = b // (problem.sequences // problem.instances)
    first = instance * (problem.checkpoints // problem.instances) + before[b]
    return jnp.where((sequence >= 0) & ((position + 1) % m == 0), first + position // m, -1)


def emulated(problem: GdnProblem, arrays: GdnArrays) -> tuple[jax.Array, jax.Array]:
    """o [T, H, V] in the output dtype and unrounded final states [B, H, K, V], rounded on the way like a kernel.

    Products take bfloat16 operands and accumulate exactly. The gated inverse goes in two halves; with precision "high"
    so do W, the state and the new values, and U is not rounded.
    """
    dtype = exact_float()
    heads, k_width, v_width = problem.heads, problem.k_width, problem.v_width
    padded = [jnp.pad(x.astype(dtype), ((0, GDN_CHUNK), (0, 0), (0, 0))) for x in arrays[:3]]
    q, k, v = (jnp.swapaxes(_per_state_head(x, heads), 0, 1) for x in padded)  # [H, T + 64, D]
    g, beta = (jnp.pad(x.astype(dtype), ((0, GDN_CHUNK), (0, 0))).T for x in (arrays.g, arrays.beta))
    initial = jnp.zeros((problem.sequences, heads, k_width, v_width), dtype)
    if problem.has_initial_state:
        initial = _from_stored(problem, arrays.initial_state.astype(dtype))

    def chunk(carry: Any, place: Any) -> Any:
        state, final, out = carry
        b, index = place
        there, b = b >= 0, jnp.maximum(b, 0)
        token = arrays.start[b] + GDN_CHUNK * index
        valid = jnp.arange(GDN_CHUNK) < jnp.where(there, arrays.length[b] - GDN_CHUNK * index, 0)
        rows = [jnp.where(valid[:, None], _rows(x, token), 0.0) for x in (q, k, v)]
        gates_of = [jnp.where(valid, _rows(x, token), 0.0) for x in (_log(problem, g), beta)]
        state = jnp.where(there & (index == 0), initial[b], state)
        new_out, state = _emulated_chunk(problem, rows, gates_of, state)
        written = jnp.where(
            valid[:, None], arrays.scale[b // (problem.sequences // problem.instances)] * new_out, _rows(out, token)
        )
        out = lax.dynamic_update_slice_in_dim(out, written, token, axis=1)
        return (state, jnp.where(there, final.at[b].set(state), final), out), None

    start = (jnp.zeros_like(initial[0]), initial, jnp.zeros((heads, problem.tokens + GDN_CHUNK, v_width), dtype))
    (_, final, out), _ = lax.scan(chunk, start, (arrays.chunk_sequence, arrays.chunk_index))
    return jnp.swapaxes(out[:, : problem.tokens], 0, 1).astype(problem.out_dtype), final


def _rows(x: jax.Array, token: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, token, GDN_CHUNK, axis=1)


def _log(problem: GdnProblem, g: jax.Array) -> jax.Array:
    """Finite log gates: -200 stands for a hard reset, exp of it is as good as 0."""
    if problem.gate == "alpha":
        g = jnp.log(jnp.maximum(g, 1e-30))
    return jnp.where(g <= HARD_RESET, -200.0, g)


def _emulated_chunk(problem: GdnProblem, rows: Any, gates_of: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(o without its scale [H, 64, V], the state after the chunk)."""
    (q, k, v), (g, beta) = rows, gates_of
    high = problem.precision == "high"
    rq = rk = jnp.ones_like(beta)
    if problem.qk_l2norm:
        rq, rk = ((jnp.sum(x * x, axis=-1) + problem.l2norm_eps) ** -0.5 for x in (q, k))
    lower = jnp.tril(jnp.ones((GDN_CHUNK, GDN_CHUNK), bool))
    c = jnp.cumsum(g, axis=-1)
    decay = jnp.where(lower, jnp.exp(jnp.where(lower, c[:, :, None] - c[:, None, :], 0.0)), 0.0)
    kk = _dot(k, jnp.swapaxes(k, 1, 2)) * rk[:, :, None] * rk[:, None, :]
    a = jnp.where(jnp.tril(lower, -1), beta[:, :, None] * kk, 0.0)
    identity = jnp.broadcast_to(jnp.eye(GDN_CHUNK, dtype=a.dtype), a.shape)
    xg = decay * jax.scipy.linalg.solve_triangular(identity + a, identity, lower=True, unit_diagonal=True)

    w = _dot(xg * (beta * jnp.exp(c) * rk)[:, None, :], k, halves=(2, 1))
    u = _dot(xg * beta[:, None, :], v, halves=(2, 1))
    parts = 2 if high else 1
    y = (u if high else _bfloat16(u)) - _dot(w, state, halves=(parts, parts))
    scores = _dot(q, jnp.swapaxes(k, 1, 2)) * rq[:, :, None] * rk[:, None, :] * decay
    out = (jnp.exp(c) * rq)[..., None] * _dot(q, state, halves=(1, parts)) + _dot(scores, y, halves=(1, parts))
    to_end = jnp.exp(c[:, -1:] - c) * rk
    added = _dot(jnp.swapaxes(k, 1, 2), to_end[..., None] * y, halves=(1, parts))
    return out, jnp.exp(c[:, -1])[:, None, None] * state + added


def _bfloat16(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _dot(a: jax.Array, b: jax.Array, halves: tuple[int, int] = (1, 1)) -> jax.Array:
    """a @ b of bfloat16 operands, each in one part or in two (the rounded value and what it leaves)."""

    def split(x: jax.Array, parts: int) -> list[jax.Array]:
        first = _bfloat16(x)
        return [first, _bfloat16(x - first)][:parts]

    products = [
        jnp.matmul(x, y, precision=HIGHEST)
        for i, x in enumerate(split(a, halves[0]))
        for j, y in enumerate(split(b, halves[1]))
        if i + j < 2
    ]
    return sum(products[1:], products[0])
