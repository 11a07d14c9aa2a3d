"""Divergence of a row of logits from a teacher that lists k of its entries, and its gradient: the sparse row op.

What is listed, k entries, and what is not, the rest of the vocabulary, are summed apart: log(1 - Q) is a sum over
entries that a bitmap leaves over, without cancellation. The gradient of what is not listed is r 2^x c + even, of what
is listed h + r' 2^x c', with constants of the row. It is written to all entries, then what is listed is written over.
"""

import triton
import triton.language as tl

from fastkd.kernels.pointwise import KINDS as NAMES
from fastkd.kernels.rows import terms
from fastkd.kernels.tiles import (
    LOG2E,
    LOWEST,
    columns,
    gather,
    label_gradient,
    label_of,
    logits,
    put,
    put_zeros,
    raised,
    slope,
    times,
)

FORWARD = tl.constexpr(NAMES["forward_kl"])


@triton.jit
def mark(LISTED, IDS, k, vocab, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """LISTED [ceil(V / 32)]: bit i is set where i is in IDS [k]"""
    words = tl.cdiv(vocab, 32)
    for w in range(0, words, BLOCK):
        i = w + tl.arange(0, BLOCK)
        tl.store(LISTED + i, tl.zeros([BLOCK], tl.int32), mask=i < words)
    tl.debug_barrier()
    for j in range(0, k, BLOCK_K):
        ids = tl.load(IDS + j + tl.arange(0, BLOCK_K), mask=j + tl.arange(0, BLOCK_K) < k, other=-1)
        bit = (1 << (ids % 32)).to(tl.int32)
        tl.atomic_or(LISTED + ids // 32, bit, mask=(ids >= 0) & (ids < vocab), sem="relaxed")
    tl.debug_barrier()


@triton.jit
def row_sums(
    S,  # [V_s]
    width,
    scale,
    cap,
    inv2,
    LISTED,  # [ceil(V / 32)] or None
    vocab,
    EACH: tl.constexpr,
    HARD: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """max, sum 2^x and (EACH) sum x of what is not listed; max and sum e^(z - m) at temperature 1 (HARD) of all"""
    m = LOWEST
    m_hard = LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    total_hard = tl.zeros([BLOCK], tl.float32)
    moved = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for WHOLE in tl.static_range(ODD, -1, -1):
        first, end = columns(width, vocab, WHOLE, ODD, BLOCK)
        for v in tl.range(first, end, BLOCK, num_stages=STAGES):
            i = v + tl.arange(0, BLOCK)
            z = logits(S, i, width, scale, cap, WHOLE, "evict_last")
            if HARD:
                m_hard, _, w_hard = raised(m_hard, z, LOG2E)
                total_hard = total_hard * w_hard + tl.exp2((z - m_hard) * LOG2E)
            other = i < vocab
            if LISTED is not None:
                at = v // 32 + tl.arange(0, BLOCK // 32)
                words = tl.load(LISTED + at, mask=at < tl.cdiv(vocab, 32), other=0)
                listed = (words[:, None] >> tl.arange(0, 32)[None, :]) & 1
                other = other & (tl.reshape(listed, [BLOCK]) == 0)
                z = tl.where(other, z, -float("inf"))
            m, d, w = raised(m, z, inv2)
            x = (z - m) * inv2
            total = total * w + tl.exp2(x)
            if EACH:
                moved += count * d + tl.where(other, x, 0.0)
                count += tl.where(other, 1.0, 0.0)
    return m, tl.sum(total, 0), tl.sum(moved, 0), m_hard, tl.sum(total_hard, 0)


@triton.jit
def list_sums(S, IDS, k, width, vocab, scale, cap, inv2, BLOCK_K: tl.constexpr):
    """max and sum 2^x of what is listed, and how many there are"""
    m = LOWEST
    total = tl.zeros([BLOCK_K], tl.float32)
    count = tl.zeros([BLOCK_K], tl.int32)
    for j in range(0, k, BLOCK_K):
        i = j + tl.arange(0, BLOCK_K)
        ids = tl.load(IDS + i, mask=i < k, other=-1)
        z = gather(S, ids, width, vocab, scale, cap)
        m, _, w = raised(m, z, inv2)
        total = total * w + tl.exp2((z - m) * inv2)
        count += tl.where(ids >= 0, 1, 0)
    return m, tl.sum(total, 0), tl.sum(count, 0)


@triton.jit
def merged(m1, l1, m2, l2, inv2):
    """max and sum 2^x of two parts"""
    m = tl.maximum(m1, m2)
    return m, l1 * tl.exp2((m1 - m) * inv2) + l2 * tl.exp2((m2 - m) * inv2)


@triton.jit
def put_all(
    S,  # [V_s]
    G,  # [V_s], may be S
    width,
    scale,
    cap,
    inv2,
    factor,
    m,
    r,
    c,
    even,
    LABEL,  # (label, weight, max, sum), or None
    vocab,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """G = (r 2^x c + even, over T, + the label's) * factor * dz/draw; the last tiles are still cached"""
    tl.debug_barrier()  # every warp has read what it reads of S besides
    for WHOLE in tl.static_range(1 + ODD):
        first, end = columns(width, width, WHOLE, ODD, BLOCK)
        for b in tl.range(tl.cdiv(end, BLOCK) - 1, first // BLOCK - 1, -1, num_stages=STAGES):
            i = b * BLOCK + tl.arange(0, BLOCK)
            z = logits(S, i, width, scale, cap, WHOLE, "evict_first")
            g = tl.zeros([BLOCK], tl.float32) + even
            if c is not None:
                g += times(tl.exp2((z - m) * inv2) * r, c)
            g *= inv2 / LOG2E
            if LABEL is not None:
                g += label_gradient(z, i, LABEL[0], LABEL[1], LABEL[2], LABEL[3])
            put(G, i, g * slope(z, scale, cap) * factor, width, WHOLE)


@triton.jit
def put_listed(
    G,  # [V_s]
    width,
    scale,
    cap,
    inv2,
    factor,
    m,
    r,
    c,
    LABEL,  # (label, weight, max, sum), or None
    IDS,  # [k]
    OWN,  # [k] the gradient of each listed entry itself, to s = z / temperature
    Z,  # [k] what stood there
    k,
    REPEATS: tl.constexpr,  # may an id stand twice
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """G at ids = (own + r 2^x c, over the temperature, + the label's) * factor * dz/draw"""
    for j in range(0, k, BLOCK_K):
        i = j + tl.arange(0, BLOCK_K)
        ids = tl.load(IDS + i, mask=i < k, other=-1)
        z = tl.load(Z + i, mask=i < k, other=0.0)
        if REPEATS:  # every occurrence writes the same sum
            own = tl.zeros([BLOCK_K], tl.float32)
            for o in range(0, k, BLOCK_R):
                e = o + tl.arange(0, BLOCK_R)
                same = ids[:, None] == tl.load(IDS + e, mask=e < k, other=-2)[None, :]
                own += tl.sum(tl.where(same, tl.load(OWN + e, mask=e < k, other=0.0)[None, :], 0.0), 1)
        else:
            own = tl.load(OWN + i, mask=i < k, other=0.0)
        g = (own + times(tl.exp2((z - m) * inv2) * r, c)) * (inv2 / LOG2E)
        if LABEL is not None:
            g += label_gradient(z, ids, LABEL[0], LABEL[1], LABEL[2], LABEL[3])
        put(G, ids, g * slope(z, scale, cap) * factor, width, False)


@triton.jit
def outcome_sums(
    S,  # [V_s]
    IDS,  # [k]
    LOG_P,  # [k]
    OWN,  # [k] or None
    Z,  # [k]
    k,
    width,
    vocab,
    scale,
    cap,
    inv2,
    m,
    total,
    WEIGHTS,  # [K, n] from the row's column on
    n,
    PARAMETERS,  # 2 K numbers
    KINDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum phi and sum h over what is listed; h and z of each into OWN and Z"""
    sum_phi = tl.zeros([BLOCK_K], tl.float32)
    sum_h = tl.zeros([BLOCK_K], tl.float32)
    log_total = tl.log(total)
    for j in range(0, k, BLOCK_K):
        i = j + tl.arange(0, BLOCK_K)
        ids = tl.load(IDS + i, mask=i < k, other=-1)
        z = gather(S, ids, width, vocab, scale, cap)
        there = ids >= 0
        x = (z - m) * inv2
        lq = tl.where(there, x / LOG2E - log_total, -float("inf"))
        q = tl.where(there, tl.exp2(x) / total, 0.0)  # nearer than e^(log q)
        lp = tl.load(LOG_P + i, mask=there, other=-float("inf"))
        phi, h = terms(lp, lq, tl.exp(lp), q, WEIGHTS, n, PARAMETERS, KINDS)  # 0 where nothing is
        sum_phi += phi
        sum_h += h
        if OWN is not None:
            tl.store(OWN + i, h, mask=i < k)
            tl.store(Z + i, z, mask=i < k)
    return tl.sum(sum_phi, 0), tl.sum(sum_h, 0)


@triton.jit
def even_rest(log_u, others, sum_log_q, WEIGHTS, n, KINDS: tl.constexpr):
    """phi of what is not listed, and h of each such entry, where all have log-probability log_u; cross-entropies"""
    some = (others > 0) & (log_u != -float("inf"))
    u = tl.where(some, tl.exp(log_u), 0.0)
    phi, h = 0.0, 0.0
    for k in tl.static_range(len(KINDS)):
        w = tl.load(WEIGHTS + k * n)
        entropy = times(u, others * log_u) if KINDS[k] == FORWARD else 0.0
        phi += times(w, entropy - times(u, sum_log_q))
        h -= times(w, u)
    return phi, h


@triton.jit(do_not_specialize=["n"])  # one kernel for chunks of every size
def sparse(
    S,  # [n, V_s] raw logits
    s_stride,
    s_width,
    s_scale,
    s_cap,
    S_TEMPERATURE,  # [n]
    IDS,  # [n, k] int64, -1 for padding
    LOG_P,  # [n, k]
    LOG_REST,  # [n] of the others as one outcome, or (uniform) of each of them; None: drop, renormalize_both
    LISTED,  # [n, ceil(V / 32)] int32, memory for the bitmap; None where LOG_REST is
    G,  # [n, V_s] the gradient, may be S; None: not wanted
    g_stride,
    OWN,  # [n, k] memory for h, None where G is
    Z,  # [n, k] and for z
    FACTOR,  # [n]
    WEIGHTS,  # [K, n]
    LABELS,  # [n] or None
    LABEL_WEIGHT,  # [n]
    LOSS,  # [n]
    PARAMETERS,  # 2 K numbers
    n,
    vocab,
    k,
    KINDS: tl.constexpr,  # K
    TAIL: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    IDS += row * k
    LOG_P += row * k
    WEIGHTS += row
    if LISTED is not None:
        LISTED += row * tl.cdiv(vocab, 32)
    if G is not None:
        G += row * g_stride
        OWN += row * k
        Z += row * k
    factor = tl.load(FACTOR + row)
    if factor == 0:
        tl.store(LOSS + row, 0.0)
        if G is not None:
            put_zeros(G, s_width, ODD, BLOCK)
    else:
        inv2 = LOG2E / tl.load(S_TEMPERATURE + row)
        BOTH: tl.constexpr = TAIL == "renormalize_both"
        HARD: tl.constexpr = LABELS is not None
        if LISTED is not None:
            mark(LISTED, IDS, k, vocab, BLOCK, BLOCK_K)
        m_u, l_u = LOWEST, 0.0
        m_hard, l_hard = LOWEST, 0.0
        if HARD or not BOTH:
            m_u, l_u, moved, m_hard, l_hard = row_sums(
                *(S, s_width, s_scale, s_cap, inv2, LISTED, vocab, TAIL == "uniform", HARD, ODD, BLOCK, STAGES)
            )
        m, total = m_u, l_u
        if TAIL != "drop":
            m_k, l_k, count = list_sums(S, IDS, k, s_width, vocab, s_scale, s_cap, inv2, BLOCK_K)
            if BOTH:
                m, total = m_k, l_k
            else:
                m, total = merged(m_u, l_u, m_k, l_k, inv2)
        value, sum_h = outcome_sums(
            *(S, IDS, LOG_P, OWN, Z, k, s_width, vocab, s_scale, s_cap, inv2, m, total),
            *(WEIGHTS, n, PARAMETERS, KINDS, BLOCK_K),
        )
        even = 0.0
        if TAIL == "uniform":
            others = (vocab - count).to(tl.float32)
            sum_log_q = (moved + others * ((m_u - m) * inv2)) / LOG2E - others * tl.log(total)
            phi, even = even_rest(tl.load(LOG_REST + row), others, sum_log_q, WEIGHTS, n, KINDS)
            value += phi
            sum_h += even * others
        if BOTH:
            value = tl.where(count == 0, float("nan"), value)
        m_r, r_r, c_r = m, 1 / total, -sum_h
        if LISTED is not None and TAIL != "uniform":  # the others are one more outcome
            lp = tl.load(LOG_REST + row)
            lq = (m_u - m) * inv2 / LOG2E + tl.log(l_u) - tl.log(total)
            q = tl.exp(lq)
            phi, h = terms(lp, lq, tl.exp(lp), q, WEIGHTS, n, PARAMETERS, KINDS)
            value += phi
            sum_h += h
            m_r, r_r, c_r = m_u, tl.where(l_u == 0, 0.0, 1 / l_u), h - times(q, sum_h)
        label = None
        if HARD:
            y, hard, z_hard = label_of(S, LABELS, LABEL_WEIGHT, row, s_width, vocab, s_scale, s_cap)
            value += times(hard, tl.log(l_hard) - (z_hard - m_hard))
            label = (y, hard, m_hard, l_hard)
        tl.store(LOSS + row, value)
        if G is not None:
            if BOTH:  # what is not listed has no part, and where nothing is listed there is no softmax
                c_r, even = None, tl.where(count == 0, float("nan"), 0.0)
            put_all(S, G, s_width, s_scale, s_cap, inv2, factor, m_r, r_r, c_r, even, label, vocab, ODD, BLOCK, STAGES)
            tl.debug_barrier()  # what is listed is written over
            put_listed(
                *(G, s_width, s_scale, s_cap, inv2, factor, m, 1 / total, -sum_h),
                label,
                *(IDS, OWN, Z, k, TAIL == "drop", BLOCK_K, BLOCK_R),
            )
