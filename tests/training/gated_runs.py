"""A run with gates and one with layers left out, for the script that tests start on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_distill.objectives.schedules import linear
from tests.training.runs import leave, logged, trained
from tests.training.test_gates import gated
from tests.training.test_layer_drop import run


def make(kind: str, folder: Path, settings: dict):
    """The trainer of one kind."""
    if kind == "gates":
        return gated(folder, ramp=linear(1.0, 1.0), objective_lr_multiplier=2.0, **settings)[0]
    return run(folder, 0.5, seed=1, **settings)


def main() -> None:
    """Train every kind on the ranks that the launcher started; rank 0 saves what came out."""
    folder, settings, kinds = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    for name in kinds:
        trainer = make(name, folder / "run", settings)
        trainer.train()
        if trainer.is_world_process_zero():
            world = trainer.accelerator.num_processes
            torch.save((trained(trainer), logged(trainer, "loss"), world), folder / f"{name}.pt")
    leave()


if __name__ == "__main__":
    main()
