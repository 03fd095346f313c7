from __future__ import annotations

import pytest
import torch
from datasets import Dataset, IterableDataset

from hf_distill.evaluation.rows import check_dataset, collate, count_targets, tokenize
from tests import tiny


IGNORED = -100


def language_row(**columns) -> dict:
    return tokenize(Dataset.from_list([columns]), "causal_lm")[0]


def test_text_becomes_ids_and_every_token_is_a_label():
    tokenizer = tiny.tokenizer()

    rows = tokenize(tiny.text_dataset(3), "causal_lm", tokenizer)

    assert [row["input_ids"] for row in rows] == [tokenizer(text)["input_ids"] for text in tiny.SENTENCES[:3]]
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_text_is_cut_and_the_tokenizer_does_not_remember_it():
    tokenizer = tiny.tokenizer()

    rows = tokenize(tiny.text_dataset(2), "causal_lm", tokenizer, max_length=4)

    assert [len(row["input_ids"]) for row in rows] == [4, 4]
    assert tokenizer.backend_tokenizer.truncation is None


def test_ids_are_cut_with_their_labels():
    rows = tokenize(tiny.tokenized_dataset(2), "causal_lm", max_length=5)

    assert [len(row["labels"]) for row in rows] == [5, 5]


def test_padding_on_either_side_is_dropped():
    row = language_row(input_ids=[0, 7, 8, 9, 0], attention_mask=[0, 1, 1, 1, 0], labels=[3, IGNORED, 8, 9, 3])

    assert row == {"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9]}


def test_mask_columns_leave_tokens_out_of_the_labels():
    row = language_row(input_ids=[5, 6, 7], completion_mask=[0, 1, 1], assistant_masks=[1, 1, 0])

    assert row["labels"] == [IGNORED, 6, IGNORED]


def test_the_first_token_of_a_causal_row_is_no_target():
    row = {"input_ids": [5, 6, 7], "labels": [5, 6, IGNORED]}

    assert count_targets(row, "causal_lm") == 1
    assert count_targets(row, "masked_lm") == 2
    assert count_targets({"input_ids": [5], "labels": 2}, "sequence_classification") == 1


def test_a_batch_is_padded_on_the_right_and_padding_is_masked():
    batch = collate([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])

    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[5, 6], [7, IGNORED]]


def test_a_class_id_is_read_from_either_column():
    for column in ("label", "labels"):
        row = tokenize(Dataset.from_list([{"input_ids": [5, 6], column: 2}]), "sequence_classification")[0]
        assert row == {"input_ids": [5, 6], "labels": 2}
    assert collate([row, row])["labels"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"text": []}), "no rows"),
        (Dataset.from_dict({"review": ["good"]}), r"columns \['review'\]; expected `text`"),
        (Dataset.from_dict({"input_ids": [[1, 2]], "seq_lengths": [[2]]}), "packed"),
        (IterableDataset.from_generator(lambda: iter([{"text": "a"}])), "IterableDataset"),
        ([{"text": "a"}], "is a list"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(dataset)


@pytest.mark.parametrize(
    ("columns", "task", "message"),
    [
        ({"text": "good"}, "causal_lm", "`tokenizer` is None"),
        ({"input_ids": [1, 2], "labels": [1]}, "causal_lm", "unequal lengths"),
        ({"input_ids": [1, 2], "labels": 1}, "causal_lm", "one class id"),
        ({"input_ids": [1, 2]}, "masked_lm", "needs `labels`"),
        ({"input_ids": [1, 2]}, "sequence_classification", "class id in `label`"),
        ({"input_ids": [1, 2], "label": 0.5}, "sequence_classification", "class id in `label`"),
        ({"input_ids": [1], "attention_mask": [0], "label": 0}, "sequence_classification", "no token"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused(columns, task, message):
    with pytest.raises(ValueError, match=message):
        tokenize(Dataset.from_list([columns]), task)


def test_missing_text_is_named_by_its_row():
    with pytest.raises(ValueError, match=r"Row 1 .* None"):
        tokenize(Dataset.from_dict({"text": ["good", None]}), "causal_lm", tiny.tokenizer())


def test_columns_in_torch_format_are_read_like_lists():
    dataset = tiny.tokenized_dataset(2)

    assert tokenize(dataset.with_format("torch"), "causal_lm") == tokenize(dataset, "causal_lm")
    assert isinstance(dataset.with_format("torch")[0]["input_ids"], torch.Tensor)
