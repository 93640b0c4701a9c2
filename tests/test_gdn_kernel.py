"""The two Hopper kernels of gdn_prefill together: interpreted on a CPU, against XLA's form of the op."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from interpreter import run_interpreted
from jax_fp8attn.pallas import gdn_prefill_sm90 as kernels
from jax_fp8attn.pallas.common.gdn_chunks import chunk_list
from jax_fp8attn.pallas.common.gdn_segments import forgets_before, max_segments, segment_list
from jax_fp8attn.pallas.gdn_recurrence_sm90 import RecurrenceConfig

import jax_fp8attn.xla.gdn_prefill as xla
from jax_fp8attn import dispatch
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem, gdn_max_chunks
from jax_fp8attn.testing import assert_bitwise_equal, relative_error

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
BOUND = 0.006
NAN = float("nan")


def problem_of(lengths: tuple[int, ...], heads: tuple[int, int, int] = (1, 1, 2), **facts: Any) -> GdnProblem:
    """Three tokens of no sequence in front, five behind."""
    names = ("q_heads", "k_heads", "v_heads")
    given = {"tokens": sum(lengths) + 8, "k_width": 128, "v_width": 128, "dtype": BF16, "out_dtype": BF16}
    given |= {"state_dtype": F32, "has_initial_state": True, "qk_l2norm": True, "sequences": len(lengths)}
    return GdnProblem(**{**given, **dict(zip(names, heads, strict=True)), **facts})


def places(problem: GdnProblem, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    length = np.asarray(lengths, np.int32)
    start = (3 + np.cumsum(length) - length).astype(np.int32)
    counts = -(-length // 64)
    room = gdn_max_chunks(problem.tokens, len(lengths))
    sequence = np.full(room, -1, np.int32)
    index = np.zeros(room, np.int32)
    used = int(counts.sum())
    sequence[:used] = np.repeat(np.arange(len(lengths)), counts)
    index[:used] = np.concatenate([np.arange(n) for n in counts]) if used else 0
    return {"start": start, "length": length, "chunk_sequence": sequence, "chunk_index": index}


def split_arrays(problem: GdnProblem, lengths: tuple[int, ...]) -> GdnArrays:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tokens, heads = problem.tokens, problem.heads
    q, k, v = (normal(tokens, n, 128).astype(BF16) for n in (problem.q_heads, problem.k_heads, problem.v_heads))
    g = -0.3 * np.log1p(np.exp(normal(tokens, heads)))
    beta = 1 / (1 + np.exp(-normal(tokens, heads)))
    for x in (q, k, v, g, beta):
        x[:3], x[-5:] = NAN, NAN
    state = normal(problem.sequences, *problem.state_shape).astype(problem.state_dtype)
    return GdnArrays(
        q, k, v, g, beta, **places(problem, lengths),
        initial_state=state if problem.has_initial_state else None, scale=np.full(1, 128**-0.5, np.float32),
    )  # fmt: skip


def pool_arrays(
    problem: GdnPoolProblem, lengths: tuple[int, ...], slots: list[int], write_slots: list[int]
) -> GdnPoolArrays:
    split = split_arrays(problem.split, lengths)
    rng = np.random.default_rng(1)
    heads = problem.split.heads
    qkv = np.concatenate([x.reshape(problem.tokens, -1) for x in split[:3]], axis=1)
    a, b = (rng.standard_normal((problem.tokens, heads)).astype(BF16) for _ in range(2))
    for x in (a, b):
        x[:3], x[-5:] = NAN, NAN
    per_head = rng.standard_normal((2, 1, heads)).astype(np.float32)
    pool = rng.standard_normal((problem.pool_rows, *problem.split.state_shape)).astype(problem.state_dtype)
    rows = (np.asarray(x, np.int32) for x in (slots, write_slots))
    checkpoints = None
    if problem.checkpoints_to_pool:
        checkpoints = np.full(problem.split.checkpoints, problem.pool_rows - 1, np.int32)
        checkpoints[1:] = -1
    return GdnPoolArrays(
        qkv, a, b, *per_head, pool, *rows, checkpoints, **places(problem.split, lengths), scale=split.scale
    )


def run(interpret: Any, problem: Any, arrays: Any, config: Any = None) -> Any:
    config = config or kernels.default_config(problem)
    return jax.jit(kernels.build(problem, config, interpret))(jax.tree.map(jnp.asarray, arrays))


def fold(interpret: Any, moved: Any, length: Any, initial: Any, forgets: Any) -> Any:
    """Of segments of one chunk."""

    @jax.jit
    def run(moved: Any, length: Any, initial: Any, forgets: Any) -> Any:
        segments = segment_list(chunk_list(jnp.cumsum(length) - length, length, 192), 192, 1)
        return kernels.gdn_fold_sm90.fold(moved, segments, initial, forgets, interpret)

    return run(moved, length, initial, forgets)


def run_faulty(interpret: Any, problem: Any, arrays: Any, config: Any, fault: str) -> Any:
    fold = kernels.gdn_fold_sm90.fold
    faults = {
        "transitions ignored": lambda moved, *given: fold(moved.at[..., :128].set(0.0), *given),
        "one segment late": lambda moved, *given: jnp.roll(fold(moved, *given), 1, axis=0),
        "chunks that count are left out": lambda moved, segments, initial, forgets, *given: fold(
            moved, segments, initial, jnp.maximum(forgets, 0), *given
        ),
    }
    with mock.patch.object(kernels.gdn_fold_sm90, "fold", faults[fault]):
        return run(interpret, problem, arrays, config)


def check(problem: Any, arrays: Any, config: Any = None) -> Any:
    config = config or kernels.default_config(problem)
    got = run_interpreted(run, problem, arrays, config, kernels=4 if config.segment else 2)
    wanted = jax.jit(lambda arrays: xla.run(problem, arrays))(arrays)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, wanted)), strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) <= BOUND
    return got


class TestInterpreted:
    @pytest.mark.parametrize(
        ("lengths", "facts"),
        [
            pytest.param((70, 0, 130), {"checkpoint_every": 64}, marks=pytest.mark.slow),
            pytest.param((1, 64), {"heads": (1, 1, 3), "state_layout": "kv"}, marks=pytest.mark.slow),
            pytest.param((90,), {"has_initial_state": False, "return_final_state": False}, marks=pytest.mark.slow),
            pytest.param(
                (65, 3), {"heads": (2, 1, 1), "state_dtype": BF16, "qk_l2norm": False}, marks=pytest.mark.slow
            ),
        ],
        ids=str,
    )
    def test_split(self, lengths: tuple[int, ...], facts: dict[str, Any]) -> None:
        problem = problem_of(lengths, **facts)
        arrays = split_arrays(problem, lengths)
        if not problem.qk_l2norm:
            q, k = (x / np.sqrt(128) for x in (arrays.q, arrays.k))
            arrays = arrays._replace(q=q.astype(BF16), k=k.astype(BF16))
        check(problem, arrays)

    def test_fold(self) -> None:
        """Four segments of a sequence and one of another: what forgets has no M."""
        rng = np.random.default_rng(0)
        moved = rng.standard_normal((5, 1, 128, 256)).astype(np.float32)
        moved[2, :, :, :128] = moved[0, :, :, :128] = NAN
        initial = rng.standard_normal((2, 1, 128, 128)).astype(np.float32)
        forgets = np.array([[-1], [-1], [0], [-1], [-1]], np.int32)
        got = run_interpreted(fold, moved, np.array([256, 64], np.int32), initial, forgets)
        n = moved[..., 128:]
        second = moved[1, 0, :, :128].astype(np.float64) @ n[0, 0] + n[1, 0]
        assert_bitwise_equal(got[[0, 1, 3, 4]], np.stack([initial[0], n[0], n[2], initial[1]]))
        assert relative_error(got[2, 0], second) < 1e-5

    @pytest.mark.slow
    def test_short_segments(self) -> None:
        """Three of a chunk: the least that folds a transition."""
        lengths = (150,)
        problem = problem_of(lengths, heads=(1, 1, 1), segments=3)
        config = dataclasses.replace(kernels.default_config(problem), recurrence=RecurrenceConfig())
        check(problem, split_arrays(problem, lengths), config)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("lengths", "facts"),
        [
            ((70, 0, 200), {"heads": (1, 1, 1), "segments": 4, "checkpoint_every": 128}),
            ((340,), {"heads": (1, 1, 3), "segments": 3, "state_layout": "kv", "state_dtype": BF16}),
            ((150, 300), {"segments": 8, "has_initial_state": False}),
        ],
        ids=str,
    )
    def test_segments(self, lengths: tuple[int, ...], facts: dict[str, Any]) -> None:
        problem = problem_of(lengths, **facts)
        check(problem, split_arrays(problem, lengths))

    @pytest.mark.slow
    @pytest.mark.parametrize("first", kernels.FIRST_PASS, ids=str)
    def test_forms_of_the_first_pass(self, first: Any) -> None:
        """A fold of two transitions, slow gates: what a segment starts from is what the whole sequence leads to."""
        lengths = (330,)
        problem = problem_of(lengths, heads=(1, 1, 1), segments=6, out_dtype=F32)
        arrays = split_arrays(problem, lengths)
        arrays = arrays._replace(g=arrays.g / 100)
        config = dataclasses.replace(kernels.default_config(problem), transitions=first)
        check(problem, arrays, config)

    @pytest.mark.slow
    def test_forgotten_chunks(self) -> None:
        """A segment whose last chunk decays to nothing starts there, and has no M."""
        lengths = (330,)
        problem = problem_of(lengths, heads=(1, 1, 1), segments=3)
        arrays = split_arrays(problem, lengths)
        gates = arrays.g / 100
        gates[3 + 64 * 3 + 10 : 3 + 64 * 3 + 20] = -12.0
        config = dataclasses.replace(kernels.default_config(problem), recurrence=RecurrenceConfig())
        check(problem, arrays._replace(g=gates), config)

    @pytest.mark.slow
    @pytest.mark.parametrize("fault", ["transitions ignored", "one segment late", "chunks that count are left out"])
    def test_faults_of_a_fold_show(self, fault: str) -> None:
        lengths = (330,)
        problem = problem_of(lengths, heads=(1, 1, 1), segments=6)
        arrays = split_arrays(problem, lengths)
        arrays = arrays._replace(g=arrays.g / 100)
        config = kernels.default_config(problem)
        got = run_interpreted(run_faulty, problem, arrays, config, fault, kernels=4)
        assert relative_error(got[0], xla.run(problem, jax.tree.map(jnp.asarray, arrays))[0]) > 3 * BOUND

    @pytest.mark.slow
    @pytest.mark.parametrize("segments", [0, 4])
    @pytest.mark.parametrize("to_pool", [False, True])
    def test_pool(self, to_pool: bool, segments: int) -> None:
        """A sequence without a row among them; what nobody writes keeps its bits."""
        lengths = (70, 5, 130)
        split = problem_of(lengths, checkpoint_every=64, segments=segments)
        facts = {f.name: getattr(split, f.name) for f in dataclasses.fields(GdnPoolProblem) if hasattr(split, f.name)}
        problem = GdnPoolProblem(**facts, pool_rows=5, checkpoints_to_pool=to_pool)
        arrays = pool_arrays(problem, lengths, slots=[2, -1, 0], write_slots=[3, 1, 0])
        pool = check(problem, arrays)[1]
        kept = [2, *([] if to_pool else [4])]
        assert_bitwise_equal(pool[kept], arrays.pool[kept])

    @pytest.mark.parametrize("facts", [{}, {"has_initial_state": False}, {"checkpoint_every": 64}], ids=str)
    def test_nothing_to_compute(self, facts: dict[str, Any]) -> None:
        """As XLA has it, with no launch."""
        for lengths in ((0, 0), ()):
            problem = problem_of(lengths, **facts)
            if lengths:
                problem = dataclasses.replace(problem, tokens=0)
            arrays = split_arrays(problem_of(lengths, **facts), lengths)
            arrays = arrays._replace(
                **{name: getattr(arrays, name)[: problem.tokens] for name in ("q", "k", "v", "g", "beta")}
            )
            arrays = arrays._replace(**places(problem, lengths))
            assert_bitwise_equal(run(None, problem, arrays), xla.run(problem, jax.tree.map(jnp.asarray, arrays)))


def test_chunks_of_the_op_are_those_of_the_kernels() -> None:
    lengths = (70, 0, 130)
    problem = problem_of(lengths)
    where = places(problem, lengths)
    chunks = chunk_list(jnp.asarray(where["start"]), jnp.asarray(where["length"]), problem.tokens)
    used = np.asarray(chunks.valid) > 0
    sequence = where["chunk_sequence"]
    there = sequence >= 0
    assert used.sum() == there.sum()
    np.testing.assert_array_equal(
        np.asarray(chunks.token)[used], where["start"][sequence[there]] + 64 * where["chunk_index"][there]
    )


SHAPES = [
    ((8192, 1, (2, 2, 8)), 8), ((32768, 1, (2, 2, 8)), 8), ((8192, 1, (4, 4, 16)), 4), ((8192, 1, (16, 16, 32)), 1),
    ((1000, 6, (2, 2, 8)), 1), ((20 * 8192, 20, (2, 2, 8)), 1),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "segments"), SHAPES, ids=str)
def test_few_heads_and_long_sequences_are_cut(shape: tuple[int, int, tuple[int, int, int]], segments: int) -> None:
    """A pure function of the shapes; a call that names a number gets it."""
    tokens, sequences, heads = shape
    problem = problem_of((tokens // sequences,) * sequences, heads, tokens=tokens)
    config = kernels.default_config(problem)
    assert config.segment == (tokens // sequences // 64 // segments if segments > 1 else 0)
    assert kernels.default_config(dataclasses.replace(problem, segments=1)).segment == 0
    chunks = -(-tokens // 64)
    assert kernels.default_config(dataclasses.replace(problem, segments=5)).segment == -(-chunks // 5)


def test_segments_of_a_sequence_are_its_own() -> None:
    """Alone or beside others: the same chunks; every sequence has one, unused ones are empty."""
    length = np.array([640, 0, 64, 641, 1], np.int32)
    start = np.cumsum(length) - length
    tokens = int(length.sum())
    cut = jax.jit(lambda start, length, n: segment_list(chunk_list(start, length, n), n, 4), static_argnums=2)
    segments = jax.tree.map(np.asarray, cut(start, length, tokens))
    assert len(segments.chunks) == max_segments(tokens, 5, 4) == 10
    np.testing.assert_array_equal(segments.count, [3, 1, 1, 3, 1])
    np.testing.assert_array_equal(segments.first, [0, 3, 4, 5, 8])
    np.testing.assert_array_equal(segments.chunks, [4, 4, 2, 0, 1, 4, 4, 3, 1, 0])
    np.testing.assert_array_equal(segments.done[:9], [0, 4, 8, 0, 0, 0, 4, 8, 0])
    np.testing.assert_array_equal(np.flatnonzero(segments.last), [2, 3, 4, 7, 8])
    np.testing.assert_array_equal(segments.there, np.arange(10) < 9)
    np.testing.assert_array_equal(cut(start[:1] * 0, length[3:4], 641).chunks, [4, 4, 3])


def test_what_segments_forget() -> None:
    """The last chunk from which on the decay is 0 in float32; NaN is not."""
    length = np.array([64 * 6], np.int32)
    chunks = chunk_list(length * 0, length, 64 * 6)
    total = np.ones((7, 3), np.float32)
    total[[1, 2], 0] = 1e-30, 1e-30  # the product is 0 over chunks 1 and 2, both of segment 0
    total[[3, 5], 1] = 0.0, 1e-30  # a reset in the first chunk of segment 1
    total[[4, 5], 2] = np.nan, 0.0
    forgets = jax.jit(lambda c, t: forgets_before(c, segment_list(c, 64 * 6, 3), t, 3))(chunks, total)
    np.testing.assert_array_equal(forgets, [[1, -1, -1], [-1, 0, 2], [-1, -1, -1]])


def test_no_more_segments_than_there_is_room_for() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        length = rng.integers(0, rng.choice([3, 70, 700]), rng.integers(1, 9)).astype(np.int32)
        tokens, size, chunks = int(length.sum()), int(rng.integers(1, 5)), -(-length // 64)
        parts = np.maximum(1, -(-chunks // size))
        assert parts.sum() <= max_segments(tokens, len(length), size)


def test_reasons() -> None:
    assert not kernels.supports(problem_of((8,)), Device("cuda", "H200", (9, 0)))
    reasons = kernels.supports(problem_of((8,), v_width=64, transition=True), Device("cuda", "B200", (10, 0)))
    assert [word for word in ("9.0", "transitions", "V = 64") if not any(word in x for x in reasons)] == []
    assert dispatch.CANDIDATES["gdn_prefill"][0].module == "jax_fp8attn.pallas.gdn_prefill_sm90"


@pytest.mark.skipif(
    dispatch._describe(jax.devices()[0]).compute_capability != (9, 0), reason="needs a GPU of compute capability 9.0"
)
class TestHardware:
    """Segments: what the products read is not seen by the interpreter."""

    LENGTHS = (1500, 0, 65, 900)
    LASTS = (RecurrenceConfig(32, "shared", 4, 2), RecurrenceConfig(64, "registers", 3, 3))

    def given(self, decay: float = 1.0, **facts: Any) -> tuple[Any, Any]:
        problem = problem_of(self.LENGTHS, (2, 2, 4), **facts)
        arrays = split_arrays(problem, self.LENGTHS)
        return problem, arrays._replace(g=arrays.g * np.float32(decay))

    @pytest.mark.parametrize("first", kernels.FIRST_PASS, ids=str)
    @pytest.mark.parametrize("last", LASTS, ids=str)
    @pytest.mark.parametrize("decay", [1.0, 0.01])
    def test_values(self, first: Any, last: Any, decay: float) -> None:
        problem, arrays = self.given(decay, checkpoint_every=128, segments=6)
        config = dataclasses.replace(kernels.default_config(problem), recurrence=last, transitions=first)
        assert config.segment
        got = jax.jit(kernels.build(problem, config))(arrays)
        wanted = jax.jit(lambda arrays: xla.run(problem, arrays))(arrays)
        for one, other in zip(got, wanted, strict=True):
            assert relative_error(one, other) <= BOUND

    @pytest.mark.sanitize
    def test_same_bits(self) -> None:
        problem, arrays = self.given(segments=6, state_layout="kv", state_dtype=BF16)
        run = jax.jit(kernels.build(problem, kernels.default_config(problem)))
        first = run(arrays)
        for _ in range(100):
            assert_bitwise_equal(run(arrays), first)

    def test_pool(self) -> None:
        lengths = (700, 5, 1300)
        split = problem_of(lengths, checkpoint_every=64, segments=8)
        facts = {f.name: getattr(split, f.name) for f in dataclasses.fields(GdnPoolProblem) if hasattr(split, f.name)}
        problem = GdnPoolProblem(**facts, pool_rows=5, checkpoints_to_pool=False)
        arrays = pool_arrays(problem, lengths, slots=[2, -1, 0], write_slots=[2, 1, 0])
        got = jax.jit(kernels.build(problem, kernels.default_config(problem)))(jax.tree.map(jnp.asarray, arrays))
        wanted = jax.jit(lambda arrays: xla.run(problem, arrays))(arrays)
        for one, other in zip(got, wanted, strict=True):
            assert relative_error(one, other) <= BOUND
        assert_bitwise_equal(got[1][3:], arrays.pool[3:])
