"""Which layer of the teacher a layer of the student learns from, found in training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_distill.objectives.layer_map import Pairs


class LearnedMap(nn.Module):
    """Shares of all layers of the teacher for some layers of the student: a softmax for each.

    It begins around the partners of a fixed map, falling by a factor of e for every layer between.

    Args:
        pairs: The fixed map, from 1.
        num_teacher_layers: Depth of the teacher.
        temperature: Of the softmax at the beginning, > 0.
    """

    def __init__(self, pairs: Pairs, num_teacher_layers: int, temperature: float) -> None:
        super().__init__()
        partners = torch.tensor([pair[1] for pair in pairs])
        distances = (torch.arange(1, num_teacher_layers + 1) - partners[:, None]).abs()
        self.scores = nn.Parameter(-temperature * distances.float())

    def shares(self, temperature: float) -> Tensor:
        """`[pairs, layers]`, every row adding up to 1. The lower the temperature, the more they are one layer's."""
        return torch.softmax(self.scores.float() / temperature, dim=-1)

    def narrowness(self, temperature: float) -> Tensor:
        """What the entropy of each row lacks to that of equal shares, `[pairs]`, >= 0."""
        logs = torch.log_softmax(self.scores.float() / temperature, dim=-1)
        return (logs.exp() * logs).sum(-1) + math.log(logs.shape[-1])

    def shown(self, temperature: float) -> list[dict[int, float]]:
        """For the card: for each layer of the student the three largest shares, by layer of the teacher."""
        shares, layers = self.shares(temperature).detach().topk(min(3, self.scores.shape[1]), dim=-1)
        return [
            {layer + 1: round(share, 2) for layer, share in zip(*row, strict=True)}
            for row in zip(layers.tolist(), shares.tolist(), strict=True)
        ]
