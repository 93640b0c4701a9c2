"""Device time of the Hopper kernels of ``sparse_prefill`` on few heads: every form of the one for few heads, and that
of 64 heads, in turns. Prints one line of JSON a form; what is wrong, or gives other bits when repeated, is not timed.

On a GPU: python -m jax_fp8attn.benchmarks.sparse_heads [--heads 8 16 32] [--rows fp8|bytes|bf16]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_fp8attn.benchmarks.models import WINDOW
from jax_fp8attn.benchmarks.timing import Contender, measure
from jax_fp8attn.pallas import sparse_narrow_sm90, sparse_prefill_sm90
from jax_fp8attn.pallas.common.configs import MULTIPROCESSORS

from jax_fp8attn.latent import Fp8Latent, quantize_latent
from jax_fp8attn.problems import PoolForm, RowForm, SparseArrays, SparsePool, SparseProblem
from jax_fp8attn.quantize import E4M3
from jax_fp8attn.testing import row_relative_l2
from jax_fp8attn.xla import sparse_prefill as xla

BOUND = 6e-3
CHECKED, REPEATS = 64, 20  # tokens that are compared; calls that must agree
BF16 = jnp.dtype(jnp.bfloat16)
FORMS = {"fp8": (64, "float32"), "bytes": (32, "uint8"), "bf16": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prefix", type=int, default=512, help="prefix rows a token")
    parser.add_argument(
        "--extend", type=int, default=WINDOW, help="extend rows a token, a window of the chunk; 0: none"
    )
    parser.add_argument("--pool", type=int, default=65536, help="rows of the prefix pool")
    parser.add_argument("--rows", choices=sorted(FORMS), default="fp8")
    options = parser.parse_args()
    for heads in options.heads:
        for record in timed(options, heads):
            print(json.dumps(record), flush=True)


def timed(options: argparse.Namespace, heads: int) -> Iterator[dict[str, Any]]:
    problem, arrays = problem_of(options, heads)
    expected = checked_tokens(problem, arrays)
    contenders, facts = [], {}
    for name, function in forms(problem):
        call = jax.jit(function)
        error, repeats = judged(call, arrays, expected)
        facts[name] = {"heads": heads, "form": name, "rows": options.rows, "error": error, "repeats": repeats}
        if error <= BOUND and repeats:
            contenders.append(Contender(name, functools.partial(lambda call, _: call(arrays), call)))
    times = measure(contenders, 1)
    count = options.tokens * (options.prefix + options.extend)
    size = row_bytes(arrays.prefix.rows)
    for name, fact in facts.items():
        if name in times:
            us = times[name].median
            fact |= {"us": us, "spread": times[name].spread, "gathered_TB_s": count * size / us / 1e6}
            fact["of_64_heads"] = us / times["64 heads"].median if "64 heads" in times else None
        yield fact


def forms(problem: SparseProblem) -> Iterator[tuple[str, Callable[[SparseArrays], Any]]]:
    """Heads up to 32 are a part of a tile for the kernel of 64 heads: its time is that of padded heads."""
    yield "64 heads", sparse_prefill_sm90.build(problem, sparse_prefill_sm90.default_config(problem))
    default = sparse_narrow_sm90.default_config(problem)
    yield f"default {default}", sparse_narrow_sm90.build(problem, default)
    for early, depth, blocks in itertools.product((False, True), (1, 2), (0, 2 * MULTIPROCESSORS)):
        config = sparse_narrow_sm90.NarrowConfig(default.ahead, early, depth, blocks)
        if config != default:
            yield str(config), sparse_narrow_sm90.build(problem, config)


def judged(call: Callable[[SparseArrays], Any], arrays: SparseArrays, expected: Any) -> tuple[float, bool]:
    """The largest error of the tokens that are compared, and whether all calls give the same bits."""
    first = call(arrays)
    same = all(bool((call(arrays) == first).all()) for _ in range(REPEATS))
    return float(np.max(row_relative_l2(first[:CHECKED], expected))), same


def checked_tokens(problem: SparseProblem, arrays: SparseArrays) -> Any:
    few = lambda pool: None if pool is None else pool._replace(start=pool.start[:CHECKED], end=pool.end[:CHECKED])
    arrays = arrays._replace(q=arrays.q[:CHECKED], prefix=few(arrays.prefix), extend=few(arrays.extend))
    return jax.jit(functools.partial(xla.run, dataclasses.replace(problem, tokens=CHECKED)))(arrays)


def problem_of(options: argparse.Namespace, heads: int) -> tuple[SparseProblem, SparseArrays]:
    """bf16 queries; random rows of the prefix pool, and the last rows of the chunk."""
    rng, tokens, form = np.random.default_rng(0), options.tokens, FORMS[options.rows]
    listed = rng.integers(0, options.pool, (tokens, options.prefix))
    window = np.maximum(np.arange(tokens)[:, None] - np.arange(options.extend), 0)
    pools = [pool_of(rng, options.pool, listed, form)]
    pools.append(pool_of(rng, tokens, window, form) if options.extend else (None, None))
    problem = SparseProblem(
        tokens=tokens, heads=heads, q=RowForm(BF16), prefix=pools[0][0], extend=pools[1][0], out_dtype=BF16,
        has_sink=True,
    )  # fmt: skip
    sink = jnp.linspace(-1.0, 3.0, heads, dtype=jnp.float32)[None]
    scale = jnp.full((1,), 512**-0.5, jnp.float32)
    return problem, SparseArrays(normal(rng, tokens, heads, 512), pools[0][1], pools[1][1], scale, sink)


def pool_of(rng: Any, count: int, lists: np.ndarray, form: Any) -> tuple[PoolForm, SparsePool]:
    rows: Any = normal(rng, count, 512)
    stored = RowForm(BF16)
    if form is not None:
        rows = quantize_latent(rows, group=form[0], scale_dtype=form[1])
        stored = RowForm(jnp.dtype(E4M3), form[0], jnp.dtype(form[1]))
    bounds = jnp.arange(len(lists) + 1, dtype=jnp.int32) * lists.shape[1]
    pool = SparsePool(rows, jnp.asarray(lists.ravel(), jnp.int32), bounds[:-1], bounds[1:])
    return PoolForm(stored, count, lists.size), pool


def normal(rng: Any, *shape: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, np.float32), BF16)


def row_bytes(rows: Any) -> int:
    leaves = jax.tree.leaves(rows) if isinstance(rows, Fp8Latent) else [rows]
    return sum(x.shape[-1] * x.dtype.itemsize for x in leaves)


if __name__ == "__main__":
    main()
