"""Who serves a call, how that is chosen, and what a user can add; autocast, which settles what the GEMMs run in."""

import json
import os
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, KIND, seeded
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import Head, backends, divergences, kl, targets, testing
from fastkd.backends import BACKENDS, extension, use_backend

needs_extension = pytest.mark.skipif(extension()[0] is None, reason="the C++ extension is not built")


class Served(TorchDispatchMode):
    """Reads from the library op's settings who computes it; the reference computes without the op."""

    def __init__(self):
        super().__init__()
        self.by = "reference"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastkd.fused.default:
            self.by = json.loads(args[3])["backend"]
        return func(*args, **(kwargs or {}))


def heads(dtype=torch.float32):
    generator = seeded(0)
    shapes = ((5, 4), (7, 4), (5, 3), (7, 3))
    h, w, ht, wt = (torch.randn(s, generator=generator, device=DEVICE).to(dtype) for s in shapes)
    return Head(h.requires_grad_(), w.requires_grad_()), Head(ht, wt)


def served_by(dtype=torch.float32, **kwargs):
    with Served() as served:
        fastkd.kd_loss(*heads(dtype), **kwargs)
    return served.by


@pytest.fixture
def fresh_warnings():
    """Warnings that are given once a process are given again."""
    for warned in (backends._warn_slower, backends._warn_materialised):
        warned.cache_clear()
    yield
    for warned in (backends._warn_slower, backends._warn_materialised):
        warned.cache_clear()


@pytest.fixture
def no_extension(monkeypatch, fresh_warnings):
    missing = (None, "the C++ extension fastkd._C cannot be imported: none here")
    monkeypatch.setattr(backends, "extension", lambda: missing)
    monkeypatch.setattr(kl, "extension", lambda: missing)


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_table():
    names = list(BACKENDS)
    assert names.index("cpu") < names.index("torch") < names.index("reference") == len(names) - 1
    for name, backend in BACKENDS.items():
        assert backend.name == name and backend.summary
        assert (backend.rows is None) == (name == "reference")


@pytest.mark.cpu("the C++ backend")
@needs_extension
def test_the_first_that_can_serve():
    assert served_by() == "cpu"
    assert served_by(torch.bfloat16) == "cpu"
    assert served_by(torch.float64) == "torch"


@pytest.mark.parametrize("op", ["kd_loss", "token_stats", "selected_log_probs"])
def test_the_argument_of_each_op(op, any_backend):
    student, teacher = heads()
    with Served() as served:
        if op == "kd_loss":
            fastkd.kd_loss(student, teacher, backend=any_backend)
        elif op == "token_stats":
            fastkd.token_stats(student, backend=any_backend)
        else:
            fastkd.selected_log_probs(student, torch.zeros(5, 2, dtype=torch.long), backend=any_backend)
    assert served.by == any_backend


def test_context_argument_and_environment(monkeypatch):
    monkeypatch.setenv("FASTKD_BACKEND", "reference")
    assert served_by() == "reference"
    with use_backend("torch"):
        assert served_by() == "torch"  # the context before the environment
        assert served_by(backend="reference") == "reference"  # the argument before the context
        with use_backend("reference"):
            assert served_by() == "reference"
        assert served_by() == "torch"
    assert served_by() == "reference"
    monkeypatch.setenv("FASTKD_BACKEND", "")
    assert served_by() == served_by(backend=None) != "reference"


def test_the_context_ends_with_an_exception():
    default = served_by()
    with pytest.raises(RuntimeError, match="on purpose"), use_backend("torch"):
        assert served_by() == "torch"
        raise RuntimeError("on purpose")
    assert served_by() == default


@pytest.mark.real
def test_the_context_is_that_of_its_thread():
    results = {}

    def work():
        results["other"] = served_by()

    default = served_by()
    with use_backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        results["own"] = served_by()
    assert results == {"other": default, "own": "reference"}


