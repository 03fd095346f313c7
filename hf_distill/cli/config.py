"""Flags of a command from a YAML file."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


FLAG = "--config"
# Their flags are those of dataclasses, which TRL's parser reads, from a file too.
OF_TRL = ("train", "compress")


def add_to(parser: argparse.ArgumentParser) -> None:
    """Let the help of every command say that it takes its flags from a file."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for command in (command for action in below for name, command in action.choices.items() if name not in OF_TRL):
        add_to(command)
    if not below:
        what = "YAML file of these flags (`max_length: 512`); those that are given here win"
        parser.add_argument(FLAG, metavar="FILE", help=what, dest=argparse.SUPPRESS, default=argparse.SUPPRESS)


def expand(arguments: Sequence[str]) -> list[str]:
    """The arguments, and behind them those flags of the file of `--config` that are not among them.

    Raises:
        ValueError: There is no such file, or it holds something else than flags.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(FLAG)
    try:
        known, others = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError:  # without a file; the command itself says so
        return list(arguments)
    if known.config is None or arguments[0] in OF_TRL:
        return list(arguments)
    given = [argument.split("=")[0] for argument in others if argument.startswith("--")]
    # At the end, where a list cannot take what follows it; a flag that was given may be shortened.
    return [*others, *_flags(_read(known.config), given)]


def _read(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`{FLAG}` is {path!r}, which is no YAML file: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"`{FLAG}` is {path!r}, which holds no flags; expected lines like `max_length: 512`.")
    return values


def _flags(values: dict[str, Any], given: Sequence[str]) -> Iterator[str]:
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False or any(flag.startswith(own) for own in given):
            continue
        yield flag
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])
