"""bitsandbytes: NF4 and LLM.int8(), the formats of quantised teachers and of QLoRA."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.quantization import bitsandbytes_config, prepare_quantized_student
from hf_distill.students.quantizers.base import Quantizer, Source, check_multiples, linear_layers


class BitsAndBytesQuantizer(Quantizer):
    """`nf4` with double quantisation (arXiv:2305.14314), and `int8-bnb` (arXiv:2208.07339)."""

    package = "bitsandbytes"
    module = "bitsandbytes"
    extra = "quant"

    def __init__(self, method: str, group_size: int | None = None) -> None:
        if group_size is not None:
            raise ValueError(
                f"`group_size` is {group_size}, and `method={method!r}` has blocks of its own; leave it out, or use "
                f"`method='w4a16'`."
            )
        super().__init__(method, group_size)

    @property
    def formats(self) -> frozenset[str]:
        """Two weights a byte, or one."""
        return frozenset({"U8"} if self.method == "nf4" else {"I8"})

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse widths on which the 4-bit kernel of CPUs fails in the first forward pass."""
        linear_layers(model)
        if self.method == "nf4":
            hint = (
                ": bitsandbytes stops in its first forward pass on a CPU with AVX512-BF16. Round widths to multiples "
                "of 64 when you prune, or use `method='int8'`."
            )
            check_multiples(model, self.method, 64, 32, hint)

    def write(self, source: Source, folder: Path) -> None:
        """Let transformers quantise while it loads, and save that before any forward pass.

        On some CPUs the first pass in eval mode repacks 4-bit weights, and what is saved afterwards is not what was
        loaded (without double quantisation 23 % off).
        """
        config = bitsandbytes_config("nf4" if self.method == "nf4" else "int8")
        model = source.load(quantization_config=config)
        prepare_quantized_student(model)
        model.save_pretrained(folder)
