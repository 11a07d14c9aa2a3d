"""A cache on disk: killed writers, two writers, damaged and foreign files, other tokenizers."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_cases import bpe, fill, top_k

from fastkd.teacher_cache import CacheError, Meta, Writer, open, tokenizer_hash, verify

META = Meta(100, 6)
HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def same(cache, sequences):
    return len(cache) == len(sequences) and all(np.array_equal(cache[i].ids, s[0]) for i, s in enumerate(sequences))


# --- writers ---

WRITE = """
import sys, time
from cache_cases import top_k
from fastkd.teacher_cache import Meta, Writer
writer = Writer(sys.argv[1], Meta(100, 6), tokens_per_shard=8)
for seed in range(5):
    writer.write(*top_k(4, 100, 6, seed))
print("wrote", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def at_work(tmp_path_factory):
    """A folder and the process of a writer with two whole shards and one sequence in the open one."""
    folder = tmp_path_factory.mktemp("at-work") / "cache"
    with subprocess.Popen([sys.executable, "-c", WRITE, folder], env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"wrote\n"
        yield folder, process
        process.kill()


def test_a_second_writer_is_refused_while_the_first_lives_and_readers_are_not(at_work):
    folder, process = at_work
    before = names(folder)
    for resume in (False, True):
        with pytest.raises(CacheError, match=f"{folder}: another writer is at work, process {process.pid}$"):
            Writer(folder, META, resume=resume)
    assert len(open(folder)) == 4  # the whole shards
    assert names(folder) == before


def test_a_killed_writer_loses_the_open_shard_and_no_more(at_work, tmp_path):
    folder, process = at_work
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = folder / ".shard-00002.parquet.tmp"  # what a writer leaves that is killed while it writes a file
    left.write_bytes(b"PAR1 and so on")
    assert len(open(folder)) == 4
    with Writer(folder, META, tokens_per_shard=8, resume=True) as writer:
        assert not left.exists()
        assert writer.sequences == 4
        for seed in range(4, 7):
            writer.write(*top_k(4, 100, 6, seed))
        assert writer.sequences == 7
    assert names(folder) == [".lock", *(f"shard-0000{i}.parquet" for i in range(4))]
    assert same(open(folder), [top_k(4, 100, 6, seed) for seed in range(7)])
    assert verify(folder) == []
    # byte by byte what a writer makes that was never interrupted
    fill(tmp_path, (4,) * 7)
    for path in folder.glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_two_writers_in_one_process(tmp_path):
    with Writer(tmp_path, META) as writer:
        with pytest.raises(CacheError, match=f"process {os.getpid()}$"):
            Writer(tmp_path, META)
        writer.write(*top_k(4, 100, 6))
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.write(*top_k(4, 100, 6))
    writer.close()
    with pytest.raises(CacheError, match="has 1 sequences; resume=True goes on") as kept:
        Writer(tmp_path, META)
    Writer(tmp_path, META, resume=True).close()  # the one that failed holds no lock, though its frame lives on
    assert kept.traceback


def test_an_error_among_the_callers_sequences_keeps_those_before(tmp_path):
    with pytest.raises(KeyError), Writer(tmp_path, META) as writer:
        writer.write(*top_k(4, 100, 6))
        raise KeyError("the caller's")
    assert same(open(tmp_path), [top_k(4, 100, 6)])


def test_a_shard_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """When writing fails, as on a full disk, what waits is kept, and another attempt stores it."""
    write_table = pq.write_table

    def full(table, path, **settings):
        write_table(table, path, **settings)
        os.truncate(path, 100)
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, META, tokens_per_shard=8)
    writer.write(*top_k(4, 100, 6, 0))
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(*top_k(4, 100, 6, 1))
        assert not list(tmp_path.glob("shard-*"))
    writer.close()
    assert same(open(tmp_path), [top_k(4, 100, 6, seed) for seed in (0, 1)])


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(Path, "rename", lambda path, to: events.append("rename") or rename(path, to))
    fill(tmp_path, (3,))
    assert events == [str(tmp_path / ".shard-00000.parquet.tmp"), "rename", str(tmp_path)]


OTHERS = {
    "vocab": 101, "k": 5, "kind": "samples", "temperature": 2.0, "tail": "drop", "log_probs": "int8",
    "tokenizer": "0123", "teacher": "other", "normalize": True,
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_metadata_cannot_go_on(tmp_path, name):
    fill(tmp_path)
    message = f"{tmp_path}: cannot go on with other metadata: {name} is {getattr(META, name)!r} there and "
    with pytest.raises(CacheError, match=re.escape(f"{message}{OTHERS[name]!r} here")):
        Writer(tmp_path, replace(META, **{name: OTHERS[name]}), resume=True)
    assert verify(tmp_path) == []


def test_every_field_of_the_metadata_is_stored_and_compared():
    assert {*OTHERS, "fastkd_version"} == set(Meta.__dataclass_fields__)
    for name, value in OTHERS.items():
        changed = replace(META, **{name: value})
        assert changed != META
        assert Meta.from_dict(changed.to_dict()) == changed
    assert replace(META, fastkd_version="9") == META


def test_the_folder_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="file: expected a folder, got a file"):
        Writer(tmp_path / "file", META)
    for absent in ("file", "nowhere"):
        with pytest.raises(CacheError, match=f"{absent}: no such folder"):
            open(tmp_path / absent)


def test_an_empty_folder_is_no_cache(tmp_path):
    with pytest.raises(CacheError, match=r"no teacher cache: no shard-00000.parquet in it"):
        open(tmp_path)
    assert "no teacher cache" in verify(tmp_path)[0]
    with Writer(tmp_path, META) as writer:
        assert writer.report()["tokens"] == 0
        assert writer.report()["bytes_per_token"] == {"values": None, "encoded": None, "compressed": None}


# --- damage ---


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    fill(folder)
    return folder


def refuses(folder, file, message):
    """Opening or reading names the file and the reason, and so does verify, once."""
    pattern = re.escape(str(folder / file)) + ": " + message
    with pytest.raises(CacheError, match=pattern):
        cache = open(folder)
        for i in range(len(cache)):
            cache[i]
    problems = verify(folder)
    assert len([problem for problem in problems if re.match(pattern, problem)]) == 1, problems
    return problems


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "an empty file"),
        (3, "cut short"),
        (4, "cut short"),
        (0.5, "cut short: a Parquet file ends with b'PAR1', got .* after"),  # within the pages
        (-1, "cut short"),  # the last byte is gone
    ],
)
def test_a_file_cut_short(intact, tmp_path, keep, message):
    folder = shutil.copytree(intact, tmp_path / "cache")
    file = folder / "shard-00001.parquet"
    size = file.stat().st_size
    os.truncate(file, int(keep * size) if 0 < keep < 1 else keep % size)
    assert len(refuses(folder, file.name, message)) == 1
    with pytest.raises(CacheError, match=f"{file}: {message}"):
        Writer(folder, META, resume=True)


