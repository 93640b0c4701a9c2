"""Implementations in plain jax.numpy: they take every valid problem on every platform."""
