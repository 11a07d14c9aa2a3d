"""What is measured: fastkd's losses, the same losses in plain PyTorch, and the floor (the bare GEMMs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import Head

Variant = Callable[[], object]


def naive(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """What one writes without fastkd."""
    log_q, log_p = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@dataclass
class Heads:
    """Forward KL between two heads, with gradients to hidden and weight; N tokens, hidden size D, vocabulary V."""

    n: int
    d: int
    v: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.h_s, self.h_t = (torch.randn(self.n, self.d, generator=g).to(self.dtype) for _ in range(2))
        self.w_s, self.w_t = (
            torch.randn(self.v, self.d, generator=g).mul_(self.d**-0.5).to(self.dtype) for _ in range(2)
        )
        self.h_s.requires_grad_()
        self.w_s.requires_grad_()

    def _fresh(self) -> None:
        self.h_s.grad = self.w_s.grad = None

    def fused(self) -> Tensor:
        self._fresh()
        loss = fastkd.kd_loss(Head(self.h_s, self.w_s), Head(self.h_t, self.w_t), reduction="batchmean")
        loss.backward()
        return loss

    def fused_none(self) -> Tensor:
        self._fresh()
        loss = fastkd.kd_loss(Head(self.h_s, self.w_s), Head(self.h_t, self.w_t), reduction="none").sum() / self.n
        loss.backward()
        return loss

    def naive(self) -> Tensor:
        """In the dtype of the inputs throughout."""
        self._fresh()
        loss = naive(self.h_s @ self.w_s.T, self.h_t @ self.w_t.T)
        loss.backward()
        return loss

    def naive_upcast(self) -> Tensor:
        """With logits cast to float32, as one must for an exact loss."""
        self._fresh()
        loss = naive((self.h_s @ self.w_s.T).float(), (self.h_t @ self.w_t.T).float())
        loss.backward()
        return loss

    def gemms(self) -> Variant:
        """The 4 GEMMs alone, each whole, into memory that is already there."""
        h, w = self.h_s.detach(), self.w_s.detach()
        logits, dh, dw = torch.empty(self.n, self.v, dtype=self.dtype), torch.empty_like(h), torch.empty_like(w)

        def run() -> None:
            torch.mm(self.h_t, self.w_t.T, out=logits)
            torch.mm(h, w.T, out=logits)
            torch.mm(logits, w, out=dh)
            torch.mm(logits.T, h, out=dw)

        return run


@dataclass
class Logits:
    """Forward KL between given logits, forward and backward."""

    n: int
    v: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.s, self.t = (torch.randn(self.n, self.v, generator=g).mul_(2).to(self.dtype) for _ in range(2))
        self.s.requires_grad_()
        self.compiled_loss = torch.compile(naive)

    def _backward(self, loss: Tensor) -> Tensor:
        self.s.grad = None
        loss.backward()
        return loss

    def fused(self) -> Tensor:
        return self._backward(fastkd.kd_loss(self.s, self.t, reduction="batchmean"))

    def eager(self) -> Tensor:
        return self._backward(naive(self.s, self.t))

    def compiled(self) -> Tensor:
        return self._backward(self.compiled_loss(self.s, self.t))


def row_op(name: str, n: int, v: int, dtype: torch.dtype) -> Variant:
    """The C++ row op alone: losses and gradient of n rows under one divergence."""
    from fastkd import divergences, rows_cpu
    from fastkd.problem import Side
    from fastkd.rows_torch import Rows

    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(n, v, generator=g).mul_(2).to(dtype) for _ in range(2))
    grad, ones = torch.empty_like(s), torch.ones(n)
    divergence = divergences.AlphaBeta(0.5, 0.5) if name == "alpha_beta" else divergences.get(name)
    rows = Rows(v, Side(), Side(), ones, ones, ones, (divergence,), ones[None])
    return lambda: rows_cpu.divergence(s, t, grad, rows)
