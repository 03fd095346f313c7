"""Hidden-state distillation without a regressor: the student's width, picked from the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_distill.objectives.hidden import HiddenStateObjective
from hf_distill.objectives.schedules import Schedule


class RegressorFreeObjective(HiddenStateObjective):
    """Match the teacher's residual stream on as many of its channels as the student has. Experimental.

    The cheap relative of a method for CNNs (a submission to ICLR 2026), which prunes the teacher to the student's
    width and trains it again before its features are matched without a regressor; that retraining, which its authors
    call essential, is not done here. Its own numbers show a loss at early layers, so the last ones are the default.

    Args:
        weight: Factor of this term in the loss, >= 0, or a schedule of it.
        channels: As many channels of the teacher as the student is wide, for example
            `hf_distill.students.select_channels(teacher, batches, size)`.
        loss: As in `HiddenStateObjective`.
        layer_mapping: See `layer_pairs`.
        num_pairs: How many pairs a named mapping makes.
        positions: See `FeatureObjective`.
        skip_first: See `HiddenStateObjective`.

    Raises:
        ValueError: An argument is out of its range, or (when the models are known) the channels do not fit them.
    """

    citation: str = ""
    name = "regressor_free"

    def __init__(
        self,
        weight: float | Schedule = 1.0,
        *,
        channels: Sequence[int] | Tensor,
        loss: str = "mse",
        layer_mapping: str | Sequence[Sequence[int]] = "last_k",
        num_pairs: int = 2,
        positions: str = "labelled",
        skip_first: bool = False,
    ) -> None:
        super().__init__(
            weight,
            loss=loss,
            layer_mapping=layer_mapping,
            num_pairs=num_pairs,
            positions=positions,
            skip_first=skip_first,
            channels=channels,
        )
