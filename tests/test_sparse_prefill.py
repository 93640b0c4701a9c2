"""``sparse_prefill``: one suite over every implementation, in the order of the contract."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from sparse_cases import (
    BF16,
    EXACT,
    FAST,
    IMPLEMENTATIONS,
    INT_MAX,
    KERNELS,
    NARROW,
    PREFIX_CAPACITY,
    SCALE,
    WIDTHS,
    Case,
    H,
    P,
    S,
    T,
    assert_lse,
    attention,
    bound,
    call,
    exact_rows,
    normal,
    prefix_only,
    prepared,
    quantize,
    random_lists,
    standard,
)

from jax_fp8attn import checks, dispatch
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.latent import Fp8Latent, from_flashmla_pages, pack_aiter, to_flashmla_pages, unpack_aiter
from jax_fp8attn.merge import merge_attn_states
from jax_fp8attn.reference import sparse_prefill as reference
from jax_fp8attn.sparse_prefill import sparse_prefill, sparse_prefill_topk
from jax_fp8attn.testing import (
    assert_bitwise_equal,
    assert_lse_close,
    assert_rows_close,
    assert_within_emulated,
    relative_error,
)

INT_MIN = -(2**31)
HOSTILE = (INT_MIN, -123456, -1, 2147480000, INT_MAX)
fast = pytest.mark.parametrize("implementation", FAST)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _unnamed_is_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that name no implementation are about what is the same in all."""
    monkeypatch.setenv("JAX_FP8ATTN_IMPLEMENTATION", "xla")


def tokens_of(result: tuple[jax.Array, jax.Array], keep: Any) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(result[0])[keep], np.asarray(result[1])[:, keep]


# structure


def test_lists_of_every_kind(implementation: str) -> None:
    """R1, R3: prefix only, extend only, both, none, a single row of either, random."""
    case = standard()
    prefix, extend = list(case.prefix_lists), list(case.extend_lists)
    prefix[:6] = [[1, 2, 3], [], [4, 5], [], [7], []]
    extend[:6] = [[], [6, 7, 8], [9], [], [], [39]]
    prefix[-1] = extend[-1] = []
    out, lse = case.but(prefix_lists=prefix, extend_lists=extend).check(implementation)
    for t in (3, T - 1):
        assert not np.asarray(out[t]).any() and np.isneginf(np.asarray(lse[:, t])).all()
    row, sink = exact_rows(case.prefix)[7], np.asarray(case.sink)
    single = row / (1 + np.exp(sink - SCALE * exact_rows(case.q)[4] @ row))[:, None]
    assert_rows_close(out[4], single, bound(implementation))


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_plain_rows(implementation: str, form: str) -> None:
    """R1: no quantised input at all. Kernels have no float32 rows, and say so."""
    if form == "float32" and implementation in KERNELS:
        with pytest.raises(UnsupportedError, match="rows must be FP8 or bfloat16"):
            standard(5, form).run(implementation)
        return
    standard(5, form).check(implementation)


def test_pools_of_two_forms(implementation: str) -> None:
    """R1: FP8 rows before the chunk, bf16 rows of it. Kernels take one form, and say so."""
    case = standard(6).but(extend=normal(6, S, 512))
    if implementation in KERNELS:
        with pytest.raises(UnsupportedError, match="both pools must have one form"):
            case.run(implementation)
        return
    case.check(implementation)


def test_every_list_empty(implementation: str) -> None:
    """R3."""
    out, lse = standard().but(prefix_lists=[[]] * T, extend_lists=[[]] * T).run(implementation)
    assert not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


@pytest.mark.parametrize("empty", ["prefix", "both", "no index arrays"])
def test_pools_without_rows(implementation: str, empty: str) -> None:
    """R3, R4: every index of an empty pool is invalid; index arrays of length 0."""
    case = standard()
    nothing = jax.tree.map(lambda x: x[:0], case.prefix)
    if empty in ("prefix", "both"):
        case = case.but(prefix=nothing)
    if empty == "both":
        case = case.but(extend=nothing)
    if empty == "no index arrays":
        case = case.but(prefix_lists=[[]] * T, prefix_capacity=0)
    case.check(implementation)


@pytest.mark.parametrize("form", ["csr", "topk"])
def test_no_tokens(implementation: str, form: str) -> None:
    """R3."""
    case = standard()
    none = jnp.zeros((0, 7) if form == "topk" else 9, jnp.int32)
    if form == "topk":
        out, lse = call(implementation, case.q[:0], case.prefix, none, op=sparse_prefill_topk, return_lse=True)
    else:
        out, lse = call(implementation, case.q[:0], case.prefix, none, jnp.zeros(1, jnp.int32), return_lse=True)
    assert out.shape == (0, H, 512) and out.dtype == jnp.bfloat16
    assert lse.shape == (H, 0) and lse.dtype == jnp.float32


def test_list_lengths_around_every_block(implementation: str) -> None:
    """R1: 0, 1, 31 ... 2047 rows, in both pools and in opposite order."""
    lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 2047]
    rng = np.random.default_rng(8)
    case = Case(
        q=normal(8, len(lengths), 2, 512),
        prefix=quantize(normal(9, P, 512)),
        prefix_lists=[rng.integers(0, P, n).tolist() for n in lengths],
        extend=quantize(normal(10, S, 512)),
        extend_lists=[rng.integers(0, S, n).tolist() for n in reversed(lengths)],
        prefix_capacity=4000,
        extend_capacity=sum(lengths),
    )
    case.check(implementation)


@fast
def test_long_and_empty_neighbours(implementation: str) -> None:
    """R3, R8: lengths 0 and 4096 alternate."""
    rng = np.random.default_rng(11)
    lists = [rng.integers(0, P, 4096 * (t % 2)).tolist() for t in range(18)]
    case = Case(normal(11, 18, 1, 512), quantize(normal(12, P, 512)), lists, prefix_capacity=9 * 4096)
    out, _ = case.check(implementation)
    assert not np.asarray(out[::2]).any()


