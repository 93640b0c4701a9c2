"""The named shapes, the files of measurements, and what is made from them. Nothing here is timed."""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_fp8attn.benchmarks import mla, models, report, timing
from jax_fp8attn.benchmarks.trial import Trial

from jax_fp8attn import Fp8PerGroup, cli, merge_attn_states, mla_prefill
from jax_fp8attn.cli import bench
from jax_fp8attn.quantize import E4M3
from jax_fp8attn.reference import mla_prefill as oracle

REPOSITORY = Path(__file__).resolve().parent.parent
STORED = sorted((REPOSITORY / "benchmarks" / "results").glob("*/*.json"))
OPS = ("mla_prefill", "merge_attn_states", "sparse_prefill", "gdn_prefill")
LETTERS = {"B", "C", "T", "S", "H", "Hk", "Hv", "D", "N", "topk", "P", "mix"}

RUN = report.Run(
    device="NVIDIA H200",
    date="2026-11-20",
    versions={"jax": "0.11.2", "driver": "580.00"},
    ceilings=report.Ceilings(copy_tbps=4.0, bf16_gemm_tflops=800.0, fp8_gemm_tflops=1600.0),
)


def row(**changes) -> report.Row:
    fields = {
        "op": "merge_attn_states",
        "case": "DeepSeek-V3 TP1, T=4096",
        "shape": {"T": 4096, "H": 128, "D": 128},
        "implementation": "pallas",
        "variant": "fp8_tensor",
        "is_peer": False,
        "time_us": 100.0,
        "spread_us": 1.5,
        "bytes": 200_000_000,
        "flops": 0,
        "error": 0.001,
        "error_bound": 0.002,
    }
    return report.Row(**{**fields, **changes})


ROWS = [
    row(),
    row(implementation="xla", time_us=125.0),
    row(implementation="slow", is_peer=True, time_us=400.0),
    row(implementation="quick", is_peer=True, time_us=150.0),
    row(implementation="other", is_peer=True, time_us=50.0, variant="bf16"),
    row(implementation="third", is_peer=True, time_us=50.0, case="DeepSeek-V3 TP1, T=1024"),
]


def stored(tmp_path: Path, op: str = "merge_attn_states") -> Path:
    return report.results_path(RUN.device, op, tmp_path)


