"""The table of measured goals: one run, medians, side by side with plain PyTorch and with the bare GEMMs.

python bench/goals.py              measure, write bench/results/cpu.json, renew the tables in README.md
python bench/goals.py --tables     renew the tables from bench/results/*.json and measure nothing

The demo's table comes from bench/results/demo.json, a copy of what `make demo` writes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from workloads import Heads, Logits, row_op

import fastkd
from fastkd import divergences

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MAIN = {"n": 2048, "d": 1024, "v": 32000}  # the shape of the goals
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def times(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Median, fastest and slowest milliseconds; the variants in turn, so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for n in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if n:  # the first round warms up
                taken[name].append(1000 * (time.perf_counter() - start))
    return {k: {"median": statistics.median(t), "min": min(t), "max": max(t)} for k, t in taken.items()}


def check_agreement(work: Heads | Logits, names: tuple[str, ...]) -> None:
    """No timing of something that computes something else."""
    values = {name: float(getattr(work, name)().detach()) for name in names}
    if max(values.values()) > 1.02 * min(values.values()):
        raise SystemExit(f"the variants disagree: {values}")


def peak(variant: str, dtype: str, n: int) -> int:
    """Bytes by which a variant's resident set rises above its inputs, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", variant, dtype, str(n)], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


def measure_peak(variant: str, dtype: str, n: int) -> int:
    getattr(Heads(64, 64, 512, DTYPES[dtype]), variant)()  # libraries and threads are loaded
    work = Heads(**{**MAIN, "n": n}, dtype=DTYPES[dtype])
    torch.mm(work.h_t[:64], work.w_t[:64].T)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    getattr(work, variant)()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def measure(rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine(), "heads": {}, "logits": {}, "divergences": {}, "memory": {}}
    for name, dtype in DTYPES.items():
        logits = Logits(512, 32000, dtype)
        check_agreement(logits, ("fused", "eager", "compiled"))
        variants = {v: getattr(logits, v) for v in ("fused", "eager", "compiled")}
        result["logits"][name] = times(variants, 3 * rounds)
        rows = {d: row_op(d, 256, 32000, dtype) for d in divergences.REGISTRY}
        result["divergences"][name] = times(rows, 2 * rounds)
    for name, dtype in DTYPES.items():
        heads = Heads(**MAIN, dtype=dtype)
        check_agreement(heads, ("fused", "fused_none", "naive_upcast"))
        variants = {v: getattr(heads, v) for v in ("fused", "fused_none", "naive", "naive_upcast")}
        result["heads"][name] = times({"gemms": heads.gemms(), **variants}, rounds)
        result["memory"][name] = {v: peak(v, name, MAIN["n"]) for v in ("fused", "naive", "naive_upcast")}
    result["memory"]["against N"] = {str(n): peak("fused", "bf16", n) for n in (2048, 4096, 8192, 16384)}
    return result


