"""The layers of the published models in plain jnp, naive: dense scores with masks, one step a token, float32.

Every model takes the tensors under their published names ([out, in]), packed inputs x [T, hidden], and for each token
the number of its request (-1: none) and its position. There is no cache here.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def rms(x, weight, eps=1e-6):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def linear(x, w, name):
    y = jnp.matmul(x, w[f"{name}.weight"].T, precision="highest")
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def yarn_frequencies(theta, scaling, width=64):
    """One frequency a pair, by the formulas of the YaRN paper as the published configs parameterise it."""
    result = []
    for i in range(0, width, 2):
        frequency = theta ** (-i / width)
        if scaling:
            turns = lambda r: width * math.log(scaling["original_max_position_embeddings"] / (r * 2 * math.pi))
            edge = lambda r: turns(r) / (2 * math.log(theta))
            low = max(math.floor(edge(scaling["beta_fast"])), 0)
            high = min(math.ceil(edge(scaling["beta_slow"])), width - 1)
            keep = 1 - min(max((i / 2 - low) / (high - low), 0), 1)
            frequency = frequency / scaling["factor"] * (1 - keep) + frequency * keep
        result.append(frequency)
    return jnp.asarray(result, jnp.float32)


def rope(x, position, frequencies, size=1.0, sign=1):
    """Complex numbers made of neighbours, times e^(i angle)."""
    number = jax.lax.complex(x[..., 0::2], x[..., 1::2])
    angle = position[:, None].astype(jnp.float32) * frequencies
    angle = angle.reshape(angle.shape[0], *[1] * (x.ndim - 2), -1)
    turned = number * size * jnp.exp(1j * sign * angle)
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def e4m3(x):
    return jnp.clip(x, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32)


def mla(w, x, owner, position, heads, theta, scaling, fp8=False):
    """DeepSeek-V2 and V3: scores of all tokens, masked. ``fp8``: q, k, v in e4m3, and the result a head."""
    x = jnp.where((owner >= 0)[:, None], x, 0)
    tokens = x.shape[0]
    if "q_proj.weight" in w:
        q = linear(x, w, "q_proj")
    else:
        q = linear(rms(linear(x, w, "q_a_proj"), w["q_a_layernorm.weight"]), w, "q_b_proj")
    q = q.reshape(tokens, heads, 192)
    compressed = linear(x, w, "kv_a_proj_with_mqa")
    kv = linear(rms(compressed[:, :-64], w["kv_a_layernorm.weight"]), w, "kv_b_proj").reshape(tokens, heads, 256)
    frequencies, size, scale = yarn_frequencies(theta, scaling), 1.0, 192**-0.5
    if scaling:
        m = lambda s: 0.1 * s * math.log(scaling["factor"]) + 1
        size, scale = m(scaling["mscale"]) / m(scaling["mscale_all_dim"]), scale * m(scaling["mscale_all_dim"]) ** 2
    q = jnp.concatenate([q[..., :128], rope(q[..., 128:], position, frequencies, size)], axis=-1)
    k_rope = rope(compressed[:, -64:], position, frequencies, size)
    k = jnp.concatenate([kv[..., :128], jnp.broadcast_to(k_rope[:, None], (tokens, heads, 64))], axis=-1)
    v = kv[..., 128:]
    if fp8:
        q, k, v = e4m3(q), e4m3(k), e4m3(v)
    score = jnp.einsum("thd,shd->hts", q, k, precision="highest") * scale
    seen = (owner[:, None] == owner) & (position[:, None] >= position)
    p = jax.nn.softmax(jnp.where(seen, score, -jnp.inf), axis=-1)
    out = jnp.einsum("hts,shd->thd", p, v, precision="highest")
    if fp8:
        scale = jnp.max(jnp.abs(out), axis=-1, keepdims=True) / 448
        out = e4m3(out / scale) * scale
    return linear(out.reshape(tokens, -1), w, "o_proj")


def gated_delta_net(w, x, owner, position, key_heads, value_heads, key_width, value_width):
    """Qwen3-Next (or Qwen3.5, by the names of the tensors): one step of the recurrence a token."""
    x = jnp.where((owner >= 0)[:, None], x, 0)
    tokens, group = x.shape[0], value_heads // key_heads
    if "in_proj_qkvz.weight" in w:
        by_head = linear(x, w, "in_proj_qkvz").reshape(tokens, key_heads, -1)
        ends = np.cumsum([key_width, key_width, group * value_width])
        parts = [part.reshape(tokens, -1) for part in jnp.split(by_head, ends, axis=-1)]
        mixed, z = jnp.concatenate(parts[:3], axis=-1), parts[3]
        ba = linear(x, w, "in_proj_ba").reshape(tokens, key_heads, 2 * group)
        b, a = ba[..., :group].reshape(tokens, -1), ba[..., group:].reshape(tokens, -1)
    else:
        mixed, z, b, a = (linear(x, w, f"in_proj_{name}") for name in ("qkv", "z", "b", "a"))
    kernel = w["conv1d.weight"][:, 0]  # [channels, width]
    width = kernel.shape[1]
    convolved = sum(
        jnp.where((position >= back)[:, None], jnp.roll(mixed, back, axis=0), 0) * kernel[:, width - 1 - back]
        for back in range(width)
    )
    mixed = convolved / (1 + jnp.exp(-convolved))
    q, k, v = jnp.split(mixed, [key_heads * key_width, 2 * key_heads * key_width], axis=-1)
    unit = lambda y: y / jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)
    q, k = (unit(y.reshape(tokens, key_heads, key_width)).repeat(group, axis=1) for y in (q, k))
    v = v.reshape(tokens, value_heads, value_width)
    decay = jnp.exp(-jnp.exp(w["A_log"]) * jnp.log1p(jnp.exp(a + w["dt_bias"])))
    beta = 1 / (1 + jnp.exp(-b))

    def step(state, token):
        q, k, v, decay, beta, first = token
        state = jnp.where(first, 0, state) * decay[:, None, None]  # [H, K, V]
        error = v - jnp.einsum("hk,hkv->hv", k, state, precision="highest")
        state = state + jnp.einsum("h,hk,hv->hkv", beta, k, error, precision="highest")
        return state, jnp.einsum("hk,hkv->hv", q, state, precision="highest") * key_width**-0.5

    empty = jnp.zeros((value_heads, key_width, value_width))
    _, out = jax.lax.scan(step, empty, (q, k, v, decay, beta, position == 0))
    z = z.reshape(tokens, value_heads, value_width)
    out = rms(out, w["norm.weight"]) * (z / (1 + jnp.exp(-z)))
    return linear(out.reshape(tokens, -1), w, "out_proj")


def as_fp8_row(x):
    """448 numbers with a power of two a tile of 64, 64 numbers in bf16, back in float32."""
    tiles = x[..., :448].reshape(*x.shape[:-1], 7, 64)
    scale = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1, keepdims=True) / 448, 1e-4))))
    nope = (e4m3(tiles / scale) * scale).reshape(*x.shape[:-1], 448)
    return jnp.concatenate([nope, x[..., 448:].astype(jnp.bfloat16).astype(jnp.float32)], axis=-1)


def turn_tail(x, position, frequencies, sign=1):
    return jnp.concatenate([x[..., :-64], rope(x[..., -64:], position, frequencies, 1.0, sign)], axis=-1)


def compressed_rows(w, x, ratio, frequencies):
    """DeepSeek-V4's compressed rows of one request x [n, hidden], group by group."""
    kv, gate = linear(x, w, "compressor.wkv"), linear(x, w, "compressor.wgate")
    rows = []
    for group in range(x.shape[0] // ratio):
        own = slice(group * ratio, (group + 1) * ratio)
        parts = [(kv[own, -512:], (gate[own] + w["compressor.ape"])[:, -512:])]
        if ratio == 4 and group > 0:
            last = slice((group - 1) * ratio, group * ratio)
            parts.append((kv[last, :512], (gate[last] + w["compressor.ape"])[:, :512]))
        values, scores = (jnp.concatenate(z) for z in zip(*parts, strict=True))
        row = rms(jnp.sum(values * jax.nn.softmax(scores, axis=0), axis=0), w["compressor.norm.weight"])
        rows.append(turn_tail(row[None], jnp.array([group * ratio]), frequencies))
    return as_fp8_row(jnp.concatenate(rows)) if rows else jnp.zeros((0, 512))


def sparse_mla(w, x, owner, position, lengths, heads, groups, window, ratio, theta, chosen=None):
    """DeepSeek-V4: every token against all rows of all requests, masked. ``chosen`` bool [T, rows of its request]."""
    x = jnp.where((owner >= 0)[:, None], x, 0)
    tokens, frequencies = x.shape[0], yarn_frequencies(theta, None)
    q = linear(rms(linear(x, w, "wq_a"), w["q_norm.weight"]), w, "wq_b").reshape(tokens, heads, 512)
    q = turn_tail(rms(q, 1.0), position, frequencies)
    rows = [as_fp8_row(turn_tail(rms(linear(x, w, "wkv"), w["kv_norm.weight"]), position, frequencies))]
    seen = [(owner[:, None] == owner) & (position[:, None] >= position) & (position[:, None] - window < position)]
    start = 0
    for request, length in enumerate(lengths):
        if ratio:
            made = compressed_rows(w, x[start : start + length], ratio, frequencies)
            number = jnp.arange(made.shape[0])
            mask = (owner[:, None] == request) & ((number + 1) * ratio <= position[:, None] + 1)
            rows.append(made)
            seen.append(mask if chosen is None else mask & chosen[:, : made.shape[0]])
        start += length
    rows, seen = jnp.concatenate(rows), jnp.concatenate(seen, axis=1)
    score = jnp.einsum("thd,sd->hts", q, rows, precision="highest") * 512**-0.5
    weight = jnp.where(seen, jnp.exp(score), 0)
    total = weight.sum(axis=-1, keepdims=True) + jnp.exp(w["attn_sink"])[:, None, None]
    out = jnp.einsum("hts,sd->thd", weight / total, rows, precision="highest")
    out = turn_tail(out, position, frequencies, -1).reshape(tokens, groups, -1)
    wo_a = w["wo_a.weight"].reshape(groups, -1, out.shape[-1])
    low = jnp.einsum("tgd,grd->tgr", out, wo_a, precision="highest")
    return linear(low.reshape(tokens, -1), w, "wo_b")
