"""What distribution matching needs besides the generator's loss: the fake network's losses, GAN terms, density ratios.

As in :mod:`fastkd.diffusion.matching`, every loss is the mean over a sample's entries, then reduced over samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastkd import checks
from fastkd.diffusion import samples
from fastkd.diffusion.paths import PREDICTIONS, Path, is_path

__all__ = [
    "denoising_loss",
    "density_ratio",
    "discriminator_gan_loss",
    "f_distill_weights",
    "generator_gan_loss",
    "phased_noise",
    "ratio_by_time",
    "tdm_weights",
    "uni_instruct_weights",
]

EPS = 1e-6  # of the means by which f-distill divides
F_DISTILL = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": torch.sqrt,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman_chi_square": torch.reciprocal,
}


def denoising_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """The fake network's: mean(weights * (prediction - target)**2) of each sample, on noised samples of the generator.

    ======================  ============================================  ==============================================
    method                  prediction and target                         weights
    ======================  ============================================  ==============================================
    DMD                     x_0, the sample                               those with which the teacher was trained
    DMD2 and SiD on EDM     x_0, the sample                               1 / sigma^2 + 1 / sigma_data^2
    DMD2, VSD, SiD-LSG      the noise                                     1 (SwiftBrush: alpha_t^2)
    SiD-LSG, of v           v                                             snr / (snr + 1)
    rCM                     x_0, the sample; summed over entries          1 / sin^2 t
    TDM                     x_0, the student's x_0 at the step            :func:`tdm_weights`
    phased DMD              v, the target of :func:`phased_noise`         1 (its code)
    ======================  ============================================  ==============================================

    snr = (alpha_t / sigma_t)^2. Phased DMD's paper has clamp(1 / b^2, 0, 10), in a place that is not verified.

    Args:
        prediction: [B, ...] of x_t, made of the sample without its gradient; it learns.
        target: [B, ...], a constant.
        weights: a number, [B], [B, 1, ...] or [], constants.
        reduction, on_nan, Returns, Raises: as ``gradient_loss``.
    """
    samples.latents(prediction=prediction, target=target)
    w = samples.vector("weights", weights, prediction)

    def loss(y: Tensor, target: Tensor, w: Tensor) -> Tensor:
        return w * samples.mean((y - target).square())

    return samples.reduce(loss, (prediction, target.detach()), (w.detach(),), reduction, on_nan)


def generator_gan_loss(
    fake: Tensor,
    *,
    weights: Tensor | float = 1.0,
    limit: float | None = None,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """The generator's non-saturating GAN term: softplus(-fake).mean() of each sample.

    DMD2 adds it with a factor 3e-3 on ImageNet, 5e-3 for SDXL and 1e-3 for SD1.5, f-distill with 3e-3; SiDA's limit
    is 10.

    Args:
        fake: [B, ...] the discriminator's logits of noised generated samples, through which these learn.
        weights: a number, [B], [B, 1, ...] or [], constants; SiDA's are the batch's mean of
            1 / (sample - real).abs().mean().
        limit: logits are clamped to -limit to limit, without a gradient beyond; None: not.
        reduction, on_nan, Returns, Raises: as ``gradient_loss``.
    """
    samples.latents(fake=fake)
    most = None if limit is None else checks.finite_number("limit", limit, above=0)
    w = samples.vector("weights", weights, fake)

    def loss(y: Tensor, w: Tensor) -> Tensor:
        return w * samples.mean(_bce(y if most is None else y.clamp(-most, most) + 0 * y, 1.0))  # 0 inf is an error

    return samples.reduce(loss, (fake,), (w.detach(),), reduction, on_nan)


def discriminator_gan_loss(
    fake: Tensor,
    real: Tensor,
    *,
    noised: Tensor | None = None,
    penalty: float = 1.0,
    weights: Tensor | float = 1.0,
    reduction: str = "mean",
    on_nan: str = "raise",
) -> Any:
    """The discriminator's: (softplus(fake) + softplus(-real) + penalty * (real - noised)**2).mean() of each sample.

    DMD2 adds it to the fake network's loss with a factor 1e-2; SiDA with 0.5 of the fake network's weights.

    Args:
        fake: [B, ...] logits of noised generated samples, themselves detached.
        real: [B, ...] logits of noised data.
        noised: [B, ...] logits of that data with a little more noise (FastGen: 0.1), for an approximate R1 penalty.
        penalty: its factor, where ``noised`` is given.
        weights: a number, [B], [B, 1, ...] or [], constants.
        reduction, on_nan, Returns, Raises: as ``gradient_loss``.
    """
    near = real if noised is None else noised
    samples.latents(fake=fake, real=real, noised=near)
    factor = checks.finite_number("penalty", penalty)
    w = samples.vector("weights", weights, fake)

    def loss(fake: Tensor, real: Tensor, near: Tensor, w: Tensor) -> Tensor:
        return w * samples.mean(_bce(fake, 0.0) + _bce(real, 1.0) + factor * (real - near).square())

    return samples.reduce(loss, (fake, real, near), (w.detach(),), reduction, on_nan)


def phased_noise(
    x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor, path: Path, target: str = "v"
) -> tuple[Tensor, Tensor]:
    """Samples at time s noised to t, and what a fake network should predict there so that it matches the whole path
    (phased DMD, arXiv 2510.27684). In plain PyTorch::

        a = alpha_t / alpha_s;  b = sqrt(sigma_t**2 - a**2 * sigma_s**2)
        x_t = a * x_s + b * noise
        eps = sigma_t / b * noise                         # the score of x_t given x_s is -noise / b
        x_0 = (x_t - sigma_t * eps) / alpha_t             # v = alpha' x_0 + sigma' eps

    ``noise - x_s`` as a target is biased: its regression is not the path's velocity. At s = 0 both agree. As t nears s
    the target grows without bound: the code keeps 20 of 1000 timesteps between them.

    Args:
        x_s: [B, ...], what the generator of a phase made.
        noise: [B, ...], drawn from a standard normal distribution.
        s, t: [B], [B, 1, ...] or [], s before t.
        path: a path.
        target: of "x", "eps", "v", "F", "score".

    Returns:
        x_t [B, ...], through which x_s learns, and the target [B, ...], a constant; in the dtype of x_s.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name; a time t that is not after s.
    """
    is_path("path", path)
    checks.is_one_of("target", target, PREDICTIONS)
    samples.latents(x_s=x_s, noise=noise)
    first, then = (samples.times(name, u, x_s, 0.0, path.last).detach() for name, u in (("s", s), ("t", t)))
    then = samples.ordered("t", "after s", then, then > first, s, t)
    start, end = path.at(first), path.at(then)
    x, n = x_s.double(), noise.detach().double()
    a = end.alpha / start.alpha
    b = ((end.sigma - a * start.sigma) * (end.sigma + a * start.sigma)).sqrt()
    x_t, eps = a * x + b * n, end.sigma / b * n
    x_0 = x / start.alpha - a * start.sigma.square() / (start.alpha * b) * n  # alpha_t may be 0
    v = end.d_alpha * x_0 + end.d_sigma * eps
    made = {"x": x_0, "eps": eps, "v": v, "F": (v - end.of_x * x_t) / end.of_f, "score": -n / b}[target]
    return x_t.to(x_s.dtype), made.detach().to(x_s.dtype)


def tdm_weights(x_t: Tensor, sample: Tensor, noise: Tensor, t: Tensor, path: Path, most: float = 5.0) -> Tensor:
    """TDM's weights for the fake network (Luo et al. 2025, arXiv 2503.06674, as coded). x_t was noised from the state
    of the student at a step, not from ``sample``, its x_0 there, on which the noise depends. In plain PyTorch::

        mixed = (x_t - alpha_t * sample) / sigma_t
        weights = exp(0.5 * (noise.square().mean() - mixed.square().mean()))     # the means of each sample
        weights = weights * (alpha_t / sigma_t).square().clamp(max=most)

    a ratio of densities, tempered by means in place of sums.

    Args:
        x_t, sample, noise: [B, ...]; noise is a fresh draw from a standard normal distribution.
        t: [B], [B, 1, ...] or [].
        path: a path.
        most: of the signal-to-noise ratio.

    Returns:
        [B] in float32 (float64), a constant. Errors as for :func:`phased_noise`.
    """
    is_path("path", path)
    samples.latents(x_t=x_t, sample=sample, noise=noise)
    top, r = checks.finite_number("most", most, above=0), path.rates(t, x_t)
    x, y, n = (z.detach().double() for z in (x_t, sample, noise))
    mixed = (x - r.alpha * y) / r.sigma
    found = samples.mean((r.alpha / r.sigma).square().clamp(max=top))
    found = found * (0.5 * (samples.mean(n.square()) - samples.mean(mixed.square()))).exp()
    return found.detach().to(torch.promote_types(torch.promote_types(x_t.dtype, sample.dtype), torch.float32))


def density_ratio(logits: Tensor, low: float = 0.1, high: float = 20.0) -> Tensor:
    """r = p_real / p_fake at noised generated samples, by logits that are positive for real. In plain PyTorch::

        ratio = logits.mean().clamp(-10, 10).exp().clamp(low, high)    # the mean of each sample

    Args:
        logits: [B, ...], at the t of the predictions that it weights.
        low, high: the least and the largest ratio (f-distill's are these).

    Returns:
        [B] in float32 (float64), a constant; NaN for logits that are not finite.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    samples.latents(logits=logits)
    least = checks.finite_number("low", low, above=0)
    most = checks.finite_number("high", high, above=least)
    (y,) = samples.wide(logits.detach())
    m = samples.mean(y)
    return m.clamp(-10, 10).exp().clamp(least, most) + 0 * m  # NaN for an infinity


def ratio_by_time(
    ratio: Tensor, share: Tensor, means: Tensor, *, rate: float = 0.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Ratios over their mean in a bin of time, f-distill's first normalisation, as coded. In plain PyTorch::

        bin = (share * bins).long().clamp(0, bins - 1)
        means[k] = rate * means[k] + (1 - rate) * ratio[bin == k].mean()     # of bins in which a sample is
        ratio = ratio / (means[bin] + 1e-6)

    Args:
        ratio: [B], of :func:`density_ratio`; what is not finite there is in no mean.
        share: [B] (t - first t) / (last t - first t), from 0 to 1.
        means: [bins], kept from step to step; at first ones, of 10 bins.
        rate: of the running mean: 0 (this batch alone); 0.5 on ImageNet-64.
        group: of processes with other samples of the batch, which must all call.

    Returns:
        The ratios [B] and the new means [bins], constants in their dtypes.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    samples.latents(ratio=ratio, share=share)
    _flat(ratio=ratio, means=checks.is_float("means", means))
    checks.same_device(ratio=ratio, means=means)
    kept, bins = checks.finite_number("rate", rate), len(means)
    if not 0 <= kept <= 1:
        raise ValueError(f"rate must be from 0 to 1, got {kept}")
    r, old = ratio.detach().double(), means.detach().double()
    good = r.isfinite()
    at = (share.detach().double() * bins).nan_to_num().clamp(0, bins - 1).long()
    found = torch.stack((good.double(), r.where(good, 0.0)))
    count, total = _shared(old.new_zeros(2, bins).index_add(1, at, found), group)
    new = torch.where(count > 0, kept * old + (1 - kept) * total / count.clamp(min=1), old)
    return (r / (new[at] + EPS)).to(ratio.dtype), new.to(means.dtype)


def f_distill_weights(
    ratio: Tensor,
    divergence: str = "jensen_shannon",
    *,
    normalize: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """f-distill's weights h(r) = r^2 f''(r) for ``dmd_loss`` (Xu et al. 2025, arXiv 2502.15681). In plain PyTorch::

        weights = h(ratio)
        weights = weights / (weights.mean() + 1e-6)

    The gradient of D_f(p_real || p_fake) is E[h(r) (score_fake - score_real) dx] over the fake distribution.

    ======================  ===========    =====================  =========
    divergence              h              divergence             h
    ======================  ===========    =====================  =========
    reverse_kl              1              forward_kl             r
    softened_reverse_kl     1 / (1 + r)    jeffreys               1 + r
    jensen_shannon          r / (1 + r)    squared_hellinger      sqrt(r)
    neyman_chi_square       1 / r
    ======================  ===========    =====================  =========

    Constant factors (squared Hellinger's 1/4) are left out, as in the code; the normalisation cancels them.

    Args:
        ratio: [B], of :func:`density_ratio` and perhaps :func:`ratio_by_time`, above 0.
        divergence: of the table.
        normalize: divide by the mean over the batch; what is not finite is not in it.
        group: of processes with other samples of the batch, which must all call.

    Returns:
        [B] in float32 (float64), a constant.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name.
    """
    samples.latents(ratio=ratio)
    _flat(ratio=ratio)
    checks.is_one_of("divergence", divergence, tuple(F_DISTILL))
    (r,) = samples.wide(ratio.detach())
    h = F_DISTILL[divergence](r)
    if not normalize:
        return h
    good = h.isfinite()
    count, total = _shared(torch.stack((good.sum().to(h.dtype), h.where(good, 0.0).sum())), group)
    return h / (total / count.clamp(min=1) + EPS)


def uni_instruct_weights(ratio: Tensor, divergence: str = "forward_kl") -> Tensor:
    """Uni-Instruct's weights for ``sid_loss(alpha=1)`` (Wang et al. 2025, arXiv 2505.20755), as coded: r for the
    forward KL, the mixture 0.4 r + 0.6 for Jeffreys; the reverse KL's is 1, plain SiD.

    With r the loss is half of what descends E[r (real - fake)^2] over the fake distribution, but for what r itself,
    here a constant, contributes. For Jeffreys and the reverse KL the derivation has a further term that the code has
    not, a gradient of the norm of real - fake. Left out, as code and derivation disagree on them: the Jensen-Shannon
    and chi-square losses, whose further terms (that, and one like Diff-Instruct's) the code has commented out or scales
    otherwise, and the code's own ratio, which is not one of densities.

    Args:
        ratio: [B] p_real / p_fake, of :func:`density_ratio`.
        divergence: "forward_kl" or "jeffreys".

    Returns:
        [B] in float32 (float64), a constant. Errors as for :func:`f_distill_weights`.
    """
    samples.latents(ratio=ratio)
    _flat(ratio=ratio)
    checks.is_one_of("divergence", divergence, ("forward_kl", "jeffreys"))
    (r,) = samples.wide(ratio.detach())
    return r if divergence == "forward_kl" else 0.4 * r + 0.6


def _flat(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(x.shape)}")


def _shared(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sums over all processes of a group."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def _bce(logits: Tensor, label: float) -> Tensor:
    """softplus(logits) for label 0, softplus(-logits) for 1; NaN for an infinity, where that may be 0."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label), reduction="none")
