"""The goals, measured: medians of one run, side by side with plain PyTorch and with the bare GEMMs.

python bench/goals.py                    measures for about 50 minutes, writes its results after every case, and renews
                                         the documents (bench/docs.py)
python bench/goals.py --only dense       two heads, logits, divergences, memory: bench/results/cpu-goals.json
python bench/goals.py --only sparse      five minutes: listed teachers, bench/results/sparse-goals.json
python bench/goals.py --only attention   twenty minutes: attention with a tangent, bench/results/attention-goals.json
python bench/goals.py --only few-step    five minutes: few-step generators, bench/results/few-step.json

Cases, variants, clock and memory are those of `fastkd bench`, for attention those of attention.py.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_goals
import docs
import few_step
from row_op import row_op

from fastkd import divergences, machine, rows_cpu
from fastkd.bench import measure, memory
from fastkd.bench.peers import PEERS
from fastkd.bench.work import WORKS, Case
from fastkd.chunks import sum_bytes
from fastkd.terminal import DTYPES, write_json

Goals = dict[str, tuple[Case, tuple[str, ...], float]]  # name -> case, variants, rounds for each round asked for
GOALS: Goals = {}
for dtype in ("bf16", "fp32"):
    wide = ("naive fp32",) if dtype == "bf16" else ()
    GOALS[f"heads {dtype}"] = Case("heads", 2048, 32000, 1024, 1024, dtype), ("fused", "fused each", "naive", *wide), 1
    GOALS[f"compiled {dtype}"] = Case("heads", 512, 32000, 1024, 1024, dtype), ("fused", "compiled"), 2
    GOALS[f"logits {dtype}"] = Case("logits", 512, 32000, None, None, dtype), ("fused", "naive", "compiled"), 3
GOALS["smollm2"] = Case("heads", 1024, 49152, 576, 576, "bf16", "smollm2-135m"), ("fused", "naive", "naive fp32"), 1
GOALS["large"] = Case("heads", 4096, 128256, 2048, 2048, "bf16", "llama-3.2-1b"), ("fused",), 0.4
SPARSE: Goals = {
    "sparse": (Case("sparse", 2048, 32000, 1024, None, "bf16", top_k=64), ("fused", "naive", "naive fp32", "trl"), 1),
    "topk": (Case("topk", 2048, 32000, 1024, None, "bf16", top_k=64), ("fused", "naive", "naive fp32"), 1),
}
GROWING = (2048, 4096, 8192, 16384)  # tokens at which the memory of bf16 heads is measured
IMPORT = "import time, torch; start = time.perf_counter(); import fastkd; print(time.perf_counter() - start)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="(default: %(default)s)")
    args = parser.parse_args()
    for name in args.only:
        PARTS[name](args.rounds)
    docs.renew()


def measure_dense(rounds: int) -> None:
    """All but listed teachers."""
    result: dict[str, Any] = {"machine": machine.describe(), "cases": {}, "divergences": {}, "peak_bytes": {}}
    measure_import(result, rounds)
    measure_divergences(result, rounds)
    measure_cases(docs.GOALS, result, GOALS, rounds)
    measure_growth(result, rounds)


def measure_sparse(rounds: int) -> None:
    """Teachers that list their entries, and who lists them."""
    versions = {peer.name: machine.package_version(peer.distribution) for peer in PEERS}
    result: dict[str, Any] = {"machine": machine.describe(), "peers": versions, "cases": {}}
    measure_cases(docs.SPARSE, result, SPARSE, rounds)


def measure_attention(rounds: int) -> None:
    """Attention with a tangent; the math path takes its time."""
    attention_goals.measure(docs.ATTENTION, max(round(0.6 * rounds), 2), say)


def measure_few_step(rounds: int) -> None:
    """Losses of few-step generators, and a training step."""
    few_step.measure(docs.FEW_STEP, 2 * rounds, say)


PARTS: dict[str, Callable[[int], None]] = {
    "dense": measure_dense,
    "sparse": measure_sparse,
    "attention": measure_attention,
    "few-step": measure_few_step,
}


def say(note: str = "") -> None:
    print(f"  {note}", file=sys.stderr)


def measure_import(result: dict[str, Any], rounds: int) -> None:
    """Seconds that `import fastkd` takes beyond torch, each in a process of its own."""
    seconds = [
        float(subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True).stdout)
        for _ in range(2 * rounds + 1)
    ]
    result["import_seconds"] = statistics.median(seconds)
    write_json(docs.GOALS, result)


def measure_divergences(result: dict[str, Any], rounds: int) -> None:
    """The row op under every divergence."""
    for name in ("bf16", "fp32"):
        runs = {d: row_op(d, 256, 32000, DTYPES[name]) for d in divergences.REGISTRY}
        result["divergences"][name] = measure.median_times(runs, 2 * rounds)
        write_json(docs.GOALS, result)


def measure_cases(file: Path, result: dict[str, Any], goals: Goals, rounds: int) -> None:
    """Time, memory and errors of the goals' shapes; peers only where they are installed."""
    absent = {peer.name for peer in PEERS if peer.missing() is not None}
    for name, (case, variants, factor) in goals.items():
        print(name, file=sys.stderr)
        record = measure.blank(case, [variant for variant in variants if variant not in absent])
        measure.measure(record, case, max(round(factor * rounds), 2), True, say)
        learns = "weight" in record["variants"]["fused"].get("errors", {})
        weight = case.vocab * case.hidden if learns else 0
        own = sum_bytes(rows_cpu, weight, case.torch_dtype, "cpu", None)
        record["dw_bytes"] = weight * case.torch_dtype.itemsize + own
        result["cases"][name] = record
        write_json(file, result)
        bad = {v: e for v, e in record["variants"].items() if e["status"] != "measured"}
        if bad:
            raise SystemExit(f"{name} ({case}) has variants without a time: {bad}")


def measure_growth(result: dict[str, Any], rounds: int) -> None:
    """Memory alone: of bf16 heads with more and more tokens, and of the naive loss at the large shape."""
    large, heads = GOALS["large"][0], GOALS["heads bf16"][0]
    result["peak_bytes"]["large naive"] = memory.peak(large, "naive")
    result["peak_bytes"]["large naive, planned"] = WORKS["heads"].planned(large, "naive")
    for n in GROWING:
        case = Case("heads", n, heads.vocab, heads.hidden, heads.teacher_hidden, "bf16")
        result["peak_bytes"][f"tokens {n}"] = memory.peak(case, "fused")
        write_json(docs.GOALS, result)


if __name__ == "__main__":
    main()
