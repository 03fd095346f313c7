from __future__ import annotations

import math

import pytest
import torch

from hf_distill.functional import attention
from hf_distill.functional.attention import SCORE_LOSSES, Scores, relation_distance, relation_heads, score_distance
from hf_distill.signals import AttentionStates, Visibility
from tests.attention_twins import masked_softmax, naive_kl, naive_maps, naive_scores, naive_visible


BATCH, LENGTH = 2, 9
INDEX = torch.tensor([1, 3, 4, 5, 8, 11, 12, 13, 14, 15, 16, 17])
PADDING = torch.tensor([[1] * 9, [0, 0] + [1] * 7], dtype=torch.bool)
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
MASK = Visibility(causal=True, padding=PADDING)
TRIANGLE = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
ADDED = torch.linspace(-1, 1, LENGTH, dtype=torch.float64).expand(BATCH, 1, LENGTH, LENGTH)
VISIBILITIES = {
    "all": Visibility(),
    "causal": Visibility(causal=True),
    "padded": MASK,
    "window": Visibility(causal=True, window=3),
    "packed": Visibility(causal=True, documents=DOCUMENTS),
    "bool": Visibility(mask=TRIANGLE),
    "added": Visibility(mask=ADDED.masked_fill(~TRIANGLE, torch.finfo(ADDED.dtype).min)),
}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    """Two queries of eight heads at a time, so that chunks end inside rows of the batch."""
    monkeypatch.setattr(attention, "CHUNK", 2 * 8 * LENGTH)


