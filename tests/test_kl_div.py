"""fastkd.kl_div is torch.nn.functional.kl_div: signature, values, gradients, warnings and errors."""

import inspect
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fastkd
from fastkd import kl, testing
from fastkd.backends import extension

REDUCTIONS = ("none", "sum", "mean", "batchmean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


def pair(*shape, dtype=torch.float32, log_target=False, grad=True, seed=0):
    """Log-probabilities, and probabilities or their logs."""
    generator = torch.Generator().manual_seed(seed)
    x, t = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    x, t = x.log_softmax(-1), t.log_softmax(-1)
    t = t if log_target else t.exp()
    return x.to(dtype).requires_grad_(grad), t.to(dtype).requires_grad_(grad)


def one_pass(monkeypatch):
    """Counts the calls that the one-pass kernel serves."""
    served = []
    apply = kl._KLDiv.apply
    monkeypatch.setattr(kl._KLDiv, "apply", lambda *a: (served.append(1), apply(*a))[1])
    return served


def test_the_signature_is_torchs():
    ours, theirs = inspect.signature(fastkd.kl_div), inspect.signature(F.kl_div)
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("shape", [(7,), (5, 33), (3, 4, 17), (1, 1), (2, 1031)])
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, reduction, log_target, shape):
    x, t = pair(*shape, dtype=dtype, log_target=log_target)
    settings = {"reduction": reduction, "log_target": log_target}
    report = testing.compare(fastkd.kl_div, F.kl_div, {"input": x, "target": t, **settings})
    assert len(report.rows) == 3  # value, and both gradients
    report.check()
    out, want = fastkd.kl_div(x, t, **settings), F.kl_div(x, t, **settings)
    assert (out.dtype, out.shape, out.requires_grad) == (want.dtype, want.shape, True)


def test_who_is_served_in_one_pass(monkeypatch):
    served = one_pass(monkeypatch)
    for dtype, reduction, log_target in itertools.product(DTYPES, REDUCTIONS, (False, True)):
        x, t = pair(5, 9, dtype=dtype, log_target=log_target)
        served.clear()
        fastkd.kl_div(x, t, reduction=reduction, log_target=log_target)
        assert len(served) == (extension()[0] is not None and reduction != "none" and dtype != torch.float64)


@pytest.mark.parametrize("log_target", [False, True])
def test_sums_of_half_precision_terms_do_not_drift(log_target):
    """A long sum in float32: nearer to the truth than rounding each term."""
    x, t = pair(64, 4099, dtype=torch.bfloat16, log_target=log_target, grad=False)
    truth = F.kl_div(x.double(), t.double(), reduction="sum", log_target=log_target)
    ours = fastkd.kl_div(x, t, reduction="sum", log_target=log_target).double()
    assert abs(ours - truth) <= torch.finfo(torch.bfloat16).eps / 2 * abs(truth) * 1.01


@pytest.mark.parametrize("upstream", [1.0, -2.5, 0.0])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("log_target", [False, True])
def test_who_receives_gradients(upstream, needs, log_target):
    results = []
    for f in (fastkd.kl_div, F.kl_div):
        x, t = (a.detach().requires_grad_(n) for a, n in zip(pair(5, 9, log_target=log_target), needs))
        kept = x.detach().clone(), t.detach().clone()
        (f(x, t, reduction="batchmean", log_target=log_target) * upstream).backward()
        assert torch.equal(x, kept[0]) and torch.equal(t, kept[1]) and x._version == t._version == 0
        results.append((x.grad, t.grad))
    for g, w, n in zip(*results, needs):
        assert (g is not None) == (w is not None) == n
        if n:
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_no_gradients_wanted():
    x, t = pair(5, 9)
    with torch.no_grad():
        out = fastkd.kl_div(x, t, reduction="sum")
    assert not out.requires_grad
    assert not fastkd.kl_div(x.detach(), t.detach(), reduction="sum").requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(fastkd.kl_div(x, t, reduction="sum"), out)


def test_only_what_the_backward_reads_is_kept():
    """The gradient of input needs target alone, so input may be overwritten, as in torch."""
    x, t = pair(5, 9)
    y = x * 1
    loss = fastkd.kl_div(y, t.detach(), reduction="sum")
    y.detach().zero_()
    (g,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(g, -t.detach())


@pytest.mark.parametrize("log_target", [False, True])
def test_upstream_gradients_per_element(log_target):
    u = torch.rand(5, 9)[:, ::2]
    results = []
    for f in (fastkd.kl_div, F.kl_div):
        x, t = pair(5, 5, log_target=log_target)
        results.append(torch.autograd.grad(f(x, t, reduction="none", log_target=log_target), (x, t), u))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "shapes", [((5, 7), (7,)), ((7,), (5, 7)), ((5, 1), (1, 7)), ((2, 5, 7), (5, 7)), ((5, 7), ())]
)
def test_broadcasting(reduction, shapes):
    results = []
    for f in (fastkd.kl_div, F.kl_div):
        generator = torch.Generator().manual_seed(0)
        x, t = (torch.rand(s, generator=generator).requires_grad_() for s in shapes)
        out = f(x, t, reduction=reduction)
        results.append((out, *torch.autograd.grad(out.sum(), (x, t))))
    assert all(map(torch.equal, *results))


