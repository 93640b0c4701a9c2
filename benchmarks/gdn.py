"""``gdn_prefill`` against flash-linear-attention and FlashInfer, from bf16 q, k and v to output and final states.

    bf16        ``gdn_prefill``: g and beta in float32, q and k normalised inside, states start from zero
    bf16 pool   ``gdn_prefill_pool``: q, k and v packed, gates computed inside, states in rows of a pool

flash-linear-attention tunes most of its kernels once for a number of heads, at the first shape that has it, as for
anybody who calls it from one process. Its time is the sum of its kernels': that of a CUDA graph without the gaps.
FlashInfer is the program that ``flashinfer_gdn.py`` writes; "flashinfer kernel" is the rule alone within its calls, for
callers who have q and k normalised and the decay itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax_fp8attn.benchmarks import peers
from jax_fp8attn.benchmarks.models import Case
from jax_fp8attn.benchmarks.timing import Contender
from jax_fp8attn.benchmarks.trial import Trial, offered

from jax_fp8attn import dispatch, gdn_prefill
from jax_fp8attn.gdn_prefill import OP, POOL_OP
from jax_fp8attn.problems import GDN_CHUNK, GdnArrays, GdnPoolArrays, GdnPoolProblem, GdnProblem

SETS = 3
STRETCH = 1024  # tokens whose error is taken together: what goes wrong late in a long sequence counts as much
BOUND, PEER_BOUND = 1e-2, 2e-2  # relative L2 of the worst stretch of a head, or of its state
XLA_CHUNKS = 256  # more take XLA longer than 20 ms
FLASHINFER_RULE = "kernel_cutlass_kernel_flashinfer"  # how the names of its kernels begin, the normalisation's apart
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


class _Operands(NamedTuple):
    """One set of inputs."""

    qkv: jax.Array  # bf16 [T, (2 Hk + Hv) D]
    a: jax.Array  # bf16 [T, Hv]
    b: jax.Array
    A_log: jax.Array  # float32 [1, Hv]
    dt_bias: jax.Array
    pool: jax.Array  # float32 [rows, Hv, D, D]
    slots: jax.Array  # int32 [B]
    offsets: jax.Array  # int32 [B + 1]


class _Split(NamedTuple):
    q: jax.Array  # bf16 [T, Hk, D]
    k: jax.Array
    v: jax.Array  # bf16 [T, Hv, D]
    g: jax.Array  # float32 [T, Hv]
    beta: jax.Array


class _Expected(NamedTuple):
    """The right result in float32 for the first and the last head."""

    out: np.ndarray  # [T, 2, D]
    states: np.ndarray  # [B, 2, D, D]


def trial(case: Case, folder: Path | None) -> Trial:
    shape, in_pool = case.shape, case.variant == "bf16 pool"
    inputs = [_operands(shape, seed) for seed in range(SETS)]
    expected = _expected(shape, inputs[0], in_pool)
    slots = np.asarray(inputs[0].slots)
    return Trial(
        contenders=[
            *(_ours_in_pool if in_pool else _ours)(shape, inputs),
            *([] if in_pool else _theirs(shape, inputs, folder)),
        ],
        sets=SETS,
        bytes=_bytes(shape, inputs[0], in_pool),
        flops=6 * shape["T"] * shape["Hv"] * shape["D"] ** 2,
        error=lambda contender, result: _error(shape, result, expected, slots if in_pool else None),
        bound=lambda contender: PEER_BOUND if contender.is_peer else BOUND,
    )


def prepare(cases: Sequence[Case], folder: Path | None) -> None:
    """Has flash-linear-attention tune its kernels, alone on the device, for all shapes: while cases are compiled it
    would time them beside other work."""
    rule = peers.gated_delta_rule(folder)
    if rule is None:
        return
    with peers.tuned_at_once():
        for case in cases:
            if case.variant == "bf16":
                _call_fla(rule, *_any_tensors(case.shape))


def _operands(shape: dict[str, int], seed: int) -> _Operands:
    """Standard normal numbers; gates as models start with them, from heads that remember for 1000 tokens to such that
    forget at once."""
    tokens, heads, sequences = (shape[letter] for letter in ("T", "Hv", "B"))
    rows = 2 * sequences + 1
    qkv, a, b, pool = _drawn(tokens, shape["Hk"], heads, shape["D"], rows, jax.random.key(seed))
    step = np.geomspace(1e-3, 1e-1, heads)
    per_head = (np.log(np.linspace(1.0, 16.0, heads)), np.log(np.expm1(step)))
    slots = np.random.default_rng(seed).permutation(rows)[:sequences].astype(np.int32)
    offsets = np.arange(sequences + 1, dtype=np.int32) * np.int32(tokens // sequences)
    A_log, dt_bias = (jnp.asarray(x[None], F32) for x in per_head)
    return _Operands(qkv, a, b, A_log, dt_bias, pool, jnp.asarray(slots), jnp.asarray(offsets))


@functools.partial(jax.jit, static_argnums=range(5))
def _drawn(tokens: int, k_heads: int, heads: int, width: int, rows: int, key: jax.Array) -> tuple[jax.Array, ...]:
    """qkv, a, b and a pool of states."""
    keys = jax.random.split(key)
    columns = (2 * k_heads + heads) * width
    inputs = jax.random.normal(keys[0], (tokens, columns + 2 * heads), BF16)
    qkv, a, b = jnp.split(inputs, (columns, columns + heads), axis=1)
    return qkv, a, b, jax.random.normal(keys[1], (rows, heads, width, width), F32) / width


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(k_heads: int, width: int, x: _Operands) -> _Split:
    tokens = x.qkv.shape[0]
    q, k, v = jnp.split(x.qkv, (k_heads * width, 2 * k_heads * width), axis=1)
    step = jax.nn.softplus(x.a.astype(F32) + x.dt_bias)
    heads = (part.reshape(tokens, -1, width) for part in (q, k, v))
    return _Split(*heads, -jnp.exp(x.A_log) * step, jax.nn.sigmoid(x.b.astype(F32)))


def _facts(shape: dict[str, int]) -> dict[str, Any]:
    """What the problems of both forms share."""
    return {
        "tokens": shape["T"], "sequences": shape["B"], "q_heads": shape["Hk"], "k_heads": shape["Hk"],
        "v_heads": shape["Hv"], "k_width": shape["D"], "v_width": shape["D"], "dtype": BF16, "out_dtype": BF16,
        "state_dtype": F32, "qk_l2norm": True,
    }  # fmt: skip


def _names(op: str, problem: Any) -> list[str]:
    chunks = problem.sequences * -(-problem.tokens // (problem.sequences * GDN_CHUNK))
    return [name for name in offered(op, problem) if name != "xla" or chunks <= XLA_CHUNKS]


def _scale(shape: dict[str, int]) -> jax.Array:
    return jnp.full(1, shape["D"] ** -0.5, F32)


def _ours(shape: dict[str, int], inputs: list[_Operands]) -> list[Contender]:
    problem = GdnProblem(**_facts(shape))
    parts = [_split(shape["Hk"], shape["D"], x) for x in inputs]
    given = [
        GdnArrays(*part, x.offsets, None, None, None, None, _scale(shape))
        for part, x in zip(parts, inputs, strict=True)
    ]

    def contender(name: str) -> Contender:
        return Contender(name, lambda i: dispatch.execute(OP, problem, (name, None), given[i]))

    return [contender(name) for name in _names("gdn_prefill", problem)]


def _ours_in_pool(shape: dict[str, int], inputs: list[_Operands]) -> list[Contender]:
    """Each with pools of its own, which are donated: a sequence starts from the state that the last call left."""
    problem = GdnPoolProblem(**_facts(shape), pool_rows=inputs[0].pool.shape[0])
    given = [
        GdnPoolArrays(*x[:5], None, x.slots, x.slots, None, x.offsets, None, None, None, _scale(shape)) for x in inputs
    ]

    def contender(name: str) -> Contender:
        pools = [jnp.copy(x.pool) for x in inputs]
        run = jax.jit(
            lambda arrays, pool: dispatch.execute(POOL_OP, problem, (name, None), arrays._replace(pool=pool)),
            donate_argnums=1,
        )

        def call(i: int) -> Any:
            out, pools[i] = run(given[i], pools[i])
            return out, pools[i]

        return Contender(name, call)

    return [contender(name) for name in _names("gdn_prefill_pool", problem)]


def _theirs(shape: dict[str, int], inputs: list[_Operands], folder: Path | None) -> list[Contender]:
    rule, program = peers.gated_delta_rule(folder), peers.flashinfer_gdn(folder, shape)
    return [
        *([_fla(shape, inputs, rule)] if rule else []),
        *(_flashinfer(shape, inputs, program) if program else []),
    ]


def _flashinfer(shape: dict[str, int], inputs: list[_Operands], program: Any) -> list[Contender]:
    given = [(*_split(shape["Hk"], shape["D"], x), x.offsets) for x in inputs]
    whole = Contender("flashinfer", lambda i: program(*given[i]), is_peer=True)
    return [whole, dataclasses.replace(whole, name="flashinfer kernel", within=whole.name, kernels=(FLASHINFER_RULE,))]


def _fla(shape: dict[str, int], inputs: list[_Operands], rule: Any) -> Contender:
    """flash-linear-attention on [B, T / B, heads, width]: sequences are equally long."""
    each = lambda x: peers.to_torch(x.reshape(shape["B"], shape["T"] // shape["B"], *x.shape[1:]))
    given = [tuple(map(each, _split(shape["Hk"], shape["D"], x))) for x in inputs]
    return Contender("fla", lambda i: _call_fla(rule, *given[i]), is_peer=True)


def _call_fla(rule: Any, *tensors: Any) -> Any:
    import torch

    with torch.no_grad():
        return rule(*tensors, output_final_state=True, use_qk_l2norm_in_kernel=True, state_v_first=True)


def _any_tensors(shape: dict[str, int]) -> list[Any]:
    import torch

    lead, heads, width = (shape["B"], shape["T"] // shape["B"]), (shape["Hk"], shape["Hk"], shape["Hv"]), shape["D"]
    rows = [torch.randn(*lead, n, width, device="cuda", dtype=torch.bfloat16) for n in heads]
    gates = [torch.rand(*lead, shape["Hv"], device="cuda") for _ in range(2)]
    return [*rows, -gates[0], gates[1]]


def _bytes(shape: dict[str, int], operands: _Operands, in_pool: bool) -> int:
    """Operands, output and final states; states to start from only where they are given."""
    states = shape["B"] * shape["Hv"] * shape["D"] ** 2 * 4
    out = shape["T"] * shape["Hv"] * shape["D"] * 2
    if in_pool:
        return sum(x.nbytes for x in operands[:5]) + out + 2 * states
    gates = shape["T"] * shape["Hv"] * (4 + 4)
    return operands.qkv.nbytes + gates + out + states


def _expected(shape: dict[str, int], operands: _Operands, in_pool: bool) -> _Expected:
    """By XLA in float32, of heads that share no k."""
    part = _split(shape["Hk"], shape["D"], operands)
    heads, k_heads = np.array([0, shape["Hv"] - 1]), np.array([0, shape["Hk"] - 1])
    q, k = part.q[:, k_heads], part.k[:, k_heads]
    v, g, beta = (x[:, heads] for x in part[2:])
    initial = operands.pool[operands.slots][:, heads] if in_pool else None
    function = jax.jit(functools.partial(gdn_prefill, qk_l2norm=True, out_dtype=F32, implementation="xla"))
    out, states = function(q, k, v, g, beta, cu_seqlens=operands.offsets, initial_state=initial)
    return _Expected(np.asarray(out), np.asarray(states))


def _error(shape: dict[str, int], result: Any, expected: _Expected, slots: np.ndarray | None) -> float:
    """The worst of all stretches and states of the heads that are checked; infinite where any number of the whole
    result is no number."""
    out, states = (x if isinstance(x, jax.Array) else jnp.from_dlpack(x) for x in result)
    out = out.reshape(shape["T"], shape["Hv"], shape["D"])
    states = states if slots is None else states[slots]
    if not all(bool(jnp.isfinite(x).all()) for x in (out, states)):
        return float("inf")
    heads = np.array([0, shape["Hv"] - 1])
    return max(
        _worst(_stretches(shape, np.asarray(out[:, heads].astype(F32))), _stretches(shape, expected.out)),
        _worst(np.asarray(states[:, heads].astype(F32)), expected.states),
    )


def _stretches(shape: dict[str, int], out: np.ndarray) -> np.ndarray:
    """[T, heads, D] -> [sequences * stretches, heads, tokens, D]."""
    each = shape["T"] // shape["B"]
    length = STRETCH if each % STRETCH == 0 else each
    return np.swapaxes(out.reshape(-1, length, *out.shape[1:]), 1, 2)


def _worst(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 over the last two axes."""
    size = np.linalg.norm(expected, axis=(-2, -1))
    return float((np.linalg.norm(got - expected, axis=(-2, -1)) / size).max())
