from __future__ import annotations

import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_distill.students import quantize
from hf_distill.students.quantizers.gguf_tokenizer import LLAMA3_SPLIT, SPLITS
from tests import tiny
from tests.students.rounding import logits, naive_twin, student


pytest.importorskip("gguf")
QWEN2_SPLIT = next(split for split, name in SPLITS.items() if name == "qwen2")
TEXTS = [
    "Two plus two is four, and 1234 plus 4 isn't 99!",
    "  The student's   film\n\n was far better<|eos|> than<|user|>\tits trailer. ",
    "naïve café 你好 🙂 don't WE'LL",
    "to <think> aloud",
]
HEADS = {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def plain_load(folder, name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "config", "tied", "method"),
    [
        ("llama", {}, False, "gguf-q8_0"),
        ("llama", {}, True, "gguf-q4_0"),
        ("llama", {"head_dim": 32}, False, "gguf-q4_0"),
        ("qwen2", {}, False, "gguf-q4_0"),
        ("qwen2", {}, True, "gguf-q8_0"),
        ("qwen3", HEADS, False, "gguf-q8_0"),
        ("qwen3", HEADS, True, "gguf-q4_0"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_each_family_comes_back_with_its_weights_rounded_by_hand(family, config, tied, method, tmp_path):
    model = student(
        family, **config, tie_word_embeddings=tied, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    report = quantize(model, tmp_path / "out", method, tokenizer=tiny.tokenizer())
    again = plain_load(tmp_path / "out", report.gguf_file)
    assert type(again) is type(model)
    assert again.config.tie_word_embeddings is tied
    expected = logits(naive_twin(model, method))
    assert (expected - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-4)


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with the pre-tokenizer of a family."""
    made = tiny.tokenizer()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind in ("qwen2", "llama-bpe"):
        split = Regex(QWEN2_SPLIT if kind == "qwen2" else LLAMA3_SPLIT)
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(split, behavior="isolated"), byte_level]
        )
    if kind == "qwen2":
        made.backend_tokenizer.normalizer = normalizers.NFC()
    if kind == "smollm":
        made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    made.add_tokens(["<think>"])
    return made


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe", "smollm"])
def test_the_folder_holds_the_tokenizer_itself(kind, tmp_path):
    theirs = tokenizer(kind)
    report = quantize(tiny.model(hidden_size=64), tmp_path / "out", "gguf-q8_0", tokenizer=theirs)
    check_same(AutoTokenizer.from_pretrained(tmp_path / "out"), theirs)
    ours = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=report.gguf_file)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe"])
def test_the_file_alone_gives_the_same_tokenizer(kind, tmp_path):
    theirs = tokenizer(kind)
    report = quantize(tiny.model(hidden_size=64), tmp_path / "out", "gguf-q8_0", tokenizer=theirs)
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "out" / report.gguf_file, tmp_path / "alone")
    check_same(AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file=report.gguf_file), theirs)


def check_same(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    messages = [{"role": "user", "content": "Hi"}]
    settings = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(messages, **settings) == theirs.apply_chat_template(messages, **settings)


def test_the_file_says_what_llama_cpp_asks_for(tmp_path):
    import gguf

    model = student()
    report = quantize(model, tmp_path / "out", "gguf-q4_0", tokenizer=tokenizer("smollm"))
    reader = gguf.GGUFReader(tmp_path / "out" / report.gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16
    assert len(fields["tokenizer.ggml.tokens"]) == model.config.vocab_size == 320
    assert fields["tokenizer.ggml.tokens"][310] == "[PAD310]"
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q4_0", "Q8_0"}


def unigram() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))


def short_vocabulary() -> PreTrainedTokenizerFast:
    made = tiny.tokenizer()
    made.add_tokens([f"<{index}>" for index in range(40)])
    return made


LONG_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("family", "config", "tokenizer", "message"),
    [
        ("mistral", {}, tiny.tokenizer, r"llama, qwen2, qwen3, and this is a MistralForCausalLM.*w4a16"),
        ("gpt2", {}, tiny.tokenizer, "GPT2LMHeadModel"),
        ("llama", {"attention_bias": True}, tiny.tokenizer, "attention_bias=True"),
        ("llama", {"hidden_act": "gelu"}, tiny.tokenizer, "hidden_act='gelu'"),
        ("llama", {"rope_parameters": LONG_ROPE}, tiny.tokenizer, "rope_parameters="),
        ("qwen3", {}, tiny.tokenizer, "head_dim=8"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 3}, tiny.tokenizer, "sliding_window=3"),
        ("llama", {}, lambda: None, "tokenizer=AutoTokenizer"),
        ("llama", {}, unigram, "Unigram"),
        ("llama", {}, short_vocabulary, "ids up to 339"),
        ("llama", {}, lambda: "gpt2", "str"),
    ],
)
def test_what_would_not_come_back_is_refused_by_name(family, config, tokenizer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantize(tiny.model(family, **config), tmp_path / "out", "gguf-q8_0", tokenizer=tokenizer())
    assert list(tmp_path.iterdir()) == []
