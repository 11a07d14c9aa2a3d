"""Sequences for the tests of the teacher cache."""

import numpy as np

from fastkd.teacher_cache import Meta, Writer


def top_k(tokens, vocab, k, seed=0, peak=3.0):
    """ids [T, K] int64, log_probs [T, K] float32, log_tail [T] float32 of a random teacher."""
    rng = np.random.default_rng([seed, tokens, vocab, k])
    logits = rng.normal(size=(tokens, vocab)) * peak
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-log_p, axis=-1)
    rest = np.exp(np.take_along_axis(log_p, ids[:, k:], -1)).sum(-1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(rest)
    ids = ids[:, :k]
    return ids, np.take_along_axis(log_p, ids, -1).astype(np.float32), log_tail.astype(np.float32)


def fill(folder, lengths=(5, 0, 7, 3, 12, 4), vocab=100, k=6, text=False, tokens_per_shard=8, **meta):
    """Writes a cache of random sequences, some to a shard, and returns them; ``text``: with input_ids."""
    sequences = [top_k(tokens, vocab, k, seed) for seed, tokens in enumerate(lengths)]
    with Writer(folder, Meta(vocab, k, **meta), tokens_per_shard=tokens_per_shard) as writer:
        for ids, log_probs, log_tail in sequences:
            writer.write(ids, log_probs, log_tail, np.arange(len(ids)) if text else None)
    return sequences


def bpe(*words, merges=()):
    """A small tokenizer."""
    from tokenizers import Tokenizer, models

    pieces = sorted({*"thecas", "<eos>", "<pad>", "the", "cat", *words, *("".join(merge) for merge in merges)})
    return Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [*merges], unk_token="<eos>"))
