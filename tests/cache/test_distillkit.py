from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_distill.cache.distillkit import LegacyFormat, PolynomialFormat, format_of
from tests.cache import distillkit_files as files


IDS = [5, 6, 7]


def distributions(tokens: int = 40, vocab_size: int = 320, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(tokens, vocab_size, generator=generator, dtype=torch.float64)).log_softmax(-1)


def arrays(row: dict) -> dict[str, np.ndarray]:
    kinds = {"packed_indices": np.uint64, "exact_values": np.float32, "coeffs": np.float32}
    return {name: np.array(row[name], kinds.get(name, np.uint8)) for name in row if name != "input_ids"}


def polynomial_error(log_probs: torch.Tensor, **changes) -> tuple[torch.Tensor, torch.Tensor]:
    """The absolute error of exact and of fitted values."""
    config = files.POLYNOMIAL | changes
    decoded_ids, decoded = format_of(config).decode(arrays(files.polynomial_row(IDS, log_probs, config)))
    values, ids = log_probs.topk(config["k"])
    assert (decoded_ids == ids.numpy()).all()
    error = (torch.from_numpy(decoded) - values).abs()
    return error[:, : config["exact_k"]], error[:, config["exact_k"] :]


def test_exact_values_come_back_within_their_precision() -> None:
    log_probs = distributions()
    exact, _ = polynomial_error(log_probs)
    values = log_probs.topk(8).values.abs()
    assert (exact <= values * 2.0**-8).all()
    assert polynomial_error(log_probs, exact_dtype="float64")[0].max() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalize_t": False},
        {"polynomial_terms": [0, 1, "sqrt"], "normalize_t": False, "exact_k": 1},
        {"polynomial_terms": [0, "exp"]},
        {"exact_k": 0},
        {"term_dtype": "float64"},
    ],
)
def test_fitted_values_are_those_of_the_best_fit(changes: dict) -> None:
    config = files.POLYNOMIAL | changes
    log_probs = distributions()
    _, fitted = polynomial_error(log_probs, **changes)
    ranks = config["k"] - config["exact_k"]
    t = np.linspace(0, 1, ranks) if config["normalize_t"] else np.arange(ranks)
    terms = np.stack([t**e if isinstance(e, int) else getattr(np, e)(t) for e in config["polynomial_terms"]], 1)
    y = log_probs.topk(config["k"]).values[:, config["exact_k"] :].numpy().T
    best = np.abs(terms @ np.linalg.lstsq(terms, y, rcond=None)[0] - y).T
    assert np.allclose(fitted.numpy(), best, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_residuals_bring_the_error_below_their_own_steps(bits: int) -> None:
    log_probs = distributions()
    bins = [
        {"scale_dtype": "float32", "element_bits": bits, "num_elements": 5},
        {"scale_dtype": "float16", "element_bits": 8, "num_elements": 9},
    ]
    _, plain = polynomial_error(log_probs)
    _, corrected = polynomial_error(log_probs, residual_bins=bins)
    if bits > 1:
        largest = plain[:, :5].amax(1, keepdim=True)
        assert (corrected[:, :5] <= 1.001 * largest * 2.0 ** -(bits - 1)).all()
    largest = plain[:, 5:14].amax(1, keepdim=True)
    assert (corrected[:, 5:14] <= 1.1 * largest / 128).all()
    assert torch.allclose(corrected[:, 14:], plain[:, 14:])  # beyond the bins


def test_one_bit_of_residual_is_a_sign() -> None:
    config = files.POLYNOMIAL | {
        "polynomial_terms": None,
        "exact_k": 23,
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 1}],
    }
    row = arrays(files.polynomial_row(IDS, distributions(1), config))
    tail = row["compressed_logprobs"][:, -5:].copy()
    scale = tail[:, :4].copy().view(np.float32)[0, 0]
    for bit, value in ((0, -scale), (128, scale)):
        row["compressed_logprobs"][:, -1] = bit
        assert format_of(config).decode(row)[1][0, -1] == value


