"""`hf-distill train` distils from flags or a YAML file alone."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from hf_distill.cli.main import main
from tests import tiny


@pytest.fixture
def given(tmp_path):
    """Flags by name, as a user with three things on disk would give them."""
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.model("llama", seed=seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    tiny.messages_dataset(8).to_json(tmp_path / "chats.jsonl")
    return {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "chats.jsonl"),
        "eval_dataset": str(tmp_path / "chats.jsonl"),
        "output_dir": str(tmp_path / "out"),
        **{"max_steps": 2, "report_to": "none", "bf16": False, "use_cpu": True, "save_strategy": "no"},
    }


def flags(given):
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def test_flags_give_a_student_its_report_and_its_card(given, tmp_path, capsys):
    assert main(["train", *flags(given), "--temperature", "2"]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "retention.json").read_text())
    assert [row["metric"] for row in report["rows"]] == ["perplexity", "kl", "top1_agreement"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.distillation["losses"][1] == {"name": "forward_kl", "weight": 0.5, "temperature": 2.0}
    said = capsys.readouterr().out
    assert "Mean retention" in said
    assert "perplexity" in said


def test_a_yaml_file_says_the_same_and_flags_win_over_it(given, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given | {"use_peft": True, "lora_r": 2}))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--lora_r", "3"]) == 0
    assert (tmp_path / "out" / "retention.json").is_file()
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].r == 3


@pytest.mark.parametrize("missing", ["model_name_or_path", "dataset_name"])
def test_what_is_missing_is_said_in_a_line(given, missing, capsys):
    del given[missing]
    assert main(["train", *flags(given)]) == 2
    assert f"`--{missing}` is missing" in capsys.readouterr().err


def test_an_unknown_flag_of_another_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["cache", "info", "folder", "--kd_weight", "1"])
    assert "unrecognized arguments: --kd_weight 1" in capsys.readouterr().err
