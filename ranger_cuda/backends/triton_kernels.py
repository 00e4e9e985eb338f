"""The kernels in Triton: the formula, bit for bit, for GPUs that nobody compiles C++ for.

The tables are those of ``csrc/cuda/tables.h``, in 8-byte words. Whoever launches these passes
``enable_fp_fusion=False``: a fused multiply-add rounds once where the contract rounds twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_codecs import (
    GROUP_SIZE,
    MAGNITUDE,
    MOMENTS_FACTOR,
    PARAM_FACTOR,
    Keys,
    bfloat16_value,
    bits_of,
    coded,
    decode,
    decode_group,
    encode,
    encode_group,
    is_grouped,
    is_random,
    mixed,
    random_bits,
    rest_type,
    scales_of,
    spread,
    stored_type,
)

# A tensor's record, in words (DeviceRow): the address of each stream, those of what is stored
# beside them, then these. GROUP has the group in its lower half, then, in 16 bits each, whether the
# arithmetic is float64 and the gradient's dtype; PLACE the parameter's place in its lower half.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, SLOW_PARAM, REST_OF = (tl.constexpr(i) for i in range(6))
NUMEL, STEP, LAYOUT, FIRST, GROUP, PLACE = (tl.constexpr(i) for i in range(10, 16))
ROW_WORDS, LOWER_HALF = tl.constexpr(16), tl.constexpr(0xFFFFFFFF)

# A tensor's scalars, in words (RowScalars): flags, the address of its gradient, then the
# coefficients, as float64, or as float32 in half of their words; then the keys of random bits.
SCALAR_WORDS, GRADIENT, COEFFICIENTS = tl.constexpr(14), tl.constexpr(1), tl.constexpr(2)
KEYS = tl.constexpr(12)
ACTIVE, RECTIFIED, L2, SYNC = (tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8))

# The inputs of a step, in words: the address of each tensor's gradient; then those of three numbers
# on the device (0: there is none), each with whether it is float64; then for each group its
# Hyperparameters and a learning rate on the device.
GRAD_SCALE, FOUND_INF, NORM, SIGNAL_WORDS = (tl.constexpr(i) for i in (0, 2, 4, 6))
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, RHO_THRESHOLD, ALPHA, K = (tl.constexpr(i) for i in range(8))
MAX_GRAD_NORM, DECOUPLED, MAXIMIZE, SEED, GROUP_LR = (tl.constexpr(i) for i in range(8, 13))
GROUP_WORDS = tl.constexpr(14)

# A gradient's dtype (DType of csrc/formats/formats.h): float32, or one of these.
FLOAT64, BFLOAT16, FLOAT16 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)

# How many values of float32 a thread has side by side, where it has 16 bytes of them.
SIDE_BY_SIDE = tl.constexpr(4)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# --- the rule: elements, no memory ---------------------------------------------------------------


class Coefficients(NamedTuple):
    """The scalars of a tensor's step, in the type of its arithmetic (``csrc/rule/schedule.h``)."""

    grad_scale: Any
    weight_decay: Any
    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    eps: Any
    decay: Any
    step_size: Any
    alpha: Any


@triton.jit
def divide(a, b):
    """Correctly rounded."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def root(a):
    """Correctly rounded."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    return tl.sqrt(a)


@triton.jit
def product(a, b):
    """Rounded before it is added to anything.

    For compute capability 10 and more LLVM makes pairs of products and sums (mul.rn.f32x2), which
    ptxas before 13.1 fuses in spite of .rn and --fmad=false. It makes none of what it cannot read.
    """
    if not INTERPRETED and b.dtype == tl.float32 and tl.target_info.cuda_capability_geq(10):
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a * b


@triton.jit
def radam(p, g, m, v, c, l2, rectified):
    """RAdam (arXiv:1908.03265, Algorithm 2): the parameter and its moments after a step."""
    g = product(c.grad_scale, g)
    g = tl.where(l2, g + product(c.weight_decay, p), g)
    m = product(c.beta1, m) + product(c.one_minus_beta1, g)
    v = product(c.beta2, v) + product(c.one_minus_beta2, product(g, g))
    u = tl.where(rectified, divide(m, root(v) + c.eps), m)
    return product(c.decay, p) - product(c.step_size, u), m, v


