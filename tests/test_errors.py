"""Bad arguments: an error that names the argument, what was expected and what came."""

import re

import pytest
import torch
from device import HERE, names

import fastkd
from fastkd import Head, Labels, targets
from fastkd import divergences as D

N, V, H = 5, 7, 4
X, Y = torch.randn(N, V), torch.randn(N, V)
S = Head(torch.randn(N, H), torch.randn(V, H))
T = Head(torch.randn(N, H + 1), torch.randn(V, H + 1))
IDS, ROW = torch.zeros(N, dtype=torch.int64), torch.ones(N)
NAN, INF = float("nan"), float("inf")


def at(value, i=2, like=ROW):
    x = like.clone()
    x[i] = value
    return x


VALUES = ("a temperature", "a teacher_temperature", "a label ", "an id ")  # cases about one value among others

# what is wrong -> arguments of kd_loss (the rest is good), the error, and what its message must show
KD_LOSS = {
    "student is a list": ({"student": [1.0]}, TypeError, "student", "logits or a Head", "list"),
    "student is Labels": ({"student": Labels(IDS)}, TypeError, "student", "logits or a Head", "Labels"),
    "teacher is a string": ({"teacher": "gpt"}, TypeError, "teacher", "Labels", "str"),
    "integer logits": ({"student": X.long()}, TypeError, "student (logits)", "float32", "torch.int64"),
    "integer hidden": (
        {"student": Head(S.hidden.int(), S.weight)},
        TypeError,
        "student.hidden",
        "float32",
        "torch.int32",
    ),
    "bool weight": ({"teacher": Head(T.hidden, T.weight > 0)}, TypeError, "teacher.weight", "float32", "torch.bool"),
    "complex logits": ({"teacher": Y.to(torch.complex64)}, TypeError, "teacher (logits)", "float32", "torch.complex64"),
    "a number for logits": ({"student": torch.tensor(1.0)}, ValueError, "student (logits)", "[..., V]", "[]"),
    "no vocabulary": ({"student": X[:, :0]}, ValueError, "student (logits)", "[5, 0]"),
    "no vocabulary in a head": ({"student": Head(S.hidden, S.weight[:0])}, ValueError, "student.weight", "[0, 4]"),
    "other tokens": ({"teacher": Y[:3]}, ValueError, "student", "teacher", "leading dimensions", "[5]", "[3]"),
    "other dimensions": ({"teacher": Y.unsqueeze(0)}, ValueError, "leading dimensions", "[5]", "[1, 5]"),
    "other vocabulary": ({"teacher": Y[:, :6]}, ValueError, "vocabulary", "7", "6", "vocab="),
    "a head of another vocabulary": ({"teacher": Head(T.hidden, T.weight[:6])}, ValueError, "vocabulary", "7", "6"),
    "D does not match": (
        {"student": Head(S.hidden, T.weight)},
        ValueError,
        "student.hidden",
        "student.weight",
        "[5, 4]",
        "[7, 5]",
    ),
    "weight without V": ({"student": Head(S.hidden, S.weight[0])}, ValueError, "student.weight", "[V, D]", "[4]"),
    "weight of other heads": (
        {"student": Head(torch.randn(2, 3, N, H), torch.randn(3, 2, V, H))},
        *(ValueError, "student.weight", "student.hidden", "[3, 2, 7, 4]", "[2, 3, 5, 4]"),
    ),
    "bias of another size": (
        {"student": Head(S.hidden, S.weight, torch.zeros(6))},
        *(ValueError, "student.bias", "[7]", "[6]"),
    ),
    "integer bias": ({"teacher": Head(T.hidden, T.weight, IDS)}, TypeError, "teacher.bias", "float32", "torch.int64"),
    "dtypes in a head": (
        {"student": Head(S.hidden.bfloat16(), S.weight)},
        *(ValueError, "student.hidden", "student.weight", "torch.bfloat16", "torch.float32"),
    ),
    "softcap 0": ({"student": Head(S.hidden, S.weight, softcap=0.0)}, ValueError, "student.softcap", "above 0", "0.0"),
    "softcap NaN": ({"teacher": Head(T.hidden, T.weight, softcap=NAN)}, ValueError, "teacher.softcap", "nan"),
    "logit_scale inf": (
        {"student": Head(S.hidden, S.weight, logit_scale=INF)},
        ValueError,
        "student.logit_scale",
        "inf",
    ),
    "logit_scale is a tensor": (
        {"student": Head(S.hidden, S.weight, logit_scale=torch.ones(()))},
        *(TypeError, "student.logit_scale", "a number", "Tensor"),
    ),
    "student elsewhere": ({"student": X.to("meta")}, ValueError, "student on meta", f"teacher on {HERE}"),
    "weight elsewhere": (
        {"student": Head(S.hidden, S.weight.to("meta"))},
        *(ValueError, f"student.hidden on {HERE}", "student.weight on meta"),
    ),
    "bias elsewhere": (
        {"teacher": Head(T.hidden, T.weight, torch.zeros(V, device="meta"))},
        *(ValueError, "teacher.bias on meta", f"teacher.hidden on {HERE}"),
    ),
    "weights elsewhere": ({"weights": ROW.to("meta")}, ValueError, "weights", HERE, "meta"),
    "labels elsewhere": ({"labels": IDS.to("meta")}, ValueError, "labels", HERE, "meta"),
    "temperature elsewhere": ({"temperature": ROW.to("meta")}, ValueError, "temperature", HERE, "meta"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature", "above 0", "0.0"),
    "temperature negative": ({"temperature": -2}, ValueError, "temperature", "above 0", "-2"),
    "temperature NaN": ({"temperature": NAN}, ValueError, "temperature", "finite", "nan"),
    "temperature inf": ({"temperature": INF}, ValueError, "temperature", "finite", "inf"),
    "temperature a string": ({"temperature": "2"}, TypeError, "temperature", "a number", "str"),
    "temperature True": ({"temperature": True}, TypeError, "temperature", "a number", "bool"),
    "a temperature 0": ({"temperature": at(0.0)}, ValueError, "temperature", "above 0", "0.0", "index [2]"),
    "a temperature negative": ({"temperature": at(-1.0)}, ValueError, "temperature", "above 0", "-1.0", "index [2]"),
    "a temperature NaN": ({"temperature": at(NAN)}, ValueError, "temperature", "finite", "nan", "index [2]"),
    "temperature of another shape": ({"temperature": torch.ones(3)}, ValueError, "temperature", "[5]", "[3]"),
    "temperature complex": (
        {"temperature": ROW.to(torch.complex64)},
        (TypeError, ValueError),
        "temperature",
        "torch.complex64",
    ),
    "teacher_temperature 0": ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature", "above 0", "0.0"),
    "a teacher_temperature NaN": (
        {"teacher_temperature": at(NAN)},
        ValueError,
        "teacher_temperature",
        "nan",
        "index [2]",
    ),
    "weights a number": ({"weights": 1.0}, TypeError, "weights", "a tensor", "float"),
    "weights of another shape": ({"weights": torch.ones(N, 1)}, ValueError, "weights", "[5]", "[5, 1]"),
    "labels of another shape": ({"labels": IDS[:3]}, ValueError, "labels", "[5]", "[3]"),
    "labels that are floats": ({"labels": ROW}, TypeError, "labels", "int64", "torch.float32"),
    "a label too large": ({"labels": at(V, like=IDS)}, ValueError, "labels", "[0, 7)", "7", "2"),
    "a label negative": ({"labels": at(-1, like=IDS)}, ValueError, "labels", "[0, 7)", "-1"),
    "label_weight without labels": ({"label_weight": 0.5}, ValueError, "label_weight", "labels"),
    "label_weight NaN": ({"labels": IDS, "label_weight": NAN}, ValueError, "label_weight", "nan"),
    "label_weight of another shape": (
        {"labels": IDS, "label_weight": torch.ones(2)},
        ValueError,
        "label_weight",
        "[5]",
        "[2]",
    ),
    "an id too large": ({"teacher": Labels(at(V, like=IDS))}, ValueError, "teacher.ids", "[0, 7)", "7"),
    "ids that are floats": ({"teacher": Labels(ROW)}, TypeError, "teacher.ids", "int64", "torch.float32"),
    "ids of another shape": ({"teacher": Labels(IDS[:2])}, ValueError, "teacher.ids", "[5]", "[2]"),
    "label_smoothing above 1": ({"teacher": Labels(IDS, 1.5)}, ValueError, "teacher.label_smoothing", "1.5"),
    "labels twice": ({"teacher": Labels(IDS), "labels": IDS}, ValueError, "labels", "Labels"),
    "Labels by another divergence": (
        {"teacher": Labels(IDS), "divergence": "reverse_kl"},
        ValueError,
        "Labels",
        "reverse_kl",
    ),
    "Labels transformed": ({"teacher": Labels(IDS), "target": targets.Power(2.0)}, ValueError, "target", "Labels"),
    "no such divergence": ({"divergence": "kl"}, ValueError, "divergence", "forward_kl", "'kl'"),
    "divergence a class": ({"divergence": D.ForwardKL}, TypeError, "divergence", "type"),
    "divergence without parameters": ({"divergence": "alpha_beta"}, ValueError, "alpha_beta", "parameters"),
    "weight of a divergence": ({"divergence": torch.ones(3) * D.ForwardKL()}, ValueError, "divergence", "[5]", "[3]"),
    "target a string": ({"target": "taid"}, TypeError, "target", "fastkd.targets.Target", "str"),
    "target of another shape": ({"target": targets.Power(torch.ones(2))}, ValueError, "target.tau", "[5]", "[2]"),
    "weights by reverse KL": (
        {"target": targets.Enhance(IDS, 2.0), "divergence": "reverse_kl"},
        *(ValueError, "Enhance", "forward_kl", "reverse_kl"),
    ),
    "no such reduction": ({"reduction": "avg"}, ValueError, "reduction", "batchmean", "'avg'"),
    "no such vocab": ({"vocab": "clip"}, ValueError, "vocab", "truncate", "'clip'"),
    "num_tokens with sum": ({"reduction": "sum", "num_tokens": 3}, ValueError, "num_tokens", "mean", "'sum'"),
    "num_tokens negative": ({"num_tokens": -3}, ValueError, "num_tokens", "-3"),
    "num_tokens NaN": ({"num_tokens": NAN}, ValueError, "num_tokens", "nan"),
    "num_tokens of a shape": ({"num_tokens": ROW}, ValueError, "num_tokens", "[5]"),
    "chunk_tokens 0": ({"chunk_tokens": 0}, ValueError, "chunk_tokens", "positive", "0"),
    "chunk_tokens a float": ({"chunk_tokens": 2.0}, ValueError, "chunk_tokens", "2.0"),
    "no such backend": ({"backend": "cuda11"}, ValueError, "backend", "torch", "'cuda11'"),
}
# the same for the building blocks, with the source as first argument
BLOCKS = {
    "source a list": ({"source": [1]}, TypeError, "source", "list"),
    "integer logits": ({"source": X.long()}, TypeError, "source", "float32", "torch.int64"),
    "D does not match": ({"source": Head(S.hidden, T.weight)}, ValueError, "source.hidden", "source.weight", "[7, 5]"),
    "weight elsewhere": ({"source": Head(S.hidden, S.weight.to("meta"))}, ValueError, "source.weight on meta"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature", "above 0", "0.0"),
    "a temperature NaN": ({"temperature": at(NAN)}, ValueError, "temperature", "nan", "index [2]"),
    "temperature of another shape": ({"temperature": torch.ones(3)}, ValueError, "temperature", "[5]", "[3]"),
    "no such backend": ({"backend": "cuda11"}, ValueError, "backend", "torch", "'cuda11'"),
}
SELECT = {
    "ids that are floats": ({"ids": torch.ones(N, 2)}, TypeError, "ids", "int64", "torch.float32"),
    "ids of other tokens": ({"ids": IDS[:3, None]}, ValueError, "ids", "[5]", "[3, 1]"),
    "ids without K": ({"ids": IDS}, ValueError, "ids", "[..., K]", "[5]"),
    "an id too large": ({"ids": at(V, like=IDS)[:, None]}, ValueError, "ids", "[0, 7)", "7"),
    "an id negative": ({"ids": at(-1, like=IDS)[:, None]}, ValueError, "ids", "[0, 7)", "-1"),
    "ids elsewhere": ({"ids": IDS[:, None].to("meta")}, ValueError, "ids", HERE, "meta"),
}


def refuses(call, good, bad, error, *shown):
    with pytest.raises(error) as caught:
        call(**good | bad)
    for words in shown:
        assert re.search(rf"(?<![\w.]){re.escape(words)}(?!\w)", str(caught.value)), (
            f"{words!r} is not in: {caught.value}"
        )


@pytest.mark.parametrize("what", names(KD_LOSS, *VALUES))
def test_kd_loss_refuses(any_backend, what):
    bad, *expected = KD_LOSS[what]
    head = bad.get("student", bad.get("teacher"))
    good = (
        {"student": S, "teacher": T}
        if isinstance(head, Head) and head.hidden.dim() == 2
        else {"student": X, "teacher": Y}
    )
    refuses(fastkd.kd_loss, good | {"backend": any_backend}, bad, *expected)


@pytest.mark.parametrize("what", names(BLOCKS, *VALUES))
def test_building_blocks_refuse(any_backend, what):
    bad, *expected = BLOCKS[what]
    good = {"source": S, "backend": any_backend}
    refuses(fastkd.token_stats, good, bad, *expected)
    refuses(fastkd.selected_log_probs, good | {"ids": IDS[:, None]}, bad, *expected)


@pytest.mark.parametrize("what", names(SELECT, *VALUES))
def test_selected_log_probs_refuses(any_backend, what):
    bad, *expected = SELECT[what]
    refuses(fastkd.selected_log_probs, {"source": X, "backend": any_backend}, bad, *expected)


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_kl_div_refuses_what_torch_refuses():
    for bad in ({"reduction": "avg"}, {"target": Y[:, :3]}):
        arguments = {"input": X.log_softmax(-1), "target": Y.softmax(-1)} | bad
        with pytest.raises(Exception) as theirs:
            torch.nn.functional.kl_div(**arguments)
        with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
            fastkd.kl_div(**arguments)


def test_an_ignored_label_may_be_anything_ignored(any_backend):
    """ignore_index itself is no label out of range."""
    for ignore_index in (-100, -1, V, 3):
        y = at(ignore_index, like=IDS)
        fastkd.kd_loss(X, Y, labels=y, label_weight=0.5, ignore_index=ignore_index, backend=any_backend)
