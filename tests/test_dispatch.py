"""Which implementation serves a call, and why: R14."""

import dataclasses
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fp8attn as fp8attn
from jax_fp8attn import Fp8PerGroup, InvalidInputError, UnsupportedError, dispatch, merge_attn_states
from jax_fp8attn.dispatch import Candidate, Device
from jax_fp8attn.problems import MergeProblem

OP = "merge_attn_states"
HOPPER = Device("cuda", "NVIDIA H200", (9, 0))
CPU = Device("cpu", "cpu")
BF16 = jnp.dtype(jnp.bfloat16)
PROBLEM = MergeProblem(states=2, tokens=8, heads=2, width=128, dtype=BF16, out_dtype=BF16)


def arguments(dtype: Any = np.float32) -> list[Any]:
    output, lse = np.ones((4, 2, 32), dtype), np.zeros((2, 4), np.float32)
    return [output, lse, output, lse]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """A fast implementation for CUDA and CPU, first in the table: bf16 only, widths of 128, and it records its runs."""
    module = types.ModuleType("fake_kernel")
    record = types.SimpleNamespace(module=module, runs=0)

    def supports(problem: MergeProblem, device: Device) -> tuple[str, ...]:
        reasons = []
        if problem.dtype != BF16:
            reasons.append(f"takes bfloat16, not {problem.dtype}")
        if problem.width % 128:
            reasons.append(f"takes widths that are multiples of 128, not {problem.width}")
        return tuple(reasons)

    def run(problem: MergeProblem, arrays: Any) -> Any:
        record.runs += 1
        return jnp.full((problem.tokens, problem.heads, problem.width), 7, problem.out_dtype)

    module.supports, module.run = supports, run
    monkeypatch.setitem(sys.modules, "fake_kernel", module)
    rows = [row for row in dispatch.CANDIDATES[OP] if row.name != "pallas"]
    monkeypatch.setitem(dispatch.CANDIDATES, OP, (Candidate("pallas", "fake_kernel", ("cuda", "cpu")), *rows))
    execute = dispatch.execute
    execute.clear_cache()
    yield record
    execute.clear_cache()


class TestSelect:
    def test_automatic_choice_is_the_first_that_can(self, kernel: Any) -> None:
        assert dispatch.select(OP, PROBLEM, None, HOPPER) == "pallas"
        assert dispatch.select(OP, dataclasses.replace(PROBLEM, width=96), None, HOPPER) == "xla"
        assert dispatch.select(OP, PROBLEM, None, Device("tpu")) == "xla"

    def test_automatic_choice_never_takes_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        absent = Candidate("xla", None, missing="switched off")
        reference = dispatch._by_name(OP, "reference")
        monkeypatch.setitem(dispatch.CANDIDATES, OP, (absent, reference))
        with pytest.raises(UnsupportedError, match="switched off") as caught:
            dispatch.select(OP, PROBLEM, None, CPU)
        assert "reference" not in caught.value.reasons
        assert dispatch.select(OP, PROBLEM, "reference", CPU) == "reference"

    def test_a_name_is_strict(self, kernel: Any) -> None:
        """It runs or raises with every reason; nothing slower is taken in silence."""
        assert dispatch.select(OP, PROBLEM, "pallas", HOPPER) == "pallas"
        with pytest.raises(UnsupportedError) as caught:
            merge_attn_states(*arguments(), implementation="pallas")
        assert kernel.runs == 0
        assert caught.value.reasons == {
            "pallas": ("takes bfloat16, not float32", "takes widths that are multiples of 128, not 32")
        }
        for text in ("merge_attn_states", "'pallas'", "cpu", "takes bfloat16, not float32", "multiples of 128, not 32"):
            assert text in str(caught.value)

    def test_a_wish_list_is_tried_in_order(self, kernel: Any) -> None:
        assert dispatch.select(OP, PROBLEM, ("reference", "pallas"), HOPPER) == "reference"
        assert dispatch.select(OP, PROBLEM, ("aiter", "pallas", "xla"), HOPPER) == "pallas"
        narrow = dataclasses.replace(PROBLEM, width=96)
        assert dispatch.select(OP, narrow, ["pallas", "reference"], HOPPER) == "reference"
        with pytest.raises(UnsupportedError) as caught:
            dispatch.select(OP, narrow, ("aiter", "pallas"), HOPPER)
        assert list(caught.value.reasons) == ["aiter", "pallas"]
        assert "'aiter' or 'pallas'" in str(caught.value)

    def test_platforms(self, kernel: Any) -> None:
        with pytest.raises(UnsupportedError, match="needs cuda or cpu; the device is rocm"):
            dispatch.select(OP, PROBLEM, "pallas", Device("rocm", "gfx942"))

    @pytest.mark.parametrize("name", ["cuda", "XLA", "", 5, (), ("xla", "triton"), ("xla", None), b"xla", {"xla"}])
    def test_unknown_names(self, name: Any) -> None:
        """R15: a wrong name is a wrong call, and says which names there are."""
        with pytest.raises(InvalidInputError, match=r"implementation is .*; expected names out of .*'xla'.* or None"):
            merge_attn_states(*arguments(), implementation=name)

    @pytest.mark.parametrize("op", sorted(dispatch.CANDIDATES))
    def test_names_of_the_table(self, op: str) -> None:
        """Every op has xla and reference; what this version lacks is named, with the place to read on."""
        names = [row.name for row in dispatch.CANDIDATES[op]]
        assert len(set(names)) == len(names) and set(names) <= set(dispatch.NAMES)
        assert names[-2:] == ["xla", "reference"]
        for row in dispatch.CANDIDATES[op]:
            assert row.module or "docs/support.md" in row.missing

    def test_selection_is_pure(self, kernel: Any) -> None:
        """A function of problem, device and names: equal on every rank, whatever ran before."""
        problems = [PROBLEM, dataclasses.replace(PROBLEM, width=96), dataclasses.replace(PROBLEM, dtype=np.dtype("f4"))]
        devices = [HOPPER, CPU, Device("rocm", "gfx942")]
        names = [None, "xla", ("pallas", "xla")]
        table = [(p, d, n) for p in problems for d in devices for n in names]
        first = [dispatch.select(OP, p, n, d) for p, d, n in table]
        again = [dispatch.select(OP, p, n, d) for p, d, n in reversed(table)]
        assert first == again[::-1] and set(first) == {"pallas", "xla"}
        assert kernel.runs == 0


