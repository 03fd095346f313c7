"""Reports as JSON files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar


T = TypeVar("T")


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
        FileNotFoundError: There is none.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}; expected {what}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}); expected {what}.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected {what}.")
    return data


def load_json(path: str | Path, what: str, build: Callable[[dict[str, Any]], T]) -> T:
    """Read a file of plain values, and make of them what they describe.

    Args:
        path: Its name.
        what: What it is expected to hold, for the message.
        build: From the values to the object.

    Raises:
        ValueError: It holds something else.
        FileNotFoundError: There is none.
    """
    data = read_json(path, what)
    try:
        return build(data)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not {what} ({type(error).__name__}: {error}); write it again.") from error
