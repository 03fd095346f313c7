"""One training step on fake tensors, which have shapes and no memory.

What autograd keeps differs between families (a softcap builds maps, GPT-2 keeps the masks of dropout), so it is not
modelled but asked: the model's own code runs, with adapter, gradient checkpointing and autocast. The tensors say that
they are on a CPU, where attention is fused as on a GPU, and since nobody can look into them, models build the masks
that batches with padding or several documents in a row need: without these Llama keeps 5 % less.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from hf_distill.anatomy import describe, output_head, task_of, unwrap
from hf_distill.functional.fused import chunk_rows
from hf_distill.planning.parameters import build, remember
from hf_distill.planning.timeline import COPIES, GRADIENTS, Timeline
from hf_distill.taps import tap_last_hidden


if TYPE_CHECKING:
    from peft import PeftConfig

TEACHER, FORWARD, LOSS = "teacher forward", "student forward", "loss"
# Backward has two stages, since the activations are most when it starts, and the gradients when it ends.
BACKWARD, END = "backward", "end of backward"
# What the tensors made in a stage are called, where the stage says too little.
MADE_IN = {FORWARD: "activations", BACKWARD: "work space of backward", END: "work space of backward"}
# Depths, in periods of a model's layers, from which others follow: both even, as backward is cut at half of the
# layers, and deep enough that the first and the last layer are not each other's neighbours.
SIMULATED = (4, 6)
# fp32 buffers that the loss uses on one block of a chunk, and the elements of each (see `functional.tile`).
LOSS_BUFFERS = 8
LOSS_BLOCK = {"cpu": 2**20, "cuda": 2**24}


@dataclass(frozen=True)
class Step:
    """What one micro-batch is made of.

    Args:
        batch_size: Sequences.
        sequence_length: Tokens of each, all labelled.
        student_dtype: Of the student's weights; an adapter on it is fp32.
        autocast: Whether fp32 weights compute in bf16.
        checkpointing: Whether layers are recomputed in backward.
        accumulating: Whether the gradients of an earlier micro-batch are there already.
        chunk_bytes: As in `linear_distillation_loss`.
        device: `cuda` or `cpu`, which only the loss tells apart.
    """

    batch_size: int
    sequence_length: int
    student_dtype: torch.dtype = torch.float32
    autocast: bool = True
    checkpointing: bool = True
    accumulating: bool = False
    chunk_bytes: int | None = None
    device: Literal["cuda", "cpu"] = "cuda"


@dataclass(frozen=True)
class Moments:
    """The fullest moments of a step at two depths, from which those at the depth of the student follow.

    Memory is linear in depth at each stage: a layer adds what it keeps until its turn in backward, or its gradients.

    Args:
        small: By stage and bytes of gradients: bytes by part, without weights and without the optimizer.
        large: The same of a deeper student; the same object where the student itself was simulated.
        steps: How often the difference in depth has to be added to `small`.
    """

    small: dict[tuple[str, int], Counter[str]]
    large: dict[tuple[str, int], Counter[str]]
    steps: float

    def peaks(self, gradient_share: float = 1.0, *, copies: bool = True) -> dict[str, dict[str, float]]:
        """By stage, bytes by part at its fullest moment.

        Args:
            gradient_share: What of the gradients one rank holds.
            copies: Whether autocast makes bf16 copies of the weights; FSDP gathers bf16 weights instead.
        """
        shares = {GRADIENTS: gradient_share, COPIES: float(copies)}

        def fullest(moments: dict[tuple[str, int], Counter[str]], stage: str) -> dict[str, float]:
            held = (
                {part: size * shares.get(part, 1.0) for part, size in parts.items()}
                for (name, _), parts in moments.items()
                if name == stage
            )
            return max(held, key=lambda parts: sum(parts.values()))

        found = {}
        for stage in dict.fromkeys(name for name, _ in self.small):
            low, high = fullest(self.small, stage), fullest(self.large, stage)
            found[stage] = {
                part: low.get(part, 0) + self.steps * (high.get(part, 0) - low.get(part, 0)) for part in low | high
            }
        return found


@remember
def simulate(
    teacher_config: PreTrainedConfig | None,
    student_config: PreTrainedConfig,
    step: Step,
    peft_config: PeftConfig | None = None,
) -> Moments:
    """Run one step without numbers.

    Args:
        teacher_config: Of the teacher, which runs in bf16; None for soft labels from disk.
        student_config: Of the student.
        step: What is computed.
        peft_config: Of an adapter that alone is trained.
    """
    depth, period = _depth_and_period(student_config)
    if SIMULATED[1] * period >= depth:
        moments = _moments(teacher_config, student_config, step, peft_config, depth)
        return Moments(moments, moments, 0)
    small, large = (_moments(teacher_config, student_config, step, peft_config, n * period) for n in SIMULATED)
    return Moments(small, large, (depth / period - SIMULATED[0]) / (SIMULATED[1] - SIMULATED[0]))


@remember
def _depth_and_period(config: PreTrainedConfig) -> tuple[int, int]:
    """How many layers there are, and after how many their kinds and sizes repeat."""
    layers = describe(build(config)).layers
    kinds = getattr(config.get_text_config(), "layer_types", None) or [None] * len(layers)
    facts = [(kind, [p.shape for p in layer.parameters()]) for kind, layer in zip(kinds, layers, strict=True)]
    return len(facts), next(n for n in range(1, len(facts) + 1) if facts[n:] == facts[:-n])


def _moments(
    teacher_config: PreTrainedConfig | None,
    student_config: PreTrainedConfig,
    step: Step,
    peft_config: PeftConfig | None,
    depth: int,
) -> dict[tuple[str, int], Counter[str]]:
    student = build(student_config, step.student_dtype, peft_config, depth).train()
    if step.checkpointing:
        unwrap(student).activation_checkpointing_enable()
        if peft_config is not None:
            unwrap(student).enable_input_require_grads()
    teacher = None
    if teacher_config is not None:
        # Without gradients a layer leaves nothing behind.
        period = _depth_and_period(teacher_config)[1]
        teacher = build(teacher_config, torch.bfloat16, depth=period).eval()
    timeline = Timeline()
    with FakeTensorMode():
        for model in filter(None, (student, teacher)):
            timeline.leave_out(_fake(model))
        with timeline:
            _run(teacher, student, step, timeline)
    return timeline.moments


def _fake(model: nn.Module) -> nn.Module:
    """Give a model on the meta device fake tensors on the CPU, whose operations are those of a device."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = tensors is module._parameters
                    known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = known[id(tensor)]  # type: ignore[assignment]
    return model


