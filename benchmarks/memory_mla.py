"""Peak memory and time of ``mla_prefill`` at a real size, inputs included; prints one line of JSON.

Exit status 1 if the peak passes the limit or sampled rows are off. Every run is one process: the peak is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8attn
from jax_fp8attn.mla_prefill import mla_prefill
from jax_fp8attn.testing import row_relative_l2

BOUND = 6e-3  # bf16 output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--keys", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="not causal")
    parser.add_argument("--limit-gib", type=float, default=2.0)
    options = parser.parse_args()

    causal = not options.full
    operands = arguments(options)
    started = time.perf_counter()
    compiled = jax.jit(lambda q, k, v: mla_prefill(q, k, v, causal=causal)).lower(*operands).compile()
    compile_s = time.perf_counter() - started
    started = time.perf_counter()
    out = jax.block_until_ready(compiled(*operands))
    seconds = time.perf_counter() - started
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    error = sampled_error(*operands, out, causal)
    flop = 2 * 320 * options.heads * sum(visible(options, t) for t in range(options.tokens))
    ok = peak_gib <= options.limit_gib and error <= BOUND
    print(
        json.dumps(
            {
                "op": "mla_prefill",
                "version": jax_fp8attn.__version__,
                "jax": jax.__version__,
                **vars(options),
                "device": jax.devices()[0].device_kind,
                "peak_gib": round(peak_gib, 3),
                "seconds": round(seconds, 3),
                "compile_seconds": round(compile_s, 3),
                "gflop_per_s": round(flop / seconds / 1e9, 1),
                "worst_row_relative_l2": float(f"{error:.3g}"),
                "ok": ok,
            }
        )
    )
    return 0 if ok else 1


def visible(options: argparse.Namespace, token: int) -> int:
    return options.keys if options.full else max(0, token + 1 + options.keys - options.tokens)


def arguments(options: argparse.Namespace) -> list[jax.Array]:
    shapes = ((options.tokens, 192), (options.keys, 192), (options.keys, 128))
    normal = jax.jit(jax.random.normal, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        normal(key, (rows, options.heads, width), jnp.bfloat16) for key, (rows, width) in zip(keys, shapes, strict=True)
    ]


def sampled_error(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, causal: bool) -> float:
    """Worst row-relative L2 error of four tokens against float64 attention over the FP8 operands."""
    worst = 0.0
    for t in np.linspace(0, q.shape[0] - 1, 4).astype(int):
        rows = t + 1 + k.shape[0] - q.shape[0] if causal else k.shape[0]
        codes = [
            jax_fp8attn.quantize_fp8(x, jax_fp8attn.Fp8PerTensor(1.0)).values
            for x in (q[t : t + 1], k[:rows], v[:rows])
        ]
        q1, k1, v1 = (np.asarray(x.astype(jnp.float32), np.float64) for x in codes)
        scores = np.einsum("hd,shd->hs", q1[0], k1) * 192**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), v1)
        worst = max(worst, float(row_relative_l2(out[t], expected).max()))
    return worst


if __name__ == "__main__":
    sys.exit(main())
