"""Sources and per-token arguments, checked and brought to [B, N, ...]: B batched heads (or one), N tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import checks
from fastkd.problem import Side, accumulation
from fastkd.sources import Head


class DenseSource:
    """A source with logits, checked: its tensors, leading dimensions, vocabulary."""

    def __init__(self, name: str, source: Any) -> None:
        self.name = name
        self.w: Tensor | None = None
        self.b: Tensor | None = None
        self.batch = False
        if isinstance(source, Head):
            self._head(name, source)
        elif isinstance(source, Tensor):
            self.x = checks.is_float(f"{name} (logits)", source)
            if source.dim() < 1 or source.shape[-1] == 0:
                raise ValueError(
                    f"{name} (logits) must be [..., V] with a vocabulary of at least 1, got {list(source.shape)}"
                )
            self.side, self.vocab = Side(), int(source.shape[-1])  # a constant for torch.compile
        else:
            expected = "logits or a Head" if name == "student" else "logits, a Head or Labels"
            raise TypeError(f"{name} must be {expected}, got {type(source).__name__}")
        self.lead = tuple(self.x.shape[:-1])

    def _head(self, name: str, head: Head) -> None:
        x, w = checks.is_float(f"{name}.hidden", head.hidden), checks.is_float(f"{name}.weight", head.weight)
        if x.dim() < 1 or w.dim() < 2 or x.shape[-1] != w.shape[-1] or w.shape[-2] == 0:
            raise ValueError(
                f"{name}.hidden and {name}.weight must be [..., D] and [V, D] with V at least 1, "
                f"got {list(x.shape)} and {list(w.shape)}"
            )
        self.batch = w.dim() > 2
        if self.batch and w.shape[:-2] != x.shape[:-2]:
            raise ValueError(
                f"{name}.weight [..., V, D] must have the batch dimensions of {name}.hidden [..., N, D], "
                f"got {list(w.shape)} and {list(x.shape)}"
            )
        if head.bias is not None:
            b = checks.is_float(f"{name}.bias", head.bias)
            checks.has_shape(f"{name}.bias", b, tuple(w.shape[:-1]), f" like {name}.weight without D")
            self.b = b
        softcap = None if head.softcap is None else checks.finite_number(f"{name}.softcap", head.softcap, above=0.0)
        scale = checks.finite_number(f"{name}.logit_scale", head.logit_scale)
        self.x, self.w, self.vocab = x, w, int(w.shape[-2])
        checks.same_device(**{f"{name}.hidden": x, f"{name}.weight": w, f"{name}.bias": self.b})
        self.side = Side(softcap, scale, str(self._compute_dtype(name, head)).removeprefix("torch."))

    @staticmethod
    def _compute_dtype(name: str, head: Head) -> torch.dtype:
        """What F.linear would multiply in: autocast's dtype if it is on, else the common dtype of hidden and weight."""
        device = head.hidden.device.type
        given = [t.dtype for t in (head.hidden, head.weight, head.bias) if t is not None]
        if device != "meta" and torch.is_autocast_enabled(device) and torch.float64 not in given:
            dtype = torch.get_autocast_dtype(device)
        elif len(set(given)) > 1:
            raise ValueError(
                f"{name}.hidden, {name}.weight and {name}.bias must have one dtype (or be under autocast), "
                f"got {', '.join(map(str, given))}"
            )
        else:
            dtype = given[0]
        # float16 products on a CPU without AVX512-FP16 run a hundred times slower than float32 ones
        return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype

    def truncate(self, vocab: int) -> None:
        if self.w is None:
            self.x = self.x[..., :vocab]
        else:
            self.w = self.w[..., :vocab, :]
            self.b = None if self.b is None else self.b[..., :vocab]
        self.vocab = vocab

    def tensors(self, row: PerToken) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, N, D or V], weight [B or 1, V, D], bias [B or 1, V]"""
        heads = row.size[0] if self.batch else 1
        w = None if self.w is None else self.w.reshape(heads, *self.w.shape[-2:])
        b = None if self.b is None else self.b.reshape(heads, self.b.shape[-1])
        return self.x.reshape(*row.size, self.x.shape[-1]), w, b


def common_vocab(s: DenseSource, t: DenseSource, vocab: str) -> int:
    """The size of the vocabulary on which both are compared."""
    checks.same_device(student=s.x, teacher=t.x)
    if s.vocab != t.vocab:
        if vocab == "error":
            raise ValueError(
                f"student and teacher must have the same vocabulary, got {s.vocab} and {t.vocab}; "
                'vocab="truncate" or vocab="pad" says how to treat the difference'
            )
        if vocab == "truncate":
            smaller = min(s.vocab, t.vocab)
            s.truncate(smaller)
            t.truncate(smaller)
    return max(s.vocab, t.vocab)


@dataclass(frozen=True)
class PerToken:
    """Makes [B, N] of a number or a tensor [...], in the accumulation dtype."""

    lead: tuple[int, ...]
    size: tuple[int, int]  # B, N
    dtype: torch.dtype
    device: torch.device
    owner: str  # whose device and leading dimensions these are

    @classmethod
    def of(cls, s: DenseSource, t: DenseSource | None = None) -> PerToken:
        """For a student and a teacher with the same leading dimensions."""
        if t is not None and t.lead != s.lead:
            raise ValueError(
                f"{s.name} and {t.name} must have the same leading dimensions, got {list(s.lead)} and {list(t.lead)}"
            )
        batch = s.batch or (t is not None and t.batch)
        size = (math.prod(s.lead[:-1]), s.lead[-1]) if batch else (1, math.prod(s.lead))
        dtypes = [accumulation(x.x.dtype) for x in (s, t) if x is not None]
        return cls(s.lead, size, torch.promote_types(dtypes[0], dtypes[-1]), s.x.device, s.name)

    def __call__(self, name: str, value: Any, *, above: float = -math.inf) -> Tensor:
        tiny = torch.finfo(self.dtype).tiny
        if not isinstance(value, Tensor):
            value = checks.finite_number(name, value, above=above)
            if above == 0 and value < tiny:
                raise ValueError(f"{name} must be at least {tiny:.1e}, the smallest normal {self.dtype}, got {value}")
            return torch.full((), value, dtype=self.dtype, device=self.device).expand(self.size)
        self.check_device(name, value)
        if value.dtype.is_complex:
            raise TypeError(f"{name} must be real, got {value.dtype}")
        value = value.to(self.dtype)
        if above > -math.inf and checks.readable(value):
            checks.all_values(
                name, f"finite and above {above:g}", value, (value > above) & (value >= tiny) & (value < math.inf)
            )
        if value.dim() == 0:
            return value.expand(self.size)
        checks.has_shape(name, value, self.lead, " (one value per token) or be a number")
        return value.reshape(self.size)

    def check_device(self, name: str, value: Tensor) -> None:
        if value.device != self.device:
            raise ValueError(f"{name} must be on the {self.owner}'s device {self.device}, got {value.device}")

    def ids(self, name: str, value: Any) -> Tensor:
        """Class indices [...]."""
        self.check_device(name, checks.is_index(name, value))
        checks.has_shape(name, value, self.lead, f" like the {self.owner}'s leading dimensions")
        return value
