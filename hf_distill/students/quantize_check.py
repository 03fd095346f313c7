"""How far a quantised model is from the one that it was made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_distill.anatomy import resolve_head, task_of
from hf_distill.functional import LinearLossOutput, linear_distillation_loss
from hf_distill.signals import Targets
from hf_distill.taps import tap_last_hidden


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Agreement:
    """Means over the labelled predictions of some rows.

    Args:
        tokens: How many.
        kl: KL(reference || model) in nats, at temperature 1.
        top1_agreement: Share with one first choice.
    """

    tokens: int
    kl: float
    top1_agreement: float


def check_rows(rows: Iterable[Row], model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Read the rows that models are compared on.

    Args:
        rows: Each with `input_ids`, and `labels` (-100 where a position does not count) and `attention_mask` where
            there are any; a `datasets.Dataset` of token ids, for example.
        model: A causal or masked language model.

    Returns:
        `input_ids` and `labels` of every row, `[1, S]` int64 without padding.

    Raises:
        ValueError: The model has another task, there is nothing to compare, or an id is not in the vocabulary.
    """
    task = task_of(model)
    if task == "sequence_classification":
        raise ValueError(
            "`check` compares distributions over the vocabulary, and the model is a classifier; leave it out and "
            "compare the two with `evaluate_retention`."
        )
    kept = []
    for row in rows:
        if "input_ids" not in row:
            raise ValueError(
                f"A row of `check` has the columns {sorted(row)}; expected `input_ids`: tokenize it first."
            )
        ids = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        labels = torch.as_tensor(row.get("labels", ids), dtype=torch.int64)
        real = torch.as_tensor(row.get("attention_mask", torch.ones_like(ids))).bool()
        if ids.max() >= model.config.vocab_size or ids.min() < 0:
            raise ValueError(
                f"`check` has the id {int(ids.max())}, but the model's vocabulary ends at "
                f"{model.config.vocab_size - 1}; tokenize with the student's own tokenizer."
            )
        kept.append({"input_ids": ids[real][None], "labels": labels[real][None]})
    shift = task == "causal_lm"
    if not any(len(Targets.from_labels(row["labels"], shift=shift)) for row in kept):
        raise ValueError(f"`check` ({len(kept)} rows) has no labelled token, so there is nothing to compare.")
    return kept


def measure_agreement(
    reference: PreTrainedModel, model: PreTrainedModel, rows: Sequence[Mapping[str, Tensor]]
) -> Agreement:
    """Run two models on one device over rows of `check_rows`, one at a time; modes are given back."""
    modes = {part: part.training for each in (reference, model) for part in each.modules()}
    count, sums = 0, {"kl": 0.0, "top1_agreement": 0.0}
    try:
        reference.eval()
        model.eval()
        with torch.no_grad():
            for row in rows:
                out = _compare(reference, model, row, tuple(sums))
                count += int(out.count)
                for name in sums:
                    sums[name] += float(out.metrics[name])
    finally:
        for part, training in modes.items():
            part.training = training
    return Agreement(count, sums["kl"] / count, sums["top1_agreement"] / count)


def _compare(
    reference: PreTrainedModel, model: PreTrainedModel, row: Mapping[str, Tensor], metrics: tuple[str, ...]
) -> LinearLossOutput:
    """Sums over the labelled positions of one row."""
    causal = task_of(model) == "causal_lm"
    targets = Targets.from_labels(row["labels"].to(model.device), shift=causal)
    hidden = {}
    for role, each in (("reference", reference), ("model", model)):
        with tap_last_hidden(each) as tap:
            each(row["input_ids"].to(model.device), **({"use_cache": False} if causal else {}))
        hidden[role] = tap.hidden[0][targets.index]
    return linear_distillation_loss(
        hidden["model"],
        resolve_head(model),
        targets.labels,
        teacher_hidden=hidden["reference"],
        teacher_head=resolve_head(reference),
        terms={"forward_kl": 1.0},
        temperature=1.0,
        metrics=metrics,
    )
