"""Cases of losses at discrete pairs of times: literal transcriptions, sample by sample."""

import torch
from diffusion_cases import Case, latents, rows

from fastkd.diffusion.discrete import boot_loss, consistency_loss, velocity_distillation_loss, velocity_matching_loss
from fastkd.diffusion.paths import EDM, RectifiedFlow, TrigFlow


def consistency(prediction, target, weights=None, distance="mse", c=None, frames=None):
    """Consistency models, equation 7; iCT's pseudo-Huber divided by sqrt(D); LCM's of each entry."""
    losses = []
    for i, (y, goal) in enumerate(zip(prediction, target.detach())):
        e = y - goal
        if frames == 1:
            e = torch.stack([e[k + 1] - e[k] for k in range(len(e) - 1)])
        elif frames == 2:
            e = torch.stack([e[:, k + 1] - e[:, k] for k in range(e.shape[1] - 1)], 1)
        if distance == "mse":
            loss = (e**2).mean()
        elif distance == "huber":
            D = e.numel()
            width = (0.00054 if c is None else c) * D**0.5
            loss = (((e**2).sum() + width**2).sqrt() - width) / D**0.5
        else:
            width = 0.001 if c is None else c
            loss = ((e**2 + width**2).sqrt() - width).mean()
        losses.append(loss if weights is None else weights[i].detach() * loss)
    return torch.stack(losses)


# alpha and sigma at a time
RATES = {
    TrigFlow(0.5): lambda t: (t.cos(), 0.5 * t.sin()),
    RectifiedFlow(): lambda t: (1 - t, t),
    EDM(0.5): lambda t: (1.0, t),
}


