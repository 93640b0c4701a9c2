"""``env``: what a bug report needs, from an allow-list; nothing else of the environment is printed."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from typing import Any

import jax

from jax_fp8attn import dispatch
from jax_fp8attn._version import VERSION

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-rocm7-plugin", "numpy", "ml_dtypes", "flax", "torch", "jax-triton",
    "triton", "jax-tvm-ffi", "nvidia-cutlass-dsl", "flashinfer-python", "amd-aiter", "qwix", "rich", "matplotlib",
    "hypothesis",
)  # fmt: skip
VARIABLES = (
    "JAX_FP8ATTN_IMPLEMENTATION", "JAX_FP8ATTN_FP8_PREFILL", "JAX_FP8ATTN_CACHE_DIR", "JAX_FP8ATTN_HIP_LIBRARY",
    "JAX_FP8ATTN_AITER_HSA", "JAX_FP8ATTN_TUNING", "JAX_PLATFORMS", "XLA_FLAGS",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0


def collect() -> dict[str, Any]:
    device = dispatch.current_device()
    return {
        "jax_fp8attn": VERSION,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()],
        "target": f"{device.platform} {device.kind} {device.compute_capability or device.architecture}".strip(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "implementations": {
            op: {candidate.name: _availability(candidate, device) for candidate in candidates}
            for op, candidates in dispatch.CANDIDATES.items()
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _availability(candidate: dispatch.Candidate, device: dispatch.Device) -> str:
    if candidate.module is None:
        return candidate.missing
    if candidate.pieces:
        return "; ".join(importlib.import_module(candidate.module).missing(device)) or "available"
    if candidate.platforms and device.platform not in candidate.platforms:
        return f"needs {' or '.join(candidate.platforms)}"
    return "available"


def as_text(facts: dict[str, Any]) -> str:
    lines = [f"jax_fp8attn {facts['jax_fp8attn']}, Python {facts['python']}, {facts['system']}"]
    lines += ["packages"] + [
        f"  {name:<20} {version or 'not installed'}" for name, version in facts["packages"].items()
    ]
    lines += ["devices"] + [f"  {device}" for device in facts["devices"]]
    lines += ["environment"] + [f"  {name}={value}" for name, value in facts["variables"].items()]
    lines += ["implementations"]
    for op, candidates in facts["implementations"].items():
        lines += [f"  {op}"] + [f"    {name:<12} {state}" for name, state in candidates.items()]
    return "\n".join(lines)
