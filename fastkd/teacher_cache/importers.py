"""Teachers behind an inference server: the log-probabilities of a prompt, as vLLM and SGLang report them in JSON.

What to ask for, with the text's ids as the prompt and k entries a token::

    POST /v1/completions                                        # vLLM, started with --max-logprobs k
    {"model": ..., "prompt": ids, "prompt_logprobs": k, "return_token_ids": true, "max_tokens": 1}

    POST /generate                                              # SGLang
    {"input_ids": ids, "return_logprob": true, "logprob_start_len": 0, "top_logprobs_num": k,
     "sampling_params": {"max_new_tokens": 1}}

and what to do with the answer::

    for input_ids, top in from_vllm(response.json(), k, vocab=V):
        writer.write(top.ids, top.log_probs, top.log_tail, input_ids)

Servers file a distribution under the token that it predicted, and nothing predicted the first token. Here row t is the
distribution of token t + 1 given tokens 0 to t, where the student's hidden state t stands: entry i of a server becomes
row i - 1, and the last row is empty. An empty row is all padding with log_tail 0; give it weight 0:
``weights=(ids >= 0).any(-1)``.

Of a row the k likeliest entries are kept, equal ones by the smaller id. vLLM adds the prompt's own token where it is no
longer among the n likeliest; it is an entry like the others, so it falls away at k = n and is one more at a larger k.
What has no mass (null, -Infinity, and the -9999 or -3.4e38 that stand for it) is left out; of an id that stands twice
the larger counts. log_tail is log(1 - P) of the entries kept, in float64. A P above 1 by the rounding of the server,
bfloat16 at worst, is divided out; one further above is an error.

Servers report at temperature 1, whatever they sample with, unless they were told otherwise
(``dataclasses.replace(top, temperature=...)`` says so).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.sources import TopK

__all__ = ["Imported", "from_sglang", "from_vllm"]

NO_MASS = -9999.0  # what vLLM writes for -inf
ROUNDING = 0.02  # of P, from log-probabilities in bfloat16: half of 2^-7 times the entropy

Entries = Iterable[tuple[Any, Any]]  # id and log-probability, as they came
Row = tuple[list[int], list[float], float]  # ids [K], log_probs [K], log_tail


class Imported(NamedTuple):
    """One prompt of T tokens: input_ids [T] int64, None where the response lacks them, and a TopK of ids [T, K] int64,
    log_probs [T, K] float32 and log_tail [T] float32.
    """

    input_ids: Tensor | None
    top_k: TopK


def from_vllm(response: Any, k: int, *, vocab: int | None = None) -> list[Imported]:
    """The prompts of one or more responses of a vLLM server, in the order in which they stand there.

    Args:
        response: the parsed JSON of /v1/completions or /v1/chat/completions, or a list of such. ``prompt_logprobs`` is
            a list of dicts ``{"id": {"logprob": ..., "rank": ..., "decoded_token": ...}}``, its first entry null; it
            stands at the top of a chat's response and in each of a completion's choices (one prompt's n samples would
            all have it: ask for one). ``prompt_token_ids``, from "return_token_ids", stands beside it.
        k: entries to keep for each token; fewer are padded with -1.
        vocab: V; each id must lie below it.

    Raises:
        ValueError: names the field and the position, what was expected and what came. Among the reasons: the prompt's
            own token is missing where vLLM always lists it, so that the ids belong to another prompt.
    """
    return [_vllm(where, prompt, _size(k, vocab), vocab) for where, prompt in _vllm_prompts(response)]


def from_sglang(response: Any, k: int, *, vocab: int | None = None) -> list[Imported]:
    """The prompts of one or more responses of an SGLang server, in the order in which they stand there.

    Args:
        response: the parsed JSON of /generate, a dict or a list of them. ``meta_info.input_top_logprobs`` has a list of
            ``[log-probability, id, text]`` for each token from logprob_start_len on, its first entry null;
            ``meta_info.input_token_logprobs`` has one such triple for each token of the prompt itself. Where
            ``meta_info.prompt_tokens`` counts more tokens than are listed, the rows before are empty and the ids
            unknown. SGLang writes 0 for the ids of images, and for the last id of the vocabulary.
        k, vocab: as in :func:`from_vllm`.

    Raises:
        ValueError: names the field and the position, what was expected and what came.
    """
    responses = response if isinstance(response, list) else [response]
    prefixes = (f"response[{i}]." if isinstance(response, list) else "" for i in range(len(responses)))
    return [_sglang(where, r, _size(k, vocab), vocab) for where, r in zip(prefixes, responses)]


# --- vLLM ---


def _vllm_prompts(response: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each prompt's log-probabilities stand, and the dict that they stand in."""
    for i, r in enumerate(response if isinstance(response, list) else [response]):
        where = f"response[{i}]." if isinstance(response, list) else ""
        _expect(isinstance(r, dict), where.rstrip(".") or "response", "the JSON object of a vLLM server", r)
        choices = r.get("choices") or []
        found = [(f"{where}choices[{c}].", choice) for c, choice in enumerate(choices) if _has_rows(choice)]
        if _has_rows(r):
            yield where, r
        elif found and len(found) == len(choices):
            yield from found
        else:
            raise ValueError(
                f"{where}prompt_logprobs must stand at the top of the response or in each of its choices: ask the "
                f'server for "prompt_logprobs"; got an object with {sorted(r)}'
            )


