"""Shapes of real models, by name: what one rank of a serving engine computes in one layer.

A ``Case`` is a shape to time. In its ``shape`` T and S count the tokens of all B sequences together (B absent: one
sequence), and all sequences of a case are equally long, those of a mix apart:

    merge_attn_states   T tokens, H heads, D width; N states if they are not two
    mla_prefill         T query tokens, S key tokens, H heads; widths 192 and 128, D the width of the values; with mix,
                        a number, sequences of the lengths ``mix(number)``
    sparse_prefill      T query tokens, H heads, topk rows a token; P rows in the prefix pool. With S, the last
                        ``WINDOW`` of the topk rows lie in the extend pool of S rows, the chunk's own. With C, the T
                        tokens are those of B requests of C earlier tokens each, and lists follow from positions
    gdn_prefill         T tokens, Hk heads of q and k, Hv heads of v, D width
"""

from __future__ import annotations

import dataclasses
import random

WINDOW = 128  # rows of DeepSeek-V4's sliding window
TENSOR_PARALLEL = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Model:
    """What the ops need to know; None: the model has no such layer."""

    name: str
    heads: int | None = None  # of attention through mla_prefill or sparse_prefill
    qk_width: int | None = None
    v_width: int | None = None
    topk: int | None = None  # compressed rows that a token selects, the window apart
    gdn_k_heads: int | None = None
    gdn_v_heads: int | None = None
    gdn_width: int | None = None


DEEPSEEK_V3 = Model("DeepSeek-V3", heads=128, qk_width=192, v_width=128)  # and R1
KIMI_K2 = Model("Kimi-K2", heads=64, qk_width=192, v_width=128)
DEEPSEEK_V2_LITE = Model("DeepSeek-V2-Lite", heads=16, qk_width=192, v_width=128)
DEEPSEEK_V4_FLASH = Model("DeepSeek-V4-Flash", heads=64, qk_width=512, v_width=512, topk=512)
DEEPSEEK_V4_PRO = Model("DeepSeek-V4-Pro", heads=128, qk_width=512, v_width=512, topk=1024)
QWEN3_NEXT = Model("Qwen3-Next", gdn_k_heads=16, gdn_v_heads=32, gdn_width=128)
QWEN3_5_27B = Model("Qwen3.5-27B", gdn_k_heads=16, gdn_v_heads=48, gdn_width=128)
QWEN3_5_397B = Model("Qwen3.5-397B", gdn_k_heads=16, gdn_v_heads=64, gdn_width=128)  # and 122B

