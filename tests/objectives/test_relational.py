from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_distill import RelationObjective
from hf_distill.functional.relations import RELATIONS
from hf_distill.objectives.gathering import draw_sample
from hf_distill.signals import ModelShape, Projection, StudentSignals, TeacherSignals, Tokens, identity
from tests.processes import run_on_two_ranks


def bound(student_size: int = 8, teacher_size: int = 12, **arguments) -> RelationObjective:
    objective = RelationObjective(**arguments)
    objective.bind(ModelShape("student", 2, student_size), ModelShape("teacher", 4, teacher_size))
    return objective


def states(tokens: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def signals(student: torch.Tensor, teacher: torch.Tensor, labels: int | None = None):
    """The states at every layer that `bound` may choose; as many labels as tokens, if not given."""
    count = len(student)
    where = Tokens(torch.arange(count), torch.zeros(count, dtype=torch.bool))
    targets = torch.zeros(count if labels is None else labels, dtype=torch.int64)
    ours = StudentSignals(Projection(torch.zeros(count, 4), identity), targets, {1: student, 2: student}, where)
    return ours, TeacherSignals(hidden={2: teacher, 4: teacher})


@pytest.mark.parametrize("loss", RELATIONS)
def test_the_value_is_the_relation_of_the_last_layers_once_for_every_label(loss):
    student, teacher = states(20, 8, seed=0), states(20, 12, seed=1)
    objective = bound(loss=loss)
    assert objective.pairs == ((2, 4),)
    expected = RELATIONS[loss](student, teacher)
    torch.testing.assert_close(objective(*signals(student, teacher)), 20 * expected)
    torch.testing.assert_close(objective(*signals(student, teacher, labels=3)), 3 * expected)


def test_the_value_is_the_mean_over_pairs():
    ours, theirs = signals(states(20, 8, seed=0), states(20, 12, seed=1))
    ours.hidden[1] = states(20, 8, seed=2)
    both = bound(num_pairs=2)
    assert both.pairs == ((1, 2), (2, 4))
    each = [bound(layer_mapping=[pair])(ours, theirs) for pair in both.pairs]
    torch.testing.assert_close(both(ours, theirs), (each[0] + each[1]) / 2)


def test_a_teacher_of_the_same_geometry_gives_zero_and_no_gradient():
    student = states(20, 8, seed=0).requires_grad_()
    turn = torch.linalg.qr(states(12, 8, seed=1))[0]
    for loss in RELATIONS:
        value = bound(loss=loss)(*signals(student, 3 * student.detach() @ turn.t()))
        assert value.abs() < 1e-4
        assert torch.autograd.grad(value, student)[0].abs().max() < 1e-4


def test_more_tokens_than_asked_for_are_thinned_evenly():
    student, teacher = states(100, 8, seed=0), states(100, 12, seed=1)
    found = bound(num_tokens=8)(*signals(student, teacher)) / 100
    picked = torch.tensor([6, 18, 31, 43, 56, 68, 81, 93])  # the middles of eighths
    torch.testing.assert_close(found, RELATIONS["rkd"](student[picked], teacher[picked]))
    assert torch.equal(bound(num_tokens=8)(*signals(student, teacher)) / 100, found)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 8, 9, 1000])
def test_a_sample_has_no_token_twice_and_none_where_there_is_none(tokens):
    sample = draw_sample(tokens, tokens, 8, torch.device("cpu"), gather=True)
    assert len(sample.index.unique()) == len(sample.index) == sample.size == min(tokens, 8)
    assert ((sample.index >= 0) & (sample.index < tokens)).all()


@pytest.mark.parametrize("loss", RELATIONS)
def test_a_batch_without_labels_gives_a_zero_with_a_gradient_path(loss):
    student = torch.zeros(0, 8, requires_grad=True)
    value = bound(loss=loss)(*signals(student, torch.zeros(0, 12)))
    assert value.item() == 0
    value.backward()
    assert student.grad is not None


def test_autocast_does_not_reach_the_relations():
    student, teacher = states(20, 8, seed=0), states(20, 12, seed=1)
    expected = bound(loss="similarity")(*signals(student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bound(loss="similarity")(*signals(student, teacher)), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "rdk"}, "rkd"),
        ({"num_tokens": 2}, "at least 3"),
        ({"num_tokens": 512}, "at most 256"),
        ({"layer_mapping": "learned"}, "layer_mapping"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        RelationObjective(**arguments)
    assert RelationObjective(loss="similarity", num_tokens=512).num_tokens == 512


def test_the_config_names_what_was_compared():
    assert bound(weight=0.3).config() == {
        "objective": "RelationObjective", "weight": 0.3, "loss": "rkd", "layers (student, teacher)": [(2, 4)],
        "tokens": 64,
    }  # fmt: skip
    assert (bound().citation, bound(loss="similarity").citation) == ("1904.05068", "1907.09682")


# What two ranks see in one micro-batch each: inputs of a student of one layer, hidden states of the teacher, labels.
CUTS = {
    "uneven": (14, 6),
    "thinned": (40, 31),
    "one has none": (9, 0),
    "the other has none": (0, 9),
    "neither": (0, 0),
}


def micro_batches(cut: tuple[int, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(states(tokens, 5, seed=rank), states(tokens, 12, seed=9 + rank)) for rank, tokens in enumerate(cut)]


def contribution(loss: str, model: torch.nn.Linear, inputs: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return bound(loss=loss, num_tokens=16)(*signals(model(inputs), teacher))


def make_student() -> torch.nn.Linear:
    model = torch.nn.Linear(5, 8)
    with torch.no_grad():
        model.weight.copy_(states(8, 5, seed=7))
        model.bias.zero_()
    return model


def compare_with_one_process(rank: int) -> None:
    """Run as the trainer does: divide by the labels of all ranks, times ranks, because gradients are averaged."""
    for loss in RELATIONS:
        for name, cut in CUTS.items():
            labels = max(sum(cut), 1)
            model = make_student()
            own = micro_batches(cut)[rank]
            value = contribution(loss, model, *own) / labels
            (value * 2).backward()
            total = torch.cat([model.weight.grad.flatten(), value.detach()[None]])
            dist.all_reduce(total)
            with torch.no_grad():
                torch.testing.assert_close(contribution(loss, model, *own) / labels, value.detach())

            whole = make_student()
            both = [torch.cat(sides) for sides in zip(*micro_batches(cut), strict=True)]
            objective = bound(loss=loss, num_tokens=16, gather=False)
            expected = objective(*signals(whole(both[0]), both[1])) / labels
            expected.backward()
            found = total[:-1].reshape(8, 5) / 2, total[-1]
            torch.testing.assert_close(found, (whole.weight.grad, expected.detach()), msg=f"{loss}, {name}")


def test_two_ranks_have_the_value_and_the_gradient_of_one_process_that_sees_both(tmp_path):
    run_on_two_ranks(compare_with_one_process, tmp_path)
