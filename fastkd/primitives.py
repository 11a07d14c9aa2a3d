"""Building blocks: what a head's softmax says about each token, without the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import checks
from fastkd.fused import apply
from fastkd.normal_form import DenseSource, PerToken
from fastkd.problem import Select, Stats, Top
from fastkd.sources import Head

__all__ = ["TokenStats", "TopTokens", "selected_log_probs", "token_stats", "topk"]


class TokenStats(NamedTuple):
    """Each [...]. ``lse`` is the log-sum-exp of the logits over the temperature, entropy in nats."""

    lse: Tensor
    entropy: Tensor
    max_log_prob: Tensor
    argmax: Tensor


def token_stats(
    source: Tensor | Head,
    *,
    temperature: float | Tensor = 1.0,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-sum-exp, entropy, largest log-probability and its index for each token. In plain PyTorch::

        log_q = F.log_softmax(F.linear(hidden, weight).float() / temperature, -1)
        lse = torch.logsumexp(F.linear(hidden, weight).float() / temperature, -1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        max_log_prob, argmax = log_q.max(-1)

    Args:
        source: logits [..., V] or a :class:`~fastkd.Head`.
        temperature: a float or [...] above 0.
        chunk_tokens, memory_budget, backend: as in :func:`fastkd.kd_loss`.

    Returns:
        :class:`TokenStats`: float32 (float64 for float64) and int64. All but ``argmax`` are differentiable.
    """
    kwargs = locals()
    if torch.compiler.is_compiling():
        from fastkd import traced

        return TokenStats(*traced.token_stats(**kwargs))
    return TokenStats(*_token_stats(**kwargs))


def _token_stats(
    source: Tensor | Head,
    temperature: float | Tensor,
    chunk_tokens: int | None,
    memory_budget: int | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    checks.chunking(chunk_tokens, memory_budget)
    s = DenseSource("source", source)
    row = PerToken.of(s)
    tensors = (*s.tensors(row, s.vocab), row("temperature", temperature, above=0.0))
    spec = Stats("", chunk_tokens, memory_budget, s.side, s.vocab)
    return tuple(x.reshape(s.lead) for x in apply(spec, tensors, backend))


def selected_log_probs(
    source: Tensor | Head,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probabilities of listed entries. In plain PyTorch::

        F.log_softmax(F.linear(hidden, weight).float() / temperature, -1).gather(-1, ids)

    Args:
        source: logits [..., V] or a :class:`~fastkd.Head`.
        ids: [..., K] int64 or int32 in [0, V); an id may stand twice.
        temperature: a float or [...] above 0.
        chunk_tokens, memory_budget, backend: as in :func:`fastkd.kd_loss`.

    Returns:
        [..., K], float32 (float64 for float64), differentiable.
    """
    kwargs = locals()
    if torch.compiler.is_compiling():
        from fastkd import traced

        return traced.selected_log_probs(**kwargs)
    return _selected_log_probs(**kwargs)


def _selected_log_probs(
    source: Tensor | Head,
    ids: Tensor,
    temperature: float | Tensor,
    chunk_tokens: int | None,
    memory_budget: int | None,
    backend: str | None,
) -> Tensor:
    checks.chunking(chunk_tokens, memory_budget)
    s = DenseSource("source", source)
    row = PerToken.of(s)
    row.check_device("ids", checks.is_index("ids", ids))
    if ids.dim() < 1 or tuple(ids.shape[:-1]) != s.lead:
        raise ValueError(
            f"ids must be [..., K] with the source's leading dimensions {list(s.lead)}, got {list(ids.shape)}"
        )
    tensors = (
        *s.tensors(row, s.vocab),
        row("temperature", temperature, above=0.0),
        ids.reshape(*row.size, ids.shape[-1]),
    )
    return apply(Select("", chunk_tokens, memory_budget, s.side, s.vocab), tensors, backend)[0].reshape(ids.shape)


class TopTokens(NamedTuple):
    """``ids`` and ``log_probs`` [..., k], likeliest first; ``log_tail`` [...], the log of all others' mass."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor


def topk(
    source: Tensor | Head,
    k: int,
    *,
    temperature: float | Tensor = 1.0,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> TopTokens:
    """The k likeliest entries of each token: what :class:`fastkd.TopK` takes. In plain PyTorch::

        log_q = F.log_softmax(F.linear(hidden, weight).float() / temperature, -1)
        log_probs, ids = log_q.topk(k)
        log_tail = log_q.scatter(-1, ids, -math.inf).logsumexp(-1)

    Args:
        source: logits [..., V] or a :class:`~fastkd.Head`.
        k: how many, from 1 to V. Of entries that are equal the lower id comes first.
        temperature: a float or [...] above 0.
        chunk_tokens, memory_budget, backend: as in :func:`fastkd.kd_loss`.

    Returns:
        :class:`TopTokens`: int64 and float32 (float64 for float64). All but ``ids`` are differentiable. With k = V the
        tail is -inf.
    """
    kwargs = locals()
    if torch.compiler.is_compiling():
        from fastkd import traced

        return _top_tokens(*traced.topk(**kwargs))
    return _top_tokens(*_topk(**kwargs))


def _top_tokens(log_probs: Tensor, log_tail: Tensor, ids: Tensor) -> TopTokens:
    return TopTokens(ids, log_probs, log_tail)


def _topk(
    source: Tensor | Head,
    k: int,
    temperature: float | Tensor,
    chunk_tokens: int | None,
    memory_budget: int | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    checks.chunking(chunk_tokens, memory_budget)
    s = DenseSource("source", source)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= s.vocab:
        raise ValueError(f"k must be an integer from 1 to the vocabulary's size {s.vocab}, got {k!r}")
    row = PerToken.of(s)
    tensors = (*s.tensors(row, s.vocab), row("temperature", temperature, above=0.0))
    log_probs, log_tail, ids = apply(Top("", chunk_tokens, memory_budget, s.side, s.vocab, k), tensors, backend)
    return log_probs.reshape(*s.lead, k), log_tail.reshape(s.lead), ids.reshape(*s.lead, k)
