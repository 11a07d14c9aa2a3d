"""Sparse teachers: each tail against plain PyTorch in probabilities, edges, what is refused, what must hold of all."""

import formulas
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, LOOKS, seeded

import fastkd
from fastkd import Head, Labels, Mixture, Samples, TopK, sparse, testing
from fastkd.sources import TAILS

TILE = 1024  # of csrc/tiles.h
INF, NAN = torch.inf, torch.nan
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
tails = pytest.mark.parametrize("tail", TAILS)


def listed_loss(tail, term, student, teacher, temperature=1.0):
    """[N] by the table of maths.md, in probabilities; `term` is of one outcome."""
    q = (formulas.materialise(student) / temperature).softmax(-1)
    ids, p = teacher.ids.long(), teacher.log_probs.to(q.dtype).exp()
    p = torch.where(ids < 0, 0.0, p)
    q_k = torch.where((ids < 0) | (p == 0), 0.0, q.gather(-1, ids.clamp(min=0)))
    there = (p > 0).to(q.dtype)
    rest = 1 - p.sum(-1, keepdim=True) if teacher.log_tail is None else teacher.log_tail.to(q.dtype).exp().unsqueeze(-1)
    unlisted = torch.ones_like(q).scatter_add(-1, ids.clamp(min=0), -there)
    q_rest = (q * unlisted).sum(-1, keepdim=True)
    if tail == "bucket":
        p, q_k = torch.cat((p, rest), -1), torch.cat((q_k, q_rest), -1)
    elif tail == "renormalize":
        p, q_k = torch.cat((p / p.sum(-1, keepdim=True), 0 * rest), -1), torch.cat((q_k, q_rest), -1)
    elif tail == "renormalize_both":
        p, q_k = p / p.sum(-1, keepdim=True), q_k / q_k.sum(-1, keepdim=True)
    elif tail == "uniform":
        even = rest / unlisted.sum(-1, keepdim=True).clamp(min=1)
        p, q_k = (unlisted * even).scatter_add(-1, ids.clamp(min=0), p), q
    neither = (p == 0) & (q_k == 0)
    return torch.where(neither, 0.0, term(*(torch.where(neither, 1.0, x) for x in (p, q_k)))).sum(-1)


def case(seed, tail="bucket", tokens=7, vocab=TILE + 77, k=19, dtype=torch.float32, padded=False):
    """Logits that agree with the teacher in part, so that no ratio is extreme."""
    g = seeded(seed)
    z = 1.5 * torch.randn(tokens, vocab, generator=g, dtype=torch.float64)
    log_probs, ids = z.log_softmax(-1).topk(k)
    order = torch.randperm(k, generator=g)
    log_probs, ids = log_probs[:, order], ids[:, order]
    if padded:
        ids[::2, -3:] = -1
        log_probs[1, 4] = -INF
    tail_mass = 1 - log_probs.masked_fill(ids < 0, -INF).exp().sum(-1)
    student = (z + 0.8 * torch.randn(tokens, vocab, generator=g, dtype=torch.float64)).to(dtype)
    log_tail = tail_mass.clamp(min=0).log().float() if k < vocab else torch.full((tokens,), -INF)
    return {
        "student": student.requires_grad_(),
        "teacher": TopK(ids, log_probs.float(), tail, log_tail=log_tail),
        "reduction": "none",
    }


def held(inputs, recipe, **settings):
    """kd_loss by the rule against a recipe of student and teacher."""
    testing.compare(
        lambda **x: fastkd.kd_loss(**x, **settings),
        lambda student, teacher, temperature=1.0, **unused: recipe(student, teacher, temperature),
        inputs,
        baseline=fastkd.reference.kd_loss,
    ).check()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", formulas.FORMULAS)
