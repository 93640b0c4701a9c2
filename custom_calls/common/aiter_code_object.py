"""AITER's code objects: where they are, and whether a kernel in one takes the arguments that we pass.

A code object is an ELF file whose note (msgpack) names each kernel and its arguments. Nothing of AITER is imported or
run to read it. The bytes that were checked are the bytes that are launched.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
import struct
from pathlib import Path
from typing import Any

VARIABLE = "JAX_FP8ATTN_AITER_HSA"
PACKAGES = ("aiter_meta", "aiter")  # what AITER's wheel and its editable install call themselves
LARGEST = 1 << 24  # bytes of a code object; AITER's have tens of KiB
ARCHITECTURE = "gfx950"
MACHINE_AMDGPU, MACHINE_GFX950, NOTE_METADATA = 224, 0x4F, 32
KNOWN_GOOD = "ROCm/aiter of 2026-01-19 to e4048607 (2026-08-22)"

POINTERS = (
    "ptr_Q", "ptr_K", "ptr_V", "ptr_O", "ptr_PartialO", "ptr_PartialLSE", "ptr_WorkIndptr", "ptr_WorkInfo",
    "ptr_QOIndptr", "ptr_KVIndptr", "ptr_KVPageIndices", "ptr_QScale", "ptr_KScale", "ptr_VScale",
)  # fmt: skip
NUMBERS = ("scalar", "num_q_tokens", "num_head_q", "num_page", "num_used_page")
LAYOUT = tuple(
    (name, 16 * place, 8 if name in POINTERS else 4) for place, name in enumerate((*POINTERS, *NUMBERS))
)  # name, offset, bytes
ARGUMENT_BYTES, THREADS, WAVEFRONT, SHARED_MEMORY = 304, 512, 64, 163840


class CodeObjectError(ValueError):
    """A code object is not there, or is none that can be launched; the text says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CodeObject:
    """A checked code object."""

    path: Path
    symbol: str
    sha256: str
    content: bytes = dataclasses.field(repr=False)


def file_name(causal: bool) -> str:
    return f"mla_pfl_qh192_vh128_m32x8_n128x1_causal{int(causal)}.co"


def find(causal: bool) -> CodeObject:
    """AITER's FP8 MLA prefill kernel on this machine; raises CodeObjectError."""
    path = folder() / ARCHITECTURE / "mla" / file_name(causal)
    try:
        facts = path.stat()
    except OSError:
        raise CodeObjectError(
            f"{path} is not there: that AITER is older than its FP8 MLA prefill. Known good: {KNOWN_GOOD}"
        ) from None
    return _checked(path, causal, (facts.st_mtime_ns, facts.st_size, facts.st_ino))


def folder() -> Path:
    """The folder that holds a folder for each architecture."""
    if named := os.environ.get(VARIABLE, ""):
        path = Path(named)
        if path.is_absolute() and path.is_dir():
            return path
        raise CodeObjectError(f"{VARIABLE}={named} is not the absolute path of a folder")
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # looks for the package and does not import it
        for place in (spec and spec.submodule_search_locations) or ():
            if (Path(place) / "hsa").is_dir():
                return Path(place) / "hsa"
    raise CodeObjectError(
        "AITER's code objects are not here: install ROCm/aiter (its wheel carries aiter_meta/hsa) or set "
        f"{VARIABLE} to the hsa folder of a checkout"
    )


