"""Continuous-time losses: what they are of a network, which of them are one, ends of time, bad input."""

import inspect
import math
import textwrap

import pytest
import torch
from diffusion_cases import latents, rows
from diffusion_continuous import ALPHAFLOW, CASES, FACM, MEANFLOW, SCM, TVM, rcm, scm
from torch import nn

from fastkd.diffusion.continuous import (
    alphaflow_loss,
    facm_loss,
    meanflow_loss,
    rcm_loss,
    scm_loss,
    scm_tangents,
    tvm_loss,
)
from fastkd.diffusion.network import network_jvp
from fastkd.diffusion.paths import RectifiedFlow, TrigFlow

END = math.pi / 2


class Net(nn.Module):
    """Of x [B, 15] and up to two times."""

    def __init__(self, times=1):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(15 + times, 8, dtype=torch.float64), nn.Linear(8, 15, dtype=torch.float64)

    def forward(self, x, *times):
        return self.last(torch.tanh(self.first(torch.cat((x, torch.stack(times, 1)), 1))))


def drawn(*names):
    return [x.flatten(1) for x in latents(*names, seed=1).values()]


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def gradient(y, x):
    return torch.autograd.grad(y, x, retain_graph=True)[0]


def close(got, want, rtol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


def g_of(prediction, *args, c=1.0, loss=scm_loss, **settings):
    """g before it is normalised: a loss's gradient is -2 n / numel of n = g / (|g| + c)."""
    F = prediction.detach().requires_grad_()
    n = gradient(loss(F, *args, c=c, reduction="sum", **settings), F) * -F[0].numel() / 2
    size = n.norm(dim=1, keepdim=True)
    return n * c / (1 - size)


class Gaussian:
    """Of N(m, w^2) on a path: every point keeps its number of standard deviations from the mean."""

    m, w = 0.4, 1.5

    def __init__(self, path):
        self.path = path

    def moments(self, t):
        r = self.path.at(t)
        return r, r.alpha * self.m, (r.alpha * self.w).square() + r.sigma.square()

    def velocity(self, x, t):
        r, mean, variance = self.moments(t[:, None])
        y = (x - mean) / variance
        return r.d_alpha * (self.m + r.alpha * self.w**2 * y) + r.d_sigma * r.sigma * y

    def move(self, x, t, s):
        """x_s of the trajectory through x_t."""
        (_, mean, variance), (_, end, last) = self.moments(t[:, None]), self.moments(s[:, None])
        return end + (last / variance).sqrt() * (x - mean)


def test_moves_of_a_gaussian_are_its_flow():
    for path in (TrigFlow(0.5), RectifiedFlow()):
        flow, x, t = Gaussian(path), drawn("x")[0], times(0.9, 0.5, 0.7, 0.1)
        for s in (t, t / 2):
            change = torch.func.jvp(lambda s: flow.move(x, t, s), (s,), (torch.ones_like(s),))[1]  # noqa: B023
            close(change, flow.velocity(flow.move(x, t, s), s))


@pytest.mark.parametrize("s", [1.0, 0.5])
@pytest.mark.parametrize("off", [0.0, 0.3])
@pytest.mark.parametrize("loss", [scm_loss, rcm_loss])
def test_the_consistency_function_of_a_gaussian(loss, off, s):
    """f = x(0) along the flow: no loss; a little off, the gradient of f^T sg(df / dt) / (s tan t)."""
    if loss is rcm_loss and s != 1:
        return
    flow, x, t = Gaussian(TrigFlow(s)), drawn("x")[0], times(1e-4, 0.5, 1.2, END - 1e-3)
    v, of_s = flow.velocity(x, t), {"sigma_data": s} if loss is scm_loss else {}
    weight = torch.tensor(off, dtype=torch.float64, requires_grad=True)

    def f(x, t):
        return flow.move(x, t, 0 * t) - t.sin()[:, None] * s * weight * (x + t[:, None]).sin()

    def network(y, t):
        return (t.cos()[:, None] * s * y - f(s * y, t)) / (s * t.sin()[:, None])

    F, tF = network_jvp(network, (x / s, t), scm_tangents(v, t, s))
    losses = loss(F, tF, x, v, t, reduction="none", **of_s)
    if off == 0:
        assert (losses < 1e-20).all(), losses
        return
    df = torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))[1].detach()
    close(g_of(F, tF, x, v, t, loss=loss, **of_s), t.cos()[:, None] * df)
    norms = (t.cos()[:, None] * df).norm(dim=1) + 0.1
    want = (f(x, t) * df).sum(1) / (s * t.tan()) * 2 / (15 * norms)
    close(gradient(losses.sum(), weight), gradient(want.sum(), weight), 1e-7)


