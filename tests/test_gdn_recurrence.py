"""The recurrence kernel of gdn_prefill: interpreted on a CPU, with races looked for, against a plain form, and that,
behind a plain preparation, against the reference."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import gdn_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import run_interpreted
from jax import lax
from jax_fp8attn.pallas import gdn_recurrence_sm90
from jax_fp8attn.pallas.common.gdn_chunks import CHUNK, Chunks, Prepared, chunk_list
from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig, States

from jax_fp8attn.problems import GdnProblem

BF16, F16, F32 = (np.dtype(x) for x in (jnp.bfloat16, np.float16, np.float32))
HIGHEST = lax.Precision.HIGHEST
NAN = float("nan")
BOUND = 0.006  # of o and of states, relative: all operands are rounded to bf16
STEP_BOUND = 0.004  # against the plain recurrence, which rounds alike
REGISTERS, SHARED = RecurrenceConfig(64, "registers", 3, 2), RecurrenceConfig(64, "shared", 3, 2)


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
    rows: int = 0  # of a pool

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
    given = case.inputs(seed)
    start, length = case.cu[:-1], np.diff(case.cu)
    chunks = jax.jit(chunk_list, static_argnums=2)(start, length, case.tokens)
    prepared = prepare(*given.tensors(), case.tokens, chunks)
    return given, jax.tree.map(np.asarray, chunks), jax.tree.map(np.asarray, prepared)


def expected(case: Case, seed: int = 0, initial: Any = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    given, chunks, prepared = operands(case, seed)
    if initial is None:
        initial = given.initial if case.initial else np.zeros((len(case.lengths), case.problem().heads, 128, 128))
    return recurrence(case.problem(), chunks, prepared, initial)


def relative(actual: Any, wanted: Any) -> float:
    actual, wanted = (np.asarray(x, np.float64) for x in (actual, wanted))
    scale = np.sqrt((wanted**2).sum())
    return float(np.sqrt(((actual - wanted) ** 2).sum()) / scale) if scale else float(np.abs(actual).max(initial=0))


CASES = (
    Case((128,)),
    Case((100,), initial=False),
    Case((1, 0, 65, 130), (1, 1, 3), before=5, behind=70, every=64),
    Case((200, 64), (2, 1, 1), state=BF16, layout="kv", every=128),
)


class TestPlain:
    """The contract between the two kernels leads to what the reference computes."""

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_as_the_oracle(self, case: Case) -> None:
        given, _, _ = operands(case)
        initial = given.initial if case.initial else None
        o, final, checkpoints = expected(case)
        wanted = gdn_cases.oracle(given.replace(initial=initial), every=case.every)
        gdn_cases.assert_matches((o, final, checkpoints), wanted, case.cu, BOUND, what="the plain form")

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
    op = gdn_recurrence_sm90.build(case.problem(), config, bool(case.rows), interpret)
    start, length = (jnp.asarray(x) for x in (case.cu[:-1], np.diff(case.cu)))
    given = jax.tree.map(jnp.asarray, (chunks, prepared))
    return jax.jit(op)(*given, start, length, jax.tree.map(jnp.asarray, states))


def states_of(case: Case) -> States:
    """Of the problem without a pool."""
    if not case.initial:
        return States()
    given, _, _ = operands(case)
    return States(
        gdn_cases.stored(given.initial, case.layout).astype(case.state), np.arange(len(case.lengths), dtype=np.int32)
    )


def check(case: Case, config: RecurrenceConfig, run: Any = None) -> None:
    _, chunks, prepared = operands(case)
    states = states_of(case)
    run = run or functools.partial(run_interpreted, kernel)
    got = [np.asarray(x, np.float32) for x in run(case, config, chunks, prepared, states)]
    initial = None
    if case.initial:
        initial = gdn_cases.stored(np.asarray(states.given, np.float32), case.layout)
    wanted = expected(case, initial=initial)
    compare(case, got, wanted)


def compare(case: Case, got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    rounding = lambda dtype: {BF16: 2.0**-8, F16: 2.0**-10, F32: 0.0}[dtype]
    o, final, *checkpoints = got
    owned = np.zeros(case.tokens, bool)
    for first, end in zip(case.cu[:-1], case.cu[1:], strict=True):
        owned[first:end] = True
        if end > first:
            assert relative(o[first:end], wanted[0][first:end]) < STEP_BOUND + rounding(case.out)
    assert not o[~owned].any(), "rows of no sequence"
    for mine, own in ((final, wanted[1]), *zip(checkpoints, wanted[2:], strict=False)):
        assert mine.shape == gdn_cases.stored(own, case.layout).shape
        for got_row, wanted_row in zip(mine, gdn_cases.stored(own, case.layout), strict=True):
            assert relative(got_row, wanted_row) < STEP_BOUND + rounding(case.state)


FORMS = {
    "registers 64": REGISTERS,
    "shared 32": RecurrenceConfig(32, "shared", 4, 2),
    "shared 64": SHARED,
    "shared 128": RecurrenceConfig(128, "shared", 2, 2),
}


class TestInterpreted:
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form: str) -> None:
        check(Case((130, 0, 64), (1, 1, 1), before=2, behind=3, every=64), FORMS[form])
