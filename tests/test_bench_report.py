"""fastkd bench and the goals: tables and pictures of results."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastkd import bench
from fastkd.bench import measure, memory, peers, plots, report
from fastkd.bench.work import Case, variants

CASE = Case("heads", 48, 700, 32, 32, "fp32")
TRL = all(peer.missing() is None for peer in peers.PEERS if peer.name == "trl")  # is it installed?


def made_up(*cases, value=1.0):
    """A result in which every variant of every case was measured."""
    records = []
    for n, case in enumerate(cases):
        record = measure.blank(case, [name for name in variants(case) if name not in ("fused cpu", "fused reference")])
        for entry in record["variants"].values():
            entry.update(status="measured", ms=measure.summary([value + n]), peak_bytes=2**24, planned_bytes=2**24)
        measure.ratios(record["variants"], record["floor"])
        records.append(record)
    machine = bench.machine.describe()
    return {"machine": machine, "complete": True, "skipped": [], "peers": {}, "cases": records}


def test_a_plot_shows_the_sizes_with_most_points():
    sizes = [(64, 100), (64, 200), (64, 400), (128, 100), (256, 100)]
    result = made_up(*(Case("heads", n, v, 8, 8, "fp32") for n, v in sizes))
    ((fixed, records),) = plots.series(result, "vocab", ("tokens", "hidden", "teacher_hidden")).values()
    assert fixed["tokens"] == 64 and [r["vocab"] for r in records] == [100, 200, 400]
    ((fixed, records),) = plots.series(result, "tokens", ("vocab", "hidden", "teacher_hidden")).values()
    assert fixed["vocab"] == 100 and [r["tokens"] for r in records] == [64, 128, 256]


def test_what_nobody_measured_is_not_drawn(tmp_path):
    result = made_up(CASE)
    for entry in result["cases"][0]["variants"].values():
        entry["peak_bytes"] = None
    assert [file.name for file in plots.draw(result, tmp_path)] == ["time.png", "floor.png"]
    assert plots.draw({**result, "cases": []}, tmp_path) == []


def test_a_changed_result_has_another_digest():
    assert plots.digest(made_up(CASE)) != plots.digest(made_up(CASE, value=2.0))


def test_markdown_has_a_table_for_each_work_and_every_reason():
    result = made_up(CASE, Case("logits", 48, 700, None, None, "bf16"))
    result["cases"][1]["variants"]["naive"] = {"status": "does not fit", "reason": "needs 9 GiB of 8 GiB available"}
    text = report.markdown(result)
    assert text.count("| shape | variant |") == 2
    assert "| does not fit |" in text and "naive does not fit: needs 9 GiB of 8 GiB available" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_table_of_goals_holds_every_goal(monkeypatch):
    folder = Path(__file__).parent.parent / "bench"
    monkeypatch.syspath_prepend(str(folder))
    import docs
    import goals

    cases = {}
    for name, (case, wanted, _) in goals.GOALS.items():
        record = made_up(case)["cases"][0]
        assert set(wanted) <= set(record["variants"])
        cases[name] = {**record, "dw_bytes": 2**22}
    peaks = {"large naive": 8e9, "large naive, planned": 7e9, **{f"tokens {n}": 2**28 for n in goals.GROWING}}
    divergences = {d: {"forward_kl": {"median": 2.0}, "alpha_beta": {"median": 3.0}} for d in ("bf16", "fp32")}
    machine = made_up()["machine"]
    result = {
        "machine": machine,
        "cases": cases,
        "divergences": divergences,
        "peak_bytes": peaks,
        "import_seconds": 0.1,
    }
    text = docs.goals_table(result)
    for words in ("at most 1.25 x", "at least 8 x and 3 x", "under 1 GB", "SmolLM2-135M", "torch.compile", "0.10 s"):
        assert words in text
    assert "`alpha_beta`) against forward KL | 1.50 x" in text
    for module in ("docs", "goals", "row_op"):
        sys.modules.pop(module)


CACHE = {
    "machine": {**bench.machine.describe(), "date": "1999-12-31"},
    "settings": {"k": 64},
    "dtypes": {
        name: {
            "tokens_per_minute": {"write": 12.34e6, "read": 56.78e6},
            "bytes_per_entry": {"values": bytes_, "encoded": bytes_ + 0.01, "compressed": bytes_ - 1.11},
        }
        for name, bytes_ in {"fp16": 4.0, "int8": 3.0}.items()
    },
}


def test_a_part_of_the_goals_is_measured_by_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import docs
    import goals

    smaller = {
        name: (replace(case, tokens=48, vocab=700, hidden=32), names, rounds)
        for name, (case, names, rounds) in goals.SPARSE.items()
    }
    renewed = []
    monkeypatch.setattr(goals, "SPARSE", smaller)
    monkeypatch.setitem(goals.PARTS, "dense", lambda rounds: pytest.fail("nobody asked for it"))
    monkeypatch.setattr(memory, "peak", lambda case, variant: 2**22 if variant == "fused" else 2**27)
    monkeypatch.setattr(docs, "SPARSE", tmp_path / "sparse-goals.json")
    monkeypatch.setattr(docs, "CACHE", tmp_path / "cache.json")
    monkeypatch.setattr(docs, "renew", lambda: renewed.append(1))
    monkeypatch.setattr(sys, "argv", ["goals.py", "--only", "sparse", "--rounds", "2"])
    goals.main()
    assert renewed
    result = json.loads(docs.SPARSE.read_text())
    assert result["machine"]["torch"] == torch.__version__ and result["cases"]["sparse"]["top_k"] == 64
    assert result["cases"]["sparse"]["dw_bytes"] > 0 and result["cases"]["topk"]["dw_bytes"] == 0
    text = docs.sparse_table(result)
    for words in ("at most 1.25 x", "at least 3 x", "at most 1/8", "at most 1.5 x", "K 64", "its 3 bare GEMMs"):
        assert words in text
    assert ("TRL" in text) == TRL and "teacher cache" not in text

    docs.CACHE.write_text(json.dumps(CACHE))
    text = docs.sparse_table(result)
    assert "written, after the model | fp16 12.3, int8 12.3 | at least 1 |" in text
    assert "| read in order | fp16 56.8, int8 56.8 | at least 1 |" in text
    assert "| fp16 4.00, int8 3.00; as Parquet encodes them fp16 4.01, int8 3.01 | at most 4 with fp16, 3 with" in text
    assert "after zstd | fp16 2.89, int8 1.89 |" in text and "1999-12-31" in text
    for module in ("docs", "goals", "row_op"):
        sys.modules.pop(module)
