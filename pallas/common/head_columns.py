"""Arrays of a warpgroup [64, n] whose columns are heads: factors by head, and how they get into shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common import hopper
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

COLUMN = hopper.ACCUMULATOR.reduce(0)  # a number a head


def spread(column: Any, like: Any) -> Any:
    """[n] to the shape of ``like`` [m, n]."""
    return lax.broadcast_in_dim(column, like.shape, [1])


def full(value: float, shape: tuple[int, ...]) -> Any:
    layout = COLUMN if len(shape) == 1 else hopper.ACCUMULATOR
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def shrunk(parts: Sequence[Any], factor: Any, interpreted: bool) -> list[Any]:
    """Sums [64, n] times [n], the same for all parts; they stay as they are if all factors are 1."""
    if interpreted:
        return [part * spread(factor, part) for part in parts]
    types = tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=hopper.ACCUMULATOR) for x in parts)

    @plgpu.inline_mgpu(arg_types=(COLUMN, *[hopper.ACCUMULATOR] * len(parts)), return_type=types)
    def emit(_: Any, factor: Any, *parts: Any) -> Any:
        f32 = ir.F32Type.get()
        given = [x for part in parts for x in _elements(part)]
        factors = _elements(factor)
        count, own = len(given), len(given) // len(parts)
        first = 2 * count  # of the factors' names
        # a part's registers: a pair of heads of the one row, the same of the other row, the next pair of heads
        products = [f"mul.f32 ${n}, ${n}, ${first + n % own // 4 * 2 + n % 2}; " for n in range(count)]
        differ = [f"setp.neu.f32 p, ${first}, 0f3F800000; "]
        differ += [f"setp.neu.or.f32 p, ${first + n}, 0f3F800000, p; " for n in range(1, len(factors))]
        text = (
            f"{{ .reg .pred p, q; {''.join(differ)}vote.sync.any.pred q, p, 0xffffffff; @!q bra SAME; "
            f"{''.join(products)}SAME: }}"
        )
        constraints = ["=f"] * count + [str(n) for n in range(count)] + ["f"] * len(factors)
        result = llvm.inline_asm(
            llvm.StructType.get_literal([f32] * count), [*given, *factors], text, ",".join(constraints), asm_dialect=0,
            has_side_effects=True,
        )  # fmt: skip
        found = [llvm.extractvalue(f32, result, [n]) for n in range(count)]
        return tuple(_like(part, found[n * own : (n + 1) * own]) for n, part in enumerate(parts))

    return list(emit(factor, *parts))


def partial_sum(values: Any, interpreted: bool) -> Any:
    """[64, n] to [n] that each thread has of its own rows; ``whole_sum`` adds them up."""
    if interpreted:
        return values.sum(axis=0)
    shape = values.shape[1:]

    @plgpu.inline_mgpu(
        arg_types=(hopper.ACCUMULATOR,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=COLUMN)
    )
    def emit(_: Any, values: Any) -> Any:
        given, layout = list(values.registers.flat), COLUMN.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for index, own in zip(np.ndindex(registers.shape), zip(given[::2], given[1::2], strict=True), strict=True):
            registers[index] = arith.addf(*own)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return emit(values)


def whole_sum(partial: Any, interpreted: bool) -> Any:
    if interpreted:
        return partial
    shape = (64, *partial.shape)
    result = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=hopper.ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(COLUMN,), return_type=result)
    def of_first_rows(_: Any, partial: Any) -> Any:
        """The other rows of all threads are zeros."""
        layout = hopper.ACCUMULATOR.to_mgpu()
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for number, index in enumerate(np.ndindex(registers.shape)):
            own = partial.registers.flat[number // 2]
            zero = vector.broadcast(own.type, utils.c(0.0, ir.F32Type.get()))
            registers[index] = zero if number % 2 else own
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return of_first_rows(partial).sum(axis=0)


def settled(parts: Sequence[Any], interpreted: bool) -> list[Any]:
    """Sums when all products are finished."""
    if interpreted:
        return list(parts)
    first, rest = hopper.settled(parts[0], 0, parts[1:])
    return [first, *rest]


def barrier(interpreted: bool) -> None:
    """Of a warpgroup."""
    if interpreted:
        return

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        utils.warpgroup_barrier()

    emit()


def put_weights(weights: Any, target: Any, interpreted: bool) -> None:
    """bf16 [64, n] into shared memory [64, 16 or 32], rows of 32 or 64 bytes swizzled, as a second operand."""
    if interpreted:
        target.at[:, : weights.shape[1]][...] = weights
        return
    pitch = 2 * target.shape[1]
    tiled = plgpu.RefType((plgpu.TilingTransform((8, target.shape[1])), plgpu.SwizzleTransform(pitch)))

    @plgpu.inline_mgpu(arg_types=(hopper.ACCUMULATOR, tiled))
    def emit(_: Any, weights: Any, target: Any) -> None:
        row, lane = _place()
        base = arith.addi(_address(target), arith.addi(arith.muli(row, _word(pitch)), arith.muli(lane, _word(4))))
        # 16-byte pieces of four rows of 32 bytes, or of two of 64, change places together
        turn = arith.andi(arith.shrui(row, _word(2 if pitch == 32 else 1)), _word(pitch // 16 - 1))
        words = _pairs(weights)
        for number, word in enumerate(words):  # of a row and of the row eight behind it in turns
            piece = arith.muli(arith.xori(turn, _word(number // 2)), _word(16))
            _store(arith.addi(base, piece), number % 2 * 8 * pitch, word, "b32")

    emit(weights, target)


def put_results(values: Any, target: Any, part: int, interpreted: bool) -> None:
    """[64, n], 64 columns of the results of n heads, into shared memory of ``hopper.rows_out``."""
    size = jnp.dtype(values.dtype).itemsize
    if interpreted:
        width = 128 // size
        for n in range(64 // width):
            target.at[64 // width * part + n][...] = values.T[:, n * width : (n + 1) * width]
        return
    heads, swizzled = values.shape[1], plgpu.RefType((plgpu.SwizzleTransform(128),))

    @plgpu.inline_mgpu(arg_types=(hopper.ACCUMULATOR, swizzled))
    def emit(_: Any, values: Any, target: Any) -> None:
        row, lane = _place()
        base = arith.addi(_address(target), _word(part * 64 * size * heads))
        places = []
        for step in range(2):
            byte = arith.muli(arith.addi(row, _word(8 * step)), _word(size))
            piece = arith.muli(arith.shrui(byte, _word(7)), _word(128 * heads))
            chunk = arith.andi(arith.shrui(byte, _word(4)), _word(7))
            places.append((arith.addi(base, arith.addi(piece, arith.andi(byte, _word(15)))), chunk))
        for number, value in enumerate(_bits(values)):
            own, chunk = places[number // 2 % 2]
            in_eight = arith.addi(arith.muli(lane, _word(2)), _word(number % 2))
            inside = arith.muli(arith.xori(chunk, in_eight), _word(16))
            start = arith.addi(own, arith.addi(arith.muli(in_eight, _word(128)), inside))
            _store(start, number // 4 * 1024, value, f"b{8 * size}")

    emit(values, target)


def _place() -> tuple[Any, Any]:
    """The first of the two rows of a thread, the other is eight behind; and which of four threads with these it is."""
    thread = hopper.emit_anew(arith.remui(utils.thread_idx(), _word(128)))
    row = arith.andi(arith.shrui(thread, _word(2)), _word(7))
    return arith.addi(arith.muli(arith.shrui(thread, _word(5)), _word(16)), row), arith.andi(thread, _word(3))


def _address(ref: Any) -> Any:
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def _word(value: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _elements(x: Any) -> list[Any]:
    return [vector.extract(pair, [], ir.DenseI64ArrayAttr.get([n])) for pair in x.registers.flat for n in (0, 1)]


def _bits(x: Any) -> list[Any]:
    """Elements as integers."""
    kind = ir.IntegerType.get_signless(8 * utils.bytewidth(x.mlir_dtype))
    return [arith.bitcast(kind, element) for element in _elements(x)]


def _pairs(x: Any) -> list[Any]:
    """Registers of two 16-bit elements as words."""
    word = ir.VectorType.get((1,), ir.IntegerType.get_signless(32))
    return [vector.extract(vector.bitcast(word, pair), [], [0]) for pair in x.registers.flat]


def _like(part: Any, elements: list[Any]) -> Any:
    registers = np.empty_like(part.registers)
    for number, index in enumerate(np.ndindex(registers.shape)):
        registers[index] = vector.from_elements(part.registers[index].type, elements[2 * number : 2 * number + 2])
    return fragmented_array.FragmentedArray(_registers=registers, _layout=part.layout, _is_signed=None)


def _store(address: Any, offset: int, value: Any, kind: str) -> None:
    constraint = "h" if kind == "b16" else "r"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [address, value], f"st.shared.{kind} [$0 + {offset}], $1;",
        f"r,{constraint},~{{memory}}", asm_dialect=0, has_side_effects=True,
    )  # fmt: skip
