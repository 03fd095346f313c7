"""`hf-distill cache`: soft labels on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    actions = commands.add_parser("cache", help="soft labels on disk").add_subparsers(required=True, metavar="ACTION")
    build = actions.add_parser("build", help="run a teacher over a tokenised dataset and keep its distributions")
    build.add_argument("--teacher", required=True, help="Hub name or folder of a causal language model")
    build.add_argument("--dataset", required=True, help="tokenised: Hub name, folder, or json(l) or parquet file")
    build.add_argument("--split", default="train", help="of the dataset (default: train)")
    build.add_argument("--out", required=True, type=Path, help="folder of the cache")
    build.add_argument("--encoding", default="topk", help="topk, sampled, topk_tail, dense, hidden (default: topk)")
    build.add_argument("--k", type=int, help="ids of a token")
    build.add_argument("--temperatures", type=float, nargs="+", default=[1.0], help="at which it can be read")
    build.add_argument("--quantization", choices=["nf4", "int8"], help="of the teacher")
    build.add_argument("--shard-tokens", type=int, default=2**20, help="tokens of a file (default: %(default)s)")
    build.add_argument("--batch-tokens", type=int, default=4096, help="tokens read at once (default: %(default)s)")
    build.add_argument("--compression", choices=["zstd"], help="of the files")
    build.set_defaults(run=_build)
    info = actions.add_parser("info", help="what a cache is of, and how large it is")
    info.add_argument("path", type=Path)
    info.set_defaults(run=_info)


def _build(options: argparse.Namespace) -> None:
    from hf_distill.cache import build_cache

    dataset = _load(options.dataset, options.split)
    settings = {name: value for name, value in vars(options).items() if name not in ("run", "split", "dataset")}
    build_cache(dataset=dataset, **settings)
    _info(argparse.Namespace(path=options.out))


def _load(name: str, split: str) -> Any:
    """A dataset by what its name is: a saved folder, a file, or one of the Hub."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    path = Path(name)
    if path.is_dir():
        dataset = load_from_disk(name)
        return dataset[split] if isinstance(dataset, DatasetDict) else dataset
    if path.is_file():
        if path.suffix not in FILES:
            raise ValueError(f"`--dataset` is {name}; expected a file of {sorted(FILES)}, a folder or a Hub name.")
        return load_dataset(FILES[path.suffix], data_files=name, split="train")
    return load_dataset(name, split=split)


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
        "dataset": manifest.identity.dataset,
        "encoding": ", ".join(f"{name} {value}" for name, value in encoding.items()),
        "rows": f"{manifest.rows:,}",
        "tokens": f"{manifest.tokens:,} in {len(manifest.shards)} shards",
        "size": f"{manifest.bytes:,} bytes, {manifest.bytes / manifest.tokens:.1f} a token",
    }
    for name, value in facts.items():
        print(f"{name:14} {value}")
