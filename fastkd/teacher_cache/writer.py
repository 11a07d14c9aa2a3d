"""Writing a cache: sequence after sequence, a shard at a time."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fastkd.teacher_cache import encoding, rows, shards
from fastkd.teacher_cache.meta import CacheError, Meta
from fastkd.teacher_cache.rows import Array
from fastkd.teacher_cache.summary import summary

CODECS = ("zstd", "lz4", "snappy", "gzip", "none")
MOST_VALUES = 2**31 - 1  # in a shard: the offsets of its lists are int32


class Writer:
    """Appends sequences to a cache, in a context manager::

        with Writer(folder, meta, resume=True) as writer:
            for text in dataset[writer.sequences :]:
                ids, log_probs, log_tail = top_k(teacher, text)
                writer.write(ids, log_probs, log_tail)
        print(writer.report()["bytes_per_token"])

    A shard is written to another name, brought to disk and renamed: a writer that is killed loses the open shard and
    nothing else. While a writer lives, a second one on its folder is an error.

    Args:
        folder: made if need be. Shards in it are an error, unless ``resume``.
        meta: what all sequences have in common.
        tokens_per_shard: a shard is finished when it has as many. To read one sequence of a shard decodes all of it.
        resume: go on after the last whole shard; ``meta`` must be that of the cache.
        compression: "zstd", "lz4", "snappy", "gzip" or "none".

    Raises:
        CacheError: the folder has another writer, or shards that this one cannot go on with.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        meta: Meta,
        *,
        tokens_per_shard: int = 16384,
        resume: bool = False,
        compression: str = "zstd",
    ) -> None:
        if not isinstance(meta, Meta):
            raise TypeError(f"meta must be a Meta, got {type(meta).__name__}")
        if isinstance(tokens_per_shard, bool) or not isinstance(tokens_per_shard, int) or tokens_per_shard < 1:
            raise ValueError(f"tokens_per_shard must be a positive integer, got {tokens_per_shard!r}")
        if compression not in CODECS:
            raise ValueError(f"compression must be one of {list(CODECS)}, got {compression!r}")
        shards.parquet()
        self.folder, self.meta = Path(folder), meta
        self._tokens_per_shard, self._codec = tokens_per_shard, compression
        self._pending: list[tuple[int, encoding.Columns]] = []  # tokens and columns of each waiting sequence
        self._waiting = 0  # their tokens; an empty sequence counts as one, so that there is an end to them too
        self._errors: encoding.Errors = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise CacheError(f"{self.folder}: expected a folder, got a file") from None
        except OSError as error:
            raise CacheError(f"{self.folder}: cannot be made: {error.strerror}") from None
        self._lock: Lock | None = Lock(self.folder)
        try:
            self._shards = self._existing(resume)
        except BaseException:
            self._unlock()
            raise

    def _existing(self, resume: bool) -> list[shards.Shard]:
        """The shards to go on after; what a killed writer left is removed."""
        found = shards.scan(self.folder)
        if found and not resume:
            raise CacheError(
                f"{self.folder}: has {found[-1].first + found[-1].sequences} sequences; resume=True goes on"
            )
        difference = found[0].meta.difference(self.meta) if found else None
        if difference is not None:
            raise CacheError(f"{self.folder}: cannot go on with other metadata: {difference}")
        for left in self.folder.glob(".shard-*.tmp"):
            left.unlink()
        return found

    @property
    def sequences(self) -> int:
        """Sequences stored, and those that wait for the open shard to be full. After ``resume``: where to go on."""
        stored = self._shards[-1].first + self._shards[-1].sequences if self._shards else 0
        return stored + len(self._pending)

    def write(
        self, ids: Array, log_probs: Array, log_tail: Array | None = None, input_ids: Array | None = None
    ) -> None:
        """Appends one sequence. Tensors on any device, or numpy arrays; nothing is kept of them.

        Args:
            ids: [T, K] integers in [0, V), each once in a token; -1 is padding. T may be 0.
            log_probs: [T, K] natural logarithms, floats of any size; -inf counts as padding. Their probabilities may
                exceed 1 in sum by rounding only. For samples: the weights, not negative, where an id may stand twice
                and 0 counts as padding.
            log_tail: [T] logarithm of the mass that is not listed. It must be what ``log_probs`` leave, up to the
                rounding of their dtype, which is divided out of them where it is above 1e-6. None: log(1 - P), which
                16-bit ``log_probs`` leave inexact. Always None for samples.
            input_ids: [T] the text, in all sequences of a cache or in none.

        Raises:
            ValueError, TypeError: an argument is not as above; nothing is appended.
        """
        if self._lock is None:
            raise ValueError("the writer is closed")
        sequence = rows.check(self.meta, ids, log_probs, log_tail, input_ids)
        self._check_input_ids(input_ids is not None)
        if sequence.tokens * self.meta.k > MOST_VALUES:
            raise ValueError(f"ids must have at most {MOST_VALUES} entries, got {list(ids.shape)}")
        if (self._waiting + sequence.tokens) * self.meta.k > MOST_VALUES:
            self.flush()
        columns, errors = self._encode(sequence)
        self._pending.append((sequence.tokens, columns))
        self._errors = encoding.merge(self._errors, errors)
        self._waiting += max(sequence.tokens, 1)
        if self._waiting >= self._tokens_per_shard:
            self.flush()

    def _check_input_ids(self, given: bool) -> None:
        if self._pending:
            expected = "input_ids" in self._pending[0][1]
        else:
            expected = self._shards[0].has_input_ids if self._shards else given
        if given != expected:
            came = "with" if given else "without"
            raise ValueError(f"input_ids must be given with all sequences of a cache or with none, got one {came}")

    def _encode(self, sequence: rows.Rows) -> tuple[encoding.Columns, encoding.Errors]:
        columns: encoding.Columns = {"ids": sequence.ids}
        if sequence.log_tail is None:
            weights = sequence.values.astype(shards.VALUES[self.meta.log_probs])
            columns["weights"] = weights
            errors = encoding.weight_errors(sequence.values, weights)
        else:
            encoded = encoding.encode(sequence.values, sequence.padded, self.meta.log_probs)
            errors = encoding.errors(sequence.values, encoding.decode(encoded), sequence.log_tail)
            columns |= {"log_probs": encoded.pop("log_probs"), "log_tail": sequence.log_tail} | encoded
        if sequence.input_ids is not None:
            columns["input_ids"] = sequence.input_ids
        return columns, errors

    def flush(self) -> None:
        """Finishes the open shard: its sequences are safe from here on."""
        if not self._pending:
            return
        lengths = np.array([tokens for tokens, _ in self._pending], np.int32)
        parts = defaultdict(list)
        for _, columns in self._pending:
            for name, values in columns.items():
                parts[name].append(values)
        columns = {name: np.concatenate(values) for name, values in parts.items()}
        path = shards.path_of(self.folder, len(self._shards))
        open_path = path.with_name(f".{path.name}.tmp")
        first = self.sequences - len(self._pending)
        shards.write(open_path, self.meta, first, lengths, columns, self._errors, self._codec)
        _to_disk(open_path)
        open_path.rename(path)
        _to_disk(self.folder)
        self._shards.append(shards.footer(path))
        self._pending, self._waiting, self._errors = [], 0, {}

    def report(self) -> dict[str, Any]:
        """What is stored, finished shards only: see :func:`fastkd.teacher_cache.summary.summary`."""
        return summary(self._shards)

    def close(self) -> None:
        """Finishes the open shard and lets others write to the folder. Closing twice is no error."""
        if self._lock is None:
            return
        try:
            self.flush()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Lock:
    """One writer to a folder. The system releases it when its process dies."""

    def __init__(self, folder: Path) -> None:
        import fcntl

        self._file = (folder / ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise CacheError(f"{folder}: another writer is at work, process {holder or 'unknown'}") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def release(self) -> None:
        """Lets the next writer in, though a forked process may still hold the file."""
        import fcntl

        self._file.truncate(0)
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()


def _to_disk(path: Path) -> None:
    """Waits until a file or a folder is safe from a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
