"""The importers on samples in the formats of servers (versions: tests/data/README.md), and on simulated servers."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import TopK, teacher_cache
from fastkd.teacher_cache.importers import from_sglang, from_vllm

DATA = Path(__file__).parent / "data"
NONE = -math.inf


def sample(name):
    return json.loads((DATA / name).read_text())


def completion():
    return sample("vllm-0.11-completion.json")


def logs(*probabilities):
    return [math.log(p) if p else NONE for p in probabilities]


def check(top, ids, probabilities, tails):
    """Rows as they should be; probabilities and tails are not logarithms."""
    assert isinstance(top, TopK) and (top.tail, top.temperature) == ("bucket", 1.0)
    assert (top.ids.dtype, top.log_probs.dtype, top.log_tail.dtype) == (torch.int64, torch.float32, torch.float32)
    assert top.ids.tolist() == ids
    torch.testing.assert_close(top.log_probs, torch.tensor([logs(*row) for row in probabilities]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(top.log_tail, torch.tensor(logs(*tails)), rtol=1e-6, atol=1e-7)


EMPTY = [-1, -1, -1]


# --- vLLM ---


def test_vllm_completion():
    first, second = from_vllm(completion(), 3, vocab=13)
    assert (first.input_ids.tolist(), first.input_ids.dtype) == ([9, 4, 7, 2], torch.int64)
    check(
        first.top_k,
        [[11, 4, 3], [5, 0, 12], [2, -1, -1], EMPTY],  # the best first, whatever comes first; equal ones by id
        [(0.5, 0.25, 0.125), (0.5, 0.125, 0.125), (1, 0, 0), (0, 0, 0)],
        [0.125, 0.25, 0, 1],
    )
    assert second.input_ids.tolist() == [9]
    check(second.top_k, [EMPTY], [(0, 0, 0)], [1])


def test_vllm_keeps_the_prompts_own_token_where_there_is_room():
    top = from_vllm(completion(), 4)[0].top_k
    assert top.ids.tolist() == [[11, 4, 3, -1], [5, 0, 12, 7], [2, -1, -1, -1], [-1] * 4]
    assert top.log_tail[1].item() == pytest.approx(math.log(0.25 - 1 / 64))


def test_fewer_kept_than_listed_leave_their_mass_to_the_tail():
    check(from_vllm(completion(), 1)[0].top_k, [[11], [5], [2], [-1]], [[0.5], [0.5], [1], [0]], [0.5, 0.5, 0, 1])


def test_vllm_chat_without_token_ids_and_with_an_empty_row():
    [only] = from_vllm(sample("vllm-0.11-chat.json"), 3)
    assert only.input_ids is None
    check(only.top_k, [EMPTY, [6, 8, -1], EMPTY], [(0, 0, 0), (0.75, 1 / 16, 0), (0, 0, 0)], [1, 3 / 16, 1])


def test_vllm_several_responses():
    got = from_vllm([sample("vllm-0.11-chat.json"), completion()], 3)
    assert [len(x.top_k.ids) for x in got] == [3, 4, 1]
    assert from_vllm([], 3) == []


@pytest.mark.parametrize("value", [None, NONE, "-Infinity", -9999, -9999.0, -3.4028234663852886e38])
def test_spellings_of_no_mass(value):
    rows = [None, {"3": {"logprob": value}, "1": {"logprob": math.log(0.25)}}]
    [only] = from_vllm({"prompt_logprobs": rows}, 2)
    assert only.top_k.ids.tolist() == [[1, -1], [-1, -1]]
    assert only.top_k.log_tail[0].item() == pytest.approx(math.log(0.75))


def test_bare_numbers_of_old_vllm():
    [only] = from_vllm({"prompt_logprobs": [None, {15043: math.log(0.125), 917: math.log(0.5)}]}, 2)
    assert only.top_k.ids[0].tolist() == [917, 15043]


# --- SGLang ---


def test_sglang_generate():
    first, second = from_sglang(sample("sglang-0.5-generate.json"), 3, vocab=13)
    assert (first.input_ids.tolist(), first.input_ids.dtype) == ([9, 4, 7, 2], torch.int64)
    check(
        first.top_k,
        [[11, 4, 3], [5, 0, 12], [2, -1, -1], EMPTY],
        [(0.5, 0.25, 0.125), (0.5, 0.125, 0.125), (1, 0, 0), (0, 0, 0)],
        [0.125, 0.25, 0, 1],
    )
    # the second starts at token 2 of 5: token 3 was predicted at position 2
    assert second.input_ids is None
    check(
        second.top_k,
        [EMPTY, EMPTY, [5, 12, -1], [2, 8, -1], EMPTY],
        [(0, 0, 0), (0, 0, 0), (0.5, 0.125, 0), (0.75, 1 / 16, 0), (0, 0, 0)],
        [1, 1, 0.375, 3 / 16, 1],
    )


def test_an_id_that_stands_twice_counts_once():
    entries = [[math.log(0.5), 5, None], [math.log(0.25), 5, None], [math.log(0.25), 1, None]]
    [only] = from_sglang({"meta_info": {"input_top_logprobs": [None, entries]}}, 2)
    check(only.top_k, [[5, 1], [-1, -1]], [(0.5, 0.25), (0, 0)], [0.25, 1])


def test_sglang_one_prompt_is_no_list():
    response = sample("sglang-0.5-generate.json")[0]
    [only] = from_sglang(response, 3)
    assert only.input_ids.tolist() == [9, 4, 7, 2]
    del response["meta_info"]["input_token_logprobs"]
    assert from_sglang(response, 3)[0].input_ids is None


# --- simulated servers: any distribution, prompt and n ---

T, V = 9, 23


def distribution(seed):
    g = torch.Generator().manual_seed(seed)
    log_p = (torch.randn(T, V, generator=g) * 2).log_softmax(-1)
    return log_p, torch.randint(V, (T,), generator=g).tolist()


def vllm_says(log_p, ids, n):
    """As vLLM's engine V1 fills its dicts: the prompt's token first, then the n best."""
    rows = [None]
    for row, token in zip(log_p, ids[1:]):
        entry = {token: {"logprob": row[token].item(), "rank": (row >= row[token]).sum().item(), "decoded_token": "x"}}
        for rank, i in enumerate(row.topk(n).indices.tolist(), 1):
            entry[i] = {"logprob": row[i].item(), "rank": rank, "decoded_token": "x"}
        rows.append(entry)
    return json.loads(json.dumps({"prompt_logprobs": rows, "prompt_token_ids": ids}))


def sglang_says(log_p, ids, n, start=0):
    """As SGLang's scheduler does: null first, the last distribution, which is for sampling, taken off."""
    best = [list(zip(*(x.tolist() for x in row.topk(n)), [None] * n)) for row in log_p]
    own = [None, *(row[token].item() for row, token in zip(log_p[start:], ids[start + 1 :]))]
    meta = {"prompt_tokens": T, "input_top_logprobs": [None, *best[start:-1]]}
    meta["input_token_logprobs"] = [[x, i, None] for x, i in zip(own, ids[start:])]
    return json.loads(json.dumps({"meta_info": meta}))


