"""Where a distribution comes from. A bare tensor [..., V] is logits; the others are dataclasses of tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree

__all__ = ["Head", "Labels"]


@dataclass(frozen=True, eq=False)
class Head:
    """A distribution given by hidden states and a head; the logits are made a chunk at a time and never kept.

    In plain PyTorch::

        logits = logit_scale * F.linear(hidden, weight, bias)            # [..., V]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)

    Args:
        hidden: [..., D], float32, bfloat16 or float16 (float64 on the torch and reference backends).
        weight: [V, D] in hidden's dtype; or [..., V, D] with hidden [..., N, D]: a batch of heads, so that queries and
            keys make attention maps.
        bias: [V] (or [..., V] for a batch of heads), optional.
        softcap: Gemma's final logit soft cap, a positive float.
        logit_scale: Cohere's factor on the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Labels:
    """A teacher that is a class per token: ``F.cross_entropy(logits / temperature, ids, label_smoothing=...)``.

    Args:
        ids: [...], int32 or int64, each in [0, V) or ``ignore_index``.
        label_smoothing: mass in [0, 1] spread evenly over the vocabulary.
    """

    ids: Tensor
    label_smoothing: float = 0.0


_pytree.register_dataclass(Head)
_pytree.register_dataclass(Labels)
