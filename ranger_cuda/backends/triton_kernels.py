"""The kernels in Triton, for GPUs that nobody compiles C++ for.

Whoever launches these passes ``enable_fp_fusion=False``: a fused multiply-add rounds once where the
contract rounds twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_centralize import centralize_kernel
from .triton_codecs import (
    MOMENTS_FACTOR,
    PARAM_FACTOR,
    is_random,
    number_codec,
    random_bits,
    stored_type,
)
from .triton_memory import (
    Pair,
    Streams,
    addresses,
    load,
    load_grad,
    offsets,
    place,
    pointer,
    store,
    strided_offset,
    this_chunk,
    written,
)
from .triton_norm import squares_kernel, total_kernel
from .triton_rule import bounded, lookahead, outer_step, radam
from .triton_schedule import coefficients_at, keys_at, schedule_kernel
from .triton_words import (
    ACTIVE,
    BOUNDED,
    COEFFICIENTS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIRST,
    GRAD,
    GRADIENT,
    GROUP,
    GROUP_WORDS,
    KEYS,
    L2,
    LAYOUT,
    NUMEL,
    OUTER,
    OUTER_MOMENTUM_BUFFER,
    PARAM,
    RECTIFIED,
    ROW_WORDS,
    SCALAR_WORDS,
    SIGNAL_WORDS,
    SLOW_PARAM,
    SYNC,
)

# What launches need.
__all__ = [
    "GROUP_WORDS",
    "ROW_WORDS",
    "SCALAR_WORDS",
    "SIGNAL_WORDS",
    "centralize_kernel",
    "radam_kernel",
    "schedule_kernel",
    "slow_kernel",
    "squares_kernel",
    "total_kernel",
]


@triton.jit
def param_bits(at, keys, CODEC: tl.constexpr):
    """Random bits for the parameter, and its slow weight; anything, where none are needed."""
    bits = at.position
    if is_random(CODEC):
        bits = random_bits(at.position, keys.counter, keys.param, PARAM_FACTOR, True)
    return bits


@triton.jit
def moment_bits(at, keys, CODEC: tl.constexpr, UPPER: tl.constexpr):
    """Likewise for a moment: one has the upper half of a word, the other the lower."""
    bits = at.position
    if is_random(CODEC):
        bits = random_bits(at.position, keys.counter, keys.moments, MOMENTS_FACTOR, UPPER)
    return bits


@triton.jit
def pulled(p, slow, word, i, at, c, outer, T: tl.constexpr, WIDE: tl.constexpr):
    """The new slow weight; its momentum, elements ``i`` of the row at ``word``, is loaded where
    there are registers to spare."""
    if outer:
        if at.layout is not None:
            i = strided_offset(at.layout, OUTER_MOMENTUM_BUFFER, i)
        CODEC: tl.constexpr = number_codec(T)
        b = load(Pair(word, word), Pair(i, i), at, CODEC, T, WIDE)
        p, b = outer_step(p, slow, b, c)
        store(Pair(word, word), Pair(i, i), at, b, at.position, CODEC, WIDE)
    else:
        p = lookahead(p, slow, c.alpha)
    return p


class Step(NamedTuple):
    """What a tensor's step is: its scalars, and what applies."""

    c: Any
    l2: Any
    rectified: Any
    sync: Any
    outer: Any
    bounded: Any
    grad_dtype: Any
    keys: Any


