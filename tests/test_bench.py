"""fastkd bench: what it measures is compared first, what fails is reported and the rest goes on. No test looks at how
long anything took."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import Head, bench, cli
from fastkd.backends import BACKENDS, extension
from fastkd.bench import measure, memory, peers, plots
from fastkd.bench.peers import Peer
from fastkd.bench.work import WORKS, Case, usual

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
    assert names[4:] == [p.name for p in peers.PEERS if "heads" in p.works and p.missing() is None]
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
    listed = "--model", "smollm2-135m", "--work", "sparse", "topk", "heads", "--top-k", "32", "--no-peers"
    assert cli.main(["bench", *listed, "--teacher-model", "smollm2-1.7b"]) == 1
    assert [(c.teacher_hidden, c.teacher_model, c.top_k) for c in seen[-3:]] == [
        *[(None, None, 32)] * 2,
        (2048, "smollm2-1.7b", None),
    ]


def test_what_is_compared_smaller_is_said_and_timed_whole(run, monkeypatch):
    monkeypatch.setattr(measure, "REFERENCE_WORK", 48 * 350 * 64)
    _, result, out = run("--variants", "fused", "--dtype", "fp32")
    assert result["cases"][0]["compared_at"] == {"tokens": 48, "vocab": 350, "hidden": 32, "teacher_hidden": 32}
    assert "compared with float64 at tokens 48, vocab 350, hidden 32" in out
    assert result["cases"][0]["variants"]["fused"]["status"] == "measured"


def test_a_variant_that_a_work_does_not_have_is_said(run):
    size = "--tokens", "8", "--vocab", "50", "--rounds", "1", "--dtype", "fp32"
    _, result, out = run("--work", "logits", "--variants", "fused", "liger", size=size)
    assert "logits: has no variant 'liger' in this dtype" in result["skipped"] and "no variant 'liger'" in out


# --- peers -----------------------------------------------------------------------------------------------------------


MISSING = {peer.distribution: peer.missing() is not None for peer in peers.PEERS}


@pytest.mark.skipif(MISSING["liger-kernel"], reason="liger-kernel is not installed")
def test_liger_computes_the_same(run):
    status, result, _ = run("--variants", "fused", "liger eager", size=SMALL)
    assert status == 0 and result["cases"][0]["variants"]["liger eager"]["status"] == "measured"
    assert result["peers"]["liger-kernel"]


@pytest.mark.skipif(MISSING["trl"], reason="trl is not installed")
def test_trl_computes_the_same(run):
    status, result, _ = run("--work", "sparse", "--variants", "fused", "trl", "--dtype", "fp32")
    entry = result["cases"][0]["variants"]["trl"]
    assert status == 0 and entry["status"] == "measured" and max(entry["errors"].values()) < 1e-5
    assert result["peers"]["trl"]


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
    _, result, _ = run("--work", "kl_div", "--variants", "fused")  # which it does not have
    assert not result["skipped"]


# --- what goes wrong -------------------------------------------------------------------------------------------------


LISTED = 48 * 64 * (8 + 2)  # ids and log-probabilities


@pytest.mark.parametrize(("work", "inputs"), [("heads", 2 * 748 * 32 * 2), ("sparse", 748 * 32 * 2 + LISTED)])
def test_naive_that_does_not_fit(run, monkeypatch, work, inputs):
    case = Case(work, 48, 700, 32, 32, "bf16", top_k=64).of_its_work()
    needed = WORKS[work].planned(case, "naive fp32") + inputs
    monkeypatch.setattr(measure, "available_bytes", lambda device: needed)
    _, result, _ = run("--work", work, "--dtype", "bf16", "--variants", "naive fp32")
    assert result["cases"][0]["variants"]["naive fp32"]["status"] == "measured"
    monkeypatch.setattr(measure, "available_bytes", lambda device: needed - 1)
    status, result, out = run("--work", work, "--dtype", "bf16", "--variants", "fused", "naive", "naive fp32")
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
        (["--work", "topk", "--top-k", "0"], "argument --top-k: expected an integer above 0, got '0'"),
        (["--work", "sparse", "--vocab", "50"], "argument --top-k: expected at most the 50 entries of the vocabulary"),
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
