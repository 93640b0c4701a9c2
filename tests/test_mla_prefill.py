"""The contract of mla_prefill, over every implementation that runs here."""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from implementations import implementations

import jax_fp8attn as fp8attn
from jax_fp8attn import testing
from jax_fp8attn.problems import MlaProblem
from jax_fp8attn.reference import mla_prefill as oracle

IMPLEMENTATIONS = implementations("mla_prefill")
ONES = {"pallas": 0.003}  # of what a softmax over ones may miss one by; 1e-5 without e4m3
T, S, H = 300, 500, 2
LENGTHS_Q = (0, 1, 7, 8, 15, 0, 0, 16, 17, 63, 130, 0)
LENGTHS_K = (5, 0, 7, 100, 3, 9, 0, 16, 129, 64, 128, 2)
F32 = dict(out_dtype=jnp.float32, return_lse=True)


@pytest.fixture(autouse=True)
def _unnamed_is_xla(monkeypatch):
    """Bounds of the tests that name no implementation are those of ``xla``; tests/test_mla_kernel.py has the others."""
    monkeypatch.setenv("JAX_FP8ATTN_IMPLEMENTATION", "xla")


def offsets(*lengths, first=0):
    return jnp.asarray(np.cumsum([first, *lengths]), jnp.int32)


CU_Q, CU_K = offsets(*LENGTHS_Q, first=3), offsets(*LENGTHS_K)


@functools.cache
def operands(tokens=T, keys=S, heads=H, seed=0, mean=0.0, std=1.0, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape)
    q = normal(tokens, heads, 192) * std
    return tuple(jnp.asarray(x, dtype) for x in (q, normal(keys, heads, 192), normal(keys, heads, 128) + mean))


def exact(*args, **kwargs):
    """The float64 oracle."""
    with jax.enable_x64(True):
        return fp8attn.mla_prefill(*args, **kwargs, implementation="reference")


def emulated(*args, **kwargs):
    """The reference that rounds where the FP8 kernels round, through the public op's own problem."""
    grabbed = {}

    def capture(op, problem, name, arrays):
        grabbed.update(problem=problem, arrays=op.prepare(problem, arrays))
        raise KeyboardInterrupt

    original, fp8attn.dispatch.execute = fp8attn.dispatch.execute, capture
    try:
        fp8attn.mla_prefill(*args, **kwargs)
    except KeyboardInterrupt:
        pass
    finally:
        fp8attn.dispatch.execute = original
    return oracle.emulated(grabbed["problem"], grabbed["arrays"])


def codes(x):
    """e4m3 at scale 1."""
    return fp8attn.quantize_fp8(x, fp8attn.Fp8PerTensor(1.0)).values


def assert_alike(result, want):
    """Two compilations of one computation: equal up to the last bit of a float."""
    (out, lse), (want_out, want_lse) = result, want
    testing.assert_lse_close(lse, want_lse, 1e-6, 1e-6)
    if isinstance(out, fp8attn.Fp8Array):
        testing.assert_codes_close(out.values, want_out.values, 1, 0.999)
        testing.assert_rows_close(out.scales_2d(), want_out.scales_2d(), 1e-6)
    else:
        testing.assert_rows_close(out, want_out, 1e-6 if out.dtype == jnp.float32 else 2**-9)


