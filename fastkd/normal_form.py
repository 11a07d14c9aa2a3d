"""Sources and per-token arguments, checked and brought to [B, N, ...]: B batched heads (or one), N tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd import checks, sparse
from fastkd.problem import Mixed, Side, Sparse, Tensors
from fastkd.sources import TAILS, Head, Labels, Mixture, Samples, TopK
from fastkd.sparse import RENORMALIZED


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
            expected = "logits or a Head"
            if name.startswith("teacher"):
                expected = "logits, a Head, TopK, Samples, Labels or a Mixture"
            raise TypeError(f"{name} must be {expected}, got {type(source).__name__}")
        self.lead, self.device, self.dense = tuple(self.x.shape[:-1]), self.x.device, (self,)

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

    def spec(self, row: PerToken, wanted: Any, vocab: int, how: str) -> Side:
        return self.side

    def tensors(self, row: PerToken, vocab: int) -> Tensors:
        """x [B, N, D or V], weight [B or 1, V, D], bias [B or 1, V]"""
        heads = row.size[0] if self.batch else 1
        w = None if self.w is None else self.w.reshape(heads, *self.w.shape[-2:])
        b = None if self.b is None else self.b.reshape(heads, self.b.shape[-1])
        return self.x.reshape(*row.size, self.x.shape[-1]), w, b


SPARSE = (TopK, Samples, Labels)


class SparseSource:
    """A TopK, Samples or Labels, checked. Labels are a TopK of one entry, with their smoothing as an even tail."""

    batch = False
    dense: tuple[DenseSource, ...] = ()

    def __init__(self, name: str, source: TopK | Samples | Labels) -> None:
        self.name, self.source = name, source
        self.ids = checks.is_index(f"{name}.ids", source.ids)
        self.device = self.ids.device
        if isinstance(source, Labels):
            self.lead = tuple(self.ids.shape)
            smoothing = checks.finite_number(f"{name}.label_smoothing", source.label_smoothing)
            if not 0 <= smoothing <= 1:
                raise ValueError(f"{name}.label_smoothing must lie in [0, 1], got {smoothing}")
            return
        self.values_name = f"{name}.log_probs" if isinstance(source, TopK) else f"{name}.weights"
        values = source.log_probs if isinstance(source, TopK) else source.weights
        self.values, self.lead = checks.is_float(self.values_name, values), tuple(self.ids.shape[:-1])
        if self.ids.dim() < 1:
            raise ValueError(f"{name}.ids must be [..., K], got a tensor without dimensions")
        checks.has_shape(self.values_name, self.values, tuple(self.ids.shape), f" like {name}.ids")
        checks.same_device(**{f"{name}.ids": self.ids, self.values_name: self.values})
        if isinstance(source, TopK):
            self._top_k(name, source)
        elif not isinstance(source.normalize, bool):
            raise TypeError(f"{name}.normalize must be a bool, got {type(source.normalize).__name__}")

    def _top_k(self, name: str, source: TopK) -> None:
        checks.is_one_of(f"{name}.tail", source.tail, TAILS)
        checks.finite_number(f"{name}.temperature", source.temperature, above=0.0)
        if source.log_tail is not None:
            tail = checks.is_float(f"{name}.log_tail", source.log_tail)
            checks.has_shape(f"{name}.log_tail", tail, self.lead, f" like {name}.ids without K")
            checks.same_device(**{f"{name}.ids": self.ids, f"{name}.log_tail": tail})

    @property
    def sums_to_one(self) -> bool:
        """Is it a distribution over the vocabulary, as a mixture and a target transform need it?"""
        if isinstance(self.source, TopK):
            return self.source.tail in ("renormalize", "uniform")
        return isinstance(self.source, Labels) or self.source.normalize

    def spec(self, row: PerToken, wanted: Any, vocab: int, how: str) -> Sparse:
        """``wanted`` is the teacher's temperature, ``how`` the argument vocab."""
        source = self.source
        if isinstance(source, Labels):
            return Sparse("uniform" if source.label_smoothing else "renormalize", padded=False)
        if isinstance(source, Samples):
            return Sparse("drop", repeats=True)
        if how == "pad":
            raise ValueError(
                f"vocab must be 'error' or 'truncate' for {self.name}, which has no vocabulary of its own, got 'pad'"
            )
        if self.ids.shape[-1] > vocab and how != "truncate":
            raise ValueError(
                f"{self.name}.ids must list at most the {vocab} entries of the student's vocabulary in a row, "
                f"got K = {self.ids.shape[-1]}"
            )
        if source.tail in RENORMALIZED:
            return Sparse(source.tail, float(source.temperature), how == "truncate")
        if isinstance(wanted, Tensor) or wanted != source.temperature:
            came = f"a tensor {list(wanted.shape)}" if isinstance(wanted, Tensor) else wanted
            raise ValueError(
                f"the teacher's temperature must be {self.name}.temperature = {source.temperature} with "
                f"tail={source.tail!r}, got {came}: what is not listed cannot be brought to another temperature; "
                "pass teacher_temperature, or use a renormalized tail"
            )
        return Sparse(source.tail, None, how == "truncate")

    def tensors(self, row: PerToken, vocab: int) -> Tensors:
        """ids [B, N, K], log_probs [B, N, K], log_tail [B, N] or None"""
        source, k = self.source, (1 if isinstance(self.source, Labels) else self.ids.shape[-1])
        ids = self.ids.reshape(*row.size, k)
        if isinstance(source, Labels):
            return ids, *self._smoothed(source.label_smoothing, row, vocab)
        if isinstance(source, TopK):
            tail = source.log_tail
            return ids, self.values.reshape(ids.shape), None if tail is None else tail.reshape(row.size)
        values = self.values
        if checks.readable(values):
            checks.all_values(self.values_name, "not negative", values, (values >= 0) | values.isnan() | (self.ids < 0))
        weights = values.to(row.dtype).masked_fill(self.ids < 0, 0.0)
        if source.normalize:
            total = weights.sum(-1, keepdim=True)
            weights = weights / torch.where(total == 0, 1.0, total)
        return ids, sparse.log(weights).reshape(ids.shape), None

    @staticmethod
    def _smoothed(smoothing: float, row: PerToken, vocab: int) -> tuple[Tensor, Tensor | None]:
        """The label has 1 - smoothing and its share of the rest, the others have theirs."""
        others = smoothing * (vocab - 1) / vocab
        label = torch.full((), math.log1p(-others), dtype=row.dtype, device=row.device).expand(*row.size, 1)
        if not smoothing:
            return label, None
        tail = math.log(others) if others else -math.inf
        return label, torch.full((), tail, dtype=row.dtype, device=row.device).expand(row.size)


