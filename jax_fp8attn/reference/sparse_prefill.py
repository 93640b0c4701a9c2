"""Oracle of ``sparse_prefill``: dense attention over the whole of both pools, each row weighted by how often it is listed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.latent import Fp8Latent, dequantize_latent
from jax_fp8attn.reference.precision import exact_float


def supports(problem: Any, device: Any) -> tuple[str, ...]:
    return ()


def run(problem: Any, arrays: Any) -> Any:
    out, lse = attend(problem, arrays)
    out, lse = out.astype(problem.out_dtype), lse.astype(jnp.float32)
    return (out, lse) if problem.return_lse else out


def emulated(problem: Any, arrays: Any) -> tuple[jax.Array, jax.Array]:
    """``attend``, rounded where a kernel rounds: bf16 (f16 for f16 rows) rows and softmax weights, unrounded total,
    output in its own dtype."""
    half = jnp.float16 if problem.prefix.form.dtype == jnp.float16 else jnp.bfloat16
    out, lse = attend(problem, arrays, half)
    return out.astype(problem.out_dtype), lse.astype(jnp.float32)


def attend(problem: Any, arrays: Any, half: Any = None) -> tuple[jax.Array, jax.Array]:
    """The unrounded result [T, H, 512] and its lse [H, T]. ``half``: the dtype in which a kernel multiplies."""
    rounded = (lambda x: x) if half is None else (lambda x: x.astype(half).astype(x.dtype))
    pools = [pool for pool in (arrays.prefix, arrays.extend) if pool is not None]
    pool_rows = [rounded(_rows(pool.rows)) for pool in pools]
    q, rows = rounded(_rows(arrays.q)), jnp.concatenate(pool_rows)  # [T, H, 512], [P + S, 512]
    instance = jnp.arange(problem.tokens) // max(problem.tokens // problem.instances, 1)

    def token(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts = [_count(len(r), pool.indices, pool.start[t], pool.end[t]) for r, pool in zip(pool_rows, pools)]
        scale = arrays.softmax_scale[instance[t]].astype(rows.dtype)
        sink = None if arrays.sink is None else arrays.sink[instance[t]].astype(rows.dtype)
        return _softmax(q[t], rows, jnp.concatenate(counts), scale, sink, rounded)

    out, lse = lax.map(token, jnp.arange(problem.tokens))
    return out, lse.T


def _rows(x: Any) -> jax.Array:
    return dequantize_latent(x, exact_float()) if isinstance(x, Fp8Latent) else x.astype(exact_float())


def _count(rows: int, indices: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """int32 [rows]: how often each row is listed in indices[start:end]. Indices of no row are skipped."""
    if not rows or not indices.shape[0]:
        return jnp.zeros(rows, jnp.int32)

    def add(entry: jax.Array, count: jax.Array) -> jax.Array:
        index = indices[entry]
        valid = (index >= 0) & (index < rows)
        return count.at[jnp.where(valid, index, 0)].add(valid)

    return lax.fori_loop(start, end, add, jnp.zeros(rows, jnp.int32))


def _softmax(
    q: jax.Array, rows: jax.Array, count: jax.Array, scale: jax.Array, sink: jax.Array | None, rounded: Any
) -> tuple[jax.Array, jax.Array]:
    """One token, q [H, 512] over rows [R, 512]: out [H, 512] and lse [H]."""
    rows = jnp.where(count[:, None] > 0, rows, 0.0)
    scores = jnp.where(count > 0, scale * jnp.matmul(q, rows.T, precision=lax.Precision.HIGHEST), -jnp.inf)  # [H, R]
    top = jnp.max(scores, axis=-1, initial=-jnp.inf)
    anchor = jnp.where(top == -jnp.inf, 0.0, top)
    weights = count * jnp.exp(scores - anchor[:, None])
    total = jnp.sum(weights, axis=-1)
    denominator = total if sink is None else total + jnp.exp(sink - anchor)
    out = jnp.matmul(rounded(weights), rows, precision=lax.Precision.HIGHEST) / denominator[:, None]
    empty = total == 0
    return jnp.where(empty[:, None], 0.0, out), jnp.where(empty, -jnp.inf, anchor + jnp.log(total))
