"""What a model costs to keep and to run: its size, its speed and its memory."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_distill.anatomy import unwrap
from hf_distill.evaluation.speed import tokens_per_second


# What is timed: small enough for a CPU, long enough that the layers and not their launches are measured.
ROWS, LENGTH = 4, 128
SPEED_ROUNDS = 3
PROFILER_LOG_LEVEL = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class Footprint:
    """Size, speed and memory of one model. What could not be measured is None.

    Args:
        model: "teacher", "student", or the name of a model that the student is compared with.
        parameters: How many, those of a PEFT adapter included; of packed 4-bit weights all of them.
        weight_bytes: Bytes on disk of the weights as `save_pretrained` writes them, a PEFT student's base included.
        tokens_per_second: Read in forward passes over 4 rows of 128 tokens, of less for models of few positions.
        peak_bytes: The weights and the most that such a pass allocates beside them.
        dtype: Of the weights.
        device: Where it ran: the GPU's name, or the CPU and its threads.
    """

    model: str
    parameters: int
    weight_bytes: int
    tokens_per_second: float | None
    peak_bytes: int | None
    dtype: str | None
    device: str | None


def footprint(name: str, model: nn.Module, speed: float | None = None) -> Footprint:
    """Measure a model where it is, in its own dtype; call it in `preserved_state`.

    Args:
        name: Of the model in the report.
        model: A language model or a classifier, wrapped or not.
        speed: Its tokens per second, where they are known; else they are measured.
    """
    base = unwrap(model)
    size = weight_bytes(model)
    with _as_saved(model):
        return Footprint(
            model=name,
            parameters=_count_parameters(base, model),
            weight_bytes=size,
            tokens_per_second=tokens_per_second(model, sample_ids(base)) if speed is None else speed,
            peak_bytes=size + peak_bytes(model, sample_ids(base)),
            dtype=str(base.dtype).removeprefix("torch."),
            device=_device_name(base.device),
        )


def speeds_by_turns(models: Mapping[str, nn.Module]) -> dict[str, float]:
    """Tokens per second of each model, the median of passes by turns: what else the machine does slows all of them."""
    measured: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(SPEED_ROUNDS):
        for name, model in models.items():
            measured[name].append(speed_once(model))
    return {name: statistics.median(speeds) for name, speeds in measured.items()}


def speed_once(model: nn.Module) -> float:
    """Tokens per second of one pass, after one that is not timed."""
    with _as_saved(model):
        return tokens_per_second(model, sample_ids(unwrap(model)), repeats=1)


@contextmanager
def _as_saved(model: Any) -> Iterator[None]:
    """Run a model without what accelerate puts around a trained one: a copy of its logits in fp32."""
    wrapped, original = model.__dict__.get("forward"), getattr(model, "_original_forward", None)
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are saved: every tensor of its state once, a tied head not twice."""
    tensors = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
    return sum(_numel(value) * value.element_size() for value in {id(value): value for value in tensors}.values())


def peak_bytes(model: nn.Module, input_ids: Tensor) -> int:
    """The most that one forward pass has allocated at any time, beside what was there before it."""
    with torch.no_grad():
        if input_ids.is_cuda:
            before = torch.cuda.memory_allocated(input_ids.device)
            torch.cuda.reset_peak_memory_stats(input_ids.device)
            model(input_ids=input_ids)
            return torch.cuda.max_memory_allocated(input_ids.device) - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with _quiet_profiler(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            model(input_ids=input_ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's library, which reads this when it is first used, from writing two lines a pass to stderr."""
    given = os.environ.get(PROFILER_LOG_LEVEL)
    os.environ[PROFILER_LOG_LEVEL] = given or "99"
    try:
        yield
    finally:
        if given is None:
            del os.environ[PROFILER_LOG_LEVEL]


def sample_ids(base: Any) -> Tensor:
    """Ids `[4, 128]`, or half as long as the model has positions, from a generator of their own."""
    config = base.config.get_text_config()
    length = min(LENGTH, (getattr(config, "max_position_embeddings", None) or 2 * LENGTH) // 2)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, length), generator=generator)
    return ids.to(base.device)


def _device_name(device: torch.device) -> str:
    """What a speed depends on beside the model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s'[: threads != 1]}" if device.type == "cpu" else device.type


def _count_parameters(base: Any, model: nn.Module) -> int:
    """Parameters of the whole model, and of the adapter around its base."""
    own = {id(parameter) for parameter in base.parameters()}
    around = sum(_numel(parameter) for parameter in model.parameters() if id(parameter) not in own)
    if any(hasattr(parameter, "ds_numel") for parameter in base.parameters()):
        return around + sum(_numel(parameter) for parameter in base.parameters())
    return around + base.num_parameters()


def _numel(tensor: Tensor) -> int:
    """Elements of the whole tensor; ZeRO-3 leaves a part of it here."""
    return getattr(tensor, "ds_numel", tensor.numel())
