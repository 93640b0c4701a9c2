"""What differs between jax 0.11.2 and 0.12, and between a GPU and the interpreter, in one place."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jax_fp8attn.quantize import E4M3, FP8_MAX


def store(ref: Any, value: Any) -> None:
    """Stores to global memory without the sector checks of 0.12, which refuse narrow stores."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def to_e4m3(x: Any, interpret: bool = True) -> Any:
    """Saturating cast; NaN stays NaN. The GPU's cast saturates by itself (PTX has no other), the interpreter's does
    not."""
    if not interpret:
        return x.astype(E4M3)
    limit = FP8_MAX[E4M3]
    return jnp.minimum(jnp.maximum(x, -limit), limit).astype(E4M3)


def varying_like(arguments: Any, results: Any) -> Any:
    """Under ``shard_map`` a result differs between devices wherever an argument does; a kernel does not say so."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(arguments)))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, results)
