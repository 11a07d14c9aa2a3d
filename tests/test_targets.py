"""Transforms of the teacher against their formulas, as the papers write them."""

import formulas
import torch
import torch.nn.functional as F
from formulas import kl, materialise, per_token_kl
from test_recipes import batch, follows, heads
from torch.utils import _pytree

from fastkd import divergences as D
from fastkd import targets


def frozen(inputs):
    return inputs | {"teacher": _pytree.tree_map_only(torch.Tensor, torch.detach, inputs["teacher"])}


def test_taid(any_backend, seed):
    t = torch.rand(11)

    def recipe(student, teacher):
        z_s, z_t = materialise(student), materialise(teacher)
        p = F.softmax(((1 - t[:, None]) * z_s.detach() + t[:, None] * z_t) / 1.5, -1)
        return kl(p, F.softmax(z_s / 1.5, -1)).sum(-1)

    inputs = frozen(heads(seed))
    follows(any_backend, recipe, inputs, target=targets.Interpolate(t), temperature=1.5, reduction="none")


def test_ofa(any_backend, seed):
    y, gamma = torch.randint(53, (11,)), 1.7

    def recipe(student, teacher):
        p, hot = F.softmax(teacher, -1), F.one_hot(y, 53)
        return -(((p + hot) ** gamma - hot) * F.log_softmax(student, -1)).sum(-1).mean()

    follows(any_backend, recipe, frozen(batch(seed, 11)), target=targets.Enhance(y, gamma))


def test_clip(any_backend, seed):
    low = -torch.rand(11, 1)

    def recipe(student, teacher):
        return per_token_kl(student, teacher.clamp(low, torch.full_like(low, 0.8)), 2.0).mean()

    inputs = frozen(batch(seed, 11))
    follows(any_backend, recipe, inputs, target=targets.Clip(low.squeeze(1), 0.8), temperature=2.0)


def test_power(any_backend, seed):
    def recipe(student, teacher):
        p = F.softmax(teacher / 1.5, -1) ** (1 / 2.5)
        p = p / p.sum(-1, keepdim=True)
        return kl(p, F.softmax(student / 1.5, -1)).sum(-1).mean()

    follows(any_backend, recipe, frozen(batch(seed, 11)), target=targets.Power(2.5), temperature=1.5)


def test_mix_uniform(any_backend, seed):
    def recipe(student, teacher):
        p = 0.7 * F.softmax(teacher, -1) + 0.3 / 53
        q = F.softmax(student, -1)
        return jensen(p, q).sum(-1).mean()

    def jensen(p, q):
        return formulas.jensen_shannon(p, q, 0.3)

    inputs = frozen(batch(seed, 11))
    follows(any_backend, recipe, inputs, target=targets.MixUniform(0.3), divergence=D.JensenShannon(0.3))


def test_noise_is_normal_and_belongs_to_its_token(any_backend, seed):
    noise = targets.AddNoise(2.0, seed)(torch.zeros(64, 997), None, torch.ones(64, 1), torch.arange(64)) / 2
    deciles = torch.distributions.Normal(0, 1).icdf(torch.arange(1, 10) / 10)
    for quantile, expected in zip(noise.flatten().sort().values[:: noise.numel() // 10][1:10], deciles, strict=True):
        assert abs(quantile - expected) < 0.02  # 5 standard deviations of a median of 63,808
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.02 and abs((noise[1:] * noise[:-1]).mean()) < 0.02
    other = targets.AddNoise(2.0, seed + 1)(torch.zeros(64, 997), None, torch.ones(64, 1), torch.arange(64)) / 2
    assert abs((noise * other).mean()) < 0.02

    def recipe(student, teacher):
        return per_token_kl(student, teacher + 0.5 * noise[:11, :53].to(teacher)).mean()

    # with weights some tokens are left out of the walk; the noise stays with the token
    follows(any_backend, recipe, frozen(batch(seed, 11)), target=targets.AddNoise(0.5, seed))
    w = torch.ones(11)
    w[:5] = 0
    inputs = frozen(heads(seed))

    def weighted(student, teacher):
        z = materialise(teacher)
        return per_token_kl(student, z + 0.5 * noise[:11, :53].to(z))[5:].mean()

    follows(any_backend, weighted, inputs, target=targets.AddNoise(0.5, seed), weights=w)
