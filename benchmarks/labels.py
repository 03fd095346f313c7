"""What soft labels on disk keep: the gradient of the forward KL from them against that from the teacher itself.

The teacher is SmolLM2-135M-Instruct, the student the same model with noise in its weights, the text reviews. A case is
an encoding or a preset, built and read as a training does; its bytes are those of all files. Those of DistillKit are
the compression and loss of its package, in the configurations of its README; their bytes are the compressed arrays.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from measure import in_child
from step import models
from torch import Tensor

from hf_distill.cache import CacheReader, build_cache
from hf_distill.cache.registry import PRESETS
from hf_distill.cache.rows import rows_of as rows_of_example
from hf_distill.functional import LMHead, SparseLogits, linear_distillation_loss
from hf_distill.signals import Projection, Signal, TeacherSignals


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from assets import pack, review_texts


AT_ONCE = 1024
# Tokens, the student's hidden states at them, its head: the loss summed over the tokens.
Loss = Callable[[slice, Tensor, LMHead], Tensor]


@dataclass(frozen=True)
class Setting:
    """What is distilled: `noise` is that of the student's weights, in standard deviations of each matrix."""

    rows: int = 202
    length: int = 256
    noise: float = 0.12


@dataclass(frozen=True)
class Outputs:
    """What both models say at all labelled tokens, before the projection, and the labels."""

    hidden: Tensor
    head: LMHead
    teacher: Projection
    labels: Tensor


@dataclass(frozen=True)
class Gradient:
    """Of the mean loss, in the student's hidden states `[N, H]` and its head `[V, H]`."""

    hidden: Tensor
    head: Tensor

    def compare(self, exact: Gradient) -> dict[str, float]:
        """Angle of the heads' gradients in degrees, ratio of their norms, mean cosine of those of the tokens."""
        cosine = F.cosine_similarity(self.head.flatten().double(), exact.head.flatten().double(), dim=0)
        tokens = F.cosine_similarity(self.hidden.float(), exact.hidden.float(), dim=1)
        norms = self.head.norm() / exact.head.norm()
        angle = math.degrees(math.acos(min(cosine.item(), 1.0)))
        return {"angle": angle, "norm": norms.item(), "token_cosine": tokens.mean().item()}


# DistillKit's README calls them "recommended" and "budget pick".
DISTILLKIT = {
    "recommended": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "budget": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}
COMMON = {"exact_dtype": "bfloat16", "term_dtype": "float32", "residual_bins": [], "delta_encoding": False}
ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in (*PRESETS, "hidden")}
ENCODINGS["topk, k = 50"] = ("topk", {"k": 50})
# By what DistillKit's loss does with the mass beyond the ids; "zero" is its default.
MISSING = ("zero", "symmetric_uniform")
CASES = [*ENCODINGS, *(f"DistillKit {name}, {missing}" for name in DISTILLKIT for missing in MISSING)]


def available() -> list[str]:
    """The cases that can run here."""
    here = importlib.util.find_spec("distillkit") is not None
    return [name for name in CASES if here or not name.startswith("DistillKit")]


