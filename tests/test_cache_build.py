"""`fastkd cache build` on models small enough to run in a moment: against their own logits, resumed, end to end."""

import argparse
import contextlib
import copy
import io
import json
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers

from fastkd import cache_build, teacher_cache
from fastkd.cache_build import BuildError
from fastkd.teacher_cache import Meta, Writer

V, SEQ = 101, 12  # a prime: no multiple of any tile
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "initializer_range": 0.3,  # large enough for distributions that are far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model_of(name, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def llama():
    return model_of("Llama")


@pytest.fixture
def text():
    return torch.randint(3, V, (7, SEQ), generator=torch.Generator().manual_seed(1))


def meta(**settings):
    return Meta(**({"vocab": V, "k": 5, "log_probs": "fp32"} | settings))


def captured(folder, model, text, *, stop=None, settings=None, **options):
    """The cache that capture writes; with ``stop`` as if it were killed after so many sequences."""

    class Killed(Exception):
        pass

    with Writer(folder, meta(**(settings or {})), resume=True, tokens_per_shard=2 * SEQ) as writer:
        start = writer.sequences

        def tick(note=""):
            if stop is not None and writer.sequences == stop:
                writer._pending.clear()  # what an open shard would lose
                raise Killed

        with contextlib.suppress(Killed):
            cache_build.capture(model, text, writer, start=start, tick=tick, **options)
    return teacher_cache.open(folder)


def check(cache, model, text, temperature=1.0, rtol=1e-5, atol=1e-5):
    """Against the softmax of the model's own logits."""
    assert len(cache) == len(text)
    for i, ids in enumerate(text):
        with torch.no_grad():
            log_p = (model(ids[None]).logits[0].double() / temperature).log_softmax(-1)
        best, top = log_p.topk(cache.meta.k), cache[i]
        torch.testing.assert_close(top.log_probs.double(), best.values, rtol=rtol, atol=atol)
        torch.testing.assert_close(log_p.gather(-1, top.ids.long()), best.values, rtol=rtol, atol=atol)
        tail = log_p.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(top.log_tail.double(), tail, rtol=10 * rtol, atol=10 * atol)
        assert cache.input_ids(i).tolist() == ids.tolist()


# --- capture ---

