"""What of a batch a teacher is given: the student's reading of the text, nothing of its training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel


# Where the documents of a row without an attention mask begin and end. All but the first reach the attention through
# the keyword arguments of forward.
PACKING = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Without these a model would read something else than the student did.
READ = ("input_ids", "attention_mask", "pixel_values", "input_features")


def model_inputs(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what of a batch a model is given: what its forward names, and the document bounds of packed rows.

    Args:
        model: The teacher without wrappers.
        batch: What the student's forward is given.

    Raises:
        ValueError: The model cannot take something that changes what it reads: the tokens, the mask, or, in a row
            without a mask, where documents begin (they would attend to one another).
    """
    parameters = inspect.signature(model.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepted = {name for name in parameters if name != "labels"} | (set(PACKING[1:]) if takes_more else set())
    inputs = {key: value for key, value in batch.items() if key in accepted}
    needed = READ if batch.get("attention_mask") is not None else READ + PACKING
    lost = [key for key in needed if key in batch and key not in accepted]
    if lost:
        raise ValueError(
            f"The teacher ({type(model).__name__}) does not take {lost}, so it would not read what the student reads"
            + (
                ": the documents of a packed row would attend to one another. Train with `packing=False` and "
                "`padding_free=False`."
                if set(lost) & set(PACKING)
                else ". Use a teacher that takes the same inputs."
            )
        )
    if "use_cache" in parameters:  # besides its memory: with a cache transformers does not look for packed documents
        inputs["use_cache"] = False
    return inputs
