"""The runs of `runs.py` under FSDP2 on gloo ranks, which accelerate offers to GPUs only."""

from __future__ import annotations

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from tests.training import runs


_start = PartialState.__init__


def _start_as_gpus(self, *args, **kwargs) -> None:
    _start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _start_as_gpus
    runs.main()
