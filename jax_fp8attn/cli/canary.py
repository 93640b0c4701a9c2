"""A kernel with a planted fault, for ``check --sanitize``: a sanitizer that does not report it sees none of ours.

memcheck must see a store far behind the end of a buffer, in a kernel with the prefix by which the sanitizer picks ours.
synccheck has no canary: it did not report a barrier that half the warps of a block leave out on an H200.

``python -m jax_fp8attn.cli.canary TOOL`` runs one and exits with 0 if a GPU took it, whatever became of it: the error
code must come from the sanitizer.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

BUFFER = 128  # float32 elements
BEYOND = 1 << 28  # elements; 1 GiB, farther than any allocation of the process reaches


def out_of_bounds() -> jax.Array:
    return _kernel()(jnp.array([BEYOND], jnp.int32))


def _kernel() -> Any:
    def fp8attn_canary(place_ref: Any, out_ref: Any) -> None:
        out_ref[place_ref[0]] = jnp.float32(1)

    out = jax.ShapeDtypeStruct((BUFFER,), jnp.float32)
    return jax.jit(plgpu.kernel(fp8attn_canary, out_type=out, grid=(1,), grid_names=("block",)))


FAULTS = {"memcheck": out_of_bounds}


def main(tool: str) -> int:
    if jax.devices()[0].platform != "gpu":
        print("the canary needs a GPU")
        return 1
    try:
        FAULTS[tool]().block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # the sanitizer ends a kernel at its fault
        print(f"canary: {error}".splitlines()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