@pytest.mark.parametrize("k, n", [(4, 4), (3, 7), (V, V)])
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_rows_are_the_best_of_the_distributions_that_stand_there(server, k, n, seed):
    log_p, ids = distribution(seed)
    call, says = (from_vllm, vllm_says) if server == "vllm" else (from_sglang, sglang_says)
    [only] = call(says(log_p, ids, n), k, vocab=V)
    best = log_p[:-1].topk(k)
    assert only.input_ids.tolist() == ids
    assert only.top_k.ids[:-1].equal(best.indices) and (only.top_k.ids[-1] == -1).all()
    torch.testing.assert_close(only.top_k.log_probs[:-1], best.values, rtol=1e-6, atol=1e-6)
    left = (1 - best.values.double().exp().sum(-1)).clamp(min=0)
    torch.testing.assert_close(only.top_k.log_tail[:-1].double().exp(), left, rtol=1e-5, atol=1e-6)
    assert only.top_k.log_tail[-1] == 0


@pytest.mark.parametrize("start", range(T))
def test_sglang_from_any_start(start, seed):
    log_p, ids = distribution(seed)
    response = sglang_says(log_p, ids, 4, start)
    if start == T - 1:  # nothing but the null
        with pytest.raises(
            ValueError, match=r'input_top_logprobs must be a list.*"logprob_start_len": 0, got list of 1'
        ):
            from_sglang(response, 4)
        return
    whole, part = (from_sglang(r, 4)[0].top_k for r in (sglang_says(log_p, ids, 4), response))
    assert (part.ids[:start] == -1).all() and (part.log_tail[:start] == 0).all()
    assert part.ids[start:].equal(whole.ids[start:]) and part.log_probs[start:].equal(whole.log_probs[start:])


