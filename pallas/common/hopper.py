"""Tensor-core work of Hopper in Pallas Mosaic GPU, and what stands in for it in the interpreter."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common.backend import to_e4m3
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from jax_fp8attn.quantize import E4M3

ACCUMULATOR = plgpu.Layout.WGMMA  # [64, n] float32 of a warpgroup
OPERAND = plgpu.Layout.WGMMA_8BIT  # [64, n] e4m3
ROW = ACCUMULATOR.reduce(1)  # [64]
ROWS = 64  # of a product of a warpgroup
KEY_GROUP = 16
SWIZZLES = {128: 1, 64: 2, 32: 3}  # bytes of a row, and what a descriptor says of them
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


def rows_out(count: int, rows: int, dtype: Any, interpret: bool) -> Any:
    """Shared memory for ``count`` pieces of rows of 128 bytes, copied from any row on."""
    shape = (count, rows, 128 // jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=() if interpret else (plgpu.SwizzleTransform(128),))


def views(ref: Any, interpret: bool) -> tuple[Any, Any]:
    """(what copies write, what wgmma reads) of ``rows_anywhere``."""
    return (ref, ref) if interpret else tuple(ref)


def as_operand(pieces: list[Any], dtype: Any, interpret: bool) -> Any:
    """[64, n] float32 scores, in pieces of columns, as the operand in registers of the second product: bf16, or e4m3
    with keys in KEY_ORDER."""
    if dtype != E4M3:
        return join([piece.astype(dtype) for piece in pieces], interpret)
    m, n = pieces[0].shape[0], sum(piece.shape[1] for piece in pieces)
    if interpret:
        p = to_e4m3(jnp.concatenate(pieces, axis=1))
        return p.reshape(m, n // KEY_GROUP, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(m, n)
    operand = plgpu.ShapeDtypeStruct((m, n), E4M3, layout=OPERAND)

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


def join(pieces: list[Any], interpret: bool, layout: Any = ACCUMULATOR) -> Any:
    """Pieces [m, n] next to each other; on a GPU this moves nothing."""
    if len(pieces) == 1:
        return pieces[0]
    if interpret:
        return jnp.concatenate(pieces, axis=1)
    shape = (pieces[0].shape[0], sum(piece.shape[1] for piece in pieces))
    whole = plgpu.ShapeDtypeStruct(shape, pieces[0].dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * len(pieces), return_type=whole)
    def joined(_: Any, *parts: Any) -> Any:
        return _beside(parts)

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


def start(
    shape: tuple[int, int],
    pairs: Sequence[tuple[Any, Any, Any]],
    onto: Any = None,
    tail: int = 0,
    turned: str = "",
    negative: bool = False,
    anew: bool = False,
) -> Any:
    """Starts the sum of products a @ b.T of e4m3, bf16 or f16 as one group; ``settled`` gives the result. ``tail``: so
    many instructions at the end are a group of their own.

    Each pair: a [64, k] in shared memory or in registers, b [n, k] in shared memory, and the bytes of their swizzle, of
    both or of each; of 16 bits b may also stand by columns, as [n / width, k, width] with rows as wide as the swizzle,
    or a and b both as [k / 64, rows, 64]. ``turned``: names those of a and b, of 16 bits, that are their transposes in
    shared memory. ``onto``: float32 sums that the products are added to, or, if they are ``negative``, subtracted from.
    Without them the first product overwrites: plgpu.wgmma adds to zeros, which the assembler now and then writes one by
    one. ``anew``: places of operands of 16 bits take no registers through a loop.
    """
    in_registers = [not hasattr(a, "transforms") for a, _, _ in pairs]
    types, operands = [], []
    for (a, b, swizzle), register in zip(pairs, in_registers, strict=True):
        size = jnp.dtype(b.dtype).itemsize
        of_a, of_b = swizzle if isinstance(swizzle, tuple) else (swizzle, swizzle)
        types += [(OPERAND if size == 1 else ACCUMULATOR) if register else _tiled(of_a, size)]
        types += [_tiled(of_b, size)]
        operands += [a, b]
    if onto is not None:
        types.append(ACCUMULATOR)
        operands.append(onto)

    @plgpu.inline_mgpu(
        arg_types=tuple(types), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ACCUMULATOR)
    )
    def emit(_: Any, *given: Any) -> Any:
        given = [fragmented_array.optimization_barrier(x) if _is_array(x) else x for x in given]
        nvvm.wgmma_fence_aligned()
        sums = None if onto is None else _elements(given[-1])
        steps = []
        for a, b in zip(given[: 2 * len(pairs) : 2], given[1 : 2 * len(pairs) : 2], strict=True):
            by_column = ir.MemRefType(b.type).rank == 5 and (_is_array(a) or ir.MemRefType(a.type).rank == 4)
            of_b = _column_descriptors if by_column else _turned_descriptors if "b" in turned else _descriptors
            of_a = _turned_descriptors if "a" in turned else _descriptors
            own = {"anew": True} if anew else {}
            lefts = _operand_words(a) if _is_array(a) else [[x] for x in of_a(a, **own)]
            kind = _Kind(ir.MemRefType(b.type).element_type, "a" in turned, by_column or "b" in turned, negative)
            steps += [(left, right, kind) for left, right in zip(lefts, of_b(b, **own), strict=True)]
        for number, step in enumerate(steps):
            if tail and number == len(steps) - tail:
                nvvm.wgmma_commit_group_sync_aligned()
            sums = _multiply(shape[1], sums, *step)
        nvvm.wgmma_commit_group_sync_aligned()
        return _accumulators(shape, sums)

    return emit(*operands)


def start_rounding(a: Any, factor: Any, term: Any, b: Any, onto: Any = None, turned: str = "") -> tuple[Any, Any, Any]:
    """As ``start`` of one product in bf16 with (term - a) * factor, all [64, k] of a consumer. It is computed and
    rounded beside the products, in two halves of the columns. Returns what is pending, the operand, and term - a.

    What products in flight write may not be computed otherwise: the assembler would wait for each of them.
    """
    n, swizzle = b.shape[1 if "b" in turned else 0], min(128, 2 * b.shape[-1])
    given = [a, factor, term, *([] if onto is None else [onto])]
    shapes = ((ROWS, n), jnp.float32), (a.shape, jnp.bfloat16), (a.shape, jnp.float32)
    types = tuple(plgpu.ShapeDtypeStruct(shape, dtype, layout=ACCUMULATOR) for shape, dtype in shapes)

    @plgpu.inline_mgpu(arg_types=(_tiled(swizzle, 2), *[ACCUMULATOR] * len(given)), return_type=types)
    def emit(_: Any, b: Any, a: Any, factor: Any, term: Any, *onto: Any) -> Any:
        sums = _elements(fragmented_array.optimization_barrier(onto[0])) if onto else None
        rounded, differences = [], []
        kind = _Kind(ir.BF16Type.get(), False, "b" in turned, False)
        rights = _turned_descriptors(b) if "b" in turned else _descriptors(b)
        half = len(rights) // 2
        for first in (0, half):
            columns = slice(16 * first, 16 * (first + half))
            differences.append(term[:, columns] - a[:, columns])
            exact = differences[-1] * factor[:, columns]
            rounded.append(fragmented_array.optimization_barrier(exact.astype(ir.BF16Type.get())))
            nvvm.wgmma_fence_aligned()
            for words, right in zip(_operand_words(rounded[-1]), rights[first : first + half], strict=True):
                sums = _multiply(n, sums, words, right, kind)
        nvvm.wgmma_commit_group_sync_aligned()
        return _accumulators((ROWS, n), sums), _beside(rounded), _beside(differences)

    return emit(b, *given)


def _beside(parts: Sequence[Any]) -> Any:
    registers = np.concatenate([part.registers for part in parts], axis=1)
    first = parts[0]
    return fragmented_array.FragmentedArray(_registers=registers, _layout=first.layout, _is_signed=first.is_signed)


def _accumulators(shape: tuple[int, ...], sums: list[ir.Value]) -> Any:
    """What wgmma left, in its order."""
    layout = fragmented_array.WGMMA_LAYOUT
    registers = np.empty(layout.registers_shape(shape), dtype=object)
    pair = ir.VectorType.get((2,), ir.F32Type.get())
    for number, index in enumerate(np.ndindex(registers.shape)):
        registers[index] = vector.from_elements(pair, sums[2 * number : 2 * number + 2])
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def settled(pending: Any, younger: int, held: Sequence[Any] = ()) -> Any:
    """Waits until at most so many younger groups of products are unfinished: then ``pending`` is there. With ``held``,
    arrays of a consumer, (pending, held): what uses them comes behind the wait, too."""
    given = (pending, *held)
    types = tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=ACCUMULATOR) for x in given)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,) * len(given), return_type=types if held else types[0])
    def emit(_: Any, *arrays: Any) -> Any:
        nvvm.wgmma_wait_group_sync_aligned(younger)
        return fragmented_array.optimization_barrier(*arrays)

    if not held:
        return emit(pending)
    first, *rest = emit(*given)
    return first, rest


def computed(arrays: Sequence[Any]) -> list[Any]:
    """The same arrays, of a consumer, computed here: the compiler would do it where they are used."""
    types = tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=ACCUMULATOR) for x in arrays)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR,) * len(types), return_type=types)
    def emit(_: Any, *given: Any) -> Any:
        held = fragmented_array.optimization_barrier(*given)
        return (held,) if len(given) == 1 else held

    return list(emit(*arrays))


def wait(younger: int) -> None:
    """As ``settled``, of groups whose result is not needed yet."""

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        nvvm.wgmma_wait_group_sync_aligned(younger)

    emit()


def shrunk(sums: Any, factor: Any) -> Any:
    """[64, n] times [64]; a warp whose factors are all 1 leaves its sums as they are."""

    @plgpu.inline_mgpu(
        arg_types=(ACCUMULATOR, ROW), return_type=plgpu.ShapeDtypeStruct(sums.shape, sums.dtype, layout=ACCUMULATOR)
    )
    def emit(_: Any, sums: Any, factor: Any) -> Any:
        f32, given = ir.F32Type.get(), _elements(sums)
        factors = [vector.extract(x, [], [0]) if _is_vector(x) else x for x in factor.registers.flat]
        count = len(given)
        first = 2 * count  # of the factors' names
        # registers of a pair of columns belong to the two rows of a thread in turns
        products = "".join(f"mul.f32 ${n}, ${n}, ${first + n // 2 % 2}; " for n in range(count))
        differ = f"setp.neu.f32 p, ${first}, 0f3F800000; setp.neu.or.f32 p, ${first + 1}, 0f3F800000, p; "
        text = f"{{ .reg .pred p, q; {differ}vote.sync.any.pred q, p, 0xffffffff; @!q bra SAME; {products}SAME: }}"
        constraints = ["=f"] * count + [str(n) for n in range(count)] + ["f"] * 2
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count), [*given, *factors], text, ",".join(constraints), asm_dialect=0,
            has_side_effects=True,
        )  # fmt: skip
        return _accumulators(sums.shape, [llvm.extractvalue(f32, result, [n]) for n in range(count)])

    return emit(sums, factor)


def wait_for_turn() -> None:
    """Two warpgroups take turns: a call returns after the other one's ``pass_turn``, which is called as often."""
    _turn("bar.sync", 0)


