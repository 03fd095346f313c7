"""Reports as JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(data: Mapping[str, Any], path: str | Path) -> None:
    """Write a file of plain values; an interrupted write leaves an older file whole.

    Raises:
        ValueError: A number is not finite.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a file of plain values.

    Args:
        path: Its name.
        what: What it is expected to hold, for the message.

    Raises:
        ValueError: It holds something else than a JSON object.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); expected {what}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected {what}.")
    return data
