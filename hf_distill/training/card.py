"""The model card of a trainer: the facts that it knows by itself, beside those that the user adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_distill.anatomy import unwrap
from hf_distill.cards import Dataset, DistillationCard, Loss, draw_plots, installed_versions, write_card
from hf_distill.evaluation import RetentionReport
from hf_distill.functional import DIVERGENCES
from hf_distill.objectives import LogitObjective, Objective


if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object

# What a card says of an objective in columns of their own.
NOT_SETTINGS = ("objective", "weight", "divergence")


class CardMixin(Base):
    """Puts the card of a distillation in the place of the trainer's own, and of the draft that PEFT writes."""

    retention_report: RetentionReport | None
    _card_facts: dict[str, Any]

    def _set_up_card(self) -> None:
        """Begin with nothing measured and nothing told."""
        self.retention_report, self._card_facts = None, {}
        self.add_callback(_CardOfPush(self))

    def _drop_card(self) -> None:
        """Undo `_set_up_card`."""
        self.callback_handler.pop_callback(_CardOfPush)
        del self.retention_report, self._card_facts

    def create_model_card(self, **facts: Any) -> None:
        """Write `README.md` into the output folder: what was done and measured, nothing else.

        Plots of the retention are written beside it where matplotlib is installed, and `card.json`, from which
        `hf-distill card --regenerate` renders it again.

        It runs by itself in `push_to_hub`, which passes its keyword arguments on, and before every push of a
        checkpoint. What it was told once it says again: call it before the training with what only you know.

        Args:
            **facts: `model_name`, `dataset_name`, `tags`, `finetuned_from` and every field of
                `hf_distill.cards.DistillationCard`.
        """
        self._card_facts |= facts
        if self.is_world_process_zero():
            plots = draw_plots(self.retention_report, self.args.output_dir)
            write_card(trainer_card(self, **({"plots": plots} | self._card_facts)), self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save, and keep the folder's card: PEFT rewrites its metadata, or writes a draft with its local base."""
        folder = Path(output_dir or self.args.output_dir)
        card = folder / "README.md"
        text = card.read_text(encoding="utf-8") if card.exists() else None
        super()._save(output_dir, state_dict)
        if not self.args.should_save or not hasattr(self.model, "peft_config"):
            return
        if text is None:
            write_card(trainer_card(self, **self._card_facts), folder)
        else:
            card.write_text(text, encoding="utf-8")


class _CardOfPush(TrainerCallback):
    """Brings the card up to date before a checkpoint is pushed, which the trainer does without one."""

    def __init__(self, trainer: CardMixin) -> None:
        self.trainer = trainer

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the card; the push after the training does so by itself."""
        if self.trainer.is_in_train:
            self.trainer.create_model_card()


def trainer_card(
    trainer: Any,
    *,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    **facts: Any,
) -> DistillationCard:
    """Collect what a trainer knows of its run.

    Args:
        trainer: A `KDTrainer` or `KDSFTTrainer`, or a trainer with a `DistillationCallback`.
        model_name: The model's own name; that of the output folder when not given.
        dataset_name: Hub id or description of the training data.
        tags: Further tags for the Hub.
        finetuned_from: The checkpoint that the student was initialised from, where its config does not say.
        **facts: Fields of `DistillationCard`; they win over what the trainer knows.
    """
    args, base = trainer.args, unwrap(trainer.model)
    distillation = getattr(trainer, "_distillation", trainer)
    teacher = distillation.teacher.config_for_card()
    quantization = teacher.get("quantization")
    if distillation is trainer:
        losses = losses_of(args.ce_weight, trainer.objectives)
    else:
        losses = losses_of(1.0, distillation.objectives, f"the loss of {type(trainer).__name__}")
    known: dict[str, Any] = {
        "name": model_name or Path(args.output_dir).name,
        "teacher": teacher.get("name") or f"a {teacher['architecture']}",
        "teacher_quantization": quantization,
        "task": distillation.task,
        "repo_id": trainer.hub_model_id,
        "base_model": finetuned_from or base.config.name_or_path or None,
        "student": _kept_layers(base.config),
        "adapter": hasattr(trainer.model, "peft_config"),
        "losses": losses,
        "datasets": [Dataset(dataset_name)] if dataset_name else [],
        "steps": trainer.state.global_step or None,
        "seed": args.seed,
        "hyperparameters": hyperparameters_of(args) | _duration(trainer),
        "report": trainer.retention_report,
        "versions": installed_versions(),
        "tags": [tags] if isinstance(tags, str) else list(tags or ()),
    }
    return DistillationCard(**(known | facts))


def losses_of(own: float, objectives: Sequence[Objective], name: str = "cross-entropy") -> list[Loss]:
    """The terms of a run's loss, as a card says them.

    Args:
        own: Weight of the trainer's own loss; left out at 0.
        objectives: The terms beside it.
        name: What the trainer's own loss is called.
    """
    losses = [Loss(name, own)] if own > 0 else []
    for objective in objectives:
        facts: dict[str, Any] = objective.config()
        weight, settings = facts["weight"], {key: value for key, value in facts.items() if key not in NOT_SETTINGS}
        if isinstance(objective, LogitObjective):
            losses.append(Loss(objective.divergence, weight, settings, DIVERGENCES[objective.divergence].paper))
        else:
            losses.append(Loss(objective.name, weight, settings, objective.citation or None))
    return losses


def hyperparameters_of(args: Any) -> dict[str, Any]:
    """Settings of a run that a card names."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "as loaded"
    return {
        "learning rate": args.learning_rate,
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "rows per step": rows,
        "precision": precision,
    }


def _duration(trainer: Any) -> dict[str, float]:
    """How long the last call of `train` took, where there was one."""
    seconds = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    return {"training time (minutes)": round(seconds[-1] / 60, 1)} if seconds else {}


def _kept_layers(config: Any) -> str | None:
    """How `shrink` or `prune` made the student, where one did."""
    origin = getattr(config, "hf_distill", None)
    if not origin:
        return None
    said = f"{len(origin['kept_layers'])} of the {origin['teacher_num_hidden_layers']} layers: {origin['kept_layers']}"
    if "kept_channels" in origin:
        said += f"; {len(origin['kept_channels'])} of the {origin['teacher_hidden_size']} channels"
    return said
