"""The command `hf-distill`: one file a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_distill.cli import audit, cache, card, compress, config, diagnose, evaluate, plan, push, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; a wrong argument ends in one line on stderr and the exit status 2.

    A subcommand that finds what it looked for wrong gives the exit status 1.
    """
    parser = argparse.ArgumentParser("hf-distill", description="Knowledge distillation for Trainer and TRL.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, compress, cache, plan, evaluate, diagnose, audit, card, push):
        command.add_to(commands)
    config.add_to(parser)
    try:
        options, flags = parser.parse_known_args(config.expand(sys.argv[1:] if arguments is None else arguments))
        if getattr(options, "takes_flags", False):
            options.flags = flags
        elif flags:
            parser.error(f"unrecognized arguments: {' '.join(flags)}")
        return options.run(options) or 0
    except _faults_of_the_input() as error:
        print(f"hf-distill: {_what_is_wrong(error)}", file=sys.stderr)
        return 2


def _faults_of_the_input() -> tuple[type[Exception], ...]:
    """What the files and arguments of a user raise; imported when something is raised, so that help stays quick."""
    from safetensors import SafetensorError
    from yaml import YAMLError

    return ValueError, OSError, ImportError, SafetensorError, YAMLError


def _what_is_wrong(error: Exception) -> str:
    kind = type(error).__name__
    if kind == "SafetensorError":  # it names no file
        return f"A file of weights is cut short or damaged ({error}); save or download the model again."
    return str(error) or kind


if __name__ == "__main__":
    sys.exit(main())
