"""Other projects' kernels, from a folder that the user fills; nothing of them is part of this package.

The folder holds the files that each function names, as they come out of the projects' wheels or as
``flashinfer_gdn.py`` writes them (a library may be compressed with xz). A peer whose files are missing is left out.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import importlib.util
import lzma
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.export

VLLM_TRITON_MERGE = "triton_merge_attn_states.py"
VLLM_LIBRARY = "_C_stable_libtorch.abi3.so"
# FlashAttention-3 as its authors release it (the wheel fa3-fwd; there the file is _C.abi3.so), and vLLM's fork of it
FA3_LIBRARIES = {"fa3": ("fa3_fwd_C.abi3.so", "fa3_fwd"), "fa3 vllm": ("_vllm_fa3_C.abi3.so", "_vllm_fa3_C")}
FA3_DEFAULTS = {
    "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "is_rotary_interleaved": True,
    "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
}  # fmt: skip
FLASHMLA_LIBRARY, FLASHMLA_INTERFACE = "_flashmla_C.abi3.so", "flash_mla_interface.py"  # both as vLLM ships them
CUTE_LIBRARY, CUTE_CALL = "libcute_dsl_runtime.so", "CuteDSLRT_NvJaxCutlassCall"  # NVIDIA's, and its XLA custom call


def find(folder: Path, name: str) -> Path | None:
    """A file by name anywhere below the folder, unpacked if it is there with .xz only."""
    hits = sorted(folder.rglob(name))
    if hits:
        return hits[0]
    packed = sorted(folder.rglob(f"{name}.xz"))
    if not packed:
        return None
    target = Path(tempfile.mkdtemp(prefix="fp8attn_peers_")) / name
    with lzma.open(packed[0]) as source, target.open("wb") as out:
        while block := source.read(1 << 24):
            out.write(block)
    return target


_loading = threading.Lock()


def merges(folder: Path | None) -> dict[str, Callable[..., None]]:
    """vLLM's merges by name, as f(output, prefix, prefix_lse, suffix, suffix_lse, output_scale, output_lse=None).

    On torch tensors, lse [H, T]."""
    with _loading:  # a library registers its operators once
        return _merges(folder)


@functools.cache
def _merges(folder: Path | None) -> dict[str, Callable[..., None]]:
    found: dict[str, Callable[..., None]] = {}
    if folder is None:
        return found
    if file := find(folder, VLLM_TRITON_MERGE):
        triton_merge = _vllm_module(file, _merge_stubs()).merge_attn_states
        found["vllm triton"] = lambda out, a, la, b, lb, scale, out_lse=None: triton_merge(
            out, a, la, b, lb, output_lse=out_lse, output_scale=scale
        )
    if file := find(folder, VLLM_LIBRARY):
        import torch

        torch.ops.load_library(str(file))
        merge = torch.ops._C.merge_attn_states
        found["vllm cuda"] = lambda out, a, la, b, lb, scale, out_lse=None: merge(
            out, out_lse, a, la, b, lb, None, scale
        )
    return found


def fa3(folder: Path | None) -> dict[str, Callable[..., Any]]:
    """FlashAttention-3 by name as f(q, k, v, out, causal, cu_q, cu_k, longest, splits=1) -> (out, lse [H, T]) on packed
    rows: ``longest`` sequence of q and of k; ``splits`` of the keys, 0: as many as its heuristic takes.

    The release adds all products in the tensor cores' own sum; vLLM's fork adds e4m3 ones in float32 block by block.
    """
    with _loading:
        return _fa3(folder)


@functools.cache
def _fa3(folder: Path | None) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for name, (library, namespace) in FA3_LIBRARIES.items():
        if folder is not None and (file := find(folder, library)):
            import torch

            torch.ops.load_library(str(file))
            found[name] = functools.partial(_fa3_forward, getattr(torch.ops, namespace).fwd)
    return found


def _fa3_forward(
    operator: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    causal: bool,
    cu_q: Any,
    cu_k: Any,
    longest: tuple[int, int],
    splits: int = 1,
) -> tuple[Any, Any]:
    given = {
        "q": q, "k": k, "v": v, "out": out, "softmax_scale": q.shape[-1] ** -0.5, "is_causal": causal,
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": longest[0], "max_seqlen_k": longest[1],
        "num_splits": splits,
    }  # fmt: skip
    if q.element_size() == 1:
        one = _ones(len(cu_q) - 1, k.shape[-2])
        given |= {"q_descale": one, "k_descale": one, "v_descale": one}
    return out, operator(*_by_schema(operator, FA3_DEFAULTS | given))[1]


@functools.cache
def _ones(*shape: int) -> Any:
    """Made once: a call would be charged for it."""
    import torch

    return torch.ones(*shape, device="cuda")


def _by_schema(operator: Any, given: dict[str, Any]) -> list[Any]:
    """Arguments in the order of the operator's schema; one that a newer build has added keeps its default."""
    values = []
    for argument in operator.default._schema.arguments:
        if argument.name in given:
            values.append(given[argument.name])
        elif argument.has_default_value():
            values.append(argument.default_value)
        elif argument.type.kind() == "OptionalType":
            values.append(None)
        else:
            raise TypeError(f"{operator}: no value for the required argument {argument.name}")
    return values


