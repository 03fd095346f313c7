"""The examples of docs/pruning.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import DataCollatorForSeq2Seq

from hf_distill.students import ImportanceScores
from hf_distill.students.importance import METHODS
from tests import tiny
from tests.training.runs import logged


DOCUMENT = Path(__file__).parents[2] / "docs" / "pruning.md"


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    names = {
        "teacher": tiny.model("llama", layers=3, initializer_range=0.1, vocab_size=320, **sizes),
        "rows": tiny.tokenized_dataset(8),
        "collator": DataCollatorForSeq2Seq(tiny.tokenizer()),
    }
    walk = DOCUMENT.read_text().partition("\n## What follows from the report\n")[0]
    blocks = re.findall(r"```python\n(.*?)```", walk, flags=re.DOTALL)
    whole, seen = sum(p.numel() for p in names["teacher"].parameters()), []
    assert len(blocks) == 5
    for block in blocks:
        exec(block.replace("max_steps=", 'use_cpu=True, report_to="none", logging_steps=1, max_steps='), names)
        seen.append(sum(p.numel() for p in names["student"].parameters()) / whole)
    first, guided, stepped, gated, dropped = seen
    assert first == guided
    assert abs(first - 0.7) < 0.06
    assert abs(stepped - 0.5) < 0.06
    assert names["student"].config.intermediate_size == 128
    assert names["student"].config.num_attention_heads == 2
    assert gated == dropped < 0.5
    assert ImportanceScores.load("importance").provenance.keys() == {"mlp", "heads", "hidden", "layers"}
    assert names["gates"].open_share() < 1
    assert len(logged(names["trainer"], "loss")) == 2


def test_the_table_has_every_method():
    table = re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert table == list(dict.fromkeys(method for methods in METHODS.values() for method in methods))
