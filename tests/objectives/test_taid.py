from __future__ import annotations

import math

import pytest
import torch

from hf_distill.functional import LMHead
from hf_distill.objectives import LogitObjective, logit_loss
from hf_distill.objectives.taid import TAIDInterpolation
from hf_distill.signals import Projection, StudentSignals, TeacherSignals


LOSSES = [5.0, 4.0, 4.5, 3.0, 2.5, 2.6, 2.0, 1.5, 1.4, 1.0]


def run(interpolation, losses, first=0, steps=10):
    """The t of every step of a run, or of a part of it."""
    values = []
    for step, loss in enumerate(losses, start=first):
        interpolation.move(step / (steps - 1))
        values.append(interpolation.value)
        interpolation.observe(loss, steps)
    return values


def written_out(losses, start, end, alpha, momentum):
    """The authors' loop, with the line at the place of every step."""
    t, average, previous, values = start, 0.0, None, []
    for step, loss in enumerate(losses):
        t = min(end, max(t, start + (end - start) * step / (len(losses) - 1)))
        values.append(t)
        if previous is not None:
            average = momentum * average + (1 - momentum) * (previous - loss) / (previous + 1e-15)
            t = t + alpha / (1 + math.exp(-average)) * (1 - t)
        previous = loss
    return values


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("end", [1.0, 0.8])
def test_t_follows_the_rule_of_the_paper(alpha, end):
    settings = {"t_start": 0.3, "t_end": end, "alpha": alpha, "momentum": 0.5}
    assert run(TAIDInterpolation(**settings), LOSSES) == pytest.approx(written_out(LOSSES, 0.3, end, alpha, 0.5))


def test_t_never_falls_and_ends_at_its_end():
    losses = [1.0, 9.0, 0.5, 80.0, 1.0, 1.0, 7.0, 1.0, 2.0, 1.0]
    values = run(TAIDInterpolation(alpha=0.3, momentum=0.0), losses, steps=1000)  # where the line hardly rises
    assert values == sorted(values)
    assert values[0] == 0.4
    assert run(TAIDInterpolation(alpha=0.3), losses)[-1] == 1.0


def test_a_loss_that_leaps_up_from_nearly_nothing_leaves_t_where_it_is():
    values = run(TAIDInterpolation(alpha=0.3), [1.0, 1e-9, 5.0, 5.0], steps=10**9)
    assert values[3] == pytest.approx(values[2])


def test_a_falling_loss_moves_t_faster_than_a_rising_one():
    settings = {"alpha": 0.3, "momentum": 0.0}
    falling = run(TAIDInterpolation(**settings), [8.0, 4.0, 2.0, 1.0], steps=100)
    rising = run(TAIDInterpolation(**settings), [1.0, 2.0, 4.0, 8.0], steps=100)
    assert falling[:2] == rising[:2]  # the first loss is only kept
    assert falling[2] > rising[2]


def test_steps_are_longer_in_short_runs_and_the_authors_in_long_ones():
    for steps, alpha in ((5, 1.0), (100, 0.1), (20_000, 5e-4), (10**6, 5e-4)):
        before = 0.4 + 0.6 / (steps - 1)
        expected = max(before + alpha * 0.5 * (1 - before), 0.4 + 0.6 * 2 / (steps - 1))
        assert run(TAIDInterpolation(), [1.0, 1.0, 1.0], steps=steps)[2] == pytest.approx(expected, rel=1e-9)


def test_a_run_of_one_step_and_a_second_run_begin_at_the_start():
    interpolation = TAIDInterpolation(alpha=0.5, momentum=0.5)
    whole = run(interpolation, LOSSES)
    assert run(interpolation, LOSSES) == whole
    interpolation.move(0.0)
    assert interpolation.value == 0.4


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_passed_over(loss):
    settings = {"alpha": 0.9, "momentum": 0.5}
    broken = run(TAIDInterpolation(**settings), [*LOSSES[:3], loss, *LOSSES[4:]])
    whole = run(TAIDInterpolation(**settings), LOSSES)
    assert broken[:4] == whole[:4]
    assert broken[3] <= broken[4] < broken[5] < 1


@pytest.mark.parametrize("cut", [1, 4])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(cut):
    settings = {"alpha": 0.9, "momentum": 0.5}
    first, second = (LogitObjective(divergence="taid", divergence_kwargs=settings) for _ in range(2))
    whole = run(TAIDInterpolation(**settings), LOSSES)
    run(first.interpolation, LOSSES[:cut])
    second.load_state_dict(first.state_dict())
    assert run(second.interpolation, LOSSES[cut:], first=cut) == whole[cut:]


def test_the_loss_that_it_follows_is_the_cross_entropy_with_the_target():
    torch.manual_seed(0)
    temperature, hidden, teacher_hidden, weight = 2.0, torch.randn(5, 4), torch.randn(5, 4), torch.randn(7, 4)
    objective = LogitObjective(0.5, divergence="taid", temperature=temperature)
    head = LMHead(weight)
    student = StudentSignals(Projection(hidden.clone().requires_grad_(), head), torch.arange(5))
    out = logit_loss([objective], 0.5, student, TeacherSignals(Projection(teacher_hidden, head)))
    means = {"taid_loss": out.parts["taid"] / 5, "target_entropy": out.metrics["target_entropy"] / 5}
    logits, others = hidden @ weight.t() / temperature, teacher_hidden @ weight.t() / temperature
    target = torch.softmax(0.6 * logits + 0.4 * others, -1)
    expected = -(target * torch.log_softmax(logits, -1)).sum(-1).mean()
    assert float(objective.target_cross_entropy(means)) == pytest.approx(float(expected), rel=1e-5)


def test_a_given_t_stays_where_it_is():
    objective = LogitObjective(divergence="taid", divergence_kwargs={"t": 0.7})
    objective.move(1.0)
    assert objective.divergence_kwargs == {"t": 0.7}
    assert objective.interpolation is None
    assert not objective.state_dict()


def test_the_card_says_how_t_moves():
    objective = LogitObjective(divergence="taid", divergence_kwargs={"t_start": 0.2, "alpha": 0.01})
    assert objective.config()["t"] == "adaptive, not below 0.2 at 0% to 1 at 100% (linear), alpha=0.01"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_start": 0.9, "t_end": 0.5}, "`t_start` is 0.9 and `t_end` 0.5"),
        ({"t_end": 1.5}, "`t_end` 1.5"),
        ({"alpha": -1.0}, "`alpha` is -1.0"),
        ({"momentum": 1.0}, "`momentum` is 1.0"),
        ({"speed": 1.0}, "'speed'"),
    ],
)
def test_settings_that_make_no_sense_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        LogitObjective(divergence="taid", divergence_kwargs=settings)
