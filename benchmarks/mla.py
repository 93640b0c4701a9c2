"""``mla_prefill`` against FlashAttention-3: the kernel alone, and the op from the operands as they are given."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_fp8attn.benchmarks import peers
from jax_fp8attn.benchmarks.models import Case
from jax_fp8attn.benchmarks.timing import Contender
from jax_fp8attn.benchmarks.trial import Trial
from jax_fp8attn.pallas import mla_prefill_sm90

from jax_fp8attn.problems import MlaArrays, MlaProblem
from jax_fp8attn.quantize import cast_fp8

SETS = 2
CHECKED = 256  # last rows of the first sequence, first and last head
BOUNDS = {"fp8": 0.035, "bf16": 0.006}  # relative L2 on standard normal operands


def trial(case: Case, folder: Path | None) -> Trial:
    """``case.variant`` is "<fp8 or bf16> <causal or full>"; B sequences of equal lengths."""
    precision, mask = case.variant.split()[:2]
    causal, shape = mask == "causal", case.shape
    inputs = [_inputs(shape, precision, seed) for seed in range(SETS)]
    problem, name_of = _problem(shape, causal, inputs[0][0].dtype), "{}" if precision == "fp8" else "{} bf16"
    config = mla_prefill_sm90.default_config(problem)
    contenders = _ours(problem, config, inputs) if precision == "fp8" else []
    for name, function in peers.fa3(folder).items():
        contenders.append(_fa3(name_of.format(name), function, shape, causal, inputs))
        if config.splits > 1:
            split = functools.partial(function, num_splits=0)
            contenders.append(_fa3(name_of.format(f"{name} split"), split, shape, causal, inputs))
    q_rows, k_rows = shape["T"] // shape["B"], shape["S"] // shape["B"]
    expected = _expected([x[:n] for x, n in zip(inputs[0], (q_rows, k_rows, k_rows), strict=True)], causal)
    pairs = shape["B"] * (q_rows * k_rows - (q_rows * (q_rows - 1) // 2 if causal else 0))
    return Trial(
        contenders=contenders,
        sets=SETS,
        bytes=sum(x.nbytes for x in inputs[0]) + 2 * shape["T"] * shape["H"] * 128,
        flops=2 * (192 + 128) * shape["H"] * pairs,
        error=lambda _, result: _error(result, expected, q_rows),
        bound=lambda _: BOUNDS[precision],
    )


def _inputs(shape: dict[str, int], precision: str, seed: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((shape["T"], shape["H"], 192), (shape["S"], shape["H"], 192), (shape["S"], shape["H"], 128))
    cast = cast_fp8 if precision == "fp8" else lambda x: x
    return [cast(jax.random.normal(key, size, jnp.bfloat16)) for key, size in zip(keys, sizes, strict=True)]


def _problem(shape: dict[str, int], causal: bool, dtype: np.dtype) -> MlaProblem:
    return MlaProblem(
        tokens=shape["T"], keys=shape["S"], sequences=shape["B"], heads=shape["H"], q_dtype=dtype, k_dtype=dtype,
        v_dtype=dtype, out_dtype=jnp.dtype(jnp.bfloat16), causal=causal, return_lse=True,
    )  # fmt: skip


def _ours(problem: MlaProblem, config: mla_prefill_sm90.MlaConfig, inputs: list[list[jax.Array]]) -> list[Contender]:
    """The kernel, where it splits the keys with the merge, and the op."""

    def ranges(rows: int) -> tuple[jax.Array, jax.Array]:
        length = rows // problem.sequences
        start = np.arange(problem.sequences) * length
        return jnp.asarray(start, jnp.int32), jnp.full(problem.sequences, length, jnp.int32)

    one = jnp.ones(1)
    facts = (*ranges(problem.tokens), *ranges(problem.keys), one * 192**-0.5, one, one, one, None, None, None)
    given = [MlaArrays(q, k, None, v, *facts) for q, k, v in inputs]
    steps = mla_prefill_sm90.steps_of(problem, config)

    @jax.jit
    def kernel(arrays: MlaArrays, operands: Any, work: Any) -> Any:
        results = steps.attend(operands)
        return results if config.splits == 1 else steps.finish(arrays, work, results)

    prepared = [jax.jit(steps.prepare)(arrays) for arrays in given]
    op = jax.jit(mla_prefill_sm90.build(problem, config))
    return [
        Contender("pallas kernel", lambda i: kernel(given[i], *prepared[i])),
        Contender("pallas", lambda i: op(given[i])),
    ]


def _fa3(name: str, function: Any, shape: dict[str, int], causal: bool, inputs: list[list[jax.Array]]) -> Contender:
    import torch

    tensors = [[peers.to_torch(jax.lax.bitcast_convert_type(x, jnp.uint8)) for x in given] for given in inputs]
    kind = torch.bfloat16 if name.endswith("bf16") else torch.float8_e4m3fn
    tensors = [
        [x.view(kind).reshape(y.shape) for x, y in zip(*pair, strict=True)]
        for pair in zip(tensors, inputs, strict=True)
    ]
    rows = [shape[axis] // shape["B"] for axis in "TS"]
    offsets = [torch.arange(shape["B"] + 1, device="cuda", dtype=torch.int32) * n for n in rows]
    outputs = [torch.empty(x[0].shape[0], shape["H"], 128, device="cuda", dtype=torch.bfloat16) for x in tensors]

    def call(i: int) -> Any:
        return function(*tensors[i], outputs[i], causal, *offsets, tuple(rows))

    return Contender(name, call, is_peer=True)


def _expected(sequence: list[jax.Array], causal: bool) -> jax.Array:
    """float32 [2, rows, 128]: the last rows of a sequence for its first and its last head."""
    q, k, v = (x[:, jnp.array([0, -1])].astype(jnp.float32) for x in sequence)
    rows = min(CHECKED, q.shape[0])
    score = jnp.einsum("qhd,khd->hqk", q[-rows:], k, precision="highest") * 192**-0.5
    if causal:
        last = jnp.arange(q.shape[0])[-rows:] + k.shape[0] - q.shape[0]
        score = jnp.where(jnp.arange(k.shape[0]) <= last[:, None], score, -jnp.inf)
    return jnp.einsum("hqk,khd->hqd", jax.nn.softmax(score, axis=-1), v, precision="highest")


def _error(result: Any, expected: jax.Array, rows: int) -> float:
    out = result[0] if isinstance(result, tuple | list) else result
    out = out if isinstance(out, jax.Array) else jnp.from_dlpack(out)
    first = max(0, rows - expected.shape[1])
    got = jnp.swapaxes(out[first:rows][:, jnp.array([0, -1])], 0, 1).astype(jnp.float32)
    return float(jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel()))
