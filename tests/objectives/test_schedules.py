from __future__ import annotations

import pytest

from hf_distill import HiddenStateObjective, LogitObjective
from hf_distill.objectives import cosine, linear, piecewise, warmup


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (linear(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (cosine(1.0, 0.0), [1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0]),
        (warmup(2.0, 0.5), [0.0, 1.0, 2.0, 2.0, 2.0]),
        (piecewise([(0.25, 1.0), (0.75, 3.0)]), [1.0, 1.0, 2.0, 3.0, 3.0]),
    ],
    ids=["linear", "cosine", "warmup", "piecewise"],
)
def test_values_at_every_quarter_of_a_run(schedule, values):
    assert [schedule(i / 4) for i in range(5)] == pytest.approx(values)


def test_an_objective_moves_its_weight_and_its_temperature():
    objective = LogitObjective(linear(0.0, 1.0), temperature=linear(4.0, 1.0))
    assert (objective.weight, objective.temperature) == (0.0, 4.0)
    assert objective.is_ever_trained()
    objective.move(0.5)
    assert (objective.weight, objective.temperature) == (0.5, 2.5)
    assert objective.config()["weight"] == "0 at 0% to 1 at 100% (linear)"


def test_a_number_does_not_move():
    objective = HiddenStateObjective(0.3)
    objective.move(0.5)
    assert objective.weight == objective.config()["weight"] == 0.3
    assert not LogitObjective(0.0).is_ever_trained()


@pytest.mark.parametrize("points", [[], [(0.5, 1.0), (0.5, 2.0)], [(0.0, 1.0), (1.5, 2.0)], [(0.0, float("nan"))]])
def test_points_that_make_no_schedule_are_refused(points):
    with pytest.raises(ValueError, match="schedule has points"):
        piecewise(points)


def test_a_schedule_that_leaves_the_range_is_refused():
    with pytest.raises(ValueError, match="weight"):
        LogitObjective(linear(1.0, -0.5))
    with pytest.raises(ValueError, match="temperature"):
        LogitObjective(temperature=linear(2.0, 0.0))
