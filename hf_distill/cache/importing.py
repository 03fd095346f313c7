"""Caches of other projects, taken over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from hf_distill.cache.build import write_cache
from hf_distill.cache.distillkit_rows import DistillKitFiles
from hf_distill.cache.encoding import Columns
from hf_distill.cache.identity import tokenizer_identity
from hf_distill.cache.manifest import Identity, Manifest, TeacherIdentity
from hf_distill.cache.plan import plan_rows
from hf_distill.cache.rows import Row
from hf_distill.cache.shard import check_compression
from hf_distill.cache.sparse import TopK
from hf_distill.cache.top_tokens import NO_REST, TopTokens, join, topk_columns


# Rows that are looked at before anything is written.
CHECKED_ROWS = 64
BATCH_TOKENS = 4096
# What fp32 adds to a mass.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Imported:
    """What `import_distillkit` did.

    Args:
        manifest: Of the cache.
        tokens: Read by this call; a call that went on where another had stopped reads what was missing.
        heavy_tokens: Of these, whose ids had more than all of the probability, and were scaled down to 1.
        heaviest: The most that the ids of a token had.
        unknown_labels: Of these, whose label was not among the ids: the log-probability that is kept for it is
            that of any one token if all beyond the ids were equally likely.
    """

    manifest: Manifest
    tokens: int
    heavy_tokens: int
    heaviest: float
    unknown_labels: int


def import_distillkit(
    path: str | Path,
    out: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    teacher: str | None = None,
    max_mass: float = 1.01,
    bits: int = 8,
    shard_tokens: int = 2**20,
    compression: str | None = None,
    show_progress: bool = True,
) -> Imported:
    """Make a cache, `topk` at temperature 1, of one that DistillKit wrote.

    The values are as good as those that are stored there. They are not always log-probabilities: the configuration
    that DistillKit's README recommends fits a polynomial in fp32 in which the fourth powers of ranks drown everything
    else, and its ids then add up to more than all of the probability; in the legacy format values may also be logits.
    Such tokens are counted, and refused beyond `max_mass`.

    Args:
        path: The folder of its parquet files.
        out: The folder of the cache.
        config: Its compression config, or a YAML file of it; the `compression_config.yaml` in the folder if None.
        tokenizer: The one that the files were made with. Its pad token, which DistillKit appends to rows, is dropped
            from their ends unless it is the end-of-text token, too, which may belong to the text.
        teacher: Name of the model that gave the distributions; the files do not say it.
        max_mass: What the ids of a token may add up to. Tokens between 1 and this are scaled down to 1, and leave
            nothing to all other tokens; `math.inf` scales them all.
        bits: Of a log-probability in the cache.
        shard_tokens: Tokens of a shard.
        compression: "zstd" for smaller files that are read into memory, or None for files that are mapped.
        show_progress: Whether to show it.

    Raises:
        ValueError: The files are none of DistillKit's, or not of this config, or hold what are no log-probabilities;
            or `out` holds something else.
    """
    check_compression(compression)
    files = DistillKitFiles(path, config, _appended_pad(tokenizer))
    form = files.format
    encoding = TopK(vocab_size=form.vocab_size, k=form.k, bits=bits)
    sample = np.linspace(0, len(files) - 1, min(CHECKED_ROWS, len(files)), dtype=int).tolist()
    DistillKitSource(files, max_mass).columns([files.row(number) for number in sample])
    source = DistillKitSource(files, max_mass)
    plan = plan_rows(files, shard_tokens, BATCH_TOKENS)
    identity = Identity(
        TeacherIdentity(teacher, None, None, None, form.vocab_size),
        tokenizer_identity(tokenizer),
        plan.fingerprint,
        encoding.config(),
        shard_tokens,
        BATCH_TOKENS,
        compression,
        "distillkit",
    )
    manifest = write_cache(
        Path(out), identity, plan, encoding, lambda: source, Accelerator(), show_progress=show_progress
    )
    return Imported(manifest, source.tokens, source.heavy_tokens, source.heaviest, source.unknown_labels)


class DistillKitSource:
    """Gives the columns of `topk` from DistillKit's files, and counts what is wrong in them.

    Args:
        files: The files.
        max_mass: See `import_distillkit`.
    """

    def __init__(self, files: DistillKitFiles, max_mass: float) -> None:
        self._files = files
        self._max_mass = max_mass
        self.tokens = self.heavy_tokens = self.unknown_labels = 0
        self.heaviest = 0.0

    def columns(self, rows: Sequence[Row]) -> Columns:
        """See `Source`.

        Raises:
            ValueError: Values are no log-probabilities.
        """
        top, form = join([self._files.top_tokens(row) for row in rows]), self._files.format
        self._check(top)
        rest = np.maximum(1 - top.mass, NO_REST) / max(form.vocab_size - form.k, 1)
        unknown = np.isnan(top.label_log_probs)
        top = replace(top, label_log_probs=np.where(unknown, np.log(rest), top.label_log_probs))
        self.tokens += len(top.labels)
        self.heavy_tokens += int((top.mass > 1 + ROUNDING).sum())
        self.heaviest = max(self.heaviest, float(top.mass.max()))
        self.unknown_labels += int(unknown.sum())
        return topk_columns(top, form.vocab_size)

    def shared_tensors(self, row: Row) -> dict[str, Tensor]:
        """See `Source`."""
        return {}

    def _check(self, top: TopTokens) -> None:
        mass, vocab_size = top.mass, self._files.format.vocab_size
        unused = top.log_probs == -np.inf  # these hold any id
        ids = np.sort(np.where(unused, -1 - np.arange(top.ids.shape[1]), top.ids), axis=1)
        if ids.max() >= vocab_size or (np.diff(ids, axis=1) == 0).any():
            raise ValueError(
                f"The files hold ids of a token that are not below {vocab_size}, or the same one twice; the config is "
                "not the one that they were written with."
            )
        wrong = ~(mass <= self._max_mass) | np.isinf(mass)  # also nan
        if wrong.any():
            raise ValueError(
                f"Of {len(mass)} tokens, {wrong.sum()} have ids that add up to more than `max_mass`="
                f"{self._max_mass:g} of the probability, the worst to {mass.max():.4g}. Either these are logits, or "
                "DistillKit's fit failed, as it does with its recommended config (powers up to 4 without "
                "`normalize_t`): what it stored is then far from the teacher. Make the files again with "
                "`normalize_t: true`, or give `max_mass=math.inf` (`--max-mass inf`) to scale them down to 1."
            )


def _appended_pad(tokenizer: Any) -> int | None:
    """The token that DistillKit appends, where it can be told from the end of a text."""
    if tokenizer is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        return None
    return tokenizer.pad_token_id
