"""Training from a cache is training with the teacher."""

import os

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq

from hf_distill import CachedTeacher, KDConfig, KDSFTConfig, KDSFTTrainer, KDTrainer
from hf_distill.cache import build_cache
from tests import tiny
from tests.processes import run_on_two_ranks


SETTINGS = {
    "max_steps": 3,
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}
SFT = {
    "plain": {"per_device_train_batch_size": 4},
    "packed": {"per_device_train_batch_size": 2, "packing": True, "max_length": 64, "packing_strategy": "bfd"},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
}


def sft(folder, teacher, how, dataset=None, **options):
    """A trainer of a tiny student; the attention takes packed rows apart by their positions."""
    arguments = KDSFTConfig(folder, **SETTINGS, **SFT[how])
    student = tiny.model("llama", layers=1, seed=3)
    return KDSFTTrainer(
        student,
        teacher_model=teacher,
        args=arguments,
        train_dataset=dataset or tiny.text_dataset(16),
        processing_class=tiny.tokenizer(),
        **options,
    )


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_equal_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], msg=name, **tolerance)


@pytest.mark.parametrize("how", SFT)
def test_sft_from_a_dense_cache_equals_sft_with_the_teacher(tmp_path, how):
    live = sft(tmp_path / "live", tiny.model("llama"), how)
    build_cache(
        tiny.model("llama"),
        live.train_dataset,
        tmp_path / "cache",
        encoding="dense",
        tokenizer=tiny.tokenizer(),
        show_progress=False,
    )
    start = weights(live)
    live.train()
    cached = sft(tmp_path / "cached", CachedTeacher(tmp_path / "cache"), how)
    cached.train()
    assert_equal_weights(weights(live), weights(cached), rtol=1e-5, atol=1e-6)
    assert any((start[name] - weight).abs().max() > 1e-4 for name, weight in weights(cached).items())


def test_a_lora_student_learns_the_same_from_a_cache(tmp_path):
    def options():
        return {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)}

    live = sft(tmp_path / "live", tiny.model("llama"), "plain", **options())
    build_cache(
        tiny.model("llama"),
        live.train_dataset,
        tmp_path / "cache",
        encoding="hidden",
        dtype="float32",
        show_progress=False,
    )
    cached = sft(tmp_path / "cached", CachedTeacher(tmp_path / "cache"), "plain", **options())
    for name, weight in cached.model.named_parameters():
        weight.data.copy_(dict(live.model.named_parameters())[name])
    live.train()
    cached.train()
    assert_equal_weights(weights(live), weights(cached), rtol=1e-5, atol=1e-6)


def rows():
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in _rows()])


def _rows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 300, (int(length),), generator=generator).tolist() for length in range(6, 14)]


def kd(folder, cache, batch, accumulation):
    arguments = {**SETTINGS, "max_steps": 2, "per_device_train_batch_size": batch}
    args = KDConfig(folder, **arguments, gradient_accumulation_steps=accumulation, teacher_cache=str(cache), seed=1)
    trainer = KDTrainer(
        tiny.model("llama", layers=1, seed=3),
        args=args,
        train_dataset=rows(),
        data_collator=_collate,
    )
    trainer.train()
    return weights(trainer)


def _collate(examples):
    return DataCollatorForSeq2Seq(tiny.tokenizer(), padding=True)(examples)


class _Rank:
    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache

    def __call__(self, rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, not used: the group is there
        torch.save(kd(self.folder, self.cache, 4, 1), self.folder / f"{rank}.pt")


def test_micro_batches_and_ranks_learn_the_same_from_a_cache(tmp_path):
    build_cache(
        tiny.model("llama"), rows(), tmp_path / "cache", encoding="topk", k=30, shard_tokens=20, show_progress=False
    )
    whole = kd(tmp_path / "8x1", tmp_path / "cache", 8, 1)
    for batch, accumulation in ((2, 4), (1, 8)):
        split = kd(tmp_path / f"{batch}", tmp_path / "cache", batch, accumulation)
        assert_equal_weights(whole, split, rtol=1e-4, atol=1e-6)
    run_on_two_ranks(_Rank(tmp_path, tmp_path / "cache"), tmp_path)
    for rank in range(2):
        assert_equal_weights(
            {name.removeprefix("module."): w for name, w in torch.load(tmp_path / f"{rank}.pt").items()},
            whole,
            rtol=1e-4,
            atol=1e-6,
        )


def test_the_teacher_is_given_once_and_a_folder_that_is_no_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no cache"):
        kd(tmp_path, tmp_path / "nothing", 1, 1)
    with pytest.raises(ValueError, match="give the teacher once"):
        KDTrainer(
            tiny.model("llama"),
            teacher_model=tiny.model("llama", seed=1),
            args=KDConfig(tmp_path, **SETTINGS, teacher_cache=str(tmp_path)),
        )


def test_a_cache_of_another_tokenizer_is_refused_before_the_first_step(tmp_path):
    build_cache(
        tiny.model("llama"),
        [{"input_ids": [1, 2, 3]}],
        tmp_path / "cache",
        tokenizer=tiny.tokenizer(extra_tokens=("<new>",)),
        encoding="topk",
        k=4,
        show_progress=False,
    )
    with pytest.raises(ValueError, match="another tokenizer"):
        sft(tmp_path / "run", CachedTeacher(tmp_path / "cache"), "plain")
