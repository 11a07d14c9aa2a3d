"""How many bytes a cache takes, and what its dtype has cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastkd.teacher_cache import encoding
from fastkd.teacher_cache.shards import PER_ENTRY, Shard, column_dtypes


def summary(shards: Sequence[Shard]) -> dict[str, Any]:
    """Plain data, ready for JSON.

    ``bytes_per_token``, ``bytes_per_entry`` (id and log-probability alone) and ``bytes_per_token_beside`` (the columns
    with one value a token) each have three figures: ``values``, the numbers themselves; ``encoded``, as Parquet before
    compression; ``compressed``. ``file_bytes`` are the files whole. Figures are None as long as there is no token.

    ``errors`` are those of :func:`fastkd.teacher_cache.encoding.errors`, with "kl" as the mean over all tokens.
    """
    tokens = sum(shard.tokens for shard in shards)
    stages: dict[str, dict[str, int]] = {"values": {}, "encoded": {}, "compressed": {}}
    errors: encoding.Errors = {}
    for shard in shards:
        for name, dtype in column_dtypes(shard.meta, shard.has_input_ids).items():
            width = shard.meta.k if name in PER_ENTRY else 1
            counts = dtype.itemsize * width * shard.tokens, shard.encoded[name], shard.compressed[name]
            for stage, count in zip(stages.values(), counts):
                stage[name] = stage.get(name, 0) + count
        errors = encoding.merge(errors, shard.errors)
    if "kl" in errors:
        errors["kl"] /= max(tokens, 1)
    entries = tokens * shards[0].meta.k if shards else 0

    def per(count: int, names: Sequence[str]) -> dict[str, float | None]:
        return {
            stage: sum(columns.get(name, 0) for name in names) / count if count else None
            for stage, columns in stages.items()
        }

    names = list(stages["values"])
    return {
        "shards": len(shards),
        "sequences": sum(shard.sequences for shard in shards),
        "tokens": tokens,
        "entries": entries,
        "file_bytes": sum(shard.path.stat().st_size for shard in shards),
        "bytes_per_token": per(tokens, names),
        "bytes_per_entry": per(entries, [name for name in names if name in PER_ENTRY]),
        "bytes_per_token_beside": per(tokens, [name for name in names if name not in PER_ENTRY]),
        "errors": errors,
    }
