from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_distill.functional import LMHead, dynamics
from hf_distill.functional.dynamics import feature_dynamics
from tests.functional.test_features import draw, rotation


LAYERS = 3


def naive_dynamics(student, student_head, teacher, teacher_head) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once."""
    width = min(student_head(student[0]).shape[-1], teacher_head(teacher[0]).shape[-1])
    ours = [student_head(states)[:, :width].log_softmax(-1) for states in student]
    theirs = [teacher_head(states)[:, :width].log_softmax(-1).detach() for states in teacher]
    trajectory = [F.kl_div(q, p, log_target=True, reduction="none").sum(-1) for q, p in zip(ours, theirs, strict=True)]
    derivative = [
        1 - F.cosine_similarity(ours[j + 1] - ours[j], theirs[j + 1] - theirs[j], dim=-1, eps=1e-5)
        for j in range(len(ours) - 1)
    ]
    return torch.stack(trajectory).mean(0), torch.stack(derivative).mean(0)


def sides(tokens: int = 300, widths=(6, 8), vocabularies=(20, 24), dtype=torch.float64):
    """Leaves of both sides; by default neither widths nor vocabularies are the same."""
    made = []
    for seed, (width, vocabulary) in enumerate(zip(widths, vocabularies, strict=True)):
        states = [draw(tokens, width, seed=10 * seed + j).to(dtype).requires_grad_() for j in range(LAYERS)]
        weight = draw(vocabulary, width, seed=10 * seed + 9).to(dtype).requires_grad_()
        made += [states, weight]
    return made


@pytest.mark.parametrize("plain", [True, False], ids=["LMHead", "callable"])
def test_value_and_gradients_are_those_of_all_logits_at_once(plain):
    student, weight, teacher, teacher_weight = sides()
    head = LMHead(weight, scale=0.5, softcap=4.0)
    heads = (head, LMHead(teacher_weight)) if plain else (lambda h: head(h), lambda h: h @ teacher_weight.t())
    # The smallest budget: three chunks of 100 tokens.
    found = feature_dynamics(student, heads[0], teacher, heads[1], chunk_bytes=1)
    expected = naive_dynamics(student, heads[0], teacher, heads[1])
    factors = draw(300, seed=7), draw(300, seed=8)
    gradients = []
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for pair in (found, expected):
        total = sum((values * factor).sum() for values, factor in zip(pair, factors, strict=True))
        gradients.append(torch.autograd.grad(total, [*student, weight, *teacher, teacher_weight], allow_unused=True))
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    assert gradients[0][LAYERS + 1] is None  # the teacher


def test_equal_models_have_no_distance_and_no_gradient():
    student, weight, *_ = sides()
    teacher = [states.detach().clone() for states in student]
    trajectory, derivative = feature_dynamics(student, LMHead(weight), teacher, LMHead(weight.detach().clone()))
    assert torch.stack([trajectory, derivative]).abs().max() < 1e-12
    (trajectory.sum() + derivative.sum()).backward()
    assert max(tensor.grad.abs().max() for tensor in [*student, weight]) < 1e-9


def test_a_rotation_of_hidden_states_and_head_together_is_not_seen():
    student, weight, teacher, teacher_weight = sides()
    expected = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight))
    turn, other = rotation(6), rotation(8, seed=5)
    turned = [states @ turn for states in student], [states @ other for states in teacher]
    found = feature_dynamics(turned[0], LMHead(weight @ turn), turned[1], LMHead(teacher_weight @ other))
    torch.testing.assert_close(found, expected)
    moved = feature_dynamics(turned[0], LMHead(weight), teacher, LMHead(teacher_weight))
    assert (moved[0] - expected[0]).abs().max() > 1e-3


def test_a_token_does_not_see_the_others():
    student, weight, teacher, teacher_weight = sides(5)
    whole = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight))
    few = [[states[2:4] for states in side] for side in (student, teacher)]
    part = feature_dynamics(few[0], LMHead(weight), few[1], LMHead(teacher_weight))
    torch.testing.assert_close(part, tuple(values[2:4] for values in whole))


def test_without_gradient_the_values_are_the_same():
    student, weight, teacher, teacher_weight = sides()
    expected = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight))
    with torch.no_grad():
        found = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight), chunk_bytes=1)
    torch.testing.assert_close(found, tuple(values.detach() for values in expected))


def test_no_tokens_still_reach_the_head():
    student, weight, teacher, teacher_weight = sides(0)
    trajectory, derivative = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight))
    assert trajectory.shape == derivative.shape == (0,)
    (trajectory.sum() + derivative.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert all(states.grad is not None for states in student)


def test_bf16_logits_are_compared_in_fp32():
    student, weight, teacher, teacher_weight = sides(5, dtype=torch.bfloat16)
    found = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight))
    assert {values.dtype for values in found} == {torch.float32}
    heads = (lambda h: (h @ weight.t()).float()), (lambda h: (h @ teacher_weight.t()).float())
    torch.testing.assert_close(found, naive_dynamics(student, heads[0], teacher, heads[1]))


def test_autocast_does_not_reach_the_comparison():
    student, weight, teacher, teacher_weight = sides(5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight))
    heads = [lambda h, w=w: (h.bfloat16() @ w.bfloat16().t()).float() for w in (weight, teacher_weight)]
    torch.testing.assert_close(found, naive_dynamics(student, heads[0], teacher, heads[1]))


def test_only_one_chunk_of_logits_is_kept_for_backward():
    student, weight, teacher, teacher_weight = sides(dtype=torch.float32)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        feature_dynamics(student, LMHead(weight), teacher, LMHead(teacher_weight), chunk_bytes=1)
    assert max(kept, default=0) < 100 * 20


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_that_is_not_trained_gets_thinner_chunks(trained, monkeypatch):
    student, weight, teacher, teacher_weight = sides(5)
    seen = []
    monkeypatch.setattr(dynamics, "chunk_rows", lambda *args, trained_head: seen.append(trained_head) or 3)
    head = LMHead(weight.detach().requires_grad_(trained))
    feature_dynamics(student, head, teacher, LMHead(teacher_weight))
    assert seen == [trained]


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (3, 2)])
def test_layers_that_make_no_steps_are_refused(ours, theirs):
    student, weight, teacher, teacher_weight = sides(5)
    with pytest.raises(ValueError, match="at least 2"):
        feature_dynamics(student[:ours], LMHead(weight), teacher[:theirs], LMHead(teacher_weight))
