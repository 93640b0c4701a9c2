"""A call from PyTorch: tensors become arrays, a jitted function runs, arrays become tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch

from jax_fp8attn.errors import InvalidInputError
from jax_fp8attn.torch import tensors
from jax_fp8attn.torch.tensors import Bits

Value = torch.Tensor | float | None


def run(op: str, names: Sequence[str], values: Sequence[Value], function: Callable[..., Any]) -> list[torch.Tensor]:
    """``function`` of the arguments, a jitted function that returns a list of arrays. Numbers go along as arrays."""
    given = {name: x for name, x in zip(names, values, strict=True) if isinstance(x, torch.Tensor)}
    place = tensors.place_of(op, given)
    given = {name: tensors.ready(op, name, x, place) for name, x in given.items()}
    order = place.order()
    try:
        arrays = []
        for name, x in zip(names, values, strict=True):
            if isinstance(x, torch.Tensor):
                arrays.append(tensors.to_jax(given[name], place, order.xla))
            else:
                arrays.append(None if x is None else tensors.number(op, name, x, place.jax))
        results = function(*arrays)
    except BaseException:
        if place.kept is not None:
            place.kept.put_back(order.dropped)
        raise
    outputs = [tensors.to_torch(x, order.dlpack) for x in results]
    if place.kept is not None:
        place.kept.add(results, outputs, order.current)
    return outputs  # and ``order`` ends here, with the memory that goes back to XLA


def environment() -> tuple[str | None, str | None]:
    """What else decides how an op is traced."""
    return os.environ.get("JAX_FP8ATTN_IMPLEMENTATION"), os.environ.get("JAX_FP8ATTN_FP8_PREFILL")


def jitted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function`` of arrays under jit, whose leaves cross as they can."""

    def call(*arrays: Any) -> Any:
        result = function(*(x.array() if isinstance(x, Bits) else x for x in arrays))
        return jax.tree.map(Bits.of, result)

    call.__name__ = f"jax_fp8attn_{name}"
    return jax.jit(call)


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Any other function of this package, or of JAX arrays, on tensors: ``apply(quantize_latent, x, group=32)``.

    function  traceable by ``jax.jit``; must be the same object in every call, or it is compiled each time
    args, kwargs  pytrees of tensors; whatever is no tensor is static and must be hashable

    Returns the result with tensors in place of arrays. Not for use inside ``torch.compile``.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    dynamic = tuple(isinstance(x, torch.Tensor) for x in leaves)
    static = tuple(None if d else (type(x), x) for d, x in zip(dynamic, leaves, strict=True))
    given = [x for d, x in zip(dynamic, leaves, strict=True) if d]
    try:
        traced = _applied(function, structure, static, environment())
    except TypeError as error:
        raise InvalidInputError(f"apply: an argument that is no tensor must be hashable: {error}.") from None
    result_structure: Any = None

    def flat(*arrays: Any) -> list[Any]:
        nonlocal result_structure
        results, result_structure = jax.tree.flatten(traced(*arrays), is_leaf=lambda x: isinstance(x, Bits))
        return results

    op = getattr(function, "__name__", "apply")
    outputs = run(op, [f"tensor {number}" for number in range(len(given))], given, flat)
    return jax.tree.unflatten(result_structure, outputs)


@functools.lru_cache(maxsize=1024)
def _applied(function: Callable[..., Any], structure: Any, static: tuple[Any, ...], environment: Any) -> Any:
    def call(*arrays: Any) -> Any:
        values = iter(arrays)
        leaves = [next(values) if x is None else x[1] for x in static]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

    return jitted(call, getattr(function, "__name__", "apply"))
