"""Which layer of the teacher a layer of the student is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hf_distill.signals import ModelShape


Pairs = tuple[tuple[int, int], ...]
LAYER_MAPPINGS = ("uniform", "last_k", "every_nth", "inner")


def check_mapping(
    mapping: str | Sequence[Sequence[int]], num_pairs: int, known: Sequence[str] = LAYER_MAPPINGS
) -> None:
    """Check what can be checked before the models are known.

    Args:
        mapping: See `layer_pairs`.
        num_pairs: See `layer_pairs`.
        known: The names that are accepted.

    Raises:
        ValueError: The name is unknown, a pair is no pair, or there are none.
    """
    if isinstance(mapping, str):
        if mapping not in known:
            raise ValueError(
                f"`layer_mapping` is {mapping!r}; expected one of {list(known)}, or pairs of layers such as "
                "`[(6, 12), (12, 24)]` (student, teacher; from 1, 0 being the embedding)."
            )
    elif not mapping or any(len(pair) != 2 for pair in mapping):
        raise ValueError(
            f"`layer_mapping` is {list(mapping)}; expected at least one pair (student layer, teacher layer), for "
            "example `[(6, 12), (12, 24)]`."
        )
    if num_pairs < 1:
        raise ValueError(f"`num_pairs` is {num_pairs}; expected a number of layers >= 1, for example `num_pairs=4`.")


def layer_pairs(
    mapping: str | Sequence[Sequence[int]], num_pairs: int, student: ModelShape, teacher: ModelShape
) -> Pairs:
    """Choose pairs (student layer, teacher layer), from 1, the last one after the final norm; 0 is the embedding.

    - "uniform": `num_pairs` evenly spaced layers of the student, the last included, each with the teacher's layer at
      the same relative depth, halves rounded up (the last with the last). A student that was cut from the teacher
      meets the layers that its own were copied from instead.
    - "last_k": the last `num_pairs` layers of both, in order.
    - "every_nth": every n-th layer of the student counted from its last, n = L_s / `num_pairs` rounded up, with the
      partners of "uniform".
    - "inner": every floor(L / (`num_pairs` + 1))-th layer, each model by its own depth; never the last, which alone is
      after the final norm.
    - pairs: as given; negative numbers count from the end, -1 being the last layer.

    Raises:
        ValueError: A pair names a layer that its model does not have.
    """
    if not isinstance(mapping, str):
        return tuple((_layer(pair[0], student), _layer(pair[1], teacher)) for pair in mapping)
    depth, pairs = student.num_layers, min(num_pairs, student.num_layers, teacher.num_layers)
    if mapping == "inner":
        pairs = min(num_pairs, depth - 1, teacher.num_layers - 1)
        steps = depth // (pairs + 1), teacher.num_layers // (pairs + 1)
        return tuple((i * steps[0], i * steps[1]) for i in range(1, pairs + 1))
    if mapping == "last_k":
        return tuple((depth - i, teacher.num_layers - i) for i in reversed(range(pairs)))
    if mapping == "every_nth":
        chosen = list(reversed(range(depth, 0, -math.ceil(depth / pairs))))
    else:
        chosen = [_round_half_up(i * depth, pairs) for i in range(1, pairs + 1)]
    return tuple((layer, _partner(layer, student, teacher)) for layer in chosen)


def _partner(layer: int, student: ModelShape, teacher: ModelShape) -> int:
    """The teacher's layer for a layer of the student."""
    if layer == student.num_layers:
        return teacher.num_layers  # both after the final norm
    if student.kept_layers is not None and student.cut_from == teacher.num_layers:
        return student.kept_layers[layer - 1] + 1
    return _round_half_up(layer * teacher.num_layers, student.num_layers)


def _layer(number: int, model: ModelShape) -> int:
    layer = number + model.num_layers + 1 if number < 0 else number
    if not 0 <= layer <= model.num_layers:
        raise ValueError(
            f"`layer_mapping` names layer {number} of the {model.name}, which has layers 1 to {model.num_layers} "
            "(0 is the embedding, -1 the last)."
        )
    return layer


def _round_half_up(numerator: int, denominator: int) -> int:
    """Rounded division; round() would send halves to even neighbours and space unevenly."""
    return (2 * numerator + denominator) // (2 * denominator)
