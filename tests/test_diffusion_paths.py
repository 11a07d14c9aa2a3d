"""Parametrisations against what they are made of, towards either end of time; transfers; bad input."""

import math

import pytest
import torch

from fastkd.diffusion import paths
from fastkd.diffusion.paths import EDM, PREDICTIONS, RectifiedFlow, TrigFlow, transfer

END = math.pi / 2
# from the smallest times that are used to the last ones, inside
TIMES = {
    TrigFlow(0.5): (1e-6, 1e-3, 0.7, 1.2, 1.5, END - 1e-6),
    RectifiedFlow(): (1e-6, 1e-3, 0.3, 0.5, 0.99, 1 - 1e-6),
    EDM(0.5): (1e-6, 2e-3, 0.5, 10.0, 80.0, 1e4),
}
CASES = [(path, torch.tensor(times, dtype=torch.float64)) for path, times in TIMES.items()]
each = pytest.mark.parametrize(("path", "t"), CASES, ids=lambda x: type(x).__name__)


def drawn(t, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(len(t), 3, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2)]


def near(got, want, rtol):
    """Sample by sample, against the largest of the sample."""
    error, size = ((x.double()).abs().amax((1, 2)) for x in (got - want, want))
    assert (error <= rtol * size).all(), (error / size).tolist()


def literal(path, x_0, eps, t):
    """x_t and all predictions as the papers write them."""
    t = t.view(-1, 1, 1)
    if isinstance(path, TrigFlow):
        s = path.sigma_data
        x_t, v = t.cos() * x_0 + t.sin() * s * eps, t.cos() * s * eps - t.sin() * x_0
        return x_t, {"x": x_0, "eps": eps, "v": v, "F": v / s, "score": -eps / (s * t.sin())}
    if isinstance(path, RectifiedFlow):
        return (1 - t) * x_0 + t * eps, {"x": x_0, "eps": eps, "v": eps - x_0, "F": eps - x_0, "score": -eps / t}
    s, x_t = path.sigma_data, x_0 + t * eps
    skip, out = s**2 / (t**2 + s**2), t * s / (t**2 + s**2).sqrt()
    return x_t, {"x": x_0, "eps": eps, "v": eps, "F": (x_0 - skip * x_t) / out, "score": -eps / t}


@each
def test_every_conversion(path, t):
    x_0, eps = drawn(t)
    x_t, truth = literal(path, x_0, eps, t)
    near(path.add_noise(x_0, eps, t), x_t, 1e-12)
    near(path.velocity(x_0, eps, t), truth["v"], 1e-12)
    for source in PREDICTIONS:
        for target in PREDICTIONS:
            # each division by 1e-6 takes six digits
            near(path.convert(truth[source], x_t, t, source, target), truth[target], 1e-8)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conversions_round_once(path, t, dtype):
    """The result is that of the rounded inputs, to the rounding of the result."""
    x_0, eps = drawn(t, dtype)
    for f in (path.add_noise, path.velocity):
        got = f(x_0, eps, t)
        assert got.dtype == dtype and torch.equal(got, f(x_0.double(), eps.double(), t).to(dtype))
    x_0, eps = drawn(t)
    x_t, truth = (y.to(dtype) if not isinstance(y, dict) else y for y in literal(path, x_0, eps, t))
    for source in PREDICTIONS:
        y = truth[source].to(dtype)
        for target in PREDICTIONS:
            got = path.convert(y, x_t, t, source, target)
            want = path.convert(y.double(), x_t.double(), t, source, target)
            assert got.dtype == dtype and torch.equal(got, want.to(dtype))


def test_what_the_ends_know():
    """At t = 0 the velocity still gives data and noise, at the last time, too."""
    for path, last in ((TrigFlow(0.5), END), (RectifiedFlow(), 1.0)):
        t = torch.tensor([0.0, last], dtype=torch.float64)
        x_0, eps = drawn(t)
        x_t, v = path.add_noise(x_0, eps, t), path.velocity(x_0, eps, t)
        near(path.convert(v, x_t, t, "v", "x"), x_0, 1e-14)
        near(path.convert(v, x_t, t, "v", "eps"), eps, 1e-14)
        assert path.convert(v, x_t, t, "v", "score")[0].isinf().all()
        assert path.convert(eps, x_t, t, "eps", "score")[1].isfinite().all()
    zero = torch.zeros(1, dtype=torch.float64)
    x_0, eps = drawn(zero)
    assert torch.equal(EDM().convert(eps, x_0, zero, "F", "x"), x_0)  # c_skip 1, c_out 0


