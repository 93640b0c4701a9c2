"""Host time of a call from PyTorch and of its parts, on small shapes; prints JSON. A GPU is not waited for."""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

import jax_fp8attn

CALLS, ROUNDS = 200, 11
BUDGET = 60.0  # microseconds of one call on a GPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if _has_cuda() else "cpu")
    options = parser.parse_args()
    import torch

    on_gpu = options.device != "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    calls = _calls(options.device)
    table = {name: _microseconds(call, wait) for name, call in calls.items()}
    worst = max(median for name, (median, _) in table.items() if name.startswith("op: "))
    report = {
        "version": jax_fp8attn.__version__,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "waited_for": not on_gpu,  # on a CPU a call returns when the result is there
        "microseconds": {name: {"median": median, "spread": spread} for name, (median, spread) in table.items()},
        "worst": worst,
        "ok": worst <= BUDGET if on_gpu else None,
    }
    print(json.dumps(report, indent=1))
    return int(report["ok"] is False)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _microseconds(call: Callable[[], Any], wait: Callable[[], Any]) -> tuple[float, float]:
    """Median and interquartile range over rounds of CALLS calls, the device idle before each round."""
    samples = []
    for _ in range(ROUNDS + 2):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append(1e6 * (time.perf_counter() - start) / CALLS)
    wait()
    first, median, third = statistics.quantiles(samples[2:], n=4)
    return round(median, 2), round(third - first, 2)


def _calls(device: str) -> dict[str, Callable[[], Any]]:
    """The ops with the smallest arguments that make sense, and the parts of one call."""
    import torch

    import jax_fp8attn.torch as bridge
    from jax_fp8attn.torch import calls, library, tensors
    from jax_fp8attn.torch.ops import _MERGE

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    q, k, v = normal(128, 2, 192), normal(128, 2, 192), normal(128, 2, 128)
    output, lse, scale = normal(16, 2, 128), normal(2, 16, dtype=torch.float32), torch.ones(1, device=device)
    cu = torch.tensor([0, 128], dtype=torch.int32, device=device)
    wide, rows, lists = normal(16, 2, 512), normal(64, 512), torch.zeros(16, 8, dtype=torch.int32, device=device)
    quant = bridge.Fp8PerGroup.deepgemm_sm90()
    merge = functools.partial(bridge.merge_attn_states, output, lse, output, lse, output_scale=scale, return_lse=True)
    values = [output, lse, output, lse, None, scale]
    options = library.text(
        output_quant=bridge.Fp8PerTensor(None), lse_layout="HT", lse_base="e", return_lse=True, out_dtype=None,
        implementation=None,
    )  # fmt: skip
    merge()
    place = tensors.place_of("benchmark", {"output": output})
    function = next(f for key, f in library._jitted.items() if key[:2] == ("merge_attn_states", options))
    arrays = [None if x is None else tensors.to_jax(x, place, place.order().xla) for x in values]
    results = jax.block_until_ready(function(*arrays))
    return {
        "op: merge_attn_states, FP8, with lse": merge,
        "op: mla_prefill, per-group FP8": lambda: bridge.mla_prefill(q, k, v, cu_seqlens_q=cu, output_quant=quant),
        "op: sparse_prefill_topk": lambda: bridge.sparse_prefill_topk(wide, rows, lists),
        "op: quantize_fp8": lambda: bridge.quantize_fp8(rows, quant),
        "as a custom op: merge_attn_states": lambda: torch.ops.jax_fp8attn.merge_attn_states(values, options),
        "part: options as a text": lambda: library.text(output_quant=quant, lse_layout="HT", return_lse=True),
        "part: streams put in order": place.order,
        "part: one tensor checked": lambda: tensors.ready("benchmark", "x", output, place),
        "part: one tensor to JAX": lambda: tensors.to_jax(output, place, place.order().xla),
        "part: the jitted function": lambda: function(*arrays),
        "part: one result to PyTorch": lambda: tensors.to_torch(results[0], place.order().dlpack),
        "part: all but the jitted function": lambda: calls.run("merge", _MERGE.arguments, values, lambda *_: results),
        "beside it: jax.dlpack.from_dlpack": lambda: jax.dlpack.from_dlpack(output),
        "beside it: an empty torch kernel": lambda: output.neg_(),
    }


if __name__ == "__main__":
    sys.exit(main())
