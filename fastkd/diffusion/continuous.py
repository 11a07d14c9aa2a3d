"""Continuous-time consistency losses: a network F, its tangent tF and what they should be, in; a loss out.

F and tF come from :func:`fastkd.diffusion.network_jvp`. Latents are brought to float32 (float64), coefficients of time
are computed in float64 and rounded once, norms and means are of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fastkd import checks
from fastkd.diffusion import samples
from fastkd.diffusion.paths import RectifiedFlow, TrigFlow

__all__ = ["alphaflow_loss", "facm_loss", "meanflow_loss", "rcm_loss", "scm_loss", "scm_tangents", "tvm_loss"]


def scm_tangents(velocity: Tensor, t: Tensor, sigma_data: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cos t sin t velocity / sigma_data, cos t sin t): the direction in which sCM's network, of (x_t / sigma_data, t),
    is pushed, rescaled so that it stays finite towards t = pi / 2. rCM's is the same, with the teacher's velocity.

    Args:
        velocity: [B, ...] dx_t / dt: of the path in training, of the teacher (sigma_data F_teacher) in distillation.
        t: [B], [B, 1, ...] or [], TrigFlow times.
        sigma_data: s.

    Returns:
        [B, ...] in the dtype of velocity, and the shape and dtype of t.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    samples.latents(velocity=velocity)
    s = checks.finite_number("sigma_data", sigma_data, above=0)
    u = samples.times("t", t, velocity, 0.0, TrigFlow.last)
    rate = u.cos() * u.sin()
    return (rate * velocity.double() / s).to(velocity.dtype), (t.double().cos() * t.double().sin()).to(t.dtype)


def scm_loss(
    prediction: Tensor,
    tangent: Tensor,
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    *,
    sigma_data: float = 1.0,
    warmup: float = 1.0,
    log_variance: Tensor | None = None,
    prior_weight: bool = False,
    c: float = 0.1,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Continuous-time consistency, training or distillation, on TrigFlow (Lu & Song, "Simplifying, stabilizing and
    scaling continuous-time consistency models", 2024). In plain PyTorch::

        F_const, cos, sin = prediction.detach(), t.cos(), t.sin()
        g = -cos**2 * (sigma_data * F_const - velocity) - warmup * (cos * sin * x_t + sigma_data * tangent)
        g = (g / (g.norm() + c)).detach()                       # the norm of each sample
        loss = (prediction - F_const - g).square().mean()       # of each sample
        loss = loss / (sigma_data * t.tan())                    # with prior_weight
        loss = exp(-log_variance) * loss + log_variance

    But for the log variance, the loss is the mean of g^2 and its gradient -2 g / numel.

    Args:
        prediction: [B, ...] F(x_t / sigma_data, t), which learns.
        tangent: [B, ...] of F along :func:`scm_tangents`; a constant, as are
        x_t: [B, ...] and
        velocity: [B, ...] dx_t / dt, of the path in training, of the teacher in distillation.
        t: [B], [B, 1, ...] or [], from 0 to pi / 2. In torch.compile, vmap and on a GPU nobody looks at values: there a
            time outside counts as NaN, see ``on_nan``.
        sigma_data: of the data.
        warmup: r, from 0 to 1, see :func:`tangent_warmup`.
        log_variance: [B], learned, of t; None: 0.
        prior_weight: multiply by 1 / (sigma_data tan t), as the code of SANA-Sprint does (infinite at t = 0); in the
            paper that weight is part of g alone.
        c: of the normalisation.
        reduction: "mean" or "sum" over samples, or "none".
        on_nan: "raise": FloatingPointError where a sample's loss or time is not finite (in torch.compile, and where a
            look would wait for the device, an assertion there); "mask": samples with anything that is not finite are
            left out of the loss, of the mean's count and of gradients, and counted.

    Returns:
        The loss in float32 (float64): [], with reduction "none" [B]; with on_nan "mask" (loss, masked []).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. FloatingPointError: see ``on_nan``.
    """
    samples.latents(prediction=prediction, tangent=tangent, x_t=x_t, velocity=velocity)
    s, r = checks.finite_number("sigma_data", sigma_data, above=0), _share("warmup", warmup)
    checks.finite_number("c", c, above=0)
    u = samples.times("t", t, x_t, 0.0, TrigFlow.last).detach()
    learned = samples.vector("log_variance", 0.0 if log_variance is None else log_variance, x_t)

    def loss(F: Tensor, tF: Tensor, x: Tensor, v: Tensor, u: Tensor, lv: Tensor) -> Tensor:
        squares = _pulled(F, _tangent(u, u.cos().square(), s * F - v, r, x, s * tF), c)
        if prior_weight:
            squares = squares / (s * u.tan())
        return (-lv).exp() * squares + lv

    constants = tangent.detach(), x_t.detach(), velocity.detach()
    return samples.reduce(loss, (prediction, *constants), (u, learned), reduction, on_nan)


