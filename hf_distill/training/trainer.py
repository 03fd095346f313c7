"""`KDTrainer`: distillation on `transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel, Trainer, set_seed

from hf_distill.anatomy import task_of
from hf_distill.objectives import Objective
from hf_distill.teachers import Teacher
from hf_distill.training.arguments import KDConfig
from hf_distill.training.checks import check_config
from hf_distill.training.mixin import DistillationMixin


if TYPE_CHECKING:
    from peft import PeftConfig


AUTO_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}


class KDTrainer(DistillationMixin, Trainer):
    """A `transformers.Trainer` that distils: causal and masked language models, and sequence classifiers.

    Args:
        model: The student: a model, or a name, which is loaded in fp32 (train in bf16 with `bf16=True`).
        teacher_model: A name, a `PreTrainedModel` or a `Teacher`. "base" is a LoRA student's own base model.
        args: A `KDConfig`; its defaults when not given.
        objectives: Replaces the divergence that the config's flags build. `ce_weight` stays.
        peft_config: Wraps the student with an adapter; then only the adapter is trained, saved and pushed.
        **kwargs: Arguments of `transformers.Trainer`: datasets, collator, processing_class, callbacks...

    Raises:
        ValueError: An argument is wrong; as much as possible is found before any weight is loaded.

    Example:
        ```python
        trainer = KDTrainer(
            model="distilbert/distilbert-base-uncased",
            teacher_model="textattack/bert-base-uncased-SST-2",
            args=KDConfig("student", temperature=2.0),
            train_dataset=tokenized,
            processing_class=tokenizer,
        )
        ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | Teacher | None = None,
        args: KDConfig | None = None,
        *,
        objectives: Sequence[Objective] | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self._peft_config = peft_config
        super().__init__(
            model, check_config(args, KDConfig), teacher_model=teacher_model, objectives=objectives, **kwargs
        )

    def _prepare_student(self, model: str | PreTrainedModel | nn.Module, args: KDConfig) -> nn.Module:
        """Load a named student, and add the adapter."""
        # The adapter is random: every rank, and every run with one seed, begins with the same one.
        set_seed(args.seed)
        if isinstance(model, str):
            task = task_of(AutoConfig.from_pretrained(model))
            model = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(model, dtype=torch.float32)
        if self._peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, self._peft_config)
        return model
