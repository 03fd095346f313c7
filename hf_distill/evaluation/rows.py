"""From a dataset to the token ids and labels that every model is scored on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor

from hf_distill.signals import IGNORE_INDEX, Targets


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CLASSIFICATION = "sequence_classification"
CLASS_COLUMNS = ("labels", "label")
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "labels")
MASK_COLUMNS = ("completion_mask", "assistant_masks")
PACKED_COLUMNS = ("position_ids", "seq_lengths")
# transformers writes a huge integer for a tokenizer that has no limit.
NO_LIMIT = 10**9


class Row(TypedDict, total=False):
    """One item: real tokens only, no padding."""

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int] | int


def check_dataset(dataset: Dataset) -> None:
    """Check what can be checked without a model.

    Raises:
        ValueError: It is not a `datasets.Dataset`, is empty, is packed, or has neither `text` nor `input_ids`.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`dataset` is a {type(dataset).__name__}; expected a datasets.Dataset of one split. "
            "Pick a split, or collect streamed rows with Dataset.from_list(list(stream.take(500)))."
        )
    if len(dataset) == 0:
        raise ValueError("`dataset` has no rows; expected at least one item to measure retention on.")
    found = dataset.column_names
    if not {"text", "input_ids"} & set(found):
        raise ValueError(
            f"`dataset` has the columns {found}; expected `text`, or `input_ids` (with `labels` where not every token "
            'counts). Rename a column with dataset.rename_column("review", "text"), or tokenize first.'
        )
    packed = [name for name in PACKED_COLUMNS if name in found]
    if packed:
        raise ValueError(f"`dataset` is packed (column {packed[0]}); expected one document a row: pass it unpacked.")


def tokenize(
    dataset: Dataset, task: str, tokenizer: PreTrainedTokenizerBase | None = None, max_length: int | None = None
) -> list[Row]:
    """Give the rows of a dataset as token ids and labels.

    Args:
        dataset: Checked by `check_dataset`.
        task: `causal_lm`, `masked_lm` or `sequence_classification`.
        tokenizer: Needed when the dataset has `text` and no `input_ids`.
        max_length: Longer rows are cut. None leaves `input_ids` whole and cuts text at what the tokenizer allows.

    Raises:
        ValueError: The tokenizer or the labels are missing, or lengths disagree.
    """
    columns = dataset.with_format(None)[:]
    if "input_ids" not in columns:
        columns |= _encode(columns["text"], tokenizer, max_length)
    build = _class_row if task == CLASSIFICATION else _token_row
    rows = []
    for index in range(len(dataset)):
        raw = {name: values[index] for name, values in columns.items() if values[index] is not None}
        try:
            rows.append(build(raw, task, max_length))
        except ValueError as error:
            raise ValueError(f"Row {index} of `dataset` (columns {dataset.column_names}): {error}") from None
    return rows


def _encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
) -> dict[str, list[list[int]]]:
    if tokenizer is None:
        raise ValueError(
            "`dataset` holds text and `tokenizer` is None; expected the student's tokenizer: "
            "evaluate_retention(student, teacher, benchmarks, tokenizer=tokenizer)."
        )
    missing = [index for index, text in enumerate(texts) if not isinstance(text, str)]
    if missing:
        raise ValueError(f"Row {missing[0]} of `dataset` has {texts[missing[0]]!r} in `text`; expected a string.")
    # A fast tokenizer remembers the last truncation and would save it: use a copy.
    tokenizer = copy.deepcopy(tokenizer)
    cut = max_length is not None or tokenizer.model_max_length < NO_LIMIT
    encoded = tokenizer(list(texts), truncation=cut, max_length=max_length, padding=False)
    return {name: encoded[name] for name in TOKEN_COLUMNS if name in encoded}


def _token_row(raw: dict[str, Any], task: str, max_length: int | None) -> Row:
    """A row of a language model: `labels` default to the ids, less what a mask column leaves out."""
    if task == "masked_lm" and "labels" not in raw:
        raise ValueError(
            "a masked language model needs `labels`: the original ids at the masked positions, -100 elsewhere."
        )
    _check_ids(raw)
    tokens = {name: raw[name] for name in (*TOKEN_COLUMNS, *MASK_COLUMNS) if name in raw}
    labels = tokens.setdefault("labels", tokens["input_ids"])
    if isinstance(labels, int):
        raise ValueError("`labels` is one class id; a language model needs one label per token, or no `labels`.")
    lengths = {name: len(values) for name, values in tokens.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the per-token columns have unequal lengths: {lengths}.")
    if "labels" not in raw:
        masks = [tokens[name] for name in MASK_COLUMNS if name in tokens]
        tokens["labels"] = [label if all(kept) else IGNORE_INDEX for label, *kept in zip(labels, *masks, strict=True)]
    return _without_padding(tokens, ("input_ids", "token_type_ids", "labels"), max_length)


def _class_row(raw: dict[str, Any], task: str, max_length: int | None) -> Row:
    """A row of a classifier: one class id."""
    names = [name for name in CLASS_COLUMNS if name in raw]
    if not names or not isinstance(raw[names[0]], int):
        raise ValueError(f"a classifier needs one whole-number class id in `label` or `labels` ({task}).")
    _check_ids(raw)
    row = _without_padding(raw, ("input_ids", "token_type_ids"), max_length)
    if not row["input_ids"]:
        raise ValueError("it has no token; drop empty rows first.")
    row["labels"] = int(raw[names[0]])
    return row


def _check_ids(raw: dict[str, Any]) -> None:
    """A column of a dataset is of one type, so the first id speaks for all."""
    ids = raw.get("input_ids")
    if not isinstance(ids, list) or not all(isinstance(number, int) for number in ids[:1]):
        raise ValueError(f"`input_ids` is {ids!r:.60}; expected a list of token ids, such as [1, 2, 3].")


def _without_padding(tokens: dict[str, Any], names: Sequence[str], max_length: int | None) -> Row:
    """Drop the positions that `attention_mask` marks as padding, and cut."""
    kept = tokens.get("attention_mask", [1] * len(tokens["input_ids"]))
    row = {
        name: [value for value, keep in zip(tokens[name], kept, strict=True) if keep][:max_length]
        for name in names
        if name in tokens
    }
    return cast(Row, row)


def count_targets(row: Row, task: str) -> int:
    """How many predictions of a row are scored."""
    return len(Targets.from_labels(torch.tensor([row["labels"]], dtype=torch.int64), shift=task == "causal_lm"))


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Pad rows on the right: `input_ids` with 0 and `attention_mask` [B, S], `labels` [B, S] or [B]."""
    ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    batch = {"input_ids": _pad(ids, 0), "attention_mask": _pad([torch.ones_like(row) for row in ids], 0)}
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = _pad([torch.tensor(row["token_type_ids"]) for row in rows], 0)
    labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows]
    batch["labels"] = torch.stack(labels) if labels[0].ndim == 0 else _pad(labels, IGNORE_INDEX)
    return batch


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
