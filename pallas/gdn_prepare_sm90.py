"""Operands of the recurrence of ``gdn_prefill`` on Hopper, chunk by chunk: no chunk waits for another.

A block takes a chunk of 64 tokens, a key head and some of its state heads, one after the other. Per state head:

    A = strictly lower part of beta_i (k_i . k_j)      X = (I + A)^-1      Xg = X * E, E_ij the gates from j to i
    W = Xg diag(beta gam) Kc      U = Xg diag(beta) Vc      P = scale (Qc Kc^T) * E

Norms are scalars of rows and columns, so that q and k stay exact operands; Xg goes into its products in two halves.
The inverse is never a power of A. Diagonal blocks of 16: a thread substitutes a column of one in its registers, in
float32. Merges of neighbours, X_ba = - X_b A_ba X_a: two levels, operands in two halves of float16, three products. A
warp holds 16 rows: what it needs of a level are 16 and then 32 columns, side by side for all warps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax_fp8attn.pallas.common import hopper
from jax_fp8attn.pallas.common.backend import store, varying_like
from jax_fp8attn.pallas.common.gdn_chunks import Chunks, Prepared
from jax_fp8attn.pallas.common.hopper import spread
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxlib.mlir.dialects import math as mlir_math

from jax_fp8attn.problems import GDN_CHUNK, GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem

ROWS, WIDTH = GDN_CHUNK, 128  # of a tile
HALF = 64  # columns of 128 bytes
BLOCK = 16  # rows of a warp, and of a block that is inverted by substitution
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
LOG2E = float(np.log2(np.e))
HARD_RESET = -30.0  # a gate from here down clears the state
CLEARS = float(np.float32(HARD_RESET) * np.float32(LOG2E))  # its logarithm to base 2 as the kernel rounds it
COLUMN = hopper.ACCUMULATOR.reduce(0)


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """heads: state heads of a block, a divisor of those of a key head. More of them share the products of keys, fewer
    make more blocks."""

    heads: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.heads <= 8:
            raise ValueError(f"a block takes 1 to 8 state heads: {self}")


def default_config(problem: GdnProblem) -> PrepareConfig:
    """One head: three blocks fit a multiprocessor, if the assembler is ptxas. With more heads a block shares a product,
    but its registers leave two."""
    return PrepareConfig()


def supports(problem: GdnProblem) -> tuple[str, ...]:
    reasons = []
    if problem.dtype != BF16:
        reasons.append(f"q, k and v are {problem.dtype.name}, only bfloat16 is prepared")
    if (problem.k_width, problem.v_width) != (WIDTH, WIDTH):
        reasons.append(f"K = {problem.k_width} and V = {problem.v_width}, both must be {WIDTH}")
    if problem.precision != "default":
        reasons.append("only precision='default' is prepared")
    return tuple(reasons)


def prepare(
    problem: GdnProblem,
    arrays: GdnArrays,
    chunks: Chunks,
    config: PrepareConfig | None = None,
    interpret: Any = None,
) -> Prepared:
    """Of q, k, v, g and beta. Rows of no chunk are not read."""
    g = arrays.g if problem.gate == "log" else jnp.log(arrays.g)
    flat = [x.reshape(problem.tokens, x.shape[1] * x.shape[2]) for x in arrays[:3]]
    kernel = _Kernel(problem, config or default_config(problem), False, interpret)
    return kernel.call(_Given(*flat, g, arrays.beta, None, None, arrays.scale), chunks)


def prepare_packed(
    problem: GdnPoolProblem,
    arrays: GdnPoolArrays,
    chunks: Chunks,
    config: PrepareConfig | None = None,
    interpret: Any = None,
) -> Prepared:
    """Of packed rows of q, k and v as they are; gates and beta are computed from a and b."""
    qkv, split = arrays.qkv, problem.split
    given = _Given(qkv, qkv, qkv, arrays.a, arrays.b, arrays.A_log, arrays.dt_bias, arrays.scale)
    kernel = _Kernel(split, config or default_config(split), True, interpret)
    return kernel.call(given, chunks)


class _Given(NamedTuple):
    """Operands; q, k and v may be the same array."""

    q: Any  # [T, columns]
    k: Any
    v: Any
    gate: Any  # [T, H]: log gates, or what they are computed from
    beta: Any  # the same
    A_log: Any  # [instances, H]; None with log gates
    dt_bias: Any
    scale: Any  # [instances]


class _Tile(NamedTuple):
    """64 rows of 128 columns in two halves: what copies see, what products and threads see."""

    raw: Any
    tiled: Any

    def slot(self, slot: Any) -> _Tile:
        return _Tile(self.raw.at[slot], self.tiled.at[slot])


class _Shared(NamedTuple):
    """Of a block. ``w`` stands where the inverse was worked out, ``u`` in place of v."""

    k: _Tile
    q: _Tile
    v: _Tile
    w: Any  # [2, 64, 64]
    block: Any  # f32 [64, 16]: the diagonal block of each warp
    beside: Any  # f16 [2, 1, 64, 16]: diagonal blocks and blocks below them, in two halves
    pairs: Any  # f16 [2, 2, 64, 16]: the same of twice the size, by columns
    p: Any  # [1, 64, 64]
    lines: Any  # f32 [3 * heads + 2, 64] in a row, see ``_Lines``
    k_there: Any
    q_there: Any
    v_there: Any

    def slot(self, slot: Any) -> _Shared:
        """The operands of products are arrays of one slot."""
        tiles = {name: getattr(self, name).slot(slot) for name in ("k", "q", "v")}
        return self._replace(**tiles, beside=self.beside.at[slot], pairs=self.pairs.at[slot])


class _Lines(NamedTuple):
    """64 numbers each, a number a token of the chunk. Two of a head come first: what is read from a window that starts
    before the chunk reaches into the next line."""

    heads: int
    ref: Any

    def at(self, line: Any, shift: Any = 0) -> Any:
        return self.ref.at[pl.ds(line * ROWS + shift, ROWS)]

    def sums(self, head: Any) -> Any:
        """log2 of the gates from the last reset on, or from the first token, resets left out."""
        return self.at(2 * head)

    def betas(self, head: Any) -> Any:
        return self.at(2 * head + 1)

    def resets(self, head: Any) -> Any:
        """The last reset up to each token, or -1."""
        return self.at(2 * self.heads + head)

    @property
    def norms(self) -> Any:
        return self.at(3 * self.heads)

    @property
    def of_k(self) -> Any:
        return self.at(3 * self.heads + 1)


class _Place(NamedTuple):
    """The scalars of a block."""

    chunk: Any
    k_head: Any
    first_head: Any
    leads: Any  # the first block of a key head
    token: Any
    valid: Any
    instance: Any
    scale: Any


@dataclasses.dataclass(frozen=True)
class _Kernel:
    problem: GdnProblem
    config: PrepareConfig
    packed: bool
    interpret: Any

    @property
    def plain(self) -> bool:
        return self.interpret is not None

    @property
    def group(self) -> int:
        """State heads of a key head."""
        return self.problem.heads // self.problem.k_heads

    @property
    def q_stays(self) -> bool:
        """All state heads of a key head share q, too; else each has its own, and v is shared."""
        return self.problem.q_heads == self.problem.k_heads

    def call(self, given: _Given, chunks: Chunks) -> Prepared:
        problem, count = self.problem, chunks.token.shape[0]
        of, heads = jax.ShapeDtypeStruct, problem.heads
        results = Prepared(
            w=of((count, heads, ROWS, WIDTH), BF16),
            u=of((count, heads, ROWS, WIDTH), BF16),
            p=of((count, heads, ROWS, ROWS), BF16),
            q=of((count, problem.q_heads, ROWS, WIDTH), BF16),
            k=of((count, problem.k_heads, ROWS, WIDTH), BF16),
            rows=of((count, heads, 2, ROWS), F32),
            total=of((count, heads), F32),
        )
        if not problem.tokens:
            return Prepared(*(jnp.zeros(x.shape, x.dtype) for x in results))._replace(
                total=jnp.ones((count, heads), F32)
            )
        if self.group % self.config.heads:
            raise ValueError(f"{self.group} state heads of a key head are no multiple of {self.config.heads}")
        if problem.tokens < ROWS:  # a window of gates is as long as a chunk
            wide = lambda x: jnp.pad(x, ((0, ROWS - problem.tokens), (0, 0)))
            given = given._replace(gate=wide(given.gate), beta=wide(given.beta))
        operands = [x for x in given if x is not None]
        options = {} if self.interpret is None else {"interpret": self.interpret}

        def fp8attn_gdn_prepare_sm90(*refs: Any) -> None:
            self._body(refs)

        out = plgpu.kernel(
            fp8attn_gdn_prepare_sm90,
            out_type=tuple(results),
            grid=(count * heads // self.config.heads,),
            grid_names=("block",),
            scratch_types=self._scratch(),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            **options,
        )(*operands, chunks.token, chunks.valid)
        return varying_like((operands, chunks), Prepared(*out))

    def _scratch(self) -> list[Any]:
        tile = hopper.rows_anywhere((1, 2, ROWS, HALF), BF16, 128, self.plain)
        w, p = (hopper.rows_out(n, ROWS, BF16, self.plain) for n in (2, 1))
        inverse = [
            plgpu.SMEM((ROWS, BLOCK), F32),
            *[hopper.tiles((1, 2, n, ROWS, BLOCK), F16, 2 * BLOCK) for n in (1, 2)],
        ]
        return [
            *[tile] * 3,
            *([w, *inverse] if self.plain else [plgpu.RefUnion(w, inverse)]),
            p,
            plgpu.SMEM(((3 * self.config.heads + 2) * ROWS,), F32),
            *[plgpu.Barrier(num_arrivals=2)] * 3,
        ]

    def _body(self, refs: Sequence[Any]) -> None:
        given = iter(refs)
        operands = _Given(
            *(None if not self.packed and n in ("A_log", "dt_bias") else next(given) for n in _Given._fields)
        )
        token, valid = next(given), next(given)
        out = Prepared(*(next(given) for _ in Prepared._fields))
        tiles = [_Tile(*hopper.views(next(given), self.plain)) for _ in range(3)]
        if self.plain:
            w, block, beside, pairs = (next(given) for _ in range(4))
        else:
            w, (block, beside, pairs) = next(given)
        smem = _Shared(*tiles, w, block, beside, pairs, next(given), _Lines(self.config.heads, next(given)), *given)
        place = self._place(token, valid, operands.scale)
        pl.when(place.valid == 0)(lambda: self._nothing(place, smem, out))
        pl.when(place.valid > 0)(lambda: self._chunk(place, operands, smem, out))

    def _place(self, token: Any, valid: Any, scale: Any) -> _Place:
        parts = self.group // self.config.heads
        number = lax.axis_index("block")
        part, rest = lax.rem(number, parts), lax.div(number, parts)
        k_head, chunk = lax.rem(rest, self.problem.k_heads), lax.div(rest, self.problem.k_heads)
        first = token[chunk]
        instance = lax.div(first, max(1, self.problem.tokens // self.problem.instances))
        first_head = k_head * self.group + part * self.config.heads
        return _Place(chunk, k_head, first_head, part == 0, first, valid[chunk], instance, scale[instance])

    def _nothing(self, place: _Place, smem: _Shared, out: Prepared) -> None:
        """A chunk that no sequence has."""
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, HALF), BF16), hopper.ACCUMULATOR)
        for tile in (*(smem.w.at[half] for half in range(2)), smem.p.at[0]):
            tile[...] = zeros
        plgpu.commit_smem()

        def head(number: int) -> None:
            own = place.first_head + number
            for target in (out.w, out.u, *([] if self.q_stays else [out.q])):
                self._copy_out(smem.w, target.at[place.chunk, own])
            plgpu.copy_smem_to_gmem(smem.p.at[0], out.p.at[place.chunk, own])
            for n in range(2):
                store(out.rows.at[place.chunk, own, n], hopper.full_row(0.0, ROWS))
            out.total[place.chunk, own] = jnp.float32(1.0)

        for n in range(self.config.heads):
            head(n)

        @pl.when(place.leads)
        def _() -> None:
            for target in (out.k, *([out.q] if self.q_stays else [])):
                self._copy_out(smem.w, target.at[place.chunk, place.k_head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _chunk(self, place: _Place, given: _Given, shared: _Shared, out: Prepared) -> None:
        smem = shared.slot(0)
        self._load(given.k, self._column("k", place.k_head), place, smem.k, smem.k_there)
        if self.q_stays:
            self._load(given.q, self._column("q", place.k_head), place, smem.q, smem.q_there)
        self._load_own(place.first_head, place, given, smem)
        self._note_gates(place, given, smem.lines)
        self._await(place, smem.k, smem.k_there)
        keys, k_norm = self._normed(self._scores(smem.k, smem.k))
        if self.problem.qk_l2norm:
            smem.lines.norms[...] = k_norm
            _meet(self.plain)
            keys = keys * spread(k_norm, keys) * _columns(smem.lines.norms, keys)
        q_norm = None
        if self.q_stays:
            self._await(place, smem.q, smem.q_there)
            q_norm = self._q_norm(smem)

        @pl.when(place.leads)
        def _() -> None:
            self._copy_out(smem.k.raw, out.k.at[place.chunk, place.k_head])
            if self.q_stays:
                self._copy_out(smem.q.raw, out.q.at[place.chunk, place.k_head])

        norms = q_norm, k_norm
        if self.config.heads == 1:
            self._head(0, place, given, smem, out, keys, norms)
        else:
            # were the count known, the compiler would know that the slot is 0, and keep descriptors of all operands of
            # products in registers
            count = self.config.heads + lax.shift_right_logical(place.valid, 20)

            @pl.loop(0, count)
            def _(n: Any) -> None:
                self._head(n, place, given, shared.slot(lax.shift_right_logical(n, 20)), out, keys, norms)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _head(
        self,
        n: Any,
        place: _Place,
        given: _Given,
        smem: _Shared,
        out: Prepared,
        keys: Any,
        norms: tuple[Any, Any],
    ) -> None:
        head = place.first_head + n
        if self.config.heads > 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the head before has left
            pl.when(n > 0)(lambda: self._load_own(head, place, given, smem))
        q_norm, k_norm = norms
        lines = smem.lines
        sums, betas, reset = (_row(x) for x in (lines.sums(n), lines.betas(n), lines.resets(n)))
        decay_to = jnp.where(reset < 0, jnp.exp2(sums), 0.0)
        lines.of_k[...] = _times(betas * decay_to, k_norm)
        inverse = self._inverse(keys * spread(-betas, keys), smem)
        last_reset = lines.ref[(2 * self.config.heads + n) * ROWS + ROWS - 1]
        decay = self._decay(sums, _columns(lines.sums(n), keys), reset, last_reset)
        if not self.q_stays:
            self._await(place, smem.q, smem.q_there)
            self._copy_out(smem.q.raw, out.q.at[place.chunk, head])
            q_norm = self._q_norm(smem)
        of_row = _times(hopper.full_row(1.0, ROWS) * place.scale, q_norm)
        p = self._scores(smem.q, smem.k) * decay * spread(of_row, decay)
        if k_norm is not None:
            p = p * _columns(lines.norms, decay)
        smem.p.at[0][...] = p.astype(BF16)
        last = lines.ref[2 * n * ROWS + ROWS - 1]
        kept = jnp.where(_row_numbers().astype(F32) >= last_reset, jnp.exp2(last - sums), 0.0)
        self._row_scalars(place, head, out, (of_row * decay_to, _times(kept, k_norm)))
        out.total[place.chunk, head] = jnp.where(last_reset < 0, jnp.exp2(last), 0.0)
        gated = inverse * decay
        _meet(self.plain)  # all have read what the inverse was made of
        for half, w in enumerate(self._weighted(gated * _columns(lines.of_k, gated), smem.k)):
            smem.w.at[half][...] = w.astype(BF16)
        self._await(place, smem.v, smem.v_there)
        for half, u in enumerate(self._weighted(gated * _columns(lines.betas(n), gated), smem.v)):
            _meet(self.plain)  # all have read this half of v
            smem.v.tiled.at[half][...] = u.astype(BF16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.p.at[0], out.p.at[place.chunk, head], commit_group=False)
        self._copy_out(smem.w, out.w.at[place.chunk, head])
        self._copy_out(smem.v.raw, out.u.at[place.chunk, head])

    def _row_scalars(self, place: _Place, head: Any, out: Prepared, values: Sequence[Any]) -> None:
        inside = _row_numbers() < place.valid
        for n, value in enumerate(values):
            store(out.rows.at[place.chunk, head, n], jnp.where(inside, value, 0.0))

    def _load_own(self, head: Any, place: _Place, given: _Given, smem: _Shared) -> None:
        """What a state head does not share; v, where it is shared, too, because U takes its place."""
        self._load(given.v, self._column("v", head if self.q_stays else place.k_head), place, smem.v, smem.v_there)
        if not self.q_stays:
            self._load(given.q, self._column("q", head), place, smem.q, smem.q_there)

    def _column(self, name: str, head: Any) -> Any:
        """Where a head of q, k or v starts in its rows."""
        before = {"q": 0, "k": self.problem.q_heads, "v": self.problem.q_heads + self.problem.k_heads}
        return (head + (before[name] if self.packed else 0)) * WIDTH

    def _load(self, source: Any, column: Any, place: _Place, tile: _Tile, there: Any) -> None:
        for half in range(2):
            rows = source.at[pl.ds(place.token, ROWS), pl.ds(column + half * HALF, HALF)]
            plgpu.copy_gmem_to_smem(rows, tile.raw.at[half], there)

    def _await(self, place: _Place, tile: _Tile, there: Any) -> None:
        """Rows of others become zero."""
        plgpu.barrier_wait(there)

        @pl.when(place.valid < ROWS)
        def _() -> None:
            inside = _iota(0, HALF) < place.valid
            for half in range(2):
                x = plgpu.load(tile.tiled.at[half], layout=hopper.ACCUMULATOR, optimized=False)
                tile.tiled.at[half][...] = jnp.where(inside, x, jnp.zeros((), BF16))
            plgpu.commit_smem()

    def _copy_out(self, tile: Any, target: Any) -> None:
        for half in range(2):
            plgpu.copy_smem_to_gmem(tile.at[half], target.at[:, pl.ds(half * HALF, HALF)], commit_group=half == 1)

    def _scores(self, a: _Tile, b: _Tile) -> Any:
        """a @ b.T"""
        if not self.plain:
            pairs = [(a.tiled.at[half], b.tiled.at[half], 128) for half in range(2)]
            return hopper.settled(hopper.start((ROWS, ROWS), pairs), 0)
        halves = [(a.tiled[n].astype(F32), b.tiled[n].astype(F32)) for n in range(2)]
        return sum(jnp.dot(x, y.T) for x, y in halves)

    def _weighted(self, weights: Any, tile: _Tile) -> Iterator[Any]:
        """weights @ each half of a tile, the weights in two halves. One after the other, for the registers of one."""
        parts = self._halves(weights, BF16)
        for half in range(2):
            if not self.plain:
                pairs = [(part, tile.tiled.at[pl.ds(half, 1)], 128) for part in parts]
                yield hopper.settled(hopper.start((ROWS, HALF), pairs), 0)
                continue
            x = tile.tiled[half].astype(F32)
            product = sum(jnp.dot(part.astype(F32), x) for part in parts)
            plgpu.commit_smem()
            yield product

    def _normed(self, squares: Any) -> tuple[Any, Any]:
        """Products of rows with themselves, and the rows' inverse norms."""
        if not self.problem.qk_l2norm:
            return squares, None
        own = jnp.where(_iota(0, ROWS) == _iota(1, ROWS), squares, 0.0).sum(axis=1)
        return squares, lax.rsqrt(own + self.problem.l2norm_eps)

    def _q_norm(self, smem: _Shared) -> Any:
        return self._normed(self._scores(smem.q, smem.q))[1] if self.problem.qk_l2norm else None

    def _note_gates(self, place: _Place, given: _Given, lines: _Lines) -> None:
        """Of all heads, from a window of 64 tokens that lies in the arrays."""
        window = jnp.minimum(place.token, max(self.problem.tokens, ROWS) - ROWS)
        for n in range(self.config.heads):
            head = place.first_head + n
            gate, beta = (
                plgpu.load(x.at[pl.ds(window, ROWS), head], layout=hopper.ROW, optimized=False).astype(F32)
                for x in (given.gate, given.beta)
            )
            if self.packed:
                rate = jnp.exp(hopper.full_row(1.0, ROWS) * given.A_log[place.instance, head])
                gate = -rate * _softplus(gate + given.dt_bias[place.instance, head])
                beta = 1.0 / (1.0 + jnp.exp(-beta))
            lines.sums(n)[...], lines.betas(n)[...] = gate * LOG2E, beta
        if not self.plain:
            _meet(self.plain)
            _sum_in_warps(lines.ref, lines.heads, place.token - window, place.valid)
            _meet(self.plain)
            return
        token = jnp.arange(ROWS)
        for n in range(self.config.heads):
            gate, beta = (
                jnp.where(token < place.valid, lines.at(2 * n + kind, place.token - window)[...], 0.0)
                for kind in range(2)
            )
            cleared = gate <= CLEARS
            reset = lax.cummax(jnp.where(cleared, token, -1))
            summed = (token <= token[:, None]) & (token >= reset[:, None])
            lines.sums(n)[...] = jnp.where(summed, jnp.where(cleared, 0.0, gate), 0.0).sum(axis=1)
            lines.betas(n)[...] = beta
            lines.resets(n)[...] = reset.astype(F32)

    def _decay(self, sums: Any, of_columns: Any, reset: Any, last_reset: Any) -> Any:
        """E: from token j, a column, to token i, a row; 0 where i < j or a reset lies between."""
        decay = jnp.exp2(_lower(spread(sums, of_columns) - of_columns, -jnp.inf, self.plain))

        def cleared(x: Any) -> Any:
            return jnp.where(_iota(1, ROWS).astype(F32) >= spread(reset, x), x, 0.0)

        return lax.cond(last_reset >= 0, cleared, lambda x: x, decay)

    def _inverse(self, a: Any, smem: _Shared) -> Any:
        """(I - strictly lower part of a)^-1."""
        warp = lax.shift_right_logical(_iota(0, BLOCK), 4)
        piece = lambda n: a[:, n * BLOCK : (n + 1) * BLOCK]
        of_warps = lambda *x: functools.reduce(lambda y, n: jnp.where(warp == n, x[n], y), range(1, 4), x[0])
        smem.block[...] = of_warps(*map(piece, range(4)))
        self._substitute(smem.block)
        diagonal = plgpu.load(smem.block, layout=hopper.ACCUMULATOR, optimized=False)
        second, last = lax.rem(warp, 2) == 1, warp == 3
        self._put(smem.beside, jnp.where(second, jnp.where(last, piece(2), piece(0)), diagonal))
        plgpu.commit_smem()
        rows = lambda ref, first, count: [ref.at[n, :, pl.ds(first, count)] for n in range(2)]
        at = lambda *firsts: [rows(smem.beside, first, BLOCK) for first in firsts]
        product = jnp.where(last, *self._products(diagonal, at(48, 16)))
        product = jnp.where(last, *self._products(product, at(32, 0)))
        left, right = jnp.where(second, product, diagonal), jnp.where(second, diagonal, 0.0)
        pair = hopper.join([left, right], self.plain)
        upper = _iota(0, 2 * BLOCK) < 2 * BLOCK
        self._put(smem.pairs, jnp.where(upper, pair, a[:, : 2 * BLOCK]))
        plgpu.commit_smem()
        (product,) = self._products(pair, [rows(smem.pairs, 2 * BLOCK, 2 * BLOCK)])
        (product,) = self._products(product, [rows(smem.pairs, 0, 2 * BLOCK)])
        return hopper.join([jnp.where(upper, pair, product), jnp.where(upper, 0.0, pair)], self.plain)

    def _products(self, left: Any, rights: Sequence[Sequence[Any]]) -> Sequence[Any]:
        """left @ right, for each one in two halves and by columns, left in two halves as well."""
        high, low = self._halves(left, F16)
        if self.plain:
            wide = lambda x: jnp.concatenate([*x[...].astype(F32)], axis=1)
            results = [
                jnp.dot(high.astype(F32), wide(a) + wide(b)) + jnp.dot(low.astype(F32), wide(a)) for a, b in rights
            ]
            plgpu.commit_smem()
            return results
        started = []
        for a, b in rights:
            pairs = [(x, y, 2 * BLOCK) for x, y in ((high, b), (low, a), (high, a))]
            started.append(hopper.start(left.shape, pairs))
        first, *others = started
        if not others:
            return [hopper.settled(first, 0)]
        first, others = hopper.settled(first, 0, others)
        return [first, *others]

    def _halves(self, x: Any, dtype: Any) -> tuple[Any, Any]:
        """What rounds to ``dtype``, and the rest."""
        if not self.plain:
            return _halves_in_words(x, dtype)
        high = x.astype(dtype)
        return high, (x - high.astype(F32)).astype(dtype)

    def _put(self, ref: Any, x: Any) -> None:
        """In halves and by columns."""
        for n, half in enumerate(self._halves(x, F16)):
            for tile in range(x.shape[1] // BLOCK):
                ref.at[n, tile][...] = half[:, tile * BLOCK : (tile + 1) * BLOCK]

    def _substitute(self, block: Any) -> None:
        """Replaces the diagonal block of each warp by the inverse of I - its strictly lower part."""
        if not self.plain:
            _substitute_in_warps(block)
            return
        a = block[...].reshape(-1, BLOCK, BLOCK)
        row = lambda i: [a[:, i, j, None] for j in range(i)]
        unit = lambda i: jnp.zeros_like(a[:, 0]) + (jnp.arange(BLOCK) == i)
        columns = column_of_inverse(row, unit, lambda x, y, z: x * y + z)
        block[...] = jnp.stack(columns, axis=1).reshape(ROWS, BLOCK)


def column_of_inverse(row: Callable[[int], Any], unit: Callable[[int], Any], add: Callable[..., Any]) -> list[Any]:
    """The elements of a column of (I - A)^-1, from ``row(i)``, the elements of A to the left of the diagonal,
    ``unit(i)``, those of I, and ``add(x, y, z)`` = x y + z."""
    column: list[Any] = []
    for i in range(BLOCK):
        value = unit(i)
        for a, x in zip(row(i), column, strict=True):
            value = add(a, x, value)
        column.append(value)
    return column


def _substitute_in_warps(block: Any) -> None:
    """A lane has a column, its neighbour 16 lanes on the same one."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def emit(_: Any, block: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        thread = utils.thread_idx()
        warp = arith.andi(_shifted(thread, 5), _word(3))
        # computed here: outside of a loop the elements of I would take registers
        lane = llvm.inline_asm(i32, [], "mov.u32 $0, %laneid;", "=r", has_side_effects=True)
        lane = arith.andi(lane, _word(BLOCK - 1))
        address = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(block)), arith.muli(warp, _word(4 * BLOCK * BLOCK)))
        one, zero = (arith.constant(f32, ir.FloatAttr.get(f32, value)) for value in (1.0, 0.0))

        def row(i: int) -> list[Any]:
            places = (arith.addi(address, _word(4 * (BLOCK * i + first))) for first in range(0, i, 4))
            return [x for place in places for x in _load_floats(place)][:i]

        def unit(i: int) -> Any:
            return arith.select(arith.cmpi(arith.CmpIPredicate.eq, lane, _word(i)), one, zero)

        utils.warp_barrier()
        column = column_of_inverse(row, unit, mlir_math.fma)
        utils.warp_barrier()
        own = arith.addi(address, _shifted(lane, -2))
        for i, value in enumerate(column):
            _store_float(arith.addi(own, _word(4 * BLOCK * i)), value)
        utils.warp_barrier()

    emit(block)


def _last(lane: Any, pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """The greatest up to each of 64 elements, two neighbours a lane; -1 where none is greater."""
    total = arith.maxsi(*pair)
    for distance in (1, 2, 4, 8, 16):
        total = arith.select(_is_from(distance, lane), arith.maxsi(_of_lane_before(total, distance), total), total)
    before = arith.select(_is_from(1, lane), _of_lane_before(total, 1), _word(-1))
    return arith.maxsi(before, pair[0]), total


def _sums(lane: Any, pair: tuple[Any, Any], firsts: tuple[Any, Any]) -> tuple[Any, Any]:
    """Of 64 elements, two neighbours a lane, from a first one on that each has, or from the very first: what lies
    before it changes no bit."""
    reaches = lambda first, element: arith.cmpi(arith.CmpIPredicate.slt, first, element)
    f32 = ir.F32Type.get()
    own, zero = _shifted(lane, -1), arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
    total = arith.addf(arith.select(reaches(firsts[1], arith.addi(own, _word(1))), pair[0], zero), pair[1])
    for distance in (1, 2, 4, 8, 16):
        covered = arith.subi(own, _word(2 * (distance - 1)))  # the first element that is in ``total`` so far
        more = arith.andi(_is_from(distance, lane), reaches(firsts[1], covered))
        total = arith.select(more, arith.addf(_of_lane_before(total, distance), total), total)
    more = arith.andi(_is_from(1, lane), reaches(firsts[0], own))
    return arith.addf(arith.select(more, _of_lane_before(total, 1), zero), pair[0]), total


def _is_from(first: int, lane: Any) -> Any:
    return arith.cmpi(arith.CmpIPredicate.sge, lane, _word(first))


def _of_lane_before(x: Any, distance: int) -> Any:
    kind = "f" if isinstance(x.type, ir.F32Type) else "r"
    text = f"shfl.sync.up.b32 $0, $1, {distance}, 0, -1;"
    return llvm.inline_asm(x.type, [x], text, f"={kind},{kind}", has_side_effects=True)


def _sum_in_warps(lines: Any, heads: int, shift: Any, valid: Any) -> None:
    """Gates and betas of a head, from ``shift`` on in their lines, become what ``_Lines`` says: a warp a head."""
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), scalar, scalar))
    def emit(_: Any, lines: Any, shift: Any, valid: Any) -> None:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        shift, valid = (x.registers.item() for x in (shift, valid))
        warp = arith.andi(_shifted(utils.thread_idx(), 5), _word(3))
        base = llvm.ptrtoint(i32, utils.memref_ptr(lines))
        place = lambda line, token: arith.addi(base, _shifted(arith.addi(_shifted(line, -6), token), -2))
        number = lambda value: arith.constant(f32, ir.FloatAttr.get(f32, value))

        def of_head(head: Any) -> None:
            lane = arith.andi(utils.thread_idx(), _word(31))
            tokens = [arith.addi(_shifted(lane, -1), _word(n)) for n in range(2)]
            inside = [arith.cmpi(arith.CmpIPredicate.slt, token, valid) for token in tokens]
            gates, betas = (
                [
                    arith.select(there, _load_float(place(line, arith.addi(token, shift))), number(0.0))
                    for token, there in zip(tokens, inside, strict=True)
                ]
                for line in (_shifted(head, -1), arith.addi(_shifted(head, -1), _word(1)))
            )
            cleared = [arith.cmpf(arith.CmpFPredicate.OLE, gate, number(CLEARS)) for gate in gates]
            kept = [arith.select(hard, number(0.0), gate) for hard, gate in zip(cleared, gates, strict=True)]
            where = [arith.select(hard, token, _word(-1)) for hard, token in zip(cleared, tokens, strict=True)]
            last = _last(lane, tuple(where))
            sums, resets = _sums(lane, tuple(kept), last), [arith.sitofp(f32, x) for x in last]
            utils.warp_barrier()
            first = _shifted(head, -1)
            for line, values in (
                (first, sums), (arith.addi(first, _word(1)), betas), (arith.addi(head, _word(2 * heads)), resets)
            ):  # fmt: skip
                for token, value in zip(tokens, values, strict=True):
                    _store_float(place(line, token), value)

        for first in range(0, heads, 4):
            head = arith.addi(warp, _word(first))
            branch = scf.IfOp(arith.cmpi(arith.CmpIPredicate.slt, head, _word(heads)))
            with ir.InsertionPoint(branch.then_block):
                of_head(head)
                scf.yield_([])

    emit(lines, shift, valid)


def _load_float(address: Any) -> Any:
    text = "ld.shared.f32 $0, [$1];"
    return llvm.inline_asm(ir.F32Type.get(), [address], text, "=f,r,~{memory}", has_side_effects=True)


def _store_float(address: Any, value: Any) -> None:
    text = "st.shared.f32 [$0], $1;"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [address, value], text, "r,f,~{memory}", has_side_effects=True)


def _load_floats(address: Any) -> list[Any]:
    """Four of shared memory."""
    f32 = ir.F32Type.get()
    words = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4), [address], "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];",
        "=f,=f,=f,=f,r,~{memory}", asm_dialect=0, has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(f32, words, [n]) for n in range(4)]


def _meet(plain: bool) -> None:
    """The warps of the block."""
    if not plain:
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def _iota(dimension: int, columns: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS, columns), dimension, layout=hopper.ACCUMULATOR)


def _row_numbers() -> Any:
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=hopper.ROW)


def _columns(row: Any, like: Any) -> Any:
    """[64] in shared memory, for each row of ``like``."""
    return lax.broadcast_in_dim(plgpu.load(row, layout=COLUMN, optimized=False), like.shape, [1])


def _row(line: Any) -> Any:
    return plgpu.load(line, layout=hopper.ROW, optimized=False)


def _lower(x: Any, other: float, plain: bool) -> Any:
    """The lower triangle of [64, 64] with its diagonal, and ``other`` above. A thread compares one number of its own
    with numbers that are known."""
    if plain:
        return jnp.where(jnp.tril(jnp.ones(x.shape, bool)), x, other)
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=hopper.ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(hopper.ACCUMULATOR,), return_type=result)
    def emit(_: Any, x: Any) -> Any:
        thread = utils.thread_idx()
        row = arith.ori(
            _shifted(arith.andi(_shifted(thread, 5), _word(3)), -4), arith.andi(_shifted(thread, 2), _word(7))
        )
        below = arith.subi(row, _shifted(arith.andi(thread, _word(3)), -1))
        other_value = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), other))
        registers = np.empty_like(x.registers)
        for number, (i, pair) in enumerate(np.ndenumerate(x.registers)):
            tile, half = divmod(number, 2)
            elements = []
            for n in range(2):
                inside = arith.cmpi(arith.CmpIPredicate.sge, below, _word(8 * (tile - half) + n))
                elements.append(arith.select(inside, vector.extract(pair, [], [n]), other_value))
            registers[i] = vector.from_elements(pair.type, elements)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return emit(x)


def _shifted(x: Any, right: int) -> Any:
    return arith.shrui(x, _word(right)) if right >= 0 else arith.shli(x, _word(-right))


def _word(value: int) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value))


def _times(x: Any, norm: Any) -> Any:
    return x if norm is None else x * norm


def _halves_in_words(x: Any, dtype: Any) -> tuple[Any, Any]:
    """The halves of two neighbours at a time."""
    result = plgpu.ShapeDtypeStruct(x.shape, dtype, layout=hopper.ACCUMULATOR)

    @plgpu.inline_mgpu(arg_types=(hopper.ACCUMULATOR,), return_type=(result, result))
    def split(_: Any, x: Any) -> Any:
        element = ir.BF16Type.get() if dtype == BF16 else ir.F16Type.get()
        high, low = np.empty_like(x.registers), np.empty_like(x.registers)
        for i, pair in np.ndenumerate(x.registers):
            high[i], low[i] = _halves_of_pair(pair, element)
        of = functools.partial(fragmented_array.FragmentedArray, _layout=x.layout, _is_signed=None)
        return of(_registers=high), of(_registers=low)

    return split(x)


def _halves_of_pair(pair: Any, element: Any) -> tuple[Any, Any]:
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    narrow, wide = ir.VectorType.get((2,), element), ir.VectorType.get((2,), f32)

    def rounded(x: Any) -> Any:
        given = [vector.extract(x, [], [n]) for n in (1, 0)]
        return llvm.inline_asm(i32, given, f"cvt.rn.{element}x2.f32 $0, $1, $2;", "=r,f,f")

    word = rounded(pair)
    if isinstance(element, ir.BF16Type):
        words = _shifted(word, -16), arith.andi(word, _word(-(1 << 16)))
        back = vector.from_elements(wide, [arith.bitcast(f32, x) for x in words])
    else:
        back = arith.extf(wide, utils.bitcast(word, narrow))
    rest = rounded(arith.subf(pair, back))
    return utils.bitcast(word, narrow), utils.bitcast(rest, narrow)


def _softplus(x: Any) -> Any:
    """log(1 + e^x) to the last digits: 2 artanh(e / (2 + e)) with e = e^-|x|, as a series."""
    e = jnp.exp(-jnp.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 17 + 0.0 * s
    for n in range(15, 0, -2):
        series = series * square + 1.0 / n
    return jnp.maximum(x, 0.0) + 2.0 * s * series
