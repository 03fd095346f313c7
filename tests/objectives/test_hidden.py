from __future__ import annotations

import pytest
import torch

from hf_distill import HiddenStateObjective
from hf_distill.functional.features import PER_SET, PER_TOKEN
from hf_distill.objectives import HiddenDeltaObjective, RegressorFreeObjective, linear
from hf_distill.signals import ModelShape, Projection, StudentSignals, TeacherSignals, Tokens, identity


TOKENS = 12


def states(width: int, layers: int, seed: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(TOKENS, width, generator=generator) for layer in range(layers + 1)}


def tokens(weights: torch.Tensor | None = None) -> Tokens:
    return Tokens(torch.arange(TOKENS), torch.arange(TOKENS) % 6 == 0, weights)


def signals(student, teacher, where: Tokens | None = None) -> tuple[StudentSignals, TeacherSignals]:
    logits = Projection(torch.zeros(TOKENS, 4), identity)
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    return StudentSignals(logits, labels, student, where or tokens()), TeacherSignals(hidden=teacher)


def bound(student_size: int = 8, teacher_size: int = 8, depths=(2, 4), **arguments) -> HiddenStateObjective:
    objective = HiddenStateObjective(**arguments)
    objective.bind(ModelShape("student", depths[0], student_size), ModelShape("teacher", depths[1], teacher_size))
    return objective


@pytest.mark.parametrize("loss", PER_TOKEN)
def test_the_sum_is_that_of_the_mean_over_pairs(loss):
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    objective = bound(loss=loss)
    assert objective.pairs == ((1, 2), (2, 4))
    expected = (PER_TOKEN[loss](student[1], teacher[2]) + PER_TOKEN[loss](student[2], teacher[4])).sum() / 2
    torch.testing.assert_close(objective(*signals(student, teacher)), expected)


def test_a_paper_is_cited_only_for_what_it_describes():
    assert HiddenStateObjective().citation == "1412.6550"
    assert HiddenDeltaObjective().citation == RegressorFreeObjective(channels=[0]).citation == ""


def test_an_unknown_choice_of_positions_is_refused():
    with pytest.raises(ValueError, match=r"`positions` is 'prompt'; expected one of \['labelled', 'real'\]"):
        HiddenStateObjective(positions="prompt")


@pytest.mark.parametrize("loss", PER_SET)
def test_a_distance_of_sets_counts_once_for_every_label(loss):
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = bound(8, 12, loss=loss, layer_mapping=[(2, 4)])
    assert not list(objective.parameters())
    torch.testing.assert_close(objective(*signals(student, teacher)), TOKENS * PER_SET[loss](student[2], teacher[4]))


@pytest.mark.parametrize(("shared", "count"), [(False, 2), (True, 1)])
def test_projectors_bridge_unequal_widths_and_get_gradients(shared, count):
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = bound(8, 12, loss="mse", shared_projector=shared)
    assert len(objective.projectors) == count
    for projector in objective.projectors:
        torch.testing.assert_close(projector.weight.t() @ projector.weight, torch.eye(8))
    objective(*signals(student, teacher)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in objective.parameters())
    first, last = objective.projectors[0], objective.projectors[-1]
    expected = (PER_TOKEN["mse"](first(student[1]), teacher[2]) + PER_TOKEN["mse"](last(student[2]), teacher[4])) / 2
    torch.testing.assert_close(objective(*signals(student, teacher)), expected.sum())


def test_equal_widths_need_no_projector():
    assert not list(bound(8, 8).parameters())


def test_projectors_are_the_same_on_every_rank():
    torch.manual_seed(0)
    one = bound(8, 12)
    torch.manual_seed(1)
    other = bound(8, 12)
    assert torch.equal(one.projectors[0].weight, other.projectors[0].weight)


@pytest.mark.parametrize("loss", ["mse", "cka"])
def test_first_tokens_can_be_left_out(loss):
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    objective = bound(loss=loss, skip_first=True)
    value = objective(*signals(student, teacher))
    for layers in (student, teacher):
        for hidden in layers.values():
            hidden[::6] *= 1000
    torch.testing.assert_close(objective(*signals(student, teacher)), value)
    assert not torch.isclose(bound(loss=loss)(*signals(student, teacher)), value)


def test_the_tokens_of_a_classifier_count_by_their_weights():
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    weights = torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))
    objective = bound(loss="mse", layer_mapping=[(2, 4)])
    expected = (PER_TOKEN["mse"](student[2], teacher[4]) * weights).sum()
    torch.testing.assert_close(objective(*signals(student, teacher, tokens(weights))), expected)


