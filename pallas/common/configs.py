"""The configurations that a kernel offers for a problem, and the one that it takes.

Every candidate computes the same: they differ in how work is cut and loaded. A measured one is taken from
``jax_fp8attn.tuning`` only if it is a candidate.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from jax_fp8attn import tuning
from jax_fp8attn.dispatch import current_device
from jax_fp8attn.problems import MergeProblem, MlaProblem
from jax_fp8attn.quantize import Fp8PerGroup

MULTIPROCESSORS = 132  # of an H100 SXM and an H200: blocks of threads that run at once


def registers_fit(consumers: int, registers: tuple[int, int]) -> bool:
    """Of a consumer's and of the producer's thread, as setmaxnreg sets them. A launch gives all threads as many, in
    steps of 8; for what the producer does not give back of these, a consumer would wait for ever."""
    warpgroups, (consumer, producer) = consumers + 1, registers
    share = 65536 // (128 * warpgroups) // 8 * 8
    enough = consumers * consumer + producer <= warpgroups * share
    return enough and producer <= share <= consumer and not any(count % 8 for count in registers)


def chosen(op: str, problem: Any, default: Any) -> Any:
    """The measured configuration for the device that work goes to, or ``default``, the heuristic's."""
    return tuning.tuned_config(op, problem, current_device().kind, candidates(op, problem, default)) or default


def candidates(op: str, problem: Any, default: Any) -> tuple[Any, ...]:
    """What may be measured and taken; ``default`` is the first."""
    changes = {"mla_prefill": _mla, "merge_attn_states": _merge}[op](problem, default)
    found = {default: None}
    for change in changes:
        try:
            found[dataclasses.replace(default, **change)] = None
        except ValueError:  # what the configuration itself refuses
            continue
    return tuple(found)


def _mla(problem: MlaProblem, default: Any) -> Iterable[dict[str, Any]]:
    """In the problem's own format. An assembler that drops setmaxnreg gets no producer."""
    if problem.compute == "bf16":
        yield from ({"turn": "done", "tail": 1}, {"turn": "scores"}, {"keys": 112})
        return
    if default.producer:
        for stages, registers, blocks in itertools.product((2, 3), ((240, 24), (232, 40)), (0, MULTIPROCESSORS)):
            yield {"stages": stages, "producer": True, "registers": registers, "blocks": blocks}
    yield from ({"stages": stages, "producer": False, "blocks": 0, "late": False} for stages in (2, 3))


def _merge(problem: MergeProblem, default: Any) -> Iterable[dict[str, Any]]:
    """The width of a row stays: with groups it is theirs."""
    quant, total = problem.output_quant, problem.heads * problem.width // default.width
    packed = isinstance(quant, Fp8PerGroup) and quant.scale_layout == "col_tma_packed"
    for vector, rows, ahead in itertools.product((4, 8, 16), (1, 2, 4), (1, 2, 4)):
        fits = rows <= total and not total % rows and vector * problem.dtype.itemsize <= 32
        if fits and (rows == default.rows or not packed):
            yield {"vector": vector, "rows": rows, "ahead": ahead}
