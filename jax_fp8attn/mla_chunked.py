"""``mla_prefill_chunked``: prefill over a cached context of any length, through a workspace of fixed size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn import checks, dispatch
from jax_fp8attn.mla_prefill import Scalar, mla_prefill
from jax_fp8attn.problems import Output
from jax_fp8attn.quantize import Fp8Spec

Keys = jax.Array | tuple[jax.Array, jax.Array]
LoadContext = Callable[[jax.Array, jax.Array], tuple[Keys, jax.Array]]


def mla_prefill_chunked(
    q: jax.Array,
    k: Keys,
    v: jax.Array,
    load_context: LoadContext,
    *,
    cu_seqlens: jax.Array,
    context_lengths: jax.Array,
    workspace_tokens: int,
    softmax_scale: Scalar = None,
    q_scale: Scalar = None,
    k_scale: Scalar = None,
    v_scale: Scalar = None,
    output_quant: Fp8Spec | None = None,
    return_lse: bool = False,
    out_dtype: Any = jnp.bfloat16,
    state_dtype: Any = jnp.float32,
    compute: Literal["fp8", "bf16"] | None = None,
    implementation: dispatch.Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """Attends the new tokens of every request to its cached context and, causally, to themselves.

    q, k, v           the new tokens, packed, as in ``mla_prefill``: [T, H, 192], [T, H, 192] or the pair, [T, H, 128]
    load_context      load_context(request, position) -> (k, v) of cached tokens: int32 [W] each, the request
                      (0..B-1) and the position in its context (0..context_lengths-1); returns k ([W, H, 192] or
                      the pair) and v [W, H, 128] in any operand dtype. Slots past the end of all contexts repeat
                      request 0, position 0; what is loaded for them is not used. ``paged_latent_loader`` makes one
                      from a paged latent cache.
    cu_seqlens        int32 [B+1], traced: offsets of the requests in q
    context_lengths   int32 [B], traced; 0: no context
    workspace_tokens  W, static: context tokens that are expanded to keys and values at a time
    output_quant, return_lse, out_dtype, scales, compute, implementation    as in ``mla_prefill``
    state_dtype       dtype of the running partial result between chunks

    The contexts of all requests stand one after the other and are cut every W tokens, so that no chunk is empty:
    ceil(sum of context_lengths / W) passes, a number that is traced. Every pass merges the running result in its
    epilogue; the causal pass over the new tokens comes last and writes the quantised output. No merge kernel runs.

    Returns ``out`` or ``(out, lse)`` as ``mla_prefill`` does.
    """
    op = "mla_prefill_chunked"
    cu_seqlens = checks.array(op, "cu_seqlens", cu_seqlens, ("B+1",), [jnp.int32])
    requests = cu_seqlens.shape[0] - 1
    context_lengths = checks.array(op, "context_lengths", context_lengths, (max(requests, 0),), [jnp.int32])
    if not isinstance(workspace_tokens, int) or isinstance(workspace_tokens, bool) or workspace_tokens < 1:
        raise checks.invalid(op, "workspace_tokens", repr(workspace_tokens), "a positive int, known while tracing")
    if not checks.is_array(q) or q.ndim != 3:
        raise checks.invalid(op, "q", checks.describe(q), "packed tokens [T, H, 192]")
    common = {
        "softmax_scale": softmax_scale, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale,
        "compute": compute, "implementation": implementation,
    }  # fmt: skip
    tokens, heads = q.shape[:2]
    lengths = jnp.maximum(context_lengths, 0)
    end = jnp.cumsum(lengths)  # [B] where each request's context ends in the concatenation
    start = end - lengths
    slot = jnp.arange(workspace_tokens, dtype=jnp.int32)

    def attend(chunk: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position = chunk * workspace_tokens + slot
        request = jnp.searchsorted(end, position, side="right").astype(jnp.int32)
        used = request < requests
        request = jnp.where(used, request, 0)
        context_k, context_v = load_context(request, jnp.where(used, position - start[request], 0))
        ends = jnp.clip(end - chunk * workspace_tokens, 0, workspace_tokens)
        return mla_prefill(
            q, context_k, context_v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=jnp.append(0, ends).astype(jnp.int32),
            causal=False, initial_state=state, return_lse=True, out_dtype=state_dtype, **common,
        )  # fmt: skip

    state = None
    if requests > 0:
        empty = jnp.zeros((tokens, heads, 128), state_dtype), jnp.full((heads, tokens), -jnp.inf, jnp.float32)
        state = lax.fori_loop(0, -(-end[-1] // workspace_tokens), attend, empty)
    return mla_prefill(
        q, k, v, cu_seqlens_q=cu_seqlens, causal=True, initial_state=state, output_quant=output_quant,
        return_lse=return_lse, out_dtype=out_dtype, **common,
    )  # fmt: skip


def paged_latent_loader(cache: jax.Array, block_tables: jax.Array, kv_b_proj: jax.Array) -> LoadContext:
    """A ``load_context`` that reads a paged latent cache and expands it to keys and values.

    cache         [blocks, block_size, L + 64]: the normalised latent (L = 512 in DeepSeek) and the rotated rope key
    block_tables  int32 [B, max_blocks]: the block that holds positions block_size*i and on of request b. Indices out
                  of range are clamped; only blocks of existing context are used.
    kv_b_proj     [L, H, 256]: the up-projection to (k_nope 128 | v 128)
    """
    op = "paged_latent_loader"
    cache = checks.array(op, "cache", cache, ("blocks", "block_size", "L+64"), [jnp.bfloat16, jnp.float16, jnp.float32])
    block_tables = checks.array(op, "block_tables", block_tables, ("B", "max_blocks"), [jnp.int32])
    latent = cache.shape[-1] - 64
    kv_b_proj = checks.array(op, "kv_b_proj", kv_b_proj, (latent, "H", 256), [cache.dtype], "It has the cache's dtype.")
    block_size = cache.shape[1]

    def load(request: jax.Array, position: jax.Array) -> tuple[Keys, jax.Array]:
        column = jnp.clip(position // block_size, 0, block_tables.shape[1] - 1)
        block = jnp.clip(block_tables[request, column], 0, cache.shape[0] - 1)
        rows = cache[block, position % block_size]  # [W, L+64]
        kv = jnp.einsum("wl,lhd->whd", rows[:, :latent], kv_b_proj, preferred_element_type=jnp.float32)
        kv = kv.astype(cache.dtype)
        return (kv[..., :128], rows[:, latent:]), kv[..., 128:]

    return load
