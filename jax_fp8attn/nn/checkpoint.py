"""Published checkpoints in and out of the modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jax_fp8attn.errors import InvalidInputError

BLOCK = 128  # published FP8 weights have one scale a 128 x 128 block
SCALES = ("weight_scale_inv", "scale")


def load_checkpoint(module: nnx.Module, tensors: Mapping[str, Any], prefix: str = "") -> None:
    """Fills the parameters of a module of this package, in place, from tensors under their published names.

    tensors  name -> array as published (a weight is [out, in]): numpy, or anything numpy converts. FP8 weights with
             block scales (``weight_scale_inv`` of DeepSeek-V3, ``scale`` of DeepSeek-V4) are dequantised.
    prefix   what stands before the layer's own names, "model.layers.3.self_attn." for instance; others are not read

    The layer's names must be all there, no others, with the module's shapes: otherwise ``InvalidInputError``, and the
    module stays as it was. A parameter keeps its dtype and its sharding.
    """
    own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    own = {name: x for name, x in own.items() if not name.endswith("rotary_emb.inv_freq")}
    own = _dequantised({name: np.asarray(x) for name, x in own.items()})
    if hasattr(module, "from_published"):
        own = module.from_published(own)
    variables = _named(module)
    missing, unexpected = variables.keys() - own.keys(), own.keys() - variables.keys()
    if missing or unexpected:
        raise InvalidInputError(
            f"load_checkpoint: tensors under {prefix!r} lack {sorted(missing)} and have {sorted(unexpected)} besides; "
            f"expected exactly the names of {type(module).__name__}."
        )
    values = {name: _transposed(variables[name][0], x) for name, x in own.items()}
    for name, (_, variable) in variables.items():
        if values[name].shape != variable.shape:
            came, expected = (list(_published_shape(name, x, variables)) for x in (values[name], variable))
            raise InvalidInputError(f"load_checkpoint: {prefix}{name} is {came}; expected {expected}.")
    new = [(path, variable.replace(_placed(values[name], variable))) for name, (path, variable) in variables.items()]
    nnx.update(module, nnx.from_flat_state(new))


def to_checkpoint(module: nnx.Module, prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of ``load_checkpoint``: the module's parameters under ``prefix`` and their published names."""
    own = {name: _transposed(path, np.asarray(variable[...])) for name, (path, variable) in _named(module).items()}
    if hasattr(module, "to_published"):
        own = module.to_published(own)
    return {prefix + name: x for name, x in own.items()}


def _named(module: nnx.Module) -> dict[str, tuple[tuple[Any, ...], nnx.Variable]]:
    """name -> (path, parameter): a kernel or a norm's scale is called weight."""
    names = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        last = "weight" if path[-1] in ("kernel", "scale") else path[-1]
        names[".".join(map(str, (*path[:-1], last)))] = (path, variable)
    return names


def _transposed(path: tuple[Any, ...], x: np.ndarray) -> np.ndarray:
    return x.T if path[-1] == "kernel" else x


def _published_shape(name: str, x: Any, variables: Mapping[str, Any]) -> tuple[int, ...]:
    return x.shape[::-1] if variables[name][0][-1] == "kernel" else x.shape


def _placed(x: np.ndarray, variable: nnx.Variable) -> jax.Array:
    old = variable.get_value()  # a ShapeDtypeStruct in an abstract module
    bound = getattr(old, "committed", True)  # to its devices; other arrays go where a jitted function wants them
    return jax.device_put(x.astype(old.dtype), old.sharding if bound else None)


def _dequantised(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = dict(tensors)
    for name in tensors:
        layer, _, kind = name.rpartition(".")
        if kind not in SCALES or f"{layer}.weight" not in tensors:
            continue
        weight = tensors[f"{layer}.weight"].astype(np.float32)
        scale = result.pop(name).astype(np.float32)
        if scale.shape != tuple(-(-n // BLOCK) for n in weight.shape):
            raise InvalidInputError(
                f"load_checkpoint: {name} is {list(scale.shape)} for a weight {list(weight.shape)}; "
                f"expected one scale a {BLOCK} x {BLOCK} block."
            )
        scale = scale.repeat(BLOCK, 0)[: weight.shape[0]].repeat(BLOCK, 1)[:, : weight.shape[1]]
        result[f"{layer}.weight"] = weight * scale
    return result