@pytest.mark.slow
def test_seventy_thousand_tokens(implementation: str) -> None:
    """R1, R5: more tokens than a grid axis of 65535, of 72 heads more numbers than 2^31; the inputs repeat every 7000
    tokens, and so must the bits."""
    period, tokens, width = 7000, 70000, 4
    rng = np.random.default_rng(13)
    q, rows = normal(13, period, 1, 512), normal(14, 64, 512)
    lists = rng.integers(-1, 64, (period, width)).astype(np.int32)
    op = functools.partial(call, implementation, op=sparse_prefill_topk, return_lse=True)
    out, lse = jax.jit(op)(
        jnp.tile(q, (tokens // period, 1, 1)), rows, jnp.tile(jnp.asarray(lists), (tokens // period, 1))
    )
    for part in range(1, tokens // period):
        assert_bitwise_equal(
            tokens_of((out, lse), slice(part * period, (part + 1) * period)), tokens_of((out, lse), slice(0, period))
        )
    for t in range(0, period, 97):
        expected, expected_lse = attention(exact_rows(q[t]), exact_rows(rows)[lists[t][lists[t] >= 0]])
        assert_rows_close(out[t], expected, BF16)
        assert_lse(implementation, lse[:, t], expected_lse)


@pytest.mark.parametrize("implementation", (*NARROW, "xla"))
@pytest.mark.parametrize(
    "heads", [1, 12, 20, 128, *[pytest.param(h, marks=pytest.mark.slow) for h in (2, 8, 16, 32, 33, 48, 64, 96)]]
)
def test_head_counts(implementation: str, heads: int) -> None:
    """R1: any number of heads."""
    lists = random_lists(heads, P, 150, 3)
    sink = np.linspace(-2, 2, heads).astype(np.float32)
    Case(normal(heads, 3, heads, 512), normal(15, P, 512), lists, sink=sink).check(implementation)


@fast
def test_result_dtypes(implementation: str) -> None:
    """R1: the result is rounded once, at the end."""
    case = prefix_only()
    exact, lse = case.run(implementation)
    out, lse_again = case.run(implementation, out_dtype=jnp.bfloat16)
    assert_bitwise_equal(out, exact.astype(jnp.bfloat16))
    assert_bitwise_equal(lse_again, lse)
    assert_rows_close(out, case.expected()[0], BF16)
    alone = case.run(implementation, return_lse=False, out_dtype=jnp.float16)
    assert_bitwise_equal(alone, exact.astype(jnp.float16))


@fast
def test_fp8_precision_is_allowed_to_be_exact(implementation: str) -> None:
    case = prefix_only()
    assert_bitwise_equal(case.run(implementation, precision="fp8"), case.run(implementation))


# sinks


def test_sinks(implementation: str) -> None:
    """A sink a head: ordinary, +20, -inf, +inf; lse never sees them."""
    case = standard().but(sink=np.array([0.5, 20, -np.inf, np.inf], np.float32))
    out, lse = case.check(implementation)
    plain, plain_lse = case.but(sink=None).check(implementation)
    assert_bitwise_equal(lse, plain_lse)
    assert not np.asarray(out[:, 3]).any()
    assert_bitwise_equal(out[:, 2], plain[:, 2])
    flipped, _ = case.but(sink=case.sink[::-1].copy()).check(implementation)
    assert relative_error(flipped, out) > 0.1


def test_sink_equal_to_lse_halves_the_output(implementation: str) -> None:
    case = standard().but(q=jnp.broadcast_to(normal(16, 1, H, 512), (T, H, 512)))
    case = case.but(prefix_lists=[case.prefix_lists[1]] * T, extend_lists=[case.extend_lists[1]] * T)
    plain, lse = case.but(sink=None).run(implementation)
    half, _ = case.but(sink=np.asarray(lse[:, 0])).run(implementation)
    assert_rows_close(half, np.asarray(plain, np.float64) / 2, bound(implementation))


def test_nan_sink_stays_in_its_head(implementation: str) -> None:
    """R2."""
    case = standard().but(
        prefix_lists=[[], *standard().prefix_lists[1:]], extend_lists=[[], *standard().extend_lists[1:]]
    )
    out, lse = case.but(sink=np.array([np.nan, 1, 2, 3], np.float32)).run(implementation)
    clean, clean_lse = case.but(sink=np.array([0, 1, 2, 3], np.float32)).run(implementation)
    assert_bitwise_equal(lse, clean_lse)
    assert_bitwise_equal(out[:, 1:], clean[:, 1:])
    empty = np.isneginf(np.asarray(lse[0]))
    assert empty[0] and not np.asarray(out[0]).any()
    assert np.isnan(np.asarray(out)[~empty, 0]).all()


def test_parts_merge_into_the_whole(implementation: str) -> None:
    """R9: rows split at random between two calls and between the pools; the sink is applied once, at the end."""
    case = standard()
    rng = np.random.default_rng(17)
    parts = []
    masks = [
        [rng.integers(0, 2, len(x)).astype(bool) for x in lists] for lists in (case.prefix_lists, case.extend_lists)
    ]
    for side in (True, False):
        lists = [
            [np.asarray(x, int)[m == side].tolist() for x, m in zip(given, mask, strict=True)]
            for given, mask in zip((case.prefix_lists, case.extend_lists), masks, strict=True)
        ]
        parts.append(case.but(sink=None, prefix_lists=lists[0], extend_lists=lists[1]).run(implementation))
    out, lse = merge_attn_states(*parts[0], *parts[1], return_lse=True)
    out = out / (1 + jnp.exp(case.sink[:, None] - lse)).T[..., None]
    expected, expected_lse = case.expected()
    assert_rows_close(out, expected, bound(implementation))
    assert_lse(implementation, lse, expected_lse)


# indices and offsets


def test_bad_indices_are_skipped(implementation: str) -> None:
    """R4: one entry in sixteen is hostile, a whole block of 64, the first block, a whole list; n and n+1."""
    case = standard(20)
    rng = np.random.default_rng(20)
    lists = []
    for rows, given in ((P, case.prefix_lists), (S, case.extend_lists)):
        hostile = [*HOSTILE, rows, rows + 1]
        spoilt = [list(x) for x in given]
        for x in spoilt:
            for k in range(len(x)):
                if rng.random() < 1 / 16:
                    x[k] = int(rng.choice(hostile))
        spoilt[0] = [int(i) for i in rng.choice(hostile, 20)]
        spoilt[1] = [*(int(i) for i in rng.choice(hostile, 64)), 3, 4]
        spoilt[2] = [3, *([-1] * 64), 4]
        lists.append(spoilt)
    # row 50 exists in the prefix pool only
    lists[1][3] = [50, 51, 52]
    out, lse = case.but(prefix_lists=lists[0], extend_lists=lists[1]).check(implementation)
    assert np.isneginf(np.asarray(lse[:, 0])).all() and not np.asarray(out[0]).any()


def test_hostile_offsets(implementation: str) -> None:
    """R4: decreasing, negative and too large offsets are clamped token by token; the other tokens keep their bits."""
    case = standard(21)
    arguments = case.arguments()
    indices, clean = np.asarray(arguments[2]).copy(), np.asarray(arguments[3])
    indices[clean[-1] :] = np.random.default_rng(21).integers(-3, P + 3, len(indices) - clean[-1])
    dirty = clean.copy()
    dirty[3], dirty[8], dirty[9], dirty[14], dirty[-1] = INT_MIN, INT_MAX, -5, clean[13] - 7, INT_MAX
    options = {"attn_sink": jnp.asarray(case.sink), "return_lse": True, "out_dtype": jnp.float32}

    def run(indptr: np.ndarray, name: str = implementation) -> tuple[jax.Array, jax.Array]:
        return call(name, case.q, case.prefix, jnp.asarray(indices), jnp.asarray(indptr), *arguments[4:], **options)

    actual, untouched = run(dirty), run(clean)
    inside = np.clip(dirty, 0, len(indices))
    lists = [indices[a:b].tolist() for a, b in itertools.pairwise(inside)]
    expected = case.but(prefix_lists=lists).expected()
    assert_rows_close(actual[0], expected[0], bound(implementation))
    assert_lse(implementation, actual[1], expected[1])
    _, arrays = prepared(lambda: run(dirty, "xla"))
    start, end = np.asarray(arrays.prefix.start), np.asarray(arrays.prefix.end)
    assert np.all((start >= 0) & (start <= end) & (end <= len(indices)))
    same = (dirty[:-1] == clean[:-1]) & (dirty[1:] == clean[1:])
    assert 10 < same.sum() < T
    assert_bitwise_equal(tokens_of(actual, same), tokens_of(untouched, same))


def test_entries_past_the_lists_are_never_read(implementation: str) -> None:
    """R6: the tail of the index array changes nothing, bit for bit, whatever it holds."""
    case = standard(22)
    arguments = case.arguments()
    options = {"attn_sink": jnp.asarray(case.sink), "return_lse": True, "out_dtype": jnp.float32}
    expected = case.run(implementation)
    for filler in (0, 5, -1, INT_MIN):
        tail = jnp.arange(len(arguments[2])) >= arguments[3][-1]
        arguments[2] = jnp.where(tail, filler, arguments[2])
        assert_bitwise_equal(call(implementation, *arguments, **options), expected)


def poisoned(rows: Any, spare: set[int], nan_byte: int) -> Any:
    """Every row but those in ``spare`` holds NaN, in every part."""
    count = jax.tree.leaves(rows)[0].shape[0]
    bad = jnp.asarray([i not in spare for i in range(count)])[:, None]
    if not isinstance(rows, Fp8Latent):
        return jnp.where(bad, jnp.nan, rows)
    codes = jnp.where(bad, nan_byte, jax.lax.bitcast_convert_type(rows.nope, jnp.uint8)).astype(jnp.uint8)
    scale = rows.scale
    scale = (
        jnp.where(bad, jnp.nan, scale) if scale.dtype == jnp.float32 else jnp.where(bad, 255, scale).astype(jnp.uint8)
    )
    return Fp8Latent(jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), jnp.where(bad, jnp.nan, rows.rope), scale)


@pytest.mark.parametrize("form", ["fp8", "bfloat16", "bytes"])
def test_rows_that_nobody_lists_may_hold_nan(implementation: str, form: str) -> None:
    """R6: NaN codes, rope and scales in every other row, row 0 among them; bit for bit the same."""
    case = standard(23, form)
    drop = [[i for i in x if i % 3] for x in case.prefix_lists], [[i for i in x if i % 3] for x in case.extend_lists]
    case = case.but(prefix_lists=drop[0], extend_lists=drop[1])
    clean = case.run(implementation)
    for nan_byte in (0x7F, 0xFF):
        dirty = case.but(
            prefix=poisoned(case.prefix, set().union(*drop[0]), nan_byte),
            extend=poisoned(case.extend, set().union(*drop[1]), nan_byte),
        )
        assert np.isnan(exact_rows(dirty.prefix)[0]).all() and np.isnan(exact_rows(dirty.extend)[0]).all()
        assert_bitwise_equal(dirty.run(implementation), clean)


@pytest.mark.parametrize("part", ["nope", "rope", "scale"])
def test_nan_in_a_listed_row_reaches_its_tokens_only(implementation: str, part: str) -> None:
    """R6."""
    case = standard(24)
    clean = case.run(implementation)
    row = case.prefix_lists[5][0]
    spoilt = getattr(case.prefix, part).at[row, 3].set(jnp.nan)
    dirty = case.but(prefix=dataclasses.replace(case.prefix, **{part: spoilt})).run(implementation)
    reached = np.array([row in x for x in case.prefix_lists])
    assert 1 <= reached.sum() < T
    assert np.isnan(np.asarray(dirty[0])[reached]).all() and np.isnan(np.asarray(dirty[1])[:, reached]).all()
    assert_bitwise_equal(tokens_of(dirty, ~reached), tokens_of(clean, ~reached))


def test_infinities_follow_the_formula(implementation: str) -> None:
    """R2: every implementation puts NaN at the same places when rows hold infinities."""
    case = standard(25, "bfloat16").but(sink=np.full(H, -np.inf, np.float32))
    rows = case.prefix.at[3, 7].set(jnp.inf).at[4, 9].set(-jnp.inf).at[5, 0].set(jnp.inf).at[5, 1].set(-jnp.inf)
    lists = [[3], [4], [5], [3, 4], [3, 3], [1, 3], [4, 2], [1, 5], *case.prefix_lists[8:]]
    if implementation in KERNELS:  # of a list whose every score is -inf they say NaN, not 0, where a row is infinite
        lists[:3] = [[3, 1], [4, 1], [5, 1]]
    case = case.but(prefix=rows, prefix_lists=lists, extend_lists=[[], [], *case.extend_lists[2:]])
    (out, lse), (expected, expected_lse) = case.run(implementation), case.run("reference")
    assert np.isnan(np.asarray(out)[:3]).any((1, 2)).all()
    assert_rows_close(out, expected, bound(implementation))
    assert_lse(implementation, lse, expected_lse)


# scales


def test_scales_of_every_size(implementation: str) -> None:
    """R7: tile exponents in [-20, 20], with q that brings the scores back to order one."""
    rng = np.random.default_rng(30)
    exponents = rng.integers(-20, 21, 7)
    q = np.asarray(normal(30, T, H, 512)).astype(np.float64)
    q[..., :448] *= np.repeat(np.exp2(-exponents), 64)
    case = standard(30).but(q=jnp.asarray(q.astype(ml_dtypes.bfloat16)))
    pools = [
        dataclasses.replace(x, scale=x.scale * jnp.exp2(jnp.asarray(exponents))) for x in (case.prefix, case.extend)
    ]
    out, _ = case.but(prefix=pools[0], extend=pools[1]).check(implementation)
    expected, _ = case.but(prefix=pools[0], extend=pools[1]).expected()
    for tile in range(7):
        part = slice(64 * tile, 64 * tile + 64)
        assert_rows_close(np.asarray(out)[..., part], expected[..., part], bound(implementation), what=f"tile {tile}")


def test_tiles_that_differ_by_two_to_the_eighteen(implementation: str) -> None:
    """R7: one scale a row would lose the small tile; q makes it matter."""
    case = standard(31)
    small = jnp.asarray([1, 1, 2.0**-18, 1, 1, 1, 1])
    q = case.q.at[..., 128:192].multiply(2.0**18)
    pools = [dataclasses.replace(x, scale=x.scale * small) for x in (case.prefix, case.extend)]
    changed = case.but(q=q, prefix=pools[0], extend=pools[1])
    out, _ = changed.check(implementation)
    expected, _ = changed.expected()
    assert_rows_close(np.asarray(out)[..., 128:192], expected[..., 128:192], bound(implementation))


def test_small_zero_and_uneven_rows(implementation: str) -> None:
    """R7: the floor of the scale, amax below 0.0448, a zero tile, tokens whose norms differ by 2^10."""
    case = standard(32)
    x = np.asarray(normal(32, P, 512)).astype(np.float32)
    x[:32] *= 1e-3
    x[32:48] *= 1e-6
    x[48:64, 64:128] = 0
    x[64:80] *= 2.0**10
    rows = quantize(jnp.asarray(x))
    assert float(rows.scale.min()) == 2.0**-13
    case.but(prefix=rows).check(implementation, worst=2 * EXACT)


@fast
def test_scale_dtypes_agree_bitwise(implementation: str) -> None:
    """R7: float32, uint8 and float8_e8m0fnu scales, 14 different ones a row, in q and in the pool."""
    case = prefix_only(33)
    x = np.asarray(normal(33, P, 512)).astype(np.float32)
    x[:, :448] *= np.repeat(np.exp2(np.arange(14) % 5 - 2), 32)
    stored = [quantize(y, group=32, scale_dtype="uint8") for y in (jnp.asarray(x), normal(34, T, H, 512))]
    results = []
    for dtype in ("float32", "uint8", "float8_e8m0fnu"):
        rows, q = (y.with_scale_dtype(dtype) for y in stored)
        results.append(case.but(q=q, prefix=rows).check(implementation))
    assert_bitwise_equal(results[1], results[0])
    assert_bitwise_equal(results[2], results[0])


def test_extreme_scale_bytes(implementation: str) -> None:
    """R7: byte 0 is 2^-127, byte 255 NaN for the tokens that list the row."""
    case = standard(35, "bytes").but(sink=np.full(H, -np.inf, np.float32))
    nope = case.prefix.nope.at[7].set(256.0)
    rows = dataclasses.replace(case.prefix, nope=nope, scale=case.prefix.scale.at[7].set(0).at[8].set(255))
    q = case.q.at[1].set(2.0**100)
    lists = [[8], [7, 7], *[[i for i in x if i not in (7, 8)] for x in case.prefix_lists[2:]]]
    case = case.but(q=q, prefix=rows, prefix_lists=lists, extend_lists=[[], [], *case.extend_lists[2:]])
    out, lse = case.run(implementation)
    assert np.isnan(np.asarray(out[0])).all() and np.isnan(np.asarray(lse[:, 0])).all()
    assert_rows_close(out[1, :, :448], np.full((H, 448), 2.0**-119), EXACT)
    expected = case.expected()
    assert_rows_close(out[1:], expected[0][1:], bound(implementation))
    assert_lse(implementation, lse[:, 1:], expected[1][:, 1:])


# numerics


def test_no_mass_is_lost(implementation: str) -> None:
    """K = V: rows whose first 448 numbers are 1 must give 1, whatever the softmax of 4096 rows looks like."""
    deviations = np.array([0.5, 2, 4, 8])
    rows = np.asarray(normal(40, 4096, 512)).astype(np.float32)
    rows[:, :448] = 1
    q = np.zeros((4, 2, 512), np.float32)
    q[..., 448:] = np.asarray(normal(41, 4, 2, 64)) * deviations[:, None, None] * 512**0.5 / 8
    case = Case(
        jnp.asarray(q.astype(ml_dtypes.bfloat16)),
        quantize(jnp.asarray(rows)),
        [np.random.default_rng(t).permutation(4096).tolist() for t in range(4)],
        sink=np.full(2, -1e4, np.float32),
        prefix_capacity=4 * 4096,
    )
    out, _ = case.check(implementation, worst=2 * EXACT)
    np.testing.assert_array_equal(np.asarray(out)[..., :448].astype(ml_dtypes.bfloat16).astype(np.float32), 1)


@pytest.mark.parametrize("zero", ["nope", "rope"])
def test_each_half_of_a_row_alone(implementation: str, zero: str) -> None:
    """Rope counts in the scores and in the output, and so does the rest."""
    case = standard(42)
    gone = [dataclasses.replace(x, **{zero: jnp.zeros_like(getattr(x, zero))}) for x in (case.prefix, case.extend)]
    case = case.but(prefix=gone[0], extend=gone[1])
    out, _ = case.check(implementation)
    part = slice(448, 512) if zero == "nope" else slice(0, 448)
    rest = slice(0, 448) if zero == "nope" else slice(448, 512)
    assert_rows_close(np.asarray(out)[..., part], case.expected()[0][..., part], bound(implementation))
    assert not np.asarray(out)[..., rest].any()


def test_output_of_the_rope_dims(implementation: str) -> None:
    case = standard(43)
    out, _ = case.run(implementation)
    assert_rows_close(np.asarray(out)[..., 448:], case.expected()[0][..., 448:], bound(implementation))


@pytest.mark.parametrize("scale", [0.0, -0.1, 20.0])
def test_softmax_scales(implementation: str, scale: float) -> None:
    """Zero is uniform, negative prefers the farthest, 20 gives scores in the hundreds."""
    standard(44).but(scale=scale).check(implementation, worst=BF16 if scale == 20 else EXACT)


def test_large_scores(implementation: str) -> None:
    """R2: scores of +-1e4: no overflow, one row wins."""
    case = standard(45).but(scale=400.0)
    expected, expected_lse = case.expected()
    assert np.abs(expected_lse[np.isfinite(expected_lse)]).max() > 1e4
    out, lse = case.run(implementation)
    assert_rows_close(out, expected, BF16)
    assert_lse(implementation, lse, expected_lse)


def test_one_row_dominates_and_zero_queries(implementation: str) -> None:
    """Identical rows and q = 0 are uniform; a row aligned with q takes everything."""
    case = standard(46, "bfloat16").but(sink=np.full(H, -np.inf, np.float32))
    rows = case.prefix.at[10:20].set(case.prefix[10]).at[30].set(case.q[2, 0] * 8)
    q = case.q.at[0].set(0)
    lists = [[1, 2, 3], list(range(10, 20)), [1, 2, 30], *case.prefix_lists[3:]]
    case = case.but(q=q, prefix=rows, prefix_lists=lists, extend_lists=[[]] * 3 + list(case.extend_lists[3:]))
    out, _ = case.check(implementation)
    assert_rows_close(out[0], np.broadcast_to(exact_rows(rows)[1:4].mean(0), (H, 512)), bound(implementation))
    assert_rows_close(out[1], np.broadcast_to(exact_rows(rows)[10], (H, 512)), bound(implementation))
    assert_rows_close(out[2, 0], exact_rows(rows)[30], bound(implementation))


def test_overflowing_scores_are_nan(implementation: str) -> None:
    """R2: the same in every implementation: +inf scores give NaN, -inf scores weigh nothing."""
    case = standard(47, "bfloat16").but(sink=np.full(H, -np.inf, np.float32), scale=1e38)
    q = jnp.abs(case.q)
    rows = jnp.ones((P, 512), jnp.bfloat16).at[1].set(-1.0)
    lists = [[0], [1], [1, 1], [0, 1], *[[]] * (T - 4)]
    out, lse = case.but(q=q, prefix=rows, prefix_lists=lists, extend_lists=[[]] * T).run(implementation)
    assert np.isnan(np.asarray(out)[[0, 3]]).all() and np.isnan(np.asarray(lse)[:, [0, 3]]).all()
    others = np.setdiff1d(np.arange(T), [0, 3])
    assert not np.asarray(out)[others].any() and np.isneginf(np.asarray(lse)[:, others]).all()


def test_duplicates_count_and_order_does_not(implementation: str) -> None:
    """R4, R9: k times a row is weight k; shuffling a list only changes rounding."""
    case = standard(48)
    rng = np.random.default_rng(48)
    repeated = [[i for i in x[:20] for _ in range(1 + i % 3)] for x in case.prefix_lists]
    changed = case.but(prefix_lists=repeated)
    out, lse = changed.check(implementation)
    shuffled = changed.but(
        prefix_lists=[rng.permutation(x).tolist() for x in repeated],
        extend_lists=[rng.permutation(x).tolist() for x in case.extend_lists],
    )
    again, lse_again = shuffled.run(implementation)
    assert_rows_close(again, out, bound(implementation))
    assert_lse(implementation, lse_again, lse)


@fast
def test_emulation_of_a_kernel(implementation: str) -> None:
    """R1: bf16 softmax weights alone cost 1e-3; a kernel's error is at most half as large again as the emulation's."""
    case = prefix_only(49)
    problem, arrays = prepared(case.run)
    out, lse = jax.jit(reference.emulated, static_argnums=0)(problem, arrays)
    expected, expected_lse = case.expected()
    assert assert_rows_close(out, expected, BF16) > 5e-4
    assert_lse_close(lse, expected_lse, atol=1e-3)
    for dtype in (jnp.float32, jnp.bfloat16):
        actual, _ = case.run(implementation, out_dtype=dtype)
        assert_within_emulated(actual, out.astype(dtype), expected, factor=1.5)


# what the comparator must refuse


def wrong_answers(case: Case) -> dict[str, np.ndarray]:
    """Outputs of seven plausible bugs."""
    out, _ = case.expected()
    no_rope = out.copy()
    no_rope[..., 448:] = 0
    rolled = [dataclasses.replace(x, scale=jnp.roll(x.scale, 1, axis=-1)) for x in (case.prefix, case.extend)]
    swapped = case.but(prefix=case.extend, extend=case.prefix)
    return {
        "zeros": np.zeros_like(out),
        "extend ignored": case.but(extend=None).expected()[0],
        "rope missing in the output": no_rope,
        "uniform softmax": case.but(q=jnp.zeros_like(case.q)).expected()[0],
        "sink ignored": case.but(sink=None).expected()[0],
        "scales permuted by a tile": case.but(prefix=rolled[0], extend=rolled[1]).expected()[0],
        "pools swapped": swapped.expected()[0],
    }


@fast
def test_comparator_refuses_wrong_answers(implementation: str) -> None:
    """R1: each bug alone, against the bound of kernels and of bf16 results."""
    case = standard(50).but(sink=np.full(H, 8, np.float32))
    exponents = jnp.exp2(jnp.arange(7) % 3)
    pools = [dataclasses.replace(x, scale=x.scale * exponents) for x in (case.prefix, case.extend)]
    case = case.but(prefix=pools[0], extend=pools[1])
    out, _ = case.run(implementation)
    assert_rows_close(out, case.expected()[0], BF16)
    for bug, wrong in wrong_answers(case).items():
        with pytest.raises(AssertionError, match="is off by"):
            assert_rows_close(wrong, out, BF16, what=bug)


# invariance


@fast
def test_a_token_alone_and_among_others(implementation: str) -> None:
    """R8: bit for bit, whatever stands before and after it, and for one token as for 24."""
    case = standard(60)
    rng = np.random.default_rng(60)
    together = case.run(implementation)
    for t in (0, 7, 23):
        # one neighbour needs several steps of the loops
        lengths = {(t + 1) % T: (600, 260), t: (0, 0)}
        longer = [lengths.get(i, (17, 9)) for i in range(T)]
        prefix = [rng.integers(0, P, n).tolist() for n, _ in longer]
        extend = [rng.integers(0, S, n).tolist() for _, n in longer]
        prefix[t], extend[t] = case.prefix_lists[t], case.extend_lists[t]
        among = case.but(prefix_lists=prefix, extend_lists=extend).run(implementation)
        alone = case.but(q=case.q[t : t + 1], prefix_lists=[prefix[t]], extend_lists=[extend[t]]).run(implementation)
        assert_bitwise_equal(tokens_of(among, [t]), tokens_of(together, [t]))
        assert_bitwise_equal(tokens_of(alone, [0]), tokens_of(together, [t]))


def test_a_longer_neighbour_does_not_turn_minus_zero() -> None:
    """R8: sums that underflow to -0 stay what they are while the loop goes on for another token."""
    rows = np.zeros((256, 512), np.float32)
    rows[128:, 0], rows[200, 0] = 50, 60
    rows[:128, 1], rows[128:, 1], rows[200, 1] = -1e-30, -(2.0**-126), -0.0
    q = np.zeros((2, 1, 512), ml_dtypes.bfloat16)
    q[..., 0] = 1
    case = Case(jnp.asarray(q), jnp.asarray(rows.astype(ml_dtypes.bfloat16)), [range(256), [0] * 600], scale=1.0)
    together = case.run()
    alone = case.but(q=case.q[:1], prefix_lists=case.prefix_lists[:1]).run()
    assert_bitwise_equal(tokens_of(together, [0]), tokens_of(alone, [0]))


@fast
def test_repeated_calls_and_donated_buffers(implementation: str) -> None:
    """R8, R19: the same bits again; arguments are left alone."""
    case = standard(61)
    q, *rest = case.arguments()
    sink = jnp.asarray(case.sink)
    before = jax.tree.map(np.array, (q, rest, sink))
    op = functools.partial(call, implementation, return_lse=True, out_dtype=jnp.float32)
    first = op(q, *rest, attn_sink=sink)
    donating = jax.jit(lambda q, sink, *rest: op(q, *rest, attn_sink=sink), donate_argnums=0)
    for filler in (np.nan, 7):
        jnp.asarray(np.full((T, H, 512), filler, ml_dtypes.bfloat16))
        assert_bitwise_equal(op(q, *rest, attn_sink=sink), first)
        assert_bitwise_equal(donating(jnp.asarray(before[0]), sink, *rest), first)
    assert_bitwise_equal(jax.tree.map(np.asarray, (q, rest, sink)), before)


@fast
def test_many_blocks_repeat(implementation: str) -> None:
    """R8: 512 blocks with mixed lengths, four times."""
    tokens = 8192
    rng = np.random.default_rng(62)
    lengths = jnp.asarray(np.where(rng.random(tokens) < 0.1, 8, rng.integers(0, 3, tokens)), jnp.int32)
    arguments = (
        normal(62, tokens, 1, 512),
        normal(63, P, 512),
        jnp.asarray(rng.integers(-1, P, (tokens, 8)), jnp.int32),
        lengths,
    )
    op = jax.jit(functools.partial(call, implementation, op=sparse_prefill_topk, return_lse=True))
    first = op(*arguments)
    for _ in range(3):
        assert_bitwise_equal(op(*arguments), first)


# addresses and memory


def index_products(jaxpr: Any) -> list[Any]:
    """Operands of every integer multiplication, inner functions included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mul" and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.integer):
            found.append([getattr(v, "val", None) for v in equation.invars])
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += index_products(getattr(inner, "jaxpr", inner))
    return found


def test_index_arithmetic_stays_below_two_to_the_31() -> None:
    """R5: rows and entries are counted one by one; no row times width is formed, so pools may pass 2^31 elements."""
    rows, entries, tokens = 2**31 - 2**10, 2**31 - 2**10, 40000
    shapes = (
        jax.ShapeDtypeStruct((tokens, 128, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((entries,), jnp.int32),
        jax.ShapeDtypeStruct((tokens + 1,), jnp.int32),
    )
    closed = jax.make_jaxpr(lambda *a: sparse_prefill(*a, implementation="xla"))(*shapes)
    products = index_products(closed.jaxpr)
    blocks = importlib.import_module("jax_fp8attn.xla.sparse_prefill")
    allowed = {blocks.TOKENS: tokens // blocks.TOKENS + 1, blocks.ENTRIES: entries // blocks.ENTRIES + 1}
    assert products
    for operands in products:
        factor = next(int(x) for x in operands if x is not None)
        assert factor * allowed[factor] < 2**31
    too_many = jax.ShapeDtypeStruct((rows + 1, 512), jnp.bfloat16)
    with pytest.raises(InvalidInputError, match=r"prefix is .*split the call"):
        jax.eval_shape(sparse_prefill, shapes[0], too_many, *shapes[2:])


@pytest.mark.slow
@fast
def test_rows_past_two_to_the_31_elements(implementation: str) -> None:
    """R5: a 2.2 GB pool whose last rows lie past 2^31 elements; wrapped addresses would read zeros."""
    rows = 2**31 // 448 + 4096
    used = np.array([rows - 1, rows - 2, rows - 4000, 2**31 // 512, 5, 0])
    few = quantize(normal(64, len(used), 512), scale_dtype="uint8")
    pool = Fp8Latent(
        jnp.zeros((rows, 448), jnp.float8_e4m3fn),
        jnp.zeros((rows, 64), jnp.bfloat16),
        jnp.full((rows, 7), 127, jnp.uint8),
    )
    scatter = jax.jit(lambda x, y: x.at[used].set(y), donate_argnums=0)
    codes = scatter(
        jax.lax.bitcast_convert_type(pool.nope, jnp.uint8), jax.lax.bitcast_convert_type(few.nope, jnp.uint8)
    )
    pool = Fp8Latent(
        jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn),
        scatter(pool.rope, few.rope),
        scatter(pool.scale, few.scale),
    )
    q = normal(65, 3, 2, 512)
    indices = jnp.asarray(used[[0, 1, 2, 3, 4, 5, 0, 3]], jnp.int32)
    indptr = jnp.asarray([0, 2, 6, 8], jnp.int32)
    out, lse = call(implementation, q, pool, indices, indptr, return_lse=True, out_dtype=jnp.float32)
    small = Case(q, few, [[0, 1], [2, 3, 4, 5], [0, 3]])
    assert_rows_close(out, small.expected()[0], bound(implementation))
    assert_lse(implementation, lse, small.expected()[1])


def latent_shape(*lead: int, scale_dtype: Any = jnp.float32) -> Fp8Latent:
    parts = (448, jnp.float8_e4m3fn), (64, jnp.bfloat16), (7, scale_dtype)
    return Fp8Latent(*(jax.ShapeDtypeStruct((*lead, width), dtype) for width, dtype in parts))


@pytest.mark.parametrize("implementation", (*NARROW, "xla"))
@pytest.mark.parametrize("heads", [64, *[8] * bool(NARROW)])
def test_workspace_is_a_tile(implementation: str, heads: int) -> None:
    """R23: neither a dequantised pool (here 1 GiB in bf16), nor scores, nor a float32 output; the compiler says so.
    On a GPU XLA's products may have a library's workspace besides."""
    tokens, rows = 4097, 1 << 20
    most = (128 if NARROW and implementation == "xla" else 32) * 2**20
    for q in (jax.ShapeDtypeStruct((tokens, heads, 512), jnp.bfloat16), latent_shape(tokens, heads)):
        compiled = (
            jax.jit(lambda *a: sparse_prefill(*a, implementation=implementation))
            .lower(
                q,
                latent_shape(rows),
                jax.ShapeDtypeStruct((tokens * 640,), jnp.int32),
                jax.ShapeDtypeStruct((tokens + 1,), jnp.int32),
            )
            .compile()
        )
        assert compiled.memory_analysis().temp_size_in_bytes < most


# jit and the other transforms


def count_runs(patch: pytest.MonkeyPatch, implementation: str = "xla", stub: bool = False) -> list[Any]:
    """The problems for which an implementation is traced from now on. ``stub``: nothing is computed."""
    module = importlib.import_module(
        "jax_fp8attn.pallas.sparse_prefill_sm90"
        if implementation in KERNELS
        else f"jax_fp8attn.{implementation}.sparse_prefill"
    )
    original, traced = module.run, []
    jax.clear_caches()  # another test may have traced the same problem

    def run(problem: Any, arrays: Any) -> Any:
        traced.append(problem)
        return jnp.zeros((problem.tokens, problem.heads, 512), problem.out_dtype) if stub else original(problem, arrays)

    patch.setattr(module, "run", run)
    return traced


def test_values_do_not_retrace(monkeypatch: pytest.MonkeyPatch) -> None:
    """R16: lists, offsets, sinks and scales change; one trace, eager and under jit."""
    traced = count_runs(monkeypatch, stub=True)
    # capacities of their own: no other test has traced them
    for seed in range(3):
        case = standard(70 + seed).but(prefix_capacity=1111, scale=0.01 * seed, sink=np.full(H, seed, np.float32))
        case.run(return_lse=False)
    assert len(traced) == 1
    op = jax.jit(lambda scale, sink, *a: sparse_prefill(*a, softmax_scale=scale, attn_sink=sink))
    for seed in range(3):
        op(0.1 * seed, jnp.full(H, float(seed)), *standard(70 + seed).but(prefix_capacity=1112).arguments())
    assert len(traced) == 2


@fast
def test_inside_scan_cond_and_remat(implementation: str) -> None:
    """R16."""
    case = standard(72)
    q, *rest = case.arguments()
    op = functools.partial(call, implementation)
    expected = op(q, *rest)

    def step(carry: None, x: jax.Array) -> tuple[None, jax.Array]:
        out = jax.lax.cond(x[0, 0, 0] == x[0, 0, 0], lambda y: op(y, *rest), lambda y: y, x)
        return carry, jax.checkpoint(lambda y: y + 0)(out)

    _, actual = jax.jit(lambda xs: jax.lax.scan(step, None, xs))(jnp.stack([q, q[::-1]]))
    assert_bitwise_equal(actual[0], expected)


NAMES = ("q", "prefix", "prefix_indices", "prefix_indptr", "extend", "extend_indices", "extend_indptr", "scale", "sink")
SUBSETS = [
    *[(name,) for name in ("q", "prefix", "prefix_indices", "sink")],
    ("prefix_indptr", "scale"),
    NAMES,
    ("extend", "extend_indptr", "sink"),
]
MORE_SUBSETS = [
    tuple(n for n, keep in zip(NAMES, bits, strict=True) if keep)
    for bits in np.random.default_rng(0).integers(0, 2, (30, 9))
    if bits.any()
]


def several(seed: int, n: int, implementation: str = "xla") -> dict[str, list[Any]]:
    """n values of every argument, small: 3 tokens, 2 heads, hostile entries and offsets among them. Pools of two forms,
    but for kernels, which take one."""
    rng = np.random.default_rng(seed)
    stored = quantize if implementation in KERNELS else lambda x: x
    return {
        "q": [normal(seed + i, 3, 2, 512) for i in range(n)],
        "prefix": [quantize(normal(seed + 10 + i, 9, 512)) for i in range(n)],
        "prefix_indices": [jnp.asarray(rng.integers(-2, 12, 20), jnp.int32) for _ in range(n)],
        "prefix_indptr": [jnp.asarray([0, *sorted(rng.integers(-2, 25, 2)), 20 + i], jnp.int32) for i in range(n)],
        "extend": [stored(normal(seed + 20 + i, 5, 512)) for i in range(n)],
        "extend_indices": [jnp.asarray(rng.integers(-2, 8, 11), jnp.int32) for _ in range(n)],
        "extend_indptr": [jnp.asarray([0, 4 + i, 3, 11], jnp.int32) for i in range(n)],
        "scale": [jnp.float32(0.02 + 0.01 * i) for i in range(n)],
        "sink": [jnp.asarray([i, -i], jnp.float32) for i in range(n)],
    }


def call_by_name(implementation: str = "xla", **arguments: Any) -> tuple[jax.Array, jax.Array]:
    scale, sink = arguments["scale"], arguments["sink"]
    rest = [arguments[name] for name in NAMES[:7]]
    options = {"return_lse": True, "out_dtype": jnp.float32}
    return call(implementation, *rest, softmax_scale=scale, attn_sink=sink, **options)


def stack(values: list[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *values)


def names_of(subset: tuple[str, ...]) -> tuple[str, ...]:
    """Kernels and tiles where all is batched, and kernels where a pool and sinks are; else the oracle, which is quick
    to compile."""
    if subset == NAMES:
        return FAST
    return (*KERNELS, "reference") if subset == SUBSETS[-1] else ("reference",)


@pytest.mark.parametrize(
    ("subset", "implementation"),
    [
        *((subset, name) for subset in SUBSETS for name in names_of(subset)),
        *(pytest.param(subset, "reference", marks=pytest.mark.slow) for subset in MORE_SUBSETS),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_vmap_over_any_arguments(subset: tuple[str, ...], implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """R16: one folded call equals the Python loop, bit for bit with tiles; what is not batched stays shared."""
    values = several(80, 3, implementation)
    batched = {name: stack(values[name]) if name in subset else values[name][0] for name in NAMES}
    axes = {name: 0 if name in subset else None for name in NAMES}
    traced = count_runs(monkeypatch, implementation)
    actual = jax.jit(jax.vmap(lambda a: call_by_name(implementation, **a), in_axes=(axes,)))(batched)
    problem = traced[-1]
    shared = {name: name not in subset for name in NAMES}
    assert problem.prefix.rows == (9 if shared["prefix"] else 27)
    assert problem.extend.rows == (5 if shared["extend"] else 15)
    assert problem.tokens == 9 and problem.instances == 3 and len(traced) <= 2
    for i in range(3):
        one = call_by_name(implementation, **{name: values[name][i if name in subset else 0] for name in NAMES})
        own = jax.tree.map(lambda x, i=i: np.asarray(x)[i], actual)
        if implementation in FAST:
            assert_bitwise_equal(own, jax.tree.map(np.asarray, one), f"instance {i}")
        assert_rows_close(own[0], one[0], EXACT)
        assert_lse_close(own[1], one[1])


def test_vmap_of_vmap_and_of_parts_of_a_pool(implementation: str) -> None:
    """R16: two folds, an axis that is not the first, and a pool of which only the scales are batched."""
    values = several(90, 6, implementation)
    grid = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), {name: stack(values[name]) for name in NAMES})
    grid["extend"] = values["extend"][0]
    grid["prefix"] = dataclasses.replace(grid["prefix"], nope=values["prefix"][0].nope, rope=values["prefix"][0].rope)
    grid["q"] = jnp.moveaxis(grid["q"], 1, -1)
    prefix_axes = Fp8Latent(None, None, 0)
    axes = {name: 0 for name in NAMES} | {"extend": None, "prefix": prefix_axes}
    inner = jax.vmap(lambda a: call_by_name(implementation, **a), in_axes=(axes | {"q": -1},))
    actual = jax.jit(jax.vmap(inner, in_axes=(axes,)))(grid)
    for i in range(6):
        one = {name: values[name][i] for name in NAMES} | {"extend": values["extend"][0]}
        one["prefix"] = dataclasses.replace(values["prefix"][0], scale=values["prefix"][i].scale)
        out, lse = call_by_name(implementation, **one)
        assert_rows_close(actual[0][i // 3, i % 3], out, bound(implementation))
        assert_lse(implementation, actual[1][i // 3, i % 3], lse)


def test_vmap_refuses_more_rows_than_it_can_count() -> None:
    """R5: folded pools count their rows in int32."""
    shapes = (
        jax.ShapeDtypeStruct((2, 3, 1, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 2**30, 512), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 20), jnp.int32),
        jax.ShapeDtypeStruct((2, 4), jnp.int32),
    )
    with pytest.raises(InvalidInputError, match="prefix under vmap"):
        jax.eval_shape(jax.vmap(sparse_prefill), *shapes)


@fast
def test_heads_sharded_over_devices(implementation: str) -> None:
    """R17: eight heads on as many devices as there are; bit for bit what one device computes, no pool is gathered."""
    heads = 8
    devices = jax.devices()[:heads]
    own = heads // len(devices)
    case = standard(73).but(q=normal(73, T, heads, 512), sink=np.linspace(-1, 1, heads).astype(np.float32))
    arguments = [*case.arguments(), jnp.asarray(case.sink)]
    mesh = Mesh(np.array(devices), ("heads",))
    specs = (Spec(None, "heads"), *[Spec()] * 6, Spec("heads"))

    def op(*a: Any) -> tuple[jax.Array, jax.Array]:
        return call(implementation, *a[:-1], attn_sink=a[-1], return_lse=True, out_dtype=jnp.float32)

    sharded = jax.jit(
        jax.shard_map(op, mesh=mesh, in_specs=specs, out_specs=(Spec(None, "heads"), Spec("heads"))),
        in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
    )
    compiled = sharded.lower(*arguments).compile()
    actual = compiled(*[jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)])
    assert_rows_close(actual[0], case.expected()[0], bound(implementation))
    parts = [slice(first, first + own) for first in range(0, heads, own)]
    alone = [op(arguments[0][:, part], *arguments[1:-1], arguments[-1][part]) for part in parts]
    assert_bitwise_equal(actual[0], jnp.concatenate([out for out, _ in alone], axis=1))
    assert_bitwise_equal(actual[1], jnp.concatenate([lse for _, lse in alone]))
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all"))


def test_export_and_back() -> None:
    """R16: exported for two platforms, serialised, run here."""
    case = prefix_only(74)
    exported = jax.export.export(
        jax.jit(lambda *a: sparse_prefill(*a, return_lse=True, out_dtype=jnp.float32)), platforms=("cpu", "cuda")
    )(*case.arguments())
    again = jax.export.deserialize(exported.serialize())
    assert_bitwise_equal(again.call(*case.arguments()), tuple(case.run()))


@pytest.mark.parametrize("transform", ["grad", "jvp", "linearize"])
def test_derivatives_raise_one_error(transform: str) -> None:
    """R16."""
    q, *rest = prefix_only(75, "float32").arguments()

    def loss(x: jax.Array) -> jax.Array:
        return sparse_prefill(x, *rest, out_dtype=jnp.float32).sum()

    call = {
        "grad": lambda: jax.grad(loss)(q),
        "jvp": lambda: jax.jvp(loss, (q,), (q,)),
        "linearize": lambda: jax.linearize(loss, q),
    }
    with pytest.raises(UnsupportedError, match=r"sparse_prefill has no derivative.*forward-only"):
        call[transform]()


def test_with_float64_enabled(implementation: str) -> None:
    """R1: nothing widens by accident, and the reference becomes float64."""
    case = standard(76)
    with jax.enable_x64(True):
        out, lse = case.check(implementation)
        assert out.dtype == lse.dtype == jnp.float32


def test_reference_in_float64() -> None:
    """R1: the one authority agrees with the numpy formula to 1e-12."""
    case = standard(77).but(scale=float(np.float32(SCALE)))
    with jax.enable_x64(True):
        problem, arrays = prepared(case.run)
        out, lse = jax.jit(reference.attend, static_argnums=0)(problem, arrays)
    assert out.dtype == jnp.float64
    expected, expected_lse = case.expected()
    assert_rows_close(out, expected, 1e-12)
    assert_lse_close(lse, expected_lse, 1e-12, 1e-12)


# forms that must agree


def test_matrix_form_equals_csr(implementation: str) -> None:
    """R9: lists as matrices, with lengths that are too long, negative, or absent."""
    case = standard(90)
    rng = np.random.default_rng(90)
    matrices = [
        rng.integers(-2, rows + 2, (T, width)).astype(np.int32) for rows, width in zip((P, S), WIDTHS, strict=True)
    ]
    lengths = [rng.integers(-9, width + 9, T).astype(np.int32) for width in WIDTHS]
    options = {"attn_sink": jnp.asarray(case.sink), "return_lse": True, "out_dtype": jnp.float32}
    topk = functools.partial(call, implementation, op=sparse_prefill_topk)
    for given in (lengths, (None, None)):
        counts = [
            np.full(T, m.shape[1]) if n is None else np.clip(n, 0, m.shape[1])
            for m, n in zip(matrices, given, strict=True)
        ]
        lists = [[m[t, : n[t]].tolist() for t in range(T)] for m, n in zip(matrices, counts, strict=True)]
        same = case.but(prefix_lists=lists[0], extend_lists=lists[1])
        n0, n1 = (None if n is None else jnp.asarray(n) for n in given)
        matrix, extend_matrix = map(jnp.asarray, matrices)
        actual = topk(case.q, case.prefix, matrix, n0, case.extend, extend_matrix, n1, **options)
        assert_bitwise_equal(actual, same.run(implementation))
        same.check(implementation)
    del options["attn_sink"]
    only = topk(case.q, case.prefix, matrix, **options)
    assert_bitwise_equal(only, same.but(extend=None, sink=None).run(implementation))


@fast
@pytest.mark.parametrize("page_size", [64, 256, 2, 61])
def test_stored_formats_give_the_same_bits(page_size: int, implementation: str) -> None:
    """Rows that went through AITER's and FlashMLA's formats, pad bytes random; a page's row is p * page_size + r."""
    case = standard(91)
    expected = case.run(implementation)
    packed, rope = jax.jit(pack_aiter)(case.extend)
    packed = np.array(packed)
    packed[:, 462:] = np.random.default_rng(91).integers(0, 256, (S, 50))
    pages = np.array(jax.jit(to_flashmla_pages, static_argnums=1)(case.prefix, page_size))
    pages[:, 584 * page_size :] = 0xFF
    rows = jax.jit(from_flashmla_pages, static_argnums=1)(jnp.asarray(pages), page_size)
    # the last page has rows past the pool
    rows = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[:P]), rows)
    extend = jax.jit(unpack_aiter)(jnp.asarray(packed), rope)
    assert_bitwise_equal(case.but(prefix=rows, extend=extend).run(implementation), expected)


