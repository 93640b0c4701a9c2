"""``merge_attn_states`` in one pass over memory (Mosaic GPU; no tensor cores, so it also runs on Ada and Blackwell).

A row is one quantisation group, or a power of two of columns: it lies in neighbouring lanes of one warp. A block merges
a tile of tokens of one row of columns, so that lse [H, T] is read in whole sectors; of the tokens left over at the end
of an instance, a tile of the heads of one token, where heads fill tiles, or else a single row.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import configs, rows
from jax_fp8attn.pallas.common.backend import reciprocal, share_of, store, to_e4m3, varying_like
from jax_fp8attn.pallas.common.groups import group_scale, largest_magnitude

from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MergeArrays, MergeProblem
from jax_fp8attn.quantize import E4M3, Fp8Array, Fp8PerGroup, Fp8PerTensor

LN2 = math.log(2.0)
TINY = 2.0**-126  # the smallest normal float32: what lies below may have been flushed to zero
WIDEST_ROW = 128


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """How the work is cut.

    width   columns of a row, a power of two; the quantisation group if there is one
    vector  columns a lane holds
    rows    rows of columns that one block merges: four where a block writes packed scales
    ahead   of these, rows whose loads are issued before the first store
    heads   which tokens are merged by tiles of heads, where these fit: "leftover", "always" or "never"
    """

    width: int
    vector: int
    rows: int = 1
    ahead: int = 1
    heads: str = "leftover"

    def __post_init__(self) -> None:
        lanes = self.width // self.vector
        if self.width & (self.width - 1) or self.vector & (self.vector - 1) or not 2 <= lanes <= 32:
            raise ValueError(f"a row of {self.width} columns does not fit {self.vector} columns a lane: {self}")
        if not 1 <= self.ahead <= self.rows:
            raise ValueError(f"1 to {self.rows} rows can be loaded ahead: {self}")
        if self.heads not in ("leftover", "always", "never"):
            raise ValueError(f"heads is {self.heads!r}; expected 'leftover', 'always' or 'never': {self}")

    @property
    def tokens(self) -> int:
        """Tokens of a tile, or heads of one."""
        return rows.rows_per_step(self.width, self.vector)


# elements of a problem (T * H * D): few columns a lane where latency decides, more where the memory does
TINY_PROBLEM, SMALL_PROBLEM, MIDDLE_PROBLEM, LARGE_PROBLEM = 2**16, 2**19, 2**21, 2**24
FEW_TOKENS = 8
FEWEST_ROWS = 4  # of all tokens: tiles of heads gain nothing


def default_config(problem: MergeProblem) -> MergeConfig:
    """The fastest on an H200 of those measured (docs/performance.md)."""
    elements = problem.tokens * problem.heads * problem.width
    if isinstance(problem.output_quant, Fp8PerGroup):
        return _group_config(problem, problem.output_quant, elements)
    width = min(WIDEST_ROW, problem.width & -problem.width)
    vector = 4 if elements <= TINY_PROBLEM and problem.tokens < FEW_TOKENS else 8
    if elements >= LARGE_PROBLEM and width == WIDEST_ROW and problem.output_quant and problem.dtype.itemsize == 2:
        vector = 16
    heads = "never" if problem.tokens * problem.heads <= FEWEST_ROWS else "leftover"
    return MergeConfig(width, min(vector, width // 2), heads=heads)


def _group_config(problem: MergeProblem, quant: Fp8PerGroup, elements: int) -> MergeConfig:
    """A block takes the 128 columns of a head at once, or the four groups of a packed word."""
    width, packed = quant.group_size, quant.scale_layout == "col_tma_packed"
    small = elements <= SMALL_PROBLEM
    if width == 32:
        vector = 4
    elif width == 64:
        vector = 4 if elements <= MIDDLE_PROBLEM else 8
    elif packed:
        vector = 4 if small else 8 if elements <= 2 * MIDDLE_PROBLEM else 16
    else:
        vector = 8 if elements <= MIDDLE_PROBLEM else 16
    # a block of heads writes neighbouring scales, where those of a token are neighbours
    by_heads = quant.scale_layout == "row" and width == WIDEST_ROW and MIDDLE_PROBLEM < elements <= LARGE_PROBLEM
    vector = min(vector, 16 * 2 // problem.dtype.itemsize)
    if packed:
        rows_a_block = 4
    elif width == WIDEST_ROW:
        rows_a_block = 1
    else:
        rows_a_block = WIDEST_ROW // width
    rows_a_block = min(rows_a_block, problem.heads * problem.width // width) or 1
    registers = problem.states * vector * problem.dtype.itemsize // 4
    few_blocks = packed and 2 * MIDDLE_PROBLEM < elements < LARGE_PROBLEM
    most = 1 if width == WIDEST_ROW and (few_blocks or not packed) else 4 if small else 2
    ahead = min(rows_a_block, most, max(1, 32 // registers))
    return MergeConfig(width, vector, rows_a_block, ahead, heads="always" if by_heads else "leftover")


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
    return build(problem, configs.chosen("merge_attn_states", problem, default_config(problem)))(arrays)


def build(problem: MergeProblem, config: MergeConfig, interpret: Any = None) -> Callable[[MergeArrays], Any]:
    """The op for one problem as a function of its arrays."""
    kernel = _Kernel(problem, config, bool(interpret))
    if kernel.packed and config.rows != 4 and config.rows < kernel.total_rows:
        raise ValueError(f"a packed word holds the scales of four rows: {config}")
    if problem.in_place and kernel.total_rows % config.rows:
        raise ValueError(f"in place, the rows of a block must divide {kernel.total_rows}: {config}")

    @jax.enable_x64(False)
    def op(arrays: MergeArrays) -> Any:
        if not problem.tokens or not problem.heads:
            return kernel.result(arrays, *(jnp.zeros(s.shape, s.dtype) for s in kernel.out_types()))
        return kernel.result(arrays, *varying_like(arrays, kernel.call(arrays, interpret)))

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
    """Where a block works: on one row of columns of ``tokens`` tokens from ``first``, of which the instance's first one
    is ``origin``; or on ``rows`` rows of the token ``first``."""

    instance: Any
    origin: Any
    first: Any
    tokens: int
    layout: Any  # of [lines, width]
    rows: int = 1

    @property
    def lines(self) -> int:
        return self.tokens * self.rows

    def place(self, row: Any) -> tuple[Any, Any]:
        """The tokens and the rows of the lines; a tile of heads starts at ``row``."""
        return (pl.ds(self.first, self.tokens), row) if self.rows == 1 else (self.first, pl.ds(row, self.rows))

    def positions(self) -> Any:
        """[lines]: the places of the tokens in their instance."""
        layout = self.layout.reduce(1)
        if self.rows > 1:
            return plgpu.layout_cast(jnp.full((self.rows,), self.first - self.origin, jnp.int32), layout)
        return plgpu.broadcasted_iota(jnp.int32, (self.tokens,), 0, layout=layout) + (self.first - self.origin)

    def spread(self, x: Any, width: int) -> Any:
        """[lines] to [lines, width]."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (self.lines, width), [0]), self.layout)


