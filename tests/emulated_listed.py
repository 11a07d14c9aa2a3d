"""Calls of the row ops that list entries, of statistics and of sums; see emulated_rows."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial

import torch
from emulated_rows import (
    BF16,
    F16,
    F32,
    FORWARD,
    INF,
    NAN,
    SINGLE,
    SUM,
    VOCAB,
    N,
    differences,
    labelled,
    rows,
    some_weights,
)

from fastkd import divergences as D
from fastkd import rows_cpu, rows_cuda
from fastkd.problem import Side
from fastkd.sparse import Listed


def listed(tail, n, vocab, k, repeated=False, heavy=0.0):
    """Outcomes with a mass of 1; `heavy`: the log of what is left for all others"""
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(n)])
    rest = k < vocab and tail in ("bucket", "uniform")
    log_p = torch.randn(n, k + rest).log_softmax(-1)
    if rest and heavy:
        log_p[:, -1] = heavy
    if repeated:
        ids[:, 1], ids[0, 2:5] = ids[:, 0], ids[0, 0]
    log_p, log_rest = (log_p[:, :-1], log_p[:, -1]) if rest else (log_p, torch.full((n,), -INF))
    if tail == "uniform" and rest:
        log_rest = log_rest - torch.tensor(vocab - k).log()
    padded = ids.clone()
    if k > 3:
        padded[::2, 3] = -1
    log_p = log_p.masked_fill(padded < 0, -INF).contiguous()
    if tail == "uniform" and k > 3:  # the padding is among the others
        log_rest = torch.where(padded.lt(0).any(-1), log_rest - 0.1, log_rest)
    return Listed(tail, padded, log_p, log_rest.contiguous() if tail in ("bucket", "renormalize", "uniform") else None)


def sparse(
    name,
    tail="bucket",
    terms=FORWARD,
    n=N,
    vocab=VOCAB,
    k=19,
    dtype=F32,
    width=None,
    hard=None,
    edit=None,
    layout=(0, None),
    repeated=False,
    **changes,
):
    torch.manual_seed(zlib.crc32(name.encode()))
    s = (2 * torch.randn(n, width or vocab)).to(dtype)
    t = listed(tail, n, vocab, min(k, vocab), repeated)
    a = rows(n, vocab, terms, **changes)
    if hard is not None:
        a = replace(a, **labelled(n, width or vocab))
    if edit is not None:
        s, t, a = edit(s, t, a)

    def op(module, s, g, t, a):
        return (module.sparse(s, t, g, a),)

    differences(op, s, (t, a), *layout)


def far_below(s):
    """The second half at what stands for minus infinity, and one logit as large."""
    half = s.shape[1] // 2
    s[0, half:], s[1, half:], s[2, half:], s[4, 5] = -1e30, -1e10, torch.finfo(BF16).min, 1e30
    return s


def sparse_masked(s, t, a):
    return far_below(s), t, a


def far_apart(s, t, a):
    """Nearly all mass on what is listed: of the others some 1e-30 in one row, too little for float32 in another."""
    for row, gap in ((0, 70.0), (1, 120.0), (2, 1e4)):
        s[row].scatter_(0, t.ids[row].clamp(min=0), gap)
    return s, t, a


def without_tail(s, t, a):
    t.log_rest[0] = -INF  # reverse KL is infinite
    return s, t, a


def sparse_holes(s, t, a):
    s[0, :120] = -INF
    s[0].scatter_(0, t.ids[0].clamp(min=0), 1.0)
    s[1].scatter_(0, t.ids[1, 4:6], -INF)  # listed, and the student has nothing there
    s[2] = -INF
    s[2].scatter_(0, t.ids[2].clamp(min=0), torch.randn(t.ids.shape[1]))  # no others
    s[4] += 1e4
    return s, t, a


def sparse_broken(s, t, a):
    s[0] = -INF if t.log_rest is None else NAN  # rows_torch gives entries that are not there 0 beside a NaN
    s[1, 7] = NAN
    if t.tail == "renormalize_both":
        s[4, 9] = INF  # with the others a loss of NaN, or of infinity in rows_torch
    s[2] = NAN
    return s, t, replace(a, factor=torch.tensor([1.0, 1.0, 0.0, 0.5, 0.7]))


def nothing_listed(s, t, a):
    t.ids[1], t.log_p[1] = -1, -INF
    return s, t, a


CE = (D.CrossEntropy(),)
TAILS = {
    "bucket": (D.ForwardKL(),),
    "renormalize": (D.ForwardKL(),),
    "renormalize_both": (D.ForwardKL(),),
    "uniform": (D.ForwardKL(),),
    "drop": CE,
}
SPARSE = {
    **{f"{tail}": {"tail": tail, "terms": x} for tail, x in TAILS.items()},
    **{
        f"{tail} in {dtype}": {"tail": tail, "terms": x, "dtype": dtype, "layout": (3, VOCAB + 2)}
        for tail, x in TAILS.items()
        for dtype in (BF16, F16)
    },
    **{f"{tail} with labels": {"tail": tail, "terms": x, "hard": True} for tail, x in TAILS.items()},
    **{
        f"{tail} with all of the head": {
            "tail": tail,
            "terms": x,
            "student": Side(softcap=3.0, logit_scale=1.3),
            "hard": True,
            "s_temperature": torch.ones(N),
        }
        for tail, x in TAILS.items()
    },
    **{f"{tail} with holes": {"tail": tail, "terms": x, "edit": sparse_holes} for tail, x in TAILS.items()},
    **{f"{tail} with broken rows": {"tail": tail, "terms": x, "edit": sparse_broken} for tail, x in TAILS.items()},
    **{
        f"{tail} masked, T {temperature}": {
            "tail": tail,
            "terms": x,
            "edit": sparse_masked,
            "hard": True,
            "s_temperature": torch.full((N,), temperature),
        }
        for tail, x in TAILS.items()
        for temperature in (1.0, 4.0)
    },
    **{f"bucket by {d}": {"terms": (d,)} for d in SINGLE},
    "bucket by a sum": {"terms": SUM, "term_weights": some_weights(N, 1, 2, 1)},
    "bucket by a sum with an infinite term of weight 0": {
        "terms": (D.ForwardKL(), D.ReverseKL()),
        "term_weights": some_weights(N, 3, 0),
        "edit": without_tail,
    },
    "uniform by a sum": {
        "tail": "uniform",
        "terms": (D.ForwardKL(), D.CrossEntropy()),
        "term_weights": some_weights(N, 1, 2),
    },
    "both by jensen_shannon": {"tail": "renormalize_both", "terms": (D.JensenShannon(0.4),)},
    "bucket, far apart": {"edit": far_apart},
    "bucket by reverse_kl, far apart": {"edit": far_apart, "terms": (D.ReverseKL(),)},
    "uniform, far apart": {"tail": "uniform", "edit": far_apart},
    "drop of samples that repeat": {"tail": "drop", "terms": CE, "repeated": True, "hard": True},
    "drop of nothing": {"tail": "drop", "terms": CE, "edit": nothing_listed},
    "bucket of one": {"k": 1},
    "bucket of all": {"k": VOCAB},
    "drop of none": {"tail": "drop", "terms": CE, "k": 0},
    "narrow": {
        "width": 290,
        "hard": True,
        "tail": "drop",
        "terms": CE,
        "edit": lambda s, t, a: (s, t._replace(ids=t.ids % 290), a),
    },
    **{f"listed, vocabulary of {v}": {"vocab": v, "k": 4, "hard": True} for v in (1, 7, 8, 9, 2 * 32 * 8 + 3)},
}


# ---- the rest ----


def source(name, op, n=N, vocab=VOCAB, dtype=F32, side=None, edit=None, layout=(0, None), extra=None, **kwargs):
    """An op on one row: op(module, s, g, side, vocab, temperature, *arguments) -> outputs"""
    torch.manual_seed(zlib.crc32(name.encode()))
    s = (2 * torch.randn(n, vocab)).to(dtype)
    temperature = torch.rand(n) + 0.7
    if edit is not None:
        s = edit(s)
    arguments = extra(s, n, vocab) if extra else ()

    def call(module, s, g, temperature, *rest):
        return op(module, s, g, side or Side(), vocab, temperature, *rest, **kwargs)

    differences(call, s, (temperature, *arguments), *layout)


def select(module, s, g, side, vocab, temperature, ids, cotangent):
    return (module.select(s, g, side, vocab, temperature, ids, None if g is None else cotangent),)


def selected(s, n, vocab, k=7):
    ids = torch.randint(vocab, (n, k))
    ids[:, 1 % k] = ids[:, 0]
    return ids, torch.randn(n, k)


def stats(module, s, g, side, vocab, temperature, *cotangents):
    lse, entropy, top, at = module.stats(s, g, side, vocab, temperature, None if g is None else cotangents)
    return lse, entropy, top, at.where(top == top, 0).double()  # any place of a NaN will do


def numbers(s, n, vocab):
    return tuple(torch.randn(n) for _ in range(3))


def top(module, s, g, side, vocab, temperature, d_log_probs, d_tail):
    given = None if g is None else (d_log_probs, d_tail)
    log_probs, log_tail, ids = module.top(s, g, side, vocab, temperature, d_log_probs.shape[1], given)
    log_tail = log_tail.where(log_probs[:, 0] == log_probs[:, 0], NAN)  # beside infinity a 0 or a NaN
    return log_probs, log_tail, ids.double()


def of_top(s, n, vocab, k):
    return torch.randn(n, k), torch.randn(n)


def holes(s):
    s[0, :100] = -INF
    s[1, 5:] = -INF
    s[2] += 1e4
    return s


def lost(s):
    """all -inf, a NaN, an infinity"""
    s[0], s[1, 40], s[2, 50] = -INF, NAN, INF
    return s


def ties(s):
    """A handful of values, among them 0 and -0."""
    s = s.round()
    s[:, ::3] *= -0.0
    return s


HEAD = Side(softcap=4.0, logit_scale=1.3)
LOGITS = {
    "": {},
    " in bfloat16": {"dtype": BF16, "layout": (3, VOCAB + 2)},
    " in float16": {"dtype": F16, "layout": (8, VOCAB + 3)},
    " of a head": {"side": HEAD},
    " with holes": {"edit": holes},
    " with lost rows": {"edit": lost},
    " masked": {"edit": far_below},
    " of 9": {"vocab": 9},
    " of 515": {"vocab": 515},
}
OTHERS = {
    **{f"select{name}": {"op": select, "extra": selected, **x} for name, x in LOGITS.items()},
    "select of one entry": {"op": select, "extra": partial(selected, k=1), "vocab": 1},
    **{f"stats{name}": {"op": stats, "extra": numbers, **x} for name, x in LOGITS.items()},
    **{
        f"top{name}": {"op": top, "extra": partial(of_top, k=min(5, x.get("vocab", 5))), **x}
        for name, x in LOGITS.items()
    },
    **{
        f"top of {k} of equals, logit_scale {scale}": {
            "op": top,
            "extra": partial(of_top, k=k),
            "edit": ties,
            "side": Side(logit_scale=scale),
        }
        for k in (1, 40, 150, 300, VOCAB)  # among the largest; among 0 and -0; among the smallest; all
        for scale in (1.0, 0.5)
    },
    # more groups than a block has threads
    "top of more": {"op": top, "extra": partial(of_top, k=30), "vocab": 5003, "n": 2},
    "stats of more": {"op": stats, "extra": numbers, "vocab": 5003, "n": 2},
    "stats of equals": {"op": stats, "extra": numbers, "edit": ties},
}


def sums(name, n, first, start=0, part=BF16):
    """24 bits, bit for bit as the C++ backend has them."""
    torch.manual_seed(zlib.crc32(name.encode()))
    x = torch.randn(start + n + 24)
    high, low = x.to(BF16), torch.randint(0, 256, x.shape, dtype=torch.uint8)
    p = (0.01 * torch.randn(start + n + 24)).to(part)
    p[start], high[start + n - 1] = NAN, INF
    expected = []
    for module in (rows_cpu, rows_cuda):
        h, m = high.clone(), low.clone()
        module.accumulate(h[start : start + n], m[start : start + n], p[start : start + n], first)
        expected.append((h.clone(), m.clone()))
        module.round_sum(h[start : start + n], m[start : start + n])
        expected.append((h, m))
    for (a, b), (c, d) in ((expected[0], expected[2]), (expected[1], expected[3])):
        assert torch.equal(a.view(torch.int16), c.view(torch.int16)) and torch.equal(b, d), "the bits differ"


SUMS = {
    f"sum of {n} {p}s{' more' if not first else ''}, {start} entries in": {
        "n": n,
        "first": first,
        "start": start,
        "part": p,
    }
    # less than a group; a block and a little; off the alignment
    for n, start in ((5, 0), (256 * 8 + 11, 0), (100, 3))
    for first in (True, False)
    for p in (BF16, F32, F16)
}
