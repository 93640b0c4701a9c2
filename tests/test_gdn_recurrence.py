"""The recurrence kernel of gdn_prefill: interpreted on a CPU, with races looked for, against a plain form, and that,
behind a plain preparation, against the reference."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import gdn_cases
import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import run_interpreted, verdict
from jax import lax
from jax_fp8attn.pallas import gdn_recurrence_sm90
from jax_fp8attn.pallas.common.gdn_chunks import CHUNK, Chunks, Prepared, chunk_list
from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig, States, default_config

from jax_fp8attn import dispatch
from jax_fp8attn.problems import GdnProblem
from jax_fp8attn.testing import assert_bitwise_equal

BF16, F16, F32 = (np.dtype(x) for x in (jnp.bfloat16, np.float16, np.float32))
HIGHEST = lax.Precision.HIGHEST
NAN = float("nan")
BOUND = 0.006  # of o and of states, relative: all operands are rounded to bf16
STEP_BOUND = 5e-4  # against the plain recurrence, which rounds alike


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem; ``cu`` need not start at 0 or end at the last token."""

    lengths: tuple[int, ...]
    heads: tuple[int, int, int] = (1, 1, 2)  # of q, k and v
    before: int = 0
    behind: int = 0
    out: np.dtype = BF16
    state: np.dtype = F32
    layout: str = "vk"
    initial: bool = True
    every: int = 0

    @property
    def cu(self) -> np.ndarray:
        return np.cumsum([self.before, *self.lengths]).astype(np.int32)

    @property
    def tokens(self) -> int:
        return int(self.cu[-1]) + self.behind

    def problem(self) -> GdnProblem:
        hq, hk, hv = self.heads
        return GdnProblem(
            tokens=self.tokens, sequences=len(self.lengths), q_heads=hq, k_heads=hk, v_heads=hv, k_width=128,
            v_width=128, dtype=BF16, out_dtype=self.out, state_dtype=self.state, state_layout=self.layout,
            has_initial_state=self.initial, checkpoint_every=self.every,
        )  # fmt: skip

    def inputs(self, seed: int = 0) -> gdn_cases.Case:
        """NaN in tokens of no sequence."""
        case = gdn_cases.random_case(
            self.lengths, self.heads, (128, 128), tokens=self.tokens, seed=seed, dtype="bfloat16"
        )
        owned = np.zeros(self.tokens, bool)
        for first, end in zip(self.cu[:-1], self.cu[1:], strict=True):
            owned[first:end] = True
        gone = lambda x: np.where(owned.reshape(-1, *[1] * (x.ndim - 1)), x, NAN)
        changes = {name: gone(getattr(case, name)) for name in ("q", "k", "v", "g", "beta")}
        return case.replace(cu=self.cu, initial=case.initial if self.initial else None, **changes)