def _has_rows(found: Any) -> bool:
    return isinstance(found, dict) and found.get("prompt_logprobs") is not None


def _vllm(where: str, prompt: dict[str, Any], k: int, vocab: int | None) -> Imported:
    field, given = where + "prompt_logprobs", prompt["prompt_logprobs"]
    _expect(isinstance(given, list), field, "a list with an entry for each token", given)
    ids = _token_ids(where + "prompt_token_ids", prompt.get("prompt_token_ids"), len(given), vocab)
    rows = []
    for i, entry in enumerate(given):
        at = f"{field}[{i}]"
        _expect(entry is None or isinstance(entry, dict), at, "null or an object by token id", entry)
        if entry and ids is not None and str(ids[i]) not in entry:
            raise ValueError(f"{at} must list the prompt's own token {ids[i]}, got the ids {', '.join(entry)}")
        entries = ((key, e.get("logprob", e) if isinstance(e, dict) else e) for key, e in (entry or {}).items())
        rows.append(_row(at, entries, k, vocab))
    return _imported(field, ids, rows)


# --- SGLang ---


def _sglang(where: str, response: Any, k: int, vocab: int | None) -> Imported:
    meta: Any = response.get("meta_info") if isinstance(response, dict) else None
    _expect(isinstance(meta, dict), where + "meta_info", "the object that SGLang's /generate returns", meta)
    field, given = where + "meta_info.input_top_logprobs", meta.get("input_top_logprobs")
    asked = 'a list with an entry for each token: ask for "top_logprobs_num", and for "logprob_start_len": 0'
    _expect(isinstance(given, list) and any(given), field, asked, given)
    total = meta.get("prompt_tokens", len(given))
    counted = isinstance(total, int) and total >= len(given)
    _expect(
        counted, where + "meta_info.prompt_tokens", f"the number of tokens, at least the {len(given)} listed", total
    )
    ids = None
    if meta.get("input_token_logprobs") is not None:
        at = where + "meta_info.input_token_logprobs"
        _expect(isinstance(meta["input_token_logprobs"], list), at, "a list", meta["input_token_logprobs"])
        ids = _token_ids(at, [_pair(at, e)[0] for e in meta["input_token_logprobs"]], len(given), vocab)
    start = total - len(given)  # the last entry is always the last token's
    rows = [_row(field, (), k, vocab)] * start
    for i, entry in enumerate(given):
        at = f"{field}[{i}]"
        _expect(entry is None or isinstance(entry, list), at, "null or a list of [log-probability, id, text]", entry)
        rows.append(_row(at, (_pair(at, e) for e in entry or ()), k, vocab))
    return _imported(field, None if start else ids, rows)


