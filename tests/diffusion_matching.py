"""Cases of distribution-matching losses: literal transcriptions, sample by sample."""

from types import SimpleNamespace

import torch
from diffusion_cases import Case, latents, rows, seeded

from fastkd.diffusion import critics, matching
from fastkd.diffusion.discrete import guided
from fastkd.diffusion.paths import RectifiedFlow

ONES = torch.ones(100, dtype=torch.float64, device="cpu")


def each(loss, *tensors, weights=None):
    """The losses of samples, given their weights as constants."""
    weights = ONES[: len(tensors[0])] if weights is None else weights.detach()
    return torch.stack([loss(*parts) for parts in zip(*tensors, weights)])


def pulled(x, g):
    return 0.5 * ((x - (x - g).detach()) ** 2).mean()


def gradient(sample, gradient, weights=None):
    return each(lambda x, g, w: pulled(x, w * g), sample, gradient, weights=weights)


def dmd(sample, real, fake, weights=None, normalize=True, floor=1e-5):
    """DMD2's compute_distribution_matching_loss; DMD, equations 7 and 8, with w = alpha."""

    def one(x, real, fake, w):
        p_real, p_fake = x - real, x - fake
        by = max(p_real.abs().mean().item(), floor) if normalize else 1.0
        return pulled(x, w * (p_real - p_fake) / by)

    return each(one, sample, real, fake, weights=weights)


def vsd(sample, real, fake, weights=None):
    return each(lambda x, real, fake, w: pulled(x, w * (real - fake)), sample, real, fake, weights=weights)


def tdm(sample, real, fake, weights=None, c=1e-3, over="entries", floor=1e-5):
    """train_tdm_demo.py with use_huber; the paper's, by the number of entries."""

    def one(x, real, fake, w):
        e = x - (x + (real - fake)).detach()
        if over == "sample":
            return w * (((e**2).sum() + c**2).sqrt() - c) / e.numel()
        by = max((x - real).abs().mean().item(), floor)
        return w * (((e**2 + c**2).sqrt() - c) / by).mean()

    return each(one, sample, real, fake, weights=weights)


def sid(sample, real, fake, weights=None, alpha=1.0, normalize=True, floor=1e-5):
    """SID_EDMLoss.generator_loss, the mean in place of the sum."""

    def one(x, real, fake, w):
        by = max((x - real).abs().mean().item(), floor) if normalize else 1.0
        y = real - fake
        return w * (y * ((real - x) - alpha * y) / by).mean()

    return each(one, sample, real, fake, weights=weights)


def sim(sample, real, fake, c, weights=None):
    def one(x, real, fake, w):
        y = real - fake
        return w * (y / ((y**2).sum() + c**2).sqrt() * (fake - x)).mean()

    return each(one, sample, real, fake, weights=weights)


def denoising(prediction, target, weights=None):
    return each(lambda y, x, w: (w * (y - x.detach()) ** 2).mean(), prediction, target, weights=weights)


def discriminator(fake, real, noised=None, penalty=1.0, weights=None):
    def one(fake, real, noised, w):
        fooled = torch.log(1 + fake.exp()).mean() + torch.log(1 + (-real).exp()).mean()
        return w * (fooled + penalty * ((real - noised) ** 2).mean())

    return each(one, fake, real, real if noised is None else noised, weights=weights)


