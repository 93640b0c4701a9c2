"""``amd``: builds the host library behind AITER's kernels, and tests on an MI350X or MI355X that they compute right."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8attn import dispatch, testing
from jax_fp8attn.cli.show import Progress, table
from jax_fp8attn.mla_prefill import mla_prefill

ERROR, LSE_ERROR = 0.04, 2e-3  # of outputs by their norm, of any lse; P is rounded to e4m3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("build", "selftest"))
    parser.add_argument("--compiler", help="C++17 compiler for build (default: c++, g++ or clang++)")


def run(options: argparse.Namespace) -> int:
    return _build(options) if options.action == "build" else _selftest(options)


def _module(name: str) -> Any:
    return importlib.import_module(f"jax_fp8attn.custom_calls.{name}")


def _build(options: argparse.Namespace) -> int:
    library = _module("common.aiter_library")
    compiler = options.compiler or next(filter(shutil.which, library.COMPILERS), None)
    try:
        if compiler is None:
            raise library.LibraryError(f"no C++ compiler: none of {', '.join(library.COMPILERS)} is on the PATH")
        path = str(library.build(compiler))
    except library.LibraryError as error:
        print(json.dumps({"built": None, "error": str(error)}) if options.json else f"amd build: {error}")
        return 1
    print(json.dumps({"built": path, "error": None}) if options.json else f"built {path}")
    return 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the self-test."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    options: tuple[tuple[str, Any], ...] = ()


LSE = (("return_lse", True),)
CASES = (
    Case("causal, bf16 output", (300, 0, 17), (300, 0, 17), 4),
    Case("causal with a prefix, lse", (130, 300), (700, 513), 4, LSE),
    Case("full, lse", (64, 5), (513, 1), 3, (*LSE, ("causal", False))),
    Case("more queries than keys", (400,), (130,), 2, LSE),
    Case("one head, every block on one tile", (40,), (5000,), 1, (("causal", False),)),
    Case("float32 output", (256, 257), (256, 257), 16, (("out_dtype", jnp.float32),)),
)


def _selftest(options: argparse.Namespace) -> int:
    device = dispatch.current_device()
    pieces = _pieces(device)
    absent = [name for name, state in pieces.items() if not state.startswith("ok")]
    cases: list[dict[str, Any]] = []
    if not absent:
        progress = Progress()
        for case in CASES:
            progress(case.name)
            cases.append(_case(case))
        progress.done()
    passed = bool(cases) and all(case["passed"] for case in cases)
    if options.json:
        print(json.dumps({"device": dataclasses.asdict(device), "pieces": pieces, "cases": cases, "passed": passed}))
    else:
        print(_as_text(pieces, cases, passed))
    return 2 if absent else int(not passed)


def _pieces(device: dispatch.Device) -> dict[str, str]:
    """What is needed: "ok ...", or why not. Loads the host library and the HIP runtime."""
    library, objects = _module("common.aiter_library"), _module("common.aiter_code_object")
    is_amd = device.architecture == objects.ARCHITECTURE
    found = {"GPU": f"{'ok' if is_amd else 'none'}: {device.platform} {device.kind} {device.architecture}".strip()}
    for causal in (True, False):
        try:
            code_object = objects.find(causal)
            found[f"AITER kernel, {'causal' if causal else 'full'}"] = (
                f"ok: {code_object.path}, SHA-256 {code_object.sha256}"
            )
        except objects.CodeObjectError as error:
            found[f"AITER kernel, {'causal' if causal else 'full'}"] = str(error)
    try:
        loaded = library.load(library.find())
        found["host library"] = f"ok: {library.find()}"
        found["HIP runtime"] = library.why_no_hip(loaded) or "ok"
    except library.LibraryError as error:
        found["host library"] = str(error)
    return found


def _case(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    rows = (sum(case.queries), 192), (sum(case.keys), 192), (sum(case.keys), 128)
    q, k, v = (jnp.asarray(rng.standard_normal((n, case.heads, width)), jnp.bfloat16) for n, width in rows)
    options = dict(case.options) | {
        f"cu_seqlens_{name}": jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)
        for name, lengths in (("q", case.queries), ("k", case.keys))
    }
    results = {}
    for name in ("aiter", "reference"):
        result = mla_prefill(q, k, v, **options, q_scale=0.5, k_scale=2.0, v_scale=1.5, implementation=name)
        results[name] = result if isinstance(result, tuple) else (result, jnp.zeros(1))
    (out, lse), (want, want_lse) = results["aiter"], results["reference"]
    facts: dict[str, Any] = {"case": case.name, "error": testing.relative_error(out, want), "lse_error": None}
    try:
        testing.assert_relative_error(out, want, ERROR, "out")
        facts["lse_error"] = testing.assert_lse_close(lse, want_lse, LSE_ERROR)
    except AssertionError as error:
        return facts | {"passed": False, "why": str(error)}
    return facts | {"passed": True, "why": ""}


def _as_text(pieces: dict[str, str], cases: list[dict[str, Any]], passed: bool) -> str:
    lines = [table(("needed", "state"), list(pieces.items()))]
    if not cases:
        return "\n".join([*lines, "not run: something that is needed is not here"])
    rows = [
        (case["case"], f"{case['error']:.2e}", "ok" if case["passed"] else f"BROKEN: {case['why']}") for case in cases
    ]
    lines += [table(("against the oracle", "error", ""), rows), "all bounds hold" if passed else "bounds BROKEN"]
    lines.append(f"jax {jax.__version__}")
    return "\n".join(lines)