def numpy_attention(q, k, v, cu_q, cu_k, causal, scale=192**-0.5):
    """float64, sequence by sequence and row by row; the only code that the oracle itself is checked against."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((*q.shape[:2], 128)), np.full((q.shape[1], q.shape[0]), -np.inf)
    for b in range(len(cu_q) - 1):
        lq, lk = int(cu_q[b + 1] - cu_q[b]), int(cu_k[b + 1] - cu_k[b])
        for i in range(lq):
            n = min(lk, i + lk - lq + 1) if causal else lk
            if n <= 0:
                continue
            t, keys = int(cu_q[b]) + i, slice(int(cu_k[b]), int(cu_k[b]) + n)
            for h in range(q.shape[1]):
                s = k[keys, h] @ q[t, h] * scale
                lse[h, t] = s.max() + np.log(np.exp(s - s.max()).sum())
                out[t, h] = np.exp(s - lse[h, t]) @ v[keys, h]
    return out, lse


def e4m3(x):
    return np.clip(np.asarray(x, np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_oracle_against_numpy(causal):
    """R1: the authority agrees with a loop over rows in float64."""
    q, k, v = operands()
    out, lse = exact(q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal=causal, **F32)
    want, want_lse = numpy_attention(e4m3(q), e4m3(k), e4m3(v), CU_Q, CU_K, causal)
    testing.assert_rows_close(out, want, 1e-6)
    testing.assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("compute", ["fp8", "bf16"])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged(causal, compute):
    """R1, R3: empty sequences first, middle, last and in a row; Lq above, below and equal to Lk."""
    q, k, v = operands()
    kwargs = dict(cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, causal=causal, compute=compute, **F32)
    out, lse = fp8attn.mla_prefill(q, k, v, **kwargs)
    want, want_lse = exact(q, k, v, **kwargs)
    testing.assert_rows_close(out, want, 1e-5)
    testing.assert_lse_close(lse, want_lse)
    empty = np.isneginf(np.asarray(lse)).T
    assert empty[:3].all() and empty[int(CU_Q[-1]) :].all() and not np.asarray(out)[empty].any()
    assert empty[int(CU_Q[3]) : int(CU_Q[4])].any() == (causal and LENGTHS_Q[3] > LENGTHS_K[3])


@pytest.mark.parametrize(
    "dtype,compute", [("float32", "fp8"), ("float32", "bf16"), ("float16", "fp8"), ("e4m3", "fp8"), ("e4m3", "bf16")]
)
def test_input_dtypes(dtype, compute):
    """fp32 inputs to 1e-5; every operand type; scales of FP8 operands count in both compute modes."""
    cast = (lambda x: x.astype(dtype)) if dtype != "e4m3" else codes
    q, k, v = map(cast, operands(dtype="float32"))
    scales = dict(q_scale=0.5, k_scale=2.0, v_scale=3.0)
    kwargs = dict(cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, compute=compute, **scales, **F32)
    out, lse = fp8attn.mla_prefill(q, k, v, **kwargs)
    want, want_lse = exact(q, k, v, **kwargs)
    testing.assert_rows_close(out, want, 1e-5)
    testing.assert_lse_close(lse, want_lse)


@pytest.mark.slow
def test_mixed_operands():
    """Each operand for itself: FP8 nope beside a bf16 rope part, FP8 q, bf16 v."""
    q, k, v = operands(64, 64)
    pair = codes(k[..., :128]), k[:, 0, 128:]
    for compute in ("fp8", "bf16"):
        kwargs = dict(compute=compute, q_scale=0.5, k_scale=2.0, v_scale=3.0, **F32)
        out, lse = fp8attn.mla_prefill(codes(q), pair, v, **kwargs)
        want, want_lse = exact(codes(q), pair, v, **kwargs)
        testing.assert_rows_close(out, want, 1e-5)
        testing.assert_lse_close(lse, want_lse)


SHAPES = [(1, 1, 1), (2, 1, 3), (63, 65, 1), (128, 128, 2), (129, 127, 2), (1, 300, 8)]


@pytest.mark.parametrize("number,shape", list(enumerate(SHAPES)))
def test_shapes(number, shape):
    tokens, keys, heads = shape
    q, k, v = operands(tokens, keys, heads)
    kwargs = dict(causal=number % 2 == 0, **F32)
    out, lse = fp8attn.mla_prefill(q, k, v, cu_seqlens_q=offsets(tokens), cu_seqlens_k=offsets(keys), **kwargs)
    want, want_lse = exact(q, k, v, **kwargs)
    testing.assert_rows_close(out, want, 1e-5)
    testing.assert_lse_close(lse, want_lse)
    testing.assert_bitwise_equal(fp8attn.mla_prefill(q, k, v, **kwargs), (out, lse), "offsets None, one sequence")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 4, 2), (4, 0, 2), (0, 0, 2), (4, 4, 0)])
def test_zero_sizes(shape, implementation):
    """R3: no tokens, no keys, no heads, no sequences."""
    tokens, keys, heads = shape
    q, k, v = (jnp.ones(s) for s in ((tokens, heads, 192), (keys, heads, 192), (keys, heads, 128)))
    out, lse = fp8attn.mla_prefill(q, k, v, **F32, implementation=implementation)
    assert out.shape == (tokens, heads, 128) and not np.asarray(out).any() and (np.asarray(lse) == -np.inf).all()
    none = jnp.zeros(1, jnp.int32)
    out, lse = fp8attn.mla_prefill(q, k, v, cu_seqlens_q=none, cu_seqlens_k=none, **F32, implementation=implementation)
    assert not np.asarray(out).any() and (np.asarray(lse) == -np.inf).all()
    quantised = fp8attn.mla_prefill(
        q, k, v, output_quant=fp8attn.Fp8PerGroup.deepgemm_sm100(), implementation=implementation
    )
    assert quantised.values.shape == (tokens, heads, 128)
    if tokens and heads:
        word = np.asarray(quantised.scales)[0, :tokens]
        assert (word == 0x5E5E).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pair_and_batched_forms(implementation):
    """The pair (nope, shared rope) is bit-equal to the concatenated k; the batched form to packed sequences."""
    q, k, v = operands(96, 96, 2)
    rope = k[:, 0, 128:]
    k = k.at[:, :, 128:].set(rope[:, None])
    run = functools.partial(fp8attn.mla_prefill, implementation=implementation, **F32)
    one, two = run(q, k, v), run(q, (k[..., :128], rope), v)
    testing.assert_bitwise_equal(two, one, "pair form")
    state = jax.random.normal(jax.random.key(1), (96, 2, 128)), jax.random.normal(jax.random.key(2), (2, 96))
    packed, packed_lse = run(q, k, v, cu_seqlens_q=offsets(32, 32, 32), initial_state=state)
    cut = lambda x: x.reshape(3, 32, *x.shape[1:])
    batch_state = cut(state[0]), jnp.moveaxis(state[1].reshape(2, 3, 32), 1, 0)
    out, lse = run(cut(q), (cut(k[..., :128]), cut(rope)), cut(v), initial_state=batch_state)
    testing.assert_bitwise_equal(out.reshape(packed.shape), packed, "batched form")
    testing.assert_bitwise_equal(jnp.moveaxis(lse, 0, 1).reshape(2, 96), packed_lse, "batched lse")
    quantised = run(
        cut(q), cut(k), cut(v), output_quant=fp8attn.Fp8PerGroup.row_major(), implementation=implementation
    )[0]
    assert quantised.values.shape == (3, 32, 2, 128) and quantised.flat.shape == (96, 256)
    testing.assert_relative_error(quantised.dequantize(), run(cut(q), cut(k), cut(v))[0], 0.03)


def test_sequence_alone_in_any_batch():
    """R8: the bits of a sequence depend neither on its neighbours' values nor on its place in the batch."""
    q, k, v = operands(T, T)
    run = jax.jit(lambda q, k, v, cu: fp8attn.mla_prefill(q, k, v, cu_seqlens_q=cu, **F32))
    length = 70
    alone = None
    for start in (0, 1, 13, 100, T - length):
        place = lambda x: jnp.full_like(x, jnp.nan).at[start : start + length].set(x[:length])
        out, lse = run(*map(place, (q, k, v)), offsets(0, length, 0, first=start))
        got = out[start : start + length], lse[:, start : start + length]
        alone = alone or got
        testing.assert_bitwise_equal(got, alone, f"start {start}")
    neighbours = lambda x, fill: jnp.concatenate([x[:length], jnp.full_like(x[length:], fill)])
    for fill in (0.0, 7.0, jnp.nan, jnp.inf):
        out, lse = run(*(neighbours(x, fill) for x in (q, k, v)), offsets(length, 100, 60))
        testing.assert_bitwise_equal((out[:length], lse[:, :length]), alone, f"neighbours {fill}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_key_by_key(implementation):
    """Bottom-right alignment, one visible key at a time: V is one-hot by key."""
    lengths = [(1, 1), (3, 5), (5, 3), (4, 4), (1, 6)]
    cu_q, cu_k = offsets(*(a for a, _ in lengths)), offsets(*(b for _, b in lengths))
    tokens, keys = int(cu_q[-1]), int(cu_k[-1])
    q, k = jnp.zeros((tokens, 1, 192)), jnp.zeros((keys, 1, 192))
    v = jnp.eye(keys, 128)[:, None]
    for causal in (True, False):
        out = fp8attn.mla_prefill(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            causal=causal,
            out_dtype=jnp.float32,
            implementation=implementation,
        )
        for b, (lq, lk) in enumerate(lengths):
            for i in range(lq):
                n = max(0, i + lk - lq + 1) if causal else lk
                want = np.zeros(128)
                want[int(cu_k[b]) : int(cu_k[b]) + n] = 1 / max(n, 1)
                np.testing.assert_allclose(np.asarray(out)[int(cu_q[b]) + i, 0], want, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hostile_offsets(implementation):
    """R4: negative, decreasing and too large offsets have the clamped running-maximum meaning, others stay put."""
    q, k, v = operands(40, 40)
    hostile = np.array([-5, 10, 4, 25, 2**31 - 1, -(2**31), 30])
    clean = np.maximum.accumulate(np.clip(hostile, 0, 40))
    run = lambda cu: fp8attn.mla_prefill(
        q,
        k,
        v,
        cu_seqlens_q=jnp.asarray(cu, jnp.int32),
        cu_seqlens_k=jnp.asarray(cu, jnp.int32),
        **F32,
        implementation=implementation,
    )
    testing.assert_bitwise_equal(run(hostile), run(clean))
    assert np.isfinite(np.asarray(run(hostile)[0])).all()


def test_nan_reaches_its_readers_and_no_one_else():
    """R2, R6: positions of NaN equal the oracle's, for NaN in q, k and v, at the first, last and diagonal keys."""
    q, k, v = operands(150, 150)
    cu = offsets(20, 110, 12)
    for position in (20, 84, 129):
        for name in "qkv":
            x = dict(q=q, k=k, v=v)
            x[name] = x[name].at[position, 1, 5].set(jnp.nan)
            out, lse = fp8attn.mla_prefill(**x, cu_seqlens_q=cu, **F32)
            want, want_lse = exact(**x, cu_seqlens_q=cu, **F32)
            testing.assert_rows_close(out, want, 1e-5)
            testing.assert_lse_close(lse, want_lse)
            bad = np.isnan(np.asarray(out))
            assert not bad[:20].any() and not bad[130:].any() and not bad[:, 0].any()
            rows = {"q": {position}}.get(name, set(range(position, 130)))
            assert set(np.argwhere(bad.any((1, 2)))[:, 0].tolist()) == rows
            if name == "v":
                assert set(np.argwhere(bad)[:, 2].tolist()) == {5} and np.isfinite(np.asarray(lse)[:, 20:130]).all()


def test_infinite_values_in_bf16_compute():
    """R2: with compute="bf16" V keeps infinities; hidden ones add nothing."""
    q, k, v = operands(80, 80)
    v = v.at[40, 0, 3].set(jnp.inf).at[50, 0, 3].set(-jnp.inf).at[60, 1, 7].set(-jnp.inf)
    out, _ = fp8attn.mla_prefill(q, k, v, compute="bf16", **F32)
    want, _ = exact(q, k, v, compute="bf16", **F32)
    testing.assert_rows_close(out, want, 1e-5)


def test_dirty_memory():
    """R6: NaN behind all sequences, in unused state rows and in keys of no sequence changes no bit."""
    q, k, v = operands()
    state = jax.random.normal(jax.random.key(1), (T, H, 128)), jax.random.normal(jax.random.key(2), (H, T))
    run = jax.jit(
        lambda q, k, v, a, b: fp8attn.mla_prefill(
            q, k, v, cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, initial_state=(a, b), **F32
        )
    )
    clean = run(q, k, v, *state)
    last_q, last_k = int(CU_Q[-1]), int(CU_K[-1])
    dirty = [x.at[last:].set(jnp.nan) for x, last in ((q, last_q), (k, last_k), (v, last_k), (state[0], last_q))]
    dirty[0], dirty[3] = (x.at[:3].set(jnp.nan) for x in (dirty[0], dirty[3]))
    lse = state[1].at[:, last_q:].set(jnp.nan).at[:, :3].set(jnp.nan)
    testing.assert_bitwise_equal(run(*dirty, lse), clean)
    assert not np.asarray(clean[0])[:3].any()


def test_casts():
    """R7: bf16 beyond the range saturates, NaN survives; codes in = values in; a scale = quantising by hand."""
    q, k, v = operands(64, 64)
    k = k.at[3, 0, :6].set(jnp.array([447, 449, 464, 480, 1e4, jnp.inf], jnp.bfloat16)).at[4, 0, :2].set(-jnp.inf)
    k = k * 0.25
    out = fp8attn.mla_prefill(q, k, v, **F32)
    want, want_lse = numpy_attention(e4m3(q), e4m3(k), e4m3(v), [0, 64], [0, 64], True)
    testing.assert_rows_close(out[0], want, 1e-5)
    testing.assert_lse_close(out[1], want_lse)
    testing.assert_bitwise_equal(fp8attn.mla_prefill(codes(q), codes(k), codes(v), **F32), out, "codes in")
    scales = dict(q_scale=0.02, k_scale=0.7, v_scale=0.01)
    by_hand = [
        jnp.asarray(e4m3(np.asarray(x, np.float32) / np.float32(s)), jnp.float32)
        for x, s in zip((q, k, v), scales.values(), strict=True)
    ]
    by_hand = [fp8attn.quantize_fp8(x, fp8attn.Fp8PerTensor(1.0)).values for x in by_hand]
    testing.assert_bitwise_equal(
        fp8attn.mla_prefill(q, k, v, **scales, **F32), fp8attn.mla_prefill(*by_hand, **scales, **F32), "scaled cast"
    )


def test_scales_fold():
    """R7: q_scale and k_scale multiply the logits, v_scale the result; hostile ones follow IEEE everywhere."""
    stored = [codes(x) for x in operands(40, 40)]
    base = fp8attn.mla_prefill(*stored, softmax_scale=0.06, **F32)
    scaled = fp8attn.mla_prefill(*stored, q_scale=2.0, k_scale=3.0, softmax_scale=0.01, v_scale=4.0, **F32)
    testing.assert_rows_close(scaled[0] / 4, base[0], 1e-5)
    testing.assert_lse_close(scaled[1], base[1])
    for name in ("q_scale", "k_scale", "v_scale", "softmax_scale"):
        for value in (0.0, -1.0, 1e-30, 1e30, jnp.inf, jnp.nan):
            out, lse = fp8attn.mla_prefill(*stored, **{name: value}, **F32)
            want, want_lse = fp8attn.mla_prefill(*stored, **{name: value}, **F32, implementation="reference")
            testing.assert_same_nonfinite(out, want, f"{name}={value}")
            testing.assert_same_nonfinite(lse, want_lse, f"{name}={value}")
            if abs(value) < 2:
                testing.assert_rows_close(out, want, 1e-4, what=f"{name}={value}")


@pytest.mark.parametrize("kind", ["std4", "std16", "one hot", "equal", "first", "last", "rising"])
def test_large_logits(kind):
    """The rescale path: rising maxima, dominating first and last keys, all keys equal."""
    q, k, v = operands(32, 700, 1, std={"std4": 4.0, "std16": 16.0}.get(kind, 1.0))
    ones = jnp.ones((32, 1, 192), jnp.bfloat16)
    ramp = {
        "first": jnp.zeros(700).at[0].set(30),
        "last": jnp.zeros(700).at[-1].set(30),
        "one hot": jnp.zeros(700).at[333].set(40),
    }
    ramp |= {"equal": jnp.zeros(700), "rising": jnp.linspace(0, 100, 700)}
    if kind in ramp:
        q, k = ones, jnp.broadcast_to(ramp[kind][:, None, None] / 14, k.shape).astype(jnp.bfloat16)
    out, lse = fp8attn.mla_prefill(q, k, v, causal=False, **F32)
    want, want_lse = exact(q, k, v, causal=False, **F32)
    testing.assert_rows_close(out, want, 2e-5)
    testing.assert_lse_close(lse, want_lse, 1e-4, 1e-5)


@pytest.mark.parametrize(
    "mean,std", [(1.0, 1.0), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0.0, 1.0), (0.0, 2.0), (0.25, 4.0)))]
)
def test_fp8_error_within_emulated(mean, std):
    """R1: at most twice the error of the reference that rounds P; shifted V stays accurate at length."""
    q, k, v = operands(16, 8192, 1, mean=mean, std=std)
    kwargs = dict(causal=False, **F32)
    want, want_lse = exact(q, k, v, **kwargs)
    rounded = emulated(q, k, v, **kwargs)
    out, lse = fp8attn.mla_prefill(q, k, v, **kwargs)
    testing.assert_within_emulated(out, rounded[0], want)
    assert 0.0005 < testing.relative_error(rounded[0], want) < 0.03
    if mean == 1.0:
        testing.assert_relative_error(out, want, 0.005)
        testing.assert_relative_error(rounded[0], want, 0.006)
    testing.assert_lse_close(lse, want_lse, 1e-4)


