"""Operands of the recurrence of gdn_prefill on Hopper: the kernel interpreted, against float64, and lanes emulated."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable
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
from jax_fp8attn.pallas.common import hopper
from jax_fp8attn.pallas.common.backend import store
from jax_fp8attn.pallas.common.gdn_chunks import Prepared, chunk_list
from jax_fp8attn.pallas.gdn_prepare_sm90 import PrepareConfig

from jax_fp8attn import dispatch
from jax_fp8attn.problems import GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem
from jax_fp8attn.reference import gdn_prefill as reference
from jax_fp8attn.testing import assert_bitwise_equal

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
C, D = 64, 128
RAGGED = (70, 0, 3)


ONE = PrepareConfig(1)


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = (64,)
    heads: tuple[int, int, int] = (1, 1, 1)  # of q, k and v
    before: int = 0  # rows of no sequence in front of the first
    behind: int = 0
    norm: bool = True
    packed: bool = False
    gate: str = "log"
    config: PrepareConfig | None = ONE
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
        rng = np.random.default_rng(seed)
        size = 1.0 if self.norm else D**-0.5
        q, k, v = (
            (rng.standard_normal((self.tokens, n, D)) * s).astype(BF16)
            for n, s in zip(self.heads, (size, size, 1.0), strict=True)
        )
        shape = self.tokens, self.state_heads
        g = -np.exp(rng.standard_normal(shape) - 2).astype(F32)
        g = np.exp(g) if self.gate == "alpha" else g
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
        return jax.tree.map(np.asarray, reference.unpacked(case.problem(), given))


def halves(x: np.ndarray) -> np.ndarray:
    """What two halves of bfloat16 hold."""
    high = x.astype(BF16).astype(np.float64)
    return high + (x - high).astype(BF16)


def oracle(case: Case, arrays: Any, weights: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Prepared:
    """In float64, with the exact inverse; ``weights`` is what the gated inverse suffers before its products."""
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
            chunk_of_head(case, own, out, (n, h), weights)
    return out


def chunk_of_head(
    case: Case,
    own: list[np.ndarray],
    out: Prepared,
    place: tuple[int, int],
    weights: Callable[[np.ndarray], np.ndarray],
) -> None:
    q, k, v, g, beta = own
    (n, h), count = place, len(q)
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
    out.w[n, h, :count] = weights(xg * (beta * gam * rk)) @ k
    out.u[n, h, :count] = weights(xg * beta) @ v
    out.p[n, h, :count, :count] = np.tril((q @ k.T) * (case.scale * rq)[:, None] * rk) * decay
    out.rows[n, h, 0, :count] = case.scale * gam * rq
    out.rows[n, h, 1, :count] = decay[-1] * rk
    out.total[n, h] = gam[-1]


def prepared(interpret: Any, case: Case, arrays: Any) -> Prepared:
    prepare = gdn_prepare_sm90.prepare_packed if case.packed else gdn_prepare_sm90.prepare

    def run(arrays: Any) -> Prepared:
        chunks = chunk_list(arrays.start, arrays.length, case.tokens)
        return prepare(case.problem(), arrays, chunks, case.config, interpret)

    return jax.jit(run)(jax.tree.map(jnp.asarray, arrays))


def error(got: Any, wanted: np.ndarray) -> float:
    """Relative, of the whole."""
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - wanted) / max(np.linalg.norm(wanted), 1e-300))


def check(case: Case, arrays: Any = None, interpreted: bool = True) -> Prepared:
    """W, U and P are as good as bfloat16 and weights in two halves are; rows of no token are zero in everything."""
    arrays = case.inputs() if arrays is None else arrays
    run = run_interpreted if interpreted else lambda function, *x: jax.tree.map(np.asarray, function(None, *x))
    got, floor, exact = Prepared(*run(prepared, case, arrays)), 1.02, 3e-6
    wanted, near = oracle(case, arrays), oracle(case, arrays, halves)
    for name in Prepared._fields:
        one, other, rounded = (getattr(x, name) for x in (got, wanted, near))
        assert one.dtype == (F32 if name in ("rows", "total") else BF16)
        assert_no_others(case, name, np.asarray(one))
        bound = exact if name in ("rows", "total") else floor * error(rounded.astype(BF16), other) + 2e-5
        assert error(one, other) <= bound, (name, error(one, other), bound)
    return got


def assert_no_others(case: Case, name: str, x: np.ndarray) -> None:
    """Rows past the tokens of a chunk are zero, and so is what no sequence has."""
    valid = np.asarray(chunk_list(*map(jnp.asarray, case.ranges()), case.tokens).valid)
    if name == "total":
        assert (x[valid == 0] == 1).all()
        return
    row = np.arange(C)
    past = {"p": np.maximum(row[:, None], row), "rows": row}.get(name, row[:, None]) >= valid[:, None, None, None]
    assert (x[np.broadcast_to(past, x.shape)] == 0).all(), name


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


LONG = [
    Case((128,)),
    Case((64, 64), (2, 2, 4), config=PrepareConfig(2)),
    Case((66,), (2, 1, 1)),
    Case((3, 66), (4, 2, 2), config=PrepareConfig(2), norm=False, before=1),
    Case((1, 65), (1, 1, 4), config=None),
    Case((1, 7), (1, 1, 3), config=PrepareConfig(3), norm=False),
    Case(RAGGED, before=2, packed=True),
    Case((70,), (1, 1, 2), packed=True, config=PrepareConfig(2)),
    Case((0, 0), before=70),
    Case((65,), gate="alpha"),
]


class TestInterpreted:
    def test_ragged(self) -> None:
        check(Case(RAGGED, before=3, behind=4))

    @pytest.mark.slow
    @pytest.mark.parametrize("case", LONG, ids=str)
    def test_shapes(self, case: Case) -> None:
        check(case)

    @pytest.mark.slow
    def test_correlated_keys(self) -> None:
        """Errors grow in the inverse if anywhere: gates that forget little, a kind of keys a head."""
        case = Case((64,), (4, 4, 4))
        arrays = case.inputs()
        kinds, rng = ("identical", "cycling", "one direction and noise", "uniform"), np.random.default_rng(4)
        k = np.stack([keys(kind, rng).astype(BF16) for kind in kinds], axis=1)
        beta = np.tile(np.asarray([0.835, 2.0, 1.0, 1.0], F32), (C, 1))
        check(case, arrays._replace(k=k, beta=beta, g=np.full_like(beta, -1e-3)))

    @pytest.mark.slow
    def test_resets_and_great_numbers(self) -> None:
        """Gates from -30 down cut exactly: at the first and the last token, many of them, -inf; rows of any size."""
        case = Case((64,), (1, 1, 3), config=PrepareConfig(3))
        arrays = case.inputs()
        g = arrays.g.copy()
        g[[0, 20, 21, 63], 0] = -np.inf, -30.0, -1e6, -31.0
        g[np.random.default_rng(1).random(64) < 0.7, 1] = -1e4
        g[:, 2] = 0.0
        got = check(case, arrays._replace(g=g, q=arrays.q * BF16.type(1e4), k=arrays.k * BF16.type(1e-4)))
        assert (got.total[0, :2] == 0).all()
        assert got.total[0, 2] == 1
        assert (got.p[0, 0, 20:, :20] == 0).all()

    @pytest.mark.slow
    def test_nan_stays_in_its_chunk_and_head(self) -> None:
        """Other heads and chunks are as without it."""
        case = Case((70,), (1, 1, 2), config=PrepareConfig(2))
        arrays = case.inputs()
        g = arrays.g.copy()
        g[10, 1] = np.nan
        clean, got = (Prepared(*run_interpreted(prepared, case, x)) for x in (arrays, arrays._replace(g=g)))
        for name in Prepared._fields:
            one, other = (np.asarray(getattr(x, name)).astype(F32) for x in (clean, got))
            touched = np.zeros(one.shape[:2], bool)
            touched[0, -1] = name not in ("q", "k")
            np.testing.assert_array_equal(one[~touched], other[~touched])
            if name in "wup":
                assert np.isnan(other[0, 1, 10:, 0]).all()

    @pytest.mark.slow
    def test_no_tokens(self) -> None:
        case = Case((0, 0))
        got = prepared(None, case, case.inputs())
        assert got.w.shape == (2, 1, C, D)
        assert (got.total == 1).all()


def keys(kind: str, rng: np.random.Generator) -> np.ndarray:
    """[64, 128] of norm 1 unless they are normalised by the kernel."""
    one, many = rng.standard_normal((1, D)), rng.standard_normal((C, D))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    k = {
        "random": many,
        "identical": np.repeat(one, C, 0),
        "alternating": np.repeat(one, C, 0) * np.where(np.arange(C) % 2, -1, 1)[:, None],
        "cycling": np.tile(rng.standard_normal((4, D)), (C // 4, 1)),
        "one direction and noise": 3 * unit(one) + unit(many),
        "uniform": rng.uniform(0, 1, (C, D)),
    }[kind]
    return unit(k)


INVERTED = [
    ("random", None, 1.0, 3e-7),
    ("random", 1.0, 2.0, 1e-6),
    ("one direction and noise", None, 1.0, 6e-7),
    ("one direction and noise", 1.0, 1.0, 1e-6),
    ("identical", 0.835, 1.0, 5e-7),
    ("identical", 1.0, 1.0, 1e-6),
    ("identical", 2.0, 1.0, 5e-6),
    ("cycling", 1.0, 1.0, 1e-6),
    ("cycling", 2.0, 1.0, 5e-6),
    ("alternating", 1.0, 1.0, 1e-6),
    ("uniform", 1.0, 1.0, 1e-6),
    ("uniform", 2.0, 1.0, 5e-6),
]
"""Keys, beta (None: sigmoids), the keys' norm, and the largest error of the inverse."""


