"""A shard is there whole or not at all, and what is not what was written is refused by name."""

import errno

import numpy as np
import pytest

from hf_distill.cache import shard as shards
from hf_distill.cache.shard import Shard, map_shard, write_shard


ARRAYS = {
    "bytes": np.arange(200, dtype=np.uint8),
    "empty": np.empty((0, 3), dtype=np.float16),
    "matrix": np.arange(60, dtype=np.int64).reshape(20, 3),
    "zeros": np.zeros(5000, dtype=np.float32),
}
FACTS = {"identity": "abc", "rows": 2, "tokens": 20}


@pytest.fixture(params=[None, "zstd"])
def written(request, tmp_path):
    return tmp_path, write_shard(tmp_path / "shard-00000.kd", ARRAYS, FACTS, request.param)


def test_arrays_come_back_as_they_were(written):
    folder, entry = written
    shard = map_shard(folder, entry)
    assert list(shard) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert shard[name].dtype == array.dtype
        np.testing.assert_array_equal(shard[name], array)
    assert shard.facts == FACTS
    assert shard.entry == entry
    assert entry.bytes == (folder / entry.file).stat().st_size


def test_equal_arrays_give_equal_bytes_in_whatever_order(tmp_path):
    write_shard(tmp_path / "a", ARRAYS, FACTS)
    write_shard(tmp_path / "b", dict(reversed(ARRAYS.items())), dict(reversed(FACTS.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_compression_makes_files_smaller(tmp_path):
    plain, packed = (write_shard(tmp_path / str(how), ARRAYS, FACTS, how).bytes for how in (None, "zstd"))
    assert packed < plain / 4


def test_no_flipped_byte_is_read(written):
    folder, entry = written
    path = folder / entry.file
    whole = path.read_bytes()
    unnoticed = []
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            shard = map_shard(folder, entry)
            shard.verify()
        except ValueError:
            continue
        unnoticed.append(position)
        for name, array in ARRAYS.items():  # only the padding between arrays is free
            np.testing.assert_array_equal(shard[name], array)
    assert len(unnoticed) < 4 * shards.ALIGNMENT / 7


def test_a_flipped_byte_of_an_array_is_found_when_the_array_is_read(written):
    folder, entry = written
    path = folder / entry.file
    whole = bytearray(path.read_bytes())
    start = whole.index(ARRAYS["bytes"].tobytes()[10:60])
    whole[start] ^= 1
    path.write_bytes(whole)
    shard = map_shard(folder, entry)
    np.testing.assert_array_equal(shard["matrix"], ARRAYS["matrix"])
    with pytest.raises(ValueError, match="'bytes' is not what was written"):
        shard["bytes"]


@pytest.mark.parametrize("length", [0, 5, 20, 100, -64, -1])
def test_a_truncated_shard_is_refused_when_it_is_opened(written, length):
    folder, entry = written
    path = folder / entry.file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"shard-00000\.kd is damaged"):
        map_shard(folder, entry)


def test_a_missing_shard_and_one_of_another_cache_are_refused(written):
    folder, entry = written
    write_shard(folder / entry.file, ARRAYS, FACTS | {"identity": "other"})
    with pytest.raises(ValueError, match="another cache"):
        map_shard(folder, entry)
    (folder / entry.file).unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.kd is missing"):
        map_shard(folder, entry)


def test_a_full_disk_leaves_what_was_there_and_says_that_the_command_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "shard-00000.kd"
    write_shard(path, ARRAYS, FACTS)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(OSError, match="start the same command again") as error:
        write_shard(path, {"a": np.ones(3)}, FACTS)
    assert error.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert Shard(path).path.read_bytes() == before
