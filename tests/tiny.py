"""Tiny models, tokenizers and data built from configs, in memory: no test needs the Hub."""

from __future__ import annotations

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|eos|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A student learns from a teacher that knows more.",
    "Two plus two is four, and four plus four is eight.",
    "Short one.",
    "The film was far better than its long and noisy trailer promised.",
]
COMMON = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
DECODER = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = DECODER | {"num_key_value_heads": 2}
GPT2 = COMMON | {"n_embd": 32, "n_inner": 64, "n_head": 4, "n_positions": 256}
OPT = COMMON | {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 32,
}
DISTILBERT = COMMON | {"dim": 32, "hidden_dim": 64, "n_heads": 4, "max_position_embeddings": 256}

# family -> (config class, its arguments, the argument that sets depth)
FAMILIES = {
    "llama": ("LlamaConfig", GROUPED, "num_hidden_layers"),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": None}, "num_hidden_layers"),
    "qwen2": ("Qwen2Config", GROUPED, "num_hidden_layers"),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}, "num_hidden_layers"),
    "smollm3": ("SmolLM3Config", GROUPED, "num_hidden_layers"),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 8}, "num_hidden_layers"),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 8}, "num_hidden_layers"),
    "phi3": ("Phi3Config", GROUPED, "num_hidden_layers"),
    "gpt2": ("GPT2Config", GPT2, "n_layer"),
    "gpt_neox": ("GPTNeoXConfig", DECODER, "num_hidden_layers"),
    "opt": ("OPTConfig", OPT, "num_hidden_layers"),
    "bert": ("BertConfig", DECODER, "num_hidden_layers"),
    "distilbert": ("DistilBertConfig", DISTILBERT, "n_layers"),
    "roberta": ("RobertaConfig", DECODER, "num_hidden_layers"),
}
# Families of single tests: they have no place in the loops over all families.
OTHERS = {
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}, "num_hidden_layers"),
    "cohere": ("CohereConfig", GROUPED, "num_hidden_layers"),
    "cohere2": ("Cohere2Config", GROUPED, "num_hidden_layers"),
    "gemma": ("GemmaConfig", GROUPED | {"head_dim": 8}, "num_hidden_layers"),
    "granite": ("GraniteConfig", GROUPED, "num_hidden_layers"),
    "gpt_oss": ("GptOssConfig", GROUPED | {"head_dim": 8, "num_local_experts": 4}, "num_hidden_layers"),  # has sinks
    # Its first layer is a convolution.
    "lfm2": ("Lfm2Config", GROUPED | {"layer_types": ["conv", "full_attention"]}, "num_hidden_layers"),
    "gptj": ("GPTJConfig", GPT2 | {"rotary_dim": 4}, "n_layer"),  # calls its attention without the interface
    "bloom": ("BloomConfig", COMMON | {"hidden_size": 32, "n_head": 4}, "n_layer"),  # and has one projection for all
}
DECODERS = [name for name in FAMILIES if name not in {"bert", "distilbert", "roberta"}]
ENCODERS = ["bert", "distilbert", "roberta"]
TASKS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}


def model(
    family: str = "llama", *, layers: int = 2, task: str | None = None, seed: int = 0, **config
) -> PreTrainedModel:
    """Build a random fp32 model of a family on the CPU, in eval mode.

    Args:
        family: A key of `FAMILIES` or `OTHERS`.
        layers: Depth.
        task: A key of `TASKS`; causal LM for decoders and masked LM for encoders when not given.
        seed: Seed of the initialisation; the global random state is left as it was.
        **config: Overrides of the config.
    """
    task = task or ("masked_lm" if family in ENCODERS else "causal_lm")
    class_name, arguments, depth = (FAMILIES | OTHERS)[family]
    settings = getattr(transformers, class_name)(**(arguments | {depth: layers} | config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, TASKS[task]).from_config(settings, dtype=torch.float32).eval()


def tokenizer(extra_tokens: tuple[str, ...] = (), vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template in memory; every call gives the same ids."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|mask|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|eos|>", mask_token="<|mask|>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    if extra_tokens:
        fast.add_tokens(list(extra_tokens))
    return fast


def text_dataset(rows: int = 8) -> Dataset:
    """A `text` column of sentences of unequal lengths."""
    return Dataset.from_dict({"text": [SENTENCES[i % len(SENTENCES)] for i in range(rows)]})


def tokenized_dataset(rows: int = 8, seed: int = 0, vocab_size: int = 300) -> Dataset:
    """Rows of random ids, 6 to 14 long, with `labels` whose first positions (the prompt) are ignored."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(rows):
        length = 6 + (5 * i) % 9
        ids = torch.randint(5, vocab_size, (length,), generator=generator).tolist()
        prompt = 1 + i % 4
        samples.append({"input_ids": ids, "attention_mask": [1] * length, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(samples)


def classification_dataset(rows: int = 8, seed: int = 0, classes: int = 3) -> Dataset:
    """Rows of random ids, 6 to 14 long, with one class id in `labels`."""
    rows_of_ids = tokenized_dataset(rows, seed)
    return rows_of_ids.map(lambda row, i: {"labels": i % classes}, with_indices=True, remove_columns=["labels"])


def messages_dataset(rows: int = 8) -> Dataset:
    """A `messages` column of two-turn chats."""
    return Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": SENTENCES[i % len(SENTENCES)]},
                    {"role": "assistant", "content": SENTENCES[(i + 1) % len(SENTENCES)]},
                ]
                for i in range(rows)
            ]
        }
    )


def preference_dataset(rows: int = 8) -> Dataset:
    """`prompt`, `chosen` and `rejected` columns."""
    columns = {"prompt": 0, "chosen": 2, "rejected": 3}
    return Dataset.from_dict(
        {name: [SENTENCES[(i + shift) % len(SENTENCES)] for i in range(rows)] for name, shift in columns.items()}
    )


def prompt_completion_dataset(rows: int = 8) -> Dataset:
    """`prompt` and `completion` columns."""
    return Dataset.from_dict(
        {
            "prompt": [SENTENCES[i % len(SENTENCES)] + " " for i in range(rows)],
            "completion": [SENTENCES[(i + 2) % len(SENTENCES)] for i in range(rows)],
        }
    )
