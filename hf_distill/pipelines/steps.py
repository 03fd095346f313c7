"""What each step of a compression does with a model folder.

Once a model is quantised it stays so: a later step writes its rounded weights out as plain ones, works on these, and
rounds again. Training then computes with rounded weights (quantisation-aware distillation, arXiv:2601.20088).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from hf_distill.cards.folder import STATE
from hf_distill.evaluation.rows import collate
from hf_distill.pipelines.arguments import TRAINABLE, CompressConfig
from hf_distill.pipelines.plan import methods_of
from hf_distill.students import (
    ImportanceScores,
    PruneReport,
    convert_qat,
    estimate_importance,
    load_quantized,
    prepare_qat,
    prune,
    quantize,
)
from hf_distill.students.dequantize import dequantize
from hf_distill.students.quantize_report import FILE as QUANTIZED
from hf_distill.students.quantizers.base import load_plain
from hf_distill.teachers import ModelTeacher, Teacher, load_teacher
from hf_distill.training.trainer import KDTrainer


@dataclass(frozen=True)
class Context:
    """What a step knows of its pipeline.

    Args:
        args: The settings of the step.
        rows: Training rows: `input_ids` and `labels`.
        tokenizer: Saved beside every model.
        teacher: Name or folder of the model that teaches.
        cut: All that was cut before.
    """

    args: CompressConfig
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase | None
    teacher: str
    cut: PruneReport | None = None

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        return dict(self.args.model_kwargs or {})  # type: ignore[arg-type] # text was read by the config

    def load_teacher(self) -> ModelTeacher:
        """The model that teaches."""
        args = self.args
        return load_teacher(self.teacher, args.teacher_quantization, args.teacher_dtype, **self.model_kwargs)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Write a plain model and the tokenizer."""
        model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def load_stage(folder: str | Path, **model_kwargs: Any) -> PreTrainedModel:
    """The model of a stage, quantised or not, in eval mode."""
    path = Path(folder)
    if (path / QUANTIZED).is_file():
        return load_quantized(path, **model_kwargs)
    return load_plain(path, **model_kwargs)


def prune_step(context: Context, source: str, written: Path, run: Path) -> dict[str, Any]:
    """Cut the model, by scores that are measured on the training rows.

    The report, and what the student says of where its layers and channels come from, are counted in the first model,
    which is the one that teaches.
    """
    args = context.args
    quantized = (Path(source) / QUANTIZED).is_file()
    model = dequantize(source) if quantized else load_plain(Path(source), **context.model_kwargs)
    student, report = prune(model, args.spec, _scores(context, model, run / "scores"))
    if context.cut is not None:
        report = report.after(context.cut)
        student.config.hf_distill = report.origin
    if quantized:
        context.save(student, run / "plain")
        quantize(run / "plain", written, args.quantization, group_size=args.group_size)
    else:
        context.save(student, written)
    return {"prune": report.to_dict()}


def _scores(context: Context, model: PreTrainedModel, kept: Path) -> ImportanceScores | None:
    """How much each unit matters; measured once, also where the process is killed before the model is written."""
    args, methods = context.args, methods_of(context.args, model)
    if not methods:  # layers that are given by number need no score
        return None
    if kept.is_dir():
        return ImportanceScores.load(kept)
    batches = DataLoader(context.rows, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    teacher = context.load_teacher().model if args.guided else None
    limit = args.calibration_tokens
    scores = estimate_importance(model, batches, methods=methods, teacher=teacher, max_tokens=limit)
    scores.save(kept)
    return scores


def distil_step(context: Context, source: str, written: Path, run: Path) -> dict[str, Any]:
    """Train the model with the teacher; with its rounding, where it is quantised."""
    quantized = (Path(source) / QUANTIZED).is_file()
    if not quantized:
        student = load_plain(Path(source), **context.model_kwargs)
        dtype = student.dtype
        student, facts = _train(context, student.float(), context.load_teacher(), context.args, run)
        context.save(student.to(dtype), written)
        return facts
    bits, format = TRAINABLE[context.args.quantization]
    student = dequantize(source)
    dtype = student.dtype
    assert context.args.group_size is not None  # the config sees to it
    student = prepare_qat(student.float(), bits=bits, group_size=context.args.group_size)
    student, facts = _train(context, student, context.load_teacher(), context.args, run)
    convert_qat(student.to(dtype), written, format, tokenizer=context.tokenizer)
    return facts


def quantize_step(context: Context, source: str, written: Path, run: Path) -> dict[str, Any]:
    """Round the model."""
    report = quantize(source, written, context.args.quantization, group_size=context.args.group_size)
    return {"quantize": report.to_dict()}


def adapt_step(context: Context, source: str, written: Path, run: Path) -> dict[str, Any]:
    """Train the teacher on the text by cross-entropy alone: Minitron's teacher correction (arXiv:2408.11796)."""
    args = copy.copy(context.args)
    args.max_steps, args.learning_rate = args.adapt_teacher, args.adapt_learning_rate
    args.ce_weight, args.kd_weight = 1.0, 0.0
    args.hidden_weight = args.attention_weight = args.relation_weight = 0.0
    model = load_plain(Path(source), **context.model_kwargs)
    dtype = model.dtype
    # A trainer has a teacher; without a term that asks it, it is never run.
    adapted, facts = _train(context, model.float(), context.load_teacher(), args, run)
    context.save(adapted.to(dtype), written)
    return facts


def _train(
    context: Context, student: PreTrainedModel, teacher: Teacher, args: CompressConfig, run: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Train, from the last whole checkpoint of a run that was killed."""
    args = copy.copy(args)
    args.output_dir = str(run)
    # The teacher is loaded here.
    args.teacher_model_name_or_path = args.teacher_quantization = None
    trainer = KDTrainer(
        student,
        teacher,
        args,
        train_dataset=context.rows,
        data_collator=collate,
        processing_class=context.tokenizer,
    )
    checkpoint, state = _last_checkpoint(run)
    if state is not None and state.global_step >= state.max_steps:
        # Resumed, the trainer would make one more step before it looks at their number.
        trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
    trainer.model.eval()
    facts: dict[str, Any] = {
        "steps": state.global_step,
        "logs": [entry for entry in state.log_history if "loss" in entry],
    }
    return trainer.model, facts


def _last_checkpoint(run: Path) -> tuple[str | None, TrainerState | None]:
    """The last one that was written to its end, and the state of the trainer in it.

    The state is written last, and in place: a process that is killed then leaves half of the file.
    """
    found = sorted(run.glob(f"checkpoint-*/{STATE}"), key=lambda path: int(path.parent.name.split("-")[1]))
    for path in reversed(found):
        try:
            return str(path.parent), TrainerState.load_from_json(str(path))
        except ValueError:
            continue
    return None, None


ACTIONS = {"P": prune_step, "KD": distil_step, "Q": quantize_step}
