"""Computes the soft labels of a dataset once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from hf_distill.cache.encoding import Encoding
from hf_distill.cache.identity import identity_of, tokenizer_identity
from hf_distill.cache.manifest import BUILDING, MANIFEST, Identity, Manifest, check_same, save_identity
from hf_distill.cache.plan import Plan, plan_rows
from hf_distill.cache.registry import make_encoding
from hf_distill.cache.remote import RemoteSource, RemoteTeacher
from hf_distill.cache.shard import check_compression
from hf_distill.cache.source import LocalSource, Source
from hf_distill.cache.writer import Writer, remove_leftovers


def build_cache(
    teacher: Any,
    dataset: Sequence[Any],
    out: str | Path,
    encoding: str = "topk",
    k: int | None = None,
    temperatures: Sequence[float] = (1.0,),
    *,
    tokenizer: Any = None,
    quantization: str | None = None,
    shard_tokens: int = 2**20,
    batch_tokens: int = 4096,
    compression: str | None = None,
    show_progress: bool = True,
    **options: Any,
) -> Manifest:
    """Run a teacher over a dataset and keep its distributions on disk, for `CachedTeacher`.

    A build that was stopped goes on with the next call, and ends in the bytes that it would have ended in. Under
    `accelerate launch` every rank writes its own shards. A cache that is whole already is returned at once.

    Example:
        >>> build_cache("HuggingFaceTB/SmolLM2-1.7B-Instruct", trainer.train_dataset, "labels", temperatures=(1, 2))

    Args:
        teacher: A name, a `PreTrainedModel` or a `ModelTeacher` of a causal language model, or a `RemoteTeacher`.
        dataset: Tokenised examples, for example the `train_dataset` of the trainer that will read the cache; only
            positions with labels are kept.
        out: The folder.
        encoding: "topk", "sampled", "topk_tail", "dense", "hidden", or a preset.
        k: Ids of a token, for the encodings that have them.
        temperatures: At which distillation may want to read it.
        tokenizer: The one that the dataset was made with; that of a teacher that runs here if None.
        quantization: Of a teacher that is loaded here: "nf4" or "int8".
        shard_tokens: Kept tokens of a shard: what a stopped build loses at most, for each rank.
        batch_tokens: Tokens that the teacher reads at once, padding included.
        compression: "zstd" for smaller files that are read into memory, or None for files that are mapped.
        show_progress: Whether to show tokens per second, bytes per token and the time left.
        **options: Of the encoding.

    Raises:
        ValueError: An argument is wrong, or `out` holds something else.
        OSError: The disk is full, or a server went away; what was written stays.
    """
    check_compression(compression)
    given = resolve_teacher(teacher, quantization)
    chosen = make_encoding(encoding, vocab_size=given.vocab_size, temperatures=tuple(temperatures), k=k, **options)
    plan, accelerator = plan_rows(dataset, shard_tokens, batch_tokens), Accelerator()
    source: Callable[[], Source]
    if isinstance(given, RemoteTeacher):
        kind, known, source = "server", given.identity(), partial(RemoteSource, given, chosen, int(plan.lengths.max()))
    else:
        given.prepare(accelerator)
        tokenizer = given.tokenizer if tokenizer is None else tokenizer
        kind, known, source = "teacher", identity_of(given), partial(LocalSource, given, chosen)
    identity = Identity(
        known,
        tokenizer_identity(tokenizer),
        plan.fingerprint,
        chosen.config(),
        shard_tokens,
        batch_tokens,
        compression,
        kind,
    )
    return write_cache(Path(out), identity, plan, chosen, source, accelerator, show_progress=show_progress)


def write_cache(
    folder: Path,
    identity: Identity,
    plan: Plan,
    encoding: Encoding,
    source: Callable[[], Source],
    accelerator: Accelerator,
    *,
    show_progress: bool,
) -> Manifest:
    """Write what is missing of a cache; all ranks together.

    Args:
        folder: Of the cache.
        identity: Of the cache.
        plan: Of its rows.
        encoding: Packs the columns.
        source: Makes what gives them; called where something is missing, before anything is written.
        accelerator: Of this process.
        show_progress: Whether to show it.

    Raises:
        ValueError: The folder holds something else.
        OSError: The disk is full; what was written stays.
    """
    check_same(folder, identity)
    if (folder / MANIFEST).exists():
        (folder / BUILDING).unlink(missing_ok=True)  # of a build that was killed when it had just finished
    else:
        writer = Writer(folder, identity, plan, encoding, source())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            save_identity(folder, identity)
            writer.share()
        accelerator.wait_for_everyone()
        writer.write(accelerator.process_index, accelerator.num_processes, show_progress=show_progress)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            writer.finish()
        accelerator.wait_for_everyone()
    return Manifest.load(folder)


def resolve_teacher(teacher: Any, quantization: str | None = None) -> Any:
    """A teacher that can be run or asked: a `ModelTeacher` or a `RemoteTeacher`.

    Raises:
        ValueError: It is none, or one of another task.
    """
    from hf_distill.teachers import ModelTeacher, load_teacher

    if isinstance(teacher, RemoteTeacher):
        if quantization is not None:
            raise ValueError(f"`quantization` is {quantization!r}, and the teacher runs elsewhere; leave it out.")
        return teacher
    if isinstance(teacher, str):
        if teacher.startswith(("http://", "https://")):
            raise ValueError(f"`teacher` is an address; give `RemoteTeacher({teacher!r}, model)`.")
        teacher = load_teacher(teacher, quantization=quantization, task="causal_lm")
    elif isinstance(teacher, PreTrainedModel):
        teacher = ModelTeacher(teacher)
    if not isinstance(teacher, ModelTeacher):
        raise ValueError(
            f"`teacher` is a {type(teacher).__name__}; expected a name, a PreTrainedModel, a ModelTeacher or "
            "a RemoteTeacher, e.g. `build_cache(load_teacher(name), ...)`."
        )
    if teacher.task != "causal_lm":
        raise ValueError(f"`teacher` is a {teacher.task} model; caches hold the distributions of causal_lm models.")
    return teacher
