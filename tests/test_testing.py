"""compare() passes what is right and fails what is wrong, each in its own way."""

import math
import re
import textwrap

import pytest
import torch
from device import seeded

import fastkd
from fastkd import Head, testing

INPUTS = testing.kd_inputs("plain", tokens=7, vocab=65, reduction="none")


def right(student, teacher, reduction):
    return fastkd.kd_loss(student, teacher, reduction=reduction)


def with_gradient(scale):
    """Multiplies gradients and leaves the value alone."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * scale

    return Scale.apply


def detached(student, teacher, reduction):
    return right(Head(student.hidden, student.weight.detach()), teacher, reduction)


def one_wrong(value):
    def op(**kwargs):
        loss = right(**kwargs)
        return torch.cat([loss[:3], loss[3:4] * 0 + value, loss[4:]])

    return op


def row(report, name):
    return next(r for r in report.rows if r.name == name)


def test_what_is_right_passes():
    report = testing.compare(right, fastkd.reference.kd_loss, INPUTS)
    assert report and report.check() is report
    assert [r.name for r in report.rows] == ["value", "grad student.hidden", "grad student.weight"]
    assert str(report).count(" ok") == 3
    assert all(0 < r.allowed < 1e-4 for r in report.rows), "the allowance is that of float32"


# what is wrong -> the op, the rows that must fail, and the reason
WRONG = {
    "value": (lambda **k: right(**k) * 1.0001, {"value", "grad student.hidden", "grad student.weight"}, "expected"),
    "one value": (lambda **k: right(**k) + 1e-3 * torch.eye(7)[2], {"value"}, "flat index 2"),
    "gradients": (
        lambda **k: with_gradient(1.001)(right(**k)),
        {"grad student.hidden", "grad student.weight"},
        "flat index",
    ),
    "one upstream for all": (
        lambda **k: with_gradient(torch.tensor([2.0, 0, 1, 1, 1, 1, 1]))(right(**k)),
        *({"grad student.hidden", "grad student.weight"}, "flat index"),
    ),
    "a missing gradient": (detached, {"grad student.weight"}, "no gradient"),
    "no gradient at all": (
        lambda **k: right(**k).detach(),
        *({"grad student.hidden", "grad student.weight"}, "no gradient"),
    ),
    "NaN": (one_wrong(math.nan), {"value"}, "NaN where the reference is finite"),
    "infinite": (one_wrong(math.inf), {"value"}, "infinite"),
    "shape": (lambda **k: right(**k)[:, None], {"value"}, "shape [7, 1], expected [7]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_fails(what):
    op, rows, why = WRONG[what]
    report = testing.compare(op, fastkd.reference.kd_loss, INPUTS)
    assert not report
    failed = {r.name: r.why for r in report.rows if not r.ok}
    assert rows <= set(failed)
    assert any(why in w for w in failed.values())
    with pytest.raises(AssertionError, match=re.escape("outside the tolerance rule")):
        report.check()


def test_a_number_where_the_reference_is_infinite_fails():
    x = {"x": torch.tensor([1.0, 0.0])}
    assert testing.compare(lambda x: x.log(), lambda x: x.log(), x)
    assert not testing.compare(lambda x: x.log().clamp(-99), lambda x: x.log(), x)
    assert not testing.compare(lambda x: -x.log(), lambda x: x.log(), x)
    nan = {"x": torch.tensor([1.0, -1.0])}
    assert testing.compare(lambda x: x.log(), lambda x: x.log(), nan)
    assert not testing.compare(lambda x: x.log().nan_to_num(), lambda x: x.log(), nan)


def test_the_allowance():
    reference, eps = torch.tensor([3.0, -4.0]).double(), 0.01
    baseline = reference + torch.tensor([0.0, 0.1])
    assert testing.allowance(reference, baseline, eps) == pytest.approx(2 * 0.1 + 0.01 * 4, rel=1e-4)
    assert testing.allowance(reference, baseline, eps, 2) == pytest.approx(2 * 0.1 + 0.01 * 5, rel=1e-4)
    assert testing.allowance(reference, baseline + 9, eps) == pytest.approx(0.1 * 4)  # capped


def test_a_bad_baseline_excuses_nothing():
    def baseline(**kwargs):
        return 3 * right(**kwargs)

    good = testing.compare(right, fastkd.reference.kd_loss, INPUTS, baseline=baseline)
    bad = testing.compare(lambda **k: 1.2 * right(**k), fastkd.reference.kd_loss, INPUTS, baseline=baseline)
    assert good and not bad


def test_several_outputs_and_inputs_without_gradients():
    x = {"source": torch.randn(5, 33)}

    def op(source):
        return fastkd.token_stats(source, backend="torch")

    def reference(source):
        return fastkd.token_stats(source, backend="reference")

    report = testing.compare(op, reference, x)
    assert report and [r.name for r in report.rows] == ["lse", "entropy", "max_log_prob", "argmax"]
    bare = testing.compare(lambda source: tuple(op(source)), lambda source: tuple(reference(source)), x)
    assert bare and [r.name for r in bare.rows] == [f"output {i}" for i in range(4)]
    wrong = testing.compare(lambda source: (*op(source)[:3], op(source)[3] + 1), reference, x)
    assert [r.ok for r in wrong.rows] == [True, True, True, False]
    short = testing.compare(lambda source: op(source)[:3], reference, x)
    assert [r.why for r in short.rows] == ["", "", "", "no output where the reference has one"]


def test_the_upstream_is_not_uniform_and_the_inputs_stay_untouched():
    seen = []
    op = with_gradient(1.0)

    def watched(**kwargs):
        loss = op(right(**kwargs))
        if loss.requires_grad:
            loss.register_hook(seen.append)
        return loss

    testing.compare(watched, fastkd.reference.kd_loss, INPUTS)
    assert all(g.unique().numel() == 7 for g in seen) and seen
    assert INPUTS["student"].hidden.grad is None


@pytest.mark.parametrize("feature", testing.KD_FEATURES)
def test_kd_inputs(feature):
    a, b, c = (testing.kd_inputs(feature, tokens=5, vocab=33, hidden=(4, 6), seed=s) for s in (1, 1, 2))
    flat = [[x for x in torch.utils._pytree.tree_leaves(i) if isinstance(x, torch.Tensor)] for i in (a, b, c)]
    assert all(torch.equal(x, y) for x, y in zip(*flat[:2], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(flat[0], flat[2], strict=True))
    half = testing.kd_inputs(feature, tokens=5, vocab=33, dtype=torch.bfloat16)["student"]
    assert (half.hidden if isinstance(half, Head) else half).dtype == torch.bfloat16


def test_kd_inputs_refuses_an_unknown_feature():
    with pytest.raises(ValueError, match=r"feature must be one of \['plain', .*got 'plian'"):
        testing.kd_inputs("plian")


@pytest.mark.cpu("writes through numpy")
def test_inputs_written_over_fail():
    def op(student, teacher, reduction):
        loss = right(student, teacher, reduction)
        teacher.hidden.numpy()[:] *= 2  # unseen by torch, like a kernel's
        return loss

    inputs = testing.kd_inputs("plain", tokens=7, vocab=65, reduction="none")
    report = testing.compare(op, fastkd.reference.kd_loss, inputs)
    assert not row(report, "inputs").ok and row(report, "inputs").why == "were written over"
    assert row(report, "value").ok  # it was made before


def test_one_expectation_holds_many():
    expected = testing.Expected.of(fastkd.reference.kd_loss, INPUTS)
    assert expected.hold(right) and not expected.hold(WRONG["value"][0]) and expected.hold(right)


@pytest.fixture
def example(capsys):
    """The names that the example of the documentation defines, and what it prints."""
    pytest.importorskip("liger_kernel")
    code = testing.__doc__.split("in float32::")[1].split("Both pass.")[0]
    names = {"torch": torch, "fastkd": fastkd, "testing": testing}
    exec(textwrap.dedent(code), names)
    return names, capsys.readouterr().out


def test_the_example_of_the_documentation(example):
    printed = example[1]
    assert printed.count(" ok") == 6 and "FAIL" not in printed


@pytest.mark.parametrize("seed", range(3))
def test_what_the_documentation_says_of_bfloat16(example, seed):
    """As good as the rule asks where student and teacher are far apart; the values are not where they nearly agree."""
    inputs = testing.kd_inputs("plain", dtype=torch.bfloat16, seed=seed)
    ops = example[0]["mine"], example[0]["ligers"]
    assert all(testing.compare(op, fastkd.reference.kd_loss, inputs) for op in ops)
    student, generator = inputs["student"], seeded(seed)
    near = student.hidden.detach() + 0.1 * torch.randn(student.hidden.shape, generator=generator)
    inputs["teacher"] = Head(near.bfloat16(), student.weight.detach())
    expected = testing.Expected.of(fastkd.reference.kd_loss, inputs)
    assert [row(expected.hold(op), "value").ok for op in (*ops, fastkd.kd_loss)] == [False, False, True]
