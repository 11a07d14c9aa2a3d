"""Schulman's estimators: values and gradients by enumeration over a vocabulary, numerics, transforms, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from device import HERE, seeded

import fastkd
from fastkd import Head
from fastkd.estimators import k1, k2, k3

ALL = pytest.mark.parametrize("k", [k1, k2, k3], ids=lambda k: k.__name__)
V = 11  # small enough to enumerate


def logits(seed, scale=1.5):
    g = seeded(seed)
    return tuple(torch.randn(V, generator=g, dtype=torch.float64) * scale for _ in range(2))


def log_ratios(q_logits, p_logits):
    log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
    return log_q, log_p, (log_p - log_q)


def expected(k, log_q, log_p):
    """E_q[k] with the sampling held fixed: the mean over infinitely many samples, and what autograd makes of it."""
    return (log_q.detach().exp() * k(log_q, log_p)).sum()


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum()


# --- values ---


@pytest.mark.parametrize("k", [k1, k3])
def test_k1_and_k3_are_unbiased(k, seed):
    log_q, log_p, _ = log_ratios(*logits(seed))
    torch.testing.assert_close(expected(k, log_q, log_p), kl(log_q, log_p), rtol=1e-12, atol=0)


def test_k2_is_biased_by_the_terms_from_the_third_order_on(seed):
    log_q, log_p, x = log_ratios(*logits(seed))
    bias = -(log_q.exp() * (x.exp() - 1 - x - x.square() / 2)).sum()
    assert abs(bias) > 0.1
    torch.testing.assert_close(expected(k2, log_q, log_p), kl(log_q, log_p) + bias, rtol=1e-11, atol=0)


def test_k3_misses_the_teachers_mass_that_the_student_cannot_sample(seed):
    q, p = logits(seed)
    q[0] = -torch.inf
    log_q, log_p, _ = log_ratios(q, p)
    value = (log_q.exp() * k3(log_q, log_p))[1:].sum()
    torch.testing.assert_close(value, kl(log_q[1:], log_p[1:]) - log_p[0].exp(), rtol=1e-12, atol=0)


def test_the_variance_of_k3_is_low_where_the_two_are_close(seed):
    """To second order k1 has the variance 2 KL, k2 and k3 of order KL^2."""
    q, step = logits(seed)
    log_q, log_p, _ = log_ratios(q, q + 0.01 * step)
    value = kl(log_q, log_p).item()

    def variance(k):
        return (log_q.exp() * (k(log_q, log_p) - expected(k, log_q, log_p)).square()).sum().item()

    assert variance(k1) == pytest.approx(2 * value, rel=0.1)
    assert variance(k2) < 20 * value**2 and variance(k3) < 20 * value**2


# --- gradients to the student, as the docstring states them ---


def gradient(f, leaf):
    [g] = torch.autograd.grad(f, leaf)
    return g


def gradient_of(f, q, p, leaf):
    log_q, log_p, _ = log_ratios(q, p)
    return gradient(f(log_q, log_p), leaf)


@pytest.mark.parametrize(
    "k, truth",
    [
        (k1, lambda log_q, log_p: 0 * log_q.sum()),
        (k2, lambda log_q, log_p: kl(log_q, log_p)),
        (k3, lambda log_q, log_p: kl(log_p, log_q)),
    ],
    ids=["k1 nothing", "k2 reverse KL", "k3 forward KL"],
)
def test_expected_gradient_to_the_student(k, truth, seed):
    q, p = logits(seed)
    q.requires_grad_()
    got = gradient_of(lambda *logs: expected(k, *logs), q, p, q)
    torch.testing.assert_close(got, gradient_of(truth, q, p, q), rtol=1e-11, atol=1e-14)
    assert k is k2 or (got - gradient_of(kl, q, p, q)).norm() > 0.1  # reverse KL's is another one


@ALL
def test_expected_gradient_to_the_teacher(k, seed):
    """The sampling does not depend on the teacher: the gradient of the mean is the mean of the gradient."""
    q, p = logits(seed)
    p.requires_grad_()

    def truth(log_q, log_p):
        return (log_q.exp() * (log_p - log_q).square()).sum() / 2 if k is k2 else kl(log_q, log_p)

    got = gradient_of(lambda *logs: expected(k, *logs), q, p, p)
    torch.testing.assert_close(got, gradient_of(truth, q, p, p), rtol=1e-11, atol=1e-14)


def test_k1_as_a_reward_has_the_gradient_of_k2(seed):
    q, p = (x.requires_grad_() for x in logits(seed))
    reward = k1(q, p).detach() * q
    torch.testing.assert_close(gradient(reward.sum(), q), gradient(k2(q, p).sum(), q), rtol=0, atol=0)


def test_sampled_from_heads_as_the_docstring_says(seed):
    g = seeded(seed)
    student, teacher = (Head(torch.randn(5, 8, generator=g), torch.randn(17, 8, generator=g) * 0.4) for _ in range(2))
    q, p = (F.log_softmax(s.hidden @ s.weight.T, -1) for s in (student, teacher))
    ids = torch.multinomial(q.exp(), 40_000, replacement=True, generator=g)
    log_q, log_p = fastkd.selected_log_probs(student, ids), fastkd.selected_log_probs(teacher, ids)
    truth = (q.exp() * (q - p)).sum(-1)
    for k in (k1, k3):
        samples = k(log_q, log_p)
        assert ((samples.mean(-1) - truth).abs() < 5 * samples.std(-1) / 200).all()  # 200: the root of their number
    reverse = fastkd.kd_loss(student, teacher, "reverse_kl", reduction="none")
    torch.testing.assert_close(k1(log_q, log_p).mean(-1), reverse, rtol=0.1, atol=0.01)


# --- numerics ---


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 4e-6), (torch.float64, 1e-14)])
def test_k3_is_accurate_and_never_negative(dtype, tolerance):
    """Against 50 digits: log r from 1e-18, over the seam at 0.1, up to 80."""
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    sizes = [10.0**e for e in range(-18, 2)] + [0.0999, 0.1, 0.1001, 0.3, 1.7, 80.0]
    x = torch.tensor([sign * s for s in sizes for sign in (1, -1)], dtype=dtype)
    exact = [(Decimal(v).exp() - 1 - Decimal(v)) for v in x.tolist()]
    got = k3(torch.zeros_like(x), x)
    assert (got >= 0).all()
    for value, truth in zip(got.tolist(), exact):
        assert value == pytest.approx(float(truth), rel=tolerance, abs=1e-44)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 4e-6), (torch.float64, 4e-14)])
def test_gradient_of_k3_is_accurate(dtype, tolerance):
    x = torch.tensor([s * v for v in (1e-12, 1e-6, 1e-3, 0.0999, 0.1, 0.1001, 0.5, 3.0) for s in (1, -1)], dtype=dtype)
    log_q = torch.zeros_like(x).requires_grad_()
    got = gradient(k3(log_q, x).sum(), log_q)
    torch.testing.assert_close(got, -x.expm1(), rtol=tolerance, atol=0)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(k, dtype, seed):
    log_q, log_p, _ = log_ratios(*logits(seed))
    log_q, log_p = log_q.to(dtype), log_p.to(dtype).requires_grad_()
    got = k(log_q, log_p)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), k(log_q.double(), log_p.double()), rtol=1e-6, atol=1e-7)
    assert gradient(got.sum(), log_p).dtype == dtype


@ALL
def test_float64_is_kept_also_beside_float32(k, seed):
    log_q, log_p, _ = log_ratios(*logits(seed))
    assert k(log_q, log_p).dtype == k(log_q.float(), log_p).dtype == torch.float64
    assert k(log_q.float(), log_p.float()).dtype == torch.float32


NO_MASS = {  # (student, teacher) -> k1, k2, k3
    (-1.0, -math.inf): (math.inf, math.inf, math.inf),
    (-math.inf, -1.0): (-math.inf, math.inf, math.inf),
    (-math.inf, -math.inf): (math.nan, math.nan, math.nan),
    (-200.0, -1.0): (-199.0, 199.0**2 / 2, math.inf),  # e^199 is beyond float32
    (-1.0, -200.0): (199.0, 199.0**2 / 2, 198.0),
    (-1.0, -1.0): (0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("pair", NO_MASS)
def test_extremes(pair):
    q, p = torch.tensor(pair).unbind()
    got = [k(q, p).item() for k in (k1, k2, k3)]
    assert got == pytest.approx(NO_MASS[pair], nan_ok=True)


@ALL
def test_no_mass_at_one_token_leaves_the_others_gradients_alone(k):
    """A branch that is not taken must not send NaN back."""
    log_q = torch.tensor([-1.0, -2.0, -3.0, -1.5], requires_grad=True)
    log_p = torch.tensor([-torch.inf, -2.0, -3.0 + 1e-3, -0.5])
    got = gradient(k(log_q, log_p).sum(), log_q)
    wanted = {k1: [1, 1, 1, 1], k2: [math.inf, 0, -1e-3, -1], k3: [1, 0, -math.expm1(1e-3), -math.expm1(1)]}[k]
    assert got.tolist() == pytest.approx(wanted, rel=1e-3)


@ALL
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_shapes(k, shape):
    assert k(torch.zeros(shape), torch.zeros(shape)).shape == shape


@ALL
def test_inputs_are_left_as_they_were(k, seed):
    log_q, log_p, _ = log_ratios(*logits(seed))
    before = log_q.clone(), log_p.clone()
    k(log_q, log_p)
    assert torch.equal(log_q, before[0]) and torch.equal(log_p, before[1])


# --- derivatives and transforms ---


@pytest.mark.real
@ALL
def test_gradcheck(k, seed):
    inputs = tuple(x.requires_grad_() for x in logits(seed))
    close = inputs[0].detach() + 0.01 * torch.randn(V, dtype=torch.float64)  # the series of k3
    for pair in (inputs, (inputs[0], close.requires_grad_())):
        assert torch.autograd.gradcheck(k, pair, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(k, pair)


@pytest.mark.real
@ALL
def test_transforms(k, seed):
    log_q, log_p, _ = log_ratios(*logits(seed))
    leaf = log_q.clone().requires_grad_()
    wanted = gradient(k(leaf, log_p).sum(), leaf)
    alone = torch.func.vmap(torch.func.grad(k))(log_q, log_p)  # one token at a time
    torch.testing.assert_close(alone, wanted, rtol=0, atol=0)
    value, tangent = torch.func.jvp(k, (log_q, log_p), (torch.ones_like(log_q), torch.zeros_like(log_p)))
    torch.testing.assert_close(value, k(log_q, log_p), rtol=0, atol=0)
    torch.testing.assert_close(tangent, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.real
@ALL
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(k, dynamic, seed):
    compiled = torch.compile(k, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    log_q, log_p, _ = log_ratios(*logits(seed))
    leaf = log_q.clone().requires_grad_()
    torch.testing.assert_close(compiled(leaf, log_p), k(leaf, log_p), rtol=0, atol=0)
    wanted = gradient(k(leaf, log_p).sum(), leaf)
    torch.testing.assert_close(gradient(compiled(leaf, log_p).sum(), leaf), wanted, rtol=1e-12, atol=1e-15)


# --- errors ---


@ALL
@pytest.mark.parametrize(
    "student, teacher, error, message",
    [
        ([0.0], torch.zeros(1), TypeError, "student_log_probs must be a tensor, got list"),
        (torch.zeros(1), 0.0, TypeError, "teacher_log_probs must be a tensor, got float"),
        (torch.zeros(1, dtype=torch.int64), torch.zeros(1), TypeError, "student_log_probs must be float32.*int64"),
        (
            torch.zeros(2, 3),
            torch.zeros(3),
            ValueError,
            r"teacher_log_probs must have shape \[2, 3\], that of student_log_probs, got \[3\]",
        ),
        (torch.zeros(2), torch.zeros(2, device="meta"), ValueError, f"one device.*_log_probs on {HERE}.*on meta"),
    ],
    ids=["list", "number", "integers", "shape", "device"],
)
def test_errors(k, student, teacher, error, message):
    with pytest.raises(error, match=message):
        k(student, teacher)
