"""Mosaic GPU kernels, one file an op and architecture."""

if __name__ != "jax_fp8attn.pallas":
    raise ImportError(f"import jax_fp8attn.pallas, not {__name__}: the folder is a part of the package jax_fp8attn")