@fast
def test_dequantising_first_gives_the_same_bits(implementation: str) -> None:
    """FP8 rows and q, fused, equal the same numbers in bf16; bf16 q that FP8 can represent gives the bits of FP8 q.
    The kernel for few heads adds the columns of FP8 rows up in another order than those of bf16 rows."""
    case = prefix_only(92).but(q=quantize(normal(92, T, H, 512)))
    fused = case.run(implementation)
    to_bf16 = jax.jit(lambda x: x.dequantize(jnp.bfloat16))
    plain = case.but(q=to_bf16(case.q))
    assert_bitwise_equal(plain.run(implementation), fused)
    dequantised = plain.but(prefix=to_bf16(case.prefix)).run(implementation)
    if implementation not in NARROW:
        assert_bitwise_equal(dequantised, fused)
    assert_rows_close(dequantised[0], fused[0], bound(implementation))
    assert_lse(implementation, dequantised[1], fused[1])


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt of a DeepSeek-V4 layer: its rows, and the compressed rows that its positions may see."""

    q: np.ndarray  # [n, H, 512]
    rows: np.ndarray  # [n, 512]
    compressed: np.ndarray  # [n // ratio, 512]
    chosen: list[list[int]]  # compressed rows of each position

    WINDOW = 128


def make_request(seed: int, length: int, ratio: int, topk: int | None) -> Request:
    """topk None: all compressed rows so far (HCA); else a choice of them (CSA)."""
    rng = np.random.default_rng(seed)
    chosen = []
    for position in range(length):
        available = np.arange((position + 1) // ratio)
        chosen.append(available.tolist() if topk is None else rng.permutation(available)[:topk].tolist())
    q, rows, compressed = (
        np.asarray(normal(seed + i, *shape))
        for i, shape in enumerate([(length, 2, 512), (length, 512), (length // ratio, 512)])
    )
    return Request(q, rows, compressed, chosen)


def dense_attention(request: Request, sink: np.ndarray) -> np.ndarray:
    """Masked attention over every row and every compressed row of the prompt."""
    length = len(request.rows)
    mask = np.zeros((length, length + len(request.compressed)), bool)
    for position in range(length):
        mask[position, max(0, position - Request.WINDOW + 1) : position + 1] = True
        mask[position, [length + i for i in request.chosen[position]]] = True
    rows = np.concatenate([request.rows, request.compressed]).astype(np.float64)
    scores = np.where(mask[:, None], SCALE * request.q.astype(np.float64) @ rows.T, -np.inf)
    top = np.maximum(scores.max(-1), sink)[..., None]
    weights = np.exp(scores - top)
    return weights @ rows / (weights.sum(-1, keepdims=True) + np.exp(sink[:, None] - top))


def serving_step(requests: list[Request], start: int, stop: int, sink: np.ndarray, implementation: str) -> np.ndarray:
    """Positions start to stop of every request in one batch: extend = the chunk's own window, prefix = a shared pool
    with each request's compressed rows and the window rows of earlier chunks, at scattered slots."""
    rng = np.random.default_rng(99)
    pool = np.full((600, 512), np.nan, ml_dtypes.bfloat16)
    free = rng.permutation(len(pool)).tolist()
    extend = np.concatenate([r.rows[start:stop] for r in requests])
    prefix_lists, extend_lists = [], []
    for number, request in enumerate(requests):
        slots = {}
        for kind, rows in (("row", request.rows[:start]), ("compressed", request.compressed)):
            for i, row in enumerate(rows):
                slots[kind, i] = free.pop()
                pool[slots[kind, i]] = row
        base = number * (stop - start) - start
        for position in range(start, stop):
            window = range(max(0, position - Request.WINDOW + 1), position + 1)
            earlier = [slots["row", i] for i in window if i < start]
            prefix_lists.append(earlier + [slots["compressed", i] for i in request.chosen[position]])
            extend_lists.append([base + i for i in window if i >= start])
    case = Case(
        jnp.asarray(np.concatenate([r.q[start:stop] for r in requests])),
        jnp.asarray(pool),
        prefix_lists,
        jnp.asarray(extend),
        extend_lists,
        sink=sink,
        prefix_capacity=2 * 200 * 200,
        extend_capacity=2 * 200 * 128,
    )
    return np.asarray(case.run(implementation)[0]).reshape(len(requests), stop - start, 2, 512)


