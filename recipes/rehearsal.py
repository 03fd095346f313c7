"""What `--rehearse` runs a recipe on: the real architecture, tiny and random, on the CPU, in seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


# The published configs, so that a plan needs neither the Hub nor a licence.
LLAMA_3_1 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA_3_1
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA_3_1
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_llama(layers: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama of a few thousand parameters with Llama 3's proportions, and a byte-level tokenizer for it."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(layers)
        return LlamaForCausalLM(config), tokenizer


def chat_dataset(rows: int) -> Dataset:
    """Chats of two turns in a `messages` column."""
    turns = [
        [
            {"role": "user", "content": f"What is {i} plus {i + 1}?"},
            {"role": "assistant", "content": f"{i} plus {i + 1} is {2 * i + 1}."},
        ]
        for i in range(rows)
    ]
    return Dataset.from_dict({"messages": turns})


def rehearsal_config(args: Any) -> Any:
    """The recipe's own config, cut down to three steps on the CPU."""
    short = {"max_steps": 3, "use_cpu": True, "bf16": False, "per_device_train_batch_size": 2, "logging_steps": 1}
    short |= {"per_device_eval_batch_size": 2, "gradient_accumulation_steps": 1, "report_to": "none"}
    short |= {"save_strategy": "no", "eval_strategy": "no", "push_to_hub": False, "deepspeed": None}
    given = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init}
    return type(args)(**(given | short))


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer
