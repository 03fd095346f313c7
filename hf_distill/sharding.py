"""Parameters that FSDP2 and ZeRO-3 keep in parts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial


def is_sharded(parameter: Tensor) -> bool:
    """Whether this rank holds a part of it."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def whole(parameter: Tensor) -> Tensor:
    """An ordinary tensor as it is; a shard of FSDP2 or a partition of ZeRO-3 gathered."""
    if hasattr(parameter, "ds_id"):
        return _copy_of_partitions(parameter)
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    # Every rank has the gradient of its own batch. Without the placements torch takes them for copies of one gradient
    # and each rank would keep only its own part of its shard.
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def _copy_of_partitions(parameter: Any) -> Tensor:
    """A parameter of ZeRO-3, whole; DeepSpeed partitions the gradient that reaches it as any other."""
    from deepspeed.runtime.zero import GatheredParameters, ZeroParamStatus

    # What its module has gathered already (a tied embedding) is for DeepSpeed to partition again.
    here = parameter.ds_status == ZeroParamStatus.AVAILABLE
    with nullcontext() if here else GatheredParameters([parameter]):
        return parameter.clone()
