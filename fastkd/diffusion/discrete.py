"""Few-step losses at discrete pairs of times: predictions and what they should be, in; a loss out.

With f the student, f_ema its average (or itself, without gradient), u < t, and x_u one step of the teacher down from
x_t (:func:`ddim_step` of :func:`guided`; in training ``path.add_noise`` of the same noise)::

    consistency        consistency_loss(f(x_t, t), f_ema(x_u, u))
    iCT                consistency_loss(f(x_t, t), f(x_u, u), distance="huber", weights=1 / (t - u))
    ECT                consistency_loss(f(x_t, t), f(x_u, u), distance="huber", c=0, weights=1 / t**2 + 1 / s_d**2)
    LCM, AnimateLCM    consistency_loss(f(x_t, t, w), f_ema(x_u, u, w), distance="elementwise huber")
    segmented, phased  s = segment_edge(t, edges)
                       consistency_loss(ddim_step(f(x_t, t), x_t, t, s, path), ddim_step(f(x_u, u), x_u, u, s, path))
    motion (MCM)       consistency_loss(f(x_t, t), f_ema(x_u, u), frames=2)
    BOOT               x_t = path.add_noise(y(noise, t), noise, t)
                       boot_loss(y(noise, u), y(noise, t), teacher(x_t, t), t, u, path)
                       + beta * consistency_loss(y(noise, last), teacher(x_last, last))
    rectified flow     t = u_shaped_times(n)
                       consistency_loss(v(x_t, t), noise - x_0, distance="huber", c=0.00054 * D**0.5, weights=1 - t)
    guidance           consistency_loss(f(x_t, t, w), guided(teacher(x_t, t, text), teacher(x_t, t), 1 + w))
    noise consistency  z_t, z_u = (TrigFlow().add_noise(z, noise, time) for time in (t, u))
                       consistency_loss(g(z_t), g(z_u)) + multiplier * consistency_loss(g(z), x)
    velocity           velocity_matching_loss(u(x_t, t), du, v(x_t, t), t)
                       + velocity_distillation_loss(u(noise, 1), u(x_t, t), du, v(x_t, t), t)

MLCM (Xie et al. 2024) and phased consistency (Wang et al. 2024) keep their segments; Hyper-SD (Ren et al. 2024) goes
from 8 to 4, 2 and 1, and its exact loss (TSCD) is not verified. Nor is noise consistency's (NCT, Luo et al. 2025)
distance, or how it raises its multiplier while the second loss is above a margin; nor BOOT's beta. Of the rectified
flow's, 1 - t goes with LPIPS of x_0 divided by t; without it the weight is 1. A network with c_skip and c_out, as
LCM's, brings its boundary with it; x_0 by :func:`ddim_step` to 0 is x_t at t = 0 without them. Velocity matching and
distillation (MDT-dist) each have their own x_t: noised data, and the student's noise - u(noise, 1) noised anew.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd import checks
from fastkd.diffusion import samples
from fastkd.diffusion.paths import PREDICTIONS, Path, RectifiedFlow, is_path

__all__ = [
    "boot_loss",
    "consistency_loss",
    "ddim_step",
    "guided",
    "segment_edge",
    "u_shaped_times",
    "velocity_distillation_loss",
    "velocity_matching_loss",
]

HUBER = {"huber": 0.00054, "elementwise huber": 0.001}  # c as published: iCT; LCM, PCM and MCM
DISTANCES = ("mse", *HUBER)


def consistency_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    distance: str = "mse",
    c: float | None = None,
    frames: int | None = None,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """What a network says at one time against what it, or another, says at a time before. In plain PyTorch::

        e = prediction - target.detach()                            # with frames: of e.diff(dim=frames)
        loss = weights * e.square().mean()                          # of each sample; "mse", or
        loss = weights * ((e.square().mean() + c**2).sqrt() - c)    # "huber", or
        loss = weights * ((e.square() + c**2).sqrt() - c).mean()    # "elementwise huber"

    The papers' pseudo-Huber of a sample of D entries has the sum of squares where this has the mean: iCT's, of
    0.00054 sqrt(D), is sqrt(D) times this of c = 0.00054; that of Lee et al., of 0.00054 D and divided by D, is this of
    c = 0.00054 sqrt(D), divided by sqrt(D). ECT's is sqrt(D) times this of c = 0. Meng et al. and MLCM sum, too.

    Args:
        prediction: [B, ...], which learns.
        target: [B, ...], a constant.
        distance: "mse", "huber" (of the root mean square of a sample) or "elementwise huber".
        c: of the pseudo-Huber distances, from 0, where they are the root mean square and the mean absolute value; None:
            0.00054 and 0.001.
        frames: the dimension of frames: differences of neighbours are compared and not the frames (motion, MCM).
        weights: a number, [B], [B, 1, ...] or [], constants, such as 1 / (t - u).
        reduction: "mean" or "sum" over samples, or "none".
        on_nan: "raise": FloatingPointError where a sample's loss is not finite; "mask": such samples are left out, and
            counted.

    Returns:
        The loss in float32 (float64): [], with reduction "none" [B]; with on_nan "mask" (loss, masked []).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. FloatingPointError: see ``on_nan``.

    Song et al., "Consistency models", 2023; Song & Dhariwal, "Improved techniques for training consistency models",
    2023 (iCT); Geng et al., "Consistency models made easy", 2024 (ECT); Luo et al., "Latent consistency models", 2023;
    Zhai et al., "Motion consistency model", 2024, of whose targets frame differences are one; Lee et al., "Improving
    the training of rectified flows", 2024; Meng et al., "On distillation of guided diffusion models", 2023; Jensen &
    Sadat, arXiv 2503.07274, 2025 (guidance).
    """
    samples.latents(prediction=prediction, target=target)
    checks.is_one_of("distance", distance, DISTANCES)
    width = _width(distance, c)
    if frames is not None:
        _has_frames(prediction, frames)
    w = samples.vector("weights", weights, prediction)

    def loss(y: Tensor, goal: Tensor, w: Tensor) -> Tensor:
        e = y - goal
        return w * _distance(e if frames is None else e.diff(dim=frames), distance, width)

    return samples.reduce(loss, (prediction, target.detach()), (w.detach(),), reduction, on_nan)


def _width(distance: str, c: float | None) -> float:
    """c of a pseudo-Huber distance."""
    if distance == "mse" and c is not None:
        raise ValueError(f"c must be None with distance 'mse', got {c!r}")
    width = HUBER.get(distance, 0.0) if c is None else checks.finite_number("c", c)
    if width < 0:
        raise ValueError(f"c must be 0 or above, got {c}")
    return width


def _has_frames(x: Tensor, frames: Any) -> None:
    if isinstance(frames, bool) or not isinstance(frames, int) or not 0 < frames < x.dim() or x.shape[frames] < 2:
        raise ValueError(
            f"frames must be a dimension from 1 of at least two frames, got {frames!r} with shape {list(x.shape)}"
        )


def _distance(e: Tensor, distance: str, c: float) -> Tensor:
    """[B]."""
    if distance == "mse":
        return samples.mean(e.square())
    if distance == "huber":
        if c == 0:  # the root of a mean has no derivative at 0, the norm's is 0
            return samples.norm(e) / math.sqrt(e.shape[1:].numel())
        return pseudo_huber(samples.mean(e.square()), c)
    return samples.mean(e.abs() if c == 0 else pseudo_huber(e.square(), c))


def pseudo_huber(squares: Tensor, c: float) -> Tensor:
    """sqrt(squares + c^2) - c, which would lose the digits of what is small beside c^2."""
    return squares / ((squares + c * c).sqrt() + c)


def ddim_step(prediction: Tensor, x_t: Tensor, t: Tensor, s: Tensor, path: Path, kind: str = "x") -> Tensor:
    """From t to s along what a network says at t: alpha(s) x_0 + sigma(s) eps. Of the student, to the edge of a
    segment, it is what segmented consistency compares; of the teacher, the next point of its trajectory.

    Args:
        prediction: [B, ...], of
        kind: "x", "eps", "v", "F" or "score".
        x_t: [B, ...] on ``path``.
        t, s: [B], [B, 1, ...] or [], of a float dtype; constants. Where they are equal the step is x_t, at t = 0, too.
        path: :class:`TrigFlow`, :class:`RectifiedFlow` or :class:`EDM`.

    Returns:
        [B, ...] in the dtype of x_t, computed in float64, differentiable in prediction and x_t. Where alpha(t) is 0 eps
        and score say nothing of x_0, where sigma(t) is 0 x says nothing of eps: what comes there means nothing.

    Raises:
        TypeError: not a float tensor, or no path. ValueError: another kind, a time outside the path, shapes or devices
            that do not match.

    Song et al., "Denoising diffusion implicit models", 2020.
    """
    is_path("path", path)
    checks.is_one_of("kind", kind, PREDICTIONS)
    samples.latents(prediction=prediction, x_t=x_t)
    y, x = prediction.double(), x_t.double()
    start, end = (samples.times(name, u, x_t, 0.0, path.last).detach() for name, u in (("t", t), ("s", s)))
    moves = start != end
    # where nothing moves, any time inside: at an end the conversions divide by 0
    inside = start.clamp(max=path.last).where(moves, 0.5)
    x_0, eps = (path.convert(y, x, inside, kind, target) for target in ("x", "eps"))
    at = path.at(end)
    return (at.alpha * x_0 + at.sigma * eps).where(moves, x).to(x_t.dtype)


def segment_edge(t: Tensor, edges: Tensor) -> Tensor:
    """The lower edge of the segment of each time: the last edge below it. A time on an edge belongs to the segment that
    ends there. Both times of a pair go to the edge of the later, t.

    Args:
        t: any shape, of a float dtype.
        edges: [E], ascending, such as ``torch.linspace(0, path.last, segments + 1)``.

    Returns:
        The shape and dtype of t; the first edge for what is not above it.

    Raises:
        TypeError: not a float tensor. ValueError: edges that are none, or do not ascend; devices that do not match.
    """
    checks.is_float("t", t)
    if checks.is_float("edges", edges).dim() != 1 or len(edges) == 0:
        raise ValueError(f"edges must have shape [E], E from 1, got {list(edges.shape)}")
    checks.same_device(t=t, edges=edges)
    if checks.legible(edges):
        checks.all_values("edges", "above the edge before", edges[1:], edges[1:] > edges[:-1])
    edges = edges.detach().to(t.dtype)
    return edges[(torch.searchsorted(edges, t.detach().contiguous()) - 1).clamp(min=0)]


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional).

    Args:
        conditional: [B, ...], a prediction of any kind.
        unconditional: [B, ...] of that kind.
        scale: a number, [B], [B, 1, ...] or []; 1 + w where w is the guidance of Meng et al. and of LCM.

    Returns:
        [B, ...] in the dtype of conditional, computed in float64; differentiable.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.

    Ho & Salimans, "Classifier-free diffusion guidance", 2022.
    """
    samples.latents(conditional=conditional, unconditional=unconditional)
    if isinstance(scale, Tensor):
        by: Tensor | float = samples.each("scale", scale, conditional)
    else:
        by = checks.finite_number("scale", scale)
    without = unconditional.double()
    return (without + by * (conditional.double() - without)).to(conditional.dtype)


