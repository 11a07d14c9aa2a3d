"""Measure time and peak memory of fastkd's losses, forward and backward, against the same in plain PyTorch, against
torch.compile of it, against other libraries that are installed, and against the floor: the bare GEMMs, or a copy.

Every variant's loss and gradients are first held against float64; one that computes something else is not timed, one
that fails or does not fit into memory is reported, and the rest goes on. Ctrl-C keeps what was measured. Without sizes:
1,024 tokens, vocabulary 32,000, hidden 1,024, bf16. Several sizes make a grid.

work:
  heads          kd_loss(Head, Head): forward KL from hidden states and heads
  logits         kd_loss(logits, logits)
  kl_div         kl_div(log_q, log_p), the drop-in
  sparse         kd_loss(Head, TopK): the teacher is known on --top-k entries and on the mass that they leave
  sparse_logits  kd_loss(logits, TopK)
  selected       selected_log_probs(Head, ids)
  stats          token_stats(Head)
  topk           topk(Head, k), forward alone

variants:
  fused          fastkd, on the backend that it chooses; "fused BACKEND" with --backend
  fused each     heads with reduction="none"; measured when it is named
  naive          the same in plain PyTorch, on all logits in the inputs' dtype: log_softmax and F.kl_div, with gather
                 between them for a listed teacher; "naive fp32": on logits cast to float32
  compiled       torch.compile of naive
  liger          heads: Liger's chunked loss as it comes, compiled; "liger eager": with compiled=False
  trl            sparse: the chunked loss of TRL's AsyncDistillationTrainer, in float32

--json FILE holds machine (device, versions, commit), complete, skipped, peers (their versions), and cases. A case has
its sizes (null: its work does not have it), the name of its floor, compared_at (the size of the comparison with
float64) and variants, each with:
  status         measured, fails, disagrees, does not fit, or not reached; reason for all but the first and last
  ms             median, min, max and iqr (interquartile range) in milliseconds, and the number of rounds
  peak_bytes     measured peak beside the inputs, gradients included; planned_bytes: what fastkd plan says
  errors         relative error of the loss and of each gradient (2-norm); null: not finite. topk: of its
                 log-probabilities, weighted by their ranks
  faster_than    how many times faster than naive, naive fp32 and compiled
  to_floor       time over the floor's time

Ends with status 0, 1 if a variant of fastkd's own has no time, 2 for arguments that make no sense, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from fastkd import machine, plan, terminal
from fastkd.bench import measure, plots, report
from fastkd.bench.peers import PEERS
from fastkd.bench.work import WORKS, Case, usual, variants

# what is measured without sizes, and with --quick
SIZES: dict[str, Any] = {
    "work": ["heads", "logits"],
    "tokens": [1024],
    "vocab": [32000],
    "hidden": [1024],
    "dtype": ["bf16"],
}
QUICK: dict[str, Any] = {"work": ["heads"], "tokens": [256], "vocab": [8192], "hidden": [256], "dtype": ["bf16"]}
ROUNDS, QUICK_ROUNDS = 7, 3
TOP_K = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastkd bench`."""
    parser.add_argument("--quick", action="store_true", help="heads of one small size, few rounds: under a minute")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=None, help="None: heads and logits")
    parser.add_argument("--tokens", type=terminal.positive, nargs="+", metavar="N", default=None, help="tokens")
    terminal.head_arguments(parser, "+")
    listed = "entries of a listed teacher, and of topk"
    parser.add_argument("--top-k", type=terminal.positive, metavar="K", default=TOP_K, help=listed)
    parser.add_argument("--dtype", nargs="+", choices=terminal.DTYPES, default=None, help="of the inputs")
    parser.add_argument("--device", type=terminal.device, default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--backend", type=terminal.backend, nargs="+", default=(), help="measure fastkd on each of these"
    )
    parser.add_argument("--variants", nargs="+", metavar="NAME", default=None, help="measure these; None: all but each")
    parser.add_argument("--rounds", type=terminal.positive, default=None, help=f"None: {ROUNDS}, quick: {QUICK_ROUNDS}")
    parser.add_argument("--no-memory", action="store_true", help="no peak memory: no process for each variant")
    parser.add_argument("--no-peers", action="store_true", help="leave out other libraries")
    parser.add_argument("--json", type=terminal.result_file, metavar="FILE", default=None, help="write the result")
    parser.add_argument("--markdown", type=terminal.result_file, metavar="FILE", default=None, help="write the tables")
    parser.add_argument("--plots", type=folder, metavar="FOLDER", default=None, help="write time, memory, floor .png")


