"""fastkd bench: what it measures is compared first, what fails is reported and the rest goes on. No test looks at how
long anything took."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd import Head, bench, cli
from fastkd.backends import BACKENDS, extension
from fastkd.bench import measure, memory, peers, plots, report
from fastkd.bench.peers import Peer
from fastkd.bench.work import WORKS, Case, usual, variants

SMALL = ("--tokens", "48", "--vocab", "700", "--hidden", "32", "--rounds", "2", "--work", "heads")
CASE = Case("heads", 48, 700, 32, 32, "fp32")
MEASURABLE = Path("/proc/self/clear_refs").exists()


@pytest.fixture
def run(tmp_path, capsys):
    """Runs fastkd bench; gives the status, the JSON, and what was printed."""

    def run(*arguments, size=SMALL, memory=False):
        file = tmp_path / "result.json"
        extra = () if memory else ("--no-memory",)
        status = cli.main(["bench", *size, *extra, *arguments, "--json", str(file)])
        return status, json.loads(file.read_text()), capsys.readouterr().out

    return run


@pytest.fixture
def given_peers(monkeypatch):
    """Takes the place of the peers: name -> loss of heads."""

    def give(**losses):
        found = [Peer(name, "fastkd", "fastkd", {"heads": lambda loss=loss: loss}) for name, loss in losses.items()]
        monkeypatch.setattr(peers, "PEERS", found)
        monkeypatch.setattr(bench, "PEERS", found)
        monkeypatch.setattr("fastkd.bench.work.PEERS", found)

    return give


def fused(hidden, weight, teacher_hidden, teacher_weight):
    return fastkd.kd_loss(Head(hidden, weight), Head(teacher_hidden, teacher_weight))


# --- a whole run -----------------------------------------------------------------------------------------------------


def test_a_run_leaves_json_markdown_and_plots(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    folder, tables = tmp_path / "plots", tmp_path / "tables.md"
    wanted = "--variants", "fused", "naive", "--plots", str(folder), "--markdown", str(tables)
    status, result, out = run(*wanted, "--dtype", "bf16", memory=True)
    assert status == 0 and result["complete"] and result["machine"]["torch"] == torch.__version__
    (record,) = result["cases"]
    assert (record["tokens"], record["vocab"], record["hidden"], record["dtype"]) == (48, 700, 32, "bf16")
    for name in ("fused", "naive"):
        entry = record["variants"][name]
        assert entry["status"] == "measured" and entry["ms"]["rounds"] == 2
        assert entry["ms"]["min"] <= entry["ms"]["median"] <= entry["ms"]["max"]
        assert (entry["peak_bytes"] is not None) == MEASURABLE
        assert entry["planned_bytes"] > 0
        assert set(entry["errors"]) == {"loss", "hidden", "weight"} and 0 < entry["errors"]["weight"] < 0.05
    assert record["variants"]["gemms"]["to_floor"] == 1
    for text in (out, tables.read_text()):
        assert "48 tokens, vocabulary 700, hidden 32" in text and "fused" in text and "naive" in text
    from PIL import Image

    for name in ("time", "floor", *(("memory",) if MEASURABLE else ())):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.text[plots.DRAWN_FROM] == plots.digest(result)
            assert min(picture.size) > 300


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("work", WORKS)
def test_every_work_is_measured_and_agrees(run, work, dtype):
    names = ["fused", "naive"] + ["naive fp32"] * (dtype == "bf16")
    status, result, _ = run("--work", work, "--dtype", dtype, "--variants", *names)
    assert status == 0
    entries = result["cases"][0]["variants"]
    assert list(entries) == [*names, WORKS[work].floor]
    # the gradient of an entropy whose log-probabilities are rounded to bfloat16 is a tenth off, or all
    off = {"naive"} if (work, dtype) == ("stats", "bf16") else set()
    assert {name for name, entry in entries.items() if entry["status"] == "disagrees"} == off
    assert all(entry["status"] == "measured" for name, entry in entries.items() if name not in off)
    limit = {"fp32": 1e-4, "bf16": 1e-2}[dtype]  # two roundings of bfloat16
    assert all(error < limit for error in entries["fused"]["errors"].values())


def test_compiled_and_per_token_losses(run):
    status, result, _ = run("--variants", "compiled", "fused each")
    entries = result["cases"][0]["variants"]
    assert status == 0 and entries["compiled"]["status"] == entries["fused each"]["status"] == "measured"
    assert list(entries["fused each"]["faster_than"]) == ["compiled"]


def test_what_is_measured_if_nothing_is_named():
    names = usual(Case("heads", 8, 16, 4, 4, "bf16"))
    assert names[:4] == ["fused", "naive", "naive fp32", "compiled"]
    assert names[4:] == [peer.name for peer in peers.PEERS if peer.missing() is None]
    assert usual(CASE, ("torch", "reference"), peers=False) == ["fused torch", "fused reference", "naive", "compiled"]


def test_a_grid_says_what_it_leaves_out(run):
    sizes = "--tokens", "8", "16", "--vocab", "50", "--hidden", "4", "8", "--dtype", "fp32", "--rounds", "1"
    status, result, out = run("--work", "heads", "kl_div", "--variants", "fused", size=sizes)
    assert status == 0 and len(result["cases"]) == 4 + 2
    assert result["skipped"][0] == "kl_div: 2 combinations left out, which differ from others in the hidden size alone"
    assert "2 combinations left out" in out


def test_models_give_the_sizes(monkeypatch):
    seen = []
    monkeypatch.setattr(measure, "measure", lambda record, case, *rest: seen.append(case))
    chosen = "--model", "smollm2-135m", "qwen3-0.6b", "--work", "heads", "logits", "--no-peers"
    assert cli.main(["bench", *chosen, "--tokens", "8"]) == 1  # nothing was measured
    assert [(c.work, c.vocab, c.hidden) for c in seen] == [
        *(("heads", 49152, 576), ("heads", 151936, 1024)),
        *(("logits", 49152, None), ("logits", 151936, None)),
    ]
    assert cli.main(["bench", "--model", "smollm2-135m", "--teacher-model", "smollm2-1.7b", "--no-peers"]) == 1
    assert (seen[-2].hidden, seen[-2].teacher_hidden) == (576, 2048)


# --- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(any(peer.missing() for peer in peers.PEERS), reason="liger-kernel is not installed")
def test_liger_computes_the_same(run):
    status, result, _ = run("--variants", "fused", "liger eager", size=SMALL)
    assert status == 0 and result["cases"][0]["variants"]["liger eager"]["status"] == "measured"
    assert result["peers"]["liger-kernel"]


def test_peers_that_fail_or_disagree_are_reported_and_the_rest_goes_on(run, given_peers):
    calls = []

    def raises(**inputs):
        raise RuntimeError("no kernel image\nfor this device")

    def raises_later(**inputs):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("third time unlucky")
        return fused(**inputs)

    def wrong(**inputs):
        return 1.2 * fused(**inputs)

    def wrong_gradient(hidden, weight, **teacher):
        return fused(hidden=hidden, weight=(2 * weight - weight.detach()), **teacher)

    def not_finite(**inputs):
        return fused(**inputs) * float("nan")

    given_peers(raises=raises, later=raises_later, wrong=wrong, gradient=wrong_gradient, nan=not_finite, good=fused)
    names = "fused", "naive", "raises", "later", "wrong", "gradient", "nan", "good"
    status, result, out = run("--variants", *names, "--dtype", "fp32")
    entries = result["cases"][0]["variants"]
    assert status == 0  # the peers' failures are not fastkd's
    assert {n: entries[n]["status"] for n in names} == {
        **dict.fromkeys(("fused", "naive", "good"), "measured"),
        **dict.fromkeys(("raises", "later"), "fails"),
        **dict.fromkeys(("wrong", "gradient", "nan"), "disagrees"),
    }
    assert entries["raises"]["reason"] == "RuntimeError: no kernel image"
    assert entries["later"]["reason"] == "RuntimeError: third time unlucky"
    assert "loss is 20.0% off" in entries["wrong"]["reason"]
    assert entries["gradient"]["errors"]["weight"] == pytest.approx(1, rel=1e-3)
    assert "loss is missing or not finite" in entries["nan"]["reason"] and entries["nan"]["errors"]["loss"] is None
    for name in ("wrong", "gradient", "nan", "raises"):
        assert "ms" not in entries[name]
    assert "raises fails: RuntimeError: no kernel image" in out


def test_a_peer_that_is_not_installed_is_said(run, monkeypatch):
    missing = [Peer("absent", "no_such_package", "no-such-package", {"heads": lambda: fused})]
    monkeypatch.setattr(bench, "PEERS", missing)
    monkeypatch.setattr("fastkd.bench.work.PEERS", missing)
    _, result, _ = run("--variants", "fused")
    assert "absent: no-such-package is not installed" in result["skipped"]
    assert "absent" not in usual(CASE)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_naive_that_does_not_fit(run, monkeypatch):
    case = Case("heads", 48, 700, 32, 32, "bf16")
    inputs = (48 + 700) * 64 * 2
    needed = WORKS["heads"].planned(case, "naive fp32") + inputs
    monkeypatch.setattr(measure, "available_bytes", lambda device: needed - 1)
    status, result, out = run("--dtype", "bf16", "--variants", "fused", "naive", "naive fp32")
    entries = result["cases"][0]["variants"]
    assert status == 0 and entries["fused"]["status"] == entries["naive"]["status"] == "measured"
    assert entries["naive fp32"]["status"] == "does not fit" and "ms" not in entries["naive fp32"]
    assert entries["naive fp32"]["reason"].startswith("needs ") and "available" in entries["naive fp32"]["reason"]
    assert "naive fp32 does not fit: needs" in out


def test_processes_that_die(run, monkeypatch):
    how = {
        "naive": f"import os; os.kill(os.getpid(), {signal.SIGKILL.value})",
        "naive fp32": "raise MemoryError('no room for 7 GiB')",
        "fused each": "raise SystemExit(3)",
        "fused": "print('{\"peak_bytes\": 12345}')",
    }
    monkeypatch.setattr(memory, "command", lambda task: [sys.executable, "-c", how[task["variant"]]])
    status, result, _ = run("--dtype", "bf16", "--variants", *how, memory=True)
    entries = result["cases"][0]["variants"]
    assert status == 1  # a variant of fastkd's own died
    assert entries["fused"]["status"] == "measured" and entries["fused"]["peak_bytes"] == 12345
    assert [entries[n]["status"] for n in ("naive", "naive fp32", "fused each")] == ["fails"] * 3
    assert entries["naive"]["reason"] == "killed by SIGKILL, by the system for want of memory?"
    assert entries["naive fp32"]["reason"] == "MemoryError: no room for 7 GiB"
    assert entries["fused each"]["reason"] == "ended with status 3 and said nothing"
    assert not any("ms" in entries[n] for n in ("naive", "naive fp32", "fused each"))


@pytest.mark.skipif(extension()[0] is None, reason="the C++ extension is not built")
def test_a_backend_that_cannot_serve_a_case(run):
    status, result, _ = run("--dtype", "fp64", "--backend", "cpu", "torch", "--variants", "fused cpu", "fused torch")
    entries = result["cases"][0]["variants"]
    assert status == 1 and entries["fused torch"]["status"] == "measured"
    assert entries["fused cpu"]["status"] == "fails" and "float64" in entries["fused cpu"]["reason"]


def test_an_interrupted_run_keeps_what_was_measured(run, monkeypatch, capsys):
    whole = measure.times
    cases = []

    def times(*args, **kwargs):
        cases.append(1)
        for n, taken in enumerate(whole(*args, **kwargs)):
            yield taken
            if len(cases) == 2 and n == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(measure, "times", times)
    status, result, out = run("--dtype", "fp32", "bf16", "fp16", "--variants", "fused", "naive")
    assert status == 130 and result["complete"] is False
    first, second = result["cases"]
    assert first["variants"]["naive"]["ms"]["rounds"] == 2
    assert second["variants"]["naive"]["ms"]["rounds"] == 1
    assert "Interrupted: what was measured until then." in out and "interrupted: what was measured is kept" in out


def test_the_file_is_written_after_every_case(run, monkeypatch, tmp_path):
    counts = []
    whole = bench.write
    monkeypatch.setattr(bench, "write", lambda file, result: (whole(file, result), counts.append(len(result["cases"]))))
    run("--dtype", "fp32", "bf16", "--variants", "fused")
    assert counts == [1, 2, 2]


def test_interrupting_the_process(tmp_path):
    """Ctrl-C as the terminal sends it, in the second case of two, which would take minutes."""
    file = tmp_path / "result.json"
    sizes = "--tokens", "8", "2048", "--vocab", "20000", "--hidden", "64", "--rounds", "200"
    options = "--work", "heads", "--variants", "fused", "--no-memory", "--json", str(file)
    command = [sys.executable, "-m", "fastkd", "bench", *sizes, *options]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True)
    while process.poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    result = json.loads(file.read_text())
    assert result["complete"] is False and result["cases"][0]["variants"]["fused"]["ms"]["rounds"] == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt-9"], "argument --model: invalid choice: 'gpt-9'"),
        (["--work", "attention"], "argument --work: invalid choice: 'attention'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--device", "cuda:99"], "argument --device: expected a device that is there, got 'cuda:99'"),
        (["--device", "abacus"], "argument --device: expected a device that is there, got 'abacus'"),
        (["--backend", "abacus"], "argument --backend: expected one of"),
        (["--variants", "fused", "fastest"], "argument --variants: expected some of"),
        (["--tokens", "-3"], "argument --tokens: expected"),
        (["--vocab", "many"], "argument --vocab: expected an integer above 0, got 'many'"),
        (["--rounds", "0"], "argument --rounds: expected an integer above 0, got '0'"),
        (["--model", "llama-3-8b", "--hidden", "64"], "argument --hidden: expected nothing beside --model"),
        (["--model", "llama-3-8b", "--teacher-model", "gemma-3-1b"], "got 'gemma-3-1b' with 262144"),
        (["--json", "{file}/result.json"], "argument --json: expected a file that can be written"),
        (["--markdown", "{file}/result.md"], "argument --markdown: expected a file that can be written"),
        (["--plots", "{file}/plots"], "argument --plots: expected a file that can be written"),
    ],
)
def test_bad_input(arguments, words, capsys, tmp_path):
    file = tmp_path / "a-file-and-no-folder"
    file.touch()
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *(text.format(file=file) for text in arguments)])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_a_backend_that_this_machine_cannot_have(monkeypatch, capsys):
    from dataclasses import replace

    monkeypatch.setitem(BACKENDS, "cpu", replace(BACKENDS["cpu"], unavailable=lambda: "no compiler was here"))
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--backend", "cpu"])
    assert end.value.code == 2
    assert "backend 'cpu' cannot serve on this machine: no compiler was here" in capsys.readouterr().err


def test_plots_without_matplotlib(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *SMALL, "--plots", str(tmp_path)])
    assert end.value.code == 2
    assert "argument --plots: plots need matplotlib: pip install 'fastkd[bench]'" in capsys.readouterr().err


# --- the comparison, the clock and the arithmetic --------------------------------------------------------------------


@pytest.mark.parametrize("work", ["heads", "logits"])
def test_the_reference_is_plain_pytorch_in_float64_whatever_its_chunks(work, monkeypatch):
    case = Case(work, 13, 50, 6, 6, "fp32")
    inputs = WORKS[work].inputs(case)
    wide = {k: x.detach().double().requires_grad_(x.requires_grad) for k, x in inputs.items()}
    z_s, z_t = (
        (wide["hidden"] @ wide["weight"].T, wide["teacher_hidden"] @ wide["teacher_weight"].T)
        if work == "heads"
        else wide.values()
    )
    loss = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="batchmean")
    loss.backward()
    monkeypatch.setattr(measure, "REFERENCE_CHUNK", 4 * 50)  # 4 tokens, the last chunk 1
    found = measure.reference(case, inputs)
    torch.testing.assert_close(found.pop("loss"), loss.detach())
    assert found.keys() == {k for k, x in inputs.items() if x.requires_grad}
    for name, grad in found.items():
        torch.testing.assert_close(grad, wide[name].grad)


def sabotaged(how):
    def loss(hidden, weight, teacher_hidden, teacher_weight):
        student, teacher = Head(hidden, weight), Head(teacher_hidden, teacher_weight)
        if how == "temperature":
            return fastkd.kd_loss(student, teacher, temperature=1.3)
        if how == "swapped":
            return fastkd.kd_loss(student, teacher, "reverse_kl")
        if how == "a token left out":
            return fastkd.kd_loss(Head(hidden[:-8], weight), Head(teacher_hidden[:-8], teacher_weight))
        if how == "no gradient of hidden":
            return fastkd.kd_loss(Head(hidden.detach(), weight), teacher)
        if how == "part of the vocabulary":
            return fastkd.kd_loss(Head(hidden, weight[:600]), Head(teacher_hidden, teacher_weight[:600]))
        return fused(hidden, weight, teacher_hidden, teacher_weight)

    return loss


SABOTAGE = ["temperature", "swapped", "a token left out", "no gradient of hidden", "part of the vocabulary"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("how", [*SABOTAGE, None])
def test_the_comparison_catches_what_computes_something_else(how, dtype):
    case = Case("heads", 48, 700, 32, 32, dtype)
    inputs = WORKS["heads"].inputs(case)
    found = measure.errors(sabotaged(how), inputs, measure.reference(case, inputs))
    reason = measure.disagreement(found, measure.LIMITS[case.torch_dtype.itemsize])
    assert (reason is None) == (how is None), f"{how}: {found}"


def test_a_case_is_compared_smaller_where_float64_would_take_too_long():
    assert measure.comparable(CASE) == CASE
    large = measure.comparable(Case("heads", 4096, 128256, 2048, 8192, "bf16"))
    assert (large.tokens, large.vocab, large.dtype) == (4096, 128256, "bf16")  # more than one chunk
    assert large.hidden == large.teacher_hidden == 128
    huge = measure.comparable(Case("logits", 2**18, 2**18, None, None, "fp32"))
    assert huge.tokens * huge.vocab * 64 <= measure.REFERENCE_WORK and huge.hidden is None


def test_what_is_compared_smaller_is_said_and_timed_whole(run, monkeypatch):
    monkeypatch.setattr(measure, "REFERENCE_WORK", 48 * 350 * 64)
    _, result, out = run("--variants", "fused", "--dtype", "fp32")
    assert result["cases"][0]["compared_at"] == {"tokens": 48, "vocab": 350, "hidden": 32, "teacher_hidden": 32}
    assert "compared with float64 at tokens 48, vocab 350, hidden 32" in out
    assert result["cases"][0]["variants"]["fused"]["status"] == "measured"


def test_ratios():
    medians = {"fused": 10.0, "naive": 40.0, "naive fp32": 60.0, "compiled": 15.0, "gemms": 8.0}
    entries = {name: {"status": "measured", "ms": {"median": value}} for name, value in medians.items()}
    entries["liger"] = {"status": "fails", "reason": "no"}
    measure.ratios(entries, "gemms")
    assert entries["fused"]["faster_than"] == {"naive": 4.0, "naive fp32": 6.0, "compiled": 1.5}
    assert entries["fused"]["to_floor"] == 1.25
    assert entries["naive"]["faster_than"] == {"naive fp32": 1.5, "compiled": 0.375}
    assert "to_floor" not in entries["liger"]
    cells = report.cells({**entries["fused"], "ms": {"median": 10.0, "iqr": 1.0}, "peak_bytes": 3 * 2**20})
    assert cells == ["10 ms", "10%", "3 MiB", "4.00x", "6.00x", "1.50x", "1.25x", "", ""]
    del entries["gemms"]
    measure.ratios(entries, "gemms")
    assert entries["fused"]["to_floor"] is None


def test_the_summary_of_rounds():
    found = measure.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"median": 3.0, "min": 1.0, "max": 5.0, "iqr": 2.0, "rounds": 5}
    assert measure.summary([7.0])["iqr"] == 0


def test_variants_take_turns_and_the_first_round_is_not_counted():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    *_, taken = measure.times(runs, 2)
    assert order == list("ababab") and [len(values) for values in taken.values()] == [2, 2]


def test_the_copy_moves_what_the_work_must_move():
    inputs = WORKS["logits"].inputs(Case("logits", 4, 100, None, None, "bf16"))
    copied = WORKS["logits"].make_floor(inputs)()
    assert 2 * copied.nbytes == 3 * inputs["logits"].nbytes  # read and written; two inputs read, a gradient written


def test_gemms_write_what_they_should():
    inputs = WORKS["heads"].inputs(Case("heads", 5, 11, 3, 4, "fp32"))
    run = WORKS["heads"].make_floor(inputs)
    run()
    logits, dh, dw = (
        dict(zip(run.__code__.co_freevars, (c.cell_contents for c in run.__closure__)))[n]
        for n in ("logits", "dh", "dw")
    )
    h, w = inputs["hidden"].detach(), inputs["weight"].detach()
    torch.testing.assert_close(logits, h @ w.T)
    torch.testing.assert_close(dh, logits @ w)
    torch.testing.assert_close(dw, logits.T @ h)


# --- tables and pictures ---------------------------------------------------------------------------------------------


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


def test_a_variant_that_a_work_does_not_have_is_said(run):
    size = "--tokens", "8", "--vocab", "50", "--rounds", "1", "--dtype", "fp32"
    _, result, out = run("--work", "logits", "--variants", "fused", "liger", size=size)
    assert "logits: has no variant 'liger' in this dtype" in result["skipped"] and "no variant 'liger'" in out
