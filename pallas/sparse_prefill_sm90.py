"""``sparse_prefill`` on Hopper: 64 heads of a token against its rows, in blocks of 64, two consumers and a producer.

The producer gathers the rows of a block by their numbers, FP8 rows through registers and a block ahead, and writes them
as bf16 into one of two slots of shared memory: what a consumer scores is what both weigh. A consumer has every other
block: it scores the block's rows and publishes their probabilities. Each consumer multiplies all probabilities with its
half of the 512 columns. The maximum in use stays while no probability exceeds 2^8, so that sums are seldom rescaled.

Both pools go into one softmax: first the blocks of the prefix, then those of the extend rows. A block of threads works
off several tiles, a tile being a token and 64 heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas import sparse_narrow_sm90
from jax_fp8attn.pallas.common import configs, hopper, latent_rows
from jax_fp8attn.pallas.common.backend import varying_like
from jax_fp8attn.pallas.common.hopper import full_row, spread
from jax_fp8attn.pallas.common.latent_rows import HALF, ROWS, TILES, Gather
from jax_fp8attn.pallas.common.sparse_tiles import (
    LN2,
    SLACK,
    Operands,
    Tile,
    gather_of,
    groups_of,
    operands_of,
    row_numbers,
    tile_of,
    without_tokens,
)

from jax_fp8attn.dispatch import Device
from jax_fp8attn.latent import WIDTH
from jax_fp8attn.problems import SparseArrays, SparseProblem
from jax_fp8attn.quantize import E4M3

HEADS = 64  # of a tile
CONSUMERS, SLOTS = 2, 2  # blocks of a slot are scored by one consumer
BF16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class SparseConfig:
    """How a block works.

    producer   a warpgroup of its own gathers the rows; else each consumer does for the columns that it weighs
    registers  of a consumer's and of the producer's thread; without a producer consumers have what the compiler gives
    blocks     that work off all tiles one after the other, the next tile's rows loaded ahead; 0: a block a tile
    halves     the producer stores, publishes and loads again FP8 rows by halves of their columns; else whole rows
    """

    producer: bool = True
    registers: tuple[int, int] = (192, 120)
    blocks: int = configs.MULTIPROCESSORS
    halves: bool = True

    def __post_init__(self) -> None:
        if not configs.registers_fit(CONSUMERS, self.registers):
            raise ValueError(f"registers must be multiples of 8 and fit into what a launch gives: {self}")

    @property
    def shared_memory(self) -> int:
        """Bytes of a block, barriers apart."""
        rows = (1 + SLOTS) * ROWS * WIDTH * 2
        return rows + CONSUMERS * (HEADS * ROWS * 2 + 3 * HEADS * 4 + ROWS * 4) + HEADS * 4


def default_config(problem: SparseProblem) -> SparseConfig:
    """A producer of its own where the assembler keeps setmaxnreg: jax 0.12 assembles through nvJitLink, which drops
    it. FP8 rows pass through the producer's registers."""
    registers = (192, 120) if problem.prefix.form.dtype == E4M3 else (216, 72)
    return SparseConfig(producer=jax.__version_info__ < (0, 12), registers=registers)


