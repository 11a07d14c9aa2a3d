"""Row ops in C++ (csrc/): the contract of rows_torch, over raw addresses, on torch's number of threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastkd.backends import extension
from fastkd.problem import Side
from fastkd.rows_torch import Rows
from fastkd.sparse import Listed

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LOOKS, COMPACT, ROW_TENSORS = True, True, 0
_NOTHING = (0, 0, 0, 0)
LARGE = 8 * 2**20  # bytes from which memory is pooled


@cache
def kinds() -> dict[str, int]:
    """The divergences that the C++ table has."""
    module = extension()[0]
    return {} if module is None else dict(module.KINDS)


def _kernels() -> Any:
    return extension()[0]


def _matrix(x: Tensor | None) -> tuple[int, int, int, int]:
    """address, row stride, width, dtype; the columns of x [n, V] are contiguous"""
    return _NOTHING if x is None else (x.data_ptr(), x.stride(0), x.shape[1], DTYPES[x.dtype])


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _ids(x: Tensor, vocab: int, lowest: int = 0) -> Tensor:
    """Indices that are safe to follow: the C++ code does not look."""
    x = x.to(torch.int64).contiguous()
    if x.numel() and not (x.min() >= lowest and x.max() < vocab):
        raise IndexError(f"ids must be in [{lowest}, {vocab}), got {x.min().item()} to {x.max().item()}")
    return x


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _source(x: Tensor, side: Side, temperature: Tensor | None) -> tuple[Any, ...]:
    return _matrix(x), side.logit_scale, side.softcap or 0.0, _at(temperature)


def _terms(a: Rows, weights: Tensor) -> list[tuple[int, float, float, int]]:
    """kind, parameters and weights [n] of each divergence"""
    terms = []
    for d, w in zip(a.divergences, weights, strict=True):
        p = (*d.params, 0.0, 0.0)
        terms.append((kinds()[d.name], p[0], p[1], w.data_ptr()))
    return terms


def divergence(s: Tensor, t: Tensor, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s], t [n, V_t] raw -> loss [n]; writes factor * dloss/ds into g [n, V_s], which may be s itself."""
    loss = torch.empty(s.shape[0], dtype=torch.float32, device="cpu")
    factor, ts, tt, weights, label_weight = map(
        _floats, (a.factor, a.s_temperature, a.t_temperature, a.term_weights, a.label_weight)
    )
    labels = None if a.labels is None else _ids(a.labels, a.vocab)
    assert weights is not None
    _kernels().divergence(
        *(s.shape[0], a.vocab, _source(s, a.student, ts), _source(t, a.teacher, tt), _matrix(g), _at(factor)),
        *(_terms(a, weights), a.normalized, _at(labels), _at(label_weight), loss.data_ptr(), torch.get_num_threads()),
    )
    return loss


RESTS = {"bucket": 0, "renormalize": 0, "drop": 1, "renormalize_both": 2, "uniform": 3}  # enum Rest of csrc/rows.h


def sparse(s: Tensor, t: Listed, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s] raw, a teacher's outcomes -> loss [n]; writes factor * dloss/ds into g [n, V_s], perhaps s itself."""
    loss = torch.empty(s.shape[0], dtype=torch.float32, device="cpu")
    factor, ts, weights, label_weight = map(_floats, (a.factor, a.s_temperature, a.term_weights, a.label_weight))
    log_p, log_rest = _floats(t.log_p), _floats(t.log_rest)
    labels = None if a.labels is None else _ids(a.labels, a.vocab)
    ids = _ids(t.ids, a.vocab, lowest=-1)
    assert weights is not None
    _kernels().sparse(
        *(s.shape[0], a.vocab, ids.shape[1], _source(s, a.student, ts), _matrix(g), _at(factor)),
        *(_at(ids), _at(log_p), _at(log_rest), RESTS[t.tail], _terms(a, weights), _at(labels), _at(label_weight)),
        *(loss.data_ptr(), torch.get_num_threads()),
    )
    return loss


def select(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, ids: Tensor, cotangent: Tensor | None
) -> Tensor:
    """log q at ids [n, K]; with cotangents [n, K] the gradient into g [n, V]."""
    out = torch.empty(ids.shape, dtype=torch.float32, device="cpu")
    ids, t, c = _ids(ids, vocab), _floats(temperature), _floats(cotangent)
    _kernels().select(
        *(s.shape[0], vocab, ids.shape[1], _source(s, side, t), _matrix(g), _at(ids), _at(c), out.data_ptr()),
        torch.get_num_threads(),
    )
    return out


def stats(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, cotangents: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, max_log_prob, argmax; with cotangents [n] of the first three the gradient into g [n, V]."""
    n = s.shape[0]
    out = torch.empty(3, n, dtype=torch.float32, device="cpu")
    argmax = torch.empty(n, dtype=torch.int64, device="cpu")
    t, given = _floats(temperature), [_floats(c) for c in cotangents or (None, None, None)]
    _kernels().stats(
        n,
        vocab,
        _source(s, side, t),
        _matrix(g),
        tuple(map(_at, given)),
        tuple(map(_at, out)),
        argmax.data_ptr(),
        torch.get_num_threads(),
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
    log_probs, log_tail = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((n, k), (n,)))
    ids = torch.empty(n, k, dtype=torch.int64, device="cpu")
    t, (d_log_probs, d_log_tail) = _floats(temperature), map(_floats, cotangents or (None, None))
    _kernels().top(
        *(n, vocab, k, _source(s, side, t), _matrix(g), _at(d_log_probs), _at(d_log_tail)),
        *(_at(log_probs), _at(log_tail), _at(ids), torch.get_num_threads()),
    )
    return log_probs, log_tail, ids


def accumulate(high: Tensor, low: Tensor | None, part: Tensor, first: bool) -> None:
    """high [m, D] float32 += part [m, D]; = where first. With low [m, D] uint8 the sum has 24 bits, the upper 16 in
    high [m, D] bfloat16."""
    _kernels().accumulate(
        *(high.data_ptr(), _at(low), part.data_ptr(), DTYPES[part.dtype], part.numel(), first, torch.get_num_threads())
    )


def round_sum(high: Tensor, low: Tensor) -> None:
    """high = the 24 bits of high and low, rounded."""
    _kernels().round_sum(high.data_ptr(), low.data_ptr(), high.numel(), torch.get_num_threads())


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a large result or buffer, in huge pages if the system grants them. What is freed of it is kept, up to
    1 GiB in all, and handed out again: the first touch of fresh pages costs as much as a pass over them. Their storage
    cannot be resized."""
    count = math.prod(shape)
    if count * dtype.itemsize < LARGE or torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    block = _kernels().Block(count * dtype.itemsize)
    return torch.frombuffer(block, dtype=dtype, count=count).view(tuple(shape))


def release() -> None:
    """Give what is kept back to the system."""
    module = _kernels()
    if module is not None:
        module.keep_at_most(module.keep_at_most(0))


def kl_div_sum(x: Tensor, t: Tensor, log_target: bool) -> float:
    """sum t (log t - x) over entries that lie in the same order in memory, of one dtype"""
    return _kernels().kl_div_sum(
        *(x.data_ptr(), t.data_ptr(), DTYPES[x.dtype], x.numel(), log_target, torch.get_num_threads())
    )


def kl_div_grad(t: Tensor, out: Tensor, scale: float, log_target: bool) -> None:
    """out = -scale t, in t's order in memory"""
    _kernels().kl_div_grad(
        *(t.data_ptr(), out.data_ptr(), DTYPES[t.dtype], t.numel(), log_target, scale, torch.get_num_threads())
    )