def boot_loss(
    prediction: Tensor,
    previous: Tensor,
    teacher: Tensor,
    t: Tensor,
    s: Tensor,
    path: Path,
    *,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Bootstrapping from noise alone (BOOT, Gu et al. 2023): the student y(noise, t) says the signal of the teacher's
    trajectory at t, and learns a DDIM step of it. In plain PyTorch::

        k = 1 - sigma(s) * alpha(t) / (alpha(s) * sigma(t))
        target = (previous + k * (teacher - previous)).detach()
        loss = (prediction - target).square().mean() / k**2         # of each sample

    The target is the signal of :func:`ddim_step` from alpha(t) previous + sigma(t) noise to s. 1 / k^2 brings steps of
    any length to one scale, as in OFTSR's code; the paper's own weights are not verified.

    Args:
        prediction: [B, ...] y(noise, s), which learns.
        previous: [B, ...] y(noise, t); a constant, as is
        teacher: [B, ...] the teacher's x_0 at alpha(t) y(noise, t) + sigma(t) noise and t.
        t, s: [B], [B, 1, ...] or [], of a float dtype, s below t.
        path: :class:`TrigFlow`, :class:`RectifiedFlow` or :class:`EDM`.
        reduction: "mean" or "sum" over samples, or "none".
        on_nan: "raise": FloatingPointError where a sample's loss is not finite; "mask": such samples are left out, and
            counted.

    Returns, Raises:
        As :func:`consistency_loss`. TypeError: no path.
    """
    is_path("path", path)
    samples.latents(prediction=prediction, previous=previous, teacher=teacher)
    start, end = (samples.times(name, u, prediction, 0.0, path.last).detach() for name, u in (("t", t), ("s", s)))
    end = samples.ordered("s", "below t", end, end < start, t, s)
    a, b = path.at(start), path.at(end)
    whole = b.alpha * a.sigma

    def loss(y: Tensor, before: Tensor, x: Tensor, rate: Tensor) -> Tensor:
        # (y - target) / k: of a short step little is left of y - target
        return samples.mean(((y - before) * samples.along(rate, y) - (x - before)).square())

    rate = whole / (whole - b.sigma * a.alpha)  # 1 / k
    return samples.reduce(loss, (prediction, previous.detach(), teacher.detach()), (rate,), reduction, on_nan)


def u_shaped_times(
    n: int,
    a: float = 4.0,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times [n] of density ~ exp(a t) + exp(a (1 - t)), from 1e-5 to 1 - 1e-5, as drawn by the code of Lee et al.,
    "Improving the training of rectified flows", 2024.

    Raises:
        TypeError, ValueError: n that is no integer from 0, a that is not above 0.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"n must be an integer from 0, got {n!r}")
    checks.finite_number("a", a, above=0)
    u, side = torch.rand(2, n, generator=generator, dtype=torch.float64, device=device)
    falling = -(u * math.expm1(-a)).log1p() / a  # density ~ exp(-a t)
    return (falling.where(side < 0.5, 1 - falling) * (1 - 2e-5) + 1e-5).to(dtype)


def velocity_matching_loss(
    prediction: Tensor,
    tangent: Tensor,
    velocity: Tensor,
    t: Tensor,
    *,
    c: float = 0.1,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """The mean velocity from t to 0 of a teacher's rectified flow (MDT-dist's velocity matching, Zhou et al., arXiv
    2509.04406, 2025). In plain PyTorch::

        target = (velocity - t * tangent / (tangent.norm() + c)).detach()     # the norm of each sample
        loss = (prediction - target).square().mean()                          # of each sample

    With the tangent as it is, it would be MeanFlow's loss with r = 0.

    Args:
        prediction: [B, ...] u(x_t, t), which learns.
        tangent: [B, ...] du / dt along (velocity, 1), of :func:`network_jvp`, or the difference quotient
            (u(x_t, t) - u(x_t - h velocity, t - h)) / h, published with h = 0.01; a constant, as is
        velocity: [B, ...] the teacher's, :func:`guided`.
        t: [B], [B, 1, ...] or [], from 0 to 1.
        c: of the normalisation.
        reduction: "mean" or "sum" over samples, or "none".
        on_nan: "raise": FloatingPointError where a sample's loss is not finite; "mask": such samples are left out, and
            counted.

    Returns, Raises:
        As :func:`consistency_loss`.
    """
    samples.latents(prediction=prediction, tangent=tangent, velocity=velocity)
    width = checks.finite_number("c", c, above=0)
    time = samples.times("t", t, prediction, 0.0, RectifiedFlow.last).detach()

    def loss(u: Tensor, du: Tensor, v: Tensor, t: Tensor) -> Tensor:
        return samples.mean((u - _target(v, du, t, width)).square())

    return samples.reduce(loss, (prediction, tangent.detach(), velocity.detach()), (time,), reduction, on_nan)


def velocity_distillation_loss(
    prediction: Tensor,
    student: Tensor,
    tangent: Tensor,
    velocity: Tensor,
    t: Tensor,
    *,
    c: float = 0.1,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """The student's sample x = noise - prediction moves by what velocity matching says of it (MDT-dist's velocity
    distillation, Zhou et al., arXiv 2509.04406, 2025). In plain PyTorch, with x noised anew to x_t::

        target = velocity - t * tangent / (tangent.norm() + c)                # the norm of each sample
        still = (student - target).detach()
        loss = (still + prediction - prediction.detach()).square().mean()     # of each sample

    Its value is the mean of (student - target)^2, its gradient 2 (student - target) / D of a sample of D entries: x
    moves along student - target.

    Args:
        prediction: [B, ...] u(noise, 1), which learns.
        student: [B, ...] u(x_t, t); a constant, as are
        tangent, velocity: [B, ...] at x_t, as in :func:`velocity_matching_loss`.
        t: [B], [B, 1, ...] or [], from 0 to 1, of x_t.
        c: of the normalisation.
        reduction: "mean" or "sum" over samples, or "none".
        on_nan: "raise": FloatingPointError where a sample's loss is not finite; "mask": such samples are left out, and
            counted.

    Returns, Raises:
        As :func:`consistency_loss`.
    """
    samples.latents(prediction=prediction, student=student, tangent=tangent, velocity=velocity)
    width = checks.finite_number("c", c, above=0)
    time = samples.times("t", t, prediction, 0.0, RectifiedFlow.last).detach()

    def loss(y: Tensor, u: Tensor, du: Tensor, v: Tensor, t: Tensor) -> Tensor:
        off = u - _target(v, du, t, width)
        return samples.mean(off.square()) + 2 * samples.still(y, off)

    constants = student.detach(), tangent.detach(), velocity.detach()
    return samples.reduce(loss, (prediction, *constants), (time,), reduction, on_nan)


def _target(velocity: Tensor, tangent: Tensor, t: Tensor, c: float) -> Tensor:
    """Of velocity matching."""
    size = samples.norm(tangent) + c
    return velocity - samples.along(t / size + 0 * size, velocity) * tangent  # what overflows is an error, not 0
