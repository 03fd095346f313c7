"""The cards of recipes that were run: what the renderer makes of their data today (`make cards` writes them)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from hf_distill.cards import DistillationCard, check_card, render_card


CARDS = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in CARDS.glob("*/card.json"))
LARGEST_PLOT = 60_000  # bytes


def test_every_recipe_that_runs_here_has_its_card():
    assert {"quickstart", "classify_reviews", "compress_smollm2"} <= {folder.name for folder in FOLDERS}
    assert [folder for folder in CARDS.iterdir() if folder.is_dir() and folder.name != "__pycache__"] != []
    assert {path.parent for path in CARDS.glob("*/README.md")} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_card_is_what_its_data_give(folder):
    text = (folder / "README.md").read_text(encoding="utf-8")

    assert text == render_card(DistillationCard.load(folder)), "run `make cards`"
    check_card(text)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_index_for_the_hub_is_the_report(folder):
    card, report = ModelCard.load(folder / "README.md"), DistillationCard.load(folder).report

    expected = [value for row in report.rows for value in (row.student, row.retention) if value is not None]
    assert [result.metric_value for result in card.data.eval_results] == expected
    assert card.data.distillation["mean_retention"] == report.mean_retention


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_plots_are_small_and_show_the_report(folder, tmp_path):
    card = DistillationCard.load(folder)
    assert {path.name for path in folder.glob("*.png")} == set(card.plots)
    assert all((folder / name).stat().st_size < LARGEST_PLOT for name in card.plots)
    image = pytest.importorskip("matplotlib.image")
    card.report.plot(tmp_path)
    for name in card.plots:
        drawn, committed = image.imread(tmp_path / name), image.imread(folder / name)
        assert drawn.shape == committed.shape
        assert np.abs(drawn - committed).mean() < 0.01, "run `make cards`"