ARCHITECTURES = {
    "llama": lambda: model_of("Llama"),
    "tied": lambda: model_of("Llama", tie_word_embeddings=True),
    "bias": lambda: model_of("Phi"),
    "softcap": lambda: model_of("Gemma2", final_logit_softcapping=2.0, query_pre_attn_scalar=12),
    "logits_soft_cap": lambda: model_of("RecurrentGemma", logits_soft_cap=2.0, lru_width=24, num_hidden_layers=3),
    "logit_scale": lambda: model_of("Cohere", logit_scale=0.25),
    "logits_scaling": lambda: model_of("Granite", logits_scaling=0.5),
    "lm_head_multiplier": lambda: model_of(
        "FalconH1", lm_head_multiplier=0.5, mamba_d_ssm=24, mamba_n_heads=2, mamba_d_state=8
    ),
    "hyperclovax": lambda: model_of("HyperCLOVAX", logits_scaling=0.5),
    "layer norm": lambda: model_of("GPTNeoX", rotary_pct=0.5),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_top_k_is_that_of_the_models_own_logits(name, text, tmp_path):
    model = ARCHITECTURES[name]()
    check(captured(tmp_path, model, text, batch=3), model, text)


@pytest.mark.parametrize(
    "name", ["softcap", "logits_soft_cap", "logit_scale", "logits_scaling", "lm_head_multiplier", "hyperclovax"]
)
def test_a_forgotten_factor_is_refused(name, text, tmp_path, monkeypatch):
    """The check that stands behind the table of names: it would have caught each of them."""
    model = ARCHITECTURES[name]()
    monkeypatch.setattr(cache_build, "form", lambda config: {"softcap": None, "logit_scale": 1.0})
    with pytest.raises(BuildError, match=r"makes its logits in a way of its own.*differ by [\d.]+% of their spread"):
        captured(tmp_path, model, text)
    assert not list(tmp_path.glob("*.parquet"))


def test_temperature(llama, text, tmp_path):
    check(captured(tmp_path, llama, text, settings={"temperature": 2.5}), llama, text, temperature=2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["in float32", "as they are computed in"])
def test_16_bits(dtype, parameters, llama, text, tmp_path):
    model = llama if parameters == "in float32" else model_of("Llama").to(dtype)
    cache = captured(tmp_path, model, text, dtype=dtype)
    errors = []
    for i, ids in enumerate(text):
        log_p = llama(ids[None]).logits[0].log_softmax(-1)
        errors.append(cache[i].log_probs - log_p.gather(-1, cache[i].ids.long()))
    rounding = torch.finfo(dtype).eps / 2
    assert (
        rounding < torch.stack(errors).square().mean().sqrt() < 16 * rounding
    )  # of numbers around 1, layer after layer


def test_parameters_in_float32_compute_in_autocast(llama, text):
    head = cache_build.head_of(llama, text, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = llama.model(text).last_hidden_state
    assert head.hidden.equal(expected.bfloat16()) and head.weight.dtype == torch.bfloat16
    assert not head.hidden.equal(llama.model(text).last_hidden_state.bfloat16())


def test_the_model_is_left_as_it_was(text, tmp_path):
    model = model_of("Llama", attention_dropout=0.5).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    check(captured(tmp_path, model, text), model.eval(), text)
    model.train()
    captured(tmp_path / "again", model, text)
    assert model.training
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_a_cache_of_samples_is_refused(llama, text, tmp_path):
    with pytest.raises(BuildError, match="must be of kind 'topk', got 'samples'"):
        captured(tmp_path, llama, text, settings={"kind": "samples"})


def test_no_model_without_a_head(text, tmp_path):
    with pytest.raises(BuildError, match="LlamaModel has no output embeddings"):
        captured(tmp_path, transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), text)


# --- resume ---


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("stop", [1, 3, 5, 6, 7])
def test_a_stopped_run_that_goes_on_ends_with_the_same_cache(stop, batch, llama, text, tmp_path):
    whole = captured(tmp_path / "whole", llama, text, batch=batch)
    killed = tmp_path / "killed"
    with Writer(killed, meta()):
        pass
    try:
        captured(killed, llama, text, batch=batch, stop=stop)
    except teacher_cache.CacheError:
        assert stop == 1  # nothing was stored
    resumed = captured(killed, llama, text, batch=batch)
    assert len(resumed) == len(whole) == len(text)
    for file in sorted((tmp_path / "whole").glob("*.parquet")):
        assert file.read_bytes() == (killed / file.name).read_bytes()


def test_batches_begin_where_they_would_have(llama, text, tmp_path):
    """The numbers of a batch depend on what is in it."""
    read = []
    hook = llama.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    notes = []
    with Writer(tmp_path, meta()) as writer:
        writer.write(*_rows(5), torch.zeros(SEQ), text[0])
        cache_build.capture(llama, text, writer, start=5, batch=3, tick=notes.append)
        assert writer.sequences == 1 + 2
    hook.remove()
    assert [batch for batch in read if len(batch[0]) == SEQ][-2:] == [text[3:6].tolist(), text[6:].tolist()]
    assert len(notes) == 2 and all(note.endswith(" tokens/s") for note in notes)


def _rows(k):
    return torch.full((SEQ, k), -1), torch.full((SEQ, k), -torch.inf)


# --- text ---


class Letters:
    """A tokenizer with a token for each character code."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}


def test_sequences_follow_the_texts_with_an_end_after_each():
    got = cache_build.sequences(["abc", "defg"], Letters(), 4)
    assert got.tolist() == [[97, 98, 99, 0], [100, 101, 102, 103]]
    assert got.dtype == torch.int32


def test_no_end_of_text_token():
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    assert cache_build.sequences(["abc", "def"], tokenizer, 6).tolist() == [[97, 98, 99, 100, 101, 102]]


def test_limit_stops_reading():
    def texts():
        yield "abcdef"
        raise AssertionError("read on")

    assert cache_build.sequences(texts(), Letters(), 2, limit=5).tolist() == [[97, 98], [99, 100]]


@pytest.mark.parametrize("limit, message", [(None, "the 4 tokens of text"), (9, "the 4 tokens"), (3, "--limit 3")])
def test_too_little_text(limit, message):
    with pytest.raises(BuildError, match=f"--seq 10 is longer than {message}"):
        cache_build.sequences(["abc"], Letters(), 10, limit=limit)


def test_documents(tmp_path, monkeypatch):
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("one\ntwo é\n", encoding="utf-8")
    lines.write_text('{"text": "x", "body": "1"}\n\n{"text": "y", "body": "2"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin"))
    assert list(cache_build.documents([str(plain), "-"], None, "text")) == ["one\ntwo é\n", "from\nstdin"]
    assert list(cache_build.documents(None, str(lines), "body")) == ["1", "2"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", r"line 2: expected a JSON object: "),
        ("[1]", r"line 2: expected an object with a string in the field 'text', got list"),
        ('{"body": "x", "a": 1}', r"line 2: .* field 'text', got the fields \['a', 'body'\]"),
        ('{"text": 3}', r"line 2: .* a string in the field 'text', got the fields \['text'\]"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    file = tmp_path / "b.jsonl"
    file.write_text('{"text": "x"}\n' + line)
    with pytest.raises(BuildError, match=f"--jsonl {file}, {message}"):
        list(cache_build.documents(None, str(file), "text"))


def test_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BuildError, match=f"{file}: expected text in UTF-8"):
        list(cache_build.documents([str(file)], None, "text"))


# --- the command ---


def arguments(*argv):
    parser = argparse.ArgumentParser()
    cache_build.add_arguments(parser)
    return parser.parse_args([str(word) for word in argv])


@pytest.fixture(scope="module")
def teacher(llama, tmp_path_factory):
    """A folder that from_pretrained reads: the model, and a tokenizer of words."""
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(V - 3))]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(" ".join(f"w{(7 * i * i) % 90}" for i in range(100)))
    return path


def test_end_to_end(teacher, file, llama, tmp_path, capsys):
    out = tmp_path / "cache"
    options = ["--k", 6, "--seq", 10, "--batch", 4, "--dtype", "fp32", "--log-probs", "fp32", "--tail", "renormalize"]
    assert cache_build.run(arguments("--model", teacher, "--text", file, "--out", out, *options)) == 0
    printed = capsys.readouterr()
    assert f"{out}: 10 sequences, 100 tokens," in printed.out and "bytes a token" in printed.out and not printed.err
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    cache = teacher_cache.open(out, tokenizer=tokenizer)
    assert (cache.meta.vocab, cache.meta.k, cache.meta.tail, cache.meta.teacher) == (
        V,
        6,
        "renormalize",
        f"{teacher}, float32",
    )
    ids = [*tokenizer(file.read_text())["input_ids"], 2]
    check(cache, llama, torch.tensor(ids[:100]).view(10, 10))


def test_resume_from_the_command_line(teacher, file, tmp_path, capsys):
    def build(out, *options):
        return cache_build.run(
            arguments("--model", teacher, "--text", file, "--out", out, "--k", 3, "--seq", 10, "--batch", 4, *options)
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert build(whole) == 0
    assert build(parts, "--limit", 69) == 0  # six sequences, the seventh is not whole
    assert len(teacher_cache.open(parts)) == 6
    assert build(parts) == 2
    assert "has a cache already; --resume goes on with it" in capsys.readouterr().err
    assert build(parts, "--resume") == 0
    one, two = teacher_cache.open(whole), teacher_cache.open(parts)
    assert len(one) == len(two) == 10
    for i in range(10):
        assert one[i].log_probs.equal(two[i].log_probs) and one[i].ids.equal(two[i].ids)
        assert one[i].log_tail.equal(two[i].log_tail) and one.input_ids(i).equal(two.input_ids(i))
    assert build(parts, "--resume") == 0  # nothing is left to do
    assert len(teacher_cache.open(parts)) == 10

    assert build(parts, "--resume", "--limit", 20) == 2
    assert "has 10 sequences already, expected at most the text's 2" in capsys.readouterr().err
    assert build(parts, "--resume", "--temperature", 2) == 2
    assert "temperature is 1.0 there and 2.0 here" in capsys.readouterr().err
    file.with_name("b.txt").write_text(" ".join(f"w{i % 90}" for i in range(200)))
    other = ("--model", teacher, "--text", file.with_name("b.txt"), "--out", parts, "--k", 3, "--seq", 10, "--resume")
    assert cache_build.run(arguments(*other)) == 2
    assert "its sequence 9 is another text" in capsys.readouterr().err


def test_jsonl(teacher, tmp_path):
    file, out = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text("".join(json.dumps({"body": "w1 w2 w3"}) + "\n" for _ in range(4)))
    assert (
        cache_build.run(
            arguments("--model", teacher, "--jsonl", file, "--field", "body", "--out", out, "--seq", 8, "--k", 2)
        )
        == 0
    )
    assert teacher_cache.open(out).input_ids(1).tolist() == [4, 5, 6, 2, 4, 5, 6, 2]


def test_a_gguf_file_is_read_as_the_demos(monkeypatch, llama):
    monkeypatch.setattr(cache_build.demo_assets, "load_teacher", lambda file: (copy.deepcopy(llama), file.name))
    model, tokenizer = cache_build.load("folder/model.gguf", torch.bfloat16, "cpu")
    assert tokenizer == "model.gguf" and model.dtype == torch.bfloat16


def test_auto_dtype(monkeypatch):
    assert cache_build.dtype_of("fp16", "cpu") == torch.float16
    assert cache_build.dtype_of("auto", "cuda") == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert cache_build.dtype_of("auto", "cpu") == torch.float32


def test_what_is_wrong_is_one_line_and_status_2(file, tmp_path, capsys, monkeypatch):
    def error(*argv):
        assert cache_build.run(arguments("--text", file, "--out", tmp_path / "out", *argv)) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    nowhere = tmp_path / "nowhere"
    assert error("--model", nowhere).startswith(f"fastkd cache build: --model {nowhere}: ")
    assert error("--model", f"{nowhere}.gguf").startswith(f"fastkd cache build: --model {nowhere}.gguf: ")
    find_spec = cache_build.importlib.util.find_spec
    monkeypatch.setattr(
        cache_build.importlib.util,
        "find_spec",
        lambda name: None if name in ("transformers", "gguf") else find_spec(name),
    )
    assert 'transformers must be installed; get everything with: pip install "fastkd[demo]"' in error("--model", "x")
    assert "transformers, gguf must be installed" in error("--model", "x.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--text", "no-such-file"], "argument --text: expected a file that can be read, got 'no-such-file'"),
        (["--text", "-", "--jsonl", "-"], "not allowed with argument"),
        ([], "one of the arguments --text --jsonl is required"),
        (["--text", "-", "--k", "0"], "argument --k: expected an integer above 0, got '0'"),
        (["--text", "-", "--temperature", "0"], "argument --temperature: expected a number above 0, got '0'"),
        (["--text", "-", "--temperature", "inf"], "argument --temperature: expected a number above 0, got 'inf'"),
        (["--text", "-", "--temperature", "warm"], "argument --temperature: expected a number above 0, got 'warm'"),
        (["--text", "-", "--log-probs", "int4"], "argument --log-probs: invalid choice"),
        (["--text", "-", "--tail", "long"], "argument --tail: invalid choice"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments("--model", "m", "--out", "o", *argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_importing_it_imports_no_heavy_library():
    code = (
        "import sys, argparse, fastkd.cache_build as b; b.add_arguments(argparse.ArgumentParser());"
        "sys.exit(bool({'transformers', 'pyarrow', 'gguf', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
