"""What several commands share: argparse types whose errors say what was expected and what came, a progress display, and
result files."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkd.backends import BACKENDS

Tick = Callable[..., None]  # a step of a stage is done; takes a word about it
Stage = Callable[[str, int], Tick]  # starts a line of progress: its name, its number of ticks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def positive(text: str) -> int:
    """An integer above 0."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer above 0, got {text!r}")
    return int(text)


def device(text: str) -> torch.device:
    """A device of torch's that is there."""
    try:
        found = torch.device(text)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # unknown names, and devices that are not there
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"expected a device that is there, got {text!r}: {reason}") from None
    if found.type == "meta":
        raise argparse.ArgumentTypeError("expected a device that computes, got 'meta'")
    return found


def backend(text: str) -> str:
    """A name in the table of backends that this machine can have."""
    if text not in BACKENDS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(BACKENDS)}, got {text!r}")
    reason = BACKENDS[text].unavailable()
    if reason is not None:
        raise argparse.ArgumentTypeError(f"backend {text!r} cannot serve on this machine: {reason}")
    return text


def result_file(text: str) -> Path:
    """A file that can be written; found out before hours of measuring, not after."""
    path = Path(text)
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, got {text!r}: {error.strerror}"
        ) from None
    return path


def write_json(path: Path, result: Any) -> None:
    """The whole file or the file as it was: an interrupted run leaves nothing half written."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(draft, path)


@contextmanager
def progress() -> Iterator[Stage]:
    """A progress display; a stage of it is started with a name and its number of ticks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    name, note = TextColumn("{task.description:<26}"), TextColumn("{task.fields[note]}")
    columns = SpinnerColumn(), name, BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), note
    with Progress(*columns) as bars:

        def stage(name: str, total: int) -> Tick:
            task = bars.add_task(name, total=total, note="")
            return lambda note="": bars.update(task, advance=1, note=note)

        yield stage
