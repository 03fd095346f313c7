"""The plan against the memory that two real steps of `KDTrainer` take on this CPU, in processes of their own."""

from __future__ import annotations

import pytest

from hf_distill.planning import plan
from tests.planning.llama import lora, tiny_config
from tests.planning.measured import measured_bytes


SHAPE = {"hidden_size": 768, "num_attention_heads": 12, "max_position_embeddings": 1024, "layers": 6}
LLAMA = SHAPE | {"intermediate_size": 2048, "num_key_value_heads": 4, "vocab_size": 32000}
GPT2 = {"n_embd": 768, "n_inner": 3072, "n_head": 12, "n_positions": 1024, "layers": 6, "vocab_size": 32000}
MIXED = {"bf16": True, "gradient_checkpointing": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "shape", "case"),
    [
        ("llama", LLAMA | {"vocab_size": 2048}, {}),
        ("llama", LLAMA | {"vocab_size": 48000}, {}),
        ("llama", LLAMA, MIXED),
        ("llama", LLAMA | {"vocab_size": 8000}, {"bf16": True}),
        ("llama", LLAMA, {"bf16": True, "dtype": "bfloat16"}),
        ("llama", LLAMA | {"layers": 12}, {"bf16": True, "adapter": True}),
        ("llama", LLAMA, MIXED | {"cached": True}),
        ("llama", LLAMA, MIXED | {"gradient_accumulation_steps": 2}),
        ("gpt2", GPT2, {}),
        ("bert", SHAPE | {"intermediate_size": 3072, "vocab_size": 32000}, {}),
    ],
    ids=[
        "fp32, small vocabulary", "fp32, large vocabulary", "bf16 recomputed", "bf16", "bf16 weights", "adapter",
        "soft labels from disk", "two micro-batches", "GPT-2", "BERT",
    ],
)  # fmt: skip
def test_peaks_of_real_runs_are_within_15_percent_of_the_plan(family, shape, case):
    teacher = {"layers": shape["layers"] + 2}
    expected = plan(
        tiny_config(family, **shape | teacher),
        tiny_config(family, **shape),
        per_device_batch_size=2,
        sequence_length=512,
        gradient_accumulation_steps=case.get("gradient_accumulation_steps", 1),
        teacher_cached=case.get("cached", False),
        student_dtype=case.get("dtype", "float32"),
        bf16=case.get("bf16", False),
        peft_config=lora() if case.get("adapter") else None,
        gradient_checkpointing=case.get("gradient_checkpointing", False),
        device="cpu",
    )
    measured = measured_bytes(family=family, shape=shape, teacher=teacher, batch=2, length=512, **case)
    assert expected.bytes_per_rank == pytest.approx(measured, rel=0.15)
