"""`hf-distill compress` from flags and from a YAML file."""

import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_distill.cli.main import main
from hf_distill.students import quantize
from tests import tiny


@pytest.fixture
def given(tmp_path):
    """Flags by name."""
    sizes = {"hidden_size": 64, "intermediate_size": 256}
    tiny.model("llama", **sizes).save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    tiny.text_dataset(8).to_json(tmp_path / "texts.jsonl")
    return {
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "texts.jsonl"),
        "eval_dataset": str(tmp_path / "texts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "prune": {"intermediate_size": 128},
        **{"max_steps": 2, "report_to": "none", "bf16": False, "use_cpu": True},
    }


def test_flags_and_yaml_make_the_same_stages(given, tmp_path, capsys):
    flags = [part for name, value in given.items() if name != "prune" for part in (f"--{name}", str(value))]
    assert main(["compress", *flags, "--prune", json.dumps(given["prune"])]) == 0
    assert "| 3-Q " in capsys.readouterr().out
    made = (tmp_path / "out" / "2-KD" / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    assert main(["compress", "--config", str(tmp_path / "run.yaml")]) == 0
    assert (tmp_path / "out" / "2-KD" / "model.safetensors").stat().st_mtime_ns == made
    report = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["teacher", "1-P", "2-KD", "3-Q"]


def test_what_is_wrong_is_said_in_a_line(given, capsys):
    assert main(["compress", "--dataset_name", "data"]) == 2
    assert "--teacher_model_name_or_path` is missing" in capsys.readouterr().err
    flags = ["--teacher_model_name_or_path", "t", "--dataset_name", "d", "--output_dir", "o", "--order", "P-P"]
    assert main(["compress", *flags]) == 2
    assert "`order` is 'P-P'" in capsys.readouterr().err
    Path(given["output_dir"]).with_suffix(".yaml").write_text("order: [P")
    assert main(["compress", "--config", f"{given['output_dir']}.yaml"]) == 2
    assert "`--config` is no YAML" in capsys.readouterr().err


def adapter(folder):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig()).save_pretrained(folder)


def other_family(folder):
    tiny.model("mixtral").save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "prune", "message"),
    [
        (other_family, {"num_hidden_layers": 1}, "family 'mixtral' cannot be pruned; known are"),
        (lambda folder: None, {"num_attention_heads": 3}, "Allowed (num_attention_heads, num_key_value_heads): ["),
        (lambda folder: quantize(tiny.model(), folder / "q", "int8"), {"params_ratio": 0.9}, "quantised already"),
        (adapter, {"params_ratio": 0.9}, "merge_and_unload()"),
    ],
    ids=["family", "spec", "quantised", "adapter"],
)
def test_what_cannot_be_compressed_is_refused_before_weights_are_read(spoil, prune, message, given, capsys):
    folder = Path(given.pop("teacher_model_name_or_path"))
    spoil(folder)
    folder = folder / "q" if (folder / "q").is_dir() else folder
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"these are no weights")
    flags = [part for name, value in given.items() if name != "prune" for part in (f"--{name}", str(value))]
    assert main(["compress", "--teacher_model_name_or_path", str(folder), *flags, "--prune", json.dumps(prune)]) == 2
    found = capsys.readouterr().err
    assert message in found
    assert "Traceback" not in found
