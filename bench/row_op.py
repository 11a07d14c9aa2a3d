"""The row ops alone: what a divergence, or a listed teacher, costs on logits that are there."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fastkd import divergences, rows_cpu
from fastkd.problem import Side
from fastkd.rows_torch import Rows
from fastkd.sparse import Listed

Run = Callable[[], object]


def logits(n: int, v: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor:
    """[n, v] normal numbers with a standard deviation of 2, drawn in their dtype."""
    g = torch.Generator(device).manual_seed(seed)
    return torch.randn(n, v, generator=g, dtype=dtype, device=device).mul_(2)


def settings(n: int, v: int, device: torch.device | str, name: str = "forward_kl", **changes: Any) -> Rows:
    """n rows that all count, at temperature 1."""
    ones = torch.ones(n, device=device)
    divergence = divergences.AlphaBeta(0.5, 0.5) if name == "alpha_beta" else divergences.get(name)
    return Rows(v, Side(), Side(), ones, ones, ones, (divergence,), ones[None], **changes)


def row_op(
    name: str, n: int, v: int, dtype: torch.dtype, rows: ModuleType = rows_cpu, device: torch.device | str = "cpu"
) -> Run:
    """Losses and gradient of n rows under one divergence."""
    s, t = (logits(n, v, dtype, device, seed) for seed in range(2))
    grad, row = torch.empty_like(s), settings(n, v, device, name)
    return lambda: rows.divergence(s, t, grad, row)


def listed(n: int, v: int, k: int, device: torch.device | str, tail: str = "bucket") -> Listed:
    """A teacher's k different entries, one in each k-th of the vocabulary, with half of its mass."""
    g, step = torch.Generator(device).manual_seed(2), v // k
    ids = torch.randint(step, (n, k), generator=g, device=device) + step * torch.arange(k, device=device)
    half = torch.full((n,), 0.5, device=device).log()
    log_p = torch.randn(n, k, generator=g, device=device).log_softmax(-1) + half[:, None]
    return Listed(tail, ids, log_p, half)


def sparse_op(n: int, v: int, k: int, dtype: torch.dtype, rows: ModuleType, device: torch.device | str) -> Run:
    """Losses and gradient of n rows against k listed entries and the rest."""
    s, t = logits(n, v, dtype, device), listed(n, v, k, device)
    grad, row = torch.empty_like(s), settings(n, v, device)
    return lambda: rows.sparse(s, t, grad, row)
