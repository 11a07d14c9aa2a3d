"""What is measured: for each piece of work its inputs, fastkd's loss, the same in plain PyTorch, and the floor.

A piece of work is one entry of WORKS; everything else (comparing, timing, memory, tables, plots) follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import TopK, plan
from fastkd.backends import BACKENDS, use_backend
from fastkd.bench import losses
from fastkd.bench.losses import Cast
from fastkd.bench.peers import PEERS
from fastkd.terminal import DTYPES

Inputs = dict[str, Tensor]
Loss = Callable[..., Tensor]  # inputs by name -> a scalar, the mean over tokens; without a gradient if none requires it
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One piece of work at one size, on one device."""

    work: str
    tokens: int
    vocab: int
    hidden: int | None  # None where the work has no head
    teacher_hidden: int | None  # None where the teacher has none
    dtype: str
    model: str | None = None
    teacher_model: str | None = None
    device: str = "cpu"
    top_k: int | None = None  # listed entries; None where the work lists none

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        hidden = "" if self.hidden is None else f", hidden {self.hidden:,}"
        if self.teacher_hidden not in (None, self.hidden):
            hidden += f" from {self.teacher_hidden:,}"
        listed = "" if self.top_k is None else f", top {self.top_k:,}"
        models = " from ".join(dict.fromkeys(name for name in (self.model, self.teacher_model) if name))
        named = f"{models}: " if models else ""
        return f"{self.work}, {self.dtype}, {named}{self.tokens:,} tokens, vocabulary {self.vocab:,}{hidden}{listed}"

    def of_its_work(self) -> Case:
        """The same without the sizes that the work does not have."""
        work, found = WORKS[self.work], self
        if work.heads < 2:
            found = replace(found, teacher_hidden=None, teacher_model=None)
        if work.heads < 1:
            found = replace(found, hidden=None, model=None)
        return found if work.lists else replace(found, top_k=None)


@dataclass(frozen=True)
class Work:
    """One piece of work. All losses are means over tokens, and take the inputs by name."""

    name: str
    summary: str
    inputs: Callable[[Case], Inputs]  # those that require grad receive gradients
    per_token: tuple[str, ...]  # inputs whose first dimension is tokens
    fused: Loss
    naive: Callable[..., Tensor]  # (cast, **inputs): plain PyTorch, with `cast` on the logits
    floor: str
    make_floor: Callable[[Inputs], Run]
    planned: Callable[[Case, str], int | None]  # bytes that a variant takes beside the inputs
    heads: int = 1  # the student's and the teacher's, the student's alone, or none
    lists: bool = False  # does it list top_k entries?
    more: dict[str, Loss] = field(default_factory=dict)  # variants that are measured when they are named


def _generator(case: Case, seed: int = 0) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(seed)


def _normal(case: Case, g: torch.Generator, *shape: int, scale: float = 1.0, grad: bool = False) -> Tensor:
    x = torch.randn(shape, generator=g, dtype=case.torch_dtype, device=case.device)
    return x.mul_(scale).requires_grad_(grad)


def _head(case: Case, g: torch.Generator, d: int | None, grad: bool) -> tuple[Tensor, Tensor]:
    """hidden [N, D], weight [V, D]; logits with a standard deviation of 1"""
    assert d is not None
    hidden = _normal(case, g, case.tokens, d, grad=grad)
    return hidden, _normal(case, g, case.vocab, d, scale=d**-0.5, grad=grad)


# --- kd_loss(Head, Head) ---------------------------------------------------------------------------------------------


def _two_heads(case: Case) -> Inputs:
    g = _generator(case)
    hidden, weight = _head(case, g, case.hidden, True)
    teacher_hidden, teacher_weight = _head(case, g, case.teacher_hidden, False)
    return {"hidden": hidden, "weight": weight, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}


def _gemms(inputs: Inputs) -> Run:
    """The GEMMs alone, each whole, into memory that is there: the logits of each head; dH and dW where they are asked
    for."""
    x, learns = {name: t.detach() for name, t in inputs.items()}, inputs["hidden"].requires_grad
    h, w = x["hidden"], x["weight"]
    logits, dh, dw = h.new_empty(h.shape[0], w.shape[0]), torch.empty_like(h), torch.empty_like(w)

    def run() -> None:
        if "teacher_weight" in x:
            torch.mm(x["teacher_hidden"], x["teacher_weight"].T, out=logits)
        torch.mm(h, w.T, out=logits)
        if learns:
            torch.mm(logits, w, out=dh)
            torch.mm(logits.T, h, out=dw)

    return run


