"""Which channels of a teacher's residual stream matter most."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.anatomy import describe
from hf_distill.taps import tap_hidden_states


def select_channels(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], size: int, layers: Collection[int] | None = None
) -> Tensor:
    """Choose the channels of the hidden states that are largest over some text.

    The importance of a channel is its root mean square over all real tokens, added up over layers. Every token is
    scaled to a root mean square of 1 first, as the norms of the model do before they read it: the first tokens of a
    decoder, hundreds of times larger than others, would decide alone. (Minitron, arXiv:2407.14679, does the same with
    the outputs of the norms.) Layers share one residual stream, so they share the choice.

    Args:
        model: The teacher, wrapped or not; it is left as it was.
        batches: `input_ids` `[B, S]`, `attention_mask` and so on, as for the model; `labels` are ignored.
        size: How many channels: the student's width.
        layers: Whose hidden states count, from 0 (the embedding) to the number of layers; None: all but the embedding.

    Returns:
        Channels from 0, increasing, `[size]` int64 on the CPU: `HiddenStateObjective(channels=...)`.

    Raises:
        ValueError: The model is not that wide, a layer does not exist, or there is no token.
    """
    parts = describe(model)
    if not 1 <= size <= parts.hidden_size:
        raise ValueError(
            f"`size` is {size}; expected 1 to {parts.hidden_size}, the width of {type(parts.model).__name__}."
        )
    chosen = range(1, parts.num_layers + 1) if layers is None else layers
    sums = {layer: torch.zeros(parts.hidden_size, dtype=torch.float64) for layer in chosen}
    modes, count = {module: module.training for module in parts.model.modules()}, 0
    try:
        parts.model.eval()
        with torch.no_grad():
            for batch in batches:
                squares, tokens = _relative_squares(parts.model, batch, sums)
                count += tokens
                for layer in sums:
                    sums[layer] += squares[layer]
    finally:
        for module, training in modes.items():
            module.training = training
    if count == 0 or not sums:
        raise ValueError("`batches` or `layers` is empty; expected some batches of text, for example 100 rows.")
    importance = torch.stack([(total / count).sqrt() for total in sums.values()]).sum(0)
    return importance.sort(descending=True, stable=True).indices[:size].sort().values


def _relative_squares(
    model: nn.Module, batch: Mapping[str, Any], layers: Collection[int]
) -> tuple[dict[int, Tensor], int]:
    """Sums over the real tokens of a batch of squared channels over the token's mean square, and their number."""
    parts = describe(model)
    device = parts.model.get_input_embeddings().weight.device
    inputs = {key: torch.as_tensor(value, device=device) for key, value in batch.items() if key != "labels"}
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    with tap_hidden_states(parts.model, layers) as tap:
        parts.decoder(**inputs)
    sums = {}
    for layer, states in tap.states.items():
        squares = states[mask.to(states.device)].float().square()
        sums[layer] = (squares / squares.mean(-1, keepdim=True).clamp(min=1e-12)).sum(0, dtype=torch.float64).cpu()
    return sums, int(mask.sum())
