"""FP8 casts, scales and scale layouts: the only place in the package that converts to an FP8 type.

dequantised = stored * scale, everywhere. Scale layouts are described byte by byte in ``docs/layouts.md``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_fp8attn.errors import InvalidInputError, UnsupportedError

ScaleFormat = Literal["float32", "ue8m0"]
ScaleLayout = Literal["row", "col", "col_tma", "col_tma_packed"]

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
FP8_MAX = {E4M3: 448.0, jnp.dtype(jnp.float8_e4m3fnuz): 240.0}
SCALE_FLOOR = 1e-10  # a power-of-two scale never falls below 2^-33


def align4(n: int) -> int:
    """The next multiple of four: the TMA alignment of a row of 32-bit scales."""
    return -(-n // 4) * 4


def cast_fp8(x: jax.Array, dtype: Any = E4M3) -> jax.Array:
    """Clamps to the finite range, then rounds to nearest even. NaN becomes the NaN code (0x7F), +-inf saturates."""
    dtype = jnp.dtype(dtype)
    limit = FP8_MAX[dtype]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    clamped = jnp.clip(x, -limit, limit)
    # 0 * inf gives a NaN with its sign set (code 0xFF): one NaN for all
    codes = jnp.where(jnp.isnan(x), jnp.nan, clamped).astype(dtype)
    # without the barrier XLA for GPUs drops a cast to FP8 and back, and the rounding with it
    return lax.optimization_barrier(codes)


def ue8m0_byte(x: jax.Array) -> jax.Array:
    """Biased exponent (int32 in 1..254) of the smallest power of two >= x, from the bits of x; x > 0."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    byte = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).astype(jnp.int32)
    return jnp.clip(byte, 1, 254)


def ue8m0_value(byte: jax.Array) -> jax.Array:
    """float32 2^(byte - 127); byte 0 is 2^-127 and byte 255 NaN, as in OCP and float8_e8m0fnu."""
    byte = byte.astype(jnp.int32)
    bits = jnp.where(byte == 0, 1 << 22, byte << 23)
    return jnp.where(byte == 255, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))


