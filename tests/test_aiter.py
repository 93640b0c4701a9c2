"""AITER's FP8 MLA prefill kernel on gfx950: everything about the call that can be shown without the GPU."""

import ctypes
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import aiter_fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mla_prefill as contract
from aiter_fakes import COMPILER, MI355X, Amd, code_object, kernel_facts, needs_compiler, plain_plan, problem_of
from jax_fp8attn.custom_calls import aiter_mla_prefill
from jax_fp8attn.custom_calls.common import aiter_code_object, aiter_library, aiter_plan

import jax_fp8attn as fp8attn
from jax_fp8attn import UnsupportedError, cli, dispatch, testing
from jax_fp8attn.cli import amd as amd_command
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MlaProblem

E4M3, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
MI300X = Device("rocm", "AMD Instinct MI300X", architecture="gfx942")
ERROR, LSE_ERROR = 0.03, 1e-5  # of outputs by their norm, for probabilities in e4m3; of lse
PROBLEM = MlaProblem(512, 512, 2, 16, *[np.dtype(E4M3)] * 3, np.dtype(BF16))


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Where the interpreter is, whatever GPU this machine has."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="session")
def amd(tmp_path_factory: pytest.TempPathFactory) -> Amd:
    if "rocm" in jax.devices()[0].client.platform_version.lower():
        pytest.skip("jax has loaded a HIP runtime, which the host library takes: python -m jax_fp8attn amd selftest")
    return Amd(tmp_path_factory.mktemp("amd"))


@pytest.fixture
def machine(amd: Amd, monkeypatch: pytest.MonkeyPatch) -> Amd:
    """This process finds all pieces."""
    for name, value in amd.environment.items():
        monkeypatch.setenv(name, value)
    return amd


def offsets(*lengths: int, first: int = 0) -> jax.Array:
    return jnp.asarray(np.cumsum([first, *lengths]), jnp.int32)


