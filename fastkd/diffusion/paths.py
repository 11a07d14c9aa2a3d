"""Paths from data to noise, and what a network may predict along them.

    x_t = alpha(t) x_0 + sigma(t) eps,    v = dx_t / dt,    eps ~ N(0, I)

=============  ====================  ======================  ===========================================================
path           alpha, sigma          t                       F, the network's output
=============  ====================  ======================  ===========================================================
TrigFlow       cos t, s sin t        0 to pi / 2             v / s of x_t / s; s = sigma_data (Lu & Song 2024)
RectifiedFlow  1 - t, t              0 to 1                  v (Liu et al. 2022)
EDM            1, t                  0 to inf, as sigma      (x_0 - c_skip x_t) / c_out (Karras et al. 2022)
=============  ====================  ======================  ===========================================================

A prediction is one of x (x_0), eps, v, F and score (-eps / sigma). All of this is computed in float64 and rounded once:
towards either end differences of what is nearly equal keep their digits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastkd import checks
from fastkd.diffusion.samples import latents, times

__all__ = ["EDM", "PREDICTIONS", "Path", "RectifiedFlow", "TrigFlow", "transfer"]

PREDICTIONS = ("x", "eps", "v", "F", "score")


class Rates(NamedTuple):
    """Of a path at the times of samples, each [B, 1, ..., 1] in float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor  # by t
    d_sigma: Tensor
    of_x: Tensor  # v = of_x x_t + of_f F
    of_f: Tensor

    @property
    def turn(self) -> Tensor:
        """alpha d_sigma - d_alpha sigma, by which x_0 and eps follow from x_t and v; never 0."""
        return self.alpha * self.d_sigma - self.d_alpha * self.sigma


