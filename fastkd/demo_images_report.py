"""What the demo in pictures leaves behind: a picture, two tables, one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastkd.demo_report import NOT_MEASURED, STYLE, right_aligned, times
from fastkd.machine import line
from fastkd.terminal import size

Result = dict[str, Any]


def write(result: Result, shown: list[Tensor], folder: Path) -> None:
    """images.json and images.png into the folder, tables to the terminal."""
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "images.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, shown, folder / "images.png")
    console = Console()
    console.print(quality_table(result))
    console.print(cost_table(result))
    print(line(result["environment"]))
    print(f"\n{folder / 'images.png'} and {folder / 'images.json'} written; {result['seconds']:.0f} s in all")


def name_of(row: Result) -> str:
    """Who, in how many steps."""
    return f"{row['name']}, {row['steps']} step{'s' if row['steps'] > 1 else ''}"


def quality_table(result: Result) -> Any:
    """What samples are worth, by who made them and in how many steps."""
    from rich.table import Table

    table = Table("", "accuracy", "distance", title=f"what a classifier says of {result['samples']:,} samples")
    for row in result["rows"]:
        table.add_row(name_of(row), *marks(row))
    return right_aligned(table)


def marks(row: Result) -> tuple[str, str]:
    """Accuracy and distance."""
    return f"{row['accuracy']:.1%}", f"{row['distance']:.1f}"


def cost_table(result: Result) -> Any:
    """Milliseconds and bytes of a training step, with fastkd's attention and with torch's math path."""
    from rich.table import Table

    table = Table("tokens", "pictures", "fastkd", "math path", "faster", "fastkd", "math path", title="a step of sCM")
    for row in result["costs"]:
        table.add_row(*costs(row))
    return right_aligned(table)


def costs(row: Result) -> tuple[str, ...]:
    """The cells of a row of costs."""
    ways = row["fastkd"], row["math"]
    spent = [way["ms"] for way in ways]
    taken = [NOT_MEASURED if way["peak_bytes"] is None else size(way["peak_bytes"]) for way in ways]
    return f"{row['tokens']:,}", f"{row['pictures']}", *(f"{ms:.0f} ms" for ms in spent), times(*spent), *taken


def markdown(result: Result) -> str:
    """Both tables, for a document."""
    lines = ["| | accuracy | distance |", "|---|---:|---:|"]
    lines += [f"| {name_of(row)} | {' | '.join(marks(row))} |" for row in result["rows"]]
    heads = "tokens", "pictures", "`fastkd`", "math path", "faster", "peak, `fastkd`", "peak, math path"
    lines += ["", f"| {' | '.join(heads)} |", "|---:" * len(heads) + "|"]
    lines += [f"| {' | '.join(costs(row))} |" for row in result["costs"]]
    s, spent = result["settings"], ", ".join(f"{name} {t:.0f} s" for name, t in result["seconds_of"].items())
    note = (
        f"{line(result['environment'])}. {result['parameters']:,} parameters, batches of {s['batch']}, {s['steps']} "
        f"steps of each student, training: {spent}; {result['seconds']:.0f} s in all. Of {result['samples']:,} "
        f"samples a classifier ({result['judge_accuracy']:.1%} right on digits it has not seen) sees the digit that "
        "was asked for in this share; distance is Frechet's between its features of them and of all 1,797 digits."
    )
    return "\n".join([*lines, "", note])


def draw(result: Result, shown: list[Tensor], file: Path) -> None:
    """A row of samples for each way, from the same noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(len(shown), 1, figsize=(13, 0.72 * len(shown) + 0.8), layout="constrained")
        for axes, row, pictures in zip(panels, result["rows"], shown, strict=True):
            strip = F.pad(pictures, (1, 1), value=-1.0).permute(1, 0, 2).flatten(1).numpy()
            axes.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            accuracy, apart = marks(row)
            label = f"{name_of(row)}\n{accuracy}, distance {apart}"
            axes.set_ylabel(label, rotation=0, ha="right", va="center", linespacing=1.4)
        figure.suptitle("Digits from the same noise: the teacher's flow, students of one and two steps", fontsize=12)
        figure.supxlabel(line(result["environment"]), fontsize=8, color="0.4")
        figure.savefig(file, dpi=110)
        pyplot.close(figure)
