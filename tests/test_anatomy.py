from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM

from hf_distill.anatomy import describe, resolve_final_norm, resolve_head, task_of, unwrap, vocabulary_size
from hf_distill.functional.head import LMHead
from hf_distill.taps import tap_last_hidden
from tests import tiny


IDS = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(0))
SMALL = tiny.GROUPED | {"num_hidden_layers": 2}


def from_config(name: str, **config) -> transformers.PreTrainedModel:
    settings = getattr(transformers, name)(**(SMALL | config))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()


class Compiled(nn.Module):
    """What `torch.compile` makes of a model, without the seconds that importing the compiler takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def lora(model, perturb: bool = True, **config):
    """Attach an adapter; its weights are random where `perturb`, so that it changes the output."""
    wrapped = get_peft_model(model, LoraConfig(**({"task_type": "CAUSAL_LM", "r": 4} | config))).eval()
    if perturb:
        torch.manual_seed(1)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                nn.init.normal_(parameter, std=0.3)
    return wrapped


def assert_head_gives_the_logits_of(model: nn.Module) -> None:
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with tap_last_hidden(model) as tap:
            model(input_ids=IDS)
        logits = resolve_head(model)(tap.hidden.flatten(0, 1))
    torch.testing.assert_close(logits.view_as(expected), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_parts_of_every_family_are_found(family):
    model = tiny.model(family, layers=3)
    parts = describe(model)
    assert parts.model is model
    assert parts.task == ("masked_lm" if family in tiny.ENCODERS else "causal_lm")
    assert (parts.hidden_size, parts.num_layers, parts.vocab_size) == (32, 3, 320)
    assert len({type(layer) for layer in parts.layers}) == 1
    assert all(layer in set(parts.decoder.modules()) for layer in parts.layers)
    assert parts.lm_head is model.get_output_embeddings()


@pytest.mark.parametrize("family", tiny.DECODERS)
def test_the_final_norm_gives_what_enters_the_head(family):
    model = tiny.model(family)
    nn.init.normal_(describe(model).final_norm.weight)
    seen = []
    handle = describe(model).final_norm.register_forward_hook(
        lambda module, args, output: seen.append((*args, output))
    )
    with tap_last_hidden(model) as tap:
        model(IDS)
    handle.remove()
    [(entering, leaving)] = seen
    torch.testing.assert_close(tap.hidden, leaving)
    torch.testing.assert_close(resolve_final_norm(model)(entering), leaving)


def test_a_final_norm_under_a_disabled_adapter_is_that_of_the_base():
    model = lora(tiny.model("llama"), target_modules=["q_proj"], modules_to_save=["norm"])
    base, hidden = tiny.model("llama").model.norm, torch.randn(3, 32)
    assert (resolve_final_norm(model)(hidden) - base(hidden)).abs().max() > 0.1
    with model.disable_adapter():
        norm = resolve_final_norm(model)
    torch.testing.assert_close(norm(hidden), base(hidden))


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_a_family_without_a_final_norm_is_named(family):
    model = tiny.model(family)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no final norm"):
        resolve_final_norm(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_resolved_head_gives_the_logits_of_every_family(family):
    model = tiny.model(family)
    assert isinstance(resolve_head(model), LMHead)
    assert_head_gives_the_logits_of(model)


@pytest.mark.parametrize(
    ("name", "config", "scale", "softcap"),
    [
        ("CohereConfig", {"logit_scale": 0.25}, 0.25, None),
        ("GraniteConfig", {"logits_scaling": 8.0}, 0.125, None),
        ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 0.01}, 1.0, 0.01),
        ("Gemma3TextConfig", {"head_dim": 8, "final_logit_softcapping": 0.01}, 1.0, 0.01),
    ],
)
@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_scale_and_softcap_are_applied_to_the_weight_and_to_the_modules_own_forward(
    name, config, scale, softcap, adapter
):
    model = from_config(name, **config)
    assert (describe(model).logit_scale, describe(model).softcap) == (scale, softcap)
    if adapter:
        model = lora(model, target_modules=["lm_head"])
    assert isinstance(resolve_head(model), LMHead) != adapter
    assert_head_gives_the_logits_of(model)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 9]}},
    ],
    ids=["lora", "dora", "modules_to_save", "tokens"],
)
def test_an_adapter_on_the_head_is_never_left_out(config):
    model = lora(tiny.model("llama"), **config)
    assert not isinstance(resolve_head(model), LMHead)
    assert_head_gives_the_logits_of(model)
    with model.disable_adapter(), torch.no_grad():
        without = model(IDS).logits
    assert (model(IDS).logits - without).abs().max() > 1e-3


def test_trainable_tokens_of_a_tied_embedding_reach_the_head():
    model = tiny.model("llama", tie_word_embeddings=True)
    model = lora(model, target_modules=["q_proj"], trainable_token_indices=[7, 9])
    assert not isinstance(resolve_head(model), LMHead)
    assert_head_gives_the_logits_of(model)


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["lora", "modules_to_save"],
)
def test_a_head_resolved_without_its_adapter_stays_without_it(config):
    base = tiny.model("llama")
    expected = base(IDS).logits.detach()
    model = lora(base, **config)
    with torch.no_grad(), model.disable_adapter():
        with tap_last_hidden(model) as tap:
            model(IDS)
        head = resolve_head(model)
    torch.testing.assert_close(head(tap.hidden), expected, atol=1e-5, rtol=0)


def test_an_adapter_elsewhere_leaves_the_head_plain_and_merged_ones_are_used():
    model = lora(tiny.model("llama"), target_modules=["q_proj"])
    assert isinstance(resolve_head(model), LMHead)
    assert_head_gives_the_logits_of(model)
    model = lora(tiny.model("llama"), target_modules=["lm_head"])
    model.merge_adapter()
    assert_head_gives_the_logits_of(model)
    model = model.merge_and_unload()
    assert isinstance(resolve_head(model), LMHead)
    assert_head_gives_the_logits_of(model)


def test_a_tied_head_is_the_embedding_itself():
    model = tiny.model("llama", tie_word_embeddings=True)
    assert resolve_head(model).weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_head_runs_its_own_forward(kind):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny.model("llama", hidden_size=64)
    packed = getattr(bitsandbytes.nn, kind)(64, 320, bias=False)
    packed.load_state_dict({"weight": model.lm_head.weight.data})
    model.lm_head = packed.to("cpu")
    assert not isinstance(resolve_head(model), LMHead)
    assert_head_gives_the_logits_of(model)


@pytest.mark.parametrize("where", ["offloaded", "hooked"])
def test_a_weight_that_is_not_here_is_not_handed_out(where):
    model = tiny.model("llama")
    if where == "offloaded":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))
    else:
        model.lm_head._hf_hook = object()
    assert not isinstance(resolve_head(model), LMHead)


def test_an_adapter_on_a_head_that_zero3_partitions_is_refused():
    model = lora(tiny.model("llama"), target_modules=["lm_head"])
    for parameter in model.parameters():
        parameter.ds_id = 1
    with pytest.raises(ValueError, match=r"ZeRO-3 partitions.*leave `lm_head` out"):
        resolve_head(model)


@pytest.mark.parametrize("wrap", ["peft", "compile", "data_parallel", "all"])
def test_wrappers_are_seen_through(wrap):
    base = tiny.model("llama")
    model = base
    if wrap in ("peft", "all"):
        model = lora(model, target_modules=["q_proj"])
    if wrap in ("compile", "all"):
        model = Compiled(model)
    if wrap in ("data_parallel", "all"):
        model = nn.DataParallel(model)
    assert unwrap(model) is base
    assert task_of(model) == "causal_lm"
    assert describe(model).layers is base.model.layers
    assert resolve_head(model).weight is base.lm_head.weight


def test_the_first_fsdp_is_refused_with_the_setting_that_helps():
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        unwrap(wrapper)


def test_something_that_is_no_transformers_model_is_refused():
    with pytest.raises(ValueError, match=r"PreTrainedModel.*got Linear"):
        describe(nn.Linear(2, 2))


@pytest.mark.parametrize("task", tiny.TASKS)
def test_the_task_is_told_from_models_and_saved_configs(task, tmp_path):
    model = tiny.model("bert", task=task)
    assert task_of(model) == task
    assert task_of(lora(model, task_type=None, target_modules=["query"])) == task
    model.save_pretrained(tmp_path)
    assert task_of(transformers.AutoConfig.from_pretrained(tmp_path)) == task


def test_a_derived_class_keeps_its_task():
    model = tiny.model("llama")
    model.__class__ = type("Mine", (type(model),), {})
    assert task_of(model) == "causal_lm"


@pytest.mark.parametrize("source", ["base model", "token classifier", "encoder-decoder", "config", "bare config"])
def test_other_tasks_are_refused_with_the_three_that_work(source):
    config = tiny.model("llama").config
    if source == "base model":
        config = transformers.AutoModel.from_config(config)
    elif source == "token classifier":
        config = transformers.AutoModelForTokenClassification.from_config(config)
    elif source == "encoder-decoder":
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
        config = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    elif source == "config":
        config.architectures = ["LlamaForQuestionAnswering"]
    with pytest.raises(ValueError, match=r"causal_lm .*masked_lm .*sequence_classification"):
        task_of(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "distilbert", "roberta"])
def test_a_classifier_has_layers_and_no_head(family):
    model = tiny.model(family, task="sequence_classification")
    parts = describe(model)
    assert (parts.task, parts.num_layers, parts.lm_head) == ("sequence_classification", 2, None)
    with pytest.raises(ValueError, match="no output embeddings"):
        resolve_head(model)


def test_an_unknown_family_is_discovered():
    model = from_config("StableLmConfig")
    parts = describe(model)
    assert parts.layers is model.model.layers
    assert parts.final_norm is model.model.norm
    assert_head_gives_the_logits_of(model)


def test_experts_are_not_taken_for_layers():
    model = from_config("StableLmConfig")
    for layer in model.model.layers:
        layer.experts = nn.ModuleList([nn.Identity(), nn.Identity()])
    assert describe(model).layers is model.model.layers


@pytest.mark.parametrize("candidates", ["none", "two"])
def test_an_unknown_family_with_no_single_candidate_is_refused(candidates):
    model = from_config("StableLmConfig")
    if candidates == "two":
        model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    else:
        model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"looked in StableLmModel for one ModuleList.*LAYOUTS"):
        describe(model)


def test_an_unknown_use_of_a_logit_scale_is_refused_and_a_neutral_one_is_not():
    model = tiny.model("llama")
    model.config.logit_scale = 1.0
    assert resolve_head(model).scale == 1.0
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match=r"logit_scale=0.5.*LOGIT_SCALES"):
        resolve_head(model)


def test_the_vocabulary_reaches_to_the_largest_id():
    tokenizer = tiny.tokenizer(extra_tokens=("<|new|>",))
    assert vocabulary_size(tokenizer) == len(tokenizer)

    class Gaps:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 9}

    assert vocabulary_size(Gaps()) == 10
