"""A short pipeline, and its death: run in processes that kill themselves, as a lost node would end them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from hf_distill.pipelines import CompressConfig, compress, steps
from hf_distill.pipelines.stage import Stage
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


def run(root: Path, changed: dict[str, Any]) -> None:
    """Run the pipeline of `root/teacher` in `root/out`, and note how long that took."""
    start = time.perf_counter()
    compress(root / "teacher", tiny.tokenized_dataset(16), CompressConfig(str(root / "out"), **(SETTINGS | changed)))
    (root / "seconds.json").write_text(json.dumps(time.perf_counter() - start))


def run_and_die(root: Path, changed: dict[str, Any], stage: str, moment: str) -> None:
    """The same, until a moment of a stage.

    Args:
        root: As in `run`.
        changed: As in `run`.
        stage: Its name.
        moment: "begin"; "training", before the third step; "checkpoint", while the third is written; "written", when
            the model is, in the place where the stage works; or "done", when it has just appeared in its own.
    """
    make, move = Stage.run, os.replace

    def dying(self, build):
        def until(written, kept):
            if moment == "begin":
                die()
            if moment == "training":
                _die_before_the_third_step()
            if moment == "checkpoint":
                _die_in_the_third_checkpoint()
            facts = build(written, kept)
            if moment == "written":
                die()
            return facts

        return make(self, until if self.name == stage else build)

    def moved(source, target):
        move(source, target)
        if moment == "done" and Path(target).name == stage:
            die()

    Stage.run, os.replace = dying, moved
    run(root, changed)


def run_and_die_after(root: Path, changed: dict[str, Any], seconds: float) -> None:
    """The same, for some seconds, whatever happens then."""

    def wait() -> None:
        time.sleep(seconds)
        die()

    threading.Thread(target=wait, daemon=True).start()
    run(root, changed)


def die() -> None:
    """No cleanup, no exception."""
    os.kill(os.getpid(), signal.SIGKILL)


class Death(TrainerCallback):
    """Comes before the third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            die()


def _die_before_the_third_step() -> None:
    trainer = steps.KDTrainer

    def mortal(*args, **kwargs):
        made = trainer(*args, **kwargs)
        made.add_callback(Death())
        return made

    steps.KDTrainer = mortal


def _die_in_the_third_checkpoint() -> None:
    save = TrainerState.save_to_json

    def torn(self, path):
        if self.global_step < 3:
            return save(self, path)
        Path(path).write_text('{"global_step": ')
        return die()

    TrainerState.save_to_json = torn
