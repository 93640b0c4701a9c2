"""What the tests of the kernels of ``sparse_prefill`` share: cases with hostile lists, and the bounds of the oracle."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sparse_cases
from sparse_cases import INT_MAX, Case, normal, prepared, quantize

from jax_fp8attn.problems import SparseArrays, SparseProblem

F32 = np.dtype(np.float32)
INF, NAN = np.inf, np.nan
P, S = 40, 24  # rows of the pools
LISTS = (  # of the prefix and of the extend rows
    ([], []),
    ([], [3]),
    ([*range(20), 7, 7, 7, -1, P, INT_MAX, -(2**31), *range(37)], []),
    ([n % 3 for n in range(64)] + [3 + n % 9 for n in range(64)] + [30, 31], [n % 5 for n in range(65)]),
    ([-1, P + 1] * 35, [S]),
    (list(range(39)) + [2] * 24, [0]),
)


def case(
    heads: int = 64,
    rows: dict[str, Any] | None = None,
    q: dict[str, Any] | None = None,
    two: bool = True,
    seed: int = 0,
) -> Case:
    """Tokens with the lists above. ``rows`` and ``q``: how they are quantised; bf16 without. Rows that no list names
    hold NaN."""
    stored = lambda x, form: x if form is None else quantize(x, **form)
    queries, prefix, extend = normal(seed, len(LISTS), heads, 512), normal(seed + 1, P, 512), normal(seed + 2, S, 512)
    sinks = np.linspace(-1, 3, heads)
    sinks[:4] = (-INF, INF, 20.0, NAN)[:heads]
    given = Case(
        q=stored(queries, q), prefix=poisoned(stored(prefix, rows), 39), prefix_lists=[x for x, _ in LISTS],
        prefix_capacity=400,
    )  # fmt: skip
    if not two:
        return given
    return given.but(
        extend=poisoned(stored(extend, rows), 10), extend_lists=[x for _, x in LISTS], extend_capacity=100,
        sink=sinks.astype(F32),
    )  # fmt: skip


def poisoned(rows: Any, first: int) -> Any:
    """NaN in row ``first`` and behind, in all parts."""

    def poison(x: Any) -> Any:
        return x.at[first:].set(255 if x.dtype == jnp.uint8 else jnp.nan)

    return jax.tree.map(poison, rows)


FP8, BYTES = {"group": 64}, {"group": 32, "scale_dtype": "uint8"}


def operands(given: Case, **options: Any) -> tuple[SparseProblem, SparseArrays]:
    problem, arrays = prepared(lambda: given.run("xla", **options))
    return problem, jax.tree.map(np.asarray, arrays)


def check(run: Any, given: Case, cut: dict[str, Any] | None = None, **options: Any) -> Any:
    """Within the bounds of the oracle, and no number where it has none."""
    out, lse = run(given, cut, **options)
    with np.errstate(invalid="ignore"):
        expected, expected_lse = given.expected()
    least = float(jnp.finfo(out.dtype).smallest_subnormal)
    out = out.astype(np.float64)
    finite = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    np.testing.assert_array_equal(np.isnan(lse), np.isnan(expected_lse))
    np.testing.assert_allclose(lse[finite], expected_lse[finite], rtol=0, atol=1e-3)
    empty = np.isneginf(expected_lse).T[..., None]  # whatever the sink
    expected = np.where(empty, 0.0, expected)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))
    mass = lambda x: np.linalg.norm(np.nan_to_num(x), axis=-1)
    lost = np.sqrt(out.shape[-1]) * least / 2  # of numbers as small as float16 has them beside a large sink
    assert (mass(out - expected) <= sparse_cases.BF16 * mass(expected) + lost).all()
    return out, lse


def slow(*cases: Any) -> list[Any]:
    return [pytest.param(*one, marks=pytest.mark.slow) for one in cases]