def _planned(case: Case, variant: str) -> int | None:
    """Bytes by fastkd.plan, for heads and for given logits."""
    dtype, logits_dtype = case.torch_dtype, torch.float32 if variant == "naive fp32" else None
    kind = torch.device(case.device).type
    if variant.startswith("naive"):
        shape = case.tokens, case.vocab, case.hidden
        return plan.total(plan.naive_bytes(*shape, dtype, logits_dtype, device=kind, top_k=case.top_k))
    if variant.startswith("fused") and not variant.endswith("each"):
        backend = variant.removeprefix("fused").strip() or plan.default_backend(dtype, kind)
        if backend != "reference" and BACKENDS[backend].unavailable() is None:
            known = backend if backend in plan.PLANNED else "cuda"  # triton takes what cuda does
            sizes = case.tokens, case.vocab, case.hidden, case.teacher_hidden
            return plan.total(plan.fused_bytes(*sizes, dtype, backend=known, device=kind, top_k=case.top_k))
    return None


# --- kd_loss(logits, logits) and kl_div(log_q, log_p) ----------------------------------------------------------------


def _two_logits(case: Case) -> Inputs:
    g, shape = _generator(case), (case.tokens, case.vocab)
    return {"logits": _normal(case, g, *shape, scale=2, grad=True), "teacher_logits": _normal(case, g, *shape, scale=2)}


def _two_log_probs(case: Case) -> Inputs:
    found = _two_logits(case)
    log_q, log_p = (x.detach().log_softmax(-1) for x in found.values())
    return {"log_q": log_q.requires_grad_(), "log_p": log_p}


def _copy(inputs: Inputs) -> Run:
    """A copy that moves as many bytes as the work must: all inputs read, the gradients written."""
    like = next(iter(inputs.values()))
    size = sum(x.nbytes * (1 + x.requires_grad) for x in inputs.values()) // (2 * like.element_size())
    x, out = like.new_ones(size), like.new_ones(size)
    return lambda: out.copy_(x)


# --- kd_loss(Head, TopK) and kd_loss(logits, TopK) -------------------------------------------------------------------

TEACHER_STD = 4.0  # of the logits of a teacher that is listed: the 64 likeliest of 32,000 hold four fifths
TEACHER_ROWS = 256  # of it that are alive at a time


def _listed(case: Case) -> Inputs:
    """The teacher's likeliest entries as a cache gives them: ids [N, K] int64, log-probabilities [N, K] float16"""
    assert case.top_k is not None
    g, found = _generator(case, 1), []
    for start in range(0, case.tokens, TEACHER_ROWS):
        shape = min(TEACHER_ROWS, case.tokens - start), case.vocab
        z = torch.randn(shape, generator=g, device=case.device).mul_(TEACHER_STD)
        found.append(z.log_softmax(-1).topk(case.top_k))
    log_probs, ids = map(torch.cat, zip(*found))
    return {"ids": ids, "log_probs": log_probs.half()}


def _logits_and_listed(case: Case) -> Inputs:
    logits = _normal(case, _generator(case), case.tokens, case.vocab, scale=2, grad=True)
    return {"logits": logits, **_listed(case)}


# --- the primitives --------------------------------------------------------------------------------------------------


def _one_head(case: Case) -> Inputs:
    hidden, weight = _head(case, _generator(case), case.hidden, True)
    return {"hidden": hidden, "weight": weight}


def _head_and_ids(case: Case) -> Inputs:
    ids = torch.randint(case.vocab, (case.tokens, 1), generator=torch.Generator().manual_seed(1))
    return {**_one_head(case), "ids": ids.to(case.device)}


def _frozen_head_and_ranks(case: Case) -> Inputs:
    """A head that does not learn, and the ranks 1 to K."""
    assert case.top_k is not None
    hidden, weight = _head(case, _generator(case), case.hidden, False)
    return {"hidden": hidden, "weight": weight, "ranks": torch.arange(1.0, case.top_k + 1, device=case.device)}


def _at_least(tensors: int) -> Callable[[Case, str], int | None]:
    """So many [N, V] tensors are alive in the naive variant, whatever else is."""

    def planned(case: Case, variant: str) -> int | None:
        dtype = torch.float32 if variant == "naive fp32" else case.torch_dtype
        return tensors * case.tokens * case.vocab * dtype.itemsize if variant.startswith("naive") else None

    return planned


