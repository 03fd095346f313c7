"""The two formats in which DistillKit stores the log-probabilities of the most likely tokens, decoded.

Both keep, for each of S tokens, k ids in the order of their probability. The log-probabilities of the first `exact_k`
are stored as they are, the others as coefficients of functions of their rank that were fitted to them by least squares
(https://github.com/arcee-ai/DistillKit, `distillkit/compression`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class ResidualBin:
    """Errors of the fit at the next `num_elements` ranks, in whole steps of one scale a token."""

    scale_dtype: str
    element_bits: int
    num_elements: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of the steps of a token."""
        return -(-self.num_elements * self.element_bits // 8)


@dataclass(frozen=True)
class PolynomialFormat:
    """The present format; the fields are those of its `compression_config.yaml`.

    Args:
        d: Size of the vocabulary.
        k: Ids a token.
        exact_k: Of these, with their log-probability as it is.
        residual_bins: Errors of the fit that are kept, from the first fitted rank on.
        exact_dtype: Precision of the exact values.
        polynomial_terms: Functions of the rank: powers, "sqrt" and "exp".
        term_dtype: Precision of the coefficients, in which the fit is also evaluated.
        delta_encoding: Whether each value but the first is the difference to the one before.
        error_diffusion: Whether an error of rounding was added to the next value; decoding does not depend on it.
        normalize_t: Whether ranks go from 0 to 1 instead of counting.
    """

    d: int
    k: int
    exact_k: int
    residual_bins: Sequence[ResidualBin] = ()
    exact_dtype: str = "float32"
    polynomial_terms: Sequence[int | str] | None = None
    term_dtype: str = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.d

    @property
    def widths(self) -> dict[str, int]:
        """The columns of a row, and how many bytes each has a token."""
        logprobs = self.exact_k * DTYPES[self.exact_dtype].itemsize
        logprobs += len(self.polynomial_terms or ()) * DTYPES[self.term_dtype].itemsize
        logprobs += sum(DTYPES[bin.scale_dtype].itemsize + bin.packed_bytes for bin in self.residual_bins)
        return {"bytepacked_indices": -(-self.k * _bits(self.d) // 8), "compressed_logprobs": logprobs}

    def decode(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ids `[S, k]` int64 and log-probabilities `[S, k]` float64, from the columns of a row, `[S, bytes]` uint8."""
        _check_widths(arrays, self.widths)
        ids = unpack_bits(arrays["bytepacked_indices"], _bits(self.d), self.k)
        data = _Bytes(torch.tensor(arrays["compressed_logprobs"]))
        exact = data.take(self.exact_k, self.exact_dtype).double()
        fitted = torch.zeros(len(exact), self.k - self.exact_k, dtype=torch.float64)
        if self.polynomial_terms:
            coefficients = data.take(len(self.polynomial_terms), self.term_dtype)
            # In their precision, because the residuals are what it left.
            fitted += (self._terms() * coefficients[:, None]).sum(-1).double()
        start = 0
        for bin in self.residual_bins:
            scale = data.take(1, bin.scale_dtype).double()
            packed = data.take(bin.packed_bytes, "uint8").numpy()
            steps = torch.from_numpy(unpack_bits(packed, bin.element_bits, bin.num_elements)).double()
            # One bit is a sign; more are whole numbers from the lowest on.
            steps = steps * 2 - 1 if bin.element_bits == 1 else steps - 2 ** (bin.element_bits - 1)
            fitted[:, start : start + bin.num_elements] += steps * scale
            start += bin.num_elements
        log_probs = torch.cat([exact, fitted], dim=1)
        return ids, (log_probs.cumsum(1) if self.delta_encoding else log_probs).numpy()

    def _terms(self) -> Tensor:
        """The functions at the fitted ranks, `[k - exact_k, terms]`."""
        ranks, dtype = self.k - self.exact_k, DTYPES[self.term_dtype]
        t = torch.linspace(0, 1, ranks, dtype=dtype) if self.normalize_t else torch.arange(ranks, dtype=dtype)
        terms = [t**term if isinstance(term, int) else getattr(t, term)() for term in self.polynomial_terms or ()]
        return torch.stack(terms, dim=-1)


@dataclass(frozen=True)
class LegacyFormat:
    """The format before it; the fields are those of DistillKit's `legacy_logit_compression`.

    Args:
        k: Ids a token.
        exact_k: Of these, with their value as it is, in fp16.
        polynomial_degree: Highest power of the rank.
        vocab_size: Size of the vocabulary.
        invert_polynomial: Whether powers are negative.
        with_sqrt_term: Whether the root of the rank is a term, too.
        term_dtype: Precision of the coefficients.
    """

    k: int
    exact_k: int
    polynomial_degree: int
    vocab_size: int
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: str = "float32"

    @property
    def widths(self) -> dict[str, int]:
        """The columns of a row, and how many words or numbers each has a token."""
        terms = self.polynomial_degree + 1 + self.with_sqrt_term if self.exact_k < self.k else 0
        words = -(-self.k // (64 // _bits(self.vocab_size)))
        return {"packed_indices": words, "exact_values": self.exact_k, "coeffs": terms}

    def decode(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities, `[S, k]`, from the columns of a row: `[S, words]` uint64, `[S, ...]` floats."""
        _check_widths(arrays, self.widths)
        bits = _bits(self.vocab_size)
        shifts = np.arange(64 // bits, dtype=np.uint64) * np.uint64(bits)  # an id never crosses into the next word
        words: np.ndarray = arrays["packed_indices"].astype(np.uint64)
        ids = (words[:, :, None] >> shifts) & np.uint64(2**bits - 1)
        ids = ids.reshape(len(words), -1)[:, : self.k].astype(np.int64)
        rank: np.ndarray = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        sign = -1 if self.invert_polynomial else 1
        terms: list[np.ndarray] = [rank ** (sign * power) for power in range(self.polynomial_degree + 1)]
        terms += [np.sqrt(rank)] if self.with_sqrt_term else []
        exact: np.ndarray = arrays["exact_values"].astype(np.float64)
        if self.exact_k == self.k:
            return ids, exact
        return ids, np.concatenate([exact, arrays["coeffs"].astype(np.float64) @ np.stack(terms)], axis=1)


def format_of(config: Mapping[str, Any]) -> PolynomialFormat | LegacyFormat:
    """The format that a configuration describes.

    Raises:
        ValueError: It has unknown entries, lacks some, or its values do not fit together.
    """
    kind: type[PolynomialFormat] | type[LegacyFormat] = LegacyFormat if "vocab_size" in config else PolynomialFormat
    known = {entry.name for entry in fields(kind)}
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"The compression config has unknown entries {unknown}; a {kind.__name__} has {sorted(known)}."
        )
    values = dict(config)
    if "residual_bins" in values:
        values["residual_bins"] = tuple(ResidualBin(**bin) for bin in values["residual_bins"] or ())
    try:
        chosen = kind(**values)
    except TypeError as error:
        raise ValueError(f"The compression config is incomplete: {error}.") from None
    _check(chosen)
    return chosen


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Whole numbers `[S, count]` from streams of bits, highest first, `[S, bytes]` uint8."""
    stream = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _bits(vocab_size: int) -> int:
    """Bits of an id: the logarithm of the vocabulary's size, rounded up."""
    return (vocab_size - 1).bit_length()


def _check_widths(arrays: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> None:
    for name, width in widths.items():
        if arrays[name].shape[1] != width:
            raise ValueError(
                f"`{name}` has {arrays[name].shape[1]} values a token, and by the compression config {width}; it is "
                "not the config that these files were written with."
            )


def _check(chosen: PolynomialFormat | LegacyFormat) -> None:
    dtypes = [chosen.term_dtype]
    if isinstance(chosen, PolynomialFormat):
        dtypes += [chosen.exact_dtype, *(bin.scale_dtype for bin in chosen.residual_bins)]
        if strange := [
            t for t in chosen.polynomial_terms or () if not isinstance(t, int) and t not in {"sqrt", "exp"}
        ]:
            raise ValueError(f"`polynomial_terms` holds {strange}; expected powers, 'sqrt' and 'exp'.")
    if strange := sorted(set(dtypes) - set(DTYPES)):
        raise ValueError(f"The compression config names the dtypes {strange}; expected {sorted(DTYPES)}.")
    if not 0 <= chosen.exact_k <= chosen.k <= chosen.vocab_size or chosen.k == 0:
        raise ValueError(
            f"The compression config has exact_k {chosen.exact_k}, k {chosen.k} and a vocabulary of "
            f"{chosen.vocab_size}; expected 0 <= exact_k <= k <= vocabulary."
        )
    bins = () if isinstance(chosen, LegacyFormat) else chosen.residual_bins
    if sum(bin.num_elements for bin in bins) > chosen.k - chosen.exact_k:
        raise ValueError(f"`residual_bins` have more elements than the {chosen.k - chosen.exact_k} fitted ranks.")


@dataclass
class _Bytes:
    """Bytes of S tokens `[S, bytes]`, read from left to right."""

    data: Tensor
    position: int = field(default=0)

    def take(self, count: int, dtype: str) -> Tensor:
        """The next numbers, `[S, count]`."""
        kind = torch.uint8 if dtype == "uint8" else DTYPES[dtype]
        width = count * kind.itemsize
        part = self.data[:, self.position : self.position + width]
        self.position += width
        # Flat, because a view in another dtype looks at the strides, and those of a single token are not its own.
        return part.flatten().clone().view(kind).reshape(len(part), count)
