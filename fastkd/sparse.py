"""A teacher that is known on some entries of the vocabulary, as outcomes with log-probabilities.

What the tails mean is written in :class:`fastkd.TopK`. `listed` brings a teacher to one form for all of them,
`outcomes` holds it against a student's row, `spread` makes a row over the whole vocabulary of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import checks
from fastkd.problem import Sparse, accumulation

RENORMALIZED = ("renormalize", "renormalize_both")
CHECKED = 2**17  # entries at a time, when they are checked


class Listed(NamedTuple):
    """The outcomes of a teacher; ... are rows."""

    tail: str
    ids: Tensor  # [..., K] int64; -1: not listed
    log_p: Tensor  # [..., K]; -inf where not listed
    log_rest: Tensor | None  # [...] bucket, renormalize: of all others as one outcome; uniform: of each of them


def listed(spec: Sparse, tensors: tuple[Tensor | None, ...], temperature: Tensor, vocab: int) -> Listed:
    """ids and log_probs [..., K], log_tail [...] or None, the wanted temperature [...] -> outcomes whose mass is 1; for
    the tail "drop" the log_probs as they are."""
    ids, log_p, log_tail = tensors
    assert ids is not None and log_p is not None
    log_p = log_p.to(accumulation(temperature.dtype))
    given = ~torch.isneginf(log_p)
    known = (ids >= 0) & given
    log_p = log_p.masked_fill(~known, 0.0)
    if spec.stored is not None:
        log_p = log_p * (spec.stored / temperature).unsqueeze(-1)
    # what nobody could check is not taken for padding
    wrong = given & ((ids < (-1 if spec.padded else 0)) | ((ids >= vocab) & (not spec.truncate)))
    there = (known & (ids < vocab)) | wrong  # vocab="truncate" leaves out what the student does not have
    log_p = log_p.masked_fill(~known, -torch.inf).masked_fill(wrong, torch.nan)
    kept = log_p.masked_fill(~there, -torch.inf)
    ids = ids.long().masked_fill(~there, -1).masked_fill(wrong, 0)
    if spec.tail == "drop":
        return Listed(spec.tail, ids, kept, None)
    log_mass = logsumexp(kept)
    if spec.tail in RENORMALIZED:
        nothing = torch.isneginf(log_mass)  # no distribution: NaN
        rest = torch.where(nothing, torch.nan, -torch.inf).to(log_mass) if spec.tail == "renormalize" else None
        return Listed(spec.tail, ids, kept - log_mass.masked_fill(nothing, 0.0).unsqueeze(-1), rest)
    if log_tail is None:
        log_rest = log1mexp(logsumexp(log_p))
    else:
        log_rest = log_tail.to(log_mass.dtype)
    others = vocab - there.sum(-1)
    log_rest = torch.where(others > 0, log_rest, -torch.inf)
    total = torch.logaddexp(log_mass, log_rest)
    if spec.tail == "uniform":
        log_rest = log_rest - others.clamp(min=1).to(log_rest.dtype).log()
    return Listed(spec.tail, ids, kept - total.unsqueeze(-1), log_rest - total)


def outcomes(t: Listed, s: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log q of the outcomes; s [..., V] are the student's logits over its temperature."""
    if t.tail == "uniform":
        return spread(t, s.shape[-1]), s.log_softmax(-1)
    there = t.ids >= 0
    x = s.gather(-1, t.ids.clamp(min=0))
    if t.tail == "renormalize_both":
        x = x.masked_fill(~there, -torch.inf)
        return t.log_p, (x - logsumexp(x).unsqueeze(-1)).masked_fill(~there, -torch.inf)
    lse = s.logsumexp(-1, keepdim=True)
    log_q = (x - lse).masked_fill(~there, -torch.inf)
    if t.log_rest is None:
        return t.log_p, log_q
    rest = logsumexp(s.masked_fill(listing(t.ids, s.shape[-1]), -torch.inf)).unsqueeze(-1) - lse
    return torch.cat((t.log_p, t.log_rest.unsqueeze(-1)), -1), torch.cat((log_q, rest), -1)


def spread(t: Listed, vocab: int) -> Tensor:
    """log p [..., V] over the whole vocabulary."""
    where = t.ids.masked_fill(t.ids < 0, vocab)  # a column more, for what is not listed
    shape = (*t.ids.shape[:-1], vocab + 1)
    if t.tail == "drop":  # an id may stand twice
        return log(t.log_p.new_zeros(shape).scatter_add(-1, where, t.log_p.exp())[..., :vocab])
    rest = -torch.inf if t.log_rest is None else t.log_rest.unsqueeze(-1)
    return (t.log_p.new_zeros(shape) + rest).scatter(-1, where, t.log_p)[..., :vocab]


