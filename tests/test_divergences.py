"""Every divergence, pointwise: h is phi's derivative, the roles exchange, the tables agree, -inf has its limit."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXTENSION
from formulas import FORMULAS

import fastkd
from fastkd import divergences as D

SINGLE = {name: d for name, (d, _) in FORMULAS.items() if not isinstance(d, D.WeightedSum)}
singles = pytest.mark.parametrize("divergence", SINGLE.values(), ids=SINGLE.keys())
INF = math.inf


def pair(n=257):
    """Log-probabilities that vary by many orders of magnitude, float64."""
    return torch.randn(2, n, dtype=torch.float64).mul(4).log_softmax(-1)


@singles
def test_h_is_the_derivative_of_phi(divergence):
    log_p, log_q = pair()
    log_q.requires_grad_()
    (slope,) = torch.autograd.grad(divergence.phi(log_p, log_q).sum(), log_q)
    torch.testing.assert_close(divergence.h(log_p, log_q), slope, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
def test_phi_sums_to_the_formula(name):
    divergence, term = FORMULAS[name]
    log_p, log_q = pair()
    expected = term(log_p.exp(), log_q.exp()).sum()
    torch.testing.assert_close(divergence.phi(log_p, log_q).sum(), expected, rtol=1e-9, atol=1e-12)


@singles
def test_exchanged(divergence):
    """The same value with the roles exchanged; and exchanging twice is nothing."""
    log_p, log_q = pair()
    torch.testing.assert_close(
        divergence.exchanged.phi(log_q, log_p), divergence.phi(log_p, log_q), rtol=1e-9, atol=1e-14
    )
    again = divergence.exchanged.exchanged
    assert type(again) is type(divergence) and again.params == pytest.approx(divergence.params)


@singles
def test_nonnegative_where_it_says_so_and_zero_for_equals(divergence):
    log_p, log_q = pair()
    value = divergence.phi(log_p, log_q).sum()
    if divergence.rows_nonnegative:
        assert value > 0
    if "cross" not in divergence.name:
        scale = 1e-12 * (1 + divergence.phi(log_p, log_q).abs().sum() + divergence.h(log_p, log_q).abs().sum())
        assert divergence.phi(log_p, log_p).sum().abs() < scale
        h = divergence.h(log_p, log_p)
        assert (h - log_p.exp() * h.sum()).abs().max() < scale  # no gradient to the logits


def test_special_cases_of_alpha_beta():
    log_p, log_q = pair()
    p, q = log_p.exp(), log_q.exp()
    for (a, b), expected in {
        (1, 1): ((p - q) ** 2).sum() / 2,
        (0.5, 0.5): 4 * D.SquaredHellinger().phi(log_p, log_q).sum(),
        (2, -1): D.ChiSquare().phi(log_p, log_q).sum() / 2,
        (-1, 2): D.NeymanChiSquare().phi(log_p, log_q).sum() / 2,
    }.items():
        torch.testing.assert_close(D.AlphaBeta(a, b).phi(log_p, log_q).sum(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", [1e-4, 1 - 1e-4])
def test_limits_of_jensen_shannon(at):
    """beta -> 0 is forward KL and beta -> 1 reverse KL, up to the factor that vanishes."""
    log_p, log_q = pair() / 4
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    limit = D.ForwardKL() if at < 0.5 else D.ReverseKL()
    value = D.JensenShannon(at).phi(log_p, log_q).sum() / min(at, 1 - at)
    torch.testing.assert_close(value, limit.phi(log_p, log_q).sum(), rtol=5e-3, atol=0)


# ---- the tables ----


def test_the_tables_have_the_same_entries():
    assert EXTENSION is not None
    assert dict(EXTENSION.KINDS) == {name: i for i, name in enumerate(EXTENSION.KINDS)}
    assert set(EXTENSION.KINDS) == set(D.REGISTRY)
    assert all(cls.name == name for name, cls in D.REGISTRY.items())
    named = {getattr(D, n) for n in D.__all__ if isinstance(getattr(D, n), type)}
    assert set(D.REGISTRY.values()) == named - {D.Divergence, D.WeightedSum}


def test_the_triton_table():
    """Interpreted, in a process of its own: the interpreter is chosen before triton is imported."""
    script = Path(__file__).with_name("triton_pointwise.py")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(D.REGISTRY)} divergences agree" in result.stdout


def test_get():
    assert D.get("jensen_shannon") == D.JensenShannon(0.5)
    assert D.get(D.SkewKL(0.3)) == D.SkewKL(0.3)


# ---- support ----

# where q = 0 < p, and where p = 0 < q: what a row with such an outcome costs
LIMITS = {
    "forward_kl": (INF, 0.0),
    "reverse_kl": (0.0, INF),
    "jensen_shannon": (-0.5 * 0.3 * math.log(0.5), -0.5 * 0.3 * math.log(0.5)),
    "skew_kl": (-0.3 * math.log(0.1), 0.0),
    "skew_kl(0.7)": (-0.3 * math.log(0.7), 0.0),
    "skew_reverse_kl": (0.0, -0.3 * math.log(0.1)),
    "total_variation": (0.15, 0.15),
    "squared_hellinger": (0.15, 0.15),
    "chi_square": (INF, 0.3),
    "neyman_chi_square": (0.3, INF),
    "cross_entropy": (INF, 0.0),
    "reverse_cross_entropy": (0.0, INF),
    "alpha_beta(0.5, 0.8)": (0.3**1.3 / (1.3 * 0.8), 0.3**1.3 / (1.3 * 0.5)),
    "alpha_beta(1.5, -0.5)": (INF, 0.3 / 1.5),
    "alpha_beta(-0.5, 1.5)": (0.3 / 1.5, INF),
}


@pytest.mark.parametrize("name", LIMITS)
def test_support(name):
    """log p = log 0.3 and log q = -inf, the other way round, and neither."""
    divergence, there, none = (
        SINGLE[name],
        torch.tensor([math.log(0.3)], dtype=torch.float64),
        torch.tensor([-INF]).double(),
    )
    assert divergence.phi(there, none).item() == pytest.approx(LIMITS[name][0], rel=1e-9, abs=1e-12)
    assert divergence.phi(none, there).item() == pytest.approx(LIMITS[name][1], rel=1e-9, abs=1e-12)


@singles
def test_an_outcome_that_neither_has_counts_nothing(divergence):
    none = torch.full((3,), -INF, dtype=torch.float64, requires_grad=True)
    phi = divergence.phi(none.detach(), none)
    assert not phi.any() and not divergence.h(none.detach(), none.detach()).any()
    (slope,) = torch.autograd.grad(phi.sum(), none)
    assert not slope.any()


# ---- sums ----


def test_sums_and_scalings_flatten():
    w = torch.rand(4)
    total = 0.5 * D.ForwardKL() + w * (D.ReverseKL() + 2 * D.SkewKL(0.2)) * 3
    (a, f), (b, r), (c, k) = total.terms
    assert (a, f, r, k) == (0.5, D.ForwardKL(), D.ReverseKL(), D.SkewKL(0.2))
    assert torch.equal(b, 3 * w) and torch.equal(c, 6 * w)
    log_p, log_q = (x.view(4, 64) for x in pair(256))
    expected = 0.5 * f.phi(log_p, log_q) + w[:, None] * (3 * r.phi(log_p, log_q) + 6 * k.phi(log_p, log_q))
    torch.testing.assert_close(total.phi(log_p, log_q), expected)
    expected = 0.5 * f.h(log_p, log_q) + w[:, None] * (3 * r.h(log_p, log_q) + 6 * k.h(log_p, log_q))
    torch.testing.assert_close(total.h(log_p, log_q), expected)


def test_numpy_and_tensor_scalars_scale_too():
    for two in (2, 2.0, np.float64(2), torch.tensor(2.0)):
        for total in (two * D.ForwardKL(), D.ForwardKL() * two):
            assert isinstance(total, D.WeightedSum) and float(total.terms[0][0]) == 2


def test_what_does_not_add():
    for bad in (lambda: D.ForwardKL() + 1, lambda: "2" * D.ForwardKL(), lambda: D.ForwardKL() * D.ReverseKL()):
        with pytest.raises(TypeError):
            bad()


@pytest.mark.cpu("the C++ backend")
def test_a_divergence_of_your_own():
    """register() makes it known by name; the torch backend computes it, the C++ one says that it cannot."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Overlap(D.Divergence):
        name = "test_overlap"

        def phi(self, log_p, log_q):
            return -(log_p + log_q).exp()

        def h(self, log_p, log_q):
            return -(log_p + log_q).exp()

    D.register(Overlap)
    try:
        x, y = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
        loss = fastkd.kd_loss(x, y, "test_overlap")
        expected = -(x.softmax(-1) * y.softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))
        with pytest.raises(ValueError, match=r"'cpu' cannot serve .*'test_overlap' has no entry in its table"):
            fastkd.kd_loss(x, y, "test_overlap", backend="cpu")
        with pytest.raises(ValueError, match="name of its own, got 'test_overlap'"):
            D.register(Overlap)
    finally:
        del D.REGISTRY["test_overlap"]