def machine() -> dict[str, Any]:
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), model)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": fastkd.backends.extension()[0].isa(),  # type: ignore[union-attr]
        "torch": torch.__version__,
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(r: dict[str, Any]) -> str:
    """The goals as a markdown table."""

    def ms(t: dict[str, float]) -> str:
        return f"{t['median']:,.0f} ms" if t["median"] >= 100 else f"{t['median']:.1f} ms"

    def ratio(a: dict[str, float], b: dict[str, float]) -> str:
        return f"{a['median'] / b['median']:.2f} x"

    def mib(count: int) -> str:
        return f"{count / 2**20:,.0f} MiB"

    lines = ["| work, forward and backward | measured | goal |", "|---|---|---|"]
    shape = "N {n:,}, D {d:,}, V {v:,}".format(**MAIN)
    for name, limit in (("bf16", "1.25"), ("fp32", "1.2")):
        h, m = r["heads"][name], r["memory"][name]
        dw = MAIN["v"] * MAIN["d"] * (2 if name == "bf16" else 4)
        beside = (
            m["fused"] - MAIN["v"] * MAIN["d"] * 4
        )  # dW is summed in float32: in bf16 in two halves, one of them dW
        lines += [
            f"| `kd_loss(Head, Head)`, {name}, {shape}: against its 4 bare GEMMs ({ms(h['gemms'])}) "
            f"| {ms(h['fused'])}, {ratio(h['fused'], h['gemms'])} | at most {limit} x |",
            f"| against `F.kl_div` in {name} ({ms(h['naive'])}; with logits in float32 {ms(h['naive_upcast'])}) "
            f"| {ratio(h['naive'], h['fused'])} and {ratio(h['naive_upcast'], h['fused'])} faster "
            f"| {'at least 4 x' if name == 'bf16' else ''} |",
            f"| extra peak memory: {mib(m['fused'])}, of which dW and its float32 sum {mib(m['fused'] - beside)}; "
            f"`F.kl_div` without dW {mib(m['naive'] - dw)}, with logits in float32 {mib(m['naive_upcast'] - dw)} "
            f"| {mib(beside)}: 1/{(m['naive'] - dw) / beside:.1f} and 1/{(m['naive_upcast'] - dw) / beside:.1f} "
            f"| {'at most 1/8' if name == 'bf16' else ''} |",
            f'| `reduction="none"` against the scalar loss | {ratio(h["fused_none"], h["fused"])} | at most 1.6 x |',
        ]
    for name in DTYPES:
        t = r["logits"][name]
        lines.append(
            f"| `kd_loss(logits, logits)`, {name}, 512 x 32,000, against eager ({ms(t['eager'])}) and "
            f"torch.compile of it ({ms(t['compiled'])}) | {ms(t['fused'])}, {ratio(t['eager'], t['fused'])} and "
            f"{ratio(t['compiled'], t['fused'])} faster | at least 8 x and 3 x |"
        )
    for name in DTYPES:
        d = r["divergences"][name]
        slowest = max(d, key=lambda k: d[k]["median"])
        lines.append(
            f"| row op, {name}: the slowest divergence (`{slowest}`) against forward KL "
            f"| {ratio(d[slowest], d['forward_kl'])} | at most 2 x |"
        )
    extra = {int(n): b - int(n) * MAIN["d"] * 2 for n, b in r["memory"]["against N"].items()}
    grown = ", ".join(f"N {n:,}: {mib(b)}" for n, b in extra.items())
    lines.append(f"| extra peak memory of bf16 heads with dW, without dH | {grown} | flat |")
    m = r["machine"]
    lines.append(
        f"\n{m['cpu']}, {m['threads']} threads, {m['isa']}; torch {m['torch']}, fastkd {m['fastkd']} ({m['commit']}), "
        f"Python {m['python']}, {m['date']}. Medians of one run, the variants in turn (`make goals`)."
    )
    return "\n".join(lines)


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
        f"at most {difference['largest']:.0e} later, as {r['dtype']} rounding feeds back through training. {e['name']}, "
        f"{e['threads']} threads; torch {e['torch']}, Python {e['python']}; {r['seconds']:.0f} s in all."
    )
    return "\n".join([*rows, note])


def with_tables(text: str) -> str:
    """A document with its tables renewed from the stored results."""
    for name, file, form in (("goals", "cpu.json", table), ("demo", "demo.json", demo_table)):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        new = form(json.loads((RESULTS / file).read_text()))
        text = f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--tables", action="store_true", help="renew the tables from the stored results")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(measure_peak(args.peak[0], args.peak[1], int(args.peak[2])))
        return
    if not args.tables:
        (RESULTS / "cpu.json").write_text(json.dumps(measure(args.rounds), indent=1) + "\n")
    README.write_text(with_tables(README.read_text()))
    print(table(json.loads((RESULTS / "cpu.json").read_text())))


if __name__ == "__main__":
    main()
