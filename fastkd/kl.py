"""The drop-in for torch.nn.functional.kl_div."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false as _is_dense

from fastkd import checks, rows_cpu
from fastkd.backends import BACKENDS, asked_for, extension

__all__ = ["kl_div"]


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Pointwise KL divergence, with the signature, semantics, warnings and errors of ``torch.nn.functional.kl_div``::

        target * (target.log() - input)          # log_target=False; 0 where target is 0
        target.exp() * (target - input)          # log_target=True; 0 where target is -inf

    reduced by "none", "sum", "mean" (over all elements: rarely what you want) or "batchmean" (by ``input.size(0)``).

    The ``cpu`` backend sums a reduced float32, bfloat16 or float16 loss in one pass, in float32, without the array of
    terms; every other call is torch's own. Gradients reach ``input`` and ``target``; double backward, forward mode,
    vmap and torch.compile work as in torch. A reduced loss has limits where torch multiplies 0 by infinity to NaN: a
    target of 0 or log-target of -inf counts 0, whatever the input; the gradient with respect to a target of 0 is -inf.

    Args:
        input: log-probabilities [...].
        target: probabilities (or their logs) of a shape that broadcasts with input's.
        size_average, reduce: deprecated in torch; honoured, with its warning.
        reduction, log_target: see above.

    Raises:
        What ``F.kl_div`` raises.
    """
    reason = why_not("cpu", input, target, size_average, reduce, reduction)
    if reason is not None or asked_for() not in (None, "cpu"):  # in this order: torch.compile cannot look up the latter
        return F.kl_div(input, target, size_average, reduce, reduction, log_target)
    if reduction == "mean":
        warnings.warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math definition."
            "'mean' will be changed to behave the same as 'batchmean' in the next major release.",
            stacklevel=2,
        )
    divisor = {"sum": 1, "mean": input.numel(), "batchmean": input.shape[0] if input.dim() else 1}
    return _KLDiv.apply(input, target, 1 / divisor[reduction], log_target)


def why_not(
    backend: str,
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> str | None:
    """Why a backend would not compute this call of :func:`kl_div` but leave it to torch, in a sentence; else None."""
    if backend != "cpu":
        served = backend == "torch" or BACKENDS[backend].rows is None
        return None if served else f"kl_div has no kernel of backend {backend!r}: torch computes it"
    return _cpu_why_not(input, target) or _reduction_why_not(input, reduction, size_average, reduce)


def _cpu_why_not(x: Any, t: Any) -> str | None:
    if not isinstance(x, Tensor) or not isinstance(t, Tensor) or not checks.readable(x, t):
        return "its one-pass kernel reads plain tensors in the CPU's memory"
    if extension()[0] is None:
        return extension()[1]
    if x.shape != t.shape or not x.numel():
        return "its one-pass kernel takes input and target of one shape with at least one element"
    if x.dtype != t.dtype or x.dtype not in rows_cpu.DTYPES:
        return "its one-pass kernel takes input and target both in float32, bfloat16 or float16"
    if x.dtype != torch.float32 and torch.is_autocast_enabled("cpu"):
        return "under autocast torch gives float32"
    if torch.autograd.forward_ad._current_level >= 0:
        return "within a dual level there may be tangents, which torch's own ops carry"
    return None


def _reduction_why_not(x: Tensor, reduction: str, size_average: Any, reduce: Any) -> str | None:
    if size_average is not None or reduce is not None:
        return "size_average and reduce are left to torch"
    if reduction not in ("sum", "mean", "batchmean") or (reduction == "batchmean" and not x.dim()):
        return f"its one-pass kernel does not give reduction={reduction!r} of {x.dim()} dimensions"
    return None


class _KLDiv(torch.autograd.Function):
    """sum of the terms times scale"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, scale: float, log_target: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, t)
        ctx.scale, ctx.log_target = scale, log_target
        total = rows_cpu.kl_div_sum(*_aligned(x, t), log_target)
        return torch.tensor(total * scale, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, t = ctx.saved_tensors
        dx = dt = None
        if ctx.needs_input_grad[0]:
            # differentiable once more where someone asks for it
            one_pass = checks.readable(t, g) and not torch.is_grad_enabled()
            dx = (
                _grad_input(t, float(g) * ctx.scale, ctx.log_target)
                if one_pass
                else (t.exp() if ctx.log_target else t) * (-g * ctx.scale)
            )
        if ctx.needs_input_grad[1]:
            c = g * ctx.scale
            if ctx.log_target:
                p = t.exp()
                dt = torch.where(p == 0, 0.0, p * (t + 1 - x)) * c
            else:
                dt = (t.log() + 1 - x) * c
        return dx, dt, None, None


def _aligned(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same elements in the same order in memory."""
    if x.stride() == t.stride() and _is_dense(x):
        return x, t
    return x.contiguous(), t.contiguous()


def _grad_input(t: Tensor, scale: float, log_target: bool) -> Tensor:
    t = t if _is_dense(t) else t.contiguous()
    out = torch.empty_like(t)
    rows_cpu.kl_div_grad(t, out, scale, log_target)
    return out
