"""The demo in pictures: a transformer learns to draw scikit-learn's digits, then to draw them in one step or two.

    teacher    flow matching on TrigFlow; it follows its flow in many steps
    sCM        scm_loss: F and its tangent along the teacher's flow
    MeanFlow   meanflow_loss: the mean velocity of the teacher's flow, and its tangent
    DMD        dmd_loss: what the teacher and a network that follows the student say of the student's pictures

Tangents come from network_jvp, in which the attention of the network is fastkd.attention.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastkd import diffusion
from fastkd.demo_digits import (
    CLASSES,
    FLOW,
    PATCH,
    SCALE,
    SIDE,
    TRIG,
    Digits,
    MeanVelocity,
    Transformer,
    distance,
    judge_of,
    load,
)
from fastkd.diffusion import network_jvp
from fastkd.machine import PeakMemory, describe, package_version
from fastkd.terminal import Stage, Tick

Result = dict[str, Any]
END, MIDDLE = math.pi / 2, 1.1  # where the first and the second step of two begin
TAUGHT_FOR = 3  # times the steps of a student
HELD_OUT = 297  # pictures that the classifier is tested on
DRAWN = 1000  # samples behind each distance
SHOWN = 20  # of them, two of each digit
COUNTED = 5  # measured steps
SIDES = (8, 32, 64)  # of the pictures for which a step is measured: 16, 256 and 1,024 tokens
MEASURED = {8: 128, 32: 8, 64: 2}  # pictures in such a step


# --- training --------------------------------------------------------------------------------------------------------


Loss = Callable[[int], Tensor]  # of a step


def fit(network: nn.Module, loss: Loss, steps: int, lr: float, tick: Tick) -> nn.Module:
    """Steps down a loss; the average of the weights of late steps."""
    average, optimizer = copy.deepcopy(network), torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * pace(step, steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(now, 0.03)
        tick(f"{value.item():.3f}")
    return average.requires_grad_(False)


def pace(step: int, steps: int) -> float:
    """Of the learning rate: up from 0 in a twentieth of the steps, and down to 0 by a cosine."""
    return min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2


def angles(data: Digits, mean: float, spread: float) -> Tensor:
    """TrigFlow times [batch] with log(tan(t) SCALE) ~ N(mean, spread^2)."""
    return torch.atan((mean + spread * data.normal(data.batch)).exp() / SCALE)


def flow_matching(network: Transformer, data: Digits) -> Loss:
    """The teacher's."""

    def loss(step: int) -> Tensor:
        x, labels = data.draw()
        t, noise = angles(data, -0.4, 1.2), data.normal(*x.shape)
        predicted = SCALE * network(TRIG.add_noise(x, noise, t) / SCALE, t, labels)
        return diffusion.denoising_loss(predicted, TRIG.velocity(x, noise, t))

    return loss


def scm(network: Transformer, teacher: Transformer, data: Digits, warmup: int) -> Loss:
    """Continuous-time consistency."""

    def loss(step: int) -> Tensor:
        x, labels = data.draw()
        t = angles(data, -0.2, 1.4)
        x_t = TRIG.add_noise(x, data.normal(*x.shape), t)
        with torch.no_grad():
            velocity = SCALE * teacher(x_t / SCALE, t, labels)
        return scm_loss(network, x_t, velocity, t, labels, diffusion.tangent_warmup(step, warmup))

    return loss


def scm_loss(
    network: nn.Module,
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    labels: Tensor,
    warmup: float = 1.0,
    jvp: Callable[..., tuple[Tensor, Tensor]] = network_jvp,
) -> Tensor:
    """Of a network and its tangent along a velocity."""
    tangents = diffusion.scm_tangents(velocity, t, SCALE)
    found = jvp(network, (x_t / SCALE, t), tangents, "detach", labels=labels)
    return diffusion.scm_loss(*found, x_t, velocity, t, sigma_data=SCALE, warmup=warmup)


