"""``gdn_prefill`` on Hopper: operands prepared chunk by chunk, then the recurrence over them, in two kernels.

Both take chunks of 64 tokens, counted from each sequence's first token. The pool's rows are read and written where they
are: what starts a sequence is no row that another sequence writes.

Where few heads would leave multiprocessors idle, long sequences are cut into segments of a fixed number of chunks. A
first pass of the recurrence finds what each makes of any state, side by side; these are folded, and a second pass runs
all segments at once. Which states a sequence's segments start from depends on it and on their size alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax_fp8attn.pallas import gdn_fold_sm90, gdn_prepare_sm90, gdn_recurrence_sm90
from jax_fp8attn.pallas.common.gdn_chunks import CHUNK, Chunks, Prepared, chunk_list
from jax_fp8attn.pallas.common.gdn_segments import forgets_before, segment_list
from jax_fp8attn.pallas.gdn_prepare_sm90 import PrepareConfig
from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig, States

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem

FIRST_PASS = (
    RecurrenceConfig(64, "registers", 2, 2), RecurrenceConfig(64, "registers", 3, 2),
    RecurrenceConfig(32, "shared", 2, 2), RecurrenceConfig(32, "shared", 4, 2),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GdnConfig:
    """Of the kernels.

    segment      chunks of a segment; 0: no sequence is cut
    transitions  the first pass over segments, which has no outputs
    """

    prepare: PrepareConfig
    recurrence: RecurrenceConfig
    segment: int = 0
    transitions: RecurrenceConfig = FIRST_PASS[0]

    def __post_init__(self) -> None:
        if self.segment < 0:
            raise ValueError(f"a segment has 1 chunk or more, 0 stands for none: {self}")


def default_config(problem: GdnProblem | GdnPoolProblem) -> GdnConfig:
    """The fastest by ``estimate``; as many segments as the call asks for, if it does. Without segments it may take a
    little longer: less is guessed of it."""
    split = _split(problem)
    return min(_configs(split), key=lambda config: estimate(split, config) * (MARGIN if config.segment else 1.0))


def _configs(problem: GdnProblem) -> Iterator[GdnConfig]:
    """Without segments first: of equals ``min`` takes that."""
    prepare = gdn_prepare_sm90.default_config(problem)
    chunks = _chunks(problem)
    for count in (problem.segments,) if problem.segments else SEGMENTS:
        for recurrence in gdn_recurrence_sm90.candidates(problem):
            if count == 1:
                yield GdnConfig(prepare, recurrence)
            elif problem.segments or chunks >= LEAST * count:
                yield from (GdnConfig(prepare, recurrence, -(-chunks // count), first) for first in FIRST_PASS)


def _chunks(problem: GdnProblem) -> int:
    """Of one sequence, all being equally long; where the caller says how many segments, of one that has all tokens."""
    sequences = problem.instances if problem.segments else problem.sequences
    return -(-problem.tokens // (CHUNK * max(1, sequences))) or 1


SEGMENTS = (1, 2, 4, 8, 16, 32)
LEAST = 8  # chunks of a segment
MARGIN = 1.05
FOLD, TABLES = 2.6, 5.0  # microseconds of a segment behind the first, and of small programs; measured


def estimate(problem: GdnProblem, config: GdnConfig) -> float:
    """Microseconds behind the preparation, for sequences of equal length. Of the first pass: M and N of a segment, but
    no M of a sequence's first one, and neither of its last one."""
    chunks, size = _chunks(problem), jnp.dtype(problem.out_dtype).itemsize
    segments = -(-chunks // config.segment) if config.segment else 1
    columns, own = 128 * problem.sequences * problem.heads, config.segment or chunks
    pass_time, last, first = gdn_recurrence_sm90.pass_time, config.recurrence, config.transitions
    total = pass_time(last, columns * segments, own, last.shared_memory(size))
    if not config.segment:
        return total
    total += pass_time(first, columns * (2 * segments - 3), own, first.memory_of_transition)
    return total + TABLES + FOLD * (segments - 1)


def supports(problem: GdnProblem | GdnPoolProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if device.compute_capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, the device has {device.compute_capability}")
    split = _split(problem)
    if split.transition:
        reasons.append("transitions of sequences are computed by XLA")
    return (*reasons, *gdn_prepare_sm90.supports(split))


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
    return recurrence(problem, arrays, chunks, prepared, states, config, interpret)


def _packed(problem: GdnPoolProblem, arrays: GdnPoolArrays, config: GdnConfig, interpret: Any) -> tuple[jax.Array, ...]:
    chunks = chunk_list(arrays.start, arrays.length, problem.tokens)
    prepared = gdn_prepare_sm90.prepare_packed(problem, arrays, chunks, config.prepare, interpret)
    states = States(arrays.pool, arrays.slots, arrays.write_slots)
    results = recurrence(problem.split, arrays, chunks, prepared, states, config, interpret)
    out, pool, *checkpoints = results
    if not problem.checkpoints_to_pool or not checkpoints:
        return out, pool, *checkpoints
    rows = jnp.where(arrays.checkpoint_slots >= 0, arrays.checkpoint_slots, problem.pool_rows)
    rows = jnp.where(_filled(problem.split, arrays.length), rows, problem.pool_rows)
    return out, pool.at[rows].set(checkpoints[0], mode="drop")


def recurrence(
    problem: GdnProblem,
    arrays: GdnArrays | GdnPoolArrays,
    chunks: Chunks,
    prepared: Prepared,
    states: States,
    config: GdnConfig,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """o, final states or the pool that they are written to, checkpoints."""
    in_place = states.write is not None
    run = gdn_recurrence_sm90.build(problem, config.recurrence, in_place, interpret, config.segment)
    if not config.segment:
        return run(chunks, prepared, arrays.start, arrays.length, states)
    segments = segment_list(chunks, problem.tokens, config.segment)
    initial = _as_keys_by_values(problem, states)
    forgets = forgets_before(chunks, segments, prepared.total, config.segment)
    moved = gdn_recurrence_sm90.transitions(
        problem, config.transitions, config.segment, chunks, prepared, segments, initial, forgets, interpret
    )
    begins = gdn_fold_sm90.fold(moved, segments, initial, forgets, interpret)
    pool = states.given if in_place else None
    return run(chunks, prepared, arrays.start, arrays.length, States(begins, None, states.write, pool), segments)


def _as_keys_by_values(problem: GdnProblem, states: States) -> jax.Array | None:
    """float32 [B, H, K, V]: what sequences start from; None: zeros."""
    if states.given is None:
        return None
    there = (states.read >= 0) & (states.read < states.given.shape[0])
    rows = states.given[jnp.where(there, states.read, 0)].astype(jnp.float32)
    rows = jnp.where(there[:, None, None, None], rows, 0.0)
    return jnp.swapaxes(rows, 2, 3) if problem.state_layout == "vk" else rows


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
