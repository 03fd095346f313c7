"""Where a teacher's weights are: moved, sharded as the student is, or left on the devices that the user chose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from hf_distill.anatomy import describe, unwrap


@dataclass(frozen=True)
class RemoteHead:
    """A head, or the norm before it, on another device than the student: hidden states go there, logits come back.

    Args:
        head: Maps hidden `[n, H]` on `device` to logits `[n, V]`.
        device: Where the head is.
        home: Where the logits are wanted.
    """

    head: Callable[[Tensor], Tensor]
    device: torch.device
    home: torch.device

    def __call__(self, hidden: Tensor) -> Tensor:
        """Project `hidden` `[n, H]` to logits `[n, V]`."""
        return self.head(hidden.to(self.device)).to(self.home)


def place(model: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, torch.device | None]:
    """Move or shard a frozen model for a run.

    `Accelerator.prepare_model` is not used: it would run the teacher under the student's autocast, write the teacher
    into `save_state`, and make `Trainer.evaluate` believe that the student has been prepared.

    Returns:
        What to call from now on, and the device that its inputs belong on; None where they go to its embedding's.

    Raises:
        ValueError: In a distributed run, the model is spread over devices or quantised on another process's device;
            or the run uses the first version of FSDP; or rank 0 alone has read it, for a run that does not shard it.
    """
    base = unwrap(model)
    distributed = accelerator.distributed_type != DistributedType.NO
    device_map = getattr(base, "hf_device_map", None) or {}
    if distributed and len(set(device_map.values())) > 1:
        raise ValueError(
            f"The teacher is spread over {sorted(map(str, set(device_map.values())))} by `device_map`, but this run "
            f"has {accelerator.num_processes} processes; load it without `device_map` (it is then moved or sharded "
            'with the student), or quantise it: `load_teacher(name, quantization="nf4")`.'
        )
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        device = base.get_input_embeddings().weight.device
        if distributed and device != accelerator.device:
            raise ValueError(
                f"The quantised teacher is on {device}, but this process trains on {accelerator.device}; load it with "
                f'`device_map={{"": {str(accelerator.device)!r}}}`.'
            )
        return model, None
    if device_map and not distributed:
        return model, None
    if accelerator.distributed_type == DistributedType.DEEPSPEED and _is_zero3(accelerator):
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator), accelerator.device
    if accelerator.distributed_type == DistributedType.FSDP:
        return _shard_fsdp2(model, accelerator), accelerator.device
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            "The teacher is empty on this process: the launcher announced FSDP with `fsdp_cpu_ram_efficient_loading`, "
            "so rank 0 alone has read it, but the trainer does not use FSDP; set "
            "`fsdp_cpu_ram_efficient_loading: false` under `fsdp_config` in the accelerate config, or use FSDP2."
        )
    return model.to(accelerator.device), None


def _shard_fsdp2(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard layer by layer: `prepare_fsdp` alone would gather the whole model for every forward pass."""
    if not accelerator.is_fsdp2:
        raise ValueError(
            "The teacher can be sharded by FSDP version 2 only; set `fsdp_version: 2` under `fsdp_config` in the "
            "accelerate config."
        )
    from trl.models.utils import prepare_fsdp

    with _weights_from_rank_0(model, accelerator):
        for layer in describe(model).layers:
            prepare_fsdp(layer, accelerator)
        return prepare_fsdp(model, accelerator)


@contextmanager
def _weights_from_rank_0(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """Where `load_teacher` let rank 0 alone read the weights, shard empty models and then send one weight at a time.

    Only rank 0 ever holds the whole model, in host memory; no device does. Accelerate prepares its students so.
    """
    empty = torch.tensor(float(any(weight.is_meta for weight in model.parameters())), device=accelerator.device)
    dist.all_reduce(empty, dist.ReduceOp.MAX)
    if not empty.item():
        yield
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy

    weights = model.state_dict()
    buffers = [{name: value for name, value in model.named_buffers() if name not in weights}]
    dist.broadcast_object_list(buffers, device=accelerator.device)
    model.to("meta").tie_weights()
    yield
    offloads = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offloads)
    set_model_state_dict(model, weights, options=options)
    for name, value in buffers[0].items():
        owner, _, own_name = name.rpartition(".")
        model.get_submodule(owner).register_buffer(own_name, value.to(accelerator.device), persistent=False)


def _is_zero3(accelerator: Accelerator) -> bool:
    return accelerator.state.deepspeed_plugin.zero_stage == 3
