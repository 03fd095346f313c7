import numpy as np
import pytest

from hf_distill.cache import ids as ids_module
from hf_distill.cache.ids import SetReader, pack_sets, part


pytestmark = pytest.mark.usefixtures("engine")


def random_sets(seed, count, slots, vocab_size, full=False, skewed=True):
    """Sets of ids in no order, of which a few are in most; unused slots lie anywhere."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size + 1) if skewed else np.ones(vocab_size)
    keys = generator.exponential(size=(count, vocab_size)) / generator.permutation(weights)
    ids = np.argsort(keys, axis=1)[:, :slots].astype(np.int32)
    if not full:
        ids[generator.random(ids.shape) < 0.3] = -1
    return ids


def round_trip(ids, vocab_size, numbers=None):
    arrays, order = pack_sets(ids, vocab_size)
    numbers = np.arange(len(ids)) if numbers is None else numbers
    found = SetReader(arrays, vocab_size, ids.shape[1])(numbers)
    sorted_ids = np.take_along_axis(ids, order, 1)[numbers]
    np.testing.assert_array_equal(found, sorted_ids)
    used = sorted_ids >= 0
    assert (np.diff(used.astype(int), axis=1) <= 0).all()
    assert (np.sort(order, axis=1) == np.arange(ids.shape[1])).all()
    return arrays


@pytest.mark.parametrize("full", [True, False], ids=["full", "with unused slots"])
@pytest.mark.parametrize(("slots", "vocab_size"), [(1, 1), (1, 50), (7, 7), (50, 1000), (12, 4_001), (300, 320)])
def test_sets_come_back(slots, vocab_size, full):
    for seed in range(2):
        round_trip(random_sets(seed, 60, slots, vocab_size, full), vocab_size)


def test_the_first_and_the_last_id_of_a_large_vocabulary_come_back():
    vocab_size = 300_000
    ids = np.array([[0, vocab_size - 1, 77], [vocab_size - 1, -1, -1], [-1, -1, 0]], dtype=np.int32)
    round_trip(ids, vocab_size)


def test_rare_ids_of_many_sets_fill_the_widest_buckets():
    ids = np.arange(2**17, dtype=np.int32).reshape(-1, 2)[:, ::-1].copy()
    round_trip(ids, 2**17)


@pytest.mark.parametrize("shape", [(0, 4), (5, 4)])
def test_tokens_without_any_id_come_back(shape):
    round_trip(np.full(shape, -1, dtype=np.int32), 9)


def test_tokens_come_back_in_any_order():
    ids = random_sets(0, 2000, 9, 500)
    generator = np.random.default_rng(1)
    for numbers in (generator.permutation(2000), np.array([1999, 0, 0, 1999]), np.arange(63, 130), np.arange(0)):
        round_trip(ids, 500, numbers)


def test_pieces_of_coding_and_reading_do_not_show(monkeypatch):
    ids = random_sets(0, 300, 9, 500)
    whole = round_trip(ids, 500)
    monkeypatch.setattr(ids_module, "_PACKED_AT_ONCE", 7)
    monkeypatch.setattr(ids_module, "_IDS_READ_AT_ONCE", 50)
    pieces = round_trip(ids, 500)
    assert whole.keys() == pieces.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(pieces[name], array)


def test_equal_sets_give_equal_bytes_whatever_the_order_of_their_slots():
    ids = random_sets(0, 200, 9, 500)
    shuffled = np.random.default_rng(1).permuted(ids, axis=1)
    for first, second in zip(pack_sets(ids, 500)[0].values(), pack_sets(shuffled, 500)[0].values(), strict=True):
        np.testing.assert_array_equal(first, second)


def test_skewed_ids_take_little_more_than_independent_ids_could():
    vocab_size, slots = 5_000, 50
    ids = random_sets(0, 1000, slots, vocab_size, full=True)
    arrays = pack_sets(ids, vocab_size)[0]
    bits = 8 * sum(array.nbytes for name, array in arrays.items() if name != "widths") / ids.size
    shares = np.bincount(ids.ravel(), minlength=vocab_size) / len(ids)
    shares = shares[shares > 0]
    entropy = -(shares * np.log2(shares) + (1 - shares) * np.log2(np.maximum(1 - shares, 1e-9))).sum() / slots
    assert bits < entropy + 1.3
    assert bits < np.log2(vocab_size / slots) + 2 - 1  # Elias-Fano with buckets of one width


@pytest.mark.parametrize("full", [True, False], ids=["full", "with unused slots"])
@pytest.mark.parametrize("head", [0, 1, 4, 9])
def test_chosen_ids_are_brought_behind_the_others(head, full):
    slots = 9
    generator = np.random.default_rng(0)
    ids = np.sort(random_sets(0, 70, slots, 500, full=True), axis=1).astype(np.int64)
    chosen = np.argsort(generator.random(ids.shape), axis=1) >= head  # slots - head of each
    if not full:
        used = np.sort(generator.random(ids.shape) < 0.7, axis=1)[:, ::-1]
        ids, chosen = np.where(used, ids, -1), chosen & used
    packed = np.packbits(chosen, axis=1, bitorder="little")
    for numbers in (np.arange(70), np.array([69, 3, 3]), np.arange(0)):
        found = part(ids[numbers].copy(), packed, numbers, head)
        for row, number in zip(found, numbers, strict=True):
            for side, inside in ((row[:head], ~chosen[number] & (ids[number] >= 0)), (row[head:], chosen[number])):
                expected = ids[number][inside]
                assert side.tolist() == [*expected, *[-1] * (len(side) - len(expected))]
