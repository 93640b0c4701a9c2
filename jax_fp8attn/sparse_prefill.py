"""``sparse_prefill``: attention of every token over its own list of DeepSeek-V4 rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8attn import checks, dispatch
from jax_fp8attn.errors import InvalidInputError
from jax_fp8attn.folding import broadcast_instances, merge_axes, unfold_axis
from jax_fp8attn.latent import WIDTH, Fp8Latent, check_latent
from jax_fp8attn.partition import ALL, Heads
from jax_fp8attn.problems import PoolForm, RowForm, SparseArrays, SparsePool, SparseProblem

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
MOST = 2**31 - 2**10  # rows and entries are counted in int32, whole tiles past the end of a list included

Rows = jax.Array | Fp8Latent


def sparse_prefill(
    q: Rows,
    prefix: Rows,
    prefix_indices: jax.Array,
    prefix_indptr: jax.Array,
    extend: Rows | None = None,
    extend_indices: jax.Array | None = None,
    extend_indptr: jax.Array | None = None,
    *,
    softmax_scale: float | jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    return_lse: bool = False,
    out_dtype: Any = jnp.bfloat16,
    precision: Literal["exact", "fp8"] = "exact",
    implementation: dispatch.Implementation = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of each token over the rows it lists, out of a paged prefix pool and the chunk's own extend rows.

    One row of 512 numbers is key and value at once, all heads of a token share its lists, and both pools go into one
    softmax. Causality lies in the lists alone. For token t and head h, over the listed rows R_n:

        s_n = softmax_scale * <q[t,h], R_n>
        out = sum_n exp(s_n) R_n / (sum_n exp(s_n) + exp(sink_h))       all 512 numbers, the rotary 64 included
        lse = log(sum_n exp(s_n))                                       without the sink

    q               [T, H, 512] bf16, f16 or f32, or an Fp8Latent with leading axes [T, H]; H >= 1, any number
    prefix          [P, 512] bf16, f16 or f32, or an Fp8Latent with leading axis [P]; P may be 0
    prefix_indices  int32 [capacity]: row numbers of prefix, the lists one after the other
    prefix_indptr   int32 [T+1]: the list of token t is prefix_indices[prefix_indptr[t] : prefix_indptr[t+1]]
    extend, extend_indices, extend_indptr
                    the second pool, all three or none. q and the pools may have different forms
    softmax_scale   number, default 512 ** -0.5; used as it is; may be 0 or negative
    attn_sink       float32 [H], on the scale of s; None or -inf: no sink; +inf: out = 0
    return_lse      also return lse
    out_dtype       bfloat16, float16 or float32
    precision       "exact": rows are dequantised exactly. "fp8" allows an implementation to multiply in FP8 where that
                    is faster; "xla" and "reference" compute exactly all the same
    implementation  None (fastest), a name, or names in order of preference

    Returns out [T, H, 512], or (out, lse) with lse float32 [H, T], natural logarithm.

    Values that cannot raise under jit; equal in every implementation, and memory-safe:
      * an index below 0, or not below the rows of its own pool: skipped. -1 is the usual filler.
      * an index listed k times counts k times. The order of a list only changes rounding.
      * indptr outside 0..capacity is clamped; a list that ends before it starts is empty; other tokens do not change.
      * entries that belong to no list, and rows that no list names, are never read: they may hold anything.
      * no valid row: out = 0 whatever the sink, and lse = -inf.
      * NaN in a listed row (code 0x7F or 0xFF, scale byte 255): NaN for the tokens that list it, and only for them.
      * scores that overflow float32 to +inf: NaN; rows with score -inf have weight 0.
      * a NaN sink: NaN out for that head, where the token has a row.
      * T = 0: empty results.

    A token's result does not depend on the other tokens of the call, bit for bit. ``checks.sparse_prefill`` turns bad
    values into errors.

    Partial results: run the parts with attn_sink=None and return_lse=True, merge them with ``merge_attn_states``, then
    multiply by 1 / (1 + exp(sink - lse)), once.

    Under jit nothing that is traced causes a retrace. vmap over any of the arrays folds into the token axis; pools and
    lists that are not batched stay shared. Heads may be sharded; pools and lists are then replicated. No derivative.

    From AITER: unified_kv -> prefix, kv -> extend, kv_indices_prefix -> prefix_indices, kv_indptr_prefix ->
    prefix_indptr, and so on.
    """
    op = "sparse_prefill"
    options = Options(softmax_scale, attn_sink, return_lse, out_dtype, precision)
    q = _rows(op, "q", q, ("T", "H"))
    given = {"extend": extend, "extend_indices": extend_indices, "extend_indptr": extend_indptr}
    pools = [_csr_pool(op, "prefix", q, prefix, prefix_indices, prefix_indptr), None]
    if _all_or_none(op, given):
        pools[1] = _csr_pool(op, "extend", q, extend, extend_indices, extend_indptr)
    return dispatch.call(OP, *_problem(op, q, *pools, options), implementation)