def test_mean_velocities_of_a_gaussian_have_no_loss():
    flow, x, t, r = Gaussian(RectifiedFlow()), drawn("x")[0], times(0.9, 0.5, 0.7, 1.0), times(0.2, 0.4, 0.65, 0.0)
    v, one = flow.velocity(x, t), torch.ones_like(t)

    def u(x, t, r):
        return (x - flow.move(x, t, r)) / (t - r)[:, None]

    F, tF = network_jvp(u, (x, t, r), (v, one, None))
    mid = t - 0.3 * (t - r)
    none = {
        "MeanFlow": meanflow_loss(F, tF, v, t, r),
        "AlphaFlow": alphaflow_loss(F, u(flow.move(x, t, mid), mid, r), u(x, t, mid), t, r, alpha=0.3),
        "TVM": tvm_loss(
            *network_jvp(u, (x, t, r), (None, None, one)), flow.velocity(flow.move(x, t, r), r), v, v, t, r
        ),
        "FACM": facm_loss(*network_jvp(lambda x, t: u(x, t, 0 * t), (x, t), (v, one)), v, v, t),
    }
    assert all(abs(loss) < 1e-12 for loss in none.values()), none
    some = {
        "MeanFlow": meanflow_loss(F + 0.1, tF, v, t, r),
        "warmup": meanflow_loss(F, tF, v, t, r, warmup=0.5),
        "AlphaFlow": alphaflow_loss(F, u(flow.move(x, t, mid), mid, r), u(x, t, mid), t, r, alpha=0.5),
        "TVM": tvm_loss(F, torch.zeros_like(F), flow.velocity(flow.move(x, t, r), r), v, v, t, r),
        "FACM": facm_loss(F, tF, v, v, t),
    }
    assert all(loss > 1e-4 for loss in some.values()), some


@pytest.mark.parametrize("k", [0.5, 2.0])
def test_scale_of_the_latents(k):
    """With what is measured in their unit scaled, too, a loss is the same, or k^2 times."""
    small = {n: x / 20 if x.dim() > 1 else x for n, x in FACM.items()}  # within FACM's clamp
    zero = {"anchor": torch.ones_like(small["velocity"]), "velocity": torch.ones_like(small["velocity"]) * 0}
    for name, loss, given, unit, power in (
        ("sCM", scm_loss, SCM, {"c": k * 0.1}, 0),
        ("rCM", rcm_loss, SCM, {"c": k * 0.1, "warmup": 0.3}, 0),
        ("MeanFlow", meanflow_loss, MEANFLOW, {"eps": k * k * 1e-3}, 0),
        ("MeanFlow without weight", meanflow_loss, MEANFLOW, {"p": 0.0}, 2),
        ("AlphaFlow", alphaflow_loss, ALPHAFLOW, {"alpha": 0.3, "clamp": k * 4.0, "eps": k * k * 1e-3}, 0),
        ("TVM", tvm_loss, TVM, {}, 2),
    ):
        one = {n: x / k if n in ("c", "clamp") else x / k / k if n == "eps" else x for n, x in unit.items()}
        scaled = {n: k * x if x.dim() > 1 else x for n, x in given.items()}
        close(loss(**scaled, **unit, reduction="none"), k**power * loss(**given, **one, reduction="none"))
        assert loss(**scaled, **one) != loss(**given, **one), name
    # of FACM the consistency alone scales: the flow's cosine has no unit
    losses = [
        facm_loss(
            **{**small, **zero, "prediction": a * small["prediction"], "tangent": a * small["tangent"]},
            eps=a * a * 1e-3,
        )
        - 2
        for a in (1.0, k)
    ]
    close(losses[1], k * losses[0])


LITERAL = {"sCM": {"prior_weight": True}, "AlphaFlow": {"clamp": 0.6}}


