"""Renews every table and plot of the documents from the stored results: python bench/docs.py

results/cpu-goals.json    bench/goals.py --only dense           README.md, goals
results/sparse-goals.json bench/goals.py --only sparse          README.md, sparse
results/attention-goals.json     bench/goals.py --only attention   README.md, attention
results/few-step.json     bench/goals.py --only few-step        README.md, few-step; bench/README.md, few-step-losses
results/attention-accuracy.json  bench/attention_accuracy.py       bench/README.md, attention-accuracy
results/cache.json        bench/cache.py                        README.md, sparse
results/demo*.json        copies of what `make demo` writes     README.md, demo and the blocks named so
results/pointwise.json    bench/pointwise.py                    bench/README.md, pointwise
results/cpu-grid.json     fastkd bench --json                   bench/README.md, grid and plots
results/nvidia-*.json     bench/gpu.py, a file for each GPU     bench/README.md, gpu
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_report
import few_step_report
import gpu_report

from fastkd import demo_cached_report, demo_images_report, demo_on_policy
from fastkd.bench import plots, report
from fastkd.machine import line

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
GOALS, DEMO, GRID = RESULTS / "cpu-goals.json", RESULTS / "demo.json", RESULTS / "cpu-grid.json"
SPARSE, CACHE = RESULTS / "sparse-goals.json", RESULTS / "cache.json"
POINTWISE = RESULTS / "pointwise.json"
ATTENTION, ACCURACY = RESULTS / "attention-goals.json", RESULTS / "attention-accuracy.json"
FEW_STEP = RESULTS / "few-step.json"
PLOTS = "cpu-grid-"  # what the names of the grid's plots begin with

Result = dict[str, Any]


def ms(entry: Result) -> str:
    return report.milliseconds(entry["ms"]["median"])


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def faster(entry: Result, base: str) -> str:
    return f"{entry['faster_than'][base]:.2f} x"


def shape(r: Result) -> str:
    hidden = "" if r["hidden"] is None else f", D {r['hidden']:,}"
    listed = f", K {r['top_k']:,}" if r.get("top_k") else ""
    return f"N {r['tokens']:,}{hidden}, V {r['vocab']:,}{listed}"


def goals_table(r: Result) -> str:
    """The goals as a markdown table."""
    cases = r["cases"]
    lines = ["| work, forward and backward | measured | goal |", "|---|---|---|"]
    lines += heads_lines(cases["heads bf16"], "at most 1.25 x", "at least 4 x", "at most 1/8")
    lines += heads_lines(cases["heads fp32"], "at most 1.2 x", "", "")
    for case in (cases["compiled bf16"], cases["compiled fp32"]):
        v = case["variants"]
        lines.append(
            f"| `kd_loss(Head, Head)`, {case['dtype']}, {shape(case)}: against torch.compile of `F.kl_div` "
            f"({ms(v['compiled'])}) | {ms(v['fused'])}, {faster(v['fused'], 'compiled')} faster | faster |"
        )
    case, v = cases["smollm2"], cases["smollm2"]["variants"]
    lines.append(
        f"| SmolLM2-135M, bf16, {shape(case)}: against `F.kl_div` in bf16 ({ms(v['naive'])}; with logits in float32 "
        f"{ms(v['naive fp32'])}) | {ms(v['fused'])}, {faster(v['fused'], 'naive')} and "
        f"{faster(v['fused'], 'naive fp32')} faster | at least 3 x |"
    )
    lines += large_lines(r, cases["large"])
    for case in (cases["logits bf16"], cases["logits fp32"]):
        v = case["variants"]
        lines.append(
            f"| `kd_loss(logits, logits)`, {case['dtype']}, {shape(case)}: against eager ({ms(v['naive'])}) and "
            f"torch.compile of it ({ms(v['compiled'])}) | {ms(v['fused'])}, {faster(v['fused'], 'naive')} and "
            f"{faster(v['fused'], 'compiled')} faster | at least 8 x and 3 x |"
        )
    for dtype, d in r["divergences"].items():
        slowest = max(d, key=lambda name: d[name]["median"])
        lines.append(
            f"| row op, {dtype}: the slowest divergence (`{slowest}`) against forward KL "
            f"| {d[slowest]['median'] / d['forward_kl']['median']:.2f} x | at most 2 x |"
        )
    lines.append(growth_line(r))
    lines.append(f"| `import fastkd`, beyond torch | {r['import_seconds']:.2f} s | under 0.2 s |")
    return "\n".join([*lines, f"\n{line(r['machine'])}. Medians of one run, the variants in turn (`make goals`)."])


def heads_lines(r: Result, floor: str, times: str, memory: str) -> list[str]:
    """Two heads: against the GEMMs, against F.kl_div, memory, and without reduction."""
    v = r["variants"]
    each = v["fused each"]["ms"]["median"] / v["fused"]["ms"]["median"]
    return [
        floor_line("`kd_loss(Head, Head)`", r, "4 bare GEMMs", floor),
        faster_line(f"`F.kl_div` in {r['dtype']}", v, times),
        memory_line("`F.kl_div`", r, memory),
        f'| `reduction="none"` against the scalar loss | {each:.2f} x | at most 1.6 x |',
    ]


def floor_line(name: str, r: Result, floor: str, goal: str) -> str:
    """Against the GEMMs alone."""
    fused, gemms = r["variants"]["fused"], r["variants"]["gemms"]
    return (
        f"| {name}, {r['dtype']}, {shape(r)}: against its {floor} ({ms(gemms)}) "
        f"| {ms(fused)}, {fused['to_floor']:.2f} x | {goal} |"
    )


def faster_line(name: str, v: Result, goal: str) -> str:
    """Against plain PyTorch."""
    wide = f"; with logits in float32 {ms(v['naive fp32'])}" if "naive fp32" in v else ""
    ratios = [faster(v["fused"], base) for base in ("naive", "naive fp32") if base in v]
    return f"| against {name} ({ms(v['naive'])}{wide}) | {' and '.join(ratios)} faster | {goal} |"


def memory_line(name: str, r: Result, goal: str) -> str:
    """What is alive beside dW and its sum, against plain PyTorch."""
    v, dw = r["variants"], r["vocab"] * r["hidden"] * (2 if r["dtype"] == "bf16" else 4)
    beside = v["fused"]["peak_bytes"] - r["dw_bytes"]
    others = [v[base]["peak_bytes"] - dw for base in ("naive", "naive fp32") if base in v]
    wide = f", with logits in float32 {mib(others[1])}" if others[1:] else ""
    return (
        f"| extra peak memory: {mib(v['fused']['peak_bytes'])}, of which dW and its sum {mib(r['dw_bytes'])}; "
        f"{name} without dW {mib(others[0])}{wide} "
        f"| {mib(beside)}: {' and '.join(f'1/{x / beside:.1f}' for x in others)} | {goal} |"
    )


def large_lines(r: Result, case: Result) -> list[str]:
    """The shape of a large model: against the GEMMs, and memory with dW."""
    fused, peaks = case["variants"]["fused"], r["peak_bytes"]
    return [
        f"| `kd_loss(Head, Head)`, bf16, {shape(case)}: against its 4 bare GEMMs ({ms(case['variants']['gemms'])}) "
        f"| {ms(fused)}, {fused['to_floor']:.2f} x | at most 1.25 x |",
        f"| extra peak memory with dW, against `F.kl_div` ({peaks['large naive'] / 1e9:.1f} GB; by `fastkd plan` "
        f"{peaks['large naive, planned'] / 1e9:.1f} GB) | {fused['peak_bytes'] / 1e9:.2f} GB | under 1 GB; over 6 GB |",
    ]


def growth_line(r: Result) -> str:
    """Memory without dH, which any loss returns, over more and more tokens."""
    hidden = r["cases"]["heads bf16"]["hidden"]
    tokens = {int(key.split()[1]): peak for key, peak in r["peak_bytes"].items() if key.startswith("tokens")}
    grown = ", ".join(f"N {n:,}: {mib(peak - n * hidden * 2)}" for n, peak in tokens.items())
    return f"| extra peak memory of bf16 heads with dW, without dH | {grown} | flat |"


def sparse_table(r: Result) -> str:
    """The goals of listed teachers, and of the cache if there is a result, as a markdown table."""
    sparse, topk = r["cases"]["sparse"], r["cases"]["topk"]
    lines = ["| listed teachers | measured | goal |", "|---|---|---|"]
    lines.append(floor_line("`kd_loss(Head, TopK)`, forward and backward", sparse, "3 bare GEMMs", "at most 1.25 x"))
    recipe = f"all logits in {sparse['dtype']}, log_softmax, gather"
    lines.append(faster_line(recipe, sparse["variants"], "at least 3 x"))
    if "trl" in sparse["variants"]:
        trl = sparse["variants"]["trl"]
        times = trl["ms"]["median"] / sparse["variants"]["fused"]["ms"]["median"]
        lines.append(
            f"| against TRL {r['peers']['trl']}'s chunked loss, in float32 ({ms(trl)}) | {times:.2f} x faster | |"
        )
    lines.append(memory_line("that recipe", sparse, "at most 1/8"))
    lines.append(floor_line(f"`topk(Head, {topk['top_k']})`", topk, "one GEMM", "at most 1.5 x"))
    lines.append(faster_line(f"all logits in {topk['dtype']}, log_softmax, topk", topk["variants"], ""))
    notes = [f"{line(r['machine'])}. Medians of one run, the variants in turn (`make goals`)."]
    if CACHE.exists():
        cache = json.loads(CACHE.read_text())
        lines += cache_lines(cache)
        notes.append(f"The cache: {line(cache['machine'])}.")
    return "\n".join([*lines, "", " ".join(notes)])


def cache_lines(r: Result) -> list[str]:
    """Rates on one core, and bytes of an entry."""
    dtypes, k = r["dtypes"], r["settings"]["k"]

    def all_of(figure: Callable[[Result], str]) -> str:
        return ", ".join(f"{name} {figure(found)}" for name, found in dtypes.items())

    def rate(kind: str) -> str:
        return all_of(lambda found: f"{found['tokens_per_minute'][kind] / 1e6:.1f}")

    def entry(stage: str) -> str:
        return all_of(lambda found: f"{found['bytes_per_entry'][stage]:.2f}")

    plain = f"{entry('values')}; as Parquet encodes them {entry('encoded')}"

    return [
        f"| teacher cache, K {k}, one core, millions of tokens a minute: written, after the model | {rate('write')} "
        "| at least 1 |",
        f"| read in order | {rate('read')} | at least 1 |",
        f"| bytes of an entry before compression | {plain} | at most 4 with fp16, 3 with int8 |",
        f"| bytes of an entry after zstd | {entry('compressed')} | |",
    ]


def demo_table(r: dict[str, Any]) -> str:
    """What `make demo` found, as a markdown table."""
    fused, naive, before = r["runs"]["fused"], r["runs"]["naive"], r["before"]
    after, other = fused["held_out"], naive["held_out"]
    ms = {k: (statistics.median(run["loss_ms"]), statistics.median(run["step_ms"])) for k, run in r["runs"].items()}
    peaks = [run["peak_extra_bytes"] / 2**20 for run in (fused, naive)]
    difference, e = r["relative_difference"], r["environment"]
    rows = [
        f"| `make demo`: {len(r['layers']['kept'])} of SmolLM2-135M's {r['layers']['teacher']} layers, "
        f"{r['settings']['steps']} steps | before | with `kd_loss` | with `F.kl_div` | teacher |",
        "|---|---|---|---|---|",
        f"| held-out KL(teacher, student), nats | {before['kl']:.3f} | {after['kl']:.3f} | {other['kl']:.3f} | 0 |",
        f"| top-1 agreement | {before['top1']:.1%} | {after['top1']:.1%} | {other['top1']:.1%} | 100% |",
        f"| perplexity | {before['perplexity']:.1f} | {after['perplexity']:.1f} | {other['perplexity']:.1f} "
        f"| {before['teacher_perplexity']:.1f} |",
        f"| loss, forward and backward | | {ms['fused'][0]:.0f} ms | {ms['naive'][0]:.0f} ms | |",
        f"| whole training step | | {ms['fused'][1]:.0f} ms | {ms['naive'][1]:.0f} ms | |",
        f"| peak extra memory of the loss | | {peaks[0]:.0f} MiB | {peaks[1]:.0f} MiB | |",
    ]
    note = (
        f"\n{r['tokens']['per_step']:,} tokens a step, vocabulary {r['vocabulary']:,}, {r['dtype']}; medians over the "
        f"steps. The two runs' losses differ by {difference['first']:.0e} of their value at the first step and by "
        f"at most {difference['largest']:.0e} later, as {r['dtype']} rounding feeds back through training. "
        f"{e['name']}, {e['threads']} threads; torch {e['torch']}, Python {e['python']}; {r['seconds']:.0f} s in all."
    )
    return "\n".join([*rows, note])


def pointwise_table(r: Result) -> str:
    """A transformer's other ops in forward mode: is torch right, and how fast."""
    times = {"compiled": "compiled", "by hand": "by hand, compiled", "copy": "copy"}
    lines = [
        f"| op | jvp | jvp, compiled | reverse over forward | ms: jvp | {' | '.join(times.values())} |",
        f"|---|---|---|---|{'---|' * (1 + len(times))}",
    ]

    def verdict(error: float | None) -> str:
        return "refused" if error is None else "right" if error < 1e-3 else f"**wrong by {error:.0%}**"

    def both(found: Result, way: str) -> str:
        spent = [d["ms"].get(way) for d in found["dtypes"].values()]
        return ", ".join("-" if s is None else report.milliseconds(s["median"]) for s in spent)

    for name, found in r["ops"].items():
        verdicts = " | ".join(map(verdict, found["errors"].values()))
        lines.append(f"| {name} | {verdicts} | {' | '.join(both(found, way) for way in ('jvp', *times))} |")
    s = r["settings"]
    note = (
        f"\n{line(r['machine'])}. [{s['tokens']:,}, {s['width']:,}] (convolution: a sixteenth of the channels); fp32, "
        f"bf16; medians of {s['rounds']}, the ways in turn. Errors are relative, of float32 to float64. `copy` moves "
        "as many bytes as the op must (`python bench/pointwise.py`)."
    )
    return "\n".join([*lines, note])


