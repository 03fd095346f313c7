from __future__ import annotations

import pytest
import torch

from hf_distill.students import ImportanceScores


SCORES = ImportanceScores(
    mlp=torch.rand(2, 8, dtype=torch.float64), layers=torch.tensor([1, 2]), provenance={"mlp": "at random"}
)


def test_scores_are_kept_in_a_folder_as_they_were(tmp_path):
    assert SCORES.mlp.dtype == SCORES.layers.dtype == torch.float32
    SCORES.save(tmp_path / "new" / "scores")
    again = ImportanceScores.load(tmp_path / "new" / "scores")
    assert torch.equal(again.mlp, SCORES.mlp)
    assert torch.equal(again.layers, SCORES.layers)
    assert again.heads is again.hidden is None
    assert again.provenance == SCORES.provenance
    ImportanceScores(hidden=torch.ones(3)).save(tmp_path / "new" / "scores")  # newer ones
    assert ImportanceScores.load(tmp_path / "new" / "scores").mlp is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    SCORES.save(tmp_path / "scores")
    monkeypatch.setattr("hf_distill.students.scores.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ImportanceScores(hidden=torch.ones(3)).save(tmp_path / "scores")
    assert torch.equal(ImportanceScores.load(tmp_path / "scores").mlp, SCORES.mlp)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_other_folders_are_neither_read_nor_replaced(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds other files"):
        SCORES.save(tmp_path)
    with pytest.raises(ValueError, match=r"does not hold importance.json"):
        ImportanceScores.load(tmp_path)
    SCORES.save(tmp_path / "scores")
    ImportanceScores(hidden=torch.ones(3)).save(tmp_path / "others")
    (tmp_path / "others" / "importance.json").replace(tmp_path / "scores" / "importance.json")
    with pytest.raises(ValueError, match=r"does not hold what importance\.json says"):
        ImportanceScores.load(tmp_path / "scores")


@pytest.mark.parametrize("scores", [{"mlp": torch.rand(8)}, {"layers": torch.tensor([1.0, float("nan")])}])
def test_scores_of_a_wrong_shape_or_that_are_not_numbers_are_refused(scores):
    with pytest.raises(ValueError, match="expected finite scores of shape"):
        ImportanceScores(**scores)
