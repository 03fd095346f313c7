"""Divergences of a tile of the student's logits from sparse targets: `[n, K + 1]` numbers in place of `[n, V]`.

Two estimators, with q the student's distribution and p the teacher's, both over the shared vocabulary:

- The bucket: both distributions are reduced to K + 1 outcomes, the ids and everything else, and go through the same
  closed forms as whole ones. By the data processing inequality the value is at most that over the vocabulary. A pull w
  on the bucket pulls each token v in it by `w * q(v) / q(bucket)`.
- Sampled masses m, for what is linear in p: `-sum(m * log q)` is right on average, and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hf_distill.functional.closed_forms import Result, Tile
from hf_distill.functional.registry import BoundDivergence, resolve_divergence
from hf_distill.functional.softmax import Softmax
from hf_distill.functional.sparse import SparseLogits


class SparseTeacher:
    """Sparse targets of a chunk of rows, brought to each temperature once.

    Ids beyond the shared vocabulary are dropped as a teacher's logits there are: what is left of p is scaled up to 1.
    Sampled masses are not, since an estimate of that factor would bias them; it is 1 but for padding.

    Args:
        targets: Of the chunk.
        shared: How many tokens of the vocabulary student and teacher share.
        like: A tensor with the dtype and the device of the statistics.
    """

    def __init__(self, targets: SparseLogits, shared: int, like: Tensor) -> None:
        self.targets = targets.to(like)
        self.shared = shared
        self._limits = torch.finfo(like.dtype)
        self.known = self.targets.known & (self.targets.ids >= 0) & (self.targets.ids < shared)
        self.ids = self.targets.ids.clamp(0, shared - 1)
        self._outcomes: dict[float, tuple[Tensor, Tensor]] = {}
        self._masses: dict[float, Tensor] = {}

    def outcomes(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and probabilities of the ids and the bucket, `[N, K + 1]` each; finite, and 0 if unused.

        They are scaled to add up to 1, which stored ones may not. The bucket is empty where the ids are the whole
        vocabulary, and otherwise at least what rounding leaves of 1, where its mass was not kept.
        """
        if temperature not in self._outcomes:
            limits = self._limits
            log_probs = self.targets.log_probs_at(temperature)
            log_rest = self.targets.log_rest_at(temperature)
            inside = log_probs.where(self.known, limits.min)
            if log_rest is None:
                log_rest = (1 - log_probs.exp().sum(1)).clamp(min=limits.eps).log()
            log_rest = log_rest.where(self.known.sum(1) < self.shared, limits.min).clamp(min=limits.min)
            log_p = torch.log_softmax(torch.cat([inside, log_rest[:, None]], 1), 1).clamp_(min=limits.min)
            self._outcomes[temperature] = log_p, log_p.exp()
        return self._outcomes[temperature]

    def masses(self, temperature: float) -> Tensor:
        """Sampled masses of the ids, `[N, K]`, 0 where unused."""
        if temperature not in self._masses:
            self._masses[temperature] = self.targets.masses_at(temperature).where(self.known, 0.0)
        return self._masses[temperature]


class SparseBlock:
    """The teacher's side of a block of rows: some of the rows of a `SparseTeacher`."""

    def __init__(self, teacher: SparseTeacher, part: slice) -> None:
        self.teacher = teacher
        self.part = part
        self.ids = teacher.ids[part]
        self.known = teacher.known[part]

    def top(self) -> Tensor:
        """The most likely token `[n]`."""
        log_p, _ = self.teacher.outcomes(1.0)
        return self.ids.gather(1, log_p[self.part, :-1].argmax(1, keepdim=True)).squeeze(1)

    def metrics(self, names: Sequence[str], labels: Tensor) -> dict[str, Tensor]:
        """What does not depend on the student, `[n]` by name."""
        targets, part = self.teacher.targets, self.part
        return {"teacher_nll": -targets.label_log_probs[part], "teacher_entropy": targets.entropy_at(1.0)[part]}

    def compare(self, student: Softmax, temperature: float) -> SparseTile:
        """Both distributions at a temperature; the student's is `[n, V]` over the shared vocabulary."""
        return SparseTile(self, student, temperature)