def test_the_environment_of_a_new_process():
    code = "import torch, fastkd; print(fastkd.kd_loss(torch.eye(3), torch.ones(3, 3)).item())"

    def run(name):
        environment = {**os.environ, "FASTKD_BACKEND": name}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    served = run("reference")
    assert served.returncode == 0, served.stderr
    logits = torch.eye(3), torch.ones(3, 3)
    assert float(served.stdout) == fastkd.kd_loss(*logits, backend="reference").item()
    wrong = run("fast")
    assert wrong.returncode != 0
    assert f"backend must be one of {list(BACKENDS)} or None, got 'fast'" in wrong.stderr


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_unknown_name_lists_the_choices(how, monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of .*'cpu'.*'torch', 'reference'.* or None, got 'fast'"):
        if how == "argument":
            fastkd.kd_loss(*heads(), backend="fast")
        elif how == "context":
            with use_backend("fast"):
                pass
        else:
            monkeypatch.setenv("FASTKD_BACKEND", "fast")
            fastkd.kd_loss(*heads())


@pytest.mark.cpu("the C++ backend")
@needs_extension
@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_one_that_was_asked_for_and_cannot_serve_says_why(how, monkeypatch):
    """And nobody serves in its place."""
    message = "backend 'cpu' cannot serve this call: its row ops have float32, bfloat16 and float16, .* float64"
    with pytest.raises(ValueError, match=message):
        if how == "argument":
            fastkd.kd_loss(*heads(torch.float64), backend="cpu")
        elif how == "context":
            with use_backend("cpu"):
                fastkd.token_stats(heads(torch.float64)[0])
        else:
            monkeypatch.setenv("FASTKD_BACKEND", "cpu")
            fastkd.selected_log_probs(heads(torch.float64)[0], torch.zeros(5, 1, dtype=torch.long))


def test_settings_that_require_grad_are_refused_by_name(backend):
    t = torch.ones(5, requires_grad=True)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot serve this call: temperature requires grad"):
        fastkd.kd_loss(*heads(), temperature=t, backend=backend)
    with pytest.raises(ValueError, match="temperature requires grad"):
        fastkd.token_stats(heads()[0], temperature=t, backend=backend)
    student, teacher = heads()
    with pytest.raises(ValueError, match="a target transform passes no gradient to the teacher"):
        fastkd.kd_loss(teacher, student, target=targets.Power(2.0), backend=backend)


def test_the_reference_serves_with_a_warning_only_where_nobody_asked_for_it(fresh_warnings):
    t = torch.ones(5, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastkd.kd_loss(*heads(), temperature=t, backend="reference")
        with use_backend("reference"):
            fastkd.kd_loss(*heads(), temperature=t)
    with pytest.warns(UserWarning, match="reference backend serves, with all logits in memory.*temperature") as caught:
        for _ in range(3):
            fastkd.kd_loss(*heads(), temperature=t)
    assert len(caught) == 1


# --- without the extension -----------------------------------------------------------------------------------------


@pytest.mark.cpu("the C++ backend")
def test_without_the_extension_torch_serves_and_says_so_once(no_extension):
    message = "the torch backend serves, slower than others would. cpu: .*none here"
    with pytest.warns(UserWarning, match=message) as caught:
        assert [served_by() for _ in range(3)] == ["torch"] * 3
        fastkd.token_stats(heads()[0])
    assert len(caught) == 1


def test_without_the_extension_an_explicit_choice_is_quiet_or_refused(no_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served_by(backend="torch") == "torch"
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot serve this call: the C.. extension .*none here"):
        served_by(backend="cpu")


def test_without_the_extension_kl_div_is_torchs(no_extension):
    x, t = torch.randn(5, 9).log_softmax(-1).requires_grad_(), torch.rand(5, 9)
    got, want = (f(x, t, reduction="batchmean") for f in (fastkd.kl_div, F.kl_div))
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (got, want)))


def test_the_extension_names_why_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastkd._C", None)
    monkeypatch.delattr(fastkd, "_C", raising=False)
    module, reason = extension.__wrapped__()
    assert module is None and reason.startswith("the C++ extension fastkd._C cannot be imported: ")


@pytest.mark.cpu("the C++ backend")
@needs_extension
def test_instruction_sets():
    module = extension()[0]
    before, student, teacher = module.isa(), *heads()
    assert module.isas()[0] == before and module.isas()[-1] == "generic"
    with pytest.raises(ValueError, match="isa must be one that this processor has, got 'mmx'"):
        module.set_isa("mmx")
    assert module.isa() == before
    losses = []
    try:
        for isa in module.isas():
            module.set_isa(isa)
            assert module.isa() == isa
            losses.append(fastkd.kd_loss(student, teacher, backend="cpu"))
    finally:
        module.set_isa(before)
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)


# --- what a user adds ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_divergence():
    @divergences.register
    @dataclass(frozen=True)
    class LogRatio(divergences.Divergence):
        """sum p abs(log p - log q)^2 * scale / 2"""

        scale: float = 2.0
        name = "own_log_ratio"

        def phi(self, log_p, log_q):
            return self.scale / 2 * log_p.exp() * (log_p - log_q).square()

        def h(self, log_p, log_q):
            return -self.scale * log_p.exp() * (log_p - log_q)

    yield LogRatio
    del divergences.REGISTRY["own_log_ratio"]


