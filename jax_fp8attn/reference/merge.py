"""Oracle of ``merge_attn_states``: the formula, state by state, in float32 or float64."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn.quantize import quantize_output
from jax_fp8attn.reference.precision import exact_float


def supports(problem: Any, device: Any) -> tuple[str, ...]:
    return ()


def run(problem: Any, arrays: Any) -> Any:
    out, lse = merge(problem, arrays)
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    lse = lse.astype(jnp.float32)
    return (out, lse) if problem.return_lse else out


def merge(problem: Any, arrays: Any) -> tuple[jax.Array, jax.Array]:
    """The unrounded result [T, H, D] and its lse, in the layout and base of the call."""
    dtype = exact_float()
    ln2 = math.log(2.0)
    outputs = jnp.stack([o.astype(dtype) for o in arrays.outputs])  # [N, T, H, D]
    lses = jnp.stack([s.astype(dtype) for s in arrays.lses])
    if problem.lse_layout == "HT":
        lses = jnp.swapaxes(lses, 1, 2)  # [N, T, H]
    if problem.lse_base == "2":
        lses = lses * ln2
    lses = jnp.where(lses == jnp.inf, -jnp.inf, lses)
    if problem.context_count:
        per_instance = problem.tokens // problem.instances
        token = jnp.arange(problem.tokens)
        without = token % per_instance >= arrays.context_count[token // per_instance]
        lses = lses.at[:-1].set(jnp.where(without[None, :, None], -jnp.inf, lses[:-1]))
    empty = jnp.all(lses == -jnp.inf, axis=0)
    lse = jax.scipy.special.logsumexp(lses, axis=0)
    share = jnp.where(empty, 0.0, jnp.exp(lses - jnp.where(empty, 0.0, lse)))
    if problem.context_count:
        share = share.at[-1].set(jnp.where(without[:, None], 1.0, share[-1]))
    share = share[..., None]
    out = jnp.sum(jnp.where(share == 0, 0.0, share * outputs), axis=0)
    lse = jnp.where(empty, -jnp.inf, lse)
    if problem.lse_base == "2":
        lse = lse / ln2
    return out, lse.T if problem.lse_layout == "HT" else lse
