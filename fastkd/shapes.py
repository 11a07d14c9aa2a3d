"""Vocabulary and hidden size of known models, from the config.json that each is published with."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Size of a head: weight [vocab, hidden]."""

    vocab: int
    hidden: int


MODELS: dict[str, Shape] = {
    "smollm2-135m": Shape(49152, 576),
    "smollm2-360m": Shape(49152, 960),
    "smollm2-1.7b": Shape(49152, 2048),
    "llama-3.2-1b": Shape(128256, 2048),
    "llama-3.2-3b": Shape(128256, 3072),
    "llama-3-8b": Shape(128256, 4096),
    "llama-3-70b": Shape(128256, 8192),
    "qwen3-0.6b": Shape(151936, 1024),
    "qwen3-1.7b": Shape(151936, 2048),
    "qwen3-4b": Shape(151936, 2560),
    "qwen3-8b": Shape(151936, 4096),
    "qwen3-14b": Shape(151936, 5120),
    "gemma-3-270m": Shape(262144, 640),
    "gemma-3-1b": Shape(262144, 1152),
    "gemma-3-4b": Shape(262208, 2560),
    "gemma-3-12b": Shape(262208, 3840),
    "gemma-3-27b": Shape(262208, 5376),
}
