"""``mla_prefill`` by AITER's FP8 kernel for AMD's gfx950: operands and plan in JAX, one launch, the merge in JAX.

The kernel gets numbers alone: a NaN code of q, k or v becomes 0, and the rows that see it are found beside the kernel.
What q, k and the softmax are scaled with goes into one number that is positive, its sign into q. The kernel's softmax
scale is a part of the launch and would make a program of its own; it is 1.

Outputs in bf16 without lse come from the kernel directly where it computes a tile in one piece. Everything else, and
all pieces, are float32 partial tiles that are merged here, in an order that does not change from run to run.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax_fp8attn.custom_calls.common import aiter_code_object, aiter_library, aiter_plan
from jax_fp8attn.custom_calls.common.aiter_code_object import ARCHITECTURE, CodeObject, CodeObjectError
from jax_fp8attn.custom_calls.common.aiter_library import LibraryError
from jax_fp8attn.custom_calls.common.aiter_plan import TILE, Ranges

from jax_fp8attn.dispatch import Device
from jax_fp8attn.errors import UnsupportedError
from jax_fp8attn.folding import as_varying, merge_axes
from jax_fp8attn.offsets import owner
from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import E4M3, quantize_output, to_stored

WIDTH, VALUES = 192, 128
BLOCK = 128  # keys that are looked through for NaN at once
NEVER = np.iinfo(np.int32).max
TINY = 2.0**-126  # the smallest normal float32: what lies below may have been flushed to zero


def supports(problem: MlaProblem, device: Device) -> tuple[str, ...]:
    return (*missing(device, (problem.causal,)), *_problem_reasons(problem))


def missing(device: Device, kernels: tuple[bool, ...] = (True, False)) -> tuple[str, ...]:
    """What no call can do without and is not here, with the remedy. Loads nothing."""
    reasons = []
    if device.platform == "rocm" and device.architecture != ARCHITECTURE:
        name = device.architecture or device.kind
        return (f"needs {ARCHITECTURE} (MI350X, MI355X), the device is {name}: AITER has no such kernel for it",)
    if device.platform != "rocm":
        reasons.append(
            f"needs {ARCHITECTURE} (MI350X, MI355X) and jax's ROCm plugin (jax-rocm7-plugin, jax-rocm7-pjrt)"
        )
    try:
        aiter_library.find()
    except LibraryError as error:
        reasons.append(str(error))
    for causal in kernels:
        try:
            aiter_code_object.find(causal)
        except CodeObjectError as error:
            if str(error) not in reasons:
                reasons.append(str(error))
    return tuple(reasons)


def _problem_reasons(problem: MlaProblem) -> tuple[str, ...]:
    if problem.compute != "fp8":
        return (f"computes in FP8, the call asks for {problem.compute} (compute, JAX_FP8ATTN_FP8_PREFILL)",)
    one = _one_instance(problem)
    if one.heads and not _head_groups(one):
        return (_limit(one, 1),)
    return ()


def notes(problem: MlaProblem) -> tuple[str, ...]:
    """What ``explain`` says of a call."""
    found = ["never run on hardware: verified against an interpreter of the kernel"]
    if _all_partial(problem):
        found.append("every tile in float32 parts, merged in JAX")
    if (launches := len(_head_groups(_one_instance(problem)) or ())) > 1:
        found.append(f"{launches} launches, each for a part of the heads")
    if problem.instances > 1:
        found.append(f"{problem.instances} calls under vmap one after the other: a launch has one scale")
    return tuple(found)


def _one_instance(problem: MlaProblem) -> MlaProblem:
    counts = {name: getattr(problem, name) // problem.instances for name in ("tokens", "keys", "sequences")}
    return dataclasses.replace(problem, **counts, instances=1)


def _all_partial(problem: MlaProblem) -> bool:
    """The kernel writes its own outputs in bf16 and without lse."""
    in_bf16 = problem.output_quant is None and problem.out_dtype == jnp.bfloat16
    return problem.return_lse or problem.state_dtype is not None or not in_bf16


def _shape(problem: MlaProblem, heads: int) -> aiter_plan.Shape:
    return aiter_plan.Shape(problem.tokens, problem.sequences, heads, problem.causal, _all_partial(problem))


def _limit(problem: MlaProblem, heads: int) -> str:
    """Which limit of the kernel's 32-bit offsets a launch for so many heads breaks; empty: none."""
    shape = _shape(problem, heads)
    limits = {
        "an output of 2^32 bytes": problem.tokens * heads * VALUES * 2 >= 1 << 32,
        "keys of 2^32 bytes": problem.keys * heads * WIDTH >= 1 << 32,
        "2^24 keys": problem.keys >= 1 << 24,
        "partial results of more than 2^31 bytes": shape.partials * TILE * heads * VALUES * 4 > 1 << 31,
        "2^31 units of work": shape.tiles * -(-problem.keys // aiter_plan.UNIT) >= 1 << 31,
        "2^32 bytes of work records": heads * shape.segments * aiter_plan.RECORD * 4 >= 1 << 32,
    }
    return next(
        (f"one head alone would have {what}, beyond the kernel's offsets" for what in limits if limits[what]), ""
    )


@functools.lru_cache(maxsize=64)
def _head_groups(problem: MlaProblem) -> tuple[int, ...]:
    """How many heads each launch computes, as few launches as the limits allow; none if one head is too much."""
    for launches in range(1, problem.heads + 1):
        few, more = divmod(problem.heads, launches)
        groups = (few + 1,) * more + (few,) * (launches - more)
        if not any(_limit(problem, heads) for heads in set(groups)):
            return groups
    return ()


def prepare(causal: bool) -> CodeObject:
    """Loads the host library, registers its calls with jax and gives it the kernel. A process that runs an exported
    program, and traces none, calls this itself."""
    try:
        code_object = aiter_code_object.find(causal)
        aiter_library.add(aiter_library.load(aiter_library.find()), code_object)
    except (CodeObjectError, LibraryError) as error:
        raise UnsupportedError("mla_prefill: 'aiter' cannot be prepared:", {"aiter": (str(error),)}) from None
    return code_object


@jax.enable_x64(False)
def run(problem: MlaProblem, arrays: MlaArrays) -> Any:
    if problem.tokens and problem.keys and problem.sequences and problem.heads:
        out, lse = _instances(problem, prepare(problem.causal), arrays)
    else:
        out = jnp.zeros((problem.tokens, problem.heads, VALUES), jnp.float32)
        lse = jnp.full((problem.tokens, problem.heads), -jnp.inf)
    if problem.state_dtype is not None:
        out, lse = _merge_state(problem, arrays, out, lse)
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, lse.T) if problem.return_lse else out


