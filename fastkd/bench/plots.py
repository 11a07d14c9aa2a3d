"""Results as pictures: time against vocabulary, memory against tokens, and the ratio to the floor."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastkd.bench.report import Result, case_of
from fastkd.bench.work import WORKS
from fastkd.machine import line

DRAWN_FROM = "fastkd-result"  # key of the PNG's metadata that holds the digest of the result
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5}
# variant -> colour (distinct without red against green, too), line, marker
LOOKS: dict[str, tuple[str, str, str]] = {
    "fused": ("#1b6ca8", "-", "o"),
    "naive": ("#e0803a", "-", "s"),
    "naive fp32": ("#8c4a12", "--", "D"),
    "compiled": ("#7a5ba8", "-", "^"),
    "liger": ("#2a9d8f", "-", "v"),
    "liger eager": ("#8ac6bf", "--", "P"),
    "trl": ("#2a9d8f", "-", "v"),
    "gemms": ("#555b66", ":", "x"),
    "copy": ("#555b66", ":", "x"),
}
OTHERS = ("#c23b6f", "#b5a21d", "#4f7d2f", "#20496b", "#a0522d")


class NoMatplotlib(Exception):
    """The pictures cannot be drawn; the message says what to install."""


def digest(result: Result) -> str:
    """What a picture carries to tell which result it was drawn from."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:16]


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise NoMatplotlib("plots need matplotlib: pip install 'fastkd[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(result: Result, folder: Path, prefix: str = "") -> list[Path]:
    """Writes time.png, memory.png and floor.png, as far as there is something to show, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("time", time_figure), ("memory", memory_figure), ("floor", floor_figure)):
        drawn = figure(result)
        if drawn is not None:
            file = folder / f"{prefix}{name}.png"
            drawn.savefig(file, dpi=150, metadata={DRAWN_FROM: digest(result), "Software": None})
            pyplot().close(drawn)
            written.append(file)
    return written


def look(name: str) -> dict[str, Any]:
    """How a variant is drawn, everywhere the same."""
    if name in LOOKS:
        colour, style, marker = LOOKS[name]
    else:
        colour, style, marker = OTHERS[sum(map(ord, name)) % len(OTHERS)], "-.", "*"
    return {"color": colour, "linestyle": style, "marker": marker}


def milliseconds(entry: Result) -> float | None:
    """The median, where it was measured."""
    return entry["ms"]["median"] if entry["status"] == "measured" else None


def mebibytes(entry: Result) -> float | None:
    """The peak, where it was measured."""
    return entry["peak_bytes"] / 2**20 if entry.get("peak_bytes") else None


def time_figure(result: Result) -> Any:
    """Time against vocabulary, a panel for each work and dtype."""
    labels = "vocabulary", "time, forward and backward (topk: forward), ms"
    return _lines(result, "vocab", ("tokens", "hidden", "teacher_hidden"), milliseconds, "Time", labels)


def memory_figure(result: Result) -> Any:
    """Peak memory against tokens, a panel for each work and dtype."""
    labels = "tokens", "peak memory beside the inputs, MiB"
    return _lines(result, "tokens", ("vocab", "hidden", "teacher_hidden"), mebibytes, "Memory", labels)


def series(
    result: Result, along: str, fixed: Sequence[str]
) -> dict[tuple[str, str], tuple[dict[str, Any], list[Result]]]:
    """(work, dtype) -> the other sizes and the records, of those sizes with most points along one; then the largest."""
    groups: dict[tuple[str, str], dict[tuple[Any, ...], dict[int, Result]]] = defaultdict(lambda: defaultdict(dict))
    for record in result["cases"]:
        groups[record["work"], record["dtype"]][tuple(record[name] for name in fixed)][record[along]] = record
    found = {}
    for key, sizes in groups.items():
        best = max(sizes, key=lambda at: (len(sizes[at]), *(value or 0 for value in at)))
        found[key] = dict(zip(fixed, best)), [sizes[best][x] for x in sorted(sizes[best])]
    return found


def _lines(
    result: Result,
    along: str,
    fixed: Sequence[str],
    value: Callable[[Result], float | None],
    title: str,
    labels: tuple[str, str],
) -> Any:
    panels = series(result, along, fixed)
    names = list(dict.fromkeys(n for _, records in panels.values() for r in records for n in r["variants"]))
    shown = [n for n in names if any(value(r["variants"].get(n, NOTHING)) for _, rs in panels.values() for r in rs)]
    if not shown:
        return None
    figure, grid = _grid(len(panels), f"{title} against {labels[0]}", result)
    for axes, ((work, dtype), (sizes, records)) in zip(grid, panels.items()):
        for name in shown:
            points = [(r[along], value(r["variants"].get(name, NOTHING))) for r in records]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                floor = any(r["floor"] == name for r in records)
                axes.plot(*zip(*points), label=f"{name} (floor)" if floor else name, **look(name))
        at = ", ".join(f"{_word(k)} {v:,}" for k, v in sizes.items() if v is not None and k != "teacher_hidden")
        axes.set(title=f"{WORKS[work].summary}\n{dtype}, {at}", xlabel=labels[0], ylabel=labels[1])
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([r[along] for r in records], [f"{r[along]:,}" for r in records], rotation=30, ha="right")
        _plain(axes.yaxis)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    _legend(figure, grid)
    return figure


NOTHING: Result = {"status": "not reached"}


def floor_figure(result: Result) -> Any:
    """How many times the floor's time each variant takes, a line for each case."""
    records = [r for r in result["cases"] if any(e.get("to_floor") for e in r["variants"].values())]
    if not records:
        return None
    plt = pyplot()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 2.2 + 0.36 * len(records)), layout="constrained")
        for y, record in enumerate(records):
            for name, entry in record["variants"].items():
                if entry.get("to_floor") and name != record["floor"]:
                    axes.plot(entry["to_floor"], y, label=name, **{**look(name), "linestyle": "none"}, markersize=8)
        names = [str(case_of(r)) for r in records]
        axes.set_yticks(range(len(records)), [_broken(name) for name in names], fontsize=8.5)
        axes.set(
            xscale="log", ylim=(len(records) - 0.5, -0.5), xlabel="time over that of the floor: bare GEMMs, or a copy"
        )
        axes.axvline(1, color=LOOKS["gemms"][0], linestyle=":")
        low, high = axes.get_xlim()
        _plain(axes.xaxis, (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 3, 5))
        axes.grid(alpha=0.25)
        figure.suptitle("Ratio to the floor: 1 is as fast as the GEMMs alone, or as copying the bytes", fontsize=12)
        _foot(figure, result)
        _legend(figure, [axes])
    return figure


def _grid(count: int, title: str, result: Result) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, two in a row."""
    plt = pyplot()
    columns = min(count, 2)
    rows = -(-count // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(5.4 * columns + 1.2, 3.9 * rows + 0.8), layout="constrained"
        )
        found = [grid] if count == 1 else list(grid.flat)
        for axes in found[count:]:
            axes.set_axis_off()
        figure.suptitle(title, fontsize=12)
        _foot(figure, result)
    return figure, found[:count]


def _legend(figure: Any, panels: list[Any]) -> None:
    """One for all panels, beside them."""
    handles = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)


def _foot(figure: Any, result: Result) -> None:
    figure.supxlabel(line(result["machine"]), fontsize=8, color="0.4")


def _plain(axis: Any, ticks: tuple[float, ...] = (1, 2, 5)) -> None:
    """Numbers as they are read, at these places of each decade."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=ticks))
    axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _word(name: str) -> str:
    return {"vocab": "vocabulary"}.get(name, name)


def _broken(name: str) -> str:
    """In two lines, after the dtype."""
    head, _, tail = name.partition(", ")
    dtype, _, rest = tail.partition(", ")
    return f"{head}, {dtype}\n{rest}"
