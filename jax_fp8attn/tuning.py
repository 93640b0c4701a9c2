"""Configurations that were measured: which one a problem takes, where they are kept, and what a file may do.

A kernel asks with its heuristic's choice and with every configuration that it would run:

    configs.chosen("mla_prefill", problem, default_config(problem))  # jax_fp8attn.pallas.common.configs

First answer of: the user's file, written by ``python -m jax_fp8attn tune``; the file shipped with the package; the
heuristic. ``JAX_FP8ATTN_TUNING=0`` leaves the heuristic alone. In a job of several processes, which must agree, the
user's file is not read.

A file holds data: it names one of the configurations that the kernel offers and can make none. It is JSON of this
schema, at most 1 MiB, a regular file of this user that nobody else can write, in a folder of the same kind; else, or
written for another device, version of this package or version of jax, it is ignored with one warning. It is read once.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_fp8attn._version import VERSION
from jax_fp8attn.problems import MergeProblem, MlaProblem
from jax_fp8attn.quantize import Fp8PerTensor, Fp8Spec

SCHEMA = 1
LARGEST = 1 << 20  # bytes of a file
SHIPPED = Path(__file__).resolve().parent / "tuned"
HEADER = {"schema": int, "device": str, "package": str, "jax": str, "entries": list}
ANY_JAX = "any"  # of a shipped file

_NAME = re.compile(r"[a-z0-9_]{1,48}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A winner: for problems of these facts, its times and the heuristic's in microseconds."""

    op: str
    problem: dict[str, Any]
    config: dict[str, Any]
    time_us: float
    default_us: float

    @property
    def key(self) -> tuple[str, str]:
        return self.op, json.dumps(self.problem, sort_keys=True)


def mla_facts(problem: MlaProblem) -> dict[str, Any]:
    return {
        "tokens": _rounded(problem.tokens), "keys": _rounded(problem.keys), "sequences": _rounded(problem.sequences),
        "heads": problem.heads, "causal": problem.causal, "compute": problem.compute,
        "pair": problem.k_rope_dtype is not None, "output": _output(problem.output_quant, problem.out_dtype),
        "state": "none" if problem.state_dtype is None else problem.state_dtype.name,
    }  # fmt: skip


def merge_facts(problem: MergeProblem) -> dict[str, Any]:
    return {
        "tokens": _rounded(problem.tokens), "heads": problem.heads, "width": problem.width, "states": problem.states,
        "input": problem.dtype.name, "output": _output(problem.output_quant, problem.out_dtype),
        "in_place": problem.in_place,
    }  # fmt: skip


FACTS = {"mla_prefill": mla_facts, "merge_attn_states": merge_facts}
"""What of a problem a configuration depends on. Tokens, keys and sequences are rounded up to powers of two."""

_MLA_TYPES = {
    "tokens": int, "keys": int, "sequences": int, "heads": int, "causal": bool, "compute": str, "pair": bool,
    "output": str, "state": str,
}  # fmt: skip
_MERGE_TYPES = {
    "tokens": int, "heads": int, "width": int, "states": int, "input": str, "output": str, "in_place": bool
}  # fmt: skip
_TYPES = {"mla_prefill": _MLA_TYPES, "merge_attn_states": _MERGE_TYPES}


def _rounded(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def _output(spec: Fp8Spec | None, dtype: Any) -> str:
    if spec is None:
        return dtype.name
    if isinstance(spec, Fp8PerTensor):
        return f"tensor_{spec.dtype.name}"
    return f"group{spec.group_size}_{spec.scale_format}_{spec.scale_layout}"


def config_data(config: Any) -> dict[str, Any]:
    """A configuration as a file holds it; of what is no plain value the name."""
    return json.loads(json.dumps(vars(config), default=lambda value: value.name))


_off: contextvars.ContextVar[bool] = contextvars.ContextVar("jax_fp8attn_untuned", default=False)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Heuristics alone, in this thread."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def tuned_config(op: str, problem: Any, device_kind: str, candidates: Sequence[Any]) -> Any:
    """The one of ``candidates`` (frozen dataclasses) that a file names for such problems on such a device, or None."""
    if _off.get() or os.environ.get("JAX_FP8ATTN_TUNING", "1").strip() == "0":
        return None
    key = Entry(op, FACTS[op](problem), {}, 1.0, 1.0).key
    for path, own in ((cache_file(device_kind), True), (SHIPPED / f"{slug(device_kind)}.json", False)):
        entry = _entries(path, device_kind, own).get(key) if path else None
        if entry is None or (own and jax.process_count() > 1):
            continue
        for candidate in candidates:
            if _same(config_data(candidate), entry.config):
                return candidate
        _warn_once(path, f"no configuration of {op} here is {entry.config}")
    return None


def _same(a: Any, b: Any) -> bool:
    """Equal with equal types: JSON's true is not 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def slug(device_kind: str) -> str:
    """A file name: "NVIDIA H200" to nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")[:80] or "unknown"


def cache_folder() -> Path | None:
    """``JAX_FP8ATTN_CACHE_DIR``, or jax_fp8attn in the user's cache folder by XDG's rules; None: there is no such."""
    if named := os.environ.get("JAX_FP8ATTN_CACHE_DIR", ""):
        path = Path(named)
        if path.is_absolute():
            return path
        _warn_once(path, "JAX_FP8ATTN_CACHE_DIR is not an absolute path")
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # XDG: one that is not absolute does not count
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "jax_fp8attn"
    except RuntimeError:  # no home
        return None


def cache_file(device_kind: str) -> Path | None:
    folder = cache_folder()
    return folder and folder / f"tuned-{slug(device_kind)}.json"


_warned: set[Path] = set()


def _warn_once(path: Path, why: str) -> None:
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"{path} is ignored: {why}", RuntimeWarning, stacklevel=3)


