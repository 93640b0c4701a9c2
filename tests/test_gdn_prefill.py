"""The contract of gdn_prefill, gdn_transition, gdn_combine and gdn_metadata, over every implementation."""

import dataclasses
import functools
import math

import gdn_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gdn_cases import quick_jit
from implementations import PORTABLE, implementations, kernels
from jax import lax
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_fp8attn as fp8attn
from jax_fp8attn import InvalidInputError, UnsupportedError, checks, gdn_prefill, testing
from jax_fp8attn.problems import GDN_CHUNK, GdnArrays, gdn_max_chunks
from jax_fp8attn.reference import gdn_prefill as reference
from jax_fp8attn.xla import gdn_prefill as xla

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
KERNELS = kernels("gdn_prefill")
IMPLEMENTATIONS = implementations("gdn_prefill")
FAST = (*KERNELS, "xla")  # those whose bits are promised: chunks, blocks, kernels
ORDINARY = (31, 63, 93, 123, 150, 500)
DEFAULTS = dict(gate="log", segments="auto", state_layout="vk", qk_l2norm=False)
T, B = 1000, len(ORDINARY)  # most tests share this shape, so that it is compiled once
F32, BF16 = 1e-5, 6e-3


@functools.cache
def compiled(implementation, initial=True, jit=quick_jit, **options):
    """gdn_prefill(q, k, v, g, beta, cu, initial state, scale) under jit."""

    def function(q, k, v, g, beta, cu, state, scale):
        kept = dict(initial_state=state) if initial else {}
        return gdn_prefill(
            q, k, v, g, beta, cu_seqlens=cu, scale=scale, implementation=implementation, **kept, **options
        )

    return jit(function)


def run(case, implementation="xla", scale=None, **options):
    """The op on a case; None for its default scale. The plain call is compiled as users compile it. Kernels get what
    they take of it, and of what they return only the case's own widths are looked at."""
    k_width, v_width = case.q.shape[2], case.v.shape[2]
    scale = np.float32(k_width**-0.5 if scale is None else scale)
    if implementation in KERNELS:
        case = cases.fitted(case)
    initial = case.initial is not None
    state = case.state(options.get("state_layout", "vk"))
    options = dict(checkpoint_every=64) | {name: x for name, x in options.items() if x != DEFAULTS.get(name)}
    own = (v_width, k_width) if options.get("state_layout", "vk") == "vk" else (k_width, v_width)
    if implementation in KERNELS or (implementation == "xla" and options == dict(checkpoint_every=64)):
        options["jit"] = jax.jit
    function = compiled(implementation, initial, **options)
    # numpy: slicing a JAX array compiles a program for every slice
    results = jax.tree.map(np.asarray, function(*case.tensors(), case.cu, state, scale))
    if implementation not in KERNELS:
        return results
    o, *states = results if isinstance(results, tuple) else (results,)
    return o[..., :v_width], *(x[..., : own[0], : own[1]] for x in states)


def in_kv(results, layout="vk"):
    """Results with their states as [K, V]."""
    o, *states = results
    return np.asarray(o), *(cases.stored(np.asarray(s), layout) for s in states)


def check(case, implementation, bound=F32, absolute=None, scale=None, gate="log", **options):
    eps = options.get("l2norm_eps", 1e-6) if options.get("qk_l2norm") else None
    if implementation in KERNELS:
        q, k, v = (cases.rounded(x, "bfloat16") for x in (case.q, case.k, case.v))
        case, bound, absolute = case.replace(q=q, k=k, v=v), max(bound, BF16), absolute or (1e-2, 2e-3)
    got = in_kv(run(case, implementation, scale, gate=gate, **options), options.get("state_layout", "vk"))
    want = cases.oracle(case, scale=scale, gate=gate, eps=eps, every=options.get("checkpoint_every", 64))
    return cases.assert_matches(got, want, case.cu, bound, absolute)


@functools.cache
def ordinary(**changes):
    return cases.random_case(ORDINARY, tokens=T, **changes)


def ragged(lengths, seed=0, **changes):
    """Up to B lengths in the shared shape; the last offset is repeated."""
    cu = cases.offsets(*lengths, *[0] * (B - len(lengths)))
    return ordinary(seed=seed, **changes).replace(cu=cu)


def problem_and_arrays(*args, **kwargs):
    """What a backend gets for a call."""
    problem = fp8attn.explain("gdn_prefill", *args, **kwargs).problem
    q, k, v, g, beta = map(jnp.asarray, args)
    cu = kwargs.get("cu_seqlens")
    metadata = fp8attn.gdn_metadata(np.array([0, len(g)], np.int32) if cu is None else cu, len(g), g.shape[1])
    scale = jnp.full(1, kwargs.get("scale", q.shape[2] ** -0.5), jnp.float32)
    lists = (metadata.start, metadata.length, metadata.chunk_sequence, metadata.chunk_index)
    return problem, GdnArrays(q, k, v, g, beta, *lists, kwargs.get("initial_state"), scale)


def emulated(case, **options):
    """(o, final states) of the bfloat16 emulation in float32."""
    kwargs = dict(cu_seqlens=case.cu, **options)
    if case.initial is not None:
        kwargs["initial_state"] = case.state(options.get("state_layout", "vk"))
    with jax.default_device(jax.devices("cpu")[0]):  # a GPU's products of float32 are not exact
        problem, arrays = problem_and_arrays(*case.tensors(), **kwargs)
        return quick_jit(reference.emulated, static_argnums=0)(problem, arrays)


# the oracles themselves


def test_the_numpy_oracle_is_the_matrix_recurrence():
    """R1: S_t = a (I - beta k k^T) S + beta k v^T, written out."""
    case = cases.random_case([5], heads=(1, 1, 1), widths=(3, 4))
    s, rows = case.initial[0, 0].astype(np.float64), []
    for t in range(5):
        k, v = case.k[t, 0].astype(np.float64), case.v[t, 0].astype(np.float64)
        a, beta = np.exp(np.float64(case.g[t, 0])), np.float64(case.beta[t, 0])
        s = a * (np.eye(3) - beta * np.outer(k, k)) @ s + beta * np.outer(k, v)
        rows.append(0.5 * s.T @ case.q[t, 0])
    o, final, _ = cases.oracle(case, scale=0.5)
    np.testing.assert_allclose(o[:, 0], rows, rtol=1e-12)
    np.testing.assert_allclose(final[0, 0], s, rtol=1e-12)


@pytest.mark.parametrize("heads,gate", [((2, 2, 4), "log"), ((4, 1, 1), "alpha")])
def test_the_reference_is_exact_in_float64(heads, gate):
    """R1"""
    case = cases.random_case([63, 0, 65, 130], heads=heads, tokens=300)
    if gate == "alpha":
        case = case.replace(g=np.exp(case.g))
    kwargs = dict(cu_seqlens=case.cu, initial_state=case.state(), checkpoint_every=64, qk_l2norm=True, gate=gate)
    problem, arrays = problem_and_arrays(*case.tensors(), **kwargs)
    with jax.enable_x64(True):
        got = quick_jit(reference.sequential, static_argnums=0)(problem, arrays)
    assert got[0].dtype == np.float64
    want = cases.oracle(case, gate=gate, eps=1e-6, every=64, scale=np.float32(32**-0.5))
    cases.assert_matches(got, want, case.cu, 1e-12)


BANDS = {"default": ((1.5e-3, 5e-3), (1e-3, 5e-3)), "high": ((1e-4, 2.5e-3), (1e-7, 5e-5))}


@pytest.mark.parametrize("precision", ["default", slow("high")])
def test_the_emulation_rounds_as_much_as_a_kernel(precision):
    """R1: the errors that the emulation of the design has on random keys."""
    case = cases.random_case([1024], heads=(2, 2, 2), widths=(64, 64), decay=0.05, dtype="bfloat16", state=1.0)
    for got, want, (low, high) in zip(
        emulated(case, precision=precision, out_dtype=jnp.float32), cases.oracle(case), BANDS[precision], strict=False
    ):
        assert low < testing.relative_error(got, want) < high


@pytest.mark.parametrize("fault", cases.FAULTS)
def test_the_comparison_refuses_wrong_answers(fault):
    """R1: negative controls, at the widest bound in use."""
    case = cases.random_case([93, 130], widths=(32, 32), dtype="bfloat16")
    want = cases.oracle(case, every=64)
    cases.assert_matches(want, want, case.cu, 6e-3, (1e-2, 2e-3))
    with pytest.raises(AssertionError):
        cases.assert_matches(cases.oracle(case, every=64, fault=fault), want, case.cu, 6e-3, (1e-2, 2e-3))


def test_the_comparison_refuses_zeros_and_a_swapped_layout():
    """R1"""
    case = cases.random_case([93, 130], widths=(32, 32))
    o, final, checkpoints = cases.oracle(case, every=64)
    for wrong in ((0 * o, final, checkpoints), (o, 0 * final, checkpoints), (o, final.swapaxes(2, 3), checkpoints)):
        with pytest.raises(AssertionError):
            cases.assert_matches(wrong, (o, final, checkpoints), case.cu, 6e-3, (1e-2, 2e-3))


