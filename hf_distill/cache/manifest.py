"""What a cache is of, and what it consists of: its identity while it is built, its manifest when it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_distill.cache.shard import UNFINISHED, ShardEntry, digest_of, written_whole


FORMAT_VERSION = 3
MANIFEST, BUILDING, SHARED = "manifest.json", "building.json", "shared.safetensors"


@dataclass(frozen=True)
class TeacherIdentity:
    """Which model gave the distributions.

    Args:
        name: Hub name or folder; None when it has none.
        revision: Commit of the Hub; None when it is not known.
        quantization: "nf4", "int8" and so on; None for none.
        architecture: Class of the model; None when it is not known.
        vocab_size: Columns of its logits.
        num_layers: Depth; None when it is not known.
        hidden_size: Width of its last hidden states; None when it is not known.
        weights: Digest of its weights, see `weights_digest`; None where they were not here.
    """

    name: str | None
    revision: str | None
    quantization: str | None
    architecture: str | None
    vocab_size: int
    num_layers: int | None = None
    hidden_size: int | None = None
    weights: str | None = None


@dataclass(frozen=True)
class TokenizerIdentity:
    """Digests of a tokenizer's vocabulary with added tokens, and of its chat template; None where there is none."""

    vocabulary: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class Identity:
    """Everything that decides the bytes of a cache. Two builds of one identity can go on with each other's shards.

    Args:
        teacher: Which model.
        tokenizer: With which tokenizer the dataset was made.
        dataset: Digest of the rows and of what of them is kept, in order.
        encoding: `Encoding.config()`.
        shard_tokens: Kept tokens of a shard, about.
        batch_tokens: Tokens of a batch of the teacher, padding included.
        compression: Of the arrays of shards.
        source: "teacher" that was run here, "server" that was asked, or "distillkit" for files of that project. The
            last two gave the most likely tokens only: entropies are those of these and the rest together, which is
            less than the teacher's.
        format_version: Of the files.
    """

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    dataset: str
    encoding: Mapping[str, Any]
    shard_tokens: int
    batch_tokens: int
    compression: str | None = None
    source: str = "teacher"
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """Of all of it; it stands in the header of every shard."""
        return digest_of(json.dumps(asdict(self), sort_keys=True).encode())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Identity:
        """What `asdict` made a dictionary of."""
        teacher, tokenizer = TeacherIdentity(**values["teacher"]), TokenizerIdentity(**values["tokenizer"])
        return cls(**{**values, "teacher": teacher, "tokenizer": tokenizer})

    def differences(self, other: Identity) -> list[str]:
        """What differs, each as "teacher.weights: this and not that"."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        names = sorted(mine.keys() | theirs.keys())
        return [
            f"{name}: {mine.get(name)!r} and not {theirs.get(name)!r}"
            for name in names
            if mine.get(name) != theirs.get(name)
        ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


@dataclass(frozen=True)
class Manifest:
    """A whole cache.

    Args:
        identity: What it is of.
        shards: What it consists of, in order.
        shared: Digest of `shared.safetensors`, where the encoding stores something once; None otherwise.
    """

    identity: Identity
    shards: tuple[ShardEntry, ...]
    shared: str | None = None

    @property
    def teacher(self) -> TeacherIdentity:
        """Which model."""
        return self.identity.teacher

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """With which tokenizer the dataset was made."""
        return self.identity.tokenizer

    @property
    def encoding(self) -> Mapping[str, Any]:
        """`Encoding.config()`."""
        return self.identity.encoding

    @property
    def rows(self) -> int:
        """Sequences."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Kept tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Make a whole cache of a folder."""
        content = {
            "identity": asdict(self.identity),
            "shards": [asdict(s) for s in self.shards],
            "shared": self.shared,
        }
        _save(folder / MANIFEST, {**content, "digest": _digest(content)})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a whole cache.

        Raises:
            ValueError: The folder is no cache, or one that is being built, or the manifest is not what was written.
        """
        path = folder / MANIFEST
        if not path.exists():
            if (folder / BUILDING).exists():
                raise ValueError(
                    f"The cache {folder} is not whole: its build was stopped or is still going on. Start the same "
                    "command again, it goes on where it was."
                )
            raise ValueError(f"{folder} holds no cache (there is no {MANIFEST}); make one with `build_cache`.")
        content = _load(path)
        digest = content.pop("digest", None)
        if digest != _digest(content):
            raise ValueError(f"The manifest {path} is damaged; copy the cache again.")
        identity = Identity.from_dict(content["identity"])
        if identity.format_version != FORMAT_VERSION:
            raise ValueError(
                f"The cache {folder} has format version {identity.format_version}, and this hf_distill reads "
                f"{FORMAT_VERSION}; build it again, or install the version of hf_distill that wrote it."
            )
        return cls(identity, tuple(ShardEntry(**entry) for entry in content["shards"]), content["shared"])


def save_identity(folder: Path, identity: Identity) -> None:
    """Say what is being built in a folder."""
    _save(folder / BUILDING, asdict(identity))


def identity_in(folder: Path) -> Identity | None:
    """What a folder is a cache of, or what is being built there; None where there is neither."""
    if (folder / MANIFEST).exists():
        return Manifest.load(folder).identity
    if (folder / BUILDING).exists():
        return Identity.from_dict(_load(folder / BUILDING))
    return None


def check_same(folder: Path, identity: Identity) -> None:
    """Check that a folder is empty, or holds (a part of) this cache.

    Raises:
        ValueError: It holds something else; everything that differs is named.
    """
    known = identity_in(folder)
    if known is None:
        if folder.exists() and any(path.suffix != UNFINISHED for path in folder.iterdir()):
            raise ValueError(f"`out` is {folder}, which is not empty and holds no cache; give a new folder.")
        return
    if differing := known.differences(identity):
        raise ValueError(
            f"`out` is {folder}, which holds another cache, of {'; '.join(differing)}. Give another folder, or what "
            "this one was built with; or delete it."
        )


def _digest(content: Mapping[str, Any]) -> str:
    return digest_of(json.dumps(content, sort_keys=True).encode())


def _save(path: Path, content: Mapping[str, Any]) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy the cache again, or delete the folder.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object; copy the cache again, or delete the folder.")
    return content
