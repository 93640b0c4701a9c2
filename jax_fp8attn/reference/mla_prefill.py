"""Oracle of ``mla_prefill``: dense attention over the operands as stored, and its emulation of the FP8 kernels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn.quantize import E4M3, cast_fp8, quantize_output, to_stored
from jax_fp8attn.reference.precision import exact_float

LIFT = 256.0  # P in (0, 1] is stored as P * 2^8: e4m3 then rounds down to 2^-14 with full precision
BLOCK = 128  # keys between two updates of the running maximum in the kernels


def supports(problem: Any, device: Any) -> tuple[str, ...]:
    return ()


def run(problem: Any, arrays: Any) -> Any:
    return finish(problem, arrays, *attention(problem, arrays))


def emulated(problem: Any, arrays: Any) -> Any:
    """Rounds where the kernels round: P to e4m3 (bf16 for compute="bf16") against a running maximum."""
    return finish(problem, arrays, *attention(problem, arrays, round_p=True))


def finish(problem: Any, arrays: Any, out: jax.Array, lse: jax.Array) -> Any:
    if problem.state_dtype is not None:
        inside = owner(arrays.q_start, arrays.q_length, problem.tokens) >= 0
        out, lse = merge_initial_state(arrays, inside, out, lse)
    out = quantize_output(out.astype(jnp.float32), problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, lse.astype(jnp.float32)) if problem.return_lse else out


def owner(start: jax.Array, length: jax.Array, total: int) -> jax.Array:
    """int32 [total]: the sequence that owns each row, or -1."""
    position = jnp.arange(total)[:, None]
    owned = (position >= start) & (position < start + length)  # [total, B]
    if not start.shape[0]:
        return jnp.full(total, -1)
    return jnp.where(jnp.any(owned, axis=1), jnp.argmax(owned, axis=1), -1)


def visibility(problem: Any, arrays: Any) -> jax.Array:
    """bool [T, S]."""
    of_token = owner(arrays.q_start, arrays.q_length, problem.tokens)
    of_key = owner(arrays.k_start, arrays.k_length, problem.keys)
    seen = (of_token[:, None] == of_key) & (of_token[:, None] >= 0)
    if not problem.causal or not problem.sequences:
        return seen
    i = jnp.arange(problem.tokens) - arrays.q_start[of_token]
    j = jnp.arange(problem.keys) - arrays.k_start[of_key]
    last = i + arrays.k_length[of_token] - arrays.q_length[of_token]
    return seen & (j <= last[:, None])


def operand(problem: Any, x: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An operand as stored, and its multiplier [instances]: with compute="bf16" only FP8 operands have one."""
    exact = exact_float()
    if problem.compute == "bf16" and x.dtype != E4M3:
        return x.astype(exact), jnp.ones_like(scale, exact)
    rows = jnp.repeat(scale, x.shape[0] // problem.instances, total_repeat_length=x.shape[0])
    return to_stored(x, rows.reshape(-1, *[1] * (x.ndim - 1))).astype(exact), scale.astype(exact)


def attention(problem: Any, arrays: Any, round_p: bool = False) -> tuple[jax.Array, jax.Array]:
    """out [T, H, 128] and lse [H, T]."""
    q, q_scale = operand(problem, arrays.q, arrays.q_scale)
    v, v_scale = operand(problem, arrays.v, arrays.v_scale)
    k, k_rope = arrays.k, arrays.k_rope
    if k_rope is None:
        k, k_rope = k[..., :128], k[..., 128:]

    def per_token(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, problem.tokens // problem.instances, total_repeat_length=problem.tokens)

    score = 0.0
    for part, q_part in ((k, q[..., :128]), (k_rope, q[..., 128:])):
        part, k_scale = operand(problem, part, arrays.k_scale)
        part = part if part.ndim == 3 else jnp.broadcast_to(part[:, None], (*k.shape[:2], part.shape[-1]))
        factor = per_token(q_scale * k_scale * arrays.softmax_scale)[:, None]
        score += jnp.einsum("thd,shd->hts", q_part, part, precision="highest") * factor
    seen = visibility(problem, arrays)
    score = jnp.where(seen, score, -jnp.inf)
    some = jnp.any(seen, axis=-1)
    top = jnp.max(score, axis=-1, keepdims=True, initial=-jnp.inf)
    p = jnp.exp(score - jnp.where(some[:, None], top, 0.0))
    total = jnp.sum(p, axis=-1)
    if round_p:
        p = rounded(problem, score, p)
    out = values(p, seen, v) / jnp.where(some, total, 1.0)[..., None] * per_token(v_scale)[:, None]
    lse = jnp.where(some, jnp.log(total) + top[..., 0], -jnp.inf)
    return jnp.where(some[:, None, None], jnp.swapaxes(out, 0, 1), 0.0), lse


def rounded(problem: Any, score: jax.Array, p: jax.Array) -> jax.Array:
    """P as the kernels round it: relative to the maximum of the key blocks so far."""
    if problem.compute == "bf16":
        return p.astype(jnp.bfloat16).astype(p.dtype)
    pad = -score.shape[-1] % BLOCK
    blocks = jnp.pad(score, ((0, 0), (0, 0), (0, pad)), constant_values=-jnp.inf)
    blocks = blocks.reshape(*score.shape[:-1], -1, BLOCK)
    running = jax.lax.cummax(jnp.max(blocks, axis=-1), axis=2)[..., None]  # [H, T, blocks, 1]
    running = jnp.where(jnp.isneginf(running), 0.0, running)
    lifted = cast_fp8(jnp.exp(blocks - running) * LIFT).astype(p.dtype) / LIFT
    top = jnp.max(score, axis=-1, keepdims=True)[..., None]
    lifted = lifted * jnp.exp(running - jnp.where(jnp.isneginf(top), 0.0, top))
    return lifted.reshape(*score.shape[:-1], -1)[..., : score.shape[-1]]


def values(p: jax.Array, seen: jax.Array, v: jax.Array) -> jax.Array:
    """p [H, T, S] times v [S, H, D]; keys that are not seen add nothing, whatever v holds."""
    finite = jnp.isfinite(v)
    out = jnp.einsum("hts,shd->htd", p, jnp.where(finite, v, 0.0), precision="highest")
    if not v.shape[0]:
        return out

    def add_nonfinite(key: jax.Array, out: jax.Array) -> jax.Array:
        there = seen[:, key, None] & ~finite[key][:, None]  # [H, T, D]
        return out + jnp.where(there, p[..., key, None] * v[key][:, None], 0.0)

    return jax.lax.fori_loop(0, jnp.where(jnp.all(finite), 0, v.shape[0]), add_nonfinite, out)


def merge_initial_state(arrays: Any, inside: jax.Array, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of no sequence take nothing from the state."""
    state_lse = arrays.initial_lse.astype(lse.dtype)
    state_lse = jnp.where(inside & (state_lse != jnp.inf), state_lse, -jnp.inf)
    both = jnp.stack([state_lse, lse])  # [2, H, T]
    empty = jnp.all(both == -jnp.inf, axis=0)
    merged = jax.scipy.special.logsumexp(both, axis=0)
    share = jnp.where(empty, 0.0, jnp.exp(both - jnp.where(empty, 0.0, merged)))
    share = jnp.swapaxes(share, 1, 2)[..., None]  # [2, T, H, 1]
    parts = jnp.stack([arrays.initial_out.astype(out.dtype), out])
    return jnp.sum(jnp.where(share == 0, 0.0, share * parts), axis=0), jnp.where(empty, -jnp.inf, merged)
