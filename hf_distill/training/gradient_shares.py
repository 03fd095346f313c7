"""Which term of the loss dominates: the norm of each term's own gradient, every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_distill.functional import reduce_sum
from hf_distill.objectives import LogitObjective, logit_loss
from hf_distill.signals import StudentSignals, TeacherSignals
from hf_distill.training.terms import Compared, FeatureTerms


Losses = Callable[[], Iterable[tuple[str, Tensor]]]


class GradientShareCallback(TrainerCallback):
    """Logs how much of the gradient comes from each term, for example as `forward_kl_gradient_share`.

    In the first micro-batch of every so many optimizer steps it takes the norm of each weighted term's gradient over
    the student's trained parameters, divided by the sum of these norms, and averaged over ranks (each sees its own
    micro-batch). Gradients can point apart, so these are shares of pull and not of the step. Under a
    `DistillationCallback` the trainer's own loss is the term `own`; a router's balancing loss is left out.

    Training is not changed by it. Such a step costs one more backward pass for each term, one more pass over the
    vocabulary for each logit term, and the memory of one more gradient.

    Args:
        every: Measure in every so many optimizer steps, the first included.

    Raises:
        ValueError: `every` is no positive number.

    Example:
        ```python
        trainer.add_callback(GradientShareCallback(every=50))
        ```
    """

    def __init__(self, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"`every` is {every}; expected a number of optimizer steps >= 1, for example 100.")
        self.every = every
        self._due = False
        self._names: list[str] = []
        self._measured: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what another run left."""
        self._measured = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See whether this step is measured."""
        self._due = state.global_step % self.every == 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a trainer that has no terms, before it takes its first step."""
        if self._due:
            raise ValueError(
                "GradientShareCallback was added to a trainer that has no teacher; use KDTrainer or KDSFTTrainer, or "
                "add a DistillationCallback too."
            )

    def measure(self, trainer: Any, losses: Losses) -> None:
        """Look at a micro-batch before its backward pass.

        Args:
            trainer: Whose it is.
            losses: Makes the weighted terms one by one, each with its name and differentiable, from the forward pass
                that the student has made already.

        Raises:
            ValueError: No process of this run holds the gradient of one term.
        """
        if not self._due:
            return
        self._due = False
        _check_run(trainer)
        accelerator = trainer.accelerator
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
        # Objectives that draw at random must leave the generators to the dropout of the next micro-batch.
        with torch.random.fork_rng(cuda), accelerator.autocast():
            norms = {name: _gradient_norm(loss, parameters) for name, loss in losses()}
        means = accelerator.reduce(torch.stack(list(norms.values())), reduction="mean")
        self._names = list(norms)
        self._measured.append(means / means.sum().clamp(min=torch.finfo(means.dtype).tiny))

    def values(self) -> dict[str, float]:
        """The means of what was measured since they were asked for, by name."""
        if not self._measured:
            return {}
        shares = torch.stack(self._measured).mean(0).tolist()
        self._measured = []
        return {f"{name}_gradient_share": share for name, share in zip(self._names, shares, strict=True)}


def measure_shares(trainer: Any, losses: Losses) -> None:
    """Show the terms of a training micro-batch to the trainer's `GradientShareCallback`s."""
    for callback in _callbacks(trainer):
        callback.measure(trainer, losses)


def measured_shares(trainer: Any) -> dict[str, float]:
    """What they add to the step logs."""
    return {name: share for callback in _callbacks(trainer) for name, share in callback.values().items()}


def term_losses(
    objectives: Sequence[LogitObjective],
    features: FeatureTerms,
    student: StudentSignals,
    teacher: TeacherSignals | None,
    compared: Compared,
    *,
    denominator: Tensor | int | None,
    ce_weight: float = 0.0,
) -> Iterator[tuple[str, Tensor]]:
    """Compute every term of a loss by itself: a pass over the vocabulary each, where the loss needs one for all."""
    if ce_weight > 0:
        yield "ce", logit_loss([], ce_weight, student, None, denominator=denominator).loss
    for objective in objectives:
        yield objective.name, logit_loss([objective], 0.0, student, teacher, denominator=denominator).loss
    if not compared:
        return
    count = torch.tensor(student.labels.numel(), device=student.labels.device)
    for (name, weight), total in zip(features.weights.items(), features(compared), strict=True):
        yield name, weight * reduce_sum(total, denominator, count)


def _callbacks(trainer: Any) -> list[GradientShareCallback]:
    return [found for found in trainer.callback_handler.callbacks if isinstance(found, GradientShareCallback)]


def _check_run(trainer: Any) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "GradientShareCallback needs the whole gradient of each term, which FSDP and DeepSpeed shard; remove it, "
            "or measure in a short run on one device or with DDP."
        )
    if trainer.args.torch_compile:
        raise ValueError(
            "GradientShareCallback goes through the student's graph once for each term, and `torch_compile` makes "
            "graphs that can be gone through once; measure in a short run with `torch_compile=False`."
        )


def _gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm over all parameters, 0-dim fp32; the graph stays for the training's own backward pass."""
    zero = loss.new_zeros((), dtype=torch.float32)
    if not loss.requires_grad:
        return zero
    with torch.autocast(loss.device.type, enabled=False):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in gradients if grad is not None]
    return torch.linalg.vector_norm(torch.stack([zero, *(norm.to(loss.device) for norm in norms)]))
