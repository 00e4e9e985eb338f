"""Gradient centralization in Triton: gradients less the means of their slices, written where the
step reads them (``csrc/cuda/centralize_kernel.h``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_memory import load_grad, strided_offset
from .triton_norm import added
from .triton_rule import centralized, mean
from .triton_words import GRAD, GROUP, LAYOUT, ROW_WORDS, SCRATCH, SLICE


@triton.jit
def slice_of(word, begin, start, lanes, length, record, T: tl.constexpr, STRIDED: tl.constexpr):
    """Gradients of a slice, one for each lane from ``start`` on; 0 beyond its end."""
    i = begin + start + lanes
    if STRIDED:
        i = strided_offset(tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64)), GRAD, i)
    there = start + lanes < length
    g = load_grad(word, i, there, tl.load(record + GROUP) >> 48, T, False)
    return tl.where(there, g, 0.0).to(T)


@triton.jit(do_not_specialize=["first_slice", "scratch"])
def centralize_kernel(
    rows,
    gradients,
    slices,
    first_slice,
    scratch,
    T: tl.constexpr,
    STRIDED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Of one slice; nothing for a row whose gradient's address is 0."""
    place = slices + (tl.program_id(0).to(tl.int64) + first_slice) * 2
    row = tl.load(place).to(tl.int64)
    word = tl.load(gradients + row)
    if word != 0:
        record = rows + row * ROW_WORDS
        length = tl.load(record + SLICE)
        begin = tl.load(place + 1).to(tl.int64) * length
        lanes = tl.arange(0, LANES)
        sums = tl.full([LANES], 0.0, T)
        for start in range(0, length, LANES):
            sums += slice_of(word, begin, start, lanes, length, record, T, STRIDED)
        # The sum of a pair is the same in either order.
        sums = tl.reduce(tl.reshape(sums, [2, LANES // 2]), 0, added)
        sums = tl.reduce(tl.reshape(sums, [2, LANES // 4]), 0, added)
        sums = tl.reduce(tl.reshape(sums, [2, LANES // 8]), 0, added)
        sums = tl.reduce(tl.reshape(sums, [2, LANES // 16]), 0, added)
        sums = tl.reduce(tl.reshape(sums, [2, LANES // 32]), 0, added)
        sums = tl.reduce(tl.reshape(sums, [2, LANES // 64]), 0, added)
        its = mean(tl.reduce(sums, 0, added), length.to(T))
        to = (scratch + tl.load(record + SCRATCH)).to(tl.pointer_type(T))
        for start in range(0, length, LANES):
            g = slice_of(word, begin, start, lanes, length, record, T, STRIDED)
            tl.store(to + begin + start + lanes, centralized(g, its), mask=start + lanes < length)
