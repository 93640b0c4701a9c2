"""The benchmark of gdn_prefill on tiny shapes, the oracle in the kernels' place. Nothing here is timed."""

import contextlib
import ctypes
import functools
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_fp8attn.benchmarks import flashinfer_gdn, gdn, models, peers, timing, trial

from jax_fp8attn import dispatch
from jax_fp8attn.cli import bench
from jax_fp8attn.gdn_prefill import gdn_prefill

SHAPE = {"B": 2, "T": 96, "Hk": 2, "Hv": 4, "D": 32}


def reference(*arrays, implementation, **options):
    """The oracle's arithmetic is the same, and compiles in a tenth of the time."""
    assert implementation == "xla"
    return gdn_prefill(*arrays, implementation="reference", **options)


def tried(variant: str = "bf16", folder=None, **shape) -> trial.Trial:
    return gdn.trial(models.Case("gdn_prefill", "tiny", SHAPE | shape, variant), folder)


def changed(x: jax.Array, where: tuple[int, ...], value: object) -> jax.Array:
    copy = np.array(x)
    copy[where] = value
    return jnp.asarray(copy)


@functools.cache
def with_the_oracle(variant: str) -> trial.Trial:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdn, "offered", lambda op, problem: ["reference"])
        patch.setattr(gdn, "gdn_prefill", reference)
        return tried(variant)


class TestGate:
    @pytest.mark.parametrize("variant", ["bf16", "bf16 pool"])
    def test_right_results_pass(self, variant) -> None:
        """And those of other inputs do not; nor what is wrong somewhere. In a pool a second call starts from what the
        first one left, and rows of no sequence keep their bits."""
        made = with_the_oracle(variant)
        (contender,) = made.contenders
        out, states = contender.call(0)
        kept = np.asarray(states)
        bound = made.bound(contender)
        assert 0 < made.error(contender, (out, states)) <= bound
        operands = gdn._operands(SHAPE, 0)
        slots = np.asarray(operands.slots) if "pool" in variant else np.arange(2)
        for wrong in (
            (jnp.asarray(np.asarray(out)[:, ::-1]), states),
            (changed(out, (95, 0), 0), states),
            (changed(out, (50, 1, 3), jnp.nan), states),  # of a head that is not compared
            (out, changed(states, (slots[1], 3), 1.03 * kept[slots[1], 3])),
            (out, changed(states, (slots[1], 2, 0, 0), jnp.inf)),
            (out, jnp.asarray(kept.swapaxes(-1, -2))),
        ):
            assert made.error(contender, wrong) > bound
        assert made.error(contender, contender.call(1)) > bound
        if "pool" in variant:
            others = np.setdiff1d(np.arange(5), slots)
            assert (kept[others] == np.asarray(operands.pool)[others]).all()
            assert (np.asarray(contender.call(0)[1]) != kept).any()

    def test_what_goes_wrong_late_is_seen(self) -> None:
        """Four per cent of the last stretch: less than the bound if all tokens of a sequence were one."""
        shape = {"B": 1, "T": 32 * gdn.STRETCH, "Hv": 2, "D": 2}
        out = np.random.default_rng(0).standard_normal((shape["T"], 2, 2), np.float32)
        states = np.ones((1, 2, 2, 2), np.float32)
        expected = gdn._Expected(out, states)
        late = out * np.where(np.arange(shape["T"])[:, None, None] < 31 * gdn.STRETCH, 1, np.float32(1.04))
        error = lambda out: gdn._error(shape, (jnp.asarray(out), jnp.asarray(states)), expected, None)
        assert error(out) == 0 and error(late) == pytest.approx(0.04, rel=1e-3)
        assert np.linalg.norm(late - out) / np.linalg.norm(out) < gdn.BOUND < 0.04

    @pytest.mark.parametrize("fault", ["beta", "g", "scale", "offsets"])
    def test_a_kernel_with_a_fault(self, fault, monkeypatch) -> None:
        execute = dispatch.execute

        def faulty(op, problem, names, arrays):
            changes = {
                "beta": {"beta": arrays.beta * 0.97},
                "g": {"g": arrays.g * 0.9},
                "scale": {"scale": arrays.scale * 1.02},
                "offsets": {"start": arrays.start.at[1].add(1)},
            }
            return execute(op, problem, names, arrays._replace(**changes[fault]))

        made = with_the_oracle("bf16")
        (contender,) = made.contenders
        monkeypatch.setattr(dispatch, "execute", faulty)
        assert made.error(contender, contender.call(0)) > made.bound(contender)


