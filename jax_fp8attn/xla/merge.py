"""``merge_attn_states`` in jax.numpy: XLA fuses it into one pass."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn.dispatch import Device
from jax_fp8attn.folding import per_token
from jax_fp8attn.problems import MergeArrays, MergeProblem
from jax_fp8attn.quantize import quantize_output

LN2 = math.log(2.0)


def supports(problem: MergeProblem, device: Device) -> tuple[str, ...]:
    return ()


def run(problem: MergeProblem, arrays: MergeArrays) -> Any:
    lses = [_token_major(problem, arrays.lses[n]) for n in range(problem.states)]
    if problem.context_count:
        has_context = _has_context(problem, arrays)[:, None]
        lses = [*[jnp.where(has_context, lse, -jnp.inf) for lse in lses[:-1]], lses[-1]]
    weights, lse = merge_weights(lses)
    if problem.context_count:
        weights[-1] = jnp.where(has_context, weights[-1], 1.0)

    out = weighted(weights[0], arrays.outputs[0])
    for n in range(1, problem.states):
        out = out + weighted(weights[n], arrays.outputs[n])
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, _as_given(problem, lse)) if problem.return_lse else out


def _token_major(problem: MergeProblem, lse: jax.Array) -> jax.Array:
    """Natural-log lse [T, H], +inf (an empty row of some backends) as -inf."""
    lse = lse.T if problem.lse_layout == "HT" else lse
    lse = jnp.where(jnp.isposinf(lse), -jnp.inf, lse)
    return lse * LN2 if problem.lse_base == "2" else lse


def _as_given(problem: MergeProblem, lse: jax.Array) -> jax.Array:
    lse = lse / LN2 if problem.lse_base == "2" else lse
    return lse.T if problem.lse_layout == "HT" else lse


def _has_context(problem: MergeProblem, arrays: MergeArrays) -> jax.Array:
    """bool [T]."""
    position = jnp.arange(problem.tokens, dtype=jnp.int32) % (problem.tokens // problem.instances or 1)
    return position < per_token(arrays.context_count, problem.tokens)


def merge_weights(lses: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The share of each state and the merged lse. All empty: shares 0, lse -inf."""
    top = lses[0]
    for lse in lses[1:]:
        top = jnp.maximum(top, lse)
    empty = jnp.isneginf(top)
    anchor = jnp.where(empty, 0.0, top)
    terms = [jnp.exp(lse - anchor) for lse in lses]
    total = jnp.where(empty, 1.0, sum(terms[1:], terms[0]))
    return [term / total for term in terms], jnp.where(empty, -jnp.inf, jnp.log(total) + anchor)


def weighted(weight: jax.Array, output: jax.Array) -> jax.Array:
    """weight [T, H] times output [T, H, D]; a weight of 0 contributes exactly 0, whatever the output holds."""
    weight = weight[..., None]
    return jnp.where(weight == 0, 0.0, output.astype(jnp.float32) * weight)
