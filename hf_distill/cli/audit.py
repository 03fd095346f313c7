"""`hf-distill audit`: what a model gives away of the rows that it was trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    audit = commands.add_parser("audit", help="tell members from non-members by a model: exit status 1 if it can be")
    audit.add_argument("--model", required=True, help="the student: Hub name or folder of a model or an adapter")
    for name, what in (("members", "it was trained on"), ("non-members", "of the same source it was not trained on")):
        audit.add_argument(
            f"--{name}", required=True, help=f"rows that {what}: Hub name, folder, or json(l) or parquet file"
        )
        audit.add_argument(f"--{name}-split", default="train", help="of these (default: train)")
    audit.add_argument("--reference", help="model with the same tokenizer, as the student before distillation")
    audit.add_argument("--rows", type=int, default=1000, help="the first so many of each (default: %(default)s)")
    audit.add_argument("--max-length", type=int, help="of a row; longer ones are cut")
    audit.add_argument("--batch-size", type=int, default=8, help="rows read at once (default: %(default)s)")
    audit.add_argument("--assistant-only-loss", action="store_true", help="score the answers of chats alone")
    audit.add_argument("--no-greedy", action="store_true", help="leave out greedy decoding, which takes longest")
    audit.add_argument("--dtype", default="auto", help="of the weights (default: as saved)")
    audit.add_argument("--before", type=Path, help="report of the model without a mitigation, to compare with")
    audit.add_argument("--json", type=Path, help="file for the report")
    audit.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    from hf_distill import load_teacher
    from hf_distill.cli.data import check_output, first_rows, load, scored_rows
    from hf_distill.cli.models import check_same_tokens
    from hf_distill.evaluation import MemorizationReport, audit_memorization

    check_output(options.json, "--json")
    before = None if options.before is None else MemorizationReport.load(options.before)
    given = {"rows": options.rows, "assistant_only_loss": options.assistant_only_loss}
    members = first_rows(load(options.members, options.members_split, "--members"), **given)
    non_members = first_rows(load(options.non_members, options.non_members_split, "--non-members"), **given)
    model = load_teacher(options.model, dtype=options.dtype)
    reference = None if options.reference is None else load_teacher(options.reference, dtype=options.dtype)
    if reference is not None:
        check_same_tokens(model.tokenizer, reference.tokenizer, ("--model", "--reference"))
    made = {"max_length": options.max_length, "assistant_only_loss": options.assistant_only_loss}
    members, non_members = (scored_rows(side, model.tokenizer, **made) for side in (members, non_members))
    report = audit_memorization(
        model.model,
        members,
        non_members,
        reference and reference.model,
        model.tokenizer,
        max_length=options.max_length,
        batch_size=options.batch_size,
        greedy=not options.no_greedy,
    )
    print(report)
    if options.json is not None:
        report.save(options.json)
    if before is not None:
        print(f"\nAgainst {options.before}:\n\n{report.compare(before)}")
    return 1 if report.exposed or report.recites or report.shifted else 0
