"""What all encodings have in common: their options, and how they go over a teacher's output."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from hf_distill.cache.encoding import Columns, Encoding
from hf_distill.cache.observe import Block, blocks
from hf_distill.functional.divergences import check_temperature
from hf_distill.functional.fused import vocabulary_of
from hf_distill.signals import Projection


@dataclass(kw_only=True)
class BaseEncoding(Encoding):
    """An encoding whose options are the fields of a dataclass.

    Args:
        vocab_size: Columns of the teacher's logits.
        temperatures: At which its distributions can be read; 1 is added.

    Raises:
        ValueError: `vocab_size` is below 1, or a temperature is not positive.
    """

    vocab_size: int
    temperatures: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        at_least("vocab_size", self.vocab_size, 1)
        for temperature in self.temperatures:
            check_temperature(temperature)
        # 1 comes first: the columns of what is kept by temperature are in this order.
        self.temperatures = (1.0, *sorted({float(temperature) for temperature in self.temperatures} - {1.0}))

    def config(self) -> dict[str, Any]:
        """See `Encoding`."""
        options = {option.name: getattr(self, option.name) for option in fields(self) if option.init}
        return {"name": self.name, **options, "temperatures": list(self.temperatures)}

    def check_output(self, output: Projection) -> None:
        """Check that it is that of a teacher with this vocabulary.

        Raises:
            ValueError: The head gives another number of logits.
        """
        if (width := vocabulary_of(output.head, output.hidden)) != self.vocab_size:
            raise ValueError(
                f"`output` has {width} logits, and the encoding was made for vocab_size={self.vocab_size}; make it "
                f"with vocab_size={width}."
            )


@dataclass(kw_only=True)
class LogitsEncoding(BaseEncoding):
    """An encoding that looks at blocks of logits."""

    def observe(self, output: Projection, labels: Tensor, uniforms: Tensor | None) -> Columns:
        """See `Encoding`.

        Raises:
            ValueError: The vocabulary is another one, or `uniforms` are needed and missing.
        """
        self.check_output(output)
        if self.samples and uniforms is None:
            raise ValueError(
                f"The encoding {self.name!r} draws tokens; give `uniforms`, one for each of {len(labels)}."
            )
        labels = labels.to(output.hidden.device)
        if uniforms is not None:
            uniforms = uniforms.to(output.hidden.device)
        pieces = []
        with torch.no_grad(), torch.autocast(output.hidden.device.type, enabled=False):
            for block in blocks(output, self.temperatures, self.entropies):
                chosen = None if uniforms is None else uniforms[block.part]
                pieces.append(self.look(block, labels[block.part], chosen))
            return {name: torch.cat([piece[name] for piece in pieces]).cpu() for name in pieces[0]}

    @property
    def entropies(self) -> tuple[float, ...]:
        """Temperatures at which the entropy is kept."""
        return self.temperatures

    @abstractmethod
    def look(self, block: Block, labels: Tensor, uniforms: Tensor | None) -> dict[str, Tensor]:
        """The columns of a block of rows, on its device."""


def at_least(name: str, value: int, least: int, most: int | None = None, why: str = "") -> None:
    """Check a whole number.

    Raises:
        ValueError: It is none, or not between `least` and `most`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f">= {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"`{name}` must be a whole number {limits}{why}, got {value!r}.")