def test_every_damaged_byte_is_found_or_makes_no_difference(intact, tmp_path):
    """Each 5th byte of a shard; none of them stops the process, or changes what is read."""
    good = open(intact)
    expected = [good[0], good[1]]
    file = tmp_path / "shard-00000.parquet"
    content = (intact / file.name).read_bytes()
    found = 0
    for at in range(0, len(content), 5):
        file.write_bytes(content[:at] + bytes([content[at] ^ 0x41]) + content[at + 1 :])
        try:
            cache = open(tmp_path)
            got = [cache[0], cache[1]]
        except CacheError as error:
            assert str(file) in str(error)
            found += 1
            continue
        assert cache.meta == good.meta
        for a, b in zip(got, expected):
            assert a.ids.equal(b.ids)
            assert a.log_probs.equal(b.log_probs)
            assert a.log_tail.equal(b.log_tail)
    assert found > len(content) / 5 * 0.7


def test_damaged_pages(intact, tmp_path):
    folder = shutil.copytree(intact, tmp_path / "cache")
    file = folder / "shard-00001.parquet"
    content = bytearray(file.read_bytes())
    place = pq.read_metadata(file).row_group(0).column(2)
    content[place.data_page_offset + place.total_compressed_size - 2] ^= 1
    file.write_bytes(content)
    refuses(folder, file.name, "its pages cannot be read: .*CRC")
    assert open(folder)[0].ids.shape == (5, 6)  # the others can still be read


def test_damaged_metadata(intact, tmp_path):
    """A digit that would make another, plausible cache of it."""
    folder = shutil.copytree(intact, tmp_path / "cache")
    file = folder / "shard-00001.parquet"
    content = file.read_bytes()
    assert content.count(b'"temperature": 1.0') == 1
    file.write_bytes(content.replace(b'"temperature": 1.0', b'"temperature": 2.0'))
    refuses(folder, file.name, "its metadata are damaged: they do not have the checksum b'[0-9]+'")


