"""Peak memory and time of ``sparse_prefill`` at a real size, inputs included; prints one line of JSON.

Exit status 1 if the peak passes the limit or sampled tokens are off. One process a run, so that the peak is its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8attn
from jax_fp8attn.latent import quantize_latent
from jax_fp8attn.sparse_prefill import sparse_prefill
from jax_fp8attn.testing import row_relative_l2

BOUND = 6e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=512, help="prefix rows a token")
    parser.add_argument("--extend", type=int, default=128, help="extend rows a token, fewer at the start of the chunk")
    parser.add_argument("--pool", type=int, default=65536, help="rows of the prefix pool")
    parser.add_argument("--limit-gib", type=float, default=4.0)
    options = parser.parse_args()

    q, *lists = arguments(options)
    op = jax.jit(sparse_prefill)
    started = time.perf_counter()
    compiled = op.lower(q, *lists).compile()
    compile_s = time.perf_counter() - started
    started = time.perf_counter()
    out = jax.block_until_ready(compiled(q, *lists))
    seconds = time.perf_counter() - started
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    error = sampled_error(q, lists, out)
    flop = 4 * options.heads * 512 * (options.prefix * options.tokens + extend_lengths(options).sum())
    ok = peak_gib <= options.limit_gib and error <= BOUND
    print(
        json.dumps(
            {
                "op": "sparse_prefill",
                "version": jax_fp8attn.__version__,
                "jax": jax.__version__,
                **vars(options),
                "device": jax.devices()[0].device_kind,
                "peak_gib": round(peak_gib, 3),
                "seconds": round(seconds, 3),
                "compile_seconds": round(compile_s, 3),
                "gflop_per_s": round(float(flop) / seconds / 1e9, 1),
                "worst_row_relative_l2": float(f"{error:.3g}"),
                "ok": ok,
            }
        )
    )
    return 0 if ok else 1


def extend_lengths(options: argparse.Namespace) -> np.ndarray:
    return np.minimum(np.arange(options.tokens) + 1, options.extend)


def arguments(options: argparse.Namespace) -> list[object]:
    """bf16 queries, FP8 rows; a top-k out of the prefix, the window before each token out of the chunk."""
    rng = np.random.default_rng(0)
    key_q, key_prefix, key_extend = jax.random.split(jax.random.key(0), 3)
    quantize = jax.jit(quantize_latent)
    q = normal(key_q, options.tokens, options.heads * 512).reshape(options.tokens, options.heads, 512)
    prefix = quantize(normal(key_prefix, options.pool, 512))
    extend = quantize(normal(key_extend, options.tokens, 512))
    prefix_indices = jnp.asarray(rng.integers(0, options.pool, options.tokens * options.prefix), jnp.int32)
    prefix_indptr = jnp.arange(options.tokens + 1, dtype=jnp.int32) * options.prefix
    lengths = extend_lengths(options)
    window = [np.arange(t - n + 1, t + 1) for t, n in enumerate(lengths)]
    extend_indptr = jnp.asarray(np.append(0, np.cumsum(lengths)), jnp.int32)
    extend_indices = jnp.asarray(np.concatenate(window), jnp.int32)
    return [q, prefix, prefix_indices, prefix_indptr, extend, extend_indices, extend_indptr]


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, rows: int, width: int) -> jax.Array:
    """bf16 [rows, width], row by row: the generator needs a multiple of what it returns."""
    return jax.lax.map(lambda k: jax.random.normal(k, width, jnp.bfloat16), jax.random.split(key, rows))


def sampled_error(q: jax.Array, lists: list[object], out: jax.Array) -> float:
    """Worst row-relative L2 error of four tokens against float64."""
    prefix, prefix_indices, prefix_indptr, extend, extend_indices, extend_indptr = lists
    worst = 0.0
    for t in np.linspace(0, q.shape[0] - 1, 4).astype(int):
        rows = np.concatenate(
            [
                take(prefix, prefix_indices[prefix_indptr[t] : prefix_indptr[t + 1]]),
                take(extend, extend_indices[extend_indptr[t] : extend_indptr[t + 1]]),
            ]
        )
        scores = np.asarray(q[t].astype(jnp.float32), np.float64) @ rows.T * 512**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights @ rows / weights.sum(-1, keepdims=True)
        worst = max(worst, float(row_relative_l2(out[t], expected).max()))
    return worst


def take(pool: object, rows: jax.Array) -> np.ndarray:
    return np.asarray(jax.tree.map(lambda x: x[rows], pool).dequantize(), np.float64)


if __name__ == "__main__":
    sys.exit(main())