@pytest.mark.parametrize("name", ["sCM", "rCM", "MeanFlow", "AlphaFlow", "FACM", "TVM"])
def test_what_the_docstring_says(name):
    """Its lines, run as they stand for each sample."""
    case = CASES[name]
    words = inspect.getdoc(case.loss).split("In plain PyTorch::\n\n")[1]
    code = textwrap.dedent(words[: words.index("\n\n", 1)])
    given, settings = case.leaves(), {**case.settings, **LITERAL.get(name, {})}
    if name == "sCM":
        given |= rows(log_variance=(0.5, -0.3, 1.0, 0.0))
    defaults = {n: p.default for n, p in inspect.signature(case.loss).parameters.items()}
    known = vars(torch) | {"pi": math.pi, "cosine_similarity": torch.cosine_similarity}
    for i in range(4):
        sample = {n: x[i : i + 1] if x.dim() > 1 else x[i].detach() for n, x in given.items()}
        here = known | defaults | settings | sample
        if name in ("AlphaFlow", "TVM") and given["t"][i] == given["r" if name == "AlphaFlow" else "s"][i]:
            continue
        exec(code, here)
        got = case.loss(**sample, **settings)
        close(got, here["loss"])
        learns = [given[n] for n in case.learns]
        for a, b in zip(torch.autograd.grad(got, learns), torch.autograd.grad(here["loss"], learns)):
            close(a, b)


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_scm_is_the_derivative_of_its_consistency_function(s):
    net, (x, v), t = Net(), drawn("x", "v"), times(0.01, 0.5, 1.2, 1.5)

    def f(x, t):
        return t.cos()[:, None] * x - t.sin()[:, None] * s * net(x / s, t)

    df = torch.func.jvp(f, (x, t), (v, torch.ones_like(t)))[1]
    F, tF = network_jvp(net, (x / s, t), scm_tangents(v, t, s))
    close(g_of(F, tF, x, v, t, sigma_data=s), t.cos()[:, None] * df)


def test_gradient_of_scm():
    F = SCM["prediction"].clone().requires_grad_()
    loss = scm_loss(F, **{n: x for n, x in SCM.items() if n != "prediction"}, reduction="none")
    g = -gradient(loss.sum(), F) * F[0].numel() / 2
    close(g.square().flatten(1).mean(1), loss.detach())
    assert (g.flatten(1).norm(dim=1) < 1).all()


def test_rcm_without_warmup_is_scm():
    for t in (SCM["t"], times(0.0, 1e-9, END - 1e-9, END)):
        given = {**SCM, "t": t, "prediction": SCM["prediction"].clone().requires_grad_()}
        r, s = (loss(**given, reduction="none") for loss in (rcm_loss, scm_loss))
        close(r, s, 1e-12)
        close(*(gradient(y.sum(), given["prediction"]) for y in (r, s)), 1e-12)


def test_rcm_keeps_its_digits_towards_noise():
    """1 - sin^2 t has none where cos t is small."""
    F, v = drawn("F", "v")
    zero, t = torch.zeros_like(F), END - times(1e-2, 1e-4, 1e-6, 1e-7)
    r, s = (g_of(F, zero, zero, v, t, loss=loss) for loss in (rcm_loss, scm_loss))
    close(r / t.cos().square()[:, None], s / t.cos().square()[:, None], 1e-12)


def test_rcm_at_the_start_goes_to_the_teacher():
    F, tF, x, v = drawn("F", "tF", "x", "v")
    t = times(0.01, 0.5, 1.2, 1.5)
    close(g_of(F, tF, x, v, t, loss=rcm_loss, warmup=0.0), t.cos()[:, None] * (v - F))
    close(g_of(F, tF, x, v, t, warmup=0.0), t.cos().square()[:, None] * (v - F))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "literal"), [(scm_loss, scm), (rcm_loss, rcm)])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_digits_towards_the_ends(loss, literal, warmup, dtype):
    """Each sample of its own size, however small: times in float32, latents in any dtype, truth in float64."""
    near = (0.0, 1e-30, 1e-8, 1e-4, 0.02, END - 0.02, END - 1e-3, END - 1e-4)
    given = {n: x.flatten(1).repeat(2, 1).to(dtype) for n, x in SCM.items() if x.dim() > 1} | {"t": torch.tensor(near)}
    rate = (given["t"].double().cos() * given["t"].double().sin())[:, None]
    given["tangent"] = (given["tangent"].double() * rate).to(dtype)  # as a network's is
    given["prediction"].requires_grad_()
    exact = {n: x.detach().double() for n, x in given.items()}
    exact["prediction"].requires_grad_()
    got, want = loss(**given, warmup=warmup, reduction="none"), literal(**exact, warmup=warmup)
    rtol = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]  # the literal's 1 - sin^2
    assert ((got.double() - want).abs() <= rtol * want).all(), (got / want - 1).tolist()
    a, b = gradient(got.sum(), given["prediction"]).double(), gradient(want.sum(), exact["prediction"])
    error, size = (y.norm(dim=1) for y in (a - b, b))
    assert (error <= max(rtol, torch.finfo(dtype).eps) * size).all(), (error / size).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("loss", [scm_loss, rcm_loss])
