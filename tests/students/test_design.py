from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, Qwen3Config

from hf_distill.students import shrink, student_from_config
from hf_distill.teachers import load_teacher
from tests import tiny
from tests.students.twins import DOWN, GATED, IDS, logits


SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


@pytest.mark.parametrize("family", [*GATED, *DOWN])
def test_a_teacher_is_scaled_down_with_fresh_weights(family, tmp_path):
    teacher = tiny.model(family, layers=4)
    student = student_from_config(teacher, **SIZES)
    assert type(student) is type(teacher)
    assert student.num_parameters() < teacher.num_parameters() / 2
    assert student.config.hidden_size == 16
    assert student.config.num_hidden_layers == 2
    assert logits(student).shape == (2, 9, 320)
    assert teacher.config.hidden_size == 32
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(type(student).from_pretrained(tmp_path).eval()), logits(student))


def test_the_seed_decides_the_weights_and_the_random_state_is_left_alone():
    teacher = tiny.model("llama")
    state = torch.get_rng_state()
    first, same, other = (student_from_config(teacher, seed=seed, **SIZES) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(first), logits(same))
    assert not torch.equal(logits(first), logits(other))
    assert not first.training


def test_what_follows_from_the_sizes_follows():
    def config(family, given, **sizes):
        return student_from_config(tiny.model(family, layers=4, **given), **sizes).config

    llama = config("llama", {}, hidden_size=16, num_attention_heads=2)
    assert (llama.head_dim, llama.num_key_value_heads) == (8, 1)
    assert config("llama", {"head_dim": 16}, hidden_size=16).head_dim == 16  # was not hidden size over heads
    assert config("llama", {}, num_attention_heads=8, num_key_value_heads=4).num_key_value_heads == 4
    gemma = config("gemma2", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, num_hidden_layers=2)
    assert gemma.layer_types == ["full_attention", "sliding_attention"]
    assert config("gemma2", {}, num_hidden_layers=6).layer_types == ["sliding_attention", "full_attention"] * 3
    assert config("opt", {}, hidden_size=16).word_embed_proj_dim == 16


def test_another_architecture_comes_from_its_config():
    config = Qwen3Config(**(tiny.GROUPED | {"head_dim": 8}))
    student = student_from_config(config, vocab_size=400, num_hidden_layers=1)
    assert type(student).__name__ == "Qwen3ForCausalLM"
    assert logits(student).shape == (2, 9, 400)
    assert config.vocab_size == 320
    masked = tiny.model("bert").config
    masked.architectures = ["BertForMaskedLM"]
    assert type(student_from_config(masked, num_hidden_layers=1)).__name__ == "BertForMaskedLM"


def test_nothing_of_the_teachers_weights_or_files_is_taken_over(tmp_path):
    shrink(tiny.model("llama", layers=3), num_hidden_layers=2).save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, quantization="nf4").model
    student = student_from_config(teacher, hidden_size=16)
    assert not hasattr(student.config, "quantization_config")
    assert not hasattr(student.config, "hf_distill")
    assert student.config.name_or_path == ""
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    adapted = get_peft_model(tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert student_from_config(adapted, hidden_size=16)(IDS).logits.shape == (2, 9, 320)


@pytest.mark.parametrize(
    ("source", "sizes", "message"),
    [
        (
            tiny.model("llama"),
            {"layers": 2},
            r"LlamaConfig has no \['layers'\]; expected fields such as .*hidden_size",
        ),
        (tiny.model("llama"), {"num_attention_heads": 5, "num_key_value_heads": 1}, "does not take .*multiple"),
        (tiny.model("llama"), {"num_attention_heads": 5}, "`num_key_value_heads` 2; expected a multiple"),
        (GPT2Config(architectures=["Nothing"]), {}, "which transformers does not have"),
    ],
)
def test_sizes_that_make_no_model_are_refused(source, sizes, message):
    with pytest.raises(ValueError, match=message):
        student_from_config(source, **sizes)
