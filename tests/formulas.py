"""The conventions of fastkd written down a second time, in plain PyTorch and in probabilities.

Nothing here uses fastkd's own formulas, so that the reference is held against something too.
"""

import torch
import torch.nn.functional as F

from fastkd import Head
from fastkd import divergences as D


def materialise(source):
    """Logits as a user would write them: the GEMM in the model's dtype, the rest in at least float32."""
    if not isinstance(source, Head):
        return source if source.dtype == torch.float64 else source.float()
    z = source.hidden @ source.weight.mT
    if source.bias is not None:
        z = z + (source.bias if source.bias.dim() == 1 else source.bias.unsqueeze(-2))
    z = (z if z.dtype == torch.float64 else z.float()) * source.logit_scale
    return z if source.softcap is None else source.softcap * torch.tanh(z / source.softcap)


def kl(p, q):
    return torch.xlogy(p, p) - torch.xlogy(p, q)


def jensen_shannon(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def alpha_beta(p, q, a, b):
    c = a + b
    return -(p**a * q**b - a / c * p**c - b / c * q**c) / (a * b)


def _ab(a, b):
    return D.AlphaBeta(a, b), lambda p, q: alpha_beta(p, q, a, b)


# name -> the divergence, and its term for one outcome
FORMULAS = {
    "forward_kl": (D.ForwardKL(), kl),
    "reverse_kl": (D.ReverseKL(), lambda p, q: kl(q, p)),
    "jensen_shannon": (D.JensenShannon(), lambda p, q: jensen_shannon(p, q, 0.5)),
    "jensen_shannon(0.1)": (D.JensenShannon(0.1), lambda p, q: jensen_shannon(p, q, 0.1)),
    "skew_kl": (D.SkewKL(), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_kl(0.7)": (D.SkewKL(0.7), lambda p, q: kl(p, 0.7 * p + 0.3 * q)),
    "skew_reverse_kl": (D.SkewReverseKL(), lambda p, q: kl(q, 0.1 * q + 0.9 * p)),
    "skew_reverse_kl(0.7)": (D.SkewReverseKL(0.7), lambda p, q: kl(q, 0.7 * q + 0.3 * p)),
    "total_variation": (D.TotalVariation(), lambda p, q: (p - q).abs() / 2),
    "squared_hellinger": (D.SquaredHellinger(), lambda p, q: (p.sqrt() - q.sqrt()) ** 2 / 2),
    "chi_square": (D.ChiSquare(), lambda p, q: (p - q) ** 2 / q),
    "neyman_chi_square": (D.NeymanChiSquare(), lambda p, q: (p - q) ** 2 / p),
    "cross_entropy": (D.CrossEntropy(), lambda p, q: -torch.xlogy(p, q)),
    "reverse_cross_entropy": (D.ReverseCrossEntropy(), lambda p, q: -torch.xlogy(q, p)),
    # every combination of signs of a, b and a + b that is not ruled out
    "alpha_beta(0.5, 0.8)": _ab(0.5, 0.8),
    "alpha_beta(1.5, -0.5)": _ab(1.5, -0.5),
    "alpha_beta(-0.5, 1.5)": _ab(-0.5, 1.5),
    "alpha_beta(0.3, -0.6)": _ab(0.3, -0.6),
    "alpha_beta(-0.6, 0.3)": _ab(-0.6, 0.3),
    "alpha_beta(-0.2, -0.3)": _ab(-0.2, -0.3),
    "sum": (0.3 * D.ForwardKL() + D.ReverseKL(), lambda p, q: 0.3 * kl(p, q) + kl(q, p)),
    "scaled": (2.5 * D.SquaredHellinger(), lambda p, q: 2.5 * (p.sqrt() - q.sqrt()) ** 2 / 2),
    "nested sum": (
        2 * (0.5 * D.JensenShannon(0.2) + D.TotalVariation()),
        lambda p, q: jensen_shannon(p, q, 0.2) + (p - q).abs(),
    ),
}


def divergence(term):
    """A recipe of `kd_loss(student, teacher, ...)` for a divergence given by its term; one loss per token."""

    def recipe(student, teacher, temperature=1.0, **unused):
        p, q = ((materialise(x) / temperature).softmax(-1) for x in (teacher, student))
        return term(p, q).sum(-1)

    return recipe


def per_token_kl(student, teacher, temperature=1.0, teacher_temperature=None):
    """[...] by F.kl_div. A temperature may be a tensor [..., 1]."""
    log_q = F.log_softmax(materialise(student) / temperature, -1)
    tau = temperature if teacher_temperature is None else teacher_temperature
    return F.kl_div(log_q, F.softmax(materialise(teacher) / tau, -1), reduction="none").sum(-1)
