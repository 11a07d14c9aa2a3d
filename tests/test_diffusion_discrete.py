"""Losses at discrete pairs of times: steps on exact trajectories, identities, limits, published sums, bad input."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusion_cases import latents
from diffusion_discrete import CASES as DISCRETE_CASES
from diffusion_discrete import RECIPES, scene
from diffusion_matching import CASES as MATCHING_CASES
from torch._dynamo.testing import CompileCounterWithBackend

from fastkd.diffusion import critics, discrete, matching
from fastkd.diffusion.discrete import (
    boot_loss,
    consistency_loss,
    ddim_step,
    guided,
    segment_edge,
    u_shaped_times,
    velocity_distillation_loss,
    velocity_matching_loss,
)
from fastkd.diffusion.paths import EDM, PREDICTIONS, RectifiedFlow, TrigFlow

F64 = torch.float64
# the last time from which eps, too, says what x_0 is
PATHS = {TrigFlow(0.5): 1.57, RectifiedFlow(): 0.999, EDM(0.5): 80.0}
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)


def column(*values):
    return torch.tensor(values, dtype=F64)


def drawn(*names, **kwargs):
    return latents(*names, **kwargs).values()


def near(got, want, rtol):
    assert (got.double() - want.double()).abs().max() <= rtol * want.double().abs().max(), (got, want)


def scales(path, t):
    """alpha and sigma."""
    t = t.view(-1, 1, 1)
    if isinstance(path, TrigFlow):
        return t.cos(), path.sigma_data * t.sin()
    return (1 - t, t) if isinstance(path, RectifiedFlow) else (torch.ones_like(t), t)


# recipes


def recipes():
    """Of the module's docstring: names, and lines of which the last is the loss."""
    found = []
    for line in discrete.__doc__.split("::\n\n")[1].split("\n\n")[0].splitlines():
        name, code = line[4:23].strip(), line[23:]
        if name:
            found.append((name, []))
        lines = found[-1][1]
        if code.startswith("+"):
            lines[-1] += code
        else:
            lines.append(code)
    return dict(found)


def test_every_recipe_has_its_literal():
    assert recipes().keys() == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_of_the_docstring(name):
    there = scene()
    there["v"] = there["f" if name == "rectified flow" else "teacher"]
    there["u"] = there["f" if name == "velocity" else "u"]
    *before, loss = recipes()[name]
    there |= {n: getattr(discrete, n) for n in discrete.__all__} | {"TrigFlow": TrigFlow}
    exec("\n".join(before), there)
    want, got = RECIPES[name](SimpleNamespace(**there)), eval(loss, there)
    near(got, want, 1e-6 if name == "rectified flow" else 1e-10)  # whose times are of float32
    near(*(torch.autograd.grad(x, there["theta"])[0] for x in (got, want)), 1e-6)


# consistency


def test_pseudo_huber_of_what_is_small_and_of_what_is_large():
    """e^2 / 2c beside c, in float32, where sqrt(e^2 + c^2) - c is 0; the norm above."""
    (e,) = (x.float() for x in drawn("e"))
    squares = e.double().square().flatten(1).mean(1)
    for distance in ("huber", "elementwise huber"):
        tiny = consistency_loss(1e-4 * e, 0 * e, distance=distance, c=1.0, reduction="none")
        near(tiny, squares * 1e-8 / 2, 1e-5)
    far = consistency_loss(1e6 * e, 0 * e, distance="huber", c=1.0, reduction="none")
    near(far, 1e6 * squares.sqrt(), 1e-5)


@pytest.mark.parametrize("distance", ["mse", "huber", "elementwise huber"])
def test_no_gradient_where_both_agree(distance):
    for c in (None,) if distance == "mse" else (None, 0):
        y = torch.ones(2, 3, requires_grad=True)
        consistency_loss(y, torch.ones(2, 3), distance=distance, c=c).backward()
        assert not y.grad.any()


