"""What is known of a teacher's distribution at a few ids per token, instead of its logits over the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class SparseLogits:
    """A teacher's next-token distribution at K ids per token, and exact facts about the rest.

    With l the log-probabilities at T = 1, those at a temperature are `l / T - log_normalisers[T]`.

    Args:
        ids: `[N, K]` int64, distinct within a row but for unused slots, which hold any id.
        log_probs: `[N, K]`, l at the ids, -inf in unused slots; None where only `masses` were kept.
        masses: `[N, K]`, an estimate of p at T = 1 whose mean over its sampling is p at every id of the vocabulary (0
            in unused slots); None where the ids are simply the most likely ones.
        log_normalisers: By temperature `[N]`: `logsumexp(l / T)` over the whole vocabulary; 0 at T = 1.
        entropies: By temperature `[N]`, in nats; T = 1 is always there.
        labels: `[N]` int64, the token that followed.
        label_log_probs: `[N]`, l of it.
        vocab_size: Columns that the teacher's logits had.
        knows_top: Whether the teacher's most likely token is always among the ids.
    """

    ids: Tensor
    log_probs: Tensor | None
    masses: Tensor | None
    log_normalisers: Mapping[float, Tensor]
    entropies: Mapping[float, Tensor]
    labels: Tensor
    label_log_probs: Tensor
    vocab_size: int
    knows_top: bool = True

    def __len__(self) -> int:
        return self.ids.shape[0]

    def at(self, index: Tensor | slice) -> SparseLogits:
        """Keep some tokens: their numbers `[M]` int64, or a slice."""
        return replace(
            self,
            ids=self.ids[index],
            log_probs=None if self.log_probs is None else self.log_probs[index],
            masses=None if self.masses is None else self.masses[index],
            log_normalisers={t: values[index] for t, values in self.log_normalisers.items()},
            entropies={t: values[index] for t, values in self.entropies.items()},
            labels=self.labels[index],
            label_log_probs=self.label_log_probs[index],
        )