# group 1: lengths and offsets

LENGTHS = {
    "around a chunk": (1, 63, 64, 65, 127, 128),
    "ordinary": ORDINARY,
    "empty ones": (0, 5, 0, 0, 64, 0),
    "all empty": (0,) * B,
    "padded": (300, 400),
    "whole intervals": (64, 128, 192, 256, 320, 0),
    "one": (1000,),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_lengths(lengths, implementation):
    """R3, R1: o, final states and checkpoints; float32 within 1e-5."""
    check(ragged(lengths), implementation)


HOSTILE = {
    "decreasing": [0, 300, 200, 500, 100, 700, 650],
    "too large": [0, 100, 2_000_000_000, 300, 2_147_483_647, 900, 1001],
    "negative": [-2_147_483_648, -5, 100, -1, 300, 301, 302],
    "late start": [7, 70, 200, 300, 400, 500, 999],
    "nonsense": [5, -3, 4000, 17, 0, -9, 12],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cu", HOSTILE.values(), ids=HOSTILE)
def test_hostile_offsets(cu, implementation):
    """R4: clamped to 0..T, running maximum; rows of no sequence are 0."""
    check(ordinary().replace(cu=np.array(cu, np.int32)), implementation)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_no_tokens_no_sequences(implementation):
    """R3"""
    case = cases.random_case([0, 0, 0], tokens=0)
    o, final, checkpoints = run(case, implementation)
    assert o.shape == (0, 4, 48) and checkpoints.shape == (0, 4, 48, 32)
    testing.assert_bitwise_equal(final, case.state())
    o, final = run(case.replace(initial=None), implementation, checkpoint_every=0)
    assert not np.any(final)
    case = cases.random_case([70], state=0).replace(cu=np.zeros(1, np.int32))
    o, final = run(case, implementation, checkpoint_every=0)
    assert o.shape == (70, 4, 48) and not np.any(o) and final.shape == (0, 4, 48, 32)
    k, v, g, beta = cases.random_case([0], tokens=0).tensors()[1:]
    m, n = fp8attn.gdn_transition(k, v, g, beta, implementation=implementation)
    assert (np.asarray(m) == np.eye(32)).all() and not np.any(n)


def test_a_thousand_short_sequences():
    """R3, R8"""
    lengths = np.random.default_rng(0).integers(1, 4, 1000)
    case = cases.random_case(lengths, heads=(1, 1, 2), widths=(16, 16), tokens=3000, state=0)
    got, want = in_kv(run(case, checkpoint_every=0)), cases.oracle(case)
    # in groups of 50: one token's q.k can cancel to nothing
    cases.assert_matches(got, want, case.cu[::50], F32)


@pytest.mark.slow
def test_131072_tokens():
    """R3, R5"""
    case = cases.random_case([131072], heads=(1, 1, 1), widths=(64, 64), decay=0.02)
    check(case, "xla", checkpoint_every=64 * 512)


# group 2: gates


def gate_cases():
    plain = ordinary(state=10.0)
    position = np.arange(T) - np.repeat(plain.cu[:-1], np.append(ORDINARY[:-1], T - plain.cu[-2]))
    edges = np.isin(position % 64, (0, 63))[:, None]
    by_head = np.broadcast_to(np.array([0, -20, -0.01, -40], np.float32), plain.g.shape)
    many = (position % 64 < 40)[:, None]
    mixed = (position % 64 < 40)[:, None]
    return {
        "none": 0 * plain.g,
        "all cleared": np.full_like(plain.g, -1e4),
        "cleared at some": np.where(np.arange(T)[:, None] % 37 == 5, -np.inf, plain.g),
        "cleared at one token of one head": np.where(
            (np.arange(T)[:, None] == 700) & (np.arange(4) == 2), -745, plain.g
        ),
        "first and last token of a chunk": np.where(edges, -1e4, plain.g),
        "40 in a chunk": np.where(many, -1e4, 0.03 * plain.g),
        "40 strong ones in a chunk": np.where(mixed, -29.5, 0.01 * plain.g),
        "by head": by_head,
        "at the threshold": np.where(np.arange(T)[:, None] % 3 == 0, np.float32(-30), plain.g),
        "-20 everywhere": np.full_like(plain.g, -20),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", gate_cases())
def test_gates(name, implementation):
    """R2: log gates, against float64 to 1e-5."""
    check(ordinary(state=10.0).replace(g=gate_cases()[name].astype(np.float32)), implementation)


ALPHA = dict(gate="alpha", qk_l2norm=True, l2norm_eps=0.01)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_alpha_gates(implementation):
    """Linear decay, 0 and 1 included."""
    alpha = np.exp(ordinary().g)
    token = np.arange(T)[:, None]
    alpha = np.where(token % 50 == 7, 0, np.where(token % 11 == 3, 1, alpha)).astype(np.float32)
    alpha[token[:, 0] % 97 == 0] = 1e-40  # a subnormal number clears, too
    check(ordinary(state=10.0).replace(g=alpha), implementation, **ALPHA)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gate", [-30.0, -1e4, -np.inf])
def test_a_cleared_state_does_not_leak(implementation, gate):
    """The past of a hard reset changes no bit after it."""
    case = ordinary(state=10.0)
    reset = case.cu[5] + 100  # in the middle of a chunk
    g = case.g.copy()
    g[reset] = gate
    g[:reset] += 0.001  # for the past only
    other = case.replace(g=g, initial=case.initial * 1e6, v=np.where(np.arange(T)[:, None, None] < reset, -3, case.v))
    g = case.g.copy()
    g[reset] = gate
    one, two = (run(c, implementation) for c in (case.replace(g=g), other))
    testing.assert_bitwise_equal(one[0][reset : case.cu[6]], two[0][reset : case.cu[6]])
    testing.assert_bitwise_equal(one[1][5], two[1][5])
    assert not np.array_equal(one[0][case.cu[5] : reset], two[0][case.cu[5] : reset])


def test_positive_gates_stay_in_their_sequence_and_head():
    """g > 0 is undefined, in its sequence and head."""
    case = ordinary()
    g = case.g.copy()
    g[200:210, 1] = 90.0  # sequence 3
    one, two = run(case), run(case.replace(g=g))
    keep = np.ones((T, 4), bool)
    keep[case.cu[3] : case.cu[4], 1] = False
    testing.assert_bitwise_equal(one[0][keep], two[0][keep])
    assert "g > 0" in gdn_prefill.__doc__


# group 3: beta


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, "mixed"])
def test_beta(beta, implementation):
    case = ordinary(decay=0.05)
    values = np.random.default_rng(0).choice([0, 1, 2, 0.5], case.beta.shape) if beta == "mixed" else beta
    case = case.replace(beta=np.broadcast_to(np.float32(values), case.beta.shape))
    check(case, implementation)
    if beta == 0.0:
        _, final, _ = in_kv(run(case, implementation))
        total = np.stack([case.g[f:e].sum(0) for f, e in cases.ranges(case.cu, T)])
        np.testing.assert_allclose(final, np.exp(total)[..., None, None] * case.initial, rtol=1e-4, atol=1e-12)


# group 4: correlated keys

KEYS = ("identical", "alternating", "four in turn", "rank one and noise", "positive", "some zero", "huge", "tiny")


@functools.cache
def key_case(dtype):
    """One head for each kind of keys, 4096 tokens."""
    rng = np.random.default_rng(0)
    tokens, width = 4096, 64
    base = cases.unit(rng.standard_normal((1, width)))
    noise = cases.unit(rng.standard_normal((tokens, width)))
    sign = np.where(np.arange(tokens) % 2, -1, 1)[:, None]
    kinds = [
        np.broadcast_to(base, noise.shape),
        base * sign,
        np.tile(cases.unit(rng.standard_normal((4, width))), (tokens // 4, 1)),
        3 * base + noise,
        rng.random((tokens, width)),
        np.where(np.arange(tokens)[:, None] % 5 == 0, 0, noise),
        1e4 * noise,
        1e-4 * noise,
    ]
    k = cases.rounded(np.stack(kinds, 1), dtype)
    q = cases.rounded(np.stack([noise, noise, noise, noise, noise, kinds[5], kinds[6], kinds[7]], 1), dtype)
    shape = (tokens, len(kinds))
    return cases.Case(
        q=q,
        k=k,
        v=cases.rounded(rng.standard_normal((*shape, width)), dtype),
        g=np.full(shape, -1e-3, np.float32),
        beta=np.broadcast_to(np.array([0.835, 0.9, 0.99, 0.99, 0.835, 1, 0.5, 0.5], np.float32), shape),
        cu=cases.offsets(tokens),
        dtype=dtype,
    )


@functools.cache
def key_oracle(dtype):
    return cases.oracle(key_case(dtype), eps=1e-6)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("precision", ["high", slow("default")])
def test_correlated_keys_in_bfloat16(implementation, precision):
    """R1: at most 1.5 times the error of the bfloat16 emulation, kind by kind; "high" within 5e-3 on identical keys."""
    if implementation in KERNELS and precision == "high":
        pytest.skip("no kernel for precision='high'")
    case, want = key_case("bfloat16"), key_oracle("bfloat16")
    options = dict(qk_l2norm=True, precision=precision)
    o, final = in_kv(run(case, implementation, checkpoint_every=0, jit=jax.jit, **options))
    rough_o, rough_final = emulated(case, **options)
    for h, name in enumerate(KEYS):
        testing.assert_within_emulated(o[:, h], rough_o[:, h], want[0][:, h], 1.5, what=f"o, {name} keys")
        testing.assert_within_emulated(final[:, h], rough_final[:, h], want[1][:, h], 1.5, what=f"state, {name} keys")
    if precision == "high":
        testing.assert_relative_error(o[:, 0], want[0][:, 0], 5e-3, "o, identical keys")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
def test_correlated_keys_in_float32(implementation):
    """R1: float32 throughout leaves 1e-5 of o on every kind of keys."""
    o, final = in_kv(run(key_case("float32"), implementation, checkpoint_every=0, qk_l2norm=True))
    want = key_oracle("float32")
    for h, name in enumerate(KEYS):
        testing.assert_relative_error(o[:, h], want[0][:, h], F32, f"o, {name} keys")
        testing.assert_relative_error(final[:, h], want[1][:, h], 1e-4, f"state, {name} keys")


def inverse_cases():
    rng = np.random.default_rng(0)
    n, width = 64, 128
    draw = lambda *shape: rng.standard_normal(shape)
    sigmoid = 1 / (1 + np.exp(-draw(n)))
    random, same = cases.unit(draw(n, width)), np.repeat(cases.unit(draw(1, width)), n, 0)
    sign = np.where(np.arange(n) % 2, -1, 1)[:, None]
    correlated = cases.unit(3 * same + cases.unit(draw(n, width)))
    return {
        "random, sigmoid": (random, sigmoid, 1e-6),
        "correlated, 1": (correlated, 1.0, 1e-6),
        "identical, .835": (same, 0.835, 1e-6),
        "identical, 2": (same, 2.0, 4e-6),
        "norm 2, 1": (2 * random, 1.0, 1e-6),
        "four in turn, 1": (np.tile(cases.unit(draw(4, width)), (16, 1)), 1.0, 1e-6),
        "alternating, 1": (same * sign, 1.0, 1e-6),
    }


def test_the_inverse_on_correlated_keys():
    """R1: random keys cannot fail a bad inverse, so the rows that can are here; powers of A fail them."""
    systems = {}
    for name, (keys, beta, bound) in inverse_cases().items():
        a = np.tril(keys @ keys.T, -1) * np.broadcast_to(beta, 64)[:, None]
        systems[name] = a.astype(np.float32), np.linalg.inv(np.eye(64) + a.astype(np.float32).astype(np.float64)), bound
    stacked = jnp.stack([a for a, _, _ in systems.values()])
    got = jax.jit(xla.inverse_unit_lower)(stacked)
    for x, (name, (_, want, bound)) in zip(got, systems.items(), strict=True):
        testing.assert_relative_error(x, want, bound, name)
    powers = {name: testing.relative_error(by_powers(a), want) for name, (a, want, _) in systems.items()}
    assert powers["random, sigmoid"] < 1e-6 < 1 < powers["identical, .835"], powers


def by_powers(a):
    """(I - A)(I + A^2)(I + A^4)... in float32: exact in theory, useless on correlated keys."""
    x, power = np.eye(64, dtype=np.float32) - a, a @ a
    for _ in range(5):
        x, power = x + x @ power, power @ power
    return x


def test_the_derivative_of_the_inverse():
    """R16"""
    keys, _, _ = inverse_cases()["correlated, 1"]
    a = jnp.asarray(np.tril(keys @ keys.T, -1), jnp.float32)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((64, 64)), jnp.float32)
    got = jnp.tril(jax.grad(lambda a: jnp.sum(weights * xla.inverse_unit_lower(a)))(a), -1)
    x = np.linalg.inv(np.eye(64) + np.asarray(a, np.float64))
    testing.assert_relative_error(got, np.tril(-x.T @ np.asarray(weights, np.float64) @ x.T, -1), F32)


# group 5: large initial states, segments, context parallel


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [0.002, 0.3])
def test_a_large_initial_state_is_carried_to_the_end(implementation, decay):
    """What falls below e^-10 still counts. A kernel rounds the states that it multiplies: those after a state that
    was larger carry its error, as they do in the emulation."""
    case, bound = ordinary(state=100.0, decay=decay), F32
    if implementation in KERNELS:
        q, k, v = (cases.rounded(x, "bfloat16") for x in (case.q, case.k, case.v))
        rounded = case.replace(q=q, k=k, v=v)
        errors = map(testing.relative_error, emulated(rounded)[1], cases.oracle(rounded)[1])
        bound = 1.5 * max(map(float, errors))
        assert bound < 1e-2
    check(case, implementation, bound)


SEGMENTS = {"xla": (4,)}  # it has none to force; others: 2, 4, 8


@pytest.mark.parametrize("implementation,segments", [(name, n) for name in FAST for n in SEGMENTS.get(name, (2, 4, 8))])
def test_segments_change_nothing(implementation, segments):
    """R8, R9"""
    case = ordinary(state=100.0)
    whole, parts = (in_kv(run(case, implementation, segments=n)) for n in ("auto", segments))
    cases.assert_matches(parts, whole, case.cu, BF16 if implementation in KERNELS else 1e-3)


def mesh_of(axis, devices=8):
    return jax.make_mesh((devices,), (axis,), axis_types=(AxisType.Auto,))


def test_context_parallel():
    """R9, R17: tokens over 8 devices, one all_gather, associative_scan(gdn_combine); equal to one device to 1e-5."""
    case = cases.random_case([8 * 100], state=100.0, decay=0.05)

    def local(q, k, v, g, beta, state):
        before = lax.associative_scan(fp8attn.gdn_combine, lax.all_gather(fp8attn.gdn_transition(k, v, g, beta), "cp"))
        rank = lax.axis_index("cp")
        m, n = (x[jnp.maximum(rank - 1, 0)] for x in before)
        entering = fp8attn.gdn_combine((jnp.zeros_like(m), state), (m, n))[1]
        entering = jnp.where(rank == 0, state, entering)
        return gdn_prefill(q, k, v, g, beta, initial_state=entering, state_layout="kv")

    specs = dict(in_specs=(*[P("cp")] * 5, P()), out_specs=(P("cp"), P("cp")))
    sharded = quick_jit(jax.shard_map(local, mesh=mesh_of("cp"), **specs))
    for state in (case.initial, 0 * case.initial):
        o, final = sharded(*case.tensors(), state)
        cases.assert_matches((o, final[-1:]), cases.oracle(case.replace(initial=state)), case.cu, F32)


@functools.cache
def transition_case():
    return cases.random_case([50, 0, 64, 86], decay=0.05)


@functools.cache
def transitions(implementation):
    case = transition_case()
    transition = functools.partial(fp8attn.gdn_transition, cu_seqlens=case.cu, implementation=implementation)
    return quick_jit(transition)(*case.tensors()[1:])


@pytest.mark.parametrize("implementation", PORTABLE)
def test_transitions(implementation):
    """R9: M S + N is the final state, for any S; empty sequences have M = I and N = 0."""
    case, (m, n) = transition_case(), transitions(implementation)
    assert m.dtype == n.dtype == jnp.float32 and m.shape == (4, 4, 32, 32)
    applied = fp8attn.gdn_combine((jnp.zeros_like(m), case.initial), (m, n))[1]
    want = cases.oracle(case)[1]
    for b in range(4):
        testing.assert_relative_error(applied[b], want[b], F32, f"sequence {b}")
    assert (m[1] == jnp.eye(32)).all() and not n[1].any()


def test_transitions_of_grouped_queries():
    """R9: the state heads are read off g."""
    case = cases.random_case([40], heads=(4, 1, 1))
    m, n = fp8attn.gdn_transition(*case.tensors()[1:], qk_l2norm=True, implementation="reference")
    applied = fp8attn.gdn_combine((0 * m, case.initial), (m, n))[1]
    testing.assert_relative_error(applied, cases.oracle(case, eps=1e-6)[1], F32)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_combining_is_associative_and_ordered(implementation):
    """R9: pieces of one sequence, folded either way, are the whole; the order matters."""
    case, (m, n) = transition_case(), transitions(implementation)
    start = jnp.zeros_like(m[0]), case.initial[0]
    whole = cases.oracle(case.replace(cu=cases.offsets(200), initial=case.initial[:1]))[1][0]
    a, b, c, d = ((m[i], n[i]) for i in range(4))
    combine = fp8attn.gdn_combine
    for got in (
        combine(combine(combine(start, a), combine(b, c)), d),
        combine(start, combine(combine(a, b), combine(c, d))),
    ):
        testing.assert_relative_error(got[1], whole, F32)
    assert testing.relative_error(combine(combine(start, d), combine(c, a))[1], whole) > 0.1


# group 6: what no sequence owns


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_poison_outside_every_sequence_changes_no_bit(implementation):
    """R6: rows before the first and past the last offset, initial states of empty sequences apart."""
    clean = ordinary().replace(cu=np.array([9, 70, 70, 200, 391, 500, 900], np.int32))
    want = run(clean, implementation)
    owned = (np.arange(T) >= 9) & (np.arange(T) < 900)
    for poison in (np.nan, np.inf, -np.inf):
        spoil = lambda x: np.where(owned.reshape(-1, *[1] * (x.ndim - 1)), x, np.float32(poison))
        tensors = {name: spoil(getattr(clean, name)) for name in ("q", "k", "v", "g", "beta")}
        testing.assert_bitwise_equal(run(clean.replace(**tensors), implementation), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "initial"])
