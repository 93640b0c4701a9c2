"""FP8 prefill kernels for JAX: attention, merging, sparse attention and gated delta nets."""

from jax_fp8attn import _source_tree, checks
from jax_fp8attn._version import VERSION
from jax_fp8attn.dispatch import explain
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.gdn_prefill import gdn_combine, gdn_metadata, gdn_prefill, gdn_prefill_pool, gdn_transition
from jax_fp8attn.latent import (
    Fp8Latent,
    dequantize_latent,
    from_flashmla_pages,
    pack_aiter,
    quantize_latent,
    to_flashmla_pages,
    unpack_aiter,
)
from jax_fp8attn.merge import mask_empty_context_lse, merge_attn_states, merge_attn_states_n
from jax_fp8attn.mla_chunked import mla_prefill_chunked, paged_latent_loader
from jax_fp8attn.mla_prefill import mla_prefill
from jax_fp8attn.quantize import (
    Fp8Array,
    Fp8PerGroup,
    Fp8PerTensor,
    pack_ue8m0,
    quantize_fp8,
    to_mn_major_tma_aligned,
    unpack_ue8m0,
)
from jax_fp8attn.sparse_prefill import sparse_prefill, sparse_prefill_topk

__version__ = VERSION

_source_tree.install()
del _source_tree

__all__ = [
    "Fp8Array",
    "Fp8Latent",
    "Fp8PerGroup",
    "Fp8PerTensor",
    "InvalidInputError",
    "UnsupportedError",
    "checks",
    "dequantize_latent",
    "explain",
    "from_flashmla_pages",
    "gdn_combine",
    "gdn_metadata",
    "gdn_prefill",
    "gdn_prefill_pool",
    "gdn_transition",
    "mask_empty_context_lse",
    "merge_attn_states",
    "merge_attn_states_n",
    "mla_prefill",
    "mla_prefill_chunked",
    "pack_aiter",
    "pack_ue8m0",
    "paged_latent_loader",
    "quantize_fp8",
    "quantize_latent",
    "sparse_prefill",
    "sparse_prefill_topk",
    "to_flashmla_pages",
    "to_mn_major_tma_aligned",
    "unpack_aiter",
    "unpack_ue8m0",
]