class SparseTile:
    """Both distributions of a block of rows, with the methods of `Tile` that the loss calls.

    Args:
        block: The teacher's side.
        student: Its distribution, `[n, V]`; `complete_` overwrites its probabilities.
        temperature: Of both sides.
    """

    def __init__(self, block: SparseBlock, student: Softmax, temperature: float) -> None:
        self.student = student
        self.q = student.probs
        self.noted: dict[str, Tensor] = {}
        self._block = block
        self._temperature = temperature
        self._log_q_known = student.log_prob(block.ids)
        self._q_known = self.q.gather(1, block.ids).where(block.known, 0.0)
        self._pull: Tensor | None = None
        self._pulls_bucket = False

    @property
    def forward_kl(self) -> Tensor:
        """KL(p || q) of the bucket, or estimated from sampled masses, `[n]`."""
        return self.evaluate(resolve_divergence("forward_kl"), None, 0.0)[0]

    def evaluate(self, divergence: BoundDivergence, pull: Tensor | None, factor: float) -> Result:
        """The value of a divergence, and the row sums of its pull, which is kept for `complete_`."""
        teacher, part = self._block.teacher, self._block.part
        if pull is not None and self._pull is None:
            self._pull = self.q.new_zeros(len(self.q), self._block.ids.shape[1] + 1)
        wanted = None if pull is None else self._pull
        from_cross_entropy = divergence.divergence.from_cross_entropy
        if teacher.targets.masses is None or from_cross_entropy is None:
            self._pulls_bucket |= wanted is not None
            return divergence.in_closed_form(self._bucket, wanted, factor)
        masses = teacher.masses(self._temperature)[part]
        if wanted is not None:
            wanted[:, :-1].sub_(masses, alpha=factor)
        cross_entropy = -torch.linalg.vecdot(masses, self._log_q_known)
        entropy = teacher.targets.entropy_at(self._temperature)[part]
        return from_cross_entropy(cross_entropy, entropy), -factor * masses.sum(1)

    def complete_(self, pull: Tensor, row_sum: Tensor) -> None:
        """Turn `pull` `[n, V]` into the gradient, given the row sums of all pulls, `[n, 1]` or one number."""
        if self._pull is None:
            pull.addcmul_(self.q, row_sum, value=-1)
            return
        slope = -row_sum
        if self._pulls_bucket:
            # Below this floor the division could overflow; there the tokens of the bucket get too small a share.
            slope = slope + self._pull[:, -1:] / self._rest.clamp(min=self._floor)
        # The pull of a bucket of next to nothing is steep: it must not touch the ids, not even to be taken back.
        self.q.scatter_add_(1, self._block.ids, -self._q_known)
        pull.addcmul_(self.q, slope)
        pull.scatter_add_(1, self._block.ids, self._pull[:, :-1] - self._q_known * row_sum)

    @property
    def _floor(self) -> float:
        limits = torch.finfo(self.q.dtype)
        return limits.tiny / limits.eps

    @cached_property
    def _rest(self) -> Tensor:
        """The student's mass beyond the ids, `[n, 1]`: summed, as 1 less the others would be rounding where small."""
        self.q.scatter_add_(1, self._block.ids, -self._q_known)
        rest = self.q.sum(1, keepdim=True)
        self.q.scatter_add_(1, self._block.ids, self._q_known)
        return rest

    @cached_property
    def _bucket(self) -> Tile:
        """Both distributions over the ids and the bucket, `[n, K + 1]`."""
        log_p, p = self._block.teacher.outcomes(self._temperature)
        log_rest = self._rest.clamp(min=self._floor).log()
        return Tile(
            Softmax.of(torch.cat([self._log_q_known, log_rest], 1), torch.cat([self._q_known, self._rest], 1)),
            Softmax.of(log_p[self._block.part], p[self._block.part]),
            spare=lambda _: torch.empty_like(p[self._block.part]),
        )
