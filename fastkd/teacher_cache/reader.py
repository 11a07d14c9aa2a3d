"""Reading a cache: sequences as sources, at random, in as many processes as there are."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.sources import Samples, TopK
from fastkd.teacher_cache import encoding, shards
from fastkd.teacher_cache.meta import CacheError, Meta, tokenizer_hash
from fastkd.teacher_cache.summary import summary

Source = TopK | Samples


@dataclass(frozen=True)
class Decoded:
    """The columns of a shard in memory, as they are stored, and where each sequence begins, in tokens."""

    starts: np.ndarray  # [sequences + 1]
    columns: encoding.Columns

    def sequence(self, at: int) -> encoding.Columns:
        """The columns of one sequence, [T, K] or [T]."""
        rows = slice(self.starts[at], self.starts[at + 1])
        return {name: values[rows] for name, values in self.columns.items()}


class TeacherCache(Dataset[Source]):
    """The sequences of a cache, made by :func:`open`: ``cache[i]`` is a source, ``len(cache)`` their number.

    It is a dataset for ``torch.utils.data.DataLoader``, with workers forked or spawned, and ``collate_fn=collate``.
    A sequence is reached by decoding its shard, of which the last few are kept: an order that stays within a few
    shards for a while, as :meth:`shuffled` gives, reads many times faster than one over the whole cache.
    """

    def __init__(self, found: Sequence[shards.Shard], device: torch.device | str, shards_in_memory: int) -> None:
        self.meta: Meta = found[0].meta
        self.device = torch.device(device)
        self._shards = list(found)
        self._firsts = [shard.first for shard in found]
        self._kept: OrderedDict[int, Decoded] = OrderedDict()  # the one used last at the end
        self._most_kept = shards_in_memory

    def __len__(self) -> int:
        return self._firsts[-1] + self._shards[-1].sequences

    def __getitem__(self, index: int) -> Source:
        """The sequence as a TopK (or Samples) [T, K] on the cache's device: ids int32, with -1 where padded;
        log_probs float16 for "fp16", else float32; log_tail [T] float32."""
        return self._source(self._columns(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Source]:
        """Sequences in the order asked for, each shard decoded once: what a DataLoader calls for a batch."""
        found = {at: self[indices[at]] for at in sorted(range(len(indices)), key=lambda at: self._place(indices[at]))}
        return [found[at] for at in range(len(indices))]

    def read(self, indices: Sequence[int]) -> Source:
        """Sequences as one batch: :func:`collate` of them."""
        return collate(self.__getitems__(indices))

    def tokens(self, index: int) -> int:
        """T of a sequence."""
        return len(self._columns(index)["ids"])

    def input_ids(self, index: int) -> Tensor:
        """The text of a sequence, [T] int64, on the cache's device."""
        columns = self._columns(index)
        if "input_ids" not in columns:
            raise CacheError(f"{self._shards[0].path.parent}: has no input_ids: its writer gave none")
        return torch.from_numpy(columns["input_ids"].astype(np.int64)).to(self.device)

    def shuffled(self, seed: int = 0, shards: int = 4) -> list[int]:
        """All indices in a random order for ``DataLoader(sampler=...)``: shards are shuffled, and then the sequences
        within every few of them, so that few shards are decoded again: batches that lie in two groups do that, and each
        worker decodes for itself. A sampler repeats its order; make one of another seed for each epoch."""
        generator = np.random.default_rng(seed)
        spans = [np.arange(s.first, s.first + s.sequences) for s in self._shards]
        order = generator.permutation(len(spans))
        groups = [order[at : at + shards] for at in range(0, len(order), shards)]
        return [int(i) for group in groups for i in generator.permutation(np.concatenate([spans[s] for s in group]))]

    def summary(self) -> dict[str, Any]:
        """Counts, bytes and errors: see :func:`fastkd.teacher_cache.summary.summary`."""
        return summary(self._shards)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a sequence, and its row there."""
        number = as_index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is out of range for a cache of {len(self)} sequences")
        number %= len(self)
        shard = bisect_right(self._firsts, number) - 1
        return shard, number - self._firsts[shard]

    def _columns(self, index: int) -> encoding.Columns:
        shard, row = self._place(index)
        if shard in self._kept:
            self._kept.move_to_end(shard)
        else:
            while len(self._kept) >= self._most_kept:
                self._kept.popitem(last=False)
            self._kept[shard] = Decoded(*_read(self._shards[shard]))
        return self._kept[shard].sequence(row)

    def _source(self, columns: encoding.Columns) -> Source:
        ids = columns["ids"].astype(np.int32)
        ids[encoding.padding(columns)] = -1
        if self.meta.kind == "samples":
            return Samples(self._tensor(ids), self._tensor(columns["weights"]), self.meta.normalize)
        return TopK(
            self._tensor(ids),
            self._tensor(encoding.decode(columns)),
            self.meta.tail,
            self.meta.temperature,
            self._tensor(columns["log_tail"]),
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        # the pages in memory are read-only and shared by all sequences of a shard
        return torch.from_numpy(values if values.flags.writeable else values.copy()).to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}  # a worker decodes its own


def _read(shard: shards.Shard) -> tuple[np.ndarray, encoding.Columns]:
    if not shard.path.exists():
        raise CacheError(f"{shard.path}: gone since the cache was opened")
    return shards.read(shard)


def open(
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    vocab: int | None = None,
    device: torch.device | str = "cpu",
    shards_in_memory: int = 4,
) -> TeacherCache:
    """Opens a cache for reading: the footers of all shards, and no more.

    Args:
        folder: what a :class:`Writer` has filled, or still fills: shards finished later are not seen.
        tokenizer: of the student: a Hugging Face tokenizer or its :func:`tokenizer_hash`. Another one than the cache's
            is an error.
        vocab: of the student; another one than the cache's is an error.
        device: where sources are put. With workers in a DataLoader: "cpu".
        shards_in_memory: decoded shards that each process keeps.

    Raises:
        CacheError: no cache, another tokenizer or vocabulary, or a file that cannot be read; it is named.
    """
    if isinstance(shards_in_memory, bool) or not isinstance(shards_in_memory, int) or shards_in_memory < 1:
        raise ValueError(f"shards_in_memory must be a positive integer, got {shards_in_memory!r}")
    path = Path(folder)
    found = shards.scan(path)
    if not found:
        raise CacheError(f"{path}: no teacher cache: no {shards.path_of(path, 0).name} in it")
    meta = found[0].meta
    if vocab is not None and vocab != meta.vocab:
        raise CacheError(f"{path}: from a teacher with a vocabulary of {meta.vocab}, expected {vocab}")
    if tokenizer is not None:
        expected = tokenizer if isinstance(tokenizer, str) else tokenizer_hash(tokenizer)
        if meta.tokenizer is None:
            raise CacheError(f"{path}: does not say of which tokenizer its ids are, expected {expected}")
        if meta.tokenizer != expected:
            raise CacheError(f"{path}: ids of another tokenizer: {meta.tokenizer}, expected {expected}")
    return TeacherCache(found, device, shards_in_memory)


def collate(sources: Sequence[Source]) -> Source:
    """Sequences [T, K] as one batch [B, T_max, K], the ``collate_fn`` of a DataLoader.

    Shorter ones are filled with tokens that list nothing: ids -1, log_probs -inf and log_tail 0 (or weights 0). Give
    these weight 0 in the loss::

        weights = (batch.ids >= 0).any(-1).float()                     # [B, T_max]
    """
    if not sources:
        raise ValueError("sources must be at least one, got none")
    kinds = {_kind(source) for source in sources}
    if len(kinds) > 1:
        raise ValueError(f"sources must be alike, got {' and '.join(sorted(kinds))}")
    first, ids = sources[0], _filled([source.ids for source in sources], -1)
    if isinstance(first, Samples):
        weights = _filled([source.weights for source in sources if isinstance(source, Samples)], 0.0)
        return Samples(ids, weights, first.normalize)
    teachers = [source for source in sources if isinstance(source, TopK)]
    log_probs = _filled([teacher.log_probs for teacher in teachers], -torch.inf)
    tails = [teacher.log_tail for teacher in teachers if teacher.log_tail is not None]
    return TopK(ids, log_probs, first.tail, first.temperature, _filled(tails, 0.0) if tails else None)


def _kind(source: Source) -> str:
    """Two sources with one of these may stand in a batch."""
    if isinstance(source, TopK):
        tail = "no log_tail" if source.log_tail is None else "log_tail"
        return f"TopK(K={source.ids.shape[-1]}, {source.tail!r}, temperature={source.temperature}, {tail})"
    if isinstance(source, Samples):
        return f"Samples(K={source.ids.shape[-1]}, normalize={source.normalize})"
    raise TypeError(f"sources must be TopK or Samples, got {type(source).__name__}")


def _filled(tensors: list[Tensor], value: float) -> Tensor:
    """[T, ...] each as one [B, T_max, ...]."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
