"""What the row kernels share: tiles of effective logits, online softmax, labels, and gradients on their way out.

One program a row. A program moves its row pointers by row * stride in 64 bits; columns are 32 bits. An argument that is
None is not there: no softcap, no labels, no gradient; Triton compiles a kernel for what is there.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # an online maximum starts here: differences from it are defined
FAR = tl.constexpr(-1e30)  # a step of the maximum, at most: 0 * FAR is 0


@triton.jit
def times(p, x):
    """p * x with 0 * anything = 0"""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def tanh(x):
    """sign(x) (1 - e^-2|x|) / (1 + e^-2|x|), and near 0, where that cancels, its continued fraction"""
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    xx = x * x
    near = a < 0.5
    top = tl.where(near, x * (945 + xx * (105 + xx)), tl.where(x < 0, e - 1, 1 - e))
    return top / tl.where(near, 945 + xx * (420 + 15 * xx), 1 + e)


@triton.jit
def effective(x, scale, cap):
    """z = cap tanh(scale x / cap)"""
    z = x.to(tl.float32)
    if scale is not None:
        z = z * scale
    if cap is not None:
        z = cap * tanh(z / cap)
    return z


@triton.jit
def slope(z, scale, cap):
    """dz / dx"""
    d = 1.0
    if cap is not None:
        d = 1 - (z / cap) * (z / cap)
    if scale is not None:
        d = d * scale
    return d


@triton.jit
def columns(width, vocab, WHOLE: tl.constexpr, ODD: tl.constexpr, BLOCK: tl.constexpr):
    """[first, end) of the tiles that lie within the width (WHOLE), or of those after them; not ODD: all are after

    A mask at an odd width leaves no wide loads and stores, and only where the row ends is one needed.
    """
    first = 0
    end = width // BLOCK * BLOCK if ODD else 0
    if not WHOLE:
        first, end = end, vocab
    return first, end


@triton.jit
def logits(X, i, width, scale, cap, WHOLE: tl.constexpr, EVICT: tl.constexpr):
    """X [width] a row, i [BLOCK] columns, all of them there if WHOLE -> z [BLOCK]; -inf past the width"""
    if WHOLE:
        z = effective(tl.load(X + i, eviction_policy=EVICT), scale, cap)
    else:
        x = tl.load(X + i, mask=i < width, other=0.0, eviction_policy=EVICT)
        z = tl.where(i < width, effective(x, scale, cap), -float("inf"))
    return z


@triton.jit
def gather(X, ids, width, vocab, scale, cap):
    """z at ids [BLOCK]; -inf where the id is negative or past the width, NaN where it is past the vocabulary"""
    there = (ids >= 0) & (ids < width)
    z = effective(tl.load(X + ids, mask=there, other=0.0), scale, cap)
    return tl.where(there, z, tl.where(ids < vocab, -float("inf"), float("nan")))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as dtype, to the nearest; the interpreter would cut bfloat16 off"""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, even, x)
    return x.to(dtype)


@triton.jit
def put(G, i, g, width, WHOLE: tl.constexpr):
    """G [width] at i [BLOCK] = g, as far as G goes, which is all of it if WHOLE"""
    if WHOLE:
        tl.store(G + i, rounded(g, G.dtype.element_ty), eviction_policy="evict_first")
    else:
        tl.store(G + i, rounded(g, G.dtype.element_ty), mask=(i >= 0) & (i < width), eviction_policy="evict_first")


@triton.jit
def put_zeros(G, width, ODD: tl.constexpr, BLOCK: tl.constexpr):
    """G [width] = 0"""
    for WHOLE in tl.static_range(1 + ODD):
        first, end = columns(width, width, WHOLE, ODD, BLOCK)
        for v in range(first, end, BLOCK):
            put(G, v + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32), width, WHOLE)


@triton.jit
def raised(m, z, inv2):
    """The maximum of m and z [BLOCK]; its step (m - m') inv2 <= 0, and the factor 2^step of what was measured from m"""
    above = tl.maximum(m, tl.max(z, 0))
    step = tl.maximum((m - above) * inv2, FAR)
    return above, step, tl.exp2(step)


@triton.jit
def label_of(S, LABELS, LABEL_WEIGHT, row, width, vocab, scale, cap):
    """The row's label, its weight and its z; no weight is an infinity's, an id that there is not is NaN"""
    label = tl.load(LABELS + row)
    weight = tl.load(LABEL_WEIGHT + row)
    bad = (label < 0) | (label >= vocab)
    z = gather(S, tl.where(bad, 0, label), width, vocab, scale, cap)
    return label, tl.where(bad & (weight != 0), float("nan"), weight), z


@triton.jit
def label_gradient(z, i, label, weight, m, total):
    """weight (softmax(z) - onehot), z - m measured at temperature 1, total = sum e^(z - m)"""
    q = tl.exp2((z - m) * LOG2E) / total
    return times(weight, q - tl.where(i == label, 1.0, 0.0))
