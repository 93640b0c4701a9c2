"""The gated delta net token by token in float64 numpy, wrong variants of it, and inputs for the tests."""

import dataclasses
import functools
import math

import jax
import ml_dtypes
import numpy as np

from jax_fp8attn import testing

# The same program with little optimisation of its machine code: a third of the time to compile.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

FAULTS = (
    "transposed state",
    "beta ignored",
    "chunk decay missing",
    "heads swapped",
    "initial state dropped",
    "late checkpoint",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs as float32 numpy, exactly representable in ``dtype``."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    cu: np.ndarray  # int32 [B+1]
    initial: np.ndarray | None = None  # [B, H, K, V]
    dtype: str = "float32"

    def tensors(self):
        cast = lambda x: np.asarray(x, getattr(ml_dtypes, self.dtype, None) or self.dtype)
        return cast(self.q), cast(self.k), cast(self.v), self.g, self.beta

    def state(self, layout="vk"):
        return None if self.initial is None else np.ascontiguousarray(stored(self.initial, layout))

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


WIDTH = 128  # of the heads that kernels take


def wide(x):
    """Zeros behind the last axis, up to what kernels take: they change no result."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, WIDTH - x.shape[-1])])


def fitted(case):
    """As kernels take it: bfloat16, heads of 128."""
    q, k, v = (wide(rounded(x, "bfloat16")) for x in (case.q, case.k, case.v))
    initial = None if case.initial is None else np.swapaxes(wide(np.swapaxes(wide(case.initial), 2, 3)), 2, 3)
    return case.replace(q=q, k=k, v=v, initial=initial, dtype="bfloat16")


def stored(states, layout="vk"):
    """[..., K, V] as ``state_layout`` has it."""
    return np.swapaxes(states, -1, -2) if layout == "vk" else states


def offsets(*lengths, first=0):
    return np.cumsum([first, *lengths]).astype(np.int32)


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def random_case(lengths, heads=(2, 2, 4), widths=(32, 48), tokens=None, seed=0, decay=0.3, dtype="float32", state=1.0):
    """Unit keys, gates of mean about -0.8*decay, beta in 0..1; ``state`` scales the initial states (0: none)."""
    rng = np.random.default_rng(seed)
    cu = offsets(*lengths)
    tokens = int(cu[-1]) if tokens is None else tokens
    (hq, hk, hv), (k_width, v_width) = heads, widths
    h = max(hq, hv)
    normal = lambda *shape: rng.standard_normal(shape)
    low = lambda x: rounded(x, dtype)
    initial = None if not state else (state * normal(len(lengths), h, k_width, v_width)).astype(np.float32)
    return Case(
        q=low(unit(normal(tokens, hq, k_width))),
        k=low(unit(normal(tokens, hk, k_width))),
        v=low(normal(tokens, hv, v_width)),
        g=(-decay * np.log1p(np.exp(normal(tokens, h)))).astype(np.float32),
        beta=(1 / (1 + np.exp(-normal(tokens, h)))).astype(np.float32),
        cu=cu,
        initial=initial,
        dtype=dtype,
    )


def rounded(x, dtype):
    dtype = getattr(ml_dtypes, dtype, None) or dtype
    return np.asarray(x, np.float32).astype(dtype).astype(np.float32)


def ranges(cu, tokens):
    """(first, end) of every sequence behind hostile offsets."""
    cu = np.maximum.accumulate(np.clip(np.asarray(cu, np.int64), 0, tokens))
    return list(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True))


def head_map(x, heads, fault=None):
    """x of each state head: consecutive heads share; the fault deals them out in turn."""
    group = heads // x.shape[1]
    index = np.arange(heads) % x.shape[1] if fault == "heads swapped" else np.arange(heads) // group
    return x[:, index]


def oracle(case, *, scale=None, gate="log", eps=None, every=0, fault=None):
    """float64 (o [T, H, V], final states [B, H, K, V], checkpoints [T // every, H, K, V])."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (case.q, case.k, case.v, case.g, case.beta))
    tokens, heads, k_width = q.shape[0], g.shape[1], q.shape[2]
    if eps is not None:
        q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + eps) for x in (q, k))
    scale = k_width**-0.5 if scale is None else float(scale)
    q, k, v = (head_map(x, heads, fault) for x in (q, k, v))
    with np.errstate(over="ignore"):
        a = np.where(g <= -30, 0, np.exp(g)) if gate == "log" else np.where(g <= math.exp(-30), 0, g)
    if fault == "beta ignored":
        beta = np.ones_like(beta)
    spans = ranges(case.cu, tokens)
    final = np.zeros((len(spans), heads, k_width, v.shape[2]))
    if case.initial is not None and fault != "initial state dropped":
        final[:] = np.swapaxes(case.initial, 2, 3) if fault == "transposed state" else case.initial
    o = np.zeros((tokens, heads, v.shape[2]))
    checkpoints = np.zeros((tokens // every if every else 0, heads, k_width, v.shape[2]))
    row = 0
    for b, (first, end) in enumerate(spans):
        s = final[b]
        entered, kept = s.copy(), np.ones((heads, 1, 1))
        for t in range(first, end):
            s *= a[t, :, None, None]
            kept *= a[t, :, None, None]
            s += k[t, :, :, None] * (beta[t, :, None] * (v[t] - (k[t, :, None] @ s)[:, 0]))[:, None]
            o[t] = scale * (q[t, :, None] @ s)[:, 0]
            if (t - first) % 64 == 63:
                if fault == "chunk decay missing":
                    s += (1 - kept) * entered
                entered, kept = s.copy(), np.ones((heads, 1, 1))
            if every and (t - first + 1 - (fault == "late checkpoint")) % every == 0 and t > first:
                checkpoints[row] = s
                row += 1
        if fault == "late checkpoint":
            row = sum((e - f) // every for f, e in spans[: b + 1])
    return o, final, checkpoints


def assert_matches(actual, expected, cu, bound, absolute=None, what="gdn_prefill"):
    """o [T, H, V] and states [B, ...] (and checkpoints) against float64: non-finite places, relative error of every
    sequence, of every state, and the largest element of o. Returns the worst relative error of o and of the states."""
    (o, *states), (want_o, *want_states) = actual, expected
    worst = [0.0, 0.0]
    o, want_o = testing.as_float64(o), np.asarray(want_o)
    testing.assert_same_nonfinite(o, want_o, f"{what} o")
    owned = np.zeros(o.shape[0], bool)
    for b, (first, end) in enumerate(ranges(cu, o.shape[0])):
        owned[first:end] = True
        span = slice(first, end)
        error = testing.assert_relative_error(o[span], want_o[span], bound, f"{what} o of sequence {b}")
        worst[0] = max(worst[0], error)
    assert not o[~owned].any(), f"{what}: rows of no sequence are not 0"
    slack = absolute or (bound, bound)
    limit = slack[0] * np.abs(want_o).max(initial=0) + slack[1]
    assert np.abs(o - want_o).max(initial=0) <= limit, f"{what}: an element of o is off by more than {limit}"
    for name, got, want in zip(("state", "checkpoint"), states, want_states, strict=False):
        assert len(got) == len(want), f"{what}: {len(got)} {name}s, expected {len(want)}"
        for b in range(len(want)):
            error = testing.assert_relative_error(got[b], want[b], bound, f"{what} {name} {b}")
            worst[1] = max(worst[1], error)
    return worst
