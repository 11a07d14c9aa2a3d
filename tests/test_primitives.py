"""token_stats and selected_log_probs: against the definition, and against what a user would write in plain torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from device import LOOKS, seeded

import fastkd
from fastkd import Head, testing

N, D, V = 13, 24, 1031  # odd, and a vocabulary that no tile divides
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(generator, *shape, scale=1.0, dtype=torch.float32):
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def head(g, dtype, **settings):
    return Head(normal(g, N, D, dtype=dtype), normal(g, V, D, scale=2 / math.sqrt(D), dtype=dtype), **settings)


def per_token(g, *shape):
    return torch.rand(shape or (N,), generator=g) * 2 + 0.5


# name -> arguments in which the feature matters far more than the tolerance
CASES = {
    "plain": lambda g, dtype: {"source": head(g, dtype)},
    "bias": lambda g, dtype: {"source": head(g, dtype, bias=normal(g, V, scale=2.0, dtype=dtype))},
    "softcap": lambda g, dtype: {"source": head(g, dtype, softcap=2.0)},
    "logit_scale": lambda g, dtype: {"source": head(g, dtype, logit_scale=0.4)},
    "all": lambda g, dtype: {
        "source": head(g, dtype, softcap=4.0, logit_scale=1.5, bias=normal(g, V, dtype=dtype)),
        "temperature": per_token(g),
    },
    "temperature": lambda g, dtype: {"source": head(g, dtype), "temperature": 2.5},
    "temperature per token": lambda g, dtype: {"source": head(g, dtype), "temperature": per_token(g)},
    "logits": lambda g, dtype: {"source": normal(g, N, V, scale=2.0, dtype=dtype), "temperature": per_token(g)},
    "batched heads": lambda g, dtype: {
        "source": Head(
            normal(g, 2, 3, 5, D, dtype=dtype),
            normal(g, 2, 3, 257, D, scale=0.4, dtype=dtype),
            normal(g, 2, 3, 257, dtype=dtype),
        ),
        "temperature": per_token(g, 2, 3, 5),
    },
    "one token": lambda g, dtype: {
        "source": Head(normal(g, 1, D, dtype=dtype), normal(g, V, D, scale=0.4, dtype=dtype))
    },
}


def case(name, dtype=torch.float32):
    return CASES[name](seeded(0), dtype)


def lead_and_vocab(source):
    if isinstance(source, Head):
        return source.hidden.shape[:-1], source.weight.shape[-2]
    return source.shape[:-1], source.shape[-1]


def with_backend(f, name):
    return lambda **kwargs: f(**kwargs, backend=name)


def smooth_stats(**kwargs):
    return tuple(fastkd.token_stats(**kwargs)[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_token_stats_against_the_definition(name, dtype, engine):
    inputs = case(name, dtype)
    testing.compare(with_backend(smooth_stats, engine), with_backend(smooth_stats, "reference"), inputs).check()
    got = fastkd.token_stats(**inputs, backend=engine)
    lead, _ = lead_and_vocab(inputs["source"])
    assert all(x.shape == lead and x.dtype == torch.float32 for x in got[:3])
    assert (got.argmax.shape, got.argmax.dtype) == (lead, torch.int64)
    # the argmax is the index of the largest logit
    at_argmax = fastkd.selected_log_probs(**inputs, ids=got.argmax.unsqueeze(-1), backend=engine).squeeze(-1)
    torch.testing.assert_close(at_argmax, got.max_log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", range(3), ids=fastkd.TokenStats._fields[:3])
@pytest.mark.parametrize("name", ["plain", "all", "logits"])
def test_gradients_of_one_statistic_alone(name, index, engine):
    """The others are not used; their cotangents are absent, not garbage."""

    def one(backend):
        return lambda **kwargs: fastkd.token_stats(**kwargs, backend=backend)[index]

    testing.compare(one(engine), one("reference"), case(name)).check()


@pytest.mark.parametrize("index", range(3), ids=fastkd.TokenStats._fields[:3])
def test_gradients_add_up(index, engine):
    """Together they give the sum of what each gives alone."""
    inputs = case("all")
    leaves = (inputs["source"].hidden, inputs["source"].weight, inputs["source"].bias)
    out = fastkd.token_stats(**inputs, backend=engine)
    u = [torch.rand(N) + 0.5 for _ in range(3)]
    each = [torch.autograd.grad(o, leaves, c, retain_graph=True) for o, c in zip(out, u)]
    both = torch.autograd.grad(out[:3], leaves, u)
    for together, *alone in zip(both, *each):
        torch.testing.assert_close(together, sum(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_selected_log_probs_against_the_definition(name, dtype, engine):
    inputs = case(name, dtype)
    lead, vocab = lead_and_vocab(inputs["source"])
    ids = torch.randint(vocab, (*lead, 6))
    ids[..., 3] = ids[..., 1]  # twice: both count
    ids[..., 0], ids[..., 5] = 0, vocab - 1
    f = fastkd.selected_log_probs
    testing.compare(with_backend(f, engine), with_backend(f, "reference"), {**inputs, "ids": ids}).check()
    assert torch.equal(f(**inputs, ids=ids, backend=engine), f(**inputs, ids=ids.int(), backend=engine))


@pytest.mark.parametrize("k", [1, 0, "all"])
def test_one_none_and_all_entries(k, engine):
    inputs = case("plain")
    ids = torch.arange(V).expand(N, V) if k == "all" else torch.randint(V, (N, k))
    got = fastkd.selected_log_probs(**inputs, ids=ids, backend=engine)
    source = inputs["source"]
    want = F.linear(source.hidden.double(), source.weight.double()).log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    u = torch.rand(got.shape)
    grads = torch.autograd.grad(got, (source.hidden, source.weight), u)
    for g, w in zip(grads, torch.autograd.grad(want, (source.hidden, source.weight), u.double())):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    if k == "all":
        torch.testing.assert_close(got.exp().sum(-1), torch.ones(N))


def test_the_recipes_that_the_docstrings_give(any_backend):
    g = seeded(0)
    source, ids = head(g, torch.float32, bias=normal(g, V)), torch.randint(V, (N, 4), generator=g)
    leaves = (source.hidden, source.weight, source.bias)
    logits = F.linear(*leaves).double() / 1.7
    log_q = F.log_softmax(logits, -1)
    want = (torch.logsumexp(logits, -1), -(log_q.exp() * log_q).sum(-1), log_q.max(-1).values, log_q.gather(-1, ids))
    got = (
        *fastkd.token_stats(source, temperature=1.7, backend=any_backend)[:3],
        fastkd.selected_log_probs(source, ids, temperature=1.7, backend=any_backend),
    )
    for x, y in zip(got, want):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
        u = torch.rand(x.shape)
        for a, b in zip(
            torch.autograd.grad(x, leaves, u, retain_graph=True),
            torch.autograd.grad(y, leaves, u.double(), retain_graph=True),
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_float64_on_the_backends_that_have_it():
    inputs = case("all", torch.float64)
    ids = torch.randint(V, (N, 3))
    for f, extra in ((smooth_stats, {}), (fastkd.selected_log_probs, {"ids": ids})):
        testing.compare(with_backend(f, "torch"), with_backend(f, "reference"), {**inputs, **extra}).check()
        assert with_backend(f, None)(**inputs, **extra)[0].dtype == torch.float64


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 64])
def test_chunks_do_not_matter(chunk, engine):
    inputs, ids = case("all"), torch.randint(V, (N, 4))
    leaves = (inputs["source"].hidden, inputs["source"].weight, inputs["source"].bias)
    results = []
    for tokens in (None, chunk):
        stats = fastkd.token_stats(**inputs, chunk_tokens=tokens, backend=engine)
        out = (*stats[:3], fastkd.selected_log_probs(**inputs, ids=ids, chunk_tokens=tokens, backend=engine))
        grads = torch.autograd.grad(out, leaves, [torch.linspace(0.5, 1.5, o.numel()).view(o.shape) for o in out])
        results.append((*out, *grads, stats.argmax))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


# --- edges ---------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_one(engine):
    h, w = torch.randn(3, D, requires_grad=True), torch.randn(1, D, requires_grad=True)
    stats = fastkd.token_stats(Head(h, w), backend=engine)
    torch.testing.assert_close(stats.lse, (h @ w.t()).squeeze(-1))
    selected = fastkd.selected_log_probs(Head(h, w), torch.zeros(3, 2, dtype=torch.long), backend=engine)
    for zero in (stats.entropy, stats.max_log_prob, stats.argmax.float(), selected):
        assert not zero.any()
    for g in torch.autograd.grad(stats.entropy.sum() + stats.max_log_prob.sum() + selected.sum(), (h, w)):
        assert g.abs().max() < 1e-5
    (g,) = torch.autograd.grad(fastkd.token_stats(Head(h, w), backend=engine).lse.sum(), h)
    torch.testing.assert_close(g, w.detach().expand(3, D))


def test_uniform_and_one_hot_rows(engine):
    x = torch.zeros(3, V)
    x[1, 1000] = 1e4
    x[2] = 1e4
    x.requires_grad_()
    stats = fastkd.token_stats(x, backend=engine)
    torch.testing.assert_close(stats.entropy, torch.tensor([math.log(V), 0.0, math.log(V)]))
    torch.testing.assert_close(stats.max_log_prob, torch.tensor([-math.log(V), 0.0, -math.log(V)]))
    torch.testing.assert_close(stats.lse, torch.tensor([math.log(V), 1e4, 1e4 + math.log(V)]))
    assert stats.argmax[1] == 1000
    (g,) = torch.autograd.grad(stats.entropy.sum(), x)
    assert g.abs().max() < 1e-5  # both are extrema


def test_ties_go_to_the_first(engine):
    x = torch.randn(4, V).clamp(max=3)
    x[0, [5, 700, 1030]] = 4.0
    x[1, [0, 1]] = 4.0
    x[2, [1029, 1030]] = 4.0
    x[3] = -2.0
    x.requires_grad_()
    stats = fastkd.token_stats(x, backend=engine)
    assert stats.argmax.tolist() == [5, 0, 1029, 0]
    (g,) = torch.autograd.grad(stats.max_log_prob.sum(), x)
    one_hot = F.one_hot(stats.argmax, V)
    torch.testing.assert_close(g, one_hot - x.detach().softmax(-1), rtol=1e-4, atol=1e-6)


def test_argmax_is_not_differentiable(engine):
    stats = fastkd.token_stats(**case("plain"), backend=engine)
    assert [x.requires_grad for x in stats] == [True, True, True, False]


@pytest.mark.parametrize("dead", [slice(0, 600), slice(300, 800), slice(500, None), slice(0, 1030), slice(0, None, 2)])
def test_entries_of_minus_infinity(dead, engine):
    x = torch.randn(3, V)
    x[1, dead] = -torch.inf
    x.requires_grad_()
    alive = torch.isfinite(x[1])
    ids = torch.stack((alive.nonzero()[0], alive.nonzero()[-1], (~alive).nonzero()[0]), -1).expand(3, 3)

    def outputs(name, x):
        stats = fastkd.token_stats(x, backend=name)
        return stats, fastkd.selected_log_probs(x, ids, backend=name)

    stats, selected = outputs(engine, x)
    compressed = F.log_softmax(x.detach()[1][alive].double(), -1)
    torch.testing.assert_close(stats.entropy[1].double(), -(compressed.exp() * compressed).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.max_log_prob[1].double(), compressed.max(), rtol=1e-5, atol=1e-6)
    assert stats.argmax[1] == alive.nonzero().squeeze(-1)[compressed.argmax()]
    assert selected[1].isneginf().tolist() == [False, False, True]
    (g,) = torch.autograd.grad(stats.lse.sum() + stats.entropy.sum() + stats.max_log_prob.sum(), x)
    x64 = x.detach().double().requires_grad_()
    want = outputs("reference", x64)[0]
    (g64,) = torch.autograd.grad(want.lse.sum() + want.entropy.sum() + want.max_log_prob.sum(), x64)
    assert g.isfinite().all() and not g[1, ~alive].any()
    torch.testing.assert_close(g[1, alive].double(), g64[1, alive], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g[[0, 2]].double(), g64[[0, 2]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(value, engine):
    x = torch.randn(3, V)
    x[1, 700] = value
    stats = fastkd.token_stats(x, backend=engine)
    selected = fastkd.selected_log_probs(x, torch.tensor([[3, 9]] * 3), backend=engine)
    for out in (stats.entropy, stats.max_log_prob, selected):
        assert out[1].isnan().any() or (value == torch.inf and not out[1].isfinite().all())
        assert out[[0, 2]].isfinite().all()
    rest = fastkd.token_stats(x[[0, 2]], backend=engine)
    assert torch.equal(stats.entropy[[0, 2]], rest.entropy)


def test_no_tokens(any_backend):
    h, w = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    stats = fastkd.token_stats(Head(h, w), backend=any_backend)
    assert [x.shape for x in stats] == [(0,)] * 4
    selected = fastkd.selected_log_probs(Head(h, w), torch.zeros(0, 3, dtype=torch.long), backend=any_backend)
    assert selected.shape == (0, 3)
    grads = torch.autograd.grad(stats.entropy.sum() + selected.sum(), (h, w))
    assert grads[0].shape == (0, D) and torch.equal(grads[1], torch.zeros(V, D))


def test_inputs_stay_as_they_are(engine):
    inputs, ids = case("all"), torch.randint(V, (N, 4))
    tensors = (inputs["source"].hidden, inputs["source"].weight, inputs["source"].bias, inputs["temperature"], ids)
    kept = [x.detach().clone() for x in tensors]
    stats = fastkd.token_stats(**inputs, backend=engine)
    out = stats.entropy.sum() + fastkd.selected_log_probs(**inputs, ids=ids, backend=engine).sum()
    out.backward()
    assert all(map(torch.equal, tensors, kept)) and all(x._version == 0 for x in tensors[:3])


# --- errors --------------------------------------------------------------------------------------------------------


@LOOKS
@pytest.mark.parametrize("bad", [V, -1, -100, 2**40])
def test_ids_out_of_range(bad, any_backend):
    ids = torch.zeros(N, 2, dtype=torch.long)
    ids[4, 1] = bad
    with pytest.raises(ValueError, match=rf"ids must be in \[0, {V}\).*got {bad} at index .*4, 1"):
        fastkd.selected_log_probs(**case("plain"), ids=ids, backend=any_backend)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"ids": torch.zeros(N, 2)}, TypeError, "ids must be int64 or int32, got torch.float32"),
        (
            {"ids": torch.zeros(N + 1, 2, dtype=torch.long)},
            ValueError,
            r"ids must be \[..., K\].*\[13\], got \[14, 2\]",
        ),
        ({"ids": torch.tensor(3)}, ValueError, r"ids must be \[..., K\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and above 0, got 0"),
        pytest.param({"temperature": torch.zeros(N)}, ValueError, "above 0, got 0.0 at index", marks=LOOKS),
        ({"temperature": torch.ones(N + 1)}, ValueError, r"temperature must have shape \[13\].*got \[14\]"),
        ({"source": [1.0]}, TypeError, "source must be .*got list"),
        ({"source": torch.zeros(N, V, dtype=torch.long)}, TypeError, "got torch.int64"),
        ({"source": torch.zeros(N, 0)}, ValueError, "vocabulary of at least 1"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {**case("plain"), "ids": torch.zeros(N, 2, dtype=torch.long), **change}
    with pytest.raises(error, match=message):
        fastkd.selected_log_probs(**arguments)
    if "ids" not in change:
        arguments.pop("ids")
        with pytest.raises(error, match=message):
            fastkd.token_stats(**arguments)
