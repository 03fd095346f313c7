"""What a card is rendered from, as a file beside it."""

from __future__ import annotations

import json
import math

import pytest

from hf_distill.cards import Dataset, DistillationCard, Loss, Table, regenerate_card, render_card, write_card
from hf_distill.cli.main import main
from hf_distill.evaluation import Footprint, RetentionReport, RetentionRow


ROW = RetentionRow("arc", "acc", True, 0.25, 500, 0.75, 0.65, None, 0.8, 0.75, 0.85, {"before": 0.4})
REPORT = RetentionReport(
    (ROW,), 0.75, 0.85, (Footprint("student", 2_000_000, 4_000_000, 9.5, None, "bfloat16", "cpu"),)
)


def full_card(tmp_path):
    folder = tmp_path / "big-teacher"
    folder.mkdir()
    return DistillationCard(
        name="student",
        teacher=str(folder),
        base_model="org/base",
        adapter=True,
        losses=[Loss("forward_kl", 0.5, {"temperature": 2.0, "betas": (0.9, 0.95)}, "1503.02531")],
        datasets=[Dataset(str(tmp_path / "gone" / "notes"), "mit")],
        seed=0,
        hyperparameters={"learning_rate": 3e-4, "warmup": None},
        report=REPORT,
        comparison=Table(["model", "loss"], [["teacher", 1.5], ["student", math.nan]]),
        commands=[f"python {tmp_path}/run.py"],
    )


def test_the_file_gives_the_same_card(tmp_path):
    path = write_card(full_card(tmp_path), tmp_path / "out")

    card = DistillationCard.load(tmp_path / "out")
    assert render_card(card) == path.read_text()
    assert (card.report, card.seed, card.comparison.rows) == (REPORT, 0, [["teacher", 1.5], ["student", None]])
    assert card.to_dict() == json.loads((tmp_path / "out" / "card.json").read_text())


def test_the_file_describes_no_machine_and_nothing_that_is_not_known(tmp_path):
    facts = full_card(tmp_path).to_dict()

    assert str(tmp_path) not in json.dumps(facts)
    assert (facts["teacher"], facts["base_model"], facts["datasets"][0]["name"]) == (
        "big-teacher",
        "org/base",
        "notes",
    )
    assert facts["commands"] == ["python run.py"]
    assert not {"license", "tokens", "notes", "measurements"} & facts.keys()


def test_edited_cards_are_rendered_again(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    texts = []
    for folder in folders:
        folder.mkdir()
        write_card(full_card(folder), folder)
        texts.append(regenerate_card(folder).read_text())
        (folder / "README.md").write_text("edited")

    assert main(["card", "--regenerate", *map(str, folders)]) == 0

    assert [(folder / "README.md").read_text() for folder in folders] == texts
    assert "**Keeps 80.0 % of its teacher" in texts[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b"], "2 folders are given; expected one"),
        (["a", "--regenerate", "--license", "mit"], "['license'] are given too"),
        (["nowhere", "--regenerate"], "card.json"),
    ],
)
def test_wrong_flags_are_refused_in_a_line(arguments, message, capsys):
    assert main(["card", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_data_that_no_card_says_are_refused(tmp_path):
    (tmp_path / "card.json").write_text('{"name": "s", "licence": "mit"}')

    with pytest.raises(ValueError, match="'licence'"):
        regenerate_card(tmp_path)