@functools.cache
def _entries(path: Path, device_kind: str, own: bool) -> dict[tuple[str, str], Entry]:
    """What a file says for this device; nothing if it is not there, or with a warning if it is not as it should be."""
    try:
        entries = read(path, device_kind, own)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn_once(path, str(error))
        return {}
    return {entry.key: entry for entry in entries}


def read(path: Path, device_kind: str, own: bool = True) -> list[Entry]:
    """The entries of a file; raises ValueError or OSError with what is wrong. ``own``: a user's, checked for who could
    have written it; else one shipped with the package."""
    if own:
        check_folder(path.parent)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) if own else os.O_RDONLY
    with os.fdopen(os.open(path, flags), "rb") as file:
        if own:
            check_owner(os.fstat(file.fileno()), stat.S_ISREG)
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    data = json.loads(content.decode(), parse_constant=_refuse_constant)
    _fields(data, HEADER, "the file")
    made_for = {"schema": SCHEMA, "device": device_kind, "package": VERSION}
    made_for["jax"] = jax.__version__ if own or data["jax"] != ANY_JAX else ANY_JAX
    for name, value in made_for.items():
        if data[name] != value:
            raise ValueError(f"{name} is {str(data[name])[:40]!r}, not {value!r}; tune again")
    entries = [_entry(x, f"entry {number}") for number, x in enumerate(data["entries"], 1)]
    if len({entry.key for entry in entries}) != len(entries):
        raise ValueError("a problem is there twice")
    return entries


def check_folder(folder: Path) -> None:
    check_owner(os.stat(folder), stat.S_ISDIR)


def check_owner(facts: os.stat_result, is_kind: Any) -> None:
    if not is_kind(facts.st_mode):
        raise ValueError("it is not a regular file in a folder")
    if hasattr(os, "geteuid") and facts.st_uid != os.geteuid():
        raise ValueError("it, or its folder, belongs to somebody else")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError("others can write it, or its folder")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _fields(data: Any, types: dict[str, type], where: str) -> None:
    if not isinstance(data, dict) or data.keys() != types.keys():
        raise ValueError(f"{where} must have the fields {', '.join(types)} and no others")
    for name, kind in types.items():
        if type(data[name]) is not kind:
            raise ValueError(f"{where}: {name} must be of type {kind.__name__}")


def _entry(data: Any, where: str) -> Entry:
    types = {"op": str, "problem": dict, "config": dict, "time_us": float, "default_us": float}
    _fields(data, types, where)
    if data["op"] not in _TYPES:
        raise ValueError(f"{where}: unknown op")
    _fields(data["problem"], _TYPES[data["op"]], f"{where}, problem")
    if any(type(x) is int and not 0 <= x < 1 << 62 for x in data["problem"].values()):
        raise ValueError(f"{where}: a size is out of range")
    for name, value in data["config"].items():
        values = value if isinstance(value, list) else [value]
        plain = len(values) <= 8 and all(type(x) in (bool, int, str) for x in values)
        if not _NAME.fullmatch(name) or not plain:
            raise ValueError(f"{where}, config: {name[:48]!r} is no field of a configuration")
    if not all(math.isfinite(data[name]) and data[name] > 0 for name in ("time_us", "default_us")):
        raise ValueError(f"{where}: times must be positive")
    return Entry(**data)


def write(device_kind: str, winners: Sequence[Entry], losers: Sequence[Entry] = ()) -> Path:
    """Puts winners into the user's file for this device and takes losers out; what else it holds stays, if it may be
    read. The file is replaced as a whole. Raises OSError or ValueError if there is no place of the user's own."""
    path = cache_file(device_kind)
    if path is None:
        raise ValueError("there is no cache folder: set JAX_FP8ATTN_CACHE_DIR to an absolute path")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(path.parent)
    try:
        known = {entry.key: entry for entry in read(path, device_kind)}
    except (OSError, ValueError, RecursionError):
        known = {}
    known |= {entry.key: entry for entry in winners}
    for entry in losers:
        known.pop(entry.key, None)
    header = {"schema": SCHEMA, "device": device_kind, "package": VERSION, "jax": jax.__version__}
    lines = ",\n".join("  " + json.dumps(dataclasses.asdict(entry)) for entry in known.values())
    head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in header.items())
    text = f'{{\n{head},\n "entries": [\n{lines}\n ]\n}}\n'
    if len(text.encode()) > LARGEST:
        raise ValueError(f"{path} would be larger than {LARGEST} bytes")
    descriptor, name = tempfile.mkstemp(prefix=".tuned-", dir=path.parent)  # of this user alone
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    _entries.cache_clear()
    return path
