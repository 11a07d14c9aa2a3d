"""Bugs that were found once, each by its smallest case."""

import pytest
import torch
import torch.nn.functional as F
from device import LOOKS

import fastkd
from fastkd import Head, Labels, divergences, targets
from fastkd.divergences import AlphaBeta, ForwardKL


class Subclass(torch.Tensor):
    pass


def heads(n=3, d=4, v=11):
    return [torch.randn(*shape) for shape in ((n, d), (v, d), (n, d), (v, d))]


@LOOKS
def test_indices_in_a_tensor_subclass_are_checked(backend):
    h, w, *_ = heads()
    ids = torch.full((3, 2), 10**9).as_subclass(Subclass)
    with pytest.raises(ValueError, match="ids must be in"):
        fastkd.selected_log_probs(Head(h, w.requires_grad_()), ids, backend=backend)
    with pytest.raises(ValueError, match=r"teacher\.ids must be in"):
        fastkd.kd_loss(Head(h, w), Labels(torch.tensor([-(10**12), 1, 2]).as_subclass(Subclass)), backend=backend)
    with pytest.raises(ValueError, match="temperature must be finite"):
        fastkd.token_stats(h, temperature=torch.full((3,), -1.0).as_subclass(Subclass), backend=backend)


@pytest.mark.cpu("the C++ backend")
def test_the_cpu_row_op_never_follows_a_bad_index():
    from fastkd import rows_cpu
    from fastkd.problem import Side

    with pytest.raises(IndexError, match=r"ids must be in \[0, 11\), got 0 to 11"):
        rows_cpu.select(torch.randn(2, 11), None, Side(), 11, torch.ones(2), torch.tensor([[0], [11]]), None)


def test_kl_div_of_subnormal_targets():
    t = torch.tensor([0.0, -1, -95, -2]).softmax(0)
    assert 0 < t[2] < torch.finfo(torch.float32).tiny
    x = torch.randn(4).log_softmax(0)
    torch.testing.assert_close(fastkd.kl_div(x, t, reduction="sum"), F.kl_div(x, t, reduction="sum"))


@pytest.mark.cpu("the C++ backend")
def test_results_stay_on_the_inputs_device_whatever_the_default():
    h, w, ht, wt = heads()
    with torch.device("meta"):
        assert fastkd.kl_div(h, h, reduction="sum").device.type == "cpu"
        for backend in ("cpu", "torch"):
            assert fastkd.kd_loss(Head(h, w), Head(ht, wt), backend=backend).isfinite()
            assert fastkd.token_stats(Head(h, w), backend=backend).lse.device.type == "cpu"
            assert fastkd.selected_log_probs(h, h.new_zeros(3, 1, dtype=torch.int64), backend=backend).isfinite().all()


def test_a_sum_against_unnormalised_weights(any_backend):
    s, t, y = torch.randn(4, 9), torch.randn(4, 9), torch.tensor([1, 3, 5, 7])
    target = targets.Enhance(y, 1.7)
    once = fastkd.kd_loss(s, t, target=target, backend=any_backend)
    twice = fastkd.kd_loss(s, t, 0.25 * ForwardKL() + 0.75 * ForwardKL(), target=target, backend=any_backend)
    torch.testing.assert_close(once, twice)


def test_alpha_beta_of_near_distributions_does_not_cancel(any_backend):
    t = torch.randn(8, 3200)
    s = (t + 1e-3 * torch.randn(8, 3200)).requires_grad_()
    d, x = AlphaBeta(0.01, 0.02), s.detach().double().requires_grad_()
    truth = d.phi(t.double().log_softmax(-1), x.log_softmax(-1)).sum(-1).mean()
    loss = fastkd.kd_loss(s, t, d, backend=any_backend)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-2, atol=0)
    got, want = torch.autograd.grad(loss, s)[0].double(), torch.autograd.grad(truth, x)[0]
    assert (got - want).norm() < 1e-2 * want.norm()


def test_alpha_beta_of_a_missing_outcome_is_infinite(any_backend):
    s, t = torch.zeros(2, 5), torch.zeros(2, 5)
    s[0, 1] = -torch.inf
    loss = fastkd.kd_loss(s, t, AlphaBeta(-1.0, -1.0), reduction="none", backend=any_backend)
    assert loss.tolist() == [torch.inf, 0]


