"""Distribution matching where all is known, Gaussian data and generator, by quadrature; weights, noise, GAN terms."""

import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusion_cases import latents, seeded
from diffusion_matching import RECIPES, scene
from numpy.polynomial.hermite_e import hermegauss

from fastkd.diffusion import critics, discrete, matching
from fastkd.diffusion.paths import EDM, RectifiedFlow, TrigFlow

ALPHA, SIGMA, S = 0.8, 0.5, 1.3  # x_t = ALPHA x + SIGMA eps, data N(0, S^2)
P = ALPHA**2 * S**2 + SIGMA**2
M, K = 0.4, 1.7  # the generator is N(M, K^2), wider than the data: r = p / q is bounded
F64 = torch.float64


def number(x):
    return torch.tensor(x, dtype=F64, requires_grad=True)


def grid(*counts):
    """Gauss-Hermite nodes of standard normal variables, [n] each, and weights."""
    line = [torch.from_numpy(x) for n in counts for x in hermegauss(n)]
    nodes = torch.meshgrid(*line[::2], indexing="ij")
    weights = math.prod(torch.meshgrid(*line[1::2], indexing="ij"))
    return *(x.flatten() for x in nodes), (weights / weights.sum()).flatten()


class Bed:
    """The generator's samples with gradients to m and q; both networks at their optimum, frozen."""

    def __init__(self, nodes=60):
        self.m, self.q = number(M), number(K)
        z, self.eps, self.weights = grid(nodes, nodes)
        self.x = self.m + self.q * z
        self.x_t = ALPHA * self.x + SIGMA * self.eps
        self.Q = ALPHA**2 * K**2 + SIGMA**2
        self.real = ALPHA * S**2 * self.x_t / P
        self.fake = M + ALPHA * K**2 * (self.x_t - ALPHA * M) / self.Q

    def eps_of(self, x_0):
        return (self.x_t - ALPHA * x_0) / SIGMA

    def gradients(self, losses):
        return torch.stack(torch.autograd.grad((self.weights * losses).sum(), (self.m, self.q), retain_graph=True))


def of(closed):
    """The gradient by m and q of a function of m and Q = ALPHA^2 q^2 + SIGMA^2."""
    m, q = number(M), number(K)
    return torch.stack(torch.autograd.grad(closed(m, ALPHA**2 * q.square() + SIGMA**2), (m, q)))


def near(got, want, rtol=1e-9):
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-12)


def reverse_kl(m, Q):
    return 0.5 * ((Q + ALPHA**2 * m**2) / P - 1 - (Q / P).log())


NAMES = "LCM, AnimateLCM, MLCM, Hyper-SD, TSCD, phased, MCM, BOOT, u_shaped_times, guidance, NCT, MDT-dist, DMD, DMD2, "
NAMES += (
    "phased DMD, TDM, f-distill, Uni-Instruct, SiD, Few-step SiD, SIM, VSD, SwiftBrush, random-guidance VSD, SNOOPI, "
)
NAMES += "SDS, CSM, BSD, DisBack, multi-student DMD, rCM, Diff-Instruct, velocity matching, velocity distillation"


@pytest.mark.parametrize("name", NAMES.split(", "))
def test_method_is_found_by_its_name(name):
    functions = [f for module in (discrete, matching, critics) for f in vars(module).values() if callable(f)]
    text = " ".join(" ".join(x.__doc__ or "" for x in (discrete, matching, critics, *functions)).split())
    assert re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    loss, literal = RECIPES[name]
    o = scene()
    got, want = loss(o), literal(o)
    if "gradient" not in name:
        near(got, want)
    network = name.endswith(("'s", "network on EDM", "of the noise", "of v"))  # x is a constant
    by = o.fake if network else o.x
    near(*(torch.autograd.grad(y, by, retain_graph=True)[0] for y in (got, want)))


def test_dmd_descends_the_reverse_kl():
    bed = Bed()
    losses = matching.dmd_loss(bed.x, bed.real, bed.fake, normalize=False, reduction="none")
    near(bed.gradients(losses), SIGMA**2 / ALPHA**2 * of(reverse_kl))


