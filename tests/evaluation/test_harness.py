"""lm-eval tasks; what needs lm-eval itself is skipped where it is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.evaluation import LMEvalTask, evaluate_retention
from hf_distill.teachers import ModelTeacher
from tests import tiny


CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
num_fewshot: {shots}
fewshot_split: test
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["."], do_sample: false}}
filter_list:
  - {{name: first, filter: [{{function: take_first}}]}}
  - {{name: lower, filter: [{{function: lowercase}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
TASKS = {"choice": (CHOICE, 0), "fewshot": (CHOICE, 2), "rolling": (ROLLING, 0), "generate": (GENERATE, 0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tasks on 24 documents of two to four choices."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    generator = np.random.default_rng(0)
    words = " ".join(tiny.SENTENCES).split()
    documents = []
    for i in range(24):
        choices = [" " + " ".join(generator.choice(words, size=1 + (i + j) % 3)) for j in range(2 + i % 3)]
        question = " ".join(generator.choice(words, size=3 + i % 5))
        documents.append({"question": question, "choices": choices, "answer": int(generator.integers(len(choices)))})
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, (text, shots) in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data, shots=shots))
    return folder


def models():
    return tiny.model(seed=1, initializer_range=0.3), tiny.model(seed=2, layers=3, initializer_range=0.3)


@pytest.mark.slow  # the command line reads all its tasks each time
def test_values_are_those_of_the_command_line_to_the_last_digit(folder, tmp_path):
    metrics = {
        "choice": ["acc", "acc_norm"],
        "fewshot": ["acc", "acc_norm"],
        "rolling": ["word_perplexity", "bits_per_byte"],
        "generate": ["exact_match,first", "exact_match,lower"],
    }
    student, teacher = models()
    tokenizer = tiny.tokenizer()
    benchmarks = [
        LMEvalTask(folder / f"{task}.yaml", metric=metric) for task, names in metrics.items() for metric in names
    ]

    report = evaluate_retention(student, teacher, benchmarks, tokenizer, measure_footprints=False)

    for role, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
        files = [str(folder / f"{task}.yaml") for task in metrics]
        # One process as a user would start it.
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
        command += ["--model_args", f"pretrained={tmp_path / role},dtype=float32", "--tasks", ",".join(files)]
        subprocess.run([*command, "--output_path", str(tmp_path / f"{role}.json")], check=True, capture_output=True)
        [written] = tmp_path.glob(f"**/{role}*.json")
        results = json.loads(written.read_text())["results"]
        for row in report.rows:
            key = row.metric if "," in row.metric else f"{row.metric},none"
            assert getattr(row, role) == results[row.benchmark][key], (role, row.benchmark, key)
    assert {row.n for row in report.rows} == {24}


def test_a_model_keeps_all_of_itself_and_chance_is_that_of_the_choices(folder):
    student, _ = models()

    report = evaluate_retention(student, ModelTeacher(student), [LMEvalTask(folder / "choice.yaml")], tiny.tokenizer())

    row = report.rows[0]
    assert row.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert (row.metric, row.benchmark, row.student) == ("acc", "choice", row.teacher)
    if row.retention is not None:
        assert (row.retention, row.ci_low, row.ci_high) == (1.0, 1.0, 1.0)


def test_one_run_serves_all_metrics_of_a_task(folder, monkeypatch):
    import lm_eval

    runs, inner = [], lm_eval.simple_evaluate
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: (runs.append(1), inner(**options))[1])
    task = folder / "choice.yaml"

    report = evaluate_retention(
        *models(), [LMEvalTask(task, metric=metric, limit=6) for metric in ("acc", "acc_norm")], tiny.tokenizer()
    )

    assert len(runs) == 2
    assert [row.n for row in report.rows] == [6, 6]


def test_everything_is_given_back(folder):
    student, teacher = models()
    student.train()
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "right", None
    state = torch.get_rng_state(), np.random.get_state()[1].copy()

    evaluate_retention(student, teacher, [LMEvalTask(folder / "generate.yaml")], tokenizer)

    assert student.training
    assert not teacher.training
    assert torch.equal(torch.get_rng_state(), state[0])
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)


def test_names_are_found_in_a_folder_and_groups_are_pooled(folder, monkeypatch):
    from hf_distill.evaluation import harness

    (folder / "both.yaml").write_text("group: both\ntask: [choice, fewshot]\n")
    # lm-eval's own tasks take many seconds to index.
    inner = harness._manager
    monkeypatch.setattr(harness, "_manager", lambda path, defaults: inner(path, False))
    student, teacher = models()

    report = evaluate_retention(
        student,
        teacher,
        [LMEvalTask(name, metric="acc", include_path=folder) for name in ("both", "choice", "fewshot")],
        tiny.tokenizer(),
        measure_footprints=False,
    )

    both, choice, fewshot = report.rows
    assert both.n == 48
    assert both.student == pytest.approx((choice.student + fewshot.student) / 2)
    with pytest.raises(ValueError, match="`task` is 'chioce'"):
        LMEvalTask("chioce", include_path=folder)


@pytest.mark.parametrize("metric", ["f1", "bleu"])
def test_a_metric_that_is_no_mean_over_documents_is_refused(folder, tmp_path, metric):
    more = "  - {metric: f1, aggregation: f1, higher_is_better: true}\n"
    (tmp_path / "task.yaml").write_text((folder / "choice.yaml").read_text() + more)

    with pytest.raises(ValueError, match=r"expected one of \['acc', 'acc_norm'\]"):
        LMEvalTask(tmp_path / "task.yaml", metric=metric)


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(ValueError, match="no such file"):
        LMEvalTask(folder / "nothing.yaml")
    with pytest.raises(ValueError, match=r"filters \['first', 'lower'\]"):
        evaluate_retention(
            *models(), [LMEvalTask(folder / "generate.yaml", metric="exact_match,last")], tiny.tokenizer()
        )
    with pytest.raises(ValueError, match="`tokenizer` is None"):
        evaluate_retention(*models(), [LMEvalTask(folder / "choice.yaml")])


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    with pytest.raises(ImportError, match=r"hf_distill\[lm-eval\]"):
        LMEvalTask("arc_easy")