def test_clip_leaves_missing_entries_missing(any_backend):
    s, t = torch.randn(3, 50), torch.randn(3, 40)
    got = fastkd.kd_loss(s, t, target=targets.Clip(-1.0, 1.0), vocab="pad", backend=any_backend)
    torch.testing.assert_close(got, fastkd.kd_loss(s, t.clamp(-1, 1), vocab="pad", backend=any_backend))


@pytest.mark.parametrize("head", [False, True])
def test_enhance_passes_over_ignored_labels(head, any_backend):
    h, w, ht, wt = heads()
    s, t = (Head(h, w), Head(ht, wt)) if head else (h @ w.T, ht @ wt.T)
    target, weights = targets.Enhance(torch.tensor([4, -100, 2]), 1.5), torch.tensor([1.0, 0, 1])
    loss = fastkd.kd_loss(s, t, target=target, weights=weights, reduction="none", backend=any_backend)
    assert loss[1] == 0 and loss.isfinite().all()
    live = fastkd.kd_loss(s, t, target=target, reduction="none", backend=any_backend)
    assert live.isnan().tolist() == [False, True, False]  # a live token without a label is not passed over


def test_a_divergence_that_is_not_registered_is_refused():
    class Mine(ForwardKL):
        pass

    class Nameless(divergences.Divergence):
        pass

    s = torch.randn(2, 5)
    for divergence in (Mine(), Nameless()):
        with pytest.raises(TypeError, match="must be registered: decorate it"):
            fastkd.kd_loss(s, s, divergence)
    assert sum([ForwardKL(), ForwardKL()]).terms == ((1.0, ForwardKL()),) * 2
    with pytest.raises(ValueError, match="at least one part"):
        divergences.WeightedSum(())


def test_lse_of_a_row_of_minus_infinities(any_backend):
    x = torch.full((3, 5), -torch.inf)
    x[1, 2], x[2, 0] = 1.0, torch.nan
    lse = fastkd.token_stats(x, backend=any_backend).lse
    assert lse[0] == -torch.inf and lse[1] == 1 and lse[2].isnan()


@LOOKS
def test_a_temperature_that_rounds_to_zero_is_refused():
    s = torch.randn(2, 5)
    for temperature in (1e-46, torch.tensor(1e-40)):
        with pytest.raises(ValueError, match="temperature must be"):
            fastkd.kd_loss(s, s, temperature=temperature)


def test_a_learned_temperature_costs_nothing_without_grad(recwarn):
    s = torch.randn(2, 5)
    with torch.no_grad():
        fastkd.kd_loss(s, s, temperature=torch.nn.Parameter(torch.ones(())))
    assert not recwarn.list


@pytest.mark.cpu("the C++ backend")
def test_half_precision_rows_round_to_nearest():
    specials = [0.0, -0.0, 6e-8, -3e-8, 6.1e-5, 65504.0, -65504.0, torch.inf, -torch.inf]
    s = torch.cat([torch.tensor(specials), torch.randn(991)]).half()[None]
    stats = fastkd.token_stats(s[:, :7].clone() / 1000, backend="cpu")
    torch.testing.assert_close(stats.lse, (s[:, :7] / 1000).float().logsumexp(-1))
    from fastkd import rows_cpu
    from fastkd.problem import Side

    x, one = s[:, 9:].contiguous(), torch.ones(1)
    g = torch.empty_like(x)  # d lse / dx = q
    rows_cpu.stats(x, g, Side(), x.shape[1], one, (one, 0 * one, 0 * one))
    torch.testing.assert_close(g, x.float().softmax(-1).half(), rtol=0, atol=6e-8)  # a step of the smallest numbers


@pytest.mark.parametrize("beta", [1e-9, 1 - 1e-8])
def test_jensen_shannon_next_to_its_limits(backend, beta):
    """In float32 1 - beta is 0 or 1: the mixture's logarithm stays finite where a probability underflows."""
    student, teacher = torch.zeros(1, 8, requires_grad=True), torch.zeros(1, 8)
    teacher[0, 3] = -200
    teacher.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, divergences.JensenShannon(beta), backend=backend)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and teacher.grad.isfinite().all()
    assert loss.abs() < 1e-6