def test_foreign_files(intact, tmp_path):
    folder = shutil.copytree(intact, tmp_path / "cache")
    (folder / "README.md").write_text("about this cache")
    assert len(open(folder)) == 6  # not a Parquet file's name
    (folder / "shard-00003.parquet").write_text("no Parquet at all")
    refuses(folder, "shard-00003.parquet", r"no Parquet file: it must begin with b'PAR1', got b'no P'")
    pq.write_table(pa.table({"ids": [1, 2]}), folder / "shard-00003.parquet")
    refuses(folder, "shard-00003.parquet", "a Parquet file, but no shard of a teacher cache: it has no metadata")
    (folder / "shard-00003.parquet").rename(folder / "train.parquet")
    refuses(folder, "train.parquet", "no shard of a teacher cache: those are named shard-00000.parquet")
    (folder / "train.parquet").unlink()
    (folder / "shard-00003.parquet").mkdir()
    refuses(folder, "shard-00003.parquet", "Is a directory")


def test_shards_that_are_missing_or_from_elsewhere(intact, tmp_path):
    assert names(intact)[1:] == [f"shard-0000{i}.parquet" for i in range(3)]
    for name, change, file, message in (
        ("gap", lambda f: (f / "shard-00001.parquet").unlink(), 1, "missing, though shard-00002.parquet is there"),
        ("start", lambda f: (f / "shard-00000.parquet").unlink(), 0, "missing, though shard-00001.parquet is there"),
        ("swap", lambda f: (f / "shard-00002.parquet").rename(f / "shard-00001.parquet"), 1, "begins with sequence"),
        ("twice", lambda f: shutil.copy(f / "shard-00000.parquet", f / "shard-00003.parquet"), 3, "begins with"),
        ("moved", lambda f: (f / "shard-00001.parquet").replace(f / "shard-00000.parquet"), None, ""),
    ):
        folder = shutil.copytree(intact, tmp_path / name)
        change(folder)
        if file is not None:
            refuses(folder, f"shard-0000{file}.parquet", message)
    fill(tmp_path / "other", tail="drop")
    shutil.copy(tmp_path / "other" / "shard-00001.parquet", tmp_path / "twice" / "shard-00001.parquet")
    refuses(tmp_path / "twice", "shard-00001.parquet", "from another cache .*: tail is 'bucket' there and 'drop' here")
    with_text = shutil.copytree(intact, tmp_path / "text")
    fill(tmp_path / "texts", text=True)
    shutil.copy(tmp_path / "texts" / "shard-00001.parquet", with_text)
    refuses(with_text, "shard-00001.parquet", "from another cache .*: one has input_ids")


def rewrite(folder, change=None, metadata=None, **columns):
    """Writes the first shard anew with other columns or metadata; all checksums are right afterwards."""
    import json
    import zlib

    file = folder / "shard-00000.parquet"
    table = pq.read_table(file, partitioning=None)
    stored = dict(table.schema.metadata)
    content = json.loads(stored[b"fastkd.teacher_cache"]) | (metadata or {})
    stored[b"fastkd.teacher_cache"] = json.dumps(content).encode()
    stored[b"fastkd.teacher_cache.crc32"] = str(zlib.crc32(stored[b"fastkd.teacher_cache"])).encode()
    for name, edit in columns.items():
        field = table.schema.field(name)
        values = table.column(name).to_pylist()
        edit(values)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    pq.write_table((change or (lambda t: t))(table.replace_schema_metadata(stored)), file)


def setter(row, at, value):
    def edit(values):
        values[row][at] = value

    return edit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": {"format": 2}}, "format 2 of the teacher cache; this fastkd reads 1"),
        ({"metadata": {"k": "six"}}, "its metadata .* cannot be read"),
        ({"metadata": {"errors": None}}, "its metadata .* cannot be read"),
        ({"metadata": {"vocab": 70000}}, "its metadata ask for the columns .*uint32.* got .*uint16"),
        ({"metadata": {"sequences": 4}}, "expected one row group with 4 rows, got 1 row groups with 3 rows"),
        ({"metadata": {"tokens": 13}}, "expected 13 tokens in its sequences, got 12"),
        ({"metadata": {"k": 5}}, "lists in the column 'ids' do not have 5 values a token"),
        ({"metadata": {"first": 2}}, "begins with sequence 2, expected 0"),
        ({"change": lambda table: table.drop_columns(["log_tail"])}, "its metadata ask for the columns"),
        ({"tokens": lambda values: values.__setitem__(0, -1)}, "expected 12 tokens in its sequences"),
    ],
)
def test_metadata_and_content_that_disagree(intact, tmp_path, changes, message):
    folder = shutil.copytree(intact, tmp_path / "cache", ignore=shutil.ignore_patterns("shard-0000[12]*"))
    rewrite(folder, **changes)
    refuses(folder, "shard-00000.parquet", message)


