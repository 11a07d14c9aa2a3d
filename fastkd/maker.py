"""Random tensors for the cases of validation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd.sources import Head, TopK


class Maker:
    """Random tensors of one case, from one seed; drawn in float64 on the CPU, so that every dtype sees one case."""

    def __init__(
        self, tokens: int, vocab: int, hidden: tuple[int, int], dtype: torch.dtype, seed: int, device: Any
    ) -> None:
        self.tokens, self.vocab, self.hidden, self.dtype, self.device = tokens, vocab, hidden, dtype, device
        self.drawn: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}  # how

    def sized(self, **sizes: Any) -> Maker:
        """Another size, from the same stream of numbers."""
        other = copy.copy(self)
        vars(other).update(sizes)
        return other

    def to(self, x: Tensor, grad: bool) -> Tensor:
        """A leaf in the case's dtype, then on its device: not every device has float64."""
        return x.to(self.dtype).to(self.device).requires_grad_(grad)

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
        return self.to(torch.randn(shape, **self.drawn, dtype=torch.float64) * scale, grad)

    def uniform(self, low: float, high: float) -> Tensor:
        """One number per token, float32."""
        x = torch.rand(self.tokens, **self.drawn, dtype=torch.float64) * (high - low) + low
        return x.to(torch.float32).to(self.device)

    def masked(self) -> Tensor:
        """Weights per token, some of them 0."""
        w = self.uniform(0.2, 2.0)
        w[::3] = 0
        return w

    def ids(self, *shape: int, ignored: bool = False) -> Tensor:
        x = torch.randint(self.vocab, shape or (self.tokens,), **self.drawn)
        if ignored:
            x[1::4] = -100
        return x.to(self.device)

    def head(self, d: int, grad: bool, **kwargs: Any) -> Head:
        hidden = self.normal(self.tokens, d, grad=grad)
        return Head(hidden, self.normal(self.vocab, d, scale=2 / math.sqrt(d), grad=grad), **kwargs)

    def logits(self, grad: bool) -> Tensor:
        return self.normal(self.tokens, self.vocab, scale=2.0, grad=grad)

    @property
    def top(self) -> float:
        """A logit with 5 times the mass of V normal ones of scale 2, about V e^2: ahead, and log p not near 0."""
        return math.log(5 * self.vocab) + 2

    def top_k(self, k: int, tail: str = "bucket", *, padded: bool = False, **kwargs: Any) -> TopK:
        """The k likeliest of a random teacher, in float32, with its tail; ``padded``: some ids -1, some log p -inf."""
        logits = 2 * torch.randn(self.tokens, self.vocab, **self.drawn, dtype=torch.float64)
        log_probs, ids = logits.log_softmax(-1).topk(k)
        if padded:
            ids[::2, -k // 3 :] = -1
            log_probs[1::3, k // 2] = -math.inf
        kept = log_probs.masked_fill(ids < 0, -math.inf).exp().sum(-1)
        tail_mass = (1 - kept).clamp(min=0) if k < self.vocab or padded else torch.zeros_like(kept)
        log_tail = tail_mass.log().float().to(self.device)
        return TopK(ids.to(self.device), log_probs.float().to(self.device), tail, log_tail=log_tail, **kwargs)

    def peaked(self, frozen: bool = False, **kwargs: Any) -> Head:
        """A head with one winner per token, so that rounding leaves open neither the largest entry nor its gradient."""
        head = self.head(self.hidden[0], True, **kwargs)
        with torch.no_grad():
            h = head.hidden[: self.vocab]
            winners = torch.randperm(self.vocab, **self.drawn)[: len(h)].to(self.device)
            head.weight[winners] = h * (self.top / h.square().sum(-1, keepdim=True))
        head.weight.requires_grad_(not frozen)
        return head


Feature = Callable[[Maker], dict[str, Any]]  # makes the keyword arguments of an op
