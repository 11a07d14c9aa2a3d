"""The autograd contract: derivatives of every order and mode are right, or refused in words; never silently zero."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import Head, Labels, backends, divergences, normal_form, targets
from fastkd.divergences import ForwardKL, JensenShannon

LABELS = torch.tensor([3, -100, 0, 6, 3])
IDS = torch.tensor([[0, 6], [2, 2], [5, 1], [3, 3], [1, 4]])
NAMES = ("hidden", "weight", "bias", "teacher hidden", "teacher weight")


def heads(h, w, b, ht, wt):
    return Head(h, w, b, softcap=3.0, logit_scale=1.3), Head(ht, wt)


@pytest.fixture(autouse=True)
def one_thread():
    """The problems are tiny and many: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    "entropy": lambda *a, **k: fastkd.token_stats(heads(*a)[0], temperature=1.5, **k).entropy,
    "max_log_prob": lambda *a, **k: fastkd.token_stats(heads(*a)[0], **k).max_log_prob,
    "selected_log_probs": lambda *a, **k: fastkd.selected_log_probs(heads(*a)[0], IDS, temperature=1.5, **k),
}
KD_OPS = ("mean", "none", "labels", "logits", "logits, none")
op_of = pytest.mark.parametrize("op", OPS)
kd_op = pytest.mark.parametrize("op", KD_OPS)


