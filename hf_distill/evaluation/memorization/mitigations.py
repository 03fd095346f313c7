"""What may lower memorisation. No source shows that any of it removes membership; each costs utility."""

from __future__ import annotations

from hf_distill.evaluation.memorization.report import Mitigation


NOT_MEASURED = "not measured here: train with it, audit again, `report.compare(before)`"


def mitigations(flagged: int, members: int, flagged_tokens: float) -> tuple[Mitigation, ...]:
    """The choices, with the cost of the one whose cost is known.

    Args:
        flagged: Number of members that stand out.
        members: Number of members.
        flagged_tokens: The share of the members' tokens that is in them.
    """
    return (
        Mitigation(
            "reverse KL",
            'KDConfig(divergence="reverse_kl")',
            "MiniLLM, which minimises it, leaked less than forward KL (arXiv 2508.07054, GPT-2 Large: AUC of LOSS .53 "
            "and .63); more sequences of the student's own raise it",
            NOT_MEASURED,
        ),
        Mitigation(
            "soft instead of hard labels",
            "KDConfig(ce_weight=0.0)",
            "hard labels hand on more of what a teacher has memorised (arXiv 2601.15394)",
            NOT_MEASURED,
        ),
        Mitigation(
            "leave out the rows that stand out",
            "dataset.select(i for i in range(len(dataset)) if i not in report.flagged)",
            "dropping vulnerable rows is one of the defences of arXiv 2505.11837; others may stand out afterwards",
            f"{flagged:,} of {members:,} rows, {100 * flagged_tokens:.1f} % of the tokens; of quality {NOT_MEASURED}",
        ),
        Mitigation(
            "a temperature above 1 for the rows that stand out",
            "distil these rows in a run of their own with KDConfig(temperature=2.0)",
            "a temperature of its own for a row is one of the defences of arXiv 2505.11837",
            NOT_MEASURED,
        ),
    )
