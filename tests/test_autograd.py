"""What a backward leaves behind, who gets a gradient, layouts, dtypes, and the rest of autograd."""

import copy
import itertools
import pickle

import pytest
import torch
from autograd_cases import (
    LABELS,
    OPS,
    assert_all_near,
    assert_near,
    heads,
    inputs,
    kd_op,
    one_thread,  # noqa: F401  (a fixture for every test here)
    op_of,
    rand_like,
    reference,
)
from device import KIND
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import Head, Labels, backends, divergences, normal_form, targets
from fastkd.divergences import ForwardKL, JensenShannon

# --- backward more than once, and what it leaves behind ------------------------------------------------------------


@kd_op
@pytest.mark.parametrize("upstream", [None, 1.0, -2.5])
def test_retained_graph(op, upstream, backend):
    """Every backward gives the same, and none touches what an earlier one gave."""
    a = inputs()
    out = OPS[op](*a, backend=backend)
    u = torch.ones_like(out) if upstream is None else torch.full_like(out, upstream)
    first = torch.autograd.grad(out, a, u, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(out, a, u, retain_graph=True)
    assert all(map(torch.equal, second, kept))
    for g in (*first, *second):
        g.mul_(3).add_(1)  # what came out belongs to the caller
    third = torch.autograd.grad(out, a, u, retain_graph=True)
    assert all(map(torch.equal, third, kept))
    fourth = torch.autograd.grad(out, a, -2 * u)
    assert_all_near(fourth, [-2 * k.double() for k in kept])
    assert all(map(torch.equal, third, kept))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, a, u)


@kd_op
def test_grad_accumulates_over_retained_backwards(op, backend):
    a = inputs()
    out = OPS[op](*a, backend=backend)
    kept = torch.autograd.grad(out, a, torch.ones_like(out), retain_graph=True)
    for count in range(1, 4):
        out.backward(torch.ones_like(out), retain_graph=True)
        assert_all_near([x.grad for x in a], [count * k.double() for k in kept])
    for x in a:
        x.grad.zero_()  # in place, as zero_grad(set_to_none=False)
    out.backward(torch.ones_like(out))
    assert all(map(torch.equal, [x.grad for x in a], kept))


@kd_op
def test_two_losses_add_up_in_grad(op, backend):
    a = inputs()
    for seed in (0, 3):
        b = [x.detach() for x in inputs(seed=seed)]
        OPS[op](a[0], a[1], b[2], b[3], b[4], backend=backend).sum().backward()
    want = [torch.zeros(5, 4, dtype=torch.float64), torch.zeros(7, 4, dtype=torch.float64)]
    for seed in (0, 3):
        a64, b = inputs(torch.float64), inputs(torch.float64, grad=False, seed=seed)
        g = torch.autograd.grad(reference(op)(a64[0], a64[1], b[2], b[3], b[4]).sum(), a64[:2])
        want = [x + y for x, y in zip(want, g)]
    assert_all_near([a[0].grad, a[1].grad], want)


def test_create_graph_then_backward(backend):
    """A gradient penalty: the first gradients stay what they are while the second backward runs."""
    a, a64 = inputs(), inputs(torch.float64)
    for xs, name in ((a, backend), (a64, "reference")):
        loss = OPS["mean"](*xs, backend=name)
        (g,) = torch.autograd.grad(loss, xs[:1], create_graph=True)
        before = g.detach().clone()
        (loss + g.square().sum()).backward()
        assert torch.equal(g, before)
    assert_all_near([x.grad for x in a], [x.grad for x in a64], 1e-4)


def train(name, steps=4, accumulate=1, scaler=None, clip=None):
    """Weights after a few steps of an optimiser that works in place."""
    h, w, b, ht, wt = inputs(torch.float32 if name != "reference" else torch.float64, grad=False)
    model = torch.nn.Linear(4, 4, dtype=h.dtype)
    head = torch.nn.Linear(4, 7, dtype=h.dtype)
    with torch.no_grad():
        model.weight.copy_(w[:4])
        model.bias.copy_(h[0])
        head.weight.copy_(w)
        head.bias.copy_(b)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        for x, t in zip(h.chunk(accumulate), ht.chunk(accumulate)):
            student = Head(model(x), head.weight, head.bias)
            loss = fastkd.kd_loss(student, Head(t, wt), num_tokens=len(h), backend=name)
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}, {"clip": 0.05}, {"accumulate": 5, "clip": 0.1}])
def test_training_in_place(settings, backend):
    assert_all_near(train(backend, **settings), train("reference", **settings), 1e-4)


