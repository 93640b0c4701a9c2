"""What stands in for AITER and an AMD GPU: code objects, a HIP runtime that interprets the kernel, a plain planner."""

import contextlib
import ctypes
import math
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax_fp8attn.custom_calls import aiter_mla_prefill
from jax_fp8attn.custom_calls.common import aiter_library

import jax_fp8attn as fp8attn
from jax_fp8attn import dispatch
from jax_fp8attn.dispatch import Device

MI355X = Device("rocm", "AMD Instinct MI355X", architecture="gfx950")
COMPILER = shutil.which("c++") or shutil.which("g++") or ""
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler: neither library can be built")
KERNEL = "mla_pfl_qh192_vh128_m32x8_n128x1_causal"
ARGUMENTS = (
    "ptr_Q", "ptr_K", "ptr_V", "ptr_O", "ptr_PartialO", "ptr_PartialLSE", "ptr_WorkIndptr", "ptr_WorkInfo",
    "ptr_QOIndptr", "ptr_KVIndptr", "ptr_KVPageIndices", "ptr_QScale", "ptr_KScale", "ptr_VScale", "scalar",
    "num_q_tokens", "num_head_q", "num_page", "num_used_page",
)  # fmt: skip


def pack(value: Any) -> bytes:
    """msgpack."""
    if value is None or isinstance(value, bool):
        return bytes([0xC0 if value is None else 0xC2 + value])
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else struct.pack(">Bi", 0xD2, value)
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else struct.pack(">BB", 0xD9, len(data))) + data
    if isinstance(value, dict):
        body = b"".join(pack(key) + pack(x) for key, x in value.items())
        return (bytes([0x80 | len(value)]) if len(value) < 16 else struct.pack(">BH", 0xDE, len(value))) + body
    return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(pack, value))


def kernel_facts(causal: bool, arguments: Sequence[str] = ARGUMENTS, **changed: Any) -> dict[str, Any]:
    """One kernel of a note, as AITER's files have it; pads stand between the arguments."""
    listed = []
    for place, name in enumerate(arguments):
        size = 8 if name.startswith("ptr") else 4
        listed.append({".name": name, ".offset": 16 * place, ".size": size, ".value_kind": "by_value"})
        listed.append({".name": "pad", ".offset": 16 * place + size, ".size": 16 - size, ".value_kind": "by_value"})
    symbol = f"_ZN5aiter40{KERNEL}{int(causal)}E"
    facts = {
        ".args": listed, ".group_segment_fixed_size": 163840, ".kernarg_segment_size": 16 * len(arguments),
        ".max_flat_workgroup_size": 512, ".name": symbol, ".reqd_workgroup_size": [512, 1, 1],
        ".symbol": f"{symbol}.kd", ".uses_dynamic_stack": False, ".wavefront_size": 64,
    }  # fmt: skip
    return facts | {f".{name}": value for name, value in changed.items()}


def code_object(*kernels: dict[str, Any], machine: int = 224, flags: int = 0x54F) -> bytes:
    """An ELF file with nothing in it but the note that describes its kernels."""
    data = pack({"amdhsa.kernels": list(kernels), "amdhsa.version": [1, 2]})
    note = struct.pack("<III", 7, len(data), 32) + b"AMDGPU\0\0" + data + bytes(-len(data) % 4)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQI", 3, machine, 1, 0, 0, 64 + len(note), flags)
    header += struct.pack("<HHHHHH", 64, 0, 0, 64, 2, 0)
    section = struct.pack("<IIQQQQIIQQ", 0, 7, 0, 0, 64, len(note), 0, 0, 4, 0)
    return header + note + bytes(64) + section


def write_hsa(folder: Path) -> Path:
    """An hsa folder with both kernels."""
    place = folder / "gfx950" / "mla"
    place.mkdir(parents=True)
    for causal in (False, True):
        (place / f"{KERNEL}{int(causal)}.co").write_bytes(code_object(kernel_facts(causal)))
    return folder


class Facts(ctypes.Structure):
    """Of the fake's last launch."""

    _fields_ = [
        ("arguments", ctypes.c_ubyte * 304), ("grid", ctypes.c_uint), ("block", ctypes.c_uint),
        ("launches", ctypes.c_int64), ("partial_rows", ctypes.c_int64),
    ]  # fmt: skip