def test_the_loss_on_an_import_is_that_of_the_distribution(seed):
    """Position t of the student against the distribution of token t + 1; the empty row adds nothing."""
    log_p, ids = distribution(seed)
    [only] = from_vllm(vllm_says(log_p, ids, V), V)
    student = torch.randn(T, V)
    got = fastkd.kd_loss(student, only.top_k, reduction="none")
    log_q = student.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q)).sum(-1)
    wanted[-1] = 0
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("response", [completion(), vllm_says(*distribution(0), 5)], ids=["sample", "simulated"])
def test_a_cache_takes_what_was_imported(response, tmp_path):
    imported = from_vllm(response, 5)
    with teacher_cache.Writer(tmp_path, teacher_cache.Meta(vocab=V, k=5, log_probs="fp32")) as writer:
        for input_ids, top in imported:
            writer.write(top.ids, top.log_probs, top.log_tail, input_ids)
    cache = teacher_cache.open(tmp_path)
    assert len(cache) == len(imported)
    for i, (input_ids, top) in enumerate(imported):
        assert cache[i].ids.long().equal(top.ids) and cache[i].log_probs.equal(top.log_probs)
        assert cache[i].log_tail.equal(top.log_tail) and cache.input_ids(i).equal(input_ids)


def test_bfloat16_rounding_above_one_is_divided_out():
    log_p = torch.tensor([0.3038, 0.3038, 0.3038, 0.0886]).log().to(torch.bfloat16).float()
    assert 1.001 < log_p.exp().sum() < 1.02
    [only] = from_vllm({"prompt_logprobs": [None, {i: {"logprob": x} for i, x in enumerate(log_p.tolist())}]}, 2)
    assert only.top_k.log_probs[0].tolist() == pytest.approx((log_p - log_p.exp().sum().log())[:2].tolist())
    listed = only.top_k.log_probs[0].double().exp().sum().item()
    assert only.top_k.log_tail[0].item() == pytest.approx(math.log(1 - listed))


# --- errors: the field, the position, what was expected and what came ---


def change(path, value):
    """A sample with one thing different."""

    def apply(response):
        response = copy.deepcopy(response)
        *way, last = path
        at = response
        for step in way:
            at = at[step]
        at[last] = value
        return response

    return apply


ROWS = ("choices", 0, "prompt_logprobs")
VLLM_ERRORS = {
    "no JSON object": (lambda r: "text", "response must be the JSON object of a vLLM server, got 'text'"),
    "a list of strings": (lambda r: [r, "text"], r"response\[1\] must be the JSON object"),
    "not asked for": (
        change(ROWS, None),
        r"prompt_logprobs must stand at the top.*ask the server.*object with \['choices'",
    ),
    "error of the server": (
        lambda r: {"object": "error", "message": "no"},
        r"got an object with \['message', 'object'\]",
    ),
    "rows": (
        change(ROWS, {"0": None}),
        r"choices\[0\].prompt_logprobs must be a list with an entry for each token, got",
    ),
    "row": (
        change((*ROWS, 2), [1]),
        r"choices\[0\].prompt_logprobs\[2\] must be null or an object by token id, got list",
    ),
    "other prompt": (
        change(("choices", 0, "prompt_token_ids"), [9, 4, 8, 2]),
        r"prompt_logprobs\[2\] must list.* token 8",
    ),
    "length": (
        change(("choices", 0, "prompt_token_ids"), [9, 4]),
        r"choices\[0\].prompt_token_ids must be a list of 4 ids, one for each token, got list of 2",
    ),
    "id": (
        change(("choices", 0, "prompt_token_ids", 1), -4),
        r"prompt_token_ids\[1\]: a token id must be an integer.*-4",
    ),
    "no id": (
        change((*ROWS, 1, "x"), {"logprob": -9.0}),
        r"prompt_logprobs\[1\]: a token id must be an integer.*got 'x'",
    ),
    "id beyond": (change((*ROWS, 1, "13"), {"logprob": -9.0}), r"\[1\]: a token id must be .* from 0 to 12, got '13'"),
    "number": (change((*ROWS, 1, "4"), {"logprob": "big"}), r"\[1\]: token 4 must have a log-probability.*, got 'big'"),
    "NaN": (change((*ROWS, 1, "4"), {"logprob": math.nan}), r"\[1\]: token 4 must have a log-probability.*, got nan"),
    "infinity": (
        change((*ROWS, 1, "4"), {"logprob": math.inf}),
        r"\[1\]: token 4 must have a log-probability.*, got inf",
    ),
    "no number": (
        change((*ROWS, 1, "4"), {"rank": 1}),
        r"\[1\]: token 4 must have a log-probability.*, got {'rank': 1}",
    ),
    "probabilities": (
        change((*ROWS, 3, "0"), {"logprob": math.log(0.03)}),
        r"prompt_logprobs\[3\] must hold the logarithms of probabilities that sum to 1 at most, got a sum of 1.03",
    ),
    "logits": (
        change((*ROWS, 3, "0"), {"logprob": 9.5}),
        r"\[3\]: token 0 must have a log-probability, at most 0, got 9.5",
    ),
    "first": (change((*ROWS, 0), {"9": {"logprob": -1.0}}), r"prompt_logprobs\[0\] must be null, as no token predicts"),
}


