from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_distill.signals import Signal
from hf_distill.teachers import AdapterDisabledTeacher, check_not_student, check_same_task
from tests import tiny


LOGITS = frozenset({Signal.LOGITS})
BATCH = {"input_ids": torch.arange(10, 22).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def adapted(model: nn.Module, **config) -> nn.Module:
    """A LoRA student whose adapter has learned something."""
    config = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5, "task_type": "CAUSAL_LM"} | config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = get_peft_model(model, LoraConfig(r=4, **config))
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return student.train()


def logits_of(teacher: AdapterDisabledTeacher) -> torch.Tensor:
    projection = teacher.signals(BATCH | {"labels": BATCH["input_ids"]}, LOGITS).logits
    return projection.head(projection.hidden)  # outside of the context, as the loss does it


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [11, 12]},
        {"use_dora": True},
    ],
    ids=["layers", "lm_head", "modules_to_save", "tokens", "dora"],
)
def test_the_teacher_is_the_untouched_base_also_when_the_head_is_adapted(config):
    base = tiny.model()
    expected = base(**BATCH).logits.detach()
    student = adapted(copy.deepcopy(base), **config)
    teacher = AdapterDisabledTeacher(student)
    torch.testing.assert_close(logits_of(teacher), expected)
    with torch.no_grad():
        assert (student.eval()(**BATCH).logits - expected).abs().max() > 1e-3


def test_a_classifier_uses_the_base_head():
    base = tiny.model("bert", task="sequence_classification", num_labels=3)
    expected = base(**BATCH).logits.detach()
    student = adapted(copy.deepcopy(base), target_modules=["query"], task_type="SEQ_CLS")
    torch.testing.assert_close(logits_of(AdapterDisabledTeacher(student)), expected)


def test_base_dropout_is_off_in_the_teachers_pass():
    base = tiny.model("gpt2", resid_pdrop=0.5)
    expected = base(**BATCH).logits.detach()
    student = adapted(copy.deepcopy(base), target_modules=["c_attn"], fan_in_fan_out=True)
    torch.testing.assert_close(logits_of(AdapterDisabledTeacher(student)), expected)


def flags_of(student: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    return (
        {name: module.training for name, module in student.named_modules()},
        {name: parameter.requires_grad for name, parameter in student.named_parameters()},
    )


def test_every_flag_is_restored():
    student = adapted(tiny.model(), modules_to_save=["lm_head"])
    student.get_base_model().model.layers[1].eval()
    next(p for n, p in student.named_parameters() if "lora_A" in n).requires_grad_(False)
    before = flags_of(student)
    logits_of(AdapterDisabledTeacher(student))
    assert flags_of(student) == before
    assert any(before[0].values())
    assert not student._adapters_disabled


def test_every_flag_is_restored_after_an_error():
    student = adapted(tiny.model())
    teacher, before = AdapterDisabledTeacher(student), flags_of(student)
    with pytest.raises(IndexError):
        teacher.signals({"input_ids": torch.full((1, 3), 320)}, LOGITS)
    assert flags_of(student) == before
    with torch.no_grad():
        student.eval()
        assert not torch.equal(student(**BATCH).logits, logits_of(teacher))  # the adapter is on again


def test_the_student_has_the_same_gradients_with_the_teacher_in_its_step():
    def gradients(with_teacher: bool) -> dict[str, torch.Tensor]:
        student = adapted(tiny.model(), lora_dropout=0.0)
        teacher = AdapterDisabledTeacher(student)
        before = logits_of(teacher) if with_teacher else None
        logits = student(**BATCH).logits
        if with_teacher:  # the graph of the student is alive in this one
            torch.testing.assert_close(logits_of(teacher), before)
        logits.logsumexp(-1).sum().backward()
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    alone, together = gradients(False), gradients(True)
    assert alone.keys() == together.keys()
    assert len(alone) == 8
    for name, gradient in alone.items():
        assert torch.equal(gradient, together[name])


def test_the_wrapped_model_is_called_as_it_was_given():
    class Wrapper(nn.parallel.DistributedDataParallel):
        """DDP as far as unwrapping and calling go, without a process group."""

        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module
            self.calls = 0

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    base = tiny.model()
    expected = base(**BATCH).logits.detach()
    wrapper = Wrapper(adapted(copy.deepcopy(base)))
    torch.testing.assert_close(logits_of(AdapterDisabledTeacher(wrapper)), expected)
    assert wrapper.calls == 1


def test_a_fresh_adapter_agrees_with_its_base_under_autocast():
    student = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits_of(AdapterDisabledTeacher(student)), student(**BATCH).logits)


def test_the_base_is_accepted_by_the_other_checks():
    student = adapted(tiny.model())
    teacher = AdapterDisabledTeacher(student)
    check_not_student(student, teacher)
    check_same_task(student, teacher)
    assert teacher.vocab_size == 320
    assert teacher.config_for_card() == {"architecture": "LlamaForCausalLM", "adapter": "disabled"}


def test_a_student_without_adapter_is_refused_with_the_line_that_fixes_it():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*peft_config=LoraConfig"):
        AdapterDisabledTeacher(tiny.model())


def test_prompt_learning_is_refused():
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"prompt learning.*LoraConfig"):
        AdapterDisabledTeacher(get_peft_model(tiny.model(), config))


@pytest.mark.parametrize("how", ["bias", "unfrozen"])
def test_a_base_that_is_trained_itself_is_refused(how):
    student = adapted(tiny.model("gpt2"), target_modules=["c_attn"], bias="all" if how == "bias" else "none")
    if how == "unfrozen":
        student.get_base_model().transformer.ln_f.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"frozen base, but .* are trained"):
        AdapterDisabledTeacher(student)
