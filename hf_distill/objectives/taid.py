"""TAID's schedule: how far the target has moved from the student to the teacher, led by the loss itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_distill.objectives.schedules import Scheduled, linear


SETTINGS = ("t_start", "t_end", "alpha", "momentum")
# The authors' step size, and the length of run from which on it is the default here.
ALPHA, ALPHA_STEPS = 5e-4, 20_000


class TAIDInterpolation(nn.Module, Scheduled):
    """The t of `taid`: 0 is the student's own distribution, 1 the teacher's.

    After each optimizer step t grows by `alpha * sigmoid(m) * (1 - t)`, where m is the moving average of the relative
    decrease of the loss CE(p_t, q). It is never below the straight line from `t_start` to `t_end` over the run, and
    never falls.
    Source: Shing et al., TAID, arXiv 2501.16937, and the authors' code.

    Args:
        t_start: t in the first step, in [0, 1].
        t_end: The most it becomes, in [t_start, 1].
        alpha: Size of a step, >= 0. None takes 5e-4, as the authors, and in runs of fewer than 20,000 steps as much
            more as the run is shorter, up to 1: with 5e-4 the line is faster in all runs of up to 4,000 steps, and
            the loss changes nothing.
        momentum: Of the moving average, in [0, 1).

    Attributes:
        value: t at this step.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self, t_start: float = 0.4, t_end: float = 1.0, alpha: float | None = None, momentum: float = 0.99
    ) -> None:
        nn.Module.__init__(self)
        if not 0 <= t_start <= t_end <= 1:
            raise ValueError(f"`t_start` is {t_start} and `t_end` {t_end}; expected 0 <= t_start <= t_end <= 1.")
        if not (alpha is None or 0 <= alpha < math.inf):
            raise ValueError(f"`alpha` is {alpha}; expected a number >= 0, or leave it out.")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` is {momentum}; expected a number in [0, 1), for example 0.99.")
        Scheduled.__init__(self, linear(t_start, t_end))
        self.t_end = t_end
        self.alpha = alpha
        self.momentum = momentum
        self._next = t_start
        self._average = 0.0
        self._loss: float | None = None

    @property
    def shown(self) -> str:
        """What a card says."""
        alpha = "" if self.alpha is None else f", alpha={self.alpha:g}"
        return f"adaptive, not below {self.schedule}{alpha}"

    def move(self, progress: float) -> None:
        """Begin a step at a progress from 0 to 1; at 0 everything starts anew."""
        assert self.schedule is not None
        line = self.schedule(progress)
        if progress == 0:
            self._next, self._average, self._loss = line, 0.0, None
        self.value = min(self.t_end, max(self._next, line))

    def observe(self, loss: float, steps: int) -> None:
        """End a step; the value changes when the next one begins.

        Args:
            loss: CE(p_t, q) per token of this step, over all micro-batches and ranks; one that is not finite is
                passed over.
            steps: Of the whole run.
        """
        if not math.isfinite(loss):
            return
        previous, self._loss, self._next = self._loss, loss, self.value
        if previous is None:
            return
        decrease = (previous - loss) / (previous + 1e-15)
        self._average = self.momentum * self._average + (1 - self.momentum) * decrease
        alpha = min(ALPHA * max(1.0, ALPHA_STEPS / steps), 1.0) if self.alpha is None else self.alpha
        share = (1 + math.tanh(self._average / 2)) / 2  # the sigmoid, which would overflow after a leap of the loss
        self._next += alpha * share * (1 - self.value)

    def get_extra_state(self) -> Tensor:
        """What a checkpoint keeps: the next t, the moving average, and the last loss."""
        loss = math.nan if self._loss is None else self._loss
        return torch.tensor([self._next, self._average, loss], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where a checkpoint was."""
        self._next, self._average, loss = state.tolist()
        self._loss = None if math.isnan(loss) else loss