def test_ends_of_trigflow(loss, dtype):
    net, (x, v), t = Net().to(dtype), [y.to(dtype) for y in drawn("x", "v")], times(0, 1e-30, END - 1e-6, END).to(dtype)
    F, tF = network_jvp(net, (x, t), scm_tangents(v, t))
    F = F.detach().requires_grad_()
    losses = loss(F, tF, x, v, t, reduction="none")
    g = -gradient(losses.sum(), F) * F[0].numel() / 2
    start = (v - F.detach())[:2]
    close(g[:2], start / (start.norm(dim=1, keepdim=True) + 0.1), 1e-6)
    assert losses.isfinite().all() and (g[2:].abs() < 1e-4).all() and (g[3].abs() < 1e-5).all()


def test_prior_weight_where_it_is_infinite():
    given = {**SCM, "t": times(0.0, 0.5, 1.2, END), "prediction": SCM["prediction"].clone().requires_grad_()}
    with pytest.raises(FloatingPointError, match="of 1 of 4 samples is not finite: 0"):
        scm_loss(**given, prior_weight=True)
    loss, masked = scm_loss(**given, prior_weight=True, on_nan="mask")
    g = gradient(loss, given["prediction"])
    assert masked == 1 and g.isfinite().all() and not g[0].any() and g[1].any()


def test_log_variance_where_the_loss_is_infinite():
    """Its gradient, too, is that of the other samples."""
    given = {**SCM, "t": times(0.0, 0.5, 1.2, END), "log_variance": times(0.5, -0.3, 1.0, 0.0).requires_grad_()}
    loss, masked = scm_loss(**given, prior_weight=True, on_nan="mask")
    g = gradient(loss, given["log_variance"])
    assert masked == 1 and g.isfinite().all() and g[0] == 0 and g[1:].all()


def test_a_log_variance_at_its_best():
    """Where exp(log_variance) is the loss without it, its gradient is 0; a number is one for all."""
    plain = scm_loss(**SCM, reduction="none")
    best = plain.log().requires_grad_()
    loss = scm_loss(**SCM, log_variance=best, reduction="none")
    close(loss.detach(), 1 + best.detach())
    assert gradient(loss.sum(), best).abs().max() < 1e-12
    assert scm_loss(**{n: x.float() for n, x in SCM.items()}, log_variance=best).dtype == torch.float32
    close(scm_loss(**SCM, log_variance=0.5), (plain.mean() * math.exp(-0.5) + 0.5))


def test_derivatives_of_what_has_no_constants():
    """TVM and MeanFlow without a weight are plain functions of what learns: of any order, in both modes."""
    t, r = times(0.9, 0.5), times(0.2, 0.4)
    F, dF, flow, ema, v = (x[:2, :3].clone() for x in drawn("F", "dF", "flow", "ema", "v"))
    for f, xs in (
        (lambda F, dF, flow: tvm_loss(F, dF, ema, flow, v, t, r, reduction="none"), (F, dF, flow)),
        (lambda F: meanflow_loss(F, dF, v, t, r, p=0.0, reduction="none"), (F,)),
    ):
        xs = tuple(x.clone().requires_grad_() for x in xs)
        assert torch.autograd.gradcheck(f, xs, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, xs)


