"""The serving steps of ``demo``: their inputs, the calls, and how each is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8attn as fp8attn
from jax_fp8attn import dispatch, testing

BF16 = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Check:
    """An error beside its bound."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.bound)  # NaN fails


class Layer(Protocol):
    """One step: ``step`` computes, ``check`` compares its result with the oracle, ``explain`` tells what ran."""

    title: str

    def __init__(self, seed: int, full: bool) -> None: ...

    @property
    def shapes(self) -> str: ...

    def step(self) -> Any: ...

    def check(self, result: Any) -> Iterator[Check]: ...

    def explain(self) -> tuple[dispatch.Explanation, ...]: ...


class _Random:
    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: Any = BF16, size: float = 1.0) -> jax.Array:
        return jnp.asarray(self._rng.standard_normal(shape, np.float32) * size, dtype)

    def permutation(self, n: int) -> np.ndarray:
        return self._rng.permutation(n)


def _prefix_sums(lengths: Any) -> jax.Array:
    return jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


def _largest_difference(actual: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(actual, np.float64) - np.asarray(expected, np.float64)).max())


@dataclasses.dataclass(frozen=True)
class MlaSizes:
    new: tuple[int, ...]
    context: tuple[int, ...]
    heads: int
    workspace: int
    latent: int = 512
    block: int = 64


