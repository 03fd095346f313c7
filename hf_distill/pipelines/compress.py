"""`compress`: prune, distil and quantise a model in any order, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_distill.anatomy import task_of
from hf_distill.cards import DistillationCard, draw_plots, installed_versions, write_card
from hf_distill.evaluation import Benchmark
from hf_distill.pipelines.arguments import DISTIL, PRUNE, QUANTIZE, CompressConfig
from hf_distill.pipelines.checks import (
    check_plan,
    check_teacher,
    dataset_digest,
    load_config,
    load_tokenizer,
    model_digest,
    rows_of,
)
from hf_distill.pipelines.measuring import ADAPTED, TEACHER, Made, measure_all
from hf_distill.pipelines.report import WORDS, CompressReport
from hf_distill.pipelines.stage import Stage
from hf_distill.pipelines.steps import ACTIONS, Context, adapt_step, methods_of
from hf_distill.training.card import hyperparameters_of, losses_of
from hf_distill.training.checks import check_config
from hf_distill.training.terms import build_objectives


REPORT = "compress.json"
Action = Callable[[Context, str, Path, Path], dict[str, Any]]


def compress(
    teacher: str | os.PathLike[str],
    dataset: Dataset,
    args: CompressConfig,
    *,
    benchmarks: Sequence[Benchmark] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    card: Mapping[str, Any] | None = None,
) -> CompressReport:
    """Compress a model: prune it, distil it from what it was, and quantise it, in the order that is asked for.

    Each stage reads a model folder and writes one, `output_dir/1-P`, `output_dir/2-KD`..., which `from_pretrained`
    loads. A folder appears when it is whole. Called again, stages that are done are not made again, and training goes
    on from the last checkpoint that `save_steps` asked for.

    What an order means: P cuts by scores that are measured on the training rows. KD trains what the stage before left
    with the uncut, unrounded teacher. Q rounds. Where P or KD come after Q, the model stays quantised: P cuts the
    rounded weights, written out, and rounds what is left again; KD trains with the rounding (`prepare_qat`).

    Args:
        teacher: Name or folder of the model: what is compressed, and the teacher of KD.
        dataset: Training rows with `input_ids` (and `labels`), or with `text`.
        args: The settings; `output_dir` is the folder of the pipeline.
        benchmarks: Measured on the teacher and after every stage; without any, sizes and speeds alone are.
        tokenizer: That of the teacher if None.
        card: What only you know, fields of `hf_distill.cards.DistillationCard`: names, licences, datasets, commands.

    Returns:
        What every stage left; also in `output_dir/compress.json` and on the card in the last stage's folder, with
        plots where matplotlib is installed.

    Raises:
        ValueError: An argument is wrong, the model is quantised or has adapters, its family cannot be pruned, the
            spec cannot be met, or `output_dir` holds stages of other settings; before any weight is loaded.
        ImportError: The package of the quantisation is not installed.

    Example:
        >>> args = CompressConfig("small", order="P-KD-Q", prune={"params_ratio": 0.7}, max_steps=200, bf16=True)
        >>> print(compress("HuggingFaceTB/SmolLM2-135M-Instruct", dataset, args, benchmarks=[Perplexity(held_out)]))
    """
    args = check_config(args, CompressConfig)
    if unknown := sorted((card or {}).keys() - DistillationCard.__dataclass_fields__.keys()):
        raise ValueError(f"`card` has {unknown}; expected some of {sorted(DistillationCard.__dataclass_fields__)}.")
    name = check_teacher(teacher)
    config = load_config(name)
    tokenizer = tokenizer or load_tokenizer(name)
    check_plan(config, args, tokenizer, name)
    rows = rows_of(dataset, config, tokenizer, args.max_length)
    digest = model_digest(name, config)
    stages = _stages(args, digest, dataset_digest(rows))
    for stage, _ in stages:
        stage.check()
    models = {TEACHER: Made(name, digest)}
    context, source = Context(args, rows, tokenizer, name), name
    for stage, action in stages:
        adapts = action is adapt_step
        facts = stage.run(partial(action, context, name if adapts else source))
        models[ADAPTED if adapts else stage.name] = Made(str(stage.folder), stage.key, facts)
        if adapts:
            context = replace(context, teacher=str(stage.folder))
        else:
            source = str(stage.folder)
    measured = measure_all(models, benchmarks, tokenizer, Path(args.output_dir), context.model_kwargs)
    report = CompressReport(args.order, tuple(measured), Path(source).name)
    report.save(Path(args.output_dir) / REPORT)
    known = _card(report, args, name, task_of(config)) | {"plots": draw_plots(report.beside_stages(), source)}
    write_card(DistillationCard(**(known | dict(card or {}))), source)
    return report


def _stages(args: CompressConfig, model: str, data: str) -> list[tuple[Stage, Action]]:
    """The stages with what each is made of."""
    root = Path(args.output_dir)
    training = args.training_settings() | {"data": data, "teacher": model, "model_kwargs": args.model_kwargs}
    stages: list[tuple[Stage, Action]] = []
    if args.adapt_teacher:
        adapting = training | {"steps": args.adapt_teacher, "learning_rate": args.adapt_learning_rate}
        stages.append((Stage("0-teacher", root, model, adapting), adapt_step))
        training = training | {"teacher": stages[0][0].key}
    key = model
    rounding = {"quantization": args.quantization, "group_size": args.group_size}
    cutting = {"prune": args.prune, "importance": methods_of(args), "calibration_tokens": args.calibration_tokens}
    settings = {PRUNE: cutting | {"data": data}, DISTIL: training, QUANTIZE: rounding}
    for number, step in enumerate(args.steps, 1):
        rounds = QUANTIZE in args.steps[:number]
        chosen = settings[step] | (rounding if rounds else {})
        stage = Stage(f"{number}-{step}", root, key, chosen)
        stages.append((stage, ACTIONS[step]))
        key = stage.key
    return stages


def _card(report: CompressReport, args: CompressConfig, teacher: str, task: str) -> dict[str, Any]:
    """What the card of the last model says: what was done, and what was left after every stage."""
    facts: dict[str, Any] = {}
    for row in report.rows[1:]:
        if row.name != ADAPTED:
            facts |= row.facts
    trained = "steps" in facts
    cut = facts.get("prune")
    sizes = "" if cut is None else f"; {cut['parameters_after'] / cut['parameters_before']:.1%} of its parameters"
    return {
        "name": f"{Path(teacher).name}, {report.order}",
        "teacher": teacher,
        "base_model": teacher,
        "student": f"made in the order {report.order}{sizes}",
        "task": task,
        "losses": losses_of(args.ce_weight, build_objectives(args, None)) if trained else (),
        "steps": facts.get("steps"),
        "seed": args.seed if trained else None,
        "hyperparameters": (hyperparameters_of(args) if trained else {}) | _stages_in_words(args, facts),
        "report": report.beside_stages(),
        "baseline": "the models that the stages before left" if len(args.steps) > 1 else None,
        "comparison": report.measured() if report.report else None,
        "measurements": report.cost(),
        "versions": installed_versions(),
    }


def _stages_in_words(args: CompressConfig, facts: Mapping[str, Any]) -> dict[str, str]:
    """What each stage was asked for."""
    said = {"stages": "; ".join(f"{step}: {WORDS[step]}" for step in args.steps)}
    if "prune" in facts:
        spec = args.spec.to_dict()
        given = {name: value for name, value in spec.items() if value is not None and name != "round_to"}
        said["cut to"] = ", ".join(f"{name}={value}" for name, value in given.items())
    if "quantize" in facts:
        said["rounded"] = (
            f"{args.quantization}, {facts['quantize']['bits_per_weight']:.3g} bits per weight in the mean"
        )
    return said
