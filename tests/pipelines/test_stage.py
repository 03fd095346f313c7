"""A stage is whole or not there; what is there is only taken where it was made from the same things."""

from __future__ import annotations

import pytest

from hf_distill.pipelines.stage import Stage


def writes(text):
    def build(written, run):
        (written / "model").write_text(text)
        return {"said": text}

    return build


def fails(written, run):
    (written / "half").write_text("half")
    (run / "kept").write_text("kept")
    raise OSError("no space left")


def test_a_stage_is_made_once(tmp_path):
    stage = Stage("1-P", tmp_path, "source", {"size": 1})
    assert stage.run(writes("first")) == {"said": "first"}
    assert stage.run(writes("second")) == {"said": "first"}
    assert (stage.folder / "model").read_text() == "first"
    assert not stage.unfinished.exists()


def test_a_stage_that_failed_is_not_there_and_keeps_what_helps_to_go_on(tmp_path):
    stage = Stage("1-P", tmp_path, "source", {"size": 1})
    with pytest.raises(OSError, match="no space"):
        stage.run(fails)
    assert not stage.folder.exists()

    def goes_on(written, run):
        assert (run / "kept").read_text() == "kept"
        assert not list(written.iterdir())
        return {}

    stage.run(goes_on)
    assert stage.check()


@pytest.mark.parametrize(("source", "settings"), [("other", {"size": 1}), ("source", {"size": 2})])
def test_what_was_kept_for_other_settings_is_thrown_away(source, settings, tmp_path):
    with pytest.raises(OSError, match="no space"):
        Stage("1-P", tmp_path, "source", {"size": 1}).run(fails)

    def begins(written, run):
        assert not list(run.iterdir())
        return {}

    Stage("1-P", tmp_path, source, settings).run(begins)


def test_a_done_stage_of_other_things_is_refused_by_name(tmp_path):
    Stage("1-P", tmp_path, "source", {"size": 1}).run(writes("first"))
    with pytest.raises(ValueError, match=r"1-P was made from other settings \(size\); take another `output_dir`"):
        Stage("1-P", tmp_path, "source", {"size": 2}).check()
    with pytest.raises(ValueError, match="made from another model or other data"):
        Stage("1-P", tmp_path, "other", {"size": 1}).check()
    (tmp_path / "2-Q").mkdir()
    with pytest.raises(ValueError, match="is no stage of a pipeline"):
        Stage("2-Q", tmp_path, "source", {}).check()