# ---- refusals ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: D.JensenShannon(0), r"beta .* between 0 and 1, got 0; for 0 use ForwardKL\(\), for 1 ReverseKL\(\)"),
        (lambda: D.JensenShannon(1.0), r"beta .* got 1.0"),
        (lambda: D.JensenShannon(-0.1), r"beta .* got -0.1"),
        (lambda: D.JensenShannon(math.nan), r"beta .* got nan"),
        (lambda: D.SkewKL(0), r"alpha .* got 0; for 0 use ForwardKL\(\)"),
        (lambda: D.SkewKL(1), r"alpha .* got 1"),
        (lambda: D.SkewReverseKL(0), r"alpha .* got 0; for 0 use ReverseKL\(\)"),
        (lambda: D.SkewReverseKL(1.5), r"alpha .* got 1.5"),
        (lambda: D.AlphaBeta(0, 1), r"not 0, got a=0, b=1"),
        (lambda: D.AlphaBeta(1, 0), r"not 0, got a=1, b=0"),
        (lambda: D.AlphaBeta(0.5, -0.5), r"a \+ b .* not 0, got a=0.5, b=-0.5"),
        (lambda: D.AlphaBeta(math.inf, 1), r"finite .* got a=inf"),
        (lambda: D.AlphaBeta(1, math.nan), r"finite .* b=nan"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