def pass_turn() -> None:
    _turn("bar.arrive", 1)


TURN = 8  # and 9: named barriers of the hardware that Mosaic does not use


def _turn(instruction: str, other: int) -> None:
    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        mine = arith.xori(utils.warpgroup_idx(sync=False), utils.c(other, i32))
        utils.inline_ptx(f"{instruction} $0, 256;", arith.addi(mine, utils.c(TURN, i32)), has_side_effects=True)

    emit()


def end_of_block(number: int = 1) -> None:
    """The assembler reorders instructions freely between two branches: this is one that is never taken. ``number``: of
    those in a row, or it would see that behind the first one the others cannot be taken."""

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        emit_end_of_block(number)

    emit()


def emit_end_of_block(number: int = 1) -> None:
    """Inside ``inline_mgpu``."""
    text = (
        f"{{ .reg .pred p; .reg .b32 r; mov.u32 r, %ctaid.y; setp.ne.u32 p, r, {0x7FFF0000 + number:#x}; "
        "@p bra ON; HERE: nanosleep.u32 1000; bra HERE; ON: }"
    )
    utils.inline_ptx(text, has_side_effects=True)


def emit_anew(word: Any) -> Any:
    """Inside ``inline_mgpu``: what is computed from it is computed where it is used, and not kept in registers through
    a loop."""
    return llvm.inline_asm(word.type, [word], "mov.b32 $0, $1;", "=r,r", asm_dialect=0, has_side_effects=True)


