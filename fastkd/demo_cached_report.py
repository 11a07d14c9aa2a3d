"""What the demo from a stored teacher leaves behind: a table, what it says in words, a picture, a JSON file."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from fastkd.demo_report import STYLE, Result, right_aligned
from fastkd.machine import line
from fastkd.sources import TAILS
from fastkd.terminal import write_json

COLOURS = dict(zip(TAILS, ("#1b6ca8", "#d1495b", "#8a5fb0", "#3a9d6e", "#e0803a")))
FLOOR = 1e-3  # nats: what is less is drawn here
MARKS = dict(zip(TAILS, "osD^v"))
ASKS = {  # what a loss wants to be outside of the top K
    "bucket": "the teacher's mass, spread as the student likes",
    "renormalize": "no mass",
    "renormalize_both": "anything: what is there has no part in it",
    "uniform": "the teacher's mass, spread evenly",
    "drop": "no mass, though it pulls less where the teacher has much",
}


def write(result: Result, folder: Path) -> None:
    """demo-cached.json and demo-cached.png into the folder, the table and what it says to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "demo-cached.png", folder / "demo-cached.json"
    draw(result, files[0])
    write_json(files[1], result)
    print_tables(result)
    print(
        f"\n{files[0]} and {files[1]} written, caches in {folder / 'teacher-cache'}; {result['seconds']:.0f} s in all"
    )


def print_tables(result: Result) -> None:
    """Both tables, what they say, and the machine."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    header, *rows = quality(result)
    table = Table(*header, title=f"{title(result)}: held-out KL in nats, top-1, mass outside of the top K")
    for row in rows:
        table.add_row(*row)
    console.print(right_aligned(table))
    table = Table("", *header[1:], title="what is stored of a token, and the loss from it")
    for row in costs(result):
        table.add_row(*row)
    console.print(right_aligned(table))
    for sentence in findings(result):
        console.print(sentence, markup=False, highlight=False)
    print(line(result["environment"]))


def markdown(result: Result) -> str:
    """The same for a document."""
    header, *rows = quality(result)
    rows = [[f"`{name}`" if name in TAILS else name, *cells] for name, *cells in rows]
    lines = [[f"{title(result)}: KL, top-1, mass outside", *header[1:]], ["---"] * len(header), *rows, *costs(result)]
    note = (
        "Held-out KL(teacher, student) in nats, top-1 agreement, the student's mass outside of the teacher's top K. "
        f"{result['tokens']['per_step']:,} tokens a step, vocabulary {result['vocabulary']:,}, {result['dtype']}; one "
        f"run each, from the same start on the same text. {line(result['environment'])}; {result['seconds']:.0f} s."
    )
    lowest, why, *tails = findings(result)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, lowest, why, "\n".join(tails), note])


def title(result: Result) -> str:
    """Which student of which teacher."""
    layers = result["layers"]
    return f"{len(layers['kept'])} of {layers['teacher']} layers, {result['settings']['steps']} steps"


def quality(result: Result) -> list[list[str]]:
    """A row a tail, the student without a cache, the one before, and the teacher; the first row is the header."""
    ks = list(result["runs"])

    def row(name: str, held_out: list[Result]) -> list[str]:
        cells = (f"{h['kl']:.3f}, {h['top1']:.0%}, {h['outside'][k]:.0%}" for k, h in zip(ks, held_out))
        return [name, *cells]

    return [
        ["", *(f"K = {k}" for k in ks)],
        *(row(tail, [result["runs"][k][tail]["held_out"] for k in ks]) for tail in TAILS),
        row("no cache", [result["dense"]["held_out"]] * len(ks)),
        row("before", [result["before"]] * len(ks)),
        row("the teacher's own", [result["teacher"]] * len(ks)),
    ]


def costs(result: Result) -> list[list[str]]:
    """Rows of bytes and milliseconds."""
    full = result["logits_bytes_per_token"]
    sizes = [bytes_per_token(cache) for cache in result["caches"].values()]
    errors = [cache["errors"]["kl"] for cache in result["caches"].values()]
    runs = [[ms for run in tails.values() for ms in run["loss_ms"]] for tails in result["runs"].values()]
    return [
        [f"bytes a token (bf16 logits: {full:,})", *(f"{size:,.0f}: 1/{full / size:,.0f}" for size in sizes)],
        ["KL(exact, stored in float16)", *(f"{error:.0e}" for error in errors)],
        [
            f"loss, both passes (no cache: {median(result['dense']['loss_ms']):.0f} ms)",
            *(f"{median(run):.0f} ms" for run in runs),
        ],
    ]


def bytes_per_token(cache: Result) -> float:
    """Of the files whole."""
    size: float = cache["file_bytes"] / cache["tokens"]
    return size


def ranked(result: Result, k: str) -> list[tuple[str, Result]]:
    """Tails and their held-out numbers at a K, the lowest KL first."""
    found = [(tail, run["held_out"]) for tail, run in result["runs"][k].items()]
    return sorted(found, key=lambda entry: float(entry[1]["kl"]))


def findings(result: Result) -> list[str]:
    """Which tail came out best at each K, and what each does with the rest at the smallest, a line each."""
    ks = list(result["runs"])
    best = {k: ranked(result, k) for k in ks}
    lowest = ", ".join(f"{best[k][0][0]} at K = {k} ({best[k][0][1]['kl']:.3f})" for k in ks)
    spread = ", ".join(f"{best[k][-1][1]['kl'] - best[k][0][1]['kl']:.3f} at K = {k}" for k in ks)
    k, teacher, dense = ks[0], result["teacher"], result["dense"]["held_out"]
    return [
        f"Lowest KL: {lowest}; without a cache {dense['kl']:.3f}. From the best tail to the worst it is {spread}.",
        f"Why: outside of the top {k} the teacher has {teacher['outside'][k]:.1%} of its mass, at an entropy of "
        f"{teacher['entropy']:.2f} nats, and the student without a cache {dense['outside'][k]:.1%}, at "
        f"{dense['entropy']:.2f}. The others, best first, and what each loss wants to be there:",
        *(f"- {tail}: {h['outside'][k]:.1%}, {h['entropy']:.2f} nats; {ASKS[tail]}" for tail, h in best[k]),
    ]


def draw(result: Result, file: Path) -> None:
    """Three panels: held-out KL and the mass outside of the top K, over K, and the bytes of a token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, 3, figsize=(13, 4.2), layout="constrained", gridspec_kw={"width_ratios": (1.5, 1.5, 1)}
        )
        draw_kl(panels[0], result)
        draw_outside(panels[1], result)
        draw_bytes(panels[2], result)
        figure.suptitle(f"From a stored top-K teacher: SmolLM2-135M, {title(result)}", fontsize=12)
        figure.supxlabel(line(result["environment"]), fontsize=8, color="0.4")
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def draw_kl(axes: Any, result: Result) -> None:
    """A line a tail, above the student without a cache."""
    dense = result["dense"]["held_out"]["kl"]
    draw_tails(axes, result, lambda held_out, k: max(held_out["kl"] - dense, FLOOR))
    axes.set(title=f"held-out KL, nats above the {dense:.3f} without a cache", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, loc="lower left")


