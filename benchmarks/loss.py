"""The loss alone: cross-entropy and T^2 KL from hidden states, forward and backward, both heads included.

`floor` is the share of the time that the matrix products take which no loss can avoid: both projections, the gradient
of the hidden states and, for a trained head, of its weight.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measure import in_child, peak_megabytes, take_turns
from torch import Tensor

from hf_distill.functional import METRICS, LMHead, linear_distillation_loss


TEMPERATURE = 2.0
Inputs = tuple[Tensor, LMHead, Tensor, Tensor, LMHead]
Loss = Callable[[Tensor, LMHead, Tensor, Tensor, LMHead], Tensor]


@dataclass(frozen=True)
class Setting:
    """The inputs of a loss: `masked` is the share of tokens without a label, `frozen` the student's head."""

    tokens: int = 2048
    vocabulary: int = 49152
    student_width: int = 576
    teacher_width: int = 2048
    dtype: str = "bfloat16"
    frozen: bool = False
    masked: float = 0.0


def inputs(setting: Setting) -> Inputs:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def draw(rows: int, width: int, size: float = 1.0) -> Tensor:
        return torch.empty(rows, width, dtype=getattr(torch, setting.dtype), device=device).normal_(std=size)

    widths = setting.student_width, setting.teacher_width
    hidden, teacher_hidden = (draw(setting.tokens, width) for width in widths)
    head, teacher_head = (LMHead(draw(setting.vocabulary, width, 2 * width**-0.5)) for width in widths)
    head.weight.requires_grad_(not setting.frozen)
    labels = torch.randint(0, setting.vocabulary, (setting.tokens,), device=device)
    labels[: int(setting.masked * setting.tokens)] = -100
    return hidden.requires_grad_(), head, labels, teacher_hidden, teacher_head


def full_logits(hidden: Tensor, head: LMHead, teacher_hidden: Tensor, teacher_head: LMHead) -> tuple[Tensor, Tensor]:
    """Of the student and of the teacher, in fp32."""
    with torch.no_grad():
        teacher = teacher_head(teacher_hidden).float()
    return head(hidden).float(), teacher


def naive(hidden: Tensor, head: LMHead, labels: Tensor, teacher_hidden: Tensor, teacher_head: LMHead) -> Tensor:
    student, teacher = full_logits(hidden, head, teacher_hidden, teacher_head)
    log_q, log_p = (F.log_softmax(z / TEMPERATURE, -1) for z in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * TEMPERATURE**2 * kl[labels != -100].mean()


def modelopt(hidden, head, labels, teacher_hidden, teacher_head) -> Tensor:
    """ModelOpt's loss on logits (it scales by T^2 itself) beside PyTorch's cross-entropy."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    student, teacher = full_logits(hidden, head, teacher_hidden, teacher_head)
    divergence = LogitsDistillationLoss(TEMPERATURE, reduction="none")(student, teacher)
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * divergence[labels != -100].mean()


def ours(student: Callable[[LMHead], Any] = lambda head: head, **arguments: Any) -> Loss:
    def loss(hidden, head, labels, teacher_hidden, teacher_head):
        given = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head, "temperature": TEMPERATURE}
        return linear_distillation_loss(hidden, student(head), labels, **given, **arguments).loss

    return loss


def trl(hidden, head, labels, teacher_hidden, teacher_head) -> Tensor:
    """The kernels of TRL's DistillationTrainer (divergence) and SFTTrainer (cross-entropy)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    heads = hidden, head.weight, None, teacher_hidden, teacher_head.weight, None
    divergence, _ = ChunkedDivergenceFunction.apply(*heads, 0.0, TEMPERATURE)
    log_prob, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ()
    )
    per_token = 0.5 * TEMPERATURE**2 * divergence - 0.5 * log_prob
    return per_token.masked_fill(labels == -100, 0).sum() / (labels != -100).sum()


def liger(compiled: bool) -> Loss:
    def loss(hidden, head, labels, teacher_hidden, teacher_head):
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        # beta 0 is the forward KL, without T^2.
        weights = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5 * TEMPERATURE**2}
        module = LigerFusedLinearJSDLoss(**weights, beta=0.0, temperature=TEMPERATURE, compiled=compiled)
        return module(hidden, head.weight, teacher_hidden, teacher_head.weight, labels)

    return loss


# The first is the reference. All but those with "+" compute the same number.
CASES: dict[str, Loss] = {
    "naive full logits": naive,
    "checkpointed chunks (any head)": ours(student=lambda head: head.__call__),
    "ModelOpt, full logits": modelopt,
    "TRL, CE and divergence kernels": trl,
    "Liger, eager": liger(compiled=False),
    "Liger, compiled": liger(compiled=True),
    "hf_distill": ours(),
    "hf_distill + JSD": ours(terms={"ce": 0.5, "forward_kl": 0.25, "jsd": 0.25}),
    "hf_distill + all metrics": ours(metrics=METRICS),
}
NEEDS = {"ModelOpt": "modelopt", "TRL": "trl", "Liger": "liger_kernel"}


def available() -> list[str]:
    """The cases that can run here."""
    missing = tuple(prefix for prefix, package in NEEDS.items() if importlib.util.find_spec(package) is None)
    return [name for name in CASES if not name.startswith(missing)]


def measure(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Times and peaks of the cases under one setting."""
    seconds = in_child(_seconds, setting, names, repeats, threads)
    peaks = {name: in_child(_peak, setting, name, threads) for name in names}
    return {"setting": asdict(setting), "threads": threads, "seconds": seconds, "peak_mb": peaks}


def _step(name: str, data: Inputs) -> Callable[[], float]:
    def step() -> float:
        data[0].grad = data[1].weight.grad = None
        loss = CASES[name](*data)
        loss.backward()
        return loss.item()

    return step


def _floor(data: Inputs) -> Callable[[], list[Tensor]]:
    hidden, head, labels, teacher_hidden, teacher_head = data
    kept = slice(0, int((labels != -100).sum()))

    @torch.no_grad()
    def products() -> list[Tensor]:
        logits = hidden[kept] @ head.weight.t()
        others = [logits.t() @ hidden[kept]] if head.weight.requires_grad else []
        return [teacher_hidden[kept] @ teacher_head.weight.t(), logits @ head.weight, *others]

    return products


def _seconds(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, list[float]]:
    torch.set_num_threads(threads)
    data = inputs(setting)
    steps = {name: _step(name, data) for name in names}
    _check_equal({name: step() for name, step in steps.items() if "+" not in name}, setting.dtype)
    return take_turns({**steps, "floor": _floor(data)}, repeats)


def _check_equal(losses: dict[str, float], dtype: str) -> None:
    """A faster loss that is another loss is no result."""
    reference, *others = losses.values()
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    if any(abs(other - reference) > tolerance * abs(reference) for other in others):
        raise RuntimeError(f"The cases compute different losses: {losses}.")


def _peak(setting: Setting, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    _step(name, inputs(Setting(**{**asdict(setting), "tokens": 8})))()  # loads libraries and thread pools
    return peak_megabytes(_step(name, inputs(setting)))
