"""A stage of a pipeline: it reads a model folder and writes one, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_distill.evaluation.json_file import read_json, write_json


RECORD = "stage.json"
# Builds a stage: it writes a model into the first folder, may keep what helps to go on after a crash in the second,
# and returns facts for the record.
Build = Callable[[Path, Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Stage:
    """What a stage is made of; two with the same key give the same model.

    Args:
        name: Of its folder: "1-P".
        root: Where the folders of the pipeline are.
        source: Digest of the model that it reads: the key of the stage before it.
        settings: Everything else that its result depends on, as JSON can hold it.
    """

    name: str
    root: Path
    source: str
    settings: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Where its model is when it is done."""
        return self.root / self.name

    @property
    def unfinished(self) -> Path:
        """Where it works."""
        return self.root / f".{self.name}.unfinished"

    @property
    def key(self) -> str:
        """Digest of all that it is made of."""
        return digest({"source": self.source, "settings": self.settings})

    def check(self) -> bool:
        """Whether the stage is done.

        Raises:
            ValueError: Its folder holds something else, or was made with other settings.
        """
        if not self.folder.exists():
            return False
        if not (self.folder / RECORD).is_file():
            raise ValueError(f"{self.folder} exists and is no stage of a pipeline; give another `output_dir`.")
        found = read_json(self.folder / RECORD, "the record of a stage")
        if found["key"] == self.key:
            return True
        changed = sorted(
            name
            for name in self.settings.keys() | found["settings"].keys()
            if self.settings.get(name) != found["settings"].get(name)
        )
        what = f"other settings ({', '.join(changed)})" if changed else "another model or other data"
        raise ValueError(
            f"{self.folder} was made from {what}; take another `output_dir`, or delete it to make it and what follows "
            "it again."
        )

    def run(self, build: Build) -> dict[str, Any]:
        """Make the stage unless it is done, and return the facts of its record.

        A stage that was killed goes on from what `build` kept, if that was made from the same settings.
        """
        if not self.check():
            record = {"key": self.key, "source": self.source, "settings": dict(self.settings)}
            self._make_room(record)
            written = self.unfinished / "model"
            written.mkdir()
            facts = dict(build(written, self.unfinished / "run"))
            write_json(record | {"facts": facts}, written / RECORD)
            os.replace(written, self.folder)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        facts = read_json(self.folder / RECORD, "the record of a stage")["facts"]
        return dict(facts)

    def _make_room(self, record: Mapping[str, Any]) -> None:
        """Keep what an earlier run of the same stage left to go on from, and nothing else."""
        path = self.unfinished / RECORD
        if not path.is_file() or read_json(path, "the record of a stage") != json.loads(json.dumps(record)):
            shutil.rmtree(self.unfinished, ignore_errors=True)
        shutil.rmtree(self.unfinished / "model", ignore_errors=True)
        (self.unfinished / "run").mkdir(parents=True, exist_ok=True)
        write_json(record, path)


def digest(value: Any) -> str:
    """16 bytes of BLAKE2b of plain values, hexadecimal; the order of names does not count."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
