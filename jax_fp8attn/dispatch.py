"""Implementations as data: which can serve a problem, which one is taken, and why.

A problem is a frozen dataclass of static facts. A backend module offers

    supports(problem, device) -> tuple of reasons why not (empty: it can)
    run(problem, arrays)      -> result

and is imported only when its platform is there or its name is asked for.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from jax_fp8attn import partition
from jax_fp8attn.errors import InvalidInputError, UnsupportedError

Implementation = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Device:
    """What an implementation may ask about the target."""

    platform: str  # "cpu", "cuda", "rocm"
    kind: str = ""
    compute_capability: tuple[int, int] | None = None  # NVIDIA only
    architecture: str = ""  # AMD only: "gfx950"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of the table of implementations. ``module`` None: named, and not part of this version."""

    name: str
    module: str | None
    platforms: tuple[str, ...] = ()  # empty: any
    missing: str = ""
    pieces: bool = False  # of others are needed: the module's missing(device) names those that are not here
    calls: tuple[str, ...] = ()  # targets of custom calls that JAX does not know to be stable


_XLA = "jax_fp8attn.xla"
_REFERENCE = "jax_fp8attn.reference"
_CUSTOM_CALLS = "jax_fp8attn.custom_calls"


def _table(op: str, *special: Candidate) -> tuple[Candidate, ...]:
    return (*special, Candidate("xla", f"{_XLA}.{op}"), Candidate("reference", f"{_REFERENCE}.{op}"))


def _absent(name: str, what: str) -> Candidate:
    return Candidate(name, None, missing=f"{what} is not part of this version; see docs/support.md")


CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "mla_prefill": _table(
        "mla_prefill",
        Candidate("pallas", "jax_fp8attn.pallas.mla_prefill_sm90", platforms=("cuda",)),
        Candidate(
            "aiter",
            f"{_CUSTOM_CALLS}.aiter_mla_prefill",
            platforms=("rocm",),
            pieces=True,
            calls=("jax_fp8attn.aiter_mla_prefill",),
        ),
        _absent("flashinfer", "the FlashInfer call of mla_prefill"),
    ),
    "merge_attn_states": _table("merge", Candidate("pallas", "jax_fp8attn.pallas.merge_sm90", platforms=("cuda",))),
    "sparse_prefill": _table(
        "sparse_prefill",
        Candidate("pallas", "jax_fp8attn.pallas.sparse_prefill_sm90", platforms=("cuda",)),
        _absent("aiter", "the AITER call of sparse_prefill"),
        _absent("fa4", "the FA4 call of sparse_prefill"),
    ),
    "gdn_prefill": _table(
        "gdn_prefill",
        Candidate("pallas", "jax_fp8attn.pallas.gdn_prefill_sm90", platforms=("cuda",)),
        _absent("flashinfer", "the FlashInfer call of gdn_prefill"),
    ),
    "gdn_prefill_pool": _table(
        "gdn_prefill", Candidate("pallas", "jax_fp8attn.pallas.gdn_prefill_sm90", platforms=("cuda",))
    ),
}
"""Fastest first. "xla" takes every valid problem on every platform; "reference" is never chosen by itself."""

NAMES = ("pallas", "xla", "reference", "aiter", "flashinfer", "fa4")

_target: contextvars.ContextVar[Device | None] = contextvars.ContextVar("jax_fp8attn_target", default=None)


def current_device() -> Device:
    """The device that work goes to by default, or the one named by ``target_device``."""
    chosen = _target.get()
    if chosen is not None:
        return chosen
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return _describe(default)
    return _describe(jax.devices(default)[0] if default else jax.devices()[0])


