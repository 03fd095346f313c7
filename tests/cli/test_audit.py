"""`hf-distill audit`: verdict, exit status, and the comparison with a report of before."""

import pytest

from hf_distill.cli.main import main
from hf_distill.evaluation import MemorizationReport
from tests import language, tiny


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr("hf_distill.evaluation.memorization.separation.RESAMPLES", 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("audit")
    members, non_members = language.sentences(40, seed=5), language.sentences(40, seed=6)
    for name, ids in (("members", members), ("others", non_members)):
        language.dataset(ids).to_json(path / f"{name}.jsonl")
    for name, model in (("student", language.train(language.model(32), members, 80)), ("before", language.model(32))):
        model.save_pretrained(path / name)
    tiny.tokenizer().save_pretrained(path / "student")
    return path


def arguments(folder, model):
    sides = ["--members", str(folder / "members.jsonl"), "--non-members", str(folder / "others.jsonl")]
    return ["audit", "--model", str(folder / model), *sides]


def test_an_overfitted_student_ends_in_1_and_the_report_is_written(folder, tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert main([*arguments(folder, "student"), "--reference", str(folder / "before"), "--json", str(out)]) == 1
    report = MemorizationReport.load(out)
    assert str(report) in capsys.readouterr().out
    names = [attack.name for attack in report.attacks]
    assert names == ["loss", "min_k", "min_k_plus_plus", "zlib", "reference"]
    assert report.recites


def test_a_model_that_saw_nothing_ends_in_0_and_is_compared_with_the_one_that_did(folder, tmp_path, capsys):
    out = tmp_path / "audit.json"
    main([*arguments(folder, "student"), "--no-greedy", "--json", str(out)])
    capsys.readouterr()
    assert main([*arguments(folder, "before"), "--no-greedy", "--before", str(out)]) == 0
    said = capsys.readouterr().out
    assert "No zlib attack" in said
    assert "utility cost: NLL of non-members" in said


def test_a_wrong_argument_ends_in_2_and_a_line(folder, tmp_path, capsys):
    assert main([*arguments(folder, "student"), "--rows", "3"]) == 2
    assert "`members` has 3 rows" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[]")
    assert main([*arguments(folder, "student"), "--before", str(tmp_path / "list.json")]) == 2
    assert "expected the report of an audit" in capsys.readouterr().err
