"""Which widths a config can have, and the config that has them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_distill.attention_anatomy import head_shape
from hf_distill.students.families import Axis, Family
from hf_distill.students.spec import PruneSpec


@dataclass(frozen=True)
class Widths:
    """The widths of a model.

    Args:
        hidden: Channels of the residual stream.
        neurons: Of an MLP.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        head_dim: Width of a head, which no cut changes.
    """

    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PreTrainedConfig, family: Family) -> Widths:
        """Read the widths of a config."""
        shape = head_shape(config)
        return cls(
            config.hidden_size, family.neurons(config), shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
        )

    def size(self, axis: Axis) -> int | None:
        """The size of an axis; None for one that is never cut."""
        return {
            Axis.HIDDEN: self.hidden,
            Axis.MLP: self.neurons,
            Axis.GATE_UP: 2 * self.neurons,
            Axis.QUERY: self.heads * self.head_dim,
            Axis.KEY_VALUE: self.kv_heads * self.head_dim,
            Axis.QKV: (self.heads + 2 * self.kv_heads) * self.head_dim,
        }.get(axis)


def config_of_widths(config: PreTrainedConfig, family: Family, widths: Widths) -> PreTrainedConfig:
    """A copy of a config with other widths."""
    config, before = copy.deepcopy(config), Widths.of(config, family)
    changes: dict[str, Any] = {}
    if widths.neurons != before.neurons:
        changes[family.mlp_width] = widths.neurons
    if (widths.hidden, widths.heads, widths.kv_heads) != (before.hidden, before.heads, before.kv_heads):
        changes |= {
            "hidden_size": widths.hidden,
            "num_attention_heads": widths.heads,
            "num_key_value_heads": widths.kv_heads,
            "head_dim": widths.head_dim,  # the default, hidden size over heads, would be another one now
        }
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def choose_widths(spec: PruneSpec, config: PreTrainedConfig, family: Family) -> Widths:
    """The widths that a spec names, rounded and checked; those that it does not name stay as they are.

    Raises:
        ValueError: The family does not allow the cut, a number is larger than before, the heads do not fit into their
            groups, or transformers refuses the combination; the message lists what is possible.
    """
    before = Widths.of(config, family)
    _check_cuttable(spec, family, before)
    heads, kv_heads = _heads(spec, before, config, family)
    widths = Widths(
        hidden=_rounded("hidden_size", spec.hidden_size, before.hidden, spec.round_to),
        neurons=_rounded("intermediate_size", spec.intermediate_size, before.neurons, spec.round_to),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=before.head_dim,
    )
    reason = refusal(config, family, widths)
    if reason is None:
        return widths
    pairs = [(heads, kv) for heads, kv in _head_choices(before) if _allowed(config, family, widths, heads, kv)]
    hidden = [
        size
        for size in grid(before.hidden, spec.round_to, spec.round_to)
        if refusal(config, family, Widths(size, widths.neurons, heads, kv_heads, widths.head_dim)) is None
    ]
    raise ValueError(
        f"{type(config).__name__} does not take hidden_size={widths.hidden} with {heads} attention heads, of "
        f"{kv_heads} for keys and values: {reason} Allowed with hidden_size={widths.hidden} are "
        f"(num_attention_heads, num_key_value_heads) = {pairs or 'none'}; allowed with {heads} heads are hidden sizes "
        f"(multiples of round_to={spec.round_to}) {hidden or 'none'}."
    )


def grid(width: int, step: int, smallest: int) -> list[int]:
    """A width and the multiples of `step` below it, down to `smallest`, decreasing."""
    return [width, *(size for size in range((width - 1) // step * step, smallest - 1, -step) if size > 0)]


def refusal(config: PreTrainedConfig, family: Family, widths: Widths) -> str | None:
    """Why transformers refuses a config with these widths, in its own words; None if it does not."""
    try:
        config_of_widths(config, family, widths).validate()
    except Exception as error:  # the validators of a config raise what they like
        return f"{error.__cause__ or str(error).strip().splitlines()[-1].strip()}"
    return None


def _rounded(name: str, asked: int | None, before: int, step: int) -> int:
    """The nearest multiple of the step that is not above the width before."""
    if asked is None or asked == before:
        return before
    if asked > before or step > before:
        raise ValueError(
            f"`{name}` is {asked}, rounded to a multiple of round_to={step}; expected at most {before}, as it is now. "
            "Pruning only removes; give a smaller number, or a smaller `round_to`."
        )
    return min(max((2 * asked + step) // (2 * step), 1) * step, before // step * step)


def _check_cuttable(spec: PruneSpec, family: Family, before: Widths) -> None:
    now = {
        "hidden_size": before.hidden,
        "num_attention_heads": before.heads,
        "num_key_value_heads": before.kv_heads,
    }
    for name, value in now.items():
        if not family.cuts_all and getattr(spec, name) not in (None, value):
            raise ValueError(
                f"`{name}` is {getattr(spec, name)}, but of {family.name!r} only depth and MLP can be pruned: its "
                f"heads are as wide as the hidden size over their number. Leave it at {value}, and cut "
                "`num_hidden_layers` or `intermediate_size`."
            )


def _heads(spec: PruneSpec, before: Widths, config: PreTrainedConfig, family: Family) -> tuple[int, int]:
    """The numbers of query heads and of heads of keys and values."""
    group = before.heads // before.kv_heads
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    if kv_heads is None:
        kv_heads = heads if heads is not None and group == 1 else before.kv_heads
    if heads is None:
        heads = kv_heads * group
    if kv_heads > before.kv_heads or heads % kv_heads or heads // kv_heads > group:
        allowed = sorted({pair for pair in _head_choices(before) if pair[1] == min(kv_heads, before.kv_heads)})
        raise ValueError(
            f"`num_attention_heads` is {heads} with {kv_heads} heads of keys and values; the model has {before.heads} "
            f"with {before.kv_heads}, and a group that shares them can keep 1 to {group} query heads, as many in "
            f"every group. Allowed (num_attention_heads, num_key_value_heads): {allowed}; with fewer "
            "`num_key_value_heads`, whole groups are cut."
        )
    return heads, kv_heads


def _head_choices(before: Widths) -> list[tuple[int, int]]:
    group = before.heads // before.kv_heads
    pairs = {(kv * share, kv) for kv in range(1, before.kv_heads + 1) for share in range(1, group + 1)}
    return sorted(pairs, reverse=True)


def _allowed(config: PreTrainedConfig, family: Family, widths: Widths, heads: int, kv_heads: int) -> bool:
    return refusal(config, family, Widths(widths.hidden, widths.neurons, heads, kv_heads, widths.head_dim)) is None
