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
from jax_fp8attn.offsets import owner, ranges


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
    number = isinstance(x, int | float) and not isinstance(x, bool)
    if is_array(x):
        number = x.size == 1 and any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not number:
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
    if not np.size(bad):
        return
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


def mla_prefill(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    softmax_scale: Any = None,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    **options: Any,
) -> None:
    """The value checks of ``mla_prefill``: offsets in order and in range, scales positive and finite."""
    op = "mla_prefill"
    offsets(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    offsets(op, "cu_seqlens_k", cu_seqlens_k, v.shape[0])
    scales = {"softmax_scale": softmax_scale, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    for name, value in scales.items():
        scale(op, name, value)


def merge_attn_states(
    prefix_output: Any,
    prefix_lse: Any,
    suffix_output: Any,
    suffix_lse: Any,
    *,
    prefill_tokens_with_context: Any = None,
    output_quant: Any = None,
    output_scale: Any = None,
    **options: Any,
) -> None:
    """The value checks of ``merge_attn_states``: the context count in 0..T, the output scale positive and finite."""
    op, tokens = "merge_attn_states", prefix_output.shape[0]
    if prefill_tokens_with_context is not None:
        count = prefill_tokens_with_context
        report(op, "prefill_tokens_with_context", (count < 0) | (count > tokens), f"is not in 0 to T = {tokens}")
    scale(op, "output_scale", output_scale)
    scale(op, "output_quant.scale", getattr(output_quant, "scale", None))


def sparse_prefill(
    q: Any,
    prefix: Any,
    prefix_indices: Any,
    prefix_indptr: Any,
    extend: Any = None,
    extend_indices: Any = None,
    extend_indptr: Any = None,
    *,
    padding: int | None = None,
    scales: bool = False,
    **options: Any,
) -> None:
    """The value checks of ``sparse_prefill``: indptr starts at 0, never decreases and ends within the index array;
    every listed index is a row of its own pool.

    padding  an index that means "no row" and is no error, usually -1
    scales   also: every FP8 scale of q and of a listed row is positive and finite
    """
    op = "sparse_prefill"
    pools = [("prefix", prefix, prefix_indices, prefix_indptr), ("extend", extend, extend_indices, extend_indptr)]
    for name, pool, indices, indptr in pools:
        if pool is None:
            continue
        report(op, f"{name}_indptr", indptr[:1] != 0, "is not 0")
        offsets(op, f"{name}_indptr", indptr, indices.shape[0])
        entry = jnp.arange(indices.shape[0])
        listed = (entry >= indptr[0]) & (entry < indptr[-1])
        _listed_rows(op, f"{name}_indices", indices, listed, pool, (padding, scales), indptr)
    if scales:
        _latent_scales(op, "q", q)


def sparse_prefill_topk(
    q: Any,
    prefix: Any,
    indices: Any,
    lengths: Any = None,
    extend: Any = None,
    extend_indices: Any = None,
    extend_lengths: Any = None,
    *,
    padding: int | None = None,
    scales: bool = False,
    **options: Any,
) -> None:
    """The value checks of ``sparse_prefill_topk``: lengths within 0..K, every listed index a row of its own pool.

    padding, scales  as in ``checks.sparse_prefill``
    """
    op = "sparse_prefill_topk"
    pools = [(prefix, "indices", indices, "lengths", lengths)]
    pools += [(extend, "extend_indices", extend_indices, "extend_lengths", extend_lengths)]
    for pool, name, matrix, lengths_name, length in pools:
        if pool is None:
            continue
        width = matrix.shape[1]
        listed = jnp.ones(matrix.shape, bool)
        if length is not None:
            report(op, lengths_name, (length < 0) | (length > width), f"is outside 0..{width}")
            listed = jnp.arange(width) < length[:, None]
        _listed_rows(op, name, matrix, listed, pool, (padding, scales))
    if scales:
        _latent_scales(op, "q", q)


def _listed_rows(
    op: str, argument: str, indices: Any, listed: Any, pool: Any, options: tuple[int | None, bool], indptr: Any = None
) -> None:
    padding, scales = options
    rows = jax.tree.leaves(pool)[0].shape[0]
    outside = (indices < 0) | (indices >= rows)
    bad = listed & outside if padding is None else listed & outside & (indices != padding)
    message = f"is listed{_owner(indptr, bad)}, and is none of the {rows} rows of its pool"
    report(op, argument, bad, message)
    if scales and rows and hasattr(pool, "scale"):
        bad_row = jnp.any(_bad_latent_scale(pool.scale), axis=-1)
        bad = listed & ~outside & bad_row[jnp.where(outside, 0, indices)]
        report(op, argument, bad, f"lists{_owner(indptr, bad)} a row whose scale is not a positive finite number")


def _owner(indptr: Any, bad: Any) -> str:
    """Token and place of the first bad entry of concatenated lists, if they can be read."""
    if indptr is None or isinstance(bad, jax.core.Tracer) or not np.any(bad):
        return ""
    entry = int(np.argmax(bad))
    token = int(np.searchsorted(np.asarray(indptr), entry, side="right")) - 1
    return f" (entry {entry - int(indptr[token])} of token {token})"


def _latent_scales(op: str, argument: str, rows: Any) -> None:
    if hasattr(rows, "scale"):
        report(op, f"{argument}.scale", _bad_latent_scale(rows.scale), "is not a positive finite number")


def _bad_latent_scale(scale: Any) -> jax.Array:
    """By bits: a CPU takes the subnormal 2^-127 for zero."""
    if scale.dtype != jnp.float32:
        return jax.lax.bitcast_convert_type(scale, jnp.uint8) == 255
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return (bits <= 0) | (bits >= 0x7F800000)


def gdn_prefill(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    beta: Any,
    *,
    cu_seqlens: Any = None,
    gate: str = "log",
    **options: Any,
) -> None:
    """The value checks of ``gdn_prefill``: offsets in order and in range, and the gates of every sequence's tokens
    g <= 0, or 0 <= g <= 1 for gate "alpha". Gates outside every sequence are not looked at."""
    op = "gdn_prefill"
    g = jnp.asarray(g)
    bad = ~(g <= 0) if gate == "log" else ~((g >= 0) & (g <= 1))
    if cu_seqlens is not None:
        offsets(op, "cu_seqlens", cu_seqlens, g.shape[0])
        inside = owner(*ranges(jnp.asarray(cu_seqlens), g.shape[0]), g.shape[0]) >= 0
        bad = bad & inside[:, None]
    expected = "at most 0" if gate == "log" else "from 0 to 1"
    report(op, "g", bad, f"is not {expected} (gate={gate!r})")


def gdn_prefill_pool(
    qkv: Any,
    a: Any,
    b: Any,
    A_log: Any,
    dt_bias: Any,
    pool: Any,
    slots: Any,
    has_initial_state: Any,
    *,
    cu_seqlens: Any,
    checkpoint_every: int = 0,
    checkpoint_slots: Any = None,
    write_slots: Any = None,
    **options: Any,
) -> None:
    """The value checks of ``gdn_prefill_pool``: offsets in order and in range; every slot -1 or a row of the pool; no
    row written twice, and none written that another sequence starts from."""
    op, rows = "gdn_prefill_pool", pool.shape[0]
    offsets(op, "cu_seqlens", cu_seqlens, qkv.shape[0])
    slots = jnp.asarray(slots)
    targets = slots if write_slots is None else jnp.asarray(write_slots)
    name = "slots" if write_slots is None else "write_slots"
    for argument, x in {"slots": slots, name: targets}.items():
        report(op, argument, (x < -1) | (x >= rows), f"is neither -1 nor one of the {rows} rows of the pool")
    report(op, name, _repeated(targets), "is written by an earlier sequence, too")
    sources = jnp.where(jnp.asarray(has_initial_state).astype(bool), slots, -1)
    others = ~jnp.eye(slots.shape[0], dtype=bool)
    taken = jnp.any((targets[:, None] == sources) & (sources >= 0) & others, axis=1)
    report(op, name, taken, "is a row that another sequence starts from")
    if checkpoint_slots is None or not checkpoint_every:
        return
    _, length = ranges(jnp.asarray(cu_seqlens), qkv.shape[0])
    checkpoint_slots = jnp.asarray(checkpoint_slots)
    used = jnp.arange(checkpoint_slots.shape[0]) < jnp.sum(length // checkpoint_every)
    checkpoint_slots = jnp.where(used, checkpoint_slots, -1)
    name, outside = "checkpoint_slots", (checkpoint_slots < -1) | (checkpoint_slots >= rows)
    report(op, name, outside, f"is neither -1 nor one of the {rows} rows of the pool")
    report(op, name, _repeated(checkpoint_slots), "is written by an earlier checkpoint, too")
    both = jnp.concatenate([targets, sources])
    taken = jnp.any((checkpoint_slots[:, None] == both) & (both >= 0), axis=1)
    report(op, name, taken, "is a row that a sequence starts from or ends in")


def _repeated(slots: jax.Array) -> jax.Array:
    """bool [n]: a slot that is no padding and stands earlier in the list, too."""
    earlier = jnp.tril(jnp.ones((slots.shape[0], slots.shape[0]), bool), -1)
    return jnp.any((slots[:, None] == slots) & earlier, axis=1) & (slots >= 0)
