"""Operands of the recurrence of gdn_prefill on Hopper: the kernel interpreted, against float64; what lanes do, emulated."""

import contextlib
import dataclasses
import functools
import types
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import gdn_prepare_sm90
from jax_fp8attn.pallas.common import gdn_chunks, hopper
from jax_fp8attn.pallas.common.gdn_chunks import Chunks, Prepared, chunk_list
from jax_fp8attn.pallas.gdn_prepare_sm90 import PrepareConfig

from jax_fp8attn import reference
from jax_fp8attn.problems import GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
C, D = 64, 128
RAGGED = (70, 0, 3)


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (64,)
    heads: tuple[int, int, int] = (1, 1, 1)  # of q, k and v
    before: int = 0  # rows of no sequence in front of the first
    behind: int = 0
    norm: bool = True
    packed: bool = False
    gate: str = "log"
    config: PrepareConfig | None = PrepareConfig(1)
    scale: float = 0.3

    @property
    def tokens(self) -> int:
        return self.before + sum(self.lengths) + self.behind

    @property
    def state_heads(self) -> int:
        return max(self.heads)

    def problem(self) -> Any:
        q_heads, k_heads, v_heads = self.heads
        facts = dict(
            tokens=self.tokens, sequences=len(self.lengths), q_heads=q_heads, k_heads=k_heads, v_heads=v_heads,
            k_width=D, v_width=D, dtype=BF16, out_dtype=BF16, state_dtype=F32, qk_l2norm=self.norm,
        )  # fmt: skip
        return GdnPoolProblem(**facts, pool_rows=1) if self.packed else GdnProblem(**facts, gate=self.gate)

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        start = self.before + np.cumsum([0, *self.lengths[:-1]])
        return start.astype(np.int32), np.asarray(self.lengths, np.int32)

    def inputs(self, seed: int = 0) -> Any:
        """Rows of no sequence hold NaN."""
        rng, (q_heads, k_heads, v_heads) = np.random.default_rng(seed), self.heads
        size = 1.0 if self.norm else D**-0.5
        q, k, v = (
            (rng.standard_normal((self.tokens, n, D)) * s).astype(BF16)
            for n, s in zip(self.heads, (size, size, 1.0), strict=True)
        )
        shape = self.tokens, self.state_heads
        g = -np.exp(rng.standard_normal(shape) - 2).astype(F32)
        beta = rng.uniform(0, 1, shape).astype(F32)
        a, b = (rng.standard_normal(shape).astype(BF16) for _ in range(2))
        start, length = self.ranges()
        owned = np.zeros(self.tokens, bool)
        for first, count in zip(start, length, strict=True):
            owned[first : first + count] = True
        for x in (q, k, v, g, beta, a, b):
            x[~owned] = np.nan
        scale, none = np.full(1, self.scale, F32), None
        if not self.packed:
            return GdnArrays(q, k, v, g, beta, start, length, none, none, none, scale)
        qkv = np.concatenate([x.reshape(self.tokens, -1) for x in (q, k, v)], axis=1)
        a_log, dt_bias = (rng.standard_normal((1, self.state_heads)).astype(F32) for _ in range(2))
        return GdnPoolArrays(qkv, a, b, a_log, dt_bias, *[none] * 4, start, length, none, none, scale)


def split_arrays(case: Case, arrays: Any) -> GdnArrays:
    """Packed inputs as the reference understands them, in float64."""
    if not case.packed:
        return arrays
    pool = np.zeros((1, case.state_heads, D, D), F32)
    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, arrays._replace(pool=pool, slots=np.zeros(len(case.lengths), np.int32)))
        return jax.tree.map(np.asarray, reference.gdn_prefill.unpacked(case.problem(), given))