def strided(x, how):
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "sliced":
        return x.repeat_interleave(2, 1)[:, ::2]
    if how == "expanded":
        return x[:1].expand(x.shape)
    return x.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("left", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("right", ["contiguous", "transposed", "sliced", "expanded"])
def test_layouts(left, right, log_target):
    x0, t0 = pair(6, 11, log_target=log_target, grad=False)
    results = []
    for f in (fastkd.kl_div, F.kl_div):
        x, t = strided(x0, left).requires_grad_(), strided(t0, right).requires_grad_()
        out = f(x, t, reduction="sum", log_target=log_target)
        results.append((out, *torch.autograd.grad(out, (x, t))))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


# --- further derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(reduction, log_target):
    x, t = pair(3, 4, dtype=torch.float64, log_target=log_target)

    def call(x, t):
        return fastkd.kl_div(x, t, reduction=reduction, log_target=log_target)

    assert torch.autograd.gradcheck(call, (x, t), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, t))


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_double_backward_in_float32(reduction, log_target):
    results = []
    for f, dtype in ((fastkd.kl_div, torch.float32), (F.kl_div, torch.float64)):
        x, t = (a.to(dtype).detach().requires_grad_() for a in pair(3, 4, log_target=log_target))
        c = torch.tensor(1.5, dtype=dtype, requires_grad=True)
        grads = torch.autograd.grad(c * f(x, t, reduction=reduction, log_target=log_target), (x, t), create_graph=True)
        inner = sum((g * g * (i + 1)).sum() for i, g in enumerate(grads))
        results.append((*grads, *torch.autograd.grad(inner, (x, t, c))))
    for got, want in zip(*results):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("log_target", [False, True])
def test_retained_graph(log_target):
    x, t = pair(5, 9, log_target=log_target)
    loss = fastkd.kl_div(x, t, reduction="batchmean", log_target=log_target)
    first = torch.autograd.grad(loss, (x, t), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    assert all(map(torch.equal, torch.autograd.grad(loss, (x, t), retain_graph=True), kept))
    loss.backward()
    assert torch.equal(x.grad, kept[0]) and torch.equal(t.grad, kept[1])


@pytest.mark.parametrize("log_target", [False, True])
def test_forward_mode(log_target):
    x, t = pair(5, 9, log_target=log_target, grad=False)
    v = torch.randn(5, 9), torch.randn(5, 9)

    def call(f):
        return lambda x, t: f(x, t, reduction="batchmean", log_target=log_target)

    want = torch.func.jvp(call(F.kl_div), (x.double(), t.double()), tuple(a.double() for a in v))[1]
    got = torch.func.jvp(call(fastkd.kl_div), (x, t), v)[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(a, b) for a, b in zip((x, t), v))
        tangent = forward_ad.unpack_dual(call(fastkd.kl_div)(*duals)).tangent
    torch.testing.assert_close(tangent.double(), want, rtol=1e-5, atol=1e-7)


def test_transforms_and_batched_gradients():
    x, t = pair(3, 5, 9, grad=False)
    call = lambda f: lambda x, t: f(x, t, reduction="sum")  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(call(fastkd.kl_div))(x, t), torch.func.vmap(call(F.kl_div))(x, t))
    per_sample = [torch.func.vmap(torch.func.grad(call(f), argnums=(0, 1)))(x, t) for f in (fastkd.kl_div, F.kl_div)]
    torch.testing.assert_close(*per_sample)
    x, t = pair(5, 9)
    loss, u = fastkd.kl_div(x, t, reduction="sum"), torch.tensor([1.0, -2.0])
    (g,) = torch.autograd.grad(loss, x, u, is_grads_batched=True)
    torch.testing.assert_close(g, -u.view(2, 1, 1) * t)


def test_compile():
    torch._dynamo.reset()

    def call(x, t):
        return fastkd.kl_div(x, t, reduction="batchmean")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8):
        results = []
        for f in (compiled, call):
            x, t = pair(n, 9)
            out = f(x, t)
            results.append((out, *torch.autograd.grad(out, (x, t))))
        torch.testing.assert_close(*results)


# --- edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_and_scalar_inputs(reduction):
    for shape in ((0,), (0, 5), (5, 0), ()):
        results = []
        for f in (fastkd.kl_div, F.kl_div):
            x, t = torch.full(shape, -0.5, requires_grad=True), torch.full(shape, 0.3, requires_grad=True)
            out = f(x, t, reduction=reduction)
            results.append((out, *torch.autograd.grad(out.sum(), (x, t))))
        torch.testing.assert_close(*results, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_targets_that_are_zero(dtype):
    x, t = pair(5, 9, dtype=dtype)
    t = t.detach().clone()
    t[0, :4], t[3] = 0, 0
    x = x.detach().clone()
    x[0, 1] = -1e4
    x.requires_grad_()
    got = fastkd.kl_div(x, t, reduction="sum")
    want = F.kl_div(x.double(), t.double(), reduction="sum")
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=0)
    (g,) = torch.autograd.grad(got, x)
    assert torch.equal(g, -t)
    t.requires_grad_()
    (g,) = torch.autograd.grad(fastkd.kl_div(x, t, reduction="sum"), t)
    assert torch.equal(g == -torch.inf, t == 0) and g[t > 0].isfinite().all()


