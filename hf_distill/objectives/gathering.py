"""Tokens of all ranks in one place, for terms that are no sum over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Evenly spaced tokens of the micro-batches of all ranks, in the order of the ranks.

    Args:
        index: Which of this rank's tokens belong to it, `[n]` int64, increasing; they follow each other in the sample.
        start: Where the first of them stands in the sample.
        size: Tokens of the sample.
        labels: Labels of the micro-batches that it was drawn from.
        gathered: Whether there are other ranks in it.
    """

    index: Tensor
    start: int
    size: int
    labels: int
    gathered: bool

    def gather(self, features: Tensor) -> Tensor:
        """The features of the whole sample, `[size, H]`, from those of this rank's tokens, `[n, H]`.

        Only its own have a gradient here; the others' have theirs on their own rank. All ranks must call it.
        """
        if not self.gathered:
            return features
        end = self.start + len(features)
        whole = features.new_zeros(self.size, features.shape[1])
        whole[self.start : end] = features.detach()
        dist.all_reduce(whole)  # a sum with zeros: ranks may hold different numbers of tokens, or none
        return torch.cat([whole[: self.start], features, whole[end:]])

    def for_each_label(self, value: Tensor, labels: int) -> Tensor:
        """What a rank adds to the sum over labels for a value, 0-dim, that all ranks have computed from the sample.

        It is `value * labels` with the gradient of `value * self.labels`. Every rank differentiates the value in its
        own features alone, so these gradients add up to the whole; but each of the values before them would be scaled
        to the labels of one rank. The gradient is then that of one process that sees all the micro-batches.

        Args:
            value: The mean distance.
            labels: Of this rank.
        """
        return value.detach() * labels + (value - value.detach()) * self.labels


def draw_sample(tokens: int, labels: int, size: int, device: torch.device, *, gather: bool) -> Sample:
    """Choose up to `size` evenly spaced tokens of all ranks, or of this one: the same in every pass, no randomness.

    Args:
        tokens: How many this rank has.
        labels: How many of its positions are labelled.
        size: How many tokens to take from all ranks together.
        device: Where the tokens are.
        gather: Whether to count the other ranks' in; then all of them must call it.
    """
    ranks, rank = 1, 0
    if gather and dist.is_available() and dist.is_initialized():
        ranks, rank = dist.get_world_size(), dist.get_rank()
    counts = [(tokens, labels)]
    if ranks > 1:
        table = torch.zeros(ranks, 2, dtype=torch.int64, device=device)
        table[rank] = torch.tensor([tokens, labels])
        dist.all_reduce(table)
        counts = table.tolist()
    total, before = sum(count[0] for count in counts), sum(count[0] for count in counts[:rank])
    size = min(size, total)
    # The middles of `size` equal parts of all tokens.
    chosen = (2 * torch.arange(size) + 1) * total // max(2 * size, 1) - before
    mine = (chosen >= 0) & (chosen < tokens)
    return Sample(
        index=chosen[mine].to(device),
        start=int((chosen < 0).sum()),
        size=size,
        labels=sum(count[1] for count in counts),
        gathered=ranks > 1,
    )