def supports(problem: SparseProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if device.compute_capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, the device has {device.compute_capability}")
    forms = {pool.form for pool in (problem.prefix, problem.extend) if pool is not None}
    if any(form.dtype not in (E4M3, BF16) for form in forms):
        reasons.append("rows must be FP8 or bfloat16")
    if len(forms) > 1:
        reasons.append("both pools must have one form: dtype, numbers a scale and dtype of the scales")
    return tuple(reasons)


def run(problem: SparseProblem, arrays: SparseArrays) -> Any:
    """Few heads have a kernel of their own: they would fill a part of a tile."""
    if problem.heads <= sparse_narrow_sm90.HEADS:
        return sparse_narrow_sm90.run(problem, arrays)
    return build(problem, default_config(problem))(arrays)


def build(problem: SparseProblem, config: SparseConfig, interpret: Any = None) -> Callable[[SparseArrays], Any]:
    """The op for one problem as a function of its arrays."""

    @jax.enable_x64(False)
    def op(arrays: SparseArrays) -> Any:
        if not problem.tokens:
            return without_tokens(problem)
        kernel = _Kernel(problem, config, interpret)
        out, *lse = varying_like(arrays, kernel.call(operands_of(problem, arrays, HEADS)))
        if not problem.return_lse:
            return out
        return out, lse[0].reshape(problem.tokens, -1)[:, : problem.heads].T

    return op


class _Shared(NamedTuple):
    """Shared memory and barriers, by role."""

    q: tuple[Any, Any]  # [8, 64, 64], what copies write and what wgmma reads; results stand in the same memory
    out: Any  # [8, 64, columns]
    rows: Any  # [slots, 8, 64, 64]
    p: Any  # [2, 64, 64]: probabilities of the latest block of each consumer
    shrink: Any  # [2, 64]: by what that block makes all sums smaller
    top: Any  # [2, 64]: the maximum in use from that block on
    sums: Any  # [2, 64]
    valid: Any  # int32 [slots, 64]
    lse: Any  # [64]
    q_there: Any
    there: Any  # [2 * slots]: halves of a slot
    p_there: Any  # [2]
    sums_there: Any
    free: Any = None  # [2 * slots]: a consumer is done with its half. Without a producer nobody asks


class _Softmax(NamedTuple):
    """The running softmax of 64 heads; sums are in units of 2^top."""

    out: Any  # [64, 256]
    top: Any  # [64] in base 2
    total: Any  # [64, 8]: columns still to be added, of the consumer's own blocks


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: SparseProblem
    config: SparseConfig
    interpret: Any

    @property
    def plain(self) -> bool:
        return self.interpret is not None

    @property
    def groups(self) -> int:
        return groups_of(self.problem, HEADS)

    @property
    def tiles(self) -> int:
        return self.problem.tokens * self.groups

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        return min(self.config.blocks or self.tiles, self.tiles)

    def gather(self, gmem: Operands) -> Gather:
        return gather_of(self.problem, gmem, self.plain)

    def call(self, operands: Operands) -> list[jax.Array]:
        problem = self.problem
        options = {} if self.interpret is None else {"interpret": self.interpret}
        given, tree = jax.tree.flatten(operands)
        results = [jax.ShapeDtypeStruct((problem.tokens, problem.heads, WIDTH), problem.out_dtype)]
        if problem.return_lse:
            results.append(jax.ShapeDtypeStruct((problem.tokens, self.groups, HEADS), jnp.float32))

        def fp8attn_sparse_prefill_sm90(*refs: Any) -> None:
            gmem = jax.tree.unflatten(tree, refs[: len(given)])
            self._body(gmem, refs[len(given) : len(given) + len(results)], iter(refs[len(given) + len(results) :]))

        return plgpu.kernel(
            fp8attn_sparse_prefill_sm90,
            out_type=results,
            grid=(self.blocks,),
            grid_names=("block",),
            num_threads=CONSUMERS + self.config.producer,
            thread_name="warpgroup",
            scratch_types=self._scratch(),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            **options,
        )(*given)

    def _scratch(self) -> list[Any]:
        floats = lambda *shape: plgpu.SMEM(shape, jnp.float32)
        barrier = lambda arrivals, count: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
        q = hopper.rows_anywhere((2 * TILES, ROWS, 64), BF16, 128, self.plain)
        out = hopper.rows_out(2 * TILES, ROWS, self.problem.out_dtype, self.plain)
        loaded = 1 if self.problem.q.dtype == E4M3 else TILES
        return [
            *([q, out] if self.plain else [plgpu.RefUnion(*q.refs, out)]),
            hopper.tiles((SLOTS, 2 * TILES, ROWS, 64), BF16, 128),
            hopper.tiles((CONSUMERS, HEADS, ROWS), BF16, 128),
            *[floats(CONSUMERS, HEADS)] * 3,
            plgpu.SMEM((SLOTS, ROWS), jnp.int32),
            floats(HEADS),
            barrier(CONSUMERS * loaded, 1),
            barrier(1, 2 * SLOTS),
            barrier(1, CONSUMERS),
            barrier(CONSUMERS, 1),
            *([barrier(1, 2 * SLOTS)] if self.config.producer else []),
        ]

    def _shared(self, given: Iterator[Any]) -> _Shared:
        first = next(given)
        q, out = ((first, first), next(given)) if self.plain else (tuple(first)[:2], tuple(first)[2])
        return _Shared(q, out, *given)

    def _body(self, gmem: Operands, results: Any, scratch: Iterator[Any]) -> None:
        smem, warpgroup = self._shared(scratch), lax.axis_index("warpgroup")
        for number in range(CONSUMERS):

            @pl.when(warpgroup == number)
            def consumer(number: int = number) -> None:
                own = _Consumer(self, gmem, smem, results, number)
                if self.config.producer:
                    plgpu.set_max_registers(self.config.registers[0], action="increase")
                    for slot in range(SLOTS):
                        own.release(slot)
                self._each_tile(gmem, own.attend)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if self.config.producer:

            @pl.when(warpgroup == CONSUMERS)
            def producer() -> None:
                plgpu.set_max_registers(self.config.registers[1], action="decrease")
                own = _Producer(self, gmem, smem)
                self._each_tile(gmem, own.stream if own.gather.fp8 else own.stream_copies)
                if self.plain:  # which wants every release to be seen
                    for half in range(2 * SLOTS):
                        plgpu.barrier_wait(smem.free.at[half])

    def _each_tile(self, gmem: Operands, work: Callable[[Tile], None]) -> None:
        @pl.loop(lax.axis_index("block"), self.tiles, step=self.blocks)
        def one(number: Any) -> None:
            work(self._tile(gmem, number))

    def _tile(self, gmem: Operands, number: Any) -> Tile:
        return tile_of(self.problem, gmem.lists, number, self.groups)


@dataclasses.dataclass(frozen=True)
class _Producer:
    """Fills the slots."""

    kernel: _Kernel
    gmem: Operands
    smem: _Shared

    @property
    def gather(self) -> Gather:
        return self.kernel.gather(self.gmem)

    def numbers(self, tile: Tile, block: Any) -> tuple[Any, Any]:
        return row_numbers(self.kernel.problem, self.gmem, tile, block, self.kernel.plain)

    def stream(self, tile: Tile) -> None:
        """FP8 rows: those of the next block are on their way to registers while this one's are stored."""
        gather, smem, halves = self.gather, self.smem, self.kernel.config.halves
        numbers, pool = self.numbers(tile, 0)
        first, second = (gather.load(numbers, pool, half) for half in range(2))
        scales = gather.load_scales(numbers, pool)
        following, following_pool = self.numbers(tile, 1)

        def block(number: Any, carry: Any) -> Any:
            numbers, following, pool, first, second, scales = carry
            slot = lax.rem(number, SLOTS)
            target = smem.rows.at[slot]
            self._wait(slot, 0)
            latent_rows.note_valid(numbers, smem.valid.at[slot], self.kernel.plain)
            gather.store(first, scales, target, 0)
            if halves:
                self._publish(slot, 0)
                first = gather.load(following, pool, 0)
            self._wait(slot, 1)
            gather.store(second, scales, target, 1)
            self._publish(slot, 1)
            if not halves:
                plgpu.barrier_arrive(smem.there.at[2 * slot])
                first = gather.load(following, pool, 0)
            second, scales = gather.load(following, pool, 1), gather.load_scales(following, pool)
            after, after_pool = self.numbers(tile, number + 2)  # asked for last: all registers are taken before
            return following, after, after_pool, first, second, scales

        lax.fori_loop(0, tile.blocks, block, (numbers, following, following_pool, first, second, scales))

    def stream_copies(self, tile: Tile) -> None:
        """bf16 rows, half after half."""
        gather, smem = self.gather, self.smem

        def block(number: Any, carry: Any) -> Any:
            numbers, pool = carry
            slot = lax.rem(number, SLOTS)
            self._wait(slot, 0)
            latent_rows.note_valid(numbers, smem.valid.at[slot], self.kernel.plain)
            gather.copy(numbers, pool, smem.rows.at[slot], 0)
            following = self.numbers(tile, number + 1)
            self._wait(slot, 1)
            gather.copy(numbers, pool, smem.rows.at[slot], 1)
            for half in range(2):
                gather.wait(1 - half)
                self._publish(slot, half)
            return following

        lax.fori_loop(0, tile.blocks, block, self.numbers(tile, 0))

    def _wait(self, slot: Any, half: int) -> None:
        plgpu.barrier_wait(self.smem.free.at[2 * slot + half])

    def _publish(self, slot: Any, half: int) -> None:
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.smem.there.at[2 * slot + half])


