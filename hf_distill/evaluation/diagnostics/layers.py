"""How alike the layers of two models are: a map of linear centred kernel alignment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.anatomy import describe
from hf_distill.evaluation.rows import CLASSIFICATION, Row, collate
from hf_distill.evaluation.scoring import project
from hf_distill.signals import Layers, Signal, Targets
from hf_distill.taps import tap_hidden_states


# Tokens of one kernel matrix: quadratic in memory and time, and the estimator is free of bias at any number.
BATCH_TOKENS = 256
TOKENS = 2048
# The least that the estimator is defined for.
LEAST_TOKENS = 4


def layer_map(
    student: Any, teacher: Any, task: str, rows: list[Row], batch_size: int
) -> tuple[tuple[float | None, ...], ...] | None:
    """Linear CKA of every layer of the student with every layer of the teacher.

    The kernels' dependence is estimated without bias in each batch and added up (Nguyen et al., Do Wide and Deep
    Networks Learn the Same Things?, arXiv 2010.15327): with fewer tokens than dimensions, which is the case in every
    large model, the plain estimate of Kornblith et al. (arXiv 1905.00414) is near 1 for unrelated layers. The first
    token of a row is left out, whose few huge dimensions would rule a linear kernel.

    Args:
        student: A model.
        teacher: A model or a Teacher.
        task: Of both.
        rows: The first of them, up to `TOKENS` tokens, are read.
        batch_size: Rows of a forward pass.

    Returns:
        `[L_s + 1][L_t + 1]`, from the embedding (0) to the state after the final norm, 1 where layers are the same up
        to rotation and scale; None where a layer has no variance, and no map where the teacher cannot be looked into
        or there are too few tokens.
    """
    depth_s, depth_t = _depth(student), _depth(teacher)
    if depth_s is None or depth_t is None:
        return None
    own_s, own_t = (torch.zeros(depth + 1, dtype=torch.float64) for depth in (depth_s, depth_t))
    cross = torch.zeros(depth_s + 1, depth_t + 1, dtype=torch.float64)
    read = 0
    for batch, index in _batches(task, rows, batch_size):
        ours = _centred(_states(student, task, batch, depth_s), index)
        theirs = _centred(_states(teacher, task, batch, depth_t), index)
        cross += ours @ theirs.t()
        own_s += ours.square().sum(1)
        own_t += theirs.square().sum(1)
        read += len(index)
        if read >= TOKENS:
            break
    if not read:
        return None
    norms = (own_s[:, None] * own_t[None, :]).sqrt()
    return tuple(
        tuple(value if norm > 0 else None for value, norm in zip(values, row, strict=True))
        for values, row in zip((cross / norms).tolist(), norms.tolist(), strict=True)
    )


def _depth(model: Any) -> int | None:
    """Number of layers; None for a teacher that gives no hidden states."""
    if isinstance(model, nn.Module):
        return describe(model).num_layers
    return model.shape().num_layers if Signal.HIDDEN_STATES in model.provides else None


def _batches(task: str, rows: list[Row], batch_size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches and some of their scored positions (of a classifier, of their real tokens), evenly spaced."""
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        length = batch["input_ids"].shape[1]
        if task == CLASSIFICATION:
            index = batch["attention_mask"].flatten().nonzero().squeeze(1)
        else:
            index = Targets.from_labels(batch["labels"], shift=task == "causal_lm").index
        index = index[index % length != 0]
        index = index[:: max(1, -(-len(index) // BATCH_TOKENS))]
        if len(index) >= LEAST_TOKENS:
            yield batch, index


def _states(model: Any, task: str, batch: Mapping[str, Tensor], depth: int) -> Mapping[int, Tensor]:
    """Hidden states by layer, `[B, S, H]`."""
    layers = frozenset(range(depth + 1))
    if not isinstance(model, nn.Module):
        return model.signals(batch, {Signal.HIDDEN_STATES}, Layers(hidden=layers)).hidden
    with tap_hidden_states(model, layers) as tap:
        project(model, task, batch)
    return tap.states


def _centred(states: Mapping[int, Tensor], index: Tensor) -> Tensor:
    """The kernel matrices of all layers `[L + 1, n * n]`, centred so that their products estimate without bias.

    Source of the centring: Szekely and Rizzo, arXiv 1310.2926; with it `<K, L> / (n (n - 3))` is the estimator of Song
    et al., 2012.
    """
    n = len(index)
    kernels = []
    for _, hidden in sorted(states.items()):
        tokens = hidden.flatten(0, 1).index_select(0, index.to(hidden.device)).double()
        tokens = tokens - tokens.mean(0)  # changes nothing but the rounding
        kernel = (tokens @ tokens.t()).fill_diagonal_(0)
        means = kernel.sum(1) / (n - 2)
        kernel = kernel - means[:, None] - means[None, :] + kernel.sum() / ((n - 1) * (n - 2))
        kernels.append(kernel.fill_diagonal_(0).flatten() / (n * (n - 3)) ** 0.5)
    return torch.stack([kernel.cpu() for kernel in kernels])
