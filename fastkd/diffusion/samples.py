"""What the losses have in common: samples along the first dimension, a time each, and what becomes of their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd import checks

REDUCTIONS = ("mean", "sum", "none")
ON_NAN = ("raise", "mask")


def latents(**tensors: Any) -> None:
    """Float tensors of one shape [B, ...] on one device."""
    (first, x), *others = tensors.items()
    checks.is_float(first, x)
    if x.dim() == 0:
        raise ValueError(f"{first} must have shape [B, ...], got []")
    if 0 in x.shape[1:]:
        raise ValueError(f"{first} must have samples of at least one entry, got shape {list(x.shape)}")
    for name, y in others:
        checks.has_shape(name, checks.is_float(name, y), tuple(x.shape), f", that of {first}")
    checks.same_device(**tensors)


def times(name: str, t: Any, like: Tensor, first: float, last: float) -> Tensor:
    """One number for each sample, [B, 1, ..., 1] in float64; NaN outside where a look is not free."""
    found = each(name, t, like)
    if checks.legible(t):
        # compared in the dtype of t: pi / 2 in float32, above pi / 2, is a time
        checks.all_values(name, f"a time from {first:g} to {last:g}", t, (t >= first) & (t <= last))
        return found
    inside = (t >= first) & (t <= last)
    return found.where(inside.reshape(-1, *(1,) * (like.dim() - 1)), torch.nan)


def ordered(name: str, what: str, found: Tensor, right: Tensor, *times: Tensor) -> Tensor:
    """Times [B, 1, ..., 1] that are right beside others; as :func:`times`."""
    if all(map(checks.legible, times)):
        checks.all_values(name, what, found.flatten(), right.flatten())
        return found
    return found.where(right, torch.nan)


def each(name: str, value: Any, like: Tensor) -> Tensor:
    """A float tensor [B], [B, 1, ...] or of one number, for all, as [B, 1, ..., 1] in float64."""
    checks.is_float(name, value)
    checks.same_device(**{"the samples": like, name: value})
    count = len(like)
    if value.numel() not in (1, count) or (value.dim() and len(value) != value.numel()):
        raise ValueError(f"{name} must have shape [{count}], one for each sample, or [], got {list(value.shape)}")
    return value.double().reshape(-1, *(1,) * (like.dim() - 1)).expand(count, *(-1,) * (like.dim() - 1))


def vector(name: str, value: Any, like: Tensor) -> Tensor:
    """A number, or as :func:`each`."""
    if isinstance(value, Tensor):
        return each(name, value, like)
    ones = (len(like), *(1,) * (like.dim() - 1))
    return torch.full(ones, checks.finite_number(name, value), dtype=torch.float64, device=like.device)


def reduce(
    loss: Callable[..., Tensor], latents: tuple[Tensor, ...], rows: tuple[Tensor, ...], reduction: str, on_nan: str
) -> Any:
    """The losses [B] of latents [B, ...], which ``loss`` gets in float32 (float64 where one is), and of rows, numbers
    of each sample such as times and weights, which it gets as [B] in float64; reduced.

    A sample with an infinity or a NaN in any of them or in its loss raises FloatingPointError, or is left out of the
    loss, of the gradient and of what the mean divides by, and counted: (loss, masked).
    """
    checks.is_one_of("reduction", reduction, REDUCTIONS)
    checks.is_one_of("on_nan", on_nan, ON_NAN)
    latents, rows = wide(*latents), tuple(x.flatten() for x in rows)
    dtype = latents[0].dtype
    if on_nan == "raise":
        losses = loss(*latents, *rows).to(dtype)
        _must_be_finite(losses, rows)
        return _total(losses, reduction, max(len(losses), 1))
    given = [x.detach() for x in latents + rows]
    finite = [x.isfinite() for x in (*given, loss(*given).to(dtype))]
    good = torch.stack([x.flatten(1).all(1) if x.dim() > 1 else x for x in finite]).all(0)
    # a gradient of 0 times an infinity would be NaN: what is left out does not take part; 0.5 is a time of every path
    latents = tuple(x.where(good.view(-1, *(1,) * (x.dim() - 1)), 0.0) for x in latents)
    losses = loss(*latents, *(x.where(good, 0.5) for x in rows)).to(dtype)
    kept = good.sum()
    return _total(losses.where(good, 0.0), reduction, kept.clamp(min=1)), len(losses) - kept


def _total(losses: Tensor, reduction: str, count: int | Tensor) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / count


def _must_be_finite(losses: Tensor, rows: tuple[Tensor, ...]) -> None:
    good = torch.stack([x.detach().isfinite() for x in (losses, *rows)]).all(0)
    good = good if torch.compiler.is_compiling() else values(good)
    if checks.legible(good):
        if not bool(good.all()):
            bad = (~good).nonzero().squeeze(1).tolist()
            shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            raise FloatingPointError(
                f"the loss of {len(bad)} of {good.numel()} samples is not finite: {shown}; "
                "on_nan='mask' leaves them out"
            )
    else:
        torch._assert_async(good.all(), "the loss of a sample is not finite; on_nan='mask' leaves such samples out")


def values(x: Tensor) -> Tensor:
    """What is within the wrappers of vmap, jvp and grad: to look at, not to go on with."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def norm(x: Tensor) -> Tensor:
    """The 2-norm of each sample, [B]; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1) if x.dim() > 1 else x.abs()


def mean(x: Tensor) -> Tensor:
    """The mean of each sample, [B]."""
    return x.flatten(1).mean(1) if x.dim() > 1 else x


def still(x: Tensor, gradient: Tensor) -> Tensor:
    """0 for each sample, [B], with the gradient of mean(x * gradient): in the pass over x that makes the loss's value,
    where mean((x - sg(x - gradient))^2) / 2 takes another once the gradient is known up to a factor."""
    dot = mean(x * gradient.detach())
    return dot - dot.detach()


def along(row: Tensor, x: Tensor) -> Tensor:
    """A row [B] for x: [B, 1, ..., 1] in its dtype."""
    return row.to(x.dtype).view(-1, *(1,) * (x.dim() - 1))


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32, or float64 where one is."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)
