from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_distill.cache import CacheReader, RemoteTeacher, Verification, build_cache, import_distillkit, verify_cache
from hf_distill.teachers import ModelTeacher
from tests import tiny
from tests.cache.distillkit_files import polynomial_files


OPTIONS = {
    "topk": {"k": 20, "temperatures": (1.0, 2.0)},
    "sampled": {},
    "topk_tail": {"k": 8, "draws": 16, "temperatures": (1.0, 2.0)},
    "dense": {},
    "hidden": {"dtype": "float32"},
}


def model(seed: int = 0, **config) -> PreTrainedModel:
    """One whose distributions differ from token to token."""
    return tiny.model(initializer_range=0.3, seed=seed, **config)


def build(out: Path, encoding: str = "topk", teacher: PreTrainedModel | ModelTeacher | None = None) -> Path:
    settings = OPTIONS[encoding] | {"shard_tokens": 40, "show_progress": False}
    build_cache(teacher or model(), tiny.tokenized_dataset(24), out, encoding=encoding, **settings)
    return out


@torch.no_grad()
def nudged(amount: float) -> PreTrainedModel:
    """The teacher after a bit of training."""
    teacher, generator = model(), torch.Generator().manual_seed(1)
    for weight in teacher.parameters():
        weight += amount * torch.randn(weight.shape, generator=generator)
    return teacher


@pytest.mark.parametrize("encoding", OPTIONS)
def test_the_cache_of_a_teacher_passes(tmp_path: Path, encoding: str) -> None:
    found = verify_cache(build(tmp_path, encoding), model())
    assert found.passed
    assert not found.differences
    assert (found.rows, found.tokens) == (24, CacheReader(tmp_path).manifest.tokens)
    assert set(found.kl) == set(OPTIONS[encoding].get("temperatures", (1.0,)))
    assert found.label_error < 2e-3
    assert found.top1_agreement is None if encoding == "sampled" else found.top1_agreement > 0.95
    if encoding in ("dense", "hidden"):
        assert found.kl[1.0] < 1e-9


@pytest.mark.parametrize("encoding", OPTIONS)
def test_the_cache_of_another_teacher_fails_by_its_numbers_and_its_name(tmp_path: Path, encoding: str) -> None:
    found = verify_cache(build(tmp_path, encoding), model(seed=1))
    assert not found.passed
    assert [difference.split(":")[0] for difference in found.differences] == ["weights"]
    assert found.kl[1.0] > found.limits[1.0]
    assert found.label_error > 0.1
    assert found.top1_agreement is None or found.top1_agreement < 0.3


def test_a_teacher_that_was_trained_on_fails_by_its_numbers(tmp_path: Path) -> None:
    found = verify_cache(build(tmp_path), nudged(0.02))
    assert found.kl[1.0] > found.limits[1.0]
    assert verify_cache(tmp_path, nudged(0.02), tolerance=9.0).limits == {1.0: 9.0, 2.0: 9.0}


def test_another_teacher_fails_also_where_the_numbers_would_do(tmp_path: Path) -> None:
    found = verify_cache(build(tmp_path), nudged(1e-6))
    assert found.kl[1.0] < found.limits[1.0]
    assert not found.passed


def test_the_name_of_the_same_weights_does_not_matter(tmp_path: Path) -> None:
    build(tmp_path, teacher=ModelTeacher(model(), name="org/a"))
    assert verify_cache(tmp_path, ModelTeacher(model(), name="org/b")).passed


def test_a_cache_without_weights_is_known_by_its_name(tmp_path: Path) -> None:
    import_distillkit(polynomial_files(tmp_path / "kit"), tmp_path / "out", teacher="org/a", show_progress=False)
    assert verify_cache(tmp_path / "out", ModelTeacher(model(), name="org/a")).passed
    found = verify_cache(tmp_path / "out", ModelTeacher(model(), name="org/b"))
    assert found.differences == ("name: 'org/a' and not 'org/b'",)


def test_the_worst_token_is_the_one_that_was_spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled, targets = CacheReader(build(tmp_path, "dense")).row(7), CacheReader.targets

    def with_one_wrong(self, rows):
        found = targets(self, rows)
        if rows[0].key == spoiled.key:
            found.hidden[2, 5] += 8
        return found

    monkeypatch.setattr(CacheReader, "targets", with_one_wrong)
    tokenizer = tiny.tokenizer()
    found = verify_cache(tmp_path, ModelTeacher(model(), tokenizer))
    position = int(spoiled.kept.nonzero()[0][2])
    label = int(spoiled.ids[position + 1])
    assert (found.worst.row, found.worst.position, found.worst.label) == (spoiled.key.hex(), position, label)
    before = spoiled.ids[: position + 1].tolist()
    assert found.worst.text == (tokenizer.decode(before), tokenizer.decode([label]))
    assert not found.passed


def test_rows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    build(tmp_path)

    def found(seed: int) -> Verification:
        return verify_cache(tmp_path, model(), rows=5, seed=seed)

    assert found(0) == found(0)
    assert found(0).rows == 5
    assert len({found(seed).worst for seed in range(3)}) > 1


def test_shards_of_the_rows_are_checked_and_all_of_them_where_asked(tmp_path: Path) -> None:
    shards = CacheReader(build(tmp_path)).manifest.shards
    assert len(shards) > 3
    assert verify_cache(tmp_path, model(), rows=1).shards == 1
    assert verify_cache(tmp_path, model(), rows=1, every_shard=True).shards == len(shards)
    for shard in shards:
        file = tmp_path / shard.file
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{shard.file} is damaged"):
            verify_cache(tmp_path, model(), rows=1, every_shard=True)
        file.write_bytes(content)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(ValueError, match=r"has 330 logits.*320; it is another model"):
        verify_cache(tmp_path, model(vocab_size=330))
    with pytest.raises(ValueError, match="RemoteTeacher"):
        verify_cache(tmp_path, RemoteTeacher("http://127.0.0.1:1", "tiny", 320))
    with pytest.raises(ValueError, match="`rows` is 0"):
        verify_cache(tmp_path, model(), rows=0)
