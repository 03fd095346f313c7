"""Datasets by what their name is."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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


def scored_rows(dataset: Any, tokenizer: Any, *, rows: int, max_length: int | None, assistant_only_loss: bool) -> Any:
    """The first rows of a dataset as models are scored on them: chats as trainers make them, others as they are.

    Args:
        dataset: Of `input_ids`, texts or chats.
        tokenizer: Of the student; it may be None where there is no chat.
        rows: How many.
        max_length: Longer rows are cut.
        assistant_only_loss: Score the answers of chats alone.

    Raises:
        ValueError: The dataset holds chats and there is no tokenizer, or something of chats is asked of one without.
    """
    from hf_distill.cli.prepare import prepare

    if rows < 1:
        raise ValueError(f"`--rows` is {rows}; expected at least 1.")
    dataset = dataset.select(range(min(rows, len(dataset))))
    columns = set(dataset.column_names)
    if {"input_ids", "text", "label", "labels"} & columns:
        if assistant_only_loss:
            raise ValueError(
                f"`--assistant-only-loss` is of chats, and the dataset has {sorted(columns)}; leave it out."
            )
        return dataset
    if tokenizer is None:
        raise ValueError(f"The dataset has {sorted(columns)}, and the model was saved without a tokenizer.")
    return prepare(dataset, tokenizer, max_length=max_length, assistant_only_loss=assistant_only_loss)
