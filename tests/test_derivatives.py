"""Derivatives of every order and mode, and torch.func: right, or refused in words; never silently zero."""

import pytest
import torch
from autograd_cases import (
    IDS,
    KD_OPS,
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
from device import seeded
from torch.autograd import forward_ad

import fastkd
from fastkd import Head

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
    generator = seeded(0)
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