@triton.jit
def lookahead(p, slow, alpha):
    """Lookahead (arXiv:1907.08610, Algorithm 1); alpha = 1 takes the fast weight itself."""
    return tl.where(alpha == 1.0, p, slow + product(alpha, p - slow))


# --- the schedule: the scalars of each tensor's step ---------------------------------------------


@triton.jit
def float64_at(words, mask):
    """Words that are float64 numbers."""
    return tl.load(words, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def number_at(words, default, mask):
    """The number on the device that two words tell of, as float64; ``default`` without one."""
    address = tl.load(words, mask=mask, other=0)
    is_float64 = tl.load(words + 1, mask=mask, other=0) != 0
    there = mask & (address != 0)
    single = address.to(tl.pointer_type(tl.float32))
    double = address.to(tl.pointer_type(tl.float64))
    narrow = tl.load(single, mask=there & (is_float64 == 0), other=0.0).to(tl.float64)
    wide = tl.load(double, mask=there & is_float64, other=0.0)
    return tl.where(there, tl.where(is_float64, wide, narrow), default)


@triton.jit
def ipow(base, exponent):
    """``base ** exponent`` by binary exponentiation, for exponents below 2^25."""
    result = base * 0.0 + 1.0
    for _ in range(25):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize=["count", "is_pull"])
def schedule_kernel(rows, scalars, inputs, count, is_pull, BLOCK: tl.constexpr):
    """Count a step for each tensor that moves, and find its scalars (``csrc/rule/schedule.h``).

    A gradient's address is 1 where the rule reads none, and 0 where the tensor rests. ``is_pull``:
    the rule is a pull alone, after another optimizer's step.
    """
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = row < count
    grad = tl.load(inputs + row, mask=inside, other=0)
    active = inside & (grad != 0)
    signals = inputs + count + row * 0
    zero = tl.full([BLOCK], 0.0, tl.float64)
    one = zero + 1.0
    active = active & (number_at(signals + FOUND_INF, zero, active) == 0.0)

    record = rows + row * ROW_WORDS
    address = tl.load(record + STEP, mask=inside, other=0)
    counter = address.to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=active, other=0.0).to(tl.int64) + 1
    group_and_type = tl.load(record + GROUP, mask=inside, other=0)
    is_float64 = ((group_and_type >> 32) & 0xFFFF) != 0
    group = inputs + count + SIGNAL_WORDS + (group_and_type & LOWER_HALF) * GROUP_WORDS

    lr = number_at(group + GROUP_LR, float64_at(group + LR, active), active)
    beta1 = float64_at(group + BETA1, active)
    beta2 = float64_at(group + BETA2, active)
    eps = float64_at(group + EPS, active)
    weight_decay = float64_at(group + WEIGHT_DECAY, active)
    rho_threshold = float64_at(group + RHO_THRESHOLD, active)
    alpha = float64_at(group + ALPHA, active)
    k = tl.load(group + K, mask=active, other=0)
    max_grad_norm = float64_at(group + MAX_GRAD_NORM, active)
    decoupled = tl.load(group + DECOUPLED, mask=active, other=0) != 0
    maximize = tl.load(group + MAXIMIZE, mask=active, other=0) != 0

    t = step.to(tl.float64)
    beta1_t = ipow(beta1, step)
    beta2_t = ipow(beta2, step)
    rho_inf = 2.0 / (one - beta2) - 1.0
    rho_t = rho_inf - 2.0 * t * beta2_t / (one - beta2_t)
    rectified = rho_t > rho_threshold
    # Where it is not rectified the root may be of a negative number, and is not used.
    ratio = (rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t)
    r_t = tl.sqrt(tl.where(rectified, ratio, one))
    step_size = tl.where(
        rectified,
        lr * r_t * tl.sqrt(one - beta2_t) / (one - beta1_t),
        lr / (one - beta1_t),
    )
    decay = tl.where(decoupled, one - lr * weight_decay, one)
    sync = (k > 0) & (step % tl.where(k > 0, k, 1) == 0)
    sync = sync & (tl.load(record + SLOW_PARAM, mask=inside, other=0) != 0)

    scale = one / number_at(signals + GRAD_SCALE, one, active)
    coefficient = max_grad_norm / (number_at(signals + NORM, zero, active) * scale + 1e-6)
    clips = (max_grad_norm < float("inf")) & ((coefficient >= 1.0) == 0)
    scale = tl.where(clips, scale * coefficient, scale)
    scale = tl.where(maximize, scale * -1.0, scale)  # -scale would be 0 - scale
    l2 = tl.where(decoupled, zero, weight_decay)

    has_l2 = tl.where(is_float64, l2 != 0.0, l2.to(tl.float32) != 0.0)
    flags = (
        ACTIVE
        + tl.where(rectified, RECTIFIED, 0)
        + tl.where(has_l2, L2, 0)
        + tl.where(sync, SYNC, 0)
    )
    slot = scalars + row * SCALAR_WORDS
    tl.store(slot, tl.where(active, flags, 0).to(tl.int64), mask=inside)
    tl.store(slot + GRADIENT, grad, mask=inside)
    write_scalar(slot, 0, scale, active, is_float64)
    write_scalar(slot, 1, l2, active, is_float64)
    write_scalar(slot, 2, beta1, active, is_float64)
    write_scalar(slot, 3, one - beta1, active, is_float64)
    write_scalar(slot, 4, beta2, active, is_float64)
    write_scalar(slot, 5, one - beta2, active, is_float64)
    write_scalar(slot, 6, eps, active, is_float64)
    write_scalar(slot, 7, decay, active, is_float64)
    write_scalar(slot, 8, step_size, active, is_float64)
    write_scalar(slot, 9, alpha, active, is_float64)
    place = tl.load(record + PLACE, mask=inside, other=0) & LOWER_HALF
    seed = tl.load(group + SEED, mask=active, other=0)
    write_keys(slot + KEYS, seed, place, 2 * step + is_pull, active)
    tl.store(counter, step.to(tl.float32), mask=active)


