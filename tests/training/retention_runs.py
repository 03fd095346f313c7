"""A run that stops early by its retention, for the test and for the script that it starts on two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback

from hf_distill import RetentionCallback
from hf_distill.evaluation import KLDivergence, Perplexity
from hf_distill.evaluation.scoring import Lineup
from tests import tiny
from tests.training.runs import leave, make_trainer


class RoundedPerplexity(Perplexity):
    """A perplexity of the student that is another one on every rank, as on devices that round differently.

    It grows by turns on one rank where it falls on the other.
    """

    def __init__(self, dataset, rank: int) -> None:
        super().__init__(dataset)
        self.rank, self.calls = rank, 0

    def score(self, lineup: Lineup):
        self.calls += 1
        scores = super().score(lineup)
        if self.rank:
            scores["student"].numerator[:] -= 3 * self.calls
        return scores


class Spoils(TrainerCallback):
    """Moves the student away from the teacher after two steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 3:
            model.lm_head.weight.data.mul_(-3)


def make(folder: Path, rank: int = 0, **settings):
    """The trainer and its callback."""
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    best = {"metric_for_best_model": "retention", "load_best_model_at_end": True}
    trainer = make_trainer("kd", folder, **(each_step | best | settings))
    held_out = tiny.tokenized_dataset(5, seed=2)
    callback = RetentionCallback(trainer, [RoundedPerplexity(held_out, rank), KLDivergence(held_out)])
    for item in (Spoils(), callback, EarlyStoppingCallback(2)):
        trainer.add_callback(item)
    return trainer, callback


def outcome(trainer, callback) -> dict:
    """What a rank holds in the end, and what the run was."""
    entries = [item for item in trainer.state.log_history if "eval_retention" in item]
    names = [name for name in entries[0] if name.startswith(("eval_retention", "eval_student"))]
    return {
        "world": trainer.accelerator.num_processes,
        "stopped": trainer.state.global_step,
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
        "logged": [{name: entry[name] for name in names} for entry in entries],
        "report": callback.report.to_dict()["rows"],
    }


def main() -> None:
    """Train on the ranks that the launcher started; each saves what it holds."""
    from accelerate import PartialState

    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = PartialState(cpu=True).process_index
    trainer, callback = make(folder / "run", rank, **settings)
    trainer.train()
    (folder / f"rank{rank}.json").write_text(json.dumps(outcome(trainer, callback)))
    leave()


if __name__ == "__main__":
    main()
