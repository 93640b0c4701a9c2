"""Vendor kernels behind XLA custom calls, one file a vendor and op."""

if __name__ != "jax_fp8attn.custom_calls":
    raise ImportError(
        f"import jax_fp8attn.custom_calls, not {__name__}: the folder is a part of the package jax_fp8attn"
    )
