"""``SparseMLAttention``: attention of DeepSeek-V4 over a window and compressed rows, prefill over an FP8 cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_fp8attn import checks, dispatch
from jax_fp8attn.errors import InvalidInputError
from jax_fp8attn.latent import ROPE, WIDTH, Fp8Latent, check_latent, quantize_latent
from jax_fp8attn.nn.batch import Tokens, WindowBatch, context, packed_tokens, paged
from jax_fp8attn.nn.rope import Rope, rotate
from jax_fp8attn.sparse_prefill import sparse_prefill_topk

MOST = 2**30  # positions are counted in int32


@dataclasses.dataclass(frozen=True)
class SparseMLAConfig:
    """Sizes of a layer. Rows are 512 wide, 64 of them rotary.

    num_heads, o_groups  of this layer, or of this rank; num_heads a multiple of o_groups
    window               a token sees itself and the window - 1 tokens before it
    compress_ratio       0: the window alone. 4 or 128: and one row for every so many tokens, made of them (128), or of
                         them and as many before them (4)
    rope                 of this layer: published models use another theta, and YaRN without a factor on the softmax
                         scale (mscale 0), where compress_ratio is not 0
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int = 1024
    o_lora_rank: int = 1024
    o_groups: int = 8
    window: int = 128
    compress_ratio: int = 0
    rope: Rope = dataclasses.field(default_factory=Rope)
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        checks.option("SparseMLAConfig", "compress_ratio", self.compress_ratio, (0, 4, 128))
        if self.num_heads % self.o_groups:
            raise checks.invalid("SparseMLAConfig", "num_heads", self.num_heads, f"a multiple of {self.o_groups}")

    @property
    def span(self) -> int:
        """Tokens that one compressed row is made of."""
        return 8 if self.compress_ratio == 4 else self.compress_ratio

    @property
    def parts(self) -> int:
        """Projections of a token: as part of the row after its own group's, and of its own group's."""
        return 2 if self.compress_ratio == 4 else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseMLACache:
    """FP8 rows of all requests, and the inputs of compressed rows to come.

    rows        Fp8Latent [slots * window + blocks * block_size]: first the windows, row position % window of each, then
                the blocks of compressed rows
    kv, score   float32 [slots, span, parts * 512]: row position % span of each request; width 0 without compression
    block_size  compressed rows a block, static
    """

    rows: Fp8Latent
    kv: jax.Array
    score: jax.Array
    block_size: int = dataclasses.field(metadata={"static": True})