def test_training_with_a_loss_scale(backend):
    scaler = torch.amp.GradScaler(KIND, init_scale=2.0**16)
    assert_all_near(train(backend, scaler=scaler), train("reference"), 1e-4)
    assert scaler.get_scale() == 2.0**16  # no step was skipped


@pytest.mark.parametrize("teacher", [False, True])
def test_one_tensor_in_several_places(teacher, backend):
    """A tied weight, and a hidden state that both sides read: their gradients add up."""
    h, w, b, *_ = inputs()
    h64, w64, b64, *_ = inputs(torch.float64)

    def call(h, w, b, name):
        student, other = Head(h, w, b), Head(h * 0.5, w.flip(0)) if teacher else Head(h.detach(), w.flip(0), b)
        return fastkd.kd_loss(student, other, "reverse_kl", backend=name) + fastkd.kd_loss(student, other, backend=name)

    call(h, w, b, backend).backward()
    call(h64, w64, b64, "reference").backward()
    assert_all_near([h.grad, w.grad, b.grad], [h64.grad, w64.grad, b64.grad])


# --- who needs a gradient ------------------------------------------------------------------------------------------


class Needs(TorchDispatchMode):
    """Records which gradients the library op is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastkd.fused.default:
            self.asked.append([t for t, n in zip(args[0], args[2]) if n])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["mean", "none"])
def test_every_subset_of_requires_grad(op, backend):
    full = inputs()
    out = OPS[op](*full, backend=backend)
    want = torch.autograd.grad(out, full, torch.ones_like(out))
    for flags in itertools.product((False, True), repeat=5):
        a = [x.detach().clone().requires_grad_(flag) for x, flag in zip(full, flags)]
        with Needs() as needs:
            got = OPS[op](*a, backend=backend)
            assert torch.equal(got, out)
            assert got.requires_grad == any(flags)
            if any(flags):
                got.sum().backward()
        for x, flag, w in zip(a, flags, want):
            if flag:
                assert_near(x.grad, w.double(), 1e-6)
            else:
                assert x.grad is None
        assert sum(map(len, needs.asked)) == sum(flags)  # each gradient once, and no other


def test_backward_to_some_of_the_inputs(backend):
    a = inputs()
    want = torch.autograd.grad(OPS["none"](*a, backend=backend).sum(), a)
    (got,) = torch.autograd.grad(OPS["none"](*a, backend=backend).sum(), a[1:2])
    assert torch.equal(got, want[1])
    loss = OPS["mean"](*a, backend=backend)
    loss.backward(inputs=[a[0], a[4]])
    assert [x.grad is not None for x in a] == [True, False, False, False, True]
    assert_near(a[4].grad, torch.autograd.grad(OPS["mean"](*a, backend=backend), a[4])[0].double())


@pytest.mark.real
@op_of
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(op, mode, any_backend):
    a = inputs()
    want = OPS[op](*a, backend=any_backend)
    with mode(), Needs() as needs:
        got = OPS[op](*a, backend=any_backend)
    assert not got.requires_grad
    assert_near(got, want.detach().double(), 1e-6)
    assert not any(map(len, needs.asked))


def test_weights_that_require_grad(backend):
    a, a64 = inputs(), inputs(torch.float64)
    x = torch.tensor([0.5, 1.0, 0.25, 2.0, 0.75])
    for reduction in ("mean", "sum", "none"):
        results = []
        for xs, w, name in ((a, x.clone(), backend), (a64, x.double(), "reference")):
            w.requires_grad_()
            out = fastkd.kd_loss(*heads(*xs), weights=w, reduction=reduction, backend=name)
            results.append(torch.autograd.grad(out, (w, *xs), rand_like(out)))
        assert_all_near(*results)


SETTINGS = {
    "temperature": lambda x: {"temperature": x},
    "teacher_temperature": lambda x: {"teacher_temperature": x},
    "label_weight": lambda x: {"labels": LABELS, "label_weight": x},
    "the divergence's weights": lambda x: {"divergence": x * ForwardKL() + 0.5 * JensenShannon(0.3)},
    "the target's tensor 0": lambda x: {"target": targets.Interpolate(x)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_require_grad_are_served_by_the_definition(name):
    a = inputs()
    a[3:] = [x.detach() for x in a[3:]]
    x = torch.tensor([0.5, 0.9, 0.25, 0.6, 0.75], requires_grad=True)
    backends._warn_materialised.cache_clear()
    with pytest.warns(UserWarning, match=f"reference backend serves.*{name} requires grad"):
        out = fastkd.kd_loss(*heads(*a), **SETTINGS[name](x))
    got = torch.autograd.grad(out, (x, *a[:3]))
    a64 = [y.detach().double().requires_grad_(y.requires_grad) for y in a]
    x64 = x.detach().double().requires_grad_()
    want = torch.autograd.grad(
        fastkd.kd_loss(*heads(*a64), backend="reference", **SETTINGS[name](x64)), (x64, *a64[:3])
    )
    assert want[0].abs().max() > 1e-3
    assert_all_near(got, want)


# --- layouts, dtypes -----------------------------------------------------------------------------------------------


def strided(x, how):
    if how == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x
    if how == "sliced":
        big = torch.full([2 * n for n in x.shape], torch.nan, dtype=x.dtype)
        view = big[tuple(slice(0, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    padded = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)  # misaligned
    return padded.copy_(x)


@kd_op
@pytest.mark.parametrize("how", ["transposed", "sliced", "misaligned"])
def test_inputs_in_any_layout(op, how, backend):
    a = inputs()
    out = OPS[op](*a, backend=backend)
    want = torch.autograd.grad(out, a, torch.ones_like(out))
    b = [strided(x.detach(), how).requires_grad_() for x in a]
    copies = [x.detach().clone() for x in b]
    versions = [x._version for x in b]
    got_out = OPS[op](*b, backend=backend)
    got = torch.autograd.grad(got_out, b, torch.ones_like(out))
    assert_near(got_out, out.detach().double(), 1e-6)
    assert_all_near(got, [w.double() for w in want], 1e-5)
    assert all(map(torch.equal, b, copies))
    assert [x._version for x in b] == versions


@pytest.mark.parametrize("op", ["none", "logits, none"])
def test_upstream_gradients_in_any_layout(op, backend):
    a, a64 = inputs(), inputs(torch.float64)
    out, out64 = OPS[op](*a, backend=backend), reference(op)(*a64)
    for u in (torch.tensor(0.5).expand(5), torch.randn(5, 3)[:, 1], torch.randn(5).flip(0), torch.zeros(5)):
        kept = u.clone()
        got = torch.autograd.grad(out, a, u, retain_graph=True)
        want = torch.autograd.grad(out64, a64, u.double(), retain_graph=True)
        assert_all_near(got, want)
        assert torch.equal(u, kept)


def test_transposed_leading_dimensions_and_upstream(backend):
    h, w, _, ht, wt = inputs()
    h, ht = (torch.randn(3, 2, d).transpose(0, 1).requires_grad_() for d in (4, 3))
    u = torch.randn(3, 2).t()
    out = fastkd.kd_loss(Head(h, w), Head(ht, wt), reduction="none", backend=backend)
    got = torch.autograd.grad(out, (h, w, ht, wt), u)
    x64 = [x.detach().double().requires_grad_() for x in (h, w, ht, wt)]
    out64 = fastkd.kd_loss(Head(*x64[:2]), Head(*x64[2:]), reduction="none", backend="reference")
    assert_all_near(got, torch.autograd.grad(out64, x64, u.double()))


def test_expanded_inputs(backend):
    h, w, _, ht, wt = inputs()
    out = fastkd.kd_loss(Head(h[:1].expand(5, 4), w), Head(ht, wt), reduction="none", backend=backend)
    got = torch.autograd.grad(out, (h, w), torch.arange(5.0))
    h64, w64, _, ht64, wt64 = inputs(torch.float64)
    out64 = fastkd.kd_loss(Head(h64[:1].expand(5, 4), w64), Head(ht64, wt64), reduction="none", backend="reference")
    assert_all_near(got, torch.autograd.grad(out64, (h64, w64), torch.arange(5.0, dtype=torch.float64)))


@pytest.mark.parametrize("source", ["head", "logits", "float16 products"])
def test_a_loss_scale_reaches_float16_gradients_before_they_underflow(source, backend, monkeypatch):
    """Gradients near 1e-9 are 0 in float16, and 65536 times as large are not."""
    dtype = torch.float16
    if source == "float16 products":  # float32 inputs under float16 autocast, as on a GPU
        dtype = torch.float32
        monkeypatch.setattr(normal_form.DenseSource, "_compute_dtype", staticmethod(lambda name, head: torch.float16))

    def call(h, w, b, ht, wt, name):
        if source == "logits":
            return fastkd.kd_loss(w.t(), wt.t()[[0, 1, 2, 0]], num_tokens=1e7, backend=name)
        return fastkd.kd_loss(Head(h, w), Head(ht, wt), num_tokens=1e7, backend=name)

    a = inputs(dtype)
    loss = call(*a, backend)
    (65536 * loss).backward()
    monkeypatch.undo()
    a64 = inputs(torch.float64)
    call(*a64, "reference").backward()
    for x, x64 in zip(a[:2], a64[:2]):
        if x64.grad is not None:
            assert x64.grad.abs().max() < 1e-6
            assert_near(x.grad.double() / 65536, x64.grad, 5e-3)


# --- the rest of autograd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["mean", "none"])
def test_hooks(op, backend):
    a = inputs()
    seen = {}
    a[0].register_hook(lambda g: seen.setdefault("hidden", g.clone()) * 2)
    a[1].register_post_accumulate_grad_hook(lambda p: seen.update(weight=p.grad.clone()))
    OPS[op](*a, backend=backend).sum().backward()
    b = inputs()
    OPS[op](*b, backend=backend).sum().backward()
    assert torch.equal(seen["hidden"], b[0].grad)
    assert torch.equal(a[0].grad, 2 * b[0].grad)
    assert torch.equal(seen["weight"], b[1].grad)


@pytest.mark.parametrize("op", ["mean", "none"])
def test_saved_tensors_hooks(op, backend):
    """Everything that is kept for the backward can be offloaded."""
    a, b = inputs(), inputs()
    count = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (count.append(1), x.clone())[1], lambda x: x.clone()):
        out = OPS[op](*a, backend=backend)
    out.sum().backward()
    OPS[op](*b, backend=backend).sum().backward()
    assert len(count) >= 5
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b))


@pytest.mark.parametrize("op", ["mean", "none"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(op, reentrant, backend):
    a, b = inputs(), inputs()
    out = checkpoint(lambda *x: OPS[op](*x, backend=backend), *a, use_reentrant=reentrant)
    out.sum().backward()
    want = OPS[op](*b, backend=backend)
    want.sum().backward()
    assert torch.equal(out, want)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b))


def test_in_place_changes_after_the_forward_are_noticed(backend):
    a = inputs()
    out = OPS["none"](*a, backend=backend)
    with torch.no_grad():
        a[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("via", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_sources_and_settings(via, backend):
    h, w, b, ht, wt = inputs(grad=False)
    student, teacher = Head(h, w, b, softcap=3.0, logit_scale=1.3), Head(ht, wt)
    divergence = 0.3 * ForwardKL() + torch.arange(1.0, 6.0) * JensenShannon(0.3)
    target = targets.Interpolate(torch.rand(5))
    want = fastkd.kd_loss(student, teacher, divergence, target=target, backend=backend)
    got = fastkd.kd_loss(via(student), via(teacher), via(divergence), target=via(target), backend=backend)
    assert torch.equal(got, want)
    labels = Labels(LABELS, 0.1)
    assert torch.equal(fastkd.kd_loss(student, via(labels)), fastkd.kd_loss(student, labels))
    assert via(divergences.AlphaBeta(0.5, 1.5)) == divergences.AlphaBeta(0.5, 1.5)