def _instances(problem: MlaProblem, code_object: CodeObject, arrays: MlaArrays) -> tuple[jax.Array, jax.Array]:
    """Calls under vmap have scales of their own, and a launch has one: out [T, H, 128] and lse [T, H]."""
    arrays = arrays._replace(initial_out=None, initial_lse=None, output_scale=None)
    one, n = _one_instance(problem), problem.instances
    attend = functools.partial(_attend, one, code_object)
    if n == 1:
        return attend(arrays)
    split = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), arrays)
    number = jnp.arange(n, dtype=jnp.int32)[:, None]
    split = split._replace(q_start=split.q_start - number * one.tokens, k_start=split.k_start - number * one.keys)
    return jax.tree.map(lambda x: merge_axes(x, 0), lax.map(attend, split))


class _Operands(NamedTuple):
    """Operands without NaN, and what the kernel multiplies with."""

    q: jax.Array  # e4m3 [T, H, 192]
    k: jax.Array  # e4m3 [S, H, 192]
    v: jax.Array  # e4m3 [S, H, 128]
    logit_scale: jax.Array  # float32 [1], positive
    v_scale: jax.Array

    def heads(self, first: int, count: int) -> _Operands:
        q, k, v = (lax.slice_in_dim(x, first, first + count, axis=1) for x in self[:3])
        return self._replace(q=q, k=k, v=v)