class TestBrokenBackends:
    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (ModuleNotFoundError("No module named 'vendor_lib'"), "No module named 'vendor_lib'"),
            (ImportError("vendor_lib 1.0 is too old; pip install 'vendor_lib>=2'"), "pip install 'vendor_lib>=2'"),
            (OSError("libvendor.so.3: cannot open shared object file"), "libvendor.so.3"),
        ],
    )
    def test_an_import_error_is_a_reason(self, monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
        """A backend that cannot be imported says so; a named one raises, the automatic choice is explained."""
        self.plant(monkeypatch, error)
        with pytest.raises(UnsupportedError, match="cannot be imported") as caught:
            merge_attn_states(*arguments(), implementation="fa4")
        assert text in caught.value.reasons["fa4"][0]
        explanation = fp8attn.explain(OP, *arguments())
        assert explanation.taken == "xla"
        assert text in explanation.rows[0].reasons[0] and text in str(explanation)

    def test_other_errors_are_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, AttributeError("a bug of the backend"))
        with pytest.raises(AttributeError, match="a bug of the backend"):
            merge_attn_states(*arguments())

    def test_an_error_inside_a_kernel_is_not_hidden(self, kernel: Any) -> None:
        def run(problem: Any, arrays: Any) -> Any:
            raise RuntimeError("the kernel failed")

        kernel.module.run = run
        output, lse = np.ones((4, 2, 128), BF16), np.zeros((2, 4), np.float32)
        with pytest.raises(RuntimeError, match="the kernel failed"):
            merge_attn_states(output, lse, output, lse)

    def test_backends_are_imported_only_when_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, ImportError("imported"), platforms=("cuda",))
        explanation = fp8attn.explain(OP, *arguments())
        assert explanation.rows[0].reasons == ("needs cuda; the device is cpu",)
        assert self.attempts == 0

    attempts = 0

    def plant(self, monkeypatch: pytest.MonkeyPatch, error: Exception, platforms: tuple[str, ...] = ()) -> None:
        """A first candidate whose import fails."""
        outer = self

        class Finder:
            def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
                if name == "broken_backend":
                    outer.attempts += 1
                    raise error

        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        row = Candidate("fa4", "broken_backend", platforms)
        monkeypatch.setitem(dispatch.CANDIDATES, OP, (row, *dispatch.CANDIDATES[OP]))


