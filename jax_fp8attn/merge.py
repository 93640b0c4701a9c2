"""``merge_attn_states``: partial attention results into one, with FP8 output in the same pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_fp8attn import checks, dispatch, offsets
from jax_fp8attn.folding import broadcast_instances, merge_axes, unfold_axis, unfold_tokens
from jax_fp8attn.partition import ALL, Heads, output_axes
from jax_fp8attn.problems import MergeArrays, MergeProblem, Output
from jax_fp8attn.quantize import Fp8PerTensor, Fp8Spec, check_spec

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def merge_attn_states(
    prefix_output: jax.Array,
    prefix_lse: jax.Array,
    suffix_output: jax.Array,
    suffix_lse: jax.Array,
    *,
    prefill_tokens_with_context: int | jax.Array | None = None,
    output_quant: Fp8Spec | None = None,
    output_scale: float | jax.Array | None = None,
    lse_layout: Literal["HT", "TH"] = "HT",
    lse_base: Literal["e", "2"] = "e",
    return_lse: bool = False,
    out_dtype: Any = None,
    in_place: bool = False,
    implementation: dispatch.Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """Merges two attention results over disjoint keys into the result over all of them.

    prefix_output, suffix_output  [T, H, D] bf16, f16 or f32, both alike
    prefix_lse, suffix_lse        float32 [H, T] (lse_layout="TH": [T, H]); natural logarithm (lse_base="2": base 2)
    prefill_tokens_with_context   int or traced int32, default T: tokens from it on take the suffix as it is, and
                                  their prefix is not read; clamped to 0..T when traced
    output_quant                  Fp8PerTensor or Fp8PerGroup: the float32 result is quantised in the same pass
    output_scale                  short for output_quant=Fp8PerTensor(output_scale)
    return_lse                    also return the merged lse, in the layout and base that came in
    out_dtype                     bf16, f16 or f32, default the input's; excludes output_quant
    in_place                      the result takes the memory of prefix_output: for one that is donated or not used
                                  again, others are copied first; needs the input's own type as output type
    implementation                None (fastest), a name, or names in order of preference

    Returns ``out`` or ``(out, lse)``; ``out`` is an array [T, H, D] or an ``Fp8Array``.

    Edge cases, equal in every implementation:
      * lse = -inf or +inf means that a side is empty: the other side comes out bit for bit.
      * both empty: out = 0, lse = -inf.
      * a side of weight 0 (below 2^-126) contributes exactly 0, even if its output holds NaN or inf.
      * a NaN lse gives a NaN row and a NaN lse; a NaN element stays where it is.
      * tokens past ``prefill_tokens_with_context``: the suffix output bit for bit, whatever its lse; +inf becomes -inf.
      * T = 0 or H = 0: empty results.
      * NaN becomes FP8 code 0x7F; values beyond the range saturate.

    Under jit nothing that is traced causes a retrace. vmap folds into the token axis: every instance has its own
    context count, its own scale, and its own padding of the scale buffer. No derivative.
    """
    op = "merge_attn_states"
    options = Options(output_quant, output_scale, lse_layout, lse_base, return_lse, out_dtype, in_place)
    outputs = {"prefix_output": prefix_output, "suffix_output": suffix_output}
    lses = {"prefix_lse": prefix_lse, "suffix_lse": suffix_lse}
    problem, arrays = _problem(op, outputs, lses, options, prefill_tokens_with_context)
    return dispatch.call(OP, problem, arrays, implementation)


def merge_attn_states_n(
    outputs: jax.Array,
    lses: jax.Array,
    *,
    output_quant: Fp8Spec | None = None,
    output_scale: float | jax.Array | None = None,
    lse_layout: Literal["HT", "TH"] = "HT",
    lse_base: Literal["e", "2"] = "e",
    return_lse: bool = False,
    out_dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """Merges N attention results in one pass: context chunks, split keys, or the ranks of a decode context group.

    outputs  [N, T, H, D] bf16, f16 or f32, N >= 1
    lses     float32 [N, H, T] (lse_layout="TH": [N, T, H])

    Everything else as in ``merge_attn_states``: states with lse = +-inf are empty, all empty gives out = 0 and
    lse = -inf, and a state of weight 0 contributes exactly 0.
    """
    options = Options(output_quant, output_scale, lse_layout, lse_base, return_lse, out_dtype)
    problem, arrays = _problem("merge_attn_states_n", {"outputs": outputs}, {"lses": lses}, options, None)
    return dispatch.call(OP, problem, arrays, implementation)


def mask_empty_context_lse(lse: jax.Array, query_start_loc: jax.Array, context_start_loc: jax.Array) -> jax.Array:
    """Sets lse to -inf for the tokens of requests without context, whatever an attention backend wrote there.

    lse                float32 [H, T]
    query_start_loc    int32 [B+1]: request b owns the tokens query_start_loc[b] to query_start_loc[b+1]
    context_start_loc  int32 [B+1]: its context keys; equal neighbours mean no context

    Tokens of no request keep their lse. Offsets are clamped to 0..T (context: to 0 and above), and a decreasing one
    counts as the largest before it, as in ``mla_prefill``.
    """
    op = "mask_empty_context_lse"
    lse = checks.array(op, "lse", lse, ("H", "T"), [jnp.float32])
    query = checks.array(op, "query_start_loc", query_start_loc, ("B+1",), [jnp.int32])
    context = checks.array(op, "context_start_loc", context_start_loc, query.shape, [jnp.int32])
    if not query.shape[0]:
        raise checks.invalid(op, "query_start_loc", "int32[0]", "int32 [B+1]", "No request at all is [0].")
    return _mask_empty_context_lse(lse, query, context)


@jax.jit
def _mask_empty_context_lse(lse: jax.Array, query: jax.Array, context: jax.Array) -> jax.Array:
    request = offsets.owner(*offsets.ranges(query, lse.shape[1]), lse.shape[1])
    _, context_length = offsets.ranges(context, np.iinfo(np.int32).max)
    # one more, never empty: tokens of no request (-1) read it
    empty = jnp.append(context_length == 0, False)
    return jnp.where(empty[request], -jnp.inf, lse)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that both forms share, as given."""

    output_quant: Any
    output_scale: Any
    lse_layout: Any
    lse_base: Any
    return_lse: Any
    out_dtype: Any
    in_place: Any = False


