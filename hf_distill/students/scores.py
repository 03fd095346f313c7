"""How much each part of a model matters: measured once, kept in a folder, used for many cuts."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


WEIGHTS, RECORD = "importance.safetensors", "importance.json"
# Field -> the dimensions of its tensor.
SHAPES = {"mlp": "[L, I]", "heads": "[L, H]", "hidden": "[D]", "layers": "[L]"}


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """Importance of neurons, heads, channels and layers: the higher, the more it matters. fp32 on the CPU.

    Only the order counts, and only within one layer for neurons and heads; None for what was not measured.

    Args:
        mlp: Neurons of each layer, `[L, I]`.
        heads: Query heads of each layer, `[L, H]`; heads that share keys and values are next to each other.
        hidden: Channels of the residual stream, which all layers share, `[D]`.
        layers: Layers, `[L]`.
        provenance: Field -> how it was found, in words for the card: the method, the text, how many tokens.

    Raises:
        ValueError: A tensor has another number of dimensions, or holds NaN or infinity.
    """

    mlp: Tensor | None = None
    heads: Tensor | None = None
    hidden: Tensor | None = None
    layers: Tensor | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, shape in SHAPES.items():
            scores = getattr(self, name)
            if scores is None:
                continue
            if scores.dim() != shape.count(",") + 1 or not scores.isfinite().all():
                raise ValueError(
                    f"`{name}` has shape {list(scores.shape)} and {int((~scores.isfinite()).sum())} values that are "
                    f"not finite; expected finite scores of shape {shape}."
                )
            object.__setattr__(self, name, scores.detach().to("cpu", torch.float32))

    def save(self, folder: str | Path) -> None:
        """Write the scores to a new folder; a folder of older scores is replaced when the new ones are complete.

        Raises:
            ValueError: The folder exists and holds other things.
        """
        folder = Path(folder)
        if folder.exists() and {path.name for path in folder.iterdir()} - {WEIGHTS, RECORD}:
            raise ValueError(f"{folder} holds other files than scores; give the path of a new folder.")
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir(parents=True)
        try:
            tensors = {name: getattr(self, name) for name in SHAPES if getattr(self, name) is not None}
            save_file({name: scores.contiguous() for name, scores in tensors.items()}, unfinished / WEIGHTS)
            shapes = {name: list(scores.shape) for name, scores in tensors.items()}
            record = {"shapes": shapes, "provenance": self.provenance}
            (unfinished / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    @classmethod
    def load(cls, folder: str | Path) -> ImportanceScores:
        """Read scores that `save` wrote.

        Raises:
            ValueError: The folder does not hold scores, or its two files do not belong together.
        """
        folder = Path(folder)
        if not (folder / RECORD).is_file() or not (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{folder} does not hold {RECORD} and {WEIGHTS}. Write them with `scores.save({str(folder)!r})`."
            )
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
        if {name: list(scores.shape) for name, scores in tensors.items()} != record["shapes"]:
            raise ValueError(f"{folder / WEIGHTS} does not hold what {RECORD} says; measure the scores again.")
        return cls(**tensors, provenance=record["provenance"])
