"""``demo``: the main job. One serving step of three layer kinds, each checked against its oracle."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import jax

from jax_fp8attn import dispatch
from jax_fp8attn.cli import layers, show
from jax_fp8attn.cli.layers import Check, Layer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="sizes of real deployments (wants a GPU)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default %(default)s)")
    parser.add_argument(
        "--layer", choices=sorted(layers.LAYERS), action="append", help="only this layer; may be repeated"
    )


@dataclasses.dataclass(frozen=True)
class Report:
    """What one layer did."""

    title: str
    shapes: str
    ops: tuple[dispatch.Explanation, ...]
    checks: tuple[Check, ...]
    first_seconds: float
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {
            "layer": self.title,
            "shapes": self.shapes,
            "implementations": {e.op: e.taken for e in self.ops},
            "refusals": {e.op: {r.name: list(r.reasons) for r in e.rows if r.reasons} for e in self.ops},
            "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks],
            "first_call_seconds": self.first_seconds,
            "seconds": self.seconds,
            "passed": self.passed,
        }


def run(options: argparse.Namespace) -> int:
    progress = show.Progress()
    reports = []
    if not options.json:
        device = jax.devices()[0]
        sizes = "real" if options.full else "small"
        print(f"jax {jax.__version__} on {device.platform} {device.device_kind}, {sizes} sizes")
    for name in options.layer or layers.LAYERS:
        progress(f"{name}: preparing inputs")
        reports.append(_run_layer(layers.LAYERS[name](options.seed, options.full), progress))
        progress.done()
        if not options.json:
            print("\n" + as_text(reports[-1]))
    passed = all(report.passed for report in reports)
    if options.json:
        print(json.dumps({"passed": passed, "layers": [report.as_json() for report in reports]}, indent=2))
    else:
        broken = sum(not check.passed for report in reports for check in report.checks)
        print(f"\n{'all bounds hold' if passed else f'{broken} bounds BROKEN'}")
    return 0 if passed else 1


def _run_layer(layer: Layer, progress: show.Progress) -> Report:
    progress(f"{layer.title}: compiling and first call")
    result, first = _timed(layer.step)
    progress(f"{layer.title}: timing")
    seconds = min(_timed(layer.step)[1] for _ in range(3))
    progress(f"{layer.title}: checking against the oracle")
    return Report(layer.title, layer.shapes, layer.explain(), tuple(layer.check(result)), first, seconds)


def _timed(step: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(step())
    return result, time.perf_counter() - start


def as_text(report: Report) -> str:
    lines = [report.title, f"  {report.shapes}"]
    for explanation in report.ops:
        lines.append(f"  {explanation.op}: {explanation.taken} taken on {explanation.device.platform}")
        lines += [f"    not {row.name}: {reason}" for row in explanation.rows for reason in row.reasons]
        lines += [f"    {note}" for note in explanation.notes]
    rows = [
        (check.what, f"{check.error:.2e}", f"{check.bound:.2e}", "ok" if check.passed else "BROKEN")
        for check in report.checks
    ]
    lines += ["  " + line for line in show.table(("against the oracle", "error", "bound", ""), rows).splitlines()]
    lines.append(
        f"  first call {show.duration(report.first_seconds)}, then {show.duration(report.seconds)} a step (wall clock)"
    )
    return "\n".join(lines)