class TestPlan:
    """Against loops: the same records in the same order."""

    SHAPES = [(16, True, False), (12, True, True), (7, False, False), (128, False, True), (1, True, False)]

    @pytest.mark.parametrize(("heads", "causal", "every"), SHAPES)
    def test_equals_the_plain_planner(self, heads: int, causal: bool, every: bool) -> None:
        faults = plan_faults(aiter_plan, heads, causal, every)
        assert not faults

    def test_room_is_enough(self) -> None:
        """The static bounds hold in the worst cases: as many tiles, cuts and parts as there can be."""
        for heads in (1, 2, 3, 96, 128, 256):
            for every in (False, True):
                for lengths in ([1] * 9, [257] * 3, [2048], [1, 1, 700, 1]):
                    shape = aiter_plan.Shape(sum(lengths), len(lengths), heads, False, every)
                    indptr, records, slots = plain_plan(lengths, [130] * len(lengths), heads, False, every)
                    assert len(records) <= heads * shape.segments and len(indptr) == aiter_plan.BLOCKS + 1
                    assert sum(map(len, slots.values())) <= shape.partials
                    assert sum(len(own) - 1 for own in slots.values()) <= shape.extras

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("count - 1 - place // 2", "place // 2"),
            ("TILE * number, -1", "TILE * number + TILE, -1"),
            *(
                pytest.param(*fault, marks=pytest.mark.slow)
                for fault in [
                    ("-(-visible // UNIT)", "visible // UNIT"),
                    ("jnp.minimum(group, total % shape.groups)", "0"),
                    ("jnp.minimum(high, first + ranges.k_length[b])", "high"),
                    ("partial = segments.real if shape.all_partial else", "partial ="),
                    ("head % per_cluster * count[group]", "0"),
                    ("keys - ranges.q_length[b] + end, keys", "end, keys"),
                    ("head | (head + 1) << 16", "head"),
                    ("+ rank\n", "- rank\n"),
                ]
            ),
        ],
    )
    def test_a_planted_fault_is_seen(self, old: str, new: str) -> None:
        broken = mutant(aiter_plan, old, new)
        assert any(plan_faults(broken, *shape, cases=4) for shape in self.SHAPES[:3])


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """A module with one piece of its source replaced."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, old
    spec = importlib.util.spec_from_loader(f"{module.__name__}_mutant", loader=None)
    changed = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = changed  # for its dataclasses
    exec(compile(source.replace(old, new), module.__file__, "exec"), vars(changed))
    return changed


def plan_faults(module: ModuleType, heads: int, causal: bool, every: bool, cases: int = 10) -> list[str]:
    """What differs between a planner and the plain one, over random lengths."""
    sequences, tokens = 4, 2400
    shape = module.Shape(tokens, sequences, heads, causal, every)
    build = jax.jit(lambda *ranges: module.build(shape, module.Ranges(*ranges)))
    rng, faults = np.random.default_rng(heads), []
    for _ in range(cases):
        queries = rng.integers(0, 600, sequences) * (rng.random(sequences) > 0.2)
        keys = np.maximum(queries + rng.choice([0, 1, 700, -150], sequences), 0) * (rng.random(sequences) > 0.1)
        first = np.cumsum([0, *queries]), np.cumsum([0, *keys])
        plan = build(*(jnp.asarray(x, jnp.int32) for x in (first[0][:-1], queries, first[1][:-1], keys)))
        indptr, records, slots = plain_plan(queries.tolist(), keys.tolist(), heads, causal, every)
        if not np.array_equal(plan.work_indptr, indptr) or not np.array_equal(plan.work[: len(records)], records):
            faults.append("records")
        tile, first_partial, count = map(np.asarray, plan[2:5])
        for own in slots.values():
            number = tile[own[0] // 256]
            same = np.flatnonzero(tile == number) * 256
            if same.tolist() != own or first_partial[number] * 256 != own[0] or count[number] != len(own):
                faults.append("parts")
        if count.sum() != sum(map(len, slots.values())) or (tile < shape.tiles).sum() != count.sum():
            faults.append("number of parts")
    return faults


def operands(queries: int, keys: int, heads: int, seed: int = 0, dtype: Any = BF16) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    shapes = (queries, heads, 192), (keys, heads, 192), (keys, heads, 128)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def oracle(*args: Any, **kwargs: Any) -> Any:
    with jax.enable_x64(True):
        return fp8attn.mla_prefill(*args, **kwargs, implementation="reference")


def by_rows(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """RAGGED with SCALES, row by row in float64."""
    scale = SCALES["q_scale"] * SCALES["k_scale"] * 192**-0.5
    out, lse = contract.numpy_attention(q, k, v, RAGGED["cu_seqlens_q"], RAGGED["cu_seqlens_k"], causal, scale)
    return out * SCALES["v_scale"], lse


def records_of(problem: MlaProblem, ranges: dict[str, jax.Array]) -> np.ndarray:
    """Work records of a call with one launch."""
    queries = np.diff(ranges.get("cu_seqlens_q", [0, problem.tokens]))
    keys = np.diff(ranges.get("cu_seqlens_k", [0, problem.keys]))
    every = aiter_mla_prefill._all_partial(problem)
    return plain_plan(queries.tolist(), keys.tolist(), problem.heads, problem.causal, every)[1]


def compare(result: Any, want: Any, error: float = ERROR) -> None:
    (out, lse), (want_out, want_lse) = result, want
    testing.assert_relative_error(out, want_out, error)
    testing.assert_rows_close(out, want_out, 4 * error)
    testing.assert_lse_close(lse, want_lse, LSE_ERROR)


QUERIES, KEYS = (0, 300, 0, 5, 130, 0), (7, 300, 0, 261, 100, 9)
RAGGED = {
    f"cu_seqlens_{name}": np.cumsum([first, *lengths]).astype(np.int32)
    for name, first, lengths in (("q", 2, QUERIES), ("k", 1, KEYS))
}
SCALES = dict(q_scale=0.5, k_scale=2.0, v_scale=1.5)


@needs_compiler
class TestEndToEnd:
    """The public op under jit, plan and merge in JAX, the host library, and the kernel's interpreter."""

    @pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_lse_of_every_row(self, machine: Amd, monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
        """Ragged, with empty sequences, rows of no sequence and rows without a key; NaN in memory of no sequence. A
        second run is equal bit for bit. Grid, block and the numbers among the kernel's arguments. Other lengths and
        scales are values: nothing is traced again."""
        q, k, v = (x.at[0].set(jnp.nan).at[-1].set(jnp.nan) for x in operands(439, 680, 2, dtype=E4M3))
        call = dict(**RAGGED, **SCALES, causal=causal, return_lse=True, out_dtype=F32)
        out, lse = map(np.asarray, machine.attend(q, k, v, **call))
        compare((out, lse), by_rows(q, k, v, causal))
        empty = np.isneginf(lse).T
        assert empty[:2].all() and empty[437:].all() and not out[empty].any()
        assert empty[307:337].all() == causal and not empty[337:437].any()
        testing.assert_bitwise_equal(machine.attend(q, k, v, **call), (out, lse))
        facts = machine.hip.last
        numbers = np.frombuffer(bytes(facts.arguments), np.uint32)[56::4]
        assert (facts.grid, facts.block) == (256, 512)
        assert numbers[0].view(np.float32) == 1 and numbers[1:].tolist() == [439, 2, 680, 680]
        monkeypatch.setattr(aiter_mla_prefill, "run", None)
        other = {name: offsets(9, 1, 0, 2, 100, 5, first=1) for name in RAGGED} | {name: 0.75 for name in SCALES}
        assert np.isfinite(machine.attend(q, k, v, **(call | other))[1][:, 1:118]).all()

    @pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_output_of_the_kernel_itself(self, machine: Amd, causal: bool) -> None:
        """bf16 without lse: whole tiles come from the kernel, cut ones are merged, the rest is zero."""
        q, k, v = operands(439, 680, 3, dtype=E4M3)
        call = dict(**RAGGED, **SCALES, causal=causal)
        testing.assert_relative_error(machine.attend(q, k, v, **call), by_rows(q, k, v, causal)[0], ERROR)
        locations = records_of(problem_of(q, k, v, **call), RAGGED)[:, 1]
        assert (locations == -1).any() and (locations != -1).any()

    @pytest.mark.slow
    def test_one_tile_in_many_parts(self, machine: Amd) -> None:
        """All 256 blocks share one tile: the longest merge there is."""
        q, k, v = operands(9, 256 * 128, 1)
        call = dict(causal=False, return_lse=True, out_dtype=F32)
        compare(machine.attend(q, k, v, **call), oracle(q, k, v, **call))
        assert (records_of(problem_of(q, k, v, **call), {})[:, 1] != -1).sum() == 256

    @pytest.mark.slow
    def test_state_and_quantised_output(self, machine: Amd) -> None:
        """R9: the merge with an earlier result, and FP8 output from float32."""
        q, k, v = operands(64, 200, 2)
        lse = jax.random.normal(jax.random.key(1), (2, 64)) + 4
        state = jax.random.normal(jax.random.key(0), (64, 2, 128)), lse.at[0, 3].set(jnp.inf).at[1, 5].set(-jnp.inf)
        call = dict(initial_state=state, output_quant=fp8attn.Fp8PerGroup.deepgemm_sm100(), return_lse=True)
        out, lse = machine.attend(q, k, v, **call)
        want, want_lse = oracle(q, k, v, **call)
        testing.assert_relative_error(out.dequantize(), want.dequantize(), 2 * ERROR)
        testing.assert_lse_close(lse, want_lse, LSE_ERROR)

    @pytest.mark.slow
    def test_nan_reaches_its_readers_and_no_one_else(self, machine: Amd) -> None:
        """R2, R6: the interpreter refuses every NaN; positions are those of the oracle."""
        q, k, v = operands(150, 150, 2)
        call = dict(cu_seqlens_q=offsets(20, 110, 12), return_lse=True)
        for position in (19, 20, 84, 129, 149):
            for name in "qkv":
                x = dict(q=q, k=k, v=v)
                x[name] = x[name].at[position, 1, 5].set(jnp.nan)
                result, want = machine.attend(**x, **call), oracle(**x, **call)
                testing.assert_same_nonfinite(result[0], want[0], f"{name} {position}")
                testing.assert_same_nonfinite(result[1], want[1], f"{name} {position}")

    @pytest.mark.slow
    def test_hostile_scales(self, machine: Amd) -> None:
        """R7: zero, negative, infinite and NaN scales; the interpreter refuses all but positive ones of scores."""
        q, k, v = operands(40, 40, 2)
        for name in ("softmax_scale", "v_scale"):
            for value in (0.0, -0.1, 1e-40, jnp.inf, jnp.nan):
                call = {name: jnp.float32(value), "return_lse": True, "out_dtype": F32}
                (out, lse), (want, want_lse) = machine.attend(q, k, v, **call), oracle(q, k, v, **call)
                testing.assert_same_nonfinite(out, want, f"{name}={value}")
                testing.assert_lse_close(lse, want_lse, LSE_ERROR)
                testing.assert_relative_error(out, want, ERROR)

    @pytest.mark.parametrize(
        "check",
        [
            contract.test_zero_sizes,
            contract.test_mask_key_by_key,
            contract.test_hostile_offsets,
            contract.test_initial_state,
        ],
        ids=lambda check: check.__name__,
    )
    @pytest.mark.slow
    def test_contract(self, machine: Amd, check: Any) -> None:
        """The suite of the op."""
        with dispatch.target_device(MI355X):
            for shape in [(0, 4, 2), (4, 0, 2), (0, 0, 2), (4, 4, 0)] if "sizes" in check.__name__ else [None]:
                check(*([shape] if shape else []), "aiter")

    @pytest.mark.slow
    def test_head_groups(self, machine: Amd, monkeypatch: pytest.MonkeyPatch) -> None:
        """More heads than one launch may have: several launches, the same result."""
        q, k, v = operands(300, 400, 5)
        call = dict(return_lse=True, out_dtype=F32)
        monkeypatch.setattr(aiter_mla_prefill, "_head_groups", lambda problem: (2, 2, 1))
        before = machine.hip.last.launches
        compare(machine.attend(q, k, v, **call), oracle(q, k, v, **call))
        assert machine.hip.last.launches == before + 3

    @pytest.mark.slow
    def test_vmap(self, machine: Amd) -> None:
        """R16: calls with scales of their own; one launch each, in a loop of the device."""
        q, k, v = operands(3 * 40, 3 * 60, 2)
        cut = lambda x: x.reshape(3, -1, *x.shape[1:])
        cu_q, cu_k = jnp.stack([offsets(40), offsets(10, first=3), offsets(0)]), jnp.stack([offsets(60)] * 3)
        scale = jnp.array([1.0, -0.5, 0.0])

        def call(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, scale: Any) -> Any:
            options = dict(return_lse=True, out_dtype=F32, q_scale=scale, v_scale=scale + 2)
            return fp8attn.mla_prefill(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options, implementation="aiter")

        arguments = (cut(q), cut(k), cut(v), cu_q, cu_k, scale)
        with dispatch.target_device(MI355X):
            before = machine.hip.last.launches
            out, lse = jax.block_until_ready(jax.jit(jax.vmap(call))(*arguments))
            assert machine.hip.last.launches == before + 3
            for i in range(3):
                testing.assert_bitwise_equal((out[i], lse[i]), call(*(x[i] for x in arguments)))

    @pytest.mark.slow
    def test_pair_batched_and_x64(self, machine: Amd) -> None:
        """The pair (nope, rope) and the batched form under x64 are bit-equal to packed keys."""
        q, k, v = operands(64, 64, 2)
        k = k.at[..., 128:].set(k[:, :1, 128:])
        call = functools.partial(machine.attend, return_lse=True, out_dtype=F32)
        out, lse = call(q, k, v, cu_seqlens_q=offsets(32, 32))
        cut = lambda x: x.reshape(2, 32, *x.shape[1:])
        with jax.enable_x64(True):
            batched = call(cut(q), (cut(k[..., :128]), cut(k[:, 0, 128:])), cut(v))
        testing.assert_bitwise_equal(batched, (cut(out), jnp.moveaxis(lse.reshape(2, 2, 32), 1, 0)))

    @pytest.mark.slow
    def test_heads_sharded(self, machine: Amd) -> None:
        """R17: heads over two devices equal a call of each half."""
        devices = jax.devices("cpu")[:2]
        mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
        P = jax.sharding.PartitionSpec
        q, k, v = operands(64, 64, 4)
        call = lambda q, k, v: fp8attn.mla_prefill(q, k, v, return_lse=True, implementation="aiter")
        by_head = P(None, "heads", None)
        with dispatch.target_device(MI355X):
            sharded = jax.shard_map(call, mesh=mesh, in_specs=(by_head,) * 3, out_specs=(by_head, P("heads", None)))
            out, lse = jax.jit(sharded)(q, k, v)
            for half in (slice(0, 2), slice(2, 4)):
                want = call(q[:, half], k[:, half], v[:, half])
                testing.assert_bitwise_equal((out[:, half], lse[half]), want)


@needs_compiler
@pytest.mark.slow
class TestPlantedFaults:
    """The end-to-end tests fail where the code is wrong."""

    @pytest.mark.parametrize(
        ("check", "old", "new"),
        [
            ("lse", "jnp.where(scale < 0, q ^ 0x80, q)", "q"),
            ("zero", "jnp.where(usual, jnp.abs(scale), 1.0)", "jnp.abs(scale)"),
            ("plain", "own >= start[:, None]", "own >= 0"),
            ("lse", "first_v < visible[:, None, None]", "first_v <= visible[:, None, None]"),
            ("lse", "merged = merged + jnp.where(several", "merged = merged + 0 * jnp.where(several"),
            ("lse", "& (jnp.arange(TILE, dtype=jnp.int32) < plan.rows[safe][:, None])", "& jnp.ones(TILE, bool)"),
            ("plain", "jnp.where(in_parts, merged.astype(out.dtype), out)", "out"),
        ],
    )
    def test_in_the_call(self, machine: Amd, monkeypatch: pytest.MonkeyPatch, check: str, old: str, new: str) -> None:
        broken = mutant(aiter_mla_prefill, old, new)
        monkeypatch.setitem(sys.modules, aiter_mla_prefill.__name__, broken)
        assert fails(machine, check)

    @pytest.mark.parametrize(
        ("old", "new", "why"),
        [
            ("arguments.v_scale.value = v_scale", "arguments.v_scale.value = k_scale", ""),
            ("arguments.q_scale.value = q_scale.untyped_data()", "arguments.q_scale.value = nullptr", "null pointer"),
            ("dimensions()[0] - 1);\n  if", "dimensions()[0] - 127);\n  if", ""),
        ],
    )
    def test_in_the_host_library(
        self, machine: Amd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old: str, new: str, why: str
    ) -> None:
        source = aiter_library.SOURCE.read_text()
        assert source.count(old) == 1
        (tmp_path / "broken.cc").write_text(source.replace(old, new))
        monkeypatch.setattr(aiter_library, "SOURCE", tmp_path / "broken.cc")
        monkeypatch.setattr(aiter_library, "TARGET", f"broken.{abs(hash(new))}")
        aiter_library.build(COMPILER)
        found = fails(machine, "lse")
        assert found and why in found


CHECKS = ("lse", "plain", "zero")


def fails(machine: Amd, check: str) -> str:
    """How a ragged call with NaN at odd places ends; empty: well."""
    q, k, v = operands(439, 680, 2, dtype=E4M3)
    v = v.at[0].set(jnp.nan).at[1 + 7 + 200, 0, 5].set(jnp.nan)
    scales = SCALES | {"q_scale": 0.0 if check == "zero" else -0.5}
    options = {} if check == "plain" else dict(return_lse=True, out_dtype=F32)
    jax.clear_caches()
    try:
        result = machine.attend(q, k, v, **RAGGED, **scales, **options)
        out, lse = by_rows(-q.astype(F32) * (check != "zero"), k, v, True)
        testing.assert_rows_close(result[0] if options else result, out, 4 * ERROR)
        if options:
            testing.assert_lse_close(result[1], lse, LSE_ERROR)
    except (AssertionError, jax.errors.JaxRuntimeError) as error:
        return str(error)
    finally:
        jax.clear_caches()
    return ""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_the_checks_of_planted_faults_pass_without_one(machine: Amd, check: str) -> None:
    assert not fails(machine, check)


class TestCodeObject:
    """The check of the file that AITER brings; nothing in it may do more than refuse it."""

    SYMBOL = kernel_facts(True)[".name"]

    def test_a_good_one(self) -> None:
        assert not aiter_code_object.faults(code_object(kernel_facts(True)), self.SYMBOL)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (code_object(kernel_facts(True), flags=0x54C), "another processor"),
            (code_object(kernel_facts(True), machine=62), "ELF machine 62"),
            (code_object(kernel_facts(False)), "holds the kernel"),
            (code_object(kernel_facts(True), kernel_facts(False)), "no code object with one kernel"),
            (code_object(), "no code object with one kernel"),
            (
                code_object(kernel_facts(True, [*aiter_fakes.ARGUMENTS[::-1]])),
                "another layout of kernel arguments (('num_used_page', 0, 4) where ('ptr_Q', 0, 8) is expected)",
            ),
            (code_object(kernel_facts(True, aiter_fakes.ARGUMENTS[:-1])), "18 arguments in 288 bytes where 19 in 304"),
            (code_object(kernel_facts(True, [*aiter_fakes.ARGUMENTS, "ptr_LSE"])), "AITER changed its FP8 MLA prefill"),
            (code_object(kernel_facts(True, kernarg_segment_size=320)), "19 arguments in 320 bytes"),
            (code_object(kernel_facts(True, wavefront_size=32)), "wants another launch"),
            (code_object(kernel_facts(True, reqd_workgroup_size=[256, 1, 1])), "block [256, 1, 1]"),
            (code_object(kernel_facts(True, max_flat_workgroup_size=256)), "wants another launch"),
            (code_object(kernel_facts(True, group_segment_fixed_size=163841)), "wants another launch"),
            (b"", "no code object"),
            (b"#!/bin/sh", "no code object"),
            (bytes((1 << 24) + 1), "more than"),
        ],
        ids=lambda x: None if isinstance(x, bytes) else x[:30],
    )
    def test_refused(self, content: bytes, why: str) -> None:
        assert why in aiter_code_object.faults(content, self.SYMBOL)

    def test_any_bytes_are_refused_in_words(self) -> None:
        """Cut anywhere, or with bytes changed: a reason or nothing, never another error."""
        good, rng = code_object(kernel_facts(True)), np.random.default_rng(0)
        assert all(aiter_code_object.faults(good[:size], self.SYMBOL) for size in range(0, len(good) - 64, 7))
        refused = 0
        for _ in range(2000):
            bad = np.frombuffer(good, np.uint8).copy()
            bad[rng.integers(0, len(bad), rng.integers(1, 9))] = rng.integers(0, 256)
            refused += bool(aiter_code_object.faults(bad.tobytes(), self.SYMBOL))
        assert refused > 1000

    def test_nested_without_end(self) -> None:
        with pytest.raises((ValueError, RecursionError, IndexError)):
            aiter_code_object.unpack(b"\x91" * 100000)

    def test_where_it_is_looked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The variable, then AITER's packages, which are not imported; the reason names the remedy."""
        monkeypatch.delenv(aiter_code_object.VARIABLE, raising=False)
        for package in aiter_code_object.PACKAGES:
            if importlib.util.find_spec(package):
                pytest.skip("AITER is installed")
        with pytest.raises(aiter_code_object.CodeObjectError, match=r"install ROCm/aiter .* JAX_FP8ATTN_AITER_HSA"):
            aiter_code_object.find(True)
        package = tmp_path / "aiter_meta"
        aiter_fakes.write_hsa(package / "hsa")
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        assert aiter_code_object.find(True).path.is_relative_to(package)
        (package / "hsa" / "gfx950" / "mla" / aiter_code_object.file_name(False)).unlink()
        with pytest.raises(aiter_code_object.CodeObjectError, match=r"causal0.co is not there: that AITER is older"):
            aiter_code_object.find(False)
        named = aiter_fakes.write_hsa(tmp_path / "named")
        monkeypatch.setenv(aiter_code_object.VARIABLE, str(named))
        assert aiter_code_object.find(False).path.is_relative_to(named)
        for wrong in ("named", str(tmp_path / "absent")):
            monkeypatch.setenv(aiter_code_object.VARIABLE, wrong)
            with pytest.raises(aiter_code_object.CodeObjectError, match="not the absolute path of a folder"):
                aiter_code_object.find(True)

    def test_a_changed_file_is_checked_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(aiter_code_object.VARIABLE, str(aiter_fakes.write_hsa(tmp_path / "hsa")))
        before = aiter_code_object.find(True)
        before.path.write_bytes(code_object(kernel_facts(True), flags=0x44F))
        assert aiter_code_object.find(True).sha256 != before.sha256
        before.path.write_bytes(b"no ELF file at all")
        with pytest.raises(aiter_code_object.CodeObjectError, match="Known good: ROCm/aiter"):
            aiter_code_object.find(True)

    @pytest.mark.skipif("AITER_CHECKOUT" not in os.environ, reason="AITER_CHECKOUT names no checkout of ROCm/aiter")
    def test_of_aiter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The real files, and the arguments that AITER's own launcher fills, in its order."""
        checkout = Path(os.environ["AITER_CHECKOUT"]).resolve()
        monkeypatch.setenv(aiter_code_object.VARIABLE, str(checkout / "hsa"))
        assert {len(aiter_code_object.find(causal).sha256) for causal in (True, False)} == {64}
        launcher = (checkout / "csrc" / "py_itfs_cu" / "asm_mla.cu").read_text()
        (body,) = re.findall(r"PsKernelArgs\s*\{(.*?)\};", launcher, re.S)
        fields = re.findall(r"(?:void\s*\*|float|unsigned int)\s*(\w+);", body)
        assert fields == [name for name, _, _ in aiter_code_object.LAYOUT]


