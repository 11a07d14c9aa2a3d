"""Say what this machine can run: versions, processor, devices, and each backend with its reason if it cannot serve.

Ends with status 0 when at least one backend can serve, else 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd.backends import BACKENDS
from fastkd.machine import devices, package_version, processor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastkd doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints the examination; 0 when at least one backend can serve."""
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())
    return 0 if any(backend["serves"] for backend in report["backends"]) else 1


def examine() -> dict[str, Any]:
    """Everything that `fastkd doctor` prints, as plain data."""
    names = ("fastkd", "torch", "numpy", "triton")
    reasons = {name: backend.unavailable() for name, backend in BACKENDS.items()}
    return {
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in names}},
        "system": platform.platform(),
        "processor": processor(),
        "extension": extension(),
        "devices": devices(),
        "backends": [
            {"name": name, "summary": BACKENDS[name].summary, "serves": reason is None, "reason": reason}
            for name, reason in reasons.items()
        ],
    }


def extension() -> dict[str, str | None]:
    """The instruction set for which fastkd._C runs its row ops, or why there is none."""
    try:
        return {"isa": importlib.import_module("fastkd._C").isa(), "error": None}
    except ImportError as error:
        return {"isa": None, "error": str(error)}


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the examination for people."""
    processor, extension = report["processor"], report["extension"]
    facts = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, number in report["versions"].items():
        facts.add_row(name, number or "[dim]not installed[/dim]")
    facts.add_row("system", report["system"])
    facts.add_row("processor", processor["model"])
    facts.add_row("instruction sets", " ".join(processor["instruction_sets"]) or "[dim]unknown[/dim]")
    facts.add_row("row ops in C++ for", extension["isa"] or f"[yellow]none: {escape(extension['error'])}[/yellow]")
    facts.add_row("threads", str(processor["threads"]))
    for device in report["devices"]:
        details = [str(device["name"])]
        details += [f"compute capability {device['capability']}"] if "capability" in device else []
        details += [f"{device['memory_gib']} GiB"] if "memory_gib" in device else []
        facts.add_row(device["device"], ", ".join(details))
    console.print(facts)

    table = Table("backend", "what it is", "can serve", title="backends, in order of preference", title_justify="left")
    for backend in report["backends"]:
        verdict = "[green]yes[/green]" if backend["serves"] else f"[yellow]no: {escape(backend['reason'])}[/yellow]"
        table.add_row(backend["name"], escape(backend["summary"]), verdict)
    console.print(table)
