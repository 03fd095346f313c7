"""`GateObjective`: which heads and neurons to cut, learned while the student distils."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_distill.anatomy import describe
from hf_distill.functional.gates import open_probability, sampled_gates, settled_gates
from hf_distill.objectives.base import FeatureObjective
from hf_distill.objectives.schedules import Schedule, Scheduled, warmup
from hf_distill.signals import ModelShape, StudentSignals, TeacherSignals
from hf_distill.students.families import family_of
from hf_distill.students.resolve import target_of
from hf_distill.students.scores import ImportanceScores
from hf_distill.students.spec import PruneSpec
from hf_distill.students.surgery import check_readable
from hf_distill.students.widths import Widths


# Where every gate begins: settled it is exactly 1, and drawn it is open with a probability of 0.99.
START = 3.0
# The budget closes in over the first half of the run, and the student adapts in the second.
RAMP = warmup(1.0, 0.5)


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
        weight: Factor of the Lagrangian.
        ramp: How much of the cut is asked for, from 0 to 1, by the progress of the run.
        seed: Of the noise.

    Raises:
        ValueError: The student is quantised, has adapters or is sharded; the spec cuts neither heads nor neurons, or
            something that no gate chooses; or the ramp leaves its range.

    Example:
        ```python
        spec = PruneSpec(intermediate_size=1024, num_attention_heads=6)
        gates = GateObjective(student, spec)
        config = KDConfig("gated", learning_rate=1e-4, objective_lr_multiplier=1000.0)
        KDTrainer(student, teacher, config, objectives=[LogitObjective(1.0), gates], ...).train()
        student, report = prune(student, spec, gates.finish())
        ```
    """

    name = "gates"
    citation = "arXiv 1712.01312, arXiv 2310.06694"

    def __init__(
        self,
        student: PreTrainedModel,
        spec: PruneSpec,
        *,
        weight: float | Schedule = 1.0,
        ramp: Schedule | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight)
        check_readable(student, "GateObjective")
        ramp = RAMP if ramp is None else ramp
        if not all(0 <= share <= 1 for _, share in ramp.points):
            raise ValueError(f"`ramp` goes through {list(ramp.points)}; expected shares of the cut from 0 to 1.")
        self._gated = _gated_places(student, spec)
        self._seed = seed
        self._draws = 0
        self._noise: dict[str, Tensor] = {}
        self.log_alpha = nn.ParameterDict()
        self.multipliers = nn.ParameterDict()
        for kind, gated in self._gated.items():
            self.log_alpha[kind] = nn.Parameter(torch.full((len(gated.modules), gated.units), START))
            self.multipliers[kind] = nn.Parameter(torch.zeros(2, len(gated.modules), gated.groups))
        self._open_share = self.scheduled["open_share"] = _OpenShare(ramp, self)
        self._handles = [
            module.register_forward_pre_hook(partial(self._close, kind, index))
            for kind, gated in self._gated.items()
            for index, module in enumerate(gated.modules)
        ]

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Nothing of the models is chosen here: the gates are in the student already."""

    def move(self, progress: float) -> None:
        """Begin an optimizer step, with new noise."""
        super().move(progress)
        self._draws, self._noise = self._draws + 1, {}

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The Lagrangian of the budget, once for each label: divided by those of the step it counts once in it."""
        total = torch.zeros((), device=student.labels.device)
        for kind, gated in self._gated.items():
            target = 1 - self._open_share.ramp * (1 - gated.share)
            gap = open_probability(self.log_alpha[kind]).unflatten(1, (gated.groups, -1)).mean(-1) - target
            powers = torch.stack([gap, gap.square()])
            total = total + (self.multipliers[kind].detach() * powers).sum()
            # Multipliers climb where everything else descends; this adds their gradient and nothing to the value.
            climb = (self.multipliers[kind] * powers.detach()).sum()
            total = total - climb + climb.detach()
        return total * student.labels.numel()

    def finish(self) -> ImportanceScores:
        """Take the gates out of the student, their values multiplied into its weights, and make scores of them.

        The student computes what it computed in evaluation; units whose gate is 0 are dead and have the least scores.

        Raises:
            ValueError: It was called before.
        """
        if not self._gated:
            raise ValueError("`finish` was called before and the gates are gone; keep the scores that it gave.")
        for handle in self._handles:
            handle.remove()
        scores = {}
        for kind, gated in self._gated.items():
            location = self.log_alpha[kind].detach()
            for module, gates in zip(gated.modules, settled_gates(location), strict=True):
                _scale_inputs(module, gates.repeat_interleave(gated.width))
            scores[kind] = open_probability(location).repeat_interleave(gated.shared_by, dim=1)
        self._gated = {}
        return ImportanceScores(**scores, provenance=dict.fromkeys(scores, "hard-concrete gates"))

    def get_extra_state(self) -> Tensor:
        """What a checkpoint keeps besides the parameters: how often noise was drawn."""
        return torch.tensor([self._draws])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where a checkpoint was."""
        self._draws, self._noise = int(state), {}

    def open_share(self) -> float:
        """The expected share of open gates, of all kinds together."""
        with torch.no_grad():
            shares = torch.cat([open_probability(each).flatten() for each in self.log_alpha.values()])
        return float(shares.mean())

    def _close(self, kind: str, index: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Multiply what enters a projection by its layer's gates."""
        values, *rest = args
        location = self.log_alpha[kind][index].to(values.device)
        if module.training:
            gates = sampled_gates(location, self._uniform(kind)[index].to(values.device))
        else:
            gates = settled_gates(location)
        return values * gates.repeat_interleave(self._gated[kind].width).to(values.dtype), *rest

    def _uniform(self, kind: str) -> Tensor:
        """The noise of this optimizer step: the same in every micro-batch, on every rank, and after a resume."""
        if not self._noise:
            generator = torch.Generator().manual_seed(self._seed * 2**32 + self._draws)
            self._noise = {
                name: torch.rand(location.shape, generator=generator) for name, location in self.log_alpha.items()
            }
        return self._noise[kind]