@pytest.mark.parametrize("loss", PER_TOKEN | PER_SET)
@pytest.mark.parametrize("skip_first", [False, True])
def test_a_batch_without_labels_gives_a_zero_with_a_gradient_path(loss, skip_first):
    objective = bound(8, 12, loss=loss, skip_first=skip_first)
    none = {layer: torch.zeros(0, 8, requires_grad=True) for layer in range(3)}
    theirs = {layer: torch.zeros(0, 12) for layer in range(5)}
    where = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    student = StudentSignals(Projection(torch.zeros(0, 4), identity), where.index, none, where)
    value = objective(student, TeacherSignals(hidden=theirs))
    assert value.item() == 0
    value.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_autocast_does_not_reach_the_distance():
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    objective = bound(loss="cka")
    expected = objective(*signals(student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(*signals(student, teacher)), expected)


def test_the_config_names_what_was_compared():
    objective = bound(8, 12, weight=0.3, loss="mse", skip_first=True)
    assert objective.config() == {
        "objective": "HiddenStateObjective", "weight": 0.3, "loss": "mse",
        "layers (student, teacher)": [(1, 2), (2, 4)], "projectors": 2, "first token": "skipped",
    }  # fmt: skip


def test_an_unknown_loss_is_answered_with_near_names():
    with pytest.raises(ValueError, match="cosine"):
        HiddenStateObjective(loss="cosin")


@pytest.mark.parametrize("loss", ["mse", "cka"])
def test_a_learned_map_weighs_the_distances_from_all_layers(loss):
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = bound(8, 12, loss=loss, layer_mapping="learned", map_temperature=0.5, map_entropy=0.0)
    assert (objective.student_layers, objective.teacher_layers) == ({1, 2}, {1, 2, 3, 4})
    found = objective(*signals(student, teacher))
    single = []
    for i, layer in enumerate((1, 2)):
        # The map begins at the partners of "uniform", 2 and 4, and falls by e for every layer.
        shares = torch.softmax(-(torch.arange(1.0, 5.0) - (2, 4)[i]).abs(), dim=0)
        for j in range(4):
            alone = bound(8, 12, loss=loss, layer_mapping=[(layer, j + 1)])
            if len(objective.projectors):
                alone.projectors = objective.projectors[i : i + 1]
            single.append(shares[j] * alone(*signals(student, teacher)))
    torch.testing.assert_close(found, sum(single) / 2)


def test_a_learned_map_moves_towards_nearer_layers_and_stays_wide_by_its_entropy():
    student, teacher = states(8, 2, seed=0), states(8, 4, seed=1)
    teacher[1] = student[2] + 0.3 * teacher[1]  # the last layer of the student is nearest to the first of the teacher
    objective = bound(8, 8, loss="cosine", layer_mapping="learned", map_entropy=0.2)
    distances = torch.stack([PER_TOKEN["cosine"](student[2], teacher[layer]).mean() for layer in (1, 2, 3, 4)])
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    for _ in range(250):
        optimizer.zero_grad()
        (objective(*signals(student, teacher)) / TOKENS).backward()
        optimizer.step()
    shares = objective.learned.shares(0.1)[1].detach()
    assert shares.argmax() == 0
    torch.testing.assert_close(shares, torch.softmax(-distances / 0.2, dim=0), rtol=0.05, atol=0.01)
    shown = objective.config()["layers (student: shares of the teacher's)"]
    assert shown.keys() == {1, 2}
    assert shown[2][1] == pytest.approx(shares[0].item(), abs=0.01)


def test_a_batch_without_labels_reaches_a_learned_map():
    objective = bound(8, 12, layer_mapping="learned")
    where = Tokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool))
    none = {layer: torch.zeros(0, 8, requires_grad=True) for layer in range(3)}
    student = StudentSignals(Projection(torch.zeros(0, 4), identity), where.index, none, where)
    value = objective(student, TeacherSignals(hidden={layer: torch.zeros(0, 12) for layer in range(5)}))
    assert value.item() == 0
    value.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_the_temperature_of_a_learned_map_may_be_scheduled():
    objective = bound(layer_mapping="learned", map_temperature=linear(1.0, 0.1))
    wide = objective.learned.narrowness(objective._temperature)
    objective.move(1.0)
    assert objective.config()["map_temperature"] == "1 at 0% to 0.1 at 100% (linear)"
    assert (objective.learned.narrowness(objective._temperature) > wide).all()
    with pytest.raises(ValueError, match="map_temperature"):
        HiddenStateObjective(layer_mapping="learned", map_temperature=0.0)
    with pytest.raises(ValueError, match="map_entropy"):
        HiddenStateObjective(map_entropy=-1.0)


@pytest.mark.parametrize("channels", [[11, 0, 3, 4, 5, 6, 7, 8], torch.tensor([11, 0, 3, 4, 5, 6, 7, 8])])
def test_channels_of_the_teacher_take_the_place_of_a_projector(channels):
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = bound(8, 12, loss="mse", layer_mapping=[(2, 4)], channels=channels)
    assert not list(objective.parameters())
    expected = PER_TOKEN["mse"](student[2], teacher[4][:, torch.as_tensor(channels)]).sum()
    torch.testing.assert_close(objective(*signals(student, teacher)), expected)
    assert objective.config()["channels of the teacher"] == 8


@pytest.mark.parametrize("channels", [[0, 1], [0, 1, 2, 3, 4, 5, 6, 12], [0, 0, 2, 3, 4, 5, 6, 7], [[0] * 8]])
def test_channels_that_do_not_fit_are_refused_with_both_names(channels):
    with pytest.raises(ValueError, match=r"expected 8 different channels, .*student.* of the 12 of teacher"):
        bound(8, 12, channels=channels)


def test_the_regressor_free_objective_compares_the_last_layers_on_chosen_channels():
    student, teacher = states(8, 2, seed=0), states(12, 4, seed=1)
    objective = RegressorFreeObjective(0.5, channels=range(4, 12))
    objective.bind(ModelShape("student", 2, 8), ModelShape("teacher", 4, 12))
    assert objective.pairs == ((1, 3), (2, 4))
    expected = sum(PER_TOKEN["mse"](student[i], teacher[i + 2][:, 4:]).sum() for i in (1, 2)) / 2
    torch.testing.assert_close(objective(*signals(student, teacher)), expected)
    assert (objective.name, objective.config()["objective"]) == ("regressor_free", "RegressorFreeObjective")
