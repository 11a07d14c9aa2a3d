"""kd_loss against the recipes that people write today, in plain PyTorch: what every convention means."""

import math

import formulas
import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from formulas import kl, materialise, per_token_kl

import fastkd
from fastkd import Head, Labels, chunks, testing
from fastkd import divergences as D


def batch(seed, *lead, vocab=53, grad=True):
    """Logits [*lead, V] of student and teacher."""
    m = testing._Maker(1, vocab, (0, 0), torch.float32, seed, DEVICE)
    return {"student": m.normal(*lead, vocab, scale=2.0), "teacher": m.normal(*lead, vocab, scale=2.0, grad=grad)}


def heads(seed, tokens=11, vocab=53, d=(12, 20), bias=False):
    """Two heads of different hidden sizes."""
    m = testing._Maker(tokens, vocab, d, torch.float32, seed, DEVICE)

    def head(d):
        return Head(m.normal(tokens, d), m.normal(vocab, d, scale=2 * d**-0.5), m.normal(vocab) if bias else None)

    return {"student": head(d[0]), "teacher": head(d[1])}


def follows(backend, recipe, inputs, **settings):
    """kd_loss(**inputs, **settings) is recipe(**inputs), in value and in every gradient."""

    def op(**kwargs):
        return fastkd.kd_loss(**kwargs, **settings, chunk_tokens=4, backend=backend)

    testing.compare(op, recipe, inputs).check()


# ---- reductions and T^2: F.kl_div's recipes ----


def test_kl_div_batchmean_of_a_classifier(any_backend, seed):
    def hinton(student, teacher, T=3.0):
        q, p = F.log_softmax(student / T, -1), F.softmax(teacher / T, -1)
        return F.kl_div(q, p, reduction="batchmean") * T * T

    inputs = batch(seed, 9)
    follows(any_backend, hinton, inputs, temperature=3.0, t_squared=True, reduction="batchmean")


def test_kl_div_batchmean_of_sequences_divides_by_the_sequences(any_backend, seed):
    def recipe(student, teacher):
        return F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), reduction="batchmean")

    inputs = batch(seed, 3, 5)
    follows(any_backend, recipe, inputs, reduction="batchmean")
    per_token = fastkd.kd_loss(**inputs, backend=any_backend)
    torch.testing.assert_close(fastkd.kd_loss(**inputs, backend=any_backend, reduction="batchmean"), 5 * per_token)


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions_for_any_leading_dimensions(any_backend, lead, reduction, seed):
    def recipe(student, teacher):
        loss = per_token_kl(student, teacher)
        return {"none": loss, "sum": loss.sum(), "mean": loss.mean(), "batchmean": loss.sum() / (lead or (1,))[0]}[
            reduction
        ]

    follows(any_backend, recipe, batch(seed, *lead), reduction=reduction)


def test_t_squared_multiplies_value_and_gradient(any_backend, seed):
    """Also for a temperature per token: each token by its own."""
    T = torch.rand(9) * 3 + 0.5

    def recipe(student, teacher):
        t = T.unsqueeze(-1)
        return (per_token_kl(student, teacher, t) * T**2).mean()

    follows(any_backend, recipe, batch(seed, 9), temperature=T, t_squared=True)


def test_teacher_temperature_and_centre(any_backend, seed):
    """DINO: the teacher centred and sharpened, cross-entropy."""
    m = testing._Maker(11, 53, (12, 20), torch.float32, seed, DEVICE)
    inputs, centre = heads(seed), m.normal(53)
    inputs["teacher"] = Head(inputs["teacher"].hidden, inputs["teacher"].weight, -centre.detach())

    def recipe(student, teacher):
        p = F.softmax((teacher.hidden @ teacher.weight.T + teacher.bias) / 0.4, -1)
        return -(p * F.log_softmax(materialise(student) / 0.9, -1)).sum(-1).mean()

    settings = {"divergence": "cross_entropy", "temperature": 0.9, "teacher_temperature": 0.4}
    follows(any_backend, recipe, inputs, **settings)


# ---- weights, labels ----


def test_weights(any_backend, seed):
    w = torch.rand(3, 4)
    w[0] = 0
    follows(any_backend, lambda **x: (w * per_token_kl(**x)).sum() / w.sum(), batch(seed, 3, 4), weights=w)
    mask = w > 0.5
    for reduction, recipe in {
        "mean": lambda **x: per_token_kl(**x)[mask].mean(),
        "sum": lambda **x: per_token_kl(**x)[mask].sum(),
        "batchmean": lambda **x: per_token_kl(**x)[mask].sum() / 3,
        "none": lambda **x: per_token_kl(**x) * mask,
    }.items():
        follows(any_backend, recipe, batch(seed, 3, 4), weights=mask, reduction=reduction)


