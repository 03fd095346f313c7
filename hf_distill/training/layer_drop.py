"""`LayerDropCallback`: a student that learns to do without some of its layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback

from hf_distill.anatomy import describe
from hf_distill.objectives.schedules import Schedule, Scheduled
from hf_distill.taps.skipping import SkippableLayers


class LayerDropCallback(TrainerCallback):
    """Leaves layers of the student out while it trains, each with a probability (Fan et al., arXiv 1909.11556).

    A student that was trained so loses less when it is cut in depth afterwards. The draw is made once for each
    optimizer step and follows from the seed and the number of the step alone: all micro-batches and ranks leave out
    the same layers, a resumed run draws what the whole one would have, and the generators of the run are not touched.
    Nothing is computed for a layer that is left out, and its weights rest in that step. Evaluation and the teacher
    have all layers. An objective that reads the attention of a layer needs that layer to run, and fails where it is
    left out; hidden states are what entered it.

    Args:
        probability: Of each layer, in [0, 1), or a schedule of it, for example `warmup(0.2, 0.1)`.
        seed: Of the draws.

    Attributes:
        dropped: The layers, counted from 0, that are left out in this step.

    Raises:
        ValueError: The probability is out of its range. When training begins: the run shards the student, or its DDP
            waits for the gradient of every weight.

    Example:
        ```python
        trainer.add_callback(LayerDropCallback(0.2))
        trainer.train()
        student, report = prune(trainer.model, PruneSpec(num_hidden_layers=12), scores)
        ```
    """

    def __init__(self, probability: float | Schedule, *, seed: int = 0) -> None:
        self._probability = Scheduled(probability)
        if not all(0 <= value < 1 for value in self._probability.values()):
            raise ValueError(f"`probability` is {probability}; expected numbers in [0, 1), for example 0.2.")
        self._seed = seed
        self._layers: Sequence[nn.Module] = ()
        self._skippable: SkippableLayers | None = None
        self.dropped: frozenset[int] = frozenset()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Make the layers skippable."""
        _check_run(args)
        self._remove()  # of a run that failed
        self._layers = list(describe(model).layers)
        self._skippable = SkippableLayers(self._layers, self._is_skipped)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the layers that this step does without."""
        self._probability.move(min(state.global_step / max(state.max_steps - 1, 1), 1.0))
        draws = random.Random(f"{self._seed} {state.global_step}")
        chosen = [draws.random() < self._probability.value for _ in self._layers]
        self.dropped = frozenset(index for index, is_dropped in enumerate(chosen) if is_dropped)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the layers their own forward back."""
        self._remove()

    def _is_skipped(self, index: int) -> bool:
        return index in self.dropped and self._layers[index].training

    def _remove(self) -> None:
        if self._skippable is not None:
            self._skippable.remove()
        self._skippable, self._layers, self.dropped = None, (), frozenset()


def _check_run(args: Any) -> None:
    if AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "LayerDropCallback leaves weights without gradient, which FSDP and DeepSpeed shard and gather in a fixed "
            "order; use DDP, or remove the callback."
        )
    checkpoints = getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False)
    finds = args.ddp_find_unused_parameters
    if args.world_size > 1 and not (not checkpoints if finds is None else finds):
        raise ValueError(
            "LayerDropCallback leaves weights without gradient, and DDP would wait for them; set "
            "`ddp_find_unused_parameters=True`."
        )
