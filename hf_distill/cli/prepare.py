"""Makes token ids of texts and chats, as the trainer that will read them does."""

from __future__ import annotations

import tempfile
from typing import Any


def prepare(dataset: Any, tokenizer: Any, *, max_length: int | None, assistant_only_loss: bool) -> Any:
    """The rows that TRL's `SFTTrainer` makes of a dataset of texts, of prompts and completions, or of chats.

    The trainer itself makes them, with a model of no size: whatever it does, rows and masks are its own.

    Args:
        dataset: With one of the columns of TRL's dataset formats.
        tokenizer: Of the teacher, and so of the student.
        max_length: Of `SFTConfig`; None for its default.
        assistant_only_loss: Of `SFTConfig`.

    Raises:
        ValueError: The columns are of no format, or a text is none.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    from hf_distill.training.checks import check_text

    check_text(dataset, "text")
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    settings = {} if max_length is None else {"max_length": max_length}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(folder, assistant_only_loss=assistant_only_loss, bf16=False, report_to="none", **settings)
        return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train_dataset
