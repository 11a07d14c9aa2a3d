"""Where a distribution comes from. A bare tensor [..., V] is logits; the others are dataclasses of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree

__all__ = ["TAILS", "Head", "Labels", "Mixture", "Samples", "TopK"]

TAILS = ("bucket", "renormalize", "renormalize_both", "uniform", "drop")


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


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher that is known on K entries of the vocabulary, S, and on the mass R that they leave.

    With p the teacher, P its sum over S, q the student's softmax and Q its sum over S, forward KL is

    ====================  ============================================================================================
    tail                  loss
    ====================  ============================================================================================
    ``bucket``            sum_S p (log p - log q) + R (log R - log(1 - Q)): all that is not listed is one outcome more
    ``renormalize``       sum_S p/P (log p/P - log q): the teacher has nothing outside of S
    ``renormalize_both``  sum_S p/P (log p/P - log q/Q): what lies outside of S has no part in it
    ``uniform``           R is spread evenly over the V - K others
    ``drop``              sum_S p (log p - log q): no divergence; it can be negative
    ====================  ============================================================================================

    and any other divergence is the same sum of its terms over the outcomes: the listed ones and, for bucket and
    renormalize, all others as one. For bucket and uniform p and R are divided by P + R, which is 1 but for rounding.

    Args:
        ids: [..., K] int32 or int64 in [0, V), in any order, each once in a row; -1 is padding.
        log_probs: [..., K] natural logarithms, float32, bfloat16, float16 or float64; -inf counts as padding.
        tail: see above.
        temperature: the one at which ``log_probs`` were computed. The renormalised tails can be brought to another one
            exactly; to the others another teacher_temperature is an error.
        log_tail: [...] log R, as :func:`fastkd.topk` and the teacher cache give it. None: log(1 - P), which rounding
            leaves inexact: where P rounds to 1, R is 0, and divergences that divide by it (reverse KL) are infinite.
    """

    ids: Tensor
    log_probs: Tensor
    tail: str = "bucket"
    temperature: float = 1.0
    log_tail: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """A teacher known by samples (random-sampling KD): the loss is the estimate -sum_k weights_k log q(ids_k) of the
    cross-entropy. Its gradient is that of forward KL in expectation; its value lacks the teacher's entropy.

    Args:
        ids: [..., K] int32 or int64 in [0, V), drawn from a proposal r; an id may stand twice; -1 is padding. A row of
            padding adds nothing.
        weights: [..., K], not negative: p(ids) / r(ids) / K, so 1 / K for samples of the teacher itself.
        normalize: divide the weights by their sum in each row.
    """

    ids: Tensor
    weights: Tensor
    normalize: bool = False


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several teachers as one, p = sum_m weights_m p_m: logits, Head, Labels, TopK with the tail "renormalize" or
    "uniform", Samples with normalize=True.

    Args:
        teachers: at least one, with the student's leading dimensions.
        weights: M numbers, or a tensor [M] or [..., M], not negative; divided by their sum. None: equal.
    """

    teachers: Sequence[Tensor | Head | Labels | TopK | Samples]
    weights: Sequence[float] | Tensor | None = None


for _source in (Head, Labels, TopK, Samples, Mixture):
    _pytree.register_dataclass(_source)
