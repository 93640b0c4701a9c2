"""``sparse_prefill`` on Hopper for few heads: a token's rows on M, its heads on N, a warpgroup a token.

A warpgroup gathers the rows of a block of 64 into registers, some parts ahead of their use. There they are the first
operand of the scores; beside those products they go to shared memory as bf16, from where their transposes are the
first operand of the results. Rows and heads change sides in both products, so that 8 heads cost what they are, and
nothing is exchanged between warpgroups. Several blocks of threads on a multiprocessor hide what one of them waits for.

Maxima and sums run down the rows. The maximum in use stays while no probability exceeds 2^8, so that sums are seldom
rescaled. Both pools go into one softmax: first the blocks of the prefix, then those of the extend rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import head_columns, hopper, latent_rows
from jax_fp8attn.pallas.common.backend import varying_like
from jax_fp8attn.pallas.common.head_columns import COLUMN, full, spread
from jax_fp8attn.pallas.common.latent_rows import PARTS, ROWS, Gather
from jax_fp8attn.pallas.common.sparse_tiles import (
    LN2,
    SLACK,
    Operands,
    Tile,
    gather_of,
    operands_of,
    row_numbers,
    tile_of,
    without_tokens,
)

from jax_fp8attn.latent import WIDTH
from jax_fp8attn.problems import SparseArrays, SparseProblem
from jax_fp8attn.quantize import E4M3

HEADS = 32  # at most
BF16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class NarrowConfig:
    """How a block of threads works.

    ahead   parts of 64 columns of the rows that are in registers, or on their way there, before they are used
    early   a block's first parts are asked for beside the scores of the block before, as registers become free; else
            beside its results, behind the fence that these need, which may wait for loads
    depth   parts whose scores may be under way while the next part becomes an operand: 1, 2, 4 or 8
    blocks  of threads, that work off all tokens one after the other; 0: a block a token
    """

    ahead: int = PARTS
    early: bool = False
    depth: int = 2
    blocks: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.ahead <= PARTS or self.depth not in (1, 2, 4, 8):
            raise ValueError(f"1 to {PARTS} parts can be ahead, and 1, 2, 4 or 8 under way: {self}")


# by heads: of FP8 rows with scales per 64, with scales per 32, and of bf16 rows, which are twice as wide
AHEAD = {8: (8, 8, 6), 16: (8, 6, 4), 24: (6, 4, 2), 32: (4, 2, 1)}


def default_config(problem: SparseProblem) -> NarrowConfig:
    """As much as fits into registers beside the results of all heads."""
    heads, form = padded(problem.heads), problem.prefix.form
    kind = 2 if form.dtype != E4M3 else form.scale_group == 32
    return NarrowConfig(AHEAD[heads][kind], depth=2 if heads <= 16 else 1)


def padded(heads: int) -> int:
    """To what products can be wide."""
    return -(-heads // 8) * 8


def run(problem: SparseProblem, arrays: SparseArrays) -> Any:
    return build(problem, default_config(problem))(arrays)


def build(problem: SparseProblem, config: NarrowConfig, interpret: Any = None) -> Callable[[SparseArrays], Any]:
    """The op for one problem as a function of its arrays."""

    @jax.enable_x64(False)
    def op(arrays: SparseArrays) -> Any:
        if not problem.tokens:
            return without_tokens(problem)
        operands = operands_of(problem, arrays, padded(problem.heads))
        nope = operands.q.nope
        operands = operands._replace(q=operands.q._replace(nope=nope.reshape(-1, nope.shape[-1])))
        out, *lse = varying_like(arrays, _Kernel(problem, config, interpret).call(operands))
        return (out, lse[0][:, : problem.heads].T) if problem.return_lse else out

    return op


class _Shared(NamedTuple):
    """Shared memory. Results stand where rows stood."""

    rows: Any  # [8, 64, 64]
    out: Any  # [8 or 16, heads, columns]
    q: Any  # [8, heads, 64], columns in the order of the rows as operands
    p: Any  # [64, 16 or 32]
    top: Any  # [heads] in base 2
    lse: Any  # [heads]


class _Softmax(NamedTuple):
    """The running softmax; sums are in units of 2^top, the maximum in use, which shared memory holds."""

    out: list[Any]  # 8 of [64 columns, heads]
    total: Any  # [heads], of each thread's rows


class _Stream(NamedTuple):
    """The rows of a block, and the numbers of the next block's."""

    numbers: Any
    pool: Any
    following: Any
    following_pool: Any
    loaded: list[Any]  # the first parts
    scales: Any  # None without


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: SparseProblem
    config: NarrowConfig
    interpret: Any

    @property
    def plain(self) -> bool:
        return self.interpret is not None

    @property
    def heads(self) -> int:
        return padded(self.problem.heads)

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        return min(self.config.blocks or self.problem.tokens, self.problem.tokens)

    def call(self, operands: Operands) -> list[jax.Array]:
        problem = self.problem
        options = {} if self.interpret is None else {"interpret": self.interpret}
        given, tree = jax.tree.flatten(operands)
        results = [jax.ShapeDtypeStruct((problem.tokens, problem.heads, WIDTH), problem.out_dtype)]
        if problem.return_lse:
            results.append(jax.ShapeDtypeStruct((problem.tokens, self.heads), jnp.float32))

        def fp8attn_sparse_narrow_sm90(*refs: Any) -> None:
            gmem = jax.tree.unflatten(tree, refs[: len(given)])
            smem = self._shared(refs[len(given) + len(results) :])
            worker = _Worker(self, gmem, smem, refs[len(given) : len(given) + len(results)])

            @pl.loop(lax.axis_index("block"), problem.tokens, step=self.blocks)
            def one(number: Any) -> None:
                worker.attend(tile_of(problem, gmem.lists, number, 1))

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        return plgpu.kernel(
            fp8attn_sparse_narrow_sm90,
            out_type=results,
            grid=(self.blocks,),
            grid_names=("block",),
            scratch_types=self._scratch(),
            compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
            **options,
        )(*given)

    def _scratch(self) -> list[Any]:
        dtype = self.problem.out_dtype
        rows = hopper.tiles((PARTS, ROWS, 64), BF16, 128)
        out = hopper.rows_out(WIDTH * dtype.itemsize // 128, self.heads, dtype, self.plain)
        width = 16 if self.heads <= 16 else 32
        return [
            *([rows, out] if self.plain else [plgpu.RefUnion(rows, out)]),
            hopper.tiles((PARTS, self.heads, 64), BF16, 128),
            hopper.tiles((ROWS, width), BF16, 2 * width),
            *[plgpu.SMEM((self.heads,), jnp.float32)] * 2,
        ]

    def _shared(self, given: Any) -> _Shared:
        return _Shared(*given) if self.plain else _Shared(*tuple(given[0]), *given[1:])


@dataclasses.dataclass(frozen=True)
class _Worker:
    """A warpgroup."""

    kernel: _Kernel
    gmem: Operands
    smem: _Shared
    results: Any

    @property
    def problem(self) -> SparseProblem:
        return self.kernel.problem

    @property
    def gather(self) -> Gather:
        return gather_of(self.problem, self.gmem, self.kernel.plain)

    def attend(self, tile: Tile) -> None:
        stream = self._begin(tile)
        self._load_queries(tile)
        scale, heads = self.gmem.scale[tile.instance], self.kernel.heads
        state = _Softmax([full(0.0, (64, heads))] * PARTS, full(0.0, (heads,)))
        self.smem.top[...] = full(-jnp.inf, (heads,))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results of the token before stand where rows go
        plgpu.commit_smem()

        def block(number: Any, carry: tuple[_Stream, _Softmax]) -> tuple[_Stream, _Softmax]:
            stream, state = carry
            scores, ahead = self._score(stream)
            after = self._numbers(tile, number + 2)
            scores = latent_rows.masked(scores * scale, stream.numbers, self.kernel.plain)
            stream = _Stream(stream.following, stream.following_pool, *after, ahead, None)
            return self._weigh(scores, stream, state)

        _, state = lax.fori_loop(0, tile.blocks, block, (stream, state))
        # read again: the scalars of a tile would take registers through the loop
        self._finish(tile_of(self.problem, self.gmem.lists, tile.number, 1), state)

    def _numbers(self, tile: Tile, block: Any) -> tuple[Any, Any]:
        return row_numbers(self.problem, self.gmem, tile, block, self.kernel.plain)

    def _begin(self, tile: Tile) -> _Stream:
        return self._ask(_Stream(*self._numbers(tile, 0), *self._numbers(tile, 1), [], None))

    def _ask(self, stream: _Stream) -> _Stream:
        """What is not yet on its way of the parts that are ahead."""
        gather, rows = self.gather, (stream.numbers, stream.pool)
        more = [gather.load_part(*rows, part) for part in range(len(stream.loaded), self.kernel.config.ahead)]
        return stream._replace(loaded=[*stream.loaded, *more], scales=gather.load_scales(*rows) if gather.fp8 else None)

    def _load_queries(self, tile: Tile) -> None:
        """Rows of a pool that is the queries; heads that are none become zeros."""
        heads, half = self.problem.heads, PARTS // 2
        own = Gather(self.problem.q, (self.gmem.q,), self.kernel.plain)
        numbers, pool = (
            latent_rows.following(tile.token * heads, heads + tile.token * 0, self.kernel.plain),
            tile.token * 0,
        )
        scales = own.load_scales(numbers, pool) if own.fp8 else None
        for first in (0, half):  # all parts at once would not fit into registers
            loaded = [own.load_part(numbers, pool, part) for part in range(first, first + half)]
            for n, x in enumerate(loaded):
                own.place(x, scales, first + n, self.smem.q.at[first + n], self.gather)

    def _score(self, stream: _Stream) -> tuple[Any, list[Any]]:
        """Products of a block's rows with all heads, [64, heads], and parts of the next block that are on their way."""
        gather, smem, loaded = self.gather, self.smem, list(stream.loaded)
        scores = None
        for part in range(PARTS):
            operand = gather.operand(loaded[part], stream.scales, part)
            gather.keep(operand, smem.rows.at[part], part)
            scores = self._product(operand, smem.q.at[part], scores)
            if (part + 1) % self.kernel.config.depth == 0 and not self.kernel.plain:
                scores = hopper.settled(scores, 0)
            ahead = part + self.kernel.config.ahead
            if ahead < PARTS:
                loaded.append(gather.load_part(stream.numbers, stream.pool, ahead))
            elif self.kernel.config.early:
                loaded.append(gather.load_part(stream.following, stream.following_pool, ahead - PARTS))
        return scores, loaded[PARTS:]

    def _product(self, operand: Any, q: Any, onto: Any) -> Any:
        """Rows times queries. The assembler takes no operand that is computed in front of a wait and used behind it."""
        if self.kernel.plain:
            product = jnp.dot(operand.astype(jnp.float32), q[...].astype(jnp.float32).T)
            return product if onto is None else onto + product
        return hopper.start((ROWS, self.kernel.heads), [(operand, q, 128)], onto, anew=True)

    def _weigh(self, scores: Any, stream: _Stream, state: _Softmax) -> tuple[_Stream, _Softmax]:
        """A block's probabilities, and what its rows add to the results, beside which the next rows are asked for."""
        smem, plain = self.smem, self.kernel.plain
        before, largest = self._top(), scores.max(axis=0)
        top = jnp.where(largest > before + SLACK, largest, before)
        smem.top[...] = top
        anchor = jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(before - anchor)
        weights = jnp.exp2(scores - spread(anchor, scores))
        head_columns.put_weights(weights.astype(BF16), smem.p, plain)
        plgpu.commit_smem()
        total = state.total * shrink + head_columns.partial_sum(weights, plain)
        sums = head_columns.shrunk(state.out, shrink, plain)
        pending = [self._value(part, x) for part, x in enumerate(sums)]
        stream = self._ask(stream)
        out = head_columns.settled(pending, plain)
        head_columns.barrier(plain)  # the next block's rows go where these stand
        return stream, _Softmax(out, total)

    def _top(self) -> Any:
        return plgpu.load(self.smem.top, layout=COLUMN, optimized=False)

    def _value(self, part: int, onto: Any) -> Any:
        """64 columns of the rows, weighed."""
        rows, p, heads = self.smem.rows.at[part], self.smem.p, self.kernel.heads
        if self.kernel.plain:
            return onto + jnp.dot(rows[...].astype(jnp.float32).T, p[:, :heads].astype(jnp.float32))
        return hopper.start((64, heads), [(rows, p, (128, 2 * p.shape[1]))], onto, turned="ab", anew=True)

    def _finish(self, tile: Tile, state: _Softmax) -> None:
        """Adds up, divides and stores."""
        smem, problem, plain = self.smem, self.problem, self.kernel.plain
        total = head_columns.whole_sum(state.total, plain)
        nothing = total == 0.0
        anchor = jnp.where(nothing, 0.0, self._top())
        divisor = jnp.where(nothing, 1.0, total)
        if problem.has_sink:
            sink = plgpu.load(self.gmem.sink.at[tile.instance, 0], layout=COLUMN, optimized=False)
            divisor = divisor + jnp.exp2(sink - anchor)
        weight = jnp.where(nothing, 0.0, 1.0 / divisor)
        for part, sums in enumerate(state.out):
            head_columns.put_results((sums * spread(weight, sums)).astype(problem.out_dtype), smem.out, part, plain)
        if problem.return_lse:
            lse = anchor * LN2 + jnp.log(jnp.where(nothing, 1.0, total))
            smem.lse[...] = jnp.where(nothing, -jnp.inf, lse)
        plgpu.commit_smem()
        if problem.return_lse:
            plgpu.copy_smem_to_gmem(smem.lse, self.results[1].at[tile.token], commit_group=False)
        count, _, columns = smem.out.shape
        for n in range(count):
            source = smem.out.at[n].at[pl.ds(0, problem.heads)]
            target = self.results[0].at[tile.token, :, pl.ds(n * columns, columns)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        plgpu.commit_smem_to_gmem_group()
