"""Which tile, how many warps and stages a kernel runs with: a table, and who reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """BLOCK columns at a time by num_warps warps; num_stages tiles are on their way at a time.

    No thread has more than maxnreg registers (NVIDIA): with 64, two programs of 16 warps share a multiprocessor.
    """

    block: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# architecture -> dtype of the rows (float16 is bfloat16's), or "find" for the search for the k largest -> configuration
TABLE: dict[str, dict[torch.dtype | str, Config]] = {
    "sm_80": {
        torch.bfloat16: Config(4096, 16, 2, 64),
        torch.float32: Config(4096, 16, 2, 64),
        "find": Config(4096, 16, 2),
    },
    "sm_90": {
        torch.bfloat16: Config(8192, 32, 3),
        torch.float32: Config(4096, 16, 2, 64),
        "find": Config(4096, 16, 2),
    },
    "sm_100": {
        torch.bfloat16: Config(4096, 16, 3),
        torch.float32: Config(4096, 16, 2),
        "find": Config(4096, 16, 2),
    },
    "gfx942": {
        torch.bfloat16: Config(4096, 8, 1),
        torch.float32: Config(4096, 8, 1),
        "find": Config(2048, 8, 1),
    },
}
INTERPRETED = Config(128, 4, 1)  # small, so that small rows have several tiles
LISTED = 1024  # of a list, at a time
PAIRS = 4096  # of a list that may hold an entry twice: comparisons at a time

_forced: ContextVar[Config | str | None] = ContextVar("fastkd_config", default=None)


def of(architecture: str, key: torch.dtype | str) -> Config:
    """The entry of the table for an architecture, or for the newest older one of its maker."""
    known = [name for name in TABLE if name[:2] == architecture[:2]]
    older = [name for name in known if _number(name) <= _number(architecture)]
    return TABLE[max(older or known[:1], key=_number)][torch.bfloat16 if key == torch.float16 else key]


def _number(architecture: str) -> int:
    """90 of sm_90, 0x942 of gfx942"""
    return int(architecture[3:], 16) if architecture.startswith("gfx") else int(architecture[3:])


def pick(x: torch.Tensor, key: str | None = None) -> Config:
    """The configuration for rows x [n, V], or of that key, on their device."""
    forced = _forced.get()
    if isinstance(forced, Config):
        return forced
    if forced is None and not x.is_cuda:
        return INTERPRETED
    return of(forced or architecture(x.device), key or x.dtype)


def architecture(device: torch.device) -> str:
    """sm_90 for a device of compute capability 9.0, gfx942 for one of that name."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextmanager
def forced(config: Config | str) -> Iterator[None]:
    """Within the context every kernel runs with this configuration, or with those of this architecture."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)
