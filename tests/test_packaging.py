"""Every way to get at the package: R21, and what an import may do."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import jax_fp8attn
from jax_fp8attn import _source_tree

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARIES = list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
MAPPED = {name: f"jax_fp8attn/{name}" for name in ("pallas", "custom_calls", "benchmarks")}
VENDORS = ("triton", "jax_triton", "flashinfer", "cutlass", "jax_tvm_ffi")
OPTIONAL = ("torch", "flax", *VENDORS, "matplotlib", "rich", "hypothesis")
USE = """
import json, jax_fp8attn, jax_fp8attn.pallas, jax_fp8attn.pallas.common, jax_fp8attn.custom_calls
import jax_fp8attn.benchmarks
from jax_fp8attn import merge_attn_states
import numpy as np
out, lse = np.ones((4, 2, 32), np.float32), np.zeros((2, 4), np.float32)
merged = merge_attn_states(out, lse, 3 * out, lse, output_scale=0.5).dequantize()
mapped = (jax_fp8attn.pallas, jax_fp8attn.custom_calls, jax_fp8attn.benchmarks)
files = {m.__name__: m.__file__ for m in (jax_fp8attn, *mapped)}
print(json.dumps({"files": files, "merged": float(merged[0, 0, 0]), "version": jax_fp8attn.__version__}))
"""


def python(code: str, paths: list[Any], folder: Path, sites: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code with nothing on the path but ``paths`` and the installed libraries, whose .pth files are not read."""
    # a finder of an editable install lies in its site: before that of the environment
    start = f"import sys; sys.path += {[*map(str, sites), *map(str, paths), *LIBRARIES]!r}\n"
    start += "".join(f"import site; site.addsitedir({str(site)!r})\n" for site in sites)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "XLA_FLAGS", "JAX_FP8ATTN"))}
    return subprocess.run(
        [sys.executable, "-S", "-B", "-c", start + code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_usable(paths: list[Path], folder: Path, package: Path, backends: Path, sites: tuple[Path, ...] = ()) -> None:
    """Every package comes from where it should, and an op runs."""
    facts = result(python(USE, paths, folder, sites))
    assert facts["merged"] == 2.0 and facts["version"] == jax_fp8attn.__version__
    assert facts["files"] == {
        "jax_fp8attn": str(package / "__init__.py"),
        **{f"jax_fp8attn.{name}": str(backends / name / "__init__.py") for name in MAPPED},
    }


def sources() -> set[str]:
    """Every Python file of the package, as it is called once installed."""
    found = {str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "jax_fp8attn").rglob("*.py")}
    for folder, name in MAPPED.items():
        found |= {f"{name}/{p.relative_to(REPOSITORY / folder)}" for p in (REPOSITORY / folder).rglob("*.py")}
    return found


class TestSourceTree:
    def test_plain_pythonpath(self, tmp_path: Path) -> None:
        """R21: a bare checkout on the path, from any folder."""
        assert_usable([REPOSITORY], tmp_path, REPOSITORY / "jax_fp8attn", REPOSITORY)

    @pytest.mark.parametrize("name", ["pallas", "custom_calls"])
    def test_bare_names_are_refused(self, name: str) -> None:
        """The folders are parts of the package, not packages of their own."""
        done = python(f"import {name}", [REPOSITORY], REPOSITORY)
        assert done.returncode == 1
        assert f"ImportError: import jax_fp8attn.{name}, not {name}" in done.stderr

    def test_a_foreign_neighbour_is_not_taken(self, tmp_path: Path) -> None:
        """A folder of the same name beside an installed copy belongs to somebody else."""
        shutil.copytree(REPOSITORY / "jax_fp8attn", tmp_path / "jax_fp8attn")
        for name in MAPPED:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('foreign code ran')")
        done = python("import jax_fp8attn.pallas", [tmp_path], tmp_path)
        assert done.returncode == 1 and "No module named 'jax_fp8attn.pallas'" in done.stderr

    def test_the_finder_keeps_to_its_two_names(self) -> None:
        finder = _source_tree._Finder()
        for name in ("pallas", "jax_fp8attn", "jax_fp8attn.xla", "jax_fp8attn.pallas.common", "other.pallas"):
            assert finder.find_spec(name) is None
        spec = finder.find_spec("jax_fp8attn.pallas")
        assert spec.origin == str(REPOSITORY / "pallas" / "__init__.py")

    def test_the_finder_is_installed_once_and_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        others = [finder for finder in sys.meta_path if not isinstance(finder, _source_tree._Finder)]
        monkeypatch.setattr(sys, "meta_path", list(others))
        _source_tree.install()
        _source_tree.install()
        assert sys.meta_path[:-1] == others and isinstance(sys.meta_path[-1], _source_tree._Finder)


class TestProject:
    PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())

    def test_every_package_is_listed(self) -> None:
        listed = set(self.PROJECT["tool"]["setuptools"]["packages"])
        assert listed == {str(Path(name).parent).replace("/", ".") for name in sources()}

    def test_typed(self) -> None:
        assert (REPOSITORY / "jax_fp8attn" / "py.typed").exists()
        assert "py.typed" in self.PROJECT["tool"]["setuptools"]["package-data"]["jax_fp8attn"]

    def test_versions(self) -> None:
        """The promised ranges of Python and JAX."""
        project = self.PROJECT["project"]
        assert project["requires-python"] == ">=3.12"
        assert sorted(project["dependencies"]) == ["jax>=0.11.2,<0.13", "numpy"]