def test_nan_stays_in_its_sequence(implementation, name):
    """R6: NaN in a sequence's first tokens; every other row, state and checkpoint keeps its bits."""
    clean = ordinary()
    array = np.array(getattr(clean, name))
    if name == "initial":
        array[2] = np.nan
    else:
        array[clean.cu[2] : clean.cu[2] + 3] = np.nan
    want, got = run(clean, implementation), run(clean.replace(**{name: array}), implementation)
    rows = np.ones(T, bool)
    rows[clean.cu[2] : clean.cu[3]] = False
    sequences = np.arange(B) != 2
    intervals = np.repeat(np.arange(B), [n // 64 for n in ORDINARY])
    kept = np.append(intervals != 2, np.ones(len(want[2]) - len(intervals), bool))
    for x, y, keep in zip(got, want, (rows, sequences, kept), strict=True):
        testing.assert_bitwise_equal(x[keep], y[keep])
    assert np.isnan(got[0][clean.cu[2] : clean.cu[3]]).any()


def test_nan_does_not_reach_earlier_chunks():
    clean = ordinary()
    v = clean.v.copy()
    v[clean.cu[5] + 200] = np.nan  # chunk 3
    want, got = run(clean), run(clean.replace(v=v))
    testing.assert_bitwise_equal(got[0][: clean.cu[5] + 192], want[0][: clean.cu[5] + 192])
    assert np.isnan(got[0][clean.cu[5] + 200 : clean.cu[6]]).all()


def test_nan_of_one_head_stays_in_it():
    clean = ordinary()
    v = clean.v.copy()
    v[300, 1] = np.nan
    want, got = run(clean), run(clean.replace(v=v))
    other = np.arange(4) != 1
    testing.assert_bitwise_equal(got[0][:, other], want[0][:, other])
    testing.assert_bitwise_equal(got[1][:, other], want[1][:, other])


# group 7: chunked prefill and checkpoints


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("split", [1, 61, 63, 64, 65, 128])
def test_two_calls_equal_one(implementation, split):
    """R9: the state handed over; at a multiple of 64 the bits are those of one call."""
    case = ragged([600])
    o, final, checkpoints = run(case, implementation)
    one = run(case.replace(cu=cases.offsets(split, *[0] * (B - 1))), implementation)
    tail = case.replace(initial=cases.stored(one[1]))
    tail = tail.replace(cu=cases.offsets(600 - split, *[0] * (B - 1), first=split))
    two = run(tail, implementation)
    got = np.where((np.arange(T) < split)[:, None, None], one[0], two[0])
    same = (
        testing.assert_bitwise_equal
        if split % 64 == 0
        else functools.partial(testing.assert_relative_error, bound=BF16 if implementation in KERNELS else F32)
    )
    same(got, o)
    same(two[1][0], final[0])
    if split % 64 == 0:
        taken = split // 64
        testing.assert_bitwise_equal(np.concatenate([one[2][:taken], two[2][: 9 - taken]]), checkpoints[:9])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpoints_are_the_states_of_prefix_runs(implementation):
    """R9: bitwise, on the same path."""
    case = ordinary()
    checkpoints = run(case, implementation)[2]
    row = 0
    for interval in range(1, 8):
        ends = np.minimum(64 * interval, ORDINARY)
        prefix = case.replace(cu=case.cu.copy())
        for b, length in enumerate(ORDINARY):
            if length < 64 * interval:
                continue
            cu = np.full(B + 1, case.cu[b] + ends[b], np.int32)
            cu[: b + 1] = case.cu[b]
            row = sum(n // 64 for n in ORDINARY[:b]) + interval - 1
            testing.assert_bitwise_equal(checkpoints[row], run(prefix.replace(cu=cu), implementation)[1][b])
    assert row == sum(n // 64 for n in ORDINARY) - 1 and not checkpoints[row + 1 :].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("every", [128, slow(192)])
def test_other_intervals_and_the_other_layout(implementation, every):
    case = ragged([every, 3 * every, 2 * every - 1])
    check(case, implementation, checkpoint_every=every, state_layout="kv")
    kv, vk = run(case, implementation, checkpoint_every=every, state_layout="kv"), run(case, implementation)
    testing.assert_relative_error(kv[1], vk[1].swapaxes(2, 3), 1e-6)


# group 9: heads, columns, widths

HEADS = [
    ((4, 1, 1), (16, 16)),
    ((6, 2, 2), (100, 36)),
    ((16, 16, 48), (16, 16)),
    slow((1, 1, 1), (1, 1)),
    slow((2, 2, 8), (64, 200)),
    slow((16, 16, 64), (16, 16)),
]


@pytest.mark.parametrize("heads,widths", HEADS, ids=str)
def test_heads_and_widths(heads, widths):
    """Grouped values and grouped queries, three values a key included; any K and V."""
    check(cases.random_case([65, 70], heads=heads, widths=widths), "xla", checkpoint_every=0)


@pytest.mark.parametrize("heads", [(6, 2, 2), (2, 2, 6)], ids=str)
def test_heads_of_the_reference(heads):
    check(cases.random_case([5, 70], heads=heads, widths=(16, 16)), "reference", checkpoint_every=0)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("columns", [[31], [32], [31, 32, 47]])
def test_columns_of_v_are_independent(implementation, columns):
    """R8: a changed column of v changes that column of o and of the state, bitwise nothing else."""
    case = ordinary()
    v = case.v.copy()
    v[:, :, columns] += 1
    want, got = run(case, implementation), run(case.replace(v=v), implementation)
    other = np.setdiff1d(np.arange(48), columns)
    testing.assert_bitwise_equal(got[0][..., other], want[0][..., other])
    testing.assert_bitwise_equal(got[1][..., other, :], want[1][..., other, :])
    assert (got[0][: case.cu[-1]][..., columns] != want[0][: case.cu[-1]][..., columns]).mean() > 0.9


# group 10: determinism


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_twice_the_same_bits(implementation):
    """R8, R19: and the arguments are untouched."""
    case = ordinary()
    before = [x.copy() for x in (*case.tensors(), case.cu, case.initial)]
    testing.assert_bitwise_equal(run(case, implementation), run(case, implementation))
    testing.assert_bitwise_equal(before, [*case.tensors(), case.cu, case.initial])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_neighbours_change_no_bit(implementation):
    """R8: other values in every sequence but one."""
    case, other = ordinary(), ordinary(seed=1)
    keep = np.zeros(T, bool)
    keep[case.cu[4] : case.cu[5]] = True
    mix = lambda x, y: np.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, y)
    mixed = {name: mix(getattr(case, name), getattr(other, name)) for name in ("q", "k", "v", "g", "beta")}
    states = np.where((np.arange(B) == 4)[:, None, None, None], case.initial, other.initial)
    want, got = run(case, implementation), run(case.replace(**mixed, initial=states), implementation)
    testing.assert_bitwise_equal(got[0][keep], want[0][keep])
    testing.assert_bitwise_equal(got[1][4], want[1][4])


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("l2norm", [True, slow(False)])
def test_a_sequence_alone_has_the_same_bits(implementation, l2norm):
    """R8: other T, other B, another place in the batch."""
    case = cases.random_case([5] * 40 + [300, 64], heads=(2, 2, 4), widths=(64, 64))
    options = dict(checkpoint_every=0, qk_l2norm=l2norm, jit=jax.jit)
    want = run(case, implementation, **options)
    for b in (40, 17) if not l2norm else (40,):
        first, end = cases.ranges(case.cu, len(case.q))[b]
        cut = {name: getattr(case, name)[first:end] for name in ("q", "k", "v", "g", "beta")}
        alone = case.replace(**cut, cu=cases.offsets(end - first), initial=case.initial[b : b + 1])
        o, final = run(alone, implementation, **options)
        testing.assert_bitwise_equal(o, want[0][first:end])
        testing.assert_bitwise_equal(final[0], want[1][b])


def test_permuted_sequences_have_permuted_results():
    """R9"""
    case = ordinary()
    order = [3, 5, 0, 4, 2, 1]
    spans = cases.ranges(case.cu, T)
    rows = np.concatenate([np.arange(*spans[b]) for b in order] + [np.arange(case.cu[-1], T)])
    moved = {name: getattr(case, name)[rows] for name in ("q", "k", "v", "g", "beta")}
    cu = cases.offsets(*[ORDINARY[b] for b in order])
    want, got = run(case), run(case.replace(**moved, cu=cu, initial=case.initial[order]))
    testing.assert_bitwise_equal(got[0], want[0][rows])
    testing.assert_bitwise_equal(got[1], want[1][order])


# dtypes, scale, l2norm, options


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
def test_low_precision_inputs(implementation, dtype):
    """R1: o in the dtype of v; relative error 6e-3, elements within 1e-2 of the largest."""
    if implementation in KERNELS and dtype == "float16":
        pytest.skip("no kernel for float16")
    case = ordinary(dtype=dtype)
    assert run(case, implementation)[0].dtype == dtype
    check(case, implementation, 6e-3, (1e-2, 2e-3))


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
def test_states_keep_the_dtype_of_the_initial_state(implementation, dtype):
    """Float32 inside, one cast as they are stored."""
    case = ordinary()
    initial = cases.rounded(case.initial, dtype)
    case = case.replace(initial=initial)
    want = run(case, implementation)
    jit = jax.jit if implementation == "xla" else quick_jit
    function = compiled(implementation, jit=jit, checkpoint_every=64)
    got = function(*case.tensors(), case.cu, jnp.asarray(case.state(), dtype), np.float32(32**-0.5))
    testing.assert_bitwise_equal(got, (want[0], *(jnp.asarray(x, dtype) for x in want[1:])))


@pytest.mark.parametrize("implementation", PORTABLE)
def test_out_dtype_saves_what_float16_cannot_hold(implementation):
    """The state is not normalised: o passes 65504."""
    case = cases.random_case([70], dtype="float16", state=1e6)
    wide = run(case, implementation, checkpoint_every=0, out_dtype=jnp.float32)[0]
    assert wide.dtype == jnp.float32 and np.isinf(wide.astype(jnp.float16)).any()
    testing.assert_relative_error(wide, cases.oracle(case)[0], 1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scales(implementation, scale):
    """0.0 means 0."""
    check(ordinary(), implementation, scale=scale)
    if scale == 0.0:
        assert not run(ordinary(), implementation, scale)[0].any()


def test_the_default_scale():
    case = cases.random_case([70], state=0)
    o, _ = gdn_prefill(*case.tensors())
    testing.assert_relative_error(o, cases.oracle(case)[0], F32)
    testing.assert_bitwise_equal(o, gdn_prefill(*case.tensors(), scale=32**-0.5)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_l2norm_adds_eps_to_the_sum(implementation):
    """q and k of every size, zero rows included; keys near sqrt(eps) tell the forms apart."""
    case = ordinary()
    case = case.replace(g=np.exp(case.g))
    size = 10.0 ** np.random.default_rng(0).integers(-4, 5, (T, 1, 1))
    q, k = (np.where(np.arange(T)[:, None, None] % 9 == 0, 0, x * size).astype(np.float32) for x in (case.q, case.k))
    check(case.replace(q=q, k=k), implementation, **ALPHA)
    check(case.replace(k=np.float32(0.1) * case.k), implementation, **ALPHA)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_results_follow_the_static_options(implementation):
    case = cases.random_case([70], state=0)
    call = functools.partial(gdn_prefill, implementation=implementation)
    shapes = [x.shape for x in jax.eval_shape(call, *case.tensors())]
    assert shapes == [(70, 4, 48), (1, 4, 48, 32)]
    assert jax.eval_shape(functools.partial(call, return_final_state=False), *case.tensors()).shape == shapes[0]
    o, checkpoints = run(case, implementation, return_final_state=False)
    cases.assert_matches(in_kv((o, checkpoints)), cases.oracle(case, every=64)[::2], case.cu, F32)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_gates_are_raised_to_float32(implementation):
    case = cases.random_case([70], state=0)
    qkv, gates = case.tensors()[:3], case.tensors()[3:]
    half = [jnp.asarray(x, jnp.bfloat16) for x in gates]
    raised = [x.astype(jnp.float32) for x in half]
    call = quick_jit(functools.partial(gdn_prefill, implementation=implementation))
    one, two = (call(*qkv, *x) for x in (half, raised))
    testing.assert_bitwise_equal(one, two)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_the_batched_form(implementation):
    """[n, T, H, D] is n sequences of T tokens."""
    case = cases.random_case([70] * 3)
    split = [x.reshape(3, 70, *x.shape[1:]) for x in case.tensors()]
    call = functools.partial(gdn_prefill, checkpoint_every=64, implementation=implementation)
    o, final, checkpoints = quick_jit(lambda state, *x: call(*x, initial_state=state))(case.state(), *split)
    assert checkpoints.shape == (3, 1, 4, 48, 32)
    got = in_kv((o.reshape(210, 4, 48), final, checkpoints[:, 0]))
    cases.assert_matches(got, cases.oracle(case, every=64), case.cu, F32)
    m, n = jax.eval_shape(functools.partial(fp8attn.gdn_transition, implementation=implementation), *split[1:])
    assert m.shape == (3, 4, 32, 32) and n.shape == (3, 4, 32, 48)


def test_metadata_stands_for_the_offsets():
    """R16: made once, passed through jit; the same bits."""
    case = ordinary()
    metadata = jax.jit(fp8attn.gdn_metadata, static_argnums=(1, 2))(case.cu, T, 4)
    function = jax.jit(
        lambda metadata, *x: gdn_prefill(*x, metadata=metadata, initial_state=case.state(), checkpoint_every=64)
    )
    testing.assert_bitwise_equal(function(metadata, *case.tensors()), run(case))
    m, _ = jax.eval_shape(lambda *x: fp8attn.gdn_transition(*x, metadata=metadata), *case.tensors()[1:])
    assert m.shape == (B, 4, 32, 32)


@pytest.mark.parametrize("tokens,sequences", [(0, 0), (0, 3), (5, 9), (9, 5), (1000, 6), (640, 1), (63, 63), (64, 2)])
def test_the_bound_on_chunks_is_tight(tokens, sequences):
    """R23: reached by single tokens beside one long sequence, and never passed."""
    used = lambda lengths: sum(-(-n // GDN_CHUNK) for n in lengths)
    bound, rng = gdn_max_chunks(tokens, sequences), np.random.default_rng(0)
    if not sequences:
        assert bound == 0
        return
    singles = min(sequences - 1, max(tokens - 1, 0))
    rest = tokens - singles
    assert max(used([1] * singles + [rest]), used([1] * singles + [rest - rest % 64 + 1])) >= bound - (rest % 64 != 1)
    for _ in range(50):
        cuts = np.sort(rng.integers(0, tokens + 1, sequences - 1))
        assert used(np.diff([0, *cuts, tokens])) <= bound


# group 12: transformations

SMALL = (70, 0, 150, 20)


@functools.cache
def small(seed=0, **changes):
    return cases.random_case(SMALL, tokens=256, widths=(16, 24), seed=seed, **changes)


def call(q, k, v, g, beta, state, scale, cu):
    return gdn_prefill(
        q, k, v, g, beta, cu_seqlens=cu, initial_state=state, scale=scale, checkpoint_every=64, qk_l2norm=True
    )


jitted_call = quick_jit(call)


def operands(case, scale=0.3):
    return *case.tensors(), case.state(), np.float32(scale), case.cu


@functools.cache
def instances():
    """Three sets of operands, offsets included, stacked."""
    offsets = [small().cu, cases.offsets(0, 64, 0, 80), np.array([5, 5, 300, 9, 1], np.int32)]
    sets = [operands(small(seed=i).replace(cu=cu), 0.1 + i) for i, cu in enumerate(offsets)]
    return [np.stack(x) for x in zip(*sets, strict=True)]


def test_one_trace_for_all_values():
    """R16: offsets, states, gates and scale change without a retrace, inside jit."""
    traces = []

    @jax.jit
    def function(*args):
        traces.append(1)
        return call(*args)

    for i in range(3):
        function.trace(*[x[i] for x in instances()])
    assert len(traces) == 1


def test_eager_calls_trace_once(monkeypatch):
    """R16"""
    traces = []

    def run(problem, arrays):
        traces.append(1)
        return jnp.zeros((problem.tokens, problem.heads, problem.v_width)), arrays.initial_state

    monkeypatch.setattr(xla, "run", run)
    case = cases.random_case([41, 31, 3])
    for cu in ([0, 40, 70, 73], [0, 0, 0, 0], [9, 5, -1, 80]):
        gdn_prefill(*case.tensors(), cu_seqlens=np.array(cu, np.int32), initial_state=case.state(), scale=cu[1])
    assert len(traces) == 1


@functools.cache
def vmapped(axes):
    return quick_jit(jax.vmap(call, in_axes=axes))


@pytest.mark.parametrize("batched", ["01234567", "2", "57", slow("01"), slow("6"), slow("7"), slow("3456")])
def test_vmap_equals_a_loop(batched):
    """R16: any subset of the arguments; bitwise, since the chunks are the same."""
    stacked = instances()
    axes = tuple(0 if str(i) in batched else None for i in range(8))
    pick = lambda n: [x[n] if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]
    got = vmapped(axes)(*[x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)])
    for n in range(3):
        testing.assert_bitwise_equal([x[n] for x in got], list(jitted_call(*pick(n))))


def test_nested_vmap_and_no_instance():
    """R16"""
    stacked = instances()
    twice = [np.stack([x, x[::-1]]) for x in stacked]
    got = quick_jit(jax.vmap(jax.vmap(call)))(*twice)
    want = vmapped((0,) * 8)(*stacked)
    testing.assert_bitwise_equal([x[0] for x in got], list(want))
    testing.assert_bitwise_equal([x[1][::-1] for x in got], list(want))
    none = jax.vmap(call)(*[x[:0] for x in stacked])
    assert [x.shape[0] for x in none] == [0, 0, 0]
    gradient = jax.vmap(jax.grad(lambda *x: call(*x)[0].sum()))(*[x[:0] for x in stacked])
    assert gradient.shape == (0, 256, 2, 16)


@pytest.mark.slow
def test_vmap_of_transitions_and_metadata():
    """R16"""
    *tensors, _, _, cu = instances()
    transition = lambda cu, *x: fp8attn.gdn_transition(*x[1:], cu_seqlens=cu)
    got = jax.vmap(transition)(cu, *tensors)
    testing.assert_bitwise_equal([x[1] for x in got], list(transition(cu[1], *[x[1] for x in tensors])))
    metadata = jax.vmap(lambda cu: fp8attn.gdn_metadata(cu, 256, 4))(cu)
    given = jax.vmap(lambda metadata, *x: gdn_prefill(*x, metadata=metadata))(metadata, *tensors)
    plain = jax.vmap(lambda cu, *x: gdn_prefill(*x, cu_seqlens=cu))(cu, *tensors)
    testing.assert_bitwise_equal(given, plain)


def test_vmap_adds_no_loop():
    """R16: as many loops as one call has."""
    loops = lambda function, *args: str(jax.make_jaxpr(function)(*args)).count("while[")
    stacked = instances()
    assert loops(jax.vmap(call), *stacked) == loops(call, *[x[0] for x in stacked]) > 0


def test_scan_over_layers():
    """R16"""
    case = small()
    layers = np.stack([case.v, 0.5 * case.v])

    def layer(state, v):
        o, final, _ = call(case.q, case.k, v, case.g, case.beta, state, np.float32(0.3), case.cu)
        return final, o

    final, o = quick_jit(lambda layers: lax.scan(layer, case.state(), layers))(layers)
    state = case.state()
    for i in range(2):
        args = operands(case.replace(v=layers[i]))
        want, state, _ = jitted_call(*args[:5], state, *args[6:])
        testing.assert_bitwise_equal(o[i], want)
    testing.assert_bitwise_equal(final, state)


def test_export_round_trip():
    """R16: for CPU and CUDA; run here on the CPU. Metadata travels as an argument."""

    def function(metadata, *tensors):
        return gdn_prefill(*tensors, metadata=metadata, checkpoint_every=64)

    case = small(state=0)
    metadata = fp8attn.gdn_metadata(case.cu, 256, 4)
    exported = jax.export.export(jax.jit(function), platforms=["cpu", "cuda"])(metadata, *case.tensors())
    loaded = jax.export.deserialize(exported.serialize())
    got = in_kv(loaded.call(metadata, *case.tensors()))
    cases.assert_matches(got, cases.oracle(case, every=64), case.cu, F32)


HEAD = P(None, "h")
SPLIT_HEADS = dict(in_specs=(*[HEAD] * 6, P(), P()), out_specs=(HEAD,) * 3)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")


def test_heads_over_devices():
    """R17: bitwise equal to one device, no collective in the compiled program."""
    args = operands(small())
    sharded = quick_jit(jax.shard_map(call, mesh=mesh_of("h", 2), **SPLIT_HEADS)).lower(*args).compile()
    testing.assert_bitwise_equal(sharded(*args), jitted_call(*args))
    assert not [word for word in COLLECTIVES if word in sharded.as_text()]


# gradients


def op_loss(gate="log", eps=1e-6, implementation=None):
    options = dict(gate=gate, qk_l2norm=eps is not None, l2norm_eps=eps or 1e-6, implementation=implementation)

    def loss(q, k, v, g, beta, state, scale, cu):
        o, final, checkpoints = gdn_prefill(
            q, k, v, g, beta, cu_seqlens=cu, initial_state=state, scale=scale, checkpoint_every=64, **options
        )
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final)) + jnp.sum(jnp.sin(3 * checkpoints))

    return loss


FLOATS = ("q", "k", "v", "g", "beta", "initial_state", "scale")
ARGUMENTS = tuple(range(len(FLOATS)))


@functools.cache
def gradients(gate="log", eps=1e-6):
    """(q, k, v, g, beta, state, scale, cu) -> the gradients of the floats."""
    return quick_jit(jax.grad(op_loss(gate, eps), argnums=ARGUMENTS))


def exact_gradients(problem, arrays, *args):
    """The same by automatic differentiation of the sequential form in float64."""

    def loss(q, k, v, g, beta, state, scale):
        given = arrays._replace(q=q, k=k, v=v, g=g, beta=beta, initial_state=state, scale=scale[None])
        o, final, checkpoints = reference.sequential(problem, given)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final)) + jnp.sum(jnp.sin(3 * checkpoints))

    with jax.enable_x64(True):
        return quick_jit(jax.grad(loss, argnums=ARGUMENTS))(*(jnp.asarray(x, jnp.float64) for x in args))


def extreme(case):
    """Resets of every kind, gates just above, beta 0, 1 and 2."""
    g, beta = case.g.copy(), case.beta.copy()
    g[40], g[75, 1], g[100:104], g[225] = -1e4, -np.inf, -29.9, -np.inf
    beta[3], beta[80], beta[81] = 0, 1, 2
    return case.replace(g=g, beta=beta)


GRADIENTS = {
    "l2norm": (small, "log", 1e-6),
    "extreme": (lambda: extreme(small()), "log", 1e-6),
    "alpha, grouped queries": (lambda: small(heads=(4, 2, 2)), "alpha", None),
    "plain": (small, "log", None),
}


@pytest.mark.parametrize("name", ["extreme", *map(slow, ("l2norm", "alpha, grouped queries", "plain"))])
def test_gradients_against_float64(name):
    """R16: q, k, v, g, beta, initial state and scale, through o, final states and checkpoints, to 1e-5."""
    make, gate, eps = GRADIENTS[name]
    case = make()
    if gate == "alpha":
        case = case.replace(g=np.exp(case.g))
    kwargs = dict(cu_seqlens=case.cu, initial_state=case.state(), checkpoint_every=64, gate=gate)
    problem, arrays = problem_and_arrays(*case.tensors(), **kwargs, qk_l2norm=eps is not None)
    *args, cu = operands(case)
    got = gradients(gate, eps)(*args, cu)
    want = exact_gradients(problem, arrays, *args)
    for argument, x, y in zip(FLOATS, got, want, strict=True):
        assert x.dtype == jnp.float32 and np.isfinite(x).all(), argument
        testing.assert_relative_error(x, y, F32, f"gradient of {argument}")
    assert not got[0][240:].any() and not got[3][240:].any() and np.asarray(got[5][1]).any()


EDGES = [
    ("log", 1e-6, -np.inf),
    ("log", 1e-6, -1e4),
    ("alpha", None, 0.0),
    ("alpha", None, 1e-40),
    ("alpha", None, 1.0),
]


@pytest.mark.parametrize("gate,eps,g", EDGES)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gradients_are_finite_at_the_edges(gate, eps, g, beta):
    """R2: every gate and every beta at once, and zero keys."""
    case = small() if gate == "log" else small(heads=(4, 2, 2))
    case = case.replace(k=0 * case.k, g=np.full_like(case.g, g), beta=np.full_like(case.beta, beta))
    assert all(np.isfinite(x).all() for x in gradients(gate, eps)(*operands(case)))


@pytest.mark.slow
def test_gradients_of_low_precision_inputs():
    """R16: cotangents in the dtypes of the arguments, within bfloat16 of the float32 ones."""
    case = small(dtype="bfloat16")
    state = cases.rounded(case.state(), "bfloat16")
    args = operands(case.replace(dtype="float32"))
    exact = gradients()(*args[:5], state, *args[6:])
    low = gradients()(*operands(case)[:5], jnp.asarray(state, jnp.bfloat16), *args[6:])
    assert [x.dtype for x in low] == [jnp.bfloat16] * 3 + [jnp.float32] * 2 + [jnp.bfloat16, jnp.float32]
    for name, x, y in zip(FLOATS, low, exact, strict=True):
        testing.assert_relative_error(x, y, 3e-2, name)


def test_gradients_of_one_result():
    """R16: no initial state, no final state, a Python scale."""
    case = small(state=0)
    q, k, _, g, beta = case.tensors()
    loss = lambda v: jnp.sum(
        jnp.sin(gdn_prefill(q, k, v, g, beta, cu_seqlens=case.cu, scale=0.5, return_final_state=False))
    )
    got = quick_jit(jax.grad(loss))(case.v)
    problem, arrays = problem_and_arrays(*case.tensors(), cu_seqlens=case.cu, scale=0.5)
    with jax.enable_x64(True):
        exact = lambda v: jnp.sum(jnp.sin(reference.sequential(problem, arrays._replace(v=v))[0]))
        want = quick_jit(jax.grad(exact))(jnp.asarray(case.v, jnp.float64))
    testing.assert_relative_error(got, want, F32)


def test_gradients_of_transitions():
    """R16: through M and N, against the final states of K + V columns in float64."""
    case = small()
    q, *tensors = case.tensors()
    outcome = lambda m, n: jnp.sum(jnp.sin(m)) + jnp.sum(jnp.cos(n))
    loss = lambda *x: outcome(*fp8attn.gdn_transition(*x, cu_seqlens=case.cu))
    got = quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*tensors)
    start = jnp.broadcast_to(jnp.eye(16, 40), (4, 4, 16, 40))
    wide = np.pad(case.v, ((0, 0), (0, 0), (16, 0)))
    kwargs = dict(cu_seqlens=case.cu, initial_state=start, state_layout="kv")
    problem, arrays = problem_and_arrays(q, case.k, wide, case.g, case.beta, **kwargs)

    def exact(k, v, g, beta):
        given = arrays._replace(k=k, v=jnp.pad(v, ((0, 0), (0, 0), (16, 0))), g=g, beta=beta)
        final = reference.sequential(problem, given)[1]
        return outcome(final[..., :16], final[..., 16:])

    with jax.enable_x64(True):
        want = quick_jit(jax.grad(exact, argnums=(0, 1, 2, 3)))(*(jnp.asarray(x, jnp.float64) for x in tensors))
    for name, x, y in zip(("k", "v", "g", "beta"), got, want, strict=True):
        testing.assert_relative_error(x, y, F32, name)


@pytest.mark.slow
def test_vmapped_gradients_equal_a_loop():
    """R16: the backward pass is folded, too; arguments that are not batched get the sum over the instances."""
    stacked = instances()
    axes = (0, 0, 0, 0, 0, None, None, 0)
    args = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]
    loss = jax.vmap(op_loss(), in_axes=axes)
    got = quick_jit(jax.grad(lambda *x: jnp.sum(loss(*x)), argnums=ARGUMENTS))(*args)
    loop = [
        gradients()(*[x[n] if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]) for n in range(3)
    ]
    for i, name in enumerate(FLOATS):
        parts = np.stack([np.asarray(x[i], np.float64) for x in loop])
        testing.assert_relative_error(got[i], parts if axes[i] == 0 else parts.sum(0), 1e-5, name)