class Compressor(nnx.Module):
    """Makes one row of every ``compress_ratio`` tokens: a softmax over tokens, column by column. In float32."""

    def __init__(self, config: SparseMLAConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> None:
        columns = config.parts * WIDTH
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )  # fmt: skip
        self.wkv, self.wgate = linear(config.hidden_size, columns), linear(config.hidden_size, columns)
        self.ape = nnx.Param(jnp.zeros((config.compress_ratio, columns), jnp.float32))
        self.norm = nnx.RMSNorm(
            WIDTH, epsilon=config.rms_norm_eps, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
        )  # fmt: skip
        self.config = config

    def inputs(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(kv, score), float32 [T, parts * 512] each."""
        return self.wkv(x), self.wgate(x) + self.ape[...][positions % self.config.compress_ratio]

    def rows(self, kv: jax.Array, score: jax.Array, groups: jax.Array) -> Fp8Latent:
        """Rows [G] from their inputs [G, span, parts * 512] (score -inf: no such token); groups int32 [G]."""
        if self.config.parts == 2:
            half = self.config.compress_ratio
            kv, score = (
                jnp.concatenate([z[:, :half, :WIDTH], z[:, half:, WIDTH:]], axis=1) for z in (kv, score)
            )  # fmt: skip
        row = self.norm(jnp.sum(kv * jax.nn.softmax(score, axis=1), axis=1))
        angles = self.config.rope.angles(groups * self.config.compress_ratio, ROPE)
        return _quantised(_rotate_tail(row, *angles))


class SparseMLAttention(nnx.Module):
    """Attention of DeepSeek-V4: a window, compressed rows of everything before, a sink a head, one FP8 row a token.

    config          SparseMLAConfig
    implementation  as in ``sparse_prefill``
    dtype           of activations; param_dtype of parameters (sinks and norms are float32)

    Parameters are called as in the published checkpoints: wq_a, q_norm, wq_b, wkv, kv_norm, attn_sink, wo_a, wo_b,
    compressor.{wkv, wgate, ape, norm}. The indexer that chooses compressed rows where compress_ratio is 4 is not part
    of this module: its choice is the argument ``selected``.
    """

    def __init__(
        self,
        config: SparseMLAConfig,
        *,
        implementation: dispatch.Implementation = None,
        dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.bfloat16,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.implementation = config, implementation
        self.dtype = checks.float_dtype("SparseMLAttention", "dtype", dtype)
        types = {"dtype": self.dtype, "rngs": rngs}
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=param_dtype, **types)
        norm = functools.partial(nnx.RMSNorm, epsilon=config.rms_norm_eps, param_dtype=jnp.float32, **types)
        self.wq_a, self.q_norm = linear(config.hidden_size, config.q_lora_rank), norm(config.q_lora_rank)
        self.wq_b = linear(config.q_lora_rank, config.num_heads * WIDTH)
        self.wkv, self.kv_norm = linear(config.hidden_size, WIDTH), norm(WIDTH)
        self.attn_sink = nnx.Param(jnp.zeros(config.num_heads, jnp.float32))
        group = config.num_heads // config.o_groups * WIDTH
        shape = (config.o_groups, group, config.o_lora_rank)
        scale = jnp.asarray(group**-0.5, param_dtype)
        self.wo_a = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * scale)
        self.wo_b = linear(config.o_groups * config.o_lora_rank, config.hidden_size)
        if config.compress_ratio:
            self.compressor = Compressor(config, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)

    def init_cache(self, slots: int, blocks: int = 0, block_size: int = 64) -> SparseMLACache:
        """Windows of ``slots`` requests and ``blocks`` blocks of compressed rows, all zeros."""
        c = self.config
        rows = _quantised(jnp.zeros((slots * c.window + blocks * block_size, WIDTH), jnp.bfloat16))
        shape = (slots, c.span, c.parts * WIDTH if c.compress_ratio else 0)
        kv, score = (jnp.zeros(shape, jnp.float32) for _ in range(2))  # two buffers: they are donated together
        return SparseMLACache(rows, kv, score, block_size)

    def __call__(
        self, x: jax.Array, batch: WindowBatch, cache: SparseMLACache, selected: jax.Array | None = None
    ) -> tuple[jax.Array, SparseMLACache]:
        """Attends the new tokens of every request to their windows and to its compressed rows.

        x         [T, hidden_size], packed; rows of no request may hold anything
        batch     WindowBatch
        cache     ``init_cache`` or what the last call returned; donate it, and its memory holds the new one
        selected  int32 [T, K]: the compressed rows that each token sees, by number within its request (row i stands for
                  the tokens from i * compress_ratio on); rows that are not complete at the token, and numbers below 0,
                  are skipped. None: every complete row, which takes a list as long as the block table can hold.

        Returns ([T, hidden_size], the new cache). Rows of no request are 0.
        """
        op, c = "SparseMLAttention", self.config
        x = checks.array(op, "x", x, ("T", c.hidden_size), [jnp.bfloat16, jnp.float16, jnp.float32])
        tokens = packed_tokens(op, batch.cu_seqlens, x.shape[0])
        step = self._step(op, batch, cache, tokens)
        angles = c.rope.angles(step.positions, ROPE)
        q = self.wq_b(self.q_norm(self.wq_a(x))).reshape(x.shape[0], c.num_heads, WIDTH).astype(jnp.float32)
        q = q * jax.lax.rsqrt(jnp.mean(q * q, axis=-1, keepdims=True) + c.rms_norm_eps)
        q = _rotate_tail(q.astype(self.dtype), *angles)
        own = _quantised(_rotate_tail(self.kv_norm(self.wkv(x)), *angles))
        windows, cache = self._slide(step, cache, own)
        if c.compress_ratio:
            cache = self._compress(x, step, cache)
        pools = {"prefix": windows, "indices": self._window_lists(step)}
        if c.compress_ratio:
            pools = {"prefix": cache.rows, "indices": self._compressed_list(op, step, selected)} | {
                "extend": windows, "extend_indices": pools["indices"]
            }  # fmt: skip
        out = sparse_prefill_topk(
            q, **pools, attn_sink=self.attn_sink[...], out_dtype=self.dtype, implementation=self.implementation
        )
        cos, sin = angles
        return self._project(_rotate_tail(out, cos, -sin)), cache

    def _step(self, op: str, batch: WindowBatch, cache: SparseMLACache, tokens: Tokens) -> _Step:
        """Checks batch and cache against each other."""
        c, requests = self.config, tokens.start.shape[0]
        rows = check_latent(op, "cache.rows", cache.rows, ("P",))
        shape = ("slots", c.span, c.parts * WIDTH if c.compress_ratio else 0)
        slots = checks.array(op, "cache.kv", cache.kv, shape, [jnp.float32]).shape[0]
        blocks = (rows.shape[0] - slots * c.window) // cache.block_size
        tables = None
        if c.compress_ratio:
            tables = checks.array(op, "batch.block_tables", batch.block_tables, (requests, "max_blocks"), [jnp.int32])
        before = context(op, batch.context_lengths, requests, MOST)
        slot = checks.array(op, "batch.slots", batch.slots, (requests,), [jnp.int32])
        positions = jnp.where(tokens.owner >= 0, before[tokens.owner] + tokens.local, 0)
        return _Step(
            tokens=tokens, before=before, end=before + tokens.length, positions=positions,
            slots=jnp.clip(slot, 0, slots - 1), has_slot=(slot >= 0) & (slot < slots), tables=tables,
            count=rows.shape[0], windows=slots * c.window, blocks=blocks, block_size=cache.block_size,
        )  # fmt: skip

    def _slide(self, step: _Step, cache: SparseMLACache, own: Fp8Latent) -> tuple[Fp8Latent, SparseMLACache]:
        """The windows as they were, [B * window], and the new rows [T] behind them; the cache with the new windows."""
        c, owner = self.config, step.tokens.owner
        row = (step.slots[:, None] * c.window + jnp.arange(c.window)).reshape(-1)
        old = jax.tree.map(lambda pool: pool[row], cache.rows)
        old, rows = jax.lax.optimization_barrier((old, cache.rows))  # read before written, or XLA copies the pool
        windows = jax.tree.map(lambda *parts: jnp.concatenate(parts), old, own)
        kept = (owner >= 0) & (step.positions >= step.end[owner] - c.window) & step.has_slot[owner]
        row = jnp.where(kept, step.slots[owner] * c.window + step.positions % c.window, step.count)
        return windows, dataclasses.replace(cache, rows=_write(rows, row, own))

    def _window_lists(self, step: _Step) -> jax.Array:
        """int32 [T, window] rows of ``_slide``'s windows: each token's own window, -1 for none."""
        c, owner = self.config, step.tokens.owner
        seen = step.positions[:, None] - c.window + 1 + jnp.arange(c.window)  # [T, window]
        before, used = step.before[owner][:, None], (owner >= 0)[:, None]
        new = step.slots.shape[0] * c.window + step.tokens.start[owner][:, None] + seen - before
        old = owner[:, None] * c.window + seen % c.window
        cached = used & (seen >= 0) & (seen < before) & step.has_slot[owner][:, None]
        return jnp.where(used & (seen >= before), new, jnp.where(cached, old, -1))

    def _compressed_list(self, op: str, step: _Step, selected: jax.Array | None) -> jax.Array:
        """int32 [T, K]: cache rows of the compressed rows that each token sees, -1 for none."""
        total = step.positions.shape[0]
        if selected is None:
            every = jnp.arange(step.tables.shape[1] * step.block_size, dtype=jnp.int32)
            selected = jnp.broadcast_to(every, (total, every.shape[0]))
        selected = checks.array(op, "selected", selected, (total, "K"), [jnp.int32])
        complete = (selected >= 0) & (selected < ((step.positions + 1) // self.config.compress_ratio)[:, None])
        row = step.compressed_row(step.tokens.owner[:, None], jnp.where(complete, selected, -1))
        return jnp.where(row < step.count, row, -1)

    def _compress(self, x: jax.Array, step: _Step, cache: SparseMLACache) -> SparseMLACache:
        """Writes the rows that the new tokens complete, and keeps the inputs of those to come."""
        c, tokens = self.config, step.tokens
        kv, score = self.compressor.inputs(x, step.positions)
        first, last = step.before // c.compress_ratio, step.end // c.compress_ratio
        ends = jnp.cumsum(last - first)  # rows that the requests complete, one request after the other
        number = jnp.arange(x.shape[0] // c.compress_ratio + tokens.start.shape[0], dtype=jnp.int32)
        request = jnp.searchsorted(ends, number, side="right").astype(jnp.int32)
        there = request < ends.shape[0]
        request = jnp.where(there, request, 0)
        group = jnp.where(there, last[request] - (ends[request] - number), 0)
        member = (group[:, None] + 1) * c.compress_ratio - c.span + jnp.arange(c.span)  # [G, span] positions
        old = member < step.before[request][:, None]
        token = jnp.clip(tokens.start[request][:, None] + member - step.before[request][:, None], 0, x.shape[0] - 1)
        known = (member >= 0) & (~old | step.has_slot[request][:, None])
        kept = (step.slots[request][:, None], member % c.span)
        members = [
            jnp.where(known[..., None], jnp.where(old[..., None], state[kept], new[token]), missing)
            for state, new, missing in ((cache.kv, kv, 0.0), (cache.score, score, -jnp.inf))
        ]
        members, states = jax.lax.optimization_barrier((members, (cache.kv, cache.score)))  # as in _slide
        made = self.compressor.rows(*members, group)
        rows = _write(cache.rows, step.compressed_row(jnp.where(there, request, -1), group), made)
        newest = (tokens.owner >= 0) & (step.positions >= step.end[tokens.owner] - c.span)
        slot = jnp.where(newest & step.has_slot[tokens.owner], step.slots[tokens.owner], cache.kv.shape[0])
        place = (slot, step.positions % c.span)
        kv, score = (old.at[place].set(new, mode="drop") for old, new in zip(states, (kv, score), strict=True))
        return dataclasses.replace(cache, rows=rows, kv=kv, score=score)

    def _project(self, out: jax.Array) -> jax.Array:
        """The grouped low-rank output projection of [T, H, 512]."""
        groups = out.reshape(out.shape[0], self.config.o_groups, -1)
        wo_a = self.wo_a[...].astype(self.dtype)
        low = jnp.einsum("tgd,gdr->tgr", groups, wo_a)
        return self.wo_b(low.reshape(out.shape[0], -1))

    def from_published(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """wo_a [o_groups * rank, columns] as the module has it; the indexer's tensors are left out."""
        own = {name: x for name, x in tensors.items() if not name.startswith("indexer.")}
        groups, width, rank = self.wo_a.shape
        if "wo_a.weight" in own:
            weight = own.pop("wo_a.weight")
            if weight.shape != (groups * rank, width):
                came, expected = list(weight.shape), [groups * rank, width]
                raise InvalidInputError(f"load_checkpoint: wo_a.weight is {came}; expected {expected}.")
            own["wo_a"] = weight.reshape(groups, rank, width).swapaxes(1, 2)
        return own

    def to_published(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of ``from_published``, without an indexer."""
        published = dict(tensors)
        wo_a = published.pop("wo_a").swapaxes(1, 2)
        published["wo_a.weight"] = wo_a.reshape(-1, wo_a.shape[-1])
        return published


@dataclasses.dataclass(frozen=True)
class _Step:
    """The requests of one call and where their rows lie."""

    tokens: Tokens
    before: jax.Array  # int32 [B]: tokens before this call
    end: jax.Array  # int32 [B]: and after it
    positions: jax.Array  # int32 [T]
    slots: jax.Array  # int32 [B], inside the pool
    has_slot: jax.Array  # bool [B]: the request really has it
    tables: jax.Array | None
    count: int  # rows of the cache; also the row number that is no row
    windows: int  # rows of all windows
    blocks: int
    block_size: int

    def compressed_row(self, request: jax.Array, group: jax.Array) -> jax.Array:
        """int32 like ``group``: the cache row of a request's compressed row, ``count`` for none."""
        block = paged(self.tables, request, group, self.blocks, self.block_size)
        row = self.windows + block * self.block_size + group % self.block_size
        return jnp.where(block < self.blocks, row, self.count)


def _quantised(x: jax.Array) -> Fp8Latent:
    return quantize_latent(x, scale_dtype=jnp.uint8)


def _write(rows: Fp8Latent, index: jax.Array, new: Fp8Latent) -> Fp8Latent:
    """``rows`` with ``new`` at ``index``, out of range: nowhere. As bytes: not every platform scatters FP8 as it is."""

    def write(old: jax.Array, value: jax.Array) -> jax.Array:
        kind = jnp.uint8 if old.dtype.itemsize == 1 else old.dtype
        old_bits, bits = (jax.lax.bitcast_convert_type(x, kind) for x in (old, value))
        return jax.lax.bitcast_convert_type(old_bits.at[index].set(bits, mode="drop"), old.dtype)

    return jax.tree.map(write, rows, new)


def _rotate_tail(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the last 64 columns of x [T, ..., 512]."""
    return jnp.concatenate([x[..., :-ROPE], rotate(x[..., -ROPE:], cos, sin)], axis=-1)