def rcm_loss(
    prediction: Tensor,
    tangent: Tensor,
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    *,
    warmup: float = 1.0,
    c: float = 0.1,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """The consistency part of rCM, on TrigFlow with sigma_data 1 (Zheng et al., "Large scale diffusion distillation via
    score-regularized continuous-time consistency", 2025). In plain PyTorch::

        F_const, cos, sin = prediction.detach(), t.cos(), t.sin()
        g = -cos * sqrt(1 - warmup**2 * sin**2) * (F_const - velocity) - warmup * (cos * sin * x_t + tangent)
        g = (g / (g.norm() + c)).detach()                       # the norm of each sample
        loss = (prediction - F_const - g).square().mean()       # of each sample

    With warmup 1 it is :func:`scm_loss`. The official code sums over the entries of a sample, here and in the DMD loss
    sum((x - sg(x - grad))^2) that it adds with the weight 0.01: to this mean, a DMD loss of half a mean is added with
    0.02.

    Args:
        prediction: [B, ...] F(x_t, t), which learns.
        tangent: [B, ...] of F along ``scm_tangents(velocity, t)``; a constant, as are
        x_t: [B, ...] and
        velocity: [B, ...] the teacher's F(x_t, t), with its guidance.
        t: [B], [B, 1, ...] or [], from 0 to pi / 2.
        warmup: r, from 0 to 1, see :func:`tangent_warmup`; 0 fits the teacher.
        c: of the normalisation.
        reduction, on_nan: as for :func:`scm_loss`.

    Returns, Raises:
        As for :func:`scm_loss`.
    """
    samples.latents(prediction=prediction, tangent=tangent, x_t=x_t, velocity=velocity)
    r = _share("warmup", warmup)
    checks.finite_number("c", c, above=0)
    u = samples.times("t", t, x_t, 0.0, TrigFlow.last).detach()

    def loss(F: Tensor, tF: Tensor, x: Tensor, v: Tensor, u: Tensor) -> Tensor:
        root = (u.cos().square() + (1 - r * r) * u.sin().square()).sqrt()  # 1 - r^2 sin^2 without its cancellation
        return _pulled(F, _tangent(u, u.cos() * root, F - v, r, x, tF), c)

    constants = tangent.detach(), x_t.detach(), velocity.detach()
    return samples.reduce(loss, (prediction, *constants), (u,), reduction, on_nan)


def meanflow_loss(
    prediction: Tensor,
    tangent: Tensor,
    velocity: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    warmup: float = 1.0,
    p: float = 1.0,
    eps: float = 1e-3,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """MeanFlow: the mean velocity from t to r, on RectifiedFlow (Geng et al., "Mean flows for one-step generative
    modeling", 2025). In plain PyTorch::

        target = (velocity - warmup * (t - r) * tangent).detach()
        error = (prediction - target).square().mean()           # of each sample
        loss = error / (error.detach() + eps) ** p

    The official code sums over the D entries of a sample: its eps is D times ours (0.01 / D for ImageNet, with p = 1;
    1e-3 / D for CIFAR, with p = 0.75), and its loss D^(1 - p) times. Where t = r this is flow matching.

    Improved MeanFlow (Geng et al. 2025) has the same loss, with the tangent along the velocity that the network
    predicts, and adds that of its other head, ``meanflow_loss(v_head, zeros, velocity, t, t)``.

    Args:
        prediction: [B, ...] u(x_t, t, r), which learns.
        tangent: [B, ...] of u along (velocity, 1, 0) in (x_t, t, r), or (velocity, 1, 1) in (x_t, t, t - r); a
            constant, as is
        velocity: [B, ...] v = eps - x_0 of the path, or the teacher's, or a guided one.
        t: [B], [B, 1, ...] or [], from 0 to 1.
        r: likewise, at most t.
        warmup: of the tangent, from 0 to 1, see :func:`tangent_warmup`.
        p: power of the adaptive weight; 0: none.
        eps: of the adaptive weight.
        reduction, on_nan: as for :func:`scm_loss`.

    Returns, Raises:
        As for :func:`scm_loss`.
    """
    samples.latents(prediction=prediction, tangent=tangent, velocity=velocity)
    k, power, least = _share("warmup", warmup), checks.finite_number("p", p), checks.finite_number("eps", eps, above=0)
    u, w = _interval(t, "r", r, prediction)

    def loss(F: Tensor, tF: Tensor, v: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return _adaptive(samples.mean((F - v + samples.along(k * (u - w), F) * tF).square()), power, least)

    return samples.reduce(loss, (prediction, tangent.detach(), velocity.detach()), (u, w), reduction, on_nan)


def alphaflow_loss(
    prediction: Tensor,
    following: Tensor,
    velocity: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    alpha: float,
    clamp: float | None = None,
    eps: float = 1e-3,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """AlphaFlow: from flow matching (alpha = 1) over shortcuts (1/2) towards MeanFlow (0), on RectifiedFlow (Zhang et
    al., "AlphaFlow: understanding and improving MeanFlow models", 2025). In plain PyTorch::

        target = (alpha * velocity + (1 - alpha) * following).clamp(-clamp, clamp).detach()
        error = (prediction - target).square().mean()           # of each sample
        loss = alpha * error / (error.detach() + eps)           # where t = r alpha is 1, and nothing clamped

    Args:
        prediction: [B, ...] u(x_t, t, r), which learns.
        following: [B, ...] u(x_t - d velocity, t - d, r), d = alpha (t - r), of the same weights; a constant, as is
        velocity: [B, ...] v = eps - x_0 of the path, or a guided one.
        t: [B], [B, 1, ...] or [], from 0 to 1.
        r: likewise, at most t.
        alpha: above 0, up to 1; the limit 0 is :func:`meanflow_loss`.
        clamp: bound of the target's entries (published with guidance: 4); None: none.
        eps: of the adaptive weight.
        reduction, on_nan: as for :func:`scm_loss`.

    Returns, Raises:
        As for :func:`scm_loss`.
    """
    samples.latents(prediction=prediction, following=following, velocity=velocity)
    checks.finite_number("alpha", alpha, above=0)
    a, least = _share("alpha", alpha), checks.finite_number("eps", eps, above=0)
    bound = torch.inf if clamp is None else checks.finite_number("clamp", clamp, above=0)
    u, w = _interval(t, "r", r, prediction)

    def loss(F: Tensor, ahead: Tensor, v: Tensor, u: Tensor, w: Tensor) -> Tensor:
        share, most = (torch.full_like(u, x).where(w < u, y) for x, y in ((a, 1.0), (bound, torch.inf)))
        target = samples.along(share, F) * v + samples.along(1 - share, F) * ahead
        target = _clamped(target, samples.along(most, F))
        return share * _adaptive(samples.mean((F - target).square()), 1.0, least)

    return samples.reduce(loss, (prediction, following.detach(), velocity.detach()), (u, w), reduction, on_nan)


def facm_loss(
    prediction: Tensor,
    tangent: Tensor,
    anchor: Tensor,
    velocity: Tensor,
    t: Tensor,
    *,
    p: float = 0.5,
    eps: float = 1e-3,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """FACM: consistency to t = 0, anchored by flow matching, on RectifiedFlow (Peng et al., "Flow-anchored consistency
    models", 2025). In plain PyTorch::

        F_const = prediction.detach()
        step = (F_const - velocity + t * tangent).clamp(-1, 1)
        target = F_const - (1 - (1 - t) ** p) * step.detach()
        error = (prediction - target).square().mean()           # of each sample
        consistency = sin(pi / 2 * t) * error / (error.detach() + eps).sqrt()
        flow = (anchor - velocity).square().mean() + (1 - cosine_similarity(anchor, velocity, dim=1)).mean()
        loss = consistency + flow

    The paper's time runs the other way: ours is 1 - t, and velocity and prediction change sign.

    Args:
        prediction: [B, C, ...] F(x_t, t), which learns: x_0 = x_t - t F.
        tangent: [B, C, ...] of F along (velocity, 1) in (x_t, t); a constant.
        anchor: [B, C, ...] F as a flow, which learns: the same network at the time -t (the paper's 2 - t), or with
            another condition that says so.
        velocity: [B, C, ...] v = eps - x_0 of the path, or the teacher's, or a guided one; a constant.
        t: [B], [B, 1, ...] or [], from 0 to 1.
        p: with which the target moves from F to the teacher's as t grows.
        eps: of the adaptive weight.
        reduction, on_nan: as for :func:`scm_loss`.

    Returns, Raises:
        As for :func:`scm_loss`.
    """
    samples.latents(prediction=prediction, tangent=tangent, anchor=anchor, velocity=velocity)
    if prediction.dim() < 2:
        raise ValueError(f"prediction must have shape [B, C, ...], got {list(prediction.shape)}")
    power, least = checks.finite_number("p", p, above=0), checks.finite_number("eps", eps, above=0)
    u = samples.times("t", t, prediction, 0.0, RectifiedFlow.last).detach()

    def loss(F: Tensor, tF: Tensor, flow: Tensor, v: Tensor, u: Tensor) -> Tensor:
        share = -torch.expm1(power * torch.log1p(-u))  # 1 - (1 - t)^p
        step = samples.along(share, F) * _clamped(F.detach() - v + samples.along(u, F) * tF, 1.0)
        error = samples.mean(step.square()) + 2 * samples.still(F, step)
        beta = (u * (torch.pi / 2)).sin()
        apart = samples.mean((flow - v).square()) + samples.mean(1 - cosine_similarity(flow, v, dim=1))
        return beta * _adaptive(error, 0.5, least) + apart

    return samples.reduce(loss, (prediction, tangent.detach(), anchor, velocity.detach()), (u,), reduction, on_nan)


def tvm_loss(
    prediction: Tensor,
    tangent: Tensor,
    target: Tensor,
    instant: Tensor,
    velocity: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Terminal velocity matching: the velocity of a step from t at its end s is that of the flow, on RectifiedFlow
    (Zhou et al., "Terminal velocity matching", 2025). In plain PyTorch::

        terminal = (prediction + (s - t) * tangent - target.detach()).square().mean()  # of each sample; 0 where s = t
        flow = (instant - velocity.detach()).square().mean()
        loss = terminal + flow

    The gradient goes through the tangent, too. With guidance w the code has w F for a velocity and divides its loss by
    w^2: that is this loss with the velocity v + (1 / w - 1) F_ema(x_s', s', s') of no class.

    Args:
        prediction: [B, ...] F(x_t, t, s), which learns: f = x_t + (s - t) F, with guidance w F.
        tangent: [B, ...] of F along (0, 0, 1) in (x_t, t, s), or (0, 0, -1) in (x_t, t, t - s), which learns.
        target: [B, ...] F_ema(f, s, s), of averaged weights; a constant.
        instant: [B, ...] F(x_s', s', s') at times of their own, which learns.
        velocity: [B, ...] v = eps - x_0 of x_s', or the teacher's, or the guided one above; a constant.
        t: [B], [B, 1, ...] or [], from 0 to 1.
        s: likewise, at most t.
        reduction, on_nan: as for :func:`scm_loss`.

    Returns, Raises:
        As for :func:`scm_loss`.
    """
    samples.latents(prediction=prediction, tangent=tangent, target=target, instant=instant, velocity=velocity)
    u, w = _interval(t, "s", s, prediction)

    def loss(F: Tensor, dF: Tensor, ema: Tensor, flow: Tensor, v: Tensor, u: Tensor, w: Tensor) -> Tensor:
        terminal = samples.mean((F + samples.along(w - u, F) * dF - ema).square())
        apart = (w - u).abs() > 1e-8 + 1e-5 * u  # the code's isclose
        return terminal * apart + samples.mean((flow - v).square())

    given = prediction, tangent, target.detach(), instant, velocity.detach()
    return samples.reduce(loss, given, (u, w), reduction, on_nan)


def _tangent(u: Tensor, rate: Tensor, off: Tensor, r: float, x: Tensor, tF: Tensor) -> Tensor:
    """cos t df / dt of f = cos t x - sin t F, warmed up; ``rate`` is cos^2 t at r = 1."""
    rate, turn = _once(rate, u.cos() * u.sin())
    return -samples.along(rate, x) * off.detach() - r * (samples.along(turn, x) * x + tF)


def _once(*rows: Tensor) -> tuple[Tensor, ...]:
    """The rows, as Inductor computes what it concatenates: once, and not for every entry of a sample."""
    return torch.stack(rows).unbind()


def _pulled(F: Tensor, g: Tensor, c: float) -> Tensor:
    """The mean of (F - sg(F) - g)^2 of each sample, g normalised: that of g^2, with a gradient of -2 g / numel."""
    scale = 1 / (samples.norm(g) + c)
    return scale.square() * samples.mean(g.square()) - 2 * scale * samples.still(F, g)


def _adaptive(error: Tensor, p: float, eps: float) -> Tensor:
    """error^(1 - p), with a gradient by error of error^-p."""
    return error / (error.detach() + eps) ** p


def _clamped(x: Tensor, bound: Any) -> Tensor:
    """Within bounds, a number or as of :func:`samples.along`; an infinity, which they would hide, is NaN."""
    return x.clamp(-bound, bound).where(x.isfinite(), torch.nan)


def _interval(t: Tensor, name: str, r: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """RectifiedFlow times t and r, which is at most t: [B, 1, ..., 1] in float64, constants."""
    u, w = (samples.times(n, x, like, 0.0, RectifiedFlow.last).detach() for n, x in (("t", t), (name, r)))
    return u, samples.ordered(name, "at most t", w, w <= u, t, r)


def _share(name: str, value: Any) -> float:
    if not 0 <= checks.finite_number(name, value) <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")
    return float(value)
