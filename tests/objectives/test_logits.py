from __future__ import annotations

import pytest
import torch

from hf_distill.functional import LMHead
from hf_distill.objectives import FeatureDynamicsObjective, LogitObjective, logit_loss
from hf_distill.objectives.logits import STUDENT_MONITORS, TEACHER_MONITORS
from hf_distill.signals import Projection, StudentSignals, Targets, TeacherSignals, Tokens
from tests.functional.sparse_twins import sampled, targets_at


BATCH, LENGTH, VOCABULARY = 2, 6, 20
LABELS = torch.tensor([[-100, 5, 6, -100, 2, 3], [-100, -100, 7, 8, 9, -100]])


def signals(every_id: bool = True, **arguments) -> tuple[StudentSignals, TeacherSignals, TeacherSignals]:
    """A student, its teacher as a projection, and the same teacher as sparse targets, at the labelled positions."""
    generator = torch.Generator().manual_seed(0)
    head, teacher_head = (LMHead(torch.randn(VOCABULARY, 8, generator=generator)) for _ in range(2))
    hidden, states = (torch.randn(BATCH, LENGTH, 8, generator=generator) for _ in range(2))
    logits = teacher_head(states).flatten(0, 1)
    following = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=0).flatten()
    if every_id:
        ids = torch.arange(VOCABULARY).expand(len(logits), -1)
        sparse = targets_at(ids, logits, following, dtype=torch.float32, **arguments)
    else:
        sparse = sampled(logits, following, dtype=torch.float32, **arguments)
    targets = Targets.from_labels(LABELS, shift=True)
    teachers = (TeacherSignals(given).at(targets)[0] for given in (Projection(states, teacher_head), sparse))
    return StudentSignals(Projection(hidden.requires_grad_(), head).at(targets.index), targets.labels), *teachers


def test_sparse_targets_of_every_id_are_the_teacher():
    student, teacher, sparse = signals()
    objectives = [LogitObjective(0.4, divergence="jsd", temperature=2.0), LogitObjective(0.6, temperature=2.0)]
    expected, found = (logit_loss(objectives, 0.5, student, side) for side in (teacher, sparse))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.parts, expected.parts)
    torch.testing.assert_close(found.metrics, expected.metrics)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.loss, student.logits.hidden, retain_graph=True) for out in (found, expected))
    )
    assert set(found.metrics) == {*STUDENT_MONITORS, *TEACHER_MONITORS}


def test_only_those_monitors_are_asked_for_that_the_targets_can_tell():
    student, _, sparse = signals(every_id=False, log_probs=False)
    out = logit_loss([LogitObjective()], 0.5, student, sparse)
    assert set(out.metrics) == {*STUDENT_MONITORS, *TEACHER_MONITORS} - {"top1_agreement"}
    quiet = logit_loss([LogitObjective(0.0)], 0.0, student, sparse)
    assert quiet.loss == 0
    torch.testing.assert_close(quiet.metrics, out.metrics)


def test_a_divergence_that_the_targets_cannot_give_is_refused():
    student, _, sparse = signals(every_id=False, log_probs=False)
    with pytest.raises(ValueError, match="'jsd' needs `log_probs`"):
        logit_loss([LogitObjective(divergence="jsd")], 0.5, student, sparse)
    with pytest.raises(ValueError, match="'taid'"):
        logit_loss([LogitObjective(divergence="taid")], 0.5, student, sparse)


def test_a_comparison_through_the_teachers_head_is_refused_without_one():
    student, _, sparse = signals()
    tokens = Tokens(torch.arange(len(student.labels)), torch.zeros(len(student.labels), dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`teacher\.logits` with a head"):
        FeatureDynamicsObjective()(StudentSignals(student.logits, student.labels, {}, tokens), sparse)
