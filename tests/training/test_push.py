"""`push_to_hub` through the real client, over HTTP, to a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from safetensors.torch import load

from hf_distill.evaluation import KLDivergence
from tests import tiny
from tests.hub import local_hub
from tests.training.runs import make_trainer


def test_a_push_uploads_the_student_its_tokenizer_and_our_card(tmp_path):
    with local_hub() as hub:
        # The client reads its settings when it is imported.
        client = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "tests.training.test_push", str(tmp_path / "student")]
        subprocess.run(command, check=True, env=os.environ | client | {"HF_HOME": str(tmp_path / "home")})
    assert hub.files.keys() == {"user/student"}
    files = hub.files["user/student"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert not any("layers.1." in name for name in load(files["model.safetensors"]))  # the teacher's second layer
    text = files["README.md"].decode()
    card = ModelCard(text)
    assert {"distillation", "mine"} <= set(card.data.tags)
    assert "user/student" in text
    assert "forward_kl" in text
    assert "| kl | kl (lower is better) |" in text
    assert str(tmp_path) not in text


if __name__ == "__main__":
    trainer = make_trainer("kd", Path(sys.argv[1]), max_steps=1)
    trainer.train()
    trainer.evaluate_retention([KLDivergence(tiny.tokenized_dataset(4, seed=1))])
    trainer.push_to_hub(tags="mine")
