"""One table of edges for every op on every backend: infinities, NaN, huge logits, extreme temperatures."""

from collections.abc import Callable
from dataclasses import dataclass, field

import formulas
import pytest
import torch
from device import DEVICE

import fastkd
from fastkd import Head, testing

TILE = 1024  # of csrc/rows.cpp
N, V, ROW = 6, 2 * TILE + 200, 2  # a first, a middle and a last tile; the row that the edges touch
INF, NAN = torch.inf, torch.nan
MINUS = -300.0  # in float64 as good as -inf for a limit: e^-300 is 0 against 1, and no log is infinite
FIRST, MIDDLE, LAST = slice(0, TILE), slice(TILE, 2 * TILE), slice(2 * TILE, None)
IDS = torch.arange(N * 3).reshape(N, 3) * 97 % V
TOP = 1e30  # beyond it float32 may be infinite where float64 is not


@dataclass(frozen=True)
class Edge:
    """``change`` the logits of row ROW of student and teacher (copies of normal ones); what comes of that row is

    finite: as in float64 in the limit, loss and gradient
    student, teacher: the side that has probability 0 where the other has mass; +inf for some divergences, else finite
    nan: NaN, for the ops that look at the side changed; never a number
    """

    change: Callable[[torch.Tensor, torch.Tensor], object]
    outcome: str = "finite"
    settings: dict = field(default_factory=dict)


def put(side, where, value):
    def change(*rows):
        for i in (0, 1) if side == "both" else (("student", "teacher").index(side),):
            rows[i][where] = value

    return change


def both_of(*changes):
    def change(*rows):
        for one in changes:
            one(*rows)

    return change


def scaled(factor, offset=0.0):
    def change(s, t):
        s.mul_(factor).add_(offset)
        t.mul_(factor).sub_(offset)

    return change


def same(s, t):
    t.copy_(s)


EDGES = {
    "both -inf": Edge(put("both", slice(3, None, 5), -INF)),
    "both -inf, one left": Edge(put("both", slice(1, None), -INF)),
    "student -inf": Edge(put("student", slice(3, None, 5), -INF), "student"),
    "teacher -inf": Edge(put("teacher", slice(3, None, 5), -INF), "teacher"),
    "teacher one-hot": Edge(put("teacher", slice(1, None), -INF), "teacher"),
    **{
        f"{side} -inf in the {name} tile": Edge(put(side, tile, -INF), "finite" if side == "both" else side)
        for side in ("both", "student", "teacher")
        for name, tile in (("first", FIRST), ("middle", MIDDLE), ("last", LAST))
    },
    "row of -inf in both": Edge(put("both", slice(None), -INF), "nan"),
    "row of -inf in the student": Edge(put("student", slice(None), -INF), "nan"),
    "row of -inf in the teacher": Edge(put("teacher", slice(None), -INF), "nan"),
    "NaN in the student": Edge(put("student", 1500, NAN), "nan"),
    "NaN in the teacher": Edge(put("teacher", -1, NAN), "nan"),
    "NaN first in the student": Edge(put("student", 0, NAN), "nan"),
    **{
        f"NaN in a tile {what} of the {side}": Edge(both_of(put(side, MIDDLE, value), put(side, 1500, NAN)), "nan")
        for side in ("student", "teacher")
        for what, value in (("of NaN", NAN), ("of -inf", -INF), ("far below", -300.0))  # tiles that weigh nothing
    },
    "+inf in the student": Edge(put("student", 1500, INF), "nan"),
    "+inf in the teacher": Edge(put("teacher", 1500, INF), "nan"),
    "logits around 1e4 and -1e4": Edge(scaled(1.0, 1e4)),
    "logits up to 1e4": Edge(scaled(2e3)),
    "one logit of 1e4 in both": Edge(put("both", 1500, 1e4)),
    "student sure of another": Edge(put("student", 1500, 1e4)),
    "teacher sure of another": Edge(put("teacher", 1500, 1e4)),
    "one logit of -1e4 in both": Edge(put("both", 1500, -1e4)),
    "all equal": Edge(put("both", slice(None), 0.5)),
    "student = teacher": Edge(same),
    "temperature 0.05": Edge(put("both", 0, 0.0), settings={"temperature": 0.05}),
    "temperature 20": Edge(put("both", 0, 0.0), settings={"temperature": 20.0}),
}
# +inf where the student has probability 0 and the teacher has not, and the other way round
INFINITE = {
    "student": {"forward_kl", "cross_entropy", "chi_square", "alpha_beta(1.5, -0.5)", "sum"},
    "teacher": {"reverse_kl", "reverse_cross_entropy", "neyman_chi_square", "alpha_beta(-0.5, 1.5)", "sum"},
}
# not where a + b < 0: there an outcome that neither has counts 0 by definition, and its limit is infinite
DIVERGENCES = [name for name, (d, _) in formulas.FORMULAS.items() if getattr(d, "a", 1) + getattr(d, "b", 1) > 0]
# in logarithms, because p^2 / q may be large where both underflow
LOGARITHMIC = {
    "chi_square": lambda log_p, log_q: (2 * log_p - log_q).exp() - 2 * log_p.exp() + log_q.exp(),
    "neyman_chi_square": lambda log_p, log_q: (2 * log_q - log_p).exp() - 2 * log_q.exp() + log_p.exp(),
}
OPS = ["token_stats", "selected_log_probs", *DIVERGENCES]