class MixedSource:
    """A Mixture, or a sparse teacher that is to be spread over the vocabulary: a mixture of one."""

    def __init__(self, name: str, source: Mixture) -> None:
        self.name, self.source = name, source
        if not isinstance(source.teachers, (list, tuple)) or not source.teachers:
            raise ValueError(f"{name}.teachers must be a list of at least one teacher, got {source.teachers!r}")
        self.members = [_member(f"{name}.teachers[{m}]", x) for m, x in enumerate(source.teachers)]
        first = self.members[0]
        for member in self.members:
            if isinstance(member, SparseSource) and not member.sums_to_one:
                raise ValueError(
                    f"{member.name} must be a distribution over the vocabulary: a TopK with the tail 'renormalize' or "
                    f"'uniform', or Samples with normalize=True, got {described(member.source)}"
                )
            if member.lead != first.lead:
                raise ValueError(
                    f"{first.name} and {member.name} must have the same leading dimensions, "
                    f"got {list(first.lead)} and {list(member.lead)}"
                )
        checks.same_device(**{member.name: torch.empty(0, device=member.device) for member in self.members})
        self.lead, self.device = first.lead, first.device
        self.batch = any(member.batch for member in self.members)
        self.dense = tuple(x for member in self.members for x in member.dense)

    def spec(self, row: PerToken, wanted: Any, vocab: int, how: str) -> Mixed:
        how = "error" if how == "pad" and self.dense else how  # the dense members have a vocabulary
        members = tuple(member.spec(row, wanted, vocab, how) for member in self.members)
        return Mixed(members)

    def tensors(self, row: PerToken, vocab: int) -> Tensors:
        """Those of the members, then log w [M, B, N]."""
        return *(x for member in self.members for x in member.tensors(row, vocab)), self._log_weights(row)

    def _log_weights(self, row: PerToken) -> Tensor:
        name, given, m = f"{self.name}.weights", self.source.weights, len(self.members)
        if given is None:
            given = (1.0,) * m
        if not isinstance(given, Tensor):
            numbers = [checks.finite_number(name, w) for w in given]  # filled: a copy would wait for the device
            given = torch.stack([torch.full((), w, dtype=row.dtype, device=row.device) for w in numbers])
        row.check_device(name, given)
        if given.dim() == 0 or given.shape[-1] != m or given.shape[:-1] not in ((), row.lead):
            raise ValueError(f"{name} must be [{m}] or {[*row.lead, m]}, got {list(given.shape)}")
        if checks.readable(given):
            checks.all_values(name, "finite and not negative", given, (given >= 0) & given.isfinite())
            checks.all_values(name, "not all 0", given.sum(-1), given.sum(-1) > 0)
        w = given.to(row.dtype).expand(*row.lead, m).reshape(*row.size, m)
        return (sparse.log(w) - w.sum(-1, keepdim=True).log()).movedim(-1, 0)