@tails
def test_tail_and_divergence(engine, dtype, name, tail, seed):
    divergence, term = formulas.FORMULAS[name]
    inputs = case(seed, tail, dtype=dtype, padded=True) | {"divergence": divergence, "temperature": 1.5}
    infinite = {"reverse_kl", "reverse_cross_entropy", "neyman_chi_square", "alpha_beta(-0.5, 1.5)", "sum"}
    infinite |= {"alpha_beta(-0.6, 0.3)", "alpha_beta(-0.2, -0.3)", "alpha_beta(0.3, -0.6)"}
    if tail == "renormalize" and name in infinite:
        with pytest.raises(ValueError, match="infinite where the teacher has no mass"):
            fastkd.kd_loss(**inputs, teacher_temperature=1.0, backend=engine)
        return
    if tail in sparse.RENORMALIZED:
        inputs["teacher"] = TopK(inputs["teacher"].ids, inputs["teacher"].log_probs, tail, temperature=1.5)
    else:
        inputs["teacher_temperature"] = 1.0
    held(inputs, lambda s, t, tau: listed_loss(tail, term, s, t, tau), backend=engine, chunk_tokens=3)


@tails
@pytest.mark.parametrize(
    ("tokens", "vocab", "k"),
    [
        (5, 2, 1),  # one listed, one not
        (5, 3, 2),
        (5, TILE - 1, 64),  # around the tile
        (5, TILE, 64),
        (5, TILE + 1, 64),
        (1, 100, 7),
        (17, 100, 7),  # a prime, which no chunk divides
        (2, 50257, 64),  # GPT-2
        (2, 5000, 4096),  # the largest K
    ],
)
def test_sizes(engine, tail, tokens, vocab, k, seed):
    k = max(k, 2) if tail == "renormalize_both" else k  # of one outcome nothing but rounding is left
    inputs = case(seed, tail, tokens, vocab, k)
    held(inputs, lambda s, t, tau: listed_loss(tail, formulas.kl, s, t, tau), backend=engine, chunk_tokens=4)


@tails
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "reverse_kl", "total_variation"])
def test_everything_listed_is_dense(engine, tail, name, seed):
    """K = V: the loss and the gradient of the dense teacher, to rounding."""
    z, s = torch.randn(2, 6, 211)
    s.requires_grad_()
    order = torch.randperm(211)
    teacher = TopK(order.expand(6, -1), z.log_softmax(-1)[:, order], tail)
    upstream = torch.rand(6)
    results = []
    for t in (teacher, z):
        loss = fastkd.kd_loss(s, t, name, reduction="none", backend=engine)
        results.append((loss, *torch.autograd.grad(loss, s, upstream)))
    torch.testing.assert_close(*results, rtol=2e-5, atol=1e-6)


@tails
def test_one_entry_of_probability_1_is_cross_entropy(engine, tail, seed):
    s, y = torch.randn(9, 131, requires_grad=True), torch.randint(131, (9,))
    loss = fastkd.kd_loss(s, TopK(y.int().unsqueeze(-1), torch.zeros(9, 1), tail), backend=engine)
    expected = F.cross_entropy(s, y) if tail != "renormalize_both" else 0 * s.sum()  # one outcome is always sure
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (loss, expected)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_log_probs_of_any_dtype_count_as_they_are(any_backend, dtype, ids, seed):
    inputs = case(seed)
    t = inputs.pop("teacher")
    narrow = t.log_probs.to(dtype)
    losses = [
        fastkd.kd_loss(teacher=TopK(t.ids.to(i), x, log_tail=t.log_tail), **inputs, backend=any_backend)
        for i, x in ((ids, narrow), (torch.int64, narrow.float()))
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.parametrize("log_probs", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [0.0, 1e-3, 0.1, 3.0])
def test_bucket_is_never_negative(backend, dtype, log_probs, apart):
    """Over 10,000 rows, near the teacher and far from it."""
    z = 3 * torch.randn(10_000, 157)
    top = (z + apart * torch.randn_like(z)).log_softmax(-1).topk(8)
    teacher = TopK(top.indices, top.values.to(log_probs))
    for name in ("forward_kl", "jensen_shannon"):
        assert bool((fastkd.kd_loss(z.to(dtype), teacher, name, reduction="none", backend=backend) >= 0).all())


def test_drop_can_be_negative(any_backend):
    """Which is why it says so where it is chosen."""
    teacher = TopK(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), "drop")
    assert fastkd.kd_loss(torch.tensor([[9.0, 0.0]]), teacher, backend=any_backend) < 0
    assert "negative" in TopK.__doc__


