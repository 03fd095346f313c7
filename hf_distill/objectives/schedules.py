"""Numbers that change with the progress of a run: weights and temperatures of objectives."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Schedule:
    """A value for every progress from 0 (the first step) to 1 (the last), interpolated between points.

    It has no state: a resumed run goes on where it was.

    Args:
        points: (progress, value), at least one, by increasing progress; constant before the first and after the last.
        cosine: Go from point to point along half a cosine, which starts and ends flat, instead of a straight line.

    Raises:
        ValueError: There are no points, progress does not increase or lies outside 0 to 1, or a value is not finite.
    """

    points: tuple[tuple[float, float], ...]
    cosine: bool = False

    def __post_init__(self) -> None:
        where = [progress for progress, _ in self.points]
        increasing = all(a < b for a, b in pairwise(where))
        inside = bool(where) and min(where) >= 0 and max(where) <= 1
        if not (increasing and inside and all(math.isfinite(value) for _, value in self.points)):
            raise ValueError(
                f"A schedule has points {list(self.points)}; expected (progress, value) pairs by increasing progress "
                "from 0 to 1, for example `piecewise([(0.0, 0.0), (0.1, 1.0)])`."
            )

    def __call__(self, progress: float) -> float:
        """The value at a progress from 0 to 1."""
        after = bisect_right([where for where, _ in self.points], progress)
        if after in (0, len(self.points)):
            return float(self.points[min(after, len(self.points) - 1)][1])
        (start, low), (end, high) = self.points[after - 1], self.points[after]
        share = (progress - start) / (end - start)
        if self.cosine:
            share = (1 - math.cos(math.pi * share)) / 2
        return float(low + share * (high - low))

    def __str__(self) -> str:
        steps = " to ".join(f"{value:g} at {progress:.0%}" for progress, value in self.points)
        return f"{steps} ({'cosine' if self.cosine else 'linear'})"


def linear(start: float, end: float) -> Schedule:
    """From one value to another over the whole run."""
    return Schedule(((0.0, start), (1.0, end)))


def cosine(start: float, end: float) -> Schedule:
    """From one value to another over the whole run, along half a cosine."""
    return Schedule(((0.0, start), (1.0, end)), cosine=True)


def warmup(value: float, share: float) -> Schedule:
    """From 0 to a value over the first share of the run, then constant."""
    return Schedule(((0.0, 0.0), (share, value)))


def piecewise(points: Sequence[Sequence[float]]) -> Schedule:
    """Straight lines between (progress, value) points."""
    return Schedule(tuple((float(progress), float(value)) for progress, value in points))


class Scheduled:
    """A number or a schedule, with its value now.

    Args:
        given: What the user passed.
    """

    def __init__(self, given: float | Schedule) -> None:
        self.schedule = given if isinstance(given, Schedule) else None
        self.value = given(0.0) if isinstance(given, Schedule) else float(given)

    def values(self) -> list[float]:
        """The numbers between which it stays, to be checked before a run."""
        return [value for _, value in self.schedule.points] if self.schedule else [self.value]

    def move(self, progress: float) -> None:
        """Take the value of a progress from 0 to 1."""
        if self.schedule is not None:
            self.value = self.schedule(progress)

    @property
    def shown(self) -> float | str:
        """What a card says: the number, or the schedule in words."""
        return str(self.schedule) if self.schedule else self.value
