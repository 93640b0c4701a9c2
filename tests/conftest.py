"""Every test runs with eight host devices, so that sharding is tested on any machine."""

import os

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
for _name in ("JAX_FP8ATTN_IMPLEMENTATION", "JAX_FP8ATTN_FP8_PREFILL"):
    os.environ.pop(_name, None)
os.environ["JAX_FP8ATTN_TUNING"] = "0"  # what a user has measured changes no test
