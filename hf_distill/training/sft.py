"""`KDSFTTrainer`: distillation on TRL's `SFTTrainer`, for chat data, packing and LoRA students."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer import sft_trainer

from hf_distill.objectives import Objective
from hf_distill.teachers import Teacher
from hf_distill.training.arguments import DistillationArguments
from hf_distill.training.checks import check_columns, check_config, check_predictions, check_text
from hf_distill.training.mixin import DistillationMixin


# What SFTTrainer reads while it prepares a dataset; everything else is dropped there.
SFT_COLUMNS = (
    *("input_ids", "labels", "seq_lengths", "completion_mask", "assistant_masks"),
    *("messages", "prompt", "completion", "tools", "chat_template_kwargs"),
)


@dataclass
class KDSFTConfig(DistillationArguments, SFTConfig):
    """`trl.SFTConfig` and the distillation fields.

    `metric_for_best_model="kl"` (the divergence from the teacher at T=1 on the evaluation set) is the metric to select
    checkpoints by, and the default of `load_best_model_at_end`: unlike `eval_loss`, it does not depend on
    temperature and weights.
    """

    def _check_trainer_fields(self) -> None:
        super()._check_trainer_fields()
        if self.loss_type != "nll":
            raise ValueError(
                f"`loss_type` is {self.loss_type!r}, which distillation would ignore: its label term is the plain "
                "cross-entropy; use `loss_type='nll'`."
            )


class KDSFTTrainer(DistillationMixin, SFTTrainer):
    """A `trl.SFTTrainer` that distils: prompt-completion, messages or text; packing, padding-free and LoRA as there.

    Args:
        model: The student: a name, a model or a `PeftModel`.
        teacher_model: A name, a `PreTrainedModel` or a `Teacher`. "base" is a LoRA student's own base model.
        args: A `KDSFTConfig`; its defaults when not given.
        objectives: Replaces the divergence that the config's flags build. `ce_weight` stays.
        **kwargs: Arguments of `trl.SFTTrainer`: datasets, processing_class, peft_config...

    Raises:
        ValueError: An argument is wrong; as much as possible is found before any weight is loaded.

    Example:
        ```python
        trainer = KDSFTTrainer(
            model="Qwen/Qwen3-0.6B",
            teacher_model=load_teacher("Qwen/Qwen3-8B", quantization="nf4"),
            args=KDSFTConfig("qwen3-0.6b-distilled", temperature=1.0),
            train_dataset=chats,
        )
        ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        args: KDSFTConfig | None = None,
        *,
        objectives: Sequence[Objective] | None = None,
        **kwargs: Any,
    ) -> None:
        args = check_config(args, KDSFTConfig)
        with _lm_head_adapters_allowed():
            super().__init__(model, args, teacher_model=teacher_model, objectives=objectives, **kwargs)

    def _check_runtime(self) -> None:
        super()._check_runtime()
        args = self.args
        packed = args.packing if args.eval_packing is None else args.eval_packing
        several = self.accelerator.num_processes > 1
        if packed and args.packing_strategy != "wrapped" and several and self.eval_dataset is not None:
            raise ValueError(
                "`eval_packing` is on and the evaluation runs on several ranks, which repeat rows to fill the last "
                "batch; in a packed batch nothing tells where a row ends, so they would count twice. Set "
                "`eval_packing=False`."
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        check_columns(dataset, (*SFT_COLUMNS, args.dataset_text_field), "given")
        if formatting_func is None:
            check_text(dataset, args.dataset_text_field)
        rows = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        check_predictions(rows, dataset_name)
        return rows


@contextlib.contextmanager
def _lm_head_adapters_allowed() -> Iterator[None]:
    """Lift SFTTrainer's refusal of adapters on the head while it is constructed.

    It refuses because its loss reads `lm_head.weight`; ours runs an adapted head's own forward.
    """
    tuner_layer = sft_trainer.BaseTunerLayer
    sft_trainer.BaseTunerLayer = ()  # isinstance(anything, ()) is False
    try:
        yield
    finally:
        sft_trainer.BaseTunerLayer = tuner_layer