def _divided(x: Any, by: int) -> tuple[Any, Any]:
    return lax.div(x, by), lax.rem(x, by)


class _Row(NamedTuple):
    """One row of columns of a tile, or its rows from ``index`` on, as loaded."""

    index: Any
    head: Any
    lses: list[Any]  # of the states, [lines]
    states: list[Any]  # [lines, width]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: MergeProblem
    config: MergeConfig
    interpret: bool = False

    @property
    def quant(self) -> Any:
        return self.problem.output_quant

    @property
    def per_group(self) -> bool:
        return isinstance(self.quant, Fp8PerGroup)

    @property
    def packed(self) -> bool:
        return self.per_group and self.quant.scale_layout == "col_tma_packed"

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
            shape = self.quant.scale_shape(problem.tokens, self.total_rows)
            types.append(jax.ShapeDtypeStruct(shape, jnp.int32 if self.packed else jnp.float32))
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
        options = {} if interpret is None else {"interpret": interpret}

        def fp8attn_merge_sm90(*refs: Any) -> None:
            self._body(len(outputs), *refs)

        def kernel(out_type: list[Any], *operands: Any) -> Any:
            return plgpu.kernel(
                fp8attn_merge_sm90,
                out_type=out_type,
                grid=(problem.instances * self._blocks,),
                grid_names=("block",),
                compiler_params=plgpu.CompilerParams(
                    approx_math=True,
                    # without barriers a warp may overwrite what another one, which holds the same row, has yet to read
                    unsafe_no_auto_barriers=not problem.in_place,
                    reduction_scratch_bytes=0,  # a row is reduced inside a warp
                ),
                **options,
            )(*operands)

        if not problem.in_place:
            return kernel(self.out_types(), *outputs, *lses, *scalars)
        others = [lax.empty(s.shape, s.dtype) for s in self.out_types()[1:]]
        run = pl.run_state(lambda refs: kernel([], refs[0], *outputs[1:], *lses, *scalars, *refs[1:]))
        return list(run((outputs[0], *others)))

    def result(self, arrays: MergeArrays, values: jax.Array, *others: jax.Array) -> Any:
        problem, others = self.problem, list(others)
        out: Any = values.reshape(problem.tokens, problem.heads, problem.width)
        if self.per_group:
            out = Fp8Array(out, others.pop(0), self.quant, problem.tokens)
        elif self.quant is not None:
            scale = arrays.output_scale
            out = Fp8Array(out, scale[0] if problem.instances == 1 else scale, self.quant, problem.tokens)
        return (out, others.pop(0)) if problem.return_lse else out

    @property
    def _heads_fit(self) -> bool:
        """Whether tiles of heads are possible: a word of packed scales is written by one lane."""
        return self.rows_a_head == 1 and not self.packed and self.problem.heads % self.config.tokens == 0

    def _tiles(self) -> tuple[int, int]:
        """Full tiles and single tokens of an instance."""
        tokens = self.problem.tokens // self.problem.instances
        if self.config.heads == "always" and self._heads_fit:
            return 0, tokens
        return divmod(tokens, self.config.tokens)

    @property
    def _row_blocks(self) -> int:
        """Blocks of a full tile."""
        return -(-self.total_rows // self.config.rows)

    @property
    def _single_rows(self) -> int:
        """Rows of a block that merges a single token; 1 if they are not heads."""
        return self.config.tokens if self.config.heads != "never" and self._heads_fit else 1

    @property
    def _single_blocks(self) -> int:
        """Blocks of a single token."""
        return self.total_rows // self._single_rows if self._single_rows > 1 else self._row_blocks

    @property
    def _blocks(self) -> int:
        """Blocks of an instance."""
        full, single = self._tiles()
        return full * self._row_blocks + single * self._single_blocks

    def _refs(self, arrays: int, refs: tuple[Any, ...]) -> _Refs:
        problem = self.problem
        outputs, lses, rest = refs[:arrays], refs[arrays : 2 * arrays], list(refs[2 * arrays :])
        pick = (lambda some: lambda n: some[0].at[n]) if problem.stacked else (lambda some: lambda n: some[n])
        count = rest.pop(0) if problem.context_count else None
        scale = rest.pop(0) if isinstance(self.quant, Fp8PerTensor) else None
        out = outputs[0] if problem.in_place else rest.pop(0)
        out_scales = rest.pop(0) if self.per_group else None
        return _Refs(pick(outputs), pick(lses), count, scale, out, out_scales, rest.pop(0) if rest else None)

    def _body(self, arrays: int, *refs: Any) -> None:
        problem, config = self.problem, self.config
        gmem = self._refs(arrays, refs)
        instance, block = _divided(lax.axis_index("block"), self._blocks)
        origin = instance * (problem.tokens // problem.instances)
        full, single = self._tiles()
        first_single = full * self._row_blocks

        def merge_full() -> None:
            tile, row_block = _divided(block, self._row_blocks)
            layout = rows.row_layout(config.width, config.vector)
            work = _Tile(instance, origin, origin + tile * config.tokens, config.tokens, layout)
            self._merge_tile(gmem, work, row_block, last=None if single else tile == full - 1)

        def merge_single() -> None:
            token, row_block = _divided(block - first_single, self._single_blocks)
            layout = rows.single_row_layout if self._single_rows == 1 else rows.row_layout
            layout = layout(config.width, config.vector)
            work = _Tile(instance, origin, origin + full * config.tokens + token, 1, layout, self._single_rows)
            self._merge_tile(gmem, work, row_block, last=token == single - 1)

        if full and single:
            pl.when(block < first_single)(merge_full)
            pl.when(block >= first_single)(merge_single)
        else:
            merge_full() if full else merge_single()

    def _merge_tile(self, gmem: _Refs, tile: _Tile, row_block: Any, last: Any) -> None:
        """What one block does. Those of the ``last`` tokens of the last instance zero the padding of the scales."""
        if tile.rows > 1:
            row = self._load_row(gmem, tile, row_block * tile.rows)
            self._merge_row(gmem, tile, row, self._inverse(gmem, tile))
        else:
            self._merge_rows(gmem, tile, row_block)
        if last is not None and self.per_group and self.quant.scale_layout in ("col_tma", "col_tma_packed"):
            there = last & (tile.instance == self.problem.instances - 1)
            pl.when(there)(lambda: self._zero_padding(gmem, tile, row_block))

    def _inverse(self, gmem: _Refs, tile: _Tile) -> Any:
        return None if gmem.scale is None else 1.0 / gmem.scale[tile.instance]

    def _merge_rows(self, gmem: _Refs, tile: _Tile, row_block: Any) -> None:
        """Merges the rows of columns of one block; packs their scales into a word a token if the layout asks for it."""
        inverse, word = None, None
        for start in range(0, self.config.rows, self.config.ahead):
            places = range(start, min(start + self.config.ahead, self.config.rows))
            loaded = [self._load_row(gmem, tile, self._row(row_block, k)) for k in places]
            inverse = inverse if start else self._inverse(gmem, tile)
            for k, row in zip(places, loaded, strict=True):
                byte = self._merge_row(gmem, tile, row, inverse)
                if self.packed:
                    there = (row_block * self.config.rows + k < self.total_rows).astype(jnp.int32)
                    byte = byte * (there << (8 * k))
                    word = byte if word is None else word | byte
        if self.packed:
            store(gmem.out_scales.at[row_block, pl.ds(tile.first, tile.tokens)], word)

    def _row(self, row_block: Any, k: int) -> Any:
        """The k-th row of a block; behind the last row the last one once more, which writes the same bytes again."""
        row = row_block * self.config.rows + k
        return row if self.total_rows % self.config.rows == 0 else jnp.minimum(row, self.total_rows - 1)

    def _load_row(self, gmem: _Refs, tile: _Tile, row: Any) -> _Row:
        head = lax.div(row, self.rows_a_head)
        lses, states = [], []
        for n in range(self.problem.states):
            lses.append(self._load_lse(gmem.lses(n), tile, head))
            states.append(plgpu.load(gmem.outputs(n).at[tile.place(row)], layout=tile.layout, optimized=False))
        return _Row(row, head, lses, states)

    def _merge_row(self, gmem: _Refs, tile: _Tile, row: _Row, inverse: Any) -> Any:
        """Merges [lines, width]; returns the UE8M0 bytes [lines] of the groups, if there are any."""
        weights, absent, lse = self._weights(gmem, tile, row.lses)
        parts = [
            share_of(state, weight, absent, TINY, tile.layout, self.interpret)
            for weight, state in zip(weights, row.states, strict=True)
        ]
        out = functools.reduce(jnp.add, parts)
        if self.problem.return_lse:
            first = lax.rem(row.index, self.rows_a_head) == 0
            pl.when(first)(lambda: self._store_lse(gmem, tile, row.head, lse))
        target = gmem.out.at[tile.place(row.index)]
        if self.per_group:
            return self._store_groups(gmem, tile, row.index, target, out)
        if inverse is not None:
            out = to_e4m3(out * inverse, self.interpret)
        store(target, out.astype(target.dtype))
        return None

    def _weights(self, gmem: _Refs, tile: _Tile, lses: list[Any]) -> tuple[list[Any], Any, Any]:
        """The share of each state, what a state without a share contributes, the merged lse: [lines] each."""
        unit = LN2 if self.problem.lse_base == "2" else 1.0
        lses = [jnp.where(lse == jnp.inf, -jnp.inf, lse) for lse in lses]  # an empty row of some backends
        top = functools.reduce(jnp.maximum, lses)
        empty = top == -jnp.inf
        anchor = jnp.where(empty, 0.0, top)
        terms = [jnp.exp((lse - anchor) * unit) for lse in lses]
        total = functools.reduce(jnp.add, terms)
        some = jnp.where(empty, 1.0, total)  # from 1 to the number of states, or NaN
        inverse = jnp.where(empty, 0.0, reciprocal(some, tile.layout.reduce(1), self.interpret))
        weights = [term * inverse for term in terms]
        # -0.0 + x is x for every x, -0.0 included
        absent = jnp.where(empty, 0.0, -0.0)
        lse = jnp.where(empty, -jnp.inf, jnp.log(some) * (1.0 / unit) + anchor)
        if gmem.count is not None:
            alone = tile.positions() >= gmem.count[tile.instance]
            weights = [jnp.where(alone, float(n == len(weights) - 1), weight) for n, weight in enumerate(weights)]
            absent = jnp.where(alone, -0.0, absent)
            lse = jnp.where(alone, lses[-1], lse)
        return weights, absent, lse

    def _load_lse(self, ref: Any, tile: _Tile, head: Any) -> Any:
        return plgpu.load(ref.at[self._lse_place(tile, head)], layout=tile.layout.reduce(1), optimized=False)

    def _store_lse(self, gmem: _Refs, tile: _Tile, head: Any, lse: Any) -> None:
        store(gmem.out_lse.at[self._lse_place(tile, head)], lse)

    def _lse_place(self, tile: _Tile, head: Any) -> tuple[Any, Any]:
        place = tile.place(head)
        return place[::-1] if self.problem.lse_layout == "HT" else place

    def _store_groups(self, gmem: _Refs, tile: _Tile, row: Any, target: Any, out: Any) -> Any:
        """One quantisation group a row."""
        scale, inverse, byte = group_scale(largest_magnitude(out), self.quant)
        out = out * tile.spread(inverse, self.config.width)
        store(target, to_e4m3(out, self.interpret))
        if not self.packed:
            place = tile.place(row)
            store(gmem.out_scales.at[place if self.quant.scale_layout == "row" else place[::-1]], scale)
        return byte

    def _zero_padding(self, gmem: _Refs, tile: _Tile, row_block: Any) -> None:
        columns = range(self.problem.tokens, gmem.out_scales.shape[1])
        if tile.rows > 1:
            zeros = plgpu.layout_cast(jnp.zeros((tile.rows,), jnp.float32), tile.layout.reduce(1))
            for column in columns:
                store(gmem.out_scales.at[pl.ds(row_block * tile.rows, tile.rows), column], zeros)
            return
        lines = [row_block] if self.packed else [self._row(row_block, k) for k in range(self.config.rows)]
        for line, column in itertools.product(lines, columns):
            gmem.out_scales[line, column] = jnp.zeros((), gmem.out_scales.dtype)
