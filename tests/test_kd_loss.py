"""kd_loss on every backend: every feature and divergence, values and every gradient, against float64."""

import formulas
import pytest
import torch
from device import DEVICE

import fastkd
from fastkd import Head, chunks, testing
from fastkd import divergences as D
from fastkd.problem import accumulation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TILE = 1024  # of csrc/rows.cpp
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def check(inputs, reference=fastkd.reference.kd_loss, **settings):
    """kd_loss with these settings against the reference, values and gradients."""

    def op(**kwargs):
        return fastkd.kd_loss(**kwargs, **settings)

    testing.compare(op, reference, inputs, baseline=fastkd.reference.kd_loss).check()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("feature", testing.KD_FEATURES)
@dtypes
def test_feature(backend, dtype, feature, reduction, seed):
    inputs = testing.kd_inputs(feature, dtype=dtype, seed=seed)
    if feature == "num_tokens" and reduction != "mean":
        inputs.pop("num_tokens")
    # 4: several chunks, the last one short
    check({**inputs, "reduction": reduction}, chunk_tokens=4, backend=backend)


@pytest.mark.parametrize("feature", testing.KD_FEATURES)
def test_feature_with_the_default_chunk(engine, feature, seed):
    inputs = testing.kd_inputs(feature, dtype=torch.bfloat16, seed=seed, reduction="none")
    inputs.pop("num_tokens", None)
    check(inputs, backend=engine)


def test_a_feature_matters_far_more_than_the_tolerance():
    """A test of the data: for every feature, the loss without it is nowhere near the loss with it."""
    for feature in ("bias", "teacher bias", "softcap", "teacher softcap", "logit_scale", "teacher logit_scale"):
        inputs = testing.kd_inputs(feature)
        side = "teacher" if feature.startswith("teacher") else "student"
        plain = {**inputs, side: Head(inputs[side].hidden, inputs[side].weight)}
        assert not torch.isclose(fastkd.kd_loss(**inputs), fastkd.kd_loss(**plain), rtol=0.1), feature
    for feature in ("temperature", "temperature per token", "t_squared", "weights", "labels", "label_weight per token"):
        inputs = testing.kd_inputs(feature)
        for name in set(inputs) - {"student", "teacher", "labels", "label_weight"}:
            less = {k: v for k, v in inputs.items() if k != name}
            assert not torch.isclose(fastkd.kd_loss(**inputs), fastkd.kd_loss(**less), rtol=0.02), (feature, name)


# ---- divergences ----


def test_every_divergence_has_a_formula():
    assert {divergence.name for divergence, _ in formulas.FORMULAS.values()} >= set(D.REGISTRY)


def logits_pair(seed, dtype=torch.float32, tokens=7, vocab=TILE + 77, teacher_grad=False):
    """Student and teacher that agree in part, so that no ratio p / q is extreme."""
    m = testing._Maker(tokens, vocab, (0, 0), dtype, seed, DEVICE)
    teacher = m.normal(tokens, vocab, scale=1.5, grad=teacher_grad)
    student = (teacher.detach() + m.normal(tokens, vocab, scale=0.8, grad=False)).requires_grad_()
    return {"student": student, "teacher": teacher}


@dtypes
@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_divergence_and_both_gradients(engine, dtype, name, seed):
    divergence, term = formulas.FORMULAS[name]
    inputs = logits_pair(seed, dtype, teacher_grad=True)
    inputs |= {"divergence": divergence, "temperature": 1.5, "reduction": "none"}
    check(inputs, formulas.divergence(term), backend=engine, chunk_tokens=3)


@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_divergence_of_heads(backend, name, seed):
    divergence, term = formulas.FORMULAS[name]
    m = testing._Maker(9, 257, (12, 20), torch.float32, seed, DEVICE)
    heads = [Head(m.normal(9, d), m.normal(257, d, scale=d**-0.5)) for d in m.hidden]
    inputs = {"student": heads[0], "teacher": heads[1], "divergence": divergence, "reduction": "none"}
    check(inputs, formulas.divergence(term), backend=backend, chunk_tokens=4)


