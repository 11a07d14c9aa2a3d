"""The losses as modules that own settings and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fastkd.divergences import Divergence, get
from fastkd.losses import Teacher, kd_loss
from fastkd.sources import Head

__all__ = ["DistillLoss"]

KEYWORDS = {name for name, p in inspect.signature(kd_loss).parameters.items() if p.kind is p.KEYWORD_ONLY}


class DistillLoss(torch.nn.Module):
    """:func:`fastkd.kd_loss` with its settings given once. In plain PyTorch::

        criterion = DistillLoss("reverse_kl", temperature=2.0, reduction="batchmean")
        criterion(student, teacher, weights=mask)
        # is
        fastkd.kd_loss(student, teacher, "reverse_kl", temperature=2.0, reduction="batchmean", weights=mask)

    Args:
        divergence: a name or an object of :mod:`fastkd.divergences`.
        settings: any keyword of kd_loss; a keyword of the call overrides them.
    """

    def __init__(self, divergence: str | Divergence = "forward_kl", **settings: Any) -> None:
        super().__init__()
        get(divergence)
        unknown = set(settings) - KEYWORDS
        if unknown:
            raise TypeError(f"settings must be keywords of fastkd.kd_loss, got {sorted(unknown)}")
        self.divergence, self.settings = divergence, settings

    def forward(self, student: Tensor | Head, teacher: Teacher, **overrides: Any) -> Tensor:
        """The loss of :func:`fastkd.kd_loss`."""
        return kd_loss(student, teacher, self.divergence, **{**self.settings, **overrides})

    def extra_repr(self) -> str:
        return ", ".join([repr(self.divergence), *(f"{k}={v!r}" for k, v in self.settings.items())])
