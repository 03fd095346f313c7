"""Which term of a loss pulls how much, measured on a few batches of the data or read from a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_distill.evaluation.json_file import read_json
from hf_distill.evaluation.rows import Row, collate
from hf_distill.evaluation.scoring import project
from hf_distill.objectives import LogitObjective, logit_loss
from hf_distill.signals import StudentSignals, Targets, TeacherSignals


# A step of training sees one batch; the mean over a few tells terms apart that differ by more than their noise.
BATCHES = 4
LOGGED = "_gradient_share"


def measure_shares(
    student: nn.Module,
    teacher: Any,
    task: str,
    rows: Sequence[Row],
    batch_size: int,
    objectives: Sequence[LogitObjective],
    ce_weight: float,
) -> dict[str, float]:
    """The norm of each weighted term's gradient over the student's parameters, as shares of their sum.

    As in `GradientShareCallback`, for terms of logits; other terms need the projectors of their run.

    Args:
        student: The model; its trained parameters count, or all of them if none is marked.
        teacher: A model or a Teacher.
        task: Of both.
        rows: The first batches are read.
        batch_size: Rows of a forward pass.
        objectives: The terms.
        ce_weight: Weight of the cross-entropy on the labels.

    Returns:
        By name; the means over batches.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    frozen = [] if trained else [p for p in student.parameters() if p.is_floating_point()]
    norms = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for start in range(0, min(len(rows), BATCHES * batch_size), batch_size):
            batch = collate(rows[start : start + batch_size])
            losses = _losses(student, teacher, task, batch, objectives, ce_weight)
            norms.append({name: _gradient_norm(loss, trained or frozen) for name, loss in losses})
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    shares = np.array([list(batch.values()) for batch in norms])
    shares = shares / np.maximum(shares.sum(1, keepdims=True), np.finfo(np.float64).tiny)
    return dict(zip(norms[0], shares.mean(0).tolist(), strict=True))


def logged_shares(trainer_state: str | Path) -> dict[str, float]:
    """The shares that `GradientShareCallback` logged last in a run.

    Args:
        trainer_state: `trainer_state.json` of one of its checkpoints.

    Raises:
        ValueError: It is no such file, or the callback was not used.
    """
    data = read_json(trainer_state, "the trainer_state.json of a checkpoint")
    for entry in reversed(data.get("log_history", [])):
        shares = {name.removesuffix(LOGGED): value for name, value in entry.items() if name.endswith(LOGGED)}
        if shares:
            return shares
    raise ValueError(
        f"{trainer_state} has no gradient shares; add `GradientShareCallback(every=50)` to the trainer of the run, or "
        "give the weights of its terms, to have those of logits measured here."
    )


def _losses(
    student: nn.Module,
    teacher: Any,
    task: str,
    batch: Mapping[str, Tensor],
    objectives: Sequence[LogitObjective],
    ce_weight: float,
) -> Iterator[tuple[str, Tensor]]:
    """Each weighted term of a batch with its name, from one forward pass of each model."""
    targets = Targets.from_labels(batch["labels"], shift=task == "causal_lm")
    with torch.enable_grad():
        own = project(student, task, batch).at(targets.index)
        home = own.hidden.device
        with torch.no_grad():
            # The inputs of a Teacher say where its signals go.
            other = project(teacher, task, {name: value.to(home) for name, value in batch.items()})
        signals = StudentSignals(own, targets.labels.to(home))
        others = TeacherSignals(other.at(targets.index))
        if ce_weight > 0:
            yield "ce", logit_loss([], ce_weight, signals, None).loss
        for objective in objectives:
            yield objective.name, logit_loss([objective], 0.0, signals, others).loss


def _gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    if not loss.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return float(sum(grad.double().square().sum().cpu() for grad in gradients if grad is not None)) ** 0.5
