"""What an audit holds, and how it is written and printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_distill.evaluation.bootstrap import Estimate
from hf_distill.evaluation.json_file import load_json, write_json
from hf_distill.evaluation.tables import format_cell, format_share, markdown_table


# Below this a rate of 1 % rests on fewer than ten rows.
MANY_NON_MEMBERS = 1000
CHANCE = 0.5


@dataclass(frozen=True)
class Attack:
    """How well one score tells members from non-members; the ends are of 95 % bootstrap intervals over rows.

    Args:
        name: Of the score.
        auc: Probability that a member scores higher than a non-member; 0.5 is a guess.
        auc_low: Lower end.
        auc_high: Upper end.
        tpr: True positive rate at 1 % false positives; None with fewer than 100 non-members.
        tpr_low: Lower end.
        tpr_high: Upper end.
    """

    name: str
    auc: float
    auc_low: float | None
    auc_high: float | None
    tpr: float | None = None
    tpr_low: float | None = None
    tpr_high: float | None = None


@dataclass(frozen=True)
class GreedyMatch:
    """How far greedy decoding from a prompt gives the text that follows it.

    Args:
        tokens: How many tokens of each continuation are compared, at most.
        members: Mean share of tokens that are the same, over members.
        non_members: The same over non-members: what can be guessed.
        gap: Members less non-members.
        verbatim_members: Share of members whose compared tokens are all the same.
        verbatim_non_members: The same of non-members.
    """

    tokens: int
    members: Estimate
    non_members: Estimate
    gap: Estimate
    verbatim_members: float
    verbatim_non_members: float


@dataclass(frozen=True)
class Mitigation:
    """Something that may lower what an audit finds. None of them is known to remove it.

    Args:
        name: What.
        how: With what call or setting.
        evidence: What is known of its effect, with the source.
        cost: What it costs in utility, as far as it was measured.
    """

    name: str
    how: str
    evidence: str
    cost: str


@dataclass(frozen=True)
class MemorizationReport:
    """What a model gives away of rows that it was trained on.

    Args:
        members: Number of rows that it was trained on.
        non_members: Number of rows that it was not trained on.
        items: Digest of all of these rows: reports can be compared where it is the same.
        attacks: What scores from the model reach.
        blind: What a classifier reaches that reads the rows and never the model: above a guess, the two sets differ by
            more than the training, and the attacks may see nothing else.
        greedy: Greedy decoding against the rows; None where it was not asked for.
        held_out_nll: Negative log-likelihood per token of the non-members, in nats: the utility of the model.
        flagged: Members that stand out, by row: above the threshold of 1 % false positives of some attack (with 100
            non-members or more), or given verbatim.
        flagged_tokens: Their share of the members' scored tokens.
        mitigations: What may lower it.
        notes: What was not measured, and why.
    """

    members: int
    non_members: int
    items: str
    attacks: tuple[Attack, ...]
    blind: Attack
    greedy: GreedyMatch | None
    held_out_nll: Estimate
    flagged: tuple[int, ...]
    flagged_tokens: float
    mitigations: tuple[Mitigation, ...]
    notes: tuple[str, ...] = ()

    @property
    def shifted(self) -> bool:
        """Whether members and non-members can be told apart without the model."""
        return self.blind.auc_low is not None and self.blind.auc_low > CHANCE

    @property
    def exposed(self) -> tuple[str, ...]:
        """The attacks whose whole interval is above a guess and, where the sets differ, above the blind one's.

        Where they differ that is no proof: a better blind classifier might do as well.
        """
        bound = max(CHANCE, self.blind.auc_high or 1.0) if self.shifted else CHANCE
        return tuple(attack.name for attack in self.attacks if attack.auc_low is not None and attack.auc_low > bound)

    @property
    def recites(self) -> bool:
        """Whether greedy decoding gives more of the members than of the others."""
        return self.greedy is not None and self.greedy.gap.low is not None and self.greedy.gap.low > 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemorizationReport:
        """The report that `to_dict` described."""
        parts = {
            "attacks": tuple(Attack(**attack) for attack in data["attacks"]),
            "blind": Attack(**data["blind"]),
            "greedy": None if data["greedy"] is None else _greedy(data["greedy"]),
            "held_out_nll": Estimate(**data["held_out_nll"]),
            "flagged": tuple(data["flagged"]),
            "mitigations": tuple(Mitigation(**mitigation) for mitigation in data["mitigations"]),
            "notes": tuple(data["notes"]),
        }
        return cls(**{**data, **parts})

    def save(self, path: str | Path) -> None:
        """Write JSON; an interrupted write leaves an older file whole."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> MemorizationReport:
        """Read what `save` wrote."""
        return load_json(path, "the report of an audit", cls.from_dict)

    def verdict(self) -> str:
        """What was found, in a sentence."""
        said = []
        if self.shifted:
            said.append(
                "Inconclusive: members and non-members differ without the model (a blind classifier has AUC "
                f"{self.blind.auc:.3f}{_ends(self.blind.auc_low, self.blind.auc_high)}), and what is found of the "
                "model may be that alone; draw both at random from one source."
            )
        if self.exposed:
            said.append(f"Members can be told from non-members by {', '.join(self.exposed)}.")
        if self.greedy is not None and self.recites:
            gap = format_share(self.greedy.gap.value)
            said.append(f"Greedy decoding gives {gap} more tokens of members than of non-members.")
        if not self.exposed and not self.recites:
            said.append("No attack tells members from non-members beyond what the rows themselves do.")
        return " ".join(said)

    def to_markdown(self) -> str:
        """The verdict, the tables and the mitigations."""
        attacks = [
            (item.name, *_with_interval(item.auc, item.auc_low, item.auc_high), *_rate(item))
            for item in (*self.attacks, self.blind)
        ]
        parts = [
            self.verdict(),
            f"{self.members:,} members, {self.non_members:,} non-members.",
            markdown_table(["attack", "AUC", "95 % interval", "TPR at 1 % FPR", "its 95 % interval"], attacks),
            markdown_table(["measured", "value", "95 % interval"], _others(self)),
            "What may lower it; train with it, audit again, and compare:",
            markdown_table(
                ["mitigation", "how", "evidence", "cost"],
                [(item.name, item.how, item.evidence, item.cost) for item in self.mitigations],
            ),
        ]
        return "\n\n".join([*parts, *self.notes])

    def compare(self, before: MemorizationReport) -> str:
        """A table of what a mitigation changed, and what it cost.

        Args:
            before: Of the model without it, on the same rows.

        Raises:
            ValueError: The rows are others.
        """
        if before.items != self.items:
            raise ValueError(
                f"`before` is of other rows ({before.items}, here {self.items}); audit both models with the same "
                "members, non-members, tokenizer and `max_length`."
            )
        old = {attack.name: attack for attack in before.attacks}
        rows = [_change(f"AUC of {new.name}", old[new.name].auc, new.auc) for new in self.attacks if new.name in old]
        if self.greedy is not None and before.greedy is not None:
            rows.append(_change("greedy match, members - others", before.greedy.gap.value, self.greedy.gap.value))
        rows.append(_change("utility cost: NLL of non-members", before.held_out_nll.value, self.held_out_nll.value))
        return markdown_table(["", "before", "after", "change"], rows)

    def __str__(self) -> str:
        return self.to_markdown()


