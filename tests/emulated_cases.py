"""All calls of row ops that are held to their rule (emulated_rows.py): a name -> a function of that name."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial

import torch
from emulated_listed import OTHERS, SPARSE, SUMS, far_below, source, sparse, sums
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
    placed,
    rows,
    some_weights,
)

from fastkd import divergences as D
from fastkd.problem import Side


def dense(
    name,
    terms=FORWARD,
    n=N,
    vocab=VOCAB,
    dtypes=(F32, F32),
    widths=None,
    hard=None,
    edit=None,
    layout=(0, None),
    **changes,
):
    """One call of `divergence`; `edit(s, t, a)` changes its inputs, `hard` is the labels' weight (True: random)."""
    torch.manual_seed(zlib.crc32(name.encode()))
    widths = widths or (vocab, vocab)
    s, t = ((2 * torch.randn(n, width)).to(dtype) for width, dtype in zip(widths, dtypes, strict=True))
    a = rows(n, vocab, terms, **changes)
    if hard is not None:
        a = replace(a, **labelled(n, min(widths), None if hard is True else hard))
    if edit is not None:
        s, t, a = edit(s, t, a)
    start, stride = layout
    t = placed(t, start + 1, None if stride is None else t.shape[1] + 3)

    def op(module, s, g, t, a):
        return (module.divergence(s, t, g, a),)

    differences(op, s, (t, a), start, stride)


def with_holes(s, t, a):
    """Entries, and whole groups and blocks, that one or both do not have; large logits."""
    s[0, :100], t[0, :100] = -INF, -INF  # the first block of 2 to 4
    s[1, 40:48], t[1, 44:52] = -INF, -INF  # student alone: infinite for some divergences
    t[2, -90:] = -INF
    s[3, 200:], t[3, 200:] = -INF, -INF
    s[4] += 1e4
    t[4] -= 1e4
    return s, t, a


def masked(s, t, a):
    return far_below(s), far_below(t), a


def teacher_with_holes(s, t, a):
    t[0, 50:90] = -INF  # reverse KL is infinite
    return s, t, a


def broken(s, t, a):
    """Rows that are NaN alone, and rows that do not count."""
    s[0] = -INF
    s[1, 7] = NAN
    t[2, 300] = NAN
    s[3], t[3] = NAN, INF
    return (
        s,
        t,
        replace(
            a,
            factor=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.7]),
            labels=torch.full((5,), 9),
            label_weight=torch.tensor([0.0, 0.0, 0.0, 1.0, 0.5]),
        ),
    )


def left_out(s, t, a):
    """Terms without weight, beside a teacher that is not finite."""
    t[0], t[1, 5] = NAN, INF
    w = torch.rand(len(a.divergences), 5) + 0.5
    w[:, :2] = 0
    return s, t, replace(a, term_weights=w, label_weight=torch.tensor([0.4, 0.0, 0.4, 0.0, 0.9]))


def weights_as_given(s, t, a):
    return s, t.float().log_softmax(-1).to(t.dtype) + 0.7, replace(a, t_temperature=torch.ones(5), normalized=False)


CLOSED = {
    "forward_kl": D.ForwardKL(),
    "reverse_kl": D.ReverseKL(),
    "cross_entropy": D.CrossEntropy(),
    "general": D.SkewKL(0.3),
}
HALVES = {
    "bfloat16": (BF16, BF16),
    "float16": (F16, F16),
    "bfloat16, float32": (BF16, F32),
    "float32, float16": (F32, F16),
}
LAYOUTS = {  # first entry, row stride: rows that begin anywhere; a multiple of 16 bytes in every dtype
    "odd": (3, VOCAB + 2),
    "even": (8, VOCAB + 3),
}

DENSE = {
    **{f"{d}": {"terms": (d,)} for d in SINGLE},
    **{f"{d} in {name}": {"terms": (d,), "dtypes": x} for name, x in HALVES.items() for d in CLOSED.values()},
    **{
        f"{f} of layout {name}, {x}": {"terms": (d,), "layout": y, "dtypes": HALVES[x]}
        for name, y in LAYOUTS.items()
        for x in ("bfloat16", "bfloat16, float32")
        for f, d in CLOSED.items()
    },
    **{f"{name} with labels": {"terms": (d,), "hard": True} for name, d in CLOSED.items()},
    **{
        f"{name} with labels at temperature 1": {"terms": (d,), "hard": True, "s_temperature": torch.ones(N)}
        for name, d in CLOSED.items()
    },
    **{f"{name} with holes": {"terms": (d,), "edit": with_holes} for name, d in CLOSED.items()},
    **{
        f"{name} masked, T {temperature}, {dtypes[0]}": {
            "terms": (d,),
            "edit": masked,
            "hard": True,
            "dtypes": dtypes,
            **{f"{side}_temperature": torch.full((N,), temperature) for side in "st"},
        }
        for name, d in CLOSED.items()
        for temperature in (1.0, 2.0, 4.0)
        for dtypes in ((F32, F32), (BF16, BF16))
    },
    **{f"{name} with broken rows": {"terms": (d,), "edit": broken} for name, d in CLOSED.items()},
    **{f"{name} left out": {"terms": (d,), "edit": left_out, "hard": True} for name, d in CLOSED.items()},
    "a sum": {"terms": SUM},
    "a sum with an infinite term of weight 0": {
        "terms": (D.ForwardKL(), D.ReverseKL()),
        "term_weights": some_weights(N, 3, 0),
        "edit": teacher_with_holes,
    },
    "a sum with weights of 0": {"terms": SUM, "term_weights": some_weights(N, 1, 2, 1)},
    "softcap": {"student": Side(softcap=3.0), "hard": True},
    "softcap of a sum": {"terms": SUM, "student": Side(softcap=3.0, logit_scale=1.5), "dtypes": HALVES["bfloat16"]},
    "teacher's softcap": {"teacher": Side(softcap=2.0, logit_scale=1.5)},
    "logit_scale": {"student": Side(logit_scale=0.6), "hard": True},
    "negative logit_scale": {"student": Side(logit_scale=-0.8), "teacher": Side(logit_scale=-1.2)},
    "narrow student": {"widths": (290, VOCAB), "hard": True, "terms": (D.JensenShannon(0.4),)},
    "narrow teacher": {"widths": (VOCAB, 301), "hard": True},
    "narrow student with a softcap": {
        "widths": (290, VOCAB),
        "student": Side(softcap=3.0, logit_scale=-1.0),
        "terms": (D.ReverseCrossEntropy(),),
    },
    "weights as given": {"terms": (D.CrossEntropy(),), "edit": weights_as_given},
    "weights as given in bfloat16": {
        "terms": (D.CrossEntropy(),),
        "edit": weights_as_given,
        "dtypes": HALVES["bfloat16"],
    },
    # alone; one below a group, a group, one above; two warps and a little
    **{f"vocabulary of {v}": {"vocab": v, "hard": True} for v in (1, 7, 8, 9, 2 * 32 * 8 + 3)},
    "one row": {"n": 1},
}


CASES = {
    **{f"divergence: {name}": partial(dense, **x) for name, x in DENSE.items()},
    **{f"sparse: {name}": partial(sparse, **x) for name, x in SPARSE.items()},
    **{name: partial(source, **x) for name, x in OTHERS.items()},
    **{name: partial(sums, **x) for name, x in SUMS.items()},
}