def round_up_to_power_of_two(x: jax.Array) -> jax.Array:
    """Smallest power of two >= x, exact by exponent bits, clamped to UE8M0's finite range."""
    return lax.bitcast_convert_type(ue8m0_byte(x) << 23, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8PerTensor:
    """One scale for the whole output: x ~= stored * scale.

    scale: Python number or array with one element (0-d, (1,) or (1,1)); may be traced and is never read by the host.
    dtype: float8_e4m3fn, or float8_e4m3fnuz (largest 240) for older AMD hardware.
    """

    scale: Any
    dtype: Any = dataclasses.field(default=E4M3, metadata={"static": True})

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _fp8_dtype("Fp8PerTensor.dtype", self.dtype))

    def static(self) -> Fp8PerTensor:
        """The spec without its (possibly traced) scale: hashable."""
        return Fp8PerTensor(None, self.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Fp8PerGroup:
    """One scale for each group of ``group_size`` consecutive columns of the flattened [T, H*D] output.

    scale = max(eps, largest finite |x| of the group) / 448, rounded up to a power of two for "ue8m0".
    scale_layout, for T tokens and G groups:
        "row"             float32 [T, G]
        "col"             float32 [G, T]
        "col_tma"         float32 [G, align4(T)]               DeepGEMM on Hopper
        "col_tma_packed"  int32   [ceil(G/4), align4(T)]       DeepGEMM on Blackwell: four UE8M0 bytes a word,
                          group 4w in the low byte of word w
    Padding is zero in every layout.
    """

    group_size: int = 128
    scale_format: ScaleFormat = "float32"
    scale_layout: ScaleLayout = "row"
    eps: float = 1e-10

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128):
            raise InvalidInputError(f"Fp8PerGroup: group_size is {self.group_size!r}; expected 32, 64 or 128.")
        if self.scale_format not in ("float32", "ue8m0"):
            raise InvalidInputError(
                f"Fp8PerGroup: scale_format is {self.scale_format!r}; expected 'float32' or 'ue8m0'."
            )
        if self.scale_layout not in ("row", "col", "col_tma", "col_tma_packed"):
            raise InvalidInputError(
                f"Fp8PerGroup: scale_layout is {self.scale_layout!r}; "
                "expected 'row', 'col', 'col_tma' or 'col_tma_packed'."
            )
        # below 1e-30 the scale of a zero group would be subnormal, and 0/0 after flushing
        if not (isinstance(self.eps, float) and 1e-30 <= self.eps <= 1e30):
            raise InvalidInputError(f"Fp8PerGroup: eps is {self.eps!r}; expected a float from 1e-30 to 1e30.")
        if self.scale_layout == "col_tma_packed":
            if self.scale_format != "ue8m0":
                raise InvalidInputError(
                    "Fp8PerGroup: scale_layout 'col_tma_packed' holds UE8M0 bytes; pass scale_format='ue8m0'."
                )
            if self.group_size == 64:
                raise InvalidInputError(
                    "Fp8PerGroup: scale_layout 'col_tma_packed' exists for group_size 32 and 128 only."
                )

    @classmethod
    def deepgemm_sm90(cls) -> Fp8PerGroup:
        """The activation scales that DeepGEMM reads on Hopper."""
        return cls(128, "float32", "col_tma")

    @classmethod
    def deepgemm_sm100(cls) -> Fp8PerGroup:
        """The activation scales that DeepGEMM reads on Blackwell."""
        return cls(128, "ue8m0", "col_tma_packed")

    @classmethod
    def row_major(cls, group_size: int = 128) -> Fp8PerGroup:
        """float32 scales beside their rows: what CUTLASS, Triton and qwix read."""
        return cls(group_size, "float32", "row")

    def static(self) -> Fp8PerGroup:
        return self

    def scale_shape(self, tokens: int, groups: int) -> tuple[int, int]:
        """Shape of the physical scale buffer."""
        return {
            "row": (tokens, groups),
            "col": (groups, tokens),
            "col_tma": (groups, align4(tokens)),
            "col_tma_packed": (-(-groups // 4), align4(tokens)),
        }[self.scale_layout]


Fp8Spec = Fp8PerTensor | Fp8PerGroup


def _fp8_dtype(name: str, dtype: Any) -> np.dtype:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known not in FP8_MAX:
        raise InvalidInputError(f"{name} is {dtype!r}; expected float8_e4m3fn or float8_e4m3fnuz.")
    return known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Array:
    """FP8 codes with their scales, as a pytree.

    values      e4m3 [T, H, D] or [T, K] (batched calls: [B, T, H, D], their tokens counted as B*T)
    scales      the physical scale buffer of ``spec`` (float32 [] for Fp8PerTensor)
    spec        Fp8PerTensor (scale None) or Fp8PerGroup
    num_tokens  T; the logical rows of ``scales``
    """

    values: jax.Array
    scales: jax.Array
    spec: Fp8Spec = dataclasses.field(metadata={"static": True})
    num_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    @property
    def _batch_shape(self) -> tuple[int, ...]:
        """Leading axes that vmap or scan put in front."""
        rank = 2 if isinstance(self.spec, Fp8PerGroup) else 0
        return self.scales.shape[: self.scales.ndim - rank]

    @property
    def width(self) -> int:
        """K = H*D: the columns of ``flat``."""
        shape = self.values.shape[len(self._batch_shape) :]
        return math.prod(shape[-2:]) if len(shape) > 2 else shape[-1]

    @property
    def flat(self) -> jax.Array:
        """The codes as [T, H*D]: the left operand of the next matrix product."""
        return self.values.reshape(*self._batch_shape, self.num_tokens, self.width)

    @property
    def num_groups(self) -> int:
        if isinstance(self.spec, Fp8PerTensor):
            return 1
        return self.width // self.spec.group_size

    def scales_2d(self) -> jax.Array:
        """Logical float32 scales [T, G] whatever the layout; [1, 1] for one scale a tensor."""
        if isinstance(self.spec, Fp8PerTensor):
            return self.scales[..., None, None]
        return logical_scales(self.scales, self.spec, self.num_tokens, self.num_groups)

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """stored * scale, in the shape of ``values``."""
        codes = self.flat.astype(jnp.float32)
        scales = self.scales_2d()
        if isinstance(self.spec, Fp8PerGroup):
            scales = jnp.repeat(scales, self.spec.group_size, axis=-1)
        return (codes * scales).astype(dtype).reshape(self.values.shape)

    def to_qarray(self) -> Any:
        """This array as a ``qwix.QArray`` of [T, H*D] codes with row-major scales (needs qwix)."""
        try:
            from qwix import QArray  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("Fp8Array.to_qarray needs qwix: pip install qwix") from error
        return QArray(qvalue=self.flat, scale=self.scales_2d(), zero_point=None, qtype=self.values.dtype)


def _spec_fields(spec: Fp8Spec) -> dict[str, Any]:
    return dataclasses.asdict(spec) if isinstance(spec, Fp8PerGroup) else {"dtype": spec.dtype.name}


def _spec_from_fields(fields: dict[str, Any]) -> Fp8Spec:
    return Fp8PerTensor(None, **fields) if "dtype" in fields else Fp8PerGroup(**fields)


def _serializable(node: type, encode: Callable[[Any], Any], decode: Callable[[Any], Any]) -> None:
    """Lets ``jax.export`` serialise functions that take or return ``node``: its static fields as JSON."""
    jax.export.register_pytree_node_serialization(
        node,
        serialized_name=f"jax_fp8attn.{node.__name__}",
        serialize_auxdata=lambda static: json.dumps(encode(static)).encode(),
        deserialize_auxdata=lambda text: decode(json.loads(text)),
    )


_serializable(Fp8PerTensor, lambda static: static[0].name, lambda name: (jnp.dtype(name),))
_serializable(Fp8PerGroup, _spec_fields, _spec_from_fields)
_serializable(
    Fp8Array,
    lambda static: [_spec_fields(static[0]), static[1]],
    lambda fields: (_spec_from_fields(fields[0]), fields[1]),
)


def pack_ue8m0(scales: jax.Array) -> jax.Array:
    """scales float32 [T, G] -> int32 [ceil(G/4), align4(T)]; group 4w in the low byte of word w, padding 0.

    Powers of two only, because the exponent bits alone are kept: round first (``round_up_to_power_of_two``).
    """
    _check_scales("pack_ue8m0", "scales", scales, jnp.float32, "T, G")
    tokens, groups = scales.shape[-2:]
    byte = lax.bitcast_convert_type(jnp.asarray(scales), jnp.int32) >> 23 & 0xFF
    pad = [(0, 0)] * (scales.ndim - 2) + [(0, align4(tokens) - tokens), (0, align4(groups) - groups)]
    byte = jnp.pad(byte, pad)
    byte = byte.reshape(*byte.shape[:-1], byte.shape[-1] // 4, 4)  # [T4, W, 4]
    word = byte[..., 0] | byte[..., 1] << 8 | byte[..., 2] << 16 | byte[..., 3] << 24
    return jnp.swapaxes(word, -1, -2)


def unpack_ue8m0(words: jax.Array, num_tokens: int, num_groups: int) -> jax.Array:
    """The inverse of ``pack_ue8m0``: words int32 [ceil(G/4), align4(T)] -> float32 powers of two [T, G].

    num_tokens, num_groups  T and G; the padding of the words is not read
    """
    _check_scales("unpack_ue8m0", "words", words, jnp.int32, "ceil(G/4), align4(T)")
    if words.shape[-2:] != (-(-num_groups // 4), align4(num_tokens)):
        raise InvalidInputError(
            f"unpack_ue8m0: words is int32{list(words.shape)}; expected "
            f"{[-(-num_groups // 4), align4(num_tokens)]} for {num_tokens} tokens and {num_groups} groups."
        )
    words = jnp.swapaxes(jnp.asarray(words), -1, -2)[..., :num_tokens, :]  # [T, W]
    byte = words[..., None] >> jnp.arange(0, 32, 8, dtype=jnp.int32) & 0xFF
    return ue8m0_value(byte.reshape(*words.shape[:-1], words.shape[-1] * 4)[..., :num_groups])


def to_mn_major_tma_aligned(scales: jax.Array) -> jax.Array:
    """scales float32 [T, G] -> [G, align4(T)] with zero padding: DeepGEMM's layout step."""
    _check_scales("to_mn_major_tma_aligned", "scales", scales, jnp.float32, "T, G")
    tokens = scales.shape[-2]
    pad = [(0, 0)] * (scales.ndim - 1) + [(0, align4(tokens) - tokens)]
    return jnp.pad(jnp.swapaxes(scales, -1, -2), pad)


def _check_scales(op: str, argument: str, x: Any, dtype: Any, axes: str) -> None:
    if not isinstance(x, jax.Array | np.ndarray) or x.ndim < 2 or x.dtype != dtype:
        came = f"{x.dtype}{list(x.shape)}" if isinstance(x, jax.Array | np.ndarray) else f"a {type(x).__name__}"
        raise InvalidInputError(f"{op}: {argument} is {came}; expected {jnp.dtype(dtype).name} [{axes}].")


def physical_scales(scales: jax.Array, spec: Fp8PerGroup) -> jax.Array:
    """Logical scales [T, G] -> the buffer of ``spec.scale_layout``."""
    if spec.scale_layout == "row":
        return scales
    if spec.scale_layout == "col":
        return jnp.swapaxes(scales, -1, -2)
    if spec.scale_layout == "col_tma":
        return to_mn_major_tma_aligned(scales)
    return pack_ue8m0(scales)


def logical_scales(buffer: jax.Array, spec: Fp8PerGroup, num_tokens: int, num_groups: int) -> jax.Array:
    """The buffer of ``spec.scale_layout`` -> logical float32 scales [T, G]."""
    if spec.scale_layout == "row":
        return buffer
    if spec.scale_layout == "col_tma_packed":
        return unpack_ue8m0(buffer, num_tokens, num_groups)
    return jnp.swapaxes(buffer, -1, -2)[..., :num_tokens, :]


def split_tokens(array: Fp8Array, parts: int) -> Fp8Array:
    """Cuts the token axis of a folded result into ``parts`` equal instances (leading axis), each with its padding."""
    tokens = array.num_tokens // parts
    values = array.values.reshape(parts, tokens, *array.values.shape[1:])
    if isinstance(array.spec, Fp8PerTensor):
        inner = array.scales.size // parts  # above 1: the instances of an inner fold have their own scales
        shape = (parts, inner) if inner > 1 else (parts,)
        scales = array.scales.reshape(shape) if inner else jnp.broadcast_to(array.scales, shape)
    elif array.spec.scale_layout == "row":
        scales = array.scales.reshape(parts, tokens, array.scales.shape[1])
    else:
        rows = array.scales.shape[0]
        columns = array.scales[:, : array.num_tokens].reshape(rows, parts, tokens)
        padding = array.spec.scale_shape(tokens, 4)[1] - tokens
        scales = jnp.moveaxis(jnp.pad(columns, ((0, 0), (0, 0), (0, padding))), 1, 0)
    return Fp8Array(values, scales, array.spec, tokens)


def group_scales(x: jax.Array, spec: Fp8PerGroup) -> jax.Array:
    """float32 scales [T, G] of x [T, G, g]. Only finite elements count; NaN and inf leave the scale alone."""
    magnitude = jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)
    amax = jnp.maximum(jnp.max(magnitude, axis=-1), spec.eps).astype(jnp.float32)
    # a reciprocal, as XLA makes of amax/448 under jit: the same bits in eager mode; the UE8M0 byte is exact either way
    scales = amax * np.float32(1 / FP8_MAX[E4M3])
    if spec.scale_format == "ue8m0":
        scales = round_up_to_power_of_two(jnp.maximum(scales, SCALE_FLOOR))
    return scales


def quantize_fp8(x: jax.Array, spec: Fp8Spec) -> Fp8Array:
    """Quantises x to e4m3.

    x     [T, K] or [T, H, D] bf16, f16, f32 or f64; computed in float32.
    spec  Fp8PerTensor(scale): code = e4m3(clamp(x * (1/scale), +-448)), one reciprocal.
          Fp8PerGroup(...): groups of ``group_size`` consecutive columns of [T, H*D]; D (or K) must be a multiple.
    NaN becomes code 0x7F; values beyond the range and +-inf saturate; in a group they do not touch the scale.
    An all-zero group has codes 0 and scale eps/448 (UE8M0: 2^-33, byte 0x5E for eps 1e-10).
    A zero, negative, infinite or NaN per-tensor scale follows IEEE arithmetic and is not checked on the device:
    0 gives +-448 (NaN for x = 0), a negative one flips signs, inf gives 0 (NaN for x = +-inf), NaN gives NaN.
    T = 0 or K = 0: empty results. jit, vmap, scan and shard_map work as for any jax.numpy code, and every instance
    of a vmap has its own scales with their own padding. No derivative.
    """
    op = "quantize_fp8"
    dtypes = [jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)]
    if not isinstance(x, jax.Array | np.ndarray):
        raise InvalidInputError(f"{op}: x is a {type(x).__name__}; expected a float array [T, K] or [T, H, D].")
    if x.ndim not in (2, 3) or x.dtype not in dtypes:
        raise InvalidInputError(f"{op}: x is {x.dtype}{list(x.shape)}; expected a float array [T, K] or [T, H, D].")
    check_spec(op, "spec", spec, x.shape[-1])
    scale = jnp.asarray(spec.scale, jnp.float32) if isinstance(spec, Fp8PerTensor) else None
    return _quantize(jnp.asarray(x), scale, spec.static())


@functools.partial(jax.jit, static_argnames="spec", inline=True)
def _quantize(x: jax.Array, scale: jax.Array | None, spec: Fp8Spec) -> Fp8Array:
    x, scale = _forward_only((x, scale))
    if isinstance(spec, Fp8PerTensor):
        return quantize_per_tensor(x, Fp8PerTensor(scale, spec.dtype))
    return quantize_per_group(x, spec)


@jax.custom_jvp
def _forward_only(x: Any) -> Any:
    return x


@_forward_only.defjvp
def _(primals: Any, tangents: Any) -> Any:
    raise UnsupportedError(
        "quantize_fp8 has no derivative: it is a forward-only op. Use jax.lax.stop_gradient around its inputs, "
        "or a straight-through estimator of your own."
    )


def check_spec(op: str, argument: str, spec: Any, width: int) -> None:
    """Refuses what is no spec, a per-tensor scale of several elements, and groups that would straddle heads."""
    if isinstance(spec, Fp8PerTensor):
        if not _is_one_number(spec.scale):
            raise InvalidInputError(
                f"{op}: {argument}.scale is {spec.scale!r}; expected one number (0-d, (1,) or (1,1)). "
                "For one scale a group pass Fp8PerGroup."
            )
    elif not isinstance(spec, Fp8PerGroup):
        raise InvalidInputError(f"{op}: {argument} is {spec!r}; expected Fp8PerTensor(scale) or Fp8PerGroup(...).")
    elif width % spec.group_size:
        raise InvalidInputError(
            f"{op}: {argument}.group_size is {spec.group_size}, and the last axis has {width} columns; "
            "expected a multiple of the group size. Choose a smaller group or Fp8PerTensor."
        )


def _is_one_number(x: Any) -> bool:
    if isinstance(x, int | float):
        return not isinstance(x, bool)
    if not isinstance(x, jax.Array | np.ndarray | np.generic):
        return False
    return x.size == 1 and (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer))


def quantize_per_tensor(x: jax.Array, spec: Fp8PerTensor) -> Fp8Array:
    """x [T, ...] with one scale; an array of several scales belongs to as many equal runs of tokens."""
    scale = jnp.asarray(spec.scale, jnp.float32).reshape(-1)
    inverse = 1.0 / scale
    if scale.size > 1:
        inverse = jnp.repeat(inverse, x.shape[0] // scale.size).reshape(-1, *[1] * (x.ndim - 1))
    stored = scale if scale.size > 1 else scale[0]
    return Fp8Array(cast_fp8(x.astype(jnp.float32) * inverse, spec.dtype), stored, spec.static(), x.shape[0])


def quantize_per_group(x: jax.Array, spec: Fp8PerGroup) -> Fp8Array:
    tokens = x.shape[0]
    width = int(np.prod(x.shape[1:]))
    grouped = x.reshape(tokens, width // spec.group_size, spec.group_size).astype(jnp.float32)
    scales = group_scales(grouped, spec)
    codes = cast_fp8(grouped / scales[..., None])
    return Fp8Array(codes.reshape(x.shape), physical_scales(scales, spec), spec, tokens)


def quantize_output(x: jax.Array, spec: Fp8Spec | None, scale: Any, dtype: Any) -> jax.Array | Fp8Array:
    """The last step of every op: float32 x [T, H, D] -> ``dtype`` or an Fp8Array. ``scale`` completes a static spec."""
    if spec is None:
        return x.astype(dtype)
    if isinstance(spec, Fp8PerTensor):
        return quantize_per_tensor(x, Fp8PerTensor(scale, spec.dtype))
    return quantize_per_group(x, spec)


def to_stored(x: jax.Array, scale: Any) -> jax.Array:
    """An operand as the FP8 kernels see it: FP8 codes as they are, other floats divided by scale and cast."""
    if x.dtype in FP8_MAX:
        return x
    return cast_fp8(x.astype(jnp.float32) / jnp.asarray(scale, jnp.float32))