@functools.cache
def _describe(device: jax.Device) -> Device:
    version = getattr(device.client, "platform_version", "").lower()
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in version else "cuda"
    capability = getattr(device, "compute_capability", None)
    if platform == "cuda" and capability:
        major, _, minor = str(capability).partition(".")
        return Device(platform, device.device_kind, (int(major), int(minor or 0)))
    if platform == "rocm" and (found := re.match(r"gfx[0-9a-f]+", str(capability))):
        return Device(platform, device.device_kind, architecture=found[0])
    return Device(platform, device.device_kind)


@contextlib.contextmanager
def target_device(device: Device) -> Iterator[None]:
    """Chooses implementations for ``device`` instead of the machine's own: ahead-of-time compilation and export."""
    token = _target.set(device)
    try:
        yield
    finally:
        _target.reset(token)


def _reasons(candidate: Candidate, problem: Any, device: Device) -> tuple[str, ...]:
    if candidate.module is None:
        return (candidate.missing,)
    if candidate.platforms and device.platform not in candidate.platforms:
        return (f"needs {' or '.join(candidate.platforms)}; the device is {device.platform}",)
    try:
        module = importlib.import_module(candidate.module)
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing or broken
        return (f"cannot be imported: {error}",)
    return tuple(module.supports(problem, device))


def wish_list(op: str, implementation: Implementation) -> tuple[str, ...] | None:
    """The names that the caller allows, in order; None: any that is fast enough to be automatic."""
    argument = "implementation"
    if implementation is None:
        text = os.environ.get("JAX_FP8ATTN_IMPLEMENTATION", "").strip()
        if not text:
            return None
        argument, implementation = "JAX_FP8ATTN_IMPLEMENTATION", tuple(part.strip() for part in text.split(","))
    names = (implementation,) if isinstance(implementation, str) else implementation
    known = [candidate.name for candidate in CANDIDATES[op]]
    if not isinstance(names, list | tuple) or not names or any(name not in NAMES for name in names):
        raise InvalidInputError(f"{op}: {argument} is {implementation!r}; expected names out of {known} or None.")
    return tuple(names)


def _by_name(op: str, name: str) -> Candidate:
    for candidate in CANDIDATES[op]:
        if candidate.name == name:
            return candidate
    return Candidate(name, None, missing=f"{op} has no implementation of that name")


def _wished(op: str, names: tuple[str, ...] | None) -> list[Candidate]:
    if names is None:
        return [candidate for candidate in CANDIDATES[op] if candidate.name != "reference"]
    return [_by_name(op, name) for name in names]


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger("jax_fp8attn").warning(line)


def select(op: str, problem: Any, implementation: Implementation = None, device: Device | None = None) -> str:
    """The name of the implementation to run. Strict: a name runs or raises ``UnsupportedError`` with every reason."""
    device = device or current_device()
    names = wish_list(op, implementation)
    candidates = _wished(op, names)
    reasons: dict[str, tuple[str, ...]] = {}
    for candidate in candidates:
        why = _reasons(candidate, problem, device)
        if not why:
            return candidate.name
        reasons[candidate.name] = why
        if names is None and candidate.pieces and device.platform in candidate.platforms:
            _log_once(f"{op}: {candidate.name} is passed over: {'; '.join(why)}")
    asked = "automatic choice" if names is None else " or ".join(repr(name) for name in names)
    where = f"{device.platform} {device.kind}".rstrip()
    raise UnsupportedError(f"{op}: {asked} cannot serve this call on {where}:", reasons)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """``disabled_checks`` of ``jax.export.export``: the custom calls of this package that JAX must be told to allow.

    The process that loads the export needs the package, and registers the calls by importing what it needs of it;
    kernels by Pallas need no entry.
    """
    targets = sorted({target for rows in CANDIDATES.values() for row in rows for target in row.calls})
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]


