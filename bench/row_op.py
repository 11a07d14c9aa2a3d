"""The C++ row op alone: what a divergence costs on logits that are there."""

from collections.abc import Callable

import torch

from fastkd import divergences, rows_cpu
from fastkd.problem import Side
from fastkd.rows_torch import Rows


def row_op(name: str, n: int, v: int, dtype: torch.dtype) -> Callable[[], object]:
    """Losses and gradient of n rows under one divergence."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(n, v, generator=g).mul_(2).to(dtype) for _ in range(2))
    grad, ones = torch.empty_like(s), torch.ones(n)
    divergence = divergences.AlphaBeta(0.5, 0.5) if name == "alpha_beta" else divergences.get(name)
    rows = Rows(v, Side(), Side(), ones, ones, ones, (divergence,), ones[None])
    return lambda: rows_cpu.divergence(s, t, grad, rows)
