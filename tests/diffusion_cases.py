"""What every loss of fastkd.diffusion is held to: a case is a loss, its literal transcription, and arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SAMPLES, SHAPE = 4, (3, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def latents(*names: str, seed: int = 0, n: int = SAMPLES, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """Standard normal, float64, on the CPU wherever the tests are."""
    draw = seeded(seed)
    return {name: torch.randn(n, *shape, generator=draw, dtype=torch.float64, device="cpu") for name in names}


def rows(**values: tuple[float, ...]) -> dict[str, Tensor]:
    """One number for each sample."""
    return {name: torch.tensor(x, dtype=torch.float64, device="cpu") for name, x in values.items()}


@dataclass(frozen=True)
class Case:
    """``loss(**inputs, **settings, reduction=, on_nan=)`` against ``literal(**inputs, **settings)``, which gives
    the losses [B] of float64 inputs and detaches what the paper does."""

    loss: Callable[..., Any]
    literal: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    learns: tuple[str, ...]  # inputs that get a gradient; the others are constants
    settings: dict[str, Any] = field(default_factory=dict)
    couples: bool = False  # a sample's loss depends on the others'

    def leaves(self, dtype: torch.dtype = torch.float64, rows: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Fresh inputs that all require grad; latents in a dtype, what is one number for a sample in another."""
        cast = {n: x.clone().to(dtype if x.dim() > 1 else rows) for n, x in self.inputs.items()}
        return {n: x.requires_grad_() for n, x in cast.items()}

    def __call__(self, inputs: dict[str, Tensor], **kwargs: Any) -> Any:
        return self.loss(**inputs, **{**self.settings, **kwargs})

    def truth(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.literal(**inputs, **self.settings)
