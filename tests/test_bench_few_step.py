"""Few-step generators as they are measured: every loss is, what is counted is right, and the tables say what was
measured. No test looks at how fast anything is."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import docs
import few_step
import few_step_report
import goals

from fastkd import demo_images, diffusion

SHAPE = (16, 2, 4, 4)


def test_every_loss_is_measured():
    measured = {name.split(",")[0] for name in few_step.LOSSES}
    assert measured == {name for name in diffusion.__all__ if name.endswith("_loss")}


@pytest.mark.parametrize("name", few_step.LOSSES)
def test_every_loss_learns_as_the_table_says(name):
    loss, count = few_step.LOSSES[name]
    x = few_step.latents(count, SHAPE)
    loss(*x).backward()
    assert [y.grad is not None and bool(y.grad.any()) for y in x] == [y.requires_grad for y in x]


def test_latents_are_of_64_mib():
    assert 4 * torch.Size(few_step.SHAPE).numel() == 64 * 2**20


def test_bytes_are_those_of_passes(monkeypatch):
    """Of a sum of products, and of a loss that takes a norm first."""
    monkeypatch.setattr(few_step, "SHAPE", (16, 4, 16, 16))
    found = few_step.measured(lambda x, y: (x * y).sum(), 2, 1)["moved"]
    assert [found[way] for way in ("value", "saved", "both")] == pytest.approx([1, 1, 2], rel=0.01)
    found = few_step.measured(*few_step.LOSSES["scm_loss"], 1)["moved"]
    assert [found[way] for way in ("value", "saved", "both")] == pytest.approx([1, 1.25, 1.75], rel=0.05)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    file = tmp_path_factory.mktemp("results") / "few-step.json"
    with pytest.MonkeyPatch.context() as patched, torch.compiler.set_stance("force_eager"):
        patched.setattr(few_step, "SHAPE", SHAPE)
        patched.setattr(few_step, "LOSSES", {"dmd_loss": few_step.LOSSES["dmd_loss"]})
        patched.setattr(few_step, "TIMED", 16)
        patched.setattr(few_step, "SIDES", {"fastkd": (8, 16), "math": (8,)})
        patched.setattr(docs, "FEW_STEP", file)
        goals.measure_few_step(1)
    return json.loads(file.read_text())


def test_measured_and_told(measured):
    step = measured["step"]
    assert step["tokens"] == 64 and set(step["ms"]) == set(demo_images.WAYS)
    assert {way: list(found) for way, found in step["peak_bytes"].items()} == {"fastkd": ["16", "64"], "math": ["16"]}
    assert set(measured["written"]) == {"new", "old"}
    found = measured["losses"]["dmd_loss"]
    assert found["inputs"] == 3 and set(found["ms"]) == {"read", "value", "saved", "both"}
    text = few_step_report.goals_table(measured)
    assert "64 tokens, 2 pictures" in text and "dmd_loss" in text and "1 losses" in text
    own, math = (step["ms"][way]["median"] for way in ("fastkd", "math"))
    assert f"{math / own:.1f} x faster" in text
    [row] = [line for line in few_step_report.losses_table(measured).splitlines() if line.startswith("| dmd_loss")]
    assert f"{found['ms']['value']['median'] / found['ms']['read']['median']:.2f} x" in row
    assert ", ".join(f"{found['moved'][way]:.2f}" for way in ("value", "saved", "both")) in row


def test_memory_that_could_not_be_measured(measured):
    measured = copy.deepcopy(measured)
    measured["step"]["peak_bytes"]["math"]["16"] = None
    assert "math path: 16: not measured" in few_step_report.goals_table(measured)
