from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from hf_distill.evaluation import (
    ClassificationAccuracy,
    KLDivergence,
    Perplexity,
    RetentionReport,
    Top1Agreement,
    evaluate_retention,
    load_metric,
)
from tests import tiny


@pytest.fixture(scope="module")
def report():
    dataset = tiny.text_dataset(6)
    benchmarks = [Perplexity(dataset), KLDivergence(dataset), Top1Agreement(dataset)]
    student, teacher, baseline = tiny.model(seed=1), tiny.model(seed=2, layers=3), tiny.model(seed=3)
    return evaluate_retention(student, teacher, benchmarks, tiny.tokenizer(), baseline)


def classifier(seed: int, **config):
    return tiny.model("bert", task="sequence_classification", seed=seed, num_labels=3, **config)


def test_a_teacher_keeps_all_of_itself_with_an_interval_of_no_width():
    dataset, teacher = tiny.tokenized_dataset(6), tiny.model(seed=2)

    report = evaluate_retention(teacher, teacher, [Perplexity(dataset), KLDivergence(dataset), Top1Agreement(dataset)])

    perplexity, kl, agreement = report.rows
    assert (perplexity.retention, perplexity.ci_low, perplexity.ci_high) == (1.0, 1.0, 1.0)
    assert (agreement.student, agreement.retention, agreement.ci_low, agreement.ci_high) == (1.0, 1.0, 1.0, 1.0)
    assert (kl.student, kl.teacher, kl.retention, kl.ci_low) == (0.0, 0.0, None, None)
    assert (report.mean_retention, report.mean_ci_low, report.mean_ci_high) == (1.0, 1.0, 1.0)


def test_perplexity_equals_that_of_the_full_logits(report):
    student, tokenizer = tiny.model(seed=1), tiny.tokenizer()
    total, count = 0.0, 0
    for text in tiny.text_dataset(6)["text"]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = student(ids).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1

    row = report.rows[0]
    assert row.student == pytest.approx(math.exp(total / count), rel=1e-5)
    assert row.retention == pytest.approx(row.teacher / row.student)
    assert row.ci_low <= row.retention <= row.ci_high
    assert row.n == 6


def test_the_baseline_is_measured_beside_the_student(report):
    alone = evaluate_retention(
        tiny.model(seed=3), tiny.model(seed=2, layers=3), [KLDivergence(tiny.text_dataset(6))], tiny.tokenizer()
    )

    assert report.rows[1].baseline == pytest.approx(alone.rows[0].student, rel=1e-6)
    assert alone.rows[0].baseline is None


def test_benchmarks_on_one_dataset_share_one_pass():
    student, teacher, dataset = tiny.model(seed=1), tiny.model(seed=2), tiny.tokenized_dataset(6)
    calls = []
    for name, model in (("student", student), ("teacher", teacher)):
        model.register_forward_hook(lambda *_, name=name: calls.append(name))

    benchmarks = [Perplexity(dataset), KLDivergence(dataset), Top1Agreement(dataset)]
    evaluate_retention(student, teacher, benchmarks, measure_footprints=False)

    assert sorted(calls) == ["student", "teacher"]


def test_the_mean_counts_the_rows_that_have_a_retention(report):
    perplexity, _, agreement = report.rows

    assert report.mean_retention == pytest.approx((perplexity.retention + agreement.retention) / 2)
    assert report.mean_ci_low <= report.mean_retention <= report.mean_ci_high


def test_a_report_survives_json(report, tmp_path):
    path = tmp_path / "new" / "report.json"
    report.save(path)

    assert RetentionReport.load(path) == report
    assert RetentionReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report
    assert [item.name for item in path.parent.iterdir()] == ["report.json"]


def test_only_plain_numbers_are_in_a_report(report):
    values = [value for row in report.to_dict()["rows"] for value in row.values()]
    values += [report.mean_retention, report.mean_ci_low, report.mean_ci_high]
    values += [value for item in report.to_dict()["footprints"] for value in item.values()]

    assert {type(value) for value in values} <= {str, bool, int, float, dict, type(None)}


