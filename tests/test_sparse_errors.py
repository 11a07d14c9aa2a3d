"""Sparse teachers that are refused: the error names the argument, what was expected and what came."""

import pytest
import torch
from device import names

import fastkd
from fastkd import Mixture, Samples, TopK, sparse
from fastkd.sources import TAILS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

S = torch.randn(5, 7)
IDS, LOG_P = torch.tensor([[0, 3], [6, 1], [2, 4], [5, 0], [1, 2]]), torch.tensor([[0.5, 0.3]]).log().repeat(5, 1)


def with_id(value, where=(2, 1)):
    ids = IDS.clone()
    ids[where] = value
    return ids


def with_log_p(value, where=(2, 1)):
    log_p = LOG_P.clone()
    log_p[where] = value
    return log_p


VALUES = (
    "an id ",
    "a sum above 1",
    "probabilities for",
    "a tail that does not",
    "negative w",
    "a negative w",
    "weights of 0",
)

# what is wrong -> teacher, other arguments, and what the message must show
REFUSED = {
    "an id twice": (TopK(with_id(2), LOG_P), {}, "teacher.ids", "different from each other in a row", "[0, 2, 0]"),
    "an id too large": (TopK(with_id(7), LOG_P), {}, "teacher.ids", "[0, 7) or -1", "got 7", "[0, 2, 1]"),
    "an id of -2": (TopK(with_id(-2), LOG_P), {}, "teacher.ids", "or -1 for padding", "got -2"),
    "a sum above 1": (TopK(IDS, with_log_p(-0.1)), {}, "teacher.log_probs", "sum to at most 1", "got 1.4", "[0, 2]"),
    "probabilities for log_probs": (TopK(IDS, LOG_P.exp()), {}, "teacher.log_probs", "sum to at most 1"),
    "a tail that does not fit": (
        TopK(IDS, LOG_P, log_tail=torch.zeros(5)),
        *({}, "teacher.log_tail", "sum to 1", "got 1.7"),
    ),
    "more entries than there are": (
        TopK(torch.arange(8).expand(5, 8), torch.full((5, 8), -3.0)),
        *({}, "teacher.ids", "at most the 7 entries", "K = 8"),
    ),
    "no such tail": (TopK(IDS, LOG_P, "cut"), {}, "teacher.tail", "bucket", "'cut'"),
    "a temperature of 0": (TopK(IDS, LOG_P, temperature=0.0), {}, "teacher.temperature", "above 0", "0.0"),
    "log_probs of another shape": (TopK(IDS, LOG_P[:, :1]), {}, "teacher.log_probs", "[5, 2]", "[5, 1]"),
    "log_tail of another shape": (TopK(IDS, LOG_P, log_tail=LOG_P), {}, "teacher.log_tail", "[5]", "[5, 2]"),
    "other tokens": (TopK(IDS[:3], LOG_P[:3]), {}, "student", "teacher.ids", "[5]", "[3]"),
    "no dimension": (TopK(torch.tensor(1), torch.tensor(0.0)), {}, "teacher.ids", "[..., K]"),
    "log_probs elsewhere": (TopK(IDS, LOG_P.to("meta")), {}, "one device", "teacher.log_probs on meta"),
    "padded vocabulary": (TopK(IDS, LOG_P), {"vocab": "pad"}, "vocab", "no vocabulary of its own", "'pad'"),
    "a transform of a bucket": (
        TopK(IDS, LOG_P),
        *({"target": fastkd.targets.Power(2.0)}, "target", "whole vocabulary", "Power", "tail='bucket'"),
    ),
    "samples by another divergence": (
        Samples(IDS, LOG_P.exp()),
        *({"divergence": "reverse_kl"}, "Samples", "forward_kl", "'reverse_kl'"),
    ),
    "negative weights": (Samples(IDS, LOG_P), {}, "teacher.weights", "not negative", "got -0.69"),
    "samples at a temperature": (
        Samples(IDS, LOG_P.exp()),
        *({"teacher_temperature": 2.0}, "teacher_temperature must be None", "Samples", "2.0"),
    ),
    "no teachers": (Mixture([]), {}, "teacher.teachers", "at least one"),
    "a mixture of a bucket": (
        Mixture([S, TopK(IDS, LOG_P)]),
        *({}, "teacher.teachers[1]", "'renormalize' or 'uniform'", "tail='bucket'"),
    ),
    "a mixture of samples": (Mixture([Samples(IDS, LOG_P.exp())]), {}, "teacher.teachers[0]", "normalize=True"),
    "a mixture of other tokens": (Mixture([S, S[:3]]), {}, "teacher.teachers[1]", "[5]", "[3]"),
    "weights of another number": (Mixture([S, S], [1.0]), {}, "teacher.weights", "[2] or [5, 2]", "[1]"),
    "weights of other tokens": (Mixture([S, S], torch.ones(3, 2)), {}, "teacher.weights", "[5, 2]", "[3, 2]"),
    "a negative weight": (Mixture([S, S], [1.0, -1.0]), {}, "teacher.weights", "not negative", "got -1"),
    "weights of 0": (Mixture([S, S], [0.0, 0.0]), {}, "teacher.weights", "not all 0"),
    "an id twice in a mixture": (
        Mixture([S, TopK(with_id(2), LOG_P, "uniform")]),
        *({}, "teacher.teachers[1].ids", "different from each other"),
    ),
}
REFUSED_TYPES = {
    "ids that are floats": (TopK(LOG_P, LOG_P), "teacher.ids", "int64", "torch.float32"),
    "log_probs that are integers": (TopK(IDS, IDS), "teacher.log_probs", "float32", "torch.int64"),
    "a mixture in a mixture": (Mixture([Mixture([S])]), "teacher.teachers[0]", "no Mixture"),
    "a string in a mixture": (Mixture(["gpt"]), "teacher.teachers[0]", "logits, a Head, TopK", "str"),
    "normalize a number": (Samples(IDS, LOG_P.exp(), 1.0), "teacher.normalize", "bool", "float"),
}


@pytest.mark.parametrize("entries", [sparse.CHECKED, 4])  # checked at a time: all, or those of two rows
@pytest.mark.parametrize("what", names(REFUSED, *VALUES))
def test_refused(any_backend, monkeypatch, what, entries):
    monkeypatch.setattr(sparse, "CHECKED", entries)
    teacher, kwargs, *shown = REFUSED[what]
    with pytest.raises(ValueError) as caught:
        fastkd.kd_loss(S, teacher, **kwargs, backend=any_backend)
    for words in shown:
        assert words in str(caught.value), f"{words!r} is not in: {caught.value}"


@pytest.mark.parametrize("what", REFUSED_TYPES)
def test_refused_types(any_backend, what):
    teacher, *shown = REFUSED_TYPES[what]
    with pytest.raises(TypeError) as caught:
        fastkd.kd_loss(S, teacher, backend=any_backend)
    for words in shown:
        assert words in str(caught.value), f"{words!r} is not in: {caught.value}"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_rounding_is_no_sum_above_1(any_backend, dtype):
    """Log-probabilities in 16 bits sum to a little more or less than 1."""
    top = (4 * torch.randn(500, 64)).log_softmax(-1).topk(64)
    for tail in TAILS:
        loss = fastkd.kd_loss(
            torch.randn(500, 64), TopK(top.indices, top.values.to(dtype), tail), reduction="none", backend=any_backend
        )
        assert loss.isfinite().all()
