"""``GatedDeltaNet``: the linear attention layer of Qwen3-Next and Qwen3.5, prefill over pools of states."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_fp8attn import checks, dispatch
from jax_fp8attn.errors import InvalidInputError
from jax_fp8attn.gdn_prefill import GdnMetadata, gdn_prefill_pool
from jax_fp8attn.nn.batch import SlotBatch, Tokens, packed_tokens


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Sizes of a layer; num_v_heads is a multiple of num_k_heads, and q has as many heads as k."""

    hidden_size: int
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int = 128
    head_v_dim: int = 128
    conv_width: int = 4
    rms_norm_eps: float = 1e-6

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GatedDeltaNetConfig:
        """From the keys of a published config.json (of its text_config, where there is one)."""
        return cls(
            hidden_size=config["hidden_size"],
            num_k_heads=config["linear_num_key_heads"],
            num_v_heads=config["linear_num_value_heads"],
            head_k_dim=config["linear_key_head_dim"],
            head_v_dim=config["linear_value_head_dim"],
            conv_width=config["linear_conv_kernel_dim"],
            rms_norm_eps=config["rms_norm_eps"],
        )

    @property
    def key_width(self) -> int:
        """Columns of all heads of q, and of k."""
        return self.num_k_heads * self.head_k_dim

    @property
    def value_width(self) -> int:
        """Columns of all heads of v, and of z."""
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_channels(self) -> int:
        """Columns of q, k and v together."""
        return 2 * self.key_width + self.value_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetCache:
    """One row a request: the last inputs of the convolution, oldest first, and the recurrent state.

    conv   [P, conv_width - 1, channels]
    state  [P, num_v_heads, head_v_dim, head_k_dim]
    """

    conv: jax.Array
    state: jax.Array


