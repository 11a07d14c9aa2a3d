"""The README: its tables are those of the stored results, its Python runs as written."""

import re
import sys
from pathlib import Path

import torch

import fastkd

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_match_the_stored_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import goals

    assert goals.with_tables(README) == README, "renew them with: python bench/goals.py --tables"
    sys.modules.pop("goals")


def test_every_python_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 3
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
    }
    for block in blocks:
        exec(block, names)
    assert names["loss"].isfinite() and names["log_p"].shape == (5, 3) and h_s.grad.isfinite().all()