@pytest.mark.parametrize("name", VLLM_ERRORS)
def test_vllm_errors(name):
    apply, message = VLLM_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        from_vllm(apply(completion()), 3, vocab=13)


META = (0, "meta_info")
TOPS = (*META, "input_top_logprobs")
SGLANG_ERRORS = {
    "OpenAI's format": (
        lambda r: {"choices": []},
        "meta_info must be the object that SGLang's /generate returns, got None",
    ),
    "no object": (lambda r: [1], r"response\[0\].meta_info must be the object"),
    "not asked for": (change(TOPS, None), r'\[0\].meta_info.input_top_logprobs must be.*"top_logprobs_num".*got None'),
    "nothing listed": (change(TOPS, [None, [], None, None]), "input_top_logprobs must be a list.*got list of 4"),
    "row": (
        change((*TOPS, 2), {"1": 2}),
        r"input_top_logprobs\[2\] must be null or a list of \[log-prob.*got dict of 1",
    ),
    "entry": (
        change((*TOPS, 2, 1), -0.5),
        r"input_top_logprobs\[2\] must hold entries \[log-probability, id, text\], got -0.5",
    ),
    "order": (change((*TOPS, 2, 1), [12, -2.0, None]), r"input_top_logprobs\[2\]: a token id must be .*got -2.0"),
    "first": (change((*TOPS, 0), [[-1.0, 3, None]]), r"input_top_logprobs\[0\] must be null, as no token predicts"),
    "sum": (change((*TOPS, 3, 1), [-1.0, 0, None]), r"input_top_logprobs\[3\] must hold the logarithms .* sum of 1.36"),
    "too many": (
        change((*META, "prompt_tokens"), 3),
        "prompt_tokens must be the number of tokens, at least the 4 listed, got 3",
    ),
    "lengths": (
        change((*META, "input_token_logprobs"), [[None, 9, None]]),
        "input_token_logprobs must be a list of 4 ids",
    ),
    "triples": (
        change((*META, "input_token_logprobs", 1), [4]),
        r"input_token_logprobs must hold entries .* got \[4\]",
    ),
}


@pytest.mark.parametrize("name", SGLANG_ERRORS)
def test_sglang_errors(name):
    apply, message = SGLANG_ERRORS[name]
    with pytest.raises(ValueError, match=message):
        from_sglang(apply(sample("sglang-0.5-generate.json")), 3, vocab=13)


@pytest.mark.parametrize("call", [from_vllm, from_sglang])
@pytest.mark.parametrize(
    "k, vocab, message", [(0, None, "k must be an"), (2, 0, "vocab must be an"), (5, 4, "k must be at")]
)
def test_sizes(call, k, vocab, message):
    with pytest.raises(ValueError, match=message):
        call(completion() if call is from_vllm else sample("sglang-0.5-generate.json"), k, vocab=vocab)
