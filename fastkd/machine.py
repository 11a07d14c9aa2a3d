"""The machine that numbers are measured on: what it is, which devices it has, and how much memory a block takes."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd import rows_cpu
from fastkd.backends import extension

# what row ops could make use of, in the kernel's spelling
INSTRUCTION_SETS = "avx2 fma f16c avx512f avx512bw avx512_bf16 avx512_fp16 amx_bf16 asimd asimdhp sve".split()


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, versions and commit, for whoever reads a stored number. Plain data, ready for JSON."""
    module, device = extension()[0], torch.device(device)
    return {
        "device": str(device),
        "name": device_name(device),
        "threads": torch.get_num_threads(),
        "isa": None if module is None else module.isa(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "fastkd": fastkd.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def line(machine: dict[str, Any]) -> str:
    """What describe() gave, on one line."""
    parts = [machine["name"]]
    if machine["device"] == "cpu":
        parts += [f"{machine['threads']} threads", machine["isa"] or "no C++ row ops"]
    commit = f" ({machine['commit']})" if machine["commit"] else ""
    versions = f"torch {machine['torch']}, fastkd {machine['fastkd']}{commit}, Python {machine['python']}"
    return f"{', '.join(parts)}; {versions}, {machine['date']}"


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that the package lies in, with + where files differ from it; None outside of one."""
    root = Path(fastkd.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "fastkd", "csrc", "kernels"]).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + ("+" if changed else "")


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


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()["model"] if device.type == "cpu" else f"{device.type} of {processor()['model']}"


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


def available_bytes(device: torch.device | str) -> int | None:
    """Memory that can still be taken on a device, as far as the system tells."""
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for the next tensor
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min(left, _container_left() or left)


def _container_left(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves, files that can be dropped from memory not counted; None without a limit."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(1, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no cgroup v2, or "max"
        return None


class PeakMemory:
    """Peak memory of the block above what was taken before it; `bytes` is None where nothing measures it.

    On the CPU it is the resident set, whose high-water mark sees every allocator, the C++ row ops' too (a profiler of
    torch's own would not); on CUDA, what torch's allocator has handed out.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __enter__(self) -> PeakMemory:
        self.before: int | None = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            try:
                rows_cpu.release()  # freed pages back to the kernel: reusing them would hide their use
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
                self.before = resident("VmRSS")
            except (OSError, AttributeError, TypeError):  # no /proc, no glibc, not permitted
                pass
        return self

    def __exit__(self, *error: object) -> None:
        if self.before is None:
            return
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else resident("VmHWM")
        self.bytes = max(0, peak - self.before)


def resident(name: str) -> int:
    """Bytes that /proc/self/status gives for `name`."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))