@fast
@pytest.mark.parametrize(("ratio", "topk"), [(4, 16), (128, None)], ids=["CSA", "HCA"])
def test_deepseek_v4_lists(ratio: int, topk: int | None, implementation: str) -> None:
    """R9: two prompts of 192 tokens in one batch, whole and as a second chunk, against dense masked attention."""
    requests = [make_request(seed, 192, ratio, topk) for seed in (100, 110)]
    sink = np.array([0.3, -0.7], np.float32)
    whole = serving_step(requests, 0, 192, sink, implementation)
    second = serving_step(requests, 150, 192, sink, implementation)
    for request, out, chunk in zip(requests, whole, second, strict=True):
        expected = dense_attention(request, sink)
        assert_rows_close(out, expected, bound(implementation))
        assert_rows_close(chunk, expected[150:], bound(implementation))
        assert_rows_close(chunk, out[150:], bound(implementation))


# calls that are wrong


def bad(**changes: Any) -> Callable[[], Any]:
    """A valid CSR call, but for the changes."""

    def call() -> Any:
        case = standard()
        names = ("q", "prefix", "prefix_indices", "prefix_indptr", "extend", "extend_indices", "extend_indptr")
        arguments = dict(zip(names, case.arguments(), strict=True)) | changes
        return sparse_prefill(**arguments)

    return call


