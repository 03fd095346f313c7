"""What a model's folder must hold, and must not, before anyone is given it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open


# The last file of a checkpoint.
STATE = "trainer_state.json"
# Of a run's folder, what is not of the model: checkpoints, logs, the trainer's state, what is being written.
LEFT_OUT = ("checkpoint-*", "runs", "logs", ".*", "_*", "*.tmp", "training_args.bin", STATE)
CONFIGS = ("config.json", "adapter_config.json")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def is_left_out(path: str) -> bool:
    """Whether a file, by its path in the folder, is not of the model."""
    return any(fnmatch(part, pattern) for part in Path(path).parts for pattern in LEFT_OUT)


def files_of(folder: Path) -> list[str]:
    """The paths of the model's files in its folder, in order."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if not is_left_out(path))


def check_folder(folder: Path) -> None:
    """Check that a folder holds one whole model and no other weights.

    Raises:
        ValueError: Its config or weights are missing or cut short, or it holds weights that are not the model's, for
            example a teacher's, or half of a checkpoint.
    """
    if not any((folder / name).exists() for name in CONFIGS):
        found = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f" It has {found}: push `{folder / found[-1]}`, or save the model first." if found else ""
        raise ValueError(f"{folder} holds no model: there is no config.json or adapter_config.json.{hint}")
    unfinished = sorted(path.name for path in folder.glob("checkpoint-*") if not (path / STATE).exists())
    if unfinished:
        raise ValueError(
            f"{folder} holds {unfinished}, which were not written to their end: the run was stopped there. Go on with "
            "it (`trainer.train(resume_from_checkpoint=True)` after deleting them), or delete them to push what it "
            "saved before."
        )
    own = list(_own_weights(folder))
    if not own:
        raise ValueError(f"{folder} holds no weights: expected one of {[*WEIGHTS, INDEX]}; save the model again.")
    for name in own:
        _check_weights(folder / name)
    others = [path for path in files_of(folder) if path.endswith(OTHER_WEIGHTS) and path not in own]
    if others:
        raise ValueError(
            f"{folder} holds weights that are not the model's: {others}. Move them out, so that no teacher and no "
            "half of a save is published."
        )


def _own_weights(folder: Path) -> Iterator[str]:
    """The files of the model's weights."""
    yield from (name for name in WEIGHTS if (folder / name).exists())
    if (folder / INDEX).exists():
        yield from sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))


def _check_weights(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path} is missing: the save of the model was not finished; save it again.")
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); save the model again.") from None
    if foreign := [name for name in names if name.startswith(("teacher.", "teacher_model."))]:
        raise ValueError(f"{path} holds a teacher's weights, for example {foreign[0]!r}; save the student alone.")