def _problem(
    op: str, outputs: dict[str, Any], lses: dict[str, Any], options: Options, count: Any
) -> tuple[MergeProblem, MergeArrays]:
    """Checks every static fact; the first output decides shape and dtype. A single one holds all states, stacked."""
    first, *others = outputs
    stacked = not others
    pattern = checks.array(op, first, outputs[first], [*"NTHD"] if stacked else [*"THD"], FLOATS)
    *stack, tokens, heads, width = pattern.shape
    dtype = jnp.dtype(pattern.dtype)
    if stack == [0]:
        raise checks.invalid(op, first, checks.describe(pattern), "at least one state: N >= 1")
    alike = f"Both must be alike; {first} is the pattern."
    states = [pattern, *(checks.array(op, name, outputs[name], pattern.shape, [dtype], alike) for name in others)]

    checks.option(op, "lse_layout", options.lse_layout, ("HT", "TH"))
    checks.option(op, "lse_base", options.lse_base, ("e", "2"))
    checks.flag(op, "return_lse", options.return_lse)
    sizes = {"H": heads, "T": tokens}
    lse_list = [_lse(op, name, lse, options.lse_layout, stack, sizes) for name, lse in lses.items()]
    quant, scale = _output_quant(op, options, width)
    out_dtype = dtype if options.out_dtype is None else checks.float_dtype(op, "out_dtype", options.out_dtype)
    checks.flag(op, "in_place", options.in_place)
    if options.in_place and (quant is not None or out_dtype != dtype):
        what = "with output_quant" if quant is not None else f"with {out_dtype} from {dtype}"
        raise checks.invalid(op, "in_place", f"True {what}", "False, or the input's own type as output type")

    problem = MergeProblem(
        states=stack[0] if stacked else len(states),
        tokens=tokens,
        heads=heads,
        width=width,
        dtype=dtype,
        out_dtype=out_dtype,
        output_quant=quant and quant.static(),
        return_lse=bool(options.return_lse),
        lse_layout=options.lse_layout,
        lse_base=options.lse_base,
        context_count=count is not None,
        stacked=stacked,
        in_place=bool(options.in_place),
    )
    count = _context_count(op, count, tokens)
    if stacked:
        return problem, MergeArrays(states[0], lse_list[0], count, scale)
    return problem, MergeArrays(tuple(states), tuple(lse_list), count, scale)