class TestModels:
    @pytest.mark.parametrize(
        ("model", "tp", "heads"),
        [
            (models.DEEPSEEK_V3, 8, {"H": 16}),
            (models.KIMI_K2, 16, {"H": 4}),
            (models.DEEPSEEK_V4_FLASH, 8, {"H": 8}),
            (models.QWEN3_5_397B, 8, {"Hk": 2, "Hv": 8}),
            (models.QWEN3_NEXT, 1, {"Hk": 16, "Hv": 32}),
            (models.QWEN3_5_27B, 2, {"Hk": 8, "Hv": 24}),
        ],
    )
    def test_heads_per_rank(self, model, tp, heads) -> None:
        assert models.heads_per_rank(model, tp) == heads

    @pytest.mark.parametrize("tp", [0, -1, 3, 32])
    def test_heads_that_do_not_divide(self, tp) -> None:
        with pytest.raises(ValueError, match="DeepSeek-V2-Lite"):
            models.heads_per_rank(models.DEEPSEEK_V2_LITE, tp)

    def test_every_model_of_a_rank_is_named(self) -> None:
        assert models.ranks(models.MLA_MODELS, H=16) == "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1"
        assert models.ranks(models.GDN_MODELS, Hk=8, Hv=24) == "Qwen3.5-27B TP2"
        assert models.ranks(models.MLA_MODELS, H=12) == "H=12"

    @pytest.mark.parametrize("op", OPS)
    def test_cases(self, op) -> None:
        cases = models.cases(op)
        assert len({(case.name, case.variant) for case in cases}) == len(cases) > 15
        for case in cases:
            assert case.op == op
            assert {"T", "D"} <= case.shape.keys() <= LETTERS, case
            assert all(value >= 1 for name, value in case.shape.items() if name != "mix")
            assert "mix" in case.shape or case.shape["T"] % case.shape.get("B", 1) == 0
            if op == "mla_prefill":
                assert case.shape["S"] >= case.shape["T"]

    def test_one_name_is_one_shape(self) -> None:
        for op in OPS:
            shapes = {}
            for case in models.cases(op):
                assert shapes.setdefault(case.name, case.shape) == case.shape

    def test_the_sizes_that_were_promised(self) -> None:
        merge = {(c.shape["T"], c.shape["H"]) for c in models.cases("merge_attn_states")}
        grid = {(t, h) for t in (1, 16, 64, 256, 1024, 4096) for h in (4, 8, 16, 32, 64, 128)}
        assert merge == grid | {(8192, 128), (16384, 128)}
        mla = {(c.shape["T"], c.shape["H"]) for c in models.cases("mla_prefill")}
        assert {(t, h) for t in (2048, 8192, 32768) for h in (16, 32, 128)} <= mla
        sparse = {(c.shape["topk"], c.shape["H"]) for c in models.cases("sparse_prefill")}
        assert {(512, 64), (1024, 128), (2048, 128), (640, 64), (1152, 128)} <= sparse
        gdn = {c.shape["T"] // c.shape["B"] for c in models.cases("gdn_prefill")}
        assert min(gdn) <= 8192 and max(gdn) == 131072

    def test_mla_in_every_form(self) -> None:
        """Lengths of one sequence, sequences, heads: the rows that the op's speed is judged by."""
        timed = {}
        for case in models.cases("mla_prefill"):
            queries, keys = models.mla_lengths(case.shape)
            size = (queries[0], keys[0], len(queries), case.shape["H"])
            timed.setdefault(case.variant, set()).add(size if "mix" not in case.shape else "mix")
        square = {(8192, 8192, 1, 16), (8192, 8192, 1, 128), (32768, 32768, 1, 16), (4096, 4096, 4, 16)}
        assert square | {(1024, 1024, 16, 16), "mix"} <= timed["fp8 causal"]
        assert square | {(8192, 32768, 1, 16), (256, 65536, 1, 16)} == timed["fp8 full"]
        assert square == timed["fp8 causal from bf16"]
        assert {(8192, 8192, 1, 16), (4096, 4096, 4, 16)} == timed["bf16 causal"]
        for output in ("fp8_tensor", "fp8_group128_ue8m0_packed"):
            assert (8192, 8192, 1, 16) in timed[f"fp8 causal to {output}"]
        assert (8192, 8192, 1, 16) in timed["fp8 causal with a state"] & timed["fp8 full with a state"]
        assert {(256, keys, 1, 16) for keys in (8192, 32768, 131072)} == timed["fp8 full V of mean 1"]
        assert {(8192, 40960, 1, 16)} == timed["fp8 causal in chunks"]
        assert sum("mix" in case.shape for case in models.cases("mla_prefill")) == 8

    def test_mixes(self) -> None:
        """The same for ever, or results of two days are not comparable."""
        assert models.mix(0) == (6333, 3742, 2500, 4439, 3622, 6532)
        assert models.mix(6) == (6825, 4237, 2521, 515, 5603, 4124)
        for number in range(50):
            lengths = models.mix(number)
            assert 512 <= min(lengths) <= max(lengths) <= 8192
            assert 16384 <= sum(lengths) < 24576 + 8192 and sum(lengths[:-1]) < 24576
        for case in models.cases("mla_prefill"):
            queries, keys = models.mla_lengths(case.shape)
            assert (len(queries), sum(queries), sum(keys)) == tuple(case.shape[letter] for letter in "BTS")

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("size", [(1, 5, 5), (2, 5, 9), (1, 9, 5), (3, 1, 7), (2, 6, 0)], ids=str)
    def test_pairs(self, size, causal) -> None:
        sequences, queries, keys = size
        seen = sum(not causal or j <= i + keys - queries for i in range(queries) for j in range(keys))
        shape = {"B": sequences, "T": sequences * queries, "S": sequences * keys}
        assert models.mla_pairs(shape, causal) == sequences * seen

    def test_pairs_of_a_mix(self) -> None:
        shape = {"B": 6, "T": 27168, "S": 27168, "mix": 0}
        assert models.mla_pairs(shape, True) == sum(n * (n + 1) // 2 for n in models.mix(0))
        assert models.mla_pairs(shape, False) == sum(n * n for n in models.mix(0))

    def test_sparse_rows(self) -> None:
        """Heads, rows a token, rows of the pool: the rows that the op's speed is judged by."""
        timed = {"one": set(), "two": set(), "positions": set()}
        for case in models.cases("sparse_prefill"):
            if case.variant == "exact":
                kind = "positions" if "C" in case.shape else "two" if "S" in case.shape else "one"
                timed[kind].add(tuple(case.shape[letter] for letter in ("T", "H", "topk", "P")))
        pool = 32768
        one = {(64, 512, pool), (64, 2048, pool), (128, 512, pool), (128, 1024, pool), (128, 2048, pool)}
        assert {(4096, *size) for size in one | {(64, 512, 1 << 20)}} == timed["one"]
        assert {(4096, heads, 512 + 128, pool) for heads in (8, 16, 32)} <= timed["two"]
        assert {(4096, 64, 640, 65536), (4096, 128, 1152, 65536)} <= timed["positions"]

    def test_gdn_rows(self) -> None:
        """Heads, tokens of a sequence, sequences."""
        timed = {}
        for case in models.cases("gdn_prefill"):
            k_heads, v_heads, tokens, sequences = (case.shape[letter] for letter in ("Hk", "Hv", "T", "B"))
            timed.setdefault(case.variant, set()).add((k_heads, v_heads, tokens // sequences, sequences))
        single = {(2, 8, n, 1) for n in (8192, 32768, 131072)} | {(4, 16, n, 1) for n in (8192, 32768)}
        single |= {(16, 32, n, 1) for n in (8192, 32768)}
        assert single | {(16, 64, 8192, 4), (2, 8, 8192, 20), (4, 16, 1024, 32)} <= timed["bf16"]
        assert len(timed["bf16 pool"]) == 3 and timed["bf16 pool"] <= timed["bf16"]

    def test_unknown_op(self) -> None:
        with pytest.raises(ValueError, match="merge_attn_states"):
            models.cases("merge")

    def test_headlines_are_cases(self) -> None:
        known = {(case.op, case.name, case.variant) for op in OPS for case in models.cases(op)}
        assert set(report.HEADLINES) <= known
        assert {op for op, _, _ in report.HEADLINES} == set(OPS)


class TestFile:
    def test_round_trip(self, tmp_path) -> None:
        path = tmp_path / "h200" / "merge_attn_states.json"
        rows = [*ROWS, row(implementation="timed", dispatch_us=31.5)]
        run = dataclasses.replace(RUN, commit="0123abc", ceilings=report.Ceilings(4.25))
        report.write(path, run, rows)
        assert report.read(path) == (run, rows)

    def test_layout(self, tmp_path) -> None:
        path = tmp_path / "x.json"
        report.write(path, RUN, ROWS)
        data = json.loads(path.read_text())
        assert data == report.as_json(RUN, ROWS)
        assert list(data) == ["run", "rows"]
        assert list(data["run"]) == ["device", "date", "versions", "ceilings"]
        assert list(data["run"]["ceilings"]) == ["copy_tbps", "bf16_gemm_tflops", "fp8_gemm_tflops"]
        assert list(data["rows"][0]) == [field.name for field in dataclasses.fields(report.Row)][:-1]
        assert sum('"time_us"' in line for line in path.read_text().splitlines()) == len(ROWS)

    def test_rounding(self, tmp_path) -> None:
        report.write(tmp_path / "x.json", RUN, [row(time_us=123.45678, error=1 / 3e3, bytes=123456789)])
        _, (kept,) = report.read(tmp_path / "x.json")
        assert (kept.time_us, kept.error, kept.bytes) == (123.5, 3.333e-4, 123456789)
        first = (tmp_path / "x.json").read_text()
        report.write(tmp_path / "x.json", RUN, [kept])
        assert (tmp_path / "x.json").read_text() == first

    def test_an_error_at_its_bound_survives_rounding(self, tmp_path) -> None:
        report.write(tmp_path / "x.json", RUN, [row(error=0.00599996, error_bound=0.00599996)])
        assert report.read(tmp_path / "x.json")[1][0].error == 0.006

    @pytest.mark.parametrize(
        ("rows", "reason"),
        [
            ([row(time_us=float("nan"))], "time_us is nan"),
            ([row(time_us=float("inf"))], "time_us is inf"),
            ([row(time_us=None)], "time_us is None"),
            ([row(time_us=0.0)], "time_us is 0.0"),
            ([row(time_us=True)], "time_us is True"),
            ([row(error=0.0021)], "exceeds its bound"),
            ([row(error=float("nan"))], "error is nan"),
            ([row(error_bound=float("inf"))], "error_bound is inf"),
            ([row(spread_us=-1.0)], "spread_us is -1.0"),
            ([row(dispatch_us=float("nan"))], "dispatch_us is nan"),
            ([row(bytes=0)], "bytes is 0"),
            ([row(), row(time_us=90.0)], "twice"),
        ],
    )
    def test_refused(self, tmp_path, rows, reason) -> None:
        path = tmp_path / "x.json"
        with pytest.raises(ValueError, match=reason):
            report.write(path, RUN, rows)
        assert not path.exists()

    @pytest.mark.parametrize(
        ("run", "reason"),
        [
            (dataclasses.replace(RUN, date="yesterday"), "yesterday"),
            (dataclasses.replace(RUN, device=None), "device"),
            (dataclasses.replace(RUN, versions={"jax": 11}), "jax"),
            (dataclasses.replace(RUN, ceilings=report.Ceilings(0.0)), "copy_tbps"),
            (dataclasses.replace(RUN, ceilings=report.Ceilings(None)), "copy_tbps"),
            (dataclasses.replace(RUN, ceilings=report.Ceilings(4.0, float("nan"))), "bf16_gemm_tflops"),
        ],
    )
    def test_refused_runs(self, tmp_path, run, reason) -> None:
        with pytest.raises(ValueError, match=reason):
            report.write(tmp_path / "x.json", run, ROWS)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda data: data.update(more=1), "unknown fields more"),
            (lambda data: data["run"].update(host="x"), "unknown fields host"),
            (lambda data: data["run"]["ceilings"].update(int8=1.0), "unknown fields int8"),
            (lambda data: data["rows"][0].update(speed=1), "row 1: unknown fields speed"),
            (lambda data: data["rows"][0].pop("error"), "row 1: fields error are missing"),
            (lambda data: data["rows"][0].update(error=1.0), "exceeds its bound"),
            (lambda data: data["rows"].append(data["rows"][0]), "twice"),
            (lambda data: data.update(rows=["text"]), "expected an object"),
        ],
    )
    def test_reading_is_as_strict(self, tmp_path, change, reason) -> None:
        path = tmp_path / "x.json"
        report.write(path, RUN, ROWS)
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=re.escape(str(path)) + f".*{reason}"):
            report.read(path)

    @pytest.mark.parametrize(
        ("device", "folder"),
        [
            ("NVIDIA H200", "h200"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA B200", "b200"),
            ("AMD Instinct MI355X", "mi355x"),
            ("Intel Xeon, 2 cores", "intel-xeon-2-cores"),
        ],
    )
    def test_slug(self, device, folder) -> None:
        assert report.slug(device) == folder


class TestArithmetic:
    def test_rates(self) -> None:
        measured = row(time_us=50.0, bytes=100_000_000, flops=40_000_000_000)
        assert measured.tbps == pytest.approx(2.0)  # 1e8 bytes in 5e-5 s
        assert measured.tflops == pytest.approx(800.0)  # 4e10 in 5e-5 s

    @pytest.mark.parametrize(
        ("variant", "size", "flops", "expected"),
        [
            ("fp8 causal", 200_000_000, 0, 0.5),  # 2e8 / 4e12 = 50 us of 100
            ("fp8 causal", 4_000_000, 128_000_000_000, 0.8),  # 1.28e11 / 1.6e15 = 80 us
            ("bf16 causal", 4_000_000, 64_000_000_000, 0.8),  # 6.4e10 / 8e14 = 80 us
            ("exact", 4_000_000, 64_000_000_000, 0.8),
            ("bf16 causal", 360_000_000, 64_000_000_000, 0.9),  # the bytes take longer: 90 us
        ],
    )
    def test_roofline(self, variant, size, flops, expected) -> None:
        measured = row(variant=variant, bytes=size, flops=flops, time_us=100.0)
        assert measured.roofline(RUN.ceilings) == pytest.approx(expected)

    def test_a_ceiling_that_was_not_measured_does_not_count(self) -> None:
        measured = row(bytes=200_000_000, flops=10**15)
        assert measured.roofline(report.Ceilings(4.0)) == pytest.approx(0.5)


class TestTable:
    def test_ratio_to_the_fastest_peer(self) -> None:
        ratios = [report.ratio(ROWS, each) for each in ROWS]
        assert ratios == [1.5, 1.2, 0.375, 1.0, 1.0, 1.0]
        assert report.ratio(ROWS, row(variant="fp8_group128_f32_row")) is None

    def test_a_part_of_a_peer_is_not_the_fastest(self) -> None:
        """Of one that is not there it is all that is known."""
        peers = [
            row(implementation=name, is_peer=True, time_us=time) for name, time in (("a", 120.0), ("a kernel", 80.0))
        ]
        assert report.ratio([row(time_us=100.0), *peers], row(time_us=100.0)) == 1.2
        assert report.ratio(peers[1:], row(time_us=100.0)) == 0.8

    def test_lines(self) -> None:
        text = report.table(RUN, [*ROWS, row(variant="bf16", bytes=4_000_000, flops=64 * 10**9, case="alone")])
        lines = text.splitlines()
        assert "NVIDIA H200, 2026-11-20" in lines[0] and "copy 4 TB/s" in lines[0] and "1600 TFLOP/s" in lines[0]
        assert len(lines) == 4 + len(ROWS) + 1
        (ours,) = (line for line in lines if " pallas " in line and "4096" in line)
        assert re.search(r"fp8_tensor +pallas +100 +1\.5 +2\.00 TB/s +50% +0\.001 +0\.002 +1\.50x$", ours)
        assert any(re.search(r"quick \(peer\) +150 .* 1\.00x$", line) for line in lines)
        assert re.search(r"640 TFLOP/s +80% .* -$", lines[-1])
        assert "64 GB/s" in report.table(RUN, [row(bytes=6_400_000)])

    def test_plain_where_there_is_no_terminal(self, capsys) -> None:
        report.print_table(RUN, ROWS)
        assert capsys.readouterr().out == report.table(RUN, ROWS) + "\n"

    @pytest.mark.parametrize(
        ("value", "text"), [(3.2149, "3.215"), (123.45, "123.5"), (4247.8, "4248"), (1e5, "100000")]
    )
    def test_digits(self, value, text) -> None:
        assert report._digits(value) == text

    def test_rich_on_a_terminal(self, monkeypatch, capsys) -> None:
        pytest.importorskip("rich", reason="rich, of the extra bench, is not installed")
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "200")
        report.print_table(RUN, ROWS)
        printed = capsys.readouterr().out
        assert "1.50x" in printed and "50%" in printed and printed != report.table(RUN, ROWS) + "\n"


