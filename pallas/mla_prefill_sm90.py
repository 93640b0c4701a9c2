"""``mla_prefill`` on Hopper: two consumer warpgroups of 64 query rows and a producer, ragged, in FP8 and in bf16.

A block computes one tile: up to 128 query rows of one sequence and one head, against that sequence's keys in blocks
counted from its first key, so that a sequence is computed alike wherever it stands in a batch.

FP8: Hopper's products keep about 13 bits of their sum: each block of keys gets a sum of its own, and the blocks are
added in float32. A consumer computes beside its own products: half of the exponentials of a block beside the scores of
the next one, for which the exponents are put out of the way of the scores (without a producer, all behind the values of
the block before); its largest score beside the products with the values of the block before. V comes transposed and
without NaN, with a list of where they were. Where few tiles meet many keys, the blocks of keys that a tile sees are
split over several tiles of the list, each with float32 rows of its own, and the kernel of ``merge_attn_states`` makes
the result of them.

bf16: a consumer starts the scores of a block of keys and the products with the values of the block before together,
products add to float32 sums, and the consumers take turns with the tensor cores. V comes as it is. A key that a row
does not see has probability 0, and 0 times NaN is NaN: in the blocks that not all rows see the consumers look for NaN
and infinities, clear them and note where they were. Outputs and earlier states share the memory of the queries.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax_fp8attn.pallas import merge_sm90, mla_prepare_sm90
from jax_fp8attn.pallas.common import configs, hopper, tile_list
from jax_fp8attn.pallas.common.backend import to_e4m3, varying_like
from jax_fp8attn.pallas.common.groups import finite_magnitude, group_scale
from jax_fp8attn.pallas.common.hopper import full_row, row_max, spread
from jax_fp8attn.pallas.mla_prepare_sm90 import NEVER

from jax_fp8attn import offsets
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MergeArrays, MergeProblem, MlaArrays, MlaProblem
from jax_fp8attn.quantize import (
    E4M3,
    Fp8Array,
    Fp8PerGroup,
    Fp8PerTensor,
    physical_scales,
    quantize_output,
)

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
WARPGROUPS, ROWS = 2, 64  # of consumers, and query rows of each
NOPE, ROPE, VALUES = 128, 64, 128
KEYS = 128  # of a block; copies of V^T start at multiples of it
PIECE = 16  # columns that are masked at once, in bf16 two of them where they fit
RESIDENT = 24 << 20  # bytes of keys and values that half of the L2 holds
TINY = 2.0**-126  # the smallest normal float32: what lies below may have been flushed to zero
TILE, BLOCK = 5.8, 1.3  # microseconds that a tile takes, and each of its blocks of keys
MERGE, MEMORY = 5.0, 4e6  # microseconds of a merge, and bytes a microsecond
MOST_SPLITS, LEAST_BLOCKS = 16, 8  # of keys in a split
WORTHWHILE = 0.9  # of the time without splits
MERGE_REGISTERS = 64  # of a thread for the states that it merges
LIFT = 8.0  # probabilities are stored times 2^8: the smallest stay normal numbers of e4m3

NOTED = 3  # kinds of values that are no numbers


@dataclasses.dataclass(frozen=True)
class Format:
    """How operands stand in shared memory, and what follows.

    name      of ``compute``
    dtype     of q, k, v, and of probabilities as an operand
    parts     of a row of q and k: first column and width; one swizzled row each
    prepared  V comes transposed, and values of a block of keys are a sum of their own; else V comes as it is, and
              they are added to those of the blocks before
    lift      probabilities are stored times 2^lift
    """

    name: str
    dtype: np.dtype
    parts: tuple[tuple[int, int], ...]
    prepared: bool

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def lift(self) -> float:
        return LIFT if self.prepared else 0.0


FP8 = Format("fp8", np.dtype(E4M3), ((0, NOPE), (NOPE, ROPE)), True)
BF16 = Format("bf16", np.dtype(jnp.bfloat16), tuple((first, 64) for first in range(0, NOPE + ROPE, 64)), False)


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """How a block works.

    stages     blocks of keys in shared memory
    producer   a warpgroup of its own loads keys and values; else the first consumer does
    registers  of a consumer's and of the producer's thread; without a producer both have what the compiler gives
    blocks     that take one tile after the other, the next tile's operands loaded ahead; 0: a block a tile. Needs a
               producer
    splits     of the keys that a tile sees, each a tile of its own; the results are merged. 1: none, as in bf16
    format     of the operands
    late       in FP8 alone: half of a block's exponentials are computed beside the next block's scores. Pays with a
               producer, whose registers it takes

    In bf16 alone:

    keys       of a block
    turn       when the other consumer may start its products: when a consumer's own are "issued", when its "scores" are
               there, or when all are "done"
    tail       products of values, each of 32 bytes of keys, that may still run then, for the time that passing takes
    beside     columns of scores whose probabilities a consumer computes beside its own product of values
    parted     probabilities are kept on their side of the waits for products and of the turn
    """

    stages: int = 2
    producer: bool = True
    registers: tuple[int, int] = (240, 24)
    blocks: int = 0
    splits: int = 1
    format: Format = FP8
    late: bool = True
    keys: int = KEYS
    turn: str = "done"
    tail: int = 0
    beside: int = 0
    parted: bool = False

    def __post_init__(self) -> None:
        own = (self.keys, self.turn, self.tail, self.beside, self.parted)
        if self.format.prepared and own != (KEYS, "done", 0, 0, False):
            raise ValueError(f"keys, turn, tail, beside and parted are for bf16: {self}")
        if not 0 <= 32 * self.tail < self.keys * self.format.size:
            raise ValueError(f"tail must be less than all products of a block: {self}")
        if self.keys % 16 or self.beside % self.piece or not 0 <= self.beside <= self.keys:
            raise ValueError(f"keys must be a multiple of 16, beside a part of them in pieces of {self.piece}: {self}")
        if self.turn not in ("issued", "scores", "done"):
            raise ValueError(f"turn must be issued, scores or done: {self}")
        if self.stages < 2 and not (self.producer and self.format.prepared):
            raise ValueError(f"without a producer and in bf16 two stages at least are needed: {self}")
        if self.blocks and not self.producer:
            raise ValueError(f"blocks that take several tiles need a producer: {self}")
        if not configs.registers_fit(WARPGROUPS, self.registers):
            raise ValueError(f"registers must be multiples of 8 and fit into what a launch gives: {self}")
        if self.splits < 1 or (self.splits > 1 and not self.format.prepared):
            raise ValueError(f"a tile has one split at least, and in bf16 no more: {self}")
        if self.shared_memory > 232448:
            raise ValueError(f"{self.shared_memory} bytes of shared memory, a block can have 232448: {self}")

    @property
    def piece(self) -> int:
        """Columns of scores that are masked at once, and computed at once where not all are."""
        return PIECE if self.format.prepared or self.keys % (2 * PIECE) else 2 * PIECE

    @property
    def shared_memory(self) -> int:
        """Bytes of a block, barriers and scales of groups apart; of bf16 with outputs and states of 16 bits."""
        queries = WARPGROUPS * ROWS * (NOPE + ROPE) * self.format.size
        outputs = WARPGROUPS * ROWS * (4 * VALUES + 4) if self.format.prepared else WARPGROUPS * ROWS * 4
        outputs += 0 if self.format.prepared else 4 * (NOTED + 1) * VALUES
        return queries + outputs + self.stages * self.keys * (NOPE + ROPE + VALUES) * self.format.size


def default_config(problem: MlaProblem) -> MlaConfig:
    """A producer of its own where the assembler keeps setmaxnreg: jax 0.12 assembles through nvJitLink, which drops
    it, and three warpgroups then have 168 registers a thread. Shorter blocks of keys in bf16 where float32 outputs or
    states take more memory than the queries."""
    producer = jax.__version_info__ < (0, 12)
    if problem.compute == "fp8":
        whole = not producer and problem.state_dtype == np.float32  # splits of it would spill registers
        splits = 1 if whole else _best_splits(problem)
        several = producer and splits == 1 and _few_addresses(problem)
        blocks = configs.MULTIPROCESSORS if several else 0
        return MlaConfig(producer=producer, blocks=blocks, splits=splits, late=producer)
    out_dtype = None if problem.output_quant is not None else problem.out_dtype
    keys = 112 if np.float32 in (problem.state_dtype, out_dtype) else 128
    return MlaConfig(producer=producer, format=BF16, keys=keys, turn="issued", beside=64, parted=True)


def _few_addresses(problem: MlaProblem) -> bool:
    """Blocks that take several tiles keep those of states, and beside float32 outputs a consumer has none for float32
    states."""
    return problem.output_quant is not None or not problem.state_dtype == problem.out_dtype == np.float32


def _best_splits(problem: MlaProblem) -> int:
    """The splits with the least estimated time, for sequences of equal lengths; none if they gain too little."""
    if not (problem.tokens and problem.keys and problem.sequences and problem.heads):
        return 1
    tokens, keys = (-(-x // problem.sequences) for x in (problem.tokens, problem.keys))
    tiles = problem.heads * problem.sequences * -(-tokens // (WARPGROUPS * ROWS))
    longest = -(-keys // KEYS)
    mean = longest - min(tokens, keys) / (2 * KEYS) if problem.causal else longest
    partials = 2 * 4 * VALUES * problem.tokens * problem.heads / MEMORY  # of one split, written and read

    def estimate(splits: int) -> float:
        waves = -(-splits * tiles // configs.MULTIPROCESSORS)
        attend = max(waves * (TILE + BLOCK * mean / splits), TILE + BLOCK * -(-longest // splits))
        return attend + (MERGE + splits * partials if splits > 1 else 0.0)

    best = min(range(1, max(1, min(MOST_SPLITS, int(mean) // LEAST_BLOCKS)) + 1), key=estimate)
    return best if estimate(best) < WORTHWHILE * estimate(1) else 1


def supports(problem: MlaProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if device.compute_capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, the device has {device.compute_capability}")
    return (*reasons, *(mla_prepare_sm90.supports(problem) if problem.compute == "fp8" else ()))


def notes(problem: MlaProblem) -> tuple[str, ...]:
    splits = default_config(problem).splits
    found = [f"keys in {splits} splits, merged by the kernel of merge_attn_states"] if splits > 1 else []
    where = "the merge" if splits > 1 else "the attention kernel"
    return (*found, *([f"FP8 output: fused into {where}"] if problem.output_quant is not None else []))


def run(problem: MlaProblem, arrays: MlaArrays) -> Any:
    return build(problem, configs.chosen("mla_prefill", problem, default_config(problem)))(arrays)


def build(problem: MlaProblem, config: MlaConfig, interpret: Any = None) -> Callable[[MlaArrays], Any]:
    """The op for one problem as a function of its arrays."""
    if config.format.name != problem.compute:
        raise ValueError(f"the problem computes in {problem.compute}, not so the configuration: {config}")
    steps = steps_of(problem, config, interpret)

    @jax.enable_x64(False)
    def op(arrays: MlaArrays) -> Any:
        if not (problem.tokens and problem.keys and problem.sequences and problem.heads):
            return _without_keys(problem, arrays)
        operands, work = steps.prepare(arrays)
        return steps.finish(arrays, work, varying_like(arrays, steps.attend(operands)))

    return op


class Steps(NamedTuple):
    """The op in three parts, which a benchmark times apart."""

    prepare: Callable[[MlaArrays], Any]  # casts, transposes V, lists the tiles
    attend: Callable[[Any], list[jax.Array]]  # the kernel
    finish: Callable[..., Any]  # picks each token's lse and scales; merges splits


def steps_of(problem: MlaProblem, config: MlaConfig, interpret: Any = None) -> Steps:
    def prepare(arrays: MlaArrays) -> tuple[_Operands, tile_list.Work]:
        regions = tile_list.key_blocks(arrays.k_start, arrays.k_length, problem.keys, KEYS)
        work = tile_list.query_tiles(problem, arrays, regions, WARPGROUPS * ROWS, KEYS, config.splits)
        if config.format.prepared:
            return _operands(problem, arrays, regions, work, interpret), work
        return _wide_operands(problem, arrays, work), work

    def attend(operands: _Operands) -> list[jax.Array]:
        return _Kernel(partial, config, operands.tiles.shape[0], interpret).call(operands)

    def finish(arrays: MlaArrays, work: tile_list.Work, results: list[jax.Array]) -> Any:
        if config.splits == 1:
            return _result(problem, arrays, work, *results)
        return _merged_splits(problem, arrays, work, *results, interpret=interpret)

    partial = problem
    if config.splits > 1:
        partial = dataclasses.replace(problem, out_dtype=jnp.dtype(jnp.float32), output_quant=None)
    return Steps(prepare, attend, finish)


def _without_keys(problem: MlaProblem, arrays: MlaArrays) -> Any:
    """Nothing to attend to: rows of sequences take the initial state, all others are empty."""
    out = jnp.zeros((problem.tokens, problem.heads, VALUES), jnp.float32)
    lse = jnp.full((problem.heads, problem.tokens), -jnp.inf)
    if problem.state_dtype is not None:
        owned = offsets.owner(arrays.q_start, arrays.q_length, problem.tokens) >= 0
        there = owned & (jnp.isnan(arrays.initial_lse) | jnp.isfinite(arrays.initial_lse))  # [H, T]
        lse = jnp.where(there, arrays.initial_lse, lse)
        out = jnp.where(there.T[..., None], arrays.initial_out.astype(jnp.float32), out)
    out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
    return (out, lse) if problem.return_lse else out


def _result(
    problem: MlaProblem, arrays: MlaArrays, work: tile_list.Work, out: jax.Array, lse: jax.Array, *tiled: jax.Array
) -> Any:
    """Scales leave the kernel tile by tile; here each token's are picked."""
    spec = problem.output_quant
    if isinstance(spec, Fp8PerTensor):
        scale = arrays.output_scale
        out = Fp8Array(out, scale[0] if problem.instances == 1 else scale, spec, problem.tokens)
    elif spec is not None:
        scales = tile_list.rows_of_tiles(*tiled, work)[0]  # [H, groups of a head, T]
        scales = scales.transpose(2, 0, 1).reshape(problem.tokens, -1)
        out = Fp8Array(out, physical_scales(scales, spec), spec, problem.tokens)
    return (out, lse[0]) if problem.return_lse else out


