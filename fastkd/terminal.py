"""What several commands share: argparse types whose errors say what was expected and what came, a progress display,
result files, and the options for the size of heads."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkd.backends import BACKENDS
from fastkd.shapes import MODELS

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _try(path if _special(path) else _draft(path))
        if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR) if path.is_dir() else "not writable")
    except OSError as error:
        reason = error.strerror
        raise argparse.ArgumentTypeError(f"expected a file that can be written, got {text!r}: {reason}") from None
    return path


def _special(path: Path) -> bool:
    """A pipe or a device, which is written to, not replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _draft(path: Path) -> Path:
    """Where a file is written first; links are followed, not replaced."""
    whole = path.resolve()
    return whole.with_name(whole.name + ".part")


def _try(path: Path) -> None:
    there = path.exists()
    with path.open("a"):
        pass
    if not there:
        path.unlink()


def write_json(path: Path, result: Any) -> None:
    """The whole file or the file as it was: an interrupted run leaves nothing half written."""
    text = json.dumps(result, indent=1) + "\n"
    if _special(path):
        path.write_text(text)
        return
    draft = _draft(path)
    draft.write_text(text)
    os.replace(draft, path.resolve())


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


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def head_arguments(parser: argparse.ArgumentParser, many: str | None = None) -> None:
    """Options for the size of the heads: a known model or --vocab and --hidden; ``many`` ("+"): several of each."""
    names = f"vocabulary and hidden size of known models: {', '.join(MODELS)}"
    parser.add_argument("--model", nargs="+", choices=MODELS, metavar="NAME", default=None, help=names)
    parser.add_argument("--teacher-model", choices=MODELS, metavar="NAME", default=None, help="the student's, if None")
    parser.add_argument("--vocab", type=positive, nargs=many, metavar="V", default=None, help="size of the vocabulary")
    parser.add_argument("--hidden", type=positive, nargs=many, metavar="D", default=None, help="hidden size")
    parser.add_argument("--teacher-hidden", type=positive, metavar="D", default=None, help="the student's, if None")
    parser.set_defaults(fail=parser.error)


@dataclass(frozen=True)
class Heads:
    """Size of a student's and a teacher's head, and the models that they belong to."""

    vocab: int
    hidden: int
    teacher_hidden: int
    model: str | None = None
    teacher_model: str | None = None


def heads(args: argparse.Namespace, vocab: Sequence[int], hidden: Sequence[int]) -> list[Heads]:
    """What the options of head_arguments ask for; ``vocab`` and ``hidden`` where they ask for nothing."""
    if args.model is None:
        if args.teacher_model is not None:
            args.fail(f"argument --teacher-model: expected a --model to go with it, got {args.teacher_model!r} alone")
        vocabs, hiddens = (
            default if given is None else [given] if isinstance(given, int) else given
            for given, default in ((args.vocab, vocab), (args.hidden, hidden))
        )
        return [Heads(v, d, args.teacher_hidden or d) for v in vocabs for d in hiddens]
    for name in ("vocab", "hidden", "teacher_hidden"):
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            args.fail(f"argument {option}: expected nothing beside --model, which says it, got {getattr(args, name)}")
    found = []
    for name in args.model:
        student, teacher = MODELS[name], MODELS[args.teacher_model or name]
        if student.vocab != teacher.vocab:
            args.fail(
                f"argument --teacher-model: expected a model with {name}'s vocabulary of {student.vocab}, "
                f"got {args.teacher_model!r} with {teacher.vocab}"
            )
        found.append(Heads(student.vocab, student.hidden, teacher.hidden, name, args.teacher_model or name))
    return found
