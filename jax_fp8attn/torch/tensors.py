"""One tensor from PyTorch to JAX or back, through DLPack: dtypes, strides, alignment, ownership."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.utils.dlpack

from jax_fp8attn import checks
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.torch.streams import Place

_NAMES = (
    "bool",
    "uint8",
    "int8",
    "int32",
    "bfloat16",
    "float16",
    "float32",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
DTYPES: dict[torch.dtype, str] = {getattr(torch, name): name for name in _NAMES if hasattr(torch, name)}
"""What crosses, under the name that JAX has for it."""

_EIGHT_BITS = frozenset(dtype for dtype, name in DTYPES.items() if name.startswith("float8"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bits:
    """An 8-bit float as bytes, where a version of PyTorch or JAX cannot hand over its type."""

    bytes: jax.Array
    name: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array) -> Any:
        """``x`` as it can cross to PyTorch."""
        dtype = getattr(torch, x.dtype.name, None)
        if dtype not in _EIGHT_BITS or is_native(dtype):
            return x
        return cls(jax.lax.bitcast_convert_type(x, jnp.uint8), x.dtype.name)

    def array(self) -> jax.Array:
        return jax.lax.bitcast_convert_type(self.bytes, jnp.dtype(self.name))


@functools.cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether both versions know the type in DLPack, in both directions; tried on one element."""
    x = torch.zeros(1, dtype=torch.uint8).view(dtype)
    try:
        array = jax.dlpack.from_dlpack(x)
        return array.dtype.name == DTYPES[dtype] and torch.from_dlpack(array).dtype == dtype
    except (RuntimeError, TypeError, ValueError, BufferError, KeyError):
        return False


def ready(op: str, argument: str, x: torch.Tensor, place: Place) -> torch.Tensor:
    """The tensor as XLA can read it where it lies; copied only if it must be, which the log says once."""
    if x.requires_grad:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"{op}: {argument} requires a gradient, and gradients do not cross to JAX. Call under torch.no_grad() "
                "or torch.inference_mode(), or pass x.detach()."
            )
        x = x.detach()
    if x.dtype not in DTYPES:
        raise checks.invalid(op, argument, _describe(x), " or ".join(_NAMES), "Offsets and indices are int32: x.int().")
    if x.layout is not torch.strided:
        raise checks.invalid(op, argument, f"a tensor of layout {x.layout}", "a strided one")
    if not x.is_contiguous():
        why = "its strides are not those of a contiguous tensor"
    elif x.data_ptr() % place.alignment:
        why = f"its memory does not start at a multiple of {place.alignment} bytes"
    elif x.is_neg():
        why = "its sign is not in its memory"
    else:
        return x
    _say_once(f"{op}: {argument} is copied in every such call: {why}")
    return x.clone(memory_format=torch.contiguous_format)


def to_jax(x: torch.Tensor, place: Place, xla_stream: int | None) -> Any:
    """A view of the tensor's memory; ``x`` is ``ready`` and XLA's stream is in order."""
    if x.dtype in _EIGHT_BITS and not is_native(x.dtype):
        return Bits(_view(x.view(torch.uint8), place, xla_stream), DTYPES[x.dtype])
    return _view(x, place, xla_stream)


def to_torch(x: Any, stream: int | None) -> torch.Tensor:
    """A view of the array's memory, ready on the stream; without one (on a CPU) the host waits."""
    if isinstance(x, Bits):
        return to_torch(x.bytes, stream).view(getattr(torch, x.name))
    raw = _raw()
    return torch.utils.dlpack.from_dlpack(x.__dlpack__(stream=stream) if raw is None else raw.export(x, stream=stream))


def number(op: str, argument: str, x: Any, device: jax.Device) -> jax.Array:
    """A Python number on the device: int32 or float32 [1], sent there once."""
    if isinstance(x, bool) or not isinstance(x, int | float | np.integer | np.floating):
        raise checks.invalid(op, argument, f"a {type(x).__name__}", "a torch.Tensor, or a number where it is one")
    if isinstance(x, int | np.integer) and not -(2**31) <= x < 2**31:
        x = float(x)
    return _number(isinstance(x, int | np.integer), x, device)


@functools.lru_cache(maxsize=4096)
def _number(integer: bool, x: Any, device: jax.Device) -> jax.Array:
    return jax.device_put(np.full(1, x, np.int32 if integer else np.float32), device)


class _Exporter:
    """What ``jax.dlpack.from_dlpack`` asks of an array."""

    __slots__ = ("place", "tensor")

    def __init__(self, tensor: torch.Tensor, place: Place) -> None:
        self.tensor, self.place = tensor, place

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place.dlpack

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        if stream is not None:
            self.place.wait(stream)
        return torch.utils.dlpack.to_dlpack(self.tensor)


def _view(x: torch.Tensor, place: Place, xla_stream: int | None) -> jax.Array:
    raw = _raw()
    if raw is None:
        return jax.dlpack.from_dlpack(_Exporter(x, place))
    return raw.take(torch.utils.dlpack.to_dlpack(x), place.jax, xla_stream, None, place.dlpack[0])


class _Raw(NamedTuple):
    take: Callable[..., jax.Array]
    export: Callable[..., Any]


@functools.cache
def _raw() -> _Raw | None:
    """What JAX's ``from_dlpack`` and ``__dlpack__`` end in, for a tenth of the time; None in a JAX that has it not."""
    try:
        from jax._src.lib import _jax

        raw = _Raw(_jax.dlpack_managed_tensor_to_buffer, _jax.buffer_to_dlpack_managed_tensor)
        capsule = torch.utils.dlpack.to_dlpack(torch.zeros(1))
        array = raw.take(capsule, jax.local_devices(backend="cpu")[0], None, None, 1)
        back = torch.utils.dlpack.from_dlpack(raw.export(array, stream=None))
    except (ImportError, AttributeError, TypeError):
        return None
    return raw if isinstance(array, jax.Array) and array.committed and back.shape == (1,) else None


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}[{','.join(map(str, x.shape))}]"


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger("jax_fp8attn").warning(line)


def place_of(op: str, tensors: dict[str, torch.Tensor]) -> Place:
    """Where all of them are."""
    device = None
    for name, x in tensors.items():
        if device is None:
            first, device = name, x.device
        elif x.device != device:
            raise checks.invalid(op, name, f"on {x.device}", f"{device}, where {first} is")
    if device is None:
        raise InvalidInputError(f"{op}: there is no tensor among the arguments.")
    return Place.of(op, device)
