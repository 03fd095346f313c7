"""The examples of docs/quantisation.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hf_distill.students import QuantizeReport
from hf_distill.students.quantizers import QUANTIZERS
from tests.students.rounding import IDS, student


DOCUMENT = Path(__file__).parents[2] / "docs" / "quantisation.md"


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torchao")
    pytest.importorskip("compressed_tensors")
    monkeypatch.chdir(tmp_path)
    rounding, training = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    student().save_pretrained("student")
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
    names = {"student": student(), "teacher": student(), "held_out": rows, "rows": rows}
    exec(rounding, names)
    assert "int8 by torchao" in capsys.readouterr().out
    exec(training.replace('KDConfig("qad", ', 'KDConfig("qad", max_steps=1, use_cpu=True, report_to="none", '), names)
    assert QuantizeReport.load("student-qad") == names["report"]


def test_every_method_has_a_row_that_says_how_it_is_installed():
    rows = [row for row in DOCUMENT.read_text().splitlines() if row.startswith("| `") and "hf_distill[" in row]
    for method in QUANTIZERS:
        [row] = [row for row in rows if f"`{method}`" in row.split("|")[1]]
        assert f"hf_distill[{QUANTIZERS[method](None).extra}]" in row
