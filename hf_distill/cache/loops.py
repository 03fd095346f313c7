"""The loops that read cached tokens, compiled by numba: what `ids`, `values` and `draw` do array by array.

Only `compiled` imports this, since numba may not be installed. Places are unsigned: of a signed one numba asks each
time whether it counts from the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from hf_distill.cache.ids import MAX_WIDTH, WIDTH_BITS


_U = np.uint64


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, and keep what was made for the next process where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return numba.njit(nogil=True)(function)


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