@pytest.mark.parametrize("ignore_index", [-100, 0])  # 0: padding that is a token of the vocabulary
def test_labels_beside_the_teacher(any_backend, ignore_index, seed):
    y = torch.randint(1, 53, (11,))
    y[1::3] = ignore_index
    live = y != ignore_index

    def recipe(student, teacher, T=2.0, a=0.3):
        kd = per_token_kl(student, teacher, T)[live].mean() * T * T
        return (1 - a) * kd + a * F.cross_entropy(materialise(student), y, ignore_index=ignore_index)

    settings = {"temperature": 2.0, "t_squared": True, "label_weight": 0.3, "ignore_index": ignore_index}
    follows(any_backend, recipe, heads(seed), labels=y, **settings)


def test_label_weight_per_token(any_backend, seed):
    y, a = torch.randint(53, (2, 5)), torch.rand(2, 5)
    a[0, 0], a[1, 1] = 0, 1

    def recipe(student, teacher):
        ce = F.cross_entropy(student.flatten(0, 1), y.flatten(), reduction="none").view(2, 5)
        return (1 - a) * per_token_kl(student, teacher) + a * ce

    follows(any_backend, recipe, batch(seed, 2, 5), labels=y.int(), label_weight=a, reduction="none")


def test_weight_of_a_label_reaches_it(any_backend, seed):
    """weights multiply the sum of both terms."""
    y, w = torch.randint(53, (9,)), torch.rand(9)

    def recipe(student, teacher):
        loss = 0.6 * per_token_kl(student, teacher) + 0.4 * F.cross_entropy(student, y, reduction="none")
        return (w * loss).sum() / w.sum()

    follows(any_backend, recipe, batch(seed, 9), labels=y, label_weight=0.4, weights=w)


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_a_teacher_of_labels_is_cross_entropy(any_backend, smoothing, seed):
    y = torch.randint(53, (11,))
    y[2::4] = -100

    def recipe(student, teacher=None):
        return F.cross_entropy(materialise(student) / 1.5, y, label_smoothing=smoothing)

    inputs = {"student": heads(seed, bias=True)["student"]}
    follows(any_backend, recipe, inputs, teacher=Labels(y, smoothing), temperature=1.5)


