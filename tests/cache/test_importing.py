from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from hf_distill.cache.importing import DistillKitFiles
from tests import tiny
from tests.cache import distillkit_files as files


PAD = 0
EXACT = files.POLYNOMIAL | {"exact_k": 24, "exact_dtype": "float64", "polynomial_terms": None}


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def teacher() -> PreTrainedModel:
    """One whose distributions differ from token to token."""
    return tiny.model(initializer_range=0.3)


def texts(count: int = 7) -> list[list[int]]:
    return [example["input_ids"] for example in tiny.tokenized_dataset(count)]


@torch.no_grad()
def captured(ids: list[int], model: torch.nn.Module) -> torch.Tensor:
    """What DistillKit captures: the log-probabilities of each token but the first of a prompt."""
    return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def polynomial_files(folder: Path, config: dict = EXACT, **changes) -> Path:
    model = teacher()
    rows = [files.polynomial_row([*ids, PAD], captured([*ids, PAD], model), config) for ids in texts()]
    return files.write(folder, rows, config)


def legacy_files(folder: Path) -> Path:
    model = teacher()
    rows = [files.legacy_row([*ids, PAD], captured([*ids, PAD], model), files.LEGACY) for ids in texts()]
    return files.write(folder, rows, files.LEGACY)


@pytest.mark.parametrize(("write", "tolerance"), [(polynomial_files, 1e-4), (legacy_files, 0.5)])
def test_distributions_stand_at_the_tokens_before_their_labels(
    tmp_path: Path, write: Callable[[Path], Path], tolerance: float
) -> None:
    source = DistillKitFiles(write(tmp_path / "kit"), pad_token_id=PAD)
    assert [row.ids.tolist() for row in source.rows] == texts()
    model, hits = teacher(), 0
    for row in reversed(source.rows):
        expected = captured(row.ids.tolist(), model)
        top = source.top_tokens(row)
        assert top.ids.tolist() == expected.topk(24).indices.tolist()
        assert np.abs(top.log_probs - expected.topk(24).values.numpy()).max() < tolerance
        labels = expected.gather(1, torch.from_numpy(row.labels).long()[:, None])[:, 0].numpy()
        assert (top.labels == row.labels).all()
        assert (np.abs(top.label_log_probs - labels)[top.has_label] < tolerance).all()
        assert np.isnan(top.label_log_probs[~top.has_label]).all()
        hits += top.has_label.sum()
    assert hits > 2


def test_a_pad_token_is_kept_where_nobody_says_what_it_is(tmp_path: Path) -> None:
    source = DistillKitFiles(polynomial_files(tmp_path / "kit"))
    assert [row.ids.tolist() for row in source.rows] == [[*ids, PAD] for ids in texts()]


def test_the_documents_of_a_packed_row_are_rows(tmp_path: Path) -> None:
    """DistillKit packs rows without their pad token; each token has a distribution, the last one has no label."""
    model, documents = teacher(), texts(3)
    packed = files.polynomial_row(
        [token for ids in documents for token in ids],
        torch.cat([captured([*ids, PAD], model) for ids in documents]),
        EXACT,
    )
    lengths = [len(ids) for ids in documents]
    packed["attention_mask"] = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    source = DistillKitFiles(files.write(tmp_path / "kit", [packed], EXACT), pad_token_id=PAD)
    assert [row.ids.tolist() for row in source.rows] == documents
    for row in source.rows:
        expected = captured(row.ids.tolist(), model).topk(24).values.numpy()
        assert np.abs(source.top_tokens(row).log_probs - expected).max() < 1e-4


def test_padding_of_a_packed_row_is_no_document(tmp_path: Path) -> None:
    ids, model = texts(1)[0], teacher()
    packed = files.polynomial_row([*ids, PAD, PAD], captured([*ids, PAD, PAD, PAD], model), EXACT)
    packed["attention_mask"] = [1] * len(ids) + [0, 0]
    source = DistillKitFiles(files.write(tmp_path / "kit", [packed], EXACT))
    assert [row.ids.tolist() for row in source.rows] == [ids]


def test_a_row_that_is_there_twice_is_taken_once(tmp_path: Path) -> None:
    ids = texts(1)[0]
    row = files.polynomial_row(ids, captured([*ids, PAD], teacher()), EXACT)
    assert len(DistillKitFiles(files.write(tmp_path / "kit", [row, row], EXACT)).rows) == 1


def test_a_row_with_other_many_distributions_is_refused(tmp_path: Path) -> None:
    ids = texts(1)[0]
    row = files.polynomial_row(ids, captured(ids[:-1], teacher()), EXACT)
    with pytest.raises(ValueError, match="Row 0 has 6 tokens and 4 distributions"):
        DistillKitFiles(files.write(tmp_path / "kit", [row], EXACT))


def test_files_without_a_configuration_need_one(tmp_path: Path) -> None:
    folder = legacy_files(tmp_path / "kit")
    (folder / "compression_config.yaml").rename(tmp_path / "moved.yaml")
    with pytest.raises(ValueError, match="give `config`"):
        DistillKitFiles(folder)
    for config in (tmp_path / "moved.yaml", files.LEGACY):
        assert DistillKitFiles(folder, config, PAD).rows[0].ids.tolist() == texts()[0]


def test_a_configuration_of_the_other_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lack .*compressed_logprobs.*PolynomialFormat"):
        DistillKitFiles(legacy_files(tmp_path / "kit"), EXACT)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parquet files"):
        DistillKitFiles(tmp_path)
