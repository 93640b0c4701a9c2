"""Flax nnx modules around the ops: attention layers of DeepSeek-V2/V3, Qwen3-Next and DeepSeek-V4 for serving.

Every module is called with a packed batch and its cache, and returns its output and the new cache. Needs flax.
"""

try:
    import flax.nnx  # noqa: F401
except ImportError as error:
    raise ImportError(f"jax_fp8attn.nn needs flax: pip install 'flax>=0.12.12' ({error})") from error

from jax_fp8attn.nn.batch import PagedBatch, SlotBatch, WindowBatch
from jax_fp8attn.nn.checkpoint import load_checkpoint, to_checkpoint
from jax_fp8attn.nn.gated_delta_net import GatedDeltaNet, GatedDeltaNetCache, GatedDeltaNetConfig
from jax_fp8attn.nn.mla import MLAConfig, MLAttention
from jax_fp8attn.nn.rope import Rope, Yarn
from jax_fp8attn.nn.sparse_mla import SparseMLACache, SparseMLAConfig, SparseMLAttention

__all__ = [
    "GatedDeltaNet",
    "GatedDeltaNetCache",
    "GatedDeltaNetConfig",
    "MLAConfig",
    "MLAttention",
    "PagedBatch",
    "Rope",
    "SlotBatch",
    "SparseMLACache",
    "SparseMLAConfig",
    "SparseMLAttention",
    "WindowBatch",
    "Yarn",
    "load_checkpoint",
    "to_checkpoint",
]
