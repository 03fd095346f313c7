"""Moves what changes in objectives during a run, at the boundaries of optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from hf_distill.objectives import LogitObjective, Objective
from hf_distill.objectives.base import term_names
from hf_distill.objectives.logits import TAID_MONITORS
from hf_distill.training.metrics import MetricWindow


class ScheduleCallback(TrainerCallback):
    """Tells objectives how far the run is, 0 in the first step and 1 in the last, and TAID what its loss was.

    Schedules follow from the step alone; what TAID has learned from its losses is saved by the objective.

    Args:
        objectives: Those of a run.
        accelerator: The trainer's.
        logged: What the trainer logs of its steps; a run begins with nothing in it.
    """

    def __init__(self, objectives: Sequence[Objective], accelerator: Accelerator, logged: MetricWindow) -> None:
        self._objectives = list(objectives)
        self._accelerator = accelerator
        self._logged = logged
        logits = [objective for objective in objectives if isinstance(objective, LogitObjective)]
        self._taid = next((objective for objective in logits if objective.interpolation is not None), None)
        self._window = MetricWindow(["taid_loss", *TAID_MONITORS])

    def observe(self, sums: Mapping[str, Tensor], count: Tensor) -> None:
        """Add up what one micro-batch of training gave, by name as in `MetricWindow.add`."""
        if self._taid is not None:
            self._window.add(sums, count)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget what another run did not log."""
        self._logged.reset()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the values of this step, and forget what a step that failed had seen."""
        self._window.reset()
        progress = min(state.global_step / max(state.max_steps - 1, 1), 1.0)
        for objective in self._objectives:
            objective.move(progress)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Let TAID's t follow the loss of this step, of all micro-batches and ranks."""
        if self._taid is None or self._taid.interpolation is None:
            return
        means = self._window.reduce(self._accelerator)
        if means:  # a step may have no labels
            self._taid.interpolation.observe(self._taid.target_cross_entropy(means), state.max_steps)


def scheduled_values(objectives: Sequence[Objective]) -> dict[str, float]:
    """What changes in a run, by name, as it is now: for example `forward_kl_weight`."""
    return {
        f"{name}_{part}": scheduled.value
        for name, objective in zip(term_names(objectives), objectives, strict=True)
        for part, scheduled in objective.scheduled.items()
        if scheduled.schedule is not None
    }
