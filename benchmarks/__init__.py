"""Named shapes of real models, timing on a GPU, and what was measured."""

if __name__ != "jax_fp8attn.benchmarks":
    raise ImportError(f"import jax_fp8attn.benchmarks, not {__name__}: the folder is a part of the package jax_fp8attn")
