"""fastkd bench: the works' inputs and floors, the comparison with float64, the clock and the arithmetic."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import Head, TopK
from fastkd.bench import measure, report
from fastkd.bench.work import WORKS, Case

CASE = Case("heads", 48, 700, 32, 32, "fp32")


@pytest.mark.parametrize("work", ["heads", "logits"])
def test_the_reference_is_plain_pytorch_in_float64_whatever_its_chunks(work, monkeypatch):
    case = Case(work, 13, 50, 6, 6, "fp32")
    inputs = WORKS[work].inputs(case)
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in inputs.items()}
    z_s, z_t = (
        (wide["hidden"] @ wide["weight"].T, wide["teacher_hidden"] @ wide["teacher_weight"].T)
        if work == "heads"
        else wide.values()
    )
    loss = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")
    loss.backward()
    monkeypatch.setattr(measure, "REFERENCE_CHUNK", 4 * 50)  # 4 tokens, the last chunk 1
    found = measure.reference(case, inputs)
    torch.testing.assert_close(found.pop("loss"), loss.detach())
    assert found.keys() == {k for k, x in inputs.items() if x.requires_grad}
    for name, grad in found.items():
        torch.testing.assert_close(grad, wide[name].grad)


def sabotaged(how):
    def loss(hidden, weight, teacher_hidden, teacher_weight):
        student, teacher = Head(hidden, weight), Head(teacher_hidden, teacher_weight)
        if how == "temperature":
            return fastkd.kd_loss(student, teacher, temperature=1.3)
        if how == "swapped":
            return fastkd.kd_loss(student, teacher, "reverse_kl")
        if how == "a token left out":
            return fastkd.kd_loss(Head(hidden[:-8], weight), Head(teacher_hidden[:-8], teacher_weight))
        if how == "no gradient of hidden":
            return fastkd.kd_loss(Head(hidden.detach(), weight), teacher)
        if how == "part of the vocabulary":
            return fastkd.kd_loss(Head(hidden, weight[:600]), Head(teacher_hidden, teacher_weight[:600]))
        return WORKS["heads"].fused(hidden, weight, teacher_hidden, teacher_weight)

    return loss


SPARSE = Case("sparse", 48, 700, 32, None, "fp32", top_k=16)


def test_a_listed_teacher_is_one_with_a_bucket_for_the_rest(monkeypatch):
    inputs = WORKS["sparse"].inputs(SPARSE)
    assert inputs["ids"].shape == inputs["log_probs"].shape == (48, 16)
    assert inputs["log_probs"].dtype == torch.float16 and inputs["ids"].dtype == torch.int64
    h, w = (inputs[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    p, q = inputs["log_probs"].double().exp(), (h @ w.T).softmax(-1).gather(-1, inputs["ids"])
    assert 0.1 < p.sum(-1).mean() < 0.99  # what is listed matters, and what is not
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    loss = (p * (p / q).log()).sum(-1).mean()
    loss.backward()
    monkeypatch.setattr(measure, "REFERENCE_CHUNK", 7 * 700)
    truth = measure.reference(SPARSE, inputs)
    for found, exact in ((truth["loss"], loss.detach()), (truth["hidden"], h.grad), (truth["weight"], w.grad)):
        torch.testing.assert_close(found, exact)


def test_teachers_are_listed_a_part_at_a_time(monkeypatch):
    """Each part has logits of its own, and the likeliest first."""
    monkeypatch.setattr("fastkd.bench.work.TEACHER_ROWS", 20)
    inputs = WORKS["sparse_logits"].inputs(Case("sparse_logits", 48, 700, None, None, "bf16", top_k=16))
    assert inputs["ids"].shape == (48, 16) and inputs["ids"].unique(dim=0).shape == (48, 16)
    assert (inputs["log_probs"].diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both", "uniform", "drop"])
def test_the_comparison_tells_tails_apart(tail):
    inputs = WORKS["sparse"].inputs(SPARSE)

    def loss(hidden, weight, ids, log_probs):
        return fastkd.kd_loss(Head(hidden, weight), TopK(ids, log_probs, tail))

    reason = measure.disagreement(measure.errors(loss, inputs, measure.reference(SPARSE, inputs)), 0.01)
    assert (reason is None) == (tail == "bucket"), reason


def top(hidden, weight, ranks, how):
    q = (hidden @ weight.T).log_softmax(-1)
    listed = {
        "right": q.topk(16),
        "one too few": q.topk(15),
        "least likely": q.topk(16, largest=False),
        "in another order": q.topk(16).values.flip(-1)[None],
        "no softmax": (hidden @ weight.T).topk(16),
    }[how][0]
    return (listed * ranks[: listed.shape[-1]]).sum(-1).mean()


@pytest.mark.parametrize("how", ["right", "one too few", "least likely", "in another order", "no softmax"])
def test_what_learns_nothing_is_compared_by_its_value(how):
    case = Case("topk", 48, 700, 32, None, "fp32", top_k=16)
    inputs = WORKS["topk"].inputs(case)
    truth = measure.reference(case, inputs)
    found = measure.errors(lambda **x: top(how=how, **x), inputs, truth)
    assert set(found) == {"loss"} and not any(x.requires_grad for x in inputs.values())
    assert (measure.disagreement(found, 0.01) is None) == (how == "right"), found


def test_a_loss_without_its_graph_is_not_taken_for_one_that_learns_nothing():
    inputs = WORKS["sparse"].inputs(SPARSE)
    found = measure.errors(lambda **x: WORKS["sparse"].fused(**x).detach(), inputs, measure.reference(SPARSE, inputs))
    assert found["loss"] < 1e-5 and found["hidden"] is None and found["weight"] is None


SABOTAGE = ["temperature", "swapped", "a token left out", "no gradient of hidden", "part of the vocabulary"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", [*SABOTAGE, None])
def test_the_comparison_catches_what_computes_something_else(how, dtype):
    case = Case("heads", 48, 700, 32, 32, dtype)
    inputs = WORKS["heads"].inputs(case)
    found = measure.errors(sabotaged(how), inputs, measure.reference(case, inputs))
    reason = measure.disagreement(found, measure.LIMITS[case.torch_dtype.itemsize])
    assert (reason is None) == (how is None), f"{how}: {found}"


def test_a_case_is_compared_smaller_where_float64_would_take_too_long():
    assert measure.comparable(CASE) == CASE
    large = measure.comparable(Case("heads", 4096, 128256, 2048, 8192, "bf16"))
    assert (large.tokens, large.vocab, large.dtype) == (4096, 128256, "bf16")  # more than one chunk
    assert large.hidden == large.teacher_hidden == 128
    one = measure.comparable(Case("sparse", 4096, 128256, 2048, None, "bf16", top_k=64))
    assert (one.hidden, one.teacher_hidden, one.top_k) == (128, None, 64)
    huge = measure.comparable(Case("logits", 2**18, 2**18, None, None, "fp32"))
    assert huge.tokens * huge.vocab * 64 <= measure.REFERENCE_WORK and huge.hidden is None


def test_ratios():
    medians = {"fused": 10.0, "naive": 40.0, "naive fp32": 60.0, "compiled": 15.0, "gemms": 8.0}
    entries = {name: {"status": "measured", "ms": {"median": value}} for name, value in medians.items()}
    entries["liger"] = {"status": "fails", "reason": "no"}
    measure.ratios(entries, "gemms")
    assert entries["fused"]["faster_than"] == {"naive": 4.0, "naive fp32": 6.0, "compiled": 1.5}
    assert entries["fused"]["to_floor"] == 1.25
    assert entries["naive"]["faster_than"] == {"naive fp32": 1.5, "compiled": 0.375}
    assert "to_floor" not in entries["liger"]
    cells = report.cells({**entries["fused"], "ms": {"median": 10.0, "iqr": 1.0}, "peak_bytes": 3 * 2**20})
    assert cells == ["10 ms", "10%", "3 MiB", "4.00x", "6.00x", "1.50x", "1.25x", "", ""]
    del entries["gemms"]
    measure.ratios(entries, "gemms")
    assert entries["fused"]["to_floor"] is None


def test_the_summary_of_rounds():
    found = measure.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median": 3.0, "min": 1.0, "max": 5.0, "iqr": 2.0, "rounds": 5}
    assert measure.summary([7.0])["iqr"] == 0


def test_variants_take_turns_and_the_first_round_is_not_counted():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    *_, taken = measure.times(runs, 2)
    assert order == list("ababab") and [len(values) for values in taken.values()] == [2, 2]


def test_the_copy_moves_what_the_work_must_move():
    inputs = WORKS["logits"].inputs(Case("logits", 4, 100, None, None, "bf16"))
    copied = WORKS["logits"].make_floor(inputs)()
    assert 2 * copied.nbytes == 3 * inputs["logits"].nbytes  # read and written; two inputs read, a gradient written
    inputs = WORKS["sparse_logits"].inputs(Case("sparse_logits", 4, 100, None, None, "bf16", top_k=10))
    copied = WORKS["sparse_logits"].make_floor(inputs)()
    assert 2 * copied.nbytes == 2 * inputs["logits"].nbytes + 4 * 10 * (8 + 2)


def test_gemms_write_what_they_should():
    inputs = WORKS["heads"].inputs(Case("heads", 5, 11, 3, 4, "fp32"))
    run = WORKS["heads"].make_floor(inputs)
    run()
    logits, dh, dw = (
        dict(zip(run.__code__.co_freevars, (c.cell_contents for c in run.__closure__)))[n]
        for n in ("logits", "dh", "dw")
    )
    h, w = inputs["hidden"].detach(), inputs["weight"].detach()
    torch.testing.assert_close(logits, h @ w.T)
    torch.testing.assert_close(dh, logits @ w)
    torch.testing.assert_close(dw, logits.T @ h)


@pytest.mark.parametrize(("work", "count"), [("heads", 4), ("sparse", 3), ("selected", 3), ("topk", 1)])
def test_gemms_are_as_many_as_the_work_has(work, count, monkeypatch):
    inputs, calls = WORKS[work].inputs(Case(work, 5, 11, 3, 4, "fp32", top_k=2)), []
    run, mm = WORKS[work].make_floor(inputs), torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: calls.append(1) or mm(*args, **kwargs))
    run()
    assert len(calls) == count


def test_a_case_has_the_sizes_of_its_work():
    given = Case("heads", 8, 16, 4, 9, "bf16", "a", "b", top_k=3)
    found = {work: replace(given, work=work).of_its_work() for work in WORKS}
    assert found["heads"] == replace(given, top_k=None)
    assert found["logits"] == Case("logits", 8, 16, None, None, "bf16")
    assert found["stats"] == Case("stats", 8, 16, 4, None, "bf16", "a")
    assert found["sparse"] == Case("sparse", 8, 16, 4, None, "bf16", "a", top_k=3)
    assert found["sparse_logits"] == Case("sparse_logits", 8, 16, None, None, "bf16", top_k=3)
    assert str(found["sparse"]) == "sparse, bf16, a: 8 tokens, vocabulary 16, hidden 4, top 3"
    assert str(found["heads"]) == "heads, bf16, a from b: 8 tokens, vocabulary 16, hidden 4 from 9"
    record = {**measure.blank(found["sparse"], []), "variants": {}}
    assert report.case_of(record) == found["sparse"]
    del record["top_k"]  # as in files from before there were listed teachers
    assert report.case_of(record) == replace(found["sparse"], top_k=None)