def inputs(dtype=torch.float32, grad=True, seed=0):
    """The same numbers for every dtype that holds them: rounded to bfloat16, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 4), (7, 4), (7,), (5, 3), (7, 3))
    return [
        torch.randn(s, generator=generator).bfloat16().to(dtype).requires_grad_(grad) for s in shapes
    ]  # fewer tokens than classes, D and V odd or not a power of 2


def rand_like(x, seed=1):
    generator = torch.Generator().manual_seed(seed)
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


# --- gradcheck -----------------------------------------------------------------------------------------------------


@op_of
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradcheck_in_both_modes(op, name):
    used = inputs(torch.float64) if op in KD_OPS else inputs(torch.float64)[:3]
    rest = inputs(torch.float64, grad=False)[len(used) :]
    assert torch.autograd.gradcheck(lambda *a: OPS[op](*a, *rest, backend=name), used, check_forward_ad=True)


@op_of
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_gradgradcheck(op, name):
    used = inputs(torch.float64) if op in KD_OPS else inputs(torch.float64)[:3]
    rest = inputs(torch.float64, grad=False)[len(used) :]
    call = lambda *a: OPS[op](*a, *rest, backend=name)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, used, fast_mode=True, check_fwd_over_rev=name == "torch")


@op_of
def test_second_derivatives_are_those_of_the_definition(op, backend):
    def second(call, a):
        out = call(*a)
        first = torch.autograd.grad(out, a, rand_like(out), create_graph=True, materialize_grads=True)
        inner = sum((g * rand_like(g, 2)).sum() for g in first if g.requires_grad)
        return first, torch.autograd.grad(inner, a, materialize_grads=True)

    first, got = second(lambda *a: OPS[op](*a, backend=backend), inputs())
    first64, want = second(reference(op), inputs(torch.float64))
    assert_all_near(first, first64)
    assert_all_near(got, want, 1e-4)


def test_second_derivatives_reach_the_upstream_gradient(backend):
    a, a64 = inputs(), inputs(torch.float64)
    results = []
    for call, xs in ((lambda *x: OPS["none"](*x, backend=backend), a), (reference("none"), a64)):
        out = call(*xs)
        upstream = rand_like(out).requires_grad_()
        (g,) = torch.autograd.grad(out, xs[:1], upstream, create_graph=True)
        results.append(torch.autograd.grad(g, upstream, rand_like(g))[0])
    assert_near(*results)


def test_third_derivatives(backend):
    def third(call, h, rest):
        def along(f, v):
            return lambda h: (torch.func.grad(f)(h) * v).sum()

        u, v = rand_like(h, 1), rand_like(h, 2)
        return torch.func.grad(along(along(lambda h: call(h, *rest), u), v))(h)

    h, *rest = inputs(grad=False)
    h64, *rest64 = inputs(torch.float64, grad=False)
    got = third(lambda *a: OPS["mean"](*a, backend=backend), h, rest)
    assert_near(got, third(reference("mean"), h64, rest64), 1e-4)


# --- forward mode --------------------------------------------------------------------------------------------------


@op_of
def test_jvp_equals_the_definition_and_is_adjoint_to_the_vjp(op, any_backend):
    a, a64 = inputs(grad=False), inputs(torch.float64, grad=False)
    v = tuple(rand_like(x, i) for i, x in enumerate(a))
    out, tangent = torch.func.jvp(lambda *x: OPS[op](*x, backend=any_backend), tuple(a), v)
    want = torch.func.jvp(reference(op), tuple(a64), tuple(x.double() for x in v))[1]
    assert want.abs().max() > 1e-2
    assert_near(tangent, want)
    # <u, J v> = <J^T u, v>
    out, pull = torch.func.vjp(lambda *x: OPS[op](*x, backend=any_backend), *a)
    u = rand_like(out, 9)
    left = (u.double() * tangent).sum()
    right = sum((g.double() * t).sum() for g, t in zip(pull(u), v))
    assert abs(left - right) <= 1e-5 * (u.double() * tangent).abs().sum()


@op_of
@pytest.mark.parametrize("which", range(5))
def test_dual_numbers_one_input_at_a_time(op, which, backend):
    if op not in KD_OPS and which > 2:
        which -= 3  # the teacher has no part in it
    a, a64 = inputs(), inputs(torch.float64, grad=False)
    v = rand_like(a[which])
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) if i == which else x for i, x in enumerate(a)]
        primal, tangent = forward_ad.unpack_dual(OPS[op](*duals, backend=backend))
    assert tangent is not None

    def only(x):
        return reference(op)(*(x if i == which else y for i, y in enumerate(a64)))

    want, want_tangent = torch.func.jvp(only, (a64[which],), (v.double(),))
    assert_near(primal, want)
    assert_near(tangent, want_tangent)
    # the tangent carries a graph of its own
    (got,) = torch.autograd.grad(tangent.sum(), a[which])
    forward = lambda x: torch.func.jvp(only, (x,), (v.double(),))[1].sum()  # noqa: E731
    assert_near(got, torch.func.grad(forward)(a64[which]), 1e-4)


def test_tangents_of_all_statistics(any_backend):
    a, a64 = inputs(grad=False)[:3], inputs(torch.float64, grad=False)[:3]

    def stats(name):
        return lambda *x: fastkd.token_stats(Head(*x), backend=name)

    v = tuple(rand_like(x, i) for i, x in enumerate(a))
    got = torch.func.jvp(lambda *x: stats(any_backend)(*x)[:3], tuple(a), v)[1]
    want = torch.func.jvp(lambda *x: stats("reference")(*x)[:3], tuple(a64), tuple(x.double() for x in v))[1]
    assert_all_near(got, want)
    with forward_ad.dual_level():
        out = stats(any_backend)(forward_ad.make_dual(a[0], v[0]), *a[1:])
        assert forward_ad.unpack_dual(out.argmax).tangent is None
        assert forward_ad.unpack_dual(out.lse).tangent.abs().max() > 1e-2


@pytest.mark.parametrize("op", ["mean", "none", "selected_log_probs"])
def test_modes_nest(op, backend):
    h, *rest = inputs(grad=False)
    h64, *rest64 = inputs(torch.float64, grad=False)
    v, v64 = rand_like(h), rand_like(h64)

    u = torch.tensor([1.0, -0.5, 2.0, 0.25, -1.5]).unsqueeze(-1)

    def forward(f, v):
        return lambda x: torch.func.jvp(f, (x,), (v,))[1]

    def total(call, rest):
        return lambda x: (call(x, *rest) * u[: 1 if op == "mean" else 5]).sum()

    f, f64 = total(lambda *a: OPS[op](*a, backend=backend), rest), total(reference(op), rest64)
    want = torch.func.grad(lambda x: (torch.func.grad(f64)(x) * v64).sum())(h64)  # H v, reverse over reverse
    assert want.abs().max() > 1e-3
    assert_near(forward(torch.func.grad(f), v)(h), want, 1e-4)  # forward over reverse
    assert_near(torch.func.grad(forward(f, v))(h), want, 1e-4)  # reverse over forward
    assert_near(forward(forward(f, v), v)(h), (want * v64).sum(), 1e-3)  # forward over forward
    assert_near(torch.einsum("ijkl,kl->ij", torch.func.hessian(f)(h), v), want, 1e-4)


@pytest.mark.parametrize("argument", ["temperature", "label_weight", "weights"])
def test_jvp_with_respect_to_settings(argument, backend):
    a, a64 = inputs(grad=False), inputs(torch.float64, grad=False)
    x = torch.tensor([0.5, 1.0, 0.25, 0.75, 2.0])

    def call(a, name):
        labels = LABELS if argument == "label_weight" else None
        return lambda x: fastkd.kd_loss(*heads(*a), labels=labels, backend=name, **{argument: x})

    got = torch.func.jvp(call(a, backend), (x,), (rand_like(x),))[1]
    want = torch.func.jvp(call(a64, "reference"), (x.double(),), (rand_like(x).double(),))[1]
    assert want.abs() > 1e-3
    assert_near(got, want)


# --- torch.func ----------------------------------------------------------------------------------------------------


@kd_op
def test_func_grad_and_vjp_equal_backward(op, backend):
    a = inputs()
    out = OPS[op](*a, backend=backend)
    u = rand_like(out)
    want = torch.autograd.grad(out, a, u)
    plain = [x.detach() for x in a]
    assert_all_near(torch.func.vjp(lambda *x: OPS[op](*x, backend=backend), *plain)[1](u), [w.double() for w in want])
    got = torch.func.grad(lambda *x: (OPS[op](*x, backend=backend) * u).sum(), argnums=tuple(range(5)))(*plain)
    assert_all_near(got, [w.double() for w in want])


@kd_op
def test_jacobians(op, backend):
    a, a64 = inputs(grad=False), inputs(torch.float64, grad=False)
    want = torch.func.jacrev(reference(op), argnums=(0, 1))(*a64)
    call = lambda *x: OPS[op](*x, backend=backend)  # noqa: E731
    assert_all_near(torch.func.jacrev(call, argnums=(0, 1))(*a), want)
    assert_all_near(torch.func.jacfwd(call, argnums=(0, 1))(*a), want)
    with torch.no_grad():
        assert_all_near(torch.func.jacrev(call, argnums=(0, 1))(*a), want)


def test_batched_backward_of_a_scalar_works_and_of_tokens_is_refused(backend):
    """torch.autograd.grad(is_grads_batched=True) uses torch's old vmap, for which a library op can give no rule."""
    h, *rest = inputs()
    out = OPS["mean"](h, *rest, backend=backend)
    u = torch.tensor([1.0, -2.0, 0.5])
    (got,) = torch.autograd.grad(out, h, u, is_grads_batched=True, retain_graph=True)
    (g,) = torch.autograd.grad(out, h)
    assert_near(got, u.view(3, 1, 1).double() * g)
    out = OPS["none"](h, *rest, backend=backend)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(out, h, torch.eye(5), is_grads_batched=True)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_over_hidden_states_and_heads(in_dims, reduction, backend):
    generator = torch.Generator().manual_seed(0)
    _, _, b, ht, wt = inputs(grad=False)
    shapes = ((5, 4), (7, 4))
    h, w = (
        torch.randn((*s[: d or 0], 3, *s[d or 0 :]) if d is not None else s, generator=generator)
        for s, d in zip(shapes, in_dims)
    )

    def call(h, w):
        return fastkd.kd_loss(Head(h, w, b), Head(ht, wt), reduction=reduction, backend=backend)

    def each(f):
        rows = [f(*(x if d is None else x.select(d, i) for x, d in zip((h, w), in_dims))) for i in range(3)]
        return [torch.stack(r) for r in zip(*rows)] if isinstance(rows[0], tuple) else torch.stack(rows)

    assert_near(torch.func.vmap(call, in_dims)(h, w), each(call).double())
    scalar = lambda h, w: (call(h, w) * torch.arange(1.0, 6.0)).sum()  # noqa: E731
    gradient = torch.func.grad(scalar, argnums=(0, 1))
    assert_all_near(torch.func.vmap(gradient, in_dims)(h, w), [x.double() for x in each(gradient)])
    # backward through a vmap
    hh, ww = h.clone().requires_grad_(), w.clone().requires_grad_()
    got = torch.autograd.grad(torch.func.vmap(call, in_dims)(hh, ww).square().sum(), (hh, ww))
    h2, w2 = h.clone().requires_grad_(), w.clone().requires_grad_()
    rows = [call(*(x if d is None else x.select(d, i) for x, d in zip((h2, w2), in_dims))) for i in range(3)]
    want = torch.autograd.grad(torch.stack(rows).square().sum(), (h2, w2))
    assert_all_near(got, [x.double() for x in want])


