"""The metrics that the package ships for the `evaluate` library."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from hf_distill.evaluation import load_metric
from hf_distill.evaluation.text_scores import ROUGE_KINDS, rouge


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="accuracy, exact_match, f1, rouge"):
        load_metric("bleu")


def test_accuracy_takes_arrays():
    values = {"predictions": np.array([0, 1, 2]), "references": np.array([0, 1, 1])}

    assert load_metric("accuracy").compute(**values) == {"accuracy": pytest.approx(2 / 3)}


def test_f1_is_the_macro_f1_of_scikit_learn():
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(4, size=50), generator.integers(1, 5, size=50)

    value = load_metric("f1").compute(predictions=predictions, references=references)["f1"]

    assert value == pytest.approx(f1_score(references, predictions, average="macro"))


def test_texts_are_scored_as_benchmarks_score_them():
    predictions, references = ["the cat sat", "two"], ["the cat ran", " two "]

    assert load_metric("exact_match").compute(predictions=predictions, references=references) == {"exact_match": 0.5}
    scores = load_metric("rouge").compute(predictions=predictions, references=references)
    assert scores == {
        kind: pytest.approx((rouge(predictions[0], references[0], kind) + rouge("two", "two", kind)) / 2)
        for kind in ROUGE_KINDS
    }
