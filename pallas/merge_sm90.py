"""``merge_attn_states`` in one pass over memory (Mosaic GPU; no tensor cores, so it also runs on Ada and Blackwell).

A row is one quantisation group, or a power of two of columns: it lies in neighbouring lanes of one warp. A block merges
a tile of tokens of one row of columns, so that lse [H, T] is read in whole sectors; the tokens left over at the end of
an instance are merged one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import rows
from jax_fp8attn.pallas.common.backend import store

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MergeArrays, MergeProblem
from jax_fp8attn.quantize import E4M3, FP8_MAX, Fp8Array, Fp8PerGroup, Fp8PerTensor

LN2 = math.log(2.0)
SMALLEST_BYTE = 94  # 2^-33, the power of two above quantize.SCALE_FLOOR
WIDEST_ROW = 128


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """How the work is cut.

    width   columns of a row, a power of two; the quantisation group if there is one
    vector  columns a lane holds
    rows    rows of columns that one block merges after each other: four where a block writes packed scales
    """

    width: int
    vector: int
    rows: int = 1

    def __post_init__(self) -> None:
        lanes = self.width // self.vector
        if self.width & (self.width - 1) or self.vector & (self.vector - 1) or not 2 <= lanes <= 32:
            raise ValueError(f"a row of {self.width} columns does not fit {self.vector} columns a lane: {self}")

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return rows.rows_per_step(self.width, self.vector)


def default_config(problem: MergeProblem) -> MergeConfig:
    """Measured on an H200: 16 tokens of 128 columns, 16 columns a lane (docs/performance.md)."""
    quant = problem.output_quant
    width = quant.group_size if isinstance(quant, Fp8PerGroup) else min(WIDEST_ROW, problem.width & -problem.width)
    packed = isinstance(quant, Fp8PerGroup) and quant.scale_layout == "col_tma_packed"
    return MergeConfig(width, min(16, width // 2), 4 if packed else 1)


def supports(problem: MergeProblem, device: Device) -> tuple[str, ...]:
    reasons = []
    if (device.compute_capability or (0, 0)) < (8, 9):
        reasons.append(f"needs compute capability 8.9 or newer, the device has {device.compute_capability}")
    if problem.width % 8 or not 8 <= problem.width <= 512:
        reasons.append(f"head width is {problem.width}; needs a multiple of 8 from 8 to 512")
    if isinstance(problem.output_quant, Fp8PerTensor) and problem.output_quant.dtype != E4M3:
        reasons.append(f"output is {problem.output_quant.dtype}; writes float8_e4m3fn only")
    return tuple(reasons)


def run(problem: MergeProblem, arrays: MergeArrays) -> Any:
    return build(problem, default_config(problem))(arrays)


def build(problem: MergeProblem, config: MergeConfig, interpret: Any = None) -> Callable[[MergeArrays], Any]:
    """The op for one problem as a function of its arrays."""
    kernel = _Kernel(problem, config)

    def op(arrays: MergeArrays) -> Any:
        if not problem.tokens or not problem.heads:
            return kernel.result(arrays, *(jnp.zeros(s.shape, s.dtype) for s in kernel.out_types()))
        return kernel.result(arrays, *kernel.call(arrays, interpret))

    return op


@dataclasses.dataclass(frozen=True)
class _Refs:
    """Global memory, by role."""

    outputs: Callable[[int], Any]  # state -> [T, rows, width]
    lses: Callable[[int], Any]  # state -> [H, T] or [T, H]
    count: Any  # int32 [instances] or None
    scale: Any  # float32 [instances] or None
    out: Any
    out_scales: Any
    out_lse: Any


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Where a block works: ``tokens`` tokens from ``first``, of which the instance's first one is ``origin``."""

    instance: Any
    origin: Any
    first: Any
    tokens: int
    layout: Any  # of [tokens, width]

    @property
    def span(self) -> Any:
        return pl.ds(self.first, self.tokens)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: MergeProblem
    config: MergeConfig

    @property
    def quant(self) -> Any:
        return self.problem.output_quant

    @property
    def per_group(self) -> bool:
        return isinstance(self.quant, Fp8PerGroup)

    @property
    def total_rows(self) -> int:
        """Rows of columns of one token."""
        return self.problem.heads * self.problem.width // self.config.width

    @property
    def rows_a_head(self) -> int:
        return self.problem.width // self.config.width

    def out_types(self) -> list[jax.ShapeDtypeStruct]:
        problem = self.problem
        dtype = problem.out_dtype if self.quant is None else E4M3
        types = [jax.ShapeDtypeStruct((problem.tokens, self.total_rows, self.config.width), dtype)]
        if self.per_group:
            packed = self.quant.scale_layout == "col_tma_packed"
            shape = self.quant.scale_shape(problem.tokens, self.total_rows)
            types.append(jax.ShapeDtypeStruct(shape, jnp.int32 if packed else jnp.float32))
        if problem.return_lse:
            shape = (problem.heads, problem.tokens)
            types.append(jax.ShapeDtypeStruct(shape if problem.lse_layout == "HT" else shape[::-1], jnp.float32))
        return types

    def call(self, arrays: MergeArrays, interpret: Any) -> list[jax.Array]:
        problem, config = self.problem, self.config
        view = (problem.tokens, self.total_rows, config.width)
        if problem.stacked:
            outputs, lses = [arrays.outputs.reshape(problem.states, *view)], [arrays.lses]
        else:
            outputs, lses = [o.reshape(view) for o in arrays.outputs], list(arrays.lses)
        scalars = [x for x in (arrays.context_count, arrays.output_scale) if x is not None]
        blocks = problem.instances * sum(self._tiles()) * self._row_blocks
        options = {} if interpret is None else {"interpret": interpret}

        def fp8attn_merge_sm90(*refs: Any) -> None:
            self._body(len(outputs), *refs)

        return plgpu.kernel(
            fp8attn_merge_sm90,
            out_type=self.out_types(),
            grid=(blocks,),
            grid_names=("block",),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **options,
        )(*outputs, *lses, *scalars)

    def result(self, arrays: MergeArrays, values: jax.Array, *others: jax.Array) -> Any:
        problem, others = self.problem, list(others)
        out: Any = values.reshape(problem.tokens, problem.heads, problem.width)
        if self.per_group:
            out = Fp8Array(out, others.pop(0), self.quant, problem.tokens)
        elif self.quant is not None:
            scale = arrays.output_scale
            out = Fp8Array(out, scale[0] if problem.instances == 1 else scale, self.quant, problem.tokens)
        lse = others.pop(0) if problem.return_lse else None
        return (out, lse) if problem.return_lse else out

    def _tiles(self) -> tuple[int, int]:
        """Full tiles and single tokens of an instance."""
        return divmod(self.problem.tokens // self.problem.instances, self.config.tokens)

    @property
    def _row_blocks(self) -> int:
        return -(-self.total_rows // self.config.rows)

    def _refs(self, arrays: int, refs: tuple[Any, ...]) -> _Refs:
        problem = self.problem
        outputs, lses, rest = refs[:arrays], refs[arrays : 2 * arrays], list(refs[2 * arrays :])
        pick = (lambda some: lambda n: some[0].at[n]) if problem.stacked else (lambda some: lambda n: some[n])
        count = rest.pop(0) if problem.context_count else None
        scale = rest.pop(0) if isinstance(self.quant, Fp8PerTensor) else None
        out = rest.pop(0)
        out_scales = rest.pop(0) if self.per_group else None
        return _Refs(pick(outputs), pick(lses), count, scale, out, out_scales, rest.pop(0) if rest else None)

    def _body(self, arrays: int, *refs: Any) -> None:
        problem, config = self.problem, self.config
        gmem = self._refs(arrays, refs)
        block = lax.axis_index("block")
        row_block, rest = lax.rem(block, self._row_blocks), lax.div(block, self._row_blocks)
        full, single = self._tiles()
        instance, tile = lax.div(rest, full + single), lax.rem(rest, full + single)
        origin = instance * (problem.tokens // problem.instances)
        if full:
            layout = rows.row_layout(config.width, config.vector)
            work = _Tile(instance, origin, origin + tile * config.tokens, config.tokens, layout)
            pl.when(tile < full)(lambda: self._merge_tile(gmem, work, row_block))
        if single:
            layout = rows.single_row_layout(config.width, config.vector)
            alone = _Tile(instance, origin, origin + full * (config.tokens - 1) + tile, 1, layout)
            pl.when(tile >= full)(lambda: self._merge_tile(gmem, alone, row_block))
        if self.per_group and self.quant.scale_layout in ("col_tma", "col_tma_packed"):
            pl.when(rest == problem.instances * (full + single) - 1)(lambda: self._zero_padding(gmem, row_block))

    def _merge_tile(self, gmem: _Refs, tile: _Tile, row_block: Any) -> None:
        config = self.config
        word = jnp.zeros((tile.tokens,), jnp.int32) if config.rows > 1 else None
        whole, left = divmod(self.total_rows, config.rows)

        def some_rows(count: int) -> None:
            packed = word
            for k in range(count):
                byte = self._merge_row(gmem, tile, row_block * config.rows + k)
                if packed is not None:
                    packed = byte if k == 0 else packed | (byte << (8 * k))
            if packed is not None:
                store(gmem.out_scales.at[row_block, tile.span], packed)

        if not left:
            some_rows(config.rows)
        else:
            pl.when(row_block < whole)(lambda: some_rows(config.rows))
            pl.when(row_block == whole)(lambda: some_rows(left))

    def _merge_row(self, gmem: _Refs, tile: _Tile, row: Any) -> Any:
        """Merges [tokens, width]; returns the UE8M0 bytes where the caller packs them."""
        problem = self.problem
        head = lax.div(row, self.rows_a_head)
        weights, lse = self._weights(gmem, tile, head)
        out = None
        for n, weight in enumerate(weights):
            state = plgpu.load(gmem.outputs(n).at[tile.span, row], layout=tile.layout, optimized=False)
            part = _weighted(weight, state.astype(jnp.float32))
            out = part if out is None else out + part
        if problem.return_lse:
            self._store_lse(gmem, tile, head, lse)
        target = gmem.out.at[tile.span, row]
        if self.per_group:
            return self._store_groups(gmem, tile, row, target, out)
        if gmem.scale is not None:
            out = out * (1.0 / gmem.scale[tile.instance])
        store(target, out.astype(target.dtype))
        return None

    def _weights(self, gmem: _Refs, tile: _Tile, head: Any) -> tuple[list[Any], Any]:
        """The share of each state, [tokens] each, and the merged natural-log lse."""
        problem = self.problem
        lses = [self._load_lse(gmem.lses(n), tile, head) for n in range(problem.states)]
        top = functools.reduce(jnp.maximum, lses)
        empty = top == -jnp.inf
        anchor = jnp.where(empty, 0.0, top)
        terms = [jnp.exp(lse - anchor) for lse in lses]
        total = functools.reduce(jnp.add, terms)
        inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
        weights = [term * inverse for term in terms]
        lse = jnp.where(empty, -jnp.inf, anchor + jnp.log(jnp.where(empty, 1.0, total)))
        if gmem.count is not None:
            token = plgpu.broadcasted_iota(jnp.int32, (tile.tokens,), 0, layout=tile.layout.reduce(1))
            alone = token + (tile.first - tile.origin) >= gmem.count[tile.instance]
            weights = [jnp.where(alone, float(n == len(weights) - 1), weight) for n, weight in enumerate(weights)]
            lse = jnp.where(alone, lses[-1], lse)
        return weights, lse

    def _load_lse(self, ref: Any, tile: _Tile, head: Any) -> Any:
        place = (head, tile.span) if self.problem.lse_layout == "HT" else (tile.span, head)
        lse = plgpu.load(ref.at[place], layout=tile.layout.reduce(1), optimized=False)
        lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)
        return lse * LN2 if self.problem.lse_base == "2" else lse

    def _store_lse(self, gmem: _Refs, tile: _Tile, head: Any, lse: Any) -> None:
        place = (head, tile.span) if self.problem.lse_layout == "HT" else (tile.span, head)
        store(gmem.out_lse.at[place], lse / LN2 if self.problem.lse_base == "2" else lse)

    def _store_groups(self, gmem: _Refs, tile: _Tile, row: Any, target: Any, out: Any) -> Any:
        """One quantisation group a row. Only finite elements count for its scale."""
        magnitude = jnp.abs(out)
        amax = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, 0.0), axis=1)
        amax = jnp.maximum(amax, self.quant.eps)
        byte = None
        if self.quant.scale_format == "ue8m0":
            byte = _ue8m0_byte_of_amax(amax)
            scale, inverse = _power_of_two(byte), _power_of_two(254 - byte)
        else:
            limit = FP8_MAX[E4M3]
            scale, inverse = amax / limit, limit / amax
        out = out * lax.broadcast_in_dim(inverse, out.shape, [0])
        store(target, out.astype(E4M3))
        if self.quant.scale_layout == "row":
            store(gmem.out_scales.at[tile.span, row], scale)
        elif self.quant.scale_layout != "col_tma_packed":
            store(gmem.out_scales.at[row, tile.span], scale)
        return byte

    def _zero_padding(self, gmem: _Refs, row_block: Any) -> None:
        columns = gmem.out_scales.shape[1]
        for column in range(self.problem.tokens, columns):
            gmem.out_scales[row_block, column] = jnp.zeros((), gmem.out_scales.dtype)


def _weighted(weight: Any, state: Any) -> Any:
    """weight [tokens] times state [tokens, width]; a weight of 0 contributes exactly 0."""
    weight = lax.broadcast_in_dim(weight, state.shape, [0])
    return jnp.where(weight == 0, 0.0, state * weight)


def _ue8m0_byte_of_amax(amax: Any) -> Any:
    """Biased exponent of the smallest power of two >= amax / 448 = amax / (1.75 * 2^8), from the bits of amax."""
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    return jnp.maximum(byte, SMALLEST_BYTE)


def _power_of_two(byte: Any) -> Any:
    return lax.bitcast_convert_type(byte << 23, jnp.float32)