def test_two_micro_batches_with_num_tokens_make_one_batch(any_backend, seed):
    """With unequal counts of live tokens, where a mean of means is wrong."""
    inputs = heads(seed, tokens=12)
    y = torch.randint(53, (12,))
    y[:5] = -100
    student, teacher = inputs["student"], inputs["teacher"]
    leaves = (student.hidden, student.weight)
    settings = {"label_weight": 0.5, "backend": any_backend}
    whole = fastkd.kd_loss(student, teacher, labels=y, **settings)
    total, grads = 0.0, [torch.zeros_like(x) for x in leaves]
    for part in (slice(0, 6), slice(6, 12)):
        loss = fastkd.kd_loss(
            Head(student.hidden[part], student.weight),
            Head(teacher.hidden[part], teacher.weight),
            labels=y[part],
            num_tokens=int((y != -100).sum()),
            **settings,
        )
        total += loss.item()
        for g, x in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            g += x
    torch.testing.assert_close(total, whole.item(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grads, list(torch.autograd.grad(whole, leaves)), rtol=1e-4, atol=1e-6)
    as_tensor = fastkd.kd_loss(student, teacher, labels=y, num_tokens=torch.tensor(7), **settings)
    assert as_tensor.item() == whole.item()


# ---- heads ----


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_softcap_and_logit_scale(any_backend, side, seed):
    """Gemma's soft cap, Cohere's scale, and both: scaled first, capped then; the bias goes in before."""

    def raw(head):
        return F.linear(head.hidden, head.weight, head.bias)

    for cap, scale in ((2.0, 1.0), (None, 0.3), (2.0, 0.7)):
        inputs = heads(seed, bias=True)
        x = inputs[side]
        inputs[side] = Head(x.hidden, x.weight, x.bias, softcap=cap, logit_scale=scale)

        def recipe(student, teacher, cap=cap, scale=scale):
            z = {"student": raw(student), "teacher": raw(teacher)}
            z[side] = z[side] * scale
            if cap is not None:
                z[side] = cap * torch.tanh(z[side] / cap)
            return per_token_kl(**z).mean()

        follows(any_backend, recipe, inputs)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_one_side_logits_the_other_a_head(any_backend, side, seed):
    inputs = heads(seed) | {side: batch(seed, 11)[side]}
    follows(any_backend, lambda **x: per_token_kl(**x).mean(), inputs, reduction="mean")


def test_attention_maps(any_backend, seed):
    """MiniLM, TinyBERT: KL of softmax(Q K^T / sqrt(d)) per head, student and teacher with other widths."""
    m = testing._Maker(6, 9, (8, 4), torch.float32, seed, DEVICE)

    def source(d):
        return Head(m.normal(2, 3, 6, d), m.normal(2, 3, 9, d), logit_scale=d**-0.5)

    def recipe(student, teacher):
        p, q = (torch.softmax(x.hidden @ x.weight.mT / math.sqrt(x.hidden.shape[-1]), -1) for x in (teacher, student))
        return kl(p, q).sum(-1)

    inputs = {"student": source(8), "teacher": source(4)}
    follows(any_backend, recipe, inputs, reduction="none")
    follows(any_backend, lambda **x: recipe(**x).mean(), inputs)


def test_in_batch_similarity(any_backend, seed):
    """InfoNCE: labels over a head that is the other side's embeddings."""
    m = testing._Maker(8, 8, (16, 16), torch.float32, seed, DEVICE)
    inputs = {"student": Head(F.normalize(m.normal(8, 16).detach()).requires_grad_(), m.normal(8, 16))}

    def recipe(student, teacher=None):
        return F.cross_entropy(student.hidden @ student.weight.T / 0.07, torch.arange(8))

    follows(any_backend, recipe, inputs, teacher=Labels(torch.arange(8)), temperature=0.07)


@pytest.mark.parametrize("larger", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("kind", ["heads", "logits"])
def test_vocabularies_of_different_size(any_backend, larger, divergence, kind, seed):
    """truncate: the first entries of both, renormalised. pad: entries that one lacks have logit -inf, never 0."""
    sizes = {"student": 40, "teacher": 40, larger: 53}
    inputs = {
        s: heads(seed, vocab=v, bias=True)[s] if kind == "heads" else batch(seed, 11, vocab=v)[s]
        for s, v in sizes.items()
    }
    with pytest.raises(ValueError, match=f"same vocabulary, got {sizes['student']} and {sizes['teacher']}"):
        fastkd.kd_loss(**inputs, backend=any_backend)
    term = formulas.FORMULAS[divergence][1]

    def truncated(student, teacher):
        p, q = (materialise(x)[:, :40].softmax(-1) for x in (teacher, student))
        return term(p, q).sum(-1).mean()

    follows(any_backend, truncated, inputs, divergence=divergence, vocab="truncate")

    def padded(student, teacher):
        z = [F.pad(materialise(x), (0, 53 - materialise(x).shape[-1]), value=-300) for x in (teacher, student)]
        return term(*(x.softmax(-1) for x in z)).sum(-1).mean()

    infinite = {("student", "reverse_kl"), ("teacher", "forward_kl")}  # mass where the other has none
    if (larger, divergence) in infinite:
        assert fastkd.kd_loss(**inputs, divergence=divergence, vocab="pad", backend=any_backend) == math.inf
    else:
        follows(any_backend, padded, inputs, divergence=divergence, vocab="pad")


# ---- other libraries' divergences ----


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gkd_as_in_trl(any_backend, beta, seed):
    def recipe(student, teacher):
        log_q, log_p = F.log_softmax(student / 0.9, -1), F.log_softmax(teacher / 0.9, -1)
        parts = [log_q + math.log(1 - beta), log_p + math.log(beta)]
        log_m = torch.logsumexp(torch.stack(parts), dim=0)
        left = F.kl_div(log_m, log_p, reduction="none", log_target=True)
        right = F.kl_div(log_m, log_q, reduction="none", log_target=True)
        return (beta * left + (1 - beta) * right).sum() / 11

    follows(any_backend, recipe, batch(seed, 11), divergence=D.JensenShannon(beta), temperature=0.9)


def test_distillm_as_in_its_code(any_backend, seed):
    def skewed_forward(student, teacher, lam=0.1):
        p, q = F.softmax(teacher, -1), F.softmax(student, -1)
        mixed = lam * p + (1 - lam) * q
        return -(p * mixed.log()).sum(-1).mean() + (p * p.log()).sum(-1).mean()  # its code leaves out the entropy

    def skewed_reverse(student, teacher, lam=0.1):
        p, q = F.softmax(teacher, -1), F.softmax(student, -1)
        mixed = (1 - lam) * p + lam * q
        return -(q * mixed.log()).sum(-1).mean() + (q * q.log()).sum(-1).mean()

    follows(any_backend, skewed_forward, batch(seed, 11), divergence=D.SkewKL(0.1))
    follows(any_backend, skewed_reverse, batch(seed, 11), divergence=D.SkewReverseKL(0.1))


# ---- a whole distillation ----


def test_a_short_distillation_follows_the_recipe(any_backend, seed, monkeypatch):
    """The loss curves agree, and they fall."""
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", (16, 16))
    m = testing._Maker(48, 211, (24, 32), torch.float32, seed, DEVICE)
    x, teacher = m.normal(48, 12, grad=False), m.head(32, False)

    def curve(loss):
        torch.manual_seed(seed % 2**31)
        body, head = torch.nn.Linear(12, 24), torch.nn.Linear(24, 211)
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=3e-2)
        losses = []
        for _ in range(40):
            value = loss(Head(body(x).tanh(), head.weight, head.bias))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        return torch.tensor(losses)

    fused = curve(lambda s: fastkd.kd_loss(s, teacher, temperature=2.0, t_squared=True, backend=any_backend))
    recipe = curve(lambda s: 4 * per_token_kl(s, teacher, 2.0).mean())
    torch.testing.assert_close(fused, recipe, rtol=2e-3, atol=0)
    assert fused[-1] < fused[0] / 2