def test_rows_of_dlogits_sum_to_0_and_order_does_not_matter(engine, seed):
    for tail in TAILS:
        inputs = case(seed, tail)
        t, s = inputs["teacher"], inputs["student"]
        order = torch.randperm(t.ids.shape[-1])
        other = TopK(t.ids[:, order], t.log_probs[:, order], tail, log_tail=t.log_tail)
        results = []
        for teacher, shift in ((t, 0.0), (other, torch.linspace(-8, 8, 7).unsqueeze(-1))):
            loss = fastkd.kd_loss(s + shift, teacher, reduction="none", backend=engine)
            results.append((loss, torch.autograd.grad(loss, s, torch.linspace(0.5, 1.5, 7))[0]))
        torch.testing.assert_close(*results, rtol=2e-4, atol=1e-5)
        grad = results[0][1]
        assert grad.double().sum(-1).abs().max() < 1e-5 * grad.abs().sum(-1).max()


# ---- edges ----


def row(engine, teacher, student, divergence="forward_kl"):
    """Loss and gradient of one row; the rows around it must not notice."""
    s = torch.cat((torch.zeros_like(student), student, torch.ones_like(student))).requires_grad_()
    around = TopK(*(x.expand(3, -1) for x in (teacher.ids, teacher.log_probs)), teacher.tail)
    loss = fastkd.kd_loss(s, around, divergence, reduction="none", backend=engine)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    assert loss[::2].isfinite().all() and grad[::2].isfinite().all()
    return loss[1].item(), grad[1]


def top(ids, p, tail="bucket"):
    return TopK(torch.tensor([ids]), torch.tensor([p], dtype=torch.float32).log(), tail)


V = 2 * TILE + 200


@pytest.mark.parametrize("where", [slice(0, TILE), slice(TILE, 2 * TILE), slice(2 * TILE, None)])
def test_whole_tiles_of_minus_infinity(engine, where):
    s = torch.randn(1, V)
    s[:, where] = -INF
    keep = ~s[0].isinf()
    ids = keep.nonzero().squeeze(-1)[[3, 40, -1]]
    p = [0.5, 0.2, 0.1]
    for tail in ("bucket", "renormalize_both", "drop"):
        loss, grad = row(engine, top(ids.tolist(), p, tail), s)
        fewer = top((keep.cumsum(-1) - 1)[ids].tolist(), p, tail)
        expected, expected_grad = row(engine, fewer, s[:, keep])
        assert loss == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(grad[keep], expected_grad, rtol=1e-4, atol=1e-7)
        assert not grad[~keep].any()


def test_a_student_that_is_sure_of_what_is_listed(engine):
    """All other probabilities underflow in float32; their logarithms do not."""
    s = torch.randn(1, V).double()
    s[0, 77] = 300.0
    t = top([77, 5], [0.6, 0.1])
    x = s.clone().requires_grad_()
    expected = fastkd.reference.kd_loss(x, TopK(t.ids, t.log_probs.double(), "bucket"), reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    loss, grad = row(engine, t, s.float())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad[0], rtol=1e-4, atol=1e-6)


def test_a_student_that_is_sure_of_what_is_not_listed(engine):
    s = torch.randn(1, V).double()
    s[0, 77] = 300.0
    t = top([9, 5], [0.6, 0.1])
    for tail in ("bucket", "renormalize_both"):
        x = s.clone().requires_grad_()
        expected = fastkd.reference.kd_loss(x, TopK(t.ids, t.log_probs.double(), tail), reduction="none")
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        loss, grad = row(engine, TopK(t.ids, t.log_probs, tail), s.float())
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(grad.double(), expected_grad[0], rtol=1e-4, atol=1e-6)


@tails
def test_minus_infinity_at_a_listed_entry(engine, tail):
    """Teacher mass where the student has none: +inf, never NaN; no mass: as if it were not listed."""
    s = torch.randn(1, V)
    s[0, 1500] = -INF
    loss, _ = row(engine, top([1500, 5], [0.6, 0.1], tail), s)
    assert loss == INF
    loss, grad = row(engine, top([1500, 5], [0.0, 0.1], tail), s)
    expected, expected_grad = row(engine, top([5, -1], [0.1, 0.3], tail), s)
    assert (loss == expected == INF) if tail == "uniform" else loss == pytest.approx(expected, rel=1e-6)
    if tail != "uniform":
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)


