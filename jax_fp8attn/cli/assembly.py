"""Compiles for an NVIDIA GPU on a machine without one, and reads what the assembler did."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jax_fp8attn.dispatch import Device

SERIALISED = ("C7510", "C7511", "C7512", "C7513", "C7514")
SETMAXNREG_IGNORED = "C7504"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
TENSOR_CORE = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "UTCQMMA", "UTCHMMA")


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for; the facts are the vendor's."""

    kind: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes of a multiprocessor
    bandwidth: float  # bytes a second
    l2: int
    memory: int
    clock_ghz: float

    @property
    def device(self) -> Device:
        return Device("cuda", self.kind, self.compute_capability)

    @property
    def block_shared_memory(self) -> int:
        """The most that one block can have: the driver keeps 1 KiB."""
        return self.shared_memory - 1024

    def config(self) -> str:
        """XLA's GpuTargetConfig as text. ACCELERATED_FEATURES is the "a" of sm_90a: without it there is no wgmma."""
        major, minor = self.compute_capability
        feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        fields = {
            "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_memory, "shared_memory_per_block_optin": self.block_shared_memory,
            "threads_per_core_limit": 2048 if major >= 9 else 1536, "core_count": self.multiprocessors,
            "fpus_per_core": 128, "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535, "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64, "memory_bandwidth": int(self.bandwidth), "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock_ghz, "device_memory_size": self.memory, "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536, "device_address_bits": 64,
        }  # fmt: skip
        capability = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}"
        info = " ".join(f"{name}: {value}" for name, value in fields.items())
        return (
            f'gpu_device_info {{ {info} {capability} }} platform_name: "CUDA" '
            f'dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{self.kind}"'
        )