def test_sds_lacks_the_fake_term():
    bed = Bed()
    real, fake, w = bed.eps_of(bed.real), bed.eps_of(bed.fake), SIGMA**2
    vsd = bed.gradients(matching.vsd_loss(bed.x, real, fake, weights=w, reduction="none"))
    sds = bed.gradients(matching.vsd_loss(bed.x, real, bed.eps, weights=w, reduction="none"))
    near(vsd, w * SIGMA / ALPHA * of(reverse_kl))
    near(sds, w * SIGMA * ALPHA / P * torch.tensor([M, K], dtype=F64))
    near(vsd - sds, torch.tensor([0.0, -w * SIGMA * ALPHA * K / bed.Q], dtype=F64))


# f of r = p / q with the constant factor by which the weight r^2 f'' is the table's
DIVERGENCES = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (1 + r) * ((1 + r) / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    "squared_hellinger": lambda r: 4 * (1 - r.sqrt()),
    "forward_kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman_chi_square": lambda r: 0.5 * (1 - r) ** 2 / r,
}


def normal(x, mean, variance):
    return (-0.5 * ((x - mean) ** 2 / variance + variance.log())).exp() / math.sqrt(2 * math.pi)


def ratio(x, m, Q):
    r = normal(x, 0.0, torch.tensor(P, dtype=F64)) / normal(x, m, Q)
    return r.clamp(min=1e-300)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_distill_descends_each_divergence(name):
    # the chi-square needs q narrower than 2 p: E_q[1 / r] is finite
    bed = Bed(120)
    line = torch.linspace(-25, 25, 20_001, dtype=F64)  # the trapezoid rule is exact to rounding here

    def divergence(m, Q):
        q = normal(line, ALPHA * m, Q)
        return (q * DIVERGENCES[name](ratio(line, ALPHA * m, Q))).sum() * (line[1] - line[0])

    r = ratio(bed.x_t.detach(), ALPHA * M, torch.tensor(bed.Q, dtype=F64))
    weights = critics.f_distill_weights(r, name, normalize=False)
    losses = matching.dmd_loss(bed.x, bed.real, bed.fake, weights=weights, normalize=False, reduction="none")
    near(bed.gradients(losses), SIGMA**2 / ALPHA**2 * of(divergence), 1e-6)
    if name == "forward_kl":
        near(bed.gradients(losses)[0], torch.tensor(SIGMA**2 * M / bed.Q, dtype=F64), 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_by_its_alpha(alpha):
    bed = Bed()
    losses = matching.sid_loss(bed.x, bed.real, bed.fake, alpha=alpha, normalize=False, reduction="none")
    found, D = bed.gradients(losses), 1 / bed.Q - 1 / P
    by_m = M * SIGMA**4 / P * ((2 - 2 * alpha) / P + (2 * alpha - 1) / bed.Q)
    by_q = -2 * K * SIGMA**4 * D * (1 / P + alpha * D)
    near(found, torch.tensor([by_m, by_q], dtype=F64))
    if alpha == 0.5:  # the gradient of E (f_T - f_F)^2, halved
        near(found, 0.5 * of(lambda m, Q: m**2 * SIGMA**4 / P**2 + SIGMA**4 * (1 / Q - 1 / P) ** 2 * Q / ALPHA**2))


def frozen_law(bed, distance):
    """The gradient by m and q of E distance(fake - real) whose law of x_t is a constant: what SIM descends."""
    m, q, x_t = number(M), number(K), bed.x_t.detach()
    fake = m + ALPHA * q**2 * (x_t - ALPHA * m) / (ALPHA**2 * q**2 + SIGMA**2)
    mean = (bed.weights * distance(fake - bed.real.detach())).sum()
    return torch.stack(torch.autograd.grad(mean, (m, q)))


@pytest.mark.parametrize("c", [0.05, 0.8, 20.0])
def test_sim_descends_its_divergence(c):
    bed = Bed()
    losses = matching.sim_loss(bed.x, bed.real, bed.fake, c=c, reduction="none")
    near(bed.gradients(losses), frozen_law(bed, lambda y: (y**2 + c**2).sqrt() - c), 1e-6)


def test_sid_with_alpha_1_is_half_of_sim_of_squares():
    bed = Bed()
    losses = matching.sid_loss(bed.x, bed.real, bed.fake, normalize=False, reduction="none")
    near(bed.gradients(losses), 0.5 * frozen_law(bed, torch.square))


def test_uni_instruct_of_the_forward_kl():
    """Half of what shifts E r (real - fake)^2 of the fake distribution, which is E (real - fake)^2 of the data's."""
    bed = Bed(120)
    r = ratio(bed.x_t.detach(), ALPHA * M, torch.tensor(bed.Q, dtype=F64))
    weights = critics.uni_instruct_weights(r)
    losses = matching.sid_loss(bed.x, bed.real, bed.fake, weights=weights, normalize=False, reduction="none")

    def divergence(m, Q):
        # scores -x / P and -(x - alpha m) / Q, times sigma^2 / alpha
        return SIGMA**4 / ALPHA**2 * ((1 / Q - 1 / P) ** 2 * P + (ALPHA * m / Q) ** 2)

    near(bed.gradients(losses)[0], 0.5 * of(divergence)[0], 1e-6)


def test_tdm_at_large_c_descends_the_reverse_kl():
    bed = Bed()
    losses = matching.tdm_loss(bed.x, bed.real, bed.fake, c=1e5, over="sample", reduction="none")
    near(1e5 * bed.gradients(losses), SIGMA**2 / ALPHA**2 * of(reverse_kl), 1e-7)


def test_csm_and_both_bsd_between_gaussians():
    """Teachers of N(0.9, 0.49) and of the data, E by x of a noised sample: the prediction at the mean."""
    bed = Bed()
    narrow = ALPHA**2 * 0.49 + SIGMA**2

    def eps(shift, variance):
        return SIGMA * (bed.x_t - ALPHA * shift) / variance

    cond, uncond, fake = eps(0.9, narrow), eps(0.0, P), eps(M, bed.Q)
    csm = bed.gradients(matching.vsd_loss(bed.x, cond, uncond, reduction="none"))
    near(csm[0], torch.tensor(SIGMA * ALPHA * ((M - 0.9) / narrow - M / P), dtype=F64))
    near(csm[1], torch.tensor(SIGMA * ALPHA * K * (1 / narrow - 1 / P), dtype=F64))

    def tuned_kl(m, Q):
        return 0.5 * ((Q + ALPHA**2 * (m - 0.9) ** 2) / narrow - (Q / narrow).log())

    bootstrapped = bed.gradients(matching.vsd_loss(bed.x, cond, fake, reduction="none"))
    near(bootstrapped, SIGMA / ALPHA * of(tuned_kl))
    # one entry: the shortest between c and d is 0, or the shorter where both have one sign
    g = matching.balanced_gradient(cond.detach(), uncond.detach())
    c, d = (cond - uncond).detach(), 0.018 * uncond.detach()
    near(g, torch.where(c * d < 0, 0.0 * c, torch.where(c.abs() < d.abs(), c, d)))


@pytest.mark.parametrize("path", [TrigFlow(0.5), RectifiedFlow(), EDM(0.5)], ids=lambda p: type(p).__name__)
def test_phased_dmd_descends_the_reverse_kl_at_t(path):
    """The generator makes x_s = m + q z at time s; both distributions are compared at t."""
    s, t = at(*PATHS[path])
    m, q = number(M), number(K)
    z, eps, weights = grid(40, 40)
    x_t, goal = critics.phased_noise(m + q * z, eps, s, t, path)
    start, end = path.at(s), path.at(t)
    a = end.alpha / start.alpha
    b2 = end.sigma**2 - (a * start.sigma) ** 2
    P_t, Q_t = end.alpha**2 * S**2 + end.sigma**2, a**2 * K**2 + b2
    real, fake = -x_t / P_t, -(x_t - a * M) / Q_t
    losses = matching.dmd_loss(x_t, real, fake, normalize=False, reduction="none")
    found = torch.stack(torch.autograd.grad((weights * losses).sum(), (m, q), retain_graph=True))
    Q = a**2 * q**2 + b2
    kl = 0.5 * ((Q + (a * m) ** 2) / P_t - 1 - (Q / P_t).log())
    near(found, torch.stack(torch.autograd.grad(kl, (m, q))))
    # and the fake network's target leads to that score: v is linear in x_t
    v = (end.d_alpha * (x_t - end.sigma**2 * -fake) / end.alpha - end.d_sigma * end.sigma * fake).detach()
    near((weights * v * x_t.detach()).sum(), (weights * goal * x_t.detach()).sum())


def test_sim_at_large_c_is_sid():
    bed = Bed()
    sim = matching.sim_loss(bed.x, bed.real, bed.fake, c=1e6, reduction="none")
    sid = matching.sid_loss(bed.x, bed.real, bed.fake, normalize=False, reduction="none")
    near(1e6 * bed.gradients(sim), bed.gradients(sid), 1e-7)


@pytest.mark.parametrize("loss", [matching.sid_loss, lambda *x: matching.sim_loss(*x, c=1.0)], ids=["sid", "sim"])
def test_predictions_must_carry_the_sample_gradient(loss):
    x, real, fake = latents("x", "real", "fake").values()
    assert loss(x, real, fake).isfinite()
    x.requires_grad_()
    with pytest.raises(ValueError, match="real must carry the sample's gradient"):
        loss(x, real, fake * x)
    with pytest.raises(ValueError, match="fake must carry the sample's gradient"):
        loss(x, real * x, fake)
    with torch.no_grad():
        assert loss(x, real, fake).isfinite()


def test_the_fake_network_s_optimum():
    bed = Bed()
    slope, offset = number(ALPHA * K**2 / bed.Q), number(M - ALPHA**2 * K**2 * M / bed.Q)
    x, x_t = bed.x.detach(), bed.x_t.detach()
    losses = critics.denoising_loss(slope * x_t + offset, x, reduction="none")
    for g in torch.autograd.grad((bed.weights * losses).sum(), (slope, offset)):
        near(g, torch.zeros((), dtype=F64))


def test_gradients_far_smaller_than_the_sample():
    x, g = torch.full((2, 3), 1e4, requires_grad=True), torch.full((2, 3), 1e-6)
    loss = matching.gradient_loss(x, g, reduction="sum")
    near(loss, torch.tensor(1e-12), 1e-5)
    near(torch.autograd.grad(loss, x)[0], g / 3, 1e-5)
    # Huber: sqrt(e^2 + c^2) - c of e far below c, e^2 / 2 c
    loss = matching.tdm_loss(x, x.detach() - 1, x.detach() - 1 + 2**-10, c=100.0)  # of floats, exactly
    near(loss, torch.tensor(2**-20 / 200), 1e-5)


PATHS = {TrigFlow(0.5): (0.4, 1.3), RectifiedFlow(): (0.3, 0.8), EDM(0.5): (0.7, 3.0)}


def at(*numbers):
    return [torch.tensor(x, dtype=F64) for x in numbers]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("target", ["x", "eps", "v", "F", "score"])
def test_phased_target_is_unbiased(path, target):
    # what is linear in Gaussians is known by its covariance with x_t, which three nodes integrate exactly
    s, t = at(*PATHS[path])
    x_0, before, noise, weights = grid(3, 3, 3)
    x_s = path.add_noise(1.3 * x_0, before, s)
    x_t, found = critics.phased_noise(x_s, noise, s, t, path, target)
    whole = path.add_noise(1.3 * x_0, noise, t)
    want = path.convert(1.3 * x_0, whole, t, "x", target)
    near((weights * x_t**2).sum(), (weights * whole**2).sum())
    near((weights * found * x_t).sum(), (weights * want * whole).sum())
    if target == "v" and isinstance(path, RectifiedFlow):
        naive = (weights * (noise - x_s) * x_t).sum()
        assert abs(naive - (weights * want * whole).sum()) > 0.05
        a, b = 0.2 / 0.7, math.sqrt(0.8**2 - (0.2 / 0.7 * 0.3) ** 2)
        near(x_t, a * x_s + b * noise)
        near(found, (0.7**2 * 0.8 + 0.2 * 0.3**2) / (0.7**2 * b) * noise - x_s / 0.7)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_phased_noise_from_data_and_to_the_end(path):
    x, noise = latents("x", "noise").values()
    s, t = at(0.0, PATHS[path][1])
    x_t, v = critics.phased_noise(x, noise, s, t, path)
    near(x_t, path.add_noise(x, noise, t))
    near(v, path.velocity(x, noise, t))
    if path.last < math.inf:
        x_t, v = critics.phased_noise(x, noise, *at(PATHS[path][0], path.last), path)
        near(x_t, path.add_noise(x, noise, torch.tensor(path.last, dtype=F64)))
        assert v.isfinite().all()
    short = critics.phased_noise(x.bfloat16(), noise, s, t, path)
    assert all(y.dtype == torch.bfloat16 for y in short)


def test_phased_dmd_learns_through_x_t():
    x_s, noise, real, fake = latents("x_s", "noise", "real", "fake").values()
    s, t = number(0.3), number(0.8)
    x_t, target = critics.phased_noise(x_s.requires_grad_(), noise.requires_grad_(), s, t, RectifiedFlow())
    assert not target.requires_grad
    assert torch.autograd.grad(x_t.sum(), (noise, s, t), retain_graph=True, allow_unused=True) == (None, None, None)
    loss = matching.dmd_loss(x_t, real, fake, normalize=False, reduction="sum")
    near(torch.autograd.grad(loss, x_s)[0], 0.2 / 0.7 * (fake - real) / x_s[0].numel())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4, 1, 1)], ids=str)