def test_a_tail_mass_of_0(engine):
    """R = 0 exactly: what is not listed adds nothing, whatever the student thinks of it."""
    s = torch.randn(1, V)
    for tail in ("bucket", "renormalize", "uniform"):
        given = TopK(torch.tensor([[7, 9]]), torch.tensor([[0.75, 0.25]]).log(), tail, log_tail=torch.tensor([-INF]))
        x = s.clone().requires_grad_()
        loss = fastkd.kd_loss(x, given, backend=engine)
        q = x.log_softmax(-1)[0]
        expected = (
            0.75 * (0.75 * torch.ones(())).log() + 0.25 * (0.25 * torch.ones(())).log() - 0.75 * q[7] - 0.25 * q[9]
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(y, x, retain_graph=True)[0] for y in (loss, expected)), rtol=1e-4, atol=1e-7
        )


@LOOKS
def test_rows_without_any_entry(engine):
    """Bucket and drop: nothing is known, nothing is compared. Uniform: an even teacher. Renormalized: no such row."""
    nothing = TopK(torch.tensor([[-1, -1]]), torch.tensor([[0.0, -INF]]))
    s = torch.randn(1, V)
    for tail in ("bucket", "drop"):
        loss, grad = row(engine, TopK(nothing.ids, nothing.log_probs, tail), s)
        assert abs(loss) < 1e-6 and grad.abs().max() < 1e-8
    loss, _ = row(engine, TopK(nothing.ids, nothing.log_probs, "uniform"), s)
    assert loss == pytest.approx(fastkd.kd_loss(s, torch.zeros(1, V)).item(), rel=1e-5)
    for tail in sparse.RENORMALIZED:
        with pytest.raises(ValueError, match=r"teacher.log_probs must be of at least one entry in each row"):
            fastkd.kd_loss(s, TopK(nothing.ids, nothing.log_probs, tail), backend=engine)
        ignored = fastkd.kd_loss(s, TopK(nothing.ids, nothing.log_probs, tail), weights=torch.zeros(1), backend=engine)
        assert ignored == 0


def test_no_entries_at_all(any_backend):
    s = torch.randn(3, 11, requires_grad=True)
    teacher = TopK(torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0))
    loss = fastkd.kd_loss(s, teacher, backend=any_backend)
    assert loss == 0 and torch.autograd.grad(loss, s)[0].abs().max() < 1e-7


@tails
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_is_not_hidden(engine, tail, side):
    s = torch.randn(3, V)
    log_p = torch.tensor([[0.6, 0.1]]).log().repeat(3, 1)
    if side == "student":
        s[1, 7] = NAN
    else:
        log_p[1, 0] = NAN
    loss = fastkd.kd_loss(s, TopK(torch.tensor([[7, 9]]).repeat(3, 1), log_p, tail), reduction="none", backend=engine)
    assert loss.isnan().tolist() == [False, True, False]


@tails
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_rows_may_list_anything(any_backend, tail, reduction):
    """Ids beyond the vocabulary, duplicates, NaN."""
    s = torch.randn(3, 53, requires_grad=True)
    ids, log_p = torch.tensor([[7, 9], [99, 99], [1, 2]]), torch.tensor([[0.6, 0.1], [NAN, 5.0], [0.2, 0.3]]).log()
    weights = torch.tensor([1.0, 0.0, 2.0])
    clean = TopK(ids[::2], log_p[::2], tail)
    kwargs = {"reduction": reduction, "backend": any_backend}
    loss = fastkd.kd_loss(s, TopK(ids, log_p, tail), weights=weights, **kwargs)
    expected = fastkd.kd_loss(s[::2], clean, weights=weights[::2], **kwargs)
    torch.testing.assert_close(loss[::2] if reduction == "none" else loss, expected)
    grads = [torch.autograd.grad(x.sum(), s)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)
    assert not grads[0][1].any()


# ---- another temperature ----