def meanflow(network: MeanVelocity, teacher: MeanVelocity, data: Digits, warmup: int) -> Loss:
    """The mean velocity between two times."""

    def loss(step: int) -> Tensor:
        x, labels = data.draw()
        t, r = data.normal(2, data.batch).sigmoid().sort(0, descending=True).values
        r = r.where(~data.chosen(0.25), t).where(~data.chosen(0.2), 0.0)  # some of no length, some to the end
        t = t.where(~data.chosen(0.1), 1.0)
        x_t = FLOW.add_noise(x, data.normal(*x.shape), t)
        with torch.no_grad():
            velocity = teacher(x_t, t, t, labels)
        tangents = velocity, torch.ones_like(t), None
        predicted, tangent = network_jvp(network, (x_t, t, r), tangents, "detach", labels=labels)
        weight = diffusion.tangent_warmup(step, warmup)
        return diffusion.meanflow_loss(predicted, tangent, velocity, t, r, warmup=weight, p=0.5, eps=0.1)

    return loss


def dmd(network: Transformer, teacher: Transformer, data: Digits, lr: float) -> Loss:
    """Distribution matching in one step, and in a second on what the first has made."""
    fake = copy.deepcopy(teacher).requires_grad_(True)
    optimizer = torch.optim.AdamW(fake.parameters(), lr, betas=(0.0, 0.99))

    def generate(labels: Tensor) -> Tensor:
        noise, half = SCALE * data.normal(data.batch, SIDE, SIDE), data.batch // 2
        end = torch.full((data.batch,), END)
        with torch.no_grad():
            first = clean(network, noise[:half], end[:half], labels[:half])
        middle = TRIG.add_noise(first, data.normal(*first.shape), torch.tensor(MIDDLE))
        t = torch.cat((torch.full((half,), MIDDLE), end[half:]))
        return clean(network, torch.cat((middle, noise[half:])), t, labels)

    def loss(step: int) -> Tensor:
        labels = data.draw()[1]
        x = generate(labels)
        made, t, noise = x.detach(), angles(data, 0.3, 1.4), data.normal(*x.shape)
        predicted = SCALE * fake(TRIG.add_noise(made, noise, t) / SCALE, t, labels)
        follow = diffusion.denoising_loss(predicted, TRIG.velocity(made, noise, t))
        optimizer.zero_grad()
        follow.backward()
        optimizer.step()
        t = angles(data, 0.3, 1.4)
        with torch.no_grad():
            x_t = TRIG.add_noise(made, data.normal(*x.shape), t)
            real, says = (clean(judge, x_t, t, labels) for judge in (teacher, fake))
        return diffusion.dmd_loss(x, real, says)

    return loss


# --- samples and what they are worth ---------------------------------------------------------------------------------


def clean(network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """x_0."""
    return TRIG.convert(network(x_t / SCALE, t, labels), x_t, t, "F", "x")


Sampler = Callable[[Tensor, Tensor], Tensor]  # of noise [n, 8, 8] and labels


def along_the_flow(network: nn.Module, steps: int) -> Sampler:
    """DDIM, which on TrigFlow is a turn."""

    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        x, times = SCALE * noise, torch.linspace(END, 0, steps + 1)
        for t, s in pairwise(times):
            predicted = network(x / SCALE, t.expand(len(x)), labels)
            x = diffusion.ddim_step(predicted, x, t, s, TRIG, "F")
        return x

    return sample


def by_consistency(network: nn.Module, steps: int) -> Sampler:
    """x_0 of noise, and again of what that becomes with fresh noise to MIDDLE."""

    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        x = clean(network, SCALE * noise, torch.full((len(noise),), END), labels)
        if steps == 2:
            fresh, t = noise.flip(0), torch.full((len(noise),), MIDDLE)
            x = clean(network, TRIG.add_noise(x, fresh, t), t, labels)
        return x

    return sample


def by_mean_velocity(network: nn.Module, steps: int) -> Sampler:
    """Steps as long as the mean says."""

    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        x, times = noise, torch.linspace(1, 0, steps + 1)
        for t, r in pairwise(times):
            x = x - (t - r) * network(x, t.expand(len(x)), r.expand(len(x)), labels)
        return x

    return sample


# --- a step of sCM, and what it costs --------------------------------------------------------------------------------


def by_math(network: nn.Module, primals: Any, tangents: Any, how: str, **given: Any) -> tuple[Tensor, Tensor]:
    """network_jvp on the attention of torch that has a forward-mode rule."""
    with sdpa_kernel(SDPBackend.MATH):
        out, tangent, *_ = torch.func.jvp(lambda *x: network(*x, **given), primals, tangents)
    return out, tangent


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"fastkd": network_jvp, "math": by_math}


