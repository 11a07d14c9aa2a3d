"""Rows without a teacher: log-probabilities of listed entries, statistics, the k likeliest entries."""

import triton
import triton.language as tl

from fastkd.kernels.sparse import list_sums, merged, put_all, put_listed, row_sums
from fastkd.kernels.tiles import LN2, LOG2E, LOWEST, columns, gather, logits, put, raised, slope, times


@triton.jit
def put_log_probs(
    S,  # [V_s]
    IDS,  # [k]
    OUT,  # [k]
    D,  # [k] the cotangent of OUT, or None
    Z,  # [k] or None
    k,
    width,
    vocab,
    scale,
    cap,
    inv2,
    m,
    total,
    BLOCK_K: tl.constexpr,
):
    """OUT = log q at ids; z of each into Z; the sum of D"""
    mass = tl.zeros([BLOCK_K], tl.float32)
    for j in range(0, k, BLOCK_K):
        i = j + tl.arange(0, BLOCK_K)
        ids = tl.load(IDS + i, mask=i < k, other=-1)
        z = gather(S, ids, width, vocab, scale, cap)
        z = tl.where(ids >= 0, z, float("nan"))
        tl.store(OUT + i, (z - m) * inv2 * LN2 - tl.log(total), mask=i < k)
        if D is not None:
            mass += tl.load(D + i, mask=i < k, other=0.0)
            tl.store(Z + i, z, mask=i < k)
    return tl.sum(mass, 0)


