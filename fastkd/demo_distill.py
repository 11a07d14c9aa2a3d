"""What the demo measures: two ways to write one loss, the training steps around them, and the held-out metrics."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd import Head, TopK
from fastkd.demo_assets import DemoError
from fastkd.machine import PeakMemory
from fastkd.terminal import Tick

Loss = Callable[[Head, Any], Tensor]  # of the student and what a lesson has of the teacher
Lesson = tuple[Tensor, Any]  # what the student reads (see hidden_states), and the teacher on it


@dataclass(frozen=True)
class Task:
    """Who learns from whom, on which text."""

    teacher: Any
    keep: list[int]  # the teacher's layers that the student has
    batches: Tensor  # [steps, batch, seq]
    held_out: Tensor  # [n, batch, seq]
    dtype: torch.dtype  # of hidden states and heads
    lr: float  # the peak


def fused_loss(student: Head, teacher: Head | TopK) -> Tensor:
    """Mean over tokens of KL(teacher || student); [tokens, vocabulary] never exists."""
    return fastkd.kd_loss(student, teacher, "forward_kl", reduction="mean")


def naive_loss(student: Head, teacher: Head) -> Tensor:
    """The same number as it is usually written, on materialised logits."""
    student_logits = student.hidden @ student.weight.T
    teacher_logits = teacher.hidden @ teacher.weight.T
    tokens = student.hidden[..., 0].numel()
    return F.kl_div(
        F.log_softmax(student_logits.float(), -1),
        F.log_softmax(teacher_logits.float(), -1),
        log_target=True,
        reduction="sum",
    ).div(tokens)


LOSSES: dict[str, Loss] = {"fused": fused_loss, "naive": naive_loss}


def kept_layers(total: int, keep: int) -> list[int]:
    """Indices of the layers that stay: all but one block just before the middle, the first and the last among them.

    KL of SmolLM2-135M cut from 30 layers to 20, before any training, on 2,048 tokens of the text: this block 2.1 nats,
    one layer later 2.7, every third layer 6.1, ten late layers 13.6.
    """
    if not 2 <= keep <= total:
        raise DemoError(f"a student keeps between 2 and all {total} layers of this teacher, not {keep}")
    start = max(1, (keep - 1) // 2)
    return [*range(start), *range(total - keep + start, total)]


def prune(teacher: Any, keep: list[int]) -> Any:
    """A trainable copy of a causal language model with only the layers `keep`."""
    student = copy.deepcopy(teacher)
    student.model.layers = nn.ModuleList(student.model.layers[index] for index in keep)
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(keep)
    return student.requires_grad_(True)


def head_weight(model: Any, dtype: torch.dtype) -> Tensor:
    """The output embedding [V, D] in the dtype of the run."""
    weight: Tensor = model.get_output_embeddings().weight.to(dtype)
    return weight


def computed_in(dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`, with parameters in float32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def hidden_states(model: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Last hidden states [batch, seq, D] of ids [batch, seq], or of embeddings [batch, seq, D] in their place: the
    model without its head, computed in `dtype`."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    with computed_in(dtype):
        hidden: Tensor = model.model(**{name: inputs}, use_cache=False).last_hidden_state
    return hidden.to(dtype)


@torch.no_grad()
def teach(teacher: Any, batches: Tensor, dtype: torch.dtype, tick: Tick) -> list[Head]:
    """The teacher on every batch [steps, batch, seq]: hidden states and head, never logits; both runs share them."""
    weight, taught = head_weight(teacher, dtype).detach(), []
    for ids in batches:
        taught.append(Head(hidden_states(teacher, ids, dtype), weight))
        tick()
    return taught


@torch.no_grad()
def evaluate(student: Any, batches: Tensor, taught: list[Head], tick: Tick) -> dict[str, float]:
    """Held-out KL(teacher || student) in nats per token, top-1 agreement, and both perplexities."""
    weight = head_weight(student, taught[0].weight.dtype)
    kl = same = student_nll = teacher_nll = 0.0
    for ids, teacher in zip(batches, taught):
        head = Head(hidden_states(student, ids, weight.dtype), weight)
        kl += fastkd.kd_loss(head, teacher, "forward_kl", reduction="sum").item()
        same += (fastkd.token_stats(head).argmax == fastkd.token_stats(teacher).argmax).sum().item()
        student_nll += next_token_nll(head, ids)
        teacher_nll += next_token_nll(teacher, ids)
        tick()
    tokens, predicted = batches.numel(), batches[..., 1:].numel()
    return {
        "kl": kl / tokens,
        "top1": same / tokens,
        "perplexity": math.exp(student_nll / predicted),
        "teacher_perplexity": math.exp(teacher_nll / predicted),
    }


def next_token_nll(head: Head, ids: Tensor) -> float:
    """Sum over ids [batch, seq] of -log p(next token)."""
    log_probs = fastkd.selected_log_probs(Head(head.hidden[:, :-1], head.weight), ids[:, 1:, None])
    return -log_probs.sum(dtype=torch.float64).item()


@dataclass
class Run:
    """One training run: an entry a step in every list."""

    loss: list[float] = field(default_factory=list)
    loss_ms: list[float] = field(default_factory=list)  # forward and backward of the loss alone
    step_ms: list[float] = field(default_factory=list)  # body, loss, optimizer
    extra_bytes: list[int | None] = field(default_factory=list)  # peak of the loss above what was there before
    held_out: dict[str, float] = field(default_factory=dict)  # after the last step

    @property
    def peak_extra_bytes(self) -> int | None:
        """Median over the steps of the loss's peak; None where it is not measured."""
        measured = [extra for extra in self.extra_bytes if extra is not None]
        return int(median(measured)) if measured else None


def train(student: Any, lessons: Iterable[Lesson], loss: Loss, task: Task, tick: Tick) -> Run:
    """One AdamW step a lesson, of which there are as many as batches; warm-up and cosine. The loss is timed apart from
    the body."""
    run, dtype, steps = Run(), task.dtype, len(task.batches)
    optimizer = torch.optim.AdamW(student.parameters(), lr=task.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, steps // 10), (1 + math.cos(math.pi * step / steps)) / 2)
    )
    for inputs, teacher in lessons:
        start = time.perf_counter()
        hidden, weight = hidden_states(student, inputs, dtype), head_weight(student, dtype)
        body_ms = lap(start)
        value, gradients = measured_loss(loss, hidden, weight, teacher, run)
        start = time.perf_counter()
        torch.autograd.backward((hidden, weight), gradients)
        del gradients
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.step_ms.append(body_ms + run.loss_ms[-1] + lap(start))
        run.loss.append(value)
        tick(f"loss {value:.3f}")
    return run


def measured_loss(
    loss: Loss, hidden: Tensor, weight: Tensor, teacher: Any, run: Run
) -> tuple[float, tuple[Tensor, ...]]:
    """The loss and its gradients to hidden [batch, seq, D] and weight [V, D], with time and memory noted in `run`."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with PeakMemory() as memory:
        start = time.perf_counter()
        value = loss(Head(*leaves), teacher)
        gradients = torch.autograd.grad(value, leaves)
        run.loss_ms.append(lap(start))
    run.extra_bytes.append(memory.bytes)
    return value.item(), gradients


def lap(start: float) -> float:
    """Milliseconds since `start`."""
    return 1e3 * (time.perf_counter() - start)
