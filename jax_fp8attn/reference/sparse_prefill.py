"""Oracle of ``sparse_prefill``: dense attention over both pools, each row weighted by how often it is listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.folding import as_varying
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
    rounded = _rounding(half)
    exact = exact_float()
    pools = [pool for pool in (arrays.prefix, arrays.extend) if pool is not None]
    pool_rows = [rounded(_rows(pool.rows)) for pool in pools]
    rows = jnp.concatenate(pool_rows)  # [P + S, 512]
    scale, sink = (
        None if x is None else _per_token(problem, x.astype(exact)) for x in (arrays.softmax_scale, arrays.sink)
    )

    def token(x: Any) -> tuple[jax.Array, jax.Array]:
        q, lists, scale, sink = x
        counts = [
            _count(len(own), pool.indices, start, end)
            for own, pool, (start, end) in zip(pool_rows, pools, lists, strict=True)
        ]
        return _softmax(q, rows, jnp.concatenate(counts), scale, sink, rounded)

    out, lse = lax.map(token, (rounded(_rows(arrays.q)), [(pool.start, pool.end) for pool in pools], scale, sink))
    return out, lse.T


def _rounding(half: Any) -> Callable[[jax.Array], jax.Array]:
    if half is None:
        return lambda x: x
    # a cast there and back may be optimised away, this is not
    return lambda x: lax.reduce_precision(x, jnp.finfo(half).nexp, jnp.finfo(half).nmant)


def _per_token(problem: Any, x: jax.Array) -> jax.Array:
    """[instances, ...] -> [T, ...]."""
    return jnp.repeat(x, problem.tokens // problem.instances, axis=0)


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

    return lax.fori_loop(start, end, add, as_varying(jnp.zeros(rows, jnp.int32), (indices, start, end)))


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
