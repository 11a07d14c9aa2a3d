"""Every op on inputs of every kind: empty, ignored, strided, meta; none is written, and no memory is read unwritten."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from device import DEVICE
from torch.utils import _pytree

import fastkd
from fastkd import Head, Labels, Mixture, Samples, testing
from fastkd.backends import BACKENDS
from fastkd.sources import TAILS

V, D = 37, 12
TILED = 1024 + 9  # a second tile of csrc/rows.cpp
INF, NAN = torch.inf, torch.nan


@dataclass(frozen=True)
class Op:
    """``make(maker)`` gives the arguments of ``call``, every float leaf requiring grad."""

    make: Callable
    call: Callable
    fused: bool = True  # has a backend argument


def _sources(m, teacher_grad=True):
    return {"student": m.head(D, True), "teacher": m.head(D + 1, teacher_grad)}


def _kd(**kwargs):
    return lambda reduction="none", **x: fastkd.kd_loss(**x, **kwargs, reduction=reduction)


def _top_k(m, tail="bucket"):
    """More entries than tokens, so that a row is what is expanded; every row with the tail that the entries leave."""
    return replace(m.top_k(9, tail), log_tail=None)


OPS = {
    "kd_loss of heads": Op(_sources, _kd()),
    "kd_loss of logits": Op(
        lambda m: {"student": m.logits(True), "teacher": m.logits(True)}, _kd(divergence="reverse_kl")
    ),
    "kd_loss in general": Op(
        lambda m: {"student": m.head(D, True), "teacher": m.logits(True)}, _kd(divergence="skew_kl")
    ),
    "kd_loss with labels": Op(lambda m: _sources(m) | {"labels": m.ids()}, _kd(label_weight=0.5)),
    **{
        f"kd_loss of TopK, {tail}": Op(
            lambda m, tail=tail: {"student": m.head(D, True), "teacher": _top_k(m, tail)}, _kd()
        )
        for tail in TAILS
    },
    "kd_loss of logits and TopK": Op(
        lambda m: {"student": m.logits(True), "teacher": _top_k(m)}, _kd(divergence="jensen_shannon")
    ),
    "kd_loss of Samples": Op(
        lambda m: {"student": m.head(D, True), "teacher": Samples(m.ids(m.tokens, 3), torch.ones(m.tokens, 3) / 3)},
        _kd(),
    ),
    "kd_loss of a Mixture": Op(
        lambda m: {
            "student": m.head(D, True),
            "teacher": Mixture([m.head(D + 1, False), _top_k(m, "uniform"), Labels(m.ids())]),
        },
        _kd(divergence="reverse_kl"),
    ),
    "kd_loss of Labels": Op(lambda m: {"student": m.head(D, True), "teacher": Labels(m.ids())}, _kd()),
    "token_stats": Op(lambda m: {"source": m.head(D, True)}, lambda **x: torch.stack(fastkd.token_stats(**x)[:3], -1)),
    "selected_log_probs": Op(
        lambda m: {"source": m.head(D, True), "ids": m.ids(m.tokens, 3)}, lambda **x: fastkd.selected_log_probs(**x)
    ),
    "topk": Op(
        lambda m: {"source": m.peaked()},  # of entries that are near, rounding chooses
        lambda **x: torch.cat([y.flatten() for y in fastkd.topk(k=1, **x)[1:]]),
    ),
    "kl_div": Op(
        lambda m: {"input": m.logits(True), "target": m.logits(True)},
        lambda reduction="sum", **x: fastkd.kl_div(**x, reduction=reduction, log_target=True),
        fused=False,
    ),
}
KD = [name for name in OPS if name.startswith("kd_loss")]
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
kds = pytest.mark.parametrize("op", [OPS[n] for n in KD], ids=KD)


def made(op, seed=0, tokens=7, vocab=V, dtype=torch.float32):
    return op.make(testing._Maker(tokens, vocab, (D, D + 1), dtype, seed, DEVICE))


def learned(inputs):
    return [x for x in leaves(inputs) if x.requires_grad]


def leaves(inputs):
    return [x for x in _pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def called(op, inputs, backend, **kwargs):
    """Value, and the gradient of every float leaf under a non-uniform upstream."""
    if op.fused:
        kwargs = {"backend": backend, **kwargs}
    value = op.call(**inputs, **kwargs)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    return value, torch.autograd.grad(value, learned(inputs), upstream, allow_unused=True)


# ---- empty, and nothing left ----


@kds
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean", "none"])
def test_no_tokens(any_backend, op, reduction):
    value, grads = called(op, made(op, tokens=0), any_backend, reduction=reduction)
    assert value.shape == ((0,) if reduction == "none" else ()) and not value.any()
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("lead", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_no_batch_no_head_no_query(any_backend, lead):
    inputs = {s: Head(torch.randn(*lead, D), torch.randn(*lead[:-1], V, D)) for s in ("student", "teacher")}
    inputs = _pytree.tree_map_only(torch.Tensor, lambda x: x.requires_grad_(), inputs)
    for reduction in ("none", "mean", "batchmean"):
        value, grads = called(OPS["kd_loss of heads"], inputs, any_backend, reduction=reduction)
        assert value.shape == (lead if reduction == "none" else ()) and not value.any()
        assert all(g is not None and not g.any() for g in grads)


def test_no_tokens_for_the_building_blocks(any_backend):
    for name, shape in (("token_stats", (0, 3)), ("selected_log_probs", (0, 3))):
        op = OPS[name]
        value, grads = called(op, made(op, tokens=0), any_backend)
        assert value.shape == shape and all(g is not None and not g.any() for g in grads)
    op = OPS["selected_log_probs"]
    inputs = made(op) | {"ids": torch.empty(7, 0, dtype=torch.int64)}
    assert called(op, inputs, any_backend)[0].shape == (7, 0)


@kds
@pytest.mark.parametrize("how", ["weights", "mask", "labels"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_all_ignored(any_backend, op, how, reduction):
    inputs = made(op)
    if how == "labels" and isinstance(inputs["teacher"], Labels):
        inputs["teacher"] = Labels(torch.full((7,), -100))
    elif how == "labels":
        inputs["labels"] = torch.full((7,), -100)
    else:
        inputs["weights"] = torch.zeros(7, dtype=torch.bool if how == "mask" else torch.float32)
    value, grads = called(op, inputs, any_backend, reduction=reduction)
    assert value.shape == ((7,) if reduction == "none" else ()) and not value.any()
    assert all(g is not None and not g.any() for g in grads)


@kds
@pytest.mark.parametrize("how", ["weights", "mask", "labels"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_ignored_rows_may_hold_anything(engine, op, how, reduction, poison):
    check_ignored(engine, op, how, reduction, poison)


@kds
def test_ignored_rows_may_hold_anything_in_the_reference(op):
    for how in ("weights", "labels"):
        check_ignored("reference", op, how, "mean", NAN)


def check_ignored(backend, op, how, reduction, poison):
    inputs, ignored = made(op), torch.tensor([0, 3, 6])
    if how == "labels":
        teacher = inputs["teacher"]
        ids = (teacher.ids if isinstance(teacher, Labels) else inputs.get("labels", torch.arange(7))).clone()
        ids[ignored] = -100
        inputs |= {"teacher": Labels(ids)} if isinstance(teacher, Labels) else {"labels": ids}
    else:
        inputs["weights"] = torch.ones(7).index_fill(0, ignored, 0.0)
        inputs["weights"] = inputs["weights"].bool() if how == "mask" else inputs["weights"] * 0.7
    clean = called(op, inputs, backend, reduction=reduction)
    for source in (inputs["student"], inputs["teacher"]):
        x = source.hidden if isinstance(source, Head) else source
        if isinstance(x, torch.Tensor):
            with torch.no_grad():
                x[ignored] = poison
    poisoned = called(op, inputs, backend, reduction=reduction)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    rows = [g for g in poisoned[1] if g.shape[0] == 7]
    assert rows and not any(g[ignored].any() for g in rows)


# ---- strides ----


def _expanded(x):
    """One row for all; of a weight [V, D] one column, because equal rows would make ties for argmax."""
    return (x[:1] if x.shape[0] < x.shape[1] else x[:, :1]).expand(x.shape)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced columns": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "sliced rows": lambda x: torch.cat([x, x])[::2],
    "expanded": _expanded,
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "negative": lambda x: x.flip(0).flip(0),
}


@ops
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layouts(backend, op, layout, dtype):
    def laid(x):
        return LAYOUTS[layout](x.detach()) if x.dim() == 2 else x.detach()

    original = made(op, dtype=dtype)
    strided = _pytree.tree_map_only(torch.Tensor, laid, original)
    compact = _pytree.tree_map_only(torch.Tensor, lambda x: x.clone(memory_format=torch.contiguous_format), strided)
    for inputs in (strided, compact):
        for x, like in zip(leaves(inputs), leaves(original), strict=True):
            x.requires_grad_(like.requires_grad)
    # the products of a GEMM may be summed in another order
    torch.testing.assert_close(
        called(op, strided, backend),
        called(op, compact, backend),
        rtol=1e-4 if dtype == torch.float32 else 2e-2,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", [n for n in OPS if n != "kl_div"])
def test_expanded_upstream(backend, name):
    op = OPS[name]
    inputs = made(op)
    value = op.call(**inputs, backend=backend)
    xs = learned(inputs)
    for upstream in (torch.ones(()).expand(value.shape), torch.rand(*value.shape, 2)[..., 0]):
        got = torch.autograd.grad(value, xs, upstream, retain_graph=True)
        expected = torch.autograd.grad(value, xs, upstream.contiguous(), retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@ops
def test_inputs_and_upstream_are_not_written(any_backend, op):
    inputs = made(op, vocab=TILED)
    tensors = [x for x in _pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor)]
    kwargs = {"backend": any_backend} if op.fused else {}
    for more in ({"reduction": "none"}, {"reduction": "sum"}) if "student" in inputs else ({},):
        before = [x.detach().clone() for x in tensors]
        value = op.call(**inputs, **kwargs, **more)
        upstream = torch.rand(value.shape)
        copy = upstream.clone()
        first = torch.autograd.grad(value, learned(inputs), upstream, retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(value, learned(inputs), 2 * upstream, retain_graph=True)
        assert torch.equal(upstream, copy)
        assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True)), "an input was written"
        assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True)), "a gradient given out was written"
        torch.testing.assert_close(second, tuple(2 * g for g in first), rtol=1e-5, atol=1e-7)


@ops
@pytest.mark.parametrize("ignored", [False, True])
def test_no_memory_is_read_before_it_is_written(engine, op, ignored, monkeypatch):
    """torch.empty full of NaN changes nothing."""
    inputs = made(op, vocab=TILED, dtype=torch.bfloat16)
    if ignored and "student" in inputs:
        inputs["weights"] = torch.tensor([0.0, 1, 1, 0, 1, 1, 0])
    kwargs = {"chunk_tokens": 2} if op.fused else {}
    clean = called(op, inputs, engine, **kwargs)

    def poisoned(make):
        def full(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(NAN if x.is_floating_point() else 77) if x.device.type == "cpu" else x

        return full

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    if op.fused:
        rows = BACKENDS[engine].rows()
        monkeypatch.setattr(rows, "empty", poisoned(rows.empty))
    torch.testing.assert_close(called(op, inputs, engine, **kwargs), clean, rtol=0, atol=0)


# ---- meta tensors ----


@pytest.mark.parametrize("name", [n for n in OPS if n != "kl_div"])
def test_meta_tensors(any_backend, name):
    """Shapes and dtypes as on a real device, without memory."""
    op = OPS[name]
    real = made(op, dtype=torch.bfloat16)
    meta = _pytree.tree_map_only(torch.Tensor, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad), real)
    got, expected = (op.call(**inputs, backend=any_backend) for inputs in (meta, real))
    assert got.device.type == "meta"
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    for g, x in zip(torch.autograd.grad(got.sum(), learned(meta)), learned(meta), strict=True):
        assert (g.device.type, g.shape, g.dtype) == ("meta", x.shape, x.dtype)
    if name in KD:
        assert op.call(**meta, reduction="mean", backend=any_backend).shape == ()
