"""Operands as ``mla_prefill`` on Hopper reads them, each in one pass at the speed of memory.

``cast`` is for q and k: XLA's own cast to e4m3 takes tens of instructions an element, the GPU has one for two.

``prepare_values`` is for V: e4m3, transposed, keys in KEY_ORDER. A block transposes 128 keys of one sequence and some
heads. A lane holds 8 values of 16 keys, which it transposes in its own registers: rows of v come through shared memory,
columns leave as 16 keys a store, side by side in neighbouring lanes. NaN becomes 0; the first key with NaN is noted by
an atomic minimum, which only a lane that has met NaN issues.
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
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common import tile_list
from jax_fp8attn.pallas.common.backend import store, to_e4m3, varying_like
from jax_fp8attn.pallas.common.hopper import KEY_GROUP, KEY_ORDER
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, scf, vector

from jax_fp8attn.problems import MlaProblem
from jax_fp8attn.quantize import E4M3, to_stored

KEYS, VALUES = 128, 128  # of a tile
OWN = 8  # values of a lane
VECTOR = 8  # neighbouring elements of a lane in ``cast``
PIECE = 128 * VECTOR  # of a warpgroup
PIECES = 4  # of a block, at most
NEVER = np.iinfo(np.int32).max
LANES = 32


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """How a block works.

    heads   tiles of a block, all of them loaded at its start
    groups  of 16 keys that a warp holds: a store writes 16 * groups neighbouring bytes
    """

    heads: int = 1
    groups: int = 4

    def __post_init__(self) -> None:
        if self.groups not in (2, 4, 8):
            raise ValueError(f"a warp must hold 2, 4 or 8 groups of keys: {self}")


def default_config(problem: MlaProblem) -> PrepareConfig:
    return PrepareConfig(heads=2 if problem.v_dtype == E4M3 else 1)


def supports(problem: MlaProblem) -> tuple[str, ...]:
    size = problem.heads * VALUES * KEYS * (-(-problem.keys // KEYS) + problem.sequences)
    # the compiler keeps places in the result in 32 bits, without a sign
    return (f"V would take {size} bytes, 2^32 are too many",) if size >= 1 << 32 else ()


def prepare_values(
    problem: MlaProblem,
    v: jax.Array,
    v_scale: jax.Array,
    blocks: tile_list.KeyBlocks,
    config: PrepareConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """(v [S, H, 128] / v_scale [instances] as e4m3 [H, 128, columns] with 0 for padding and for NaN; int32 [B, H, 128]:
    the first key of each sequence that holds NaN in a column, or the largest int32)."""
    config = default_config(problem) if config is None else config
    if v.dtype == jnp.float32:  # eight of them a lane come out wrong: in two passes
        v = cast(v, v_scale, interpret)
        problem = dataclasses.replace(problem, v_dtype=v.dtype)
    return _Kernel(problem, config, blocks.blocks.shape[0], interpret).call(v, v_scale, blocks)


def cast(x: jax.Array, scale: jax.Array, interpret: Any = None) -> jax.Array:
    """x / scale as e4m3, saturating, each instance with its own scale [instances]; e4m3 as it is."""
    if x.dtype == E4M3:
        return x
    instances = scale.shape[0]
    if not x.size or x.size % (instances * PIECE):
        own = scale.reshape(-1, *[1] * x.ndim)
        return to_stored(x.reshape(instances, -1, *x.shape[1:]), own).reshape(x.shape)
    pieces = math.gcd(x.size // (instances * PIECE), PIECES)
    blocks = x.size // (pieces * PIECE)
    options = {} if interpret is None else {"interpret": interpret}

    def fp8attn_mla_cast_sm90(x: Any, scale: Any, out: Any) -> None:
        block = lax.axis_index("block")
        own = scale[lax.div(block, blocks // instances)]
        layout = plgpu.Layout.WG_STRIDED((PIECE,), VECTOR)
        loaded = [plgpu.load(x.at[block, n], layout=layout, optimized=False) for n in range(pieces)]
        for n, piece in enumerate(loaded):
            store(out.at[block, n], _codes(piece.astype(jnp.float32) / own, interpret))

    shape = (blocks, pieces, PIECE)
    out = plgpu.kernel(
        fp8attn_mla_cast_sm90,
        out_type=jax.ShapeDtypeStruct(shape, E4M3),
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        **options,
    )(x.reshape(shape), scale.astype(jnp.float32))
    return varying_like((x, scale), out).reshape(x.shape)


def _codes(x: Any, interpret: Any) -> Any:
    """One NaN for all, as on a GPU."""
    codes = to_e4m3(x, interpret is not None)
    if interpret is None:
        return codes
    return jnp.where(jnp.isnan(x), lax.bitcast_convert_type(jnp.uint8(0x7F), E4M3), codes)


class _Tile(NamedTuple):
    """The scalars of a tile."""

    column: Any
    head: Any
    keys: Any  # the first ones count
    local: Any
    owner: Any


class _Refs(NamedTuple):
    v: Any  # [S, H, 128]
    blocks: Any
    scale: Any  # float32 [instances]; None for e4m3
    out: Any  # [H, 128, columns]
    first_nan: Any  # int32 [B, H, 128]; interpreted [blocks, H, 128]: a minimum for each tile
    loaded: Any  # shared memory [heads, 128, 128]
    there: Any  # a barrier a head


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: MlaProblem
    config: PrepareConfig
    blocks: int
    interpret: Any

    @property
    def heads(self) -> int:
        return self.config.heads if self.problem.heads % self.config.heads == 0 else 1

    def call(self, v: jax.Array, v_scale: jax.Array, blocks: tile_list.KeyBlocks) -> tuple[jax.Array, jax.Array]:
        heads = self.problem.heads
        given = [v, blocks.blocks, *([] if v.dtype == E4M3 else [v_scale.astype(jnp.float32)])]
        values = jax.ShapeDtypeStruct((heads, VALUES, self.blocks * KEYS), E4M3)
        if self.interpret is not None:
            # no atomic operations there
            minima = jax.ShapeDtypeStruct((self.blocks, heads, VALUES), jnp.int32)
            out, minima = self._kernel([values, minima], *given)
            owner = blocks.blocks[:, tile_list.BLOCK_FIELDS.index("owner")]
            first = jax.ops.segment_min(minima, owner, num_segments=self.problem.sequences)
            return out, first
        first_nan = jnp.full((self.problem.sequences, heads, VALUES), NEVER, jnp.int32)
        states = lax.empty(values.shape, values.dtype), first_nan
        return varying_like((v, v_scale, blocks), pl.run_state(lambda refs: self._kernel([], *given, *refs))(states))

    def _kernel(self, out_type: list[Any], *operands: Any) -> Any:
        options = {} if self.interpret is None else {"interpret": self.interpret}
        heads, dtype = self.heads, self.problem.v_dtype

        def fp8attn_mla_prepare_sm90(*refs: Any) -> None:
            v, blocks, *scale, out, first_nan, loaded, there = refs
            self._body(_Refs(v, blocks, scale[0] if scale else None, out, first_nan, loaded, there))

        return plgpu.kernel(
            fp8attn_mla_prepare_sm90,
            out_type=out_type,
            grid=(self.blocks * (self.problem.heads // heads),),
            grid_names=("block",),
            scratch_types=[plgpu.SMEM((heads, KEYS, VALUES), dtype), plgpu.Barrier(num_barriers=heads)],
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
            **options,
        )(*operands)

    def _body(self, refs: _Refs) -> None:
        number = lax.axis_index("block")
        turns = self.problem.heads // self.heads
        block, first_head = lax.div(number, turns), lax.rem(number, turns) * self.heads
        first_key, keys, local, owner = (refs.blocks[block, n] for n in range(len(tile_list.BLOCK_FIELDS)))

        @pl.when(keys > 0)
        def _() -> None:
            for n in range(self.heads):
                rows = refs.v.at[pl.ds(first_key, KEYS), first_head + n]
                plgpu.copy_gmem_to_smem(rows, refs.loaded.at[n], refs.there.at[n])

        # divided as XLA divides, which on a GPU is not quite as IEEE does
        quotient = lambda x: x
        if refs.scale is not None:
            scale = refs.scale[lax.div(first_key, self.problem.keys // self.problem.instances)]
            quotient = lambda x: x.astype(jnp.float32) / scale
        for n in range(self.heads):
            pl.when(keys > 0)(functools.partial(plgpu.barrier_wait, refs.there.at[n]))
            tile = _Tile(block * KEYS, first_head + n, keys, local, owner)
            self._transpose(refs, tile, refs.loaded.at[n], quotient)

    def _transpose(self, refs: _Refs, tile: _Tile, loaded: Any, quotient: Callable[[Any], Any]) -> None:
        rows, columns = _layouts(self.config.groups)
        target = refs.out.at[tile.head, :, pl.ds(pl.multiple_of(tile.column, KEYS), KEYS)]
        x = quotient(plgpu.load(loaded, layout=rows, optimized=False))
        if self.interpret is None:
            store(target, self._by_lane(x, refs.first_nan, tile, rows, columns))
            return
        key = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        codes = x if x.dtype == E4M3 else to_e4m3(x)
        nan = jnp.isnan(codes.astype(jnp.float32)) & (key < tile.keys)
        target[...] = _in_key_order(_without(codes, nan | (key >= tile.keys))).T
        refs.first_nan[lax.div(tile.column, KEYS), tile.head] = jnp.where(nan, key + tile.local, NEVER).min(axis=0)

    def _by_lane(self, x: Any, first_nan: Any, tile: _Tile, rows: Any, columns: Any) -> Any:
        """e4m3 [128 values, 128 positions] of x [128 keys, 128 values]; notes NaN."""
        scalar = plgpu.Layout.WG_SPLAT
        result = plgpu.ShapeDtypeStruct((VALUES, KEYS), E4M3, layout=columns)

        @plgpu.inline_mgpu(arg_types=(rows, plgpu.RefType(), *(scalar,) * 4), return_type=result)
        def transpose(_: Any, x: Any, first_nan: Any, *scalars: Any) -> Any:
            layout = columns.to_mgpu()
            lane = _Lane(self.config.groups, *(s.registers.item() for s in scalars), first_nan)
            by_value = _transposed_codes(x) if x.mlir_dtype == ir.Float8E4M3FNType.get() else _cast_codes(x, layout)
            words = lane.without_nan(by_value)
            registers = np.empty(layout.registers_shape((VALUES, KEYS)), dtype=object)
            kind = ir.VectorType.get((KEY_GROUP,), ir.Float8E4M3FNType.get())
            for i, own in zip(np.ndindex(registers.shape), words, strict=True):
                registers[i] = utils.bitcast(_vector(own), kind)
            return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return transpose(x, first_nan, tile.keys, tile.local, tile.owner, tile.head)


def _without(codes: Any, gone: Any) -> Any:
    return jnp.where(gone, jnp.zeros((), E4M3), codes)


def _in_key_order(codes: Any) -> Any:
    """Rows by position: 4 p + 2 h + e of a group of 16 holds key 8 h + 2 p + e."""
    groups = codes.reshape(-1, 2, 4, 2, codes.shape[1])
    return groups.transpose(0, 2, 1, 3, 4).reshape(codes.shape)


@functools.cache
def _layouts(groups: int) -> tuple[plgpu.Layout, plgpu.Layout]:
    """Of [keys, values] with 8 values a register, and of [values, positions] with 16 positions: a lane holds the same
    elements in both."""
    lanes = LANES // groups  # that share the values of a warp
    # dimensions: keys and values over the warps, over the lanes, of a lane
    rows = _tiled(((KEYS, VALUES), (16 * groups, OWN * lanes), (16, OWN), (OWN,)), (-7, -6), (-4, -5))
    columns = _tiled(((VALUES, KEYS), (OWN * lanes, 16 * groups), (OWN, 16)), (-5, -6), (-4, -3))
    return rows, columns


def _tiled(tiles: tuple[tuple[int, ...], ...], warp_dims: tuple[int, ...], lane_dims: tuple[int, ...]) -> Any:
    given = fragmented_array.TiledLayout(
        fragmented_array.Tiling(tiles), warp_dims=warp_dims, lane_dims=lane_dims, vector_dim=-1, _check_canonical=False
    )
    layout = given.canonicalize()
    return plgpu.Layout.TILED(
        plgpu.Tiling(layout.tiling.tiles),
        warp_dims=layout.warp_dims,
        lane_dims=layout.lane_dims,
        vector_dim=layout.vector_dim,
    )


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _c(value: int) -> Any:
    """An int32 of these 32 bits."""
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value - (1 << 32) if value >> 31 else value))


def _bytes_of(a: Any, b: Any, selector: int) -> Any:
    return llvm.inline_asm(_i32(), [a, b], f"prmt.b32 $0, $1, $2, 0x{selector:x};", "=r,r,r")


def _element(x: Any, n: int) -> Any:
    return vector.extract(x, [], [n])


def _vector(elements: list[Any]) -> Any:
    return vector.from_elements(ir.VectorType.get((len(elements),), elements[0].type), elements)


def _transposed_codes(x: Any) -> list[list[Any]]:
    """Words of four positions, [8 values][4], of e4m3 x with 16 keys of 8 values a lane."""
    words = [utils.bitcast(row, ir.VectorType.get((OWN // 4,), _i32())) for row in x.registers.flat]
    result: list[list[Any]] = [[] for _ in range(OWN)]
    for first in range(0, KEY_GROUP, 4):
        for half in range(OWN // 4):
            a, b, c, d = (_element(words[key], half) for key in KEY_ORDER[first : first + 4])
            for n, interleave in enumerate((0x5140, 0x7362)):
                ab, cd = _bytes_of(a, b, interleave), _bytes_of(c, d, interleave)
                result[4 * half + 2 * n].append(_bytes_of(ab, cd, 0x5410))
                result[4 * half + 2 * n + 1].append(_bytes_of(ab, cd, 0x7632))
    return result


def _cast_codes(x: Any, layout: Any) -> list[list[Any]]:
    """The same of float32 x: cast in pairs of keys."""
    keys = list(x.registers.flat)
    registers = np.empty(layout.registers_shape((VALUES, KEYS)), dtype=object)
    for n, i in enumerate(np.ndindex(registers.shape)):
        registers[i] = _vector([_element(keys[key], n) for key in KEY_ORDER])
    wide = fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
    words = ir.VectorType.get((KEY_GROUP // 4,), _i32())
    codes = [utils.bitcast(own, words) for own in wide.astype(ir.Float8E4M3FNType.get()).registers.flat]
    return [[_element(own, n) for n in range(KEY_GROUP // 4)] for own in codes]


class _Lane(NamedTuple):
    """What a lane does with its 8 values of 16 keys."""

    groups: int
    keys: Any
    local: Any
    owner: Any
    head: Any
    first_nan: Any

    def place(self) -> tuple[Any, Any]:
        """The first key in the tile and the first value."""
        thread = utils.thread_idx()
        warp, lane = arith.divui(thread, _c(LANES)), arith.remui(thread, _c(LANES))
        groups, beside = _c(self.groups), _c(self.groups // 2)  # warps that share keys
        group = arith.addi(arith.muli(arith.divui(warp, beside), groups), arith.remui(lane, groups))
        lanes = LANES // self.groups
        value = arith.addi(arith.muli(arith.remui(warp, beside), _c(lanes)), arith.divui(lane, groups))
        return arith.muli(group, _c(KEY_GROUP)), arith.muli(value, _c(OWN))

    def without_nan(self, by_value: list[list[Any]]) -> list[list[Any]]:
        """The words with 0 for keys behind the last and for NaN; a NaN's key is noted."""
        first_key, first_value = self.place()
        left = arith.subi(self.keys, first_key)
        masks = [self._inside(left, n) for n in range(KEY_GROUP // 4)]
        magnitudes = [arith.andi(mask, _c(0x7F7F7F7F)) for mask in masks]
        # a magnitude of 0x7F is NaN: one more sets the sign bit of its byte
        marked = [
            [arith.addi(arith.andi(word, m), _c(0x01010101)) for word, m in zip(own, magnitudes, strict=True)]
            for own in by_value
        ]
        self._note(marked, first_key, first_value)
        result = []
        for own, marks in zip(by_value, marked, strict=True):
            nan = [_bytes_of(mark, mark, 0xBA98) for mark in marks]  # 0xFF where the sign bit is set
            kept = [arith.andi(arith.xori(n, _c(0xFFFFFFFF)), mask) for n, mask in zip(nan, masks, strict=True)]
            result.append([arith.andi(word, keep) for word, keep in zip(own, kept, strict=True)])
        return result

    def _inside(self, left: Any, number: int) -> Any:
        """0xFF in the bytes of word ``number`` whose keys are among the first ``left``."""
        parts = []
        for n, key in enumerate(KEY_ORDER[4 * number : 4 * number + 4]):
            there = arith.cmpi(arith.CmpIPredicate.sgt, left, _c(key))
            parts.append(arith.select(there, _c(0xFF << (8 * n)), _c(0)))
        return functools.reduce(arith.ori, parts)

    def _note(self, marked: list[list[Any]], first_key: Any, first_value: Any) -> None:
        sign = _c(0x80808080)
        some = functools.reduce(arith.ori, [mark for marks in marked for mark in marks])
        found = scf.IfOp(arith.cmpi(arith.CmpIPredicate.ne, arith.andi(some, sign), _c(0)))
        with ir.InsertionPoint(found.then_block):
            key = arith.addi(self.local, first_key)
            for n, marks in enumerate(marked):
                first = _c(NEVER)
                for number, mark in enumerate(marks):
                    for byte, place in enumerate(KEY_ORDER[4 * number : 4 * number + 4]):
                        bit = arith.andi(mark, _c(0x80 << (8 * byte)))
                        there = arith.cmpi(arith.CmpIPredicate.ne, bit, _c(0))
                        candidate = arith.select(there, arith.addi(key, _c(place)), _c(NEVER))
                        first = arith.minsi(first, candidate)
                self._minimum(arith.addi(first_value, _c(n)), first)
            scf.yield_([])

    def _minimum(self, value: Any, key: Any) -> None:
        index = [arith.index_cast(ir.IndexType.get(), x) for x in (self.owner, self.head, value)]
        one = memref.subview(self.first_nan, index, [1, 1, 1], [1, 1, 1])
        pointer = utils.memref_ptr(one)
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [pointer, key], "red.global.min.s32 [$0], $1;", "l,r", has_side_effects=True
        )