class GatedDeltaNet(nnx.Module):
    """Projections, causal convolution, gated delta rule, gated norm, output projection.

    config          GatedDeltaNetConfig
    implementation  as in ``gdn_prefill_pool``
    dtype           of activations; param_dtype of parameters (A_log, dt_bias and the norm's are float32)

    Parameters are called as in Qwen3-Next: in_proj_qkvz, in_proj_ba, conv1d, A_log, dt_bias, norm, out_proj. The
    columns of in_proj_qkvz are all heads of q, then of k, v and z here, and those of in_proj_ba all b, then all a;
    published ones are interleaved by key head (Qwen3-Next) or four matrices (Qwen3.5). ``load_checkpoint`` takes both.
    """

    def __init__(
        self,
        config: GatedDeltaNetConfig,
        *,
        implementation: dispatch.Implementation = None,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.implementation = config, implementation
        self.dtype = checks.float_dtype("GatedDeltaNet", "dtype", dtype)
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs
        )  # fmt: skip
        heads, width, channels = config.num_v_heads, config.conv_width, config.conv_channels
        self.in_proj_qkvz = linear(config.hidden_size, channels + config.value_width)
        self.in_proj_ba = linear(config.hidden_size, 2 * heads)
        self.conv1d = nnx.Param(
            jax.random.normal(rngs.params(), (width, channels), param_dtype) * jnp.asarray(width**-0.5, param_dtype)
        )
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)))
        self.dt_bias = nnx.Param(jnp.ones(heads, jnp.float32))
        self.norm = nnx.Param(jnp.ones(config.head_v_dim, jnp.float32))
        self.out_proj = linear(config.value_width, config.hidden_size)

    def init_cache(self, rows: int, state_dtype: Any = jnp.float32) -> GatedDeltaNetCache:
        """A pool of ``rows`` zero states, float32 or bfloat16."""
        c = self.config
        state = jnp.zeros((rows, c.num_v_heads, c.head_v_dim, c.head_k_dim), state_dtype)
        return GatedDeltaNetCache(jnp.zeros((rows, c.conv_width - 1, c.conv_channels), self.dtype), state)

    def __call__(
        self, x: jax.Array, batch: SlotBatch, cache: GatedDeltaNetCache, metadata: GdnMetadata | None = None
    ) -> tuple[jax.Array, GatedDeltaNetCache]:
        """Runs the new tokens of every request on from its state.

        x         [T, hidden_size], packed; rows of no request may hold anything
        batch     SlotBatch
        cache     ``init_cache`` or what the last call returned; donate it, and it is updated in place
        metadata  ``gdn_metadata(batch.cu_seqlens, T, num_v_heads)``, computed once for all layers

        Returns ([T, hidden_size], the new cache). Rows of no request are 0. Pool rows that no request has keep their
        bits; a request without new tokens writes the state that it starts from.
        """
        op, c = "GatedDeltaNet", self.config
        x = checks.array(op, "x", x, ("T", c.hidden_size), [jnp.bfloat16, jnp.float16, jnp.float32])
        tokens = packed_tokens(op, batch.cu_seqlens, x.shape[0])
        conv = checks.array(op, "cache.conv", cache.conv, ("P", c.conv_width - 1, c.conv_channels), [self.dtype])
        requests = tokens.start.shape[0]
        slots = checks.array(op, "batch.slots", batch.slots, (requests,), [jnp.int32])
        starts = checks.array(op, "batch.has_initial_state", batch.has_initial_state, (requests,), [jnp.bool_])
        qkvz, ba = self.in_proj_qkvz(x), self.in_proj_ba(x)
        qkv, z = qkvz[:, : c.conv_channels], qkvz[:, c.conv_channels :]
        known = starts & (slots >= 0) & (slots < conv.shape[0])
        history = jnp.where(known[:, None, None], conv[jnp.clip(slots, 0, conv.shape[0] - 1)], 0)
        kernel = self.conv1d[...].astype(jnp.float32)
        mixed = jax.nn.silu(_causal_conv(qkv, kernel, history, tokens)).astype(self.dtype)
        out, state = gdn_prefill_pool(
            mixed, ba[:, c.num_v_heads :], ba[:, : c.num_v_heads], self.A_log[...], self.dt_bias[...],
            cache.state, slots, starts, cu_seqlens=batch.cu_seqlens, num_q_heads=c.num_k_heads,
            num_k_heads=c.num_k_heads, num_v_heads=c.num_v_heads, metadata=metadata,
            implementation=self.implementation,
        )  # fmt: skip
        rows = jnp.where((slots >= 0) & (slots < conv.shape[0]), slots, conv.shape[0])
        conv = conv.at[rows].set(_last_inputs(qkv, history, tokens), mode="drop")
        return self.out_proj(self._gated_norm(out, z, tokens.owner >= 0)), GatedDeltaNetCache(conv, state)

    def _gated_norm(self, out: jax.Array, z: jax.Array, used: jax.Array) -> jax.Array:
        """out [T, H, V] normalised a head, times silu(z); 0 for tokens of no request."""
        out = out.astype(jnp.float32)
        size = jnp.mean(out * out, axis=-1, keepdims=True)
        normed = out * jax.lax.rsqrt(size + self.config.rms_norm_eps) * self.norm[...]
        gated = normed * jax.nn.silu(z.astype(jnp.float32)).reshape(out.shape)
        return jnp.where(used[:, None, None], gated, 0).astype(self.dtype).reshape(out.shape[0], -1)

    def from_published(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The layer's own tensors from those of Qwen3-Next or Qwen3.5; what is not known stays as it is."""
        own = dict(tensors)
        if "in_proj_qkvz.weight" in own:
            own["in_proj_qkvz.weight"] = self._by_kind("in_proj_qkvz.weight", own, self._widths("qkvz"))
        elif {"in_proj_qkv.weight", "in_proj_z.weight"} <= own.keys():
            parts = [own.pop("in_proj_qkv.weight"), own.pop("in_proj_z.weight")]
            own["in_proj_qkvz.weight"] = np.concatenate(parts)
        if "in_proj_ba.weight" in own:
            own["in_proj_ba.weight"] = self._by_kind("in_proj_ba.weight", own, self._widths("ba"))
        elif {"in_proj_b.weight", "in_proj_a.weight"} <= own.keys():
            own["in_proj_ba.weight"] = np.concatenate([own.pop("in_proj_b.weight"), own.pop("in_proj_a.weight")])
        if "conv1d.weight" in own:
            own["conv1d"] = own.pop("conv1d.weight").squeeze(1).T  # [channels, 1, width]
        if "norm.weight" in own:
            own["norm"] = own.pop("norm.weight")
        return own

    def to_published(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of ``from_published``, in the form of Qwen3-Next."""
        published = dict(tensors)
        for name, kinds in (("in_proj_qkvz.weight", "qkvz"), ("in_proj_ba.weight", "ba")):
            heads, widths = self.config.num_k_heads, self._widths(kinds)
            ends = np.cumsum([heads * width for width in widths])[:-1]
            parts = [part.reshape(heads, -1, part.shape[-1]) for part in np.split(published[name], ends)]
            published[name] = np.concatenate(parts, axis=1).reshape(published[name].shape)
        published["conv1d.weight"] = published.pop("conv1d").T[:, None]
        published["norm.weight"] = published.pop("norm")
        return published

    def _widths(self, kinds: str) -> list[int]:
        """Published rows of each kind that one key head has."""
        c = self.config
        group = c.num_v_heads // c.num_k_heads
        widths = {"q": c.head_k_dim, "k": c.head_k_dim, "v": group * c.head_v_dim, "z": group * c.head_v_dim}
        return [{**widths, "b": group, "a": group}[kind] for kind in kinds]

    def _by_kind(self, name: str, tensors: Mapping[str, np.ndarray], widths: list[int]) -> np.ndarray:
        """Rows that come key head by key head, sorted by kind."""
        weight, heads = tensors[name], self.config.num_k_heads
        if weight.ndim != 2 or weight.shape[0] != heads * sum(widths):
            expected = [heads * sum(widths), self.config.hidden_size]
            raise InvalidInputError(f"load_checkpoint: {name} is {list(weight.shape)}; expected {expected}.")
        by_head = weight.reshape(heads, sum(widths), weight.shape[1])
        parts = np.split(by_head, np.cumsum(widths)[:-1], axis=1)
        return np.concatenate([part.reshape(-1, weight.shape[1]) for part in parts])


def _causal_conv(x: jax.Array, kernel: jax.Array, history: jax.Array, tokens: Tokens) -> jax.Array:
    """float32 [T, C]: every request's inputs, after its history [B, W-1, C], under the kernel [W, C]."""
    total, width = x.shape[0], kernel.shape[0]
    used = tokens.owner >= 0
    result = jnp.zeros(x.shape, jnp.float32)
    for back in range(width):
        earlier = jnp.pad(x, ((back, 0), (0, 0)))[:total].astype(jnp.float32)
        inside = used & (tokens.local >= back)
        result += jnp.where(inside[:, None], earlier, 0) * kernel[width - 1 - back]
    for local in range(width - 1):  # the first tokens of a request see its history
        seen = history[:, local:].astype(jnp.float32) * kernel[: width - 1 - local]  # [B, W-1-local, C]
        token = jnp.where(local < tokens.length, tokens.start + local, total)
        result = result.at[token].add(jnp.sum(seen, axis=1), mode="drop")
    return result


def _last_inputs(x: jax.Array, history: jax.Array, tokens: Tokens) -> jax.Array:
    """[B, W-1, C]: the newest inputs of every request, its history included."""
    kept = history.shape[1]
    local = tokens.length[:, None] - kept + jnp.arange(kept)  # [B, W-1], negative: in the history
    new = x[jnp.clip(tokens.start[:, None] + local, 0, max(x.shape[0] - 1, 0))]
    old = jnp.take_along_axis(history, jnp.clip(kept + local, 0, kept - 1)[..., None], axis=1)
    return jnp.where((local >= 0)[..., None], new, old)
