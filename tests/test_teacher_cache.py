"""What is written comes back, in every dtype, to every reader; what is wrong is refused."""

import json
import pickle

import numpy as np
import pandas
import pytest
import torch
from cache_cases import fill, top_k
from torch.utils.data import DataLoader

import fastkd
from fastkd import Samples, TopK, kd_loss
from fastkd.teacher_cache import CacheError, Meta, Writer, collate, open, verify

# largest error of a log-probability above -16: half of float16's step there
BOUND = {"fp32": 0.0, "fp16": 2.0**-7}


def int8_bound(log_probs):
    """What encoding.py promises for each token [T, 1]: its range / 254, and as much again for the mass."""
    return 2 * (log_probs.max(-1, keepdims=True) - log_probs.min(-1, keepdims=True)) / 254


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    ("vocab", "k"),
    # one entry; all of the vocabulary; the last ids of uint16 and the first beyond
    [(100, 1), (7, 7), (65536, 6), (65537, 6)],
)
def test_round_trip(tmp_path, vocab, k, dtype):
    sequences = fill(tmp_path, (5, 0, 9), vocab, k, log_probs=dtype, temperature=2.0, tail="renormalize")
    cache = open(tmp_path)
    assert len(cache) == 3
    for i, (ids, log_probs, log_tail) in enumerate(sequences):
        got = cache[i]
        assert isinstance(got, TopK)
        assert (got.tail, got.temperature) == ("renormalize", 2.0)
        assert got.ids.dtype == torch.int32
        assert got.log_probs.dtype == (torch.float16 if dtype == "fp16" else torch.float32)
        assert got.ids.shape == got.log_probs.shape == (len(ids), k)
        assert np.array_equal(got.ids, ids)
        assert np.array_equal(got.log_tail, log_tail)
        error = np.abs(got.log_probs.float().numpy() - log_probs)
        assert (error <= (int8_bound(log_probs) if dtype == "int8" and len(ids) else BOUND.get(dtype, 0))).all()
        assert cache.tokens(i) == len(ids)
    assert verify(tmp_path) == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_what_is_read_is_accepted_by_kd_loss_and_near_the_dense_loss(tmp_path, dtype):
    """With the whole vocabulary in the cache, forward KL is that of the dense teacher, up to the error of the dtype."""
    ((ids, log_probs, _),) = fill(tmp_path, (40,), 50, 50, log_probs=dtype)
    teacher = torch.zeros(40, 50).scatter(-1, torch.from_numpy(ids), torch.from_numpy(log_probs))
    student = torch.randn(40, 50)
    dense = fastkd.reference.kd_loss(student, teacher)
    torch.testing.assert_close(kd_loss(student, open(tmp_path)[0]), dense, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_the_error_of_the_dtype_is_measured(tmp_path, dtype):
    sequences = fill(tmp_path, (200, 100, 50), 500, 64, log_probs=dtype, tokens_per_shard=300)
    cache = open(tmp_path)
    errors = cache.summary()["errors"]
    exact = np.concatenate([log_probs for _, log_probs, _ in sequences]).astype(np.float64)
    got = np.concatenate([cache[i].log_probs for i in range(3)]).astype(np.float64)
    rest = np.exp(np.concatenate([log_tail for _, _, log_tail in sequences]).astype(np.float64))
    p, q = np.exp(exact), np.exp(got)
    assert np.abs(got - exact).max() == pytest.approx(errors["log_prob"], rel=1e-3)
    assert np.abs(p - q).max() == pytest.approx(errors["prob"], rel=1e-3)
    assert (p * (exact - got) - p + q).sum(-1).mean() == pytest.approx(errors["kl"], rel=1e-3)
    assert np.abs(q.sum(-1) + rest - 1).max() == pytest.approx(errors["mass"], abs=1e-9)
    assert errors["kl"] < {"fp16": 1e-6, "int8": 1e-4}[dtype]


def test_int8_keeps_the_mass_and_is_finer_where_probabilities_are_large(tmp_path):
    ((_, log_probs, _),) = fill(tmp_path, (300,), 500, 64, log_probs="int8")
    got = open(tmp_path)[0].log_probs.numpy()
    mass = np.exp(log_probs, dtype=np.float64).sum(-1)
    np.testing.assert_allclose(np.exp(got, dtype=np.float64).sum(-1), mass, rtol=2e-6)  # some roundings of float32
    error = np.abs(got - log_probs)
    assert error[log_probs > np.log(0.1)].max() < 0.5 * error.max()
    assert np.abs(np.exp(got) - np.exp(log_probs)).max() < 0.01


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_samples(tmp_path, dtype):
    ids = np.array([[3, 3, -1], [9, 0, 2]])
    weights = np.array([[0.25, 0.5, 0.0], [1.5, 0.0, 2.0]], np.float32)
    with Writer(tmp_path, Meta(10, 3, "samples", log_probs=dtype, normalize=True)) as writer:
        writer.write(ids, weights)
    got = open(tmp_path)[0]
    assert isinstance(got, Samples)
    assert got.normalize
    assert got.ids.tolist() == [[3, 3, -1], [9, -1, 2]]  # a weight of 0 is padding
    assert got.weights.tolist() == weights.tolist()
    assert got.weights.dtype == (torch.float16 if dtype == "fp16" else torch.float32)
    assert open(tmp_path).summary()["errors"] == {"weight": 0.0}
    assert verify(tmp_path) == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_padding_comes_back(tmp_path, dtype):
    ids = np.array([[5, -1, 0], [-1, -1, -1], [8, 2, 0]])
    half, quarter = np.log(0.5), np.log(0.25)
    # nobody looks at what stands beside an id of -1
    log_probs = np.array([[half, -0.1, quarter], [np.nan, 1.0, np.inf], [half, quarter, -np.inf]])
    with Writer(tmp_path, Meta(10, 3, log_probs=dtype)) as writer:
        writer.write(ids, log_probs)
    got = open(tmp_path)[0]
    assert got.ids.tolist() == [[5, -1, 0], [-1, -1, -1], [8, 2, -1]]  # a log-probability of -inf is padding
    assert torch.isneginf(got.log_probs).tolist() == (got.ids < 0).tolist()
    np.testing.assert_allclose(got.log_probs.float().exp()[[0, 2]], [[0.5, 0, 0.25], [0.5, 0.25, 0]], atol=2e-3)
    np.testing.assert_allclose(got.log_tail.exp(), [0.25, 1.0, 0.25], atol=1e-6)
    assert verify(tmp_path) == []


def test_extreme_log_probs(tmp_path):
    """An entry of no mass worth mentioning takes nothing from the others' precision."""
    log_probs = np.array([[np.log(0.75), np.log(0.25), -3.4e38]])
    for dtype in ("fp32", "fp16", "int8"):
        with Writer(tmp_path / dtype, Meta(10, 3, log_probs=dtype)) as writer:
            writer.write(np.array([[1, 2, 3]]), log_probs)
        got = open(tmp_path / dtype)[0]
        assert got.ids.tolist() == [[1, 2, 3]]
        np.testing.assert_allclose(got.log_probs.float().exp()[0], [0.75, 0.25, 0], atol=5e-3)


def test_the_tail_is_exact_when_it_is_not_given(tmp_path):
    """log(1 - P) of float32 log-probabilities next to 0, before they are rounded to fp16."""
    rest = np.array([1e-6, 1e-4, 0.5])
    with Writer(tmp_path, Meta(10, 1)) as writer:
        writer.write(np.zeros((3, 1), int), np.log1p(-rest).astype(np.float32)[:, None])
    np.testing.assert_allclose(open(tmp_path)[0].log_tail.exp(), rest, rtol=1e-6)


def test_all_listed_leaves_no_tail(tmp_path):
    fill(tmp_path / "a", (4,), 8, 8)
    with Writer(tmp_path / "b", Meta(8, 8)) as writer:
        writer.write(*top_k(4, 8, 8)[:2])
    for name in "ab":
        assert torch.isneginf(open(tmp_path / name)[0].log_tail).all()
    message = r"probabilities of the whole vocabulary must be 1 in sum, got 0.5 at index \[1\]"
    with Writer(tmp_path / "c", Meta(2, 2)) as writer, pytest.raises(ValueError, match=message):
        writer.write(np.array([[0, 1], [1, 0]]), np.log(np.array([[0.5, 0.5], [0.25, 0.25]])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_every_dtype_and_sums_off_by_their_rounding(tmp_path, dtype):
    """Rounded log-probabilities and an exact tail do not sum to 1; what is read does, and kd_loss takes it."""
    ids, log_probs, log_tail = map(torch.from_numpy, top_k(50, 100, 20, peak=1.0))
    with Writer(tmp_path, Meta(100, 20, log_probs="fp32")) as writer:
        writer.write(ids.int().requires_grad_(False), log_probs.to(dtype), log_tail)
    got = open(tmp_path)[0]
    assert torch.equal(got.log_tail, log_tail)
    torch.testing.assert_close(got.log_probs, log_probs, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(got.log_probs.exp().sum(-1) + log_tail.exp(), torch.ones(50), rtol=0, atol=2e-6)
    assert kd_loss(torch.randn(50, 100), got).isfinite()


def test_where_one_side_has_no_mass_the_tail_gives_way(tmp_path):
    """Nothing is listed, and the tail is a rounding away from 1; and the reverse, all but nothing."""
    ids, log_probs = np.array([[-1], [3], [3]]), np.array([[-np.inf], [np.log(5e-5)], [-5e-5]])
    with Writer(tmp_path, Meta(10, 1, log_probs="fp32")) as writer:
        writer.write(ids, log_probs, np.array([-5e-5, 0.0, -np.inf]))
    got = open(tmp_path)[0]
    np.testing.assert_allclose(got.log_probs.exp()[:, 0], [0, 5e-5, 1], rtol=1e-6)
    np.testing.assert_allclose(got.log_tail.exp(), [1, 1 - 5e-5, 0], rtol=1e-6)
    assert verify(tmp_path) == []


def test_input_ids_and_indices_like_a_list(tmp_path):
    sequences = fill(tmp_path, text=True)
    cache = open(tmp_path)
    assert len(cache._shards) > 2
    for i in range(-len(cache), len(cache)):
        assert np.array_equal(cache[i].ids, sequences[i][0])
        assert cache.input_ids(i).tolist() == list(range(len(sequences[i][0])))
    assert np.array_equal(cache[np.int64(2)].ids, sequences[2][0])
    for bad in (len(cache), -len(cache) - 1):
        with pytest.raises(IndexError, match=f"index {bad} is out of range for a cache of 6"):
            cache[bad]
    assert [len(source.ids) for source in cache.__getitems__([5, 0, -2])] == [4, 5, 12]
    assert len([*cache]) == 6  # iteration ends
    fill(tmp_path / "without")
    with pytest.raises(CacheError, match="no input_ids"):
        open(tmp_path / "without").input_ids(0)


def test_what_is_read_can_be_changed(tmp_path):
    fill(tmp_path, log_probs="fp16")
    cache = open(tmp_path)
    before = cache[0].log_probs.clone()
    cache[0].log_probs.zero_()
    cache[0].ids.zero_()
    cache[0].log_tail.zero_()
    assert torch.equal(cache[0].log_probs, before)
    assert cache[0].log_tail.ne(0).all()


def test_few_shards_stay_in_memory(tmp_path, monkeypatch):
    fill(tmp_path, (8,) * 6)
    reads = []
    read = fastkd.teacher_cache.shards.read
    monkeypatch.setattr(fastkd.teacher_cache.shards, "read", lambda shard: reads.append(shard.first) or read(shard))
    cache = open(tmp_path, shards_in_memory=2)
    for i in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, which was used before 0
        cache[i]
    assert reads == [0, 1, 2, 1]
    reads.clear()
    order = cache.shuffled(seed=3, shards=2)
    assert sorted(order) == list(range(6))
    assert order != cache.shuffled(seed=4, shards=2)
    for i in order:
        cache[i]
    assert len(reads) <= 6
    assert len(cache._kept) == 2


@pytest.mark.parametrize("kind", ["topk", "samples"])
def test_collate(tmp_path, kind):
    if kind == "topk":
        fill(tmp_path)
    else:
        with Writer(tmp_path, Meta(100, 6, "samples")) as writer:
            for tokens in (5, 0, 7):
                ids, log_probs, _ = top_k(tokens, 100, 6)
                writer.write(ids, np.exp(log_probs))
    cache = open(tmp_path)
    batch, parts = cache.read([2, 1, 0]), [cache[i] for i in (2, 1, 0)]
    assert batch.ids.shape == (3, 7, 6)
    for at, part in enumerate(parts):
        tokens = len(part.ids)
        assert torch.equal(batch.ids[at, :tokens], part.ids)
        assert (batch.ids[at, tokens:] == -1).all()
    weights = (batch.ids >= 0).any(-1).float()
    student = torch.randn(3, 7, 100)
    loss = kd_loss(student, batch, weights=weights, reduction="sum")
    apart = sum(kd_loss(student[i, : len(s.ids)], s, reduction="sum") for i, s in enumerate(parts) if len(s.ids))
    torch.testing.assert_close(loss, apart)
    if kind == "topk":
        assert kd_loss(student, batch, reduction="none")[weights == 0].abs().max() < 1e-6  # all in the tail
        with pytest.raises(ValueError, match=r"alike, got .*'bucket'.* and .*'drop'"):
            collate([parts[0], TopK(parts[0].ids, parts[0].log_probs, "drop", 1.0, parts[0].log_tail)])
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(TypeError, match="TopK or Samples, got Tensor"):
        collate([torch.zeros(3)])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loader_with_workers(tmp_path, context):
    sequences = fill(tmp_path)
    cache = open(tmp_path)
    cache[0]  # a worker starts with what its parent has decoded, or without
    loader = DataLoader(
        cache,
        batch_size=2,
        sampler=cache.shuffled(1),
        num_workers=2,
        multiprocessing_context=context,
        collate_fn=collate,
    )
    order = iter(cache.shuffled(1))
    for batch in loader:
        for row in batch.ids:
            ids = sequences[next(order)][0]
            assert np.array_equal(row[: len(ids)], ids)
    assert next(order, None) is None


def test_a_pickle_is_small(tmp_path):
    fill(tmp_path, (4000,), tokens_per_shard=32768)
    cache = open(tmp_path)
    cache[0]
    content = pickle.dumps(cache)
    assert len(content) < 4000
    assert torch.equal(pickle.loads(content)[0].ids, cache[0].ids)


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int8"])
def test_pandas_and_datasets_read_the_columns(tmp_path, dtype):
    import datasets

    sequences = fill(tmp_path / "cache", (4, 0, 7, 3), text=True, log_probs=dtype, tokens_per_shard=100)
    file = tmp_path / "cache" / "shard-00000.parquet"
    frames = pandas.read_parquet(file), pandas.read_parquet(tmp_path / "cache")
    dataset = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "hf"))
    value = {"fp16": "float16", "fp32": "float32", "int8": "uint8"}[dtype]
    assert dataset.features["ids"].feature.dtype == "uint16"
    assert dataset.features["log_probs"].feature.dtype == value
    for table in (*(frame.to_dict("records") for frame in frames), dataset.with_format("numpy")):
        assert len(table) == 4
        for row, (ids, log_probs, log_tail) in zip(table, sequences):
            assert row["tokens"] == len(ids)
            assert np.array_equal(row["ids"], ids.reshape(-1))
            assert np.array_equal(row["log_tail"], log_tail)
            assert np.array_equal(row["input_ids"], np.arange(len(ids)))
            got = np.asarray(row["log_probs"], value).reshape(len(ids), 6).astype(np.float32)
            if dtype == "int8":  # as the docstring of the package says
                got = np.asarray(row["shift"])[:, None] - np.asarray(row["scale"])[:, None] * got**2
            bound = int8_bound(log_probs) if dtype == "int8" and len(ids) else BOUND.get(dtype, 0)
            assert (np.abs(got - log_probs) <= bound).all()


# the last: what zstd leaves of these data, and would not if floats stood in their own order of bytes (1.74 with fp16)
@pytest.mark.parametrize(("dtype", "most", "compressed"), [("fp16", 4, 1.6), ("int8", 3, 1.3)])
def test_bytes_of_an_entry(tmp_path, dtype, most, compressed):
    """At SmolLM2's vocabulary, ids as unevenly used as in a text, in a shard of the default size or less."""
    rng = np.random.default_rng(0)
    tokens, k, vocab = 16384, 64, 49152
    starts = (rng.pareto(0.7, tokens) * 20 % vocab).astype(int)
    ids = (starts[:, None] + rng.permutation(4096)[:k]) % vocab
    logits = -np.sort(rng.exponential(2.0, (tokens, k)))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 0.1
    with Writer(tmp_path, Meta(vocab, k, log_probs=dtype)) as writer:
        for at in range(0, tokens, 512):
            writer.write(ids[at : at + 512], log_probs[at : at + 512])
    report = writer.report()
    entry = report["bytes_per_entry"]
    assert entry["values"] == most
    assert entry["encoded"] < most
    assert entry["compressed"] < compressed
    per_token = report["bytes_per_token"]["compressed"]
    assert per_token * tokens < report["file_bytes"] < per_token * tokens + 8192  # the footer
    assert (report["tokens"], report["sequences"], report["shards"]) == (tokens, 32, 1)
    assert report["bytes_per_token_beside"]["values"] == (12 if dtype == "int8" else 4)
    assert json.loads(json.dumps(report)) == report


BAD = {
    "ids must be a tensor or a numpy array, got list": {"ids": [[1, 2]]},
    "ids must be integers that fit int64, got float32": {"ids": np.zeros((2, 2), np.float32)},
    r"ids must have shape \[3, 2\], got \[3, 1\]": {"ids": np.zeros((3, 1), int)},
    r"ids must have shape \[0, 2\], got \[\]": {"ids": np.array(1)},
    r"ids must be from 0 to 9, or -1, got 10 at index \[1, 0\]": {"ids": np.array([[1, 2], [10, 3]])},
    r"ids must be from 0 to 9, or -1, got -2 at index \[0, 1\]": {"ids": np.array([[1, -2], [1, 3]])},
    "ids must list an id once in a token, got 4 twice in token 1": {"ids": np.array([[1, 2], [4, 4]])},
    "log_probs must be floats, got int64": {"log_probs": np.zeros((2, 2), int)},
    r"log_probs must have shape \[2, 2\] like ids, got \[2, 3\]": {"log_probs": np.zeros((2, 3))},
    r"log_probs must be logarithms of probabilities, at most 0, got nan at index \[0, 1\]": {
        "log_probs": np.array([[-1, np.nan], [-2, -2]])
    },
    r"log_probs must be .* got 0.1 at index \[1, 0\]": {"log_probs": np.array([[-1, -1], [0.1, -2]])},
    r"probabilities of a token must be at most 1 in sum, got 1.2.* at index \[1\]": {
        "log_probs": np.log(np.array([[0.5, 0.5], [0.6, 0.6]]))
    },
    r"log_tail must have shape \[2\], got \[1\]": {"log_tail": np.zeros(1)},
    r"log_tail must be .* got nan at index \[0\]": {"log_tail": np.array([np.nan, -1])},
    r"probabilities of a token and its tail must be 1 in sum, got 0.9.* at index \[1\]": {
        "log_tail": np.log(np.array([0.5, 0.4]))
    },
    r"input_ids must have shape \[2\], got \[3\]": {"input_ids": np.zeros(3, int)},
    r"input_ids must be from 0 to .* got -1 at index \[1\]": {"input_ids": np.array([0, -1])},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_sequence_is_refused_and_nothing_appended(tmp_path, message):
    good = {"ids": np.array([[1, 2], [3, 4]]), "log_probs": np.log(np.full((2, 2), 0.25))}
    with Writer(tmp_path, Meta(10, 2)) as writer:
        with pytest.raises((ValueError, TypeError), match=message):
            writer.write(**good | BAD[message])
        assert writer.sequences == 0
        writer.write(**good)
    assert len(open(tmp_path)) == 1


def test_bad_samples_are_refused(tmp_path):
    ids = np.array([[1, 1]])
    with Writer(tmp_path, Meta(10, 2, "samples")) as writer:
        with pytest.raises(ValueError, match="log_tail must be None for samples"):
            writer.write(ids, np.ones((1, 2)), np.zeros(1))
        for bad in (-0.5, np.nan, np.inf, 7e4):  # float16 ends at 65504
            with pytest.raises(ValueError, match="weights must be from 0 to 65504, got"):
                writer.write(ids, np.array([[1.0, bad]]))


def test_input_ids_in_all_sequences_or_in_none(tmp_path):
    ids, log_probs, log_tail = top_k(4, 100, 6)
    meta = Meta(100, 6)
    with Writer(tmp_path, meta) as writer:
        writer.write(ids, log_probs, log_tail, np.arange(4))
        with pytest.raises(ValueError, match=r"input_ids .* all sequences of a cache or with none, got one without"):
            writer.write(ids, log_probs, log_tail)
    with Writer(tmp_path, meta, resume=True) as writer, pytest.raises(ValueError, match="got one without"):
        writer.write(ids, log_probs, log_tail)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"vocab": 0}, "vocab must be from 1"),
        ({"vocab": 5.0}, "vocab must be an integer, got float"),
        ({"k": 0}, "k must be from 1 to the vocabulary of 10, got 0"),
        ({"k": 11}, "got 11"),
        ({"kind": "dense"}, r"kind must be one of \['topk', 'samples'\], got 'dense'"),
        ({"tail": "bin"}, "tail must be one of"),
        ({"log_probs": "fp8"}, "log_probs must be one of"),
        ({"kind": "samples", "log_probs": "int8"}, r"log_probs must be one of \['fp16', 'fp32'\], got 'int8'"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0"),
        ({"tokenizer": 7}, "tokenizer must be a string or None, got int"),
        ({"normalize": 1}, "normalize must be a bool, got int"),
    ],
)
def test_bad_metadata(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Meta(**{"vocab": 10, "k": 2} | bad)


def test_bad_settings(tmp_path):
    with pytest.raises(TypeError, match="meta must be a Meta, got dict"):
        Writer(tmp_path, {})
    with pytest.raises(ValueError, match="tokens_per_shard must be a positive integer, got 0"):
        Writer(tmp_path, Meta(10, 2), tokens_per_shard=0)
    with pytest.raises(ValueError, match=r"compression must be one of .* got 'zip'"):
        Writer(tmp_path, Meta(10, 2), compression="zip")
    fill(tmp_path)
    with pytest.raises(ValueError, match="shards_in_memory must be a positive integer, got 0"):
        open(tmp_path, shards_in_memory=0)


@pytest.mark.parametrize("codec", ["none", "lz4", "snappy", "gzip"])
def test_other_codecs(tmp_path, codec):
    sequences = [top_k(5, 100, 6)]
    with Writer(tmp_path, Meta(100, 6), compression=codec) as writer:
        writer.write(*sequences[0])
    assert np.array_equal(open(tmp_path)[0].ids, sequences[0][0])