def step_of(way: str, side: int, count: int) -> Callable[[], Tensor]:
    """A training step of sCM on ``count`` digits enlarged to side x side, without its optimizer; the gradient of the
    network's first layer."""
    torch.manual_seed(0)
    network = Transformer(side)
    for p in network.parameters():
        nn.init.normal_(p, std=0.02)  # what begins as zeros would spare the tangent its way
    x, labels = (found[:count] for found in load())
    x, t = F.interpolate(x[:, None], (side, side)).flatten(0, 1), torch.linspace(0.2, 1.4, count)
    noise = torch.randn(x.shape)
    x_t, velocity = TRIG.add_noise(x, noise, t), TRIG.velocity(x, noise, t)

    def step() -> Tensor:
        network.zero_grad()
        scm_loss(network, x_t, velocity, t, labels, jvp=WAYS[way]).backward()
        found = network.into.weight.grad
        assert found is not None
        return found

    return step


def tokens_of(side: int) -> int:
    """Of a picture."""
    return (side // PATCH) ** 2


def costs(rounds: int, tick: Tick) -> list[Result]:
    """Milliseconds and peak bytes of a step by both ways, which take turns."""
    rows = []
    for side in SIDES:
        steps = {way: step_of(way, side, MEASURED[side]) for way in WAYS}
        peaks: dict[str, int | None] = {}
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        for way, step in steps.items():
            step()
            with PeakMemory() as memory:
                step()
            peaks[way] = memory.bytes
        for _ in range(rounds):
            for way, step in steps.items():
                start = time.perf_counter()
                step()
                spent[way].append(1000 * (time.perf_counter() - start))
        shape = {"tokens": tokens_of(side), "pictures": MEASURED[side]}
        rows.append(shape | {way: {"ms": median(spent[way]), "peak_bytes": peaks[way]} for way in WAYS})
        tick()
    return rows


# --- all of it -------------------------------------------------------------------------------------------------------


def draw(args: argparse.Namespace, stage: Stage) -> tuple[Result, list[Tensor]]:
    """The numbers, ready for JSON, and for each of their rows samples [SHOWN, 8, 8]."""
    torch.manual_seed(args.seed)
    pictures, labels = load()
    data = Digits(pictures, labels, args.batch, args.seed)
    judge = judge_of(pictures[:-HELD_OUT], labels[:-HELD_OUT], 2 * args.steps, args.seed)
    right = (judge(pictures[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]).double().mean().item()
    warmup, seconds = max(args.steps // 4, 1), {}

    def trained(name: str, network: nn.Module, loss: Loss, lr: float, times: int = 1) -> Any:
        start, steps = time.perf_counter(), times * args.steps
        average = fit(network, loss, steps, lr, stage(name, steps))
        seconds[name] = time.perf_counter() - start
        return average

    def student() -> Transformer:
        return copy.deepcopy(teacher).requires_grad_(True)

    first = Transformer()
    teacher = trained("teacher", first, flow_matching(first, data), 2e-3, TAUGHT_FOR)
    a, b, c = student(), MeanVelocity(student()), student()
    a = trained("sCM", a, scm(a, teacher, data, warmup), 1.5e-4)
    b = trained("MeanFlow", b, meanflow(b, MeanVelocity(teacher), data, warmup), 2e-4)
    c = trained("DMD", c, dmd(c, teacher, data, 2e-4), 8e-5)

    rows, shown = [], []
    given = torch.arange(CLASSES).repeat(DRAWN // CLASSES)
    noise = torch.randn(DRAWN, SIDE, SIDE, generator=torch.Generator().manual_seed(args.seed))
    ways = {"teacher": (along_the_flow, teacher), "sCM": (by_consistency, a), "MeanFlow": (by_mean_velocity, b)}
    for name, (way, network) in (ways | {"DMD": (by_consistency, c)}).items():
        for steps in (32, 2, 1) if name == "teacher" else (2, 1):
            with torch.no_grad():
                x = way(network, steps)(noise, given)
            found = {"accuracy": (judge(x).argmax(1) == given).double().mean().item()}
            found["distance"] = distance(judge.features(x), judge.features(pictures))
            rows.append({"name": name, "steps": steps} | found)
            shown.append(x[:SHOWN])
    return {
        "settings": {"steps": args.steps, "batch": args.batch, "seed": args.seed},
        "environment": describe() | {"scikit-learn": package_version("scikit-learn")},
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "judge_accuracy": right,
        "samples": DRAWN,
        "seconds_of": seconds,
        "rows": rows,
        "costs": costs(COUNTED, stage("what a step costs", len(SIDES))),
    }, shown