def test_phased_noise_at_times_of_any_shape(shape):
    x, noise = latents("x", "noise").values()
    s, t = torch.tensor(0.2, dtype=F64), torch.tensor(0.7, dtype=F64)
    want = critics.phased_noise(x, noise, s.expand(4), t.expand(4), RectifiedFlow())
    for given in ((s.expand(shape), t), (s, t.expand(shape))):
        near(critics.phased_noise(x, noise, *given, RectifiedFlow()), want)


def test_tdm_weights_at_the_ends():
    """All signal: a ratio of densities that underflows to 0; pure noise: no signal, also where pi / 2 is of float32."""
    sample, noise = latents("sample", "noise", n=2).values()
    for path, last in ((TrigFlow(), torch.pi / 2), (RectifiedFlow(), 1.0)):
        for dtype in (torch.float32, F64):
            t = torch.tensor([1e-4, last], dtype=dtype)
            x_t = path.add_noise(sample + 1, noise, t)
            found = critics.tdm_weights(x_t, sample, noise, t, path)
            assert found.isfinite().all() and found[0] == 0 and 0 <= found[1] < 1e-13


def test_tdm_weights():
    sample, state, noise = latents("sample", "state", "noise").values()
    t = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=F64)
    path = RectifiedFlow()
    x_t = path.add_noise(state, noise, t)
    found = critics.tdm_weights(x_t.requires_grad_(), sample, noise.flip(0), t, path)
    for i in range(4):
        a, b = 1 - t[i], t[i]
        mix, eps = (x_t[i] - a * sample[i]) / b, noise[3 - i]
        density = [(-0.5 * y.square().mean()).exp() for y in (mix, eps)]
        near(found[i], (density[0] / density[1] * min((a / b) ** 2, torch.tensor(5.0))).detach())
    assert not critics.tdm_weights(x_t, sample, noise, number(0.5), path).requires_grad
    assert not found.requires_grad
    assert critics.tdm_weights(x_t.float(), sample.float(), noise.float(), t, path).dtype == torch.float32