def _attend(problem: MlaProblem, code_object: CodeObject, arrays: MlaArrays) -> tuple[jax.Array, jax.Array]:
    """out [T, H, 128], float32 or the kernel's own bf16, and lse [T, H]."""
    ranges = Ranges(arrays.q_start, arrays.q_length, arrays.k_start, arrays.k_length)
    sequence = owner(ranges.q_start, ranges.q_length, problem.tokens)
    operands, nan = _load(arrays)
    parts, first = [], 0
    for heads in _head_groups(problem):
        shape = _shape(problem, heads)
        plan = aiter_plan.build(shape, ranges)
        results = _call(shape, code_object, ranges, plan, operands.heads(first, heads))
        places = aiter_plan.token_places(shape, ranges, sequence)
        parts.append(_merge(shape, plan, places, *as_varying(tuple(results), arrays)))
        first += heads
    out, lse = (jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*parts, strict=True))
    visible, nan_row, nan_value = _reach(problem, ranges, sequence, nan)
    some = (visible > 0)[:, None]
    out = jnp.where(nan_row[..., None] | nan_value, jnp.nan, out)
    return jnp.where(some[..., None], out, 0.0), jnp.where(some, jnp.where(nan_row, jnp.nan, lse), -jnp.inf)


class _Nan(NamedTuple):
    """Where the operands and their scale are no numbers."""

    q: jax.Array  # bool [T, H]
    k: jax.Array  # bool [S, H]
    v: jax.Array  # bool [S, H, 128]
    scale: jax.Array  # bool [1]


def _load(arrays: MlaArrays) -> tuple[_Operands, _Nan]:
    stored_k = to_stored(arrays.k, arrays.k_scale[0])
    if arrays.k_rope is not None:
        rope = to_stored(arrays.k_rope, arrays.k_scale[0])[:, None]
        stored_k = jnp.concatenate([stored_k, jnp.broadcast_to(rope, (*stored_k.shape[:2], rope.shape[-1]))], axis=-1)
    codes = [to_stored(arrays.q, arrays.q_scale[0]), stored_k, to_stored(arrays.v, arrays.v_scale[0])]
    codes = [lax.bitcast_convert_type(x, jnp.uint8) for x in codes]
    nan = [x & 0x7F == 0x7F for x in codes]
    q, k, v = (jnp.where(bad, jnp.uint8(0), x) for bad, x in zip(nan, codes, strict=True))
    scale = arrays.q_scale * arrays.k_scale * arrays.softmax_scale
    usual = jnp.isfinite(scale) & (jnp.abs(scale) >= TINY)
    # with a scale of 0, as the GPU sees it, all scores are 0, and so they are with queries of 0
    q = jnp.where(usual, jnp.where(scale < 0, q ^ 0x80, q), jnp.uint8(0))
    q, k, v = (lax.bitcast_convert_type(x, E4M3) for x in (q, k, v))
    operands = _Operands(q, k, v, jnp.where(usual, jnp.abs(scale), 1.0), arrays.v_scale)
    return operands, _Nan(jnp.any(nan[0], axis=-1), jnp.any(nan[1], axis=-1), nan[2], ~jnp.isfinite(scale))


