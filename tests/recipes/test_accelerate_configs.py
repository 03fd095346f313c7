"""The accelerate configs are accepted whole by accelerate itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType


FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {"ddp": DistributedType.MULTI_GPU, "fsdp2": DistributedType.FSDP, "zero3": DistributedType.DEEPSPEED}


def test_every_config_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_knows_every_key(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises for unknown keys of the outer level
    assert config.distributed_type == KINDS[name]
    assert config.num_processes == 8
    assert config.mixed_precision == "bf16"
    options = vars(launch_command_parser().parse_args(["script.py"]))
    inner = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert [key for key in inner if key not in options] == []


def test_fsdp_is_version_2_and_writes_models_that_load():
    fsdp = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())["fsdp_config"]
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_reshard_after_forward"] is True
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_zero_is_stage_3_and_saves_gathered_weights():
    zero = yaml.safe_load((FOLDER / "zero3.yaml").read_text())["deepspeed_config"]
    assert zero["zero_stage"] == 3
    assert zero["zero3_save_16bit_model"] is True