IMPORT = """
import sys, time
start = time.perf_counter()
import jax
middle = time.perf_counter()
before = set(sys.modules)
events = []
def audit(event, args):
    if event.startswith(("subprocess.", "os.system", "os.exec", "os.fork", "os.posix", "socket.", "ctypes.dlopen")):
        events.append(event)
    if event == "open" and args[2] and args[2] & 3:
        events.append(f"writes {args[0]}")
sys.addaudithook(audit)
import jax_fp8attn
import json
seconds = time.perf_counter() - middle
from jax._src import xla_bridge
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules)), "events": events,
                  "backends": xla_bridge.backends_are_initialized()}))
"""


class TestImport:
    def test_import_is_quick_and_quiet(self, tmp_path: Path) -> None:
        """R21: under 0.3 s beyond jax; no optional library, process, socket, shared library or file written."""
        runs = [result(python(IMPORT, [REPOSITORY], tmp_path)) for _ in range(3)]
        assert min(run["seconds"] for run in runs) < 0.3
        heavy = {*OPTIONAL, "qwix", "scipy.optimize", "jax.experimental.pallas", "jax.experimental.checkify"}
        heavy |= {"jax_fp8attn.pallas", "jax_fp8attn.custom_calls", "jax_fp8attn.xla", "jax_fp8attn.reference"}
        for run in runs:
            assert not heavy & set(run["modules"])
            assert run["events"] == [] and run["backends"] is False

    def test_usable_without_any_optional_library(self, tmp_path: Path) -> None:
        """R21: flax, torch, triton, the vendors and the tools of the tests are absent."""
        absent = "".join(f"sys.modules[{name!r}] = None\n" for name in (*OPTIONAL, "flatbuffers", "qwix", "pytest"))
        facts = result(python(absent + USE, [REPOSITORY], tmp_path))
        assert facts["merged"] == 2.0

    def test_the_modules_name_flax(self, tmp_path: Path) -> None:
        """R21: without flax one clear line."""
        code = "import sys, jax_fp8attn\nsys.modules['flax'] = None\nimport jax_fp8attn.nn"
        done = python(code, [REPOSITORY], tmp_path)
        assert done.returncode == 1
        assert "ImportError: jax_fp8attn.nn needs flax: pip install 'flax>=0.12.12'" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="session")