MLA_MODELS = (DEEPSEEK_V3, KIMI_K2, DEEPSEEK_V2_LITE)
GDN_MODELS = (QWEN3_NEXT, QWEN3_5_27B, QWEN3_5_397B)


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape to time. ``variant`` says what is computed on it and in which precision; name and variant together are
    unique in an op."""

    op: str
    name: str
    shape: dict[str, int]
    variant: str


def heads_per_rank(model: Model, tp: int) -> dict[str, int]:
    """Heads of one rank under ``tp``-way tensor parallelism, as they stand in a shape: {"H": 16} or
    {"Hk": 2, "Hv": 8}."""
    total = {"H": model.heads, "Hk": model.gdn_k_heads, "Hv": model.gdn_v_heads}
    heads = {letter: count for letter, count in total.items() if count is not None}
    if tp < 1 or any(count % tp for count in heads.values()):
        raise ValueError(f"{model.name}: {tp} ranks cannot share {heads} heads evenly")
    return {letter: count // tp for letter, count in heads.items()}


def ranks(models: tuple[Model, ...], **heads: int) -> str:
    """Every model whose rank has these heads: "DeepSeek-V3 TP8, Kimi-K2 TP4"; the heads themselves if none has."""
    found = [
        f"{model.name} TP{tp}"
        for model in models
        for tp in TENSOR_PARALLEL
        if all((count or 0) % tp == 0 for count in (model.heads, model.gdn_k_heads, model.gdn_v_heads))
        and heads_per_rank(model, tp) == heads
    ]
    return ", ".join(found or (f"{letter}={count}" for letter, count in heads.items()))


def cases(op: str) -> tuple[Case, ...]:
    """The shapes on which ``op`` is timed."""
    if op not in _CASES:
        raise ValueError(f"no benchmark of {op!r}: expected one of {', '.join(_CASES)}")
    return _CASES[op]()


_MERGE_SIZES = (
    *((tokens, heads) for tokens in (1, 16, 64, 256, 1024, 4096) for heads in (4, 8, 16, 32, 64, 128)),
    (8192, 128),
    (16384, 128),
)
_MERGE_VARIANTS = ("bf16", "fp8_tensor", "fp8_tensor f16 in", "fp8_tensor f32 in")
_MERGE_SOME_SIZES = ((16, 128), (256, 16), (1024, 128), (4096, 16), (4096, 128), (8192, 128), (16384, 128))
_MERGE_MORE_VARIANTS = (
    "fp8_group128_f32_row",
    "fp8_group128_f32_col_tma",
    "fp8_group128_ue8m0_packed",
    "fp8_group64_f32_row",
)


def _merge() -> tuple[Case, ...]:
    every = [(size, 2, variant) for size in _MERGE_SIZES for variant in _MERGE_VARIANTS]
    every += [(size, 2, variant) for size in _MERGE_SOME_SIZES for variant in _MERGE_MORE_VARIANTS]
    every += [(size, 4, "fp8_tensor") for size in ((4096, 16), (1024, 128), (4096, 128))]
    return tuple(_merge_case(*size, states, variant) for size, states, variant in every)


def _merge_case(tokens: int, heads: int, states: int, variant: str) -> Case:
    shape = {"T": tokens, "H": heads, "D": 128}
    name = f"{ranks(MLA_MODELS, H=heads)}, T={tokens}"
    if states == 2:
        return Case("merge_attn_states", name, shape, variant)
    return Case("merge_attn_states", f"{name} N={states}", shape | {"N": states}, variant)


def mix(number: int) -> tuple[int, ...]:
    """Lengths of a ragged batch: 512 to 8192 tokens a sequence, as many as 16384 to 24576 tokens take."""
    draw = random.Random(number).random  # the same in every version of Python, unlike its other methods
    between = lambda low, high: low + int((high - low + 1) * draw())
    tokens, lengths = between(16384, 24576), []
    while sum(lengths) < tokens:
        lengths.append(between(512, 8192))
    return tuple(lengths)


def mla_lengths(shape: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Query tokens and key tokens of each sequence."""
    if "mix" in shape:
        return mix(shape["mix"]), mix(shape["mix"])
    return (shape["T"] // shape["B"],) * shape["B"], (shape["S"] // shape["B"],) * shape["B"]


def mla_pairs(shape: dict[str, int], causal: bool) -> int:
    """Pairs of a query and a key that it sees; causal masks are aligned at the last row and the last key."""
    pairs = 0
    for queries, keys in zip(*mla_lengths(shape), strict=True):
        rows = min(queries, keys)  # that see a key
        pairs += rows * keys - rows * (rows - 1) // 2 if causal else queries * keys
    return pairs


# (query tokens, key tokens) of a sequence, sequences
_MLA_LENGTHS = tuple((tokens, tokens, 1) for tokens in (2048, 4096, 8192, 16384, 32768))
_MLA_RAGGED = ((512, 512, 1), (1024, 1024, 1), (4096, 4096, 2), (4096, 4096, 4), (4096, 4096, 8), (1024, 1024, 16))
_MLA_CONTEXT = ((128, 1024, 1), (256, 2048, 1), (512, 4096, 1), (1024, 4096, 1))  # a prompt's last piece
_MLA_FULL = ((8192, 8192, 1), (32768, 32768, 1), (4096, 4096, 4), (8192, 32768, 1), (256, 65536, 1))
_MLA_MIXES = 8


def _mla() -> tuple[Case, ...]:
    one, four = (8192, 8192, 1), (4096, 4096, 4)
    every = [(size, 16, "fp8 causal") for size in (*_MLA_LENGTHS, *_MLA_RAGGED, *_MLA_CONTEXT)]
    every += [(size, heads, "fp8 causal") for size in _MLA_LENGTHS[::2] for heads in (32, 128)]
    every += [*((size, 16, "fp8 full") for size in _MLA_FULL), (one, 128, "fp8 full")]
    every += [(one, 16, "bf16 full"), (one, 16, "bf16 causal"), (four, 16, "bf16 causal")]
    every += [(size, 16, "fp8 causal from bf16") for size in (one, (32768, 32768, 1), four)]
    every += [(one, 128, "fp8 causal from bf16"), (one, 16, "fp8 full from bf16")]
    every += [(s, 16, f"fp8 causal to {to}") for s in (one, four) for to in ("fp8_tensor", "fp8_group128_ue8m0_packed")]
    every += [(one, 16, "fp8 causal with a state"), (one, 16, "fp8 full with a state")]
    every += [((256, keys, 1), 16, "fp8 full V of mean 1") for keys in (8192, 32768, 131072)]
    every += [((8192, 5 * 8192, 1), 16, "fp8 causal in chunks")]
    mixes = tuple(_mla_mix(number, 16, "fp8 causal") for number in range(_MLA_MIXES))
    return (*(_mla_case(*size, heads, variant) for size, heads, variant in every), *mixes)


def _mla_case(tokens: int, keys: int, sequences: int, heads: int, variant: str) -> Case:
    size = f"T={tokens}" if tokens == keys else f"T={tokens} S={keys}"
    size = size if sequences == 1 else f"{sequences} x {size}"
    shape = {"B": sequences, "T": sequences * tokens, "S": sequences * keys, "H": heads, "D": 128}
    return Case("mla_prefill", f"{ranks(MLA_MODELS, H=heads)}, {size}", shape, variant)


def _mla_mix(number: int, heads: int, variant: str) -> Case:
    lengths = mix(number)
    shape = {"B": len(lengths), "T": sum(lengths), "S": sum(lengths), "H": heads, "D": 128, "mix": number}
    name = f"{ranks(MLA_MODELS, H=heads)}, mix {number} of {len(lengths)}, T={sum(lengths)}"
    return Case("mla_prefill", name, shape, variant)


# heads, rows a token, pool rows: one pool, as FlashMLA's own benchmark has it
_ONE_POOL = (
    *((*size, 32768) for size in ((64, 512), (64, 2048), (128, 512), (128, 1024), (128, 2048))),
    (64, 512, 1 << 20),
)
_BF16_ROWS = ((64, 512, 32768), (64, 2048, 32768), (128, 512, 32768), (128, 2048, 32768))
_EARLIER = 8192  # tokens of a request before its second chunk


def _sparse() -> tuple[Case, ...]:
    flash, pro = DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO
    every = [(*_one_pool(*size), "exact") for size in _ONE_POOL]
    every += [(*_v4(flash, tp, "CSA", flash.topk, 32768), "exact") for tp in (4, 8, 2)]
    every += [(*_v4_second_chunk(model, "CSA", model.topk, 65536), "exact") for model in (flash, pro)]
    every += [(*_one_pool(*size), "exact bf16 rows") for size in _BF16_ROWS]
    every += [(*_one_pool(*size), "exact byte scales") for size in _BF16_ROWS[:1]]
    every += [(*_v4(pro, tp, "CSA", pro.topk, 65536), "exact") for tp in (4, 8)]
    every.append((*_v4_second_chunk(flash, "window", 0, 8192), "exact"))
    every.append((*_v4(pro, 1, "HCA", 1024, 1024), "exact"))  # all compressed rows of a context of 131072
    return tuple(Case("sparse_prefill", *case) for case in every)


def _one_pool(heads: int, rows: int, pool: int) -> tuple[str, dict[str, int]]:
    return f"H={heads} top-{rows}, T=4096 P={pool}", {"T": 4096, "H": heads, "D": 512, "topk": rows, "P": pool}


def _v4(model: Model, tp: int, layer: str, selected: int, pool: int) -> tuple[str, dict[str, int]]:
    shape = {"T": 4096, "S": 4096, **heads_per_rank(model, tp), "D": 512, "topk": selected + WINDOW, "P": pool}
    return f"{model.name} TP{tp} {layer}, T=4096 P={pool}", shape


def _v4_second_chunk(model: Model, layer: str, selected: int, pool: int) -> tuple[str, dict[str, int]]:
    _, shape = _v4(model, 1, layer, selected, pool)
    return f"{model.name} TP1 {layer}, 2 x T=2048 after {_EARLIER}", shape | {"B": 2, "C": _EARLIER}


# heads of q and k, heads of v, tokens, sequences
_GDN_SIZES = (
    *((2, 8, tokens, 1) for tokens in (8192, 32768, 131072)),
    *((4, 16, tokens, 1) for tokens in (8192, 32768)),
    *((16, 32, tokens, 1) for tokens in (8192, 32768)),
    (16, 64, 8192, 4),
    (2, 8, 8192, 20),
    (4, 16, 1024, 32),
)
_GDN_POOL = ((2, 8, 8192, 1), (16, 32, 32768, 1), (16, 64, 8192, 4))
_GDN_MORE = ((16, 64, 8192, 1), (4, 16, 131072, 1), (16, 32, 1024, 8), (16, 32, 2048, 4), (2, 8, 2048, 4))


def _gdn() -> tuple[Case, ...]:
    variants = (("bf16", _GDN_SIZES), ("bf16 pool", _GDN_POOL), ("bf16", _GDN_MORE))
    return tuple(_gdn_case(*size, variant) for variant, sizes in variants for size in sizes)


def _gdn_case(k_heads: int, v_heads: int, tokens: int, sequences: int, variant: str) -> Case:
    shape = {"B": sequences, "T": sequences * tokens, "Hk": k_heads, "Hv": v_heads, "D": 128}
    name = f"{ranks(GDN_MODELS, Hk=k_heads, Hv=v_heads)}, {sequences} x {tokens}"
    return Case("gdn_prefill", name, shape, variant)


_CASES = {"merge_attn_states": _merge, "mla_prefill": _mla, "sparse_prefill": _sparse, "gdn_prefill": _gdn}