class TestEnvironment:
    NAME = "JAX_FP8ATTN_IMPLEMENTATION"

    def test_it_replaces_the_automatic_choice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cases = {"reference": "reference", " pallas , reference ": "reference", "": "xla", "  ": "xla"}
        for text, taken in cases.items():
            monkeypatch.setenv(self.NAME, text)
            assert fp8attn.explain(OP, *arguments()).taken == taken
            assert fp8attn.explain(OP, *arguments(), implementation="xla").taken == "xla"

    def test_it_is_strict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(self.NAME, "pallas,aiter")
        with pytest.raises(UnsupportedError) as caught:
            merge_attn_states(*arguments())
        assert list(caught.value.reasons) == ["pallas", "aiter"]

    @pytest.mark.parametrize("text", ["cuda", "xla,", ",", "xla;reference", "XLA"])
    def test_a_bad_value_names_the_variable(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv(self.NAME, text)
        with pytest.raises(InvalidInputError, match="JAX_FP8ATTN_IMPLEMENTATION is"):
            merge_attn_states(*arguments())
        assert merge_attn_states(*arguments(), implementation="xla").shape == (4, 2, 32)


class TestRun:
    def test_the_named_implementation_runs(self, kernel: Any) -> None:
        output, lse = np.ones((4, 2, 128), BF16), np.zeros((2, 4), np.float32)
        assert (np.asarray(merge_attn_states(output, lse, output, lse)) == 7).all() and kernel.runs == 1
        assert (np.asarray(merge_attn_states(output, lse, output, lse, implementation="xla")) == 1).all()
        assert kernel.runs == 1

    def test_profiler_scope(self) -> None:
        """Every op is found in a profile under jax_fp8attn.<op>.<implementation>."""
        lowered = jax.jit(lambda *a: merge_attn_states(*a, implementation="reference")).lower(*arguments())
        assert "jax_fp8attn.merge_attn_states.reference" in lowered.as_text(debug_info=True)

    def test_named_everywhere_under_transformations(self, kernel: Any) -> None:
        """vmap chooses once, for the call as written."""
        many = [np.stack([x, x]) for x in arguments()]
        text = jax.jit(jax.vmap(merge_attn_states)).lower(*many).as_text(debug_info=True)
        assert "jax_fp8attn.merge_attn_states.xla" in text and kernel.runs == 0


class TestExplain:
    def test_every_candidate_is_explained(self, kernel: Any) -> None:
        explanation = fp8attn.explain(OP, *arguments())
        assert [row.name for row in explanation.rows] == ["pallas", "xla", "reference"]
        assert [row.taken for row in explanation.rows] == [False, True, False]
        assert explanation.taken == "xla" and len(explanation.rows[0].reasons) == 2
        text = str(explanation)
        for part in ("merge_attn_states on cpu", "takes bfloat16", "multiples of 128", "taken", "able, not chosen"):
            assert part in text

    def test_shapes_stand_for_arrays(self) -> None:
        """Arrays, shapes and mixed calls give the same problem; scalars and dtypes stay what they are."""
        count = {"prefill_tokens_with_context": 3, "output_quant": Fp8PerGroup(32), "return_lse": True}
        arrays = fp8attn.explain(OP, *arguments(), **count)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments()]
        assert fp8attn.explain(OP, *shapes, **count).problem == arrays.problem
        assert fp8attn.explain(OP, *arguments()[:2], *shapes[2:], **count).problem == arrays.problem
        assert arrays.problem.context_count and arrays.problem.output_quant == Fp8PerGroup(32)
        traced = fp8attn.explain(OP, *shapes, prefill_tokens_with_context=jax.ShapeDtypeStruct((), jnp.int32))
        assert traced.problem.context_count
        for dtype in (np.float32, jnp.bfloat16, np.dtype("float16"), "float32"):
            assert fp8attn.explain(OP, *shapes, out_dtype=dtype).problem.out_dtype == jnp.dtype(dtype)

    def test_nothing_is_computed(self, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        big = jax.ShapeDtypeStruct((10**6, 128, 128), jnp.bfloat16)
        lse = jax.ShapeDtypeStruct((128, 10**6), jnp.float32)

        def refuse(*args: Any) -> Any:
            raise AssertionError("explain ran the op")

        monkeypatch.setattr(dispatch, "execute", refuse)
        assert fp8attn.explain(OP, big, lse, big, lse).taken == "pallas"
        assert kernel.runs == 0

    def test_a_named_implementation_that_cannot(self) -> None:
        explanation = fp8attn.explain(OP, *arguments(), implementation="pallas")
        assert explanation.taken is None and not any(row.taken for row in explanation.rows)

    def test_inside_jit_and_for_the_n_ary_form(self) -> None:
        taken = []

        @jax.jit
        def step(x: jax.Array, lse: jax.Array) -> jax.Array:
            taken.append(fp8attn.explain("merge_attn_states_n", x, lse).taken)
            return x

        step(jnp.ones((3, 4, 2, 32)), jnp.zeros((3, 2, 4)))
        assert taken == ["xla"]
        assert not dispatch._explaining.get()

    def test_a_wrong_call_raises_as_the_op_does(self) -> None:
        """R15."""
        with pytest.raises(InvalidInputError, match="suffix_lse"):
            fp8attn.explain(OP, *arguments()[:3], np.zeros((2, 5), np.float32))
        assert not dispatch._explaining.get()
        assert merge_attn_states(*arguments()).shape == (4, 2, 32)

    @pytest.mark.parametrize("op", ["merge", "quantize_fp8", "", None, "explain", "__doc__"])
    def test_unknown_ops(self, op: Any) -> None:
        with pytest.raises(InvalidInputError, match=r"explain: op is .*expected one of.*merge_attn_states"):
            fp8attn.explain(op)

    def test_facts_are_frozen(self) -> None:
        explanation = fp8attn.explain(OP, *arguments())
        with pytest.raises(dataclasses.FrozenInstanceError):
            explanation.rows = ()
        assert hash(explanation.problem) == hash(dataclasses.replace(explanation.problem))


class TestDevice:
    def test_target_device(self, kernel: Any) -> None:
        """Ahead-of-time compilation for another machine; nested, and undone after an error."""
        problem = dataclasses.replace(PROBLEM)
        here = dispatch.current_device()
        assert here.platform == "cpu" and here.compute_capability is None
        with dispatch.target_device(Device("rocm", "gfx942")):
            assert dispatch.current_device().platform == "rocm"
            assert dispatch.select(OP, problem) == "xla"
            with dispatch.target_device(HOPPER):
                assert dispatch.current_device().compute_capability == (9, 0)
                assert dispatch.select(OP, problem) == "pallas"
                assert "NVIDIA H200" in str(fp8attn.explain(OP, *arguments()))
            assert dispatch.current_device().platform == "rocm"
        with pytest.raises(KeyError), dispatch.target_device(HOPPER):
            raise KeyError
        assert dispatch.current_device() == here

    def test_jax_default_device_is_honoured(self) -> None:
        with jax.default_device(jax.devices("cpu")[1]):
            assert dispatch.current_device().platform == "cpu"
        with jax.default_device("cpu"):
            assert dispatch.current_device().platform == "cpu"

    @pytest.mark.parametrize(
        ("platform", "version", "capability", "expected"),
        [
            ("gpu", "cuda 13000", "9.0", Device("cuda", "card", (9, 0))),
            ("gpu", "cuda 13000", "10.3", Device("cuda", "card", (10, 3))),
            ("gpu", "rocm 70000", "gfx950:sramecc+:xnack-", Device("rocm", "card", architecture="gfx950")),
            ("gpu", "rocm 70000", None, Device("rocm", "card")),
            ("cuda", "", "9.0", Device("cuda", "card", (9, 0))),
            ("tpu", "", None, Device("tpu", "card")),
        ],
    )
    def test_devices_are_described(self, platform: str, version: str, capability: Any, expected: Device) -> None:
        client = types.SimpleNamespace(platform_version=version)
        device = types.SimpleNamespace(client=client, platform=platform, device_kind="card")
        if capability:
            device.compute_capability = capability
        assert dispatch._describe.__wrapped__(device) == expected


def test_unsupported_error_shows_every_reason() -> None:
    error = UnsupportedError("op: cannot", {"a": ["one", "two"], "b": ["three"]})
    assert str(error) == "op: cannot\n  a: one\n  a: two\n  b: three"
    assert error.reasons == {"a": ("one", "two"), "b": ("three",)}
    assert isinstance(error, RuntimeError) and UnsupportedError("alone").reasons == {}
    assert issubclass(InvalidInputError, ValueError)
