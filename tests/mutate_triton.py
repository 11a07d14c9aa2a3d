"""Mutation of the Triton kernels: breaks them in one place at a time and expects tests/triton_cases.py to go red.

    python tests/mutate_triton.py [WORD ...]        only the mutants whose name holds one of the words

Works on a temporary copy of the tree, in Triton's interpreter. Exit status 1 if a mutant survives.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest
import torch  # noqa: F401 - imported once for all forks, like triton
import triton  # noqa: F401
from mutate import copy_to, forked, in_turn

ROOT = Path(__file__).parent.parent
COPIED = ("fastkd", "kernels", "tests", "pyproject.toml")
ROWS, TILES, SPARSE, PRIMITIVES = "kernels/rows.py", "kernels/tiles.py", "kernels/sparse.py", "kernels/primitives.py"
SUMS, POINT = "kernels/accumulate.py", "kernels/pointwise.py"
FORWARD, BACKWARD = "kernels/attention_forward.py", "kernels/attention_backward.py"
SCORES, ATTEND = "kernels/attention_tiles.py", "fastkd/attend/tiles_triton.py"
ATTENTION = (FORWARD, BACKWARD, SCORES, ATTEND)
# the tests that go red soonest
SOON = {
    ROWS: "(dense_sizes and 300) or all_of_the_head or log_weights or sum_of_divergences or beyond",
    SPARSE: "sparse or tail or listed or list",
    PRIMITIVES: "primitives or top or stats or argmax or exist",
    SUMS: "sum or accumulate",
    **dict.fromkeys(ATTENTION, "tangents or (bias_of_each and 0011) or (interval and bottom) or softcap"),
}
ROW = "row = tl.program_id(0).to(tl.int64)\n    S += row * s_stride\n"
SHORT = ROW.replace(".to(tl.int64)", "")

# what is broken -> file, text (its first occurrence), what takes its place
MUTANTS = {
    "temperature dropped": (ROWS, "s_inv = 1 / tl.load(S_TEMPERATURE + row)", "s_inv = 1.0 + 0 * factor"),
    "teacher's temperature dropped": (ROWS, "LOG2E / tl.load(T_TEMPERATURE + row)", "LOG2E + 0 * factor"),
    "gap between the tops dropped from forward KL": (ROWS, "cross + l_t * (d_t - d_s)", "cross"),
    "gap between the tops dropped from reverse KL": (ROWS, "cross + l_s * (d_s - d_t)", "cross"),
    "gap between the tops dropped from cross-entropy": (ROWS, "cross - l_t * d_s", "cross"),
    "student's sum not brought to the new top": (ROWS, "l_s = l_s * w_s + q", "l_s = l_s + q"),
    "teacher's sum not brought to the new top": (ROWS, "l_t = l_t * w_t + p", "l_t = l_t + p"),
    "forward KL not brought to the new top": (ROWS, "times(w_t, cross + l_t", "times(1.0, cross + l_t"),
    "0 log 0": (ROWS, "+ times(p, y - x)", "+ p * (y - x)"),
    "last tile of the statistics": (
        ROWS,
        "in tl.range(first, end, BLOCK",
        "in tl.range(first, end // BLOCK * BLOCK, BLOCK",
    ),
    "last tile of phi and h": (
        ROWS,
        "                for v in tl.range(first, end, BLOCK",
        "                for v in tl.range(first, end // BLOCK * BLOCK, BLOCK",
    ),
    "last tile of the gradient": (ROWS, "tl.range(tl.cdiv(end, BLOCK) - 1", "tl.range(end // BLOCK - 1"),
    "first tile of the gradient": (ROWS, "first // BLOCK - 1, -1, num_stages", "first // BLOCK, -1, num_stages"),
    "teacher not normalised in the loss": (ROWS, "tl.log(l_s / l_t) if NORMALIZED", "tl.log(l_s) if NORMALIZED"),
    "mass of log-weights": (ROWS, "a_s * weight * mass", "a_s * weight"),
    "teacher not normalised in the gradient": (
        ROWS,
        "outside / l_s, outside / l_t",
        "outside / l_s, outside",
    ),
    "KL dropped from the gradient of reverse KL": (ROWS, "x - y - gap", "x - y"),
    "sum of h dropped": (ROWS, "g = (h - times(q, total))", "g = h"),
    "weight dropped from the loss of a closed form": (ROWS, "value = times(weight, value)", "value = value"),
    "weight dropped from the gradient of a closed form": (ROWS, "a_s * weight * mass, a_t * weight", "a_s * mass, a_t"),
    "weight dropped from the gradient of reverse KL": (ROWS, "a_s * weight * LN2", "a_s * LN2"),
    "a weight of 0 leaves infinities": (ROWS, "g = tl.where(weight == 0, 0.0, g)", "g = g + 0.0"),
    "weight of a term dropped from the loss": (ROWS, "phi += times(w, f[0])", "phi += f[0]"),
    "weight of a term dropped from the gradient": (ROWS, "h += times(w, f[1])", "h += f[1]"),
    "only one term": (ROWS, "tl.static_range(len(KINDS))", "tl.static_range(1)"),
    "temperature dropped from the gradient": (ROWS, "outside = s_inv * factor", "outside = factor"),
    "weights of the rows dropped": (ROWS, "outside = s_inv * factor", "outside = s_inv"),
    "weights of the rows dropped from the label": (ROWS, "hard * factor, m_s", "hard, m_s"),
    "tiles of the wider source are whole": (ROWS, "tl.minimum(s_width, t_width)", "tl.maximum(s_width, t_width)"),
    "whole tiles walked twice": (TILES, "first, end = end, vocab", "first, end = 0, vocab"),
    "a tile in part taken for a whole one": (
        TILES,
        "end = width // BLOCK * BLOCK if ODD",
        "end = (width + BLOCK - 1) // BLOCK * BLOCK if ODD",
    ),
    "ignored rows keep their gradient": (ROWS, "put_zeros(G, s_width, ODD, BLOCK)", "pass"),
    "label dropped from the loss": (ROWS, "value += times(hard, tl", "value += 0 * times(hard, tl"),
    "label dropped from the gradient": (ROWS, "g += label_gradient(", "g += 0 * label_gradient("),
    "softmax of the label at the temperature": (
        ROWS,
        "l_hard = l_hard * w_hard + tl.exp2((z_s - m_s) * LOG2E)",
        "l_hard = l_hard * w_s + q",
    ),
    "row offsets of 32 bits": (ROWS, ".to(tl.int64)", ""),
    "softcap dropped": (TILES, "z = cap * tanh(z / cap)", "z = z + 0.0"),
    "slope of the softcap dropped": (TILES, "d = 1 - (z / cap) * (z / cap)", "d = 1.0"),
    "logit_scale dropped": (TILES, "z = z * scale", "z = z + 0.0"),
    "logit_scale dropped from the gradient": (TILES, "d = d * scale", "d = d + 0.0"),
    "what is missing counts as 0": (
        TILES,
        'effective(x, scale, cap), -float("inf"))',
        "effective(x, scale, cap), 0.0)",
    ),
    "a label's one": (TILES, "q - tl.where(i == label, 1.0, 0.0)", "q"),
    "a label's softmax": (TILES, "q - tl.where(i == label, 1.0, 0.0)", "-tl.where(i == label, 1.0, 0.0)"),
    "a label that does not exist": (TILES, 'tl.where(bad & (weight != 0), float("nan"), weight)', "weight"),
    "bfloat16 cut off": (TILES, "bits + 0x7FFF + ((bits >> 16) & 1)", "bits"),
    "writes past the row": (TILES, "(i >= 0) & (i < width)", "(i >= 0) & (i < width + 1)"),
    "a step from no top at all": (TILES, "tl.maximum((m - above) * inv2, FAR)", "(m - above) * inv2"),
    "an id past the vocabulary": (TILES, 'tl.where(ids < vocab, -float("inf"), float("nan"))', '-float("inf")'),
    "a NaN of the teacher hidden": (
        POINT,
        "tl.where(m < 1.17549435e-38, 1.17549435e-38, m)",
        "tl.where(m >= 1.17549435e-38, m, 1.17549435e-38)",
    ),
    "a term of Jensen-Shannon": (POINT, "phi = of_small + of_large", "phi = of_large"),
    "h of skew KL": (POINT, "h = -(1 - a) * _times(p, q / m)", "h = -_times(p, q / m)"),
    "sparse: temperature dropped": (SPARSE, "LOG2E / tl.load(S_TEMPERATURE + row)", "LOG2E + 0 * factor"),
    "sparse: what is listed not left out": (SPARSE, 'z = tl.where(other, z, -float("inf"))', "z = z + 0.0"),
    "sparse: a bit per two entries": (SPARSE, "tl.arange(0, 32)[None, :]", "(tl.arange(0, 32) // 2 * 2)[None, :]"),
    "sparse: bitmap not cleared": (
        SPARSE,
        "tl.store(LISTED + i, tl.zeros([BLOCK], tl.int32)",
        "tl.store(LISTED + i, tl.zeros([BLOCK], tl.int32) + 9",
    ),
    "sparse: last tile of the row": (
        SPARSE,
        "in tl.range(first, end, BLOCK",
        "in tl.range(first, end // BLOCK * BLOCK, BLOCK",
    ),
    "sparse: last tile of the gradient": (SPARSE, "tl.range(tl.cdiv(end, BLOCK) - 1", "tl.range(end // BLOCK - 1"),
    "sparse: sum not brought to the new top": (SPARSE, "total = total * w + tl.exp2(x)", "total = total + tl.exp2(x)"),
    "sparse: parts not brought to one top": (SPARSE, "l1 * tl.exp2((m1 - m) * inv2)", "l1"),
    "sparse: tail dropped from the loss": (SPARSE, "value += phi\n            sum_h += h\n", "sum_h += h\n"),
    "sparse: tail dropped from sum h": (SPARSE, "value += phi\n            sum_h += h\n", "value += phi\n"),
    "sparse: tail dropped from the gradient": (SPARSE, "1 / l_u), h - times(q, sum_h)", "1 / l_u), -times(q, sum_h)"),
    "sparse: sum of h dropped outside": (SPARSE, "1 / l_u), h - times(q, sum_h)", "1 / l_u), h"),
    "sparse: sum of h dropped inside": (SPARSE, "m, 1 / total, -sum_h),\n", "m, 1 / total, 0 * sum_h),\n"),
    "sparse: gradient of what drop leaves out": (SPARSE, "c_r = m, 1 / total, -sum_h", "c_r = m, 1 / total, 0 * sum_h"),
    "sparse: own h dropped": (SPARSE, "g = (own + times(", "g = (0 * own + times("),
    "sparse: an id that stands twice": (SPARSE, 'TAIL == "drop", BLOCK_K', "False, BLOCK_K"),
    "sparse: only the last tile of repeats": (SPARSE, "own += tl.sum(tl.where(same", "own = tl.sum(tl.where(same"),
    "sparse: even tail dropped from the loss": (SPARSE, "value += phi\n            sum_h += even", "sum_h += even"),
    "sparse: even tail dropped from sum h": (SPARSE, "sum_h += even * others", "sum_h += 0 * even"),
    "sparse: even tail dropped from the gradient": (
        SPARSE,
        "tl.zeros([BLOCK], tl.float32) + even",
        "tl.zeros([BLOCK], tl.float32)",
    ),
    "sparse: entropy of the even tail": (SPARSE, "if KINDS[k] == FORWARD else 0.0", "if KINDS[k] == -1 else 0.0"),
    "sparse: sum of x not brought to the new top": (SPARSE, "moved += count * d +", "moved += 0 * d +"),
    "sparse: both not renormalised": (SPARSE, "m, total = m_k, l_k", "m, total = m_k, l_k * 0 + 1"),
    "sparse: nothing listed": (SPARSE, 'tl.where(count == 0, float("nan"), value)', "value"),
    "sparse: padding counts": (SPARSE, "count += tl.where(ids >= 0, 1, 0)", "count += tl.where(ids >= -1, 1, 0)"),
    "sparse: weights of the rows dropped": (
        SPARSE,
        "slope(z, scale, cap) * factor, width, WHOLE)\n\n\n@triton.jit\ndef put_listed",
        "slope(z, scale, cap), width, WHOLE)\n\n\n@triton.jit\ndef put_listed",
    ),
    "sparse: weights of the rows dropped from the list": (
        SPARSE,
        "put(G, ids, g * slope(z, scale, cap) * factor",
        "put(G, ids, g * slope(z, scale, cap)",
    ),
    "sparse: slope dropped from the list": (
        SPARSE,
        "put(G, ids, g * slope(z, scale, cap) * factor",
        "put(G, ids, g * factor",
    ),
    "sparse: label dropped from the loss": (SPARSE, "value += times(hard, tl", "value += 0 * times(hard, tl"),
    "sparse: label dropped from the gradient": (SPARSE, "g += label_gradient(z, i,", "g += 0 * label_gradient(z, i,"),
    "sparse: label dropped from the list": (SPARSE, "g += label_gradient(z, ids,", "g += 0 * label_gradient(z, ids,"),
    "sparse: ignored rows keep their gradient": (SPARSE, "put_zeros(G, s_width, ODD, BLOCK)", "pass"),
    "sparse: first tile of a list alone, marked": (
        SPARSE,
        "for j in range(0, k, BLOCK_K):\n        ids = tl.load(IDS + j",
        "for j in range(0, BLOCK_K, BLOCK_K):\n        ids = tl.load(IDS + j",
    ),
    "sparse: last tile of a list": (
        SPARSE,
        "    for j in range(0, k, BLOCK_K):\n        i = j",
        "    for j in range(0, k // BLOCK_K * BLOCK_K, BLOCK_K):\n        i = j",
    ),
    "sparse: row offsets of 32 bits": (SPARSE, ".to(tl.int64)", ""),
    "select: temperature dropped": (
        PRIMITIVES,
        "LOG2E / tl.load(S_TEMPERATURE + row)",
        "LOG2E + 0 * tl.load(S_TEMPERATURE + row)",
    ),
    "select: not normalised": (PRIMITIVES, "* LN2 - tl.log(total), mask=i < k", "* LN2, mask=i < k"),
    "select: gradient of the softmax": (PRIMITIVES, "r, c = 1 / total, -mass", "r, c = 1 / total, 0 * mass"),
    "select: an id that stands twice": (PRIMITIVES, "IDS, D, Z, k, True", "IDS, D, Z, k, False"),
    "select: row offsets of 32 bits": (
        PRIMITIVES,
        f"{ROW}    IDS += row * k\n    OUT",
        f"{SHORT}    IDS += row * k\n    OUT",
    ),
    "select: last tile of a list": (
        PRIMITIVES,
        "for j in range(0, k, BLOCK_K)",
        "for j in range(0, k // BLOCK_K * BLOCK_K, BLOCK_K)",
    ),
    "stats: moment not brought to the new top": (PRIMITIVES, "moment + total * d)", "moment)"),
    "stats: argmax of equals": (PRIMITIVES, "tile_top > top", "tile_top >= top"),
    "stats: gradient at the argmax": (PRIMITIVES, "tl.where(i == at, d_max, 0.0)", "0.0"),
    "stats: entropy's gradient": (PRIMITIVES, "(x * LN2 - log_norm + entropy)", "(x * LN2 - log_norm)"),
    "stats: last tile of the gradient": (
        PRIMITIVES,
        "tl.range(tl.cdiv(end, BLOCK) - 1",
        "tl.range(end // BLOCK - 1",
    ),
    "stats: row offsets of 32 bits": (PRIMITIVES, f"{ROW}    inv2", f"{SHORT}    inv2"),
    "top: NaN has no rank": (PRIMITIVES, "tl.where(z == z, key, 0)", "key"),
    "top: 0 above -0": (PRIMITIVES, "tl.where(z == 0, 0.0, z).to", "z.to"),
    "top: order of negative numbers": (
        PRIMITIVES,
        "bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ 0x7FFFFFFF",
        "bits ^ 0x7FFFFFFF",
    ),
    "top: prefix not looked at": (PRIMITIVES, "(keys >> (shift + 8)) == (key >> (shift + 8))", "keys == keys"),
    "top: one equal too few": (PRIMITIVES, "tl.cumsum(equal, 0) <= left", "tl.cumsum(equal, 0) < left"),
    "top: equals of each tile": (PRIMITIVES, "left -= tl.sum(equal, 0)", "left -= 0"),
    "top: place in the list": (PRIMITIVES, "found += tl.sum(taken.to(tl.int32), 0)", "found += 0"),
    "top: what is found stays in the tail": (PRIMITIVES, 'z = tl.where(taken, -float("inf"), z)', "z = z + 0.0"),
    "top: tail's gradient": (PRIMITIVES, "1 / l_u), d_tail - times(", "1 / l_u), -times("),
    "top: gradient of the softmax": (PRIMITIVES, "m, 1 / total, -mass),\n", "m, 1 / total, 0 * mass),\n"),
    "top: gradient of the tail's softmax": (PRIMITIVES, "mass += d_tail", "mass += 0 * d_tail"),
    "find: row offsets of 32 bits": (
        PRIMITIVES,
        f"{ROW}    IDS += row * k\n    Z",
        f"{SHORT}    IDS += row * k\n    Z",
    ),
    "top: row offsets of 32 bits": (
        PRIMITIVES,
        f"{ROW}    IDS += row * k\n    LOG_PROBS",
        f"{SHORT}    IDS += row * k\n    LOG_PROBS",
    ),
    "lower bits of a sum dropped": (SUMS, "return (high << 16) | (low << 8)", "return (high << 16)"),
    "a sum cut off": (SUMS, "+ ((1 << (CUT - 1)) - 1) + ((bits >> CUT) & 1)", "+ 0"),
    "a sum rounded away from even": (SUMS, "+ ((bits >> CUT) & 1)", "+ 1"),
    "NaN of a sum": (SUMS, "tl.where(x == x, bits", "tl.where(bits == bits, bits"),
    "a sum not set": (SUMS, "if not FIRST:", "if True:"),
    "a sum not added to": (SUMS, "if not FIRST:", "if False:"),
    "attention: sum not brought to the new top": (FORWARD, "tl.sum(p, 1), total * shrink", "tl.sum(p, 1), total"),
    "attention: output not brought to the new top": (FORWARD, "dot(e, v, out * shrink[:, None])", "dot(e, v, out)"),
    "attention: tangent not brought to the new top": (
        FORWARD,
        "tangent = tangent * shrink[:, None]",
        "tangent = tangent",
    ),
    "attention: H not brought to the new top": (FORWARD, "bent = bent * shrink -", "bent = bent -"),
    "attention: H V dropped": (
        FORWARD,
        "tangent = dot(rounded(p, V.dtype.element_ty), v, tangent)",
        "tangent = tangent",
    ),
    "attention: P tV dropped": (FORWARD, "tangent = dot(e, tv, tangent)", "tangent = tangent"),
    "attention: mu O dropped": (FORWARD, " - bent[:, None] * out)", ")"),
    "attention: mu of a row that sees nothing": (
        FORWARD,
        "mu = tl.where(blind, 0.0, center + bent)",
        "mu = center + bent",
    ),
    "attention: the tangents' mean dropped from mu": (FORWARD, "center + bent)", "bent)"),
    "attention: tangent not brought to another mean": (
        FORWARD,
        "tangent -= (mean - center)",
        "tangent -= 0 * (mean - center)",
    ),
    "attention: H not brought to another mean": (FORWARD, " - (mean - center) * before", ""),
    "attention: mean of the first keys": (FORWARD, "tl.where(mass > before, lean", "tl.where(before == 0, lean"),
    "attention: key head of another group": (
        FORWARD,
        "head(K, k_strides, b, h // group",
        "head(K, k_strides, b, h % group",
    ),
    "attention: maximum of -inf": (FORWARD, "tl.full([BLOCK_M], LOWEST", "tl.full([BLOCK_M], -float('inf')"),
    "attention: NaN where nobody looks": (FORWARD, "there = first < last", "there = first <= last"),
    "attention: scale dropped": (SCORES, "z * scale if th", "z if th"),
    "attention: scale dropped from the tangent": (SCORES, "ts = tz * scale if th", "ts = tz if th"),
    "attention: softcap dropped": (SCORES, "th = tanh(z * (scale / cap))", "th = z * (scale / cap)"),
    "attention: slope of the softcap dropped from the tangent": (
        SCORES,
        "else tz * scale * (1 - th * th)",
        "else tz * scale",
    ),
    "attention: bias dropped": (SCORES, "s += entries(BIAS", "s += 0 * entries(BIAS"),
    "attention: tangent of the bias dropped": (
        SCORES,
        "ts = bent if ts is None else ts + bent",
        "ts = 0 * bent if ts is None else ts",
    ),
    "attention: mask dropped": (SCORES, "i0, j0, i, j) != 0", "i0, j0, i, j) != 2"),
    "attention: intervals dropped where there is a mask": (SCORES, "seen = seen & reached", "seen = seen"),
    "attention: tangent of what is masked": (SCORES, "tl.where(seen, ts, 0.0)", "ts"),
    "attention: an interval one longer": (SCORES, "(low <= at) & (at < high)", "(low <= at) & (at <= high)"),
    "attention: an interval that begins one later": (SCORES, "(low <= at) & (at < high)", "(low < at) & (at < high)"),
    "attention: whole tiles begin too early": (
        SCORES,
        "tl.minimum(tl.cdiv(all_low, OTHER), end)",
        "tl.minimum(all_low // OTHER, end)",
    ),
    "attention: whole tiles end too late": (
        SCORES,
        "tl.minimum(all_high // OTHER, end)",
        "tl.minimum(tl.cdiv(all_high, OTHER), end)",
    ),
    "attention: first tile in part": (
        SCORES,
        "low // OTHER, tl.cdiv(high, OTHER)",
        "tl.cdiv(low, OTHER), tl.cdiv(high, OTHER)",
    ),
    "attention: last tile in part": (SCORES, "low // OTHER, tl.cdiv(high, OTHER)", "low // OTHER, high // OTHER"),
    "attention: tiles after the whole ones": (SCORES, "tl.where(at >= left, at + (right - left), at)", "at"),
    "attention: lse of a row that sees nothing": (SCORES, 'tl.where(lse == -float("inf"), float("inf"), lse)', "lse"),
    "attention: delta dropped": (SCORES, "gts = p * (u - delta)", "gts = p * u"),
    "attention: Dl dropped": (SCORES, "gs = p * (w - dl)", "gs = p * w"),
    "attention: mu dropped from gS": (SCORES, "gs + gts * (ts - mu)", "gs + gts * ts"),
    "attention: second derivative of the softcap": (SCORES, "th * (2 * scale / cap)", "th * (0 * scale / cap)"),
    "attention: slope of the softcap dropped from gz": (SCORES, "gz = gz * (1 - th * th)", "gz = gz"),
    "attention: slope of the softcap dropped from gtz": (SCORES, "gts if th is None else gts * (1 - th * th)", "gts"),
    "attention: columns past D": (SCORES, "mask=inside, other=0.0", "mask=inside, other=1.0"),
    "attention: mu dropped from tP": (BACKWARD, "p * (ts - mu)", "p * ts"),
    "attention: tP G dropped": (BACKWARD, "dv = dot(rounded(p * (ts - mu), Q.dtype.element_ty), g, dv)", "dv = dv"),
    "attention: dV has no output": (BACKWARD, "dv = dot(e, do, dv)", "dv = dv"),
    "attention: dtV": (BACKWARD, "dtv = dot(e, g, dtv)", "dtv = dot(e, do, dtv)"),
    "attention: gtz tQ dropped": (BACKWARD, "dk = dot(gtz, tq, dk)", "dk = dk"),
    "attention: gz Q dropped": (BACKWARD, "dk = dot(rounded(gz, Q.dtype.element_ty), q, dk)", "dk = dk"),
    "attention: dtK": (BACKWARD, "dtk = dot(gtz, q, dtk)", "dtk = dot(rounded(gts, Q.dtype.element_ty), q, dtk)"),
    "attention: scale dropped from dK": (BACKWARD, "dk * scale", "dk"),
    "attention: scale dropped from dtQ": (BACKWARD, "dtq * scale", "dtq"),
    "attention: heads of a group": (BACKWARD, "tl.range(0, group * tiles", "tl.range(0, tiles"),
    "attention: G tV dropped": (
        BACKWARD,
        "w = between(g, tv, between(do, v, None, True), True)",
        "w = between(do, v, None, True)",
    ),
    "attention: gz K dropped": (BACKWARD, "dq = dot(rounded(gz, Q.dtype.element_ty), k, dq)", "dq = dq"),
    "attention: gtz tK dropped": (BACKWARD, "dq = dot(gtz, tk, dq)", "dq = dq"),
    "attention: dtQ": (BACKWARD, "dtq = dot(gtz, k, dtq)", "dtq = dot(gtz, k, dtq + 1e-2)"),
    "attention: queries of no interval in the walk over them": (
        BACKWARD,
        "            live = low < high",
        "            live = low <= high",
    ),
    "attention: bias summed over too few batch entries": (
        BACKWARD,
        "range(sum_batch * sum_heads * sum_i * sum_j)",
        "range(sum_heads * sum_i * sum_j)",
    ),
    "attention: bias summed over one tile of queries": (BACKWARD, "in_i if SUM_I else 1", "1"),
    "attention: bias summed over one tile of keys": (BACKWARD, "in_j if SUM_J else 1", "1"),
    "attention: bias gradient overwritten": (BACKWARD, "gbias += score_gradient", "gbias = score_gradient"),
    "attention: tangent of the bias not summed": (BACKWARD, "gtbias += gts", "gtbias = gts"),
    "attention: first tile alone of a bias": (BACKWARD, "(j0 < end * BLOCK_N)", "(j0 < begin * BLOCK_N + 1)"),
    "attention: rows of a bias not summed": (BACKWARD, "x = tl.sum(x, 0)[None, :]", "x = tl.max(x, 0)[None, :]"),
    "attention: offsets of 32 bits": (SCORES, "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    "attention: rows far apart": (ATTEND, "FAR = 1 << 24", "FAR = 1 << 62"),
    "attention: strides in units of 8 that are none": (ATTEND, "unit = UNIT if even else 1", "unit = UNIT"),
    "attention: spans of the first batch entry": (
        ATTEND,
        "strides if len(start) > 1 else",
        "strides if len(start) > 9 else",
    ),
}


class First:
    """Remembers the first test that goes red."""

    red: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.red is None:
            self.red = report.nodeid.split("::")[-1]


def _run(file: str, chosen: str) -> str | None:
    """The first of the tests of a file that goes red, in this process."""
    first = First()
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-k",
        f"not in_float32 and not bits and ({chosen})",
    ]
    status = pytest.main([*options, file], plugins=[first])
    return (first.red or f"exit status {status}") if status else None


def failing_test(tree: Path, path: str) -> str | None:
    """The first test that goes red when path is broken, of those that do soonest and then of all row by row; in a fork
    of its own, in which the kernels are imported."""
    chosen = [*filter(None, (SOON.get(path), "test"))]
    file = "tests/triton_attention.py" if path in ATTENTION else "tests/triton_cases.py"
    return forked(tree, lambda: next(filter(None, (_run(file, words) for words in chosen)), None))


def main() -> int:
    mutants = {n: m for n, m in MUTANTS.items() if not sys.argv[1:] or any(word in n for word in sys.argv[1:])}
    missing = [n for n, (path, old, _) in mutants.items() if old not in (ROOT / path).read_text()]
    if missing:
        print(f"not in the code any more: {missing}")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_to(tree, COPIED)
        sys.path.insert(0, str(tree))
        import fastkd.testing  # noqa: F401 - of what is not mutated, once for all forks

        for path in {ROWS, FORWARD} & {path if path not in ATTENTION else FORWARD for path, *_ in mutants.values()}:
            red = failing_test(tree, path)
            if red:
                print(f"before any mutation the tree is red: {red}")
                return 1
        return in_turn(tree, mutants, failing_test)


if __name__ == "__main__":
    raise SystemExit(main())
