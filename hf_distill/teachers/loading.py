"""Load a teacher from a folder or the Hub; everything that can be checked is checked before its weights are read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import has_file, strtobool

from hf_distill.anatomy import task_of
from hf_distill.quantization import (
    QUANTIZATIONS,
    bitsandbytes_config,
    quantization_of,
    skip_unpackable_layers,
)
from hf_distill.teachers.model import ModelTeacher


AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
ADAPTER_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "sequence_classification"}
DTYPES = ("auto", "bfloat16", "float16", "float32")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
# Arguments that say where files come from: configs and tokenizers need them as much as weights.
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "token")
SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")


def load_teacher(
    name_or_path: str | os.PathLike[str],
    quantization: str | None = None,
    dtype: str | torch.dtype = "auto",
    task: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **model_kwargs: Any,
) -> ModelTeacher:
    """Load a frozen teacher and its tokenizer.

    Under FSDP2 with `fsdp_cpu_ram_efficient_loading: true` rank 0 alone reads the weights; on the other ranks the
    teacher is empty until the trainer shards it.

    Args:
        name_or_path: A model on the Hub, a folder, or a PEFT adapter (its base is loaded and the adapter applied).
        quantization: "nf4" (double quantisation, bfloat16 compute) or "int8", with bitsandbytes; None for none. In a
            distributed run every process then has a replica on its own device.
        dtype: "auto" (as saved; bfloat16 beside quantised weights), "bfloat16", "float16", "float32" or a torch dtype.
        task: "causal_lm", "masked_lm" or "sequence_classification"; told from the config if None.
        device_map: As in transformers; only for a single process, since a distributed run places the teacher itself.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run modelling code from the repository.
        **model_kwargs: For `from_pretrained`, such as `attn_implementation` or `token`.

    Raises:
        ValueError: An argument is unknown, the model is not there or does another task, arguments contradict each
            other, or weights are missing from the checkpoint.
        ImportError: bitsandbytes or peft is needed and not installed.

    Example:
        ```python
        teacher = load_teacher("meta-llama/Llama-3.1-70B-Instruct", quantization="nf4")
        ```
    """
    if quantization is not None:
        check_choice("quantization", quantization, QUANTIZATIONS)
    if task is not None:
        check_choice("task", task, AUTO_CLASSES)
    settings = {"dtype": _resolve_dtype(dtype, quantization), **model_kwargs}
    if quantization is not None:
        if "quantization_config" in model_kwargs:
            raise ValueError("`quantization` and `quantization_config` were both given; give one of them.")
        settings["quantization_config"] = bitsandbytes_config(quantization)
        device_map = device_map or _device_of_this_process()
    if device_map is not None:
        _check_device_map(device_map)
        settings["device_map"] = device_map
    name = _check_source(name_or_path)
    hub = {key: model_kwargs[key] for key in HUB_ARGUMENTS if key in model_kwargs} | {"revision": revision}
    code = {"trust_remote_code": trust_remote_code}
    adapter = _adapter_config(name, hub)
    if adapter is None:
        if quantization is None and device_map is None and _rank_0_sends_weights():
            settings["device_map"] = "meta"
        model = _load_model(name, task, settings, hub | code)
        return ModelTeacher(model, _load_tokenizer(name, hub | code), name=name)
    base, hub_of_base = _check_source(adapter.base_model_name_or_path), hub | {"revision": adapter.revision} | code
    model = _load_adapted(name, adapter, base, task, settings, hub, hub_of_base)
    tokenizer = _load_tokenizer(name, hub | code) or _load_tokenizer(base, hub_of_base)
    return ModelTeacher(model, tokenizer, name=name)


def _load_model(
    source: str,
    task: str | None,
    settings: Mapping[str, Any],
    hub: Mapping[str, Any],
    adapted: Collection[str] | None = None,
) -> PreTrainedModel:
    """Load a model after its config has been checked.

    Args:
        source: A folder or Hub name.
        task: The task, or None for what the config says.
        settings: Arguments of `from_pretrained` about the model.
        hub: Its arguments about files.
        adapted: Modules whose weights an adapter brings, which may give the model another task; None without adapter.

    Raises:
        ValueError: See `_check_config`; or the checkpoint lacks weights, which would be random.
    """
    task = _check_config(source, task, settings, hub, is_base=adapted is not None)
    model, report = AUTO_CLASSES[task].from_pretrained(source, output_loading_info=True, **{**settings, **hub})
    brought = [f".{name}." for name in adapted or ()]
    missing = sorted(key for key in report["missing_keys"] if not any(name in f".{key}" for name in brought))
    if missing:
        raise ValueError(
            f"{source!r} lacks {len(missing)} weights of a {task} model, such as {missing[0]!r}: they would be "
            f"random, and nothing can be learned from that. Use a checkpoint that was trained for {task}."
        )
    skip_unpackable_layers(model)
    return model


def _load_adapted(
    name: str,
    adapter: Any,
    base: str,
    task: str | None,
    settings: Mapping[str, Any],
    hub: Mapping[str, Any],
    hub_of_base: Mapping[str, Any],
) -> Any:
    """Load a base model and put a PEFT adapter on it, unmerged: merging would round it away in bfloat16."""
    from peft import PeftModel

    if adapter.is_prompt_learning:
        raise ValueError(
            f"{name!r} is a prompt-learning adapter ({adapter.peft_type.value}), whose virtual tokens have no "
            "counterpart in the student; use a LoRA adapter or a full model as teacher."
        )
    task = task or ADAPTER_TASKS.get(adapter.task_type)
    model = _load_model(base, task, settings, hub_of_base, adapted=adapter.modules_to_save or ())
    return PeftModel.from_pretrained(model, name, **hub)


def _adapter_config(name: str, hub: Mapping[str, Any]) -> Any:
    """The config of a PEFT adapter; None for a model, also one that has an adapter beside its own config."""
    try:
        if has_file(name, "config.json", **hub) or not has_file(name, "adapter_config.json", **hub):
            return None
    except OSError as error:
        raise _not_found(name, error) from error
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(name, **hub)
    if not adapter.base_model_name_or_path:
        raise ValueError(
            f"{name!r} is an adapter that does not name its base model; set `base_model_name_or_path` in its "
            "adapter_config.json."
        )
    return adapter


def _load_tokenizer(name: str, hub: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None where there is none; a broken one raises."""
    where = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    if not any(has_file(name, file, **where) for file in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(name, **hub)


def _check_config(
    source: str, task: str | None, settings: Mapping[str, Any], hub: Mapping[str, Any], *, is_base: bool
) -> str:
    """Check a model's config and return its task.

    Raises:
        ValueError: There is no config, it is of another task, or the weights are quantised already.
    """
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
        raise _not_found(source, "the folder has no config.json")
    try:
        config = AutoConfig.from_pretrained(source, **hub)
    except OSError as error:
        raise _not_found(source, error) from error
    if "quantization_config" in settings and quantization_of(config) is not None:
        raise ValueError(
            f"{source!r} is quantised already ({quantization_of(config)}); load it with `quantization=None`."
        )
    if task is None or (config.architectures and not is_base):
        own_task = task_of(config)
        if task is not None and task != own_task:
            raise ValueError(
                f"`task` is {task!r}, but {source!r} is a {own_task} model ({config.architectures[0]}); its head "
                f"would be random. Use `task=None` or a {task} checkpoint."
            )
        task = own_task
    return task


def _not_found(source: str, reason: OSError | str) -> ValueError:
    return ValueError(
        f"No model can be read from {source!r}; expected the name of a model on the Hub or a folder that "
        f"`save_pretrained` wrote ({reason})."
    )


def _check_source(name_or_path: str | os.PathLike[str]) -> str:
    """Return a folder or Hub name as a string; a path must exist."""
    name = os.path.expanduser(os.fspath(name_or_path))
    is_path = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1 or os.path.exists(name)
    if not name or (is_path and not os.path.isdir(name)):
        raise ValueError(
            f"`name_or_path` is {name!r}, and there is no such folder; expected the name of a model on the Hub, such "
            "as 'Qwen/Qwen3-8B', or a folder that `save_pretrained` wrote."
        )
    return name


def check_choice(argument: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ValueError that names the nearest choice."""
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"`{argument}` is {value!r}; expected one of {', '.join(map(repr, allowed))}{hint}")


def _resolve_dtype(dtype: str | torch.dtype, quantization: str | None) -> str | torch.dtype:
    """Return "auto" or a floating torch dtype."""
    if isinstance(dtype, torch.dtype):
        check_choice("dtype", str(dtype).removeprefix("torch."), DTYPES)
        return dtype
    check_choice("dtype", dtype, DTYPES)
    if dtype != "auto":
        return getattr(torch, dtype)
    # What is left beside the quantised weights (embeddings, norms, head) would else be fp32 in an fp32 checkpoint.
    return "auto" if quantization is None else torch.bfloat16


def _check_device_map(device_map: str | Mapping[str, Any]) -> None:
    """Refuse to spread a teacher over the devices that other processes train on."""
    spread = device_map in SPREADING if isinstance(device_map, str) else len(set(device_map.values())) > 1
    if spread and _num_processes() > 1:
        raise ValueError(
            f"`device_map` is {device_map!r} in a run of {_num_processes()} processes, which all need their devices; "
            "leave it out: the teacher is moved or sharded with the student; `quantization='nf4'` makes it smaller."
        )


def _device_of_this_process() -> dict[str, Any] | None:
    """The device map of a quantised replica; None in a single process, where transformers chooses.

    It is read from the environment: asking accelerate would start the process group before the trainer can.
    """
    if _num_processes() == 1:
        return None
    accelerator = torch.accelerator.current_accelerator()
    return {"": "cpu" if accelerator is None else f"{accelerator.type}:{os.environ['LOCAL_RANK']}"}


def _rank_0_sends_weights() -> bool:
    """Whether FSDP2 is to shard what rank 0 has read, and this is another rank; said by accelerate's launcher."""
    asked = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return (
        all(strtobool(os.environ.get(name, "false")) for name in asked)
        and os.environ.get("FSDP_VERSION") == "2"
        and os.environ.get("RANK", "0") != "0"
    )


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