class Hip:
    """The fake runtime."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "libfakehip.so"
        source = Path(__file__).with_name("fake_hip.cc")
        options = ["-O3", "-std=c++17", "-fPIC", "-shared"]
        subprocess.run([COMPILER, *options, str(source), "-o", str(self.path)], check=True, timeout=300)
        self.library = ctypes.CDLL(str(self.path))

    @property
    def last(self) -> Facts:
        facts = Facts()
        self.library.fake_last(ctypes.byref(facts))
        return facts

    @contextlib.contextmanager
    def partial_rows(self, rows: int) -> Iterator[None]:
        """Rows of the next launches' partial results, which are filled with NaN before."""
        self.library.fake_partial_rows(ctypes.c_int64(rows))
        try:
            yield
        finally:
            self.library.fake_partial_rows(ctypes.c_int64(0))


class Amd:
    """A machine with an MI355X, as far as this package can tell."""

    def __init__(self, folder: Path) -> None:
        self.hsa = write_hsa(folder / "hsa")
        self.hip = Hip(folder)
        self.cache = folder / "cache"
        self.environment = {
            "JAX_FP8ATTN_CACHE_DIR": str(self.cache),
            "JAX_FP8ATTN_AITER_HSA": str(self.hsa),
            "JAX_FP8ATTN_HIP_LIBRARY": str(self.hip.path),
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAX_FP8ATTN_CACHE_DIR", str(self.cache))
            self.library = aiter_library.build(COMPILER)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        """``mla_prefill`` by the kernel's interpreter; partial results start as NaN where one launch does it all."""
        with dispatch.target_device(MI355X):
            problem = problem_of(*args, **kwargs)
            with self.hip.partial_rows(partial_rows(problem)):
                return jax.block_until_ready(fp8attn.mla_prefill(*args, **kwargs, implementation="aiter"))


class _Grabbed(Exception):
    pass


def problem_of(*args: Any, **kwargs: Any) -> Any:
    """The static facts that the op makes of a call."""

    def grab(op: Any, problem: Any, *rest: Any) -> Any:
        raise _Grabbed(problem)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "call", grab)
        try:
            fp8attn.mla_prefill(*args, **kwargs)
        except _Grabbed as grabbed:
            return grabbed.args[0]
    raise AssertionError("the op did not reach dispatch")


def partial_rows(problem: Any) -> int:
    if not (problem.tokens and problem.keys and problem.sequences and problem.heads):
        return 0
    groups = aiter_mla_prefill._head_groups(problem)
    return aiter_mla_prefill._shape(problem, groups[0]).partials * 256 if len(groups) == 1 else 0


def plain_plan(
    queries: Sequence[int], keys: Sequence[int], heads: int, causal: bool, every: bool, blocks: int = 256
) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, int], list[int]]]:
    """The plan of AITER's planner by loops: indptr, records, and the slots of each tile (rows from, to) in parts."""
    q_first, k_first = np.cumsum([0, *queries]), np.cumsum([0, *keys])
    tiles = []  # sequence, rows from and to, units
    for b, (lq, lk) in enumerate(zip(queries, keys, strict=True)):
        numbers = list(range(-(-lq // 256)))
        while numbers:
            for number in (numbers.pop(0), *([numbers.pop()] if numbers else [])):
                last = min(256 * number + 256, lq)
                seen = min(lk - lq + last, lk) if causal else lk
                tiles.append((b, q_first[b] + 256 * number, q_first[b] + last, max(0, math.ceil(seen / 128))))
    clusters = math.gcd(heads, blocks)
    groups, total = blocks // clusters, sum(tile[3] for tile in tiles)
    shares = [total // groups + (group < total % groups) for group in range(groups)]
    owners = [group for group, share in enumerate(shares) for _ in range(share)]  # of each unit
    pieces: list[list[list[int]]] = [[] for _ in range(groups)]
    slots: dict[tuple[int, int], list[int]] = {}
    unit = slot = 0
    for b, start, end, units in tiles:
        own = owners[unit : unit + units]
        unit += units
        for group in sorted(set(own)):
            low = own.index(group)
            high = low + own.count(group)
            location = -1
            if every or high - low < units:
                location, slot = 256 * slot, slot + 1
                slots.setdefault((int(start), int(end)), []).append(location)
            stop = min(k_first[b] + 128 * high, k_first[b + 1])
            pieces[group].append([b, location, start, end, k_first[b] + 128 * low, stop, 0])
    records, indptr = [], [0]
    for cluster in range(clusters):
        for group in range(groups):
            for head in range(cluster * (heads // clusters), (cluster + 1) * (heads // clusters)):
                records += [[*piece, head + (head + 1) * 65536] for piece in pieces[group]]
            indptr.append(len(records))
    return np.array(indptr, np.int32), np.array(records, np.int32).reshape(-1, 8), slots
