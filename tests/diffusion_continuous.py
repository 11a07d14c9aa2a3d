"""Cases of continuous-time losses: literal transcriptions, sample by sample."""

import math

import torch
from diffusion_cases import Case, latents, rows

from fastkd.diffusion.continuous import alphaflow_loss, facm_loss, meanflow_loss, rcm_loss, scm_loss, tvm_loss


def scm(
    prediction, tangent, x_t, velocity, t, log_variance=None, sigma_data=1.0, warmup=1.0, prior_weight=False, c=0.1
):
    """sCM, equation 8 and algorithm 1."""
    losses = []
    for i, F in enumerate(prediction):
        cos, sin, s, Fm = t[i].detach().cos(), t[i].detach().sin(), sigma_data, F.detach()
        g = -(cos**2) * (s * Fm - velocity[i]) - warmup * (cos * sin * x_t[i] + s * tangent[i])
        g = (g / (g.pow(2).sum().sqrt() + c)).detach()
        loss = ((F - Fm - g) ** 2).mean()
        loss = loss / (s * t[i].detach().tan()) if prior_weight else loss
        losses.append(loss if log_variance is None else torch.exp(-log_variance[i]) * loss + log_variance[i])
    return torch.stack(losses)


def rcm(prediction, tangent, x_t, velocity, t, warmup=1.0, c=0.1):
    """rCM, loss_scm of training_step_generator with the mean for its sum."""
    losses = []
    for i in range(len(t)):
        cost, sint, F_sg = torch.cos(t[i]), torch.sin(t[i]), prediction[i].detach()
        g = -cost * torch.sqrt(1 - warmup**2 * sint**2) * (F_sg - velocity[i])
        g = g - warmup * (cost * sint * x_t[i] + tangent[i])
        g = (g / (torch.sqrt((g * g).sum()) + c)).detach()
        losses.append(((prediction[i] - F_sg - g) ** 2).sum() / g.numel())
    return torch.stack(losses)


def meanflow(prediction, tangent, velocity, t, r, warmup=1.0, p=1.0, eps=1e-3):
    """MeanFlow, algorithm 1, with the published sum: its eps is D times a mean's, its loss D^(1 - p) times."""
    losses = []
    for i, u in enumerate(prediction):
        u_tgt = velocity[i].detach() - (t[i] - r[i]).detach() * warmup * tangent[i].detach()
        total, D = ((u - u_tgt) ** 2).sum(), u.numel()
        adaptive = (total.detach() + D * eps) ** p
        losses.append(total / adaptive / D ** (1 - p))
    return torch.stack(losses)


def alphaflow(prediction, following, velocity, t, r, alpha, clamp=None, eps=1e-3):
    """AlphaFlow, _compute_mean_velocity_d and what follows it."""
    losses = []
    for i, u in enumerate(prediction):
        now, end = t[i].item(), r[i].item()
        target, weight, dt = velocity[i].detach(), 1.0, alpha * (now - end)
        if now != end:
            target = (dt * target + (now - dt - end) * following[i].detach()) / (now - end)
            target, weight = target if clamp is None else target.clip(-clamp, clamp), alpha
        error = (u - target).pow(2).mean()
        losses.append(weight / (error.detach() + eps) * error)
    return torch.stack(losses)


def facm(prediction, tangent, anchor, velocity, t, p=0.5, eps=1e-3):
    """FACM, in its own time: noise at 0, data at 1, v = x_0 - eps."""
    losses = []
    for i in range(len(t)):
        t_ = 1 - t[i].detach()
        F, F_fm, v, grad = -prediction[i], -anchor[i], -velocity[i].detach(), tangent[i].detach()  # d(-F) / d(-t)
        v_bar = v + (1 - t_) * grad
        target = F.detach() - (1 - t_**p) * (F.detach() - v_bar).clamp(min=-1, max=1)
        e = ((F - target) ** 2).mean()
        cm = torch.cos(t_ * math.pi / 2) * e / torch.sqrt(e.detach() + eps)
        cos = (F_fm * v).sum(0) / (F_fm.pow(2).sum(0).sqrt() * v.pow(2).sum(0).sqrt())  # channels first
        losses.append(cm + ((F_fm - v) ** 2).mean() + (1 - cos).mean())
    return torch.stack(losses)


