"""Encodings by name, and presets by how many bytes a token may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hf_distill.cache.base import BaseEncoding
from hf_distill.cache.dense import Dense, Hidden
from hf_distill.cache.encoding import Encoding
from hf_distill.cache.sampled import Sampled, TopKTail
from hf_distill.cache.sparse import TopK
from hf_distill.functional.registry import unknown_name


ENCODINGS: dict[str, type[BaseEncoding]] = {
    encoding.name: encoding for encoding in (TopK, Sampled, TopKTail, Dense, Hidden)
}


# Bytes that a token takes at most at a vocabulary of 152k, of all arrays of a shard of 100k tokens and of their input
# ids, with a teacher that is unsure (`benchmarks/run.py sizes`); "base" and "large" also with a second temperature.
BUDGETS = {"nano": 40, "small": 64, "base": 130, "large": 260}
# By the names of budgets: an encoding and its options.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "nano": ("sampled", {"draws": 30}),
    "small": ("topk_tail", {"k": 8, "draws": 13, "bits": 6}),
    "base": ("topk_tail", {"k": 16, "draws": 32, "bits": 6}),
    "large": ("topk_tail", {"k": 16, "draws": 64, "bits": 6}),
}


def make_encoding(name: str, *, vocab_size: int, temperatures: Sequence[float] = (1.0,), **options: Any) -> Encoding:
    """An encoding by its name or that of a preset.

    Args:
        name: A key of `ENCODINGS` or `PRESETS`.
        vocab_size: Columns of the teacher's logits.
        temperatures: At which distillation may want to read it.
        **options: Of the encoding, instead of its defaults or those of the preset; None counts as not given.

    Raises:
        ValueError: The name is unknown, the encoding has no such option, or a value does not do.
    """
    if name not in ENCODINGS and name not in PRESETS:
        raise unknown_name("encoding", name, [*ENCODINGS, *PRESETS])
    kind, defaults = PRESETS.get(name, (name, {}))
    encoding = ENCODINGS[kind]
    known = {field.name for field in fields(encoding) if field.init} - {"vocab_size", "temperatures"}
    given = {option: value for option, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - known):
        raise unknown_name(f"option of the encoding {kind!r}:", unknown[0], known)
    return encoding(vocab_size=vocab_size, temperatures=tuple(temperatures), **(defaults | given))


def encoding_from_config(config: Mapping[str, Any]) -> Encoding:
    """The encoding whose `config()` this is.

    Raises:
        ValueError: As `make_encoding`.
    """
    return make_encoding(**config)
