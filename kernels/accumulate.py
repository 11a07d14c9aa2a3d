"""A float32 sum that is kept in 24 bits: the upper 16 are a bfloat16, the lower 8 lie beside it."""

import triton
import triton.language as tl


@triton.jit
def joined(HIGH, LOW, i, n):
    """The float32 whose upper 24 bits are in HIGH and LOW, as bits"""
    high = tl.load(HIGH + i, mask=i < n, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
    low = tl.load(LOW + i, mask=i < n, other=0).to(tl.uint32)
    return (high << 16) | (low << 8)


@triton.jit
def to_even(bits, CUT: tl.constexpr):
    """bits of a float32, rounded to the nearest of those that end in CUT zeros (and then any bits); NaN stays NaN"""
    x = bits.to(tl.float32, bitcast=True)
    return tl.where(x == x, bits + ((1 << (CUT - 1)) - 1) + ((bits >> CUT) & 1), 0x7FC00000)


@triton.jit
def accumulate(
    HIGH,  # [n] int16, the bits of bfloat16
    LOW,  # [n] uint8
    PART,  # [n]
    n,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum = part (FIRST) or sum += part"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(PART + i, mask=i < n, other=0.0).to(tl.float32)
    if not FIRST:
        total += joined(HIGH, LOW, i, n).to(tl.float32, bitcast=True)
    bits = to_even(total.to(tl.uint32, bitcast=True), 8)
    tl.store(HIGH + i, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=i < n)
    tl.store(LOW + i, ((bits >> 8) & 255).to(tl.uint8), mask=i < n)


@triton.jit
def round_sum(
    HIGH,  # [n] int16, the bits of bfloat16
    LOW,  # [n] uint8
    n,
    BLOCK: tl.constexpr,
):
    """HIGH = the sum, rounded to bfloat16"""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = to_even(joined(HIGH, LOW, i, n), 16)
    tl.store(HIGH + i, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=i < n)
