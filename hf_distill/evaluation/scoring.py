"""One pass of the teacher and the students over a dataset, from which every intrinsic metric is read."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_distill.anatomy import describe, resolve_head, task_of, unwrap
from hf_distill.evaluation.rows import CLASSIFICATION, Row, collate, count_targets, tokenize
from hf_distill.functional import forward_kl
from hf_distill.signals import IGNORE_INDEX, Projection, Signal, Targets, identity
from hf_distill.taps import tap_last_hidden


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
STUDENT, TEACHER = "student", "teacher"
STATISTICS = ("nll", "kl", "agreement", "correct")
# Of the expected calibration error, as in Guo et al., "On Calibration of Modern Neural Networks" (arXiv:1706.04599).
CONFIDENCE_BINS = 15
# Sizes of fp32 logits: of what is projected at once, and of what is evaluated at once. The second is small, so that
# the allocator hands the same memory out again.
TILE_BYTES = 2**25
BLOCK_BYTES = 2**22

# Logits `[n, V]` by role and labels `[n]` of a block of positions, all on one device, to `[k, n]` by any name.
Compare = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]


@dataclass(frozen=True)
class RowSums:
    """Sums over the scored positions of each row that has any.

    Args:
        count: `[n]` float64, the number of scored positions.
        sums: `[n]` float64 per name of `STATISTICS`.
        gaps: `[n, 15]` float64: correct (0 or 1) less confidence, summed over the positions of each confidence bin.
        answers: `[n]` int64, the token or class that was ranked first at a scored position: a classifier's answer.
    """

    count: np.ndarray
    sums: Mapping[str, np.ndarray]
    gaps: np.ndarray
    answers: np.ndarray


class Lineup:
    """The models that are compared, with what was already computed about them.

    Args:
        models: By role. A model is a `PreTrainedModel`, a PEFT model, or anything with `signals` (a Teacher).
        tokenizer: For datasets of text.

    Raises:
        ValueError: The models do not have the same task.
    """

    def __init__(self, models: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.models = dict(models)
        self.tokenizer = tokenizer
        tasks = {role: _task(model) for role, model in self.models.items()}
        if len(set(tasks.values())) > 1:
            raise ValueError(
                f"The models have different tasks: {tasks}; expected models of one task, to compare them."
            )
        self.task = next(iter(tasks.values()))
        self._known: dict[Hashable, Any] = {}

    def classes(self) -> int:
        """How many classes the classifiers tell apart.

        Raises:
            ValueError: The models differ in it, or have only one (regression).
        """
        counts = {role: _classes(model) for role, model in self.models.items()}
        if len(set(counts.values())) > 1 or min(counts.values()) < 2:
            raise ValueError(f"The classifiers have {counts} classes; expected the same number, at least 2.")
        return min(counts.values())

    def rows(self, dataset: Dataset, max_length: int | None) -> list[Row]:
        """The rows with something to score.

        Raises:
            ValueError: There is none, or an id is not in a model's vocabulary; see also `tokenize`.
        """
        # A dataset is kept alive by its benchmark for as long as this object is used: its id stays its own.
        return self.once(("rows", id(dataset), max_length), lambda: self._read(dataset, max_length))

    def _read(self, dataset: Dataset, max_length: int | None) -> list[Row]:
        rows = tokenize(dataset, self.task, self.tokenizer, max_length)
        rows = [row for row in rows if count_targets(row, self.task) > 0]
        if not rows:
            raise ValueError(
                f"`dataset` ({len(dataset)} rows) has no labelled token: every label is -100, or every row has "
                "one token. Look at the prompt mask and at `max_length`, which may cut the answers off."
            )
        for role, model in self.models.items():
            if (width := _width(model)) is not None:
                _check_ids(rows, role, width)
        return rows

    def row_sums(self, dataset: Dataset, max_length: int | None, batch_size: int) -> dict[str, RowSums]:
        """The sums of every model over the rows of a dataset, computed once."""
        key = ("sums", id(dataset), max_length, batch_size)
        return self.once(key, lambda: _score(self.models, self.task, self.rows(dataset, max_length), batch_size))

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What several benchmarks share: the first that asks for a key computes it."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    @contextmanager
    def running(self, role: str) -> Iterator[Any]:
        """The whole model of a role, for what only a model can do: generate, be timed.

        Raises:
            ValueError: It is a teacher that has no model here, such as a cache.
        """
        model = self.models[role]
        if isinstance(model, nn.Module):
            yield model
            return
        with model.as_model() as module:
            yield module

    def check_text_models(self, benchmark: str) -> None:
        """Check what a benchmark of texts needs: a tokenizer, and every model itself.

        Raises:
            ValueError: One is missing.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{benchmark} reads texts and `tokenizer` is None; expected the student's tokenizer: "
                "evaluate_retention(student, teacher, benchmarks, tokenizer=tokenizer)."
            )
        for role in self.models:
            with self.running(role):
                pass


