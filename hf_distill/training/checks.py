"""What is refused before any weight is loaded, or before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from datasets import Dataset
from pyarrow import compute, types
from torch import nn
from transformers import PreTrainedModel

from hf_distill.anatomy import virtual_tokens
from hf_distill.teachers import CachedTeacher, Teacher


C = TypeVar("C")

# Dropping these changes no loss: they are recomputed, constant for one sequence, or read by the sampler.
HARMLESS_COLUMNS = frozenset({"attention_mask", "length", "special_tokens_mask", "token_type_ids"})
CHATS = ("messages", "conversations")


def check_config(args: Any, expected: type[C]) -> C:
    """Return the config, or the defaults where there is none.

    Raises:
        ValueError: It is another kind of config, whose distillation fields would be missing.
    """
    if args is None:
        return expected()
    if not isinstance(args, expected):
        raise ValueError(
            f"`args` is a {type(args).__name__}; expected a {expected.__name__}, which takes the same fields and the "
            f"distillation's: `args={expected.__name__}(output_dir=..., kd_weight=0.5)`."
        )
    return args


def check_teacher_argument(teacher_model: Any, args: Any) -> str | PreTrainedModel | Teacher:
    """Return what the teacher is to be made of: the argument or one of the config's fields.

    Raises:
        ValueError: None or several are given, a loaded teacher is asked to be quantised, or `teacher_cache` is no
            whole cache.
    """
    fields = ("teacher_model_name_or_path", "teacher_cache")
    named = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    given = ["`teacher_model` was passed"] * (teacher_model is not None)
    given += [f"`{name}` is {value!r}" for name, value in named.items()]
    if not given:
        raise ValueError(
            "`teacher_model` is missing; pass `teacher_model=load_teacher(name)` to the trainer, or set "
            "`teacher_model_name_or_path=name` or `teacher_cache=folder` in its config."
        )
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}; give the teacher once.")
    if args.teacher_cache is not None:
        teacher_model = CachedTeacher(args.teacher_cache)
    teacher = check_teacher_type(args.teacher_model_name_or_path if teacher_model is None else teacher_model)
    if args.teacher_quantization is not None and not (isinstance(teacher, str) and teacher != "base"):
        raise ValueError(
            f"`teacher_quantization` is {args.teacher_quantization!r}, but the teacher is loaded already; quantise it "
            f"there: `load_teacher(name, quantization={args.teacher_quantization!r})`."
        )
    return teacher


def check_teacher_type(teacher: Any) -> str | PreTrainedModel | Teacher:
    """Return a teacher that was given.

    Raises:
        ValueError: A teacher cannot be made of it.
    """
    if not isinstance(teacher, str | PreTrainedModel | Teacher):
        raise ValueError(
            f"`teacher_model` is a {type(teacher).__name__}; expected a name, a PreTrainedModel or a Teacher, e.g. "
            "`teacher_model=load_teacher(name)`."
        )
    return teacher


def check_parallelism(trainer: Any) -> None:
    """Refuse the ways of running in which one process does not see whole rows of one model.

    Raises:
        ValueError: The run uses nn.DataParallel, or splits sequences over ranks.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "Several GPUs are visible to one process, which Trainer answers with nn.DataParallel; start the "
            "script with `accelerate launch` instead, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("Context and sequence parallelism split the labels; use DDP, FSDP2 or ZeRO instead.")


def check_positions(model: nn.Module) -> None:
    """Refuse a student whose outputs do not stand at the positions of its labels.

    Raises:
        ValueError: Its adapter puts virtual tokens before the text.
    """
    kind = virtual_tokens(model)
    if kind is not None:
        raise ValueError(
            f"The student has a {kind} adapter, whose virtual tokens have no counterpart in the teacher; use "
            "`LoraConfig`, or `PrefixTuningConfig`, which adds none to the text."
        )


