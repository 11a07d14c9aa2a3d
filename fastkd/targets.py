"""Transforms of the teacher, given the student: ``kd_loss(..., target=Interpolate(0.3))``.

A transform sees one chunk of effective logits (after softcap and logit_scale, before the temperature) and returns the
log-weights that take the place of ``teacher / temperature``. The student enters as a constant. Parameters are floats,
or tensors [...] with one value per token. Your own: subclass :class:`Target`, as a frozen dataclass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree

from fastkd.divergences import _times

__all__ = ["AddNoise", "Clip", "Enhance", "Interpolate", "MixUniform", "Power", "Target"]

REGISTRY: dict[str, type[Target]] = {}


@dataclass(frozen=True, eq=False)
class Target:
    """A teacher transform.

    ``normalized`` False says that the result holds the logs of weights to be used as they are, not to be normalised;
    the loss is then the cross-entropy -sum w log q, which forward KL alone allows.
    """

    normalized: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        REGISTRY[cls.key()] = cls

    @classmethod
    def key(cls) -> str:
        """The name under which the class travels to the op."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        """teacher, student: effective logits [n, V]; temperature [n, 1]; token [n]: index of each row in the batch.

        Returns [n, V]. A tensor field arrives as its chunk, [n, 1].
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Interpolate(Target):
    """TAID: softmax(((1 - t) sg(z_student) + t z_teacher) / temperature); t in [0, 1]."""

    t: float | Tensor

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        t = torch.as_tensor(self.t, dtype=teacher.dtype, device=teacher.device)
        return (_times(1 - t, student) + _times(t, teacher)) / temperature


@dataclass(frozen=True, eq=False)
class Enhance(Target):
    """OFA-KD's adaptive target enhancement: weights (p_i + 1[i=y])^gamma - 1[i=y] on -log q_i; gamma >= 1.

    ``labels`` [...] int64 hold y, each in [0, V) unless the token is ignored; gamma 1 is plain cross-entropy.
    """

    labels: Tensor
    gamma: float | Tensor = 1.0
    normalized = False

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        log_w = self.gamma * (teacher / temperature).log_softmax(-1)
        y = self.labels.long()
        valid = (y >= 0) & (y < teacher.shape[-1])  # elsewhere NaN, which a token of weight 0 keeps to itself
        y = torch.where(valid, y, 0)
        # log((1 + p_y)^gamma - 1), without cancellation for a small p_y
        log_p_y = (teacher / temperature).log_softmax(-1).gather(-1, y)
        log_w = log_w.scatter(-1, y, torch.expm1(self.gamma * log_p_y.exp().log1p()).log())
        return torch.where(valid, log_w, torch.nan)


@dataclass(frozen=True, eq=False)
class Clip(Target):
    """DAC-KL: the teacher's logits clipped to [low, high], then divided by the temperature; -inf stays."""

    low: float | Tensor
    high: float | Tensor

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        low, high = (torch.as_tensor(x, dtype=teacher.dtype, device=teacher.device) for x in (self.low, self.high))
        clipped = torch.minimum(torch.maximum(teacher, low), high) / temperature
        return clipped.masked_fill(torch.isneginf(teacher), -torch.inf)


@dataclass(frozen=True, eq=False)
class AddNoise(Target):
    """Swing distillation: normal noise of standard deviation ``std`` added to the teacher's logits.

    The noise of a logit depends on (seed, token, vocabulary entry) alone: not on the chunk size, backend or device, and
    the backward sees the forward's noise. Pass a new seed at each step.
    """

    std: float | Tensor
    seed: int

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        entry = torch.arange(teacher.shape[-1], device=teacher.device)
        u = _hash(_hash(_hash(entry + 1) + token.unsqueeze(-1)) + self.seed % 2**32)
        # Box-Muller: sqrt(-2 log u1) cos(2 pi u2)
        radius = (-2 * ((_hash(u + 1) + 0.5) / 2**32).log()).sqrt()
        noise = radius * torch.cos(u * (2 * math.pi / 2**32))
        return (teacher + self.std * noise.to(teacher.dtype)) / temperature


def _hash(x: Tensor) -> Tensor:
    """A 32-bit integer hash (Wellons' lowbias32) on int64 tensors, so that no product overflows."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    # 0x846CA68B exceeds 31 bits: multiply by its halves
    y = x ^ (x >> 15)
    x = (y * 0xA68B + (((y * 0x846C) & 0xFFFF) << 16)) & 0xFFFFFFFF
    return x ^ (x >> 16)


@dataclass(frozen=True, eq=False)
class Power(Target):
    """p^(1 / tau), renormalised: a further temperature tau > 0 on the teacher alone."""

    tau: float | Tensor

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        return teacher / (temperature * self.tau)


@dataclass(frozen=True, eq=False)
class MixUniform(Target):
    """(1 - a) p + a / V; a in [0, 1]."""

    a: float | Tensor

    def __call__(self, teacher: Tensor, student: Tensor, temperature: Tensor, token: Tensor) -> Tensor:
        a = torch.as_tensor(self.a, dtype=teacher.dtype, device=teacher.device)
        log_p = (teacher / temperature).log_softmax(-1)
        return torch.logaddexp(torch.log1p(-a) + log_p, (a / teacher.shape[-1]).log())


for _target in (AddNoise, Clip, Enhance, Interpolate, MixUniform, Power):
    _pytree.register_dataclass(_target)
