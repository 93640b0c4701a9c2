"""The command line: ``python -m jax_fp8attn``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

COMMANDS = {
    "demo": "run one serving step of each kind on this machine and check it against the oracles",
    "env": "print versions, devices, and what is available here and why not",
    "explain": "print which implementation an op takes for a shape, and why not the others",
    "check": "run the contract suites on this machine",
    "bench": "time every implementation on shapes of real models, on a GPU",
    "tune": "time every configuration of a kernel and keep those that beat the heuristic's, on a GPU",
    "compile": "compile every kernel for a GPU, without one, and fail on spills and serialised tensor-core work",
    "amd": "build the host library behind AITER's kernels, and test them on an MI350X or MI355X",
}


def main(arguments: Sequence[str]) -> int:
    """Runs one command; the exit status of the process."""
    parser = argparse.ArgumentParser(prog="python -m jax_fp8attn", description="FP8 prefill kernels for JAX")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, summary in COMMANDS.items():
        command = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        importlib.import_module(f"jax_fp8attn.cli.{name}").add_arguments(command)
    options = parser.parse_args(arguments)
    return importlib.import_module(f"jax_fp8attn.cli.{options.command}").run(options)
