"""``merge_attn_states`` against what a user has today: XLA's fusion, merge and quantise apart, vLLM's kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax_fp8attn.benchmarks import peers
from jax_fp8attn.benchmarks.models import Case
from jax_fp8attn.benchmarks.timing import Contender
from jax_fp8attn.benchmarks.trial import Trial

from jax_fp8attn import merge_attn_states, merge_attn_states_n, quantize_fp8
from jax_fp8attn.problems import MergeArrays, MergeProblem
from jax_fp8attn.quantize import Fp8Array, Fp8PerGroup, Fp8PerTensor

SCALE = 0.05
SETS = 3
INPUTS = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
OUTPUTS = {
    "fp8_tensor": Fp8PerTensor(SCALE),
    "fp8_group128_f32_row": Fp8PerGroup.row_major(128),
    "fp8_group128_f32_col_tma": Fp8PerGroup.deepgemm_sm90(),
    "fp8_group128_ue8m0_packed": Fp8PerGroup.deepgemm_sm100(),
    "fp8_group64_f32_row": Fp8PerGroup.row_major(64),
}
MOST_OTHER_CODES = 0.005  # of the oracle's
ROUNDED = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 1e-6}  # relative L2 of a result in that type
FP8_ROUNDED = 0.04  # and of a dequantised one
# through bf16 a code may move by one, and so it may where a kernel multiplies in another order
PEER_OTHER_CODES = 0.05


def trial(case: Case, folder: Path | None) -> Trial:
    """``case.variant`` is "<output>" or "<output> <input> in"; the output is a name above, or the input's own type.
    A shape with N merges that many states."""
    words = case.variant.split()
    output, given = words[0], words[1] if len(words) > 1 else "bf16"
    shape, states = (case.shape["T"], case.shape["H"], case.shape["D"]), case.shape.get("N", 2)
    spec = OUTPUTS.get(output)
    bytes_in = states * (_bytes(shape, INPUTS[given]) + 4 * shape[0] * shape[1])
    inputs = [_inputs(shape, states, INPUTS[given], seed) for seed in range(SETS)]
    merge = merge_attn_states if states == 2 else merge_attn_states_n
    contenders = [
        _ours("pallas", merge, inputs, spec),
        _ours("xla", merge, inputs, spec),
        *([_unfused(merge, inputs, spec)] if spec is not None else []),
    ]
    if states == 2 and (spec is None or isinstance(spec, Fp8PerTensor)):
        contenders += [_peer(name, f, inputs, spec) for name, f in peers.merges(folder).items()]
    oracle = jax.jit(functools.partial(merge, implementation="reference", output_quant=spec, out_dtype=_wide(spec)))
    expected = oracle(*inputs[0])
    return Trial(
        contenders=contenders,
        sets=SETS,
        bytes=bytes_in + bytes_out(shape, spec, INPUTS[given]),
        flops=(2 * states - 1) * shape[0] * shape[1] * shape[2],
        error=lambda contender, result: _error(contender, result, expected, spec),
        bound=lambda contender: _bound(contender, output, spec),
    )


def calls(case: Case) -> tuple[MergeProblem, list[MergeArrays], float]:
    """The problem of a case, what to call it with, and how far two right results may be apart."""
    output, *given = case.variant.split()
    spec, dtype = OUTPUTS.get(output), jnp.dtype(INPUTS[given[0] if given else "bf16"])
    shape, states = tuple(case.shape[letter] for letter in "THD"), case.shape.get("N", 2)
    problem = MergeProblem(
        states=states, tokens=shape[0], heads=shape[1], width=shape[2], dtype=dtype, out_dtype=dtype,
        output_quant=spec and spec.static(), stacked=states != 2,
    )  # fmt: skip
    scale = jnp.full(1, SCALE) if isinstance(spec, Fp8PerTensor) else None
    arrays = []
    for x in (_inputs(shape, states, dtype, seed) for seed in range(SETS)):
        outputs, lses = (x[0], x[1]) if problem.stacked else (tuple(x[::2]), tuple(x[1::2]))
        arrays.append(MergeArrays(outputs, lses, None, scale))
    return problem, arrays, ROUNDED[given[0] if given else "bf16"]


def _wide(spec: Any) -> Any:
    return jnp.float32 if spec is None else None


def _inputs(shape: tuple[int, int, int], states: int, dtype: Any, seed: int) -> list[jax.Array]:
    """Outputs and lse ~ N(0, 1), a twentieth of the first and of the second lse +inf, never both."""
    tokens, heads, _ = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    lse = jax.random.normal(keys[1], (states, heads, tokens), jnp.float32)
    empty = jax.random.uniform(keys[2], (heads, tokens))
    lse = lse.at[0].set(jnp.where(empty < 0.05, jnp.inf, lse[0]))
    lse = lse.at[1].set(jnp.where(empty > 0.95, jnp.inf, lse[1]))
    if states == 2:
        outputs = [jax.random.normal(key, shape, dtype) for key in jax.random.split(keys[0])]
        return [outputs[0], jnp.copy(lse[0]), outputs[1], jnp.copy(lse[1])]
    return [jax.random.normal(keys[0], (states, *shape), dtype), lse]


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return functools.reduce(lambda a, b: a * b, shape) * jnp.dtype(dtype).itemsize


def bytes_out(shape: tuple[int, int, int], spec: Any, dtype: Any) -> int:
    if spec is None:
        return _bytes(shape, dtype)
    if isinstance(spec, Fp8PerTensor):
        return _bytes(shape, jnp.uint8)
    groups = shape[1] * shape[2] // spec.group_size
    return _bytes(shape, jnp.uint8) + _bytes(spec.scale_shape(shape[0], groups), jnp.float32)


def leaves(result: Any) -> Any:
    """Without the scale of a per-tensor result: to return an argument is a copy that no surrounding program makes."""
    if isinstance(result, Fp8Array) and isinstance(result.spec, Fp8PerTensor):
        return result.values
    return result


def _ours(name: str, merge: Callable[..., Any], inputs: list[list[jax.Array]], spec: Any) -> Contender:
    function = jax.jit(lambda *a: leaves(merge(*a, output_quant=spec, implementation=name)))
    return Contender(name, lambda i: function(*inputs[i]))


def _unfused(merge: Callable[..., Any], inputs: list[list[jax.Array]], spec: Any) -> Contender:
    """The merge in the input's type, then the quantisation of what it wrote: two programs."""
    first = jax.jit(lambda *a: merge(*a, implementation="pallas"))
    second = jax.jit(lambda x: leaves(quantize_fp8(x.reshape(x.shape[0], -1), spec)))
    return Contender("unfused", lambda i: second(first(*inputs[i])))


