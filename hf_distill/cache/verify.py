"""Whether a cache still says what its teacher says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_distill.anatomy import unwrap
from hf_distill.cache.build import resolve_teacher
from hf_distill.cache.compare import Comparison, compare, join, kl_floor
from hf_distill.cache.identity import identity_of
from hf_distill.cache.manifest import TeacherIdentity
from hf_distill.cache.reader import CacheReader
from hf_distill.cache.remote import RemoteTeacher
from hf_distill.cache.rows import Row
from hf_distill.cache.shard import map_shard
from hf_distill.cache.source import LocalSource
from hf_distill.signals import Projection


# Standard errors that an estimate may be off.
STANDARD_ERRORS = 4.0
# Elements of the logits that are compared at once.
CHUNK = 2**22
# Tokens that are shown before the worst one.
SHOWN = 12


@dataclass(frozen=True)
class WorstToken:
    """The token that the cache says the least truth about.

    Args:
        row: The key of its row, hexadecimal.
        position: The token after which the distribution is.
        error: Its KL at T = 1; for sampled encodings the error of its label's log-probability.
        label: The token that followed.
        text: The last tokens up to the position, and the one that followed; None without a tokenizer.
    """

    row: str
    position: int
    error: float
    label: int
    text: tuple[str, str] | None


@dataclass(frozen=True)
class Verification:
    """What `verify_cache` found.

    Args:
        rows: That were run again.
        tokens: In them.
        shards: Whose digests were checked.
        kl: By temperature the mean of KL(teacher || cache) in nats, as a student sees it; an estimate of it, which may
            be below 0, for sampled encodings.
        limits: By temperature what the mean may be at most.
        worst: The worst token.
        top1_agreement: The share of tokens whose most likely one is the teacher's; None where it is not kept.
        label_error: The mean error of the log-probability of the label.
        differences: What of the teacher is not what the manifest says.
    """

    rows: int
    tokens: int
    shards: int
    kl: Mapping[float, float]
    limits: Mapping[float, float]
    worst: WorstToken
    top1_agreement: float | None
    label_error: float
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether it is the teacher's cache, within the limits."""
        return not self.differences and all(abs(self.kl[t]) <= self.limits[t] for t in self.kl)


def verify_cache(
    path: str | Path,
    teacher: Any,
    *,
    rows: int = 64,
    seed: int = 0,
    every_shard: bool = False,
    tolerance: float | None = None,
) -> Verification:
    """Run some rows of a cache again and compare.

    Args:
        path: The folder that `build_cache` made.
        teacher: A name, a `PreTrainedModel` or a `ModelTeacher`.
        rows: How many, drawn at random.
        seed: Of the draw.
        every_shard: Check the digests of all shards, and not only of those that the rows are in.
        tolerance: What the mean KL may be, in nats; `kl_floor` of the encoding if None.

    Raises:
        ValueError: The cache is damaged, or the teacher cannot have made it: its vocabulary is another one.
    """
    if rows < 1:
        raise ValueError(f"`rows` is {rows}; expected at least 1.")
    given = resolve_teacher(teacher)
    if isinstance(given, RemoteTeacher):
        raise ValueError(
            "`teacher` is a RemoteTeacher, which gives the most likely tokens only; load the model here to verify."
        )
    reader = CacheReader(path)
    known = identity_of(given)
    if known.vocab_size != reader.manifest.teacher.vocab_size:
        raise ValueError(
            f"`teacher` ({given.name}) has {known.vocab_size} logits, and that of the cache {path} "
            f"({reader.manifest.teacher.name}) {reader.manifest.teacher.vocab_size}; it is another model."
        )
    numbers = np.sort(np.random.default_rng(seed).choice(len(reader), min(rows, len(reader)), replace=False))
    shards = _check_digests(reader, numbers, every_shard)
    chosen = [reader.row(number) for number in numbers.tolist()]
    source = LocalSource(given, reader.encoding)
    temperatures = reader.encoding.temperatures
    found = join([part for row in chosen for part in _run_again(row, source.run([row]), reader, temperatures)])
    is_estimate = reader.encoding.samples
    floor = tolerance
    if floor is None:
        floor = kl_floor(reader.encoding, is_16_bit=unwrap(given.model).dtype != torch.float32)
    errors = found.kl.std(0) / math.sqrt(len(found.kl)) if is_estimate else torch.zeros(len(temperatures))
    return Verification(
        rows=len(chosen),
        tokens=len(found.kl),
        shards=shards,
        kl=dict(zip(temperatures, found.kl.mean(0).tolist(), strict=True)),
        limits=dict(zip(temperatures, (floor + STANDARD_ERRORS * errors).tolist(), strict=True)),
        worst=_worst(found.label_errors if is_estimate else found.kl[:, 0], chosen, given.tokenizer),
        top1_agreement=None if found.agrees is None else found.agrees.float().mean().item(),
        label_error=found.label_errors.mean().item(),
        differences=_differences(reader.manifest.teacher, known),
    )


def _check_digests(reader: CacheReader, rows: np.ndarray, every_shard: bool) -> int:
    """Check the digests of the shards that some rows are in, or of all; how many there are."""
    entries = reader.manifest.shards
    ends = np.cumsum([entry.rows for entry in entries])
    shards = range(len(entries)) if every_shard else np.unique(np.searchsorted(ends, rows, side="right")).tolist()
    for shard in shards:
        map_shard(reader.path, entries[shard]).verify()
    return len(shards)


def _run_again(
    row: Row, output: Projection, reader: CacheReader, temperatures: tuple[float, ...]
) -> Iterator[Comparison]:
    """Compare what the teacher says of a row with what the cache does, some tokens at a time."""
    targets, labels = reader.targets([row]), torch.from_numpy(row.labels.astype(np.int64))
    for index in torch.arange(len(labels)).split(max(CHUNK // reader.manifest.teacher.vocab_size, 1)):
        logits = output.head(output.hidden[index.to(output.hidden.device)]).cpu()
        yield compare(logits, targets.at(index), labels[index], temperatures)


def _worst(errors: Tensor, rows: Sequence[Row], tokenizer: Any) -> WorstToken:
    """The token with the greatest error; `errors` are those of all kept tokens of the rows."""
    place = int(errors.argmax())
    ends = np.cumsum([row.kept.sum() for row in rows])
    number = int(np.searchsorted(ends, place, side="right"))
    row = rows[number]
    position = int(np.flatnonzero(row.kept)[place - (ends[number] - row.kept.sum())])
    text = None
    if tokenizer is not None:
        before = row.ids[max(position + 1 - SHOWN, 0) : position + 1]
        text = (tokenizer.decode(before.tolist()), tokenizer.decode([int(row.ids[position + 1])]))
    return WorstToken(row.key.hex(), position, float(errors[place]), int(row.ids[position + 1]), text)


def _differences(known: TeacherIdentity, given: TeacherIdentity) -> tuple[str, ...]:
    """What of the manifest's teacher is not so of the given one; of equal weights, their name does not matter."""
    mine, theirs = asdict(known), asdict(given)
    same_weights = known.weights == given.weights
    names = [name for name in mine if mine[name] is not None and not (same_weights and name in ("name", "revision"))]
    return tuple(f"{name}: {mine[name]!r} and not {theirs[name]!r}" for name in names if mine[name] != theirs[name])