def _lse(op: str, name: str, lse: Any, layout: str, stack: list[int], sizes: dict[str, int]) -> jax.Array:
    shape, other = ((*stack, *(sizes[axis] for axis in axes)) for axes in (layout, layout[::-1]))
    remedy = ""
    if getattr(lse, "shape", None) == other != shape:
        remedy = f"It looks like [{', '.join(layout[::-1])}]: pass lse_layout={layout[::-1]!r}."
    return checks.array(op, name, lse, shape, [jnp.float32], remedy)


def _output_quant(op: str, options: Options, width: int) -> tuple[Fp8Spec | None, jax.Array | None]:
    """The spec, and the scale of a per-tensor one as float32 [1]."""
    quant = options.output_quant
    if options.output_scale is not None:
        if quant is not None:
            raise checks.invalid(op, "output_scale", "given together with output_quant", "one of the two")
        quant = Fp8PerTensor(checks.scalar(op, "output_scale", options.output_scale))
    if quant is None:
        return None, None
    check_spec(op, "output_quant", quant, width)
    if options.out_dtype is not None:
        raise checks.invalid(op, "out_dtype", repr(options.out_dtype), "None beside output_quant")
    return quant, jnp.asarray(quant.scale, jnp.float32).reshape(1) if isinstance(quant, Fp8PerTensor) else None


def _context_count(op: str, count: Any, tokens: int) -> jax.Array | None:
    """A count on the host is checked; one outside 0..T on the device is harmless, because it is only compared."""
    name = "prefill_tokens_with_context"
    if count is None:
        return None
    one = checks.is_array(count) and count.size == 1 and jnp.issubdtype(count.dtype, jnp.integer)
    if isinstance(count, bool) or not (one or isinstance(count, int)):
        raise checks.invalid(op, name, checks.describe(count), "an int or a one-element integer array")
    if isinstance(count, int | np.ndarray | np.generic):
        count = int(np.reshape(count, ()))
        if not 0 <= count <= tokens:
            raise checks.invalid(op, name, count, f"0 to T = {tokens}")
        return jnp.full(1, count, jnp.int32)
    if count.dtype != jnp.int32:
        count = jnp.clip(count, 0, min(tokens, jnp.iinfo(count.dtype).max))
    return count.astype(jnp.int32).reshape(1)


def _prepare(problem: MergeProblem, arrays: MergeArrays) -> MergeArrays:
    return arrays


def _fold(
    problem: MergeProblem, arrays: MergeArrays, size: int, batched: MergeArrays
) -> tuple[MergeProblem, MergeArrays, Callable[[Any], Any]]:
    """``size`` calls as one: instance i owns the tokens i*T to (i+1)*T, its own count and its own scale."""
    arrays = broadcast_instances(arrays, batched, size)
    stack = 1 if problem.stacked else 0
    token_axis = 1 if problem.lse_layout == "HT" else 0

    def fold_axis(x: jax.Array, axis: int) -> jax.Array:
        return merge_axes(jnp.moveaxis(x, 0, axis), axis)

    folded = MergeArrays(
        outputs=jax.tree.map(lambda x: fold_axis(x, stack), arrays.outputs),
        lses=jax.tree.map(lambda x: fold_axis(x, stack + token_axis), arrays.lses),
        context_count=None if arrays.context_count is None else arrays.context_count.reshape(-1),
        output_scale=None if arrays.output_scale is None else arrays.output_scale.reshape(-1),
    )

    def unfold(result: Any) -> Any:
        out, lse = result if problem.return_lse else (result, None)
        out = unfold_tokens(out, size)
        if lse is None:
            return out
        return out, unfold_axis(lse, token_axis, size)

    return (
        dataclasses.replace(problem, tokens=size * problem.tokens, instances=size * problem.instances),
        folded,
        unfold,
    )


def _heads(problem: MergeProblem) -> Heads:
    lse = problem.lse_layout.index("H")
    arrays = MergeArrays(outputs=problem.stacked + 1, lses=problem.stacked + lse, context_count=ALL, output_scale=ALL)
    return Heads(("heads",), arrays, (*output_axes(problem.output_quant), *[lse] * problem.return_lse))


OP = dispatch.Op("merge_attn_states", _prepare, _fold, heads=_heads)