@pytest.mark.parametrize("scale", [1, 3.0])
def test_a_divergence_of_ones_own(own_divergence, scale):
    mixed = 0.5 * own_divergence(scale) + torch.linspace(0.5, 1.5, 13) * divergences.ReverseKL()
    for divergence in ("own_log_ratio", own_divergence(scale), mixed):
        inputs = testing.kd_inputs("plain", divergence=divergence, temperature=2.0)
        with Served() as served:
            testing.compare(fastkd.kd_loss, fastkd.reference.kd_loss, inputs).check()
        assert served.by == "torch"
    recipe_q = (
        F.linear(*(x.double() for x in (inputs["student"].hidden, inputs["student"].weight))).div(2).log_softmax(-1)
    )
    recipe_p = (
        F.linear(*(x.double() for x in (inputs["teacher"].hidden, inputs["teacher"].weight))).div(2).log_softmax(-1)
    )
    want = scale / 2 * (recipe_p.exp() * (recipe_p - recipe_q).square()).sum(-1).mean()
    got = fastkd.kd_loss(**{**inputs, "divergence": own_divergence(scale)})
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.cpu("the C++ backend")
def test_a_divergence_of_ones_own_and_its_limits(own_divergence):
    if extension()[0] is not None:
        with pytest.raises(
            ValueError, match="backend 'cpu' cannot serve this call: divergence 'own_log_ratio' has no entry"
        ):
            fastkd.kd_loss(*heads(), own_divergence(), backend="cpu")
    student, teacher = heads()
    with pytest.raises(NotImplementedError, match="LogRatio defines no exchanged divergence: detach the teacher"):
        fastkd.kd_loss(teacher, student, own_divergence())
    with pytest.raises(ValueError, match="a divergence needs a name of its own, got 'own_log_ratio'"):
        divergences.register(own_divergence)


@pytest.mark.real
def test_a_divergence_of_ones_own_compiles(own_divergence):
    torch._dynamo.reset()
    student, teacher = heads()

    def call(h, w):
        return fastkd.kd_loss(Head(h, w), teacher, own_divergence(3.0), backend="torch")

    a = student.hidden, student.weight
    got, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*a), call(*a)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, a), torch.autograd.grad(want, a))


@pytest.fixture
def own_target():
    @dataclass(frozen=True, eq=False)
    class Agree(targets.Target):
        """A little of the student, by a factor per token, over the teacher's sharpened logits."""

        share: object
        power: float = 2.0

        def __call__(self, teacher, student, temperature, token):
            return (self.share * student + self.power * teacher) / temperature + 0.01 * token.to(teacher.dtype).view(
                *teacher.shape[:-1], 1
            ) * torch.arange(teacher.shape[-1], device=teacher.device)

    yield Agree
    del targets.REGISTRY[Agree.key()]


@pytest.mark.parametrize("weights", [False, True])
def test_a_target_of_ones_own(own_target, weights, backend):
    generator = seeded(0)
    inputs = testing.kd_inputs("plain", temperature=1.5, reduction="none", chunk_tokens=4)
    share = torch.rand(13, generator=generator)
    if weights:
        inputs["weights"] = torch.arange(13.0).remainder(3)  # ignored tokens: the others keep their index
    student, teacher = inputs["student"], inputs["teacher"]
    got = fastkd.kd_loss(**inputs, target=own_target(share), backend=backend)
    # the student that the target sees is a constant
    leaves = [student.hidden, student.weight]
    z_s = F.linear(*(x.double() for x in leaves))
    z_t = F.linear(teacher.hidden.double(), teacher.weight.double())
    t = (share.double().unsqueeze(-1) * z_s.detach() + 2 * z_t) / 1.5
    t = (t + 0.01 * torch.arange(13.0).unsqueeze(-1) * torch.arange(1031)).log_softmax(-1)
    want = (t.exp() * (t - (z_s / 1.5).log_softmax(-1))).sum(-1) * inputs.get("weights", torch.ones(13))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    u = torch.rand(13, generator=generator)
    for g, w in zip(torch.autograd.grad(got, leaves, u), torch.autograd.grad(want, leaves, u.double())):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)


# --- autocast ------------------------------------------------------------------------------------------------------


