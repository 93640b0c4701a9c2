"""Which implementations a contract suite runs over: those of this machine."""

import jax

from jax_fp8attn import dispatch

PORTABLE = ("xla", "reference")


def kernels(op: str) -> tuple[str, ...]:
    """Names whose platform is here; none on a CPU."""
    device = dispatch._describe(jax.devices()[0])
    return tuple(
        candidate.name
        for candidate in dispatch.CANDIDATES[op]
        if candidate.module is not None and device.platform in candidate.platforms
    )


def implementations(op: str) -> tuple[str, ...]:
    return (*kernels(op), *PORTABLE)
