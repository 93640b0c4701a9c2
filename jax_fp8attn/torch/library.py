"""Each op once for all ways to call it: in eager mode directly, under ``torch.compile`` as a custom op.

A call is a list of tensors (or None) and a text of options. Eager mode skips PyTorch's dispatcher, which would cost as
much as the rest; the custom op ``torch.ops.jax_fp8attn.<name>`` does the same work, and its fake implementation gives
the shapes of the results, so that the graph is not broken.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jax_fp8attn.quantize import Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.torch import calls
from jax_fp8attn.torch.calls import Value

Options = dict[str, Any]
Tensors = Sequence[torch.Tensor | None]

_TEXTS = frozenset({"lse_layout", "lse_base", "compute", "precision", "gate", "state_layout", "implementation"})
_jitted: dict[Any, Callable[..., list[jax.Array]]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
    """function(options, *arrays) is the JAX op; fake(options, *tensors) makes empty results of the same form."""

    name: str
    arguments: tuple[str, ...]
    function: Callable[..., Any]
    fake: Callable[..., list[torch.Tensor]]

    def run(self, values: Sequence[Value], options: str) -> list[torch.Tensor]:
        key = self.name, options, calls.environment()
        function = _jitted.get(key)
        if function is None:
            function = _jitted[key] = self._compiled(options)
        return calls.run(self.name, self.arguments, values, function)

    def _compiled(self, options: str) -> Callable[..., list[jax.Array]]:
        decoded = parse(options)
        return calls.jitted(lambda *arrays: jax.tree.leaves(self.function(dict(decoded), *arrays)), self.name)

    def __call__(self, values: Sequence[Value], options: str) -> list[torch.Tensor]:
        if not torch.compiler.is_compiling():
            return self.run(values, options)
        return _REGISTERED[self.name](_as_tensors(values), options)


_REGISTERED: dict[str, Any] = {}


def register(op: Op) -> Op:
    """Makes ``torch.ops.jax_fp8attn.<name>``."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    takes_tags = "tags" in inspect.signature(torch.library.custom_op).parameters
    definition = torch.library.custom_op(
        f"jax_fp8attn::{op.name}",
        lambda tensors, options: op.run(tensors, options),
        mutates_args=(),
        schema="(Tensor?[] tensors, str options) -> Tensor[]",
        **({"tags": [tag]} if tag is not None and takes_tags else {}),
    )
    definition.register_fake(lambda tensors, options: op.fake(parse(options), *tensors))
    _REGISTERED[op.name] = getattr(torch.ops.jax_fp8attn, op.name).default
    return op


def _as_tensors(values: Sequence[Value]) -> list[torch.Tensor | None]:
    """Numbers as tensors of one element, which a graph can hold whatever they are."""
    device = next(x.device for x in values if isinstance(x, torch.Tensor))
    tensors: list[torch.Tensor | None] = []
    for x in values:
        if x is None or isinstance(x, torch.Tensor):
            tensors.append(x)
        else:
            dtype = torch.float32 if isinstance(x, float) else torch.int32
            tensors.append(torch.full((1,), x, dtype=dtype, device=device))
    return tensors


def text(**options: Any) -> str:
    """Static options as a text: the name of a jitted function, and an argument that a graph can hold."""
    return ";".join([f"{name}={_text(value)}" for name, value in options.items()])


def _text(value: Any) -> str:
    if isinstance(value, Fp8PerGroup):
        return f"group:{value.group_size}:{value.scale_format}:{value.scale_layout}:{value.eps}"
    if isinstance(value, Fp8PerTensor):
        return f"tensor:{value.dtype}"
    if isinstance(value, tuple | list):
        return ",".join([str(x) for x in value])
    return str(value)


def parse(options: str) -> Options:
    """The inverse of ``text``. What it does not know stays a text, and the op's own checks refuse it."""
    return {name: _value(name, value) for name, _, value in (item.partition("=") for item in options.split(";"))}


def _value(name: str, value: str) -> Any:
    if value == "None":
        return None
    if name == "implementation":
        return tuple(value.split(",")) if "," in value else value
    if name in _TEXTS:
        return value
    if name == "output_quant":
        kind, *fields = value.split(":")
        if kind == "group":
            return Fp8PerGroup(int(fields[0]), fields[1], fields[2], float(fields[3]))
        return Fp8PerTensor(None, jnp.dtype(fields[0])) if kind == "tensor" and fields else value
    if name == "out_dtype":
        return value.removeprefix("torch.")
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def quantised(options: Options, like: torch.Tensor, shape: Sequence[Any], default: torch.dtype) -> list[torch.Tensor]:
    """What an op returns for its output of ``shape`` [..., H, D]: one tensor, or codes and the buffer of scales."""
    spec = options["output_quant"]
    if spec is None:
        name = options.get("out_dtype")
        return [like.new_empty(shape, dtype=getattr(torch, name) if name else default)]
    if isinstance(spec, Fp8PerTensor):
        return [like.new_empty(shape, dtype=getattr(torch, spec.dtype.name)), like.new_empty((), dtype=torch.float32)]
    *lead, heads, width = shape
    tokens = 1
    for size in lead:
        tokens = tokens * size
    scales = spec.scale_shape(tokens, heads * width // spec.group_size)
    dtype = torch.int32 if spec.scale_layout == "col_tma_packed" else torch.float32
    return [like.new_empty(shape, dtype=torch.float8_e4m3fn), like.new_empty(scales, dtype=dtype)]


def with_scale(spec: Any, scale: Any) -> Any:
    """A spec that ``parse`` returned, completed by its scale."""
    return Fp8PerTensor(scale, spec.dtype) if isinstance(spec, Fp8PerTensor) else spec