def folder(text: str) -> Path:
    """A folder that pictures can be written to."""
    return terminal.result_file(str(Path(text) / "time.png")).parent


def run(args: argparse.Namespace) -> int:
    """Measures, prints and writes; the exit status."""
    console = Console()
    cases, skipped = grid(args)
    names = [chosen(args, case) for case in cases]
    for work in dict.fromkeys(case.work for case in cases):
        known = variants(next(case for case in cases if case.work == work))
        skipped += [
            f"{work}: has no variant {name!r} in this dtype" for name in args.variants or () if name not in known
        ]
    if args.plots is not None:
        try:
            plots.pyplot()
        except plots.NoMatplotlib as error:
            args.fail(f"argument --plots: {error}")
    if not args.no_peers:
        peers = [peer for peer in PEERS if any(case.work in peer.works for case in cases)]
        skipped += [reason for reason in (peer.missing() for peer in peers) if reason is not None]
    result = blank(args, skipped)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    try:
        with terminal.progress() as stage:
            for case, some in zip(cases, names, strict=True):
                record = measure.blank(case, some)
                result["cases"].append(record)
                tick = stage(f"{case.work} {case.tokens} x {case.vocab}", 2 * len(some) + rounds + 1)
                measure.measure(record, case, rounds, not args.no_memory, tick)
                write(args.json, result)
        result["complete"] = True
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept")
    write(args.json, result)
    report.show(result, console)
    if args.markdown is not None:
        args.markdown.write_text(report.markdown(result) + "\n")
    written = [file for file in (args.json, args.markdown) if file is not None]
    written += plots.draw(result, args.plots) if args.plots is not None else []
    if written:
        console.print("written: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)
    return status(result)


def grid(args: argparse.Namespace) -> tuple[list[Case], list[str]]:
    """All cases, and what of the grid is left out."""
    sizes = QUICK if args.quick else SIZES
    works, all_tokens, dtypes = (getattr(args, name) or sizes[name] for name in ("work", "tokens", "dtype"))
    heads = terminal.heads(args, sizes["vocab"], sizes["hidden"])
    cases: dict[Case, None] = {}
    skipped = []
    for work in works:
        before = len(cases)
        for h, tokens, dtype in product(heads, all_tokens, dtypes):
            case = Case(work, tokens, h.vocab, h.hidden, h.teacher_hidden, dtype, h.model, h.teacher_model)
            case = replace(case, device=str(args.device), top_k=args.top_k).of_its_work()
            if case.top_k is not None:
                plan.check_top_k(args, case.vocab)
            cases[case] = None
        fewer = len(heads) * len(all_tokens) * len(dtypes) - (len(cases) - before)
        if fewer:
            skipped.append(f"{work}: {fewer} combinations left out, which differ from others in the hidden size alone")
    return list(cases), skipped


def chosen(args: argparse.Namespace, case: Case) -> list[str]:
    """The names of the variants that are measured in a case."""
    if args.variants is None:
        return usual(case, tuple(args.backend), not args.no_peers)
    known = {name for work in WORKS for name in variants(Case(work, 1, 1, 1, 1, "bf16"))}
    for name in args.variants:
        if name not in known:
            args.fail(f"argument --variants: expected some of {', '.join(sorted(known))}, got {name!r}")
    return [name for name in variants(case) if name in args.variants]


def blank(args: argparse.Namespace, skipped: list[str]) -> dict[str, Any]:
    """A result without cases."""
    versions = {peer.distribution: machine.package_version(peer.distribution) for peer in PEERS}
    described = machine.describe(args.device)
    return {"machine": described, "peers": versions, "complete": False, "skipped": skipped, "cases": []}


def write(file: Path | None, result: dict[str, Any]) -> None:
    """The JSON file, if one is asked for."""
    if file is not None:
        terminal.write_json(file, result)


def status(result: dict[str, Any]) -> int:
    """0, 1 if one of fastkd's own variants has no time, 130 if interrupted."""
    if not result["complete"]:
        return 130
    entries = [entry for r in result["cases"] for name, entry in r["variants"].items() if name.startswith("fused")]
    return 0 if all(entry["status"] == "measured" for entry in entries) else 1
