"""Writes the shards of a plan, and goes on where a build was stopped."""

from __future__ import annotations

import errno
import shutil
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from tqdm.auto import tqdm

from hf_distill.cache.encoding import Arrays, Columns, Encoding
from hf_distill.cache.manifest import BUILDING, SHARED, Identity, Manifest
from hf_distill.cache.plan import Plan
from hf_distill.cache.rows import KEY_BYTES, Row, pack_ids
from hf_distill.cache.shard import UNFINISHED, Shard, ShardEntry, digest_of, write_shard, written_whole
from hf_distill.cache.source import Source


# Before the names of an encoding's own arrays.
ENCODED = "enc."


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05d}.kd"


class Writer:
    """Writes the shards of one rank.

    Args:
        folder: Of the cache.
        identity: Of the cache; a shard is known by its digest.
        plan: Of the rows.
        encoding: Packs the columns.
        source: Gives the columns.
    """

    def __init__(self, folder: Path, identity: Identity, plan: Plan, encoding: Encoding, source: Source) -> None:
        self._folder = folder
        self._identity = identity
        self._plan = plan
        self._encoding = encoding
        self._source = source

    def write(self, rank: int = 0, ranks: int = 1, *, show_progress: bool = True) -> None:
        """Write every `ranks`-th shard, from `rank` on, that is not there.

        Raises:
            OSError: The disk is full, or will be.
        """
        plan, mine = self._plan, range(rank, len(self._plan), ranks)
        total = sum(int(plan.counts[plan.starts[shard] : plan.starts[shard + 1]].sum()) for shard in mine)
        known = {shard: entry for shard in mine if (entry := self._known(shard)) is not None}
        written, tokens = (sum(getattr(entry, of) for entry in known.values()) for of in ("bytes", "tokens"))
        is_hidden = not show_progress or rank > 0
        with tqdm(total=total, initial=tokens, unit=" tokens", unit_scale=True, disable=is_hidden) as progress:
            for shard in (shard for shard in mine if shard not in known):
                entry = self._write(shard, progress)
                written, tokens = written + entry.bytes, tokens + entry.tokens
                progress.set_postfix_str(f"{written / tokens:.1f} bytes/token")
                self._check_room(written / tokens * (total - tokens) * ranks)

    def share(self) -> None:
        """Write what the encoding stores once; again in every build, since nothing vouches for it before the end."""
        if type(self._encoding).shared_tensors is Encoding.shared_tensors:
            return
        tensors = self._source.shared_tensors(self._plan.rows(0)[0])
        with written_whole(self._folder / SHARED) as file:
            file.write(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def finish(self) -> Manifest:
        """Make a whole cache of the shards, all of which are there."""
        entries = tuple(Shard(shard_path(self._folder, shard)).entry for shard in range(len(self._plan)))
        shared = self._folder / SHARED
        manifest = Manifest(self._identity, entries, digest_of(shared.read_bytes()) if shared.exists() else None)
        manifest.save(self._folder)
        (self._folder / BUILDING).unlink()
        return manifest

    def _known(self, number: int) -> ShardEntry | None:
        """A shard that a stopped build has left, if it is whole and of this cache."""
        path = shard_path(self._folder, number)
        if not path.exists():
            return None
        try:
            shard = Shard(path)
            shard.verify()
        except ValueError as error:
            warnings.warn(f"{error} It is written again now.", stacklevel=2)
            return None
        return shard.entry if shard.facts["identity"] == self._identity.digest else None

    def _write(self, number: int, progress: tqdm) -> ShardEntry:
        rows, pieces, order = self._plan.rows(number), [], []
        for batch in self._plan.batches(number):
            pieces.append(self._source.columns([rows[row] for row in batch]))
            order.append(batch)
            progress.update(sum(int(rows[row].kept.sum()) for row in batch))
        columns = _in_order(rows, np.concatenate(order), pieces)
        facts = {"identity": self._identity.digest, "rows": len(rows), "tokens": sum(int(r.kept.sum()) for r in rows)}
        arrays = {ENCODED + name: array for name, array in self._encoding.pack(columns).items()}
        return write_shard(
            shard_path(self._folder, number), {**arrays, **_row_arrays(rows)}, facts, self._identity.compression
        )

    def _check_room(self, needed: float) -> None:
        """Stop early where the rest cannot fit on the disk."""
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"The rest of the cache needs about {needed / 2**30:.1f} GiB, and {self._folder} has "
                f"{free / 2**30:.1f} GiB left. Free some space and start the same command again, it goes on from "
                "here; or choose a smaller preset in another folder.",
            )


def remove_leftovers(folder: Path) -> None:
    """Delete what killed builds have left unfinished."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()


def _in_order(rows: list[Row], order: np.ndarray, pieces: list[Columns]) -> Columns:
    """Columns of all tokens, row after row, from those of batches whose rows are `order`."""
    counts = np.array([row.kept.sum() for row in rows])
    starts = np.cumsum(counts) - counts
    places = np.concatenate([np.arange(starts[row], starts[row] + counts[row]) for row in order])
    back = torch.from_numpy(np.argsort(places))
    return {name: torch.cat([piece[name] for piece in pieces])[back] for name in pieces[0]}


def _row_arrays(rows: list[Row]) -> Arrays:
    """What is kept of the rows themselves."""
    kept = np.concatenate([row.kept for row in rows])
    arrays = {
        "keys": np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8).reshape(-1, KEY_BYTES),
        "lengths": np.array([len(row.ids) for row in rows], dtype=np.int32),
        "ids": pack_ids(np.concatenate([row.ids for row in rows])),
    }
    return arrays if kept.all() else arrays | {"kept": np.packbits(kept)}
