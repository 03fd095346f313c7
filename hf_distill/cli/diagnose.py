"""`hf-distill diagnose`: why a student does not follow its teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    diagnose = commands.add_parser("diagnose", help="name what keeps a student from its teacher: exit status 1 if any")
    diagnose.add_argument("--student", required=True, help="Hub name or folder of a model or an adapter")
    diagnose.add_argument("--teacher", required=True, help="Hub name or folder")
    diagnose.add_argument(
        "--dataset", required=True, help="of token ids, texts or chats: Hub name, folder, or json(l) or parquet file"
    )
    diagnose.add_argument("--split", default="test", help="of the dataset (default: test)")
    diagnose.add_argument("--rows", type=int, default=256, help="the first so many are read (default: %(default)s)")
    diagnose.add_argument("--max-length", type=int, help="of a row; longer ones are cut")
    diagnose.add_argument("--batch-size", type=int, default=8, help="rows read at once (default: %(default)s)")
    diagnose.add_argument("--assistant-only-loss", action="store_true", help="score the answers of chats alone")
    recipe = diagnose.add_argument_group("recipe", "of the run; temperature and weights are judged where it is given")
    recipe.add_argument("--kd-weight", type=float, help="of the divergence")
    recipe.add_argument("--ce-weight", type=float, default=0.0, help="of the cross-entropy (default: 0)")
    recipe.add_argument("--temperature", type=float, default=1.0, help="of the divergence (default: 1)")
    recipe.add_argument("--divergence", default="forward_kl", help="(default: %(default)s)")
    recipe.add_argument("--trainer-state", type=Path, help="trainer_state.json with logs of GradientShareCallback")
    diagnose.add_argument("--dtype", default="auto", help="of the weights (default: as saved)")
    diagnose.add_argument("--quantization", choices=["nf4", "int8"], help="of the teacher")
    diagnose.add_argument("--json", type=Path, help="file for the diagnosis")
    diagnose.set_defaults(run=_diagnose)


def _diagnose(options: argparse.Namespace) -> int:
    from hf_distill import LogitObjective, load_teacher
    from hf_distill.cli.data import check_output, first_rows, load, scored_rows
    from hf_distill.evaluation import diagnose, logged_shares

    check_output(options.json, "--json")
    recipe: dict[str, Any] = {}
    if options.kd_weight is not None:
        settings = {"temperature": options.temperature, "divergence": options.divergence}
        recipe = {"objectives": [LogitObjective(options.kd_weight, **settings)], "ce_weight": options.ce_weight}
    elif options.temperature != 1 or options.ce_weight:
        raise ValueError("`--temperature` and `--ce-weight` are of a run with a divergence: give its `--kd-weight`.")
    if options.trainer_state is not None:
        recipe["gradient_shares"] = logged_shares(options.trainer_state)
    dataset = first_rows(load(options.dataset, options.split), options.rows, options.assistant_only_loss)
    student = load_teacher(options.student, dtype=options.dtype)
    teacher = load_teacher(options.teacher, quantization=options.quantization, dtype=options.dtype, task=student.task)
    made = {"max_length": options.max_length, "assistant_only_loss": options.assistant_only_loss}
    dataset = scored_rows(dataset, student.tokenizer, **made)
    limits = {"max_length": options.max_length, "batch_size": options.batch_size}
    found = diagnose(student.model, teacher, dataset, student.tokenizer, **recipe, **limits)
    print(found)
    if options.json is not None:
        found.save(options.json)
    return 0 if found.healthy else 1
