"""Flags, or a YAML file of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EvaluationArguments:
    """What a student is measured on; a class of its own, so that the YAML file can name it too.

    Args:
        eval_dataset: Hub name, folder or file.
    """

    eval_dataset: str | None = field(default=None, metadata={"help": "Data to measure on."})


def parse(classes: tuple[Any, ...], flags: Sequence[str], *, some: bool = False) -> Any:
    """An instance of each class, from flags and from the file of `--config`.

    Args:
        classes: Dataclasses.
        flags: Of the command line.
        some: Whether other flags are left alone; they are then returned, too.

    Raises:
        ValueError: A flag is unknown, a value is refused, or the file is no YAML.
    """
    import yaml
    from trl import TrlParser

    try:
        return TrlParser(classes).parse_args_and_config(
            list(flags), return_remaining_strings=some, fail_with_unknown_args=not some
        )
    except yaml.YAMLError as error:
        raise ValueError(f"The file of `--config` is no YAML: {' '.join(str(error).split())}.") from None