def test_density_ratio():
    logits = torch.tensor([[1.0, 2.0], [50.0, 60.0], [-3.0, -9.0], [0.0, 0.5]], dtype=F64, requires_grad=True)
    near(critics.density_ratio(logits), torch.tensor([math.exp(1.5), 20.0, 0.1, math.exp(0.25)], dtype=F64))
    near(critics.density_ratio(logits, 1e-9, 1e9)[1:3].log(), torch.tensor([10.0, -6.0], dtype=F64))
    assert critics.density_ratio(logits.bfloat16()).dtype == torch.float32
    assert not critics.density_ratio(logits).requires_grad
    for bad in (math.inf, -math.inf, math.nan):
        assert critics.density_ratio(torch.tensor([[0.0, bad], [0.0, 1.0]])).isfinite().tolist() == [False, True]


def test_ratio_by_time():
    r = torch.tensor([1.0, 3.0, 4.0, float("nan"), 8.0], dtype=F64)
    share, means = torch.tensor([0.05, 0.0, 0.55, 0.52, 1.0], dtype=F64), torch.full((10,), 2.0, dtype=F64)
    found, new = critics.ratio_by_time(r, share, means, rate=0.25)
    want = torch.full((10,), 2.0, dtype=F64)
    want[0], want[5], want[9] = 0.5 + 0.75 * 2, 0.5 + 0.75 * 4, 0.5 + 0.75 * 8
    near(new, want)
    near(found[[0, 1, 2, 4]], r[[0, 1, 2, 4]] / (want[[0, 0, 5, 9]] + 1e-6))
    assert found[3].isnan() and (means == 2).all()
    near(critics.ratio_by_time(r[:2], share[:2], means)[1][:2], torch.tensor([2.0, 2.0], dtype=F64))
    ends = torch.tensor([math.inf, -math.inf, math.nan], dtype=F64)  # are in the last bin and the first
    assert critics.ratio_by_time(r[:3], ends, means)[1][[0, -1]].tolist() == [3.5, 1.0]


