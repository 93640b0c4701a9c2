"""Writes FlashInfer's gated delta rule for Hopper as programs that the benchmark of ``gdn_prefill`` runs from JAX.

    pip install "flashinfer-python==0.7.2.post1" "nvidia-cutlass-dsl[cu13]==4.8.1" "jax==0.11.2"
    python -m jax_fp8attn.benchmarks.flashinfer_gdn DIR

One program for each bf16 case, of the function that FlashInfer's ``chunk_gated_delta_rule`` is with
``use_qk_l2norm_in_kernel=True``: its kernels, launched as it launches them, and the exponential of g, for it takes the
decay. Below half as many (sequence, head) pairs as SMs that function cuts the sequences into chunks, and so do the
programs. No GPU is needed to write them; running them takes the library beside them and nothing else of FlashInfer.
"""

from __future__ import annotations

import argparse
import functools
import lzma
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax_fp8attn.benchmarks import models, peers

BLOCK = 64  # tokens of a tile of FlashInfer's kernels
# what FlashInfer and the compiler ask a GPU for; H100 and H200 answer the same
DEVICE_NAME, CAPABILITY, MULTIPROCESSORS, SHARED_MEMORY = "NVIDIA H200", (9, 0), 132, 228 * 1024
ROWS_LAST = (2, 3, 1, 0)  # [N, H, 64, 64] as [64, 64, H, N]: the order of axes in which TMA reads a matrix


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of peers")
    folder = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["CUTE_DSL_ARCH"] = "sm_90a"
    from cutlass.jax import find_cute_dsl_runtime_library

    for case in models.cases("gdn_prefill"):
        if case.variant == "bf16":
            file = folder / peers.flashinfer_program(case.shape)
            file.write_bytes(exported(case.shape))
            print(f"{file.name}  {file.stat().st_size} bytes  {case.name}")
    library = Path(find_cute_dsl_runtime_library())
    (folder / f"{library.name}.xz").write_bytes(lzma.compress(library.read_bytes()))


def exported(shape: dict[str, int]) -> bytes:
    """The program of a shape: (q, k, v, g, beta, offsets) -> (out, final states)."""
    from cutlass.jax import get_export_disabled_safety_checks

    rows = [jax.ShapeDtypeStruct((shape["T"], shape[n], shape["D"]), jnp.bfloat16) for n in ("Hk", "Hk", "Hv")]
    gates = [jax.ShapeDtypeStruct((shape["T"], shape["Hv"]), jnp.float32)] * 2
    offsets = jax.ShapeDtypeStruct((shape["B"] + 1,), jnp.int32)
    export = jax.export.export(jax.jit(_rule), platforms=["cuda"], disabled_checks=get_export_disabled_safety_checks())
    with mock.patch("cutlass.base_dsl.runtime.cuda.get_device_attribute", _attribute):
        return bytes(export(*rows, *gates, offsets).serialize())


def _attribute(attribute: Any, device_id: int = 0) -> int:
    """What the compiler would ask a GPU for."""
    if attribute.name != "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR":
        raise NotImplementedError(f"{attribute.name} of Hopper")
    return SHARED_MEMORY


def _rule(q: Any, k: Any, v: Any, g: Any, beta: Any, offsets: Any) -> tuple[Any, Any]:
    from flashinfer.gdn_kernels.delta_rule_dsl.varlen_helper import should_use_cp_host

    pairs = (offsets.shape[0] - 1) * v.shape[1]
    few = should_use_cp_host(pairs, MULTIPROCESSORS, DEVICE_NAME, device_capability=CAPABILITY)
    q, k = _normalized(q, k)
    return (_in_chunks if few else _whole)(q, k, v, jnp.exp(g), beta, offsets)


def _normalized(q: Any, k: Any) -> tuple[Any, Any]:
    """By FlashInfer's kernel, which takes rows."""
    from cutlass.jax import cutlass_call
    from flashinfer.gdn_kernels.qk_l2norm import _launch

    width = q.shape[-1]
    lanes, elements, rows_at_once = 16, 8, 4  # what FlashInfer takes for rows of 128 bf16

    def launch(stream: Any, *tensors: Any) -> None:
        _launch(*tensors, width, lanes, elements, rows_at_once, stream)

    rows = [x.reshape(-1, width) for x in (q, k)]
    results = cutlass_call(launch, output_shape_dtype=tuple(jax.typeof(x) for x in rows))(*rows)
    return tuple(y.reshape(x.shape) for x, y in zip((q, k), results, strict=True))


def _whole(*operands: Any) -> tuple[Any, Any]:
    """One kernel: a block of threads for a head of a sequence."""
    import torch
    from cutlass import BFloat16, Float32, Int32
    from flashinfer.gdn_kernels.delta_rule_dsl.delta_rule_sm90 import _FullyFusedDeltaRuleSm90

    sizes = _Sizes.of(*operands)
    kernel = _FullyFusedDeltaRuleSm90(True, True, False, False, BFloat16, cu_seqlens_dtype=torch.int32)

    def launch(stream: Any, q: Any, k: Any, v: Any, alpha: Any, beta: Any, offsets: Any, *results: Any) -> None:
        out, states, maps = results
        kernel(
            q, k, v, out, alpha, beta, states, None, None, None, None, maps, offsets, Float32(sizes.width**-0.5),
            *map(Int32, sizes.heads), Int32(sizes.sequences), Int32(1), Int32(0), sizes.sequences * sizes.v_heads,
            stream,
        )  # fmt: skip

    return _launched(launch, sizes, operands, ())


