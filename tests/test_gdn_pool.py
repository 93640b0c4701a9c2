"""The contract of gdn_prefill_pool: packed inputs, gates inside, states in the rows of a pool."""

import dataclasses
import functools
import re

import gdn_cases as cases
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gdn_cases import quick_jit
from implementations import PORTABLE, implementations, kernels
from jax import lax
from jax.experimental import checkify

import jax_fp8attn as fp8attn
from jax_fp8attn import InvalidInputError, UnsupportedError, checks, gdn_prefill, gdn_prefill_pool, testing
from jax_fp8attn.problems import GdnPoolProblem

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
KERNELS = kernels("gdn_prefill_pool")
IMPLEMENTATIONS = implementations("gdn_prefill_pool")
HEADS, WIDTHS = (2, 2, 6), (32, 48)
H = max(HEADS)
LENGTHS = (65, 0, 128, 1, 130, 20)
T, B, P = 400, len(LENGTHS), 9
F32 = 1e-5
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


@dataclasses.dataclass(frozen=True)
class PoolCase:
    """Arguments as float32 numpy, exactly representable in ``dtype`` (qkv, a, b) and ``pool_dtype``."""

    qkv: np.ndarray
    a: np.ndarray
    b: np.ndarray
    A_log: np.ndarray
    dt_bias: np.ndarray
    pool: np.ndarray  # [P, H, V, K]
    slots: np.ndarray
    has_initial_state: np.ndarray
    cu: np.ndarray
    write_slots: np.ndarray | None = None
    checkpoint_slots: np.ndarray | None = None
    dtype: str = "float32"
    pool_dtype: str = "float32"

    def replace(self, **changes):
        changes = {k: np.asarray(v, np.int32) if "slots" in k else v for k, v in changes.items()}
        return dataclasses.replace(self, **changes)

    def args(self, layout="vk"):
        low = lambda x, dtype: x.astype(getattr(ml_dtypes, dtype, None) or dtype)
        pool = np.ascontiguousarray(self.pool if layout == "vk" else self.pool.swapaxes(2, 3))
        packed = [low(x, self.dtype) for x in (self.qkv, self.a, self.b)]
        return (
            *packed,
            self.A_log,
            self.dt_bias,
            low(pool, self.pool_dtype),
            self.slots,
            self.has_initial_state,
            self.cu,
        )


@functools.cache
def pool_case(seed=0, dtype="float32", pool_dtype="float32"):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    columns = (HEADS[0] + HEADS[1]) * WIDTHS[0] + HEADS[2] * WIDTHS[1]
    return PoolCase(
        qkv=cases.rounded(normal(T, columns), dtype),
        a=cases.rounded(normal(T, H), dtype),
        b=cases.rounded(normal(T, H), dtype),
        A_log=0.5 * normal(H) - 2,
        dt_bias=normal(H),
        pool=cases.rounded(normal(P, H, WIDTHS[1], WIDTHS[0]), pool_dtype),
        slots=np.array([7, 3, 0, 5, 8, 2], np.int32),
        has_initial_state=np.array([1, 1, 0, 1, 1, 0], bool),
        cu=cases.offsets(*LENGTHS),
        dtype=dtype,
        pool_dtype=pool_dtype,
    )


@functools.cache
def compiled(implementation, jit=quick_jit, write=False, checkpoint_slots=False, **options):
    heads = dict(zip(("num_q_heads", "num_k_heads", "num_v_heads"), HEADS, strict=True))

    def function(qkv, a, b, A_log, dt_bias, pool, slots, starts, cu, write_slots, to):
        extra = dict(write_slots=write_slots) if write else {}
        extra |= dict(checkpoint_slots=to) if checkpoint_slots else {}
        return gdn_prefill_pool(
            *(qkv, a, b, A_log, dt_bias, pool, slots, starts),
            cu_seqlens=cu,
            implementation=implementation,
            **heads,
            **options,
            **extra,
        )

    return jit(function)


