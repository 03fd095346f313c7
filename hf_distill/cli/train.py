"""`hf-distill train`: a distillation by TRL's SFT trainer, from flags or a YAML file."""

from __future__ import annotations

import argparse
from typing import Any


USAGE = """\
A distillation by `KDSFTTrainer`, from flags, or from a YAML file of them by --config FILE:

  --model_name_or_path NAME          the student
  --teacher_model_name_or_path NAME  the teacher, or --teacher_cache FOLDER
  --dataset_name NAME                Hub name, folder, or json(l) or parquet file of texts or chats
  --eval_dataset NAME                the same, to measure retention on
  --output_dir FOLDER                of the student, its card and its report

and every field of KDSFTConfig (learning_rate, kd_weight, temperature, divergence, push_to_hub, ...), of TRL's
ScriptArguments and of its ModelConfig (use_peft, lora_r, dtype, ...). On several GPUs:
`accelerate launch -m hf_distill.cli.main train ...`."""


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    train = commands.add_parser(
        "train",
        help="distil with TRL's SFT trainer, from flags or YAML",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="hf-distill train [--config FILE] [--FIELD VALUE ...]",
        allow_abbrev=False,
    )
    train.set_defaults(run=_train, takes_flags=True)


def _train(options: argparse.Namespace) -> None:
    from trl import ModelConfig, ScriptArguments

    from hf_distill import KDSFTConfig
    from hf_distill.cli.flags import EvaluationArguments, parse

    # First alone: what is missing is to be said before what this machine cannot do.
    script, model, _ = parse((ScriptArguments, ModelConfig), options.flags, some=True)
    for name, value in (("--model_name_or_path", model.model_name_or_path), ("--dataset_name", script.dataset_name)):
        if value is None:
            raise ValueError(f"`{name}` is missing; see `hf-distill train --help`.")
    classes = (ScriptArguments, KDSFTConfig, ModelConfig, EvaluationArguments)
    script, args, model, measured_on = parse(classes, options.flags)
    if args.output_dir is None:
        raise ValueError("`--output_dir` is missing; see `hf-distill train --help`.")
    _distil(script, args, model, measured_on.eval_dataset)


def _distil(script: Any, args: Any, model: Any, eval_dataset: str | None) -> None:
    """Train, measure on the evaluation data if there is any, save, and push if asked to."""
    from trl import get_peft_config, get_quantization_config

    from hf_distill import KDSFTTrainer
    from hf_distill.cli.data import load
    from hf_distill.cli.models import config_of
    from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement

    source = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
    config_of(model.model_name_or_path, "--model_name_or_path", **source)
    options = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    args.model_init_kwargs = options | (args.model_init_kwargs or {})
    trainer = KDSFTTrainer(
        model.model_name_or_path,
        args=args,
        train_dataset=load(script.dataset_name, script.dataset_train_split, "--dataset_name"),
        eval_dataset=eval_dataset and load(eval_dataset, script.dataset_test_split, "--eval_dataset"),
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    held_out = trainer.eval_dataset
    if held_out is not None:
        report = trainer.evaluate_retention(
            [benchmark(held_out) for benchmark in (Perplexity, KLDivergence, Top1Agreement)]
        )
        trainer.accelerator.print(report)
        if trainer.is_world_process_zero():
            report.save(f"{args.output_dir}/retention.json")
    trainer.save_model()
    trainer.create_model_card(dataset_name=script.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