def draw_outside(axes: Any, result: Result) -> None:
    """A line a tail, and where the teacher and the student without a cache are."""
    draw_tails(axes, result, lambda held_out, k: 100 * held_out["outside"][k])
    ks = list(result["runs"])
    for name, found, dashes in (("no cache", result["dense"]["held_out"], "--"), ("teacher", result["teacher"], ":")):
        masses = [100 * found["outside"][k] for k in ks]
        axes.plot(range(len(ks)), masses, color="0.2", linestyle=dashes, linewidth=1.4, label=name)
    axes.set(title="the student's mass outside of the teacher's top K, %", ylim=(0, None))
    axes.legend(frameon=False, handles=axes.lines[-2:])


def draw_tails(axes: Any, result: Result, value: Any) -> None:
    """value(held-out numbers, K) of each tail over K."""
    ks = list(result["runs"])
    for tail in TAILS:
        values = [value(result["runs"][k][tail]["held_out"], k) for k in ks]
        axes.plot(range(len(ks)), values, color=COLOURS[tail], marker=MARKS[tail], linewidth=1.6, label=tail)
    axes.set_xticks(range(len(ks)), [f"K = {k}" for k in ks])


def draw_bytes(axes: Any, result: Result) -> None:
    """Bytes a token of each cache and of full logits, each bar a power of ten."""
    sizes = {f"K = {k}": bytes_per_token(cache) for k, cache in result["caches"].items()}
    sizes["bf16\nlogits"] = result["logits_bytes_per_token"]
    drawn = axes.bar(range(len(sizes)), sizes.values(), color=["#1b6ca8"] * (len(sizes) - 1) + ["#b8bec9"], width=0.65)
    axes.bar_label(drawn, labels=[f"{size:,.0f}" for size in sizes.values()], padding=2)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(title="bytes a token", yscale="log", yticks=[])
    axes.minorticks_off()
    axes.spines["left"].set_visible(False)
