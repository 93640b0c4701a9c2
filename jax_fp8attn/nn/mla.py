"""``MLAttention``: multi-head latent attention of DeepSeek-V2 and V3, prefill over a paged latent cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jax_fp8attn import checks, dispatch
from jax_fp8attn.errors import UnsupportedError
from jax_fp8attn.mla_chunked import mla_prefill_chunked, paged_latent_loader
from jax_fp8attn.mla_prefill import mla_prefill
from jax_fp8attn.nn.batch import PagedBatch, Tokens, context, packed_tokens, paged
from jax_fp8attn.nn.rope import Rope, rotate
from jax_fp8attn.quantize import Fp8Array, Fp8PerGroup

NOPE, ROPE, VALUE = 128, 64, 128


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Sizes of a layer. Heads are 128 + 64 wide for q and k and 128 for v: what ``mla_prefill`` computes.

    num_heads    heads of this layer, or of this rank
    q_lora_rank  None: queries come from one projection (DeepSeek-V2-Lite)
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    rope: Rope = dataclasses.field(default_factory=Rope)
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MLAConfig:
        """From the keys of a published config.json of DeepSeek-V2, V3, R1 or Kimi-K2."""
        widths = tuple(config[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
        if widths != (NOPE, ROPE, VALUE):
            raise UnsupportedError(f"MLAConfig: head widths {widths} (nope, rope, v); mla_prefill has (128, 64, 128).")
        if not config.get("rope_interleave", True):
            raise UnsupportedError("MLAConfig: rope_interleave is false; rope turns neighbouring pairs here.")
        return cls(
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            q_lora_rank=config.get("q_lora_rank"),
            kv_lora_rank=config["kv_lora_rank"],
            rope=Rope.from_config(config),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            attention_bias=bool(config.get("attention_bias", False)),
        )


class MLAttention(nnx.Module):
    """Multi-head latent attention: low-rank projections, rope, prefill over new and cached tokens, output projection.

    config            MLAConfig
    compute           "fp8", "bf16" or None, as in ``mla_prefill``
    output_quant      Fp8PerGroup: attention writes FP8, and ``project_output`` gets an ``Fp8Array``
    workspace_tokens  context tokens that are expanded to keys and values at a time
    implementation    as in ``mla_prefill``
    dtype             of activations and cache; param_dtype of parameters

    Parameters are called as in the published checkpoints: q_a_proj, q_a_layernorm, q_b_proj (or q_proj),
    kv_a_proj_with_mqa, kv_a_layernorm, kv_b_proj, o_proj; ``load_checkpoint`` fills them.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        compute: Literal["fp8", "bf16"] | None = None,
        output_quant: Fp8PerGroup | None = None,
        workspace_tokens: int = 8192,
        implementation: dispatch.Implementation = None,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        if output_quant is not None and not isinstance(output_quant, Fp8PerGroup):
            raise checks.invalid("MLAttention", "output_quant", repr(output_quant), "an Fp8PerGroup or None")
        self.config = config
        self.compute, self.output_quant, self.implementation = compute, output_quant, implementation
        self.workspace_tokens = workspace_tokens
        self.dtype = checks.float_dtype("MLAttention", "dtype", dtype)
        types = {"dtype": self.dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, **types)
        norm = functools.partial(nnx.RMSNorm, epsilon=config.rms_norm_eps, **types)
        heads, bias = config.num_heads, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = linear(config.hidden_size, heads * (NOPE + ROPE), use_bias=False)
        else:
            self.q_a_proj = linear(config.hidden_size, config.q_lora_rank, use_bias=bias)
            self.q_a_layernorm = norm(config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, heads * (NOPE + ROPE), use_bias=False)
        self.kv_a_proj_with_mqa = linear(config.hidden_size, config.kv_lora_rank + ROPE, use_bias=bias)
        self.kv_a_layernorm = norm(config.kv_lora_rank)
        self.kv_b_proj = linear(config.kv_lora_rank, heads * (NOPE + VALUE), use_bias=False)
        self.o_proj = linear(heads * VALUE, config.hidden_size, use_bias=bias)

    def init_cache(self, blocks: int, block_size: int) -> jax.Array:
        """Zeros [blocks, block_size, kv_lora_rank + 64]: the normalised latent and the rotated rope key of a token."""
        return jnp.zeros((blocks, block_size, self.config.kv_lora_rank + ROPE), self.dtype)

    def __call__(
        self, x: jax.Array, batch: PagedBatch, cache: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Attends the new tokens of every request to its cached context and, causally, to themselves.

        x      [T, hidden_size], packed; rows of no request may hold anything
        batch  PagedBatch
        cache  ``init_cache`` or what the last call returned; donate it, and it is updated in place. None: no context,
               and nothing is kept

        Returns ([T, hidden_size], the new cache or None). Rows of no request are ``o_proj`` of zeros. Only what
        ``batch`` counts as context is read of the cache, and only the new tokens' rows are written.
        """
        op = "MLAttention"
        x = checks.array(op, "x", x, ("T", self.config.hidden_size), [jnp.bfloat16, jnp.float16, jnp.float32])
        tokens = packed_tokens(op, batch.cu_seqlens, x.shape[0])
        before = self._context(op, batch, cache, tokens)
        positions = jnp.where(tokens.owner >= 0, before[tokens.owner] + tokens.local, 0)
        angles = self.config.rope.angles(positions, ROPE)
        q = self._queries(x, *angles)  # [T, H, 192]
        latent, k_rope = self._latents(x, *angles)  # [T, L], [T, 64]
        kernel = self.kv_b_proj.kernel[...].astype(self.dtype).reshape(-1, self.config.num_heads, NOPE + VALUE)
        kv = jnp.einsum("tl,lhd->thd", latent, kernel, preferred_element_type=jnp.float32).astype(self.dtype)
        k, v = (kv[..., :NOPE], k_rope), kv[..., NOPE:]
        common = {
            "softmax_scale": (NOPE + ROPE) ** -0.5 * self.config.rope.softmax_factor,
            "output_quant": self.output_quant, "out_dtype": self.dtype,
            "compute": self.compute, "implementation": self.implementation,
        }  # fmt: skip
        if cache is None:
            return self.project_output(mla_prefill(q, k, v, cu_seqlens_q=batch.cu_seqlens, **common)), None
        blocks, size, _ = cache.shape
        block = paged(batch.block_tables, tokens.owner, positions, blocks, size)
        rows = jnp.concatenate([latent, k_rope], axis=-1)
        # written before it is read: the other way round XLA copies a donated cache
        cache = jnp.asarray(cache).at[block, positions % size].set(rows, mode="drop")
        out = mla_prefill_chunked(
            q, k, v, paged_latent_loader(cache, batch.block_tables, kernel), cu_seqlens=batch.cu_seqlens,
            context_lengths=before, workspace_tokens=self.workspace_tokens, **common,
        )  # fmt: skip
        return self.project_output(out), cache

    def project_output(self, out: jax.Array | Fp8Array) -> jax.Array:
        """``o_proj`` of the attention's result [T, H, 128].

        An FP8 result is dequantised first and multiplied in ``dtype``. Override this method to feed a block-scaled FP8
        matmul: ``out.flat`` [T, H*128] and ``out.scales`` are its left operand, in the layout of ``output_quant``.
        """
        values = out.dequantize(self.dtype) if isinstance(out, Fp8Array) else out
        return self.o_proj(values.reshape(values.shape[0], -1))

    def _context(self, op: str, batch: PagedBatch, cache: Any, tokens: Tokens) -> jax.Array:
        requests = tokens.start.shape[0]
        if cache is None:
            if batch.context_lengths is not None:
                raise checks.invalid(op, "cache", "None while batch has context_lengths", "a cache", "See init_cache.")
            return jnp.zeros(requests, jnp.int32)
        width = self.config.kv_lora_rank + ROPE
        cache = checks.array(op, "cache", cache, ("blocks", "block_size", width), [self.dtype])
        tables = checks.array(op, "batch.block_tables", batch.block_tables, (requests, "max_blocks"), [jnp.int32])
        return context(op, batch.context_lengths, requests, tables.shape[1] * cache.shape[1])

    def _queries(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        direct = self.config.q_lora_rank is None
        q = self.q_proj(x) if direct else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(x.shape[0], self.config.num_heads, NOPE + ROPE)
        return jnp.concatenate([q[..., :NOPE], rotate(q[..., NOPE:], cos, sin)], axis=-1)

    def _latents(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The normalised latent [T, L] and the rotated key part [T, 64] that all heads share."""
        compressed = self.kv_a_proj_with_mqa(x)
        rank = self.config.kv_lora_rank
        return self.kv_a_layernorm(compressed[:, :rank]), rotate(compressed[:, rank:], cos, sin)
