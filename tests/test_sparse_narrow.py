"""The Hopper kernel of sparse_prefill for few heads: interpreted on a CPU, with races looked for, against float64; how
its lanes turn rows into operands, emulated on integers."""

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
import row_lanes
import sparse_cases
import sparse_kernel_cases
from implementations import kernels
from interpreter import run_interpreted, verdict
from jax_fp8attn.pallas import sparse_narrow_sm90, sparse_prefill_sm90
from jax_fp8attn.pallas.common import head_columns, latent_rows
from jax_fp8attn.pallas.common.latent_rows import Gather, Pool
from jax_fp8attn.pallas.sparse_narrow_sm90 import NarrowConfig
from row_lanes import SHARED, Lanes, rows_in, scalar
from sparse_cases import INT_MAX, Case, normal, quantize
from sparse_kernel_cases import BYTES, FP8, case, operands, slow

from jax_fp8attn.latent import dequantize_latent
from jax_fp8attn.problems import RowForm, SparseArrays, SparseProblem
from jax_fp8attn.quantize import E4M3
from jax_fp8attn.testing import assert_bitwise_equal
from jax_fp8attn.xla import sparse_prefill as xla

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
PERSISTENT = {"blocks": 2}


def kernel(interpret: Any, problem: SparseProblem, arrays: SparseArrays, cut: dict[str, Any] | None = None) -> Any:
    config = dataclasses.replace(sparse_narrow_sm90.default_config(problem), **(cut or {}))
    return jax.jit(sparse_narrow_sm90.build(problem, config, interpret))(jax.tree.map(jnp.asarray, arrays))


def interpreted(given: Case, cut: dict[str, Any] | None = None, **options: Any) -> Any:
    return run_interpreted(kernel, *operands(given, **options), cut)


def on_hardware(given: Case, cut: dict[str, Any] | None = None, **options: Any) -> Any:
    problem, arrays = operands(given, **options)
    return jax.tree.map(np.asarray, jax.jit(lambda arrays: kernel(None, problem, arrays, cut))(arrays))


check = functools.partial(sparse_kernel_cases.check, interpreted)


