"""What was cut from a model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_distill.students.spec import PruneSpec
from hf_distill.students.surgery import origin


Indices = tuple[int, ...]
PER_LAYER = ("neurons", "heads", "kv_heads")


@dataclass(frozen=True)
class PruneReport:
    """What stays of a model, counted in the model that was cut and increasing; None where everything stays.

    Args:
        spec: What was asked for, with every size made concrete.
        num_layers_before: Depth of the model that was cut.
        hidden_size_before: Its hidden width.
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
    num_layers_before: int
    hidden_size_before: int
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

    @property
    def origin(self) -> dict[str, Any]:
        """What `config.hf_distill` of the result says."""
        return origin(self.layers, self.num_layers_before, self.channels, self.hidden_size_before)

    def after(self, earlier: PruneReport) -> PruneReport:
        """The report of two cuts, counted in the model before the first: for pruning in steps.

        `student.config.hf_distill = report.after(earlier).origin` makes objectives on hidden states compare a student
        that was cut twice with the first model instead of the one between.

        Args:
            earlier: The report of the cut that made the model that this one was made of.

        Raises:
            ValueError: The reports do not follow each other.
        """
        if (self.parameters_before, self.num_layers_before) != (earlier.parameters_after, len(earlier.layers)):
            raise ValueError(
                f"The earlier cut left {earlier.parameters_after} parameters in {len(earlier.layers)} layers, but "
                f"this began with {self.parameters_before} in {self.num_layers_before}; give the reports of two "
                "cuts in their order."
            )
        joined: dict[str, Any] = {
            name: _joined_rows(getattr(earlier, name), getattr(self, name), self.layers) for name in PER_LAYER
        }
        methods = {
            name: "; then ".join(r.provenance[name] for r in (earlier, self) if name in r.provenance)
            for name in earlier.provenance | self.provenance
        }
        return replace(
            self,
            spec=replace(self.spec, drop_layers=None),
            num_layers_before=earlier.num_layers_before,
            hidden_size_before=earlier.hidden_size_before,
            layers=tuple(earlier.layers[layer] for layer in self.layers),
            channels=_joined(earlier.channels, self.channels),
            parameters_before=earlier.parameters_before,
            bytes_before=earlier.bytes_before,
            provenance=methods,
            **joined,
        )

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


def _joined(first: Indices | None, then: Indices | None) -> Indices | None:
    """The indices of a second choice in what the first was made from."""
    if first is None or then is None:
        return then if first is None else first
    return tuple(first[index] for index in then)


def _joined_rows(
    first: tuple[Indices, ...] | None, then: tuple[Indices, ...] | None, layers: Indices
) -> tuple[Indices | None, ...] | None:
    """The same for the rows of layers; those of the first choice are in the order of the layers before the second."""
    if first is None and then is None:
        return None
    return tuple(
        _joined(None if first is None else first[layer], None if then is None else then[position])
        for position, layer in enumerate(layers)
    )


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
