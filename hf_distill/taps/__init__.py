"""Context managers that capture what passes inside a model, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from hf_distill.anatomy import resolve_final_norm
from hf_distill.signals import AttentionStates, Layers, Norm
from hf_distill.taps.attention import AttentionTap, tap_attention
from hf_distill.taps.hidden_states import HiddenStatesTap, tap_hidden_states
from hf_distill.taps.last_hidden import LastHiddenTap, tap_head_input, tap_last_hidden


__all__ = [
    "AttentionTap",
    "HiddenStatesTap",
    "LastHiddenTap",
    "LayersTap",
    "tap_attention",
    "tap_head_input",
    "tap_hidden_states",
    "tap_last_hidden",
    "tap_layers",
]


@dataclass(frozen=True)
class LayersTap:
    """All that was asked of the layers in one forward call."""

    _hidden: HiddenStatesTap
    _attention: AttentionTap
    final_norm: Norm | None = None

    @property
    def hidden(self) -> dict[int, Tensor]:
        """See `HiddenStatesTap.states`."""
        return self._hidden.states

    @property
    def attention(self) -> dict[int, AttentionStates]:
        """See `AttentionTap.states`."""
        return self._attention.states


@contextmanager
def tap_layers(model: nn.Module, layers: Layers) -> Iterator[LayersTap]:
    """Record hidden states and attention of some layers at once; see `tap_hidden_states` and `tap_attention`.

    The final norm is that of now, also where an adapter is disabled for the call.
    """
    norm = resolve_final_norm(model) if layers.final_norm else None
    with tap_hidden_states(model, layers.hidden) as hidden, tap_attention(model, layers.attention) as attention:
        yield LayersTap(hidden, attention, norm)