def elsewhere(op: str, name: str, implementation: Implementation) -> str | None:
    """What runs in place of ``name`` where the program ends up on another platform than it was traced for.

    Arrays may live on a CPU beside a GPU, and an export may be for several platforms. None: ``name`` runs everywhere,
    or the caller allows nothing else.
    """
    if not _by_name(op, name).platforms:
        return None
    candidates = _wished(op, wish_list(op, implementation))
    return next((c.name for c in candidates if c.module is not None and not c.platforms), None)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What ``explain`` says of one implementation."""

    name: str
    taken: bool
    reasons: tuple[str, ...]  # why it cannot serve the call; empty: it can


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every implementation of an op for one call: taken, able, or the reasons why not."""

    op: str
    problem: Any
    device: Device
    rows: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def taken(self) -> str | None:
        return next((row.name for row in self.rows if row.taken), None)

    def __str__(self) -> str:
        head = f"{self.op} on {self.device.platform} {self.device.kind}".rstrip()
        lines = [head]
        for row in self.rows:
            state = "taken" if row.taken else "; ".join(row.reasons) or "able, not chosen"
            lines.append(f"  {row.name:<10} {state}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def explain_problem(op: str, problem: Any, implementation: Implementation = None) -> Explanation:
    device = current_device()
    try:
        taken = select(op, problem, implementation, device)
    except UnsupportedError:
        taken = None
    rows = tuple(
        Verdict(candidate.name, candidate.name == taken, _reasons(candidate, problem, device))
        for candidate in CANDIDATES[op]
    )
    return Explanation(op, problem, device, rows, _notes(op, taken, problem))


def _notes(op: str, taken: str | None, problem: Any) -> tuple[str, ...]:
    """What the implementation itself says of a call, in its function ``notes``."""
    module = taken and importlib.import_module(_by_name(op, taken).module)
    return tuple(module.notes(problem)) if hasattr(module, "notes") else ()


@dataclasses.dataclass(frozen=True)
class Op:
    """How an op behaves under JAX's transformations; one constant per public op.

    prepare(problem, arrays) -> arrays
        makes hostile values harmless and brings traced arguments into the form the backends take
    fold(problem, arrays, size, batched) -> problem, arrays, unfold
        a vmapped call of ``size`` instances as one call; ``batched`` mirrors ``arrays`` with bools
    backward(problem, arrays, cotangents) -> cotangents of arrays, or None for an op without a derivative
    heads(problem) -> partition.Heads, or None for an op that is not cut by heads
    """

    name: str
    prepare: Callable[[Any, Any], Any]
    fold: Callable[[Any, Any, int, Any], tuple[Any, Any, Callable[[Any], Any]]]
    backward: Callable[[Any, Any, Any], Any] | None = None
    heads: Callable[[Any], partition.Heads] | None = None


class _Explained(Exception):
    """Carries an explanation out of an op that ``explain`` called."""


_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("jax_fp8attn_explaining", default=False)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Says which implementation a call would take, and why each other one would not.

    op: the name of a public op. The arguments are the op's own; ``jax.ShapeDtypeStruct`` stands for an array.
    Nothing is computed. ``print(explain(...))`` shows a table; ``.rows`` and ``.taken`` hold the facts.
    """
    known = isinstance(op, str) and op in EXPLAINABLE
    function = getattr(importlib.import_module("jax_fp8attn"), op, None) if known else None
    if function is None:
        raise InvalidInputError(f"explain: op is {op!r}; expected one of {sorted(EXPLAINABLE)}.")
    leaves, tree = jax.tree.flatten((args, kwargs))
    # numbers stay static, and so do dtypes: numpy's classes have a shape, too
    dynamic = [
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type | np.generic) for leaf in leaves
    ]

    def call_op(traced: list[Any]) -> Any:
        values = iter(traced)
        mixed = [next(values) if d else leaf for d, leaf in zip(dynamic, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(tree, mixed)
        return function(*args, **kwargs)

    token = _explaining.set(True)
    try:
        jax.eval_shape(call_op, [leaf for d, leaf in zip(dynamic, leaves, strict=True) if d])
    except _Explained as explained:
        return explained.args[0]
    finally:
        _explaining.reset(token)
    raise AssertionError(f"{op} did not reach dispatch")


EXPLAINABLE = frozenset(
    {
        "mla_prefill",
        "merge_attn_states",
        "merge_attn_states_n",
        "sparse_prefill",
        "sparse_prefill_topk",
        "gdn_prefill",
        "gdn_prefill_pool",
    }
)


def call(op: Op, problem: Any, arrays: Any, implementation: Implementation) -> Any:
    """The one way from a public op to a backend: selects, then runs."""
    if _explaining.get():
        raise _Explained(explain_problem(op.name, problem, implementation))
    name = select(op.name, problem, implementation)
    return execute(op, problem, (name, elsewhere(op.name, name, implementation)), arrays)


@functools.partial(jax.jit, static_argnames=("op", "problem", "names"), inline=True)
def execute(op: Op, problem: Any, names: tuple[str, str | None], arrays: Any) -> Any:
    """Runs an implementation under the op's batching and differentiation rules; the second name on other platforms."""
    with jax.named_scope(f"jax_fp8attn.{op.name}.{names[0]}"):
        run = lambda problem: _with_derivative(op, problem, names)
        arrays = op.prepare(problem, arrays)
        if (mesh := partition.explicit_mesh(arrays)) is not None:
            return partition.by_type(op.name, op.heads and op.heads(problem), problem, run, mesh)(arrays)
        return run(problem)(arrays)


def _run(op: Op, problem: Any, names: tuple[str, str | None], arrays: Any) -> Any:
    chosen, other = (_by_name(op.name, name) if name else None for name in names)

    def run(problem: Any) -> Callable[[Any], Any]:
        runner = lambda candidate: functools.partial(importlib.import_module(candidate.module).run, problem)
        if other is None:
            return runner(chosen)
        fast = dict.fromkeys(chosen.platforms, runner(chosen))
        return lambda arrays: jax.lax.platform_dependent(arrays, default=runner(other), **fast)

    if not chosen.platforms:  # jax.numpy code, which the compiler partitions by itself
        return run(problem)(arrays)
    return partition.by_compiler(op.heads and op.heads(problem), problem, run)(arrays)


def _with_batching(op: Op, problem: Any, names: tuple[str, str | None]) -> Callable[[Any], Any]:
    @custom_vmap
    def run(arrays: Any) -> Any:
        return _run(op, problem, names, arrays)

    @run.def_vmap
    def _(size: int, batched: Sequence[Any], arrays: Any) -> tuple[Any, Any]:
        if not size:
            result = _no_instances(run, arrays, batched[0])
            return result, jax.tree.map(lambda _: True, result)
        folded_problem, folded, unfold = op.fold(problem, arrays, size, batched[0])
        result = unfold(_with_batching(op, folded_problem, names)(folded))
        return result, jax.tree.map(lambda _: True, result)

    return run


def _no_instances(run: Callable[[Any], Any], arrays: Any, batched: Any) -> Any:
    """vmap over an axis of length 0: empty results, nothing runs."""
    one = jax.tree.map(lambda x, b: jax.ShapeDtypeStruct(x.shape[1:] if b else x.shape, x.dtype), arrays, batched)
    return jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), jax.eval_shape(run, one))


def _with_derivative(op: Op, problem: Any, names: tuple[str, str | None]) -> Callable[[Any], Any]:
    run = _with_batching(op, problem, names)
    if op.backward is not None:
        differentiable = jax.custom_vjp(run)
        differentiable.defvjp(
            lambda arrays: (run(arrays), arrays),
            lambda arrays, cotangents: (op.backward(problem, arrays, cotangents),),
        )
        return differentiable

    forward_only = jax.custom_jvp(run)

    @forward_only.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise UnsupportedError(
            f"{op.name} has no derivative: it is a forward-only op. Use jax.lax.stop_gradient around its inputs, "
            "or plain attention for training."
        )

    return forward_only