@pytest.mark.parametrize("tail", sparse.RENORMALIZED)
def test_what_is_renormalized_can_be_brought_to_any_temperature(any_backend, tail):
    z, s = torch.randn(2, 5, 61)
    ids = z.topk(9).indices
    tau = torch.linspace(0.5, 3, 5)
    stored, wanted = ((z / t.unsqueeze(-1)).log_softmax(-1).gather(-1, ids) for t in (torch.tensor([2.0]), tau))
    kwargs = {"temperature": 1.5, "teacher_temperature": tau, "reduction": "none", "backend": any_backend}
    loss = fastkd.kd_loss(s, TopK(ids, stored, tail, temperature=2.0), **kwargs)
    kwargs["teacher_temperature"] = 1.0
    expected = fastkd.kd_loss(s, TopK(ids, wanted, tail), **kwargs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "uniform", "drop"])
def test_what_is_not_renormalized_stays_at_its_temperature(any_backend, tail):
    teacher = TopK(torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.2]]).log(), tail, temperature=2.0)
    s = torch.randn(1, 7)
    for wanted in ({}, {"temperature": 3.0}, {"temperature": torch.tensor([2.0])}, {"teacher_temperature": 1.0}):
        with pytest.raises(ValueError, match=r"temperature must be teacher.temperature = 2.0 .*cannot be brought"):
            fastkd.kd_loss(s, teacher, **wanted, backend=any_backend)
    loss = fastkd.kd_loss(s, teacher, temperature=2.0, backend=any_backend)
    other = fastkd.kd_loss(s, teacher, temperature=torch.tensor([2.0]), teacher_temperature=2.0, backend=any_backend)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(
        loss, fastkd.kd_loss(s / 2, TopK(teacher.ids, teacher.log_probs, tail), backend=any_backend)
    )


# ---- vocabulary ----


@tails
def test_truncate_is_the_teacher_given_the_students_vocabulary(any_backend, tail):
    """Listed ids beyond it are left out; what is left sums to 1, but for drop."""
    z, s = torch.randn(4, 90), torch.randn(4, 60)
    log_p = z.log_softmax(-1)
    ids = torch.cat((torch.tensor([[61, 75]]).expand(4, -1), z[:, :60].topk(5).indices), -1)
    loss = fastkd.kd_loss(
        s, TopK(ids, log_p.gather(-1, ids), tail), vocab="truncate", reduction="none", backend=any_backend
    )
    inside = 1 - log_p[:, [61, 75]].exp().sum(-1, keepdim=True) if tail in ("bucket", "uniform") else torch.ones(())
    kept = TopK(ids[:, 2:], log_p.gather(-1, ids[:, 2:]) - inside.log(), tail)
    torch.testing.assert_close(
        loss, fastkd.kd_loss(s, kept, reduction="none", backend=any_backend), rtol=1e-5, atol=1e-6
    )


# ---- samples and mixtures ----


def test_samples_estimate_forward_kl(backend):
    """Over many draws the gradient is forward KL's, and the value its cross-entropy."""
    z = 2 * torch.randn(1, 31)
    p = z.softmax(-1)
    proposal = (z / 2).softmax(-1)  # flatter than the teacher
    ids = proposal.multinomial(400_000, replacement=True)
    weights = (p / proposal).gather(-1, ids) / ids.shape[-1]
    s = torch.randn(1, 31, requires_grad=True)
    for teacher in (Samples(ids, weights), Samples(ids, weights, normalize=True)):
        loss = fastkd.kd_loss(s, teacher, backend=backend)
        exact = fastkd.kd_loss(s, z, "cross_entropy", backend=backend)
        assert loss.item() == pytest.approx(exact.item(), rel=0.02)
        torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (loss, exact)), rtol=0, atol=5e-3)


@pytest.mark.parametrize("normalize", [False, True])
def test_samples_are_a_weighted_cross_entropy(any_backend, normalize, seed):
    ids = torch.randint(53, (6, 5))
    ids[:, 1] = ids[:, 0]  # drawn twice
    ids[2, 3:] = -1
    w = torch.rand(6, 5)
    w[0, 0] = 0

    def recipe(student, teacher, temperature):
        weights = torch.where(teacher.ids < 0, 0.0, teacher.weights)
        weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
        log_q = (formulas.materialise(student) / temperature).log_softmax(-1)
        return -(weights * log_q.gather(-1, teacher.ids.clamp(min=0))).sum(-1)

    student = Head(torch.randn(6, 8, requires_grad=True), torch.randn(53, 8, requires_grad=True))
    inputs = {"student": student, "teacher": Samples(ids, w, normalize), "temperature": 1.5, "reduction": "none"}
    held(inputs, recipe, backend=any_backend, chunk_tokens=4)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl"])