@pytest.mark.parametrize("n", [9, 1031])
def test_log_targets_of_minus_infinity_count_nothing(n):
    """Torch gives NaN there."""
    x, t = pair(5, n, log_target=True)
    t = t.detach().clone()
    dead = torch.zeros_like(t, dtype=torch.bool)
    dead[0, :4] = dead[2, -1] = dead[4] = True
    x = x.detach().masked_fill(dead & (torch.arange(n) % 2 == 0), -torch.inf).requires_grad_()  # and the input too
    minus = t.masked_fill(dead, -torch.inf).requires_grad_()
    got = fastkd.kl_div(x, minus, reduction="sum", log_target=True)
    terms = t.double().exp() * (t.double() - x.detach().double())
    torch.testing.assert_close(got.double(), terms[~dead].sum(), rtol=1e-6, atol=0)
    dx, dt = torch.autograd.grad(got, (x, minus))
    assert dx.isfinite().all() and dt.isfinite().all()
    assert not dx[dead].any() and not dt[dead].any()
    torch.testing.assert_close(dx[~dead], -t.exp()[~dead])


@pytest.mark.parametrize("value", [-0.1, torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_targets_that_are_no_probabilities(value, reduction):
    x, t = pair(2, 67, grad=False)
    t[1, 66] = value
    torch.testing.assert_close(
        fastkd.kl_div(x, t, reduction=reduction), F.kl_div(x, t, reduction=reduction), equal_nan=True
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("log_target", [False, True])
def test_inputs_that_are_not_finite(value, log_target):
    x, t = pair(2, 67, log_target=log_target, grad=False)
    x[1, 3] = value
    settings = {"reduction": "sum", "log_target": log_target}
    assert torch.equal(fastkd.kl_div(x, t, **settings).nan_to_num(nan=7), F.kl_div(x, t, **settings).nan_to_num(nan=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    results = []
    for f in (fastkd.kl_div, F.kl_div):
        x, t = pair(5, 9, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = f(x, t, reduction="batchmean")
        results.append((out, *torch.autograd.grad(out, (x, t))))
    assert [a.dtype for a in results[0]] == [a.dtype for a in results[1]]
    torch.testing.assert_close(*results, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


# --- warnings and errors -------------------------------------------------------------------------------------------


def outcome(f, *args, **kwargs):
    """Value or type of error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = f(*args, **kwargs)
        except Exception as error:
            result = type(error)
    return result, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kwargs",
    [
        *({"reduction": r} for r in REDUCTIONS),
        {},
        *({"size_average": a, "reduce": b} for a in (None, False, True) for b in (None, False, True)),
        {"size_average": False, "reduction": "none"},
        {"reduce": True, "reduction": "batchmean", "log_target": True},
    ],
    ids=str,
)
def test_warnings_are_torchs(kwargs, dtype):
    x, t = pair(5, 9, dtype=dtype, grad=False)
    (got, said), (want, expected) = outcome(fastkd.kl_div, x, t, **kwargs), outcome(F.kl_div, x, t, **kwargs)
    torch.testing.assert_close(got, want)
    assert said == expected
    legacy = kwargs.get("size_average") is not None or kwargs.get("reduce") is not None
    assert bool(said) == (legacy or kwargs.get("reduction", "mean") == "mean")


BAD = {
    "integers": lambda x, t: ((x.long(), t.long()), {"reduction": "sum"}),
    "shapes": lambda x, t: ((x, t[:, :4]), {"reduction": "sum"}),
    "rows": lambda x, t: ((x, t[:3]), {"reduction": "batchmean"}),
    "reduction": lambda x, t: ((x, t), {"reduction": "average"}),
    "no reduction": lambda x, t: ((x, t), {"reduction": None}),
    "list": lambda x, t: ((x.tolist(), t), {}),
    "none": lambda x, t: ((x, None), {}),
    "missing": lambda x, t: ((x,), {}),
    "unknown": lambda x, t: ((x, t), {"temperature": 2.0}),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_torchs(name):
    args, kwargs = BAD[name](*pair(5, 9, grad=False))
    got, want = outcome(fastkd.kl_div, *args, **kwargs)[0], outcome(F.kl_div, *args, **kwargs)[0]
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)  # torch takes it
    else:
        assert got is want


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_another_backend_is_torch_s_own(name):
    x, t = torch.zeros(2, 3), torch.full((2, 3), -torch.inf)
    with fastkd.use_backend(name):
        assert fastkd.kl_div(x, t, reduction="sum", log_target=True).isnan()  # as torch has it
