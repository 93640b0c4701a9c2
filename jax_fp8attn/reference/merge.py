"""Oracle of ``merge_attn_states``: the formula, state by state, in float32 or float64."""

from __future__ import annotations

import functools
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
    unit = math.log(2.0) if problem.lse_base == "2" else 1.0
    outputs = jnp.stack([o.astype(dtype) for o in arrays.outputs])  # [N, T, H, D]
    lses = jnp.stack([s.astype(dtype) for s in arrays.lses])
    if problem.lse_layout == "HT":
        lses = jnp.swapaxes(lses, 1, 2)  # [N, T, H]
    lses = jnp.where(lses == jnp.inf, -jnp.inf, lses)
    if problem.context_count:
        per_instance = problem.tokens // problem.instances
        token = jnp.arange(problem.tokens)
        without = token % max(per_instance, 1) >= arrays.context_count[token // max(per_instance, 1)]
        lses = lses.at[:-1].set(jnp.where(without[None, :, None], -jnp.inf, lses[:-1]))
    empty = jnp.all(lses == -jnp.inf, axis=0)
    top = jnp.where(empty, 0.0, jnp.max(lses, axis=0))
    gap = (lses - top) * unit
    lse = jnp.where(empty, -jnp.inf, jax.scipy.special.logsumexp(gap, axis=0) / unit + top)
    share = jnp.where(empty, 0.0, jax.nn.softmax(gap, axis=0))
    if problem.context_count:
        last = jnp.arange(len(lses))[:, None, None] == len(lses) - 1
        share = jnp.where(without[None, :, None], last.astype(dtype), share)
    share = share[..., None]
    # a share below the smallest normal float32 is none; -0.0 + x is x for every x
    terms = jnp.where(share < 2.0**-126, -0.0, share * outputs)
    out = jnp.where(jnp.sum(share, axis=0) == 0, 0.0, functools.reduce(jnp.add, terms))
    return out, lse.T if problem.lse_layout == "HT" else lse