def test_the_last_time_in_float32_is_beyond_half_pi():
    t = torch.tensor([END])
    assert t.double().item() > END
    assert TrigFlow().add_noise(torch.ones(1, 2), torch.ones(1, 2), t).isfinite().all()


@each
@pytest.mark.parametrize("target", [TrigFlow(2.0), RectifiedFlow(), EDM()], ids=lambda x: type(x).__name__)
def test_transfer(path, t, target):
    x_0, eps = drawn(t)
    x_t, u = transfer(path.add_noise(x_0, eps, t), t, path, target)
    near(x_t, target.add_noise(x_0, eps, u), 1e-9)
    back, again = transfer(x_t, u, target, path)
    near(back, path.add_noise(x_0, eps, t), 1e-9)
    torch.testing.assert_close(again, t, rtol=1e-9, atol=1e-9)


def test_transfer_of_data():
    t = torch.zeros(1, dtype=torch.float64)
    x_0 = drawn(t)[0]
    for source in (TrigFlow(0.5), RectifiedFlow(), EDM()):
        for target in (TrigFlow(2.0), RectifiedFlow(), EDM()):
            x_t, u = transfer(x_0, t, source, target)
            assert torch.equal(x_t, x_0) and u == 0


def test_transfer_of_pure_noise():
    for path, last in ((TrigFlow(0.5), END), (RectifiedFlow(), 1.0)):
        t = torch.tensor([last], dtype=torch.float64)
        eps = drawn(t)[1]
        for target in (TrigFlow(2.0), RectifiedFlow()):
            x_t, u = transfer(path.add_noise(torch.zeros_like(eps), eps, t), t, path, target)
            near(x_t, target.add_noise(torch.zeros_like(eps), eps, u), 1e-12)


@pytest.mark.parametrize("s", [1.0, 0.5, 0.1])
def test_transfer_of_pure_noise_in_float32(s):
    """The time of the end, whose cosine is below 0, stays one of the target's."""
    t, eps = torch.tensor([END]), torch.randn(1, 3, 5)
    for target in (TrigFlow(0.3), RectifiedFlow()):
        x_t, u = transfer(s * eps, t, TrigFlow(s), target)
        near(x_t, target.add_noise(torch.zeros_like(eps), eps, u), 1e-6)
        assert u.dtype == torch.float32 and u.double() >= target.last
    assert transfer(s * eps, t, TrigFlow(s), EDM())[1].isinf()