def recipe(student, teacher, reduction="mean", **_):
    """What a user writes: F.linear obeys autocast, the softmax is in float32."""
    q, p = (F.linear(x.hidden, x.weight, x.bias) for x in (student, teacher))
    q, p = (z.double() if z.dtype == torch.float64 else z.float() for z in (q, p))
    terms = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    return terms.mean() if reduction == "mean" else terms


def under_autocast(f, **settings):
    def call(**kwargs):
        with torch.autocast(KIND, torch.bfloat16, **settings):
            return f(**kwargs)

    return call


@pytest.mark.real
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_multiplies_in_bfloat16(reduction, any_backend):
    inputs = testing.kd_inputs("plain", reduction=reduction)

    def op(**kwargs):
        return fastkd.kd_loss(**kwargs, backend=any_backend)

    autocast = under_autocast(op)
    testing.compare(autocast, recipe, inputs, baseline=under_autocast(recipe)).check()
    rounded, exact = autocast(**inputs), op(**inputs)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, under_autocast(recipe)(**inputs), rtol=1e-4, atol=1e-5)
    assert ((rounded - exact) / exact).abs().max() > 1e-5  # it did round
    leaves = inputs["student"].hidden, inputs["student"].weight
    grads = torch.autograd.grad(rounded.sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 2


@pytest.mark.real
def test_autocast_ends_with_the_forward(backend):
    """The backward runs outside the context, as torch advises, and recomputes in the forward's dtype."""
    inputs = testing.kd_inputs("plain", reduction="none")
    leaves = inputs["student"].hidden, inputs["student"].weight
    u = torch.rand(13)
    with torch.autocast(KIND, torch.bfloat16):
        loss = fastkd.kd_loss(**inputs, backend=backend)
        inside = torch.autograd.grad(loss, leaves, u, retain_graph=True)
    outside = torch.autograd.grad(loss, leaves, u)
    assert all(map(torch.equal, inside, outside))


@pytest.mark.real
@pytest.mark.parametrize("op", ["token_stats", "selected_log_probs"])
def test_autocast_of_the_building_blocks(op, any_backend):
    student = testing.kd_inputs("bias")["student"]
    ids = torch.arange(26).view(13, 2)

    def call():
        if op == "token_stats":
            return fastkd.token_stats(student, backend=any_backend).lse
        return fastkd.selected_log_probs(student, ids, backend=any_backend)

    with torch.autocast(KIND, torch.bfloat16):
        got = call()
        logits = F.linear(student.hidden, student.weight, student.bias).float()
    want = logits.logsumexp(-1) if op == "token_stats" else logits.log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(got, want, rtol=1e-2 if any_backend == "reference" else 1e-4, atol=2e-2)
    assert (got - call()).abs().max() > 1e-4


@pytest.mark.real
def test_autocast_that_is_off_and_float64(any_backend):
    inputs = testing.kd_inputs("plain")
    want = fastkd.kd_loss(**inputs, backend=any_backend)
    with torch.autocast(KIND, torch.bfloat16):
        with torch.autocast(KIND, enabled=False):
            assert torch.equal(fastkd.kd_loss(**inputs, backend=any_backend), want)
        logits = torch.randn(5, 9), torch.randn(5, 9)
        got = fastkd.kd_loss(*logits, backend=any_backend)  # given logits are nobody's to round
    assert torch.equal(got, fastkd.kd_loss(*logits, backend=any_backend))
    if any_backend != "cpu":
        inputs = testing.kd_inputs("plain", dtype=torch.float64)
        with torch.autocast(KIND, torch.bfloat16):
            got = fastkd.kd_loss(**inputs, backend=any_backend)
        assert got.dtype == torch.float64 and torch.equal(got, fastkd.kd_loss(**inputs, backend=any_backend))


@pytest.mark.real
def test_mixed_dtypes_need_autocast(any_backend):
    inputs = testing.kd_inputs("plain")
    student = Head(inputs["student"].hidden.detach().bfloat16().requires_grad_(), inputs["student"].weight)
    with pytest.raises(ValueError, match=r"student.hidden, student.weight and student.bias must have one dtype"):
        fastkd.kd_loss(student, inputs["teacher"], backend=any_backend)
    with torch.autocast(KIND, torch.bfloat16):
        loss = fastkd.kd_loss(student, inputs["teacher"], backend=any_backend)
        want = recipe(student, inputs["teacher"])
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=0)
    grads = torch.autograd.grad(loss, (student.hidden, student.weight))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    for g, w in zip(grads, torch.autograd.grad(want, (student.hidden, student.weight))):
        torch.testing.assert_close(g.float(), w.float(), rtol=0, atol=0.03 * w.abs().max().item())
