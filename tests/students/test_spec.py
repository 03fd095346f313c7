from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_distill.students import PruneSpec, prune
from hf_distill.students.families import family_of
from hf_distill.students.resolve import resolve, target_of
from hf_distill.students.widths import config_of_widths
from tests import tiny


# The config.json of SmolLM2-135M, Qwen2.5-0.5B, Gemma 3 270M, Phi-3.5-mini (other factors) and GPT-2, in part.
REAL = {
    "llama": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "rope_theta": 100000,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 8192,
    },
    "qwen2": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 21,
    },
    "gemma3_text": {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 262144,
        "sliding_window": 512,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
    },
    "gpt2": {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257, "n_inner": None},
}


def on_meta(family: str):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **REAL[family]))


@pytest.mark.parametrize("family", REAL)
@pytest.mark.parametrize("ratio", [0.9, 0.67, 0.6])
def test_a_ratio_of_a_real_model_is_met_to_half_a_step_and_its_config_is_accepted(family, ratio, tmp_path):
    model = on_meta(family)
    spec = resolve(PruneSpec(params_ratio=ratio), model)
    assert spec.params_ratio is None
    assert resolve(spec, model) == spec
    config = config_of_widths(model.config, family_of(model), target_of(spec, model).widths)
    config.num_hidden_layers = spec.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: spec.num_hidden_layers]
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        pruned = transformers.AutoModelForCausalLM.from_config(again)
    reached = pruned.num_parameters() / model.num_parameters()
    assert abs(reached - ratio) < 0.02
    assert "head_dim" not in json.loads((tmp_path / "config.json").read_text()) or again.head_dim in (64, 256)


def test_a_ratio_takes_from_the_mlp_then_the_hidden_width_then_the_depth():
    model = on_meta("qwen2")
    sizes = [resolve(PruneSpec(params_ratio=ratio), model) for ratio in (0.8, 0.6, 0.25)]
    assert [size.num_hidden_layers < 24 for size in sizes] == [False, False, True]
    assert [size.hidden_size < 896 for size in sizes] == [False, True, True]
    assert all(2432 <= size.intermediate_size < 4864 for size in sizes)
    assert {size.num_attention_heads for size in sizes} == {14}
    assert all(size.intermediate_size % 64 == size.hidden_size % 64 == 0 for size in sizes)


def test_a_ratio_is_met_with_what_other_fields_leave_free():
    model = on_meta("llama")
    spec = resolve(PruneSpec(params_ratio=0.8, intermediate_size=1280), model)
    assert (spec.intermediate_size, spec.hidden_size) == (1280, 576)
    assert spec.num_hidden_layers == 26
    spec = resolve(PruneSpec(params_ratio=0.7, num_hidden_layers=24), model)
    assert (spec.num_hidden_layers, spec.intermediate_size) == (24, 1088)


def test_the_ratio_of_the_resolved_spec_is_that_of_the_cut_model():
    for family in ("phi3", "gemma2", "opt"):
        model = tiny.model(family, layers=4)
        with pytest.warns(UserWarning, match="no scores"):
            _, report = prune(model, PruneSpec(params_ratio=0.75, round_to=1))
        assert report.params_ratio == pytest.approx(0.75, abs=0.01)
        assert report.spec.params_ratio is None


@pytest.mark.parametrize(
    ("asked", "round_to", "found"),
    [(1000, 64, 1024), (990, 64, 960), (1530, 64, 1536), (1, 64, 64), (1000, 1, 1000), (1536, 1000, 1536)],
)
def test_widths_are_rounded_to_the_nearest_multiple(asked, round_to, found):
    assert resolve(PruneSpec(intermediate_size=asked, round_to=round_to), on_meta("llama")).intermediate_size == found


def test_heads_follow_their_groups():
    def heads(family, **spec):
        spec = resolve(PruneSpec(**spec), on_meta(family))
        return spec.num_attention_heads, spec.num_key_value_heads

    assert heads("llama", num_attention_heads=3) == (3, 3)
    assert heads("llama", num_key_value_heads=1) == (3, 1)
    assert heads("llama", num_key_value_heads=2, num_attention_heads=4, hidden_size=512) == (4, 2)
    assert heads("qwen2", num_attention_heads=10) == (10, 2)  # not a divisor of the hidden size, which Qwen2 allows
    assert heads("gemma3_text", num_attention_heads=2) == (2, 1)


ALLOWED = r"Allowed with hidden_size=512 are .*\(4, 2\), \(2, 2\), \(2, 1\), \(1, 1\)\]; .*9 heads .*\[576\]"


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("llama", {"hidden_size": 512}, ALLOWED),
        ("llama", {"num_attention_heads": 4}, r"Allowed .*\[\(3, 3\), \(6, 3\), \(9, 3\)\]; .*whole groups"),
        ("llama", {"num_key_value_heads": 4}, r"1 to 3 query heads"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, r"\[\(1, 1\), \(2, 1\), \(3, 1\)\]"),
        ("llama", {"intermediate_size": 2048}, r"`intermediate_size` is 2048, .*at most 1536"),
        ("llama", {"hidden_size": 500, "round_to": 640}, r"a smaller `round_to`"),
        ("llama", {"num_hidden_layers": 31}, r"`num_hidden_layers` is 31 .*has 30 layers"),
        ("llama", {"num_hidden_layers": 28, "drop_layers": (3,)}, "one of both"),
        ("llama", {"drop_layers": (3, 30)}, r"\[3, 30\]; expected layers from 0 to 29"),
        ("llama", {"drop_layers": range(30)}, "fewer than all 30"),
        ("llama", {"params_ratio": 0.3}, r"nearest that can be reached here is 0.4573, with num_hidden_layers=15"),
        ("llama", {"params_ratio": 0.9, "intermediate_size": 768, "hidden_size": 576, "drop_layers": (1,)}, "0.6876"),
        ("phi3", {"num_attention_heads": 24}, r"short_factor.*Allowed with hidden_size=3072 .*\[\(32, 32\)\]"),
        ("gpt2", {"hidden_size": 512}, r"`hidden_size` is 512, but of 'gpt2' only depth and MLP .* at 768"),
        ("gpt2", {"num_attention_heads": 6}, r"`num_attention_heads` is 6"),
        ("gpt2", {"num_key_value_heads": 6}, r"`num_key_value_heads` is 6"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused_with_what_can(family, spec, message):
    with pytest.raises(ValueError, match=message):
        resolve(PruneSpec(**spec), on_meta(family))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "asks for nothing"),
        ({"round_to": 8}, "asks for nothing"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0; expected a whole number >= 1"),
        ({"hidden_size": 1.5}, "`hidden_size` is 1.5"),
        ({"params_ratio": 1.0}, "`params_ratio` is 1.0; expected a share between 0 and 1"),
        ({"params_ratio": "0.7"}, "`params_ratio` is '0.7'; expected a share"),
        ({"drop_layers": (1, 1)}, "every layer once"),
        ({"drop_layers": 3}, "`drop_layers` is 3; expected numbers of layers"),
        ({"drop_layers": "12"}, "`drop_layers` is '12'; expected numbers of layers"),
        ({"drop_layers": [0.5]}, r"`drop_layers` is \[0.5\]; expected numbers of layers"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneSpec(**fields)


def test_a_spec_survives_json():
    spec = PruneSpec(drop_layers=[3, 1], intermediate_size=64)
    assert spec.drop_layers == (1, 3)
    assert PruneSpec(**json.loads(json.dumps(spec.to_dict()))) == spec
