"""The loops that write and read cached tokens, compiled by numba: what their callers do array by array without it.

Only `compiled` imports this, since numba may not be installed. Places are unsigned: of a signed one numba asks each
time whether it counts from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from hf_distill.cache.ids import MAX_WIDTH, WIDTH_BITS
from hf_distill.cache.tiles import DEPTH, IMPOSSIBLE


_U = np.uint64


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Compile at the first call, and keep what was made for the next process where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True, **options)(function)


# What adds up many numbers may do so in any order: several at once.
_summing = partial(_compiled, fastmath={"reassoc", "contract", "nsz"})


@intrinsic
def _trailing_zeros(typing_context, word):
    """How many zeros are below the lowest 1 of a word that is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return numba.types.uint64(numba.types.uint64), generate


@_compiled
def _half(data, at):
    """Four bytes, the lowest first."""
    half = _U(data[at]) | _U(data[at + _U(1)]) << _U(8)
    return half | _U(data[at + _U(2)]) << _U(16) | _U(data[at + _U(3)]) << _U(24)


@_compiled
def _word(data, start, stop):
    """Eight bytes, those from `stop` on 0."""
    if start + _U(8) <= stop:
        return _half(data, start) | _half(data, start + _U(4)) << _U(32)
    word = _U(0)
    for place in range(stop - start):
        word |= _U(data[start + place]) << (_U(8) * place)
    return word


@_compiled
def read_sets(unary, unary_spans, low, low_spans, entries, vocabulary, ids):
    """Read sets into `ids` `[M, K]`; spans `[2, M]` say where the bytes of each begin and end."""
    slots = _U(ids.shape[1])
    own = np.zeros(slots * _U(MAX_WIDTH) // _U(8) + _U(5), np.uint8)
    for token in range(_U(len(ids))):
        start, stop = _U(low_spans[0, token]), _U(low_spans[1, token])
        for at in range(stop - start):
            own[at] = low[start + at]
        bit, slot, first = _U(0), _U(0), _U(0)
        stop = _U(unary_spans[1, token])
        for start in range(_U(unary_spans[0, token]), stop, _U(8)):
            ones = _word(unary, start, stop)
            while ones != _U(0):
                # A 1 stands behind the steps and the earlier ids of its set.
                entry = _U(entries[first + _trailing_zeros(ones) - slot])
                ones &= ones - _U(1)
                width = entry & _U(MAX_WIDTH)
                place = _half(own, bit >> _U(3)) >> (bit & _U(7)) & ((_U(1) << width) - _U(1))
                ids[token, slot] = vocabulary[(entry >> _U(WIDTH_BITS)) + place]
                bit += width
                slot += _U(1)
            first += _U(64)
        for rest in range(slot, slots):
            ids[token, rest] = -1


@_compiled
def pack_sets(ranks, of_rank, entries):
    """The bytes of the steps and of the places of sorted ranks `[n, K]`, and how many of each a row has, `[2, n]`."""
    lengths = np.zeros((2, len(ranks)), np.int64)
    for row in range(len(ranks)):
        steps, places = 0, 0
        for slot in range(ranks.shape[1]):
            if ranks[row, slot] < len(of_rank):
                bucket = of_rank[ranks[row, slot]]
                steps = bucket + slot + 1
                places += entries[bucket] & MAX_WIDTH
        lengths[0, row], lengths[1, row] = (steps + 7) >> 3, (places + 7) >> 3
    unary, low = np.zeros(lengths[0].sum(), np.uint8), np.zeros(lengths[1].sum(), np.uint8)
    unary_at, low_at = 0, 0
    for row in range(len(ranks)):
        bit = 8 * low_at
        for slot in range(ranks.shape[1]):
            if ranks[row, slot] < len(of_rank):
                bucket = of_rank[ranks[row, slot]]
                step = 8 * unary_at + bucket + slot
                unary[step >> 3] |= np.uint8(1 << (step & 7))
                width = entries[bucket] & MAX_WIDTH
                place = (ranks[row, slot] - (entries[bucket] >> WIDTH_BITS)) << (bit & 7)
                for byte in range((width + (bit & 7) + 7) >> 3):
                    low[(bit >> 3) + byte] |= np.uint8(place >> (8 * byte) & 255)
                bit += width
        unary_at += lengths[0, row]
        low_at += lengths[1, row]
    return unary, low, lengths


@_compiled
def part(ids, chosen, numbers, head):
    """Bring those ids of each set whose bit in `chosen[number]` is 1 behind the first `head` slots, in place."""
    slots = _U(ids.shape[1])
    others = np.empty(slots + _U(1), np.int64)
    for token in range(_U(len(ids))):
        number = _U(numbers[token])
        kept, moved = _U(0), _U(0)
        for slot in range(slots):
            bit = _U(chosen[number, slot >> _U(3)]) >> (slot & _U(7)) & _U(1)
            others[moved] = ids[token, slot]
            ids[token, kept] = ids[token, slot]
            moved += bit
            kept += _U(1) - bit
        for slot in range(moved):
            ids[token, _U(head) + slot] = others[slot]
        for slot in range(_U(head) + moved, slots):
            ids[token, slot] = -1


@_compiled
def read_log_probs(packed, numbers, groups, steps, ids, log_probs):
    """Codes times steps into `log_probs` `[M, K]`, -inf where there is no id; `groups` are shifts and widths."""
    slots = _U(ids.shape[1])
    codes = np.empty(slots, np.uint16)
    for token in range(_U(len(ids))):
        number = _U(numbers[token])
        codes[:] = 0
        start = _U(0)
        for group in range(_U(len(groups))):
            shift, width = np.uint16(groups[group, 0]), _U(groups[group, 1])
            size = (slots * width + _U(7)) >> _U(3)
            ones = np.uint16((_U(1) << width) - _U(1))
            for place in range(_U(8) // width):
                first, right = place * size, np.uint16(place * width)
                for slot in range(min(size, slots - min(slots, first))):
                    codes[first + slot] |= (np.uint16(packed[number, start + slot]) >> right & ones) << shift
            start += size
        step = steps[token]
        for slot in range(slots):
            log_probs[token, slot] = step * np.float32(codes[slot])
        for slot in range(slots):
            if ids[token, slot] < 0:
                log_probs[token, slot] = -np.inf


@_compiled
def read_counts(packed, numbers, ids, counts):
    """Read how often the ids `[M, K]` were drawn in K draws into `counts` `[M, K]`."""
    slots = _U(ids.shape[1])
    for token in range(_U(len(ids))):
        if ids[token, slots - _U(1)] >= 0:  # each was drawn once
            counts[token] = 1
            continue
        number = _U(numbers[token])
        counts[token] = 0
        slot, run = _U(0), _U(0)
        for place in range(slots):
            bit = _U(packed[number, place >> _U(3)]) >> (place & _U(7)) & _U(1)
            run += _U(1)
            counts[token, slot] = run * bit
            slot += bit
            run *= _U(1) - bit


_F = np.float32
_LEAST = _F(IMPOSSIBLE)
# The polynomial of degree 5 that is 2^x for abs(x) <= 1/2, off by 1.6e-7 of it at most in single precision.
_P0, _P1, _P2 = _F(1.00000007), _F(0.693146967), _F(0.240221197)
_P3, _P4, _P5 = _F(0.0555071327), _F(0.00967554138), _F(0.0013276472)
# A number added to this is rounded to a whole one, which is then in the lowest bits.
_ROUNDER = _F(1.5 * 2**23)


@partial(_compiled, fastmath={"contract"})
def _exp2(exponent):
    """2 to a number that is 0 or less; 0 below -126.5."""
    exponent = _F(-127) if exponent < _F(-127) else exponent
    rounded = exponent + _ROUNDER
    x = exponent - (rounded - _ROUNDER)
    power = _P0 + x * (_P1 + x * (_P2 + x * (_P3 + x * (_P4 + x * _P5))))
    return power * np.uint32((_F(rounded).view(np.uint32) + np.uint32(127)) << np.uint32(23)).view(_F)


@_compiled
def _number(bits):
    """A bfloat16 of its bits; that of an impossible token finite."""
    number = np.uint32(np.uint32(bits) << np.uint32(16)).view(_F)
    return _LEAST if number < _LEAST else number


@_compiled
def _order(bits):
    """A whole number that is ordered as bfloat16 are, of the bits of one; and the other way."""
    bits = np.int16(bits)
    return np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))


