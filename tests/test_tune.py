"""Measured configurations: where they are kept, what a file may do, and how one is found."""

import dataclasses
import json
import os
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax_fp8attn.benchmarks import merge, mla, models, timing
from jax_fp8attn.pallas import merge_sm90, mla_prefill_sm90
from jax_fp8attn.pallas.common import configs
from jax_fp8attn.pallas.merge_sm90 import MergeConfig
from jax_fp8attn.pallas.mla_prefill_sm90 import MlaConfig

from jax_fp8attn import cli, dispatch, explain, tuning
from jax_fp8attn._version import VERSION
from jax_fp8attn.cli import tune
from jax_fp8attn.problems import MergeProblem, MlaProblem
from jax_fp8attn.quantize import Fp8PerGroup, Fp8PerTensor

H200 = "NVIDIA H200"
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
PROBLEM = MlaProblem(
    tokens=8192, keys=8192, sequences=1, heads=16, q_dtype=E4M3, k_dtype=E4M3, v_dtype=E4M3, out_dtype=BF16
)
DEFAULT, OTHER, THIRD = MlaConfig(), MlaConfig(stages=3), MlaConfig(blocks=132)
CONFIGS = (DEFAULT, OTHER, THIRD)


def entry(config: Any = OTHER, problem: Any = PROBLEM, op: str = "mla_prefill") -> tuning.Entry:
    return tuning.Entry(op, tuning.FACTS[op](problem), tuning.config_data(config), 90.0, 100.0)


def ask(problem: Any = PROBLEM, candidates: Any = CONFIGS, device: str = H200) -> Any:
    return tuning.tuned_config("mla_prefill", problem, device, candidates)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and nothing shipped."""
    monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_FP8ATTN_TUNING", raising=False)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(tuning, "_warned", set())
    tuning._entries.cache_clear()
    yield tmp_path / "cache"
    tuning._entries.cache_clear()


def ship(config: Any, **header: Any) -> None:
    tuning.SHIPPED.mkdir(exist_ok=True)
    facts = {"schema": 1, "device": H200, "package": VERSION, "jax": "any"} | header
    data = facts | {"entries": [dataclasses.asdict(entry(config))]}
    (tuning.SHIPPED / "nvidia-h200.json").write_text(json.dumps(data))


def ignored(because: str) -> None:
    """Asked twice, the answer is no, with one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ask() is None and ask() is None
    assert len(caught) == 1 and because in str(caught[0].message), [str(w.message) for w in caught]