def test_weights_of_divergences():
    r = torch.tensor([0.1, 0.5, 2.0, float("nan"), 20.0], dtype=F64, requires_grad=True)
    good = [0, 1, 2, 4]
    for name in DIVERGENCES:
        plain = critics.f_distill_weights(r, name, normalize=False)
        found = critics.f_distill_weights(r, name)
        near(found[good], plain[good] / (plain[good].mean() + 1e-6))
        assert not found.requires_grad
    assert torch.equal(critics.f_distill_weights(r[good]), critics.f_distill_weights(r[good], "jensen_shannon"))
    near(critics.uni_instruct_weights(r)[good], r.detach()[good])
    assert not critics.uni_instruct_weights(r).requires_grad
    near(critics.uni_instruct_weights(r, "jeffreys")[good], 0.4 * r.detach()[good] + 0.6)


RATIO, SHARE = torch.tensor([1.0, 3.0, 4.0, 8.0], dtype=F64), torch.tensor([0.05, 0.95, 0.0, 0.52], dtype=F64)


def half(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mine, world = slice(2 * rank, 2 * rank + 2), dist.group.WORLD
    found, means = critics.ratio_by_time(RATIO[mine], SHARE[mine], torch.ones(10, dtype=F64), rate=0.5, group=world)
    torch.save((found, means, critics.f_distill_weights(RATIO[mine], group=world)), folder / str(rank))
    dist.destroy_process_group()


@pytest.mark.slow
def test_means_over_processes(tmp_path):
    mp.spawn(half, (tmp_path,), nprocs=2)
    (first, means, h), (second, also, g) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    whole, want = critics.ratio_by_time(RATIO, SHARE, torch.ones(10, dtype=F64), rate=0.5)
    near(torch.cat((first, second)), whole)
    near(torch.stack((means, also)), torch.stack((want, want)))
    near(torch.cat((h, g)), critics.f_distill_weights(RATIO))


def test_a_sample_without_a_ratio_is_left_out_alone():
    x = latents("sample", "real", "fake")
    logits = torch.tensor([[0.5], [float("nan")], [-1.0], [2.0]], dtype=F64)
    weights = critics.f_distill_weights(critics.density_ratio(logits))
    loss, masked = matching.dmd_loss(**x, weights=weights, on_nan="mask")
    assert loss.isfinite() and masked == 1


def test_generator_gan_loss():
    y = latents("y")["y"].requires_grad_()
    w = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=F64)
    want = w * torch.log(1 + (-y).exp()).mean((1, 2))
    found = critics.generator_gan_loss(y, weights=w, reduction="none")
    near(found, want)
    near(*(torch.autograd.grad(z.sum(), y)[0] for z in (found, want)))
    limited = critics.generator_gan_loss(y, limit=0.3, reduction="none")
    near(limited, torch.log(1 + (-y.clamp(-0.3, 0.3)).exp()).mean((1, 2)))
    assert not torch.autograd.grad(limited.sum(), y)[0][y.abs() > 0.3].any()
    for limit in (None, 10.0):
        with pytest.raises(FloatingPointError, match="1 of 4"):
            critics.generator_gan_loss(torch.where(y == y.max(), math.inf, y), limit=limit)
    far = critics.generator_gan_loss(torch.full((2, 3), 80.0))  # e^-80 is a float32
    near(far, torch.tensor(math.exp(-80.0)), 1e-5)