def _merged_splits(
    problem: MlaProblem, arrays: MlaArrays, work: tile_list.Work, out: jax.Array, lse: jax.Array, interpret: Any
) -> Any:
    """The first split holds the initial state."""
    splits = work.place.shape[0]
    states = MergeProblem(
        splits, problem.tokens, problem.heads, VALUES, out.dtype, jnp.dtype(problem.out_dtype), problem.output_quant,
        problem.return_lse, stacked=True, instances=problem.instances,
    )  # fmt: skip
    config = merge_sm90.default_config(states)
    if splits * config.vector > MERGE_REGISTERS:
        config = dataclasses.replace(config, vector=min(config.vector, 4))
    given = MergeArrays(
        out.reshape(splits, problem.tokens, *out.shape[1:]), lse, None,
        arrays.output_scale,
    )  # fmt: skip
    return merge_sm90.build(states, config, interpret)(given)


class _Operands(NamedTuple):
    """What the kernel reads."""

    q: jax.Array  # [T, H, 192]
    k: jax.Array  # [S, H, 192], or the nope part [S, H, 128]
    k_rope: jax.Array | None  # [S, 64]
    v: jax.Array  # [S, H, 128]; e4m3 [H, 128, columns], columns in regions that start at multiples of 128, 0 for NaN
    first_nan: jax.Array | None  # e4m3: int32 [B, H, 128], the first key of a sequence with NaN in a column of V
    scales: jax.Array  # float32 [instances, 3]: of the exponent in base 2, of the output, of its codes
    tiles: jax.Array  # int32 [tiles, FIELDS or SPLIT_FIELDS]
    state_out: jax.Array | None  # [T, H, 128]
    state_lse: jax.Array | None  # float32 [H, tiles, 128]; -inf for rows without a state


