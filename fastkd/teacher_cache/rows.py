"""One sequence as a caller gave it, checked and brought to numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.teacher_cache.meta import Meta

Array = Tensor | np.ndarray

# how far a token's probabilities may sum away from 1, by dtype: sum p |log p| eps / 2, with an entropy of up to 32
ROUNDING = {"float16": 2.0**-6, "bfloat16": 2.0**-3}
EXACT = 1e-4  # float32 and float64, of which a log-softmax may have been off by its own rounding
KEPT = 1e-6  # what is nearer to 1 is stored as it came
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Rows:
    """A checked sequence."""

    ids: np.ndarray  # [T, K] uint16 or uint32, 0 where padded
    values: np.ndarray  # [T, K] float32: log-probabilities, -inf where padded; or weights, 0 where padded
    padded: np.ndarray | None  # [T, K] bool; None: no entry is
    log_tail: np.ndarray | None  # [T] float32; None for samples
    input_ids: np.ndarray | None  # [T] int32

    @property
    def tokens(self) -> int:
        """T"""
        return len(self.ids)


def check(meta: Meta, ids: Any, values: Any, log_tail: Any = None, input_ids: Any = None) -> Rows:
    """The sequence, or an error that names the argument: see :meth:`Writer.write` for what is expected."""
    name = "log_probs" if meta.kind == "topk" else "weights"
    entries, given = _array("ids", ids, "iu"), _array(name, values, "f")
    shape = (len(entries) if entries.ndim else 0, meta.k)
    _shape("ids", entries, shape)
    _shape(name, given, shape, " like ids")
    _all("ids", f"from 0 to {meta.vocab - 1}, or -1", entries, (entries >= -1) & (entries < meta.vocab))
    if input_ids is not None:
        input_ids = _array("input_ids", input_ids, "iu")
        _shape("input_ids", input_ids, shape[:1])
        _all("input_ids", "from 0 to 2**31 - 1", input_ids, (input_ids >= 0) & (input_ids < 2**31))
        input_ids = input_ids.astype(np.int32)
    if meta.kind == "samples":
        if log_tail is not None:
            raise ValueError("log_tail must be None for samples, which have no tail")
        return _samples(meta, entries, given, input_ids)
    return _topk(meta, entries, given, log_tail, input_ids, ROUNDING.get(_dtype(values), EXACT))


def _topk(
    meta: Meta, ids: np.ndarray, given: np.ndarray, log_tail: Any, input_ids: np.ndarray | None, tolerance: float
) -> Rows:
    given = given.astype(np.promote_types(given.dtype, np.float32), copy=False)
    padded = (ids < 0) | (given == -np.inf)
    some = bool(padded.any())
    log_probs = np.where(padded, -np.inf, given) if some else given
    _all("log_probs", "logarithms of probabilities, at most 0", log_probs, log_probs <= tolerance)
    twice = repeats(ids, padded if some else None)
    if twice.any():
        token = int(twice.argmax())
        numbers, counts = np.unique(ids[token][~padded[token]], return_counts=True)
        raise ValueError(f"ids must list an id once in a token, got {numbers[counts > 1][0]} twice in token {token}")
    mass = np.exp(log_probs, dtype=np.float64).sum(-1)
    _all("probabilities of a token", "at most 1 in sum", mass, mass <= 1 + tolerance)
    if log_tail is None:
        with np.errstate(divide="ignore"):
            tail = np.log1p(-np.minimum(mass, 1.0))
        if meta.k == meta.vocab:  # what 1 - P leaves of a token that lists all is rounding
            full = ~padded.any(-1)
            tail[full] = -np.inf
            _all("probabilities of the whole vocabulary", "1 in sum", mass, ~full | (np.abs(mass - 1) <= tolerance))
    else:
        tail = _array("log_tail", log_tail, "f").astype(np.float64)
        _shape("log_tail", tail, mass.shape)
        tolerance = max(tolerance, ROUNDING.get(_dtype(log_tail), EXACT))
        _all("log_tail", "the logarithm of a mass, at most 0", tail, tail <= tolerance)
        whole = mass + np.exp(tail)
        _all("probabilities of a token and its tail", "1 in sum", whole, np.abs(whole - 1) <= tolerance)
    log_probs, tail = _balanced(log_probs, np.minimum(tail, 0.0), mass)
    values = np.clip(log_probs, LOWEST, 0).astype(np.float32)
    if some:
        values[padded] = -np.inf
    return Rows(
        _unsigned(meta, ids, padded if some else None),
        values,
        padded if some else None,
        tail.astype(np.float32),
        input_ids,
    )


def _balanced(log_probs: np.ndarray, tail: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brings the sum of a token's probabilities, of given mass [T], and of its tail to 1 where rounding has moved it.

    The tail is the more exact of the two, unless it leaves nothing to a token that lists something, or the reverse.
    """
    listed = -np.expm1(tail)
    off = np.abs(mass - listed) > KEPT
    if not off.any():
        return log_probs, tail
    keeps = off & (mass > 0) & (listed > 0)
    ratio = np.divide(listed, mass, where=keeps, out=np.ones_like(mass))
    with np.errstate(divide="ignore"):
        tail = np.where(off & ~keeps, np.log1p(-np.minimum(mass, 1.0)), tail)
    return log_probs + np.log(ratio).astype(log_probs.dtype)[:, None], tail


def _samples(meta: Meta, ids: np.ndarray, given: np.ndarray, input_ids: np.ndarray | None) -> Rows:
    padded = (ids < 0) | (given == 0)
    some = bool(padded.any())
    weights = (np.where(padded, 0, given) if some else given).astype(np.float32)
    largest = np.finfo(np.float16 if meta.log_probs == "fp16" else np.float32).max
    _all("weights", f"from 0 to {largest:.6g}", weights, (weights >= 0) & (weights <= largest))
    return Rows(_unsigned(meta, ids, padded if some else None), weights, padded if some else None, None, input_ids)


def _unsigned(meta: Meta, ids: np.ndarray, padded: np.ndarray | None) -> np.ndarray:
    return (ids if padded is None else np.where(padded, 0, ids)).astype(id_dtype(meta.vocab))


def id_dtype(vocab: int) -> np.dtype:
    """uint16 where the vocabulary fits."""
    return np.dtype(np.uint16 if vocab <= 2**16 else np.uint32)


def repeats(ids: np.ndarray, padded: np.ndarray | None) -> np.ndarray:
    """Which tokens [T] list an id twice, padding left out."""
    numbers = ids.astype(np.int32)
    if padded is not None:
        numbers = np.where(padded, -1 - np.arange(ids.shape[-1], dtype=np.int32), numbers)  # all different
    numbers.sort(axis=-1)
    return (numbers[:, 1:] == numbers[:, :-1]).any(-1)


def _array(name: str, value: Any, kinds: str) -> np.ndarray:
    """A tensor on any device, or an array, as a native numpy array of integers ("iu") or floats ("f")."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(value).__name__}")
    if value.dtype.kind not in kinds or value.dtype == np.uint64:
        expected = "integers that fit int64" if "i" in kinds else "floats"
        raise TypeError(f"{name} must be {expected}, got {value.dtype}")
    return value.astype(np.int64) if value.dtype.kind == "u" else value


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shape(name: str, value: np.ndarray, shape: tuple[int, ...], why: str = "") -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}{why}, got {list(value.shape)}")


def _all(name: str, expected: str, value: np.ndarray, good: np.ndarray) -> None:
    if not good.all():
        bad = np.argwhere(~good)[0].tolist()
        raise ValueError(f"{name} must be {expected}, got {value[tuple(bad)]} at index {bad}")