TARGETS = {
    "sm_89": Target("NVIDIA L40S", (8, 9), 142, 102400, 8.6e11, 100663296, 47 << 30, 2.52),
    "sm_90a": Target("NVIDIA H200", (9, 0), 132, 233472, 4.8e12, 52428800, 151397597184, 1.98),
    "sm_100a": Target("NVIDIA B200", (10, 0), 148, 233472, 7.67e12, 132644864, 191514411008, 1.965),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What became of one kernel."""

    name: str
    registers: int
    spilled: int  # bytes, stores and loads
    shared_memory: int
    warnings: tuple[str, ...]
    instructions: int
    loop: int  # instructions of the main loop; 0: there is none
    mix: dict[str, int]  # of the main loop, or else of the kernel
    setmaxnreg_lost: bool
    missing_registers: int  # for which setmaxnreg waits, and which the launch has not

    def faults(self, registers: int, shared_memory: int) -> tuple[str, ...]:
        """What makes the gate fail, given the kernel's budget."""
        faults = []
        if self.spilled:
            faults.append(f"{self.spilled} bytes spilled")
        codes = [code for code in SERIALISED if any(code in line for line in self.warnings)]
        if codes:
            faults.append(f"wgmma serialised ({', '.join(codes)})")
        if self.setmaxnreg_lost or any(SETMAXNREG_IGNORED in line for line in self.warnings):
            faults.append("setmaxnreg ignored")
        if self.missing_registers:
            faults.append(f"setmaxnreg waits for {self.missing_registers} registers more than the launch has")
        if self.registers > registers:
            faults.append(f"{self.registers} registers, the budget is {registers}")
        if self.shared_memory > shared_memory:
            faults.append(f"{self.shared_memory} bytes of shared memory, the budget is {shared_memory}")
        return tuple(faults)


def prepare() -> None:
    """Lets the CUDA plugin load without a driver; before the first use of a backend."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", "cpu")


def compile_for(
    target: Target, function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct], keep: Path | None = None
) -> list[Kernel]:
    """The Mosaic kernels of ``jit(function)(*arguments)``. ``keep`` is a folder for PTX, SASS and logs."""
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_place(target)) for a in arguments]
        stack.enter_context(_architecture(target))
        if not keep:
            stack.enter_context(_without_constraints())
        stack.enter_context(_environment("MOSAIC_GPU_DUMP_TO", str(folder)))
        jax.jit(function).trace(*placed).lower().compile()
        for log in folder.glob("*.mlir-passes.log"):
            log.unlink()
        return [_read(file) for file in sorted(folder.glob("*.ptx"))]


@functools.cache
def _place(target: Target) -> jax.sharding.Sharding:
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.config(), topology="1x1x1")
    mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextlib.contextmanager
def _architecture(target: Target) -> Iterator[None]:
    """Mosaic's lowering asks the default device, which is a CPU here, and then takes Hopper."""
    from jax.experimental.mosaic.gpu import utils

    before = utils._infer_arch
    utils._infer_arch = lambda: target.compute_capability
    try:
        yield
    finally:
        utils._infer_arch = before


@contextlib.contextmanager
def _without_constraints() -> Iterator[None]:
    """Of all that Mosaic dumps, the text of the layouts' constraints takes half of the time of a compilation."""
    from jax.experimental.mosaic.gpu import constraints

    system = constraints.ConstraintSystem
    before = system.__str__
    system.__str__ = lambda self: ""
    try:
        yield
    finally:
        system.__str__ = before


def _read(ptx: Path) -> Kernel:
    text, log, listing, resources = (
        path.read_text(errors="replace") if path.exists() else ""
        for path in (ptx, *(ptx.with_suffix(suffix) for suffix in (".ptxas", ".sass_ctrl", ".resources.txt")))
    )
    instructions, loop = _instructions(listing)
    if not instructions or "Used" not in log:
        raise RuntimeError(f"{ptx.stem}: no assembler log or no listing; nvidia-cuda-nvdisasm must be installed")
    mix = collections.Counter(name.split(".")[0] for name in (loop or instructions))
    registers = max(_numbers(r"Used (\d+) registers", log))
    return Kernel(
        name=ptx.stem,
        registers=registers,
        spilled=sum(max(_numbers(rf"(\d+) bytes spill {kind}", log), default=0) for kind in ("stores", "loads")),
        shared_memory=sum(_numbers(r"smem_scratch_bytes=(\d+)", resources)),
        warnings=tuple(sorted({line.strip() for line in log.splitlines() if "warn" in line.lower() or "(C75" in line})),
        instructions=len(instructions),
        loop=len(loop),
        mix=dict(mix.most_common()),
        setmaxnreg_lost="setmaxnreg" in text and not any(name.startswith("USETMAXREG") for name in instructions),
        missing_registers=_missing_registers(text, registers),
    )


def _missing_registers(text: str, launched: int) -> int:
    """Of a block: every decrease is one warpgroup's, all others increase. What they ask for beyond the registers that
    all threads are launched with, in steps of 8, never comes."""
    wanted, left = (_numbers(rf"setmaxnreg\.{kind}\S*\s+(\d+)", text) for kind in ("inc", "dec"))
    if not wanted:
        return 0
    threads = math.prod(_numbers(r"(\d+)", re.findall(r"\.(?:max|req)ntid ([\d, ]+)", text)[0]))
    held = max(wanted) * (threads // 128 - len(left)) + sum(left)
    return max(0, 128 * held - threads * -(-launched // 8) * 8)


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(number) for number in re.findall(pattern, text)]


def _instructions(listing: str) -> tuple[list[str], list[str]]:
    """All opcodes, and those of the main loop: the innermost one with tensor-core work, else the longest."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(names)
        elif found := INSTRUCTION.search(line):
            names.append(found.group(1))
            target = re.search(r"\.L_x_\d+", found.group(2))
            start = labels.get(target.group()) if target and names[-1].startswith("BRA") else None
            if start is not None and len(names) - start > 1:
                loops.append(names[start:])
    with_products = [loop for loop in loops if any(name.startswith(TENSOR_CORE) for name in loop)]
    if with_products:
        return names, min(with_products, key=len)
    return names, max(loops, key=len, default=[])
