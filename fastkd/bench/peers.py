"""Other libraries' losses for the same work. They are measured where they are installed, after their results were
compared; to add one is to add an entry to PEERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A loss of another library; ``works`` gives for each piece of work that it has a maker of the loss."""

    name: str
    package: str  # that must be importable
    distribution: str  # whose version is stored
    works: dict[str, Callable[[], Callable[..., Tensor]]]

    def missing(self) -> str | None:
        """Why it cannot be measured here, or None."""
        return None if find_spec(self.package) else f"{self.name}: {self.distribution} is not installed"

    def loss(self, work: str) -> Callable[..., Tensor]:
        """Its loss for a piece of work; imports the library."""
        return self.works[work]()


@cache
def _no_labels(tokens: int, device: torch.device) -> Tensor:
    """Labels, which Liger asks for even where they weigh nothing; one that is not ignored for each token."""
    return torch.zeros(tokens, dtype=torch.int64, device=device)


def _liger(compiled: bool) -> Callable[[], Callable[..., Tensor]]:
    """LigerFusedLinearJSDLoss with beta=0, which there is forward KL, and without cross-entropy; a mean over tokens."""

    def make() -> Callable[..., Tensor]:
        library: Any = import_module("liger_kernel.chunked_loss")
        module = library.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled
        )

        def loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
            labels = _no_labels(hidden.shape[0], hidden.device)
            return module(hidden, weight, teacher_hidden, teacher_weight, labels)

        return loss

    return make


def _trl() -> Callable[..., Tensor]:
    """The loss of AsyncDistillationTrainer with beta=0, which there is forward KL, and its tail bucket; a mean over
    tokens. TRL calls it experimental, and keeps it to itself."""
    library: Any = import_module("trl.experimental.async_distillation.async_distillation_trainer")

    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        settings = {"beta": 0.0, "temperature": 1.0, "add_tail_bucket": True, "teacher_id_idx": None, "num_teachers": 1}
        total, *_ = library._chunked_jsd_loss(
            *(hidden, weight, None, 1.0, None, ids, log_probs.float(), torch.ones_like(ids, dtype=torch.bool)),
            **settings,
            chunk_size=library._CHUNKED_LM_HEAD_CHUNK_SIZE,
        )
        return total / hidden.shape[0]

    return loss


# Liger's default compiles; whoever cannot compile switches that off
PEERS: list[Peer] = [
    Peer("liger", "liger_kernel", "liger-kernel", {"heads": _liger(compiled=True)}),
    Peer("liger eager", "liger_kernel", "liger-kernel", {"heads": _liger(compiled=False)}),
    Peer("trl", "trl", "trl", {"sparse": _trl}),
]
