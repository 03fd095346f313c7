import numpy as np
import pytest

from hf_distill.cache.ragged import RaggedReader, pack_ragged


CASES = {
    "unequal": [3, 0, 7, 1, 0, 0, 12] * 40,
    "equal": [5] * 200,
    "a long one": [1] * 150 + [700] + [2] * 50,
    "empty ones": [0] * 70,
    "one": [4],
}


def rows_of(lengths):
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, length, dtype=np.uint8) for length in lengths]


def packed(rows):
    return pack_ragged(np.concatenate(rows), np.array([len(row) for row in rows]))


def read(reader, numbers, rows):
    data, bounds = reader(np.asarray(numbers))
    assert bounds[-1] == len(data)
    return [data[start : start + len(rows[number])] for start, number in zip(bounds[:-1], numbers, strict=True)]


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_rows_are_found_by_their_numbers_in_any_order(lengths):
    rows = rows_of(lengths)
    reader = RaggedReader(packed(rows))
    backwards = list(range(len(rows)))[::-1]
    for numbers in (backwards[::-1], backwards, backwards[::7], backwards[:1] * 3, backwards[-1:]):
        for found, number in zip(read(reader, numbers, rows), numbers, strict=True):
            np.testing.assert_array_equal(found, rows[number])


def test_no_rows_are_read_from_any_kind():
    for lengths in CASES.values():
        data, bounds = RaggedReader(packed(rows_of(lengths)))(np.empty(0, dtype=np.int64))
        assert len(data) == 0
        assert bounds.tolist() == [0]


def test_rows_are_padded_only_where_that_takes_no_more_room():
    assert set(packed(rows_of(CASES["equal"]))) == {"data"}
    assert set(packed(rows_of([9, 10] * 200))) == {"data"}  # half a byte of padding, against a byte for the length
    assert set(packed(rows_of(CASES["a long one"]))) == {"data", "lengths", "starts"}


def test_a_length_takes_as_few_bytes_as_the_longest_needs():
    assert packed(rows_of([3, 255] * 9))["lengths"].dtype == np.uint8
    assert packed(rows_of([3, 256] * 9))["lengths"].dtype == np.uint16
