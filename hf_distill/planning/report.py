"""The plan and its table."""

from __future__ import annotations

from dataclasses import dataclass

from hf_distill.planning.gap import count_text
from hf_distill.planning.memory import GIB, Layout
from hf_distill.planning.parameters import ParameterCount


@dataclass(frozen=True)
class Plan:
    """The needs of a run; `print(plan)` shows them as a table.

    Args:
        teacher: Sizes of the teacher.
        student: Sizes of the student.
        trained: Parameters that get gradients.
        sequence_length: Tokens of one sequence.
        layout: World size and sharding.
        flops: FLOPs per token by part.
        memory: Bytes per rank by part, at the peak.
        peak: The stage of a step in which the peak is.
        full_logits: Bytes that a loss on the logits of all positions would take instead of its chunks; 0 for
            classifiers, which have no such logits.
        notes: Advice, one sentence each.
    """

    teacher: ParameterCount
    student: ParameterCount
    trained: int
    sequence_length: int
    layout: Layout
    flops: dict[str, float]
    memory: dict[str, float]
    peak: str
    full_logits: float
    notes: tuple[str, ...]

    @property
    def flops_per_token(self) -> float:
        """FLOPs of one training token, teacher and student together."""
        return sum(self.flops.values())

    @property
    def bytes_per_rank(self) -> float:
        """Bytes on one rank at the peak, all parts together."""
        return sum(self.memory.values())

    @property
    def ratio(self) -> float:
        """Parameters of the teacher over those of the student."""
        return self.teacher.total / self.student.total

    def __str__(self) -> str:
        notes = [f"\nNote: {note}" for note in self.notes]
        return "\n".join([*self._size_rows(), "", *self._flop_rows(), "", *self._memory_rows(), *notes])

    def _size_rows(self) -> list[str]:
        rows = [f"{'Parameters':<44}{'total':>12}{'no embedding':>14}{'trained':>12}"]
        for name, size, trained in (("teacher", self.teacher, 0), ("student", self.student, self.trained)):
            rows.append(
                f"{name:<44}{count_text(size.total):>12}{count_text(size.non_embedding):>14}{count_text(trained):>12}"
            )
        inner = self.teacher.non_embedding / self.student.non_embedding
        return [*rows, f"{'ratio':<44}{f'{self.ratio:.2f} : 1':>12}{f'{inner:.2f} : 1':>14}"]

    def _flop_rows(self) -> list[str]:
        rows = [f"{'Compute':<44}{'GFLOP/token':>12}{'TFLOP/seq':>14}"]
        for name, flops in [*self.flops.items(), ("total", self.flops_per_token)]:
            rows.append(f"{name:<44}{flops / 1e9:>12.2f}{flops * self.sequence_length / 1e12:>14.2f}")
        return rows

    def _memory_rows(self) -> list[str]:
        ranks = "1 rank" if self.layout.world_size == 1 else f"{self.layout.world_size} ranks, {self.layout.sharding}"
        rows = [f"{f'Memory per rank ({ranks})':<44}{'GiB':>12}"]
        for name, size in [*self.memory.items(), (f"total, in the {self.peak}", self.bytes_per_rank)]:
            rows.append(f"{name:<44}{size / GIB:>12.2f}")
        if self.full_logits:
            rows.append(f"{'(a loss on whole logits, instead of chunks)':<44}{self.full_logits / GIB:>12.2f}")
        return rows