@contextmanager
def preserved_state(models: Iterable[Any]) -> Iterator[None]:
    """Put models in evaluation mode without gradients.

    Every module's mode, the device of a model that is on one, and all random states are given back.
    """
    modules = [module for model in models if (module := module_of(model)) is not None]
    modes = {part: part.training for module in modules for part in module.modules()}
    places = [_devices(module) for module in modules]
    devices = {p.device for module in modules for p in module.parameters() if p.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(device.index for device in devices)))
        stack.enter_context(torch.no_grad())
        try:
            for module in modules:
                module.eval()
            yield
        finally:
            for part, training in modes.items():
                part.training = training
            for module, place in zip(modules, places, strict=True):
                if len(place) == 1 and _devices(module) != place:
                    module.to(*place)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _devices(module: nn.Module) -> set[torch.device]:
    return {parameter.device for parameter in module.parameters()}


def module_of(model: Any) -> nn.Module | None:
    """The model itself, or that of a Teacher; None for one that has none here."""
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    return module if isinstance(module, nn.Module) else None


def _task(model: Any) -> str:
    return task_of(unwrap(model)) if isinstance(model, nn.Module) else model.task


def _classes(model: Any) -> int:
    return unwrap(model).config.num_labels if isinstance(model, nn.Module) else len(model.labels)


def _width(model: Any) -> int | None:
    """Width of the logits: the vocabulary or the number of classes; None for a teacher that does not know."""
    if _task(model) == CLASSIFICATION:
        return _classes(model)
    return describe(model).vocab_size if isinstance(model, nn.Module) else model.vocab_size


def _check_ids(rows: list[Row], role: str, width: int) -> None:
    labels = np.concatenate([np.atleast_1d(row["labels"]) for row in rows])
    kept = labels[labels != IGNORE_INDEX]
    if kept.min() < 0 or kept.max() >= width:
        raise ValueError(
            f"`dataset` has labels from {kept.min()} to {kept.max()}, but the {role} gives logits for 0 to "
            f"{width - 1}; expected labels made with the models' own tokenizer or classes, -100 where not scored."
        )


def _score(models: Mapping[str, Any], task: str, rows: list[Row], batch_size: int) -> dict[str, RowSums]:
    """The sums of every model over the positions of each row."""
    found = {role: _Accumulator(len(rows)) for role in models}
    for row, tile in score_tiles(models, task, rows, batch_size, _against_teacher):
        for role, values in tile.items():
            found[role].add(row, values)
    return {role: accumulator.result() for role, accumulator in found.items()}


