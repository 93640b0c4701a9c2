"""Merging and quantisation in plain numpy, independent of the package: what the tests hold the code to."""

from typing import Any

import ml_dtypes
import numpy as np

TINY = 2.0**-126  # a smaller weight is none


def merge(outputs: Any, lses: Any, count: int | None = None, base: float = np.e) -> tuple[np.ndarray, np.ndarray]:
    """float64 out [T, H, D] and lse [H, T] of states outputs [N, T, H, D] and lses [N, H, T]."""
    outputs = np.stack([np.asarray(o).astype(np.float64) for o in outputs])
    lses = np.stack([np.asarray(s).astype(np.float64).T for s in lses])  # [N, T, H]
    tokens = outputs.shape[1]
    without = np.arange(tokens) >= (tokens if count is None else count)
    lses[lses == np.inf] = -np.inf
    lses[:-1, without] = -np.inf
    with np.errstate(all="ignore"):
        top = lses.max(axis=0)
        empty = top == -np.inf
        anchor = np.where(empty, 0, top)
        terms = base ** (lses - anchor)
        total = np.where(empty, 1, terms.sum(axis=0))
        share = np.where(empty, 0, terms / total)
        lse = np.where(empty, -np.inf, np.log(total) / np.log(base) + anchor)
        share[:-1, without] = 0
        share[-1, without] = 1
        share = share[..., None]
        out = np.where(share < TINY, 0, share * outputs).sum(axis=0)
    return out, lse.T


def e4m3(x: Any) -> np.ndarray:
    """uint8 codes of float32 x: clamp, round to nearest even, NaN as 0x7F."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        codes = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def per_tensor(x: Any, scale: float) -> np.ndarray:
    """uint8 codes of x at one scale."""
    with np.errstate(all="ignore"):
        return e4m3(np.asarray(x).astype(np.float32) * (np.float32(1) / np.float32(scale)))


def ue8m0_bytes(amax: Any) -> np.ndarray:
    """UE8M0 bytes of groups whose largest magnitudes are ``amax``: exact, through frexp of float64."""
    scale = np.maximum(np.asarray(amax, np.float64) / 448, 1e-10)
    mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
    return np.clip(exponent - (mantissa == 0.5) + 127, 1, 254).astype(np.int64)


def group_scales(x: Any, group: int, scale_format: str, eps: float = 1e-10) -> np.ndarray:
    """float32 [T, G] for x [T, K]."""
    x = np.asarray(x).astype(np.float32)
    grouped = np.abs(x.reshape(x.shape[0], -1, group)) if x.size else np.zeros((x.shape[0], x.shape[1] // group, 1))
    amax = np.maximum(np.where(np.isfinite(grouped), grouped, 0).max(axis=-1), eps)
    if scale_format == "ue8m0":
        return np.ldexp(np.float32(1), ue8m0_bytes(amax) - 127).astype(np.float32)
    return (amax.astype(np.float32) / np.float32(448)).astype(np.float32)


def per_group(x: Any, scales: np.ndarray) -> np.ndarray:
    """uint8 codes [T, K] of x [T, K] at scales [T, G]."""
    x = np.asarray(x).astype(np.float32)
    with np.errstate(all="ignore"):
        return e4m3(x / np.repeat(scales, x.shape[1] // scales.shape[1], axis=1))


def align4(n: int) -> int:
    return (n + 3) // 4 * 4


def physical(scales: np.ndarray, layout: str) -> np.ndarray:
    """The buffer of a scale layout, element by element as docs/layouts.md defines it."""
    tokens, groups = scales.shape
    if layout == "row":
        return scales
    if layout == "col":
        return scales.T
    if layout == "col_tma":
        buffer = np.zeros((groups, align4(tokens)), np.float32)
        buffer[:, :tokens] = scales.T
        return buffer
    words = np.zeros(((groups + 3) // 4, align4(tokens)), np.uint32)
    for group in range(groups):
        byte = scales[:, group].view(np.uint32) >> np.uint32(23)
        words[group // 4, :tokens] |= byte << np.uint32(8 * (group % 4))
    return words.view(np.int32)


def deepgemm_packed(scales: np.ndarray) -> np.ndarray:
    """The packed buffer as DeepGEMM's torch code makes it: bytes [T, G], zero padding, viewed as int32, transposed."""
    tokens, groups = scales.shape
    byte = (scales.view(np.uint32) >> np.uint32(23)).astype(np.uint8)
    byte = np.pad(byte, ((0, align4(tokens) - tokens), (0, align4(groups) - groups)))
    return np.ascontiguousarray(byte.view("<i4").T)