@functools.lru_cache(maxsize=8)
def _checked(path: Path, causal: bool, version: tuple[int, ...]) -> CodeObject:
    """``version`` changes when the file does."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise CodeObjectError(f"{path} cannot be read: {error.strerror}") from None
    symbol = f"_ZN5aiter40mla_pfl_qh192_vh128_m32x8_n128x1_causal{int(causal)}E"
    if why := faults(content, symbol):
        raise CodeObjectError(f"{path} {why}. Known good: {KNOWN_GOOD}")
    return CodeObject(path, symbol, hashlib.sha256(content).hexdigest(), content)


def faults(content: bytes, symbol: str) -> str:
    """Why a file cannot be launched with our arguments; empty if it can."""
    if len(content) > LARGEST:
        return f"has more than {LARGEST} bytes and is no code object"
    try:
        machine, flags = read_header(content)
        if machine != MACHINE_AMDGPU or flags & 0xFF != MACHINE_GFX950:
            return f"is made for another processor (ELF machine {machine}, flags {flags:#x}), not for {ARCHITECTURE}"
        metadata = read_metadata(content)
        (kernel,) = metadata["amdhsa.kernels"]
        return _kernel_faults(kernel, symbol)
    except (struct.error, LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        return f"is no code object with one kernel ({type(error).__name__})"


def _kernel_faults(kernel: dict[str, Any], symbol: str) -> str:
    if kernel[".symbol"] != f"{symbol}.kd":
        return f"holds the kernel {str(kernel['.symbol'])[:120]!r}, not {symbol!r}"
    named = [(x[".name"], x[".offset"], x[".size"]) for x in kernel[".args"] if x.get(".name", "pad") != "pad"]
    layout = tuple(sorted(named, key=lambda argument: argument[1]))
    size = kernel[".kernarg_segment_size"]
    if (size, layout) != (ARGUMENT_BYTES, LAYOUT):
        first = next((f"{a} where {b} is expected" for a, b in zip(layout, LAYOUT, strict=False) if a != b), "")
        first = first or f"{len(layout)} arguments in {size} bytes where {len(LAYOUT)} in {ARGUMENT_BYTES} are expected"
        return f"has another layout of kernel arguments ({first}): AITER changed its FP8 MLA prefill kernel"
    names = (".wavefront_size", ".max_flat_workgroup_size", ".group_segment_fixed_size")
    wavefront, most_threads, shared = facts = [kernel[name] for name in names]
    exact = kernel.get(".reqd_workgroup_size", [THREADS, 1, 1])
    if wavefront != WAVEFRONT or most_threads < THREADS or exact != [THREADS, 1, 1] or shared > SHARED_MEMORY:
        return f"wants another launch: wavefront, threads and bytes of shared memory are {facts}, block {exact}"
    return ""


def read_header(content: bytes) -> tuple[int, int]:
    """Machine and flags of a 64-bit little-endian ELF file."""
    if content[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no ELF file")
    return struct.unpack_from("<H", content, 18)[0], struct.unpack_from("<I", content, 48)[0]


def read_metadata(content: bytes) -> dict[str, Any]:
    """What the AMDGPU note says."""
    (table,) = struct.unpack_from("<Q", content, 40)
    entry, count = struct.unpack_from("<HH", content, 58)
    for number in range(count):
        kind, _, _, offset, size = struct.unpack_from("<IQQQQ", content, table + number * entry + 4)
        if kind == 7:  # notes
            for owner, note, data in _notes(content[offset : offset + size]):
                if (owner, note) == (b"AMDGPU", NOTE_METADATA):
                    return unpack(data)
    raise ValueError("no note")


def _notes(section: bytes) -> Any:
    place = 0
    while place < len(section):
        owner_size, size, kind = struct.unpack_from("<III", section, place)
        owner = section[place + 12 : place + 12 + owner_size].rstrip(b"\0")
        data = place + 12 + (owner_size + 3 & ~3)
        yield owner, kind, section[data : data + size]
        place = data + (size + 3 & ~3)


def unpack(data: bytes) -> Any:
    """Decodes msgpack: what the notes of code objects use of it."""
    value, end = _value(data, 0)
    if end != len(data):
        raise ValueError("bytes behind the end")
    return value


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_SIZED = {
    0xD9: ("text", ">B"), 0xDA: ("text", ">H"), 0xDB: ("text", ">I"), 0xDC: ("list", ">H"), 0xDD: ("list", ">I"),
    0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip


def _value(data: bytes, place: int) -> tuple[Any, int]:
    """The value at ``place`` and where the next one starts."""
    head, place = data[place], place + 1
    if head < 0x80 or head >= 0xE0:
        return (head if head < 0x80 else head - 256), place
    if head < 0x90:
        return _sequence(data, place, "map", head & 15)
    if head < 0xA0:
        return _sequence(data, place, "list", head & 15)
    if head < 0xC0:
        return _sequence(data, place, "text", head & 31)
    if head in _CONSTANTS:
        return _CONSTANTS[head], place
    if head in _NUMBERS:
        code = _NUMBERS[head]
        return struct.unpack_from(code, data, place)[0], place + struct.calcsize(code)
    kind, code = _SIZED[head]
    (size,) = struct.unpack_from(code, data, place)
    return _sequence(data, place + struct.calcsize(code), kind, size)


def _sequence(data: bytes, place: int, kind: str, size: int) -> tuple[Any, int]:
    if size > len(data) - place:
        raise ValueError("cut short")
    if kind == "text":
        return data[place : place + size].decode(), place + size
    values = []
    for _ in range(size * (2 if kind == "map" else 1)):
        value, place = _value(data, place)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if kind == "map" else values), place