def store_rows(target: Any, first: Any, count: Any, row: Any) -> None:
    """``row`` [64] float32 of a consumer into global memory from ``first`` on, the first ``count`` of them, by plain
    stores: bulk copies need aligned places."""
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar, ROW))
    def emit(_: Any, target: Any, first: Any, count: Any, row: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        first, count = (x.registers.item() for x in (first, count))
        pointer = llvm.ptrtoint(i64, utils.memref_ptr(target))
        for number, one in enumerate(row.registers.flat):
            value = vector.extract(one, [], ir.DenseI64ArrayAttr.get([0]))
            _side_effect(_STORE_ROW.format(shift=8 * number), [pointer, first, count, value], "l,r,r,f,~{memory}")

    emit(target, first, count, row)


# the thread's row is 16 times its warp and its lane by 4; one of those four lanes stores
_STORE_ROW = (
    "{{ .reg .pred p, q; .reg .b32 t, w, r; .reg .b64 a, b; mov.u32 t, %tid.x; bfe.u32 w, t, 5, 2; bfe.u32 r, t, 2, 3; "
    "mad.lo.u32 r, w, 16, r; add.u32 r, r, {shift}; and.b32 t, t, 3; setp.eq.u32 q, t, 0; setp.lt.and.s32 p, r, $2, q; "
    "add.s32 r, r, $1; mul.wide.s32 b, r, 4; add.s64 a, $0, b; @p st.global.f32 [a], $3; }}"
)


def store_swizzled(target: Any, value: Any) -> None:
    """``value`` [64, 128 bytes] float32 of a consumer into shared memory of ``rows_out``, rounded to its dtype (e4m3
    saturates), by addresses computed here: those of a layout would be kept in registers from tile to tile."""
    size = jnp.dtype(target.dtype).itemsize
    store = _STORES[jnp.dtype(target.dtype).name]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType((plgpu.SwizzleTransform(128),)), ACCUMULATOR))
    def emit(_: Any, target: Any, value: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        place = llvm.inline_asm(
            llvm.StructType.get_literal([i32, i32]), [llvm.ptrtoint(i32, utils.memref_ptr(target))],
            _PLACE.format(pair=2 * size, within=min(8 * size, 16) - 1), "=r,=r,r", asm_dialect=0, has_side_effects=True,
        )  # fmt: skip
        own, turn = (llvm.extractvalue(i32, place, [n]) for n in range(2))
        given = _elements(value)  # pairs of columns, of the first and of the second row in turns
        for byte in range(0, 128, 8 * size):
            at = arith.addi(own, arith.xori(turn, _word(byte & ~15)))
            for row in range(2):
                pair, given = given[:2], given[2:]
                _side_effect(store.format(offset=1024 * row + (byte & 15)), [at, *pair], "r,f,f,~{memory}")

    emit(target, value)


# Of a thread: its first row is 16 times its warp and its lane by 4, the second eight below. Chunks of 16 bytes stand
# where the row's last three bits turn them
_PLACE = (
    "{{ .reg .b32 t, w, r, c; mov.u32 t, %tid.x; bfe.u32 w, t, 5, 2; bfe.u32 r, t, 2, 3; and.b32 t, t, 3; "
    "mul.lo.u32 t, t, {pair}; and.b32 c, t, 16; shl.b32 $1, r, 4; xor.b32 $1, $1, c; and.b32 t, t, {within}; "
    "mad.lo.u32 r, w, 16, r; mad.lo.u32 r, r, 128, t; add.u32 $0, $2, r; }}"
)
_STORES = {
    "float32": "st.shared.v2.f32 [$0+{offset}], {{$1, $2}};",
    "float8_e4m3fn": "{{ .reg .b16 c; cvt.rn.satfinite.e4m3x2.f32 c, $2, $1; st.shared.b16 [$0+{offset}], c; }}",
} | {
    name: f"{{{{ .reg .b32 c; cvt.rn.{kind}x2.f32 c, $2, $1; st.shared.b32 [$0+{{offset}}], c; }}}}"
    for name, kind in (("bfloat16", "bf16"), ("float16", "f16"))
}


def warpgroup() -> Any:
    """Its number, computed here."""
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(return_type=scalar)
    def emit(_: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        text = "{ .reg .b32 t; mov.u32 t, %tid.x; shr.u32 $0, t, 7; }"
        number = llvm.inline_asm(i32, [], text, "=r", asm_dialect=0, has_side_effects=True)
        return fragmented_array.FragmentedArray.splat(number, (), is_signed=True)

    return emit()


def take(taken: Any, place: Any, more: Any, blocks: int, block: Any, before: Any) -> None:
    """Into ``place``, two words in shared memory, by one thread of a warpgroup: the number of the next piece of work,
    and ``before``. That is ``block``, its own, or with ``more`` the next that none of ``blocks`` has; ``taken``, a word
    in global memory, counts those."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 3))
    def emit(_: Any, taken: Any, place: Any, *scalars: Any) -> None:
        more, block, before = (scalar.registers.item() for scalar in scalars)
        text = (
            "{ .reg .pred p, q; .reg .b32 t, n; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 0; "
            "setp.ne.and.u32 q, $2, 0, p; mov.u32 n, $3; @q atom.relaxed.gpu.global.add.u32 n, [$0], 1; "
            f"@q add.u32 n, n, {blocks}; @p st.shared.v2.b32 [$1], {{n, $4}}; }}"
        )
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        pointers = llvm.ptrtoint(i64, utils.memref_ptr(taken)), llvm.ptrtoint(i32, utils.memref_ptr(place))
        _side_effect(text, [*pointers, more, block, before], "l,r,r,r,r,~{memory}")

    emit(taken, place, jnp.int32(more), block, before)


def negate(rows: Any, swizzle: int, interpret: bool) -> None:
    """All of a matrix in shared memory that ``start`` reads, wherever its elements stand: addresses made from a layout
    would be shared with other stores, and take registers until those."""
    size = jnp.dtype(rows.dtype).itemsize
    if interpret:
        bits = lax.bitcast_convert_type(rows[...], jnp.dtype(f"int{8 * size}"))
        rows[...] = lax.bitcast_convert_type(bits ^ jnp.iinfo(bits.dtype).min, rows.dtype)
        return

    @plgpu.inline_mgpu(arg_types=(_tiled(swizzle, size),))
    def emit(_: Any, rows: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", asm_dialect=0, has_side_effects=True)
        offset = arith.muli(arith.remui(thread, _word(128)), _word(16))
        address = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(rows)), offset)
        loop = scf.ForOp(_word(0), _word(math.prod(ir.MemRefType(rows.type).shape) * size // 2048), _word(1), [])
        with ir.InsertionPoint(loop.body):
            own = arith.addi(address, arith.muli(loop.induction_variable, _word(2048)))
            words = [arith.xori(word, _word({1: 0x80808080, 2: 0x80008000}[size])) for word in _load_words(own)]
            _store_words(own, words)
            scf.yield_([])

    emit(rows)


def clear_nonfinite(values: Any, record: Any, first_key: Any, first_column: Any) -> None:
    """NaN and infinities in values, bf16 [keys, 64] as ``tiles``, become 0; the first key with NaN, +inf and -inf in a
    column is noted in ``record``, int32 [4, columns], and 0 in its last row. ``first_key`` is that of the first row.

    A thread looks at 8 columns of every 16th key; one that has found something takes the long way.
    """
    keys, scalar = values.shape[0], plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(_tiled(128, 2), plgpu.RefType(), scalar, scalar))
    def emit(_: Any, values: Any, record: Any, *scalars: Any) -> None:
        first_key, first_column = (x.registers.item() for x in scalars)
        thread = arith.remui(utils.thread_idx(), _word(128))
        row = arith.shrui(thread, _word(3))
        chunk = arith.xori(arith.andi(thread, _word(7)), arith.andi(row, _word(7)))
        i32 = ir.IntegerType.get_signless(32)
        address = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(values)), arith.muli(thread, _word(16)))
        noted = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(record)), arith.muli(first_column, _word(4)))
        place, row_bytes = arith.addi(noted, arith.muli(chunk, _word(32))), 4 * ir.MemRefType(record.type).shape[1]
        key = arith.addi(first_key, row)
        found = None
        for number in range(keys // 16):
            for word in _load_words(arith.addi(address, _word(2048 * number))):
                # an exponent of ones carries into the sign bit of its half
                mark = arith.addi(arith.andi(word, _word(0x7F807F80)), _word(0x00800080))
                found = mark if found is None else arith.ori(found, mark)
        found = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(found, _word(0x80008000)), _word(0))
        branch = scf.IfOp(found)
        with ir.InsertionPoint(branch.then_block):
            loop = scf.ForOp(_word(0), _word(keys // 16), _word(1), [])
            with ir.InsertionPoint(loop.body):
                number = loop.induction_variable
                own = arith.addi(address, arith.muli(number, _word(2048)))
                _clear_words(own, place, arith.addi(key, arith.muli(number, _word(16))), row_bytes)
                scf.yield_([])
            _side_effect(
                "st.shared.b32 [$0], $1;", [arith.addi(noted, _word(3 * row_bytes)), _word(0)], "r,r,~{memory}"
            )
            _side_effect("fence.proxy.async.shared::cta;", [], "")
            scf.yield_([])

    emit(values, record, first_key, first_column)


def _clear_words(address: Any, place: Any, key: Any, row: int) -> None:
    """Of 8 columns of one key; ``place``: where the first column's key with NaN is noted, ``row`` bytes before +inf."""
    less = lambda a, b: arith.cmpi(arith.CmpIPredicate.ult, a, b)
    cleared = []
    for number, word in enumerate(_load_words(address)):
        for half in range(2):
            magnitude = arith.andi(arith.shrui(word, _word(16 * half)), _word(0x7FFF))
            sign = arith.andi(arith.shrui(word, _word(16 * half + 15)), _word(1))
            kind = arith.select(less(_word(0x7F80), magnitude), _word(0), arith.addi(sign, _word(1)))
            where = arith.addi(place, arith.addi(arith.muli(kind, _word(row)), _word(8 * number + 4 * half)))
            finite = less(magnitude, _word(0x7F80))
            noted = arith.select(finite, _word(0x7FFFFFFF), key)
            _side_effect("red.shared.min.s32 [$0], $1;", [where, noted], "r,r,~{memory}")
            word = arith.select(finite, word, arith.andi(word, _word(0xFFFF0000 >> (16 * half))))
        cleared.append(word)
    _store_words(address, cleared)


def _load_words(address: Any) -> list[Any]:
    """Four of shared memory."""
    i32 = ir.IntegerType.get_signless(32)
    words = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4), [address], "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r,~{memory}", asm_dialect=0, has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(i32, words, [number]) for number in range(4)]


