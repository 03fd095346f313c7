"""How much larger a teacher should be than its student, and what to do where it is far larger.

Source: capacity gap law, arXiv 2311.07052; its 2.5 was verified by distilling 7 B into 3 B parameters. It is advice,
not a limit.
"""

from __future__ import annotations

from collections.abc import Mapping


# The best teacher is about 2.5 times the student (2.498 S - 11.498, in millions).
BEST_RATIO = 2.5
WIDE_RATIO = 10


def gap_note(
    teacher: int, student: int, *, teacher_cached: bool = False, candidates: Mapping[str, int] | None = None
) -> str | None:
    """What to do about a wide gap; None where the teacher is at most 10 times the student.

    Args:
        teacher: Parameters.
        student: Parameters.
        teacher_cached: Whether the teacher's soft labels come from disk, which TAID cannot use.
        candidates: Parameters by name of models that could stand between the two.
    """
    ratio, best = teacher / student, BEST_RATIO * student
    if ratio <= WIDE_RATIO:
        return None
    between = {name: size for name, size in (candidates or {}).items() if student < size < teacher}
    if between:
        name = min(between, key=lambda name: abs(between[name] - best))
        proposal = f"{name} ({count_text(between[name])}, {between[name] / student:.1f} times the student)"
    else:
        none = " (none of the candidates is between the two)" if candidates else ""
        proposal = f"a model of the same family with about {count_text(best)} parameters{none}"
    live = "; it needs the teacher itself, not soft labels from disk" if teacher_cached else ""
    return (
        f"the teacher has {ratio:.1f} times the parameters of the student, and the capacity gap law (arXiv "
        f"2311.07052) finds the best teacher near {BEST_RATIO} times. Either distil in two steps (teacher "
        f"assistant, arXiv 1902.03393): the teacher into {proposal}, then that one into the student with "
        f"`--teacher_model_name_or_path FOLDER`. Or move the target from the student's own distribution to the "
        f"teacher's (TAID, arXiv 2501.16937): `--divergence taid`{live}. Compare both with the plain run: the law is "
        "an average."
    )


def count_text(number: float) -> str:
    """A count of parameters with three or four digits."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"