@pytest.mark.parametrize("weighting", ["equal", "numbers", "global", "per token"])
def test_mixture(any_backend, name, weighting, seed):
    """p = sum w p by hand, of every kind of teacher."""
    n, v = 6, 53
    z, h, w = torch.randn(n, v), torch.randn(n, 8), torch.randn(v, 8)
    z_top, y, ids = 2 * torch.randn(n, v), torch.randint(v, (n,)), torch.randint(v, (n, 4))
    log_p, listed = (x[:, :7] for x in z_top.log_softmax(-1).sort(-1, descending=True))
    teachers = [
        z,
        Head(h, w),
        TopK(listed, log_p, "uniform"),
        Labels(y, 0.2),
        Samples(ids, torch.rand(n, 4) + 0.1, True),
    ]
    teachers.append(TopK(listed, log_p, "renormalize"))
    weights = {"equal": None, "numbers": [1, 2, 3, 1, 0.5, 0], "global": torch.rand(6), "per token": torch.rand(n, 6)}
    given = weights[weighting]

    def by_hand(dtype):
        p_top = torch.zeros(n, v, dtype=dtype).scatter(-1, listed, log_p.to(dtype).exp())
        rest = (1 - p_top.sum(-1, keepdim=True)) / (v - 7)
        drawn = torch.zeros(n, v, dtype=dtype).scatter_add(-1, ids, teachers[4].weights.to(dtype))
        parts = [
            z.to(dtype).softmax(-1),
            (h.to(dtype) @ w.to(dtype).T).softmax(-1),
            torch.where(p_top > 0, p_top, rest),
            0.8 * F.one_hot(y, v) + 0.2 / v,
            drawn / drawn.sum(-1, keepdim=True),
            p_top / p_top.sum(-1, keepdim=True),
        ]
        u = torch.ones(6) if given is None else torch.as_tensor(given)
        u = u.to(dtype).expand(n, 6)
        return (torch.stack(parts, -1) * (u / u.sum(-1, keepdim=True)).unsqueeze(1)).sum(-1)

    def recipe(student, teacher, temperature):
        q = formulas.materialise(student).softmax(-1)
        return formulas.FORMULAS[name][1](by_hand(q.dtype), q).sum(-1)

    student = Head(torch.randn(n, 8, requires_grad=True), torch.randn(v, 8, requires_grad=True))
    inputs = {"student": student, "teacher": Mixture(teachers, given), "divergence": name, "reduction": "none"}
    held(inputs, recipe, backend=any_backend, chunk_tokens=4)


def test_a_mixture_of_one_is_that_teacher(any_backend):
    s, z = torch.randn(2, 5, 31)
    for teacher in (z, TopK(*reversed(z.log_softmax(-1).topk(4)), "uniform"), Labels(z.argmax(-1), 0.1)):
        losses = [fastkd.kd_loss(s, t, backend=any_backend) for t in (teacher, Mixture([teacher]))]
        if isinstance(teacher, Labels):  # alone it is compared by cross-entropy
            p = torch.tensor([0.9 + 0.1 / 31, *[0.1 / 31] * 30])
            losses[0] = losses[0] + (p * p.log()).sum()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_ignored_labels_in_a_mixture_leave_the_token_out(any_backend):
    s, z, y = torch.randn(5, 31), torch.randn(5, 31), torch.randint(31, (5,))
    y[1] = -100
    loss = fastkd.kd_loss(s, Mixture([z, Labels(y)]), backend=any_backend)
    live = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(loss, fastkd.kd_loss(s[live], Mixture([z[live], Labels(y[live])]), backend=any_backend))