def test_the_papers_sums():
    """iCT, ECT and Lee et al. as their code has them, to a factor of the number of entries."""
    y, goal = drawn("prediction", "target")
    e, D = y - goal, 15
    squares = e.flatten(1).pow(2).sum(1)
    c = 0.00054 * D**0.5
    ict = (squares + c**2).sqrt() - c
    near(consistency_loss(y, goal, distance="huber", reduction="none") * D**0.5, ict, 1e-12)
    ect = squares.sqrt()
    near(consistency_loss(y, goal, distance="huber", c=0, reduction="none") * D**0.5, ect, 1e-12)
    c = 0.00054 * D
    lee = ((squares + c**2).sqrt() - c) / D
    near(consistency_loss(y, goal, distance="huber", c=0.00054 * D**0.5, reduction="none") / D**0.5, lee, 1e-12)
    lcm = ((e**2 + 0.001**2).sqrt() - 0.001).flatten(1).mean(1)
    near(consistency_loss(y, goal, distance="elementwise huber", reduction="none"), lcm, 1e-12)


def test_frames_of_a_video():
    """A difference that all frames share is no motion; [B, C, T, H, W]."""
    y, goal, still = drawn("prediction", "target", "still", shape=(2, 4, 3, 3))
    loss = consistency_loss(y, goal, frames=2)
    near(loss, ((y[:, :, 1:] - y[:, :, :-1] - goal[:, :, 1:] + goal[:, :, :-1]) ** 2).mean(), 1e-12)
    near(consistency_loss(y + still[:, :, :1], goal, frames=2), loss, 1e-12)
    # in bfloat16 frames that are close are subtracted in float32
    y, goal = (1 + 0.01 * y).bfloat16(), (1 + 0.01 * goal).bfloat16()
    near(consistency_loss(y, goal, frames=2), consistency_loss(y.double(), goal.double(), frames=2), 1e-5)


# steps


@each_path
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_step_keeps_data_and_noise(path, kind):
    """Of a prediction that is right, a step up or down is the same data with the same noise."""
    x_0, noise = drawn("x_0", "noise")
    last = PATHS[path]
    for t, s in ((last, 0.0), (0.9 * last, 0.2), (0.3, last), (0.2, 1e-4)):
        t, s = column(t), column(s)
        x_t = path.add_noise(x_0, noise, t)
        prediction = path.convert(path.velocity(x_0, noise, t), x_t, t, "v", kind)
        a, b = scales(path, s)
        near(ddim_step(prediction, x_t, t, s, path, kind), a * x_0 + b * noise, 1e-9)


