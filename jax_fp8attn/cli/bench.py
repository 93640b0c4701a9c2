"""``bench``: times every implementation on shapes of real models; no time without a correct result."""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax

from jax_fp8attn.cli import env
from jax_fp8attn.cli.show import Progress

OPS = {"merge_attn_states": "merge", "mla_prefill": "mla", "sparse_prefill": "sparse", "gdn_prefill": "gdn"}
"""Op: its module in jax_fp8attn.benchmarks."""

AT_ONCE = 8  # cases that are compiled together, then timed one after the other


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=sorted(OPS), action="append", help="one op (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name or variant contains TEXT")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with other projects' kernels")
    parser.add_argument("--rounds", type=int, default=31, help="times each case is timed (default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw speed against size, PNG or SVG")
    parser.add_argument("--store", type=Path, metavar="DIR", help="write <DIR>/<device>/<op>.json")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="with --store: keep the rows of today's run that was cut short, time the rest",
    )


def run(options: argparse.Namespace) -> int:
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"bench times kernels on a GPU; the device here is {device.platform}")
        return 2
    if options.resume and not options.store:
        print("--resume needs --store")
        return 2
    from jax_fp8attn.benchmarks import report, timing

    today = report.Run(
        device=device.device_kind,
        date=datetime.date.today().isoformat(),
        versions=_versions(),
        ceilings=report.Ceilings(timing.copy_tbps(), timing.gemm_tflops(), timing.fp8_gemm_tflops()),
    )
    facts, failed, everything = today, False, []
    for op in options.op or sorted(OPS):
        facts, rows = _earlier(op, options, today)
        for row, message in _rows(op, options, {(row.case, row.variant) for row in rows}):
            failed |= bool(message)
            if message:
                print(message, file=sys.stderr)
                continue
            rows.append(row)
            if options.store:  # at once: a run that is cut short leaves what it has measured
                report.write(report.results_path(facts.device, op, options.store), facts, rows)
        everything += rows
    if options.plot:
        report.plot(facts, everything, options.plot)
    if options.json:
        print(json.dumps(report.as_json(facts, everything)))
    else:
        report.print_table(facts, everything)
    return 1 if failed or not everything else 0


def _earlier(op: str, options: argparse.Namespace, today: Any) -> tuple[Any, list[Any]]:
    """With --resume what a run of the same day, device and versions has stored, and what to store more of it under."""
    from jax_fp8attn.benchmarks import report

    if options.resume and (path := report.results_path(today.device, op, options.store)).exists():
        run, rows = report.read(path)
        if (run.device, run.date, run.versions) == (today.device, today.date, today.versions):
            return run, rows
    return today, []


def _rows(op: str, options: argparse.Namespace, done: Collection[tuple[str, str]] = ()) -> Iterator[tuple[Any, str]]:
    """Rows of the results file, and what failed, of all cases but those that are ``done``."""
    from jax_fp8attn.benchmarks import models, timing

    module = importlib.import_module(f"jax_fp8attn.benchmarks.{OPS[op]}")
    wanted = [case for case in models.cases(op) if options.only in f"{case.name} {case.variant}"]
    cases = [case for case in wanted if (case.name, case.variant) not in done]
    progress = Progress()
    if hasattr(module, "prepare"):
        progress(f"{op}: preparing")
        module.prepare(cases, options.peers)
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for first in range(0, len(cases), AT_ONCE):
            progress(f"{op} {first + 1} of {len(cases)}: compiling")
            together = cases[first : first + AT_ONCE]
            # nothing else may run on the device, or take the host's time, while a case is timed
            gated = list(pool.map(functools.partial(_gated, module, options.peers), together))
            for number, case in enumerate(together, first + 1):
                progress(f"{op} {number} of {len(cases)}: {case.name} {case.variant}")
                trial, ready, messages = gated.pop(0)
                yield from ((None, message) for message in messages)
                try:
                    times = timing.measure([contender for contender, _ in ready], trial.sets, options.rounds)
                    yield from ((_row(case, trial, *pair, times), "") for pair in ready)
                except RuntimeError as failure:  # the profiler may lose events
                    yield None, f"{case.name} {case.variant} is not timed: {failure}"
                del trial, ready
    progress.done()


def _gated(module: Any, folder: Path | None, case: Any) -> tuple[Any, list[tuple[Any, float]], list[str]]:
    """The trial of a case, the contenders whose first result is right with their errors, and what is wrong."""
    trial = module.trial(case, folder)
    ready, messages = [], []
    for contender in trial.contenders:
        what = f"{case.name} {case.variant}: {contender.name}"
        try:
            error, bound = trial.error(contender, contender.call(0)), trial.bound(contender)
        except Exception as failure:  # whatever another project's kernel raises: the others are timed all the same
            messages.append(f"{what} failed: {type(failure).__name__}: {failure}")
            continue
        if math.isfinite(error) and error <= bound:
            ready.append((contender, error))
        else:
            messages.append(f"{what} has error {error:.3g}, bound {bound:.3g}")
    return trial, ready, messages


def _row(case: Any, trial: Any, contender: Any, error: float, times: dict[str, Any]) -> Any:
    from jax_fp8attn.benchmarks import report

    measured = times[contender.name]
    return report.Row(
        op=case.op,
        case=case.name,
        shape=case.shape,
        implementation=contender.name,
        variant=case.variant,
        is_peer=contender.is_peer,
        time_us=measured.median,
        spread_us=measured.spread,
        bytes=trial.bytes,
        flops=trial.flops,
        error=error,
        error_bound=trial.bound(contender),
        dispatch_us=measured.dispatch,
    )


def _versions() -> dict[str, str]:
    versions = {name: version for name, version in env.collect()["packages"].items() if version}
    facts = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={facts}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return versions
    names = ("driver", "sm clock", "memory clock", "power limit")
    return versions | dict(zip(names, (part.strip() for part in answer.split(",")), strict=False))