def score_tiles(
    models: Mapping[str, Any], task: str, rows: list[Row], batch_size: int, compare: Compare
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Run every model once over the rows, longest first so that batches hold little padding.

    Args:
        models: By role.
        task: Of all of them.
        rows: What is scored.
        batch_size: Rows of a forward pass.
        compare: Gets the logits of few positions at a time, so that those of a batch never exist together.

    Yields:
        The rows that some scored positions are of, `[n]` int64, and what `compare` made of them, `[k, n]` float64 on
        the CPU. The positions of a row come in their order.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    widest = max(_width(model) or 1 for model in models.values())
    tile_rows = max(1, TILE_BYTES // (4 * widest))
    for start in tqdm(range(0, len(rows), batch_size), desc="Scoring", disable=None, leave=False):
        index = torch.tensor(order[start : start + batch_size])
        batch = collate([rows[i] for i in index.tolist()])
        targets = Targets.from_labels(batch["labels"], shift=task == "causal_lm")
        row = index[targets.index // (batch["labels"].numel() // len(index))]
        projections = {role: project(model, task, batch).at(targets.index) for role, model in models.items()}
        for tile in torch.arange(len(targets)).split(tile_rows):
            yield row[tile], _compare_tile(projections, targets.labels, tile, compare)


def confidence_bin(confidence: Tensor) -> Tensor:
    """The bin of each confidence `[n]`: open on the left, 1/15 belongs to the first; nan to the first too."""
    return ((confidence.nan_to_num() * CONFIDENCE_BINS).ceil().long() - 1).clamp(0, CONFIDENCE_BINS - 1)


class _Accumulator:
    """The sums of one model over n rows."""

    def __init__(self, rows: int) -> None:
        self.count = torch.zeros(rows, dtype=torch.float64)
        self.sums = torch.zeros(len(STATISTICS), rows, dtype=torch.float64)
        self.gaps = torch.zeros(rows, CONFIDENCE_BINS, dtype=torch.float64)
        self.answers = torch.zeros(rows, dtype=torch.int64)

    def add(self, row: Tensor, values: Tensor) -> None:
        """Add positions: the row of each `[m]`, and what `_compare` gives `[6, m]`."""
        *_, correct, confidence, answer = values
        self.count.index_add_(0, row, torch.ones_like(confidence))
        self.sums.index_add_(1, row, values[: len(STATISTICS)])
        position = confidence_bin(confidence) + row * CONFIDENCE_BINS
        self.gaps.view(-1).index_add_(0, position, correct - confidence)
        self.answers[row] = answer.long()

    def result(self) -> RowSums:
        sums = dict(zip(STATISTICS, self.sums.numpy(), strict=True))
        return RowSums(self.count.numpy(), sums, self.gaps.numpy(), self.answers.numpy())


def project(model: Any, task: str, batch: Mapping[str, Tensor]) -> Projection:
    """Run a model on a batch of `collate` and give its logits before projection, `[B, S, H]` or `[B, C]`.

    Raises:
        ValueError: It is a teacher that gives sparse targets.
    """
    module = module_of(model)
    inputs: dict[str, Any] = dict(batch) if module is None else _inputs_for(unwrap(module), batch)
    if not isinstance(model, nn.Module):
        logits = model.signals(inputs, frozenset({Signal.LOGITS})).logits
        if not isinstance(logits, Projection):
            raise ValueError(
                f"{type(model).__name__} gives a few ids per token, and scores need logits over the vocabulary; pass "
                "the model that it was made from."
            )
        return logits
    del inputs["labels"]
    if task == CLASSIFICATION:
        return Projection(model(**inputs).logits, identity)
    if task == "causal_lm":
        inputs["use_cache"] = False
    with tap_last_hidden(model) as tap:
        model(**inputs)
    return Projection(tap.hidden, resolve_head(model))


def _inputs_for(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes of a batch, on its device, with its own padding id, which decoder classifiers look for."""
    accepted = {"labels", *inspect.signature(model.forward).parameters}
    inputs = {name: value.to(model.device) for name, value in batch.items() if name in accepted}
    pad = model.config.get_text_config().pad_token_id
    if pad is not None:
        inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, pad)
    return inputs


def _compare_tile(
    projections: Mapping[str, Projection], labels: Tensor, tile: Tensor, compare: Compare
) -> dict[str, Tensor]:
    """What `compare` makes of some of the scored positions, `[k, n]` float64 on the CPU by name."""
    parts = {role: projection.at(tile) for role, projection in projections.items()}
    logits = {role: part.head(part.hidden) for role, part in parts.items()}
    # They meet where the teacher is, if there is one.
    home = logits[TEACHER if TEACHER in logits else next(iter(logits))].device
    rows = max(1, BLOCK_BYTES // (4 * max(model.shape[-1] for model in logits.values())))
    split = {role: model.to(home).split(rows) for role, model in logits.items()}
    blocks = [
        compare({role: sides[i] for role, sides in split.items()}, gold)
        for i, gold in enumerate(labels[tile].to(home).split(rows))
    ]
    return {name: torch.cat([block[name] for block in blocks], 1).cpu().double() for name in blocks[0]}


def _against_teacher(logits: Mapping[str, Tensor], gold: Tensor) -> dict[str, Tensor]:
    return {role: _compare(model, logits[TEACHER], gold) for role, model in logits.items()}


def _compare(student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
    """`STATISTICS` of a block of logits, the probability of the first rank and what stands there, `[6, n]`."""
    shared = min(student.shape[-1], teacher.shape[-1])
    first, answer = student.max(-1)
    values = (
        torch.nn.functional.cross_entropy(student.float(), gold, reduction="none"),
        forward_kl(student[..., :shared], teacher[..., :shared]),
        student[..., :shared].argmax(-1) == teacher[..., :shared].argmax(-1),
        answer == gold,
        (first.float() - student.float().logsumexp(-1)).exp(),
        answer,  # exact in fp32 up to 16.7 million tokens
    )
    return torch.stack([value.float() for value in values])
