"""Mutation, the proof of the suite: breaks the code in one place at a time and expects the tests to go red.

    python tests/mutate.py [WORD ...]        only the mutants whose name holds one of the words

Works on a temporary copy of the tree. The C++ is built there for the generic instruction set alone, which the others
share their source with. Takes about five minutes; exit status 1 if a mutant survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
COPIED = ("csrc", "fastkd", "kernels", "tests", "pyproject.toml", "setup.py", "README.md", "LICENSE")
LEFT_BEHIND = shutil.ignore_patterns("*.so", "__pycache__", ".*")
# in the order in which they go red soonest
QUICK = ["test_kd_loss.py::test_feature_with_the_default_chunk", "test_recipes.py", "test_inputs.py", "test_edges.py"]
QUICK += ["test_targets.py", "test_kd_loss.py::test_divergence_and_both_gradients", "test_kd_loss.py::test_sizes"]
QUICK += ["test_kd_loss.py::test_the_chunk_does_not_matter", "test_memory.py"]

ROWS, POINT, TORCH = "csrc/rows.cpp", "csrc/pointwise.h", "fastkd/rows_torch.py"
DRIVER, CHUNKS, LOSSES, FUSED = "fastkd/driver.py", "fastkd/chunks.py", "fastkd/losses.py", "fastkd/fused.py"
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
    "C++: softcap dropped": (ROWS, "z[i] = cap * fastkd_tanh(z[i] * inner);", "z[i] = cap * inner * z[i];"),
    "C++: slope of the softcap dropped": (ROWS, "grad[i] *= f * (1.f - y * y);", "grad[i] *= f + 0.f * y;"),
    "C++: weights dropped from the gradient": (ROWS, "f = factor * src.scale", "f = src.scale"),
    "C++: logit_scale dropped from the gradient": (ROWS, "f = factor * src.scale", "f = factor"),
    "C++: weights dropped from the plain gradient": (ROWS, "a.factor[r] * a.s.scale, v", "a.s.scale, v"),
    "C++: logit_scale dropped from the plain gradient": (ROWS, "a.factor[r] * a.s.scale, v", "a.factor[r], v"),
    "C++: smoothing dropped from the gradient": (ROWS, "even = c * a.label_smoothing / (float)a.vocab", "even = 0.f"),
    "C++: smoothing dropped from the value": (ROWS, "return (1 - eps) * (ls - x) +", "return (ls - x) +"),
    "C++: last tile left out": (ROWS, WALK, WALK.replace("v < a.vocab", "v == 0 || v + TILE <= a.vocab")),
    "C++: smaller vocabulary padded with 0": (ROWS, "i < n; i++) z[i] = -INF;", "i < n; i++) z[i] = 0.f;"),
    "C++: teacher not normalised": (ROWS, "row.ct = -c * row.t.scale();", "row.ct = -c;"),
    "C++: weight of a term dropped": (ROWS, "FIRST ? weight * f.h :", "FIRST ? f.h :"),
    "C++: weight of a second term dropped": (ROWS, ": h[i] + weight * f.h;", ": h[i] + f.h;"),
    "C++: 0 log 0": (ROWS, "p3 += p == 0.f ? 0.f : p * (y - x);", "p3 += p * (y - x);"),
    "C++: ignored rows keep their gradient": (ROWS, "if (a.g.data != nullptr) zero_gradient(a.g, r);", ""),
    "C++: sum of h dropped": (ROWS, "row.s.scale() * (float)total", "row.s.scale() * 0.f"),
    "C++: a term of Jensen-Shannon": (POINT, "(p == 0.f ? 0.f : a * p * (lp - lm)) + right", "right"),
    "C++: h of skew KL": (POINT, "-c * p * (q / m)", "-p * (q / m)"),
    "torch: slope of the softcap dropped": (TORCH, "grad = grad * a.student.slope(z) *", "grad = grad *"),
    "torch: temperature dropped from the gradient": (TORCH, "keepdim=True))) / temperature", "keepdim=True)))"),
    "torch: smoothing dropped": (TORCH, "ce -= smooth * log_q.mean(-1)", "pass"),
    "roles not exchanged": (DRIVER, "tuple(d.exchanged for d in row.divergences)", "row.divergences"),
    "temperatures not exchanged": (
        DRIVER,
        "s_temperature=row.t_temperature,\n        t_temperature=row.s_",
        "t_temperature=row.s_",
    ),
    "torch: ignored rows not masked": (TORCH, "torch.where(a.factor.unsqueeze(-1) == 0, 0.0, grad)", "grad"),
    "upstream of each token dropped": (DRIVER, "a.factor if seed is None else a.factor *", "a.factor if True else"),
    "bias dropped": (CHUNKS, "mm(x, w.t(), out=out) if b is None else", "mm(x, w.t(), out=out) if True else"),
    "dweight: only the last chunk": (CHUNKS, "if first else wide.addmm_(g.t(), x)", "if True else None"),
    "dweight: only the last chunk, in bfloat16": (
        CHUNKS,
        "self.sum.add(v, block, first)",
        "self.sum.add(v, block, True)",
    ),
    "dbias: only the last chunk": (CHUNKS, "else 0] += g.flatten", "else 0] = g.flatten"),
    "T^2 dropped": (LOSSES, "temperature.square() if t_squared else None", "None"),
    "1 - label_weight dropped": (LOSSES, "None if hard is None else 1 - hard", "None"),
}


def build(tree: Path) -> bool:
    setup = tree / "setup.py"
    lines = setup.read_text().splitlines()
    setup.write_text("\n".join("X86_64 = False" if line.startswith("X86_64 =") else line for line in lines) + "\n")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "FASTKD_REQUIRE_EXT": "1"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True).returncode == 0


def failing_test(tree: Path) -> str | None:
    """The first test that goes red."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--no-header"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in QUICK)]
    result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    red = [line.split(" ")[1] for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if not red:
        raise SystemExit(f"the tests could not be run:\n{result.stdout}{result.stderr}")
    return red[0].removeprefix("tests/")


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
        verdict = failing_test(tree) or "[red]SURVIVES"
    (tree / path).write_text(source)
    return verdict


def main() -> int:
    names = [n for n in MUTANTS if not sys.argv[1:] or any(word in n for word in sys.argv[1:])]
    names.sort(key=lambda n: MUTANTS[n][0] not in (ROWS, POINT))
    console, table = Console(), Table("mutant", "killed by", "s")
    survivors, built = 0, False
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for item in COPIED:
            source = ROOT / item
            if source.is_dir():
                shutil.copytree(source, tree / item, symlinks=item == "fastkd", ignore=LEFT_BEHIND)
            else:
                shutil.copy(source, tree / item)
        red = failing_test(tree) if build(tree) else "it does not build"
        if red:
            console.print(f"[red]before any mutation the tree is red: {red}")
            return 1
        for name in names:
            start = time.perf_counter()
            if MUTANTS[name][0] not in (ROWS, POINT) and not built:
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