def matrices() -> np.ndarray:
    """A in float64, made of keys of bfloat16."""
    rng, found = np.random.default_rng(0), []
    for kind, beta, norm, _ in INVERTED:
        k = (norm * keys(kind, rng)).astype(BF16).astype(np.float64)
        weight = 1 / (1 + np.exp(-rng.standard_normal(C))) if beta is None else np.full(C, beta)
        found.append(np.tril(k @ k.T, -1) * weight[:, None])
    return np.stack(found)


def inverses(interpret: Any, a: np.ndarray, fault: str = "") -> Any:
    """(I - a)^-1 of what is below the diagonals, by the kernel's own steps."""
    kernel = gdn_prepare_sm90._Kernel(Case().problem(), PrepareConfig(1), False, interpret)

    def invert(a: Any, out: Any, block: Any, beside: Any, pairs: Any) -> None:
        n = jax.lax.axis_index("n")
        smem = types.SimpleNamespace(block=block, beside=beside.at[0], pairs=pairs.at[0])
        given = plgpu.load(a.at[n], layout=hopper.ACCUMULATOR, optimized=False)
        store(out.at[n], kernel._inverse(given, smem))

    halves = gdn_prepare_sm90._Kernel._halves
    faults = {
        "": halves,
        "one half": lambda self, x, dtype: (x.astype(dtype), jnp.zeros(x.shape, dtype)),
        "halves of bfloat16": lambda self, x, dtype: halves(self, x, jnp.bfloat16),
    }
    narrow = BF16 if "bfloat16" in fault else F16
    tiles = [hopper.tiles((1, 2, n, C, 16), narrow, 32) for n in (1, 2)]
    if interpret is not None:
        tiles = [plgpu.SMEM(x.shape, narrow) for x in tiles]
    options = {} if interpret is None else {"interpret": interpret}
    with mock.patch.object(gdn_prepare_sm90._Kernel, "_halves", faults[fault]):
        return plgpu.kernel(
            invert,
            out_type=jax.ShapeDtypeStruct(a.shape, F32),
            grid=(len(a),),
            grid_names=("n",),
            scratch_types=[plgpu.SMEM((C, 16), F32), *tiles],
            **options,
        )(jnp.asarray(a))


