"""A network and its tangent, as continuous-time losses need them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree

from fastkd import checks
from fastkd.diffusion.samples import values
from fastkd.forward_mode import floats, moves, replaced

__all__ = ["network_jvp", "tangent_warmup"]


def network_jvp(
    network: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    tangent_grad: str = "full",
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """A network's output and its derivative along a direction. In plain PyTorch::

        F, tF = torch.func.jvp(lambda *x: network(*x, **kwargs), primals, tangents)

    with what goes wrong there taken care of: `F.scaled_dot_product_attention` and `F.layer_norm` are those of fastkd,
    modules run in eval mode (no dropout; running statistics stay) and are put back, autocast keeps no casts of weights
    from within the transform, and a tangent that ends on its way is an error and not a zero. Gradients flow through
    both results; detach what a loss takes for constant.

    A module that has a tangent in and none out is run twice more, with its input and with that shrunk: only what
    follows its input has lost a tangent, unlike positions, or a mask. A detach beside a way on which the tangent goes
    on, as in a residual, is not seen. Within torch.compile nothing is watched, and of a function only the module that
    it is a method of is put in eval mode.

    Args:
        network: a module or function of ``*primals, **kwargs`` that returns a tensor.
        primals: its arguments, such as (x_t, t); what is not a tensor of floats has the tangent None.
        tangents: one for each, of the same shape and dtype; None: zero.
        tangent_grad: of attention that is not called as fastkd's own: "full", or "detach" where the loss takes tF for
            constant.
        kwargs: further arguments, which have no tangent.

    Returns:
        (F, tF), both of the shape of the output.

    Raises:
        TypeError, ValueError: primals and tangents that do not match.
        NotImplementedError: an op on the way has no forward-mode rule, by the module that holds it.
        RuntimeError: a module's output follows an input that has a tangent, and has none.
    """
    moving = _moving(primals, tangents)
    device = primals[moving[0]].device.type

    def along(*xs: Tensor) -> Tensor:
        given = list(primals)
        for i, x in zip(moving, xs, strict=True):
            given[i] = x
        out = network(*given, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"network must return a tensor, got {type(out).__name__}")
        if not torch.compiler.is_compiling() and not moves(out):
            raise RuntimeError("network's output has no tangent: it does not depend on what moves, or loses it")
        return out

    with _eval(network) as training, _watched(network, training), _uncached(device), replaced(tangent_grad):
        return torch.func.jvp(along, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[:2]


def _moving(primals: Any, tangents: Any) -> list[int]:
    """Which arguments have a tangent."""
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise TypeError(f"{name} must be a tuple, got {type(given).__name__}")
    if len(primals) != len(tangents):
        raise ValueError(f"tangents must be one for each of {len(primals)} primals, got {len(tangents)}")
    found = [i for i, t in enumerate(tangents) if t is not None]
    if not found:
        raise ValueError("tangents must hold at least one tensor, got None alone")
    for i in found:
        x, t = checks.is_float(f"primals[{i}]", primals[i]), checks.is_float(f"tangents[{i}]", tangents[i])
        checks.has_shape(f"tangents[{i}]", t, tuple(x.shape), f", that of primals[{i}]")
        checks.same_device(**{f"primals[{i}]": x, f"tangents[{i}]": t})
        if x.dtype != t.dtype:
            raise TypeError(f"tangents[{i}] must be {x.dtype}, as primals[{i}], got {t.dtype}")
    return found


def _uncached(device: str) -> Any:
    """Autocast as it is, without its cache."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)


def _owner(network: Any) -> nn.Module | None:
    """The module that a network is, or is a method of."""
    owner = getattr(network, "__self__", network)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def _eval(network: Any) -> Iterator[list[nn.Module]]:
    """Its modules in eval mode; they, and what is added to the list, are put back."""
    owner = _owner(network)
    training = [] if owner is None else [m for m in owner.modules() if m.training]
    try:
        for m in training:
            m.training = False
        yield training
    finally:
        for m in training:
            m.training = True


@contextmanager
def _watched(network: Any, training: list[nn.Module]) -> Iterator[None]:
    """Whatever module runs is in eval mode, and errors name it; a tangent that it loses is one."""
    if torch.compiler.is_compiling():
        yield
        return
    owner, thread = _owner(network), threading.get_ident()  # the hooks are those of all threads
    names = {} if owner is None else {m: f"{name!r} " for name, m in owner.named_modules()}
    within: list[nn.Module] = []

    def named(module: nn.Module) -> str:
        return f"module {names.get(module, '')}({type(module).__name__})"

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            within.append(module)
            if module.training:
                module.training = False
                training.append(module)

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if threading.get_ident() == thread:
            while within.pop() is not module:  # one that failed, and was caught
                pass
            if _loses(module, args, kwargs, out):
                raise RuntimeError(f"{ENDS} in {named(module)}: {WHY}")

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if within and not str(error).startswith(ENDS):
            error.args = (f"{named(within[-1])}: {error}",)
        raise
    finally:
        for handle in handles:
            handle.remove()


ENDS = "the tangent ends"
WHY = "its output follows an input that has one, and has none; by a detach, a cast to integers, or an op without a rule"


def _loses(module: nn.Module, args: Any, kwargs: Any, out: Any) -> bool:
    """Does an output follow the inputs and have no tangent where they have one?"""
    was = floats(out)
    if not was or any(map(moves, was)) or not any(map(moves, floats((args, kwargs)))):
        return False

    def again(shrink: bool) -> list[Tensor]:
        """Shrunk: each entry by a factor of its own, towards 0, so that an index stays one."""

        def still(x: Any) -> Any:
            if not (isinstance(x, Tensor) and moves(x)):
                return x
            x = forward_ad.unpack_dual(x, level=0).primal
            factors = torch.linspace(0.5, 0.9, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
            return x * factors if shrink else x

        with torch.no_grad():
            a, k = _pytree.tree_map(still, (args, kwargs))
            return floats(module.forward(*a, **k))

    if was[0].is_meta or not _same(was, again(False)):
        return False  # no values, or those of chance
    now = again(True)
    return not _same(was, now) and not all(map(_is_mask, was + now))


def _same(xs: list[Tensor], ys: list[Tensor]) -> bool:
    return len(xs) == len(ys) and all(torch.equal(values(x), values(y)) for x, y in zip(xs, ys, strict=True))


def _is_mask(x: Tensor) -> bool:
    """Of 0, 1 and what an addition hides with."""
    x = values(x)
    return bool(((x == 0) | (x == 1) | (x <= torch.finfo(x.dtype).min)).all())


def tangent_warmup(step: int, steps: int = 10_000) -> float:
    """min(1, step / steps), the weight of the tangent in sCM's target in the first steps."""
    for name, value, least in (("step", step, 0), ("steps", steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer from {least}, got {value!r}")
    return min(1.0, step / steps)
