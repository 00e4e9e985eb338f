"""A tensor's streams in memory, as Triton's kernels read and write them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_codecs import (
    GROUP_SIZE,
    MAGNITUDE,
    bfloat16_value,
    bits_of,
    coded,
    decode,
    decode_group,
    encode,
    encode_group,
    is_grouped,
    rest_type,
    scales_of,
    spread,
    stored_type,
)
from .triton_words import BFLOAT16, FLOAT16, FLOAT64, REST_OF

# How many values of float32 a thread has side by side, where it has 16 bytes of them.
SIDE_BY_SIDE = tl.constexpr(4)


class Streams(NamedTuple):
    """Something of each of a tensor's streams."""

    p: Any
    g: Any
    m: Any
    v: Any
    slow: Any
    b: Any


class Pair(NamedTuple):
    """Something of a stream's own tensor and of what is stored beside it, if anything is."""

    own: Any
    rest: Any


class Place(NamedTuple):
    """Which elements of a row a block has."""

    first: Any  # of them
    end: Any  # of all that there are
    position: Any  # of each, in its whole parameter
    mask: Any  # None: all are there
    layout: Any  # of the row; None: all of its streams are consecutive


@triton.jit
def place(row_first, begin, start, count, lanes, WIDE: tl.constexpr, layout=None):
    """The lanes of a block that begins ``start`` behind its chunk, which has ``count`` elements."""
    first = begin + start
    position = (row_first + first).to(tl.uint32) + lanes.to(tl.uint32)
    mask = None
    if not WIDE:
        mask = start + lanes < count
    return Place(first, begin + count, position, mask, layout)


@triton.jit
def strided_offset(layout, stream: tl.constexpr, index):
    """Where element ``index`` lies in a stream; ``strided_offset()`` of csrc/cuda/kernels.h."""
    ndim = tl.load(layout)
    sizes = layout + 1
    strides = sizes + ndim * (1 + stream)
    offset = index * 0
    for i in range(0, ndim):
        dim = ndim - 1 - i
        size = tl.load(sizes + dim)
        offset += index % size * tl.load(strides + dim)
        index = index // size
    return offset


