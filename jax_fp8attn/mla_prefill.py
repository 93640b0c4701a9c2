"""``mla_prefill``: FP8 multi-head latent attention prefill, ragged, with lse, running merge and FP8 output."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_fp8attn import checks, dispatch, offsets
from jax_fp8attn.errors import UnsupportedError
from jax_fp8attn.folding import broadcast_instances, merge_axes, unfold_axis, unfold_tokens
from jax_fp8attn.partition import ALL, Heads, output_axes
from jax_fp8attn.problems import MlaArrays, MlaProblem, Output
from jax_fp8attn.quantize import E4M3, Fp8Array, Fp8PerTensor, Fp8Spec, check_spec

OPERANDS = (E4M3, jnp.bfloat16, jnp.float16, jnp.float32)
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
Scalar = float | jax.Array | None


def mla_prefill(
    q: jax.Array,
    k: jax.Array | tuple[jax.Array, jax.Array],
    v: jax.Array,
    *,
    cu_seqlens_q: jax.Array | None = None,
    cu_seqlens_k: jax.Array | None = None,
    causal: bool = True,
    softmax_scale: Scalar = None,
    q_scale: Scalar = None,
    k_scale: Scalar = None,
    v_scale: Scalar = None,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    output_quant: Fp8Spec | None = None,
    return_lse: bool = False,
    out_dtype: Any = jnp.bfloat16,
    compute: Literal["fp8", "bf16"] | None = None,
    implementation: dispatch.Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """Attention of packed query tokens over packed keys, 192 wide for q and k (128 nope + 64 rope), 128 for v.

    For local row i and key j of a sequence with Lq queries and Lk keys, with the values as stored:

        s[i,j]  = (q[i] . k[j]) * q_scale * k_scale * softmax_scale
        visible = j < Lk, and under ``causal`` j <= i + (Lk - Lq)       (bottom-right aligned)
        lse[i]  = log sum_j exp(s[i,j])
        out[i]  = v_scale * sum_j exp(s[i,j] - lse[i]) v[j]

    Arguments
      q              [T, H, 192]
      k              [S, H, 192], or the pair (k_nope [S, H, 128], k_rope [S, 64]) whose rope part all heads share
      v              [S, H, 128]
                     e4m3, bf16, f16 or f32, each operand for itself. e4m3 is taken as it is. Other floats are divided
                     by their scale, clamped to +-448 and cast; with scale 1 (the default) that is a plain cast.
      cu_seqlens_q   int32 [B+1], traced: sequence b owns the tokens cu_seqlens_q[b] to cu_seqlens_q[b+1]
      cu_seqlens_k   int32 [B+1], traced; default cu_seqlens_q (then S must be T). Both None: one sequence.
      causal         static; False lets every row see all keys of its sequence
      softmax_scale  number or traced scalar, default 192^-0.5 (YaRN models multiply their mscale^2 in)
      q_scale, k_scale, v_scale   number or traced scalar, default 1: true value = stored value * scale
      initial_state  (out [T, H, 128], lse float32 [H, T]): a partial result over other keys, merged in before the
                     result is rounded or quantised
      output_quant   Fp8PerTensor or Fp8PerGroup (32, 64 or 128 columns): the float32 result is quantised
      return_lse     static; also return lse, float32 [H, T], natural logarithm
      out_dtype      bf16, f16 or f32; ignored with output_quant
      compute        "fp8", or "bf16": operands keep their precision and nothing is cast to FP8. None: "fp8", or
                     "bf16" where the environment has JAX_FP8ATTN_FP8_PREFILL=0.
      implementation None (fastest), a name, or names in order of preference

    Batched form: q [B, T, H, 192], k [B, S, H, 192] (k_nope [B, S, H, 128], k_rope [B, S, 64]), v [B, S, H, 128],
    initial_state ([B, T, H, 128], [B, H, T]) hold B sequences of equal length; it excludes cu_seqlens. lse is
    [B, H, T]; the scales of an FP8 output count B*T tokens.

    Returns ``out`` or ``(out, lse)``: ``out`` [T, H, 128], or an ``Fp8Array`` with output_quant.

    Edge cases, equal in every implementation
      * A row without a visible key: out = 0, lse = -inf; nothing is read. Under ``causal`` with Lq > Lk these are the
        first Lq - Lk rows.
      * Rows outside every sequence: out = 0, lse = -inf, whatever the inputs and the initial state hold there; FP8
        groups get the scale of a zero group. Keys outside every sequence are never read.
      * Offsets are clamped to 0..T (0..S) and replaced by their running maximum: decreasing ones mean empty sequences.
      * Initial state: lse = +inf counts as -inf. An empty side adds exactly 0, even if it holds NaN; both empty:
        out = 0, lse = -inf; a NaN lse gives a NaN row.
      * NaN in q reaches its row and head; in k the rows that see the key; in v the column of the rows that see the
        key; nothing else.
      * Scales of 0, inf or NaN follow IEEE arithmetic.
      * T, S, B or H = 0: empty or all-empty results.

    Accuracy against float64 attention over the FP8 operands: docs/numerics.md. Under jit offsets, scales and states
    change without a retrace. vmap folds into the token axis. No derivative.
    """
    op = "mla_prefill"
    batched = getattr(q, "ndim", 0) == 4
    q, k_nope, k_rope, v = _operands(op, q, k, v, batched)
    sequences = q.shape[0] if batched else 1
    if batched:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise checks.invalid(
                op, "cu_seqlens_q", "given with batched [B, T, H, D] operands", "None, or packed operands"
            )
        cu_seqlens_q, cu_seqlens_k = (jnp.arange(sequences + 1, dtype=jnp.int32) * x.shape[1] for x in (q, v))
        q, k_nope, k_rope, v = (x if x is None else merge_axes(x, 0) for x in (q, k_nope, k_rope, v))
    tokens, heads, _ = q.shape
    keys = v.shape[0]
    cu_seqlens_q, cu_seqlens_k = _offsets(op, cu_seqlens_q, cu_seqlens_k, tokens, keys)
    for name, value in (("causal", causal), ("return_lse", return_lse)):
        checks.flag(op, name, value)
    compute = resolved_compute(op, compute)
    output_scale = None
    if output_quant is not None:
        check_spec(op, "output_quant", output_quant, v.shape[-1])
        if isinstance(output_quant, Fp8PerTensor):
            output_scale = jnp.asarray(output_quant.scale, jnp.float32).reshape(1)
    state_out, state_lse = _initial_state(op, initial_state, sequences if batched else None, tokens, heads)

    problem = MlaProblem(
        tokens=tokens,
        keys=keys,
        sequences=cu_seqlens_q.shape[0] - 1,
        heads=heads,
        q_dtype=q.dtype,
        k_dtype=k_nope.dtype,
        v_dtype=v.dtype,
        out_dtype=checks.float_dtype(op, "out_dtype", out_dtype),
        k_rope_dtype=None if k_rope is None else k_rope.dtype,
        state_dtype=None if state_out is None else state_out.dtype,
        causal=bool(causal),
        compute=compute,
        output_quant=output_quant and output_quant.static(),
        return_lse=bool(return_lse),
    )
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    arrays = MlaArrays(
        q=q,
        k=k_nope,
        k_rope=k_rope,
        v=v,
        q_start=cu_seqlens_q,
        q_length=None,
        k_start=cu_seqlens_k,
        k_length=None,
        softmax_scale=checks.scalar(op, "softmax_scale", softmax_scale, 192**-0.5).reshape(1),
        **{name: checks.scalar(op, name, value, 1.0).reshape(1) for name, value in scales.items()},
        initial_out=state_out,
        initial_lse=state_lse,
        output_scale=output_scale,
    )
    result = dispatch.call(OP, problem, arrays, implementation)
    return _unbatch(result, sequences, return_lse) if batched else result


def _operands(op: str, q: Any, k: Any, v: Any, batched: bool) -> tuple[Any, Any, Any, Any]:
    """Checks q, k and v: (q, k or its nope part, rope part or None, v)."""
    lead: tuple[Any, ...] = ("T",)
    if batched:
        lead = (q.shape[0], "T")
    for name, x in (
        ("q", q),
        ("v", v),
        *(zip(("k[0]", "k[1]"), k, strict=False) if isinstance(k, tuple) else [("k", k)]),
    ):
        dtype = getattr(x, "dtype", None)
        if dtype is not None and "float8" in str(dtype) and jnp.dtype(dtype) != E4M3:
            raise UnsupportedError(f"{op}: {name} is {dtype}; the FP8 type of this op is float8_e4m3fn.")
    q = checks.array(op, "q", q, (*lead, "H", 192), OPERANDS)
    heads = q.shape[-2]
    v = checks.array(op, "v", v, (*lead[:-1], "S", heads, 128), OPERANDS, f"q has {heads} heads.")
    rows = (*lead[:-1], v.shape[-3])
    remedy = f"v has {v.shape[-3]} keys and {heads} heads."
    if not isinstance(k, tuple | list):
        return q, checks.array(op, "k", k, (*rows, heads, 192), OPERANDS, remedy), None, v
    if len(k) != 2:
        raise checks.invalid(op, "k", f"a tuple of {len(k)}", "an array or the pair (k_nope, k_rope)")
    nope = checks.array(op, "k[0] (nope)", k[0], (*rows, heads, 128), OPERANDS, remedy)
    return q, nope, checks.array(op, "k[1] (rope)", k[1], (*rows, 64), OPERANDS, remedy), v


def _offsets(op: str, cu_q: Any, cu_k: Any, tokens: int, keys: int) -> tuple[jax.Array, jax.Array]:
    if cu_q is None:
        if cu_k is not None:
            raise checks.invalid(op, "cu_seqlens_q", "None beside cu_seqlens_k", "int32 [B+1]", "Pass both or neither.")
        return jnp.array([0, tokens], jnp.int32), jnp.array([0, keys], jnp.int32)
    cu_q = checks.array(op, "cu_seqlens_q", cu_q, ("B+1",), [jnp.int32])
    if not cu_q.shape[0]:
        raise checks.invalid(op, "cu_seqlens_q", "int32[0]", "int32 [B+1]", "No sequence at all is [0].")
    if cu_k is None:
        if keys != tokens:
            raise checks.invalid(op, "cu_seqlens_k", f"None with {keys} keys for {tokens} tokens", "int32 [B+1]")
        return cu_q, cu_q
    return cu_q, checks.array(
        op, "cu_seqlens_k", cu_k, cu_q.shape, [jnp.int32], "Both have one entry a sequence, plus one."
    )


def resolved_compute(op: str, compute: Any) -> str:
    """What ``compute`` means; None asks the environment."""
    if compute is None:
        return "bf16" if os.environ.get("JAX_FP8ATTN_FP8_PREFILL", "1").strip() == "0" else "fp8"
    checks.option(op, "compute", compute, ("fp8", "bf16"))
    return compute


def _initial_state(op: str, state: Any, batch: int | None, tokens: int, heads: int) -> tuple[Any, Any]:
    """(out [T, H, 128], lse [H, T]) or (None, None)."""
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise checks.invalid(op, "initial_state", type(state).__name__, "a pair (out, lse)")
    out_shape, lse_shape = (tokens, heads, 128), (heads, tokens)
    if batch is not None:
        length = tokens // batch if batch else 0
        out_shape, lse_shape = (batch, length, heads, 128), (batch, heads, length)
    remedy = ""
    if getattr(state[1], "shape", None) == (tokens, heads) != lse_shape:
        remedy = "lse looks like [T, H]; transpose it."
    out = checks.array(op, "initial_state[0] (out)", state[0], out_shape, FLOATS)
    lse = checks.array(op, "initial_state[1] (lse)", state[1], lse_shape, [jnp.float32], remedy)
    if batch is None:
        return out, lse
    return merge_axes(out, 0), merge_axes(jnp.moveaxis(lse, 0, 1), 1)


def _unbatch(result: Any, batch: int, return_lse: bool) -> Any:
    out, lse = result if return_lse else (result, None)
    values = out.values if isinstance(out, Fp8Array) else out
    values = values.reshape(batch, values.shape[0] // max(batch, 1), *values.shape[1:])
    out = dataclasses.replace(out, values=values) if isinstance(out, Fp8Array) else values
    return (out, unfold_axis(lse, 1, batch)) if return_lse else out


def _prepare(problem: MlaProblem, arrays: MlaArrays) -> MlaArrays:
    """Offsets become disjoint ranges: (start, length) of every sequence."""
    q_start, q_length = offsets.ranges(arrays.q_start, problem.tokens)
    k_start, k_length = offsets.ranges(arrays.k_start, problem.keys)
    return arrays._replace(q_start=q_start, q_length=q_length, k_start=k_start, k_length=k_length)


def _fold(
    problem: MlaProblem, arrays: MlaArrays, size: int, batched: MlaArrays
) -> tuple[MlaProblem, MlaArrays, Callable[[Any], Any]]:
    """``size`` calls as one: their tokens, keys and sequences stand one after the other."""
    arrays = broadcast_instances(arrays, batched, size)

    def shifted(start: jax.Array, rows: int) -> jax.Array:
        return (start + jnp.arange(size, dtype=jnp.int32)[:, None] * rows).reshape(-1)

    def merged(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else merge_axes(x, 0)

    folded = MlaArrays(*map(merged, arrays))._replace(
        q_start=shifted(arrays.q_start, problem.tokens),
        k_start=shifted(arrays.k_start, problem.keys),
        initial_lse=None if arrays.initial_lse is None else merge_axes(jnp.moveaxis(arrays.initial_lse, 0, 1), 1),
    )

    def unfold(result: Any) -> Any:
        out, lse = result if problem.return_lse else (result, None)
        out = unfold_tokens(out, size)
        return (out, unfold_axis(lse, 1, size)) if problem.return_lse else out

    counts = {name: size * getattr(problem, name) for name in ("tokens", "keys", "sequences", "instances")}
    return dataclasses.replace(problem, **counts), folded, unfold


def _heads(problem: MlaProblem) -> Heads:
    of_heads = {"q": 1, "k": 1, "v": 1, "initial_out": 1, "initial_lse": 0}
    arrays = MlaArrays(**{name: of_heads.get(name, ALL) for name in MlaArrays._fields})
    return Heads(("heads",), arrays, (*output_axes(problem.output_quant), *[0] * problem.return_lse))


OP = dispatch.Op("mla_prefill", _prepare, _fold, heads=_heads)
