"""`hf-distill cache`: soft labels on disk."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# What a manifest calls where the distributions are from.
REDUCED = "entropies are those of the most likely tokens and the rest together"
SOURCES = {
    "teacher": "the teacher itself",
    "server": f"a server; {REDUCED}",
    "distillkit": f"files of DistillKit; {REDUCED}",
}
# Options of `build` that say how rows are made, and of which the cache itself knows nothing.
OF_TEXTS = ("split", "max_length", "assistant_only_loss")


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    actions = commands.add_parser("cache", help="soft labels on disk").add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="run a teacher over a dataset and keep its distributions")
    build.add_argument("--teacher", required=True, help="Hub name, folder, or address of a server (http://.../v1)")
    build.add_argument("--teacher-model", help="what a server calls the teacher; its key is taken from VLLM_API_KEY")
    build.add_argument("--vocab-size", type=int, help="columns of the logits of a server's teacher")
    build.add_argument("--tokenizer", help="that the dataset is made with (default: that of a teacher that runs here)")
    build.add_argument(
        "--dataset", required=True, help="of token ids, texts or chats: Hub name, folder, or json(l) or parquet file"
    )
    build.add_argument("--split", default="train", help="of the dataset (default: train)")
    build.add_argument("--max-length", type=int, help="of a row of texts, as in SFTConfig")
    build.add_argument("--assistant-only-loss", action="store_true", help="keep answers of chats, as in SFTConfig")
    build.add_argument("--out", required=True, type=Path, help="folder of the cache")
    build.add_argument("--encoding", default="topk", help="topk, sampled, topk_tail, dense, hidden (default: topk)")
    build.add_argument("--k", type=int, help="ids of a token")
    build.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="at which it can be read")
    build.add_argument("--quantization", choices=["nf4", "int8"], help="of the teacher")
    build.add_argument("--shard-tokens", type=int, default=2**20, help="tokens of a file (default: %(default)s)")
    build.add_argument("--batch-tokens", type=int, default=4096, help="tokens read at once (default: %(default)s)")
    build.add_argument("--compression", choices=["zstd"], help="of the files")
    build.set_defaults(run=_build)
    verify = actions.add_parser("verify", help="run random rows again and compare: exit status 1 if they differ")
    verify.add_argument("path", type=Path)
    verify.add_argument("--teacher", required=True, help="Hub name or folder of the model that it was built from")
    verify.add_argument("--rows", type=int, default=64, help="how many (default: %(default)s)")
    verify.add_argument("--seed", type=int, default=0, help="of their draw (default: %(default)s)")
    verify.add_argument("--all", action="store_true", help="check the digests of all shards")
    verify.add_argument("--tolerance", type=float, help="what the mean KL may be (default: that of the encoding)")
    verify.set_defaults(run=_verify)
    kit = actions.add_parser("import-distillkit", help="make a cache of the parquet files of DistillKit")
    kit.add_argument("path", type=Path, metavar="SRC", help="folder of its files")
    kit.add_argument("out", type=Path, metavar="OUT", help="folder of the cache")
    kit.add_argument(
        "--compression-config", type=Path, dest="config", help="its compression_config.yaml (default: in the folder)"
    )
    kit.add_argument("--tokenizer", help="that the files were made with; its pad token is dropped from their rows")
    kit.add_argument("--teacher", help="name of the model that gave the distributions")
    kit.add_argument("--max-mass", type=float, default=1.01, help="of a token's ids (default: %(default)s)")
    kit.add_argument("--compression", choices=["zstd"], help="of the files")
    kit.set_defaults(run=_import_distillkit)
    info = actions.add_parser("info", help="what a cache is of, and how large it is")
    info.add_argument("path", type=Path)
    info.set_defaults(run=_info)


def _build(options: argparse.Namespace) -> None:
    from hf_distill.cache import build_cache

    settings = {name: value for name, value in vars(options).items() if name not in ("run", *OF_TEXTS)}
    name, size = settings.pop("teacher_model"), settings.pop("vocab_size")
    settings["teacher"] = _teacher(options.teacher, name, size)
    settings["dataset"], settings["tokenizer"] = _rows(options)
    build_cache(**settings)
    _info(argparse.Namespace(path=options.out))


def _teacher(teacher: str, name: str | None, vocab_size: int | None) -> Any:
    """A name, or what stands behind an address."""
    from hf_distill.cache import RemoteTeacher

    if not teacher.startswith(("http://", "https://")):
        if name is not None or vocab_size is not None:
            raise ValueError(f"`--teacher-model` and `--vocab-size` are of a server, and `--teacher` is {teacher}.")
        return teacher
    if name is None or vocab_size is None:
        raise ValueError(
            "`--teacher` is an address: `--teacher-model NAME` says which model there, and `--vocab-size N` how many "
            "logits it has, `vocab_size` in its config.json."
        )
    return RemoteTeacher(teacher, name, vocab_size)


def _rows(options: argparse.Namespace) -> tuple[Any, Any]:
    """A dataset of token ids, and the tokenizer if one is named or was needed."""
    from hf_distill.cli.data import load
    from hf_distill.cli.models import tokenizer_of
    from hf_distill.cli.prepare import prepare

    dataset = load(options.dataset, options.split)
    tokenizer = options.tokenizer and tokenizer_of(options.tokenizer, "--tokenizer")
    if "input_ids" in dataset.column_names:
        if options.max_length is not None or options.assistant_only_loss:
            raise ValueError(
                "`--max-length` and `--assistant-only-loss` are of texts, and `--dataset` has `input_ids`; leave them "
                "out."
            )
        return dataset, tokenizer
    if tokenizer is None and options.teacher_model is not None:
        raise ValueError("`--dataset` holds texts, and the teacher is a server: name its tokenizer by `--tokenizer`.")
    tokenizer = tokenizer or tokenizer_of(options.teacher, "--teacher")
    given = {"max_length": options.max_length, "assistant_only_loss": options.assistant_only_loss}
    return prepare(dataset, tokenizer, **given), tokenizer


def _verify(options: argparse.Namespace) -> int:
    from hf_distill.cache import verify_cache

    found = verify_cache(
        options.path,
        options.teacher,
        rows=options.rows,
        seed=options.seed,
        every_shard=options.all,
        tolerance=options.tolerance,
    )
    facts = {"checked": f"{found.tokens:,} tokens of {found.rows:,} rows, digests of {found.shards:,} shards"}
    for temperature, kl in found.kl.items():
        facts[f"KL at T = {temperature:g}"] = f"{kl:.2e} nats (at most {found.limits[temperature]:.2e})"
    worst = found.worst
    facts["worst token"] = f"{worst.error:.2e} nats, row {worst.row}, position {worst.position}, label {worst.label}"
    if worst.text is not None:
        facts["its text"] = f"{worst.text[0]!r}, then {worst.text[1]!r}"
    agreement = found.top1_agreement
    facts["top-1"] = "not kept" if agreement is None else f"{agreement:.2%} agree"
    facts["label"] = f"log-probability off by {found.label_error:.2e} nats in the mean"
    _print(facts)
    for difference in found.differences:
        print(f"another teacher: {difference}")
    print("the cache is what the teacher says" if found.passed else "the cache is not what the teacher says")
    return 0 if found.passed else 1


def _import_distillkit(options: argparse.Namespace) -> None:
    from hf_distill.cache import import_distillkit
    from hf_distill.cli.models import tokenizer_of

    settings = {name: value for name, value in vars(options).items() if name != "run"}
    settings["tokenizer"] = options.tokenizer and tokenizer_of(options.tokenizer, "--tokenizer")
    done = import_distillkit(**settings)
    print(
        f"{done.tokens:,} tokens read; the ids of {done.heavy_tokens:,} had more than all of the probability, at most "
        f"{done.heaviest:.4g}, and were scaled down to 1; the labels of {done.unknown_labels:,} were not among the ids"
    )
    _info(argparse.Namespace(path=options.out))


def _info(options: argparse.Namespace) -> None:
    from hf_distill.cache import Manifest

    manifest = Manifest.load(options.path)
    teacher, encoding = manifest.teacher, dict(manifest.encoding)
    facts = {
        "teacher": f"{teacher.name or teacher.architecture} (weights {teacher.weights})",
        "revision": teacher.revision or "not known",
        "quantization": teacher.quantization or "none",
        "vocabulary": f"{teacher.vocab_size:,} logits, tokenizer {manifest.tokenizer.vocabulary or 'not known'}",
        "chat template": manifest.tokenizer.chat_template or "none",
        "source": SOURCES[manifest.identity.source],
        "dataset": manifest.identity.dataset,
        "encoding": ", ".join(f"{name} {value}" for name, value in encoding.items()),
        "rows": f"{manifest.rows:,}",
        "tokens": f"{manifest.tokens:,} in {len(manifest.shards)} shards",
        "size": f"{manifest.bytes:,} bytes, {manifest.bytes / manifest.tokens:.1f} a token",
    }
    _print(facts)


def _print(facts: Mapping[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:14} {value}")
