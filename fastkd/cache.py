"""Teacher caches: build one, say what is in it, and read it through to see whether it can be trusted.

A cache is a folder of Parquet files with a teacher's top-k for every token of a dataset (fastkd.teacher_cache).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd import teacher_cache, terminal

STAGES = {"values": "the numbers themselves", "encoded": "as Parquet", "compressed": "compressed"}
ERRORS = {
    "log_prob": "largest error of a log-probability",
    "prob": "largest error of a probability",
    "kl": "KL(exact, stored), mean over tokens, nats",
    "mass": "largest distance of a token's sum from 1",
    "weight": "largest error of a weight",
}


class Action(argparse.ArgumentParser):
    """The parser of one action; it learns its options when it is the one to parse, because `build` imports much."""

    learn: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if self.learn is not None:
            self.learn(self)
            self.learn = None
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of `fastkd cache`."""
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", parser_class=Action
    )
    for name, (learn, summary) in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary, formatter_class=parser.formatter_class)
        action.learn = learn


def build_options(parser: argparse.ArgumentParser) -> None:
    """Those of fastkd.cache_build."""
    module = importlib.import_module("fastkd.cache_build")
    parser.description = module.__doc__
    module.add_arguments(parser)
    parser.set_defaults(act=module.run)


def info_options(parser: argparse.ArgumentParser) -> None:
    """Those of `fastkd cache info`."""
    parser.add_argument("folder", type=Path, help="of the cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(act=info)


def verify_options(parser: argparse.ArgumentParser) -> None:
    """Those of `fastkd cache verify`."""
    info_options(parser)
    parser.set_defaults(act=verify)


ACTIONS = {
    "build": (build_options, "run a teacher over text once and store its top-k"),
    "info": (info_options, "print metadata, counts, bytes per token and the error of the stored dtype"),
    "verify": (verify_options, "read every shard, check all of it, and name each bad file; status 1 if there is one"),
}


def run(args: argparse.Namespace) -> int:
    """Does one of the actions; 1 after one line if the cache cannot be read."""
    try:
        status: int = args.act(args)
    except (teacher_cache.CacheError, ModuleNotFoundError) as error:
        print(f"fastkd cache: {error}", file=sys.stderr)
        return 1
    return status


def info(args: argparse.Namespace) -> int:
    """Prints what the footers of a cache say."""
    cache = teacher_cache.open(args.folder)
    report = {"folder": str(args.folder), "meta": cache.meta.to_dict(), **cache.summary()}
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, Console())
    return 0


def verify(args: argparse.Namespace) -> int:
    """Reads a cache through; 1 if something is wrong with it."""
    files = len(list(args.folder.glob("[!.]*.parquet")))
    if args.json:
        problems = teacher_cache.verify(args.folder)
        print(json.dumps({"folder": str(args.folder), "files": files, "problems": problems}, indent=1))
    else:
        with terminal.progress() as stage:
            problems = teacher_cache.verify(args.folder, stage("reading shards", files))
        for problem in problems:
            print(problem)
        print(f"{args.folder}: {f'{len(problems)} problems' if problems else 'all is well'} in {files} files")
    return 1 if problems else 0


def show(report: dict[str, Any], console: Console) -> None:
    """Prints `info` for people."""
    facts = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in report["meta"].items():
        facts.add_row(name, "[dim]unknown[/dim]" if value is None else escape(str(value)))
    for name in ("shards", "sequences", "tokens"):
        facts.add_row(name, f"{report[name]:,}")
    facts.add_row("on disk", terminal.size(report["file_bytes"]))
    for name, value in report["errors"].items():
        facts.add_row(ERRORS.get(name, name), f"{value:.3g}")
    console.print(facts)

    table = Table("bytes", *STAGES.values())
    for name, title in (
        ("bytes_per_token", "a token"),
        ("bytes_per_entry", "an id and log-probability"),
        ("bytes_per_token_beside", "a token, beside them"),
    ):
        figures = [report[name][stage] for stage in STAGES]
        table.add_row(title, *("" if figure is None else f"{figure:,.2f}" for figure in figures))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
