"""Mutation, the proof of the suite: breaks the code in one place at a time and expects the tests to go red.

    python tests/mutate.py [WORD ...]        only the mutants whose name holds one of the words

Works on a temporary copy of the tree. The C++ is built there for the generic instruction set alone, which the others
share their source with. Takes about a quarter of an hour; exit status 1 if a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from rich.console import Console
from rich.table import Table

Mutants = dict[str, tuple[str, str, str]]  # name -> file, text, its replacement
ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "fastkd", "kernels", "tests", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# in the order in which they go red soonest
QUICK = ["test_kd_loss.py::test_feature_with_the_default_chunk", "test_recipes.py", "test_inputs.py", "test_edges.py"]
QUICK += [
    "test_sparse.py",
    "test_topk.py",
    "test_sparse_errors.py",
    "test_targets.py",
    "test_kd_loss.py::test_divergence_and_both_gradients",
    "test_kd_loss.py::test_sizes",
]
QUICK += ["test_kd_loss.py::test_the_chunk_does_not_matter", "test_memory.py"]

# the same for attention
ATTENTION = ["test_attention.py::test_feature", "test_attention.py::test_feature_in_small_tiles", "test_attention.py"]
ATTENTION += [f"test_attention_{name}.py" for name in ("masks", "regressions", "derivatives", "errors", "random")]

ROWS, TILES, POINT, SPARSE = "csrc/rows.cpp", "csrc/tiles.h", "csrc/pointwise.h", "csrc/sparse.cpp"
TORCH, LISTED = "fastkd/rows_torch.py", "fastkd/sparse.py"
DRIVER, CHUNKS, LOSSES, FUSED = "fastkd/driver.py", "fastkd/chunks.py", "fastkd/losses.py", "fastkd/fused.py"
SCORES, FORWARD, BACKWARD = "csrc/attention_tiles.h", "csrc/attention_forward.h", "csrc/attention_backward.h"
ATTEND, RULES, SPANS = "fastkd/attend/tiles_torch.py", "fastkd/attend/ops.py", "fastkd/attend/inputs.py"
WALK = "v < a.vocab; v += TILE) {\n    const Tile k = tile_sums"

# what is broken -> file, text (its first occurrence), what takes its place
MUTANTS = {
    "C++: temperature dropped": (ROWS, "row.s.inv = 1.f / a.s.temperature[r]", "row.s.inv = 1.f"),
    "C++: teacher's temperature dropped": (ROWS, "row.t.inv = 1.f / a.t.temperature[r]", "row.t.inv = 1.f"),
    "C++: tiles of e^x not brought to one top": (ROWS, "factor * row.cs * k.ws", "factor * row.cs"),
    "C++: tiles of e^y not brought to one top": (ROWS, "(general ? 1.f : k.wt)", "1.f"),
    "C++: tiles of a divergence not brought to one top": (ROWS, "rs = (float)std::exp(-(double)ls)", "rs = 1.f"),
    "C++: gap between the tops dropped from forward KL": (ROWS, "(k.cross - k.lt * gap)", "k.cross"),
    "C++: gap between the tops dropped from reverse KL": (ROWS, "(k.cross + k.ls * gap)", "k.cross"),
    "C++: gap between the tops dropped from the gradient": (ROWS, "row.shift - k.gap", "row.shift"),
    "C++: lower bits of dweight dropped": (ROWS, "(uint32_t)high << 16 | (uint32_t)low << 8", "(uint32_t)high << 16"),
    "C++: softcap dropped": (TILES, "z[i] = cap * fastkd_tanh(z[i] * inner);", "z[i] = cap * inner * z[i];"),
    "C++: slope of the softcap dropped": (TILES, "grad[i] *= f * (1.f - y * y);", "grad[i] *= f + 0.f * y;"),
    "C++: weights dropped from the gradient": (TILES, "f = factor * src.scale", "f = src.scale"),
    "C++: logit_scale dropped from the gradient": (TILES, "f = factor * src.scale", "f = factor"),
    "C++: weights dropped from the plain gradient": (ROWS, "a.factor[r] * a.s.scale, v", "a.s.scale, v"),
    "C++: logit_scale dropped from the plain gradient": (ROWS, "a.factor[r] * a.s.scale, v", "a.factor[r], v"),
    "C++: last tile left out": (ROWS, WALK, WALK.replace("v < a.vocab", "v == 0 || v + TILE <= a.vocab")),
    "C++: smaller vocabulary padded with 0": (TILES, "i < n; i++) z[i] = -INF;", "i < n; i++) z[i] = 0.f;"),
    "C++: teacher not normalised": (ROWS, "row.ct = -c * row.t.scale();", "row.ct = -c;"),
    "C++: weight of a term dropped": (ROWS, "FIRST ? weight * f.h :", "FIRST ? f.h :"),
    "C++: weight of a second term dropped": (ROWS, ": h[i] + weight * f.h;", ": h[i] + f.h;"),
    "C++: 0 log 0": (ROWS, "p3 += p == 0.f ? 0.f : p * (y - x);", "p3 += p * (y - x);"),
    "C++: ignored rows keep their gradient": (ROWS, "if (a.g.data != nullptr) zero_gradient(a.g, r);", ""),
    "C++: sum of h dropped": (ROWS, "row.s.scale() * (float)total", "row.s.scale() * 0.f"),
    "C++: a term of Jensen-Shannon": (POINT, "return {of_small + of_large, p < q", "return {of_large, p < q"),
    "C++: h of skew KL": (POINT, "-c * p * (q / m)", "-p * (q / m)"),
    "C++: label's gradient dropped": (TILES, "grad[id - v] -= weight;", ";"),
    "C++: softmax of a label's temperature": (
        TILES,
        "if (known == nullptr || known->inv != 1.f) q",
        "if (known == nullptr) q",
    ),
    "C++ sparse: tail dropped from the loss": (SPARSE, "o.lp[k] = a.log_rest[r],", "o.lp[k] = -INF,"),
    "C++ sparse: tail dropped from the gradient": (
        SPARSE,
        "(o.h[k] - o.q[k] * total) / rest",
        "(-o.q[k] * total) / rest",
    ),
    "C++ sparse: sum of h dropped outside": (SPARSE, "(o.h[k] - o.q[k] * total) / rest", "o.h[k] / rest"),
    "C++ sparse: sum of h dropped inside": (SPARSE, "o.q[i] * H) - (", "0.f * H) - ("),
    "C++ sparse: gradient of what drop leaves out": (SPARSE, "c = whole ? -total / s.sum : 0", "c = 0"),
    "C++ sparse: an id that stands twice": (SPARSE, "o.again[i] ? w.et[o.id[i]] + value : value", "value"),
    "C++ sparse: even tail dropped from the loss": (
        SPARSE,
        "loss += weight * (entropy - u *",
        "loss += 0 * (entropy - u *",
    ),
    "C++ sparse: even tail dropped from the gradient": (SPARSE, "even -= weight * (float)u;", ";"),
    "C++ sparse: entropy of the even tail": (SPARSE, "? others * u * a.log_rest[r] : 0", "? 0 : 0"),
    "C++ sparse: both not renormalised": (SPARSE, "if (!whole) renormalize(o);", ""),
    "C++ sparse: temperature dropped": (SPARSE, "s.inv = 1.f / src.temperature[r]", "s.inv = 1.f"),
    "C++ sparse: weights dropped": (SPARSE, "s.inv * a.factor[r] * a.s.scale", "s.inv * a.s.scale"),
    "C++ sparse: weight of a term dropped": (SPARSE, "h[i] += weight * f.h;", "h[i] += f.h;"),
    "C++ sparse: marks of a row are left": (SPARSE, "for (int64_t i = 0; i < k; i++) w.et[o.id[i]] = 0.f;", ""),
    "C++ sparse: padding is followed": (SPARSE, "if (ids[k] < 0) continue;", "if (ids[k] < 0) break;"),
    "C++ sparse: mass too small for float32": (SPARSE, "if (!(rest < 1e-25 * s.sum)) return rest;", "return rest;"),
    "C++ sparse: an infinity in the even tail": (SPARSE, " && std::isfinite(sum)) return sum;", ") return sum;"),
    "C++ topk: one stretch too few": (SPARSE, "return sorted[k - 1];", "return sorted[k > 1 ? k - 2 : 0];"),
    "C++ topk: order of equals": (SPARSE, ": i < j; };", ": i > j; };"),
    "C++ topk: tail's gradient": (
        SPARSE,
        "(d_tail - fastkd_exp(tail) * total) / rest",
        "(-fastkd_exp(tail) * total) / rest",
    ),
    "C++ topk: gradient of the softmax": (SPARSE, "given[i] - fastkd_exp(log_q[i]) * (float)total", "given[i]"),
    "torch sparse: tail dropped from the gradient": (TORCH, "rest = h[:, -1:] -", "rest = 0 * h[:, -1:] -"),
    "torch sparse: listed entries' own h": (TORCH, "own = h[:, :k] if t.tail ==", "own = 0 * h[:, :k] if t.tail !="),
    "torch topk: tail's gradient": (TORCH, "grad = _times(share, d_tail) -", "grad = -"),
    "tail's mass not taken as given": (LISTED, "if log_tail is None:\n        log_rest", "if True:\n        log_rest"),
    "not brought to the temperature": (LISTED, "if spec.stored is not None:", "if False:"),
    "mass of what is cut off stays": (
        LISTED,
        "return Listed(spec.tail, ids, kept - total.unsqueeze(-1),",
        "return Listed(spec.tail, ids, kept,",
    ),
    "even tail not shared out": (LISTED, 'if spec.tail == "uniform":\n', "if False:\n"),
    "duplicates not looked for": (
        LISTED,
        "_check_repeats(name, ids, counts &",
        "(lambda *_: None)(name, ids, counts &",
    ),
    "torch: slope of the softcap dropped": (TORCH, "grad = grad * a.student.slope(z) *", "grad = grad *"),
    "torch: temperature dropped from the gradient": (TORCH, "grad = grad / a.s_temperature.unsqueeze(-1)", "pass"),
    "roles not exchanged": (DRIVER, "tuple(d.exchanged for d in row.divergences)", "row.divergences"),
    "temperatures not exchanged": (
        DRIVER,
        "s_temperature=row.t_temperature,\n        t_temperature=row.s_",
        "t_temperature=row.s_",
    ),
    "torch: ignored rows not masked": (TORCH, "torch.where(a.factor.unsqueeze(-1) == 0, 0.0, grad)", "grad"),
    "upstream of each token dropped": (DRIVER, "a.factor if seed is None else a.factor *", "a.factor if True else"),
    "bias dropped": (CHUNKS, "mm(x, w.t(), out=out) if b is None else", "mm(x, w.t(), out=out) if True else"),
    "dweight: only the last chunk": (CHUNKS, "if first else self.wide.addmm_(a, b)", "if True else None"),
    "dweight: only the last chunk, in bfloat16": (
        CHUNKS,
        "self.add(v, block, first)",
        "self.add(v, block, True)",
    ),
    "dbias: only the last chunk": (CHUNKS, "else 0] += g.flatten", "else 0] = g.flatten"),
    "T^2 dropped": (LOSSES, "temperature.square() if t_squared else None", "None"),
    "1 - label_weight dropped": (LOSSES, "None if hard is None else 1 - hard", "None"),
}


# the same for attention
MUTANTS |= {
    "attention, torch: bias dropped": (
        ATTEND,
        "if b.bias is not None:\n        s = s + _cut",
        "if False:\n        s = s + _cut",
    ),
    "attention, torch: tangent of the bias dropped": (ATTEND, "if b.tbias is not None:\n", "if False:\n"),
    "attention, torch: mask dropped": (ATTEND, "hidden = None if self.mask is None else", "hidden = None if True else"),
    "attention, torch: span dropped": (
        ATTEND,
        "return outside if hidden is None else outside | hidden",
        "return hidden",
    ),
    "attention, torch: span or mask": (ATTEND, "outside | hidden", "outside"),
    "attention, torch: scale dropped from the tangent": (ATTEND, "None if ts is None else ts * spec.scale", "ts"),
    "attention, torch: scale dropped from the gradient": (ATTEND, "x.mul_(spec.scale)", "pass"),
    "attention, torch: scale dropped from tangents' gradients": (ATTEND, "grads[0:2] + grads[3:5]", "grads[0:2]"),
    "attention, torch: softcap's slope dropped from the tangent": (ATTEND, "ts = slope * ts\n", "pass\n"),
    "attention, torch: softcap's slope dropped from the gradient": (ATTEND, "gs = gs * slope", "pass"),
    "attention, torch: softcap's slope dropped from the tangent's gradient": (ATTEND, "gts = gts * slope", "pass"),
    "attention, torch: softcap's bend dropped": (ATTEND, "gs if bend is None else gs + bend * gts", "gs"),
    "attention, torch: delta dropped": (ATTEND, "_mul(g, v.mT) - b.delta[:, :, i]", "_mul(g, v.mT)"),
    "attention, torch: dl dropped": (ATTEND, "p * (w - b.dl[:, :, i])", "p * w"),
    "attention, torch: mu dropped from the backward": (ATTEND, "else ts - b.mu[:, :, i]", "else ts"),
    "attention, torch: mu dropped from the tangent": (ATTEND, "t / total - mu * o, (center", "t / total, (center"),
    "attention, torch: tP G dropped from dv": (ATTEND, "dv[:, j] += _mul_t(p * shifted, g)", "pass"),
    "attention, torch: G tV dropped": (ATTEND, "w += _mul(g, b.tv[:, j].mT)", "pass"),
    "attention, torch: P tV dropped": (ATTEND, "t = t + _mul(p, b.tv[:, j])", "pass"),
    "attention, torch: gtS tK dropped from dq": (ATTEND, "dq[:, :, i] += _mul(gts, b.tk[:, j])", "pass"),
    "attention, torch: gtS tQ dropped from dk": (ATTEND, "dk[:, j] += _mul_t(gts, b.tq[:, :, i])", "pass"),
    "attention, torch: gtS (tS - mu) dropped": (ATTEND, "gs += gts * shifted", "pass"),
    "attention, torch: head of another group": (
        ATTEND,
        "x.unflatten(0, (-1, groups))[heads]",
        "x.unflatten(0, (groups, -1)).transpose(0, 1)[heads]",
    ),
    "attention, torch: last partial tile": (
        ATTEND,
        "slice(i, min(i + size, last)) for i in range(first, last, size)",
        "slice(i, i + size) for i in range(first, max(last - size, 0) + 1, size)",
    ),
    "attention, torch: running maximum poisoned": (
        ATTEND,
        "finite = top.masked_fill(top == -torch.inf, 0.0)",
        "finite = top",
    ),
    "attention, torch: sums not brought to one maximum": (ATTEND, "before + mass, shrink * o", "before + mass, o"),
    "attention, torch: tangent not brought to another mean": (ATTEND, "t - shift * o +", "t +"),
    "attention, torch: mean of the first keys": (
        ATTEND,
        ".where(mass > before, center)",
        ".where(before == 0, center)",
    ),
    "attention, torch: tangent not brought to one maximum": (ATTEND, "t = shrink * t\n", "pass\n"),
    "attention, torch: blind queries not cleared": (
        ATTEND,
        "_zeroed(_grouped(x[entry], h, groups).to(wide), blind)",
        "_grouped(x[entry], h, groups).to(wide)",
    ),
    "attention, torch: unseen keys not cleared": (
        ATTEND,
        "_zeroed(x[entry, h].to(wide), unseen)",
        "x[entry, h].to(wide)",
    ),
    "attention, torch: dbias of the last tile alone": (
        ATTEND,
        "part += x.sum_to_size(part.shape)",
        "part.copy_(x.sum_to_size(part.shape))",
    ),
    "attention: dO O dropped from dl": (
        RULES,
        "dl, delta = _dot(d_out, out), None",
        "dl, delta = 0 * _dot(d_out, out), None",
    ),
    "attention: G tO dropped from dl": (
        RULES,
        "dl, delta = dl + _dot(g, dual[0]), _dot(g, out)",
        "dl, delta = dl, _dot(g, out)",
    ),
    "attention: dlse dropped": (RULES, "dl if d_lse is None else dl - d_lse", "dl"),
    "attention: dmu dropped": (RULES, "delta if d_mu is None or delta is None else delta - d_mu", "delta"),
    "attention: gradient through the tangent dropped": (
        RULES,
        "g, d_mu = (*cotangents, None, None)[:4]",
        "g, d_mu = (*cotangents[:2], None, None)[:4]",
    ),
    "attention: more asked for than needed": (
        RULES,
        "tuple(ctx.needs_input_grad[1 : 1 + SMOOTH])",
        "tuple(x is not None for x in ctx.saved_tensors[:SMOOTH])",
    ),
    "attention: a detached tangent saves its inputs": (
        RULES,
        "list(of(tuple(tensors)).primal()), outputs[:2]",
        "tensors, outputs[:2]",
    ),
    "attention: a detached tangent is not one": (RULES, "ctx.mark_non_differentiable(*outputs[2:])", "pass"),
    "attention: silent zero under forward mode": (
        RULES,
        "return Attend.apply(ctx.spec, *dual)[2:]",
        "return tuple(torch.zeros_like(x) for x in Attend.apply(ctx.spec, *dual)[2:])",
    ),
    "attention: causal offset": (
        SPANS,
        "(lengths - queries if causal_alignment",
        "(lengths - queries + 1 if causal_alignment",
    ),
    "attention: causal alignment dropped": (SPANS, 'if causal_alignment == "bottom_right" else 0)', "if False else 0)"),
    "attention: own key left out": (SPANS, "_between(at + right + 1 + nothing", "_between(at + right + nothing"),
    "attention: window's left end": (SPANS, "_between(at - left + nothing", "_between(at - left + 1 + nothing"),
    "attention: lengths dropped from a window": (
        SPANS,
        "stop = nothing + lengths if right is None",
        "stop = nothing + s.keys if right is None",
    ),
    "attention: first key of a sequence dropped": (SPANS, "torch.atleast_2d(start + first)", "torch.atleast_2d(start)"),
    "attention: first query of a sequence dropped": (SPANS, "at = i - base +", "at = i +"),
    "attention: what is behind the last sequence sees": (
        SPANS,
        "torch.cat((cu_k, cu_k[-1:]))",
        "torch.cat((cu_k, cu_k.new_full((1,), s.keys)))",
    ),
    "attention: default scale dropped": (SPANS, "int(query_width) ** -0.5", "1.0"),
    "attention, C++: bias dropped": (
        SCORES,
        "load_entries(p.bias, b, h, i, j, n, add);",
        "__builtin_memset(add, 0, n * sizeof(float));",
    ),
    "attention, C++: tangent of the bias dropped": (
        SCORES,
        "load_entries(p.tbias, b, h, i, j, n, t_add);",
        "__builtin_memset(t_add, 0, n * sizeof(float));",
    ),
    "attention, C++: mask dropped": (SCORES, "if (there(p.mask)) {", "if (false) {"),
    "attention, C++: keys before the interval": (SCORES, "for (int64_t c = 0; c < from; c++) add[c] = -INF;", ""),
    "attention, C++: keys behind the interval": (SCORES, "for (int64_t c = to; c < n; c++) add[c] = -INF;", ""),
    "attention, C++: Q tK dropped": (
        SCORES,
        "if (there(p.tk)) terms[count++] = {q, depth",
        "if (false) terms[count++] = {q, depth",
    ),
    "attention, C++: P tV dropped": (
        FORWARD,
        "if (there(p.tv)) terms[count++] = {seen",
        "if (false) terms[count++] = {seen",
    ),
    "attention, C++: mu dropped from the tangent": (
        FORWARD,
        "t_out[c] * inverse - mean * out[c]",
        "t_out[c] * inverse",
    ),
    "attention, C++: softcap's slope dropped from the tangent": (
        FORWARD,
        "scale * (1.f - u * u) * ts[j]",
        "scale * ts[j]",
    ),
    "attention, C++: head of another group": (FORWARD, "h / (p.heads / p.kv_heads)", "h % p.kv_heads"),
    "attention, C++: last partial tile of keys": (
        FORWARD,
        "j < last; j += w.keys) {",
        "j + w.keys <= last || j == 0; j += w.keys) {",
    ),
    "attention, C++: tangent not brought to one maximum": (FORWARD, "t_out[c] *= shrink;", "t_out[c] *= 1.f;"),
    "attention, C++: tangent not brought to another mean": (FORWARD, "t_out[c] -= shift * out[c];", ";"),
    "attention, C++: mean of the first keys": (FORWARD, "TANGENT && sum > before", "TANGENT && before == 0.f"),
    "attention, C++: a row that sees nothing, by overflow": (
        FORWARD,
        "blind ? 0.f : row.center + mean",
        "row.center + mean",
    ),
    "attention, C++: running maximum poisoned": (FORWARD, "base = top == -INF ? 0.f : top", "base = top"),
    "attention, C++: dl dropped": (BACKWARD, "float g = w[j] - row.dl;", "float g = w[j];"),
    "attention, C++: delta dropped": (BACKWARD, "gt = u[j] - row.delta;", "gt = u[j];"),
    "attention, C++: mu dropped from the backward": (BACKWARD, "away = t - row.mu", "away = t"),
    "attention, C++: gtS (tS - mu) dropped": (BACKWARD, "g += gt * away;", ""),
    "attention, C++: softcap's slope dropped from the gradient": (BACKWARD, "g[j] *= slope;", ";"),
    "attention, C++: softcap's slope dropped from the tangent's gradient": (
        BACKWARD,
        "if (MOVING) gt[j] *= slope;",
        "",
    ),
    "attention, C++: softcap's bend dropped": (BACKWARD, "if (MOVING) g[j] -= twice * tanh[j] * t_z[j] * gt[j];", ""),
    "attention, C++: scale dropped from dk": (BACKWARD, "p.width, p.scale, w.dk +", "p.width, 1.f, w.dk +"),
    "attention, C++: scale dropped from dtq": (BACKWARD, "p.width, p.scale, w.dtq,", "p.width, 1.f, w.dtq,"),
    "attention, C++: gtS tQ dropped from dk": (BACKWARD, "add(dk, plan.moving && there(a.p.tq) ? 2 : 1,", "add(dk, 1,"),
    "attention, C++: tP G dropped from dv": (BACKWARD, "add(dv, plan.moving ? 2 : 1,", "add(dv, 1,"),
    "attention, C++: G tV dropped": (BACKWARD, "plan.full && there(a.p.tv) ? 2 : 1", "1"),
    "attention, C++: dk of the last head of a group": (BACKWARD, "if (g == 0) {", "{"),
    "attention, C++: dbias of the last query alone": (BACKWARD, "out[c] += g[c];", "out[c] = g[c];"),
}


def build(tree: Path) -> bool:
    setup = tree / "setup.py"
    lines = setup.read_text().splitlines()
    setup.write_text("\n".join("X86_64 = False" if line.startswith("X86_64 =") else line for line in lines) + "\n")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "FASTKD_REQUIRE_EXT": "1", "FASTKD_CUDA": "0"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True).returncode == 0


def failing_test(tree: Path, files: list[str], backends: str = "") -> str | None:
    """The first test that goes red."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "FASTKD_TEST_BACKENDS": backends}
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--no-header"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in files)]
    result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    red = [line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not red:
        raise SystemExit(f"the tests could not be run:\n{result.stdout}{result.stderr}")
    return red[0].removeprefix("tests/")


def files_for(name: str) -> list[str]:
    if not name.startswith("attention"):
        return QUICK
    first = {SPANS: ["test_attention_masks.py"], FORWARD: ["test_attend_cpu.py"], BACKWARD: ["test_attend_cpu.py"]}
    return [*first.get(MUTANTS[name][0], ()), *ATTENTION]


def backends_for(name: str) -> str:
    """Those that a mutant of attention can be seen on."""
    if not name.startswith("attention"):
        return ""
    return "cpu" if MUTANTS[name][0].startswith("csrc") else "torch,reference"


def mutate(tree: Path, name: str) -> str:
    """Which test killed the mutant, or what else came of it."""
    path, old, new = MUTANTS[name]
    source = (tree / path).read_text()
    if old not in source:
        return "[red]its text is no longer in the code"
    (tree / path).write_text(source.replace(old, new, 1))
    compiled = path.startswith("csrc")
    if compiled and not build(tree):
        verdict = "[red]does not compile"
    else:
        verdict = failing_test(tree, files_for(name), backends_for(name)) or "[red]SURVIVES"
    (tree / path).write_text(source)
    return verdict


def copy_to(tree: Path, items: tuple[str, ...], *left_behind: str) -> None:
    """Files and folders of the project, to be mutated there."""
    ignored = shutil.ignore_patterns("__pycache__", ".*", *left_behind)
    for item in items:
        source = ROOT / item
        if source.is_dir():
            shutil.copytree(source, tree / item, symlinks=item == "fastkd", ignore=ignored)
        else:
            shutil.copy(source, tree / item)


def forked(tree: Path, search: Callable[[], str | None]) -> str | None:
    """The red test that a search finds within a tree, in a fork of its own: what the mutants share is imported once."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
            red = search() or ""
        os.write(writer, red.encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    with os.fdopen(reader) as pipe:
        red = pipe.read()
    return red or (f"a crash, {status}" if status else None)


def in_turn(tree: Path, mutants: Mutants, failing: Callable[[Path, str], str | None]) -> bool:
    """Breaks a tree by one mutant after the other and says which test, of a broken file, killed it. Did one survive?"""
    survivors = []
    for name, (path, old, new) in mutants.items():
        start = time.perf_counter()
        source = (tree / path).read_text()
        (tree / path).write_text(source.replace(old, new, 1))
        red = failing(tree, path)
        (tree / path).write_text(source)
        survivors += [] if red else [name]
        print(f"{name}: {red or 'SURVIVES'} ({time.perf_counter() - start:.0f} s)", flush=True)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants killed; survivors: {survivors}")
    return bool(survivors)


def main() -> int:
    names = [n for n in MUTANTS if not sys.argv[1:] or any(word in n for word in sys.argv[1:])]
    names.sort(key=lambda n: not MUTANTS[n][0].startswith("csrc"))
    console, table = Console(), Table("mutant", "killed by", "s")
    survivors, built = 0, False
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_to(tree, COPIED, "*.so")
        files = [*dict.fromkeys(file for name in names for file in files_for(name))]
        red = failing_test(tree, files) if build(tree) else "it does not build"
        if red:
            console.print(f"[red]before any mutation the tree is red: {red}")
            return 1
        for name in names:
            start = time.perf_counter()
            if not MUTANTS[name][0].startswith("csrc") and not built:
                built = build(tree)  # without the last mutant of the C++
            verdict = mutate(tree, name)
            survivors += verdict.startswith("[red]")
            table.add_row(name, verdict, f"{time.perf_counter() - start:.0f}")
            console.print(f"{name}: {verdict}")
    console.print(table)
    console.print(f"{len(names) - survivors} of {len(names)} mutants killed")
    return survivors > 0


if __name__ == "__main__":
    raise SystemExit(main())