@dtypes
def test_divergences_with_weights_per_token(engine, dtype, seed):
    """Balanced distillation: a factor per token for each of two divergences, one of them 0 for some tokens."""
    inputs = logits_pair(seed, dtype, teacher_grad=True)
    forward, reverse = torch.rand(2, 7)
    reverse[::2] = 0
    inputs |= {"divergence": forward * D.ForwardKL() + reverse * D.ReverseKL(), "reduction": "none"}

    def recipe(student, teacher, **unused):
        p, q = (formulas.materialise(x).softmax(-1) for x in (teacher, student))
        return (forward * formulas.kl(p, q).sum(-1) + reverse * formulas.kl(q, p).sum(-1)).to(p.dtype)

    check(inputs, recipe, backend=engine)


@pytest.mark.parametrize("name", formulas.FORMULAS)
def test_the_reference_follows_the_formulas(name, seed):
    """In float64, to rounding."""
    divergence, term = formulas.FORMULAS[name]
    inputs = logits_pair(seed, torch.float64, teacher_grad=True)
    inputs |= {"temperature": 0.8}
    xs = inputs["student"], inputs["teacher"]
    upstream = torch.rand(7, dtype=torch.float64)
    ours = fastkd.reference.kd_loss(**inputs, divergence=divergence, reduction="none")
    theirs = formulas.divergence(term)(**inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss, xs, upstream) for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-13)


# ---- sizes, strides of the walk ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])  # a closed form, and the general path
@pytest.mark.parametrize(
    ("tokens", "vocab", "hidden"),
    [
        (5, 1, (8, 8)),  # one outcome: always 0
        (5, 2, (8, 8)),
        (5, TILE - 1, (8, 8)),  # around the tile
        (5, TILE, (8, 8)),
        (5, TILE + 1, (8, 8)),
        (5, 2 * TILE + 1, (8, 8)),
        (2, 50257, (16, 16)),  # GPT-2
        (5, 100, (7, 13)),  # odd D
        (5, 100, (1, 1)),
        (1, 100, (8, 8)),
        (17, 100, (8, 8)),  # a prime, which no chunk divides
    ],
)
def test_sizes(engine, dtype, divergence, tokens, vocab, hidden, seed):
    inputs = testing.kd_inputs(
        "both receive gradients", tokens=tokens, vocab=vocab, hidden=hidden, dtype=dtype, seed=seed
    )
    check({**inputs, "divergence": divergence}, backend=engine, chunk_tokens=4)


