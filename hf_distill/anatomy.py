"""Every fact about the structure of Hugging Face models: where things are, and what happens to the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_distill.attention_anatomy import attention_limits, head_shape
from hf_distill.functional.head import LMHead, finish_logits
from hf_distill.sharding import is_sharded, whole
from hf_distill.signals import ModelShape


@dataclass(frozen=True)
class Layout:
    """Paths inside a model of one family: `decoder` from the model, the others from the decoder."""

    decoder: str
    layers: str
    final_norm: str | None


LLAMA_LIKE = Layout("model", "layers", "norm")
# The norm that follows a post-norm encoder belongs to its last layer: these families have no final one.
LAYOUTS = dict.fromkeys(
    [
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    ],
    LLAMA_LIKE,
) | {
    "bert": Layout("bert", "encoder.layer", None),
    "distilbert": Layout("distilbert", "transformer.layer", None),
    "gpt2": Layout("transformer", "h", "ln_f"),
    "gpt_neox": Layout("gpt_neox", "layers", "final_layer_norm"),
    "opt": Layout("model.decoder", "layers", "final_layer_norm"),
    "roberta": Layout("roberta", "encoder.layer", None),
}
FINAL_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "norm_f", "ln_f")

# The ending of the class name -> the task.
TASKS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "sequence_classification",
}

# model_type -> (config attribute, exponent): logits = head(hidden) * attribute ** exponent.
LOGIT_SCALES = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "cohere2_moe": ("logit_scale", 1),
    "falcon_h1": ("lm_head_multiplier", 1),
    "granite": ("logits_scaling", -1),
    "granite_swa": ("logits_scaling", -1),
    "granitemoe": ("logits_scaling", -1),
    "granitemoe_swa": ("logits_scaling", -1),
    "granitemoehybrid": ("logits_scaling", -1),
    "granitemoeshared": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", 0),  # divides what enters the head, so the tap has seen it already
}
LOGIT_SCALE_ATTRIBUTES = ("logit_scale", "lm_head_multiplier", "logits_scaling", "output_multiplier")
# Every family that has one of these computes cap * tanh(logits / cap), after the scale.
SOFTCAP_ATTRIBUTES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model.

    Args:
        model: The Hugging Face model itself, without wrappers.
        task: `causal_lm`, `masked_lm` or `sequence_classification`.
        decoder: The module that holds the layers (encoders as well).
        layers: The transformer layers in order.
        final_norm: The norm between the last layer and the head; None where the family has none.
        lm_head: What maps to the vocabulary, adapters included; None for classifiers.
        logit_scale: Factor on the head's output.
        softcap: `softcap * tanh(logits / softcap)` follows the scale; None for no cap.
        hidden_size: Width of the hidden states between layers.
        num_layers: How many layers.
        vocab_size: Width of the logits (rows of the embedding for classifiers), padding rows included.
    """

    model: PreTrainedModel
    task: str
    decoder: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module | None
    lm_head: nn.Module | None
    logit_scale: float
    softcap: float | None
    hidden_size: int
    num_layers: int
    vocab_size: int


def describe(model: nn.Module) -> Anatomy:
    """Find the parts of a model, wrapped or not.

    Raises:
        ValueError: The family is unknown and its layers cannot be told with certainty, or its task is not supported.
    """
    base = unwrap(model)
    task = task_of(base)
    config = base.config.get_text_config()
    decoder, layers, final_norm = _trunk(base, config)
    return Anatomy(
        model=base,
        task=task,
        decoder=decoder,
        layers=layers,
        final_norm=final_norm,
        lm_head=None if task == "sequence_classification" else output_head(base),
        logit_scale=_logit_scale(config),
        softcap=_softcap(config),
        hidden_size=config.hidden_size,
        num_layers=len(layers),
        vocab_size=config.vocab_size,
    )


def shape_of(model: nn.Module, role: str) -> ModelShape:
    """What objectives are told of a model; `role` is "student" or "teacher".

    Raises:
        ValueError: The family is unknown and its layers cannot be told with certainty.
    """
    parts = describe(model)
    origin = getattr(parts.model.config, "hf_distill", None) or {}
    kept, channels = origin.get("kept_layers"), origin.get("kept_channels")
    head_width = getattr(parts.lm_head, "in_features", parts.hidden_size)  # OPT may project to another one before
    reads_layers = parts.lm_head is not None and head_width == parts.hidden_size
    return ModelShape(
        name=f"{role} ({type(parts.model).__name__})",
        num_layers=parts.num_layers,
        hidden_size=parts.hidden_size,
        kept_layers=None if kept is None else tuple(kept),
        cut_from=origin.get("teacher_num_hidden_layers"),
        kept_channels=None if channels is None else tuple(channels),
        cut_from_width=origin.get("teacher_hidden_size"),
        vocab_size=parts.vocab_size if reads_layers else None,
        has_final_norm=parts.final_norm is not None,
        is_causal=any(getattr(module, "is_causal", False) for module in parts.layers[0].modules()),
        **attention_limits(list(parts.layers), learned_prompt(model)),
        **head_shape(parts.model.config.get_text_config()),
    )