def setuptools(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where a setuptools that can build the project is: installed, or fetched by pip as a build would."""
    if importlib.util.find_spec("setuptools"):
        import setuptools

        if int(setuptools.__version__.split(".")[0]) >= 77:
            return []
    folder = tmp_path_factory.mktemp("setuptools")
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "setuptools>=77"]
    done = subprocess.run(fetch, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"building needs setuptools>=77, and pip cannot fetch it: {done.stderr[-300:]}")
    return [str(folder)]


def build(hook: str, project: Path, out: Path, setuptools: list[str], **settings: str) -> Path:
    """Calls a hook of the build backend, as pip does."""
    out.mkdir(exist_ok=True)
    code = "import setuptools.build_meta as b, json\n"
    arguments = f"{str(out)!r}, {settings or None!r}"
    code += f"print(json.dumps(b.{hook}({arguments})))"
    return out / result(python(code, setuptools, project))


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    unwanted = shutil.ignore_patterns(".git", ".venv*", "shared", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(REPOSITORY, copy, ignore=unwanted)
    return copy


@pytest.fixture(scope="session")
def wheel(checkout: Path, setuptools: list[str]) -> Path:
    return build("build_wheel", checkout, checkout.parent / "dist", setuptools)


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def unpacked(wheel: Path, folder: Path) -> Path:
    """A pure wheel's files lie as they are installed."""
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.mark.slow
class TestBuilt:
    def test_wheel(self, wheel: Path, tmp_path: Path) -> None:
        """R21: every source file under its installed name, py.typed, the licence, and nothing else."""
        files = contents(wheel)
        info = {name for name in files if ".dist-info/" in name}
        assert {name for name in files - info if name.endswith(".py")} == sources()
        data = {"py.typed", "tuned/nvidia-h200.json", "custom_calls/src/aiter_mla_prefill.cc"}
        assert {name for name in files - info if not name.endswith(".py")} == {f"jax_fp8attn/{name}" for name in data}
        assert any(name.endswith("/LICENSE") for name in info)
        assert {name.split("/")[0] for name in files - info} == {"jax_fp8attn"}
        assert wheel.name.endswith("-py3-none-any.whl")
        site = unpacked(wheel, tmp_path / "site")
        assert_usable([site], tmp_path, site / "jax_fp8attn", site / "jax_fp8attn")

    def test_installed_by_pip(self, wheel: Path, tmp_path: Path) -> None:
        """Beside a bare checkout in the current folder the installed copy wins."""
        site = tmp_path / "site"
        install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
        subprocess.run([sys.executable, "-m", *install], check=True, capture_output=True, timeout=120)
        assert_usable([site], REPOSITORY / "docs", site / "jax_fp8attn", site / "jax_fp8attn")

    def test_sdist_to_wheel(self, checkout: Path, wheel: Path, setuptools: list[str], tmp_path: Path) -> None:
        """R21: the source distribution builds the same wheel."""
        archive = build("build_sdist", checkout, tmp_path / "sdist", setuptools)
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / "source", filter="data")
        (project,) = (tmp_path / "source").iterdir()
        again = build("build_wheel", project, tmp_path / "dist", setuptools)
        assert contents(again) == contents(wheel)
        site = unpacked(again, tmp_path / "site")
        assert_usable([site], tmp_path, site / "jax_fp8attn", site / "jax_fp8attn")

    @pytest.mark.parametrize("mode", [{}, {"editable_mode": "compat"}, {"editable_mode": "strict"}])
    def test_editable(self, checkout: Path, setuptools: list[str], tmp_path: Path, mode: dict[str, str]) -> None:
        """R21: in each mode of setuptools."""
        wheel = build("build_editable", checkout, tmp_path / "dist", setuptools, **mode)
        site = unpacked(wheel, tmp_path / "site")
        done = python(USE, [], tmp_path, (site,))
        files = result(done)["files"]
        assert result(done)["merged"] == 2.0
        for name, path in files.items():
            assert Path(path).resolve().is_relative_to(checkout), (name, path)
