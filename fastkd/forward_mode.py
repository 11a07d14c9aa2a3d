"""Networks that know nothing of fastkd, under forward-mode AD: what torch refuses or gets wrong there is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from fastkd import checks
from fastkd.attend.inputs import TANGENT_GRADS
from fastkd.attend.pointwise import layer_norm
from fastkd.attend.public import _walking, attention

__all__ = ["replaced"]


class replaced(TorchFunctionMode):
    """Within it `F.scaled_dot_product_attention` is :func:`fastkd.attention`, and `F.layer_norm` is
    :func:`fastkd.layer_norm`, whoever calls them::

        with replaced():
            out, tangent = torch.func.jvp(network, (x,), (v,))

    Args:
        tangent_grad: "full" or "detach", as for :func:`fastkd.attention`.
        backend: see :func:`fastkd.use_backend`.

    Raises:
        ValueError: an unknown tangent_grad. Calls within raise what the functions raise, such as for dropout.
        NotImplementedError: within, a registered op (`torch.library`) without a forward-mode rule, whose tangent would
            be zero.
    """

    def __init__(self, tangent_grad: str = "full", backend: str | None = None) -> None:
        super().__init__()
        checks.is_one_of("tangent_grad", tangent_grad, TANGENT_GRADS)
        self.settings: dict[str, Any] = {"tangent_grad": tangent_grad, "backend": backend}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given: dict[str, Any] = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **given | self.settings)
        if func is F.layer_norm:
            return layer_norm(*args, **given)
        if isinstance(func, (OpOverload, OpOverloadPacket)) and not torch.compiler.is_compiling():
            return _with_a_rule(func, func(*args, **given), (args, given))
        if func is Tensor.unflatten:  # the same; within a mode torch.compile traces the function and not the method
            return torch.unflatten(*args, **given)
        return func(*args, **given)


def floats(tree: Any) -> list[Tensor]:
    """Its tensors of floats."""
    return [x for x in _pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def moves(x: Tensor) -> bool:
    """Has x a tangent, of zeros or not?"""
    return forward_ad.unpack_dual(x, level=0).tangent is not None


def _with_a_rule(op: Any, out: Any, given: Any) -> Any:
    """The output of an op, if a tangent does not end there."""
    silent = _walking(()) and not str(op).startswith(("aten", "prim"))  # those raise themselves
    if silent and floats(out) and not any(map(moves, floats(out))) and any(map(moves, floats(given))):
        raise NotImplementedError(f"{op} has no forward-mode rule: its tangent would be zero")
    return out
