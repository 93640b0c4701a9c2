"""AITER's FP8 MLA prefill kernel on gfx950: everything about the call that can be shown without the GPU."""

import contextlib
import ctypes
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
from jax_fp8attn import InvalidInputError, UnsupportedError, cli, dispatch, testing
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MlaProblem

E4M3, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
MI300X = Device("rocm", "AMD Instinct MI300X", architecture="gfx942")
ERROR, LSE_ERROR = 0.03, 1e-5  # of outputs by their norm, for probabilities in e4m3; of lse
PROBLEM = MlaProblem(512, 512, 2, 16, *[np.dtype(E4M3)] * 3, np.dtype(BF16))


@pytest.fixture(scope="module")
def amd(tmp_path_factory: pytest.TempPathFactory) -> Amd:
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
            ("-(-visible // UNIT)", "visible // UNIT"),
            ("jnp.minimum(group, total % shape.groups)", "0"),
            ("jnp.minimum(high, first + ranges.k_length[b])", "high"),
            ("partial = segments.real if shape.all_partial else", "partial ="),
            ("TILE * number, -1", "TILE * number + TILE, -1"),
            ("head % per_cluster * count[group]", "0"),
            ("keys - ranges.q_length[b] + end, keys", "end, keys"),
            ("head | (head + 1) << 16", "head"),
            ("+ rank\n", "- rank\n"),
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
    cu_q, cu_k = RAGGED["cu_seqlens_q"], RAGGED["cu_seqlens_k"]
    out, lse = contract.numpy_attention(q, k, v, np.asarray(cu_q), np.asarray(cu_k), causal, scale)
    return out * SCALES["v_scale"], lse


def compare(result: Any, want: Any, error: float = ERROR) -> None:
    (out, lse), (want_out, want_lse) = result, want
    testing.assert_relative_error(out, want_out, error)
    testing.assert_rows_close(out, want_out, 4 * error)
    testing.assert_lse_close(lse, want_lse, LSE_ERROR)


QUERIES, KEYS = (0, 300, 0, 5, 130, 0), (7, 300, 0, 261, 100, 9)
RAGGED = dict(cu_seqlens_q=offsets(*QUERIES, first=2), cu_seqlens_k=offsets(*KEYS, first=1))
SCALES = dict(q_scale=0.5, k_scale=2.0, v_scale=1.5)


@needs_compiler
class TestEndToEnd:
    """The public op under jit, plan and merge in JAX, the host library, and the kernel's interpreter."""

    @pytest.mark.parametrize("causal", [True, False])
    def test_lse_of_every_row(self, machine: Amd, causal: bool) -> None:
        """Ragged, with empty sequences, rows of no sequence and rows without a key; NaN in memory of no sequence."""
        q, k, v = (x.at[0].set(jnp.nan).at[-1].set(jnp.nan) for x in operands(439, 680, 2, dtype=E4M3))
        call = dict(**RAGGED, **SCALES, causal=causal, return_lse=True, out_dtype=F32)
        out, lse = map(np.asarray, machine.attend(q, k, v, **call))
        compare((out, lse), by_rows(q, k, v, causal))
        empty = np.isneginf(lse).T
        assert empty[:2].all() and empty[437:].all() and not out[empty].any()
        assert empty[307:337].all() == causal and not empty[337:437].any()

    @pytest.mark.parametrize("causal", [True, False])
    def test_output_of_the_kernel_itself(self, machine: Amd, causal: bool) -> None:
        """bf16 without lse: whole tiles come from the kernel, cut ones are merged, the rest is zero."""
        q, k, v = operands(439, 680, 3, dtype=E4M3)
        call = dict(**RAGGED, **SCALES, causal=causal)
        testing.assert_relative_error(machine.attend(q, k, v, **call), by_rows(q, k, v, causal)[0], ERROR)
        locations = records_of(problem_of(q, k, v, **call), RAGGED)[:, 1]
        assert (locations == -1).any() and (locations != -1).any()

    def test_one_tile_in_many_parts(self, machine: Amd) -> None:
        """All 256 blocks share one tile: the longest merge there is."""
        q, k, v = operands(9, 256 * 128, 1)
        call = dict(causal=False, return_lse=True, out_dtype=F32)
        compare(machine.attend(q, k, v, **call), oracle(q, k, v, **call))
        assert (records_of(problem_of(q, k, v, **call), {})[:, 1] != -1).sum() == 256

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

    def test_the_launch(self, machine: Amd) -> None:
        """Grid, block and the numbers among the arguments."""
        q, k, v = operands(439, 680, 2)
        machine.attend(q, k, v, **RAGGED)
        facts = machine.hip.last
        numbers = np.frombuffer(bytes(facts.arguments), np.uint32)[56::4]
        assert (facts.grid, facts.block) == (256, 512)
        assert numbers[0].view(np.float32) == 1 and numbers[1:].tolist() == [439, 2, 680, 680]

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

    @pytest.mark.parametrize("name", ["softmax_scale", "v_scale"])
    def test_hostile_scales(self, machine: Amd, name: str) -> None:
        """R7: zero, negative, infinite and NaN scales; the interpreter refuses all but positive ones of scores."""
        q, k, v = operands(40, 40, 2)
        for value in (0.0, -0.1, 1e-30, jnp.inf, jnp.nan):
            call = {name: jnp.float32(value), "return_lse": True, "out_dtype": F32}
            (out, lse), (want, want_lse) = machine.attend(q, k, v, **call), oracle(q, k, v, **call)
            testing.assert_same_nonfinite(out, want, f"{name}={value}")
            testing.assert_lse_close(lse, want_lse, LSE_ERROR)
            testing.assert_relative_error(out, want, ERROR)

    def test_two_runs_are_equal(self, machine: Amd) -> None:
        q, k, v = operands(439, 680, 2)
        runs = [machine.attend(q, k, v, **RAGGED, return_lse=True, out_dtype=F32) for _ in range(2)]
        testing.assert_bitwise_equal(*runs)

    @pytest.mark.parametrize(
        "check",
        [
            contract.test_zero_sizes,
            contract.test_pair_and_batched_forms,
            contract.test_mask_key_by_key,
            contract.test_hostile_offsets,
            contract.test_values_of_one,
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


def records_of(problem: MlaProblem, ranges: dict[str, jax.Array]) -> np.ndarray:
    """Work records of a call with one launch."""
    queries = np.diff(ranges.get("cu_seqlens_q", [0, problem.tokens]))
    keys = np.diff(ranges.get("cu_seqlens_k", [0, problem.keys]))
    every = aiter_mla_prefill._all_partial(problem)
    return plain_plan(queries.tolist(), keys.tolist(), problem.heads, problem.causal, every)[1]
