"""The objectives of published recipes for encoders, as lists for `objectives=[...]`.

What they compare inside the models they compare at all real tokens, as the papers do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from hf_distill.objectives.attention import AttentionObjective
from hf_distill.objectives.base import Objective
from hf_distill.objectives.hidden import HiddenStateObjective
from hf_distill.objectives.layer_map import layer_pairs
from hf_distill.objectives.logits import LogitObjective
from hf_distill.signals import ModelShape, StudentSignals, TeacherSignals


if TYPE_CHECKING:
    Base = HiddenStateObjective  # or AttentionObjective: what is used of them has the same names
else:
    Base = object


def distilbert_objectives(
    kd_weight: float = 5.0, cosine_weight: float = 1.0, temperature: float = 2.0
) -> list[Objective]:
    """DistilBERT (arXiv:1910.01108): soft targets, and the direction of the last hidden states.

    The third term there, masked language modelling on the labels, is the trainer's `ce_weight`: 2.0 with these
    defaults, which are those of the code. Its students have every second layer of the teacher to begin with; `shrink`
    makes one. There the soft targets also count tokens that are not masked; here they count the labelled ones.

    Args:
        kd_weight: Weight of the soft targets.
        cosine_weight: Weight of the cosine distance; the widths are equal there, others get a projector.
        temperature: Of the soft targets.

    Example:
        ```python
        args = KDConfig("student", ce_weight=2.0)
        trainer = KDTrainer(student, teacher, args, objectives=distilbert_objectives(), ...)
        ```
    """
    last = DistilBertHiddenStates(cosine_weight, loss="cosine", layer_mapping=[(-1, -1)], positions="real")
    return [LogitObjective(kd_weight, temperature=temperature), last]


def tinybert_objectives(hidden_weight: float = 1.0, attention_weight: float = 1.0) -> list[Objective]:
    """TinyBERT's first stage (arXiv:1909.10351): hidden states and attention scores, squared and summed over layers.

    The embeddings are compared, and every layer of the student with the teacher's at the same relative depth, through
    one projector for all; attention needs equal numbers of heads. Train with `ce_weight=0.0`; the second stage, on
    soft targets, is `[LogitObjective(1.0)]` with `ce_weight=0.0`.

    Args:
        hidden_weight: Weight of the sum over hidden states.
        attention_weight: Weight of the sum over attention scores.
    """
    return [
        TinyBertHiddenStates(hidden_weight, loss="mse", shared_projector=True, positions="real"),
        TinyBertAttention(attention_weight, loss="score_mse", positions="real"),
    ]


def minilm_objectives(weight: float = 1.0, teacher_layer: int = -1) -> list[Objective]:
    """MiniLMv2 (arXiv:2012.15828): relations of queries, keys and values at the student's last layer.

    Train with `ce_weight=0.0`; the student is fine-tuned on its task afterwards.

    Args:
        weight: Weight of the three relations together.
        teacher_layer: The last one for teachers of 12 layers; for 24 layers the paper takes the 19th to 21st.
    """
    return [MiniLMAttention(weight, loss="relations", layer_mapping=[(-1, teacher_layer)], positions="real")]


class ForEncoders(Base):
    """What stands before the objective in a term of these recipes: it refuses decoders.

    Attributes:
        recipe: Its name, for messages.
        first_layer: Every layer of the student from this one on is paired, and the pairs are summed instead of
            averaged; None leaves both to the objective.
    """

    recipe: ClassVar[str]
    first_layer: ClassVar[int | None] = None

    def bind(self, student: ModelShape, teacher: ModelShape) -> None:
        """Refuse decoders, and pair the layers; see `FeatureObjective.bind`."""
        _refuse_decoders(self.recipe, student, teacher)
        if self.first_layer is not None:
            embeddings = [(0, 0)] if self.first_layer == 0 else []
            self.layer_mapping = [*embeddings, *layer_pairs("uniform", student.num_layers, student, teacher)]
        super().bind(student, teacher)

    def forward(self, student: StudentSignals, teacher: TeacherSignals) -> Tensor:
        """The sum over labels, and over every layer's pair; see `FeatureObjective.forward`."""
        mean = super().forward(student, teacher)
        return mean if self.first_layer is None else mean * len(self.pairs)


class DistilBertHiddenStates(ForEncoders, HiddenStateObjective):
    """See `distilbert_objectives`."""

    recipe = "distilbert_objectives"


class TinyBertHiddenStates(ForEncoders, HiddenStateObjective):
    """See `tinybert_objectives`."""

    recipe = "tinybert_objectives"
    first_layer = 0


class TinyBertAttention(ForEncoders, AttentionObjective):
    """See `tinybert_objectives`."""

    recipe = "tinybert_objectives"
    first_layer = 1


class MiniLMAttention(ForEncoders, AttentionObjective):
    """See `minilm_objectives`."""

    recipe = "minilm_objectives"


def _refuse_decoders(recipe: str, student: ModelShape, teacher: ModelShape) -> None:
    if student.is_causal or teacher.is_causal:
        kinds = [
            f"the {model.name} is {'a decoder' if model.is_causal else 'an encoder'}" for model in (student, teacher)
        ]
        raise ValueError(
            f"`{recipe}` is a recipe for encoders, but {kinds[0]} and {kinds[1]}; use "
            "`[LogitObjective(0.5), HiddenStateObjective(0.1)]` for decoders."
        )
