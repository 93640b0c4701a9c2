"""``gdn_prefill`` on Hopper, second kernel: the recurrence over the chunks of a sequence, and the outputs.

Columns of V are independent in it: a block of threads takes ``columns`` of them of one head of one sequence, from its
first chunk to its last. The state stays in registers, in float32. What one chunk waits for of the one before, new
values and the state after them, two products that wait for each other, is the work of the chain: a warpgroup that does
nothing else. Another one follows it with the outputs, from the state and the new values in bf16 in shared memory. Each
loads its own operands, so that nobody but itself frees them.

    Y = U - W bf16(Z);   O = rows[0] (.) (q bf16(Z)) + P bf16(Y);   Z = total Z + k^T bf16(rows[1] (.) Y)

Of long sequences segments can run side by side: ``transitions`` leads to the state that each starts from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax_fp8attn.pallas.common import configs, hopper
from jax_fp8attn.pallas.common.backend import store, varying_like
from jax_fp8attn.pallas.common.gdn_chunks import CHUNK, Chunks, Prepared
from jax_fp8attn.pallas.common.gdn_segments import Segments, max_segments
from jax_fp8attn.pallas.common.hopper import ROWS, spread

from jax_fp8attn.problems import GdnProblem

WIDTH = 128  # of keys and of values
BF16 = jnp.bfloat16
COLUMN = hopper.ACCUMULATOR.reduce(0)
FORMS = ("registers", "shared")
HALVES = (pl.ds(0, ROWS), pl.ds(ROWS, ROWS))  # of the keys
MEMORY = 232448 - 1024  # bytes of shared memory, barriers apart


@dataclasses.dataclass(frozen=True)
class RecurrenceConfig:
    """How a block works.

    columns        of V
    form           where products find what the chain hands on. "registers": the state is held transposed, 64 columns of
                   it, and it and the new values are operands as they come. "shared": the state is held as it is, and
                   both go through shared memory
    stages         chunks of the chain's operands in shared memory
    output_stages  chunks of the others
    """

    columns: int = 64
    form: str = "registers"
    stages: int = 3
    output_stages: int = 2

    def __post_init__(self) -> None:
        if self.columns not in (32, 64, 128) or self.form not in FORMS:
            raise ValueError(f"columns must be 32, 64 or 128, form one of {FORMS}: {self}")
        if self.form == "registers" and self.columns != ROWS:
            raise ValueError(f"in registers a warpgroup has 64 columns: {self}")
        if min(self.stages, self.output_stages) < 2:
            raise ValueError(f"two stages at least are needed: {self}")
        if self.shared_memory(2) > MEMORY:
            raise ValueError(f"{self.shared_memory(2)} bytes of shared memory, a block can have {MEMORY}: {self}")

    @property
    def turned(self) -> bool:
        """The state is held transposed."""
        return self.form == "registers"

    def shared_memory(self, size: int) -> int:
        """Bytes of a block with outputs of ``size`` bytes, barriers apart."""
        chain = 2 * CHUNK * (2 * WIDTH + self.columns) + 4 * CHUNK
        outputs = 2 * CHUNK * (WIDTH + CHUNK) + 4 * CHUNK
        handed = 2 * self.columns * (WIDTH + CHUNK * (1 if self.turned else 2))
        return self.stages * chain + self.output_stages * outputs + handed + CHUNK * self.columns * size

    @property
    def memory_of_transition(self) -> int:
        """Bytes of a block without outputs."""
        chain = 2 * CHUNK * (2 * WIDTH + self.columns) + 4 * CHUNK
        return self.stages * chain + (0 if self.turned else 2 * self.columns * (WIDTH + CHUNK))

    @property
    def time(self) -> float:
        """Microseconds of a chunk: measured on an H200 with one block on a multiprocessor, 8 heads. One that is not in
        the table takes what one without spare stages does."""
        return TIMES.get((self.columns, self.form, self.stages, self.output_stages), 0.0) or SLOWEST[self.columns]


TIMES = {
    (32, "shared", 4, 2): 0.84, (32, "shared", 3, 3): 0.90, (64, "registers", 3, 3): 1.01,
    (64, "registers", 3, 2): 1.02,
}  # fmt: skip
SLOWEST = {32: 1.0, 64: 1.19, 128: 1.73}
FORMS_TRIED = (
    RecurrenceConfig(32, "shared", 4, 2), RecurrenceConfig(64, "registers", 3, 3),
    RecurrenceConfig(64, "registers", 3, 2), RecurrenceConfig(128, "shared", 2, 2),
)  # fmt: skip


def candidates(problem: GdnProblem) -> tuple[RecurrenceConfig, ...]:
    """Those whose outputs fit."""
    size = jnp.dtype(problem.out_dtype).itemsize
    return tuple(config for config in FORMS_TRIED if config.shared_memory(size) <= MEMORY)


LAUNCH = 11.0  # microseconds of a kernel beside its chunks, measured


def pass_time(config: RecurrenceConfig, columns: int, chunks: int, memory: int) -> float:
    """Microseconds that all blocks of ``columns`` columns take, ``chunks`` each, with so many bytes of shared memory:
    in as many waves as they need. A chunk is taken to last as long with two blocks on a multiprocessor."""
    resident = configs.MULTIPROCESSORS * max(1, MEMORY // memory)
    return LAUNCH + math.ceil(columns / config.columns / resident) * chunks * config.time


def default_config(problem: GdnProblem) -> RecurrenceConfig:
    """The fastest by ``pass_time`` for sequences of equal length."""
    size, columns = jnp.dtype(problem.out_dtype).itemsize, problem.heads * problem.sequences * WIDTH
    return min(candidates(problem), key=lambda c: pass_time(c, columns, 1, c.shared_memory(size)))


class States(NamedTuple):
    """Where sequences start from and end. Rows are counted from 0; what is no row starts from zero and is not written.

    In place, final states go to rows ``write`` of ``given``, with segments to those of ``pool``.
    """

    given: jax.Array | None = None  # [rows, *state_shape]; of segments float32 [R, H, K, V], a row each
    read: jax.Array | None = None  # int32 [B]
    write: jax.Array | None = None  # int32 [B]
    pool: jax.Array | None = None  # [rows, *state_shape]


Recurrence = Callable[..., tuple[jax.Array, ...]]


def build(
    problem: GdnProblem, config: RecurrenceConfig, in_place: bool = False, interpret: Any = None, segment: int = 0
) -> Recurrence:
    """(chunks, prepared, start, length, states[, segments]) to o, final states or the written rows, checkpoints: what
    the problem asks for of them. Of a transition to M [B, H, K, K] and N [B, H, K, V], which need neither q nor p.
    ``segment``: chunks of a segment; 0: every sequence is one."""
    kernel = _Kernel(problem, config, in_place, interpret, segment)
    size = config.shared_memory(jnp.dtype(problem.out_dtype).itemsize)
    if size > MEMORY:
        raise ValueError(f"{size} bytes of shared memory, a block can have {MEMORY}: {config}")

    @jax.enable_x64(False)
    def op(
        chunks: Chunks,
        prepared: Prepared,
        start: jax.Array,
        length: jax.Array,
        states: States,
        segments: Segments | None = None,
    ) -> tuple[jax.Array, ...]:
        if not problem.sequences or not problem.heads or not problem.tokens:
            raise ValueError(f"nothing to compute: {problem}")
        table = _table(problem, chunks, start, length, states)
        if segments is not None:
            table = _table_of_segments(table, segments)
        elif problem.sequences > 1:
            table = table[jnp.argsort(-chunks.count)]
        results = kernel.call(table, chunks, prepared, states)
        results = varying_like((prepared, table), results)
        if problem.transition:
            return results[0][..., :WIDTH], results[0][..., WIDTH:]
        return tuple(results)

    return op


def transitions(
    problem: GdnProblem,
    config: RecurrenceConfig,
    segment: int,
    chunks: Chunks,
    prepared: Prepared,
    segments: Segments,
    initial: jax.Array | None,
    forgets: jax.Array,
    interpret: Any = None,
) -> jax.Array:
    """M and N of every segment side by side, float32 [R, H, K, K + V]. A sequence's first segment starts from its state
    in ``initial``, float32 [B, H, K, V]: its N is what it ends with, and its M is not written. Nothing is of last
    segments. One that ``forgets_before`` a chunk starts there from zero: its M is 0 and not written, either."""
    kernel = _Kernel(
        dataclasses.replace(problem, transition=True, checkpoint_every=0), config, False, interpret, segment
    )
    states, owner = States(initial), segments.sequence
    facts = dict.fromkeys(FIELDS, jnp.zeros_like(owner)) | {
        "sequence": owner,
        "chunk": chunks.first[owner] + segments.done,
        "chunks": jnp.where(segments.last, 0, segments.chunks),
        "read": jnp.where(segments.done == 0, owner, -1),
        "write": jnp.arange(len(owner), dtype=jnp.int32),
        "done": segments.done,
    }
    table = jnp.stack([facts[name] for name in FIELDS], axis=1)
    return varying_like((prepared, table, states), kernel.call(table, chunks, prepared, states, forgets))[0]


FIELDS = (
    "sequence", "chunk", "chunks", "read", "write", "lead", "gap", "gap_end", "checkpoint", "checkpoints", "blank_end",
    "done",
)  # fmt: skip
"""Of a sequence, or of a segment with ``done`` chunks before it. Rows of o before ``lead`` and from ``gap`` to
``gap_end`` are its to clear, and rows of checkpoints from its last one to ``blank_end``."""


def _table(problem: GdnProblem, chunks: Chunks, start: jax.Array, length: jax.Array, states: States) -> jax.Array:
    """int32 [B, FIELDS]."""
    sequences, every = problem.sequences, problem.checkpoint_every
    number = jnp.arange(sequences, dtype=jnp.int32)
    none = jnp.full(sequences, -1, jnp.int32)
    end = start + length
    following = lambda x, last: jnp.concatenate([x[1:], jnp.full(1, last, x.dtype)])

    def row(rows: jax.Array | None, of: jax.Array | None) -> jax.Array:
        count = 0 if of is None else of.shape[0]
        return none if rows is None else jnp.where((rows >= 0) & (rows < count), rows, -1)

    written = states.given if states.pool is None else states.pool
    filled = length // every if every else jnp.zeros_like(length)
    of_instance = filled.reshape(problem.instances, -1)
    own = problem.checkpoints // problem.instances * jnp.arange(problem.instances)[:, None]
    first = (own + jnp.cumsum(of_instance, axis=1) - of_instance).reshape(-1)
    facts = {
        "sequence": number,
        "chunk": chunks.first,
        "chunks": chunks.count,
        "read": row(states.read, states.given),
        "write": number if states.write is None else row(states.write, written),
        "lead": jnp.where(number == 0, start, 0),
        "gap": end,
        "gap_end": following(start, problem.tokens),
        "checkpoint": first,
        "checkpoints": filled,
        "blank_end": following(first, problem.checkpoints),
        "done": jnp.zeros_like(number),
    }
    return jnp.stack([facts[name].astype(jnp.int32) for name in FIELDS], axis=1)


def _table_of_segments(table: jax.Array, segments: Segments) -> jax.Array:
    """int32 [R, FIELDS]: what belongs to an end of a sequence is left to the segment there."""
    owned = dict(zip(FIELDS, table[segments.sequence].T, strict=True))
    at_end = lambda name, other=0: jnp.where(segments.last, owned[name], other)
    facts = owned | {
        "chunk": owned["chunk"] + segments.done,
        "chunks": segments.chunks,
        "read": jnp.where(segments.there, jnp.arange(len(segments.there), dtype=jnp.int32), -1),
        "write": at_end("write", -1),
        "lead": jnp.where(segments.there & (segments.done == 0), owned["lead"], 0),
        **{name: at_end(name) for name in ("gap", "gap_end", "blank_end")},
        "done": segments.done,
    }
    return jnp.stack([facts[name] for name in FIELDS], axis=1)


class _Global(NamedTuple):
    table: Any  # int32 [B, FIELDS]
    token: Any  # of Chunks
    valid: Any
    w: Any  # of Prepared
    u: Any
    p: Any
    q: Any
    k: Any
    rows: Any
    total: Any
    given: Any  # [rows, *state_shape] or None
    forgets: Any  # int32 [R, H], of transitions of segments
    out: Any  # [T, H, 128]
    final: Any  # [rows, *state_shape] or None; the same as ``given`` in place
    checkpoints: Any  # [checkpoints, *state_shape] or None


class _Shared(NamedTuple):
    """Shared memory and barriers, by role; what a kernel does not need is None."""

    w: Any  # [stages, 64, 128]
    u: Any  # [stages, 64, columns]
    k: Any  # [stages, 64, 128]
    weight: Any  # float32 [stages, 64]: rows[1]
    there: Any  # operands of the chain
    z: Any = None  # the state [128, columns], or its transpose
    y: Any = None  # new values [64, columns], or their transpose
    weighted: Any = None  # [64, columns] times rows[1]; not in registers
    q: Any = None  # [output_stages, 64, 128]
    p: Any = None  # [output_stages, 64, 64]
    factor: Any = None  # float32 [output_stages, 64]: rows[0]
    out: Any = None  # [pieces, 64, columns of a piece]
    outputs_there: Any = None
    z_there: Any = None
    z_free: Any = None
    y_there: Any = None
    y_free: Any = None


class _Place(NamedTuple):
    """What a block of threads computes; see FIELDS."""

    row: Any  # of the table
    head: Any
    column: Any
    sequence: Any
    chunk: Any
    chunks: Any
    forgets: Any = None  # a scalar of ``_Global.forgets``


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: GdnProblem
    config: RecurrenceConfig
    in_place: bool
    interpret: Any
    segment: int = 0  # chunks of one; 0: a row of the table is a sequence

    @property
    def rows(self) -> int:
        """Of the table."""
        problem = self.problem
        return max_segments(problem.tokens, problem.sequences, self.segment) if self.segment else problem.sequences

    @property
    def transition(self) -> bool:
        """Instead of outputs and final states, what the chunks make of any state: M and N side by side."""
        return self.problem.transition

    @property
    def width(self) -> int:
        """Columns of all blocks of a head."""
        return 2 * WIDTH if self.transition else WIDTH

    @property
    def vk(self) -> bool:
        return self.problem.state_layout == "vk" and not self.transition

    @property
    def given_vk(self) -> bool:
        """Of the states that are read."""
        return self.vk and not self.segment

    def pieces(self, dtype: Any) -> tuple[int, int]:
        """Copies that rows of a block's columns take, and columns of each: up to 128 bytes."""
        width = min(self.config.columns, 128 // jnp.dtype(dtype).itemsize)
        return self.config.columns // width, width

    def call(
        self, table: jax.Array, chunks: Chunks, prepared: Prepared, states: States, forgets: jax.Array | None = None
    ) -> list[jax.Array]:
        problem, config, scratch = self.problem, self.config, self._scratch()
        given = {"table": table, "token": chunks.token, "valid": chunks.valid, **prepared._asdict()}
        if self.transition:
            given = {name: x for name, x in given.items() if name not in ("token", "valid", "p", "q")}
        if states.given is not None and (self.segment or not self.in_place):
            given["given"] = states.given
        if forgets is not None:
            given["forgets"] = forgets
        results = self._results()
        names = [*given, *(["final"] if self.in_place else []), *results]

        def fp8attn_gdn_recurrence_sm90(*refs: Any) -> None:
            smem = _Shared(**dict(zip(scratch, refs[len(names) :], strict=True)))
            self._body(dict(zip(names, refs, strict=False)), smem)

        def kernel(out_type: list[Any], *operands: Any) -> Any:
            return plgpu.kernel(
                fp8attn_gdn_recurrence_sm90,
                out_type=out_type,
                grid=(self.rows * problem.heads * (self.width // config.columns),),
                grid_names=("block",),
                num_threads=1 if self.transition else 2,
                thread_name="warpgroup",
                scratch_types=list(scratch.values()),
                compiler_params=plgpu.CompilerParams(
                    approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
                ),
                **({} if self.interpret is None else {"interpret": self.interpret}),
            )(*operands)

        if not self.in_place:
            return list(kernel(list(results.values()), *given.values()))
        empty = [lax.empty(s.shape, s.dtype) for s in results.values()]
        run = pl.run_state(lambda refs: kernel([], *given.values(), *refs))
        pool, out, *others = run((states.pool if self.segment else states.given, *empty))
        return [out, pool, *others]

    def _results(self) -> dict[str, jax.ShapeDtypeStruct]:
        problem, of = self.problem, jax.ShapeDtypeStruct
        if self.transition:
            return {"final": of((self.rows, problem.heads, WIDTH, self.width), jnp.float32)}
        results = {"out": of((problem.tokens, problem.heads, WIDTH), problem.out_dtype)}
        if problem.return_final_state and not self.in_place:
            results["final"] = of((problem.sequences, *problem.state_shape), problem.state_dtype)
        if problem.checkpoints:
            results["checkpoints"] = of((problem.checkpoints, *problem.state_shape), problem.state_dtype)
        return results

    def _scratch(self) -> dict[str, Any]:
        """Of ``_Shared``."""
        config, out_dtype = self.config, jnp.dtype(self.problem.out_dtype)
        columns, stages, others = config.columns, config.stages, config.output_stages
        pieces, width = self.pieces(out_dtype)
        tiles = lambda *shape: hopper.tiles(shape, BF16, min(128, 2 * shape[-1]))
        own = lambda rows: tiles(columns, rows) if config.turned else tiles(rows, columns)
        barrier = lambda arrivals, count=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)
        swizzled = () if self.interpret is not None else (plgpu.SwizzleTransform(width * out_dtype.itemsize),)
        chain = {
            "w": tiles(stages, CHUNK, WIDTH),
            "u": tiles(stages, CHUNK, columns),
            "k": tiles(stages, CHUNK, WIDTH),
            "weight": plgpu.SMEM((stages, CHUNK), jnp.float32),
            "there": barrier(4, stages),
            **({} if config.turned else {"weighted": own(CHUNK)}),
        }
        if self.transition:
            return chain if config.turned else {**chain, "z": own(WIDTH)}
        return {
            **chain,
            "z": own(WIDTH),
            "y": own(CHUNK),
            "q": tiles(others, CHUNK, WIDTH),
            "p": tiles(others, CHUNK, CHUNK),
            "factor": plgpu.SMEM((others, CHUNK), jnp.float32),
            "out": plgpu.SMEM((pieces, CHUNK, width), out_dtype, transforms=swizzled),
            "outputs_there": barrier(3, others),
            **{name: barrier(1) for name in ("z_there", "z_free", "y_there", "y_free")},
        }

    def _body(self, gmem: dict[str, Any], smem: _Shared) -> None:
        refs = _Global(*(gmem.get(name) for name in _Global._fields))
        if self.in_place and not self.segment:
            refs = refs._replace(given=refs.final)
        place = self._place(refs)
        if self.transition:
            chain = _Chain(self, refs, smem, place)
            if self.segment:
                pl.when(chain.is_needed())(chain.run)
            else:
                chain.run()
            return
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(lambda: _Chain(self, refs, smem, place).run())
        pl.when(warpgroup == 1)(lambda: _Outputs(self, refs, smem, place).run())

    def _place(self, gmem: _Global) -> _Place:
        """The blocks of columns of a head are neighbours: they read the same operands."""
        blocks = self.width // self.config.columns
        number, block = lax.div(lax.axis_index("block"), blocks), lax.rem(lax.axis_index("block"), blocks)
        row, head = lax.div(number, self.problem.heads), lax.rem(number, self.problem.heads)
        facts = (gmem.table[row, FIELDS.index(name)] for name in ("sequence", "chunk", "chunks"))
        place = _Place(row, head, block * self.config.columns, *facts)
        if gmem.forgets is None:
            return place
        forgets = gmem.forgets[row, head]
        skipped = jnp.maximum(forgets, 0)
        return place._replace(chunk=place.chunk + skipped, chunks=place.chunks - skipped, forgets=forgets)

    def product(
        self, shape: tuple[int, int], left: Any, right: Any, onto: Any = None, turned: str = "", negative: bool = False
    ) -> Any:
        """Starts left @ right.T, or subtracts it; interpreted, the operands are read plainly, so that a race on them is
        seen."""
        if self.interpret is None:
            swizzles = tuple(min(128, 2 * x.shape[-1]) for x in (left, right))
            return hopper.start(shape, [(left, right, swizzles)], onto, turned=turned, negative=negative)
        wide = lambda x: x[...].astype(jnp.float32)
        result = jnp.dot(wide(left).T if "a" in turned else wide(left), wide(right) if "b" in turned else wide(right).T)
        plgpu.commit_smem()
        if negative:
            result = -result
        return result if onto is None else onto + result

    def rounding(self, left: Any, factor: Any, term: Any, right: Any, turned: str = "") -> tuple[Any, Any, Any]:
        """``product`` of (term - left) * factor, rounded on the way; what it is of; and term - left."""
        if self.interpret is None:
            return hopper.start_rounding(left, factor, term, right, turned=turned)
        low = ((term - left) * factor).astype(BF16)
        return self.product((ROWS, right.shape["b" in turned]), low, right, turned=turned), low, term - left

    def computed(self, arrays: list[Any]) -> list[Any]:
        return arrays if self.interpret is not None else hopper.computed(arrays)

    def end_of_block(self, number: int = 1) -> None:
        """Holds what comes before in front of the next wait for products."""
        if self.interpret is None:
            hopper.end_of_block(number)

    def settled(self, pending: Any, younger: int = 0) -> Any:
        return pending if self.interpret is not None else hopper.settled(pending, younger)


@dataclasses.dataclass(frozen=True)
class _Role:
    """Of a warpgroup in one block of columns."""

    kernel: _Kernel
    gmem: _Global
    smem: _Shared
    place: _Place

    @property
    def config(self) -> RecurrenceConfig:
        return self.kernel.config


@dataclasses.dataclass(frozen=True)
class _Chain(_Role):
    """The state of one block of columns through all chunks."""

    def field(self, name: str) -> Any:
        return self.gmem.table[self.place.row, FIELDS.index(name)]

    def is_needed(self) -> Any:
        """Of a segment's transition."""
        place = self.place
        return (place.chunks > 0) & ((place.column >= WIDTH) | ((self.field("done") > 0) & (place.forgets < 0)))

    def run(self) -> None:
        smem, chunks = self.smem, self.place.chunks
        if self.kernel.transition:
            pl.when(self.place.column < WIDTH)(self._without_values)
        for number in range(self.config.stages - 1):
            pl.when(number < chunks)(lambda number=number: self._load(number))
        state = self._initial()
        pl.when(chunks > 0)(lambda: plgpu.barrier_wait(smem.there.at[0]))
        if self.config.turned:
            carry = state, [part.astype(BF16) for part in state], self._values(jnp.int32(0)), self._total(0)
            state = lax.fori_loop(0, chunks, self._in_registers, carry)[0]
        else:
            values = self._values(jnp.int32(0)) if self.config.columns < WIDTH else None
            state = lax.fori_loop(0, chunks, self._in_shared, (state, values, self._total(0)))[0]
        self._finish(state)
        if not self.kernel.transition:
            plgpu.barrier_wait(smem.z_free)
            plgpu.barrier_wait(smem.y_free)

    def _without_values(self) -> None:
        """M is what becomes of the identity without U."""
        nothing = plgpu.layout_cast(jnp.zeros((CHUNK, self.config.columns), jnp.float32), hopper.ACCUMULATOR)
        for slot in range(self.config.stages):
            self.smem.u.at[slot][...] = nothing.astype(BF16)
        plgpu.commit_smem()

    def _identity(self) -> list[Any]:
        """Of 128 columns; 0 in those behind."""
        shape = (ROWS, ROWS if self.config.turned else self.config.columns)
        row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=hopper.ACCUMULATOR) for axis in (0, 1))
        keys, values = (column, row) if self.config.turned else (row, column)
        ahead = [values - keys + self.place.column - ROWS * half for half in range(2)]
        return [jnp.where(x == 0, 1.0, 0.0).astype(jnp.float32) for x in ahead]

    def _load(self, number: Any) -> None:
        """The chain's operands of a chunk."""
        gmem, smem, place, problem = self.gmem, self.smem, self.place, self.kernel.problem
        slot = lax.rem(number, self.config.stages)
        chunk, there = place.chunk + number, smem.there.at[slot]
        k_head = lax.div(place.head * problem.k_heads, problem.heads)
        first = lax.rem(place.column, WIDTH) if self.kernel.transition else place.column
        columns = pl.ds(pl.multiple_of(first, self.config.columns), self.config.columns)
        plgpu.copy_gmem_to_smem(gmem.w.at[chunk, place.head], smem.w.at[slot], there)
        values = lambda: plgpu.copy_gmem_to_smem(gmem.u.at[chunk, place.head, :, columns], smem.u.at[slot], there)
        if self.kernel.transition:
            pl.when(place.column >= WIDTH)(values)
            pl.when(place.column < WIDTH)(lambda: plgpu.barrier_arrive(there))
        else:
            values()
        plgpu.copy_gmem_to_smem(gmem.k.at[chunk, k_head], smem.k.at[slot], there)
        plgpu.copy_gmem_to_smem(gmem.rows.at[chunk, place.head, 1], smem.weight.at[slot], there)

    def _values(self, number: Any) -> Any:
        """U of a chunk whose operands are there, as the state is held."""
        values = self.smem.u.at[lax.rem(number, self.config.stages)]
        if not self.config.turned:
            values = plgpu.load(values, layout=hopper.ACCUMULATOR)
        elif self.kernel.interpret is not None:
            values = values[...].T
        else:
            values = plgpu.load(values.T, layout=hopper.ACCUMULATOR)
        return self.kernel.computed([values.astype(jnp.float32)])[0]

    def _weight(self, slot: Any, shape: tuple[int, int]) -> Any:
        """rows[1] in the shape of the values."""
        layout, axis = (COLUMN, 1) if self.config.turned else (hopper.ROW, 0)
        weight = plgpu.load(self.smem.weight.at[slot], layout=layout, optimized=False)
        return lax.broadcast_in_dim(weight, shape, [axis])

    def _total(self, number: Any) -> Any:
        """A chunk's decay, read a chunk ahead: it may come from memory."""
        return self.gmem.total[self.place.chunk + number, self.place.head]

    def _in_registers(self, number: Any, carry: Any) -> Any:
        """A chunk. The state is in two halves, the first and the last 64 keys, and comes with what is rounded of it.
        What is added to it is multiplied apart, since nothing else may write what a product in flight writes."""
        state, low, values, total = carry
        smem, kernel = self.smem, self.kernel
        slot = lax.rem(number, self.config.stages)
        pending = None
        for keys, part in zip(HALVES, low, strict=True):
            pending = kernel.product((ROWS, CHUNK), part, smem.w.at[slot, :, keys], pending)
        next_total, weight = self._total(self._next(number)), self._weight(slot, values.shape)
        self._hand_state(low)
        self._refill(number)
        recalled = kernel.settled(pending)
        k = smem.k.at[slot]
        first, weighted, new = kernel.rounding(recalled, weight, values, k.at[:, HALVES[0]], turned="b")
        second = kernel.product((ROWS, ROWS), weighted, k.at[:, HALVES[1]], turned="b")
        self._hand_values(new)
        following = self._wait_for_next(number)
        values = self._values(following)
        kernel.end_of_block(1)
        updated, low = [], []
        for half, added in enumerate((first, second)):
            updated.append(state[half] * total + kernel.settled(added, 1 - half))
            low += kernel.computed([updated[half].astype(BF16)])
            if not half:
                kernel.end_of_block(2)
        self._checkpoint(number, updated)
        return updated, low, values, next_total

    def _in_shared(self, number: Any, carry: Any) -> Any:
        """A chunk. The registers hold no second state of 128 columns, and no U beside it: there sums are added to, and
        U is read when it is needed."""
        state, values, total = carry
        smem, config, kernel = self.smem, self.config, self.kernel
        slot, apart = lax.rem(number, config.stages), config.columns < WIDTH
        shape = (CHUNK, config.columns)
        next_total, weight = self._total(self._next(number)), self._weight(slot, shape)
        self._hand_state([part.astype(BF16) for part in state])
        pending = kernel.product(shape, smem.w.at[slot], smem.z, turned="b")
        self._refill(number)
        recalled = kernel.settled(pending)
        new = (values if apart else self._values(number)) - recalled
        smem.weighted[...] = (new * weight).astype(BF16)
        plgpu.commit_smem()
        onto = [None, None] if apart else [part * total for part in state]
        pending = [
            kernel.product((ROWS, config.columns), smem.k.at[slot, :, keys], smem.weighted, sums, turned="ab")
            for keys, sums in zip(HALVES, onto, strict=True)
        ]
        self._hand_values(new)
        following = self._wait_for_next(number)
        if apart:
            values = self._values(following)
        kernel.end_of_block(1)
        if apart:
            state = self._added(state, total, pending)
        else:
            state = [kernel.settled(part, 1 - half) for half, part in enumerate(pending)]
        self._checkpoint(number, state)
        return state, values, next_total

    def _added(self, state: list[Any], total: Any, pending: list[Any]) -> list[Any]:
        """total * state + pending: the first half beside the product of the second one."""
        first = state[0] * total + self.kernel.settled(pending[0], 1)
        (first,) = self.kernel.computed([first])
        self.kernel.end_of_block(2)
        return [first, state[1] * total + self.kernel.settled(pending[1])]

    def _next(self, number: Any) -> Any:
        """The chunk behind this one, or the last one again."""
        return jnp.minimum(number + 1, self.place.chunks - 1)

    def _wait_for_next(self, number: Any) -> Any:
        """For the operands of ``_next``."""
        there = self.smem.there.at[lax.rem(number + 1, self.config.stages)]
        pl.when(number + 1 < self.place.chunks)(lambda: plgpu.barrier_wait(there))
        return self._next(number)

    def _hand_state(self, low: list[Any]) -> None:
        """To the outputs, and in shared memory to the own product. Behind it all warps are done with the chunk
        before."""
        smem, outputs = self.smem, not self.kernel.transition
        if outputs:
            plgpu.barrier_wait(smem.z_free)
        if outputs or not self.config.turned:
            for keys, part in zip(HALVES, low, strict=True):
                (smem.z.at[:, keys] if self.config.turned else smem.z.at[keys])[...] = part
        plgpu.commit_smem()
        if outputs:
            plgpu.barrier_arrive(smem.z_there)

    def _hand_values(self, new: Any) -> None:
        """To the outputs."""
        smem = self.smem
        if self.kernel.transition:
            return
        plgpu.barrier_wait(smem.y_free)
        smem.y[...] = new.astype(BF16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem.y_there)

    def _refill(self, number: Any) -> None:
        """The slot of the chunk before."""
        following = number + self.config.stages - 1
        pl.when(following < self.place.chunks)(lambda: self._load(following))

    def _initial(self) -> list[Any]:
        shape, parts = (ROWS, ROWS if self.config.turned else self.config.columns), WIDTH // ROWS
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), hopper.ACCUMULATOR)
        none = self._identity() if self.kernel.transition else [zeros] * parts
        if self.gmem.given is None:
            return none
        row = self.field("read")

        def load() -> list[Any]:
            states = self.gmem.given.at[row, self.place.head]
            return [self._load_part(states, part).astype(jnp.float32) for part in range(parts)]

        counts = (row >= 0) & (self.place.column >= self.kernel.width - WIDTH)
        if self.place.forgets is not None:
            counts &= self.place.forgets < 0
        return lax.cond(counts, load, lambda: none)

    def _tile(self, states: Any, part: int, vk: bool, column: Any) -> Any:
        """What a part of the state is of [V, K] or [K, V]."""
        columns, keys = self.config.columns, HALVES[part]
        values = pl.ds(pl.multiple_of(column, columns), columns)
        return states.at[values, keys] if vk else states.at[keys, values]

    def _load_part(self, states: Any, part: int) -> Any:
        vk, column = self.kernel.given_vk, self.place.column
        tile = self._tile(states, part, vk, lax.rem(column, WIDTH) if self.kernel.transition else column)
        if vk == self.config.turned:
            return plgpu.load(tile, layout=hopper.ACCUMULATOR, optimized=False)
        return _turned(tile, self.kernel.interpret)

    def _store(self, states: Any, state: list[Any]) -> None:
        for part, value in enumerate(state):
            tile = self._tile(states, part, self.kernel.vk, self.place.column)
            value = value.astype(states.dtype)
            if self.kernel.vk == self.config.turned:
                store(tile, value)
            elif self.kernel.interpret is not None:
                tile[...] = value.T
            else:
                store(tile.T, plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED))

    def _checkpoint(self, number: Any, state: list[Any]) -> None:
        """After every so many chunks."""
        problem = self.kernel.problem
        if not problem.checkpoints:
            return
        every = problem.checkpoint_every // CHUNK
        if self.kernel.segment:
            number = number + self.field("done")
        local = lax.div(number, every)
        whole = (lax.rem(number, every) == every - 1) & (local < self.field("checkpoints"))

        @pl.when(whole)
        def write() -> None:
            self._store(self.gmem.checkpoints.at[self.field("checkpoint") + local, self.place.head], state)

    def _finish(self, state: list[Any]) -> None:
        """The final state; zeros where the next checkpoint would be and there is none."""
        if self.gmem.final is not None:
            row = self.field("write")
            pl.when(row >= 0)(lambda: self._store(self.gmem.final.at[row, self.place.head], state))
        if not self.kernel.problem.checkpoints:
            return
        zeros = [plgpu.layout_cast(jnp.zeros(x.shape, jnp.float32), hopper.ACCUMULATOR) for x in state]

        @pl.loop(self.field("checkpoint") + self.field("checkpoints"), self.field("blank_end"))
        def clear(row: Any) -> None:
            self._store(self.gmem.checkpoints.at[row, self.place.head], zeros)