def test_gradients_with_heads_over_devices():
    """R16, R17: inside shard_map; the scale, which all devices share, gets the sum."""
    args = operands(small())
    specs = dict(in_specs=SPLIT_HEADS["in_specs"], out_specs=(*[HEAD] * 6, P()))
    inside = jax.shard_map(jax.grad(op_loss(), argnums=ARGUMENTS), mesh=mesh_of("h", 2), **specs)
    for name, x, y in zip(FLOATS, quick_jit(inside)(*args), gradients()(*args), strict=True):
        testing.assert_relative_error(x, y, 1e-6, name)


@pytest.mark.slow
def test_gradients_through_shard_map_and_remat():
    """R16"""
    args = operands(small())
    sharded = jax.shard_map(call, mesh=mesh_of("h", 2), **SPLIT_HEADS)

    def loss(*args):
        o, final, checkpoints = sharded(*args)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(final)) + jnp.sum(jnp.sin(3 * checkpoints))

    for function in (loss, jax.checkpoint(op_loss())):
        got = quick_jit(jax.grad(function, argnums=ARGUMENTS))(*args)
        for name, x, y in zip(FLOATS, got, gradients()(*args), strict=True):
            testing.assert_relative_error(x, y, 1e-6, name)


def test_nan_keeps_gradients_of_other_sequences_clean():
    """R6: q, v, beta and states of the other sequences keep their bits."""
    case = small()
    v = case.v.copy()
    v[230] = np.nan  # the last sequence
    clean, dirty = (gradients()(*operands(c)) for c in (case, case.replace(v=v)))
    for i in (0, 1, 2, 3, 4):
        testing.assert_bitwise_equal(clean[i][:220], dirty[i][:220], FLOATS[i])
    testing.assert_bitwise_equal(clean[5][:3], dirty[5][:3])
    assert np.isnan(dirty[0][220:240]).any()


