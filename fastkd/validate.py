"""Hold every op, on every backend, in every dtype and feature, on this machine's devices, against float64.

The rule is that of fastkd.testing: for the value and for each gradient, on the largest error and on the norm,

    norm(op - ref64) <= 2 * norm(baseline - ref64) + atol

where the baseline is PyTorch on the same inputs. The tables show, of what was allowed, the largest share that an error
took, and where; up to 1 passes. A case that a backend cannot serve is counted apart, with its reason, never as passed.

Ends with status 0 when all that was compared is within the rule, 1 when anything is not or nothing could be compared,
130 when interrupted: what was done by then is printed and written. A failure comes with three lines of Python that
reproduce it.

The JSON file holds
  machine    device, versions and commit        devices    all that were asked for
  seed       of the random inputs               complete   false: interrupted
  unavailable  {backend: reason}
  cases      for each: op, feature, backend, dtype, device, seed, tokens, vocab; verdict (passed, failed, not served);
             reason, in words, unless passed; reproducer, if failed; rows, one for each compared tensor: name, error,
             allowed, norm_error, norm_allowed (null: infinite), ok, why
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd import machine, terminal
from fastkd.backends import BACKENDS, CannotServe
from fastkd.cases import OPS
from fastkd.testing import Case, Expected, Report

# (tokens, vocab): how the features begin that it is for
SIZES: dict[tuple[int, int], tuple[str, ...]] = {
    (13, 1031): ("",),  # odd, and a vocabulary that no tile divides
    (13, 1023): ("",),  # one below the C++ tile
    (13, 1024): ("",),  # the tile
    (13, 1025): ("",),  # one above
    (17, 3079): ("",),  # primes; a first, middle and last tile
    (3, 50257): ("plain", "logits", "divergence", "sum"),  # GPT-2's; the others are slow, and no news
}
QUICK = 1  # so many of them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastkd validate`."""

    def several(name: str, text: str, **kwargs: Any) -> None:
        parser.add_argument(
            name, nargs="+", action="extend", help=f"{text}; several may be given (None: all)", **kwargs
        )

    several("--op", "ops to validate", choices=tuple(OPS))
    several("--backend", "backends, of those that can serve here", type=terminal.backend, metavar="NAME")
    several("--device", "devices such as cpu or cuda:1", type=terminal.device)
    several("--dtype", "dtypes of the inputs", choices=tuple(terminal.DTYPES))
    parser.add_argument("--quick", action="store_true", help="one small size instead of several")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs")
    parser.add_argument("--verbose", action="store_true", help="print every compared tensor")
    parser.add_argument("--json", type=terminal.result_file, metavar="FILE", help="write every compared tensor here")


@dataclass(frozen=True)
class Result:
    """What came of one case: a report, or in words why there is none."""

    case: Case
    report: Report | None = None
    not_served: str | None = None
    error: str | None = None

    @property
    def verdict(self) -> str:
        """passed, failed or not served"""
        if self.not_served is not None:
            return "not served"
        return "passed" if self.report else "failed"

    def shares(self) -> Iterator[tuple[bool, float]]:
        """Of each compared tensor: is it a gradient, and the share that the error took of what was allowed."""
        for row in self.report.rows if self.report is not None else ():
            pairs = (row.error, row.allowed), (row.norm_error, row.norm_allowed)
            yield row.name.startswith("grad "), max(0.0 if e == 0 else e / a if a else math.inf for e, a in pairs)

    def data(self) -> dict[str, Any]:
        """Ready for JSON, which has no infinity."""
        rows = [] if self.report is None else [asdict(row) for row in self.report.rows]
        finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
        reason = self.not_served or self.error
        if self.report is not None and not self.report:
            reason = "; ".join(f"{row.name}: {row.why}" for row in self.report.rows if not row.ok)
        data = {**asdict(self.case), "verdict": self.verdict, "reason": reason, "rows": finite}
        return data | ({"reproducer": self.case.reproducer()} if self.verdict == "failed" else {})


@dataclass
class Run:
    """What was asked for, and what came of it so far."""

    ops: list[str]
    backends: list[str]
    devices: list[str]
    dtypes: list[str]
    sizes: list[tuple[int, int]]
    seed: int
    unavailable: dict[str, str]  # backends that nobody named, and why they cannot serve
    results: list[Result] = field(default_factory=list)
    complete: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Run:
        reasons = {} if args.backend else {name: backend.unavailable() for name, backend in BACKENDS.items()}
        return cls(
            ops=_each(args.op, OPS),
            backends=_each(args.backend, [name for name in BACKENDS if reasons.get(name) is None]),
            devices=_each(map(str, args.device or ()), [device["device"] for device in machine.devices()]),
            dtypes=_each(args.dtype, terminal.DTYPES),
            sizes=list(SIZES)[:QUICK] if args.quick else list(SIZES),
            seed=args.seed,
            unavailable={name: reason for name, reason in reasons.items() if reason is not None},
        )

    def walk(self, stage: terminal.Stage) -> None:
        """Every case; those that differ by backend alone share what they are held against."""
        for device, op in product(self.devices, self.ops):
            features = OPS[op].features()
            inputs = [x for x in product(self.dtypes, features, self.sizes) if x[1].startswith(SIZES[x[2]])]
            done = stage(f"{op} on {device}", len(inputs) * len(self.backends))
            for dtype, feature, (tokens, vocab) in inputs:
                expected: Expected | None = None
                for backend in self.backends:
                    case = Case(op, feature, backend, dtype, device, self.seed, tokens, vocab)
                    result, expected = hold(case, expected)
                    self.results.append(result)
                    done(f"{backend} {dtype} {feature}")
        self.complete = True

    def count(self, verdict: str) -> int:
        """Cases with that verdict."""
        return sum(result.verdict == verdict for result in self.results)

    def data(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "machine": machine.describe(self.devices[0]),
            "devices": self.devices,
            "seed": self.seed,
            "complete": self.complete,
            "unavailable": self.unavailable,
            "cases": [result.data() for result in self.results],
        }


