"""One case at a time: peak memory, then the comparison with float64, then the clock. What fails is set down with its
reason, and the rest goes on."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastkd import plan
from fastkd.bench import memory
from fastkd.bench.work import WORKS, Case, Inputs, Loss, Run, variants
from fastkd.machine import available_bytes
from fastkd.terminal import size

Record = dict[str, Any]

# a loss, or a gradient on its 2-norm, that is further off computes something else; naive losses in bfloat16 are 2% off
LIMITS = {2: 0.05, 4: 0.01, 8: 0.01}  # bytes of the dtype -> relative error
REFERENCE_WORK = 2**36  # tokens x vocabulary x hidden of the largest float64 reference: about ten seconds on two cores
REFERENCE_CHUNK = 2**23  # logits of the reference that are alive at a time
SMALLEST_HIDDEN = 64
BUSY = 400_000  # cycles of a CUDA device: about 200 us, longer than a row op takes to launch
BASELINES = ("naive", "naive fp32", "compiled")


def comparable(case: Case) -> Case:
    """The case itself or, where its float64 reference would take too long, a smaller one: first in the hidden size."""
    while True:
        hidden = {name: d for name in ("hidden", "teacher_hidden") if (d := getattr(case, name)) is not None}
        widest = max([SMALLEST_HIDDEN, *hidden.values()])
        if case.tokens * case.vocab * widest <= REFERENCE_WORK:
            return case
        if widest > SMALLEST_HIDDEN:
            case = replace(case, **{name: min(d, widest // 2) for name, d in hidden.items()})
        elif case.vocab >= case.tokens:
            case = replace(case, vocab=case.vocab // 2)
        else:
            case = replace(case, tokens=case.tokens // 2)


def reference(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Loss and gradients of the plain PyTorch loss in float64, a chunk of tokens after the other."""
    work = WORKS[case.work]
    device = case.device if case.device.startswith("cuda") else "cpu"  # not every accelerator has float64

    def wide(x: Tensor) -> Tensor:
        x = x.detach().to(device)
        return x.double() if x.is_floating_point() else x

    shared = {k: wide(x).requires_grad_(x.requires_grad) for k, x in inputs.items() if k not in work.per_token}
    total, grads = torch.zeros((), dtype=torch.float64, device=device), []
    for start in range(0, case.tokens, rows := max(REFERENCE_CHUNK // case.vocab, 1)):
        part = {
            k: wide(inputs[k][start : start + rows]).requires_grad_(inputs[k].requires_grad) for k in work.per_token
        }
        share = min(rows, case.tokens - start) / case.tokens
        loss = work.naive(lambda z: z, **shared, **part) * share
        if loss.requires_grad:
            loss.backward()
        total += loss.detach()
        grads.append({k: x.grad for k, x in part.items() if x.grad is not None})
    found = {k: x.grad for k, x in shared.items() if x.grad is not None}
    return {"loss": total, **found, **{k: torch.cat([g[k] for g in grads]) for k in grads[0]}}


def errors(loss: Loss, inputs: Inputs, truth: dict[str, Tensor]) -> dict[str, float | None]:
    """Relative errors of the loss and of each gradient, by the 2-norm; None for one that is missing or not finite."""
    value = memory.step(loss, inputs)
    found: dict[str, float | None] = {}
    for name, exact in truth.items():
        got = value if name == "loss" else inputs[name].grad
        error = math.inf if got is None else float(torch.linalg.vector_norm(got.to(exact) - exact))
        error /= float(torch.linalg.vector_norm(exact)) or 1.0
        found[name] = error if math.isfinite(error) else None
    return found


def disagreement(found: dict[str, float | None], limit: float) -> str | None:
    """What is further off than the limit, in words."""
    off = [
        f"{name} is missing or not finite" if error is None else f"{name} is {error:.1%} off"
        for name, error in found.items()
        if error is None or error > limit
    ]
    return f"{', '.join(off)}; allowed are {limit:.0%}" if off else None


def synchronize(device: torch.device | str) -> None:
    """Waits for what was started on the device."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def elapsed(run: Run, device: torch.device | str = "cpu", kernels: bool = False) -> float:
    """Milliseconds of one run, which finds the device idle: by events of CUDA's, else by the clock. ``kernels``: CUDA's
    kernels alone, launched while the device is kept busy; otherwise what the host does before the first one counts."""
    synchronize(device)
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        synchronize(device)
        return 1000 * (time.perf_counter() - start)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if kernels:
            torch.cuda._sleep(BUSY)
        begin.record()
        run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end)


def summary(taken: list[float]) -> dict[str, float | int]:
    """Milliseconds of all rounds as median, extremes and interquartile range."""
    quartiles = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [taken[0]] * 3
    spread = {"min": min(taken), "max": max(taken), "iqr": quartiles[2] - quartiles[0]}
    return {"median": statistics.median(taken), **spread, "rounds": len(taken)}


def times(
    runs: dict[str, Run],
    rounds: int,
    device: torch.device | str = "cpu",
    failed: Callable[[str, Exception], None] | None = None,
    kernels: bool = False,
) -> Iterator[dict[str, list[float]]]:
    """Milliseconds of each, after every round. They take turns, so that all see the same machine; the first round warms
    up and is not counted. One that raises is left out from then on, and `failed` is told. ``kernels``: see elapsed."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(-1, rounds):
        for name in list(taken):
            try:
                one = elapsed(runs[name], device, kernels)
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                del taken[name]
                continue
            if counted >= 0:
                taken[name].append(one)
        yield taken


def median_times(
    runs: dict[str, Run], rounds: int, device: torch.device | str = "cpu", kernels: bool = False
) -> dict[str, Any]:
    """The summaries after all rounds."""
    *_, taken = times(runs, rounds, device, kernels=kernels)
    return {name: summary(values) for name, values in taken.items()}


def blank(case: Case, names: list[str]) -> Record:
    """The record of a case of which nothing is known yet."""
    work = WORKS[case.work]
    return {
        **case.as_json(),
        "floor": work.floor,
        "variants": {name: {"status": "not reached"} for name in [*names, work.floor]},
    }


def measure(record: Record, case: Case, rounds: int, with_memory: bool, tick: Callable[..., None]) -> None:
    """Fills the record of a case, piece by piece: whatever interrupts it, what was measured is there."""
    entries: dict[str, Record] = record["variants"]
    work, table = WORKS[case.work], variants(case)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what other cases compiled would count against the limit of recompilations
    names = [name for name in entries if name != work.floor]
    for name in names:
        tick(f"{name}: memory")
        with failures(entries[name]):
            _check_memory(entries[name], case, name, with_memory)

    losses = {}
    small = comparable(case)
    with failures(*entries.values()):
        inputs = work.inputs(small)
        truth = reference(small, inputs)
        record["compared_at"] = {k: getattr(small, k) for k in ("tokens", "vocab", "hidden", "teacher_hidden")}
        for name in _open(entries, names):
            tick(f"{name}: comparison")
            with failures(entries[name]):
                losses[name] = table[name]()
                _check_errors(entries[name], small, losses[name], inputs, truth)
        del truth
        inputs = inputs if small == case else work.inputs(case)
        _time(record, case, inputs, {name: losses[name] for name in _open(entries, names)}, rounds, tick)


def _open(entries: dict[str, Record], names: list[str]) -> list[str]:
    """Those of whom nothing bad is known."""
    return [name for name in names if entries[name]["status"] == "not reached"]


@contextmanager
def failures(*entries: Record) -> Iterator[None]:
    """An exception is why the entries fail, as far as nothing else is known of them."""
    try:
        yield
    except Exception as error:
        for entry in entries:
            if entry["status"] == "not reached":
                fails(entry, error)


def fails(entry: Record, error: Exception) -> None:
    """Sets down the first line of an exception."""
    line = next(iter(str(error).strip().splitlines()), "")
    reason = line if isinstance(error, memory.Died) else f"{type(error).__name__}: {line}"
    for partial_result in ("ms", "faster_than", "to_floor"):
        entry.pop(partial_result, None)
    entry.update(status="fails", reason=reason[:300])


def _check_memory(entry: Record, case: Case, name: str, with_memory: bool) -> None:
    """Does the variant fit, by plan, and what does it take?"""
    entry["planned_bytes"] = planned = WORKS[case.work].planned(case, name)
    available = available_bytes(case.device)
    if planned is not None and available is not None:
        sizes = case.tokens, case.vocab, case.hidden, case.teacher_hidden
        needed = planned + plan.input_bytes(*sizes, case.torch_dtype, top_k=case.top_k)
        if needed > available:
            reason = f"needs {size(needed)} of {size(available)} available"
            entry.update(status="does not fit", reason=reason)
            return
    if with_memory:
        entry["peak_bytes"] = memory.peak(case, name)


def _check_errors(entry: Record, case: Case, loss: Loss, inputs: Inputs, truth: dict[str, Tensor]) -> None:
    entry["errors"] = errors(loss, inputs, truth)
    reason = disagreement(entry["errors"], LIMITS[case.torch_dtype.itemsize])
    if reason is not None:
        entry.update(status="disagrees", reason=reason)


def _time(
    record: Record, case: Case, inputs: Inputs, losses: dict[str, Loss], rounds: int, tick: Callable[..., None]
) -> None:
    """Rounds of all that agree, and of the floor."""
    work, entries = WORKS[case.work], record["variants"]
    runs: dict[str, Run] = {name: partial(memory.step, loss, inputs) for name, loss in losses.items()}
    with failures(entries[work.floor]):
        runs[work.floor] = work.make_floor(inputs)
    for taken in times(runs, rounds, case.device, lambda name, error: fails(entries[name], error)):
        tick("rounds")
        for name, values in taken.items():
            if values:
                entries[name].update(status="measured", ms=summary(values))
        ratios(entries, work.floor)


def ratios(entries: dict[str, Record], floor: str) -> None:
    """How many times faster than each baseline a variant is, and how many times the floor's time it takes."""
    medians = {name: entry["ms"]["median"] for name, entry in entries.items() if entry["status"] == "measured"}
    for name, median in medians.items():
        others = {base: medians[base] / median for base in BASELINES if base in medians and base != name}
        entries[name].update(faster_than=others, to_floor=median / medians[floor] if floor in medians else None)
