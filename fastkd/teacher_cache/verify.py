"""Reading a whole cache to find out whether it can be trusted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastkd.teacher_cache import encoding, rows, shards
from fastkd.teacher_cache.meta import CacheError


def verify(folder: str | os.PathLike[str], done: Callable[[], object] = lambda: None) -> list[str]:
    """Reads every shard of a cache and checks checksums, counts, ids, logarithms and the sum of every token.

    Returns:
        What is wrong, a line for each file, which it names; [] if all is well.

    Args:
        folder: of the cache.
        done: called after each file.
    """
    path = Path(folder)
    problems = []
    for file in sorted(path.glob("[!.]*.parquet")):
        try:
            if shards.NAME.fullmatch(file.name):
                _check(shards.footer(file))
        except CacheError as error:
            problems.append(str(error))
        done()
    try:
        if not shards.scan(path):
            problems.append(f"{path}: no teacher cache: no {shards.path_of(path, 0).name} in it")
    except CacheError as error:
        if str(error) not in problems:
            problems.append(str(error))
    return problems


def _check(shard: shards.Shard) -> None:
    """Raises what is wrong with the content of a shard."""
    starts, columns = shards.read(shard)

    def must(good: np.ndarray, expected: str) -> None:
        if not good.all():
            token = int(np.argwhere(~good)[0][0])
            sequence = int(np.searchsorted(starts, token, side="right")) - 1
            at = f"token {token - starts[sequence]} of sequence {shard.first + sequence}"
            raise CacheError(f"{shard.path}: {at}: expected {expected}")

    ids, padded = columns["ids"], encoding.padding(columns)
    must(ids < shard.meta.vocab, f"ids below the vocabulary of {shard.meta.vocab}")
    if "input_ids" in columns:
        must(columns["input_ids"] >= 0, "input_ids of at least 0")
    if "weights" in columns:
        weights = columns["weights"]
        must((weights >= 0) & (weights < np.inf), "weights that are finite and not negative")
        return
    must(~rows.repeats(ids, padded), "an id once in a token")
    log_probs, log_tail = encoding.decode(columns), columns["log_tail"]
    rounding = shard.errors.get("mass", 0.0) + rows.KEPT
    must(log_probs <= rounding, "log_probs of at most 0")
    must(log_tail <= 0, "a log_tail of at most 0")
    whole = encoding.wholes(log_probs, log_tail)
    must(np.abs(whole - 1) <= rounding, "probabilities and tail that sum to 1")
