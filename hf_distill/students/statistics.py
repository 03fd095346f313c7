"""Statistics from which units are scored, each taken where the values pass and added up in fp32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_distill.signals import rows_of
from hf_distill.students.calibration import Sequences


@dataclass(frozen=True)
class Units:
    """Units of one kind, and the values that belong to them.

    Args:
        modules: By row of the scores the modules whose values hold its units: one for each layer, or all norms.
        reads_input: Whether the values are what enters the modules, or what leaves them.
        width: How many neighbouring channels of the values are one unit: the width of a head, or 1.
    """

    modules: Sequence[Sequence[nn.Module]]
    reads_input: bool = True
    width: int = 1


class Statistic(ABC):
    """Something that is added up over the batches of one pass.

    A batch is announced by `begin`, its values are seen by hooks, and `end` takes what was gathered.

    Attributes:
        needs_gradient: Whether it sees the gradient of the loss too.
    """

    needs_gradient = False

    def __init__(self) -> None:
        self._batch: Sequences | None = None

    def begin(self, batch: Sequences) -> None:
        """Know the sequences of the batch that comes next."""
        self._batch = batch

    def end(self) -> None:
        """Add what was gathered of this batch to the whole."""
        self._batch = None

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Hear the values that pass from now on, until the handles are removed."""

    @abstractmethod
    def scores(self) -> Tensor:
        """What came out."""

    @property
    def _sequences(self) -> Sequences:
        assert self._batch is not None
        return self._batch


class ChannelStatistic(Statistic):
    """A statistic of the channels that enter or leave some modules."""

    def __init__(self, units: Units) -> None:
        super().__init__()
        self._units = units

    def attach(self) -> list[RemovableHandle]:
        """See `Statistic.attach`."""
        handles = []
        places = [(row, module) for row, modules in enumerate(self._units.modules) for module in modules]
        for place, (row, module) in enumerate(places):
            if self._units.reads_input:
                handles.append(module.register_forward_pre_hook(partial(self._before, place, row)))
            else:
                handles.append(module.register_forward_hook(partial(self._after, place, row)))
        return handles

    def _before(self, place: int, row: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._see(place, row, args[0])

    def _after(self, place: int, row: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._see(place, row, output)

    @abstractmethod
    def _see(self, place: int, row: int, values: Tensor) -> None:
        """Take values `[..., C]` of one module, the `place`th of all, which belong to a row of the scores."""


class MeanActivation(ChannelStatistic):
    """Minitron's: the mean of |a| over the tokens of a sequence, squared and added up over sequences; its root.

    Channels of one head are joined by their L2 norm, several modules of one row added up. The mean is over each
    sequence's own real tokens, so it does not matter how sequences are batched and padded. (Minitron's batches hold
    sequences of one length, where it is the same.) Source: Muralidharan et al., arXiv 2407.14679, and the code of
    NVIDIA ModelOpt.
    """

    def __init__(self, units: Units) -> None:
        super().__init__(units)
        self._squares: dict[tuple[int, int], Tensor] = {}

    def _see(self, place: int, row: int, values: Tensor) -> None:
        lengths = self._sequences.lengths.clamp(min=1)[:, None].to(values.device)
        squares = (self._sequences.sum(values.detach().abs()) / lengths).square().sum(0)
        known = self._squares.get((row, place))
        self._squares[row, place] = squares if known is None else known + squares

    def scores(self) -> Tensor:
        """`[rows, units]`."""
        rows = []
        for row in range(len(self._units.modules)):
            found = [squares for (its_row, _), squares in self._squares.items() if its_row == row]
            norms = [squares.view(-1, self._units.width).sum(1).sqrt().cpu() for squares in found]
            rows.append(torch.stack(norms).sum(0))
        return torch.stack(rows)


class FirstOrder(ChannelStatistic):
    """What the loss says of a gate of value 1 on each unit: the gradient of the gate is the sum of a * dL/da.

    The sum goes over the tokens of one sequence and over the channels of one unit. `taylor` is the mean over sequences
    of its absolute value (Molchanov et al., arXiv 1906.10771; Michel et al., arXiv 1905.10650), `fisher` the mean of
    its square, the diagonal of the empirical Fisher information of the gates (Kwon et al., arXiv 2204.09656).
    """

    needs_gradient = True

    def __init__(self, units: Units, method: str) -> None:
        super().__init__(units)
        self._method = method
        self._gates: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._count = 0

    def _see(self, place: int, row: int, values: Tensor) -> None:
        kept = values.detach()

        def on_gradient(gradient: Tensor) -> None:
            products = self._sequences.sum(kept.float() * gradient.float())
            gates = products.unflatten(1, (-1, self._units.width)).sum(2)
            self._gates[row] = (
                gates if row not in self._gates else self._gates[row] + gates.to(self._gates[row].device)
            )

        values.register_hook(on_gradient)

    def end(self) -> None:
        """See `Statistic.end`."""
        for row, gates in self._gates.items():
            values = (gates.abs() if self._method == "taylor" else gates.square()).sum(0)
            self._sums[row] = values if row not in self._sums else self._sums[row] + values
        self._gates = {}
        self._count += int((self._sequences.lengths > 0).sum())
        super().end()

    def scores(self) -> Tensor:
        """`[rows, units]`."""
        return torch.stack([self._sums[row].cpu() for row in range(len(self._units.modules))]) / self._count


class BlockInfluence(Statistic):
    """1 - cos of what enters a layer and what leaves it, the mean over real tokens (Men et al., arXiv 2403.03853)."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._layers = layers
        self._sums = [torch.zeros(()) for _ in layers]
        self._tokens = 0

    def attach(self) -> list[RemovableHandle]:
        """See `Statistic.attach`."""
        return [
            layer.register_forward_hook(partial(self._hear, index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]

    def _hear(self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        self._see(index, entered.detach(), (output if isinstance(output, Tensor) else output[0]).detach())

    def _see(self, index: int, entered: Tensor, left: Tensor) -> None:
        before, after = (rows_of(states, self._sequences.index).float() for states in (entered, left))
        self._sums[index] = (
            self._sums[index].to(before.device) + (1 - F.cosine_similarity(before, after, dim=-1)).sum()
        )

    def end(self) -> None:
        """See `Statistic.end`."""
        self._tokens += len(self._sequences.index)
        super().end()

    def scores(self) -> Tensor:
        """`[layers]`."""
        return torch.stack([total.cpu() for total in self._sums]) / self._tokens