def test_a_report_prints_its_tables_and_the_mean(report):
    text = str(report)

    assert "┃" in text
    assert re.search(r"│ perplexity +│ perplexity \(lower is better\) +│ +6 │", text)
    assert f"Mean retention {100 * report.mean_retention:.1f} % (2 benchmarks, 95 % interval" in text
    assert re.search(r"│ teacher +│ +[\d,]+ │ +[\d.]+ │ +[\d,]+ │ +[\d.]+ │ float32 +│ cpu", text)
    assert "nan" not in text.lower()
    assert "None" not in text


def test_a_report_prints_without_rich_too(report, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    tables = str(report).split("\n\n")

    assert len(tables) == 4
    lines = tables[0].splitlines()
    assert len(lines) == 5
    assert lines[0].split(" | ")[5] == "baseline"
    assert tables[1].startswith("Mean retention ")
    assert tables[2].startswith("| model | parameters |")


def test_several_baselines_are_measured_and_named():
    dataset = tiny.tokenized_dataset(6)
    before, alone = tiny.model(seed=3), tiny.model(seed=4)
    baselines = {"before distillation": before, "cross-entropy only": alone}

    report = evaluate_retention(
        tiny.model(seed=1), tiny.model(seed=2), [Perplexity(dataset), Top1Agreement(dataset)], baseline=baselines
    )

    single = evaluate_retention(alone, tiny.model(seed=2), [Perplexity(dataset), Top1Agreement(dataset)])
    assert report.baselines == list(baselines)
    assert report.rows[0].baselines["cross-entropy only"] == single.rows[0].student
    assert report.rows[0].baseline == report.rows[0].baselines["before distillation"]
    assert report.mean_retention_of("cross-entropy only") == pytest.approx(single.mean_retention)
    assert "| student | before distillation | cross-entropy only | retention |" in report.to_markdown()
    assert [item.model for item in report.footprints] == ["teacher", "student", *baselines]
    assert RetentionReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("baseline", [{"teacher": None}, {"": None}, {}, {1: None}])
def test_baselines_without_a_name_of_their_own_are_refused(baseline):
    with pytest.raises(ValueError, match="`baseline` has the names"):
        evaluate_retention(tiny.model(), tiny.model(), [Perplexity(tiny.tokenized_dataset(1))], baseline=baseline)


def test_a_mean_over_other_benchmarks_than_the_student_is_not_given(report):
    first, *others = report.rows
    rows = (replace(first, baseline=None, baselines={"baseline": None}), *others)

    assert report.mean_retention_of("baseline") is not None
    assert replace(report, rows=rows).mean_retention_of("baseline") is None


def test_a_report_that_an_older_version_saved_is_read(report):
    saved = report.to_dict()
    del saved["footprints"]
    for row in saved["rows"]:
        del row["baselines"], row["license"]

    old = RetentionReport.from_dict(saved)

    assert old.rows == report.rows
    assert old.footprints == ()


def test_a_licence_of_the_items_is_reported():
    dataset = tiny.tokenized_dataset(2)

    report = evaluate_retention(tiny.model(), tiny.model(), [Perplexity(dataset, license="mit")])

    assert report.rows[0].license == "mit"
    assert report.to_markdown().splitlines()[0].endswith("| licence |")


def test_a_broken_student_gives_a_warning_and_no_number():
    student, dataset = tiny.model(seed=1), tiny.tokenized_dataset(4)
    torch.nn.init.constant_(student.lm_head.weight, torch.nan)

    with pytest.warns(UserWarning, match="student's perplexity"):
        report = evaluate_retention(student, tiny.model(seed=2), [Perplexity(dataset)])

    row = report.rows[0]
    assert (row.student, row.retention, row.ci_low, report.mean_retention) == (None, None, None, None)
    json.dumps(report.to_dict(), allow_nan=False)


def test_one_item_has_no_interval():
    report = evaluate_retention(tiny.model(seed=1), tiny.model(seed=2), [Perplexity(tiny.tokenized_dataset(1))])

    assert report.rows[0].retention is not None
    assert (report.rows[0].ci_low, report.mean_ci_low) == (None, None)


def test_accuracy_is_corrected_for_chance_and_agrees_with_the_shipped_metric():
    student, teacher = classifier(1), classifier(2)
    dataset = tiny.classification_dataset(12)
    predictions = {}
    for name, model in (("student", student), ("teacher", teacher)):
        with torch.no_grad():
            predictions[name] = [model(torch.tensor([row["input_ids"]])).logits.argmax().item() for row in dataset]
    # Label as the teacher answers, but for two rows: its accuracy is 10 / 12.
    labels = [p if i > 1 else (p + 1) % 3 for i, p in enumerate(predictions["teacher"])]
    dataset = dataset.remove_columns("labels").add_column("label", labels)

    row = evaluate_retention(student, teacher, [ClassificationAccuracy(dataset)]).rows[0]

    metric = load_metric("accuracy")
    for name, value in (("student", row.student), ("teacher", row.teacher)):
        assert value == metric.compute(predictions=predictions[name], references=labels)["accuracy"]
    assert row.chance == pytest.approx(1 / 3)
    assert row.retention == pytest.approx((row.student - 1 / 3) / (10 / 12 - 1 / 3))


def test_a_classifier_also_has_kl_and_agreement():
    dataset = tiny.classification_dataset(6)

    kl, agreement = evaluate_retention(
        classifier(1), classifier(2), [KLDivergence(dataset), Top1Agreement(dataset)]
    ).rows

    assert kl.student > 0
    assert 0 <= agreement.student <= 1


@pytest.mark.parametrize("benchmarks", [[], Perplexity(tiny.text_dataset(1)), ["perplexity"]])
def test_something_else_than_benchmarks_is_refused(benchmarks):
    with pytest.raises(ValueError, match=r"\[Perplexity\(dataset\)\]"):
        evaluate_retention(tiny.model(), tiny.model(), benchmarks)


def test_two_benchmarks_of_one_name_are_refused():
    with pytest.raises(ValueError, match="twice"):
        evaluate_retention(
            tiny.model(), tiny.model(), [Perplexity(tiny.text_dataset(1)), Perplexity(tiny.text_dataset(2))]
        )


@pytest.mark.parametrize(
    ("benchmark", "model"),
    [
        (ClassificationAccuracy(tiny.classification_dataset(2)), tiny.model()),
        (Perplexity(tiny.classification_dataset(2)), classifier(1)),
    ],
)
def test_a_benchmark_of_another_task_is_refused(benchmark, model):
    with pytest.raises(ValueError, match=f"{type(benchmark).__name__} measures"):
        evaluate_retention(model, model, [benchmark])


@pytest.mark.parametrize("argument", ["batch_size", "max_length"])
def test_sizes_below_one_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` is 0"):
        Perplexity(tiny.text_dataset(1), **{argument: 0})


def test_text_without_a_tokenizer_is_refused_before_any_model_runs():
    teacher = tiny.model()
    teacher.forward = None

    with pytest.raises(ValueError, match="tokenizer=tokenizer"):
        evaluate_retention(tiny.model(), teacher, [Perplexity(tiny.text_dataset(1))])


def test_rows_are_items_and_tokens_are_their_weight():
    short, long = [5, 6], list(range(5, 25))
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)

    together = evaluate_retention(student, teacher, [Perplexity(Dataset.from_dict({"input_ids": [short, long]}))])
    apart = [
        evaluate_retention(student, teacher, [Perplexity(Dataset.from_dict({"input_ids": [ids]}))]).rows[0].student
        for ids in (short, long)
    ]

    expected = math.exp((1 * math.log(apart[0]) + 19 * math.log(apart[1])) / 20)
    assert together.rows[0].student == pytest.approx(expected, rel=1e-5)
