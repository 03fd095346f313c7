"""Ask what a model gives away of the rows that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hf_distill.evaluation.benchmarks import check_positive
from hf_distill.evaluation.bootstrap import Estimate, ItemScores, interval, resampled_means
from hf_distill.evaluation.memorization.attacks import MODEL, REFERENCE, score_rows
from hf_distill.evaluation.memorization.blind import blind_scores
from hf_distill.evaluation.memorization.greedy import TOKENS, greedy_matches
from hf_distill.evaluation.memorization.mitigations import mitigations
from hf_distill.evaluation.memorization.report import MANY_NON_MEMBERS, GreedyMatch, MemorizationReport
from hf_distill.evaluation.memorization.separation import LEAST_NON_MEMBERS, separate, threshold
from hf_distill.evaluation.rows import Row, check_dataset, count_targets, tokenize
from hf_distill.evaluation.scoring import Lineup, preserved_state
from hf_distill.signals import IGNORE_INDEX


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# With fewer no interval says anything, and a fold of the blind baseline holds a row or none.
LEAST_ROWS = 10


def audit_memorization(
    model: Any,
    members: Dataset,
    non_members: Dataset,
    reference: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    greedy: bool = True,
) -> MemorizationReport:
    """Measure how well the rows that a model was trained on can be told from others, and what it recites of them.

    Non-members must come from the same source as the members: split the data at random before training, and train on
    one part. A blind baseline, which never sees the model, says whether that was so. An audit finds what its attacks
    find: that they find nothing is no proof that there is nothing.

    Args:
        model: A causal language model, wrapped or not, or a PEFT model. It is as it was afterwards.
        members: Rows that it was trained on, of `text` or of `input_ids`, as for `Perplexity`.
        non_members: Rows that it was not trained on.
        reference: A model with the same tokenizer that was not trained on the members, such as the student before
            distillation; for the attack that takes out how hard a row is.
        tokenizer: Needed where a dataset holds text, and for the zlib attack.
        max_length: Longer rows are cut.
        batch_size: Rows per forward pass.
        greedy: Decode from the prompts, which takes longest.

    Raises:
        ValueError: There are too few rows, one is on both sides, or models and datasets do not fit; before any model
            runs.

    Example:
        ```python
        report = audit_memorization(student, trained_on, held_out, reference=before, tokenizer=tokenizer)
        print(report)
        ```
    """
    _check(model, members, non_members, batch_size, max_length)
    lineup = Lineup({MODEL: model} | ({} if reference is None else {REFERENCE: reference}), tokenizer)
    if lineup.task != "causal_lm":
        raise ValueError(f"`model` is a {lineup.task} model; the attacks are on causal language models.")
    sides = [lineup.rows(dataset, max_length) for dataset in (members, non_members)]
    _check_apart(*sides)
    rows = [*sides[0], *sides[1]]
    texts = None if tokenizer is None else [tokenizer.decode(_scored_ids(row)) for row in rows]
    with preserved_state(lineup.models.values()):
        scores = score_rows(lineup.models, lineup.task, rows, batch_size, texts)
        matches = greedy_matches(model, rows, batch_size) if greedy else None
    split = len(sides[0])
    ids = [[row["input_ids"] for row in side] for side in sides]
    blind = blind_scores(ids[0], ids[1], _columns(rows))
    stand_out = _stand_out(scores, matches, split)
    tokens = np.array([count_targets(row, lineup.task) for row in rows], dtype=np.float64)
    flagged_tokens = float(tokens[stand_out].sum() / tokens[:split].sum())
    return MemorizationReport(
        members=split,
        non_members=len(rows) - split,
        items=_digest(sides),
        attacks=tuple(separate(name, values[:split], values[split:]) for name, values in scores.items()),
        blind=separate("blind", blind[0], blind[1]),
        greedy=None if matches is None else _greedy(matches, split),
        held_out_nll=_estimate(-(scores["loss"] * tokens)[split:], tokens[split:]),
        flagged=tuple(_indices(lineup, members, max_length)[i] for i in stand_out),
        flagged_tokens=flagged_tokens,
        mitigations=mitigations(len(stand_out), split, flagged_tokens),
        notes=tuple(_notes(len(rows) - split, tokenizer, reference)),
    )


def _check(model: Any, members: Dataset, non_members: Dataset, batch_size: int, max_length: int | None) -> None:
    """Check what can be checked before the models are looked into."""
    for name, dataset in (("members", members), ("non_members", non_members)):
        check_dataset(dataset)
        if len(dataset) < LEAST_ROWS:
            raise ValueError(f"`{name}` has {len(dataset)} rows; expected at least {LEAST_ROWS}, better 1,000.")
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is a {type(model).__name__}; expected a model: of a Teacher, `teacher.model`.")
    check_positive(batch_size=batch_size, max_length=max_length)


def _check_apart(members: Sequence[Row], non_members: Sequence[Row]) -> None:
    known = {tuple(row["input_ids"]) for row in members}
    both = sum(tuple(row["input_ids"]) in known for row in non_members)
    if both:
        raise ValueError(
            f"{both} of {len(non_members)} rows of `non_members` are in `members`, too; remove them from one side."
        )


def _scored_ids(row: Row) -> list[int]:
    labels = row["labels"]
    assert not isinstance(labels, int)
    return [label for label in labels[1:] if label != IGNORE_INDEX]


def _columns(rows: Iterable[Row]) -> int:
    return 1 + max(max(row["input_ids"]) for row in rows)


def _digest(sides: Iterable[Sequence[Row]]) -> str:
    """Of what is scored, in its order."""
    digest = hashlib.sha256()
    for side in sides:
        for row in side:
            digest.update(f"{row['input_ids']} {row['labels']}\n".encode())
        digest.update(b"-")
    return digest.hexdigest()[:16]


def _stand_out(scores: Mapping[str, np.ndarray], matches: np.ndarray | None, split: int) -> list[int]:
    """Members above the threshold of 1 % false positives of some attack, or given verbatim."""
    found = np.zeros(split, dtype=bool) if matches is None else matches[:split] == 1
    for values in scores.values():
        if len(values) - split >= LEAST_NON_MEMBERS:
            found |= values[:split] > threshold(values[split:])
    return np.flatnonzero(found).tolist()


def _indices(lineup: Lineup, dataset: Dataset, max_length: int | None) -> list[int]:
    """Where in the dataset the rows are that have something to score."""
    rows = tokenize(dataset, lineup.task, lineup.tokenizer, max_length)
    return [i for i, row in enumerate(rows) if count_targets(row, lineup.task) > 0]


def _estimate(numerator: np.ndarray, weight: np.ndarray) -> Estimate:
    scores = ItemScores(numerator, weight)
    return Estimate(float(numerator.sum() / weight.sum()), *interval(resampled_means([scores])[0]))


def _greedy(matches: np.ndarray, split: int) -> GreedyMatch | None:
    """None where a side has no row to continue."""
    sides = [side[~np.isnan(side)] for side in (matches[:split], matches[split:])]
    if not all(map(len, sides)):
        return None
    items = [ItemScores(side, np.ones_like(side)) for side in sides]
    # Two samples that were drawn apart: another seed for the other.
    replicates = [resampled_means([item], seed=seed)[0] for seed, item in enumerate(items)]
    means = [Estimate(float(side.mean()), *interval(drawn)) for side, drawn in zip(sides, replicates, strict=True)]
    gap = Estimate(means[0].value - means[1].value, *interval(replicates[0] - replicates[1]))
    verbatim = [float((side == 1).mean()) for side in sides]
    return GreedyMatch(TOKENS, means[0], means[1], gap, verbatim[0], verbatim[1])


def _notes(non_members: int, tokenizer: Any, reference: Any) -> Iterable[str]:
    if non_members < LEAST_NON_MEMBERS:
        yield f"No true positive rates: {non_members} non-members cannot show a false positive rate of 1 %."
    elif non_members < MANY_NON_MEMBERS:
        yield f"The true positive rates rest on the highest scores of {non_members} non-members; give 1,000 or more."
    if tokenizer is None:
        yield "No zlib attack: it needs the text, and no tokenizer was given."
    if reference is None:
        yield "No reference attack: no reference model was given."
