"""Time on the device: kernels only, interleaved, on buffers that are not in the L2.

Every call stands between two markers, kernels of a known name, in one trace of the profiler; what runs between them
belongs to the call, whoever launched it, so that PyTorch's kernels are timed by the same clock. Before each call the L2
is filled with other data by reading.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn.quantize import cast_fp8

MARKER = "fp8attn_marker"
BEYOND_L2 = 1 << 28  # bytes: five times the L2 of an H200
ROUNDS = 31
DISPATCHES = (10, 100)  # calls whose host time is taken: as many as take the device this long
DISPATCHED = 2e5  # microseconds


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation on one case. ``call(i)`` launches it on the i-th set of inputs and returns its outputs.

    With ``within`` it is a part of another one's calls and makes none to be timed: the kernels whose names begin so.
    """

    name: str
    call: Callable[[int], Any]
    is_peer: bool = False
    within: str = ""
    kernels: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of one call."""

    median: float
    spread: float  # interquartile range
    dispatch: float | None  # of the host, a call without waiting; None of a part
    kernels: tuple[str, ...]  # of the last call

    @classmethod
    def of(cls, samples: Sequence[float], dispatch: float | None, kernels: Sequence[str]) -> Times:
        first, _, third = statistics.quantiles(samples, n=4)
        return cls(statistics.median(samples), third - first, dispatch, tuple(kernels))


def measure(contenders: Sequence[Contender], sets: int, rounds: int = ROUNDS) -> dict[str, Times]:
    """Times every contender ``rounds`` times, in turns. All must have run once before: compiling is not timed."""
    if not contenders:
        return {}
    mark, flush = _marker(), _flush()
    calls: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for number in range(rounds):
                for contender in (x for x in contenders if not x.within):
                    mark()
                    flush()
                    mark()
                    _finish(contender.call(number % sets))
                    calls.append(contender.name)
            mark()
        segments = _segments(_kernels(Path(folder)))[1::2]  # every other one is the flush
    if len(segments) != len(calls):
        raise RuntimeError(f"{len(calls)} calls were traced as {len(segments)}: the profiler lost events")
    result = {}
    for contender in contenders:
        samples, names = _samples(contender, calls, segments)
        dispatch = None
        if not contender.within:
            calls_of_it = int(max(DISPATCHES[0], min(DISPATCHES[1], DISPATCHED / statistics.median(samples))))
            dispatch = _dispatch(contender, sets, calls_of_it)
        result[contender.name] = Times.of(samples, dispatch, names)
    return result


def _samples(
    contender: Contender, calls: Sequence[str], segments: Sequence[list[tuple[str, float]]]
) -> tuple[list[float], list[str]]:
    """Microseconds of each of its calls, and the kernels of the last one. ``calls``: whose each segment is."""
    caller = contender.within or contender.name
    own = [segment for name, segment in zip(calls, segments, strict=True) if name == caller]
    if contender.within:
        own = [[(name, time) for name, time in segment if name.startswith(contender.kernels)] for segment in own]
    if not (own and all(own)):
        raise RuntimeError(f"{contender.name}: a call without a kernel in the trace")
    return [sum(time for _, time in segment) for segment in own], [name for name, _ in own[-1]]


def _dispatch(contender: Contender, sets: int, number: int) -> float:
    """Host time of a call, device idle at its start; calls are not waited for."""
    outputs = [contender.call(0)]
    _finish(outputs)
    start = time.perf_counter()
    for call in range(number):
        outputs[0] = contender.call(call % sets)
    taken = time.perf_counter() - start
    _finish(outputs)
    return 1e6 * taken / number


def _finish(outputs: Any) -> Any:
    for leaf in jax.tree.leaves(outputs):
        if isinstance(leaf, jax.Array):
            leaf.block_until_ready()
        elif hasattr(leaf, "is_cuda"):
            import torch

            torch.cuda.synchronize()
    return outputs


@functools.cache
def _marker() -> Callable[[], None]:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    def body(x_ref: Any, y_ref: Any) -> None:
        y_ref[...] = x_ref[...]

    body.__name__ = MARKER
    one = jnp.zeros((128,), jnp.float32)
    kernel = jax.jit(plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(one.shape, one.dtype), grid=(), grid_names=()))
    kernel(one).block_until_ready()
    return lambda: kernel(one).block_until_ready()


@functools.cache
def _flush() -> Callable[[], None]:
    other = jnp.zeros(BEYOND_L2 // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda: total(other).block_until_ready()


def _kernels(folder: Path) -> list[tuple[float, str, float]]:
    """Start, name and duration in microseconds of everything that ran on the device, in order."""
    events = []
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        events += [(e.start_ns, e.name, e.duration_ns / 1e3) for e in line.events]
    return sorted(events)


def _segments(events: list[tuple[float, str, float]]) -> list[list[tuple[str, float]]]:
    """What ran between two markers."""
    segments: list[list[tuple[str, float]]] = []
    for _, name, duration in events:
        if MARKER in name:
            segments.append([])
        elif segments:
            segments[-1].append((name, duration))
    return segments[:-1]


def copy_tbps(bytes_copied: int = 1 << 30) -> float:
    """The fastest device copy at hand, read and write counted: XLA's, and PyTorch's if it is there."""
    x = jnp.zeros(bytes_copied // 4, jnp.float32)
    negate = jax.jit(jnp.negative)
    contenders = [Contender("xla", lambda _: negate(x))]
    try:
        import torch

        source = torch.zeros(bytes_copied // 4, device="cuda")
        target = torch.empty_like(source)
        contenders.append(Contender("torch", lambda _: target.copy_(source)))
    except (ImportError, AssertionError, RuntimeError):  # no PyTorch, or one without CUDA
        pass
    for contender in contenders:
        _finish(contender.call(0))
    times = measure(contenders, 1)
    return 2 * bytes_copied / min(t.median for t in times.values()) / 1e6


def gemm_tflops(size: int = 8192) -> float | None:
    """A bf16 product through XLA."""
    a, b = (jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16) for n in (0, 1))
    product = jax.jit(jnp.dot)
    return _fastest_tflops([Contender("bf16", lambda _: product(a, b))], size)


def fp8_gemm_tflops(size: int = 8192) -> float | None:
    """The fastest e4m3 product at hand, summed as fast as the device can: XLA's, and PyTorch's if it is there."""
    a, b = (cast_fp8(jax.random.normal(jax.random.key(n), (size, size), jnp.bfloat16)) for n in (0, 1))
    fast = jax.lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32_FAST_ACCUM
    options = {"dimension_numbers": (((1,), (1,)), ((), ())), "preferred_element_type": jnp.bfloat16}
    product = jax.jit(functools.partial(jax.lax.dot_general, precision=fast, **options))
    contenders = [Contender("xla", lambda _: product(a, b))]
    try:
        import torch

        x, y = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        scales = {name: torch.ones((), device="cuda") for name in ("scale_a", "scale_b")}
        multiply = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True, **scales)
        contenders.append(Contender("torch", lambda _: multiply(x, y.t())))
    except (ImportError, AttributeError, AssertionError, RuntimeError):  # no PyTorch, or one without CUDA or FP8
        pass
    return _fastest_tflops(contenders, size)


def _fastest_tflops(contenders: Sequence[Contender], size: int) -> float | None:
    """None if none of them runs."""
    able = []
    for contender in contenders:
        try:
            _finish(contender.call(0))
            able.append(contender)
        except (RuntimeError, ValueError, TypeError):  # XLA's and PyTorch's; what a device cannot do
            pass
    times = measure(able, 1) if able else {}
    return 2 * size**3 / min(t.median for t in times.values()) / 1e6 if times else None