def _greedy(data: Mapping[str, Any]) -> GreedyMatch:
    return GreedyMatch(**{**data, **{name: Estimate(**data[name]) for name in ("members", "non_members", "gap")}})


def _others(report: MemorizationReport) -> list[tuple[object, ...]]:
    rows = [_estimate("NLL of non-members", report.held_out_nll)]
    if (greedy := report.greedy) is not None:
        rows += [
            _estimate(f"greedy match of members, first {greedy.tokens} tokens", greedy.members),
            _estimate("greedy match of non-members", greedy.non_members),
            _estimate("gap", greedy.gap),
            ("verbatim members", format_share(greedy.verbatim_members), ""),
            ("verbatim non-members", format_share(greedy.verbatim_non_members), ""),
        ]
    flagged = f"{len(report.flagged):,}, {format_share(report.flagged_tokens)} of the members' tokens"
    return [*rows, ("members that stand out", flagged, "")]


def _rate(attack: Attack) -> tuple[object, ...]:
    return ("", "") if attack.tpr is None else _with_interval(attack.tpr, attack.tpr_low, attack.tpr_high)


def _estimate(name: str, estimate: Estimate) -> tuple[object, ...]:
    return name, *_with_interval(estimate.value, estimate.low, estimate.high)


def _with_interval(value: float, low: float | None, high: float | None) -> tuple[object, ...]:
    return format_cell(value), "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"


def _change(name: str, before: float, after: float) -> tuple[object, ...]:
    return name, before, after, f"{after - before:+.4f}"
