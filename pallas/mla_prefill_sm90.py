"""``mla_prefill`` in FP8 on Hopper: two consumer warpgroups of 64 query rows and a producer, ragged, exact sums.

A block computes one tile: up to 128 query rows of one sequence and one head, against that sequence's keys in blocks
counted from its first key, so that a sequence is computed alike wherever it stands in a batch. A consumer starts the
scores of a block of keys and the products with the values of the block before together, looks for the largest score
beside the second, and computes probabilities while the other consumer has the tensor cores. Hopper's FP8 products keep
about 13 bits of their sum: each block of keys gets a sum of its own, and the blocks are added in float32.

Where few tiles meet many keys, the blocks of keys that a tile sees are split over several tiles of the list, each with
float32 rows of its own, and the kernel of ``merge_attn_states`` makes the result of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas import merge_sm90, mla_prepare_sm90
from jax_fp8attn.pallas.common import configs, hopper, tile_list
from jax_fp8attn.pallas.common.backend import to_e4m3, varying_like
from jax_fp8attn.pallas.common.groups import finite_magnitude, group_scale
from jax_fp8attn.pallas.common.hopper import full_row, row_max, spread

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
PIECE = 16  # columns that are masked at once
RESIDENT = 24 << 20  # bytes of keys and values that half of the L2 holds
TINY = 2.0**-126  # the smallest normal float32: what lies below may have been flushed to zero
SMS = 132  # of an H200, a tile each
TILE, BLOCK = 5.8, 1.3  # microseconds that a tile takes, and each of its blocks of keys
MERGE, MEMORY = 5.0, 4e6  # microseconds of a merge, and bytes a microsecond
MOST_SPLITS, LEAST_BLOCKS = 16, 8  # of keys in a split
WORTHWHILE = 0.9  # of the time without splits
MERGE_REGISTERS = 64  # of a thread for the states that it merges
LIFT = 8.0  # probabilities are stored times 2^8: the smallest stay normal numbers of e4m3


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """How a block works.

    stages     blocks of keys in shared memory
    producer   a warpgroup of its own loads keys and values; else the first consumer does
    registers  of a consumer's and of the producer's thread; without a producer both have what the compiler gives
    blocks     that work off all tiles one after the other, the next tile's operands loaded ahead; 0: a block a tile.
               Needs a producer
    splits     of the keys that a tile sees, each a tile of its own; the results are merged. 1: none
    """

    stages: int = 2
    producer: bool = True
    registers: tuple[int, int] = (240, 24)
    blocks: int = 0
    splits: int = 1

    def __post_init__(self) -> None:
        consumer, producer = self.registers
        if not self.producer and self.stages < 2:
            raise ValueError(f"without a producer two stages at least are needed: {self}")
        if self.blocks and not self.producer:
            raise ValueError(f"blocks that take several tiles need a producer: {self}")
        if any(r % 8 for r in self.registers) or 128 * (WARPGROUPS * consumer + producer) > 65536:
            raise ValueError(f"registers must be multiples of 8 and fit into 65536: {self}")
        if self.splits < 1:
            raise ValueError(f"a tile has one split at least: {self}")
        if self.shared_memory > 232448:
            raise ValueError(f"{self.shared_memory} bytes of shared memory, a block can have 232448: {self}")

    @property
    def shared_memory(self) -> int:
        """Bytes of a block, barriers apart."""
        queries = WARPGROUPS * ROWS * (NOPE + ROPE)
        outputs = WARPGROUPS * ROWS * (4 * VALUES + 4)
        return queries + outputs + self.stages * KEYS * (NOPE + ROPE + VALUES)


def default_config(problem: MlaProblem) -> MlaConfig:
    """A producer of its own where the assembler keeps setmaxnreg: jax 0.12 assembles through nvJitLink, which drops
    it, and three warpgroups then have 168 registers a thread."""
    return MlaConfig(producer=jax.__version_info__ < (0, 12), splits=_best_splits(problem))


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
        waves = -(-splits * tiles // SMS)
        attend = max(waves * (TILE + BLOCK * mean / splits), TILE + BLOCK * -(-longest // splits))
        return attend + (MERGE + splits * partials if splits > 1 else 0.0)

    best = min(range(1, max(1, min(MOST_SPLITS, int(mean) // LEAST_BLOCKS)) + 1), key=estimate)
    return best if estimate(best) < WORTHWHILE * estimate(1) else 1


def supports(problem: MlaProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if device.compute_capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, the device has {device.compute_capability}")
    if problem.compute != "fp8":
        reasons.append(f"computes in FP8 only, not in {problem.compute}")
    return (*reasons, *mla_prepare_sm90.supports(problem))


def notes(problem: MlaProblem) -> tuple[str, ...]:
    splits = default_config(problem).splits
    found = [f"keys in {splits} splits, merged by the kernel of merge_attn_states"] if splits > 1 else []
    where = "the merge" if splits > 1 else "the attention kernel"
    return (*found, *([f"FP8 output: fused into {where}"] if problem.output_quant is not None else []))


def run(problem: MlaProblem, arrays: MlaArrays) -> Any:
    return build(problem, configs.chosen("mla_prefill", problem, default_config(problem)))(arrays)


def build(problem: MlaProblem, config: MlaConfig, interpret: Any = None) -> Callable[[MlaArrays], Any]:
    """The op for one problem as a function of its arrays."""
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
        return _operands(problem, arrays, regions, work, interpret), work

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


def _result(problem: MlaProblem, arrays: MlaArrays, work: tile_list.Work, out: jax.Array, *tiled: jax.Array) -> Any:
    """lse and scales leave the kernel tile by tile; here each token's are picked."""
    spec = problem.output_quant
    by_token = [tile_list.rows_of_tiles(x, work)[0] for x in tiled]
    if isinstance(spec, Fp8PerTensor):
        scale = arrays.output_scale
        out = Fp8Array(out, scale[0] if problem.instances == 1 else scale, spec, problem.tokens)
    elif spec is not None:
        scales = by_token.pop().transpose(2, 0, 1).reshape(problem.tokens, -1)  # [H, groups of a head, T] before
        out = Fp8Array(out, physical_scales(scales, spec), spec, problem.tokens)
    return (out, by_token[0]) if problem.return_lse else out


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
        out.reshape(splits, problem.tokens, *out.shape[1:]), tile_list.rows_of_tiles(lse, work), None,
        arrays.output_scale,
    )  # fmt: skip
    return merge_sm90.build(states, config, interpret)(given)


