"""What every term of a distillation loss has: a weight, the signals it needs, and a line for the card."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from hf_distill.objectives.schedules import Schedule, Scheduled
from hf_distill.signals import POSITIONS, ModelShape, Signal, StudentSignals, TeacherSignals


class Objective(nn.Module):
    """One term of the distillation loss.

    An objective never sees a teacher, only signals; the trainer checks `needs` against what the teacher provides
    before the first step. Parameters of its own (projectors, for example) are trained beside the student.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.

    Attributes:
        name: What the term is called in logs, without "_loss".

    Raises:
        ValueError: The weight is negative or not finite.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset()
    citation: str = ""
    name: str

    def __init__(self, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self.scheduled = {"weight": Scheduled(weight)}
        for value in self.scheduled["weight"].values():
            check_weight("weight", value)

    @property
    def weight(self) -> float:
        """The weight at this step."""
        return self.scheduled["weight"].value

    def is_ever_trained(self) -> bool:
        """False where the weight is 0 from the first step to the last."""
        return max(self.scheduled["weight"].values()) > 0

    def move(self, progress: float) -> None:
        """Take the scheduled values of a progress from 0 to 1; called at the beginning of an optimizer step."""
        for scheduled in self.scheduled.values():
            scheduled.move(progress)

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        return {"objective": type(self).__name__} | {key: value.shown for key, value in self.scheduled.items()}


class FeatureObjective(Objective, ABC):
    """A term that compares what passes inside both models.

    A subclass sets `name` and `needs`, and writes `bind` and `forward`.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        positions: "labelled" compares the positions that the labels train: for a language model those that predict a
            labelled token. "real" compares all real tokens of every sequence that has labels, prompts too; together
            they count as much as its labels. Classifiers have all real tokens in both.

    Attributes:
        student_layers: Layers of the student whose hidden states it reads, known after `bind`.
        teacher_layers: Layers of the teacher.
        student_attention: Layers of the student whose queries, keys and values it reads.
        teacher_attention: Layers of the teacher.
        reads_final_norm: Whether it reads the final norms of both.
    """

    student_layers: frozenset[int] = frozenset()
    teacher_layers: frozenset[int] = frozenset()
    student_attention: frozenset[int] = frozenset()
    teacher_attention: frozenset[int] = frozenset()
    reads_final_norm: bool = False

    def __init__(self, weight: float | Schedule = 1.0, positions: str = "labelled") -> None:
        super().__init__(weight)
        if positions not in POSITIONS:
            raise ValueError(f"`positions` is {positions!r}; expected one of {list(POSITIONS)}.")
        self.positions = positions

    def config(self) -> dict[str, object]:
        """What the model card says of this objective."""
        return super().config() | ({"positions": "all real tokens"} if self.positions == "real" else {})

    @abstractmethod
    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Choose layers and build parameters for two models; called once, before the optimizer is made.

        Raises:
            ValueError: The models do not fit together under this objective; both sides are named.
        """

    @abstractmethod
    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The sum of this term over labels, 0-dim fp32, unweighted: the trainer divides it once for all terms."""


def term_names(objectives: Sequence[Objective]) -> list[str]:
    """What the objectives of a run are called in logs: the second of a kind gets a 2, and so on."""
    seen: Counter[str] = Counter()
    names = []
    for objective in objectives:
        seen[objective.name] += 1
        number = seen[objective.name]
        names.append(objective.name if number == 1 else f"{objective.name}_{number}")
    return names


def check_weight(name: str, weight: float) -> float:
    """Return a loss weight as a float.

    Raises:
        ValueError: It is negative, infinite or NaN.
    """
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"`{name}` is {weight}; expected a finite number >= 0, for example `{name}=0.5`.")
    return float(weight)