class TestModel:
    def test_bytes_and_flops(self) -> None:
        tokens, k_heads, heads, width, sequences = 96, 2, 4, 32, 2
        states = sequences * heads * width * width * 4
        rows = tokens * width * 2
        made, in_pool = with_the_oracle("bf16"), with_the_oracle("bf16 pool")
        assert made.bytes == rows * (2 * k_heads + heads) + tokens * heads * 8 + rows * heads + states
        per_token = 2 * width * width * 3  # S^T k, the update, S^T q
        assert made.flops == in_pool.flops == tokens * heads * per_token
        gates = tokens * heads * 2 * 2 + 2 * heads * 4
        assert in_pool.bytes == rows * (2 * k_heads + heads) + gates + rows * heads + 2 * states

    def test_gates(self) -> None:
        """The split form's gates are the packed form's."""
        x = gdn._operands(SHAPE, 0)
        part = gdn._split(2, 32, x)
        step = np.log1p(np.exp(np.asarray(x.a, np.float64) + np.asarray(x.dt_bias)))
        np.testing.assert_allclose(part.g, -np.exp(np.asarray(x.A_log, np.float64)) * step, rtol=1e-5)
        np.testing.assert_allclose(part.beta, 1 / (1 + np.exp(-np.asarray(x.b, np.float64))), rtol=1e-5)
        assert part.q.shape == (96, 2, 32) and part.v.shape == (96, 4, 32) and float(part.g.max()) <= 0
        assert (np.asarray(x.qkv[:, 64:128]) == np.asarray(part.k).reshape(96, 64)).all()

    @pytest.mark.parametrize("case", models.cases("gdn_prefill"), ids=lambda case: f"{case.name} {case.variant}")
    def test_every_case_builds(self, case, monkeypatch) -> None:
        """Its heads, with few tokens and narrow ones: what would be launched."""
        shape = case.shape | {"T": 2 * case.shape["B"], "D": 4}
        problems = []
        monkeypatch.setattr(gdn, "offered", lambda op, problem: problems.append(problem) or ["pallas"])
        ours = gdn._ours_in_pool if case.variant == "bf16 pool" else gdn._ours
        jax.eval_shape(lambda: ours(shape, [gdn._operands(shape, 0)]) and None)
        (problem,) = problems
        assert problem.qk_l2norm and problem.out_dtype == jnp.bfloat16
        facts = (problem.q_heads, problem.k_heads, problem.v_heads, problem.sequences)
        assert facts == (shape["Hk"], shape["Hk"], shape["Hv"], shape["B"])

    def test_xla_only_where_it_is_quick(self, monkeypatch) -> None:
        monkeypatch.setattr(gdn, "offered", lambda op, problem: ["pallas", "xla"])
        with_xla = []
        for case in models.cases("gdn_prefill"):
            problem = gdn.GdnProblem(**gdn._facts(case.shape))
            if "xla" in gdn._names("gdn_prefill", problem) and case.variant == "bf16":
                with_xla.append(case.shape["T"])
        assert set(with_xla) == {8192}


class TestOffered:
    def test_of_a_hopper_gpu(self) -> None:
        with dispatch.target_device(dispatch.Device("cuda", "NVIDIA H200", (9, 0))):
            for shape in (case.shape for case in models.cases("gdn_prefill")):
                assert trial.offered("gdn_prefill", gdn.GdnProblem(**gdn._facts(shape)))[0] == "pallas"
            pool = gdn.GdnPoolProblem(**gdn._facts(shape), pool_rows=3)
            assert trial.offered("gdn_prefill_pool", pool)[0] == "pallas"