@pytest.mark.slow
def test_gradients_of_the_reference_implementation():
    """R16: the backward pass is the same, whichever implementation went forward."""
    args = operands(small())
    got = quick_jit(jax.grad(op_loss(implementation="reference"), argnums=ARGUMENTS))(*args)
    for name, x, y in zip(FLOATS, got, gradients()(*args), strict=True):
        testing.assert_relative_error(x, y, 1e-5, name)


# selection and bad input


def test_selection():
    """R14"""
    case = small()
    explanation = fp8attn.explain("gdn_prefill", *case.tensors(), cu_seqlens=case.cu)
    assert explanation.taken == "xla" and {row.name for row in explanation.rows} >= {
        "pallas",
        "flashinfer",
        "reference",
    }
    with pytest.raises(UnsupportedError, match="pallas"):
        gdn_prefill(*case.tensors(), implementation="pallas")
    wish = functools.partial(gdn_prefill, implementation=("pallas", "xla"))
    assert jax.eval_shape(wish, *case.tensors())[0].shape == (256, 4, 24)


def bad(**changes):
    """A call with some arguments replaced; ``del_`` none."""
    case = cases.random_case([40, 30], widths=(16, 24))
    named = dict(zip(("q", "k", "v", "g", "beta"), case.tensors(), strict=True)) | dict(cu_seqlens=case.cu)
    return lambda: gdn_prefill(**(named | changes))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


