"""``gdn_prefill`` on Hopper, between the two passes over segments: the state that each segment starts from.

A block of threads takes 32 columns of V of one head of one sequence through its segments, Z = M Z + N, with the state
in registers in float32. M and the state go into the product in two halves of bfloat16, three products: what is lost is
2^-16 of them, where a chunk loses 2^-9 of its new values.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import hopper
from jax_fp8attn.pallas.common.backend import store, varying_like
from jax_fp8attn.pallas.common.gdn_segments import Segments
from jax_fp8attn.pallas.common.hopper import ROWS

WIDTH, COLUMNS, SLOTS = 128, 32, 2
BF16 = jnp.bfloat16
HALVES = (pl.ds(0, ROWS), pl.ds(ROWS, ROWS))  # of the keys


def fold(
    moved: jax.Array, segments: Segments, initial: jax.Array | None, forgets: jax.Array, interpret: Any = None
) -> jax.Array:
    """float32 [R, H, K, V]: what each segment starts from. ``moved``: M and N of each, as ``transitions`` leaves them.
    ``initial``: float32 [B, H, K, V]; None: zeros. ``forgets``, int32 [R, H]: from 0 on M is 0, and not written."""
    rows, heads = moved.shape[:2]
    kernel = _Kernel(segments.first.shape[0], heads, initial is not None, interpret)
    table = jnp.stack([segments.first, segments.count], axis=1)
    result = kernel.call(rows, table, forgets, moved, *([] if initial is None else [initial]))
    return varying_like((moved, table), result)


class _Refs(NamedTuple):
    table: Any  # int32 [B, 2]: first segment, and how many
    forgets: Any  # int32 [R, H]
    moved: Any  # float32 [R, H, 128, 256]
    initial: Any  # float32 [B, H, 128, 128] or None
    out: Any  # float32 [R, H, 128, 128]
    m: Any  # float32 [SLOTS, 128, 128] in shared memory
    n: Any  # float32 [SLOTS, 128, COLUMNS]
    high: Any  # bf16 [SLOTS, 128, COLUMNS]: the state
    low: Any
    there: Any


class _Place(NamedTuple):
    """What a block computes."""

    sequence: Any
    head: Any
    columns: Any
    first: Any
    count: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    sequences: int
    heads: int
    has_initial: bool
    interpret: Any

    def call(self, rows: int, *operands: jax.Array) -> jax.Array:
        def fp8attn_gdn_fold_sm90(*refs: Any) -> None:
            given = list(refs)
            if not self.has_initial:
                given.insert(3, None)
            _Fold(self, _Refs(*given)).run()

        state = hopper.tiles((SLOTS, WIDTH, COLUMNS), BF16, 2 * COLUMNS)
        return plgpu.kernel(
            fp8attn_gdn_fold_sm90,
            out_type=jax.ShapeDtypeStruct((rows, self.heads, WIDTH, WIDTH), jnp.float32),
            grid=(self.sequences * self.heads * (WIDTH // COLUMNS),),
            grid_names=("block",),
            scratch_types=[
                hopper.tiles((SLOTS, WIDTH, WIDTH), jnp.float32, 128),
                hopper.tiles((SLOTS, WIDTH, COLUMNS), jnp.float32, 128),
                state,
                state,
                plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            ],
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            **({} if self.interpret is None else {"interpret": self.interpret}),
        )(*operands)

    def place(self, table: Any) -> _Place:
        blocks = WIDTH // COLUMNS
        number, block = lax.div(lax.axis_index("block"), blocks), lax.rem(lax.axis_index("block"), blocks)
        sequence, head = lax.div(number, self.heads), lax.rem(number, self.heads)
        columns = pl.ds(pl.multiple_of(block * COLUMNS, COLUMNS), COLUMNS)
        return _Place(sequence, head, columns, table[sequence, 0], table[sequence, 1])


@dataclasses.dataclass(frozen=True)
class _Fold:
    kernel: _Kernel
    refs: _Refs

    def run(self) -> None:
        place = self.kernel.place(self.refs.table)
        pl.when(place.count > 2)(lambda: self._load(place, jnp.int32(1)))
        self._store(place, jnp.int32(0), self._initial(place))

        @pl.when(place.count > 1)
        def fold() -> None:
            """The first segment started from its own state: N is what it ends with."""
            ends = self.refs.moved.at[place.first, place.head]
            first = [
                plgpu.load(ends.at[keys, self._behind(place)], layout=hopper.ACCUMULATOR, optimized=False)
                for keys in HALVES
            ]
            state = lax.fori_loop(1, place.count - 1, lambda number, state: self._step(place, number, state), first)
            self._store(place, place.count - 1, state)

    def _behind(self, place: _Place) -> Any:
        """N is behind M."""
        return pl.ds(pl.multiple_of(place.columns.start + WIDTH, COLUMNS), COLUMNS)

    def _initial(self, place: _Place) -> list[Any]:
        if self.refs.initial is None:
            return [plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), jnp.float32), hopper.ACCUMULATOR)] * 2
        given = self.refs.initial.at[place.sequence, place.head]
        return [
            plgpu.load(given.at[keys, place.columns], layout=hopper.ACCUMULATOR, optimized=False) for keys in HALVES
        ]

    def _store(self, place: _Place, number: Any, state: list[Any]) -> None:
        target = self.refs.out.at[place.first + number, place.head]
        for keys, part in zip(HALVES, state, strict=True):
            store(target.at[keys, place.columns], part)

    def _load(self, place: _Place, number: Any) -> None:
        refs, slot = self.refs, lax.rem(number, SLOTS)
        source, there = refs.moved.at[place.first + number, place.head], refs.there.at[slot]
        plgpu.copy_gmem_to_smem(source.at[:, pl.ds(0, WIDTH)], refs.m.at[slot], there)
        plgpu.copy_gmem_to_smem(source.at[:, self._behind(place)], refs.n.at[slot], there)

    def _step(self, place: _Place, number: Any, state: list[Any]) -> list[Any]:
        """Behind the fence all warps are done with the segment before, whose slot is filled again."""
        refs, slot = self.refs, lax.rem(number, SLOTS)
        for keys, part in zip(HALVES, state, strict=True):
            high = part.astype(BF16)
            refs.high.at[slot, keys][...] = high
            refs.low.at[slot, keys][...] = (part - high.astype(jnp.float32)).astype(BF16)
        plgpu.commit_smem()
        pl.when(number + 1 < place.count - 1)(lambda: self._load(place, number + 1))
        self._store(place, number, state)
        plgpu.barrier_wait(refs.there.at[slot])
        forgets = refs.forgets[place.first + number, place.head]
        return lax.cond(
            forgets < 0,
            lambda: [self._moved(slot, keys) for keys in HALVES],
            lambda: [self._read(refs.n.at[slot, keys]) for keys in HALVES],
        )

    def _read(self, ref: Any) -> Any:
        return ref[...] if self.kernel.interpret is not None else plgpu.load(ref, layout=hopper.ACCUMULATOR)

    def _moved(self, slot: Any, keys: Any) -> Any:
        """Rows of M Z + N."""
        refs, interpret = self.refs, self.kernel.interpret
        m, n = self._read(refs.m.at[slot, keys]), self._read(refs.n.at[slot, keys])
        m_high = m.astype(BF16)
        m_low = (m - m_high.astype(jnp.float32)).astype(BF16)
        high, low = refs.high.at[slot], refs.low.at[slot]
        pairs = ((m_high, high), (m_high, low), (m_low, high))
        if interpret is None:
            swizzle = (2 * COLUMNS,) * 2
            product = hopper.start((ROWS, COLUMNS), [(a, b, swizzle) for a, b in pairs], n, turned="b")
            return hopper.settled(product, 0)
        wide = lambda x: x[...].astype(jnp.float32)
        products = [jnp.dot(wide(a), wide(b)) for a, b in pairs]
        plgpu.commit_smem()
        return n + sum(products)
