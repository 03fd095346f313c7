"""Where taps cannot work, and what is said then."""

from __future__ import annotations

from hf_distill.anatomy import Anatomy


# torch.compile shares code between models of one class, and that code has the hooks that it was traced with.
COMPILED_BEFORE = (
    "If it was called and is compiled, a model of its class ran compiled without this tap: `torch.compiler.reset()`."
)


def refuse_reentrant_checkpoints(parts: Anatomy) -> None:
    """Refuse a model whose checkpoints would cut the graph at every layer.

    Raises:
        ValueError: Gradient checkpointing is on and reentrant.
    """
    for module in parts.model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        enabled = module.training and getattr(module, "gradient_checkpointing", False)
        if enabled and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "The model's gradient checkpointing is reentrant, which cuts the graph between layers; use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`."
            )
