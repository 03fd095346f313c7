"""Quantisation-aware distillation under the trainer, and quantised students that it must not train."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TorchAoConfig, Trainer, TrainingArguments

from hf_distill import DistillationCallback, KDConfig, KDTrainer
from hf_distill.students import convert_qat, load_quantized, prepare_qat, quantize
from hf_distill.teachers import prepare_quantized_student
from tests.students.rounding import student
from tests.training.runs import COMMON, LORA


pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")


def rows(count: int, seed: int) -> Dataset:
    """Sequences of 24 random ids."""
    ids = torch.randint(5, 300, (count, 24), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def make(model, folder, **config) -> KDTrainer:
    settings = {"per_device_train_batch_size": 8, "ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0}
    args = KDConfig(str(folder), **(COMMON | settings | config))
    return KDTrainer(model, args=args, teacher_model=student(), train_dataset=rows(480, 0))


def test_distilling_with_the_rounding_loses_less_than_rounding_afterwards(tmp_path):
    held_out = rows(16, 1)
    rounded = quantize(student(), tmp_path / "ptq", "w4a16", group_size=32, check=held_out)
    model = prepare_qat(student())
    before = copy.deepcopy(model.state_dict())
    trainer = make(
        model,
        tmp_path / "run",
        max_steps=60,
        optim="adamw_torch",
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        logging_steps=60,
    )
    trainer.train()
    unchanged = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])]
    assert unchanged == []
    trained = convert_qat(trainer.model, tmp_path / "qad", check=held_out, reference=student())
    assert trained.kl < 0.65 * rounded.kl
    assert trained.bits_per_quantized_weight == rounded.bits_per_quantized_weight
    batch = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        ours, theirs = (each.eval()(batch).logits for each in (load_quantized(tmp_path / "qad"), trainer.model))
    assert torch.equal(ours, theirs)


def loaded(folder, config) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(config), dtype=torch.float32)


def dynamic_configs() -> list:
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerGroup,
    )

    intx = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    return [Int8DynamicActivationInt8WeightConfig(), intx]


@pytest.mark.parametrize("config", dynamic_configs(), ids=lambda config: type(config).__name__)
def test_a_student_whose_layers_have_no_backward_is_refused(config, tmp_path):
    student().save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match=r"passes no gradient.*prepare_qat"):
        prepare_quantized_student(loaded(tmp_path / "student", config))
    with pytest.raises(ValueError, match=r"passes no gradient|not support training"):  # transformers knows the second
        make_lora(loaded(tmp_path / "student", config), tmp_path)


def test_the_callback_refuses_it_too(tmp_path):
    student().save_pretrained(tmp_path / "student")
    model = get_peft_model(loaded(tmp_path / "student", dynamic_configs()[0]), LoraConfig(**LORA))
    trainer = Trainer(
        model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True), train_dataset=rows(8, 0)
    )
    with pytest.raises(ValueError, match="passes no gradient"):
        DistillationCallback(trainer, teacher_model=student())


def test_an_adapter_on_an_int8_student_trains(tmp_path):
    quantize(student(), tmp_path / "int8")
    trainer = make_lora(load_quantized(tmp_path / "int8", dtype=torch.float32), tmp_path / "run")
    before = copy.deepcopy({name: p.data for name, p in trainer.model.named_parameters() if "lora_B" in name})
    trainer.train()
    moved = {
        name for name, p in trainer.model.named_parameters() if name in before and not torch.equal(p, before[name])
    }
    assert moved == set(before)


def make_lora(model, folder) -> KDTrainer:
    return make(get_peft_model(model, LoraConfig(**LORA)), folder, max_steps=2, learning_rate=1e-2)
