"""The PyTorch bridge: R18. Runs where PyTorch is installed."""

import dataclasses
import gc
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
from jax_fp8attn.torch import gdn, library, ops, streams, tensors

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
CPU = torch.device("cpu")
OPS = (
    *(x for x in vars(ops).values() if isinstance(x, library.Op)),
    *(x for x in vars(gdn).values() if isinstance(x, library.Op)),
)
EIGHT_BITS = sorted(name for name in tensors.DTYPES.values() if name.startswith("float8"))


@pytest.fixture(autouse=True)
def place(request: pytest.FixtureRequest) -> Any:
    """JAX on the device of the test's tensors. Programs for a CPU are compiled often here and run once."""
    on_cpu = request.cls is None or request.cls.__name__ != "TestHardware"
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", on_cpu or before)
    with jax.default_device(jax.devices("cpu" if on_cpu else "gpu")[0]):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def to_tensor(x: np.ndarray, device: Any = CPU) -> torch.Tensor:
    """A tensor of its own, by bytes: numpy and torch share no 8-bit floats."""
    x = np.ascontiguousarray(x)
    if x.dtype == bool:
        return torch.tensor(x.tolist(), dtype=torch.bool, device=device)
    dtype = getattr(torch, x.dtype.name)
    if not x.size:
        return torch.zeros(x.shape, dtype=dtype, device=device)
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
    return normal(tokens, 64 + 96, seed=1), *per_token, *per_head, pool, int32(5, 99, 2), np.array([True, True, False])


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
        "mla pair": Case(
            "mla_prefill", (q, pair, v), cu | dict(causal=False, softmax_scale=0.1, v_scale=np.float32([2]))
        ),
        "mla state": Case("mla_prefill", (q, k, v), cu | dict(initial_state=state, output_quant=Fp8PerTensor(0.25))),
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
            "merge_attn_states", tuple(transposed),
            dict(lse_layout="TH", lse_base="2", return_lse=True, implementation=("pallas", "xla")),
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
    e8m0 = ml_dtypes.float8_e8m0fnu
    return {
        "sparse": Case("sparse_prefill", (q, latent(10), *lists), dict(return_lse=True)),
        "sparse two": Case(
            "sparse_prefill", (latent(3, 2), normal(10, 512, seed=1), *lists, *extend),
            dict(attn_sink=normal(2, dtype=np.float32), softmax_scale=0.05, out_dtype=jnp.float32),
            dict(out_dtype=torch.float32),
        ),
        "topk": Case("sparse_prefill_topk", (q, latent(10, group=32, scale=e8m0), matrix, int32(3, 9, 0)), {}),
        "topk two": Case(
            "sparse_prefill_topk",
            (q, latent(10, scale=np.float32), matrix, None, normal(5, 512, seed=2), matrix[:, :2].copy()),
            dict(return_lse=True),
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


SLOW = ("gdn out", "gdn batched", "mla state")  # whose forms others have, too


def marked(names: Any, slow: tuple[str, ...] = SLOW) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in names]


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


@pytest.mark.parametrize("name", marked(CASES, (*SLOW, "mla chunked")))
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


@pytest.mark.parametrize("name", marked(CASES))
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


def arguments(name: str) -> tuple[library.Op, list[Any], str]:
    """What the op of a case gets, taken from its call."""
    seen: list[Any] = []

    def note(op: library.Op, values: Any, options: str) -> Any:
        seen.append((op, library._as_tensors(values), options))
        return op.run(values, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.Op, "__call__", note)
        CASES[name].bridge()
    return seen[0]


CHECKED = (
    *("mla", "mla batched", "mla chunked", "merge packed", "merge number", "merge n", "mask", "quantize"),
    *("quantize 3d", "sparse two", "topk two", "gdn", "gdn batched", "gdn transition", "gdn combine"),
)


class TestCustomOps:
    @pytest.mark.parametrize("name", marked(CHECKED))
    def test_opcheck(self, name: str) -> None:
        """Schema, shapes of the fake implementation, static and dynamic: by PyTorch's own check."""
        op, values, options = arguments(name)
        tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if not any("float8" in str(x.dtype) for x in values if x is not None):  # which PyTorch cannot compare
            tests.append("test_schema")
        torch.library.opcheck(library._REGISTERED[op.name], (values, options), test_utils=tests)

    def test_every_op_is_checked(self) -> None:
        names = {CASES[name].name for name in CHECKED} | {"gdn_metadata", "gdn_prefill_pool"}
        assert names == {op.name for op in OPS}
        assert names == set(bridge.__all__) - {"Fp8Latent", "Fp8PerGroup", "Fp8PerTensor", "Fp8Tensor", "apply"}

    def test_opcheck_sees_a_wrong_shape(self, monkeypatch: pytest.MonkeyPatch) -> None:
        op, values, options = arguments("mask")
        wrong = lambda options, lse, *others: [lse.new_empty(lse.shape[::-1])]
        bad = dataclasses.replace(op, name="mask_wrong", fake=wrong)
        monkeypatch.setattr(library, "_REGISTERED", {})
        library.register(bad)
        with pytest.raises(Exception, match=r"(?i)shape|size"):
            torch.library.opcheck(library._REGISTERED[bad.name], (values, options))

    def test_dynamic_shapes_compile_once(self) -> None:
        """The number of tokens is symbolic in the graph, padded scale buffers included."""
        graphs = []
        torch._dynamo.reset()

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        quant = Fp8PerGroup(32, "float32", "col_tma")

        @torch.compile(fullgraph=True, dynamic=True, backend=backend)
        def function(output: torch.Tensor, lse: torch.Tensor, count: int) -> Any:
            merged = bridge.merge_attn_states(
                output, lse, output, lse, output_quant=quant, prefill_tokens_with_context=count
            )
            return merged.values.float() * 2, merged.scales

        for tokens, count in ((5, 2), (6, 3), (9, 9)):
            case = Case("merge_attn_states", states(tokens, width=64), dict(output_quant=quant))
            (output, lse, *_), _ = case.tensors()
            got = function(output, lse, count)
            expected = bridge.merge_attn_states(
                output, lse, output, lse, output_quant=quant, prefill_tokens_with_context=count
            )
            torch.testing.assert_close(got[1], expected.scales, rtol=0, atol=0)
            assert got[1].stride() == expected.scales.stride()
        assert len(graphs) == 1
        assert [node.target for node in graphs[0].graph.nodes if "jax_fp8attn" in str(node.target)] == [
            torch.ops.jax_fp8attn.merge_attn_states.default
        ]

    def test_under_autograd(self) -> None:
        """No derivative: an error, not a wrong zero."""
        op, values, options = arguments("mask")
        values[0].requires_grad_()
        with pytest.raises(RuntimeError, match="autograd"):
            library._REGISTERED[op.name](values, options)[0].sum().backward()


def bridged(x: torch.Tensor) -> tuple[int, Any]:
    """The address that XLA reads, and the array."""
    place = tensors.place_of("test", {"x": x})
    array = tensors.to_jax(tensors.ready("test", "x", x, place), place, place.order().xla)
    return array.unsafe_buffer_pointer(), array


VIEWS = {
    "contiguous": (lambda x: x, True),
    "rows from 16 on": (lambda x: x[16:], True),
    "length one axes": (lambda x: x[:, None].as_strided((64, 1, 4, 32), (128, 7, 32, 1)), True),
    "transposed": (lambda x: x.transpose(0, 1), False),
    "heads of a wider tensor": (lambda x: x[..., :16], False),
    "every other row": (lambda x: x[::2], False),
    "broadcast": (lambda x: x[:1].expand(5, 4, 32), False),
    "one element on": (lambda x: x.reshape(-1)[1:65].reshape(2, 32), False),
}


class TestMemory:
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32"])
    def test_views(self, view: str, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
        """No copy where the memory can be read as it is; else one, which the log says, once."""
        make, shared = VIEWS[view]
        x = make(torch.randn(64, 4, 32).to(getattr(torch, dtype)))
        tensors._say_once.cache_clear()
        with caplog.at_level(logging.WARNING, "jax_fp8attn"):
            address, array = bridged(x)
            bridged(x)
        np.testing.assert_array_equal(raw(array), to_numpy(x))
        assert (address == x.data_ptr()) is shared
        said = [r.message.count("is copied in every such call") for r in caplog.records]
        assert said == ([] if shared else [1])

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("name", tensors.DTYPES.values())
    def test_dtypes(self, name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both ways without a copy, through JAX's public entrance too."""
        if not fast:
            monkeypatch.setattr(tensors, "_raw", lambda: None)
        x = torch.arange(64, dtype=torch.uint8)
        x = x % 2 == 1 if name == "bool" else x.view(getattr(torch, name))
        address, array = bridged(x)
        assert array.dtype.name == name and address == x.data_ptr()
        back = tensors.to_torch(array, None)
        assert back.dtype == x.dtype and back.data_ptr() == address
        np.testing.assert_array_equal(to_numpy(back), to_numpy(x))

    def test_fast_entrance_is_there(self) -> None:
        """Else every call pays JAX's public one: this tells of a version that needs a look."""
        assert tensors._raw() is not None

    def test_8_bit_floats_cross_natively(self) -> None:
        assert EIGHT_BITS and all(tensors.is_native(getattr(torch, name)) for name in EIGHT_BITS)

    @pytest.mark.parametrize("name", ["merge scale", "topk", "mla fp8"])
    def test_bytes_where_a_version_lacks_a_type(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensors, "is_native", lambda dtype: False)
        monkeypatch.setattr(library, "_jitted", {})
        crossed = []
        monkeypatch.setattr(
            tensors, "_view", lambda x, *rest, view=tensors._view: crossed.append(x.dtype) or view(x, *rest)
        )
        same(CASES[name].bridge(), CASES[name].jax())
        assert not any("float8" in str(dtype) for dtype in crossed)

    @pytest.mark.parametrize("shape", [(0, 2, 64), (3, 0, 64)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        output, lse = torch.zeros(shape), torch.zeros(shape[1::-1])
        out, merged = bridge.merge_attn_states(output, lse, output, lse, return_lse=True, output_quant=group())
        assert out.values.shape == shape and merged.shape == lse.shape and out.scales.shape[0] == shape[0]

    def test_results_are_owned(self) -> None:
        """A result outlives its arguments and may be written; nothing else changes with it."""
        case = CASES["merge count"]
        (output, *others), options = case.tensors()
        expected = bridge.merge_attn_states(output, *others, **options).clone()
        result = bridge.merge_attn_states(output, *others, **options)
        del output, others
        gc.collect()
        junk = [torch.full((6, 2, 128), 9.0) for _ in range(50)]
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        result.fill_(3)
        again = case.bridge()
        torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True)
        assert len(junk) == 50

    def test_arguments_are_released(self) -> None:
        """JAX keeps no reference: the storage dies with its tensor."""
        x = torch.randn(4, 256)
        ended = streams.StorageWeakRef(x.untyped_storage())
        result = bridge.quantize_fp8(x, group(128))
        assert not ended.expired()
        del x
        gc.collect()
        assert ended.expired() and result.scales.shape == (4, 2)

    def test_exporter_freed_first(self) -> None:
        """The array keeps the tensor's memory alive."""
        x = torch.arange(1024, dtype=torch.int32)
        address, array = bridged(x)
        del x
        gc.collect()
        junk = [torch.zeros(1024, dtype=torch.int32) for _ in range(50)]
        assert address not in [j.data_ptr() for j in junk]
        np.testing.assert_array_equal(np.asarray(array), np.arange(1024))

    def test_arguments_may_be_overwritten_at_once(self) -> None:
        """The call has read them when it returns, though JAX computes in the background."""
        case = CASES["quantize"]
        expected = case.jax()
        for _ in range(20):
            (x, spec), _ = case.tensors()
            result = bridge.quantize_fp8(x, spec)
            x.zero_()
            same(result, expected)

    def test_threads(self) -> None:
        """Calls from several threads at once."""
        case = CASES["quantize"]
        expected, failures = case.jax(), []

        def work() -> None:
            try:
                for _ in range(20):
                    same(case.bridge(), expected)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_no_retrace_and_no_recompilation(self) -> None:
        """Numbers and values may change; the program stays."""
        (output, lse, *others), _ = CASES["merge number"].tensors()
        call = lambda scale, count: bridge.merge_attn_states(
            output, lse, *others, output_scale=scale, prefill_tokens_with_context=count
        )
        call(0.5, 1)
        before = dict(library._jitted)
        sizes = {key: function._cache_size() for key, function in before.items()}
        for scale, count in ((0.25, 2), (torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)), (1, 0)):
            call(float(scale) if isinstance(scale, int) else scale, count)
        assert library._jitted.keys() == before.keys()
        assert {key: function._cache_size() for key, function in library._jitted.items()} == sizes


class TestRefused:
    def call(self, **changes: Any) -> Any:
        names = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse")
        given = dict(zip(names, CASES["merge"].tensors()[0], strict=True)) | changes
        return bridge.merge_attn_states(**given)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"suffix_lse": torch.zeros(2, 6, device="meta")}, "on meta; expected cpu, where prefix_output is"),
            ({"prefix_lse": np.zeros((2, 6), np.float32)}, "prefix_lse is a ndarray; expected a torch.Tensor"),
            ({"prefix_lse": torch.zeros(2, 6, dtype=torch.float64)}, "prefix_lse is float64"),
            ({"prefix_lse": torch.zeros(6, 2)}, "It looks like [T, H]: pass lse_layout='TH'"),
            ({"prefill_tokens_with_context": 7}, "prefill_tokens_with_context is 7; expected 0 to T = 6"),
            ({"prefill_tokens_with_context": torch.tensor([3])}, "int64[1]"),
            ({"output_scale": "1"}, "output_scale is a str"),
            ({"return_lse": 1}, "return_lse is 1; expected True or False"),
            ({"lse_base": "10"}, "lse_base is '10'"),
            ({"out_dtype": torch.int32}, "out_dtype is 'int32'"),
            ({"output_quant": "fp8"}, "output_quant is 'fp8'"),
            ({"output_quant": group(), "output_scale": 1.0}, "one of the two"),
            ({"prefix_lse": torch.zeros(2, 6).to_sparse()}, "layout"),
        ],
        ids=str,
    )  # fmt: skip
    def test_wrong_calls(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidInputError) as error:
            self.call(**changes)
        assert message in str(error.value)

    def test_other_devices(self) -> None:
        with pytest.raises(InvalidInputError, match="on meta; expected cpu or cuda"):
            bridge.quantize_fp8(torch.zeros(4, 128, device="meta"), group(128))

    def test_names_are_strict(self) -> None:
        with pytest.raises(UnsupportedError, match="needs cuda"):
            self.call(implementation="pallas")

    def test_gradients(self) -> None:
        x = torch.randn(4, 128, requires_grad=True)
        with pytest.raises(UnsupportedError, match="x requires a gradient, and gradients do not cross"):
            bridge.quantize_fp8(x, group(128))
        with torch.no_grad():
            bridge.quantize_fp8(x, group(128))
        with torch.inference_mode():
            assert not bridge.quantize_fp8(x, group(128)).scales.requires_grad
        bridge.quantize_fp8(torch.nn.Parameter(x.detach(), requires_grad=False), group(128))

    def test_the_environment_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Read at every call, as JAX's eager ops do."""
        self.call()
        monkeypatch.setenv("JAX_FP8ATTN_IMPLEMENTATION", "pallas")
        with pytest.raises(UnsupportedError):
            self.call()

    def test_without_pytorch(self) -> None:
        """One clear line, and the package itself does not care."""
        code = "import sys; sys.modules['torch'] = None\nimport jax_fp8attn\nimport jax_fp8attn.torch"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stderr.strip().splitlines()[-1] == (
            "ImportError: jax_fp8attn.torch needs PyTorch 2.10 or newer: pip install 'jax_fp8attn[torch]'"
        )


