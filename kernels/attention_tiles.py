"""What the attention kernels share: where a program is, tiles of rows, scores with their tangent, and their gradients.

A tile is [queries, keys], or [keys, queries] where a program keeps keys (BY_KEYS). A tensor that is None is not there,
nor is what would be made of it (set to None first: Triton 3.6 returns no argument that is None); what nobody uses the
compiler leaves out, GEMMs too. Row strides are in units of UNIT elements, by which the compiler sees how they are
aligned. Where a tile begins has 64 bits, offsets within it have 32.
"""

import triton
import triton.language as tl

from fastkd.kernels.tiles import INTERPRETED, LOG2E, rounded, tanh


@triton.jit
def place(n, heads, BLOCK: tl.constexpr):
    """The first row of this program's tile of n rows, its batch entry and its head, in 64 bits"""
    tiles = tl.cdiv(n, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    return program % tiles * BLOCK, program // tiles // heads, program // tiles % heads


@triton.jit
def head(X, strides, b, h, UNIT: tl.constexpr):
    """X [B, H, S, D] -> [S, D]"""
    at = None
    if X is not None:
        at = X + (b * strides[0] + h * strides[1]) * UNIT
    return at


@triton.jit
def plane(X, strides, b, h):
    """X [B, H, Sq, Skv] -> [Sq, Skv]"""
    at = None
    if X is not None:
        at = X + (b * strides[0] + h * strides[1])
    return at


@triton.jit
def row_numbers(X, b, h, heads, n):
    """X [B, H, n] -> [n]"""
    at = None
    if X is not None:
        at = X + (b * heads + h) * n
    return at


@triton.jit
def offsets(first, strides, UNIT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Of the elements [BLOCK, D] of [S, D] from the row first on"""
    row = tl.arange(0, BLOCK)[:, None] * strides[2] * UNIT
    return first * strides[2] * UNIT + row + tl.arange(0, D)[None, :]


@triton.jit
def rows(X, first, strides, live, WHOLE: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """X [S, D] -> [BLOCK, PADDED] from the row first on; 0 past D and, unless WHOLE, where not live [BLOCK]"""
    x = None
    if X is not None:
        at = X + offsets(first, strides, UNIT, PADDED, live.shape[0])
        inside = tl.arange(0, PADDED)[None, :] < D
        if WHOLE:
            x = tl.load(at) if D == PADDED else tl.load(at, mask=inside, other=0.0)
        else:
            there = live[:, None] if D == PADDED else live[:, None] & inside
            x = tl.load(at, mask=there, other=0.0)
    return x


@triton.jit
def put_rows(X, first, strides, x, n, UNIT: tl.constexpr, D: tl.constexpr):
    """X [n, D] from the row first on = x [BLOCK, PADDED]"""
    row = first + tl.arange(0, x.shape[0])
    there = (row < n)[:, None] & (tl.arange(0, x.shape[1])[None, :] < D)
    at = X + offsets(first, strides, UNIT, x.shape[1], x.shape[0])
    tl.store(at, rounded(x, X.dtype.element_ty), mask=there)


@triton.jit
def numbers(X, first, live, WHOLE: tl.constexpr):
    """X [n] -> [BLOCK] from the row first on, 0 where not live"""
    x = None
    if X is not None:
        at = X + first + tl.arange(0, live.shape[0])
        x = tl.load(at) if WHOLE else tl.load(at, mask=live, other=0.0)
    return x


@triton.jit
def dot(a, b, c):
    """c + a b in float32: three products of TF32 halves would be faster, their sums are cut off, not rounded"""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def between(a, b, c, BY_KEYS: tl.constexpr):
    """c + a b^T, transposed if BY_KEYS; a [queries, D], b [keys, D]; None where nothing is there"""
    total = None
    if a is not None and b is not None:
        total = dot(b, tl.trans(a), c) if BY_KEYS else dot(a, tl.trans(b), c)
    elif c is not None:
        total = c
    return total


@triton.jit
def along(x, QUERIES: tl.constexpr, BY_KEYS: tl.constexpr):
    """x [n], of the queries or of the keys, broadcast over the tile"""
    y = None
    if x is not None:
        y = x[None, :] if QUERIES == BY_KEYS else x[:, None]
    return y


# ---- who sees whom ----


@triton.jit
def ends(START, STOP, first, n, others, BLOCK: tl.constexpr):
    """Of each of n rows from first on the interval [low, high) of the others that it sees; empty past n"""
    i = first.to(tl.int32) + tl.arange(0, BLOCK)
    if START is None:
        low, high = tl.zeros([BLOCK], tl.int32), tl.where(i < n, others, 0)
    else:
        low = tl.maximum(tl.load(START + i, mask=i < n, other=0), 0)
        high = tl.minimum(tl.load(STOP + i, mask=i < n, other=0), others)
    return low, high


@triton.jit
def reach(START, STOP, first, n, others, BLOCK: tl.constexpr, OTHER: tl.constexpr):
    """Tiles of OTHER others: of BLOCK rows of n somebody sees those of [begin, end), everybody all of [left, right)"""
    last = tl.minimum(first + BLOCK, n) - 1
    if START is None:
        low, high, all_low, all_high = 0, others, 0, others
    else:
        low, all_low = tl.maximum(tl.load(START + first), 0), tl.maximum(tl.load(START + last), 0)
        high, all_high = tl.minimum(tl.load(STOP + last), others), tl.minimum(tl.load(STOP + first), others)
    begin, end = low // OTHER, tl.cdiv(high, OTHER)
    left = tl.maximum(tl.minimum(tl.cdiv(all_low, OTHER), end), begin)
    right = tl.maximum(tl.minimum(all_high // OTHER, end), left)
    return begin, left, right, tl.maximum(end, right)


@triton.jit
def inside(low, high, first, i):
    """Which of the others from first on, first + i, lie in [low, high)"""
    at = first.to(tl.int32) + i
    return (low <= at) & (at < high)


@triton.jit
def walk(begin, left, right, end, WHOLE: tl.constexpr):
    """How many tiles are seen as a whole, or in part"""
    return right - left if WHOLE else (end - begin) - (right - left)


@triton.jit
def step(t, begin, left, right, WHOLE: tl.constexpr):
    """Number of the t-th of them"""
    if WHOLE:
        at = left + t
    else:
        at = begin + t
        at = tl.where(at >= left, at + (right - left), at)
    return at


# ---- scores: z = q k^T, S = cap tanh(scale z / cap) + bias ----


@triton.jit
def within(first, n, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Offsets of BLOCK rows of n from first on; unless WHOLE, what lies past the end is the last row again"""
    i = tl.arange(0, BLOCK)
    if not WHOLE:
        i = tl.minimum(i, (n - 1 - first).to(tl.int32))
    return i


@triton.jit
def entries(X, strides, i0, j0, i, j):
    """X [Sq, Skv] at the queries i0 + i and the keys j0 + j, broadcast against each other"""
    return tl.load(X + (i0 * strides[2] + j0 * strides[3]) + (i * strides[2] + j * strides[3]))


@triton.jit
def visible(MASK, strides, i0, j0, i, j, reached, WHOLE: tl.constexpr):
    """Is it seen: reached by an interval, and in the mask; None: all of it"""
    seen = None
    if MASK is not None:
        seen = entries(MASK, strides, i0, j0, i, j) != 0
        if not WHOLE:
            seen = seen & reached
    elif not WHOLE:
        seen = reached
    return seen


@triton.jit
def squashed(z, scale, cap):
    """tanh(scale z / cap), None without a softcap"""
    th = None
    if cap is not None:
        th = tanh(z * (scale / cap))
    return th


@triton.jit
def score(z, th, BIAS, strides, i0, j0, i, j, seen, scale, cap):
    """S, -inf where it is not seen"""
    s = z * scale if th is None else th * cap
    if BIAS is not None:
        s += entries(BIAS, strides, i0, j0, i, j).to(tl.float32)
    return s if seen is None else tl.where(seen, s, -float("inf"))


@triton.jit
def score_tangent(tz, th, TBIAS, strides, i0, j0, i, j, seen, scale):
    """tS = J scale tz + tbias, J = 1 - th^2; 0 where it is not seen, None where there is no tangent"""
    ts = None
    if tz is not None:
        ts = tz * scale if th is None else tz * scale * (1 - th * th)
    if TBIAS is not None:
        bent = entries(TBIAS, strides, i0, j0, i, j).to(tl.float32)
        ts = bent if ts is None else ts + bent
    if ts is not None:
        ts = ts if seen is None else tl.where(seen, ts, 0.0)
    return ts


@triton.jit
def power(x):
    """e^x of a difference of scores: what is large is subtracted before it is brought to base 2, which rounds"""
    return tl.exp2(x * LOG2E)


@triton.jit
def probabilities(s, LSE, first, live, WHOLE: tl.constexpr, BY_KEYS: tl.constexpr):
    """P = e^(S - LSE), 0 in a row that sees nothing"""
    at = LSE + first + tl.arange(0, live.shape[0])
    lse = tl.load(at) if WHOLE else tl.load(at, mask=live, other=-float("inf"))
    lse = tl.where(lse == -float("inf"), float("inf"), lse)
    return power(s - along(lse, True, BY_KEYS))


# ---- and their gradients ----


@triton.jit
def tangent_gradient(p, u, delta, ts):
    """gtS = P (U - delta), None where no tangent of S is"""
    gts = None
    if ts is not None:
        gts = p * (u - delta)
    return gts


@triton.jit
def score_gradient(p, w, dl, gts, ts, mu):
    """gS = P (W - Dl) + gtS (tS - mu)"""
    gs = p * (w - dl)
    return gs if gts is None else gs + gts * (ts - mu)


@triton.jit
def raw_gradient(gs, gts, tz, th, scale, cap):
    """That of scale z: J gS - 2 y / cap^2 J scale tz gtS, y = cap th"""
    gz = gs
    if th is not None:
        if tz is not None:
            gz = gz - gts * tz * th * (2 * scale / cap)
        gz = gz * (1 - th * th)
    return gz


@triton.jit
def raw_tangent_gradient(gts, th, dtype: tl.constexpr):
    """That of scale tz: J gtS, as the next product takes it"""
    gtz = None
    if gts is not None:
        gtz = rounded(gts if th is None else gts * (1 - th * th), dtype)
    return gtz
