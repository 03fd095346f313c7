from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny
from tests.training.runs import logged


DOCUMENT = Path(__file__).parents[2] / "docs" / "adding_an_objective.md"


def test_the_worked_example_runs_and_is_short(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) < 40
    monkeypatch.chdir(tmp_path)
    student, teacher = tiny.model("llama", layers=1), tiny.model("llama", seed=1, hidden_size=48)
    rows = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [9, 10, 11, 12])]
    names = {"student": student, "teacher": teacher, "dataset": rows}
    code = code.replace(
        '"student", max_steps=2', '"student", max_steps=2, use_cpu=True, report_to="none", logging_steps=1'
    )
    exec(code, names)
    losses = logged(names["trainer"], "norm_loss")
    assert len(losses) == 2
    assert names["trainer"].objectives[1].factor.item() != pytest.approx(1.0, abs=1e-9)
