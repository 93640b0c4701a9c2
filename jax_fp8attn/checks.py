"""Static checks of every call, and value checks on request.

Static: ranks, shapes, dtypes and options, always on, while tracing.
Values: offsets, indices, slots and scales. ``checks.<op>(...)`` takes the arguments of the op and raises
``InvalidInputError`` that names the first bad position when the arrays are concrete; inside
``jax.experimental.checkify.checkify`` the same call becomes checkify errors. Never on by default: on a GPU they cost a
device-to-host read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8attn.errors import InvalidInputError


def invalid(op: str, argument: str, got: Any, expected: str, remedy: str = "") -> InvalidInputError:
    """The error of a wrong call: what came, what was expected, what to do."""
    return InvalidInputError(f"{op}: {argument} is {got}; expected {expected}. {remedy}".rstrip())


def describe(x: Any) -> str:
    """dtype[shape], the way errors show an array."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    return repr(x)


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def array(op: str, argument: str, x: Any, shape: Sequence[int | str], dtypes: Sequence[Any], remedy: str = "") -> Any:
    """Checks an array argument. ``shape`` mixes sizes and letters; a letter only fixes the rank."""
    names = [jnp.dtype(d).name for d in dtypes]
    want = f"{' or '.join(names)} [{', '.join(map(str, shape))}]"
    if not is_array(x):
        raise invalid(op, argument, f"a {type(x).__name__}", want, remedy or "Pass a jax or numpy array.")
    fits = x.ndim == len(shape) and all(isinstance(w, str) or w == n for w, n in zip(shape, x.shape, strict=True))
    if not fits or jnp.dtype(x.dtype) not in [jnp.dtype(d) for d in dtypes]:
        raise invalid(op, argument, describe(x), want, remedy)
    return jnp.asarray(x)


def scalar(op: str, argument: str, x: Any, default: float | None = None) -> jax.Array:
    """A number or one-element array as float32 []."""
    if x is None and default is not None:
        x = default
    dtype = np.dtype(jnp.result_type(x)) if isinstance(x, int | float) or is_array(x) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.number) or isinstance(x, bool) or np.size(x) != 1:
        raise invalid(op, argument, describe(x), "a number or an array with one element")
    return jnp.asarray(x, jnp.float32).reshape(())


def option(op: str, argument: str, x: Any, allowed: Sequence[Any]) -> None:
    if not any(x is a or (type(x) is type(a) and x == a) for a in allowed):
        raise invalid(op, argument, repr(x), "one of " + ", ".join(repr(a) for a in allowed))


def flag(op: str, argument: str, x: Any) -> None:
    if not isinstance(x, bool | np.bool_):
        raise invalid(op, argument, describe(x), "True or False, known while tracing", "It is a static option.")


def float_dtype(op: str, argument: str, x: Any) -> np.dtype:
    try:
        dtype = jnp.dtype(x)
    except TypeError:
        dtype = None
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16), jnp.dtype(jnp.float32)):
        raise invalid(op, argument, repr(x), "bfloat16, float16 or float32", "For FP8 output pass output_quant.")
    return dtype


def report(op: str, argument: str, bad: Any, message: str) -> None:
    """Raises (host) or checks (checkify) that no element of the boolean array ``bad`` is set.

    ``message`` continues "<op>: <argument>[<position>] ...".
    """
    if isinstance(bad, jax.core.Tracer):
        from jax.experimental import checkify

        position = jnp.argmax(bad.reshape(-1))
        checkify.check(~jnp.any(bad), f"{op}: {argument}[{{position}}] (flattened) {message}", position=position)
        return
    bad = np.asarray(bad)
    if bad.any():
        position = np.unravel_index(int(np.argmax(bad)), bad.shape) if bad.ndim else ()
        place = f"[{', '.join(map(str, position))}]" if bad.ndim else ""
        raise InvalidInputError(f"{op}: {argument}{place} {message}")


def offsets(op: str, argument: str, x: Any, total: int) -> None:
    """Prefix sums of lengths: start at 0 or later, never decrease, end within ``total``."""
    if x is None:
        return
    report(op, argument, x < 0, "is negative")
    report(op, argument, x > total, f"is larger than {total}, the rows there are")
    report(op, argument, jnp.concatenate([jnp.zeros(1, bool), x[1:] < x[:-1]]), "is smaller than the offset before it")


def scale(op: str, argument: str, x: Any) -> None:
    """A multiplier of stored values: positive and finite."""
    if x is None:
        return
    x = jnp.asarray(x, jnp.float32)
    report(op, argument, ~((x > 0) & (x < jnp.inf)), "is not a positive finite number")