class TestFile:
    def test_round_trip(self, folder: Path) -> None:
        """R13: what is written is read, by this user alone."""
        path = tuning.write(H200, [entry()])
        assert path == folder / "tuned-nvidia-h200.json"
        assert tuning.read(path, H200) == [entry()]
        assert ask() is OTHER
        assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
        assert os.listdir(folder) == [path.name]

    def test_other_problems_and_devices(self) -> None:
        tuning.write(H200, [entry()])
        assert ask(dataclasses.replace(PROBLEM, tokens=5000, keys=4097)) is OTHER  # the same power of two
        for change in ({"tokens": 8193}, {"keys": 4096}, {"heads": 17}, {"causal": False}, {"state_dtype": BF16}):
            assert ask(dataclasses.replace(PROBLEM, **change)) is None
        assert ask(dataclasses.replace(PROBLEM, output_quant=Fp8PerTensor(None))) is None
        assert ask(device="NVIDIA H100 80GB HBM3") is None

    def test_writing_again(self) -> None:
        """What is known of other problems stays, a new winner replaces the old one, a loser is taken out."""
        full = dataclasses.replace(PROBLEM, causal=False)
        tuning.write(H200, [entry(), entry(THIRD, full)])
        tuning.write(H200, [entry(THIRD)])
        assert ask() is THIRD and ask(full) is THIRD
        path = tuning.write(H200, [], [entry(OTHER, full)])
        assert ask() is THIRD and ask(full) is None
        path.write_text("{")
        tuning.write(H200, [entry()])
        assert tuning.read(path, H200) == [entry()]

    def test_two_writers(self, folder: Path) -> None:
        """R13: whoever is last, the file is whole at every moment."""
        path = tuning.write(H200, [entry()])
        done = threading.Event()
        faults = []

        def watch() -> None:
            while not done.is_set():
                try:
                    assert tuning.read(path, H200)
                except Exception as error:
                    faults.append(error)

        def work(config: Any) -> None:
            for _ in range(50):
                tuning.write(H200, [entry(config)])

        watcher = threading.Thread(target=watch)
        writers = [threading.Thread(target=work, args=(config,)) for config in (OTHER, THIRD)]
        for thread in (watcher, *writers):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        watcher.join()
        assert not faults and ask() in (OTHER, THIRD) and len(os.listdir(folder)) == 1

    def test_nothing_is_left_of_a_write_that_fails(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tuning.write(H200, [entry()])
        before = path.read_text()

        def fail(*_: Any) -> None:
            raise OSError("no space")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            tuning.write(H200, [entry(THIRD)])
        assert path.read_text() == before and os.listdir(folder) == [path.name]


HOSTILE = {
    "truncated": ("Unterminated", lambda text: text[:60]),
    "empty": ("Expecting value", lambda text: ""),
    "no text": ("decode", lambda text: b"\xff\xfe"),
    "a list": ("must have the fields", lambda text: "[]"),
    "deep": ("recursion", lambda text: "[" * 200_000),
    "large": ("larger than", lambda text: text + " " * (1 << 20)),
    "NaN": ("NaN", lambda text: text.replace("90.0", "NaN")),
    "a great integer": ("", lambda text: text.replace("8192", "9" * 5000)),
}
CHANGED = {
    "schema": ("schema", lambda data: data.update(schema=2)),
    "schema of another type": ("schema must be of type int", lambda data: data.update(schema=True)),
    "device": ("device is 'NVIDIA H100'", lambda data: data.update(device="NVIDIA H100")),
    "package": ("tune again", lambda data: data.update(package="0.0.1")),
    "jax": ("tune again", lambda data: data.update(jax="0.11.1")),
    "any jax": ("tune again", lambda data: data.update(jax="any")),
    "unknown field": ("no others", lambda data: data.update(code="import os")),
    "no field": ("must have", lambda data: data.pop("jax")),
    "no list": ("entries must be", lambda data: data.update(entries={})),
    "entry": ("entry 1 must have", lambda data: data.update(entries=["text"])),
    "entry, unknown field": ("entry 1 must have", lambda data: data["entries"][0].update(more=1)),
    "op": ("unknown op", lambda data: data["entries"][0].update(op="os.system")),
    "fact": ("problem must have", lambda data: data["entries"][0]["problem"].update(more=1)),
    "fact of another type": ("heads must be", lambda data: data["entries"][0]["problem"].update(heads="16")),
    "fact out of range": ("out of range", lambda data: data["entries"][0]["problem"].update(heads=-1)),
    "time": ("time_us must be", lambda data: data["entries"][0].update(time_us="fast")),
    "no time": ("must be positive", lambda data: data["entries"][0].update(time_us=0.0)),
    "config": ("config must be", lambda data: data["entries"][0].update(config=[])),
    "field name": ("no field", lambda data: data["entries"][0]["config"].update({"__class__.x": 1})),
    "field of another kind": ("no field", lambda data: data["entries"][0]["config"].update(stages={"a": 1})),
    "long list": ("no field", lambda data: data["entries"][0]["config"].update(registers=[1] * 9)),
    "twice": ("twice", lambda data: data.update(entries=data["entries"] * 2)),
    # well-formed, but nothing that the kernel offers
    "stages": ("no configuration", lambda data: data["entries"][0]["config"].update(stages=99)),
    "stages below": ("no configuration", lambda data: data["entries"][0]["config"].update(stages=-1)),
    "stages of text": ("no configuration", lambda data: data["entries"][0]["config"].update(stages="3")),
    "true is not 1": ("no configuration", lambda data: data["entries"][0]["config"].update(producer=1)),
    "registers": ("no configuration", lambda data: data["entries"][0]["config"].update(registers=[24, 240])),
    "config's unknown field": ("no configuration", lambda data: data["entries"][0]["config"].update(more=1)),
    "config without a field": ("no configuration", lambda data: data["entries"][0]["config"].pop("blocks")),
}


class TestHostile:
    """R13: such a file is ignored with one warning, and the heuristic decides."""

    @pytest.mark.parametrize("name", HOSTILE)
    def test_text(self, name: str) -> None:
        because, change = HOSTILE[name]
        path = tuning.write(H200, [entry()])
        content = change(path.read_text())
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        ignored(because)

    @pytest.mark.parametrize("name", CHANGED)
    def test_fields(self, name: str) -> None:
        because, change = CHANGED[name]
        path = tuning.write(H200, [entry()])
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        ignored(because)

    @pytest.mark.parametrize("mode", [0o602, 0o620, 0o666])
    def test_a_file_that_others_can_write(self, mode: int) -> None:
        path = tuning.write(H200, [entry()])
        path.chmod(mode)
        ignored("others can write")

    @pytest.mark.parametrize("mode", [0o702, 0o770, 0o1777])
    def test_a_folder_that_others_can_write(self, folder: Path, mode: int) -> None:
        """As the shared one for temporary files is; nothing is written there either."""
        tuning.write(H200, [entry()])
        folder.chmod(mode)
        ignored("others can write")
        with pytest.raises(ValueError, match="others can write"):
            tuning.write(H200, [entry(THIRD)])

    def test_somebody_elses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tuning.write(H200, [entry()])
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        ignored("belongs to somebody else")

    def test_links_and_other_kinds(self, folder: Path, tmp_path: Path) -> None:
        """Neither followed nor waited for; written over, the link is gone and its target untouched."""
        path = tuning.write(H200, [entry()])
        target = path.rename(tmp_path / "elsewhere")
        before = target.read_text()
        path.symlink_to(target)
        ignored("symbolic link")
        tuning.write(H200, [entry(THIRD)])
        assert not path.is_symlink() and target.read_text() == before and ask() is THIRD
        for make in (Path.mkdir, os.mkfifo):
            path.unlink()
            make(path)
            tuning._warned.clear()
            tuning._entries.cache_clear()
            ignored("")
            break_up = path.rmdir if path.is_dir() else path.unlink
            break_up()
            path.touch()

    def test_no_code(self, folder: Path) -> None:
        """The answer is one of the objects that were offered."""
        tuning.write(H200, [entry()])
        assert any(ask() is config for config in CONFIGS)
        with pytest.warns(RuntimeWarning, match="no configuration"):
            assert ask(candidates=(DEFAULT, THIRD)) is None


class TestPlace:
    def test_nothing_there(self, folder: Path) -> None:
        """No file, no folder: no warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ask() is None
            folder.mkdir()
            tuning._entries.cache_clear()
            assert ask() is None
        assert not list(folder.iterdir())

    def test_where(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert tuning.cache_folder() == tmp_path / "cache"
        monkeypatch.setenv("JAX_FP8ATTN_CACHE_DIR", "relative")
        with pytest.warns(RuntimeWarning, match="not an absolute path"):
            assert tuning.cache_folder() is None
        with pytest.raises(ValueError, match="absolute path"):
            tuning.write(H200, [entry()])
        monkeypatch.delenv("JAX_FP8ATTN_CACHE_DIR")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert tuning.cache_folder() == tmp_path / "xdg" / "jax_fp8attn"
        for unset in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
            assert tuning.cache_folder() == tmp_path / ".cache" / "jax_fp8attn"
        monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home"))))
        assert tuning.cache_folder() is None and ask() is None

    def test_names(self) -> None:
        assert tuning.slug(H200) == "nvidia-h200"
        assert tuning.slug("../../etc/passwd") == "etc-passwd" and tuning.slug("/") == "unknown"
        assert len(tuning.slug("x" * 500)) == 80


class TestPrecedence:
    def test_own_then_shipped_then_the_heuristic(self) -> None:
        assert ask() is None
        ship(THIRD)
        tuning._entries.cache_clear()
        assert ask() is THIRD
        path = tuning.write(H200, [entry()])
        assert ask() is OTHER
        data = json.loads(path.read_text())
        data["entries"][0]["config"]["stages"] = 4
        path.write_text(json.dumps(data))
        tuning._entries.cache_clear()
        with pytest.warns(RuntimeWarning, match="no configuration"):
            assert ask() is THIRD

    def test_read_once(self) -> None:
        """The programs of a process do not change while it runs."""
        path = tuning.write(H200, [entry()])
        assert ask() is OTHER
        path.unlink()
        assert ask() is OTHER

    def test_switched_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ship(THIRD)
        tuning.write(H200, [entry()])
        with tuning.off():
            assert ask() is None
        assert ask() is OTHER
        monkeypatch.setenv("JAX_FP8ATTN_TUNING", "0")
        assert ask() is None

    def test_several_processes_agree(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """R14: one process may have a file that another has not."""
        ship(THIRD)
        tuning.write(H200, [entry()])
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        assert ask() is THIRD

    def test_chosen(self) -> None:
        """What a kernel calls: for the device that work goes to."""
        assert configs.chosen("mla_prefill", PROBLEM, DEFAULT) is DEFAULT
        tuning.write(H200, [entry()])
        assert configs.chosen("mla_prefill", PROBLEM, DEFAULT) is DEFAULT
        with dispatch.target_device(dispatch.Device("cuda", H200, (9, 0))):
            assert configs.chosen("mla_prefill", PROBLEM, DEFAULT) == OTHER


class TestShipped:
    FILES = sorted((Path(tuning.__file__).parent / "tuned").glob("*"))

    def test_there_is_one(self) -> None:
        assert "nvidia-h200.json" in [path.name for path in self.FILES]

    @pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
    def test_valid(self, path: Path) -> None:
        """For this version, under the name that is looked for."""
        device = json.loads(path.read_text())["device"]
        assert path.name == f"{tuning.slug(device)}.json"
        for found in tuning.read(path, device, own=False):
            assert found.time_us < found.default_us


def merge_problem(**facts: Any) -> MergeProblem:
    defaults = {"states": 2, "tokens": 64, "heads": 8, "width": 128, "dtype": BF16, "out_dtype": BF16}
    return MergeProblem(**{**defaults, **facts})


MERGES = (
    merge_problem(),
    merge_problem(dtype=np.dtype(np.float32), output_quant=Fp8PerTensor(None)),
    merge_problem(output_quant=Fp8PerGroup.deepgemm_sm100(), tokens=67),
    merge_problem(output_quant=Fp8PerGroup.row_major(64), heads=6),
    merge_problem(in_place=True, heads=3),
    merge_problem(heads=1, width=24, tokens=1),
)


class TestCandidates:
    def test_mla(self) -> None:
        found = configs.candidates("mla_prefill", PROBLEM, DEFAULT)
        assert found[0] is DEFAULT and len(set(found)) == len(found) >= 6
        assert {config.producer for config in found} == {True, False} and {config.stages for config in found} == {2, 3}
        plain = configs.candidates("mla_prefill", PROBLEM, MlaConfig(producer=False, late=False))
        assert len(plain) == 2 and not any(config.producer for config in plain)

    @pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
    def test_mla_in_bf16(self, dtype: Any) -> None:
        """In its own format; each is data that a file may hold, and is found again."""
        problem = dataclasses.replace(
            PROBLEM, compute="bf16", q_dtype=BF16, k_dtype=BF16, v_dtype=BF16, out_dtype=dtype
        )
        default = mla_prefill_sm90.default_config(problem)
        found = configs.candidates("mla_prefill", problem, default)
        assert found[0] is default and len(set(found)) == len(found) == (4 if dtype == BF16 else 3)
        assert {config.format.name for config in found} == {"bf16"}
        for config in found:
            tuning.write(H200, [entry(config, problem)])
            assert ask(problem, found) is config

    @pytest.mark.parametrize("problem", MERGES, ids=lambda p: f"{p.dtype} {p.heads} {p.output_quant}")
    def test_merge(self, problem: MergeProblem) -> None:
        """R12: each of them builds; the group of a quantisation is never changed."""
        default = merge_sm90.default_config(problem)
        found = configs.candidates("merge_attn_states", problem, default)
        assert found[0] is default and len(set(found)) == len(found)
        assert {config.width for config in found} == {default.width}
        for config in found:
            merge_sm90.build(problem, config)

    def test_merge_in_place_keeps_whole_blocks(self) -> None:
        (problem,) = (p for p in MERGES if p.in_place)
        found = configs.candidates("merge_attn_states", problem, merge_sm90.default_config(problem))
        assert {config.rows for config in found} == {1}

    def test_facts(self) -> None:
        assert tuning.mla_facts(PROBLEM) == {
            "tokens": 8192, "keys": 8192, "sequences": 1, "heads": 16, "causal": True, "compute": "fp8", "pair": False,
            "output": "bfloat16", "state": "none",
        }  # fmt: skip
        facts = tuning.merge_facts(merge_problem(tokens=65, output_quant=Fp8PerGroup.deepgemm_sm90()))
        assert (facts["tokens"], facts["output"]) == (128, "group128_float32_col_tma")
        assert [tuning._rounded(n) for n in (0, 1, 2, 3, 4, 5, 2**31)] == [0, 1, 2, 4, 4, 8, 2**31]
        for op, kinds in tuning._TYPES.items():
            problem = PROBLEM if op == "mla_prefill" else merge_problem()
            assert {name: type(value) for name, value in tuning.FACTS[op](problem).items()} == kinds


@dataclasses.dataclass(frozen=True)
class Fake:
    """A configuration of a kernel that only tells."""

    name: str


RIGHT = jnp.array([[1.0, 2.0], [-jnp.inf, 3.0]], jnp.float32)


def fake(*names: str, bound: float = 0.01) -> tune.Subject:
    """What each name returns: see ``run``."""
    calls = {"n": 0}

    def run(config: Fake) -> Any:
        results = {"wrong": RIGHT * 1.02, "close": RIGHT * 1.001, "nan": RIGHT.at[0, 0].set(jnp.nan)}
        results |= {"integers": jnp.ones(4, jnp.int32), "shape": RIGHT[:1], "finite": jnp.nan_to_num(RIGHT)}

        def call(number: int) -> Any:
            calls["n"] += 1
            if config.name == "breaks":
                raise RuntimeError("no such kernel")
            if config.name == "second set" and number == 1:
                return RIGHT * 2
            if config.name == "random":
                return RIGHT + 1e-6 * calls["n"] * jnp.ones_like(RIGHT)
            return results.get(config.name, RIGHT)

        return call

    return tune.Subject("mla_prefill", "fake", PROBLEM, [Fake(name) for name in names], run, 2, bound)


def clock(**medians: float) -> Any:
    def measure(contenders: Any, sets: int, rounds: int) -> dict[str, timing.Times]:
        names = [contender.name for contender in contenders]
        assert names == [str(number) for number in range(len(names))]
        return {name: timing.Times(list(medians.values())[int(name)], 0.1, 1.0, ()) for name in names}

    return measure


class TestTuner:
    @pytest.mark.parametrize(
        ("fault", "because"),
        [
            ("wrong", "is off by 0.02, bound 0.01"),
            ("nan", "is off by nan"),
            ("random", "another result each time"),
            ("second set", "is off by 1"),
            ("breaks", "RuntimeError: no such kernel"),
            ("integers", "is off by inf"),
            ("shape", "is off by inf"),
            ("finite", "is off by"),
        ],
    )
    def test_a_wrong_candidate_never_wins(self, fault: str, because: str) -> None:
        """It is not even timed."""
        timed = {"default": 100.0, "right": 90.0}
        outcome = tune.tuned(fake("default", fault, "right"), 3, clock(**timed))
        assert [config.name for config, _ in outcome.times] == list(timed)
        assert outcome.winner == Fake("right")
        ((config, why),) = outcome.refused
        assert config == Fake(fault) and because in why

    def test_close_results_may_win(self) -> None:
        outcome = tune.tuned(fake("default", "close"), 3, clock(default=100.0, close=50.0))
        assert outcome.winner == Fake("close") and outcome.won and not outcome.refused
        exact = tune.tuned(fake("default", "close", bound=1e-4), 3, clock(default=100.0))
        assert exact.winner == Fake("default") and not exact.won

    def test_noise_does_not_win(self) -> None:
        outcome = tune.tuned(fake("default", "a", "b"), 3, clock(default=100.0, a=98.5, b=99.0))
        assert outcome.winner == Fake("default") and not outcome.won
        outcome = tune.tuned(fake("default", "a", "b"), 3, clock(default=100.0, a=97.5, b=97.0))
        assert outcome.winner == Fake("b") and outcome.entry().time_us == 97.0 and outcome.entry().default_us == 100.0

    @pytest.mark.parametrize("name", ["random", "breaks"])
    def test_the_heuristic_must_be_right(self, name: str) -> None:
        with pytest.raises(RuntimeError):
            tune.tuned(fake(name, "right"), 3, clock())

    def test_infinities_are_compared(self) -> None:
        """-inf of an empty row agrees with itself."""
        assert tune._difference(RIGHT, RIGHT) == 0
        assert 0 < tune._difference(RIGHT * 1.001, RIGHT) < 0.01
        assert tune._difference(-0.0 * RIGHT[:1], 0.0 * RIGHT[:1]) == 0.0
        codes = jnp.array([1.0, 2.0]).astype(jnp.bfloat16)
        assert tune._difference((codes, RIGHT), (codes, RIGHT * 2)) > 0.4


class TestCommand:
    @pytest.mark.skipif(jax.devices()[0].platform == "gpu", reason="there is a GPU: tune would run")
    def test_needs_a_gpu(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert cli.main(["tune"]) == 2
        assert "GPU" in capsys.readouterr().out and not folder.exists()

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device and a clock that say so; of two candidates the second is the faster."""
        device = types.SimpleNamespace(platform="gpu", device_kind=H200)
        monkeypatch.setattr(tune.jax, "devices", lambda: [device])
        monkeypatch.setattr(timing, "measure", clock(default=100.0, other=80.0))
        monkeypatch.setattr(tune, "SHAPES", {"mla_prefill": (("B=1", "a"),), "merge_attn_states": ()})
        self.names = (DEFAULT, OTHER)

        def subject(op: str, letters: str, variant: str) -> tune.Subject:
            return dataclasses.replace(fake("x"), candidates=self.names, run=lambda config: lambda number: RIGHT)

        monkeypatch.setattr(tune, "subject_of", subject)

    def test_winners_are_kept(self, gpu: None, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert cli.main(["tune", "--op", "mla_prefill"]) == 0
        text = capsys.readouterr().out
        assert "stages=3" in text and f"kept in {folder}" in text and "100" in text and "80" in text
        assert ask() is OTHER
        self.names = (OTHER, DEFAULT, THIRD)[:1]
        assert cli.main(["tune", "--op", "mla_prefill", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)["problems"]
        assert not found["won"] and ask() is None  # the heuristic is as good now

    def test_dry_run(self, gpu: None, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert cli.main(["tune", "--dry-run"]) == 0
        assert "nothing is kept" in capsys.readouterr().out and not folder.exists()

    def test_no_place(self, gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(tuning.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(PermissionError("read-only")))
        assert cli.main(["tune"]) == 1
        assert "read-only" in capsys.readouterr().err

    def test_one_problem_that_fails(
        self, gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        right = tune.subject_of
        monkeypatch.setattr(tune, "SHAPES", {"mla_prefill": (("no", "x"), ("B=1", "a")), "merge_attn_states": ()})
        monkeypatch.setattr(
            tune,
            "subject_of",
            lambda op, letters, variant: int("x") if letters == "no" else right(op, letters, variant),
        )
        assert cli.main(["tune"]) == 1
        assert "mla_prefill no x" in capsys.readouterr().err and ask() is OTHER

    def test_a_shape_needs_its_op(self, gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["tune", "--shape", "T=1,H=1"]) == 2
        assert "--op" in capsys.readouterr().out


class TestSubjects:
    """What is tuned is what the public op would run."""

    def test_usual_shapes(self) -> None:
        for op, shapes in tune.SHAPES.items():
            variants = {case.variant for case in models.cases(op)}
            for letters, variant in shapes:
                assert variant in variants
                names = {part.partition("=")[0] for part in letters.split(",")}
                assert names == ({"B", "T", "S", "H"} if op == "mla_prefill" else {"T", "H"})

    @pytest.mark.parametrize("variant", ["bf16", "fp8_tensor", "fp8_group128_ue8m0_packed", "bf16 f32 in"])
    def test_merge(self, variant: str) -> None:
        subject = tune.subject_of("merge_attn_states", "T=20,H=4", variant)
        assert subject.candidates[0] == merge_sm90.default_config(subject.problem) and subject.sets == 3
        dtype = jnp.float32 if variant.endswith("f32 in") else jnp.bfloat16
        out, lse = jax.ShapeDtypeStruct((20, 4, 128), dtype), jax.ShapeDtypeStruct((4, 20), jnp.float32)
        spec = merge.OUTPUTS.get(variant.split()[0])
        assert subject.problem == explain("merge_attn_states", out, lse, out, lse, output_quant=spec).problem
        _, given, _ = merge.calls(models.Case("merge_attn_states", "", {"T": 20, "H": 4, "D": 128}, variant))
        for config in subject.candidates:
            jax.eval_shape(merge_sm90.build(subject.problem, config), given[0])

    @pytest.mark.parametrize("variant", ["fp8 causal", "fp8 full with a state", "fp8 causal to fp8_tensor"])
    def test_mla(self, variant: str) -> None:
        subject = tune.subject_of("mla_prefill", "B=1,T=40,S=60,H=2", variant)
        assert subject.candidates[0] == mla_prefill_sm90.default_config(subject.problem) and subject.sets == 2
        q, k, v = (jax.ShapeDtypeStruct((n, 2, d), E4M3) for n, d in ((40, 192), (60, 192), (60, 128)))
        cu = jax.ShapeDtypeStruct((2,), jnp.int32)
        state = jax.ShapeDtypeStruct((40, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2, 40), jnp.float32)
        quant = Fp8PerTensor(0.1) if "to" in variant.split() else None
        asked = explain(
            "mla_prefill", q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal="causal" in variant, output_quant=quant,
            initial_state=state if "state" in variant else None, return_lse=quant is None,
        )  # fmt: skip
        assert subject.problem == asked.problem
        case = models.Case("mla_prefill", "", {"B": 1, "T": 40, "S": 60, "H": 2, "D": 128}, variant)
        jax.eval_shape(mla_prefill_sm90.build(subject.problem, subject.candidates[0]), mla.calls(case)[1][0])

    def test_the_heuristic_is_asked_without_the_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Or the last winner would be measured against itself."""
        seen = []
        original = merge_sm90.default_config
        monkeypatch.setattr(
            merge_sm90, "default_config", lambda problem: seen.append(tuning._off.get()) or original(problem)
        )
        tune.subject_of("merge_attn_states", "T=4,H=4", "bf16")
        assert seen == [True]


def test_a_config_is_data() -> None:
    assert tuning.config_data(DEFAULT) == {
        "stages": 2, "producer": True, "registers": [240, 24], "blocks": 0, "splits": 1, "format": "fp8", "late": True,
        "keys": 128, "turn": "done", "tail": 0, "beside": 0, "parted": False,
    }  # fmt: skip
    assert tuning.config_data(MergeConfig(128, 8))["heads"] == "leftover"
