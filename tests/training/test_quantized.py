"""4-bit weights end to end: as the teacher that a config names, and under the adapter of a student."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from hf_distill import KDConfig, KDTrainer, load_teacher
from hf_distill.quantization import bitsandbytes_config
from hf_distill.teachers import prepare_quantized_student
from tests import tiny
from tests.training.runs import COMMON, LORA, logged


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student and a teacher, saved with their tokenizer."""
    paths = {}
    for seed, role in enumerate(("student", "teacher")):
        paths[role] = tmp_path_factory.mktemp(role)
        tiny.model(hidden_size=64, intermediate_size=128, seed=seed).save_pretrained(paths[role])
        tiny.tokenizer().save_pretrained(paths[role])
    return paths


def qlora_student(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=bitsandbytes_config("nf4"), dtype=torch.float32
    )


def make(student, folders, output_dir, **config) -> KDTrainer:
    return KDTrainer(
        student,
        args=KDConfig(
            str(output_dir),
            teacher_model_name_or_path=str(folders["teacher"]),
            per_device_train_batch_size=4,
            **(COMMON | config),
        ),
        train_dataset=tiny.tokenized_dataset(),
        eval_dataset=tiny.tokenized_dataset(4, seed=1),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA) if getattr(student, "is_loaded_in_4bit", False) else None,
    )


def quantised(model) -> bool:
    return any(parameter.dtype == torch.uint8 for parameter in model.parameters())


def test_a_teacher_quantised_by_the_config_gives_the_loss_of_that_teacher(folders, tmp_path):
    config = {"teacher_quantization": "nf4", "ce_weight": 0.0, "kd_weight": 1.0}
    trainer = make(tiny.model(hidden_size=64, intermediate_size=128), folders, tmp_path, **config)
    assert quantised(trainer.teacher.model)
    assert not quantised(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    kept = batch["labels"][:, 1:] != -100
    features = {name: batch[name] for name in ("input_ids", "attention_mask")}
    teacher = load_teacher(str(folders["teacher"]), quantization="nf4").model
    p, q = (m(**features).logits[:, :-1][kept].float().log_softmax(-1) for m in (teacher, trainer.model))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_on_a_4_bit_student_learns_through_evaluations_and_is_saved_alone(folders, tmp_path):
    config = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 1.0}
    trainer = make(qlora_student(folders["student"]), folders, tmp_path, **config)
    assert quantised(trainer.model)
    assert not quantised(trainer.teacher.model)  # the student's 4 bits are no choice about the teacher
    adapter = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
    trainer.train()
    # Every evaluation repacks 4-bit layers that were not prepared, and gradients below them are then exactly zero.
    assert min(logged(trainer, "grad_norm")) > 0
    changed = [n for n, p in trainer.model.named_parameters() if n in adapter and not torch.equal(p, adapter[n])]
    assert sorted(changed) == sorted(adapter)
    trainer.save_model()
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {"adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(qlora_student(folders["student"]), tmp_path)
    prepare_quantized_student(loaded)  # else it evaluates with a kernel that rounds otherwise
    batch = next(iter(trainer.get_eval_dataloader()))
    features = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (model.eval()(**features).logits for model in (trainer.model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
