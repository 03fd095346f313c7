"""Processes of a test's own, forked from a server that imports the libraries once for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp


# Forked from the test itself they would inherit its OpenMP threads, which do not survive that.
multiprocessing.set_forkserver_preload(["hf_distill.training.sft", "tests.training.runs", "tests.pipelines.runs"])


def exit_code(function: Callable[..., None], *args: Any) -> int:
    """Run a function in a process and return its exit code, negative for the signal that killed it."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    process.join()
    return process.exitcode


def run_on_two_ranks(function: Callable[[int], None], folder: Path) -> None:
    """Run `function(rank)` on two gloo ranks; an error of one is raised here. `folder` is where they meet."""
    mp.start_processes(_one_rank, args=(function, f"file://{folder}/group"), nprocs=2, start_method="forkserver")


def _one_rank(rank: int, function: Callable[[int], None], group: str) -> None:
    dist.init_process_group("gloo", init_method=group, rank=rank, world_size=2)
    function(rank)
    dist.barrier()
    dist.destroy_process_group()
