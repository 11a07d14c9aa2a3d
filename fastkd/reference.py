"""The definition of every op: materialised logits, plain PyTorch, float64-capable, differentiable to any order.

Tests and ``fastkd.testing.compare`` hold every backend against this file. It is written for reading, not for speed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd.divergences import _times
from fastkd.problem import KD, KDTensors, Select, Side, Stats, Tensors


def logits(side: Side, x: Tensor, w: Tensor | None, b: Tensor | None, vocab: int) -> Tensor:
    """x [B, N, D or V'] -> effective logits [B, N, vocab], at least float32; entries that the source lacks are -inf."""
    if w is not None:
        dtype = side.compute_dtype
        x = torch.matmul(x.to(dtype), w.to(dtype).transpose(-1, -2))  # [B, N, V']
        if b is not None:
            x = x + b.to(dtype).unsqueeze(-2)
    return side.effective(x, vocab)


def kd(spec: KD, flat: Tensors) -> tuple[Tensor]:
    """sum(factor * loss), or factor * loss [B, N]."""
    a = KDTensors.of(flat)
    live = a.factor != 0
    keep = live.unsqueeze(-1)
    z_s = logits(spec.student, torch.where(keep, a.s_x, 0.0), a.s_w, a.s_b, spec.vocab)
    loss = torch.zeros_like(a.factor)
    if spec.teacher is not None:
        assert a.t_x is not None and a.term_weights is not None
        z_t = logits(spec.teacher, torch.where(keep, a.t_x, 0.0), a.t_w, a.t_b, spec.vocab)
        log_q = (z_s / a.s_temperature.unsqueeze(-1)).log_softmax(-1)
        t = z_t / a.t_temperature.unsqueeze(-1)
        target = spec.build_target(tuple(x.unsqueeze(-1) for x in a.target))
        if target is not None:
            token = torch.arange(live.numel(), device=live.device).view(live.shape)
            t = target(z_t, z_s.detach(), a.t_temperature.unsqueeze(-1), token)
        log_p = t.log_softmax(-1) if target is None or target.normalized else t
        for weight, divergence in zip(a.term_weights, spec.divergences, strict=True):
            loss = loss + _times(weight, divergence.phi(log_p, log_q).sum(-1))
    if a.labels is not None:
        assert a.label_weight is not None
        s = z_s / a.s_temperature.unsqueeze(-1) if spec.label_tempered else z_s
        ce = F.cross_entropy(
            s.flatten(0, 1), a.labels.flatten().long(), reduction="none", label_smoothing=spec.label_smoothing
        )
        loss = loss + _times(a.label_weight, ce.view(live.shape))
    loss = _times(a.factor, loss)
    return (loss.sum() if spec.total else loss,)


def select(spec: Select, flat: Tensors) -> tuple[Tensor]:
    """log q at the listed entries, [B, N, K]."""
    x, w, b, temperature, ids = flat
    s = logits(spec.student, x, w, b, spec.vocab) / temperature.unsqueeze(-1)  # type: ignore[arg-type,union-attr]
    return (s.log_softmax(-1).gather(-1, ids.long()),)  # type: ignore[union-attr]


def stats(spec: Stats, flat: Tensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, max_log_prob, argmax, each [B, N]."""
    x, w, b, temperature = flat
    s = logits(spec.student, x, w, b, spec.vocab) / temperature.unsqueeze(-1)  # type: ignore[arg-type,union-attr]
    log_q = s.log_softmax(-1)
    top = log_q.max(-1)
    return s.logsumexp(-1), -_times(log_q.exp(), log_q).sum(-1), top.values, top.indices


OPS: dict[type, Any] = {KD: kd, Select: select, Stats: stats}


def kd_loss(*args: Any, **kwargs: Any) -> Tensor:
    """:func:`fastkd.kd_loss`, computed by the definition."""
    from fastkd.losses import kd_loss as public

    return public(*args, **{**kwargs, "backend": "reference"})