def _in_chunks(*operands: Any) -> tuple[Any, Any]:
    """Four kernels: inverses of tiles, what a chunk makes of a state, the states between chunks, the outputs."""
    from flashinfer.gdn_kernels.delta_rule_dsl import varlen_helper

    sizes = _Sizes.of(*operands)
    length = varlen_helper.choose_cp_chunk_len_host(
        sizes.length, sizes.v_heads, MULTIPROCESSORS, device_capability=CAPABILITY,
        total_seqlen=sizes.tokens, num_seqs=sizes.sequences, device_name=DEVICE_NAME,
    )  # fmt: skip
    bound = functools.partial(varlen_helper.chunk_bound_host, sizes.sequences, sizes.tokens)
    matrices = (
        jax.ShapeDtypeStruct((bound(BLOCK), sizes.v_heads, BLOCK, BLOCK), jnp.bfloat16),
        *[jax.ShapeDtypeStruct((bound(length), sizes.v_heads, sizes.width, sizes.width), jnp.float32)] * 3,
    )
    return _launched(_chunk_kernels(sizes, length, bound(BLOCK), bound(length)), sizes, operands, matrices)


def _chunk_kernels(sizes: _Sizes, length: int, blocks: int, chunks: int) -> Callable[..., None]:
    import torch
    from cutlass import BFloat16, Float32, Int32, cute
    from flashinfer.gdn_kernels.delta_rule_dsl import delta_rule_cp_sm90 as cp

    offset_type = {"cu_seqlens_dtype": torch.int32}
    inverses = cp.CPDeltaRuleTPrecomputeSm90(BFloat16, **offset_type)
    transitions = cp.CPDeltaRuleMNPrecomputeSm90(BFloat16, **offset_type)
    if sizes.v_heads <= 16:
        between = cp.CPDeltaRuleFixupSimtSm90(rows_per_cta=4 if sizes.v_heads <= 8 else 8, **offset_type)
    else:
        between = cp.CPDeltaRuleFixupHmmaSm90(**offset_type)
    outputs = cp.CPDeltaRulePrefillSm90(BFloat16, **offset_type)
    q_heads, k_heads, v_heads, all_heads = map(Int32, sizes.heads)

    def launch(stream: Any, q: Any, k: Any, v: Any, alpha: Any, beta: Any, offsets: Any, *results: Any) -> None:
        out, states, maps, inverse, transfer, local, fixed = results
        flat = lambda x: cute.make_tensor(x.iterator, cute.make_layout(cute.size(x)))
        in_sequence = Int32(-(-sizes.length // BLOCK)), Int32(sizes.sequences)
        inverses(k, beta, flat(inverse), offsets, k_heads, all_heads, Int32(blocks), *in_sequence, stream)
        in_sequence = Int32(-(-sizes.length // length)), Int32(sizes.sequences)
        transitions(
            k, v, inverse, alpha, flat(transfer), flat(local), offsets, Int32(length), k_heads, v_heads, all_heads,
            Int32(chunks), *in_sequence, stream,
        )  # fmt: skip
        between(
            transfer, local, None, None, flat(fixed), offsets, Int32(length), Int32(chunks), Int32(sizes.sequences),
            all_heads, stream,
        )  # fmt: skip
        outputs(
            q, k, v, inverse, out, alpha, states, flat(fixed), None, None, None, None, maps, offsets,
            Float32(sizes.width**-0.5), q_heads, k_heads, v_heads, all_heads, Int32(length), Int32(chunks),
            *in_sequence, Int32(1), Int32(0), stream,
        )  # fmt: skip

    return launch


class _Sizes(NamedTuple):
    tokens: int
    sequences: int
    k_heads: int
    v_heads: int
    width: int

    @classmethod
    def of(cls, q: Any, k: Any, v: Any, alpha: Any, beta: Any, offsets: Any) -> _Sizes:
        return cls(v.shape[0], offsets.shape[0] - 1, k.shape[1], *v.shape[1:])

    @property
    def length(self) -> int:
        """Of each sequence."""
        return self.tokens // self.sequences

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """Of q, of k, of v and of the states."""
        return self.k_heads, self.k_heads, self.v_heads, self.v_heads


def _launched(
    launch: Callable[..., None], sizes: _Sizes, operands: tuple[Any, ...], matrices: tuple[Any, ...]
) -> tuple[Any, Any]:
    """out and states; beside them ``launch`` gets a place for TMA descriptors, and one for ``matrices``."""
    from cutlass.jax import TensorSpec, cutlass_call

    q, k, v, alpha, beta, offsets = operands
    columns, as_given = TensorSpec(mode=(2, 0, 1)), TensorSpec()
    results = (
        jax.ShapeDtypeStruct(v.shape, v.dtype),
        jax.ShapeDtypeStruct((sizes.sequences, sizes.v_heads, sizes.width, sizes.width), jnp.float32),
        jax.ShapeDtypeStruct((MULTIPROCESSORS * 128,), jnp.uint8),
        *matrices,
    )
    call = cutlass_call(
        launch,
        output_shape_dtype=results,
        input_spec=(TensorSpec(mode=(0, 2, 1)), columns, columns, as_given, as_given, as_given),
        output_spec=(columns, as_given, as_given, *[TensorSpec(mode=ROWS_LAST)] * len(matrices)),
    )
    return call(q, k, v, alpha.reshape(-1), beta.reshape(-1), offsets)[:2]


if __name__ == "__main__":
    main()
