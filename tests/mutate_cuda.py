"""Mutation of the CUDA kernels: breaks them in one place at a time and expects test_cuda to go red.

    python tests/mutate_cuda.py [WORD ...]        only the mutants whose name holds one of the words

Works on a temporary copy of csrc/ under the emulator; the sources that a mutant touches are compiled again. Exit status
1 if a mutant survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import emulated
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["-O0", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # of 16 bytes off their alignment, too
DEVICE, ROW, DENSE, SPARSE = "gpu_device.cuh", "gpu_row.cuh", "gpu_divergence.cuh", "gpu_sparse.cu"
STATS, TOP, SUM, LAUNCH = "gpu_stats.cu", "gpu_top.cu", "gpu_sum.cu", "gpu_launch.h"

# what is broken -> file, text (its first occurrence), what takes its place
MUTANTS = {
    # rows
    "softcap": (ROW, "cap * tanh_of(z * inner)", "z * scale"),
    "slope of the softcap": (ROW, "return factor * (1.f - y * y);", "return factor + 0.f * y;"),
    "logit_scale": (ROW, "z[k] *= scale;", "z[k] *= 1.f;"),
    "logit_scale in the slope": (ROW, "factor(factor * s.scale)", "factor(factor)"),
    "smaller vocabulary padded with 0": (ROW, "i + k >= width ? -INF :", "i + k >= width ? 0.f :"),
    "rows 32 bits apart": (
        ROW,
        "row * m.stride * size_of(dtype_of<D>(m))",
        "(int)(row * m.stride) * size_of(dtype_of<D>(m))",
    ),
    "misaligned rows taken for aligned": (
        ROW,
        "% 16 == 0;\n  }\n\n  // effective",
        "% 16 >= 0;\n  }\n\n  // effective",
    ),
    "misaligned gradients taken for aligned": (
        ROW,
        "offset * size_of(D)) % 16 == 0;",
        "offset * size_of(D)) % 16 >= 0;",
    ),
    "gradient past the row": (ROW, "if (i + k >= 0 && i + k < width && !(kept", "if (i + k >= 0 && !(kept"),
    "gradient of the last group": (
        ROW,
        "if (i + k >= 0 && i + k < width && !(kept",
        "if (i + k >= 0 && i + 8 <= width && !(kept",
    ),
    "last group": (
        ROW,
        "const int64_t groups = (vocab + offset + GROUP - 1) / GROUP;",
        "const int64_t groups = (vocab + offset) / GROUP;",
    ),
    "last batch of a staged row": (
        ROW,
        "(batch + 1) * step, span.size())",
        "(batch + (batch < 3)) * step, span.size())",
    ),
    "a copy that is not waited for": (ROW, "if (batch == 3) copy_wait<0>();", ""),
    "ignored rows keep their gradient": (ROW, "if (data == nullptr) return;\n    for", "return;\n    for"),
    "a warp's sum": (ROW, "mine = of_warp(lane < warps ?", "mine = of_warp(lane < 1 ?"),
    "sums of the other blocks": (ROW, "mine = of_warp(lane < size ?", "mine = of_warp(lane < 1 ?"),
    "barrier of the cluster": (ROW, "      cluster_arrive();\n      cluster_wait();\n", ""),
    "barrier of the block": (
        ROW,
        "if (lane == 0) put(shared.warp[warp], mine);\n    __syncthreads();",
        "if (lane == 0) put(shared.warp[warp], mine);",
    ),
    "leaving before others have read": (ROW, "    if (STAGED) cluster_wait();\n  }\n};", "  }\n};"),
    "sums not brought to one top": (
        ROW,
        "sum = sum * weight(top, to, c) + o.sum * weight(o.top, to, c);",
        "sum = sum + o.sum;",
    ),
    "product before the difference": (ROW, "return (z - top) * c;", "return fmaf(z, c, -(top * c));"),
    "label's loss": (ROW, "return weight * (q.log()", "return 0.f * (q.log()"),
    "label's gradient": (ROW, "(i == id ? weight : 0.f)", "0.f"),
    "label's softmax": (ROW, "return scale * exp2_fast", "return 0.f * exp2_fast"),
    "a label that nobody looked at": (ROW, "scale = z != z ? NAN :", "scale = z != z ? 0.f :"),
    "label at the given temperature": (ROW, "if (known && c == LOG2E) {", "if (known) {"),
    # dense
    "temperature": (DENSE, "cs = LOG2E * inv", "cs = LOG2E"),
    "temperature in the gradient": (DENSE, "cq = weight * inv * mass / s", "cq = weight * mass / s"),
    "temperature in a sum's gradient": (DENSE, "grad[k] = inv * (q == 0.f", "grad[k] = (q == 0.f"),
    "teacher's temperature": (DENSE, "ct = LOG2E / a.t.temperature[row]", "ct = LOG2E"),
    "weights of rows": (DENSE, "const Slope slope(a.s, factor);", "const Slope slope(a.s, 1.f);"),
    "weight of the term": (DENSE, "loss *= weight;", ""),
    "weight of a sum's term": (DENSE, "grad[k] = fmaf(w, x.h, grad[k]);", "grad[k] += x.h;"),
    "a term without weight": (DENSE, "if (weight == 0.f) continue;\n    const Term", "const Term"),
    "gap of the tops, forward KL": (DENSE, "wt * (cross + t.sum * (ds - dt))", "wt * cross"),
    "gap of the tops, reverse KL": (DENSE, "ws * (cross + s.sum * (dt - ds))", "ws * cross"),
    "gap of the tops, cross-entropy": (DENSE, "wt * (cross + t.sum * ds)", "wt * cross"),
    "0 times infinity, forward KL": (
        DENSE,
        "cross = p == 0.f ? cross : fmaf(p, y - x, cross);",
        "cross = fmaf(p, y - x, cross);",
    ),
    "0 times infinity, reverse KL": (
        DENSE,
        "cross = q == 0.f ? cross : fmaf(q, x - y, cross);",
        "cross = fmaf(q, x - y, cross);",
    ),
    "0 times infinity, cross-entropy": (
        DENSE,
        "cross = p == 0.f ? cross : fmaf(-p, x, cross);",
        "cross = fmaf(-p, x, cross);",
    ),
    "teacher not normalised": (DENSE, "cp = -weight * inv / unit", "cp = -weight * inv"),
    "weights as given normalised": (DENSE, "unit = normalized ? t : 1.f", "unit = t"),
    "KL in the gradient, reverse KL": (DENSE, "(x - y - shift)", "(x - y)"),
    "sum of h": (DENSE, "fmaf(-q, compared.total, grad[k])", "grad[k]"),
    "NaN hidden by reverse KL": (DENSE, "return q == 0.f ? none :", "return q == 0.f ? 0.f :"),
    "NaN of the teacher hidden by reverse KL": (DENSE, "both.cross / s + none;", "both.cross / s;"),
    "loss of ignored rows": (DENSE, "if (team.leader()) a.loss[row] = 0.f;", ""),
    # sparse
    "tail in the loss": (
        SPARSE,
        "sums.loss += x.phi, sums.h += x.h, sums.rest += x.h;",
        "sums.h += x.h, sums.rest += x.h;",
    ),
    "tail in the sum of h": (
        SPARSE,
        "sums.loss += x.phi, sums.h += x.h, sums.rest += x.h;",
        "sums.loss += x.phi, sums.rest += x.h;",
    ),
    "tail in the gradient": (SPARSE, "sums.rest / split.others.sum - sums.h", "0.f - sums.h"),
    "sum of h outside": (SPARSE, "- sums.h * above / q.sum;\n  else", "- 0.f;\n  else"),
    "sum of h outside, drop": (SPARSE, "sums.rest : -sums.h * above / q.sum;", "sums.rest : 0.f;"),
    "sum of h inside": (SPARSE, "(q == 0.f && total == total ? h : fmaf(-q, total, h))", "h"),
    "mass of the others by subtraction": (
        SPARSE,
        "one.log_q(split.others.top) + split.others.log()",
        "logf(1.f - split.listed.sum * exp2_fast(distance(split.listed.top, q.top, c)) / q.sum)",
    ),
    "both not renormalised": (SPARSE, "apart ? split.listed : whole", "whole"),
    "both, of nothing": (SPARSE, "(nothing ? NAN : sums.loss)", "sums.loss"),
    "even tail in the loss": (SPARSE, "sums.loss += mass * (", "sums.loss += 0.f * mass * ("),
    "even tail in the gradient": (SPARSE, "sums.rest -= weight * u;", "sums.rest -= 0.f;"),
    "entropy of the even tail": (SPARSE, "? log_u : 0.f", "? 0.f : 0.f"),
    "sum of logits not brought to one top": (SPARSE, "moved += count / UNIT * (others.top - to);", ";"),
    "an id that stands twice": (SPARSE, "if (ids[j] == id) h += listed(j, z).h;", ";"),
    "an id that stands twice written twice": (SPARSE, "first = ids[j] != id;", ";"),
    "padding is followed": (
        SPARSE,
        "if (ids[i] >= 0 && ids[i] < vocab && span.has(ids[i]))",
        "if (ids[i] < vocab && span.has(ids[i] < 0 ? 0 : ids[i]))",
    ),
    "entries beyond the row counted": (SPARSE, "if (i < 0 || i >= vocab) set(span, i);", ";"),
    "listed entries overwritten": (
        SPARSE,
        "g.store(span.entry(i), grad, listing.of_group(span, i));",
        "g.store(span.entry(i), grad);",
    ),
    "temperature, sparse": (SPARSE, "c = LOG2E * inv;", "c = LOG2E;"),
    "temperature in the listed gradient": (SPARSE, "float grad = inv * (q == 0.f", "float grad = (q == 0.f"),
    "a term without weight, sparse": (SPARSE, "if (weight == 0.f) continue;\n      const Point", "const Point"),
    "weight of a term, sparse": (SPARSE, "sum.h = fmaf(weight, x.h, sum.h);", "sum.h += x.h;"),
    "weights of rows, sparse": (SPARSE, "const Slope slope(a.s, factor);", "const Slope slope(a.s, 1.f);"),
    "label of a listed entry": (SPARSE, "if (label.weight != 0.f) grad += label.gradient(z, id);", ";"),
    "no mass hidden, sparse": (SPARSE, "if (nothing || (!apart && !(whole.sum > 0.f))) each = NAN;", ""),
    "sum of logits without bound": (SPARSE, "UNIT = 2147483648.f", "UNIT = 1.f"),
    "ids that nobody looked at": (SPARSE, "Point{NAN, NAN}", "Point{0.f, NAN}"),
    "ids that nobody looked at in the gradient": (SPARSE, "Point{NAN, NAN}", "Point{NAN, 0.f}"),
    "ids that nobody looked at among both": (SPARSE, ", sums.rest += own ? 0.f : NAN;", ";"),
    "ids that nobody looked at where q is 0": (SPARSE, "q == 0.f && total == total ?", "q == 0.f ?"),
    "log q of padding": (SPARSE, "nowhere(ids[k]) && team.rank", "ids[k] != -1 && nowhere(ids[k]) && team.rank"),
    "NaN that is not listed, of both": (SPARSE, "each == 0.f || (e == 0.f", "(e == 0.f"),
    "barrier after the bits are cleared": (SPARSE, "words[i] = 0;\n    __syncthreads();", "words[i] = 0;"),
    # statistics
    "entropy": (STATS, "LN2 * all.moment / sum", "0.f * all.moment / sum"),
    "moment not brought to one top": (STATS, "w * (moment + s.sum * distance(s.top, to, c))", "w * moment"),
    "gradient of the largest": (STATS, "== at ? d_max : 0.f", "== at ? 0.f : 0.f"),
    "gradient of the entropy": (STATS, "fmaf(-d_entropy, LN2 * x, even)", "even"),
    "the first of equals": (STATS, "o.at < at", "o.at > at"),
    "lse of infinity": (STATS, "fabsf(all.largest) == INF", "all.largest == -INF"),
    "temperature of statistics": (STATS, "grad[k] = inv * (own", "grad[k] = (own"),
    # the largest
    "a digit": (TOP, "shift >= 0; shift -= 8", "shift > 0; shift -= 8"),
    "sign of the key": (TOP, "bits >> 31 ? ~bits : bits | 0x80000000u", "bits | 0x80000000u"),
    "-0 below 0": (TOP, "INF : z + 0.f", "INF : z"),
    "NaN is not first": (TOP, "z != z ? INF :", "z != z ? 0.f :"),
    "too many of equals": (TOP, "(ties && n_equal < wanted)", "(ties && n_equal <= wanted)"),
    "groups before": (TOP, "above += all & 0xffffu, equal += all >> 16;", ";"),
    "other histograms": (TOP, "copy < COPIES; copy++", "copy < 1; copy++"),
    # sums
    "lower bits": (SUM, "high << 16 | low << 8", "high << 16"),
    "rounding of the sum": (SUM, "u + 0x7fu + (u >> 8 & 1u)", "u"),
    "rounding of the result": (SUM, "(u + 0x7fffu + (u >> 16 & 1u)) >> 16", "u >> 16"),
    "float16 of a sum": (SUM, "accumulate_kernel<Float16>", "accumulate_kernel<BFloat16>"),
    "first is added": (SUM, "a.first ? part : join", "false ? part : join"),
    "last entries of a sum": (
        SUM,
        "k < i + GROUP && k < a.n; k++) {\n      const float part",
        "k < i; k++) {\n      const float part",
    ),
    # launches
    "device is not made current": (
        LAUNCH,
        'if (device != before_) check(cudaSetDevice(device), "choosing a device");',
        "",
    ),
    "device stays current": (LAUNCH, "if (changed_) (void)cudaSetDevice(before_);", ""),
}


def affected(csrc, name):
    """The sources that hold a file or include it."""

    def includes(path):
        own = re.findall(r'#include "(\w+\.\w+)"', path.read_text())
        return {path.name, *(x for y in own if (csrc / y).exists() for x in includes(csrc / y))}

    return [source for source in sorted(csrc.glob("*.cu")) if name in includes(source)]


def failing_test(module):
    """The first test that goes red, or what else the emulator found."""
    env = {**os.environ, "FASTKD_EMULATED": str(module), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--no-header", "-k", "not out_of_bounds"]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_cuda.py"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    red = [line.partition(" ")[2] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    told = [line for line in result.stderr.splitlines() if line.startswith("emulator: ")]
    if result.returncode < 0 or result.returncode > 128:
        told = told or [f"ends by signal {abs(result.returncode)}"]
    if not red and not told:
        raise SystemExit(f"the tests could not be run:\n{result.stdout}{result.stderr}")
    return (told or red)[0].removeprefix("tests/test_cuda.py::")


def mutate(csrc, objects, name):
    """Which test killed the mutant, or what else came of it."""
    path, old, new = MUTANTS[name]
    source = (csrc / path).read_text()
    if old not in source:
        return "[red]its text is no longer in the code"
    (csrc / path).write_text(source.replace(old, new, 1))
    sources = affected(csrc, path)
    with tempfile.TemporaryDirectory() as folder:
        for item in objects.glob("*.o"):
            os.link(item, Path(folder, item.name))
        try:
            for item in sources:
                Path(folder, f"{item.name}.o").unlink()
            module = emulated.build(folder, csrc, ["-w", *QUICK], sources)
            verdict = failing_test(module) or "[red]SURVIVES"
        except subprocess.CalledProcessError:
            verdict = "[red]does not compile"
    (csrc / path).write_text(source)
    return verdict


def main():
    names = [n for n in MUTANTS if not sys.argv[1:] or any(word in n for word in sys.argv[1:])]
    console, table, survivors = Console(), Table("mutant", "killed by", "s"), 0
    with tempfile.TemporaryDirectory() as folder:
        csrc, objects = Path(folder, "csrc"), Path(folder, "objects")
        shutil.copytree(ROOT / "csrc", csrc)
        objects.mkdir()
        red = failing_test(emulated.build(objects, csrc))
        if red:
            console.print(f"[red]before any mutation the tests are red: {red}")
            return 1
        for name in names:
            start = time.perf_counter()
            verdict = mutate(csrc, objects, name)
            survivors += verdict.startswith("[red]")
            table.add_row(name, verdict, f"{time.perf_counter() - start:.0f}")
            console.print(f"{name}: {verdict}")
    console.print(table)
    console.print(f"{len(names) - survivors} of {len(names)} mutants killed")
    return survivors > 0


if __name__ == "__main__":
    raise SystemExit(main())
