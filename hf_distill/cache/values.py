"""Numbers of a cache in few bits: log-probabilities as codes of a step, scalars in half precision."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hf_distill.cache import compiled
from hf_distill.cache.encoding import Arrays, Columns


# Of a log-probability at most.
MAX_BITS = 10
# Half precision is off by this share of a number at most.
HALF_ERROR = 2**-11
# The logarithm of a mass that is told from 1: the smallest number of half precision.
_LEAST = -(2**-24)
_AT_ONCE = 2**15


def quantise(log_probs: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of log-probabilities: how many steps they are below the greatest of their token.

    The greatest is not kept: it follows from the mass of all other tokens; see `normaliser`.

    Args:
        log_probs: `[N, K]`, -inf in unused slots.
        bits: Of a code.

    Returns:
        Codes `[N, K]` uint16, 0 in unused slots, and steps `[N]` in half precision. Relative to the greatest, a
        log-probability is off by half a step, and the step is `(greatest - least) / (2^bits - 1)`.
    """
    codes = torch.empty(log_probs.shape, dtype=torch.int16)
    steps = torch.empty(len(log_probs), dtype=torch.float16)
    most = 2**bits - 1
    for start in range(0, len(log_probs), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        depths = (log_probs[part].amax(1, keepdim=True) - log_probs[part]).where(log_probs[part] > -torch.inf, 0.0)
        # Rounded up, so that the last code reaches the least.
        steps[part] = depths.amax(1) / most * (1 + 2 * HALF_ERROR)
        divisors = steps[part].float().where(steps[part] > 0, torch.inf)
        codes[part] = (depths / divisors[:, None]).round()
    return codes.numpy().astype(np.uint16), steps.numpy()


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of some bits `[N, K]` as bytes of their tokens, `[N, B]` uint8.

    The bits are split into groups of 8, 4, 2 or 1, and those of all K numbers follow one another group by group: of
    two numbers in a byte the second is half a group behind the first, so that neighbours are read together.
    """
    planes = []
    for shift, width in groups_of(bits):
        each = 8 // width
        plane = (codes >> shift & (1 << width) - 1).astype(np.uint8)
        plane = np.pad(plane, ((0, 0), (0, -plane.shape[1] % each))).reshape(len(codes), each, -1)
        planes.append((plane << np.arange(0, 8, width, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8))
    return np.concatenate(planes, axis=1)


def unpack_codes(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """What `pack_codes` made of K = `count` numbers, `[M, K]`, in as few bytes a number as hold `bits`."""
    codes: np.ndarray = np.zeros((len(packed), count), dtype=np.min_scalar_type(2**bits - 1))
    start = 0
    for shift, width in groups_of(bits):
        size = -(-count * width // 8)
        group = packed[:, start : start + size].astype(codes.dtype)
        start += size
        for place in range(8 // width):
            part = codes[:, place * size : (place + 1) * size]
            part |= (group >> place * width & (1 << width) - 1)[:, : part.shape[1]] << shift
    return codes


def groups_of(bits: int) -> list[tuple[int, int]]:
    """Groups of bits whose sizes divide a byte: where each begins, and its size, the largest first."""
    groups, at = [], 0
    for width in (8, 4, 2, 1):
        while bits - at >= width:
            groups.append((at, width))
            at += width
    return groups


def read_log_probs(arrays: Arrays, numbers: np.ndarray, bits: int, ids: np.ndarray) -> Tensor:
    """Log-probabilities of some tokens but for a constant of each, `[M, K]`.

    Args:
        arrays: Of a shard: `codes`, as `pack_codes` made them, and `steps`.
        numbers: Of the M tokens.
        bits: Of a code.
        ids: `[M, K]`, -1 in unused slots, whose log-probability is -inf.
    """
    steps: np.ndarray = -arrays["steps"].take(numbers).astype(np.float32)
    if (loops := compiled.loops()) is not None:
        log_probs = torch.empty(ids.shape)
        loops.read_log_probs(arrays["codes"], numbers, np.array(groups_of(bits)), steps, ids, log_probs.numpy())
        return log_probs
    codes = unpack_codes(arrays["codes"].take(numbers, 0), ids.shape[1], bits)
    log_probs = torch.from_numpy(codes).float().mul_(torch.from_numpy(steps)[:, None])
    log_probs.numpy().reshape(-1)[np.flatnonzero(ids.reshape(-1) < 0)] = -np.inf
    return log_probs


def weights_of(log_probs: Tensor, temperature: float) -> Tensor:
    """`exp(log_probs / T)`: by exp2, which on a CPU is faster than exp, most of all at -inf."""
    return torch.mul(log_probs, math.log2(math.e) / temperature).exp2_()


def normaliser(mass: Tensor, log_rest: Tensor) -> Tensor:
    """The c with which ids and the rest have a mass of 1: `mass * exp(-c) + exp(log_rest) = 1`.

    Args:
        mass: Of the ids, but for a constant factor of their token, `[N]`; overwritten.
        log_rest: `[N]`, the logarithm of the mass of all other tokens.

    Returns:
        c, `[N]`.
    """
    return mass.log_() - (-torch.expm1(log_rest)).log_()


# What is kept of a token besides its ids, in half precision.
_SCALARS = ("label_log_probs", "entropies", "log_rests")


def pack_scalars(columns: Columns) -> dict[str, np.ndarray]:
    """Those of the columns that are numbers of a token, each off by `HALF_ERROR` of its value above 6e-5."""
    scalars = {name: columns[name] for name in _SCALARS if name in columns}
    if "log_rests" in scalars:  # rounding must leave the ids a mass
        scalars["log_rests"] = scalars["log_rests"].clamp(max=_LEAST)
    return {name: values.to(torch.float16).numpy() for name, values in scalars.items()}


def read_scalars(arrays: Arrays, numbers: np.ndarray) -> dict[str, Tensor]:
    """What `pack_scalars` packed, of some tokens."""
    known = [name for name in _SCALARS if name in arrays]
    return {name: torch.from_numpy(arrays[name].take(numbers, 0).astype(np.float32)) for name in known}
