"""Say what this machine can run: versions, processor, devices, and each backend with its reason if it cannot serve.

Ends with status 0 when at least one backend can serve, else 1.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastkd.backends import BACKENDS

# what row ops could make use of, in the kernel's spelling
INSTRUCTION_SETS = "avx2 fma f16c avx512f avx512bw avx512_bf16 avx512_fp16 amx_bf16 asimd asimdhp sve".split()


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


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> dict[str, Any]:
    """Model, instruction sets and threads of the CPU, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    # the first core speaks for all
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = facts.get("flags", facts.get("Features", "")).split()
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "threads": torch.get_num_threads(),
    }


def extension() -> dict[str, str | None]:
    """The instruction set for which fastkd._C runs its row ops, or why there is none."""
    try:
        return {"isa": importlib.import_module("fastkd._C").isa(), "error": None}
    except ImportError as error:
        return {"isa": None, "error": str(error)}


def devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator that torch sees."""
    found: list[dict[str, Any]] = [{"device": "cpu", "name": platform.machine()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


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
