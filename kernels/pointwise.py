"""phi and h of every divergence in Triton; fastkd/divergences.py is the definition, csrc/pointwise.h the C++ twin."""

import triton
import triton.language as tl

# name in fastkd.divergences -> KIND
KINDS = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "jensen_shannon": 2,
    "skew_kl": 3,
    "skew_reverse_kl": 4,
    "total_variation": 5,
    "squared_hellinger": 6,
    "chi_square": 7,
    "neyman_chi_square": 8,
    "alpha_beta": 9,
    "cross_entropy": 10,
    "reverse_cross_entropy": 11,
}


@triton.jit
def _times(p, x):
    """p * x with 0 * anything = 0"""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def _mixed(m):
    """A mixture of p and q, such that its logarithm is finite; NaN stays"""
    return tl.where(m < 1.17549435e-38, 1.17549435e-38, m)


@triton.jit
def _beyond_linear(x):
    """e^x - 1 - x for abs(x) <= 0.1"""
    return 0.5 * x * x * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))


@triton.jit
def point(lp, lq, p, q, a, b, KIND: tl.constexpr):
    """phi and h = d phi / d log q, elementwise; lp, lq log-probabilities, p, q their exponentials, a, b parameters."""
    if KIND == 0:
        phi = _times(p, lp - lq)
        h = -p
    elif KIND == 1:
        phi = _times(q, lq - lp)
        h = phi + q
    elif KIND == 2:
        # log(q / m) and log(p / m) by the ratio of the smaller to the larger: log q - log m would cancel
        less = p < q
        small, large = tl.where(less, p, q), tl.where(less, q, p)
        w_small = tl.where(less, a, 1 - a)
        log_m = tl.log(_mixed((1 - w_small) + w_small * (small / large)))  # of m / large
        of_small = w_small * _times(small, -tl.abs(lp - lq) - log_m)
        of_large = (1 - w_small) * _times(large, -log_m)
        phi = of_small + of_large
        h = tl.where(less, of_large, of_small)
    elif KIND == 3:
        m = _mixed(a * p + (1 - a) * q)
        phi = _times(p, lp - tl.log(m))
        h = -(1 - a) * _times(p, q / m)
    elif KIND == 4:
        m = _mixed(a * q + (1 - a) * p)
        phi = _times(q, lq - tl.log(m))
        h = phi + q - a * _times(q, q / m)
    elif KIND == 5:
        d = p - q
        phi = 0.5 * tl.abs(d)
        same = 1e-6 * q  # equal but for rounding: 0
        h = 0.5 * tl.where(d > same, -q, tl.where(d < -same, q, 0.0 * d))
    elif KIND == 6:
        d = tl.sqrt(p) - tl.sqrt(q)
        phi = 0.5 * d * d
        h = -0.5 * tl.sqrt(q) * d
    elif KIND == 7:
        x = lp - lq
        ppq = tl.exp(2 * lp - lq)  # p^2 / q, where p and q may underflow
        near = tl.where(p == 0, q, (p - q) * (tl.exp(x) - 1))
        phi = tl.where(x > 1, ppq - 2 * p + q, near)
        h = tl.where(x > 1, q - ppq, tl.where(p == 0, q, q - ppq))
    elif KIND == 8:
        x = lq - lp
        qqp = tl.exp(2 * lq - lp)  # q^2 / p
        r = tl.exp(x) - 1
        phi = tl.where(x > 1, qqp - 2 * q + p, tl.where(q == 0, p, (q - p) * r))
        h = tl.where(x > 1, 2 * (qqp - q), 2 * _times(q, r))
    elif KIND == 9:
        c = a + b
        neither = (lp == -float("inf")) & (lq == -float("inf"))
        cross = tl.exp(a * lp + b * lq)
        own_q = tl.exp(c * lq)
        far = (a / c * tl.exp(c * lp) + b / c * own_q - cross) / (a * b)
        one = (lp == -float("inf")) != (lq == -float("inf"))
        far = tl.where(one & (far != far), float("inf"), far)
        ad = a * (lp - lq)  # where p and q are near the powers cancel
        cd = c * (lp - lq)
        near = (tl.abs(ad) < 0.1) & (tl.abs(cd) < 0.1)
        ea = _beyond_linear(ad)
        phi = tl.where(neither, 0.0, tl.where(near, own_q * (a / c * _beyond_linear(cd) - ea) / (a * b), far))
        h = tl.where(neither, 0.0, tl.where(near, -own_q * (ad + ea), own_q - cross) / a)
    elif KIND == 10:
        phi = -_times(p, lq)
        h = -p
    else:
        tl.static_assert(KIND == 11)
        phi = -_times(q, lp)
        h = phi
    return phi, h
