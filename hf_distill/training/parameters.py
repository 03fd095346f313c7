"""What objectives learn (projectors, TAID's t): trained and resumed with the student, never part of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_distill.signals import ModelShape
from hf_distill.training.terms import Compared, FeatureTerms


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

FILE = "objective.safetensors"


class ObjectiveParametersMixin(Base):
    """Trains what objectives own beside the student: one more parameter group, and one more file in a checkpoint."""

    _features: FeatureTerms
    _run_features: nn.Module
    _objective_lr_multiplier: float

    def _set_up_features(self, student: ModelShape, teacher: ModelShape) -> None:
        """Build the objectives' parameters for the two models, and place them for the run.

        Raises:
            ValueError: The models do not fit together under an objective, or the run shards its optimizer.
        """
        self._features.bind(student, teacher)
        self._run_features = self._features
        if not self._owned():
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "`objectives` have parameters of their own (a learned layer map, or projectors, because the widths of "
                "student and teacher differ), which FSDP and DeepSpeed do not train beside the student; use DDP, or "
                "a loss without a projector: `hidden_loss='cka'` or `'procrustes'`."
            )
        self._run_features = self.accelerator.prepare_model(self._features)
        self.add_callback(_ZeroGradients(self._features))

    def _drop_features(self) -> None:
        """Undo `_set_up_features`, whole or failed."""
        self.callback_handler.pop_callback(_ZeroGradients)
        for name in ("_features", "_run_features", "_objective_lr_multiplier"):
            self.__dict__.pop(name, None)

    def _owned(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._features.parameters() if parameter.requires_grad]

    def _feature_sums(self, compared: Compared) -> dict[str, Tensor]:
        """The sum over labels of every feature term by name."""
        if not compared:
            return {}
        with self.accelerator.autocast():
            sums = self._run_features(compared)
        return dict(zip(self._features.weights, sums.unbind(), strict=True))

    def create_optimizer(self, model: Any = None) -> Any:
        """Add the objectives' parameters to the student's optimizer, with their own learning rate and no decay."""
        optimizer, owned = super().create_optimizer(model), self._owned()
        if not owned:
            return optimizer  # it may be a placeholder for DeepSpeed's own, which has no groups
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if id(owned[0]) not in known:
            rate = self.args.learning_rate * self._objective_lr_multiplier
            optimizer.add_param_group({"params": owned, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._with_owned(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._with_owned(model), grad_norm=grad_norm)

    def _with_owned(self, model: nn.Module) -> nn.Module:
        """What has the parameters of both, for norms over all that is trained."""
        return nn.ModuleList([model, self._features]) if self._owned() else model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._features.state_dict()
        if state and self.args.should_save:
            unfinished = Path(output_dir) / f".{FILE}.tmp"
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished)
            os.replace(unfinished, unfinished.with_name(FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._features.state_dict():
            file = Path(checkpoint) / FILE
            if not file.exists():
                raise ValueError(
                    f"`resume_from_checkpoint`: {checkpoint} has no {FILE}, so projectors or TAID's t would start "
                    "anew beside a trained student. Resume with the objectives that the checkpoint was written with; "
                    "checkpoints of `save_only_model=True` cannot be resumed."
                )
            self._features.load_state_dict(load_file(file))
        super()._load_optimizer_and_scheduler(checkpoint)


class _ZeroGradients(TrainerCallback):
    """Trainer sets the gradients of the model alone to zero."""

    def __init__(self, features: FeatureTerms) -> None:
        self._features = features

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._features.zero_grad()
