"""Attention, merges and quantisation on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import torch

import jax_fp8attn as fp8attn
from jax_fp8attn import checks
from jax_fp8attn.latent import Fp8Latent
from jax_fp8attn.quantize import Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.torch.library import Op, Options, quantised, register, text, with_scale

Implementation = str | Sequence[str] | None
Scalar = float | torch.Tensor | None
Rows = torch.Tensor | Fp8Latent
Keys = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class Fp8Tensor(NamedTuple):
    """FP8 codes with their scales, as the next matrix product takes them.

    values  [T, H, D] float8_e4m3fn (or e4m3fnuz); of batched calls [B, T, H, D], whose tokens count as B*T
    scales  Fp8PerTensor: float32 []. Fp8PerGroup, by scale_layout, with G groups a token:
            "row" [T, G] · "col" [T, G], strides (1, T) · "col_tma" [T, G], strides (1, T rounded up to 4) ·
            "col_tma_packed" int32 [T, ceil(G/4)], strides (1, T rounded up to 4)
            A view of the buffer that docs/layouts.md describes; the column layouts are what DeepGEMM reads.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def flat(self) -> torch.Tensor:
        """The codes as [T, H*D]: the left operand of the next product."""
        return self.values if self.values.ndim == 2 else self.values.flatten(-2).flatten(0, -2)


Output = torch.Tensor | Fp8Tensor


def _output(results: list[torch.Tensor], spec: Any) -> tuple[Output, list[torch.Tensor]]:
    """The first result of an op, and the others."""
    if spec is None:
        return results[0], results[1:]
    values, scales = results[0], results[1]
    if isinstance(spec, Fp8PerGroup) and spec.scale_layout != "row":
        tokens = values.numel() // (values.shape[-1] * values.shape[-2]) if values.ndim == 4 else values.shape[0]
        scales = scales.t()[:tokens]
    return Fp8Tensor(values, scales), results[2:]


def _scale(spec: Any) -> Scalar:
    return spec.scale if isinstance(spec, Fp8PerTensor) else None


def mla_prefill(
    q: torch.Tensor,
    k: Keys,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    causal: bool = True,
    softmax_scale: Scalar = None,
    q_scale: Scalar = None,
    k_scale: Scalar = None,
    v_scale: Scalar = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    output_quant: Fp8PerTensor | Fp8PerGroup | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    compute: Literal["fp8", "bf16"] | None = None,
    implementation: Implementation = None,
) -> Output | tuple[Output, torch.Tensor]:
    """``jax_fp8attn.mla_prefill`` on tensors."""
    k_nope, k_rope = k if isinstance(k, tuple | list) else (k, None)
    state = (None, None) if initial_state is None else initial_state
    options = text(
        causal=causal, output_quant=output_quant, return_lse=return_lse, out_dtype=out_dtype, compute=compute,
        implementation=implementation,
    )  # fmt: skip
    values = [
        q, k_nope, k_rope, v, cu_seqlens_q, cu_seqlens_k, state[0], state[1], softmax_scale, q_scale, k_scale, v_scale,
        _scale(output_quant),
    ]  # fmt: skip
    out, rest = _output(_MLA(values, options), output_quant)
    return (out, rest[0]) if return_lse else out


_SCALES = ("softmax_scale", "q_scale", "k_scale", "v_scale", "output_scale")


def _run_mla(options: Options, *arrays: Any) -> Any:
    q, k_nope, k_rope, v, cu_q, cu_k, state_out, state_lse, softmax_scale, q_scale, k_scale, v_scale, scale = arrays
    options["output_quant"] = with_scale(options["output_quant"], scale)
    return fp8attn.mla_prefill(
        q, k_nope if k_rope is None else (k_nope, k_rope), v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        softmax_scale=softmax_scale, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
        initial_state=None if state_out is None else (state_out, state_lse), **options,
    )  # fmt: skip


