"""`compress`: every order ends in a model that loads, with what each stage left; what cannot work is refused early."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.cards import DistillationCard, regenerate_card
from hf_distill.pipelines import CompressConfig, CompressReport, compress
from hf_distill.students import load_quantized, quantize
from tests import tiny


DATA = tiny.tokenized_dataset(16)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_pipeline_ends_with_a_small_model_a_report_and_a_card(teacher, config, benchmarks, tmp_path):
    report = compress(teacher, DATA, config(), benchmarks=benchmarks)
    assert [row.name for row in report.rows] == ["teacher", "1-P", "2-KD", "3-Q"]
    whole, pruned, distilled, quantized = report.rows
    assert pruned.parameters < whole.parameters
    assert pruned.weight_bytes < whole.weight_bytes
    assert quantized.weight_bytes < distilled.weight_bytes
    assert quantized.parameters == distilled.parameters == pruned.parameters
    kl = [next(row.student for row in each.report.rows if row.metric == "kl") for each in report.rows]
    assert kl[0] == 0
    assert kl[1] > kl[2] > 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "2-KD")
    assert (student.config.intermediate_size, student.config.num_hidden_layers) == (128, 2)
    AutoTokenizer.from_pretrained(tmp_path / "out" / "3-Q")
    assert CompressReport.load(tmp_path / "out" / "compress.json") == report


def test_the_card_of_the_last_stage_holds_every_stage_with_intervals_sizes_and_plots(
    teacher, config, benchmarks, tmp_path
):
    facts = {"name": "small", "license": "mit", "commands": ["make small"], "evaluation_data": "eight rows"}
    report = compress(teacher, DATA, config(), benchmarks=benchmarks, card=facts)
    folder = tmp_path / "out" / "3-Q"
    card, data = ModelCard.load(folder / "README.md"), DistillationCard.load(folder)
    for part in ("# small", "make small", "eight rows", "| 1-P |", "tokens/s", "forward_kl", "cut to", "int8"):
        assert part in card.text
    assert str(tmp_path) not in (folder / "README.md").read_text() + (folder / "card.json").read_text()
    assert card.data.license == "mit"
    # The stages stand beside the student on its own items, with the sizes of their files.
    last, pruned = report.report, report.rows[1]
    assert data.report.baselines == ["1-P (pruned)", "2-KD (distilled)"]
    assert [row.retention for row in data.report.rows] == [row.retention for row in last.rows]
    assert data.report.mean_retention_of("1-P (pruned)") == pytest.approx(pruned.report.mean_retention)
    sizes = {item.model: item.weight_bytes for item in data.report.footprints}
    assert sizes["student"] == report.rows[3].weight_bytes < sizes["1-P (pruned)"] < sizes["teacher"]
    if importlib.util.find_spec("matplotlib"):
        assert {path.name for path in folder.glob("*.png")} == set(data.plots) == {"retention.png", "tradeoff.png"}
        before = (folder / "README.md").read_text()
        assert regenerate_card(folder).read_text() == before
    with pytest.raises(ValueError, match=r"`card` has \['licence'\]"):
        compress(teacher, DATA, config(), card={"licence": "mit"})


@pytest.mark.parametrize("order", ["-".join(order) for order in permutations(("P", "KD", "Q"))])
def test_every_order_leaves_the_same_sizes_and_a_model_that_was_trained_and_rounded(order, teacher, config, tmp_path):
    report = compress(teacher, DATA, config(order=order, quantization="w4a16", max_steps=2))
    final = tmp_path / "out" / report.final
    model = load_quantized(final)
    assert (model.config.intermediate_size, model.config.num_hidden_layers) == (128, 2)
    assert json.loads((final / "config.json").read_text())["quantization_config"]["quant_method"]
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    assert any(row.facts.get("steps") == 2 for row in report.rows)


def test_what_is_done_is_not_done_again(teacher, config, benchmarks, tmp_path):
    first = compress(teacher, DATA, config(order="P-KD"), benchmarks=benchmarks)
    folder = tmp_path / "out" / "2-KD" / "model.safetensors"
    written = folder.stat().st_mtime_ns
    assert compress(teacher, DATA, config(order="P-KD"), benchmarks=benchmarks) == first
    assert folder.stat().st_mtime_ns == written
    longer = compress(teacher, DATA, config(), benchmarks=benchmarks)
    # Speeds of two runs do not compare, so that all are measured again beside that of the new model.
    known = [replace(row, tokens_per_second=0.0) for row in longer.rows[:3]]
    assert known == [replace(row, tokens_per_second=0.0) for row in first.rows]
    assert all(
        row.tokens_per_second != old.tokens_per_second for row, old in zip(longer.rows, first.rows, strict=False)
    )
    assert folder.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 1e-2}, r"2-KD was made from other settings \(learning_rate\)"),
        ({"prune": {"intermediate_size": 192}}, r"1-P was made from other settings \(prune\)"),
    ],
)
def test_other_settings_are_not_mixed_with_what_is_there(changed, message, teacher, config):
    compress(teacher, DATA, config(order="P-KD", max_steps=1))
    with pytest.raises(ValueError, match=message):
        compress(teacher, DATA, config(order="P-KD", **({"max_steps": 1} | changed)))


def test_other_data_are_noticed(teacher, config):
    compress(teacher, DATA, config(order="P"))
    with pytest.raises(ValueError, match=r"1-P was made from other settings \(data\)"):
        compress(teacher, tiny.tokenized_dataset(16, seed=3), config(order="P"))


def test_an_adapted_teacher_teaches_and_is_not_what_is_compressed(teacher, config, tmp_path):
    report = compress(teacher, DATA, config(order="P-KD", adapt_teacher=2))
    assert [row.name for row in report.rows] == ["teacher", "adapted teacher", "1-P", "2-KD"]
    assert report.rows[1].facts["steps"] == 2
    before, after = weights(Path(teacher)), weights(tmp_path / "out" / "0-teacher")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    kept = report.rows[2].facts["prune"]["layers"][0]
    norm = f"model.layers.{kept}.input_layernorm.weight"
    torch.testing.assert_close(
        weights(tmp_path / "out" / "1-P")["model.layers.0.input_layernorm.weight"], before[norm]
    )


def test_text_is_read_by_the_teachers_tokenizer(teacher, config):
    report = compress(teacher, tiny.text_dataset(8), config(order="KD", max_steps=1, max_length=8))
    assert report.rows[-1].facts["steps"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "P-KD-Q-P"}, "`order` is 'P-KD-Q-P'; expected some of P"),
        ({"order": "distil"}, "expected some of P"),
        ({"order": ""}, "expected some of P"),
        ({"order": "P-Q-KD", "quantization": "nf4"}, "put Q behind KD"),
        ({"order": "P-Q", "adapt_teacher": 5}, r"`order` \(P-Q\) has no KD"),
        ({"prune": {"layers": 3}}, r"`prune` has \['layers'\]"),
        ({"prune": "{"}, "`prune` is '{', which is no JSON"),
        ({"prune": {"drop_layers": 3}}, "`drop_layers` is 3; expected numbers of layers"),
        ({"importance": {"neurons": "taylor"}}, "`importance` is .*; expected some of"),
        ({"importance": '{"mlp": "magic"}'}, "`importance` has 'mlp': 'magic'; expected one of"),
        ({"calibration_tokens": 0}, "`calibration_tokens` is 0"),
        ({"adapt_teacher": -1}, "`adapt_teacher` is -1"),
        ({"adapt_learning_rate": 0.0}, "`adapt_learning_rate` is 0.0"),
        ({"max_length": 1}, "`max_length` is 1; expected a whole number >= 2"),
        ({"teacher_quantization": "int3"}, "`teacher_quantization` is 'int3'; expected one of"),
        ({"teacher_dtype": "half"}, "`teacher_dtype` is 'half'; expected one of"),
        ({"push_to_hub": True}, "hf-distill push"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CompressConfig(str(tmp_path), **settings)


@pytest.fixture
def without_weights(teacher):
    """The teacher's folder without its weights: what is refused, is refused before they are read."""
    (Path(teacher) / "model.safetensors").unlink()
    return teacher


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune": {"intermediate_size": 512}}, "`intermediate_size`"),
        ({"prune": {"params_ratio": 0.01}}, "the nearest that can be reached"),
        ({"prune": {"intermediate_size": 250}}, "cuts nothing: the model has 3 layers, 256 neurons"),
        ({"importance": {"layers": "leave_one_out"}}, r"`importance` is .* cuts \['mlp'\] too"),
        ({"quantization": "int3"}, "`method` is 'int3'; expected one of"),
        ({"quantization": "w4a16", "group_size": 96}, "choose a `group_size` that divides"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused_before_weights_are_read(settings, message, without_weights, config):
    with pytest.raises(ValueError, match=message):
        compress(without_weights, DATA, config(**settings))


def test_a_format_must_hold_what_it_is_given_before_and_after_a_cut(config, tmp_path):
    folder = tmp_path / "teacher"
    tiny.model("llama", hidden_size=64, intermediate_size=160).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    changed = {"order": "Q-P", "quantization": "w4a16", "group_size": 64, "prune": {"intermediate_size": 128}}
    with pytest.raises(ValueError, match="has 160 inputs"):
        compress(folder, DATA, config(**changed))
    changed = {"order": "Q-P", "quantization": "w4a16", "group_size": 32, "prune": {"hidden_size": 48, "round_to": 16}}
    with pytest.raises(ValueError, match="has 48 inputs"):
        compress(folder, DATA, config(**changed))


def test_a_family_without_an_adapter_is_refused_before_weights_are_read(tmp_path, config):
    config_of_gptj = tiny.model("gptj").config
    config_of_gptj.architectures = ["GPTJForCausalLM"]
    config_of_gptj.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="family 'gptj' cannot be pruned; known are"):
        compress(tmp_path / "teacher", DATA, config())


def test_a_quantised_model_is_refused(teacher, tmp_path, config):
    quantize(teacher, tmp_path / "int8", "int8")
    (tmp_path / "int8" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"quantised already \(torchao\)"):
        compress(tmp_path / "int8", DATA, config())
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q8_0.gguf").touch()
    with pytest.raises(ValueError, match=r"holds a GGUF file, whose weights are quantised already"):
        compress(tmp_path / "gguf", DATA, config())


def test_a_model_with_adapters_is_refused_with_the_line_that_merges_them(teacher, tmp_path, config):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(teacher), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        compress(adapted, DATA, config())
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds a LoRA adapter; merge it first: `AutoPeft"):
        compress(tmp_path / "adapter", DATA, config())
