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
        ValueError: There is no such dataset, it has no such split or no rows, or it is a file of another kind.
    """
    path = Path(name)
    if path.is_dir():
        dataset = _from_folder(path, split, flag)
    elif path.is_file():
        dataset = _from_file(path, flag)
    else:
        dataset = _from_hub(path, name, split, flag)
    if len(dataset) == 0:
        raise ValueError(f"`{flag}` is {name}, which has no rows; give one with at least one.")
    return dataset


def _from_folder(path: Path, split: str, flag: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"`{flag}` is {path}, a folder that holds no dataset; expected one that `Dataset.save_to_disk` wrote, or "
            f"a file: `{flag} {path}/rows.jsonl`."
        ) from None
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"`{flag}` is {path} and has the splits {sorted(dataset)}, not {split!r}.")
    return dataset[split]


def _from_file(path: Path, flag: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if path.suffix not in FILES:
        raise ValueError(f"`{flag}` is {path}; expected a file of {sorted(FILES)}, a folder or a Hub name.")
    try:
        return load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    except StopIteration:  # of datasets, for a file with nothing in it
        raise ValueError(f"`{flag}` is {path}, which has no rows; give one with at least one.") from None
    except (DatasetGenerationError, ValueError) as error:
        kind = FILES[path.suffix]
        example = "" if kind == "parquet" else ': one row a line, `{"text": "..."}`'
        raise ValueError(
            f"`{flag}` is {path}, which cannot be read as {kind} ({error.__cause__ or error}); expected rows with the "
            f"same columns{example}."
        ) from error


def _from_hub(path: Path, name: str, split: str, flag: str) -> Any:
    from datasets import load_dataset

    if path.suffix in FILES or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"`{flag}` is {name}, and there is no such file or folder; give its path, or a Hub name.")
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # no such dataset, configuration or split; no network
        raise ValueError(
            f"`{flag}` is {name}, whose split {split!r} cannot be read from the Hub ({error}); expected the name of a "
            f"dataset there, a folder that `Dataset.save_to_disk` wrote, or a file of {sorted(FILES)}."
        ) from error


def check_output(path: Path | None, flag: str) -> None:
    """Check where a report is to be written, before hours are spent on it.

    Raises:
        ValueError: It is a folder.
    """
    if path is not None and path.is_dir():
        raise ValueError(f"`{flag}` is {path}, which is a folder; expected a file: `{flag} {path}/report.json`.")


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
    _check_answers(dataset, assistant_only_loss)
    return dataset.select(range(min(rows, len(dataset))))


def scored_rows(dataset: Any, tokenizer: Any, *, max_length: int | None, assistant_only_loss: bool) -> Any:
    """A dataset as models are scored on it: chats as the trainer makes them, texts and ids as they are.

    Args:
        dataset: Of `first_rows`.
        tokenizer: Of the student; None where there is none.
        max_length: Longer rows are cut.
        assistant_only_loss: Score the answers of chats alone.

    Raises:
        ValueError: The dataset holds chats, and there is no tokenizer; or answers are asked of one without chats.
    """
    from hf_distill.cli.prepare import prepare

    _check_answers(dataset, assistant_only_loss)
    if not _are_chats(dataset):
        return dataset
    if tokenizer is None:
        raise ValueError(f"The dataset has {sorted(dataset.column_names)}, and the model no tokenizer to write them.")
    return prepare(dataset, tokenizer, max_length=max_length, assistant_only_loss=assistant_only_loss)


def _check_answers(dataset: Any, assistant_only_loss: bool) -> None:
    if assistant_only_loss and not _are_chats(dataset):
        found = sorted(dataset.column_names)
        raise ValueError(f"`--assistant-only-loss` is of chats, and the dataset has {found}; leave it out.")


def _are_chats(dataset: Any) -> bool:
    return bool(CHATS & set(dataset.column_names)) and "input_ids" not in dataset.column_names
