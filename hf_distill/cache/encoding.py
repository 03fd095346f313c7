"""What every encoding of a cache is to its writer and its reader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hf_distill.functional.sparse import SparseLogits
from hf_distill.signals import Projection, Signal


# What is known of N tokens, by name: `[N, ...]` tensors on the CPU. Columns of one encoding have the same names,
# dtypes and shapes but for N, so that those of several shards can be put side by side.
Columns = Mapping[str, Tensor]
# Arrays of a shard, by name, as they are written to disk and mapped from it.
Arrays = Mapping[str, np.ndarray]
# From numbers of tokens of a shard, `[M]` int64 in any order, to their columns.
Decoder = Callable[[np.ndarray], Columns]


class Encoding(ABC):
    """How much of a teacher's next-token distribution is kept, and in which bits.

    The life of a token: `observe` looks at the teacher's output, `pack` makes arrays of the columns of a whole shard,
    `open` gives them back for any of its tokens, and `targets` makes of them what a teacher gives to the trainer.

    Attributes:
        name: What it is called in the manifest and on the command line.
        provides: The signals that a teacher made of it can give.
        samples: Whether `observe` needs a uniform number for each token.
        temperatures: At which its distributions can be read.
    """

    name: ClassVar[str]
    provides: ClassVar[frozenset[Signal]] = frozenset({Signal.LOGITS})
    samples: ClassVar[bool] = False
    temperatures: tuple[float, ...]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values that `encoding_from_config` makes the same encoding of; `name` is one of them."""

    @abstractmethod
    def observe(self, output: Projection, labels: Tensor, uniforms: Tensor | None) -> Columns:
        """Look at the teacher's output at N tokens; logits are never built for all of them at once.

        Args:
            output: What enters the teacher's head, `[N, H]`, and the head.
            labels: The token that followed each, `[N]` int64.
            uniforms: A number in [0, 1) for each token, `[N]` float64, where `samples`; it must decide all of the
                randomness of its token, so that the result depends on neither batches nor ranks.
        """

    @abstractmethod
    def pack(self, columns: Columns) -> Arrays:
        """The arrays of a shard, of the columns of all of its tokens; equal columns give equal bytes."""

    @abstractmethod
    def open(self, arrays: Arrays) -> Decoder:
        """What reads the tokens of a shard."""

    @abstractmethod
    def targets(self, columns: Columns, labels: Tensor) -> SparseLogits | Projection:
        """What a teacher gives of M tokens, on the CPU; the columns may be overwritten.

        Args:
            columns: Of these tokens.
            labels: The tokens that followed them, `[M]`.
        """

    def shared_tensors(self, output: Projection) -> dict[str, Tensor]:
        """What is stored once for the whole cache, such as the teacher's head; `output` is any of its outputs."""
        return {}

    def attach(self, shared: Mapping[str, Tensor]) -> None:  # noqa: B027 # most encodings share nothing
        """Take what `shared_tensors` gave, before `targets` is called."""
