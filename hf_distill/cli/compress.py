"""`hf-distill compress`: prune, distil and quantise in any order, from flags or a YAML file."""

from __future__ import annotations

import argparse
from typing import Any


USAGE = """\
Prune, distil and quantise a model, stage by stage, from flags, or from a YAML file of them by --config FILE:

  --teacher_model_name_or_path NAME  what is compressed, and the teacher of KD: a plain model
  --dataset_name NAME                Hub name, folder, or json(l) or parquet file of texts, chats or token ids
  --eval_dataset NAME                the same, to measure every stage on
  --output_dir FOLDER                of the stages, the card and the report
  --order P-KD-Q                     P, KD and Q in any order, each at most once
  --prune '{"params_ratio": 0.7}'    what is cut: the fields of PruneSpec
  --steps 0                          cuts of at most a third, with KD between; 1, the default, cuts all at once
  --quantization int8                a method of `quantize`: int8, w8a16, w4a16, nf4, gguf-q8_0...
  --adapt_teacher STEPS              train the teacher on the text first

and every other field of CompressConfig (importance, guided, calibration_tokens, group_size, max_length, model_kwargs)
and of KDConfig (max_steps, learning_rate, kd_weight, ce_weight, save_steps...). Stages that are done are skipped: run
it again after a crash."""


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    compress = commands.add_parser(
        "compress",
        help="prune, distil and quantise in any order, from flags or YAML",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="hf-distill compress [--config FILE] [--FIELD VALUE ...]",
        allow_abbrev=False,
    )
    compress.set_defaults(run=_compress, takes_flags=True)


def _compress(options: argparse.Namespace) -> None:
    from trl import ScriptArguments

    from hf_distill.cli.data import load, scored_rows
    from hf_distill.cli.flags import EvaluationArguments, parse
    from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
    from hf_distill.pipelines import CompressConfig, compress
    from hf_distill.pipelines.checks import load_tokenizer

    script, args, measured_on = parse((ScriptArguments, CompressConfig, EvaluationArguments), options.flags)
    teacher = args.teacher_model_name_or_path
    for name, value in (
        ("--teacher_model_name_or_path", teacher),
        ("--dataset_name", script.dataset_name),
        ("--output_dir", args.output_dir),
    ):
        if value is None:
            raise ValueError(f"`{name}` is missing; see `hf-distill compress --help`.")
    tokenizer = load_tokenizer(teacher)
    rows = {"max_length": args.max_length, "assistant_only_loss": False}
    train = scored_rows(load(script.dataset_name, script.dataset_train_split, "--dataset_name"), tokenizer, **rows)
    benchmarks = []
    if measured_on.eval_dataset is not None:
        held_out = scored_rows(
            load(measured_on.eval_dataset, script.dataset_test_split, "--eval_dataset"), tokenizer, **rows
        )
        measured = (Perplexity, KLDivergence, Top1Agreement)
        benchmarks = [benchmark(held_out, max_length=args.max_length) for benchmark in measured]
    print(compress(teacher, train, args, benchmarks=benchmarks, tokenizer=tokenizer))