class TestApply:
    def test_pytrees(self) -> None:
        """The rows of DeepSeek-V4 and back, tensors inside the package's own dataclass."""
        x = normal(6, 512, dtype=np.float32)
        latent = bridge.apply(fp8attn.quantize_latent, to_tensor(x), group=32, scale_dtype=jnp.float8_e8m0fnu)
        expected = fp8attn.quantize_latent(jnp.asarray(x), 32, scale_dtype=jnp.float8_e8m0fnu)
        assert isinstance(latent, Fp8Latent) and latent.scale.dtype == torch.float8_e8m0fnu
        for got, want in zip(jax.tree.leaves(latent), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(to_numpy(got), raw(want))
        pages = bridge.apply(fp8attn.to_flashmla_pages, bridge.apply(Fp8Latent.with_group, to64(latent), 64), 4)
        assert pages.dtype == torch.uint8 and pages.shape[0] == 2

    def test_structure_follows_the_shape(self) -> None:
        """Static parts of a result are those of this call."""
        for tokens in (4, 6, 4):
            result = bridge.apply(fp8attn.quantize_fp8, torch.ones(tokens, 128), group(128))
            assert isinstance(result, Fp8Array) and result.num_tokens == tokens

    def test_unhashable(self) -> None:
        with pytest.raises(InvalidInputError, match="must be hashable"):
            bridge.apply(lambda x, y: x, torch.ones(3), np.ones(3))


def to64(latent: Fp8Latent) -> Fp8Latent:
    """Scales that are equal in pairs, as a group of 64 wants."""
    pairs = latent.scale.view(torch.uint8)[:, ::2].repeat_interleave(2, -1)
    return dataclasses.replace(latent, scale=pairs.view(torch.float8_e8m0fnu))


class Pool:
    """The pool op on tensors beside JAX's on the same numbers."""

    def __init__(self, dtype: Any = np.float32, **options: Any) -> None:
        self.args = pool_call(dtype=dtype)
        self.options = dict(cu_seqlens=int32(0, 70, 80, 150), **POOL_HEADS) | options

    def expected(self) -> tuple[Any, ...]:
        args, options = convert((self.args, self.options), jnp.asarray)
        return fp8attn.gdn_prefill_pool(*args, **options)

    def tensors(self) -> tuple[list[Any], dict[str, Any]]:
        args, options = convert((self.args, self.options), to_tensor)
        return list(args), options

    def check(self, device: Any = CPU) -> None:
        args, options = convert((self.args, self.options), lambda x: to_tensor(x, device))
        pool = args[5]
        address = pool.data_ptr()
        result = bridge.gdn_prefill_pool(*args, **options)
        o, expected_pool, *checkpoints = self.expected()
        same(result, (o, *checkpoints) if checkpoints else o)
        assert pool.data_ptr() == address
        same(pool, expected_pool)


POOLS = {
    "plain": dict(),
    "other rows": dict(dtype=BF16, write_slots=int32(99, 0, 6)),
    "no row": dict(dtype=BF16, write_slots=int32(-1, 7, -5)),
    "checkpoints": dict(checkpoint_every=64, state_layout="kv"),
    "checkpoints to the pool": dict(checkpoint_every=64, checkpoint_slots=int32(4, 6)),
    "one checkpoint of two": dict(checkpoint_every=64, checkpoint_slots=int32(4, 6), cu_seqlens=int32(0, 70, 80, 100)),
}


class TestPool:
    @pytest.mark.parametrize("name", marked(POOLS, ("plain", "checkpoints")))
    def test_in_place(self, name: str) -> None:
        """The same memory, the rows of JAX's result, every other row untouched."""
        case = Pool(**POOLS[name])
        if name == "checkpoints":
            case.args = (*case.args[:5], np.swapaxes(case.args[5], 2, 3).copy(), *case.args[6:])
        case.check()

    def test_in_a_wider_allocation(self) -> None:
        """A pool whose rows lie apart, as in a paged cache: nothing between them is touched."""
        case = Pool()
        args, options = case.tensors()
        wide = torch.full((7, 4, 24 * 16 + 100), 7.0)
        view = wide[..., :384].unflatten(-1, (24, 16))
        view.copy_(args[5])
        bridge.gdn_prefill_pool(*args[:5], view, *args[6:], **options)
        same(view, case.expected()[1])
        assert (wide[..., 384:] == 7).all()

    @pytest.mark.parametrize("sequences", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_few_sequences(self, sequences: int) -> None:
        case = Pool(cu_seqlens=int32(0, 150)[: sequences + 1])
        case.args = (*case.args[:6], *(x[:sequences] for x in case.args[6:]))
        case.check()

    def test_compiled(self) -> None:
        """The graph holds the op and the write; the caller's pool changes."""
        case = Pool()
        args, options = case.tensors()
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda *given: bridge.gdn_prefill_pool(*given, **options), fullgraph=True, backend="aot_eager"
        )
        address = args[5].data_ptr()
        result = compiled(*args)
        o, pool = case.expected()
        same(result, o)
        same(args[5], pool)
        assert args[5].data_ptr() == address

    def test_opcheck(self) -> None:
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library.Op, "__call__", lambda op, *given: seen.append((op, *given)) or op.run(*given))
            args, options = Pool(checkpoint_every=64, checkpoint_slots=int32(4, 6)).tensors()
            bridge.gdn_prefill_pool(*args, **options)
        op, values, text = seen[0]
        torch.library.opcheck(library._REGISTERED[op.name], (library._as_tensors(values), text))

    @pytest.mark.slow
    def test_metadata(self) -> None:
        """Once for all layers, as tensors."""
        cu = int32(0, 66, 66, 70)
        metadata = bridge.gdn_metadata(to_tensor(cu), 70, 4)
        expected = fp8attn.gdn_metadata(jnp.asarray(cu), 70, 4)
        for got, want in zip(jax.tree.leaves(metadata), jax.tree.leaves(expected), strict=True):
            same(got, want)
        case = Pool(cu_seqlens=None)
        args, options = case.tensors()
        metadata = bridge.gdn_metadata(to_tensor(int32(0, 70, 80, 150)), 150, 4)
        bridge.gdn_prefill_pool(*args, **options, metadata=metadata)
        same(args[5], Pool().expected()[1])
        torch.library.opcheck(
            library._REGISTERED["gdn_metadata"], ([to_tensor(cu)], "total_tokens=70;num_state_heads=4")
        )

    def test_wrong_slots(self) -> None:
        args, options = Pool().tensors()
        args[6] = args[6].long()
        with pytest.raises(InvalidInputError, match="slots is no int32 tensor"):
            bridge.gdn_prefill_pool(*args, **options)


