"""Logit distillation: cross-entropy and divergences from one pass over the labelled positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_distill.functional import LinearLossOutput, SparseLogits, linear_distillation_loss, resolve_divergence
from hf_distill.objectives.base import Objective, check_weight
from hf_distill.objectives.schedules import Schedule, Scheduled
from hf_distill.objectives.taid import SETTINGS, TAIDInterpolation
from hf_distill.signals import Projection, Signal, StudentSignals, TeacherSignals


# Every one is a sum over labelled tokens, independent of temperature and weights: comparable between runs.
STUDENT_MONITORS = ("student_nll",)
TEACHER_MONITORS = ("teacher_nll", "top1_agreement", "kl")
# What TAID's schedule reads; see `LogitObjective.target_cross_entropy`.
TAID_MONITORS = ("target_entropy",)


class LogitObjective(Objective):
    """Match the teacher's next-token distribution (Hinton et al., 2015, arXiv:1503.02531).

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        divergence: A name of `hf_distill.functional.DIVERGENCES`.
        temperature: Softens both distributions, > 0, or a schedule of it. Divergences that scale as 1/T^2 are
            multiplied by T^2.
        divergence_kwargs: Arguments of the divergence, for example `{"beta": 0.5}` for `jsd`. Those of `taid` are a
            fixed `t`, or any of `t_start`, `t_end`, `alpha` and `momentum`: then t follows the loss, see
            `TAIDInterpolation`.

    Raises:
        ValueError: The divergence is unknown, or an argument is out of its range.

    Example:
        ```python
        trainer = KDTrainer(model, teacher, objectives=[LogitObjective(0.5, divergence="jsd")], ...)
        ```
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({Signal.LOGITS})

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        divergence: str = "forward_kl",
        temperature: float | Schedule = 1.0,
        divergence_kwargs: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(weight)
        self.scheduled["temperature"] = Scheduled(temperature)
        if not min(self.scheduled["temperature"].values()) > 0:
            raise ValueError(f"`temperature` is {temperature}; expected a number > 0, for example `temperature=1.0`.")
        self.divergence = self.name = divergence
        self._settings = dict(divergence_kwargs or {})
        self.interpolation: TAIDInterpolation | None = None
        if divergence == "taid" and "t" not in self._settings:
            chosen = {name: self._settings.pop(name) for name in SETTINGS if name in self._settings}
            self.interpolation = self.scheduled["t"] = TAIDInterpolation(**chosen)
        resolve_divergence(divergence, self.divergence_kwargs)

    @property
    def temperature(self) -> float:
        """The temperature at this step."""
        return self.scheduled["temperature"].value

    @property
    def divergence_kwargs(self) -> dict[str, float]:
        """The arguments of the divergence at this step."""
        return self._settings | ({} if self.interpolation is None else {"t": self.interpolation.value})

    def target_cross_entropy(self, means: Mapping[str, float]) -> float:
        """CE(p_t, q) per token, the loss that TAID's schedule follows, from what `logit_loss` reports of this term."""
        return means[f"{self.divergence}_loss"] / self.temperature**2 + means["target_entropy"]

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        return super().config() | {"divergence": self.divergence, **self._settings}

    def forward(
        self, student: StudentSignals, teacher: TeacherSignals, denominator: Tensor | int | None = None
    ) -> LinearLossOutput:
        """This term alone; see `logit_loss`."""
        return logit_loss([self], 0.0, student, teacher, denominator=denominator)


def logit_loss(
    objectives: Sequence[LogitObjective],
    ce_weight: float,
    student: StudentSignals,
    teacher: TeacherSignals | None,
    *,
    denominator: Tensor | int | None = None,
) -> LinearLossOutput:
    """Compute cross-entropy on the labels and all logit objectives in one pass.

    Where all weights are 0 the loss is a zero that reaches the student's hidden states, and no gradient is computed.

    Args:
        objectives: Terms that share one temperature; none is allowed, then only cross-entropy is computed.
        ce_weight: Factor of the cross-entropy, >= 0.
        student: Hidden states and labels of the labelled positions, `[N, H_s]` and `[N]`.
        teacher: Signals of the same positions, `[N, H_t]` or sparse targets; None when no term and no monitor needs a
            teacher.
        denominator: What the sums are divided by (`num_items_in_batch`); N when None.

    Returns:
        The loss, the sum of each term, and the sums of the monitors that the signals allow.
    """
    check_weight("ce_weight", ce_weight)
    terms: dict[str, tuple[float, Mapping[str, float]]] = {}
    if ce_weight > 0:
        terms["ce"] = (ce_weight, {})
    for objective in objectives:
        terms[objective.divergence] = (objective.weight, objective.divergence_kwargs)
    given, monitors = _teacher_arguments(None if teacher is None else teacher.logits)
    compute = partial(
        linear_distillation_loss,
        student.logits.hidden,
        student.logits.head,
        student.labels,
        **given,
        temperature=objectives[0].temperature if objectives else 1.0,
        denominator=denominator,
        metrics=(*STUDENT_MONITORS, *monitors, *(TAID_MONITORS if "taid" in terms else ())),
    )
    if any(weight for weight, _ in terms.values()):
        return compute(terms=terms)
    with torch.no_grad():
        watched = compute(terms={name: (1.0, kwargs) for name, (_, kwargs) in terms.items()} or {"ce": 1.0})
    parts = {name: watched.parts[name] for name in terms}
    return replace(watched, loss=student.logits.hidden[:0].sum(dtype=torch.float32), parts=parts)


def _teacher_arguments(logits: Projection | SparseLogits | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The arguments of the fused loss that are the teacher's, and the monitors that it allows."""
    if logits is None:
        return {}, ()
    if isinstance(logits, SparseLogits):
        available = logits.available_metrics
        return {"teacher_targets": logits}, tuple(name for name in TEACHER_MONITORS if name in available)
    return {"teacher_hidden": logits.hidden, "teacher_head": logits.head}, TEACHER_MONITORS


def check_logit_objectives(objectives: Sequence[LogitObjective]) -> None:
    """Check that one pass can compute the objectives together.

    Raises:
        ValueError: They differ in temperature, or two have the same divergence.
    """
    temperatures = sorted({objective.scheduled["temperature"].shown for objective in objectives}, key=str)
    if len(temperatures) > 1:
        raise ValueError(
            f"`objectives` holds LogitObjectives of temperatures {temperatures}; they are computed in one pass and "
            "must share one: give all of them the same `temperature`."
        )
    names = [objective.divergence for objective in objectives]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"`objectives` holds {repeated} more than once; use one LogitObjective per divergence and add the weights."
        )
