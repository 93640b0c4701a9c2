"""The host library behind the calls of AITER: built by ``python -m jax_fp8attn amd build``, loaded and registered here.

It lies in the cache folder under a name that changes with its source and with jaxlib. Nothing builds it unasked, and it
is loaded only for a call of AITER's kernel.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib
from jax_fp8attn.custom_calls.common.aiter_code_object import CodeObject

from jax_fp8attn import tuning

TARGET = "jax_fp8attn.aiter_mla_prefill"
SOURCE = Path(__file__).resolve().parent.parent / "src" / "aiter_mla_prefill.cc"
COMPILERS = ("c++", "g++", "clang++")
BUILD = "python -m jax_fp8attn amd build"
STAGES = {"ROCM": "JaxFp8attnAiterLaunch", "cpu": "JaxFp8attnAiterLaunchOnHost"}


class LibraryError(RuntimeError):
    """The library is not there, is not ours alone, or cannot be built or loaded; the text says what to do."""


def library_path() -> Path:
    """Where the library lies; raises LibraryError if there is no place."""
    folder = tuning.cache_folder()
    if folder is None:
        raise LibraryError("there is no cache folder: set JAX_FP8ATTN_CACHE_DIR to an absolute path")
    made_of = SOURCE.read_bytes() + f"{jaxlib.__version__} {platform.machine()}".encode()
    return folder / f"aiter-{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def find() -> Path:
    """The library that fits this package and jaxlib; raises LibraryError. Loads nothing."""
    path = library_path()
    try:
        facts = os.lstat(path)
        tuning.check_folder(path.parent)
        tuning.check_owner(facts, stat.S_ISREG)
    except FileNotFoundError:
        raise LibraryError(
            f"the host library of the AITER calls is not built for this package and jaxlib {jaxlib.__version__}: "
            f"run {BUILD} (needs a C++17 compiler)"
        ) from None
    except (OSError, ValueError) as error:
        raise LibraryError(f"{path} is not loaded: {error}") from None
    return path


def build(compiler: str) -> Path:
    """Compiles the library into the cache folder, replacing one that is there; raises LibraryError."""
    path = library_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        tuning.check_folder(path.parent)
        descriptor, unfinished = tempfile.mkstemp(prefix=".aiter-", dir=path.parent)  # of this user alone
    except (OSError, ValueError) as error:
        raise LibraryError(f"{path.parent} cannot hold the library: {error}") from None
    os.close(descriptor)
    try:
        _compile(compiler, Path(unfinished))
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def _compile(compiler: str, result: Path) -> None:
    headers = ["-isystem", jax.ffi.include_dir()]
    command = [compiler, "-O2", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", *headers]
    try:
        done = subprocess.run([*command, str(SOURCE), "-o", str(result), "-ldl"], capture_output=True, text=True)
    except OSError as error:
        raise LibraryError(f"{compiler} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise LibraryError(f"{compiler} failed:\n{done.stderr[-2000:]}")
    os.chmod(result, 0o700)


@functools.cache
def load(path: Path) -> ctypes.CDLL:
    """Loads the library and registers its calls with jax, once."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} cannot be loaded: {error}. Build it again: {BUILD}") from None
    library.JaxFp8attnAiterAddCodeObject.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.JaxFp8attnAiterAddCodeObject.restype = None
    library.JaxFp8attnAiterWhyNoHip.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.JaxFp8attnAiterWhyNoHip.restype = None
    for name, launch in STAGES.items():
        stages = {"initialize": library.JaxFp8attnAiterPrepare, "execute": getattr(library, launch)}
        capsules = {stage: jax.ffi.pycapsule(function) for stage, function in stages.items()}
        jax.ffi.register_ffi_target(TARGET, capsules, platform=name)
    return library


def add(library: ctypes.CDLL, code_object: CodeObject) -> None:
    """Gives the library the bytes that calls name by their SHA-256."""
    content = code_object.content
    library.JaxFp8attnAiterAddCodeObject(code_object.sha256.encode(), content, len(content))


def why_no_hip(library: ctypes.CDLL) -> str:
    """Why the library finds no HIP runtime; empty if it does. Loads the one that the user names."""
    text = ctypes.create_string_buffer(1024)
    library.JaxFp8attnAiterWhyNoHip(text, len(text))
    return text.value.decode(errors="replace")
