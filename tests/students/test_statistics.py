"""Every statistic against its naive twin, however the text is put into batches."""

from __future__ import annotations

import pytest
import torch

from hf_distill.anatomy import describe
from hf_distill.students.calibration import CalibrationLoss, left_as_it_was
from hf_distill.students.measuring import LeaveOneOut, Walk
from hf_distill.students.statistics import BlockInfluence, FirstOrder, MeanActivation, Units
from tests.students import importance_twins as twins


HEADS, WIDTH = 4, 8


def units_of(kind: str, model) -> Units:
    layers = model.model.layers
    if kind == "mlp":
        return Units([[layer.mlp.down_proj] for layer in layers])
    if kind == "heads":
        return Units([[layer.self_attn.o_proj] for layer in layers], width=WIDTH)
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return Units([[*norms, model.model.norm]], reads_input=False)


def measure(model, statistics, batches, teacher=None, leave_one_out=False):
    loss = CalibrationLoss(model, teacher)
    models = [model] if teacher is None else [model, teacher]
    left_out = LeaveOneOut(model.model.layers, loss) if leave_one_out else None
    needs_gradient = any(statistic.needs_gradient for statistic in statistics)
    with left_as_it_was(*models):
        walk = Walk(describe(model), statistics, loss if needs_gradient else None, left_out)
        walk.over(batches, None, show_progress=False)
    return walk, left_out


def cuts(rows):
    """The same text in one batch, in several, in another order, and padded on the left."""
    return {
        "8x1": twins.batches(rows, 8),
        "2x4": twins.batches(rows, 2),
        "1x8": twins.batches(rows, 1),
        "left": twins.batches(rows, 4, left=True),
        "shuffled": twins.batches(rows[::-1], 3),
    }


CUTS = ["8x1", "2x4", "1x8", "left", "shuffled"]


@pytest.fixture(scope="module")
def seen():
    """What a naive run keeps of every sequence, by kind of unit and by who guides."""
    model, teacher = twins.make_model(), twins.make_model(layers=3, seed=1)
    found = {}
    for kind in ("mlp", "heads", "hidden"):
        units = units_of(kind, model)
        modules = [module for row in units.modules for module in row]
        for guide in (None, teacher):
            rows = [twins.watch(model, modules, units.reads_input, ids, guide) for ids in twins.texts()]
            found[kind, guide is not None] = rows
    return found


def expected_scores(kind, method, seen, rows: int, count: int):
    width = WIDTH if kind == "heads" else 1
    modules = [range(len(seen[0].values))] if kind == "hidden" else [[row] for row in range(rows)]
    found = []
    for places in modules:
        channels = [list(range(unit * width, (unit + 1) * width)) for unit in range(count)]
        if method == "activation":
            found.append([sum(twins.naive_activation(seen, place, unit) for place in places) for unit in channels])
        else:
            found.append([twins.naive_first_order(seen, list(places), unit, method) for unit in channels])
    return torch.tensor(found)


@pytest.mark.parametrize("kind", ["mlp", "heads", "hidden"])
@pytest.mark.parametrize("method", ["activation", "taylor", "fisher", "guided taylor", "guided fisher"])
def test_scores_are_those_of_the_naive_twin_in_every_cut(kind, method, seen):
    guided, method = method.startswith("guided"), method.rpartition(" ")[2]
    teacher = twins.make_model(layers=3, seed=1) if guided else None
    expected = None
    for name, batches in cuts(twins.texts()).items():
        model = twins.make_model()
        units = units_of(kind, model)
        statistic = MeanActivation(units) if method == "activation" else FirstOrder(units, method)
        walk, _ = measure(model, [statistic], batches, teacher)
        scores = statistic.scores()
        if expected is None:
            expected = expected_scores(kind, method, seen[kind, guided], *scores.shape)
            assert expected.min() > 0
        torch.testing.assert_close(scores, expected, rtol=2e-4, atol=1e-7, msg=name)
        assert (walk.tokens, walk.sequences) == (sum(twins.LENGTHS), len(twins.LENGTHS))


@pytest.mark.parametrize("cut", CUTS)
def test_block_influence_is_that_of_the_naive_twin(cut):
    model = twins.make_model(layers=3)
    statistic = BlockInfluence(model.model.layers)
    measure(model, [statistic], cuts(twins.texts())[cut])
    expected = torch.tensor(twins.naive_block_influence(model, twins.texts()))
    torch.testing.assert_close(statistic.scores(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("cut", ["8x1", "2x4"])
def test_leave_one_out_is_the_loss_of_the_model_that_was_cut(cut, guided):
    model = twins.make_model(layers=3)
    teacher = twins.make_model(layers=2, seed=1) if guided else None
    _, left_out = measure(model, [], cuts(twins.texts())[cut], teacher, leave_one_out=True)
    expected = torch.tensor(twins.naive_leave_one_out(model, twins.texts(), teacher))
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(left_out.scores(), expected, rtol=1e-3, atol=1e-5)


def test_documents_of_a_packed_row_are_sequences_of_their_own():
    rows = [ids for ids in twins.texts() if len(ids) > 3]
    model = twins.make_model(attn_implementation="sdpa")
    packed = {
        "input_ids": torch.tensor([[token for ids in rows for token in ids]]),
        "position_ids": torch.tensor([[position for ids in rows for position in range(len(ids))]]),
        "labels": torch.tensor([[label for ids in rows for label in [-100, *ids[1:]]]]),
    }
    found = {}
    for name, batches in {"packed": [packed], "padded": twins.batches(rows, 8)}.items():
        statistics = [MeanActivation(units_of("mlp", model)), FirstOrder(units_of("heads", model), "taylor")]
        walk, _ = measure(model, statistics, batches)
        assert walk.sequences == len(rows)
        found[name] = [statistic.scores() for statistic in statistics]
    for packed_scores, padded in zip(found["packed"], found["padded"], strict=True):
        torch.testing.assert_close(packed_scores, padded, rtol=1e-3, atol=1e-7)


def test_a_gate_of_a_unit_has_the_gradient_that_taylor_says():
    """With one sequence the score is |dL/dm| for a mask m on the unit: checked by a finite difference."""
    model, ids = twins.make_model(), twins.texts()[0]
    statistic = FirstOrder(units_of("mlp", model), "taylor")
    measure(model, [statistic], twins.batches([ids], 1))
    mask = torch.ones(64)
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * mask,))
    with torch.no_grad():
        losses = []
        for value in (1.02, 0.98):
            mask[5] = value
            losses.append(twins.naive_loss(model, ids))
    handle.remove()
    slope = abs((losses[0] - losses[1]) / 0.04)
    assert statistic.scores()[1, 5].item() == pytest.approx(slope.item(), rel=1e-2)
