"""A network and its tangent: against torch.func.jvp, and each way in which a tangent gets lost."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as hooks

import fastkd
from fastkd.diffusion.network import network_jvp, tangent_warmup
from fastkd.forward_mode import replaced


class Block(nn.Module):
    """Attention, dropout, running statistics, a time embedding."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv, self.time = nn.Linear(width, 3 * width), nn.Linear(1, width)
        self.out, self.drop, self.norm = nn.Linear(width, width), nn.Dropout(0.5), nn.BatchNorm1d(width)

    def forward(self, x, t, shift=0.0):
        q, k, v = (y.unsqueeze(1) for y in self.qkv(x).chunk(3, -1))
        x = x + self.drop(self.out(fastkd.attention(q, k, v).squeeze(1))) + self.time(t[:, None])[:, None]
        return self.norm(x.transpose(1, 2)).transpose(1, 2) + shift


def given(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    x, tx = (torch.randn(2, 5, 8, generator=draw, dtype=dtype) for _ in range(2))
    return x, torch.tensor([0.3, 0.9], dtype=dtype), tx, torch.tensor([1.0, -2.0], dtype=dtype)


def seeded(module):
    torch.manual_seed(0)
    return module()


def test_output_tangent_and_gradients():
    net = seeded(Block).double()
    x, t, tx, tt = given()
    got = network_jvp(net, (x, t), (tx, tt), shift=1.0)
    net.eval()
    want = torch.func.jvp(lambda x, t: net(x, t, 1.0), (x, t), (tx, tt))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    for g, w in zip(*(torch.autograd.grad(sum((y**2).sum() for y in ys), [*net.parameters()]) for ys in (got, want))):
        torch.testing.assert_close(g, w)


def test_a_training_module_is_evaluated_and_put_back():
    net = seeded(Block).double().train()
    net.drop.eval()
    modes = {name: m.training for name, m in net.named_modules()}
    x, t, tx, tt = given()
    first, second = (network_jvp(net, (x, t), (tx, tt)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert net.norm.num_batches_tracked == 0 and nothing_stays()


def nothing_stays():
    return not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


class Outer(nn.Module):
    """Calls another's method, and so is not called itself."""

    def __init__(self, net):
        super().__init__()
        self.net, self.drop = net, nn.Dropout(0.5)

    def velocity(self, x, t):
        return nn.functional.dropout(self.net(x, t, shift=1.0), 0.5, self.training)


WAYS = {
    "module": lambda net: net,
    "method": lambda net: Outer(net).velocity,
    "partial": lambda net: functools.partial(net, shift=1.0),
    "function": lambda net: lambda x, t: net(x, t, 1.0),
    "function of its weights": lambda net: lambda *a: torch.func.functional_call(net, dict(net.named_parameters()), a),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad", [True, False])
def test_whatever_calls_it(way, grad):
    """Modules are found, in training mode or not, with a graph or not."""
    net = seeded(Block).double().train()
    net.drop.eval()
    modes = {name: m.training for name, m in net.named_modules()}
    x, t, tx, tt = given()
    with torch.set_grad_enabled(grad):
        got = network_jvp(WAYS[way](net), (x, t), (tx, tt))
    assert {name: m.training for name, m in net.named_modules()} == modes and nothing_stays()
    assert net.norm.num_batches_tracked == 0 and all(y.requires_grad == grad for y in got)
    shift = 1.0 if way in ("method", "partial", "function") else 0.0
    for g, w in zip(got, torch.func.jvp(lambda x, t: net.eval()(x, t, shift), (x, t), (tx, tt)), strict=True):
        torch.testing.assert_close(g, w)


def test_a_function_that_fails_puts_its_modules_back():
    net = seeded(Block).double().train()
    with pytest.raises(RuntimeError, match=r"^module \(Linear\): mat1 and mat2"):
        network_jvp(lambda x: net(x, x), (given()[0],), (given()[2],))
    assert all(m.training for m in net.modules()) and nothing_stays()


def test_modules_of_another_thread():
    other, seen = nn.Dropout(0.5), []

    def network(x):
        aside = threading.Thread(target=lambda: seen.append((other(torch.ones(64)) == 0).any()))
        aside.start()
        aside.join()
        return 2 * x

    network_jvp(network, given()[:1], given()[:1])
    assert seen[0] and other.training


def test_what_has_no_tangent():
    net = seeded(Block).double()
    x, t, tx, _ = given()
    got, zero = network_jvp(net, (x, t), (tx, None)), network_jvp(net, (x, t), (tx, torch.zeros_like(t)))
    for g, w in zip(got, zero):
        torch.testing.assert_close(g, w)
    labels = torch.tensor([1, 2])
    emb = nn.Embedding(4, 8).double()
    _, tangent = network_jvp(lambda x, y: x * emb(y)[:, None], (x, labels), (tx, None))
    torch.testing.assert_close(tangent, tx * emb(labels)[:, None])


def test_autocast():
    """Casts of weights that were made within the transform are not those of later calls."""
    net = nn.Linear(8, 8)
    x = given(torch.float32)[0]
    with torch.autocast("cpu", torch.bfloat16):
        seen = []
        out, tangent = network_jvp(lambda x: seen.append(torch.is_autocast_cache_enabled()) or net(x), (x,), (x,))
        assert out.dtype == tangent.dtype == torch.bfloat16 and seen == [False]
        net(x).float().sum().backward()
    want = x.flatten(0, 1).sum(0).expand(8, 8)
    torch.testing.assert_close(net.weight.grad, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["cast before", "not cast before"])
def test_within_autocast_the_output_is_the_plain_one(enabled, before):
    net = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8))).eval()
    x, _, tx, _ = given(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        plain = net(x) if before else None
        out, tangent = network_jvp(net, (x,), (tx,))
        assert torch.is_autocast_enabled("cpu") == enabled and torch.is_autocast_cache_enabled()
        torch.testing.assert_close(out, net(x) if plain is None else plain)
        (out.float() * tangent.float()).sum().backward()
        found = [p.grad for p in net.parameters()]
        assert all(g.isfinite().all() and g.any() for g in found[:-1])  # the last bias moves with the output alone
    exact = torch.func.jvp(net.double(), (x.double(),), (tx.double(),))[1]
    torch.testing.assert_close(tangent.double(), exact, rtol=0, atol=0.05 if enabled else 1e-5)


class Torch(nn.Module):
    """What torch alone refuses, and what it gets wrong."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.attn(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)


def test_gradients_through_the_tangent_of_a_network_of_torch():
    net = seeded(Torch).double()
    x, _, tx, _ = given()

    def total(x, tx):
        out, tangent = network_jvp(net, (x,), (tx,))
        return (out.sin() * tangent).sum()

    assert torch.autograd.gradcheck(total, (x.requires_grad_(), tx.requires_grad_()))


def test_within_other_transforms():
    net = seeded(Block).double()
    x, t, tx, tt = given()
    x, tx = (torch.stack((y, 2 * y)) for y in (x, tx))

    def tangent(x, tx):
        return network_jvp(net, (x, t), (tx, tt))[1]

    each = torch.func.vmap(tangent)(x, tx)
    for a, b, c in zip(each, x, tx):
        torch.testing.assert_close(a, tangent(b, c))
    x, tx = x[0], tx[0]
    found = torch.func.grad(lambda x: tangent(x, tx).sum())(x)
    y = x.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(tangent(y, tx).sum(), y)[0])
    twice = network_jvp(tangent, (x, tx), (tx, None))[1]
    torch.testing.assert_close(twice, torch.func.jvp(lambda x: tangent(x, tx), (x,), (tx,))[1])
    assert twice.any()
    with pytest.raises(RuntimeError, match="the tangent ends in module '0'"):
        torch.func.vmap(lambda x: network_jvp(nn.Sequential(Ends(), nn.Tanh()), (x,), (x,))[1])(x)
    got = torch.func.vmap(lambda x: network_jvp(Product(Rotary()), (x,), (x,))[1])(x)
    torch.testing.assert_close(got, x * Rotary()(x))


def test_without_values():
    x = torch.zeros(2, 8, device="meta")
    out, tangent = network_jvp(Product(Rotary()), (x,), (x,))
    assert out.is_meta and out.shape == tangent.shape == x.shape


class Ends(nn.Module):
    def forward(self, x):
        return x.detach() * 2


class Data(nn.Module):
    def forward(self, *, x):
        return {"y": x.data * 2}


class Item(nn.Module):
    def forward(self, x):
        return torch.tensor([x[0, 0].item()], dtype=x.dtype)


class Steps(nn.Module):
    """A table of whole times, up to the last that there is."""

    table = None

    def forward(self, x):
        index = (100 * x).abs().long()
        if self.table is None:
            self.table = torch.randn(int(index.max()) + 1)
        return self.table[index]


class NoRule(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x, p=3.0)


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Function(nn.Module):
    def forward(self, x):
        return Old.apply(x)


class New(Old):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


class NewFunction(nn.Module):
    def forward(self, x):
        return New.apply(x)


class Called(nn.Module):
    """With a word, and a table of results."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x=x)["y"]


class Caught(nn.Module):
    """Of a failure nothing stays."""

    def __init__(self, module):
        super().__init__()
        self.fails, self.module = NoRule(), module

    def forward(self, x):
        try:
            x = self.fails(x)
        except NotImplementedError:
            x = 2 * x
        return self.module(x)


class Then(nn.Module):
    """Fails itself, after others."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cdist(self.module(x), x, p=3.0)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (Ends, RuntimeError, r"^the tangent ends in module '1.0' \(Ends\): its output follows an input"),
        (lambda: Called(Data()), RuntimeError, r"^the tangent ends in module '1.0.module' \(Data\)"),
        (Item, RuntimeError, r"^the tangent ends in module '1.0' \(Item\)"),
        (Steps, RuntimeError, r"^the tangent ends in module '1.0' \(Steps\)"),
        (NoRule, NotImplementedError, r"^module '1.0' \(NoRule\): .*_cdist_forward"),
        (Function, RuntimeError, r"^module '1.0' \(Function\): .*setup_context"),
        (NewFunction, RuntimeError, r"^module '1.0' \(NewFunction\): .*jvp"),
        (lambda: Caught(Ends()), RuntimeError, r"^the tangent ends in module '1.0.module' \(Ends\)"),
        (lambda: Then(Caught(nn.Tanh())), NotImplementedError, r"^module '1.0' \(Then\)"),
        (lambda: Caught(NoRule()), NotImplementedError, r"^module '1.0.module' \(NoRule\)"),
    ],
)
def test_a_tangent_that_is_lost(module, error, message):
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(module(), nn.Tanh()))
    x = given(torch.float32)[0][0]
    net.train()
    with pytest.raises(error, match=message):
        network_jvp(net, (x,), (x,))
    assert all(m.training for m in net.modules()) and nothing_stays()
    network_jvp(net[0], (x,), (x,))


@torch.library.custom_op("fastkd_test::no_rule", mutates_args=())
def no_rule(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


class Residual(nn.Module):
    """The tangent goes on beside the op, and would be wrong."""

    def forward(self, x):
        return x + no_rule(x)


class Pair(nn.Module):
    def forward(self, x):
        return x.tanh() + (x.cos(), no_rule(x))[1]


@pytest.mark.parametrize("module", [Residual, Pair])
def test_an_op_without_a_rule_beside_the_way(module):
    net, x = nn.Sequential(nn.Linear(8, 8), module(), nn.Tanh()), given(torch.float32)[0][0]
    with pytest.raises(
        NotImplementedError, match=rf"^module '1' \({module.__name__}\): fastkd_test.no_rule.* no forward"
    ):
        network_jvp(net, (x,), (x,))
    with replaced():
        assert net(x).shape == x.shape  # without tangents


class Product(nn.Module):
    """Of its input and of what a module makes of it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        y = self.module(x)
        return x * (y if isinstance(y, torch.Tensor) else y[0])


class Rotary(nn.Module):
    """Takes its input's width, dtype and device."""

    def forward(self, x):
        return torch.arange(x.shape[-1], dtype=x.dtype, device=x.device).cos()


class Label(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 8).double()

    def forward(self, x):
        return self.table(torch.tensor([1, 3])).sum(0)


class Of(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


CONSTANT = {
    "positions": Rotary(),
    "labels": seeded(Label),
    "a mask": Of(lambda x: (x > 0.3).to(x.dtype)),
    "a mask to add": Of(lambda x: (x > 0.3).to(x.dtype).log()),
    "a mask of the least": Of(lambda x: torch.zeros_like(x).masked_fill(x > 0.3, torch.finfo(x.dtype).min)),
    "a sign": Of(torch.sign),
    "noise": Of(lambda x: torch.randn_like(x.detach())),
    "no tensor": Of(lambda x: (x.shape[-1], "name")),
    "integers": Of(lambda x: x.argmax()),
    "a second output": Of(lambda x: (x.tanh(), x.detach())),
    "no grad": Of(torch.no_grad()(torch.tanh)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_an_output_without_a_tangent_is_not_always_a_loss(name):
    """What does not follow the input has no derivative, nor has a mask; no_grad keeps tangents."""
    x, _, tx, _ = given()
    net = Product(CONSTANT[name])
    torch.manual_seed(0)
    out, tangent = network_jvp(net, (x,), (tx,))
    torch.manual_seed(0)
    torch.testing.assert_close((out, tangent), torch.func.jvp(net, (x,), (tx,)), equal_nan=True)


def test_a_function_that_loses_it():
    x = given()[0]
    with pytest.raises(RuntimeError, match="network's output has no tangent"):
        network_jvp(lambda x: x.detach() * 2, (x,), (x,))


def test_a_tangent_of_zeros_is_one():
    """A projection that begins at 0, as in adaLN-zero."""
    net = nn.Linear(8, 8).double()
    nn.init.zeros_(net.weight)
    x = given()[0]
    assert not network_jvp(net, (x,), (x,))[1].any()


def test_compiled():
    net = seeded(Block)
    net.norm = nn.Identity()  # torch does not compile the tangent of its normalisations
    net.drop.eval()
    x, t, tx, tt = given(torch.float32)
    small = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    for network, module, primals, tangents in ((net, net, (x, t), (tx, tt)), (small.forward, small, (x,), (tx,))):
        torch._dynamo.reset()
        modes = [m.training for m in module.modules()]
        want = network_jvp(network, primals, tangents)
        f = torch.compile(lambda p, t: network_jvp(network, p, t), fullgraph=True, backend="aot_eager")  # noqa: B023
        for g, w in zip(f(primals, tangents), want):
            torch.testing.assert_close(g, w)
        assert [m.training for m in module.modules()] == modes and True in modes


X = torch.zeros(2, 3)
BAD = {
    "one tangent too few": (lambda f: network_jvp(f, (X, X), (X,)), ValueError, "tangents must be one for each of 2"),
    "no tangent": (lambda f: network_jvp(f, (X,), (None,)), ValueError, "at least one tensor, got None alone"),
    "a tensor for a tuple": (lambda f: network_jvp(f, X, X), TypeError, "primals must be a tuple, got Tensor"),
    "tangents in a tensor": (lambda f: network_jvp(f, (X,), X[:1]), TypeError, "tangents must be a tuple, got Tensor"),
    "no words for attention": (lambda f: network_jvp(f, (X,), (X,), "no"), ValueError, "tangent_grad must be one of"),
    "shape": (lambda f: network_jvp(f, (X,), (X[:1],)), ValueError, r"tangents\[0\] must have shape \[2, 3\], that of"),
    "dtype": (lambda f: network_jvp(f, (X,), (X.double(),)), TypeError, r"tangents\[0\] must be torch.float32, as"),
    "integers": (lambda f: network_jvp(f, (X.int(),), (X.int(),)), TypeError, r"primals\[0\] must be float32"),
    "device": (lambda f: network_jvp(f, (X,), (X.to("meta"),)), ValueError, r"tangents\[0\] on meta"),
    "two outputs": (lambda f: network_jvp(lambda x: (x, x), (X,), (X,)), TypeError, "must return a tensor, got tuple"),
    "negative step": (lambda f: tangent_warmup(-1), ValueError, "step must be an integer from 0, got -1"),
    "no steps": (lambda f: tangent_warmup(1, 0), ValueError, "steps must be an integer from 1, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(lambda *x: x[0])


def test_warmup():
    assert [tangent_warmup(s, 4) for s in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
