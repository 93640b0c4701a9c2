"""The ops for PyTorch: the same names and arguments, torch tensors in place of arrays, no copy on the way.

Each function is documented at its namesake in ``jax_fp8attn``; what differs, and what is promised about memory, streams
and ``torch.compile``, is in docs/torch.md.
"""

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ImportError("jax_fp8attn.torch needs PyTorch 2.10 or newer: pip install 'jax_fp8attn[torch]'") from error

from jax_fp8attn.latent import Fp8Latent
from jax_fp8attn.quantize import Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.torch.calls import apply
from jax_fp8attn.torch.gdn import (
    gdn_combine,
    gdn_metadata,
    gdn_prefill,
    gdn_prefill_pool,
    gdn_transition,
)
from jax_fp8attn.torch.ops import (
    Fp8Tensor,
    mask_empty_context_lse,
    merge_attn_states,
    merge_attn_states_n,
    mla_prefill,
    mla_prefill_chunked,
    quantize_fp8,
    sparse_prefill,
    sparse_prefill_topk,
)

__all__ = [
    "Fp8Latent",
    "Fp8PerGroup",
    "Fp8PerTensor",
    "Fp8Tensor",
    "apply",
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
    "quantize_fp8",
    "sparse_prefill",
    "sparse_prefill_topk",
]