def sparse_prefill_topk(
    q: Rows,
    prefix: Rows,
    indices: jax.Array,
    lengths: jax.Array | None = None,
    extend: Rows | None = None,
    extend_indices: jax.Array | None = None,
    extend_lengths: jax.Array | None = None,
    *,
    softmax_scale: float | jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    return_lse: bool = False,
    out_dtype: Any = jnp.bfloat16,
    precision: Literal["exact", "fp8"] = "exact",
    implementation: dispatch.Implementation = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """``sparse_prefill`` with the lists as a matrix, as a top-k selection gives them.

    indices         int32 [T, K]: row numbers of prefix, one row a token
    lengths         int32 [T]: token t lists indices[t, :lengths[t]]; None: all K; values outside 0..K are clamped
    extend_indices  int32 [T, K2], its lengths in extend_lengths; both pool and indices or none

    Entries at and past lengths[t] are never read. Everything else as in ``sparse_prefill``.
    """
    op = "sparse_prefill_topk"
    options = Options(softmax_scale, attn_sink, return_lse, out_dtype, precision)
    q = _rows(op, "q", q, ("T", "H"))
    pools = [_matrix_pool(op, "prefix", q, prefix, ("indices", indices), ("lengths", lengths)), None]
    if _all_or_none(op, {"extend": extend, "extend_indices": extend_indices}):
        entries, ends = ("extend_indices", extend_indices), ("extend_lengths", extend_lengths)
        pools[1] = _matrix_pool(op, "extend", q, extend, entries, ends)
    elif extend_lengths is not None:
        raise checks.invalid(op, "extend_lengths", "given without extend", "extend and extend_indices beside it")
    return dispatch.call(OP, *_problem(op, q, *pools, options), implementation)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that both forms share, as given."""

    softmax_scale: Any
    attn_sink: Any
    return_lse: Any
    out_dtype: Any
    precision: Any


def _rows(op: str, argument: str, x: Any, lead: tuple[str, ...]) -> Rows:
    if isinstance(x, Fp8Latent):
        return check_latent(op, argument, x, lead)
    remedy = "FP8 rows come as an Fp8Latent: see quantize_latent." if "8" in str(getattr(x, "dtype", "")) else ""
    return checks.array(op, argument, x, (*lead, WIDTH), FLOATS, remedy)


def _all_or_none(op: str, given: dict[str, Any]) -> bool:
    missing = [name for name, x in given.items() if x is None]
    if missing and len(missing) < len(given):
        present = next(name for name in given if name not in missing)
        raise checks.invalid(op, missing[0], f"missing while {present} is given", "all of " + ", ".join(given))
    return not missing


def _csr_pool(op: str, name: str, q: Rows, rows: Any, indices: Any, indptr: Any) -> SparsePool:
    rows = _rows(op, name, rows, ("P" if name == "prefix" else "S",))
    indices = checks.array(op, f"{name}_indices", indices, ("capacity",), [jnp.int32])
    tokens = q.shape[0]
    remedy = f"q has T = {tokens} tokens: indptr has T+1 offsets."
    indptr = checks.array(op, f"{name}_indptr", indptr, (tokens + 1,), [jnp.int32], remedy)
    return _countable(op, name, SparsePool(rows, indices, indptr[:-1], indptr[1:]))


def _matrix_pool(
    op: str, name: str, q: Rows, rows: Any, indices: tuple[str, Any], lengths: tuple[str, Any]
) -> SparsePool:
    rows = _rows(op, name, rows, ("P" if name == "prefix" else "S",))
    tokens = q.shape[0]
    remedy = f"q has T = {tokens} tokens."
    matrix = checks.array(op, *indices, (tokens, "K"), [jnp.int32], remedy)
    width = matrix.shape[1]
    length = jnp.full(tokens, width, jnp.int32)
    if lengths[1] is not None:
        length = jnp.clip(checks.array(op, *lengths, (tokens,), [jnp.int32], remedy), 0, width)
    # before the products below: int32 holds them only if it can count the entries
    pool = _countable(op, name, SparsePool(rows, matrix.reshape(tokens * width), length, length))
    start = jnp.arange(tokens, dtype=jnp.int32) * width
    return pool._replace(start=start, end=start + length)


def _countable(op: str, name: str, pool: SparsePool) -> SparsePool:
    rows, entries = _count(pool.rows), pool.indices.shape[0]
    if max(rows, entries) > MOST:
        got = f"{rows} rows, listed by {entries} entries"
        raise checks.invalid(op, name, got, f"at most {MOST} of each", "Indices are int32: split the call.")
    return pool


def _count(rows: Rows) -> int:
    return jax.tree.leaves(rows)[0].shape[0]


def _problem(
    op: str, q: Rows, prefix: SparsePool, extend: SparsePool | None, options: Options
) -> tuple[SparseProblem, SparseArrays]:
    """Checks the options and gathers every static fact."""
    tokens, heads, _ = q.shape
    if not heads:
        raise checks.invalid(op, "q", checks.describe(jax.tree.leaves(q)[0]), "at least one head")
    sink = options.attn_sink
    if sink is not None:
        sink = checks.array(op, "attn_sink", sink, (heads,), [jnp.float32], f"q has H = {heads} heads.")[None]
    scale = checks.scalar(op, "softmax_scale", options.softmax_scale, WIDTH**-0.5)
    checks.flag(op, "return_lse", options.return_lse)
    checks.option(op, "precision", options.precision, ("exact", "fp8"))
    problem = SparseProblem(
        tokens=tokens,
        heads=heads,
        q=_form(q),
        prefix=_pool_form(prefix),
        extend=None if extend is None else _pool_form(extend),
        out_dtype=_out_dtype(op, options.out_dtype),
        has_sink=sink is not None,
        return_lse=bool(options.return_lse),
        precision=options.precision,
    )
    return problem, SparseArrays(q, prefix, extend, scale.reshape(1), sink)


def _form(rows: Rows) -> RowForm:
    if not isinstance(rows, Fp8Latent):
        return RowForm(np.dtype(rows.dtype))
    scale_dtype = np.dtype(np.float32 if rows.scale.dtype == jnp.float32 else np.uint8)
    return RowForm(np.dtype(rows.nope.dtype), rows.group, scale_dtype)


def _pool_form(pool: SparsePool) -> PoolForm:
    return PoolForm(_form(pool.rows), _count(pool.rows), pool.indices.shape[0])


def _out_dtype(op: str, x: Any) -> np.dtype:
    try:
        dtype = None if x is None else jnp.dtype(x)
    except TypeError:
        dtype = None
    if dtype not in [jnp.dtype(d) for d in FLOATS]:
        raise checks.invalid(op, "out_dtype", repr(x), "bfloat16, float16 or float32")
    return dtype


def _prepare(problem: SparseProblem, arrays: SparseArrays) -> SparseArrays:
    """Lists inside their index array, never of negative length; E8M0 scales as bytes."""

    def as_bytes(rows: Any) -> Any:
        if not isinstance(rows, Fp8Latent) or rows.scale.dtype == jnp.float32:
            return rows
        return rows.with_scale_dtype(jnp.uint8)

    def inside(pool: SparsePool) -> SparsePool:
        entries = pool.indices.shape[0]
        start = jnp.clip(pool.start, 0, entries)
        end = jnp.maximum(jnp.clip(pool.end, 0, entries), start)
        return SparsePool(as_bytes(pool.rows), pool.indices, start, end)

    extend = None if arrays.extend is None else inside(arrays.extend)
    return arrays._replace(q=as_bytes(arrays.q), prefix=inside(arrays.prefix), extend=extend)


def _fold(
    problem: SparseProblem, arrays: SparseArrays, size: int, batched: SparseArrays
) -> tuple[SparseProblem, SparseArrays, Callable[[Any], Any]]:
    """``size`` calls as one: instance i owns the tokens i*T to (i+1)*T, its sinks and its scale."""
    extend = None
    if arrays.extend is not None:
        extend = _fold_pool("extend", arrays.extend, batched.extend, size)
    folded = SparseArrays(
        q=_fold_axis(arrays.q, batched.q, size),
        prefix=_fold_pool("prefix", arrays.prefix, batched.prefix, size),
        extend=extend,
        softmax_scale=_fold_axis(arrays.softmax_scale, batched.softmax_scale, size),
        sink=_fold_axis(arrays.sink, batched.sink, size),
    )

    def unfold(result: Any) -> Any:
        if not problem.return_lse:
            return unfold_axis(result, 0, size)
        return unfold_axis(result[0], 0, size), unfold_axis(result[1], 1, size)

    changed = dataclasses.replace(
        problem,
        tokens=size * problem.tokens,
        instances=size * problem.instances,
        prefix=_pool_form(folded.prefix),
        extend=None if extend is None else _pool_form(extend),
    )
    return changed, folded, unfold


def _fold_pool(name: str, pool: SparsePool, batched: SparsePool, size: int) -> SparsePool:
    """Rows and lists that differ between instances are put one after the other, and their numbers shifted.

    Shared rows and lists stay as they are; shared lists over different rows are repeated.
    """
    own_rows = any(jax.tree.leaves(batched.rows))
    instance = jnp.arange(size, dtype=jnp.int32)[:, None]
    rows, indices = pool.rows, pool.indices
    start, end = broadcast_instances((pool.start, pool.end), (batched.start, batched.end), size)  # [n, T]
    if own_rows:
        rows = _fold_axis(rows, batched.rows, size)
    if own_rows or batched.indices:
        indices = broadcast_instances(indices, batched.indices, size)  # [n, entries]
        count, entries = _count(rows) // size, indices.shape[1]
        if max(_count(rows), size * entries) > MOST:
            raise InvalidInputError(
                f"sparse_prefill: {name} under vmap has {_count(rows)} rows, listed by {size} * {entries} entries; "
                f"expected at most {MOST} of each. Use jax.lax.map, or share the pool."
            )
        if own_rows:
            valid = (indices >= 0) & (indices < count)
            indices = jnp.where(valid, indices + instance * count, -1)
        indices = merge_axes(indices, 0)
        start, end = start + instance * entries, end + instance * entries
    return SparsePool(rows, indices, merge_axes(start, 0), merge_axes(end, 0))


def _fold_axis(x: Any, batched: Any, size: int) -> Any:
    """Gives every instance its own part of the first axis."""
    return jax.tree.map(lambda leaf: merge_axes(leaf, 0), broadcast_instances(x, batched, size))


def _heads(problem: SparseProblem) -> Heads:
    arrays = SparseArrays(q=1, prefix=ALL, extend=ALL, softmax_scale=ALL, sink=1)
    return Heads(("heads",), arrays, (1, 0) if problem.return_lse else (1,))


OP = dispatch.Op("sparse_prefill", _prepare, _fold, heads=_heads)
