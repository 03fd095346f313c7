"""What the compressions of SmolLM2 share: the teacher, the rows, the benchmarks and the settings of a run."""

from itertools import pairwise
from typing import Any

import torch
from assets import pack, review_texts, smollm2
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from hf_distill import cards
from hf_distill.evaluation import Benchmark, KLDivergence, MultipleChoice, Perplexity, Top1Agreement


TEACHER = str(smollm2())
TOKENIZER = AutoTokenizer.from_pretrained(TEACHER)
TEXTS = {split: [row.text for row in rows] for split, rows in review_texts().items()}
TRAIN = pack(TEXTS["train"], TOKENIZER, 128)
CONFIG = AutoConfig.from_pretrained(TEACHER)
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# 22 of 30 layers and 1152 of 1536 neurons: 68 % of the parameters.
SPEC = {
    "num_hidden_layers": CONFIG.num_hidden_layers * 11 // 15,
    "intermediate_size": CONFIG.intermediate_size * 3 // 4,
}


def continuations(count: int = 120) -> Dataset:
    """Which of two texts ends a snippet after its first six words: its own, or that of the next snippet."""
    words = [text.split() for text in TEXTS["test"]]
    short = [row for row in words if 12 <= len(row) <= 20]
    items = []
    for number, (own, other) in enumerate(pairwise(short[: count + 1])):
        pair = (own, other) if number % 2 else (other, own)
        choices = [" " + " ".join(row[6:]) for row in pair]
        items.append({"context": " ".join(own[:6]), "choices": choices, "answer": 1 - number % 2})
    return Dataset.from_list(items)


def benchmarks() -> list[Benchmark]:
    """Perplexity, KL and agreement on 100 held-out snippets, and the choice between 120 pairs of endings."""
    held_out = Dataset.from_dict({"text": TEXTS["test"][:100]})
    measured: list[Benchmark] = [kind(held_out) for kind in (Perplexity, KLDivergence, Top1Agreement)]
    return [*measured, MultipleChoice(continuations(), name="continuation")]


def settings(steps: int, seed: int) -> dict[str, Any]:
    """Fields of `CompressConfig`: 4 rows of 128 tokens a step."""
    return {
        "seed": seed,
        "prune": SPEC,
        "calibration_tokens": 8192,
        "model_kwargs": {"attn_implementation": "eager"},  # bf16 SDPA has a slow backward on CPUs
        "teacher_dtype": "bfloat16",
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(5, steps - 1),
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_steps": 20,
        "save_total_limit": 1,
        "report_to": "none",
    }


def card(order: str, steps: int, command: str) -> dict[str, Any]:
    """What a card says that the pipeline cannot know."""
    return {
        "name": f"SmolLM2-135M-Instruct, {order}",
        "teacher": NAME,
        "base_model": NAME,
        "language": "en",
        "license": "apache-2.0",
        "teacher_license": "apache-2.0",
        "datasets": [
            cards.Dataset("review and editorial snippets (VADER, 2014)", "mit", "movies, products, New York Times")
        ],
        "tokens": steps * 4 * 127 if "KD" in order else None,
        "evaluation_data": "100 held-out snippets, and 120 choices between the ends of two snippets",
        "commands": [command],
    }