class TestInverse:
    @staticmethod
    def errors(fault: str = "", interpreted: bool = True) -> np.ndarray:
        a = matrices()
        above = np.triu(np.full((C, C), 7.0))  # must not matter
        given = (-a + above).astype(F32)
        got = run_interpreted(inverses, given, fault) if interpreted else np.asarray(inverses(None, given))
        assert (np.triu(got, 1) == 0).all()
        return np.array([error(x, np.linalg.inv(np.eye(C) + y)) for x, y in zip(got, a, strict=True)])

    def test_every_kind_of_keys(self) -> None:
        errors = self.errors()
        bounds = np.array([bound for *_, bound in INVERTED])
        assert (errors <= bounds).all(), list(zip(INVERTED, errors, strict=True))

    @pytest.mark.slow
    @pytest.mark.parametrize("fault", ["one half", "halves of bfloat16"])
    def test_planted_fault(self, fault: str) -> None:
        errors, bounds = self.errors(fault), np.array([bound for *_, bound in INVERTED])
        assert (errors > 3 * bounds).mean() > 0.5, errors


def faulty(interpret: Any, fault: str, case: Case, arrays: Any) -> Any:
    kernel = gdn_prepare_sm90._Kernel
    nothing = lambda *_, **__: None
    column, wait = kernel._column, plgpu.barrier_wait
    patches = {
        "": contextlib.nullcontext,
        "rows of others stay": lambda: mock.patch.object(kernel, "_await", lambda _, __, ___, there: wait(there)),
        "nothing awaited": lambda: mock.patch.object(plgpu, "barrier_wait", nothing),
        "no fence": lambda: mock.patch.object(plgpu, "commit_smem", nothing),
        "the head before is still leaving": lambda: mock.patch.object(plgpu, "wait_smem_to_gmem", nothing),
        "unused chunks stay": lambda: mock.patch.object(kernel, "_nothing", nothing),
        "first head for all": lambda: mock.patch.object(
            kernel, "_column", lambda self, name, head: column(self, name, head * 0)
        ),
        "window as chunk": lambda: mock.patch.object(
            gdn_prepare_sm90._Lines, "at", lambda self, line, shift=0: self.ref.at[gdn_prepare_sm90.pl.ds(line * C, C)]
        ),
    }
    with patches[fault]():
        return tuple(prepared(interpret, case, arrays))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "result"),
    [
        ("", "clean"),
        ("rows of others stay", "wrong result"),
        ("nothing awaited", "RaceFound"),
        ("no fence", "RaceFound"),
        ("the head before is still leaving", "RaceFound"),
        ("unused chunks stay", "wrong result"),
        ("first head for all", "wrong result"),
        ("window as chunk", "wrong result"),
    ],
)
def test_planted_fault(fault: str, result: str) -> None:
    case = Case((30, 40), (1, 1, 2), behind=4, config=PrepareConfig(2))
    arrays = case.inputs()
    assert verdict(faulty, fault, case, arrays, expected=clean_result(case)) == result


