"""The one registry of divergences: add a row here, and the trainers, the fused loss and the tests know it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_distill.functional import closed_forms
from hf_distill.functional.closed_forms import Tile
from hf_distill.functional.divergences import (
    adaptive_kl,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    symmetric_kl,
    taid,
    tvd,
)


@dataclass(frozen=True)
class Interval:
    """Allowed values of a keyword argument: from `low` to `high`, the ends included unless said otherwise."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


@dataclass(frozen=True)
class Divergence:
    """A row of the registry.

    Args:
        function: Logits to per-token values.
        closed_form: The same value with its gradient written out, for a tile of logits in the fused loss.
        paper: Where it comes from, as an arXiv id.
        parameters: Keyword arguments besides `temperature`, each with its allowed values.
        scales_with_temperature: Whether the term is multiplied by T^2, so that its gradient keeps its size as T grows.
        from_cross_entropy: The value from `-sum p log q` and the entropy of p, for those divergences that are no more
            than that: an estimate of p that is right on average gives a value and a gradient that are.
        whole_vocabulary: Whether its target or its weights are made from every p(v), so that adding some of them up
            makes it another loss, not a lower bound of itself.
    """

    function: Callable[..., Tensor]
    closed_form: Callable[..., tuple[Tensor, Tensor | float]]
    paper: str
    parameters: Mapping[str, Interval] = field(default_factory=dict)
    scales_with_temperature: bool = True
    from_cross_entropy: Callable[[Tensor, Tensor], Tensor] | None = None
    whole_vocabulary: bool = False

    @property
    def name(self) -> str:
        """The name under which users ask for it."""
        return self.function.__name__

    @property
    def defaults(self) -> dict[str, float]:
        """Defaults of `parameters`; one without default (TAID's t) is missing and must be given."""
        given: dict[str, float] = self.function.__kwdefaults__ or {}
        return {name: given[name] for name in self.parameters if name in given}


@dataclass(frozen=True)
class BoundDivergence:
    """A divergence with checked keyword arguments. Call it with `(student_logits, teacher_logits, temperature)`."""

    divergence: Divergence
    kwargs: Mapping[str, float]

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """One value per token, see the function itself."""
        return self.divergence.function(student_logits, teacher_logits, temperature=temperature, **self.kwargs)

    def in_closed_form(self, tile: Tile, pull: Tensor | None, factor: float) -> tuple[Tensor, Tensor | float]:
        """The same value from a tile, its gradient added to `pull`, see `closed_forms`."""
        return self.divergence.closed_form(tile, pull, factor, **self.kwargs)

    def scale(self, temperature: float) -> float:
        """The factor of the term in a loss: T^2, or 1 for divergences whose gradient does not shrink with T."""
        return temperature**2 if self.divergence.scales_with_temperature else 1.0


_UNIT = Interval(0, 1)
_SKEW = Interval(0, 1, open_high=True)
DIVERGENCES: dict[str, Divergence] = {
    row.name: row
    for row in (
        Divergence(forward_kl, closed_forms.forward_kl, paper="1503.02531", from_cross_entropy=torch.sub),
        Divergence(reverse_kl, closed_forms.reverse_kl, paper="2306.08543"),
        Divergence(symmetric_kl, closed_forms.symmetric_kl, paper="2402.03898", parameters={"weight": _UNIT}),
        Divergence(
            jsd,
            closed_forms.jsd,
            paper="2306.13649",
            parameters={"beta": Interval(0, 1, open_low=True, open_high=True)},
        ),
        Divergence(skew_kl, closed_forms.skew_kl, paper="2402.03898", parameters={"skew": _SKEW}),
        Divergence(skew_reverse_kl, closed_forms.skew_reverse_kl, paper="2402.03898", parameters={"skew": _SKEW}),
        Divergence(
            adaptive_kl,
            closed_forms.adaptive_kl,
            paper="2404.02657",
            parameters={"mass": _UNIT},
            whole_vocabulary=True,
        ),
        Divergence(tvd, closed_forms.tvd, paper="2307.15190", scales_with_temperature=False),
        Divergence(
            soft_cross_entropy,
            closed_forms.soft_cross_entropy,
            paper="1503.02531",
            from_cross_entropy=lambda cross_entropy, _: cross_entropy,
        ),
        Divergence(taid, closed_forms.taid, paper="2501.16937", parameters={"t": _UNIT}, whole_vocabulary=True),
    )
}


def unknown_name(what: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in `known`, with the names that are near it."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return ValueError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")


def resolve_divergence(name: str, kwargs: Mapping[str, Any] | None = None) -> BoundDivergence:
    """Look up a divergence and check its keyword arguments.

    Args:
        name: A key of `DIVERGENCES`.
        kwargs: Its own keyword arguments, e.g. `{"beta": 0.1}` for `jsd`; those left out take their defaults.

    Raises:
        ValueError: For an unknown name or keyword argument (with near names), a missing one, or one out of range.
    """
    if name not in DIVERGENCES:
        raise unknown_name("divergence", name, DIVERGENCES)
    divergence = DIVERGENCES[name]
    values = {**divergence.defaults, **(kwargs or {})}
    for key, value in values.items():
        if key not in divergence.parameters:
            raise unknown_name(f"keyword argument of the divergence {name!r}:", key, divergence.parameters)
        allowed = divergence.parameters[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in allowed:
            raise ValueError(f"`{key}` of the divergence {name!r} must be a number in {allowed}, got {value!r}.")
    if missing := divergence.parameters.keys() - values.keys():
        raise ValueError(
            f"The divergence {name!r} needs `{min(missing)}`, a number in {divergence.parameters[min(missing)]}: "
            f"pass e.g. {{{min(missing)!r}: 0.5}} as its keyword arguments."
        )
    return BoundDivergence(divergence, values)
