"""What was measured of few-step generators, as markdown: the goals, and every loss."""

from __future__ import annotations

import math
from typing import Any

from fastkd.bench import report
from fastkd.machine import line
from fastkd.terminal import size

Result = dict[str, Any]

FASTER = 2  # a step: at least so many times than the math path
SHOWN = 4  # losses named
READS = 2  # a loss: at most so many times as long as reading its inputs once


def reads(loss: Result, what: str) -> float:
    """Milliseconds over those of reading every input once."""
    return float(loss["ms"][what]["median"] / loss["ms"]["read"]["median"])


def goals_table(r: Result) -> str:
    """The goals of few-step generators as a markdown table."""
    step = r["step"]
    own, other_way = (step["ms"][way]["median"] for way in ("fastkd", "math"))
    most = max(loss["moved"]["value"] for loss in r["losses"].values())
    grown = ", ".join(f"{int(n):,}: {taken(b)}" for n, b in step["peak_bytes"]["fastkd"].items())
    other = ", ".join(f"{int(n):,}: {taken(b)}" for n, b in step["peak_bytes"]["math"].items())
    latents = size(4 * math.prod(r["shape"]))
    at = f"{step['tokens']:,} tokens, {step['pictures']} pictures"
    lines = [
        "| few-step generators | measured | goal |",
        "|---|---|---|",
        f"| a training step of the digits' sCM, {at}: against the math path ({report.milliseconds(other_way)}) "
        f"| {report.milliseconds(own)}, {other_way / own:.1f} x faster | at least {FASTER} x |",
        f"| its peak memory by tokens | {grown} (math path: {other}) | linear in S |",
        f"| {len(r['losses'])} losses, compiled, latents of {latents}: over reading the inputs once "
        f"| {ranged(r, 'value')} | at most {READS} x |",
        f"| with what their backward needs | {ranged(r, 'saved')} | |",
        f"| with their gradients | {ranged(r, 'both')} | |",
        f"| what the kernels of a value move, over the inputs | at most {most:.2f} x | two passes |",
    ]
    new, old = (report.milliseconds(r["written"][memory]["median"]) for memory in ("new", "old"))
    note = (
        f"{line(r['machine'])}. Medians of {r['rounds']} rounds, all variants in turn (`make goals`). What is saved "
        f"and gradients lie in new memory, of which the system hands out {latents} in {new}, where old memory is "
        f"written in {old}. Masked losses read twice, once for what is finite. GAN losses are of logits, which are "
        "smaller, and take two transcendental functions of each."
    )
    return "\n".join([*lines, "", note])


def ranged(r: Result, what: str) -> str:
    """The least and the largest of all losses, and which have it."""
    found = sorted((reads(loss, what), name) for name, loss in r["losses"].items())
    (least, first), (most, last) = found[0], found[-1]
    over = [name for ratio, name in found if ratio > READS]
    named = f" ({'; '.join(over)})" if len(over) <= SHOWN else ""
    return f"{least:.2f} x ({first}) to {most:.2f} x ({last}), {len(over)} above {READS} x{named}"


def taken(count: int | None) -> str:
    """Bytes for people, where they were measured."""
    return "not measured" if count is None else size(count)


def losses_table(r: Result) -> str:
    """Every loss as a markdown table."""
    ways = "value", "saved", "both"
    heads = "inputs", "read once", "value", "what the backward needs, too", "and the gradients", "moved"
    lines = [f"| loss | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for name, loss in r["losses"].items():
        spent = [report.milliseconds(loss["ms"]["read"]["median"])]
        spent += [f"{report.milliseconds(loss['ms'][way]['median'])}, {reads(loss, way):.2f} x" for way in ways]
        counted = ", ".join(f"{loss['moved'][way]:.2f}" for way in ways)
        lines.append(f"| {name} | {loss['inputs']} | {' | '.join(spent)} | {counted} |")
    note = (
        f"{line(r['machine'])}. Latents {r['shape']} in float32, compiled, medians of {r['rounds']}: reading every "
        "input once by a compiled sum; the value alone, with what the backward needs, and with the gradients. `moved` "
        "is what Inductor's kernels read and write for these three, by its own count, over the inputs "
        "(`make goals ARGS='--only few-step'`)."
    )
    return "\n".join([*lines, "", note])
