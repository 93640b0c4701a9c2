"""``mla_prefill`` in FP8 on Hopper: two consumer warpgroups of 64 query rows and a producer, ragged, exact sums.

A block computes one tile: up to 128 query rows of one sequence and one head, against that sequence's keys in blocks
counted from its first key, so that a sequence is computed alike wherever it stands in a batch. The scores of a block of
keys are computed while the values of the block before are weighted. Hopper's FP8 products keep about 13 bits of their
sum: each block of keys gets a sum of its own, and the blocks are added in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import hopper, tile_list
from jax_fp8attn.pallas.common.backend import varying_like
from jax_fp8attn.pallas.common.hopper import finished, full_row, row_max, row_sum, spread

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import E4M3, quantize_output, to_stored

LOG2E, LN2 = math.log2(math.e), math.log(2.0)
WARPGROUPS, ROWS = 2, 64  # of consumers, and query rows of each
NOPE, ROPE, VALUES = 128, 64, 128
PIECE = 64  # columns that are masked at once
LIFT = 8.0  # probabilities are stored times 2^8: the smallest stay normal numbers of e4m3


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """How a block works.

    keys       keys of a block
    stages     blocks of keys in shared memory
    registers  of a consumer's and of the producer's thread
    """

    keys: int = 128
    stages: int = 2
    registers: tuple[int, int] = (240, 24)

    def __post_init__(self) -> None:
        consumer, producer = self.registers
        if self.keys % 64 or not 64 <= self.keys <= 256:
            raise ValueError(f"keys of a block must be a multiple of 64 up to 256: {self}")
        if any(r % 8 for r in self.registers) or 128 * (WARPGROUPS * consumer + producer) > 65536:
            raise ValueError(f"registers must be multiples of 8 and fit into 65536: {self}")
        if self.shared_memory > 232448:
            raise ValueError(f"{self.shared_memory} bytes of shared memory, a block can have 232448: {self}")

    @property
    def shared_memory(self) -> int:
        """Bytes of a block, barriers apart."""
        queries = WARPGROUPS * ROWS * (NOPE + ROPE)
        outputs = WARPGROUPS * ROWS * (4 * VALUES + 4)
        return queries + outputs + self.stages * self.keys * (NOPE + ROPE + VALUES)


def supports(problem: MlaProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if device.compute_capability != (9, 0):
        reasons.append(f"needs compute capability 9.0, the device has {device.compute_capability}")
    if problem.compute != "fp8":
        reasons.append(f"computes in FP8 only, not in {problem.compute}")
    return tuple(reasons)


def run(problem: MlaProblem, arrays: MlaArrays) -> Any:
    return build(problem, MlaConfig())(arrays)


def build(problem: MlaProblem, config: MlaConfig, interpret: Any = None) -> Callable[[MlaArrays], Any]:
    """The op for one problem as a function of its arrays."""

    @jax.enable_x64(False)
    def op(arrays: MlaArrays) -> Any:
        out, lse = _attention(problem, config, arrays, interpret)
        out = quantize_output(out, problem.output_quant, arrays.output_scale, problem.out_dtype)
        return (out, lse) if problem.return_lse else out

    return op


class _Operands(NamedTuple):
    """What the kernel reads."""

    q: jax.Array  # e4m3 [T, H, 192]
    k: jax.Array  # e4m3 [S, H, 192], or the nope part [S, H, 128]
    k_rope: jax.Array | None  # e4m3 [S, 64]
    v: jax.Array  # e4m3 [H, 128, columns], columns in regions that start at multiples of 128
    scales: jax.Array  # float32 [instances, 2]: of the exponent in base 2, of the output
    tiles: jax.Array  # int32 [tiles, FIELDS]


def _attention(
    problem: MlaProblem, config: MlaConfig, arrays: MlaArrays, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """float32 or rounded out [T, H, 128], and lse [H, T]."""
    regions = tile_list.key_regions(arrays.k_start, arrays.k_length, problem.keys, NOPE)
    work = tile_list.query_tiles(problem, arrays, regions, WARPGROUPS * ROWS)
    operands = _operands(problem, arrays, regions, work)
    kernel = _Kernel(problem, config, work.tiles.shape[0], interpret)
    out, lse = varying_like(arrays, kernel.call(operands))
    return out, tile_list.rows_of_tiles(lse, work, problem.tokens)


def _operands(
    problem: MlaProblem, arrays: MlaArrays, regions: tile_list.Regions, work: tile_list.Work
) -> _Operands:
    def stored(x: jax.Array | None, scale: jax.Array) -> jax.Array | None:
        if x is None or x.dtype == E4M3:
            return x
        rows = jnp.repeat(scale, x.shape[0] // problem.instances, total_repeat_length=x.shape[0])
        return to_stored(x, scale[0] if problem.instances == 1 else rows.reshape(-1, *[1] * (x.ndim - 1)))

    v = stored(arrays.v, arrays.v_scale)
    exponent = arrays.q_scale * arrays.k_scale * arrays.softmax_scale * LOG2E
    return _Operands(
        q=stored(arrays.q, arrays.q_scale),
        k=stored(arrays.k, arrays.k_scale),
        k_rope=stored(arrays.k_rope, arrays.k_scale),
        v=tile_list.transposed_values(v, regions),
        scales=jnp.stack([exponent, arrays.v_scale], axis=1),
        tiles=work.tiles,
    )


class _Shared(NamedTuple):
    """Shared memory and barriers, by role. Of a pair copies write the first view and wgmma reads the second."""

    q_nope: tuple[Any, Any]  # [2, 64, 128]
    q_rope: tuple[Any, Any]
    k_nope: tuple[Any, Any]  # [stages, keys, 128]
    k_rope: tuple[Any, Any]
    v: Any  # [stages, 128, keys]
    out: Any  # [2 * pieces, 64, columns]
    lse: Any  # [2, 64]
    q_there: Any
    k_there: Any
    v_there: Any
    k_free: Any
    v_free: Any


class _Tile(NamedTuple):
    """The scalars of a tile; see ``tile_list``."""

    index: Any
    head: Any
    first_query: Any
    rows: Any
    first_key: Any
    first_column: Any
    visible: Any  # keys that the first row sees; every next row sees one more under ``causal``
    key_count: Any
    exponent: Any
    v_scale: Any
    blocks: Any  # of keys, at least one


class _Softmax(NamedTuple):
    """The running softmax of 64 rows: ``out`` is in units of the maximum before ``shrink``."""

    out: Any  # [64, 128]
    top: Any  # [64] in base 2
    total: Any
    shrink: Any


class _Scores(NamedTuple):
    """The first product: 64 queries against a block of keys."""

    smem: _Shared
    warpgroup: Any
    keys: int
    interpreted: bool

    def issue(self, accumulator: Any, slot: Any) -> None:
        smem = self.smem
        plgpu.wgmma(accumulator, smem.q_nope[1].at[self.warpgroup], smem.k_nope[1].at[slot].T)
        plgpu.wgmma(accumulator, smem.q_rope[1].at[self.warpgroup], smem.k_rope[1].at[slot].T)

    def read(self, slot: Any) -> Any:
        """[64, keys]. Interpreted, the operands are read plainly, so that a race on them is seen."""
        if not self.interpreted:
            return finished(lambda accumulator: self.issue(accumulator, slot), (ROWS, self.keys))
        smem = self.smem
        parts = ((smem.q_nope, smem.k_nope), (smem.q_rope, smem.k_rope))
        wide = lambda view, index: view[1][index].astype(jnp.float32)
        products = [jnp.dot(wide(q, self.warpgroup), wide(k, slot).T) for q, k in parts]
        plgpu.commit_smem()
        return products[0] + products[1]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: MlaProblem
    config: MlaConfig
    tiles: int
    interpret: Any

    @property
    def pieces(self) -> int:
        """Copies of 128 bytes that an output row leaves in."""
        return VALUES * self.out_dtype.itemsize // 128

    @property
    def out_dtype(self) -> Any:
        """What a quantisation after the kernel reads is not rounded before."""
        wide = self.problem.output_quant is not None
        return jnp.dtype(jnp.float32) if wide else jnp.dtype(self.problem.out_dtype)

    def call(self, operands: _Operands) -> list[jax.Array]:
        problem = self.problem
        options = {} if self.interpret is None else {"interpret": self.interpret}

        def fp8attn_mla_prefill_sm90(*refs: Any) -> None:
            self._body(*refs)

        return plgpu.kernel(
            fp8attn_mla_prefill_sm90,
            out_type=[
                jax.ShapeDtypeStruct((problem.tokens, problem.heads, VALUES), self.out_dtype),
                jax.ShapeDtypeStruct((problem.heads, self.tiles, WARPGROUPS * ROWS), jnp.float32),
            ],
            grid=(problem.heads * self.tiles,),
            grid_names=("block",),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            scratch_types=self._scratch(),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            **options,
        )(*(x for x in operands if x is not None))

    def _scratch(self) -> list[Any]:
        config, plain = self.config, self.interpret is not None
        stages, keys = config.stages, config.keys
        anywhere = lambda shape, swizzle: hopper.rows_anywhere(shape, E4M3, swizzle, plain)
        barrier = lambda arrivals, count: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
        columns = 128 // self.out_dtype.itemsize
        out = plgpu.SMEM(
            (WARPGROUPS * self.pieces, ROWS, columns), self.out_dtype, transforms=(plgpu.SwizzleTransform(128),)
        )
        return [
            anywhere((WARPGROUPS, ROWS, NOPE), 128),
            anywhere((WARPGROUPS, ROWS, ROPE), 64),
            anywhere((stages, keys, NOPE), 128),
            anywhere((stages, keys, ROPE), 64),
            hopper.tiles((stages, VALUES, keys), E4M3, 128),
            plgpu.SMEM((WARPGROUPS * self.pieces, ROWS, columns), self.out_dtype) if plain else out,
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            barrier(2, WARPGROUPS),
            barrier(2, stages),
            barrier(1, stages),
            barrier(WARPGROUPS, stages),
            barrier(WARPGROUPS, stages),
        ]

    def _body(self, *refs: Any) -> None:
        pair = self.problem.k_rope_dtype is not None
        inputs, (out, lse, *shared) = refs[: 5 + pair], refs[5 + pair :]
        gmem = _Operands(inputs[0], inputs[1], inputs[2] if pair else None, *inputs[2 + pair :])
        views = [hopper.views(ref, self.interpret is not None) for ref in shared[:4]]
        smem = _Shared(*views, *shared[4:])
        warpgroup = lax.axis_index("warpgroup")
        tile = self._tile(gmem)

        @pl.when((warpgroup < WARPGROUPS) & (tile.rows > 0))
        def consumer() -> None:
            plgpu.set_max_registers(self.config.registers[0], action="increase")
            self._consume(gmem, smem, tile, warpgroup, out, lse)

        @pl.when((warpgroup == WARPGROUPS) & (tile.rows > 0))
        def producer() -> None:
            plgpu.set_max_registers(self.config.registers[1], action="decrease")
            self._produce(gmem, smem, tile)

    def _tile(self, gmem: _Operands) -> _Tile:
        block = lax.axis_index("block")
        head, index = lax.div(block, self.tiles), lax.rem(block, self.tiles)
        field = lambda name: gmem.tiles[index, tile_list.FIELDS.index(name)]
        rows, visible, key_count = field("rows"), field("visible"), field("key_count")
        most = jnp.minimum(visible + rows - 1, key_count) if self.problem.causal else key_count
        instance = field("instance")
        return _Tile(
            index, head, field("first_query"), rows, field("first_key"), field("first_column"), visible, key_count,
            gmem.scales[instance, 0], gmem.scales[instance, 1],
            jnp.maximum(lax.div(most + (self.config.keys - 1), self.config.keys), 1),
        )  # fmt: skip

    def _load_k(self, gmem: _Operands, smem: _Shared, tile: _Tile, number: Any, slot: Any) -> None:
        rows = pl.ds(tile.first_key + number * self.config.keys, self.config.keys)
        if gmem.k_rope is None:
            nope, rope = gmem.k.at[rows, tile.head, pl.ds(0, NOPE)], gmem.k.at[rows, tile.head, pl.ds(NOPE, ROPE)]
        else:
            nope, rope = gmem.k.at[rows, tile.head], gmem.k_rope.at[rows]
        plgpu.copy_gmem_to_smem(nope, smem.k_nope[0].at[slot], smem.k_there.at[slot])
        plgpu.copy_gmem_to_smem(rope, smem.k_rope[0].at[slot], smem.k_there.at[slot])

    def _load_v(self, gmem: _Operands, smem: _Shared, tile: _Tile, number: Any, slot: Any) -> None:
        first = pl.multiple_of(tile.first_column + number * self.config.keys, self.config.keys)
        columns = pl.ds(first, self.config.keys)
        plgpu.copy_gmem_to_smem(gmem.v.at[tile.head, :, columns], smem.v.at[slot], smem.v_there.at[slot])

    def _produce(self, gmem: _Operands, smem: _Shared, tile: _Tile) -> None:
        """Keeps the stages full. Waits for every release: what nobody waits for is no synchronisation."""
        stages = self.config.stages
        for slot in range(stages):

            @pl.when(slot < tile.blocks)
            def first(slot: int = slot) -> None:
                self._load_k(gmem, smem, tile, slot, slot)
                self._load_v(gmem, smem, tile, slot, slot)

        @pl.loop(0, tile.blocks)
        def refill(number: Any) -> None:
            slot, following = lax.rem(number, stages), number + stages
            plgpu.barrier_wait(smem.k_free.at[slot])
            pl.when(following < tile.blocks)(lambda: self._load_k(gmem, smem, tile, following, slot))
            plgpu.barrier_wait(smem.v_free.at[slot])
            pl.when(following < tile.blocks)(lambda: self._load_v(gmem, smem, tile, following, slot))

    def _consume(self, gmem: _Operands, smem: _Shared, tile: _Tile, warpgroup: Any, out: Any, lse: Any) -> None:
        config = self.config
        local = warpgroup * ROWS
        rows = pl.ds(tile.first_query + local, ROWS)
        for part, where in ((smem.q_nope, pl.ds(0, NOPE)), (smem.q_rope, pl.ds(NOPE, ROPE))):
            plgpu.copy_gmem_to_smem(gmem.q.at[rows, tile.head, where], part[0].at[warpgroup], smem.q_there.at[warpgroup])
        plgpu.barrier_wait(smem.q_there.at[warpgroup])

        scores = _Scores(smem, warpgroup, config.keys, self.interpret is not None)
        plgpu.barrier_wait(smem.k_there.at[0])
        s = scores.read(0)
        plgpu.barrier_arrive(smem.k_free.at[0])
        state = _Softmax(
            plgpu.layout_cast(jnp.zeros((ROWS, VALUES), jnp.float32), hopper.ACCUMULATOR),
            full_row(-jnp.inf, ROWS), full_row(0.0, ROWS), full_row(0.0, ROWS),
        )  # fmt: skip
        p, state = self._softmax(tile, s, state, local, 0)
        p = hopper.as_operand(p, self.interpret is not None)

        def step(masked: bool) -> Callable[[Any, Any], Any]:
            return lambda number, carry: self._step(smem, tile, scores, local if masked else None, number, carry)

        least = jnp.clip(tile.visible + local, 0, tile.key_count) if self.problem.causal else tile.key_count
        whole = jnp.clip(lax.div(least, config.keys), 1, tile.blocks)
        carry = lax.fori_loop(1, whole, step(False), (p, state))
        p, state = lax.fori_loop(whole, tile.blocks, step(True), carry)
        state = self._add_values(smem, p, state, lax.rem(tile.blocks - 1, config.stages))
        # read again: the scalars of a tile would take registers through the loops
        self._store(smem, self._tile(gmem), state, warpgroup, out, lse)

    def _visible(self, tile: _Tile, local: Any) -> Any:
        """Keys that each of 64 rows sees, [64]."""
        if not self.problem.causal:
            return plgpu.layout_cast(jnp.full((ROWS,), tile.key_count, jnp.int32), hopper.ROW)
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=hopper.ROW) + (tile.visible + local)
        return jnp.minimum(row, tile.key_count)

    def _softmax(self, tile: _Tile, s: Any, state: _Softmax, local: Any, number: Any) -> tuple[list[Any], _Softmax]:
        """Lifted probabilities of a block of scores, in pieces. ``local``: the first row in the tile; None: every key
        is seen."""
        pieces = [s] if local is None else self._masked(tile, s, local, number)
        top = jnp.maximum(state.top, row_max(pieces) * tile.exponent)
        anchor = top if local is None else jnp.where(top == -jnp.inf, 0.0, top)
        shrink = jnp.exp2(state.top - anchor)
        pieces = [jnp.exp2(piece * tile.exponent - spread(anchor - LIFT, piece)) for piece in pieces]
        return pieces, state._replace(top=top, total=state.total * shrink + row_sum(pieces), shrink=shrink)

    def _masked(self, tile: _Tile, s: Any, local: Any, number: Any) -> list[Any]:
        """Scores in pieces that share their column numbers, which are registers."""
        column = plgpu.broadcasted_iota(jnp.int32, (ROWS, PIECE), 1, layout=hopper.ACCUMULATOR)
        visible = self._visible(tile, local) - number * self.config.keys
        pieces = []
        for first in range(0, self.config.keys, PIECE):
            piece = s[:, first : first + PIECE]
            pieces.append(jnp.where(column < spread(visible - first, piece), piece, -jnp.inf))
        return pieces

    def _step(
        self, smem: _Shared, tile: _Tile, scores: _Scores, local: Any, number: Any, carry: Any
    ) -> tuple[Any, _Softmax]:
        """Scores of block ``number`` beside the values of the block before; where keys are masked one after the other,
        which needs fewer registers."""
        operand, state = carry
        slot, before = (lax.rem(n, self.config.stages) for n in (number, number - 1))

        def beside(score_sum: Any, value_sum: Any) -> tuple[Any, _Softmax]:
            scores.issue(score_sum, slot)
            plgpu.wgmma(value_sum, operand, smem.v.at[before].T)
            s = plgpu.wgmma_accumulator_load(score_sum, wait_n=1)
            plgpu.barrier_arrive(smem.k_free.at[slot])
            p, new = self._softmax(tile, s, state, local, number)
            weighed = plgpu.wgmma_accumulator_load(value_sum, wait_n=0)
            plgpu.barrier_arrive(smem.v_free.at[before])
            return hopper.as_operand(p, False), new._replace(out=state.out * spread(state.shrink, weighed) + weighed)

        if local is None and self.interpret is None:
            plgpu.barrier_wait(smem.k_there.at[slot])
            plgpu.barrier_wait(smem.v_there.at[before])
            shapes = ((ROWS, self.config.keys), (ROWS, VALUES))
            return pl.run_scoped(beside, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        state = self._add_values(smem, operand, state, before)
        plgpu.barrier_wait(smem.k_there.at[slot])
        s = scores.read(slot)
        plgpu.barrier_arrive(smem.k_free.at[slot])
        p, state = self._softmax(tile, s, state, local, number)
        return hopper.as_operand(p, self.interpret is not None), state

    def _add_values(self, smem: _Shared, operand: Any, state: _Softmax, slot: Any) -> _Softmax:
        plgpu.barrier_wait(smem.v_there.at[slot])
        weighed = self._weigh(smem, operand, slot)
        plgpu.barrier_arrive(smem.v_free.at[slot])
        return state._replace(out=state.out * spread(state.shrink, weighed) + weighed)

    def _weigh(self, smem: _Shared, operand: Any, slot: Any) -> Any:
        """Probabilities times values, a sum of its own."""
        if self.interpret is not None:
            product = jnp.dot(operand.astype(jnp.float32), smem.v[slot].astype(jnp.float32).T)
            plgpu.commit_smem()
            return product
        return finished(lambda acc: plgpu.wgmma(acc, operand, smem.v.at[slot].T), (ROWS, VALUES))

    def _store(self, smem: _Shared, tile: _Tile, state: _Softmax, warpgroup: Any, out: Any, lse: Any) -> None:
        """Rows of the tile alone: what lies behind belongs to other tiles."""
        nothing = state.total == 0.0
        inverse = jnp.where(nothing, 0.0, tile.v_scale / jnp.where(nothing, 1.0, state.total))
        value = (state.out * spread(inverse, state.out)).astype(self.out_dtype)
        total = jnp.log(jnp.where(nothing, 1.0, state.total))
        smem.lse.at[warpgroup][...] = jnp.where(nothing, -jnp.inf, state.top * LN2 + (total - LIFT * LN2))
        columns = VALUES // self.pieces
        for piece in range(self.pieces):
            smem.out.at[self.pieces * warpgroup + piece][...] = value[:, piece * columns : (piece + 1) * columns]
        plgpu.commit_smem()
        mine = pl.ds(warpgroup * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(smem.lse.at[warpgroup], lse.at[tile.head, tile.index, mine], commit_group=False)
        self._store_rows(smem, tile, warpgroup, out)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    def _store_rows(self, smem: _Shared, tile: _Tile, warpgroup: Any, out: Any) -> None:
        """Copies of 64, 32, ... 1 rows, as many as the count has bits."""
        count = jnp.clip(tile.rows - warpgroup * ROWS, 0, ROWS)
        first = tile.first_query + warpgroup * ROWS
        columns = VALUES // self.pieces
        done = count * 0
        size = ROWS
        while size:

            @pl.when((count & size) != 0)
            def copy(size: int = size, done: Any = done) -> None:
                for piece in range(self.pieces):
                    source = smem.out.at[self.pieces * warpgroup + piece].at[pl.ds(done, size)]
                    target = out.at[pl.ds(first + done, size), tile.head, pl.ds(piece * columns, columns)]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)

            done = done + (count & size)
            size //= 2
