"""Rotary embedding over neighbouring pairs of numbers, with YaRN scaling, as DeepSeek publishes its weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8attn.errors import UnsupportedError


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN scaling of a context of ``original`` positions by ``factor``.

    mscale, mscale_all_dim   as in DeepSeek's config: rotations are multiplied by m(mscale) / m(mscale_all_dim) and the
                             softmax scale by m(mscale_all_dim)^2, with m(x) = 0.1 x log(factor) + 1; 0: no scaling
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def magnitude(self, x: float) -> float:
        """m(x) above."""
        return 0.1 * x * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotation of pair i of a width of 64 by position * theta^(-i/32)."""

    theta: float = 10000.0
    yarn: Yarn | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Rope:
        """From the keys rope_theta and rope_scaling (or rope_parameters) of a published config.json."""
        scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return cls(theta)
        if kind != "yarn":
            raise UnsupportedError(f"Rope: rope type {kind!r} is not known here; expected 'default' or 'yarn'.")
        names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        optional = {name: float(scaling[name]) for name in names if scaling.get(name) is not None}
        return cls(theta, Yarn(float(scaling["factor"]), int(scaling["original_max_position_embeddings"]), **optional))

    @property
    def softmax_factor(self) -> float:
        """What YaRN multiplies the softmax scale by."""
        return 1.0 if self.yarn is None else self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2

    def frequencies(self, width: int = 64) -> np.ndarray:
        """float32 [width / 2]: radians a position."""
        half = width // 2
        plain = self.theta ** (-np.arange(half) / half)
        if self.yarn is None:
            return plain.astype(np.float32)
        yarn = self.yarn

        def pair(rotations: float) -> float:
            """The pair that turns so often over the original context."""
            return half * math.log(yarn.original / (rotations * 2 * math.pi)) / math.log(self.theta)

        low = max(math.floor(pair(yarn.beta_fast)), 0)
        high = min(math.ceil(pair(yarn.beta_slow)), width - 1)
        slow = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return (plain * (1 - slow) + plain / yarn.factor * slow).astype(np.float32)

    def angles(self, positions: jax.Array, width: int = 64) -> tuple[jax.Array, jax.Array]:
        """(cos, sin), float32 [T, width / 2], of int32 positions [T]."""
        angle = positions.astype(jnp.float32)[:, None] * self.frequencies(width)
        size = 1.0
        if self.yarn is not None:
            size = self.yarn.magnitude(self.yarn.mscale) / self.yarn.magnitude(self.yarn.mscale_all_dim)
        return jnp.cos(angle) * size, jnp.sin(angle) * size


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (2i, 2i+1) of x [T, ..., width] by the angles of its token; computed in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1] // 2)
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