def check_columns(dataset: Any, kept: Sequence[str], what: str) -> None:
    """Refuse a dataset whose numbers the collator would drop without a word.

    Text and integer ids may stay beside the inputs; per-token lists and floating numbers are masks, weights or teacher
    outputs, and a loss computed without them is another loss.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`; anything else is not checked.
        kept: The columns that reach the model.
        what: "training" or "evaluation", for the message.

    Raises:
        ValueError: A column would be dropped; it is named with both ways out.
    """
    features = getattr(dataset, "features", None)
    if not features:
        return
    dropped = [name for name in features if name not in kept and name not in HARMLESS_COLUMNS]
    dropped = [name for name in dropped if _holds_training_signal(features[name])]
    if dropped:
        raise ValueError(
            f"The {what} dataset has columns {dropped} that the model does not take, so the collator would drop them "
            f"in silence; remove them with `dataset.remove_columns({dropped})`, or keep them with "
            "`remove_unused_columns=False` and your own `data_collator`."
        )


def check_text(dataset: Any, field: str) -> None:
    """Refuse a dataset that TRL cannot turn into token ids; its own preparation ends in a KeyError.

    Args:
        dataset: A `datasets.Dataset` or `IterableDataset`; anything else is not checked.
        field: The column of text where there is one.

    Raises:
        ValueError: It has no column of TRL's formats, or a row without text or chat.
    """
    features = getattr(dataset, "features", None)
    if not features or "input_ids" in features:
        return
    found = [name for name in ("messages", "conversations", "prompt", "completion", field) if name in features]
    if not found or ("prompt" in found) != ("completion" in found):
        raise ValueError(
            f"The dataset has the columns {list(features)}; expected `input_ids`, or one of TRL's formats: `{field}`, "
            f'`messages`, or `prompt` and `completion`. Rename a column: `dataset.rename_column("review", "{field}")`.'
        )
    for name in found if isinstance(dataset, Dataset) else ():
        _check_column(dataset, name, chat=name in CHATS)


def _check_column(dataset: Dataset, name: str, *, chat: bool) -> None:
    """Refuse a column that is no text, no chat, or empty in a row."""
    column = dataset.data.column(name)
    is_list = types.is_list(column.type) or types.is_large_list(column.type)
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    if not is_list and (chat or not is_text):
        expected = 'messages, `[{"role": "user", "content": "..."}]`' if chat else "strings"
        raise ValueError(f"The dataset's column `{name}` is of {column.type}; expected {expected}.")
    shortest = compute.min(compute.list_value_length(column)).as_py() if is_list else None
    if column.null_count or shortest == 0:
        # It may be of a row that was selected away.
        empty = [index for index, value in enumerate(dataset[name]) if value is None or (is_list and not value)]
        if empty:
            raise ValueError(
                f"Row {empty[0]} of the dataset has {dataset[name][empty[0]]} in `{name}`; drop such rows: "
                f"`dataset.filter(lambda row: row[{name!r}])`."
            )


def check_predictions(rows: Any, what: str) -> None:
    """Refuse prepared rows in which nothing is predicted: their loss is zero, and nobody would notice.

    Args:
        rows: A `datasets.Dataset` of token ids; anything else is not checked.
        what: The name of the dataset, for the message.

    Raises:
        ValueError: No row is left, or none has two tokens.
    """
    if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names:
        return
    longest = compute.max(compute.list_value_length(rows.data.column("input_ids"))).as_py()
    if len(rows) == 0 or (longest or 0) < 2:
        raise ValueError(
            f"The {what} dataset has no row with a token to predict: its texts are empty, or every label is masked. "
            "Look at its first row, and at `max_length` and `assistant_only_loss`, which may leave no answer."
        )


def _holds_training_signal(feature: Any) -> bool:
    """True for floating numbers and for lists of numbers of any depth."""
    nested = False
    while isinstance(feature, list) or hasattr(feature, "feature"):
        feature = feature[0] if isinstance(feature, list) else feature.feature
        nested = True
    dtype = str(getattr(feature, "dtype", ""))
    return dtype.startswith(("float", "double")) or (nested and dtype.startswith(("int", "uint", "bool")))
