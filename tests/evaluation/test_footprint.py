from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_distill.evaluation import KLDivergence, evaluate_retention
from hf_distill.evaluation.footprint import footprint, peak_bytes, weight_bytes
from hf_distill.evaluation.scoring import preserved_state
from hf_distill.teachers import AdapterDisabledTeacher, ModelTeacher
from tests import tiny


def saved_bytes(model, folder: Path) -> int:
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_that_a_save_writes(tied, dtype, tmp_path):
    model = tiny.model(tie_word_embeddings=tied, layers=4).to(dtype)

    saved = saved_bytes(model, tmp_path)

    # The rest of the file is its header.
    assert weight_bytes(model) <= saved <= weight_bytes(model) + 8000


def test_an_adapter_counts_with_its_base():
    base = tiny.model()
    student = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
    adapter = sum(p.numel() for p in student.parameters() if p.requires_grad)

    plain, adapted = (footprint("student", model) for model in (base, student))

    assert adapted.parameters == plain.parameters + adapter
    assert adapted.weight_bytes == plain.weight_bytes + 4 * adapter


class Layer(nn.Module):
    def forward(self, input_ids):
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB at once
        del first
        return second.sum()


def test_the_peak_is_what_lives_at_once():
    assert 8_000_000 <= peak_bytes(Layer(), torch.ones(1, 1, dtype=torch.int64)) < 8_200_000


def test_a_deeper_model_is_larger_and_slower():
    small, large = (footprint("student", tiny.model(layers=layers, hidden_size=64)) for layers in (1, 12))

    assert large.parameters == tiny.model(layers=12, hidden_size=64).num_parameters()
    assert large.weight_bytes > 3 * small.weight_bytes
    assert large.peak_bytes > large.weight_bytes
    assert large.tokens_per_second < small.tokens_per_second
    assert (large.dtype, large.model) == ("float32", "student")
    assert large.device.startswith(f"cpu, {torch.get_num_threads()} thread")


def test_what_mixed_precision_put_around_a_trained_model_is_not_measured():
    model = tiny.model(layers=1, vocab_size=4000).to(torch.bfloat16)
    plain = footprint("student", model)
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier trainer's precision would be kept
    model = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    wrapped = model.forward

    assert footprint("student", model).peak_bytes == plain.peak_bytes
    assert peak_bytes(model, torch.zeros(4, 128, dtype=torch.int64)) > plain.peak_bytes  # the logits again, in fp32
    assert model.forward is wrapped


def test_every_task_is_measured():
    for family, task in (("bert", "sequence_classification"), ("roberta", "masked_lm"), ("opt", "causal_lm")):
        model = tiny.model(family, task=task, max_position_embeddings=64)
        with preserved_state([model]):
            assert footprint("student", model).tokens_per_second > 0


def test_teachers_are_measured_as_their_models():
    model, dataset = tiny.model(seed=2, layers=3), [KLDivergence(tiny.tokenized_dataset(2))]
    student = get_peft_model(tiny.model(seed=1), LoraConfig(r=4, target_modules=["q_proj"]))

    wrapped = evaluate_retention(tiny.model(), ModelTeacher(model), dataset).footprints[0]
    base = evaluate_retention(student, AdapterDisabledTeacher(student), dataset).footprints[0]

    assert wrapped.parameters == model.num_parameters()
    assert base.model == "teacher"
    assert base.tokens_per_second > 0
