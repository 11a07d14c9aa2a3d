import json
import re
import shutil
import subprocess
import sys

import pytest
from cache_cases import fill

from fastkd import cache, cli, teacher_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "cache"
    fill(folder, log_probs="int8", tokenizer="0123abcd", temperature=2.0)
    return folder


def test_info_as_data(folder, capsys):
    assert cli.main(["cache", "info", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cache = teacher_cache.open(folder)
    assert report == {"folder": str(folder), "meta": cache.meta.to_dict(), **cache.summary()}
    assert report["meta"]["tokenizer"] == "0123abcd"
    assert (report["sequences"], report["tokens"], report["shards"], report["entries"]) == (6, 31, 3, 186)
    assert report["bytes_per_entry"]["values"] == 3
    assert report["bytes_per_token"]["values"] == 6 * 3 + 12
    assert 0 < report["errors"]["kl"] < report["errors"]["log_prob"]
    assert report["file_bytes"] == sum(path.stat().st_size for path in folder.glob("*.parquet"))


def test_info_for_people(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["cache", "info", str(folder)]) == 0
    out = capsys.readouterr().out
    for fact in ("tokenizer +0123abcd", "temperature +2.0", "teacher +unknown", "sequences +6 ", "tokens +31 "):
        assert re.search(f"(?m)^{fact}", out), fact
    error = teacher_cache.open(folder).summary()["errors"]["kl"]
    assert re.search(rf"KL\(exact, stored\), mean over tokens, nats +{error:.3g}", out)
    assert re.search(r"an id and log-probability +│ +3\.00 ", out)


def test_verify(folder, tmp_path, capsys):
    assert cli.main(["cache", "verify", str(folder)]) == 0
    assert f"{folder}: all is well in 3 files" in capsys.readouterr().out
    bad = shutil.copytree(folder, tmp_path / "bad")
    for name, size in (("shard-00000.parquet", 0), ("shard-00002.parquet", 300)):
        with (bad / name).open("r+b") as file:
            file.truncate(size)
    assert cli.main(["cache", "verify", str(bad)]) == 1
    out = capsys.readouterr().out
    assert f"{bad}/shard-00000.parquet: an empty file" in out
    assert f"{bad}/shard-00002.parquet: cut short" in out
    assert f"{bad}: 2 problems in 3 files" in out
    assert cli.main(["cache", "verify", str(bad), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 3
    assert report["problems"] == teacher_cache.verify(bad)


@pytest.mark.parametrize("action", ["info", "verify"])
def test_no_cache_there(action, tmp_path, capsys):
    assert cli.main(["cache", action, str(tmp_path / "nowhere")]) == 1
    printed = capsys.readouterr()
    assert f"{tmp_path}/nowhere: no such folder" in printed.out + printed.err
    assert "Traceback" not in printed.err


def test_info_names_the_file_that_is_damaged(folder, tmp_path, capsys):
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "shard-00001.parquet").write_bytes(b"something else")
    assert cli.main(["cache", "info", str(bad)]) == 1
    assert capsys.readouterr().err == (
        f"fastkd cache: {bad}/shard-00001.parquet: no Parquet file: it must begin with b'PAR1', got b'some'\n"
    )


def test_without_pyarrow_there_is_one_line_and_only_build_imports_what_build_needs(folder):
    program = f"""
import sys
sys.modules["pyarrow"] = None
from fastkd import cli
status = cli.main(["cache", "info", {str(folder)!r}])
print(*sys.modules)
sys.exit(status)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "fastkd cache: fastkd.teacher_cache needs pyarrow; get it with: pip install 'fastkd[cache]'\n"
    )
    loaded = result.stdout.split()
    assert "fastkd.cache" in loaded
    assert not {"fastkd.cache_build", "transformers"} & set(loaded)


@pytest.mark.parametrize("action", cache.ACTIONS)
def test_every_action_has_help(action, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["cache", action, "--help"])
    assert end.value.code == 0
    assert f"usage: fastkd cache {action} [-h]" in capsys.readouterr().out