def _member(name: str, source: Any) -> DenseSource | SparseSource:
    if isinstance(source, Mixture):
        raise TypeError(f"{name} must be no Mixture itself: give its teachers here")
    return SparseSource(name, source) if isinstance(source, SPARSE) else DenseSource(name, source)


def described(source: Any) -> str:
    """A source in an error."""
    if isinstance(source, TopK):
        return f"TopK with tail={source.tail!r}"
    return f"{type(source).__name__} with normalize=False" if isinstance(source, Samples) else type(source).__name__


TeacherSource = DenseSource | SparseSource | MixedSource


def teacher_source(name: str, source: Any) -> TeacherSource:
    """Any source of a teacher, checked."""
    if isinstance(source, Mixture):
        return MixedSource(name, source)
    return _member(name, source)


def common_vocab(s: DenseSource, t: TeacherSource, vocab: str) -> int:
    """The size of the vocabulary on which both are compared."""
    checks.same_device(student=s.x, teacher=torch.empty(0, device=t.device))
    sizes = [s.vocab, *(x.vocab for x in t.dense)]
    if len(set(sizes)) > 1:
        if vocab == "error":
            raise ValueError(
                f"student and teacher must have the same vocabulary, got {' and '.join(map(str, sizes))}; "
                'vocab="truncate" or vocab="pad" says how to treat the difference'
            )
        if vocab == "truncate":
            for source in (s, *t.dense):
                source.truncate(min(sizes))
            return min(sizes)
    return max(sizes)


@dataclass(frozen=True)
class PerToken:
    """Makes [B, N] of a number or a tensor [...], in the accumulation dtype."""

    lead: tuple[int, ...]
    size: tuple[int, int]  # B, N
    dtype: torch.dtype
    device: torch.device
    owner: str  # whose device and leading dimensions these are

    @classmethod
    def of(cls, s: DenseSource, t: TeacherSource | None = None) -> PerToken:
        """For a student and a teacher with the same leading dimensions."""
        if t is not None and t.lead != s.lead:
            raise ValueError(
                f"{s.name} and {t.name}{'.ids' if isinstance(t, SparseSource) else ''} must have the same leading "
                f"dimensions, got {list(s.lead)} and {list(t.lead)}"
            )
        batch = s.batch or (t is not None and t.batch)
        size = (math.prod(s.lead[:-1]), s.lead[-1]) if batch else (1, math.prod(s.lead))
        wide = any(x.x.dtype == torch.float64 for x in (s, *(() if t is None else t.dense)))
        return cls(s.lead, size, torch.float64 if wide else torch.float32, s.device, s.name)

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