def grid_tables(r: Result) -> str:
    """The tables of `fastkd bench`."""
    return report.markdown(r)


# (document, its block) -> the result, or a pattern for the names of several, and how it is written
BLOCKS: dict[tuple[Path, str], tuple[Path, Callable[[Result], str]]] = {
    (ROOT / "README.md", "goals"): (GOALS, goals_table),
    (ROOT / "README.md", "sparse"): (SPARSE, sparse_table),
    (ROOT / "README.md", "attention"): (ATTENTION, attention_report.goals_table),
    (ROOT / "README.md", "few-step"): (FEW_STEP, few_step_report.goals_table),
    (ROOT / "README.md", "demo-images"): (RESULTS / "demo-images.json", demo_images_report.markdown),
    (ROOT / "README.md", "demo"): (DEMO, demo_table),
    (ROOT / "README.md", "demo-cached"): (RESULTS / "demo-cached.json", demo_cached_report.markdown),
    (ROOT / "README.md", "demo-on-policy"): (RESULTS / "demo-on-policy.json", demo_on_policy.markdown),
    (ROOT / "bench" / "README.md", "grid"): (GRID, grid_tables),
    (ROOT / "bench" / "README.md", "attention-accuracy"): (ACCURACY, attention_report.accuracy_table),
    (ROOT / "bench" / "README.md", "few-step-losses"): (FEW_STEP, few_step_report.losses_table),
    (ROOT / "bench" / "README.md", "pointwise"): (POINTWISE, pointwise_table),
    (ROOT / "bench" / "README.md", "gpu"): (RESULTS / "nvidia-*.json", gpu_report.markdown),
}
DOCUMENTS = sorted({document for document, _ in BLOCKS})


def renewed(document: Path) -> str:
    """The text of a document with its tables made from the stored results, where there is one."""
    text = document.read_text()
    for (where, name), (result, form) in BLOCKS.items():
        files = sorted(result.parent.glob(result.name))
        if where == document and files:
            begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            if begin not in text:
                raise ValueError(f"{document} must have a line {begin}, and {end} after it, for {result.name}")
            before, rest = text.split(begin)
            tables = "\n\n".join(form(json.loads(file.read_text())) for file in files)
            text = f"{before}{begin}\n{tables}\n{end}{rest.split(end)[1]}"
    return text


def renew() -> None:
    """Writes all documents and plots."""
    for document in DOCUMENTS:
        document.write_text(renewed(document))
    plots.draw(json.loads(GRID.read_text()), RESULTS, PLOTS)


if __name__ == "__main__":
    renew()
