"""What the tests of the demo share: a teacher small enough to distil in a second, a tokenizer, options."""

import argparse

import pytest
import torch
import transformers

from fastkd import demo

VOCABULARY = 101  # a prime: no multiple of any tile


class Letters:
    """A tokenizer with a token for each character code."""

    eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [1 + ord(letter) % (VOCABULARY - 1) for letter in text]}


def silent(name="", total=0):
    return lambda note="": None


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors as small as these, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_teacher():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.3,  # large enough for distributions that are far from uniform
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(argv)