def test_meanflow_is_the_derivative_of_the_way():
    """(t - r) u is the integral of v: u + (t - r) du / dt = v along (v, 1, 0)."""
    net, (z, v), t, r = Net(2), drawn("z", "v"), times(0.9, 0.5, 0.7, 1.0), times(0.2, 0.4, 0.7, 0.0)
    way = torch.func.jvp(lambda z, t: (t - r)[:, None] * net(z, t, r), (z, t), (v, torch.ones_like(t)))[1]
    u, tu = network_jvp(net, (z, t, r), (v, torch.ones_like(t), None))
    u = u.detach().requires_grad_()
    loss = meanflow_loss(u, tu, v, t, r, p=0.0, reduction="none")
    close(loss.detach(), (way - v).square().mean(1).detach())
    close(gradient(loss.sum(), u), 2 * (way - v).detach() / 15)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_meanflow_without_a_way_is_flow_matching(p):
    given = {**MEANFLOW, "r": MEANFLOW["t"], "tangent": 1e30 * MEANFLOW["tangent"]}
    square = (given["prediction"] - given["velocity"]).square().flatten(1).mean(1)
    close(meanflow_loss(**given, p=p, reduction="none"), square / (square + 1e-3) ** p, 1e-12)


def test_improved_meanflow_is_two_meanflows():
    """V = u + (t - r) sg(du / dt) against v_g, and its other head, as in imf.py with means."""
    u, tu, head, v_g = drawn("u", "tu", "head", "v_g")
    u, head, tu = (x.requires_grad_() for x in (u, head, tu))
    t, r = MEANFLOW["t"], MEANFLOW["r"]
    lu, lv = ((y - v_g).square().mean(1) for y in (u + (t - r)[:, None] * tu.detach(), head))
    want = lu / (lu.detach() + 0.01) + lv / (lv.detach() + 0.01)
    kind = {"eps": 0.01, "reduction": "none"}
    got = meanflow_loss(u, tu, v_g, t, r, **kind) + meanflow_loss(head, torch.zeros_like(u), v_g, t, t, **kind)
    close(got, want)
    for x in (u, head):
        close(gradient(got.sum(), x), gradient(want.sum(), x))


def test_alphaflow_goes_from_flow_matching_to_meanflow():
    net, (z, v) = Net(2), drawn("z", "v")
    t, r = times(0.9, 0.5, 0.7, 1.0), times(0.2, 0.4, 0.7, 0.0)
    u, tu = (y.detach() for y in network_jvp(net, (z, t, r), (v, torch.ones_like(t), None)))
    u.requires_grad_()
    found = []
    for alpha in (1.0, 1e-2, 1e-3, 1e-4):
        d = alpha * (t - r)
        following = net(z - d[:, None] * v, t - d, r).detach()
        found.append(gradient(alphaflow_loss(u, following, v, t, r, alpha=alpha, eps=1e-15, reduction="sum"), u))
    flow = gradient(meanflow_loss(u, tu, v, t, t, eps=1e-15, reduction="sum"), u)
    mean = gradient(meanflow_loss(u, tu, v, t, r, eps=1e-15, reduction="sum"), u)
    close(found[0], flow)
    near = [(g - mean).norm() / mean.norm() for g in found]
    assert near[0] > 1e-2 and near[1] / 20 < near[2] < near[1] / 5 and near[3] < near[2] / 5 and near[3] < 1e-3, near


def test_facm_fits_the_mean_velocity_to_the_data():
    """Inside the clamp, F - target = (1 - (1 - t)^p) (F - v + t dF / dt), which is -df / dt of f = x_t - t F."""
    net, (x, v), t = Net(), drawn("x", "v"), times(0.9, 0.02, 0.5, 1.0)
    v = v / 20
    df = torch.func.jvp(lambda x, t: x - t[:, None] * net(x, t), (x, t), (v, torch.ones_like(t)))[1].detach()
    assert (df.abs() < 1).all()
    F, tF = network_jvp(net, (x, t), (v, torch.ones_like(t)))
    F = F.detach().requires_grad_()
    flow = v.clone().requires_grad_()  # at its optimum: no loss
    losses = facm_loss(F, tF, flow, v, t, p=1.0, reduction="none")
    error = (t.square()[:, None] * df.square()).mean(1)
    close(losses.detach(), (END * t).sin() * error / (error + 1e-3).sqrt(), 1e-7)
    direction = (END * t).sin() / (error + 1e-3).sqrt() * t
    close(gradient(losses.sum(), F), -direction[:, None] * df * 2 / 15)


