import json
import subprocess
import sys

import pytest

import fastkd.cli
import fastkd.doctor


class Refusing:
    name = "refusing"
    summary = "rows of shape [N, V]"

    def unavailable(self):
        return "needs an accelerator [sm_80]"


def test_help_names_every_command_and_ends_well():
    result = subprocess.run([sys.executable, "-m", "fastkd", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    for name, summary in fastkd.cli.COMMANDS.items():
        assert name in result.stdout
        assert summary in result.stdout


@pytest.mark.parametrize("name", fastkd.cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        fastkd.cli.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: fastkd {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["doctor", "--no-such-option"]])
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        fastkd.cli.main(arguments)
    assert end.value.code == 2
    assert "usage: fastkd" in capsys.readouterr().err


def test_doctor_as_a_program():
    result = subprocess.run([sys.executable, "-m", "fastkd", "doctor", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert report["devices"][0]["device"] == "cpu"
    assert report["processor"]["threads"] >= 1
    assert (report["extension"]["isa"] is None) == (report["extension"]["error"] is not None)
    assert {"reference", "torch", "cpu"} <= {backend["name"] for backend in report["backends"]}
    for backend in report["backends"]:
        assert backend["serves"] == (backend["reason"] is None)


def test_doctor_for_people_names_every_backend(capsys):
    assert fastkd.cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in fastkd.doctor.BACKENDS:
        assert name in out


def test_doctor_fails_when_no_backend_serves_and_prints_the_reason_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(fastkd.doctor, "BACKENDS", {"refusing": Refusing()})
    assert fastkd.cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "rows of shape [N, V]" in out
    assert "no: needs an accelerator [sm_80]" in out
