"""kd_loss: checks its inputs once, puts them into normal form, and enters the one driver."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import checks, divergences
from fastkd.divergences import Divergence
from fastkd.fused import apply
from fastkd.normal_form import DenseSource, PerToken, common_vocab
from fastkd.problem import KD, TENSOR, KDTensors
from fastkd.sources import Head, Labels
from fastkd.targets import Target

__all__ = ["kd_loss"]

Source = Tensor | Head


def kd_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | Labels,
    divergence: str | Divergence = "forward_kl",
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    t_squared: bool = False,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float | Tensor = 0.0,
    ignore_index: int = -100,
    target: Target | None = None,
    reduction: str = "mean",
    num_tokens: float | Tensor | None = None,
    vocab: str = "error",
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss between a student and a teacher, without the logits of either.

    For two heads and the default arguments it computes, in plain PyTorch::

        q = F.log_softmax(F.linear(h_s, W_s).float() / temperature, -1)
        p = F.log_softmax(F.linear(h_t, W_t).float() / temperature, -1)
        F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()

    Args:
        student: logits [..., V] or a :class:`~fastkd.Head`.
        teacher: logits, a Head (its hidden size may differ) or :class:`~fastkd.Labels`, with the student's leading
            dimensions. Like any argument it receives gradients if it requires them: freeze or detach what should not.
        divergence: a name or an object of :mod:`fastkd.divergences`; objects add and scale.
        temperature: divides the logits of both; a float or [...] above 0.
        teacher_temperature: the teacher's own; None means ``temperature``.
        t_squared: multiply the divergence and its gradient by ``temperature ** 2`` (Hinton et al., 2015).
        weights: [...], a factor per token, bool or float. 0 leaves the token out altogether, NaNs in it too.
        labels: [...] int64 or int32. Adds cross-entropy at temperature 1 from the same logits:
            ``(1 - label_weight) * divergence + label_weight * F.cross_entropy(logits, labels)``.
        label_weight: a float or [...].
        ignore_index: a token with this label is left out altogether, as by weight 0.
        target: transform of the teacher, see :mod:`fastkd.targets`.
        reduction: "none" gives weights * loss per token, [...]; "sum" their sum; "mean" divides it by the sum of the
            weights (the number of tokens not ignored, without weights; 0 where nothing is left); "batchmean" divides it
            by the size of the first dimension (1 where there is none), as ``F.kl_div`` does.
        num_tokens: the divisor of "mean" instead of the sum of the weights: the count over all micro-batches or ranks.
        vocab: vocabularies of different size: "error"; "truncate" to the smaller and renormalise; "pad" the smaller
            with entries of probability 0.
        chunk_tokens: tokens whose logits are alive at a time; None: by the size of the vocabulary.
        backend: "reference", "torch", "cpu"; None: the first that can serve (see ``fastkd doctor``).

    Returns:
        A float32 tensor (float64 for float64 inputs), scalar or [...] for "none".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Memory beside the gradients: ``chunk_tokens`` x V logits for each dense source (by default 2**24 / V tokens, within
    256 and 1024), and for a bfloat16 weight that requires grad, whose gradient is summed in float32 and kept in 24 bits
    on the way, 1 byte an entry (torch backend: 4). On the CPU, up to 1 GiB that is freed stays for the next call.
    Differentiable in reverse; further derivatives and forward mode are exact too, with the logits in memory.
    Sources: Hinton et al. 2015 (arXiv:1503.02531); Agarwal et al. 2024 (GKD, arXiv:2306.13649).
    """
    kwargs = locals()
    if torch.compiler.is_compiling():
        from fastkd import traced

        return traced.kd_loss(**kwargs)
    return _kd_loss(**kwargs)


def _kd_loss(
    student: Source,
    teacher: Source | Labels,
    divergence: str | Divergence,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    t_squared: bool,
    weights: Tensor | None,
    labels: Tensor | None,
    label_weight: float | Tensor,
    ignore_index: int,
    target: Target | None,
    reduction: str,
    num_tokens: float | Tensor | None,
    vocab: str,
    chunk_tokens: int | None,
    backend: str | None,
) -> Tensor:
    _check_settings(reduction, vocab, chunk_tokens, num_tokens, target)
    s = DenseSource("student", student)
    t = None if isinstance(teacher, Labels) else DenseSource("teacher", teacher)
    row = PerToken.of(s, t)
    size_of_vocab = s.vocab if t is None else common_vocab(s, t, vocab)
    s_temperature = t_temperature = row("temperature", temperature, above=0.0)
    if teacher_temperature is not None:
        t_temperature = row("teacher_temperature", teacher_temperature, above=0.0)
    square = s_temperature.square() if t_squared else None
    if isinstance(teacher, Labels):
        compared = _with_labels(teacher, divergence, target, labels, label_weight, row, square)
    else:
        compared = _with_dense(divergence, target, labels, label_weight, row, square)

    ids, mask = compared.labels, None
    if ids is not None:
        ids = ids.reshape(row.size)
        mask = ids != ignore_index
        ids = ids.masked_fill(~mask, 0)
    target_name, target_fields, target_tensors = _target(target, row)
    spec = KD(
        backend="",
        chunk=chunk_tokens,
        student=s.side,
        teacher=None if t is None else t.side,
        vocab=size_of_vocab,
        total=reduction != "none",
        terms=tuple((d.name, d.params) for d in compared.terms),
        target=target_name,
        target_fields=target_fields,
        label_smoothing=compared.smoothing,
        label_tempered=t is None,
    )
    factor = _factor(row, weights, mask, reduction, num_tokens)
    sources = *s.tensors(row), *((None, None, None) if t is None else t.tensors(row))
    settings = s_temperature, t_temperature, compared.term_weights, ids, compared.label_weight
    tensors = KDTensors._make((factor, *sources, *settings, target_tensors))
    (out,) = apply(spec, tensors.flat(), backend)
    return out if spec.total else out.reshape(row.lead)


