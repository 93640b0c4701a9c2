"""vmap by folding: n calls of an op become one call over n times the tokens, without a loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn.quantize import Fp8Array, split_tokens


def broadcast_instances(arrays: Any, batched: Any, size: int) -> Any:
    """Gives every leaf the leading instance axis that only the batched ones have."""
    return jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *jnp.shape(x))), arrays, batched)


def merge_axes(x: jax.Array, axis: int) -> jax.Array:
    """Merges ``axis`` with the one after it."""
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def unfold_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., n*T, ...] -> [n, ..., T, ...]."""
    x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def unfold_tokens(out: jax.Array | Fp8Array, size: int) -> jax.Array | Fp8Array:
    """[n*T, ...] -> [n, T, ...]; scales are cut and padded per instance."""
    return split_tokens(out, size) if isinstance(out, Fp8Array) else unfold_axis(out, 0, size)


def per_token(x: jax.Array, tokens: int) -> jax.Array:
    """[instances] -> [tokens]: the value of the instance that owns each token."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], tokens // x.shape[0])).reshape(tokens)


def as_varying(tree: Any, arrays: Any) -> Any:
    """Under shard_map a loop carry must vary over every mesh axis that an operand of the loop varies over."""
    axes = frozenset().union(*(_varying_axes(x) for x in jax.tree.leaves(arrays)))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _varying_axes(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying
