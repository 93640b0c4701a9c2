"""Rules that the source itself keeps: who imports whom, where FP8 casts live, what every public name states."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import jax_fp8attn
from jax_fp8attn import dispatch

REPOSITORY = Path(__file__).resolve().parent.parent
BACKENDS = ("pallas", "custom_calls", "xla", "reference")
OPS = ("mla_prefill", "mla_chunked", "merge", "sparse_prefill", "gdn_prefill")
VENDORS = {"triton", "jax_triton", "flashinfer", "cutlass", "jax_tvm_ffi"}
OPTIONAL = {"torch", "flax", "matplotlib", "rich", "qwix", *VENDORS}
CONVERSIONS = ("astype", "convert_element_type", "asarray", "array", "full", "full_like")


def installed_name(path: Path) -> str:
    """The dotted name that a file has in the installed package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts if parts[0] == "jax_fp8attn" else ("jax_fp8attn", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    installed_name(path): path
    for folder in ("jax_fp8attn", "pallas", "custom_calls", "benchmarks")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def modules(*within: str) -> list[str]:
    return [name for name in TREES if any(name == w or name.startswith(f"{w}.") for w in within)]


def place(name: str, node: ast.AST) -> str:
    return f"{FILES[name].relative_to(REPOSITORY)}:{node.lineno}"


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every module that is imported; ``from a import b`` counts as a.b, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def package_imports(name: str) -> Iterator[tuple[str, ast.AST]]:
    """The modules of this package that a module imports."""
    for imported, node in imports(TREES[name]):
        while imported and imported not in TREES:
            imported = imported.rpartition(".")[0]
        if imported:
            yield imported, node


def outer_statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs at import time: everything outside functions."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            stack += ast.iter_child_nodes(node)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_fp8(node: ast.AST) -> bool:
    """An expression that names an FP8 type of numbers (e8m0 holds scales)."""
    text = ast.unparse(node)
    return bool(re.search(r"\bE4M3|\bE5M2|float8_e4m3|float8_e5m2|\bFP8_DTYPE", text))


def fp8_casts(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func).startswith("checks."):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        # the first argument of a function is the value, that of a method the type
        types = arguments if called == "astype" else arguments[1:]
        if (called in CONVERSIONS and any(map(is_fp8, types))) or called.startswith("float8_e"):
            yield node


class TestCasts:
    def test_fp8_casts_live_in_quantize(self) -> None:
        """R2, R7: every cast to FP8 clamps first, in one function; a kernel's epilogue clamps where it casts."""
        wrong = []
        for name in TREES:
            if name == "jax_fp8attn.quantize":
                continue
            clamping = {
                cast
                for function in functions(TREES[name])
                if name.startswith("jax_fp8attn.pallas.")
                and any(re.search(r"\b(clip|minimum)\b.*FP8_MAX|\blimit\b", ast.unparse(n)) for n in function.body)
                for cast in fp8_casts(function)
            }
            wrong += [place(name, cast) for cast in fp8_casts(TREES[name]) if cast not in clamping]
        assert not wrong

    def test_the_one_function(self) -> None:
        """quantize.py itself converts to FP8 in cast_fp8 alone, by its ``dtype`` argument."""
        tree = TREES["jax_fp8attn.quantize"]
        assert not list(fp8_casts(tree))
        (cast,) = (f for f in functions(tree) if f.name == "cast_fp8")
        text = ast.unparse(cast)
        assert "jnp.clip(x, -limit, limit)" in text and "isnan" in text and ".astype(dtype)" in text

    @pytest.mark.parametrize(
        "line",
        [
            "x.astype(jnp.float8_e4m3fn)",
            "x.astype(E4M3)",
            "x.astype(dtype='float8_e4m3fn')",
            "lax.convert_element_type(x, jnp.float8_e5m2)",
            "jnp.asarray(x, dtype=quantize.E4M3)",
            "jnp.float8_e4m3fn(x)",
            "jnp.full(shape, 1.0, ml_dtypes.float8_e4m3fnuz)",
        ],
    )
    def test_the_rule_sees_a_cast(self, line: str) -> None:
        assert list(fp8_casts(ast.parse(line)))

    @pytest.mark.parametrize(
        "line", ["lax.bitcast_convert_type(x, jnp.float8_e4m3fn)", "jnp.asarray(x)", "x.dtype == E4M3", "x.astype(f32)"]
    )
    def test_the_rule_lets_pass(self, line: str) -> None:
        assert not list(fp8_casts(ast.parse(line)))


class TestImports:
    GROUND = frozenset(
        f"jax_fp8attn.{name}" for name in ("quantize", "latent", "errors", "problems", "offsets", "folding")
    )

    def test_reference_stands_on_the_ground_floor(self) -> None:
        for name in modules("jax_fp8attn.reference"):
            for imported, node in package_imports(name):
                allowed = imported in self.GROUND or imported.startswith("jax_fp8attn.reference")
                assert allowed, f"{place(name, node)} imports {imported}"

    def test_backends_import_neither_each_other_nor_ops(self) -> None:
        """The walk goes one way: public op, dispatch, backend."""
        ops = {f"jax_fp8attn.{op}" for op in OPS} | {"jax_fp8attn"}
        for backend in BACKENDS:
            others = tuple(f"jax_fp8attn.{other}" for other in BACKENDS if other != backend)
            for name in modules(f"jax_fp8attn.{backend}"):
                for imported, node in package_imports(name):
                    wrong = imported in ops or imported.startswith(others)
                    assert not wrong, f"{place(name, node)} imports {imported}"

    def test_public_modules_import_no_backend(self) -> None:
        """Dispatch imports them by name, when they are asked for; nothing else does at import time. Benchmarks, which
        nothing else imports, may."""
        backends = tuple(f"jax_fp8attn.{backend}" for backend in BACKENDS)
        for name in TREES:
            if name.startswith((*backends, "jax_fp8attn.benchmarks")):
                continue
            for node in outer_statements(TREES[name]):
                for imported, _ in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                    assert not imported.startswith(backends), f"{place(name, node)} imports {imported}"

    def test_the_ground_floor_imports_no_op(self) -> None:
        upper = {f"jax_fp8attn.{name}" for name in (*OPS, "dispatch", "testing", "sharding", "torch")}
        for name in self.GROUND:
            for imported, node in package_imports(name):
                assert imported not in upper, f"{place(name, node)} imports {imported}"

    def test_optional_libraries_are_imported_lazily(self) -> None:
        """R21: no module of the package needs one at import time, the Flax modules and the PyTorch bridge apart."""
        for name in TREES:
            if name.startswith(("jax_fp8attn.nn", "jax_fp8attn.torch")):
                continue
            for node in outer_statements(TREES[name]):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    roots = {imported.partition(".")[0] for imported, _ in imports(ast.Module([node], []))}
                    assert not roots & OPTIONAL, f"{place(name, node)} imports {roots & OPTIONAL}"

    def test_no_kernel_is_built_at_import_time(self) -> None:
        """R16: JAX caches module-level kernels unsoundly across grids."""
        for name in modules("jax_fp8attn.pallas", "jax_fp8attn.custom_calls"):
            for node in outer_statements(TREES[name]):
                if isinstance(node, ast.Call):
                    built = re.search(r"\b(plgpu\.kernel|pallas_call|ffi_call)\b", ast.unparse(node.func))
                    assert not built, place(name, node)

    def test_the_table_of_implementations_points_at_files(self) -> None:
        """A folder is a backend, a file name is an op."""
        for op, rows in dispatch.CANDIDATES.items():
            for row in rows:
                if row.module is not None:
                    assert row.module in TREES, f"{op}: {row.module}"
                    defined = {function.name for function in functions(TREES[row.module])}
                    assert {"supports", "run"} <= defined, row.module
        for op in ("mla_prefill", "merge", "sparse_prefill", "gdn_prefill"):
            for folder in ("jax_fp8attn", "jax_fp8attn.xla", "jax_fp8attn.reference"):
                assert f"{folder}.{op}" in TREES


class TestManners:
    def test_no_assert_for_users(self) -> None:
        for name in TREES:
            if name == "jax_fp8attn.testing":
                continue
            for node in ast.walk(TREES[name]):
                assert not isinstance(node, ast.Assert), place(name, node)

    def test_no_print_outside_the_command_line(self) -> None:
        for name in TREES:
            if name.startswith(("jax_fp8attn.cli", "jax_fp8attn.benchmarks")):
                continue
            for node in ast.walk(TREES[name]):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in ("print", "pprint", "sys.stdout.write"), place(name, node)

    def test_no_machine_paths(self) -> None:
        pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users|tmp|mnt|data)/\w")
        folders = ("jax_fp8attn", "pallas", "custom_calls", "benchmarks", "docs", "tests")
        texts = [REPOSITORY / "README.md", REPOSITORY / "Makefile", REPOSITORY / "pyproject.toml"]
        for folder in folders:
            texts += [p for p in (REPOSITORY / folder).rglob("*") if p.suffix in (".py", ".md", ".cc", ".h")]
        for path in texts:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not pattern.search(line), f"{path.relative_to(REPOSITORY)}:{number}"

    def test_environment_variables_are_the_documented_ones(self) -> None:
        allowed = {"IMPLEMENTATION", "FP8_PREFILL", "CACHE_DIR", "TUNING", "HIP_LIBRARY", "AITER_HSA"}
        for name, path in FILES.items():
            used = set(re.findall(r"JAX_FP8ATTN_([A-Z0-9_]+)", path.read_text()))
            assert used <= allowed, f"{name}: {used - allowed}"

    def test_no_global_flags_and_no_argument_parsing_in_the_library(self) -> None:
        for name in TREES:
            if name.startswith(("jax_fp8attn.cli", "jax_fp8attn.__main__")):
                continue
            for node in ast.walk(TREES[name]):
                assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv"), place(name, node)
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) != "jax.config.update", place(name, node)

    def test_comments(self) -> None:
        """No banners, nothing left to do, no code commented out."""
        banner = re.compile(r"#\s*[-=#*~]{4,}")
        left = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
        for path in FILES.values():
            for number, line in enumerate(path.read_text().splitlines(), 1):
                where = f"{path.relative_to(REPOSITORY)}:{number}"
                assert not banner.search(line) and not left.search(line), where
                assert len(line) <= 120, f"{where}: {len(line)} characters"


class TestPublicNames:
    PUBLIC = {name: getattr(jax_fp8attn, name) for name in jax_fp8attn.__all__}

    def test_all_is_sorted_and_complete(self) -> None:
        assert list(jax_fp8attn.__all__) == sorted(jax_fp8attn.__all__, key=str)
        bound = {n for n, x in vars(jax_fp8attn).items() if not n.startswith("_") and not inspect.ismodule(x)}
        assert bound - {"VERSION"} <= set(jax_fp8attn.__all__)

    @pytest.mark.parametrize("name", sorted(PUBLIC))
    def test_documented(self, name: str) -> None:
        """Every public name says what it is; a function of more than two arguments describes each of them, or names
        the function that does."""
        thing = self.PUBLIC[name]
        text = inspect.getdoc(thing) or ""
        assert len(text) > 20, name
        if not inspect.isfunction(thing) or len(inspect.signature(thing).parameters) <= 2:
            return
        for other in re.findall(r"\bas in ``(\w+)``", text):
            text += inspect.getdoc(self.PUBLIC[other])
        for argument in inspect.signature(thing).parameters:
            if argument not in ("args", "kwargs"):
                assert re.search(rf"\b{argument}\b", text), f"{name}: {argument} is not described"

    def test_every_module_has_a_docstring(self) -> None:
        for name in TREES:
            if name != "jax_fp8attn._version":
                assert ast.get_docstring(TREES[name]) or not TREES[name].body, name

    def test_every_public_function_is_annotated(self) -> None:
        missing = []
        for name in TREES:
            for function in self._public(TREES[name]):
                arguments = function.args
                every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                every += [a for a in (arguments.vararg, arguments.kwarg) if a]
                bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or function.returns is None:
                    missing.append(f"{place(name, function)} {function.name}")
        assert not missing

    def _public(self, tree: ast.Module) -> Iterator[ast.FunctionDef]:
        """Functions and methods without an underscore, not those inside functions."""
        for node in tree.body:
            inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
            for candidate in inner:
                if isinstance(candidate, ast.FunctionDef) and not re.match(
                    r"_(?!_init__|_post_init__)", candidate.name
                ):
                    yield candidate

    def test_annotations_resolve(self) -> None:
        """Types that a tool can read: no name is missing from its module."""
        for name, thing in self.PUBLIC.items():
            if inspect.isfunction(thing):
                module = importlib.import_module(thing.__module__)
                for annotation in inspect.get_annotations(thing).values():
                    if isinstance(annotation, str):
                        assert eval(annotation, vars(module)) is not NotImplemented, name

    def test_function_sizes(self) -> None:
        """Nine of ten functions within 60 lines, docstrings aside; none above 150."""
        sizes = {}
        for name in TREES:
            for function in functions(TREES[name]):
                documented = ast.get_docstring(function) is not None and len(function.body) > 1
                first = function.body[1] if documented else function.body[0]
                sizes[place(name, function)] = function.end_lineno - first.lineno + 1
        long = sorted((size, where) for where, size in sizes.items() if size > 60)
        assert len(long) <= 0.1 * len(sizes), long
        assert not long or long[-1][0] <= 150, long

    @pytest.mark.parametrize("check", ["fp8", "assert", "print"])
    def test_the_scan_sees_the_files(self, check: str) -> None:
        """The rules above look at something."""
        counts: dict[str, Callable[[ast.AST], bool]] = {
            "fp8": lambda node: isinstance(node, ast.Name) and node.id == "cast_fp8",
            "assert": lambda node: isinstance(node, ast.Assert),
            "print": lambda node: isinstance(node, ast.Call) and ast.unparse(node.func) == "print",
        }
        assert sum(counts[check](node) for tree in TREES.values() for node in ast.walk(tree)) > 0
        assert len(TREES) >= 20
