"""Scores of membership: what a model's probabilities say of whether it was trained on a row.

Every score is higher for rows that look like members.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.evaluation.rows import Row
from hf_distill.evaluation.scoring import score_tiles


MODEL, REFERENCE = "model", "reference"
# Share of a row's tokens that Min-K% looks at: the least likely ones.
LOWEST = 0.2
# A distribution on one token has no spread to measure surprise in.
LEAST_VARIANCE = 1e-12


def score_rows(
    models: Mapping[str, Any], task: str, rows: list[Row], batch_size: int, texts: Sequence[str] | None
) -> dict[str, np.ndarray]:
    """Score every row by every attack that can be made.

    - `loss`: mean log-likelihood (Yeom et al., arXiv 1709.01604).
    - `min_k`: mean of the lowest 20 % of the tokens' log-likelihoods (Shi et al., arXiv 2310.16789).
    - `min_k_plus_plus`: the same of `(log q(x) - mu) / sigma`, mean and deviation of log q under q at that token
      (Zhang et al., arXiv 2404.02936).
    - `zlib`: log-likelihood of the row over the bytes of its compressed text (Carlini et al., arXiv 2012.07805): the
      sum, so that rows of one kind and two lengths have one score.
    - `reference`: mean log-likelihood less that under another model (Carlini et al., arXiv 2012.07805).

    Args:
        models: "model", and "reference" if there is one, which reads the same ids.
        task: Of both.
        rows: What is scored.
        batch_size: Rows of a forward pass.
        texts: The scored text of each row; None leaves `zlib` out.

    Returns:
        `[n]` float64 by attack.

    Raises:
        ValueError: A log-likelihood is not finite.
    """
    tiles = list(score_tiles(models, task, rows, batch_size, _compare))
    row = torch.cat([row for row, _ in tiles])
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=len(rows)).tolist()
    values = {role: torch.cat([tile[role] for _, tile in tiles], 1)[:, order] for role in models}
    _refuse_broken(values)
    log_likelihoods, surprises = (list(part.split(counts)) for part in values[MODEL])
    scores = {
        "loss": _of_each(log_likelihoods, torch.mean),
        "min_k": _of_each(log_likelihoods, _lowest),
        "min_k_plus_plus": _of_each(surprises, _lowest),
    }
    if texts is not None:
        bytes_of = np.array([len(zlib.compress(text.encode())) for text in texts])
        scores["zlib"] = _of_each(log_likelihoods, torch.sum) / bytes_of
    if REFERENCE in models:
        scores["reference"] = scores["loss"] - _of_each(list(values[REFERENCE][0].split(counts)), torch.mean)
    return scores


def _compare(logits: Mapping[str, Tensor], gold: Tensor) -> dict[str, Tensor]:
    """Log-likelihood of the label, and its distance from the mean in deviations, `[2, n]` of each model."""
    found = {}
    for role, model in logits.items():
        log_q = model.float().log_softmax(-1)
        label = log_q.gather(-1, gold[:, None])[:, 0]
        q = log_q.exp()
        finite = torch.where(q > 0, log_q, 0.0)
        mean = (q * finite).sum(-1)
        variance = (q * (finite - mean[:, None]).square()).sum(-1)
        found[role] = torch.stack([label, (label - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()])
    return found


def _of_each(rows: list[Tensor], statistic: Any) -> np.ndarray:
    return np.array([float(statistic(row)) for row in rows])


def _lowest(values: Tensor) -> Tensor:
    return values.sort().values[: max(1, int(LOWEST * len(values)))].mean()


def _refuse_broken(values: Mapping[str, Tensor]) -> None:
    for role, part in values.items():
        if not part.isfinite().all():
            raise ValueError(
                f"The {role} gives labels a log-likelihood that is not finite; expected logits that are numbers. Look "
                "for weights that are NaN and for overflow in float16 (load in bfloat16)."
            )