class _Operands(NamedTuple):
    """What the kernel reads."""

    q: jax.Array  # e4m3 [T, H, 192]
    k: jax.Array  # e4m3 [S, H, 192], or the nope part [S, H, 128]
    k_rope: jax.Array | None  # e4m3 [S, 64]
    v: jax.Array  # e4m3 [H, 128, columns], columns in regions that start at multiples of 128; 0 for NaN
    first_nan: jax.Array  # int32 [B, H, 128]: the first key of a sequence with NaN in a column of its values
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
    codes = jnp.ones_like(exponent) if arrays.output_scale is None else 1.0 / arrays.output_scale
    state = problem.state_dtype is not None
    return _Operands(
        q=stored(arrays.q, arrays.q_scale),
        k=stored(arrays.k, arrays.k_scale),
        k_rope=stored(arrays.k_rope, arrays.k_scale),
        v=values,
        first_nan=first_nan,
        scales=jnp.stack([exponent, arrays.v_scale, codes], axis=1),
        tiles=work.tiles,
        state_out=arrays.initial_out if state else None,
        state_lse=tile_list.tiles_of_rows(arrays.initial_lse, work) if state else None,
    )


class _Shared(NamedTuple):
    """Shared memory and barriers, by role. Of a pair copies write the first view and wgmma reads the second."""

    q_nope: tuple[Any, Any]  # [2, 64, 128]
    q_rope: tuple[Any, Any]
    k_nope: tuple[Any, Any]  # [stages, keys, 128]
    k_rope: tuple[Any, Any]
    v: Any  # [stages, 128, keys]
    state: Any  # [2 * pieces, 64, columns], in the same memory as out; None without a state
    out: Any  # [2 * pieces, 64, columns]
    lse: Any  # [2, 64]
    scales: Any  # [2 * groups, 64]; None without groups
    q_there: Any
    q_free: Any
    state_there: Any
    k_there: Any
    v_there: Any
    k_free: Any
    v_free: Any


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

    def slot(self, number: Any, stages: int) -> Any:
        """Where block ``number`` of the keys stands in shared memory."""
        return lax.rem(self.before + number, stages)