@pytest.mark.parametrize("vocab", [TILE - 1, TILE, TILE + 1, 50257])
def test_no_mass_beyond_the_vocabulary(engine, vocab):
    """Equal logits against one winner: ln V exactly, and no entry after the last takes part."""
    student, teacher = torch.zeros(2, vocab, requires_grad=True), torch.full((2, vocab), -1e4)
    teacher[:, -1] = 0
    loss = fastkd.kd_loss(student, teacher, backend=engine)
    torch.testing.assert_close(loss.item(), torch.tensor(float(vocab)).log().item(), rtol=1e-6, atol=0)
    loss.backward()
    expected = torch.full((2, vocab), 0.5 / vocab)
    expected[:, -1] -= 0.5
    torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("feature", ["both receive gradients", "batched heads", "weights", "labels", "logits"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_chunk_does_not_matter(backend, feature, reduction, seed):
    inputs = testing.kd_inputs(feature, seed=seed, reduction=reduction)
    whole = testing._evaluate(lambda **k: fastkd.kd_loss(**k, backend=backend), inputs, 0)
    # one token; a divisor of nothing; two heads of three times 13 tokens; all at once
    for chunk in (1, 5, 26, 10**6):
        parts = testing._evaluate(lambda **k: fastkd.kd_loss(**k, backend=backend, chunk_tokens=chunk), inputs, 0)  # noqa: B023
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_dweight_in_bfloat16_over_64_chunks_is_as_good_as_over_one(backend, seed):
    m = testing._Maker(256, 128, (32, 32), torch.bfloat16, seed, DEVICE)
    student, teacher = m.head(32, True), m.head(32, False)
    student = Head((student.hidden.detach() + 1).requires_grad_(), student.weight)  # sums grow from chunk to chunk

    def dweight(**kwargs):
        x = {"student": student, "teacher": teacher}
        if kwargs["backend"] == "reference":
            x = testing._cast(x, torch.float64)
        return torch.autograd.grad(fastkd.kd_loss(**x, reduction="sum", **kwargs), x["student"].weight)[0].double()

    truth = dweight(backend="reference")
    one, many = ((dweight(backend=backend, chunk_tokens=n) - truth).norm() for n in (256, 4))
    assert many < 1.3 * one  # accumulated in bfloat16 it would be several times larger
    assert many < 0.01 * truth.norm()


def test_thirty_repeats_are_bitwise_equal(engine, seed):
    inputs = testing.kd_inputs("both receive gradients", tokens=37, seed=seed, divergence="jensen_shannon")

    def once():
        return testing._evaluate(lambda **k: fastkd.kd_loss(**k, backend=engine, chunk_tokens=16), inputs, 0)

    first = once()
    for _ in range(30):
        assert all(torch.equal(x, first[name]) for name, x in once().items())


# ---- nothing is done for what needs no gradient ----


def gemms(function):
    """How many matrix products a call makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
    return sum(e.count for e in profile.key_averages() if e.key in names)


@pytest.mark.real
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frozen", range(16))
def test_a_frozen_input_gets_no_gradient_and_costs_no_gemm(backend, reduction, frozen, seed):
    names = [(side, field) for side in ("student", "teacher") for field in ("hidden", "weight")]
    inputs = testing.kd_inputs("both receive gradients", vocab=65, seed=seed)
    leaves = {name: getattr(inputs[name[0]], name[1]).detach() for name in names}
    grads = {}
    for needed in ([True] * 4, [not frozen & (1 << i) for i in range(4)]):
        for x, needs in zip(leaves.values(), needed, strict=True):
            x.grad = None
            x.requires_grad_(needs)
        sources = {s: Head(leaves[s, "hidden"], leaves[s, "weight"]) for s in ("student", "teacher")}

        def step(sources=sources, needed=needed):
            loss = fastkd.kd_loss(**sources, reduction=reduction, backend=backend).sum()
            if any(needed):
                loss.backward()

        count = gemms(step)
        again = 2 if reduction == "none" and any(needed) else 0  # the logits once more
        assert count == 2 + again + sum(needed)
        grads[tuple(needed)] = {n: x.grad for n, x in leaves.items()}
    full = grads[True, True, True, True]
    for (name, grad), needs in zip(grads[tuple(needed)].items(), needed, strict=True):
        assert torch.equal(grad, full[name]) if needs else grad is None


@pytest.mark.real
def test_no_grad_makes_no_gradient(backend, seed):
    inputs = testing.kd_inputs("both receive gradients", vocab=65, seed=seed)

    def quiet():
        with torch.no_grad():
            fastkd.kd_loss(**inputs, backend=backend)

    assert gemms(quiet) == 2


def test_a_frozen_head_has_no_accumulator(backend, seed, monkeypatch):
    def refuse(*args):
        raise AssertionError("dweight is being made")

    monkeypatch.setattr(chunks, "Accumulated", refuse)
    inputs = testing.kd_inputs("plain", seed=seed)
    inputs["student"].weight.requires_grad_(False)
    for reduction in ("none", "mean"):
        fastkd.kd_loss(**inputs, reduction=reduction, backend=backend).sum().backward()


def test_tied_heads(any_backend, seed):
    """One weight for student and teacher, which is the embedding too: its gradient is the sum of all of them."""
    m = testing._Maker(11, 67, (16, 16), torch.float32, seed, DEVICE)
    weight, ids, other = m.normal(67, 16, scale=0.5), m.ids(), m.normal(11, 16, grad=False)

    def dweight(w, loss):
        return torch.autograd.grad(loss(Head(w[ids] * 2, w), Head(other.to(w.dtype), w)), w)[0]

    def recipe(student, teacher):
        p, q = (formulas.materialise(x).softmax(-1) for x in (teacher, student))
        return formulas.jensen_shannon(p, q, 0.5).sum(-1).mean()

    def loss(student, teacher):
        return fastkd.kd_loss(student, teacher, "jensen_shannon", backend=any_backend, chunk_tokens=4)

    expected = dweight(weight.detach().double().requires_grad_(), recipe)
    torch.testing.assert_close(dweight(weight, loss).double(), expected, rtol=1e-4, atol=1e-6)


def test_result_dtype(any_backend):
    for dtype in (torch.float64, *DTYPES.values()):
        if dtype == torch.float64 and any_backend == "cpu":
            continue
        x = torch.randn(3, 5, dtype=dtype)
        assert fastkd.kd_loss(x, x.flip(0), backend=any_backend).dtype == accumulation(dtype)
