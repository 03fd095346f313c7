"""Layers that are left out in training: which, of whom, and that the rest of the run is what it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from hf_distill.objectives.schedules import linear
from hf_distill.students import shrink
from hf_distill.training.layer_drop import LayerDropCallback
from tests import tiny
from tests.training.runs import logged, make_trainer, trained
from tests.training.test_trainers import naive_loss


def models():
    return tiny.model("llama", layers=4, seed=0), tiny.model("llama", layers=3, seed=1)


def run(folder, probability=0.5, *, seed=0, watch=None, **config):
    trainer = make_trainer("kd", folder, models=models(), **({"max_steps": 3} | config))
    callback = LayerDropCallback(probability, seed=seed)
    trainer.add_callback(callback)
    if watch is not None:
        trainer.add_callback(Watch(callback, watch))
    return trainer


class Watch(TrainerCallback):
    """Notes what every step leaves out."""

    def __init__(self, callback, seen) -> None:
        self.callback, self.seen = callback, seen

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.callback.dropped)


def test_the_loss_of_a_step_is_that_of_the_student_without_the_layers_of_the_draw(tmp_path):
    seen: list[frozenset[int]] = []
    trainer = run(tmp_path, max_steps=1, watch=seen, seed=1)
    batch = next(iter(trainer.get_train_dataloader()))
    student, teacher = models()
    trainer.train()
    [dropped] = seen
    assert 0 < len(dropped) < 4
    cut = shrink(student, layers=[index for index in range(4) if index not in dropped])
    expected = naive_loss(cut, teacher, batch, shift=True, ce=0.5, kd=0.5)
    assert logged(trainer, "loss") == pytest.approx([expected.item()], rel=1e-4)


def test_weights_of_a_layer_that_is_left_out_rest(tmp_path):
    seen: list[frozenset[int]] = []
    trainer = run(tmp_path, max_steps=1, watch=seen, seed=1, optim="adamw_torch", weight_decay=0.1)
    before = trained(trainer)
    trainer.train()
    moved = {name for name, value in trained(trainer).items() if not torch.equal(value, before[name])}
    for index in range(4):
        own = {name for name in before if f"layers.{index}." in name}
        assert own <= moved if index not in seen[0] else not own & moved


def test_the_cut_of_the_batch_and_checkpoints_change_nothing(tmp_path):
    seen: list[frozenset[int]] = []
    one = run(tmp_path, per_device_train_batch_size=8, watch=seen)
    one.train()
    assert len({*seen}) > 1
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "activation_checkpointing": True}
    for reentrant in (False, True):
        other = run(tmp_path, activation_checkpointing_kwargs={"use_reentrant": reentrant}, **config)
        other.train()
        for name, value in trained(one).items():
            torch.testing.assert_close(trained(other)[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_resumed_run_draws_what_the_whole_one_would_have(tmp_path):
    whole: list[frozenset[int]] = []
    resumed: list[frozenset[int]] = []
    first = run(tmp_path, max_steps=4, watch=whole, save_strategy="steps", save_steps=2)
    first.train()
    second = run(tmp_path, max_steps=4, watch=resumed)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed == whole[2:]
    assert len({*whole}) > 2
    for name, value in trained(first).items():
        torch.testing.assert_close(trained(second)[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_evaluation_has_all_layers_and_the_teacher_is_untouched(tmp_path):
    trainer = run(tmp_path, 0.9, max_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=0.0)
    plain = make_trainer("kd", tmp_path, models=models()).evaluate()
    teacher = trainer.teacher.model
    trainer.train()
    for value in logged(trainer, "eval_loss"):
        assert value == pytest.approx(plain["eval_loss"], rel=1e-6)
    assert logged(trainer, "teacher_nll")[0] > 0
    for layer in (*trainer.model.model.layers, *teacher.model.layers):
        assert "forward" not in vars(layer)


def test_draws_follow_their_probability_and_schedule(tmp_path):
    callback = LayerDropCallback(linear(0.0, 0.5))
    args = SimpleNamespace(activation_checkpointing=False, ddp_find_unused_parameters=None, world_size=1)
    make_trainer("kd", tmp_path)  # there is an accelerator
    callback.on_train_begin(args, None, None, model=tiny.model("llama", layers=4))
    counts = []
    for step in range(1001):
        callback.on_step_begin(args, SimpleNamespace(global_step=step, max_steps=1001), None)
        counts.append(len(callback.dropped))
    callback.on_train_end(args, None, None)
    assert counts[0] == 0
    assert sum(counts[:500]) / 2000 == pytest.approx(0.125, abs=0.03)
    assert sum(counts[500:]) / 2000 == pytest.approx(0.375, abs=0.04)


def test_a_run_that_failed_leaves_nothing_to_the_next(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("a lost node")

    trainer = run(tmp_path, max_steps=1)
    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="lost node"):
        trainer.train()
    trainer.remove_callback(Fail)
    trainer.train()
    assert all("forward" not in vars(layer) for layer in trainer.model.model.layers)


@pytest.mark.parametrize("probability", [1.0, -0.1, linear(0.0, 1.0)])
def test_a_probability_out_of_range_is_refused(probability):
    with pytest.raises(ValueError, match=r"`probability`.*\[0, 1\)"):
        LayerDropCallback(probability)


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        ({"ddp_find_unused_parameters": None}, False),
        ({"ddp_find_unused_parameters": False}, True),
        ({"ddp_find_unused_parameters": None, "activation_checkpointing": True}, True),
        ({"ddp_find_unused_parameters": True, "activation_checkpointing": True}, False),
    ],
)
def test_a_ddp_that_would_wait_for_every_gradient_is_refused(args, refused, tmp_path):
    make_trainer("kd", tmp_path)
    callback, settings = LayerDropCallback(0.1), SimpleNamespace(world_size=2, **args)
    if not refused:
        callback.on_train_begin(settings, None, None, model=tiny.model("llama"))
        return
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=True"):
        callback.on_train_begin(settings, None, None, model=tiny.model("llama"))