class TestSelection:
    """What is taken where, and why not."""

    @pytest.fixture(autouse=True)
    def bare(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine without any piece."""
        (tmp_path / "hsa").mkdir()
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("JAX_FP8ATTN_AITER_HSA", str(tmp_path / "hsa"))

    def test_automatic_goes_on_with_one_log_line(self, caplog: pytest.LogCaptureFixture) -> None:
        dispatch._log_once.cache_clear()
        with caplog.at_level(logging.WARNING, "jax_fp8attn"):
            for _ in range(3):
                assert dispatch.select("mla_prefill", PROBLEM, None, MI355X) == "xla"
        (line,) = caplog.messages
        assert line.startswith("mla_prefill: aiter is passed over: ") and "\n" not in line
        assert "python -m jax_fp8attn amd build" in line and "is not there" in line
        caplog.clear()
        with caplog.at_level(logging.WARNING, "jax_fp8attn"):
            assert dispatch.select("mla_prefill", PROBLEM, None, MI300X) == "xla"
            assert dispatch.select("mla_prefill", PROBLEM, "xla", MI355X) == "xla"
            assert dispatch.select("mla_prefill", PROBLEM, None, Device("cpu")) == "xla"
        (line,) = caplog.messages
        assert "needs gfx950 (MI350X, MI355X), the device is gfx942" in line

    def test_a_name_raises_with_every_reason_and_remedy(self) -> None:
        for device, parts in (
            (MI355X, ("amd build (needs a C++17 compiler)", "causal1.co is not there")),
            (MI300X, ("the device is gfx942: AITER has no such kernel for it",)),
        ):
            with dispatch.target_device(device), pytest.raises(UnsupportedError) as caught:
                fp8attn.mla_prefill(*operands(8, 8, 2), implementation="aiter")
            assert len(caught.value.reasons["aiter"]) == len(parts)
            assert all(part in str(caught.value) for part in parts)

    def test_explain_and_env(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        with dispatch.target_device(MI355X):
            explained = fp8attn.explain("mla_prefill", *operands(8, 8, 2))
            assert cli.main(["env", "--json"]) == 0
        assert explained.taken == "xla" and len(explained.rows[1].reasons) == 2
        state = json.loads(capsys.readouterr().out)["implementations"]["mla_prefill"]["aiter"]
        assert "amd build" in state and "causal0.co" in state and "causal1.co" in state and "rocm" not in state
        assert cli.main(["env"]) == 0
        assert re.search(r"aiter +needs gfx950 .* jax's ROCm plugin", capsys.readouterr().out)

    @needs_compiler
    def test_taken_where_all_is_there(self, machine: Amd) -> None:
        assert dispatch.select("mla_prefill", PROBLEM, None, MI355X) == "aiter"
        with dispatch.target_device(MI355X):
            explained = fp8attn.explain("mla_prefill", *operands(8, 8, 2), return_lse=True)
        assert explained.taken == "aiter" and any("never run on hardware" in note for note in explained.notes)
        assert dispatch.elsewhere("mla_prefill", "aiter", None) == "xla"

    @needs_compiler
    def test_fp8_switched_off(self, machine: Amd, monkeypatch: pytest.MonkeyPatch) -> None:
        """The variable that SGLang's SGLANG_AITER_FP8_PREFILL_ATTN corresponds to."""
        monkeypatch.setenv("JAX_FP8ATTN_FP8_PREFILL", "0")
        with dispatch.target_device(MI355X):
            assert fp8attn.explain("mla_prefill", *operands(8, 8, 2)).taken == "xla"
            with pytest.raises(UnsupportedError, match=r"computes in FP8, the call asks for bf16 .*FP8_PREFILL"):
                fp8attn.mla_prefill(*operands(8, 8, 2), implementation="aiter")

    @pytest.mark.parametrize(
        ("sizes", "heads"),
        [
            (dict(tokens=8192, keys=8192, heads=128, sequences=8), [128]),
            (dict(tokens=131072, keys=131072, heads=16, sequences=1), [16]),
            (dict(tokens=131072, keys=131072, heads=128, sequences=1), [64, 64]),
            (dict(tokens=8192, keys=200000, heads=128, sequences=1), [64, 64]),
            (dict(tokens=131072, keys=131072, heads=128, sequences=1, return_lse=True), [22, 22, 21, 21, 21, 21]),
            (dict(tokens=512, keys=(1 << 24) - 1, heads=2, sequences=1), [1, 1]),
        ],
    )
    def test_limits_of_a_launch(self, sizes: dict[str, int], heads: list[int]) -> None:
        """As many heads as the kernel's 32-bit offsets reach."""
        problem = aiter_mla_prefill._one_instance(_problem(**sizes))
        groups = aiter_mla_prefill._head_groups(problem)
        assert sum(groups) == problem.heads and list(groups) == heads
        for count in groups:
            shape = aiter_mla_prefill._shape(problem, count)
            assert problem.tokens * count * 256 < 2**32 and problem.keys * count * 192 < 2**32
            assert shape.partials * 256 * count * 512 <= 2**31 and problem.keys < 2**24

    @pytest.mark.parametrize(
        ("sizes", "why"),
        [
            (dict(keys=1 << 24), "2^24 keys"),
            (dict(tokens=1 << 24, heads=1), "an output of 2^32 bytes"),
            (dict(tokens=1 << 23, heads=1, return_lse=True), "partial results of more than 2^31 bytes"),
        ],
    )
    def test_beyond_every_limit(self, sizes: dict[str, Any], why: str) -> None:
        (reason,) = aiter_mla_prefill._problem_reasons(_problem(**sizes))
        assert f"one head alone would have {why}, beyond the kernel's offsets" == reason


def _problem(**changed: Any) -> MlaProblem:
    return dataclasses.replace(PROBLEM, **changed)


@needs_compiler
class TestLibrary:
    """The host library: who may have written it, what it needs, what it refuses."""

    def test_only_ones_own(self, machine: Amd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A link, or a file or folder that others can write, is not loaded."""
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", str(tmp_path))
        path = aiter_library.library_path()
        with pytest.raises(aiter_library.LibraryError, match="amd build"):
            aiter_library.find()
        path.symlink_to(machine.library)
        with pytest.raises(aiter_library.LibraryError, match="not loaded: it is not a regular file"):
            aiter_library.find()
        path.unlink()
        shutil.copy(machine.library, path)
        assert aiter_library.find() == path
        path.chmod(0o722)
        with pytest.raises(aiter_library.LibraryError, match="others can write it"):
            aiter_library.find()
        path.chmod(0o700)
        tmp_path.chmod(0o777)
        with pytest.raises(aiter_library.LibraryError, match="others can write it"):
            aiter_library.find()
        tmp_path.chmod(0o700)
        path.write_bytes(b"no library")
        with pytest.raises(aiter_library.LibraryError, match=r"cannot be loaded: .* Build it again"):
            aiter_library.load(path)
        with pytest.raises(UnsupportedError, match=r"aiter: .* cannot be loaded"):
            aiter_mla_prefill.prepare(True)
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", "relative")
        with pytest.warns(RuntimeWarning), pytest.raises(aiter_library.LibraryError, match="no cache folder"):
            aiter_library.find()

    def test_another_jaxlib_wants_another_library(self, machine: Amd, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(aiter_library.jaxlib, "__version__", "0.99")
        with pytest.raises(aiter_library.LibraryError, match=r"not built for this package and jaxlib 0\.99"):
            aiter_library.find()

    def test_needs_nothing_of_rocm(self, machine: Amd) -> None:
        """Neither linked nor loaded: the library alone brings in the C and C++ runtimes."""
        if not shutil.which("readelf"):
            pytest.skip("readelf is not installed")
        text = subprocess.run(["readelf", "-d", machine.library], capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", text))
        assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "libdl", "ld-linux-x86-64", "ld-linux-aarch64"}
        source = aiter_library.SOURCE.read_text()
        assert "RTLD_GLOBAL" not in source and "glob" not in source and "hip/" not in source

    def test_no_hip(self, machine: Amd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A copy of the library has no runtime yet: none named, one that is none, then one."""
        copy = shutil.copy(machine.library, tmp_path / "copy.so")
        library = ctypes.CDLL(copy)
        monkeypatch.delenv("JAX_FP8ATTN_HIP_LIBRARY")
        assert "JAX_FP8ATTN_HIP_LIBRARY names none" in aiter_library.why_no_hip(library)
        monkeypatch.setenv("JAX_FP8ATTN_HIP_LIBRARY", str(tmp_path / "absent.so"))
        assert "cannot dlopen libamdhip64" in aiter_library.why_no_hip(library)
        monkeypatch.setenv("JAX_FP8ATTN_HIP_LIBRARY", str(machine.library))
        assert "lacks a function" in aiter_library.why_no_hip(library)
        monkeypatch.setenv("JAX_FP8ATTN_HIP_LIBRARY", str(machine.hip.path))
        assert aiter_library.why_no_hip(library) == ""

    GOOD = dict(tokens=4, keys=4, heads=1, width=192, dtype=E4M3, rows=256, blocks=2, scales=1)

    @pytest.mark.parametrize(
        ("changed", "why"),
        [
            ({}, ""),
            (dict(dtype=jnp.float8_e5m2), "must be float8_e4m3fn"),
            (dict(width=128), "[T, H, 192]"),
            (dict(rows=255), "wrong shape"),
            (dict(blocks=-1), "wrong shape"),
            (dict(scales=0), "a scale must be one float32"),
            (dict(scales=2), "a scale must be one float32"),
            (dict(object="0" * 64), "SHA-256 000"),
            (dict(symbol="other"), "hipModuleGetFunction: symbol not found"),
            pytest.param(dict(rows=(1 << 22) + 256), "at most 2^31 bytes", marks=pytest.mark.slow),
        ],
    )
    def test_refused_by_the_call(self, machine: Amd, changed: dict[str, Any], why: str) -> None:
        """What JAX code cannot send, since it checks before: the library checks again."""
        facts = self.GOOD | changed
        known = aiter_mla_prefill.prepare(True)
        tokens, keys, heads, rows = (facts[name] for name in ("tokens", "keys", "heads", "rows"))
        shapes = [((tokens, heads, 128), BF16), ((rows, heads, 128), F32), ((rows, heads), F32)]
        call = jax.ffi.ffi_call(aiter_library.TARGET, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        codes = [
            jnp.zeros((n, heads, width), facts["dtype"])
            for n, width in ((tokens, facts["width"]), (keys, 192), (keys, 128))
        ]
        ints = [jnp.array([0, 4], jnp.int32)] * 2 + [jnp.arange(keys, dtype=jnp.int32)]
        ints += [jnp.zeros(facts["blocks"] + 1, jnp.int32), jnp.zeros((1, 8), jnp.int32)]
        scales = [jnp.ones(facts["scales"], F32)] * 3
        attributes = dict(code_object=facts.get("object", known.sha256), symbol=facts.get("symbol", known.symbol))
        if not why:
            jax.block_until_ready(call(*codes, *ints, *scales, **attributes))
            return
        with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape(why)):
            jax.block_until_ready(call(*codes, *ints, *scales, **attributes))

    @pytest.mark.slow
    def test_no_hip_while_running(self, machine: Amd) -> None:
        """A process without HIP: the call says so, and what to set."""
        code = (
            "import jax.numpy as jnp, jax_fp8attn as f\n"
            "x = jnp.ones((8, 1, 192)), jnp.ones((8, 1, 192)), jnp.ones((8, 1, 128))\n"
            "with f.dispatch.target_device(f.dispatch.Device('rocm', architecture='gfx950')):\n"
            "    f.mla_prefill(*x, implementation='aiter').block_until_ready()\n"
        )
        environment = os.environ | machine.environment
        del environment["JAX_FP8ATTN_HIP_LIBRARY"]
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 1
        assert "FAILED_PRECONDITION: jax_fp8attn: cannot dlopen libamdhip64" in done.stderr


@needs_compiler
class TestExport:
    def test_for_rocm_without_one(self, machine: Amd) -> None:
        """What a serialised program asks of the machine that runs it: one call, named, typed, and tied to the very file
        that was checked here; no path of this machine."""
        q, k, v = operands(300, 300, 4, dtype=E4M3)
        call = lambda q, k, v, cu: fp8attn.mla_prefill(q, k, v, cu_seqlens_q=cu, return_lse=True)
        with dispatch.target_device(MI355X):
            allowed = [jax.export.DisabledSafetyCheck.custom_call(aiter_library.TARGET)]
            exported = jax.export.export(jax.jit(call), platforms=["rocm"], disabled_checks=allowed)(
                q, k, v, offsets(100, 200)
            )
        text = jax.export.deserialize(exported.serialize()).mlir_module()
        assert exported.platforms == ("rocm",)
        calls = [line for line in text.splitlines() if "custom_call @" in line]
        (line,) = [x for x in calls if aiter_library.TARGET in x]
        code = aiter_code_object.find(True)
        assert f'backend_config = {{code_object = "{code.sha256}", symbol = "{code.symbol}"}}' in line
        rows = aiter_mla_prefill._shape(_problem(tokens=300, heads=4, sequences=2, return_lse=True), 4).partials * 256
        types = line[line.rindex(" : ") :]
        assert types.startswith(
            " : (tensor<300x4x192xf8E4M3FN>, tensor<300x4x192xf8E4M3FN>, tensor<300x4x128xf8E4M3FN>"
        )
        assert types.count("tensor<1xf32>") == 3 and "tensor<257xi32>" in types
        assert f"-> (tensor<300x4x128xbf16>, tensor<{rows}x4x128xf32>, tensor<{rows}x4xf32>)" in types
        assert str(machine.hsa) not in text and str(machine.cache) not in text
        assert not any("callback" in x or "infeed" in x or "outfeed" in x for x in text.splitlines())

    def test_a_custom_call_must_be_allowed(self, machine: Amd) -> None:
        q, k, v = operands(8, 8, 1)
        with dispatch.target_device(MI355X), pytest.raises(ValueError, match=aiter_library.TARGET):
            jax.export.export(jax.jit(fp8attn.mla_prefill), platforms=["rocm"])(q, k, v)


@needs_compiler
class TestCommandLine:
    def test_build_that_cannot(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", str(tmp_path / "cache"))
        failing = tmp_path / "compiler"
        failing.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
        failing.chmod(0o755)
        assert cli.main(["amd", "build", "--compiler", str(failing)]) == 1
        assert "failed:\nno such header" in capsys.readouterr().out
        assert cli.main(["amd", "build", "--compiler", str(tmp_path / "absent"), "--json"]) == 1
        assert "cannot be run" in json.loads(capsys.readouterr().out)["error"]
        monkeypatch.setenv("PATH", "")
        assert cli.main(["amd", "build"]) == 1 and "no C++ compiler" in capsys.readouterr().out
        assert not list((tmp_path / "cache").iterdir())

    @pytest.mark.slow
    def test_build(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        """Into a folder of the user's own, where it is found."""
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", str(tmp_path / "cache"))
        assert cli.main(["amd", "build", "--json"]) == 0
        built = json.loads(capsys.readouterr().out)["built"]
        assert aiter_library.find() == Path(built) and (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
        assert [str(path) for path in (tmp_path / "cache").iterdir()] == [built]

    def test_selftest_without_a_gpu(self, machine: Amd, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        """Says of each piece whether it is there, and runs nothing."""
        assert cli.main(["amd", "selftest", "--json"]) == 2
        report = json.loads(capsys.readouterr().out)
        states = {name: state.partition(":")[0] for name, state in report["pieces"].items()}
        assert states.pop("GPU") == "none" and set(states.values()) == {"ok"} and len(states) == 4
        assert report["cases"] == [] and not report["passed"]
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", str(machine.hsa))
        assert cli.main(["amd", "selftest"]) == 2
        text = capsys.readouterr().out
        assert "amd build" in text and "not run" in text

    @pytest.mark.slow
    def test_selftest(self, machine: Amd, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        """On the interpreter it passes; with a kernel that is off it does not."""
        monkeypatch.setattr(amd_command, "CASES", amd_command.CASES[1:2])
        with dispatch.target_device(MI355X):
            assert cli.main(["amd", "selftest", "--json"]) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["passed"] and report["cases"][0]["error"] < ERROR
            original = aiter_mla_prefill._call
            off = lambda *args: [x + 0.01 if i == 2 else x for i, x in enumerate(original(*args))]
            monkeypatch.setattr(aiter_mla_prefill, "_call", off)
            jax.clear_caches()
            assert cli.main(["amd", "selftest"]) == 1
        jax.clear_caches()
        assert "BROKEN: lse" in capsys.readouterr().out
