"""A language that tiny models learn in a second: each token is drawn by the one before it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests import tiny


TOKENS = 48
LENGTH = 24
# Few successors each, so that a model that knows the language is sure of much.
SUCCESSORS = np.random.default_rng(0).dirichlet(np.full(TOKENS, 0.04), size=TOKENS)


def sentences(rows: int, seed: int) -> np.ndarray:
    """Token ids `[rows, LENGTH]`."""
    generator = np.random.default_rng(seed)
    ids = np.empty((rows, LENGTH), dtype=np.int64)
    ids[:, 0] = generator.integers(TOKENS, size=rows)
    for position in range(1, LENGTH):
        odds = SUCCESSORS[ids[:, position - 1]].cumsum(1)
        ids[:, position] = (odds < generator.random((rows, 1))).sum(1).clip(0, TOKENS - 1)
    return ids


def dataset(ids: np.ndarray) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist()})


def model(width: int, layers: int = 1, seed: int = 0):
    heads = max(1, width // 8)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": heads, "vocab_size": TOKENS, "max_position_embeddings": 2 * LENGTH}
    return tiny.model("llama", layers=layers, seed=seed, **shape)


def train(student, ids: np.ndarray, steps: int, *, teacher=None, lr: float = 1e-2, rows: int = 32, seed: int = 0):
    """Train on cross-entropy, with a teacher on its KL in equal parts."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.from_numpy(ids)[torch.randint(len(ids), (rows,), generator=generator)]
        logits = student(batch).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, batch[:, 1:].flatten())
        if teacher is not None:
            with torch.no_grad():
                target = teacher(batch).logits[:, :-1].flatten(0, 1).log_softmax(-1)
            loss = (loss + F.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student
