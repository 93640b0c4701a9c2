"""Exported programs: serialised here, run by another process. R16."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax_fp8attn.custom_calls.common import aiter_library

import jax_fp8attn as fp8attn
from jax_fp8attn import dispatch
from jax_fp8attn.dispatch import Device

HOPPER = Device("cuda", "NVIDIA H200", (9, 0))

RUN = """
import sys, jax, numpy as np, pathlib
import jax_fp8attn
program, inputs, outputs = sys.argv[1:]
call = jax.export.deserialize(bytearray(pathlib.Path(program).read_bytes())).call
results = call(*np.load(inputs).values())
np.savez(outputs, *(np.asarray(x).view(np.uint8) for x in jax.tree.leaves(results)))
"""


def merge(out: jax.Array, lse: jax.Array) -> fp8attn.Fp8Array:
    spec = fp8attn.Fp8PerGroup.deepgemm_sm90()
    return fp8attn.merge_attn_states(out, lse, out[::-1], lse[:, ::-1], output_quant=spec)


def states() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in ((6, 2, 128), (2, 6))]


@pytest.mark.slow
def test_runs_in_a_fresh_process(tmp_path: Path) -> None:
    """For a CPU and CUDA in one, an ``Fp8Array`` as result."""
    exported = jax.export.export(jax.jit(merge), platforms=["cpu", "cuda"])(*states())
    paths = [str(tmp_path / name) for name in ("program", "inputs.npz", "outputs.npz")]
    Path(paths[0]).write_bytes(exported.serialize())
    np.savez(paths[1], *states())
    subprocess.run([sys.executable, "-c", RUN, *paths], check=True, timeout=120, env={"JAX_PLATFORMS": "cpu"})
    got = list(np.load(paths[2]).values())
    want = [np.asarray(x).view(np.uint8) for x in jax.tree.leaves(jax.jit(merge)(*states()))]
    assert len(got) == len(want) == 2
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_kernel_needs_no_permission() -> None:
    """Exported for CUDA without a GPU: the kernel's call is one that JAX knows."""
    with dispatch.target_device(HOPPER):
        traced_here = lambda *states: merge(*states)
        exported = jax.export.export(jax.jit(traced_here), platforms=["cuda"])(*states())
    assert set(re.findall(r"custom_call @(\w+)", exported.mlir_module())) == {"mosaic_gpu_v2"}
    assert jax.export.deserialize(exported.serialize()).platforms == ("cuda",)


def test_the_calls_to_allow() -> None:
    """Every target that this package registers."""
    named = {str(check) for check in dispatch.export_checks()}
    assert len(named) == 1 and aiter_library.TARGET in named.pop()
