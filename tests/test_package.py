"""What holds for the package as a whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_distill
from hf_distill.functional import DIVERGENCES


ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_imported():
    for name in hf_distill.__all__:
        assert getattr(hf_distill, name).__module__.startswith("hf_distill.")
    with pytest.raises(AttributeError, match="KDTrianer"):
        hf_distill.KDTrianer  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, hf_distill; print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_every_divergence_has_a_row_with_its_source_in_the_docs():
    rows = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    for name, divergence in DIVERGENCES.items():
        [row] = [row for row in rows if row.startswith(f"| `{name}` |")]
        assert f"arXiv:{divergence.paper}" in row


def test_recipes_stay_short_and_say_how_they_are_run():
    for name in ("quickstart", "classify_reviews", "lora_student", "llama_70b_to_8b"):
        text = (ROOT / "recipes" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 80, name
        for heading in ("Command:", "Hardware:", "Minutes:", "Result:"):
            assert heading in text, (name, heading)