def boot(prediction, previous, teacher, t, s, path):
    """A DDIM step of the signal, from any noise, which drops out; over k^2 as in OFTSR's code."""
    losses = []
    for i, y in enumerate(prediction):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (RATES[path](u[i].detach()) for u in (t, s))
        noise = torch.linspace(-2, 3, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
        x_t = alpha_t * previous[i].detach() + sigma_t * noise
        x_0 = teacher[i].detach()
        x_s = alpha_s * x_0 + sigma_s * (x_t - alpha_t * x_0) / sigma_t
        target = (x_s - sigma_s * noise) / alpha_s
        k = 1 - (sigma_s * alpha_t) / (alpha_s * sigma_t)
        losses.append(((y - target) ** 2).mean() / k**2)
    return torch.stack(losses)


def velocity_target(tangent, velocity, t, c):
    """MDT-dist: the derivative is normalised."""
    du = tangent / (tangent.pow(2).sum().sqrt() + c)
    return (velocity - t * du).detach()


def velocity_matching(prediction, tangent, velocity, t, c=0.1):
    return torch.stack(
        [((u - velocity_target(tangent[i], velocity[i], t[i], c)) ** 2).mean() for i, u in enumerate(prediction)]
    )


def velocity_distillation(prediction, student, tangent, velocity, t, c=0.1):
    losses = []
    for i, y in enumerate(prediction):
        target = velocity_target(tangent[i], velocity[i], t[i], c)
        losses.append(((student[i].detach() - target + y - y.detach()) ** 2).mean())
    return torch.stack(losses)


PAIR = latents("prediction", "target")
WEIGHTS = rows(weights=(0.1, 1.0, 30.0, 4.0))
BOOT = latents("prediction", "previous", "teacher")
MATCHING = latents("prediction", "tangent", "velocity") | rows(t=(0.0, 0.3, 0.9, 1.0))
DISTILLATION = latents("prediction", "student", "tangent", "velocity") | rows(t=(1.0, 0.0, 0.6, 0.2))


def paired(loss_settings, **more):
    return Case(consistency_loss, consistency, PAIR | more, ("prediction",), loss_settings)


def booting(path, t, s):
    return Case(boot_loss, boot, BOOT | rows(t=t, s=s), ("prediction",), {"path": path})


CASES = {
    "consistency": paired({}),
    "consistency, weights": paired({}, **WEIGHTS),
    "consistency, huber": paired({"distance": "huber"}, **WEIGHTS),
    "consistency, huber, c": paired({"distance": "huber", "c": 2.0}),
    "consistency, huber, 0": paired({"distance": "huber", "c": 0}, **WEIGHTS),
    "consistency, elementwise": paired({"distance": "elementwise huber"}),
    "consistency, elementwise, c": paired({"distance": "elementwise huber", "c": 2.0}, **WEIGHTS),
    "consistency, elementwise, 0": paired({"distance": "elementwise huber", "c": 0}),
    "consistency, frames": paired({"frames": 2}),
    "consistency, other frames": paired({"frames": 1, "distance": "elementwise huber", "c": 0.5}),
    "BOOT, TrigFlow": booting(TrigFlow(0.5), (0.05, 0.5, 1.2, torch.pi / 2), (0.0, 0.45, 1.0, 1.5)),
    "BOOT, RectifiedFlow": booting(RectifiedFlow(), (1.0, 0.9, 0.5, 0.2), (0.96, 0.2, 0.45, 0.0)),
    "BOOT, EDM": booting(EDM(0.5), (80.0, 10.0, 0.5, 0.01), (60.0, 2.0, 0.45, 0.002)),
    "velocity matching": Case(velocity_matching_loss, velocity_matching, MATCHING, ("prediction",)),
    "velocity matching, c": Case(velocity_matching_loss, velocity_matching, MATCHING, ("prediction",), {"c": 5.0}),
    "velocity distillation": Case(velocity_distillation_loss, velocity_distillation, DISTILLATION, ("prediction",)),
    "velocity distillation, c": Case(
        velocity_distillation_loss, velocity_distillation, DISTILLATION, ("prediction",), {"c": 5.0}
    ),
}


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def scene():
    """What the recipes name, on a rectified flow; networks that learn share a parameter, others have their own."""
    theta, phi = values(0.7).requires_grad_(), values(1.3).requires_grad_()

    def network(parameter):
        def run(x, *given):
            return parameter * (x + sum(g.view(-1, 1, 1) if isinstance(g, torch.Tensor) else g for g in given)).sin()

        return run

    learning, frozen, names = network(theta), network(phi), ("x_0", "noise", "x_t", "x_u", "z", "x", "du")
    there = latents(*names)
    there |= {"t": values(0.3, 0.5, 0.9, 0.95), "u": values(0.2, 0.35, 0.6, 0.9), "w": values(0.0, 1.0, 4.0, 14.0)}
    there |= {"edges": values(0.0, 0.25, 0.6, 1.0), "text": values(1.0, 2.0, -1.0, 0.5), "s_d": 0.5, "n": 4, "D": 15}
    there |= {"beta": 0.3, "multiplier": 2.5, "last": 1.0, "x_last": there["noise"], "path": RectifiedFlow()}
    return there | {"f": learning, "y": learning, "g": learning, "theta": theta, "f_ema": frozen, "teacher": frozen}


def total(e):
    """Of each sample."""
    return e.square().sum((1, 2))


def to_edge(x_0, x_t, t, s):
    t, s = (v.view(-1, 1, 1) for v in (t, s))
    return (1 - s) * x_0 + s * (x_t - (1 - t) * x_0) / t


def segmented(o):
    s = values(0.25, 0.25, 0.6, 0.6)
    pair = (to_edge(o.f(o.x_t, o.t), o.x_t, o.t, s), to_edge(o.f(o.x_u, o.u).detach(), o.x_u, o.u, s))
    return (pair[0] - pair[1]).square().mean()


def bootstrapped(o):
    t, u = (v.view(-1, 1, 1) for v in (o.t, o.u))
    before = o.y(o.noise, o.t).detach()
    k = 1 - u * (1 - t) / ((1 - u) * t)
    goal = before + k * (o.teacher((1 - t) * before + t * o.noise, o.t) - before)
    first = ((o.y(o.noise, o.u) - goal.detach()) / k).square().mean()
    return first + 0.3 * (o.y(o.noise, 1.0) - o.teacher(o.noise, 1.0).detach()).square().mean()


def noise_consistency(o):
    z_t, z_u = (v.cos().view(-1, 1, 1) * o.z + v.sin().view(-1, 1, 1) * o.noise for v in (o.t, o.u))
    return (o.g(z_t) - o.g(z_u).detach()).square().mean() + 2.5 * (o.g(o.z) - o.x).square().mean()


def velocities(o):
    step = o.t.view(-1, 1, 1) * o.du / (total(o.du).sqrt() + 0.1).view(-1, 1, 1)
    goal = (o.v(o.x_t, o.t) - step).detach()
    moving = o.u(o.noise, 1)
    found = (o.u(o.x_t, o.t) - goal).square().mean()
    return found + (o.u(o.x_t, o.t).detach() - goal + moving - moving.detach()).square().mean()


def off(o, other, *more):
    return o.f(o.x_t, o.t, *more) - other(o.x_u, o.u, *more).detach()


def ict(o):
    return (((total(off(o, o.f)) + 0.00054**2 * 15).sqrt() - 0.00054 * 15**0.5) / (o.t - o.u)).mean() / 15**0.5


def ect(o):
    return ((1 / o.t**2 + 1 / 0.5**2) * total(off(o, o.f)).sqrt()).mean() / 15**0.5


def lcm(o):
    return ((off(o, o.f_ema, o.w).square() + 0.001**2).sqrt() - 0.001).mean()


def motion(o):
    e = off(o, o.f_ema)
    return (e[:, :, 1:] - e[:, :, :-1]).square().mean()


def rectified(o):
    c = 0.00054 * 15
    distance = ((total(o.v(o.x_t, o.t) - (o.noise - o.x_0)) + c**2).sqrt() - c) / 15
    return ((1 - o.t) * distance).mean() * 15**0.5


def guidance(o):
    w = o.w.view(-1, 1, 1)
    goal = (1 + w) * o.teacher(o.x_t, o.t, o.text) - w * o.teacher(o.x_t, o.t)
    return (o.f(o.x_t, o.t, o.w) - goal.detach()).square().mean()


RECIPES = {
    "consistency": lambda o: off(o, o.f_ema).square().mean(),
    "iCT": ict,
    "ECT": ect,
    "LCM, AnimateLCM": lcm,
    "segmented, phased": segmented,
    "motion (MCM)": motion,
    "BOOT": bootstrapped,
    "rectified flow": rectified,
    "guidance": guidance,
    "noise consistency": noise_consistency,
    "velocity": velocities,
}