@pytest.mark.parametrize("how", ["truncate", "pad"])
def test_vocabularies_of_a_mixture(any_backend, how):
    s, a, b = torch.randn(4, 20), torch.randn(4, 20), torch.randn(4, 25)
    with pytest.raises(ValueError, match="same vocabulary, got 20 and 20 and 25"):
        fastkd.kd_loss(s, Mixture([a, b]), backend=any_backend)
    loss = fastkd.kd_loss(s, Mixture([a, b]), "total_variation", vocab=how, backend=any_backend)
    if how == "truncate":
        p = (a.softmax(-1) + b[:, :20].softmax(-1)) / 2
        q = s.softmax(-1)
    else:
        p = (F.pad(a.softmax(-1), (0, 5)) + b.softmax(-1)) / 2
        q = F.pad(s.softmax(-1), (0, 5))
    torch.testing.assert_close(loss, (p - q).abs().sum(-1).mean() / 2)


# ---- gradients to the teacher ----


@tails
def test_log_probs_that_require_grad_receive_them(tail, seed):
    """By the definition, with a word about it; never a gradient that is missing."""
    inputs = case(seed, tail, tokens=3, vocab=23, k=4)
    s = inputs["student"].detach()
    log_p = inputs["teacher"].log_probs.double().requires_grad_()

    def loss(log_p):
        return fastkd.kd_loss(
            s.double(), TopK(inputs["teacher"].ids, log_p, tail), reduction="none", backend="reference"
        )

    assert torch.autograd.gradcheck(loss, log_p)
    with pytest.warns(UserWarning, match="a sparse teacher or a mixture requires grad"):
        fastkd.backends._warn_materialised.cache_clear()
        got = fastkd.kd_loss(s, TopK(inputs["teacher"].ids, log_p.detach().float().requires_grad_(), tail))
    assert got.requires_grad
    with pytest.raises(ValueError, match="requires grad, which only the definition differentiates"):
        fastkd.kd_loss(s, TopK(inputs["teacher"].ids, log_p, tail), backend="torch")


# ---- cost ----


@pytest.mark.real
def test_three_gemms_and_no_row_of_the_teacher(backend, seed):
    """Logits, dH, dW; and a chunk of logits is the largest tensor that is made."""
    from test_kd_loss import gemms

    m = testing._Maker(64, 1031, (24, 40), torch.float32, seed, DEVICE)
    inputs = {"student": m.head(24, True), "teacher": m.top_k(9), "backend": backend, "chunk_tokens": 16}
    assert gemms(lambda: fastkd.kd_loss(**inputs).backward()) == 3 * 4
    inputs["student"].weight.requires_grad_(False)
    assert gemms(lambda: fastkd.kd_loss(**inputs).backward()) == 2 * 4
    with torch.no_grad():
        assert gemms(lambda: fastkd.kd_loss(**inputs)) == 4


@pytest.mark.real
def test_float16_log_probs_do_not_cost_the_gradient_in_the_forward(backend, seed):
    from test_kd_loss import gemms

    m = testing._Maker(8, 131, (24, 40), torch.bfloat16, seed, DEVICE)
    t = m.top_k(9)
    teacher = TopK(t.ids.int(), t.log_probs.half())
    student = m.head(24, True)
    assert gemms(lambda: fastkd.kd_loss(student, teacher, backend=backend).backward()) == 3


# ---- found in review ----


@pytest.mark.real
@tails
def test_every_tail_compiles(tail):
    torch._dynamo.reset()
    teacher = TopK(torch.tensor([[0, 3], [6, 1]]), torch.tensor([[0.5, 0.3]]).log().repeat(2, 1), tail)
    s = torch.randn(2, 7)
    compiled = torch.compile(lambda x: fastkd.kd_loss(x, teacher), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s), fastkd.kd_loss(s, teacher))


def test_infinite_without_p_is_what_phi_does():
    nothing, something = torch.tensor([-INF]), torch.tensor([-1.0])
    for divergence, _ in formulas.FORMULAS.values():
        for _, d in divergence.terms:
            assert d.infinite_without_p == bool(d.phi(nothing, something).isinf())


@pytest.mark.parametrize("tail", sparse.RENORMALIZED)
def test_gradients_past_padding_and_ignored_tokens(tail):
    """Of the temperature, of log_probs, and of weights: what is padding or ignored has none, and spoils none."""
    x = torch.randn(3, 11, dtype=torch.float64)
    ids = torch.tensor([[1, 2, -1], [4, 3, 5], [0, 7, 9]])
    log_p = torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.3, 0.0], [0.6, 0.2, 0.1]], dtype=torch.float64).log()
    temperature = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 1.0, 0.0])

    def loss(temperature):
        return fastkd.kd_loss(x, TopK(ids, log_p, tail), temperature=temperature, weights=weights, backend="reference")

    assert torch.autograd.gradcheck(loss, temperature)


