"""`hf-distill evaluate`: how much of its teacher a student keeps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


# By task: what is measured where nothing is asked for.
DEFAULTS = {
    "causal_lm": ("perplexity", "kl", "top1_agreement"),
    "masked_lm": ("perplexity", "kl", "top1_agreement"),
    "sequence_classification": ("accuracy", "kl", "top1_agreement"),
}
METRICS = ("perplexity", "kl", "top1_agreement", "ece", "accuracy", "f1")


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    evaluate = commands.add_parser("evaluate", help="measure how much of its teacher a student keeps, with intervals")
    evaluate.add_argument("--student", required=True, help="Hub name or folder of a model or an adapter")
    evaluate.add_argument("--teacher", required=True, help="Hub name or folder")
    evaluate.add_argument("--baseline", help="another model to report beside them, as the student before distillation")
    evaluate.add_argument(
        "--dataset",
        help="held out texts, chats, token ids or labelled rows: Hub name, folder, json(l) or parquet file",
    )
    evaluate.add_argument("--split", default="test", help="of the dataset (default: test)")
    evaluate.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that the task of the models has")
    evaluate.add_argument("--tasks", nargs="+", default=[], help="names or YAML files of lm-eval's tasks")
    evaluate.add_argument("--max-length", type=int, help="of a row; longer ones are cut")
    evaluate.add_argument("--assistant-only-loss", action="store_true", help="score the answers of chats alone")
    evaluate.add_argument("--dtype", default="auto", help="of the weights (default: as saved)")
    evaluate.add_argument("--quantization", choices=["nf4", "int8"], help="of the teacher")
    evaluate.add_argument("--out", type=Path, help="JSON file for the report")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from hf_distill import evaluate_retention, load_teacher
    from hf_distill.cli.data import check_output, load, scored_rows
    from hf_distill.cli.models import check_same_tokens
    from hf_distill.evaluation import (
        Benchmark,
        ClassificationAccuracy,
        ClassificationF1,
        ExpectedCalibrationError,
        KLDivergence,
        LMEvalTask,
        Perplexity,
        Top1Agreement,
    )

    if options.dataset is None and not options.tasks:
        raise ValueError("Nothing is measured: give a `--dataset`, or `--tasks` of lm-eval.")
    check_output(options.out, "--out")
    tasks = [LMEvalTask(task) for task in options.tasks]
    dataset = options.dataset and load(options.dataset, options.split)
    teacher = load_teacher(options.teacher, quantization=options.quantization, dtype=options.dtype)
    if dataset is not None:
        made = {"max_length": options.max_length, "assistant_only_loss": options.assistant_only_loss}
        dataset = scored_rows(dataset, teacher.tokenizer, **made)
    known: tuple[Any, ...] = (Perplexity, KLDivergence, Top1Agreement, ExpectedCalibrationError)
    known += (ClassificationAccuracy, ClassificationF1)
    kinds = {kind.metric: kind for kind in known}
    names = () if dataset is None else options.metrics or DEFAULTS[teacher.task]
    benchmarks: list[Benchmark] = [kinds[name](dataset, max_length=options.max_length) for name in names]
    benchmarks += tasks
    given = {"--student": options.student} | ({"--baseline": options.baseline} if options.baseline else {})
    models = {flag: load_teacher(name, dtype=options.dtype, task=teacher.task) for flag, name in given.items()}
    for flag, model in models.items():
        check_same_tokens(teacher.tokenizer, model.tokenizer, ("--teacher", flag))
    student, *baseline = (model.model for model in models.values())
    report = evaluate_retention(student, teacher, benchmarks, teacher.tokenizer, *baseline)
    print(report)
    if options.out is not None:
        report.save(options.out)
