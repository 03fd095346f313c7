"""A short pipeline, and its death: shared by the tests and by the processes that they kill."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from transformers import TrainerCallback

from tests import tiny


SETTINGS = {
    "prune": {"intermediate_size": 128, "num_hidden_layers": 2},
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "report_to": "none",
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "steps",
    "save_steps": 1,
    "seed": 0,
}


class Death(TrainerCallback):
    """Kills the process in training, as a lost node would: no cleanup, no exception."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def die_in(step: str) -> None:
    """Make a step kill its process when it has done most of its work."""
    from hf_distill.pipelines import steps

    if step == "KD":
        trainer = steps.KDTrainer

        def with_death(*args, **kwargs):
            made = trainer(*args, **kwargs)
            made.add_callback(Death())
            return made

        steps.KDTrainer = with_death
        return
    action = steps.ACTIONS[step]

    def dying(context, source, written, run):
        action(context, source, written, run)
        os.kill(os.getpid(), signal.SIGKILL)

    steps.ACTIONS[step] = dying


def main(root: str, order: str, victim: str) -> None:
    """Run the pipeline and be killed in a step."""
    from hf_distill.pipelines import CompressConfig, compress

    die_in(victim)
    args = CompressConfig(f"{root}/out", order=order, **SETTINGS)
    compress(Path(root) / "teacher", tiny.tokenized_dataset(16), args)


if __name__ == "__main__":
    main(*sys.argv[1:])
