"""What differs between jax 0.11.2 and 0.12, and between a GPU and the interpreter, in one place."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jax_fp8attn.quantize import E4M3, FP8_MAX


def store(ref: Any, value: Any) -> None:
    """Stores to global memory without the sector checks of 0.12, which refuse narrow stores."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def to_e4m3(x: Any, interpret: bool = True) -> Any:
    """Saturating cast; NaN stays NaN. The GPU's cast saturates by itself (PTX has no other), the interpreter's does
    not."""
    if not interpret:
        return x.astype(E4M3)
    limit = FP8_MAX[E4M3]
    return jnp.minimum(jnp.maximum(x, -limit), limit).astype(E4M3)


def reciprocal(x: Any, layout: Any, interpret: bool) -> Any:
    """Of normal numbers with a normal reciprocal, or NaN: without what the assembler adds for subnormal ones. A single
    number takes the plain way: layout inference loses the layout of a result that every lane holds."""
    if interpret or x.shape == (1,):
        return 1.0 / x

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def approximate(_: Any, x: Any) -> Any:
        registers = np.empty_like(x.registers)
        for i, register in np.ndenumerate(x.registers):
            value = llvm.inline_asm(ir.F32Type.get(), [_scalar(register)], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
            registers[i] = vector.broadcast(register.type, value) if _is_vector(register) else value
        return fragmented_array.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return approximate(x)


def _is_vector(x: Any) -> bool:
    return isinstance(x.type, ir.VectorType)


def _scalar(x: Any) -> Any:
    """What a register of one element holds."""
    return vector.extract(x, [], [0]) if _is_vector(x) else x


def share_of(x: Any, weight: Any, absent: Any, tiny: float, layout: Any, interpret: bool) -> Any:
    """``x * weight`` in float32 of x [lines, n] and weight [lines], or ``absent`` [lines], a zero, where the weight is
    less than ``tiny``.

    Pairs of 16-bit elements are replaced as words, those of bfloat16 widened as words too: half as many instructions as
    the assembler needs otherwise. A zero times the weight has the zero's sign.
    """
    if interpret or x.dtype.itemsize != 2:
        spread = lambda line: plgpu.layout_cast(lax.broadcast_in_dim(line, x.shape, [0]), layout)
        weight = spread(weight)
        return jnp.where(weight < tiny, spread(absent), x.astype(jnp.float32) * weight)
    line = layout.reduce(1)
    product = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, line, line), return_type=product)
    def of_words(_: Any, x: Any, weight: Any, absent: Any) -> Any:
        registers = np.empty_like(x.registers)
        for i, pairs in np.ndenumerate(x.registers):
            registers[i] = _share_of_words(pairs, weight.registers.item(), absent.registers.item(), tiny)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return of_words(x, weight, absent)


def _share_of_words(pairs: Any, weight: Any, absent: Any, tiny: float) -> Any:
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    given = ir.VectorType(pairs.type)
    count = given.shape[0] // 2
    vector_of = lambda kind, n: ir.VectorType.get((n,), kind)
    all_of = lambda value: arith.constant(
        vector_of(i32, count),
        ir.DenseElementsAttr.get_splat(vector_of(i32, count), ir.IntegerAttr.get(i32, value)),
    )
    weight, absent = _scalar(weight), _scalar(absent)
    words = utils.bitcast(pairs, vector_of(i32, count))
    sign = arith.bitcast(i32, absent)
    both = arith.ori(sign, arith.shrui(sign, arith.constant(i32, 16)))
    gone = arith.cmpf(arith.CmpFPredicate.OLT, weight, arith.constant(f32, tiny))
    words = arith.select(gone, vector.broadcast(vector_of(i32, count), both), words)
    if isinstance(given.element_type, ir.BF16Type):
        low = arith.shli(words, all_of(16))
        high = arith.andi(words, all_of(-(1 << 16)))
        order = [half * count + n for n in range(count) for half in (0, 1)]
        widened = utils.bitcast(vector.shuffle(low, high, order), vector_of(f32, 2 * count))
    else:
        widened = arith.extf(vector_of(f32, 2 * count), utils.bitcast(words, given))
    return arith.mulf(widened, vector.broadcast(vector_of(f32, 2 * count), weight))


def varying_like(arguments: Any, results: Any) -> Any:
    """Under ``shard_map`` a result differs between devices wherever an argument does; a kernel does not say so."""
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(arguments)))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, results)
