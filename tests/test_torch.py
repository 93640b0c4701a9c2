"""The PyTorch bridge: R18. Runs where PyTorch is installed."""

import dataclasses
import gc
import importlib.util
import logging
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch", reason="needs PyTorch: pip install 'jax_fp8attn[torch]'")

import torch

import jax_fp8attn as fp8attn
import jax_fp8attn.torch as bridge
from jax_fp8attn import Fp8Array, Fp8Latent, Fp8PerGroup, Fp8PerTensor, InvalidInputError, UnsupportedError
from jax_fp8attn.torch import calls, gdn, library, ops, streams, tensors

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
CPU = torch.device("cpu")
OPS = (
    *(x for x in vars(ops).values() if isinstance(x, library.Op)),
    *(x for x in vars(gdn).values() if isinstance(x, library.Op)),
)
EIGHT_BITS = sorted(name for name in tensors.DTYPES.values() if name.startswith("float8"))


@pytest.fixture(autouse=True, scope="module")
def quick() -> Any:
    """Programs are compiled often here, and run once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def to_tensor(x: np.ndarray, device: Any = CPU) -> torch.Tensor:
    """A tensor of its own, by bytes: numpy and torch share no 8-bit floats."""
    x = np.ascontiguousarray(x)
    if x.dtype == bool:
        return torch.tensor(x.tolist(), dtype=torch.bool, device=device)
    dtype = getattr(torch, x.dtype.name)
    raw = torch.from_numpy(x.reshape(-1).view(np.uint8).copy())
    return raw.view(dtype).reshape(x.shape).to(device)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """Its bytes [..., itemsize]."""
    flat = x.detach().contiguous().cpu().reshape(-1)
    return flat.view(torch.uint8).numpy().reshape(*x.shape, x.element_size())


def raw(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(*x.shape, x.itemsize)


def convert(tree: Any, leaf: Callable[[np.ndarray], Any]) -> Any:
    return jax.tree.map(lambda x: leaf(x) if isinstance(x, np.ndarray) else x, tree)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, its arrays as numpy."""

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    torch_options: dict[str, Any] = dataclasses.field(default_factory=dict)  # where the two differ

    def tensors(self, device: Any = CPU) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, options = convert((self.args, {**self.options, **self.torch_options}), lambda x: to_tensor(x, device))
        return args, options

    def bridge(self, device: Any = CPU) -> Any:
        args, options = self.tensors(device)
        return getattr(bridge, self.name)(*args, **options)

    def jax(self) -> Any:
        args, options = convert((self.args, self.options), jnp.asarray)
        return getattr(fp8attn, self.name)(*args, **options)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(*shape: int, dtype: Any = BF16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def mla(tokens: int = 9, keys: int = 14, heads: int = 2, dtype: Any = BF16) -> tuple[np.ndarray, ...]:
    shapes = (tokens, heads, 192), (keys, heads, 192), (keys, heads, 128)
    return tuple(normal(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes))


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def states(tokens: int = 6, heads: int = 2, width: int = 128, dtype: Any = BF16) -> tuple[np.ndarray, ...]:
    lse = normal(heads, tokens, dtype=np.float32, seed=3)
    lse[0, :2] = -np.inf, np.inf
    outputs = (normal(tokens, heads, width, dtype=dtype, seed=n) for n in (4, 5))
    return next(outputs), lse, next(outputs), lse[:, ::-1].copy()


def latent(*lead: int, group: int = 64, scale: Any = np.uint8) -> Fp8Latent:
    codes = rng().integers(0, 120, (*lead, 448)).astype(np.uint8).view(E4M3)
    exponent = rng().integers(118, 126, (*lead, 448 // group)).astype(np.uint8)
    if scale is np.float32:
        exponent = np.exp2(exponent.astype(np.float32) - 127)
    return Fp8Latent(codes, normal(*lead, 64), exponent.view(scale) if scale is not np.float32 else exponent)


def gdn_tensors(tokens: int = 70, heads: tuple[int, int] = (2, 4), dtype: Any = BF16) -> tuple[np.ndarray, ...]:
    q, k = (normal(tokens, heads[0], 16, dtype=dtype, seed=n) for n in (1, 2))
    gates = -np.abs(normal(tokens, heads[1], dtype=np.float32, seed=4))
    return q, k, normal(tokens, heads[1], 24, dtype=dtype, seed=3), gates, np.exp(gates)


POOL_HEADS = dict(num_q_heads=2, num_k_heads=2, num_v_heads=4)


def pool_call(tokens: int = 150, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    per_token = (normal(tokens, 4, dtype=BF16, seed=n) for n in (2, 3))
    per_head = (normal(4, dtype=np.float32, seed=n) for n in (4, 5))
    pool = normal(7, 4, 24, 16, dtype=dtype, seed=6)
    return normal(tokens, 64 + 96, seed=1), *per_token, *per_head, pool, int32(5, -1, 2), np.array([True, True, False])


def group(columns: int = 32, layout: str = "col_tma", form: str = "float32") -> Fp8PerGroup:
    return Fp8PerGroup(columns, form, layout)


def mla_cases() -> dict[str, Case]:
    q, k, v = mla()
    cu = dict(cu_seqlens_q=int32(0, 4, 4, 9), cu_seqlens_k=int32(0, 6, 8, 14))
    pair = (normal(14, 2, 128, seed=8), normal(14, 64, seed=9))
    state = (normal(9, 2, 128, dtype=np.float32, seed=10), normal(2, 9, dtype=np.float32, seed=11))
    float16 = ({"out_dtype": jnp.float16}, {"out_dtype": torch.float16})
    cache = dict(cu_seqlens=int32(0, 4, 9), context_lengths=int32(5, 0), workspace_tokens=4)
    paged = normal(3, 4, 32 + 64, seed=12), int32(0, 2, 1, 1).reshape(2, 2), normal(32, 2, 256, seed=13)
    return {
        "mla": Case("mla_prefill", (q, k, v), dict(return_lse=True, **cu)),
        "mla fp8": Case("mla_prefill", tuple(x.astype(E4M3) for x in (q, k, v)), cu | float16[0], float16[1]),
        "mla pair": Case("mla_prefill", (q, pair, v), dict(causal=False, softmax_scale=0.125, v_scale=np.float32([2]), **cu)),
        "mla state": Case("mla_prefill", (q, k, v), dict(initial_state=state, output_quant=Fp8PerTensor(0.25), **cu)),
        "mla batched": Case(
            "mla_prefill",
            tuple(np.stack([x, x]) for x in mla(5, 5)),
            dict(return_lse=True, output_quant=group(128, "col_tma_packed", "ue8m0")),
        ),
        "mla chunked": Case(
            "mla_prefill_chunked", mla(9, 9), dict(return_lse=True, output_quant=group(64, "row"), **cache),
            dict(cache=paged[0], block_tables=paged[1], kv_b_proj=paged[2]),
        ),
    }  # fmt: skip


def merge_cases() -> dict[str, Case]:
    nary = normal(3, 6, 2, 64, seed=1), normal(3, 2, 6, dtype=np.float32, seed=2)
    transposed = [x.T.copy() if x.ndim == 2 else x for x in states()]
    return {
        "merge": Case("merge_attn_states", states(), dict(return_lse=True)),
        "merge count": Case("merge_attn_states", states(dtype=np.float32), dict(prefill_tokens_with_context=4)),
        "merge scale": Case("merge_attn_states", states(), dict(output_scale=np.float32([0.5]))),
        "merge number": Case("merge_attn_states", states(dtype=np.float16), dict(output_scale=0.1, return_lse=True)),
        "merge fnuz": Case("merge_attn_states", states(), dict(output_quant=Fp8PerTensor(0.5, jnp.float8_e4m3fnuz))),
        **{
            f"merge {layout}": Case("merge_attn_states", states(width=256), dict(output_quant=group(128, layout, form)))
            for layout, form in (("row", "ue8m0"), ("col", "float32"), ("col_tma", "float32"))
        },
        "merge packed": Case(
            "merge_attn_states", states(width=256), dict(output_quant=Fp8PerGroup.deepgemm_sm100(), return_lse=True)
        ),
        "merge TH": Case(
            "merge_attn_states", tuple(transposed), dict(lse_layout="TH", lse_base="2", return_lse=True, implementation=("pallas", "xla"))
        ),
        "merge n": Case("merge_attn_states_n", nary, dict(return_lse=True, output_quant=group(64))),
        "mask": Case(
            "mask_empty_context_lse",
            (normal(2, 6, dtype=np.float32), int32(0, 2, 5, 6), int32(0, 3, 3, 9)), {},
        ),
        "quantize": Case("quantize_fp8", (normal(5, 256, dtype=np.float32), group(128)), {}),
        "quantize 3d": Case("quantize_fp8", (normal(5, 2, 64), Fp8PerTensor(np.float32([[0.25]]))), {}),
    }  # fmt: skip


def sparse_cases() -> dict[str, Case]:
    q, tokens = normal(3, 2, 512), 3
    lists = int32(4, 0, -1, 9, 1, 1, 77), int32(0, 2, 2, 7)
    extend = normal(5, 512, dtype=np.float32, seed=2), int32(0, 4, 2), int32(0, 1, 2, 3)
    matrix = rng().integers(-1, 12, (tokens, 6)).astype(np.int32)
    e8m0 = getattr(ml_dtypes, "float8_e8m0fnu")
    return {
        "sparse": Case("sparse_prefill", (q, latent(10), *lists), dict(return_lse=True)),
        "sparse two": Case(
            "sparse_prefill", (latent(3, 2), normal(10, 512, seed=1), *lists, *extend),
            dict(attn_sink=normal(2, dtype=np.float32), softmax_scale=0.05, out_dtype=jnp.float32), dict(out_dtype=torch.float32),
        ),
        "topk": Case("sparse_prefill_topk", (q, latent(10, group=32, scale=e8m0), matrix, int32(3, 9, 0)), {}),
        "topk two": Case(
            "sparse_prefill_topk",
            (q, latent(10, scale=np.float32), matrix, None, normal(5, 512, seed=2), matrix[:, :2].copy()), dict(return_lse=True),
        ),
    }  # fmt: skip


def gdn_cases() -> dict[str, Case]:
    operands, cu = gdn_tensors(), int32(0, 66, 66, 70)
    state = normal(3, 4, 24, 16, seed=7)
    combine = [(normal(2, 4, 4, dtype=np.float32, seed=n), normal(2, 4, 5, dtype=np.float32, seed=n)) for n in (1, 2)]
    return {
        "gdn": Case("gdn_prefill", operands, dict(cu_seqlens=cu, initial_state=state, checkpoint_every=64)),
        "gdn out": Case("gdn_prefill", operands, dict(return_final_state=False, qk_l2norm=True, scale=0.5)),
        "gdn batched": Case(
            "gdn_prefill", tuple(np.stack([x, x]) for x in gdn_tensors(65)),
            dict(state_layout="kv", checkpoint_every=64, out_dtype=jnp.float32), dict(out_dtype=torch.float32),
        ),
        "gdn transition": Case("gdn_transition", gdn_tensors()[1:], dict(cu_seqlens=cu)),
        "gdn combine": Case("gdn_combine", tuple(combine), {}),
    }  # fmt: skip


CASES = {**mla_cases(), **merge_cases(), **sparse_cases(), **gdn_cases()}


def same(got: Any, wanted: Any) -> None:
    """Bit for bit, in order; an Fp8Tensor holds a view of the Fp8Array's buffer of scales."""
    if isinstance(wanted, Fp8Array):
        assert isinstance(got, bridge.Fp8Tensor)
        same(got.values, wanted.values)
        grouped = isinstance(wanted.spec, Fp8PerGroup) and wanted.spec.scale_layout != "row"
        same(got.scales, np.asarray(wanted.scales).T[: wanted.num_tokens] if grouped else wanted.scales)
        if grouped:
            assert got.scales.stride() == (1, wanted.scales.shape[1])
        np.testing.assert_array_equal(to_numpy(got.flat), raw(wanted.flat))
        return
    if isinstance(wanted, tuple | list):
        assert isinstance(got, tuple) and len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            same(one, other)
        return
    assert str(got.dtype) == f"torch.{np.asarray(wanted).dtype.name}"
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(to_numpy(got), raw(wanted))


def wanted(case: Case) -> Any:
    if case.name != "mla_prefill_chunked":
        return case.jax()
    cache = convert([case.torch_options[n] for n in ("cache", "block_tables", "kv_b_proj")], jnp.asarray)
    args, options = convert((case.args, case.options), jnp.asarray)
    return fp8attn.mla_prefill_chunked(*args, fp8attn.paged_latent_loader(*cache), **options)


@pytest.mark.parametrize("name", CASES)
def test_op_is_the_jax_op(name: str) -> None:
    """Every op, bit for bit; a second call changes nothing, and no result shares memory with an argument."""
    case = CASES[name]
    args, options = case.tensors()
    inputs = [x for x in jax.tree.leaves((args, options)) if isinstance(x, torch.Tensor)]
    before = [to_numpy(x).copy() for x in inputs]
    expected = wanted(case)
    for _ in range(2):
        result = getattr(bridge, case.name)(*args, **options)
        same(result, expected)
        pointers = {x.untyped_storage().data_ptr() for x in jax.tree.leaves(result)}
        assert not pointers & {x.untyped_storage().data_ptr() for x in inputs}
    for x, bytes_before in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(to_numpy(x), bytes_before)


@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_break(name: str) -> None:
    case = CASES[name]
    args, options = case.tensors()
    function = getattr(bridge, case.name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: function(*given, **options), fullgraph=True, backend="aot_eager")
    result, eager = compiled(*args), function(*args, **options)
    for one, other in zip(jax.tree.leaves(result), jax.tree.leaves(eager), strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