@dataclass(frozen=True)
class Path:
    """x_t = alpha(t) x_0 + sigma(t) eps: a :class:`TrigFlow`, :class:`RectifiedFlow` or :class:`EDM`."""

    last: ClassVar[float]  # time

    def at(self, t: Tensor) -> Rates:
        """The rates at times in float64."""
        raise NotImplementedError

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The time at which signal and noise are in this proportion."""
        raise NotImplementedError

    def rates(self, t: Tensor, like: Tensor) -> Rates:
        """The rates at t for samples [B, ...]."""
        return self.at(times("t", t, like, 0.0, self.last))

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x_0 + sigma(t) noise.

        Args:
            x_0: [B, ...] data.
            noise: [B, ...], drawn from a standard normal distribution.
            t: [B], [B, 1, ...] or [], of a float dtype.

        Returns:
            [B, ...] in the dtype of x_0.

        Raises:
            TypeError: not a float tensor (times of integers, too).
            ValueError: a time outside the path, shapes or devices that do not match.
        """
        latents(x_0=x_0, noise=noise)
        r = self.rates(t, x_0)
        return (r.alpha * x_0.double() + r.sigma * noise.double()).to(x_0.dtype)

    def velocity(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = dx_t / dt = alpha'(t) x_0 + sigma'(t) noise; as :meth:`add_noise`."""
        latents(x_0=x_0, noise=noise)
        r = self.rates(t, x_0)
        return (r.d_alpha * x_0.double() + r.d_sigma * noise.double()).to(x_0.dtype)

    def convert(self, prediction: Tensor, x_t: Tensor, t: Tensor, source: str, target: str) -> Tensor:
        """What a prediction says in another parametrisation.

        Args:
            prediction: [B, ...], of the kind ``source``.
            x_t: [B, ...].
            t: [B], [B, 1, ...] or []. Where sigma is 0 (t = 0) x says nothing of the others, and score is infinite;
                where alpha is 0 (the end) eps and score say nothing of x, v and F: what comes there means nothing.
            source, target: of "x", "eps", "v", "F", "score".

        Returns:
            [B, ...] in the dtype of the prediction, differentiable in prediction and x_t. Errors as for
            :meth:`add_noise`.
        """
        checks.is_one_of("source", source, PREDICTIONS)
        checks.is_one_of("target", target, PREDICTIONS)
        latents(prediction=prediction, x_t=x_t)
        r, x, y = self.rates(t, x_t), x_t.double(), prediction.double()
        if source == target:
            return prediction
        if source == "score":
            y, source = -r.sigma * y, "eps"
        elif source == "F":
            y, source = r.of_x * x + r.of_f * y, "v"
        y = _between(y, x, r, source, {"score": "eps", "F": "v"}.get(target, target))
        if target == "score":
            y = -y / r.sigma
        elif target == "F":
            y = (y - r.of_x * x) / r.of_f
        return y.to(prediction.dtype)


def _between(y: Tensor, x: Tensor, r: Rates, source: str, target: str) -> Tensor:
    """Of x, eps and v."""
    if source == target:
        return y
    if source == "x":
        return ((x - r.alpha * y) if target == "eps" else (r.d_sigma * x - r.turn * y)) / r.sigma
    if source == "eps":
        return ((x - r.sigma * y) if target == "x" else (r.d_alpha * x + r.turn * y)) / r.alpha
    return ((r.d_sigma * x - r.sigma * y) if target == "x" else (r.alpha * y - r.d_alpha * x)) / r.turn


@dataclass(frozen=True)
class TrigFlow(Path):
    """x_t = cos(t) x_0 + sin(t) z, z = sigma_data eps, for t from 0 to pi / 2.

    The network takes x_t / sigma_data, v = sigma_data F (Lu & Song, "Simplifying, stabilizing and scaling
    continuous-time consistency models", 2024).
    """

    sigma_data: float = 1.0
    last: ClassVar[float] = math.pi / 2

    def __post_init__(self) -> None:
        checks.finite_number("sigma_data", self.sigma_data, above=0)

    def at(self, t: Tensor) -> Rates:
        cos, sin, s = t.cos(), t.sin(), self.sigma_data
        return Rates(cos, s * sin, -sin, s * cos, torch.zeros_like(t), torch.full_like(t, s))

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.atan2(sigma / self.sigma_data, alpha)


@dataclass(frozen=True)
class RectifiedFlow(Path):
    """x_t = (1 - t) x_0 + t eps, v = eps - x_0, for t from 0 to 1 (Liu et al., "Flow straight and fast", 2022)."""

    last: ClassVar[float] = 1.0

    def at(self, t: Tensor) -> Rates:
        one = torch.ones_like(t)
        return Rates(1 - t, t, -one, one, torch.zeros_like(t), one)

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / (alpha + sigma)


@dataclass(frozen=True)
class EDM(Path):
    """x_t = x_0 + t eps, where t is sigma, from 0; v = eps.

    The network takes c_in x_t = x_t / sqrt(t^2 + s^2) with s = sigma_data, and x_0 = c_skip x_t + c_out F with
    c_skip = s^2 / (t^2 + s^2), c_out = t s / sqrt(t^2 + s^2) (Karras et al., "Elucidating the design space of
    diffusion-based generative models", 2022).
    """

    sigma_data: float = 0.5
    last: ClassVar[float] = math.inf

    def __post_init__(self) -> None:
        checks.finite_number("sigma_data", self.sigma_data, above=0)

    def at(self, t: Tensor) -> Rates:
        one, total = torch.ones_like(t), t.square() + self.sigma_data**2
        return Rates(one, t, torch.zeros_like(t), one, t / total, -self.sigma_data / total.sqrt())

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return sigma / alpha


def is_path(name: str, path: Any) -> None:
    """A path."""
    if not isinstance(path, Path):
        raise TypeError(f"{name} must be a TrigFlow, RectifiedFlow or EDM, got {type(path).__name__}")


def transfer(x_t: Tensor, t: Tensor, source: Path, target: Path) -> tuple[Tensor, Tensor]:
    """The same noisy samples on another path: x_0 and eps stay, what they are scaled with changes.

    Args:
        x_t: [B, ...] on ``source``.
        t: [B], [B, 1, ...] or [], of a float dtype.
        source, target: paths.

    Returns:
        x_t [B, ...] in its dtype and t [B] in its dtype, on ``target``. EDM has no end: pure noise comes there at
        infinity.

    Raises:
        As for :meth:`Path.add_noise`.
    """
    is_path("source", source)
    is_path("target", target)
    latents(x_t=x_t)
    r = source.rates(t, x_t)
    new = target.time(r.alpha.clamp(min=0), r.sigma)  # the cosine of pi / 2 in float32 is below 0
    at = target.at(new)
    scale = (at.alpha + at.sigma) / (r.alpha + r.sigma)  # one of both may be 0
    return (scale * x_t.double()).to(x_t.dtype), new.flatten().to(t.dtype)
