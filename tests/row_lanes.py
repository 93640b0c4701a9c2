"""Lanes of a warpgroup on integers: how the sparse kernels gather rows, which the interpreter replaces."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax.experimental.pallas.mosaic_gpu as plgpu
import ml_dtypes
import numpy as np
from jax_fp8attn.pallas.common import head_columns, latent_rows

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)


class Vector:
    """A register of several words, each of all 128 threads."""

    def __init__(self, words: list[np.ndarray]) -> None:
        self.words = words


class Lanes:
    """Stands in for MLIR's operations: a value is an int64 array, a number a thread. Pointers count from where their
    array begins, which is a multiple of 2^40; shared memory is at 0."""

    THREAD = np.arange(latent_rows.THREADS)

    def __init__(self, arrays: list[np.ndarray], shared: int = 0) -> None:
        self.memory = [np.frombuffer(np.asarray(x).tobytes(), np.uint8) for x in arrays]
        self.shared = np.zeros(shared, np.uint8)
        self.writes = np.zeros(shared, int)

    def refs(self) -> list[Any]:
        return [types.SimpleNamespace(address=np.full(128, (n + 1) << 40)) for n in range(len(self.memory))]

    def read(self, address: np.ndarray, size: int, there: np.ndarray, other: int = 0) -> np.ndarray:
        """uint8 [128, size]; an address outside of its array fails."""
        found = np.full((128, size), other & 0xFF, np.uint8)
        for thread in np.flatnonzero(there):
            array, place = int(address[thread]) >> 40, int(address[thread]) & ((1 << 40) - 1)
            assert array and place % size == 0 and place + size <= self.memory[array - 1].size
            found[thread] = self.memory[array - 1][place : place + size]
        return found

    def write(self, address: np.ndarray, values: np.ndarray) -> None:
        """uint8 [128, size]; 16 bytes a lane must not meet in a bank."""
        size = values.shape[1]
        place = address[:, None] + np.arange(size)
        if size == 16:
            assert all(len({a // 16 % 8 for a in eight}) == 8 for eight in address.reshape(-1, 8))
            np.add.at(self.writes, place, 1)
        self.shared[place] = values

    @contextlib.contextmanager
    def emulated(self) -> Iterator[None]:
        full = lambda value: np.full(128, value, np.int64)
        words = lambda x: np.ascontiguousarray(x).view(np.int32).astype(np.int64)
        compare = {"ult": lambda a, b: a % 2**32 < b % 2**32, "slt": np.less, "sge": np.greater_equal,
                   "ne": np.not_equal, "eq": np.equal}  # fmt: skip
        arith = types.SimpleNamespace(
            addi=np.add, muli=np.multiply, andi=np.bitwise_and, xori=np.bitwise_xor, remui=np.remainder,
            shrui=np.right_shift, shli=lambda a, b: (a << b).astype(np.int32).astype(np.int64), maxsi=np.maximum,
            select=np.where, extui=lambda kind, x: x.astype(np.int64), constant=lambda kind, value: full(value),
            cmpi=lambda name, a, b: compare[name](a, b), CmpIPredicate=types.SimpleNamespace(**{n: n for n in compare}),
        )  # fmt: skip

        def load_word(pointer: Any, offset: int, there: Any, kind: str, other: int) -> Any:
            if kind == "u8":
                return self.read(pointer + offset, 1, there)[:, 0].astype(np.int64)
            return words(self.read(pointer + offset, 4, there, other))[:, 0]

        def load_words(pointer: Any, offset: int, there: Any) -> Any:
            return Vector(list(words(self.read(pointer + offset, 16, there)).T))

        def as_bytes(vector: Vector) -> np.ndarray:
            return np.stack(vector.words, axis=1).astype(np.int32).view(np.uint8)

        def dequantised(codes: Vector, factor: np.ndarray) -> list[Vector]:
            scale = factor.astype(np.int32).view(np.float32)[:, None]
            with np.errstate(invalid="ignore"):
                values = (as_bytes(codes).view(ml_dtypes.float8_e4m3fn).astype(F32) * scale).astype(BF16)
            return [Vector(list(words(values[:, n : n + 8]).T)) for n in (0, 8)]

        def copy_piece(place: Any, offset: int, pointer: Any, source: int, size: Any) -> None:
            self.write(place + offset, self.read(pointer + source, 16, size > 0))

        def store(address: Any, offset: int, value: Any, kind: str) -> None:
            size = int(kind[1:]) // 8
            for warp in (address + offset).reshape(4, 32) // 4:
                assert len(set(warp)) == len({word % 32 for word in warp}), "lanes meet in a bank"
            self.write(address + offset, as_bytes(Vector([value]))[:, :size])

        def store_word_if(address: Any, word: Any, there: Any) -> None:
            lanes = np.flatnonzero(there)
            self.write(address[lanes], as_bytes(Vector([word]))[lanes])

        stand_ins = {
            "arith": arith, "_word": lambda value: full(value), "_element": lambda x: x.words[0],
            "_vector": Vector, "_words": lambda x: x.words, "_i32": lambda: None,
            "ir": types.SimpleNamespace(
                IntegerType=types.SimpleNamespace(get_signless=lambda bits: bits),
                IntegerAttr=types.SimpleNamespace(get=lambda kind, value: value),
            ),
            "hopper": types.SimpleNamespace(
                emit_end_of_block=lambda number: None, emit_anew=lambda word: word, ACCUMULATOR=None
            ),
            "llvm": types.SimpleNamespace(ptrtoint=lambda kind, x: x),
            "nvvm": types.SimpleNamespace(cp_async_commit_group=lambda: None),
            "utils": types.SimpleNamespace(
                memref_ptr=lambda ref: ref.address, thread_idx=lambda: self.THREAD + 256,
                getelementptr=lambda pointer, offsets, kind: pointer + offsets[0],
            ),
            "_array": lambda registers, layout: registers_of(registers),
            "_load_word": load_word, "_load_words": load_words, "_dequantised": dequantised,
            "_store_words": lambda address, x: self.write(address, as_bytes(x)), "_copy_piece": copy_piece,
            "_store_word": lambda address, offset, x: self.write(address + offset, as_bytes(Vector([x]))),
            "_store_word_if": store_word_if, "_from_lane": lambda x, lane: x[self.THREAD // 4 * 4 + lane],
            "_operand_of": lambda words: types.SimpleNamespace(words=words), "_words_of": lambda operand: operand.words,
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            for module in (latent_rows, head_columns):
                for name in stand_ins.keys() & vars(module).keys():
                    stack.enter_context(mock.patch.object(module, name, stand_ins[name]))
            for name, value in (("_pairs", lambda x: x.pairs), ("_bits", lambda x: x.elements), ("_store", store)):
                stack.enter_context(mock.patch.object(head_columns, name, value))
            plain = lambda **_: lambda function: lambda *given: function(None, *given)
            stack.enter_context(mock.patch.object(plgpu, "inline_mgpu", plain))
            yield


def registers_of(values: list[Any]) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return types.SimpleNamespace(registers=array)


def scalar(value: int) -> Any:
    return types.SimpleNamespace(registers=types.SimpleNamespace(item=lambda: np.full(128, value, np.int64)))


def at(address: int, *shape: int) -> Any:
    """A reference to shared memory."""
    return types.SimpleNamespace(address=np.full(128, address, np.int64), shape=shape)


SHARED = 8 * latent_rows.TILE
TARGET = at(0)


def rows_in(shared: np.ndarray) -> np.ndarray:
    """bf16 [64, 512] as wgmma reads tiles with a swizzle of 128 bytes."""
    pieces = shared[:SHARED].reshape(8, 64, 8, 16)
    row, piece = np.ogrid[:64, :8]
    plain = pieces[:, row, piece ^ (row % 8)]  # [8, 64, 8, 16]
    return plain.transpose(1, 0, 2, 3).reshape(64, 1024).view(BF16)
