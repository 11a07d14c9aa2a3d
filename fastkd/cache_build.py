"""Run a teacher over text once and store its top-k.

The teacher is a causal language model of Hugging Face transformers: a name, a folder, or a .gguf file (which is read
without any network). Texts are tokenized, put one after the other with an end-of-text token after each, and cut into
sequences of --seq tokens; what is left at the end is dropped. For each token the k likeliest next ones are stored with
their log-probabilities, the mass of all others, and the text. The logits of the whole vocabulary are never held.

A run that was stopped goes on with --resume and the same options, and ends with the same numbers as one that was not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastkd
from fastkd import demo_assets, terminal
from fastkd.demo import pick_dtype
from fastkd.sources import TAILS, Head
from fastkd.terminal import Tick

if TYPE_CHECKING:
    from fastkd.teacher_cache import Writer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROBE = 16  # tokens on which a head is held against its model's own logits
CLOSE = 0.1  # of the spread of its log-probabilities: above the rounding of 16 bits, below a forgotten factor


class BuildError(ValueError):
    """Why no cache can be built, in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkd cache build`."""
    from fastkd.teacher_cache.meta import DTYPES as STORED

    parser.add_argument("--model", required=True, help="the teacher: a Hugging Face name or folder, or a .gguf file")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text", nargs="+", type=text_file, metavar="FILE", help="plain text, each one document; - is stdin"
    )
    text.add_argument("--jsonl", type=text_file, metavar="FILE", help="a JSON object a line, each one document")
    parser.add_argument("--field", default="text", help="of the objects of --jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the cache")
    parser.add_argument("--resume", action="store_true", help="go on after the sequences that the cache has")
    parser.add_argument("--k", type=terminal.positive, default=64, help="entries to keep of each token")
    parser.add_argument("--temperature", type=temperature, default=1.0, help="of the teacher's softmax")
    parser.add_argument("--tail", choices=TAILS, default="bucket", help="how losses shall treat what is not listed")
    parser.add_argument("--log-probs", choices=STORED, default="fp16", help="stored dtype of the log-probabilities")
    parser.add_argument("--seq", type=terminal.positive, default=512, help="tokens per sequence")
    parser.add_argument("--batch", type=terminal.positive, default=8, help="sequences that the teacher reads at once")
    parser.add_argument(
        "--limit", type=terminal.positive, default=None, metavar="TOKENS", help="use no more text than this"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="the teacher's. auto: bf16 where the device computes in it",
    )
    parser.add_argument("--device", type=terminal.device, default="cpu", help="cpu, cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Build the cache; 0, or 2 after one line about what is wrong."""
    from fastkd.teacher_cache import CacheError

    try:
        report = build(args)
    except (BuildError, CacheError, demo_assets.DemoError, ModuleNotFoundError) as error:
        print(f"fastkd cache build: {error}", file=sys.stderr)
        return 2
    print(summary(report, args.out))
    return 0


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Everything between the options and the report, which is :meth:`Writer.report`."""
    from fastkd.teacher_cache import Writer

    check_libraries(args.model)
    if not args.resume and any(args.out.glob("shard-*.parquet")):  # known before the teacher is loaded
        raise BuildError(f"--out {args.out}: has a cache already; --resume goes on with it")
    with terminal.progress() as stage:
        loaded = stage("load the teacher", 1)
        model, tokenizer = load(args.model, dtype_of(args.dtype, args.device), args.device)
        loaded()
        read = stage("read the text", 1)
        input_ids = sequences(documents(args.text, args.jsonl, args.field), tokenizer, args.seq, args.limit)
        read(f"{input_ids.numel():,} tokens")
        meta = described(args, model, tokenizer)
        with Writer(args.out, meta, resume=args.resume) as writer:
            start = writer.sequences
            check_text(args.out, input_ids, start)
            ticks = stage("capture", len(input_ids) - start)
            capture(model, input_ids, writer, start=start, batch=args.batch, tick=ticks)
        return writer.report()


@torch.no_grad()
def capture(
    model: Any,
    input_ids: Tensor,
    writer: Writer,
    *,
    start: int = 0,
    batch: int = 8,
    dtype: torch.dtype | None = None,
    tick: Tick = lambda note="": None,
) -> None:
    """Run a teacher over sequences and write its top-k. In plain PyTorch::

        for ids in input_ids[start:]:
            log_p = F.log_softmax(model(ids[None]).logits[0].float() / writer.meta.temperature, -1)
            log_probs, top = log_p.topk(writer.meta.k)
            writer.write(top, log_probs, log_tail, ids)       # log_tail: the log of the mass that is left

    Args:
        model: a causal language model of transformers on any device, with logits of the form that a
            :class:`fastkd.Head` has; others are refused. No parameter and no mode of it is changed.
        input_ids: [n, seq] integers.
        writer: of a cache of top-k; its ``meta`` has k and the temperature.
        start: the first sequence to write; ``writer.sequences`` to go on. Batches begin at multiples of ``batch`` all
            the same, so that a stopped run ends with the numbers of one that was not.
        batch: sequences that the model reads at once.
        dtype: of the hidden states and the head; parameters of float32 under bfloat16 or float16 compute in autocast.
            None: that of the head's weight.
        tick: called after each sequence, with the tokens per second so far.

    Raises:
        BuildError: the model's own logits are not those of its head, or the cache is not one of top-k.
    """
    meta = writer.meta
    if meta.kind != "topk":
        raise BuildError(f"the writer's cache must be of kind 'topk', got {meta.kind!r}")
    training, began = model.training, time.perf_counter()
    model.eval()
    try:
        if start < len(input_ids):
            check_head(model, input_ids[:1, :PROBE], dtype)
        for at in range(start // batch * batch, len(input_ids), batch):
            rows = input_ids[at : at + batch]
            top = fastkd.topk(head_of(model, rows, dtype), meta.k, temperature=meta.temperature)
            ids, log_probs, log_tail = (x.cpu() for x in (top.ids, top.log_probs, top.log_tail))
            for i in range(max(start - at, 0), len(rows)):
                writer.write(ids[i], log_probs[i], log_tail[i], rows[i])
                done = (at + i + 1 - start) * rows.shape[1]
                tick(f"{done / (time.perf_counter() - began):,.0f} tokens/s")
    finally:
        model.train(training)


# --- the teacher ---


def head_of(model: Any, input_ids: Tensor, dtype: torch.dtype | None = None) -> Head:
    """What a causal language model expects after each of input_ids [n, seq]: hidden [n, seq, D] and its head."""
    out = output_embeddings(model)
    dtype = dtype or out.weight.dtype
    with autocast(model, dtype):
        hidden = model.base_model(input_ids=input_ids.to(model.device).long(), use_cache=False).last_hidden_state
    bias = getattr(out, "bias", None)
    weight = out.weight.to(dtype)
    return Head(hidden.to(weight.device, dtype), weight, None if bias is None else bias.to(dtype), **form(model.config))


def output_embeddings(model: Any) -> Any:
    """The last linear layer of a causal language model."""
    out = model.get_output_embeddings()
    if out is None or getattr(out, "weight", None) is None or out.weight.dim() != 2:
        raise BuildError(f"{type(model).__name__} has no output embeddings: expected a causal language model")
    return out


def form(config: Any) -> dict[str, Any]:
    """softcap and logit_scale, under the names that they have in the configurations of transformers."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def first(*names: str) -> float | None:
        given = (getattr(text, name, None) for name in names)
        return next((float(value) for value in given if isinstance(value, (int, float))), None)

    scale = first("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
    divisor = first("logits_scaling")  # Granite
    if divisor is not None:
        scale = divisor if text.model_type.startswith("hyperclovax") else 1 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap")  # Gemma, RecurrentGemma
    return {"softcap": softcap, "logit_scale": 1.0 if scale is None else scale}


def check_head(model: Any, input_ids: Tensor, dtype: torch.dtype | None) -> None:
    """An architecture may do more to its logits than a Head knows: hold it against the model's own, on a few tokens."""
    head = head_of(model, input_ids, dtype)
    with autocast(model, head.weight.dtype):
        logits = model(input_ids=input_ids.to(model.device).long(), use_cache=False).logits
    top = fastkd.topk(head, min(64, logits.shape[-1]))
    wanted = logits.float().log_softmax(-1).gather(-1, top.ids)
    off = float((top.log_probs - wanted).norm() / (wanted - wanted.mean(-1, keepdim=True)).norm())
    if not off < CLOSE:
        raise BuildError(
            f"{type(model).__name__} makes its logits in a way of its own: the log-probabilities of its head, with "
            f"{form(model.config)}, differ by {off:.1%} of their spread, expected at most {CLOSE:.0%}"
        )


def autocast(model: Any, dtype: torch.dtype) -> torch.autocast:
    """16-bit computation with parameters in float32."""
    enabled = dtype != torch.float32 and output_embeddings(model).weight.dtype == torch.float32
    return torch.autocast(model.device.type, dtype=dtype if enabled else torch.bfloat16, enabled=enabled)


def load(name: str, dtype: torch.dtype, device: torch.device | str) -> tuple[Any, Any]:
    """The frozen teacher and its tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        if name.endswith(".gguf"):
            model, tokenizer = demo_assets.load_teacher(Path(name))
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise BuildError(f"--model {name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}") from None
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False), tokenizer


def described(args: argparse.Namespace, model: Any, tokenizer: Any) -> Any:
    """What all sequences have in common; a resumed capture must agree in it, so it names the model whole."""
    from fastkd.teacher_cache import Meta, tokenizer_hash

    path = Path(args.model)
    dtype = str(dtype_of(args.dtype, args.device)).removeprefix("torch.")
    try:
        return Meta(
            vocab=output_embeddings(model).weight.shape[0],
            k=args.k,
            temperature=args.temperature,
            tail=args.tail,
            log_probs=args.log_probs,
            tokenizer=tokenizer_hash(tokenizer),
            teacher=f"{path.resolve() if path.exists() else args.model}, {dtype}",
        )
    except ValueError as error:  # such as a k above the vocabulary
        raise BuildError(str(error)) from None


def dtype_of(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype of that name; "auto" is the demo's choice on a CPU and bfloat16 elsewhere."""
    if name != "auto":
        return DTYPES[name]
    return pick_dtype("auto") if torch.device(device).type == "cpu" else torch.bfloat16


def check_libraries(model: str) -> None:
    """Raise one line that names what is missing and how to get it."""
    names = ("transformers", "pyarrow", *(("gguf", "accelerate") if model.endswith(".gguf") else ()))
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise BuildError(f'{", ".join(missing)} must be installed; get everything with: pip install "fastkd[demo]"')


# --- the text ---


def sequences(texts: Iterable[str], tokenizer: Any, seq: int, limit: int | None = None) -> Tensor:
    """Token ids [n, seq] int32 of the texts, an end-of-text token after each; ``limit`` tokens at most."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    most = math.inf if limit is None else limit
    ids = array("i")
    for text in texts:
        found = list(tokenizer(text)["input_ids"])
        ids.extend(found if found[-1:] == end else found + end)
        if len(ids) >= most:
            break
    count = min(len(ids), most) // seq
    if not count:
        given = f"the {len(ids)} tokens of text" if len(ids) < most else f"--limit {limit}"
        raise BuildError(f"--seq {seq} is longer than {given}")
    return torch.frombuffer(ids, dtype=torch.int32)[: int(count) * seq].view(-1, seq)


def documents(texts: list[str] | None, jsonl: str | None, field: str) -> Iterator[str]:
    """The texts of the files, one by one."""
    for name in texts or ():
        yield "".join(lines(name))
    if jsonl is not None:
        for number, line in enumerate(lines(jsonl), 1):
            if line.strip():
                yield _text(f"--jsonl {jsonl}, line {number}", line, field)


def _text(where: str, line: str, field: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise BuildError(f"{where}: expected a JSON object: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get(field), str):
        came = f"the fields {sorted(found)}" if isinstance(found, dict) else type(found).__name__
        raise BuildError(f"{where}: expected an object with a string in the field {field!r}, got {came}")
    return str(found[field])


def lines(name: str) -> Iterator[str]:
    """Of a file in UTF-8, or of stdin."""
    try:
        if name == "-":
            yield from sys.stdin
        else:
            with open(name, encoding="utf-8") as file:
                yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"{name}: expected text in UTF-8: {error}") from None


def check_text(folder: Path, input_ids: Tensor, start: int) -> None:
    """The last stored sequence must be that of the text with which the cache goes on."""
    from fastkd import teacher_cache

    if not start:
        return
    if start > len(input_ids):
        raise BuildError(f"--out {folder}: has {start} sequences already, expected at most the text's {len(input_ids)}")
    stored = teacher_cache.open(folder).input_ids(start - 1)
    if not torch.equal(stored.int(), input_ids[start - 1]):
        raise BuildError(f"--out {folder}: its sequence {start - 1} is another text; --resume takes the same one again")


# --- words ---


def text_file(name: str) -> str:
    """The name of a file that can be read, or "-"."""
    try:
        if name != "-":
            open(name, "rb").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"expected a file that can be read, got {name!r}: {error.strerror}") from None
    return name


def temperature(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def summary(report: dict[str, Any], folder: Path) -> str:
    """What the cache takes, in two lines."""
    tokens = max(report["tokens"], 1)
    size, plain = terminal.size(report["file_bytes"]), report["bytes_per_token"]["values"]
    return (
        f"{folder}: {report['sequences']:,} sequences, {report['tokens']:,} tokens, {size}\n"
        f"{report['file_bytes'] / tokens:.1f} bytes a token, {plain:.1f} before compression; "
        f"the stored dtype costs a KL of {report['errors']['kl']:.1e} nats a token"
    )
