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
    in_place: bool = False  # the result takes the memory of the first state


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
class RowForm:
    """How rows of 512 numbers are stored."""

    dtype: np.dtype  # float8_e4m3fn for Fp8Latent
    scale_group: int = 0  # 64 or 32 for Fp8Latent
    scale_dtype: np.dtype | None = None  # float32 or uint8 (E8M0) for Fp8Latent


@dataclasses.dataclass(frozen=True)
class PoolForm:
    """One pool of ``sparse_prefill``."""

    form: RowForm
    rows: int
    entries: int  # capacity of its index array


@dataclasses.dataclass(frozen=True)
class SparseProblem:
    """``sparse_prefill`` of T tokens over lists of rows of one or two pools."""

    tokens: int
    heads: int
    q: RowForm
    prefix: PoolForm
    extend: PoolForm | None
    out_dtype: np.dtype
    has_sink: bool = False
    return_lse: bool = False
    precision: str = "exact"
    width: int = 512
    instances: int = 1


class SparsePool(NamedTuple):
    """A pool and the lists over it. List t is indices[start[t]:end[t]]; 0 <= start <= end <= entries; lists may
    overlap. Indices that are no row of this pool are skipped."""

    rows: Any  # [P, 512] or Fp8Latent
    indices: jax.Array  # int32 [entries]
    start: jax.Array  # int32 [T]
    end: jax.Array  # int32 [T]


class SparseArrays(NamedTuple):
    q: Any  # [T, H, 512] or Fp8Latent
    prefix: SparsePool
    extend: SparsePool | None
    softmax_scale: jax.Array  # float32 [instances]
    sink: jax.Array | None  # float32 [instances, H]


GDN_CHUNK = 64  # chunks are counted from the first token of each sequence


def gdn_max_chunks(tokens: int, sequences: int) -> int:
    """The most chunks that ``sequences`` ranges of ``tokens`` tokens can have."""
    used = min(tokens, sequences)
    return used and used + (tokens - used) // GDN_CHUNK


@dataclasses.dataclass(frozen=True)
class GdnProblem:
    """``gdn_prefill`` of B sequences packed into T tokens; state heads H = max(Hq, Hv).

    ``transition``: no q; the result is (M, N) of each sequence, float32 [B, H, K, K] and [B, H, K, V].
    """

    tokens: int
    sequences: int
    q_heads: int
    k_heads: int
    v_heads: int
    k_width: int
    v_width: int
    dtype: np.dtype  # of q, k and v
    out_dtype: np.dtype
    state_dtype: np.dtype  # of the initial state, the final state and the checkpoints
    gate: str = "log"
    qk_l2norm: bool = False
    l2norm_eps: float = 1e-6
    state_layout: str = "vk"
    has_initial_state: bool = False
    return_final_state: bool = True
    checkpoint_every: int = 0
    precision: str = "default"
    segments: int = 0  # 0: the backend chooses
    transition: bool = False
    instances: int = 1

    @property
    def heads(self) -> int:
        return max(self.q_heads, self.v_heads)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """One sequence's state as it is stored."""
        widths = (self.v_width, self.k_width) if self.state_layout == "vk" else (self.k_width, self.v_width)
        return (self.heads, *widths)

    @property
    def max_chunks(self) -> int:
        return gdn_max_chunks(self.tokens, self.sequences)

    @property
    def checkpoints(self) -> int:
        """Rows of the checkpoint buffer: T // checkpoint_every for each instance."""
        if not self.checkpoint_every:
            return 0
        return self.instances * (self.tokens // self.instances // self.checkpoint_every)


class GdnArrays(NamedTuple):
    q: jax.Array | None  # [T, Hq, K]
    k: jax.Array  # [T, Hk, K]
    v: jax.Array  # [T, Hv, V]
    g: jax.Array  # float32 [T, H]
    beta: jax.Array  # float32 [T, H]
    start: jax.Array  # int32 [B]: first token and length of each sequence, disjoint and ascending
    length: jax.Array
    chunk_sequence: jax.Array  # int32 [max_chunks]: the sequence of each chunk, ascending; -1 past the last
    chunk_index: jax.Array  # int32 [max_chunks]: the chunk's number within its sequence
    initial_state: jax.Array | None  # [B, *state_shape]
    scale: jax.Array  # float32 [instances]

    def floats(self) -> GdnArrays:
        """What has a derivative; None for the integers."""
        return self._replace(start=None, length=None, chunk_sequence=None, chunk_index=None)


@dataclasses.dataclass(frozen=True)
class GdnPoolProblem:
    """``gdn_prefill_pool``: packed qkv, gates computed inside, states in rows of a pool."""

    tokens: int
    sequences: int
    q_heads: int
    k_heads: int
    v_heads: int
    k_width: int
    v_width: int
    pool_rows: int
    dtype: np.dtype  # of qkv
    out_dtype: np.dtype
    state_dtype: np.dtype  # of the pool and the checkpoints
    qk_l2norm: bool = True
    l2norm_eps: float = 1e-6
    state_layout: str = "vk"
    checkpoint_every: int = 0
    checkpoints_to_pool: bool = False  # rows checkpoint_slots of the pool instead of a buffer of their own
    precision: str = "default"
    segments: int = 0
    instances: int = 1

    @property
    def split(self) -> GdnProblem:
        """The same call on q, k, v, gates and gathered states."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("pool_rows", "checkpoints_to_pool"):
            del facts[name]
        return GdnProblem(**facts, has_initial_state=True)


class GdnPoolArrays(NamedTuple):
    qkv: jax.Array  # [T, Hq*K + Hk*K + Hv*V]
    a: jax.Array  # [T, H]
    b: jax.Array  # [T, H]
    A_log: jax.Array  # float32 [instances, H]
    dt_bias: jax.Array  # float32 [instances, H]
    pool: jax.Array  # [P, *state_shape]
    slots: jax.Array  # int32 [B]: the pool row to start from; -1: none, start from zero
    write_slots: jax.Array  # int32 [B]: the pool row of the final state; -1: none
    checkpoint_slots: jax.Array | None  # int32 [checkpoints]; -1: none
    start: jax.Array  # int32 [B] and so on: as in GdnArrays
    length: jax.Array
    chunk_sequence: jax.Array
    chunk_index: jax.Array
    scale: jax.Array  # float32 [instances]