X = latents("sample", "real", "fake")
G = latents("sample", "gradient")
Y = latents("prediction", "target")
D = latents("fake", "real")
W = rows(weights=(0.3, 2.0, 1.1, 0.7))
ALL = ("sample", "real", "fake")
CASES = {
    "gradient": Case(matching.gradient_loss, gradient, G, ("sample",)),
    "gradient, weights": Case(matching.gradient_loss, gradient, G | W, ("sample",)),
    "DMD2": Case(matching.dmd_loss, dmd, X, ("sample",)),
    "DMD, alpha_t": Case(matching.dmd_loss, dmd, X | W, ("sample",)),
    "DMD, floor": Case(matching.dmd_loss, dmd, X, ("sample",), {"floor": 2.0}),
    "Diff-Instruct": Case(matching.dmd_loss, dmd, X | W, ("sample",), {"normalize": False}),
    "VSD": Case(matching.vsd_loss, vsd, X, ("sample",)),
    "VSD, sigma^2": Case(matching.vsd_loss, vsd, X | W, ("sample",)),
    "TDM": Case(matching.tdm_loss, tdm, X, ("sample",)),
    "TDM, c": Case(matching.tdm_loss, tdm, X | W, ("sample",), {"c": 0.7}),
    "TDM, floor": Case(matching.tdm_loss, tdm, X, ("sample",), {"floor": 2.0}),
    "TDM, paper": Case(matching.tdm_loss, tdm, X | W, ("sample",), {"c": 3.0, "over": "sample"}),
    "SiD": Case(matching.sid_loss, sid, X, ALL),
    "SiD, alpha": Case(matching.sid_loss, sid, X, ALL, {"alpha": 1.2}),
    "SiD, floor": Case(matching.sid_loss, sid, X, ALL, {"floor": 2.0}),
    "SiD, no normaliser": Case(matching.sid_loss, sid, X, ALL, {"normalize": False, "alpha": 0.5}),
    "Uni-Instruct": Case(matching.sid_loss, sid, X | W, ALL),
    "SIM": Case(matching.sim_loss, sim, X, ALL, {"c": 2.0}),
    "SIM, weights": Case(matching.sim_loss, sim, X | W, ALL, {"c": 0.01}),
    "denoising": Case(critics.denoising_loss, denoising, Y, ("prediction",)),
    "denoising, weights": Case(critics.denoising_loss, denoising, Y | W, ("prediction",)),
    "discriminator": Case(critics.discriminator_gan_loss, discriminator, D, ("fake", "real")),
    "discriminator, R1": Case(
        critics.discriminator_gan_loss,
        discriminator,
        D | W | latents("noised", seed=1),
        ("fake", "real", "noised"),
        {"penalty": 0.3},
    ),
}


def scene():
    """What the recipes name: predictions made of x, which learns, by frozen networks."""
    o = SimpleNamespace(**latents("x", "noise", "fresh", "empty", "tuned"), D=15, path=RectifiedFlow())
    o.x.requires_grad_()
    o.s, o.t = (torch.tensor(v, dtype=torch.float64) for v in ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8)))
    o.alpha, o.sigma = 1 - o.t, o.t
    o.a, o.b = o.alpha.view(-1, 1, 1), o.sigma.view(-1, 1, 1)
    o.x_t = o.a * o.x + o.b * o.noise
    o.real, o.fake, o.logits = o.x_t.sin() - 0.3 * o.x_t, 0.7 * o.x_t.cos(), 3 * o.x_t.tanh()
    o.r = o.logits.detach().mean((1, 2)).exp().clamp(0.1, 20)
    o.distance = (o.x - o.real).detach().abs().mean((1, 2), keepdim=True)
    return o


def moved(x, g, total=False):
    e = (x - (x - g).detach()) ** 2
    return 0.5 * e.sum() / len(x) if total else 0.5 * e.mean()


def phased(o):
    x_t, _ = critics.phased_noise(o.x, o.noise, o.s, o.t, o.path)
    return matching.dmd_loss(x_t, o.real, o.fake, normalize=False)


def literally_phased(o):
    """In velocities, with the weight of the paper; the predictions here are scores."""
    s, t = o.s.view(-1, 1, 1), o.b
    a = (1 - t) / (1 - s)
    x_t = a * o.x + (t**2 - (a * s) ** 2).sqrt() * o.noise
    v_real, v_fake = (-(x_t + t * score) / (1 - t) for score in (o.real, o.fake))
    return moved(o.x, (1 - t) * a / ((1 - t) * t + t**2) * (v_real - v_fake))


def phased_target(o):
    """LightX2V's, of rectified flows."""
    s, t = o.s.view(-1, 1, 1), o.b
    a = (1 - t) / (1 - s)
    b = (t**2 - (a * s) ** 2).sqrt()
    goal = ((1 - s) ** 2 * t + (1 - t) * s**2) / ((1 - s) ** 2 * b) * o.noise - o.x / (1 - s)
    return ((o.fake - goal.detach()) ** 2).mean()


def guided_at_random(o):
    k = matching.random_scales(o.x, 0.5, 4.0, generator=seeded())
    real, fake = guided(o.real, o.empty, k), guided(o.fake, o.tuned, k)
    return matching.vsd_loss(o.x, real, fake, weights=o.sigma.square())


def literally_at_random(o):
    k = (0.5 + 3.5 * torch.rand(4, 1, 1, generator=seeded())).double()
    real, fake = o.empty + k * (o.real - o.empty), o.tuned + k * (o.fake - o.tuned)
    return moved(o.x, o.b**2 * (real - fake))


