"""V transposed for mla_prefill on Hopper, bit for bit: the kernel interpreted, and what a lane does emulated."""

import contextlib
import dataclasses
import types
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import mla_prepare_sm90
from jax_fp8attn.pallas.common import tile_list
from jax_fp8attn.pallas.common.hopper import KEY_GROUP, KEY_ORDER
from jax_fp8attn.pallas.mla_prepare_sm90 import NEVER, PrepareConfig

from jax_fp8attn import dispatch
from jax_fp8attn.problems import MlaProblem
from jax_fp8attn.quantize import to_stored
from jax_fp8attn.testing import assert_bitwise_equal

E4M3, BF16, F16, F32 = (np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float16, np.float32))
NAN, INF = np.nan, np.inf
ODD = 0.2718281  # no quotient by it is a tie between two codes: XLA's division on a CPU is not always exact
ALIGN = 128
RAGGED = (0, 1, 7, 128, 129, 300)


@dataclasses.dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    heads: int = 2
    dtype: np.dtype = E4M3
    before: int = 3  # rows of no sequence in front of the first
    behind: int = 5
    scales: tuple[float, ...] = (1.0,)  # of the instances: each has the same lengths

    def problem(self) -> MlaProblem:
        keys = len(self.scales) * (self.before + sum(self.lengths) + self.behind)
        return MlaProblem(
            tokens=keys, keys=keys, sequences=len(self.lengths) * len(self.scales), heads=self.heads, q_dtype=E4M3,
            k_dtype=E4M3, v_dtype=self.dtype, out_dtype=BF16, instances=len(self.scales),
        )  # fmt: skip

    def ranges(self) -> tuple[np.ndarray, np.ndarray]:
        size = self.problem().keys // len(self.scales)
        start = np.cumsum([self.before, *self.lengths[:-1]])
        starts = np.concatenate([start + n * size for n in range(len(self.scales))])
        return starts.astype(np.int32), np.tile(self.lengths, len(self.scales)).astype(np.int32)

    def values(self, seed: int = 0) -> np.ndarray:
        """Every code for e4m3 but NaN; for others values up to overflow. Rows of no sequence hold NaN."""
        rng, problem = np.random.default_rng(seed), self.problem()
        shape = (problem.keys, self.heads, 128)
        if self.dtype == E4M3:
            codes = rng.integers(0, 127, shape) + 128 * rng.integers(0, 2, shape)
            v = codes.astype(np.uint8).view(E4M3)
        else:
            v = (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, shape)).astype(self.dtype)
            v[rng.random(shape) < 0.01] = INF
        owned = np.zeros(problem.keys, bool)
        for start, length in zip(*self.ranges(), strict=True):
            owned[start : start + length] = True
        v[~owned] = NAN
        return v


class Regions(NamedTuple):
    """Where the columns of each sequence's V^T stand."""

    first: jax.Array  # int32 [B], multiples of the alignment
    source: jax.Array  # int32 [columns]: the key of each column, -1 for padding
    local: jax.Array  # int32 [columns]: its number in the sequence
    owner: jax.Array  # int32 [columns]: the sequence


