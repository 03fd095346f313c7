"""Writes the two formats of DistillKit, from their public description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from transformers import PreTrainedModel

from tests import tiny


POLYNOMIAL = {
    "d": 320,
    "k": 24,
    "exact_k": 8,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": True,
}
LEGACY = {"vocab_size": 320, "k": 24, "exact_k": 8, "polynomial_degree": 3, "invert_polynomial": True}
PAD = 0
EXACT = POLYNOMIAL | {"exact_k": 24, "exact_dtype": "float64", "polynomial_terms": None}
NUMPY = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


def polynomial_row(ids: list[int], log_probs: torch.Tensor, config: dict[str, Any], *, broken: bool = False) -> dict:
    """A row of the present format.

    Args:
        ids: Its tokens.
        log_probs: `[S, V]`, S distributions.
        config: The compression config.
        broken: Fit as DistillKit does, in fp32 with an absolute tolerance, and not as well as can be.
    """
    values, indices = log_probs.double().topk(config["k"])
    exact_k = config["exact_k"]
    if config["delta_encoding"]:
        values = torch.cat([values[:, :1], values.diff(dim=1)], dim=1)
    exact = values[:, :exact_k].to(getattr(torch, config["exact_dtype"])).contiguous()
    chunks, rest = [exact.view(torch.uint8).numpy()], values[:, exact_k:]
    if config["polynomial_terms"]:
        count = rest.shape[1]
        t = torch.linspace(0, 1, count) if config["normalize_t"] else torch.arange(count, dtype=torch.float32)
        terms = torch.stack([t**e if isinstance(e, int) else getattr(t, e)() for e in config["polynomial_terms"]], -1)
        if broken:
            u, s, vh = torch.linalg.svd(terms, full_matrices=False)
            coefficients = rest.float() @ (vh.mT @ torch.where(s > 1e-5, 1 / s, 0).diag() @ u.mT).mT
        else:
            coefficients = torch.linalg.lstsq(terms.double(), rest.mT, driver="gelsd").solution.mT
        coefficients = coefficients.to(getattr(torch, config["term_dtype"])).contiguous()
        chunks.append(coefficients.view(torch.uint8).numpy())
        rest = rest - (terms.to(coefficients.dtype) * coefficients[:, None]).sum(-1).double()
    start = 0
    for bin in config["residual_bins"]:
        part = rest[:, start : start + bin["num_elements"]].numpy()
        bits, start = bin["element_bits"], start + bin["num_elements"]
        scale = np.abs(part).max(1, keepdims=True) / (1 if bits == 1 else 2 ** (bits - 1))
        scale = np.where(scale == 0, 1, scale).astype(NUMPY[bin["scale_dtype"]])
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        steps = np.clip(np.round(part / scale.astype(np.float64)), low, high) - low
        chunks += [scale.view(np.uint8), pack_bits(steps.astype(np.int64), bits)]
    return {
        "input_ids": ids,
        "compressed_logprobs": np.concatenate(chunks, axis=1).tolist(),
        "bytepacked_indices": pack_bits(indices.numpy(), int(np.ceil(np.log2(config["d"])))).tolist(),
    }


def legacy_row(ids: list[int], log_probs: torch.Tensor, config: dict[str, Any]) -> dict:
    """A row of the legacy format; see `polynomial_row`."""
    values, indices = log_probs.double().topk(config["k"])
    exact_k, bits = config["exact_k"], int(np.ceil(np.log2(config["vocab_size"])))
    rank = np.arange(1, config["k"] - exact_k + 1, dtype=np.float64)
    sign = -1 if config["invert_polynomial"] else 1
    terms = [rank ** (sign * power) for power in range(config["polynomial_degree"] + 1)]
    terms += [np.sqrt(rank)] if config.get("with_sqrt_term") else []
    coefficients = np.linalg.lstsq(np.stack(terms, 1), values[:, exact_k:].numpy().T, rcond=None)[0].T
    words, per_word = [], 64 // bits
    for token in indices.tolist():
        groups = [token[i : i + per_word] for i in range(0, len(token), per_word)]
        words.append([sum(value << (bits * i) for i, value in enumerate(group)) for group in groups])
    return {
        "input_ids": ids,
        "packed_indices": words,
        "exact_values": values[:, :exact_k].half().float().tolist(),
        "coeffs": coefficients.astype(np.float32).tolist(),
    }


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers `[S, count]` as streams of bits, highest first, `[S, bytes]`."""
    return np.stack(
        [
            np.packbits([int(bit) for value in row for bit in np.binary_repr(int(value), bits)])
            for row in values.tolist()
        ]
    )


def write(folder: Path, rows: list[dict], config: dict[str, Any] | None, rows_a_file: int = 3) -> Path:
    """The parquet files of some rows, and the config beside them."""
    inner = {"compressed_logprobs": pyarrow.uint8(), "bytepacked_indices": pyarrow.uint8()}
    inner |= {"packed_indices": pyarrow.uint64(), "exact_values": pyarrow.float32(), "coeffs": pyarrow.float32()}
    schema = pyarrow.schema(
        [(name, pyarrow.list_(pyarrow.list_(inner[name]) if name in inner else pyarrow.uint64())) for name in rows[0]]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(rows), rows_a_file)):
        table = pyarrow.Table.from_pylist(rows[start : start + rows_a_file], schema=schema)
        pyarrow.parquet.write_table(table, folder / f"data_{number}.parquet")
    if config is not None:
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def teacher() -> PreTrainedModel:
    """One whose distributions differ from token to token."""
    return tiny.model(initializer_range=0.3)


def texts(count: int = 7) -> list[list[int]]:
    return [example["input_ids"] for example in tiny.tokenized_dataset(count)]


@torch.no_grad()
def captured(ids: list[int], model: torch.nn.Module) -> torch.Tensor:
    """What DistillKit captures: the log-probabilities of each token but the first of a prompt."""
    return model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)


def polynomial_files(folder: Path, config: dict = EXACT, **changes) -> Path:
    model = teacher()
    rows = [polynomial_row([*ids, PAD], captured([*ids, PAD], model), config) for ids in texts()]
    return write(folder, rows, config)


def legacy_files(folder: Path) -> Path:
    model = teacher()
    rows = [legacy_row([*ids, PAD], captured([*ids, PAD], model), LEGACY) for ids in texts()]
    return write(folder, rows, LEGACY)
