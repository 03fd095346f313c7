from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import f1_score

from hf_distill.evaluation import ClassificationAccuracy, ClassificationF1, evaluate_retention
from hf_distill.evaluation.scoring import Lineup
from tests import tiny


CLASSES = 3


def classifier(seed: int, labels: int = CLASSES):
    return tiny.model("bert", task="sequence_classification", seed=seed, num_labels=labels, initializer_range=0.5)


def answers(model, dataset) -> list[int]:
    with torch.no_grad():
        return [model(torch.tensor([row["input_ids"]])).logits.argmax().item() for row in dataset]


def measure(student, teacher, benchmark):
    return evaluate_retention(student, teacher, [benchmark], measure_footprints=False)


def test_f1_is_that_of_scikit_learn_in_every_bootstrap_draw():
    dataset, student, teacher = tiny.classification_dataset(40), classifier(1), classifier(2)
    benchmark = ClassificationF1(dataset)
    lineup = Lineup({"student": student, "teacher": teacher})
    predicted, gold = np.array(answers(student, dataset)), np.array(dataset["labels"])

    with torch.no_grad():
        scores = benchmark.score(lineup)["student"]

    assert len(set(predicted)) > 1
    assert benchmark.value(scores.mean()) == pytest.approx(f1_score(gold, predicted, average="macro"))
    for seed in range(20):
        draw = np.random.default_rng(seed).integers(40, size=6)  # so few that classes are missing
        value = benchmark.value(scores.numerator[draw].mean(axis=0))
        assert value == pytest.approx(f1_score(gold[draw], predicted[draw], average="macro"))


def trained(rows: Dataset, labels: list[int]):
    """A classifier that has learned the labels of rows by their first token."""
    model = tiny.model("bert", task="sequence_classification", num_labels=2).train()
    inputs, gold = torch.tensor(rows["input_ids"]), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(40):
            model(input_ids=inputs, labels=gold).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def test_a_classifier_trained_on_shuffled_labels_keeps_nothing():
    ids = np.random.default_rng(0).integers(10, 70, size=(600, 3))
    labels = (ids[:, 0] >= 40).astype(int)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "label": labels.tolist()})
    train, test = rows.select(range(300)), rows.select(range(300, 600))
    teacher = trained(train, train["label"])
    student = trained(train, np.random.default_rng(1).permutation(train["label"]).tolist())

    accuracy, f1 = evaluate_retention(student, teacher, [ClassificationAccuracy(test), ClassificationF1(test)]).rows

    assert accuracy.teacher > 0.85
    for row in (accuracy, f1):
        assert abs(row.retention) < 0.2
        assert row.ci_low < 0.1
        assert row.ci_high < 0.5


def test_the_chance_of_f1_is_what_random_answers_reach():
    dataset = tiny.classification_dataset(40).map(lambda row, i: {"labels": min(i % 5, 2)}, with_indices=True)
    benchmark = ClassificationF1(dataset)
    gold = np.array(dataset["labels"])
    generator = np.random.default_rng(0)
    many = np.tile(gold, 2000)

    chance = benchmark.chance(Lineup({"student": classifier(1), "teacher": classifier(2)}))

    guessed = f1_score(many, generator.integers(CLASSES, size=len(many)), average="macro")
    assert chance == pytest.approx(guessed, abs=0.01)
    assert chance < 1 / CLASSES


@pytest.mark.parametrize("kind", [ClassificationAccuracy, ClassificationF1])
def test_a_chance_level_may_be_given(kind):
    report = measure(classifier(1), classifier(2), kind(tiny.classification_dataset(9), chance=0.1))

    assert report.rows[0].chance == 0.1


@pytest.mark.parametrize("chance", [1.0, -0.1, float("nan")])
def test_a_chance_level_that_is_none_is_refused(chance):
    with pytest.raises(ValueError, match="`chance` is"):
        ClassificationAccuracy(tiny.classification_dataset(3), chance=chance)


def test_uneven_labels_with_an_even_chance_level_are_warned_of():
    uneven = tiny.classification_dataset(10).map(lambda row, i: {"labels": int(i == 0)}, with_indices=True)

    with pytest.warns(UserWarning, match=r"reaches 0.9 on 'accuracy'.*chance=0.9"):
        measure(classifier(1), classifier(2), ClassificationAccuracy(uneven))
    with pytest.warns(UserWarning, match="one class; add rows"):
        measure(classifier(1), classifier(2), ClassificationAccuracy(uneven.select(range(1, 5))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassificationAccuracy(uneven, chance=0.9).check(Lineup({"student": classifier(1), "teacher": classifier(2)}))
        even = ClassificationAccuracy(tiny.classification_dataset(9))
        even.check(Lineup({"student": classifier(1), "teacher": classifier(2)}))


def test_a_broken_classifier_has_no_f1():
    student = classifier(1)
    torch.nn.init.constant_(student.classifier.weight, torch.nan)

    with pytest.warns(UserWarning, match="student's f1"):
        row = measure(student, classifier(2), ClassificationF1(tiny.classification_dataset(9))).rows[0]

    assert (row.student, row.retention) == (None, None)
