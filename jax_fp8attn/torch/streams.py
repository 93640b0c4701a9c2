"""A device under both names, and the order of work on its streams.

PyTorch queues on the current stream, XLA on streams of its own. Of one call:

1. An event is recorded on PyTorch's current stream, and the stream that XLA waits for when it takes in foreign memory
   waits for the event. So XLA reads what was queued before the call, and nothing earlier.
2. XLA computes on its stream; nobody waits on the host.
3. PyTorch's current stream waits for the results (DLPack's ``stream``). What is queued on it later, such as reuse of
   the inputs' memory, comes after the computation.
4. Memory of a result that PyTorch has dropped may still be read by kernels queued on that stream, of which XLA knows
   nothing. ``Kept`` gives it back to XLA once XLA's stream has been ordered behind them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from jax_fp8attn.errors import InvalidInputError, UnsupportedError

_DLPACK = {"cpu": 1, "cuda": 2, "rocm": 10}
_ALIGNMENT = {"cpu": 64, "cuda": 16, "rocm": 16}  # of what XLA takes as a parameter, in bytes
_LOOKED_AT = 16, 4  # kept results that a call looks at: as many, or one of so many


class Order(NamedTuple):
    """The streams of one call."""

    xla: int | None  # takes in foreign memory; None: there are no streams
    dlpack: int | None  # PyTorch's, in DLPack's numbers
    current: torch.cuda.Stream | None  # the same
    dropped: Sequence[Any]  # results to let go once XLA has been given its work


_NO_STREAMS = Order(None, None, None, ())


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """One device."""

    torch: torch.device
    jax: jax.Device
    dlpack: tuple[int, int]
    alignment: int
    events: threading.local
    kept: Kept | None  # None: no streams

    @staticmethod
    def of(op: str, device: torch.device) -> Place:
        try:
            return _place(device)
        except UnsupportedError as error:
            raise UnsupportedError(f"{op}: {error}") from None

    def order(self) -> Order:
        """Puts XLA behind PyTorch's current stream."""
        if self.kept is None:
            return _NO_STREAMS
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError("jax_fp8attn.torch: XLA's work cannot be captured into a CUDA graph.")
        current = torch.cuda.current_stream(self.torch)
        dropped = self.kept.dropped(current)
        xla_stream = self.jax.get_stream_for_external_ready_events()
        self.wait(xla_stream, current)
        # 0 is no stream in DLPack; CUDA's default one is 1
        return Order(xla_stream, current.cuda_stream or (0 if torch.version.hip else 1), current, dropped)

    def wait(self, xla_stream: int, current: torch.cuda.Stream | None = None) -> None:
        """``xla_stream`` waits for what is queued on the current stream."""
        current = current or torch.cuda.current_stream(self.torch)
        event = getattr(self.events, "event", None)
        if event is None:
            event = self.events.event = torch.cuda.Event()
        event.record(current)
        _external(xla_stream, self.torch).wait_event(event)


@functools.cache
def _place(device: torch.device) -> Place:
    if device.type == "cpu":
        return Place(device, jax.local_devices(backend="cpu")[0], (1, 0), _ALIGNMENT["cpu"], threading.local(), None)
    if device.type != "cuda":
        raise InvalidInputError(f"tensors are on {device}; expected cpu or cuda.")
    platform = "rocm" if torch.version.hip else "cuda"
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError as error:
        extra = "" if platform == "rocm" else " Install it with pip install 'jax_fp8attn[cuda]'."
        raise UnsupportedError(f"tensors are on {device}, and JAX has no {platform} device: {error}.{extra}") from None
    for candidate in devices:
        if candidate.local_hardware_id == device.index:
            dlpack = _DLPACK[platform], device.index
            return Place(device, candidate, dlpack, _ALIGNMENT[platform], threading.local(), Kept())
    raise UnsupportedError(f"tensors are on {device}, which is none of JAX's devices {devices}.")


@functools.cache
def _external(stream: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(stream, device=device)


@dataclasses.dataclass
class _Result:
    array: Any  # holds the memory
    storage: StorageWeakRef  # expires when PyTorch has dropped it
    stream: torch.cuda.Stream
    event: torch.cuda.Event | None = None  # after the last use on the stream


class Kept:
    """Results whose memory PyTorch may still use."""

    def __init__(self) -> None:
        self._results: collections.deque[_Result] = collections.deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._results)

    def add(self, arrays: Sequence[Any], tensors: Sequence[torch.Tensor], stream: torch.cuda.Stream) -> None:
        with self._lock:
            for array, tensor in zip(arrays, tensors, strict=True):
                self._results.append(_Result(array, StorageWeakRef(tensor.untyped_storage()), stream))

    def put_back(self, results: Sequence[_Result]) -> None:
        """XLA was given no work behind the stream: not yet."""
        with self._lock:
            self._results.extendleft(results)

    def dropped(self, stream: torch.cuda.Stream) -> list[_Result]:
        """Takes out what may be given back once XLA is ordered behind the present end of ``stream``."""
        free = []
        with self._lock:
            count = len(self._results)
            for _ in range(min(count, max(_LOOKED_AT[0], count // _LOOKED_AT[1]))):
                result = self._results.popleft()
                if not result.storage.expired():
                    self._results.append(result)
                elif result.stream == stream or (result.event is not None and result.event.query()):
                    free.append(result)
                else:
                    if result.event is None:
                        result.event = result.stream.record_event()
                    self._results.append(result)
        return free
