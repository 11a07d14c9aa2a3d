"""The ops of the autograd tests as functions of the same five tensors, and how their results are compared."""

import pytest
import torch
import torch.nn.functional as F
from device import seeded

import fastkd
from fastkd import Head, Mixture, TopK
from fastkd.divergences import ForwardKL, JensenShannon

LABELS = torch.tensor([3, -100, 0, 6, 3])
IDS = torch.tensor([[0, 6], [2, 2], [5, 1], [3, 3], [1, 4]])
LOG_P = torch.tensor([0.5, 0.2]).log().repeat(5, 1)
TOP, EVEN = (
    TopK(torch.tensor([[0, 6], [2, 3], [5, 1], [-1, 3], [1, 4]]), LOG_P, tail) for tail in ("bucket", "uniform")
)
NAMES = ("hidden", "weight", "bias", "teacher hidden", "teacher weight")


def heads(h, w, b, ht, wt):
    return Head(h, w, b, softcap=3.0, logit_scale=1.3), Head(ht, wt)


# each op as a function of the same five tensors
OPS = {
    "mean": lambda *a, **k: fastkd.kd_loss(*heads(*a), temperature=1.5, t_squared=True, **k),
    "none": lambda *a, **k: fastkd.kd_loss(*heads(*a), "jensen_shannon", reduction="none", **k),
    "labels": lambda *a, **k: fastkd.kd_loss(
        *heads(*a), "reverse_kl", labels=LABELS, label_weight=0.4, reduction="sum", **k
    ),
    "logits": lambda h, w, b, ht, wt, **k: fastkd.kd_loss(F.linear(h, w, b), F.linear(ht, wt), temperature=0.7, **k),
    "logits, none": lambda h, w, b, ht, wt, **k: fastkd.kd_loss(
        F.linear(h, w, b), Head(ht, wt), 0.3 * ForwardKL() + 0.7 * JensenShannon(0.3), reduction="none", **k
    ),
    "top-k": lambda h, w, b, ht, wt, **k: fastkd.kd_loss(Head(h, w, b, softcap=3.0), TOP, "jensen_shannon", **k),
    "top-k, none": lambda h, w, b, ht, wt, **k: fastkd.kd_loss(
        F.linear(h, w, b), TOP, labels=LABELS, label_weight=0.4, reduction="none", **k
    ),
    "mixture": lambda h, w, b, ht, wt, **k: fastkd.kd_loss(
        Head(h, w, b), Mixture([Head(ht.detach(), wt.detach()), EVEN], [0.3, 0.7]), "reverse_kl", reduction="none", **k
    ),
    "topk": lambda *a, **k: torch.cat([y.flatten() for y in fastkd.topk(heads(*a)[0], 3, **k)[1:]]),
    "entropy": lambda *a, **k: fastkd.token_stats(heads(*a)[0], temperature=1.5, **k).entropy,
    "max_log_prob": lambda *a, **k: fastkd.token_stats(heads(*a)[0], **k).max_log_prob,
    "selected_log_probs": lambda *a, **k: fastkd.selected_log_probs(heads(*a)[0], IDS, temperature=1.5, **k),
}
KD_OPS = ("mean", "none", "labels", "logits", "logits, none")
op_of = pytest.mark.parametrize("op", OPS)
kd_op = pytest.mark.parametrize("op", KD_OPS)


def inputs(dtype=torch.float32, grad=True, seed=0):
    """The same numbers for every dtype that holds them: rounded to bfloat16, drawn in float64."""
    generator = seeded(seed)
    shapes = ((5, 4), (7, 4), (7,), (5, 3), (7, 3))
    return [
        torch.randn(s, generator=generator).bfloat16().to(dtype).requires_grad_(grad) for s in shapes
    ]  # fewer tokens than classes, D and V odd or not a power of 2


def rand_like(x, seed=1):
    generator = seeded(seed)
    return torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype)


def reference(op):
    return lambda *a: OPS[op](*a, backend="reference")


def assert_near(got, want, tol=2e-5):
    """Within tol of the largest value; want in float64."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    error, size = (got.double() - want).abs().max(), want.abs().max()
    assert error <= tol * size + 1e-9, f"error {error:.3g} for values up to {size:.3g}"


def assert_all_near(got, want, tol=2e-5):
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert_near(g, w, tol)


@pytest.fixture(autouse=True)
def one_thread():
    """The problems are tiny and many: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
