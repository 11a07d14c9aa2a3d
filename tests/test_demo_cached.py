"""The demo from a stored teacher, and on the student's own samples, on a model small enough to distil in a second."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from demo_cases import VOCABULARY, Letters, arguments, one_thread, silent, tiny_teacher  # noqa: F401 - a fixture

import fastkd
from fastkd import TopK, demo, demo_assets, demo_cached, demo_cached_report, demo_distill, demo_on_policy
from fastkd.sources import TAILS

KS = (2, 7, VOCABULARY)


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


TOPICS = {
    f"topic {i:02}": "\n\n".join(f"{i} students learn {i * j} things from teacher {j}" for j in range(9))
    for i in range(16)
}


def small(*argv):
    return arguments("--steps=6", "--batch=2", "--seq=32", "--held-out=128", "--lr=3e-3", "--dtype=float32", *argv)


def cached_arguments(out, *argv):
    return small("--teacher=cached", f"--out={out}", "--k", *map(str, KS), *argv)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def cached(teacher, out):
    return demo.distil(teacher, Letters(), TOPICS, cached_arguments(out), silent) | {"seconds": 1.0}


@pytest.fixture(scope="module")
def task(teacher):
    return demo.prepare(teacher, Letters(), TOPICS, small())


# --- a stored teacher ---


def test_there_is_a_student_for_every_k_and_tail_and_all_learn(cached):
    assert cached["runs"].keys() == {str(k) for k in KS}
    for tails in cached["runs"].values():
        assert tuple(tails) == TAILS
        for run in tails.values():
            assert len(run["loss"]) == len(run["loss_ms"]) == 6
            assert run["held_out"]["kl"] < 0.95 * cached["before"]["kl"]


@pytest.mark.parametrize("tail", TAILS)
def test_all_of_the_vocabulary_stored_is_the_teacher_itself(tail, cached):
    stored, dense = cached["runs"][str(VOCABULARY)][tail], cached["dense"]
    assert stored["loss"] == pytest.approx(dense["loss"], rel=1e-3)  # float16 log-probabilities
    assert stored["held_out"]["kl"] == pytest.approx(dense["held_out"]["kl"], rel=1e-3)
    assert stored["held_out"]["outside"][str(VOCABULARY)] == pytest.approx(0, abs=1e-5)


def test_the_first_loss_of_each_run_is_that_of_its_tail_in_float64(cached, teacher, task):
    """All begin with the same student on the same text; so it is the tail and the K that make them differ."""
    ids = task.batches[0]
    with torch.no_grad():
        student = demo_distill.prune(teacher, task.keep)
        log_q, log_p = (model(ids).logits.double().log_softmax(-1) for model in (student, teacher))
    for k in KS[:2]:
        log_probs, listed = log_p.topk(k)
        for tail in TAILS:
            expected = fastkd.reference.kd_loss(log_q, TopK(listed, log_probs, tail))
            assert cached["runs"][str(k)][tail]["loss"][0] == pytest.approx(expected.item(), rel=1e-3)


def test_a_student_that_is_taught_no_rest_keeps_less_of_it(cached):
    outside = {tail: run["held_out"]["outside"]["2"] for tail, run in cached["runs"]["2"].items()}
    assert max(outside["renormalize"], outside["drop"]) < min(outside["bucket"], outside["uniform"])


def test_held_out_numbers_are_those_of_the_logits(teacher, task):
    student = demo_distill.prune(teacher, [0, 5])
    taught = demo_distill.teach(teacher, task.held_out, torch.float32, silent())
    tops = [fastkd.topk(head, 7) for head in taught]
    said = demo_cached.heads(student, list(task.held_out), torch.float32)
    got = demo_cached.evaluate(said, taught, tops, (2, 7))
    ids = task.held_out.flatten(0, 1)
    with torch.no_grad():
        log_q, log_p = (model(ids).logits.double().log_softmax(-1) for model in (student, teacher))
    q, listed = log_q.exp(), log_p.topk(7).indices
    assert got.pop("outside") == pytest.approx(
        {str(k): 1 - q.gather(-1, listed[..., :k]).sum(-1).mean().item() for k in (2, 7)}, rel=1e-4
    )
    assert got == pytest.approx(
        {
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
            "top1": (q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
            "entropy": -(q * log_q).sum(-1).mean().item(),
        },
        rel=1e-4,
    )


def test_frozen_first_layers_and_the_rest_are_the_whole_student(teacher, task):
    frozen, learning = demo_cached.halves(task, KS)
    assert [*frozen, *learning] == task.keep and frozen == [0] and learning == [3, 4, 5]
    states = demo_cached.first_layers(task, frozen, task.batches, silent())
    rest = demo_distill.prune(teacher, learning)
    got = demo_distill.hidden_states(rest, states[0], torch.float32)
    expected = demo_distill.hidden_states(demo_distill.prune(teacher, task.keep), task.batches[0], torch.float32)
    torch.testing.assert_close(got, expected)


def test_a_cache_is_read_in_the_order_of_the_steps(teacher, task, tmp_path):
    taught = demo_distill.teach(teacher, task.batches, torch.float32, silent())
    demo_cached.build(taught, (3, 5), tmp_path / "caches", silent())
    for k in (3, 5):
        read = list(demo_cached.stored(tmp_path / "caches" / f"k{k}", len(task.batches[0]), "drop"))
        assert len(read) == len(task.batches)
        for top, head in zip(read, taught):
            expected = fastkd.topk(head, k)
            assert top.tail == "drop" and torch.equal(top.ids.long(), expected.ids)
            torch.testing.assert_close(top.log_probs.float(), expected.log_probs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(top.log_tail, expected.log_tail, rtol=1e-4, atol=1e-4)


def test_sizes_are_those_of_the_files(cached, out):
    assert cached["logits_bytes_per_token"] == 2 * VOCABULARY
    tokens = 6 * 2 * 32
    for k in KS:
        files = list((out / "teacher-cache" / f"k{k}").glob("*.parquet"))
        size = sum(file.stat().st_size for file in files)
        report = cached["caches"][str(k)]
        assert report["tokens"] == tokens and report["file_bytes"] == size > 0
        assert demo_cached_report.bytes_per_token(report) == size / tokens


def test_a_second_run_replaces_the_caches(teacher, tmp_path):
    options = small("--teacher=cached", f"--out={tmp_path}", "--k", "7", "--steps=1")
    first, second = (demo.distil(teacher, Letters(), TOPICS, options, silent) for _ in range(2))
    assert first["caches"]["7"]["tokens"] == second["caches"]["7"]["tokens"] == 64
    assert first["runs"]["7"]["bucket"]["loss"] == second["runs"]["7"]["bucket"]["loss"]


# --- its report ---


def test_cells_of_the_table_are_the_numbers(cached):
    header, *rows = demo_cached_report.quality(cached)
    assert header == ["", "K = 2", "K = 7", "K = 101"]
    names = [row[0] for row in rows]
    assert names == [*TAILS, "no cache", "before", "the teacher's own"]
    held_out = cached["runs"]["7"]["uniform"]["held_out"]
    expected = f"{held_out['kl']:.3f}, {held_out['top1']:.0%}, {held_out['outside']['7']:.0%}"
    assert rows[TAILS.index("uniform")][2] == expected
    assert rows[-1][1].startswith("0.000, 100%, ")


def test_what_is_said_follows_from_the_numbers(cached):
    result = copy.deepcopy(cached)
    for number, k in enumerate(result["runs"]):
        for place, tail in enumerate(TAILS):
            result["runs"][k][tail]["held_out"]["kl"] = 1 + (place - number) % len(TAILS) / 8
    lowest, why, *each = demo_cached_report.findings(result)
    assert "bucket at K = 2 (1.000), renormalize at K = 7 (1.000), renormalize_both at K = 101 (1.000)" in lowest
    assert "worst it is 0.500 at K = 2" in lowest
    assert f"the teacher has {result['teacher']['outside']['2']:.1%} of its mass" in why
    assert f"without a cache {result['dense']['held_out']['outside']['2']:.1%}" in why
    assert [line.split(":")[0] for line in each] == [f"- {tail}" for tail in TAILS]
    held_out = result["runs"]["2"]["drop"]["held_out"]
    assert f"drop: {held_out['outside']['2']:.1%}, {held_out['entropy']:.2f} nats" in each[-1]


def test_cached_report_picture_and_json(cached, tmp_path, capsys):
    demo_cached_report.write(cached, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "demo-cached.json").read_text()) == cached
    assert (tmp_path / "new" / "demo-cached.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "bucket" in printed and "bytes a token" in printed and "Lowest KL" in printed


def test_cached_markdown_is_one_table_with_every_tail(cached):
    table, *words = demo_cached_report.markdown(cached).split("\n\n")
    lines = table.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    for tail in TAILS:
        assert sum(f"`{tail}`" in line for line in lines) == 1
    size = demo_cached_report.bytes_per_token(cached["caches"]["7"])
    assert f"{size:,.0f}: 1/{2 * VOCABULARY / size:,.0f}" in table
    assert words[0].startswith("Lowest KL")


# --- on-policy ---


@pytest.fixture(scope="module")
def on_policy(teacher):
    result = demo.distil(teacher, Letters(), TOPICS, small("--on-policy", "--steps=8"), silent)
    return result | {"seconds": 1.0}


def test_the_student_learns_from_its_own_samples(on_policy):
    assert on_policy["prompt"] == 8 and on_policy["sampled_per_step"] == 2 * 24
    assert len(on_policy["loss"]) == 8
    assert on_policy["loss"] == pytest.approx(on_policy["steps"]["exact"])
    assert on_policy["after"]["own_samples"] < 0.9 * on_policy["before"]["own_samples"]


def test_samples_are_from_the_whole_distribution_of_the_student(teacher):
    prompt, count = torch.tensor([[5, 9, 40]]), 4000
    ids = demo_on_policy.sample(teacher, prompt.expand(count, 3), 2, torch.float32, torch.Generator().manual_seed(0))
    assert ids.shape == (count, 5) and torch.equal(ids[:, :3], prompt.expand(count, 3))
    with torch.no_grad():
        first = teacher(prompt).logits[0, -1].softmax(-1)
        longer = torch.cat((prompt.expand(VOCABULARY, 3), torch.arange(VOCABULARY)[:, None]), -1)
        second = first @ teacher(longer).logits[:, -1].softmax(-1)
    for column, expected in ((3, first), (4, second)):
        got = torch.bincount(ids[:, column], minlength=VOCABULARY) / count
        error = (expected * (1 - expected) / count).sqrt()
        assert ((got - expected).abs() < 5 * error + 1e-3).all()


def test_the_teacher_and_the_student_are_held_against_each_other_where_tokens_were_sampled(teacher, task):
    """The loss of the first step, and its estimates, from the logits of whole models."""
    task = replace(task, batches=task.batches[:1], held_out=task.held_out[:1])
    result = demo_on_policy.distil(task, 3, silent)
    student, generator = demo_distill.prune(teacher, task.keep), torch.Generator().manual_seed(3)
    ids = demo_on_policy.sample(student, task.batches[0, :, :8], 24, torch.float32, generator)
    with torch.no_grad():
        log_q, log_p = (model(ids).logits[:, 7:-1].double().log_softmax(-1) for model in (student, teacher))
    exact = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    assert result["loss"][0] == pytest.approx(exact.item(), rel=1e-4)
    taken = [x.gather(-1, ids[:, 8:, None]) for x in (log_q, log_p)]
    for name in ("k1", "k2", "k3"):
        expected = getattr(fastkd.estimators, name)(*taken).mean().item()
        assert result["steps"][name][0] == pytest.approx(expected, rel=1e-3)


def test_statistics_of_estimates():
    first = {"exact": torch.tensor([1.0, 2.0]), "k1": torch.tensor([0.0, 5.0])}
    values = [first, {"exact": torch.tensor([3.0]), "k1": torch.tensor([1.0])}]
    assert demo_on_policy.statistics(values, "exact") == pytest.approx(
        {"mean": 2.0, "standard_error": 3**-0.5, "noise": 0.0}
    )
    assert demo_on_policy.statistics(values, "k1") == pytest.approx(
        {"mean": 2.0, "standard_error": (7 / 3) ** 0.5, "noise": (14 / 3) ** 0.5}
    )


def test_on_policy_report(on_policy, tmp_path, capsys):
    demo_on_policy.write(on_policy, tmp_path / "new")
    assert json.loads((tmp_path / "new" / "demo-on-policy.json").read_text()) == on_policy
    assert "own samples" in capsys.readouterr().out
    text = demo_on_policy.markdown(on_policy)
    exact, k1 = on_policy["estimates"]["exact"], on_policy["estimates"]["k1"]
    assert f"| exact | {exact['mean']:.3f} ± {exact['standard_error']:.3f} | 0 |" in text
    assert f"| k1 | {k1['mean']:.3f} ± {k1['standard_error']:.3f} | {k1['noise']:.2f} |" in text


# --- what may be wrong ---


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--k", "7", "102"), "--k 102: expected at most the 101 entries of the vocabulary"),
        (("--layers=6",), "--layers 6: expected fewer than the teacher has"),
    ],
)
def test_impossible_requests(argv, message, teacher, tmp_path):
    with pytest.raises(demo.DemoError, match=message):
        demo.distil(teacher, Letters(), TOPICS, small("--teacher=cached", f"--out={tmp_path}", *argv), silent)
    assert not (tmp_path / "teacher-cache").exists()


def test_a_stored_teacher_needs_pyarrow_and_the_others_do_not(monkeypatch, capsys):
    found = demo_assets.importlib.util.find_spec
    monkeypatch.setattr(demo_assets, "LIBRARIES", ())
    monkeypatch.setattr(demo_assets, "MODEL_PACKAGE", "no_such_package_with_a_model")
    monkeypatch.setattr(
        demo_assets.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name)
    )
    assert demo.run(arguments("--teacher=cached")) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "needs pyarrow;" in line and 'pip install "fastkd[demo]"' in line
    for argv in ((), ("--on-policy",)):
        assert demo.run(arguments(*argv)) == 2
        assert "pyarrow" not in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("--teacher", "cached", "--on-policy"), ("--teacher", "none"), ("--k", "0")])
def test_bad_arguments_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments(*argv)
    assert stopped.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "way, argv", [("live", ()), ("cached", ("--teacher=cached",)), ("on-policy", ("--on-policy",))]
)
def test_sizes_that_are_not_given_are_those_of_the_way(way, argv, monkeypatch):
    seen = {}

    def prepare(teacher, tokenizer, topics, args):
        seen.update(vars(args))
        raise demo.DemoError("enough")

    monkeypatch.setattr(demo, "prepare", prepare)
    with pytest.raises(demo.DemoError, match="enough"):
        demo.distil(None, None, {}, arguments("--steps=5", *argv), silent)
    assert {name: seen[name] for name in demo.SIZES[way]} == demo.SIZES[way] | {"steps": 5}
