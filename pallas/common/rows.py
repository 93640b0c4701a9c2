"""Register layouts in which a row lies in neighbouring lanes: whole-row loads and stores, reductions in one warp."""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax.experimental.mosaic.gpu import fragmented_array

WARPS = 4
LANES = 32


def lanes_per_row(width: int, vector: int) -> int:
    return width // vector


def rows_per_step(width: int, vector: int) -> int:
    """Rows that a warpgroup holds with ``vector`` elements a lane."""
    return WARPS * LANES // lanes_per_row(width, vector)


def row_layout(width: int, vector: int) -> plgpu.Layout:
    """[rows, width] with ``vector`` contiguous elements a lane; rows a multiple of ``rows_per_step``."""
    rows = LANES // lanes_per_row(width, vector)
    if rows == 1:
        return plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, width), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
        )
    tiling = plgpu.Tiling(((WARPS * rows, width), (rows, width), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def single_row_layout(width: int, vector: int) -> plgpu.Layout:
    """[1, width]: every warp holds the whole row, several times over when it is short."""
    lanes = lanes_per_row(width, vector)
    lane_dims = (-2,) if lanes == LANES else (fragmented_array.Replicated(LANES // lanes), -2)
    tiling = plgpu.Tiling(((1, width), (vector,)))
    return plgpu.Layout.TILED(
        tiling, warp_dims=(fragmented_array.Replicated(WARPS),), lane_dims=lane_dims, vector_dim=-1
    )
