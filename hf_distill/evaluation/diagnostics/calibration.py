"""Whether a model is right as often as it is sure."""

from __future__ import annotations

import numpy as np


BINS = 15


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """The mean gap between confidence and accuracy, over bins of equal width weighted by their share of tokens.

    Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Args:
        confidence: `[N]`, the probability of the first choice, in [0, 1].
        correct: `[N]`, 1 where the first choice is the label, else 0.
        bins: How many bins.

    Returns:
        From 0 to 1.
    """
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(index, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))
