"""Tokens over devices: context-parallel forms of the ops, to be called inside ``jax.shard_map``.

Heads over devices need no function of their own: pass sharded arrays to the ops under ``jax.jit``, or call the ops
inside ``jax.shard_map`` (docs/sharding.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_fp8attn import checks, dispatch, offsets
from jax_fp8attn.folding import as_varying
from jax_fp8attn.gdn_prefill import StateLayout, gdn_combine, gdn_prefill, gdn_transition
from jax_fp8attn.merge import merge_attn_states_n
from jax_fp8attn.mla_prefill import Scalar, mla_prefill, resolved_compute
from jax_fp8attn.problems import Output
from jax_fp8attn.quantize import Fp8Array, Fp8PerTensor, Fp8Spec, align4, to_stored

AxisName = str | tuple[str, ...]
Keys = jax.Array | tuple[jax.Array, jax.Array]
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def mla_prefill_cp(
    q: jax.Array,
    k: Keys,
    v: jax.Array,
    *,
    axis_name: AxisName,
    cu_seqlens: jax.Array | None = None,
    causal: bool = True,
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    softmax_scale: Scalar = None,
    q_scale: Scalar = None,
    k_scale: Scalar = None,
    v_scale: Scalar = None,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    output_quant: Fp8Spec | None = None,
    return_lse: bool = False,
    out_dtype: Any = jnp.bfloat16,
    state_dtype: Any = jnp.float32,
    compute: Literal["fp8", "bf16"] | None = None,
    implementation: dispatch.Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """``mla_prefill`` of T = n*L tokens over the n devices of a mesh axis, L on each; inside ``jax.shard_map``.

    q, k, v        this device's L tokens: [L, H, 192], [L, H, 192] or the pair, [L, H, 128]
    axis_name      the mesh axis (or axes) that the tokens are sharded over
    cu_seqlens     int32 [B+1], traced, alike on all devices: offsets of the sequences in the T tokens; a sequence may
                   span any number of devices. Default: one sequence of T.
    layout         "contiguous": device r has the tokens r*L to (r+1)*L, as they come. "zigzag": the T tokens are cut
                   into 2n parts, and device r has parts r and 2n-1-r, one after the other (L even)
    initial_state  (out [L, H, 128], lse [H, L]) of this device's tokens
    state_dtype    dtype of the running partial result
    causal, scales, output_quant, return_lse, out_dtype, compute, implementation (softmax_scale, q_scale, k_scale,
                   v_scale)    as in ``mla_prefill``

    Returns ``out`` or ``(out, lse)`` of this device's L tokens, laid out as q is. FP8 scales are those of L tokens.

    Keys and values go round the ring of devices while what has come is computed; results are merged in the epilogue of
    each call, and the last call writes the quantised output. Under ``causal`` all devices work on zig-zag parts, so
    that each has the same amount; with layout "contiguous" half of the operands and results change places for that.
    With compute "fp8" operands are cast before they travel: a byte an element. Where a latent is much smaller than keys
    and values (DeepSeek: 576 numbers a token for all heads), ``jax.lax.all_gather`` of the latent, expanded by each
    device, moves less; that choice is the caller's.

    Rows, keys and offsets outside every sequence: as in ``mla_prefill``.
    """
    op = "mla_prefill_cp"
    checks.option(op, "layout", layout, ("contiguous", "zigzag"))
    for name, x in (("q", q), ("v", v)):
        if not checks.is_array(x) or x.ndim != 3:
            raise checks.invalid(op, name, checks.describe(x), "packed tokens [L, H, D]")
    if v.shape[0] != q.shape[0]:
        raise checks.invalid(op, "v", checks.describe(v), f"{q.shape[0]} tokens", "Keys are those of the same tokens.")
    if layout == "zigzag" and q.shape[0] % 2:
        raise checks.invalid(op, "q", checks.describe(q), "an even number of tokens a device with layout='zigzag'")
    common = {
        "softmax_scale": softmax_scale, "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale,
        "compute": resolved_compute(op, compute), "implementation": implementation,
    }  # fmt: skip
    last = {"output_quant": output_quant, "return_lse": return_lse, "out_dtype": out_dtype}
    ring = _Ring.over(op, axis_name, q.shape[0], causal, layout)
    cu_seqlens = _global_offsets(op, cu_seqlens, ring.devices * q.shape[0])
    if ring.devices == 1:
        given = {"cu_seqlens_q": cu_seqlens, "causal": causal, "initial_state": initial_state}
        return mla_prefill(q, k, v, **given, **common, **last)
    if common["compute"] == "fp8":
        q, k, v = _stored(q, q_scale), jax.tree.map(lambda x: _stored(x, k_scale), k), _stored(v, v_scale)
    operands = ring.to_parts((q, k, v))
    out, lse = _start(op, q, initial_state, state_dtype)
    state = ring.to_parts(out), jnp.swapaxes(ring.to_parts(lse.T), 1, 2)
    attend = functools.partial(mla_prefill, **common)
    walk = _walk_causal if causal else _walk_all
    return ring.from_parts(walk(ring, attend, cu_seqlens, operands, state, state_dtype, last))


def _stored(x: jax.Array, scale: Scalar) -> jax.Array:
    return to_stored(x, 1.0 if scale is None else jnp.asarray(scale, jnp.float32).reshape(()))


def _start(op: str, q: jax.Array, state: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The state before any key."""
    tokens, heads, _ = q.shape
    if state is None:
        return jnp.zeros((tokens, heads, 128), dtype), jnp.full((heads, tokens), -jnp.inf, jnp.float32)
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise checks.invalid(op, "initial_state", type(state).__name__, "a pair (out, lse)")
    out = checks.array(op, "initial_state[0] (out)", state[0], (tokens, heads, 128), FLOATS)
    return out.astype(dtype), checks.array(op, "initial_state[1] (lse)", state[1], (heads, tokens), [jnp.float32])


