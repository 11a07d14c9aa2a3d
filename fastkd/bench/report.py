"""Results as tables, for the terminal and in markdown."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd.bench.work import WORKS, Case
from fastkd.machine import line
from fastkd.terminal import size

Result = dict[str, Any]

COLUMNS = ("time", "spread", "peak", "vs naive", "vs fp32", "vs compiled", "to floor", "loss error", "grad error")
LEGEND = (
    "Forward and backward (topk: forward). time: median of the rounds, in which the variants take turns; spread: "
    "interquartile range over median. peak: memory beside the inputs, gradients included, each variant in a process of "
    "its own. vs: how many times faster than plain PyTorch in the inputs' dtype (naive), with logits cast to float32 "
    "(fp32), and than torch.compile of naive. to floor: time over that of the bare GEMMs (gemms), or of a copy that "
    "moves the bytes that must move (copy). Errors are relative, against float64; grad: the largest of the gradients', "
    "by the 2-norm."
)


def case_of(record: Result) -> Case:
    """The case of a record; what it does not say is as by default."""
    return Case(**{name: record[name] for name in Case.__dataclass_fields__ if name in record})


def milliseconds(value: float) -> str:
    """Three digits or all before the point; seconds from 10 on."""
    if value >= 10_000:
        return f"{value / 1000:.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def cells(entry: Result) -> list[str]:
    """One variant's row, without its name."""
    if entry["status"] == "measured":
        ms, faster, floor = entry["ms"], entry["faster_than"], entry["to_floor"]
        first = [milliseconds(ms["median"]), f"{ms['iqr'] / ms['median']:.0%}"]
        ratios = [f"{faster[base]:.2f}x" if base in faster else "" for base in ("naive", "naive fp32", "compiled")]
        ratios.append(f"{floor:.2f}x" if floor else "")
    else:
        first, ratios = [entry["status"], ""], [""] * 4
    peak = entry.get("peak_bytes")
    found = entry.get("errors", {})
    numbers = [found.get("loss")], [error for name, error in found.items() if name != "loss"]
    shown = [_largest(errors) if found and errors else "" for errors in numbers]
    return [first[0], first[1], "" if peak is None else size(peak), *ratios, *shown]


def _largest(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{max(known):.1e}" if len(known) == len(errors) else "not finite"


def reasons(record: Result) -> list[str]:
    """Why some variants have no time."""
    return [
        f"{name} {entry['status']}: {entry['reason']}"
        for name, entry in record["variants"].items()
        if "reason" in entry
    ]


def where_compared(record: Result) -> str | None:
    """The smaller size of the comparison, if it was smaller."""
    at = record.get("compared_at")
    if at is None or all(record[name] == value for name, value in at.items()):
        return None
    sizes = [f"{name.replace('_', ' ')} {value:,}" for name, value in at.items() if value is not None]
    return f"compared with float64 at {', '.join(sizes)}"


def show(result: Result, console: Console) -> None:
    """All tables, for people."""
    for record in result["cases"]:
        table = Table("", *(c.replace(" ", "\n") for c in COLUMNS), title=str(case_of(record)), title_justify="left")
        table.box, table.padding = box.SIMPLE_HEAD, (0, 0)
        table.columns[0].no_wrap = True
        for column in table.columns[1:]:
            column.justify = "right"
        for name, entry in record["variants"].items():
            table.add_row(name, *cells(entry))
        console.print(table)
        for note in (*reasons(record), where_compared(record)):
            if note:
                console.print(escape(note), highlight=False)
    for note in notes(result):
        console.print(escape(note), highlight=False, style="dim")


def notes(result: Result) -> list[str]:
    """What holds for all tables."""
    left = [] if result["complete"] else ["Interrupted: what was measured until then."]
    return [*left, *result["skipped"], LEGEND, line(result["machine"])]


def markdown(result: Result) -> str:
    """One table for each piece of work."""
    text = []
    for name, records in groupby(result["cases"], key=lambda record: record["work"]):
        text += [f"**`{WORKS[name].summary}`**", "", f"| shape | variant | {' | '.join(COLUMNS)} |"]
        text.append("|---|---" + "|---:" * len(COLUMNS) + "|")
        beside = []
        for record in records:
            shape = str(case_of(record)).removeprefix(f"{name}, ")
            for variant, entry in record["variants"].items():
                text.append(f"| {shape} | {variant} | {' | '.join(cells(entry))} |")
                shape = ""
            found = [*reasons(record), where_compared(record)]
            beside += [f"- {case_of(record)}: {note}" for note in found if note]
        text += ["", *beside, *([""] if beside else [])]
    return "\n".join([*text, "\n\n".join(notes(result)).replace("|", "\\|")])
