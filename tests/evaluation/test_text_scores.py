from __future__ import annotations

import pytest

from hf_distill.evaluation.text_scores import exact_match, rouge


@pytest.mark.parametrize(("prediction", "expected"), [("four", 1.0), (" four\n", 1.0), ("Four", 0.0), ("", 0.0)])
def test_exact_match_ignores_white_space_around(prediction, expected):
    assert exact_match(prediction, "four") == expected


# What rouge_score 0.1.2 gives without a stemmer.
@pytest.mark.parametrize(
    ("prediction", "reference", "one", "two", "longest"),
    [
        ("", "the cat", 0.0, 0.0, 0.0),
        ("the cat", "the cat", 1.0, 1.0, 1.0),
        ("the the the", "the cat", 0.4, 0.0, 0.4),
        ("police killed the gunman", "police kill the gunman", 0.75, 1 / 3, 0.75),
        ("the gunman kill police", "police kill the gunman", 1.0, 1 / 3, 0.5),
        (
            "A well-known, U.S. film!",
            "the well known us film",
            0.5454545454545454,
            0.2222222222222222,
            0.5454545454545454,
        ),
    ],
)
def test_rouge_is_that_of_the_usual_library(prediction, reference, one, two, longest):
    assert rouge(prediction, reference, "rouge1") == pytest.approx(one)
    assert rouge(prediction, reference, "rouge2") == pytest.approx(two)
    assert rouge(prediction, reference, "rougeL") == pytest.approx(longest)
