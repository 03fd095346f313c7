"""The failure modes of a distillation: each from numbers, with what to do about it.

Where a rule compares with a threshold, the threshold stands here with its reason; the others compare an interval with
zero or with a guess.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hf_distill.evaluation.bootstrap import Estimate
from hf_distill.evaluation.diagnostics.report import Finding, Measurements


# Above this ratio of parameters the planner warns, too; the capacity gap law (arXiv 2311.07052) puts the best teacher
# near the other. A ratio alone is no failure: the student must have stayed behind.
WIDE_RATIO = 10
BEST_RATIO = 2.5
# With many tokens the interval excludes differences that mean nothing; this one is 5 % of perplexity.
WORSE_BY = 0.05
# A student that keeps nine tenths of what the teacher reads from the context is not held back by its size.
ENOUGH_KEPT = 0.9
# The factor T^2 is there to keep the pull of the term as T grows, and a soft target to say more of the likely tokens.
# Where half of either is lost, the temperature does the opposite. (SmolLM2-135M against itself with noise in its
# weights, T = 1, 1.5, 2, 4: pull 1, .63, .30, .05; on likely tokens .92, .65, .41, .13 of it.)
LEAST_LEFT = 0.5
# A term with less of the gradient than this does not steer the training.
LEAST_SHARE = 0.05


def judge_models(measured: Measurements, teacher_nll: Estimate, vocab_size: int) -> Iterator[Finding]:
    """What the two models alone show.

    Args:
        measured: The measurements.
        teacher_nll: The teacher's negative log-likelihood with its interval.
        vocab_size: Number of tokens (or classes) that a guess chooses from.
    """
    guess = math.log(vocab_size)
    if teacher_nll.low is not None and teacher_nll.low > guess + WORSE_BY:
        # The teacher does not read this text: how it compares with the student means nothing.
        yield _worse_than_a_guess(measured, teacher_nll.low, guess)
        return
    if (worse := _teacher_worse(measured)) is not None:
        yield worse
    elif (gap := _capacity_gap(measured)) is not None:
        yield gap


def judge_recipe(
    measured: Measurements, temperature: float, pull: Mapping[str, float], weights: Mapping[str, float]
) -> Iterator[Finding]:
    """What the recipe does to these models.

    Args:
        measured: The measurements, with gradient shares.
        temperature: Of the run.
        pull: Means over tokens of `tokens.PULL` at T = 1, and of `tokens.SOFTENED` at that temperature.
        weights: Of the terms, where they are known.
    """
    # A student that is the teacher is pulled at no temperature.
    left = [pull[f"softened_{name}"] / pull[name] for name in ("pull", "focus") if pull[name] > 0]
    if temperature > 1 and left and min(left) < LEAST_LEFT:
        yield _temperature_too_high(temperature, pull)
    if (unbalanced := _unbalanced_weights(measured, weights)) is not None:
        yield unbalanced


def _worse_than_a_guess(measured: Measurements, low: float, guess: float) -> Finding:
    return Finding(
        "tokenizer_mismatch",
        "the teacher predicts the labels worse than a uniform guess, as one does that reads ids of another tokenizer",
        {
            "teacher NLL": measured.teacher.nll,
            "lower end of its 95 % interval": low,
            "NLL of a uniform guess": guess,
            "teacher entropy": measured.teacher.entropy,
        },
        "check that teacher and dataset have one tokenizer (give both tokenizers, to have them compared) and that all "
        "of the teacher's weights were loaded.",
    )


def _teacher_worse(measured: Measurements) -> Finding | None:
    difference = measured.nll_difference
    if difference.low is None or difference.low <= WORSE_BY:
        return None
    return Finding(
        "teacher_worse",
        "on these tokens the teacher is worse than the student, so its distributions teach it to be wrong",
        {
            "teacher NLL": measured.teacher.nll,
            "student NLL": measured.student.nll,
            "difference": difference.value,
            "lower end of its 95 % interval": difference.low,
            "teacher accuracy": measured.teacher.accuracy,
            "student accuracy": measured.student.accuracy,
        },
        "fine-tune the teacher on the domain first, or take a better one; until then raise `ce_weight`, or leave this "
        "data to cross-entropy. A student that was fitted to this domain may still be worse elsewhere: look at "
        "benchmarks, too.",
    )


def _capacity_gap(measured: Measurements) -> Finding | None:
    student, teacher = measured.student, measured.teacher
    if not student.parameters or not teacher.parameters or measured.information_kept is None:
        return None
    ratio, behind = teacher.parameters / student.parameters, measured.nll_difference
    if ratio <= WIDE_RATIO or measured.information_kept >= ENOUGH_KEPT or behind.high is None or behind.high >= 0:
        return None
    return Finding(
        "capacity_gap",
        f"the teacher is {ratio:.3g} times the student, which does not follow it",
        {
            "parameters of the teacher": teacher.parameters,
            "parameters of the student": student.parameters,
            "information kept": measured.information_kept,
            "KL": measured.kl.value,
            "student NLL": student.nll,
            "teacher NLL": teacher.nll,
        },
        f"if the loss still falls, train on; if it does not, distil through an assistant near {BEST_RATIO} times the "
        'student (arXiv 2311.07052), or use `divergence="taid"` (arXiv 2501.16937), which moves the target from the '
        "student to the teacher.",
    )


def _temperature_too_high(temperature: float, pull: Mapping[str, float]) -> Finding:
    left = pull["softened_pull"] / pull["pull"]
    return Finding(
        "temperature_too_high",
        f"at temperature {temperature:g} the divergence pulls {left:.2g} times as much as at 1 (T^2 included), and "
        f"{100 * pull['softened_focus']:.0f} % instead of {100 * pull['focus']:.0f} % of it on tokens that the "
        "teacher holds likely",
        {
            "temperature": temperature,
            "pull on the logits": pull["softened_pull"],
            "pull at T = 1": pull["pull"],
            "on likely tokens": pull["softened_focus"],
            "on likely tokens at T = 1": pull["focus"],
            "teacher entropy": pull["softened_entropy"],
            "teacher entropy at T = 1": pull["entropy"],
        },
        "set `temperature=1.0`: where the teacher's distributions are peaked, as language models' are, a higher one "
        "spends the divergence on the order of tokens that neither model would say.",
    )


def _unbalanced_weights(measured: Measurements, weights: Mapping[str, float]) -> Finding | None:
    shares = {name: share for name, share in measured.gradient_shares.items() if weights.get(name, 1) > 0}
    kept = measured.information_kept
    # A divergence that has been minimised pulls little by right; cross-entropy never ends.
    weak = [
        name
        for name, share in shares.items()
        if share < LEAST_SHARE and (name == "ce" or kept is None or kept < ENOUGH_KEPT)
    ]
    if not weak:
        return None
    strongest = max(shares, key=shares.__getitem__)
    evidence: dict[str, float | int | str] = {f"share of {name}": share for name, share in shares.items()}
    evidence |= {f"weight of {name}": weights[name] for name in shares if name in weights}
    advice = "raise " + ", ".join(
        f"the weight of {name} about {shares[strongest] / shares[name]:.2g} times"
        if shares[name] > 0
        else f"the weight of {name} (its gradient is 0: see whether it reaches the student at all)"
        for name in weak
    )
    return Finding(
        "unbalanced_weights",
        f"{strongest} has {100 * shares[strongest]:.1f} % of the gradient, and {', '.join(weak)} does not steer",
        evidence,
        f"{advice}, or lower that of {strongest}; then watch `GradientShareCallback`. A term that is to have no say "
        "is better left out: it costs its forward pass.",
    )
