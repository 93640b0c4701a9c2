"""What differs between jax 0.11.2 and 0.12, in one place."""

from __future__ import annotations

from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu


def store(ref: Any, value: Any) -> None:
    """Stores to global memory without the sector checks of 0.12, which refuse narrow stores."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
