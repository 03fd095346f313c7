"""One pass over the scored positions, and everything that is kept of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.evaluation.rows import Row
from hf_distill.evaluation.scoring import TEACHER, Lineup, score_tiles
from hf_distill.functional import forward_kl


STUDENT = "student"
PAIR = "pair"
# Of each model, over its own vocabulary: surprise at the label, entropy, probability of its first choice, whether that
# is the label.
OWN = ("nll", "entropy", "confidence", "correct")
# Of both, over the vocabulary that they share: KL(teacher || student), whether they have one first choice, correlation
# of their logits over the vocabulary; then at T = 1, and at the run's T, what `_pull` gives.
PULL = ("pull", "focus", "entropy")
SOFTENED = tuple(f"softened_{name}" for name in PULL)
SHARED = ("kl", "agreement", "logit_correlation", *PULL, *SOFTENED)


@dataclass(frozen=True)
class TokenTable:
    """What was measured at every scored position, in the order of the rows.

    Args:
        row: `[N]` int64, which row it is of.
        position: `[N]` int64, its number among the scored positions of its row, from 0.
        values: `[N]` float64 by side ("student", "teacher", "pair") and by name (`OWN`, `SHARED`).
        mean_entropy: Entropy in nats of the mean of the teacher's distributions over all positions.
        vocab_size: Columns that both models share.
    """

    row: np.ndarray
    position: np.ndarray
    values: Mapping[str, Mapping[str, np.ndarray]]
    mean_entropy: float
    vocab_size: int

    def __len__(self) -> int:
        return len(self.row)

    def mean(self, side: str, name: str) -> float:
        """The mean over all positions."""
        return float(self.values[side][name].mean())


def measure_tokens(lineup: Lineup, rows: list[Row], batch_size: int, temperature: float) -> TokenTable:
    """Run student and teacher once over the rows; the logits of a batch never exist together.

    Args:
        lineup: With the roles "student" and "teacher".
        rows: What is scored.
        batch_size: Rows of a forward pass.
        temperature: Of the run that is looked at.

    Returns:
        The table, its rows and positions ascending.
    """
    compare = _Comparison(temperature)
    tiles = list(score_tiles(lineup.models, lineup.task, rows, batch_size, compare))
    row = torch.cat([row for row, _ in tiles]).numpy()
    order = np.argsort(row, kind="stable")  # the positions of a row come in their order
    row = row[order]
    first = np.searchsorted(row, row)
    names = {STUDENT: OWN, TEACHER: OWN, PAIR: SHARED}
    values = {
        side: dict(zip(names[side], torch.cat([tile[side] for _, tile in tiles], 1).numpy()[:, order], strict=True))
        for side in names
    }
    return TokenTable(row, np.arange(len(row)) - first, values, compare.mean_entropy(), compare.vocab_size)


class _Comparison:
    """Compares the two models on a block of positions, and adds up the teacher's distributions.

    Args:
        temperature: Of the run that is looked at.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._total: Tensor | None = None

    def __call__(self, logits: Mapping[str, Tensor], gold: Tensor) -> dict[str, Tensor]:
        """`OWN` of each model and `SHARED`, `[k, n]`."""
        shared = min(model.shape[-1] for model in logits.values())
        student, teacher = (logits[role][..., :shared].float() for role in (STUDENT, TEACHER))
        probs = teacher.softmax(-1)
        added = probs.sum(0, dtype=torch.float64)
        self._total = added if self._total is None else self._total + added
        likely = probs > 1 / shared
        pair = (
            forward_kl(student, teacher),
            (student.argmax(-1) == teacher.argmax(-1)).float(),
            F.cosine_similarity(student - student.mean(-1, True), teacher - teacher.mean(-1, True), dim=-1),
            *_pull(student, teacher, likely, 1.0),
            *_pull(student, teacher, likely, self.temperature),
        )
        own = {role: _own(model.float(), gold) for role, model in logits.items()}
        return {**own, PAIR: torch.stack(pair)}

    @property
    def vocab_size(self) -> int:
        """Columns that both models share."""
        assert self._total is not None
        return len(self._total)

    def mean_entropy(self) -> float:
        """Entropy of the mean of the teacher's distributions, in nats."""
        assert self._total is not None
        return float(torch.special.entr(self._total / self._total.sum()).sum())


def _pull(student: Tensor, teacher: Tensor, likely: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the divergence does at a temperature: `PULL`, `[n]` each.

    Args:
        student: Logits `[n, V]`.
        teacher: The same.
        likely: Tokens that the teacher (at T = 1) holds likelier than a guess, `[n, V]`.
        temperature: T.

    Returns:
        The norm of the gradient of T^2 * KL in the student's logits, the share of its absolute values that is on
        likely tokens, and the teacher's entropy in nats.
    """
    target = teacher.div(temperature).log_softmax(-1)
    gradient = temperature * (student.div(temperature).softmax(-1) - target.exp())
    size = gradient.abs()
    focus = (size * likely).sum(-1) / size.sum(-1).clamp(min=torch.finfo(size.dtype).tiny)
    return gradient.norm(dim=-1), focus, _entropy(target)


def _own(logits: Tensor, gold: Tensor) -> Tensor:
    """`OWN` of a block of logits, `[4, n]`."""
    log_q = logits.log_softmax(-1)
    confidence, first = log_q.max(-1)
    nll = -log_q.gather(-1, gold[:, None])[:, 0]
    return torch.stack([nll, _entropy(log_q), confidence.exp(), (first == gold).float()])


def _entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats; an id that is ruled out (-inf) adds nothing."""
    return torch.special.entr(log_probs.exp()).sum(-1)
