"""Divergences between a teacher p and a student q, each a sum over the vocabulary of a pointwise phi(log p, log q).

With ``h = d phi / d log q`` the gradient with respect to the student's softened logits s is
``dL/ds_j = h_j - q_j * sum_i h_i``, so phi and h are all that a divergence is. Divergences add and scale::

    0.5 * ForwardKL() + 0.5 * ReverseKL()
    weights * JensenShannon(0.3)                 # weights [...]: one factor per token
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = [
    "AlphaBeta",
    "ChiSquare",
    "CrossEntropy",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "NeymanChiSquare",
    "ReverseCrossEntropy",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SquaredHellinger",
    "TotalVariation",
    "WeightedSum",
    "get",
    "register",
]

REGISTRY: dict[str, type[Divergence]] = {}


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x with 0 * anything = 0 (a NaN in p stays)."""
    return p * torch.where(p == 0, 0.0, x)


def _both(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outcomes that neither distribution has: their mask, and log-probabilities that are 0 there instead of -inf."""
    neither = torch.isneginf(log_p) & torch.isneginf(log_q)
    return neither, log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)


def _log_mix(w: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(w a + (1 - w) b)"""
    return torch.logaddexp(log_a + math.log(w), log_b + math.log1p(-w))


def _beyond_linear(x: Tensor) -> Tensor:
    """e^x - 1 - x for small x"""
    terms = range(9, 2, -1)
    series = torch.ones_like(x)
    for n in terms:
        series = 1 + x / n * series
    return x.square() / 2 * series


@dataclass(frozen=True)
class Divergence:
    """One divergence. ``phi`` and ``h`` take log p and log q of any shape and work elementwise.

    ``exchanged`` is the divergence with the roles of p and q exchanged; it gives the gradient to the teacher.
    ``rows_nonnegative`` says whether the sum over a row of two distributions is never negative, ``infinite_without_p``
    whether it is infinite where p is 0 and q is not.
    """

    name: ClassVar[str] = ""
    rows_nonnegative: ClassVar[bool] = True
    infinite_without_p: ClassVar[bool] = False

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def exchanged(self) -> Divergence:
        raise NotImplementedError(f"{type(self).__name__} defines no exchanged divergence: detach the teacher")

    @property
    def params(self) -> tuple[float, ...]:
        return astuple(self)

    @property
    def terms(self) -> tuple[tuple[float | Tensor, Divergence], ...]:
        return ((1.0, self),)

    def __add__(self, other: Divergence) -> WeightedSum:
        if not isinstance(other, Divergence):
            return NotImplemented
        return WeightedSum(self.terms + other.terms)

    def __radd__(self, other: object) -> Divergence:
        """sum([D1, D2]) starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __mul__(self, weight: float | Tensor) -> WeightedSum:
        if not isinstance(weight, (int, float, Tensor)):
            return NotImplemented
        return WeightedSum(tuple((weight * w, d) for w, d in self.terms))

    __rmul__ = __mul__
    # so that numpy scalars and arrays do not try to distribute themselves over us
    __array_ufunc__ = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """tensor * divergence: torch asks here first (torch.compile also for divergence * tensor)."""
        if func not in (Tensor.mul, Tensor.__mul__, torch.mul):
            return NotImplemented
        divergence, weight = args if isinstance(args[0], Divergence) else args[::-1]
        return divergence.__mul__(weight)


def register(cls: type[Divergence]) -> type[Divergence]:
    """Make a divergence known by its ``name`` to :func:`get`, to torch.compile and to the backends' tables."""
    if not cls.name or cls.name in REGISTRY:
        raise ValueError(f"a divergence needs a name of its own, got {cls.name!r}; taken: {sorted(REGISTRY)}")
    REGISTRY[cls.name] = cls
    _pytree.register_dataclass(cls)
    return cls


@register
@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q): mode covering, what ``F.kl_div`` computes."""

    name = "forward_kl"

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(log_p.exp(), log_p - log_q)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -log_p.exp()

    @property
    def exchanged(self) -> Divergence:
        return ReverseKL()


@register
@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p): mode seeking (MiniLLM, on-policy distillation)."""

    name = "reverse_kl"
    infinite_without_p = True

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(log_q.exp(), log_q - log_p)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(log_q.exp(), log_q - log_p + 1)

    @property
    def exchanged(self) -> Divergence:
        return ForwardKL()


