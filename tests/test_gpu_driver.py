"""What the driver does on a GPU, shown on the CPU: without a look at values, within a memory budget, never waiting."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import (
    Head,
    Mixture,
    Samples,
    TopK,
    backends,
    cases,
    chunks,
    driver,
    losses,
    primitives,
    rows_cpu,
    rows_torch,
    targets,
    testing,
)
from fastkd.backends import BACKENDS
from fastkd.problem import KD, Side

N, V, D = 13, 301, 24  # primes, but for a GEMM's sake


def rows_like(rows, **other):
    return SimpleNamespace(**{**vars(rows), **other})


@pytest.fixture
def blind(monkeypatch):
    """The torch backend as one whose driver may not look at values."""
    rows = rows_like(rows_torch, LOOKS=False)
    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], rows=lambda: rows))


FEATURES = [(name, feature) for name, op in cases.OPS.items() if name != "kl_div" for feature in op.features()]


@pytest.mark.parametrize(("op", "feature"), FEATURES, ids=lambda x: x.replace(" ", "-"))
def test_every_feature_without_a_look(blind, op, feature):
    case = testing.Case(op, feature, "torch", "fp32", "cpu", 0, 13, 331)
    case.compare().check()


# --- the size of a chunk ---


def test_tokens_of_a_chunk_by_hand():
    bf16 = 2 * 2 * 128256  # bytes of a token of two heads
    assert chunks.chunk_tokens(128256, bf16, "cuda", None) == 2048  # 2,093 fit into 1 GiB
    assert chunks.chunk_tokens(128256, bf16, "cuda", 2**31) == 4096
    assert chunks.chunk_tokens(128256, bf16, "cuda", 1) == 128
    assert chunks.chunk_tokens(128256, bf16, "cpu", 2**30) == 2048  # a budget holds on the CPU, too
    assert chunks.chunk_tokens(128256, bf16, "cpu", None) == 256


class Sizes:
    """The number of rows in each call of a row op."""

    def __init__(self, rows):
        self.seen = []
        self.rows = rows_like(rows, divergence=self.divergence)
        self.own = rows.divergence

    def divergence(self, s, *rest):
        self.seen.append(len(s))
        return self.own(s, *rest)


@pytest.mark.parametrize(("rows", "token"), [(rows_torch, 4 + 4 + 32), (rows_cpu, 4 + 4)])
def test_a_budget_cuts_the_tokens(monkeypatch, rows, token):
    name = rows.__name__.removeprefix("fastkd.rows_")
    sizes = Sizes(rows)
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], rows=lambda: sizes.rows))
    heads = [Head(torch.randn(700, D), torch.randn(V, D, requires_grad=learns)) for learns in (True, False)]
    found = [
        fastkd.kd_loss(*heads, memory_budget=budget, backend=name)
        for budget in (300 * V * token, 400 * V * token, None)
    ]
    assert sizes.seen == [256, 256, 188, 384, 316, 700]
    torch.testing.assert_close(found[0], found[2])
    fastkd.kd_loss(*heads, memory_budget=300 * V * token, chunk_tokens=650, backend=name)  # the tokens go first
    assert sizes.seen[6:] == [650, 50]


@pytest.mark.parametrize("call", ["kd_loss", "token_stats", "selected_log_probs", "topk"])
@pytest.mark.parametrize("budget", [0, -1, True, 1.5, "1GiB"])
def test_no_budget(call, budget):
    args = {"kd_loss": (torch.randn(2, 5),), "selected_log_probs": (torch.zeros(2, 1).long(),), "topk": (2,)}
    with pytest.raises(ValueError, match="memory_budget must be a positive integer or None"):
        getattr(fastkd, call)(torch.randn(2, 5), *args.get(call, ()), memory_budget=budget)


# --- sums ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_a_sum_takes_beside_its_result(dtype):
    of = {
        rows.__name__: [chunks.sum_bytes(rows, 10, dtype, *where) for where in PLACES]
        for rows in (rows_torch, rows_cpu)
    }
    expected = {
        torch.float64: ([0, 0, 0], [0, 0, 0]),
        torch.float32: ([0, 0, 0], [0, 0, 0]),
        torch.float16: ([40, 40, 40], [40, 40, 40]),
        torch.bfloat16: ([40, 40, 40], [10, 40, 10]),
    }[dtype]
    assert tuple(of.values()) == expected


PLACES = [("cpu", None), ("cuda", 40), ("cuda", 39)]  # ten float32 fit into 40 bytes


# --- nothing waits for a device ---


class NeverFromTheHost(TorchDispatchMode):
    """No tensor goes from the CPU to a device or back: the one who sends it waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[-1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device != out.device:
                raise AssertionError(f"{func} from {source.device} to {out.device}")
        return out


@pytest.fixture
def without_data(monkeypatch, blind):
    """Tensors without data, as of a GPU, on which the driver itself runs, with all gradients that it has: those of the
    forward and those of a backward. What looks at a value raises."""

    def apply(spec, tensors, backend):
        spec = replace(spec, backend=backends.choose(spec, tensors, backend))
        dense = isinstance(spec, KD) and isinstance(spec.teacher, Side) and spec.target is None
        learning = range(1, 7 if dense else 4) if isinstance(spec, KD) else range(3)
        needs = [i in learning and t is not None for i, t in enumerate(tensors)]
        count = driver.count(spec)
        outputs = driver.run(spec, tensors, (), needs)[:count]
        cotangents = [torch.empty_like(x) for x in outputs if x.is_floating_point()]
        given = driver.run(spec, tensors, cotangents, needs)
        assert [x.shape for x in given[count:]] == [t.shape for t, n in zip(tensors, needs) if n]
        return outputs

    for module in (losses, primitives):
        monkeypatch.setattr(module, "apply", apply)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())  # knows no device without data
    with torch.device("meta"), NeverFromTheHost():
        yield


