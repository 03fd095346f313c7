from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

from hf_distill.anatomy import describe
from hf_distill.students.shrink import choose_layers, shrink
from hf_distill.teachers import load_teacher
from tests import tiny


IDS = torch.randint(5, 300, (2, 9), generator=torch.Generator().manual_seed(0))
# Settings that make the depth of a layer matter: windows, layers without rotary positions, experts of attention.
DEPTH_MATTERS = {
    "gemma2": {"sliding_window": 3},
    "gemma3": {"sliding_window": 3},
    "mistral": {"sliding_window": 3},
    "phi3": {"sliding_window": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3},
    "smollm3": {"use_sliding_window": True, "sliding_window": 3},
}


def build(family: str, layers: int = 7, **config):
    model = tiny.model(family, layers=layers, **(DEPTH_MATTERS.get(family, {}) | config))
    with torch.no_grad():  # larger weights than at initialisation: every layer must matter to the logits
        for parameter in describe(model).layers.parameters():
            parameter.mul_(4)
    return model


def skip(layer: nn.Module):
    """Make a layer pass its input on."""

    def passthrough(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return layer.register_forward_hook(passthrough, with_kwargs=True)


def logits_without(model: nn.Module, kept: list[int]) -> torch.Tensor:
    handles = [skip(layer) for index, layer in enumerate(describe(model).layers) if index not in kept]
    try:
        with torch.no_grad():
            return model(input_ids=IDS).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeping_every_layer_reproduces_the_teacher(family):
    teacher = build(family, layers=3)
    student = shrink(teacher, num_hidden_layers=3)
    assert type(student) is type(teacher)
    with torch.no_grad():
        assert torch.equal(student(IDS).logits, teacher(IDS).logits)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_layers_compute_what_they_did_in_the_teacher(family, tmp_path):
    kept = [0, 3, 5]
    teacher = build(family)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    config = copy.deepcopy(teacher.config)
    expected = logits_without(teacher, kept)

    student = shrink(teacher, layers=kept)
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, expected)
        assert (expected - teacher(IDS).logits).abs().max() > 1e-3
    assert student.config.num_hidden_layers == describe(student).num_layers == 3
    assert not student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert teacher.config.to_dict() == config.to_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}

    student.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected)
    record = AutoConfig.from_pretrained(tmp_path).hf_distill
    assert record == {"kept_layers": kept, "teacher_num_hidden_layers": 7}


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_the_student_generates_with_a_cache_as_without(family):
    student = shrink(build(family), layers=[1, 2, 5])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = student.generate(IDS, use_cache=True, **settings)
    assert cached.shape == (2, 15)
    assert torch.equal(cached, student.generate(IDS, use_cache=False, **settings))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "distilbert", "roberta"])
def test_classifiers_keep_their_head(family):
    teacher = tiny.model(family, layers=4, task="sequence_classification", num_labels=3)
    student = shrink(teacher, layers=[0, 3])
    with torch.no_grad():
        torch.testing.assert_close(student(IDS).logits, logits_without(teacher, [0, 3]))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_stay_tied(tied):
    student = shrink(tiny.model("llama", layers=3, tie_word_embeddings=tied), num_hidden_layers=2)
    assert (student.lm_head.weight is student.get_input_embeddings().weight) == tied


def test_the_per_layer_settings_of_the_config_follow_the_layers():
    student = shrink(build("gemma3"), layers=[0, 5, 6])
    assert student.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    student = shrink(build("smollm3"), layers=[0, 3, 4])
    assert student.config.no_rope_layers == [1, 0, 1]
    assert [layer.self_attn.use_rope for layer in student.model.layers] == [1, 0, 1]
    student = shrink(build("qwen2"), layers=[0, 2, 4])
    assert student.config.max_window_layers == 2
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1, 2]


def test_dtype_and_generation_config_and_attention_are_the_teachers():
    teacher = tiny.model("llama", layers=3).to(torch.bfloat16)
    teacher.generation_config.max_new_tokens = 3
    teacher.set_attn_implementation("eager")
    student = shrink(teacher, num_hidden_layers=2)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.generation_config.max_new_tokens == 3
    assert student.generation_config is not teacher.generation_config
    assert student.config._attn_implementation == "eager"
    student = shrink(teacher, num_hidden_layers=2, dtype=torch.float32)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    assert student.config.dtype == torch.float32
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight.float())