def test_vmap_of_the_building_blocks(backend):
    h = torch.randn(3, 5, 4)
    w = inputs(grad=False)[1]
    got = torch.func.vmap(lambda h: fastkd.token_stats(Head(h, w), backend=backend))(h)
    want = fastkd.token_stats(Head(h, w), backend=backend)
    assert_all_near(got[:3], [x.double() for x in want[:3]])
    assert torch.equal(got.argmax, want.argmax)
    got = torch.func.vmap(lambda h: fastkd.selected_log_probs(Head(h, w), IDS, backend=backend))(h)
    assert_near(got, fastkd.selected_log_probs(Head(h, w), IDS.expand(3, 5, 2), backend=backend).double())


def test_per_sample_gradients(backend):
    """vmap(grad) over samples: the gradient of a shared head for each sample, as in differential privacy."""
    h, w, _, ht, wt = inputs(grad=False)

    def loss(w, h, ht):
        return fastkd.kd_loss(Head(h.unsqueeze(0), w), Head(ht.unsqueeze(0), wt), backend=backend)

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(w, h, ht)
    assert got.shape == (5, 7, 4)
    for i in range(5):
        assert_near(got[i], torch.func.grad(loss)(w, h[i], ht[i]).double())
    whole = torch.func.grad(lambda w: fastkd.kd_loss(Head(h, w), Head(ht, wt), reduction="sum", backend=backend))(w)
    assert_near(got.sum(0), whole.double())


@pytest.mark.parametrize("argument", ["temperature", "label_weight"])
def test_grad_of_vmap_with_respect_to_settings(argument, backend):
    """The choice of a backend cannot see through vmap that a setting requires grad: the definition then gives it."""
    a = inputs(grad=False)
    x = torch.tensor([0.5, 1.0, 0.25])
    labels = LABELS if argument == "label_weight" else None

    def total(name):
        call = lambda x: fastkd.kd_loss(*heads(*a), labels=labels, backend=name, **{argument: x})  # noqa: E731
        return torch.func.grad(lambda x: torch.func.vmap(call)(x).sum())

    assert_near(total(backend)(x), total("reference")(x).double())


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
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
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
