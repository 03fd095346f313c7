"""The audit tells an overfitted student from one that was trained on other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_distill.evaluation import MemorizationReport, audit_memorization
from tests import language, tiny


ROWS, SPLITS = 100, 12


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_distill.evaluation.memorization.separation.RESAMPLES", 400)
        yield


@pytest.fixture(scope="module")
def reference():
    return language.train(language.model(32, seed=2), language.sentences(1000, seed=1), 60)


def overfitted(rows, seed=0):
    return language.train(language.model(32, seed=seed), rows, 100, lr=2e-2)


@pytest.fixture(scope="module")
def members():
    return language.sentences(ROWS, seed=100)


@pytest.fixture(scope="module")
def non_members():
    return language.sentences(ROWS, seed=200)


@pytest.fixture(scope="module")
def student(members):
    return overfitted(members)


@pytest.fixture(scope="module")
def of_members(student, members, non_members, reference):
    sides = language.dataset(members), language.dataset(non_members)
    return audit_memorization(student, *sides, reference=reference, batch_size=50)


@pytest.fixture(scope="module")
def of_others(reference):
    """Audits of one student that was overfitted on other rows, of the same members as `of_members` and of more."""
    other = overfitted(language.sentences(ROWS, seed=300))
    sides = [[language.dataset(language.sentences(ROWS, seed=seed + i)) for seed in (100, 200)] for i in range(SPLITS)]
    return [audit_memorization(other, *pair, reference=reference, batch_size=50) for pair in sides]


@pytest.mark.parametrize("seed", range(3))
def test_every_attack_separates_the_rows_that_a_student_was_overfitted_on(seed, reference):
    members, non_members = (language.sentences(ROWS, seed=100 * side + seed) for side in (1, 2))
    sides = language.dataset(members), language.dataset(non_members)

    report = audit_memorization(overfitted(members, seed), *sides, reference=reference, batch_size=50)

    assert [attack.name for attack in report.attacks] == ["loss", "min_k", "min_k_plus_plus", "reference"]
    for attack in report.attacks:
        assert attack.auc > 0.8, attack
        assert 0.5 < attack.auc_low <= attack.auc <= attack.auc_high
        assert attack.tpr_low <= attack.tpr <= attack.tpr_high
    assert len(report.exposed) == 4
    assert report.recites
    assert "Members can be told from non-members by loss" in report.verdict()


def test_no_attack_separates_them_by_a_student_that_was_trained_on_others(of_others):
    # A 95 % interval misses its truth in one case of twenty, so no single split can be asked to be covered: with the
    # seeds as they come, fewer than 8 of 12 are covered in one of 2,000 suites. The mean AUC deviates by 0.012.
    for attacks in zip(*(report.attacks for report in of_others), strict=True):
        assert sum(attack.auc_low <= 0.5 <= attack.auc_high for attack in attacks) >= 8, attacks[0].name
        assert abs(np.mean([attack.auc for attack in attacks]) - 0.5) < 0.05, attacks[0].name
    assert sum(report.greedy.gap.low <= 0 <= report.greedy.gap.high for report in of_others) >= 8
    assert sum(report.shifted for report in of_others) <= 4


def test_the_verdict_says_what_the_intervals_say(of_members, of_others):
    for report in (of_members, *of_others):
        nothing = not report.exposed and not report.recites
        assert ("No attack tells members from non-members" in report.verdict()) == nothing
        assert set(report.exposed) <= {attack.name for attack in report.attacks if attack.auc_low > 0.5}


def test_most_rows_that_stand_out_are_flagged(of_members, of_others):
    assert len(of_members.flagged) > ROWS / 4
    assert np.mean([len(report.flagged) for report in of_others]) < ROWS / 10
    assert of_members.flagged_tokens == pytest.approx(len(of_members.flagged) / ROWS)


def test_flagged_rows_are_numbered_as_in_the_dataset(student, members, non_members, of_members, reference):
    rows = [[3], *members.tolist()]
    report = audit_memorization(
        student,
        Dataset.from_dict({"input_ids": rows}),
        language.dataset(non_members),
        reference=reference,
        batch_size=50,
    )

    assert report.flagged == tuple(i + 1 for i in of_members.flagged)


def test_a_shift_between_the_sides_is_seen_without_the_model(members, reference):
    shifted = np.where(np.arange(language.LENGTH) % 4 == 0, 7, language.sentences(ROWS, seed=6))

    report = audit_memorization(reference, language.dataset(members), language.dataset(shifted), greedy=False)

    assert report.shifted
    assert report.blind.auc > 0.8
    assert report.attacks[0].auc > 0.8  # the model has seen neither side
    assert report.verdict().startswith("Inconclusive: members and non-members differ without the model")


def test_a_mitigation_is_compared_with_its_cost(of_members, of_others):
    table = of_others[0].compare(of_members)

    cost = of_others[0].held_out_nll.value - of_members.held_out_nll.value
    assert f"{cost:+.4f}" in table
    assert "AUC of loss" in table
    assert all("not measured here" in item.cost for item in of_members.mitigations)
    assert "report.flagged" in of_members.to_markdown()


def test_reports_of_other_rows_are_not_compared(of_members, members, reference):
    other = audit_memorization(
        reference, language.dataset(members), language.dataset(language.sentences(20, seed=9)), greedy=False
    )

    with pytest.raises(ValueError, match="is of other rows"):
        other.compare(of_members)
    assert other.attacks[0].tpr is None
    assert "20 non-members cannot show a false positive rate of 1 %" in other.to_markdown()


def test_a_report_survives_json(of_members, tmp_path):
    of_members.save(tmp_path / "audit.json")

    assert MemorizationReport.load(tmp_path / "audit.json") == of_members
    assert [item.name for item in tmp_path.iterdir()] == ["audit.json"]


def test_utility_is_the_likelihood_of_the_non_members(of_members, student, non_members):
    ids = torch.from_numpy(non_members)
    with torch.no_grad():
        logits = student(ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()

    assert of_members.held_out_nll.value == pytest.approx(expected, rel=1e-4)
    assert of_members.held_out_nll.low < expected < of_members.held_out_nll.high


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"members": tiny.tokenized_dataset(3)}, "`members` has 3 rows"),
        ({"non_members": tiny.tokenized_dataset(12)}, "12 of 12 rows of `non_members` are in `members`"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"model": tiny.model("bert")}, "`model` is a masked_lm model"),
        ({"model": "student"}, "`model` is a str"),
    ],
)
def test_what_cannot_be_audited_is_refused(given, message):
    model = tiny.model()
    model.forward = None
    sides = {"members": tiny.tokenized_dataset(12), "non_members": tiny.tokenized_dataset(12, seed=1)}

    with pytest.raises(ValueError, match=message):
        audit_memorization(**({"model": model} | sides | given))