@triton.jit
def radam_block(
    words,
    i,
    at,
    step,
    T: tl.constexpr,
    PARAM_CODEC: tl.constexpr,
    EXP_AVG_CODEC: tl.constexpr,
    EXP_AVG_SQ_CODEC: tl.constexpr,
    SLOW_CODEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The fused step of elements ``i`` of each stream: all are loaded before one is stored.

    WIDE: all but the gradient and scales lie at multiples of 16, and nothing is masked.
    """
    p = load(words.p, i.p, at, PARAM_CODEC, T, WIDE)
    g = load_grad(words.g, i.g, at.mask, step.grad_dtype, T, WIDE)
    m = load(words.m, i.m, at, EXP_AVG_CODEC, T, WIDE)
    v = load(words.v, i.v, at, EXP_AVG_SQ_CODEC, T, WIDE)
    slow = p
    if step.sync:
        slow = load(words.slow, i.slow, at, SLOW_CODEC, T, WIDE)
    p, m, v = radam(p, g, m, v, step.c, step.l2, step.rectified)
    p_bits = param_bits(at, step.keys, PARAM_CODEC)
    if step.sync:
        p = pulled(p, slow, words.b, i.b, at, step.c, step.outer, T, WIDE)
    if step.bounded:
        p = bounded(p, step.c)
    if step.sync:
        store(words.slow, i.slow, at, p, p_bits, SLOW_CODEC, WIDE)
    store(words.p, i.p, at, p, p_bits, PARAM_CODEC, WIDE)
    m_bits = moment_bits(at, step.keys, EXP_AVG_CODEC, True)
    store(words.m, i.m, at, m, m_bits, EXP_AVG_CODEC, WIDE)
    v_bits = moment_bits(at, step.keys, EXP_AVG_SQ_CODEC, False)
    store(words.v, i.v, at, v, v_bits, EXP_AVG_SQ_CODEC, WIDE)


@triton.jit(do_not_specialize=["first_chunk"])
def radam_kernel(
    rows,
    scalars,
    chunks,
    first_chunk,
    T: tl.constexpr,
    PARAM_CODEC: tl.constexpr,
    EXP_AVG_CODEC: tl.constexpr,
    EXP_AVG_SQ_CODEC: tl.constexpr,
    SLOW_CODEC: tl.constexpr,
    STRIDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The fused step of one chunk."""
    row, begin = this_chunk(chunks, first_chunk, CHUNK)
    slot = scalars + row * SCALAR_WORDS
    flags = tl.load(slot)
    if (flags & ACTIVE) != 0:
        record = rows + row * ROW_WORDS
        count = tl.minimum(tl.load(record + NUMEL) - begin, CHUNK).to(tl.int32)
        step = Step(
            c=coefficients_at(slot + COEFFICIENTS, T),
            l2=(flags & L2) != 0,
            rectified=(flags & RECTIFIED) != 0,
            sync=(flags & SYNC) != 0,
            outer=(flags & OUTER) != 0,
            bounded=(flags & BOUNDED) != 0,
            grad_dtype=tl.load(record + GROUP) >> 48,
            keys=keys_at(slot + KEYS),
        )
        words = Streams(
            p=addresses(record, PARAM, PARAM_CODEC),
            g=tl.load(slot + GRADIENT),
            m=addresses(record, EXP_AVG, EXP_AVG_CODEC),
            v=addresses(record, EXP_AVG_SQ, EXP_AVG_SQ_CODEC),
            slow=addresses(record, SLOW_PARAM, SLOW_CODEC),
            b=tl.load(record + OUTER_MOMENTUM_BUFFER),
        )
        row_first = tl.load(record + FIRST)
        if STRIDED:
            layout = tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64))
            lanes = tl.arange(0, BLOCK)
            for start in range(0, count, BLOCK):
                index = begin + start + lanes
                i = Streams(
                    p=offsets(layout, index, PARAM, PARAM_CODEC),
                    g=strided_offset(layout, GRAD, index),
                    m=offsets(layout, index, EXP_AVG, EXP_AVG_CODEC),
                    v=offsets(layout, index, EXP_AVG_SQ, EXP_AVG_SQ_CODEC),
                    slow=offsets(layout, index, SLOW_PARAM, SLOW_CODEC),
                    b=index,
                )
                radam_block(
                    words,
                    i,
                    place(row_first, begin, start, count, lanes, False, layout),
                    step,
                    T,
                    PARAM_CODEC,
                    EXP_AVG_CODEC,
                    EXP_AVG_SQ_CODEC,
                    SLOW_CODEC,
                    False,
                )
        else:
            # What is left over goes in blocks of another length: the compiler gives all loads of a
            # length the same layout, and neighbours in one thread would leave gaps between threads.
            # So does everything where a stream that is written does not lie at a multiple of 16.
            any_of = written(words.p, PARAM_CODEC) | written(words.slow, SLOW_CODEC)
            any_of = any_of | written(words.m, EXP_AVG_CODEC) | written(words.v, EXP_AVG_SQ_CODEC)
            any_of = any_of | words.b
            whole = tl.where((any_of & 15) == 0, count // BLOCK * BLOCK, 0)
            for start in range(0, whole, BLOCK):
                lanes = tl.arange(0, BLOCK)
                i = begin + start + lanes
                radam_block(
                    words,
                    Streams(Pair(i, i), i, Pair(i, i), Pair(i, i), Pair(i, i), i),
                    place(row_first, begin, start, count, lanes, True),
                    step,
                    T,
                    PARAM_CODEC,
                    EXP_AVG_CODEC,
                    EXP_AVG_SQ_CODEC,
                    SLOW_CODEC,
                    True,
                )
            rest = tl.arange(0, BLOCK // 2)
            for start in range(whole, count, BLOCK // 2):
                i = begin + start + rest
                radam_block(
                    words,
                    Streams(Pair(i, i), i, Pair(i, i), Pair(i, i), Pair(i, i), i),
                    place(row_first, begin, start, count, rest, False),
                    step,
                    T,
                    PARAM_CODEC,
                    EXP_AVG_CODEC,
                    EXP_AVG_SQ_CODEC,
                    SLOW_CODEC,
                    False,
                )


@triton.jit
def slow_block(
    words,
    i,
    at,
    c,
    outer,
    keys,
    SWAP: tl.constexpr,
    T: tl.constexpr,
    PARAM_CODEC: tl.constexpr,
    SLOW_CODEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Parameters and slow weights change places, bits and not values, or are interpolated."""
    if SWAP:
        STORED: tl.constexpr = stored_type(PARAM_CODEC)
        to_p = pointer(words.p.own, STORED, STORED, WIDE) + i.p.own
        to_slow = pointer(words.slow.own, STORED, STORED, WIDE) + i.slow.own
        p = tl.load(to_p, mask=at.mask)
        slow = tl.load(to_slow, mask=at.mask)
        tl.store(to_p, slow, mask=at.mask)
        tl.store(to_slow, p, mask=at.mask)
    else:
        p = load(words.p, i.p, at, PARAM_CODEC, T, WIDE)
        slow = load(words.slow, i.slow, at, SLOW_CODEC, T, WIDE)
        slow = pulled(p, slow, words.b, i.b, at, c, outer, T, WIDE)
        bits = param_bits(at, keys, PARAM_CODEC)
        store(words.p, i.p, at, slow, bits, PARAM_CODEC, WIDE)
        store(words.slow, i.slow, at, slow, bits, SLOW_CODEC, WIDE)


class Pulled(NamedTuple):
    """Something of a parameter, of its slow weight and of that one's momentum."""

    p: Any
    slow: Any
    b: Any


@triton.jit(do_not_specialize=["first_chunk"])
def slow_kernel(
    rows,
    scalars,
    chunks,
    first_chunk,
    T: tl.constexpr,
    PARAM_CODEC: tl.constexpr,
    SLOW_CODEC: tl.constexpr,
    STRIDED: tl.constexpr,
    SWAP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Parameters and slow weights of one chunk change places, or are interpolated."""
    row, begin = this_chunk(chunks, first_chunk, CHUNK)
    record = rows + row * ROW_WORDS
    slot = scalars + row * SCALAR_WORDS
    flags = tl.load(slot)
    if (tl.load(record + SLOW_PARAM) if SWAP else flags & SYNC) != 0:
        count = tl.minimum(tl.load(record + NUMEL) - begin, CHUNK).to(tl.int32)
        outer = (flags & OUTER) != 0
        c = coefficients_at(slot + COEFFICIENTS, T)
        keys = keys_at(slot + KEYS)
        words = Pulled(
            p=addresses(record, PARAM, PARAM_CODEC),
            slow=addresses(record, SLOW_PARAM, SLOW_CODEC),
            b=tl.load(record + OUTER_MOMENTUM_BUFFER),
        )
        row_first = tl.load(record + FIRST)
        if STRIDED:
            layout = tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64))
            lanes = tl.arange(0, BLOCK)
            for start in range(0, count, BLOCK):
                index = begin + start + lanes
                i = Pulled(
                    p=offsets(layout, index, PARAM, PARAM_CODEC),
                    slow=offsets(layout, index, SLOW_PARAM, SLOW_CODEC),
                    b=index,
                )
                at = place(row_first, begin, start, count, lanes, False, layout)
                slow_block(words, i, at, c, outer, keys, SWAP, T, PARAM_CODEC, SLOW_CODEC, False)
        else:
            any_of = written(words.p, PARAM_CODEC) | written(words.slow, SLOW_CODEC) | words.b
            whole = tl.where((any_of & 15) == 0, count // BLOCK * BLOCK, 0)
            for start in range(0, whole, BLOCK):
                lanes = tl.arange(0, BLOCK)
                at_i = begin + start + lanes
                i = Pulled(Pair(at_i, at_i), Pair(at_i, at_i), at_i)
                at = place(row_first, begin, start, count, lanes, True)
                slow_block(words, i, at, c, outer, keys, SWAP, T, PARAM_CODEC, SLOW_CODEC, True)
            rest = tl.arange(0, BLOCK // 2)
            for start in range(whole, count, BLOCK // 2):
                at_i = begin + start + rest
                i = Pulled(Pair(at_i, at_i), Pair(at_i, at_i), at_i)
                at = place(row_first, begin, start, count, rest, False)
                slow_block(words, i, at, c, outer, keys, SWAP, T, PARAM_CODEC, SLOW_CODEC, False)
