"""What tells one teacher, and one tokenizer, from another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_distill.anatomy import describe, unwrap
from hf_distill.cache.manifest import TeacherIdentity, TokenizerIdentity
from hf_distill.cache.shard import digest_of


# Elements of a tensor that are looked at, evenly spaced.
SAMPLED_ELEMENTS = 4096


def identity_of(teacher: Any) -> TeacherIdentity:
    """Which model a `ModelTeacher` runs."""
    model = unwrap(teacher.model)
    facts = describe(model)
    return TeacherIdentity(
        name=teacher.name,
        revision=getattr(model.config, "_commit_hash", None),
        quantization=teacher.config_for_card().get("quantization"),
        architecture=type(model).__name__,
        vocab_size=facts.vocab_size,
        num_layers=facts.num_layers,
        hidden_size=facts.hidden_size,
        weights=weights_digest(teacher.model),
    )


def weights_digest(model: nn.Module) -> str:
    """Digest of the names, shapes and dtypes of all weights, and of evenly spaced elements of each.

    It tells another checkpoint, which differs nearly everywhere; it is no proof that two models are equal.
    """
    pieces = []
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        flat = tensor.detach().reshape(-1)
        step = max(flat.numel() // SAMPLED_ELEMENTS, 1)
        values = flat[::step].contiguous().view(torch.uint8).cpu().numpy().tobytes()
        pieces.append(digest_of(f"{name} {list(tensor.shape)} {tensor.dtype}".encode() + values))
    return digest_of("".join(pieces).encode())


def vocabulary_digest(vocabulary: Mapping[str, int]) -> str:
    """Digest of tokens and their ids."""
    return digest_of(json.dumps(sorted(vocabulary.items()), ensure_ascii=False).encode())


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """Digests of what decides which ids a text becomes; of no tokenizer, nothing."""
    if tokenizer is None:
        return TokenizerIdentity()
    template = tokenizer.chat_template
    return TokenizerIdentity(
        vocabulary_digest(tokenizer.get_vocab()),
        None if template is None else digest_of(json.dumps(template, sort_keys=True).encode()),
    )
