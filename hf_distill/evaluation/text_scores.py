"""Scores of one generated text against its reference: exact match and ROUGE."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


ROUGE_KINDS = ("rouge1", "rouge2", "rougeL")
# As Google's `rouge_score` without a stemmer: everything but letters and digits of ASCII separates words.
_SEPARATOR = re.compile(r"[^a-z0-9]+")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where two texts are equal but for white space around them, else 0.0."""
    return float(prediction.strip() == reference.strip())


def rouge(prediction: str, reference: str, kind: str) -> float:
    """ROUGE F-measure of a text (Lin, 2004, https://aclanthology.org/W04-1013).

    Args:
        prediction: The generated text.
        reference: The text that was expected.
        kind: "rouge1" or "rouge2" (n-grams in common), or "rougeL" (the longest common subsequence of words).
    """
    predicted, expected = (_SEPARATOR.sub(" ", text.lower()).split() for text in (prediction, reference))
    if kind == "rougeL":
        common, sizes = _common_subsequence(predicted, expected), (len(predicted), len(expected))
    else:
        n = int(kind[-1])
        ours, theirs = _ngrams(predicted, n), _ngrams(expected, n)
        common, sizes = (ours & theirs).total(), (ours.total(), theirs.total())
    return 2 * common / sum(sizes) if common else 0.0


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row of the usual table."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]
