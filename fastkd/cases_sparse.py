"""The cases of sparse teachers: a part of the table in fastkd/cases.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastkd import divergences, targets
from fastkd.divergences import Divergence
from fastkd.maker import Feature, Maker
from fastkd.sources import TAILS, Labels, Mixture, Samples

SPARSE_K = 19  # odd, and no multiple of a vector


def _sparse(m: Maker, teacher: Any, **kwargs: Any) -> dict[str, Any]:
    return {"student": m.head(m.hidden[0], True), "teacher": teacher, **kwargs}


def _listed(m: Maker, k: int = SPARSE_K, tail: str = "bucket", **kwargs: Any) -> dict[str, Any]:
    return _sparse(m, m.top_k(min(k, m.vocab), tail), **kwargs)


def _samples(m: Maker, normalize: bool) -> dict[str, Any]:
    ids = m.ids(m.tokens, SPARSE_K)
    ids[:, 1] = ids[:, 0]  # drawn twice
    ids[::4, -1] = -1
    weights = torch.rand(ids.shape, **m.drawn, dtype=torch.float64).float().to(m.device) / SPARSE_K
    return _sparse(m, Samples(ids, weights, normalize), temperature=1.5)


def _mixture(m: Maker, **kwargs: Any) -> dict[str, Any]:
    """Dense and sparse, with weights per token."""
    uniform = m.top_k(min(SPARSE_K, m.vocab), "uniform")
    samples = Samples(m.ids(m.tokens, 3), torch.ones(m.tokens, 3, device=m.device), normalize=True)
    teachers: list[Any] = [m.head(m.hidden[1], False), m.logits(False), uniform, Labels(m.ids(), 0.1), samples]
    weights = torch.stack([m.uniform(0.2, 1.0) for _ in teachers], -1)
    return _sparse(m, Mixture(teachers, weights), **kwargs)


def _everything(m: Maker) -> dict[str, Any]:
    """K = V, of a vocabulary that is small enough."""
    small = m.sized(vocab=min(m.vocab, 300))
    return _sparse(small, small.top_k(small.vocab), divergence="jensen_shannon")


def _without_tail(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "teacher": replace(inputs["teacher"], log_tail=None)}


def listed_diverging(m: Maker, divergence: Divergence) -> dict[str, Any]:
    """Against logits that agree with the teacher in part, so that no ratio is extreme."""
    teacher = m.top_k(min(SPARSE_K, m.vocab))
    student = m.normal(m.tokens, m.vocab, scale=0.5)
    with torch.no_grad():
        student.scatter_add_(-1, teacher.ids, (teacher.log_probs + 8).to(student))
    return {"student": student, "teacher": teacher, "divergence": divergence}


# feature -> keyword arguments of kd_loss
SPARSE_FEATURES: dict[str, Feature] = {
    **{f"top-k {tail}": partial(_listed, tail=tail) for tail in TAILS},
    "top-k padded": lambda m: _sparse(m, m.top_k(min(SPARSE_K, m.vocab), padded=m.vocab > 1)),
    "top-k without log_tail": lambda m: _without_tail(_listed(m, tail="uniform")),
    "top-k of everything": lambda m: _everything(m),
    "top-k of one": lambda m: _listed(m, 1, "uniform", divergence="cross_entropy"),
    "top-k brought to another temperature": lambda m: _sparse(
        m,
        m.top_k(min(SPARSE_K, m.vocab), "renormalize", temperature=2.0),
        temperature=m.uniform(0.5, 3.0),
        t_squared=True,
    ),
    "top-k of both, brought to another temperature": lambda m: _sparse(
        m,
        m.top_k(min(SPARSE_K, m.vocab), "renormalize_both", temperature=0.5),
        temperature=0.8,
        teacher_temperature=m.uniform(0.5, 3.0),
        divergence="reverse_kl",
    ),
    "top-k with labels": lambda m: _listed(
        m, labels=m.ids(ignored=True), label_weight=0.3, weights=m.masked(), temperature=1.5, teacher_temperature=1.0
    ),
    "top-k with all of the head": lambda m: {
        **_listed(m, divergence="jensen_shannon"),
        "student": m.head(m.hidden[0], True, bias=m.normal(m.vocab), softcap=4.0, logit_scale=1.5),
    },
    "top-k uniform by another divergence": lambda m: _listed(m, tail="uniform", divergence="reverse_kl"),
    "top-k transformed": lambda m: _listed(m, tail="uniform", target=targets.Interpolate(m.uniform(0.1, 0.9))),
    "top-k and logits": lambda m: {
        **_listed(m, divergence=0.4 * divergences.ReverseKL() + m.uniform(0.2, 1.0) * divergences.ForwardKL()),
        "student": m.logits(True),
    },
    "samples": partial(_samples, normalize=False),
    "samples normalized": partial(_samples, normalize=True),
    "mixture": lambda m: _mixture(m, divergence="reverse_kl", temperature=1.5, teacher_temperature=1.0),
    "mixture transformed": lambda m: _mixture(m, target=targets.MixUniform(0.3)),
}