def test_balanced_gradient_is_the_shortest_between():
    cond, uncond = latents("cond", "uncond").values()
    cond[1], cond[2] = 1.001 * uncond[1], 1.5 * uncond[2]  # c shorter than d and along it; d shorter
    for scale in (0.018, 0.7):
        found = matching.balanced_gradient(cond, uncond, scale)
        c, d = cond - uncond, scale * uncond
        for i in range(4):
            line = torch.linspace(0, 1, 1001, dtype=F64).view(-1, 1, 1)
            shortest = (line * c[i] + (1 - line) * d[i]).square().sum((1, 2)).min()
            assert found[i].square().sum() <= shortest * (1 + 1e-12)
            a = (((d[i] - c[i]) * d[i]).sum() / (d[i] - c[i]).square().sum()).clamp(0, 1)
            near(found[i], a * c[i] + (1 - a) * d[i])
            assert (found[i] * c[i]).sum() >= 0 and (found[i] * d[i]).sum() >= 0
    same = matching.balanced_gradient(1.018 * uncond, uncond)
    near(same, 0.018 * uncond, 1e-6)
    near(matching.balanced_gradient(2 * uncond, uncond, 1.0), uncond)  # where c is d to the bit
    assert not matching.balanced_gradient(0 * cond, 0 * cond).any()
    assert not matching.balanced_gradient(cond.requires_grad_(), uncond.requires_grad_()).requires_grad


