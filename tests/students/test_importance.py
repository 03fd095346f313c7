"""`estimate_importance`: what it scores, what it leaves alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_distill.students.families import FAMILIES, family_of
from hf_distill.students.importance import DEFAULT, estimate_importance
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.weight_norms import weight_norms
from tests import tiny
from tests.students import importance_twins as twins
from tests.taps.test_last_hidden import hooks
from tests.training.runs import LORA


TINY = {"gemma3_text": "gemma3"}
UNITS = ("mlp", "heads", "hidden")


def estimate(model, methods=DEFAULT, *, data=None, **options):
    data = twins.batches(twins.texts(), 4) if data is None else data
    return estimate_importance(model, data, methods=methods, show_progress=False, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scored_in_all_that_can_be_cut(name):
    model = twins.make_model(TINY.get(name, name))
    kinds = ("mlp", "heads", "hidden") if family_of(model).cuts_all else ("mlp",)
    expected = {"mlp": (2, 64), "heads": (2, 4), "hidden": (32,), "layers": (2,)}
    for method, depth in [("activation", "block_influence"), ("taylor", "leave_one_out")]:
        scores = estimate(model, dict.fromkeys(kinds, method) | {"layers": depth})
        for kind in (*kinds, "layers"):
            found = getattr(scores, kind)
            assert found.shape == expected[kind]
            assert kind == "layers" or (found > 0).float().mean() > 0.8  # ReLU leaves some at 0
    assert scores.heads is None or scores.heads.std() > 0


def test_scores_of_several_methods_are_those_of_each_alone():
    model, teacher = twins.make_model(), twins.make_model(seed=1)
    methods = {"mlp": "taylor", "heads": "fisher", "hidden": "activation", "layers": "leave_one_out"}
    together = estimate(model, methods, teacher=teacher)
    for kind, method in methods.items():
        guide = None if method == "activation" else teacher
        alone = getattr(estimate(model, {kind: method}, teacher=guide), kind)
        torch.testing.assert_close(getattr(together, kind), alone, rtol=1e-4, atol=1e-7)
    plain = estimate(model, methods)
    for kind in ("mlp", "heads", "layers"):
        assert not torch.allclose(getattr(plain, kind), getattr(together, kind), rtol=0.05)


def planted() -> torch.nn.Module:
    """A model with a dead neuron, two dead heads (one group's) and a dead channel in each place they can be."""
    model = twins.make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[7] = 0
            layer.self_attn.v_proj.weight[8:16] = 0
            layer.input_layernorm.weight[11] = layer.post_attention_layernorm.weight[11] = 0
        model.model.norm.weight[11] = 0
    return model


@pytest.mark.parametrize(
    ("method", "guided"),
    [("activation", False), ("taylor", False), ("taylor", True), ("fisher", False), ("fisher", True)],
)
def test_dead_units_have_the_lowest_scores(method, guided):
    scores = estimate(planted(), dict.fromkeys(UNITS, method), teacher=twins.make_model(seed=1) if guided else None)
    assert scores.mlp.argmin(1).tolist() == [7, 7]
    assert scores.heads.argsort(1)[:, :2].sort().values.tolist() == [[2, 3], [2, 3]]
    assert scores.hidden.argmin().item() == 11
    assert scores.mlp[:, 7].tolist() == [0, 0]
    assert (scores.mlp > 0).sum() == 2 * 63


@pytest.mark.parametrize("method", ["block_influence", "leave_one_out"])
def test_a_layer_that_does_nothing_is_the_cheapest(method):
    model = twins.make_model(layers=4)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    scores = estimate(model, {"layers": method}).layers
    assert scores.abs().argmin() == 2
    assert scores[2].item() == pytest.approx(0, abs=1e-6)
    others = scores[torch.tensor([0, 1, 3])].abs()
    assert others.min() > 1e-3


def test_the_best_neurons_by_taylor_are_worth_more_than_the_worst():
    """Fit a model to a text, then silence eight neurons of each layer: the loss must rise more for the best."""
    model, rows = twins.make_model(), twins.texts()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        loss = sum(twins.naive_loss(model, ids) for ids in rows[:4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data = twins.batches(rows[:4], 4)
    for method in ("taylor", "fisher"):
        order = estimate(model, {"mlp": method}, data=data).mlp.argsort(1)
        increase = []
        for chosen in (order[:, :8], order[:, -8:]):
            handles = [
                layer.mlp.down_proj.register_forward_pre_hook(
                    lambda m, args, dead=dead: (args[0].index_fill(-1, dead, 0.0),)
                )
                for layer, dead in zip(model.model.layers, chosen, strict=True)
            ]
            with torch.no_grad():
                increase.append(sum(twins.naive_loss(model, ids).item() for ids in rows[:4]))
            for handle in handles:
                handle.remove()
        assert increase[1] > increase[0] + 0.5, method


@pytest.mark.parametrize("methods", [DEFAULT, dict.fromkeys(UNITS, "taylor") | {"layers": "leave_one_out"}])
@pytest.mark.parametrize("fails", [False, True])
def test_the_models_are_left_as_they_were(methods, fails):
    model, teacher = twins.make_model().train(), twins.make_model(seed=1)
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    teacher.model.layers[1].train()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)

    def state():
        return [
            [module.training for each in (model, teacher) for module in each.modules()],
            [p.requires_grad for each in (model, teacher) for p in each.parameters()],
            [None if p.grad is None else p.grad.sum().item() for each in (model, teacher) for p in each.parameters()],
            hooks(model),
            hooks(teacher),
            ["forward" in vars(module) for module in model.modules()],
            torch.random.get_rng_state().tolist(),
        ]

    def broken():
        torch.rand(3)  # a shuffling loader draws too
        yield twins.batches(twins.texts(), 4)[0]
        if fails:
            yield {"input_ids": torch.full((1, 4), 10_000), "attention_mask": torch.ones(1, 4)}

    before, guide = state(), teacher if "taylor" in methods.values() else None
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        with pytest.raises(IndexError):
            estimate(model, methods, data=broken(), teacher=guide)
    else:
        estimate(model, methods, data=broken(), teacher=guide)
    assert state() == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_error_in_the_middle_of_the_model_leaves_no_hook():
    model, before = twins.make_model(), hooks(twins.make_model())
    layer = model.model.layers[1]
    layer.mlp.forward = None  # not callable
    with pytest.raises(TypeError):
        estimate(model, {"mlp": "taylor", "layers": "leave_one_out"})
    del layer.mlp.forward
    assert hooks(model) == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off_and_gradients_may_be_disabled_outside():
    noisy = twins.make_model(attention_dropout=0.5).train()
    with torch.no_grad():
        found = estimate(noisy, {"mlp": "taylor"})
    torch.testing.assert_close(found.mlp, estimate(twins.make_model(), {"mlp": "taylor"}).mlp)


def test_a_student_that_is_its_teacher_has_no_gradient_and_is_refused():
    model = twins.make_model()
    for method in ("taylor", "fisher"):
        with pytest.raises(ValueError, match=r"`teacher` says the same.*cross-entropy"):
            estimate(model, {"mlp": method}, teacher=twins.make_model())
    assert (estimate(model, {"layers": "leave_one_out"}, teacher=twins.make_model()).layers > 0).all()
    with torch.no_grad():  # after a first cut
        model.model.layers[0].mlp.down_proj.weight[:, :8] = 0
    assert (estimate(model, {"mlp": "taylor"}, teacher=twins.make_model()).mlp > 0).any()


def test_a_batch_without_labels_is_one_with_a_label_on_every_real_token():
    data = twins.batches(twins.texts(), 4)
    bare = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    model = twins.make_model()
    found = estimate(model, {"mlp": "taylor"}, data=bare).mlp
    torch.testing.assert_close(found, estimate(model, {"mlp": "taylor"}, data=data).mlp)


@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification"])
def test_encoders_and_classifiers_are_scored_by_their_own_loss(task):
    model = twins.make_model("bert", task=task)
    data = twins.batches(twins.texts(), 4)
    if task == "sequence_classification":
        data = [batch | {"labels": torch.tensor([0, 1, 1, 0])} for batch in data]
    one = estimate(model, {"mlp": "fisher", "layers": "leave_one_out"}, data=data)
    assert (one.mlp > 0).all()
    bare = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    with pytest.raises(ValueError, match="no `labels`"):
        estimate(model, {"mlp": "fisher"}, data=bare)
    assert estimate(model, {"mlp": "activation"}, data=bare).mlp.shape == (2, 64)


def test_tokens_are_counted_up_to_the_limit():
    data, taken = twins.batches(twins.texts(), 1), []

    def counted():
        for batch in data:
            taken.append(batch)
            yield batch

    scores = estimate(twins.make_model(), {"mlp": "activation"}, data=counted(), max_tokens=12)
    assert len(taken) == 3  # of 7, 4 and 5 tokens
    assert scores.provenance == {"mlp": "activation over 16 tokens of 3 sequences"}


def test_scores_come_in_fp32_and_survive_their_folder(tmp_path):
    model, teacher = twins.make_model().bfloat16(), twins.make_model(seed=1)
    scores = estimate(model, {"mlp": "taylor", "layers": "block_influence"}, teacher=teacher)
    assert scores.mlp.dtype == torch.float32
    assert scores.provenance["mlp"] == "taylor of forward KL from the teacher over 39 tokens of 8 sequences"
    scores.save(tmp_path / "importance")
    loaded = ImportanceScores.load(tmp_path / "importance")
    assert torch.equal(loaded.mlp, scores.mlp)
    assert loaded.provenance == scores.provenance
    exact = estimate(twins.make_model(), {"mlp": "taylor"}, teacher=teacher).mlp
    assert torch.corrcoef(torch.stack([exact.flatten(), scores.mlp.flatten()]))[0, 1] > 0.99


UNLABELLED = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[-100, -100]])}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"methods": {}}, "`methods` is {}.*'mlp', 'heads'"),
        ("llama", {"methods": {"depth": "taylor"}}, "expected some of"),
        ("llama", {"methods": {"layers": "taylor"}}, "'layers': 'taylor'.*leave_one_out"),
        ("gpt2", {}, "'gpt2' only neurons and layers.*'mlp': 'activation', 'layers': 'block_influence'"),
        ("distilbert", {}, "'distilbert' cannot be pruned"),
        ("llama", {"max_tokens": 0}, "`max_tokens` is 0"),
        ("llama", {"data": []}, "gave no token"),
        ("llama", {"methods": {"mlp": "taylor"}, "data": [UNLABELLED]}, "no label"),
        ("llama", {"methods": {"layers": "leave_one_out"}, "data": [UNLABELLED]}, "no label"),
        ("llama", {"methods": {"mlp": "activation"}, "teacher": tiny.model("llama")}, "`teacher` would be ignored"),
        ("llama", {"methods": {"mlp": "taylor"}, "teacher": tiny.model("bert")}, "masked_lm model and `model`"),
    ],
)
def test_wrong_arguments_are_refused_by_name(family, options, message):
    with pytest.raises(ValueError, match=message):
        estimate(tiny.model(family), **options)


def test_a_model_with_adapters_is_refused():
    adapted = get_peft_model(twins.make_model(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="merge_and_unload"):
        estimate(adapted, {"mlp": "activation"})


def test_scores_that_overflow_are_refused():
    model = twins.make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"scores of \['mlp'\] hold infinities or NaN"):
        estimate(model, {"mlp": "taylor"})


def test_weight_norms_are_those_of_prune_and_need_no_text():
    model = twins.make_model()
    scores = estimate(model, dict.fromkeys(UNITS, "weight"), data=[])
    norms = weight_norms(model)
    assert all(torch.equal(getattr(scores, kind), getattr(norms, kind)) for kind in UNITS)
    assert scores.provenance == norms.provenance
    mixed = estimate(model, {"mlp": "weight", "heads": "activation"})
    assert torch.equal(mixed.mlp, norms.mlp)
    assert mixed.provenance == {
        "mlp": norms.provenance["mlp"],
        "heads": "activation over 39 tokens of 8 sequences",
    }
