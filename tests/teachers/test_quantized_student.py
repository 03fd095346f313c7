from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_distill.quantization import bitsandbytes_config
from hf_distill.signals import Signal
from hf_distill.teachers import AdapterDisabledTeacher, prepare_quantized_student
from tests import tiny


BATCH = {"input_ids": torch.arange(10, 22).view(2, 6)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def qlora_student(folder, quantization: str = "nf4") -> nn.Module:
    config = bitsandbytes_config(quantization)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, lora)


def gradients(student: nn.Module) -> dict[str, Tensor]:
    student.train().zero_grad()
    student(**BATCH).logits.float().logsumexp(-1).sum().backward()
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


def evaluate(student: nn.Module) -> None:
    with torch.no_grad():
        student.eval()(**BATCH)


def repacks(student: nn.Module) -> bool:
    return any(getattr(module, "support_avx512bf16_for_cpu", False) for module in student.modules())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_eval_pass_leaves_the_gradients_of_a_prepared_student_as_they_were(folder, quantization):
    student = qlora_student(folder, quantization)
    prepare_quantized_student(student)
    before = gradients(student)
    evaluate(student)
    after = gradients(student)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(after[name], gradient)


def test_an_unprepared_student_loses_the_gradients_of_its_lower_layers(folder):
    student = qlora_student(folder)
    if not repacks(student):
        pytest.skip("bitsandbytes repacks weights only on CPUs with AVX512-BF16")
    lowest = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight"
    assert gradients(student)[lowest].abs().max() > 0
    evaluate(student)
    after = gradients(student).get(lowest)
    assert after is None or not after.any()  # when this fails, bitsandbytes has repaired it
    with pytest.raises(ValueError, match=r"ran in eval mode before.*Load it again"):
        prepare_quantized_student(student)


def test_the_teachers_pass_over_a_quantised_base_leaves_the_gradients_too(folder):
    student = qlora_student(folder)
    teacher = AdapterDisabledTeacher(student)
    before = gradients(student)
    teacher.signals(BATCH, frozenset({Signal.LOGITS}))
    after = gradients(student)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


def test_other_models_are_left_alone():
    prepare_quantized_student(tiny.model())
