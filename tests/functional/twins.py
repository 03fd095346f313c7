"""Leaf tensors, the naive twin of the fused loss, and the comparison of the two."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_distill.functional import DIVERGENCES, LMHead, linear_distillation_loss, resolve_divergence
from tests.functional.sparse_twins import sparse_divergence


KWARGS = {name: {"t": 0.3} if name == "taid" else {} for name in DIVERGENCES}
SMALL = 1  # a budget of one byte: the smallest chunks
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Case:
    """Leaf tensors of a student, a teacher and labels, of which some are ignored."""

    def __init__(
        self,
        *,
        tokens: int = 151,
        widths: tuple[int, int] = (12, 17),
        vocabularies: tuple[int, int] = (53, 53),
        dtype: torch.dtype = torch.float32,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        frozen: bool = False,
        masked: int = 40,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = draw(tokens, widths[0]).requires_grad_()
        self.teacher_hidden = draw(tokens, widths[1])
        self.head, self.teacher_head = (
            LMHead(draw(v, h), draw(v) if bias else None, scale, softcap)
            for v, h in zip(vocabularies, widths, strict=True)
        )
        self.head.weight.requires_grad_(not frozen)
        if self.head.bias is not None:
            self.head.bias.requires_grad_(not frozen)
        self.labels = torch.randint(0, min(vocabularies), (tokens,), generator=generator)
        self.labels[torch.randperm(tokens, generator=generator)[:masked]] = -100

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (self.hidden, self.head.weight, self.head.bias)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def fused(self, **arguments):
        given = {"chunk_bytes": SMALL}
        if "teacher_targets" not in arguments:
            given |= {"teacher_hidden": self.teacher_hidden, "teacher_head": self.teacher_head}
        return linear_distillation_loss(self.hidden, self.head, self.labels, **given | arguments)

    def to(self, dtype: torch.dtype, device: str | torch.device | None = None) -> "Case":
        """The same numbers in another precision, or on another device, as new leaves."""
        device = device or self.hidden.device
        other = Case.__new__(Case)
        other.labels = self.labels.to(device)
        other.hidden = self.hidden.detach().to(device, dtype).requires_grad_()
        other.teacher_hidden = self.teacher_hidden.to(device, dtype)
        for name in ("head", "teacher_head"):
            head = getattr(self, name)
            tensors = {k: getattr(head, k) for k in ("weight", "bias") if getattr(head, k) is not None}
            copies = {k: v.detach().to(device, dtype).requires_grad_(v.requires_grad) for k, v in tensors.items()}
            setattr(other, name, replace(head, **copies))
        return other


def naive(
    case: Case, terms, temperature=2.0, denominator=None, token_weights=None, teacher_targets=None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Full logits of every token, masked at the end; parts as in the fused loss."""
    student, teacher = case.head(case.hidden), case.teacher_head(case.teacher_hidden)
    if student.dtype != torch.float64:
        student, teacher = student.float(), teacher.float()
    kept = case.labels != -100
    weights = kept.to(student.dtype) if token_weights is None else token_weights * kept
    shared = min(student.shape[1], teacher.shape[1])
    loss, parts = 0.0, {}
    for name, value in terms.items():
        weight, kwargs = value if isinstance(value, tuple) else (value, {})
        if name == "ce":
            per_token = torch.nn.functional.cross_entropy(student, case.labels, reduction="none")
        else:
            divergence = resolve_divergence(name, kwargs)
            if teacher_targets is None:
                per_token = divergence(student[:, :shared], teacher[:, :shared], temperature)
            else:
                per_token = sparse_divergence(divergence, student[:, :shared], teacher_targets, temperature)
            per_token = per_token * divergence.scale(temperature)
        parts[name] = (per_token * weights).sum()
        loss = loss + weight * parts[name]
    return loss / (weights.sum() if denominator is None else denominator), parts


def assert_twins(case: Case, terms, *, rtol=1e-4, atol=1e-6, **arguments) -> None:
    expected, expected_parts = naive(case, terms, **arguments)
    out = case.fused(terms=terms, **arguments)
    torch.testing.assert_close(out.loss, expected.to(out.loss.dtype), rtol=rtol, atol=atol)
    for name, part in expected_parts.items():
        torch.testing.assert_close(out.parts[name], part.detach().to(out.loss.dtype), rtol=rtol, atol=atol)
    assert list(out.parts) == list(terms)
    for actual, wanted in zip(*(torch.autograd.grad(x, case.leaves) for x in (out.loss, expected)), strict=True):
        assert actual.dtype == wanted.dtype
        error = (actual - wanted).norm() / wanted.norm().clamp(min=1e-6)
        assert error < rtol, f"relative error of a gradient of shape {list(wanted.shape)}: {error}"


def module_of(head: LMHead) -> torch.nn.Module:
    """The same head behind a forward that the loss cannot look into."""

    class Opaque(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = head.weight, head.bias  # plain attributes: the leaves stay the case's own

        def forward(self, hidden):
            return replace(head, weight=self.weight, bias=self.bias)(hidden)

    return Opaque()


def of(name: str, weight: float = 0.7):
    return {name: (weight, KWARGS[name])}


every = pytest.mark.parametrize("name", sorted(DIVERGENCES))
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 0.5, "softcap": 4.0, "vocabularies": (53, 47)},
    "frozen": {"frozen": True},
    "wider student": {"vocabularies": (61, 53)},
    "wider teacher": {"vocabularies": (53, 61)},
    "no masked row": {"masked": 0},
}