class TestInterpreted:
    @pytest.mark.parametrize(
        ("facts", "cut", "options"),
        [
            ({"heads": 16, "rows": FP8}, PERSISTENT, {}),
            *slow(
                ({"heads": 8, "rows": BYTES, "q": BYTES}, {"early": True, "ahead": 5}, {"out_dtype": jnp.bfloat16}),
                ({"heads": 32}, {"early": True, "blocks": 4}, {}),
                ({"heads": 20, "rows": BYTES, "q": FP8, "two": False}, {"ahead": 1}, {"out_dtype": jnp.float16}),
                ({"heads": 1, "q": BYTES}, {"ahead": 8, "blocks": 1}, {"out_dtype": jnp.bfloat16}),
            ),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, facts: dict[str, Any], cut: dict[str, Any], options: dict[str, Any]) -> None:
        check(case(**facts), cut, **options)

    @pytest.mark.slow
    def test_a_token_is_computed_alike_anywhere(self) -> None:
        given = case(8, rows=FP8)
        turned = given.but(
            q=given.q[::-1], prefix_lists=given.prefix_lists[::-1], extend_lists=given.extend_lists[::-1]
        )
        results = [interpreted(x, PERSISTENT) for x in (given, turned)]
        assert_bitwise_equal(results[1][0][::-1], results[0][0])
        assert_bitwise_equal(results[1][1][:, ::-1], results[0][1])

    @pytest.mark.slow
    @pytest.mark.parametrize("scale", [-0.5, 30.0])
    def test_any_scale(self, scale: float) -> None:
        """Also scores of which one outweighs all others."""
        given = case(8, rows=FP8).but(scale=scale)
        if scale < 1:
            check(given, PERSISTENT)
            return
        out, lse = interpreted(given, PERSISTENT)
        expected_lse = given.expected()[1]
        finite = np.isfinite(expected_lse)
        np.testing.assert_allclose(lse[finite], expected_lse[finite], rtol=1e-5)
        assert np.isfinite(out[:, 4:]).all()

    @pytest.mark.slow
    def test_nan_reaches_its_tokens_alone(self) -> None:
        given = case(8, rows=FP8)
        nope = given.prefix.nope.at[25, 3].set(jnp.nan)
        given = given.but(prefix=dataclasses.replace(given.prefix, nope=nope), sink=None)
        out, lse = interpreted(given, PERSISTENT)
        listed = np.array([25 in x for x in given.prefix_lists])
        assert listed.any() and not listed.all()
        np.testing.assert_array_equal(np.isnan(out).all(axis=(1, 2)), listed)
        np.testing.assert_array_equal(np.isnan(out).any(axis=(1, 2)), listed)
        np.testing.assert_array_equal(np.isnan(lse), np.broadcast_to(listed, lse.shape))

    @pytest.mark.slow
    def test_instances_have_their_own_scales_and_sinks(self) -> None:
        """As under vmap."""
        given = case(8, rows=FP8)
        problem, arrays = operands(given)
        problem = dataclasses.replace(problem, instances=2)
        own = arrays._replace(
            softmax_scale=np.array([0.1, -0.02], F32), sink=np.concatenate([arrays.sink, -arrays.sink])
        )
        out, lse = run_interpreted(kernel, problem, own, PERSISTENT)
        expected, expected_lse = xla.run(problem, jax.tree.map(jnp.asarray, own))
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
        error, mass = (np.linalg.norm(np.nan_to_num(x), axis=-1) for x in (out - expected, np.asarray(expected)))
        assert (error <= sparse_cases.BF16 * mass).all()

    @pytest.mark.slow
    def test_pools_without_rows(self) -> None:
        given = case(8, rows=FP8)
        check(given.but(prefix=jax.tree.map(lambda x: x[:0], given.prefix)), PERSISTENT)

    def test_no_tokens(self) -> None:
        problem, arrays = operands(case(8, rows=FP8))
        out, lse = kernel(None, dataclasses.replace(problem, tokens=0), arrays)
        assert out.shape == (0, 8, 512) and lse.shape == (8, 0)


class TestFaults:
    """What is planted is found."""

    @pytest.mark.parametrize(
        ("fault", "expected"),
        [
            ("results copied before they are committed", "RaceFound"),
            *slow(
                ("results written while others are copied", "RaceFound"),
                ("none", "clean"),
                ("rows that are none count", "wrong result"),
                ("the numbers of another block", "wrong result"),
                ("an index of the other pool", "wrong result"),
                ("earlier sums not rescaled", "wrong result"),
            ),
        ],
    )
    def test_planted(self, fault: str, expected: str) -> None:
        wanted = None if expected == "RaceFound" else sound()
        assert verdict(faulty, fault, *operands(steep()), PERSISTENT, expected=wanted) == expected


def steep() -> Case:
    """Scores that grow by more than is let pass without a new maximum."""
    return case(8, rows=FP8).but(scale=0.5)


@functools.cache
def sound() -> Any:
    return interpreted(steep(), PERSISTENT)


def faulty(interpret: Any, fault: str, problem: SparseProblem, arrays: SparseArrays, cut: dict[str, Any]) -> Any:
    """The kernel with one thing replaced."""
    listed, masked = latent_rows.listed, latent_rows.masked
    nothing = lambda *_, **__: None

    def one_pool(indices: Any, rows: Any, *given: Any) -> Any:
        return listed(indices, (max(rows),) * len(rows), *given)

    patches = {
        "none": [],
        "results copied before they are committed": [(plgpu, "commit_smem", nothing)],
        "results written while others are copied": [(plgpu, "wait_smem_to_gmem", nothing)],
        "rows that are none count": [(latent_rows, "masked", lambda scores, *_: scores)],
        "the numbers of another block": [
            (latent_rows, "masked", lambda scores, numbers, plain: masked(scores, jnp.roll(numbers, 1), plain))
        ],
        "an index of the other pool": [(latent_rows, "listed", one_pool)],
        "earlier sums not rescaled": [(head_columns, "shrunk", lambda parts, *_: list(parts))],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for patch in patches[fault]:
            stack.enter_context(mock.patch.object(*patch))
        return kernel(interpret, problem, arrays, cut)


def pool_of(form: Any, count: int, seed: int) -> tuple[Any, RowForm, np.ndarray]:
    """Rows, how they are stored, and what they are in bf16."""
    rows = normal(seed, count, 512)
    if form is None:
        return rows, RowForm(BF16), np.asarray(rows)
    rows = quantize(rows * 2.0 ** np.arange(-4, 4).repeat(64), **form)
    stored = RowForm(np.dtype(E4M3), form["group"], rows.scale.dtype)
    return rows, stored, np.asarray(dequantize_latent(rows, jnp.bfloat16))


def reference(lanes: Lanes, first: int, rows: Any) -> Pool:
    refs = lanes.refs()[first:]
    return Pool(*refs[:3]) if not isinstance(rows, jax.Array) else Pool(refs[0], None, None)


def from_operand(words: list[list[np.ndarray]]) -> np.ndarray:
    """bf16 [64, 64] as wgmma takes it from registers."""
    found = np.zeros((64, 32), np.int64)
    warp, group, lane = np.unravel_index(np.arange(128), (4, 8, 4))
    for n, own in enumerate(words):
        for k, word in enumerate(own):
            found[16 * warp + group + 8 * n, 4 * k + lane] = word
    return found.astype(np.int32).view(BF16)


class TestLanes:
    """What the interpreter replaces: which lane has which numbers, and where they go."""

    @pytest.mark.parametrize("queries", [FP8, None], ids=str)
    @pytest.mark.parametrize("form", [FP8, BYTES, None], ids=str)
    def test_rows_and_queries_meet(self, form: Any, queries: Any) -> None:
        """The products of operands are those of rows and queries; rows stand in shared memory as they are."""
        heads, padded = 13, 16
        (rows, row_form, exact), (q, q_form, exact_q) = pool_of(form, 9, 0), pool_of(queries, 40, 1)
        listed = np.array([0, 4, 8, -1, 3, 7, INT_MAX, -(2**31), 5] * 8, np.int32)
        lanes = Lanes([*jax.tree.leaves(rows), *jax.tree.leaves(q), listed], SHARED + padded * 128)
        own = reference(lanes, 0, rows), reference(lanes, len(jax.tree.leaves(rows)), q)
        gather, q_gather = Gather(row_form, own[:1], False), Gather(q_form, own[1:], False)
        scores = 0.0
        with lanes.emulated():
            numbers = latent_rows.listed((lanes.refs()[-1],), (9,), scalar(0), scalar(0), scalar(60), False)
            heads_of = latent_rows.following(scalar(2 * heads), scalar(heads), False)
            numbers, heads_of = (row_lanes.registers_of(list(x.registers)) for x in (numbers, heads_of))
            scales, q_scales = (
                x.load_scales(of, scalar(0)) if x.fp8 else None for x, of in ((gather, numbers), (q_gather, heads_of))
            )
            for part in range(latent_rows.PARTS):
                operand = gather.operand(gather.load_part(numbers, scalar(0), part), scales, part)
                gather.keep(operand, row_lanes.at(part * latent_rows.TILE), part)
                loaded = q_gather.load_part(heads_of, scalar(0), part)
                q_gather.place(loaded, q_scales, part, row_lanes.at(SHARED, padded, 64), gather)
                second = swizzled(lanes.shared[SHARED:], padded, 128)
                scores = scores + from_operand(operand.words).astype(float) @ second.astype(float).T
        entries = listed[:64].astype(np.int64)
        there = (np.arange(64) < 60) & (entries >= 0) & (entries < 9)
        expected = np.where(there[:, None], exact[np.where(there, entries, 0)], np.zeros((), BF16))
        assert_bitwise_equal(rows_in(lanes.shared), expected)
        wanted = np.pad(exact_q[2 * heads : 3 * heads].astype(float), ((0, padded - heads), (0, 0)))
        np.testing.assert_allclose(scores, expected.astype(float) @ wanted.T, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("heads", [8, 16, 24, 32])
    def test_weights(self, heads: int) -> None:
        weights, width = np.asarray(normal(0, 64, heads)), 16 if heads <= 16 else 32
        lanes = Lanes([], 128 * width)
        with lanes.emulated():
            head_columns.put_weights(registers(weights), row_lanes.at(0, 64, width), False)
        assert_bitwise_equal(swizzled(lanes.shared, 64, 2 * width)[:, :heads], weights)

    @pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
    def test_results(self, dtype: np.dtype) -> None:
        """64 columns of 24 heads, in pieces of 128 bytes a head."""
        heads, part = 24, 3
        values = np.asarray(normal(0, 64, heads)).astype(dtype)
        lanes = Lanes([], 512 * heads * dtype.itemsize)
        with lanes.emulated():
            given = registers(values)
            given.dtype, given.shape = dtype, values.shape
            head_columns.put_results(given, row_lanes.at(0), part, False)
        own = lanes.shared.reshape(8, -1)[part]
        pieces = [swizzled(x, heads, 128, dtype) for x in own.reshape(dtype.itemsize // 2, -1)]
        assert_bitwise_equal(np.concatenate(pieces, axis=1), values.T)

    def test_a_wrong_order_is_seen(self) -> None:
        """The emulation itself."""
        place = latent_rows._place_of
        wrong = mock.patch.object(latent_rows, "_place_of", lambda pair, copied: place(pair, True))
        with wrong, pytest.raises(AssertionError):
            self.test_rows_and_queries_meet(FP8, None)


def registers(values: np.ndarray) -> Any:
    """[64, n] in the layout of accumulators: as words of two 16-bit elements, or element by element in float32."""
    warp, group, lane = np.unravel_index(np.arange(128), (4, 8, 4))
    bits = values.view(np.uint16 if values.dtype.itemsize == 2 else np.uint32).astype(np.int64)
    pairs = [
        [bits[16 * warp + group + 8 * row, 8 * tile + 2 * lane + n] for n in (0, 1)]
        for tile in range(values.shape[1] // 8)
        for row in (0, 1)
    ]
    words = [(low | high << 16).astype(np.int32).astype(np.int64) for low, high in pairs]
    elements = [element for pair in pairs for element in pair]
    return types.SimpleNamespace(pairs=words, elements=elements)


def swizzled(shared: np.ndarray, rows: int, pitch: int, dtype: np.dtype = BF16) -> np.ndarray:
    """[rows, n] as hardware reads rows of ``pitch`` bytes with a swizzle of as many."""
    place = np.arange(rows)[:, None] * pitch + np.arange(pitch)
    return shared[place ^ (place >> 7 & (pitch // 16 - 1)) << 4].view(dtype)


class TestConfig:
    @pytest.mark.parametrize("ahead", [0, 9])
    def test_misfits_are_refused(self, ahead: int) -> None:
        with pytest.raises(ValueError, match="ahead"):
            NarrowConfig(ahead=ahead)

    @pytest.mark.parametrize("rows", [FP8, BYTES, None], ids=str)
    def test_fewer_parts_ahead_of_more_heads(self, rows: Any) -> None:
        problem = operands(case(8, rows=rows))[0]
        ahead = [sparse_narrow_sm90.default_config(dataclasses.replace(problem, heads=n)).ahead for n in range(1, 33)]
        assert ahead == sorted(ahead, reverse=True) and ahead[0] > ahead[-1]

    @pytest.mark.parametrize("heads", [1, 32, 33])
    def test_the_choice(self, heads: int) -> None:
        """By heads alone."""
        problem = dataclasses.replace(operands(case(8, rows=FP8))[0], heads=heads)
        taken = []
        with contextlib.ExitStack() as stack:
            for module in (sparse_narrow_sm90, sparse_prefill_sm90):
                build = lambda *_, module=module: lambda arrays: taken.append(module)
                stack.enter_context(mock.patch.object(module, "build", build))
            sparse_prefill_sm90.run(problem, None)
        assert taken == [sparse_narrow_sm90 if heads <= 32 else sparse_prefill_sm90]


@pytest.mark.skipif("pallas" not in kernels("sparse_prefill"), reason="needs a CUDA device")
class TestHardware:
    """The same on a GPU of compute capability 9.0."""

    @pytest.mark.parametrize(
        ("facts", "cut", "options"),
        [
            pytest.param({"heads": 16, "rows": FP8}, {}, {}, marks=pytest.mark.sanitize),
            ({"heads": 16, "rows": FP8}, {"early": True, "blocks": 264}, {}),
            ({"heads": 8, "rows": FP8, "two": False}, PERSISTENT, {"out_dtype": jnp.bfloat16}),
            ({"heads": 32, "rows": BYTES, "q": BYTES}, {}, {}),
            pytest.param(
                {"heads": 20, "rows": BYTES, "q": FP8}, {}, {"out_dtype": jnp.float16}, marks=pytest.mark.sanitize
            ),
            pytest.param({"heads": 32}, {}, {"out_dtype": jnp.bfloat16}, marks=pytest.mark.sanitize),
            ({"heads": 24, "q": BYTES}, {"early": True}, {}),
            ({"heads": 1}, PERSISTENT, {}),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, facts: dict[str, Any], cut: dict[str, Any], options: dict[str, Any]) -> None:
        sparse_kernel_cases.check(on_hardware, case(**facts), cut, **options)

    @pytest.mark.parametrize("heads", [8, 16, 32])
    def test_repeats(self, heads: int) -> None:
        """200 times the same bits, with more tokens than blocks and lists of all lengths."""
        rng, tokens = np.random.default_rng(0), 600
        given = Case(
            q=normal(0, tokens, heads, 512), prefix=quantize(normal(1, 4096, 512)),
            prefix_lists=[rng.integers(-9, 4100, rng.integers(0, 700)).tolist() for _ in range(tokens)],
            prefix_capacity=700 * tokens,
        )  # fmt: skip
        problem, arrays = operands(given)
        run = jax.jit(lambda arrays: kernel(None, problem, arrays))
        arrays = jax.tree.map(jnp.asarray, arrays)
        first = run(arrays)
        sparse_kernel_cases.check(lambda *_, **__: jax.tree.map(np.asarray, first), given)
        same = jax.jit(lambda x: jax.tree.map(lambda a, b: (a == b).all(), x, first))
        assert np.all([jax.tree.leaves(same(run(arrays))) for _ in range(200)])