def bad_topk(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        case = standard()
        arguments = {"q": case.q, "prefix": case.prefix, "indices": jnp.zeros((T, 5), jnp.int32)} | changes
        return sparse_prefill_topk(**arguments)

    return call


def part(name: str, shape: tuple[int, ...], dtype: Any, lead: tuple[int, ...]) -> Fp8Latent:
    return dataclasses.replace(quantize(jnp.zeros((*lead, 512))), **{name: jnp.zeros(shape, dtype)})


def ints(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


BAD_INPUT = {
    "q rank": (bad(q=jnp.zeros((T, 512), jnp.bfloat16)), "q"),
    "q width": (bad(q=jnp.zeros((T, H, 576), jnp.bfloat16)), "q"),
    "q dtype": (bad(q=jnp.zeros((T, H, 512), jnp.float8_e4m3fn)), "q"),
    "q list": (bad(q=[1.0]), "q"),
    "q none": (bad(q=None), "q"),
    "q without heads": (bad(q=jnp.zeros((T, 0, 512), jnp.bfloat16)), "q"),
    "q latent rank": (bad(q=part("rope", (T, 64), jnp.bfloat16, (T,))), "q.nope"),
    "q latent rope": (bad(q=part("rope", (T, H, 63), jnp.bfloat16, (T, H))), "q.rope"),
    "prefix rank": (bad(prefix=jnp.zeros((P, 1, 512), jnp.bfloat16)), "prefix"),
    "prefix width": (bad(prefix=jnp.zeros((P, 448), jnp.bfloat16)), "prefix"),
    "prefix dtype": (bad(prefix=jnp.zeros((P, 512), jnp.uint8)), "prefix"),
    "prefix none": (bad(prefix=None), "prefix"),
    "prefix scale rows": (bad(prefix=part("scale", (P + 1, 7), jnp.float32, (P,))), "prefix.scale"),
    "prefix scale width": (bad(prefix=part("scale", (P, 8), jnp.float32, (P,))), "prefix.scale"),
    "prefix scale dtype": (bad(prefix=part("scale", (P, 7), jnp.float16, (P,))), "prefix.scale"),
    "prefix codes dtype": (bad(prefix=part("nope", (P, 448), jnp.float8_e5m2, (P,))), "prefix.nope"),
    "prefix rope dtype": (bad(prefix=part("rope", (P, 64), jnp.float32, (P,))), "prefix.rope"),
    "prefix_indices rank": (bad(prefix_indices=ints(T, 4)), "prefix_indices"),
    "prefix_indices dtype": (bad(prefix_indices=jnp.zeros(9, jnp.uint32)), "prefix_indices"),
    "prefix_indices numpy int64": (bad(prefix_indices=np.zeros(9, np.int64)), "prefix_indices"),
    "prefix_indptr length": (bad(prefix_indptr=ints(T)), "prefix_indptr"),
    "prefix_indptr dtype": (bad(prefix_indptr=jnp.zeros(T + 1)), "prefix_indptr"),
    "extend width": (bad(extend=jnp.zeros((S, 64), jnp.bfloat16)), "extend"),
    "extend without indices": (bad(extend_indices=None), "extend_indices"),
    "extend without indptr": (bad(extend_indptr=None), "extend_indptr"),
    "lists without extend": (bad(extend=None), "extend"),
    "extend_indptr length": (bad(extend_indptr=ints(T + 2)), "extend_indptr"),
    "sink shape": (bad(attn_sink=jnp.zeros(H + 1)), "attn_sink"),
    "sink dtype": (bad(attn_sink=jnp.zeros(H, jnp.bfloat16)), "attn_sink"),
    "sink number": (bad(attn_sink=0.0), "attn_sink"),
    "softmax_scale array": (bad(softmax_scale=jnp.ones(2)), "softmax_scale"),
    "softmax_scale text": (bad(softmax_scale="1"), "softmax_scale"),
    "return_lse": (bad(return_lse=1), "return_lse"),
    "out_dtype": (bad(out_dtype=jnp.float8_e4m3fn), "out_dtype"),
    "out_dtype none": (bad(out_dtype=None), "out_dtype"),
    "precision": (bad(precision="fast"), "precision"),
    "implementation": (bad(implementation="cuda"), "implementation"),
    "indices rank": (bad_topk(indices=ints(T)), "indices"),
    "indices rows": (bad_topk(indices=ints(T + 1, 5)), "indices"),
    "indices dtype": (bad_topk(indices=jnp.zeros((T, 5), jnp.int16)), "indices"),
    "lengths shape": (bad_topk(lengths=ints(T + 1)), "lengths"),
    "lengths dtype": (bad_topk(lengths=jnp.zeros(T)), "lengths"),
    "extend alone": (bad_topk(extend=jnp.zeros((S, 512), jnp.bfloat16)), "extend_indices"),
    "extend_lengths alone": (bad_topk(extend_lengths=ints(T)), "extend_lengths"),
    "extend_indices rows": (bad_topk(extend=jnp.zeros((S, 512)), extend_indices=ints(2, 2)), "extend_indices"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    """R15: raised while tracing, with the argument, what came and what was expected."""
    call, argument = BAD_INPUT[case]
    with pytest.raises(InvalidInputError, match=rf"^sparse_prefill(_topk)?: {argument} is .*expected"):
        jax.eval_shape(call)


def test_selection_is_strict_and_explained() -> None:
    """R14."""
    case = standard()
    with pytest.raises(UnsupportedError, match=r"pallas: (needs cuda|rows must be FP8)"):
        standard(0, "float32").run("pallas")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.arguments())
    explanation = dispatch.explain("sparse_prefill", *shapes)
    assert explanation.taken == "xla" and explanation.problem.prefix.rows == P
    matrix = dispatch.explain("sparse_prefill_topk", *shapes[:2], jax.ShapeDtypeStruct((T, 5), jnp.int32))
    assert matrix.taken == "xla" and matrix.problem.prefix.entries == 5 * T


@pytest.mark.parametrize("heads", [8, 128])
def test_kernels_are_chosen_on_hopper(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """R14: for FP8 and bf16 rows, both pools alike, whatever q is and however many heads there are."""
    monkeypatch.delenv("JAX_FP8ATTN_IMPLEMENTATION")

    def explanation(form: str, **changes: Any) -> dispatch.Explanation:
        shapes = jax.eval_shape(lambda: standard(0, form).but(**changes).arguments())
        return dispatch.explain("sparse_prefill", jax.ShapeDtypeStruct((T, heads, 512), jnp.bfloat16), *shapes[1:])

    with dispatch.target_device(dispatch.Device("cuda", "NVIDIA H200", (9, 0))):
        assert [explanation(form).taken for form in ("fp8", "bytes", "bfloat16")] == ["pallas"] * 3
        two_forms, float32 = explanation("fp8", extend=normal(6, S, 512)), explanation("float32")
        assert (two_forms.taken, float32.taken) == ("xla", "xla")
        assert "both pools must have one form" in str(two_forms) and "FP8 or bfloat16" in str(float32)
    with dispatch.target_device(dispatch.Device("cuda", "NVIDIA B200", (10, 0))):
        assert explanation("fp8").taken == "xla"


# value checks


@functools.cache
def bad_values() -> dict[str, tuple[Callable[..., None], str]]:
    case = standard()
    q, prefix, indices, indptr, extend, extend_indices, extend_indptr = case.arguments()
    first = int(indptr[4])
    nan_scale = dataclasses.replace(extend, scale=extend.scale.at[:, 3].set(jnp.nan))
    zero_scale = dataclasses.replace(prefix, scale=prefix.scale.at[int(indices[0])].set(0))
    matrix, lengths = jnp.full((T, 6), 3, jnp.int32), jnp.full(T, 4, jnp.int32)

    def csr(pool: Any = prefix, i: Any = indices, p: Any = indptr, **options: Any) -> Callable[..., None]:
        return lambda: checks.sparse_prefill(q, pool, i, p, **options)

    def topk(i: Any = matrix, n: Any = lengths, **options: Any) -> Callable[..., None]:
        return lambda: checks.sparse_prefill_topk(q, prefix, i, n, **options)

    pair = {"extend": extend, "extend_indices": extend_indices}
    return {
        "not from 0": (csr(p=indptr.at[0].set(1)), r"prefix_indptr\[0\] is not 0"),
        "decreasing": (csr(p=indptr.at[7].set(indptr[6] - 1)), r"prefix_indptr\[7\] is smaller"),
        "past the end": (
            csr(p=indptr.at[-1].set(PREFIX_CAPACITY + 1)),
            rf"prefix_indptr\[{T}\] is larger than {PREFIX_CAPACITY}",
        ),
        "row of no pool": (
            csr(i=indices.at[first + 2].set(P)),
            rf"prefix_indices\[{first + 2}\] is listed \(entry 2 of token 4\), and is none of the {P} rows",
        ),
        "negative": (csr(i=indices.at[first].set(-1)), rf"prefix_indices\[{first}\] is listed"),
        "another filler": (csr(i=indices.at[first].set(-2), padding=-1), rf"prefix_indices\[{first}\]"),
        "extend": (csr(**pair, extend_indptr=extend_indptr.at[0].set(2)), r"extend_indptr\[0\] is not 0"),
        "row of the other pool": (
            csr(**pair | {"extend_indices": extend_indices.at[0].set(S + 1)}, extend_indptr=extend_indptr),
            r"extend_indices\[0\]",
        ),
        "scales": (csr(pool=zero_scale, scales=True), r"prefix_indices\[0\] lists .*a row whose scale"),
        "extend scales": (
            csr(**pair | {"extend": nan_scale}, extend_indptr=extend_indptr, scales=True),
            "extend_indices",
        ),
        "lengths": (topk(n=lengths.at[3].set(7)), r"lengths\[3\] is outside 0\.\.6"),
        "negative length": (topk(n=lengths.at[3].set(-1)), r"lengths\[3\]"),
        "matrix entry": (topk(i=matrix.at[5, 2].set(P)), r"indices\[5, 2\] is listed"),
        "no lengths": (topk(i=matrix.at[5, 5].set(-1), n=None), r"indices\[5, 5\] is listed"),
        "q scales": (
            lambda: checks.sparse_prefill_topk(
                part("scale", (T, H, 7), jnp.float32, (T, H)), prefix, matrix, scales=True
            ),
            r"q.scale\[0, 0, 0\]",
        ),
    }


@pytest.mark.parametrize("case", bad_values())
def test_value_checks(case: str) -> None:
    """R4, R15: on the host for concrete arrays, through checkify under jit."""
    call, message = bad_values()[case]
    with pytest.raises(InvalidInputError, match=message):
        call()


def test_value_checks_under_jit() -> None:
    """R15: the same facts as checkify errors, and silence for a good call."""
    case = standard()
    arguments = case.arguments()

    checked = jax.jit(checkify.checkify(lambda *a: checks.sparse_prefill(*a, scales=True)))
    error, _ = checked(*arguments)
    assert error.get() is None
    for position, spoilt, message in (
        (3, arguments[3].at[7].set(arguments[3][6] - 1), "prefix_indptr"),
        (2, arguments[2].at[0].set(P), "prefix_indices"),
        (5, arguments[5].at[0].set(-1), "extend_indices"),
    ):
        error, _ = checked(*[spoilt if i == position else a for i, a in enumerate(arguments)])
        with pytest.raises(checkify.JaxRuntimeError, match=f"sparse_prefill: {message}"):
            error.throw()


def test_value_checks_pass_good_calls() -> None:
    """Fillers outside the lists, -1 where it is announced, byte-0 scales."""
    case = standard()
    q, prefix, indices, indptr, *rest = case.arguments()
    prefix = dataclasses.replace(prefix.with_scale_dtype("uint8"), scale=jnp.zeros((P, 7), jnp.uint8))
    checks.sparse_prefill(q, prefix, indices.at[0].set(-1), indptr, *rest, padding=-1, scales=True)
    matrix = jnp.full((T, 6), 3, jnp.int32).at[:, 4:].set(INT_MAX)
    checks.sparse_prefill_topk(q, prefix, matrix, jnp.full(T, 4, jnp.int32), scales=True)


# many cases


@pytest.mark.slow
@fast
def test_ten_thousand_random_cases(implementation: str) -> None:
    """R2: random lists, offsets, scales and sinks, hostile ones among them; no NaN, and every one equals float64."""
    instances, rounds = 100, 100
    tokens, heads, rows, extend_rows, entries = 3, 2, 24, 9, 40
    options = {"return_lse": True, "out_dtype": jnp.float32}
    op = jax.jit(
        jax.vmap(lambda scale, sink, *a: call(implementation, *a, softmax_scale=scale, attn_sink=sink, **options))
    )
    stored = quantize if implementation in KERNELS else lambda x: x
    for number in range(rounds):
        rng = np.random.default_rng(1000 + number)
        q = rng.standard_normal((instances, tokens, heads, 512)) * np.exp2(rng.integers(-4, 3, (instances, 1, 1, 1)))
        prefix = quantize(
            jnp.asarray(
                rng.standard_normal((instances, rows, 512)) * np.exp2(rng.integers(-3, 3, (instances, rows, 1))),
                jnp.float32,
            )
        )
        extend = stored(jnp.asarray(rng.standard_normal((instances, extend_rows, 512)), jnp.bfloat16))
        indices = hostile_integers(rng, (instances, entries), rows)
        extend_indices = hostile_integers(rng, (instances, entries), extend_rows)
        indptr = np.sort(hostile_integers(rng, (instances, tokens + 1), entries + 1), axis=-1)
        extend_indptr = hostile_integers(rng, (instances, tokens + 1), entries + 1)
        scale = rng.choice([SCALE, 0.0, -SCALE, 0.2], instances).astype(np.float32)
        sink = rng.choice([-np.inf, np.inf, -3.0, 0.0, 7.0], (instances, heads)).astype(np.float32)
        q = jnp.asarray(q, jnp.bfloat16)
        out, lse = op(scale, sink, q, prefix, indices, indptr, extend, extend_indices, extend_indptr)
        assert np.isfinite(np.asarray(out)).all() and not np.isnan(np.asarray(lse)).any()
        rows_of = [exact_rows(x) for x in (q, prefix, extend)]
        lists = (rows_of[0], rows_of[1], indices, indptr, rows_of[2], extend_indices, extend_indptr)
        expected = [random_answer(i, *lists, scale, sink) for i in range(instances)]
        # a sink far above the scores leaves results below float32's range: 0 there
        out, want = (np.where(np.abs(x) < 1e-30, 0, x) for x in (np.asarray(out), np.stack([o for o, _ in expected])))
        assert_rows_close(out, want, bound(implementation, 10 * EXACT))
        assert_lse_close(lse, np.stack([s for _, s in expected]), 1e-4 if implementation == "xla" else 1e-3)


def hostile_integers(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    x = rng.integers(0, count, shape)
    hostile = rng.choice([*HOSTILE, count, count + 1], shape)
    return np.where(rng.random(shape) < 1 / 16, hostile, x).astype(np.int32)


def random_answer(
    i: int,
    q: Any,
    prefix: Any,
    indices: Any,
    indptr: Any,
    extend: Any,
    extend_indices: Any,
    extend_indptr: Any,
    scale: Any,
    sink: Any,
) -> tuple[np.ndarray, np.ndarray]:
    results = []
    for t in range(q.shape[1]):
        listed = []
        for rows, entries, offsets in ((prefix, indices, indptr), (extend, extend_indices, extend_indptr)):
            start, end = np.clip(offsets[i, t : t + 2], 0, entries.shape[1])
            chosen = entries[i, start:end]
            listed.append(rows[i][chosen[(chosen >= 0) & (chosen < rows.shape[1])]])
        results.append(attention(q[i, t], np.concatenate(listed), float(scale[i]), sink[i]))
    return np.stack([out for out, _ in results]), np.stack([lse for _, lse in results], axis=1)