@triton.jit
def select(
    S,  # [n, V_s] raw logits
    s_stride,
    s_width,
    s_scale,
    s_cap,
    S_TEMPERATURE,  # [n]
    IDS,  # [n, k] int64
    OUT,  # [n, k]
    D,  # [n, k] the cotangent of OUT, None with G
    Z,  # [n, k] memory for z, None with G
    G,  # [n, V_s] the gradient, may be S; or None
    g_stride,
    vocab,
    k,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log q at ids, which may stand twice"""
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    IDS += row * k
    OUT += row * k
    if G is not None:
        G += row * g_stride
        D += row * k
        Z += row * k
    inv2 = LOG2E / tl.load(S_TEMPERATURE + row)
    m, total, _, _, _ = row_sums(S, s_width, s_scale, s_cap, inv2, None, vocab, False, False, ODD, BLOCK, STAGES)
    mass = put_log_probs(S, IDS, OUT, D, Z, k, s_width, vocab, s_scale, s_cap, inv2, m, total, BLOCK_K)
    if G is not None:  # -q sum d, and d where it is listed
        r, c = 1 / total, -mass
        put_all(S, G, s_width, s_scale, s_cap, inv2, 1.0, m, r, c, 0.0, None, vocab, ODD, BLOCK, STAGES)
        tl.debug_barrier()  # what is listed is written over
        put_listed(G, s_width, s_scale, s_cap, inv2, 1.0, m, r, c, None, IDS, D, Z, k, True, BLOCK_K, BLOCK_R)


@triton.jit
def stats(
    S,  # [n, V_s] raw logits
    s_stride,
    s_width,
    s_scale,
    s_cap,
    S_TEMPERATURE,  # [n]
    LSE,  # [n]
    ENTROPY,  # [n]
    MAX_LOG_PROB,  # [n]
    ARGMAX,  # [n] int64
    D_LSE,  # [n] cotangents, None with G
    D_ENTROPY,  # [n]
    D_MAX,  # [n]
    G,  # [n, V_s] the gradient, may be S; or None
    g_stride,
    vocab,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """lse, entropy, max_log_prob, argmax; of a row with a NaN argmax is undefined, of one with +inf lse is NaN"""
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    inv2 = LOG2E / tl.load(S_TEMPERATURE + row)
    m = LOWEST
    top = -float("inf")
    at = 0
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)  # sum 2^x x
    for WHOLE in tl.static_range(ODD, -1, -1):
        first, end = columns(s_width, vocab, WHOLE, ODD, BLOCK)
        for v in tl.range(first, end, BLOCK, num_stages=STAGES):
            z = logits(S, v + tl.arange(0, BLOCK), s_width, s_scale, s_cap, WHOLE, "evict_last")
            tile_top, tile_at = tl.max(z, 0, return_indices=True)  # of equals the lower
            at = tl.where(tile_top > top, v + tile_at, at)
            top = tl.maximum(top, tile_top)
            m, d, w = raised(m, z, inv2)
            x = (z - m) * inv2
            e = tl.exp2(x)
            moment = times(w, moment + total * d) + times(e, x)
            total = total * w + e
    norm = tl.sum(total, 0)
    log_norm = tl.log(norm)
    entropy = log_norm - tl.sum(moment, 0) * LN2 / norm
    tl.store(LSE + row, m * (inv2 * LN2) + log_norm)
    tl.store(ENTROPY + row, entropy)
    tl.store(MAX_LOG_PROB + row, (top - m) * inv2 - log_norm)  # not 0 - log_norm where there is no finite logit
    tl.store(ARGMAX + row, at.to(tl.int64))
    if G is not None:  # q (d_lse - d_max - d_entropy (log q + entropy)), and d_max at argmax
        G += row * g_stride
        d_entropy = tl.load(D_ENTROPY + row)
        d_max = tl.load(D_MAX + row)
        even = tl.load(D_LSE + row) - d_max
        tl.debug_barrier()  # every warp has read what it reads of S besides
        for WHOLE in tl.static_range(1 + ODD):
            first, end = columns(s_width, s_width, WHOLE, ODD, BLOCK)
            for b in tl.range(tl.cdiv(end, BLOCK) - 1, first // BLOCK - 1, -1, num_stages=STAGES):
                i = b * BLOCK + tl.arange(0, BLOCK)
                z = logits(S, i, s_width, s_scale, s_cap, WHOLE, "evict_first")
                x = (z - m) * inv2
                g = times(tl.exp2(x) / norm, even - d_entropy * (x * LN2 - log_norm + entropy))
                g += tl.where(i == at, d_max, 0.0)
                put(G, i, g * (inv2 * LN2) * slope(z, s_scale, s_cap), s_width, WHOLE)


@triton.jit
def order(z):
    """uint32 keys, the smaller the earlier z ranks: NaN, then from the largest on; 0 and -0 are equal"""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    return tl.where(z == z, key, 0)


@triton.jit
def kth_key(S, width, scale, cap, vocab, k, ODD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The key of the kth entry, and how many entries of that key are among the first k: eight bits at a time"""
    digits = tl.arange(0, 256)
    key = tl.zeros([], tl.uint32)
    left = k
    for p in tl.static_range(4):
        shift = 24 - 8 * p
        counts = tl.zeros([256], tl.int32)
        for WHOLE in tl.static_range(ODD, -1, -1):
            first, end = columns(width, vocab, WHOLE, ODD, BLOCK)
            for v in tl.range(first, end, BLOCK, num_stages=STAGES):
                i = v + tl.arange(0, BLOCK)
                keys = order(logits(S, i, width, scale, cap, WHOLE, "evict_last"))
                same = i < vocab
                if p > 0:
                    same = same & ((keys >> (shift + 8)) == (key >> (shift + 8)))
                counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=same)
        digit = tl.sum((tl.cumsum(counts, 0) < left).to(tl.int32), 0)
        left -= tl.sum(tl.where(digits < digit, counts, 0), 0)
        key = key | (digit.to(tl.uint32) << shift)
    return key, left


