"""Row ops in Triton (kernels/): the contract of rows_torch, on a GPU's current stream, without waiting for it.

Beside its results an op takes a few numbers for each listed entry, and where what is not listed is summed apart a bit
for each entry of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.divergences import Divergence
from fastkd.kernels import accumulate as sums
from fastkd.kernels import configs, pointwise, primitives
from fastkd.kernels import rows as dense
from fastkd.kernels import sparse as listed
from fastkd.kernels.launch import launch
from fastkd.problem import Side
from fastkd.rows_torch import Rows
from fastkd.sparse import Listed

LOOKS, COMPACT, ROW_TENSORS = False, True, 0
CLOSED = ("forward_kl", "reverse_kl", "cross_entropy")


def kinds() -> dict[str, int]:
    """The divergences that the Triton table has."""
    return pointwise.KINDS


def _floats(x: Tensor) -> Tensor:
    return x.to(torch.float32).contiguous()


def _numbers(*shape: int, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _source(name: str, x: Tensor, side: Side, temperature: Tensor) -> dict[str, Any]:
    """Raw logits [n, V'], and what makes log-probabilities of them; what does nothing is None."""
    return {
        name: x,
        f"{name.lower()}_stride": x.stride(0),
        f"{name.lower()}_width": x.shape[1],
        f"{name.lower()}_scale": None if side.logit_scale == 1 else float(side.logit_scale),
        f"{name.lower()}_cap": None if side.softcap is None else float(side.softcap),
        f"{name}_TEMPERATURE": _floats(temperature),
    }


def _gradient(g: Tensor | None) -> dict[str, Any]:
    return {"G": g, "g_stride": None if g is None else g.stride(0)}


def _loss(a: Rows, loss: Tensor) -> dict[str, Any]:
    """What the losses against dense and sparse teachers have in common."""
    return {
        "FACTOR": _floats(a.factor),
        "WEIGHTS": _floats(a.term_weights),
        "LABELS": None if a.labels is None else a.labels.long().contiguous(),
        "LABEL_WEIGHT": None if a.label_weight is None else _floats(a.label_weight),
        "LOSS": loss,
        "PARAMETERS": tuple(float(x) for d in a.divergences for x in (*d.params, 0.0, 0.0)[:2]),
        "KINDS": tuple(pointwise.KINDS[d.name] for d in a.divergences),
        "n": len(loss),
        "vocab": a.vocab,
    }


def _closed(divergences: tuple[Divergence, ...]) -> int | None:
    """The kind of a single divergence that has a closed form."""
    single = len(divergences) == 1 and divergences[0].name in CLOSED
    return pointwise.KINDS[divergences[0].name] if single else None


def divergence(s: Tensor, t: Tensor, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s], t [n, V_t] raw -> loss [n]; writes factor * dloss/ds into g [n, V_s], which may be s itself."""
    loss = _numbers(len(s), like=s)
    arguments = _source("S", s, a.student, a.s_temperature) | _source("T", t, a.teacher, a.t_temperature)
    flags = {"CLOSED": _closed(a.divergences), "NORMALIZED": a.normalized}
    launch(dense.divergence, len(s), configs.pick(s), arguments | _gradient(g) | _loss(a, loss) | flags)
    return loss


def _blocks(k: int) -> dict[str, int]:
    """How many listed entries are looked at at a time, and how many of them each is compared with."""
    block = min(1 << max(k - 1, 0).bit_length(), configs.LISTED)
    return {"BLOCK_K": block, "BLOCK_R": max(configs.PAIRS // block, 1)}


def sparse(s: Tensor, t: Listed, g: Tensor | None, a: Rows) -> Tensor:
    """s [n, V_s] raw, a teacher's outcomes -> loss [n]; writes factor * dloss/ds into g [n, V_s], perhaps s itself."""
    n, k = t.ids.shape
    loss = _numbers(n, like=s)
    others = t.log_rest is not None
    listing = {
        "IDS": t.ids.contiguous(),
        "LOG_P": _floats(t.log_p),
        "LOG_REST": None if t.log_rest is None else _floats(t.log_rest),
        "LISTED": torch.empty(n, -(-a.vocab // 32), dtype=torch.int32, device=s.device) if others else None,
        "OWN": None if g is None else _numbers(n, k, like=s),
        "Z": None if g is None else _numbers(n, k, like=s),
        "TAIL": t.tail,
        "k": k,
    }
    arguments = _source("S", s, a.student, a.s_temperature) | listing | _gradient(g) | _loss(a, loss)
    launch(listed.sparse, n, configs.pick(s), arguments | _blocks(k))
    return loss


def select(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, ids: Tensor, cotangent: Tensor | None
) -> Tensor:
    """log q at ids [n, K]; with cotangents [n, K] the gradient into g [n, V]. An id that does not exist gives NaN."""
    n, k = ids.shape
    out, (g, given) = _numbers(n, k, like=s), _given(g, None if cotangent is None else (cotangent,), 1)
    listing = {
        "IDS": ids.long().contiguous(),
        "OUT": out,
        "D": given[0],
        "Z": None if g is None else _numbers(n, k, like=s),
        "vocab": vocab,
        "k": k,
    }
    arguments = _source("S", s, side, temperature) | listing | _gradient(g)
    launch(primitives.select, n, configs.pick(s), arguments | _blocks(k))
    return out


def _given(
    g: Tensor | None, cotangents: tuple[Tensor, ...] | None, count: int
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """g and the cotangents, if both are there."""
    if g is None or cotangents is None:
        return None, [None] * count
    return g, [_floats(c) for c in cotangents]


def stats(
    s: Tensor, g: Tensor | None, side: Side, vocab: int, temperature: Tensor, cotangents: tuple[Tensor, ...] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, entropy, max_log_prob, argmax; with cotangents [n] of the first three the gradient into g [n, V]."""
    n, (g, given) = len(s), _given(g, cotangents, 3)
    outputs = (*_numbers(3, n, like=s), torch.empty(n, dtype=torch.int64, device=s.device))
    arguments = dict(zip(("LSE", "ENTROPY", "MAX_LOG_PROB", "ARGMAX"), outputs))
    arguments |= dict(zip(("D_LSE", "D_ENTROPY", "D_MAX"), given))
    arguments |= _source("S", s, side, temperature) | _gradient(g)
    launch(primitives.stats, n, configs.pick(s), arguments | {"vocab": vocab})
    return outputs[0], outputs[1], outputs[2], outputs[3]


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
    n, (g, given) = len(s), _given(g, cotangents, 2)
    ids = torch.empty(n, k, dtype=torch.int64, device=s.device)
    z, log_probs = _numbers(2, n, k, like=s)
    others, total, log_tail = _numbers(3, n, like=s)
    shared = _source("S", s, side, temperature) | {"Z": z, "TOP": others, "TOTAL": total, "vocab": vocab, "k": k}
    launch(primitives.find, n, configs.pick(s, "find"), shared | {"IDS": ids})
    ids = ids.gather(1, z.sort(dim=1, descending=True, stable=True).indices)
    results = {"IDS": ids, "LOG_PROBS": log_probs, "LOG_TAIL": log_tail, "BLOCK_K": _blocks(k)["BLOCK_K"]}
    results |= dict(zip(("D_LOG_PROBS", "D_LOG_TAIL"), given))
    launch(primitives.top, n, configs.pick(s), shared | results | _gradient(g))
    return log_probs, log_tail, ids


def accumulate(high: Tensor, low: Tensor | None, part: Tensor, first: bool) -> None:
    """high [m, D] float32 += part [m, D]; = where first. With low [m, D] uint8 the sum has 24 bits, the upper 16 in
    high [m, D] bfloat16."""
    if low is None:
        high.copy_(part) if first else high.add_(part)
        return
    config, n = configs.pick(part), part.numel()
    arguments = {"HIGH": high.view(torch.int16), "LOW": low, "PART": part, "n": n, "FIRST": first}
    launch(sums.accumulate, -(-n // config.block), config, arguments)


def round_sum(high: Tensor, low: Tensor) -> None:
    """high = the 24 bits of high and low, rounded."""
    config, n = configs.pick(high), high.numel()
    launch(sums.round_sum, -(-n // config.block), config, {"HIGH": high.view(torch.int16), "LOW": low, "n": n})


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a large result or buffer."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)