def _pair(at: str, entry: Any) -> tuple[Any, Any]:
    """The id and the log-probability."""
    if not isinstance(entry, (list, tuple)) or len(entry) < 2:
        raise ValueError(f"{at} must hold entries [log-probability, id, text], got {entry!r}")
    return entry[1], entry[0]


# --- rows ---


def _row(at: str, entries: Entries, k: int, vocab: int | None) -> Row:
    """The k likeliest of the entries, and the log of the mass that they leave."""
    listed: dict[int, float] = {}
    for key, value in entries:
        token, log_p = _id(at, key, vocab), _log_prob(at, key, value)
        listed[token] = max(log_p, listed.get(token, -math.inf))
    best = sorted((-log_p, token) for token, log_p in listed.items() if log_p > NO_MASS)
    p = [math.exp(-minus) for minus, _ in best]
    total = math.fsum(p)
    if total > 1 + ROUNDING:
        raise ValueError(
            f"{at} must hold the logarithms of probabilities that sum to 1 at most, got a sum of {total:.6g}"
        )
    above = max(total, 1.0)
    tail = (max(1 - total, 0.0) + math.fsum(p[k:])) / above
    pad = k - len(best)
    ids = [token for _, token in best[:k]] + [-1] * pad
    log_probs = [-minus - math.log(above) for minus, _ in best[:k]] + [-math.inf] * pad
    return ids, log_probs, math.log(tail) if tail > 0 else -math.inf


def _imported(field: str, input_ids: list[int] | None, entries: list[Row]) -> Imported:
    """Entry i of the server becomes row i - 1."""
    if entries and entries[0][2] != 0:
        raise ValueError(f"{field}[0] must be null, as no token predicts the first, got {entries[0][0]}")
    empty = ([-1] * len(entries[0][0]), [-math.inf] * len(entries[0][0]), 0.0) if entries else None
    ids, log_probs, log_tail = zip(*entries[1:], empty) if empty else ((), (), ())
    top_k = TopK(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(log_probs),
        log_tail=torch.tensor(log_tail, dtype=torch.float32),
    )
    return Imported(None if input_ids is None else torch.tensor(input_ids, dtype=torch.int64), top_k)


# --- checks ---


def _expect(good: bool, field: str, expected: str, came: Any) -> None:
    if not good:
        raise ValueError(f"{field} must be {expected}, got {_shown(came)}")


def _shown(value: Any) -> str:
    """A value in an error: small ones as they are."""
    if isinstance(value, (dict, list)) and value:
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)


def _size(k: int, vocab: int | None) -> int:
    """k, checked."""
    for name, value in (("k", k), ("vocab", 1 if vocab is None else vocab)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer above 0, got {value!r}")
    if vocab is not None and k > vocab:
        raise ValueError(f"k must be at most the vocabulary of {vocab}, got {k}")
    return k


def _token_ids(field: str, given: Any, tokens: int, vocab: int | None) -> list[int] | None:
    """The prompt, if the response has it."""
    if given is None:
        return None
    _expect(
        isinstance(given, list) and len(given) == tokens, field, f"a list of {tokens} ids, one for each token", given
    )
    return [_id(f"{field}[{i}]", token, vocab) for i, token in enumerate(given)]


def _id(at: str, value: Any, vocab: int | None) -> int:
    """JSON has the keys of objects as strings."""
    token = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if type(token) is not int or token < 0 or (vocab is not None and token >= vocab):
        expected = "an integer from 0" + (f" to {vocab - 1}" if vocab else "")
        raise ValueError(f"{at}: a token id must be {expected}, got {value!r}")
    return token


def _log_prob(at: str, token: Any, value: Any) -> float:
    """null and -Infinity are -inf: JSON has no number for it, and servers differ."""
    if value is None or value in ("-Infinity", "-inf"):
        return -math.inf
    if type(value) not in (float, int) or not value < ROUNDING:  # nor NaN
        raise ValueError(f"{at}: token {token} must have a log-probability, at most 0, got {value!r}")
    return float(value)