class MlaLayer:
    """New tokens of several requests over contexts in a paged latent cache; the output goes to DeepGEMM as FP8."""

    title = "DeepSeek-V3: FP8 MLA prefill with context chunks"
    small = MlaSizes((96, 64, 32), (0, 160, 700), 8, 512)
    real = MlaSizes((2048, 1024, 512, 512), (0, 4096, 16384, 32768), 16, 8192)
    output = fp8attn.Fp8PerGroup.deepgemm_sm100()

    def __init__(self, seed: int, full: bool) -> None:
        self.size = size = self.real if full else self.small
        random = _Random(seed)
        blocks = [-(-c // size.block) for c in size.context]
        tables = np.zeros((len(blocks), max(blocks)), np.int32)
        free = random.permutation(sum(blocks))
        for request, count in enumerate(blocks):
            tables[request, :count], free = free[:count], free[count:]
        self.tables = jnp.asarray(tables)
        self.cache = random.normal(sum(blocks), size.block, size.latent + 64)
        self.projection = random.normal(size.latent, size.heads, 256, size=size.latent**-0.5)
        self.q = random.normal(sum(size.new), size.heads, 192)
        self.own = random.normal(sum(size.new), size.latent + 64)
        self.cu, self.lengths = _prefix_sums(size.new), jnp.asarray(size.context, jnp.int32)
        self._forward = jax.jit(self._run)

    @property
    def shapes(self) -> str:
        size = self.size
        return (
            f"{len(size.new)} requests, new tokens {list(size.new)}, contexts {list(size.context)} in chunks of "
            f"{size.workspace}, {size.heads} heads, output {self.output.scale_layout}"
        )

    def step(self) -> Any:
        return self._forward(self.q, self.own, self.cache, self.cu, self.lengths)

    def _run(self, q: jax.Array, own: jax.Array, cache: jax.Array, cu: jax.Array, lengths: jax.Array) -> Any:
        k, v = self._expand(own)
        return fp8attn.mla_prefill_chunked(
            q,
            k,
            v,
            fp8attn.paged_latent_loader(cache, self.tables, self.projection),
            cu_seqlens=cu,
            context_lengths=lengths,
            workspace_tokens=self.size.workspace,
            output_quant=self.output,
            return_lse=True,
        )

    def _expand(self, rows: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """Latent rows to keys and values."""
        latent = self.size.latent
        kv = jnp.einsum("tl,lhd->thd", rows[:, :latent], self.projection, preferred_element_type=jnp.float32)
        kv = kv.astype(BF16)
        return (kv[..., :128], rows[:, latent:]), kv[..., 128:]

    def check(self, result: Any) -> Iterator[Check]:
        """The last rows of every request over all its keys: bottom-right alignment makes them a call of their own."""
        out, lse = result
        size, cu = self.size, np.asarray(self.cu)
        rows = [min(16, n) for n in size.new]
        picked = np.concatenate([np.arange(cu[b + 1] - r, cu[b + 1]) for b, r in enumerate(rows)])
        keys = []
        for request, context in enumerate(size.context):
            position = np.arange(context)
            cached = self.cache[self.tables[request, position // size.block], position % size.block]
            keys.append(jnp.concatenate([cached, self.own[cu[request] : cu[request + 1]]]))
        k, v = self._expand(jnp.concatenate(keys))
        want, want_lse = fp8attn.mla_prefill(
            self.q[picked],
            k,
            v,
            cu_seqlens_q=_prefix_sums(rows),
            cu_seqlens_k=_prefix_sums(map(len, keys)),
            return_lse=True,
            out_dtype=jnp.float32,
            implementation="reference",
        )
        rounded = fp8attn.quantize_fp8(want, self.output).dequantize()
        # P rounded to e4m3 costs 0.03 at most; the rounding of the output comes on top
        bound = 0.03 + testing.relative_error(rounded, want)
        yield Check("out, dequantised", testing.relative_error(out.dequantize()[picked], want), bound)
        yield Check("lse", _largest_difference(np.asarray(lse)[:, picked], want_lse), 0.02)
        padding = np.asarray(out.scales)[:, sum(size.new) :]
        yield Check("padding words that are not zero", float(np.count_nonzero(padding)), 0.0)

    def explain(self) -> tuple[dispatch.Explanation, ...]:
        k, v = jax.eval_shape(self._expand, self.own)
        return (fp8attn.explain("mla_prefill", self.q, k, v, output_quant=self.output),)


@dataclasses.dataclass(frozen=True)
class SparseSizes:
    tokens: int
    before: int  # tokens of earlier chunks
    heads: int
    topk: int
    window: int = 128
    ratio: int = 4


class SparseLayer:
    """The second chunk of a request: compressed rows chosen by top-k, then the sliding window."""

    title = "DeepSeek-V4: sparse prefill over FP8 rows"
    small = SparseSizes(64, 512, 16, 96, window=32)
    real = SparseSizes(4096, 65536, 64, 512)

    def __init__(self, seed: int, full: bool) -> None:
        self.size = size = self.real if full else self.small
        random = _Random(seed)
        self.compressed = (size.before + size.tokens) // size.ratio
        self.prefix = fp8attn.quantize_latent(random.normal(self.compressed + size.window, 512))
        self.extend = fp8attn.quantize_latent(random.normal(size.tokens, 512))
        self.q = random.normal(size.tokens, size.heads, 512)
        self.sink = random.normal(size.heads, dtype=jnp.float32)
        self.lists = self._lists(random)
        self._forward = jax.jit(self._run)

    def _lists(self, random: _Random) -> tuple[jax.Array, ...]:
        """Prefix: top-k compressed rows (random) and window rows of earlier chunks; extend: this chunk's window."""
        size = self.size
        width = size.topk + size.window - 1
        prefix, window = np.full((size.tokens, width), -1), np.full((size.tokens, size.window), -1)
        for t in range(size.tokens):
            chosen = random.permutation(min((size.before + t + 1) // size.ratio, self.compressed))[: size.topk]
            earlier = np.arange(max(0, size.window - 1 - t)) + self.compressed + t
            prefix[t, : len(chosen)] = chosen
            prefix[t, size.topk : size.topk + len(earlier)] = earlier
            own = np.arange(max(0, t - size.window + 1), t + 1)
            window[t, : len(own)] = own
        lengths = np.full(size.tokens, width), (window >= 0).sum(1)
        return tuple(jnp.asarray(x, jnp.int32) for x in (prefix, lengths[0], window, lengths[1]))

    @property
    def shapes(self) -> str:
        size = self.size
        return (
            f"{size.tokens} tokens after {size.before}, {size.heads} heads, top {size.topk} of {self.compressed} "
            f"compressed rows + window {size.window}, pool of {self.prefix.shape[0]} FP8 rows, sinks"
        )

    def step(self) -> Any:
        return self._forward(self.q, self.prefix, self.extend, self.lists)

    def _run(self, q: jax.Array, prefix: Any, extend: Any, lists: tuple[jax.Array, ...], **options: Any) -> Any:
        indices, lengths, window, window_lengths = lists
        return fp8attn.sparse_prefill_topk(
            q, prefix, indices, lengths, extend, window, window_lengths, attn_sink=self.sink, return_lse=True, **options
        )

    def check(self, result: Any) -> Iterator[Check]:
        picked = np.unique(np.linspace(0, self.size.tokens - 1, 64).astype(int))
        lists = tuple(x[picked] for x in self.lists)
        options = {"out_dtype": jnp.float32, "implementation": "reference"}
        want, want_lse = self._run(self.q[picked], self.prefix, self.extend, lists, **options)
        yield Check("out, worst row", float(testing.row_relative_l2(result[0][picked], want).max()), 6e-3)
        yield Check("lse", _largest_difference(np.asarray(result[1])[:, picked], want_lse), 1e-3)

    def explain(self) -> tuple[dispatch.Explanation, ...]:
        indices, lengths, window, window_lengths = self.lists
        arguments = self.q, self.prefix, indices, lengths, self.extend, window, window_lengths
        return (fp8attn.explain("sparse_prefill_topk", *arguments, attn_sink=self.sink),)


@dataclasses.dataclass(frozen=True)
class GdnSizes:
    chunks: tuple[tuple[int, ...], tuple[int, ...]]  # tokens of each request in each chunk
    key_heads: int
    value_heads: int
    pool: int
    width: int = 128


class GdnLayer:
    """Two chunks over a state pool: requests start in the first and go on, or rest, in the second."""

    title = "Qwen3-Next: gated delta net with a state pool"
    small = GdnSizes(((150, 64, 42), (100, 0, 33)), 2, 4, 8)
    real = GdnSizes(((4096, 2048, 2048), (4096, 0, 1000)), 4, 16, 64)

    def __init__(self, seed: int, full: bool) -> None:
        self.size = size = self.real if full else self.small
        random = _Random(seed)
        row = (2 * size.key_heads + size.value_heads) * size.width
        heads = size.value_heads
        self.parts = [(random.normal(sum(c), row), *(random.normal(sum(c), heads) for _ in "ab")) for c in size.chunks]
        self.gates = random.normal(heads, dtype=jnp.float32), random.normal(heads, dtype=jnp.float32)
        self.pool = random.normal(size.pool, heads, size.width, size.width, dtype=jnp.float32)
        self.slots = jnp.asarray(random.permutation(size.pool)[: len(size.chunks[0])], jnp.int32)
        self.heads = {"num_q_heads": size.key_heads, "num_k_heads": size.key_heads, "num_v_heads": heads}
        self._forward = jax.jit(self._run)

    @property
    def shapes(self) -> str:
        size = self.size
        return (
            f"chunks {[list(c) for c in size.chunks]}, {size.key_heads} key and {size.value_heads} value heads of "
            f"{size.width}, pool of {size.pool} float32 states"
        )

    def step(self) -> Any:
        return self._forward(self.pool, self.parts)

    def _run(self, pool: jax.Array, parts: Any) -> Any:
        outputs = []
        for number, (part, lengths) in enumerate(zip(parts, self.size.chunks, strict=True)):
            started = jnp.full(len(lengths), number > 0)
            cu = _prefix_sums(lengths)
            o, pool = fp8attn.gdn_prefill_pool(
                *part, *self.gates, pool, self.slots, started, cu_seqlens=cu, **self.heads
            )
            outputs.append(o)
        return outputs, pool

    def check(self, result: Any) -> Iterator[Check]:
        """Both chunks of each request in one pass of the oracle, token by token."""
        outputs, pool = result
        for request in range(len(self.slots)):
            spans = [np.cumsum([0, *lengths])[request : request + 2] for lengths in self.size.chunks]
            joined = [
                jnp.concatenate([p[i][a:b] for p, (a, b) in zip(self.parts, spans, strict=True)]) for i in range(3)
            ]
            got = jnp.concatenate([o[a:b] for o, (a, b) in zip(outputs, spans, strict=True)])
            want, state = self._oracle(*joined)
            yield Check(f"request {request}: o", testing.relative_error(got, want), 6e-3)
            yield Check(f"request {request}: state", testing.relative_error(pool[self.slots[request]], state), 6e-3)
        others = np.setdiff1d(np.arange(self.size.pool), np.asarray(self.slots))
        changed = np.count_nonzero(np.asarray(pool)[others] != np.asarray(self.pool)[others])
        yield Check("numbers changed in other pool rows", float(changed), 0.0)

    def _oracle(self, qkv: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(o, state) of one request from a zero state."""
        none = jnp.zeros((1, *self.pool.shape[1:]), jnp.float32), jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)
        cu = _prefix_sums([qkv.shape[0]])
        o, pool = fp8attn.gdn_prefill_pool(
            qkv.astype(jnp.float32), a, b, *self.gates, *none, cu_seqlens=cu, implementation="reference", **self.heads
        )
        return o, pool[0]

    def explain(self) -> tuple[dispatch.Explanation, ...]:
        cu = _prefix_sums(self.size.chunks[0])
        started = jnp.zeros(len(self.slots), bool)
        arguments = *self.parts[0], *self.gates, self.pool, self.slots, started
        return (fp8attn.explain("gdn_prefill_pool", *arguments, cu_seqlens=cu, **self.heads),)


LAYERS: dict[str, type[Layer]] = {"mla": MlaLayer, "sparse": SparseLayer, "gdn": GdnLayer}
