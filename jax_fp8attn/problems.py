"""One frozen problem an op: every static fact of a call, and the traced arrays that go with it.

``instances`` counts the independent calls that vmap folded into the token axis: tokens, sequences and one-per-call
scalars are split evenly over them (scalars travel as arrays [instances]).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_fp8attn.quantize import Fp8Array, Fp8Spec

Output = jax.Array | Fp8Array


@dataclasses.dataclass(frozen=True)
class MergeProblem:
    """``merge_attn_states`` of N states of [T, H, D]."""

    states: int
    tokens: int
    heads: int
    width: int
    dtype: np.dtype
    out_dtype: np.dtype
    output_quant: Fp8Spec | None = None  # per tensor: without its scale
    return_lse: bool = False
    lse_layout: str = "HT"
    lse_base: str = "e"
    context_count: bool = False  # tokens past it take the last state alone
    stacked: bool = False  # the states come as one array with a leading axis
    instances: int = 1


class MergeArrays(NamedTuple):
    outputs: Any  # indexed by state: [T, H, D]; a tuple, or one array [N, T, H, D] when stacked
    lses: Any  # indexed by state: float32 [H, T], or [T, H] for lse_layout "TH"
    context_count: jax.Array | None  # int32 [instances]
    output_scale: jax.Array | None  # float32 [instances]


@dataclasses.dataclass(frozen=True)
class MlaProblem:
    """``mla_prefill`` of B sequences packed into T query tokens and S key tokens."""

    tokens: int
    keys: int
    sequences: int
    heads: int
    q_dtype: np.dtype
    k_dtype: np.dtype
    v_dtype: np.dtype
    out_dtype: np.dtype
    k_rope_dtype: np.dtype | None = None  # given: K comes as (nope [S,H,128], rope [S,64])
    state_dtype: np.dtype | None = None  # given: an initial state is merged in
    causal: bool = True
    compute: str = "fp8"
    output_quant: Fp8Spec | None = None
    return_lse: bool = False
    nope_width: int = 128
    rope_width: int = 64
    v_width: int = 128
    instances: int = 1


class MlaArrays(NamedTuple):
    q: jax.Array  # [T, H, 192]
    k: jax.Array  # [S, H, 192], or the nope part [S, H, 128]
    k_rope: jax.Array | None  # [S, 64]
    v: jax.Array  # [S, H, 128]
    q_start: jax.Array  # int32 [B]: first token and length of each sequence, disjoint and ascending
    q_length: jax.Array
    k_start: jax.Array
    k_length: jax.Array
    softmax_scale: jax.Array  # float32 [instances], like the other scales
    q_scale: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    initial_out: jax.Array | None  # [T, H, 128]
    initial_lse: jax.Array | None  # float32 [H, T]
    output_scale: jax.Array | None


@dataclasses.dataclass(frozen=True)
class SparseProblem:
    """``sparse_prefill`` of T tokens over lists of rows of two pools."""

    tokens: int
    heads: int
    prefix_rows: int
    extend_rows: int
    prefix_entries: int  # capacity of the index arrays
    extend_entries: int
    q_dtype: np.dtype
    out_dtype: np.dtype
    q_scale_group: int = 0  # 0: q is no Fp8Latent; else 64 or 32
    prefix_scale_group: int = 0
    extend_scale_group: int = 0
    has_extend: bool = False
    has_sink: bool = False
    return_lse: bool = False
    precision: str = "exact"
    instances: int = 1


class SparseArrays(NamedTuple):
    q: Any  # [T, H, 512] or Fp8Latent
    prefix: Any  # [P, 512] or Fp8Latent
    prefix_indices: jax.Array  # int32 [entries]
    prefix_start: jax.Array  # int32 [T]: the list of token t is prefix_indices[start[t]:end[t]]
    prefix_end: jax.Array
    extend: Any
    extend_indices: jax.Array | None
    extend_start: jax.Array | None
    extend_end: jax.Array | None
    softmax_scale: jax.Array  # float32 [instances]
    sink: jax.Array | None  # float32 [instances, H]


@dataclasses.dataclass(frozen=True)
class GdnProblem:
    """``gdn_prefill`` of B sequences packed into T tokens; state heads H = max(Hq, Hv)."""

    tokens: int
    sequences: int
    q_heads: int
    k_heads: int
    v_heads: int
    k_width: int
    v_width: int
    dtype: np.dtype  # of q, k, v and the output
    gate: str = "log"
    qk_l2norm: bool = False
    l2norm_eps: float = 1e-6
    state_layout: str = "vk"
    state_dtype: np.dtype | None = None  # of the final state
    has_initial_state: bool = False
    return_final_state: bool = True
    checkpoint_every: int = 0
    precision: str = "default"
    instances: int = 1

    @property
    def heads(self) -> int:
        return max(self.q_heads, self.v_heads)


class GdnArrays(NamedTuple):
    q: jax.Array  # [T, Hq, K]
    k: jax.Array  # [T, Hk, K]
    v: jax.Array  # [T, Hv, V]
    g: jax.Array  # float32 [T, H]
    beta: jax.Array  # float32 [T, H]
    start: jax.Array  # int32 [B]: first token and length of each sequence, disjoint and ascending
    length: jax.Array
    initial_state: jax.Array | None  # [B, H, V, K] or [B, H, K, V]
    scale: jax.Array  # float32 [instances]
