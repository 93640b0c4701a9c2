"""The compile gate: what it reads from the assembler's output, and what it refuses."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest

from jax_fp8attn.cli import assembly, gated, main
from jax_fp8attn.cli import compile as command

LOG = """ptxas info    : Compiling entry function 'k' for 'sm_90a'
    0 bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used {registers} registers, used 2 barriers
{warning}"""
LISTING = """.text.k:
   -:-:-:Y:01        /*0000*/                   LDC R1, c[0x0][0x28]
   -:-:-:Y:01        /*0010*/                   {first}
.L_x_1:
   -:-:-:Y:01        /*0020*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24
   -:-:-:Y:01        /*0030*/                   MUFU.EX2 R3, R3
   -:-:-:Y:01        /*0040*/               @!P0 BRA `(.L_x_1)
.L_x_2:
   -:-:-:Y:01        /*0050*/                   FADD R1, R1, R2
   -:-:-:Y:01        /*0060*/                   FADD R1, R1, R2
   -:-:-:Y:01        /*0070*/                   FADD R1, R1, R2
   -:-:-:Y:01        /*0080*/                   FADD R1, R1, R2
   -:-:-:Y:01        /*0090*/               @P1 BRA `(.L_x_2)
   -:-:-:Y:05        /*00a0*/                   EXIT
   -:-:-:-:00        /*00b0*/                   BRA `(.L_x_3)
.L_x_3:
"""
BUDGET = (168, 1000)
KEPT = "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0"


def roles(consumers: tuple[int, ...], *producers: int) -> str:
    """PTX of three warpgroups that change their registers so, consumers each in code of its own or in common code."""
    changes = [("inc", count) for count in consumers] + [("dec", count) for count in producers]
    lines = [f"\tsetmaxnreg.{kind}.sync.aligned.u32 {count};" for kind, count in changes]
    return "\n".join([".maxntid 384, 1, 1", *lines])


def dump(folder: Path, **facts: object) -> assembly.Kernel:
    defaults = {"spill": 0, "registers": 96, "warning": "", "first": "NOP", "ptx": "", "smem": 512}
    facts = defaults | facts
    (folder / "k.ptx").write_text(str(facts["ptx"]))
    (folder / "k.ptxas").write_text(LOG.format(**facts))
    (folder / "k.sass_ctrl").write_text(LISTING.format(**facts))
    (folder / "k.resources.txt").write_text(f"Resources(smem_scratch_bytes={facts['smem']}, tmem_scratch_cols=0)")
    return assembly._read(folder / "k.ptx")


def test_a_sound_kernel(tmp_path: Path) -> None:
    kernel = dump(tmp_path)
    assert (kernel.registers, kernel.spilled, kernel.shared_memory) == (96, 0, 512)
    assert kernel.instructions == 12 and kernel.loop == 3 and kernel.mix == {"QGMMA": 1, "MUFU": 1, "BRA": 1}
    assert kernel.faults(*BUDGET) == ()


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({"spill": 8}, "16 bytes spilled"),
        ({"registers": 169}, "169 registers, the budget is 168"),
        ({"smem": 1001}, "1001 bytes of shared memory"),
        ({"warning": "warning (C7512) wgmma serialized"}, r"wgmma serialised \(C7512\)"),
        ({"warning": "info (C7504) 'setmaxnreg' ignored"}, "setmaxnreg ignored"),
        ({"ptx": roles((240, 240), 24), "registers": 168}, "setmaxnreg ignored"),
        ({"ptx": roles((192, 192), 128), "registers": 168, "first": KEPT}, "waits for 1024 registers"),
        ({"ptx": roles((192,), 128), "registers": 168, "first": KEPT}, "waits for 1024 registers"),
        ({"ptx": roles((240, 240), 24), "registers": 160, "first": KEPT}, "waits for 3072 registers"),
        ({"ptx": roles((176,)), "registers": 168, "first": KEPT}, "waits for 3072 registers"),
    ],
)
def test_faults(tmp_path: Path, facts: dict[str, object], fault: str) -> None:
    (found,) = dump(tmp_path, **facts).faults(*BUDGET)
    assert re.search(fault, found)


def test_setmaxnreg_that_is_kept(tmp_path: Path) -> None:
    for ptx in (roles((240, 240), 24), roles((192, 192), 120), roles((216,), 72)):
        assert dump(tmp_path, ptx=ptx, registers=165, first=KEPT).faults(*BUDGET) == ()


def test_no_listing_is_no_pass(tmp_path: Path) -> None:
    dump(tmp_path)
    (tmp_path / "k.sass_ctrl").unlink()
    with pytest.raises(RuntimeError, match="nvdisasm"):
        assembly._read(tmp_path / "k.ptx")


def test_the_loop_without_tensor_cores_is_the_longest() -> None:
    names, loop = assembly._instructions(LISTING.format(first="NOP").replace("QGMMA", "FFMA"))
    assert len(names) == 12 and loop == ["FADD"] * 4 + ["BRA"]


@pytest.mark.parametrize("target", assembly.TARGETS.values(), ids=assembly.TARGETS)
def test_targets(target: assembly.Target) -> None:
    text = target.config()
    major, minor = target.compute_capability
    assert f"major: {major} minor: {minor}" in text and ("ACCELERATED" in text) == (major >= 9)
    assert target.device.compute_capability == (major, minor)


def test_calls_are_distinct_and_carry_shapes() -> None:
    for calls, budget in gated.GATED.values():
        labels = [call.label for call in calls()]
        assert len(set(labels)) == len(labels) >= 3
        assert 0 < budget.registers <= 255 and 0 < budget.shared_memory <= 232448


def test_constraints_are_not_printed() -> None:
    constraints = pytest.importorskip("jax.experimental.mosaic.gpu.constraints", reason="needs Mosaic GPU")
    with assembly._without_constraints():
        assert str(constraints.ConstraintSystem()) == ""
    assert "constraints" in str(constraints.ConstraintSystem())


@pytest.mark.skipif(any(map(importlib.util.find_spec, command.PLUGINS)), reason="the CUDA plugin is installed")
def test_without_the_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile"]) == 2
    assert "make compile-check" in capsys.readouterr().out


def test_a_fault_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One record a kernel; a spill, a call without a kernel and one that does not compile each give exit status 1."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object() if "plugin" in name else None)
    monkeypatch.setattr(assembly, "prepare", lambda: None)
    good = dump(tmp_path)
    bad = dataclasses.replace(good, spilled=4)

    def refuse(*_: object) -> list[assembly.Kernel]:
        raise ValueError("no layout\nat all")

    for kernels, faults in (([good], []), ([good, bad], ["4 bytes spilled"]), ([], ["no kernel was built"])):
        monkeypatch.setattr(assembly, "compile_for", lambda *_, kernels=kernels: kernels)
        status = main(["compile", "--op", "merge_attn_states", "--only", "in place", "--json"])
        found = [fault for record in json.loads(capsys.readouterr().out)["kernels"] for fault in record["faults"]]
        assert (status, found) == (int(bool(faults)), faults)
    monkeypatch.setattr(assembly, "compile_for", refuse)
    assert main(["compile", "--only", "in place"]) == 1
    assert "ValueError: no layout" in capsys.readouterr().out
    assert main(["compile", "--only", "no such call"]) == 1
