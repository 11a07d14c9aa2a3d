"""The table of backends: who can serve a call, and in words why another cannot.

A backend is a set of row ops; the driver, the GEMMs and the autograd rules are shared. To add one: a `Backend` here,
with its `why_not`, and a module with the functions of `rows_torch`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from fastkd.problem import KD, KDTensors, Side, Sparse, Spec, Tensors

_chosen: ContextVar[str | None] = ContextVar("fastkd_backend", default=None)


@dataclass(frozen=True)
class Backend:
    """``unavailable()`` says why this machine cannot have it, ``why_not(spec, tensors)`` why a call cannot, or None."""

    name: str
    summary: str
    unavailable: Callable[[], str | None]
    why_not: Callable[[Spec, Tensors], str | None]
    rows: Callable[[], ModuleType] | None = None  # None: computes by the definition, without the driver


class CannotServe(ValueError):
    """The backend that was asked for cannot serve a call; ``reason`` says why, in a sentence."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend {backend!r} cannot serve this call: {reason}")
        self.reason = reason


@cache
def extension() -> tuple[ModuleType | None, str | None]:
    """fastkd._C, or why it is not there."""
    try:
        from fastkd import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"the C++ extension fastkd._C cannot be imported: {error}"
    return _C, None


def _cpu_unavailable() -> str | None:
    return extension()[1]


def _learned(x: torch.Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _fused_why_not(spec: Spec, tensors: Tensors) -> str | None:
    if not isinstance(spec, KD):
        named = {"temperature": tensors[3]}
    else:
        a = KDTensors.of(spec, tensors)
        named = {
            "temperature": a.s_temperature,
            "teacher_temperature": a.t_temperature,
            "label_weight": a.label_weight,  # before the weights, which it enters
            "the divergence's weights": a.term_weights,
            **{f"the target's tensor {i}": x for i, x in enumerate(a.target)},
        }
        if not isinstance(spec.teacher, Side) and any(map(_learned, a.teacher)):
            return "a sparse teacher or a mixture requires grad, which only the definition differentiates: detach it"
        if spec.target is not None and any(map(_learned, a.teacher)):
            return "a target transform passes no gradient to the teacher, and the teacher requires grad: detach it"
    for name, x in named.items():
        if _learned(x):
            return f"{name} requires grad, which only the definition differentiates"
    return None


def _cpu_why_not(spec: Spec, tensors: Tensors) -> str | None:
    sources = tensors[:3]
    if isinstance(spec, KD):
        a = KDTensors.of(spec, tensors)
        sources = (a.s_x, a.s_w, a.s_b, *(() if isinstance(spec.teacher, Sparse) else a.teacher))
    for x in sources:
        if x is None:
            continue
        if x.device.type not in ("cpu", "meta"):
            return f"its row ops run on the CPU, and the inputs are on {x.device}"
        if x.dtype == torch.float64:
            return "its row ops have float32, bfloat16 and float16, and an input is float64"
    if isinstance(spec, KD):
        from fastkd import rows_cpu

        for name, _ in spec.terms:
            if name not in rows_cpu.kinds():
                return f"divergence {name!r} has no entry in its table"
    return _fused_why_not(spec, tensors)


def _rows_torch() -> ModuleType:
    from fastkd import rows_torch

    return rows_torch


def _rows_cpu() -> ModuleType:
    from fastkd import rows_cpu

    return rows_cpu


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("cpu", "row ops in C++ (AVX2, AVX-512 or plain)", _cpu_unavailable, _cpu_why_not, _rows_cpu),
        Backend("torch", "row ops in plain torch, any device", lambda: None, _fused_why_not, _rows_torch),
        Backend("reference", "the definition, logits in memory", lambda: None, lambda spec, tensors: None),
    )
}


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context every call that names no backend uses this one; None: as without the context."""
    _checked(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _checked(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)} or None, got {name!r}")
    return name


def asked_for() -> str | None:
    """The backend of the context, or of FASTKD_BACKEND."""
    return _chosen.get() or _checked(os.environ.get("FASTKD_BACKEND") or None)


def choose(spec: Spec, tensors: Tensors, name: str | None) -> str:
    """The backend asked for by argument, context or FASTKD_BACKEND, if it can serve; else the first that can."""
    name = _checked(name) or asked_for()
    reasons: dict[str, str] = {}
    for backend in (BACKENDS[name],) if name else BACKENDS.values():
        reason = backend.unavailable() or backend.why_not(spec, tensors)
        if reason is None:
            if backend.rows is None and not name:
                _warn_materialised("; ".join(f"{n}: {r}" for n, r in reasons.items()))
            elif "cpu" in reasons and BACKENDS["cpu"].unavailable():
                _warn_no_extension(reasons["cpu"])
            return backend.name
        reasons[backend.name] = reason
    assert name is not None  # the reference serves everything
    raise CannotServe(name, reasons[name])


@cache
def _warn_no_extension(reason: str) -> None:
    warnings.warn(f"fastkd: the torch backend serves, slower than the C++ one: {reason}", stacklevel=5)


@cache
def _warn_materialised(reasons: str) -> None:
    warnings.warn(f"fastkd: the reference backend serves, with all logits in memory. {reasons}", stacklevel=5)
