"""Tensor-core work of Hopper in Pallas Mosaic GPU, and what stands in for it in the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common.backend import to_e4m3
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jax_fp8attn.quantize import E4M3

ACCUMULATOR = plgpu.Layout.WGMMA  # [64, n] float32 of a warpgroup
ROW = ACCUMULATOR.reduce(1)  # [64]
KEY_GROUP = 16
PARTIAL = 8  # columns of the narrowest array in that layout
# position j of a group of 16 keys of V^T holds key KEY_ORDER[j]: with it float32 scores become the e4m3 operand of the
# second product without moving between lanes
KEY_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def tiles(shape: tuple[int, ...], dtype: Any, swizzle: int) -> Any:
    """Shared memory as wgmma reads it: rows of ``swizzle`` bytes in atoms of eight."""
    width = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)))


def rows_anywhere(shape: tuple[int, ...], dtype: Any, swizzle: int, interpret: bool) -> Any:
    """Shared memory that a copy may fill from any row of an array, and that wgmma reads: two views of the same bytes.

    Rows are ``swizzle`` bytes wide, so that an atom of eight rows is the same in both. The interpreter allows no second
    view, and needs none.
    """
    if interpret:
        return plgpu.SMEM(shape, dtype)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(swizzle),)), tiles(shape, dtype, swizzle)
    )


def rows_out(warpgroups: int, rows: int, width: int, dtype: Any, interpret: bool) -> Any:
    """Shared memory for [rows, width] of each warpgroup in pieces of 128 bytes a row, copied from any row on."""
    pieces = width * jnp.dtype(dtype).itemsize // 128
    shape = (warpgroups * pieces, rows, width // pieces)
    return plgpu.SMEM(shape, dtype, transforms=() if interpret else (plgpu.SwizzleTransform(128),))


def views(ref: Any, interpret: bool) -> tuple[Any, Any]:
    """(what copies write, what wgmma reads) of ``rows_anywhere``."""
    return (ref, ref) if interpret else tuple(ref)


def as_operand(pieces: list[Any], interpret: bool) -> Any:
    """[64, n] float32 scores, in pieces of columns, as the e4m3 operand in registers of the second product, keys in
    KEY_ORDER."""
    m, n = pieces[0].shape[0], sum(piece.shape[1] for piece in pieces)
    if interpret:
        p = to_e4m3(jnp.concatenate(pieces, axis=1))
        return p.reshape(m, n // KEY_GROUP, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(m, n)
    operand = plgpu.ShapeDtypeStruct((m, n), E4M3, layout=plgpu.Layout.WGMMA_8BIT)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,) * len(pieces), return_type=operand)
    def regroup(_: Any, *parts: Any) -> Any:
        accumulators = np.concatenate([part.registers for part in parts], axis=1)
        layout = fragmented_array.WGMMA_LAYOUT_8BIT
        registers = np.empty(layout.registers_shape((m, n)), dtype=object)
        for i in np.ndindex(registers.shape):
            pair = [accumulators[(i[0], 2 * i[1] + half, *i[2:])] for half in (0, 1)]
            registers[i] = utils.vector_concat(pair)
        grouped = fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
        return grouped.astype(ir.Float8E4M3FNType.get())

    return regroup(*pieces)


def join(pieces: list[Any], interpret: bool) -> Any:
    """Pieces [m, n] next to each other; on a GPU this moves nothing."""
    if len(pieces) == 1:
        return pieces[0]
    if interpret:
        return jnp.concatenate(pieces, axis=1)
    shape = (pieces[0].shape[0], sum(piece.shape[1] for piece in pieces))
    whole = plgpu.ShapeDtypeStruct(shape, pieces[0].dtype, layout=ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,) * len(pieces), return_type=whole)
    def joined(_: Any, *parts: Any) -> Any:
        registers = np.concatenate([part.registers for part in parts], axis=1)
        first = parts[0]
        return fragmented_array.FragmentedArray(_registers=registers, _layout=first.layout, _is_signed=first.is_signed)

    return joined(*pieces)


def spread(row: Any, like: Any) -> Any:
    """[m] to the shape of ``like`` [m, n]."""
    return lax.broadcast_in_dim(row, like.shape, [0])


def row_max(pieces: list[Any]) -> Any:
    """Pieces of [m, n] to [m]: halves first, so that few operations wait for each other."""
    return _halves(pieces, jnp.maximum).max(axis=1)


def partial_sum(pieces: list[Any]) -> Any:
    """Pieces of [m, n] to [m, 8], whose columns are still to be added: each thread adds what it holds."""
    return _halves(pieces, jnp.add)


def no_sum(rows: int) -> Any:
    """Of ``partial_sum``."""
    return plgpu.layout_cast(jnp.zeros((rows, PARTIAL), jnp.float32), ACCUMULATOR)


def _halves(pieces: list[Any], combine: Any) -> Any:
    x = functools.reduce(combine, pieces)
    while x.shape[1] > PARTIAL:
        half = x.shape[1] // 2
        x = combine(x[:, :half], x[:, half:])
    return x


def full_row(value: float, rows: int) -> Any:
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROW)


def start(shape: tuple[int, int], pairs: Sequence[tuple[Any, Any, int]]) -> Any:
    """Starts the sum of products a @ b.T of e4m3 as one group; ``settled`` gives the result.

    Each pair: a [64, k] in shared memory or in registers, b [n, k] in shared memory, and the bytes of their swizzle.
    The first product overwrites: plgpu.wgmma adds to zeros, which the assembler now and then writes one by one.
    """
    in_registers = [not hasattr(a, "transforms") for a, _, _ in pairs]
    types, operands = [], []
    for (a, b, swizzle), register in zip(pairs, in_registers, strict=True):
        types += [plgpu.Layout.WGMMA_8BIT if register else _tiled(swizzle), _tiled(swizzle)]
        operands += [a, b]

    @plgpu.inline_mgpu(
        arg_types=tuple(types), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ACCUMULATOR)
    )
    def emit(_: Any, *given: Any) -> Any:
        given = [fragmented_array.optimization_barrier(x) if _is_array(x) else x for x in given]
        nvvm.wgmma_fence_aligned()
        sums: list[ir.Value] | None = None
        for (_, _, swizzle), a, b in zip(pairs, given[::2], given[1::2], strict=True):
            lefts = _operand_words(a) if _is_array(a) else [[x] for x in _descriptors(a, swizzle)]
            for left, right in zip(lefts, _descriptors(b, swizzle), strict=True):
                sums = _multiply(shape[1], sums, left, right)
        nvvm.wgmma_commit_group_sync_aligned()
        layout = fragmented_array.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        for number, index in enumerate(np.ndindex(registers.shape)):
            registers[index] = vector.from_elements(pair, sums[2 * number : 2 * number + 2])
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit(*operands)


def settled(pending: Any, younger: int) -> Any:
    """Waits until at most so many younger groups of products are unfinished: then ``pending`` is there."""

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR,), return_type=plgpu.ShapeDtypeStruct(pending.shape, pending.dtype, layout=ACCUMULATOR)
    )
    def emit(_: Any, array: Any) -> Any:
        nvvm.wgmma_wait_group_sync_aligned(younger)
        return fragmented_array.optimization_barrier(array)

    return emit(pending)


def end_of_block() -> None:
    """The assembler reorders instructions freely between two branches: this is one that is never taken."""

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        text = (
            "{ .reg .pred p; .reg .b32 r; mov.u32 r, %ctaid.y; setp.ne.u32 p, r, 0x7fff0001; @p bra ON; "
            "HERE: nanosleep.u32 1000; bra HERE; ON: }"
        )
        utils.inline_ptx(text, has_side_effects=True)

    emit()


def _tiled(swizzle: int) -> Any:
    """The transforms of ``tiles`` for types of one byte."""
    return plgpu.RefType((plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle)))


def _is_array(x: Any) -> bool:
    return isinstance(x, fragmented_array.FragmentedArray)


def _descriptors(ref: Any, swizzle: int) -> list[ir.Value]:
    """Of a matrix in tiles of eight rows of ``swizzle`` bytes: what wgmma takes for every 32 bytes of a row."""
    i64 = ir.IntegerType.get_signless(64)
    kind = ir.MemRefType(ref.type)
    strides, _ = kind.get_strides_and_offset()
    address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    address = arith.andi(arith.shrui(address, utils.c(4, i64)), utils.c(0x3FFF, i64))
    facts = (strides[0] >> 4) << 32 | {128: 1, 64: 2}[swizzle] << 62
    first = arith.ori(address, utils.c(facts - (1 << 64) if facts >> 63 else facts, i64))
    offsets = [strides[1] * tile + 32 * step for tile in range(kind.shape[1]) for step in range(swizzle // 32)]
    return [arith.addi(first, utils.c(offset >> 4, i64)) if offset else first for offset in offsets]


def _operand_words(a: Any) -> list[list[ir.Value]]:
    """The registers of an operand, for every 32 columns."""
    i32 = ir.IntegerType.get_signless(32)
    word, first = ir.VectorType.get((1,), i32), ir.DenseI64ArrayAttr.get([0])
    parts = [a[:, column : column + 32].registers for column in range(0, a.shape[1], 32)]
    return [[vector.extract(vector.bitcast(word, x), [], first) for x in part.flat] for part in parts]


def _multiply(n: int, sums: list[ir.Value] | None, left: list[ir.Value], right: ir.Value) -> list[ir.Value]:
    """One wgmma of 64 x n x 32, onto ``sums`` if they are given."""
    f32, count = ir.F32Type.get(), n // 2
    given = [*(sums or []), *left, right]
    names = [f"${number}" for number in range(count + len(given))]
    a, b = names[-1 - len(left) : -1], names[-1]
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, {int(sums is not None)}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{','.join(names[:count])}}}, "
        f"{a[0] if len(a) == 1 else '{' + ','.join(a) + '}'}, {b}, p, 1, 1; }}"
    )
    tied = [str(number) for number in range(count)] if sums else []
    constraints = ["=f"] * count + tied + (["l"] if len(left) == 1 else ["r"] * len(left)) + ["l"]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count), given, text, ",".join(constraints), asm_dialect=0,
        has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(f32, result, [number]) for number in range(count)]