@triton.jit
def find(
    S,  # [n, V_s] raw logits
    s_stride,
    s_width,
    s_scale,
    s_cap,
    S_TEMPERATURE,  # [n]
    IDS,  # [n, k] int64, of the k largest z, in their order in the row
    Z,  # [n, k] and their z
    TOP,  # [n] max of all others
    TOTAL,  # [n] and their sum 2^x
    vocab,
    k,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The k largest z of a row, of equals the first, and the softmax of the others"""
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    IDS += row * k
    Z += row * k
    inv2 = LOG2E / tl.load(S_TEMPERATURE + row)
    key, left = kth_key(S, s_width, s_scale, s_cap, vocab, k, ODD, BLOCK, STAGES)
    m = LOWEST
    total = tl.zeros([BLOCK], tl.float32)
    found = 0
    for WHOLE in tl.static_range(ODD, -1, -1):
        first, end = columns(s_width, vocab, WHOLE, ODD, BLOCK)
        for v in tl.range(first, end, BLOCK, num_stages=STAGES):
            i = v + tl.arange(0, BLOCK)
            z = logits(S, i, s_width, s_scale, s_cap, WHOLE, "evict_first")
            keys = order(z)
            inside = i < vocab
            equal = (inside & (keys == key)).to(tl.int32)
            taken = (inside & (keys < key)) | ((equal == 1) & (tl.cumsum(equal, 0) <= left))
            place = found + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(IDS + place, i.to(tl.int64), mask=taken)
            tl.store(Z + place, z, mask=taken)
            found += tl.sum(taken.to(tl.int32), 0)
            left -= tl.sum(equal, 0)
            z = tl.where(taken, -float("inf"), z)
            m, _, w = raised(m, z, inv2)
            total = total * w + tl.exp2((z - m) * inv2)
    tl.store(TOP + row, m)
    tl.store(TOTAL + row, tl.sum(total, 0))


@triton.jit
def top(
    S,  # [n, V_s] raw logits
    s_stride,
    s_width,
    s_scale,
    s_cap,
    S_TEMPERATURE,  # [n]
    IDS,  # [n, k] int64
    Z,  # [n, k] memory for z, None with G
    TOP,  # [n] max of what is not listed
    TOTAL,  # [n] and its sum 2^x
    LOG_PROBS,  # [n, k]
    LOG_TAIL,  # [n]
    D_LOG_PROBS,  # [n, k] cotangents, None with G
    D_LOG_TAIL,  # [n]
    G,  # [n, V_s] the gradient, may be S; or None
    g_stride,
    vocab,
    k,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """log q at ids and of all others together"""
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    IDS += row * k
    LOG_PROBS += row * k
    if G is not None:
        G += row * g_stride
        D_LOG_PROBS += row * k
        Z += row * k
    inv2 = LOG2E / tl.load(S_TEMPERATURE + row)
    m_u, l_u = tl.load(TOP + row), tl.load(TOTAL + row)
    m_k, l_k, _ = list_sums(S, IDS, k, s_width, vocab, s_scale, s_cap, inv2, BLOCK_K)
    m, total = merged(m_u, l_u, m_k, l_k, inv2)
    mass = put_log_probs(
        *(S, IDS, LOG_PROBS, D_LOG_PROBS, Z, k, s_width, vocab, s_scale, s_cap, inv2, m, total, BLOCK_K)
    )
    log_tail = (m_u - m) * inv2 * LN2 + tl.log(l_u) - tl.log(total)
    tl.store(LOG_TAIL + row, log_tail)
    if G is not None:  # share d_tail - q (d_tail + sum d) where it is not listed, d - q (d_tail + sum d) where it is
        d_tail = tl.load(D_LOG_TAIL + row)
        mass += d_tail
        r, c = tl.where(l_u == 0, 0.0, 1 / l_u), d_tail - times(tl.exp(log_tail), mass)
        put_all(S, G, s_width, s_scale, s_cap, inv2, 1.0, m_u, r, c, 0.0, None, vocab, ODD, BLOCK, STAGES)
        tl.debug_barrier()  # what is listed is written over
        put_listed(
            *(G, s_width, s_scale, s_cap, inv2, 1.0, m, 1 / total, -mass),
            None,
            *(IDS, D_LOG_PROBS, Z, k, False, BLOCK_K, BLOCK_K),
        )