@triton.jit
def write_scalar(slot, index: tl.constexpr, value, active, is_float64):
    """Coefficient ``index``, rounded once to the type of the tensor's arithmetic."""
    at = slot + COEFFICIENTS + index
    double = at.to(tl.pointer_type(tl.float64))
    single = at.to(tl.pointer_type(tl.float32))
    tl.store(double, value, mask=active & is_float64)
    tl.store(single, value.to(tl.float32), mask=active & (is_float64 == 0))


@triton.jit
def write_keys(to, seed, place, time, active):
    """The keys of random bits (``random_keys()`` of csrc/rule/random.h)."""
    of_param = mixed(mixed(seed.to(tl.uint64)) ^ place.to(tl.uint64))
    word = mixed(of_param ^ time.to(tl.uint64))
    tl.store(to, word.to(tl.int64), mask=active)  # the counter's, and the moments'
    tl.store(to + 1, (mixed(word) & LOWER_HALF).to(tl.int64), mask=active)


# --- memory --------------------------------------------------------------------------------------


class Streams(NamedTuple):
    """Something of each of a tensor's streams."""

    p: Any
    g: Any
    m: Any
    v: Any
    slow: Any


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


@triton.jit
def place(row_first, begin, start, count, lanes, WIDE: tl.constexpr):
    """The lanes of a block that begins ``start`` behind its chunk, which has ``count`` elements."""
    first = begin + start
    position = (row_first + first).to(tl.uint32) + lanes.to(tl.uint32)
    mask = None
    if not WIDE:
        mask = start + lanes < count
    return Place(first, begin + count, position, mask)


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


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def coefficients_at(words, T: tl.constexpr):
    """What ``write_scalar`` wrote."""
    at = words.to(tl.pointer_type(T))
    each: tl.constexpr = 8 // (T.primitive_bitwidth // 8)
    return Coefficients(
        grad_scale=tl.load(at + 0 * each),
        weight_decay=tl.load(at + 1 * each),
        beta1=tl.load(at + 2 * each),
        one_minus_beta1=tl.load(at + 3 * each),
        beta2=tl.load(at + 4 * each),
        one_minus_beta2=tl.load(at + 5 * each),
        eps=tl.load(at + 6 * each),
        decay=tl.load(at + 7 * each),
        step_size=tl.load(at + 8 * each),
        alpha=tl.load(at + 9 * each),
    )


@triton.jit
def keys_at(words):
    """What ``write_keys`` wrote."""
    at = words.to(tl.pointer_type(tl.uint32))
    return Keys(counter=tl.load(at), moments=tl.load(at + 1), param=tl.load(at + 2))


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


