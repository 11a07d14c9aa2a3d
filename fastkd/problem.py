"""A distillation problem in normal form: settings that are not tensors, and a flat list of tensors.

Everything is [B, N, ...]: B batched heads (1 for a shared head), N tokens. The settings travel as text, so that one
library op serves eager mode, torch.func and torch.compile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastkd import divergences, targets
from fastkd.divergences import Divergence
from fastkd.targets import Target

Tensors = tuple[Tensor | None, ...]
CLASS = "class"  # the key of a class's name in the text
TENSOR = "<tensor>"  # in the place of a target's field that travels among the tensors


@dataclass(frozen=True)
class Side:
    """How raw rows become effective logits: z = softcap tanh(logit_scale raw / softcap)."""

    softcap: float | None = None
    logit_scale: float = 1.0
    compute: str | None = None  # dtype of the GEMMs, None for logits

    tensors: ClassVar[int] = 3  # x [B, N, D] or logits [B, N, V], weight [B or 1, V, D], bias [B or 1, V]

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.compute or "float32")

    def effective(self, raw: Tensor, vocab: int) -> Tensor:
        """raw [..., V'] -> z [..., vocab] in the accumulation dtype; entries that V' lacks are -inf."""
        z = raw.to(accumulation(raw.dtype)) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        missing = vocab - z.shape[-1]
        return torch.nn.functional.pad(z, (0, missing), value=-torch.inf) if missing else z

    def slope(self, z: Tensor) -> Tensor | float:
        """dz/draw."""
        return self.logit_scale if self.softcap is None else self.logit_scale * (1 - (z / self.softcap).square())


@dataclass(frozen=True)
class Sparse:
    """A teacher that is known on listed entries. Tensors: ids [B, N, K], log_probs [B, N, K], log_tail [B, N]."""

    tail: str
    stored: float | None = None  # the temperature of log_probs that are brought to the teacher's; None: they stay
    truncate: bool = False  # are ids beyond the vocabulary left out
    repeats: bool = False  # may an id stand twice
    padded: bool = True  # may an id be -1

    tensors: ClassVar[int] = 3


@dataclass(frozen=True)
class Mixed:
    """sum_m w_m p_m. Tensors: those of the members, then the logarithms of the weights [M, B, N]."""

    members: tuple[Side | Sparse, ...]

    @property
    def tensors(self) -> int:
        return sum(member.tensors for member in self.members) + 1

    def split(self, tensors: Tensors) -> tuple[list[tuple[Side | Sparse, Tensors]], Tensor]:
        """Each member with its tensors; and the weights."""
        queue = iter(tensors[:-1])
        assert tensors[-1] is not None
        return [(m, tuple(next(queue) for _ in range(m.tensors))) for m in self.members], tensors[-1]


Teacher = Side | Sparse | Mixed


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class KDTensors(NamedTuple):
    """The tensors of a :class:`KD`, in the order in which they travel."""

    factor: Tensor  # [B, N] what each token's loss is multiplied by; 0 leaves the token out
    s_x: Tensor  # [B, N, D] hidden, or [B, N, V] logits
    s_w: Tensor | None  # [B or 1, V, D]
    s_b: Tensor | None  # [B or 1, V]
    teacher: Tensors  # see Side, Sparse, Mixed
    s_temperature: Tensor  # [B, N]
    t_temperature: Tensor  # [B, N]
    term_weights: Tensor  # [K, B, N] one for each divergence
    labels: Tensor | None  # [B, N]
    label_weight: Tensor | None  # [B, N]
    target: tuple[Tensor, ...] = ()  # the tensor fields of the target transform, each [B, N]

    def flat(self) -> Tensors:
        flat: list[Tensor | None] = []
        for x in self:
            flat += x if isinstance(x, tuple) else (x,)
        return tuple(flat)

    @classmethod
    def of(cls, spec: KD, flat: Tensors) -> KDTensors:
        n = spec.teacher.tensors
        head, teacher, rest = flat[:TEACHER], flat[TEACHER : TEACHER + n], flat[TEACHER + n :]
        settings = len(cls._fields) - TEACHER - 2
        target = tuple(x for x in rest[settings:] if x is not None)
        return cls._make((*head, tuple(teacher), *rest[:settings], target))


TEACHER = KDTensors._fields.index("teacher")


@dataclass(frozen=True)
class Spec:
    """Settings of one op. ``backend`` names who computes it."""

    backend: str
    chunk: int | None  # tokens at a time
    budget: int | None  # bytes, where chunk is None

    @lru_cache(maxsize=1024)  # noqa: B019 - a few settings, which live as long as the program
    def encode(self) -> str:
        return json.dumps(self, default=lambda x: {CLASS: type(x).__name__, **vars(x)})

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> Spec:
        spec: Spec = json.loads(text, object_hook=_built)
        return spec


def _built(x: dict[str, Any]) -> Any:
    """The settings of one class."""
    return CLASSES[x.pop(CLASS)](**{name: _tupled(value) for name, value in x.items()})


def _tupled(x: Any) -> Any:
    return tuple(map(_tupled, x)) if isinstance(x, list) else x


@dataclass(frozen=True)
class KD(Spec):
    """A student against a teacher, with labels or without. Tensors: :class:`KDTensors`."""

    student: Side
    teacher: Teacher
    vocab: int
    total: bool  # one scalar, or one loss per token
    terms: tuple[tuple[str, tuple[float, ...]], ...] = ()  # (name, parameters) of each divergence
    target: str | None = None
    target_fields: str = "{}"  # as JSON; TENSOR for a tensor

    @property
    def divergences(self) -> tuple[Divergence, ...]:
        return tuple(divergences.REGISTRY[name](*params) for name, params in self.terms)

    @property
    def target_class(self) -> type[Target] | None:
        return None if self.target is None else targets.REGISTRY[self.target]

    def build_target(self, tensors: tuple[Tensor, ...]) -> Target | None:
        """The target transform with its tensor fields replaced (by the chunk's, say)."""
        cls = self.target_class
        if cls is None:
            return None
        values, queue = json.loads(self.target_fields), iter(tensors)
        return cls(**{f.name: next(queue) if values[f.name] == TENSOR else values[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Select(Spec):
    """Log-probabilities of listed entries. Tensors: x, w, b, temperature [B, N], ids [B, N, K]."""

    student: Side
    vocab: int


@dataclass(frozen=True)
class Stats(Spec):
    """lse, entropy, max_log_prob, argmax of each row. Tensors: x, w, b, temperature [B, N]."""

    student: Side
    vocab: int


@dataclass(frozen=True)
class Top(Spec):
    """The k likeliest entries of each row. Tensors: x, w, b, temperature [B, N]."""

    student: Side
    vocab: int
    k: int


CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (Side, Sparse, Mixed, KD, Select, Stats, Top)}
