"""What the benchmark of an op hands to the timer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax_fp8attn.benchmarks.timing import Contender

from jax_fp8attn import dispatch


@dataclasses.dataclass(frozen=True)
class Trial:
    """One case. ``bytes`` and ``flops`` are the least that the op has to move and to compute."""

    contenders: Sequence[Contender]
    sets: int
    bytes: int
    flops: int
    error: Callable[[Contender, Any], float]  # of what a contender returned for the first set of inputs
    bound: Callable[[Contender], float]


def offered(op: str, problem: Any) -> list[str]:
    """What ``explain`` offers, oracles apart."""
    rows = dispatch.explain_problem(op, problem).rows
    return [row.name for row in rows if row.name != "reference" and not row.reasons]
