"""`hf-distill card`: the model card of a student that another trainer made, and cards rendered again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    card = commands.add_parser(
        "card", help="write the README.md of a student's folder from its report, or render cards again"
    )
    card.add_argument("folder", type=Path, nargs="+", help="of the saved student or adapter")
    card.add_argument(
        "--regenerate", action="store_true", help="render the cards of all folders again from their card.json"
    )
    card.add_argument("--report", type=Path, help="retention report, as `hf-distill evaluate --out` writes it")
    card.add_argument("--name", help="of the model (default: of the folder)")
    card.add_argument("--teacher", help="Hub name or description")
    card.add_argument("--base-model", help="what the student was initialised from")
    card.add_argument("--datasets", nargs="+", default=[], help="Hub names or descriptions of the training data")
    card.add_argument("--evaluation-data", help="name of the held-out data of the report")
    card.add_argument("--license", help="of the student")
    card.add_argument("--teacher-license", help="of the teacher")
    card.set_defaults(run=_card)


def _card(options: argparse.Namespace) -> None:
    from hf_distill.cards import (
        Dataset,
        DistillationCard,
        check_folder,
        installed_versions,
        regenerate_card,
        write_card,
    )
    from hf_distill.evaluation import RetentionReport

    given = {name: value for name, value in vars(options).items() if name in DistillationCard.__dataclass_fields__}
    if options.regenerate:
        if flags := sorted(name for name, value in (given | {"report": options.report}).items() if value):
            raise ValueError(f"`--regenerate` takes what card.json says, and {flags} are given too; leave them out.")
        for folder in options.folder:
            print(regenerate_card(folder))
        return
    if len(options.folder) > 1:
        raise ValueError(f"{len(options.folder)} folders are given; expected one, or `--regenerate` with their data.")
    [folder] = options.folder
    check_folder(folder)
    given["name"] = options.name or folder.resolve().name
    given["adapter"] = (folder / "adapter_config.json").exists()
    given["datasets"] = [Dataset(name) for name in options.datasets]
    given["report"] = options.report and RetentionReport.load(options.report)
    print(write_card(DistillationCard(**given, versions=installed_versions()), folder))
