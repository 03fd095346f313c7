"""Whether greedy decoding goes on as a row does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig

from hf_distill.anatomy import unwrap
from hf_distill.evaluation.rows import Row
from hf_distill.signals import IGNORE_INDEX


# The first tokens of an answer, as in Zhang et al., arXiv 2508.07054.
TOKENS = 32
# What a text without a prompt is continued from, or half of it where it is shorter.
PROMPT_TOKENS = 32
# A shorter continuation is the same by luck.
LEAST_TOKENS = 8


def greedy_matches(model: Any, rows: Sequence[Row], batch_size: int) -> np.ndarray:
    """The share of a row's continuation that greedy decoding gives, token by token.

    The prompt is what stands before the first label; of a row that is labelled from its start, its first 32 tokens, or
    half of it. At most 32 tokens after it are compared, and rows with fewer than 8 left out.

    Args:
        model: A causal language model with `generate`, PEFT or not.
        rows: Real tokens and labels.
        batch_size: Rows decoded together.

    Returns:
        `[n]`, 1 where all compared tokens are the same; NaN for rows that are left out.
    """
    pairs = [_split(row) for row in rows]
    matches = np.full(len(rows), np.nan)
    order = sorted((i for i, (prompt, _) in enumerate(pairs) if prompt), key=lambda i: len(pairs[i][0]))
    for start in tqdm(range(0, len(order), batch_size), desc="Decoding", disable=None, leave=False):
        index = order[start : start + batch_size]
        decoded = _decode(model, [pairs[i][0] for i in index], max(len(pairs[i][1]) for i in index))
        for i, tokens in zip(index, decoded, strict=True):
            target = pairs[i][1]
            # Where the model ended the text, there are fewer tokens.
            matches[i] = sum(a == b for a, b in zip(tokens, target, strict=False)) / len(target)
    return matches


def _split(row: Row) -> tuple[list[int], list[int]]:
    """Prompt and continuation."""
    ids, labels = row["input_ids"], row["labels"]
    if isinstance(labels, int):
        raise TypeError("a classifier decodes nothing")
    start = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    if start == 0:
        start = min(PROMPT_TOKENS, max(1, len(ids) // 2))
    end = start
    while end < min(len(ids), start + TOKENS) and labels[end] != IGNORE_INDEX:
        end += 1
    return (ids[:start], ids[start:end]) if end - start >= LEAST_TOKENS else ([], [])


def _decode(model: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Continue prompts greedily, by `tokens` at most; the model's own settings do not change what is likely."""
    device, width = unwrap(model).device, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    # What is None is taken from the model's own settings: penalties must be set to do nothing.
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=tokens,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
    )
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return out[:, width:].tolist()