class _Rows(NamedTuple):
    """Of the block that is filled next, and of the one behind it."""

    numbers: Any
    pool: Any
    following: Any
    following_pool: Any
    loaded: Any  # in registers; None where there are none


@dataclasses.dataclass(frozen=True)
class _Filler:
    """Without a producer: the half of the columns that a consumer weighs. Its slots are free when it has weighed."""

    producer: _Producer
    tile: Tile
    half: int

    def begin(self) -> _Rows:
        """Fills both slots."""
        rows = self.load(_Rows(*self.producer.numbers(self.tile, 0), *self.producer.numbers(self.tile, 1), None))
        rows = self.fill(0, rows)
        self.publish(0)
        return self.fill(1, self.load(rows))

    def load(self, rows: _Rows) -> _Rows:
        """FP8 rows to registers."""
        gather = self.producer.gather
        if not gather.fp8:
            return rows
        given = rows.numbers, rows.pool
        return rows._replace(loaded=(gather.load(*given, self.half), gather.load_scales(*given)))

    def fill(self, number: Any, rows: _Rows) -> _Rows:
        """Block ``number`` into its slot; bf16 rows are there at ``publish``. Returns the next one's, to be loaded."""
        # read again: the scalars of a tile would take registers through the loop
        tile = self.producer.kernel._tile(self.producer.gmem, self.tile.number)
        after = self.producer.numbers(tile, number + 2)
        producer, slot = self.producer, lax.rem(number, SLOTS)
        if self.half == 0:
            latent_rows.note_valid(rows.numbers, producer.smem.valid.at[slot], producer.kernel.plain)
        target = producer.smem.rows.at[slot]
        if producer.gather.fp8:
            producer.gather.store(*rows.loaded, target, self.half)
            self._arrive(number)
        else:
            producer.gather.copy(rows.numbers, rows.pool, target, self.half)
        return _Rows(rows.following, rows.following_pool, *after, None)

    def publish(self, number: Any) -> None:
        """Called once for each block that has been filled, before the next."""
        if not self.producer.gather.fp8:
            self.producer.gather.wait(0)
            self._arrive(number)

    def _arrive(self, number: Any) -> None:
        plgpu.commit_smem()
        barrier = self.producer.smem.there.at[SLOTS * lax.rem(number, SLOTS) + self.half]
        pl.when(number < self.tile.blocks)(lambda: plgpu.barrier_arrive(barrier))


