"""Row ops in plain torch: one chunk of raw logits [n, V] in, losses [n] and the gradient out. Any device, any float.

This file and its C++ and GPU counterparts share one contract; `Rows` holds what a chunk needs beside its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd.divergences import Divergence, _times
from fastkd.problem import Side, accumulation


@dataclass(frozen=True)
class Rows:
    """What one chunk of a dense problem holds beside its logits; n rows."""

    vocab: int
    student: Side
    teacher: Side
    factor: Tensor  # [n] multiplies the gradient; a row with factor 0 gives loss 0 and gradient 0 whatever it holds
    s_temperature: Tensor  # [n]
    t_temperature: Tensor  # [n]
    divergences: tuple[Divergence, ...] = ()
    term_weights: Tensor | None = None  # [K, n]
    normalized: bool = True  # is the teacher's row to be normalised, or the log of weights to be used as they are
    labels: Tensor | None = None  # [n]
    label_weight: Tensor | None = None  # [n]
    label_temperature: Tensor | None = None  # [n]
    label_smoothing: float = 0.0


def divergence(s: Tensor, t: Tensor | None, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s], t [n, V_t] raw -> loss [n]; writes factor * dloss/ds into g [n, V_s], which may be s itself."""
    z = a.student.effective(s, a.vocab)
    loss, grad = z.new_zeros(s.shape[0]), torch.zeros_like(z) if g is not None else None
    if t is not None:
        assert a.term_weights is not None
        temperature = a.s_temperature.unsqueeze(-1)
        log_q = (z / temperature).log_softmax(-1)
        log_p = a.teacher.effective(t, a.vocab) / a.t_temperature.unsqueeze(-1)
        log_p = log_p.log_softmax(-1) if a.normalized else log_p
        h = torch.zeros_like(z)
        for weight, d in zip(a.term_weights, a.divergences, strict=True):
            loss += _times(weight, d.phi(log_p, log_q).sum(-1))
            if g is not None:
                h += _times(weight.unsqueeze(-1), d.h(log_p, log_q))
        if grad is not None:
            grad += (h - _times(log_q.exp(), h.sum(-1, keepdim=True))) / temperature
    if a.labels is not None:
        assert a.label_weight is not None and a.label_temperature is not None
        temperature, weight = a.label_temperature.unsqueeze(-1), a.label_weight.unsqueeze(-1)
        log_q = (z / temperature).log_softmax(-1)
        y, smooth = a.labels.long().unsqueeze(-1), a.label_smoothing
        ce = -(1 - smooth) * log_q.gather(-1, y).squeeze(-1)
        if smooth:
            ce -= smooth * log_q.mean(-1)
        loss += _times(a.label_weight, ce)
        if grad is not None:
            d_ce = log_q.exp() - smooth / a.vocab
            d_ce.scatter_add_(-1, y, torch.full_like(temperature, smooth - 1))
            grad += _times(weight, d_ce) / temperature
    if g is not None and grad is not None:
        grad = grad * a.student.slope(z) * a.factor.unsqueeze(-1)
        g.copy_(torch.where(a.factor.unsqueeze(-1) == 0, 0.0, grad)[:, : g.shape[-1]])
    return torch.where(a.factor == 0, 0.0, loss)


def select(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, ids: Tensor, cotangent: Tensor | None
) -> Tensor:
    """log q at ids [n, K]; with cotangents [n, K] the gradient into g [n, V]."""
    z = side.effective(s, vocab)
    log_q = (z / temperature.unsqueeze(-1)).log_softmax(-1)
    if g is not None and cotangent is not None:
        grad = -log_q.exp() * cotangent.sum(-1, keepdim=True)
        grad = grad.scatter_add(-1, ids.long(), cotangent.to(grad.dtype))
        g.copy_(grad / temperature.unsqueeze(-1) * side.slope(z))
    return log_q.gather(-1, ids.long())


def stats(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, cotangents: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, max_log_prob, argmax; with cotangents [n] of the first three the gradient into g [n, V]."""
    z = side.effective(s, vocab)
    x = z / temperature.unsqueeze(-1)
    lse, log_q = x.logsumexp(-1), x.log_softmax(-1)
    q, top = log_q.exp(), log_q.max(-1)
    entropy = -_times(q, log_q).sum(-1)
    if g is not None and cotangents is not None:
        d_lse, d_entropy, d_max = (c.unsqueeze(-1).to(z.dtype) for c in cotangents)
        grad = _times(q, d_lse - d_max - d_entropy * (log_q + entropy.unsqueeze(-1)))
        grad = grad.scatter_add(-1, top.indices.unsqueeze(-1), d_max)
        g.copy_(grad / temperature.unsqueeze(-1) * side.slope(z))
    return lse, entropy, top.values, top.indices


class Sum:
    """out [V, D] = a sum of parts, in float32 (float64) until close()."""

    wide: Tensor | None  # the running sum, where it is one tensor

    def __init__(self, out: Tensor) -> None:
        self.out, dtype = out, accumulation(out.dtype)
        self.wide = out if out.dtype == dtype else empty(out.shape, dtype, out.device)

    @staticmethod
    def extra_bytes(dtype: torch.dtype) -> int:
        """Memory beside out, an element."""
        return 0 if dtype == accumulation(dtype) else accumulation(dtype).itemsize

    def add(self, start: int, part: Tensor, first: bool) -> None:
        """rows [start, start + n) += part [n, D]; = where first"""
        assert self.wide is not None
        block = self.wide[start : start + part.shape[0]]
        block.copy_(part) if first else block.add_(part.to(block.dtype))

    def close(self) -> None:
        """Round into out."""
        if self.wide is not None and self.wide is not self.out:
            self.out.copy_(self.wide)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a large result or buffer."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)
