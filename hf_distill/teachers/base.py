"""What every teacher is to the trainer: something that turns a batch into `TeacherSignals`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.anatomy import task_of, unwrap
from hf_distill.objectives import Objective
from hf_distill.signals import NO_LAYERS, Layers, ModelShape, Signal, TeacherSignals
from hf_distill.teachers.vocabulary import check_vocabularies


class Teacher(ABC):
    """Gives the signals that objectives ask for. It is not a module: nothing of it enters the student's checkpoint.

    A subclass sets the attributes and writes `_signals`.

    Attributes:
        provides: The signals that it can give.
        name: What it is called in messages and on the card: a Hub name or a folder; None when it has none.
        tokenizer: The tokenizer that it was trained with; None when it is not known.
        vocab_size: Columns of its logits, or rows of its embedding for a classifier; None when it is not known.
        task: "causal_lm", "masked_lm" or "sequence_classification".
        labels: Names of a classifier's classes, in order; None for language models.
        reads_token_types: Whether it tells the sentences of a pair apart by `token_type_ids`; the trainer then keeps
            that column for it, also where the student does not take it.
    """

    provides: frozenset[Signal]
    name: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    vocab_size: int | None = None
    task: str
    labels: tuple[str, ...] | None = None
    reads_token_types: bool = False

    def signals(
        self, batch: Mapping[str, Any], needs: Collection[Signal], layers: Layers = NO_LAYERS
    ) -> TeacherSignals:
        """Compute the signals that are needed for one batch, without gradient.

        Args:
            batch: What the student's forward is given, `input_ids` `[B, S]` and so on; it is not changed.
            needs: The signals that are asked for.
            layers: Which layers are asked for, with `Signal.HIDDEN_STATES` or `Signal.ATTENTION`.

        Returns:
            The signals, on the device of the batch; those that were not asked for are None.

        Raises:
            ValueError: Something is needed that this teacher does not provide, or it cannot read the batch.
        """
        missing = frozenset(needs) - self.provides
        if missing:
            raise ValueError(
                f"`needs` asks for {_names(needs)}, but {type(self).__name__} provides only {_names(self.provides)}; "
                f"{self.remedy(missing)}."
            )
        asked = Layers(
            hidden=layers.hidden if Signal.HIDDEN_STATES in needs else frozenset(),
            attention=layers.attention if Signal.ATTENTION in needs else frozenset(),
            final_norm=layers.final_norm and Signal.HIDDEN_STATES in needs,
        )
        return self._signals(batch, frozenset(needs), asked)

    def shape(self) -> ModelShape:
        """Depth and width, for objectives that compare layers.

        Raises:
            ValueError: It has no layers, or they cannot be told.
        """
        raise ValueError(f"`teacher_model`: a {type(self).__name__} has no layers to compare; use a ModelTeacher.")

    @contextmanager
    def as_model(self) -> Iterator[nn.Module]:
        """The model that gives its signals, for what only a model can do: generate, be timed.

        Raises:
            ValueError: It has none here.
        """
        raise ValueError(
            f"A {type(self).__name__} has no model that could generate or be timed; pass the model that it was made "
            "from: `evaluate_retention(student, load_teacher(name), ...)`."
        )
        yield

    def remedy(self, missing: Collection[Signal]) -> str:
        """What to do about signals that it does not provide; the end of a message."""
        return f"use a teacher that provides {_names(missing)}, for example `ModelTeacher(model)`"

    def check_objectives(self, objectives: Iterable[Objective]) -> None:
        """Check, before the first step, that all objectives of a run can be computed from this teacher.

        Raises:
            ValueError: One needs something that the teacher does not provide; both sides are named.
        """
        for objective in objectives:
            missing = objective.needs - self.provides
            if missing:
                raise ValueError(
                    f"`objectives`: {type(objective).__name__} needs {_names(objective.needs)}, but "
                    f"{type(self).__name__} provides only {_names(self.provides)}; {self.remedy(missing)}, or remove "
                    "the objective."
                )

    def check_layers(self, layers: Layers) -> None:  # noqa: B027 # models give all of their layers
        """Check, before the first step, that it can give the layers that the objectives have chosen.

        Raises:
            ValueError: It cannot look into one of them.
        """

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> None:
        """Check that an id means the same token to the student and to this teacher; see `check_vocabularies`.

        Args:
            tokenizer: The student's; None when it is not known.
            vocab_size: Columns of the student's logits.

        Raises:
            ValueError: The tokenizers disagree.
        """
        if self.vocab_size is not None:
            check_vocabularies(tokenizer, self.tokenizer, vocab_size, self.vocab_size)

    def prepare(self, accelerator: Accelerator) -> None:  # noqa: B027 # many teachers have nothing to place
        """Place or shard the teacher for a run; called once, before the first `signals`."""

    @abstractmethod
    def config_for_card(self) -> dict[str, Any]:
        """What the model card says of this teacher: plain values, no local paths."""

    @abstractmethod
    def _signals(self, batch: Mapping[str, Any], needs: frozenset[Signal], layers: Layers) -> TeacherSignals:
        """Compute signals that are known to be provided."""


def check_same_task(student: PreTrainedModel, teacher: Teacher) -> None:
    """Check that both models do the same task and, if they classify, that they have the same classes.

    Args:
        student: The student; wrapped (DDP, FSDP, PEFT) or not.
        teacher: Any teacher.

    Raises:
        ValueError: The tasks differ, or the classes do in number or order, or there is only one (regression).
    """
    task = task_of(student)
    if task != teacher.task:
        raise ValueError(
            f"The student is a {task} model and the teacher ({teacher.name}) a {teacher.task} model; they must do the "
            f"same task. Load the teacher with `load_teacher(name, task={task!r})` if it was trained for it."
        )
    if teacher.labels is None:
        return
    labels = class_names(unwrap(student))
    if len(labels) != len(teacher.labels):
        raise ValueError(
            f"The student has {len(labels)} classes and the teacher {len(teacher.labels)}; load the student with "
            f"`num_labels={len(teacher.labels)}`."
        )
    if len(labels) < 2:
        raise ValueError("A classifier with one class (regression) has no distribution to distil; use 2 or more.")
    if _are_named(labels) and _are_named(teacher.labels) and _folded(labels) != _folded(teacher.labels):
        raise ValueError(
            f"The student's classes are {list(labels)} and the teacher's {list(teacher.labels)}; a class must have "
            "the same index in both: load the student with the teacher's `id2label` and `label2id`."
        )


def class_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of a classifier's classes, by index."""
    id2label = model.config.id2label
    return tuple(str(id2label[i]) for i in range(len(id2label)))


def _are_named(labels: tuple[str, ...]) -> bool:
    """False for the names that transformers gives to classes that have none."""
    return labels != tuple(f"LABEL_{i}" for i in range(len(labels)))


def _folded(labels: tuple[str, ...]) -> list[str]:
    return [label.casefold() for label in labels]


def _names(signals: Collection[Signal]) -> list[str]:
    return sorted(signal.value for signal in signals)
