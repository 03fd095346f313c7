from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_distill.cards import Dataset, DistillationCard, Loss, Table, installed_versions, is_hub_id, render_card
from hf_distill.evaluation import Footprint, RetentionReport, RetentionRow


def row(benchmark="perplexity", metric="perplexity", *, higher=False, chance=0.0, n=500, **values):
    empty = dict.fromkeys(["teacher", "student", "baseline", "retention", "ci_low", "ci_high"])
    return RetentionRow(benchmark, metric, higher, chance, n, **(empty | values))


REPORT = RetentionReport(
    rows=(
        row(teacher=128.94, student=158.2, baseline=1_100_000.0, retention=0.815, ci_low=0.79, ci_high=0.84),
        row("kl", "kl", teacher=0.0, student=1.28, baseline=11.5),
        row(
            "reviews",
            "accuracy",
            higher=True,
            chance=0.5,
            n=200,
            teacher=0.9,
            student=0.85,
            baseline=0.5,
            retention=0.875,
        ),
    ),
    mean_ci_low=0.82,
    mean_ci_high=0.87,
)
FULL = DistillationCard(
    name="half-smol",
    repo_id="someone/half-smol",
    teacher="HuggingFaceTB/SmolLM2-135M-Instruct",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    student="20 of its 30 layers",
    language="en",
    license="apache-2.0",
    teacher_license="apache-2.0",
    teacher_quantization="nf4",
    losses=[Loss("cross-entropy", 0.5), Loss("forward_kl", 0.5, {"temperature": 2.0}, "1503.02531")],
    datasets=[Dataset("org/reviews", "mit", "18,000 snippets"), Dataset("own notes", None, None)],
    tokens=123_000,
    steps=120,
    seed=0,
    hyperparameters={"learning_rate": 3e-4, "warmup": None},
    report=REPORT,
    baseline="the student before distillation",
    evaluation_data="500 held-out reviews",
    comparison=Table(
        ["model", "perplexity", "speed"], [["teacher", 128.94, None], ["student", math.nan, None]], "Lower."
    ),
    measurements=Table(["model", "parameters"], [["teacher", 134_515_008], ["student", 99_000_000]]),
    commands=["python recipes/quickstart.py --seed 0"],
    versions={"torch": "2.13.0", "transformers": "5.23.0"},
    notes=["Written for short informal English."],
    tags=["smollm"],
)


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_everything_that_is_known_is_written():
    text = render_card(FULL)

    assert sections(text) == [
        *("Retention", "Comparison", "Size and speed", "Reproduce", "Use", "How it was trained", "Data", "Licences"),
        "Limits",
    ]
    for part in (
        "**Keeps 84.5 % of its teacher (mean of 2 benchmarks, 95 % interval 82.0 to 87.0 %, 200 to 500 items each).**",
        "| perplexity | perplexity (lower is better) | 500 | 128.9 | 158.2 | 1,100,000 | 81.5 % | 79.0 to 84.0 % |",
        "accuracy (chance 0.5)",
        "Compared with the student before distillation.",
        "20 of its 30 layers",
        "| forward_kl | 0.5 | temperature=2 | [arXiv:1503.02531](https://arxiv.org/abs/1503.02531) |",
        "| training tokens | 123,000 |",
        "| seed | 0 |",
        "[org/reviews](https://huggingface.co/datasets/org/reviews)",
        'pipeline("text-generation", model="someone/half-smol")',
        "python recipes/quickstart.py --seed 0",
        "torch 2.13.0, transformers 5.23.0.",
        "- Written for short informal English.",
        "inherits the errors and biases of its teacher",
    ):
        assert part in text


