"""`hf-distill evaluate` and `hf-distill card`: from two folders and a dataset to a card with evidence."""

import pytest
from huggingface_hub import ModelCard

from hf_distill import RetentionReport, evaluate_retention
from hf_distill.cli.main import main
from hf_distill.evaluation import KLDivergence
from tests import tiny


@pytest.fixture
def models(tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    tiny.text_dataset(6).to_json(tmp_path / "rows.jsonl")
    return ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]


def test_the_report_is_that_of_the_library_and_goes_into_the_card(models, tmp_path, capsys):
    out, dataset = tmp_path / "report.json", str(tmp_path / "rows.jsonl")
    assert main(["evaluate", *models, "--dataset", dataset, "--out", str(out)]) == 0
    report = RetentionReport.load(out)
    assert [row.metric for row in report.rows] == ["perplexity", "kl", "top1_agreement"]
    models_here = tiny.model("llama", seed=0), tiny.model("llama", seed=1)
    alone = evaluate_retention(*models_here, [KLDivergence(tiny.text_dataset(6))], tiny.tokenizer())
    assert report.rows[1].student == pytest.approx(alone.rows[0].student, rel=1e-5)
    assert str(report) in capsys.readouterr().out
    folder = tmp_path / "student"
    assert main(["card", str(folder), "--report", str(out), "--teacher", "org/teacher", "--license", "mit"]) == 0
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.distillation["teacher"] == "org/teacher"
    assert len(card.data.eval_results) == sum(
        (row.student is not None) + (row.retention is not None) for row in report.rows
    )


def test_classifiers_get_their_own_metrics(tmp_path):
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.model("bert", task="sequence_classification", seed=seed, num_labels=3).save_pretrained(tmp_path / name)
    tiny.classification_dataset(6).to_json(tmp_path / "rows.jsonl")
    arguments = ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]
    arguments += ["--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "report.json")]
    assert main(["evaluate", *arguments]) == 0
    rows = RetentionReport.load(tmp_path / "report.json").rows
    assert [row.metric for row in rows] == ["accuracy", "kl", "top1_agreement"]


def test_metrics_can_be_chosen_and_something_must_be_measured(models, tmp_path, capsys):
    arguments = [*models, "--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "report.json")]
    assert main(["evaluate", *arguments, "--metrics", "ece", "kl"]) == 0
    assert [row.metric for row in RetentionReport.load(tmp_path / "report.json").rows] == ["ece", "kl"]
    assert main(["evaluate", *models]) == 2
    assert "Nothing is measured" in capsys.readouterr().err


def test_a_folder_without_a_model_gets_no_card(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 2
    assert "holds no model" in capsys.readouterr().err
