"""Checks of arguments; each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_tensor(name: str, value: Any) -> Tensor:
    """The value, if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: call in the forward of the module that FSDP2 gathers, "
            f"or give {name.rpartition('.')[2]}.full_tensor()"
        )
    return value


def is_float(name: str, value: Any) -> Tensor:
    """The value, if it is a tensor of a float dtype that fastkd has."""
    if is_tensor(name, value).dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def is_index(name: str, value: Any) -> Tensor:
    """The value, if it is a tensor of int64 or int32."""
    if is_tensor(name, value).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")
    return value


def has_shape(name: str, value: Tensor, shape: tuple[int, ...], why: str = "") -> None:
    """``why`` says where the expected shape comes from."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}{why}, got {list(value.shape)}")


def same_device(**tensors: Tensor | None) -> None:
    """All that are given lie on one device."""
    given = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(given.values())) > 1:
        raise ValueError("all tensors must be on one device, got " + ", ".join(f"{n} on {d}" for n, d in given.items()))


def is_one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def finite_number(name: str, value: Any, *, above: float = -math.inf) -> float:
    """The value, if it is a finite number above a bound."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (-math.inf < value < math.inf and value > above):  # torch.compile traces these, not math.isfinite
        raise ValueError(f"{name} must be finite{f' and above {above:g}' if above > -math.inf else ''}, got {value}")
    return float(value)


def chunking(chunk_tokens: Any, memory_budget: Any) -> None:
    """The arguments of these names."""
    for name, value in (("chunk_tokens", chunk_tokens), ("memory_budget", memory_budget)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer or None, got {value!r}")


def eager() -> bool:
    """Is nothing tracing or transforming the call?"""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def readable(*tensors: Tensor | None) -> bool:
    """Can values be looked at: real memory on the CPU (elsewhere a look would wait for the device)?"""
    return eager() and all(t is None or _in_memory(t) for t in tensors)


def legible(x: Tensor) -> bool:
    """Can the values of an argument that no transform wraps be looked at, within a transform of others, too?"""
    return not torch.compiler.is_compiling() and _in_memory(x)


def as_stored(x: Tensor | None) -> Tensor | None:
    """x in memory that holds what it says: raw addresses know no negative views, and no zeros without memory."""
    if x is None:
        return None
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if x._is_zerotensor() else x.resolve_neg()


def _in_memory(t: Tensor) -> bool:
    """On the CPU; no subclass that makes its own results, nor the wrapper of a transform."""
    if type(t).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        return False
    return torch._C._dispatch_keys(t).has(
        torch._C.DispatchKey.CPU
    ) and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def all_values(name: str, expected: str, value: Tensor, good: Tensor, at: tuple[int, ...] = ()) -> None:
    """Every entry of ``value`` must be ``good``; the error shows the first that is not. ``at``: where ``value`` begins
    in the tensor of that name, in its leading dimensions, of which ``value`` has the last alone."""
    if not bool(good.all()):
        bad = (~good).nonzero()[0].tolist()
        index = [*at[:-1], at[-1] + bad[0], *bad[1:]] if at else bad
        raise ValueError(f"{name} must be {expected}, got {value[tuple(bad)].item()} at index {index}")