@dataclass(frozen=True)
class _Gated:
    """Where the gates of one kind are.

    Args:
        modules: By layer, what the gated values enter.
        units: Gates of one layer.
        width: Channels of one unit.
        share: How many of the units stay.
        groups: Parts of a layer that each keep that share: heads that share keys and values, where `prune` cuts
            within each group.
        shared_by: How many heads have one gate: those of a group, where whole groups are cut.
    """

    modules: Sequence[nn.Module]
    units: int
    width: int
    share: float
    groups: int = 1
    shared_by: int = 1


class _OpenShare(Scheduled):
    """The share of open gates, logged beside the ramp that it follows."""

    def __init__(self, ramp: Schedule, gates: GateObjective) -> None:
        super().__init__(ramp)
        self.ramp = self.value
        self._read = gates.open_share

    def move(self, progress: float) -> None:
        """Take the ramp's value of a progress from 0 to 1, and read the gates."""
        super().move(progress)
        self.ramp, self.value = self.value, self._read()


@torch.no_grad()
def _scale_inputs(module: nn.Module, factors: Tensor) -> None:
    """Multiply the weights that read each input channel."""
    weight = module.weight
    factors = factors.to(weight)
    weight.mul_(factors[:, None] if isinstance(module, Conv1D) else factors)


def _gated_places(student: PreTrainedModel, spec: PruneSpec) -> dict[str, _Gated]:
    """Where the gates go, by kind.

    Raises:
        ValueError: The spec cuts neither neurons nor heads, or something else too.
    """
    parts, family = describe(student), family_of(student)
    before, target = Widths.of(parts.model.config, family), target_of(spec, student)
    after = target.widths
    other = ["depth"] * (target.depth != parts.num_layers) + ["hidden_size"] * (after.hidden != before.hidden)
    if other:
        raise ValueError(
            f"`spec` cuts {other}, which gates do not choose; they choose neurons and heads: give "
            "`intermediate_size` and `num_attention_heads` here, and cut the rest before or afterwards."
        )
    places = {}
    if after.neurons != before.neurons:
        modules = [family.mlp_output(layer) for layer in parts.layers]
        places["mlp"] = _Gated(modules, before.neurons, 1, after.neurons / before.neurons)
    if after.heads != before.heads:
        modules = [family.attention_output(layer) for layer in parts.layers]
        places["heads"] = _gated_heads(modules, before, after)
    if not places:
        raise ValueError(
            f"`spec` leaves {before.neurons} neurons and {before.heads} heads in each layer as they are; give smaller "
            "numbers."
        )
    return places


def _gated_heads(modules: Sequence[nn.Module], before: Widths, after: Widths) -> _Gated:
    group, share = before.heads // before.kv_heads, after.heads / before.heads
    if after.kv_heads == before.kv_heads:
        return _Gated(modules, before.heads, before.head_dim, share, groups=before.kv_heads)
    if after.heads != after.kv_heads * group:
        raise ValueError(
            f"`spec` cuts groups of heads ({before.kv_heads} to {after.kv_heads}) and heads within them ({group} to "
            f"{after.heads // after.kv_heads}); gates choose one of both: leave out `num_attention_heads` or "
            "`num_key_value_heads`."
        )
    return _Gated(modules, before.kv_heads, group * before.head_dim, share, shared_by=group)
