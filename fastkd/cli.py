"""The command line: `fastkd COMMAND`, also `python -m fastkd COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

# Each command is the module fastkd.<name> with add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "doctor": "say what this machine can run, and why it cannot run the rest",
    "validate": "hold every op on every backend against the float64 reference",
    "bench": "measure time and memory against plain PyTorch and peers",
    "plan": "say how many bytes a loss will take, materialised and fused",
    "cache": "store a teacher's top-k for a dataset; see and check a store",
    "demo": "distil a real language model, or a generator of digits",
}

DESCRIPTION = """\
fastkd: fused knowledge-distillation losses for PyTorch.

The library itself is used from Python (import fastkd). These commands look at
the machine that it runs on and show it at work."""

EPILOG = """\
examples:
  fastkd doctor              which backends can serve here
  fastkd doctor --json       the same for a program, or for a bug report
  fastkd validate --quick    are the kernels right on this machine
  fastkd bench --quick       and what do they save
  fastkd plan --model llama-3-8b --tokens 8192
                             the bytes of a loss before it is run
  fastkd cache info FOLDER   what a teacher cache holds, and how many bytes a token
  fastkd demo --help         what the demo does and how to make it shorter

environment:
  FASTKD_BACKEND             the backend for every call, such as torch
"""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written, and the default behind every option."""


def installed_version() -> str:
    """The version of the installed distribution; a bare checkout has none."""
    try:
        return version("fastkd")
    except PackageNotFoundError:
        return "not installed"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of everything; only `command`'s own module is imported, so that help comes at once."""
    parser = argparse.ArgumentParser("fastkd", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"fastkd {installed_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, formatter_class=HelpFormatter)
        if name == command:
            module = importlib.import_module(f"fastkd.{name}")
            subparser.description = module.__doc__
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    status: int = args.run(args)
    return status