def learned_prompt(model: nn.Module) -> str | None:
    """The kind of the PEFT adapter of a model, for example "PROMPT_TUNING", if it learns virtual tokens."""
    configs = [getattr(module, "active_peft_config", None) for module in model.modules()]
    kinds = [config.peft_type.value for config in configs if config is not None and config.is_prompt_learning]
    return kinds[0] if kinds else None


def virtual_tokens(model: nn.Module) -> str | None:
    """The kind of the adapter that puts virtual tokens before the text, if one does: a prefix only adds keys."""
    kind = learned_prompt(model)
    return None if kind == "PREFIX_TUNING" else kind


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Reach the Hugging Face model inside DDP, DeepSpeed, FSDP2, `torch.compile` and PEFT.

    Raises:
        ValueError: There is no `PreTrainedModel` inside, or it is wrapped by the first version of FSDP, which hides
            the parameters of the head.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, FullyShardedDataParallel):
            raise ValueError(
                "The model is wrapped by FSDP version 1, whose flattened parameters hide the head. Use version 2: "
                "set `fsdp_version: 2` under `fsdp_config` in the accelerate config."
            )
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DDP, DataParallel, DeepSpeed
            inner = inner.module
        else:
            raise ValueError(
                f"Expected a transformers PreTrainedModel, bare or wrapped (PEFT, DDP, FSDP2, DeepSpeed, "
                f"torch.compile), got {type(inner).__name__}."
            )
    return inner


def task_of(model_or_config: nn.Module | PreTrainedConfig) -> str:
    """Tell the task from the class of a model or from `config.architectures`.

    Returns:
        `causal_lm`, `masked_lm` or `sequence_classification`.

    Raises:
        ValueError: The task is another one, or a config does not name an architecture.
    """
    if isinstance(model_or_config, PreTrainedConfig):
        names = model_or_config.architectures or []
        source = f"config.architectures={model_or_config.architectures}"
    else:
        base = unwrap(model_or_config)
        # The bases count too: FSDP2 and users derive classes.
        names = [cls.__name__ for cls in type(base).__mro__]
        source = type(base).__name__
    found = {task for name in names for ending, task in TASKS.items() if name.endswith(ending)}
    if len(found) != 1:
        raise ValueError(
            f"The task cannot be told from {source}. Supported: causal_lm (...ForCausalLM), masked_lm "
            "(...ForMaskedLM) and sequence_classification (...ForSequenceClassification). Load the model with "
            "AutoModelForCausalLM, AutoModelForMaskedLM or AutoModelForSequenceClassification."
        )
    return found.pop()


def output_head(model: nn.Module) -> nn.Module:
    """Find the module whose input is the last hidden state and whose output is the logits over the vocabulary.

    Raises:
        ValueError: The model has none, as classifiers.
    """
    base = unwrap(model)
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output embeddings: only language models have a head over the vocabulary. "
            "A classifier's logits are used as they are."
        )
    return head


def resolve_head(model: nn.Module) -> LMHead | Callable[[Tensor], Tensor]:
    """Find out how to turn last hidden states into logits.

    The plain weight is given out only where it is the whole truth; adapters, quantised and offloaded heads run their
    own forward. Call it once per step, on all ranks together: the head of FSDP2 and ZeRO-3 is gathered here, with a
    gradient that is averaged over the ranks like every other. Inside PEFT's `disable_adapter()` the head is resolved
    without the adapter, and stays so afterwards.

    Returns:
        An `LMHead`, or a callable from `[n, H]` to logits `[n, V]`; scale and softcap are applied by both.

    Raises:
        ValueError: The model has no head over the vocabulary, or one that ZeRO-3 partitions and that is more than a
            weight and a bias.
    """
    base = unwrap(model)
    config = base.config.get_text_config()
    scale, softcap = _logit_scale(config), _softcap(config)
    head = _without_disabled_adapters(output_head(base))
    if not _is_plain(head):
        if any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
            # It would gather in every call, and ranks that project different numbers of chunks wait for ever.
            raise ValueError(
                f"The head is a {type(head).__name__}, which ZeRO-3 partitions, and its forward would gather its "
                "weights a different number of times on each rank; keep adapters off it (leave `lm_head` out of "
                "`target_modules` and `modules_to_save`), or use FSDP2, DDP or ZeRO-2."
            )
        return ModuleHead(head, scale, softcap)
    bias = None if head.bias is None else whole(head.bias)
    return LMHead(whole(head.weight), bias, scale, softcap)


