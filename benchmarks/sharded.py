"""Context parallelism over N devices against one: ``python -m jax_fp8attn.benchmarks.sharded --devices 4``.

Every case is computed both ways and compared before anything is timed; a case whose gate fails gets no time. Prints one
JSON object a case, and writes them all with ``--out``. ``--small`` takes shapes for a dry run on host devices:

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m jax_fp8attn.benchmarks.sharded --small --devices 8
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_fp8attn import gdn_prefill, mla_prefill, quantize
from jax_fp8attn.sharding import gdn_prefill_cp, mla_prefill_cp

AXIS = "cp"
BY_TOKEN, WHOLE = PartitionSpec(AXIS), PartitionSpec()
ROUNDS = 11


@dataclasses.dataclass(frozen=True)
class Case:
    """``one`` computes on a device what ``parallel`` does inside shard_map; ``wanted`` is the speed-up on 4 GPUs."""

    name: str
    inputs: Callable[[], list[jax.Array]]
    one: Callable[..., Any]
    parallel: Callable[..., Any]
    bound: float  # of a row's relative difference
    wanted: float = 0.0


def mla_case(tokens: int, heads: int, **options: Any) -> Case:
    def inputs() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), 3)
        draw = lambda key, width: quantize.cast_fp8(jax.random.normal(key, (tokens, heads, width), jnp.bfloat16))
        return [draw(key, width) for key, width in zip(keys, (192, 192, 128), strict=True)]

    return Case(
        f"mla_prefill_cp T={tokens} H={heads}" + "".join(f" {k}={v}" for k, v in options.items()),
        inputs,
        lambda q, k, v: mla_prefill(q, k, v),
        lambda q, k, v: mla_prefill_cp(q, k, v, axis_name=AXIS, **options),
        bound=0.06,  # probabilities are rounded to FP8 relative to another maximum
        wanted=3.4,
    )


def gdn_case(tokens: int, heads: int, width: int = 128) -> Case:
    def inputs() -> list[jax.Array]:
        keys = jax.random.split(jax.random.key(0), 5)
        q, k, v = (jax.random.normal(key, (tokens, heads, width), jnp.bfloat16) for key in keys[:3])
        g, beta = (jax.random.uniform(key, (tokens, heads)) for key in keys[3:])
        return [q, k, v, -0.1 * g, beta]

    options = {"qk_l2norm": True, "return_final_state": False}
    return Case(
        f"gdn_prefill_cp T={tokens} H={heads}",
        inputs,
        functools.partial(gdn_prefill, **options),
        functools.partial(gdn_prefill_cp, axis_name=AXIS, **options),
        bound=0.02,
        wanted=2.0,
    )


def cases(small: bool) -> list[Case]:
    if small:
        return [mla_case(256, 2), mla_case(256, 2, layout="zigzag"), gdn_case(512, 2, 32)]
    sizes = [mla_case(tokens, 16) for tokens in (32768, 131072)]
    return [*sizes, mla_case(131072, 16, layout="zigzag"), gdn_case(65536, 8), gdn_case(524288, 8)]


def error_of(got: Any, want: Any) -> float:
    """The largest difference of a row, relative to the row; by blocks of rows."""
    worst = 0.0
    for first in range(0, want.shape[0], 4096):
        a, b = (np.asarray(x[first : first + 4096], np.float32) for x in (got, want))
        ratio = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), np.finfo(np.float32).tiny)
        worst = max(worst, float(np.nan_to_num(ratio, nan=np.inf).max()))
    return worst


def order_of(case: Case, tokens: int, devices: int) -> np.ndarray | None:
    """The order of tokens that a zig-zag layout wants."""
    if "zigzag" not in case.name:
        return None
    parts = np.arange(tokens).reshape(2 * devices, -1)
    return np.concatenate([parts[[r, 2 * devices - 1 - r]].reshape(-1) for r in range(devices)])


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The median of calls that are waited for one by one: of the slowest device, launches included."""
    jax.block_until_ready(call())
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


def measure(case: Case, mesh: Mesh, rounds: int) -> dict[str, Any]:
    """One row: the gate, then the times of both in turns."""
    inputs = case.inputs()
    order = order_of(case, inputs[0].shape[0], mesh.size)
    given = inputs if order is None else [x[order] for x in inputs]
    sharded = [jax.device_put(x, NamedSharding(mesh, BY_TOKEN)) for x in given]
    alone = [jax.device_put(x, mesh.devices.flat[0]) for x in inputs]
    parallel = jax.jit(jax.shard_map(case.parallel, mesh=mesh, in_specs=BY_TOKEN, out_specs=BY_TOKEN))
    one = jax.jit(case.one)
    got = np.asarray(parallel(*sharded))
    got = got if order is None else got[np.argsort(order)]
    error = error_of(got, np.asarray(one(*alone)))
    row = {"case": case.name, "devices": mesh.size, "error": error, "bound": case.bound, "passed": error <= case.bound}
    if row["passed"]:
        row["one_ms"] = milliseconds(lambda: one(*alone), rounds)
        row["parallel_ms"] = milliseconds(lambda: parallel(*sharded), rounds)
        row["speed_up"] = row["one_ms"] / row["parallel_ms"]
        row["wanted_on_4"] = case.wanted
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=0, help="how many; default all")
    parser.add_argument("--small", action="store_true", help="shapes for a dry run without a GPU")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    count = given.devices or jax.device_count()
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    rows = []
    for case in cases(given.small):
        if given.only in case.name:
            rows.append(measure(case, mesh, given.rounds))
            print(json.dumps(rows[-1]), flush=True)
    if given.out:
        device = jax.devices()[0]
        run = {"device": device.device_kind, "jax": jax.__version__, "small": given.small, "rows": rows}
        given.out.write_text(json.dumps(run, indent=1) + "\n")
    return 0 if rows and all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
