"""``tune``: times every configuration that a kernel offers and keeps those that beat the heuristic's."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn import tuning
from jax_fp8attn.cli import show

OPS = {"merge_attn_states": ("merge", "merge_sm90"), "mla_prefill": ("mla", "mla_prefill_sm90")}
"""Op: its modules in jax_fp8attn.benchmarks and in jax_fp8attn.pallas."""

SHAPES = {
    "mla_prefill": (
        ("B=1,T=8192,S=8192,H=16", "fp8 causal"),
        ("B=1,T=8192,S=8192,H=128", "fp8 causal"),
        ("B=1,T=32768,S=32768,H=16", "fp8 causal"),
        ("B=4,T=16384,S=16384,H=16", "fp8 causal"),
        ("B=16,T=16384,S=16384,H=16", "fp8 causal"),
        ("B=1,T=8192,S=8192,H=16", "fp8 full"),
        ("B=1,T=8192,S=32768,H=16", "fp8 full with a state"),
        ("B=1,T=256,S=65536,H=16", "fp8 full"),
    ),
    "merge_attn_states": tuple(
        (f"T={tokens},H={heads}", variant)
        for tokens, heads in ((16, 16), (256, 16), (4096, 16), (4096, 128))
        for variant in ("bf16", "fp8_tensor", "fp8_group128_ue8m0_packed")
    ),
}
"""Shape and variant, as benchmarks name them: what is tuned if nothing is asked for."""

AT_ONCE = 6  # configurations that are compiled together
REPEATS = 3  # calls that must agree bit for bit
MARGIN = 0.02  # of the heuristic's time: less is noise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="one op (default: all)")
    parser.add_argument(
        "--shape", metavar="LETTERS", help="one shape instead of the usual ones: B=1,T=8192,S=8192,H=16"
    )
    parser.add_argument(
        "--variant", default="", metavar="TEXT", help='of --shape: "fp8 causal", "bf16" (defaults), ...'
    )
    parser.add_argument(
        "--rounds", type=int, default=31, help="times each configuration is timed (default %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print, and keep nothing")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A problem to tune: the heuristic's configuration is the first of ``candidates``."""

    op: str
    name: str
    problem: Any
    candidates: Sequence[Any]
    run: Callable[[Any], Callable[[int], Any]]  # a configuration as a function of the set of inputs
    sets: int
    bound: float  # relative L2 between two right results


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Microseconds of what could be timed, and why the others could not; the heuristic's first."""

    subject: Subject
    times: tuple[tuple[Any, float], ...]
    refused: tuple[tuple[Any, str], ...]

    @property
    def winner(self) -> Any:
        """The fastest, if it is faster than the heuristic's by more than noise."""
        (default, before), *_ = self.times
        config, time = min(self.times, key=lambda pair: pair[1])
        return config if time < before * (1 - MARGIN) else default

    @property
    def won(self) -> bool:
        return self.winner != self.times[0][0]

    def entry(self) -> tuning.Entry:
        times, subject = dict(self.times), self.subject
        facts, config = tuning.FACTS[subject.op](subject.problem), tuning.config_data(self.winner)
        return tuning.Entry(subject.op, facts, config, round(times[self.winner], 3), round(self.times[0][1], 3))


def run(options: argparse.Namespace) -> int:
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"tune times kernels on a GPU; the device here is {device.platform}")
        return 2
    if options.shape and len(options.op or ()) != 1:
        print("--shape needs one --op")
        return 2
    outcomes, failed = [], False
    progress = show.Progress()
    for op in options.op or sorted(OPS):
        for shape, variant in [(options.shape, options.variant or SHAPES[op][0][1])] if options.shape else SHAPES[op]:
            progress(f"{op} {shape} {variant}")
            try:
                outcomes.append(tuned(subject_of(op, shape, variant), options.rounds))
            except Exception as error:  # the other problems are tuned all the same
                print(f"{op} {shape} {variant}: {error}", file=sys.stderr)
                failed = True
    progress.done()
    path = None if options.dry_run else store(device.device_kind, outcomes)
    report(outcomes, path, options.json)
    unkept = path is None and not options.dry_run
    return 1 if failed or unkept or any(outcome.refused for outcome in outcomes) else 0


