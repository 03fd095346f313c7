"""A tokenizer as the metadata of a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_SPLIT


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before the merges -> llama.cpp's name of it.
SPLITS = {QWEN2_SPLIT: "qwen2", LLAMA3_SPLIT: "llama-bpe"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Refuse tokenizers that a GGUF file could not describe.

    Raises:
        ValueError: It is no byte-level BPE, cuts text in a way that llama.cpp has no name for, or has more tokens than
            the model.
    """
    _pre_tokenizer(_description(tokenizer))
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest}, but the model has {vocab_size} embeddings; give the tokenizer "
            "that the student was trained with."
        )


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write vocabulary, merges, special tokens and chat template.

    Args:
        writer: A `gguf.GGUFWriter`.
        tokenizer: Checked by `check_tokenizer`.
        vocab_size: Rows of the embedding; ids without a token are written as unused ones.
    """
    description = _description(tokenizer)
    added = {token["id"]: token for token in description["added_tokens"]}
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(description))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types([_kind(index, tokens, added) for index in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in description["model"]["merges"]])
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, index in (special | {"unk": tokenizer.unk_token_id}).items():
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    # What the tokenizer does with an empty text tells what it puts before and after any.
    around = tokenizer("").input_ids
    writer.add_add_bos_token(bool(around) and around[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(around) > 1 and around[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _kind(index: int, tokens: dict[int, str], added: dict[int, Any]) -> int:
    """The type of a token: those that were added are found whole in the text."""
    if index not in tokens:
        return UNUSED
    if index not in added:
        return NORMAL
    return CONTROL if added[index]["special"] else USER_DEFINED


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `tokenizer.json` holds.

    Raises:
        ValueError: The tokenizer is not one of the tokenizers library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__}; expected one that has a `tokenizer.json`, as "
            "AutoTokenizer loads it."
        )
    return json.loads(backend.to_str())


def _pre_tokenizer(description: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer cuts text.

    Raises:
        ValueError: It is another kind, or has no name.
    """
    stage = description["pre_tokenizer"] or {}
    steps = stage.get("pretokenizers", [stage])
    kinds = [step.get("type") for step in steps]
    prefixed = any(step.get("add_prefix_space") for step in steps)
    if description["model"]["type"] == "BPE" and kinds and kinds[-1] == "ByteLevel" and not prefixed:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in SPLITS:
            return SPLITS[steps[0]["pattern"]["Regex"]]
    raise ValueError(
        f"The tokenizer is {description['model']['type']} over the pre-tokenizers {kinds}, which has no name in GGUF "
        "that is known here; expected the byte-level BPE of GPT-2, SmolLM, Llama 3 or Qwen2/3. Use `method='w4a16'`, "
        "or llama.cpp's convert_hf_to_gguf.py."
    )
