"""The losses that are measured: fastkd's, and the same as it is written in plain PyTorch today."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd import Head, TopK
from fastkd.problem import accumulation

Cast = Callable[[Tensor], Tensor]  # of logits


def as_is(z: Tensor) -> Tensor:
    """No cast."""
    return z


# --- kd_loss(Head, Head), kd_loss(logits, logits), kl_div(log_q, log_p) ----------------------------------------------


def fused_heads(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """kd_loss of two heads."""
    return fastkd.kd_loss(Head(hidden, weight), Head(teacher_hidden, teacher_weight))


def fused_heads_each(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The same by reduction="none"."""
    return fastkd.kd_loss(Head(hidden, weight), Head(teacher_hidden, teacher_weight), reduction="none").mean()


def kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    """F.kl_div of two logits."""
    log_q, log_p = F.log_softmax(z_s, -1), F.log_softmax(z_t, -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def naive_heads(cast: Cast, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """The logits of both heads, whole."""
    return kl(cast(hidden @ weight.T), cast(teacher_hidden @ teacher_weight.T))


def fused_kl_div(log_q: Tensor, log_p: Tensor) -> Tensor:
    """The drop-in."""
    return fastkd.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def naive_kl_div(cast: Cast, log_q: Tensor, log_p: Tensor) -> Tensor:
    """What it takes the place of."""
    return F.kl_div(cast(log_q), cast(log_p), reduction="batchmean", log_target=True)


# --- kd_loss(Head, TopK), kd_loss(logits, TopK) ----------------------------------------------------------------------


def _with_rest(log_probs: Tensor) -> Tensor:
    """[N, K] -> [N, K + 1]: log(1 - sum p), all others as one outcome more"""
    mass = log_probs.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([log_probs, torch.log(-torch.expm1(mass))], -1)


def kl_listed(z: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """What is listed, taken out of the log-softmax; from there on in float32 (float64), K being small."""
    log_q, wide = F.log_softmax(z, -1).gather(-1, ids), accumulation(z.dtype)
    log_q, log_p = _with_rest(log_q.to(wide)), _with_rest(log_probs.to(wide))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def fused_sparse(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """kd_loss of a head and a teacher's listed entries."""
    return fastkd.kd_loss(Head(hidden, weight), TopK(ids, log_probs))


def naive_sparse(cast: Cast, hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """The logits whole, and what is listed taken out of their log-softmax."""
    return kl_listed(cast(hidden @ weight.T), ids, log_probs)


# --- the primitives --------------------------------------------------------------------------------------------------


def fused_selected(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of ids."""
    return fastkd.selected_log_probs(Head(hidden, weight), ids).mean()


def naive_selected(cast: Cast, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """The logits whole, their log-softmax, gather."""
    return F.log_softmax(cast(hidden @ weight.T), -1).gather(-1, ids).mean()


def fused_stats(hidden: Tensor, weight: Tensor) -> Tensor:
    """lse, entropy and largest log-probability as one number."""
    stats = fastkd.token_stats(Head(hidden, weight))
    # the gradient of the largest jumps where two logits are rounded to one, so that none could be compared
    return (stats.lse + stats.entropy + stats.max_log_prob.detach()).mean()


def naive_stats(cast: Cast, hidden: Tensor, weight: Tensor) -> Tensor:
    """The logits whole, and each by itself."""
    z = cast(hidden @ weight.T)
    log_q = F.log_softmax(z, -1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return (torch.logsumexp(z, -1) + entropy + log_q.max(-1).values.detach()).mean()


def _ranked(log_probs: Tensor, ranks: Tensor) -> Tensor:
    """Log-probabilities [N, K], likeliest first, as one number that their order is part of"""
    return (log_probs * ranks).sum(-1).mean()


def fused_topk(hidden: Tensor, weight: Tensor, ranks: Tensor) -> Tensor:
    """The likeliest entries of a head."""
    return _ranked(fastkd.topk(Head(hidden, weight), ranks.shape[0]).log_probs, ranks)


def naive_topk(cast: Cast, hidden: Tensor, weight: Tensor, ranks: Tensor) -> Tensor:
    """The logits whole, their log-softmax, topk."""
    return _ranked(F.log_softmax(cast(hidden @ weight.T), -1).topk(ranks.shape[0]).values, ranks)