_heads_work = Work(
    name="heads",
    summary="kd_loss(Head, Head), forward KL",
    inputs=_two_heads,
    per_token=("hidden", "teacher_hidden"),
    fused=losses.fused_heads,
    naive=losses.naive_heads,
    floor="gemms",
    make_floor=_gemms,
    planned=_planned,
    heads=2,
    more={"fused each": losses.fused_heads_each},
)
_logits_work = Work(
    name="logits",
    summary="kd_loss(logits, logits), forward KL",
    inputs=_two_logits,
    per_token=("logits", "teacher_logits"),
    fused=lambda logits, teacher_logits: fastkd.kd_loss(logits, teacher_logits),
    naive=lambda cast, logits, teacher_logits: losses.kl(cast(logits), cast(teacher_logits)),
    floor="copy",
    make_floor=_copy,
    planned=_planned,
    heads=0,
)
_sparse_work = Work(
    name="sparse",
    summary="kd_loss(Head, TopK), forward KL, tail bucket",
    inputs=lambda case: {**_one_head(case), **_listed(case)},
    per_token=("hidden", "ids", "log_probs"),
    fused=losses.fused_sparse,
    naive=losses.naive_sparse,
    floor="gemms",
    make_floor=_gemms,
    planned=_planned,
    lists=True,
)
WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        _heads_work,
        _logits_work,
        replace(
            _logits_work,
            name="kl_div",
            summary="kl_div(log_q, log_p), the drop-in",
            inputs=_two_log_probs,
            per_token=("log_q", "log_p"),
            fused=losses.fused_kl_div,
            naive=losses.naive_kl_div,
            planned=_at_least(3),  # exp(log_p), log_p - log_q, their product
        ),
        _sparse_work,
        replace(
            _sparse_work,
            name="sparse_logits",
            summary="kd_loss(logits, TopK), forward KL, tail bucket",
            inputs=_logits_and_listed,
            per_token=("logits", "ids", "log_probs"),
            fused=lambda logits, ids, log_probs: fastkd.kd_loss(logits, TopK(ids, log_probs)),
            naive=lambda cast, logits, ids, log_probs: losses.kl_listed(cast(logits), ids, log_probs),
            floor="copy",
            make_floor=_copy,
            heads=0,
        ),
        Work(
            name="selected",
            summary="selected_log_probs(Head, ids)",
            inputs=_head_and_ids,
            per_token=("hidden", "ids"),
            fused=losses.fused_selected,
            naive=losses.naive_selected,
            floor="gemms",
            make_floor=_gemms,
            planned=_at_least(3),  # in the backward: log q, its gradient, the gradient of the logits
        ),
        Work(
            name="stats",
            summary="token_stats(Head)",
            inputs=_one_head,
            per_token=("hidden",),
            fused=losses.fused_stats,
            naive=losses.naive_stats,
            floor="gemms",
            make_floor=_gemms,
            planned=_at_least(4),  # logits, log q, q, their product
        ),
        Work(
            name="topk",
            summary="topk(Head, k), forward alone",
            inputs=_frozen_head_and_ranks,
            per_token=("hidden",),
            fused=losses.fused_topk,
            naive=losses.naive_topk,
            floor="gemms",
            make_floor=_gemms,
            planned=_at_least(2),  # logits, log q
            lists=True,
        ),
    )
}


# --- variants --------------------------------------------------------------------------------------------------------


def variants(case: Case) -> dict[str, Callable[[], Loss]]:
    """All that can be asked for, by name; what is called on to give a loss may import and may raise."""
    work = WORKS[case.work]

    def naive(cast: Cast) -> Loss:
        return lambda **inputs: work.naive(cast, **inputs)

    def on(backend: str) -> Loss:
        def loss(**inputs: Tensor) -> Tensor:
            with use_backend(backend):
                return work.fused(**inputs)

        return loss

    found: dict[str, Callable[[], Loss]] = {"fused": lambda: work.fused}
    found |= {f"fused {name}": lambda name=name: on(name) for name in BACKENDS}  # type: ignore[misc]
    found |= {name: lambda loss=loss: loss for name, loss in work.more.items()}  # type: ignore[misc]
    found["naive"] = lambda: naive(losses.as_is)
    if case.torch_dtype.itemsize == 2:
        found["naive fp32"] = lambda: naive(Tensor.float)
    found["compiled"] = lambda: torch.compile(naive(losses.as_is), dynamic=False)
    found |= {peer.name: lambda peer=peer: peer.loss(case.work) for peer in PEERS if case.work in peer.works}  # type: ignore[misc]
    return found


def usual(case: Case, backends: tuple[str, ...] = (), peers: bool = True) -> list[str]:
    """The names of the variants that are measured if none is named."""
    left_out = {f"fused {name}" for name in BACKENDS if name not in backends} | set(WORKS[case.work].more)
    left_out |= {"fused"} if backends else set()
    left_out |= {peer.name for peer in PEERS if not peers or peer.missing() is not None}
    return [name for name in variants(case) if name not in left_out]
