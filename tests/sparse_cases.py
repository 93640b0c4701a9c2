"""Cases of ``sparse_prefill`` and their float64 answers, written in numpy without the package's arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from implementations import PORTABLE, kernels

from jax_fp8attn import dispatch
from jax_fp8attn.latent import Fp8Latent, quantize_latent
from jax_fp8attn.sparse_prefill import sparse_prefill
from jax_fp8attn.testing import assert_bitwise_equal, assert_lse_close, assert_rows_close

INT_MAX = 2**31 - 1
SCALE = 512**-0.5
EXACT = 1e-5  # row-relative L2 of a float32 result
BF16 = 6e-3  # of a bf16 result, of float32 sums of large scores, or of a kernel, which rounds softmax weights to bf16
LSE = 1e-5

WIDE = " wide"  # behind a kernel's name: heads repeated, more than the kernel for few heads takes
WIDE_HEADS = 72  # a whole tile of the other kernel, and a part of one
NARROW = kernels("sparse_prefill")
KERNELS = tuple(name + kind for name in NARROW for kind in ("", WIDE))
IMPLEMENTATIONS = (*KERNELS, *PORTABLE)
FAST = (*KERNELS, "xla")  # those whose bits are promised

T, H, P, S = 24, 4, 96, 40
WIDTHS = 43, 21  # of lists as matrices
PREFIX_CAPACITY, EXTEND_CAPACITY = T * WIDTHS[0], T * WIDTHS[1]

quantize = jax.jit(quantize_latent, static_argnames=("group", "scale_dtype"))


def bound(implementation: str, worst: float = EXACT) -> float:
    """Of a row."""
    return worst if implementation in PORTABLE else max(worst, BF16)


def assert_lse(implementation: str, actual: Any, expected: Any) -> None:
    assert_lse_close(actual, expected, LSE if implementation in PORTABLE else 1e-3)


def call(
    implementation: str, q: Any, *rest: Any, op: Any = sparse_prefill, attn_sink: Any = None, **options: Any
) -> Any:
    """The op by a name of ``IMPLEMENTATIONS``. Of repeated heads one is returned; outside jit all have to be alike."""
    name, wide, _ = implementation.partition(WIDE)
    if not wide:
        return op(q, *rest, attn_sink=attn_sink, implementation=name, **options)
    heads = (q.nope if isinstance(q, Fp8Latent) else q).shape[1]
    copies = WIDE_HEADS // heads
    q = jax.tree.map(lambda x: repeated(x, 1, copies, 1), q)
    sink = None if attn_sink is None else repeated(attn_sink, copies)
    results = op(q, *rest, attn_sink=sink, implementation=name, **options)
    out, *lse = results if options.get("return_lse") else (results,)
    first = out[:, :heads], *(x[:heads] for x in lse)
    if not isinstance(out, jax.core.Tracer):
        again = repeated(first[0], 1, copies, 1), *(repeated(x, copies, 1) for x in first[1:])
        assert_bitwise_equal((out, *lse), again, "repeated heads")
    return first if lse else first[0]


def repeated(x: Any, *counts: int) -> jax.Array:
    """``tile``, outside jit by numpy: nothing to compile."""
    return jnp.tile(x, counts) if isinstance(x, jax.core.Tracer) else jnp.asarray(np.tile(np.asarray(x), counts))


def exact_rows(rows: Any) -> np.ndarray:
    """float64 [..., 512] of rows in any form, from their bytes."""
    if not isinstance(rows, Fp8Latent):
        return np.asarray(rows).astype(np.float64)
    codes = np.asarray(rows.nope).astype(np.float64)
    scale = np.asarray(rows.scale)
    if scale.dtype != np.float32:
        byte = scale.view(np.uint8)
        scale = np.where(byte == 255, np.nan, np.exp2(byte - 127.0))
    scale = np.repeat(scale.astype(np.float64), rows.group, axis=-1)
    return np.concatenate([codes * scale, np.asarray(rows.rope).astype(np.float64)], axis=-1)


def attention(
    q: np.ndarray, rows: np.ndarray, scale: float = SCALE, sink: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One token, q [H, 512] over rows [n, 512] in float64: out [H, 512] and lse [H], by the formula."""
    heads = q.shape[0]
    if not len(rows):
        return np.zeros((heads, 512)), np.full(heads, -np.inf)
    scores = scale * q @ rows.T
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    lse = np.log(weights.sum(-1)) + top[:, 0]
    with np.errstate(over="ignore"):
        share = 1.0 if sink is None else 1 / (1 + np.exp(sink.astype(np.float64) - lse))
    return (weights @ rows / weights.sum(-1, keepdims=True)) * np.reshape(share, (-1, 1)), lse


