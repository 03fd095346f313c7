"""What a pruned model shall look like."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


WIDTHS = ("intermediate_size", "hidden_size")
COUNTS = ("num_hidden_layers", *WIDTHS, "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class PruneSpec:
    """The size of a model after pruning; what is None stays as it is.

    `params_ratio` is met with what the other fields leave free, width before depth, as Minitron recommends
    (arXiv:2407.14679): first the MLP alone is cut, down to half its width; where that is not enough, the hidden width
    with it, down to half; only then layers, down to half. Of all MLP widths on the grid of `round_to` the one that
    comes nearest is taken. Heads are cut only where they are given. `PruneReport.spec` holds the concrete result.

    Cut at most a third of the parameters at a time, with distillation between the cuts.

    Args:
        num_hidden_layers: Depth; the layers of the highest scores stay.
        drop_layers: Layers to leave out instead, from 0.
        intermediate_size: Neurons of each MLP, whatever the config of the family calls them.
        num_attention_heads: Query heads of each layer. Where they share keys and values, every group that is kept
            loses as many of them.
        num_key_value_heads: Heads of keys and values: whole groups are cut.
        hidden_size: Channels of the residual stream, the same in all layers.
        params_ratio: Parameters after over parameters before, tied ones counted once.
        round_to: `intermediate_size` and `hidden_size` are rounded to the nearest multiple of this, which kernels and
            4-bit formats want. A width that stays as it is is not rounded.

    Raises:
        ValueError: Nothing is asked for, or a number is out of its range.

    Example:
        >>> PruneSpec(intermediate_size=1024, num_hidden_layers=24)
        >>> PruneSpec(params_ratio=0.7)
    """

    num_hidden_layers: int | None = None
    drop_layers: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    hidden_size: int | None = None
    params_ratio: float | None = None
    round_to: int = 64

    def __post_init__(self) -> None:
        if self.drop_layers is not None:
            layers = self.drop_layers
            if not isinstance(layers, list | tuple | range) or not all(_is_whole(layer) for layer in layers):
                raise ValueError(f"`drop_layers` is {layers!r}; expected numbers of layers from 0, such as [3, 4].")
            object.__setattr__(self, "drop_layers", tuple(sorted(self.drop_layers)))
            if len(set(self.drop_layers)) < len(self.drop_layers):
                raise ValueError(f"`drop_layers` is {list(self.drop_layers)}; expected every layer once.")
        for name in (*COUNTS, "round_to"):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 1):
                raise ValueError(f"`{name}` is {value!r}; expected a whole number >= 1.")
        ratio = self.params_ratio
        if ratio is not None and (not isinstance(ratio, int | float) or not 0 < ratio < 1):
            raise ValueError(f"`params_ratio` is {ratio!r}; expected a share between 0 and 1, such as 0.7.")
        if all(getattr(self, name) is None for name in (*COUNTS, "drop_layers", "params_ratio")):
            raise ValueError("The spec asks for nothing; give a size, for example `PruneSpec(params_ratio=0.7)`.")

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that ask for something."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "round_to"}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; `PruneSpec(**fields)` reads them."""
        fields = asdict(self)
        return fields | {"drop_layers": None if self.drop_layers is None else list(self.drop_layers)}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
