"""What a server says of the tokens of a prompt.

Entry i is about token i given those before it (None for the first), so that the distribution at position i stands at
i + 1. An entry has the `k` most likely tokens, and the prompt's own token where it is none of them: k + 1 then. It is
`prompt_logprobs` in the answers of vLLM's `POST /v1/completions`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_distill.cache.rows import Row
from hf_distill.cache.top_tokens import TopTokens


# What vLLM writes for a log-probability of -inf, which JSON cannot hold.
CLAMPED = -9999.0
# The mass of k tokens may exceed 1 by this: log-probabilities are computed and written in fp32.
MASS_TOLERANCE = 1e-3
# So many tokens whose k-th probability can be seen, and that leave less than this to all others, are no coincidence.
SUSPICIOUS_TOKENS = 32
SEEN, NOTHING = 1e-3, 1e-5


def parse_prompt_logprobs(entries: Sequence[Mapping[str, Any] | None], row: Row, k: int) -> TopTokens:
    """The distributions at the kept positions of a row, from the `prompt_logprobs` of a server's answer.

    Args:
        entries: One a token; see the module.
        row: The row that was asked for.
        k: Tokens asked for a position.

    Raises:
        ValueError: An entry is missing, is about another token, or has another number of tokens.
    """
    if len(entries) != len(row.ids):
        raise ValueError(
            f"The server gave `prompt_logprobs` of {len(entries)} tokens for a prompt of {len(row.ids)}; it must "
            "score the prompt as it is: leave out truncation, and options that add special tokens."
        )
    positions: np.ndarray = np.flatnonzero(row.kept) + 1
    ids: np.ndarray = np.empty((len(positions), k), dtype=np.int64)
    log_probs = np.empty((len(positions), k))
    label_log_probs = np.empty(len(positions))
    for n, position in enumerate(positions):
        label = int(row.ids[position])
        known = {int(token): float(facts["logprob"]) for token, facts in (entries[position] or {}).items()}
        if label not in known:
            raise ValueError(
                f"The server's `prompt_logprobs` at token {position} of row {row.key.hex()} do not hold that token "
                f"itself, {label}, but {sorted(known)[:5]}...; expected entry i to be about token i."
            )
        label_log_probs[n] = known[label]
        if len(known) == k + 1:
            del known[label]
        if len(known) != k:
            raise ValueError(
                f"The server's `prompt_logprobs` have {len(known)} tokens at token {position} of row {row.key.hex()}; "
                f"expected {k}, or {k + 1} with the prompt's own."
            )
        ids[n] = list(known)
        log_probs[n] = list(known.values())
    for values in (log_probs, label_log_probs):
        values[values <= CLAMPED] = -math.inf
    return TopTokens(ids, log_probs, row.labels.astype(np.int64), label_log_probs)


def check_raw(top: TopTokens, vocab_size: int) -> None:
    """Check that these are log-probabilities of the model, over its whole vocabulary.

    Raises:
        ValueError: They add up to more than 1, or to exactly 1 where they cannot.
    """
    fix = "start vLLM with `--logprobs-mode raw_logprobs`, its default."
    mass = top.mass + np.where(top.has_label, 0, np.exp(top.label_log_probs))
    if not (mass <= 1 + MASS_TOLERANCE).all():  # also for nan
        raise ValueError(
            f"The server's `prompt_logprobs` are no log-probabilities: those of a token add "
            f"up to {mass.max():.4g}. They may be logits, or processed; {fix}"
        )
    telling = np.exp(top.log_probs.min(1)) > SEEN
    if (
        top.ids.shape[1] < vocab_size
        and telling.sum() >= SUSPICIOUS_TOKENS
        and (top.mass[telling] > 1 - NOTHING).all()
    ):
        raise ValueError(
            f"The server's `prompt_logprobs` leave no probability to the {vocab_size - top.ids.shape[1]} tokens "
            f"beyond the {top.ids.shape[1]} most likely ones, at any of {telling.sum()} tokens where the last of "
            f"these has more than {SEEN:g}: they are processed (cut by top-k or top-p, or normalised again); {fix}"
        )
