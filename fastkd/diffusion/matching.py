"""Distribution matching: what a real and a fake network say of a generator's noised sample, in; a loss out.

The real network is the teacher, after guidance; the fake one follows the generator's distribution, see
:mod:`fastkd.diffusion.critics`. Predictions are those of x_0 unless a loss says otherwise; ``path.convert`` makes them.
Every loss is the mean over a sample's entries, in float32 (float64), then reduced over samples: where a document sums
over entries, its loss is larger by their number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd import checks
from fastkd.diffusion import samples
from fastkd.diffusion.discrete import pseudo_huber

__all__ = [
    "balanced_gradient",
    "dmd_loss",
    "gradient_loss",
    "random_scales",
    "sid_loss",
    "sim_loss",
    "tdm_loss",
    "vsd_loss",
]


def gradient_loss(
    sample: Tensor,
    gradient: Tensor,
    *,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """A loss with a given gradient by the sample. In plain PyTorch::

        loss = 0.5 * (sample - (sample - weights * gradient).detach()).square().mean()    # of each sample

    Its gradient is weights * gradient / the number of a sample's entries (and / B with the mean over samples); where a
    document has 0.5 * sum / B or (gradient * sample).sum(), that number is not there.

    Args:
        sample: [B, ...] what the generator made, which learns.
        gradient: [B, ...], a constant.
        weights: a number, [B], [B, 1, ...] or [], constants: w(t) and the like.
        reduction: "mean" or "sum" over samples, or "none".
        on_nan: "raise": FloatingPointError where a sample's loss is not finite; "mask": such samples are left out, and
            counted (published codes call nan_to_num on single entries).

    Returns:
        The loss in float32 (float64): [], with reduction "none" [B]; with on_nan "mask" (loss, masked []).

    Raises:
        TypeError, ValueError: an argument that does not fit, by name. FloatingPointError: see ``on_nan``.
    """
    samples.latents(sample=sample, gradient=gradient)
    w = samples.vector("weights", weights, sample)

    def loss(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return _descent(x, g, w)

    return samples.reduce(loss, (sample, gradient.detach()), (w.detach(),), reduction, on_nan)


def dmd_loss(
    sample: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    weights: Tensor | float = 1.0,
    normalize: bool = True,
    floor: float = 1e-5,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Distribution matching distillation, DMD2's (Yin et al. 2024, arXiv 2405.14867). In plain PyTorch::

        gradient = weights * (fake - real) / (sample - real).abs().mean().clamp(min=floor)    # the mean of each sample
        loss = gradient_loss(sample, gradient)

    ==================================  ===============================================================================
    DMD, equations 7-8 (Yin 2023)       weights = alpha_t
    DMD2; DisBack, multi-student DMD    as it is; DisBack's ``real`` is a recorded checkpoint of the teacher, in reverse
                                        order; each of many students has its own part of the conditions
    rCM                                 2 * D * dmd_loss of samples of D entries: it sums, without 0.5
    f-distill (Xu 2025)                 weights = f_distill_weights(density_ratio(logits), divergence)
    Diff-Instruct (Luo 2023)            normalize=False: the gradient is fake - real
    phased DMD (arXiv 2510.27684)       normalize=False, of scores, with x_t of ``phased_noise`` as the sample, through
                                        which the generator's learns: a factor alpha_t / alpha_s
    ==================================  ===============================================================================

    Args:
        sample: [B, ...] what the generator made, which learns.
        real, fake: [B, ...] predictions of x_0, constants.
        weights: a number, [B], [B, 1, ...] or [], constants.
        normalize: divide by the mean distance of the sample from ``real``.
        floor: of that distance, where it is one (SiD and rCM clip at 1e-5; DMD2 does not; FastGen adds 1e-6 instead).
        reduction, on_nan, Returns, Raises: as :func:`gradient_loss`.
    """
    samples.latents(sample=sample, real=real, fake=fake)
    least = checks.finite_number("floor", floor, above=0)
    w = samples.vector("weights", weights, sample)

    def loss(x: Tensor, real: Tensor, fake: Tensor, w: Tensor) -> Tensor:
        return _descent(x, fake - real, w / _distance(x, real, least) if normalize else w)

    return samples.reduce(loss, (sample, real.detach(), fake.detach()), (w.detach(),), reduction, on_nan)