def _store_words(address: Any, words: list[Any]) -> None:
    _side_effect("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", [address, *words], "r,r,r,r,r,~{memory}")


def _side_effect(text: str, given: list[Any], constraints: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), given, text, constraints, asm_dialect=0, has_side_effects=True)


def _word(value: int) -> Any:
    """An int32 of these 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value - (1 << 32) if value >> 31 else value))


def _tiled(swizzle: int, size: int) -> Any:
    """The transforms of ``tiles`` for types of ``size`` bytes."""
    return plgpu.RefType((plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)))


def _is_vector(x: Any) -> bool:
    return isinstance(x.type, ir.VectorType)


def _is_array(x: Any) -> bool:
    return isinstance(x, fragmented_array.FragmentedArray)


def _descriptors(ref: Any, anew: bool = False) -> list[ir.Value]:
    """Of a matrix in tiles of eight rows of a swizzle: what wgmma takes for every 32 bytes of a row."""
    shape, strides, swizzle = ir.MemRefType(ref.type).shape, _byte_strides(ref), _swizzle(ref)
    if len(shape) == 5:  # parts of rows one after the other
        offsets = [strides[0] * part + 32 * step for part in range(shape[0]) for step in range(swizzle // 32)]
        return _word_descriptors(ref, (strides[1] >> 4) << 32 | SWIZZLES[swizzle] << 62, offsets, anew=True)
    offsets = [strides[1] * tile + 32 * step for tile in range(shape[1]) for step in range(swizzle // 32)]
    facts = (strides[0] >> 4) << 32 | SWIZZLES[swizzle] << 62
    return _wide_descriptors(ref, facts, offsets) if _bytes(ref) == 1 else _word_descriptors(ref, facts, offsets, anew)


def _turned_descriptors(ref: Any, anew: bool = False) -> list[ir.Value]:
    """Of a bf16 matrix [k, n] in such tiles: what wgmma takes for every 16 rows."""
    shape, strides = ir.MemRefType(ref.type).shape, _byte_strides(ref)
    facts = (strides[1] >> 4) << 16 | (strides[0] >> 4) << 32 | SWIZZLES[_swizzle(ref)] << 62
    return _word_descriptors(ref, facts, [strides[0] * tile for tile in range(0, shape[0], 2)], anew)


def _column_descriptors(ref: Any) -> list[ir.Value]:
    """Of a matrix of 16 bits [n / width, k, width] in tiles of eight rows of a swizzle: what wgmma takes for every 16
    rows."""
    shape, strides = ir.MemRefType(ref.type).shape, _byte_strides(ref)
    facts = (strides[0] >> 4) << 16 | (strides[1] >> 4) << 32 | SWIZZLES[_swizzle(ref)] << 62
    return _word_descriptors(ref, facts, [strides[1] * tile for tile in range(0, shape[1], 2)])


def _swizzle(ref: Any) -> int:
    """Bytes of a row of a tile."""
    return ir.MemRefType(ref.type).shape[-1] * _bytes(ref)


def _bytes(ref: Any) -> int:
    """Of an element."""
    return utils.bytewidth(ir.MemRefType(ref.type).element_type)


def _byte_strides(ref: Any) -> list[int]:
    strides, _ = ir.MemRefType(ref.type).get_strides_and_offset()
    return [stride * _bytes(ref) for stride in strides]


def _wide_descriptors(ref: Any, facts: int, offsets: list[int]) -> list[ir.Value]:
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, utils.memref_ptr(ref))
    address = arith.andi(arith.shrui(address, utils.c(4, i64)), utils.c(0x3FFF, i64))
    first = arith.ori(address, utils.c(facts - (1 << 64) if facts >> 63 else facts, i64))
    return [arith.addi(first, utils.c(offset >> 4, i64)) if offset else first for offset in offsets]


def _word_descriptors(ref: Any, facts: int, offsets: list[int], anew: bool = False) -> list[ir.Value]:
    """Only the lower word depends on the address: 32-bit arithmetic, which is less of it. ``anew``: computed where it
    is used, and not kept in registers through a loop."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    pair = ir.VectorType.get((2,), i32)
    address = llvm.ptrtoint(i32, utils.memref_ptr(ref))
    if anew:
        address = emit_anew(address)
    address = arith.shrui(address, _word(4))
    first = arith.ori(address, _word(facts & 0xFFFFFFFF)) if facts & 0xFFFFFFFF else address
    lower = [arith.addi(first, _word(offset >> 4)) if offset else first for offset in offsets]
    return [llvm.bitcast(i64, vector.from_elements(pair, [word, _word(facts >> 32)])) for word in lower]