@each_path
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_no_step(path, kind):
    """Where t is s, a step is x_t to the bit, also at the ends, and has no gradient in the prediction."""
    last = min(path.last, 1e4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        t = torch.tensor([0.0, 0.3, last, last], dtype=torch.float32)
        s = torch.tensor([0.0, 0.3, last, 0.5], dtype=torch.float32)
        x_t, y = (x.to(dtype).requires_grad_() for x in drawn("x_t", "y"))
        got = ddim_step(y, x_t, t, s, path, kind)
        assert got.dtype == dtype and torch.equal(got[:3], x_t[:3])
        of_y, of_x = torch.autograd.grad(got[:3].sum(), (y, x_t))
        assert not of_y[:3].any() and (of_x[:3] == 1).all()


def test_no_step_of_one_time_for_all():
    x_t, y = drawn("x_t", "y")
    assert torch.equal(ddim_step(y, x_t, torch.tensor(0.0), torch.tensor(0.0), RectifiedFlow(), "x"), x_t)


@each_path
def test_steps_of_gaussian_data_follow_its_trajectory(path):
    """x_0 ~ N(0, 0.49): the posterior mean is linear, the flow x_s = x_t sqrt(var_s / var_t). DDIM has order 1."""
    spread, (x_t,) = 0.7, drawn("x_t")
    first, last = PATHS[path] * 0.9, 0.1

    def deviation(t):
        a, b = scales(path, t)
        return (a**2 * spread**2 + b**2).sqrt()

    errors = []
    for steps in (1000, 2000):
        grid, x = torch.linspace(first**0.5, last**0.5, steps + 1, dtype=F64) ** 2, x_t
        for t, s in itertools.pairwise(grid):
            a, _ = scales(path, t)
            x = ddim_step(a * spread**2 * x / deviation(t) ** 2, x, t, s, path, "x")
        want = x_t * deviation(grid[-1]) / deviation(grid[0])
        errors.append(((x - want).abs().max() / want.abs().max()).item())
    assert errors[1] < 0.01 and errors[0] / errors[1] == pytest.approx(2, rel=0.05)


# segments


def test_edges():
    edges = column(0.0, 0.25, 0.5, 1.0)
    t = column(0.0, 1e-9, 0.25, 0.2501, 0.5, 0.75, 1.0)
    assert segment_edge(t, edges).tolist() == [0.0, 0.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    assert segment_edge(t.view(7, 1), edges).shape == (7, 1) and segment_edge(t[3], edges) == 0.25
    # a time that is an edge stays one in its own dtype
    tenths = torch.linspace(0, 1, 11, dtype=F64)
    assert torch.equal(segment_edge(tenths.float()[1:], tenths), tenths.float()[:-1])
    assert segment_edge(column(0.1), column(0.5)) == 0.5


def test_phased_consistency_as_its_code():
    """ddim_style_multiphase_pred, with f2 = z_u where u is the edge."""
    path = TrigFlow()
    eps, eps_2, z_t, z_u = drawn("eps", "eps_2", "z_t", "z_u")
    eps.requires_grad_()
    t, u = column(0.2, 0.4, 0.9, 1.5), column(0.1, 0.3, 0.75, 1.4)
    edges = column(0.0, 0.3, 0.75, 1.2, math.pi / 2)
    losses = []
    for i, m in enumerate((0.0, 0.3, 0.75, 1.2)):
        alpha_m, sigma_m = math.cos(m), math.sin(m)
        x_0 = (z_t[i] - t[i].sin() * eps[i]) / t[i].cos()
        x_2 = (z_u[i] - u[i].sin() * eps_2[i]) / u[i].cos()
        f, f2 = alpha_m * x_0 + sigma_m * eps[i], alpha_m * x_2 + sigma_m * eps_2[i]
        f2 = z_u[i] if u[i] == m else f2
        losses.append(((f - f2.detach()) ** 2).mean())
    want = torch.stack(losses)
    s = segment_edge(t, edges)
    got = consistency_loss(
        ddim_step(eps, z_t, t, s, path, "eps"), ddim_step(eps_2, z_u, u, s, path, "eps"), reduction="none"
    )
    near(got, want, 1e-12)
    near(*(torch.autograd.grad(x.sum(), eps)[0] for x in (got, want)), 1e-12)


def test_noise_consistency_interpolates_by_trigflow():
    """z_k = sqrt(1 - s^2) z + s eps."""
    z, noise = drawn("z", "noise")
    s = column(0.0, 0.3, 0.8, 1.0)
    k = s.view(-1, 1, 1)
    near(TrigFlow().add_noise(z, noise, s.asin()), (1 - k**2).sqrt() * z + k * noise, 1e-12)


# guidance


def test_guidance():
    conditional, unconditional = drawn("conditional", "unconditional")
    w = column(0.0, 1.0, 4.0, 14.0)
    k = w.view(-1, 1, 1)
    near(guided(conditional, unconditional, 1 + w), (1 + k) * conditional - k * unconditional, 1e-12)  # Meng et al.
    for scale in (w, w.view(-1, 1, 1)):
        near(guided(conditional, unconditional, scale), unconditional + k * (conditional - unconditional), 1e-12)
    near(guided(conditional, unconditional, 1.1), 1.1 * conditional - 0.1 * unconditional, 1e-12)
    half = guided(conditional.bfloat16(), unconditional.bfloat16(), 7.5)
    want = guided(conditional.bfloat16().double(), unconditional.bfloat16().double(), 7.5)
    assert half.dtype == torch.bfloat16 and torch.equal(half, want.bfloat16())


# BOOT


@each_path
def test_boot_is_consistency_with_a_step(path):
    y, before, teacher, noise = drawn("prediction", "previous", "teacher", "noise")
    t, s = column(0.3, 0.9, 0.5, 0.95), column(0.1, 0.85, 0.45, 0.6)
    x_s = ddim_step(teacher, path.add_noise(before, noise, t), t, s, path, "x")
    goal = path.convert(noise, x_s, s, "eps", "x")
    (a, b), (c, d) = scales(path, t), scales(path, s)
    k = (1 - d * a / (c * b)).flatten()
    want = consistency_loss(y, goal, weights=1 / k**2, reduction="none")
    near(boot_loss(y, before, teacher, t, s, path, reduction="none"), want, 1e-10)


def test_boot_vanishes_along_the_trajectory_of_gaussian_data():
    """The signal y(noise, t) = (x_t - sigma noise) / alpha of the exact flow: what is left is of order 2."""
    path, spread, (noise,) = RectifiedFlow(), 0.7, drawn("noise")

    def signal(t):
        x_t = noise * (((1 - t) ** 2 * spread**2 + t**2) ** 0.5)
        return (x_t - t * noise) / (1 - t), (1 - t) * spread**2 * x_t / ((1 - t) ** 2 * spread**2 + t**2)

    losses = []
    for step in (1e-2, 1e-3):
        t = 0.6
        (before, teacher), (y, _) = signal(t), signal(t - step)
        losses.append(boot_loss(y, before, teacher, column(t), column(t - step), path).item())
    assert 0 < losses[1] < 1e-6 and losses[0] / losses[1] == pytest.approx(100, rel=0.1)


def test_boot_of_short_steps_in_float32():
    """With 1 / k = 5e3 the float32 of a target would leave nothing of a difference."""
    y, x = drawn("y", "x")
    y, x = y.float(), x.float()
    moved = y + 1e-4 * torch.ones_like(y)
    t, s = column(0.5), column(0.5 - 5e-5)
    got = boot_loss(moved, y, x, t, s, RectifiedFlow())
    near(got, boot_loss(moved.double(), y.double(), x.double(), t, s, RectifiedFlow()), 1e-5)


# velocity matching and distillation


def velocity_inputs():
    return latents("prediction", "student", "tangent", "velocity") | {"t": column(0.1, 0.4, 0.8, 1.0)}


def test_velocity_distillation_moves_samples_along_velocity_matching():
    """The gradient is 2 (u - target) / D: the sample noise - v goes towards x + u - target."""
    given = velocity_inputs()
    given["prediction"].requires_grad_()
    loss = velocity_distillation_loss(**given, reduction="none")
    du = given["tangent"] / (given["tangent"].flatten(1).norm(dim=1).view(-1, 1, 1) + 0.1)
    residual = given["student"] - given["velocity"] + given["t"].view(-1, 1, 1) * du
    (gradient,) = torch.autograd.grad(loss.sum(), given["prediction"])
    near(gradient, 2 * residual / 15, 1e-12)
    matching = velocity_matching_loss(
        given["student"], given["tangent"], given["velocity"], given["t"], reduction="none"
    )
    near(loss, matching, 1e-12)


def test_velocity_matching_at_the_data_is_the_teachers():
    given = velocity_inputs()
    got = velocity_matching_loss(given["prediction"], given["tangent"], given["velocity"], column(0.0))
    near(got, consistency_loss(given["prediction"], given["velocity"]), 1e-12)


def test_velocity_matching_has_meanflows_fixed_point():
    """The mean velocity to 0 of Gaussian data solves u = v - t du/dt; c is what leaves the derivative as it is."""
    spread, noise = 0.7, column(0.3)
    t = column(0.6).requires_grad_()

    def deviation(t):
        return ((1 - t) ** 2 * spread**2 + t**2).sqrt()

    x_t = noise * deviation(t)
    u = (x_t - spread * noise) / t  # back to x_0
    (v,) = torch.autograd.grad(deviation(t) * noise.item(), t, retain_graph=True)
    (du,) = torch.autograd.grad(u.sum(), t)
    c = 1 - du.abs().item()
    assert 0 < c < 1
    given = {"prediction": u.detach(), "tangent": du, "velocity": v, "t": t.detach()}
    assert velocity_matching_loss(**given, c=c) < 1e-25 and velocity_matching_loss(**given, c=2 * c) > 1e-4


# times


@pytest.mark.parametrize("a", [1e-9, 0.5, 4.0, 1000.0])
def test_u_shaped_times(a):
    """Kolmogorov and Smirnov's distance to the distribution; the largest of 1 of 1000 draws of 20,000 is 0.014."""
    t = u_shaped_times(20_000, a, generator=torch.Generator().manual_seed(1), dtype=F64).sort()[0]
    assert t[0] >= 1e-5 and t[-1] <= 1 - 1e-5
    if a > 700:  # exp(a) is not finite: both ends are exponential
        below = torch.where(t < 0.5, -(-a * (t - 1e-5)).expm1() / 2, 0.5 + (-a * (1 - 1e-5 - t)).exp() / 2)
    else:
        below = ((a * t).expm1() - (a * (1 - t)).expm1() + math.expm1(a)) / (2 * math.expm1(a))
    assert (below - torch.linspace(0, 1, len(t), dtype=F64)).abs().max() < 0.014


def test_u_shaped_times_are_drawn_from_a_generator():
    draws = [u_shaped_times(5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float32 and u_shaped_times(0).shape == (0,)


# every loss, besides what tests/test_diffusion_losses.py holds it to

CASES = {**DISCRETE_CASES, **MATCHING_CASES}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
UP = torch.tensor([-1.0, 0.5, 1.5, 2.0], dtype=F64)


def leaves(inputs, learns=None):
    """Inputs, of which some (or all) require grad."""
    return {n: x.detach().requires_grad_(learns is None or n in learns) for n, x in inputs.items()}


def found(case, given, **kwargs):
    """Losses, and gradients of those inputs that require them."""
    losses = case(given, reduction="none", **kwargs)
    losses = losses[0] if kwargs else losses
    wanted = {n: x for n, x in given.items() if x.requires_grad}
    grads = torch.autograd.grad(losses, list(wanted.values()), UP.to(losses)[: len(losses)], allow_unused=True)
    return losses, {n: g for n, g in zip(wanted, grads) if n in case.learns}


def same(got, want, rtol=1e-12):
    near(got[0], want[0], rtol)
    assert got[1].keys() == want[1].keys()
    for n, g in got[1].items():
        near(g, want[1][n], rtol)


@each_case
def test_tangents(case):
    """Forward mode: the gradient times the direction."""
    rest = {n: x for n, x in case.inputs.items() if n not in case.learns}
    given = leaves({n: x for n, x in case.inputs.items() if n in case.learns})
    along = {n: x.detach().flip(0).roll(1, -1) for n, x in given.items()}
    constants = {n: x.detach() for n, x in given.items()}
    value, tangent = torch.func.jvp(lambda x: case({**x, **rest}), (constants,), (along,))
    loss = case({**given, **rest})
    near(value, loss, 1e-12)
    gradients = torch.autograd.grad(loss, list(given.values()))
    near(tangent, sum((g * v).sum() for g, v in zip(gradients, along.values())), 1e-10)


SMOOTH = [n for n in CASES if n.startswith(("consistency", "BOOT", "velocity m", "denoising", "discriminator", "SIM"))]


@pytest.mark.parametrize("name", [*SMOOTH, "SiD, no normaliser"])
def test_gradcheck(name):
    """Of losses whose learning inputs have no constants within."""
    case = CASES[name]
    given = leaves({n: x[:2, :2] if x.dim() > 1 else x[:2] for n, x in case.inputs.items()}, case.learns)

    def loss(*learning):
        return case({**given, **dict(zip(case.learns, learning))}, reduction="none")

    learning = tuple(given[n] for n in case.learns)
    assert torch.autograd.gradcheck(loss, learning, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, learning)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "weights" in case.inputs])
def test_a_weight_that_is_not_a_number(name):
    case = CASES[name]
    given = leaves({n: x.clone() for n, x in case.inputs.items()})
    with torch.no_grad():
        given["weights"][2] = math.nan
    with pytest.raises(FloatingPointError, match="the loss of 1 of 4 samples is not finite: 2;"):
        case(given)
    assert case(given, on_nan="mask")[1] == 1
    want = found(case, leaves({n: x.clone() for n, x in case.inputs.items()}))
    losses, grads = found(case, given, on_nan="mask")
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=F64)
    same((losses, grads), (want[0] * keep, {n: g * keep.view(-1, 1, 1) for n, g in want[1].items()}))


@each_case
def test_a_loss_that_overflows(case):
    """A sample that float32 cannot square leaves no NaN behind."""
    for name in case.learns if "tangent" not in case.inputs else (*case.learns, "tangent"):
        given = {n: x.float() if x.dim() > 1 else x for n, x in case.inputs.items()}
        given[name] = torch.cat((1e30 * given[name][:1], given[name][1:]))
        loss, grads = found(case, leaves(given), on_nan="mask")
        assert loss.isfinite().all() and all(g.isfinite().all() for g in grads.values())
        if name == "tangent" or (case.loss is matching.sim_loss and name != "sample"):  # the norm of what is divided by
            with pytest.raises(FloatingPointError, match="1 of 4"):
                case(given)


# the degrees of a loss and of its gradient in the scale of its latents; c, in units of them, is scaled, too
DEGREES = {
    "consistency": (2, 1),
    "consistency, huber, c": (1, 0),
    "consistency, elementwise, c": (1, 0),
    "consistency, frames": (2, 1),
    "BOOT, EDM": (2, 1),
    "gradient, weights": (2, 1),
    "DMD2": (0, 0),
    "Diff-Instruct": (2, 1),
    "VSD": (2, 1),
    "TDM, c": (0, -1),
    "TDM, paper": (1, 0),
    "SiD": (1, 0),
    "SiD, alpha": (1, 0),
    "SiD, no normaliser": (2, 1),
    "SIM": (1, 0),
    "denoising": (2, 1),
}


@pytest.mark.parametrize(("name", "degrees"), DEGREES.items())
def test_scale_of_the_latents(name, degrees):
    """A power of 2 is exact."""
    case = CASES[name]
    want = found(case, leaves({n: x.float() if x.dim() > 1 else x for n, x in case.inputs.items()}))
    for scale in (2.0**-12, 2.0**12):
        given = leaves({n: scale * x.float() if x.dim() > 1 else x for n, x in case.inputs.items()})
        settings = {n: scale * v if n == "c" else v for n, v in case.settings.items()}
        of_loss, of_gradient = (scale**d for d in degrees)
        scaled = of_loss * want[0], {n: of_gradient * g for n, g in want[1].items()}
        same(found(replace(case, settings=settings), given), scaled, 1e-6)


@pytest.mark.parametrize(
    "name", ["consistency, other frames", "BOOT, TrigFlow", "velocity distillation", "DMD2", "TDM"]
)
def test_compiled_for_any_shape(name):
    torch._dynamo.reset()
    case, counter = CASES[name], CompileCounterWithBackend("aot_eager")
    f = torch.compile(lambda x: case(x, reduction="none"), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for n, width in ((4, 5), (2, 4)):
        given = {k: (x[:n, :, :width] if x.dim() > 1 else x[:n]).clone() for k, x in case.inputs.items()}
        near(f(given), case(given, reduction="none"), 1e-12)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_helpers_compiled():
    """In one graph."""
    x, y = drawn("x", "y")
    s, t, path = column(0.1, 0.2, 0.3, 0.4), column(0.5, 0.6, 0.7, 0.8), TrigFlow()

    def helpers(x, y, s, t):
        r = critics.density_ratio(x)
        by_time, means = critics.ratio_by_time(r, t, torch.ones(10, dtype=F64))
        x_t, goal = critics.phased_noise(x, y, s, t, path)
        weights = critics.f_distill_weights(by_time), critics.uni_instruct_weights(r, "jeffreys")
        other = critics.tdm_weights(x_t, x, y, t, path), matching.balanced_gradient(x, y)
        down = ddim_step(guided(x, y, 1 + s), y, t, segment_edge(t, s), path)
        return r, by_time, means, x_t, goal, *weights, *other, down

    for dynamic in (False, True):
        torch._dynamo.reset()
        f = torch.compile(helpers, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for got, want in zip(f(x, y, s, t), helpers(x, y, s, t)):
            near(got, want, 1e-12)


# bad input

X = torch.ones(2, 3)
T = torch.tensor([0.5, 0.6])
PATH = RectifiedFlow()
BAD = {
    "distance": (lambda: consistency_loss(X, X, distance="l1"), ValueError, "distance must be one of"),
    "c of mse": (lambda: consistency_loss(X, X, c=1.0), ValueError, "c must be None with distance 'mse', got 1.0"),
    "c below": (lambda: consistency_loss(X, X, distance="huber", c=-1), ValueError, "c must be 0 or above, got -1"),
    "c infinite": (lambda: consistency_loss(X, X, distance="huber", c=math.inf), ValueError, "c must be finite"),
    "c": (lambda: consistency_loss(X, X, distance="huber", c="x"), TypeError, "c must be a number"),
    "frames 0": (lambda: consistency_loss(X, X, frames=0), ValueError, "frames must be a dimension from 1"),
    "frames out": (lambda: consistency_loss(X, X, frames=2), ValueError, r"got 2 with shape \[2, 3\]"),
    "frames word": (lambda: consistency_loss(X, X, frames="1"), ValueError, "frames must be a dimension from 1"),
    "one frame": (lambda: consistency_loss(X[:, :1], X[:, :1], frames=1), ValueError, "at least two frames"),
    "weights": (lambda: consistency_loss(X, X, weights=torch.ones(3)), ValueError, r"weights must have shape \[2\]"),
    "weight": (lambda: consistency_loss(X, X, weights=math.nan), ValueError, "weights must be finite"),
    "step path": (lambda: ddim_step(X, X, T, T, "flow"), TypeError, "path must be a TrigFlow"),
    "step kind": (lambda: ddim_step(X, X, T, T, PATH, "noise"), ValueError, "kind must be one of"),
    "step shape": (lambda: ddim_step(X[:1], X, T, T, PATH), ValueError, r"x_t must have shape \[1, 3\]"),
    "step t": (lambda: ddim_step(X, X, T + 1, T, PATH), ValueError, "t must be a time from 0 to 1, got 1.5"),
    "step s": (lambda: ddim_step(X, X, T, T - 1, PATH), ValueError, "s must be a time from 0 to 1, got -0.5"),
    "step int": (lambda: ddim_step(X, X, T, T.long(), PATH), TypeError, "s must be float32"),
    "step device": (lambda: ddim_step(X, X, T, T.to("meta"), PATH), ValueError, "on one device"),
    "edges": (lambda: segment_edge(T, X), ValueError, r"edges must have shape \[E\]"),
    "no edges": (lambda: segment_edge(T, T[:0]), ValueError, r"edges must have shape \[E\]"),
    "edges down": (lambda: segment_edge(T, T.flip(0)), ValueError, "edges must be above the edge before, got 0.5"),
    "edges int": (lambda: segment_edge(T, T.long()), TypeError, "edges must be float32"),
    "edges t": (lambda: segment_edge(0.5, T), TypeError, "t must be a tensor"),
    "edges device": (lambda: segment_edge(T, T.to("meta")), ValueError, "on one device"),
    "guided": (lambda: guided(X, X[:1], 2.0), ValueError, r"unconditional must have shape \[2, 3\]"),
    "guided device": (lambda: guided(X, X.to("meta"), 2.0), ValueError, "on one device"),
    "scale device": (lambda: guided(X, X, T.to("meta")), ValueError, "on one device"),
    "scale int": (lambda: guided(X, X, T.long()), TypeError, "scale must be float32"),
    "scale": (lambda: guided(X, X, "2"), TypeError, "scale must be a number"),
    "scales": (lambda: guided(X, X, torch.ones(3)), ValueError, r"scale must have shape \[2\]"),
    "boot path": (lambda: boot_loss(X, X, X, T, T / 2, "flow"), TypeError, "path must be a TrigFlow"),
    "boot times": (lambda: boot_loss(X, X, X, T, T, PATH), ValueError, "s must be below t, got 0.5 at index"),
    "n": (lambda: u_shaped_times(2.0), ValueError, "n must be an integer from 0, got 2.0"),
    "a": (lambda: u_shaped_times(2, 0.0), ValueError, "a must be finite and above 0"),
    "matching c": (lambda: velocity_matching_loss(X, X, X, T, c=0), ValueError, "c must be finite and above 0"),
    "matching t": (lambda: velocity_matching_loss(X, X, X, T + 1), ValueError, "t must be a time from 0 to 1"),
    "distillation c": (lambda: velocity_distillation_loss(X, X, X, X, T, c=0), ValueError, "c must be finite"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
