"""The example of docs/compress.md runs."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import AutoModelForCausalLM

from tests import tiny


DOCUMENT = Path(__file__).parents[2] / "docs" / "compress.md"


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 512}
    tiny.model("llama", layers=3, vocab_size=320, **sizes).save_pretrained("teacher")
    tiny.tokenizer().save_pretrained("teacher")
    names = {"teacher": "teacher", "rows": tiny.text_dataset(8), "held_out": tiny.text_dataset(4)}
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    exec(block.replace("max_steps=2", 'max_steps=2, use_cpu=True, report_to="none"'), names)
    assert [row.name for row in names["report"].rows] == ["teacher", "1-P", "2-KD", "3-Q"]
    AutoModelForCausalLM.from_pretrained("small/2-KD")