def _fake_mla(options: Options, q: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    *lead, tokens, heads, _ = q.shape
    results = quantised(options, q, (*lead, tokens, heads, 128), torch.bfloat16)
    if options["return_lse"]:
        results.append(q.new_empty((*lead, heads, tokens), dtype=torch.float32))
    return results


_MLA = register(
    Op(
        "mla_prefill",
        ("q", "k", "k_rope", "v", "cu_seqlens_q", "cu_seqlens_k", "initial_state[0]", "initial_state[1]", *_SCALES),
        _run_mla,
        _fake_mla,
    )
)


def mla_prefill_chunked(
    q: torch.Tensor,
    k: Keys,
    v: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    kv_b_proj: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    context_lengths: torch.Tensor,
    workspace_tokens: int,
    softmax_scale: Scalar = None,
    q_scale: Scalar = None,
    k_scale: Scalar = None,
    v_scale: Scalar = None,
    output_quant: Fp8PerTensor | Fp8PerGroup | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    compute: Literal["fp8", "bf16"] | None = None,
    implementation: Implementation = None,
) -> Output | tuple[Output, torch.Tensor]:
    """``jax_fp8attn.mla_prefill_chunked`` on tensors, its context read by ``paged_latent_loader(cache, block_tables,
    kv_b_proj)``."""
    k_nope, k_rope = k if isinstance(k, tuple | list) else (k, None)
    options = text(
        workspace_tokens=workspace_tokens, output_quant=output_quant, return_lse=return_lse, out_dtype=out_dtype,
        compute=compute, implementation=implementation,
    )  # fmt: skip
    values = [
        q, k_nope, k_rope, v, cache, block_tables, kv_b_proj, cu_seqlens, context_lengths, softmax_scale, q_scale,
        k_scale, v_scale, _scale(output_quant),
    ]  # fmt: skip
    out, rest = _output(_CHUNKED(values, options), output_quant)
    return (out, rest[0]) if return_lse else out


def _run_chunked(options: Options, *arrays: Any) -> Any:
    q, k_nope, k_rope, v, cache, tables, kv_b_proj, cu_seqlens, lengths, softmax_scale, *scales = arrays
    options["output_quant"] = with_scale(options["output_quant"], scales[3])
    return fp8attn.mla_prefill_chunked(
        q, k_nope if k_rope is None else (k_nope, k_rope), v, fp8attn.paged_latent_loader(cache, tables, kv_b_proj),
        cu_seqlens=cu_seqlens, context_lengths=lengths, softmax_scale=softmax_scale, q_scale=scales[0],
        k_scale=scales[1], v_scale=scales[2], **options,
    )  # fmt: skip


_CHUNKED = register(
    Op(
        "mla_prefill_chunked",
        (
            *("q", "k", "k_rope", "v", "cache", "block_tables", "kv_b_proj", "cu_seqlens", "context_lengths"),
            *_SCALES,
        ),
        _run_chunked,
        _fake_mla,
    )
)


def merge_attn_states(
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    *,
    prefill_tokens_with_context: int | torch.Tensor | None = None,
    output_quant: Fp8PerTensor | Fp8PerGroup | None = None,
    output_scale: Scalar = None,
    lse_layout: Literal["HT", "TH"] = "HT",
    lse_base: Literal["e", "2"] = "e",
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = None,
) -> Output | tuple[Output, torch.Tensor]:
    """``jax_fp8attn.merge_attn_states`` on tensors. The result is new memory: there is no ``in_place``."""
    op, count = "merge_attn_states", prefill_tokens_with_context
    if isinstance(count, int) and isinstance(prefix_output, torch.Tensor) and not 0 <= count <= len(prefix_output):
        raise checks.invalid(op, "prefill_tokens_with_context", count, f"0 to T = {len(prefix_output)}")
    spec, scale = _merge_quant(op, output_quant, output_scale)
    options = text(
        output_quant=spec, lse_layout=lse_layout, lse_base=lse_base, return_lse=return_lse, out_dtype=out_dtype,
        implementation=implementation,
    )  # fmt: skip
    out, rest = _output(_MERGE([prefix_output, prefix_lse, suffix_output, suffix_lse, count, scale], options), spec)
    return (out, rest[0]) if return_lse else out


_E4M3 = Fp8PerTensor(None)


def _merge_quant(op: str, spec: Any, scale: Scalar) -> tuple[Any, Scalar]:
    if scale is None:
        return spec, _scale(spec)
    if spec is not None:
        raise checks.invalid(op, "output_scale", "given together with output_quant", "one of the two")
    return _E4M3, scale


def _run_merge(options: Options, *arrays: Any) -> Any:
    *states, count, scale = arrays
    options["output_quant"] = with_scale(options["output_quant"], scale)
    return fp8attn.merge_attn_states(*states, prefill_tokens_with_context=count, **options)


def _fake_merge(options: Options, output: torch.Tensor, lse: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    stack = output.ndim - 3
    results = quantised(options, output, output.shape[stack:], output.dtype)
    if options["return_lse"]:
        results.append(lse.new_empty(lse.shape[stack:]))
    return results


_MERGE = register(
    Op(
        "merge_attn_states",
        (
            *("prefix_output", "prefix_lse", "suffix_output", "suffix_lse"),
            *("prefill_tokens_with_context", "output_scale"),
        ),
        _run_merge,
        _fake_merge,
    )
)


def merge_attn_states_n(
    outputs: torch.Tensor,
    lses: torch.Tensor,
    *,
    output_quant: Fp8PerTensor | Fp8PerGroup | None = None,
    output_scale: Scalar = None,
    lse_layout: Literal["HT", "TH"] = "HT",
    lse_base: Literal["e", "2"] = "e",
    return_lse: bool = False,
    out_dtype: torch.dtype | None = None,
    implementation: Implementation = None,
) -> Output | tuple[Output, torch.Tensor]:
    """``jax_fp8attn.merge_attn_states_n`` on tensors."""
    spec, scale = _merge_quant("merge_attn_states_n", output_quant, output_scale)
    options = text(
        output_quant=spec, lse_layout=lse_layout, lse_base=lse_base, return_lse=return_lse, out_dtype=out_dtype,
        implementation=implementation,
    )  # fmt: skip
    out, rest = _output(_MERGE_N([outputs, lses, scale], options), spec)
    return (out, rest[0]) if return_lse else out


def _run_merge_n(options: Options, outputs: Any, lses: Any, scale: Any) -> Any:
    options["output_quant"] = with_scale(options["output_quant"], scale)
    return fp8attn.merge_attn_states_n(outputs, lses, **options)


_MERGE_N = register(Op("merge_attn_states_n", ("outputs", "lses", "output_scale"), _run_merge_n, _fake_merge))


def mask_empty_context_lse(
    lse: torch.Tensor, query_start_loc: torch.Tensor, context_start_loc: torch.Tensor
) -> torch.Tensor:
    """``jax_fp8attn.mask_empty_context_lse`` on tensors."""
    return _MASK([lse, query_start_loc, context_start_loc], "")[0]


_MASK = register(
    Op(
        "mask_empty_context_lse",
        ("lse", "query_start_loc", "context_start_loc"),
        lambda options, *arrays: fp8attn.mask_empty_context_lse(*arrays),
        lambda options, lse, *others: [lse.new_empty(lse.shape)],
    )
)


def quantize_fp8(x: torch.Tensor, spec: Fp8PerTensor | Fp8PerGroup) -> Fp8Tensor:
    """``jax_fp8attn.quantize_fp8`` on a tensor [T, K] or [T, H, D]; the scales as in ``Fp8Tensor``."""
    return _output(_QUANTIZE([x, _scale(spec)], text(output_quant=spec)), spec)[0]


def _fake_quantize(options: Options, x: torch.Tensor, scale: Any) -> list[torch.Tensor]:
    if x.ndim == 3:
        return quantised(options, x, x.shape, x.dtype)
    values, scales = quantised(options, x, (x.shape[0], 1, x.shape[1]), x.dtype)
    return [values.new_empty(x.shape), scales]


_QUANTIZE = register(
    Op(
        "quantize_fp8",
        ("x", "spec.scale"),
        lambda options, x, scale: fp8attn.quantize_fp8(x, with_scale(options["output_quant"], scale)),
        _fake_quantize,
    )
)


def sparse_prefill(
    q: Rows,
    prefix: Rows,
    prefix_indices: torch.Tensor,
    prefix_indptr: torch.Tensor,
    extend: Rows | None = None,
    extend_indices: torch.Tensor | None = None,
    extend_indptr: torch.Tensor | None = None,
    *,
    softmax_scale: Scalar = None,
    attn_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    precision: Literal["exact", "fp8"] = "exact",
    implementation: Implementation = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``jax_fp8attn.sparse_prefill`` on tensors; FP8 rows as an ``Fp8Latent`` of tensors."""
    options = text(return_lse=return_lse, out_dtype=out_dtype, precision=precision, implementation=implementation)
    lists = [prefix_indices, prefix_indptr, extend_indices, extend_indptr]
    results = _SPARSE([*_rows(q), *_rows(prefix), *_rows(extend), *lists, attn_sink, softmax_scale], options)
    return (results[0], results[1]) if return_lse else results[0]


def sparse_prefill_topk(
    q: Rows,
    prefix: Rows,
    indices: torch.Tensor,
    lengths: torch.Tensor | None = None,
    extend: Rows | None = None,
    extend_indices: torch.Tensor | None = None,
    extend_lengths: torch.Tensor | None = None,
    *,
    softmax_scale: Scalar = None,
    attn_sink: torch.Tensor | None = None,
    return_lse: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    precision: Literal["exact", "fp8"] = "exact",
    implementation: Implementation = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``jax_fp8attn.sparse_prefill_topk`` on tensors; FP8 rows as an ``Fp8Latent`` of tensors."""
    options = text(return_lse=return_lse, out_dtype=out_dtype, precision=precision, implementation=implementation)
    lists = [indices, lengths, extend_indices, extend_lengths]
    results = _TOPK([*_rows(q), *_rows(prefix), *_rows(extend), *lists, attn_sink, softmax_scale], options)
    return (results[0], results[1]) if return_lse else results[0]


def _rows(x: Rows | None) -> tuple[Any, Any, Any]:
    if isinstance(x, Fp8Latent):
        return x.nope, x.rope, x.scale
    return x, None, None


def _run_sparse(op: Any, options: Options, *arrays: Any) -> jax.Array | tuple[jax.Array, jax.Array]:
    def rows(first: int) -> Any:
        nope, rope, scale = arrays[first : first + 3]
        return nope if rope is None and scale is None else Fp8Latent(nope, rope, scale)

    *lists, sink, scale = arrays[9:]
    return op(
        rows(0), rows(3), lists[0], lists[1], rows(6), lists[2], lists[3], softmax_scale=scale, attn_sink=sink,
        **options,
    )  # fmt: skip


def _fake_sparse(options: Options, q: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    tokens, heads, _ = q.shape
    results = [q.new_empty((tokens, heads, 512), dtype=getattr(torch, options["out_dtype"]))]
    if options["return_lse"]:
        results.append(q.new_empty((heads, tokens), dtype=torch.float32))
    return results


_ROWS = tuple(f"{name}{part}" for name in ("q", "prefix", "extend") for part in ("", ".rope", ".scale"))
_SPARSE = register(
    Op(
        "sparse_prefill",
        (
            *_ROWS,
            *("prefix_indices", "prefix_indptr", "extend_indices", "extend_indptr", "attn_sink", "softmax_scale"),
        ),
        lambda options, *arrays: _run_sparse(fp8attn.sparse_prefill, options, *arrays),
        _fake_sparse,
    )
)
_TOPK = register(
    Op(
        "sparse_prefill_topk",
        (*_ROWS, "indices", "lengths", "extend_indices", "extend_lengths", "attn_sink", "softmax_scale"),
        lambda options, *arrays: _run_sparse(fp8attn.sparse_prefill_topk, options, *arrays),
        _fake_sparse,
    )
)
