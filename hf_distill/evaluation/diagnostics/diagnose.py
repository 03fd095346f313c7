"""Look at a student and its teacher over real batches, and name what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hf_distill.anatomy import unwrap
from hf_distill.evaluation.bootstrap import Estimate, ItemScores, interval, resampled_means
from hf_distill.evaluation.diagnostics.calibration import expected_calibration_error
from hf_distill.evaluation.diagnostics.findings import judge_models, judge_recipe
from hf_distill.evaluation.diagnostics.gradients import measure_shares
from hf_distill.evaluation.diagnostics.layers import layer_map
from hf_distill.evaluation.diagnostics.report import Diagnosis, Finding, Measurements, ModelStatistics, Slice
from hf_distill.evaluation.diagnostics.tokenizers import compare_templates, compare_vocabularies
from hf_distill.evaluation.diagnostics.tokens import (
    PAIR,
    PULL,
    SOFTENED,
    STUDENT,
    TokenTable,
    measure_tokens,
)
from hf_distill.evaluation.rows import CLASSIFICATION, check_dataset
from hf_distill.evaluation.scoring import TEACHER, Lineup, preserved_state
from hf_distill.objectives import LogitObjective, check_logit_objectives
from hf_distill.objectives.base import check_weight


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

QUARTERS = 4


def diagnose(
    student: Any,
    teacher: Any,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    objectives: Sequence[LogitObjective] = (),
    ce_weight: float = 0.0,
    gradient_shares: Mapping[str, float] | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
) -> Diagnosis:
    """Find out why a student does not follow its teacher.

    Compares both over the labelled tokens of a dataset, with intervals over its rows, and looks for six failures: the
    tokenizers disagree, the chats are in another template than the teacher's, the teacher is worse than the student,
    the student is too small for it, the temperature takes the divergence's pull away, a term does not steer. The last
    two need the recipe, the second both tokenizers; without them they are not judged. What is found holds for this
    dataset: take rows that were not trained on.

    Args:
        student: A Hugging Face model, wrapped or not, or a PEFT model. It is as it was afterwards.
        teacher: The same, or a Teacher.
        dataset: Rows of `text`, or of `input_ids` with `labels` or masks, as for `Perplexity`.
        tokenizer: The student's; needed when the dataset holds text.
        teacher_tokenizer: The teacher's; a Teacher's own when not given.
        objectives: The logit terms of the run, for example `[LogitObjective(0.5, temperature=2.0)]`.
        ce_weight: Weight of the cross-entropy in the run.
        gradient_shares: By term, as a run has logged them (`logged_shares`); else they are measured here.
        max_length: Longer rows are cut.
        batch_size: Rows per forward pass.

    Raises:
        ValueError: An argument is out of range, or models, dataset and tokenizer do not fit; before any model runs.

    Example:
        ```python
        print(diagnose(student, teacher, held_out, tokenizer, objectives=[LogitObjective(0.5)], ce_weight=0.5))
        ```
    """
    objectives = list(objectives)
    _check(dataset, objectives, ce_weight, batch_size, max_length)
    teacher_tokenizer = teacher_tokenizer or getattr(teacher, "tokenizer", None)
    known = tokenizer is not None and teacher_tokenizer is not None
    if known and (mismatch := compare_vocabularies(tokenizer, teacher_tokenizer)) is not None:
        return Diagnosis((mismatch,), None)
    lineup = Lineup({STUDENT: student, TEACHER: teacher}, tokenizer)
    rows = lineup.rows(dataset, max_length)
    template = compare_templates(tokenizer, teacher_tokenizer, rows) if known else None
    temperature = objectives[0].temperature if objectives else 1.0
    with preserved_state(lineup.models.values()):
        table = measure_tokens(lineup, rows, batch_size, temperature)
        shares = dict(gradient_shares or {})
        if not shares and objectives:
            shares = measure_shares(student, teacher, lineup.task, rows, batch_size, objectives, ce_weight)
        cka = layer_map(student, teacher, lineup.task, rows, batch_size)
    _refuse_broken(table)
    measured = _measurements(table, lineup, shares, cka)
    weights = {objective.name: objective.weight for objective in objectives} | (
        {"ce": ce_weight} if objectives else {}
    )
    found = [template] if template is not None else list(_judge_models(measured, table, lineup))
    return Diagnosis((*found, *judge_recipe(measured, temperature, _pull(table), weights)), measured)


def _check(
    dataset: Any, objectives: list[LogitObjective], ce_weight: float, batch_size: int, max_length: int | None
) -> None:
    """Check what can be checked without a model."""
    check_dataset(dataset)
    if strangers := [type(item).__name__ for item in objectives if not isinstance(item, LogitObjective)]:
        raise ValueError(
            f"`objectives` holds {strangers}; expected the LogitObjectives of the run. What other terms pull is "
            "logged by `GradientShareCallback`: pass `gradient_shares=logged_shares(trainer_state)`."
        )
    check_logit_objectives(objectives)
    check_weight("ce_weight", ce_weight)
    for argument, number in (("batch_size", batch_size), ("max_length", max_length)):
        if number is not None and number < 1:
            raise ValueError(f"`{argument}` is {number}; expected at least 1, for example `{argument}=8`.")


def _refuse_broken(table: TokenTable) -> None:
    """Raise where a model gives no distribution: no mean over tokens would be a number."""
    for side, values in table.values.items():
        for name, numbers in values.items():
            if (broken := int((~np.isfinite(numbers)).sum())) > 0:
                who = "student and the teacher" if side == PAIR else side
                raise ValueError(
                    f"The {name} of the {who} is not finite at {broken} of {len(table)} tokens; expected logits that "
                    "are numbers. Look for weights that are NaN, overflow in float16 (load in bfloat16), and ids that "
                    "a model rules out."
                )


def _measurements(
    table: TokenTable,
    lineup: Lineup,
    shares: dict[str, float],
    cka: tuple[tuple[float | None, ...], ...] | None,
) -> Measurements:
    pair, labels = table.values[PAIR], [table.values[role]["nll"] for role in (STUDENT, TEACHER)]
    # KL of the mean of the teacher's distributions from each of them: what the context tells the teacher.
    context = table.mean_entropy - table.mean(PAIR, "entropy")
    informed = context > np.finfo(np.float32).eps
    varied = min(label.std() for label in labels) > 0
    return Measurements(
        rows=len(np.unique(table.row)),
        tokens=len(table),
        student=_statistics(table, STUDENT, lineup.models[STUDENT]),
        teacher=_statistics(table, TEACHER, lineup.models[TEACHER]),
        kl=_mean(table, pair["kl"]),
        agreement=_mean(table, pair["agreement"]),
        nll_difference=_mean(table, labels[1] - labels[0]),
        information_kept=1 - table.mean(PAIR, "kl") / context if informed else None,
        label_correlation=float(np.corrcoef(labels[0], labels[1])[0, 1]) if varied else None,
        logit_correlation=table.mean(PAIR, "logit_correlation"),
        by_position=tuple(_by_position(table)),
        by_teacher_entropy=tuple(_by_teacher_entropy(table)),
        gradient_shares=shares,
        cka=cka,
    )


def _statistics(table: TokenTable, role: str, model: Any) -> ModelStatistics:
    values = table.values[role]
    is_module = isinstance(model, nn.Module)
    parameters = unwrap(model).num_parameters() if is_module else model.config_for_card().get("parameters")
    return ModelStatistics(
        parameters=parameters,
        nll=table.mean(role, "nll"),
        accuracy=table.mean(role, "correct"),
        entropy=table.mean(role, "entropy"),
        confidence=table.mean(role, "confidence"),
        ece=expected_calibration_error(values["confidence"], values["correct"]),
    )


def _mean(table: TokenTable, values: np.ndarray) -> Estimate:
    """The mean over tokens, and its bootstrap interval over rows: tokens of one row are not independent."""
    _, row = np.unique(table.row, return_inverse=True)
    count = np.bincount(row).astype(np.float64)
    scores = ItemScores(np.bincount(row, weights=values), count)
    low, high = interval(resampled_means([scores])[0]) if len(count) > 1 else (None, None)
    return Estimate(float(values.mean()), low, high)


def _by_position(table: TokenTable) -> Iterator[Slice]:
    """Positions 0, 1, 2 to 3, 4 to 7 and so on, which hold ever more tokens."""
    start, end = 0, 1
    while start <= table.position.max():
        label = f"{start}" if end == start + 1 else f"{start} to {end - 1}"
        yield _slice(table, label, np.flatnonzero((table.position >= start) & (table.position < end)))
        start, end = end, 2 * end


def _by_teacher_entropy(table: TokenTable) -> Iterator[Slice]:
    entropy = table.values[PAIR]["entropy"]
    for part in np.array_split(np.argsort(entropy, kind="stable"), min(QUARTERS, len(table))):
        yield _slice(table, f"{entropy[part[0]]:.3g} to {entropy[part[-1]]:.3g} nats", part)


def _slice(table: TokenTable, label: str, index: np.ndarray) -> Slice:
    pair = table.values[PAIR]
    return Slice(
        label=label,
        tokens=len(index),
        kl=float(pair["kl"][index].mean()),
        agreement=float(pair["agreement"][index].mean()),
        student_nll=float(table.values[STUDENT]["nll"][index].mean()),
        teacher_nll=float(table.values[TEACHER]["nll"][index].mean()),
    )


def _judge_models(measured: Measurements, table: TokenTable, lineup: Lineup) -> Iterator[Finding]:
    choices = lineup.classes() if lineup.task == CLASSIFICATION else table.vocab_size
    return judge_models(measured, _mean(table, table.values[TEACHER]["nll"]), choices)


def _pull(table: TokenTable) -> dict[str, float]:
    return {name: table.mean(PAIR, name) for name in (*PULL, *SOFTENED)}
