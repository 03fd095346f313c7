"""How many bytes a token takes at a large vocabulary, where nothing small enough has one: SmolLM2's, made wider.

Its head is repeated with noise in the copies until it has as many rows, so that the mass of every token is shared by
several: the teacher is then less sure, and the ids are more, than those of a real vocabulary of that size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from labels import rows_of
from measure import in_child
from step import models
from torch import Tensor

from hf_distill.cache.observe import blocks
from hf_distill.cache.registry import PRESETS, make_encoding
from hf_distill.cache.rows import pack_ids
from hf_distill.functional import LMHead
from hf_distill.signals import Projection, Signal


# The presets whose budgets are meant for a second temperature, too, are measured with one.
CASES = [*PRESETS, "base, T = 1 and 2", "large, T = 1 and 2"]


@dataclass(frozen=True)
class Setting:
    """Rows of one length, and the vocabulary; `noise` is that of the copies, in standard deviations of the head."""

    rows: int = 40
    length: int = 256
    vocabulary: int = 151_936
    noise: float = 0.3
    shard_tokens: int = 100_000


def measure(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Bytes of a token in all arrays of a shard of `shard_tokens`, its share of what a shard has once included."""
    cases, entropy = in_child(_measure, setting, names, threads)
    return {"setting": asdict(setting) | {"entropy": entropy}, "threads": threads, "cases": cases}


@torch.no_grad()
def _measure(setting: Setting, names: list[str], threads: int) -> tuple[dict[str, dict[str, float]], float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, teacher = models([0])
    ids = torch.tensor(rows_of(teacher, setting)["input_ids"])
    output, labels = _wide(teacher, ids, setting), ids[:, 1:].flatten()
    uniforms = torch.rand(len(labels), dtype=torch.float64)
    found = {}
    for name in names:
        preset, *more = name.split(", ")
        temperatures = (1.0, 2.0) if more else (1.0,)
        encoding = make_encoding(preset, vocab_size=setting.vocabulary, temperatures=temperatures)
        arrays = encoding.pack(encoding.observe(output, labels, uniforms))
        once = arrays["widths"].nbytes
        each = sum(array.nbytes for array in arrays.values()) - once
        # The input ids, and of each row its key and its length.
        own = (pack_ids(np.array([setting.vocabulary - 1])).nbytes * setting.length + 16 + 4) / (setting.length - 1)
        found[name] = {"bytes": each / len(labels) + once / setting.shard_tokens + own}
        print(name, found[name], flush=True)
    entropies = [block.spreads[1.0].entropy for block in blocks(output.at(torch.arange(2048)), [1.0], [1.0])]
    return found, round(torch.cat([part for part in entropies if part is not None]).mean().item(), 2)


def _wide(teacher: Any, ids: Tensor, setting: Setting) -> Projection:
    """What the teacher says at all labelled tokens, with a head of as many rows as the vocabulary has."""
    states, head = [], None
    for part in ids.split(8):
        output = teacher.signals({"input_ids": part, "attention_mask": torch.ones_like(part)}, {Signal.LOGITS}).logits
        states.append(output.hidden[:, :-1].flatten(0, 1))
        head = output.head
    weight = head.weight
    copies = [weight]
    while sum(map(len, copies)) < setting.vocabulary:
        copies.append(weight + torch.randn_like(weight) * (setting.noise * weight.float().std()))
    return Projection(torch.cat(states), LMHead(torch.cat(copies)[: setting.vocabulary].contiguous()))