@dataclasses.dataclass(frozen=True)
class _Consumer:
    """Scores every other block and weighs half of the columns of all."""

    kernel: _Kernel
    gmem: Operands
    smem: _Shared
    results: Any
    number: int

    @property
    def other(self) -> int:
        return 1 - self.number

    def attend(self, tile: Tile) -> None:
        self._load_queries(tile)
        filler = rows = None
        if not self.kernel.config.producer:
            filler = _Filler(_Producer(self.kernel, self.gmem, self.smem), tile, self.number)
            rows = filler.begin()
        scale = self.gmem.scale[tile.instance]
        zeros = plgpu.layout_cast(jnp.zeros((HEADS, HALF), jnp.float32), hopper.ACCUMULATOR)
        state = _Softmax(zeros, full_row(-jnp.inf, HEADS), hopper.no_sum(HEADS))
        plgpu.barrier_wait(self.smem.q_there.at[0])

        def step(turn: Any, carry: tuple[_Softmax, Any]) -> tuple[_Softmax, Any]:
            """An own block, and the one before."""
            state, rows = carry
            number = turn * CONSUMERS + self.number
            pending, state = self._start_other(state)
            if filler:
                filler.publish(number)
            scores = self._start_scores()
            state = self._end(pending, self.other, state, younger=1)
            rows = filler.fill(number + 1, rows) if filler else None
            return own(number, self._settled(scores), state, rows)

        def own(number: Any, scores: Any, state: _Softmax, rows: Any) -> tuple[_Softmax, Any]:
            if filler:
                filler.publish(number + 1)
            state = self._publish(scale, scores, state)
            pending = self._start_values(self.number, state.out)
            rows = filler.load(rows) if filler else None  # scores have left their registers
            state = self._end(pending, self.number, state)
            return state, filler.load(filler.fill(number + 2, rows)) if filler else None

        turns = lax.div(tile.blocks - self.number + 1, CONSUMERS)  # of own blocks
        if self.number == 0:
            carry = own(0, self._settled(self._start_scores()), state, rows)
            state, _ = lax.fori_loop(1, turns, step, carry)
        else:
            state, _ = lax.fori_loop(0, turns, step, (state, filler.load(rows) if filler else None))
        last = lax.rem(tile.blocks, CONSUMERS) == self.number
        tile = self.kernel._tile(self.gmem, tile.number)
        self._finish(tile, lax.cond(last, self._weigh_other, lambda state: state, state))

    def _load_queries(self, tile: Tile) -> None:
        """This consumer's half of the columns."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # results of the tile before stand there
        smem, kernel = self.smem, self.kernel
        first = tile.group * HEADS
        if kernel.problem.q.dtype == E4M3:
            gather = Gather(kernel.problem.q, (self.gmem.q,), kernel.plain)
            count = jnp.minimum(kernel.problem.heads - first, HEADS)
            numbers = latent_rows.following(tile.token * kernel.problem.heads + first, count, kernel.plain)
            pool = tile.token * 0
            loaded, scales = gather.load(numbers, pool, self.number), gather.load_scales(numbers, pool)
            gather.store(loaded, scales, smem.q[1], self.number)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem.q_there.at[0])
            return
        for part in range(TILES * self.number, TILES * (self.number + 1)):
            source = self.gmem.q.nope.at[tile.token, pl.ds(first, HEADS), pl.ds(64 * part, 64)]
            plgpu.copy_gmem_to_smem(source, smem.q[0].at[part], smem.q_there.at[0])

    def _start_scores(self) -> Any:
        """[64, 64] of the rows in this consumer's slot."""
        smem = self.smem
        for half in range(2):
            plgpu.barrier_wait(smem.there.at[2 * self.number + half])
        q, rows = smem.q[1], smem.rows.at[self.number]
        if self.kernel.plain:
            wide = [[x[n].astype(jnp.float32) for n in range(2 * TILES)] for x in (q, rows)]
            scores = sum(jnp.dot(a, b.T) for a, b in zip(*wide, strict=True))
            plgpu.commit_smem()
            return scores
        return hopper.start((HEADS, ROWS), [(q, rows, 128)])

    def _publish(self, scale: Any, scores: Any, state: _Softmax) -> _Softmax:
        """Probabilities of an own block, and what they do to the sums."""
        smem, me = self.smem, self.number
        valid = plgpu.load(smem.valid.at[me], layout=hopper.ACCUMULATOR.reduce(0), optimized=False)
        valid = lax.broadcast_in_dim(valid, scores.shape, [1])
        scores = jnp.where(valid != 0, scores * scale, -jnp.inf)
        largest = hopper.row_max([scores])
        top = jnp.where(largest > state.top + SLACK, largest, state.top)
        anchor = jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(state.top - anchor)
        weights = jnp.exp2(scores - spread(anchor, scores))
        smem.p.at[me][...] = weights.astype(BF16)
        smem.shrink.at[me][...] = shrink
        smem.top.at[me][...] = top
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.p_there.at[me])
        total = state.total * spread(shrink, state.total) + hopper.partial_sum([weights])
        return _Softmax(self._shrunk(state.out, shrink), top, total)

    def _weigh_other(self, state: _Softmax) -> _Softmax:
        pending, state = self._start_other(state)
        return self._end(pending, self.other, state)

    def _start_other(self, state: _Softmax) -> tuple[Any, _Softmax]:
        """The other consumer's latest block."""
        smem, other = self.smem, self.other
        plgpu.barrier_wait(smem.p_there.at[other])
        shrink = self.row(smem.shrink.at[other])
        pending = self._start_values(other, self._shrunk(state.out, shrink))
        return pending, _Softmax(None, self.row(smem.top.at[other]), state.total * spread(shrink, state.total))

    def _end(self, pending: Any, slot: int, state: _Softmax, younger: int = 0) -> _Softmax:
        out = self._settled(pending, younger)
        if self.kernel.config.producer:
            self.release(slot)
        return state._replace(out=out)

    def release(self, slot: int) -> None:
        plgpu.barrier_arrive(self.smem.free.at[2 * slot + self.number])

    def _start_values(self, slot: int, out: Any) -> Any:
        """``out`` and what the block in a slot adds to it."""
        smem, first = self.smem, TILES * self.number
        if self.kernel.plain:
            rows = jnp.concatenate([smem.rows[slot, first + n].astype(jnp.float32) for n in range(TILES)], axis=1)
            out = out + jnp.dot(smem.p[slot].astype(jnp.float32), rows)
            plgpu.commit_smem()
            return out
        values = smem.rows.at[slot, pl.ds(first, TILES)]
        return hopper.start((HEADS, HALF), [(smem.p.at[slot], values, 128)], out)

    def _settled(self, pending: Any, younger: int = 0) -> Any:
        return pending if self.kernel.plain else hopper.settled(pending, younger)

    def _shrunk(self, out: Any, shrink: Any) -> Any:
        return out * spread(shrink, out) if self.kernel.plain else hopper.shrunk(out, shrink)

    @staticmethod
    def row(ref: Any) -> Any:
        """A number a head."""
        return plgpu.load(ref, layout=hopper.ROW, optimized=False)

    def _total(self) -> Any:
        return self.row(self.smem.sums.at[0]) + self.row(self.smem.sums.at[1])

    def _finish(self, tile: Tile, state: _Softmax) -> None:
        """Adds up the sums of both consumers, divides and stores."""
        smem, me = self.smem, self.number
        smem.sums.at[me][...] = state.total.sum(axis=1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.sums_there.at[0])
        plgpu.barrier_wait(smem.sums_there.at[0])
        total = self._total()
        nothing = total == 0.0
        anchor = jnp.where(nothing, 0.0, state.top)
        divisor = jnp.where(nothing, 1.0, total)
        if self.kernel.problem.has_sink:
            divisor = divisor + jnp.exp2(self.row(self.gmem.sink.at[tile.instance, tile.group]) - anchor)
        weight = jnp.where(nothing, 0.0, 1.0 / divisor)
        value = state.out * spread(weight, state.out)
        if self.kernel.problem.return_lse and me == 0:
            lse = anchor * LN2 + jnp.log(jnp.where(nothing, 1.0, total))
            smem.lse[...] = jnp.where(nothing, -jnp.inf, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.lse, self.results[1].at[tile.token, tile.group], commit_group=False)
        self._store(tile, value)

    def _store(self, tile: Tile, value: Any) -> None:
        """Through shared memory, four pieces of 128 bytes a row at a time."""
        dtype = self.kernel.problem.out_dtype
        columns = 128 // dtype.itemsize
        for first in range(0, HALF, TILES * columns):
            if first:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n in range(TILES):
                part = value[:, first + n * columns : first + (n + 1) * columns]
                self.smem.out.at[TILES * self.number + n][...] = part.astype(dtype)
            plgpu.commit_smem()
            self._copy_out(tile, first, columns)
            plgpu.commit_smem_to_gmem_group()

    def _copy_out(self, tile: Tile, first: int, columns: int) -> None:
        """Of the last tile of a token only the heads that there are."""
        heads, groups = self.kernel.problem.heads, self.kernel.groups

        def copy(count: int) -> None:
            for n in range(TILES):
                source = self.smem.out.at[TILES * self.number + n].at[pl.ds(0, count)]
                column = HALF * self.number + first + n * columns
                target = self.results[0].at[tile.token, pl.ds(tile.group * HEADS, count), pl.ds(column, columns)]
                plgpu.copy_smem_to_gmem(source, target, commit_group=False)

        rest = heads - (groups - 1) * HEADS
        if rest == HEADS:
            copy(HEADS)
        elif groups == 1:
            copy(rest)
        else:
            pl.when(tile.group < groups - 1)(lambda: copy(HEADS))
            pl.when(tile.group == groups - 1)(lambda: copy(rest))
