"""The gated delta net on torch tensors; a pool of states is updated where it lies."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import torch

import jax_fp8attn as fp8attn
from jax_fp8attn import checks
from jax_fp8attn.gdn_prefill import GdnMetadata
from jax_fp8attn.offsets import ranges
from jax_fp8attn.problems import gdn_max_chunks
from jax_fp8attn.torch.library import Op, Options, register, text
from jax_fp8attn.torch.ops import Implementation, Scalar

StateLayout = Literal["vk", "kv"]
Transition = tuple[torch.Tensor, torch.Tensor]

_METADATA = ("metadata.start", "metadata.length", "metadata.chunk_sequence", "metadata.chunk_index")


def _parts(metadata: GdnMetadata | None) -> tuple[list[Any], int, int]:
    """A GdnMetadata of tensors as arguments and static numbers."""
    if metadata is None:
        return [None] * 4, 0, 0
    parts = [metadata.start, metadata.length, metadata.chunk_sequence, metadata.chunk_index]
    return parts, metadata.total_tokens, metadata.num_state_heads


def _metadata(options: Options, parts: Any) -> GdnMetadata | None:
    static = options.pop("total_tokens"), options.pop("num_state_heads")
    return None if parts[0] is None else GdnMetadata(*parts, *static)


def gdn_metadata(cu_seqlens: torch.Tensor, total_tokens: int, num_state_heads: int) -> GdnMetadata:
    """``jax_fp8attn.gdn_metadata`` of a tensor: a ``GdnMetadata`` of tensors."""
    options = text(total_tokens=total_tokens, num_state_heads=num_state_heads)
    return GdnMetadata(*_GDN_METADATA([cu_seqlens], options), total_tokens, num_state_heads)


def _fake_metadata(options: Options, cu_seqlens: torch.Tensor) -> list[torch.Tensor]:
    sequences = cu_seqlens.shape[0] - 1
    chunks = gdn_max_chunks(options["total_tokens"], sequences)
    return [cu_seqlens.new_empty((size,)) for size in (sequences, sequences, chunks, chunks)]


_GDN_METADATA = register(
    Op(
        "gdn_metadata",
        ("cu_seqlens",),
        lambda options, cu_seqlens: fp8attn.gdn_metadata(cu_seqlens, **options),
        _fake_metadata,
    )
)


def gdn_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = True,
    scale: Scalar = None,
    gate: Literal["log", "alpha"] = "log",
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    state_layout: StateLayout = "vk",
    checkpoint_every: int = 0,
    precision: Literal["default", "high"] = "default",
    segments: Literal["auto"] | int = "auto",
    metadata: GdnMetadata | None = None,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = None,
) -> Any:
    """``jax_fp8attn.gdn_prefill`` on tensors. No derivative: gradients do not cross to JAX."""
    parts, total_tokens, num_state_heads = _parts(metadata)
    options = text(
        return_final_state=return_final_state, gate=gate, qk_l2norm=qk_l2norm, l2norm_eps=l2norm_eps,
        state_layout=state_layout, checkpoint_every=checkpoint_every, precision=precision, segments=segments,
        out_dtype=out_dtype, implementation=implementation, total_tokens=total_tokens, num_state_heads=num_state_heads,
    )  # fmt: skip
    results = _GDN([q, k, v, g, beta, cu_seqlens, initial_state, scale, *parts], options)
    return tuple(results) if len(results) > 1 else results[0]


def _run_gdn(options: Options, *arrays: Any) -> Any:
    q, k, v, g, beta, cu_seqlens, state, scale, *parts = arrays
    metadata = _metadata(options, parts)
    return fp8attn.gdn_prefill(
        q, k, v, g, beta, cu_seqlens=cu_seqlens, initial_state=state, scale=scale, metadata=metadata, **options
    )


def _fake_gdn(options: Options, *tensors: Any) -> list[torch.Tensor]:
    _, k, v, g, _, cu_seqlens, state, _, start, *_ = tensors
    *lead, tokens, heads = g.shape
    out_dtype = getattr(torch, options["out_dtype"]) if options["out_dtype"] else v.dtype
    results = [v.new_empty((*lead, tokens, heads, v.shape[-1]), dtype=out_dtype)]
    widths = (v.shape[-1], k.shape[-1]) if options["state_layout"] == "vk" else (k.shape[-1], v.shape[-1])
    dtype = torch.float32 if state is None else state.dtype
    if options["return_final_state"]:
        sequences = _sequences(lead, cu_seqlens, start)
        results.append(v.new_empty((sequences, heads, *widths), dtype=dtype))
    if options["checkpoint_every"]:
        count = tokens // options["checkpoint_every"]
        results.append(v.new_empty((*lead, count, heads, *widths), dtype=dtype))
    return results


def _sequences(lead: list[Any], cu_seqlens: torch.Tensor | None, start: torch.Tensor | None) -> Any:
    if lead:
        return lead[0]
    if start is not None:
        return start.shape[0]
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


_GDN = register(
    Op(
        "gdn_prefill",
        ("q", "k", "v", "g", "beta", "cu_seqlens", "initial_state", "scale", *_METADATA),
        _run_gdn,
        _fake_gdn,
    )
)


def gdn_transition(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    gate: Literal["log", "alpha"] = "log",
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    precision: Literal["default", "high"] = "default",
    metadata: GdnMetadata | None = None,
    implementation: Implementation = None,
) -> Transition:
    """``jax_fp8attn.gdn_transition`` on tensors."""
    parts, total_tokens, num_state_heads = _parts(metadata)
    options = text(
        gate=gate, qk_l2norm=qk_l2norm, l2norm_eps=l2norm_eps, precision=precision, implementation=implementation,
        total_tokens=total_tokens, num_state_heads=num_state_heads,
    )  # fmt: skip
    m, n = _TRANSITION([k, v, g, beta, cu_seqlens, *parts], options)
    return m, n


def _run_transition(options: Options, *arrays: Any) -> Any:
    k, v, g, beta, cu_seqlens, *parts = arrays
    metadata = _metadata(options, parts)
    return fp8attn.gdn_transition(k, v, g, beta, cu_seqlens=cu_seqlens, metadata=metadata, **options)


def _fake_transition(options: Options, *tensors: Any) -> list[torch.Tensor]:
    k, v, g, _, cu_seqlens, start, *_ = tensors
    sequences = _sequences(list(g.shape[:-2]), cu_seqlens, start)
    lead = (sequences, g.shape[-1], k.shape[-1])
    return [k.new_empty((*lead, x.shape[-1]), dtype=torch.float32) for x in (k, v)]


_TRANSITION = register(
    Op("gdn_transition", ("k", "v", "g", "beta", "cu_seqlens", *_METADATA), _run_transition, _fake_transition)
)


def gdn_combine(a: Transition, b: Transition) -> Transition:
    """``jax_fp8attn.gdn_combine`` on tensors."""
    m, n = _COMBINE([a[0], a[1], b[0], b[1]], "")
    return m, n


def _fake_combine(options: Options, *tensors: torch.Tensor) -> list[torch.Tensor]:
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))
    first = torch.broadcast_shapes(tensors[0].shape[:-2], tensors[2].shape[:-2])
    m, n = tensors[0], tensors[1]
    return [m.new_empty((*first, *m.shape[-2:])), m.new_empty((*lead, *n.shape[-2:]))]


_COMBINE = register(
    Op(
        "gdn_combine",
        ("a[0]", "a[1]", "b[0]", "b[1]"),
        lambda options, *arrays: fp8attn.gdn_combine(arrays[:2], arrays[2:]),
        _fake_combine,
    )
)


def gdn_prefill_pool(
    qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    pool: torch.Tensor,
    slots: torch.Tensor,
    has_initial_state: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None,
    num_q_heads: int,
    num_k_heads: int,
    num_v_heads: int,
    scale: Scalar = None,
    qk_l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    state_layout: StateLayout = "vk",
    checkpoint_every: int = 0,
    checkpoint_slots: torch.Tensor | None = None,
    write_slots: torch.Tensor | None = None,
    precision: Literal["default", "high"] = "default",
    segments: Literal["auto"] | int = "auto",
    metadata: GdnMetadata | None = None,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = None,
) -> Any:
    """``jax_fp8attn.gdn_prefill_pool`` on tensors: ``pool`` is written where it lies, and may have any strides.

    PyTorch gathers the rows that sequences start from, JAX computes on those, and PyTorch scatters the new rows: the
    rest of the pool is neither read nor moved. Where no row is to be written, one that was read gets its bits again.

    Returns ``o``, or ``(o, checkpoints)`` with checkpoint_every and no checkpoint_slots.
    """
    op = "gdn_prefill_pool"
    if not isinstance(pool, torch.Tensor) or pool.ndim != 4 or not pool.shape[0]:
        raise checks.invalid(op, "pool", "no tensor [P, H, V, K] of at least one row", "the pool of states")
    if checkpoint_slots is not None and not checkpoint_every:
        raise checks.invalid(op, "checkpoint_slots", "given without checkpoint_every", "None, or both")
    for name, x in (("slots", slots), ("write_slots", write_slots), ("checkpoint_slots", checkpoint_slots)):
        if x is not None and (not isinstance(x, torch.Tensor) or x.dtype is not torch.int32):
            raise checks.invalid(op, name, "no int32 tensor", "torch.int32")
    parts, total_tokens, num_state_heads = _parts(metadata)
    options = text(
        num_q_heads=num_q_heads, num_k_heads=num_k_heads, num_v_heads=num_v_heads, qk_l2norm=qk_l2norm,
        l2norm_eps=l2norm_eps, state_layout=state_layout, checkpoint_every=checkpoint_every, precision=precision,
        segments=segments, out_dtype=out_dtype, implementation=implementation, pool_rows=pool.shape[0],
        total_tokens=total_tokens, num_state_heads=num_state_heads,
    )  # fmt: skip
    # one row more, so that there is one without any sequence
    rows = pool[torch.nn.functional.pad(slots.clamp(0, pool.shape[0] - 1), (0, 1))]
    given = [qkv, a, b, A_log, dt_bias, rows, slots, has_initial_state, cu_seqlens, write_slots, checkpoint_slots]
    o, written, targets, *checkpoints = _POOL([*given, scale, *parts], options)
    pool.index_put_((targets,), written)
    return (o, checkpoints[0]) if checkpoints else o


def _run_pool(options: Options, *arrays: Any) -> Any:
    (
        qkv, a, b, A_log, dt_bias, rows, slots, starts, cu_seqlens, write_slots, checkpoint_slots, scale, *parts,
    ) = arrays  # fmt: skip
    metadata = _metadata(options, parts)
    pool_rows = options.pop("pool_rows")
    sequences = slots.shape[0]
    known = (slots >= 0) & (slots < pool_rows)
    own = jnp.arange(sequences, dtype=jnp.int32)
    o, new, *checkpoints = fp8attn.gdn_prefill_pool(
        qkv, a, b, A_log, dt_bias, rows, own, starts.astype(bool) & known, cu_seqlens=cu_seqlens, scale=scale,
        metadata=metadata, **options,
    )  # fmt: skip
    new, targets = new[:sequences], slots if write_slots is None else write_slots
    if checkpoint_slots is not None:
        every = options["checkpoint_every"]
        length = metadata.length if metadata is not None else ranges(cu_seqlens, qkv.shape[0])[1]
        used = jnp.arange(checkpoint_slots.shape[0]) < jnp.sum(length // every)
        new = jnp.concatenate([new, checkpoints[0]])
        targets = jnp.concatenate([targets, jnp.where(used, checkpoint_slots, -1)])
        checkpoints = []
    return o, *_every_row_written(new, targets, rows[-1], pool_rows), *checkpoints


def _every_row_written(new: Any, targets: Any, first: Any, pool_rows: int) -> tuple[Any, Any]:
    """Rows without a target repeat one that has one; if there is none, pool row 0 gets the bits that it has."""
    valid = (targets >= 0) & (targets < pool_rows)
    new, targets = jnp.concatenate([new, first[None]]), jnp.append(jnp.where(valid, targets, 0), 0)
    other = jnp.where(jnp.any(valid), jnp.argmax(jnp.append(valid, False)), valid.shape[0])
    source = jnp.where(jnp.append(valid, False), jnp.arange(valid.shape[0] + 1), other)
    return new[source], targets[source].astype(jnp.int32)


def _fake_pool(options: Options, *tensors: Any) -> list[torch.Tensor]:
    qkv, a, _, _, _, rows, _, _, _, _, checkpoint_slots, *_ = tensors
    tokens, heads = a.shape
    width = rows.shape[2 if options["state_layout"] == "vk" else 3]
    out_dtype = getattr(torch, options["out_dtype"]) if options["out_dtype"] else qkv.dtype
    every = options["checkpoint_every"]
    count = tokens // every if every else 0
    written = rows.shape[0] if checkpoint_slots is None else rows.shape[0] + count
    results = [
        qkv.new_empty((tokens, heads, width), dtype=out_dtype),
        rows.new_empty((written, *rows.shape[1:])),
        rows.new_empty((written,), dtype=torch.int32),
    ]
    if every and checkpoint_slots is None:
        results.append(rows.new_empty((count, *rows.shape[1:])))
    return results


_POOL = register(
    Op(
        "gdn_prefill_pool",
        (
            *("qkv", "a", "b", "A_log", "dt_bias", "pool", "slots", "has_initial_state", "cu_seqlens"),
            *("write_slots", "checkpoint_slots", "scale", *_METADATA),
        ),
        _run_pool,
        _fake_pool,
    )
)
