"""A pipeline that is killed (SIGKILL, in processes of its own) goes on, and ends with the same models."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.runs import run, run_and_die, run_and_die_after
from tests.processes import exit_code


PLAIN, TRAINED = ("begin", "written", "done"), ("training", "checkpoint", "written", "done")
# Its end is amid an epoch, and its last step would show in the weights if it were made twice.
SHORT = {"max_steps": 3, "lr_scheduler_type": "constant"}
IN_STEPS = {"order": "P-KD", "steps": 2, "prune": {"intermediate_size": 96, "round_to": 32}}


@pytest.fixture
def whole(teacher, tmp_path):
    """The folder of a run that nothing disturbs, with a copy of the teacher."""
    (tmp_path / "whole").mkdir()
    shutil.copytree(teacher, tmp_path / "whole" / "teacher")
    return tmp_path / "whole"


def models(root: Path) -> dict[str, tuple[dict, bytes]]:
    """Header and tensors of every weight file; torchao leaves the order of the metadata to chance."""
    found = {}
    for path in sorted(root.glob("out/*/model.safetensors")):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        found[path.parent.name] = (json.loads(raw[8:end]), raw[end:])
    return found


def said(root: Path) -> list[tuple]:
    """What the stages report: what was cut, each step's loss, what was rounded."""
    rows = json.loads((root / "out" / "compress.json").read_text())["rows"]
    return [(row["name"], row["parameters"], row["weight_bytes"], row["facts"]) for row in rows]


def done(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "out").iterdir() if path.is_dir() and not path.name.startswith("."))


def compare(root: Path, whole: Path) -> None:
    found, expected = models(root), models(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert said(root) == said(whole)
    assert not list((root / "out").glob(".*"))


def killed_in_every_stage(whole: Path, changed: dict) -> None:
    """Kill one run again and again: at every moment of its first stage, then of its second, and so on."""
    changed = SHORT | changed
    assert exit_code(run, whole, changed) == 0
    root, stages = whole.parent, done(whole)
    for number, stage in enumerate(stages):
        trains = stage.endswith(("KD", "teacher"))
        for moment in TRAINED if trains else PLAIN:
            assert exit_code(run_and_die, root, changed, stage, moment) == -signal.SIGKILL, (stage, moment)
            assert done(root) == stages[: number + (moment == "done")], (stage, moment)
            if moment == "training":
                assert (root / "out" / f".{stage}.unfinished" / "run" / "checkpoint-2").is_dir()
    assert exit_code(run, root, changed) == 0
    compare(root, whole)


def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_models(whole):
    killed_in_every_stage(whole, {"order": "P-KD-Q", "adapt_teacher": 3})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        IN_STEPS,
        {"order": "P-Q-KD"},
        {"order": "Q-P-KD", "quantization": "w4a16"},
        {"order": "KD-Q-P", "quantization": "w8a16"},
    ],
    ids=["steps", "P-Q-KD", "Q-P-KD", "KD-Q-P"],
)
def test_the_same_in_other_orders(changed, whole):
    killed_in_every_stage(whole, changed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"order": "P-KD-Q", "adapt_teacher": 4}, IN_STEPS, {"order": "Q-P-KD"}],
    ids=["adapt", "steps", "Q-P-KD"],
)
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_models(changed, whole):
    assert exit_code(run, whole, changed) == 0
    seconds, root, killed = json.loads((whole / "seconds.json").read_text()), whole.parent, 0
    for moment in np.random.default_rng(0).uniform(0, seconds, 20):
        code = exit_code(run_and_die_after, root, changed, float(moment))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        if code == 0:  # what the last ones had left was little: begin anew
            compare(root, whole)
            shutil.rmtree(root / "out")
    assert killed > 5
    assert exit_code(run, root, changed) == 0
    compare(root, whole)
