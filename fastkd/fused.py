"""One autograd rule and one library op for every fused op: `fastkd::fused(tensors, cotangents, needs, spec)`.

Eager calls, torch.func and torch.compile all go through the same `autograd.Function` to the same op. A scalar loss knows
its cotangent up to one factor, so its gradients are made in the forward; other outputs are recomputed in the backward.
Differentiating a second time, and forward mode, go through the definition (logits in memory).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastkd import backends, checks, driver, reference
from fastkd.problem import Spec, Tensors

_library = torch.library.Library("fastkd", "DEF")
_library.define("fused(Tensor?[] tensors, Tensor[] cotangents, bool[] needs, str spec) -> Tensor[]")


def _run(tensors: list[Tensor | None], cotangents: list[Tensor], needs: list[bool], spec: str) -> list[Tensor]:
    """The outputs, then the gradient of each tensor in `needs`, for the cotangents (none given: one)."""
    return driver.run(Spec.decode(spec), tuple(tensors), cotangents, needs)


def _fake(tensors: list[Tensor | None], cotangents: list[Tensor], needs: list[bool], spec: str) -> list[Tensor]:
    outputs = driver.outputs_like(Spec.decode(spec), tuple(tensors))
    return [*outputs, *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in _needed(tensors, needs))]


def _needed(tensors: Any, needs: Any) -> list[Tensor]:
    return [t for t, n in zip(tensors, needs, strict=True) if n]


_library.impl("fused", _run, "CompositeExplicitAutograd")
_library.impl("fused", _fake, "Meta")
torch.library.register_fake("fastkd::fused", _fake, lib=_library)


def apply(spec: Spec, tensors: Tensors, backend: str | None) -> tuple[Tensor, ...]:
    """The outputs of the op, differentiable."""
    name = backends.choose(spec, tensors, backend)
    if backends.BACKENDS[name].rows is None:
        driver.check_values(spec, tensors)
        return _define(spec, tensors)
    spec = replace(spec, backend=name)
    return Fused.apply(spec, _made_in_forward(spec, tensors), *tensors)[: driver.count(spec)]


def _define(spec: Spec, tensors: Tensors) -> tuple[Tensor, ...]:
    """The outputs by the definition. The dtypes are settled: autocast has no further say."""
    device = next(t.device.type for t in tensors if t is not None)
    if device == "meta":
        return reference.OPS[type(spec)](spec, tensors)
    with torch.autocast(device, enabled=False):
        return reference.OPS[type(spec)](spec, tensors)


def _made_in_forward(spec: Spec, tensors: Tensors) -> tuple[bool, ...]:
    """Which gradients the forward makes: those of a scalar, unless float16 would lose them to underflow before a loss
    scale reaches them, or a transform of torch.func hides what is needed."""
    half = any(t is not None and t.dtype == torch.float16 for t in tensors)
    scalar = getattr(spec, "total", False) and torch.is_grad_enabled()
    if half or not scalar or torch._C._are_functorch_transforms_active():
        return (False,) * len(tensors)
    return tuple(t is not None and t.requires_grad for t in tensors)


def _op(spec: Spec, tensors: Tensors, cotangents: Tensors, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.ops.fastkd.fused(list(tensors), list(cotangents), list(needs), spec.encode()))


def _spread(grads: Tensors, needs: tuple[bool, ...]) -> Tensors:
    """One gradient or None for each tensor."""
    queue = iter(grads)
    return tuple(next(queue) if n else None for n in needs)


class Fused(torch.autograd.Function):
    """(spec, made, *tensors) -> outputs, then the gradients in `made`."""

    @staticmethod
    def forward(spec: Spec, made: tuple[bool, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return _op(spec, tensors, (), made)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.made, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[driver.count(ctx.spec) :])
        ctx.save_for_forward(*tensors)
        whole = [t for t in output[: driver.count(ctx.spec)] if not t.is_floating_point()]
        ctx.mark_non_differentiable(*whole, *output[driver.count(ctx.spec) :])
        ctx.like = [(t.shape, t.dtype) for t in output[: driver.count(ctx.spec)] if t.is_floating_point()]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Tensors:
        n, needs = len(ctx.made), tuple(ctx.needs_input_grad[2:])
        tensors, made = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        if not any(needs):
            return (None,) * (n + 2)
        device = next(t.device for t in tensors if t is not None)
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if g is None else g
            for g, (shape, dtype) in zip(cotangents, ctx.like, strict=False)
        ]
        args = (ctx.spec, needs, ctx.made, len(given), *given, *tensors, *made)
        grads = Gradients.apply(*args) if torch.is_grad_enabled() else Gradients.forward(*args)
        return (None, None, *_spread(grads, needs))

    @staticmethod
    def jvp(ctx: Any, _spec: None, _made: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """J v as the derivative of u -> <J^T u, v>, by the definition."""
        tensors = ctx.saved_tensors[: len(ctx.made)]
        return _pushforward(ctx.spec, tensors, tangents) + (None,) * sum(ctx.made)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _looped(Fused, info, in_dims, args)


class Gradients(torch.autograd.Function):
    """(spec, needs, made, count, *cotangents, *tensors, *gradients made in the forward) -> the gradients in `needs`."""

    @staticmethod
    def forward(
        spec: Spec, needs: tuple[bool, ...], made: tuple[bool, ...], count: int, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        cotangents, tensors, grads = flat[:count], flat[count : count + len(made)], flat[count + len(made) :]
        if not any(made):
            return _op(spec, tensors, cotangents, needs)[driver.count(spec) :]
        (g,) = cotangents
        kept = [x for x, n in zip(_spread(grads, made), needs, strict=True) if n]
        return tuple(kept) if _is_one(g) else tuple((x * g).to(x.dtype) for x in kept)  # type: ignore[operator,union-attr,return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.needs, made, ctx.count, *flat = inputs
        ctx.size = len(inputs)
        ctx.save_for_backward(*flat[: ctx.count + len(made)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensors:
        """The vector-Jacobian product of the vector-Jacobian product, by the definition."""
        flat = ctx.saved_tensors
        wanted = [t is not None and t.is_floating_point() for t in flat]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() if w else t for t, w in zip(flat, wanted, strict=True)]
            given, tensors = leaves[: ctx.count], leaves[ctx.count :]
            outputs = [o for o in _define(ctx.spec, tuple(tensors)) if o.is_floating_point()]
            xs = _needed(tensors, ctx.needs)
            grads = torch.autograd.grad(outputs, xs, given, create_graph=True, materialize_grads=True)
            used = [(g, c) for g, c in zip(grads, cotangents, strict=True) if g.requires_grad]
            second = torch.autograd.grad(
                [g for g, _ in used], _needed(leaves, wanted), [c for _, c in used], allow_unused=True
            )
        rest = ctx.size - 4 - len(flat)
        return (None,) * 4 + _spread(second, tuple(wanted)) + (None,) * rest

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _looped(Gradients, info, in_dims, args)


def _is_one(g: Tensor | None) -> bool:
    """Is this a cotangent of exactly 1 that can be looked at without waiting for a device?"""
    return type(g) is Tensor and g.device.type == "cpu" and checks.readable(g) and bool(g == 1)


def _pushforward(spec: Spec, tensors: Tensors, tangents: Tensors) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [t if v is None or t is None else t.detach().requires_grad_() for t, v in zip(tensors, tangents, strict=True)]
        pairs = [(x, v) for x, v in zip(leaves, tangents, strict=True) if v is not None]
        outputs = _define(spec, tuple(leaves))
        smooth = [o for o in outputs if o.is_floating_point()]
        u = [torch.zeros_like(o, requires_grad=True) for o in smooth]
        grads = torch.autograd.grad(smooth, [x for x, _ in pairs], u, create_graph=True, materialize_grads=True)
        inner = sum(((g * v).sum() for g, (_, v) in zip(grads, pairs, strict=True)), torch.zeros(()))
        queue = iter(torch.autograd.grad(inner, u, materialize_grads=True))
    return tuple(next(queue) if o.is_floating_point() else None for o in outputs)


def _looped(function: Any, info: Any, in_dims: Any, args: Any) -> Any:
    """vmap as a loop over the batch: heads and hidden states may each be batched or shared."""

    def pick(i: int) -> list[Any]:
        return [a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims, strict=True)]

    rows = [function.apply(*pick(i)) for i in range(info.batch_size)]
    outputs = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return outputs, (0,) * len(outputs)