def test_differences_are_added_up() -> None:
    log_probs = distributions()
    exact, _ = polynomial_error(log_probs, delta_encoding=True, exact_k=24, exact_dtype="float64", residual_bins=[])
    assert exact.max() < 1e-12
    config = files.POLYNOMIAL | {"delta_encoding": True, "exact_dtype": "float64"}
    decoded = format_of(config).decode(arrays(files.polynomial_row(IDS, log_probs, config)))[1]
    steps = log_probs.topk(24).values.diff(dim=1)[:, 7:].numpy()
    t = np.linspace(0, 1, 16)
    terms = np.stack([t**0, t, t**2, np.sqrt(t)], 1)
    best = (terms @ np.linalg.lstsq(terms, steps.T, rcond=None)[0]).T
    assert np.allclose(np.diff(decoded)[:, 7:], best, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{}, {"invert_polynomial": False}, {"with_sqrt_term": True}, {"vocab_size": 65536}, {"k": 8}]
)
def test_the_legacy_format_is_read_within_its_precision(changes: dict) -> None:
    config = files.LEGACY | changes
    log_probs = distributions(vocab_size=config["vocab_size"])
    row = files.legacy_row(IDS, log_probs, config)
    if config["k"] == 8:
        row["coeffs"] = [[]] * len(log_probs)
    decoded_ids, decoded = format_of(config).decode(arrays(row) | {"coeffs": np.array(row["coeffs"], np.float32)})
    values, ids = log_probs.topk(config["k"])
    assert (decoded_ids == ids.numpy()).all()
    error = (torch.from_numpy(decoded) - values).abs()
    assert (error[:, :8] <= values[:, :8].abs() * 2.0**-10).all()
    if config["k"] > 8:
        assert error.max() < 0.5
        assert error[:, 8:].mean() < 0.1


def test_a_configuration_says_which_format_it_is() -> None:
    assert isinstance(format_of(files.LEGACY), LegacyFormat)
    assert isinstance(format_of(files.POLYNOMIAL), PolynomialFormat)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (files.POLYNOMIAL | {"colour": 1}, "unknown entries \\['colour'\\]"),
        ({"d": 320, "k": 5}, "incomplete"),
        (files.POLYNOMIAL | {"term_dtype": "int4"}, "int4"),
        (files.POLYNOMIAL | {"polynomial_terms": [0, "log"]}, "log"),
        (files.POLYNOMIAL | {"exact_k": 25}, "exact_k 25"),
        (
            files.POLYNOMIAL | {"residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 17}]},
            "residual_bins",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_of(config)


@pytest.mark.parametrize("changes", [{"exact_k": 7}, {"term_dtype": "float64"}, {"k": 23}, {"d": 70000}])
def test_files_of_another_configuration_are_refused(changes: dict) -> None:
    row = arrays(files.polynomial_row(IDS, distributions(3), files.POLYNOMIAL))
    with pytest.raises(ValueError, match="not the config"):
        format_of(files.POLYNOMIAL | changes).decode(row)


def test_the_recommended_configuration_decodes_to_more_than_all_probability() -> None:
    """The public README's configuration is numerically broken as DistillKit fits it; that must show."""
    config = files.POLYNOMIAL | {
        "d": 4096,
        "k": 128,
        "exact_k": 16,
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "normalize_t": False,
    }
    log_probs = (2 * distributions(64, 4096)).log_softmax(-1)
    mass, error = [], []
    for broken in (False, True):
        row = arrays(files.polynomial_row(IDS, log_probs, config, broken=broken))
        decoded = format_of(config).decode(row)[1]
        mass.append(np.exp(decoded).sum(1).max())
        error.append(np.abs(decoded - log_probs.topk(128).values.numpy()).mean())
    assert mass[0] < 1.005 < 1.01 < mass[1]
    # How broken is decided by rounding, and so by the processor: 0.7 and 1.6 nats were seen.
    assert error[0] < 0.1 < 0.4 < error[1]