def concatenated(lists: Sequence[Sequence[int]], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices with a tail of INT_MAX, and indptr."""
    indptr = np.append(0, np.cumsum([len(x) for x in lists])).astype(np.int32)
    indices = np.full(capacity, INT_MAX, np.int32)
    indices[: indptr[-1]] = np.concatenate([np.asarray(x, np.int64) for x in lists])
    return indices, indptr


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, its lists as Python sequences; ``extend`` may be absent."""

    q: Any
    prefix: Any
    prefix_lists: Sequence[Sequence[int]]
    extend: Any = None
    extend_lists: Sequence[Sequence[int]] | None = None
    sink: Any = None
    scale: float | None = None
    prefix_capacity: int = PREFIX_CAPACITY
    extend_capacity: int = EXTEND_CAPACITY

    def arguments(self) -> list[Any]:
        arguments = [self.q, self.prefix, *map(jnp.asarray, concatenated(self.prefix_lists, self.prefix_capacity))]
        if self.extend is not None:
            lists = concatenated(self.extend_lists, self.extend_capacity)
            arguments += [self.extend, *map(jnp.asarray, lists)]
        return arguments

    def run(self, implementation: str = "xla", **options: Any) -> tuple[jax.Array, jax.Array]:
        options = {"out_dtype": jnp.float32, "return_lse": True} | options
        sink = None if self.sink is None else jnp.asarray(self.sink, jnp.float32)
        return call(implementation, *self.arguments(), softmax_scale=self.scale, attn_sink=sink, **options)

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        q, prefix = exact_rows(self.q), exact_rows(self.prefix)
        extend, extend_lists = prefix[:0], [()] * len(q)
        if self.extend is not None:
            extend, extend_lists = exact_rows(self.extend), self.extend_lists
        sink = None if self.sink is None else np.asarray(self.sink)
        scale = SCALE if self.scale is None else self.scale
        results = [
            # invalid indices are left out, duplicates kept
            attention(own, np.concatenate([pick(prefix, x), pick(extend, y)]), scale, sink)
            for own, x, y in zip(q, self.prefix_lists, extend_lists, strict=True)
        ]
        return np.stack([out for out, _ in results]), np.stack([lse for _, lse in results], axis=1)

    def check(self, implementation: str = "xla", worst: float = EXACT, **options: Any) -> tuple[jax.Array, jax.Array]:
        """Runs and compares out and lse with float64, kernels by their bound; returns what was computed."""
        (out, lse), (expected_out, expected_lse) = self.run(implementation, **options), self.expected()
        assert_rows_close(out, expected_out, bound(implementation, worst))
        assert_lse(implementation, lse, expected_lse)
        return out, lse

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def pick(rows: np.ndarray, indices: Sequence[int]) -> np.ndarray:
    return rows[[i for i in indices if 0 <= i < len(rows)]]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(ml_dtypes.bfloat16))


def random_lists(seed: int, rows: int, longest: int, tokens: int = T) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, rows, rng.integers(0, longest + 1)).tolist() for _ in range(tokens)]


def standard(seed: int = 0, form: str = "fp8") -> Case:
    """The shape that most tests share: bf16 q, two pools, lists of 0 to 40 and 0 to 20 rows, a sink a head.

    form: "fp8" (float32 scales), "bytes" (E8M0 scales), "bfloat16" or "float32" (q too)
    """
    q, *pools = normal(seed, T, H, 512), normal(seed + 1, P, 512), normal(seed + 2, S, 512)
    if form in ("fp8", "bytes"):
        pools = [quantize(x, scale_dtype="float32" if form == "fp8" else "uint8") for x in pools]
    elif form == "float32":
        q, *pools = (x.astype(jnp.float32) for x in (q, *pools))
    return Case(
        q=q,
        prefix=pools[0],
        prefix_lists=random_lists(seed + 3, P, 40),
        extend=pools[1],
        extend_lists=random_lists(seed + 4, S, 20),
        sink=np.linspace(-1, 3, H).astype(np.float32),
    )


def prefix_only(seed: int = 0, form: str = "fp8") -> Case:
    """``standard`` without the second pool and without sinks: half the code to compile."""
    return standard(seed, form).but(extend=None, extend_lists=None, sink=None)


def prepared(call: Callable[[], Any]) -> tuple[Any, Any]:
    """The problem and the arrays that a backend would get from ``call``."""
    taken = []

    def capture(op: Any, problem: Any, name: str, arrays: Any) -> Any:
        taken.append((problem, op.prepare(problem, arrays)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "execute", capture)
        call()
    return taken[0]
