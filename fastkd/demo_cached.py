"""The demo from a stored teacher: a cache for each K, a student for each K and tail, and one from the teacher itself.

All students begin alike and see the same text in the same order. Their first layers, up to the cut, are the teacher's
and stay as they are, so that they run once for all students; what comes after the cut learns, and so does the head.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastkd
from fastkd import Head, TopK, teacher_cache
from fastkd import demo_distill as distill
from fastkd.demo_assets import DemoError
from fastkd.demo_distill import Task
from fastkd.primitives import TopTokens
from fastkd.sources import TAILS
from fastkd.terminal import Stage, Tick

Result = dict[str, Any]


def distil(task: Task, ks: Sequence[int], folder: Path, stage: Stage) -> Result:
    """The part of the demo's result that is this one's own; the caches are in the folder afterwards."""
    ks = sorted(set(ks))
    frozen, learning = halves(task, ks)
    held, steps = len(task.held_out), len(task.batches)
    both = torch.cat((task.held_out, task.batches))
    taught = distill.teach(task.teacher, both, task.dtype, stage("teacher reads the text", len(both)))
    states = first_layers(task, frozen, both, stage("first layers, once", len(both)))
    caches = build(taught[held:], ks, folder, stage("write the caches", steps))
    exam = taught[:held], [fastkd.topk(head, ks[-1]) for head in taught[:held]], ks

    def student(lessons: Iterable[Any], tick: Tick) -> Result:
        model = distill.prune(task.teacher, learning)
        run = distill.train(model, zip(states[held:], lessons), distill.fused_loss, task, tick)
        return asdict(run) | {"held_out": evaluate(heads(model, states[:held], task.dtype), *exam, tick)}

    before = evaluate(heads(distill.prune(task.teacher, learning), states[:held], task.dtype), *exam)
    dense = student(taught[held:], stage("distil from the teacher", steps + held))
    runs: dict[str, dict[str, Result]] = {}
    for k in ks:
        tick = stage(f"distil from its top {k}", len(TAILS) * (steps + held))
        runs[str(k)] = {tail: student(stored(folder / f"k{k}", len(task.batches[0]), tail), tick) for tail in TAILS}
    return {
        "learning": learning,
        "caches": caches,
        "logits_bytes_per_token": 2 * taught[0].weight.shape[0],  # in bfloat16
        "teacher": evaluate(taught[:held], *exam),
        "before": before,
        "dense": dense,
        "runs": runs,
    }


def halves(task: Task, ks: Sequence[int]) -> tuple[list[int], list[int]]:
    """The student's layers before the cut and after it."""
    cut = sum(index == layer for index, layer in enumerate(task.keep))
    if cut == len(task.keep):
        raise DemoError(f"--layers {cut}: expected fewer than the teacher has, what comes after the cut learns")
    vocabulary = distill.head_weight(task.teacher, task.dtype).shape[0]
    if ks[-1] > vocabulary:
        raise DemoError(f"--k {ks[-1]}: expected at most the {vocabulary} entries of the vocabulary")
    return task.keep[:cut], task.keep[cut:]


@torch.no_grad()
def first_layers(task: Task, layers: list[int], batches: Tensor, tick: Tick) -> list[Tensor]:
    """What the layers before the cut make of each batch of ids: [batch, seq, D]."""
    model, states = distill.prune(task.teacher, layers), []
    model.model.norm = nn.Identity()  # it belongs after the last layer
    for ids in batches:
        states.append(distill.hidden_states(model, ids, task.dtype))
        tick()
    return states


def build(taught: list[Head], ks: Sequence[int], folder: Path, tick: Tick) -> Result:
    """A cache for each K in a folder of its own, a sequence for each of the text: the report of each writer."""
    shutil.rmtree(folder, ignore_errors=True)  # that of another run
    vocabulary = taught[0].weight.shape[0]
    writers = {k: teacher_cache.Writer(folder / f"k{k}", teacher_cache.Meta(vocab=vocabulary, k=k)) for k in ks}
    for head in taught:
        top = fastkd.topk(head, ks[-1])  # likeliest first: the others are its beginnings
        for k, writer in writers.items():
            for ids, log_probs in zip(top.ids[..., :k], top.log_probs[..., :k]):
                writer.write(ids, log_probs)
        tick()
    for writer in writers.values():
        writer.close()
    return {str(k): writer.report() for k, writer in writers.items()}


def stored(folder: Path, batch: int, tail: str) -> Iterator[TopK]:
    """A cache in the order of its text, as a teacher [batch, seq, K] for each step."""
    for top in DataLoader(teacher_cache.open(folder), batch_size=batch, collate_fn=teacher_cache.collate):
        yield replace(top, tail=tail)


def heads(model: Any, states: list[Tensor], dtype: torch.dtype) -> Iterator[Head]:
    """What a student says, batch by batch."""
    weight = distill.head_weight(model, dtype)
    for inputs in states:
        yield Head(distill.hidden_states(model, inputs, dtype), weight)


@torch.no_grad()
def evaluate(
    said: Iterable[Head],
    taught: list[Head],
    tops: list[TopTokens],
    ks: Sequence[int],
    tick: Tick = lambda note="": None,
) -> Result:
    """Means over the held-out tokens: KL(teacher || student) and entropy in nats, the share of tokens with the
    teacher's likeliest entry, and for each K the mass that lies outside of the teacher's top K."""
    kl = same = entropy = 0.0
    outside, tokens = torch.zeros(len(ks), dtype=torch.float64), 0
    for head, teacher, top in zip(said, taught, tops):
        stats = fastkd.token_stats(head)
        kl += fastkd.kd_loss(head, teacher, "forward_kl", reduction="sum").item()
        same += (stats.argmax == top.ids[..., 0]).sum().item()
        entropy += stats.entropy.sum().item()
        listed = fastkd.selected_log_probs(head, top.ids).double().exp().cumsum(-1)
        outside += torch.stack([(1 - listed[..., k - 1]).sum() for k in ks])
        tokens += stats.argmax.numel()
        tick()
    masses = {str(k): mass / tokens for k, mass in zip(ks, outside.tolist())}
    return {"kl": kl / tokens, "top1": same / tokens, "entropy": entropy / tokens, "outside": masses}
