"""The documents: their tables and plots are those of the stored results, the README's Python runs as written."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastkd
from fastkd import teacher_cache
from fastkd.bench import plots

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def docs(monkeypatch):
    """bench/docs.py, which makes the tables and plots."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield importlib.import_module("docs")
    sys.modules.pop("docs")


@pytest.mark.parametrize("document", ["README.md", "bench/README.md"])
def test_tables_match_the_stored_results(docs, document):
    assert ROOT / document in docs.DOCUMENTS
    assert docs.renewed(ROOT / document) == (ROOT / document).read_text(), "renew them with: python bench/docs.py"


def test_a_table_that_does_not_match_its_result_is_found(docs, tmp_path, monkeypatch):
    result = json.loads(docs.DEMO.read_text())
    result["before"]["kl"] += 1
    changed = tmp_path / "demo.json"
    changed.write_text(json.dumps(result))
    monkeypatch.setitem(docs.BLOCKS, (ROOT / "README.md", "demo"), (changed, docs.demo_table))
    assert docs.renewed(ROOT / "README.md") != README


def test_plots_are_drawn_from_the_stored_results(docs):
    grid = json.loads(docs.GRID.read_text())
    assert grid["complete"] and grid["machine"]["commit"]
    drawn_from = plots.digest(grid)
    for name in ("time", "memory", "floor"):
        with Image.open(docs.RESULTS / f"{docs.PLOTS}{name}.png") as picture:
            assert picture.text[plots.DRAWN_FROM] == drawn_from, "renew them with: python bench/docs.py"


def stored(folder):
    """A cache of two sequences, and hidden states for them as a batch."""
    meta = teacher_cache.Meta(vocab=50, k=4, tokenizer="of the test")
    with teacher_cache.Writer(folder, meta) as writer:
        for tokens in (5, 3):
            top = fastkd.topk(torch.randn(tokens, 50), 4)
            writer.write(top.ids, top.log_probs, top.log_tail, torch.arange(tokens))
    return {"tokenizer": "of the test", "h_s": torch.randn(2, 5, 8, requires_grad=True)}


class Student(torch.nn.Module):
    """F of a picture and a time."""

    def __init__(self):
        super().__init__()
        self.q, self.time = torch.nn.Linear(8, 8), torch.nn.Linear(1, 8)

    def forward(self, x, t):
        y = self.q(x) + self.time(t[:, None, None, None])
        return torch.nn.functional.scaled_dot_product_attention(y, y, x)


def of_few_steps():
    x_0, noise = torch.randn(2, 3, 2, 5, 8)
    student = Student()
    return {
        "x_0": x_0,
        "noise": noise,
        "t": torch.tensor([0.3, 1.2, 0.7]),
        "student": student,
        "teacher": student,
        "step": 5,
    }


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 6
    h_s, W_s, b_s = torch.randn(5, 8), torch.randn(50, 8), torch.randn(50)
    names = {
        "torch": torch,
        "h_s": h_s.requires_grad_(),
        "W_s": W_s.requires_grad_(),
        "b_s": b_s,
        "h_t": torch.randn(5, 12),
        "W_t": torch.randn(50, 12),
        "mask": torch.tensor([1, 0, 1, 1, 0]),
        "student_logits": torch.randn(5, 50),
        "teacher_logits": torch.randn(5, 50),
        "w": torch.rand(5),
        "log_q": torch.randn(5, 50).log_softmax(-1),
        "p": torch.randn(5, 50).softmax(-1),
        "labels": torch.tensor([3, -100, 1, 49, 0]),
        "ids": torch.randint(50, (5, 3)),
        "my_function": fastkd.kd_loss,
        "my_attention": fastkd.jvp_attention,
        "model": lambda x: fastkd.attention(x, x, x),
        "a": 0.5,
        "b": 2.0,
    }
    names |= {name: torch.randn(1, 2, 5, 8, requires_grad=True) for name in ("q", "k", "v", "tq", "tk", "tv")}
    names |= {name: torch.randn(1, 2, 5, 8) for name in ("x_t", "v_t")}
    for block in blocks:
        if "teacher_cache" in block:
            names |= stored(tmp_path / "teacher-cache")
        if "fastkd.diffusion" in block:
            own = of_few_steps()
            exec(block, own)
            assert all(p.grad.isfinite().all() and p.grad.any() for p in own["student"].parameters())
            continue
        exec(block, names)
    assert (
        names["loss"].isfinite()
        and names["log_p"].shape == (5, 3)
        and h_s.grad.isfinite().all()
        and names["teacher"].ids.shape == (2, 5, 4)
        and all(names[name].grad.isfinite().all() for name in ("q", "k", "v", "tq", "tk", "tv"))
    )
