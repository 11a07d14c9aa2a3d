"""Divergence of two rows of logits, and its gradient written over the student's: the dense row op.

Softmax in units of ln 2: e^(z - m)/T = 2^x, x = (z - m) inv2, inv2 = log2(e) / T, m the largest z so far.
"""

import triton
import triton.language as tl

from fastkd.kernels.pointwise import KINDS as NAMES
from fastkd.kernels.pointwise import point
from fastkd.kernels.tiles import (
    LN2,
    LOG2E,
    LOWEST,
    columns,
    label_gradient,
    label_of,
    logits,
    put,
    put_zeros,
    raised,
    slope,
    times,
)

FORWARD, REVERSE, CROSS = (tl.constexpr(NAMES[n]) for n in ("forward_kl", "reverse_kl", "cross_entropy"))


@triton.jit
def statistics(
    S,  # [V_s]
    s_width,
    s_scale,
    s_cap,
    s_inv2,
    T,  # [V_t]
    t_width,
    t_scale,
    t_cap,
    t_inv2,
    vocab,
    KIND: tl.constexpr,  # of the closed form, or None
    NORMALIZED: tl.constexpr,
    HARD: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """max and sum 2^x of both rows, the closed form's sum over x and y, sum e^(z_s - m_s) at temperature 1"""
    m_s = LOWEST
    m_t = LOWEST if NORMALIZED else 0.0
    l_s = tl.zeros([BLOCK], tl.float32)
    l_t = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    l_hard = tl.zeros([BLOCK], tl.float32)
    for WHOLE in tl.static_range(ODD, -1, -1):
        first, end = columns(tl.minimum(s_width, t_width), vocab, WHOLE, ODD, BLOCK)
        for v in tl.range(first, end, BLOCK, num_stages=STAGES):
            i = v + tl.arange(0, BLOCK)
            z_s = logits(S, i, s_width, s_scale, s_cap, WHOLE, "evict_last")
            z_t = logits(T, i, t_width, t_scale, t_cap, WHOLE, "evict_last")
            if HARD:
                _, _, w_hard = raised(m_s, z_s, LOG2E)
            m_s, d_s, w_s = raised(m_s, z_s, s_inv2)
            x = (z_s - m_s) * s_inv2
            q = tl.exp2(x)
            d_t, w_t = 0.0, 1.0
            if NORMALIZED:
                m_t, d_t, w_t = raised(m_t, z_t, t_inv2)
            y = (z_t - m_t) * t_inv2
            p = tl.exp2(y)
            if KIND == FORWARD:  # sum p (y - x), measured from the new maxima
                cross = times(w_t, cross + l_t * (d_t - d_s)) + times(p, y - x)
            elif KIND == REVERSE:
                cross = times(w_s, cross + l_s * (d_s - d_t)) + times(q, x - y)
            elif KIND == CROSS:
                cross = times(w_t, cross - l_t * d_s) - times(p, x)
            l_s = l_s * w_s + q
            l_t = l_t * w_t + p
            if HARD:
                l_hard = l_hard * w_hard + tl.exp2((z_s - m_s) * LOG2E)
    return m_s, tl.sum(l_s, 0), m_t, tl.sum(l_t, 0), tl.sum(cross, 0) * LN2, tl.sum(l_hard, 0)


@triton.jit
def terms(lp, lq, p, q, W, n, PARAMETERS, KINDS: tl.constexpr):
    """The weighted sum of the divergences' phi, and of their h; W [K, n] from the row's column on"""
    phi, h = 0.0, 0.0
    for k in tl.static_range(len(KINDS)):
        w = tl.load(W + k * n)
        f = point(lp, lq, p, q, PARAMETERS[2 * k], PARAMETERS[2 * k + 1], KINDS[k])
        phi += times(w, f[0])
        h += times(w, f[1])
    return phi, h


@triton.jit
def tile_terms(z_s, m_s, s_inv2, l_s, z_t, m_t, t_inv2, l_t, W, n, PARAMETERS, KINDS: tl.constexpr):
    """phi, h and q of a tile"""
    x = (z_s - m_s) * s_inv2
    y = (z_t - m_t) * t_inv2
    q = tl.exp2(x) / l_s  # nearer than e^(log q)
    p = tl.exp2(y) / l_t
    phi, h = terms(y * LN2 - tl.log(l_t), x * LN2 - tl.log(l_s), p, q, W, n, PARAMETERS, KINDS)
    return phi, h, q


@triton.jit(do_not_specialize=["n"])  # one kernel for chunks of every size
def divergence(
    S,  # [n, V_s] raw logits
    s_stride,
    s_width,
    s_scale,
    s_cap,
    S_TEMPERATURE,  # [n]
    T,  # [n, V_t] raw logits, or logs of weights
    t_stride,
    t_width,
    t_scale,
    t_cap,
    T_TEMPERATURE,  # [n]
    G,  # [n, V_s] the gradient, may be S; None: not wanted
    g_stride,
    FACTOR,  # [n]
    WEIGHTS,  # [K, n]
    LABELS,  # [n] or None
    LABEL_WEIGHT,  # [n]
    LOSS,  # [n]
    PARAMETERS,  # 2 K numbers
    n,
    vocab,
    KINDS: tl.constexpr,  # K
    CLOSED: tl.constexpr,  # the kind whose closed form serves, or None
    NORMALIZED: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    T += row * t_stride
    if G is not None:
        G += row * g_stride
    WEIGHTS += row
    factor = tl.load(FACTOR + row)
    if factor == 0:
        tl.store(LOSS + row, 0.0)
        if G is not None:
            put_zeros(G, s_width, ODD, BLOCK)
    else:
        s_inv = 1 / tl.load(S_TEMPERATURE + row)
        s_inv2, t_inv2 = s_inv * LOG2E, LOG2E / tl.load(T_TEMPERATURE + row)
        m_s, l_s, m_t, l_t, cross, l_hard = statistics(
            *(S, s_width, s_scale, s_cap, s_inv2, T, t_width, t_scale, t_cap, t_inv2, vocab),
            *(CLOSED, NORMALIZED, LABELS is not None, ODD, BLOCK, STAGES),
        )
        mass = 1.0  # sum p
        if not NORMALIZED:
            mass, l_t = l_t, 1.0 + 0 * l_t
        total = 0.0 * l_s  # sum h
        if CLOSED == FORWARD:
            value = cross / l_t + (tl.log(l_s / l_t) if NORMALIZED else times(mass, tl.log(l_s)))
        elif CLOSED == REVERSE:
            value = cross / l_s - tl.log(l_s / l_t)
        elif CLOSED == CROSS:
            value = cross / l_t + times(mass, tl.log(l_s))
        else:
            sum_phi = tl.zeros([BLOCK], tl.float32)
            sum_h = tl.zeros([BLOCK], tl.float32)
            for WHOLE in tl.static_range(ODD, -1, -1):
                first, end = columns(tl.minimum(s_width, t_width), vocab, WHOLE, ODD, BLOCK)
                for v in tl.range(first, end, BLOCK, num_stages=STAGES):
                    i = v + tl.arange(0, BLOCK)
                    z_s = logits(S, i, s_width, s_scale, s_cap, WHOLE, "evict_last")
                    z_t = logits(T, i, t_width, t_scale, t_cap, WHOLE, "evict_last")
                    phi, h, _ = tile_terms(z_s, m_s, s_inv2, l_s, z_t, m_t, t_inv2, l_t, WEIGHTS, n, PARAMETERS, KINDS)
                    sum_phi += tl.where(i < vocab, phi, 0.0)
                    sum_h += tl.where(i < vocab, h, 0.0)
            value = tl.sum(sum_phi, 0)
            total = tl.sum(sum_h, 0)
        weight = 1.0
        if CLOSED is not None:
            weight = tl.load(WEIGHTS)
            value = times(weight, value)
        if LABELS is not None:
            label, hard, z_hard = label_of(S, LABELS, LABEL_WEIGHT, row, s_width, vocab, s_scale, s_cap)
            value += times(hard, tl.log(l_hard) - (z_hard - m_s))
        tl.store(LOSS + row, value)
        if G is not None:
            outside = s_inv * factor
            a_s, a_t, gap = outside / l_s, outside / l_t, 0.0  # what 2^x and 2^y are multiplied by
            if CLOSED == REVERSE:
                a_s, gap = a_s * weight * LN2, cross / l_s / LN2
            elif CLOSED is not None:
                a_s, a_t = a_s * weight * mass, a_t * weight
            tl.debug_barrier()  # every warp has read its label's logit
            # the last tiles first: they are still in the cache
            for WHOLE in tl.static_range(1 + ODD):
                first, end = columns(tl.minimum(s_width, t_width), vocab, WHOLE, ODD, BLOCK)
                for b in tl.range(tl.cdiv(end, BLOCK) - 1, first // BLOCK - 1, -1, num_stages=STAGES):
                    i = b * BLOCK + tl.arange(0, BLOCK)
                    z_s = logits(S, i, s_width, s_scale, s_cap, WHOLE, "evict_first")
                    z_t = logits(T, i, t_width, t_scale, t_cap, WHOLE, "evict_first")
                    if CLOSED is None:
                        _, h, q = tile_terms(
                            *(z_s, m_s, s_inv2, l_s, z_t, m_t, t_inv2, l_t, WEIGHTS, n, PARAMETERS, KINDS)
                        )
                        g = (h - times(q, total)) * outside
                    else:
                        x = (z_s - m_s) * s_inv2
                        y = (z_t - m_t) * t_inv2
                        if CLOSED == REVERSE:  # q (log q - log p - KL)
                            g = times(tl.exp2(x), x - y - gap) * a_s
                        else:  # q sum p - p
                            g = tl.exp2(x) * a_s - tl.exp2(y) * a_t
                        g = tl.where(weight == 0, 0.0, g)
                    if LABELS is not None:
                        g += label_gradient(z_s, i, label, hard * factor, m_s, l_hard)
                    put(G, i, g * slope(z_s, s_scale, s_cap), s_width, WHOLE)
