"""The rows of files that DistillKit wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset

from hf_distill.cache.distillkit import LegacyFormat, PolynomialFormat, format_of
from hf_distill.cache.rows import Row
from hf_distill.cache.top_tokens import TopTokens


CONFIG_FILE = "compression_config.yaml"


class DistillKitFiles(Sequence[Any]):
    """The rows of a folder that DistillKit wrote, as a dataset, and their distributions.

    Distribution i of a row is that of token i + 1. DistillKit appends a pad token to a text, so that its last token
    has one, too; nobody trains on that token, and it would hide the row from who looks for the text: it is dropped.
    Documents of a packed row, which its `attention_mask` numbers, become rows of their own.

    Args:
        path: The folder of its parquet files.
        config: Its compression config, or a YAML file of it; the `compression_config.yaml` in the folder if None.
        pad_token_id: The token to drop from the end of rows; None for none.

    Raises:
        ValueError: There are no files, no config, or one that does not fit the files.
    """

    def __init__(
        self, path: str | Path, config: str | Path | Mapping[str, Any] | None = None, pad_token_id: int | None = None
    ) -> None:
        folder = Path(path)
        files = sorted(str(file) for file in folder.rglob("*.parquet"))
        if not files:
            raise ValueError(f"There are no parquet files in {str(path)!r}; expected a folder that DistillKit wrote.")
        self.format: PolynomialFormat | LegacyFormat = format_of(_read_config(folder, config))
        self._data = Dataset.from_parquet(files).with_format("arrow")
        if missing := sorted({"input_ids", *self.format.widths} - set(self._data.column_names)):
            raise ValueError(
                f"The files in {str(path)!r} have the columns {sorted(self._data.column_names)} and lack {missing}, "
                f"which a {type(self.format).__name__} has; is it another compression config?"
            )
        # Of each row its example, and where it begins and ends there.
        self._places = [
            (example, start, stop)
            for example in range(len(self._data))
            for start, stop in self._documents(example, pad_token_id)
        ]
        self._numbers = {self.row(number).key: number for number in range(len(self))}

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        return {"input_ids": self.row(number).ids}

    def row(self, number: int) -> Row:
        """A row by its number; all of its positions are kept."""
        example, start, stop = self._places[number]
        ids = _items(self._data[example : example + 1].column("input_ids"))[start:stop].to_numpy()
        return Row(ids.astype(np.int32), np.ones(len(ids) - 1, dtype=bool))

    def top_tokens(self, row: Row) -> TopTokens:
        """The distributions of a row; the log-probabilities of labels beyond the ids are nan."""
        example, start, stop = self._places[self._numbers[row.key]]
        table = self._data[example : example + 1]
        arrays = {name: _matrix(table.column(name))[start : stop - 1] for name in self.format.widths}
        ids, log_probs = self.format.decode(arrays)
        labels: np.ndarray = row.ids[1:].astype(np.int64)
        is_label = (ids == labels[:, None]) & (log_probs > -np.inf)
        found = np.where(is_label, log_probs, 0).sum(1)
        return TopTokens(ids, log_probs, labels, np.where(is_label.any(1), found, np.nan))

    def _documents(self, example: int, pad_token_id: int | None) -> Iterator[tuple[int, int]]:
        """Where each document of an example begins and ends; those of one token have no label."""
        table = self._data[example : example + 1]
        ids = _items(table.column("input_ids"))
        count = len(_items(table.column(next(iter(self.format.widths)))))
        if count not in {len(ids) - 1, len(ids)}:
            raise ValueError(
                f"Row {example} has {len(ids)} tokens and {count} distributions; expected as many, or one less."
            )
        bounds, numbers = [0, len(ids)], None
        if "attention_mask" in table.column_names:
            numbers = _items(table.column("attention_mask")).to_numpy()
            bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
        for start, stop in pairwise(bounds):
            # With a distribution for its last token the row was packed, which cuts the pad token off.
            stop -= count < len(ids) and ids[stop - 1].as_py() == pad_token_id
            if stop - start > 1 and (numbers is None or numbers[start]):
                yield start, stop


def _read_config(folder: Path, config: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    file = folder / CONFIG_FILE if config is None else Path(config)
    if not file.is_file():
        raise ValueError(
            f"There is no {str(file)!r}; give `config`, the compression config that the files were written with: for "
            "public data its card says it, and files of the legacy format never hold it."
        )
    return yaml.safe_load(file.read_text())


def _items(column: Any) -> Any:
    """What is in the list of a column of one row, as an Arrow array."""
    return column.combine_chunks().flatten()


def _matrix(column: Any) -> np.ndarray:
    """The lists in the list of a column of one row, all of one length, `[S, width]`."""
    lists = _items(column)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), len(values) // max(len(lists), 1))