def _reach(
    problem: MlaProblem, ranges: Ranges, sequence: jax.Array, nan: _Nan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every token: how many keys it sees [T], whether NaN is in its scores [T, H] and in its values [T, H, 128]."""
    inside = jnp.maximum(sequence, 0)
    visible = keys = ranges.k_length[inside]
    if problem.causal:
        local = jnp.arange(problem.tokens, dtype=jnp.int32) - ranges.q_start[inside]
        visible = jnp.clip(local + 1 + keys - ranges.q_length[inside], 0, keys)
    visible = jnp.where(sequence >= 0, visible, 0)
    first_k, first_v = (_first_nan(bad, ranges.k_start)[inside] for bad in (nan.k, nan.v))
    nan_row = nan.q | nan.scale | (first_k < visible[:, None])
    return visible, nan_row, first_v < visible[:, None, None]


def _first_nan(bad: jax.Array, start: jax.Array) -> jax.Array:
    """The first key with NaN at or behind the start of each sequence, counted from there: bad [S, ...] to [B, ...]."""
    keys, rest = bad.shape[0], (1,) * (bad.ndim - 1)
    number = jnp.arange(keys, dtype=jnp.int32).reshape(-1, *rest)
    where = jnp.where(bad, number, NEVER)
    room = -(-keys // BLOCK) * BLOCK
    where = jnp.pad(where, [(0, room - keys)] + [(0, 0)] * len(rest), constant_values=NEVER)
    blocks = jnp.min(where.reshape(-1, BLOCK, *bad.shape[1:]), axis=1)
    later = lax.cummin(jnp.concatenate([blocks, jnp.full_like(blocks[:1], NEVER)]), axis=0, reverse=True)
    block = jnp.minimum(start, keys - 1) // BLOCK
    own = where[block[:, None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)]  # [B, BLOCK, ...]
    start = start.reshape(-1, *rest)
    own = jnp.min(jnp.where(own >= start[:, None], own, NEVER), axis=1)
    found = jnp.minimum(own, later[block + 1])
    return jnp.where(found == NEVER, NEVER, found - start)


def _call(
    shape: aiter_plan.Shape, code_object: CodeObject, ranges: Ranges, plan: aiter_plan.Plan, operands: _Operands
) -> list[jax.Array]:
    """The kernel: out [T, H, 128] of whole tiles, partial outputs [P * 256, H, 128] and their lse [P * 256, H]."""
    rows = shape.partials * TILE
    call = jax.ffi.ffi_call(
        aiter_library.TARGET,
        [
            jax.ShapeDtypeStruct((shape.tokens, shape.heads, VALUES), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, shape.heads, VALUES), jnp.float32),
            jax.ShapeDtypeStruct((rows, shape.heads), jnp.float32),
        ],
    )
    indptrs = [
        jnp.concatenate([start, start[-1:] + length[-1:]])
        for start, length in ((ranges.q_start, ranges.q_length), (ranges.k_start, ranges.k_length))
    ]
    pages = jnp.arange(operands.k.shape[0], dtype=jnp.int32)  # keys lie in order
    one = jnp.ones(1, jnp.float32)
    return call(
        *operands[:3], *indptrs, pages, plan.work_indptr, plan.work, operands.logit_scale, one, operands.v_scale,
        code_object=code_object.sha256, symbol=code_object.symbol,
    )  # fmt: skip


def _merge(
    shape: aiter_plan.Shape,
    plan: aiter_plan.Plan,
    places: tuple[jax.Array, jax.Array],
    out: jax.Array,
    partial: jax.Array,
    lse: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Partial tiles into rows, out [T, H, 128] and lse [T, H], by the tile and row of each token. A token that sees no
    key gets anything."""
    tile, row = places
    partial = partial.reshape(shape.partials, TILE, shape.heads, VALUES)
    share, tile_lse = _shares(shape, plan, lse.reshape(shape.partials, TILE, shape.heads))
    first = jnp.minimum(plan.first_partial[tile], shape.partials - 1)
    merged = _weighted(share[first, row], partial[first, row])  # [T, H, 128]
    if shape.extras:
        sums, sum_of_tile = _extra_sums(shape, plan, share, partial)
        several = (plan.partials_of[tile] > 1)[:, None, None]
        merged = merged + jnp.where(several, sums[jnp.where(several[:, 0, 0], sum_of_tile[tile], 0), row], 0.0)
    if shape.all_partial:
        return merged, tile_lse[tile, row]
    in_parts = (plan.partials_of[tile] > 0)[:, None, None]
    return jnp.where(in_parts, merged.astype(out.dtype), out), tile_lse[tile, row]


def _weighted(share: jax.Array, values: jax.Array) -> jax.Array:
    """Nothing where the share is 0, whatever the memory holds."""
    share = share[..., None]
    return jnp.where(share < TINY, 0.0, share * values)


def _shares(shape: aiter_plan.Shape, plan: aiter_plan.Plan, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each partial tile weighs in its tile [P, 256, H], and the lse of the tiles [tiles, 256, H]."""
    tile = plan.tile_of_partial
    safe = jnp.minimum(tile, shape.tiles - 1)
    used = (tile < shape.tiles)[:, None] & (jnp.arange(TILE, dtype=jnp.int32) < plan.rows[safe][:, None])
    lse = jnp.where(used[..., None], lse, -jnp.inf)
    top = jax.ops.segment_max(lse, tile, shape.tiles)
    anchor = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = jnp.exp(lse - anchor[safe])
    members = (tile == jnp.arange(shape.tiles, dtype=jnp.int32)[:, None]).astype(jnp.float32)  # [tiles, P]
    # a product adds in a fixed order, a scatter does not
    total = jnp.einsum("np,prh->nrh", members, weight, precision=lax.Precision.HIGHEST)
    empty = total == 0
    return weight / jnp.where(empty, 1.0, total)[safe], jnp.where(empty, -jnp.inf, jnp.log(total) + anchor)


def _extra_sums(
    shape: aiter_plan.Shape, plan: aiter_plan.Plan, share: jax.Array, partial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of the partial tiles that are not the first of theirs [extras, 256, H, 128], and where that of a
    tile stands [tiles]. There are few of them, and the sum of a tile stands where its first one does."""
    slot = jnp.arange(shape.partials, dtype=jnp.int32)
    tile = plan.tile_of_partial
    extra = (tile < shape.tiles) & (slot > plan.first_partial[jnp.minimum(tile, shape.tiles - 1)])
    place = jnp.cumsum(extra, dtype=jnp.int32) - 1
    of_extra = jnp.full(shape.extras, shape.partials, jnp.int32)
    of_extra = of_extra.at[jnp.where(extra, place, shape.extras)].set(slot, mode="drop")
    used = of_extra < shape.partials
    chosen = jnp.minimum(of_extra, shape.partials - 1)
    share = jnp.where(used[:, None, None], share[chosen], 0.0)
    weighted = _weighted(share, partial[chosen])
    belongs = jnp.where(used, tile[chosen], -1)
    together = (belongs[:, None] == belongs).astype(jnp.float32)
    sums = jnp.einsum("ij,jrhd->irhd", together, weighted, precision=lax.Precision.HIGHEST)
    extras_of = jnp.maximum(plan.partials_of - 1, 0)
    return sums, jnp.clip(jnp.cumsum(extras_of, dtype=jnp.int32) - extras_of, 0, shape.extras - 1)


def _merge_state(problem: MlaProblem, arrays: MlaArrays, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows of no sequence take nothing from the state; an empty side adds nothing, whatever it holds."""
    inside = (owner(arrays.q_start, arrays.q_length, problem.tokens) >= 0)[:, None]
    state_lse = arrays.initial_lse.T
    state_lse = jnp.where(inside & ~jnp.isposinf(state_lse), state_lse, -jnp.inf)
    top = jnp.maximum(state_lse, lse)
    empty = jnp.isneginf(top)
    anchor = jnp.where(empty, 0.0, top)
    weights = [jnp.exp(x - anchor) for x in (state_lse, lse)]
    total = jnp.where(empty, 1.0, weights[0] + weights[1])
    state, own = (
        _weighted(weight / total, x.astype(jnp.float32))
        for weight, x in zip(weights, (arrays.initial_out, out), strict=True)
    )
    return state + own, jnp.where(empty, -jnp.inf, jnp.log(total) + anchor)
