"""Row ops in CUDA C++ (csrc/gpu*): the contract of rows_torch, over raw addresses, on the current stream."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import extension
from fastkd.problem import Side
from fastkd.rows_cpu import DTYPES, RESTS, _at, _floats, _matrix, _source, _terms
from fastkd.rows_torch import Rows
from fastkd.sparse import Listed

LOOKS, COMPACT, ROW_TENSORS = False, True, 0
EMULATED: ModuleType | None = None  # the same functions on the CPU, for tests
CLUSTER: int | None = None  # blocks that share a row, 0 for none; None: by device and size


def kernels() -> Any:
    """The functions of csrc/gpu_bindings.h."""
    return getattr(extension()[0], "cuda", None) if EMULATED is None else EMULATED


def unavailable() -> str | None:
    """Why this machine cannot have it, in a sentence, or None."""
    if EMULATED is not None:
        return None
    if not hasattr(extension()[0], "cuda"):
        return "the extension fastkd._C was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _launch(x: Tensor) -> tuple[int, int, int]:
    """device, address of its current stream, blocks that share a row"""
    cluster = kernels().AUTO if CLUSTER is None else CLUSTER
    if x.device.type != "cuda":
        return 0, 0, cluster
    index = x.device.index
    return index, torch.cuda.current_stream(index).cuda_stream, cluster


def _ids(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def _new(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def divergence(s: Tensor, t: Tensor, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s], t [n, V_t] raw -> loss [n]; writes factor * dloss/ds into g [n, V_s], which may be s itself."""
    loss = _new(s, s.shape[0])
    factor, ts, tt, weights, label_weight = map(
        _floats, (a.factor, a.s_temperature, a.t_temperature, a.term_weights, a.label_weight)
    )
    labels = _ids(a.labels)
    assert weights is not None
    kernels().divergence(
        *(_launch(s), s.shape[0], a.vocab, _source(s, a.student, ts), _source(t, a.teacher, tt), _matrix(g)),
        *(_at(factor), _terms(a, weights), a.normalized, _at(labels), _at(label_weight), loss.data_ptr()),
    )
    return loss


def sparse(s: Tensor, t: Listed, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s] raw, a teacher's outcomes -> loss [n]; writes factor * dloss/ds into g [n, V_s], perhaps s itself."""
    loss = _new(s, s.shape[0])
    factor, ts, weights, label_weight = map(_floats, (a.factor, a.s_temperature, a.term_weights, a.label_weight))
    ids, log_p, log_rest, labels = _ids(t.ids), _floats(t.log_p), _floats(t.log_rest), _ids(a.labels)
    assert weights is not None
    kernels().sparse(
        *(_launch(s), s.shape[0], a.vocab, t.ids.shape[1], _source(s, a.student, ts), _matrix(g), _at(factor)),
        *(_at(ids), _at(log_p), _at(log_rest), RESTS[t.tail], _terms(a, weights), _at(labels), _at(label_weight)),
        loss.data_ptr(),
    )
    return loss


def select(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, ids: Tensor, cotangent: Tensor | None
) -> Tensor:
    """log q at ids [n, K]; with cotangents [n, K] the gradient into g [n, V]. An id beyond the vocabulary gives
    NaN, in the gradient of its row too; -1 gives NaN, and its cotangent is left out."""
    out = _new(s, *ids.shape)
    _listed(s, g, side, vocab, temperature, ids, (cotangent, None), (out, None))
    return out


def _listed(
    s: Tensor,
    g: Tensor | None,
    side: Side,
    vocab: int,
    temperature: Tensor,
    ids: Tensor,  # [n, K]
    cotangents: tuple[Tensor | None, Tensor | None],  # of what follows
    out: tuple[Tensor, Tensor | None],  # log q at ids [n, K], and of all others [n]
) -> None:
    positions, ts, (given, given_rest) = _ids(ids), _floats(temperature), map(_floats, cotangents)
    kernels().select(
        *(_launch(s), s.shape[0], vocab, ids.shape[1], _source(s, side, ts), _matrix(None if given is None else g)),
        *(_at(positions), out[1] is not None, _at(given), _at(given_rest), _at(out[0]), _at(out[1])),
    )


def stats(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, cotangents: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, max_log_prob, argmax; with cotangents [n] of the first three the gradient into g [n, V]. Where the
    row is NaN, argmax is the place of the largest number in it, as in rows_cpu; rows_torch has 0 there."""
    n = s.shape[0]
    out, argmax = _new(s, 3, n), _new(s, n, dtype=torch.int64)
    ts, given = _floats(temperature), [_floats(c) for c in (cotangents or (None, None, None))[:3]]
    kernels().stats(
        *(_launch(s), n, vocab, _source(s, side, ts), _matrix(None if cotangents is None else g)),
        *(tuple(map(_at, given)), tuple(map(_at, out)), argmax.data_ptr()),
    )
    return out[0], out[1], out[2], argmax


def top(
    s: Tensor,
    g: Tensor | None,
    side: Side,
    vocab: int,
    temperature: Tensor,
    k: int,
    cotangents: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the k likeliest entries [n, k], likeliest first, of equals the lower id; the log of all
    others' mass [n]; the ids [n, k]. With cotangents of the first two the gradient into g [n, V]."""
    n = s.shape[0]
    values, found = _new(s, n, k), _new(s, n, k, dtype=torch.int64)
    ts = _floats(temperature)
    kernels().top(_launch(s), n, vocab, k, _source(s, side, ts), values.data_ptr(), found.data_ptr())
    ids = found.gather(-1, values.sort(dim=-1, descending=True, stable=True).indices)
    log_probs, log_tail = _new(s, n, k), _new(s, n)
    given = (None, None) if cotangents is None else (cotangents[0], cotangents[1])
    _listed(s, g, side, vocab, temperature, ids, given, (log_probs, log_tail))
    return log_probs, log_tail, ids


def accumulate(high: Tensor, low: Tensor | None, part: Tensor, first: bool) -> None:
    """high [m, D] float32 += part [m, D]; = where first. With low [m, D] uint8 the sum has 24 bits, the upper 16 in
    high [m, D] bfloat16, and part is float32, bfloat16 or float16; all contiguous."""
    if low is None:
        high.copy_(part) if first else high.add_(part)
        return
    if part.dtype not in DTYPES:
        raise TypeError(f"part must be float32, bfloat16 or float16, got {part.dtype}")
    kernels().accumulate(
        *(_launch(high), high.data_ptr(), low.data_ptr(), part.data_ptr(), DTYPES[part.dtype], part.numel(), first)
    )


def round_sum(high: Tensor, low: Tensor) -> None:
    """high = the 24 bits of high and low, rounded."""
    kernels().round_sum(_launch(high), high.data_ptr(), low.data_ptr(), high.numel())


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a large result or buffer."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)
