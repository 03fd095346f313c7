"""Naive twins of the statistics: one sequence at a time, without padding, everything kept, plain Python sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_distill.anatomy import describe
from hf_distill.students import shrink
from tests import tiny


LENGTHS = [7, 4, 5, 2, 6, 3, 7, 5]
# Weights large enough that every layer matters.
LOUD = {"initializer_range": 0.15}


def make_model(family="llama", *, layers=2, seed=0, **config):
    return tiny.model(family, layers=layers, seed=seed, **(LOUD | config))


def texts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def batches(rows: list[list[int]], size: int, *, left: bool = False) -> list[dict[str, torch.Tensor]]:
    """Padded to the longest row of each batch, with labels everywhere but on padding and on first tokens."""
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(len(row) for row in part) + 1  # one column is all padding
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in part:
            gap = width - len(row)
            for key, pad, values in [
                ("input_ids", 0, row),
                ("attention_mask", 0, [1] * len(row)),
                ("labels", -100, row),
            ]:
                batch[key].append([pad] * gap + values if left else values + [pad] * gap)
        found.append({key: torch.tensor(value) for key, value in batch.items()})
    return found


@dataclass
class Seen:
    """What passed at every module in one sequence, `[tokens][channels]`, and the gradient there."""

    values: list[list[list[float]]]
    gradients: list[list[list[float]]]


def watch(model, modules, reads_input, ids, teacher=None) -> Seen:
    """Run one sequence and keep everything."""
    kept = []

    def keep(value):
        value.retain_grad()
        kept.append(value)

    handles = [
        module.register_forward_pre_hook(lambda m, args: keep(args[0]))
        if reads_input
        else module.register_forward_hook(lambda m, args, output: keep(output))
        for module in modules
    ]
    naive_loss(model, ids, teacher).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return Seen([value[0].tolist() for value in kept], [value.grad[0].tolist() for value in kept])


def naive_loss(model, ids, teacher=None):
    """The sum over all but the first token of one sequence: cross-entropy, or forward KL from a teacher."""
    row = torch.tensor([ids])
    logits = model(row).logits[0, :-1]
    if teacher is None:
        return F.cross_entropy(logits, row[0, 1:], reduction="sum")
    with torch.no_grad():
        theirs = teacher(row).logits[0, :-1]
    p, log_p = theirs.softmax(-1), theirs.log_softmax(-1)
    return (p * (log_p - logits.log_softmax(-1))).sum()


def naive_activation(seen: list[Seen], module: int, channels: list[int]) -> float:
    """Root of the sum over channels and sequences of the squared mean of |a|."""
    total = 0.0
    for sequence in seen:
        tokens = sequence.values[module]
        for channel in channels:
            total += (sum(abs(token[channel]) for token in tokens) / len(tokens)) ** 2
    return math.sqrt(total)


def naive_first_order(seen: list[Seen], modules: list[int], channels: list[int], method: str) -> float:
    """The mean over sequences of the absolute value, or the square, of the sum of a * g."""
    total = 0.0
    for sequence in seen:
        gate = 0.0
        for module in modules:
            for values, gradients in zip(sequence.values[module], sequence.gradients[module], strict=True):
                gate += sum(values[channel] * gradients[channel] for channel in channels)
        total += abs(gate) if method == "taylor" else gate**2
    return total / len(seen)


def naive_block_influence(model, rows) -> list[float]:
    sums, tokens = [0.0] * describe(model).num_layers, 0
    for ids in rows:
        entered: list[tuple[torch.Tensor, torch.Tensor]] = []
        handles = [
            layer.register_forward_hook(lambda m, args, output, to=entered: to.append((args[0][0], output[0])))
            for layer in describe(model).layers
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        tokens += len(ids)
        for index, (before, after) in enumerate(entered):
            for x, y in zip(before, after, strict=True):
                sums[index] += 1 - float(x @ y / (x.norm() * y.norm()))
    return [total / tokens for total in sums]


def naive_leave_one_out(model, rows, teacher=None) -> list[float]:
    depth, labels = describe(model).num_layers, sum(len(ids) - 1 for ids in rows)
    with torch.no_grad():
        whole = sum(float(naive_loss(model, ids, teacher)) for ids in rows)
        found = []
        for index in range(depth):
            cut = shrink(model, layers=[layer for layer in range(depth) if layer != index])
            found.append((sum(float(naive_loss(cut, ids, teacher)) for ids in rows) - whole) / labels)
    return found