def test_emulation_lift():
    """The emulation lifts P: without it the error doubles at 8192 keys and logits of deviation 2."""
    q, k, v = operands(16, 8192, 1, std=2.0)
    kwargs = dict(causal=False, **F32)
    want, lifted = exact(q, k, v, **kwargs)[0], emulated(q, k, v, **kwargs)[0]
    lift, oracle.LIFT = oracle.LIFT, 1.0
    try:
        flat = emulated(q, k, v, **kwargs)[0]
    finally:
        oracle.LIFT = lift
    assert testing.relative_error(lifted, want) < 0.022 < testing.relative_error(flat, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_of_one(implementation):
    """V = 1 everywhere comes out as 1."""
    q, k, _ = operands(8, 1500, 1)
    out = fp8attn.mla_prefill(
        q, k, jnp.ones((1500, 1, 128)), causal=False, out_dtype=jnp.float32, implementation=implementation
    )
    assert np.abs(np.asarray(out) - 1).max() < ONES.get(implementation, 1e-5)


def test_lse_is_natural_and_unlifted():
    """A test that base 2 or a forgotten lift of 8 ln 2 cannot pass."""
    q, k, v = jnp.zeros((4, 1, 192)), jnp.zeros((77, 1, 192)), jnp.ones((77, 1, 128))
    for implementation in IMPLEMENTATIONS:
        lse = fp8attn.mla_prefill(q, k, v, causal=False, return_lse=True, implementation=implementation)[1]
        np.testing.assert_allclose(np.asarray(lse), math.log(77), rtol=1e-5 if implementation == "pallas" else 1e-6)
    assert abs(float(emulated(q, k, v, causal=False, return_lse=True)[1][0, 0]) - math.log(77)) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_initial_state(implementation):
    """R9: the state merges as merge_attn_states does; empty sides, +inf, NaN behind -inf, NaN lse."""
    q, k, v = operands(40, 40)
    run = functools.partial(fp8attn.mla_prefill, q, k, v, implementation=implementation, **F32)
    out, lse = run()
    state = jax.random.normal(jax.random.key(3), out.shape), jax.random.normal(jax.random.key(4), lse.shape) + 3
    merged = run(initial_state=state)
    want = fp8attn.merge_attn_states(*state, out, lse, return_lse=True)
    testing.assert_rows_close(merged[0], want[0], 2e-6)
    testing.assert_lse_close(merged[1], want[1])
    dirty = state[0].at[5].set(jnp.nan), state[1].at[:, 5].set(-jnp.inf).at[:, 6].set(jnp.inf).at[0, 7].set(jnp.nan)
    merged = run(initial_state=dirty)
    testing.assert_bitwise_equal(merged[0][5:7], out[5:7], "empty state")
    testing.assert_bitwise_equal(merged[1][:, 5:7], lse[:, 5:7], "empty state lse")
    assert np.isnan(np.asarray(merged[0])[7, 0]).all() and np.isnan(np.asarray(merged[1])[0, 7])
    assert np.isfinite(np.asarray(merged[0])[7, 1]).all()
    no_keys = fp8attn.mla_prefill(
        q,
        k,
        v,
        cu_seqlens_q=offsets(40),
        cu_seqlens_k=offsets(0),
        initial_state=state,
        implementation=implementation,
        **F32,
    )
    testing.assert_bitwise_equal(no_keys[0], state[0], "empty call")
    empty_both = jnp.full_like(state[0], jnp.nan), jnp.full_like(state[1], -jnp.inf)
    none = fp8attn.mla_prefill(
        q,
        k,
        v,
        cu_seqlens_q=offsets(40),
        cu_seqlens_k=offsets(0),
        initial_state=empty_both,
        implementation=implementation,
        **F32,
    )
    assert not np.asarray(none[0]).any() and (np.asarray(none[1]) == -np.inf).all()


@pytest.mark.parametrize("chunks", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_split_keys(chunks):
    """R9: keys in chunks, in any order, through the state or through merges, equal one pass."""
    q, k, v = operands(50, 210)
    whole = exact(q, k, v, causal=False, **F32)
    cuts = np.linspace(0, 210, chunks + 1).astype(int)
    parts = [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    state, merged = None, None
    for part in np.random.default_rng(chunks).permutation(np.arange(chunks)):
        ks, vs = k[parts[part]], v[parts[part]]
        alone = fp8attn.mla_prefill(q, ks, vs, causal=False, **F32)
        state = fp8attn.mla_prefill(q, ks, vs, causal=False, initial_state=state, **F32)
        merged = alone if merged is None else fp8attn.merge_attn_states(*alone, *merged, return_lse=True)
    for result in (state, merged):
        testing.assert_rows_close(result[0], whole[0], 1e-5)
        testing.assert_lse_close(result[1], whole[1])


SPECS = [
    fp8attn.Fp8PerTensor(0.003),
    fp8attn.Fp8PerGroup.row_major(),
    fp8attn.Fp8PerGroup.row_major(64),
    fp8attn.Fp8PerGroup(32, "ue8m0", "col"),
    fp8attn.Fp8PerGroup.deepgemm_sm90(),
    fp8attn.Fp8PerGroup.deepgemm_sm100(),
]


@pytest.mark.parametrize(
    "spec", [pytest.param(x, marks=[pytest.mark.slow] if x.static() in SPECS[2:4] else []) for x in SPECS], ids=str
)
def test_output_quantisation(spec):
    """R9: fused output = quantising the float32 result, code by code, with state, empty rows, lse and odd T."""
    tokens = 253
    q, k, v = operands(tokens, tokens, 3)
    state = jax.random.normal(jax.random.key(3), (tokens, 3, 128)), jnp.full((3, tokens), -1.0)
    cu_q, cu_k = offsets(100, 50, 90), offsets(100, 20, 0)
    kwargs = dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True)
    with_state = spec.static() in (SPECS[0].static(), SPECS[3], SPECS[5])
    for extra in ({}, {"initial_state": state})[: 1 + with_state]:
        plain, lse = fp8attn.mla_prefill(q, k, v, out_dtype=jnp.float32, **kwargs, **extra)
        fused, fused_lse = fp8attn.mla_prefill(q, k, v, output_quant=spec, **kwargs, **extra)
        want = fp8attn.quantize_fp8(plain, spec)
        testing.assert_codes_close(fused.values, want.values, 1, 0.999)
        testing.assert_rows_close(fused.scales_2d(), want.scales_2d(), 1e-6)
        testing.assert_bitwise_equal(fused_lse, lse)
        assert fused.scales.shape == want.scales.shape and fused.num_tokens == tokens
        if not extra:
            assert not testing.fp8_bytes(fused.values)[150:].any()


def test_ue8m0_of_empty_rows():
    """Rows without a key carry the scale of a zero group: byte 0x5E."""
    q, k, v = operands(8, 8, 4)
    out = fp8attn.mla_prefill(
        q,
        k,
        v,
        cu_seqlens_q=offsets(4, 4),
        cu_seqlens_k=offsets(0, 8),
        output_quant=fp8attn.Fp8PerGroup.deepgemm_sm100(),
    )
    assert (np.asarray(out.scales)[0, :4] == 0x5E5E5E5E).all() and (np.asarray(out.scales)[0, 4:] != 0x5E5E5E5E).all()


def test_fp8_prefill_switch(monkeypatch):
    """JAX_FP8ATTN_FP8_PREFILL=0 turns the default into bf16, and only the default."""
    q, k, v = operands(32, 32)
    fp8, bf16 = (fp8attn.mla_prefill(q, k, v, compute=c, **F32) for c in ("fp8", "bf16"))
    assert testing.relative_error(fp8[0], bf16[0]) > 1e-3
    testing.assert_bitwise_equal(fp8attn.mla_prefill(q, k, v, **F32), fp8)
    monkeypatch.setenv("JAX_FP8ATTN_FP8_PREFILL", "0")
    testing.assert_bitwise_equal(fp8attn.mla_prefill(q, k, v, **F32), bf16)
    testing.assert_bitwise_equal(fp8attn.mla_prefill(q, k, v, compute="fp8", **F32), fp8)


def test_one_trace_for_all_values():
    """R16: offsets, scales and states change without a retrace."""
    q, k, v = operands(96, 96)
    traces = []

    @jax.jit
    def f(q, k, v, cu_q, cu_k, scale, spec, state):
        traces.append(1)
        return fp8attn.mla_prefill(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            q_scale=scale,
            k_scale=scale,
            v_scale=scale,
            softmax_scale=scale,
            output_quant=spec,
            initial_state=state,
            return_lse=True,
        )

    for n, scale in ((0, 1.0), (17, 0.5), (96, 2.0)):
        state = jnp.full((96, H, 128), scale), jnp.full((H, 96), scale)
        f(
            q,
            k,
            v,
            offsets(n, 96 - n),
            offsets(96 - n, n),
            jnp.float32(scale),
            fp8attn.Fp8PerTensor(jnp.float32(scale)),
            state,
        )
    assert len(traces) == 1


@pytest.mark.parametrize(
    "in_axes,spec",
    [
        pytest.param((0, 0, 0, 0, 0, 0), fp8attn.Fp8PerGroup.deepgemm_sm100(), marks=pytest.mark.slow),
        ((None, None, None, 0, None, None), None),
        pytest.param((0, None, None, None, 0, 0), None, marks=pytest.mark.slow),
        ((None, 1, 1, 0, 0, None), fp8attn.Fp8PerGroup.deepgemm_sm90()),
    ],
)
def test_vmap(in_axes, spec):
    """R16: vmap over any subset of the arguments equals a loop, bit for bit, without a loop."""
    n, tokens = 3, 30
    q, k, v = operands(tokens * n, tokens * n, 2)
    grow = lambda x: jnp.stack([x[i * tokens : (i + 1) * tokens] for i in range(n)])
    full = [grow(q), grow(k), grow(v), jnp.stack([offsets(30), offsets(7), offsets(0)]), jnp.array([1.0, 0.5, 2.0])]
    full[3] = jnp.stack([offsets(10, 20), offsets(0, 30), offsets(7, 8, first=0)])
    full.append(jax.random.normal(jax.random.key(5), (n, 2, tokens)))
    args = [x[0] if a is None else jnp.moveaxis(x, 0, a) for x, a in zip(full, in_axes, strict=True)]

    def f(q, k, v, cu, scale, lse):
        state = jnp.ones((tokens, 2, 128)), lse
        return fp8attn.mla_prefill(
            q, k, v, cu_seqlens_q=cu, v_scale=scale, initial_state=state, output_quant=spec, return_lse=True
        )

    folded = jax.vmap(f, in_axes)(*args)
    for i in range(n):
        one = f(*(x if a is None else jnp.take(x, i, axis=a) for x, a in zip(args, in_axes, strict=True)))
        assert_alike(jax.tree.map(lambda x: x[i], folded), one)
    scans = lambda f, *a: str(jax.make_jaxpr(f)(*a)).count("scan[")
    assert scans(jax.vmap(f, in_axes), *args) == scans(
        f, *(x if a is None else jnp.take(x, 0, axis=a) for x, a in zip(args, in_axes, strict=True))
    )


@pytest.mark.slow
def test_nested_vmap_scan_remat_and_donation():
    """R16."""
    q, k, v = operands(96, 96, 1)
    cut = lambda x: x.reshape(2, 3, 16, *x.shape[1:])
    f = lambda q, k, v: fp8attn.mla_prefill(q, k, v, **F32)
    nested = jax.vmap(jax.vmap(f))(cut(q), cut(k), cut(v))
    batched = f(*(x.reshape(6, 16, *x.shape[1:]) for x in (q, k, v)))
    testing.assert_rows_close(nested[0].reshape(batched[0].shape), batched[0], 1e-6)
    _, scanned = jax.lax.scan(lambda c, x: (c, f(*x)), 0, tuple(x.reshape(6, 16, *x.shape[1:]) for x in (q, k, v)))
    testing.assert_rows_close(scanned[0], batched[0], 1e-6)
    testing.assert_rows_close(jax.jit(jax.checkpoint(f))(q, k, v)[0], f(q, k, v)[0], 1e-6)
    want = f(q, k, v)
    with_state = lambda q, k, v, s: fp8attn.mla_prefill(q, k, v, initial_state=s, **F32)
    state = (jnp.zeros((96, 1, 128)), jnp.full((1, 96), -jnp.inf))
    testing.assert_bitwise_equal(jax.jit(with_state, donate_argnums=3)(q, k, v, state), want)


def test_no_derivative():
    q, k, v = operands(16, 16, 1, dtype="float32")
    for transform in (jax.grad, lambda f: lambda x: jax.jvp(f, (x,), (x,))):
        with pytest.raises(fp8attn.UnsupportedError, match="mla_prefill has no derivative"):
            transform(lambda q: fp8attn.mla_prefill(q, k, v, out_dtype=jnp.float32).sum())(q)
    stopped = lambda q: fp8attn.mla_prefill(jax.lax.stop_gradient(q), k, v, out_dtype=jnp.float32).sum() + q.sum()
    assert (np.asarray(jax.grad(stopped)(q)) == 1).all()


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_export(platform):
    """R16: exported, serialised, read back; run where this machine can."""
    q, k, v = operands(48, 48)
    f = jax.jit(
        lambda q, k, v, cu: fp8attn.mla_prefill(
            q, k, v, cu_seqlens_q=cu, output_quant=fp8attn.Fp8PerGroup.deepgemm_sm90()
        )
    )
    exported = jax.export.export(f, platforms=[platform])(q, k, v, offsets(20, 28))
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.platforms == (platform,)
    if platform == jax.default_backend():
        got = jax.tree.leaves(loaded.call(q, k, v, offsets(20, 28)))
        testing.assert_bitwise_equal(got, jax.tree.leaves(f(q, k, v, offsets(20, 28))))


def test_heads_sharded():
    """R17: heads over eight devices equal one device bit for bit; no K or V is gathered; words stay in their shard."""
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    P = jax.sharding.PartitionSpec
    q, k, v = operands(64, 64, 32)
    rope = k[:, 0, 128:]
    spec = fp8attn.Fp8PerGroup.deepgemm_sm100()

    def f(q, nope, rope, v, cu):
        return fp8attn.mla_prefill(q, (nope, rope), v, cu_seqlens_q=cu, output_quant=spec, return_lse=True)

    by_head = P(None, "heads", None)
    out_specs = (fp8attn.Fp8Array(by_head, P("heads", None), spec, 64), P("heads", None))
    sharded = jax.jit(
        jax.shard_map(
            f, mesh=mesh, in_specs=(by_head, by_head, P(), by_head, P()), out_specs=out_specs, check_vma=False
        )
    )
    args = q, k[..., :128], rope, v, offsets(20, 44)
    testing.assert_bitwise_equal(sharded(*args), f(*args))
    assert "all-gather" not in sharded.lower(*args).compile().as_text()


@pytest.mark.parametrize("workspace", [pytest.param(64, marks=pytest.mark.slow), 512])
def test_chunked_pipeline(workspace):
    """End to end: ragged requests over a paged latent cache in chunks, against dense float64 attention."""
    heads, latent, block = 4, 32, 16
    new, context = (25, 38, 51, 19), (0, 1, 77, 500)
    rng = np.random.default_rng(0)
    bf16 = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    blocks = [-(-c // block) for c in context]
    tables = np.full((4, max(blocks)), 10**6)
    order = rng.permutation(sum(blocks) + 3)[: sum(blocks)]
    for b, n in enumerate(blocks):
        tables[b, :n], order = order[:n], order[n:]
    cache = jnp.full((sum(blocks) + 3, block, latent + 64), jnp.nan, jnp.bfloat16)
    rows = [bf16(c, latent + 64) for c in context]
    for b, c in enumerate(context):
        p = np.arange(c)
        cache = cache.at[tables[b, p // block], p % block].set(rows[b])
    w = bf16(latent, heads, 256) * latent**-0.5
    load = fp8attn.paged_latent_loader(cache, jnp.asarray(tables, jnp.int32), w)
    expand = lambda r: jnp.einsum("wl,lhd->whd", r[:, :latent], w, preferred_element_type=jnp.float32).astype(
        jnp.bfloat16
    )
    tokens = sum(new)
    q, own = bf16(tokens, heads, 192), bf16(tokens, latent + 64)
    kv = expand(own)
    cu = offsets(*new)
    run = jax.jit(
        lambda cu, lengths: fp8attn.mla_prefill_chunked(
            q,
            (kv[..., :128], own[:, latent:]),
            kv[..., 128:],
            load,
            cu_seqlens=cu,
            context_lengths=lengths,
            workspace_tokens=workspace,
            return_lse=True,
            out_dtype=jnp.float32,
        )
    )
    out, lse = run(cu, jnp.asarray(context, jnp.int32))
    keys = [jnp.concatenate([rows[b], own[int(cu[b]) : int(cu[b + 1])]]) for b in range(4)]
    all_keys = jnp.concatenate(keys)
    all_kv = expand(all_keys)
    k = jnp.concatenate(
        [all_kv[..., :128], jnp.broadcast_to(all_keys[:, None, latent:], (len(all_keys), heads, 64))], -1
    )
    want, want_lse = numpy_attention(e4m3(q), e4m3(k), e4m3(all_kv[..., 128:]), cu, offsets(*map(len, keys)), True)
    testing.assert_rows_close(out, want, 1e-5)
    testing.assert_lse_close(lse, want_lse)
    nothing, _ = run(cu, jnp.zeros(4, jnp.int32))
    plain = fp8attn.mla_prefill(
        q, (kv[..., :128], own[:, latent:]), kv[..., 128:], cu_seqlens_q=cu, out_dtype=jnp.float32
    )
    testing.assert_rows_close(nothing, plain, 1e-6)


@pytest.mark.slow
def test_chunked_pipeline_quantises_like_dense():
    """Contexts of 0, 1, 777 and 5000 in chunks of 512: error and bytes against dense attention."""
    heads = 2
    new, context = (64, 96, 128, 48), (0, 1, 777, 5000)
    rng = np.random.default_rng(1)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    cu, tokens = offsets(*new), sum(new)
    q, k, v = normal(tokens, heads, 192), normal(tokens, heads, 192), normal(tokens, heads, 128)
    start = jnp.asarray(np.cumsum([0, *context[:-1]]), jnp.int32)
    context_k, context_v = normal(sum(context), heads, 192), normal(sum(context), heads, 128)
    load = lambda request, position: (context_k[start[request] + position], context_v[start[request] + position])
    spec = fp8attn.Fp8PerGroup.deepgemm_sm100()
    out = fp8attn.mla_prefill_chunked(
        q,
        k,
        v,
        load,
        cu_seqlens=cu,
        context_lengths=jnp.asarray(context, jnp.int32),
        workspace_tokens=512,
        output_quant=spec,
    )
    lengths = [c + n for c, n in zip(context, new, strict=True)]
    join = lambda a, b: jnp.concatenate(
        [x for i in range(4) for x in (a[int(start[i]) : int(start[i]) + context[i]], b[int(cu[i]) : int(cu[i + 1])])]
    )
    dense = exact(
        q,
        join(context_k, k),
        join(context_v, v),
        cu_seqlens_q=cu,
        cu_seqlens_k=offsets(*lengths),
        out_dtype=jnp.float32,
    )
    want = fp8attn.quantize_fp8(dense, spec)
    eager = fp8attn.quantize_fp8(dense.astype(jnp.bfloat16), spec)
    testing.assert_within_emulated(out.dequantize(), eager.dequantize(), dense)
    testing.assert_codes_close(out.values, want.values, 1, 0.99)
    assert (np.asarray(out.scales) == np.asarray(want.scales)).mean() > 0.999


def test_inputs_untouched():
    """R19."""
    q, k, v = operands(48, 48)
    copies = [np.array(x) for x in (q, k, v, CU_Q)]
    fp8attn.mla_prefill(q, k, v, cu_seqlens_q=CU_Q)
    for x, copy in zip((q, k, v, CU_Q), copies, strict=True):
        testing.assert_bitwise_equal(x, copy)


def test_addresses_beyond_32_bits():
    """R5: no index of the blockwise path counts elements; rows stay below 2^31 where elements do not."""
    problem = MlaProblem(131072, 131072, 1, 128, *[jnp.dtype("bfloat16")] * 4)
    assert problem.tokens * problem.heads * problem.v_width == 2**31
    shapes = [(131072, 128, 192), (131072, 128, 192), (131072, 128, 128)]
    args = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    out = jax.eval_shape(fp8attn.mla_prefill, *args)
    assert out.shape == (131072, 128, 128)
    text = jax.jit(fp8attn.mla_prefill).lower(*args).as_text()
    assert "reshape" not in [
        line.split("=")[1].split()[0] for line in text.splitlines() if "2147483648xf32" in line and "=" in line
    ]


def _call(**changes):
    q, k, v = operands(8, 8)
    kwargs = dict(q=q, k=k, v=v)
    kwargs |= changes
    return lambda: jax.eval_shape(lambda: fp8attn.mla_prefill(**kwargs))


Z = jnp.zeros
INVALID = {
    "q": [Z((8, 2, 128)), Z((8, 192)), Z((8, 2, 192), jnp.int32), [[1.0]], None],
    "k": [Z((8, 2, 128)), Z((8, 3, 192)), Z((7, 2, 192)), Z((8, 2, 192), jnp.int8), (Z((8, 2, 128)),)],
    "k[0]": [(Z((8, 2, 192)), Z((8, 64))), (Z((8, 3, 128)), Z((8, 64)))],
    "k[1]": [(Z((8, 2, 128)), Z((8, 2, 64))), (Z((8, 2, 128)), Z((7, 64))), (Z((8, 2, 128)), Z((8, 32)))],
    "v": [Z((8, 2, 192)), Z((8, 3, 128)), Z((8, 128))],
    "cu_seqlens_q": [Z(3), Z((2, 2), jnp.int32), Z(0, jnp.int32), [0, 8], Z(2, jnp.int16)],
    "softmax_scale": ["0.1", Z(2), True],
    "q_scale": [Z((2, 1)), "x"],
    "k_scale": [Z(3)],
    "v_scale": [(1.0, 2.0)],
    "causal": [1, None, jnp.array(True)],
    "return_lse": ["yes"],
    "initial_state": [Z((8, 2, 128)), (Z((8, 2, 128)),)],
    "initial_state[0]": [(Z((8, 2, 64)), Z((2, 8))), (Z((8, 2, 128), jnp.int32), Z((2, 8)))],
    "initial_state[1]": [(Z((8, 2, 128)), Z((8, 2))), (Z((8, 2, 128)), Z((2, 8), jnp.bfloat16))],
    "output_quant": ["fp8", 128, fp8attn.Fp8PerTensor(jnp.ones(3))],
    "out_dtype": [jnp.int32, "float8_e4m3fn", "nonsense"],
    "compute": ["fp4", True],
    "implementation": ["fast", ("xla", "nope"), ()],
}


@pytest.mark.parametrize("argument,value", [(a, v) for a, values in INVALID.items() for v in values])
def test_invalid_input(argument, value):
    """R15: raised while tracing; names the argument, what came and what was expected."""
    with pytest.raises(fp8attn.InvalidInputError) as error:
        _call(**{argument.split("[")[0]: value})()
    message = str(error.value)
    assert message.startswith("mla_prefill") and argument in message and "expected" in message, message


def test_invalid_combinations():
    q, k, v = operands(8, 8)
    cu = offsets(8)
    with pytest.raises(fp8attn.InvalidInputError, match="cu_seqlens_q is None beside cu_seqlens_k"):
        _call(cu_seqlens_k=cu)()
    with pytest.raises(fp8attn.InvalidInputError, match="cu_seqlens_k is None with 8 keys for 6 tokens"):
        _call(q=q[:6], cu_seqlens_q=cu)()
    with pytest.raises(fp8attn.InvalidInputError, match="cu_seqlens_k"):
        _call(cu_seqlens_q=cu, cu_seqlens_k=offsets(4, 4))()
    with pytest.raises(fp8attn.InvalidInputError, match="batched"):
        _call(q=q[None], k=k[None], v=v[None], cu_seqlens_q=cu)()
    with pytest.raises(fp8attn.InvalidInputError, match="looks like \\[T, H\\]; transpose"):
        _call(initial_state=(jnp.zeros((8, 2, 128)), jnp.zeros((8, 2))))()
    with pytest.raises(fp8attn.UnsupportedError, match="float8_e5m2"):
        _call(k=k.astype(jnp.float8_e5m2))()


def test_value_checks():
    """R15: offsets and scales on request, on the host and under checkify."""
    from jax.experimental import checkify

    q, k, v = operands(8, 8)
    fp8attn.checks.mla_prefill(q, k, v, cu_seqlens_q=offsets(3, 5), q_scale=0.5)
    cases = {
        "cu_seqlens_q\\[1\\].*smaller": dict(cu_seqlens_q=offsets(3, -1)[1:]),
        "cu_seqlens_q\\[0\\].*negative": dict(cu_seqlens_q=offsets(3, first=-1)),
        "cu_seqlens_k\\[1\\].*larger than 8": dict(cu_seqlens_q=offsets(3), cu_seqlens_k=offsets(9)),
        "v_scale.*not a positive finite": dict(v_scale=jnp.float32(0)),
    }
    for message, arguments in cases.items():
        with pytest.raises(fp8attn.InvalidInputError, match=message):
            fp8attn.checks.mla_prefill(q, k, v, **arguments)
        checked = checkify.checkify(jax.jit(lambda a: fp8attn.checks.mla_prefill(q, k, v, **a)))
        assert checked(arguments)[0].get() is not None
    assert (
        checkify.checkify(jax.jit(lambda cu: fp8attn.checks.mla_prefill(q, k, v, cu_seqlens_q=cu)))(offsets(3, 5))[
            0
        ].get()
        is None
    )


def test_negative_controls():
    """The bounds of this file reject what a broken kernel would give."""
    q, k, v = operands()
    kwargs = dict(cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K, **F32)
    want, lse = exact(q, k, v, **kwargs)
    wrong = {
        "zeros": jnp.zeros_like(want),
        "top-left alignment": exact(q, k, v, **kwargs | dict(causal=False))[0],
        "rope dropped": exact(q.at[..., 128:].set(0), k, v, **kwargs)[0],
        "uniform softmax": exact(q, k, v, **kwargs | dict(softmax_scale=0.0))[0],
        "scale twice": exact(q, k, v, **kwargs | dict(softmax_scale=1 / 192))[0],
        "heads swapped": want[:, ::-1],
        "keys shifted": exact(q, k, jnp.roll(v, 1, 0), **kwargs)[0],
    }
    for out in wrong.values():
        with pytest.raises(AssertionError):
            testing.assert_rows_close(out, want, 0.045, 0.03)
    for other in (lse / math.log(2), lse + 8 * math.log(2)):
        with pytest.raises(AssertionError):
            testing.assert_lse_close(other, lse, 1e-3 + 2**-9 * 5)


@pytest.mark.slow
def test_ten_thousand_random_cases():
    """R2: finite inputs never give NaN, whatever the offsets, scales and magnitudes; 10 000 cases."""
    rng = np.random.default_rng(7)
    n, tokens, keys, heads, sequences = 50, 24, 40, 2, 4

    @jax.jit
    @jax.vmap
    def f(q, k, v, cu_q, cu_k, scale):
        causal = fp8attn.mla_prefill(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, v_scale=scale, **F32)
        return causal, fp8attn.mla_prefill(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=False, output_quant=SPECS[-1]
        )

    for _ in range(100):
        size = 10.0 ** rng.uniform(-3, 3, (n, 1, 1, 1))
        q, k, v = (
            jnp.asarray(rng.standard_normal((n, s, heads, d)) * size, jnp.bfloat16)
            for s, d in ((tokens, 192), (keys, 192), (keys, 128))
        )
        cu_q, cu_k = (jnp.asarray(rng.integers(-3, s + 4, (n, sequences + 1)), jnp.int32) for s in (tokens, keys))
        (out, lse), quantised = f(q, k, v, cu_q, cu_k, jnp.asarray(10.0 ** rng.uniform(-2, 2, n), jnp.float32))
        assert (
            np.isfinite(np.asarray(out)).all()
            and not np.isnan(np.asarray(lse)).any()
            and not np.isposinf(np.asarray(lse)).any()
        )
        assert not (testing.fp8_bytes(quantised.values) & 0x7F == 0x7F).any()
        assert ((np.asarray(out) == 0).all(-1) | np.isfinite(np.moveaxis(np.asarray(lse), 1, 2))).all()
