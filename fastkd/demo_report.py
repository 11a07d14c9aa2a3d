"""What the demo leaves behind: two tables, one picture, one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from fastkd.machine import line

Result = dict[str, Any]
LABELS = {"fused": "fastkd.kd_loss", "naive": "F.kl_div"}
COLOURS = {"before": "#b8bec9", "fused": "#1b6ca8", "naive": "#e0803a"}
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5}
NOT_MEASURED = "not measured"  # the peak memory, on systems without a high-water mark that can be reset


def write(result: Result, folder: Path) -> None:
    """demo.json and demo.png into the folder, tables to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, folder / "demo.png")
    print_tables(result)
    print(f"\n{folder / 'demo.png'} and {folder / 'demo.json'} written; {result['seconds']:.0f} s in all")


def print_tables(result: Result) -> None:
    """How good the student became, what the loss cost, and on which machine."""
    from rich.console import Console

    console = Console()
    console.print(quality_table(result))
    console.print(cost_table(result))
    difference = result["relative_difference"]
    if difference is not None:
        first, largest = difference["first"], difference["largest"]
        print(f"The losses differ by {first:.1e} of their value at the first step, from equal weights, and by at most")
        print(f"{largest:.1e} at any step, as {result['dtype']} rounding feeds back through training.")
    print(line(result["environment"]))


def quality_table(result: Result) -> Any:
    """Held-out numbers before and after, per run."""
    from rich.table import Table

    layers, runs = result["layers"], result["runs"]
    title = f"{layers['teacher']} layers to {len(layers['kept'])}, on {result['tokens']['held_out']} held-out tokens"
    table = Table("", "before", *(f"after {name}" for name in runs), "teacher", title=title)
    columns = [result["before"], *(run["held_out"] for run in runs.values())]
    table.add_row("KL(teacher || student), nats", *(f"{c['kl']:.3f}" for c in columns), "0")
    table.add_row("top-1 agreement", *(f"{c['top1']:.1%}" for c in columns), "100%")
    teacher = f"{result['before']['teacher_perplexity']:.1f}"
    table.add_row("perplexity", *(f"{c['perplexity']:.1f}" for c in columns), teacher)
    return right_aligned(table)


def cost_table(result: Result) -> Any:
    """Milliseconds and bytes of the loss, per run, and how many times less the first takes."""
    from rich.table import Table

    runs = result["runs"].values()
    title = f"{result['tokens']['per_step']} tokens x {result['vocabulary']} words in {result['dtype']}, median step"
    ratio = ("naive : fused",) if len(runs) == 2 else ()
    table = Table("", *(LABELS[name] for name in result["runs"]), *ratio, title=title)
    for name, values, form in (
        ("loss, forward + backward", [median(run["loss_ms"]) for run in runs], "{:.0f} ms"),
        ("whole step", [median(run["step_ms"]) for run in runs], "{:.0f} ms"),
        ("peak extra memory of the loss", [megabytes(run["peak_extra_bytes"]) for run in runs], "{:.0f} MiB"),
        ("of which dH and dW", [megabytes(result["gradient_bytes"]) for _ in runs], "{:.0f} MiB"),
    ):
        cells = [NOT_MEASURED if value is None else form.format(value) for value in values]
        table.add_row(name, *cells, *(times(*values) for _ in ratio))
    return right_aligned(table)


def right_aligned(table: Any) -> Any:
    """The same table with its numbers under each other."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def megabytes(count: int | None) -> float | None:
    """Bytes in units of 2^20, None as None."""
    return None if count is None else count / 2**20


def times(fused: float | None, naive: float | None) -> str:
    """How many times the fused number goes into the naive one."""
    return f"{naive / fused:.1f} x" if fused and naive else ""


def draw(result: Result, file: Path) -> None:
    """Five panels in a row: loss curves, KL and top-1 on held-out text, time and memory of the loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        widths = {"width_ratios": (2.6, 1.1, 1.1, 1, 1)}
        figure, panels = pyplot.subplots(1, 5, figsize=(13, 3.9), layout="constrained", gridspec_kw=widths)
        figure.get_layout_engine().set(wspace=0.05)
        draw_curves(panels[0], result)
        draw_quality(panels[1:3], result)
        draw_costs(panels[3:], result)
        layers = result["layers"]
        figure.suptitle(
            f"SmolLM2-135M distilled from {layers['teacher']} to {len(layers['kept'])} layers, "
            f"{result['tokens']['per_step']} tokens a step: [hidden, head] in, KL and gradients out",
            fontsize=12,
        )
        figure.supxlabel(line(result["environment"]), fontsize=8, color="0.4")
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def draw_curves(axes: Any, result: Result) -> None:
    """Training loss of both runs over each other."""
    runs = result["runs"]
    looks = {"naive": {"linewidth": 6, "alpha": 0.45}, "fused": {"linewidth": 1.6}}
    for name in sorted(runs, reverse=True):  # the wide line first, the thin one on top
        steps = range(1, len(runs[name]["loss"]) + 1)
        axes.plot(steps, runs[name]["loss"], color=COLOURS[name], label=LABELS[name], **looks[name])
    axes.set(title="training loss: KL(teacher || student), nats/token", xlabel="step", ylim=(0, None))
    axes.legend(frameon=False)
    difference = result["relative_difference"]
    if difference is not None:
        note = f"relative difference: {difference['first']:.0e} at first, {difference['largest']:.0e} at most"
        axes.text(0.03, 0.05, note, transform=axes.transAxes, color="0.35")


def draw_quality(panels: Any, result: Result) -> None:
    """Held-out KL and top-1 agreement before and after."""
    before, after = result["before"], result["runs"]["fused"]["held_out"]
    names, colours = ("before", "after"), (COLOURS["before"], COLOURS["fused"])
    bars(panels[0], "held-out KL\nnats/token", names, (before["kl"], after["kl"]), colours, "{:.2f}")
    shares = 100 * before["top1"], 100 * after["top1"]
    bars(panels[1], "top-1 agreement\nwith the teacher", names, shares, colours, "{:.0f}%")


def draw_costs(panels: Any, result: Result) -> None:
    """Time and peak extra memory of the loss alone."""
    runs = result["runs"]
    names = [LABELS[name].replace("fastkd.", "fastkd.\n") for name in runs]
    colours = [COLOURS[name] for name in runs]
    bars(panels[0], "loss, fwd + bwd\nms", names, [median(run["loss_ms"]) for run in runs.values()], colours, "{:.0f}")
    memory = [megabytes(run["peak_extra_bytes"]) for run in runs.values()]
    if None in memory:
        panels[1].set_axis_off()
        panels[1].text(0.5, 0.5, f"memory\n{NOT_MEASURED}", ha="center", transform=panels[1].transAxes)
    else:
        bars(panels[1], "peak extra memory\nof the loss, MiB", names, memory, colours, "{:.0f}")


def bars(axes: Any, title: str, names: Any, values: Any, colours: Any, form: str) -> None:
    """One bar a name, its value on top."""
    drawn = axes.bar(range(len(names)), values, color=colours, width=0.65)
    axes.bar_label(drawn, labels=[form.format(value) for value in values], padding=2)
    axes.set_xticks(range(len(names)), names)
    axes.set(title=title, yticks=[])
    axes.spines["left"].set_visible(False)
    axes.margins(y=0.12)