def fitted(case):
    """As kernels take it: bfloat16, heads of 128."""
    parts = [cases.wide(x).reshape(len(x), -1) for x in heads_of(case.qkv)]
    pool = cases.wide(np.swapaxes(cases.wide(case.pool), 2, 3)).swapaxes(2, 3)
    return case.replace(qkv=np.concatenate(parts, axis=1), pool=pool, dtype="bfloat16")


def heads_of(qkv):
    """q, k and v [T, H, width] of packed rows."""
    hq, hk, _ = HEADS
    parts = np.split(qkv, [hq * WIDTHS[0], (hq + hk) * WIDTHS[0]], axis=1)
    return [x.reshape(len(x), h, -1) for x, h in zip(parts, HEADS, strict=True)]


def lowered(case):
    """What kernels see of a case in float32."""
    low = {name: cases.rounded(getattr(case, name), "bfloat16") for name in ("qkv", "a", "b")}
    return case.replace(**low, dtype="bfloat16")


def run(case, implementation="xla", **options):
    if implementation in KERNELS:
        case = fitted(case)
        options.setdefault("scale", WIDTHS[0] ** -0.5)
    function = compiled(
        implementation,
        write=case.write_slots is not None,
        checkpoint_slots=case.checkpoint_slots is not None,
        **options,
    )
    layout = options.get("state_layout", "vk")
    result = function(*case.args(layout), case.write_slots, case.checkpoint_slots)
    o, *states = jax.tree.map(np.asarray, result)
    states = [x if layout == "vk" else x.swapaxes(2, 3) for x in states]
    if implementation in KERNELS:
        o, states = o[..., : WIDTHS[1]], [x[..., : WIDTHS[1], : WIDTHS[0]] for x in states]
    return o, *states


def split_case(case):
    """The call on q, k, v, gates and gathered states, in float64."""
    hv, (k_width, v_width) = HEADS[2], WIDTHS
    q, k, v = heads_of(case.qkv)
    a, b, a_log, dt_bias = (x.astype(np.float64) for x in (case.a, case.b, case.A_log, case.dt_bias))
    with np.errstate(over="ignore"):
        g, beta = -np.exp(a_log) * np.logaddexp(a + dt_bias, 0), 1 / (1 + np.exp(-b))
    initial = np.zeros((len(case.slots), hv, k_width, v_width))
    for i, (slot, starts) in enumerate(zip(case.slots, case.has_initial_state, strict=True)):
        if starts and 0 <= slot < len(case.pool):
            initial[i] = case.pool[slot].swapaxes(1, 2)
    return cases.Case(q, k, v, g, beta, case.cu, initial)


