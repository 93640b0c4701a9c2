"""Makes ``jax_fp8attn.pallas`` and ``jax_fp8attn.custom_calls`` importable from a bare checkout.

They lie beside this package in the repository and inside it once installed. The finder is added only when no installed
copy exists and the folder beside this package really is the repository.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_REPOSITORY = Path(__file__).resolve().parent.parent
_BACKENDS = ("pallas", "custom_calls")


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, backend = name.partition(".")
        if package != "jax_fp8attn" or backend not in _BACKENDS:
            return None
        folder = _REPOSITORY / backend
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    package = Path(__file__).resolve().parent
    installed = any((package / backend / "__init__.py").exists() for backend in _BACKENDS)
    repository = all((_REPOSITORY / backend / "__init__.py").exists() for backend in _BACKENDS)
    ours = (_REPOSITORY / "pyproject.toml").exists()
    if not installed and repository and ours and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
