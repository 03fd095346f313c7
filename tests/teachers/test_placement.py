from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, dispatch_model
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor

from hf_distill.functional import LMHead
from hf_distill.signals import Signal
from hf_distill.teachers import ModelTeacher, load_teacher
from hf_distill.teachers.placement import RemoteHead
from tests import tiny
from tests.processes import run_on_two_ranks


LOGITS = frozenset({Signal.LOGITS})
BATCH = {"input_ids": torch.arange(10, 22).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def run_of(kind: DistributedType = DistributedType.NO, device: str = "cpu", **state) -> SimpleNamespace:
    """What a teacher asks of an Accelerator."""
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=1 if kind == DistributedType.NO else 2,
        device=torch.device(device),
        is_fsdp2=state.pop("is_fsdp2", False),
        state=SimpleNamespace(**state),
    )


def logits_of(teacher: ModelTeacher) -> torch.Tensor:
    projection = teacher.signals(BATCH, LOGITS).logits
    return projection.head(projection.hidden)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU])
def test_a_plain_teacher_is_moved_to_the_device_of_the_process(kind):
    teacher = ModelTeacher(tiny.model())
    teacher.prepare(run_of(kind, "meta"))
    assert {parameter.device.type for parameter in teacher.model.parameters()} == {"meta"}


def test_a_teacher_that_only_rank_0_has_read_needs_a_run_that_shards_it():
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        ModelTeacher(tiny.model().to("meta")).prepare(run_of(DistributedType.MULTI_GPU))


@pytest.fixture
def bf16_accelerator():
    """An accelerator of its own: all of a process share one state, which earlier runs have set to their precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_accelerator_does_not_learn_of_the_teacher(bf16_accelerator):
    accelerator = bf16_accelerator
    model = tiny.model()
    teacher = ModelTeacher(model)
    forward = model.forward
    teacher.prepare(accelerator)
    assert accelerator._models == []  # else it would be in save_state, and evaluate() would not prepare the student
    assert model.forward == forward  # no autocast
    assert logits_of(teacher).dtype == torch.float32


def spread_model(tmp_path) -> nn.Module:
    model = tiny.model()
    device_map = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    return dispatch_model(
        model, device_map | {"lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )


def test_a_spread_teacher_stays_where_it_is_in_a_single_process(tmp_path):
    expected = tiny.model()(**BATCH).logits.detach()
    teacher = ModelTeacher(spread_model(tmp_path))
    teacher.prepare(run_of())
    assert teacher.model.lm_head.weight.is_meta  # still on the disk
    torch.testing.assert_close(logits_of(teacher), expected)


def test_a_spread_teacher_is_refused_in_a_distributed_run(tmp_path):
    teacher = ModelTeacher(spread_model(tmp_path))
    with pytest.raises(ValueError, match=r"spread over \['cpu', 'disk'\].*2 processes.*nf4"):
        teacher.prepare(run_of(DistributedType.MULTI_CPU))


def test_a_quantised_replica_must_be_on_the_device_of_its_process():
    model = tiny.model()
    model.is_loaded_in_4bit = True
    teacher = ModelTeacher(model)
    with pytest.raises(ValueError, match=r"quantised teacher is on cpu.*trains on cuda:1.*device_map="):
        teacher.prepare(run_of(DistributedType.MULTI_GPU, "cuda:1"))
    teacher.prepare(run_of(DistributedType.MULTI_CPU))
    teacher.prepare(run_of(DistributedType.NO, "cuda"))  # a single process may keep its teacher elsewhere
    assert model.device.type == "cpu"


def test_the_first_version_of_fsdp_is_refused():
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        ModelTeacher(tiny.model()).prepare(run_of(DistributedType.FSDP))


def test_a_head_elsewhere_takes_and_gives_tensors_of_the_students_device():
    head = RemoteHead(LMHead(torch.ones(5, 3, device="meta")), torch.device("meta"), torch.device("meta"))
    assert head(torch.ones(2, 3)).shape == (2, 5)


def test_other_zero_stages_keep_a_replica():
    model = tiny.model()
    teacher = ModelTeacher(model)
    teacher.prepare(run_of(DistributedType.DEEPSPEED, deepspeed_plugin=SimpleNamespace(zero_stage=2)))
    assert teacher.model is model


def compare_sharded_teachers(rank: int) -> None:
    # Accelerate makes no FSDP run of CPU processes, so the teacher is told of one.
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    run = run_of(DistributedType.FSDP, is_fsdp2=True, fsdp_plugin=plugin)
    # Every rank reads other tokens, and another number of them.
    batch = {"input_ids": torch.arange(10, 16 + 2 * rank)[None]}
    for family in ("llama", "gemma2"):  # gemma2's head is its embedding
        model = tiny.model(family)
        expected = model(**batch).logits.detach()
        teacher = ModelTeacher(model)
        teacher.prepare(run)
        for _ in range(2):
            projection = teacher.signals(batch, LOGITS).logits
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            torch.testing.assert_close(projection.head(projection.hidden), expected, atol=1e-6, rtol=1e-5)
        assert sum(parameter.to_local().numel() for parameter in model.parameters()) < model.num_parameters()


def compare_sent_teachers(rank: int, folders: dict[str, str]) -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True, cpu_ram_efficient_loading=True)
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2", "RANK": str(rank)}
    run = run_of(DistributedType.FSDP, is_fsdp2=True, fsdp_plugin=plugin)
    for family, folder in folders.items():
        whole = tiny.model(family)
        expected = whole(**BATCH).logits.detach()
        teacher = load_teacher(folder)
        assert all(parameter.is_meta == (rank == 1) for parameter in teacher.model.parameters())
        teacher.prepare(run)
        projection = teacher.signals(BATCH, LOGITS).logits
        parameters = list(teacher.model.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        assert len(parameters) == len(list(whole.parameters()))  # a tied weight is still one
        torch.testing.assert_close(projection.head(projection.hidden), expected, atol=1e-6, rtol=1e-5)


def test_of_an_fsdp2_teacher_rank_0_alone_reads_the_weights(tmp_path):
    folders = {family: str(tmp_path / family) for family in ("llama", "gemma2")}
    for family, folder in folders.items():
        tiny.model(family).save_pretrained(folder)
    run_on_two_ranks(partial(compare_sent_teachers, folders=folders), tmp_path)


def test_an_fsdp2_teacher_is_sharded_and_gives_the_logits_of_the_whole_model(tmp_path):
    run_on_two_ranks(compare_sharded_teachers, tmp_path)