def literally_balanced(o):
    c, d = o.real - o.empty, 0.018 * o.empty
    a = ((d - c) * d).sum((1, 2), keepdim=True) / (d - c).square().sum((1, 2), keepdim=True)
    a = a.clamp(0, 1)
    return moved(o.x, o.a * (a * c + (1 - a) * d))


def f_weights(o):
    h = o.r / (o.r + 1)
    return (h / (h.mean() + 1e-6)).view(-1, 1, 1)


def sida(o):
    w = (1 / o.distance).mean()
    return 15 * critics.generator_gan_loss(o.logits, limit=10.0, weights=w) + critics.discriminator_gan_loss(
        o.logits.detach(), o.fake, weights=0.5 * (1 / o.sigma**2 + 4)
    )


def literally_sida(o):
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    ones = torch.ones_like(o.x)
    fooled = bce(o.logits.clamp(-10, 10), ones)
    told = bce(o.fake, ones, reduction="none") + bce(o.logits.detach(), 0 * ones, reduction="none")
    return (fooled / o.distance * 15).sum() / 4 + ((1 / o.b**2 + 4) * 0.5 * told).mean()


def sid_1(o):
    """sid_loss of Uni-Instruct's code: alpha 1."""
    return (o.real - o.fake) * (o.fake - o.x) / o.distance


