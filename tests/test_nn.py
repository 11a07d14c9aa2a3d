"""DistillLoss: kd_loss with its settings given once."""

import copy
import pickle

import pytest
import torch

import fastkd
from fastkd import targets, testing
from fastkd.divergences import ForwardKL, JensenShannon
from fastkd.nn import DistillLoss


def sources():
    inputs = testing.kd_inputs("plain", vocab=33)
    return inputs["student"], inputs["teacher"]


def both(criterion, settings, **overrides):
    """Value and gradient of the module, and of the function."""
    results = []
    for call in (criterion, lambda *a, **k: fastkd.kd_loss(*a, criterion.divergence, **{**settings, **k})):
        student, teacher = sources()
        loss = call(student, teacher, **overrides)
        results.append((loss, *torch.autograd.grad(loss.sum(), (student.hidden, student.weight))))
    return results


@pytest.mark.parametrize(
    "divergence", ["reverse_kl", ForwardKL(), 0.3 * ForwardKL() + torch.rand(13) * JensenShannon(0.3)]
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "t_squared": True, "reduction": "batchmean"},
        {"target": targets.MixUniform(0.2), "reduction": "none", "chunk_tokens": 4},
        {"labels": torch.arange(13), "label_weight": 0.3, "ignore_index": 4, "backend": "torch"},
    ],
    ids=lambda s: ", ".join(s),
)
def test_it_is_the_function_with_these_settings(divergence, settings):
    got, want = both(DistillLoss(divergence, **settings), settings)
    assert all(map(torch.equal, got, want))


def test_every_keyword_is_a_setting():
    """None is forgotten: each default, given as a setting, changes nothing."""
    defaults = dict(fastkd.kd_loss.__kwdefaults__)
    got, want = both(DistillLoss("forward_kl", **defaults), {})
    assert all(map(torch.equal, got, want))


def test_keywords_of_the_call_override():
    settings = {"temperature": 2.0, "reduction": "sum"}
    criterion = DistillLoss("jensen_shannon", **settings)
    weights = torch.arange(13.0)
    got, want = both(criterion, settings, reduction="none", weights=weights)
    assert all(map(torch.equal, got, want))
    assert got[0].shape == (13,) and got[0][0] == 0
    student, teacher = sources()
    assert criterion(student, teacher).dim() == 0  # the settings stay what they were
    assert criterion.settings == settings


def test_wrong_settings_are_refused_when_it_is_made():
    with pytest.raises(TypeError, match=r"settings must be keywords of .*kd_loss.*got \['temperatur'\]"):
        DistillLoss(temperatur=2.0)
    for name in ("student", "teacher"):  # these come with the call
        with pytest.raises(TypeError, match=name):
            DistillLoss(**{name: torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="divergence must be one of"):
        DistillLoss("kl")
    with pytest.raises(TypeError, match="divergence must be a name or"):
        DistillLoss(2.0)


def test_a_wrong_keyword_of_the_call_is_refused():
    with pytest.raises(TypeError, match="temperatur"):
        DistillLoss()(*sources(), temperatur=2.0)


def test_repr():
    assert repr(DistillLoss()) == "DistillLoss('forward_kl')"
    criterion = DistillLoss(JensenShannon(0.3), temperature=2.0, reduction="sum")
    assert repr(criterion) == "DistillLoss(JensenShannon(beta=0.3), temperature=2.0, reduction='sum')"
    inside = torch.nn.Sequential(criterion)
    assert "(0): DistillLoss(JensenShannon(beta=0.3), temperature=2.0" in repr(inside)


def test_it_owns_nothing():
    criterion = DistillLoss(torch.rand(13) * ForwardKL(), temperature=torch.ones(13))
    assert not criterion.state_dict()
    assert not list(criterion.parameters()) and not list(criterion.buffers())
    criterion.load_state_dict({})
    assert criterion.train(False)(*sources()) == criterion.train()(*sources())


@pytest.mark.parametrize("via", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(via):
    criterion = DistillLoss(
        0.3 * ForwardKL() + torch.arange(13.0) * JensenShannon(0.3), temperature=2.0, target=targets.Clip(-1.0, 1.0)
    )
    other = via(criterion)
    assert other is not criterion
    assert torch.equal(other(*sources()), criterion(*sources()))
    assert repr(other) == repr(criterion)


@pytest.mark.real
def test_compile():
    torch._dynamo.reset()
    criterion = DistillLoss("skew_kl", temperature=2.0, t_squared=True)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, criterion):
        student, teacher = sources()
        weights = torch.linspace(0.5, 1.5, 13)
        loss = call(student, teacher, weights=weights, reduction="none")
        results.append((loss, *torch.autograd.grad(loss, (student.hidden, student.weight), weights)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
