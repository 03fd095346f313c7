"""Moves the schedules of objectives at the beginning of every optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerState

from hf_distill.objectives import Objective


class ScheduleCallback(TrainerCallback):
    """Tells objectives how far the run is: 0 in the first step, 1 in the last.

    The progress follows from the step alone, so a resumed run goes on where it was.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self._objectives = list(objectives)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the values of this step."""
        progress = min(state.global_step / max(state.max_steps - 1, 1), 1.0)
        for objective in self._objectives:
            objective.move(progress)


def scheduled_values(objectives: Sequence[Objective]) -> dict[str, float]:
    """What changes in a run, by name, as it is now: for example `forward_kl_weight`."""
    return {
        f"{objective.name}_{name}": scheduled.value
        for objective in objectives
        for name, scheduled in objective.scheduled.items()
        if scheduled.schedule is not None
    }
