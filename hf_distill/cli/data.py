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
