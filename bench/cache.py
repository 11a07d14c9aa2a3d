"""The teacher cache on one core: tokens a minute that it writes and reads, and bytes of a token.

python bench/cache.py     a few minutes, most of them the teacher's; writes bench/results/cache.json

The entries are the top 64 of SmolLM2-135M for 32,768 tokens of Python's documentation, the demo's model and text: what
ids and log-probabilities look like decides how far they compress. They are written and read eight times over, in shards
of the default size, whose files the system has in memory when they are read. A number is the median of some rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import docs
import numpy as np
import pyarrow
import torch

from fastkd import demo_assets, machine, teacher_cache
from fastkd.terminal import positive, write_json

K, SEQ, TOKENS, COPIES = 64, 512, 32768, 8
GOAL = 1e6  # tokens a minute
RESULT = docs.RESULTS / "cache.json"

Sequence = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids [T, K], log_probs [T, K], log_tail [T]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="counted rounds (default: %(default)s)")
    parser.add_argument("--tokens", type=positive, default=TOKENS, help="of text (default: %(default)s)")
    args = parser.parse_args()
    vocab, sequences = teach(args.tokens)
    one_core()
    result: dict[str, Any] = {
        "machine": machine.describe() | {"pyarrow": pyarrow.__version__},
        "settings": {
            "k": K,
            "vocab": vocab,
            "seq": SEQ,
            "tokens": args.tokens,
            "copies": COPIES,
            "rounds": args.rounds,
        },
        "dtypes": {dtype: measure(dtype, vocab, sequences, args.rounds) for dtype in teacher_cache.meta.DTYPES},
    }
    write_json(RESULT, result)
    show(result)


@torch.no_grad()
def teach(tokens: int) -> tuple[int, list[Sequence]]:
    """The teacher's vocabulary, and its top K over the text."""
    model, tokenizer = demo_assets.load_teacher(demo_assets.find_model())
    texts, _ = demo_assets.split_topics(demo_assets.python_documentation())
    found = []
    for row in demo_assets.windows(tokenizer, texts, SEQ)[: tokens // SEQ]:
        log_p = model(row[None]).logits[0].log_softmax(-1)
        log_probs, ids = log_p.topk(K)
        log_tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        found.append((ids.int().numpy(), log_probs.numpy(), log_tail.numpy()))
    return log_p.shape[-1], found


def one_core() -> None:
    """Everything from here on."""
    torch.set_num_threads(1)
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(dtype: str, vocab: int, sequences: list[Sequence], rounds: int) -> dict[str, Any]:
    """Rates in tokens a minute, and what the cache says of its bytes and errors."""
    tokens = COPIES * sum(len(ids) for ids, _, _ in sequences)
    seconds: dict[str, list[float]] = {name: [] for name in ("write", "read", "shuffled", "random")}
    folder = Path(tempfile.mkdtemp(prefix="fastkd-cache-"))
    try:
        for attempt in range(rounds + 1):  # the first does not count
            shutil.rmtree(folder)
            start = time.perf_counter()
            with teacher_cache.Writer(folder, teacher_cache.Meta(vocab, K, log_probs=dtype)) as writer:
                for _ in range(COPIES):
                    for ids, log_probs, log_tail in sequences:
                        writer.write(ids, log_probs, log_tail)
            seconds["write"].append(time.perf_counter() - start)
            cache = teacher_cache.open(folder)
            count = len(cache)
            orders: dict[str, Any] = {"read": range(count), "shuffled": cache.shuffled(attempt, shards=4)}
            orders["random"] = np.random.default_rng(attempt).permutation(count)
            for name, order in orders.items():
                cache = teacher_cache.open(folder, shards_in_memory=1 if name == "random" else 4)
                start = time.perf_counter()
                for i in order:
                    cache[i]
                seconds[name].append(time.perf_counter() - start)
        report = cache.summary()
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "tokens_per_minute": {name: 60 * tokens / median for name, median in medians.items()},
        "random_access_ms": 1000 * medians["random"] / count,
        **report,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{machine.line(result['machine'])}, pyarrow {result['machine']['pyarrow']}; {result['settings']}")
    for dtype, r in result["dtypes"].items():
        rates = r["tokens_per_minute"]
        print(f"{dtype}: million tokens a minute, goal {GOAL / 1e6:g}: ", end="")
        print(", ".join(f"{name} {rate / 1e6:.1f}" for name, rate in rates.items()), end="")
        print(f"; one sequence of {SEQ} at random, its shard not in memory, {r['random_access_ms']:.1f} ms")
        for name in ("bytes_per_entry", "bytes_per_token_beside", "bytes_per_token"):
            print(f"  {name}: " + ", ".join(f"{stage} {count:.3f}" for stage, count in r[name].items()))
        print("  errors: " + ", ".join(f"{name} {error:.3g}" for name, error in r["errors"].items()))


if __name__ == "__main__":
    main()
