"""FP8 prefill kernels for JAX: attention, merging, sparse attention and gated delta nets."""

from jax_fp8attn import _source_tree, checks
from jax_fp8attn._version import VERSION
from jax_fp8attn.dispatch import explain
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.merge import mask_empty_context_lse, merge_attn_states, merge_attn_states_n
from jax_fp8attn.quantize import (
    Fp8Array,
    Fp8PerGroup,
    Fp8PerTensor,
    pack_ue8m0,
    quantize_fp8,
    to_mn_major_tma_aligned,
    unpack_ue8m0,
)

__version__ = VERSION

_source_tree.install()
del _source_tree

__all__ = [
    "Fp8Array",
    "Fp8PerGroup",
    "Fp8PerTensor",
    "InvalidInputError",
    "UnsupportedError",
    "checks",
    "explain",
    "mask_empty_context_lse",
    "merge_attn_states",
    "merge_attn_states_n",
    "pack_ue8m0",
    "quantize_fp8",
    "to_mn_major_tma_aligned",
    "unpack_ue8m0",
]
