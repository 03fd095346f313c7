"""The examples of docs/objectives.md run, and those that are said to be the same are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from trl import TrlParser

from hf_distill import KDConfig, LogitObjective
from hf_distill.training.terms import build_objectives
from tests.training.runs import logged, make_trainer


DOCUMENT = Path(__file__).parents[2] / "docs" / "objectives.md"
SETTINGS = {"divergence": "taid", "divergence_kwargs": {"t_start": 0.2, "alpha": 5e-4}}


def taid_example(language: str) -> str:
    section = DOCUMENT.read_text().partition("\n## TAID\n")[2].partition("\n## ")[0]
    [code] = re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    return code


def parsed(flags: list[str]) -> KDConfig:
    [args] = TrlParser(KDConfig).parse_args_and_config(["--output_dir", "out", "--use_cpu", *flags])
    return args


def from_flags(tmp_path: Path) -> KDConfig:
    python, recipe, *flags = shlex.split(taid_example("sh"))
    assert python == "python"
    assert "TrlParser" in (DOCUMENT.parents[1] / recipe).read_text()
    return parsed(flags)


def from_yaml(tmp_path: Path) -> KDConfig:
    file = tmp_path / "taid.yaml"
    file.write_text(taid_example("yaml"))
    return parsed(["--config", str(file)])


@pytest.mark.parametrize("read", [from_flags, from_yaml])
def test_flags_and_yaml_set_taid_as_the_objective_does(read, tmp_path):
    names = {"LogitObjective": LogitObjective}
    exec(taid_example("python"), names)
    [expected] = names["objectives"]
    assert expected.config() == LogitObjective(0.5, **SETTINGS).config()
    [found] = build_objectives(read(tmp_path), None)
    assert found.config() == expected.config()


def test_a_run_with_the_settings_of_the_example_begins_at_its_t(tmp_path):
    trainer = make_trainer("kd", tmp_path, max_steps=3, **SETTINGS)
    trainer.train()
    assert logged(trainer, "taid_t") == pytest.approx([0.2, 0.6, 1.0])