META = functools.partial(fp8attn.gdn_metadata, np.array([0, 40, 70], np.int32))
BAD_INPUT = {
    "q rank": (dict(q=zeros(70, 32)), "q"),
    "q list": (dict(q=[1.0]), "q"),
    "q dtype": (dict(q=zeros(70, 2, 16, dtype=np.int32)), "q"),
    "q fp8": (dict(q=jnp.zeros((70, 2, 16), jnp.float8_e4m3fn)), "q"),
    "k tokens": (dict(k=zeros(71, 2, 16)), "k"),
    "k width": (dict(k=zeros(70, 2, 15)), "k"),
    "k dtype": (dict(k=zeros(70, 2, 16, dtype=np.float16)), "k"),
    "v dtype": (dict(v=zeros(70, 4, 24, dtype=np.float16)), "v"),
    "v rank": (dict(v=zeros(70, 96)), "v"),
    "no width": (dict(v=zeros(70, 4, 0)), "widths"),
    "heads": (dict(k=zeros(70, 3, 16)), "heads"),
    "both grouped": (dict(q=zeros(70, 8, 16)), "heads"),
    "no heads": (dict(q=zeros(70, 0, 16), k=zeros(70, 0, 16), v=zeros(70, 0, 24)), "heads"),
    "g heads": (dict(g=zeros(70, 2)), "g"),
    "g rank": (dict(g=zeros(70)), "g"),
    "g integer": (dict(g=zeros(70, 4, dtype=np.int32)), "g"),
    "g missing": (dict(g=None), "g"),
    "beta tokens": (dict(beta=zeros(69, 4)), "beta"),
    "cu int64": (dict(cu_seqlens=np.zeros(3, np.int64)), "cu_seqlens"),
    "cu empty": (dict(cu_seqlens=np.zeros(0, np.int32)), "cu_seqlens"),
    "cu rank": (dict(cu_seqlens=np.zeros((3, 1), np.int32)), "cu_seqlens"),
    "cu list": (dict(cu_seqlens=[0, 40, 70]), "cu_seqlens"),
    "state sequences": (dict(initial_state=zeros(3, 4, 24, 16)), "initial_state"),
    "state layout": (dict(initial_state=zeros(2, 4, 16, 24)), "state_layout='kv'"),
    "state dtype": (dict(initial_state=zeros(2, 4, 24, 16, dtype=np.int8)), "initial_state"),
    "scale vector": (dict(scale=zeros(2)), "scale"),
    "scale text": (dict(scale="auto"), "scale"),
    "gate": (dict(gate="linear"), "gate"),
    "l2norm traced": (dict(qk_l2norm=jnp.array(True)), "qk_l2norm"),
    "eps zero": (dict(l2norm_eps=0.0), "l2norm_eps"),
    "eps nan": (dict(l2norm_eps=math.nan), "l2norm_eps"),
    "layout": (dict(state_layout="VK"), "state_layout"),
    "interval": (dict(checkpoint_every=32), "checkpoint_every"),
    "interval odd": (dict(checkpoint_every=100), "multiple of 64"),
    "interval negative": (dict(checkpoint_every=-64), "checkpoint_every"),
    "interval float": (dict(checkpoint_every=64.0), "checkpoint_every"),
    "precision": (dict(precision="highest"), "precision"),
    "segments": (dict(segments=0), "segments"),
    "segments text": (dict(segments="all"), "segments"),
    "final state": (dict(return_final_state=1), "return_final_state"),
    "out_dtype": (dict(out_dtype=np.int8), "out_dtype"),
    "out_dtype text": (dict(out_dtype="bf17"), "out_dtype"),
    "metadata": (dict(metadata={}), "metadata"),
    "metadata tokens": (dict(metadata=lambda: META(71, 4)), "metadata"),
    "metadata heads": (dict(metadata=lambda: META(70, 2)), "metadata"),
    "metadata sequences": (dict(metadata=lambda: META(70, 4), cu_seqlens=np.zeros(2, np.int32)), "metadata"),
    "batched with offsets": (
        dict(
            q=zeros(1, 70, 2, 16), k=zeros(1, 70, 2, 16), v=zeros(1, 70, 4, 24), g=zeros(1, 70, 4), beta=zeros(1, 70, 4)
        ),
        "cu_seqlens",
    ),
    "batched in part": (dict(q=zeros(1, 70, 2, 16), cu_seqlens=None), "k"),
    "implementation": (dict(implementation="cuda"), "implementation"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    """R15: refused while tracing; the message names the argument and what was expected."""
    changes, word = BAD_INPUT[name]
    changes = {k: v() if callable(v) and k == "metadata" else v for k, v in changes.items()}
    with pytest.raises(InvalidInputError, match="expected") as error:
        bad(**changes)()
    assert word in str(error.value) and "gdn_prefill" in str(error.value)


BAD_CALLS = {
    "transition without state heads": lambda: fp8attn.gdn_transition(
        zeros(9, 2, 4), zeros(9, 4, 4), zeros(9, 8), zeros(9, 8)
    ),
    "transition k": lambda: fp8attn.gdn_transition(zeros(9, 4), zeros(9, 4, 4), zeros(9, 4), zeros(9, 4)),
    "transition gate": lambda: fp8attn.gdn_transition(
        zeros(9, 4, 4), zeros(9, 4, 4), zeros(9, 4), zeros(9, 4), gate="exp"
    ),
    "combine a": lambda: fp8attn.gdn_combine(zeros(4, 4), (zeros(4, 4), zeros(4, 5))),
    "combine square": lambda: fp8attn.gdn_combine((zeros(4, 3), zeros(4, 5)), (zeros(4, 4), zeros(4, 5))),
    "combine widths": lambda: fp8attn.gdn_combine((zeros(4, 4), zeros(4, 5)), (zeros(4, 4), zeros(4, 6))),
    "metadata offsets": lambda: fp8attn.gdn_metadata(np.zeros(3), 9, 4),
    "metadata tokens": lambda: fp8attn.gdn_metadata(np.zeros(3, np.int32), -1, 4),
    "metadata traced": lambda: fp8attn.gdn_metadata(np.zeros(3, np.int32), jnp.array(9), 4),
    "metadata heads": lambda: fp8attn.gdn_metadata(np.zeros(3, np.int32), 9, 0),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_of_the_small_functions(name):
    """R15"""
    with pytest.raises(InvalidInputError, match="expected"):
        BAD_CALLS[name]()


def test_value_checks_on_the_host():
    """R4, R15: the first bad position is named; gates outside the sequences do not count."""
    case = ordinary()
    args = case.tensors()
    checks.gdn_prefill(*args, cu_seqlens=case.cu)
    for cu, message in (
        ([0, 300, 200, 500, 600, 700, 800], r"cu_seqlens\[2\] is smaller"),
        ([0, 300, 1001, 1001, 1001, 1001, 1001], r"cu_seqlens\[2\] is larger than 1000"),
        ([-1, 0, 1, 2, 3, 4, 5], r"cu_seqlens\[0\] is negative"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            checks.gdn_prefill(*args, cu_seqlens=np.array(cu, np.int32))
    g = case.g.copy()
    g[980] = 1.0
    checks.gdn_prefill(*args[:3], g, args[4], cu_seqlens=case.cu)
    g[40, 2] = 0.25
    with pytest.raises(InvalidInputError, match=r"g\[40, 2\] is not at most 0"):
        checks.gdn_prefill(*args[:3], g, args[4], cu_seqlens=case.cu)
    with pytest.raises(InvalidInputError, match=r"g\[0, 0\] is not from 0 to 1"):
        checks.gdn_prefill(*args, gate="alpha")


def test_value_checks_under_checkify():
    """R4, R15"""
    case = ordinary()

    def function(cu, g):
        checks.gdn_prefill(*case.tensors()[:3], g, case.beta, cu_seqlens=cu)
        return jnp.sum(g)

    checked = jax.jit(checkify.checkify(function))
    assert checked(case.cu, case.g)[0].get() is None
    assert "cu_seqlens" in checked(case.cu[::-1].copy(), case.g)[0].get()
    assert "g[" in checked(case.cu, -case.g)[0].get()


def test_forward_mode_is_refused_by_jax_and_reverse_is_offered():
    """R16"""
    case = small()
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda q: call(q, *operands(case)[1:])[0], (case.q,), (case.q,))


@pytest.mark.slow
@pytest.mark.parametrize("dtype,gate", [("float32", "log"), ("bfloat16", "log"), ("float32", "alpha")])
def test_random_cases(dtype, gate):
    """R2: 3 x 3400 valid cases, ten thousand in all: no NaN, and the result of the recurrence."""
    tokens, sequences, at_once = 96, 3, 100

    def one(implementation, q, k, v, g, beta, cu, state):
        return gdn_prefill(
            q,
            k,
            v,
            g,
            beta,
            cu_seqlens=cu,
            initial_state=state,
            qk_l2norm=True,
            gate=gate,
            implementation=implementation,
        )

    fast, exact = (jax.jit(jax.vmap(functools.partial(one, name))) for name in IMPLEMENTATIONS)
    rng = np.random.default_rng(len(dtype) + len(gate))
    for _ in range(34):
        args = random_operands(rng, at_once, tokens, sequences, dtype, gate)
        got, want = fast(*args), exact(*args)
        for x, y in zip(got, want, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            assert np.isfinite(x).all()
            axes = tuple(range(1, x.ndim))
            error = np.sqrt(((x - y) ** 2).sum(axes) / np.maximum((y**2).sum(axes), 1e-12))
            assert error.max() <= (2e-4 if dtype == "float32" else 6e-3)


def random_operands(rng, n, tokens, sequences, dtype, gate):
    """Sizes, gates, betas and lengths of every kind."""
    normal = lambda *shape: rng.standard_normal((n, *shape))
    size = 10.0 ** rng.integers(-3, 4, (n, 1, 1, 1))
    q, k, v = normal(tokens, 1, 16) * size, normal(tokens, 1, 16), normal(tokens, 2, 16) * size
    k = np.where(rng.random((n, 1, 1, 1)) < 0.3, k + 3 * normal(1, 1, 16), k)
    g = -np.exp(3 * normal(1, 2) + normal(tokens, 2))
    g = np.where(rng.random(g.shape) < 0.02, -np.inf, g)
    beta = rng.random((n, tokens, 2)) * rng.choice([0, 1, 1, 2], (n, 1, 2))
    cu = np.sort(rng.integers(0, tokens + 1, (n, sequences + 1)), axis=1)
    low = [jnp.asarray(x, dtype) for x in (q, k, v)]
    rest = [np.float32(np.exp(g) if gate == "alpha" else g), np.float32(beta), np.int32(cu)]
    return *low, *rest, np.float32(normal(sequences, 2, 16, 16) * size[..., None])


def test_the_memory_of_one_call_is_bounded():
    """R23: temporaries are one copy of the largest input and a few blocks of chunks."""
    shapes = [(32768, 2, 128), (32768, 2, 128), (32768, 8, 128), (32768, 8), (32768, 8)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32 if len(s) == 2 else jnp.bfloat16) for s in shapes]
    analysis = quick_jit(gdn_prefill).lower(*args).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 160 * 2**20, analysis


def test_problems_are_data():
    """R12, R14: frozen and hashable, so that they can be static arguments and cache keys."""
    case = small()
    problem = fp8attn.explain("gdn_prefill", *case.tensors(), cu_seqlens=case.cu).problem
    assert hash(problem) == hash(dataclasses.replace(problem)) and problem.state_shape == (4, 24, 16)
    assert problem.max_chunks == 4 + (256 - 4) // 64