@pytest.mark.parametrize(
    ("column", "edit", "message"),
    [
        ("ids", setter(2, 6, 100), "token 1 of sequence 2: expected ids below the vocabulary of 100"),
        ("ids", lambda v: v[0].__setitem__(7, v[0][6]), "token 1 of sequence 0: expected an id once in a token"),
        ("log_probs", setter(0, 3, np.float16(0.5)), "token 0 of sequence 0: expected log_probs of at most 0"),
        ("log_probs", setter(0, 3, np.float16(np.nan)), "token 0 of sequence 0: expected log_probs of at most 0"),
        ("log_probs", setter(0, 0, np.float16(-9)), "token 0 .*: expected probabilities and tail that sum to 1"),
        ("log_tail", setter(2, 6, 0.5), "token 6 of sequence 2: expected a log_tail of at most 0"),
        ("log_tail", setter(2, 6, -0.1), "token 6 of sequence 2: expected probabilities and tail that sum to 1"),
    ],
)
def test_verify_looks_at_every_value(intact, tmp_path, column, edit, message):
    folder = shutil.copytree(intact, tmp_path / "cache")
    rewrite(folder, **{column: edit})
    (problem,) = verify(folder)
    assert re.match(re.escape(str(folder / "shard-00000.parquet")) + ": " + message, problem)


def test_verify_looks_at_weights_and_text(tmp_path):
    for column, value, message in (("weights", -1.0, "not negative"), ("input_ids", -1, "input_ids of at least 0")):
        folder = tmp_path / column
        with Writer(folder, Meta(100, 2, "samples", log_probs="fp32")) as writer:
            writer.write(np.array([[1, 2]]), np.ones((1, 2)), None, np.array([5]))
        rewrite(folder, **{column: setter(0, 0, value)})
        (problem,) = verify(folder)
        assert message in problem


# --- other readers' expectations ---


def tokenizer(*words, merges=()):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=bpe(*words, merges=merges), pad_token="<pad>")


def test_the_hash_of_a_tokenizer():
    first = tokenizer()
    digest = tokenizer_hash(first)
    assert len(digest) == 32
    assert digest == tokenizer_hash(tokenizer())
    assert digest != tokenizer_hash(tokenizer("dog"))
    assert tokenizer_hash(tokenizer(merges=[("t", "h"), ("a", "t")])) != tokenizer_hash(
        tokenizer(merges=[("a", "t"), ("t", "h")])
    )
    first(["the", "cat"], padding=True, truncation=True, max_length=3)  # which the backend remembers
    assert digest == tokenizer_hash(first)
    first.add_tokens(["dog"])
    assert digest != tokenizer_hash(first)
    with pytest.raises(TypeError, match="Hugging Face tokenizer, got dict"):
        tokenizer_hash({})


def test_the_hash_is_the_same_in_every_process():
    program = "from cache_cases import *; from fastkd.teacher_cache import tokenizer_hash; print(tokenizer_hash(bpe()))"
    command = [sys.executable, "-c", program]
    environment = ENVIRONMENT | {"PYTHONHASHSEED": "7"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == tokenizer_hash(bpe())


def test_another_tokenizer_or_vocabulary_is_refused(tmp_path):
    own = tokenizer()
    digest, other = tokenizer_hash(own), tokenizer_hash(tokenizer("dog"))
    fill(tmp_path, tokenizer=digest)
    for same in (own, digest):
        assert len(open(tmp_path, tokenizer=same, vocab=100)) == 6
    for another in (tokenizer("dog"), other):
        with pytest.raises(CacheError, match=f"{tmp_path}: ids of another tokenizer: {digest}, expected {other}"):
            open(tmp_path, tokenizer=another)
    with pytest.raises(CacheError, match=f"{tmp_path}: .* a vocabulary of 100, expected 101"):
        open(tmp_path, vocab=101)
    fill(tmp_path / "unknown")
    with pytest.raises(CacheError, match="does not say of which tokenizer"):
        open(tmp_path / "unknown", tokenizer=own)


# --- pyarrow ---


def test_without_pyarrow_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (lambda: Writer(tmp_path / "new", META), lambda: open(tmp_path), lambda: verify(tmp_path)):
        with pytest.raises(ModuleNotFoundError) as error:
            use()
        assert str(error.value) == "fastkd.teacher_cache needs pyarrow; get it with: pip install 'fastkd[cache]'"
    assert not (tmp_path / "new").exists()
