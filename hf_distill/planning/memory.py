"""Bytes that one rank needs for weights, optimizer and what sharding gathers: arithmetic on shapes.

Weights and optimizer, like the simulated step beside them, were compared with runs of one process on a CPU. What DDP's
buckets, sharding over ranks and quantised weights take was not: that is how they are documented. What a caching
allocator loses to fragmentation, the CUDA context and NCCL (together a few GB) is in no figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_distill.planning.parameters import ParameterCount


Sharding = Literal["ddp", "fsdp2", "zero3"]
Quantization = Literal["nf4", "int8"]

GIB = 2**30
BF16 = 2
FP32 = 4
# Bytes per quantised weight. nf4 with double quantisation (QLoRA, arXiv 2305.14314): 4 bits, one 8-bit scale for 64
# weights, one fp32 scale for 256 of those. int8 has one fp32 scale a row, which is left out.
QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks.

    Args:
        world_size: Number of ranks.
        sharding: `ddp` replicates everything; `fsdp2` and `zero3` shard what is not quantised.
    """

    world_size: int
    sharding: Sharding

    def per_rank(self, size: float, *, quantised: bool = False) -> float:
        """Bytes of `size` on one rank; quantised weights are replicated, because accelerate does not shard them."""
        return size if self.sharding == "ddp" or quantised else size / self.world_size


def weight_bytes(count: ParameterCount, quantization: Quantization | None = None) -> float:
    """Bytes of a model's weights: bf16, with the weights of linear layers quantised if asked for."""
    if quantization is None:
        return float(BF16 * count.total)
    return QUANTISED[quantization] * count.linear + BF16 * (count.total - count.linear)


def optimizer_bytes(trained: int, layout: Layout, weight: int = FP32) -> dict[str, float]:
    """Bytes that stay on a rank from the first step on: weights that train, AdamW's two moments, and DDP's buckets.

    Each is of `weight` bytes per parameter, and so are the gradients, which come and go: with fp32 weights that is 16
    bytes in all (ZeRO-3 divides the same 16 otherwise: bf16 weights and gradients, fp32 master weights and moments).
    DDP copies gradients to buckets.
    """
    size = layout.per_rank(weight * trained)
    kept = {"trained weights": size, "AdamW moments": 2 * size}
    if layout.sharding == "ddp" and layout.world_size > 1:
        kept["gradients in DDP's buckets"] = size
    return kept


def gathered_bytes(counts: Sequence[ParameterCount], trained: ParameterCount | None) -> float:
    """Bytes in bf16 that FSDP2 or ZeRO-3 make whole for a while.

    Of the larger model two layers (one is fetched ahead) and the embedding, as they are freed after use; the heads of
    all models, which the loss needs together; the gradients of one layer, before they are spread.

    Args:
        counts: Of the models that are sharded.
        trained: Of the student, unless an adapter is trained.
    """
    passing = max((2 * count.block + count.embedding for count in counts), default=0)
    gradients = 0 if trained is None else trained.block
    return float(BF16 * (passing + sum(count.head for count in counts) + gradients))


def full_logits_bytes(tokens: int, vocabularies: tuple[int, int]) -> float:
    """Bytes of the least that a loss on whole logits holds in fp32: both models' `[B, S, V]` and one gradient."""
    return float(FP32 * tokens * (sum(vocabularies) + vocabularies[0]))
