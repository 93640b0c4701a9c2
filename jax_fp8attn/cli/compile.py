"""``compile``: builds every kernel form for a GPU that need not be there, and fails on what would make it slow."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import jax

from jax_fp8attn import dispatch
from jax_fp8attn.cli import assembly
from jax_fp8attn.cli.gated import GATED
from jax_fp8attn.cli.show import Progress, table

SHOWN = ("QGMMA", "HGMMA", "MUFU", "F2FP", "SHFL", "FFMA", "FMUL", "LDG", "LD", "STG", "ST", "BAR", "SYNCS")
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=sorted(assembly.TARGETS), default="sm_90a", help="default %(default)s")
    parser.add_argument("--op", choices=sorted(GATED), action="append", help="one op (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose label contains TEXT")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep PTX, SASS and logs there")


def run(options: argparse.Namespace) -> int:
    if not any(importlib.util.find_spec(name) for name in PLUGINS):
        print("compile needs the CUDA plugin of jax: make compile-check installs it, or pip install 'jax[cuda13]'")
        return 2
    assembly.prepare()
    target = assembly.TARGETS[options.arch]
    progress, start = Progress(), time.monotonic()
    records: list[dict[str, Any]] = []
    for op in options.op or sorted(GATED):
        calls, budget = GATED[op]
        for call in calls():
            if options.only in call.label:
                progress(f"{op} {call.label}")
                keep = options.keep and options.keep / f"{op} {call.label}".replace(" ", "_")
                records += _compiled(op, call, target, budget, keep)
    progress.done()
    failed = sum(bool(record["faults"]) for record in records)
    summary = f"{len(records)} kernels for {options.arch} by {_assembler()}, jax {jax.__version__}: {failed} failed"
    if options.json:
        print(json.dumps({"arch": options.arch, "jax": jax.__version__, "assembler": _assembler(), "kernels": records}))
    else:
        print(_as_text(records))
        print(f"{summary} ({time.monotonic() - start:.0f} s)")
    return 1 if failed or not records else 0


def _compiled(op: str, call: Any, target: assembly.Target, budget: Any, keep: Path | None) -> list[dict[str, Any]]:
    """One record a kernel. A call that does not compile, or without a kernel, is one record with that fault."""
    try:
        with dispatch.target_device(target.device):
            kernels = assembly.compile_for(target, call.function, call.arguments, keep)
    except Exception as error:  # whatever a compiler throws
        return [{"op": op, "call": call.label, "faults": [f"{type(error).__name__}: {error}".splitlines()[0]]}]
    if not kernels:
        return [{"op": op, "call": call.label, "faults": ["no kernel was built"]}]
    limit = min(budget.shared_memory, target.block_shared_memory)
    return [
        {"op": op, "call": call.label, **dataclasses.asdict(k), "faults": list(k.faults(budget.registers, limit))}
        for k in kernels
    ]


def _as_text(records: list[dict[str, Any]]) -> str:
    head = ("op", "call", "registers", "spilled", "smem", "instructions", "main loop", "mix", "faults")
    rows = []
    for record in records:
        mix = record.get("mix", {})
        rows.append(
            [
                record["op"],
                record["call"],
                *(record.get(name, "-") for name in ("registers", "spilled", "shared_memory", "instructions", "loop")),
                " ".join(f"{name} {mix[name]}" for name in SHOWN if name in mix),
                "; ".join(record["faults"]) or "none",
            ]
        )
    return table(head, rows)


def _assembler() -> str:
    """jax 0.12 assembles through libnvJitLink where that is installed, and drops setmaxnreg then."""
    linked = importlib.util.find_spec("nvidia") and any(
        list(Path(folder).glob("**/libnvJitLink.so*"))
        for folder in importlib.util.find_spec("nvidia").submodule_search_locations or ()
    )
    newer = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 12)
    return "nvJitLink" if linked and newer else "ptxas"
