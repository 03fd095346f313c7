"""`compress`: prune, distil and quantise a model in any order, stage by stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_distill.anatomy import task_of
from hf_distill.cards import DistillationCard, draw_plots, installed_versions, write_card
from hf_distill.evaluation import Benchmark
from hf_distill.pipelines.arguments import DISTIL, PRUNE, QUANTIZE, CompressConfig, importance_of
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
from hf_distill.pipelines.plan import Step
from hf_distill.pipelines.report import WORDS, CompressReport
from hf_distill.pipelines.stage import Stage
from hf_distill.pipelines.steps import ACTIONS, Context, adapt_step
from hf_distill.students import PruneReport
from hf_distill.training.card import hyperparameters_of, losses_of
from hf_distill.training.checks import check_config
from hf_distill.training.terms import build_objectives


REPORT = "compress.json"
Action = Callable[[Context, str, Path, Path], dict[str, Any]]


class Task(NamedTuple):
    """A stage, what makes it, and the settings for that."""

    stage: Stage
    action: Action
    args: CompressConfig


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
    on from the last checkpoint that `save_steps` asked for. With `args.steps` P is several cuts, each a stage with a
    KD behind it.

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
    steps = check_plan(config, args, tokenizer, name)
    rows = rows_of(dataset, config, tokenizer, args.max_length)
    digest = model_digest(name, config)
    tasks = _tasks(args, steps, digest, dataset_digest(rows))
    for task in tasks:
        task.stage.check()
    models = {TEACHER: Made(name, digest)}
    context, source = Context(args, rows, tokenizer, name), name
    for stage, action, settings in tasks:
        adapts = action is adapt_step
        facts = stage.run(partial(action, replace(context, args=settings), name if adapts else source))
        models[ADAPTED if adapts else stage.name] = Made(str(stage.folder), stage.key, facts)
        if adapts:
            context = replace(context, teacher=str(stage.folder))
            continue
        source = str(stage.folder)
        if "prune" in facts:
            context = replace(context, cut=PruneReport.from_dict(facts["prune"]))
    measured = measure_all(models, benchmarks, tokenizer, Path(args.output_dir), context.model_kwargs)
    report = CompressReport("-".join(step.kind for step in steps), tuple(measured), Path(source).name)
    report.save(Path(args.output_dir) / REPORT)
    known = _card(report, args, name, task_of(config)) | {"plots": draw_plots(report.beside_stages(), source)}
    write_card(DistillationCard(**(known | dict(card or {}))), source)
    return report


def _tasks(args: CompressConfig, steps: Sequence[Step], model: str, data: str) -> list[Task]:
    """The stages with what each is made of."""
    root = Path(args.output_dir)
    fixed = {"data": data, "teacher": model, "model_kwargs": args.model_kwargs}
    tasks: list[Task] = []
    if args.adapt_teacher:
        changed = {"steps": args.adapt_teacher, "learning_rate": args.adapt_learning_rate}
        adapting = Stage("0-teacher", root, model, args.training_settings() | fixed | changed)
        tasks.append(Task(adapting, adapt_step, args))
        fixed["teacher"] = adapting.key
    key, kinds = model, [step.kind for step in steps]
    for number, step in enumerate(steps, 1):
        rounds = QUANTIZE in kinds[:number]
        stage = Stage(f"{number}-{step.kind}", root, key, _settings(step, fixed, rounds=rounds))
        tasks.append(Task(stage, ACTIONS[step.kind], step.args))
        key = stage.key
    return tasks


def _settings(step: Step, fixed: Mapping[str, Any], *, rounds: bool) -> dict[str, Any]:
    """All that the result of a step depends on beside the model that it reads."""
    args = step.args
    found: dict[str, Any] = {}
    if step.kind == PRUNE:
        found = {name: getattr(args, name) for name in ("prune", "calibration_tokens")}
        found |= {"importance": importance_of(args), "data": fixed["data"]}
        if args.guided:
            found |= {"guided by": fixed["teacher"]}
    if step.kind == DISTIL:
        found = args.training_settings() | dict(fixed)
    return found | ({"quantization": args.quantization, "group_size": args.group_size} if rounds else {})


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
        "steps": sum(row.facts.get("steps", 0) for row in report.rows if row.name != ADAPTED) or None,
        "seed": args.seed if trained else None,
        "hyperparameters": (hyperparameters_of(args) if trained else {}) | _stages_in_words(args, report, facts),
        "report": report.beside_stages(),
        "baseline": "the models that the stages before left" if "-" in report.order else None,
        "comparison": report.measured() if report.report else None,
        "measurements": report.cost(),
        "versions": installed_versions(),
    }


def _stages_in_words(args: CompressConfig, report: CompressReport, facts: Mapping[str, Any]) -> dict[str, str]:
    """What each stage was asked for."""
    said = {"stages": "; ".join(f"{kind}: {WORDS[kind]}" for kind in report.order.split("-"))}
    if "prune" in facts:
        spec = args.spec.to_dict()
        given = {name: value for name, value in spec.items() if value is not None and name != "round_to"}
        said["cut to"] = ", ".join(f"{name}={value}" for name, value in given.items())
    if "quantize" in facts:
        said["rounded"] = (
            f"{args.quantization}, {facts['quantize']['bits_per_weight']:.3g} bits per weight in the mean"
        )
    return said
