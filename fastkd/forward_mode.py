"""Networks that know nothing of fastkd, under forward-mode AD: what torch refuses or gets wrong there is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastkd import checks
from fastkd.attend.inputs import TANGENT_GRADS
from fastkd.attend.pointwise import layer_norm
from fastkd.attend.public import attention

__all__ = ["replaced"]


class replaced(TorchFunctionMode):
    """Within it `F.scaled_dot_product_attention` is :func:`fastkd.attention`, and `F.layer_norm` is
    :func:`fastkd.layer_norm`, whoever calls them::

        with fastkd.forward_mode.replaced():
            out, tangent = torch.func.jvp(network, (x,), (v,))

    Args:
        tangent_grad: "full" or "detach", as for :func:`fastkd.attention`.
        backend: see :func:`fastkd.use_backend`.

    Raises:
        ValueError: an unknown tangent_grad. Calls within raise what the functions raise, such as for dropout.
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
        if func is Tensor.unflatten:  # the same; within a mode torch.compile traces the function and not the method
            return torch.unflatten(*args, **given)
        return func(*args, **given)