def _operands(
    problem: MlaProblem, arrays: MlaArrays, regions: tile_list.KeyBlocks, work: tile_list.Work, interpret: Any
) -> _Operands:
    def stored(x: jax.Array | None, scale: jax.Array) -> jax.Array | None:
        return None if x is None else mla_prepare_sm90.cast(x, scale, interpret)

    values, first_nan = mla_prepare_sm90.prepare_values(problem, arrays.v, arrays.v_scale, regions, interpret=interpret)
    exponent = arrays.q_scale * arrays.k_scale * arrays.softmax_scale * LOG2E
    return _Operands(
        stored(arrays.q, arrays.q_scale), stored(arrays.k, arrays.k_scale), stored(arrays.k_rope, arrays.k_scale),
        values, first_nan, *_common_operands(problem, arrays, work, exponent, arrays.v_scale),
    )  # fmt: skip


def _wide_operands(problem: MlaProblem, arrays: MlaArrays, work: tile_list.Work) -> _Operands:
    """In bf16: only operands of FP8 have scales."""
    factor = lambda x, scale: scale if x.dtype == E4M3 else jnp.ones_like(scale)
    k, k_rope, k_scale = arrays.k, arrays.k_rope, factor(arrays.k, arrays.k_scale)
    if k_rope is not None and (k.dtype == E4M3) != (k_rope.dtype == E4M3):
        # one part has a scale and the other has not: both as true values
        rows = jnp.repeat(arrays.k_scale, problem.keys // problem.instances, total_repeat_length=problem.keys)
        true = lambda x: x.astype(jnp.float32) * rows.reshape(-1, *[1] * (x.ndim - 1)) if x.dtype == E4M3 else x
        k, k_rope, k_scale = true(k), true(k_rope), jnp.ones_like(k_scale)
    stored = lambda x: None if x is None else x.astype(BF16.dtype)
    exponent = factor(arrays.q, arrays.q_scale) * k_scale * arrays.softmax_scale * LOG2E
    return _Operands(
        stored(arrays.q), stored(k), stored(k_rope), stored(arrays.v), None,
        *_common_operands(problem, arrays, work, exponent, factor(arrays.v, arrays.v_scale)),
    )  # fmt: skip


def _common_operands(
    problem: MlaProblem, arrays: MlaArrays, work: tile_list.Work, exponent: jax.Array, v_scale: jax.Array
) -> tuple[Any, ...]:
    """From ``scales`` on."""
    codes = jnp.ones_like(exponent) if arrays.output_scale is None else 1.0 / arrays.output_scale
    state = problem.state_dtype is not None
    return (
        jnp.stack([exponent, v_scale, codes], axis=1),
        work.tiles,
        arrays.initial_out if state else None,
        tile_list.tiles_of_rows(arrays.initial_lse, work) if state else None,
    )


class _Shared(NamedTuple):
    """Shared memory and barriers, by role. Of a pair copies write the first view and wgmma reads the second."""

    q: tuple[tuple[Any, Any], ...]  # a pair [2, 64, width] a part; of bf16 one pair [2 * slots, 64, 64]
    k: tuple[tuple[Any, Any], ...]  # a pair [stages, keys, width] a part
    v: tuple[Any, Any]  # [stages, 128, keys]; of bf16 [stages, 2, keys, 64]
    state: Any  # [2 * slots, 64, columns], in the same memory as out; None without a state
    out: Any  # [2 * slots, 64, columns]; a slot a piece, of bf16 as many as of q
    lse: Any  # [2, 64]
    scales: Any  # [2 * groups, 64]; None without groups
    record: Any  # of bf16 int32 [4, 128]: the first key with NaN, +inf, -inf that was cleared in a column; 0: any was
    work: Any  # int32 [2, 2] of blocks that take several tiles: number and ``before`` of a tile and of the next one
    q_there: Any
    q_free: Any
    state_there: Any
    k_there: Any
    v_there: Any
    k_free: Any
    v_free: Any
    cleared: Any  # of bf16
    work_there: Any
    work_free: Any

    def queries(self, part: int, warpgroup: Any) -> tuple[Any, Any]:
        """64 rows of a part."""
        if len(self.q) > 1:
            view, index = self.q[part], warpgroup
        else:
            view = self.q[0]
            index = view[0].shape[0] // WARPGROUPS * warpgroup + part
        return tuple(x.at[index] for x in view)


class _Tile(NamedTuple):
    """The scalars of a tile; see ``tile_list``."""

    number: Any  # in the order of work
    index: Any
    head: Any
    first_query: Any
    rows: Any
    first_key: Any
    first_column: Any
    visible: Any  # keys that the first row sees; every next row sees one more under ``causal``
    key_count: Any
    sequence: Any
    instance: Any
    first_output: Any
    skipped: Any  # keys of the sequence, by splits before this one
    blocks: Any  # of keys, at least one
    before: Any  # blocks of keys that this block of threads has worked off
    place: Any  # in ``_Shared.work``

    def slot(self, number: Any, stages: int) -> Any:
        """Where block ``number`` of the keys stands in shared memory."""
        return lax.rem(self.before + number, stages)


class _Results(NamedTuple):
    """What the kernel writes."""

    out: Any  # [splits * T, H, 128]
    lse: Any  # [splits, H, T]
    scales: Any  # [H, groups, tiles, 128] or None


class _Softmax(NamedTuple):
    """The running softmax of 64 rows: ``out`` is in units of the maximum before ``shrink``."""

    out: Any  # [64, 128]
    top: Any  # [64] in base 2
    total: Any  # [64, 8]: columns still to be added
    shrink: Any


class _Loader(NamedTuple):
    """Keeps the stages full."""

    gmem: _Operands
    smem: _Shared
    tile: _Tile
    config: MlaConfig

    def stream(self) -> None:
        """All blocks, each as soon as its slot is free."""

        @pl.loop(0, self.tile.blocks)
        def load(number: Any) -> None:
            slot = self.tile.slot(number, self.config.stages)
            used = self.tile.before + number >= self.config.stages
            pl.when(used)(lambda: plgpu.barrier_wait(self.smem.k_free.at[slot]))
            self._load_k(number, slot)
            pl.when(used)(lambda: plgpu.barrier_wait(self.smem.v_free.at[slot]))
            self._load_v(number, slot)

    def first(self) -> None:
        """Without a producer: what the stages hold. ``refill_k`` and ``refill_v`` fill the slots of a block again."""
        for number in range(self.config.stages):
            pl.when(number < self.tile.blocks)(functools.partial(self._load_k, number, number))
            pl.when(number < self.tile.blocks)(functools.partial(self._load_v, number, number))

    def refill_k(self, number: Any) -> None:
        slot, following = lax.rem(number, self.config.stages), number + self.config.stages
        plgpu.barrier_wait(self.smem.k_free.at[slot])
        pl.when(following < self.tile.blocks)(lambda: self._load_k(following, slot))

    def refill_v(self, number: Any) -> None:
        slot, following = lax.rem(number, self.config.stages), number + self.config.stages
        plgpu.barrier_wait(self.smem.v_free.at[slot])
        pl.when(following < self.tile.blocks)(lambda: self._load_v(following, slot))

    def queries(self, warpgroup: Any) -> None:
        smem, rows = self.smem, pl.ds(self.tile.first_query + warpgroup * ROWS, ROWS)
        for part, where in enumerate(self.config.format.parts):
            source = self.gmem.q.at[rows, self.tile.head, pl.ds(*where)]
            plgpu.copy_gmem_to_smem(source, smem.queries(part, warpgroup)[0], smem.q_there.at[warpgroup])

    def _load_k(self, number: Any, slot: Any) -> None:
        gmem, smem, tile = self.gmem, self.smem, self.tile
        rows = pl.ds(tile.first_key + number * self.config.keys, self.config.keys)
        for (first, width), part in zip(self.config.format.parts, smem.k, strict=True):
            if gmem.k_rope is None or first + width <= NOPE:
                source = gmem.k.at[rows, tile.head, pl.ds(first, width)]
            else:
                source = gmem.k_rope.at[rows]
            plgpu.copy_gmem_to_smem(source, part[0].at[slot], smem.k_there.at[slot])

    def _load_v(self, number: Any, slot: Any) -> None:
        gmem, smem, tile = self.gmem, self.smem, self.tile
        if self.config.format.prepared:
            first = pl.multiple_of(tile.first_column + number * KEYS, KEYS)
            columns = pl.ds(first, KEYS)
            plgpu.copy_gmem_to_smem(gmem.v.at[tile.head, :, columns], smem.v[0].at[slot], smem.v_there.at[slot])
            return
        rows = pl.ds(tile.first_key + number * self.config.keys, self.config.keys)
        for half in range(2):
            source = gmem.v.at[rows, tile.head, pl.ds(64 * half, 64)]
            plgpu.copy_gmem_to_smem(source, smem.v[0].at[slot, half], smem.v_there.at[slot])


class _Products(NamedTuple):
    """The two products of a warpgroup: its 64 queries with a block of keys, and probabilities with a block of values.

    Interpreted, the operands are read plainly, so that a race on them is seen.
    """

    smem: _Shared
    warpgroup: Any
    config: MlaConfig
    interpreted: bool

    def start_scores(self, slot: Any) -> Any:
        """[64, keys]"""
        smem, parts = self.smem, self.config.format.parts
        pairs = [
            (smem.queries(n, self.warpgroup)[1], smem.k[n][1].at[slot], width * self.config.format.size)
            for n, (_, width) in enumerate(parts)
        ]
        if not self.interpreted:
            return hopper.start((ROWS, self.config.keys), pairs)
        wide = lambda view: view[...].astype(jnp.float32)
        products = [jnp.dot(wide(q), wide(k).T) for q, k, _ in pairs]
        plgpu.commit_smem()
        return functools.reduce(jnp.add, products)

    def start_values(self, operand: Any, slot: Any, earlier: Any = None) -> Any:
        """[64, 128], of bf16 added to the earlier ones."""
        prepared, values = self.config.format.prepared, self.smem.v[1]
        if not self.interpreted:
            pairs = [(operand, values.at[slot], 128)]
            return hopper.start((ROWS, VALUES), pairs, earlier, self.config.tail)
        values = values[slot].T if prepared else jnp.concatenate([values[slot, half] for half in range(2)], axis=1)
        product = jnp.dot(operand.astype(jnp.float32), values.astype(jnp.float32))
        plgpu.commit_smem()
        return product if earlier is None else earlier + product

    def scores(self, pending: Any, slot: Any, younger: int = 0) -> Any:
        """The result; the keys are free then."""
        result = self._settled(pending, younger)
        plgpu.barrier_arrive(self.smem.k_free.at[slot])
        return result

    def weighed(self, pending: Any, slot: Any, held: Sequence[Any] = ()) -> Any:
        """The result; the values are free then. With ``held`` also these, behind the wait."""
        result = self._settled(pending, 0, held)
        plgpu.barrier_arrive(self.smem.v_free.at[slot])
        return result

    def _settled(self, pending: Any, younger: int, held: Sequence[Any] = ()) -> Any:
        if self.interpreted:
            return (pending, list(held)) if held else pending
        return hopper.settled(pending, younger, held)

    def wait_for_turn(self) -> None:
        """The warpgroups' products run one after the other, and each computes probabilities meanwhile. Side by side
        both would wait for their products at the same time."""
        if not self.interpreted:
            hopper.wait_for_turn()

    def pass_turn(self) -> None:
        if not self.interpreted:
            hopper.pass_turn()

    def wait_for_most(self) -> None:
        """Of the products of values."""
        if not self.interpreted:
            hopper.wait(1)

    def end_of_block(self, number: int = 1) -> None:
        if not self.interpreted:
            hopper.end_of_block(number)

    def computed(self, x: Any) -> Any:
        """Here, not where it is needed."""
        return x if self.interpreted else hopper.computed([x])[0]


class _Cleaner(NamedTuple):
    """Clears and notes values that are no numbers in blocks of keys that not all rows of a tile see, a consumer in its
    half of the columns. The consumers meet at each of these blocks; once where a tile has none."""

    smem: _Shared
    warpgroup: Any
    keys: int
    interpreted: bool

    def reset(self) -> None:
        for row in range(NOTED + 1):
            mine = self.smem.record.at[row, pl.ds(self.warpgroup * 64, 64)]
            mine[...] = plgpu.layout_cast(jnp.full((64,), NEVER, jnp.int32), hopper.ROW)
        plgpu.commit_smem()

    def clear(self, number: Any, slot: Any) -> None:
        """In block ``number``, which is there."""
        values, first = self.smem.v[1].at[slot, self.warpgroup], number * self.keys
        if self.interpreted:
            self._clear_plainly(values, first)
        else:
            hopper.clear_nonfinite(values, self.smem.record, first, self.warpgroup * 64)
        self.arrive()

    def arrive(self) -> None:
        plgpu.barrier_arrive(self.smem.cleared.at[0])

    def wait(self) -> None:
        """For the other one."""
        plgpu.barrier_wait(self.smem.cleared.at[0])

    def _clear_plainly(self, values: Any, first: Any) -> None:
        x = values[...].astype(jnp.float32)
        key = lax.broadcasted_iota(jnp.int32, x.shape, 0) + first
        kinds = [jnp.where(there, key, NEVER) for there in (jnp.isnan(x), x == jnp.inf, x == -jnp.inf)]
        for row, keys in enumerate((*kinds, jnp.where(jnp.isfinite(x).all(), NEVER, jnp.zeros_like(key)))):
            mine = self.smem.record.at[row, pl.ds(self.warpgroup * 64, 64)]
            mine[...] = jnp.minimum(mine[...], keys.min(axis=0))
        values[...] = jnp.where(jnp.isfinite(x), x, 0.0).astype(BF16.dtype)
        plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: MlaProblem
    config: MlaConfig
    tiles: int
    interpret: Any

    @property
    def merges(self) -> bool:
        return self.problem.state_dtype is not None

    @property
    def groups(self) -> int:
        """Quantisation groups of a row."""
        spec = self.problem.output_quant
        return VALUES // spec.group_size if isinstance(spec, Fp8PerGroup) else 0

    @property
    def blocks(self) -> int:
        """Blocks of threads."""
        tiles = self.problem.heads * self.tiles
        return min(self.config.blocks or tiles, tiles)

    @property
    def takes(self) -> bool:
        """Whether a block of threads takes one tile after the other."""
        return self.blocks < self.problem.heads * self.tiles

    def slots(self, dtype: Any) -> int:
        """Places of 64 rows of 128 bytes that a consumer has for values of this type."""
        if self.config.format.prepared:
            return self._pieces(dtype)
        types = [self.out_dtype, *([self.problem.state_dtype] if self.merges else [])]
        return max(len(BF16.parts), *map(self._pieces, types))

    @property
    def out_dtype(self) -> Any:
        return E4M3 if self.problem.output_quant is not None else jnp.dtype(self.problem.out_dtype)

    def call(self, operands: _Operands) -> list[jax.Array]:
        problem = self.problem
        options = {} if self.interpret is None else {"interpret": self.interpret}
        scale_shape = (problem.heads, self.groups, self.tiles, WARPGROUPS * ROWS)
        scales = jax.ShapeDtypeStruct(scale_shape, jnp.float32)

        results = [
            jax.ShapeDtypeStruct((self.config.splits * problem.tokens, problem.heads, VALUES), self.out_dtype),
            jax.ShapeDtypeStruct((self.config.splits, problem.heads, problem.tokens), jnp.float32),
            *([scales] if self.groups else []),
        ]

        def fp8attn_mla_prefill_sm90(*refs: Any) -> None:
            self._body(*refs)

        def kernel(out_type: list[Any], *refs: Any) -> Any:
            return plgpu.kernel(
                fp8attn_mla_prefill_sm90,
                out_type=out_type,
                grid=(self.blocks,),
                grid_names=("block",),
                num_threads=WARPGROUPS + self.config.producer,
                thread_name="warpgroup",
                scratch_types=self._scratch(),
                compiler_params=plgpu.CompilerParams(
                    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
                ),
                **options,
            )(*refs)

        given = [x for x in operands if x is not None]
        if not self.takes:
            return list(kernel(results, *given))
        empty = [lax.empty(x.shape, x.dtype) for x in results]
        run = pl.run_state(lambda refs: kernel([], *given, *refs))
        return list(run((jnp.zeros(1, jnp.int32), *empty))[1:])

    def _scratch(self) -> list[Any]:
        config, plain = self.config, self.interpret is not None
        stages, keys, parts, prepared = config.stages, config.keys, config.format.parts, config.format.prepared
        size, dtype = config.format.size, config.format.dtype
        anywhere = lambda shape: hopper.rows_anywhere(shape, dtype, min(shape[-1] * size, 128), plain)
        barrier = lambda arrivals, count: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
        rows_out = lambda kind: hopper.rows_out(WARPGROUPS * self.slots(kind), ROWS, jnp.dtype(kind), plain)
        out = [*([rows_out(self.problem.state_dtype)] if self.merges else []), rows_out(self.out_dtype)]
        if prepared:
            queries = [anywhere((WARPGROUPS, ROWS, width)) for _, width in parts]
            values = hopper.tiles((stages, VALUES, KEYS), E4M3, KEYS)
            out = out if plain or not self.merges else [plgpu.RefUnion(*out)]
        else:
            queries = [anywhere((WARPGROUPS * self.slots(BF16.dtype), ROWS, 64))]
            values = anywhere((stages, 2, keys, 64))
            queries, out = (queries, out) if plain else ([plgpu.RefUnion(*queries[0].refs, *out)], [])
        return [
            *queries,
            *(anywhere((stages, keys, width)) for _, width in parts),
            values,
            *out,
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            *([plgpu.SMEM((WARPGROUPS * self.groups, ROWS), jnp.float32)] if self.groups else []),
            *([] if prepared else [plgpu.SMEM((NOTED + 1, VALUES), jnp.int32)]),
            *([plgpu.SMEM((2, 2), jnp.int32)] if self.takes else []),
            barrier(len(parts), WARPGROUPS),
            barrier(WARPGROUPS, 1),
            *([barrier(self._pieces(self.problem.state_dtype), WARPGROUPS)] if self.merges else []),
            barrier(len(parts), stages),
            barrier(1 if prepared else 2, stages),
            barrier(WARPGROUPS, stages),
            barrier(WARPGROUPS, stages),
            *([] if prepared else [barrier(WARPGROUPS, 1)]),
            *([barrier(1, 2), barrier(WARPGROUPS, 2)] if self.takes else []),
        ]

    def _shared(self, given: Iterator[Any]) -> _Shared:
        """By role what ``_scratch`` lists."""
        plain, parts, prepared = self.interpret is not None, self.config.format.parts, self.config.format.prepared
        count = len(parts) if prepared else 1
        held = [next(given) for _ in range(count)]
        if prepared or plain:
            queries, rest = [hopper.views(x, plain) for x in held], []
        else:
            queries, rest = [held[0][:2]], held[0][2:]
        keys = [hopper.views(next(given), plain) for _ in parts]
        values = next(given)
        values = (values, values) if prepared else hopper.views(values, plain)
        if not rest:
            last = [next(given) for _ in range(2 if self.merges and plain else 1)]
            rest = last[0] if self.merges and not plain else last
        state, out = rest if self.merges else (None, *rest)
        fields = dict(q=tuple(queries), k=tuple(keys), v=values, state=state, out=out)
        absent = {"scales": not self.groups, "record": prepared, "state_there": not self.merges, "cleared": prepared}
        absent |= dict.fromkeys(("work", "work_there", "work_free"), not self.takes)
        for name in _Shared._fields[len(fields) :]:
            fields[name] = None if absent.get(name) else next(given)
        return _Shared(**fields)

    def _body(self, *refs: Any) -> None:
        given = iter(refs)
        present = {"k_rope": self.problem.k_rope_dtype is not None, "first_nan": self.config.format.prepared}
        present |= {"state_out": self.merges, "state_lse": self.merges}
        gmem = _Operands(*(next(given) if present.get(name, True) else None for name in _Operands._fields))
        taken = next(given) if self.takes else None
        out, lse = next(given), next(given)
        results = _Results(out, lse, next(given) if self.groups else None)
        smem = self._shared(given)
        warpgroup = lax.axis_index("warpgroup")
        products = _Products(smem, warpgroup, self.config, self.interpret is not None)

        @pl.when(warpgroup < WARPGROUPS)
        def consumer() -> None:
            if self.config.producer:
                plgpu.set_max_registers(self.config.registers[0], action="increase")

            done = self._each_tile(gmem, smem, lambda tile: self._consume(gmem, products, tile, results))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if not self.config.format.prepared:
                pl.when((warpgroup == 0) & (done > 0))(products.wait_for_turn)  # the last one passed

        if self.config.producer:

            @pl.when(warpgroup == WARPGROUPS)
            def producer() -> None:
                plgpu.set_max_registers(self.config.registers[1], action="decrease")
                produce = lambda tile: self._produce(_Loader(gmem, smem, tile, self.config))
                done = self._each_tile(gmem, smem, produce, functools.partial(self._take, smem, taken))
                if self.interpret is not None:
                    self._see_last_releases(smem, done)

    def _each_tile(
        self, gmem: _Operands, smem: _Shared, work: Callable[[_Tile], None], take: Callable[..., None] | None = None
    ) -> Any:
        """The tiles of this block of threads, one after the other, in the order of work among all blocks. ``take`` is
        the producer's and gets the next one; the consumers hear of it. Returns the blocks of keys of all."""
        tiles, block = self.problem.heads * self.tiles, lax.axis_index("block")
        if not self.takes:
            tile = self._tile(gmem, block, 0)
            pl.when(tile.rows > 0)(lambda: work(tile))
            return jnp.where(tile.rows > 0, tile.blocks, 0)

        def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            turn, _, before = carry
            place = lax.rem(turn, 2)
            if take:
                take(turn, before)
            plgpu.barrier_wait(smem.work_there.at[place])
            number, before = smem.work[place, 0], smem.work[place, 1]
            tile = self._tile(gmem, jnp.minimum(number, tiles - 1), before, place)
            there = (tile.rows > 0) & (number < tiles)
            pl.when(there)(lambda: work(tile))
            more = smem.work[place, 0] < tiles  # read again, as in _again
            if take:
                before = before + jnp.where(there, tile.blocks, 0)
            else:
                plgpu.barrier_arrive(smem.work_free.at[place])
            return turn + 1, more, before

        turns, _, before = lax.while_loop(lambda carry: carry[1], one, (jnp.int32(0), jnp.bool(True), jnp.int32(0)))
        if take and self.interpret is not None:  # which wants every release to be seen
            pl.when(turns > 1)(lambda: plgpu.barrier_wait(smem.work_free.at[lax.rem(turns, 2)]))
            plgpu.barrier_wait(smem.work_free.at[lax.rem(turns - 1, 2)])
        return before

    def _take(self, smem: _Shared, taken: Any, turn: Any, before: Any) -> None:
        """Tells everybody the next tile of this block: first its own number, then the next that no block has."""
        place, block = lax.rem(turn, 2), lax.axis_index("block")
        pl.when(turn > 1)(lambda: plgpu.barrier_wait(smem.work_free.at[place]))
        if self.interpret is None:
            hopper.take(taken, smem.work.at[place], turn > 0, self.blocks, block, before)
        else:
            smem.work[place, 0], smem.work[place, 1] = turn * self.blocks + block, before
        plgpu.barrier_arrive(smem.work_there.at[place])

    def _produce(self, loader: _Loader) -> None:
        pl.when(loader.tile.before > 0)(lambda: plgpu.barrier_wait(loader.smem.q_free.at[0]))
        for warpgroup in range(WARPGROUPS):
            loader.queries(warpgroup)
        loader.stream()

    @property
    def _bytes_of_keys(self) -> int:
        """Of a head's keys and values."""
        return (NOPE + ROPE + VALUES) * self.problem.keys * self.config.format.size

    def _place(self, number: Any) -> tuple[Any, Any]:
        """Head and tile in the order of work: a group of heads whose keys and values fit into the L2 together, the
        longest tiles of all of them first, then the next group."""
        heads = self.problem.heads
        if self.config.splits > 1:  # few tiles, at work together
            return lax.rem(number, heads), lax.div(number, heads)
        groups = -(-heads // max(1, min(heads, RESIDENT // self._bytes_of_keys)))
        size = -(-heads // groups)
        group, rest = lax.div(number, size * self.tiles), lax.rem(number, size * self.tiles)
        width = jnp.minimum(heads - group * size, size) if heads % size else size
        return group * size + lax.rem(rest, width), lax.div(rest, width)

    def _tile(self, gmem: _Operands, number: Any, before: Any, place: Any = None) -> _Tile:
        head, index = self._place(number)
        field = lambda name: gmem.tiles[index, tile_list.SPLIT_FIELDS.index(name)]
        first_query, rows, visible, key_count = map(field, ("first_query", "rows", "visible", "key_count"))
        keys = self.config.keys
        if self.config.splits == 1:
            most = jnp.minimum(visible + rows - 1, key_count) if self.problem.causal else key_count
            own = first_query, 0, jnp.maximum(lax.div(most + (keys - 1), keys), 1)
        else:
            own = map(field, ("first_output", "skipped", "blocks"))
        return _Tile(
            number, index, head, first_query, rows, field("first_key"), field("first_column"), visible, key_count,
            field("sequence"), field("instance"), *own, before, place,
        )  # fmt: skip

    def _again(self, gmem: _Operands, smem: _Shared, tile: _Tile) -> _Tile:
        """The same, read again: the scalars of a tile would take registers through the loop over its keys."""
        if self.takes:
            return self._tile(gmem, smem.work[tile.place, 0], smem.work[tile.place, 1], tile.place)
        return self._tile(gmem, tile.number, tile.before)

    def _consume(self, gmem: _Operands, products: _Products, tile: _Tile, results: _Results) -> None:
        config, smem, warpgroup = self.config, products.smem, products.warpgroup
        prepared = config.format.prepared
        local = warpgroup * ROWS
        loader = _Loader(gmem, smem, tile, config)
        if not config.producer:
            loader.queries(warpgroup)
            pl.when(warpgroup == 0)(loader.first)
        if self.merges and prepared:
            if config.blocks:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # outputs of the tile before stand there
            self._load_state(gmem, smem, tile, warpgroup)
        plgpu.barrier_wait(smem.q_there.at[warpgroup])
        cleaner = None if prepared else _Cleaner(smem, warpgroup, config.keys, self.interpret is not None)
        if cleaner:
            cleaner.reset()
            pl.when(self._whole(tile, 0) == tile.blocks)(cleaner.arrive)
        exponent = gmem.scales[tile.instance, 0]
        # the largest score is looked for before it is scaled
        pl.when(exponent < 0)(lambda: self._negate_queries(smem, warpgroup))
        exponent = jnp.where(exponent < 0, -exponent, exponent)
        if not prepared:
            pl.when((warpgroup == 1) & (tile.before == 0))(products.pass_turn)
        slot = tile.slot(0, config.stages)
        plgpu.barrier_wait(smem.k_there.at[slot])
        s = products.scores(products.start_scores(slot), slot)
        state = _Softmax(
            plgpu.layout_cast(jnp.zeros((ROWS, VALUES), jnp.float32), hopper.ACCUMULATOR),
            full_row(-jnp.inf, ROWS), hopper.no_sum(ROWS), full_row(0.0, ROWS),
        )  # fmt: skip
        halves = prepared and config.late
        softmax = self._halved if halves else self._probabilities
        carry = softmax(*self._scaled(tile, exponent, s, state, local, 0), state, local)
        if cleaner:
            plgpu.barrier_wait(smem.v_there.at[slot])

            @pl.when(self._whole(tile, 0) == 0)
            def clear() -> None:
                cleaner.clear(0, slot)
                cleaner.wait()

        def refill(number: Any) -> None:
            """Beside the products of block ``number``: what both consumers have left since."""
            if not config.producer:
                pl.when(warpgroup == 0)(lambda: loader.refill_k(number - 1))
                pl.when((warpgroup == 0) & (number > 1))(lambda: loader.refill_v(number - 2))

        def step(tile: _Tile, local: Any = None) -> Callable[[Any, Any], Any]:
            if prepared:
                one = self._late_step if halves else self._step
                return lambda number, carry: one(tile, products, exponent, refill, local, number, carry)
            own = None if local is None else cleaner
            return lambda number, carry: self._wide_step(tile, products, exponent, refill, own, local, number, carry)

        whole = self._whole(tile, local if prepared else 0, 1)
        carry = lax.fori_loop(1, whole, step(tile), carry)
        tile = self._again(gmem, smem, tile)
        carry = lax.fori_loop(whole, tile.blocks, step(tile, local), carry)
        p, state = self._whole_operand(*carry) if halves else carry
        self._end(gmem, products, cleaner, tile, p, state, results)
        if not config.producer and self.interpret is not None:  # which wants every release to be seen
            pl.when(warpgroup == 0)(lambda: self._see_refills(smem, tile))

    def _end(
        self, gmem: _Operands, products: _Products, cleaner: _Cleaner | None, tile: _Tile, p: Any, state: _Softmax,
        results: _Results,
    ) -> None:  # fmt: skip
        """The last values, and what becomes of all."""
        smem, warpgroup, leaves = products.smem, products.warpgroup, self.config.producer
        if cleaner is None:
            if leaves:
                plgpu.barrier_arrive(smem.q_free.at[0])
        elif self.merges:
            plgpu.commit_smem()  # no warp reads the queries
            self._load_state(gmem, smem, tile, warpgroup)
        last = tile.slot(tile.blocks - 1, self.config.stages)
        if cleaner is None:
            plgpu.barrier_wait(smem.v_there.at[last])
        weighed = products.weighed(products.start_values(p, last, state.out if cleaner else None), last)
        state = state._replace(out=weighed if cleaner else self._sum(state, weighed))
        if cleaner:
            pl.when(self._whole(tile, 0) == tile.blocks)(cleaner.wait)
        if self.takes and self.interpret is None:  # else what follows from it is kept for all tiles
            warpgroup = hopper.warpgroup()
        self._finish(gmem, smem, self._again(gmem, smem, tile), state, warpgroup, results)
        if cleaner and leaves:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(smem.q_free.at[0])

    def _whole(self, tile: _Tile, first_row: Any, least: int = 0) -> Any:
        """Blocks of keys that this row and all behind it see, not less than ``least``."""
        seen = jnp.clip(tile.visible + first_row, 0, tile.key_count) if self.problem.causal else tile.key_count
        return jnp.clip(lax.div(seen, self.config.keys), least, tile.blocks)

    def _negate_queries(self, smem: _Shared, warpgroup: Any) -> None:
        for part, (_, width) in enumerate(self.config.format.parts):
            rows = smem.queries(part, warpgroup)[1]
            hopper.negate(rows, min(width * self.config.format.size, 128), self.interpret is not None)
        plgpu.commit_smem()

    def _see_refills(self, smem: _Shared, tile: _Tile) -> None:
        slot = lambda number: lax.rem(number, self.config.stages)
        plgpu.barrier_wait(smem.k_free.at[slot(tile.blocks - 1)])
        pl.when(tile.blocks > 1)(lambda: plgpu.barrier_wait(smem.v_free.at[slot(tile.blocks - 2)]))
        plgpu.barrier_wait(smem.v_free.at[slot(tile.blocks - 1)])

    def _see_last_releases(self, smem: _Shared, blocks: Any) -> None:
        stages = self.config.stages

        @pl.loop(jnp.maximum(blocks - stages, 0), blocks)
        def see(number: Any) -> None:
            plgpu.barrier_wait(smem.k_free.at[lax.rem(number, stages)])
            plgpu.barrier_wait(smem.v_free.at[lax.rem(number, stages)])

        pl.when(blocks > 0)(lambda: plgpu.barrier_wait(smem.q_free.at[0]))

    def _visible(self, tile: _Tile, local: Any) -> Any:
        """Keys that each of 64 rows sees, [64]."""
        if not self.problem.causal:
            return plgpu.layout_cast(jnp.full((ROWS,), tile.key_count, jnp.int32), hopper.ROW)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=hopper.ROW) + (tile.visible + local)
        return jnp.minimum(row, tile.key_count)

    def _scaled(
        self, tile: _Tile, exponent: Any, s: Any, state: _Softmax, local: Any, number: Any
    ) -> tuple[list[Any], Any, Any]:
        """Scores of a block in pieces, their factor, and the maximum with them. With ``local``, the first row in the
        tile, they are masked and scaled already; without, every key is seen."""
        pieces = self._split(s) if local is None else self._masked(tile, exponent, s, local, number)
        factor = exponent if local is None else 1.0
        return pieces, factor, jnp.maximum(state.top, row_max(pieces) * factor)

    def _halved(
        self, pieces: list[Any], factor: Any, top: Any, state: _Softmax, local: Any
    ) -> tuple[Any, Any, _Softmax]:
        """Lifted probabilities of the first half of a block as an operand, and the exponents of the other half."""
        anchor = top if local is None else jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(state.top - anchor)
        exponents = [piece * factor - spread(anchor - LIFT, piece) for piece in pieces]
        half = len(exponents) // 2
        early = [*map(jnp.exp2, exponents[:half])]
        total = state.total * spread(shrink, state.total) + hopper.partial_sum(early)
        operand = hopper.as_operand(early, E4M3, self.interpret is not None)
        late = hopper.join(exponents[half:], self.interpret is not None)
        return operand, late, state._replace(top=top, total=total, shrink=shrink)

    def _whole_operand(self, early: Any, late: Any, state: _Softmax) -> tuple[Any, _Softmax]:
        """With the probabilities of the other half."""
        late = jnp.exp2(late)
        operand = hopper.as_operand([late], E4M3, self.interpret is not None)
        whole = hopper.join([early, operand], self.interpret is not None, hopper.OPERAND)
        return whole, state._replace(total=state.total + hopper.partial_sum([late]))

    def _probabilities(
        self, pieces: list[Any], factor: Any, top: Any, state: _Softmax, local: Any
    ) -> tuple[Any, _Softmax]:
        """All of a block as an operand."""
        lift = self.config.format.lift
        anchor = top if local is None else jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(state.top - anchor)
        pieces = [jnp.exp2(piece * factor - spread(anchor - lift, piece)) for piece in pieces]
        total = state.total * spread(shrink, state.total) + hopper.partial_sum(pieces)
        return self._as_operand(pieces, state._replace(top=top, total=total, shrink=shrink))

    def _probabilities_beside(
        self, pieces: list[Any], factor: Any, top: Any, state: _Softmax, local: Any, weighed: Callable[..., Any]
    ) -> tuple[Any, _Softmax]:
        """The same in bf16. ``weighed`` waits for values, which are multiplied beside the first ``config.beside``
        columns."""
        anchor = top if local is None else jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(state.top - anchor)
        probability = lambda piece: jnp.exp2(piece * factor - spread(anchor, piece))
        early = self.config.beside // pieces[0].shape[1]
        first = [*map(probability, pieces[:early])]
        total = state.total * spread(shrink, state.total) + hopper.partial_sum(first)
        out, (total, *pieces) = weighed([total, *first, *pieces[early:]])
        rest = [*map(probability, pieces[early:])]
        if rest:
            total = total + hopper.partial_sum(rest)
        return self._as_operand([*pieces[:early], *rest], _Softmax(out, top, total, shrink))

    def _as_operand(self, pieces: list[Any], state: _Softmax) -> tuple[Any, _Softmax]:
        operand = hopper.as_operand(pieces, self.config.format.dtype, self.interpret is not None)
        return operand, state if self.config.format.prepared else self._shrunk(state)

    def _split(self, s: Any) -> list[Any]:
        keys, piece = self.config.keys, self.config.piece
        if self.config.format.prepared and self.config.late:
            piece = keys // 2
        elif keys & (keys - 1) == 0 and self.config.beside in (0, keys):
            return [s]
        return [s[:, first : first + piece] for first in range(0, keys, piece)]

    def _masked(self, tile: _Tile, exponent: Any, s: Any, local: Any, number: Any) -> list[Any]:
        """Scaled scores, -inf where a key is not seen, in pieces that share the registers of their column numbers."""
        keys, width = self.config.keys, self.config.piece
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, width), 1, layout=hopper.ACCUMULATOR)
        visible = self._visible(tile, local) - number * keys
        pieces = []
        for first in range(0, keys, width):
            piece = s[:, first : first + width]
            pieces.append(jnp.where(column < spread(visible - first, piece), piece * exponent, -jnp.inf))
        return pieces

    def _step(
        self, tile: _Tile, products: _Products, exponent: Any, refill: Any, local: Any, number: Any, carry: Any
    ) -> tuple[Any, _Softmax]:
        """Scores of block ``number``, values of the block before, probabilities of this one."""
        operand, state = carry
        slot, before = (tile.slot(n, self.config.stages) for n in (number, number - 1))
        plgpu.barrier_wait(products.smem.v_there.at[before])
        plgpu.barrier_wait(products.smem.k_there.at[slot])
        scores, weighed = products.start_scores(slot), products.start_values(operand, before)
        refill(number)
        scores = products.scores(scores, slot, younger=1)
        scaled = self._scaled(tile, exponent, scores, state, local, number)
        if local is None:
            products.end_of_block()  # the maximum is found beside the products with the values
        weighed = products.weighed(weighed, before)
        return self._probabilities(*scaled, state._replace(out=self._sum(state, weighed)), local)

    def _late_step(
        self, tile: _Tile, products: _Products, exponent: Any, refill: Any, local: Any, number: Any, carry: Any
    ) -> tuple[Any, Any, _Softmax]:
        """Scores of block ``number`` and the rest of the exponentials of the block before; its values and the largest
        score; the first exponentials of block ``number``."""
        slot, before = (tile.slot(n, self.config.stages) for n in (number, number - 1))
        plgpu.barrier_wait(products.smem.k_there.at[slot])
        scores = products.start_scores(slot)
        operand, state = self._whole_operand(*carry)
        plgpu.barrier_wait(products.smem.v_there.at[before])
        weighed = products.start_values(operand, before)
        refill(number)
        products.end_of_block(1)
        scaled = self._scaled(tile, exponent, products.scores(scores, slot, younger=1), state, local, number)
        products.end_of_block(2)
        out = self._sum(state, products.weighed(weighed, before))
        return self._halved(*scaled, state._replace(out=products.computed(out)), local)

    def _wide_step(
        self, tile: _Tile, products: _Products, exponent: Any, refill: Any, cleaner: _Cleaner | None, local: Any,
        number: Any, carry: Any,
    ) -> tuple[Any, _Softmax]:  # fmt: skip
        """``_step`` in bf16."""
        operand, state = carry
        smem, config = products.smem, self.config
        slot, before = (tile.slot(n, config.stages) for n in (number, number - 1))
        plgpu.barrier_wait(smem.k_there.at[slot])
        products.wait_for_turn()
        scores, pending = products.start_scores(slot), products.start_values(operand, before, state.out)
        if config.turn == "issued":
            products.pass_turn()
        refill(number)
        if cleaner:
            plgpu.barrier_wait(smem.v_there.at[slot])
            cleaner.clear(number, slot)
        scores = products.scores(scores, slot, younger=2 if config.tail else 1)
        if config.turn == "scores":
            products.pass_turn()

        def weighed(held: Sequence[Any] = ()) -> Any:
            if held and config.parted:
                products.end_of_block(1)
            if config.turn == "done" and config.tail:
                products.wait_for_most()
                products.pass_turn()
            result = products.weighed(pending, before, held)
            if config.turn == "done" and not config.tail:
                products.pass_turn()
            if config.parted:
                products.end_of_block(2)
            return result

        if not config.beside:
            state = state._replace(out=weighed())
        scaled = self._scaled(tile, exponent, scores, state, local, number)
        if config.beside:
            operand, state = self._probabilities_beside(*scaled, state, local, weighed)
        else:
            operand, state = self._probabilities(*scaled, state, local)
        if cleaner:
            cleaner.wait()
        else:
            plgpu.barrier_wait(smem.v_there.at[slot])
        return operand, state

    @staticmethod
    def _sum(state: _Softmax, weighed: Any) -> Any:
        return state.out * spread(state.shrink, weighed) + weighed

    @staticmethod
    def _shrunk(state: _Softmax) -> _Softmax:
        return state._replace(out=state.out * spread(state.shrink, state.out))

    @staticmethod
    def _pieces(dtype: Any) -> int:
        """Copies of 128 bytes that a row of values takes."""
        return VALUES * jnp.dtype(dtype).itemsize // 128

    def _load_state(self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any) -> None:
        pieces = self._pieces(self.problem.state_dtype)
        rows, columns = pl.ds(tile.first_query + warpgroup * ROWS, ROWS), VALUES // pieces
        for piece in range(pieces):
            source = gmem.state_out.at[rows, tile.head, pl.ds(piece * columns, columns)]
            target = smem.state.at[self.slots(self.problem.state_dtype) * warpgroup + piece]
            plgpu.copy_gmem_to_smem(source, target, smem.state_there.at[warpgroup])

    def _finish(
        self, gmem: _Operands, smem: _Shared, tile: _Tile, state: _Softmax, warpgroup: Any, results: _Results
    ) -> None:
        """Normalises, merges the earlier state, quantises and stores."""
        total = state.total.sum(axis=1)
        nothing = total == 0.0
        v_scale = gmem.scales[tile.instance, 1]
        weight = jnp.where(nothing, 0.0, v_scale / jnp.where(nothing, 1.0, total))
        value = state.out * spread(weight, state.out)
        value = self._with_nonfinite(gmem, smem, tile, warpgroup, value)
        log_total = jnp.log(jnp.where(nothing, 1.0, total))
        lse = jnp.where(nothing, -jnp.inf, state.top * LN2 + (log_total - self.config.format.lift * LN2))
        if self.merges:
            value, lse = self._merged(gmem, smem, tile, lax.axis_index("warpgroup"), value, lse)
        elif not self.config.format.prepared:
            plgpu.commit_smem()  # no warp reads the queries
        elif self.config.blocks:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # outputs of the tile before stand there
        place = results.lse.at[lax.div(tile.first_output, self.problem.tokens), tile.head]
        if self.interpret is None:
            hopper.store_rows(place, tile.first_query + warpgroup * ROWS, self._own_rows(tile, warpgroup), lse)
        else:
            smem.lse.at[warpgroup][...] = lse
        self._stage(gmem, smem, tile, warpgroup, value)
        plgpu.commit_smem()
        mine = pl.ds(warpgroup * ROWS, ROWS)
        for group in range(self.groups):
            source = smem.scales.at[self.groups * warpgroup + group]
            plgpu.copy_smem_to_gmem(source, results.scales.at[tile.head, group, tile.index, mine], commit_group=False)
        self._store_rows(smem, tile, warpgroup, results.out, place)
        plgpu.commit_smem_to_gmem_group()

    def _with_nonfinite(self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any, value: Any) -> Any:
        """Values that are no numbers and were left out, for the rows that see their keys."""

        def first(ref: Any) -> Any:
            return plgpu.load(ref, layout=hopper.ACCUMULATOR.reduce(0), optimized=False)

        def seen(first: Any, value: Any) -> Any:
            visible = self._visible(tile, warpgroup * ROWS)
            if self.config.splits > 1:
                visible = visible + tile.skipped
            visible = jnp.maximum(visible, 0)
            return lax.broadcast_in_dim(first, value.shape, [1]) < spread(visible, value)

        def with_noted(value: Any) -> Any:
            for kind, special in enumerate((jnp.nan, jnp.inf, -jnp.inf)):
                value = jnp.where(seen(first(smem.record.at[kind]), value), value + special, value)
            return value

        if self.config.format.prepared:
            return jnp.where(seen(first(gmem.first_nan.at[tile.sequence, tile.head]), value), jnp.nan, value)
        noted = jnp.minimum(*(smem.record[NOTED, half * 64] for half in range(WARPGROUPS)))
        return lax.cond(noted == 0, with_noted, lambda value: value, value)

    def _merged(
        self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any, value: Any, lse: Any
    ) -> tuple[Any, Any]:
        """With the state over other keys. A side without weight contributes nothing, whatever it holds."""
        pieces = self._pieces(self.problem.state_dtype)
        plgpu.barrier_wait(smem.state_there.at[warpgroup])
        first = self.slots(self.problem.state_dtype) * warpgroup
        parts = [smem.state.at[first + n][...] for n in range(pieces)]
        earlier = hopper.join([part.astype(jnp.float32) for part in parts], self.interpret is not None)
        mine = pl.ds(warpgroup * ROWS, ROWS)
        other = plgpu.load(gmem.state_lse.at[tile.head, tile.index, mine], layout=hopper.ROW, optimized=False)
        top = jnp.maximum(lse, other)
        empty = top == -jnp.inf
        anchor = jnp.where(empty, 0.0, top)
        terms = [jnp.exp(x - anchor) for x in (other, lse)]
        total = jnp.where(empty, 1.0, terms[0] + terms[1])
        # -0.0 + x is x for every x, -0.0 included
        absent = spread(jnp.where(empty, 0.0, -0.0), value)
        shares = []
        for term, x in zip(terms, (earlier, value), strict=True):
            weight = spread(term / total, x)
            shares.append(jnp.where(weight < TINY, absent, x * weight))
        plgpu.commit_smem()  # all have read before outputs are written to the same memory
        return shares[0] + shares[1], jnp.where(empty, -jnp.inf, anchor + jnp.log(total))

    def _stage(self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any, value: Any) -> None:
        """Rounds or quantises into shared memory."""
        spec = self.problem.output_quant
        if isinstance(spec, Fp8PerTensor):
            value = value * gmem.scales[tile.instance, 2]
        scaled = []
        for group in range(self.groups):
            part = value[:, group * spec.group_size : (group + 1) * spec.group_size]
            scale, inverse, _ = group_scale(finite_magnitude(part).max(axis=1), spec)
            smem.scales.at[self.groups * warpgroup + group][...] = scale
            scaled.append(part * spread(inverse, part))
        value = hopper.join(scaled, self.interpret is not None) if scaled else value
        if self.interpret is not None:
            value = to_e4m3(value) if spec is not None else value.astype(self.out_dtype)
        pieces = self._pieces(self.out_dtype)
        columns = VALUES // pieces
        for piece in range(pieces):
            target = smem.out.at[self.slots(self.out_dtype) * warpgroup + piece]
            part = value[:, piece * columns : (piece + 1) * columns]
            if self.interpret is None:
                hopper.store_swizzled(target, part)
            else:
                target[...] = part

    @staticmethod
    def _own_rows(tile: _Tile, warpgroup: Any) -> Any:
        return jnp.clip(tile.rows - warpgroup * ROWS, 0, ROWS)

    def _store_rows(self, smem: _Shared, tile: _Tile, warpgroup: Any, out: Any, lse: Any) -> None:
        """Copies of 64, 32, ... 1 rows, as many as the count has bits: what lies behind belongs to other tiles."""
        count = self._own_rows(tile, warpgroup)
        first, query = tile.first_output + warpgroup * ROWS, tile.first_query + warpgroup * ROWS
        pieces = self._pieces(self.out_dtype)
        columns = VALUES // pieces
        done = count * 0
        size = ROWS
        while size:

            @pl.when((count & size) != 0)
            def copy(size: int = size, done: Any = done) -> None:
                for piece in range(pieces):
                    source = smem.out.at[self.slots(self.out_dtype) * warpgroup + piece].at[pl.ds(done, size)]
                    target = out.at[pl.ds(first + done, size), tile.head, pl.ds(piece * columns, columns)]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)
                if self.interpret is not None:
                    target = lse.at[pl.ds(query + done, size)]
                    plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup].at[pl.ds(done, size)], target, commit_group=False)

            done = done + (count & size)
            size //= 2