def run(op, s, t, backend, settings):
    """[N] or [N, K], by fastkd."""
    if op == "token_stats":
        return torch.stack(fastkd.token_stats(s, backend=backend, **settings)[:3], -1)
    if op == "selected_log_probs":
        return fastkd.selected_log_probs(s, IDS, backend=backend, **settings)
    return fastkd.kd_loss(s, t, formulas.FORMULAS[op][0], reduction="none", backend=backend, **settings)


def truth(op, s, t, settings):
    """The same in float64: in plain PyTorch; for logits so large that probabilities underflow by the reference."""
    tau, s_limit = settings.get("temperature", 1.0), s.clamp(min=MINUS) if s.isneginf().any() else s
    if op == "selected_log_probs":
        return (s / tau).log_softmax(-1).gather(-1, IDS)
    if op == "token_stats":
        log_q = (s_limit / tau).log_softmax(-1)
        parts = (s / tau).logsumexp(-1), torch.distributions.Categorical(logits=log_q).entropy(), log_q.max(-1).values
        return torch.stack(parts, -1)
    if op in LOGARITHMIC:
        log_p, log_q = ((x.clamp(min=MINUS) if x.isneginf().any() else x) / tau for x in (t, s))
        return LOGARITHMIC[op](log_p.log_softmax(-1), log_q.log_softmax(-1)).sum(-1)
    if not (s.isneginf().any() or t.isneginf().any()):
        return fastkd.reference.kd_loss(s, t, formulas.FORMULAS[op][0], reduction="none", **settings)
    return formulas.divergence(formulas.FORMULAS[op][1])(s_limit, t.clamp(min=MINUS))


def with_gradient(function, s, t):
    """Value and gradient with respect to the student, under an upstream of its own for every token."""
    s = s.clone().requires_grad_()
    value = function(s, t)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return value.detach(), torch.autograd.grad(value, s, upstream)[0]


def close(got, expected, terms=0.0):
    """Where float32 can hold the value; relative to the largest, and to the terms that cancelled on the way to it."""
    fits = expected.abs() < TOP
    assert bool((got[~fits].abs() > TOP / 1e3).all()), f"{got[~fits]} where {expected[~fits]} was expected"
    got, expected = got[fits].double(), expected[fits]
    size = expected.abs().max() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=float(2e-5 * size + 1e-7 * terms + 1e-6))


@pytest.fixture
def logits():
    m = testing._Maker(N, V, (0, 0), torch.float32, 1, DEVICE)
    teacher = m.normal(N, V, scale=1.5, grad=False)
    return teacher + m.normal(N, V, scale=0.8, grad=False), teacher


@pytest.mark.parametrize("op", OPS)
def test_edges(engine, op, logits):
    check_edges(engine, op, *logits)


@pytest.mark.parametrize("op", OPS)
def test_edges_of_the_reference(op, logits):
    check_edges("reference", op, *logits)