def head(dtype=torch.bfloat16):
    return Head(
        torch.empty(N, D, dtype=dtype), torch.empty(V, D, dtype=dtype), torch.empty(V, dtype=dtype), softcap=30.0
    )


def listed(**kwargs):
    return TopK(torch.empty(N, 8, dtype=torch.int64), torch.empty(N, 8, dtype=torch.float16), **kwargs)


CALLS = {
    "two heads": lambda **k: fastkd.kd_loss(head(), head(), **k),
    "per token": lambda **k: fastkd.kd_loss(head(), head(), "reverse_kl", reduction="none", **k),
    "logits": lambda **k: fastkd.kd_loss(torch.empty(N, V), torch.empty(N, V), **k),
    "weights": lambda **k: fastkd.kd_loss(head(), head(), weights=torch.empty(N), **k),
    "labels": lambda **k: fastkd.kd_loss(
        head(), head(), labels=torch.empty(N, dtype=torch.int64), label_weight=0.3, temperature=2.0, **k
    ),
    "number of tokens": lambda **k: fastkd.kd_loss(head(), head(), num_tokens=torch.empty(()), **k),
    "listed": lambda **k: fastkd.kd_loss(head(), listed(log_tail=torch.empty(N)), **k),
    "listed, renormalized": lambda **k: fastkd.kd_loss(head(), listed(tail="renormalize_both"), "jensen_shannon", **k),
    "samples": lambda **k: fastkd.kd_loss(
        head(), Samples(torch.empty(N, 8, dtype=torch.int64), torch.empty(N, 8), normalize=True), **k
    ),
    "mixture": lambda **k: fastkd.kd_loss(head(), Mixture([head(), torch.empty(N, V)], weights=(0.3, 0.7)), **k),
    "target": lambda **k: fastkd.kd_loss(head(), head(), target=targets.Interpolate(0.3), **k),
    "several heads": lambda **k: fastkd.kd_loss(
        Head(torch.empty(2, N, D), torch.empty(2, V, D)),
        torch.empty(2, N, V),
        **k,
    ),
    "float16": lambda **k: fastkd.kd_loss(head(torch.float16), head(torch.float16), **k),
    "token_stats": lambda **k: fastkd.token_stats(head(), **k).lse,
    "selected_log_probs": lambda **k: fastkd.selected_log_probs(head(), torch.empty(N, 3, dtype=torch.int64), **k),
    "topk": lambda **k: fastkd.topk(head(), 5, **k).log_probs,
}


@pytest.mark.parametrize("chunk_tokens", [None, 4])
@pytest.mark.parametrize("name", CALLS, ids=lambda x: x.replace(" ", "-"))
def test_no_call_waits_for_a_gpu(without_data, name, chunk_tokens):
    assert CALLS[name](backend="torch", chunk_tokens=chunk_tokens).device.type == "meta"


class Masked(TorchDispatchMode):
    """How many times hidden states are copied without those of ignored tokens."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        hidden = isinstance(args[0], torch.Tensor) and args[0].shape[-1:] == (D,)
        self.count += hidden and func.overloadpacket is torch.ops.aten.masked_fill
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "copies"), [("two heads", 0), ("number of tokens", 0), ("weights", 1), ("labels", 1)])
def test_hidden_states_are_copied_where_a_token_may_be_ignored_alone(without_data, name, copies):
    with Masked() as masked:
        CALLS[name](backend="torch")
    assert masked.count == copies * 2 * 2  # of student and teacher, in the forward and in the backward


def test_a_call_that_would_wait_is_noticed(without_data, monkeypatch):
    seeing = rows_like(rows_torch, LOOKS=True)
    monkeypatch.setattr(driver, "_live", lambda factor: bool((factor != 0).all()))
    monkeypatch.setattr(driver, "_looks", lambda rows, device: True)
    monkeypatch.setitem(BACKENDS, "torch", replace(BACKENDS["torch"], rows=lambda: seeing))
    with pytest.raises(Exception, match="cannot be called on meta tensors"):
        CALLS["weights"](backend="torch")
    with pytest.raises(AssertionError, match="from cpu to meta"):
        torch.tensor([1.0, 2.0], device="cpu").to("meta")
