from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_distill.evaluation import ExpectedCalibrationError, evaluate_retention
from hf_distill.evaluation.scoring import _Accumulator
from tests import tiny


def naive(model, dataset, *, shift: bool, bins: int = 15) -> float:
    """From full probabilities, position by position."""
    confidences, hits = [], []
    for row in dataset:
        with torch.no_grad():
            probabilities = model(torch.tensor([row["input_ids"]])).logits[0].double().softmax(-1)
        labels = torch.atleast_1d(torch.tensor(row["labels"]))
        probabilities = torch.atleast_2d(probabilities)
        if shift:
            probabilities, labels = probabilities[:-1], labels[1:]
        kept = labels != -100
        confidence, answer = probabilities[kept].max(-1)
        confidences += confidence.tolist()
        hits += (answer == labels[kept]).tolist()
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.digitize(confidences, edges, right=True)
    gaps = [abs(np.sum((np.array(hits) - np.array(confidences))[place == b])) for b in range(bins)]
    return sum(gaps) / len(hits)


def half_right(model, dataset, *, shift: bool):
    """Labels that the model ranks first, at every other position: gaps of both signs."""

    def relabel(row, index):
        with torch.no_grad():
            first = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        if not shift:
            return {"labels": first if index % 2 else row["labels"]}
        return {"labels": [label if i % 2 else [-100, *first][i] for i, label in enumerate(row["labels"])]}

    return dataset.map(relabel, with_indices=True)


def test_gaps_fall_into_bins_of_equal_width_that_are_open_on_the_left():
    confidence = torch.tensor([0.0, 0.05, 1 / 15, 0.1, 0.95, 1.0, 0.97], dtype=torch.float64)
    correct = torch.tensor([0, 1, 0, 1, 0, 1, 1], dtype=torch.float64)
    row = torch.tensor([0, 0, 0, 1, 1, 1, 0])
    accumulator = _Accumulator(2)

    accumulator.add(row, torch.stack([*torch.zeros(3, 7, dtype=torch.float64), correct, confidence, correct]))

    gaps = accumulator.result().gaps
    expected = np.zeros((2, 15))
    expected[0, 0], expected[0, 14] = -0.0 + 0.95 - 1 / 15, 0.03
    expected[1, 1], expected[1, 14] = 0.9, -0.95 + 0.0
    np.testing.assert_allclose(gaps, expected, atol=1e-12)


def test_it_is_the_gap_of_accuracy_and_confidence_in_bins():
    # A sharp head, so that confidences are in many bins.
    student, teacher = tiny.model(seed=1, initializer_range=0.6), tiny.model(seed=2, initializer_range=0.3)
    dataset = half_right(student, tiny.tokenized_dataset(20), shift=True)

    row = evaluate_retention(student, teacher, [ExpectedCalibrationError(dataset)], measure_footprints=False).rows[0]

    assert row.student == pytest.approx(naive(student, dataset, shift=True), rel=1e-4)
    assert row.student != pytest.approx(naive(student, dataset, shift=True, bins=14), rel=1e-4)
    assert row.teacher == pytest.approx(naive(teacher, dataset, shift=True), rel=1e-4)
    assert row.retention == pytest.approx(row.teacher / row.student)


def test_classifiers_have_it_too():
    task = {"task": "sequence_classification", "num_labels": 3, "initializer_range": 0.5}
    student, teacher = tiny.model("bert", seed=1, **task), tiny.model("bert", seed=2, **task)
    dataset = half_right(student, tiny.classification_dataset(20), shift=False)

    row = evaluate_retention(student, teacher, [ExpectedCalibrationError(dataset)], measure_footprints=False).rows[0]

    assert row.student == pytest.approx(naive(student, dataset, shift=False), rel=1e-4)
    assert row.n == 20


def test_a_model_keeps_its_own_calibration_with_an_interval_of_no_width():
    teacher = tiny.model(seed=2)

    report = evaluate_retention(teacher, teacher, [ExpectedCalibrationError(tiny.tokenized_dataset(9))])

    assert (report.rows[0].retention, report.rows[0].ci_low, report.rows[0].ci_high) == (1.0, 1.0, 1.0)


def test_a_broken_student_has_none():
    student = tiny.model(seed=1)
    torch.nn.init.constant_(student.lm_head.weight, torch.nan)

    with pytest.warns(UserWarning, match="student's ece"):
        row = evaluate_retention(student, tiny.model(), [ExpectedCalibrationError(tiny.tokenized_dataset(4))]).rows[0]

    assert (row.student, row.retention) == (None, None)
