"""`estimate_importance`: how much each neuron, head, channel and layer of a model matters, measured on text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_distill.anatomy import Anatomy, describe
from hf_distill.students.calibration import CalibrationLoss, Sequences, left_as_it_was
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.statistics import BlockInfluence, FirstOrder, MeanActivation, Statistic, Units
from hf_distill.taps.skipping import SkippableLayers


GRADIENT_METHODS = ("taylor", "fisher")
CHANNEL_METHODS = ("activation", *GRADIENT_METHODS, "weight")
METHODS = dict.fromkeys(("mlp", "heads", "hidden"), CHANNEL_METHODS) | {
    "layers": ("block_influence", "leave_one_out")
}
LOSS_METHODS = (*GRADIENT_METHODS, "leave_one_out")
DEFAULT = {"mlp": "activation", "heads": "activation", "hidden": "activation", "layers": "block_influence"}
# Nats per token: a student this near to its teacher is its teacher, and the rest is rounding.
SAME_MODEL = 1e-6


def estimate_importance(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    *,
    methods: Mapping[str, str] = DEFAULT,
    teacher: nn.Module | None = None,
    max_tokens: int | None = None,
    show_progress: bool = True,
) -> ImportanceScores:
    """Score the units of a model on calibration text, for `prune`: the higher, the more it loses without the unit.

    Methods of `mlp` (neurons), `heads` and `hidden` (channels of the residual stream):

    - `activation`: the mean of |a| over the tokens of a sequence, squares of it added up over sequences, as Minitron
      (arXiv 2407.14679). a is what enters the down projection, what enters the output projection (channels of a head
      by their L2 norm), or what leaves the norms (added up over norms).
    - `taylor`: |sum of a * dL/da| of each sequence, the mean over sequences, with the true gradient of the loss
      (arXiv 1906.10771). `fisher`: its square instead (arXiv 2204.09656).
    - `weight`: the L2 norm of the unit's weights, no text needed: what `prune` takes without scores.

    Methods of `layers`: `block_influence`, 1 - cos of what enters a layer and what leaves it (arXiv 2403.03853), and
    `leave_one_out`, the increase of the loss, in nats per label, when the layer is left out: a forward pass each.

    The loss is cross-entropy on `labels` (without labels on all real tokens of a causal model), or, with a teacher,
    the forward KL from it. Every statistic is that of whole sequences, so it does not matter how they are put into
    batches; padding never counts. Scores are added up in fp32. The model, its gradients, modes and hooks, and the
    random generators are left as they were, also where it fails.

    With `teacher` the scores say what the student loses of its teacher. A student that still is its teacher has the
    least possible KL, where every gradient is 0: score the first cut by cross-entropy, or by activations.

    Args:
        model: What will be pruned; a family that `prune` knows, without adapters and not quantised.
        dataloader: Batches of `input_ids` `[B, S]`, `attention_mask`, `labels` and so on, as for the model.
        methods: By kind of unit; kinds that are left out are not scored.
        teacher: Guides the methods that have a loss; a model of the same task and vocabulary.
        max_tokens: Stop after the batch in which so many real tokens have been seen.
        show_progress: Whether to show a bar.

    Returns:
        Scores on the CPU in fp32, with what they were made of.

    Raises:
        ValueError: A kind or method is unknown or not one of this family's, there is no text or no label, a teacher
            is given that no method would ask, or scores vanish because the student is its teacher.

    Example:
        >>> scores = estimate_importance(model, DataLoader(rows, batch_size=8, collate_fn=collator))
        >>> scores.save("outputs/importance")
    """
    methods = _check_methods(methods, teacher)
