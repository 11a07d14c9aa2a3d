"""A transformer of diffusers under `torch.func.jvp`.

    model = SD3Transformer2DModel.from_pretrained(...)
    use_attention(model)
    out, tangent = torch.func.jvp(lambda x, t: model(x, timestep=t, ...).sample, (x_t, t), (dx_t, dt))

Every attention keeps its processor, with its projections, norms, masks and rotary embeddings, and may be given another
one at any time: what it calls is replaced. (A processor around it would lose arguments: diffusers reads a processor's
signature and drops what that does not name.)

What stands in the way of forward mode in the models of diffusers 0.42 with torch 2.13, what is seen, what to do:

`F.scaled_dot_product_attention`
    NotImplementedError "forward AD": the fused kernels have no rule. `use_attention` replaces it.
`F.layer_norm`
    Values and tangents are right; gradients through the tangent are wrong in silence, by up to half of the largest, and
    those of reverse over reverse (`torch.autograd.functional.jvp`) no less. `use_attention` replaces it.
Attention backends
    "native" and those named "_native_..." call the function above. "flex" raises Unsupported "functorch": call
    `model.set_attention_backend("native")`.
Kernels without a rule: attention or linear layers from elsewhere, quantised ones, any `torch.library.custom_op`
    A tangent of zeros in silence. `use_attention` makes a registered op without a rule a NotImplementedError, and a
    RuntimeError of it where the input of an attention or of the model has a tangent and its output has none;
    :func:`fastkd.diffusion.network_jvp` does so for every module of the network. Take the plain layer.
`torch.autograd.Function`
    RuntimeError "setup_context" or NotImplementedError "jvp function": it needs both.
Gradient checkpointing
    The backward raises CheckpointError, as the recomputation has no tangents; without tangents it works as ever. Call
    `model.disable_gradient_checkpointing()`, or put the checkpoint around the jvp: `checkpoint(lambda *a:
    torch.func.jvp(f, a[:2], a[2:]), x_t, t, dx_t, dt, use_reentrant=False)`.
Integer timesteps
    `torch.func.jvp` raises ValueError "floating point"; a cast to integers, or a detach, on the way to the model leaves
    the time's part of the tangent out, in silence. Give floats, which the models take as well.
`torch.no_grad`, `torch.inference_mode`
    As decorators of what is differentiated: under the first the tangent is right and has no gradient, the second raises
    RuntimeError "inference tensor". Around the jvp both work.
Train mode
    Dropout is drawn anew in each call. `model.eval()`.
Float32 within
    Wan, AuraFlow and others compute rotary embeddings, times or norms in float32 whatever the model's dtype: checks
    in float64 hold to 1e-6.

Right as they are: RMSNorm, GroupNorm, GELU, SiLU, adaptive modulation, rotary embeddings in real and complex numbers,
additive and boolean masks, guidance embeddings, autocast, `fuse_qkv_projections`.
"""

from __future__ import annotations

from functools import update_wrapper
from typing import Any

import torch
from torch import nn

from fastkd.attend.public import _walking
from fastkd.forward_mode import floats, moves, replaced

__all__ = ["use_attention"]


def use_attention(model: nn.Module, tangent_grad: str = "full", backend: str | None = None) -> int:
    """Makes a model call :func:`fastkd.attention` and :func:`fastkd.layer_norm` in place of torch's; the number of its
    attentions. Called again it changes the settings. State dict, processors and modules stay what they are; copies and
    pickles of the model keep it.

    Args:
        model: a model of diffusers, such as a pipeline's transformer.
        tangent_grad, backend: as for :func:`fastkd.attention`.

    Raises:
        TypeError: no module. ValueError: a model without attention processors, an unknown tangent_grad.
        RuntimeError: in the model's forward, an attention or the model whose input has a tangent and whose output has
            none; what :func:`fastkd.attention` raises. NotImplementedError there: a registered op without a rule.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, such as pipeline.transformer, got {type(model).__name__}")
    replaced(tangent_grad, backend)  # its errors come now
    found = [m for m in model.modules() if callable(getattr(m, "processor", None))]
    if not found:
        raise ValueError(f"model must have attention processors, got a {type(model).__name__} without any")
    # each by itself, too: a checkpoint recomputes parts of the model outside of its forward
    for m in {model, *found, *(m for m in model.modules() if isinstance(m, nn.LayerNorm))}:
        forward: Any = m.forward
        if not isinstance(forward, _Within):
            m.forward = forward = _Within(m)
        forward.settings = (tangent_grad, backend)
    return len(found)


class _Within:
    """The forward of a module within :class:`replaced`."""

    settings: tuple[str, str | None]

    def __init__(self, module: nn.Module) -> None:
        update_wrapper(self, module.forward)
        self.module, self.forward = module, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with replaced(*self.settings):
            out = self.forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            came, left = _moving((args, kwargs)), _moving(out)
            if any(came) and left and not any(left):
                name = type(getattr(self.module, "processor", self.module)).__name__
                raise RuntimeError(
                    f"the tangent ends in {name}, whose output has none where its input has one: a detach, or a kernel "
                    "without a forward-mode rule; of attention backends take model.set_attention_backend('native')"
                )
        return out


def _moving(tree: Any) -> list[bool]:
    """For each of its tensors of floats: has it a tangent? Nothing, where nobody asks for tangents."""
    return [*map(moves, floats(tree))] if _walking(()) else []