@functools.cache
def clean_result(case: Case) -> Any:
    return tuple(run_interpreted(prepared, case, case.inputs()))


class Threads:
    """What stands for MLIR: operations on arrays of a number for each of 128 threads. ``memory`` is shared memory in
    words; a warp runs in step."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.there = memory, np.ones(128, bool)
        self.thread = np.arange(128)

    def load(self, address: Any) -> np.ndarray:
        return self.memory[np.broadcast_to(address, 128) // 4 % len(self.memory)]

    def load_four(self, address: Any) -> list[np.ndarray]:
        return [self.load(address + 4 * n) for n in range(4)]

    def store(self, address: Any, value: Any) -> None:
        address, value = (np.broadcast_to(x, 128)[self.there] for x in (address, value))
        self.memory[address // 4] = value

    def lane(self, _: Any, given: list[Any], text: str, *__: Any, **___: Any) -> np.ndarray:
        assert "laneid" in text
        return self.thread % 32

    def of_lane_before(self, x: Any, distance: int) -> np.ndarray:
        lane = self.thread % 32
        return np.broadcast_to(x, 128)[np.where(lane >= distance, self.thread - distance, self.thread)]

    @contextlib.contextmanager
    def branch(self, block: Any) -> Any:
        if not isinstance(block, np.ndarray):
            yield
            return
        before, self.there = self.there, self.there & block
        yield
        self.there = before

    @contextlib.contextmanager
    def __call__(self) -> Any:
        compare = {"eq": np.equal, "slt": np.less, "sge": np.greater_equal, "OLE": np.less_equal}
        number = lambda x: types.SimpleNamespace(registers=np.array(x, object))
        two = {"addi": np.add, "subi": np.subtract, "muli": np.multiply, "andi": np.bitwise_and, "ori": np.bitwise_or,
               "addf": np.add, "maxsi": np.maximum, "shrui": np.right_shift, "shli": np.left_shift}  # fmt: skip
        arith = types.SimpleNamespace(
            **two,
            CmpIPredicate=types.SimpleNamespace(**compare),
            CmpFPredicate=types.SimpleNamespace(**compare),
            cmpi=lambda predicate, a, b: predicate(a, b),
            cmpf=lambda predicate, a, b: predicate(a, b),
            select=lambda condition, a, b: np.where(condition, a, b),
            constant=lambda _, value: value,
            sitofp=lambda _, x: np.asarray(x, F32),
        )
        ir = types.SimpleNamespace(
            F32Type=types.SimpleNamespace(get=lambda: F32),
            IntegerType=types.SimpleNamespace(get_signless=lambda _: np.int64),
            FloatAttr=types.SimpleNamespace(get=lambda _, value: F32.type(value)),
            IntegerAttr=types.SimpleNamespace(get=lambda _, value: value),
            InsertionPoint=self.branch,
        )
        replaced = {
            "arith": arith,
            "ir": ir,
            "scf": types.SimpleNamespace(
                IfOp=lambda x: types.SimpleNamespace(then_block=np.broadcast_to(x, 128)), yield_=lambda _: None
            ),
            "llvm": types.SimpleNamespace(ptrtoint=lambda _, x: 0, inline_asm=self.lane),
            "utils": types.SimpleNamespace(
                thread_idx=lambda: self.thread, memref_ptr=lambda _: 0, warp_barrier=lambda: None
            ),
            "mlir_math": types.SimpleNamespace(fma=lambda x, y, z: (np.asarray(x, np.float64) * y + z).astype(F32)),
            "vector": types.SimpleNamespace(
                extract=lambda x, _, n: x[n[0]], from_elements=lambda _, x: types.SimpleNamespace(type=None, x=x)
            ),
            "_of_lane_before": self.of_lane_before,
            "_load_float": self.load,
            "_load_floats": self.load_four,
            "_store_float": self.store,
            "fragmented_array": types.SimpleNamespace(
                FragmentedArray=lambda _registers, **_: _registers,
            ),
        }
        emit = lambda **_: lambda f: lambda *x: f(None, *(number(y) if isinstance(y, int) else y for y in x))
        with contextlib.ExitStack() as stack:
            for name, value in replaced.items():
                stack.enter_context(mock.patch.object(gdn_prepare_sm90, name, value))
            stack.enter_context(mock.patch.object(plgpu, "inline_mgpu", emit))
            yield


class TestLanes:
    """What lanes do on a GPU where the interpreter takes plain operations."""

    @pytest.mark.parametrize(("shift", "valid"), [(0, 64), (0, 5), (31, 33), (63, 1)])
    @pytest.mark.parametrize("heads", [1, 2, 3, 5])
    def test_sums_of_gates(self, heads: int, shift: int, valid: int) -> None:
        rng = np.random.default_rng(heads + shift)
        lines = np.full((3 * heads + 2) * C, np.nan, F32)
        given = rng.uniform(-2, 0, (2 * heads, C)).astype(F32)
        given[:, rng.random(C) < 0.1] = -np.inf
        given[0::2, 40] = gdn_prepare_sm90.CLEARS
        lines[: 2 * heads * C] = given.reshape(-1)
        before = lines.copy()
        with Threads(lines)():
            gdn_prepare_sm90._sum_in_warps(None, heads, shift, valid)
        for n in range(heads):
            own = lambda kind, n=n: before[(2 * n + kind) * C + shift :][:C]
            gate = np.where(np.arange(C) < valid, own(0), 0)
            hard = gate <= gdn_prepare_sm90.CLEARS
            place = lambda line: lines[line * C : (line + 1) * C]
            resets = np.maximum.accumulate(np.where(hard, np.arange(C), -1))
            summed = np.arange(C) >= resets[:, None]
            sums = np.tril(summed) @ np.where(hard, 0, gate).astype(np.float64)
            np.testing.assert_allclose(place(2 * n), sums, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(place(2 * n + 1), np.where(np.arange(C) < valid, own(1), 0))
            np.testing.assert_array_equal(place(2 * heads + n), resets)
        assert np.isnan(lines[3 * heads * C :]).all()

    @pytest.mark.parametrize("reset", [1, 6, 31, 32, 47, 62])
    def test_gates_before_a_reset_change_no_bit_behind_it(self, reset: int) -> None:
        sums = []
        for past in (-1.0, -1.1):
            lines = np.random.default_rng(reset).uniform(-2, 0, 5 * C).astype(F32)
            lines[:reset] *= F32.type(past)
            lines[reset] = -np.inf
            with Threads(lines)():
                gdn_prepare_sm90._sum_in_warps(None, 1, 0, C)
            sums.append(lines[:C])
        np.testing.assert_array_equal(*(x[reset:] for x in sums))
        assert (sums[0][:reset] != sums[1][:reset]).all()

    def test_substitution(self) -> None:
        a = np.random.default_rng(0).standard_normal((4, 16, 16)).astype(F32)
        memory = (0.3 * a).reshape(-1).copy()
        with Threads(memory)():
            gdn_prepare_sm90._substitute_in_warps(None)
        wanted = np.linalg.inv(np.eye(16) - np.tril(0.3 * a.astype(np.float64), -1))
        np.testing.assert_allclose(memory.reshape(4, 16, 16), wanted, rtol=2e-5, atol=2e-5)

    def test_lower_triangle(self) -> None:
        """A register holds two neighbours; tiles of 8 columns, and in each the rows 8 apart, follow one another."""
        shape = [n for n in gdn_prepare_sm90.fragmented_array.WGMMA_LAYOUT.registers_shape((C, C)) if n > 1]
        assert shape == [8, 2]
        thread = np.arange(128)
        registers = np.empty(shape, object)
        for tile, half in np.ndindex(*shape):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * half
            column = 8 * tile + 2 * (thread % 4)
            registers[tile, half] = Pair([1000 * row + column + n for n in range(2)])
        x = types.SimpleNamespace(registers=registers, layout=None, shape=(C, C), dtype=F32)
        with Threads(np.zeros(1))(), mock.patch.object(plgpu, "ShapeDtypeStruct", lambda *_, **__: None):
            got = gdn_prepare_sm90._lower(x, -7.0, False)
        for i in np.ndindex(*shape):
            for element, given in zip(got[i].x, registers[i], strict=True):
                row, column = divmod(given, 1000)
                np.testing.assert_array_equal(element, np.where(column <= row, given, -7))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_halves_of_a_pair(dtype: np.dtype) -> None:
    """Words of two neighbours, the first one in the lower half, as they stand in a register."""
    narrow = type("Narrow", (), {"__str__": lambda _: {BF16: "bf16", F16: "f16"}[dtype]})
    other = type("Other", (), {})
    values = np.random.default_rng(2).standard_normal((500, 2)).astype(F32) * F32.type(3)

    def packed(_: Any, given: list[Any], text: str, __: str) -> int:
        assert text == f"cvt.rn.{narrow()}x2.f32 $0, $1, $2;"
        upper, lower = (int(np.asarray(x, F32).astype(dtype).view(np.uint16)) for x in given)
        return upper << 16 | lower

    unpacked = lambda word: np.asarray([word & 0xFFFF, word >> 16], np.uint16).view(dtype).astype(F32)
    arith = types.SimpleNamespace(
        constant=lambda _, value: value & 0xFFFFFFFF,
        shli=lambda x, y: (x << y) & 0xFFFFFFFF,
        andi=lambda x, y: x & y,
        bitcast=lambda _, x: np.uint32(x).view(F32),
        extf=lambda _, word: unpacked(word),
        subf=np.subtract,
    )
    get = lambda *_: None
    replaced = {
        "arith": arith,
        "ir": types.SimpleNamespace(
            VectorType=types.SimpleNamespace(get=get), F32Type=types.SimpleNamespace(get=get),
            IntegerType=types.SimpleNamespace(get_signless=get), IntegerAttr=types.SimpleNamespace(get=lambda _, x: x),
            BF16Type=narrow if dtype == BF16 else other,
        ),
        "llvm": types.SimpleNamespace(inline_asm=packed),
        "vector": types.SimpleNamespace(extract=lambda x, _, n: x[n[0]], from_elements=lambda _, x: np.asarray(x)),
        "utils": types.SimpleNamespace(bitcast=lambda x, _: x),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(gdn_prepare_sm90, name, value))
        for pair in values:
            high, low = map(unpacked, gdn_prepare_sm90._halves_of_pair(pair, narrow()))
            np.testing.assert_array_equal(high, pair.astype(dtype).astype(F32))
            np.testing.assert_array_equal(low, (pair - high).astype(dtype).astype(F32))


class Pair(list):
    """What a register holds."""

    type = None


def test_softplus() -> None:
    x = np.concatenate([np.linspace(-100, 100, 4001), [0.0, -1e-3, 1e-3]]).astype(F32)
    wanted = np.logaddexp(x.astype(np.float64), 0)
    with np.errstate(under="ignore"):
        np.testing.assert_allclose(gdn_prepare_sm90._softplus(x), wanted, rtol=1e-6, atol=3e-38)


def test_configurations() -> None:
    problem = lambda *heads: Case(heads=heads).problem()
    assert gdn_prepare_sm90.default_config(problem(2, 2, 8)) == ONE
    for heads in (0, 9):
        with pytest.raises(ValueError, match="1 to 8"):
            PrepareConfig(heads)
    with pytest.raises(ValueError, match="no multiple"):
        case = Case(heads=(1, 1, 3), config=PrepareConfig(2))
        prepared(None, case, case.inputs())
    wide = dataclasses.replace(problem(1, 1, 1), k_width=64, dtype=F16, precision="high")
    assert len(gdn_prepare_sm90.supports(wide)) == 3
    assert gdn_prepare_sm90.supports(problem(1, 1, 1)) == ()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_lowers_for_a_gpu(packed: bool) -> None:
    """The form that is not interpreted."""
    case = Case((100, 50), (2, 2, 4), packed=packed, config=PrepareConfig(2))
    traced = jax.jit(lambda x: prepared(None, case, x)).trace(case.inputs())
    assert traced.out_info.w.shape == (4, 4, C, D)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("fp8attn_gdn_prepare_sm90") >= 1
    if packed:
        assert "stablehlo.slice" not in text


@pytest.mark.skipif(
    dispatch._describe(jax.devices()[0]).compute_capability != (9, 0), reason="needs a GPU of compute capability 9.0"
)
class TestHardware:
    """What the interpreter does not see: products, layouts, views of the same memory, lanes."""

    @pytest.mark.sanitize
    @pytest.mark.parametrize("case", [Case(RAGGED, before=3, behind=4), *LONG], ids=str)
    def test_shapes(self, case: Case) -> None:
        check(case, interpreted=False)

    def test_every_kind_of_keys(self) -> None:
        """The tensor cores' sums lose a little more than float32."""
        errors = TestInverse.errors(interpreted=False)
        bounds = np.array([bound for *_, bound in INVERTED])
        assert (errors <= 4 * bounds).all(), list(zip(INVERTED, errors, strict=True))

    def test_the_same_bits_again(self) -> None:
        case = Case((1000, 3, 700), (4, 4, 16), before=3, behind=4, packed=True, config=PrepareConfig(2))
        arrays = case.inputs()
        run = jax.jit(functools.partial(prepared, None, case))
        first = jax.tree.map(np.asarray, run(arrays))
        for _ in range(100):
            assert_bitwise_equal(jax.tree.map(np.asarray, run(arrays)), first)
