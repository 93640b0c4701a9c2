"""What was measured: the file it is kept in, and the tables and plots made from it.

``python -m jax_fp8attn.benchmarks.report`` prints the table of README.md from the stored files; ``--write README.md``
puts it there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import numbers
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_fp8attn import dispatch
from jax_fp8attn.cli import show

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"

# op, case, variant: the rows of README.md, as far as they were measured
HEADLINES = (
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=8192", "fp8 causal"),
    ("mla_prefill", "DeepSeek-V3 TP1, T=8192", "fp8 causal"),
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=32768", "fp8 causal"),
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, 4 x T=4096", "fp8 causal"),
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=8192", "fp8 full"),
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=8192 S=32768", "fp8 full"),
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=8192", "fp8 causal from bf16"),
    ("mla_prefill", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=8192 S=40960", "fp8 causal in chunks"),
    ("merge_attn_states", "DeepSeek-V3 TP8, Kimi-K2 TP4, DeepSeek-V2-Lite TP1, T=4096", "fp8_tensor"),
    ("merge_attn_states", "DeepSeek-V3 TP1, T=4096", "fp8_tensor"),
    ("merge_attn_states", "DeepSeek-V3 TP1, T=4096", "bf16"),
    ("sparse_prefill", "H=64 top-512, T=4096 P=32768", "exact"),
    ("sparse_prefill", "H=128 top-2048, T=4096 P=32768", "exact"),
    ("sparse_prefill", "DeepSeek-V4-Flash TP1 CSA, 2 x T=2048 after 8192", "exact"),
    ("sparse_prefill", "DeepSeek-V4-Pro TP1 CSA, 2 x T=2048 after 8192", "exact"),
    ("sparse_prefill", "DeepSeek-V4-Flash TP4 CSA, T=4096 P=32768", "exact"),
    ("gdn_prefill", "Qwen3.5-397B TP8, 1 x 8192", "bf16"),
    ("gdn_prefill", "Qwen3.5-397B TP8, 1 x 131072", "bf16"),
    ("gdn_prefill", "Qwen3-Next TP1, 1 x 8192", "bf16"),
    ("gdn_prefill", "Qwen3.5-397B TP1, 4 x 8192", "bf16"),
    ("gdn_prefill", "Qwen3.5-397B TP8, 1 x 8192", "bf16 pool"),
)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured in the same run: a copy (bytes read and written), and matrix products."""

    copy_tbps: float
    bf16_gemm_tflops: float | None = None
    fp8_gemm_tflops: float | None = None

    def gemm_tflops(self, variant: str) -> float | None:
        return self.fp8_gemm_tflops if variant.startswith("fp8") else self.bf16_gemm_tflops


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and when. ``versions`` may hold the driver and the clocks, too."""

    device: str
    date: str
    versions: dict[str, str]
    ceilings: Ceilings
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one case. ``spread_us`` is the interquartile range; ``dispatch_us`` what a call from
    Python takes beyond the kernels."""

    op: str
    case: str
    shape: dict[str, int]
    implementation: str
    variant: str
    is_peer: bool
    time_us: float
    spread_us: float
    bytes: int
    flops: int
    error: float
    error_bound: float
    dispatch_us: float | None = None

    @property
    def tbps(self) -> float:
        return self.bytes / self.time_us * 1e-6

    @property
    def tflops(self) -> float:
        return self.flops / self.time_us * 1e-6

    def floors_us(self, ceilings: Ceilings) -> tuple[float, float]:
        """The least time that the bytes and that the arithmetic take; a ceiling that was not measured gives 0."""
        gemm = ceilings.gemm_tflops(self.variant)
        return self.bytes / ceilings.copy_tbps * 1e-6, self.flops / gemm * 1e-6 if gemm else 0.0

    def roofline(self, ceilings: Ceilings) -> float:
        """The fraction of the roofline: the larger floor over the measured time."""
        return max(self.floors_us(ceilings)) / self.time_us

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.case, self.variant, self.implementation


_NUMBERS = ("time_us", "spread_us", "bytes", "flops", "error", "error_bound")


def write(path: Path | str, run: Run, rows: Sequence[Row]) -> None:
    """Stores a run: one row a line, fields in fixed order, numbers to four digits. Raises ValueError for a row that
    failed its gate, has no finite time, or is there twice."""
    _check(run, rows)
    data = as_json(run, rows)
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in data["rows"])
    head = json.dumps(data["run"], indent=1, allow_nan=False).replace("\n", "\n ")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "run": {head},\n "rows": [\n{lines}\n ]\n}}\n')


def as_json(run: Run, rows: Sequence[Row]) -> dict[str, Any]:
    """What ``write`` stores, as one object."""
    return {"run": _plain(run), "rows": [_plain(row) for row in rows]}


