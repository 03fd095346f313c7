from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.cache.distillkit_rows import DistillKitFiles
from hf_distill.cache.rows import Row
from tests.cache import distillkit_files as files
from tests.cache.distillkit_files import EXACT, PAD, captured, legacy_files, polynomial_files, teacher, texts


def rows_of(source: DistillKitFiles) -> list[Row]:
    return [source.row(number) for number in range(len(source))]


def ids_of(source: DistillKitFiles) -> list[list[int]]:
    return [row.ids.tolist() for row in rows_of(source)]


@pytest.mark.parametrize(("write", "tolerance"), [(polynomial_files, 1e-4), (legacy_files, 0.5)])
def test_distributions_stand_at_the_tokens_before_their_labels(
    tmp_path: Path, write: Callable[[Path], Path], tolerance: float
) -> None:
    source = DistillKitFiles(write(tmp_path / "kit"), pad_token_id=PAD)
    assert ids_of(source) == texts()
    model, hits = teacher(), 0
    for row in reversed(rows_of(source)):
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
    assert ids_of(source) == [[*ids, PAD] for ids in texts()]


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
    assert ids_of(source) == documents
    for row in rows_of(source):
        expected = captured(row.ids.tolist(), model).topk(24).values.numpy()
        assert np.abs(source.top_tokens(row).log_probs - expected).max() < 1e-4


def test_a_pad_token_inside_of_a_packed_row_belongs_to_its_text(tmp_path: Path) -> None:
    """Its distributions are as many as its tokens: what DistillKit had appended is gone already."""
    ids = [*texts(1)[0], PAD]
    packed = files.polynomial_row(ids, captured([*ids, PAD], teacher()), EXACT)
    assert ids_of(DistillKitFiles(files.write(tmp_path / "kit", [packed], EXACT), pad_token_id=PAD)) == [ids]


def test_a_label_in_a_slot_that_holds_nothing_is_not_known(tmp_path: Path) -> None:
    """DistillKit leaves any id in the slots of tokens that the server did not give."""
    ids = texts(1)[0]
    log_probs = captured([*ids, PAD], teacher())
    log_probs[0] = -np.inf
    log_probs[0, :20] = np.log(1 / 20)
    row = files.polynomial_row([*ids, PAD], log_probs, EXACT)
    packed = files.pack_bits(np.array([[*range(20), ids[1], 311, 312, 313]]), 9).tolist()
    row["bytepacked_indices"] = packed + row["bytepacked_indices"][1:]
    source = DistillKitFiles(files.write(tmp_path / "kit", [row], EXACT), pad_token_id=PAD)
    assert ids[1] >= 20
    assert np.isnan(source.top_tokens(source.row(0)).label_log_probs[0])


def test_padding_of_a_packed_row_is_no_document(tmp_path: Path) -> None:
    ids, model = texts(1)[0], teacher()
    packed = files.polynomial_row([*ids, PAD, PAD], captured([*ids, PAD, PAD, PAD], model), EXACT)
    packed["attention_mask"] = [1] * len(ids) + [0, 0]
    source = DistillKitFiles(files.write(tmp_path / "kit", [packed], EXACT))
    assert ids_of(source) == [ids]


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
        assert ids_of(DistillKitFiles(folder, config, PAD)) == texts()


def test_a_configuration_of_the_other_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lack .*compressed_logprobs.*PolynomialFormat"):
        DistillKitFiles(legacy_files(tmp_path / "kit"), EXACT)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parquet files"):
        DistillKitFiles(tmp_path)
