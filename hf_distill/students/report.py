"""What was cut from a model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_distill.students.spec import PruneSpec


Indices = tuple[int, ...]


@dataclass(frozen=True)
class PruneReport:
    """What stays of a model, counted in the model that was cut and increasing; None where everything stays.

    Args:
        spec: What was asked for, with every size made concrete.
        layers: Layers.
        neurons: Neurons of each layer that stays.
        heads: Query heads of each layer that stays.
        kv_heads: Heads of keys and values of each layer that stays.
        channels: Channels of the residual stream.
        parameters_before: Parameters, tied ones once.
        parameters_after: The same of the result.
        bytes_before: Bytes of the tensors that `save_pretrained` writes, tied ones once.
        bytes_after: The same of the result.
        provenance: What was cut -> how the choice was made.
    """

    spec: PruneSpec
    layers: Indices
    neurons: tuple[Indices, ...] | None
    heads: tuple[Indices, ...] | None
    kv_heads: tuple[Indices, ...] | None
    channels: Indices | None
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    provenance: dict[str, str]

    @property
    def params_ratio(self) -> float:
        """The share of the parameters that stays."""
        return self.parameters_after / self.parameters_before

    @property
    def layer_map(self) -> dict[int, int]:
        """Layer of the result -> the layer it was copied from, both from 0."""
        return dict(enumerate(self.layers))

    @property
    def channel_map(self) -> dict[int, int] | None:
        """Channel of the result -> the channel it was; None where all stay."""
        return None if self.channels is None else dict(enumerate(self.channels))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self) | {"spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PruneReport:
        """The opposite of `to_dict`, also after JSON, which knows lists only."""
        values = {name: _as_tuples(value) for name, value in fields.items()}
        return cls(**(values | {"spec": PruneSpec(**fields["spec"])}))

    def save(self, path: str | Path) -> None:
        """Write a JSON file; it appears complete or not at all."""
        path = Path(path)
        unfinished = path.with_name(f".{path.name}.unfinished")
        unfinished.write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | Path) -> PruneReport:
        """Read what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
