"""Datasets by what their name is."""

from __future__ import annotations

from pathlib import Path
from typing import Any


# Columns of TRL's formats that are no plain text.
CHATS = frozenset({"messages", "conversations", "prompt"})
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def load(name: str, split: str, flag: str = "--dataset") -> Any:
    """A split of a dataset: of a saved folder, of the Hub, or all of a file.

    Args:
        name: Folder, file or Hub name.
        split: Its name.
        flag: What the message calls the name.

    Raises:
        ValueError: It is a file of another kind, or has no such split.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    if path.is_dir():
        dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict) and split not in dataset:
            raise ValueError(f"`{flag}` is {name} and has the splits {sorted(dataset)}, not {split!r}.")
        return dataset[split] if isinstance(dataset, DatasetDict) else dataset
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"`{flag}` is {name}; expected a file of {sorted(FILES)}, a folder or a Hub name.")
        return load_dataset(FILES[path.suffix], data_files=name, split="train")
    return load_dataset(name, split=split)


def first_rows(dataset: Any, rows: int, assistant_only_loss: bool) -> Any:
    """The first rows of a dataset, after the check of all that can be checked without a tokenizer.

    Args:
        dataset: Of `input_ids`, texts or chats.
        rows: How many.
        assistant_only_loss: Whether answers of chats alone are to be scored.

    Raises:
        ValueError: It has no column that can be scored, or something of chats is asked of one without.
    """
    from hf_distill.evaluation.rows import check_dataset

    if rows < 1:
        raise ValueError(f"`--rows` is {rows}; expected at least 1.")
    if not _are_chats(dataset):
        check_dataset(dataset)
        if assistant_only_loss:
            found = sorted(dataset.column_names)
            raise ValueError(f"`--assistant-only-loss` is of chats, and the dataset has {found}; leave it out.")
    return dataset.select(range(min(rows, len(dataset))))


def scored_rows(dataset: Any, tokenizer: Any, *, max_length: int | None, assistant_only_loss: bool) -> Any:
    """A dataset as models are scored on it: chats as the trainer makes them, texts and ids as they are.

    Args:
        dataset: Of `first_rows`.
        tokenizer: Of the student; None where there is none.
        max_length: Longer rows are cut.
        assistant_only_loss: Score the answers of chats alone.

    Raises:
        ValueError: The dataset holds chats, and there is no tokenizer.
    """
    from hf_distill.cli.prepare import prepare

    if not _are_chats(dataset):
        return dataset
    if tokenizer is None:
        raise ValueError(f"The dataset has {sorted(dataset.column_names)}, and the model no tokenizer to write them.")
    return prepare(dataset, tokenizer, max_length=max_length, assistant_only_loss=assistant_only_loss)


def _are_chats(dataset: Any) -> bool:
    return bool(CHATS & set(dataset.column_names)) and "input_ids" not in dataset.column_names
