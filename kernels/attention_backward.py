"""Gradients of attention and of its tangent, in two walks without atomics: over the queries of a tile of keys, over the
keys of a tile of queries. With the cotangents dO of the output and G of its tangent

    P = e^(S - LSE)    tP = P (tS - mu)    U = G V^T    W = dO V^T + G tV^T
    gtS = P (U - delta)    gS = P (W - Dl + (U - delta) (tS - mu))
    dV = P^T dO + tP^T G    dtV = P^T G
    dK = scale (gz^T Q + gtz^T tQ)    dtK = scale gtz^T Q    dQ = scale (gz K + gtz tK)    dtQ = scale gtz K

where z is S before softcap and bias. Without G this is the backward of plain flash attention.
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
    numbers,
    place,
    plane,
    probabilities,
    put_rows,
    raw_gradient,
    raw_tangent_gradient,
    reach,
    row_numbers,
    rows,
    score,
    score_gradient,
    score_tangent,
    squashed,
    step,
    tangent_gradient,
    visible,
    walk,
    within,
)
from fastkd.kernels.tiles import rounded


@triton.jit
def to_keys(
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
    DO,  # [B, H, Sq, Dv]
    G,  # like DO, or None
    LSE,  # [B, H, Sq]
    MU,  # like LSE, None with G
    DL,  # [B, H, Sq]
    DELTA,  # like DL, None with G
    DK,  # like K, V, TK, TV, or None: not wanted
    DV,
    DTK,
    DTV,
    q_strides,  # of B, H, S in units of UNIT
    k_strides,
    v_strides,
    tq_strides,
    tk_strides,
    tv_strides,
    do_strides,
    g_strides,
    dk_strides,
    dv_strides,
    dtk_strides,
    dtv_strides,
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
    WIDTH: tl.constexpr,  # Dv
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK, dV, dtK, dtV of a tile of keys, summed over the heads that look at it"""
    j0, b, h_kv = place(skv, heads // group, BLOCK_N)
    if START is not None:
        START += b * spans_stride
        STOP += b * spans_stride
        FIRST += b * keys_stride
        LAST += b * keys_stride
    first, last = ends(FIRST, LAST, j0, skv, sq, BLOCK_N)
    there = first < last
    j = along(within(j0, skv, BLOCK_N, False), False, True)
    k = rows(head(K, k_strides, b, h_kv, UNIT), j0, k_strides, there, False, UNIT, D, BLOCK_D)
    tk = rows(head(TK, tk_strides, b, h_kv, UNIT), j0, tk_strides, there, False, UNIT, D, BLOCK_D)
    v = rows(head(V, v_strides, b, h_kv, UNIT), j0, v_strides, there, False, UNIT, WIDTH, BLOCK_DV)
    tv = rows(head(TV, tv_strides, b, h_kv, UNIT), j0, tv_strides, there, False, UNIT, WIDTH, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dtk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dtv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, left, right, end = reach(FIRST, LAST, j0, skv, sq, BLOCK_N, BLOCK_M)
    for WHOLE in tl.static_range(2):
        tiles = walk(begin, left, right, end, WHOLE)
        for t in tl.range(0, group * tiles, num_stages=STAGES):
            h = h_kv * group + t // tiles
            of_q = head(Q, q_strides, b, h, UNIT)
            of_tq = head(TQ, tq_strides, b, h, UNIT)
            of_do = head(DO, do_strides, b, h, UNIT)
            of_g = head(G, g_strides, b, h, UNIT)
            of_lse = row_numbers(LSE, b, h, heads, sq)
            of_mu = row_numbers(MU, b, h, heads, sq)
            of_dl = row_numbers(DL, b, h, heads, sq)
            of_delta = row_numbers(DELTA, b, h, heads, sq)
            of_bias = plane(BIAS, bias_strides, b, h)
            of_tbias = plane(TBIAS, tbias_strides, b, h)
            of_mask = plane(MASK, mask_strides, b, h)
            i0 = step(t % tiles, begin, left, right, WHOLE).to(tl.int64) * BLOCK_M
            low, high = ends(START, STOP, i0, sq, skv, BLOCK_M)
            live = low < high
            seen = inside(first[:, None], last[:, None], i0, along(tl.arange(0, BLOCK_M), True, True))
            q = rows(of_q, i0, q_strides, live, WHOLE, UNIT, D, BLOCK_D)
            tq = rows(of_tq, i0, tq_strides, live, WHOLE, UNIT, D, BLOCK_D)
            i = along(within(i0, sq, BLOCK_M, WHOLE), True, True)
            seen = visible(of_mask, mask_strides, i0, j0, i, j, seen, WHOLE)
            z = between(q, k, None, True)
            tz = between(tq, k, between(q, tk, None, True), True)
            th = squashed(z, scale, cap)
            s = score(z, th, of_bias, bias_strides, i0, j0, i, j, seen, scale, cap)
            ts = score_tangent(tz, th, of_tbias, tbias_strides, i0, j0, i, j, seen, scale)
            p = probabilities(s, of_lse, i0, live, WHOLE, True)
            do = rows(of_do, i0, do_strides, live, WHOLE, UNIT, WIDTH, BLOCK_DV)
            g = rows(of_g, i0, g_strides, live, WHOLE, UNIT, WIDTH, BLOCK_DV)
            mu = along(numbers(of_mu, i0, live, WHOLE), True, True)
            e = rounded(p, Q.dtype.element_ty)
            if DV is not None:
                dv = dot(e, do, dv)
                if ts is not None:
                    dv = dot(rounded(p * (ts - mu), Q.dtype.element_ty), g, dv)
            if DTV is not None:
                dtv = dot(e, g, dtv)
            if DK is not None or DTK is not None:
                w = between(g, tv, between(do, v, None, True), True)
                u = between(g, v, None, True)
                dl = along(numbers(of_dl, i0, live, WHOLE), True, True)
                delta = along(numbers(of_delta, i0, live, WHOLE), True, True)
                gts = tangent_gradient(p, u, delta, ts)
                gtz = raw_tangent_gradient(gts, th, Q.dtype.element_ty)
                if DK is not None:
                    gs = score_gradient(p, w, dl, gts, ts, mu)
                    gz = raw_gradient(gs, gts, tz, th, scale, cap)
                    dk = dot(rounded(gz, Q.dtype.element_ty), q, dk)
                    if tq is not None:
                        dk = dot(gtz, tq, dk)
                if DTK is not None:
                    dtk = dot(gtz, q, dtk)
    if DK is not None:
        put_rows(head(DK, dk_strides, b, h_kv, UNIT), j0, dk_strides, dk * scale, skv, UNIT, D)
    if DTK is not None:
        put_rows(head(DTK, dtk_strides, b, h_kv, UNIT), j0, dtk_strides, dtk * scale, skv, UNIT, D)
    if DV is not None:
        put_rows(head(DV, dv_strides, b, h_kv, UNIT), j0, dv_strides, dv, skv, UNIT, WIDTH)
    if DTV is not None:
        put_rows(head(DTV, dtv_strides, b, h_kv, UNIT), j0, dtv_strides, dtv, skv, UNIT, WIDTH)


@triton.jit
def to_queries(
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
    DO,  # [B, H, Sq, Dv]
    G,  # like DO, or None
    LSE,  # [B, H, Sq]
    MU,  # like LSE, None with G
    DL,  # [B, H, Sq]
    DELTA,  # like DL, None with G
    DQ,  # like Q, or None: not wanted
    DTQ,
    q_strides,  # of B, H, S in units of UNIT
    k_strides,
    v_strides,
    tq_strides,
    tk_strides,
    tv_strides,
    do_strides,
    g_strides,
    dq_strides,
    dtq_strides,
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
    WIDTH: tl.constexpr,  # Dv
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dQ, dtQ of a tile of queries"""
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
    do = rows(head(DO, do_strides, b, h, UNIT), i0, do_strides, live, False, UNIT, WIDTH, BLOCK_DV)
    g = rows(head(G, g_strides, b, h, UNIT), i0, g_strides, live, False, UNIT, WIDTH, BLOCK_DV)
    LSE = row_numbers(LSE, b, h, heads, sq)
    mu = along(numbers(row_numbers(MU, b, h, heads, sq), i0, live, False), True, False)
    dl = along(numbers(row_numbers(DL, b, h, heads, sq), i0, live, False), True, False)
    delta = along(numbers(row_numbers(DELTA, b, h, heads, sq), i0, live, False), True, False)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dtq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, left, right, end = reach(START, STOP, i0, sq, skv, BLOCK_M, BLOCK_N)
    for WHOLE in tl.static_range(2):
        for t in tl.range(0, walk(begin, left, right, end, WHOLE), num_stages=STAGES):
            j0 = step(t, begin, left, right, WHOLE).to(tl.int64) * BLOCK_N
            first, last = ends(FIRST, LAST, j0, skv, sq, BLOCK_N)
            there = first < last
            seen = inside(low[:, None], high[:, None], j0, along(tl.arange(0, BLOCK_N), False, False))
            k = rows(K, j0, k_strides, there, WHOLE, UNIT, D, BLOCK_D)
            tk = rows(TK, j0, tk_strides, there, WHOLE, UNIT, D, BLOCK_D)
            v = rows(V, j0, v_strides, there, WHOLE, UNIT, WIDTH, BLOCK_DV)
            tv = rows(TV, j0, tv_strides, there, WHOLE, UNIT, WIDTH, BLOCK_DV)
            j = along(within(j0, skv, BLOCK_N, WHOLE), False, False)
            seen = visible(MASK, mask_strides, i0, j0, i, j, seen, WHOLE)
            z = between(q, k, None, False)
            tz = between(tq, k, between(q, tk, None, False), False)
            th = squashed(z, scale, cap)
            s = score(z, th, BIAS, bias_strides, i0, j0, i, j, seen, scale, cap)
            ts = score_tangent(tz, th, TBIAS, tbias_strides, i0, j0, i, j, seen, scale)
            p = probabilities(s, LSE, i0, live, False, False)
            w = between(g, tv, between(do, v, None, False), False)
            u = between(g, v, None, False)
            gts = tangent_gradient(p, u, delta, ts)
            gtz = raw_tangent_gradient(gts, th, Q.dtype.element_ty)
            if DQ is not None:
                gs = score_gradient(p, w, dl, gts, ts, mu)
                gz = raw_gradient(gs, gts, tz, th, scale, cap)
                dq = dot(rounded(gz, Q.dtype.element_ty), k, dq)
                if tk is not None:
                    dq = dot(gtz, tk, dq)
            if DTQ is not None:
                dtq = dot(gtz, k, dtq)
    if DQ is not None:
        put_rows(head(DQ, dq_strides, b, h, UNIT), i0, dq_strides, dq * scale, sq, UNIT, D)
    if DTQ is not None:
        put_rows(head(DTQ, dtq_strides, b, h, UNIT), i0, dtq_strides, dtq * scale, sq, UNIT, D)


@triton.jit
def to_bias(
    Q,  # [B, H, Sq, D]
    K,  # [B, Hkv, Skv, D]
    V,  # [B, Hkv, Skv, Dv]
    TQ,  # tangents, like Q, K, V, or None
    TK,
    TV,
    BIAS,  # [B, H, Sq, Skv]
    TBIAS,  # or None
    MASK,  # [B, H, Sq, Skv] uint8 or None
    START,  # [B, Sq] int32: query i sees the keys of [start, stop); or None
    STOP,
    FIRST,  # [B, Skv] int32: key j is seen by the queries of [first, last); None with START
    LAST,
    DO,  # [B, H, Sq, Dv]
    G,  # like DO, or None
    LSE,  # [B, H, Sq]
    MU,  # like LSE, None with G
    DL,  # [B, H, Sq]
    DELTA,  # like DL, None with G
    DBIAS,  # [b, h, i, j], each 1 or all, or None: not wanted
    DTBIAS,
    q_strides,  # of B, H, S in units of UNIT
    k_strides,
    v_strides,
    tq_strides,
    tk_strides,
    tv_strides,
    do_strides,
    g_strides,
    bias_strides,  # of B, H, Sq, Skv; 0: broadcast
    tbias_strides,
    mask_strides,
    spans_stride,  # of B
    keys_stride,
    own_heads,  # h
    sum_batch,  # B if b is 1, else 1: how many are summed
    sum_heads,
    heads,
    group,  # H / Hkv
    sq,
    skv,
    scale,
    cap,  # None: no softcap
    SUM_I: tl.constexpr,  # is i 1
    SUM_J: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,  # Dv
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the gradients of bias and of its tangent: gS and gtS, summed over what the bias is broadcast over"""
    in_i, in_j = tl.cdiv(sq, BLOCK_M), tl.cdiv(skv, BLOCK_N)
    across = 1 if SUM_J else in_j
    at, own_b, own_h = place(across if SUM_I else in_i * across, own_heads, 1)
    sum_i, sum_j = in_i if SUM_I else 1, in_j if SUM_J else 1
    gbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gtbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in range(sum_batch * sum_heads * sum_i * sum_j):
        b, h = own_b + n // (sum_i * sum_j) // sum_heads, own_h + n // (sum_i * sum_j) % sum_heads
        i0, j0 = (at // across + n // sum_j % sum_i) * BLOCK_M, (at % across + n % sum_j) * BLOCK_N
        of_start, of_stop, of_first, of_last = START, STOP, FIRST, LAST
        if START is not None:
            of_start, of_stop = START + b * spans_stride, STOP + b * spans_stride
            of_first, of_last = FIRST + b * keys_stride, LAST + b * keys_stride
        begin, _, _, end = reach(of_start, of_stop, i0, sq, skv, BLOCK_M, BLOCK_N)
        if (j0 >= begin * BLOCK_N) & (j0 < end * BLOCK_N):
            low, high = ends(of_start, of_stop, i0, sq, skv, BLOCK_M)
            first, last = ends(of_first, of_last, j0, skv, sq, BLOCK_N)
            live, there = low < high, first < last
            seen = inside(low[:, None], high[:, None], j0, along(tl.arange(0, BLOCK_N), False, False))
            q = rows(head(Q, q_strides, b, h, UNIT), i0, q_strides, live, False, UNIT, D, BLOCK_D)
            tq = rows(head(TQ, tq_strides, b, h, UNIT), i0, tq_strides, live, False, UNIT, D, BLOCK_D)
            k = rows(head(K, k_strides, b, h // group, UNIT), j0, k_strides, there, False, UNIT, D, BLOCK_D)
            tk = rows(head(TK, tk_strides, b, h // group, UNIT), j0, tk_strides, there, False, UNIT, D, BLOCK_D)
            i = along(within(i0, sq, BLOCK_M, False), True, False)
            j = along(within(j0, skv, BLOCK_N, False), False, False)
            seen = visible(plane(MASK, mask_strides, b, h), mask_strides, i0, j0, i, j, seen, False)
            z = between(q, k, None, False)
            tz = between(tq, k, between(q, tk, None, False), False)
            th = squashed(z, scale, cap)
            of_bias = plane(BIAS, bias_strides, b, h)
            of_tbias = plane(TBIAS, tbias_strides, b, h)
            s = score(z, th, of_bias, bias_strides, i0, j0, i, j, seen, scale, cap)
            ts = score_tangent(tz, th, of_tbias, tbias_strides, i0, j0, i, j, seen, scale)
            p = probabilities(s, row_numbers(LSE, b, h, heads, sq), i0, live, False, False)
            do = rows(head(DO, do_strides, b, h, UNIT), i0, do_strides, live, False, UNIT, WIDTH, BLOCK_DV)
            g = rows(head(G, g_strides, b, h, UNIT), i0, g_strides, live, False, UNIT, WIDTH, BLOCK_DV)
            v = rows(head(V, v_strides, b, h // group, UNIT), j0, v_strides, there, False, UNIT, WIDTH, BLOCK_DV)
            tv = rows(head(TV, tv_strides, b, h // group, UNIT), j0, tv_strides, there, False, UNIT, WIDTH, BLOCK_DV)
            w = between(g, tv, between(do, v, None, False), False)
            u = between(g, v, None, False)
            mu = along(numbers(row_numbers(MU, b, h, heads, sq), i0, live, False), True, False)
            dl = along(numbers(row_numbers(DL, b, h, heads, sq), i0, live, False), True, False)
            delta = along(numbers(row_numbers(DELTA, b, h, heads, sq), i0, live, False), True, False)
            gts = tangent_gradient(p, u, delta, ts)
            gbias += score_gradient(p, w, dl, gts, ts, mu)
            if DTBIAS is not None:
                gtbias += gts
    # the place of the tile in [b, h, i, j]
    i = 0 if SUM_I else at // across * BLOCK_M
    j = 0 if SUM_J else at % across * BLOCK_N
    n_i, n_j = 1 if SUM_I else sq, 1 if SUM_J else skv
    plane_of = (own_b * own_heads + own_h) * n_i * n_j
    if DBIAS is not None:
        put_tile(DBIAS + plane_of, i, j, gbias, n_i, n_j, SUM_I, SUM_J)
    if DTBIAS is not None:
        put_tile(DTBIAS + plane_of, i, j, gtbias, n_i, n_j, SUM_I, SUM_J)


@triton.jit
def put_tile(X, i0, j0, x, n_i, n_j, SUM_I: tl.constexpr, SUM_J: tl.constexpr):
    """X [n_i, n_j] from i0, j0 on = x [M, N], summed over a dimension of which X has but one"""
    if SUM_I:
        x = tl.sum(x, 0)[None, :]
    if SUM_J:
        x = tl.sum(x, 1)[:, None]
    i, j = i0 + tl.arange(0, x.shape[0])[:, None].to(tl.int64), j0 + tl.arange(0, x.shape[1])[None, :]
    tl.store(X + i * n_j + j, rounded(x, X.dtype.element_ty), mask=(i < n_i) & (j < n_j))
