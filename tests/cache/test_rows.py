"""The sequences of a row are those that a trainer would train on, found by their ids alone."""

import numpy as np
import pytest

from hf_distill.cache.rows import pack_ids, row_key, rows_of, unpack_ids


def pieces(**example):
    return [(row.ids.tolist(), row.kept.tolist()) for row in rows_of(example)]


def test_the_key_of_a_row_is_that_of_its_ids_whatever_their_type():
    ids = [5, 70_000, 3]
    assert row_key(np.array(ids)) == row_key(np.array(ids, dtype=np.uint32)) != row_key(np.array(ids[::-1]))
    assert len(row_key(np.array(ids))) == 16


def test_every_token_but_the_first_is_a_label_unless_something_says_otherwise():
    assert pieces(input_ids=[4, 5, 6]) == [([4, 5, 6], [True, True])]


def test_padding_on_either_side_is_cut_off():
    assert pieces(input_ids=[0, 4, 5], attention_mask=[0, 1, 1]) == [([4, 5], [True])]
    assert pieces(input_ids=[4, 5, 0], attention_mask=[1, 1, 0], labels=[4, 5, -100]) == [([4, 5], [True])]


def test_positions_are_kept_where_all_masks_agree_that_the_next_token_is_learned():
    masks = {"labels": [-100, 5, -100, 7, 8], "completion_mask": [0, 1, 1, 1, 0], "assistant_masks": [1, 1, 1, 1, 1]}
    assert pieces(input_ids=[4, 5, 6, 7, 8], **masks) == [([4, 5, 6, 7, 8], [True, False, True, False])]


@pytest.mark.parametrize("bounds", [{"seq_lengths": [2, 3]}, {"position_ids": [0, 1, 0, 1, 2]}])
def test_documents_of_a_packed_row_are_rows_of_their_own(bounds):
    assert pieces(input_ids=[4, 5, 6, 7, 8], **bounds) == [([4, 5], [True]), ([6, 7, 8], [True, True])]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a"}, r"\['text'\] and no `input_ids`"),
        ({"input_ids": [1, 2], "labels": [1]}, r"`labels` has the shape \[1\]"),
        ({"input_ids": [1, 2], "seq_lengths": [3]}, "adds up to 3"),
    ],
)
def test_what_does_not_fit_is_refused(example, message):
    with pytest.raises(ValueError, match=message):
        list(rows_of(example))


@pytest.mark.parametrize(("greatest", "size"), [(0, 2), (2**16 - 1, 2), (2**16, 3), (2**24 - 1, 3), (2**24, 4)])
def test_ids_take_as_many_bytes_as_the_greatest_needs(greatest, size):
    ids = np.array([3, greatest, 0, 255], dtype=np.int32)
    packed = pack_ids(ids)
    assert packed.shape == (4, size)
    assert unpack_ids(packed).dtype == np.int32
    np.testing.assert_array_equal(unpack_ids(packed), ids)
    assert unpack_ids(packed[:0]).shape == (0,)