class FakeStream:
    """A stream of PyTorch's or XLA's; notes what it is told to do."""

    def __init__(self, name: str, log: list[Any], handle: int = 0) -> None:
        self.name, self.log, self.cuda_stream = name, log, handle

    def wait_event(self, event: Any) -> None:
        self.log.append(("waits", self.name, event.stream.name))

    def record_event(self) -> Any:
        event = FakeEvent(self.log)
        event.record(self)
        return event


class FakeEvent:
    def __init__(self, log: list[Any] | None = None) -> None:
        self.log, self.done = log, False

    def record(self, stream: FakeStream) -> None:
        self.stream = stream
        stream.log.append(("recorded", stream.name))

    def query(self) -> bool:
        return self.done


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A CPU that has streams: every step of a call is noted."""
    log: list[Any] = []
    fake = types.SimpleNamespace(
        log=log, current=FakeStream("torch", log, 77), xla=FakeStream("xla", log), capturing=False
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(streams, "_external", lambda stream, device: fake.xla)
    cpu = jax.devices("cpu")[0]
    source = types.SimpleNamespace(get_stream_for_external_ready_events=lambda: 55)
    fake.place = streams.Place(CPU, source, (1, 0), 64, threading.local(), streams.Kept())
    real = dataclasses.replace(fake.place, jax=cpu)
    monkeypatch.setattr(tensors, "place_of", lambda op, given: fake.place)
    view, export, number = tensors._view, tensors.to_torch, tensors.number
    monkeypatch.setattr(tensors, "_view", lambda x, place, stream: log.append(("in", stream)) or view(x, real, None))
    monkeypatch.setattr(tensors, "to_torch", lambda x, stream: log.append(("out", stream)) or export(x, None))
    monkeypatch.setattr(tensors, "number", lambda op, name, x, place: number(op, name, x, cpu))
    return fake


class TestStreamOrder:
    """The steps of a call, on streams that only take notes; TestHardware has real ones."""

    def test_steps(self, device: types.SimpleNamespace) -> None:
        x = torch.randn(4, 256)
        result = bridge.quantize_fp8(x, group(128))
        steps = [("recorded", "torch"), ("waits", "xla", "torch"), ("in", 55), ("out", 77), ("out", 77)]
        assert device.log == steps and len(device.place.kept) == 2
        assert result.values.shape == x.shape

    def test_default_stream_has_a_number(self, device: types.SimpleNamespace) -> None:
        device.current = FakeStream("default", device.log, 0)
        bridge.quantize_fp8(torch.randn(4, 256), group(128))
        assert device.log[-1] == ("out", 1)

    def test_copies_come_before_the_event(self, device: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        clone = torch.Tensor.clone
        monkeypatch.setattr(torch.Tensor, "clone", lambda x, **how: device.log.append("copy") or clone(x, **how))
        bridge.quantize_fp8(torch.randn(256, 4).t(), group(128))
        assert device.log[:2] == ["copy", ("recorded", "torch")]

    def test_public_entrance_waits_too(self, device: types.SimpleNamespace) -> None:
        device.place.wait(5)
        tensors._Exporter(torch.zeros(4), device.place).__dlpack__(stream=5)
        assert device.log == 2 * [("recorded", "torch"), ("waits", "xla", "torch")]

    def test_memory_goes_back_in_order(self, device: types.SimpleNamespace) -> None:
        """A dropped result stays until a later call has put XLA behind its stream."""
        kept, first = device.place.kept, device.current
        call = lambda: bridge.quantize_fp8(torch.randn(4, 256), group(128))
        result = call()
        assert len(kept) == 2 and not kept.dropped(first)
        view = result.values[1:]
        del result
        gc.collect()
        (scales,) = kept.dropped(first)
        assert scales.array.shape == (2, 4) and len(kept) == 1
        del view
        gc.collect()
        call()  # takes the codes out, and adds two
        assert len(kept) == 2

    def test_memory_stays_after_a_failure(self, device: types.SimpleNamespace) -> None:
        """A call that gave XLA no work has put nothing in order."""
        bridge.quantize_fp8(torch.randn(4, 256), group(128))
        gc.collect()
        with pytest.raises(InvalidInputError):
            bridge.quantize_fp8(torch.randn(4, 250), group(128))
        assert len(device.place.kept) == 2
        bridge.quantize_fp8(torch.randn(4, 256), group(128))
        assert len(device.place.kept) == 2

    def test_many_kept_results(self, device: types.SimpleNamespace) -> None:
        """However many live on, a dropped one is found within a few calls."""
        kept, alive = device.place.kept, [torch.zeros(1) for _ in range(400)]
        kept.add([None] * 400, alive, device.current)
        kept.add([None], [torch.zeros(1)], device.current)
        assert sum(len(kept.dropped(device.current)) for _ in range(5)) == 1 and len(kept) == 400

    def test_other_stream(self, device: types.SimpleNamespace) -> None:
        """Dropped on one stream, next call on another: kept until the first stream has passed."""
        kept, first = device.place.kept, device.current
        bridge.quantize_fp8(torch.randn(4, 256), group(128))
        gc.collect()
        second = FakeStream("second", device.log, 88)
        assert kept.dropped(second) == [] and len(kept) == 2
        assert device.log[-2:] == 2 * [("recorded", first.name)]
        assert kept.dropped(second) == []
        for result in kept._results:
            result.event.done = True
        assert len(kept.dropped(second)) == 2 and not len(kept)

    def test_capture_is_refused(self, device: types.SimpleNamespace) -> None:
        device.capturing = True
        with pytest.raises(UnsupportedError, match="CUDA graph"):
            bridge.quantize_fp8(torch.randn(4, 256), group(128))


def gpu() -> bool:
    return torch.cuda.is_available() and any(d.platform == "gpu" for d in jax.devices())


@pytest.mark.skipif(not gpu(), reason="needs a GPU that both PyTorch and JAX can use")
class TestHardware:
    CUDA = torch.device("cuda:0")

    @pytest.mark.parametrize("name", CASES)
    def test_op_is_the_jax_op(self, name: str) -> None:
        """On the device, against JAX on the same device."""
        same(CASES[name].bridge(self.CUDA), wanted(CASES[name]))

    @pytest.mark.parametrize("name", POOLS)
    def test_pool_in_place(self, name: str) -> None:
        case = Pool(**POOLS[name])
        if name == "checkpoints":
            case.args = (*case.args[:5], np.swapaxes(case.args[5], 2, 3).copy(), *case.args[6:])
        case.check(self.CUDA)

    @pytest.mark.parametrize("name", tensors.DTYPES.values())
    def test_no_copy(self, name: str) -> None:
        x = torch.arange(64, dtype=torch.uint8, device=self.CUDA)
        x = x % 2 == 1 if name == "bool" else x.view(getattr(torch, name))
        torch.cuda.synchronize()
        address, array = bridged(x)
        assert address == x.data_ptr() and array.dtype.name == name
        back = tensors.to_torch(array, 1)
        assert back.data_ptr() == address and back.dtype == x.dtype
        np.testing.assert_array_equal(to_numpy(back), to_numpy(x))

    @pytest.mark.parametrize("offset, shared", [(8, True), (4, False), (1, False)])
    def test_alignment(self, offset: int, shared: bool) -> None:
        """XLA takes what starts at 16 bytes; anything else is copied."""
        values = normal(1032)
        x = to_tensor(values, self.CUDA)[offset : offset + 1024].view(4, 256)
        torch.cuda.synchronize()
        assert (bridged(x)[0] == x.data_ptr()) is shared
        rows = jnp.asarray(values[offset : offset + 1024].reshape(4, 256))
        same(bridge.quantize_fp8(x, group(128)), fp8attn.quantize_fp8(rows, group(128)))

    def test_two_streams(self) -> None:
        """1000 calls on two streams: arguments written just before on a slow stream, overwritten just after, results
        read late and their memory dropped at once."""
        size = 1 << 20
        pattern = torch.arange(size, device=self.CUDA) % 251
        quant = Fp8PerTensor(1.0)
        pair = [torch.cuda.Stream(self.CUDA) for _ in range(2)]
        wrong = [torch.zeros((), dtype=torch.int64, device=self.CUDA) for _ in pair]
        torch.cuda.synchronize()
        for number in range(1000):
            which = number % 2
            with torch.cuda.stream(pair[which]):
                x = torch.full((size // 128, 128), -1.0, device=self.CUDA)
                torch.cuda._sleep(200_000)
                x.copy_(((pattern + number) % 13).view_as(x))
                result = bridge.quantize_fp8(x, quant).values
                x.fill_(-5.0)
                if number % 3:
                    torch.cuda._sleep(200_000)
                wrong[which] += (result.float().flatten() != (pattern + number) % 13).sum()
                del result, x
        torch.cuda.synchronize()
        assert [int(x) for x in wrong] == [0, 0]

    def test_beside_other_jax_work(self) -> None:
        """Memory that PyTorch still reads is not given to a program that never crossed the bridge."""
        size = 1 << 22
        other = jax.jit(lambda x: x * 0 - 7)
        ones = jnp.ones((size // 128, 128), jnp.float8_e4m3fn)
        wrong = torch.zeros((), dtype=torch.int64, device=self.CUDA)
        for number in range(200):
            x = torch.full((size // 128, 128), float(number % 7), device=self.CUDA)
            result = bridge.quantize_fp8(x, Fp8PerTensor(1.0)).values
            torch.cuda._sleep(1_000_000)
            wrong += (result.float() != number % 7).sum()
            del result
            other(ones)
        torch.cuda.synchronize()
        assert int(wrong) == 0

    def test_capture_is_refused(self) -> None:
        x = torch.randn(4, 128, device=self.CUDA)
        bridge.quantize_fp8(x, group(128))
        torch.cuda.synchronize()
        with pytest.raises(UnsupportedError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            bridge.quantize_fp8(x, group(128))

    def test_mixed_devices(self) -> None:
        with pytest.raises(InvalidInputError, match="lses is on cpu; expected cuda:0, where outputs is"):
            bridge.merge_attn_states_n(torch.zeros(2, 3, 4, 8, device=self.CUDA), torch.zeros(2, 4, 3))
