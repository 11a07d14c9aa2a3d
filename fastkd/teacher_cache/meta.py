"""What all shards of a cache have in common, and the hash that tells one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastkd import checks
from fastkd.sources import TAILS

FORMAT = 1  # of the files; a reader refuses a newer one
KINDS = ("topk", "samples")
DTYPES = ("fp16", "fp32", "int8")


class CacheError(ValueError):
    """A cache, or a file of it, that cannot be used; the message names it and says why."""


def _version() -> str:
    import fastkd

    return fastkd.__version__


@dataclass(frozen=True)
class Meta:
    """What all shards of a cache have in common. Two are equal if their sequences may stand in one cache.

    Args:
        vocab: V, the size of the teacher's vocabulary.
        k: K, entries of a token; 1 to V for top-k.
        kind: "topk" (log-probabilities of the likeliest ids) or "samples" (weights of sampled ids).
        temperature: at which the log-probabilities were computed.
        tail: of :class:`fastkd.TopK`; how the loss shall treat what is not listed.
        log_probs: the stored dtype of log-probabilities or weights: "fp16", "fp32", or "int8" (log-probabilities only).
        tokenizer: :func:`tokenizer_hash` of the tokenizer whose ids these are; None: unknown.
        teacher: a name of the teacher; None: unknown.
        normalize: of :class:`fastkd.Samples`.
        fastkd_version: that wrote the cache; makes no difference.
    """

    vocab: int
    k: int
    kind: str = "topk"
    temperature: float = 1.0
    tail: str = "bucket"
    log_probs: str = "fp16"
    tokenizer: str | None = None
    teacher: str | None = None
    normalize: bool = False
    fastkd_version: str = field(default_factory=_version, compare=False)

    def __post_init__(self) -> None:
        for name in ("vocab", "k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if not 1 <= self.vocab <= 2**31 - 1:
            raise ValueError(f"vocab must be from 1 to 2**31 - 1, got {self.vocab}")
        checks.is_one_of("kind", self.kind, KINDS)
        checks.is_one_of("tail", self.tail, TAILS)
        checks.is_one_of("log_probs", self.log_probs, DTYPES if self.kind == "topk" else DTYPES[:2])
        if self.k < 1 or (self.kind == "topk" and self.k > self.vocab):
            raise ValueError(f"k must be from 1 to the vocabulary of {self.vocab}, got {self.k}")
        object.__setattr__(self, "temperature", checks.finite_number("temperature", self.temperature, above=0.0))
        if not isinstance(self.normalize, bool):
            raise TypeError(f"normalize must be a bool, got {type(self.normalize).__name__}")
        for name in ("tokenizer", "teacher"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise TypeError(f"{name} must be a string or None, got {type(getattr(self, name)).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Meta:
        """What :meth:`to_dict` gave; other keys are ignored."""
        return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})

    def difference(self, other: Meta) -> str | None:
        """The first field that keeps the two out of one cache, with both values; None if there is none."""
        for f in fields(self):
            mine, its = getattr(self, f.name), getattr(other, f.name)
            if f.compare and mine != its:
                return f"{f.name} is {mine!r} there and {its!r} here"
        return None


def tokenizer_hash(tokenizer: Any) -> str:
    """32 hexadecimal digits of SHA-256 over what a tokenizer does with ids: its vocabulary, added and special tokens,
    and its merges where it has any. Padding, truncation and the library's version make no difference.

    Args:
        tokenizer: of Hugging Face transformers, fast or slow, or of the package tokenizers.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise TypeError(f"tokenizer must be a Hugging Face tokenizer, got {type(tokenizer).__name__}")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = sorted(str(token) for token in getattr(tokenizer, "all_special_tokens", ()))
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    model = json.loads(backend.to_str())["model"] if hasattr(backend, "to_str") else {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    # a unigram model's list of pieces has scores, which decide how text is cut
    pieces = model["vocab"] if isinstance(model.get("vocab"), list) else []
    content = json.dumps([vocabulary, special, merges, pieces], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:32]
