"""softmax(softcap(scale q k^T) + bias) v and its tangent, in one walk over the keys.

P = e^(S - m)    H = P (tS - c)    O = sum P v    T = sum P tv + H v    r = sum H / l    tO = T / l - r O    mu = c + r

c is the mean of tS over the first keys that a query sees: H is small where tangents of scores have much in common.
"""

import triton
import triton.language as tl

from fastkd.kernels.attention_tiles import (
    along,
    between,
    dot,
    ends,
    head,
    inside,
    place,
    plane,
    power,
    put_rows,
    reach,
    row_numbers,
    rows,
    score,
    score_tangent,
    squashed,
    step,
    visible,
    walk,
    within,
)
from fastkd.kernels.tiles import LOWEST, rounded


@triton.jit
def attend(
    Q,  # [B, H, Sq, D]
    K,  # [B, Hkv, Skv, D]
    V,  # [B, Hkv, Skv, Dv]
    TQ,  # tangents, like Q, K, V, or None
    TK,
    TV,
    BIAS,  # [B, H, Sq, Skv] or None
    TBIAS,  # or None
    MASK,  # [B, H, Sq, Skv] uint8 or None
    START,  # [B, Sq] int32: query i sees the keys of [start, stop); or None
    STOP,
    FIRST,  # [B, Skv] int32: key j is seen by the queries of [first, last); None with START
    LAST,
    OUT,  # [B, H, Sq, Dv]
    TANGENT,  # like OUT, or None
    LSE,  # [B, H, Sq]
    MU,  # like LSE, None with TANGENT
    q_strides,  # of B, H, S in units of UNIT
    k_strides,
    v_strides,
    tq_strides,
    tk_strides,
    tv_strides,
    out_strides,
    tangent_strides,
    bias_strides,  # of B, H, Sq, Skv; 0: broadcast
    tbias_strides,
    mask_strides,
    spans_stride,  # of B
    keys_stride,
    heads,
    group,  # H / Hkv
    sq,
    skv,
    scale,
    cap,  # None: no softcap
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    i0, b, h = place(sq, heads, BLOCK_M)
    if START is not None:  # the last queries see most
        i0 = (tl.cdiv(sq, BLOCK_M) - 1) * BLOCK_M - i0
        START += b * spans_stride
        STOP += b * spans_stride
        FIRST += b * keys_stride
        LAST += b * keys_stride
    K = head(K, k_strides, b, h // group, UNIT)
    TK = head(TK, tk_strides, b, h // group, UNIT)
    V = head(V, v_strides, b, h // group, UNIT)
    TV = head(TV, tv_strides, b, h // group, UNIT)
    BIAS = plane(BIAS, bias_strides, b, h)
    TBIAS = plane(TBIAS, tbias_strides, b, h)
    MASK = plane(MASK, mask_strides, b, h)
    low, high = ends(START, STOP, i0, sq, skv, BLOCK_M)
    live = low < high
    i = along(within(i0, sq, BLOCK_M, False), True, False)
    q = rows(head(Q, q_strides, b, h, UNIT), i0, q_strides, live, False, UNIT, D, BLOCK_D)
    tq = rows(head(TQ, tq_strides, b, h, UNIT), i0, tq_strides, live, False, UNIT, D, BLOCK_D)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)  # l
    bent = tl.zeros([BLOCK_M], tl.float32)  # sum H
    center = tl.zeros([BLOCK_M], tl.float32)  # c
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    tangent = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    begin, left, right, end = reach(START, STOP, i0, sq, skv, BLOCK_M, BLOCK_N)
    for WHOLE in tl.static_range(2):
        for t in tl.range(0, walk(begin, left, right, end, WHOLE), num_stages=STAGES):
            j0 = step(t, begin, left, right, WHOLE).to(tl.int64) * BLOCK_N
            first, last = ends(FIRST, LAST, j0, skv, sq, BLOCK_N)
            there = first < last
            seen = inside(low[:, None], high[:, None], j0, along(tl.arange(0, BLOCK_N), False, False))
            k = rows(K, j0, k_strides, there, WHOLE, UNIT, D, BLOCK_D)
            tk = rows(TK, j0, tk_strides, there, WHOLE, UNIT, D, BLOCK_D)
            v = rows(V, j0, v_strides, there, WHOLE, UNIT, DV, BLOCK_DV)
            tv = rows(TV, j0, tv_strides, there, WHOLE, UNIT, DV, BLOCK_DV)
            j = along(within(j0, skv, BLOCK_N, WHOLE), False, False)
            seen = visible(MASK, mask_strides, i0, j0, i, j, seen, WHOLE)
            z = between(q, k, None, False)
            tz = between(tq, k, between(q, tk, None, False), False)
            th = squashed(z, scale, cap)
            s = score(z, th, BIAS, bias_strides, i0, j0, i, j, seen, scale, cap)
            ts = score_tangent(tz, th, TBIAS, tbias_strides, i0, j0, i, j, seen, scale)
            top = tl.maximum(m, tl.max(s, 1))
            shrink = power(m - top)
            m = top
            p = power(s - m[:, None])
            mass, before = tl.sum(p, 1), total * shrink
            total = before + mass
            e = rounded(p, V.dtype.element_ty)
            if TANGENT is not None:
                if ts is not None:
                    p, ts = p * ts, p
                    lean = tl.sum(p, 1)
                    mean = tl.where(mass > before, lean / mass, center)
                    tangent -= (mean - center)[:, None] * out
                    bent = bent * shrink - (mean - center) * before + lean - mean * mass
                    center = mean
                    p -= center[:, None] * ts
                tangent = tangent * shrink[:, None]
                if ts is not None:
                    tangent = dot(rounded(p, V.dtype.element_ty), v, tangent)
                if tv is not None:
                    tangent = dot(e, tv, tangent)
            out = dot(e, v, out * shrink[:, None])
    blind = total == 0
    inverse = tl.where(blind, 0.0, 1 / total)
    out = tl.where(blind[:, None], 0.0, out * inverse[:, None])
    put_rows(head(OUT, out_strides, b, h, UNIT), i0, out_strides, out, sq, UNIT, DV)
    i = i0 + tl.arange(0, BLOCK_M)
    lse = tl.where(blind, -float("inf"), m + tl.log(total))
    tl.store(row_numbers(LSE, b, h, heads, sq) + i, lse, mask=i < sq)
    if TANGENT is not None:
        bent = bent * inverse
        mu = tl.where(blind, 0.0, center + bent)
        tangent = tl.where(blind[:, None], 0.0, tangent * inverse[:, None] - bent[:, None] * out)
        put_rows(head(TANGENT, tangent_strides, b, h, UNIT), i0, tangent_strides, tangent, sq, UNIT, DV)
        tl.store(row_numbers(MU, b, h, heads, sq) + i, mu, mask=i < sq)