class Step(NamedTuple):
    """What a tensor's step is: its scalars, and what applies."""

    c: Any
    l2: Any
    rectified: Any
    sync: Any
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
        p = lookahead(p, slow, step.c.alpha)
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
            grad_dtype=tl.load(record + GROUP) >> 48,
            keys=keys_at(slot + KEYS),
        )
        words = Streams(
            p=addresses(record, PARAM, PARAM_CODEC),
            g=tl.load(slot + GRADIENT),
            m=addresses(record, EXP_AVG, EXP_AVG_CODEC),
            v=addresses(record, EXP_AVG_SQ, EXP_AVG_SQ_CODEC),
            slow=addresses(record, SLOW_PARAM, SLOW_CODEC),
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
                )
                radam_block(
                    words,
                    i,
                    place(row_first, begin, start, count, lanes, False),
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
            whole = tl.where((any_of & 15) == 0, count // BLOCK * BLOCK, 0)
            for start in range(0, whole, BLOCK):
                lanes = tl.arange(0, BLOCK)
                i = begin + start + lanes
                radam_block(
                    words,
                    Streams(Pair(i, i), i, Pair(i, i), Pair(i, i), Pair(i, i)),
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
                    Streams(Pair(i, i), i, Pair(i, i), Pair(i, i), Pair(i, i)),
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
    i_p,
    i_slow,
    at,
    alpha,
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
        to_p = pointer(words.p.own, STORED, STORED, WIDE) + i_p.own
        to_slow = pointer(words.slow.own, STORED, STORED, WIDE) + i_slow.own
        p = tl.load(to_p, mask=at.mask)
        slow = tl.load(to_slow, mask=at.mask)
        tl.store(to_p, slow, mask=at.mask)
        tl.store(to_slow, p, mask=at.mask)
    else:
        p = load(words.p, i_p, at, PARAM_CODEC, T, WIDE)
        slow = load(words.slow, i_slow, at, SLOW_CODEC, T, WIDE)
        slow = lookahead(p, slow, alpha)
        bits = param_bits(at, keys, PARAM_CODEC)
        store(words.p, i_p, at, slow, bits, PARAM_CODEC, WIDE)
        store(words.slow, i_slow, at, slow, bits, SLOW_CODEC, WIDE)


class Both(NamedTuple):
    """Something of a parameter and of its slow weight."""

    p: Any
    slow: Any


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
    sync = tl.load(slot) & SYNC
    if (tl.load(record + SLOW_PARAM) if SWAP else sync) != 0:
        count = tl.minimum(tl.load(record + NUMEL) - begin, CHUNK).to(tl.int32)
        alpha = coefficients_at(slot + COEFFICIENTS, T).alpha
        keys = keys_at(slot + KEYS)
        words = Both(
            p=addresses(record, PARAM, PARAM_CODEC),
            slow=addresses(record, SLOW_PARAM, SLOW_CODEC),
        )
        row_first = tl.load(record + FIRST)
        if STRIDED:
            layout = tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64))
            lanes = tl.arange(0, BLOCK)
            for start in range(0, count, BLOCK):
                i_p = offsets(layout, begin + start + lanes, PARAM, PARAM_CODEC)
                i_slow = offsets(layout, begin + start + lanes, SLOW_PARAM, SLOW_CODEC)
                at = place(row_first, begin, start, count, lanes, False)
                slow_block(
                    words, i_p, i_slow, at, alpha, keys, SWAP, T, PARAM_CODEC, SLOW_CODEC, False
                )
        else:
            any_of = written(words.p, PARAM_CODEC) | written(words.slow, SLOW_CODEC)
            whole = tl.where((any_of & 15) == 0, count // BLOCK * BLOCK, 0)
            for start in range(0, whole, BLOCK):
                lanes = tl.arange(0, BLOCK)
                i = Pair(begin + start + lanes, begin + start + lanes)
                at = place(row_first, begin, start, count, lanes, True)
                slow_block(words, i, i, at, alpha, keys, SWAP, T, PARAM_CODEC, SLOW_CODEC, True)
            rest = tl.arange(0, BLOCK // 2)
            for start in range(whole, count, BLOCK // 2):
                i = Pair(begin + start + rest, begin + start + rest)
                at = place(row_first, begin, start, count, rest, False)
                slow_block(words, i, i, at, alpha, keys, SWAP, T, PARAM_CODEC, SLOW_CODEC, False)
