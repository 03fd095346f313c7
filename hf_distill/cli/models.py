"""Models by their name: what can be said of one before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def config_of(name: str, flag: str, **options: Any) -> Any:
    """The config of a model.

    Args:
        name: Hub name, folder, or a `config.json`.
        flag: What the message calls the name.
        **options: For `from_pretrained`.

    Raises:
        ValueError: There is none, it cannot be read, or the folder is an adapter's.
    """
    from transformers import AutoConfig

    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"`{flag}` is {name}, a PEFT adapter, and a whole model is expected: give the model that it was trained "
            "on, `base_model_name_or_path` in its adapter_config.json, or merge it: `AutoPeftModelForCausalLM"
            ".from_pretrained(folder).merge_and_unload().save_pretrained(merged)`."
        )
    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _unreadable("model", name, flag, error) from error


def tokenizer_of(name: str, flag: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unreadable("tokenizer", name, flag, error) from error


def check_same_tokens(first: Any, second: Any, flags: tuple[str, str]) -> None:
    """Check that two models read one text as the same ids, where both have a tokenizer.

    Raises:
        ValueError: An id is one token to the first and another to the second.
    """
    if first is None or second is None:
        return
    from hf_distill.vocabularies import disagreement

    count, _ = disagreement(first.get_vocab(), second.get_vocab())
    if count:
        raise ValueError(
            f"`{flags[0]}` and `{flags[1]}` have different tokenizers: {count} tokens disagree, so what they "
            "say of one text cannot be compared; give models of one family."
        )


def _unreadable(what: str, name: str, flag: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"`{flag}` is {name}, and no {what} can be read there ({reason}); expected the name of a model on the Hub, or "
        "a folder that `save_pretrained` wrote."
    )
