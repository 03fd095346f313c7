from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_distill.signals import Signal
from hf_distill.teachers import load_teacher
from tests import tiny


LOGITS = frozenset({Signal.LOGITS})
WIDE = {"hidden_size": 64, "intermediate_size": 128}
BATCH = {"input_ids": torch.arange(10, 22).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def logits_of(teacher) -> torch.Tensor:
    projection = teacher.signals(BATCH, LOGITS).logits
    return projection.head(projection.hidden)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    tiny.model(**WIDE).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def weights_must_not_load(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the arguments were checked")

    for task in tiny.TASKS.values():
        monkeypatch.setattr(f"transformers.{task}.from_pretrained", refuse)


def test_a_folder_gives_a_frozen_teacher_with_its_tokenizer(folder):
    teacher = load_teacher(folder)
    torch.testing.assert_close(logits_of(teacher), tiny.model(**WIDE)(**BATCH).logits.detach())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert (teacher.task, teacher.vocab_size, teacher.name) == ("causal_lm", 320, str(folder))
    assert teacher.config_for_card()["name"] == folder.name


def test_a_folder_without_tokenizer_gives_none(tmp_path):
    tiny.model("bert", task="sequence_classification", num_labels=3).save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert teacher.tokenizer is None
    assert teacher.task == "sequence_classification"


def test_a_broken_tokenizer_is_an_error_and_not_none(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(KeyError, match="added_tokens"):
        load_teacher(tmp_path)


def test_the_dtype_is_the_one_that_was_saved_or_asked_for(folder, tmp_path):
    tiny.model().bfloat16().save_pretrained(tmp_path)
    assert load_teacher(tmp_path).model.dtype == torch.bfloat16
    assert load_teacher(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_teacher(folder, dtype=torch.float16).model.dtype == torch.float16


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 0.25), ("int8", 0.05)])
def test_a_quantised_teacher_is_close_to_the_model_it_was_made_from(folder, quantization, tolerance):
    teacher = load_teacher(folder, quantization=quantization)
    expected = tiny.model(**WIDE)(**BATCH).logits.detach()
    error = (logits_of(teacher).float() - expected).norm() / expected.norm()
    assert 1e-4 < error < tolerance
    card = teacher.config_for_card()
    assert card["quantization"] == quantization
    assert card["dtype"] == "bfloat16"
    assert card["parameters"] == tiny.model(**WIDE).num_parameters()


def test_nf4_is_double_quantised_with_bfloat16_compute(folder):
    import bitsandbytes

    model = load_teacher(folder, quantization="nf4").model
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16


def test_widths_that_cannot_be_repacked_on_a_cpu_still_run(tmp_path):
    # 48 is not a multiple of 64, and 2 key-value heads of 12 give 24 rows, not a multiple of 32.
    tiny.model(hidden_size=48, intermediate_size=80).save_pretrained(tmp_path)
    assert torch.isfinite(logits_of(load_teacher(tmp_path, quantization="nf4"))).all()


def test_int8_does_not_log_a_line_for_every_product(folder, caplog):
    teacher = load_teacher(folder, quantization="int8")
    with caplog.at_level(logging.WARNING):
        logits_of(teacher)
    assert "MatMul8bitLt" not in caplog.text


@pytest.mark.usefixtures("weights_must_not_load")
class TestRefusedBeforeAnyWeightIsLoaded:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"quantization": "int4"}, r"`quantization` is 'int4'; expected one of 'nf4', 'int8'; did you mean"),
            ({"dtype": "bf16"}, r"`dtype` is 'bf16'; expected one of .* did you mean 'bfloat16'"),
            ({"dtype": torch.int8}, "`dtype` is 'int8'"),
            ({"task": "causal"}, "`task` is 'causal'; expected .* did you mean 'causal_lm'"),
            ({"task": "sequence_classification"}, "is a causal_lm model .* head would be random"),
            ({"quantization": "nf4", "quantization_config": {}}, "both given"),
        ],
    )
    def test_wrong_arguments(self, folder, arguments, match):
        with pytest.raises(ValueError, match=match):
            load_teacher(folder, **arguments)

    @pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/folder", "a/b/c", ""])
    def test_missing_folders(self, name):
        with pytest.raises(ValueError, match="no such folder"):
            load_teacher(name)

    def test_a_name_that_is_nowhere(self):
        with pytest.raises(ValueError, match="No model can be read from 'no-such-org/no-such-model'"):
            load_teacher("no-such-org/no-such-model", local_files_only=True)

    def test_a_folder_without_model(self, tmp_path):
        with pytest.raises(ValueError, match="No model can be read"):
            load_teacher(tmp_path)

    def test_a_model_of_another_kind(self, tmp_path):
        tiny.model().config.__class__(architectures=["LlamaModel"]).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="task cannot be told"):
            load_teacher(tmp_path)

    def test_quantising_twice(self, tmp_path):
        config = tiny.model().config
        config.quantization_config = {"quant_method": "gptq", "bits": 4}
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"quantized already|quantised already \(gptq\)"):
            load_teacher(tmp_path, quantization="nf4")

    @pytest.mark.parametrize("device_map", ["auto", {"model": 0, "lm_head": 1}])
    def test_spreading_in_a_distributed_run(self, folder, device_map, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=r"`device_map` is .* in a run of 2 processes"):
            load_teacher(folder, device_map=device_map)

    def test_an_adapter_that_does_not_name_its_base(self, tmp_path):
        get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
        with pytest.raises(ValueError, match="does not name its base model"):
            load_teacher(tmp_path)

    def test_a_prompt_learning_adapter(self, folder, tmp_path):
        model = tiny.model(**WIDE)
        model.config.name_or_path = model.name_or_path = str(folder)
        config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="prompt-learning adapter"):
            load_teacher(tmp_path)


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path):
    model = tiny.model("bert", task="sequence_classification")
    model.config.architectures = ["BertForSequenceClassification"]
    state = {key: value for key, value in model.state_dict().items() if "classifier" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError, match=r"lacks 2 weights of a sequence_classification model, such as 'classifier.bias'"
    ):
        load_teacher(tmp_path)


@pytest.mark.parametrize("classifier", [False, True])
def test_an_adapter_folder_gives_its_base_with_the_adapter(folder, tmp_path, classifier):
    task = "sequence_classification" if classifier else "causal_lm"
    base = tiny.model(**WIDE)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    if classifier:
        base = tiny.model(task=task, num_labels=2, **WIDE)
        base.load_state_dict(tiny.model(**WIDE).state_dict(), strict=False)
        config.task_type = "SEQ_CLS"
    base.config.name_or_path = base.name_or_path = str(folder)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert isinstance(teacher.model, PeftModel)
    assert teacher.task == task
    torch.testing.assert_close(logits_of(teacher), adapted(**BATCH).logits.detach())
    assert teacher.tokenizer is not None  # of the base
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_quantised_replica_goes_to_the_device_of_its_process(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    seen = {}

    def stop(*args, **kwargs):
        seen.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stop)
    with pytest.raises(InterruptedError):
        load_teacher(folder, quantization="nf4")
    assert seen["device_map"] == {"": "cuda:1"}
