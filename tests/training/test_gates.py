"""Gates that are learned with the student: what they change, that they hold the budget, and the cut that follows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq

from hf_distill import KDConfig, KDTrainer, LogitObjective
from hf_distill.functional.gates import open_probability, sampled_gates, settled_gates
from hf_distill.objectives.schedules import linear, piecewise
from hf_distill.signals import Projection, StudentSignals, TeacherSignals, identity
from hf_distill.students.prune import prune
from hf_distill.students.spec import PruneSpec
from hf_distill.training.gates import GateObjective
from tests import tiny
from tests.taps.test_last_hidden import hooks
from tests.training.runs import COMMON, LORA, logged, trained


SPEC = PruneSpec(intermediate_size=32, num_attention_heads=2, round_to=16)
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]])
FAST = {"objective_lr_multiplier": 300.0}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "objective_lr_multiplier": 100.0}


def make_student(**config):
    return tiny.model("llama", layers=2, seed=0, **({"initializer_range": 0.15} | config))


def gated(
    folder, *, student=None, teacher=None, spec=SPEC, objectives=(LogitObjective,), ramp=None, ce_weight=0.0, **config
):
    student = student or make_student()
    gates = GateObjective(student, spec, ramp=ramp)
    trainer = KDTrainer(
        student,
        teacher or tiny.model("llama", layers=2, seed=1, initializer_range=0.15),
        KDConfig(str(folder), ce_weight=ce_weight, **(COMMON | {"max_steps": 2} | config)),
        objectives=[*(kind(1.0) for kind in objectives), gates],
        train_dataset=tiny.tokenized_dataset(16),
        eval_dataset=tiny.tokenized_dataset(5, seed=1),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
    )
    return trainer, gates


def shut(gates, kind, closed) -> None:
    """Close some gates of every layer for good, and open the others."""
    with torch.no_grad():
        gates.log_alpha[kind].fill_(8.0)
        gates.log_alpha[kind][:, closed] = -8.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_student_whose_gates_are_1_is_the_student_bit_for_bit(family, dtype):
    student = tiny.model(family).to(dtype)
    expected, before = student(IDS).logits, hooks(student)
    gates = GateObjective(student, SPEC)
    assert torch.equal(student(IDS).logits, expected)
    gates.finish()
    assert torch.equal(student(IDS).logits, expected)
    assert hooks(student) == before


def test_gates_in_training_are_the_draws_of_the_step():
    student = make_student()
    gates = GateObjective(student, SPEC)
    shut(gates, "mlp", [])
    with torch.no_grad():
        gates.log_alpha["mlp"].zero_()
    gates.move(0.0)
    layer, passed = student.model.layers[1].mlp.train(), {}
    for name in ("act_fn", "up_proj"):
        layer.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: passed.update({name: output})
        )
    layer.down_proj.register_forward_hook(lambda module, args, output: passed.update(found=args[0]))
    layer(torch.randn(1, 3, 32))
    found = passed["found"]
    expected = passed["act_fn"] * passed["up_proj"] * sampled_gates(torch.zeros(64), gates._uniform("mlp")[1])
    torch.testing.assert_close(found, expected)
    assert 5 < (found[0, 0] == 0).sum() < 30


def test_a_closed_head_gives_nothing_and_evaluation_draws_nothing():
    student = make_student()
    gates = GateObjective(student, PruneSpec(num_attention_heads=2))
    shut(gates, "heads", [1, 2])
    found = student(IDS).logits
    assert torch.equal(student(IDS).logits, found)
    gates.finish()
    plain = make_student()
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.o_proj.weight[:, 8:24] = 0
    torch.testing.assert_close(found, plain(IDS).logits)
    torch.testing.assert_close(student(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize(
    ("spec", "closed"),
    [
        (PruneSpec(intermediate_size=48, round_to=16), {"mlp": list(range(10, 26))}),
        (PruneSpec(num_attention_heads=2), {"heads": [0, 3]}),  # one of each group
        (PruneSpec(num_key_value_heads=1), {"heads": [0]}),  # the first group
        (SPEC, {"mlp": list(range(32)), "heads": [1, 2]}),
    ],
)
def test_the_cut_model_is_the_gated_one(spec, closed):
    student = make_student()
    gates = GateObjective(student, spec)
    for kind, units in closed.items():
        shut(gates, kind, units)
    with torch.no_grad():
        for kind, units in closed.items():
            stay = next(unit for unit in range(gates.log_alpha[kind].shape[1]) if unit not in units)
            gates.log_alpha[kind][:, stay] = 0.5  # half open: folded into the weights
    expected = student(IDS).logits
    assert not torch.allclose(expected, make_student()(IDS).logits, rtol=0.01)
    scores = gates.finish()
    torch.testing.assert_close(student(IDS).logits, expected)
    cut, _ = prune(student, spec, scores)
    torch.testing.assert_close(cut(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in student.parameters())


def test_the_cut_of_the_batch_and_checkpoints_change_neither_gates_nor_student(tmp_path):
    runs = []
    for size, steps, checkpoints in [(8, 1, False), (2, 4, False), (2, 4, True)]:
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        if checkpoints:
            cut |= {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
        trainer, _ = gated(tmp_path, ramp=linear(1.0, 1.0), objective_lr_multiplier=2.0, max_steps=3, **cut)
        before = trained(trainer)
        trainer.train()
        after = trained(trainer)
        owned = {name for name in before if name.startswith("objective.")}
        assert len(owned) == 4
        assert all((after[name] - before[name]).abs().max() > 1e-5 for name in owned)
        runs.append((logged(trainer, "loss"), logged(trainer, "gates_loss"), after))
    for losses, penalties, weights in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        assert penalties == pytest.approx(runs[0][1], rel=1e-5)
        for name, value in runs[0][2].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_of_gradient_descent_is_that_of_the_lagrangian(tmp_path):
    """All terms at once from autograd on the closed forms: descent for gates, ascent for multipliers."""
    trainer, gates = gated(
        tmp_path, ramp=linear(1.0, 1.0), max_steps=1, objective_lr_multiplier=1.0, objectives=(), ce_weight=1e-12
    )
    with torch.no_grad():
        gates.multipliers["mlp"].copy_(torch.tensor([[[0.3], [-0.2]], [[0.5], [0.7]]]))
    location = gates.log_alpha["mlp"].detach().clone().requires_grad_()
    multipliers = gates.multipliers["mlp"].detach().clone().requires_grad_()
    gap = torch.sigmoid(location - 2 / 3 * torch.tensor(0.1 / 1.1).log()).mean(1) - 0.5
    lagrangian = (multipliers[0, :, 0] * gap + multipliers[1, :, 0] * gap**2).sum()
    lagrangian.backward()
    trainer.train()
    assert logged(trainer, "gates_loss")[0] == pytest.approx(lagrangian.item(), rel=1e-5)
    torch.testing.assert_close(gates.log_alpha["mlp"], location - 0.5 * location.grad)
    torch.testing.assert_close(gates.multipliers["mlp"], multipliers + 0.5 * multipliers.grad)


def test_the_budget_is_held_and_what_is_planted_as_useless_is_closed(tmp_path):
    student, teacher = make_student(), make_student()
    with torch.no_grad():
        for model in (student, teacher):
            for layer in model.model.layers:
                layer.mlp.down_proj.weight[:, ::2] *= 0.01
    spec = PruneSpec(intermediate_size=32, round_to=16)
    models = {"student": student, "teacher": teacher}
    trainer, gates = gated(
        tmp_path, **models, spec=spec, max_steps=120, per_device_train_batch_size=4, **(ADAM | FAST)
    )
    trainer.train()
    shares = logged(trainer, "gates_open_share")
    assert shares[0] > 0.98
    assert shares[-1] == pytest.approx(0.5, abs=0.05)
    openness = open_probability(gates.log_alpha["mlp"])
    assert openness.mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.05)  # in every layer
    assert (openness.topk(32).indices % 2).float().mean() > 0.75  # the even ones are useless
    scores = gates.finish()
    cut, _ = prune(trainer.model, spec, scores)
    assert cut.config.intermediate_size == 32


def test_a_stopped_run_resumes_as_if_nothing_had_happened(tmp_path):
    config = {"max_steps": 4, "per_device_train_batch_size": 4, **ADAM}
    whole, gates = gated(tmp_path, save_strategy="steps", save_steps=2, **config)
    whole.train()
    resumed, again = gated(tmp_path, **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again._draws == gates._draws == 4
    for key in ("loss", "gates_loss", "gates_open_share"):
        assert logged(resumed, key) == pytest.approx(logged(whole, key), rel=1e-6), key
    for name, value in trained(whole).items():
        torch.testing.assert_close(trained(resumed)[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_checkpoints_hold_a_plain_student_and_noise_differs_from_step_to_step(tmp_path):
    trainer, gates = gated(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    first = gates._uniform("mlp").clone()
    trainer.train()
    assert not torch.equal(gates._uniform("mlp"), first)
    plain = type(trainer.model).from_pretrained(tmp_path / "checkpoint-1")
    assert plain.state_dict().keys() == make_student().state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[name])


def test_the_ramp_goes_to_the_budget_by_the_middle_of_the_run(tmp_path):
    _, gates = gated(tmp_path)
    targets = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        gates.move(progress)
        targets.append(gates._open_share.ramp)
    assert targets == [0.0, 0.5, 1.0, 1.0]
    assert "1 at 50%" in str(gates.config()["open_share"])
    with pytest.raises(ValueError, match=r"`ramp`.*0 to 1"):
        GateObjective(make_student(), SPEC, ramp=piecewise([(0.0, 0.0), (1.0, 1.5)]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PruneSpec(intermediate_size=64), "64 neurons and 4 heads in each layer as they are"),
        (PruneSpec(num_hidden_layers=1, intermediate_size=32, round_to=16), r"\['depth'\], which gates do not"),
        (PruneSpec(hidden_size=16, round_to=16), r"\['hidden_size'\]"),
        (PruneSpec(num_attention_heads=1, num_key_value_heads=1), "leave out `num_attention_heads` or"),
    ],
)
def test_what_gates_cannot_choose_is_refused(spec, message):
    student = make_student()
    before = hooks(student)
    with pytest.raises(ValueError, match=message):
        GateObjective(student, spec)
    assert hooks(student) == before


def test_a_student_with_adapters_is_refused_and_gates_are_taken_out_once():
    adapted = get_peft_model(make_student(), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="merge_and_unload"):
        GateObjective(adapted, SPEC)
    gates = GateObjective(make_student(), SPEC)
    gates.finish()
    with pytest.raises(ValueError, match="`finish` was called before"):
        gates.finish()


def test_settled_gates_are_where_scores_put_them():
    gates = GateObjective(make_student(), SPEC)
    with torch.no_grad():
        gates.log_alpha["mlp"].copy_(torch.linspace(-5, 5, 128).view(2, 64))
    settled = settled_gates(gates.log_alpha["mlp"])
    scores = gates.finish()
    assert (settled.diff(dim=1) >= 0).all()
    assert (settled == 0).any()
    assert (settled == 1).any()
    assert (scores.mlp.diff(dim=1) > 0).all()  # no ties among those that are 0 or 1
    assert scores.provenance == {"mlp": "hard-concrete gates", "heads": "hard-concrete gates"}


def test_every_group_that_shares_keys_has_a_budget_of_its_own():
    gates = GateObjective(make_student(), PruneSpec(num_attention_heads=2), ramp=linear(1.0, 1.0))
    gates.move(0.0)
    student = StudentSignals(Projection(torch.zeros(3, 32), identity), torch.tensor([7, 8, 9]))
    with torch.no_grad():
        gates.multipliers["heads"].fill_(1.0)
        for open_heads, held in [([0, 2], True), ([0, 1], False)]:
            gates.log_alpha["heads"].fill_(-20.0)
            gates.log_alpha["heads"][:, open_heads] = 20.0
            penalty = gates(student, TeacherSignals())
            # Two layers of two groups, each half a share off, once for each of three labels; linear parts cancel.
            assert penalty.item() == pytest.approx(0 if held else 3 * 2 * 2 * 0.25, abs=1e-6)