class _Results(NamedTuple):
    """What the kernel writes."""

    out: Any  # [splits * T, H, 128]
    lse: Any  # [H, tiles, 128]
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
        for part, where in ((smem.q_nope, pl.ds(0, NOPE)), (smem.q_rope, pl.ds(NOPE, ROPE))):
            source = self.gmem.q.at[rows, self.tile.head, where]
            plgpu.copy_gmem_to_smem(source, part[0].at[warpgroup], smem.q_there.at[warpgroup])

    def _load_k(self, number: Any, slot: Any) -> None:
        gmem, smem, tile = self.gmem, self.smem, self.tile
        rows = pl.ds(tile.first_key + number * KEYS, KEYS)
        if gmem.k_rope is None:
            nope, rope = gmem.k.at[rows, tile.head, pl.ds(0, NOPE)], gmem.k.at[rows, tile.head, pl.ds(NOPE, ROPE)]
        else:
            nope, rope = gmem.k.at[rows, tile.head], gmem.k_rope.at[rows]
        plgpu.copy_gmem_to_smem(nope, smem.k_nope[0].at[slot], smem.k_there.at[slot])
        plgpu.copy_gmem_to_smem(rope, smem.k_rope[0].at[slot], smem.k_there.at[slot])

    def _load_v(self, number: Any, slot: Any) -> None:
        gmem, smem, tile = self.gmem, self.smem, self.tile
        first = pl.multiple_of(tile.first_column + number * KEYS, KEYS)
        columns = pl.ds(first, KEYS)
        plgpu.copy_gmem_to_smem(gmem.v.at[tile.head, :, columns], smem.v.at[slot], smem.v_there.at[slot])