def _each(chosen: Any, everything: Any) -> list[str]:
    """Each once, in the order given."""
    return list(dict.fromkeys(chosen or ())) or list(everything)


def hold(case: Case, expected: Expected | None = None) -> tuple[Result, Expected | None]:
    """One case, and what it was held against, for the next backend; None after a failure, which may have spoilt it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a mean over all elements, of materialised logits: here on purpose
        try:
            expected = expected or case.expected()
            report = expected.hold(case)
        except CannotServe as error:
            return Result(case, not_served=error.reason), expected
        except Exception as error:
            return Result(case, error=f"{type(error).__name__}: {error}"), None
    return Result(case, report), expected if report else None


def run(args: argparse.Namespace) -> int:
    """Walks the tables and prints what came of it; the exit status."""
    validation = Run.of(args)
    try:
        with terminal.progress() as stage:
            validation.walk(stage)
    except KeyboardInterrupt:
        pass  # what was measured is kept
    console = Console()
    if args.json is not None:  # before anything that may fail, such as printing to a closed pipe
        terminal.write_json(args.json, validation.data())
    show(validation, console, args.verbose)
    console.print(verdict(validation), highlight=False)
    if not validation.complete:
        return 130
    return 0 if validation.count("passed") and not validation.count("failed") else 1


def verdict(run: Run) -> str:
    """The last line."""
    failed, passed, unserved = map(run.count, ("failed", "passed", "not served"))
    counts = f"{passed} cases passed, {failed} failed, {unserved} not served"
    if not run.complete:
        return f"[yellow]interrupted[/yellow]: {counts} so far"
    if failed:
        return f"[red]FAILED[/red]: {counts}"
    if not passed:
        return f"[red]FAILED[/red]: nothing that was asked for can be served, so nothing was compared: {counts}"
    return f"[green]passed[/green]: {counts}"


def show(run: Run, console: Console, verbose: bool) -> None:
    """Tables, reasons and failures, for people."""
    for op in run.ops:
        results = [result for result in run.results if result.case.op == op]
        if results:
            console.print(summary(op, results))
    for name, reason in run.unavailable.items():
        console.print(f"backend {name} is not available: {escape(reason)}", highlight=False)
    reasons = Counter((r.case.backend, r.not_served) for r in run.results if r.not_served is not None)
    for (backend, why), count in reasons.items():
        console.print(f"{backend} cannot serve {count} cases: {escape(str(why))}", highlight=False)
    for result in run.results:
        if result.verdict == "failed" or verbose:
            detail(result, console)


def summary(op: str, results: list[Result]) -> Table:
    """One row for each backend, dtype and device."""
    title = f"{op}: cases, and the largest share of the allowance"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("backend", "dtype", "device"):
        table.add_column(column, no_wrap=True)
    for column in ("cases", "passed", "failed", "not served"):
        table.add_column(column, justify="right")
    for column in ("value", "gradients"):
        table.add_column(column, overflow="fold")
    keys = dict.fromkeys((r.case.backend, r.case.dtype, r.case.device) for r in results)
    for key in sorted(keys, key=lambda k: (k[2], list(BACKENDS).index(k[0]))):
        group = [r for r in results if (r.case.backend, r.case.dtype, r.case.device) == key]
        counts = Counter(r.verdict for r in group)
        failed = f"[red]{counts['failed']}[/red]" if counts["failed"] else "0"
        numbers = str(len(group)), str(counts["passed"]), failed, str(counts["not served"])
        table.add_row(*key, *numbers, worst(group, False), worst(group, True))
    return table


def worst(results: list[Result], gradient: bool) -> str:
    """The largest share, and the feature in which it occurs."""
    shares = [(share, r.case) for r in results for is_gradient, share in r.shares() if is_gradient == gradient]
    if not shares:
        return "-"
    share, case = max(shares, key=lambda pair: pair[0])
    several = len({(r.case.tokens, r.case.vocab) for r in results}) > 1
    return f"{share:.2f} {escape(case.feature)}" + (f", {case.tokens}x{case.vocab}" if several else "")


def detail(result: Result, console: Console) -> None:
    """A case in full; its three lines can be copied, because nothing wraps them."""
    colour = {"passed": "green", "failed": "red"}.get(result.verdict, "yellow")
    console.print(
        f"\n[{colour}]{result.verdict}[/{colour}] {escape(repr(result.case))}", highlight=False, soft_wrap=True
    )
    text = result.error or result.not_served or str(result.report)
    console.print(escape(text), highlight=False, soft_wrap=True)
    if result.verdict == "failed":
        console.print(escape(result.case.reproducer()), highlight=False, soft_wrap=True)
