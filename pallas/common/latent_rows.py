"""Listed rows of 512 numbers, FP8 with tile scales or bf16, gathered into shared memory as bf16 for wgmma.

A block is 64 rows in two halves of 256 columns: of FP8 rows four and three tiles of 64 codes, and the rotary numbers.
Four neighbouring lanes have a row, a lane 16 bytes of every 64; a thread has rows ``r`` and ``r + 8``, those that it
has of accumulators. Shared memory holds eight tiles [64, 64] whose 16-byte pieces are swizzled by row. A row with
number -1 is none: nothing is read for it, and it becomes zeros.

Rows may also come in eight parts of 64 columns, each in registers as the first operand of a product (``operand``). A
lane's numbers stay where they are: that permutes the columns inside a part, alike for all rows, and the second operand
is written to shared memory in the same order (``place``).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common import hopper
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jax_fp8attn.latent import NOPE, ROPE, scale_factors
from jax_fp8attn.problems import RowForm
from jax_fp8attn.quantize import E4M3

ROWS, HALF = 64, 256  # of a block, and columns of its halves
STEP = 8  # from the first to the second row of a thread
TILE, PART = ROWS * 128, STEP * 128  # bytes of a tile in shared memory, and between the two rows of a thread
TILES = 4  # of 64 columns in a half
PARTS = 2 * TILES
THREADS, OWN = 128, 2  # rows of a thread
SCALAR = plgpu.Layout.WG_SPLAT
NUMBERS = plgpu.Layout.WG_STRIDED((THREADS * OWN,), 1)
BF16_TILES = plgpu.RefType((plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


class Pool(NamedTuple):
    """References to the rows of a pool: FP8, or ``nope`` alone with bf16 rows of 512."""

    nope: Any  # [P, 448]
    rope: Any  # [P, 64]
    scale: Any  # [P, 7 or 14]


@dataclasses.dataclass(frozen=True)
class Gather:
    """Rows of one form out of one or two pools."""

    form: RowForm
    pools: tuple[Pool, ...]
    interpreted: bool

    @property
    def fp8(self) -> bool:
        return self.form.dtype == E4M3

    @property
    def scales(self) -> int:
        """Of a row."""
        return NOPE // self.form.scale_group

    @property
    def held_scales(self) -> int:
        """Of a row in each of its four lanes."""
        return -(-self.scales // 4)

    def load(self, numbers: Any, pool: Any, half: int) -> Any:
        """A half of FP8 rows into registers: codes, and behind those of the second half the rotary numbers."""
        if self.interpreted:
            return self._plain(numbers, pool, half)
        layout = _strided(OWN * (TILES + half), 4)
        refs = [x for one in self.pools for x in (one.nope, one.rope)]

        def emit(pool: Any, numbers: list[Any], refs: Any) -> list[Any]:
            hopper.emit_end_of_block(4 + half)  # or the zeros of rows that are none would be written long before
            nope, rope = (_select(pool, refs[n::2]) for n in range(2))
            return [words for number in numbers for words in _load_half(nope, rope, number, half)]

        return _per_row(emit, layout, numbers, pool, refs)

    def load_scales(self, numbers: Any, pool: Any) -> Any:
        """Bits of the scales of FP8 rows, every fourth in a lane of a row."""
        if self.interpreted:
            return None  # ``load`` has dequantised

        def emit(pool: Any, numbers: list[Any], refs: Any) -> list[Any]:
            pointer = _select(pool, refs)
            return [bits for number in numbers for bits in self._load_scales(pointer, number)]

        layout = _strided(OWN * self.held_scales, 1)
        return _per_row(emit, layout, numbers, pool, [one.scale for one in self.pools])

    def _load_scales(self, pointer: Any, number: Any) -> list[Any]:
        size = self.form.scale_dtype.itemsize
        lane, held = _lane_of_row(), []
        first = _offset(pointer, number, size * self.scales, arith.muli(lane, _word(size)))
        kind = "b32" if size == 4 else "u8"
        for n in range(self.held_scales):
            inside = arith.cmpi(arith.CmpIPredicate.ult, lane, _word(self.scales - 4 * n))
            there = arith.andi(_is_row(number), inside)
            held.append(_vector([_load_word(first, 4 * n * size, there, kind, 0)]))
        return held

    def store(self, loaded: Any, scales: Any, target: Any, half: int) -> None:
        """Loaded rows, dequantised, into eight tiles of shared memory."""
        if self.interpreted:
            for n in range(TILES):
                target.at[TILES * half + n][...] = loaded[:, 64 * n : 64 * (n + 1)]
            return
        count, held = OWN * (TILES + (half == 1)), OWN * self.held_scales

        @plgpu.inline_mgpu(arg_types=(_strided(count, 4), _strided(held, 1), BF16_TILES))
        def emit(_: Any, loaded: Any, scales: Any, target: Any) -> None:
            words, bits = list(loaded.registers.flat), [self._scale_bits(x) for x in scales.registers.flat]
            row, base = _row(), llvm.ptrtoint(_i32(), utils.memref_ptr(target))
            if self.form.scale_group == 32:
                row = hopper.emit_anew(row)  # or assemblers keep its addresses through the kernel, and spill others
            own = arith.addi(base, arith.muli(row, _word(128)))
            for n in range(OWN):
                mine = words[n * count // OWN : (n + 1) * count // OWN]
                factors = bits[n * self.held_scales : (n + 1) * self.held_scales]
                for tile in range(TILES - (half == 1)):
                    number = TILES * half + tile
                    # or more of them would be under way than registers hold
                    hopper.emit_end_of_block(32 + OWN * number + n)
                    codes = _dequantised(mine[tile], self._factor(factors, number))
                    place = arith.addi(own, _word(number * TILE + n * PART))
                    _store_pieces(
                        place, row, [arith.addi(arith.muli(_lane_of_row(), _word(2)), _word(k)) for k in (0, 1)], codes
                    )
                if half == 1:
                    place = arith.addi(own, _word(7 * TILE + n * PART))
                    _store_pieces(place, row, [_piece(row, k) for k in (0, 1)], mine[TILES - 1 :])

        emit(loaded, scales, target)

    def _scale_bits(self, held: Any) -> Any:
        """float32 bits of a scale: byte 0 is 2^-127, byte 255 is NaN."""
        bits = _element(held)
        if self.form.scale_dtype.itemsize == 4:
            return bits
        is_byte = lambda value: arith.cmpi(arith.CmpIPredicate.eq, bits, _word(value))
        wide = arith.shli(bits, _word(23))
        return arith.select(is_byte(0), _word(1 << 22), arith.select(is_byte(255), _word(0x7FC00000), wide))

    def _factor(self, held: list[Any], tile: int) -> Any:
        """The scale of this lane's 16 codes of a tile, from the lane that holds it."""
        if self.form.scale_group == 64:
            return _from_lane(held[tile // 4], _word(tile % 4))
        second = arith.shrui(_lane_of_row(), _word(1))
        return _from_lane(held[tile // 2], arith.addi(second, _word(2 * tile % 4)))

    def exact(self, part: int) -> bool:
        """A part that is stored as bf16."""
        return not self.fp8 or part == PARTS - 1

    def load_part(self, numbers: Any, pool: Any, part: int) -> Any:
        """64 columns of rows into registers."""
        if self.interpreted:
            return self._plain_part(numbers, pool, part)
        copied = self.exact(part)
        rotary = copied and self.fp8

        def emit(pool: Any, numbers: list[Any], refs: Any) -> list[Any]:
            hopper.emit_end_of_block(16 + part)  # as in ``load``
            pointer, lane = _select(pool, refs), arith.muli(_lane_of_row(), _word(16))
            width = 2 * ROPE if rotary else 1024 if copied else NOPE
            first = 0 if rotary else part * (128 if copied else 64)
            numbers = [hopper.emit_anew(number) for number in numbers]  # or addresses would take registers
            return [
                _load_words(_offset(pointer, number, width, lane), first + 64 * half, _is_row(number))
                for number in numbers
                for half in range(1 + copied)
            ]

        refs = [one.rope if rotary else one.nope for one in self.pools]
        return _per_row(emit, _strided(OWN * (1 + copied), 4), numbers, pool, refs)

    def operand(self, loaded: Any, scales: Any, part: int) -> Any:
        """A loaded part, bf16 [64, 64] in the layout of accumulators."""
        if self.interpreted:
            return loaded
        return self._with_words(loaded, scales, part, _operand_of, OPERAND)

    def place(self, loaded: Any, scales: Any, part: int, target: Any, like: Gather) -> None:
        """The first rows of a loaded part into shared memory [n, 64], columns in the order of operands of ``like``."""
        count = target.shape[0]
        if self.interpreted:
            target[...] = loaded[:count]
            return

        def put(words: list[list[Any]], target: Any) -> None:
            base = llvm.ptrtoint(_i32(), utils.memref_ptr(target))
            for n, own in enumerate(words):
                row = arith.addi(_row(), _word(STEP * n))
                there = arith.cmpi(arith.CmpIPredicate.slt, row, _word(count))
                start = arith.addi(base, arith.muli(row, _word(128)))
                for k, word in enumerate(own):
                    column = _place_of(_source_of(k, self.exact(part)), like.exact(part))
                    piece = _swizzled(arith.shrui(column, _word(2)), row)
                    inside = arith.muli(arith.andi(column, _word(3)), _word(4))
                    _store_word_if(arith.addi(arith.addi(start, arith.muli(piece, _word(16))), inside), word, there)

        self._with_words(loaded, scales, part, put, None, target)

    def _with_words(self, loaded: Any, scales: Any, part: int, use: Any, result: Any, *targets: Any) -> Any:
        """``use`` gets what a thread has of a part: eight words of bf16 pairs of each of its rows."""
        copied = self.exact(part)
        types = [_strided(OWN * (1 + copied), 4)] if copied else [_strided(OWN, 4), _strided(OWN * self.held_scales, 1)]
        options = {} if result is None else {"return_type": result}

        @plgpu.inline_mgpu(arg_types=(*types, *[BF16_TILES] * len(targets)), **options)
        def emit(_: Any, loaded: Any, *rest: Any) -> Any:
            vectors = list(loaded.registers.flat)
            if copied:
                pairs = [vectors[:2], vectors[2:]]
            else:
                bits = [self._scale_bits(x) for x in rest[0].registers.flat]
                held = [bits[n * self.held_scales : (n + 1) * self.held_scales] for n in range(OWN)]
                pairs = [_dequantised(codes, self._factor(own, part)) for codes, own in zip(vectors, held, strict=True)]
            return use(
                [[word for vector in pair for word in _words(vector)] for pair in pairs], *rest[len(types) - 1 :]
            )

        return emit(*([loaded] if copied else [loaded, scales]), *targets)

    def keep(self, operand: Any, target: Any, part: int) -> None:
        """An operand into shared memory [64, 64], columns in the order of the row."""
        if self.interpreted:
            target[...] = operand
            return
        copied = self.exact(part)

        @plgpu.inline_mgpu(arg_types=(hopper.ACCUMULATOR, BF16_TILES))
        def emit(_: Any, operand: Any, target: Any) -> None:
            row, base = _row(), llvm.ptrtoint(_i32(), utils.memref_ptr(target))
            own = arith.addi(base, arith.muli(row, _word(128)))
            odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(row, _word(1)), _word(0))
            for n, words in enumerate(_words_of(operand)):
                halves = [words[:4], words[4:]]
                if copied:  # odd rows the other way round: neighbouring rows write different banks
                    turned = [
                        [arith.select(odd, b, a) for a, b in zip(*pair, strict=True)] for pair in (halves, halves[::-1])
                    ]
                    pieces, halves = [_piece(row, k) for k in (0, 1)], turned
                else:
                    pieces = [arith.addi(arith.muli(_lane_of_row(), _word(2)), _word(k)) for k in (0, 1)]
                place = arith.addi(own, _word(n * PART))
                _store_pieces(place, row, pieces, [_vector(half) for half in halves])

        emit(operand, target)

    def copy(self, numbers: Any, pool: Any, target: Any, half: int) -> None:
        """A half of bf16 rows straight into shared memory; ``wait`` says when it is there."""
        if self.interpreted:
            self.store(self._plain(numbers, pool, half), None, target, half)
            return
        refs = [one.nope for one in self.pools]

        @plgpu.inline_mgpu(arg_types=(NUMBERS, SCALAR, BF16_TILES, *[plgpu.RefType()] * len(refs)))
        def emit(_: Any, numbers: Any, pool: Any, target: Any, *refs: Any) -> None:
            pointer = _select(pool.registers.item(), refs)
            row, base = _row(), llvm.ptrtoint(_i32(), utils.memref_ptr(target))
            own = arith.addi(base, arith.muli(row, _word(128)))
            for n, register in enumerate(numbers.registers.flat):
                number = _element(register)
                size = arith.select(_is_row(number), _word(16), _word(0))
                for k in (0, 1):
                    piece = _piece(row, k)
                    source = _offset(pointer, number, 1024, arith.muli(piece, _word(16)))
                    place = arith.addi(own, arith.muli(_swizzled(piece, row), _word(16)))
                    for tile in range(TILES * half, TILES * (half + 1)):
                        _copy_piece(place, tile * TILE + n * PART, source, 128 * tile, size)
            nvvm.cp_async_commit_group()

        emit(numbers, pool, target, *refs)

    def wait(self, younger: int) -> None:
        """Until at most so many younger halves are on their way."""
        if self.interpreted:
            return

        @plgpu.inline_mgpu()
        def emit(_: Any) -> None:
            nvvm.cp_async_wait_group(younger)

        emit()

    def _plain(self, numbers: Any, pool: Any, half: int) -> Any:
        """bf16 [64, 256]."""
        return jnp.concatenate([self._plain_part(numbers, pool, TILES * half + n) for n in range(TILES)], axis=1)

    def _plain_part(self, numbers: Any, pool: Any, part: int) -> Any:
        """bf16 [64, 64]."""
        columns = slice(64 * part, 64 * (part + 1))
        take = lambda x, columns: jnp.take(x[:, columns], numbers, axis=0, mode="clip")

        def taken(one: Pool) -> Any:
            if self.exact(part):
                return take(one.nope, columns) if one.rope is None else take(one.rope, slice(0, 64))
            each = 64 // self.form.scale_group
            factors = scale_factors(take(one.scale, slice(each * part, each * (part + 1))))
            factor, rest = (jnp.repeat(x, self.form.scale_group, axis=1) for x in factors)
            return (take(one.nope, columns).astype(jnp.float32) * factor * rest).astype(jnp.bfloat16)

        rows = taken(self.pools[0])
        if len(self.pools) > 1:
            rows = jnp.where(pool > 0, taken(self.pools[1]), rows)
        return jnp.where(numbers[:, None] < 0, 0, rows)


def _per_row(emit: Any, layout: Any, numbers: Any, pool: Any, refs: list[Any]) -> Any:
    """Words of the rows of each thread."""
    result = plgpu.ShapeDtypeStruct(layout.to_mgpu().shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(NUMBERS, SCALAR, *[plgpu.RefType()] * len(refs)), return_type=result)
    def emitted(_: Any, numbers: Any, pool: Any, *refs: Any) -> Any:
        return _array(emit(pool.registers.item(), [_element(x) for x in numbers.registers.flat], refs), layout)

    return emitted(numbers, pool, *refs)


def listed(indices: tuple[Any, ...], rows: tuple[int, ...], pool: Any, first: Any, end: Any, interpreted: bool) -> Any:
    """Numbers of the rows in entries ``first`` to ``first + 63`` of a pool's list, -1 for entries from ``end`` on and
    for indices that are no row of the pool."""
    if interpreted:
        place = first + jnp.arange(ROWS, dtype=jnp.int32)
        own = [(jnp.take(x[...], place, mode="clip"), count) for x, count in zip(indices, rows, strict=True)]
        index, count = (jnp.where(pool > 0, *pair) for pair in zip(own[-1], own[0], strict=True))
        return jnp.where((place < end) & (index >= 0) & (index < count), index, -1)

    @plgpu.inline_mgpu(arg_types=(SCALAR,) * 3 + (plgpu.RefType(),) * len(indices), return_type=_NUMBERS)
    def emit(_: Any, pool: Any, first: Any, end: Any, *refs: Any) -> Any:
        pool, first, end = (x.registers.item() for x in (pool, first, end))
        pointer, count = _select(pool, refs), _word(rows[0])
        if len(rows) > 1:
            count = arith.select(_is_second(pool), _word(rows[1]), count)
        numbers = []
        for n in range(OWN):
            place = arith.addi(first, arith.addi(_row(), _word(STEP * n)))
            there = arith.cmpi(arith.CmpIPredicate.slt, place, end)
            index = _load_word(_offset(pointer, place, 4, _word(0)), 0, there, "b32", -1)
            inside = arith.cmpi(arith.CmpIPredicate.ult, index, count)
            numbers.append(_vector([arith.select(inside, index, _word(-1))]))
        return _array(numbers, NUMBERS)

    return emit(pool, first, end, *indices)


def following(first: Any, count: Any, interpreted: bool) -> Any:
    """Numbers of 64 rows in a row, -1 from the ``count``th on."""
    if interpreted:
        row = jnp.arange(ROWS, dtype=jnp.int32)
        return jnp.where(row < count, first + row, -1)

    @plgpu.inline_mgpu(arg_types=(SCALAR, SCALAR), return_type=_NUMBERS)
    def emit(_: Any, first: Any, count: Any) -> Any:
        numbers = []
        for n in range(OWN):
            row = arith.addi(_row(), _word(STEP * n))
            inside = arith.cmpi(arith.CmpIPredicate.slt, row, count.registers.item())
            numbers.append(_vector([arith.select(inside, arith.addi(first.registers.item(), row), _word(-1))]))
        return _array(numbers, NUMBERS)

    return emit(first, count)


def note_valid(numbers: Any, target: Any, interpreted: bool) -> None:
    """1 for rows with a number, int32 [64] in shared memory."""
    if interpreted:
        target[...] = (numbers >= 0).astype(jnp.int32)
        return

    @plgpu.inline_mgpu(arg_types=(NUMBERS, plgpu.RefType()))
    def emit(_: Any, numbers: Any, target: Any) -> None:
        base = llvm.ptrtoint(_i32(), utils.memref_ptr(target))
        place = arith.addi(base, arith.muli(_row(), _word(4)))
        for n, register in enumerate(numbers.registers.flat):
            _store_word(place, 4 * STEP * n, arith.extui(_i32(), _is_row(_element(register))))

    emit(numbers, target)


_NUMBERS = plgpu.ShapeDtypeStruct((THREADS * OWN,), jnp.int32, layout=NUMBERS)
OPERAND = plgpu.ShapeDtypeStruct((ROWS, 64), jnp.bfloat16, layout=hopper.ACCUMULATOR)


def _operand_of(words: list[list[Any]]) -> Any:
    """Word 2 * step + half of a row are its columns 16 * step + 8 * half + 2 * lane and the next."""
    layout, pair = hopper.ACCUMULATOR.to_mgpu(), ir.VectorType.get((2,), ir.BF16Type.get())
    registers = np.empty(layout.registers_shape((ROWS, 64)), dtype=object)
    for number, index in enumerate(np.ndindex(registers.shape)):
        registers[index] = vector.bitcast(pair, _vector([words[number % OWN][number // OWN]]))
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _words_of(operand: Any) -> list[list[Any]]:
    """The reverse."""
    one = ir.VectorType.get((1,), _i32())
    words = [_element(vector.bitcast(one, x)) for x in operand.registers.flat]
    return [words[n::OWN] for n in range(OWN)]


def _source_of(k: int, copied: bool) -> Any:
    """Which pair of columns of a part a lane's word ``k`` is: it has 16 codes in a row, or 8 numbers of each half."""
    lane = _lane_of_row()
    if copied:
        return arith.addi(arith.muli(lane, _word(4)), _word(16 * (k // 4) + k % 4))
    return arith.addi(arith.muli(lane, _word(8)), _word(k))


def _place_of(pair: Any, copied: bool) -> Any:
    """Where a pair of columns stands in operands: word 2 * step + half of a lane is 8 * step + 4 * half + lane."""
    bits = lambda first, count: arith.andi(arith.shrui(pair, _word(first)), _word((1 << count) - 1))
    terms = [(bits(4, 1), 16), (bits(1, 1), 8), (bits(0, 1), 4), (bits(2, 2), 1)]
    if not copied:
        terms = [(bits(1, 2), 8), (bits(0, 1), 4), (bits(3, 2), 1)]
    return functools.reduce(arith.addi, [arith.muli(x, _word(weight)) for x, weight in terms])


def masked(scores: Any, numbers: Any, interpreted: bool) -> Any:
    """-inf in the rows [64, n] that are none."""
    if interpreted:
        return jnp.where((numbers >= 0)[:, None], scores, -jnp.inf)
    result = plgpu.ShapeDtypeStruct(scores.shape, jnp.float32, layout=hopper.ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(hopper.ACCUMULATOR, NUMBERS), return_type=result)
    def emit(_: Any, scores: Any, numbers: Any) -> Any:
        there = [_is_row(_element(x)) for x in numbers.registers.flat]
        registers = np.empty_like(scores.registers)
        for number, index in enumerate(np.ndindex(registers.shape)):
            nothing = vector.broadcast(scores.registers[index].type, utils.c(-np.inf, ir.F32Type.get()))
            registers[index] = arith.select(there[number % OWN], scores.registers[index], nothing)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=scores.layout, _is_signed=None)

    return emit(scores, numbers)


def _strided(registers: int, size: int) -> Any:
    """So many registers of a thread, of ``size`` words each."""
    return plgpu.Layout.WG_STRIDED((THREADS * registers * size,), size)


def _array(registers: list[Any], layout: Any) -> Any:
    return fragmented_array.FragmentedArray(
        _registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=True
    )


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _word(value: int) -> Any:
    """An int32 of these 32 bits."""
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), value - (1 << 32) if value >> 31 and value > 0 else value))


def _element(register: Any) -> Any:
    return vector.extract(register, [], [0])


def _vector(words: list[Any]) -> Any:
    return vector.from_elements(ir.VectorType.get((len(words),), _i32()), words)


def _words(register: Any) -> list[Any]:
    return [vector.extract(register, [], [n]) for n in range(4)]


def _thread() -> Any:
    return arith.remui(utils.thread_idx(), _word(THREADS))


def _row() -> Any:
    """The first row of a thread."""
    warp = arith.shrui(_thread(), _word(5))
    return arith.addi(arith.muli(warp, _word(2 * STEP)), arith.andi(arith.shrui(_thread(), _word(2)), _word(STEP - 1)))


def _lane_of_row() -> Any:
    return arith.andi(_thread(), _word(3))


def _piece(row: Any, k: int) -> Any:
    """The 16 bytes of 128 that a lane copies in step k: neighbouring rows have different halves at a time."""
    half = arith.xori(arith.andi(row, _word(1)), _word(k))
    return arith.addi(arith.muli(half, _word(4)), _lane_of_row())


def _swizzled(piece: Any, row: Any) -> Any:
    return arith.xori(piece, arith.andi(row, _word(7)))


def _is_row(number: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.sge, number, _word(0))


def _is_second(pool: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.ne, pool, _word(0))


def _select(pool: Any, refs: Any) -> Any:
    """Where the rows of a pool begin."""
    pointers = [utils.memref_ptr(x) for x in refs]
    if len(pointers) == 1:
        return pointers[0]
    return arith.select(_is_second(pool), pointers[1], pointers[0])


def _offset(pointer: Any, number: Any, width: int, more: Any) -> Any:
    """The address of a row of ``width`` bytes; row 0 stands in for a row that is none."""
    i64 = ir.IntegerType.get_signless(64)
    number = arith.maxsi(number, _word(0))
    wide = arith.muli(arith.extui(i64, number), arith.constant(i64, ir.IntegerAttr.get(i64, width)))
    return utils.getelementptr(pointer, [arith.addi(wide, arith.extui(i64, more))], ir.IntegerType.get_signless(8))


def _load_half(nope: Any, rope: Any, number: Any, half: int) -> list[Any]:
    there, lane = _is_row(number), arith.muli(_lane_of_row(), _word(16))
    codes = _offset(nope, number, NOPE, lane)
    loaded = [_load_words(codes, 64 * tile, there) for tile in range(TILES * half, NOPE // 64 if half else TILES)]
    if half:
        for k in (0, 1):
            piece = arith.muli(_piece(_row(), k), _word(16))
            loaded.append(_load_words(_offset(rope, number, 2 * ROPE, piece), 0, there))
    return loaded


def _load_word(pointer: Any, offset: int, there: Any, kind: str, other: int) -> Any:
    """A ``kind`` of global memory, or ``other``."""
    text = f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, {other}; @p ld.global.{kind} $0, [$1 + {offset}]; }}"
    given = [pointer, arith.extui(_i32(), there)]
    return llvm.inline_asm(_i32(), given, text, "=&r,l,r", asm_dialect=0, has_side_effects=True)


def _load_words(pointer: Any, offset: int, there: Any) -> Any:
    """Four of global memory, or zeros. Loads with ``nc`` would be moved before fences, which may wait for them."""
    text = (
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        f"@p ld.global.L1::no_allocate.L2::256B.v4.b32 {{$0,$1,$2,$3}}, [$4 + {offset}]; }}"
    )
    kind = llvm.StructType.get_literal([_i32()] * 4)
    given = [pointer, arith.extui(_i32(), there)]
    words = llvm.inline_asm(kind, given, text, "=&r,=&r,=&r,=&r,l,r", asm_dialect=0, has_side_effects=True)
    return _vector([llvm.extractvalue(_i32(), words, [n]) for n in range(4)])


def _copy_piece(place: Any, offset: int, pointer: Any, source: int, size: Any) -> None:
    """16 bytes on their way to shared memory, or with ``size`` 0 zeros."""
    text = f"cp.async.cg.shared.global.L2::256B [$0 + {offset}], [$1 + {source}], 16, $2;"
    _side_effect(text, [place, pointer, size], "r,l,r,~{memory}")


def _store_word(address: Any, offset: int, word: Any) -> None:
    _side_effect(f"st.shared.b32 [$0 + {offset}], $1;", [address, word], "r,r,~{memory}")


def _store_word_if(address: Any, word: Any, there: Any) -> None:
    text = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.shared.b32 [$0], $1; }"
    _side_effect(text, [address, word, arith.extui(_i32(), there)], "r,r,r,~{memory}")


def _store_words(address: Any, words: Any) -> None:
    _side_effect("st.shared.v4.b32 [$0], {$1,$2,$3,$4};", [address, *_words(words)], "r,r,r,r,r,~{memory}")


def _from_lane(x: Any, lane: Any) -> Any:
    """Of the four lanes of a row."""
    return llvm.inline_asm(_i32(), [x, lane], "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;", "=r,r,r")


def _dequantised(codes: Any, factor: Any) -> list[Any]:
    """16 codes as two times four words of bf16: exact in float32, rounded once."""
    words = []
    for word in _words(codes):
        text = (
            "{ .reg .b16 l, h, a, b, c, d; .reg .b32 x, y; .reg .f32 e, f, g, i, s; mov.b32 {l, h}, $2; mov.b32 s, $3; "
            "cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; mov.b32 {a, b}, x; mov.b32 {c, d}, y; "
            "cvt.f32.f16 e, a; cvt.f32.f16 f, b; cvt.f32.f16 g, c; cvt.f32.f16 i, d; "
            "mul.f32 e, e, s; mul.f32 f, f, s; mul.f32 g, g, s; mul.f32 i, i, s; "
            "cvt.rn.bf16x2.f32 $0, f, e; cvt.rn.bf16x2.f32 $1, i, g; }"
        )
        pair = llvm.inline_asm(
            llvm.StructType.get_literal([_i32()] * 2),
            [word, factor],
            text,
            "=r,=r,r,r",
            asm_dialect=0,
            has_side_effects=True,
        )
        words += [llvm.extractvalue(_i32(), pair, [n]) for n in (0, 1)]
    return [_vector(words[:4]), _vector(words[4:])]


def _store_pieces(place: Any, row: Any, pieces: list[Any], values: list[Any]) -> None:
    for piece, value in zip(pieces, values, strict=True):
        address = arith.addi(place, arith.muli(_swizzled(piece, row), _word(16)))
        _store_words(address, value)


def _side_effect(text: str, given: list[Any], constraints: str) -> None:
    llvm.inline_asm(ir.Type.parse("!llvm.void"), given, text, constraints, asm_dialect=0, has_side_effects=True)