class TestPeers:
    """What flash-linear-attention is called with: the oracle stands for its kernels."""

    @staticmethod
    def rule(q, k, v, g, beta, **options):
        assert options == {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "state_v_first": True}
        out, states = zip(
            *(gdn_prefill(*x, qk_l2norm=True, implementation="reference") for x in zip(q, k, v, g, beta, strict=True)),
            strict=True,
        )
        return jnp.stack(out), jnp.concatenate(states)

    def test_split(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(no_grad=contextlib.nullcontext))
        monkeypatch.setattr(peers, "to_torch", lambda x: x)
        made = with_the_oracle("bf16")
        peer = gdn._fla(SHAPE, [gdn._operands(SHAPE, seed) for seed in range(2)], self.rule)
        assert peer.is_peer and made.bound(made.contenders[0]) < made.bound(peer)
        assert made.error(peer, peer.call(0)) <= made.bound(peer) < made.error(peer, peer.call(1))

    def test_tuned_before(self, monkeypatch) -> None:
        """With tensors of the shapes of every case that it runs in."""
        log = []
        empty = lambda *shape, device, dtype="float32": np.empty(shape, np.float16 if dtype == "bfloat16" else dtype)
        torch = types.SimpleNamespace(no_grad=contextlib.nullcontext, randn=empty, rand=empty, bfloat16="bfloat16")
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setattr(peers, "tuned_at_once", lambda: contextlib.nullcontext(log.append("tuning")))
        rule = lambda *tensors, **options: log.append([x.shape for x in tensors])
        monkeypatch.setattr(peers, "gated_delta_rule", lambda folder: rule if folder else None)
        cases = [case for case in models.cases("gdn_prefill") if case.shape["T"] <= 8192]
        gdn.prepare(cases, None)
        assert log == []
        gdn.prepare(cases, "folder")
        assert log[0] == "tuning" and len(log) == 1 + sum(case.variant == "bf16" for case in cases)
        assert log[1] == [(1, 8192, 2, 128), (1, 8192, 2, 128), (1, 8192, 8, 128), (1, 8192, 8), (1, 8192, 8)]

    def test_configurations_are_compiled_ahead(self, monkeypatch) -> None:
        """All of them before one is timed, as a launch without the flag that says it is one; Triton is itself after."""
        log = []

        class Autotuner:
            do_bench = None

            def warmup(self, *args, **options):
                log.append(("warmup", args, options))

            def run(self, *args, **options):
                log.append(("run", args, options, self._do_bench.keywords))

        run = Autotuner.run
        mode = lambda pool, ignore_errors: contextlib.nullcontext(log.append(("mode", ignore_errors)))
        triton = types.ModuleType("triton")
        triton.AsyncCompileMode, triton.testing = mode, types.SimpleNamespace(do_bench=print)
        modules = {"triton": triton, "triton.runtime": types.ModuleType("triton.runtime")}
        modules["triton.runtime.autotuner"] = types.SimpleNamespace(Autotuner=Autotuner)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        with peers.tuned_at_once():
            Autotuner().run(1, grid=(2,), warmup=False)
        assert log == [
            ("mode", True),
            ("warmup", (1,), {"grid": (2,)}),
            ("run", (1,), {"grid": (2,), "warmup": False}, {"warmup": 5, "rep": 20}),
        ]
        assert Autotuner.run is run

    def test_tree_is_found(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert peers.gated_delta_rule(None) is None and peers.gated_delta_rule(tmp_path / "empty") is None
        package = tmp_path / "wheel" / "fla" / "ops" / "gated_delta_rule"
        package.mkdir(parents=True)
        for folder in (package, package.parent, package.parent.parent):
            (folder / "__init__.py").write_text("")
        (package / "__init__.py").write_text("import einops\nchunk_gated_delta_rule = einops.rule\n")
        (tmp_path / "einops").mkdir()
        (tmp_path / "einops" / "__init__.py").write_text("rule = 'found'\n")
        try:
            assert peers.gated_delta_rule(tmp_path) == "found"
        finally:
            for name in [name for name in sys.modules if name.split(".")[0] in ("fla", "einops")]:
                del sys.modules[name]


class TestFlashInfer:
    """The oracle stands for its kernels, a program for a CPU for those that hold them."""

    @staticmethod
    def rule(q, k, v, g, beta, offsets):
        return gdn_prefill(q, k, v, g, beta, cu_seqlens=offsets, qk_l2norm=True, implementation="reference")

    def contenders(self, rule=None) -> list[timing.Contender]:
        return gdn._flashinfer(SHAPE, [gdn._operands(SHAPE, seed) for seed in range(2)], rule or self.rule)

    def test_gate(self) -> None:
        made = with_the_oracle("bf16")
        for peer in self.contenders():
            assert peer.is_peer and made.bound(peer) == gdn.PEER_BOUND
            assert made.error(peer, peer.call(0)) <= made.bound(peer) < made.error(peer, peer.call(1))

    @pytest.mark.parametrize("fault", ["decay", "normalised", "offsets"])
    def test_a_program_with_a_fault(self, fault) -> None:
        faults = {
            "decay": lambda q, k, v, g, beta, offsets: self.rule(q, k, v, -jnp.exp(g), beta, offsets),
            "normalised": lambda q, k, *others: gdn_prefill(
                q, k, *others[:3], cu_seqlens=others[3], implementation="reference"
            ),
            "offsets": lambda *arrays: self.rule(*arrays[:5], arrays[5].at[1].add(1)),
        }
        made = with_the_oracle("bf16")
        whole, _ = self.contenders(faults[fault])
        assert not made.error(whole, whole.call(0)) <= made.bound(whole)

    def test_the_rule_alone(self) -> None:
        """What is not FlashInfer's rule is not in its time; it makes no calls of its own."""
        whole, rule = self.contenders()
        call = [
            ("kernel_cutlass__kernel_tensorptrbf16gmemalign256odiv16384", 5.0),
            ("wrapped_exponential", 1.0),
            ("kernel_cutlass_kernel_flashinfergdn_kernelsdelta_rule_dsldelta_rule_cp_sm90CPDeltaRuleMN", 20.0),
            ("kernel_cutlass_kernel_flashinfergdn_kernelsdelta_rule_dsldelta_rule_cp_sm90CPDeltaRulePrefill", 30.0),
        ]
        assert timing._samples(whole, ["flashinfer"], [call])[0] == [56.0]
        assert timing._samples(rule, ["flashinfer"], [call])[0] == [50.0]
        assert rule.name == f"{whole.name} kernel" and not whole.within

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch) -> Path:
        """Two programs, and a library whose functions return what they are called, as capsules do."""
        for cached in (peers._flashinfer_gdn, peers._cute_library):
            cached.cache_clear()
        for tokens in (2, 96):
            kind = jax.ShapeDtypeStruct((tokens,), jnp.float32)
            program = jax.export.export(jax.jit(lambda x: x + x.shape[0]), platforms=["cpu"])(kind)
            (tmp_path / peers.flashinfer_program(SHAPE | {"T": tokens})).write_bytes(program.serialize())
        (tmp_path / peers.CUTE_LIBRARY).write_bytes(b"")

        class Library:
            def __init__(self, path):
                assert Path(path).is_absolute() and Path(path).exists()

            def __getattr__(self, name):
                def function():
                    assert function.restype is ctypes.c_void_p
                    return f"{name}()"

                function.__name__ = name
                return function

        self.log = []
        monkeypatch.setattr(ctypes, "CDLL", Library)
        monkeypatch.setattr(jax.ffi, "pycapsule", lambda x: getattr(x, "__name__", x))
        for kind in ("type", "target"):
            add = lambda *facts, platform, kind=kind: self.log.append((kind, *facts, platform))
            monkeypatch.setattr(jax.ffi, f"register_ffi_{kind}", add)
        return tmp_path

    def test_programs(self, folder, monkeypatch) -> None:
        """The one of the shape; what launches their kernels is registered once, under NVIDIA's names."""
        monkeypatch.chdir(folder)
        for tokens in (2, 96):
            program = peers.flashinfer_gdn(Path("."), SHAPE | {"T": tokens})
            assert program(jnp.zeros(tokens)).tolist() == [tokens] * tokens
        state = {
            "type_id": "CuteDSLRT_NvJaxCutlassCallStateTypeId_v2()",
            "type_info": "CuteDSLRT_NvJaxCutlassCallStateTypeInfo_v2()",
        }
        stages = {
            "execute": "CuteDSLRT_NvJaxCutlassCallExecute_v2",
            "instantiate": "CuteDSLRT_NvJaxCutlassCallInstantiate_v2",
            "prepare": "CuteDSLRT_NvJaxCutlassCallPrepare_v2",
        }
        assert self.log == [
            ("type", "CuteDSLRT_NvJaxCutlassCallTypes_v2", state, "CUDA"),
            ("target", "CuteDSLRT_NvJaxCutlassCall_v2", stages, "CUDA"),
        ]

    def test_absent(self, folder) -> None:
        assert peers.flashinfer_gdn(None, SHAPE) is None and peers.flashinfer_gdn(folder, SHAPE | {"T": 3}) is None
        (folder / peers.CUTE_LIBRARY).unlink()
        assert peers.flashinfer_gdn(folder, SHAPE | {"T": 2}) is None and self.log == []

    def test_contenders(self, folder, monkeypatch) -> None:
        monkeypatch.setattr(gdn, "_ours", lambda *facts: [])
        monkeypatch.setattr(gdn, "_expected", lambda *facts: None)
        names = lambda *facts: [contender.name for contender in tried(*facts).contenders]
        assert names("bf16", folder) == ["flashinfer", "flashinfer kernel"] and names("bf16", folder / "none") == []
        monkeypatch.setattr(gdn, "_ours_in_pool", lambda *facts: [])
        assert names("bf16 pool", folder) == []

    def test_written(self, tmp_path, monkeypatch) -> None:
        """A program for each bf16 case, and the library: what the benchmark looks for."""
        library = tmp_path / "elsewhere" / peers.CUTE_LIBRARY
        library.parent.mkdir()
        library.write_bytes(b"library")
        cutlass = types.SimpleNamespace(find_cute_dsl_runtime_library=lambda: str(library))
        monkeypatch.setitem(sys.modules, "cutlass", types.ModuleType("cutlass"))
        monkeypatch.setitem(sys.modules, "cutlass.jax", cutlass)
        monkeypatch.setattr(flashinfer_gdn, "exported", lambda shape: repr(shape).encode())
        monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
        target = tmp_path / "new" / "peers"
        flashinfer_gdn.main([str(target)])
        assert os.environ["CUTE_DSL_ARCH"] == "sm_90a"
        for case in models.cases("gdn_prefill"):
            file = peers.find(target, peers.flashinfer_program(case.shape))
            assert case.variant != "bf16" or file.read_bytes() == repr(case.shape).encode()
        assert peers.find(target, peers.CUTE_LIBRARY).read_bytes() == b"library"


def test_prepared_before_anything_is_compiled(monkeypatch) -> None:
    log = []
    module = types.SimpleNamespace(
        prepare=lambda cases, folder: log.append(("prepare", len(cases), folder)),
        trial=lambda case, folder: log.append("trial") or trial.Trial([], 1, 1, 1, None, None),
    )
    monkeypatch.setattr(bench, "importlib", types.SimpleNamespace(import_module=lambda name: module))
    options = types.SimpleNamespace(only="1 x 8192", peers="folder", rounds=3)
    assert list(bench._rows("gdn_prefill", options)) == []
    expected = [case for case in models.cases("gdn_prefill") if "1 x 8192" in case.name]
    assert log == [("prepare", len(expected), "folder"), *["trial"] * len(expected)]
