"""The sum of the squares of gradients in Triton, for clipping by their norm: one pass over the
chunks of a step, in float64 and in a fixed order (``csrc/cuda/norm_kernels.h``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_memory import load_grad, strided_offset, this_chunk
from .triton_words import GRAD, GROUP, LAYOUT, NUMEL, ROW_WORDS


@triton.jit
def added(a, b):
    """What tl.sum reduces by."""
    return a + b


@triton.jit(do_not_specialize=["first_chunk"])
def squares_kernel(
    rows,
    gradients,
    chunks,
    first_chunk,
    of_chunks,
    T: tl.constexpr,
    STRIDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a chunk's gradients; 0 for a row whose gradient's address is 0."""
    row, begin = this_chunk(chunks, first_chunk, CHUNK)
    word = tl.load(gradients + row)
    sums = tl.full([BLOCK], 0.0, tl.float64)
    if word != 0:
        record = rows + row * ROW_WORDS
        count = tl.minimum(tl.load(record + NUMEL) - begin, CHUNK).to(tl.int32)
        dtype = tl.load(record + GROUP) >> 48
        lanes = tl.arange(0, BLOCK)
        whole = 0 if STRIDED else count // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            g = load_grad(word, begin + start + lanes, None, dtype, T, True).to(tl.float64)
            sums += g * g
        for start in range(whole, count, BLOCK):
            i = begin + start + lanes
            if STRIDED:
                layout = tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64))
                i = strided_offset(layout, GRAD, i)
            mask = start + lanes < count
            g = load_grad(word, i, mask, dtype, T, False).to(tl.float64)
            sums += tl.where(mask, g * g, 0.0)
    tl.store(of_chunks + tl.program_id(0) + first_chunk, tl.reduce(sums, 0, added))


@triton.jit(do_not_specialize=["count"])
def total_kernel(of_chunks, count, total, BLOCK: tl.constexpr):
    """Of all chunks, by a single program."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        sums += tl.load(of_chunks + start + lanes, mask=start + lanes < count, other=0.0)
    tl.store(total, tl.reduce(sums, 0, added))