@triton.jit
def pointer(word, STORED: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    """The stream at the address ``word``. WIDE: it lies at a multiple of 16, which is not known of
    an address from a table until ``multiple_of`` says it, of this pointer and whatever uses it.

    No more than 16 bytes of values are claimed to lie side by side, so that a thread has the same
    elements of each stream, whatever they are stored in.
    """
    stream = word.to(tl.pointer_type(STORED))
    if WIDE:
        side_by_side: tl.constexpr = 16 * STORED.primitive_bitwidth // T.primitive_bitwidth
        stream = tl.multiple_of(stream, side_by_side if side_by_side < 16 else 16)
    return stream


@triton.jit
def has_rest_each(CODEC: tl.constexpr):
    """Whether something is stored beside each element."""
    return rest_type(CODEC) is not None and not is_grouped(CODEC)


@triton.jit
def groups_of(at):
    """The groups that a block begins with an element of, and which of them there are."""
    group = tl.arange(0, at.position.shape[0] // GROUP_SIZE)
    return at.first // GROUP_SIZE + group, at.first + group * GROUP_SIZE < at.end


@triton.jit
def load(words, i, at, CODEC: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    """Elements ``i`` of the stream at the addresses ``words``, as values."""
    stored = tl.load(pointer(words.own, stored_type(CODEC), T, WIDE) + i.own, mask=at.mask)
    if is_grouped(CODEC):
        group, there = groups_of(at)
        scales = words.rest.to(tl.pointer_type(rest_type(CODEC))) + group
        scales = tl.load(scales, mask=None if WIDE else there)
        values = decode_group(stored, spread(scales, GROUP_SIZE), CODEC)
    elif rest_type(CODEC) is not None:
        rest = tl.load(pointer(words.rest, rest_type(CODEC), T, WIDE) + i.rest, mask=at.mask)
        values = decode(stored, rest, CODEC)
    else:
        values = decode(stored, stored, CODEC)
    return values


@triton.jit
def store_scales(word, at, scales, WIDE: tl.constexpr):
    """One for each group, from the thread that has the first of its elements: of as many lanes as
    there are threads' neighbours, or the compiler exchanges them through shared memory."""
    LANES: tl.constexpr = GROUP_SIZE // (SIDE_BY_SIDE if WIDE else 1)
    lane = tl.arange(0, scales.shape[0] * LANES)
    to = word.to(tl.pointer_type(tl.uint8)) + at.first // GROUP_SIZE + lane // LANES
    mask = lane % LANES == 0
    if not WIDE:
        mask = mask & at.mask
    tl.store(to, spread(scales, LANES), mask=mask)


@triton.jit
def store(words, i, at, values, random, CODEC: tl.constexpr, WIDE: tl.constexpr):
    """Likewise. ``random``: 16 bits for each, where the codec rounds stochastically."""
    T: tl.constexpr = values.dtype
    if is_grouped(CODEC):
        values = coded(values, CODEC)
        magnitudes = bits_of(values) & MAGNITUDE
        scales = scales_of(magnitudes if WIDE else tl.where(at.mask, magnitudes, 0))
        stored = encode_group(values, spread(scales, GROUP_SIZE), random, CODEC)
        store_scales(words.rest, at, scales, WIDE)
    else:
        stored, rest = encode(values, random, CODEC)
        if rest_type(CODEC) is not None:
            to = pointer(words.rest, rest_type(CODEC), T, WIDE) + i.rest
            tl.store(to, rest, mask=at.mask)
    tl.store(pointer(words.own, stored_type(CODEC), T, WIDE) + i.own, stored, mask=at.mask)


@triton.jit
def load_grad(word, i, mask, dtype, T: tl.constexpr, WIDE: tl.constexpr):
    """Elements of a gradient, which is of any dtype. WIDE: 16 bytes an access where it lies so."""
    if WIDE:
        if (word & 15) == 0:
            g = load_any(word, i, mask, dtype, T, True)
        else:
            g = load_any(word, i, mask, dtype, T, False)
    else:
        g = load_any(word, i, mask, dtype, T, False)
    return g


@triton.jit
def load_number(word, i, mask, STORED: tl.constexpr, T: tl.constexpr, WIDE: tl.constexpr):
    """Elements that are numbers of a type."""
    return tl.load(pointer(word, STORED, T, WIDE) + i, mask=mask).to(T)


@triton.jit
def load_any(word, i, mask, dtype, T: tl.constexpr, WIDE: tl.constexpr):
    """Elements of any dtype."""
    if dtype == FLOAT64:
        g = load_number(word, i, mask, tl.float64, T, WIDE)
    elif dtype == BFLOAT16:
        g = bfloat16_value(tl.load(pointer(word, tl.uint16, T, WIDE) + i, mask=mask)).to(T)
    elif dtype == FLOAT16:
        g = load_number(word, i, mask, tl.float16, T, WIDE)
    else:
        g = load_number(word, i, mask, tl.float32, T, WIDE)
    return g


@triton.jit
def this_chunk(chunks, first_chunk, CHUNK: tl.constexpr):
    """The program's work: a row, and the element of it that the chunk begins with (ChunkRef)."""
    chunk = chunks + (tl.program_id(0).to(tl.int64) + first_chunk) * 2
    return tl.load(chunk).to(tl.int64), tl.load(chunk + 1).to(tl.int64) * CHUNK


@triton.jit
def addresses(record, STREAM: tl.constexpr, CODEC: tl.constexpr):
    """Of a stream, and of what is stored beside it."""
    own = tl.load(record + STREAM)
    rest = own
    if rest_type(CODEC) is not None:
        rest = tl.load(record + REST_OF + STREAM)
    return Pair(own, rest)


@triton.jit
def offsets(layout, index, STREAM: tl.constexpr, CODEC: tl.constexpr):
    """Where the elements lie of a stream, and of what is stored beside each."""
    own = strided_offset(layout, STREAM, index)
    rest = own
    if has_rest_each(CODEC):
        rest = strided_offset(layout, REST_OF + STREAM, index)
    return Pair(own, rest)


@triton.jit
def written(words, CODEC: tl.constexpr):
    """Of a stream's addresses, the bits that are in any."""
    any_of = words.own
    if has_rest_each(CODEC):
        any_of = any_of | words.rest
    return any_of