def draw(seed: int, heads: int = 4, shared: int = 2, width: int = 3, seen: str = "causal", **settings):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, heads, LENGTH, width)] + 2 * [(BATCH, shared, LENGTH, width)]
    tensors = [2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return AttentionStates(*tensors, visibility=VISIBILITIES[seen], scaling=width**-0.5, **settings)


def leaves(states: AttentionStates) -> list[torch.Tensor]:
    return [tensor.requires_grad_() for tensor in (states.query, states.key, states.value)]


def scores(states: AttentionStates) -> Scores:
    return Scores(states.query, states.key, states.seen, states.scaling, states.softcap)


def grouped(maps: torch.Tensor, heads: int) -> torch.Tensor:
    return maps.unflatten(1, (heads, -1)).mean(2)


def naive(student: AttentionStates, teacher: AttentionStates, loss: str) -> torch.Tensor:
    """The distance of every row from maps of whole layers, `[M]`."""
    visible = naive_visible(student) & naive_visible(teacher)
    if loss == "score_mse":
        squares = (naive_scores(student) - naive_scores(teacher)).square() * visible
        values = (squares.sum(-1) / visible.sum(-1).clamp(min=1)).mean(1)
    else:
        ours, theirs = naive_maps(student, visible), naive_maps(teacher, visible)
        few, many = sorted((ours.shape[1], theirs.shape[1]))
        groups = few if many % few == 0 else 1
        ours, theirs = grouped(ours, groups), grouped(theirs, groups)
        values = (ours - theirs).square().sum(-1).mean(1) if loss == "map_mse" else naive_kl(ours, theirs, visible)
    return values.flatten()[INDEX]


def assert_same(found: torch.Tensor, expected: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    weights = torch.arange(1, len(INDEX) + 1, dtype=found.dtype)  # every row counts differently
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((weights * value).sum(), inputs) for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("seen", VISIBILITIES)
@pytest.mark.parametrize("loss", SCORE_LOSSES)
def test_values_and_gradients_are_those_of_whole_maps(loss, seen):
    student, teacher = draw(0, seen=seen), draw(1, width=5, shared=1, seen=seen, softcap=1.5)
    inputs = leaves(student)[:2]
    found = score_distance(scores(student), scores(teacher), INDEX, loss)
    assert_same(found, naive(student, teacher, loss), inputs)


@pytest.mark.parametrize("loss", ["map_kl", "map_mse"])
@pytest.mark.parametrize("heads", [(2, 6), (6, 2), (4, 6), (6, 4)])
def test_maps_are_averaged_where_the_numbers_of_heads_differ(loss, heads):
    student, teacher = draw(0, heads=heads[0]), draw(1, heads=heads[1])
    inputs = leaves(student)[:2]
    found = score_distance(scores(student), scores(teacher), INDEX, loss)
    assert_same(found, naive(student, teacher, loss), inputs)


@pytest.mark.parametrize("loss", SCORE_LOSSES)
def test_only_keys_that_both_see_count(loss):
    student, teacher = draw(0, seen="window"), draw(1, seen="padded")
    inputs = leaves(student)[:2]
    found = score_distance(scores(student), scores(teacher), INDEX, loss)
    assert_same(found, naive(student, teacher, loss), inputs)
    with torch.no_grad():
        student.key[1, :, :2] = 1e3  # padding of the teacher
    torch.testing.assert_close(score_distance(scores(student), scores(teacher), INDEX, loss), found)


@pytest.mark.parametrize("loss", [*SCORE_LOSSES, "relations"])
def test_equal_attention_has_no_distance_and_no_gradient(loss):
    student, teacher = draw(0, seen="padded"), draw(0, seen="padded")
    inputs = leaves(student)
    if loss == "relations":
        value = relation_distance(student.value, teacher.value, (student.seen, teacher.seen), INDEX)
    else:
        value = score_distance(scores(student), scores(teacher), INDEX, loss)
    assert value.abs().max() < 1e-12
    for gradient in torch.autograd.grad(value.sum(), inputs, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-9


@pytest.mark.parametrize("loss", SCORE_LOSSES)
def test_the_chunks_do_not_matter(loss, monkeypatch):
    student, teacher = draw(0, seen="packed"), draw(1, seen="packed")
    found = score_distance(scores(student), scores(teacher), INDEX, loss)
    monkeypatch.setattr(attention, "CHUNK", 2**20)
    torch.testing.assert_close(score_distance(scores(student), scores(teacher), INDEX, loss), found)


def test_no_more_than_a_chunk_is_ever_built(monkeypatch):
    sizes = []
    monkeypatch.setitem(
        SCORE_LOSSES, "map_kl", lambda *args: sizes.append(args[0].numel()) or args[0].square().sum((0, 2))
    )
    student, teacher = draw(0), draw(1)
    leaves(student)
    score_distance(scores(student), scores(teacher), INDEX, "map_kl").sum().backward()
    assert max(sizes) <= 2 * 4 * LENGTH
    assert len(sizes) == 2 * 7  # of 5 and 7 queries two at a time; all of them again in backward


@pytest.mark.parametrize("loss", SCORE_LOSSES)
def test_extreme_scores_and_queries_that_see_nothing_are_finite(loss):
    hidden = Visibility(causal=True, padding=torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    for visibility in (MASK, hidden):
        student, teacher = (
            AttentionStates(*(sign * 1e3 * draw(0).query.float() for _ in range(3)), visibility, 1.0)
            for sign in (1, -1)
        )
        inputs = leaves(student)[:2]
        value = score_distance(scores(student), scores(teacher), INDEX, loss)
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value.sum(), inputs))
    assert value.abs().max() == 0


def test_bf16_is_compared_in_fp32_and_no_rows_are_a_zero_with_a_gradient():
    student, teacher = draw(0), draw(1)
    low = [Scores(side.query.bfloat16(), side.key.bfloat16(), side.seen, 0.5) for side in (student, teacher)]
    high = [Scores(side.query.float(), side.key.float(), side.seen, side.scaling) for side in low]
    torch.testing.assert_close(score_distance(*low, INDEX, "map_kl"), score_distance(*high, INDEX, "map_kl"))
    low[0].query.requires_grad_()
    nothing = score_distance(*low, INDEX[:0], "map_kl")
    assert (nothing.shape, nothing.requires_grad, nothing.sum()) == ((0,), True, 0)


def naive_relation(states: torch.Tensor, heads: int, visible: torch.Tensor) -> torch.Tensor:
    rows = states.transpose(1, 2).flatten(2)  # [B, S, width]: heads side by side
    parts = torch.stack(rows.chunk(heads, -1), 1)
    products = parts @ parts.transpose(2, 3) / math.sqrt(parts.shape[-1])
    return masked_softmax(products, visible)


@pytest.mark.parametrize("seen", ["all", "padded", "packed"])
@pytest.mark.parametrize("part", ["query", "key"])
def test_relations_are_those_of_whole_matrices_for_any_heads_and_widths(part, seen):
    student, teacher = draw(0, seen=seen), draw(1, heads=6, width=4, seen=seen)
    ours, theirs = getattr(student, part).requires_grad_(), getattr(teacher, part)
    visible = naive_visible(student)
    found = relation_distance(ours, theirs, (student.seen, teacher.seen), INDEX, heads=2)
    maps = [naive_relation(states, 2, visible) for states in (ours, theirs)]
    assert_same(found, naive_kl(*maps, visible).flatten()[INDEX], [ours])


def test_a_rotation_inside_a_relation_head_changes_nothing():
    student, teacher = draw(0), draw(1)
    value = relation_distance(student.query, teacher.query, (student.seen, teacher.seen), INDEX, heads=4)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    turned = relation_distance(student.query @ rotation, teacher.query, (student.seen, teacher.seen), INDEX, heads=4)
    torch.testing.assert_close(turned, value)
    other = relation_distance(student.query @ rotation, teacher.query, (student.seen, teacher.seen), INDEX, heads=6)
    before = relation_distance(student.query, teacher.query, (student.seen, teacher.seen), INDEX, heads=6)
    assert (other - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("widths", "heads"),
    [((384, 768), 48), ((768, 1024), 64), ((2048, 8192), 64), ((512, 1024), 64), ((32, 48), 2), ((33, 49), 1)],
)
def test_relation_heads_are_those_of_the_paper_where_they_divide_both_widths(widths, heads):
    assert relation_heads(*widths) == heads


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"4 heads \(student\) and 6 heads \(teacher\).*map_kl"):
        score_distance(scores(draw(0)), scores(draw(1, heads=6)), INDEX, "score_mse")
    student, teacher = draw(0), draw(1)
    with pytest.raises(ValueError, match="divisor of both widths, 12 and 12"):
        relation_distance(student.query, teacher.query, (student.seen, teacher.seen), INDEX, heads=5)
