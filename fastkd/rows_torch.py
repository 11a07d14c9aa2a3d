"""Row ops in plain torch: one chunk of raw logits [n, V] in, losses [n] and the gradient out. Any device, any float.

This file and its C++ and GPU counterparts share one contract; `Rows` holds what a chunk needs beside its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastkd.divergences import Divergence, _times
from fastkd.problem import Side
from fastkd.sparse import Listed, listing, logsumexp, outcomes
from fastkd.sparse import spread as listed_rows

LOOKS = True  # may the driver look at values on the CPU, where that makes nothing wait
COMPACT = False  # are sums kept in 24 bits, see accumulate
# [n, V] tensors in the accumulation dtype that a row op holds at its peak. divergence: logits, log q, log p and h for
# the whole call; then p, log p - log q, the same where p > 0, and their product. sparse: logits, those over T, the
# unlisted of them, their shares, and the gradient; then that over T, times the slope, times the factor
ROW_TENSORS = 8


@dataclass(frozen=True)
class Rows:
    """What one chunk holds beside its logits; n rows."""

    vocab: int
    student: Side
    teacher: Side
    factor: Tensor  # [n] multiplies the gradient; a row with factor 0 gives loss 0 and gradient 0 whatever it holds
    s_temperature: Tensor  # [n]
    t_temperature: Tensor  # [n]
    divergences: tuple[Divergence, ...]
    term_weights: Tensor  # [K, n]
    normalized: bool = True  # is the teacher's row to be normalised, or the log of weights to be used as they are
    labels: Tensor | None = None  # [n]
    label_weight: Tensor | None = None  # [n]


def divergence(s: Tensor, t: Tensor, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s], t [n, V_t] raw -> loss [n]; writes factor * dloss/ds into g [n, V_s], which may be s itself."""
    z = a.student.effective(s, a.vocab)
    log_q = (z / a.s_temperature.unsqueeze(-1)).log_softmax(-1)
    log_p = a.teacher.effective(t, a.vocab) / a.t_temperature.unsqueeze(-1)
    log_p = log_p.log_softmax(-1) if a.normalized else log_p
    loss, h = _terms(log_p, log_q, g is not None, a)
    grad = None if h is None else h - _times(log_q.exp(), h.sum(-1, keepdim=True))
    return _finish(z, loss, grad, g, a)


def sparse(s: Tensor, t: Listed, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s] raw, a teacher's outcomes -> loss [n]; writes factor * dloss/ds into g [n, V_s], perhaps s itself.

    With h over the outcomes and H = sum h: a listed entry has h_k - q_k H, the others q_j (h_rest / q_rest - H). With
    the tail "uniform" the divergences are cross-entropies.
    """
    if t.tail == "uniform":
        spread = replace(a, teacher=Side(), t_temperature=torch.ones_like(a.t_temperature), normalized=False)
        return divergence(s, listed_rows(t, a.vocab), g, spread)
    z = a.student.effective(s, a.vocab)
    x = z / a.s_temperature.unsqueeze(-1)
    log_p, log_q = outcomes(t, x)
    loss, h = _terms(log_p, log_q, g is not None, a)
    if h is None:
        return _finish(z, loss, None, None, a)
    total = h.sum(-1, keepdim=True)
    if t.tail == "drop":
        grad = -_times(x.softmax(-1), total)
    elif t.log_rest is None:
        grad = torch.zeros_like(x)
    else:
        rest = h[:, -1:] - _times(log_q[:, -1:].exp(), total)
        others = x.masked_fill(listing(t.ids, a.vocab), -torch.inf)
        share = (others - logsumexp(others).unsqueeze(-1)).exp()  # q_j / q_rest
        grad = torch.where(torch.isneginf(others), 0.0, share * rest)
    k = t.ids.shape[-1]
    own = h[:, :k] if t.tail == "drop" else h[:, :k] - _times(log_q[:, :k].exp(), total)
    grad = grad.scatter_add(-1, t.ids.clamp(min=0), torch.where(t.ids < 0, 0.0, own))
    return _finish(z, loss, grad, g, a)


def _terms(log_p: Tensor, log_q: Tensor, learn: bool, a: Rows) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of the divergences [n], and of their h [n, outcomes]."""
    loss = log_q.new_zeros(log_q.shape[0])
    h = torch.zeros_like(log_q) if learn else None
    for weight, d in zip(a.term_weights, a.divergences, strict=True):
        loss += _times(weight, d.phi(log_p, log_q).sum(-1))
        if h is not None:
            h += _times(weight.unsqueeze(-1), d.h(log_p, log_q))
    return loss, h


def _finish(z: Tensor, loss: Tensor, grad: Tensor | None, g: Tensor | None, a: Rows) -> Tensor:
    """Adds the labels' cross-entropy, and brings the gradient [n, V] to the raw logits."""
    if grad is not None:
        grad = grad / a.s_temperature.unsqueeze(-1)
    if a.labels is not None:
        assert a.label_weight is not None
        log_q, y, weight = z.log_softmax(-1), a.labels.long().unsqueeze(-1), a.label_weight.unsqueeze(-1)
        loss = loss - _times(weight, log_q.gather(-1, y)).squeeze(-1)
        if grad is not None:
            grad = grad + _times(weight, log_q.exp().scatter_add(-1, y, torch.full_like(weight, -1.0)))
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


def top(
    s: Tensor,
    g: Tensor | None,
    side: Side,
    vocab: int,
    temperature: Tensor,
    k: int,
    cotangents: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the k likeliest entries [n, k], likeliest first, of equals the lower id; the log of all
    others' mass [n]; the ids [n, k]. With cotangents of the first two the gradient into g [n, V]."""
    z = side.effective(s, vocab)
    x = z / temperature.unsqueeze(-1)
    ids = x.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    log_q = x.log_softmax(-1)
    others = x.masked_fill(listing(ids, vocab), -torch.inf)
    rest = logsumexp(others)
    if g is not None and cotangents is not None:
        given, d_tail = cotangents[0].to(x.dtype), cotangents[1].to(x.dtype).unsqueeze(-1)
        share = torch.where(torch.isneginf(others), 0.0, (others - rest.unsqueeze(-1)).exp())
        grad = _times(share, d_tail) - _times(log_q.exp(), given.sum(-1, keepdim=True) + d_tail)
        g.copy_(grad.scatter_add(-1, ids, given) / temperature.unsqueeze(-1) * side.slope(z))
    return log_q.gather(-1, ids), rest - x.logsumexp(-1), ids


def accumulate(high: Tensor, low: Tensor | None, part: Tensor, first: bool) -> None:
    """high [m, D] float32 (float64) += part [m, D]; = where first. Where COMPACT, high may be bfloat16: the upper 16
    bits of a float32 sum, whose next 8 are low [m, D] uint8; a bfloat16 product has lost more than that."""
    assert low is None
    high.copy_(part) if first else high.add_(part.to(high.dtype))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a large result or buffer."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)
