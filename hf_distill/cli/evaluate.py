"""`hf-distill evaluate`: how much of its teacher a student keeps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


METRICS = ("perplexity", "kl", "top1_agreement", "accuracy")


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    evaluate = commands.add_parser("evaluate", help="measure how much of its teacher a student keeps, with intervals")
    evaluate.add_argument("--student", required=True, help="Hub name or folder of a model or an adapter")
    evaluate.add_argument("--teacher", required=True, help="Hub name or folder")
    evaluate.add_argument("--baseline", help="another model to report beside them, as the student before distillation")
    evaluate.add_argument("--dataset", required=True, help="held out: Hub name, folder, or json(l) or parquet file")
    evaluate.add_argument("--split", default="test", help="of the dataset (default: test)")
    evaluate.add_argument("--metrics", nargs="+", choices=METRICS, help="default: all that the task of the models has")
    evaluate.add_argument("--max-length", type=int, help="of a row; longer ones are cut")
    evaluate.add_argument("--dtype", default="auto", help="of the weights (default: as saved)")
    evaluate.add_argument("--quantization", choices=["nf4", "int8"], help="of the teacher")
    evaluate.add_argument("--out", type=Path, help="JSON file for the report")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from hf_distill import evaluate_retention, load_teacher
    from hf_distill.cli.data import load
    from hf_distill.evaluation import ClassificationAccuracy, KLDivergence, Perplexity, Top1Agreement

    dataset = load(options.dataset, options.split)
    teacher = load_teacher(options.teacher, quantization=options.quantization, dtype=options.dtype)
    classifies = teacher.task == "sequence_classification"
    kinds = dict(zip(METRICS, (Perplexity, KLDivergence, Top1Agreement, ClassificationAccuracy), strict=True))
    chosen = options.metrics or (["accuracy", "kl", "top1_agreement"] if classifies else METRICS[:3])
    benchmarks = [kinds[name](dataset, max_length=options.max_length) for name in chosen]
    student, baseline = (
        None if name is None else load_teacher(name, dtype=options.dtype, task=teacher.task).model
        for name in (options.student, options.baseline)
    )
    report = evaluate_retention(student, teacher, benchmarks, teacher.tokenizer, baseline)
    print(report)
    if options.out is not None:
        report.save(options.out)
