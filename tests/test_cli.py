"""The command line, as a user calls it."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jax_fp8attn import cli
from jax_fp8attn.cli import canary, check, layers, show


def run(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    return subprocess.run(
        [sys.executable, "-m", "jax_fp8attn", *arguments], capture_output=True, text=True, env=env, timeout=300
    )


@pytest.mark.slow
def test_demo_passes_and_says_what_ran(capsys):
    """Every layer within its bounds, exit status 0, implementations and reasons named."""
    assert cli.main(["demo", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and [layer["passed"] for layer in report["layers"]] == [True] * 3
    for layer in report["layers"]:
        assert set(layer["implementations"].values()) == {"xla"}
        assert any("pallas" in refusals for refusals in layer["refusals"].values())
        assert all(check["error"] <= check["bound"] for check in layer["checks"]) and len(layer["checks"]) >= 2
        assert layer["first_call_seconds"] > 0 and layer["seconds"] > 0


@pytest.mark.parametrize("name", sorted(layers.LAYERS))
def test_demo_fails_on_a_wrong_result(name, capsys, monkeypatch):
    """A planted fault in the result turns the exit status to 1."""
    right = layers.LAYERS[name].step
    wrong = lambda self: jax.tree.map(lambda x: x[::-1] if x.ndim > 2 else x, right(self))
    monkeypatch.setattr(layers.LAYERS[name], "step", wrong)
    assert cli.main(["demo", "--layer", name]) == 1
    text = capsys.readouterr().out
    assert "BROKEN" in text and "all bounds hold" not in text


def test_demo_text_is_plain_when_piped(capsys):
    assert cli.main(["demo", "--layer", "sparse"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "all bounds hold" in captured.out
    assert "xla taken" in captured.out and "against the oracle" in captured.out


def test_env_prints_from_an_allow_list():
    """No secret of the environment is shown; what is missing is said."""
    result = run("env", JAX_FP8ATTN_FP8_PREFILL="0", SECRET_TOKEN="hunter2")
    assert result.returncode == 0 and "hunter2" not in result.stdout and "SECRET_TOKEN" not in result.stdout
    assert f"{jax.__version__}" in result.stdout and "JAX_FP8ATTN_FP8_PREFILL=0" in result.stdout
    facts = json.loads(run("env", "--json", SECRET_TOKEN="hunter2").stdout)
    assert facts["packages"]["jax"] == jax.__version__ and facts["packages"]["flashinfer-python"] is None
    assert facts["implementations"]["mla_prefill"]["xla"] == "available" and "hunter2" not in json.dumps(facts)


@pytest.mark.parametrize("op", ["mla_prefill", "merge_attn_states", "sparse_prefill_topk", "gdn_prefill"])
def test_explain(op, capsys):
    assert cli.main(["explain", op, "--tokens", "128", "--heads", "8"]) == 0
    text = capsys.readouterr().out
    assert "xla        taken" in text and "pallas" in text
    assert cli.main(["explain", op, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["implementations"]
    assert [row["name"] for row in rows if row["taken"]] == ["xla"]
    assert all(row["reasons"] for row in rows if row["name"] not in ("xla", "reference"))


def test_explain_fp8_output(capsys):
    assert cli.main(["explain", "mla_prefill", "--fp8-output"]) == 0
    assert "separate pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["explain"], ["explain", "nonsense"], ["demo", "--layer", "x"]]
)
def test_bad_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage:" in capsys.readouterr().err


def test_module_runs_as_a_program():
    assert run("explain", "merge_attn_states").returncode == 0
    assert run("nonsense").returncode == 2


def test_show():
    assert show.table(("a", "bb"), [("1", "2"), ("333", "4")]) == "a    bb\n---  --\n1    2\n333  4"
    assert [show.duration(s) for s in (2.5, 0.0025, 2.5e-6, 2.5e-8)] == ["2.5 s", "2.5 ms", "2.5 us", "0.025 us"]


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="there is a GPU: bench would run")
def test_bench_needs_a_gpu(capsys):
    assert cli.main(["bench"]) == 2
    assert "GPU" in capsys.readouterr().out


def test_check_counts(monkeypatch, tmp_path, capsys):
    """Passed, failed and skipped tests of a suite; a failure, a crash or nothing at all give exit status 1."""
    suite = tmp_path / "test_suite.py"
    monkeypatch.setattr(check, "SUITES", {"merge_attn_states": (str(suite),)})
    for body, counts, status in (
        ("def test_a(): pass\ndef test_b(): pass", [2, 0, 0], 0),
        ("import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('-')", [1, 1, 1], 1),
        ("import os\ndef test_a(): os._exit(3)", [0, 1, 0], 1),
        ("", [0, 1, 0], 1),
    ):
        suite.write_text(body)
        assert cli.main(["check", "--op", "merge_attn_states", "--json"]) == status
        (found,) = json.loads(capsys.readouterr().out)["suites"].values()
        assert list(found.values()) == counts


def test_sanitizer_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert cli.main(["check", "--sanitize"]) == 2
    assert "compute-sanitizer" in capsys.readouterr().out


def fake_sanitizer(monkeypatch, folder, canaries):
    """A compute-sanitizer that runs what it is given, except that a canary ends as told, by tool. Returns its log."""
    fake, log = folder / "compute-sanitizer", folder / "log"
    cases = " ".join(f"*'cli.canary {tool}') exit {status};;" for tool, status in canaries.items())
    fake.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in {cases} esac\nshift 6\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return log


@pytest.mark.parametrize(
    ("canaries", "missed"),
    [
        ({"memcheck": 9}, []),
        pytest.param({"memcheck": 0}, ["memcheck"], marks=pytest.mark.slow),
        pytest.param({"memcheck": 1}, ["memcheck"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sanitizer_must_see_the_canaries(canaries, missed, monkeypatch, tmp_path, capsys):
    """A tool that does not report its faulty kernel fails the check, however clean the suites are."""
    assert tuple(canary.FAULTS) == tuple(canaries)
    suite = tmp_path / "test_suite.py"
    suite.write_text("import pytest\n@pytest.mark.sanitize\ndef test_a(): pass")
    monkeypatch.setattr(check, "SUITES", {"merge_attn_states": (str(suite),)})
    log = fake_sanitizer(monkeypatch, tmp_path, canaries)
    assert cli.main(["check", "--sanitize", "--op", "merge_attn_states", "--json"]) == bool(missed)
    printed = capsys.readouterr()
    counts = json.loads(printed.out)["suites"]
    for tool in canaries:
        found = [counts[f"{what} {tool}"]["failed"] for what in ("canary", "merge_attn_states")]
        assert found == [int(tool in missed), 0]
        assert (f"{tool} did not report a faulty kernel" in printed.err) == (tool in missed)
    options = {line.split(str(sys.executable))[0] for line in log.read_text().splitlines() if "memcheck" in line}
    assert len(options) == 1 and "kns=fp8attn" in options.pop()  # the canary under the options of the suites


@pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="there is a GPU: the canary would run on it")
def test_canary_without_a_gpu_is_not_a_report(capsys):
    assert canary.main("memcheck") == 1
    assert "needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("tool", canary.FAULTS)
def test_canary_is_built_for_a_gpu(tool, monkeypatch):
    """Lowered, not run: its name is one of ours."""
    build, lowered = canary._kernel, []
    monkeypatch.setattr(
        canary,
        "_kernel",
        lambda: lambda x: lowered.append(build().trace(x).lower(lowering_platforms=("cuda",)).as_text()),
    )
    canary.FAULTS[tool]()
    assert "mosaic_gpu" in lowered[0] and "fp8attn_canary" in lowered[0]