def test_ends_of_facm():
    given = {n: x.clone() for n, x in FACM.items()} | rows(t=(0.0, 1e-12, 1 - 1e-12, 1.0))
    given["anchor"], given["velocity"] = (torch.zeros_like(given["anchor"]).requires_grad_() for _ in range(2))
    given["prediction"].requires_grad_()
    losses = facm_loss(**given, reduction="none")
    g, flow = torch.autograd.grad(losses.sum(), (given["prediction"], given["anchor"]))
    assert losses.isfinite().all() and g.isfinite().all() and flow.isfinite().all()
    assert not g[0].any() and (g[1].abs() < 1e-12).all() and g[2].any() and g[3].any()
    close(losses[0].detach(), times(1.0)[0])  # of the cosine alone


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nothing_hides_what_is_not_finite(bad):
    """Neither a clamp, nor a step of no length."""
    for loss, given, settings in (
        (facm_loss, FACM, {}),
        (alphaflow_loss, ALPHAFLOW, {"alpha": 0.5, "clamp": 4.0}),
        (tvm_loss, TVM, {}),
        (meanflow_loss, MEANFLOW, {}),
    ):
        for name, x in given.items():
            for i in range(len(x) if x.dim() > 1 else 0):
                x = x.clone()
                x[i, 0, 2] = bad
                with pytest.raises(FloatingPointError, match=f"of 1 of 4 samples is not finite: {i}"):
                    loss(**{**given, name: x}, **settings)
                x[i, 0, 2] = 0


def test_tvm_of_a_network_through_its_tangent():
    net, (x, ema, x_s, v) = Net(2), drawn("x", "ema", "x_s", "v")
    t, s, at = times(0.9, 0.5, 0.7, 1.0), times(0.2, 0.4, 0.6, 0.0), times(0.3, 0.1, 0.8, 0.5)
    zero = torch.zeros_like(t)
    F, dF = network_jvp(net, (x, t, s), (None, None, torch.ones_like(s)))
    inner, d_inner = network_jvp(lambda x, t, gap: net(x, t, t - gap), (x, t, t - s), (None, None, -torch.ones_like(s)))
    close(torch.stack((inner, d_inner)), torch.stack((F, dF)))

    df = torch.func.jvp(lambda s: x + (s - t)[:, None] * net(x, t, s), (s,), (zero + 1,))[1]
    want = (df - ema).square().mean() + (net(x_s, at, at) - v).square().mean()
    got = tvm_loss(F, dF, ema, net(x_s, at, at), v, t, s)
    close(got, want)
    weights = [*net.parameters()]
    full = torch.autograd.grad(got, weights, retain_graph=True)
    for a, b in zip(full, torch.autograd.grad(want, weights)):
        close(a, b)
    cut = torch.autograd.grad(tvm_loss(F, dF.detach(), ema, net(x_s, at, at), v, t, s), weights)
    assert (cut[0] - full[0]).norm() > 1e-2 * full[0].norm()


def test_tvm_with_guidance():
    """The wrapper's forward with do_scale_param is the loss with another velocity."""
    F, dF, ema, F_s, F_u, v = drawn("F", "dF", "ema", "F_s", "F_u", "v")
    t, s, w = times(0.9, 0.5, 0.7, 1.0), times(0.2, 0.4, 0.7, 0.0), times(2.0, 1.0, 1.5, 7.0)
    w_, gap = w[:, None], (s - t)[:, None]
    terminal = ((w_ * (F + gap * dF) - w_ * ema) / w_).square().mean(1)
    flow = ((w_ * F_s - (w_ * v + (1 - w_) * F_u)) / w_).square().mean(1)
    want = torch.where(s == t, 0.0, terminal) + flow
    close(tvm_loss(F, dF, ema, F_s, v + (1 / w_ - 1) * F_u, t, s, reduction="none"), want)


def test_tvm_leaves_out_steps_of_no_length():
    given = {**TVM, "s": TVM["t"] * (1 - 1e-7)}  # torch.isclose
    close(tvm_loss(**given), (given["instant"] - given["velocity"]).square().mean())
    assert tvm_loss(**{**given, "s": TVM["t"] * (1 - 1e-3)}) > tvm_loss(**given)