def key_regions(k_start: jax.Array, k_length: jax.Array, keys: int, align: int) -> Regions:
    """A region a sequence, whole multiples of ``align`` columns; keys in KEY_ORDER inside each group of 16."""
    sequences = k_start.shape[0]
    blocks = -(-k_length // align)
    last = jnp.cumsum(blocks) * align
    first = last - blocks * align
    columns = (-(-keys // align) + sequences) * align
    column = np.arange(columns, dtype=np.int32)
    ordered = column // KEY_GROUP * KEY_GROUP + np.asarray(KEY_ORDER, np.int32)[column % KEY_GROUP]
    sequence = jnp.minimum(jnp.searchsorted(last, column, side="right"), sequences - 1)
    local = ordered - first[sequence]
    inside = (local >= 0) & (local < k_length[sequence])
    return Regions(first.astype(jnp.int32), jnp.where(inside, k_start[sequence] + local, -1), local, sequence)


def transposed_values(v: jax.Array, regions: Regions, align: int) -> tuple[jax.Array, jax.Array]:
    """(v [S, H, 128] as [H, 128, columns] with 0 for padding and for NaN; int32 [B, H, 128]: the first key of each
    sequence that holds NaN in a column, or the largest int32)."""
    there = (regions.source >= 0)[:, None, None]
    rows = jnp.where(there, v[jnp.maximum(regions.source, 0)], jnp.zeros((), v.dtype))
    bad = jnp.isnan(rows)
    local = jnp.where(bad, regions.local[:, None, None], NEVER)
    block = local.reshape(-1, align, *v.shape[1:]).min(axis=1)  # [blocks, H, 128]
    owner = regions.owner[::align]
    first_nan = jax.ops.segment_min(block, owner, num_segments=regions.first.shape[0])
    return jnp.where(bad, jnp.zeros((), v.dtype), rows).transpose(1, 2, 0), first_nan


def expected(case: Case, v: Any, scales: Any = None) -> tuple[Any, Any]:
    regions = key_regions(*map(jnp.asarray, case.ranges()), case.problem().keys, ALIGN)
    scales = jnp.asarray(case.scales, jnp.float32) if scales is None else scales
    return transposed_values(plain_cast(jnp.asarray(v), scales), regions, ALIGN)


def plain_cast(x: jax.Array, scale: jax.Array, interpret: Any = None) -> jax.Array:
    """In place of ``mla_prepare_sm90.cast``."""
    rows = jnp.repeat(scale, x.shape[0] // len(scale), total_repeat_length=x.shape[0])
    return to_stored(x, rows.reshape(-1, *[1] * (x.ndim - 1)))


def plain_values(
    problem: MlaProblem, v: jax.Array, scale: jax.Array, blocks: tile_list.KeyBlocks, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """In place of ``mla_prepare_sm90.prepare_values``."""
    first_key, count, local, owner = blocks.blocks.T
    column = np.arange(ALIGN)
    order = column // KEY_GROUP * KEY_GROUP + np.asarray(KEY_ORDER)[column % KEY_GROUP]
    source = jnp.where(order < count[:, None], first_key[:, None] + order, -1)
    facts = (source.reshape(-1), (local[:, None] + order).reshape(-1), jnp.repeat(owner, ALIGN))
    return transposed_values(plain_cast(v, scale), Regions(blocks.first, *facts), ALIGN)


def prepared(interpret: Any, case: Case, v: np.ndarray, config: PrepareConfig | None = None) -> Any:
    problem = case.problem()

    def run(v: jax.Array, scales: jax.Array, start: jax.Array, length: jax.Array) -> Any:
        blocks = tile_list.key_blocks(start, length, problem.keys, ALIGN)
        return mla_prepare_sm90.prepare_values(problem, v, scales, blocks, config, interpret)

    return jax.jit(run)(jnp.asarray(v), jnp.asarray(case.scales, jnp.float32), *map(jnp.asarray, case.ranges()))


def check(case: Case, v: np.ndarray | None = None, config: PrepareConfig | None = None) -> Any:
    v = case.values() if v is None else v
    result = run_interpreted(prepared, case, v, config)
    for got, wanted in zip(result, expected(case, v), strict=True):
        assert_bitwise_equal(got, np.asarray(wanted))
    return result


class TestKeyBlocks:
    @pytest.mark.parametrize("lengths", [RAGGED, (256,), (0, 0), (0, 300, 0), (1,) * 40])
    def test_equal_to_the_regions(self, lengths: tuple[int, ...]) -> None:
        case = Case(lengths)
        start, length = map(jnp.asarray, case.ranges())
        keys = case.problem().keys
        blocks, regions = (f(start, length, keys, ALIGN) for f in (tile_list.key_blocks, key_regions))
        first_key, count, local, owner = np.asarray(blocks.blocks).T
        source = np.asarray(regions.source).reshape(-1, ALIGN)
        assert_bitwise_equal(blocks.first, regions.first)
        assert_bitwise_equal(count, (source >= 0).sum(axis=1).astype(np.int32))
        assert_bitwise_equal(first_key, np.maximum(source[:, 0], 0))
        assert_bitwise_equal(owner, np.asarray(regions.owner)[::ALIGN])
        assert_bitwise_equal(local[count > 0], np.asarray(regions.local)[::ALIGN][count > 0])


class TestInterpreted:
    @pytest.mark.parametrize(
        "case",
        [
            Case((256,), before=0, behind=0),
            Case((1,), before=0, behind=0, heads=1),
            Case((130,), before=0, behind=0, heads=3, dtype=BF16),
            Case(RAGGED),
            Case(RAGGED, dtype=BF16),
            Case(RAGGED, dtype=F16, heads=1),
            Case(RAGGED, dtype=F32, heads=1),
            Case((0, 0), heads=1),
            Case((7, 0, 150), dtype=BF16, scales=(ODD, 2.0), heads=1),
        ],
        ids=lambda c: f"{c.lengths}-{c.heads}-{c.dtype}-{len(c.scales)}",
    )
    def test_shapes(self, case: Case) -> None:
        check(case)

    @pytest.mark.parametrize("config", [PrepareConfig(heads=2, groups=2), PrepareConfig(heads=4, groups=8)])
    @pytest.mark.parametrize("heads", [3, 4])
    def test_configurations(self, config: PrepareConfig, heads: int) -> None:
        """Heads that fill no block are taken one by one."""
        check(Case((129, 20), heads), config=config)

    @pytest.mark.parametrize("scale", [0.007, -3.0, 0.0, INF, NAN, 1e-40])
    def test_any_scale(self, scale: float) -> None:
        case = Case((40,), heads=1, dtype=BF16, scales=(scale,))
        v = case.values()
        v[10, 0, 5] = NAN
        check(case, v)

    @pytest.mark.parametrize("dtype", [E4M3, BF16], ids=str)
    def test_nan(self, dtype: np.dtype) -> None:
        """In first, last and neighbouring keys, twice in a column, in two blocks of a sequence, of either sign."""
        case = Case((130, 5, 300), dtype=dtype)
        v = case.values()
        for key, head, value in (
            (3, 0, 0), (132, 0, 0), (132, 1, 127), (133, 1, 127), (137, 0, 64), (139, 0, 64),
            (138 + 299, 1, 1), (138 + 127, 1, 2), (138 + 128, 1, 2), (138 + 200, 0, 3), (138 + 201, 0, 3),
        ):  # fmt: skip
            v[key, head, value] = NAN
        v[300, 0] = np.array([0xFF], np.uint8).view(E4M3)[0] if dtype == E4M3 else np.array(-NAN, np.float32)
        values, first_nan = check(case, v)
        assert not np.isnan(values.astype(np.float32)).any()
        assert first_nan[0, 0, 0] == 0 and first_nan[0, 1, 127] == 129 and first_nan[1, 0, 64] == 4
        assert first_nan[2, 1, 1] == 299 and first_nan[2, 1, 2] == 127 and first_nan[2, 0, 3] == 162
        assert first_nan[1, 1, 0] == NEVER


def faulty(interpret: Any, fault: str, case: Case, v: np.ndarray) -> Any:
    """The kernel with one thing replaced."""
    transpose = mla_prepare_sm90._Kernel._transpose

    def with_tile(**facts: Any) -> Any:
        def replaced(self: Any, refs: Any, tile: Any, *rest: Any) -> None:
            change = {name: f(tile) for name, f in facts.items()}
            transpose(self, refs, tile._replace(**change), *rest)

        return mock.patch.object(mla_prepare_sm90._Kernel, "_transpose", replaced)

    module = mla_prepare_sm90
    patches = {
        "none": contextlib.nullcontext,
        "no wait for the rows": lambda: mock.patch.object(plgpu, "barrier_wait", lambda *_: None),
        "keys in their order": lambda: mock.patch.object(module, "_in_key_order", lambda codes: codes),
        "NaN kept": lambda: mock.patch.object(module, "_without", lambda codes, gone: codes),
        "keys behind the last kept": lambda: with_tile(keys=lambda tile: tile.keys * 0 + 128),
        "numbers of the block": lambda: with_tile(local=lambda tile: tile.local * 0),
        "one head for all": lambda: with_tile(head=lambda tile: tile.head * 0),
    }
    with patches[fault]():
        return prepared(interpret, case, v)


class TestFaulty:
    """The gate sees this kernel: faults planted in it are reported."""

    @pytest.mark.parametrize(
        ("fault", "result"),
        [
            ("none", "clean"),
            ("no wait for the rows", "RaceFound"),
            ("keys in their order", "wrong result"),
            ("NaN kept", "wrong result"),
            ("keys behind the last kept", "wrong result"),
            ("numbers of the block", "wrong result"),
            ("one head for all", "RaceFound"),
        ],
    )
    def test_planted_fault(self, fault: str, result: str) -> None:
        case = Case((150, 20), dtype=BF16)
        v = case.values()
        v[3 + 140, 1, 7] = NAN
        wanted = tuple(map(np.asarray, expected(case, v)))
        assert verdict(faulty, fault, case, v, expected=wanted) == result


def cast(interpret: Any, x: np.ndarray, scale: np.ndarray, fault: str = "") -> Any:
    piece = mla_prepare_sm90.PIECE
    patches = {
        "": contextlib.nullcontext,
        "one scale for all": lambda: mock.patch.object(mla_prepare_sm90.lax, "div", lambda a, _: a * 0),
        "past the end": lambda: mock.patch.object(mla_prepare_sm90.lax, "axis_index", lambda _: piece),
        "no saturation": lambda: mock.patch.object(mla_prepare_sm90, "_codes", lambda x, _: x.astype(E4M3)),
    }
    with patches[fault]():
        return mla_prepare_sm90.cast(jnp.asarray(x), jnp.asarray(scale), interpret)


class TestCast:
    @staticmethod
    def values(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        rng = np.random.default_rng(1)
        x = (rng.standard_normal(shape) * 2.0 ** rng.integers(-14, 13, shape)).astype(dtype)
        for odd in (INF, -INF, NAN, -NAN, 0.0, -0.0):
            x[rng.random(shape) < 0.01] = odd
        return x

    @pytest.mark.parametrize(
        ("shape", "dtype", "scales", "kernels"),
        [
            ((64, 2, 192), BF16, (1.0,), 1),
            ((64, 64), F32, (ODD,), 1),
            ((32, 3, 192), F16, (ODD, -2.0), 1),
            ((32, 1, 64), BF16, (NAN, 0.0), 1),
            ((5, 3, 192), BF16, (ODD,), 0),
            ((6, 3, 192), F32, (ODD, 2.0), 0),
            ((0, 3, 192), BF16, (ODD,), 0),
            ((64, 1, 192), E4M3, (ODD,), 0),
        ],
    )
    def test_as_xla_casts(
        self, shape: tuple[int, ...], dtype: np.dtype, scales: tuple[float, ...], kernels: int
    ) -> None:
        """Sizes that fill no piece are left to XLA."""
        x, scale = self.values(shape, dtype), np.asarray(scales, np.float32)
        rows = np.repeat(scale, shape[0] // len(scales)).reshape(-1, *[1] * (len(shape) - 1))
        got = run_interpreted(cast, x, scale, kernels=kernels)
        assert_bitwise_equal(got, np.asarray(to_stored(jnp.asarray(x), rows)))

    @pytest.mark.parametrize(
        ("fault", "result"),
        [
            ("", "clean"),
            ("one scale for all", "wrong result"),
            ("past the end", "OutOfBounds"),
            ("no saturation", "wrong result"),
        ],
    )
    def test_planted_fault(self, fault: str, result: str) -> None:
        x, scale = self.values((32, 2, 192), BF16), np.asarray([ODD, 2.0], np.float32)
        rows = np.repeat(scale, 16)[:, None, None]
        wanted = np.asarray(to_stored(jnp.asarray(x), rows))
        assert verdict(cast, x, scale, fault, expected=wanted) == result


class TestLane:
    """What stands for the interpreter in plain terms is done in words on a GPU: the same words, in integers."""

    @pytest.mark.parametrize("left", [200, 16, 15, 9, 8, 1, 0, -16])
    @pytest.mark.parametrize("groups", [2, 4, 8])
    def test_words(self, groups: int, left: int) -> None:
        rng = np.random.default_rng(left + 100)
        codes = rng.integers(0, 256, (16, 8)).astype(np.uint8)
        codes[rng.random(codes.shape) < 0.1] = 0x7F
        rows = [[int(word) for word in row] for row in codes.view("<u4")]
        array = types.SimpleNamespace(registers=np.empty(16, object))
        array.registers[:] = rows
        thread = 77
        warp, lane = divmod(thread, 32)
        group, value = warp // (groups // 2) * groups + lane % groups, warp % (groups // 2) * (32 // groups) * 8
        value += lane // groups * 8
        notes: list[tuple[int, int]] = []
        with emulated(thread):
            own = mla_prepare_sm90._Lane(groups, max(0, 16 * group + left), 256, 0, 0, None)
            with mock.patch.object(
                mla_prepare_sm90._Lane, "_minimum", lambda _, value, key: notes.append((value, key))
            ):
                words = own.without_nan(mla_prepare_sm90._transposed_codes(array))
        got = np.array(words, "<u4").view(np.uint8)
        nan = codes & 0x7F == 0x7F
        there = np.arange(16)[:, None] < max(0, 16 * group + left) - 16 * group
        wanted = np.where(nan | ~there, 0, codes)[list(KEY_ORDER)].T
        np.testing.assert_array_equal(got, wanted)
        number = np.where(nan & there, np.arange(16)[:, None] + 256 + 16 * group, NEVER).min(axis=0)
        assert notes == [(value + n, key) for n, key in enumerate(number)]


@contextlib.contextmanager
def emulated(thread: int) -> Any:
    """MLIR's operations as operations on integers; a branch is always taken."""
    signed = lambda x: x - (1 << 32) if x >> 31 else x
    word = lambda x: x & 0xFFFFFFFF

    def prmt(a: int, b: int, selector: int) -> int:
        pool = [(x >> (8 * n)) & 0xFF for x in (a, b) for n in range(4)]
        picked = [(pool[s & 7], s & 8) for s in ((selector >> (4 * n)) & 15 for n in range(4))]
        return sum(((0xFF * (x >> 7)) if sign else x) << (8 * n) for n, (x, sign) in enumerate(picked))

    arith = types.SimpleNamespace(
        CmpIPredicate=types.SimpleNamespace(sgt=lambda a, b: signed(a) > signed(b), ne=lambda a, b: a != b),
        cmpi=lambda predicate, a, b: predicate(word(a), word(b)),
        select=lambda condition, a, b: a if condition else b,
        minsi=lambda a, b: min(a, b, key=signed),
        addi=lambda a, b: word(a + b),
        subi=lambda a, b: word(a - b),
        muli=lambda a, b: word(a * b),
        divui=lambda a, b: a // b,
        remui=lambda a, b: a % b,
        andi=lambda a, b: a & b,
        ori=lambda a, b: a | b,
        xori=lambda a, b: a ^ b,
    )
    ir = types.SimpleNamespace(
        InsertionPoint=lambda _: contextlib.nullcontext(), VectorType=types.SimpleNamespace(get=lambda *_: None)
    )
    scf = types.SimpleNamespace(IfOp=lambda _: types.SimpleNamespace(then_block=None), yield_=lambda _: None)
    utils = types.SimpleNamespace(thread_idx=lambda: thread, bitcast=lambda x, _: x)
    replaced = {"arith": arith, "ir": ir, "scf": scf, "utils": utils, "_bytes_of": prmt, "_c": word}
    with contextlib.ExitStack() as stack:
        for name, value in {**replaced, "_i32": lambda: None, "_element": lambda x, n: x[n]}.items():
            stack.enter_context(mock.patch.object(mla_prepare_sm90, name, value))
        yield


class TestLayouts:
    @pytest.mark.parametrize("groups", [2, 4, 8])
    def test_a_lane_holds_the_same_elements(self, groups: int) -> None:
        rows, columns = mla_prepare_sm90._layouts(groups)
        seen = np.zeros((128, 128), int)
        for thread in range(128):
            with emulated(thread):
                key, value = mla_prepare_sm90._Lane(groups, 0, 0, 0, 0, None).place()
            by_row, by_column = elements(rows, thread), elements(columns, thread)
            assert by_row == [[(key + k, value + n) for n in range(8)] for k in range(16)]
            assert by_column == [[(value + n, key + k) for k in range(16)] for n in range(8)]
            seen[key : key + 16, value : value + 8] += 1
        assert (seen == 1).all()


def elements(layout: Any, thread: int) -> list[list[tuple[int, int]]]:
    """Coordinates in [128, 128] of what each register of a thread holds."""
    tiled = layout.to_mgpu()
    shape = tiled.tiling.tile_shape((128, 128))
    strides = tiled.tiling.tile_strides((128, 1))
    warp, lane = divmod(thread, 32)
    own: dict[int, int] = {}
    for dims, number in ((tiled.warp_dims, warp), (tiled.lane_dims, lane)):
        sizes = [shape[d] for d in dims]
        own |= dict(zip(dims, map(int, np.unravel_index(number, sizes)), strict=True))
    offset = sum(strides[d] * n for d, n in own.items())
    vector = shape[tiled.vector_dim]
    fixed = {d % len(shape) for d in (*own, tiled.vector_dim)}
    free = [1 if d in fixed else size for d, size in enumerate(shape)]
    registers = []
    for index in np.ndindex(*free):
        first = offset + sum(i * s for i, s in zip(index, strides, strict=True))
        registers.append([divmod(first + n * strides[tiled.vector_dim], 128) for n in range(vector)])
    return registers


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_faulty_configuration(groups: int) -> None:
    with pytest.raises(ValueError, match="groups"):
        PrepareConfig(groups=groups)


@pytest.mark.skipif(
    dispatch._describe(jax.devices()[0]).compute_capability != (9, 0), reason="needs a GPU of compute capability 9.0"
)
class TestHardware:
    """What inline PTX does, bit for bit as XLA on the same GPU, which does not divide as IEEE does."""

    @pytest.mark.sanitize
    @pytest.mark.parametrize("config", [None, PrepareConfig(2, 2), PrepareConfig(2, 8)], ids=str)
    @pytest.mark.parametrize("dtype", [E4M3, BF16, F16, F32], ids=str)
    def test_values(self, dtype: np.dtype, config: PrepareConfig | None) -> None:
        case = Case(RAGGED, 4, dtype, scales=(1.0,) if dtype == E4M3 else (ODD, 64.0))
        v = case.values()
        v[np.random.default_rng(3).random(v.shape) < 0.002] = NAN
        # XLA multiplies with the inverse of a constant: the scales must be none
        wanted = jax.jit(expected, static_argnums=0)(case, v, jnp.asarray(case.scales, jnp.float32))
        for got, own in zip(prepared(None, case, v, config), wanted, strict=True):
            assert_bitwise_equal(np.asarray(got), np.asarray(own))

    @pytest.mark.parametrize("scale", [1.0, ODD, -3.0, 0.0, 1e-40, INF, NAN])
    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    def test_every_number(self, dtype: np.dtype, scale: float) -> None:
        x = jnp.asarray(np.arange(1 << 16, dtype=np.uint16).view(dtype).reshape(64, 16, 64))
        wanted = jax.jit(to_stored)(x, jnp.float32(scale))
        got = mla_prepare_sm90.cast(x, jnp.full(1, scale, jnp.float32))
        assert_bitwise_equal(np.asarray(got), np.asarray(wanted))


def test_size() -> None:
    problem = lambda keys: Case((keys,), 128).problem()
    assert mla_prepare_sm90.supports(problem(1 << 17)) == ()
    assert "2^32" in mla_prepare_sm90.supports(problem(1 << 18))[0]


@pytest.mark.parametrize("dtype", [E4M3, BF16, F16, F32], ids=str)
def test_lowers_for_a_gpu(dtype: np.dtype) -> None:
    """The form that is not interpreted, heads divided between devices too."""
    keys, heads, of = 200, 4, jax.ShapeDtypeStruct

    def prepare(v: Any, scale: Any, start: Any, length: Any) -> Any:
        problem = Case((keys,), v.shape[1], dtype, before=0, behind=0).problem()
        return mla_prepare_sm90.prepare_values(problem, v, scale, tile_list.key_blocks(start, length, keys, ALIGN))

    shapes = of((keys, heads, 128), dtype), of((1,), F32), of((1,), np.int32), of((1,), np.int32)
    functions = [prepare]
    if jax.device_count() > 1:
        mesh, spec = jax.sharding.Mesh(jax.devices()[:2], "x"), jax.sharding.PartitionSpec
        of_heads = spec(None, "x"), spec(), spec(), spec()
        functions.append(jax.shard_map(prepare, mesh=mesh, in_specs=of_heads, out_specs=(spec("x"), spec(None, "x"))))
    for function in functions:
        traced = jax.jit(function).trace(*shapes)
        assert [x.shape for x in traced.out_info] == [(heads, 128, 3 * ALIGN), (1, heads, 128)]
        assert "fp8attn_mla_prepare_sm90" in traced.lower(lowering_platforms=("cuda",)).as_text()
