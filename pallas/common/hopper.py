"""Tensor-core work of Hopper in Pallas Mosaic GPU, and what stands in for it in the interpreter."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common.backend import to_e4m3
from jaxlib.mlir import ir

from jax_fp8attn.quantize import E4M3

ACCUMULATOR = plgpu.Layout.WGMMA  # [64, n] float32 of a warpgroup
ROW = ACCUMULATOR.reduce(1)  # [64]
KEY_GROUP = 16
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


def row_sum(pieces: list[Any]) -> Any:
    return _halves(pieces, jnp.add).sum(axis=1)


def _halves(pieces: list[Any], combine: Any) -> Any:
    x = functools.reduce(combine, pieces)
    while x.shape[1] > 16 and x.shape[1] % 16 == 0:
        half = x.shape[1] // 2
        x = combine(x[:, :half], x[:, half:])
    return x


def full_row(value: float, rows: int) -> Any:
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), ROW)


def finished(issue: Any, shape: tuple[int, int]) -> jax.Array:
    """Runs products into a fresh accumulator and waits for them."""

    def scoped(accumulator: Any) -> Any:
        issue(accumulator)
        return accumulator[...]

    return pl.run_scoped(scoped, plgpu.ACC(shape, jnp.float32))