def _global_offsets(op: str, cu_seqlens: Any, tokens: int) -> jax.Array:
    if cu_seqlens is None:
        return jnp.array([0, tokens], jnp.int32)
    cu_seqlens = checks.array(op, "cu_seqlens", cu_seqlens, ("B+1",), [jnp.int32])
    if not cu_seqlens.shape[0]:
        raise checks.invalid(op, "cu_seqlens", "int32[0]", "int32 [B+1]", "No sequence at all is [0].")
    return offsets.monotone(cu_seqlens, tokens)


def _axis_size(op: str, axis_name: AxisName) -> int:
    try:
        return lax.axis_size(axis_name)
    except NameError:
        remedy = f"Call {op} inside jax.shard_map."
        raise checks.invalid(
            op, "axis_name", repr(axis_name), "a mesh axis of an enclosing shard_map", remedy
        ) from None


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Who has which tokens. All tokens are cut into parts, numbered in their order; a device has one or two of them,
    in slots.

    Two parts are those of a zig-zag: r and 2n-1-r. Where tokens came contiguous, even parts are in slot 0: to swap the
    halves of all devices takes two permutations then, and no copy that depends on the rank.
    """

    axis: AxisName
    devices: int
    rank: jax.Array
    tokens: int  # of a device
    slots: int
    swapped: bool  # came contiguous and is a zig-zag now

    @classmethod
    def over(cls, op: str, axis: AxisName, tokens: int, causal: bool, layout: str) -> _Ring:
        devices = _axis_size(op, axis)
        contiguous = layout == "contiguous"
        slots = 1 if contiguous and not causal else 2
        return cls(axis, devices, lax.axis_index(axis), tokens, slots, contiguous and causal)

    @property
    def part(self) -> int:
        """Rows of a slot; the second half of an odd number of tokens has one row less, and a row of padding."""
        return -(-self.tokens // self.slots)

    def slot(self, rank: jax.Array, late: jax.Array | int) -> jax.Array:
        """Where a device has its earlier (0) or later (1) part."""
        return late ^ (rank % 2) if self.swapped else jnp.asarray(late)

    def number(self, rank: jax.Array, slot: jax.Array | int) -> jax.Array:
        if self.slots == 1:
            return rank
        late = slot ^ (rank % 2) if self.swapped else slot
        return jnp.where(late == 1, 2 * self.devices - 1 - rank, rank)

    def offsets(self, cu_seqlens: jax.Array, rank: jax.Array, slot: jax.Array | int) -> jax.Array:
        """Of the sequences within one part."""
        number = self.number(rank, slot)
        pair, second = number // self.slots, number % self.slots
        rows = self.part - second * (self.slots * self.part - self.tokens)
        return jnp.clip(cu_seqlens - (pair * self.tokens + second * self.part), 0, rows)

    def send(self, x: Any, step: int = 1) -> Any:
        """What the device ``step`` places before this one has."""
        return self._permute(x, [(r, (r + step) % self.devices) for r in range(self.devices)])

    def _permute(self, x: Any, pairs: list[tuple[int, int]]) -> Any:
        def move(leaf: jax.Array) -> jax.Array:
            if leaf.dtype.itemsize > 1:
                return lax.ppermute(leaf, self.axis, pairs)
            moved = lax.ppermute(lax.bitcast_convert_type(leaf, jnp.uint8), self.axis, pairs)
            return lax.bitcast_convert_type(moved, leaf.dtype)

        return jax.tree.map(move, x)

    def _halves(self, back: bool) -> list[list[tuple[int, int]]]:
        """Where the first and the second half of each device go, and how they come back."""
        pairs = []
        for half in range(2):
            numbers = [2 * r + half for r in range(self.devices)]
            pairs.append([(r, min(n, 2 * self.devices - 1 - n)) for r, n in enumerate(numbers)])
        return [[(b, a) for a, b in half] for half in pairs] if back else pairs

    def to_parts(self, x: Any) -> Any:
        """[L, ...] -> [slots, part, ...]."""

        def cut(leaf: jax.Array) -> jax.Array:
            rows = self.slots * self.part
            leaf = jnp.pad(leaf, [(0, rows - self.tokens)] + [(0, 0)] * (leaf.ndim - 1)) if rows > self.tokens else leaf
            leaf = leaf.reshape(self.slots, self.part, *leaf.shape[1:])
            if not self.swapped:
                return leaf
            return jnp.stack([self._permute(leaf[half], pairs) for half, pairs in enumerate(self._halves(False))])

        return jax.tree.map(cut, x)

    def from_parts(self, result: Any) -> Any:
        """Results of slots * part tokens -> those of this device's tokens as they came."""
        if not self.swapped:
            return result
        out, *lse = result if isinstance(result, tuple) else (result,)
        lse = [self._back(x.T).T for x in lse]
        if isinstance(out, Fp8Array):
            scales = out.scales
            if not isinstance(out.spec, Fp8PerTensor):
                scales = self._scales_back(scales, out.spec.scale_layout)
            out = Fp8Array(self._back(out.values), scales, out.spec, self.tokens)
        else:
            out = self._back(out)
        return (out, *lse) if lse else out

    def _back(self, x: jax.Array) -> jax.Array:
        halves = x.reshape(2, self.part, *x.shape[1:])
        halves = [self._permute(halves[half], pairs) for half, pairs in enumerate(self._halves(True))]
        return jnp.concatenate(halves)[: self.tokens]

    def _scales_back(self, scales: jax.Array, layout: str) -> jax.Array:
        if layout == "row":
            return self._back(scales)
        scales = self._back(scales[:, : 2 * self.part].T).T
        return scales if layout == "col" else jnp.pad(scales, ((0, 0), (0, align4(self.tokens) - self.tokens)))


