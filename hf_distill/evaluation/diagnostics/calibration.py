"""Whether a model is right as often as it is sure."""

from __future__ import annotations

import numpy as np
import torch

from hf_distill.evaluation.scoring import CONFIDENCE_BINS, confidence_bin


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """The mean gap between confidence and accuracy, over bins of equal width weighted by their share of tokens.

    It is the number of the benchmark `ExpectedCalibrationError`, of tokens instead of rows. Source: Guo et al., On
    Calibration of Modern Neural Networks, arXiv 1706.04599.

    Args:
        confidence: `[N]`, the probability of the first choice, in [0, 1].
        correct: `[N]`, 1 where the first choice is the label, else 0.

    Returns:
        From 0 to 1.
    """
    index = confidence_bin(torch.from_numpy(confidence)).numpy()
    gaps = np.bincount(index, weights=confidence - correct, minlength=CONFIDENCE_BINS)
    return float(np.abs(gaps).sum() / len(confidence))
