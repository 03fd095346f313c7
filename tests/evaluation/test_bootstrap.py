from __future__ import annotations

import numpy as np
import pytest

from hf_distill.evaluation.bootstrap import ItemScores, interval, resampled_means, retention


def scores(values: np.ndarray) -> ItemScores:
    return ItemScores(values.astype(np.float64), np.ones(len(values)))


def test_retention_is_student_over_teacher_where_higher_is_better():
    assert retention(0.6, 0.8, higher_is_better=True) == pytest.approx(0.75)


def test_retention_is_teacher_over_student_where_lower_is_better():
    assert retention(20.0, 10.0, higher_is_better=False) == pytest.approx(0.5)


def test_retention_counts_from_chance():
    assert retention(0.6, 0.9, higher_is_better=True, chance=0.5) == pytest.approx(0.25)
    assert retention(0.5, 0.9, higher_is_better=True, chance=0.5) == 0.0


@pytest.mark.parametrize(
    ("student", "teacher", "rule"),
    [
        (0.1, 0.0, {"higher_is_better": False}),
        (0.6, 0.5, {"higher_is_better": True, "chance": 0.5}),
        (0.6, 0.4, {"higher_is_better": True, "chance": 0.5}),
        (np.inf, 10.0, {"higher_is_better": False}),
        (10.0, np.nan, {"higher_is_better": False}),
    ],
)
def test_retention_that_is_not_defined_is_nan(student, teacher, rule):
    assert np.isnan(retention(student, teacher, **rule))


def test_the_mean_is_weighted_by_tokens():
    assert ItemScores(np.array([1.0, 9.0]), np.array([1.0, 4.0])).mean() == 2.0


def test_means_of_several_columns_are_those_of_each_alone():
    generator = np.random.default_rng(2)
    numerator, weight = generator.random((30, 3)), generator.integers(1, 5, size=30).astype(float)

    [together] = resampled_means([ItemScores(numerator, weight)], resamples=50)

    assert together.shape == (50, 3)
    for column in range(3):
        [alone] = resampled_means([ItemScores(numerator[:, column], weight)], resamples=50)
        np.testing.assert_allclose(together[:, column], alone, rtol=1e-12)
        assert ItemScores(numerator, weight).mean()[column] == pytest.approx(
            ItemScores(numerator[:, column], weight).mean()
        )


def test_a_draw_is_a_mean_over_drawn_items():
    values = np.random.default_rng(3).random(7)
    draw = np.random.default_rng(0).integers(7, size=(20, 7))

    [means] = resampled_means([scores(values)], resamples=20, seed=0)

    np.testing.assert_allclose(means, values[draw].mean(axis=1), rtol=1e-12)


def test_all_models_see_the_same_draws_and_a_seed_repeats_them():
    values = scores(np.random.default_rng(1).normal(size=50))

    first, second = resampled_means([values, values])
    again, _ = resampled_means([values, values])

    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, again)
    assert first.shape == (2000,)
    assert np.std(first) == pytest.approx(np.std(values.numerator) / np.sqrt(50), rel=0.1)


def test_draws_in_blocks_are_complete(monkeypatch):
    monkeypatch.setattr("hf_distill.evaluation.bootstrap.BLOCK", 64)

    [means] = resampled_means([scores(np.arange(10))], resamples=33)

    assert means.shape == (33,)


def test_the_global_random_state_does_not_move():
    before = np.random.get_state()[1].copy()

    resampled_means([scores(np.arange(10))])

    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_the_interval_covers_the_true_retention_in_95_of_100_experiments():
    generator = np.random.default_rng(0)
    items, experiments, covered = 300, 500, 0
    for experiment in range(experiments):
        teacher = generator.random(items) < 0.8
        student = np.where(generator.random(items) < 0.7, teacher, generator.random(items) < 0.5)
        truth = (0.7 * 0.8 + 0.3 * 0.5 - 0.25) / (0.8 - 0.25)
        means = resampled_means([scores(student), scores(teacher)], seed=experiment)
        low, high = interval(retention(*means, higher_is_better=True, chance=0.25))
        covered += low <= truth <= high

    assert 0.93 <= covered / experiments <= 0.97


def test_the_interval_of_a_lower_is_better_metric_covers_too():
    generator = np.random.default_rng(1)
    items, experiments, covered = 200, 500, 0
    for experiment in range(experiments):
        tokens = generator.integers(5, 60, size=items).astype(float)
        document = generator.normal(0, 0.3, size=items)
        nll = {
            name: ItemScores(tokens * (mean + document + generator.normal(0, 0.1, size=items)), tokens)
            for name, mean in (("student", 3.2), ("teacher", 3.0))
        }
        means = resampled_means([nll["student"], nll["teacher"]], seed=experiment)
        low, high = interval(retention(*map(np.exp, means), higher_is_better=False))
        covered += low <= np.exp(-0.2) <= high

    assert 0.93 <= covered / experiments <= 0.97


def test_pairing_narrows_the_interval():
    generator = np.random.default_rng(0)
    teacher = generator.gamma(2.0, size=200)
    student = teacher + 0.01 * generator.random(200)
    widths = []
    for other in (teacher, generator.permutation(teacher)):
        low, high = interval(retention(*resampled_means([scores(student), scores(other)]), higher_is_better=False))
        widths.append(high - low)

    assert widths[0] < widths[1] / 10


def test_an_interval_with_an_undefined_draw_is_not_given():
    assert interval(np.array([0.9, np.nan, 1.0])) == (None, None)
    assert interval(np.ones(10)) == (1.0, 1.0)