def vsd_loss(
    sample: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Variational score distillation, of predictions of the noise (ProlificDreamer, Wang et al. 2023, arXiv 2305.16213;
    SwiftBrush, Nguyen & Tran 2023). In plain PyTorch::

        loss = gradient_loss(sample, weights * (real - fake))

    ====================================================  ========================  ========================
    loss                                                  real                      fake
    ====================================================  ========================  ========================
    VSD, SwiftBrush                                       teacher                   fake network
    random-guidance VSD (SNOOPI), :func:`random_scales`   teacher, guided           fake network, guided
    SDS (DreamFusion)                                     teacher, guided           the noise itself
    CSM, classifier score distillation (Yu et al. 2023)   teacher, conditional      teacher, unconditional
    BSD, bootstrapped (DreamCraft3D)                      teacher tuned on renders  fake network
    ====================================================  ========================  ========================

    The other BSD is :func:`balanced_gradient`. Published weights w(t): sigma_t^2 (VSD, SDS), 1 (CSM). Most of these
    documents sum over entries; SwiftBrush has the mean. d x_t / d sample = alpha_t is not in the gradient, as in their
    codes.

    Args:
        sample: [B, ...] what the generator made, which learns.
        real, fake: [B, ...] predictions of the noise, constants.
        weights: a number, [B], [B, 1, ...] or [], constants.
        reduction, on_nan, Returns, Raises: as :func:`gradient_loss`.
    """
    samples.latents(sample=sample, real=real, fake=fake)
    y, z = samples.wide(real.detach(), fake.detach())
    return gradient_loss(sample, y - z, weights=weights, reduction=reduction, on_nan=on_nan)


def tdm_loss(
    sample: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    c: float = 1e-3,
    over: str = "entries",
    weights: Tensor | float = 1.0,
    floor: float = 1e-5,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Trajectory distribution matching (TDM, Luo et al. 2025, arXiv 2503.06674), pseudo-Huber. In plain PyTorch::

        e = sample - (sample + real - fake).detach()
        loss = (sqrt(e**2 + c**2) - c).mean() / distance          # over="entries", the code
        loss = (sqrt(e.square().sum() + c**2) - c) / e.numel()    # over="sample", the paper

    each of a sample, with distance = (sample - real).abs().mean().clamp(min=floor), a constant. The paper's c is
    0.00054 sqrt(e.numel()), and it does not divide by e.numel(). The code's L2 variant has twice the gradient of
    :func:`dmd_loss`.

    Args:
        sample: [B, ...] the student's x_0 at a step, which learns.
        real, fake: [B, ...] predictions of x_0, ``real`` guided, of the sample noised within the step's interval
            (``phased_noise``); constants.
        c: where it turns from squares to distances.
        over: "entries" or "sample".
        weights: a number, [B], [B, 1, ...] or [], constants: the loss is multiplied by them.
        floor: of the divisor over entries.
        reduction, on_nan, Returns, Raises: as :func:`gradient_loss`.
    """
    samples.latents(sample=sample, real=real, fake=fake)
    c, least = checks.finite_number("c", c, above=0), checks.finite_number("floor", floor, above=0)
    checks.is_one_of("over", over, ("entries", "sample"))
    w = samples.vector("weights", weights, sample)

    def loss(x: Tensor, real: Tensor, fake: Tensor, w: Tensor) -> Tensor:
        squares, entries = (x - x.detach() + (fake - real)).square(), math.prod(x.shape[1:])
        if over == "entries":
            return w * samples.mean(pseudo_huber(squares, c)) / _distance(x, real, least)
        return w * pseudo_huber(samples.mean(squares) * entries, c) / entries

    return samples.reduce(loss, (sample, real.detach(), fake.detach()), (w.detach(),), reduction, on_nan)


def sid_loss(
    sample: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    alpha: float = 1.0,
    weights: Tensor | float = 1.0,
    normalize: bool = True,
    floor: float = 1e-5,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Score identity distillation (SiD, Zhou et al. 2024, arXiv 2404.04057), of one step or of many. In plain PyTorch::

        y = real - fake
        loss = (y * (real - sample - alpha * y)).mean() / (sample - real).abs().mean().clamp(min=floor).detach()

    of each sample. The official code sums over entries and multiplies by 100. Few-step SiD has the same loss on the
    sample of a step drawn at random, earlier steps detached. Uni-Instruct (Wang et al. 2025, arXiv 2505.20755) is this
    loss with alpha 1 and weights = uni_instruct_weights(ratio, divergence).

    Args:
        sample: [B, ...] what the generator made, which learns, also through
        real, fake: [B, ...] predictions of x_0 of x_t = alpha_t sample + sigma_t noise, both ATTACHED to the sample:
            networks with frozen parameters, without no_grad. Detached ones would leave DMD's gradient, whatever alpha.
        alpha: published are 1.0 and 1.2.
        weights: a number, [B], [B, 1, ...] or [], constants: the loss is multiplied by them.
        normalize: divide by the mean distance of the sample from ``real``, the only constant of the loss.
        floor: of that distance, where it is one.
        reduction, on_nan, Returns: as :func:`gradient_loss`.

    Raises:
        ValueError: the sample requires grad, and a prediction does not. Otherwise as :func:`gradient_loss`.
    """
    samples.latents(sample=sample, real=real, fake=fake)
    _attached(sample, real=real, fake=fake)
    alpha, least = checks.finite_number("alpha", alpha), checks.finite_number("floor", floor, above=0)
    w = samples.vector("weights", weights, sample)

    def loss(x: Tensor, real: Tensor, fake: Tensor, w: Tensor) -> Tensor:
        y = real - fake
        found = y * (real - x - alpha * y)
        return w * samples.mean(found) / (_distance(x, real, least) if normalize else 1)

    return samples.reduce(loss, (sample, real, fake), (w.detach(),), reduction, on_nan)


def sim_loss(
    sample: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    c: float,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """Score implicit matching (SIM), pseudo-Huber (Luo et al. 2024, arXiv 2410.16794). In plain PyTorch::

        y = real - fake
        loss = (y * (fake - sample)).mean() / sqrt(y.square().sum() + c**2)    # of each sample

    The theorem holds for SiD's alpha = 1 alone, and the root replaces SiD's divisor; nothing is a constant. The paper
    sums over entries. With squares in place of the pseudo-Huber it is 2 * sid_loss(alpha=1, normalize=False).

    Args:
        sample: [B, ...] what the generator made, which learns, also through
        real, fake: [B, ...] predictions of x_0, both attached to the sample, as for :func:`sid_loss`.
        c: in units of x_0, of the norm over a sample; c of scores is this times alpha_t / sigma_t^2. It has no default:
            the published value could not be confirmed.
        weights: a number, [B], [B, 1, ...] or [], constants: the loss is multiplied by them.
        reduction, on_nan, Returns, Raises: as :func:`sid_loss`.
    """
    samples.latents(sample=sample, real=real, fake=fake)
    _attached(sample, real=real, fake=fake)
    c = checks.finite_number("c", c, above=0)
    w = samples.vector("weights", weights, sample)

    def loss(x: Tensor, real: Tensor, fake: Tensor, w: Tensor) -> Tensor:
        y = real - fake
        root = torch.hypot(samples.norm(y), torch.full((), c, dtype=y.dtype, device=y.device))
        return w * samples.mean(y * (fake - x)) / root + 0 * root  # what overflows is an error, not 0

    return samples.reduce(loss, (sample, real, fake), (w.detach(),), reduction, on_nan)


def balanced_gradient(conditional: Tensor, unconditional: Tensor, scale: float = 0.018) -> Tensor:
    """Balanced score distillation's gradient (BSD; PlacidDreamer, Huang et al. 2024, arXiv 2407.13976). In plain
    PyTorch::

        c = conditional - unconditional;  d = scale * unconditional
        a = (((d - c) * d).sum() / (d - c).square().sum()).clamp(0, 1)    # of each sample
        gradient = a * c + (1 - a) * d

    the shortest vector between c and d, which goes along both; for :func:`gradient_loss` with weights of alpha_t. The
    code takes one ``a`` for its batch of one.

    Args:
        conditional, unconditional: [B, ...] predictions of the noise.
        scale: of the unconditional one.

    Returns:
        [B, ...] in the dtype of conditional, a constant.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    samples.latents(conditional=conditional, unconditional=unconditional)
    u = checks.finite_number("scale", scale)
    y, z = samples.wide(conditional.detach(), unconditional.detach())
    c, d = y - z, u * z
    size = samples.norm(d - c).square().clamp(min=torch.finfo(y.dtype).tiny)
    a = samples.along((samples.mean((d - c) * d) * math.prod(y.shape[1:]) / size).clamp(0, 1), y)
    return (a * c + (1 - a) * d).to(conditional.dtype)


def random_scales(like: Tensor, low: float, high: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Guidance scales drawn uniformly, one for each sample (SNOOPI, Nguyen et al. 2024, arXiv 2412.02687)::

        k = random_scales(sample, 0.5, 4.0)                 # SD 1.5 and 2.1; 0.5 to 3 for PixArt-alpha
        real = guided(real, real_empty, k)                  # the same k for both networks
        fake = guided(fake, fake_empty, k)
        loss = vsd_loss(sample, real, fake, weights=sigma.square())

    Args:
        like: [B, ...].
        low, high: the least and the largest.
        generator: of the draw.

    Returns:
        [B, 1, ..., 1] in the dtype and on the device of ``like``.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    samples.latents(like=like)
    least = checks.finite_number("low", low)
    most = checks.finite_number("high", high)
    if most < least:
        raise ValueError(f"high must be at least low, {least:g}, got {most:g}")
    u = torch.rand((len(like), *(1,) * (like.dim() - 1)), generator=generator, device=like.device)
    return (least + (most - least) * u).to(like.dtype)


def _descent(x: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - scale g))^2 of each sample, without the rounding of x - scale g."""
    return 0.5 * scale.square() * samples.mean(g.square()) + scale * samples.still(x, g)


def _distance(x: Tensor, real: Tensor, floor: float) -> Tensor:
    """The mean |x - real| of each sample, a constant."""
    return samples.mean((x - real).detach().abs()).clamp(min=floor)


def _attached(sample: Tensor, **predictions: Tensor) -> None:
    for name, y in predictions.items():
        if torch.is_grad_enabled() and sample.requires_grad and not y.requires_grad:
            raise ValueError(
                f"{name} must carry the sample's gradient, got a constant: its network runs on x_t without no_grad and "
                "detach; without that gradient this loss would be DMD's"
            )
