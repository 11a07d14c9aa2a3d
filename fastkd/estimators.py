"""Reverse KL from samples: Schulman's estimators k1, k2, k3 for tokens that were sampled from the student.

With x drawn from the student q, the teacher p and r = p(x) / q(x), all three estimate KL(q || p); a pass over the
vocabulary is not needed, the two log-probabilities of x are enough::

    log_q = fastkd.selected_log_probs(student, ids)          # ids [..., K], sampled from the student
    log_p = fastkd.selected_log_probs(teacher, ids)          # or what a server reported for them
    value = fastkd.estimators.k3(log_q.detach(), log_p).mean()
    loss = fastkd.estimators.k2(log_q, log_p.detach()).mean()

An estimator of the value is not an estimator of the gradient. Sampling passes no gradient, so the mean of k over many
samples has the gradient E_q[dk / dlog q * grad log q], and that is

===  ===========================  ==========================================  ======================================
k    E_q[k]                       E_q[grad k]                                 so it is
===  ===========================  ==========================================  ======================================
k1   KL(q || p)                   E_q[grad log q] = 0                         useless as a loss
k2   E_q[(log r)^2] / 2           E_q[-log r * grad log q] = grad KL(q || p)  the loss for reverse KL
k3   KL(q || p), if q covers p    E_q[(1 - r) grad log q] = grad KL(p || q)   a noisy loss for *forward* KL
===  ===========================  ==========================================  ======================================

k1 and k3 are for measuring, and for the reward of a policy gradient: ``k1(log_q, log_p).detach() * log_q`` has the
gradient of k2 exactly, term by term. Where the whole distribution is at hand,
``fastkd.kd_loss(student, teacher, "reverse_kl")`` has no variance at all.

All three take the log-probabilities elementwise and are differentiable in both. No mass at a sample is defined: a
teacher's -inf gives +inf, a student's -inf, which sampling cannot give, -inf for k1 and +inf for k2 and k3, and both
-inf NaN.

Over a sequence these are the gradients at given prefixes: how earlier tokens lead to later ones is left out.

Schulman, "Approximating KL divergence" (2020), has the values; Tang and Munos, "On a few pitfalls in KL divergence
gradient estimation for RL" (2025), and Liu et al., "Rethinking KL regularization in RLHF" (2025), have the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastkd import checks
from fastkd.divergences import _beyond_linear

__all__ = ["k1", "k2", "k3"]


def k1(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """-log r: unbiased, of high variance, negative about half of the time. In plain PyTorch::

        student_log_probs.float() - teacher_log_probs.float()

    As a loss on samples of the student its expected gradient is 0.

    Args:
        student_log_probs: [...] log q of tokens sampled from the student; float32, bfloat16, float16 or float64.
        teacher_log_probs: [...] log p of the same tokens, on the same device.

    Returns:
        [...] in nats, float32 (float64 if either is float64).

    Raises:
        TypeError: not a tensor, or not of a float dtype.
        ValueError: another shape or device than the student's.
    """
    return -_log_ratio(student_log_probs, teacher_log_probs)


def k2(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """(log r)^2 / 2: never negative, of low variance, biased by the third order of log r. In plain PyTorch::

        (teacher_log_probs.float() - student_log_probs.float()).square() / 2

    As a loss on samples of the student its expected gradient is that of KL(q || p), exactly.

    Args, returns and raises: as :func:`k1`.
    """
    return _log_ratio(student_log_probs, teacher_log_probs).square() / 2


def k3(student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """r - 1 - log r: never negative, unbiased where the student can sample all that the teacher can, of low variance
    while E_q[r^2] is low. In plain PyTorch, though accurate for small log r too::

        log_r = teacher_log_probs.float() - student_log_probs.float()
        torch.expm1(log_r) - log_r

    As a loss on samples of the student its expected gradient is that of forward KL(p || q), not of what it measures.

    Args, returns and raises: as :func:`k1`.
    """
    log_r = _log_ratio(student_log_probs, teacher_log_probs)
    small = log_r.abs() < 0.1  # where expm1(log r) and log r cancel
    near = _beyond_linear(torch.where(small, log_r, 0.0))
    far = log_r.expm1() - log_r.clamp(max=torch.finfo(log_r.dtype).max)  # inf - inf is inf
    return torch.where(small, near, far)


def _log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    """log r = log p - log q"""
    checks.is_float("student_log_probs", student)
    checks.is_float("teacher_log_probs", teacher)
    checks.has_shape("teacher_log_probs", teacher, tuple(student.shape), ", that of student_log_probs")
    checks.same_device(student_log_probs=student, teacher_log_probs=teacher)
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    return teacher.to(wide) - student.to(wide)
