"""What each CUDA kernel takes on each architecture, by ptxas: registers, threads they let live, shared memory, spills.

    python csrc/ptxas.py [FILE.cu ...]        all of csrc/*.cu if none is named

Compiles with the flags of setup.py. Exit status 1 if a kernel keeps more than 64 bytes in local memory, 2 without nvcc.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
LOCAL_LIMIT = 64  # bytes of a thread: stack frame with what is spilled into it

COMPILING = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; bytes of a thread, but `shared` of a block, before launch adds to it."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int

    @property
    def local(self) -> int:
        return max(self.stack, self.spilled)

    @property
    def threads(self) -> int:
        """How many may live on a multiprocessor of 65536 registers, which a warp takes by 256."""
        return min(2048, 65536 // (-(-self.registers // 8) * 256) * 32)

    @property
    def ok(self) -> bool:
        return self.local <= LOCAL_LIMIT


def parse(output: str) -> list[Kernel]:
    """What `nvcc -Xptxas -v` prints."""
    kernels, name, architecture, stack, spilled = [], "", "", 0, 0
    for line in output.splitlines():
        if found := COMPILING.search(line):
            (name, architecture), stack, spilled = found.groups(), 0, 0
        elif name and (found := FRAME.search(line)):
            stack, spilled = int(found[1]), max(int(found[2]), int(found[3]))
        elif name and (found := USED.search(line)):
            kernels.append(Kernel(name, architecture, int(found[1]), int(found[2] or 0), stack, spilled))
            name = ""
    return kernels


DTYPES, FORMS = ("f32", "bf16", "f16", "any"), ("forward_kl", "reverse_kl", "cross_entropy", "general")


def readable(mangled: str) -> str:
    """_ZN6fastkd3gpu17divergence_kernelILi1ELi1ELNS0_4FormE0ELb1EE... -> divergence bf16 bf16 forward_kl staged"""
    found = re.match(r"_ZN6fastkd3gpu\d+?([a-z]\w*?)_kernel(?:I(.*?)EE)?", mangled)
    if not found:
        return mangled
    words = [found[1]]
    for kind, number in re.findall(r"(Li|LNS0_4FormE|Lb)(\d)", found[2] or ""):
        words.append({"Li": DTYPES, "LNS0_4FormE": FORMS, "Lb": ("", "staged")}[kind][int(number)])
    return " ".join(word for word in words if word)


def builder() -> ModuleType:
    """setup.py, as a module."""
    spec = importlib.util.spec_from_file_location("fastkd_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled(command: list[str], source: Path) -> str:
    """The compiler's report on a source."""
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*command, "-Xptxas", "-v", "-c", source, "-o", Path(folder, "out.o")], capture_output=True, text=True
        )
    if result.returncode:
        raise SystemExit(f"{source} does not compile:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def main(names: list[str]) -> int:
    """Compiles, prints the table, returns the exit status."""
    from rich.console import Console
    from rich.table import Table

    setup = builder()
    nvcc = setup.find_nvcc()
    if nvcc is None:
        print("nvcc was found neither in $CUDA_HOME, nor on PATH, nor among the pip packages: nothing was compiled")
        return 2
    sources = [Path(name) for name in names] or sorted((ROOT / "csrc").glob("*.cu"))
    command = setup.nvcc_command(nvcc, *setup.NVCCFLAGS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda source: compiled(command, source), sources))
    kernels = sorted((k for report in reports for k in parse(report)), key=lambda k: (readable(k.name), k.architecture))
    table = Table("kernel", "architecture", "registers", "threads", "shared", "stack", "spilled", "")
    for k in kernels:
        verdict = "" if k.ok else "[red]too much local memory"
        table.add_row(
            readable(k.name), k.architecture, *map(str, (k.registers, k.threads, k.shared, k.stack, k.spilled)), verdict
        )
    Console(width=120).print(table)
    bad = [k for k in kernels if not k.ok]
    print(f"{len(kernels)} kernels, {len(bad)} with more than {LOCAL_LIMIT} bytes in local memory")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