def head_rows(x: jax.Array, heads: int) -> jax.Array:
    return jnp.repeat(x, heads // x.shape[1], axis=1)


@functools.partial(jax.jit, static_argnums=5)
def prepare(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, tokens: int, chunks: Chunks
) -> Prepared:
    """In float32: the inverse exact, what the kernel reads rounded to bf16."""
    heads = g.shape[1]
    place = chunks.token[:, None] + jnp.arange(CHUNK)
    there = jnp.arange(CHUNK) < chunks.valid[:, None]

    def rows(x: jax.Array) -> jax.Array:
        """[N, H, 64, ...]"""
        x = x.astype(jnp.float32)[jnp.minimum(place, tokens - 1)]
        x = jnp.where(there.reshape(*there.shape, *[1] * (x.ndim - 2)), x, 0.0)
        return jnp.moveaxis(x, 2, 1)

    q, k, v, g, beta = map(rows, (q, k, v, g, beta))
    dot = functools.partial(jnp.matmul, precision=HIGHEST)
    wide_q, wide_k, wide_v = (head_rows(x, heads) for x in (q, k, v))
    c = jnp.cumsum(g, axis=-1)
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    decay = jnp.where(lower, jnp.exp(jnp.where(lower, c[..., :, None] - c[..., None, :], 0.0)), 0.0)
    kk = dot(wide_k, jnp.swapaxes(wide_k, -1, -2))
    a = jnp.where(jnp.tril(lower, -1), beta[..., None] * kk, 0.0)
    identity = jnp.broadcast_to(jnp.eye(CHUNK), a.shape)
    x = decay * jax.scipy.linalg.solve_triangular(identity + a, identity, lower=True, unit_diagonal=True)
    scale = q.shape[-1] ** -0.5
    low = lambda x: x.astype(jnp.bfloat16)
    return Prepared(
        w=low(dot(x * (beta * jnp.exp(c))[..., None, :], wide_k)),
        u=low(dot(x * beta[..., None, :], wide_v)),
        p=low(scale * dot(wide_q, jnp.swapaxes(wide_k, -1, -2)) * decay),
        q=low(q),
        k=low(k),
        rows=jnp.stack([scale * jnp.exp(c), jnp.exp(c[..., -1:] - c)], axis=2),
        total=jnp.exp(c[..., -1]),
    )


def recurrence(problem: GdnProblem, chunks: Chunks, prepared: Prepared, states: Any) -> tuple[Any, Any, Any]:
    """Plainly, of states [B, H, K, V] in float32: o [T, H, V], final states and checkpoints, unrounded."""
    heads, low = problem.heads, lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    dot = functools.partial(jnp.matmul, precision=HIGHEST)
    wide = [x.astype(jnp.float32) for x in prepared[:5]]
    w, u, p, q, k = (head_rows(x, heads) for x in wide)
    out = np.zeros((problem.tokens, heads, 128), np.float32)
    final = np.array(states, np.float32)
    checkpoints = np.zeros((problem.checkpoints, heads, 128, 128), np.float32)
    row = 0
    for b in range(problem.sequences):
        z, own = jnp.asarray(final[b]), 0
        for number in range(int(chunks.count[b])):
            n = int(chunks.first[b]) + number
            first, valid = int(chunks.token[n]), int(chunks.valid[n])
            factor, weight = prepared.rows[n, :, 0, :, None], prepared.rows[n, :, 1, :, None]
            y = u[n] - dot(w[n], low(z))
            o = factor * dot(q[n], low(z)) + dot(p[n], low(y))
            z = prepared.total[n, :, None, None] * z + dot(jnp.swapaxes(k[n], 1, 2), low(weight * y))
            out[first : first + valid] = np.swapaxes(o, 0, 1)[:valid]
            own += valid
            if problem.checkpoint_every and valid == CHUNK and own % problem.checkpoint_every == 0:
                checkpoints[row] = z
                row += 1
        final[b] = z
    return out, final, checkpoints


@functools.cache
def operands(case: Case, seed: int = 0) -> tuple[gdn_cases.Case, Chunks, Prepared]:
    """Chunks that no sequence has hold NaN."""
    given = case.inputs(seed)
    start, length = case.cu[:-1], np.diff(case.cu)
    chunks = jax.jit(chunk_list, static_argnums=2)(start, length, case.tokens)
    prepared = prepare(*given.tensors(), case.tokens, chunks)
    chunks = jax.tree.map(np.asarray, chunks)
    used = chunks.valid > 0
    gone = lambda x: np.where(used.reshape(-1, *[1] * (x.ndim - 1)), x, x.dtype.type(NAN))
    return given, chunks, Prepared(*(gone(np.asarray(x)) for x in prepared))


def expected(case: Case, initial: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    given, chunks, prepared = operands(case)
    if initial is None:
        initial = given.initial if case.initial else np.zeros((len(case.lengths), case.problem().heads, 128, 128))
    return recurrence(case.problem(), chunks, prepared, initial)


def relative(actual: Any, wanted: Any) -> float:
    actual, wanted = (np.asarray(x, np.float64) for x in (actual, wanted))
    scale = np.sqrt((wanted**2).sum())
    return float(np.sqrt(((actual - wanted) ** 2).sum()) / scale) if scale else float(np.abs(actual).max(initial=0))


class TestPlain:
    """The contract between the two kernels leads to what the reference computes."""

    @pytest.mark.parametrize(
        "case",
        [
            Case((100,), initial=False),
            Case((1, 0, 65, 130), (1, 1, 3), before=5, behind=70, every=64),
            Case((200, 64), (2, 1, 1), every=128),
        ],
        ids=str,
    )
    def test_as_the_oracle(self, case: Case) -> None:
        given, _, _ = operands(case)
        wanted = gdn_cases.oracle(given.replace(initial=given.initial if case.initial else None), every=case.every)
        gdn_cases.assert_matches(expected(case), wanted, case.cu, BOUND, what="the plain form")

    def test_chunks(self) -> None:
        start, length = np.array([3, 3, 70, 70], np.int32), np.array([0, 65, 0, 64], np.int32)
        chunks = chunk_list(jnp.asarray(start), jnp.asarray(length), 150)
        np.testing.assert_array_equal(chunks.first, [0, 0, 2, 2])
        np.testing.assert_array_equal(chunks.count, [0, 2, 0, 1])
        np.testing.assert_array_equal(chunks.token, [3, 67, 70, 0, 0, 0])
        np.testing.assert_array_equal(chunks.valid, [64, 1, 64, 0, 0, 0])
        assert chunk_list(jnp.zeros(0, jnp.int32), jnp.zeros(0, jnp.int32), 64).valid.shape == (1,)


def kernel(
    interpret: Any, case: Case, config: RecurrenceConfig, chunks: Chunks, prepared: Prepared, states: States
) -> Any:
    op = gdn_recurrence_sm90.build(case.problem(), config, states.write is not None, interpret)
    start, length = (jnp.asarray(x) for x in (case.cu[:-1], np.diff(case.cu)))
    given = jax.tree.map(jnp.asarray, (chunks, prepared))
    return jax.jit(op)(*given, start, length, jax.tree.map(jnp.asarray, states))


def states_of(case: Case) -> States:
    """Of the problem without a pool."""
    if not case.initial:
        return States()
    given, _, _ = operands(case)
    stored = gdn_cases.stored(given.initial, case.layout).astype(case.state)
    return States(stored, np.arange(len(case.lengths), dtype=np.int32))


def interpreted(case: Case, config: RecurrenceConfig, chunks: Chunks, prepared: Prepared, states: States) -> Any:
    return run_interpreted(kernel, case, config, chunks, prepared, states)


def check(case: Case, config: RecurrenceConfig, run: Any = interpreted) -> list[np.ndarray]:
    _, chunks, prepared = operands(case)
    states = states_of(case)
    got = [np.asarray(x) for x in run(case, config, chunks, prepared, states)]
    initial = gdn_cases.stored(np.asarray(states.given, np.float32), case.layout) if case.initial else None
    compare(case, got, expected(case, initial))
    return got


def compare(case: Case, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """o by sequence, states one by one."""
    rounding = {BF16: 2.0**-8, F16: 2.0**-10, F32: 0.0}
    o, *states = (np.asarray(x, np.float32) for x in got)
    owned = np.zeros(case.tokens, bool)
    for first, end in zip(case.cu[:-1], case.cu[1:], strict=True):
        owned[first:end] = True
        error = relative(o[first:end], wanted[0][first:end])
        assert error < STEP_BOUND + rounding[case.out], (first, end, error)
    assert not o[~owned].any(), "rows of no sequence"
    for mine, own in zip(states, wanted[1:], strict=False):
        own = gdn_cases.stored(own, case.layout)
        assert mine.shape == own.shape
        for number in range(len(own)):
            error = relative(mine[number], own[number])
            assert error < STEP_BOUND + rounding[case.state], (number, error)


FORMS = {
    "registers": RecurrenceConfig(64, "registers", 3, 2),
    "shared 32": RecurrenceConfig(32, "shared", 4, 2),
    "shared 64": RecurrenceConfig(64, "shared", 2, 3),
    "shared 128": RecurrenceConfig(128, "shared", 2, 2),
}
TWO = ("registers", "shared 32")


class TestInterpreted:
    @pytest.mark.parametrize(
        "form", [*TWO, *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS if form not in TWO)]
    )
    def test_forms(self, form: str) -> None:
        check(Case((70, 0), (1, 1, 1), before=1, behind=2, every=64), FORMS[form])

    @pytest.mark.slow
    @pytest.mark.parametrize("form", TWO)
    @pytest.mark.parametrize(
        "case",
        [
            Case((340,), (1, 1, 1), initial=False, every=128),
            Case((1, 0, 65), (1, 1, 3), before=5, behind=70, state=BF16, out=F32, layout="kv", every=64),
            Case((64, 128), (2, 1, 1), out=F16, layout="kv"),
            Case((0, 0), (1, 1, 1), behind=66, every=64),
        ],
        ids=str,
    )
    def test_shapes(self, case: Case, form: str) -> None:
        """More chunks than stages, tails, empty sequences, heads that share, layouts and types."""
        check(case, FORMS[form])

    @pytest.mark.slow
    def test_a_sequence_alone(self) -> None:
        """The same bits as beside others."""
        case = Case((30, 150, 64), (1, 1, 1), before=3)
        out, final = check(case, FORMS["registers"])
        _, chunks, prepared = operands(case)
        rows, own = slice(33, 183), slice(1, 4)
        alone = Case((150,), (1, 1, 1))
        mine = Chunks(chunks.first[:1] * 0, chunks.count[1:2], chunks.token[own] - 33, chunks.valid[own])
        states = States(states_of(case).given[1:2], np.zeros(1, np.int32))
        part = Prepared(*(x[own] for x in prepared))
        got = interpreted(alone, FORMS["registers"], mine, part, states)
        assert_bitwise_equal(np.asarray(got[0]), out[rows])
        assert_bitwise_equal(np.asarray(got[1]), final[1:2])


POOL = Case((65, 0, 1, 64, 3), (1, 1, 1), behind=1)
READ, WRITE = (2, 0, -1, 6, 3), (2, 0, 1, 7, -(2**31))


def pool_of(case: Case) -> np.ndarray:
    """Rows that nobody reads hold NaN."""
    pool = np.random.default_rng(3).standard_normal((6, *case.problem().state_shape)).astype(case.state)
    pool[[1, 4, 5]] = NAN
    return pool


class TestPool:
    @pytest.mark.parametrize("form", [TWO[0], *(pytest.param(form, marks=pytest.mark.slow) for form in TWO[1:])])
    @pytest.mark.parametrize(
        "case",
        [
            dataclasses.replace(POOL, layout="kv"),
            pytest.param(dataclasses.replace(POOL, state=BF16, every=64), marks=pytest.mark.slow),
        ],
        ids=lambda case: f"{case.layout} {case.state}",
    )
    def test_rows(self, case: Case, form: str) -> None:
        """Rows by number: what is no row starts from zero and is not written; others stay as they are."""
        _, chunks, prepared = operands(case)
        pool = pool_of(case)
        states = States(pool, np.array(READ, np.int32), np.array(WRITE, np.int32))
        got = [np.asarray(x) for x in interpreted(case, FORMS[form], chunks, prepared, states)]
        there = lambda row: 0 <= row < len(pool)
        zero = np.zeros(case.problem().state_shape, np.float32)
        initial = np.stack([pool[row].astype(np.float32) if there(row) else zero for row in READ])
        wanted = expected(case, gdn_cases.stored(initial, case.layout))
        final = np.array(got[1])
        written = [(b, row) for b, row in enumerate(WRITE) if there(row)]
        own = np.stack([final[row] for _, row in written])

        compare(case, [got[0], own], [wanted[0], wanted[1][[b for b, _ in written]]])
        for row in set(range(len(pool))) - {row for _, row in written}:
            assert_bitwise_equal(final[row], pool[row])
        if case.every:
            compare(case, [got[0], got[2]], [wanted[0], wanted[2]])


def transition(
    interpret: Any, case: Case, config: RecurrenceConfig, chunks: Chunks, prepared: Prepared
) -> tuple[Any, Any]:
    problem = dataclasses.replace(case.problem(), transition=True)
    op = gdn_recurrence_sm90.build(problem, config, interpret=interpret)
    start, length = (jnp.asarray(x) for x in (case.cu[:-1], np.diff(case.cu)))
    return jax.jit(op)(*jax.tree.map(jnp.asarray, (chunks, prepared)), start, length, States())


class TestTransition:
    @pytest.mark.slow
    @pytest.mark.parametrize("form", TWO)
    def test_columns(self, form: str) -> None:
        """M is what becomes of the identity without U, N of 0 with it."""
        case = Case((200, 0), (1, 1, 1))
        _, chunks, prepared = operands(case)
        without = prepared._replace(q=prepared.q * NAN, p=prepared.p * NAN)
        m, n = run_interpreted(transition, case, FORMS[form], chunks, without)
        start = np.zeros((2, 1, 128, 128), np.float32)
        wanted = recurrence(case.problem(), chunks, prepared, start)[1]
        assert relative(n, wanted) < STEP_BOUND
        still = prepared._replace(u=np.zeros_like(prepared.u))
        wanted = recurrence(case.problem(), chunks, still, start + np.eye(128, dtype=np.float32))[1]
        assert relative(m, wanted) < STEP_BOUND


def faulty(interpret: Any, fault: str, case: Case, form: str, pool: bool = False) -> Any:
    """The kernel with one thing replaced."""
    chain, outputs, module = gdn_recurrence_sm90._Chain, gdn_recurrence_sm90._Outputs, gdn_recurrence_sm90
    replace = mock.patch.object
    load, hand_state, hand_values = chain._load, chain._hand_state, chain._hand_values
    table, store_rows = module._table, outputs._store_rows

    def field(name: str, change: Any) -> Any:
        def changed(*arguments: Any) -> Any:
            facts = table(*arguments)
            column = module.FIELDS.index(name)
            return facts.at[:, column].set(change(facts[:, column]))

        return replace(module, "_table", changed)

    def early(self: Any, low: list[Any]) -> None:
        """The state is written before the outputs have used the one before."""
        wait = plgpu.barrier_wait
        with replace(plgpu, "barrier_wait", lambda *_: None), replace(plgpu, "barrier_arrive", lambda *_: None):
            hand_state(self, low)
        wait(self.smem.z_free)
        plgpu.barrier_arrive(self.smem.z_there)

    def late(self: Any, new: Any) -> None:
        """The new values are written after the outputs are told."""
        plgpu.barrier_wait(self.smem.y_free)
        plgpu.barrier_arrive(self.smem.y_there)
        with replace(plgpu, "barrier_wait", lambda *_: None), replace(plgpu, "barrier_arrive", lambda *_: None):
            hand_values(self, new)

    def hasty(self: Any, number: Any) -> None:
        """A chunk is loaded to where the current one is."""
        pl.when(number == 0)(lambda: load(self, 2))
        pl.when(number + 3 < self.place.chunks)(lambda: load(self, number + 3))

    patches = {
        "none": contextlib.nullcontext,
        "no wait at all": lambda: replace(plgpu, "barrier_wait", lambda *_: None),
        "state before it is free": lambda: replace(chain, "_hand_state", early),
        "values too late": lambda: replace(chain, "_hand_values", late),
        "refilled too early": lambda: replace(chain, "_refill", hasty),
        "whole chunks stored": lambda: replace(
            outputs, "_store_rows", lambda self, first, _: store_rows(self, first, jnp.int32(CHUNK))
        ),
        "no decay": lambda: replace(chain, "_total", lambda self, _: jnp.float32(1.0)),
        "decay of the first chunk": lambda: replace(
            chain, "_total", lambda self, _: self.gmem.total[self.place.chunk, self.place.head]
        ),
        "gaps left": lambda: replace(outputs, "_clear_gaps", lambda _: None),
        "rows clamped": lambda: field("read", lambda row: jnp.maximum(row, 0)),
        "late checkpoint": lambda: field("checkpoint", lambda row: row + 1),
    }
    _, chunks, prepared = operands(case)
    states = states_of(case)
    if pool:
        states = States(pool_of(case), np.array(READ, np.int32), np.array(WRITE, np.int32))
    with patches[fault]():
        return kernel(interpret, case, FORMS[form], chunks, prepared, states)


@functools.cache
def sound(case: Case, form: str, pool: bool) -> Any:
    return run_interpreted(faulty, "none", case, form, pool)


@pytest.mark.slow
class TestFaulty:
    """The gate sees this kernel: faults planted in it are reported."""

    @pytest.mark.parametrize(
        ("fault", "result", "form"),
        [
            ("none", "clean", "registers"),
            ("no wait at all", "RaceFound", "registers"),
            ("state before it is free", "RaceFound", "registers"),
            ("state before it is free", "RaceFound", "shared 32"),
            ("values too late", "RaceFound", "registers"),
            ("values too late", "RaceFound", "shared 32"),
            ("refilled too early", "RaceFound", "registers"),
            ("whole chunks stored", "RaceFound", "registers"),
            ("no decay", "wrong result", "registers"),
            ("decay of the first chunk", "wrong result", "registers"),
            ("gaps left", "wrong result", "registers"),
            ("late checkpoint", "OutOfBounds", "registers"),
        ],
    )
    def test_planted_fault(self, fault: str, result: str, form: str) -> None:
        lengths = (65, 3) if fault == "whole chunks stored" else (200,)
        case = Case(lengths, (1, 1, 1), behind=3, every=128)
        assert verdict(faulty, fault, case, form, expected=sound(case, form, False)) == result

    def test_rows_clamped(self) -> None:
        case = dataclasses.replace(POOL, lengths=(1, 2, 1, 3, 1), behind=0)
        assert verdict(faulty, "rows clamped", case, TWO[0], True, expected=sound(case, TWO[0], True)) == "wrong result"


class TestConfig:
    @pytest.mark.parametrize(
        ("sequences", "heads", "columns", "form"),
        [(1, 8, 32, "shared"), (1, 33, 32, "shared"), (1, 34, 64, "registers"), (2, 33, 64, "registers"),
         (1, 67, 128, "shared"), (8, 32, 128, "shared")],
    )  # fmt: skip
    @pytest.mark.parametrize("out", [BF16, F32], ids=str)
    def test_heuristic(self, sequences: int, heads: int, columns: int, form: str, out: np.dtype) -> None:
        """Outputs of 128 columns in float32 do not fit."""
        problem = dataclasses.replace(Case((64,) * sequences, (1, 1, heads)).problem(), out_dtype=out)
        config = default_config(problem)
        wanted = (64, "registers") if out == F32 and columns == 128 else (columns, form)
        assert (config.columns, config.form) == wanted
        assert config.shared_memory(out.itemsize) <= gdn_recurrence_sm90.MEMORY

    @pytest.mark.parametrize(
        ("faults", "message"),
        [
            ({"columns": 48}, "columns"),
            ({"form": "both"}, "form"),
            ({"columns": 128}, "64 columns"),
            ({"stages": 1}, "two stages"),
            ({"stages": 5}, "shared memory"),
        ],
    )
    def test_faulty(self, faults: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RecurrenceConfig(**faults)

    def test_float32_outputs_take_more(self) -> None:
        config = RecurrenceConfig(64, "registers", 3, 3)
        with pytest.raises(ValueError, match="shared memory"):
            gdn_recurrence_sm90.build(Case((64,), out=F32).problem(), config)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_lowers_for_a_gpu(form: str) -> None:
    case = Case((70, 64), (1, 1, 3), every=64, layout="kv")
    _, chunks, prepared = operands(case)
    function = lambda *given: kernel(None, case, FORMS[form], *given)
    lowered = jax.jit(function).trace(chunks, prepared, states_of(case)).lower(lowering_platforms=("cuda",))
    assert "fp8attn_gdn_recurrence_sm90" in lowered.as_text()


@functools.cache
def compiled(case: Case, config: RecurrenceConfig) -> Any:
    return jax.jit(lambda *given: kernel(None, case, config, *given))


def on_hardware(case: Case, config: RecurrenceConfig, *given: Any) -> Any:
    return compiled(case, config)(*given)


@pytest.mark.skipif(
    dispatch._describe(jax.devices()[0]).compute_capability != (9, 0), reason="needs a GPU of compute capability 9.0"
)
class TestHardware:
    """What the products read is not seen by the interpreter: values, and the same bits each time."""

    @pytest.mark.sanitize
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("layout", ["vk", "kv"])
    def test_values(self, form: str, layout: str) -> None:
        check(Case((1, 0, 65, 700), (1, 1, 3), before=5, behind=70, layout=layout, every=64), FORMS[form], on_hardware)

    @pytest.mark.parametrize("form", FORMS)
    def test_same_bits(self, form: str) -> None:
        case = Case((1500, 300), (2, 2, 8))
        _, chunks, prepared = operands(case)
        run = compiled(case, FORMS[form])
        given = jax.device_put((chunks, prepared, states_of(case)))
        first = jax.tree.map(np.asarray, run(*given))
        for _ in range(100):
            assert_bitwise_equal(jax.tree.map(np.asarray, run(*given)), first)