def flashmla(folder: Path | None) -> Any:
    """FlashMLA's Python module, or None. It takes 64 or 128 heads and lists of a multiple of 128 rows."""
    with _loading:
        return _flashmla(folder)


@functools.cache
def _flashmla(folder: Path | None) -> Any:
    if folder is None:
        return None
    library, interface = find(folder, FLASHMLA_LIBRARY), find(folder, FLASHMLA_INTERFACE)
    if library is None or interface is None:
        return None
    import torch

    torch.ops.load_library(str(library))
    return _vllm_module(interface, {"_flashmla_C": types.ModuleType("vllm._flashmla_C")})


def gated_delta_rule(folder: Path | None) -> Callable[..., Any] | None:
    """``chunk_gated_delta_rule`` of flash-linear-attention, or None: the unpacked wheels fla_core and einops."""
    with _loading:
        return _gated_delta_rule(folder)


@functools.cache
def _gated_delta_rule(folder: Path | None) -> Callable[..., Any] | None:
    trees = [] if folder is None else sorted(folder.rglob("fla/ops/gated_delta_rule/__init__.py"))
    if not trees:
        return None
    for package in (trees[0].parents[3], *(x.parent.parent for x in sorted(folder.rglob("einops/__init__.py"))[:1])):
        if str(package.resolve()) not in sys.path:
            sys.path.append(str(package.resolve()))
    return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule


def flashinfer_gdn(folder: Path | None, shape: dict[str, int]) -> Callable[..., Any] | None:
    """FlashInfer's gated delta rule as f(q, k, v, g, beta, offsets) -> (out, final states) on jax arrays, or None: the
    files that ``flashinfer_gdn.py`` writes."""
    with _loading:
        return _flashinfer_gdn(folder, flashinfer_program(shape))


def flashinfer_program(shape: dict[str, int]) -> str:
    """The file of a shape."""
    return f"flashinfer_gdn_{'_'.join(f'{name}{size}' for name, size in sorted(shape.items()))}.bin"


@functools.cache
def _flashinfer_gdn(folder: Path | None, name: str) -> Callable[..., Any] | None:
    program = None if folder is None else find(folder, name)
    if program is None or not _cute_library(folder):
        return None
    return jax.jit(jax.export.deserialize(bytearray(program.read_bytes())).call)


@functools.cache
def _cute_library(folder: Path) -> bool:
    """Whether it is there; it is registered once."""
    file = find(folder, CUTE_LIBRARY)
    if file is None:
        return False
    library = ctypes.CDLL(str(file.resolve()))
    state = {"type_id": _symbol(library, "StateTypeId")(), "type_info": _symbol(library, "StateTypeInfo")()}
    stages = {stage: _symbol(library, stage.capitalize()) for stage in ("instantiate", "prepare", "execute")}
    capsules = functools.partial(jax.tree.map, jax.ffi.pycapsule)
    jax.ffi.register_ffi_type(f"{CUTE_CALL}Types_v2", capsules(state), platform="CUDA")
    jax.ffi.register_ffi_target(f"{CUTE_CALL}_v2", capsules(stages), platform="CUDA")
    return True


def _symbol(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, f"{CUTE_CALL}{name}_v2")
    function.restype = ctypes.c_void_p
    return function


@contextlib.contextmanager
def tuned_at_once() -> Iterator[None]:
    """Inside, Triton's autotuners compile all their configurations side by side before they time them, and time each
    for 20 ms: one after the other, those of one shape of heads take a minute."""
    import triton
    from triton.runtime.autotuner import Autotuner

    run = Autotuner.run
    quick = functools.partial(triton.testing.do_bench, warmup=5, rep=20)

    def ahead(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = {name: value for name, value in kwargs.items() if name != "warmup"}
        with triton.AsyncCompileMode(pool, ignore_errors=True):  # what does not compile is left out when timed
            self.warmup(*args, **options)
        self._do_bench = quick
        self.__dict__.pop("do_bench", None)
        return run(self, *args, **kwargs)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        Autotuner.run = ahead
        try:
            yield
        finally:
            Autotuner.run = run


def _merge_stubs() -> dict[str, types.ModuleType]:
    import torch
    import triton
    import triton.language

    platforms, utils = types.ModuleType("vllm.platforms"), types.ModuleType("vllm.triton_utils")
    platforms.current_platform = types.SimpleNamespace(fp8_dtype=lambda: torch.float8_e4m3fn)
    utils.tl, utils.triton = triton.language, triton
    return {"platforms": platforms, "triton_utils": utils}


def _vllm_module(file: Path, stubs: dict[str, types.ModuleType]) -> Any:
    """One file of vLLM without vLLM: the modules that it imports are stood in for."""
    vllm = sys.modules.setdefault("vllm", types.ModuleType("vllm"))
    for name, stub in stubs.items():
        setattr(vllm, name, stub)
        sys.modules[f"vllm.{name}"] = stub
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def to_torch(array: Any) -> Any:
    """A jax array as a torch tensor on the same memory."""
    import torch

    return torch.from_dlpack(array)
