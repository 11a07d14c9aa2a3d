"""A teacher's top-k (or samples) for a whole dataset, on disk: written once, read by every run of the student.

In plain PyTorch, for each sequence of a dataset::

    log_p = torch.log_softmax(logits / temperature, -1)                # [T, V]
    log_probs, ids = log_p.topk(k)                                     # [T, K] each: what a cache keeps

    meta = Meta(vocab=49152, k=64, tokenizer=tokenizer_hash(tokenizer))
    with Writer(folder, meta) as writer:
        writer.write(ids, log_probs)                                   # one sequence

    cache = open(folder, tokenizer=tokenizer)
    loss = fastkd.kd_loss(Head(h_s, W_s), cache[i])                    # cache[i] is a TopK [T, K]

A cache is a folder of Apache Parquet files, ``shard-00000.parquet`` and so on, each with one row group and one row for
each sequence. pandas, pyarrow and Hugging Face ``datasets`` read the columns as they are:

=============  ======================  ==============================================================================
``tokens``     int32                   T, the tokens of the sequence
``ids``        list of uint16, uint32  T * K ids, row by row; uint32 where the vocabulary has more than 65,536
``log_probs``  list of float16,        T * K natural logarithms; -inf is padding (its id is 0 here, -1 once read).
               float32 or uint8        uint8: ``shift - scale * code**2`` of the token, and -inf where the code is 255
``weights``    list of float16, 32     instead of log_probs for samples; 0 is padding
``log_tail``   list of float32         T logarithms of the mass that is not listed; not for samples
``scale``,     list of float32         T each, with uint8
``shift``
``input_ids``  list of int32           T, the text, if the writer gave it
=============  ======================  ==============================================================================

The metadata of each file, under the key ``fastkd.teacher_cache``, are JSON: the fields of :class:`Meta`, the place of
the shard among the others, and the error that its dtype has cost. Pages carry checksums. To write or to read takes
pyarrow: ``pip install 'fastkd[cache]'``.
"""

from fastkd.teacher_cache.meta import CacheError, Meta, tokenizer_hash
from fastkd.teacher_cache.reader import TeacherCache, collate, open
from fastkd.teacher_cache.verify import verify
from fastkd.teacher_cache.writer import Writer

__all__ = ["CacheError", "Meta", "TeacherCache", "Writer", "collate", "open", "tokenizer_hash", "verify"]