def _side_by_side(first: jax.Array, second: jax.Array, part: int, keys: bool = False) -> jax.Array:
    """The offsets of two parts, one after the other, as those of 2B+2 sequences: what lies between the parts belongs to
    two more, whose tokens see no keys and whose keys nobody sees."""
    second = second + part
    return jnp.concatenate([first, first[-1:] if keys else second[:1], second])


def _take(x: Any, slot: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, slot, 0, keepdims=False), x)


def _flat(x: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)


def _flat_state(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    out, lse = state
    return _flat(out), jnp.moveaxis(lse, 0, 1).reshape(lse.shape[1], -1)


def _walk_causal(
    ring: _Ring, attend: Callable[..., Any], cu_seqlens: jax.Array, operands: Any, state: Any, dtype: Any, last: Any
) -> Any:
    """Of two parts that are not the same, the later one sees all of the earlier one. Parts of this device come last."""
    q, *own = operands

    def add(state: Any, slot: jax.Array, keys: Any, rank: jax.Array, key_slot: jax.Array) -> Any:
        new = attend(
            _take(q, slot), *_take(keys, key_slot), causal=False, return_lse=True, out_dtype=dtype,
            cu_seqlens_q=ring.offsets(cu_seqlens, ring.rank, slot),
            cu_seqlens_k=ring.offsets(cu_seqlens, rank, key_slot), initial_state=_take(state, slot),
        )  # fmt: skip
        return tuple(
            lax.dynamic_update_index_in_dim(x, n.astype(x.dtype), slot, 0) for x, n in zip(state, new, strict=True)
        )

    def visit(step: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        keys, state = carry
        coming, rank = ring.send(keys), (ring.rank - step) % ring.devices
        state = add(state, late, keys, rank, ring.slot(rank, 0))
        beyond = (rank > ring.rank).astype(jnp.int32)  # then its late part comes before this device's late part
        return coming, add(state, ring.slot(ring.rank, beyond), keys, rank, ring.slot(rank, beyond))

    late = ring.slot(ring.rank, 1)
    coming = ring.send(own)
    state = add(state, late, own, ring.rank, ring.slot(ring.rank, 0))
    # a loop, so that programs do not grow with the devices; what is sent in its last step is not needed
    carry = as_varying((coming, state), (operands, state, cu_seqlens, ring.rank))
    _, state = lax.fori_loop(1, ring.devices, visit, carry)
    parts = [ring.offsets(cu_seqlens, ring.rank, slot) for slot in range(2)]
    return attend(
        *_flat(operands), causal=True, initial_state=_flat_state(state), **last,
        cu_seqlens_q=_side_by_side(*parts, ring.part),
        cu_seqlens_k=_side_by_side(*parts, ring.part, keys=True),
    )  # fmt: skip


def _walk_all(
    ring: _Ring, attend: Callable[..., Any], cu_seqlens: jax.Array, operands: Any, state: Any, dtype: Any, last: Any
) -> Any:
    """Every part sees every part, of two slots each both."""
    q, *coming = operands
    state = _flat_state(state)

    def of(rank: jax.Array, order: tuple[int, ...], keys: bool) -> jax.Array:
        parts = [ring.offsets(cu_seqlens, rank, slot) for slot in order]
        return parts[0] if len(parts) == 1 else _side_by_side(*parts, ring.part, keys)

    slots = tuple(range(ring.slots))
    for step in range(ring.devices):
        keys, rank = coming, (ring.rank - step) % ring.devices
        if step + 1 < ring.devices:
            coming = ring.send(keys)
        for order in [slots, slots[::-1]][: ring.slots]:
            final = step + 1 == ring.devices and order[-1] == 0
            ordered = keys if order == slots else jax.tree.map(lambda x: x[::-1], keys)
            options = last if final else {"return_lse": True, "out_dtype": dtype}
            state = attend(
                *_flat((q, *ordered)), causal=False, initial_state=state, **options,
                cu_seqlens_q=of(ring.rank, slots, False), cu_seqlens_k=of(rank, order, True),
            )  # fmt: skip
    return state


def gdn_prefill_cp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    axis_name: AxisName,
    cu_seqlens: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    return_final_state: bool = True,
    final_state: Literal["replicated", "local"] = "replicated",
    state_layout: StateLayout = "vk",
    gate: Literal["log", "alpha"] = "log",
    qk_l2norm: bool = False,
    l2norm_eps: float = 1e-6,
    precision: Literal["default", "high"] = "default",
    scale: float | jax.Array | None = None,
    out_dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> Any:
    """``gdn_prefill`` of T = n*L tokens over the n devices of a mesh axis, L on each; inside ``jax.shard_map``.

    q, k, v, g, beta  this device's tokens: device r has r*L to (r+1)*L
    axis_name         the mesh axis (or axes) that the tokens are sharded over
    cu_seqlens        int32 [B+1], traced, alike on all devices: offsets of the sequences in the T tokens; a sequence
                      may span any number of devices. Default: one sequence of T.
    initial_state     [B, H, V, K] or [B, H, K, V], alike on all devices
    final_state       "replicated": every device returns all B final states (an all-reduce of that size). "local": each
                      is on the device of the sequence's last token, and 0 elsewhere
    return_final_state, state_layout, gate, qk_l2norm, l2norm_eps, precision, scale, out_dtype, implementation    as in
                      ``gdn_prefill``

    Returns ``o`` [L, H, V] of this device's tokens, then the final states. No checkpoints: their intervals would
    straddle devices. Differentiable as ``gdn_prefill`` is.

    Cost: every device first computes what its last sequence does to any state (``gdn_transition``), one all-gather of
    float32 [H, K, K+V] a device whatever T is (128 KB a head for K = V = 128), n small products, then the ordinary run:
    about 1.9 times the work of one device's tokens. Where heads can be sharded instead, that costs nothing.
    """
    op = "gdn_prefill_cp"
    checks.option(op, "final_state", final_state, ("replicated", "local"))
    checks.flag(op, "return_final_state", return_final_state)
    checks.option(op, "state_layout", state_layout, ("vk", "kv"))
    if not checks.is_array(g) or g.ndim != 2:
        raise checks.invalid(op, "g", checks.describe(g), "[L, H]")
    devices, rank, tokens = _axis_size(op, axis_name), lax.axis_index(axis_name), g.shape[0]
    cu_seqlens = _global_offsets(op, cu_seqlens, devices * tokens)
    start, end, first = cu_seqlens[:-1], cu_seqlens[1:], rank * tokens
    shape = (start.shape[0], g.shape[1], *((v, k) if state_layout == "vk" else (k, v)))
    shape = (*shape[:2], *(x.shape[-1] for x in shape[2:]))
    dtype = jnp.dtype(jnp.float32)
    states = jnp.zeros(shape, jnp.float32)
    if initial_state is not None:
        dtype = jnp.dtype(getattr(initial_state, "dtype", None))
        states = checks.array(op, "initial_state", initial_state, shape, FLOATS).astype(jnp.float32)
    common = {
        "gate": gate, "qk_l2norm": qk_l2norm, "l2norm_eps": l2norm_eps, "precision": precision,
        "implementation": implementation,
    }  # fmt: skip
    if devices > 1 and shape[0]:
        tail = functools.partial(gdn_transition, k, v, g, beta, **common)
        entering = _entering(axis_name, rank, tokens, cu_seqlens, _in_kv(states, state_layout), tail)
        continued = (start < first) & (end > first)  # at most one
        states = jnp.where(continued[:, None, None, None], _in_kv(entering, state_layout), states)
    o, final = gdn_prefill(
        q, k, v, g, beta, cu_seqlens=jnp.clip(cu_seqlens - first, 0, tokens), initial_state=states, scale=scale,
        state_layout=state_layout, out_dtype=out_dtype, **common,
    )  # fmt: skip
    if not return_final_state:
        return o
    owner = jnp.clip((end - 1) // max(tokens, 1), 0, devices - 1)
    final = jnp.where((owner == rank)[:, None, None, None], final, 0.0)
    return o, (lax.psum(final, axis_name) if final_state == "replicated" else final).astype(dtype)


def _in_kv(states: jax.Array, layout: str) -> jax.Array:
    return jnp.swapaxes(states, -1, -2) if layout == "vk" else states


def _entering(
    axis: AxisName,
    rank: jax.Array,
    tokens: int,
    cu_seqlens: jax.Array,
    initial: jax.Array,
    tail: Callable[..., tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """The state [H, K, V] that the sequence across this device's first border has there.

    A device where its last sequence begins gives the state after its tokens, which forgets what came before.
    """
    start, last = cu_seqlens[:-1], (rank + 1) * tokens - 1
    sequence = jnp.clip(jnp.searchsorted(start, last, side="right") - 1, 0, None)  # of the last token, if of any
    begin = start[sequence] - rank * tokens
    local = jnp.clip(jnp.stack([begin, jnp.int32(tokens)]), 0, tokens)
    m, n = (x[0] for x in tail(cu_seqlens=local))  # [H, K, K], [H, K, V]
    n = jnp.where(begin >= 0, _after(initial[sequence], m, n), n)

    def add(state: jax.Array, device: Any) -> tuple[jax.Array, None]:
        number, begins, m, n = device
        # a selection: what came before may be NaN
        return jnp.where(number < rank, jnp.where(begins, n, _after(state, m, n)), state), None

    of_all = lax.all_gather((begin >= 0, m, n), axis)
    numbers = jnp.arange(of_all[0].shape[0], dtype=jnp.int32)
    return lax.scan(add, as_varying(jnp.zeros_like(n), (of_all, rank)), (numbers, *of_all))[0]


def _after(state: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
    return gdn_combine((jnp.zeros_like(m), state), (m, n))[1]


def merge_attn_states_cp(
    output: jax.Array,
    lse: jax.Array,
    *,
    axis_name: AxisName,
    scatter_heads: bool = True,
    output_quant: Fp8Spec | None = None,
    output_scale: float | jax.Array | None = None,
    lse_layout: Literal["HT", "TH"] = "HT",
    lse_base: Literal["e", "2"] = "e",
    return_lse: bool = False,
    out_dtype: Any = None,
    implementation: dispatch.Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """Merges the partial results that the n devices of a mesh axis have over their own keys (decode context
    parallelism); inside ``jax.shard_map``.

    output         [T, H, D], every device's result for all heads over its part of the keys; bf16, f16 or f32
    lse            float32 [H, T] (lse_layout "TH": [T, H])
    axis_name      the mesh axis (or axes) that the keys are sharded over
    scatter_heads  True: device r returns the heads r*H/n to (r+1)*H/n, [T, H/n, D]; n must divide H. False: all
                   devices return all heads
    output_quant, output_scale, lse_layout, lse_base, return_lse, out_dtype, implementation    as in
                   ``merge_attn_states``

    Returns ``out`` or ``(out, lse)``. With scatter_heads the states travel in their own dtype by one all-to-all,
    T*H*D*(n-1)/n numbers a device, and are merged and quantised in one pass; otherwise by an all-gather of n times as
    many.
    The sums are float32 and in the order of the devices. Empty states (lse = +-inf), even with NaN in ``output``, add
    nothing; rows that are empty everywhere are out = 0, lse = -inf.
    """
    op = "merge_attn_states_cp"
    checks.flag(op, "scatter_heads", scatter_heads)
    checks.option(op, "lse_layout", lse_layout, ("HT", "TH"))
    output = checks.array(op, "output", output, ("T", "H", "D"), FLOATS)
    sizes = {"T": output.shape[0], "H": output.shape[1]}
    lse = checks.array(op, "lse", lse, tuple(sizes[letter] for letter in lse_layout), [jnp.float32])
    devices = _axis_size(op, axis_name)
    if scatter_heads and sizes["H"] % devices:
        raise checks.invalid(op, "output", checks.describe(output), f"heads that {devices} devices divide",
                             "Or pass scatter_heads=False.")  # fmt: skip

    def bring(x: jax.Array, heads: int) -> jax.Array:
        if not scatter_heads:
            return lax.all_gather(x, axis_name)
        cut = x.reshape(*x.shape[:heads], devices, sizes["H"] // devices, *x.shape[heads + 1 :])
        return lax.all_to_all(jnp.moveaxis(cut, heads, 0), axis_name, 0, 0)

    return merge_attn_states_n(
        bring(output, 1), bring(lse, lse_layout.index("H")), output_quant=output_quant, output_scale=output_scale,
        lse_layout=lse_layout, lse_base=lse_base, return_lse=return_lse, out_dtype=out_dtype,
        implementation=implementation,
    )  # fmt: skip
