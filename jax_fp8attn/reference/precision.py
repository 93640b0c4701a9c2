"""The precision of the oracles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def exact_float() -> Any:
    """float64 when x64 is on, else float32."""
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