def _run(teacher: nn.Module | None, student: nn.Module, step: Step, timeline: Timeline) -> None:
    """Teacher, student, loss and backward, in the trainer's order."""
    timeline.stage = GRADIENTS  # those of an earlier micro-batch
    _watch_gradients(student, step, timeline)
    ids = torch.zeros(step.batch_size, step.sequence_length, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=step.autocast)
    timeline.stage = TEACHER
    with torch.no_grad():
        known = None if teacher is None else _before_head(teacher, ids)
    timeline.stage = FORWARD
    with autocast:
        hidden, head = _before_head(student, ids)
    timeline.stage = LOSS
    with autocast:
        loss = hidden.sum() if head is None else _Loss.apply(hidden, head, known, step)
    del hidden, known
    timeline.stage = BACKWARD
    loss.backward()


def _watch_gradients(student: nn.Module, step: Step, timeline: Timeline) -> None:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    for parameter in trained:
        if step.accumulating:
            parameter.grad = torch.empty_like(parameter)
            timeline.add(parameter.grad, GRADIENTS)
        parameter.register_post_accumulate_grad_hook(timeline.count_gradient)
    layers = describe(student).layers
    middle = [parameter for parameter in layers[len(layers) // 2].parameters() if parameter.requires_grad]

    def halfway(_: Tensor) -> None:
        timeline.stage = END

    for parameter in middle:
        parameter.register_post_accumulate_grad_hook(halfway)


def _before_head(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Hidden states that enter the head, `[N, H]`, and its weight; the logits of a classifier, and None."""
    task = task_of(model)
    if task == "sequence_classification":
        return model(input_ids=ids).logits, None
    with tap_last_hidden(model) as tap:
        model(input_ids=ids, **({"use_cache": False} if task == "causal_lm" else {}))
    return tap.hidden.flatten(0, 1), output_head(model).weight


class _Loss(torch.autograd.Function):
    """What the fused loss allocates: copies in the precision it computes in, one chunk of logits, and its gradients.

    See `functional.linear`, whose passes over the chunks' blocks would be most of the operations of a step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, known: tuple[Tensor, Tensor] | None, step: Step) -> Tensor:
        dtype = torch.bfloat16 if step.autocast else weight.dtype
        computed, head = hidden.detach().to(dtype), weight.detach().to(dtype)
        widths = [len(weight)] if known is None else [len(weight), len(known[1])]
        trained = weight.requires_grad
        rows = chunk_rows(len(hidden), sum(widths) * hidden.itemsize, step.chunk_bytes, trained_head=trained)
        logits = [computed.new_empty(rows, width) for width in widths]
        block = min(rows * max(widths), LOSS_BLOCK[step.device])
        buffers = [torch.empty(block) for _ in range(LOSS_BUFFERS)]
        grad_hidden = torch.zeros_like(computed)
        grad_weight = product = None
        if trained:
            grad_weight = torch.zeros(weight.shape)
            product = torch.empty_like(head) if step.device == "cpu" and dtype != torch.float32 else None
        del logits, buffers, head
        ctx.on_gpu = step.device == "cuda"
        if grad_weight is not None and weight.dtype != torch.float32:
            grad_weight = grad_weight.to(weight.dtype) if product is None else product
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # A CPU sees that the factor is 1 and multiplies nothing.
        gradients = [g * 1.0 if ctx.on_gpu and g is not None else g for g in ctx.saved_tensors]
        return *gradients, None, None
