"""The settings of a compression: those of the distillation, and what is cut and rounded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hf_distill.students import PruneSpec
from hf_distill.students.importance import DEFAULT, check_methods
from hf_distill.training.arguments import KDConfig


PRUNE, DISTIL, QUANTIZE = STEPS = ("P", "KD", "Q")
# Methods whose rounding can be trained with: bits, and the format that `convert_qat` writes.
TRAINABLE = {"int8": (8, "torchao"), "w8a16": (8, "compressed-tensors"), "w4a16": (4, "compressed-tensors")}
GROUP_SIZE = 32
# What of a run does not change its result.
NOT_SETTINGS = frozenset(
    {
        "output_dir",
        "order",
        "prune",
        "steps",
        "guided",
        "importance",
        "calibration_tokens",
        "quantization",
        "group_size",
    }
    | {"adapt_teacher", "adapt_learning_rate", "run_name", "report_to", "disable_tqdm", "push_to_hub", "hub_token"}
    | {"save_strategy", "save_steps", "save_total_limit", "logging_steps", "logging_strategy", "logging_dir"}
    | {"logging_first_step", "log_level", "hub_model_id", "teacher_model_name_or_path", "resume_from_checkpoint"}
)


@dataclass
class CompressConfig(KDConfig):
    """A `KDConfig`, whose fields are those of the KD stage, and the fields of the pipeline.

    Args:
        order: Any of P (prune), KD (distil) and Q (quantise) in any order, each once: "P-KD-Q", "P-KD", "KD-P-Q".
        prune: Fields of `PruneSpec`, as a dict or JSON, or a `PruneSpec`.
        steps: In how many cuts P is made, with a KD of `max_steps` between them: "P-KD" in 2 is P-KD-P-KD. 1 cuts
            all at once, whatever it is; more of them at most a third each; 0 takes the fewest that do.
        importance: Method by kind of unit, see `estimate_importance`, as a dict or JSON; its defaults if None.
        guided: Score by the KL from the teacher, instead of the cross-entropy, all cuts but one of the teacher itself,
            whose KL is 0; by the methods that have a loss.
        calibration_tokens: Training tokens on which importance is measured.
        quantization: A method of `quantize`: "int8", "w8a16", "w4a16", "nf4"...
        group_size: Weights that share a scale; None for the method's choice, and 32 where KD follows Q.
        adapt_teacher: Steps that the teacher is trained on the text first, by cross-entropy; 0 for none.
        adapt_learning_rate: Of these steps.
        max_length: Longer rows of text are cut.
        model_kwargs: For `from_pretrained` of teacher and students, such as `{"attn_implementation": "eager"}`, as a
            dict or JSON.

    Raises:
        ValueError: A field is out of its range, or fields contradict each other.
    """

    order: str = field(default="P-KD-Q", metadata={"help": "P, KD and Q in any order, each at most once."})
    prune: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What is cut, as JSON: '{\"params_ratio\": 0.7}', which is the default."}
    )
    steps: int = field(
        default=1, metadata={"help": "Cuts that P is made in, with KD between; 0 for the fewest of at most a third."}
    )
    importance: dict[str, str] | str | None = field(
        default=None, metadata={"help": "Importance method by kind of unit, as JSON."}
    )
    guided: bool = field(
        default=False, metadata={"help": "Score by the KL from the teacher what is no longer the teacher."}
    )
    calibration_tokens: int = field(default=65_536, metadata={"help": "Tokens that importance is measured on."})
    quantization: str = field(default="int8", metadata={"help": "Method of quantisation."})
    group_size: int | None = field(default=None, metadata={"help": "Weights that share a scale."})
    adapt_teacher: int = field(default=0, metadata={"help": "Steps to train the teacher on the text first."})
    adapt_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of these steps."})
    max_length: int | None = field(default=None, metadata={"help": "Longer rows of text are cut."})
    model_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained, as JSON."}
    )

    def __post_init__(self) -> None:
        self.order = "-".join(parse_order(self.order))
        prune = self.prune.to_dict() if isinstance(self.prune, PruneSpec) else _mapping("prune", self.prune)
        self.prune = _spec(prune or {"params_ratio": 0.7}).to_dict()
        self.importance = _mapping("importance", self.importance)
        check_methods(importance_of(self), name="importance")
        self.model_kwargs = _mapping("model_kwargs", self.model_kwargs)
        self._check_numbers()
        self._check_order()
        if self.push_to_hub:
            raise ValueError(
                "`push_to_hub` would push every stage; push the last by `hf-distill push FOLDER REPO_ID`."
            )
        super().__post_init__()

    def _check_numbers(self) -> None:
        least = {"steps": 0, "calibration_tokens": 1, "adapt_teacher": 0, "max_length": 2}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"`{name}` is {value}; expected a whole number >= {smallest}.")
        if self.adapt_learning_rate <= 0:
            raise ValueError(f"`adapt_learning_rate` is {self.adapt_learning_rate}; expected more than 0.")

    def _check_order(self) -> None:
        """Refuse what the order has no step for, and training with a rounding that cannot be trained with."""
        kinds = self.kinds
        if self.steps != 1 and not {PRUNE, DISTIL} <= set(kinds):
            raise ValueError(
                f"`steps` is {self.steps}, but `order` ({self.order}) does not have both P and KD: cuts are made in "
                "steps to train between them."
            )
        after = kinds[kinds.index(QUANTIZE) :] if QUANTIZE in kinds else ()
        trains_rounding = DISTIL in after or (self.steps != 1 and PRUNE in after)
        if trains_rounding and self.quantization not in TRAINABLE:
            raise ValueError(
                f"`order` is {self.order!r}, where KD trains with the rounding, and `quantization` is "
                f"{self.quantization!r}, which has none that can be trained with; take one of {list(TRAINABLE)}, or "
                "put Q behind KD."
            )
        if trains_rounding and self.group_size is None:
            self.group_size = GROUP_SIZE
        if self.adapt_teacher and DISTIL not in kinds:
            raise ValueError(f"`adapt_teacher` is {self.adapt_teacher}, but `order` ({self.order}) has no KD.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The steps of `order`."""
        return parse_order(self.order)

    @property
    def spec(self) -> PruneSpec:
        """What is cut."""
        assert isinstance(self.prune, dict)
        return _spec(self.prune)

    def training_settings(self) -> dict[str, Any]:
        """The fields that the result of training depends on, as JSON can hold them."""
        values = {name: value for name, value in self.to_dict().items() if name not in NOT_SETTINGS}
        return dict(json.loads(json.dumps(values, default=str)))


def parse_order(order: str) -> tuple[str, ...]:
    """Read the steps of an order.

    Raises:
        ValueError: A step is unknown, missing or there twice.
    """
    steps = tuple(order.upper().split("-")) if isinstance(order, str) else ()
    if not steps or set(steps) - set(STEPS) or len(set(steps)) < len(steps):
        raise ValueError(
            f"`order` is {order!r}; expected some of P (prune), KD (distil) and Q (quantise), each once, in the order "
            'in which they are done: "P-KD-Q".'
        )
    return steps


def importance_of(args: CompressConfig) -> dict[str, str]:
    """How each kind of unit is scored."""
    return dict(args.importance or DEFAULT)  # type: ignore[arg-type] # text was read by the config


def _mapping(name: str, value: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"`{name}` is {value!r}, which is no JSON ({error}).") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"`{name}` is {value!r}; expected a mapping.")
    return value


def _spec(fields: dict[str, Any]) -> PruneSpec:
    known = PruneSpec.__dataclass_fields__
    if unknown := sorted(fields.keys() - known.keys()):
        raise ValueError(f"`prune` has {unknown}; expected some of {list(known)}.")
    return PruneSpec(**fields)
