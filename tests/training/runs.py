"""Short SGD runs of both trainers, shared by the tests and by the script that tests start on two ranks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from hf_distill.objectives.taid import TAIDInterpolation
from tests import tiny


LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# Plain SGD: AdamW does not see a loss that is wrong by a constant factor.
COMMON = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


# Hidden states are compared too, through projectors: the teacher of such a run is wider than the student.
HIDDEN = {"hidden_weight": 0.3, "hidden_loss": "mse", "objective_lr_multiplier": 0.5}
# Large enough that the loss of a few steps shows in t.
TAID = {"divergence": "taid", "divergence_kwargs": {"alpha": 1.5, "momentum": 0.0}, "ce_weight": 0.0, "max_steps": 4}


def make_models(tied: bool = False, wide_teacher: bool = False) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student and the teacher of a run; `tied` makes one weight of head and embedding."""
    config = {"tie_word_embeddings": tied}
    wide = {"hidden_size": 48} if wide_teacher else {}
    return tiny.model("llama", layers=1, seed=0, **config), tiny.model("llama", layers=2, seed=1, **config, **wide)


def make_trainer(kind: str, output_dir: Path, *, lora: bool = False, rows: int = 16, models=None, **config):
    """Build a tiny `KDTrainer` ("kd") or `KDSFTTrainer` ("sft"); `config` overrides its fields."""
    if kind.endswith("callback"):
        return with_callback(kind, output_dir, lora=lora, rows=rows, models=models, **config)
    student, teacher = models or make_models(wide_teacher="hidden_weight" in config)
    peft_config = LoraConfig(**LORA) if lora else None
    settings = COMMON | {"output_dir": str(output_dir)} | config
    tokenizer = tiny.tokenizer()
    if kind == "kd":
        from hf_distill import KDConfig, KDTrainer

        return KDTrainer(
            student,
            teacher,
            KDConfig(**settings),
            train_dataset=tiny.tokenized_dataset(rows),
            eval_dataset=tiny.tokenized_dataset(5, seed=1),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    from hf_distill import KDSFTConfig, KDSFTTrainer

    return KDSFTTrainer(
        student,
        teacher,
        KDSFTConfig(**({"bf16": False, "gradient_checkpointing": False} | settings)),
        train_dataset=tiny.prompt_completion_dataset(rows),
        eval_dataset=tiny.prompt_completion_dataset(5),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def with_callback(kind: str, output_dir: Path, *, lora: bool, rows: int, models=None, objectives=None, **config):
    """Build TRL's own trainer ("sft-callback", "dpo-callback") with a `DistillationCallback`."""
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from hf_distill import DistillationCallback, HiddenStateObjective, LogitObjective

    student, teacher = models or make_models(wide_teacher="hidden_weight" in config)
    if objectives is None:
        objectives = [LogitObjective(0.5)]
        if "hidden_weight" in config:
            hidden = {"loss": config["hidden_loss"], "positions": config.get("positions", "labelled")}
            objectives.append(HiddenStateObjective(config["hidden_weight"], **hidden))
    config = {name: value for name, value in config.items() if name not in (*HIDDEN, "positions")}
    settings = {"output_dir": str(output_dir), "bf16": False, "gradient_checkpointing": False} | COMMON | config
    common = {"processing_class": tiny.tokenizer(), "peft_config": LoraConfig(**LORA) if lora else None}
    if kind == "sft-callback":
        trainer = SFTTrainer(
            student, args=SFTConfig(**settings), train_dataset=tiny.prompt_completion_dataset(rows), **common
        )
    else:
        reference = None if lora else tiny.model("llama", layers=1, seed=0)
        args, data = DPOConfig(**settings), tiny.preference_dataset(rows)
        trainer = DPOTrainer(student, ref_model=reference, args=args, train_dataset=data, **common)
    rate = HIDDEN["objective_lr_multiplier"]
    trainer.add_callback(DistillationCallback(trainer, teacher, objectives, objective_lr_multiplier=rate))
    return trainer


def trained(trainer) -> dict[str, torch.Tensor]:
    """The trained weights by name, those of objectives included."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    features = getattr(trainer, "_features", torch.nn.Module())  # a trainer without a teacher has none
    owned = {f"objective.{name}": value for name, value in features.named_parameters()}
    weights = {name: value for name, value in (dict(model.named_parameters()) | owned).items() if value.requires_grad}
    whole = {name: getattr(value, "full_tensor", lambda value=value: value)() for name, value in weights.items()}
    return {name: value.detach().clone() for name, value in whole.items()}


def taid_states(trainer) -> list[list[float]]:
    """What this rank knows of TAID's t, for each objective that has one."""
    modules = trainer._features.modules()
    return [module.get_extra_state().tolist() for module in modules if isinstance(module, TAIDInterpolation)]


def logged(trainer, key: str) -> list[float]:
    """One value of each logging step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def leave() -> None:
    """End a rank when all are done, without exit handlers: threads of open connections make them abort at times."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Train and evaluate every kind on the ranks that the launcher started; rank 0 saves what came out."""
    folder, settings, kinds = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    for name, kind in kinds.items():
        trainer = make_trainer(output_dir=folder / "run", **(settings | kind))
        trainer.train()
        metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
        weights = trained(trainer)  # every rank holds a part of sharded ones
        states = gather_object([taid_states(trainer)])
        if trainer.is_world_process_zero():
            report = {
                "history": trainer.state.log_history,
                "eval": metrics,
                "taid_states": states,
                "world": trainer.accelerator.num_processes,
                "kind": str(trainer.accelerator.distributed_type.value),
            }
            torch.save({"weights": weights, "report": report}, folder / f"{name}.pt")
    leave()


if __name__ == "__main__":
    main()
