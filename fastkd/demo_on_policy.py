"""The demo on the student's own samples: reverse KL, exact and as its estimates k1, k2, k3.

Every step the student continues the beginnings of some texts, a token at a time, sampled from itself. The teacher reads
what came out, and the student takes a step on KL(student || teacher) of each sampled token's whole distribution. Beside
it stand the estimates that the log-probabilities of the sampled tokens alone give.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import Head, estimators
from fastkd import demo_distill as distill
from fastkd.demo_distill import Lesson, Task
from fastkd.demo_report import Result, right_aligned
from fastkd.machine import line
from fastkd.terminal import Stage, Tick, write_json

ESTIMATORS = {"k1": estimators.k1, "k2": estimators.k2, "k3": estimators.k3}
ROWS = {
    "own_samples": "reverse KL on own samples from held-out beginnings",
    "text": "reverse KL on held-out text",
    "forward": "forward KL on held-out text",
}


@dataclass(frozen=True)
class Sampled:
    """Tokens that the student sampled, and what the teacher expected in their place."""

    ids: Tensor  # [batch, new]
    teacher: Head  # hidden [batch, new, D]


def distil(task: Task, seed: int, stage: Stage) -> Result:
    """The part of the demo's result that is this one's own."""
    steps, prompt = len(task.batches), max(1, task.batches.shape[-1] // 4)
    student = distill.prune(task.teacher, task.keep)
    before = evaluate(student, task, prompt, seed, stage("held-out before", len(task.held_out)))
    values: list[dict[str, Tensor]] = []

    def loss(head: Head, sampled: Sampled) -> Tensor:
        said = Head(head.hidden[:, prompt - 1 : -1], head.weight)  # what was expected before each sampled token
        exact = fastkd.kd_loss(said, sampled.teacher, "reverse_kl", reduction="none")
        values.append({"exact": exact.detach().flatten()} | estimates(said, sampled))
        return exact.mean()

    generator = torch.Generator().manual_seed(seed)
    lessons = on_policy(student, task, task.batches[..., :prompt], generator)
    run = distill.train(student, lessons, loss, task, stage("distil its own samples", steps))
    after = evaluate(student, task, prompt, seed, stage("held-out after", len(task.held_out)))
    return {
        "prompt": prompt,
        "sampled_per_step": task.batches[0, :, prompt:].numel(),
        "before": before,
        "after": after,
        "loss": run.loss,
        "steps": {name: [step[name].mean().item() for step in values] for name in values[0]},
        "estimates": {name: statistics(values, name) for name in values[0]},
    }


def on_policy(student: Any, task: Task, prompts: Iterable[Tensor], generator: torch.Generator) -> Iterator[Lesson]:
    """For each batch of beginnings [batch, prompt], a lesson from the student as it is then."""
    weight = distill.head_weight(task.teacher, task.dtype)
    for prompt in prompts:
        ids = sample(student, prompt, task.batches.shape[-1] - prompt.shape[-1], task.dtype, generator)
        start = prompt.shape[-1]
        with torch.no_grad():
            hidden = distill.hidden_states(task.teacher, ids, task.dtype)
        yield ids, Sampled(ids[:, start:], Head(hidden[:, start - 1 : -1], weight))


@torch.no_grad()
def sample(student: Any, prompt: Tensor, new: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The prompt [batch, prompt] and `new` tokens after it, each from the student's whole distribution."""
    ids, fresh, past = prompt, prompt, None
    with distill.computed_in(dtype):
        for _ in range(new):
            out = student(input_ids=fresh, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            fresh = torch.multinomial(out.logits[:, -1].float().softmax(-1), 1, generator=generator)
            ids = torch.cat((ids, fresh), -1)
    return ids


@torch.no_grad()
def estimates(said: Head, sampled: Sampled) -> dict[str, Tensor]:
    """k1, k2, k3 of each sampled token, [tokens]."""
    log_q, log_p = (
        fastkd.selected_log_probs(Head(head.hidden.detach(), head.weight.detach()), sampled.ids[..., None]).flatten()
        for head in (said, sampled.teacher)
    )
    return {name: k(log_q, log_p) for name, k in ESTIMATORS.items()}


def statistics(values: list[dict[str, Tensor]], name: str) -> dict[str, float]:
    """Over all sampled tokens: the mean, its standard error, and how far a token's value is from the exact one (the
    root of the mean square): what sampling one token adds."""
    value, exact = (torch.cat([step[key].double() for step in values]) for key in (name, "exact"))
    return {
        "mean": value.mean().item(),
        "standard_error": (value.std() / len(value) ** 0.5).item(),
        "noise": (value - exact).square().mean().sqrt().item(),
    }


@torch.no_grad()
def evaluate(student: Any, task: Task, prompt: int, seed: int, tick: Tick) -> dict[str, float]:
    """Nats a token on held-out text, and on what the student makes of its beginnings, sampled from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    weight, teacher_weight = (distill.head_weight(model, task.dtype) for model in (student, task.teacher))
    values: dict[str, list[float]] = {name: [] for name in ROWS}
    for ids, (own, sampled) in zip(task.held_out, on_policy(student, task, task.held_out[..., :prompt], generator)):
        said = Head(distill.hidden_states(student, own, task.dtype)[:, prompt - 1 : -1], weight)
        values["own_samples"].append(fastkd.kd_loss(said, sampled.teacher, "reverse_kl").item())
        said = Head(distill.hidden_states(student, ids, task.dtype), weight)
        teacher = Head(distill.hidden_states(task.teacher, ids, task.dtype), teacher_weight)
        values["text"].append(fastkd.kd_loss(said, teacher, "reverse_kl").item())
        values["forward"].append(fastkd.kd_loss(said, teacher, "forward_kl").item())
        tick()
    return {name: fmean(found) for name, found in values.items()}


# --- the report ---


def write(result: Result, folder: Path) -> None:
    """demo-on-policy.json into the folder, two tables to the terminal."""
    from rich.console import Console
    from rich.table import Table

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "demo-on-policy.json", result)
    console = Console()
    for header, *rows in (quality(result), noise(result)):
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(right_aligned(table))
    print(line(result["environment"]))
    print(f"\n{folder / 'demo-on-policy.json'} written; {result['seconds']:.0f} s in all")


def markdown(result: Result) -> str:
    """Both tables and their conditions for a document."""
    tables = []
    for header, *rows in (quality(result), noise(result)):
        lines = [header, ["---"] * len(header), *rows]
        tables.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    layers = result["layers"]
    note = (
        f"{len(layers['kept'])} of SmolLM2-135M's {layers['teacher']} layers, {result['settings']['steps']} steps of "
        f"{result['sampled_per_step']:,} sampled tokens, {result['dtype']}. {line(result['environment'])}; "
        f"{result['seconds']:.0f} s."
    )
    return "\n\n".join([*tables, note])


def quality(result: Result) -> list[list[str]]:
    """Before and after; the first row is the header."""
    rows = [[what, f"{result['before'][name]:.3f}", f"{result['after'][name]:.3f}"] for name, what in ROWS.items()]
    return [["on-policy, nats a token", "before", "after"], *rows]


def noise(result: Result) -> list[list[str]]:
    """The exact divergence of the sampled tokens and its estimates; the first row is the header."""
    found = result["estimates"]
    tokens = result["sampled_per_step"] * len(result["loss"])
    rows = [
        [name, f"{e['mean']:.3f} ± {e['standard_error']:.3f}", "0" if name == "exact" else f"{e['noise']:.2f}"]
        for name, e in found.items()
    ]
    return [[f"reverse KL of {tokens:,} sampled tokens", "mean", "rms error of a token"], *rows]
