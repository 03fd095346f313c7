"""What sparse targets leave alone, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from hf_distill.functional import METRICS, linear_distillation_loss
from hf_distill.functional import tile as tile_module
from tests.functional.sparse_twins import COARSE, TEMPERATURES, draws, gradients, sampled, top
from tests.functional.twins import Case


def test_no_buffer_of_the_vocabulary_belongs_to_the_teacher(monkeypatch):
    case, seen = Case(vocabularies=(400, 400)), set()
    original = tile_module.TileLoss._buffer
    monkeypatch.setattr(
        tile_module.TileLoss, "_buffer", lambda self, name, *size: seen.add(name) or original(self, name, *size)
    )
    terms = {"ce": 0.5} | dict.fromkeys(COARSE, 0.1)
    metrics = ("kl", "teacher_nll", "teacher_entropy", "top1_agreement")
    case.fused(terms=terms, temperature=2.0, teacher_targets=top(case, 9), metrics=metrics)
    assert seen == {"student_probs", "q", "products"}  # fp32 logits of the student stay where they are


def test_a_batch_without_labels_gives_a_zero():
    case = Case()
    targets = top(case, 9)
    case.labels[:] = -100
    out = case.fused(terms={"ce": 0.5, "jsd": 0.5}, teacher_targets=targets, metrics=METRICS)
    assert out.loss.item() == 0
    assert all(value == 0 for value in out.metrics.values())
    assert all((grad == 0).all() for grad in gradients(out, case))


def test_a_temperature_is_found_in_spite_of_rounding():
    case = Case()
    targets = top(case, 9)
    drifted = {t * (1 + 1e-8): values for t, values in targets.log_normalisers.items()}
    ours = case.fused(teacher_targets=replace(targets, log_normalisers=drifted), temperature=2.0)
    torch.testing.assert_close(ours.loss, case.fused(teacher_targets=targets, temperature=2.0).loss)
    assert targets.temperatures == TEMPERATURES
    bare = replace(targets, log_normalisers={}, log_rests={})
    assert bare.temperatures == (1.0,)
    assert case.fused(teacher_targets=bare, temperature=1.0).loss > 0
    # Nothing is softened by cross-entropy and metrics, whatever `temperature` is.
    assert case.fused(terms={"ce": 1.0}, teacher_targets=bare, temperature=7.0, metrics=("kl",)).loss > 0
    masses = draws(case, exact=4)
    assert replace(masses, entropies={1.0: masses.entropies[1.0]}).temperatures == (1.0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"terms": {"jsd": 1.0}, "masses": True}, "'jsd' needs `log_probs`.*'forward_kl'"),
        ({"terms": {"ce": 1.0, "tvd": 0.0}, "masses": True}, "'tvd' needs `log_probs`"),
        (
            {"temperature": 2.0, "masses": True},
            r"`temperature` is 2, .* declares \[1.0\]; sampled masses hold at T = 1",
        ),
        ({"temperature": 3.0}, r"declares \[0.5, 1.0, 2.0\]; give `log_normalisers` .* at 3, too"),
        ({"terms": {"taid": (1.0, {"t": 0.5})}}, "'taid' .*'forward_kl'"),
        ({"terms": {"adaptive_kl": 1.0}}, "'adaptive_kl' "),
        (
            {"terms": {"ce": 1.0}, "metrics": ("kl", "top1_agreement"), "masses": True},
            r"asks for \['top1_agreement'\]",
        ),
        ({"rows": 3}, "`teacher_targets` must hold 151 tokens on cpu.*got 3"),
        ({"teacher_hidden": torch.zeros(151, 17)}, "pass either the targets, or hidden"),
    ],
)
def test_what_the_targets_cannot_tell_is_refused_before_any_work(arguments, message):
    case = Case()
    logits = case.teacher_head(case.teacher_hidden)
    targets = sampled(logits, case.labels, log_probs=False) if arguments.pop("masses", False) else top(case, 9)
    targets = targets.at(slice(0, arguments.pop("rows", 151)))
    with pytest.raises(ValueError, match=message):
        linear_distillation_loss(
            case.hidden,
            lambda _: pytest.fail("the head was called"),
            case.labels,
            teacher_targets=targets,
            **{"temperature": 1.0} | arguments,
        )


def test_targets_of_other_tokens_are_refused():
    case = Case()
    targets, kept = top(case, 9), int((case.labels != -100).nonzero()[3])
    labels = targets.labels.clone()
    labels[kept] = (labels[kept] + 1) % 53
    with pytest.raises(ValueError, match=f"1 of 111 labels differ, the first in row {kept}"):
        case.fused(teacher_targets=replace(targets, labels=labels))


def test_targets_that_know_nothing_or_do_not_fit_are_refused():
    targets = top(Case(), 9)
    with pytest.raises(ValueError, match="Both `log_probs` and `masses` are None"):
        replace(targets, log_probs=None)
    with pytest.raises(ValueError, match=r"`masses` must be \[151, 9\] like `ids`, got \[151, 8\]"):
        replace(targets, masses=torch.zeros(151, 8))
    with pytest.raises(ValueError, match=r"`entropies` must hold that at temperature 1.0, got those at \[2.0\]"):
        replace(targets, entropies={2.0: targets.entropies[2.0]})