def read(path: Path | str) -> tuple[Run, list[Row]]:
    """What ``write`` stored, held to the same rules; raises ValueError for fields that it does not know."""
    try:
        data = json.loads(Path(path).read_text())
        _fields(data, {"run", "rows"}, {"run", "rows"}, "the file")
        run = _build(Run, data["run"], "run")
        run = dataclasses.replace(run, ceilings=_build(Ceilings, run.ceilings, "ceilings"))
        rows = [_build(Row, row, f"row {number}") for number, row in enumerate(data["rows"], 1)]
        _check(run, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return run, rows


def slug(device: str) -> str:
    """The folder of a device: "NVIDIA H200" lies in h200."""
    name = device.lower()
    model = re.search(r"\b[a-z]{1,2}\d{2,}[a-z]*\b", name)
    return model.group() if model else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def results_path(device: str, op: str, results: Path = RESULTS) -> Path:
    return results / slug(device) / f"{op}.json"


def _build(cls: type, data: Any, where: str) -> Any:
    fields = dataclasses.fields(cls)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    _fields(data, {field.name for field in fields}, required, where)
    return cls(**data)


def _fields(data: Any, known: set[str], required: set[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    if unknown := sorted(data.keys() - known):
        raise ValueError(f"{where}: unknown fields {', '.join(unknown)}")
    if missing := sorted(required - data.keys()):
        raise ValueError(f"{where}: fields {', '.join(missing)} are missing")


def _check(run: Run, rows: Sequence[Row]) -> None:
    texts = {"device": run.device, "date": run.date, **run.versions}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise ValueError(f"run: {', '.join(wrong)} must be text")
    datetime.date.fromisoformat(run.date)
    for field in dataclasses.fields(Ceilings):
        value = getattr(run.ceilings, field.name)
        if not (_finite(value) and value > 0) and (value is not None or field.name == "copy_tbps"):
            raise ValueError(f"ceiling {field.name}: expected a finite positive number, got {value!r}")
    seen = set()
    for row in rows:
        if reason := _refused(row):
            raise ValueError(f"{' / '.join(row.key)}: {reason}")
        if row.key in seen:
            raise ValueError(f"{' / '.join(row.key)}: is there twice")
        seen.add(row.key)


def _refused(row: Row) -> str:
    """Why a row must not be stored; empty if it may."""
    if not _finite(row.time_us) or row.time_us <= 0:
        return f"time_us is {row.time_us!r}: expected a finite positive number"
    for name in (*_NUMBERS, "dispatch_us"):
        value = getattr(row, name)
        if name == "dispatch_us" and value is None:
            continue
        if not _finite(value) or value < 0:
            return f"{name} is {value!r}: expected a finite number, at least 0"
    if row.error > row.error_bound:
        return f"error {row.error:.3g} exceeds its bound {row.error_bound:.3g}: no time is stored for a failed gate"
    if row.bytes == 0:
        return "bytes is 0: a call reads and writes something"
    return ""


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """Nothing but JSON's own types, floats to four digits; optional fields that are None are left out."""
    if dataclasses.is_dataclass(value):
        optional = {field.name for field in dataclasses.fields(value) if field.name in ("commit", "dispatch_us")}
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(x) for name, x in pairs if x is not None or name not in optional}
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if value is None or isinstance(value, str | bool):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(f"{value:.4g}")


HEAD = ("case", "variant", "implementation", "us", "spread", "rate", "roofline", "error", "bound", "against peer")
_LEFT = 3  # columns of words


def fastest_peer(rows: Sequence[Row], row: Row) -> Row | None:
    """The fastest peer on the same case and variant; "x kernel" beside "x" is a part of it."""
    peers = {other.implementation: other for other in rows if other.is_peer and other.key[:3] == row.key[:3]}
    whole = [peer for name, peer in peers.items() if name not in {f"{other} kernel" for other in peers}]
    return min(whole, key=lambda peer: peer.time_us, default=None)


def ratio(rows: Sequence[Row], row: Row) -> float | None:
    """How many times faster than the fastest peer; below 1: slower."""
    peer = fastest_peer(rows, row)
    return peer.time_us / row.time_us if peer else None


def table(run: Run, rows: Sequence[Row]) -> str:
    """A line for each case and implementation, in plain text."""
    cells = _cells(run, rows)
    widths = [max(len(line[i]) for line in [HEAD, *cells]) for i in range(len(HEAD))]
    aligned = [[cell if i < _LEFT else cell.rjust(widths[i]) for i, cell in enumerate(line)] for line in [HEAD, *cells]]
    return f"{_headline(run, rows)}\n\n{show.table(aligned[0], aligned[1:])}"


def print_table(run: Run, rows: Sequence[Row]) -> None:
    """The table on standard output: in colour on a terminal if rich is there, else plain."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(table(run, rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=_headline(run, rows), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, name in enumerate(HEAD):
        drawn.add_column(name, justify="left" if i < _LEFT else "right", no_wrap=i >= _LEFT)
    for i, (row, cells) in enumerate(zip(rows, _cells(run, rows), strict=True)):
        gain = ratio(rows, row)
        colour = "dim" if row.is_peer else "" if gain is None else "green" if gain >= 1 else "red"
        following = rows[i + 1] if i + 1 < len(rows) else row
        drawn.add_row(*cells, style=colour, end_section=following.key[:3] != row.key[:3])
    Console().print(drawn)


def _headline(run: Run, rows: Sequence[Row]) -> str:
    known = [f"copy {run.ceilings.copy_tbps:.3g} TB/s"]
    for name, value in (("bf16", run.ceilings.bf16_gemm_tflops), ("FP8", run.ceilings.fp8_gemm_tflops)):
        known += [f"{name} GEMM {value:.4g} TFLOP/s"] if value else []
    ops = ", ".join(dict.fromkeys(row.op for row in rows))
    return f"{ops} on {run.device}, {run.date} ({', '.join(known)})"


def _cells(run: Run, rows: Sequence[Row]) -> list[list[str]]:
    return [
        [
            row.case,
            row.variant,
            f"{row.implementation} (peer)" if row.is_peer else row.implementation,
            _digits(row.time_us),
            _digits(row.spread_us, 2),
            _rate(row, run.ceilings),
            f"{row.roofline(run.ceilings):.0%}",
            f"{row.error:.2g}",
            f"{row.error_bound:.2g}",
            "-" if (gain := ratio(rows, row)) is None else f"{gain:.2f}x",
        ]
        for row in rows
    ]


def _digits(value: float, digits: int = 4) -> str:
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:g}"


def _compute_bound(row: Row, ceilings: Ceilings) -> bool:
    memory, arithmetic = row.floors_us(ceilings)
    return arithmetic > memory


def _rate(row: Row, ceilings: Ceilings) -> str:
    if _compute_bound(row, ceilings):
        return f"{_digits(row.tflops, 3)} TFLOP/s"
    return f"{row.tbps:.2f} TB/s" if row.tbps >= 0.1 else f"{_digits(row.tbps * 1e3, 3)} GB/s"


_COLOURS = {
    False: ("#0072B2", "#009E73", "#56B4E9", "#004B6B"),
    True: ("#D55E00", "#CC79A7", "#E69F00", "#7F7F7F", "#8C564B", "#B8A200"),
}
_PANELS_A_LINE = 3


def plot(run: Run, rows: Sequence[Row], path: Path | str) -> None:
    """Achieved rate against size with the roofline, a panel for each op and variant; PNG or SVG by the suffix."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"plot: expected a path that ends in .png or .svg, got {path.name}")
    if not rows:
        raise ValueError("plot: there are no rows")
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("plot needs matplotlib: pip install 'jax_fp8attn[bench]'", name="matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = dict.fromkeys((row.op, row.variant) for row in rows)
    columns = 2 if len(groups) == 4 else min(_PANELS_A_LINE, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.4 * columns + 2.4, 3.5 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    styles = _styles(rows)
    drawn: dict[str, Any] = {}
    several = len({row.op for row in rows}) > 1
    for panel, (op, variant) in zip(panels, groups, strict=False):
        inside = [row for row in rows if (row.op, row.variant) == (op, variant)]
        drawn |= _panel(panel, run, inside, styles)
        panel.set_title(f"{op}, {variant}" if several else variant, fontsize=10)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    ops = ", ".join(dict.fromkeys(row.op for row in rows))
    figure.suptitle(f"{ops} on {run.device}, {run.date}", fontsize=12)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "jax_fp8attn"}):
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """A colour for each implementation, the same in every panel; peers dashed with open markers."""
    styles = {}
    for is_peer, colours in _COLOURS.items():
        names = sorted({row.implementation for row in rows if row.is_peer == is_peer})
        for i, name in enumerate(names):
            shape = {"linestyle": "--", "marker": "s"} if is_peer else {"linestyle": "-", "marker": "o"}
            styles[name] = {"color": colours[i % len(colours)], "markersize": 4, "linewidth": 1.5, **shape}
            styles[name]["markerfacecolor"] = "white" if is_peer else colours[i % len(colours)]
    return styles


def _panel(panel: Any, run: Run, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One op and variant; returns what the legend shows."""
    compute = sum(_compute_bound(row, run.ceilings) for row in rows) * 2 > len(rows)
    unit = 1e9 if compute else 1e6

    def size(row: Row) -> float:
        return (row.flops if compute else row.bytes) / unit

    def rate(row: Row) -> float:
        return row.tflops if compute else row.tbps

    drawn = {}
    rows = [row for row in rows if rate(row) > 0]
    sizes, roof = _curve([(size(row), rate(row) / row.roofline(run.ceilings)) for row in rows])
    (drawn["roofline"],) = panel.plot(
        [sizes[0] / 2, *sizes, sizes[-1] * 2], [roof[0], *roof, roof[-1]], color="black", linewidth=1, linestyle=":"
    )
    for name in sorted({row.implementation for row in rows}, key=lambda n: (styles[n]["linestyle"] == "--", n)):
        own = [row for row in rows if row.implementation == name]
        label = f"{name} (peer)" if own[0].is_peer else name
        (drawn[label],) = panel.plot(*_curve([(size(row), rate(row)) for row in own]), **styles[name])
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(sizes[0] / 3.2, sizes[-1] * 3.2)  # a power of ten lies inside, whatever the sizes
    panel.set_ylim(min(*map(rate, rows), max(roof) / 10) / 1.4, max(*roof, *map(rate, rows)) * 1.4)
    panel.set_xlabel("arithmetic of the call [GFLOP]" if compute else "bytes read and written [MB]", fontsize=9)
    panel.set_ylabel("achieved [TFLOP/s]" if compute else "achieved [TB/s]", fontsize=9)
    panel.grid(which="major", color="#DDDDDD", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter("")
    return drawn


def _curve(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Sizes in order with their rates; cases of equal size become one point, at the geometric mean."""
    rates: dict[float, list[float]] = {}
    for size, rate in points:
        rates.setdefault(float(f"{size:.2g}"), []).append(rate)
    sizes = sorted(rates)
    return sizes, [statistics.geometric_mean(rates[size]) for size in sizes]


def readme_table(results: Path | str = RESULTS) -> str:
    """The headline cases as Markdown, for every device that has them."""
    lines = []
    for op in dict.fromkeys(op for op, _, _ in HEADLINES):
        for path in sorted(Path(results).glob(f"*/{op}.json")):
            run, rows = read(path)
            link = f"[{run.device}](benchmarks/results/{path.parent.name}/{path.name})"
            wanted = [headline for headline in HEADLINES if headline[0] == op]
            lines += [line for headline in wanted if (line := _readme_line(headline, run, rows, link))]
    if not lines:
        return "Nothing is measured yet."
    head = ("op", "case", "ours", "of the roofline", "fastest peer", "against it", "measured on")
    rule = ["---"] * 2 + ["--:"] * 4 + ["---"]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def _readme_line(headline: tuple[str, str, str], run: Run, rows: Sequence[Row], link: str) -> list[str] | None:
    """Of the whole op by an implementation that a caller can name, not of a part of it."""
    op, case, variant = headline
    named = lambda row: row.implementation in dispatch.NAMES and not row.is_peer  # a peer may have such a name, too
    ours = [row for row in rows if row.key[:3] == (op, case, variant) and named(row)]
    if not ours:
        return None
    best = min(ours, key=lambda row: row.time_us)
    peer = fastest_peer(rows, best)
    return [
        f"`{op}`",
        f"{case}, {variant}",
        f"{_digits(best.time_us)} us, {_rate(best, run.ceilings)} (`{best.implementation}`)",
        f"{best.roofline(run.ceilings):.0%}",
        f"{_digits(peer.time_us)} us ({peer.implementation})" if peer else "-",
        f"{ratio(rows, best):.2f}x" if peer else "-",
        f"{link}, {run.date}",
    ]


def update_readme(path: Path | str, results: Path | str = RESULTS) -> bool:
    """Replaces what stands between the two markers; says whether anything changed."""
    path = Path(path)
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected {BEGIN} once, and {END} once after it")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{readme_table(results)}\n{END}{after}"
    if new != text:
        path.write_text(new)
    return new != text


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of README.md, or writes it; draws the plots."""
    parser = argparse.ArgumentParser(prog="python -m jax_fp8attn.benchmarks.report", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the stored files")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    parser.add_argument("--plots", action="store_true", help="draw every stored file into an SVG beside it")
    options = parser.parse_args(arguments)
    if options.plots:
        for path in sorted(options.results.glob("*/*.json")):
            if path.parent.name != "cpu":
                plot(*read(path), path.with_suffix(".svg"))
                print(path.with_suffix(".svg"))
    elif options.write is None:
        print(readme_table(options.results))
    else:
        changed = update_readme(options.write, options.results)
        print(f"{options.write}: {'written' if changed else 'up to date'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
