"""What is known of a teacher's distribution at a few ids per token, instead of its logits over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from hf_distill.functional.recipe import Recipe


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
        log_rests: By temperature `[N]`: the logarithm of the mass of all tokens but the ids. Where it is missing, the
            mass is 1 less that of the ids, of which rounding leaves nothing below 1e-7 in fp32, and below its own
            steps where log-probabilities were stored in fewer bits: reverse KL then is too low for sure teachers.

    Raises:
        ValueError: Neither `log_probs` nor `masses` is given, a shape is not that of `ids`, or the entropy at T = 1 is
            missing.
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
    log_rests: Mapping[float, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.log_probs is None and self.masses is None:
            raise ValueError("Both `log_probs` and `masses` are None; expected at least one of them, [N, K].")
        for name in ("log_probs", "masses"):
            values = getattr(self, name)
            if values is not None and values.shape != self.ids.shape:
                raise ValueError(f"`{name}` must be {list(self.ids.shape)} like `ids`, got {list(values.shape)}.")
        if _key_near(self.entropies, 1.0) is None:
            raise ValueError(f"`entropies` must hold that at temperature 1.0, got those at {sorted(self.entropies)}.")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def known(self) -> Tensor:
        """Which slots are used, `[N, K]` bool."""
        if self.log_probs is not None:
            return self.log_probs > -math.inf
        assert self.masses is not None
        return self.masses > 0

    @property
    def available_metrics(self) -> frozenset[str]:
        """The teacher's metrics that `linear_distillation_loss` can compute from these targets."""
        top = {"top1_agreement"} if self.knows_top and self.log_probs is not None else set()
        return frozenset({"teacher_nll", "teacher_entropy", "kl"} | top)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures to which the distribution can be brought."""
        if self.log_probs is None:
            return (1.0,)
        needed = [self.log_normalisers] + ([] if self.masses is None else [self.entropies])
        declared = (t for t in self.log_normalisers if all(_key_near(values, t) is not None for values in needed))
        return tuple(sorted({1.0, *declared}))

    def log_probs_at(self, temperature: float) -> Tensor:
        """Log-probabilities of the ids at one of `temperatures`, `[N, K]`, -inf in unused slots."""
        assert self.log_probs is not None
        key = _key_near(self.log_normalisers, temperature)
        if key is None or key == 1.0:
            return self.log_probs
        return self.log_probs / key - self.log_normalisers[key][:, None]

    def log_rest_at(self, temperature: float) -> Tensor | None:
        """The logarithm of the mass beyond the ids, `[N]`, or None where it was not kept."""
        key = _key_near(self.log_rests, temperature)
        return None if key is None else self.log_rests[key]

    def masses_at(self, temperature: float) -> Tensor:
        """An estimate, as `masses`, of p at one of `temperatures`, `[N, K]`; unused slots may hold anything."""
        assert self.masses is not None
        if _key_near({1.0}, temperature) is not None:
            return self.masses
        assert self.log_probs is not None
        return self.masses * (self.log_probs_at(temperature) - self.log_probs).exp()

    def entropy_at(self, temperature: float) -> Tensor:
        """The entropy at a temperature, `[N]`."""
        key = _key_near(self.entropies, temperature)
        assert key is not None
        return self.entropies[key]

    def at(self, index: Tensor | slice) -> SparseLogits:
        """Keep some tokens: their numbers `[M]` int64, or a slice."""
        if isinstance(index, Tensor):
            index = index.to(self.ids.device)
        return self._map(lambda values: values[index])

    def to(self, like: Tensor) -> SparseLogits:
        """The same on the device of a floating tensor, numbers that are not integers in its dtype."""
        return self._map(lambda values: values.to(like.device, like.dtype if values.is_floating_point() else None))

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseLogits:
        return replace(
            self,
            ids=function(self.ids),
            log_probs=None if self.log_probs is None else function(self.log_probs),
            masses=None if self.masses is None else function(self.masses),
            log_normalisers={t: function(values) for t, values in self.log_normalisers.items()},
            entropies={t: function(values) for t, values in self.entropies.items()},
            labels=function(self.labels),
            label_log_probs=function(self.label_log_probs),
            log_rests={t: function(values) for t, values in self.log_rests.items()},
        )


def _key_near(temperatures: Iterable[float], temperature: float) -> float | None:
    """The one that is `temperature` but for rounding, or None."""
    return next((known for known in temperatures if math.isclose(known, temperature, rel_tol=1e-6)), None)


def check_targets(targets: SparseLogits, recipe: Recipe) -> None:
    """Check that terms and metrics can be computed from sparse targets.

    Raises:
        ValueError: A divergence needs more of the teacher than was kept, or the temperature or a metric is not among
            what was kept.
    """
    for bound in recipe.divergences:
        name = bound.divergence.name
        if bound.divergence.whole_vocabulary:
            raise ValueError(
                f"The divergence {name!r} looks at every probability of the teacher, and `teacher_targets` knows a "
                "few; use another divergence, e.g. 'forward_kl', or a teacher that gives hidden states."
            )
        if targets.log_probs is None and bound.divergence.from_cross_entropy is None:
            raise ValueError(
                f"The divergence {name!r} needs `log_probs`, and `teacher_targets` has sampled masses only; use "
                "'forward_kl', or keep the log-probabilities of the ids too."
            )
    temperature = recipe.temperature
    if recipe.divergences and _key_near(targets.temperatures, temperature) is None:
        fix = (
            f"give `log_normalisers` (and for sampled masses `entropies`) at {temperature:g}, too."
            if targets.log_probs is not None
            else "sampled masses hold at T = 1: set temperature=1.0, or keep the log-probabilities of the ids too."
        )
        raise ValueError(
            f"`temperature` is {temperature:g}, and `teacher_targets` declares {list(targets.temperatures)}; {fix}"
        )
    if missing := sorted(set(recipe.teacher_metrics) - targets.available_metrics):
        raise ValueError(
            f"`metrics` asks for {missing}, which `teacher_targets` cannot tell; it gives "
            f"{sorted(targets.available_metrics)}: leave the others out."
        )