SIZES = [
    row(
        case=f"T={tokens}",
        implementation=name,
        is_peer=name == "peer",
        variant=variant,
        time_us=3 + tokens * slope,
        bytes=tokens * 82944,
    )
    for tokens in (1, 16, 256, 4096)
    for name, slope in (("pallas", 0.022), ("peer", 0.08))
    for variant in ("bf16", "fp8_tensor")
]


class TestPlot:
    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_writes_a_file(self, tmp_path, suffix) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib, of the extra bench, is not installed")
        path = tmp_path / "plots" / f"merge.{suffix}"
        report.plot(RUN, SIZES, path)
        start = {"png": b"\x89PNG", "svg": b"<?xml"}[suffix]
        assert path.read_bytes().startswith(start) and path.stat().st_size > 10_000
        if suffix == "svg":  # the text of a label stands in a comment beside its outlines
            text = path.read_text()
            for label in ("roofline", "pallas", "peer (peer)", "achieved [TB/s]", "bytes read and written [MB]"):
                assert f"<!-- {label} -->" in text
            assert "<!-- merge_attn_states on NVIDIA H200, 2026-11-20 -->" in text

    def test_compute_bound_rows_show_flops(self, tmp_path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib, of the extra bench, is not installed")
        report.plot(RUN, [row(flops=10**11, case="a"), row(flops=10**10, case="b", bytes=10**6)], tmp_path / "x.svg")
        assert "<!-- achieved [TFLOP/s] -->" in (tmp_path / "x.svg").read_text()

    def test_equal_sizes_become_one_point(self) -> None:
        sizes, rates = report._curve([(8.0, 2.0), (1.0, 3.0), (8.01, 8.0)])
        assert (sizes, rates) == ([1.0, 8.0], pytest.approx([3.0, 4.0]))

    def test_other_suffixes(self, tmp_path) -> None:
        with pytest.raises(ValueError, match=r"\.png or \.svg"):
            report.plot(RUN, SIZES, tmp_path / "x.pdf")

    def test_no_rows(self, tmp_path) -> None:
        with pytest.raises(ValueError, match="no rows"):
            report.plot(RUN, [], tmp_path / "x.png")

    def test_without_matplotlib(self, tmp_path, monkeypatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else find(n, *a))
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jax_fp8attn\[bench\]'"):
            report.plot(RUN, SIZES, tmp_path / "x.png")


class TestReadme:
    TEXT = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"

    @pytest.fixture
    def results(self, tmp_path) -> Path:
        report.write(stored(tmp_path), RUN, ROWS)
        case = "Qwen3.5-397B TP8, 1 x 8192"
        gdn = row(op="gdn_prefill", case=case, variant="bf16", shape={"T": 8192}, time_us=92.0, bytes=92_000_000)
        other = dataclasses.replace(gdn, case="not a headline")
        report.write(stored(tmp_path, "gdn_prefill"), RUN, [gdn, other])
        return tmp_path

    def test_table(self, results) -> None:
        link = "[NVIDIA H200](benchmarks/results/h200/{}.json), 2026-11-20"
        assert report.readme_table(results).splitlines()[2:] == [
            "| `merge_attn_states` | DeepSeek-V3 TP1, T=4096, fp8_tensor | 100 us, 2.00 TB/s (`pallas`) | 50% "
            f"| 150 us (quick) | 1.50x | {link.format('merge_attn_states')} |",
            "| `gdn_prefill` | Qwen3.5-397B TP8, 1 x 8192, bf16 | 92 us, 1.00 TB/s (`pallas`) | 25% "
            f"| - | - | {link.format('gdn_prefill')} |",
        ]

    def test_a_peer_with_the_name_of_an_implementation(self, results) -> None:
        run, (gdn, other) = report.read(stored(results, "gdn_prefill"))
        peer = dataclasses.replace(gdn, implementation="flashinfer", is_peer=True, time_us=46.0)
        report.write(stored(results, "gdn_prefill"), run, [gdn, peer, other])
        line = report.readme_table(results).splitlines()[-1]
        assert "| 92 us, 1.00 TB/s (`pallas`) | 25% | 46 us (flashinfer) | 0.50x |" in line

    def test_a_part_is_not_the_op(self, tmp_path) -> None:
        """The line is of what a caller can ask for by name."""
        parts = [row(implementation=name, time_us=1.0) for name in ("pallas kernel", "unfused", "bf16 output")]
        report.write(stored(tmp_path), RUN, [*ROWS, *parts])
        assert "100 us, 2.00 TB/s (`pallas`)" in report.readme_table(tmp_path)

    def test_columns_agree(self, results) -> None:
        assert len({line.count("|") for line in report.readme_table(results).splitlines()}) == 1

    def test_nothing_stored(self, tmp_path) -> None:
        assert report.readme_table(tmp_path) == "Nothing is measured yet."

    def test_update(self, results, tmp_path) -> None:
        readme = tmp_path / "README.md"
        readme.write_text(self.TEXT)
        assert report.update_readme(readme, results)
        table = report.readme_table(results)
        assert readme.read_text() == self.TEXT.replace("old", table)
        assert not report.update_readme(readme, results)

    @pytest.mark.parametrize("text", ["none", report.BEGIN, f"{report.END}{report.BEGIN}", TEXT + TEXT])
    def test_markers(self, tmp_path, text) -> None:
        readme = tmp_path / "README.md"
        readme.write_text(text)
        with pytest.raises(ValueError, match="measured:begin"):
            report.update_readme(readme, tmp_path)
        assert readme.read_text() == text

    def test_command(self, results, tmp_path, capsys) -> None:
        readme = tmp_path / "README.md"
        readme.write_text(self.TEXT)
        assert report.main(["--results", str(results)]) == 0
        assert capsys.readouterr().out == report.readme_table(results) + "\n"
        assert report.main(["--results", str(results), "--write", str(readme)]) == 0
        assert "100 us" in readme.read_text()


class TestMla:
    """The trials of mla_prefill with the oracle in the kernel's place, so that everything else runs on a CPU."""

    @pytest.fixture(autouse=True)
    def oracle(self, monkeypatch) -> None:
        self.problems = []

        def build(problem, config):
            self.problems.append(problem)
            return functools.partial(oracle.run, problem)

        kernel = mla.mla_prefill_sm90
        monkeypatch.setattr(kernel, "supports", lambda problem, device: ())
        monkeypatch.setattr(kernel, "build", build)
        steps = lambda problem, config: kernel.Steps(lambda x: (x, None), build(problem, config), None)
        monkeypatch.setattr(kernel, "steps_of", steps)
        merging = lambda *states, return_lse, implementation: merge_attn_states(*states, return_lse=return_lse)
        monkeypatch.setattr(mla, "merge_attn_states", merging)

    @staticmethod
    def trial(variant: str, sequences: int = 1, tokens: int = 150, keys: int = 150, **shape):
        shape = {"B": sequences, "T": sequences * tokens, "S": sequences * keys, "H": 2, "D": 128} | shape
        return mla.trial(models.Case("mla_prefill", "small", shape, variant), None)

    @pytest.mark.parametrize(
        ("variant", "shape", "names"),
        [
            ("fp8 causal", {"sequences": 2, "keys": 200}, ["pallas kernel", "pallas"]),
            ("fp8 full", {"sequences": 2, "keys": 200}, ["pallas kernel", "pallas"]),
            pytest.param("bf16 causal", {}, ["pallas kernel", "pallas"], marks=pytest.mark.slow),
            ("fp8 causal from bf16", {}, ["pallas"]),
            pytest.param("fp8 causal to fp8_tensor", {}, ["pallas", "bf16 output", "unfused"], marks=pytest.mark.slow),
            ("fp8 causal to fp8_group128_ue8m0_packed", {}, ["pallas", "bf16 output", "unfused"]),
            pytest.param("fp8 full with a state", {}, ["pallas", "without a state", "unfused"], marks=pytest.mark.slow),
            pytest.param("fp8 full V of mean 1", {"tokens": 20, "keys": 300}, ["pallas"], marks=pytest.mark.slow),
            pytest.param("fp8 causal in chunks", {"tokens": 100, "keys": 300}, ["pallas"], marks=pytest.mark.slow),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_right_results_pass(self, variant, shape, names) -> None:
        """And so does no other row of theirs: the error of rows in another order is no error of rounding."""
        trial = self.trial(variant, **shape)
        assert [contender.name for contender in trial.contenders] == names
        for contender in trial.contenders:
            for number in range(trial.sets):
                result = contender.call(number)
                error = trial.error(contender, result)
                assert (error <= trial.bound(contender)) == (number == 0), (contender.name, error)
            turned = jax.tree.map(lambda x: x[:, ::-1], contender.call(0))
            assert trial.error(contender, turned) > trial.bound(contender)

    def test_every_sequence_is_looked_at(self, monkeypatch) -> None:
        """Lengths that differ, one of them less than the rows that are checked."""
        monkeypatch.setattr(models, "mix", lambda number: (40, 200, 90))
        monkeypatch.setattr(mla, "CHECKED", 180)
        trial = self.trial("fp8 causal", 3, mix=0, T=330, S=330)
        _, whole = trial.contenders
        out, lse = whole.call(0)
        assert trial.error(whole, (out, lse)) <= trial.bound(whole)
        for end in (40, 240, 330):
            wrong = out.at[end - 1].set(3.0), lse
            assert trial.error(whole, wrong) > trial.bound(whole)
        assert trial.flops == 2 * 320 * 2 * sum(n * (n + 1) // 2 for n in (40, 200, 90))

    def test_bytes_and_flops(self) -> None:
        trial = self.trial("fp8 causal", tokens=100, keys=300)
        pairs = sum(range(201, 301))
        rows = 100 * 2
        assert trial.flops == 2 * (192 + 128) * 2 * pairs
        assert trial.bytes == rows * 192 + 300 * 2 * (192 + 128) + rows * (2 * 128 + 4)
        assert self.trial("bf16 full").bytes == 150 * 2 * 2 * (192 + 192 + 128 + 128) + 150 * 2 * 4
        assert self.trial("fp8 causal from bf16").bytes == self.trial("bf16 full").bytes
        assert self.trial("fp8 causal to fp8_tensor").bytes == 150 * 2 * (192 + 192 + 128 + 128)

    def test_what_is_asked_for(self) -> None:
        """The problems of the kernels, in the order of their rows."""
        self.trial("fp8 causal in chunks", tokens=100, keys=300)
        assert [(p.causal, p.state_dtype, p.keys) for p in self.problems] == [
            (False, None, 100), (True, jnp.bfloat16, 100), (False, jnp.bfloat16, 100)
        ]  # fmt: skip
        self.problems.clear()
        self.trial("fp8 causal to fp8_group128_ue8m0_packed")
        assert [p.output_quant for p in self.problems] == [Fp8PerGroup.deepgemm_sm100(), None]
        self.problems.clear()
        self.trial("bf16 full from bf16")
        assert [(p.compute, p.q_dtype, p.causal) for p in self.problems] == [("bf16", jnp.bfloat16, False)]

    def test_what_the_kernel_does_not_take_is_left_to_the_peers(self, monkeypatch) -> None:
        monkeypatch.setattr(mla.mla_prefill_sm90, "supports", lambda problem, device: ("not in bf16",))
        assert self.trial("bf16 causal").contenders == []

    def test_an_error_that_is_stated(self) -> None:
        """Sums that lose a third of V's mean: a peer's row is kept with its error, a row of ours is not."""
        trial = self.trial("fp8 full V of mean 1", tokens=20, keys=300)
        (ours,) = trial.contenders
        peer = dataclasses.replace(ours, name="fa3", is_peer=True)
        out, lse = ours.call(0)
        assert 0.25 < trial.error(peer, (0.7 * out, lse)) <= trial.bound(peer)
        assert trial.error(ours, (1.006 * out, lse)) > trial.bound(ours)
        for variant in ("fp8 full", "fp8 causal", "fp8 causal from bf16"):
            other = self.trial(variant)
            assert other.bound(peer) == other.bound(ours) < 0.05


class TestMlaPeers:
    """What the peers are called with: functions of the oracle stand for theirs, jax's arrays for PyTorch's."""

    @pytest.fixture(autouse=True)
    def torch(self, monkeypatch) -> None:
        empty = lambda size, **_: jnp.zeros(size)
        array = lambda x, **_: np.asarray(x)
        kinds = {"int32": 0, "bfloat16": 0}
        monkeypatch.setitem(
            sys.modules, "torch", types.SimpleNamespace(empty=empty, empty_like=Buffer, tensor=array, **kinds)
        )
        monkeypatch.setattr(mla, "_tensor", lambda x: x)
        monkeypatch.setattr(mla.mla_prefill_sm90, "supports", lambda problem, device: ("no GPU",))
        self.calls = []

        def attend(q, k, v, out, causal, cu_q, cu_k, longest, splits=1):
            assert out.shape == (*q.shape[:2], 128)
            assert longest == (max(np.diff(cu_q)), max(np.diff(cu_k)))
            assert (cu_q[-1], cu_k[-1]) == (q.shape[0], k.shape[0])
            self.calls.append((k.dtype, causal, splits))
            offsets = (jnp.asarray(cu, jnp.int32) for cu in (cu_q, cu_k))
            return mla_prefill(
                q, k, v, cu_seqlens_q=next(offsets), cu_seqlens_k=next(offsets), causal=causal, return_lse=True,
                compute="fp8" if q.dtype == E4M3 else "bf16",
            )  # fmt: skip

        def merge(out, a, la, b, lb, scale, out_lse):
            assert scale is None
            out.value, out_lse.value = merge_attn_states(*(unwrapped(x) for x in (a, la, b, lb)), return_lse=True)

        monkeypatch.setattr(mla.peers, "fa3", lambda folder: {"fa3": attend, "fa3 vllm": attend})
        monkeypatch.setattr(mla.peers, "merges", lambda folder: {"vllm triton": merge, "vllm cuda": None})

    @pytest.mark.parametrize(
        ("variant", "size", "splits"),
        [
            ("fp8 causal", (1, 200, 200, 66), [1, 1]),  # 132 tiles: enough for all multiprocessors
            pytest.param("fp8 full", (2, 100, 160, 2), [1, 0, 1, 0], marks=pytest.mark.slow),
            pytest.param("bf16 causal", (1, 129, 129, 66), [1, 1], marks=pytest.mark.slow),
            pytest.param("fp8 causal from bf16", (1, 100, 100, 2), [1, 1], marks=pytest.mark.slow),
            pytest.param("fp8 full V of mean 1", (1, 100, 200, 2), [1, 1], marks=pytest.mark.slow),
            ("fp8 causal to fp8_tensor", (1, 100, 100, 2), []),
            ("fp8 causal with a state", (1, 100, 100, 2), []),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_calls(self, variant, size, splits) -> None:
        sequences, tokens, keys, heads = size
        trial = TestMla.trial(variant, sequences, tokens, keys, H=heads)
        for contender in trial.contenders:
            assert contender.is_peer
            assert trial.error(contender, contender.call(0)) <= trial.bound(contender), contender.name
        form = mla._Form.of(variant)
        dtype = E4M3 if form.precision == "fp8" else jnp.bfloat16
        assert self.calls == [(dtype, form.causal, number) for number in splits]
        names = [f"{name}{' bf16' * (form.precision == 'bf16')}" for name in ("fa3", "fa3 vllm")]
        expected = [
            f"{name}{' split' * (number == 0)}" for name, number in zip(sorted(names * 2), [1, 0] * 2, strict=True)
        ]
        assert [c.name for c in trial.contenders] == ([] if not splits else expected if 0 in splits else names)

    def test_chunks(self) -> None:
        trial = TestMla.trial("fp8 causal in chunks", 1, 60, 240)
        assert [c.name for c in trial.contenders] == ["fa3 + vllm triton", "fa3 vllm + vllm triton"]
        for contender in trial.contenders:
            out, _ = contender.call(0)
            assert trial.error(contender, out.value) <= trial.bound(contender)
        assert self.calls[:4] == [(E4M3, False, 1)] * 3 + [(E4M3, True, 1)]


@dataclasses.dataclass
class Buffer:
    """What torch.empty_like makes: written later."""

    like: object
    value: object = None


def unwrapped(x: object) -> object:
    return x.value if isinstance(x, Buffer) else x


class TestBench:
    """The order of compiling, checking and timing."""

    loses = False

    @pytest.fixture
    def rows(self, monkeypatch):
        log = []
        cases = [models.Case("merge_attn_states", f"case {n}", {"T": n}, "bf16") for n in range(1, 6)]

        class Module:
            @staticmethod
            def trial(case, folder):
                def call(name, i):
                    log.append((case.name, name))
                    if name == "breaks":
                        raise RuntimeError("no such kernel")
                    return {"right": 0.001, "wrong": 0.5, "nan": float("nan")}[name]

                names = ("right", "wrong", "nan", "breaks") if case.name == "case 2" else ("right",)
                names = names if case.name != "case 4" else ("wrong",)
                contenders = [timing.Contender(name, functools.partial(call, name)) for name in names]
                return Trial(contenders, 1, 100, 0, lambda _, result: result, lambda _: 0.01)

        def measure(contenders, sets, rounds):
            if not contenders:
                return {}
            if self.loses:
                raise RuntimeError("the profiler lost events")
            log.append(("timed", *(c.name for c in contenders)))
            return {c.name: timing.Times(10.0, 0.1, 5.0, ()) for c in contenders}

        monkeypatch.setattr(models, "cases", lambda op: cases)
        monkeypatch.setattr(timing, "measure", measure)
        monkeypatch.setattr(bench, "importlib", types.SimpleNamespace(import_module=lambda name: Module))
        monkeypatch.setattr(bench, "AT_ONCE", 2)

        def run(**options):
            options = types.SimpleNamespace(**{"only": "", "peers": None, "rounds": 3} | options)
            return list(bench._rows("merge_attn_states", options))

        return run, log

    def test_wrong_results_are_not_timed(self, rows) -> None:
        """R20: nor does one that breaks stop the others."""
        run, log = rows
        found = run()
        assert [row.case for row, _ in found if row] == ["case 1", "case 2", "case 3", "case 5"]
        assert {row.implementation for row, _ in found if row} == {"right"}
        messages = "\n".join(message for _, message in found if message)
        assert "case 2 bf16: wrong has error 0.5, bound 0.01" in messages and "case 2 bf16: nan has" in messages
        assert "case 2 bf16: breaks failed: RuntimeError: no such kernel" in messages
        assert "case 4 bf16: wrong" in messages and messages.count("\n") == 3
        assert [entry for entry in log if entry[0] == "timed"] == [("timed", "right")] * 4

    def test_nothing_is_compiled_while_a_case_is_timed(self, rows) -> None:
        run, log = rows
        run()
        order = ["t" if entry[0] == "timed" else entry[0][-1] for entry in log]
        compressed = [a for a, b in zip(order, [*order[1:], ""], strict=True) if a != b]
        assert "".join(sorted(compressed[: compressed.index("t")])) in ("12", "122", "112")
        assert "".join(compressed).endswith("5t") and "".join(order).count("tt") == 1

    def test_a_trace_that_is_not_whole(self, rows) -> None:
        run, _ = rows
        self.loses = True
        assert [message for _, message in run(only="case 3")] == ["case 3 bf16 is not timed: the profiler lost events"]

    def test_command(self, rows, monkeypatch, tmp_path, capsys) -> None:
        """What was measured is stored as it comes; a message makes the status 1."""
        device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
        monkeypatch.setattr(bench.jax, "devices", lambda: [device])
        for name, value in (("copy_tbps", 4.0), ("gemm_tflops", 800.0), ("fp8_gemm_tflops", None)):
            monkeypatch.setattr(timing, name, lambda value=value: value)
        monkeypatch.setattr(bench, "_versions", lambda: {"jax": "0.11.2"})
        stored, write = [], report.write
        monkeypatch.setattr(report, "write", lambda path, run, rows: (stored.append(len(rows)), write(path, run, rows)))
        options = ["bench", "--op", "merge_attn_states", "--store", str(tmp_path)]
        assert cli.main([*options, "--json", "--only", "case 1"]) == 0
        assert cli.main([*options, "--json"]) == 1
        assert "breaks failed" in capsys.readouterr().err and stored == [1, 1, 2, 3, 4]
        run, found = report.read(tmp_path / "h200" / "merge_attn_states.json")
        assert run.ceilings.fp8_gemm_tflops is None and len(found) == 4

    def test_only(self, rows) -> None:
        run, _ = rows
        assert [row.case for row, _ in run(only="case 3")] == ["case 3"]

    def test_resume(self, rows, monkeypatch, tmp_path, capsys) -> None:
        """Of a run of today the rest; of another day or version everything."""
        _, log = rows
        device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
        monkeypatch.setattr(bench.jax, "devices", lambda: [device])
        for name in ("copy_tbps", "gemm_tflops", "fp8_gemm_tflops"):
            monkeypatch.setattr(timing, name, lambda: 4.0)
        monkeypatch.setattr(bench, "_versions", lambda: {"jax": "0.11.2"})
        options = ["bench", "--op", "merge_attn_states", "--json", "--store", str(tmp_path)]
        assert cli.main([*options, "--only", "case 3"]) == 0
        monkeypatch.setattr(timing, "copy_tbps", lambda: 5.0)
        log.clear()
        cli.main([*options, "--resume"])
        run, found = report.read(tmp_path / "h200" / "merge_attn_states.json")
        assert [row.case for row in found] == [f"case {n}" for n in (3, 1, 2, 5)] and run.ceilings.copy_tbps == 4.0
        assert ("case 3", "right") not in log
        monkeypatch.setattr(bench, "_versions", lambda: {"jax": "0.12.0"})
        cli.main([*options, "--resume", "--only", "case 1"])
        run, found = report.read(tmp_path / "h200" / "merge_attn_states.json")
        assert [row.case for row in found] == ["case 1"] and run.ceilings.copy_tbps == 5.0
        assert cli.main(["bench", "--resume"]) == 2 and "--store" in capsys.readouterr().out


class TestParts:
    """The time of some kernels within another contender's calls."""

    CALLS = ("op", "other", "op")
    SEGMENTS = ([("table", 1.0), ("attend_1", 20.0), ("attend_2", 4.0)], [("attend_1", 9.0)], [("attend_1", 30.0)])

    def test_samples(self) -> None:
        of = lambda *facts: timing._samples(timing.Contender(*facts), self.CALLS, self.SEGMENTS)
        assert of("op", None) == ([25.0, 30.0], ["attend_1"])
        assert of("part", None, False, "op", ("attend",)) == ([24.0, 30.0], ["attend_1"])
        assert of("part", None, False, "op", ("attend_1", "table")) == ([21.0, 30.0], ["attend_1"])

    @pytest.mark.parametrize("facts", [("absent", None), ("part", None, False, "op", ("attend_2",))])
    def test_a_call_without_such_a_kernel(self, facts) -> None:
        with pytest.raises(RuntimeError, match="without a kernel"):
            timing._samples(timing.Contender(*facts), self.CALLS, self.SEGMENTS)


class TestRepository:
    def test_readme_says_what_is_stored(self, tmp_path) -> None:
        """A stale table fails; ``python -m jax_fp8attn.benchmarks.report --write README.md`` mends it."""
        text = (REPOSITORY / "README.md").read_text()
        assert text.count(report.BEGIN) == text.count(report.END) <= 1
        if report.BEGIN in text:
            copy = tmp_path / "README.md"
            copy.write_text(text)
            report.update_readme(copy)
            assert copy.read_text() == text

    @pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.name}")
    def test_stored_files(self, path) -> None:
        """memory.json holds peaks of memory, not times, and has its own fields."""
        if path.name == "memory.json" or "run" not in json.loads(path.read_text()):
            return
        run, rows = report.read(path)
        assert rows and {row.op for row in rows} == {path.stem}
        assert path == report.results_path(run.device, path.stem)
