"""kd_loss: checks its inputs once, puts them into normal form, and enters the one driver."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastkd import backends, checks, divergences
from fastkd.divergences import Divergence
from fastkd.fused import apply
from fastkd.problem import KD, KDTensors, Side, accumulation
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
        teacher: logits, a Head (its hidden size may differ) or :class:`~fastkd.Labels`. The leading dimensions [...] are
            the student's. Like any argument it receives gradients if it requires them: detach or freeze what should not.
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
        vocab: vocabularies of different size: "error"; "truncate" to the smaller and renormalise; "pad" the smaller with
            entries of probability 0.
        chunk_tokens: tokens whose logits are alive at a time; None: by the size of the vocabulary.
        backend: "reference", "torch", "cpu"; None: the first that can serve (see ``fastkd doctor``).

    Returns:
        A float32 tensor (float64 for float64 inputs), scalar or [...] for "none".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable in reverse, twice (the second time with the logits in memory), and in forward mode (likewise).
    Sources: Hinton et al. 2015 (arXiv:1503.02531); Agarwal et al. 2024 (GKD, arXiv:2306.13649).
    """
    kwargs = locals()
    return _traced(**kwargs) if torch.compiler.is_compiling() else _kd_loss(**kwargs)


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
    checks.is_one_of("reduction", reduction, ("none", "sum", "mean", "batchmean"))
    checks.is_one_of("vocab", vocab, ("error", "truncate", "pad"))
    if chunk_tokens is not None and (not isinstance(chunk_tokens, int) or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens must be a positive integer, got {chunk_tokens!r}")
    if num_tokens is not None and reduction != "mean":
        raise ValueError(f"num_tokens is the divisor of reduction='mean', got reduction={reduction!r}")

    s = _Dense("student", student)
    t = None if isinstance(teacher, Labels) else _Dense("teacher", teacher)
    lead, batch = s.lead, s.batch
    if t is None:
        hard = checks.is_index("teacher.ids", teacher.ids)  # type: ignore[union-attr]
        checks.has_shape("teacher.ids", hard, lead, " like the student's leading dimensions")
    else:
        if t.lead != lead:
            raise ValueError(
                f"student and teacher must have the same leading dimensions, got {list(lead)} and {list(t.lead)}"
            )
        batch = batch or t.batch
        v = _common_vocab(s, t, vocab)
    size = (math.prod(lead[:-1]), lead[-1]) if batch else (1, math.prod(lead))
    acc = torch.promote_types(accumulation(s.x.dtype), accumulation(s.x.dtype if t is None else t.x.dtype))
    row = _PerToken(lead, size, acc, s.x.device)

    s_temp = row("temperature", temperature, above=0.0)
    t_temp = s_temp if teacher_temperature is None else row("teacher_temperature", teacher_temperature, above=0.0)
    square = s_temp.square() if t_squared else None
    mask = None
    if t is None:
        if labels is not None:
            raise ValueError("labels come with a dense teacher; with a Labels teacher they would be a second set")
        if divergences.get(divergence) != divergences.ForwardKL():
            raise ValueError(f"a Labels teacher is compared by forward_kl (cross-entropy), got {divergence!r}")
        if target is not None:
            raise ValueError("target transforms a dense teacher, got a Labels teacher")
        smoothing = checks.finite_number("teacher.label_smoothing", teacher.label_smoothing)  # type: ignore[union-attr]
        if not 0 <= smoothing <= 1:
            raise ValueError(f"teacher.label_smoothing must lie in [0, 1], got {smoothing}")
        v, terms, term_weights = s.vocab, (), None
        hard_weight = square if square is not None else row("label_weight", 1.0)
    else:
        smoothing, hard, hard_weight = 0.0, None, None
        if labels is not None:
            hard = checks.is_index("labels", labels)
            checks.has_shape("labels", hard, lead, " like the student's leading dimensions")
            hard_weight = row("label_weight", label_weight)
        elif isinstance(label_weight, Tensor) or label_weight != 0:
            raise ValueError("label_weight needs labels, got labels=None")
        terms, term_weights = _terms(divergence, target, row, hard_weight, square)

    if hard is not None:
        row.check_device("labels", hard)
        hard = hard.reshape(size)
        mask = hard != ignore_index
    factor = _factor(row, weights, mask, reduction, num_tokens)
    target_name, target_fields, target_tensors = _target(target, row)
    spec = KD(
        backend="",
        chunk=chunk_tokens,
        student=s.side,
        teacher=None if t is None else t.side,
        vocab=v,
        total=reduction != "none",
        terms=tuple((d.name, d.params) for d in terms),
        target=target_name,
        target_fields=target_fields,
        label_smoothing=smoothing,
        label_tempered=t is None,
    )
    tensors = KDTensors(
        factor,
        *s.tensors(size, batch),
        *((None, None, None) if t is None else t.tensors(size, batch)),
        s_temp,
        t_temp,
        term_weights,
        hard if hard is None or mask is None else hard.masked_fill(~mask, 0),
        hard_weight,
        target_tensors,
    )
    (out,) = apply(spec, tensors.flat(), backend)
    return out if spec.total else out.reshape(lead)


_traced = torch._dynamo.nonstrict_trace(_kd_loss)


class _Dense:
    """A source with logits, checked: its tensors, leading dimensions, vocabulary."""

    def __init__(self, name: str, source: Any) -> None:
        self.name = name
        self.w: Tensor | None = None
        self.b: Tensor | None = None
        self.batch = False
        if isinstance(source, Head):
            self._head(name, source)
        elif isinstance(source, Tensor):
            self.x = checks.is_float(f"{name} (logits)", source)
            if source.dim() < 1 or source.shape[-1] == 0:
                raise ValueError(
                    f"{name} (logits) must be [..., V] with a vocabulary of at least 1, got {list(source.shape)}"
                )
            self.side, self.vocab = Side(), source.shape[-1]
        else:
            expected = "logits or a Head" if name == "student" else "logits, a Head or Labels"
            raise TypeError(f"{name} must be {expected}, got {type(source).__name__}")
        self.lead = tuple(self.x.shape[:-1])

    def _head(self, name: str, head: Head) -> None:
        x, w = checks.is_float(f"{name}.hidden", head.hidden), checks.is_float(f"{name}.weight", head.weight)
        if x.dim() < 1 or w.dim() < 2 or x.shape[-1] != w.shape[-1] or w.shape[-2] == 0:
            raise ValueError(
                f"{name}.hidden and {name}.weight must be [..., D] and [V, D] with V at least 1, "
                f"got {list(x.shape)} and {list(w.shape)}"
            )
        self.batch = w.dim() > 2
        if self.batch and w.shape[:-2] != x.shape[:-2]:
            raise ValueError(
                f"{name}.weight [..., V, D] must have the batch dimensions of {name}.hidden [..., N, D], "
                f"got {list(w.shape)} and {list(x.shape)}"
            )
        if head.bias is not None:
            b = checks.is_float(f"{name}.bias", head.bias)
            checks.has_shape(f"{name}.bias", b, tuple(w.shape[:-1]), f" like {name}.weight without D")
            self.b = b
        softcap = None if head.softcap is None else checks.finite_number(f"{name}.softcap", head.softcap, above=0.0)
        scale = checks.finite_number(f"{name}.logit_scale", head.logit_scale)
        self.x, self.w, self.vocab = x, w, w.shape[-2]
        checks.same_device(**{f"{name}.hidden": x, f"{name}.weight": w, f"{name}.bias": self.b})
        self.side = Side(softcap, scale, str(self._compute_dtype(name, head)).removeprefix("torch."))

    @staticmethod
    def _compute_dtype(name: str, head: Head) -> torch.dtype:
        """What F.linear would multiply in: autocast's dtype if it is on, else the common dtype of hidden and weight."""
        device = head.hidden.device.type
        given = [t.dtype for t in (head.hidden, head.weight, head.bias) if t is not None]
        if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in given:
            dtype = torch.get_autocast_dtype(device)
        elif len(set(given)) > 1:
            raise ValueError(
                f"{name}.hidden, {name}.weight and {name}.bias must have one dtype (or be under autocast), "
                f"got {', '.join(map(str, given))}"
            )
        else:
            dtype = given[0]
        # float16 products on a CPU without AVX512-FP16 run a hundred times slower than float32 ones
        return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype

    def truncate(self, vocab: int) -> None:
        if self.w is None:
            self.x = self.x[..., :vocab]
        else:
            self.w = self.w[..., :vocab, :]
            self.b = None if self.b is None else self.b[..., :vocab]
        self.vocab = vocab

    def tensors(self, size: tuple[int, int], batch: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, N, D or V], weight [B or 1, V, D], bias [B or 1, V]"""
        heads = size[0] if self.batch else 1
        w = None if self.w is None else self.w.reshape(heads, *self.w.shape[-2:])
        b = None if self.b is None else self.b.reshape(heads, self.b.shape[-1])
        return self.x.reshape(*size, self.x.shape[-1]), w, b


def _common_vocab(s: _Dense, t: _Dense, vocab: str) -> int:
    checks.same_device(student=s.x, teacher=t.x)
    if s.vocab != t.vocab:
        if vocab == "error":
            raise ValueError(
                f"student and teacher must have the same vocabulary, got {s.vocab} and {t.vocab}; "
                'vocab="truncate" or vocab="pad" says how to treat the difference'
            )
        if vocab == "truncate":
            smaller = min(s.vocab, t.vocab)
            s.truncate(smaller)
            t.truncate(smaller)
    return max(s.vocab, t.vocab)


class _PerToken:
    """Makes [B, N] of a number or a tensor [...]."""

    def __init__(self, lead: tuple[int, ...], size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.lead, self.size, self.dtype, self.device = lead, size, dtype, device

    def __call__(self, name: str, value: Any, *, above: float = -math.inf) -> Tensor:
        if not isinstance(value, Tensor):
            value = checks.finite_number(name, value, above=above)
            return torch.full((), value, dtype=self.dtype, device=self.device).expand(self.size)
        self.check_device(name, value)
        if value.dtype == torch.bool or not value.dtype.is_complex:
            value = value.to(self.dtype)
        if above > -math.inf and checks.readable(value):
            checks.all_values(name, f"finite and above {above:g}", value, (value > above) & (value < math.inf))
        if value.dim() == 0:
            return value.expand(self.size)
        checks.has_shape(name, value, self.lead, " (one value per token) or be a number")
        return value.reshape(self.size)

    def check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(f"{name} must be on the student's device {self.device}, got {value.device}")


def _terms(
    divergence: str | Divergence, target: Target | None, row: _PerToken, hard_weight: Tensor | None, square: Tensor | None
) -> tuple[tuple[Divergence, ...], Tensor]:
    """The divergences and the weight [K, B, N] of each: its own, times (1 - label_weight), times T^2."""
    pairs = divergences.get(divergence).terms
    if target is not None and not target.normalized:
        if not all(isinstance(d, divergences.ForwardKL) for _, d in pairs):
            raise ValueError(f"{type(target).__name__} gives weights, which forward_kl alone allows, got {divergence!r}")
        pairs = tuple((w, divergences.CrossEntropy()) for w, _ in pairs)
    common = [x for x in (None if hard_weight is None else 1 - hard_weight, square) if x is not None]
    weights = [math.prod(common, start=row("the divergence's weight", w)) for w, _ in pairs]
    return tuple(d for _, d in pairs), torch.stack(weights) if len(weights) > 1 or common else weights[0].unsqueeze(0)


def _factor(
    row: _PerToken, weights: Tensor | None, mask: Tensor | None, reduction: str, num_tokens: float | Tensor | None
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


def _target(target: Target | None, row: _PerToken) -> tuple[str | None, str, tuple[Tensor, ...]]:
    """A target transform as its class, its numbers as JSON, and its tensor fields [B, N]."""
    if target is None:
        return None, "{}", ()
    if not isinstance(target, Target):
        raise TypeError(f"target must be a fastkd.targets.Target, got {type(target).__name__}")
    numbers, tensors = {}, []
    for field in fields(target):
        value = getattr(target, field.name)
        numbers[field.name] = None if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            tensors.append(row(f"target.{field.name}", value))
    return type(target).__name__, json.dumps(numbers), tuple(tensors)