def oracle(case, every=0, scale=None, eps=1e-6):
    """float64 (o, pool, checkpoints)."""
    o, final, checkpoints = cases.oracle(split_case(case), every=every, scale=scale, eps=eps)
    pool = case.pool.astype(np.float64)
    written = [(case.slots if case.write_slots is None else case.write_slots, final)]
    if case.checkpoint_slots is not None:
        used = sum((end - first) // every for first, end in cases.ranges(case.cu, len(case.qkv)))
        written.append((case.checkpoint_slots[:used], checkpoints))
    for slots, states in written:
        for slot, state in zip(slots, states, strict=False):
            if 0 <= slot < len(pool):
                pool[slot] = state.swapaxes(1, 2)
    return o, pool, checkpoints.swapaxes(2, 3)


def touched(case, every=0):
    """The rows that a call writes."""
    slots = [case.slots if case.write_slots is None else case.write_slots]
    if case.checkpoint_slots is not None:
        used = sum((end - first) // every for first, end in cases.ranges(case.cu, len(case.qkv)))
        slots.append(case.checkpoint_slots[:used])
    return np.isin(np.arange(len(case.pool)), np.concatenate(slots))


def check(case, implementation="xla", bound=F32, absolute=None, **options):
    every = options.get("checkpoint_every", 0)
    if implementation in KERNELS:
        case, bound, absolute = lowered(case), max(bound, 6e-3), absolute or (1e-2, 2e-3)
    got = run(case, implementation, **options)
    want = oracle(case, every, options.get("scale"), 1e-6 if options.get("qk_l2norm", True) else None)
    cases.assert_matches(got, want, case.cu, bound, absolute, "gdn_prefill_pool")
    kept = ~touched(case, every)
    testing.assert_bitwise_equal(got[1][kept], case.args()[5][kept], "untouched rows")
    return got


# right answers


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_oracle(seed, implementation):
    """R1, R4"""
    check(pool_case(seed), implementation)


def test_the_comparison_refuses_wrong_rows():
    """R1: negative controls: a state in the wrong row, a state not written, a start from another row."""
    case = pool_case()
    o, pool, _ = oracle(case)
    starts = oracle(case.replace(slots=case.slots[::-1]))
    for wrong in ((o, np.roll(pool, 1, axis=0)), (o, case.pool), (starts[0], pool), (0 * o, pool)):
        with pytest.raises(AssertionError):
            cases.assert_matches(wrong, (o, pool), case.cu, 6e-3, (1e-2, 2e-3))


SLOTS = {
    "none": [-1] * 6,
    "hostile": [INT_MIN, P, INT_MAX, -7, 8, 2_147_480_000],
    "ends": [0, 8, -1, P, 1, 7],
    "reversed": [2, 8, 5, 0, 3, 7],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_slots_outside_the_pool(slots, implementation):
    """R4: they start from zero and write nothing; o as usual."""
    check(pool_case().replace(slots=slots), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_write_slots(implementation):
    """Two sequences share the row they start from; one writes nothing."""
    case = pool_case().replace(slots=[4, 4, 4, -1, 1, P], write_slots=[0, 3, INT_MIN, 5, 1, 8])
    check(case.replace(has_initial_state=np.ones(B, bool)), implementation)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_rows_are_read_before_any_is_written(implementation):
    """Beyond the precondition of a kernel, here it is plain: a row that one sequence reads and another writes."""
    case = pool_case().replace(slots=[0, 1, 2, 3, 4, 5], write_slots=[5, 0, 1, 2, 3, 4])
    check(case.replace(has_initial_state=np.ones(B, bool)), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16")])
def test_low_precision_and_the_other_layout(dtype, implementation):
    """R1: a bfloat16 pool as [P, H, K, V], with checkpoints; untouched rows keep their bits."""
    if implementation in KERNELS and dtype == "float16":
        pytest.skip("no kernel for float16")
    case = pool_case(dtype=dtype, pool_dtype="bfloat16")
    got = check(case, implementation, 6e-3, (1e-2, 2e-3), state_layout="kv", checkpoint_every=64)
    assert [x.dtype for x in got] == [dtype, "bfloat16", "bfloat16"] and len(got[2]) == T // 64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpoints_into_the_pool(implementation):
    """Row i of the checkpoints goes to checkpoint_slots[i]; slots of rows without a checkpoint are ignored."""
    case = pool_case().replace(
        slots=[7, -1, 0, 5, 8, -1], write_slots=[7, -1, -1, 5, -1, -1], checkpoint_slots=[1, 2, INT_MAX, 3, 4, 6]
    )
    got = check(case, implementation, checkpoint_every=64)
    assert len(got) == 2
    testing.assert_bitwise_equal(got[1][6], case.pool[6])  # five checkpoints: the sixth slot is not in use


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_sequences_write_what_they_start_from(implementation):
    """R3"""
    case = pool_case().replace(cu=np.zeros(B + 1, np.int32))
    o, pool = run(case, implementation)
    want = case.pool.copy()
    want[case.slots[~case.has_initial_state]] = 0
    assert not o.any()
    testing.assert_bitwise_equal(pool, want)


HOSTILE = {
    "decreasing": [0, 300, 200, 350, 100, 380, 50],
    "too large": [0, 100, 2_000_000_000, 300, INT_MAX, 350, 401],
    "negative": [INT_MIN, -5, 100, -1, 300, 301, 302],
    "late start": [7, 70, 200, 300, 350, 360, 399],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cu", HOSTILE.values(), ids=HOSTILE)
def test_hostile_offsets(cu, implementation):
    """R4"""
    check(pool_case().replace(cu=np.array(cu, np.int32)), implementation)


def test_no_tokens():
    """R3"""
    case = pool_case()
    empty = case.replace(qkv=case.qkv[:0], a=case.a[:0], b=case.b[:0])
    o, pool = run(empty)
    assert o.shape == (0, H, 48)
    testing.assert_bitwise_equal(pool, run(case.replace(cu=np.zeros(B + 1, np.int32)))[1])


# packed inputs and gates


@pytest.mark.parametrize("implementation", PORTABLE)
def test_equal_to_the_explicit_composition(implementation):
    """Gates by hand, q and k normalised in the op, states gathered and scattered by hand; bfloat16 inputs."""
    case = pool_case(dtype="bfloat16")
    o, pool = run(case, implementation)
    split = split_case(case)
    q, k, v = (x.astype(jnp.bfloat16) for x in (split.q, split.k, split.v))
    g, beta = split.g.astype(np.float32), split.beta.astype(np.float32)
    state = split.initial.swapaxes(2, 3).astype(np.float32)
    function = quick_jit(functools.partial(gdn_prefill, qk_l2norm=True, implementation=implementation))
    want, final = function(q, k, v, g, beta, cu_seqlens=case.cu, initial_state=state)
    testing.assert_relative_error(o, want, 1e-4)
    testing.assert_relative_error(pool[case.slots], final, F32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_extreme_gate_inputs(implementation):
    """softplus and sigmoid at +-100 and at infinity: forgotten at once, never, or nothing learned."""
    case = pool_case()
    a, b = case.a.copy(), case.b.copy()
    a[::7], a[3::7], a[5::21] = 100, -100, np.inf
    b[::5], b[2::5] = 100, -100
    check(case.replace(a=a, b=b, A_log=np.array([-2, 0, 3, -5, -1, -2], np.float32)), implementation)


@pytest.mark.parametrize("implementation", PORTABLE)
def test_options_reach_the_split_form(implementation):
    """scale 0.5, float32 output of bfloat16 inputs, no normalisation, integer flags."""
    case = pool_case(dtype="bfloat16")
    case = case.replace(
        qkv=cases.rounded(0.1 * case.qkv, "bfloat16"), has_initial_state=np.arange(B, dtype=np.int32) % 3
    )
    options = dict(scale=0.5, qk_l2norm=False, out_dtype=jnp.float32, precision="high", segments=2)
    assert check(case, implementation, **options)[0].dtype == np.float32


def test_metadata_stands_for_the_offsets():
    case = pool_case()
    metadata = fp8attn.gdn_metadata(case.cu, T, H)
    heads = dict(num_q_heads=2, num_k_heads=2, num_v_heads=6)
    function = quick_jit(lambda metadata, *x: gdn_prefill_pool(*x, cu_seqlens=None, metadata=metadata, **heads))
    testing.assert_bitwise_equal(list(function(metadata, *case.args()[:8])), list(run(case)))


# dirty memory


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_changes_no_bit(poison, implementation):
    """R6: rows past the last offset, pool rows of no sequence, pool rows of sequences that start from zero."""
    clean = pool_case().replace(cu=cases.offsets(*LENGTHS) + 3)
    outside = (np.arange(T) < 3) | (np.arange(T) >= clean.cu[-1])
    spoil = lambda x: np.where(outside[:, None], np.float32(poison), x)
    unused = ~np.isin(np.arange(P), clean.slots[clean.has_initial_state])
    pool = np.where(unused[:, None, None, None], np.float32(poison), clean.pool)
    dirty = clean.replace(qkv=spoil(clean.qkv), a=spoil(clean.a), b=spoil(clean.b), pool=pool)
    want, got = run(clean, implementation), run(dirty, implementation)
    testing.assert_bitwise_equal(got[0], want[0])
    written = touched(clean)
    testing.assert_bitwise_equal(got[1][written], want[1][written])
    testing.assert_bitwise_equal(got[1][~written], pool[~written])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_sequence(implementation):
    """R6"""
    clean = pool_case()
    qkv, pool = clean.qkv.copy(), clean.pool.copy()
    qkv[clean.cu[2]] = np.nan
    pool[clean.slots[3]] = np.nan
    want, got = run(clean, implementation), run(clean.replace(qkv=qkv, pool=pool), implementation)
    rows = np.ones(T, bool)
    rows[clean.cu[2] : clean.cu[4]] = False
    testing.assert_bitwise_equal(got[0][rows], want[0][rows])
    others = ~np.isin(np.arange(P), clean.slots[[2, 3]])
    testing.assert_bitwise_equal(got[1][others], want[1][others])
    assert np.isnan(got[1][clean.slots[[2, 3]]]).all()


# in place


def layout_of(pool):
    names = {"float32": "f32", "bfloat16": "bf16"}
    return re.escape(f"{names[pool.dtype.name]}[{','.join(map(str, pool.shape))}]")


@pytest.mark.parametrize("pool_dtype", ["float32", "bfloat16"])
def test_a_donated_pool_is_updated_in_place(pool_dtype):
    """R19: the compiled program aliases the pool and copies it nowhere; without donation the argument stays."""
    case = pool_case(pool_dtype=pool_dtype)
    function = compiled("xla").__wrapped__
    args = (*case.args(), None, None)
    donating = quick_jit(function, donate_argnums=5)
    program = donating.lower(*args).compile().as_text()
    assert re.search(r"input_output_alias=\{ \{1\}: \(5, \{\}", program)
    pattern = rf"= {layout_of(args[5])}\S* (copy|convert|broadcast|copy-start)\("
    assert not re.search(pattern, program)
    kept = quick_jit(function)
    assert re.search(pattern, kept.lower(*args).compile().as_text())  # the pattern can find a copy

    plain = kept(*args)
    fresh = jax.jit(lambda x: x + 0)  # a buffer of jax's own that no numpy array looks at: others are not donated
    pool = fresh(args[5])
    place = pool.unsafe_buffer_pointer()
    kept(*args[:5], pool, *args[6:])
    assert not pool.is_deleted()
    inside = donating(*args[:5], pool, *args[6:])
    assert pool.is_deleted() and inside[1].unsafe_buffer_pointer() == place
    testing.assert_bitwise_equal(inside, plain)
    again = donating(*args[:5], fresh(args[5]), *args[6:])
    testing.assert_bitwise_equal(again, plain)


def test_scan_over_chunks_of_the_prompts():
    """R9, R16: the pool as the carry of a scan over two halves of every prompt; equal to one call."""
    case = pool_case().replace(cu=cases.offsets(64, 0, 128, 64, 0, 64), has_initial_state=np.ones(B, bool))
    spans = cases.ranges(case.cu, T)
    rows = [
        np.concatenate([np.arange(f + h * (e - f) // 2, f + (h + 1) * (e - f) // 2) for f, e in spans]) for h in (0, 1)
    ]
    qkv, a, b, a_log, dt_bias, pool, slots, starts, _ = case.args()
    function = compiled("xla").__wrapped__

    def step(pool, chunk):
        o, pool = function(*chunk, a_log, dt_bias, pool, slots, starts, case.cu // 2, None, None)
        return pool, o

    final, o = quick_jit(lambda pool, chunks: lax.scan(step, pool, chunks))(
        pool, [np.stack([x[r] for r in rows]) for x in (qkv, a, b)]
    )
    want = oracle(case)
    testing.assert_relative_error(final, want[1], F32)
    for half in (0, 1):
        testing.assert_relative_error(o[half], want[0][rows[half]], F32)


# transformations


def test_eager_calls_and_one_trace():
    """R16: slots, flags and offsets change without a retrace."""
    case, traces = pool_case(), []
    function = compiled("xla").__wrapped__

    @jax.jit
    def counted(*args):
        traces.append(1)
        return function(*args, None, None)

    for other in (case, case.replace(slots=case.slots[::-1]), case.replace(cu=case.cu * 0), pool_case(1)):
        counted.trace(*other.args())
    assert len(traces) == 1


@pytest.mark.parametrize("batched", ["all", "one pool for all", slow("pool only")])
def test_vmap_equals_a_loop(batched):
    """R16: every instance has a pool of its own, also when one is given for all; bad slots stay bad."""
    sets = [
        pool_case(0).replace(slots=[7, 3, 0, INT_MIN, 8, P]),
        pool_case(1).replace(slots=[-1, P + 2, INT_MAX, 1, 0, 8], cu=case_offsets()),
    ]
    stacked = [np.stack(x) for x in zip(*(case.args() for case in sets), strict=True)]
    alone = {"all": (), "one pool for all": (5,), "pool only": tuple(i for i in range(9) if i != 5)}[batched]
    axes = tuple(None if i in alone else 0 for i in range(9))
    function = compiled("xla").__wrapped__
    vmapped = jax.vmap(lambda *x: function(*x, None, None), in_axes=axes)
    got = quick_jit(vmapped)(*[x[0] if i in alone else x for i, x in enumerate(stacked)])
    for n in (0, 1):
        one = compiled("xla")(*[x[0] if i in alone else x[n] for i, x in enumerate(stacked)], None, None)
        for folded, want in zip(got, one, strict=True):  # two compilations: equal up to the last bits
            testing.assert_relative_error(folded[n], want, 1e-6)


def case_offsets():
    return cases.offsets(1, 64, 100, 0, 63, 10)


def test_export_round_trip():
    """R16"""
    case = pool_case()
    function = lambda *x: compiled("xla").__wrapped__(*x, None, None)
    exported = jax.export.export(jax.jit(function, donate_argnums=5), platforms=["cpu", "cuda"])(*case.args())
    o, pool = jax.export.deserialize(exported.serialize()).call(*map(jnp.asarray, case.args()))
    cases.assert_matches((o, pool), oracle(case), case.cu, F32)


def test_derivatives_are_refused():
    """R16: one clear error."""
    case = pool_case()
    args = list(case.args())

    def loss(qkv):
        return compiled("reference").__wrapped__(qkv, *args[1:], None, None)[0].sum()

    with pytest.raises(UnsupportedError, match="gdn_prefill_pool has no derivative"):
        jax.grad(loss)(args[0])


def test_selection():
    """R14"""
    case = pool_case()
    heads = dict(num_q_heads=2, num_k_heads=2, num_v_heads=6)
    explanation = fp8attn.explain("gdn_prefill_pool", *case.args()[:8], cu_seqlens=case.cu, **heads)
    assert explanation.taken == "xla" and isinstance(explanation.problem, GdnPoolProblem)
    assert [row.name for row in explanation.rows] == ["pallas", "xla", "reference"]
    with pytest.raises(UnsupportedError, match="needs cuda"):
        gdn_prefill_pool(*case.args()[:8], cu_seqlens=case.cu, **heads, implementation="pallas")


def test_a_pool_of_more_than_2_to_the_31_elements():
    """R5: 4096 x 32 x 128 x 128 is exactly 2^31; compiled in place, with nothing of its size allocated."""
    shape = lambda *s, dtype="float32": jax.ShapeDtypeStruct(s, dtype)
    heads = dict(num_q_heads=32, num_k_heads=32, num_v_heads=32)
    args = [shape(64, 96 * 128, dtype="bfloat16"), shape(64, 32), shape(64, 32), shape(32), shape(32)]
    args += [shape(4097, 32, 128, 128, dtype="bfloat16"), shape(1, dtype="int32"), shape(1, dtype="bool")]
    function = lambda cu, *x: gdn_prefill_pool(*x, cu_seqlens=cu, **heads)
    compiled = quick_jit(function, donate_argnums=6).lower(shape(2, dtype="int32"), *args).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 2**32 and memory.temp_size_in_bytes < 2**28


# bad input


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


NAMES = ("qkv", "a", "b", "A_log", "dt_bias", "pool", "slots", "has_initial_state", "cu_seqlens")
I32 = np.int32
META = functools.partial(fp8attn.gdn_metadata, cases.offsets(*LENGTHS))
BAD_INPUT = {
    "qkv columns": (dict(qkv=zeros(T, 415)), "qkv"),
    "qkv rank": (dict(qkv=zeros(T, 10, 32)), "qkv"),
    "qkv dtype": (dict(qkv=zeros(T, 416, dtype=np.int8)), "qkv"),
    "qkv list": (dict(qkv=[[0.0]]), "qkv"),
    "a tokens": (dict(a=zeros(T - 1, H)), "a"),
    "a heads": (dict(a=zeros(T, 2)), "a"),
    "b rank": (dict(b=zeros(T)), "b"),
    "b dtype": (dict(b=zeros(T, H, dtype=bool)), "b"),
    "A_log heads": (dict(A_log=zeros(2)), "A_log"),
    "dt_bias rank": (dict(dt_bias=zeros(1, H)), "dt_bias"),
    "dt_bias number": (dict(dt_bias=0.0), "dt_bias"),
    "pool rank": (dict(pool=zeros(P, H, 1536)), "pool"),
    "pool heads": (dict(pool=zeros(P, 2, 48, 32)), "pool"),
    "pool dtype": (dict(pool=zeros(P, H, 48, 32, dtype=np.float16)), "pool"),
    "pool empty": (dict(pool=zeros(0, H, 48, 32)), "pool"),
    "slots count": (dict(slots=zeros(B - 1, dtype=I32)), "slots"),
    "slots dtype": (dict(slots=zeros(B, dtype=np.int64)), "slots"),
    "slots float": (dict(slots=zeros(B)), "slots"),
    "flags count": (dict(has_initial_state=zeros(B + 1, dtype=bool)), "has_initial_state"),
    "flags float": (dict(has_initial_state=zeros(B)), "has_initial_state"),
    "flags missing": (dict(has_initial_state=None), "has_initial_state"),
    "write_slots count": (dict(write_slots=zeros(1, dtype=I32)), "write_slots"),
    "cu missing": (dict(cu_seqlens=None), "cu_seqlens"),
    "cu rank": (dict(cu_seqlens=zeros(2, 2, dtype=I32)), "cu_seqlens"),
    "cu empty": (dict(cu_seqlens=zeros(0, dtype=I32)), "cu_seqlens"),
    "heads text": (dict(num_q_heads="2"), "num_q_heads"),
    "heads traced": (dict(num_v_heads=jnp.array(6)), "num_v_heads"),
    "heads zero": (dict(num_k_heads=0), "heads"),
    "heads odd": (dict(num_v_heads=3), "heads"),
    "heads both": (dict(num_q_heads=8), "heads"),
    "interval": (dict(checkpoint_every=65), "checkpoint_every"),
    "checkpoint_slots alone": (dict(checkpoint_slots=zeros(6, dtype=I32)), "checkpoint_slots"),
    "checkpoint_slots count": (
        dict(checkpoint_slots=zeros(5, dtype=I32), checkpoint_every=64),
        "checkpoint_slots",
    ),
    "l2norm": (dict(qk_l2norm=None), "qk_l2norm"),
    "eps": (dict(l2norm_eps=-1e-6), "l2norm_eps"),
    "layout": (dict(state_layout="nv"), "state_layout"),
    "precision": (dict(precision=None), "precision"),
    "segments": (dict(segments=1.5), "segments"),
    "scale": (dict(scale=zeros(4)), "scale"),
    "out_dtype": (dict(out_dtype=jnp.float8_e4m3fn), "out_dtype"),
    "metadata": (dict(metadata=1), "metadata"),
    "metadata tokens": (dict(metadata=lambda: META(T + 1, H)), "metadata"),
    "metadata heads": (dict(metadata=lambda: META(T, 2)), "metadata"),
    "implementation": (dict(implementation=()), "implementation"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name):
    """R15: refused while tracing; the message names the argument and what was expected."""
    changes, word = BAD_INPUT[name]
    changes = {k: v() if callable(v) and k == "metadata" else v for k, v in changes.items()}
    named = dict(zip(NAMES, pool_case().args(), strict=True)) | dict(num_q_heads=2, num_k_heads=2, num_v_heads=6)
    with pytest.raises(InvalidInputError, match="expected") as error:
        gdn_prefill_pool(**(named | changes))
    assert word in str(error.value) and "gdn_prefill_pool" in str(error.value)


def value_checks(case, **options):
    names = dict(zip(NAMES, case.args(), strict=True))
    checks.gdn_prefill_pool(**names, write_slots=case.write_slots, checkpoint_slots=case.checkpoint_slots, **options)


def test_value_checks_on_the_host():
    """R4, R15: padding slots are fine, everything else is named with its position."""
    case = pool_case()
    value_checks(case)
    value_checks(case.replace(slots=[-1] * B))
    value_checks(case.replace(slots=[4] * B, write_slots=[0, 1, 2, 3, -1, 5]))
    faults = [
        (dict(slots=[7, 3, 9, 5, 8, 2]), r"slots\[2\] is neither -1 nor one of the 9 rows"),
        (dict(slots=[7, 3, -2, 5, 8, 2]), r"slots\[2\] is neither -1"),
        (dict(slots=[7, 3, 0, 7, 8, 2]), r"slots\[3\] is written by an earlier sequence"),
        (dict(write_slots=[7, 3, 0, 5, 12, 2]), r"write_slots\[4\] is neither -1"),
        (dict(write_slots=[7, 3, 0, 5, 5, 2]), r"write_slots\[4\] is written by an earlier"),
        (dict(write_slots=[6, 7, 0, 5, 8, 2]), r"write_slots\[1\] is a row that another sequence starts from"),
        (dict(cu=np.array([0, 65, 64, 193, 194, 324, 344], np.int32)), r"cu_seqlens\[2\] is smaller"),
    ]
    for changes, message in faults:
        with pytest.raises(InvalidInputError, match=message):
            value_checks(case.replace(**changes))
    case = case.replace(slots=[7, -1, 0, 5, 8, -1], checkpoint_slots=[1, 2, 3, 4, 6, 99])
    value_checks(case, checkpoint_every=64)  # the last slot is not in use
    for slots, message in (
        ([1, 2, 3, 4, 10, -1], r"checkpoint_slots\[4\] is neither"),
        ([1, 2, 1, 4, 6, -1], r"checkpoint_slots\[2\] is written by an earlier checkpoint"),
        ([1, 2, 3, 7, 6, -1], r"checkpoint_slots\[3\] is a row that a sequence starts from or ends in"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            value_checks(case.replace(checkpoint_slots=slots), checkpoint_every=64)


def test_value_checks_under_checkify():
    """R4, R15"""
    case = pool_case()
    checked = quick_jit(
        checkify.checkify(lambda slots, cu: value_checks(dataclasses.replace(case, slots=slots, cu=cu)))
    )
    assert checked(case.slots, case.cu)[0].get() is None
    assert "written by an earlier" in checked(np.array([7, 3, 0, 7, 8, 2], np.int32), case.cu)[0].get()
    assert "neither -1" in checked(np.array([7, 3, 0, 99, 8, 2], np.int32), case.cu)[0].get()
    assert "cu_seqlens" in checked(case.slots, case.cu[::-1].copy())[0].get()


@pytest.mark.slow
def test_random_cases():
    """R2, R4: slots, flags and lengths of every kind; no NaN, rows that no one writes keep their bits."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        cu = np.sort(rng.integers(-50, T + 50, B + 1)).astype(np.int32)
        slots = rng.permutation(np.arange(-4, P + 4))[:B]
        case = pool_case(int(rng.integers(0, 5))).replace(cu=cu, slots=slots, has_initial_state=rng.random(B) < 0.6)
        check(case, "xla")