@dataclass(frozen=True, eq=False)
class ModuleHead:
    """A head that runs a module's own forward, then the model's logit scale and softcap."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Project `hidden` `[n, H]` to logits `[n, V]`."""
        return finish_logits(self.module(hidden), self.scale, self.softcap)


def resolve_final_norm(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a model applies to hidden states of its last layer before its head, as a callable; see `resolve_head`.

    Raises:
        ValueError: The family is unknown, or has no norm there.
    """
    norm = describe(model).final_norm
    if norm is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no final norm that is known.")
    norm = _without_disabled_adapters(norm)
    if any(is_sharded(parameter) for parameter in norm.parameters()):
        weights = {name: whole(parameter) for name, parameter in norm.named_parameters()}
        sharded, norm = norm, object.__new__(type(norm))  # FSDP2 lets nobody copy its modules
        vars(norm).update(vars(sharded) | {"_parameters": weights})
    return norm.forward  # without the hooks that gather weights for the model's own forward


def vocabulary_size(tokenizer: Any) -> int:
    """Count ids up to the largest that a tokenizer can produce.

    `len(tokenizer)` counts tokens, which is less where ids have gaps; the model's `vocab_size` is more where the
    embedding is padded.
    """
    return max(tokenizer.get_vocab().values()) + 1


def _trunk(base: PreTrainedModel, config: PreTrainedConfig) -> tuple[nn.Module, nn.ModuleList, nn.Module | None]:
    """The decoder, its layers and its final norm."""
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        return _discover(base, config)
    decoder = attrgetter(layout.decoder)(base)
    final_norm = attrgetter(layout.final_norm)(decoder) if layout.final_norm else None
    return decoder, attrgetter(layout.layers)(decoder), final_norm


def _discover(base: PreTrainedModel, config: PreTrainedConfig) -> tuple[nn.Module, nn.ModuleList, nn.Module | None]:
    """The same for a family without a row in `LAYOUTS`, where there is only one candidate."""
    decoder = base.get_decoder()
    depth = getattr(config, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # the experts of a layer, for example
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            found[name] = module
    if len(found) != 1 or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"The layers of {type(base).__name__} (model_type {config.model_type!r}) cannot be told: looked in "
            f"{type(decoder).__name__} for one ModuleList with num_hidden_layers={depth} entries and found "
            f"{sorted(found) or 'none'}. Known families: {', '.join(sorted(LAYOUTS))}. Add a row to `LAYOUTS` in "
            "hf_distill/anatomy.py."
        )
    [(path, layers)] = found.items()
    parent = decoder.get_submodule(path.rpartition(".")[0])
    norms = [getattr(parent, name) for name in FINAL_NORM_NAMES if hasattr(parent, name)]
    return decoder, layers, norms[0] if len(norms) == 1 else None


def _logit_scale(config: PreTrainedConfig) -> float:
    """The factor on the head's output."""
    if config.model_type in LOGIT_SCALES:
        attribute, exponent = LOGIT_SCALES[config.model_type]
        value = getattr(config, attribute)
        return 1.0 if value is None else float(value) ** exponent
    for attribute in LOGIT_SCALE_ATTRIBUTES:
        value = getattr(config, attribute, None)
        if value not in (None, 1.0):
            raise ValueError(
                f"model_type {config.model_type!r} sets {attribute}={value}, and it is not known whether its logits "
                "are multiplied or divided by it. Add a row to `LOGIT_SCALES` in hf_distill/anatomy.py."
            )
    return 1.0


def _softcap(config: PreTrainedConfig) -> float | None:
    """The cap of the logits, or None."""
    values = [getattr(config, name, None) for name in SOFTCAP_ATTRIBUTES]
    return next((float(value) for value in values if value is not None), None)


def _without_disabled_adapters(head: nn.Module) -> nn.Module:
    """The module that a PEFT wrapper passes its input to while its adapters are disabled, else the wrapper itself."""
    while getattr(head, "disable_adapters", False) and not getattr(head, "merged", False):
        head = head.base_layer if hasattr(head, "base_layer") else head.original_module
    return head


def _is_plain(head: nn.Module) -> bool:
    """Whether `weight` and `bias` are all that the head does with its input."""
    fsdp_linear = isinstance(head, FSDPModule) and type(head).__bases__[1:] == (nn.Linear,)
    if type(head) is not nn.Linear and not fsdp_linear:
        return False
    weight = head.weight
    # Quantised and packed weights are subclasses of Parameter or Tensor; 8-bit floats need scales kept elsewhere.
    ordinary = type(weight) is nn.Parameter or isinstance(weight, DTensor)
    readable = weight.is_floating_point() and weight.dtype.itemsize > 1
    elsewhere = weight.is_meta or hasattr(head, "_hf_hook")
    return ordinary and readable and not elsewhere
