"""Makes ``jax_fp8attn.pallas``, ``.custom_calls`` and ``.benchmarks`` importable from a bare checkout.

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
_FOLDERS = ("pallas", "custom_calls", "benchmarks")


class _Finder:
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, folder_name = name.partition(".")
        if package != "jax_fp8attn" or folder_name not in _FOLDERS:
            return None
        folder = _REPOSITORY / folder_name
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install() -> None:
    package = Path(__file__).resolve().parent
    installed = any((package / folder / "__init__.py").exists() for folder in _FOLDERS)
    repository = all((_REPOSITORY / folder / "__init__.py").exists() for folder in _FOLDERS)
    ours = (_REPOSITORY / "pyproject.toml").exists()
    if not installed and repository and ours and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.append(_Finder())