def test_random_scales():
    like = torch.zeros(1000, 2, 3)
    k = matching.random_scales(like, 0.5, 4.0, generator=seeded())
    assert k.shape == (1000, 1, 1) and k.dtype == like.dtype
    assert 0.5 <= k.min() < 0.55 and 3.95 < k.max() <= 4 and abs(k.mean() - 2.25) < 0.1
    assert torch.equal(k, matching.random_scales(like, 0.5, 4.0, generator=seeded()))


X, T, PATH = torch.ones(2, 3), torch.tensor([0.5, 0.6]), RectifiedFlow()
BAD = {
    "floor": (lambda: matching.dmd_loss(X, X, X, floor=0.0), ValueError, "floor must be finite and above 0"),
    "weights": (lambda: matching.dmd_loss(X, X, X, weights=math.nan), ValueError, "weights must be finite"),
    "weights of three": (lambda: matching.dmd_loss(X, X, X, weights=torch.ones(3)), ValueError, "must have shape"),
    "TDM c": (lambda: matching.tdm_loss(X, X, X, c=0.0), ValueError, "c must be finite and above 0"),
    "TDM floor": (lambda: matching.tdm_loss(X, X, X, floor=0.0), ValueError, "floor must be finite and above 0"),
    "over": (lambda: matching.tdm_loss(X, X, X, over="batch"), ValueError, "over must be one of"),
    "alpha": (lambda: matching.sid_loss(X, X, X, alpha=math.inf), ValueError, "alpha must be finite"),
    "SiD floor": (lambda: matching.sid_loss(X, X, X, floor=0.0), ValueError, "floor must be finite and above 0"),
    "SIM c": (lambda: matching.sim_loss(X, X, X, c=0.0), ValueError, "c must be finite and above 0"),
    "SIM without c": (lambda: matching.sim_loss(X, X, X), TypeError, "'c'"),
    "penalty": (lambda: critics.discriminator_gan_loss(X, X, penalty=math.inf), ValueError, "penalty must be finite"),
    "limit": (lambda: critics.generator_gan_loss(X, limit=0.0), ValueError, "limit must be finite and above 0"),
    "logits": (lambda: critics.generator_gan_loss(X.long()), TypeError, "fake must be float32"),
    "balanced shape": (lambda: matching.balanced_gradient(X, X[:1]), ValueError, "unconditional must have shape"),
    "balanced device": (lambda: matching.balanced_gradient(X, X.to("meta")), ValueError, "on one device"),
    "balanced scale": (lambda: matching.balanced_gradient(X, X, math.nan), ValueError, "scale must be finite"),
    "scales": (lambda: matching.random_scales(X, 2.0, 1.0), ValueError, "high must be at least low, 2, got 1"),
    "low": (lambda: matching.random_scales(X, -math.inf, 1.0), ValueError, "low must be finite"),
    "phased target": (lambda: critics.phased_noise(X, X, T / 2, T, PATH, "u"), ValueError, "target must be one of"),
    "phased path": (lambda: critics.phased_noise(X, X, T / 2, T, "rf"), TypeError, "path must be a .*, got str"),
    "phased s": (lambda: critics.phased_noise(X, X, T - 1, T, PATH), ValueError, "s must be a time from 0 to 1, got -"),
    "phased t": (lambda: critics.phased_noise(X, X, T, T + 1, PATH), ValueError, "t must be a time from 0 to 1"),
    "phased order": (
        lambda: critics.phased_noise(X, X, T, T[:1], PATH),
        ValueError,
        r"after s, got 0.5 at index \[0\]",
    ),
    "phased last": (lambda: critics.phased_noise(X, X, T - 0.2, T[:1] - 0.1, PATH), ValueError, r"at index \[1\]"),
    "phased ints": (lambda: critics.phased_noise(X, X, T.long(), T, PATH), TypeError, "s must be float32"),
    "phased shape": (lambda: critics.phased_noise(X, X[:1], T / 2, T, PATH), ValueError, "noise must have shape"),
    "phased device": (lambda: critics.phased_noise(X, X, T / 2, T.to("meta"), PATH), ValueError, "on one device"),
    "TDM path": (lambda: critics.tdm_weights(X, X, X, T, None), TypeError, "path must be a"),
    "TDM t": (lambda: critics.tdm_weights(X, X, X, T + 1, PATH), ValueError, "t must be a time from 0 to 1"),
    "TDM ints": (lambda: critics.tdm_weights(X, X, X, T.long(), PATH), TypeError, "t must be float32"),
    "TDM device": (lambda: critics.tdm_weights(X, X, X.to("meta"), T, PATH), ValueError, "on one device"),
    "TDM most": (lambda: critics.tdm_weights(X, X, X, T, PATH, 0.0), ValueError, "most must be finite and above 0"),
    "low ratio": (lambda: critics.density_ratio(X, 0.0), ValueError, "low must be finite and above 0"),
    "high ratio": (lambda: critics.density_ratio(X, 3.0, 2.0), ValueError, "high must be finite and above 3"),
    "rate": (lambda: critics.ratio_by_time(T, T, T, rate=1.5), ValueError, "rate must be from 0 to 1"),
    "means": (lambda: critics.ratio_by_time(T, T, T[None]), ValueError, "means must have one dimension"),
    "means device": (lambda: critics.ratio_by_time(T, T, T.to("meta")), ValueError, "on one device"),
    "means ints": (lambda: critics.ratio_by_time(T, T, T.long()), TypeError, "means must be float32"),
    "share": (lambda: critics.ratio_by_time(T, T[:1], T), ValueError, "share must have shape"),
    "divergence": (lambda: critics.f_distill_weights(T, "chi"), ValueError, "divergence must be one of"),
    "f-distill ratio": (lambda: critics.f_distill_weights(T[None]), ValueError, "ratio must have one dimension"),
    "Uni-Instruct": (lambda: critics.uni_instruct_weights(T, "reverse_kl"), ValueError, "divergence must be one of"),
    "Uni-Instruct ratio": (lambda: critics.uni_instruct_weights(T[None]), ValueError, "ratio must have one dimension"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
