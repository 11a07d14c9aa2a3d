"""torch.compile(fullgraph=True), torch.export and the library op: the same numbers as eager, static and dynamic."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from device import seeded
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import Head, Labels, Mixture, Samples, TopK, targets
from fastkd.divergences import ForwardKL, JensenShannon

V = 7


def inputs(n, grad=True):
    """hidden, weight, bias, teacher hidden, teacher weight; per-token numbers; labels"""
    generator = seeded(n)
    shapes = ((n, 4), (V, 4), (V,), (n, 3), (V, 3))
    a = [torch.randn(s, generator=generator).requires_grad_(grad) for s in shapes]
    labels = torch.randint(V, (n,), generator=generator)
    labels[1] = -100
    return *a, torch.rand(n, generator=generator) + 0.5, labels


def heads(h, w, b, ht, wt):
    return Head(h, w, b, softcap=3.0), Head(ht, wt)


def listed(y, tail="bucket"):
    """Three entries for each token, one of them padding."""
    ids = torch.stack((y.clamp(0), (y.clamp(0) + 2) % V, torch.full_like(y, -1)), -1)
    return TopK(ids, torch.tensor([0.5, 0.2, 0.1]).log().expand(ids.shape), tail)


# each a function of the same seven tensors; its second kind of output, if any, is integer
CALLS = {
    "heads": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(*heads(h, w, b, ht, wt), t_squared=True, temperature=2.0),
    "none, labels, temperatures": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        *heads(h, w, b, ht, wt), "reverse_kl", temperature=x, labels=y, label_weight=0.3, reduction="none"
    ),
    "logits, weights": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        F.linear(h, w, b), F.linear(ht, wt), weights=x, reduction="batchmean"
    ),
    "weighted sum": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        *heads(h, w, b, ht, wt), 0.3 * ForwardKL() + x * JensenShannon(0.3), reduction="sum"
    ),
    "target": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        Head(h, w), Head(ht.detach(), wt.detach()), target=targets.Interpolate(x / 2), temperature=1.5
    ),
    "teacher labels": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(Head(h, w, b), Labels(y, 0.1)),
    "module": lambda h, w, b, ht, wt, x, y: fastkd.nn.DistillLoss("total_variation", reduction="sum")(
        *heads(h, w, b, ht, wt), weights=x
    ),
    "top-k": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        Head(h, w, b, softcap=3.0), listed(y), "reverse_kl", weights=x, labels=y, label_weight=0.2
    ),
    "top-k uniform, none": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        Head(h, w, b), listed(y, "uniform"), reduction="none"
    ),
    "top-k renormalized": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        F.linear(h, w, b), listed(y, "renormalize_both"), temperature=x, reduction="none"
    ),
    "samples": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        Head(h, w, b), Samples(listed(y).ids, listed(y).log_probs.exp(), normalize=True)
    ),
    "mixture": lambda h, w, b, ht, wt, x, y: fastkd.kd_loss(
        Head(h, w, b), Mixture([Head(ht.detach(), wt.detach()), listed(y, "uniform")], [0.3, 0.7]), JensenShannon(0.3)
    ),
    "topk": lambda h, w, b, ht, wt, x, y: fastkd.topk(Head(h, w, b), 3, temperature=x),
    "token_stats": lambda h, w, b, ht, wt, x, y: fastkd.token_stats(Head(h, w, b), temperature=x),
    "selected_log_probs": lambda h, w, b, ht, wt, x, y: fastkd.selected_log_probs(
        Head(h, w, b), torch.stack((y.clamp(0), y.clamp(0).flip(0)), -1)
    ),
    "kl_div": lambda h, w, b, ht, wt, x, y: fastkd.kl_div(
        F.linear(h, w, b).log_softmax(-1), F.linear(ht, wt).log_softmax(-1), reduction="batchmean", log_target=True
    ),
}


def evaluate(call, a):
    """Outputs, and gradients under an upstream that is not uniform."""
    outputs = call(*a)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    smooth = [o for o in outputs if o.is_floating_point()]
    assert all(o.requires_grad for o in smooth)
    upstream = [torch.linspace(0.5, 1.5, max(o.numel(), 1)).view(o.shape) for o in smooth]
    leaves = [x for x in a if x.requires_grad]
    return outputs, torch.autograd.grad(smooth, leaves, upstream, allow_unused=True)


def assert_same(compiled, call, n):
    got, want = evaluate(compiled, inputs(n)), evaluate(call, inputs(n))
    for g, w in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_equals_eager(name, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic, backend=counter)
    assert_same(compiled, CALLS[name], 5)
    count = counter.frame_count
    for n in (8, 11) if dynamic else ():
        assert_same(compiled, CALLS[name], n)
    assert counter.frame_count == count  # other lengths need no other code


@pytest.mark.parametrize("name, dynamic", [("heads", False), ("none, labels, temperatures", True)])
def test_inductor(name, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, dynamic=dynamic)
    for n in (5, 8) if dynamic else (5,):
        assert_same(compiled, CALLS[name], n)


def test_other_settings_are_other_code():
    """Numbers are constants of the compiled code: another number compiles again, and never gives the old result."""
    torch._dynamo.reset()

    def call(h, w, temperature, softcap):
        return fastkd.kd_loss(Head(h, w, softcap=softcap), Head(h.flip(0), w), temperature=temperature)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    h, w = inputs(5)[:2]
    for settings in ((1.0, None), (2.0, None), (2.0, 3.0), (0.5, 1.5)):
        torch.testing.assert_close(compiled(h, w, *settings), call(h, w, *settings), rtol=1e-6, atol=0)


def test_a_training_step():
    """Module, loss and backward in one compiled function, the optimiser outside."""
    torch._dynamo.reset()

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh()), torch.nn.Linear(6, V)

    criterion = fastkd.nn.DistillLoss("jensen_shannon", temperature=2.0, t_squared=True)
    results = []
    for compiling in (False, True):
        body, head = model()

        def step(x, t, body=body, head=head):
            return criterion(Head(body(x), head.weight, head.bias), t)

        run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiling else step
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=0.05)
        losses = []
        x, t = torch.randn(9, 4), 2 * torch.randn(9, V)
        for _ in range(4):
            optimizer.zero_grad()
            loss = run(x, t)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append(torch.stack(losses))
    assert results[0][-1] < 0.9 * results[0][0]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_inside_a_compiled_function(reduction):
    torch._dynamo.reset()
    h, w, b, ht, wt, *_ = inputs(5, grad=False)
    u, v = torch.linspace(0.5, 1.5, 5), torch.randn(5, 4)

    def loss(h):
        out = fastkd.kd_loss(*heads(h, w, b, ht, wt), reduction=reduction)
        return (out * u).sum()

    def grad(h):
        return torch.func.grad(loss)(h)

    def jvp(h, v):
        return torch.func.jvp(loss, (h,), (v,))[1]

    want = grad(h)
    torch.testing.assert_close(torch.compile(grad, fullgraph=True, backend="aot_eager")(h), want, rtol=1e-5, atol=1e-7)
    # never a silent zero
    tangent = torch.compile(jvp, fullgraph=True, backend="aot_eager")(h, v)
    assert tangent.abs() > 1e-3
    torch.testing.assert_close(tangent, (want * v).sum(), rtol=1e-4, atol=1e-6)


def test_values_are_checked_where_the_compiled_code_runs():
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w, y: fastkd.kd_loss(Head(h, w), Labels(y)), fullgraph=True, backend="aot_eager")
    h, w, *_, y = inputs(5, grad=False)
    compiled(h, w, y)
    with pytest.raises(ValueError, match=r"teacher.ids must be in \[0, 7\).*got 7 at index"):
        compiled(h, w, y.masked_fill(y == y[0], 7))


def test_wrong_arguments_are_refused_while_compiling():
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w: fastkd.kd_loss(Head(h, w), Head(h, w), reduction="average"), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        compiled(*inputs(5, grad=False)[:2])
    error, chain = caught.value, ""
    while error is not None:
        error, chain = error.__cause__ or error.__context__, chain + str(error)
    assert "reduction must be one of ['none', 'sum', 'mean', 'batchmean'], got 'average'" in chain


class Capture(TorchDispatchMode):
    """Keeps the arguments of every call of the library op."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastkd.fused.default:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "kl_div"])