def test_the_hub_reads_the_metadata():
    data = ModelCard(render_card(FULL)).data

    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.base_model_relation == "finetune"
    assert (data["library_name"], data.pipeline_tag) == ("transformers", "text-generation")
    assert {"distillation", "knowledge-distillation", "smollm"} <= set(data.tags)
    assert (data.license, data.datasets) == ("apache-2.0", ["org/reviews"])
    assert data.distillation["teacher"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.distillation["losses"][1] == {"name": "forward_kl", "weight": 0.5, "temperature": 2.0}
    assert data.distillation["mean_retention"] == REPORT.mean_retention


def test_the_model_index_holds_what_the_report_holds():
    results = ModelCard(render_card(FULL)).data.eval_results

    values = {(item.dataset_name, item.metric_type): item.metric_value for item in results}
    assert values == {
        ("500 held-out reviews", "perplexity"): 158.2,
        ("500 held-out reviews", "kl"): 1.28,
        ("reviews", "accuracy"): 0.85,
        ("500 held-out reviews", "retention"): 0.815,
        ("reviews", "retention"): 0.875,
    }


@pytest.mark.parametrize("data", [FULL, DistillationCard(name="s", teacher="t")])
def test_a_card_survives_reading_and_writing(data):
    text = render_card(data)
    card = ModelCard(text)

    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    assert str(card).rstrip() == text.rstrip()


def test_what_is_not_known_is_not_written():
    text = render_card(DistillationCard(name="student", teacher="org/teacher"))

    assert sections(text) == ["Licences", "Limits"]  # which are unknown
    assert "Keeps" not in text
    assert "\n\n\n" not in text
    assert set(yaml.safe_load(text.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags", "distillation"}


def test_columns_and_rows_that_hold_nothing_are_left_out():
    text = render_card(FULL)

    assert "| model | perplexity |\n" in text
    assert "| student |  |" in text
    assert "warmup" not in text


def test_a_report_without_a_retention_has_no_headline():
    report = RetentionReport(rows=(row("kl", "kl", teacher=0.0, student=1.28),))

    text = render_card(DistillationCard(name="student", teacher="org/teacher", report=report))

    assert "Keeps" not in text
    assert "| kl | kl (lower is better) | 500 | 0 | 1.28 |" in text


def test_one_benchmark_is_named_in_the_headline():
    report = RetentionReport(rows=(REPORT.rows[0],), mean_ci_low=0.79, mean_ci_high=0.84)

    text = render_card(DistillationCard(name="student", teacher="org/teacher", report=report))

    assert "**Keeps 81.5 % of its teacher (perplexity, 95 % interval 79.0 to 84.0 %, 500 items).**" in text


def test_the_plots_stand_where_their_figures_do():
    sizes = (Footprint("student", 99_000_000, 198_000_000, 1231.0, 210_000_000, "bfloat16", "cpu, 1 thread"),)
    report = RetentionReport(REPORT.rows, footprints=sizes)
    text = render_card(DistillationCard("s", "t", report=report, plots=["retention.png", "tradeoff.png"]))

    assert "\n\n![Retention on every benchmark](retention.png)\n\nRetention is" in text
    assert text.index("## Size and speed") < text.index("\n\n![Retention against size](tradeoff.png)\n\n")
    assert "![" not in render_card(FULL)


def test_measured_sizes_are_written_unless_a_table_is_given():
    sizes = (Footprint("teacher", 134_515_008, 269_030_016, 895.4, 300_000_000, "bfloat16", "cpu"),)
    report = RetentionReport(REPORT.rows, footprints=sizes)

    text = render_card(DistillationCard("s", "t", report=report))
    own = render_card(DistillationCard("s", "t", report=report, measurements=FULL.measurements))

    assert "## Size and speed\n\n| model | parameters | weights (MB) | tokens/s |" in text
    assert "| teacher | 134,515,008 | 269 | 895 | 300 | bfloat16 | cpu |" in text
    assert "weights (MB)" not in own


def test_several_baselines_have_a_column_each():
    baselines = {"before distillation": 0.5, "labels alone": 0.8}
    values = {"teacher": 0.9, "student": 0.85, "retention": 0.94, "baselines": baselines}
    report = RetentionReport((row("reviews", "accuracy", higher=True, **values),))

    text = render_card(DistillationCard("s", "t", report=report))

    assert "| teacher | student | before distillation | labels alone | retention |" in text
    assert "| 0.9 | 0.85 | 0.5 | 0.8 | 94.0 % |" in text


def test_folders_are_named_and_never_located(tmp_path):
    folder = tmp_path / "big-teacher"
    folder.mkdir()

    text = render_card(
        DistillationCard(
            name="student",
            teacher=str(folder),
            base_model=str(folder),
            commands=[f"python {tmp_path}/run.py --teacher {folder}"],
            notes=[f"Read {tmp_path / 'gone' / 'notes.txt'} first."],
        )
    )

    assert str(tmp_path) not in text
    assert "base_model" not in text
    assert "teacher: big-teacher" in text
    assert "python run.py --teacher big-teacher" in text
    assert "Read notes.txt first." in text


def test_a_folder_in_the_working_directory_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "runs" / "student").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    text = render_card(DistillationCard(name="x", teacher="runs/student", base_model="runs/student"))

    assert "runs/student" not in text
    assert "starts from student." in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai-community/gpt2", True),
        ("gpt2", False),
        ("org/name-1.5_b", True),
        ("a/b/c", False),
        ("./name", False),
        ("~/name", False),
        ("a description", False),
        ("", False),
        (None, False),
    ],
)
def test_hub_ids_are_told_from_paths_and_descriptions(name, expected):
    assert is_hub_id(name) is expected