def test_gradients_and_tangents_of_a_conversion():
    path, t = TrigFlow(0.5), torch.tensor([0.3, 1.1], dtype=torch.float64)
    x_0, eps = (x.requires_grad_() for x in drawn(t))
    for source in PREDICTIONS:
        for target in PREDICTIONS:
            f = lambda y, x: path.convert(y, x, t, source, target)  # noqa: E731, B023
            assert torch.autograd.gradcheck(f, (x_0, eps), check_forward_ad=True)
    _, tangent = torch.func.jvp(lambda u: path.add_noise(x_0, eps, u), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(tangent, path.velocity(x_0, eps, t))


@each
def test_samples_are_on_their_own(path, t):
    """In any order, number, layout and shape; nothing is written over; [] is a time of all."""
    x_0, eps = drawn(t)
    x_t, v = path.add_noise(x_0, eps, t), path.velocity(x_0, eps, t)

    def all_of(x_0, eps, x_t, v, t):
        found = [path.convert(v, x_t, t, "v", target) for target in PREDICTIONS]
        return [path.add_noise(x_0, eps, t), path.velocity(x_0, eps, t), *found, transfer(x_t, t, path, EDM())[0]]

    given = [x_0, eps, x_t, v, t]
    want, before = all_of(*given), [x.clone() for x in given]
    order = torch.tensor([4, 0, 5, 2])
    for change, back in (
        (lambda x: x[order], lambda y: y[order]),
        (lambda x: x[2:3], lambda y: y[2:3]),
        (lambda x: x[:0], lambda y: y[:0]),
        (lambda x: x.mT if x.dim() > 1 else x.view(-1, 1, 1), lambda y: y.mT),
        (lambda x: x.flatten(1)[:, 7] if x.dim() > 1 else x, lambda y: y.flatten(1)[:, 7]),
        (lambda x: x[3], lambda y: y[3]),
    ):
        for got, w in zip(all_of(*map(change, given)), want):
            assert torch.equal(got, back(w))
    assert all(map(torch.equal, given, before))
    one = torch.func.vmap(lambda *a: torch.stack(all_of(*(y[None] for y in a))))(*given)
    assert torch.equal(one[:, :, 0].transpose(0, 1), torch.stack(want))
    with torch.no_grad():
        assert not path.add_noise(x_0.requires_grad_(), eps, t).requires_grad


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("path", [TrigFlow(0.7), RectifiedFlow(), EDM(0.7)], ids=lambda x: type(x).__name__)
def test_a_gaussian(path, source):
    """Of N(m, w^2) score and E[x_0 | x_t] are known: each prediction says the other four."""
    m, w, t = 0.3, 2.0, torch.tensor([0.02, 0.4, 0.9], dtype=torch.float64)
    x = (drawn(t)[0] * 2).requires_grad_()
    r = path.rates(t, x)
    log_p = -0.5 * (x - r.alpha * m).square() / (r.alpha * w).square().add(r.sigma.square())
    score = torch.autograd.grad(log_p.sum(), x)[0]
    mean = (x + r.sigma.square() * score) / r.alpha  # Tweedie
    truth = {n: path.convert(score, x, t, "score", n) for n in PREDICTIONS}
    near(truth["x"], mean, 1e-10)
    near(truth["v"], r.d_alpha * mean - r.d_sigma * r.sigma * score, 1e-10)
    for target in PREDICTIONS:
        near(path.convert(truth[source], x, t, source, target), truth[target], 1e-10)


def test_compiled():
    path, t = TrigFlow(0.5), torch.tensor([0.3, 1.1])
    x_0, eps = drawn(t, torch.float32)
    for dynamic in (False, True):
        torch._dynamo.reset()
        f = torch.compile(
            lambda v, x, t: path.convert(v, x, t, "v", "x"), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        for some in (slice(2), slice(1, 2)):
            given = x_0[some], eps[some], t[some]
            assert torch.equal(f(*given), path.convert(*given, "v", "x"))


X, T = torch.zeros(3, 4), torch.tensor([0.1, 0.2, 0.3])
BAD = {
    "integer times": (lambda: TrigFlow().add_noise(X, X, torch.tensor([0, 1, 1])), TypeError, "t must be float32"),
    "times that are no tensor": (lambda: TrigFlow().add_noise(X, X, 0.3), TypeError, "t must be a tensor, got float"),
    "negative time": (lambda: TrigFlow().add_noise(X, X, -T), ValueError, "t must be a time from 0 to 1.5708"),
    "time beyond the end": (lambda: RectifiedFlow().add_noise(X, X, 4 * T), ValueError, "got 1.2000000476837158"),
    "time that is NaN": (lambda: EDM().add_noise(X, X, T * math.nan), ValueError, "t must be a time from 0 to inf"),
    "two times": (lambda: TrigFlow().add_noise(X, X, T[:2]), ValueError, r"t must have shape \[3\], one for each"),
    "a time for each entry": (lambda: TrigFlow().add_noise(X, X, X), ValueError, r"or \[\], got \[3, 4\]"),
    "another shape": (
        lambda: TrigFlow().add_noise(X, X[:, :2], T),
        ValueError,
        r"noise must have shape \[3, 4\]",
    ),
    "integers": (lambda: TrigFlow().convert(X.int(), X, T, "x", "v"), TypeError, "prediction must be float32"),
    "a scalar": (lambda: TrigFlow().add_noise(X[0, 0], X[0, 0], T), ValueError, r"x_0 must have shape \[B, ...\]"),
    "another device": (lambda: TrigFlow().add_noise(X, X, T.to("meta")), ValueError, "t on meta"),
    "unknown prediction": (lambda: TrigFlow().convert(X, X, T, "z", "x"), ValueError, "source must be one of"),
    "sigma_data 0": (lambda: EDM(0.0), ValueError, "sigma_data must be finite and above 0"),
    "sigma_data True": (lambda: TrigFlow(True), TypeError, "sigma_data must be a number, got bool"),
    "no path": (lambda: transfer(X, T, TrigFlow, EDM()), TypeError, "source must be a TrigFlow"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_the_public_names():
    assert set(paths.__all__) == {"EDM", "PREDICTIONS", "Path", "RectifiedFlow", "TrigFlow", "transfer"}