# the loss as the tables and docstrings have it, and as its paper or code; where the values differ, gradients alone
RECIPES = {
    "DMD": (
        lambda o: matching.dmd_loss(o.x, o.real, o.fake, weights=o.alpha),
        lambda o: moved(o.x, o.a * (o.fake - o.real) / o.distance),
    ),
    "DMD2, DisBack, multi-student": (
        lambda o: matching.dmd_loss(o.x, o.real, o.fake) + 3e-3 * critics.generator_gan_loss(o.logits),
        lambda o: (
            moved(o.x, ((o.x - o.real) - (o.x - o.fake)) / o.distance) + 3e-3 * (1 + (-o.logits).exp()).log().mean()
        ),
    ),
    "rCM": (
        lambda o: 2 * o.D * matching.dmd_loss(o.x, o.real, o.fake),
        lambda o: 2 * moved(o.x, (o.fake - o.real) / o.distance, total=True),
    ),
    "f-distill": (
        lambda o: matching.dmd_loss(
            o.x, o.real, o.fake, weights=critics.f_distill_weights(critics.density_ratio(o.logits), "jensen_shannon")
        ),
        lambda o: moved(o.x, f_weights(o) * (o.fake - o.real) / o.distance),
    ),
    "Diff-Instruct, gradient": (
        lambda o: o.D * matching.dmd_loss(o.x, o.real, o.fake, normalize=False),
        lambda o: ((o.fake - o.real).detach() * o.x).sum() / 4,
    ),
    "phased DMD, gradient": (phased, literally_phased),
    "VSD": (
        lambda o: o.D * matching.vsd_loss(o.x, o.real, o.fake, weights=o.sigma.square()),
        lambda o: moved(o.x, o.b**2 * (o.real - o.fake), total=True),
    ),
    "SwiftBrush": (
        lambda o: matching.vsd_loss(o.x, o.real, o.fake, weights=o.sigma.square()),
        lambda o: moved(o.x, o.b**2 * (o.real - o.fake)),
    ),
    "SNOOPI": (guided_at_random, literally_at_random),
    "SDS": (
        lambda o: matching.vsd_loss(o.x, guided(o.real, o.empty, 100.0), o.noise, weights=o.sigma.square()),
        lambda o: moved(o.x, o.b**2 * (o.empty + 100 * (o.real - o.empty) - o.noise)),
    ),
    "CSM": (
        lambda o: matching.vsd_loss(o.x, o.real, o.empty),
        lambda o: moved(o.x, o.real - o.empty),
    ),
    "BSD, bootstrapped": (
        lambda o: matching.vsd_loss(o.x, o.tuned, o.fake, weights=o.sigma.square()),
        lambda o: moved(o.x, o.b**2 * (o.tuned - o.fake)),
    ),
    "BSD, balanced": (
        lambda o: matching.gradient_loss(o.x, matching.balanced_gradient(o.real, o.empty), weights=o.alpha),
        literally_balanced,
    ),
    "TDM, squares, gradient": (
        lambda o: 2 * matching.dmd_loss(o.x, o.real, o.fake),
        lambda o: ((o.x - (o.x + o.real - o.fake).detach()) ** 2 / o.distance).mean(),
    ),
    "TDM, paper": (
        lambda o: o.D * matching.tdm_loss(o.x, o.real, o.fake, c=0.00054 * o.D**0.5, over="sample"),
        lambda o: (
            ((o.x - (o.x + o.real - o.fake).detach()).square().sum((1, 2)) + (0.00054 * 15**0.5) ** 2).sqrt().mean()
            - 0.00054 * 15**0.5
        ),
    ),
    "SiD, few-step SiD": (
        lambda o: 100 * o.D * matching.sid_loss(o.x, o.real, o.fake, alpha=1.2),
        lambda o: (
            100 * ((o.real - o.fake) * ((o.real - o.x) - 1.2 * (o.real - o.fake)) / o.distance).sum((1, 2)).mean()
        ),
    ),
    "Uni-Instruct, forward KL": (
        lambda o: o.D * matching.sid_loss(o.x, o.real, o.fake, weights=critics.uni_instruct_weights(o.r)),
        lambda o: (o.r * sid_1(o).sum((1, 2))).mean(),
    ),
    "Uni-Instruct, Jeffreys": (
        lambda o: o.D * matching.sid_loss(o.x, o.real, o.fake, weights=critics.uni_instruct_weights(o.r, "jeffreys")),
        lambda o: (0.4 * o.r * sid_1(o).sum((1, 2)) + 0.6 * sid_1(o).sum((1, 2))).mean(),
    ),
    "SIM": (
        lambda o: o.D * matching.sim_loss(o.x, o.real, o.fake, c=0.5),
        lambda o: (
            ((o.real - o.fake) * (o.fake - o.x)).sum((1, 2)) / ((o.real - o.fake).square().sum((1, 2)) + 0.25).sqrt()
        ).mean(),
    ),
    "SIM of squares": (
        lambda o: 2 * o.D * matching.sid_loss(o.x, o.real, o.fake, alpha=1, normalize=False),
        lambda o: 2 * ((o.real - o.fake) * (o.fake - o.x)).sum((1, 2)).mean(),
    ),
    "SiDA's GAN": (sida, literally_sida),
    "fake network on EDM": (
        lambda o: critics.denoising_loss(o.fake, o.x, weights=1 / o.sigma**2 + 1 / 0.5**2),
        lambda o: ((o.b**2 + 0.25) / (o.b * 0.5) ** 2 * (o.fake - o.x.detach()) ** 2).mean(),
    ),
    "fake network of the noise": (
        lambda o: critics.denoising_loss(o.fake, o.noise),
        lambda o: ((o.fake - o.noise) ** 2).mean(),
    ),
    "SwiftBrush's": (
        lambda o: critics.denoising_loss(o.fake, o.noise, weights=o.alpha.square()),
        lambda o: (o.a**2 * (o.fake - o.noise) ** 2).mean(),
    ),
    "SiD-LSG's of v": (
        lambda o: critics.denoising_loss(
            o.fake,
            o.path.velocity(o.x, o.noise, o.t),
            weights=(o.alpha / o.sigma) ** 2 / ((o.alpha / o.sigma) ** 2 + 1),
        ),
        lambda o: (o.a**2 / (o.a**2 + o.b**2) * (o.fake - (o.noise - o.x.detach())) ** 2).mean(),
    ),
    "rCM's": (
        lambda o: o.D * critics.denoising_loss(o.fake, o.x, weights=1 / o.t.sin() ** 2),
        lambda o: ((o.x.detach() - o.fake) ** 2 / o.b.sin() ** 2).sum((1, 2)).mean(),
    ),
    "TDM's": (
        lambda o: critics.denoising_loss(o.fake, o.x, weights=critics.tdm_weights(o.x_t, o.x, o.fresh, o.t, o.path)),
        lambda o: (
            (o.fake - o.x.detach()).square().mean((1, 2))
            * (o.alpha**2 / o.sigma**2).clamp(max=5)
            * (-0.5 * o.noise.square().mean((1, 2))).exp()
            / (-0.5 * o.fresh.square().mean((1, 2))).exp()
        ).mean(),
    ),
    "phased DMD's": (
        lambda o: critics.denoising_loss(o.fake, critics.phased_noise(o.x, o.noise, o.s, o.t, o.path)[1]),
        phased_target,
    ),
}
