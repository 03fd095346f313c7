"""One file of a cache: named arrays behind a header that vouches for them.

A file begins with `MAGIC`, the length of the header (8 bytes) and its digest (16 bytes); the header is JSON and says
of every array where it is, what it is, and its digest. A file is there whole or not at all: it gets its name when
everything is on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hf_distill.cache.encoding import Arrays
from hf_distill.functional.registry import unknown_name


MAGIC = b"hfdcache"
DIGEST_BYTES = 16
# Where arrays begin, so that a mapped one can be read by vector instructions.
ALIGNMENT = 64
COMPRESSIONS = ("zstd",)
UNFINISHED = ".tmp"


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard.

    Args:
        file: Its name in the folder.
        rows: Sequences in it.
        tokens: Kept tokens in it.
        bytes: Its size.
        digest: Of its header, which holds those of the arrays; hexadecimal.
    """

    file: str
    rows: int
    tokens: int
    bytes: int
    digest: str


def digest_of(data: Any) -> str:
    """16 bytes of BLAKE2b of anything that has a buffer, hexadecimal."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk; nothing stays of it if that fails.

    Raises:
        OSError: With what to do, where the disk is full.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"The disk is full: {path} could not be written. What was written before is whole; free some space "
                "and start the same command again, it goes on from there.",
            ) from error
        raise
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def _sync_folder(folder: Path) -> None:
    """Put the names of its files on the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(path: Path, arrays: Arrays, facts: Mapping[str, Any], compression: str | None = None) -> ShardEntry:
    """Write a shard; equal arguments give equal bytes.

    Args:
        path: Its place.
        arrays: By name.
        facts: Plain values of the header; `rows` and `tokens` are among them.
        compression: "zstd", for arrays that become smaller by it, or None.
    """
    offset, entries, blocks = 0, {}, []
    for name, array in sorted(arrays.items()):
        block = array.tobytes()
        packed = block if compression is None else _codec(compression).compress(block, asbytes=True)
        shrinks = len(packed) < len(block)
        blocks.append(packed if shrinks else block)
        entries[name] = {
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "offset": offset,
            "bytes": len(blocks[-1]),
            "digest": digest_of(blocks[-1]),
            "compression": compression if shrinks else None,
        }
        offset += -(-len(blocks[-1]) // ALIGNMENT) * ALIGNMENT
    header = json.dumps({**facts, "arrays": entries}, sort_keys=True).encode()
    digest = digest_of(header)
    with written_whole(path) as file:
        file.write(MAGIC + len(header).to_bytes(8, "little") + bytes.fromhex(digest) + header)
        for block in blocks:
            file.write(bytes(-file.tell() % ALIGNMENT))
            file.write(block)
    return ShardEntry(path.name, facts["rows"], facts["tokens"], path.stat().st_size, digest)


def check_compression(compression: str | None) -> None:
    """Check the name of a compression.

    Raises:
        ValueError: It is unknown.
    """
    if compression is not None and compression not in COMPRESSIONS:
        raise unknown_name("compression", compression, COMPRESSIONS)


def _codec(compression: str) -> Any:
    import pyarrow

    return pyarrow.Codec(compression)


class Shard(Mapping[str, np.ndarray]):
    """The arrays of a shard, mapped from the file. Each is checked against its digest when it is first asked for.

    Args:
        path: The file.
        expected: What the manifest says of it; None where there is no manifest yet.

    Raises:
        ValueError: The file is missing, cut short, another one, or its header is not what was written.
    """

    def __init__(self, path: Path, expected: ShardEntry | None = None) -> None:
        self.path = path
        if not path.exists():
            raise ValueError(f"The shard {path} is missing; copy it again, or build the cache again.")
        self._size = path.stat().st_size
        prefix = len(MAGIC) + 8 + DIGEST_BYTES
        with open(path, "rb") as file:
            start = file.read(prefix)
            length = int.from_bytes(start[len(MAGIC) : len(MAGIC) + 8], "little")
            self.digest = start[len(MAGIC) + 8 :].hex()
            if len(start) < prefix or start[: len(MAGIC)] != MAGIC or length > self._size:
                raise self._damaged("it is no shard of a cache, or cut short")
            header = file.read(length)
        if digest_of(header) != self.digest:
            raise self._damaged("its header is not what was written")
        self.facts: dict[str, Any] = json.loads(header)
        self._entries: dict[str, Any] = self.facts.pop("arrays")
        self._start = -(-(prefix + length) // ALIGNMENT) * ALIGNMENT
        if self._size != (whole := self._whole_size(prefix + length)):
            raise self._damaged(f"it has {self._size} bytes instead of {whole}")
        if expected is not None and self.digest != expected.digest:
            raise self._damaged("it belongs to another cache than the manifest beside it")
        self._checked: dict[str, np.ndarray] = {}

    @property
    def entry(self) -> ShardEntry:
        """What a manifest says of it."""
        return ShardEntry(self.path.name, self.facts["rows"], self.facts["tokens"], self._size, self.digest)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._checked:
            self._checked[name] = self._read(name)
        return self._checked[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def verify(self) -> None:
        """Check every array against its digest.

        Raises:
            ValueError: One is not what was written; file and array are named.
        """
        for name in self:
            self[name]

    def _whole_size(self, header_end: int) -> int:
        ends = [self._start + entry["offset"] + entry["bytes"] for entry in self._entries.values() if entry["bytes"]]
        return max([header_end, *ends])

    @cached_property
    def _map(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def _read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        start = self._start + entry["offset"]
        block = self._map[start : start + entry["bytes"]]
        if digest_of(block) != entry["digest"]:
            raise self._damaged(f"its array {name!r} is not what was written")
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        if entry["compression"] is not None:
            size = int(np.prod(shape)) * dtype.itemsize
            block = np.frombuffer(_codec(entry["compression"]).decompress(block, size, asbytes=True), dtype=np.uint8)
        return np.asarray(block.view(dtype).reshape(shape))  # each slice of a memmap has its own cost

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"The shard {self.path} is damaged: {what}. Copy it again, or delete it and build the cache again with "
            "the same arguments, which writes only what is missing."
        )


def map_shard(folder: Path, entry: ShardEntry) -> Shard:
    """The shard of a cache that its manifest names; see `Shard`."""
    return Shard(folder / entry.file, entry)