def _check_settings(reduction: Any, vocab: Any, chunk_tokens: Any, num_tokens: Any, target: Any) -> None:
    checks.is_one_of("reduction", reduction, ("none", "sum", "mean", "batchmean"))
    checks.is_one_of("vocab", vocab, ("error", "truncate", "pad"))
    checks.chunk_tokens(chunk_tokens)
    if num_tokens is not None and reduction != "mean":
        raise ValueError(f"num_tokens is the divisor of reduction='mean', got reduction={reduction!r}")
    if target is not None and not isinstance(target, Target):
        raise TypeError(f"target must be a fastkd.targets.Target, got {type(target).__name__}")


class _Compared(NamedTuple):
    """What the student is held against, apart from the teacher's rows: divergences and labels with their weights."""

    terms: tuple[Divergence, ...]
    term_weights: Tensor | None  # [K, B, N]
    labels: Tensor | None  # [...]
    label_weight: Tensor | None  # [B, N]
    smoothing: float


def _with_labels(
    teacher: Labels,
    divergence: str | Divergence,
    target: Target | None,
    labels: Tensor | None,
    label_weight: float | Tensor,
    row: PerToken,
    square: Tensor | None,
) -> _Compared:
    """A Labels teacher: cross-entropy alone."""
    if labels is not None or isinstance(label_weight, Tensor) or label_weight != 0:
        raise ValueError("labels and label_weight go with a dense teacher: a Labels teacher is labels already")
    if divergences.get(divergence) != divergences.ForwardKL():
        raise ValueError(f"a Labels teacher is compared by forward_kl (its cross-entropy), got {divergence!r}")
    if target is not None:
        raise ValueError(f"target transforms a dense teacher, got {type(target).__name__} with a Labels teacher")
    smoothing = checks.finite_number("teacher.label_smoothing", teacher.label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"teacher.label_smoothing must lie in [0, 1], got {smoothing}")
    return _Compared(
        (), None, row.ids("teacher.ids", teacher.ids), row("1", 1.0) if square is None else square, smoothing
    )


def _with_dense(
    divergence: str | Divergence,
    target: Target | None,
    labels: Tensor | None,
    label_weight: float | Tensor,
    row: PerToken,
    square: Tensor | None,
) -> _Compared:
    """A dense teacher: each divergence weighs its own weight times (1 - label_weight) times T^2."""
    hard = None
    if labels is not None:
        labels, hard = row.ids("labels", labels), row("label_weight", label_weight)
    elif isinstance(label_weight, Tensor) or label_weight != 0:
        raise ValueError(f"label_weight needs labels, got labels=None and label_weight={label_weight!r}")
    pairs = divergences.get(divergence).terms
    terms, weights = tuple(d for _, d in pairs), [row("the divergence's weight", w) for w, _ in pairs]
    for d in terms:
        if divergences.REGISTRY.get(d.name) is not type(d):
            raise TypeError(f"divergence {type(d).__name__} must be registered: decorate it with divergences.register")
    if target is not None and not target.normalized:
        if any(d != divergences.ForwardKL() for d in terms):
            raise ValueError(
                f"{type(target).__name__} gives weights, which forward_kl alone allows, got {divergence!r}"
            )
        terms, weights = (divergences.CrossEntropy(),), [sum(weights[1:], start=weights[0])]
    common = [x for x in (None if hard is None else 1 - hard, square) if x is not None]
    weights = [math.prod(common, start=w) for w in weights]
    stacked = torch.stack(weights) if len(weights) > 1 or common else weights[0].unsqueeze(0)
    return _Compared(terms, stacked, labels, hard, 0.0)


def _factor(
    row: PerToken, weights: Tensor | None, mask: Tensor | None, reduction: str, num_tokens: float | Tensor | None
) -> Tensor:
    """[B, N]: weights over the divisor of the reduction, 0 for an ignored token."""
    if weights is not None:
        checks.is_tensor("weights", weights)
        checks.has_shape("weights", weights, row.lead, " like the student's leading dimensions")
    w = row("weights", 1.0 if weights is None else weights)
    if mask is not None:
        w = torch.where(mask, w, 0.0)
    if reduction == "batchmean":
        return w / max(row.lead[0] if row.lead else 1, 1)
    if reduction != "mean":
        return w
    divisor: Tensor | float
    if num_tokens is None:
        divisor = w.sum() if weights is not None or mask is not None else max(math.prod(row.size), 1)
    elif isinstance(num_tokens, Tensor):
        row.check_device("num_tokens", num_tokens)
        checks.has_shape("num_tokens", num_tokens, ())
        divisor = num_tokens.to(row.dtype)
    else:
        divisor = checks.finite_number("num_tokens", num_tokens)
        if divisor < 0:
            raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    if isinstance(divisor, Tensor):
        return w / torch.where(divisor == 0, 1.0, divisor)
    return (w[:1, :1] / (divisor or 1)).expand(row.size) if weights is None and mask is None else w / (divisor or 1)


def _target(target: Target | None, row: PerToken) -> tuple[str | None, str, tuple[Tensor, ...]]:
    """A target transform as its class, its numbers as JSON, and its tensor fields [B, N]."""
    if target is None:
        return None, "{}", ()
    numbers, tensors = {}, []
    for field in fields(target):
        value = getattr(target, field.name)
        numbers[field.name] = TENSOR if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            tensors.append(row(f"target.{field.name}", value))
    return target.key(), json.dumps(numbers), tuple(tensors)
