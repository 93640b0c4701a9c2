"""Peak memory and time of ``gdn_prefill`` at a real size, inputs included; prints one line of JSON.

Exit status 1 if the peak passes the limit or the first head is off. Every run is one process, so that the peak is its
own."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fp8attn
from jax_fp8attn.gdn_prefill import gdn_prefill
from jax_fp8attn.testing import relative_error

BOUNDS = {"bfloat16": 6e-3, "float16": 6e-3, "float32": 1e-5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, nargs=2, default=(2, 8), help="of q and k, of v")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--dtype", choices=sorted(BOUNDS), default="bfloat16")
    parser.add_argument("--backward", action="store_true", help="value and gradients instead of the value")
    parser.add_argument("--limit-gib", type=float, default=2.0)
    options = parser.parse_args()

    tensors = arguments(options)
    cu_seqlens = jnp.linspace(0, options.tokens, options.sequences + 1).astype(jnp.int32)
    function = jax.jit(gradients if options.backward else forward)
    started = time.perf_counter()
    compiled = function.lower(tensors, cu_seqlens).compile()
    compile_s = time.perf_counter() - started
    started = time.perf_counter()
    out, state = jax.block_until_ready(compiled(tensors, cu_seqlens))[:2]
    seconds = time.perf_counter() - started
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    error = first_head_error(tensors, cu_seqlens, out, state)
    ok = peak_gib <= options.limit_gib and error <= BOUNDS[options.dtype]
    print(
        json.dumps(
            {
                "op": "gdn_prefill",
                "version": jax_fp8attn.__version__,
                "jax": jax.__version__,
                **vars(options),
                "device": jax.devices()[0].device_kind,
                "peak_gib": round(peak_gib, 3),
                "seconds": round(seconds, 3),
                "compile_seconds": round(compile_s, 3),
                "relative_error": float(f"{error:.3g}"),
                "ok": ok,
            }
        )
    )
    return 0 if ok else 1


def forward(tensors: tuple[jax.Array, ...], cu_seqlens: jax.Array) -> Any:
    return gdn_prefill(*tensors, cu_seqlens=cu_seqlens, qk_l2norm=True)


def gradients(tensors: tuple[jax.Array, ...], cu_seqlens: jax.Array) -> Any:
    def loss(tensors: tuple[jax.Array, ...]) -> Any:
        out, state = forward(tensors, cu_seqlens)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(state**2), (out, state)

    (_, (out, state)), gradient = jax.value_and_grad(loss, has_aux=True)(tensors)
    return out, state, gradient


def arguments(options: argparse.Namespace) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    few, many = options.heads
    shapes = [(options.tokens, few, options.width)] * 2 + [(options.tokens, many, options.width)]
    q, k, v = (jax.random.normal(key, shape, options.dtype) for key, shape in zip(keys, shapes, strict=False))
    gates = (options.tokens, many)
    g = -0.1 * jax.nn.softplus(jax.random.normal(keys[3], gates))
    return q, k, v, g, jax.nn.sigmoid(jax.random.normal(keys[4], gates))


def first_head_error(tensors: tuple[jax.Array, ...], cu_seqlens: jax.Array, out: jax.Array, state: jax.Array) -> float:
    """The larger relative error of head 0's output and of its final states, against the recurrence in float64."""
    q, k, v, g, beta = (np.asarray(x[:, 0], np.float64) for x in tensors)
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    expected = np.zeros_like(v)
    finals = np.zeros((len(cu_seqlens) - 1, v.shape[1], k.shape[1]))
    for b, (first, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        s = finals[b]  # [V, K]
        for t in range(first, end):
            s *= np.exp(g[t])
            s += np.outer(beta[t] * (v[t] - s @ k[t]), k[t])
            expected[t] = s @ q[t] * q.shape[1] ** -0.5
    return max(relative_error(out[:, 0], expected), relative_error(state[:, 0], finals))


if __name__ == "__main__":
    sys.exit(main())
