"""`hf-distill push`: a finished student on the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    push = commands.add_parser("push", help="push a student's folder to the Hub, with its card and report")
    push.add_argument("folder", type=Path, help="of the saved student or adapter")
    push.add_argument("repo_id", help="NAME or ORGANISATION/NAME")
    push.add_argument("--report", type=Path, help="retention report, as `RetentionReport.save` writes it")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch, which is created where it is missing")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--message", default="Push a distilled model", help="of the commit")
    push.set_defaults(run=_push)


def _push(options: argparse.Namespace) -> None:
    from hf_distill.cards import push_distilled
    from hf_distill.evaluation import RetentionReport

    report = None if options.report is None else RetentionReport.load(options.report)
    choices = {name: getattr(options, name) for name in ("private", "revision", "create_pr")}
    pushed = push_distilled(options.folder, options.repo_id, report, commit_message=options.message, **choices)
    print(f"{len(pushed.files)} files pushed and loaded back: {pushed.url}")