def _peer(name: str, function: Callable[..., None], inputs: list[list[jax.Array]], spec: Any) -> Contender:
    import torch

    tensors = [[peers.to_torch(x) for x in given] for given in inputs]
    like = tensors[0][0]
    dtype = like.dtype if spec is None else torch.float8_e4m3fn
    outputs = [torch.empty(like.shape, dtype=dtype, device=like.device) for _ in tensors]
    scale = None if spec is None else torch.full((1,), SCALE, device=like.device)

    def call(i: int) -> Any:
        function(outputs[i], *tensors[i], scale)
        return outputs[i]

    return Contender(name, call, is_peer=True)


def _codes(values: Any) -> jax.Array:
    """Codes in the order of the numbers they stand for."""
    values = values.values if isinstance(values, Fp8Array) else values
    if isinstance(values, jax.Array):
        bits = jax.lax.bitcast_convert_type(values, jnp.uint8)
    else:
        import torch

        bits = jnp.from_dlpack(values.view(torch.uint8))
    bits = bits.reshape(-1).astype(jnp.int32)
    return jnp.where(bits >= 128, 128 - bits, bits)


def _exact(contender: Contender, spec: Any) -> bool:
    """Whether codes are compared one by one. Two roundings may move a scale, and with it every code of its group."""
    return isinstance(spec, Fp8PerTensor) or (spec is not None and contender.name != "unfused")


def _error(contender: Contender, result: Any, expected: Any, spec: Any) -> float:
    """The share of codes that are not the oracle's (1 if one is farther than a step), or the relative L2 distance."""
    if _exact(contender, spec):
        distance = jnp.abs(_codes(result) - _codes(expected))
        return 1.0 if int(distance.max()) > 1 else float((distance > 0).mean())
    if isinstance(result, Fp8Array):
        result, expected = result.dequantize(), expected.dequantize()
    got = result if isinstance(result, jax.Array) else jnp.from_dlpack(result)
    got = got.astype(jnp.float32).reshape(expected.shape)
    return float(jnp.linalg.norm((got - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def _bound(contender: Contender, output: str, spec: Any) -> float:
    if not _exact(contender, spec):
        return ROUNDED[output] if spec is None else FP8_ROUNDED
    return PEER_OTHER_CODES if contender.is_peer or contender.name == "unfused" else MOST_OTHER_CODES