def _elements(x: Any) -> list[ir.Value]:
    return [vector.extract(pair, [], ir.DenseI64ArrayAttr.get([n])) for pair in x.registers.flat for n in (0, 1)]


def _operand_words(a: Any) -> list[list[ir.Value]]:
    """The registers of an operand, for every 32 bytes of a row."""
    i32 = ir.IntegerType.get_signless(32)
    word, first = ir.VectorType.get((1,), i32), ir.DenseI64ArrayAttr.get([0])
    width = 32 // utils.bytewidth(a.mlir_dtype)
    parts = [a[:, column : column + width].registers for column in range(0, a.shape[1], width)]
    return [[vector.extract(vector.bitcast(word, x), [], first) for x in part.flat] for part in parts]


class _Kind(NamedTuple):
    """Of a wgmma."""

    element: ir.Type
    a_turned: bool
    b_turned: bool
    negative: bool


def _multiply(n: int, sums: list[ir.Value] | None, left: list[ir.Value], right: ir.Value, wanted: _Kind) -> Any:
    """One wgmma of 64 x n x 32 bytes, onto ``sums`` if they are given."""
    f32, count = ir.F32Type.get(), n // 2
    given = [*(sums or []), *left, right]
    names = [f"${number}" for number in range(count + len(given))]
    a, b = names[-1 - len(left) : -1], names[-1]
    kind, flags = "k32.f32.e4m3.e4m3", f"{-1 if wanted.negative else 1}, 1"
    if isinstance(wanted.element, ir.BF16Type | ir.F16Type):
        kind = f"k16.f32.{wanted.element}.{wanted.element}"
        flags += f", {f'{int(wanted.a_turned)}, ' if len(left) == 1 else ''}{int(wanted.b_turned)}"
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, {int(sums is not None)}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{n}{kind} {{{','.join(names[:count])}}}, "
        f"{a[0] if len(a) == 1 else '{' + ','.join(a) + '}'}, {b}, p, {flags}; }}"
    )
    tied = [str(number) for number in range(count)] if sums else []
    constraints = ["=f"] * count + tied + (["l"] if len(left) == 1 else ["r"] * len(left)) + ["l"]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count), given, text, ",".join(constraints), asm_dialect=0,
        has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(f32, result, [number]) for number in range(count)]
