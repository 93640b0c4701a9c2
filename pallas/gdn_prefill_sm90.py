"""``gdn_prefill`` on Hopper: operands prepared chunk by chunk, then the recurrence over them, in two kernels.

Both take chunks of 64 tokens, counted from each sequence's first token. The pool's rows are read and written where they
are: what starts a sequence is no row that another sequence writes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax_fp8attn.pallas import gdn_prepare_sm90, gdn_recurrence_sm90
from jax_fp8attn.pallas.common.gdn_chunks import chunk_list
from jax_fp8attn.pallas.gdn_prepare_sm90 import PrepareConfig
from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig, States

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem


@dataclasses.dataclass(frozen=True)
class GdnConfig:
    """Of both kernels."""

    prepare: PrepareConfig
    recurrence: RecurrenceConfig


def default_config(problem: GdnProblem | GdnPoolProblem) -> GdnConfig:
    split = _split(problem)
    return GdnConfig(gdn_prepare_sm90.default_config(split), gdn_recurrence_sm90.default_config(split))


def supports(problem: GdnProblem | GdnPoolProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if device.compute_capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, the device has {device.compute_capability}")
    split = _split(problem)
    if split.transition:
        reasons.append("transitions of sequences are computed by XLA")
    return (*reasons, *gdn_prepare_sm90.supports(split), "not measured on a GPU yet")


def run(problem: GdnProblem | GdnPoolProblem, arrays: GdnArrays | GdnPoolArrays) -> Any:
    return build(problem, default_config(problem))(arrays)


def build(problem: GdnProblem | GdnPoolProblem, config: GdnConfig, interpret: Any = None) -> Any:
    """The op for one problem as a function of its arrays."""
    packed = isinstance(problem, GdnPoolProblem)
    split, form = _split(problem), _packed if packed else _plain

    @jax.enable_x64(False)
    def op(arrays: Any) -> Any:
        if not (split.tokens and split.sequences and split.heads):
            return _without_tokens(problem, arrays)
        results = form(problem, arrays, config, interpret)
        return results if packed or len(results) > 1 else results[0]

    return op


def _split(problem: GdnProblem | GdnPoolProblem) -> GdnProblem:
    return problem.split if isinstance(problem, GdnPoolProblem) else problem


def _plain(problem: GdnProblem, arrays: GdnArrays, config: GdnConfig, interpret: Any) -> tuple[jax.Array, ...]:
    chunks = chunk_list(arrays.start, arrays.length, problem.tokens)
    prepared = gdn_prepare_sm90.prepare(problem, arrays, chunks, config.prepare, interpret)
    states = States()
    if problem.has_initial_state:
        states = States(arrays.initial_state, jnp.arange(problem.sequences, dtype=jnp.int32))
    run = gdn_recurrence_sm90.build(problem, config.recurrence, interpret=interpret)
    return run(chunks, prepared, arrays.start, arrays.length, states)


def _packed(problem: GdnPoolProblem, arrays: GdnPoolArrays, config: GdnConfig, interpret: Any) -> tuple[jax.Array, ...]:
    chunks = chunk_list(arrays.start, arrays.length, problem.tokens)
    prepared = gdn_prepare_sm90.prepare_packed(problem, arrays, chunks, config.prepare, interpret)
    states = States(arrays.pool, arrays.slots, arrays.write_slots)
    run = gdn_recurrence_sm90.build(problem.split, config.recurrence, in_place=True, interpret=interpret)
    out, pool, *checkpoints = run(chunks, prepared, arrays.start, arrays.length, states)
    if not problem.checkpoints_to_pool or not checkpoints:
        return out, pool, *checkpoints
    rows = jnp.where(arrays.checkpoint_slots >= 0, arrays.checkpoint_slots, problem.pool_rows)
    rows = jnp.where(_filled(problem.split, arrays.length), rows, problem.pool_rows)
    return out, pool.at[rows].set(checkpoints[0], mode="drop")


def _filled(problem: GdnProblem, length: jax.Array) -> jax.Array:
    """bool [checkpoints]: whether a row holds one; each instance has rows of its own."""
    count = jnp.sum((length // problem.checkpoint_every).reshape(problem.instances, -1), axis=1)
    own = problem.checkpoints // problem.instances
    return (jnp.arange(own) < count[:, None]).reshape(-1)


def _without_tokens(problem: GdnProblem | GdnPoolProblem, arrays: Any) -> Any:
    """Nothing to compute: sequences end where they start."""
    split = _split(problem)
    out = jnp.zeros((split.tokens, split.heads, split.v_width), split.out_dtype)
    checkpoints = jnp.zeros((split.checkpoints, *split.state_shape), split.state_dtype)
    if isinstance(problem, GdnPoolProblem):
        starts = (arrays.slots >= 0).reshape(-1, 1, 1, 1)
        states = jnp.where(starts, arrays.pool[jnp.maximum(arrays.slots, 0)], 0)
        rows = jnp.where(arrays.write_slots >= 0, arrays.write_slots, problem.pool_rows)
        pool = arrays.pool.at[rows].set(states, mode="drop")
        return (out, pool, checkpoints) if split.checkpoint_every and not problem.checkpoints_to_pool else (out, pool)
    zeros = jnp.zeros((split.sequences, *split.state_shape), split.state_dtype)
    final = arrays.initial_state if split.has_initial_state else zeros
    results = [out, *([final] if split.return_final_state else []), *([checkpoints] if split.checkpoint_every else [])]
    return tuple(results) if len(results) > 1 else out