def _open_unit(name: str, value: float, at_zero: str, at_one: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}; for 0 use {at_zero}, for 1 {at_one}")


@register
@dataclass(frozen=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD).

    TRL and Liger read beta = 0 as forward and beta = 1 as reverse KL; here those are ForwardKL and ReverseKL.
    """

    beta: float = 0.5
    name = "jensen_shannon"

    def __post_init__(self) -> None:
        _open_unit("beta", self.beta, "ForwardKL()", "ReverseKL()")

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        log_m = _log_mix(self.beta, log_p, log_q)
        left = self.beta * _times(log_p.exp(), log_p - log_m)
        return (left + (1 - self.beta) * _times(log_q.exp(), log_q - log_m)).masked_fill(neither, 0.0)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        log_m = _log_mix(self.beta, log_p, log_q)
        return ((1 - self.beta) * _times(log_q.exp(), log_q - log_m)).masked_fill(neither, 0.0)

    @property
    def exchanged(self) -> Divergence:
        return JensenShannon(1 - self.beta)


@register
@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM); alpha = 0.1 there."""

    alpha: float = 0.1
    name = "skew_kl"

    def __post_init__(self) -> None:
        _open_unit("alpha", self.alpha, "ForwardKL()", "nothing: it is 0")

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        return _times(log_p.exp(), log_p - _log_mix(self.alpha, log_p, log_q)).masked_fill(neither, 0.0)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        ratio = (log_q - _log_mix(self.alpha, log_p, log_q)).exp()
        return (-(1 - self.alpha) * log_p.exp() * ratio).masked_fill(neither, 0.0)

    @property
    def exchanged(self) -> Divergence:
        return SkewReverseKL(self.alpha)


@register
@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM); alpha = 0.1 there."""

    alpha: float = 0.1
    name = "skew_reverse_kl"

    def __post_init__(self) -> None:
        _open_unit("alpha", self.alpha, "ReverseKL()", "nothing: it is 0")

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        return _times(log_q.exp(), log_q - _log_mix(self.alpha, log_q, log_p)).masked_fill(neither, 0.0)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        d = log_q - _log_mix(self.alpha, log_q, log_p)
        return _times(log_q.exp(), d + 1 - self.alpha * d.exp()).masked_fill(neither, 0.0)

    @property
    def exchanged(self) -> Divergence:
        return SkewKL(self.alpha)


@register
@dataclass(frozen=True)
class TotalVariation(Divergence):
    """sum abs(p - q) / 2. Its gradient is 0 where p = q."""

    name = "total_variation"

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).abs() / 2

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -(log_p.exp() - log_q.exp()).sign() * log_q.exp() / 2

    @property
    def exchanged(self) -> Divergence:
        return self


@register
@dataclass(frozen=True)
class SquaredHellinger(Divergence):
    """sum (sqrt p - sqrt q)^2 / 2."""

    name = "squared_hellinger"

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ((log_p / 2).exp() - (log_q / 2).exp()).square() / 2

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q / 2).exp() * ((log_q / 2).exp() - (log_p / 2).exp()) / 2

    @property
    def exchanged(self) -> Divergence:
        return self


@register
@dataclass(frozen=True)
class ChiSquare(Divergence):
    """Pearson: sum (p - q)^2 / q."""

    name = "chi_square"

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        p, q, x = log_p.exp(), log_q.exp(), log_p - log_q
        near = (p - q) * x.clamp(max=1.0).expm1()
        far = (2 * log_p - log_q).exp() - 2 * p + q  # no 0 * inf where both underflow
        return torch.where(x > 1, far, near).masked_fill(neither, 0.0)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        return (log_q.exp() - (2 * log_p - log_q).exp()).masked_fill(neither, 0.0)

    @property
    def exchanged(self) -> Divergence:
        return NeymanChiSquare()


@register
@dataclass(frozen=True)
class NeymanChiSquare(Divergence):
    """Neyman: sum (p - q)^2 / p, chi_square with the roles exchanged."""

    name = "neyman_chi_square"
    infinite_without_p = True

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return ChiSquare().phi(log_q, log_p)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        neither, log_p, log_q = _both(log_p, log_q)
        return (2 * (2 * log_q - log_p).exp() - 2 * log_q.exp()).masked_fill(neither, 0.0)

    @property
    def exchanged(self) -> Divergence:
        return ChiSquare()


@register
@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """-sum (p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)) / (a b), with a, b and a + b not 0 (Cichocki et al., 2011)."""

    a: float
    b: float
    name = "alpha_beta"

    def __post_init__(self) -> None:
        if 0 in (self.a, self.b, self.a + self.b) or not all(map(math.isfinite, (self.a, self.b))):
            raise ValueError(f"a, b and a + b must be finite and not 0, got a={self.a}, b={self.b}")

    @property
    def infinite_without_p(self) -> bool:  # type: ignore[override]
        return self.a < 0 or self.a + self.b < 0

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b, c = self.a, self.b, self.a + self.b
        neither, log_p, log_q = _both(log_p, log_q)
        cross = (a * log_p + b * log_q).exp()
        far = (a / c * (c * log_p).exp() + b / c * (c * log_q).exp() - cross) / (a * b)
        one = torch.isneginf(log_p) ^ torch.isneginf(log_q)
        far = torch.where(one & far.isnan(), torch.inf, far)  # the larger of two infinities is positive
        near = (
            a / c * _beyond_linear(c * self._ratio(log_p, log_q)) - _beyond_linear(a * self._ratio(log_p, log_q))
        ) / (a * b)
        return torch.where(self._near(log_p, log_q), (c * log_q).exp() * near, far).masked_fill(neither, 0.0)

    def _ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """log p - log q where they are near, else 0"""
        return torch.where(self._near(log_p, log_q), log_p - log_q, 0.0)

    def _near(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Where the difference of powers would cancel."""
        return (log_p - log_q).abs() * max(abs(self.a), abs(self.a + self.b)) < 0.1

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        a, b, c = self.a, self.b, self.a + self.b
        neither, log_p, log_q = _both(log_p, log_q)
        far = ((c * log_q).exp() - (a * log_p + b * log_q).exp()) / a
        near = -(c * log_q).exp() * torch.expm1(a * self._ratio(log_p, log_q)) / a
        return torch.where(self._near(log_p, log_q), near, far).masked_fill(neither, 0.0)

    @property
    def exchanged(self) -> Divergence:
        return AlphaBeta(self.b, self.a)