def tvm(prediction, tangent, target, instant, velocity, t, s):
    """TVM, forward of TVMWrapper without guidance."""
    losses = []
    for i in range(len(t)):
        dt = (s[i] - t[i]).detach()
        terminal = ((prediction[i] + dt * tangent[i] - target[i].detach()) ** 2).mean()
        flow = ((instant[i] - velocity[i].detach()) ** 2).mean()
        losses.append(flow if dt == 0 else terminal + flow)
    return torch.stack(losses)


SCM = latents("prediction", "tangent", "x_t", "velocity") | rows(t=(1e-4, 0.5, 1.2, 1.57))
LEARNED = rows(log_variance=(0.5, -0.3, 1.0, 0.0))
FROM, TO = (0.9, 0.5, 0.7, 1.0), (0.2, 0.4, 0.7, 0.0)  # a long way, a short one, none, all of it
MEANFLOW = latents("prediction", "tangent", "velocity") | rows(t=FROM, r=TO)
ALPHAFLOW = latents("prediction", "following", "velocity") | rows(t=FROM, r=TO)
FACM = latents("prediction", "tangent", "anchor", "velocity") | rows(t=(0.9, 0.02, 0.5, 1.0))
TVM = latents("prediction", "tangent", "target", "instant", "velocity") | rows(t=FROM, s=TO)
LEARN = ("prediction",)
CASES = {
    "sCM": Case(scm_loss, scm, SCM, LEARN),
    "sCM, sigma_data": Case(scm_loss, scm, SCM, LEARN, {"sigma_data": 0.5}),
    "sCM, warmup": Case(scm_loss, scm, SCM, LEARN, {"warmup": 0.3}),
    "sCM, log variance": Case(scm_loss, scm, SCM | LEARNED, ("prediction", "log_variance")),
    "sCM, prior weight": Case(scm_loss, scm, SCM, LEARN, {"prior_weight": True, "sigma_data": 0.5}),
    "sCM, c": Case(scm_loss, scm, SCM, LEARN, {"c": 2.0}),
    "rCM": Case(rcm_loss, rcm, SCM, LEARN),
    "rCM, warmup": Case(rcm_loss, rcm, SCM, LEARN, {"warmup": 0.3}),
    "rCM, teacher alone": Case(rcm_loss, rcm, SCM, LEARN, {"warmup": 0.0, "c": 2.0}),
    "MeanFlow": Case(meanflow_loss, meanflow, MEANFLOW, LEARN),
    "MeanFlow, CIFAR": Case(meanflow_loss, meanflow, MEANFLOW, LEARN, {"p": 0.75, "eps": 1e-3 / 15}),
    "MeanFlow, no weight": Case(meanflow_loss, meanflow, MEANFLOW, LEARN, {"p": 0.0}),
    "MeanFlow, warmup and eps": Case(meanflow_loss, meanflow, MEANFLOW, LEARN, {"warmup": 0.3, "eps": 0.5}),
    "AlphaFlow": Case(alphaflow_loss, alphaflow, ALPHAFLOW, LEARN, {"alpha": 0.3}),
    "AlphaFlow, clamp": Case(alphaflow_loss, alphaflow, ALPHAFLOW, LEARN, {"alpha": 0.5, "clamp": 0.6, "eps": 0.5}),
    "AlphaFlow, flow matching": Case(alphaflow_loss, alphaflow, ALPHAFLOW, LEARN, {"alpha": 1.0, "clamp": 4.0}),
    "FACM": Case(facm_loss, facm, FACM, ("prediction", "anchor")),
    "FACM, p": Case(facm_loss, facm, FACM, ("prediction", "anchor"), {"p": 2.0}),
    "FACM, eps": Case(facm_loss, facm, FACM, ("prediction", "anchor"), {"eps": 0.5}),
    "TVM": Case(tvm_loss, tvm, TVM, ("prediction", "tangent", "instant")),
}