def listing(ids: Tensor, vocab: int) -> Tensor:
    """Which entries are listed [..., V]."""
    mask = torch.zeros((*ids.shape[:-1], vocab + 1), dtype=torch.bool, device=ids.device)
    return mask.scatter(-1, ids.masked_fill(ids < 0, vocab), True)[..., :vocab]


def logsumexp(x: Tensor) -> Tensor:
    """torch.logsumexp over the last dimension, with finite gradients where all entries are -inf."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -torch.inf)
    top = x.detach().amax(-1, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)
    total = (x - top).exp().sum(-1)
    log = torch.where(total == 0, 1.0, total).log() + top.squeeze(-1)
    return torch.where(total == 0, -torch.inf, log)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x), for x >= 0 (1 but for rounding) -inf."""
    near = (x < 0) & (x > -math.log(2))
    far = (x < 0) & ~near
    small, large = torch.where(near, x, -0.5), torch.where(far, x, -1.0)
    result = torch.where(near, (-small.expm1()).log(), (-large.exp()).log1p())
    return torch.where(x < 0, result, torch.where(x.isnan(), x, -torch.inf))


def log(x: Tensor) -> Tensor:
    """The logarithm of x >= 0, with finite gradients where x is 0."""
    return torch.where(x == 0, 1.0, x).log().masked_fill(x == 0, -torch.inf)


def check(name: str, spec: Sparse, tensors: tuple[Tensor | None, ...], live: Tensor, vocab: int) -> None:
    """What only a look at the values shows, in rows that count [B, N]; on devices where a look costs nothing. A few
    rows at a time, so that it takes no memory to speak of."""
    ids = tensors[0]
    assert ids is not None
    if not checks.readable(*tensors, live):
        return
    rows = max(CHECKED // max(ids.shape[-1], 1), 1)
    for b in range(live.shape[0]):
        for n in range(0, live.shape[1], rows):
            some = slice(n, n + rows)
            _check_rows(
                name, spec, tuple(None if t is None else t[b, some] for t in tensors), live[b, some], vocab, (b, n)
            )


def _check_rows(
    name: str, spec: Sparse, tensors: tuple[Tensor | None, ...], live: Tensor, vocab: int, at: tuple[int, int]
) -> None:
    ids, log_probs, _ = tensors
    assert ids is not None and log_probs is not None
    counts = live.unsqueeze(-1) & ~torch.isneginf(log_probs)
    top = vocab if not spec.truncate else torch.iinfo(ids.dtype).max
    lowest, other = (-1, "-1 for padding") if spec.padded else (0, "ignore_index")
    good = ~counts | ((ids >= lowest) & (ids < top))
    checks.all_values(f"{name}.ids", f"in [0, {vocab}) or {other}", ids, good, at)
    if spec.repeats:
        return
    _check_repeats(name, ids, counts & (ids < vocab) if spec.truncate else counts, at)
    _check_mass(name, spec, tensors, live, vocab, at)


def _check_repeats(name: str, ids: Tensor, counts: Tensor, at: tuple[int, int]) -> None:
    """Each id stands once in a row."""
    ordered = ids.int().masked_fill_(~counts, -1).sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    checks.all_values(f"{name}.ids", "different from each other in a row", ordered[..., 1:], ~twice, at)


def _check_mass(
    name: str, spec: Sparse, tensors: tuple[Tensor | None, ...], live: Tensor, vocab: int, at: tuple[int, int]
) -> None:
    """Does each row sum to at most 1, with its tail to 1, but for rounding; is there mass where mass is divided by?"""
    ids, log_probs, log_tail = tensors
    assert ids is not None and log_probs is not None
    wide = log_probs.to(accumulation(log_probs.dtype)).masked_fill(ids < 0, -torch.inf)
    p = wide.exp()
    mass = p.sum(-1)
    if spec.tail in RENORMALIZED:
        some = (((wide > -torch.inf) & (ids < vocab)) | wide.isnan()).any(-1)
        what = f"of at least one entry in each row that counts for tail={spec.tail!r}"
        checks.all_values(f"{name}.log_probs", what, mass, ~live | some, at)
    # whatever their dtype now, they may have been rounded to bfloat16: by 2^-9 |log p|, and here by twice that
    slack = 2**-8 * -torch.where(p > 0, p * wide, 0.0).sum(-1).clamp(max=0) + 1e-4
    what = f"{name}.log_probs"
    checks.all_values(what, "of probabilities that sum to at most 1 in a row", mass, ~live | ~(mass > 1 + slack), at)
    if log_tail is not None:
        r = log_tail.to(mass.dtype).exp()
        slack = slack - 2**-8 * torch.where(r > 0, r * log_tail.to(mass.dtype), 0.0).clamp(max=0)
        good = ~live | ~((mass + r - 1).abs() > slack)
        checks.all_values(f"{name}.log_tail", f"such that it and {what} sum to 1 in a row", mass + r, good, at)