@register
@dataclass(frozen=True)
class CrossEntropy(Divergence):
    """-sum p log q: forward KL plus the teacher's entropy; the same gradient to the student."""

    name = "cross_entropy"

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(log_p.exp(), -log_q)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return -log_p.exp()

    @property
    def exchanged(self) -> Divergence:
        return ReverseCrossEntropy()


@register
@dataclass(frozen=True)
class ReverseCrossEntropy(Divergence):
    """-sum q log p: reverse KL plus the student's entropy."""

    name = "reverse_cross_entropy"
    infinite_without_p = True

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(log_q.exp(), -log_p)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return _times(log_q.exp(), -log_p)

    @property
    def exchanged(self) -> Divergence:
        return CrossEntropy()


@dataclass(frozen=True, eq=False)
class WeightedSum(Divergence):
    """w1 D1 + w2 D2 + ...; a weight is a float or a tensor [...] with one factor per token."""

    parts: tuple[tuple[float | Tensor, Divergence], ...]
    name = "weighted_sum"

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a WeightedSum needs at least one part, got none")

    @property
    def terms(self) -> tuple[tuple[float | Tensor, Divergence], ...]:
        return self.parts

    def _sum(self, method: str, log_p: Tensor, log_q: Tensor) -> Tensor:
        total = torch.zeros_like(log_p)
        for weight, divergence in self.parts:
            w = weight.unsqueeze(-1) if isinstance(weight, Tensor) and weight.dim() else weight
            total = total + w * getattr(divergence, method)(log_p, log_q)
        return total

    def phi(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self._sum("phi", log_p, log_q)

    def h(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return self._sum("h", log_p, log_q)


_pytree.register_dataclass(WeightedSum)


def get(divergence: str | Divergence) -> Divergence:
    """A divergence by name (with its default parameters), or the object itself."""
    if isinstance(divergence, Divergence):
        return divergence
    if not isinstance(divergence, str):
        raise TypeError(
            f"divergence must be a name or a fastkd.divergences.Divergence, got {type(divergence).__name__}"
        )
    if divergence not in REGISTRY:
        raise ValueError(f"divergence must be one of {sorted(REGISTRY)} or an object, got {divergence!r}")
    try:
        return REGISTRY[divergence]()
    except TypeError:
        raise ValueError(f"divergence {divergence!r} has parameters without a default: pass an object") from None
