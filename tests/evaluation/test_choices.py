"""Multiple choice by likelihood, against the naive way, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from hf_distill.evaluation import MultipleChoice, Perplexity, compare_retention, evaluate_retention
from tests import tiny


ITEMS = Dataset.from_list(
    [
        {"context": sentence[:12], "choices": [sentence[12:], " is four.", " noisy trailer"], "answer": i % 3}
        for i, sentence in enumerate(tiny.SENTENCES * 2)
        if len(sentence) > 12
    ]
)


@torch.no_grad()
def likeliest(model, tokenizer, item) -> int:
    means = []
    for choice in item["choices"]:
        context, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item["context"], choice))
        logits = model(input_ids=torch.tensor([context + ids])).logits[0].log_softmax(-1)
        means.append(sum(logits[len(context) + i - 1, token].item() for i, token in enumerate(ids)) / len(ids))
    return max(range(len(means)), key=means.__getitem__)


def test_the_likeliest_choice_is_that_of_one_row_at_a_time():
    tokenizer, models = tiny.tokenizer(), [tiny.model("llama", seed=seed, initializer_range=0.3) for seed in (0, 1)]
    report = evaluate_retention(*models, [MultipleChoice(ITEMS, batch_size=5)], tokenizer, measure_footprints=False)
    right = [[likeliest(model, tokenizer, item) == item["answer"] for item in ITEMS] for model in models]
    assert [report.rows[0].student, report.rows[0].teacher] == [sum(found) / len(ITEMS) for found in right]
    assert report.rows[0].chance == pytest.approx(1 / 3)
    assert right[0] != right[1]


def test_students_that_are_compared_together_get_the_reports_that_each_gets_alone():
    tokenizer, teacher = tiny.tokenizer(), tiny.model("llama", seed=9)
    students = {f"seed {seed}": tiny.model("llama", seed=seed) for seed in (0, 1)}
    benchmarks = [Perplexity(tiny.tokenized_dataset(6)), MultipleChoice(ITEMS)]
    together = compare_retention(students, teacher, benchmarks, tokenizer)
    for name, student in students.items():
        assert together[name] == evaluate_retention(student, teacher, benchmarks, tokenizer, measure_footprints=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"context": "a", "choices": ["b", "c"]}], r"expected \['answer', 'choices', 'context'\]"),
        ([{"context": "a", "choices": ["b"], "answer": 0}], "expected one number, at least 2"),
        ([{"context": "a", "choices": ["b", "c"], "answer": 2}], "`answer` goes to 2; expected 0 to 1"),
    ],
)
def test_rows_that_are_no_choice_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        MultipleChoice(Dataset.from_list(rows))


def test_a_tokenizer_is_asked_for():
    model = tiny.model("llama")
    with pytest.raises(ValueError, match="pass `tokenizer=`"):
        evaluate_retention(model, model, [MultipleChoice(ITEMS)])
