"""The passes over all of a teacher's logits: the greatest of each column of a table, and its mass.

On a CPU the logits of a few rows at a time are read, in the processor's caches: those of bf16 products by one compiled
loop where numba is installed, all others by torch, a pass for each statistic.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache import compiled
from hf_distill.functional.head import LMHead
from hf_distill.functional.softmax import row_dots, statistics_dtype


# Rows of the table that a vocabulary is seen as.
DEPTH = 32
# Stands for the logit of an impossible token, whose probability is 0.
IMPOSSIBLE = -1e30
# Stands behind the vocabulary, where its table is not full: below all others, so that it is never among the greatest.
OUTSIDE = -2e30
# Elements of one of the two buffers of a tile.
_CPU_TILE = 2**19
_DEVICE_TILE = 2**24
# Rows that a thread takes at once in the compiled loop.
_THREAD_ROWS = 8


@dataclass(frozen=True)
class Spread:
    """The distributions of a block of rows at one temperature.

    Args:
        temperature: T.
        masses: What the probabilities of each column of the table add up to, `[n, W]`.
        log_total: `logsumexp(logits / T)`, `[n]`.
        entropy: In nats, `[n]`; None where it was not asked for.
    """

    temperature: float
    masses: Tensor
    log_total: Tensor
    entropy: Tensor | None

    def probs(self, logits: Tensor) -> Tensor:
        """The probabilities of some tokens by their logits, `[n, ...]`."""
        log_total = self.log_total.view(-1, *[1] * (logits.dim() - 1))
        return torch.add(-log_total, logits, alpha=1 / self.temperature).exp_()


class Tiles:
    """Reads all logits of a block, a few rows at a time.

    Args:
        products: Of any block.
        head: What makes logits of them; None where they are.
        temperatures: Of the spreads.
        entropies: Those of them at which the entropy is asked for.
    """

    def __init__(
        self, products: Tensor, head: LMHead | None, temperatures: Sequence[float], entropies: Collection[float]
    ) -> None:
        self._head, self._temperatures, self._entropies = head, temperatures, entropies
        # Products of finite weights are finite.
        self._finite = head is not None and head.bias is None
        self._columns = -(-products.shape[1] // DEPTH)
        self._dtype = statistics_dtype(products.dtype)
        self._loops = compiled.loops() if _are_plain(products, head) else None
        if self._loops is not None:
            self._threads = ThreadPoolExecutor(torch.get_num_threads())
        else:
            width = self._columns * DEPTH
            size = _CPU_TILE if products.device.type == "cpu" else _DEVICE_TILE
            self._logits = products.new_full((max(size // width, 1), width), OUTSIDE, dtype=self._dtype)
            self._spare = torch.empty_like(self._logits)

    def __call__(self, products: Tensor) -> tuple[Tensor, dict[float, Spread]]:
        """The greatest logits of the columns of the table `[n, W]`, and the spreads."""
        tops = products.new_empty(len(products), self._columns, dtype=self._dtype)
        masses = tops.new_empty(len(self._temperatures), *tops.shape)
        means = tops.new_empty(masses.shape[:2])
        read = self._read if self._loops is None else self._read_compiled
        read(products, tops, masses, means)
        spreads = {}
        for number, temperature in enumerate(self._temperatures):
            mean = means[number] if temperature in self._entropies else None
            spreads[temperature] = _spread(temperature, tops, masses[number], mean)
        return tops, spreads

    def _read(self, products: Tensor, tops: Tensor, masses: Tensor, means: Tensor) -> None:
        size = len(self._logits)
        for first in range(0, len(products), size):
            piece = products[first : first + size]
            logits, part = self._logits[: len(piece)], slice(first, first + len(piece))
            finished_(logits[:, : piece.shape[1]].copy_(piece), self._head, finite=self._finite)
            torch.amax(logits.unflatten(1, (DEPTH, -1)), 1, out=tops[part])
            for number, temperature in enumerate(self._temperatures):
                weights = _weights(logits, tops[part], temperature, self._spare[: len(piece)])
                torch.sum(weights.unflatten(1, (DEPTH, -1)), 1, out=masses[number, part])
                if temperature in self._entropies:
                    means[number, part] = row_dots(weights, logits, weights)

    def _read_compiled(self, products: Tensor, tops: Tensor, masses: Tensor, means: Tensor) -> None:
        """What `_read` does, in one loop."""
        assert self._loops is not None
        read_logits = self._loops.read_logits
        words = products.view(torch.int16).numpy().view(np.uint16)
        scales: np.ndarray = np.array([_scale(temperature) for temperature in self._temperatures], np.float32)
        out = tops.numpy(), masses.numpy(), means.numpy()

        def run(start: int) -> None:
            read_logits(words, start, min(start + _THREAD_ROWS, len(words)), scales, *out)

        list(self._threads.map(run, range(0, len(words), _THREAD_ROWS)))


def _are_plain(products: Tensor, head: LMHead | None) -> bool:
    """Whether they are logits, in the precision and the place of the compiled loop."""
    is_finished = head is None or (head.scale == 1.0 and head.softcap is None)
    return is_finished and products.dtype == torch.bfloat16 and products.device.type == "cpu"


def _scale(temperature: float) -> float:
    """Between logits and exponents of 2: exp2 is fast on a CPU, too."""
    return math.log2(math.e) / temperature


def _weights(logits: Tensor, tops: Tensor, temperature: float, out: Tensor) -> Tensor:
    """`exp(logits / T)`, the greatest of a row being 1."""
    scale = _scale(temperature)
    return torch.add(tops.amax(1, keepdim=True).mul_(-scale), logits, alpha=scale, out=out).exp2_()


def _spread(temperature: float, tops: Tensor, masses: Tensor, means: Tensor | None) -> Spread:
    """What masses and mean logits are when the greatest weight is not 1 but its probability."""
    totals = masses.sum(1, keepdim=True)
    log_total = tops.amax(1) / temperature + totals[:, 0].log()
    entropy = None if means is None else log_total - means / totals[:, 0] / temperature
    return Spread(temperature, masses.div_(totals), log_total, entropy)


def finished_(products: Tensor, head: LMHead | None, *, finite: bool = False) -> Tensor:
    """Logits of products `[n, ...]`, in place, those of impossible tokens finite."""
    if finite or head is None or head.softcap is None:
        if head is not None:
            head.finish_(products)
        return products if finite else products.clamp_(min=IMPOSSIBLE)
    impossible = products == -torch.inf  # which a softcap would make possible
    head.finish_(products)
    return products.masked_fill_(impossible, IMPOSSIBLE)
