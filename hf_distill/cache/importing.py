"""Caches of other projects, taken over."""

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


class DistillKitFiles:
    """Rows of a folder that DistillKit wrote, and their distributions.

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
        self._pad_token_id = pad_token_id
        # Where a row's distributions are: the example, and the position in it.
        self._places: dict[bytes, tuple[int, int]] = {}
        self.rows = list(self._find_rows())

    def top_tokens(self, row: Row) -> TopTokens:
        """The distributions of a row; the log-probabilities of labels beyond the ids are nan."""
        example, start = self._places[row.key]
        table = self._data[example : example + 1]
        part = slice(start, start + len(row.ids) - 1)
        arrays = {name: _matrix(table.column(name))[part] for name in self.format.widths}
        ids, log_probs = self.format.decode(arrays)
        labels: np.ndarray = row.ids[1:].astype(np.int64)
        is_label = ids == labels[:, None]
        found = np.where(is_label, log_probs, 0).sum(1)
        return TopTokens(ids, log_probs, labels, np.where(is_label.any(1), found, np.nan))

    def _find_rows(self) -> Iterator[Row]:
        """All rows, each once."""
        counted = next(iter(self.format.widths))
        masked = "attention_mask" in self._data.column_names
        for example in range(len(self._data)):
            table = self._data[example : example + 1]
            ids = _items(table.column("input_ids")).to_numpy().astype(np.int32)
            count = len(_items(table.column(counted)))
            if count not in {len(ids) - 1, len(ids)}:
                raise ValueError(
                    f"Row {example} has {len(ids)} tokens and {count} distributions; expected as many, or one less."
                )
            numbers = _items(table.column("attention_mask")).to_numpy() if masked else np.ones(len(ids), dtype=int)
            for start, stop in _documents(numbers):
                # With a distribution for its last token the row was packed, which cuts the pad token off.
                if count < len(ids) and ids[stop - 1] == self._pad_token_id:
                    stop -= 1
                row = Row(ids[start:stop], np.ones(max(stop - start - 1, 0), dtype=bool))
                if len(row.kept) and row.key not in self._places:
                    self._places[row.key] = (example, start)
                    yield row


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


def _documents(numbers: np.ndarray) -> Sequence[tuple[int, int]]:
    """Where each document of a packed row begins and ends; those numbered 0 are padding."""
    bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist()
    return [(start, stop) for start, stop in pairwise(bounds) if numbers[start]]


def _items(column: Any) -> Any:
    """What is in the list of a column of one row, as an Arrow array."""
    return column.combine_chunks().flatten()


def _matrix(column: Any) -> np.ndarray:
    """The lists in the list of a column of one row, all of one length, `[S, width]`."""
    lists = _items(column)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(lists), len(values) // max(len(lists), 1))