def check_edges(backend, op, s, t):
    failures = []
    looks_at = ("student", "both") if op in OPS[:2] else ("student", "teacher", "both")
    for name, edge in EDGES.items():
        one_s, one_t = s.clone(), t.clone()
        edge.change(one_s[ROW], one_t[ROW])
        before = one_s.clone(), one_t.clone()
        plain = with_gradient(lambda a, b: run(op, a, b, backend, edge.settings), s, t)  # noqa: B023
        value, grad = with_gradient(lambda a, b: run(op, a, b, backend, edge.settings), one_s, one_t)  # noqa: B023
        try:
            for x, y in zip((one_s, one_t), before, strict=True):
                assert torch.equal(x.view(torch.int32), y.view(torch.int32)), "an input was changed"
            for got, alone in zip((value, grad), plain, strict=True):
                for other in set(range(N)) - {ROW}:
                    assert torch.equal(got[other], alone[other]), f"row {other} was touched"
            check_row(op, edge, name, looks_at, value[ROW], grad[ROW], one_s, one_t)
        except AssertionError as error:
            failures.append(f"edge {name!r}: {error}")
    assert not failures, "\n".join(failures)


def check_row(op, edge, name, looks_at, value, grad, s, t):
    if edge.outcome == "nan":
        if any(side in name for side in looks_at):
            assert not value.isfinite().any(), f"{value} hides it"
            assert value.isnan().any() or op == "token_stats"
            if op not in ("total_variation", "nested sum"):  # the sign of NaN is 0 in torch
                assert grad.isnan().any(), "the gradient hides it"
        return
    if op in INFINITE.get(edge.outcome, ()):
        assert value == INF, f"{value}, expected inf"
        if op in ("forward_kl", "cross_entropy"):  # q - p, whatever the loss
            expected = t[ROW].double().softmax(-1)
            close(grad, (s[ROW].double().softmax(-1) - expected) * (0.5 + ROW / (N - 1)))
        return
    expected = with_gradient(lambda a, b: truth(op, a, b, edge.settings), s.double(), t.double())
    close(value, expected[0][ROW])
    if value.isfinite().all() and (expected[0][ROW].abs() < TOP).all() and expected[1][ROW].isfinite().all():
        close(grad, expected[1][ROW], terms=expected[0][ROW].abs().max())
    if name == "student = teacher" and op in formulas.FORMULAS and "cross" not in op:
        assert value.abs() < 1e-5 and grad.abs().max() < 1e-6


def test_infinities_through_heads(any_backend, seed):
    """A bias of -inf closes an entry, as if it were not in the vocabulary."""
    inputs = testing.kd_inputs("plain", tokens=5, vocab=TILE + 9, seed=seed)
    bias = torch.zeros(TILE + 9)
    bias[::7] = -INF

    def closed(head):
        return Head(head.hidden, head.weight, bias)

    def shorter(head):
        return Head(head.hidden, head.weight[bias == 0])

    for divergence in ("forward_kl", "reverse_kl", "jensen_shannon"):
        results = []
        for make in (closed, shorter):
            student, teacher = map(make, inputs.values())
            loss = fastkd.kd_loss(student, teacher, divergence, backend=any_backend)
            results.append((loss, *torch.autograd.grad(loss, (inputs["student"].hidden, inputs["student"].weight))))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


# ---- properties ----


@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_properties(engine, name, logits):
    divergence = formulas.FORMULAS[name][0]
    s, t = logits

    def loss(a, b):
        return fastkd.kd_loss(a, b, divergence, temperature=1.3, reduction="none", backend=engine)

    value, grad = with_gradient(loss, s, t)
    scale = grad.abs().max().item()
    assert grad.double().sum(-1).abs().max() < 1e-5 * grad.abs().sum(-1).max(), "rows of dlogits sum to 0"
    shift = torch.linspace(-8, 8, N).unsqueeze(-1)
    order = torch.randperm(V)
    for a, b, back in ((s + shift, t - 2 * shift, torch.arange(V)), (s[:, order], t[:, order], order.argsort())):
        other, other_grad = with_gradient(loss, a, b)
        torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other_grad[:, back], grad, rtol=1e-3, atol=1e-4 * scale)
    if all(d.rows_nonnegative for _, d in divergence.terms):
        assert bool((value > 0).all())
    if name in DIVERGENCES and all(d.rows_nonnegative for _, d in divergence.terms):
        near = loss(t + 1e-3 * torch.randn_like(t), t)
        assert bool((near > -2e-6 * (1 + value)).all()), "never negative beyond rounding"
