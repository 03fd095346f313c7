"""`GateObjective`: which heads and neurons to cut, learned while the student distils."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_distill.functional.gates import open_probability, sampled_gates, settled_gates
from hf_distill.objectives.base import FeatureObjective
from hf_distill.objectives.schedules import Schedule, Scheduled, warmup
from hf_distill.signals import ModelShape, StudentSignals, TeacherSignals


# Where every gate begins: settled it is exactly 1, and drawn it is open with a probability of 0.99.
START = 3.0
CONSTRAINTS = ("linear", "quadratic")


class GateObjective(FeatureObjective):
    """Learns a gate for every head and neuron of the student under the loss of the run, within a budget.

    Each gate is a number in [0, 1] that multiplies what its head or neuron gives to the residual stream: drawn from a
    hard-concrete distribution in training (Louizos et al., arXiv 1712.01312), settled in evaluation. The term holds
    the expected number of open gates of every layer at the width of the cut, by Lagrange multipliers that climb while
    it is missed (CoFi, arXiv 2204.00408; Sheared LLaMA, arXiv 2310.06694: all layers get one shape, so that the
    result is a plain model). The other terms decide which ones stay open. Gates all begin at 1, which is the student
    bit for bit, and the budget closes in along `ramp`.

    Noise is drawn once for each optimizer step: micro-batches and ranks see the same gates. Gates, multipliers and
    draws are saved in checkpoints and resumed. They learn with the student's learning rate times
    `objective_lr_multiplier`, which they want near 0.1.

    Args:
        student: The model that will be trained, without adapters. The gates are in it until `finish` is called.
        spec: The cut that will be made: `intermediate_size`, `num_attention_heads`, or both.
        ramp: How much of the cut is asked for, from 0 to 1, by the progress of the run.
        seed: Of the noise.

    Raises:
        ValueError: The spec cuts neither heads nor neurons, or something that no gate decides.

    Example:
        ```python
        spec = PruneSpec(intermediate_size=1024, num_attention_heads=6)
        gates = GateObjective(student, spec)
        config = KDConfig("gated", learning_rate=1e-4, objective_lr_multiplier=1000.0)
        KDTrainer(student, teacher, config, objectives=[LogitObjective(1.0), gates], ...).train()
        student, report = prune(student, spec, gates.finish())
        ```
    """
