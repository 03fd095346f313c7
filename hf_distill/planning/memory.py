"""Bytes that one rank needs for teacher, student, optimizer, activations and loss.

All numbers are arithmetic on shapes. What the caching allocator loses to fragmentation, the CUDA context and NCCL
(together a few GB) is not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hf_distill.functional.fused import chunk_rows
from hf_distill.planning.parameters import ParameterCount


Sharding = Literal["ddp", "fsdp2", "zero3"]
Quantization = Literal["nf4", "int8"]

GIB = 2**30
BF16 = 2
FP32 = 4
# Bytes per quantised weight. nf4 with double quantisation (QLoRA, arXiv 2305.14314): 4 bits, one 8-bit scale for 64
# weights, one fp32 scale for 256 of those. int8 has one fp32 scale a row, which is left out.
QUANTISED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
# fp32 buffers that the loss uses on one block of a tile, and the elements of each.
LOSS_BUFFERS = 8
LOSS_BLOCK = 2**24


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


def training_bytes(trained: int, layout: Layout, weight: int = FP32) -> dict[str, float]:
    """Bytes of what trains under AdamW: weights, gradients and two moments, all of `weight` bytes per parameter.

    With fp32 weights that is 16 bytes (ZeRO-3 divides the same 16 otherwise: bf16 weights and gradients, fp32 master
    weights and moments). DDP copies gradients to buckets, and autocast keeps a bf16 copy of fp32 weights.
    """
    size = layout.per_rank(weight * trained)
    replicated = layout.sharding == "ddp"
    copies = BF16 * trained if replicated and weight == FP32 else 0
    buckets = size if replicated and layout.world_size > 1 else 0
    return {"trained weights": size + copies, "gradients": size + buckets, "AdamW moments": 2 * size}


def gathered_bytes(counts: Sequence[ParameterCount]) -> float:
    """Bytes of the bf16 weights that FSDP2 or ZeRO-3 make whole for a while.

    Two layers (one is fetched ahead) and the embedding of the larger model, as they are freed after use; the heads of
    all models, which the loss needs together.
    """
    passing = max((2 * count.block + count.embedding for count in counts), default=0)
    return float(BF16 * (passing + sum(count.head for count in counts)))


def layer_activation_bytes(count: ParameterCount, hidden_size: int, tokens: int) -> float:
    """Estimate the bf16 activations that one layer keeps for backward, with SDPA or flash attention (no maps).

    They are input and output of its linear modules and, for its two norms, the hidden states once in bf16 and once in
    fp32. Against what autograd keeps that is 0.96 for Llama, Qwen 2 and Qwen 3, 0.84 for Phi 3, 0.72 for GPT-2 and
    0.57 for Gemma 2 (whose softcap builds maps), 1.3 for GPT-NeoX, 1.4 for BERT and 1.8 for OPT. Under DDP with fp32
    weights the residual stream is fp32, which adds up to a fifth.

    Args:
        count: Of the model.
        hidden_size: H.
        tokens: Batch size times sequence length.
    """
    return float(BF16 * tokens * (count.block_width + 6 * hidden_size))


def activation_bytes(count: ParameterCount, hidden_size: int, tokens: int, *, checkpointing: bool) -> float:
    """Estimate the activations of all layers; with checkpointing, of their inputs and one layer at work."""
    layer = layer_activation_bytes(count, hidden_size, tokens)
    return layer + BF16 * tokens * hidden_size * count.layers if checkpointing else layer * count.layers


def loss_bytes(
    tokens: int,
    vocabularies: tuple[int, int],
    hidden_sizes: tuple[int, int],
    chunk_bytes: int | None = None,
    *,
    trained_head: bool = True,
) -> float:
    """Bytes that the fused loss takes: one chunk of logits, fp32 buffers for a block of it, and hidden states.

    Args:
        tokens: Labelled tokens of one micro-batch.
        vocabularies: Of student and teacher.
        hidden_sizes: Of student and teacher.
        chunk_bytes: As in `linear_distillation_loss`.
        trained_head: Whether the head's weight gets a gradient; `head_gradient_bytes` is not counted here.
    """
    row = BF16 * sum(vocabularies)
    rows = chunk_rows(tokens, row, chunk_bytes, trained_head=trained_head)
    buffers = LOSS_BUFFERS * FP32 * min(rows * max(vocabularies), LOSS_BLOCK)
    return float(rows * row + buffers + BF16 * tokens * (2 * hidden_sizes[0] + hidden_sizes[1]))


def head_gradient_bytes(head: int) -> float:
    """Bytes for the gradient of a head that trains: the sum over chunks in fp32, and one chunk's product in bf16."""
    return float((FP32 + BF16) * head)


def full_logits_bytes(tokens: int, vocabularies: tuple[int, int]) -> float:
    """Bytes of the least that a loss on whole logits holds in fp32: both models' `[B, S, V]` and one gradient."""
    return float(FP32 * tokens * (sum(vocabularies) + vocabularies[0]))
