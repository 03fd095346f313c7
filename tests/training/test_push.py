"""`push_to_hub` through the real client, over HTTP, to a server on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillationCallback, RetentionCallback
from hf_distill.cards import DistillationCard
from hf_distill.cards.hub import PEFT_CARD
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from tests import tiny
from tests.hub import local_hub, talk_to
from tests.training.runs import COMMON, make_trainer


EVERY_SAVE = {"hub_strategy": "every_save", "hub_always_push": True, "save_strategy": "steps", "save_steps": 1}
TO_HUB = {"push_to_hub": True, "hub_model_id": "me/student"}


@pytest.fixture
def hub(monkeypatch):
    """A server that the client of this process talks to."""
    with local_hub() as server:
        talk_to(server.url, monkeypatch)
        yield server


class AwaitPush(TrainerCallback):
    """Begins a step when the last push is over: it runs beside the training, and sends the files as they are then."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


def plain_trainer(output_dir, **config):
    """A `Trainer` of transformers that distils by the callback."""
    args = TrainingArguments(str(output_dir), **(COMMON | {"remove_unused_columns": False} | config))
    trainer = Trainer(
        tiny.model(layers=1),
        args,
        train_dataset=tiny.tokenized_dataset(16),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        processing_class=tiny.tokenizer(),
    )
    trainer.add_callback(DistillationCallback(trainer, tiny.model(seed=1, layers=2)))
    return trainer


def is_ours(card: bytes, folder: Path) -> bool:
    text = card.decode()
    assert str(folder) not in text
    assert PEFT_CARD not in text
    return "distilled with hf_distill" in text and "forward_kl" in text


@pytest.mark.parametrize(
    ("kind", "lora"), [("kd", False), ("kd", True), ("sft", True), ("sft-callback", True), ("plain", False)]
)
def test_every_push_of_a_run_carries_the_card_of_its_step(kind, lora, hub, tmp_path):
    config = {"max_steps": 2} | EVERY_SAVE | TO_HUB
    if kind == "plain":
        trainer = plain_trainer(tmp_path / "out", **config)
    else:
        trainer = make_trainer(kind, tmp_path / "out", lora=lora, **config)
    trainer.model.config._name_or_path = str(tmp_path / "base")  # PEFT writes it into the cards that it touches
    trainer.add_callback(AwaitPush(trainer))
    trainer.train()
    trainer.save_model()  # pushes again, after training

    pushed = [files["README.md"] for files in hub.commits if "README.md" in files]
    assert len(pushed) == 3
    assert all(is_ours(card, tmp_path) for card in pushed)
    steps = [ModelCard(card.decode()).data.distillation["steps"] for card in pushed]
    assert steps == [1, 2, 2]
    assert ModelCard(pushed[-1].decode()).data["library_name"] == ("peft" if lora else "transformers")
    assert ("adapter_model.safetensors" if lora else "model.safetensors") in hub.files["me/student"]


@pytest.mark.parametrize("kind", ["kd", "sft-callback"])
def test_peft_writes_over_no_card_and_leaves_no_draft(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, lora=True, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.model.config._name_or_path = str(tmp_path / "base")
    trainer.train()
    trainer.create_model_card(license="mit", tags="mine")
    card = (tmp_path / "README.md").read_text()

    trainer.save_model()

    assert (tmp_path / "README.md").read_text() == card
    assert {"distillation", "mine"} <= set(ModelCard(card).data.tags)
    assert is_ours((tmp_path / "checkpoint-1" / "README.md").read_bytes(), tmp_path)


@pytest.mark.parametrize("kind", ["kd", "plain"])
def test_what_was_told_and_measured_is_in_the_pushed_card_and_its_index(kind, hub, tmp_path):
    trainer = plain_trainer(tmp_path, max_steps=1) if kind == "plain" else make_trainer(kind, tmp_path, max_steps=1)
    held_out = tiny.tokenized_dataset(4, seed=2)
    trainer.add_callback(
        RetentionCallback(trainer, [Perplexity(held_out), KLDivergence(held_out), Top1Agreement(held_out)])
    )
    trainer.create_model_card(license="mit")
    trainer.train()
    trainer.push_to_hub()

    [files] = hub.commits
    (tmp_path / "card.json").write_bytes(files["card.json"])
    card, report = ModelCard(files["README.md"].decode()), DistillationCard.load(tmp_path).report
    assert report == trainer.retention_report
    values = [value for row in report.rows for value in (row.student, row.retention) if value is not None]
    assert [result.metric_value for result in card.data.eval_results] == values
    assert len(values) == 5  # of the KL there is no retention
    assert card.data.license == "mit"
    assert card.data.distillation["mean_retention_interval"] == [report.mean_ci_low, report.mean_ci_high]
    assert ("the loss of Trainer" in card.text) is (kind == "plain")


def test_without_the_callback_the_trainer_writes_its_own_card(tmp_path):
    trainer = plain_trainer(tmp_path, max_steps=1)
    trainer.remove_callback(DistillationCallback)
    trainer.train()
    trainer.create_model_card()

    assert "hf_distill" not in (tmp_path / "README.md").read_text()
    assert not hasattr(trainer, "retention_report")


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
