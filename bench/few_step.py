"""Few-step generators as they are measured on the CPU: bench/goals.py --only few-step

    losses   each compiled, on latents of 64 MiB each: its value, with what the backward needs, and with the backward,
             against a compiled sum of every input, which reads them once. Beside the times stand the bytes that
             Inductor's kernels move, by its own count, over those of the inputs
    step     a training step of the demo's sCM without its optimizer, with fastkd's attention and with torch's math
             path, which take turns; its memory in a process of its own

python bench/few_step.py TASK measures the memory of one step.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile_fx, metrics
from torch._inductor import config as inductor

from fastkd import demo_images, diffusion, machine
from fastkd.bench import measure as clock
from fastkd.bench import memory
from fastkd.bench.work import Run
from fastkd.diffusion import RectifiedFlow
from fastkd.machine import PeakMemory
from fastkd.terminal import write_json

SHAPE = (16, 16, 256, 256)  # 64 MiB in float32
SIDES = {"fastkd": (32, 64, 128), "math": (32, 64)}  # of pictures; the math path's bytes grow with the square
TIMED = 64
PICTURES = 2
T, S = torch.linspace(0.3, 0.9, SHAPE[0]), torch.linspace(0.1, 0.3, SHAPE[0])

Record = dict[str, Any]
Loss = Callable[..., Tensor]
# name -> a loss, the number of its latents, of which the first learns or, where this is below 0, all do
LOSSES: dict[str, tuple[Loss, int]] = {
    "scm_loss": (lambda *x: diffusion.scm_loss(*x, T), 4),
    "scm_loss, masked": (lambda *x: diffusion.scm_loss(*x, T, on_nan="mask")[0], 4),
    "rcm_loss": (lambda *x: diffusion.rcm_loss(*x, T, warmup=0.5), 4),
    "meanflow_loss": (lambda *x: diffusion.meanflow_loss(*x, T, S), 3),
    "alphaflow_loss": (lambda *x: diffusion.alphaflow_loss(*x, T, S, alpha=0.5), 3),
    "facm_loss": (lambda *x: diffusion.facm_loss(*x, T), 4),
    "tvm_loss": (lambda *x: diffusion.tvm_loss(*x, T, S), 5),
    "consistency_loss": (diffusion.consistency_loss, 2),
    "consistency_loss, huber": (partial(diffusion.consistency_loss, distance="huber"), 2),
    "consistency_loss, elementwise": (partial(diffusion.consistency_loss, distance="elementwise huber"), 2),
    "boot_loss": (lambda *x: diffusion.boot_loss(*x, T, S, RectifiedFlow()), 3),
    "velocity_matching_loss": (lambda *x: diffusion.velocity_matching_loss(*x, T), 3),
    "velocity_distillation_loss": (lambda *x: diffusion.velocity_distillation_loss(*x, T), 4),
    "gradient_loss": (diffusion.gradient_loss, 2),
    "dmd_loss": (diffusion.dmd_loss, 3),
    "vsd_loss": (diffusion.vsd_loss, 3),
    "tdm_loss": (diffusion.tdm_loss, 3),
    "tdm_loss, over samples": (partial(diffusion.tdm_loss, over="sample"), 3),
    "sid_loss": (diffusion.sid_loss, -3),
    "sim_loss": (partial(diffusion.sim_loss, c=1.0), -3),
    "denoising_loss": (diffusion.denoising_loss, 2),
    "generator_gan_loss": (diffusion.generator_gan_loss, 1),
    "discriminator_gan_loss": (diffusion.discriminator_gan_loss, -2),
}


def latents(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers that learn as in LOSSES."""
    draw = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=draw) for _ in range(abs(count))]
    return [x.requires_grad_(count < 0 or i == 0) for i, x in enumerate(found)]


def measure(file: Path, rounds: int, say: Callable[[str], None]) -> Record:
    """Losses, then the step, written as they come."""
    result: Record = {"machine": machine.describe(), "shape": SHAPE, "rounds": rounds, "losses": {}}
    result["written"] = written(rounds)
    for name, (loss, count) in LOSSES.items():
        say(f"few-step: {name}")
        result["losses"][name] = {"inputs": abs(count)} | measured(loss, count, rounds)
        write_json(file, result)
    say("few-step: a step of sCM")
    runs: dict[str, Run] = {way: demo_images.step_of(way, TIMED, PICTURES) for way in demo_images.WAYS}
    result["step"] = {"tokens": demo_images.tokens_of(TIMED), "pictures": PICTURES}
    result["step"]["ms"] = clock.median_times(runs, rounds)
    result["step"]["peak_bytes"] = {
        way: {str(demo_images.tokens_of(side)): peak(way, side) for side in sides} for way, sides in SIDES.items()
    }
    write_json(file, result)
    return result


# --- losses ----------------------------------------------------------------------------------------------------------


def measured(loss: Loss, count: int, rounds: int) -> Record:
    """Milliseconds of reading every input once, of the value alone, of the value with what its backward needs, and with
    the backward; and of the last three the bytes that their kernels read and write, over those of the inputs."""
    torch._dynamo.reset()
    x = latents(count, SHAPE)
    still, learning = [y.detach() for y in x], [y for y in x if y.requires_grad]
    compiled, read = torch.compile(loss, fullgraph=True), torch.compile(lambda *x: [y.sum() for y in x])
    runs: dict[str, Run] = {
        "value": lambda: compiled(*still),
        "saved": lambda: compiled(*x),
        "both": lambda: torch.autograd.grad(compiled(*x), learning),
    }
    size, moved = sum(y.nbytes for y in x), {}
    with counted():
        for name, run in runs.items():  # each compiles what the one before has not
            before = 0 if name == "both" else metrics.num_bytes_accessed
            run()
            moved[name] = (metrics.num_bytes_accessed - before) / size
        moved["both"] -= moved["value"]
    return {"moved": moved, "ms": clock.median_times({"read": lambda: read(*still)} | runs, rounds)}


def written(rounds: int) -> Record:
    """Milliseconds of a constant into new memory, as of what a loss saves and of gradients, and into old."""
    x = torch.empty(SHAPE)
    return clock.median_times({"new": lambda: torch.full_like(x, 1.0), "old": lambda: x.fill_(1.0)}, rounds)


@contextmanager
def counted() -> Iterator[None]:
    """Inductor counts bytes where it would say so, and compiles anew."""
    log, quiet = compile_fx.inductor_metrics_log, (lambda record: False)
    level = log.level
    log.setLevel(logging.INFO)
    log.addFilter(quiet)
    metrics.reset()
    try:
        with inductor.patch(force_disable_caches=True):
            yield
    finally:
        log.removeFilter(quiet)
        log.setLevel(level)


# --- a step ----------------------------------------------------------------------------------------------------------


def peak(way: str, side: int) -> int | None:
    """Bytes at the peak of a step beside the network and its inputs, in a process of its own."""
    task = {"way": way, "side": side, "threads": torch.get_num_threads()}
    found: Record = memory.apart([sys.executable, __file__, json.dumps(task)])
    return found["peak_bytes"]


def child(task: Record) -> None:
    """Measures a task of `peak`: a small step to load what there is, then one under the meter."""
    memory.dies_first()
    torch.set_num_threads(task["threads"])
    demo_images.step_of(task["way"], demo_images.SIDES[0], PICTURES)()
    step = demo_images.step_of(task["way"], task["side"], PICTURES)
    with PeakMemory() as meter:
        step()
    print(json.dumps({"peak_bytes": meter.bytes}))


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