def test_gradients_where_a_weight_is_0():
    x, y = torch.randn(2, 4, 7, dtype=torch.float64)
    given = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    loss = fastkd.kd_loss(x, Mixture([y, Labels(y.argmax(-1))], given), backend="reference")
    assert torch.autograd.grad(loss, given)[0].isfinite().all()
    drawn = torch.rand(4, 3, dtype=torch.float64).index_fill(1, torch.tensor([1]), 0.0).requires_grad_()
    ids = torch.tensor([[0, 1, 2], [3, 4, -1], [5, 6, 0], [1, 3, 5]])
    for normalize in (False, True):
        loss = fastkd.kd_loss(x, Samples(ids, drawn, normalize), backend="reference")
        assert torch.autograd.grad(loss, drawn)[0].isfinite().all()
    sure = torch.tensor([[-1e-8]], requires_grad=True)
    loss = fastkd.kd_loss(x[:1].float(), TopK(torch.tensor([[2]]), sure), backend="reference")
    assert torch.autograd.grad(loss, sure)[0].isfinite().all()


@pytest.mark.parametrize("masked", [-1e9, -1e30])
def test_an_even_tail_beside_a_masked_logit(engine, masked):
    """The sum over what is not listed does not cancel against what is."""
    x = torch.randn(1, 1000)
    x[0, 5] = masked
    teacher = TopK(torch.tensor([[5, 1, 2]]), torch.tensor([[-120.0, -1.2, -1.6]]), "uniform")
    expected = fastkd.kd_loss(x.double(), TopK(teacher.ids, teacher.log_probs.double(), "uniform"), backend="reference")
    torch.testing.assert_close(fastkd.kd_loss(x, teacher, backend=engine).double(), expected, rtol=1e-4, atol=0)


def test_an_even_tail_over_few(engine):
    """K near V: little is left of the sums over the row."""
    x = torch.randn(2, 4096)
    ids = torch.arange(4095).repeat(2, 1)
    log_p = torch.full((2, 4095), 0.1 / 4095).log()
    expected = fastkd.kd_loss(x.double(), TopK(ids, log_p.double(), "uniform"), backend="reference")
    torch.testing.assert_close(
        fastkd.kd_loss(x, TopK(ids, log_p, "uniform"), backend=engine).double(), expected, rtol=1e-4, atol=0
    )


@LOOKS
@pytest.mark.parametrize("tail", sparse.RENORMALIZED)
def test_nothing_is_left_of_a_row_that_is_truncated(any_backend, tail):
    teacher = TopK(torch.tensor([[12, 13], [1, 2]]), torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), tail)
    with pytest.raises(ValueError, match="at least one entry in each row"):
        fastkd.kd_loss(torch.randn(2, 12), teacher, vocab="truncate", backend=any_backend)


def test_padding_may_repeat_an_id_and_mass_may_be_tiny(any_backend):
    s = torch.randn(1, 7)
    log_p = torch.tensor([[-1.0, -INF, -INF]])
    expected = fastkd.kd_loss(s, TopK(torch.tensor([[2]]), log_p[:, :1]), backend=any_backend)
    for ids in ([2, 0, 0], [2, 99, -5]):
        loss = fastkd.kd_loss(s, TopK(torch.tensor([ids]), log_p), backend=any_backend)
        torch.testing.assert_close(loss, expected)
    tiny = TopK(torch.tensor([[2, 3]]), torch.tensor([[-120.0, -121.0]]), "renormalize")
    assert fastkd.kd_loss(s, tiny, backend=any_backend).isfinite()


@pytest.mark.real
def test_what_nobody_checked_is_nan():
    """Under vmap values cannot be looked at: an id out of range is no padding."""
    teacher = TopK(torch.tensor([[1, 99]]), torch.tensor([[0.5, 0.2]]).log())
    losses = torch.func.vmap(lambda x: fastkd.kd_loss(x, teacher, backend="reference"))(torch.randn(3, 1, 7))
    assert losses.isnan().all()