def oracle(case: Case, arrays: Any) -> Prepared:
    """In float64, with the exact inverse."""
    arrays = split_arrays(case, arrays)
    q, k, v, g, beta = (np.asarray(x).astype(np.float64) for x in arrays[:5])
    heads, chunks = case.state_heads, case.tokens // C + len(case.lengths)
    of = lambda *shape: np.zeros((chunks, *shape))
    out = Prepared(of(heads, C, D), of(heads, C, D), of(heads, C, C), of(q.shape[1], C, D), of(k.shape[1], C, D),
                   of(heads, 2, C), np.ones((chunks, heads)))  # fmt: skip
    places = [(s + n, min(C, c - n)) for s, c in zip(*case.ranges(), strict=True) for n in range(0, c, C)]
    for n, (first, count) in enumerate(places):
        rows = slice(first, first + count)
        out.q[n, :, :count], out.k[n, :, :count] = (np.swapaxes(x[rows], 0, 1) for x in (q, k))
        for h in range(heads):
            own = [x[rows, h * x.shape[1] // heads] for x in (q, k, v, g, beta)]
            chunk_of_head(case, own, out, n, h)
    return out


def chunk_of_head(case: Case, own: list[np.ndarray], out: Prepared, n: int, h: int) -> None:
    q, k, v, g, beta = own
    count = len(q)
    rq = rk = np.ones(count)
    if case.norm:
        rq, rk = (((x * x).sum(axis=1) + 1e-6) ** -0.5 for x in (q, k))
    a = np.where(g <= -30, 0.0, np.exp(g)) if case.gate == "log" else np.where(g <= np.exp(-30.0), 0.0, g)
    decay = np.zeros((count, count))  # products of gates, not differences of sums
    for j in range(count):
        decay[j:, j] = np.cumprod(np.concatenate([[1.0], a[j + 1 :]]))
    gam = np.cumprod(a)
    kk = np.tril((k @ k.T) * rk[:, None] * rk, -1) * beta[:, None]
    xg = np.linalg.inv(np.eye(count) + kk) * decay if np.isfinite(kk).all() else np.full_like(kk, np.nan)
    out.w[n, h, :count] = (xg * (beta * gam * rk)) @ k
    out.u[n, h, :count] = (xg * beta) @ v
    out.p[n, h, :count, :count] = np.tril((q @ k.T) * (case.scale * rq)[:, None] * rk) * decay
    out.rows[n, h, 0, :count] = case.scale * gam * rq
    out.rows[n, h, 1, :count] = decay[-1] * rk
    out.total[n, h] = gam[-1]


def prepared(interpret: Any, case: Case, arrays: Any) -> Prepared:
    arrays = jax.tree.map(jnp.asarray, arrays)
    chunks = chunk_list(arrays.start, arrays.length, case.tokens)
    prepare = gdn_prepare_sm90.prepare_packed if case.packed else gdn_prepare_sm90.prepare
    return prepare(case.problem(), arrays, chunks, case.config, interpret)


def error(got: Any, wanted: np.ndarray) -> float:
    """Relative, of the whole."""
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-300))


def check(case: Case, arrays: Any = None, floor: float = 1.02, exact: float = 3e-6) -> Prepared:
    """W, U and P are as good as bfloat16 is; rows of no token are zero in everything."""
    arrays = case.inputs() if arrays is None else arrays
    got = Prepared(*run_interpreted(prepared, case, arrays))
    wanted = oracle(case, arrays)
    for name in Prepared._fields:
        one, other = (getattr(x, name) for x in (got, wanted))
        assert one.dtype == (F32 if name in ("rows", "total") else BF16)
        assert (np.asarray(one)[other == 0] == 0).all(), name
        bound = exact if name in ("rows", "total") else floor * error(other.astype(BF16), other) + 2e-5
        assert error(one, other) <= bound, (name, error(one, other), bound)
    return got


class TestChunkList:
    @pytest.mark.parametrize("lengths", [RAGGED, (64, 65, 1), (0, 0), (), (1,) * 7, (300,)])
    def test_against_a_loop(self, lengths: tuple[int, ...]) -> None:
        case = Case(lengths, before=5, behind=2)
        start, length = case.ranges() if lengths else (np.zeros(0, np.int32),) * 2
        got = jax.jit(chunk_list, static_argnums=2)(start, length, case.tokens)
        chunks = [[(s + n, min(C, c - n)) for n in range(0, c, C)] for s, c in zip(start, length, strict=True)]
        flat = [place for own in chunks for place in own]
        assert [len(own) for own in chunks] == np.asarray(got.count).tolist()
        assert np.asarray(got.first).tolist() == [sum(map(len, chunks[:b])) for b in range(len(chunks))]
        assert len(got.token) == len(got.valid) == case.tokens // C + len(lengths)
        places = list(zip(np.asarray(got.token).tolist(), np.asarray(got.valid).tolist(), strict=True))
        assert places == flat + [(0, 0)] * (len(places) - len(flat))
        assert all(x.dtype == np.int32 for x in got)


class TestInterpreted:
    @pytest.mark.parametrize(
        "case",
        [
            Case(),
            Case(RAGGED, before=3, behind=4),
        ],
        ids=str,
    )
    def test_shapes(self, case: Case) -> None:
        check(case)
