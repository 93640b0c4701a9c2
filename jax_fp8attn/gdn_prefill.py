"""``gdn_prefill``: gated delta net over packed sequences, and the same with packed inputs and a pool of states."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from jax_fp8attn import checks, dispatch, offsets
from jax_fp8attn.folding import broadcast_instances, merge_axes, unfold_axis
from jax_fp8attn.partition import ALL, Heads
from jax_fp8attn.problems import (
    GDN_CHUNK,
    GdnArrays,
    GdnPoolArrays,
    GdnPoolProblem,
    GdnProblem,
    gdn_max_chunks,
)

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)

StateLayout = Literal["vk", "kv"]
Transition = tuple[jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GdnMetadata:
    """What ``gdn_metadata`` found out about a batch; opaque. Good for every layer that runs on the same cu_seqlens."""

    start: jax.Array  # int32 [B]
    length: jax.Array  # int32 [B]
    chunk_sequence: jax.Array  # int32 [chunks]
    chunk_index: jax.Array  # int32 [chunks]
    total_tokens: int = dataclasses.field(metadata={"static": True})
    num_state_heads: int = dataclasses.field(metadata={"static": True})


jax.export.register_pytree_node_serialization(
    GdnMetadata,
    serialized_name="jax_fp8attn.GdnMetadata",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(text)),
)


def gdn_prefill(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    cu_seqlens: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = True,
    scale: float | jax.Array | None = None,
    gate: Literal["log", "alpha"] = "log",
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    state_layout: StateLayout = "vk",
    checkpoint_every: int = 0,
    precision: Literal["default", "high"] = "default",
    segments: Literal["auto"] | int = "auto",
    metadata: GdnMetadata | None = None,
    out_dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> Any:
    """Gated delta net over B sequences packed into T tokens. Each state head carries a matrix S [K, V]:

        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        a_t = exp(g_t)
        o_t = scale * S_t^T q_t

      q, k, v        [T, Hq, K], [T, Hk, K], [T, Hv, V], one dtype out of bf16, f16, f32; any K and V
      g, beta        [T, H] with H = max(Hq, Hv), f32 (bf16 and f16 are raised to it)
      heads          Hq = Hk and Hv a multiple: state head h reads q and k of head h // (Hv/Hk); or Hk = Hv and Hq a
                     multiple: state head h reads k and v of head h // (Hq/Hv)
      cu_seqlens     int32 [B+1], may be traced: sequence b owns the tokens cu_seqlens[b] to cu_seqlens[b+1]. Default:
                     one sequence. Pad B by repeating the last offset.
      initial_state  [B, H, V, K] (state_layout "kv": [B, H, K, V]), bf16, f16 or f32; default: zeros
      return_final_state   static; also return the state after the last token of each sequence
      scale          number or traced scalar, default K^-0.5; 0.0 means 0
      gate           "log": g is a natural logarithm, g <= 0. "alpha": g is a_t itself, 0 <= g <= 1.
      qk_l2norm      static; q and k are divided by sqrt(sum of squares + l2norm_eps), in float32 and not rounded after
      state_layout   "vk" or "kv", of initial state, final state and checkpoints
      checkpoint_every     m, a multiple of 64, or 0: also return the state after every m tokens of each sequence
      precision      "high" asks a GPU kernel for split operands; implementation "xla" is float32 throughout anyway
      segments       "auto", or the number of parts of a sequence of T tokens that a GPU kernel computes side by side,
                     parts of that length of a shorter one; "xla" needs none
      metadata       ``gdn_metadata(cu_seqlens, T, H)``, computed once for all layers; cu_seqlens is then not read
      out_dtype      bf16, f16 or f32, default the dtype of v. S is not normalised: a float16 ``o`` can overflow to inf.
      implementation None (fastest), a name, or names in order of preference

    Batched form: q [n, T, Hq, K] and so on hold n sequences of T tokens; initial and final state have n rows,
    checkpoints are [n, T // m, ...]. It excludes cu_seqlens and metadata.

    Returns ``o`` [T, H, V], then, as the static options ask:
      final state    [B, H, V, K] or [B, H, K, V], in the dtype of initial_state, or f32
      checkpoints    [T // m, H, V, K] or [T // m, H, K, V], same dtype: first all full intervals of sequence 0, then of
                     sequence 1 and so on (row of (b, j): sum over b' < b of len(b') // m, plus j); unused rows are 0.
                     Intervals are counted from the first token of the sequence; the state is kept in f32 and cast only
                     as it is stored.

    Edge cases, equal in every implementation
      * An empty sequence returns its initial state (or zeros). T = 0 and B = 0 are fine.
      * Rows of no sequence: o = 0, whatever the inputs hold there; nothing of them is read.
      * Offsets are clamped to 0..T and replaced by their running maximum: decreasing ones mean empty sequences.
      * A gate g <= -30 (a_t <= e^-30), -inf and a_t = 0 included, clears the state exactly; its gradient is 0.
        g > 0 and a_t outside 0..1 are the caller's error: undefined, in that sequence and head only.
      * NaN or inf in a sequence reaches rows of that sequence only (from the start of the chunk of 64 tokens that holds
        it) and, where each head has its own k and v, that head only.
      * beta is taken as it is: 0 only decays the state, up to 2 is stable for keys of norm <= 1.
      * The bits of a sequence do not depend on the other sequences of the batch.

    Accuracy: docs/numerics.md. Under jit offsets, lengths, states and scale change without a retrace. vmap folds into
    the token axis. Reverse-mode derivatives of o, final state and checkpoints with respect to q, k, v, g, beta,
    initial_state and scale: the backward pass recomputes the forward one, block by block, and saves only the inputs.
    """
    op = "gdn_prefill"
    options = _Options(
        gate=gate,
        qk_l2norm=qk_l2norm,
        l2norm_eps=l2norm_eps,
        state_layout=state_layout,
        checkpoint_every=checkpoint_every,
        precision=precision,
        segments=segments,
    )
    problem, arrays, batch = _split_call(op, _Tensors(q, k, v, g, beta), cu_seqlens, metadata, options)
    checks.flag(op, "return_final_state", return_final_state)
    problem = dataclasses.replace(
        problem,
        out_dtype=problem.dtype if out_dtype is None else checks.float_dtype(op, "out_dtype", out_dtype),
        return_final_state=bool(return_final_state),
    )
    if initial_state is not None:
        state = _initial_state(op, initial_state, problem)
        problem = dataclasses.replace(problem, state_dtype=np.dtype(state.dtype), has_initial_state=True)
        arrays = arrays._replace(initial_state=state)
    scale = checks.scalar(op, "scale", scale, problem.k_width**-0.5)
    arrays = arrays._replace(scale=jnp.broadcast_to(scale, (problem.instances,)))
    result = dispatch.call(OP, problem, arrays, implementation)
    if batch is None:
        return result
    parts = list(result) if isinstance(result, tuple) else [result]
    parts[0] = unfold_axis(parts[0], 0, batch)
    if checkpoint_every:
        parts[-1] = unfold_axis(parts[-1], 0, batch)
    return tuple(parts) if isinstance(result, tuple) else parts[0]


def gdn_prefill_pool(
    qkv: jax.Array,
    a: jax.Array,
    b: jax.Array,
    A_log: jax.Array,
    dt_bias: jax.Array,
    pool: jax.Array,
    slots: jax.Array,
    has_initial_state: jax.Array,
    *,
    cu_seqlens: jax.Array | None,
    num_q_heads: int,
    num_k_heads: int,
    num_v_heads: int,
    scale: float | jax.Array | None = None,
    qk_l2norm: bool = True,
    l2norm_eps: float = 1e-6,
    state_layout: StateLayout = "vk",
    checkpoint_every: int = 0,
    checkpoint_slots: jax.Array | None = None,
    write_slots: jax.Array | None = None,
    precision: Literal["default", "high"] = "default",
    segments: Literal["auto"] | int = "auto",
    metadata: GdnMetadata | None = None,
    out_dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> Any:
    """``gdn_prefill`` for a serving engine: the convolution's output as it is, and states in the rows of a pool.

      qkv            [T, Hq*K + Hk*K + Hv*V], bf16, f16 or f32: per token the heads of q, then of k, then of v
      a, b           [T, H], bf16, f16 or f32: g = -exp(A_log) * softplus(a + dt_bias), beta = sigmoid(b)
      A_log, dt_bias [H], bf16, f16 or f32
      pool           [P, H, V, K] (state_layout "kv": [P, H, K, V]), f32 or bf16
      slots          int32 [B]: the pool row of each sequence. Outside 0..P-1: start from zero and write nothing.
      has_initial_state    bool [B]: False starts from zero, whatever the row holds
      cu_seqlens     int32 [B+1]; None only beside metadata
      num_q_heads, num_k_heads, num_v_heads   static; K and V are read off the pool
      checkpoint_every     as in ``gdn_prefill``
      checkpoint_slots     int32 [T // checkpoint_every]: checkpoint row i goes to this row of the pool (outside 0..P-1:
                     nowhere) instead of a buffer of its own; slots of rows that hold no checkpoint are ignored
      write_slots    int32 [B], default ``slots``: the pool row that takes the final state; outside 0..P-1: none.
                     Then ``slots`` may repeat a row (a shared prefix).
      other options  as in ``gdn_prefill``; qk_l2norm is on by default

    Returns ``(o, pool)``, or ``(o, pool, checkpoints)`` with checkpoint_every and no checkpoint_slots: o [T, H, V] in
    the dtype of qkv, the updated pool, the checkpoints in the dtype of the pool. Donate the pool (``donate_argnums``)
    and it is updated in place; otherwise it is copied and the argument stays as it was.

    Precondition: written rows (write_slots, and checkpoint_slots in use) are distinct, and of the rows that sequences
    start from a sequence writes at most its own, as its final state. Otherwise the rows and sequences concerned are
    undefined; ``checks.gdn_prefill_pool`` tells.

    All rows are read before any is written. Rows that nothing is written to keep their bits. An empty sequence writes
    the state that it starts from. Everything else as in ``gdn_prefill``. vmap folds; its instances have pools of
    their own. No derivative: use ``gdn_prefill`` for training.
    """
    op = "gdn_prefill_pool"
    options = _Options(
        qk_l2norm=qk_l2norm,
        l2norm_eps=l2norm_eps,
        state_layout=state_layout,
        checkpoint_every=checkpoint_every,
        precision=precision,
        segments=segments,
    )
    _check_options(op, options)
    heads = (num_q_heads, num_k_heads, num_v_heads)
    packed = _Packed(qkv, a, b, A_log, dt_bias, pool)
    problem, packed = _pool_problem(op, packed, heads, options, out_dtype)
    start, length, *chunks = _sequences(op, cu_seqlens, metadata, problem.tokens, problem.split.heads)
    if cu_seqlens is None and metadata is None:
        raise checks.invalid(op, "cu_seqlens", "None", "int32 [B+1]", "One sequence is [0, T].")
    sequences = _count(start, length)
    slots = checks.array(op, "slots", slots, (sequences,), [jnp.int32], "One slot a sequence.")
    dtypes = (jnp.bool_, jnp.int32)
    starts = checks.array(op, "has_initial_state", has_initial_state, (sequences,), dtypes, "One flag a sequence.")
    if write_slots is not None:
        write_slots = checks.array(op, "write_slots", write_slots, (sequences,), [jnp.int32], "One slot a sequence.")
    problem = dataclasses.replace(problem, sequences=sequences, checkpoints_to_pool=checkpoint_slots is not None)
    arrays = GdnPoolArrays(
        qkv=packed.qkv,
        a=packed.a,
        b=packed.b,
        A_log=packed.A_log.astype(jnp.float32)[None],
        dt_bias=packed.dt_bias.astype(jnp.float32)[None],
        pool=packed.pool,
        slots=jnp.where(starts.astype(bool), slots, -1),
        write_slots=slots if write_slots is None else write_slots,
        checkpoint_slots=_checkpoint_slots(op, checkpoint_slots, problem.split),
        start=start,
        length=length,
        chunk_sequence=chunks[0],
        chunk_index=chunks[1],
        scale=checks.scalar(op, "scale", scale, problem.k_width**-0.5).reshape(1),
    )
    return dispatch.call(POOL_OP, problem, arrays, implementation)


def gdn_metadata(cu_seqlens: jax.Array, total_tokens: int, num_state_heads: int) -> GdnMetadata:
    """The chunks of a batch, computed once and passed to every layer's ``gdn_prefill`` as ``metadata``.

    cu_seqlens       int32 [B+1], may be traced; hostile offsets are made harmless as in ``gdn_prefill``
    total_tokens     static: T, the rows of q, k and v
    num_state_heads  static: H = max(Hq, Hv) of the layers

    A pytree: it may be an argument or a result of jitted functions.
    """
    op = "gdn_metadata"
    cu_seqlens = _cu_seqlens(op, cu_seqlens)
    for name, value, least in (("total_tokens", total_tokens, 0), ("num_state_heads", num_state_heads, 1)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise checks.invalid(op, name, checks.describe(value), f"an int >= {least}", "It is static.")
    tokens = int(total_tokens)
    return GdnMetadata(*_chunk_list(cu_seqlens, tokens), tokens, int(num_state_heads))


def gdn_transition(
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    cu_seqlens: jax.Array | None = None,
    gate: Literal["log", "alpha"] = "log",
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    precision: Literal["default", "high"] = "default",
    metadata: GdnMetadata | None = None,
    implementation: dispatch.Implementation = None,
) -> Transition:
    """What a run of tokens does to any state: S_out = M S_in + N. For context parallelism and prefix reuse.

    k, v, g, beta, cu_seqlens and the options (gate, qk_l2norm, l2norm_eps, precision, metadata, implementation) are
    those of ``gdn_prefill``; H is read off g. Batched form: [n, T, ...].

    Returns (M, N), float32 [B, H, K, K] and [B, H, K, V]: states are [K, V] here, state_layout "kv" of ``gdn_prefill``.
    An empty sequence has M = I, N = 0. A state S is itself the transition (0, S): ``gdn_combine((0, S), (M, N))`` is
    (0, M S + N). Differentiable and foldable like ``gdn_prefill``.
    """
    op = "gdn_transition"
    options = _Options(gate=gate, qk_l2norm=qk_l2norm, l2norm_eps=l2norm_eps, precision=precision, state_layout="kv")
    problem, arrays, _ = _split_call(op, _Tensors(None, k, v, g, beta), cu_seqlens, metadata, options)
    return dispatch.call(OP, dataclasses.replace(problem, transition=True), arrays, implementation)


def gdn_combine(a: Transition, b: Transition) -> Transition:
    """The transition of run ``a`` followed by run ``b``: (Mb Ma, Mb Na + Nb), float32.

    a, b: (M [..., K, K], N [..., K, V]) of ``gdn_transition``; leading axes broadcast. Associative: with states stacked
    along the leading axis it is the operator of ``jax.lax.associative_scan``.
    """
    op = "gdn_combine"
    for name, pair in (("a", a), ("b", b)):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise checks.invalid(op, name, checks.describe(pair), "a pair (M, N)")
        m, n = (getattr(x, "shape", ()) for x in pair)
        if len(m) < 2 or len(n) < 2 or m[-1] != m[-2] or n[-2] != m[-1]:
            raise checks.invalid(
                op, name, f"({', '.join(map(checks.describe, pair))})", "(M [..., K, K], N [..., K, V])"
            )
    if a[1].shape[-2:] != b[1].shape[-2:]:
        raise checks.invalid(op, "b[1]", checks.describe(b[1]), f"the widths {list(a[1].shape[-2:])} of a[1]")
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return matmul(b[0], a[0]), matmul(b[0], a[1]) + b[1]


class _Tensors(NamedTuple):
    q: Any
    k: Any
    v: Any
    g: Any
    beta: Any


class _Packed(NamedTuple):
    qkv: Any
    a: Any
    b: Any
    A_log: Any
    dt_bias: Any
    pool: Any


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static options that the forms share, as given."""

    gate: Any = "log"
    qk_l2norm: Any = False
    l2norm_eps: Any = 1e-6
    state_layout: Any = "vk"
    checkpoint_every: Any = 0
    precision: Any = "default"
    segments: Any = "auto"

    def fields(self, *without: str) -> dict[str, Any]:
        """As fields of a problem."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in without}
        values["segments"] = 0 if self.segments == "auto" else int(self.segments)
        return values


def _check_options(op: str, options: _Options) -> None:
    checks.option(op, "gate", options.gate, ("log", "alpha"))
    checks.option(op, "state_layout", options.state_layout, ("vk", "kv"))
    checks.option(op, "precision", options.precision, ("default", "high"))
    checks.flag(op, "qk_l2norm", options.qk_l2norm)
    eps, every, segments = options.l2norm_eps, options.checkpoint_every, options.segments
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not 0 < eps < np.inf:
        raise checks.invalid(op, "l2norm_eps", checks.describe(eps), "a positive finite number", "It is static.")
    if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 0 or every % GDN_CHUNK:
        expected = f"0 or a positive multiple of {GDN_CHUNK}"
        raise checks.invalid(op, "checkpoint_every", checks.describe(every), expected, "It is static.")
    counted = isinstance(segments, int | np.integer) and not isinstance(segments, bool) and segments >= 1
    if not counted and not (isinstance(segments, str) and segments == "auto"):
        raise checks.invalid(op, "segments", checks.describe(segments), "'auto' or an int >= 1")


def _check_heads(op: str, q: int, k: int, v: int) -> None:
    grouped_values = q == k and k > 0 and v > 0 and v % k == 0
    grouped_queries = k == v and k > 0 and q > 0 and q % k == 0
    if not grouped_values and not grouped_queries:
        expected = "Hq = Hk with Hv a multiple, or Hk = Hv with Hq a multiple, all at least 1"
        raise checks.invalid(op, "heads", f"Hq = {q}, Hk = {k}, Hv = {v}", expected)


def _split_call(
    op: str, tensors: _Tensors, cu_seqlens: Any, metadata: Any, options: _Options
) -> tuple[GdnProblem, GdnArrays, int | None]:
    """Checks and packs what ``gdn_prefill`` and ``gdn_transition`` share; the batch size of the batched form."""
    _check_options(op, options)
    pattern = "k" if tensors.q is None else "q"
    batched = getattr(getattr(tensors, pattern), "ndim", 0) == 4
    tensors, heads = _check_tensors(op, tensors, pattern, batched)
    batch = tensors.k.shape[0] if batched else None
    if batched:
        for name, value in (("cu_seqlens", cu_seqlens), ("metadata", metadata)):
            if value is not None:
                raise checks.invalid(op, name, f"given with batched {pattern} [n, T, H, K]", "None, or packed operands")
        cu_seqlens = jnp.arange(batch + 1, dtype=jnp.int32) * tensors.k.shape[1]
        tensors = _Tensors(*(None if x is None else merge_axes(x, 0) for x in tensors))
    tokens, k_heads, k_width = tensors.k.shape
    start, length, chunk_sequence, chunk_index = _sequences(op, cu_seqlens, metadata, tokens, tensors.g.shape[1])
    problem = GdnProblem(
        tokens=tokens,
        sequences=_count(start, length),
        q_heads=heads,
        k_heads=k_heads,
        v_heads=tensors.v.shape[1],
        k_width=k_width,
        v_width=tensors.v.shape[2],
        dtype=np.dtype(tensors.k.dtype),
        out_dtype=np.dtype(tensors.v.dtype),
        state_dtype=np.dtype(jnp.float32),
        instances=1 if batch is None else batch,
        **options.fields(),
    )
    arrays = GdnArrays(
        q=tensors.q,
        k=tensors.k,
        v=tensors.v,
        g=tensors.g.astype(jnp.float32),
        beta=tensors.beta.astype(jnp.float32),
        start=start,
        length=length,
        chunk_sequence=chunk_sequence,
        chunk_index=chunk_index,
        initial_state=None,
        scale=jnp.ones(problem.instances, jnp.float32),
    )
    return problem, arrays, batch


def _check_tensors(op: str, tensors: _Tensors, pattern: str, batched: bool) -> tuple[_Tensors, int]:
    """The tensors as arrays, and the number of query heads; ``pattern`` names the first tensor."""
    lead: tuple[Any, ...] = ("n", "T") if batched else ("T",)
    q, k, v, g, beta = tensors
    first = checks.array(op, pattern, getattr(tensors, pattern), (*lead, f"H{pattern}", "K"), FLOATS)
    lead, dtypes, alike = first.shape[:-2], [first.dtype], f"q, k and v must be alike; {pattern} is the pattern."
    if batched and not lead[0]:
        raise checks.invalid(op, pattern, checks.describe(first), "n >= 1 sequences")
    k = checks.array(op, "k", k, (*lead, "Hk", first.shape[-1]), dtypes, alike)
    v = checks.array(op, "v", v, (*lead, "Hv", "V"), dtypes, alike)
    if not k.shape[-1] or not v.shape[-1]:
        raise checks.invalid(op, "widths", f"K = {k.shape[-1]}, V = {v.shape[-1]}", "at least 1")
    k_heads, v_heads = k.shape[-2], v.shape[-2]
    if q is None:
        g = checks.array(op, "g", g, (*lead, "H"), FLOATS)
        q_heads = g.shape[-1] if k_heads == v_heads else k_heads
    else:
        q, q_heads = first, first.shape[-2]
    _check_heads(op, q_heads, k_heads, v_heads)
    gates = (*lead, max(q_heads, v_heads))
    remedy = f"One column a state head: H = max(Hq, Hv) = {gates[-1]}."
    g = checks.array(op, "g", g, gates, FLOATS, remedy)
    beta = checks.array(op, "beta", beta, gates, FLOATS, remedy)
    return _Tensors(q, k, v, g, beta), q_heads


def _initial_state(op: str, state: Any, problem: GdnProblem) -> jax.Array:
    shape = (problem.sequences, *problem.state_shape)
    remedy = "One state a sequence."
    if getattr(state, "shape", None) == (*shape[:2], shape[3], shape[2]) != shape:
        other = "kv" if problem.state_layout == "vk" else "vk"
        remedy = f"It looks like the other layout: pass state_layout={other!r}."
    return checks.array(op, "initial_state", state, shape, FLOATS, remedy)


def _cu_seqlens(op: str, x: Any) -> jax.Array:
    x = checks.array(op, "cu_seqlens", x, ("B+1",), [jnp.int32])
    if not x.shape[0]:
        raise checks.invalid(op, "cu_seqlens", "int32[0]", "int32 [B+1]", "No sequence at all is [0].")
    return x


def _sequences(op: str, cu_seqlens: Any, metadata: Any, tokens: int, heads: int) -> tuple[Any, Any, Any, Any]:
    """(start, length and the chunk list) of metadata, or the raw offsets and three times None."""
    if cu_seqlens is not None:
        cu_seqlens = _cu_seqlens(op, cu_seqlens)
    if metadata is None:
        return (jnp.array([0, tokens], jnp.int32) if cu_seqlens is None else cu_seqlens), None, None, None
    if not isinstance(metadata, GdnMetadata):
        raise checks.invalid(op, "metadata", type(metadata).__name__, "the result of gdn_metadata")
    if (metadata.total_tokens, metadata.num_state_heads) != (tokens, heads):
        came = f"for {metadata.total_tokens} tokens and {metadata.num_state_heads} state heads"
        raise checks.invalid(op, "metadata", came, f"T = {tokens} and H = {heads}")
    if cu_seqlens is not None and cu_seqlens.shape[0] != metadata.start.shape[0] + 1:
        came = f"for {metadata.start.shape[0]} sequences"
        raise checks.invalid(op, "metadata", came, f"{cu_seqlens.shape[0] - 1}, as cu_seqlens has")
    return metadata.start, metadata.length, metadata.chunk_sequence, metadata.chunk_index


def _count(start: jax.Array, length: jax.Array | None) -> int:
    """B, of raw offsets or of ranges."""
    return start.shape[0] - (length is None)


def _pool_problem(
    op: str, packed: _Packed, heads: tuple[Any, Any, Any], options: _Options, out_dtype: Any
) -> tuple[GdnPoolProblem, _Packed]:
    for name, value in zip(("num_q_heads", "num_k_heads", "num_v_heads"), heads, strict=True):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise checks.invalid(op, name, checks.describe(value), "an int", "It is static.")
    q_heads, k_heads, v_heads = map(int, heads)
    _check_heads(op, q_heads, k_heads, v_heads)
    state_heads = max(q_heads, v_heads)
    layout = ("V", "K") if options.state_layout == "vk" else ("K", "V")
    pool = checks.array(op, "pool", packed.pool, ("P", state_heads, *layout), (jnp.float32, jnp.bfloat16))
    if not pool.size:
        raise checks.invalid(op, "pool", checks.describe(pool), "at least one row, K and V at least 1")
    widths = dict(zip(layout, pool.shape[2:], strict=True))
    k_width, v_width = widths["K"], widths["V"]
    columns = (q_heads + k_heads) * k_width + v_heads * v_width
    remedy = f"(Hq + Hk)*K + Hv*V columns, with K = {k_width} and V = {v_width} of the pool."
    qkv = checks.array(op, "qkv", packed.qkv, ("T", columns), FLOATS, remedy)
    tokens = qkv.shape[0]
    per_token = [checks.array(op, n, x, (tokens, state_heads), FLOATS) for n, x in (("a", packed.a), ("b", packed.b))]
    per_head = [checks.array(op, n, getattr(packed, n), (state_heads,), FLOATS) for n in ("A_log", "dt_bias")]
    problem = GdnPoolProblem(
        tokens=tokens,
        sequences=0,
        q_heads=q_heads,
        k_heads=k_heads,
        v_heads=v_heads,
        k_width=k_width,
        v_width=v_width,
        pool_rows=pool.shape[0],
        dtype=np.dtype(qkv.dtype),
        out_dtype=np.dtype(qkv.dtype) if out_dtype is None else checks.float_dtype(op, "out_dtype", out_dtype),
        state_dtype=np.dtype(pool.dtype),
        **options.fields("gate"),
    )
    return problem, _Packed(qkv, *per_token, *per_head, pool)


def _checkpoint_slots(op: str, slots: Any, problem: GdnProblem) -> jax.Array | None:
    if slots is None:
        return None
    if not problem.checkpoint_every:
        raise checks.invalid(op, "checkpoint_slots", "given without checkpoint_every", "None, or both")
    remedy = "One slot a checkpoint: T // checkpoint_every."
    return checks.array(op, "checkpoint_slots", slots, (problem.checkpoints,), [jnp.int32], remedy)


def _chunk_list(cu_seqlens: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    start, length = offsets.ranges(cu_seqlens, tokens)
    return start, length, *_chunks(length, tokens)


def _chunks(length: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """int32 [max_chunks]: the sequence of each chunk (-1 past the last one), and its number within the sequence."""
    chunk = jnp.arange(gdn_max_chunks(tokens, length.shape[0]), dtype=jnp.int32)
    if not chunk.shape[0]:
        return chunk, chunk
    counts = -(-length // GDN_CHUNK)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    first = ends - counts
    # a chunk belongs to the last sequence that begins no later; empty ones begin where the next one does
    sequence = jnp.cumsum(jnp.zeros_like(chunk).at[first].add(1, mode="drop"), dtype=jnp.int32) - 1
    there = chunk < ends[-1]
    return jnp.where(there, sequence, -1), jnp.where(there, chunk - first[sequence], 0)


def _prepare(problem: GdnProblem | GdnPoolProblem, arrays: Any) -> Any:
    """Offsets become disjoint ranges and a list of chunks, unless metadata brought them."""
    if arrays.length is not None:
        return arrays
    start, length, sequence, index = _chunk_list(arrays.start, problem.tokens)
    return arrays._replace(start=start, length=length, chunk_sequence=sequence, chunk_index=index)


def _prepare_pool(problem: GdnPoolProblem, arrays: GdnPoolArrays) -> GdnPoolArrays:
    def valid(slots: jax.Array | None) -> jax.Array | None:
        return None if slots is None else jnp.where((slots >= 0) & (slots < problem.pool_rows), slots, -1)

    return _prepare(problem, arrays)._replace(
        slots=valid(arrays.slots),
        write_slots=valid(arrays.write_slots),
        checkpoint_slots=valid(arrays.checkpoint_slots),
    )


def _fold_arrays(problem: GdnProblem | GdnPoolProblem, arrays: Any, size: int, batched: Any) -> Any:
    """Tokens, sequences and pools of ``size`` instances stand one after the other."""
    arrays = broadcast_instances(arrays, batched, size)
    instance = jnp.arange(size, dtype=jnp.int32)[:, None]
    start = (arrays.start + instance * problem.tokens).reshape(-1)
    folded = type(arrays)(*(None if x is None else merge_axes(x, 0) for x in arrays))
    sequence, index = _chunks(folded.length, size * problem.tokens)
    folded = folded._replace(start=start, chunk_sequence=sequence, chunk_index=index)
    if isinstance(problem, GdnProblem):
        return folded

    def shifted(slots: jax.Array | None) -> jax.Array | None:
        return None if slots is None else jnp.where(slots >= 0, slots + instance * problem.pool_rows, -1).reshape(-1)

    return folded._replace(
        slots=shifted(arrays.slots),
        write_slots=shifted(arrays.write_slots),
        checkpoint_slots=shifted(arrays.checkpoint_slots),
    )


def _fold_problem(problem: Any, size: int) -> Any:
    names = ("tokens", "sequences", "instances", *(["pool_rows"] if isinstance(problem, GdnPoolProblem) else []))
    return dataclasses.replace(problem, **{name: size * getattr(problem, name) for name in names})


def _unfold(result: Any, size: int) -> Any:
    return jax.tree.map(lambda x: unfold_axis(x, 0, size), result)


def _fold(problem: Any, arrays: Any, size: int, batched: Any) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Every result begins with an axis of tokens, sequences, checkpoints or pool rows, instance by instance."""
    folded = _fold_arrays(problem, arrays, size, batched)
    return _fold_problem(problem, size), folded, functools.partial(_unfold, size=size)


def _backward(problem: GdnProblem, arrays: GdnArrays, cotangents: Any) -> GdnArrays:
    gradients = _vjp(problem)(arrays, cotangents)
    return GdnArrays(
        *(
            np.zeros(x.shape, jax.dtypes.float0) if gradient is None and x is not None else gradient
            for x, gradient in zip(arrays, gradients, strict=True)
        )
    )


def _vjp(problem: GdnProblem) -> Callable[[GdnArrays, Any], GdnArrays]:
    """The backward pass, whichever implementation went forward; vmap folds it as it folds the op."""
    from jax_fp8attn.xla import gdn_prefill as xla

    @custom_vmap
    def run(arrays: GdnArrays, cotangents: Any) -> GdnArrays:
        return xla.vjp(problem, arrays, cotangents)

    @run.def_vmap
    def _(size: int, batched: Any, arrays: GdnArrays, cotangents: Any) -> tuple[Any, Any]:
        if not size:
            empty = broadcast_instances(arrays, batched[0], 0).floats()
            return empty, jax.tree.map(lambda _: True, empty)
        folded = _fold_arrays(problem, arrays, size, batched[0])
        cotangents = jax.tree.map(lambda x: merge_axes(x, 0), broadcast_instances(cotangents, batched[1], size))
        result = _unfold(_vjp(_fold_problem(problem, size))(folded, cotangents), size)
        return result, jax.tree.map(lambda _: True, result)

    return run


def _heads(problem: GdnProblem) -> Heads:
    of_heads = ("q", "k", "v", "g", "beta", "initial_state")
    arrays = GdnArrays(**{name: 1 if name in of_heads else ALL for name in GdnArrays._fields})
    results = 2 if problem.transition else 1 + problem.return_final_state + bool(problem.checkpoint_every)
    return Heads(("q_heads", "k_heads", "v_heads"), arrays, (1,) * results)


OP = dispatch.Op("gdn_prefill", _prepare, _fold, _backward, heads=_heads)
POOL_OP = dispatch.Op("gdn_prefill_pool", _prepare_pool, _fold)