def test_an_adapter_says_so():
    text = render_card(DistillationCard(name="a", teacher="org/teacher", base_model="org/base", adapter=True))

    data = ModelCard(text).data
    assert (data["library_name"], data.base_model, data.base_model_relation) == ("peft", "org/base", "adapter")
    assert "A PEFT adapter distilled" in text


@pytest.mark.parametrize(
    ("license_name", "expected"),
    [("MIT", {"license": "mit"}), ("Acme Licence 2", {"license": "other", "license_name": "acme-licence-2"})],
)
def test_a_licence_that_the_hub_does_not_know_is_declared_as_other(license_name, expected):
    metadata = yaml.safe_load(render_card(DistillationCard("s", "t", license=license_name)).split("---\n")[1])

    assert {key: value for key, value in metadata.items() if key.startswith("license")} == expected


def test_the_headline_is_followed_by_what_it_is_weighed_against():
    sizes = {"teacher": (400, 100.0), "student": (300, 125.0)}
    report = replace(
        REPORT,
        rows=tuple(replace(row, baseline=None, baselines={"before": 0.4, "labels": None}) for row in REPORT.rows[:1]),
        footprints=tuple(
            Footprint(name, 1, size, speed, None, "bf16", "cpu") for name, (size, speed) in sizes.items()
        ),
    )

    lines = render_card(replace(FULL, report=report)).splitlines()

    place = next(index for index, line in enumerate(lines) if line.startswith("**Keeps"))
    kept = report.mean_retention_of("before")
    assert lines[place + 1] == (
        f"On the same items: before {100 * kept:.1f} %. Its weights take 75.0 % of the teacher's megabytes, and it "
        "reads 1.25 times as many tokens per second."
    )
    alone = replace(report, rows=tuple(replace(row, baselines={}) for row in report.rows), footprints=())
    assert "On the same items" not in render_card(replace(FULL, report=alone))


def test_licences_that_nobody_gave_are_unknown_where_there_is_a_teacher():
    assert "| teacher | unknown |" in render_card(DistillationCard("s", "t"))
    assert "Licences" not in render_card(DistillationCard("s"))


def test_an_unknown_licence_beside_a_known_one_says_unknown():
    text = render_card(DistillationCard("s", "t", teacher_license="llama3.1"))

    assert "| student | unknown |" in text
    assert "| teacher | llama3.1 |" in text


def test_classifiers_are_trained_on_rows_and_classify():
    data = DistillationCard("s", "t", task="sequence_classification", tokens=4000)

    text = render_card(data)

    assert "| training rows | 4,000 |" in text
    assert ModelCard(text).data.pipeline_tag == "text-classification"


def test_a_missing_value_in_the_given_text_is_refused():
    with pytest.raises(ValueError, match="missing value"):
        render_card(DistillationCard("s", "t", notes=["learning rate None"]))


def test_a_pipe_in_a_name_does_not_break_a_table():
    text = render_card(DistillationCard("s", "t", measurements=Table(["model", "size"], [["a|b", 3]])))

    assert r"| a\|b | 3 |" in text


def test_versions_of_installed_libraries_are_found():
    versions = installed_versions()

    assert {"hf-distill", "transformers", "torch"} <= set(versions)