def test_opcheck(name):
    """On the very calls that forward and backward make: with and without cotangents, with and without gradients."""
    with Capture() as capture:
        evaluate(CALLS[name], inputs(5))
    with Capture() as frozen, torch.no_grad():
        CALLS[name](*inputs(5))
    assert len(frozen.calls) == 1
    for args in (*capture.calls, *frozen.calls):
        detached = tuple(
            [x.detach() if isinstance(x, torch.Tensor) else x for x in a] if i < 2 else a for i, a in enumerate(args)
        )
        result = torch.library.opcheck(torch.ops.fastkd.fused.default, detached)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_fake_op_knows_dtypes_and_shapes(dtype):
    """Mixed dtypes and batched heads, on the meta device: the outputs of a call without any data."""
    h, w = torch.randn(2, 5, 4, dtype=dtype, device="meta"), torch.randn(2, V, 4, dtype=dtype, device="meta")
    h.requires_grad_()
    loss = fastkd.kd_loss(Head(h, w), Head(h.float(), w.float()), reduction="none", backend="torch")
    assert (loss.shape, loss.dtype, loss.device.type) == (
        (2, 5),
        torch.float64 if dtype == torch.float64 else torch.float32,
        "meta",
    )
    (g,) = torch.autograd.grad(loss.sum(), h)
    assert (g.shape, g.dtype, g.device.type) == (h.shape, dtype, "meta")


class Distiller(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, V)

    def forward(self, hidden, teacher):
        student = Head(hidden, self.head.weight, self.head.bias)
        return fastkd.kd_loss(student, teacher, temperature=2.0), fastkd.token_stats(student).entropy


def test_export():
    module = Distiller()
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(
        module, (torch.randn(5, 4), torch.randn(5, V)), dynamic_shapes=({0: n}, {0: n}), strict=False
    )
    assert "fastkd.fused" in str(program.graph)
    x, t = torch.randn(9, 4), torch.randn(9, V)
    torch.testing.assert_close(program.module()(x, t), module(x, t))


def test_make_fx():
    from torch.fx.experimental.proxy_tensor import make_fx

    a = inputs(5, grad=False)
    call = lambda *x: torch.func.grad(lambda h: CALLS["heads"](h, *x[1:]))(x[0])  # noqa: E731
    graph = make_fx(call, tracing_mode="fake")(*a)
    b = [x.flip(0) for x in a]
    torch.testing.assert_close(graph(*b), call(*b))


def test_importing_fastkd_imports_no_compiler_and_the_first_call_may_be_a_compiled_one():
    code = """
import sys
import torch
before = set(sys.modules)
import fastkd
heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton", "rich", "matplotlib"} & (set(sys.modules) - before)
assert not heavy, heavy
s, t, ids = torch.randn(3, 7), torch.randn(3, 7), torch.tensor([[1], [2], [3]])
def every_op(s, t, ids):
    stats = fastkd.token_stats(s)
    return fastkd.kd_loss(s, t) + stats.lse.sum() + fastkd.selected_log_probs(s, ids).sum()
compiled = torch.compile(every_op, fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(s, t, ids), every_op(s, t, ids))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