def measure(setting: Setting, names: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Bytes a token and gradients of the cases, which are the same in every turn: one is taken."""
    cases = in_child(_measure, setting, names, threads)
    return {"setting": asdict(setting), "threads": threads, "cases": cases}


def rows_of(teacher: Any, setting: Setting) -> Dataset:
    """Packed reviews, the rows of one length."""
    texts = [row.text for row in review_texts()["train"]]
    return pack(texts, teacher.tokenizer, setting.length).select(range(setting.rows))


def _measure(setting: Setting, names: list[str], threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _, teacher = models([0])
    rows = rows_of(teacher, setting)
    outputs = _outputs(teacher, rows, setting.noise)
    exact = _gradient(outputs, partial(_ours, outputs, outputs.teacher))
    found = {}
    for name in names:
        if name.startswith("DistillKit"):
            size, loss = _of_distillkit(outputs, *name.removeprefix("DistillKit ").split(", "))
        else:
            size, loss = _of_encoding(outputs, teacher, rows, name)
        found[name] = {"bytes": size, **_gradient(outputs, loss).compare(exact)}
        print(name, found[name], flush=True)
    return found


@torch.no_grad()
def _outputs(teacher: Any, rows: Dataset, noise: float) -> Outputs:
    student, ids = copy.deepcopy(teacher.model), torch.tensor(rows["input_ids"])
    for weight in student.parameters():
        if weight.dim() > 1:
            weight += torch.randn_like(weight) * (noise * weight.float().std())
    hidden, known = (
        torch.cat([model.model(input_ids=part).last_hidden_state for part in ids.split(8)])
        for model in (student, teacher.model)
    )
    head, teacher_head = (LMHead(model.lm_head.weight.detach()) for model in (student, teacher.model))
    _recall(teacher, {tuple(row): states for row, states in zip(ids.tolist(), known, strict=True)}, teacher_head)
    hidden, known = (states[:, :-1].flatten(0, 1) for states in (hidden, known))
    return Outputs(hidden, head, Projection(known, teacher_head), ids[:, 1:].flatten())


def _recall(teacher: Any, known: dict[tuple[int, ...], Tensor], head: LMHead) -> None:
    """Let a teacher say again what it said of rows: each case asks for the same, which is minutes of work."""

    def signals(batch: Mapping[str, Tensor], needs: Collection[Signal]) -> TeacherSignals:
        return TeacherSignals(
            Projection(torch.stack([known[tuple(row)] for row in batch["input_ids"].tolist()]), head)
        )

    teacher.signals = signals


def _gradient(outputs: Outputs, loss: Loss) -> Gradient:
    """Of the mean over all tokens, some tokens at a time."""
    hidden, weight = [], torch.zeros(outputs.head.weight.shape)
    for start in range(0, len(outputs.labels), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        leaf, head = outputs.hidden[part].detach().requires_grad_(), outputs.head.weight.detach().requires_grad_()
        (loss(part, leaf, LMHead(head)) / len(outputs.labels)).backward()
        hidden.append(leaf.grad)
        weight += head.grad
    return Gradient(torch.cat(hidden), weight)


def _ours(outputs: Outputs, targets: SparseLogits | Projection, part: slice, hidden: Tensor, head: LMHead) -> Tensor:
    """The sum over some tokens, from the teacher or from what was read."""
    kept = targets.at(torch.arange(len(outputs.labels))[part])
    given = {"teacher_targets": kept}
    if isinstance(kept, Projection):
        given = {"teacher_hidden": kept.hidden, "teacher_head": kept.head}
    labels = outputs.labels[part]
    loss = {"terms": {"forward_kl": 1.0}, "temperature": 1.0, "denominator": 1}
    return linear_distillation_loss(hidden, head, labels, **loss, **given).loss


def _of_encoding(outputs: Outputs, teacher: Any, rows: Dataset, name: str) -> tuple[float, Loss]:
    encoding, options = ENCODINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        manifest = build_cache(teacher, rows, folder, encoding=encoding, show_progress=False, **options)
        reader = CacheReader(folder)
        parts = [row for example in rows for row in rows_of_example(example)]
        return manifest.bytes / manifest.tokens, partial(_ours, outputs, reader.targets(parts))


def _of_distillkit(outputs: Outputs, name: str, missing: str) -> tuple[float, Loss]:
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor
    from distillkit.lossfuncs.kl import sparse_kl_div
    from distillkit.missing_probability import MissingProbabilityHandling

    config = DistributionQuantizationConfig(d=len(outputs.head.weight), **DISTILLKIT[name], **COMMON)
    compressor, size, kept = LogprobCompressor(config), 0, {}
    for start in range(0, len(outputs.labels), AT_ONCE):
        theirs = outputs.teacher.at(torch.arange(start, min(start + AT_ONCE, len(outputs.labels))))
        values, ids = theirs.head(theirs.hidden).float().log_softmax(-1).topk(config.k)
        packed = compressor.compress_from_sparse(ids, values)
        size += sum(array.numel() * array.element_size() for array in packed.values())
        kept[start] = compressor.decompress_to_sparse(packed)

    def loss(part: slice, hidden: Tensor, head: LMHead) -> Tensor:
        ids, values = kept[part.start]
        logits = head(hidden).float()
        return sparse_kl_div(logits[None], ids[None], values[None], missing=MissingProbabilityHandling(missing))

    return size / len(outputs.labels), loss
