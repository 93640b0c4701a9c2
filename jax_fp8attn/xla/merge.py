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
TINY = 2.0**-126  # the smallest normal float32: below it hardware may or may not flush to zero


def supports(problem: MergeProblem, device: Device) -> tuple[str, ...]:
    return ()


def run(problem: MergeProblem, arrays: MergeArrays) -> Any:
    lses = [_token_major(problem, arrays.lses[n]) for n in range(problem.states)]
    if problem.context_count:
        has_context = _has_context(problem, arrays)[:, None]
        lses = [*[jnp.where(has_context, lse, -jnp.inf) for lse in lses[:-1]], lses[-1]]
    weights, lse = merge_weights(lses, LN2 if problem.lse_base == "2" else 1.0)
    if problem.context_count:
        copied = [0.0] * (problem.states - 1) + [1.0]
        weights = [jnp.where(has_context, weight, c) for weight, c in zip(weights, copied, strict=True)]
    out = combine(weights, [arrays.outputs[n] for n in range(problem.states)])
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, _as_given(problem, lse)) if problem.return_lse else out


def _token_major(problem: MergeProblem, lse: jax.Array) -> jax.Array:
    """lse [T, H], +inf (an empty row of some backends) as -inf."""
    lse = lse.T if problem.lse_layout == "HT" else lse
    return jnp.where(jnp.isposinf(lse), -jnp.inf, lse)


def _as_given(problem: MergeProblem, lse: jax.Array) -> jax.Array:
    return lse.T if problem.lse_layout == "HT" else lse


def _has_context(problem: MergeProblem, arrays: MergeArrays) -> jax.Array:
    """bool [T]."""
    position = jnp.arange(problem.tokens, dtype=jnp.int32) % (problem.tokens // problem.instances or 1)
    return position < per_token(arrays.context_count, problem.tokens)


def merge_weights(lses: list[jax.Array], unit: float = 1.0) -> tuple[list[jax.Array], jax.Array]:
    """The share of each state and the merged lse, a logarithm of base e^unit. All empty: shares 0, lse -inf."""
    top = lses[0]
    for lse in lses[1:]:
        top = jnp.maximum(top, lse)
    empty = jnp.isneginf(top)
    anchor = jnp.where(empty, 0.0, top)
    terms = [jnp.exp((lse - anchor) * unit) for lse in lses]
    total = jnp.where(empty, 1.0, sum(terms[1:], terms[0]))
    return [term / total for term in terms], jnp.where(empty, -jnp.inf, jnp.log(total) / unit + anchor)


def combine(weights: list[jax.Array], outputs: list[jax.Array]) -> jax.Array:
    """Sum of weights [T, H] times outputs [T, H, D]; where one weight alone is not 0, that output exactly."""
    # -0.0 + x is x for every x, -0.0 included
    terms = [weighted(weight, output, -0.0) for weight, output in zip(weights, outputs, strict=True)]
    out = sum(terms[1:], terms[0])
    return jnp.where(sum(weights[1:], weights[0])[..., None] == 0, 0.0, out)


def weighted(weight: jax.Array, output: jax.Array, absent: float = 0.0) -> jax.Array:
    """weight [T, H] times output [T, H, D]; ``absent`` where the weight is 0, whatever the output holds."""
    weight = weight[..., None]
    return jnp.where(weight < TINY, absent, output.astype(jnp.float32) * weight)