def _turned(ref: Any, interpret: Any) -> Any:
    """The transpose of [n, 64 m], as accumulators are held."""
    if interpret is not None:
        return ref[...].T
    loaded = plgpu.load(ref.T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
    return plgpu.layout_cast(loaded, hopper.ACCUMULATOR)


@dataclasses.dataclass(frozen=True)
class _Outputs(_Role):
    """Follows the chain, chunk by chunk."""

    def run(self) -> None:
        smem, chunks = self.smem, self.place.chunks
        for number in range(self.config.output_stages - 1):
            pl.when(number < chunks)(lambda number=number: self._load(number))
        plgpu.barrier_arrive(smem.z_free)
        plgpu.barrier_arrive(smem.y_free)
        self._clear_gaps()
        pl.loop(0, chunks)(self._step)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _load(self, number: Any) -> None:
        gmem, smem, place, problem = self.gmem, self.smem, self.place, self.kernel.problem
        slot = lax.rem(number, self.config.output_stages)
        chunk, there = place.chunk + number, smem.outputs_there.at[slot]
        q_head = lax.div(place.head * problem.q_heads, problem.heads)
        plgpu.copy_gmem_to_smem(gmem.q.at[chunk, q_head], smem.q.at[slot], there)
        plgpu.copy_gmem_to_smem(gmem.p.at[chunk, place.head], smem.p.at[slot], there)
        plgpu.copy_gmem_to_smem(gmem.rows.at[chunk, place.head, 0], smem.factor.at[slot], there)

    def _step(self, number: Any) -> None:
        smem, config, kernel = self.smem, self.config, self.kernel
        slot, following = lax.rem(number, config.output_stages), number + config.output_stages - 1
        pl.when(following < self.place.chunks)(lambda: self._load(following))
        chunk = self.place.chunk + number
        token, valid = self.gmem.token[chunk], self.gmem.valid[chunk]
        shape, turned = (CHUNK, config.columns), "" if config.turned else "b"
        plgpu.barrier_wait(smem.outputs_there.at[slot])
        factor = plgpu.load(smem.factor.at[slot], layout=hopper.ROW, optimized=False)
        plgpu.barrier_wait(smem.z_there)
        out = kernel.settled(kernel.product(shape, smem.q.at[slot], smem.z, turned=turned))
        plgpu.barrier_arrive(smem.z_free)
        out = out * spread(factor, out)
        plgpu.barrier_wait(smem.y_there)
        pending = kernel.product(shape, smem.p.at[slot], smem.y, out, turned=turned)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out = kernel.settled(pending)
        plgpu.barrier_arrive(smem.y_free)
        self._stage(out)
        self._store_rows(token, valid)

    def _stage(self, out: Any) -> None:
        out = out.astype(self.kernel.problem.out_dtype)
        pieces, width = self.kernel.pieces(out.dtype)
        for piece in range(pieces):
            self.smem.out.at[piece][...] = out[:, piece * width : (piece + 1) * width]
        plgpu.commit_smem()

    def _store_rows(self, first: Any, count: Any) -> None:
        """Copies of 64, 32, ... 1 rows, as many as the count has bits: what lies behind belongs to others."""
        pieces, width = self.kernel.pieces(self.kernel.problem.out_dtype)
        done, size = count * 0, CHUNK
        while size:

            @pl.when((count & size) != 0)
            def copy(size: int = size, done: Any = done) -> None:
                for piece in range(pieces):
                    source = self.smem.out.at[piece, pl.ds(done, size)]
                    columns = pl.ds(self.place.column + piece * width, width)
                    target = self.gmem.out.at[pl.ds(first + done, size), self.place.head, columns]
                    plgpu.copy_smem_to_gmem(source, target, commit_group=False)

            done = done + (count & size)
            size //= 2
        plgpu.commit_smem_to_gmem_group()

    def _clear_gaps(self) -> None:
        """Rows of no sequence, behind this one and before the first."""
        lead, gap, gap_end = (
            self.gmem.table[self.place.row, FIELDS.index(name)] for name in ("lead", "gap", "gap_end")
        )

        @pl.when((lead > 0) | (gap < gap_end))
        def clear() -> None:
            shape = (CHUNK, self.config.columns)
            self._stage(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), hopper.ACCUMULATOR))
            for first, end in ((0, lead), (gap, gap_end)):

                @pl.loop(0, lax.div(end - first + CHUNK - 1, CHUNK))
                def tile(number: Any, first: Any = first, end: Any = end) -> None:
                    start = first + number * CHUNK
                    self._store_rows(start, jnp.minimum(end - start, CHUNK))
