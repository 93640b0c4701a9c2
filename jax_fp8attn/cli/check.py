"""``check``: an op's whole contract suite, over every implementation of this machine."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from jax_fp8attn.cli import canary

SUITES = {
    "gdn_prefill": (
        "test_gdn_prefill.py",
        "test_gdn_pool.py",
        "test_gdn_prepare.py",
        "test_gdn_recurrence.py",
        "test_gdn_kernel.py",
    ),
    "merge_attn_states": ("test_merge.py", "test_merge_kernel.py"),
    "mla_prefill": ("test_mla_prefill.py", "test_mla_kernel.py", "test_mla_bf16.py", "test_mla_prepare.py"),
    "quantize_fp8": ("test_quantize.py", "test_latent.py"),
    "sparse_prefill": ("test_sparse_prefill.py", "test_sparse_kernel.py", "test_sparse_narrow.py"),
}
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}
TOOLS = ("memcheck", "synccheck")
OURS = "kns=fp8attn"  # a substring of the kernels' names
REPORTED = 9  # exit status of a sanitizer that reported something


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=sorted(PLATFORMS), default="cpu", help="default %(default)s")
    parser.add_argument("--op", choices=sorted(SUITES), action="append", help="one op (default: all)")
    parser.add_argument("--all", action="store_true", help="the long checks, too")
    parser.add_argument("--sanitize", action="store_true", help="a small set, under compute-sanitizer")


def run(options: argparse.Namespace) -> int:
    tests = Path(__file__).resolve().parents[2] / "tests"
    if not (tests / "conftest.py").exists():
        print("check needs a checkout of the repository: the tests are not part of the installed package")
        return 2
    if options.sanitize and not shutil.which("compute-sanitizer"):
        print("--sanitize needs compute-sanitizer, which comes with the CUDA toolkit, on PATH")
        return 2
    counts: dict[str, dict[str, int]] = {}
    if options.sanitize:
        for tool in canary.FAULTS:
            counts[f"canary {tool}"] = _canary(tool, options)
    for op in options.op or sorted(SUITES):
        files = [str(tests / name) for name in SUITES[op] if (tests / name).exists()]
        if options.sanitize:
            for tool in TOOLS:
                counts[f"{op} {tool}"] = _run(files, options, "sanitize", _sanitizer(tool))
        else:
            counts[op] = _run(files, options, "" if options.all else "not slow", [])
    failed = any(count["failed"] or not count["passed"] for count in counts.values())
    if options.json:
        print(json.dumps({"device": options.device, "suites": counts}))
    else:
        for name, count in counts.items():
            print(f"{name} on {options.device}: " + ", ".join(f"{number} {what}" for what, number in count.items()))
    return 1 if failed else 0


def _sanitizer(tool: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(REPORTED), "--kernel-name", OURS]


def _canary(tool: str, options: argparse.Namespace) -> dict[str, int]:
    """Runs a faulty kernel as the suites are run: passed if the sanitizer reports it."""
    done = subprocess.run(
        [*_sanitizer(tool), sys.executable, "-m", "jax_fp8attn.cli.canary", tool],
        env=os.environ | _environment(options.device, True),
        capture_output=True,
        text=True,
    )
    reported = done.returncode == REPORTED
    if not reported:
        print(f"{tool} did not report a faulty kernel of ours, so its silence proves nothing:", file=sys.stderr)
        print("\n".join((done.stdout + done.stderr).splitlines()[-10:]), file=sys.stderr)
    return {"passed": int(reported), "failed": int(not reported), "skipped": 0}


def _run(files: list[str], options: argparse.Namespace, marks: str, prefix: list[str]) -> dict[str, int]:
    """Runs pytest in a process of its own; a failing exit status without a failing test counts as one."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [*prefix, sys.executable, "-m", "pytest", *files, "-m", marks, f"--junitxml={report}"]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            env=os.environ | _environment(options.device, bool(prefix)),
            stdout=subprocess.DEVNULL if options.json else None,
        )
        if not report.exists():
            return {"passed": 0, "failed": 1, "skipped": 0}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors or int(done.returncode != 0)
    return {"passed": total - failures - errors - skipped, "failed": failed, "skipped": skipped}


def _environment(device: str, sanitized: bool) -> dict[str, str]:
    """On a GPU memory is taken as needed; for the sanitizer every buffer is an allocation of its own."""
    variables = {"JAX_PLATFORMS": PLATFORMS[device], "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return variables | ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"} if sanitized else {})
