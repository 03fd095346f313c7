"""The model card of a trainer: the facts that it knows by itself, beside those that the user adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_distill.anatomy import unwrap
from hf_distill.cards import Dataset, DistillationCard, Loss, installed_versions
from hf_distill.functional import DIVERGENCES
from hf_distill.objectives import LogitObjective, Objective


# What a card says of an objective in columns of their own.
NOT_SETTINGS = ("objective", "weight", "divergence")


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
        trainer: A `KDTrainer` or `KDSFTTrainer`.
        model_name: The model's own name; that of the output folder when not given.
        dataset_name: Hub id or description of the training data.
        tags: Further tags for the Hub.
        finetuned_from: The checkpoint that the student was initialised from, where its config does not say.
        **facts: Fields of `DistillationCard`; they win over what the trainer knows.
    """
    args, base = trainer.args, unwrap(trainer.model)
    teacher = trainer.teacher.config_for_card()
    quantization = teacher.get("quantization")
    known: dict[str, Any] = {
        "name": model_name or Path(args.output_dir).name,
        "teacher": teacher.get("name") or f"a {teacher['architecture']}",
        "teacher_quantization": quantization,
        "task": trainer.task,
        "repo_id": trainer.hub_model_id,
        "base_model": finetuned_from or base.config.name_or_path or None,
        "student": _kept_layers(base.config),
        "adapter": hasattr(trainer.model, "peft_config"),
        "losses": losses_of(args, trainer.objectives),
        "datasets": [Dataset(dataset_name)] if dataset_name else [],
        "steps": trainer.state.global_step or None,
        "seed": args.seed,
        "hyperparameters": hyperparameters_of(args),
        "report": trainer.retention_report,
        "versions": installed_versions(),
        "tags": [tags] if isinstance(tags, str) else list(tags or ()),
    }
    return DistillationCard(**(known | facts))


def losses_of(args: Any, objectives: Sequence[Objective]) -> list[Loss]:
    """The terms of a run's loss, as a card says them."""
    losses = [Loss("cross-entropy", args.ce_weight)] if args.ce_weight > 0 else []
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


def _kept_layers(config: Any) -> str | None:
    """How `shrink` or `prune` made the student, where one did."""
    origin = getattr(config, "hf_distill", None)
    if not origin:
        return None
    said = f"{len(origin['kept_layers'])} of the {origin['teacher_num_hidden_layers']} layers: {origin['kept_layers']}"
    if "kept_channels" in origin:
        said += f"; {len(origin['kept_channels'])} of the {origin['teacher_hidden_size']} channels"
    return said
