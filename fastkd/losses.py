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
from fastkd.normal_form import (
    DenseSource,
    MixedSource,
    PerToken,
    SparseSource,
    TeacherSource,
    common_vocab,
    described,
    teacher_source,
)
from fastkd.problem import KD, TENSOR, KDTensors
from fastkd.sources import Head, Labels, Mixture, Samples, TopK
from fastkd.targets import Target

__all__ = ["kd_loss"]

Teacher = Tensor | Head | TopK | Samples | Labels | Mixture


def kd_loss(
    student: Tensor | Head,
    teacher: Teacher,
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
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss between a student and a teacher, without the logits of either.

    For two heads and the default arguments it computes, in plain PyTorch::

        q = F.log_softmax(F.linear(h_s, W_s).float() / temperature, -1)
        p = F.log_softmax(F.linear(h_t, W_t).float() / temperature, -1)
        F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()

    Args:
        student: logits [..., V] or a :class:`~fastkd.Head`.
        teacher: logits, a Head (its hidden size may differ), :class:`~fastkd.TopK`, :class:`~fastkd.Samples`,
            :class:`~fastkd.Labels` or a :class:`~fastkd.Mixture` of them, with the student's leading dimensions. Like
            any argument it receives gradients if it requires them: freeze or detach what should not.
        divergence: a name or an object of :mod:`fastkd.divergences`; objects add and scale. Labels and Samples give a
            cross-entropy, which "forward_kl" stands for.
        temperature: divides the logits of both; a float or [...] above 0.
        teacher_temperature: the teacher's own; None means ``temperature``. Log-probabilities that are stored at another
            one are brought to it, or refused where that cannot be exact (see TopK); Labels and Samples have none.
        t_squared: multiply the divergence and its gradient by ``temperature ** 2`` (Hinton et al., 2015).
        weights: [...], a factor per token, bool or float. 0 leaves the token out altogether, NaNs in it too.
        labels: [...] int64 or int32. Adds cross-entropy at temperature 1 from the same logits:
            ``(1 - label_weight) * divergence + label_weight * F.cross_entropy(logits, labels)``.
        label_weight: a float or [...].
        ignore_index: a token with this label is left out altogether, as by weight 0.
        target: transform of a teacher over the whole vocabulary, see :mod:`fastkd.targets`.
        reduction: "none" gives weights * loss per token, [...]; "sum" their sum; "mean" divides it by the sum of the
            weights (the number of tokens not ignored, without weights; 0 where nothing is left); "batchmean" divides it
            by the size of the first dimension (1 where there is none), as ``F.kl_div`` does.
        num_tokens: the divisor of "mean" instead of the sum of the weights: the count over all micro-batches or ranks.
        vocab: vocabularies of different size: "error"; "truncate" to the smaller and renormalise (a TopK's ids
            beyond the student's are left out); "pad" the smaller with entries of probability 0 (dense teachers).
        chunk_tokens: tokens whose logits are alive at a time; None: by ``memory_budget``.
        memory_budget: bytes that the logits of a chunk may take; None: 1 GiB on a GPU, on the CPU 2**24 logits of a
            source within 256 and 1,024 tokens (32 MiB for a vocabulary of 32,000 in bfloat16 and 512 tokens).
        backend: "reference", "torch", "cpu", "triton", "cuda"; None: the first that can serve (see ``fastkd doctor``).

    Returns:
        A float32 tensor (float64 for float64 inputs), scalar or [...] for "none".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Memory beside the gradients, in bytes: a chunk's logits, n V b with b the bytes of a logit of all heads together
    (4 for two heads in bfloat16; 32 more with the torch backend, whose row op makes tensors [n, V]). n is
    memory_budget / (V b) rounded down to a multiple of 128, or 128. And, where there is more than one chunk and a
    weight of 16 bits requires grad, the sum of its gradient: 4 V D in float32 if that is within the budget (on a GPU
    the GEMM adds to it) or the dtype is float16, else, and on the CPU, V D for bfloat16 (24 bits, 16 of them in the
    gradient itself); torch backend: 4 V D. On a GPU, where tokens may be ignored, a copy of a chunk's hidden states.
    On the CPU, up to 1 GiB that is freed stays for the next call. ``fastkd plan`` adds up all but that copy.
    Differentiable in reverse; further derivatives and forward mode are exact too, with the logits in memory.
    Sources: Hinton et al. 2015 (arXiv:1503.02531); Agarwal et al. 2024 (GKD, arXiv:2306.13649).
    """
    kwargs = locals()
    if torch.compiler.is_compiling():
        from fastkd import traced

        return traced.kd_loss(**kwargs)
    return _kd_loss(**kwargs)


def _kd_loss(
    student: Tensor | Head,
    teacher: Teacher,
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
    memory_budget: int | None,
    backend: str | None,
) -> Tensor:
    _check_settings(reduction, vocab, num_tokens, target)
    checks.chunking(chunk_tokens, memory_budget)
    s, t = DenseSource("student", student), teacher_source("teacher", teacher)
    row = PerToken.of(s, t)
    size_of_vocab = common_vocab(s, t, vocab)
    s_temperature = t_temperature = row("temperature", temperature, above=0.0)
    wanted = temperature if teacher_temperature is None else teacher_temperature
    if teacher_temperature is not None:
        if isinstance(t, SparseSource) and not isinstance(t.source, TopK):
            raise ValueError(f"teacher_temperature must be None for {described(t.source)}, got {teacher_temperature!r}")
        t_temperature = row("teacher_temperature", teacher_temperature, above=0.0)
    square = s_temperature.square() if t_squared else None
    compared = _compared(t, divergence, target, labels, label_weight, row, square)
    t = _spread(t, compared.terms, target, size_of_vocab)

    ids, mask = compared.labels, _mask(t, compared.labels, ignore_index)
    if ids is not None:
        ids = ids.reshape(row.size).masked_fill(ids.reshape(row.size) == ignore_index, 0)
    target_name, target_fields, target_tensors = _target(target, row)
    spec = KD(
        backend="",
        chunk=chunk_tokens,
        budget=memory_budget,
        student=s.side,
        teacher=t.spec(row, wanted, size_of_vocab, vocab),
        vocab=size_of_vocab,
        total=reduction != "none",
        terms=tuple((d.name, d.params) for d in compared.terms),
        target=target_name,
        target_fields=target_fields,
    )
    x, w, b = s.tensors(row, size_of_vocab)
    assert x is not None
    tensors = KDTensors(
        _factor(row, weights, None if mask is None else mask.reshape(row.size), reduction, num_tokens),
        *(x, w, b),
        t.tensors(row, size_of_vocab),
        s_temperature,
        t_temperature,
        compared.term_weights,
        ids,
        compared.label_weight,
        target_tensors,
    )
    (out,) = apply(spec, tensors.flat(), backend)
    return out if spec.total else out.reshape(row.lead)


def _check_settings(reduction: Any, vocab: Any, num_tokens: Any, target: Any) -> None:
    checks.is_one_of("reduction", reduction, ("none", "sum", "mean", "batchmean"))
    checks.is_one_of("vocab", vocab, ("error", "truncate", "pad"))
    if num_tokens is not None and reduction != "mean":
        raise ValueError(f"num_tokens is the divisor of reduction='mean', got reduction={reduction!r}")
    if target is not None and not isinstance(target, Target):
        raise TypeError(f"target must be a fastkd.targets.Target, got {type(target).__name__}")


class _Compared(NamedTuple):
    """What the student is held against, apart from the teacher's rows: divergences and labels with their weights."""

    terms: tuple[Divergence, ...]
    term_weights: Tensor  # [K, B, N]
    labels: Tensor | None  # [...]
    label_weight: Tensor | None  # [B, N]


def _compared(
    t: TeacherSource,
    divergence: str | Divergence,
    target: Target | None,
    labels: Tensor | None,
    label_weight: float | Tensor,
    row: PerToken,
    square: Tensor | None,
) -> _Compared:
    """Each divergence weighs its own weight times (1 - label_weight) times T^2."""
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
    estimate = _only_cross_entropy(t, target, labels)
    if estimate is not None:
        if any(d not in CROSS_ENTROPIES for d in terms):
            raise ValueError(f"{estimate}, which forward_kl alone allows, got {divergence!r}")
        terms, weights = (divergences.CrossEntropy(),), [sum(weights[1:], start=weights[0])]
    common = [x for x in (None if hard is None else 1 - hard, square) if x is not None]
    weights = [math.prod(common, start=w) for w in weights]
    stacked = torch.stack(weights) if len(weights) > 1 or common else weights[0].unsqueeze(0)
    return _Compared(terms, stacked, labels, hard)


CROSS_ENTROPIES = (divergences.ForwardKL(), divergences.CrossEntropy())


def _only_cross_entropy(t: TeacherSource, target: Target | None, labels: Tensor | None) -> str | None:
    """Why the comparison is by cross-entropy, in the first half of a sentence; None: by any divergence."""
    source = t.source if isinstance(t, SparseSource) else None
    if isinstance(source, Labels):
        if labels is not None:
            raise ValueError("labels and label_weight go with another teacher: a Labels teacher is labels already")
        return "a Labels teacher is compared by its cross-entropy"
    if isinstance(source, Samples):
        return "a Samples teacher estimates the cross-entropy"
    if target is not None and not target.normalized:
        return f"{type(target).__name__} gives weights"
    return None


def _spread(t: TeacherSource, terms: tuple[Divergence, ...], target: Target | None, vocab: int) -> TeacherSource:
    """A sparse teacher as a row over the vocabulary, a chunk at a time, where its K entries do not say it all."""
    if not isinstance(t, SparseSource):
        return t
    even = isinstance(t.source, TopK) and t.source.tail == "uniform"
    if target is not None:
        if not isinstance(t.source, TopK) or not t.sums_to_one:
            raise ValueError(
                "target transforms a teacher over the whole vocabulary: logits, a Head, a Mixture or a TopK with the "
                f"tail 'renormalize' or 'uniform', got {type(target).__name__} with {described(t.source)}"
            )
    elif not even or all(d in CROSS_ENTROPIES for d in terms):
        _check_support(t, terms, vocab)
        return t
    return MixedSource(t.name, Mixture((t.source,)))


def _check_support(t: SparseSource, terms: tuple[Divergence, ...], vocab: int) -> None:
    """Divergences that are infinite where the teacher has nothing and the student something."""
    if not isinstance(t.source, TopK) or t.source.tail != "renormalize" or t.ids.shape[-1] >= vocab:
        return
    for d in terms:
        if d.infinite_without_p:
            raise ValueError(
                f"divergence {d.name!r} is infinite where the teacher has no mass, so tail='renormalize' gives "
                "infinity: use 'bucket', 'renormalize_both' or 'uniform'"
            )


def _mask(t: TeacherSource, labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """[...] False where a label, in any place, is ignore_index; None for all tokens."""
    sources = t.members if isinstance(t, MixedSource) else [t]
    ids = [x.ids for x in sources if isinstance(x, SparseSource) and isinstance(x.source, Labels)]
    masks = [x != ignore_index for x in (labels, *ids) if x is not None]
    return torch.stack(masks).all(0) if len(masks) > 1 else masks[0] if masks else None


def _factor(
    row: PerToken, weights: Tensor | None, mask: Tensor | None, reduction: str, num_tokens: float | Tensor | None
) -> Tensor:
    """[B, N]: weights over the divisor of the reduction, 0 for an ignored token; one number, expanded, where there are
    no weights and no token is ignored."""
    if weights is None and mask is None:
        w, count = row("weights", 1.0)[:1, :1], max(math.prod(row.size), 1)
    else:
        if weights is not None:
            checks.is_tensor("weights", weights)
            checks.has_shape("weights", weights, row.lead, " like the student's leading dimensions")
        w, count = row("weights", 1.0 if weights is None else weights).contiguous(), None
        if mask is not None:
            w = torch.where(mask, w, 0.0)
    return (w / _divisor(row, w, count, reduction, num_tokens)).expand(row.size)


def _divisor(
    row: PerToken, w: Tensor, count: int | None, reduction: str, num_tokens: float | Tensor | None
) -> Tensor | float:
    """Of a reduction: ``count`` tokens, or None for the sum of the weights w [B, N]; 1 instead of 0."""
    if reduction == "batchmean":
        return max(row.lead[0] if row.lead else 1, 1)
    if reduction != "mean":
        return 1
    divisor: Tensor | float
    if num_tokens is None:
        divisor = w.sum() if count is None else count
    elif isinstance(num_tokens, Tensor):
        row.check_device("num_tokens", num_tokens)
        checks.has_shape("num_tokens", num_tokens, ())
        divisor = num_tokens.to(row.dtype)
    else:
        divisor = checks.finite_number("num_tokens", num_tokens)
        if divisor < 0:
            raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
    return torch.where(divisor == 0, 1.0, divisor) if isinstance(divisor, Tensor) else divisor or 1


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
