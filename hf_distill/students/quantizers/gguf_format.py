"""GGUF: one file that llama.cpp and its relatives run, and that transformers reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.students.quantizers.base import Quantizer, Source, StoredTensor, check_multiples, linear_layers
from hf_distill.students.quantizers.gguf_tokenizer import add_tokenizer, check_tokenizer


# Weights of a row that share a scale, in every type that is written here.
BLOCK = 32
FAMILIES = ("llama", "qwen2", "qwen3")
# GGUF's name of a number of the architecture -> that of transformers' config.
NUMBERS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
# What a config may hold without changing what the model computes.
IRRELEVANT = {
    *("architectures", "attention_dropout", "dtype", "initializer_range", "is_decoder", "layer_types"),
    *("max_window_layers", "pretraining_tp", "transformers_version", "use_cache", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "_name_or_path"),
}


class GGUFQuantizer(Quantizer):
    """Q8_0 or Q4_0 blocks of 32 weights with a 16-bit scale; vectors stay fp32.

    With Q4_0 the embedding and the head are Q8_0: what they lose meets every token. K-quants need llama.cpp's tool.
    """

    package = "gguf"
    module = "gguf"
    extra = "gguf"

    def __init__(self, method: str, group_size: int | None = None) -> None:
        if group_size not in (None, BLOCK):
            raise ValueError(
                f"`group_size` is {group_size}, and the blocks of `method={method!r}` have {BLOCK} weights; leave it "
                "out."
            )
        super().__init__(method, BLOCK)
        self.type = method.removeprefix("gguf-").upper()

    @property
    def formats(self) -> frozenset[str]:
        """The blocks of the method."""
        return frozenset({self.type})

    @property
    def file_name(self) -> str:
        """The file inside the folder."""
        return f"model-{self.type}.gguf"

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse families, settings, widths and tokenizers that would not come back from the file."""
        config = model.config
        if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
            raise ValueError(
                f"`method={self.method!r}` writes causal language models of the families {', '.join(FAMILIES)}, and "
                f"this is a {type(model).__name__} (model_type {config.model_type!r}); use `method='w4a16'`, or "
                "llama.cpp's convert_hf_to_gguf.py."
            )
        _check_config(config, self.method)
        linear_layers(model)
        check_multiples(model, self.method, BLOCK, hint="; round widths to multiples of 64 when you prune.")
        if tokenizer is None:
            raise ValueError(
                f"`method={self.method!r}` writes the tokenizer into the file, and there is none beside the model; "
                "pass `tokenizer=AutoTokenizer.from_pretrained(name)`."
            )
        check_tokenizer(tokenizer, config.vocab_size)

    def write(self, source: Source, folder: Path) -> None:
        """Write the file, the tokenizer's metadata in it."""
        import gguf

        model = source.load(dtype=torch.float32)
        writer = gguf.GGUFWriter(folder / self.file_name, model.config.model_type)
        try:
            self._add_metadata(writer, model.config)
            add_tokenizer(writer, source.tokenizer, model.config.vocab_size)
            names = _tensor_names(model)
            for name, tensor in model.state_dict().items():
                if name in names:  # a tied head is not written twice
                    self._add_tensor(writer, names[name], name, tensor, model.config)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    def load(self, folder: Path, **kwargs: Any) -> PreTrainedModel:
        """The file, unpacked by transformers."""
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=self.file_name, **kwargs).eval()

    def weight_files(self, folder: Path) -> list[Path]:
        """The one file."""
        return [folder / self.file_name]

    def stored(self, folder: Path, model: PreTrainedModel) -> list[StoredTensor]:
        """Every tensor of the file under its name in transformers."""
        import gguf

        names = {theirs: ours for ours, theirs in _tensor_names(model).items()}
        tensors = gguf.GGUFReader(folder / self.file_name).tensors
        return [StoredTensor(names[t.name], t.tensor_type.name, int(t.n_bytes)) for t in tensors]

    def _add_metadata(self, writer: Any, config: PreTrainedConfig) -> None:
        import gguf

        writer.add_name(config.model_type)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{self.type}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        head_dim = _head_dim(config)
        writer.add_rope_dimension_count(head_dim)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])

    def _add_tensor(self, writer: Any, target: str, name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> None:
        """Add a parameter in the type that its kind has."""
        import gguf

        values = tensor.float().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _interleave_rotary(values, heads)
        if values.ndim == 1:
            writer.add_tensor(target, values)
            return
        whole = target.startswith(("token_embd", "output."))
        kind = gguf.GGMLQuantizationType["Q8_0" if whole else self.type]
        writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """From halves to pairs: ggml rotates neighbouring rows of a head, transformers row i with row i + d / 2."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def _tensor_names(model: PreTrainedModel) -> dict[str, str]:
    """GGUF's name of each parameter; a head that is the embedding has none.

    Raises:
        ValueError: A parameter has no name in GGUF.
    """
    import gguf

    [architecture] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model.config.model_type]
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(f"The parameter {name!r} has no name in a GGUF file of {model.config.model_type} models.")
        found[name] = target
    return found


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_config(config: PreTrainedConfig, method: str) -> None:
    """Refuse settings that transformers does not read from the file: the reloaded model would be another one.

    Raises:
        ValueError: One is not at its default; it is named.
    """
    read = {name: getattr(config, name) for name in NUMBERS.values()}
    read["rope_theta"] = config.rope_parameters["rope_theta"]
    if config.model_type == "llama":
        read["head_dim"] = _head_dim(config)
    ours, theirs = config.to_dict(), type(config)(**read).to_dict()
    for name in sorted(set(theirs) - IRRELEVANT):
        if ours.get(name) != theirs[name]:
            raise ValueError(
                f"The config has {name}={ours.get(name)!r}, but a {config.model_type} model that transformers reads "
                f"from a GGUF file has {theirs[name]!r}: the file has no place for it. Use `method='w4a16'`, or "
                "llama.cpp's convert_hf_to_gguf.py where llama.cpp alone runs the file."
            )
