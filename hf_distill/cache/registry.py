"""Encodings by name, and presets by how many bytes a token may take."""

from __future__ import annotations

from collections.abc import Mapping
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


def make_encoding(name: str, *, vocab_size: int, temperatures: tuple[float, ...] = (1.0,), **options: Any) -> Encoding:
    """An encoding by its name or that of a preset.

    Args:
        name: A key of `ENCODINGS` or `PRESETS`.
        vocab_size: Columns of the teacher's logits.
        temperatures: At which distillation may want to read it.
        **options: Of the encoding, instead of its defaults or those of the preset; None counts as not given.

    Raises:
        ValueError: The name is unknown, the encoding has no such option, or a value does not do.
    """
    if name not in ENCODINGS:
        raise unknown_name("encoding", name, ENCODINGS)
    encoding = ENCODINGS[name]
    known = {field.name for field in fields(encoding) if field.init} - {"vocab_size", "temperatures"}
    given = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - known:
        raise unknown_name(f"option of the encoding {name!r}:", option, known)
    return encoding(vocab_size=vocab_size, temperatures=tuple(temperatures), **given)


def encoding_from_config(config: Mapping[str, Any]) -> Encoding:
    """The encoding whose `config()` this is.

    Raises:
        ValueError: As `make_encoding`.
    """
    return make_encoding(**config)