def test_the_random_state_is_left_alone_and_a_frozen_teacher_gives_a_trainable_student():
    teacher = tiny.model("llama", layers=3).requires_grad_(False)
    state = torch.get_rng_state()
    student = shrink(teacher, num_hidden_layers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("total", "keep", "first", "last", "expected"),
    [
        (12, 12, None, None, list(range(12))),
        (12, 2, None, None, [0, 11]),
        (12, 1, None, None, [0]),
        (12, 4, None, None, [0, 4, 7, 11]),
        (6, 3, None, None, [0, 3, 5]),
        (30, 6, None, None, [0, 6, 12, 17, 23, 29]),
        (12, 6, 2, 2, [0, 1, 4, 7, 10, 11]),
        (12, 4, 4, None, [0, 1, 2, 3]),
        (12, 4, 2, 2, [0, 1, 10, 11]),
        (12, 3, 0, 3, [9, 10, 11]),
        (12, 3, 0, None, [3, 7, 11]),
        (5, 1, None, 1, [4]),
    ],
)
def test_chosen_layers_are_spaced_evenly_between_the_ends(total, keep, first, last, expected):
    assert choose_layers(total, keep, first, last) == expected


def test_every_choice_has_the_right_number_of_increasing_layers():
    for total in range(1, 14):
        for keep in range(1, total + 1):
            for first in (None, *range(keep + 1)):
                for last in (None, *range(keep + 1 - (first or 0))):
                    chosen = choose_layers(total, keep, first, last)
                    assert len(chosen) == keep
                    assert chosen == sorted(set(chosen) & set(range(total)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0), "Cannot keep 0 of 4"),
        ((4, 5), "number from 1 to 4"),
        ((4, 2, 2, 1), "at most keep=2"),
        ((4, 2, -1), "must not be negative"),
    ],
)
def test_counts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_layers(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `num_hidden_layers` or `layers`"),
        ({"num_hidden_layers": 2, "layers": [0, 1]}, "either `num_hidden_layers` or `layers`"),
        ({"num_hidden_layers": 4}, "number from 1 to 3"),
        ({"layers": [0, 3]}, "indices from 0 to 2"),
        ({"layers": [-1]}, "indices from 0 to 2"),
        ({"layers": []}, "at least one"),
        ({"layers": [1, 1]}, r"without repetition; got \[1, 1\]. Use \[1\]"),
        ({"layers": [2, 0]}, r"increasing.*Use \[0, 2\]"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        shrink(tiny.model("llama", layers=3), **arguments)


def test_a_quantised_teacher_is_refused_with_the_way_out(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path, quantization="nf4").model
    with pytest.raises(ValueError, match="without quantisation"):
        shrink(teacher, num_hidden_layers=1)


def test_an_offloaded_teacher_is_refused():
    teacher = tiny.model("llama").to("meta")
    with pytest.raises(ValueError, match="offloaded or sharded"):
        shrink(teacher, num_hidden_layers=1)


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_must_be_merged_first(config):
    config = LoraConfig(r=4, **({"target_modules": ["k_proj"]} | config))
    teacher = get_peft_model(tiny.model("llama", layers=3), config)
    with pytest.raises(ValueError, match="merge_and_unload"):
        shrink(teacher, num_hidden_layers=2)
    assert shrink(teacher.merge_and_unload(), num_hidden_layers=2).config.num_hidden_layers == 2


def test_a_layer_whose_computation_depends_on_its_depth_is_not_moved():
    teacher = tiny.model("gpt2", layers=4, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"Layer 2 of the teacher has attn.scaling"):
        shrink(teacher, layers=[0, 2])
    assert shrink(teacher, layers=[0, 1]).config.num_hidden_layers == 2


def test_a_model_that_its_config_does_not_describe_is_refused():
    teacher = tiny.model("llama")
    teacher.lm_head = nn.Linear(32, 400, bias=False)
    with pytest.raises(ValueError, match=r"no weight 'lm_head.weight' to fill the shape \[320, 32\]"):
        shrink(teacher, num_hidden_layers=1)
    teacher = tiny.model("llama")
    teacher.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"weights with no place in a LlamaForCausalLM .*extra.bias"):
        shrink(teacher, num_hidden_layers=1)
