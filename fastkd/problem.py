"""A distillation problem in normal form: settings that are not tensors, and a flat list of tensors.

Everything is [B, N, ...]: B batched heads (1 for a shared head), N tokens. The settings travel as text, so that one
library op serves eager mode, torch.func and torch.compile.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastkd import divergences, targets
from fastkd.divergences import Divergence
from fastkd.targets import Target

Tensors = tuple[Tensor | None, ...]
TENSOR = "<tensor>"  # in the place of a target's field that travels among the tensors


@dataclass(frozen=True)
class Side:
    """How raw rows become effective logits: z = softcap tanh(logit_scale raw / softcap)."""

    softcap: float | None = None
    logit_scale: float = 1.0
    compute: str | None = None  # dtype of the GEMMs, None for logits

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


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class KDTensors(NamedTuple):
    """The tensors of a :class:`KD`, in the order in which they travel."""

    factor: Tensor  # [B, N] what each token's loss is multiplied by; 0 leaves the token out
    s_x: Tensor  # [B, N, D] hidden, or [B, N, V] logits
    s_w: Tensor | None  # [B or 1, V, D]
    s_b: Tensor | None  # [B or 1, V]
    t_x: Tensor | None
    t_w: Tensor | None
    t_b: Tensor | None
    s_temperature: Tensor  # [B, N]
    t_temperature: Tensor  # [B, N]
    term_weights: Tensor | None  # [K, B, N] one for each divergence
    labels: Tensor | None  # [B, N]
    label_weight: Tensor | None  # [B, N]
    target: tuple[Tensor, ...] = ()  # the tensor fields of the target transform, each [B, N]

    def flat(self) -> Tensors:
        return (*self[:-1], *self.target)

    @classmethod
    def of(cls, flat: Tensors) -> KDTensors:
        n = len(cls._fields) - 1
        return cls._make((*flat[:n], tuple(flat[n:])))


@dataclass(frozen=True)
class Spec:
    """Settings of one op. ``backend`` names who computes it."""

    backend: str
    chunk: int | None

    REGISTRY: ClassVar[dict[str, type[Spec]]] = {}

    def __init_subclass__(cls) -> None:
        Spec.REGISTRY[cls.__name__] = cls

    @lru_cache(maxsize=1024)  # noqa: B019 - a few settings, which live as long as the program
    def encode(self) -> str:
        return json.dumps([type(self).__name__, asdict(self)])

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> Spec:
        name, kwargs = json.loads(text)
        for side in ("student", "teacher"):
            if kwargs.get(side) is not None:
                kwargs[side] = Side(**kwargs[side])
        if "terms" in kwargs:
            kwargs["terms"] = tuple((n, tuple(p)) for n, p in kwargs["terms"])
        return Spec.REGISTRY[name](**kwargs)


@dataclass(frozen=True)
class KD(Spec):
    """A student against a dense teacher, against labels, or both. Tensors: :class:`KDTensors`."""

    student: Side
    teacher: Side | None  # None: labels alone
    vocab: int
    total: bool  # one scalar, or one loss per token
    terms: tuple[tuple[str, tuple[float, ...]], ...] = ()  # (name, parameters) of each divergence
    target: str | None = None
    target_fields: str = "{}"  # as JSON; TENSOR for a tensor
    label_smoothing: float = 0.0
    label_tempered: bool = False  # are the labels compared at the temperature (Labels) or at 1 (labels=)

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
