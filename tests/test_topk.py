"""fastkd.topk: ids in order, their log-probabilities, the mass of all others, and the gradients."""

import itertools

import pytest
import torch

import fastkd
from fastkd import Head, TopK

TILE = 1024  # of csrc/tiles.h
INF, NAN = torch.inf, torch.nan


@pytest.mark.parametrize(
    ("vocab", "k"),
    [(1, 1), (2, 1), (7, 7), (100, 25), (100, 26), (TILE, 1), (TILE + 1, 64), (5000, 4096), (50257, 64)],
)
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "-inf", "ascending", "descending", "apart"])
def test_topk(engine, vocab, k, kind):
    x = {
        "normal": lambda: 3 * torch.randn(3, vocab),
        "ties": lambda: torch.randint(-3, 4, (3, vocab)).float(),
        "equal": lambda: torch.zeros(3, vocab),
        "-inf": lambda: torch.randn(3, vocab).masked_fill(torch.arange(vocab) % 3 > 0, -INF),
        "ascending": lambda: torch.linspace(-9, 9, vocab).expand(3, -1),
        "descending": lambda: torch.linspace(9, -9, vocab).expand(3, -1),
        "apart": lambda: -torch.rand(3, vocab) + 9 * (torch.arange(vocab) % max(vocab // k, 1) == 0),
    }[kind]()
    got = fastkd.topk(x, k, backend=engine)
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    assert torch.equal(got.ids, order[:, :k])
    log_q = x.double().log_softmax(-1)
    torch.testing.assert_close(got.log_probs.double(), log_q.gather(-1, got.ids), rtol=1e-5, atol=1e-5)
    rest = log_q.gather(-1, order[:, k:]).logsumexp(-1) if k < vocab else torch.full((3,), -INF).double()
    torch.testing.assert_close(got.log_tail.double(), rest, rtol=1e-5, atol=1e-5)


def test_the_gradients_of_topk(engine):
    """Of every log-probability and of the tail, under an upstream of its own for each."""
    x = torch.stack([torch.randperm(2100) for _ in range(4)]).double() * 0.01  # no two are near
    upstream = torch.rand(4, 37, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    grads = []
    for backend, dtype in ((engine, torch.float32), ("reference", torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        top = fastkd.topk(leaf, 37, temperature=torch.linspace(0.5, 2, 4).to(dtype), backend=backend)
        grads.append(torch.autograd.grad(top[1:], leaf, [u.to(dtype) for u in upstream])[0].double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=5e-6)


def test_topk_of_nan_and_of_nothing(engine):
    x = torch.randn(3, 50)
    x[1, 7] = NAN
    top = fastkd.topk(x, 5, backend=engine)
    assert top.log_probs.isnan().any(-1).tolist() == [False, True, False]
    assert bool(((top.ids >= 0) & (top.ids < 50)).all())
    empty = fastkd.topk(torch.empty(0, 2, 50), 5, backend=engine)
    assert [y.shape for y in empty] == [(0, 2, 5), (0, 2, 5), (0, 2)]


@pytest.mark.parametrize("k", [0, 8, -1, 2.0, True, None])
def test_topk_refuses(any_backend, k):
    with pytest.raises(ValueError, match="k must be an integer from 1 to the vocabulary's size 7, got"):
        fastkd.topk(torch.randn(5, 7), k, backend=any_backend)


def test_what_topk_gives_is_a_teacher(backend):
    """Top-k of the teacher's head, then the loss: K = V is the dense loss from hidden states."""
    h, w, h_t, w_t = torch.randn(5, 8), torch.randn(61, 8), torch.randn(5, 9), torch.randn(61, 9)
    dense = fastkd.kd_loss(Head(h, w), Head(h_t, w_t), backend=backend)
    losses = []
    for k in (1, 8, 30, 61):
        top = fastkd.topk(Head(h_t, w_t), k, backend=backend)
        teacher = TopK(top.ids, top.log_probs, log_tail=top.log_tail)
        losses.append(fastkd.kd_loss(Head(h, w), teacher, backend=backend))
    torch.testing.assert_close(losses[-1], dense, rtol=1e-5, atol=1e-6)
    assert all(a <= b * (1 + 1e-5) for a, b in itertools.pairwise(losses))  # finer outcomes tell more apart
