"""``explain``: the table of implementations for one op at a shape given on the command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp

from jax_fp8attn import dispatch
from jax_fp8attn.quantize import Fp8PerGroup

BF16 = jnp.bfloat16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096, help="query tokens (default %(default)s)")
    parser.add_argument("--keys", type=int, help="key tokens, or rows of the pool (default: as many as tokens)")
    parser.add_argument("--heads", type=int, default=16, help="query or state heads (default %(default)s)")
    parser.add_argument(
        "--entries", type=int, default=512, help="rows a token lists, sparse_prefill (default %(default)s)"
    )
    parser.add_argument("--fp8-output", action="store_true", help="ask for FP8 output per group (merge, mla)")


def run(options: argparse.Namespace) -> int:
    arguments, keywords = SHAPES[options.op](options)
    explanation = dispatch.explain(options.op, *arguments, **keywords)
    if not options.json:
        print(explanation)
        return 0
    rows = [{"name": row.name, "taken": row.taken, "reasons": list(row.reasons)} for row in explanation.rows]
    device = {"platform": explanation.device.platform, "kind": explanation.device.kind}
    print(
        json.dumps({"op": explanation.op, "device": device, "implementations": rows, "notes": list(explanation.notes)})
    )
    return 0


def _of(shape: tuple[int, ...], dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _quant(options: argparse.Namespace) -> dict[str, Any]:
    return {"output_quant": Fp8PerGroup.deepgemm_sm90()} if options.fp8_output else {}


def _mla(options: argparse.Namespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    t, h = options.tokens, options.heads
    s = options.keys or t
    return (_of((t, h, 192)), (_of((s, h, 128)), _of((s, 64))), _of((s, h, 128))), _quant(options)


def _merge(options: argparse.Namespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    out, lse = _of((options.tokens, options.heads, 128)), _of((options.heads, options.tokens), jnp.float32)
    return (out, lse, out, lse), _quant(options)


def _sparse(options: argparse.Namespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    t = options.tokens
    pool = _of((options.keys or t, 512))
    return (_of((t, options.heads, 512)), pool, _of((t, options.entries), jnp.int32)), {}


def _gdn(options: argparse.Namespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    t, h = options.tokens, options.heads
    key_heads = h // 4 if h % 4 == 0 else h
    gate = _of((t, h), jnp.float32)
    return (_of((t, key_heads, 128)), _of((t, key_heads, 128)), _of((t, h, 128)), gate, gate), {}


SHAPES = {"mla_prefill": _mla, "merge_attn_states": _merge, "sparse_prefill_topk": _sparse, "gdn_prefill": _gdn}
