"""Log-probabilities and weights in fewer bits, and what that costs.

"int8" keeps a code c in 0..254 for each entry, and two float32 for each token::

    log p  =  shift - scale * c**2          255: -inf

``scale`` is (largest - smallest log p) / 254**2, so that the largest has the code 0. The square makes steps small where
probabilities are large: the error of an entry is at most scale * (c + 1/4), no more than the token's range of
log-probabilities / 254. ``shift`` is the largest log-probability, moved so that the codes' mass is the entries' mass,
which keeps the errors a divergence between two distributions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LEVELS = 254  # the largest code
PADDING = 255  # the code of -inf
FLOOR = 80.0  # nats below a token's largest at which "int8" stops: e**-80 is nothing
FP16_LOWEST = -65504.0

Columns = dict[str, np.ndarray]
Errors = dict[str, float]


def encode(log_probs: np.ndarray, padded: np.ndarray | None, dtype: str) -> Columns:
    """The columns that log-probabilities [T, K] float32 take as `dtype`."""
    if dtype == "fp32":
        return {"log_probs": log_probs}
    if dtype == "fp16":
        halves = np.maximum(log_probs, FP16_LOWEST).astype(np.float16)
        if padded is not None:
            halves[padded] = -np.inf
        return {"log_probs": halves}
    return _quantise(log_probs, padded)


def _quantise(log_probs: np.ndarray, padded: np.ndarray | None) -> Columns:
    top = log_probs.max(-1, keepdims=True, initial=-np.inf)
    top[top == -np.inf] = 0.0  # a token without entries
    below = np.minimum(top - log_probs, FLOOR)  # 0 to 80, 80 where padded
    live = below if padded is None else np.where(padded, 0.0, below)
    scale = live.max(-1, keepdims=True, initial=0.0) / np.float32(LEVELS**2)
    codes = np.rint(np.sqrt(live / np.where(scale > 0, scale, 1.0)))
    exact, coarse = np.exp(-live), np.exp(-scale * codes * codes)
    if padded is not None:
        exact[padded] = coarse[padded] = 0.0
        codes[padded] = PADDING
    mass, coarse_mass = (x.sum(-1, keepdims=True, dtype=np.float64) for x in (exact, coarse))
    with np.errstate(invalid="ignore"):
        moved = np.where(coarse_mass > 0, np.log(mass / coarse_mass), 0.0)
    shift = (top + moved).astype(np.float32)
    return {"log_probs": codes.astype(np.uint8), "scale": scale[:, 0].astype(np.float32), "shift": shift[:, 0]}


def decode(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Log-probabilities [T, K] of their columns: float16 for "fp16", else float32."""
    stored = columns["log_probs"]
    if stored.dtype != np.uint8:
        return stored
    codes = stored.astype(np.float32)
    log_probs = columns["shift"][:, None] - columns["scale"][:, None] * (codes * codes)
    return np.where(stored == PADDING, np.float32(-np.inf), log_probs)


def padding(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which entries [T, K] of stored columns are padding."""
    if "weights" in columns:
        return columns["weights"] == 0
    stored = columns["log_probs"]
    if stored.dtype == np.float16:
        return stored.view(np.uint16) == 0xFC00  # -inf; comparing halves themselves is slow
    return stored == (PADDING if stored.dtype == np.uint8 else -np.inf)


def wholes(log_probs: np.ndarray, log_tail: np.ndarray) -> np.ndarray:
    """Sum of the probabilities of each token and its tail [T], float64."""
    return np.exp(log_probs, dtype=np.float64).sum(-1) + np.exp(log_tail, dtype=np.float64)


def errors(exact: np.ndarray, stored: np.ndarray, log_tail: np.ndarray) -> Errors:
    """What storing has cost, over the tokens of a sequence; every error is 0 for "fp32".

    ``log_prob`` and ``prob`` are the largest errors of an entry. ``kl`` is the sum over tokens of the divergence from
    exact to stored probabilities, sum p (log p - log p') - p + p' >= 0. ``mass`` is the largest distance from 1 of the
    sum of a token's stored probabilities and tail, whatever it came from.
    """
    p, p_stored = np.exp(exact, dtype=np.float64), np.exp(stored, dtype=np.float64)
    live = exact > -np.inf
    difference = np.subtract(exact, stored, where=live, out=np.zeros_like(exact), dtype=np.float32)
    mass = np.abs(wholes(stored, log_tail) - 1)
    return {
        "log_prob": float(np.abs(difference).max(initial=0.0)),
        "prob": float(np.abs(p - p_stored).max(initial=0.0)),
        "kl": max(0.0, float((p * difference - p + p_stored).sum())),
        "mass": float(mass.max(initial=0.0)),
    }


def weight_errors(exact: np.ndarray, stored: np.ndarray) -> Errors:
    """The largest error of a weight."""
    return {"weight": float(np.abs(exact - stored.astype(np.float32)).max(initial=0.0))}


def merge(before: Mapping[str, float], more: Mapping[str, float]) -> Errors:
    """Errors of two parts as those of both: sums of "kl", the larger of the others."""
    both = {name: max(before.get(name, 0.0), more.get(name, 0.0)) for name in {**before, **more}}
    return both | ({"kl": before.get("kl", 0.0) + more.get("kl", 0.0)} if "kl" in both else {})