def subject_of(op: str, letters: str, variant: str) -> Subject:
    """From text: B=1,T=8192,S=8192,H=16 and "fp8 causal"."""
    from jax_fp8attn.benchmarks.models import Case
    from jax_fp8attn.pallas.common import configs

    benchmark, kernel = (
        importlib.import_module(f"jax_fp8attn.{folder}.{name}")
        for folder, name in zip(("benchmarks", "pallas"), OPS[op], strict=True)
    )
    shape = {"D": 128} | {letter: int(number) for letter, _, number in (x.partition("=") for x in letters.split(","))}
    problem, given, bound = benchmark.calls(Case(op, letters, shape, variant))
    with tuning.off():
        candidates = configs.candidates(op, problem, kernel.default_config(problem))

    def run(config: Any) -> Callable[[int], Any]:
        function = jax.jit(kernel.build(problem, config))
        return lambda number: function(given[number])

    return Subject(op, f"{letters} {variant}", problem, candidates, run, len(given), bound)


def tuned(subject: Subject, rounds: int, measure: Callable[..., Any] | None = None) -> Outcome:
    """Only configurations whose results are right are timed. Raises RuntimeError if the heuristic's own is not."""
    from jax_fp8attn.benchmarks import timing

    default, *others = subject.candidates
    call = subject.run(default)
    expected = [call(number) for number in range(subject.sets)]
    if fault := _fault(subject, call, expected):
        raise RuntimeError(f"{subject.op} {subject.name}: the heuristic's own configuration {fault}")
    ready, refused = [(default, call)], []

    def checked(config: Any) -> tuple[Any, Any, str]:
        try:
            call = subject.run(config)
            return config, call, _fault(subject, call, expected)
        except Exception as error:  # a configuration that cannot be compiled is no reason to stop
            return config, None, f"failed: {type(error).__name__}: {error}"

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for config, call, fault in pool.map(checked, others):
            refused += [(config, fault)] if fault else []
            ready += [] if fault else [(config, call)]
    contenders = [timing.Contender(str(number), call) for number, (_, call) in enumerate(ready)]
    times = (measure or timing.measure)(contenders, subject.sets, rounds)
    timed = tuple((config, times[str(number)].median) for number, (config, _) in enumerate(ready))
    return Outcome(subject, timed, tuple(refused))


def _fault(subject: Subject, call: Callable[[int], Any], expected: Sequence[Any]) -> str:
    """Why these results must not be; empty if they may."""
    for number, right in enumerate(expected):
        first = call(number)
        if any(_difference(call(number), first) != 0 for _ in range(REPEATS - 1)):
            return "gives another result each time"
        if not (error := _difference(first, right)) <= subject.bound:
            return f"is off by {error:.3g}, bound {subject.bound:.3g}"
    return ""


def _difference(a: Any, b: Any) -> float:
    """0 if all bits agree; else the largest relative L2 distance of two arrays, infinite where integers differ."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return max((_distance(x, y) for x, y in pairs), default=0.0)


def _distance(x: jax.Array, y: jax.Array) -> float:
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    bits = (jax.lax.bitcast_convert_type(z, f"uint{8 * z.dtype.itemsize}") for z in (x, y))
    if bool(jnp.array_equal(*bits)):
        return 0.0
    if jnp.issubdtype(x.dtype, jnp.integer):
        return float("inf")
    x, y = (z.astype(jnp.float32) for z in (x, y))
    # where both are the same infinity their difference is no number
    difference = jnp.where(x == y, 0.0, x - y)
    size = jnp.linalg.norm(jnp.where(jnp.isfinite(y), y, 0.0).ravel())
    return float(jnp.linalg.norm(difference.ravel()) / jnp.maximum(size, 2.0**-100))


def store(device_kind: str, outcomes: Sequence[Outcome]) -> Any:
    """The user's file, or None with a message if it cannot be written."""
    winners = [outcome.entry() for outcome in outcomes if outcome.won]
    losers = [outcome.entry() for outcome in outcomes if not outcome.won]
    try:
        return tuning.write(device_kind, winners, losers)
    except (OSError, ValueError) as error:
        print(f"nothing is kept: {error}", file=sys.stderr)
        return None


def report(outcomes: Sequence[Outcome], path: Any, as_json: bool) -> None:
    for outcome in outcomes:
        for config, why in outcome.refused:
            print(f"{outcome.subject.op} {outcome.subject.name}: {config} {why}", file=sys.stderr)
    if as_json:
        found = [dataclasses.asdict(outcome.entry()) | {"won": outcome.won} for outcome in outcomes]
        print(json.dumps({"file": path and str(path), "problems": found}))
        return
    rows = []
    for outcome in outcomes:
        before, after = outcome.times[0][1], dict(outcome.times)[outcome.winner]
        best = str(outcome.winner) if outcome.won else "the heuristic's"
        row = (outcome.subject.op, outcome.subject.name, len(outcome.times), f"{before:.4g}", f"{after:.4g}", best)
        rows.append(tuple(map(str, row)))
    print(show.table(("op", "problem", "timed", "heuristic us", "best us", "best"), rows))
    print(f"kept in {path}" if path else "nothing is kept")