@_compiled
def _raise(orders, logits):
    """Raise orders to those of logits that are above them."""
    for column in range(_U(len(logits))):
        order = _order(logits[column])
        orders[column] = order if order > orders[column] else orders[column]


@_summing
def _add(masses, logits, scale, shift):
    """Add the weights of logits to masses, and return their sum times the logits."""
    mean = _F(0)
    for column in range(_U(len(logits))):
        logit = _number(logits[column])
        weight = _exp2(logit * scale + shift)
        masses[column] += weight
        mean += weight * logit
    return mean


@_compiled
def read_logits(logits, start, stop, scales, tops, masses, means):
    """Read the rows from `start` to `stop` of logits, the bits of bfloat16 `[N, V]`; see `tiles.Tiles`."""
    columns = tops.shape[1]
    orders = np.empty(columns, np.int16)
    for row in range(start, stop):
        orders[:] = -(2**15)
        for place in range(0, DEPTH * columns, columns):
            _raise(orders, logits[row, place : place + columns])
        for column in range(_U(columns)):
            tops[row, column] = _number(_order(orders[column]))
        top = tops[row].max()
        for number in range(len(scales)):
            scale = scales[number]
            masses[number, row] = _F(0)
            means[number, row] = _F(0)
            for place in range(0, DEPTH * columns, columns):
                piece = logits[row, place : place + columns]
                means[number, row] += _add(masses[number, row], piece, scale, -top * scale)