def test_direction_of_scm():
    v, t = SCM["velocity"], times(0.0, 0.5, 1.2, END)
    dx, dt = scm_tangents(v, t, 0.5)
    close(dt, t.cos() * t.sin())
    close(dx, (t.cos() * t.sin()).view(-1, 1, 1) * v / 0.5)
    exact = (t.cos() * t.sin()).view(-1, 1, 1) * v.bfloat16().double() / 0.3
    assert torch.equal(scm_tangents(v.bfloat16(), t, 0.3)[0], exact.bfloat16())  # rounded once
    dx, dt = scm_tangents(v.bfloat16(), t.float().view(-1, 1, 1))
    assert dx.dtype == torch.bfloat16 and dt.dtype == torch.float32 and dt.shape == (4, 1, 1)
    with pytest.raises(ValueError, match="sigma_data must be finite and above 0"):
        scm_tangents(v, t, 0.0)


BAD = {
    "warmup from": (scm_loss, SCM, {"warmup": 1.5}, ValueError, "warmup must be from 0 to 1, got 1.5"),
    "warmup below": (rcm_loss, SCM, {"warmup": -0.1}, ValueError, "warmup must be from 0 to 1"),
    "warmup of": (meanflow_loss, MEANFLOW, {"warmup": "1"}, TypeError, "warmup must be a number, got str"),
    "c": (scm_loss, SCM, {"c": 0.0}, ValueError, "c must be finite and above 0"),
    "c of rCM": (rcm_loss, SCM, {"c": -1.0}, ValueError, "c must be finite and above 0"),
    "sigma": (scm_loss, SCM, {"sigma_data": 0}, ValueError, "sigma_data must be finite and above 0"),
    "eps": (meanflow_loss, MEANFLOW, {"eps": 0.0}, ValueError, "eps must be finite and above 0"),
    "p": (meanflow_loss, MEANFLOW, {"p": math.inf}, ValueError, "p must be finite"),
    "alpha 0": (alphaflow_loss, ALPHAFLOW, {"alpha": 0.0}, ValueError, "alpha must be finite and above 0"),
    "alpha 2": (alphaflow_loss, ALPHAFLOW, {"alpha": 2.0}, ValueError, "alpha must be from 0 to 1, got 2.0"),
    "clamp": (alphaflow_loss, ALPHAFLOW, {"alpha": 0.5, "clamp": 0.0}, ValueError, "clamp must be finite and above 0"),
    "eps of AlphaFlow": (alphaflow_loss, ALPHAFLOW, {"alpha": 0.5, "eps": -1.0}, ValueError, "eps must be .* above 0"),
    "p of FACM": (facm_loss, FACM, {"p": 0.0}, ValueError, "p must be finite and above 0"),
    "eps of FACM": (facm_loss, FACM, {"eps": 0.0}, ValueError, "eps must be finite and above 0"),
    "trig time": (scm_loss, SCM, {"t": times(0, 1, 2, 1)}, ValueError, "t must be a time from 0 to 1.5708, got 2.0 at"),
    "rCM time": (
        rcm_loss,
        SCM,
        {"t": times(0, 1, 1, math.nan)},
        ValueError,
        "t must be a time from 0 to 1.5708, got nan",
    ),
    "flow time": (facm_loss, FACM, {"t": times(0, 1.5, 1, 1)}, ValueError, "t must be a time from 0 to 1, got 1.5"),
    "order": (
        meanflow_loss,
        MEANFLOW,
        {"r": times(0.2, 0.6, 0, 0)},
        ValueError,
        r"r must be at most t, got 0.6 .*\[1\]",
    ),
    "order of TVM": (tvm_loss, TVM, {"s": times(1, 0, 0, 0)}, ValueError, r"s must be at most t, got 1.0 .*\[0\]"),
    "order of AlphaFlow": (
        alphaflow_loss,
        ALPHAFLOW,
        {"alpha": 0.5, "t": times(0.5)[0]},
        ValueError,
        "r must be at most t",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    loss, given, change, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        loss(**{**given, **change})


def test_facm_needs_channels():
    x = torch.randn(4)
    with pytest.raises(ValueError, match=r"prediction must have shape \[B, C, ...\], got \[4\]"):
        facm_loss(x, x, x, x, times(0.5)[0])