class _Products(NamedTuple):
    """The two products of a warpgroup: its 64 queries with a block of keys, and probabilities with a block of values.

    Interpreted, the operands are read plainly, so that a race on them is seen.
    """

    smem: _Shared
    warpgroup: Any
    interpreted: bool

    def start_scores(self, slot: Any) -> Any:
        """[64, keys]"""
        smem = self.smem
        parts = ((smem.q_nope, smem.k_nope, NOPE), (smem.q_rope, smem.k_rope, ROPE))
        if not self.interpreted:
            pairs = [(q[1].at[self.warpgroup], k[1].at[slot], swizzle) for q, k, swizzle in parts]
            return hopper.start((ROWS, KEYS), pairs)
        wide = lambda view, index: view[1][index].astype(jnp.float32)
        products = [jnp.dot(wide(q, self.warpgroup), wide(k, slot).T) for q, k, _ in parts]
        plgpu.commit_smem()
        return products[0] + products[1]

    def start_values(self, operand: Any, slot: Any) -> Any:
        """[64, 128]"""
        if not self.interpreted:
            return hopper.start((ROWS, VALUES), [(operand, self.smem.v.at[slot], KEYS)])
        product = jnp.dot(operand.astype(jnp.float32), self.smem.v[slot].astype(jnp.float32).T)
        plgpu.commit_smem()
        return product

    def scores(self, pending: Any, slot: Any, younger: int = 0) -> Any:
        """The result; the keys are free then."""
        result = self._settled(pending, younger)
        plgpu.barrier_arrive(self.smem.k_free.at[slot])
        return result

    def weighed(self, pending: Any, slot: Any) -> Any:
        """The result; the values are free then."""
        result = self._settled(pending, 0)
        plgpu.barrier_arrive(self.smem.v_free.at[slot])
        return result

    def _settled(self, pending: Any, younger: int) -> Any:
        return pending if self.interpreted else hopper.settled(pending, younger)

    def end_of_block(self) -> None:
        if not self.interpreted:
            hopper.end_of_block()


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
    def out_dtype(self) -> Any:
        return E4M3 if self.problem.output_quant is not None else jnp.dtype(self.problem.out_dtype)

    def call(self, operands: _Operands) -> list[jax.Array]:
        problem = self.problem
        options = {} if self.interpret is None else {"interpret": self.interpret}
        scale_shape = (problem.heads, self.groups, self.tiles, WARPGROUPS * ROWS)
        scales = jax.ShapeDtypeStruct(scale_shape, jnp.float32)

        def fp8attn_mla_prefill_sm90(*refs: Any) -> None:
            self._body(*refs)

        return plgpu.kernel(
            fp8attn_mla_prefill_sm90,
            out_type=[
                jax.ShapeDtypeStruct((self.config.splits * problem.tokens, problem.heads, VALUES), self.out_dtype),
                jax.ShapeDtypeStruct((problem.heads, self.tiles, WARPGROUPS * ROWS), jnp.float32),
                *([scales] if self.groups else []),
            ],
            grid=(self.blocks,),
            grid_names=("block",),
            num_threads=WARPGROUPS + self.config.producer,
            thread_name="warpgroup",
            scratch_types=self._scratch(),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            **options,
        )(*(x for x in operands if x is not None))

    def _scratch(self) -> list[Any]:
        config, plain = self.config, self.interpret is not None
        stages = config.stages
        anywhere = lambda shape, swizzle: hopper.rows_anywhere(shape, E4M3, swizzle, plain)
        barrier = lambda arrivals, count: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
        out = hopper.rows_out(WARPGROUPS, ROWS, VALUES, self.out_dtype, plain)
        if self.merges:
            state = hopper.rows_out(WARPGROUPS, ROWS, VALUES, jnp.dtype(self.problem.state_dtype), plain)
            out = [state, out] if plain else plgpu.RefUnion(state, out)
        return [
            anywhere((WARPGROUPS, ROWS, NOPE), 128),
            anywhere((WARPGROUPS, ROWS, ROPE), 64),
            anywhere((stages, KEYS, NOPE), 128),
            anywhere((stages, KEYS, ROPE), 64),
            hopper.tiles((stages, VALUES, KEYS), E4M3, KEYS),
            out,
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            *([plgpu.SMEM((WARPGROUPS * self.groups, ROWS), jnp.float32)] if self.groups else []),
            barrier(2, WARPGROUPS),
            barrier(WARPGROUPS, 1),
            *([barrier(self._pieces(self.problem.state_dtype), WARPGROUPS)] if self.merges else []),
            barrier(2, stages),
            barrier(1, stages),
            barrier(WARPGROUPS, stages),
            barrier(WARPGROUPS, stages),
        ]

    def _body(self, *refs: Any) -> None:
        given = iter(refs)
        present = {"k_rope": self.problem.k_rope_dtype is not None, "state_out": self.merges, "state_lse": self.merges}
        gmem = _Operands(*(next(given) if present.get(name, True) else None for name in _Operands._fields))
        out, lse = next(given), next(given)
        results = _Results(out, lse, next(given) if self.groups else None)
        views = [hopper.views(next(given), self.interpret is not None) for _ in range(4)]
        v, last = next(given), next(given)
        state, out_smem = last if self.merges else (None, last)
        smem = _Shared(
            *views, v, state, out_smem, next(given), next(given) if self.groups else None,
            next(given), next(given), next(given) if self.merges else None, *given,
        )  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        products = _Products(smem, warpgroup, self.interpret is not None)

        @pl.when(warpgroup < WARPGROUPS)
        def consumer() -> None:
            if self.config.producer:
                plgpu.set_max_registers(self.config.registers[0], action="increase")
            self._each_tile(gmem, lambda tile: self._consume(gmem, products, tile, results))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if self.config.producer:

            @pl.when(warpgroup == WARPGROUPS)
            def producer() -> None:
                plgpu.set_max_registers(self.config.registers[1], action="decrease")
                done = self._each_tile(gmem, lambda tile: self._produce(_Loader(gmem, smem, tile, self.config)))
                if self.interpret is not None:
                    self._see_last_releases(smem, done)

    def _each_tile(self, gmem: _Operands, work: Callable[[_Tile], None]) -> Any:
        """The tiles of this block of threads: in every other round the last block has the first of them, so that all
        get as much. Returns the blocks of keys of all."""
        tiles, block = self.problem.heads * self.tiles, lax.axis_index("block")

        def one(turn: Any, before: Any) -> Any:
            number = turn * self.blocks + jnp.where(lax.rem(turn, 2) == 0, block, self.blocks - 1 - block)
            tile = self._tile(gmem, jnp.minimum(number, tiles - 1), before)
            there = (tile.rows > 0) & (number < tiles)
            pl.when(there)(lambda: work(tile))
            return before + jnp.where(there, tile.blocks, 0)

        if self.blocks < tiles:
            return lax.fori_loop(0, -(-tiles // self.blocks), one, jnp.int32(0))
        tile = self._tile(gmem, block, 0)
        pl.when(tile.rows > 0)(lambda: work(tile))
        return jnp.where(tile.rows > 0, tile.blocks, 0)

    def _produce(self, loader: _Loader) -> None:
        pl.when(loader.tile.before > 0)(lambda: plgpu.barrier_wait(loader.smem.q_free.at[0]))
        for warpgroup in range(WARPGROUPS):
            loader.queries(warpgroup)
        loader.stream()

    def _place(self, number: Any) -> tuple[Any, Any]:
        """Head and tile in the order of work: a group of heads whose keys and values fit into the L2 together, the
        longest tiles of all of them first, then the next group."""
        heads = self.problem.heads
        if self.config.splits > 1:  # few tiles, at work together
            return lax.rem(number, heads), lax.div(number, heads)
        groups = -(-heads // max(1, min(heads, RESIDENT // ((NOPE + ROPE + VALUES) * self.problem.keys))))
        size = -(-heads // groups)
        group, rest = lax.div(number, size * self.tiles), lax.rem(number, size * self.tiles)
        width = jnp.minimum(heads - group * size, size) if heads % size else size
        return group * size + lax.rem(rest, width), lax.div(rest, width)

    def _tile(self, gmem: _Operands, number: Any, before: Any) -> _Tile:
        head, index = self._place(number)
        field = lambda name: gmem.tiles[index, tile_list.SPLIT_FIELDS.index(name)]
        first_query, rows, visible, key_count = map(field, ("first_query", "rows", "visible", "key_count"))
        if self.config.splits == 1:
            most = jnp.minimum(visible + rows - 1, key_count) if self.problem.causal else key_count
            own = first_query, 0, jnp.maximum(lax.div(most + (KEYS - 1), KEYS), 1)
        else:
            own = map(field, ("first_output", "skipped", "blocks"))
        return _Tile(
            number, index, head, first_query, rows, field("first_key"), field("first_column"), visible, key_count,
            field("sequence"), field("instance"), *own, before,
        )  # fmt: skip

    def _consume(self, gmem: _Operands, products: _Products, tile: _Tile, results: _Results) -> None:
        config, smem, warpgroup = self.config, products.smem, products.warpgroup
        local = warpgroup * ROWS
        loader = _Loader(gmem, smem, tile, config)
        if not config.producer:
            loader.queries(warpgroup)
            pl.when(warpgroup == 0)(loader.first)
        if self.merges:
            if config.blocks:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # outputs of the tile before stand there
            self._load_state(gmem, smem, tile, warpgroup)
        plgpu.barrier_wait(smem.q_there.at[warpgroup])
        exponent = gmem.scales[tile.instance, 0]
        # the largest score is looked for before it is scaled
        pl.when(exponent < 0)(lambda: self._negate_queries(smem, warpgroup))
        exponent = jnp.where(exponent < 0, -exponent, exponent)
        slot = tile.slot(0, config.stages)
        plgpu.barrier_wait(smem.k_there.at[slot])
        s = products.scores(products.start_scores(slot), slot)
        state = _Softmax(
            plgpu.layout_cast(jnp.zeros((ROWS, VALUES), jnp.float32), hopper.ACCUMULATOR),
            full_row(-jnp.inf, ROWS), hopper.no_sum(ROWS), full_row(0.0, ROWS),
        )  # fmt: skip
        p, state = self._probabilities(*self._scaled(tile, exponent, s, state, local, 0), state, local)
        plgpu.barrier_wait(smem.v_there.at[slot])

        def refill(number: Any) -> None:
            """Beside the products of block ``number``: what both consumers have left since."""
            if not config.producer:
                pl.when(warpgroup == 0)(lambda: loader.refill_k(number - 1))
                pl.when((warpgroup == 0) & (number > 1))(lambda: loader.refill_v(number - 2))

        def step(tile: _Tile, local: Any = None) -> Callable[[Any, Any], Any]:
            return lambda number, carry: self._step(tile, products, exponent, refill, local, number, carry)

        least = jnp.clip(tile.visible + local, 0, tile.key_count) if self.problem.causal else tile.key_count
        whole = jnp.clip(lax.div(least, KEYS), 1, tile.blocks)
        carry = lax.fori_loop(1, whole, step(tile), (p, state))
        # read again: the scalars of a tile would take registers through the loop
        again = self._tile(gmem, tile.number, tile.before)
        p, state = lax.fori_loop(whole, tile.blocks, step(again, local), carry)
        if config.producer:
            plgpu.barrier_arrive(smem.q_free.at[0])
        last = tile.slot(tile.blocks - 1, config.stages)
        state = state._replace(out=self._sum(state, products.weighed(products.start_values(p, last), last)))
        self._finish(gmem, smem, self._tile(gmem, tile.number, 0), state, warpgroup, results)
        if not config.producer and self.interpret is not None:  # which wants every release to be seen
            pl.when(warpgroup == 0)(lambda: self._see_refills(smem, tile))

    def _negate_queries(self, smem: _Shared, warpgroup: Any) -> None:
        for part in (smem.q_nope, smem.q_rope):
            view = part[1].at[warpgroup]
            bits = lax.bitcast_convert_type(view[...], jnp.int8)
            view[...] = lax.bitcast_convert_type(bits ^ jnp.int8(-128), E4M3)
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
        pieces = [s] if local is None else self._masked(tile, exponent, s, local, number)
        factor = exponent if local is None else 1.0
        return pieces, factor, jnp.maximum(state.top, row_max(pieces) * factor)

    def _probabilities(
        self, pieces: list[Any], factor: Any, top: Any, state: _Softmax, local: Any
    ) -> tuple[Any, _Softmax]:
        """Lifted probabilities as an operand."""
        anchor = top if local is None else jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(state.top - anchor)
        pieces = [jnp.exp2(piece * factor - spread(anchor - LIFT, piece)) for piece in pieces]
        total = state.total * spread(shrink, state.total) + hopper.partial_sum(pieces)
        operand = hopper.as_operand(pieces, self.interpret is not None)
        return operand, state._replace(top=top, total=total, shrink=shrink)

    def _masked(self, tile: _Tile, exponent: Any, s: Any, local: Any, number: Any) -> list[Any]:
        """Scaled scores, -inf where a key is not seen, in pieces that share the registers of their column numbers."""
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, PIECE), 1, layout=hopper.ACCUMULATOR)
        visible = self._visible(tile, local) - number * KEYS
        pieces = []
        for first in range(0, KEYS, PIECE):
            piece = s[:, first : first + PIECE]
            pieces.append(jnp.where(column < spread(visible - first, piece), piece * exponent, -jnp.inf))
        return pieces

    def _step(
        self, tile: _Tile, products: _Products, exponent: Any, refill: Any, local: Any, number: Any, carry: Any
    ) -> tuple[Any, _Softmax]:
        """Scores of block ``number``, values of the block before, probabilities of this one."""
        operand, state = carry
        slot, before = (tile.slot(n, self.config.stages) for n in (number, number - 1))
        plgpu.barrier_wait(products.smem.k_there.at[slot])
        scores, weighed = products.start_scores(slot), products.start_values(operand, before)
        refill(number)
        scores = products.scores(scores, slot, younger=1)
        scaled = self._scaled(tile, exponent, scores, state, local, number)
        if local is None:
            products.end_of_block()  # the maximum is found beside the products with the values
        weighed = products.weighed(weighed, before)
        plgpu.barrier_wait(products.smem.v_there.at[slot])
        return self._probabilities(*scaled, state._replace(out=self._sum(state, weighed)), local)

    @staticmethod
    def _sum(state: _Softmax, weighed: Any) -> Any:
        return state.out * spread(state.shrink, weighed) + weighed

    @staticmethod
    def _pieces(dtype: Any) -> int:
        """Copies of 128 bytes that a row of values takes."""
        return VALUES * jnp.dtype(dtype).itemsize // 128

    def _load_state(self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any) -> None:
        pieces = self._pieces(self.problem.state_dtype)
        rows, columns = pl.ds(tile.first_query + warpgroup * ROWS, ROWS), VALUES // pieces
        for piece in range(pieces):
            source = gmem.state_out.at[rows, tile.head, pl.ds(piece * columns, columns)]
            target = smem.state.at[pieces * warpgroup + piece]
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
        first_nan = plgpu.load(
            gmem.first_nan.at[tile.sequence, tile.head], layout=hopper.ACCUMULATOR.reduce(0), optimized=False
        )
        visible = self._visible(tile, warpgroup * ROWS)
        if self.config.splits > 1:
            visible = visible + tile.skipped
        visible = jnp.maximum(visible, 0)
        seen = lax.broadcast_in_dim(first_nan, value.shape, [1]) < spread(visible, value)
        value = jnp.where(seen, jnp.nan, value)
        log_total = jnp.log(jnp.where(nothing, 1.0, total))
        lse = jnp.where(nothing, -jnp.inf, state.top * LN2 + (log_total - LIFT * LN2))
        if self.merges:
            value, lse = self._merged(gmem, smem, tile, warpgroup, value, lse)
        if self.config.blocks and not self.merges:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # outputs of the tile before stand there
        smem.lse.at[warpgroup][...] = lse
        self._stage(gmem, smem, tile, warpgroup, value)
        plgpu.commit_smem()
        mine = pl.ds(warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], results.lse.at[tile.head, tile.index, mine], commit_group=False)
        for group in range(self.groups):
            source = smem.scales.at[self.groups * warpgroup + group]
            plgpu.copy_smem_to_gmem(source, results.scales.at[tile.head, group, tile.index, mine], commit_group=False)
        self._store_rows(smem, tile, warpgroup, results.out)
        plgpu.commit_smem_to_gmem_group()

    def _merged(
        self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any, value: Any, lse: Any
    ) -> tuple[Any, Any]:
        """With the state over other keys. A side without weight contributes nothing, whatever it holds."""
        pieces = self._pieces(self.problem.state_dtype)
        plgpu.barrier_wait(smem.state_there.at[warpgroup])
        parts = [smem.state.at[pieces * warpgroup + n][...] for n in range(pieces)]
        earlier = hopper.join([part.astype(jnp.float32) for part in parts], self.interpret is not None)
        plgpu.commit_smem()  # all have read before outputs are written to the same memory
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
        return shares[0] + shares[1], jnp.where(empty, -jnp.inf, anchor + jnp.log(total))

    def _stage(self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any, value: Any) -> None:
        """Rounds or quantises into shared memory."""
        spec = self.problem.output_quant
        if isinstance(spec, Fp8PerTensor):
            value = to_e4m3(value * gmem.scales[tile.instance, 2])
        codes = []
        for group in range(self.groups):
            part = value[:, group * spec.group_size : (group + 1) * spec.group_size]
            scale, inverse, _ = group_scale(finite_magnitude(part).max(axis=1), spec)
            smem.scales.at[self.groups * warpgroup + group][...] = scale
            codes.append(to_e4m3(part * spread(inverse, part)))
        value = hopper.join(codes, self.interpret is not None) if codes else value.astype(self.out_dtype)
        pieces = self._pieces(self.out_dtype)
        columns = VALUES // pieces
        for piece in range(pieces):
            smem.out.at[pieces * warpgroup + piece][...] = value[:, piece * columns : (piece + 1) * columns]

    def _store_rows(self, smem: _Shared, tile: _Tile, warpgroup: Any, out: Any) -> None:
        """Copies of 64, 32, ... 1 rows, as many as the count has bits: what lies behind belongs to other tiles."""
        count = jnp.clip(tile.rows - warpgroup * ROWS, 0, ROWS)
        first = tile.first_output + warpgroup * ROWS
        pieces = self._pieces(self.out_dtype)
        columns = VALUES // pieces
        done = count * 0
        size = ROWS
        while size:

            @pl.when((count & size) != 0)
            def copy(size: int = size, done: Any = done) -> None:
                for piece in range(pieces):
                    source = smem.out.at[pieces * warpgroup + piece].at[pl.ds(done, size)]
                    target = out.at[pl.ds(first + done, size), tile.head, pl.ds(piece * columns, columns)]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)

            done = done + (count & size)
            size //= 2
