"""The kernels in Triton: the formula, bit for bit, for GPUs that nobody compiles C++ for.

The tables are those of ``csrc/cuda/tables.h``, in 8-byte words. Whoever launches these passes
``enable_fp_fusion=False``: a fused multiply-add rounds once where the contract rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A tensor's record, in words (DeviceRow): the address of each stream, then these.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, SLOW_PARAM = (tl.constexpr(i) for i in range(5))
NUMEL, STEP, LAYOUT, GROUP = (tl.constexpr(i) for i in range(5, 9))
ROW_WORDS = tl.constexpr(9)

# A tensor's scalars, in words (RowScalars): flags, then the coefficients in the order that
# ranger_cuda.schedule.Coefficients has them, as float64, or as float32 in half the room.
SCALAR_WORDS, COEFFICIENTS = tl.constexpr(11), tl.constexpr(1)
ACTIVE, RECTIFIED, L2, SYNC = (tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8))

# What a step is told, in words: the address of each tensor's gradient; then those of three numbers
# on the device (0: there is none), each with whether it is float64; then for each group
# ranger_cuda.hyperparameters.Hyperparameters in its order, and a learning rate on the device.
GRAD_SCALE, FOUND_INF, NORM, SIGNAL_WORDS = (tl.constexpr(i) for i in (0, 2, 4, 6))
GROUP_LR, GROUP_WORDS = tl.constexpr(11), tl.constexpr(13)


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


@triton.jit(do_not_specialize=["count"])
def schedule_kernel(rows, scalars, told, count, BLOCK: tl.constexpr):
    """Count a step for each tensor that moves, and find its scalars (``csrc/schedule.h``).

    A gradient's address is 1 where the rule reads none, and 0 where the tensor rests.
    """
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = row < count
    active = inside & (tl.load(told + row, mask=inside, other=0) != 0)
    signals = told + count + row * 0
    zero = tl.full([BLOCK], 0.0, tl.float64)
    one = zero + 1.0
    active = active & (number_at(signals + FOUND_INF, zero, active) == 0.0)

    record = rows + row * ROW_WORDS
    address = tl.load(record + STEP, mask=inside, other=0)
    counter = address.to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=active, other=0.0).to(tl.int64) + 1
    group_and_type = tl.load(record + GROUP, mask=inside, other=0)
    is_float64 = (group_and_type >> 32) != 0
    group = told + count + SIGNAL_WORDS + (group_and_type & 0xFFFFFFFF) * GROUP_WORDS

    lr = number_at(group + GROUP_LR, float64_at(group, active), active)
    beta1 = float64_at(group + 1, active)
    beta2 = float64_at(group + 2, active)
    eps = float64_at(group + 3, active)
    weight_decay = float64_at(group + 4, active)
    rho_threshold = float64_at(group + 5, active)
    alpha = float64_at(group + 6, active)
    k = tl.load(group + 7, mask=active, other=0)
    max_grad_norm = float64_at(group + 8, active)
    decoupled = tl.load(group + 9, mask=active, other=0) != 0
    maximize = tl.load(group + 10, mask=active, other=0) != 0

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
    tl.store(counter, step.to(tl.float32), mask=active)


@triton.jit
def write_scalar(slot, index: tl.constexpr, value, active, is_float64):
    """Coefficient ``index``, rounded once to the type of the tensor's arithmetic."""
    at = slot + COEFFICIENTS
    double = at.to(tl.pointer_type(tl.float64)) + index
    single = at.to(tl.pointer_type(tl.float32)) + index
    tl.store(double, value, mask=active & is_float64)
    tl.store(single, value.to(tl.float32), mask=active & (is_float64 == 0))


@triton.jit
def divide(a, b, T: tl.constexpr):
    """Correctly rounded."""
    if T == tl.float32:  # noqa: SIM300
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def root(a, T: tl.constexpr):
    """Correctly rounded."""
    if T == tl.float32:  # noqa: SIM300
        return tl.sqrt_rn(a)
    return tl.sqrt(a)


@triton.jit
def lookahead(p, slow, alpha):
    """Lookahead (arXiv:1907.08610, Algorithm 1); alpha = 1 takes the fast weight itself."""
    return tl.where(alpha == 1.0, p, slow + alpha * (p - slow))


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
def radam_block(p_at, g_at, m_at, v_at, slow_at, mask, c, rectified, l2, sync, T: tl.constexpr):
    """RAdam (arXiv:1908.03265, Algorithm 2), and Lookahead where a cycle ends."""
    p = tl.load(p_at, mask=mask)
    g = tl.load(g_at, mask=mask)
    m = tl.load(m_at, mask=mask)
    v = tl.load(v_at, mask=mask)
    g = g * c[0]  # grad_scale
    g = tl.where(l2, g + c[1] * p, g)  # weight_decay, not decoupled
    m = c[2] * m + c[3] * g  # beta1, 1 - beta1
    v = c[4] * v + c[5] * (g * g)  # beta2, 1 - beta2
    u = tl.where(rectified, divide(m, root(v, T) + c[6], T), m)  # eps
    p = p * c[7] - c[8] * u  # decay, step_size
    if sync:
        p = lookahead(p, tl.load(slow_at, mask=mask), c[9])  # alpha
        tl.store(slow_at, p, mask=mask)
    tl.store(p_at, p, mask=mask)
    tl.store(m_at, m, mask=mask)
    tl.store(v_at, v, mask=mask)


@triton.jit
def slow_block(p_at, slow_at, mask, alpha, SWAP: tl.constexpr):
    """Parameters and slow weights change places, or are interpolated."""
    p = tl.load(p_at, mask=mask)
    slow = tl.load(slow_at, mask=mask)
    if SWAP:
        tl.store(p_at, slow, mask=mask)
        tl.store(slow_at, p, mask=mask)
    else:
        slow = lookahead(p, slow, alpha)
        tl.store(p_at, slow, mask=mask)
        tl.store(slow_at, slow, mask=mask)


@triton.jit
def split(word, differences, count, T: tl.constexpr, BLOCK: tl.constexpr):
    """How many elements of a chunk come before the first that lies at a multiple of 16 bytes, and
    how many from there on go in blocks without a mask, 16 bytes an access: none where the streams'
    addresses, of which ``word`` is one and ``differences`` the bits that differ, are not alike."""
    head = ((16 - (word & 15)) & 15) // (T.primitive_bitwidth // 8)
    head = tl.minimum(head.to(tl.int32), count)
    whole = (count - head) // BLOCK * BLOCK
    if (differences & 15) != 0:
        whole = whole * 0
    return head, whole


@triton.jit
def aligned(word, head, T: tl.constexpr):
    """A pointer to the first element behind the head. Loaded from a table, an address is of unknown
    alignment until ``multiple_of`` says it."""
    first = word + head * (T.primitive_bitwidth // 8)
    return tl.multiple_of(first.to(tl.pointer_type(T)), 16)


@triton.jit
def around(rest, head, whole):
    """The element of a chunk that is the ``rest``-th of those before and behind the whole blocks.

    Blocks of another length than the whole ones: the compiler gives all loads of a length the same
    layout, and four neighbours a thread, one access each, would leave gaps between the threads.
    """
    return tl.where(rest < head, rest, rest + whole)


@triton.jit
def this_chunk(chunks, first_chunk, CHUNK: tl.constexpr):
    """The program's work: a row, and the element of it that the chunk begins with (ChunkRef)."""
    chunk = chunks + (tl.program_id(0).to(tl.int64) + first_chunk) * 2
    return tl.load(chunk).to(tl.int64), tl.load(chunk + 1).to(tl.int64) * CHUNK


@triton.jit(do_not_specialize=["first_chunk"])
def radam_kernel(
    rows,
    scalars,
    chunks,
    told,
    first_chunk,
    T: tl.constexpr,
    STRIDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The fused step of one chunk."""
    row, begin = this_chunk(chunks, first_chunk, CHUNK)
    flags = tl.load(scalars + row * SCALAR_WORDS)
    if (flags & ACTIVE) != 0:
        record = rows + row * ROW_WORDS
        count = tl.minimum(tl.load(record + NUMEL) - begin, CHUNK).to(tl.int32)
        rectified = (flags & RECTIFIED) != 0
        l2 = (flags & L2) != 0
        sync = (flags & SYNC) != 0
        at = (scalars + row * SCALAR_WORDS + COEFFICIENTS).to(tl.pointer_type(T))
        c = (
            tl.load(at),
            tl.load(at + 1),
            tl.load(at + 2),
            tl.load(at + 3),
            tl.load(at + 4),
            tl.load(at + 5),
            tl.load(at + 6),
            tl.load(at + 7),
            tl.load(at + 8),
            tl.load(at + 9),
        )
        p_word = tl.load(record + PARAM)
        g_word = tl.load(told + row)
        m_word = tl.load(record + EXP_AVG)
        v_word = tl.load(record + EXP_AVG_SQ)
        slow_word = tl.load(record + SLOW_PARAM)
        p = p_word.to(tl.pointer_type(T))
        g = g_word.to(tl.pointer_type(T))
        m = m_word.to(tl.pointer_type(T))
        v = v_word.to(tl.pointer_type(T))
        slow = slow_word.to(tl.pointer_type(T))
        lanes = tl.arange(0, BLOCK)
        if STRIDED:
            layout = tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64))
            for start in range(0, count, BLOCK):
                index = begin + start + lanes
                p_at = p + strided_offset(layout, PARAM, index)
                g_at = g + strided_offset(layout, GRAD, index)
                m_at = m + strided_offset(layout, EXP_AVG, index)
                v_at = v + strided_offset(layout, EXP_AVG_SQ, index)
                slow_at = slow + strided_offset(layout, SLOW_PARAM, index)
                mask = start + lanes < count
                radam_block(p_at, g_at, m_at, v_at, slow_at, mask, c, rectified, l2, sync, T)
        else:
            differences = (p_word ^ g_word) | (p_word ^ m_word) | (p_word ^ v_word)
            if sync:
                differences = differences | (p_word ^ slow_word)
            head, whole = split(p_word, differences, count, T, BLOCK)
            p_wide = aligned(p_word, head, T)
            g_wide = aligned(g_word, head, T)
            m_wide = aligned(m_word, head, T)
            v_wide = aligned(v_word, head, T)
            slow_wide = aligned(slow_word, head, T)
            for start in range(0, whole, BLOCK):
                i = begin + start + lanes
                radam_block(
                    p_wide + i,
                    g_wide + i,
                    m_wide + i,
                    v_wide + i,
                    slow_wide + i,
                    None,
                    c,
                    rectified,
                    l2,
                    sync,
                    T,
                )
            some = tl.arange(0, BLOCK // 2)
            for start in range(0, count - whole, BLOCK // 2):
                i = begin + around(start + some, head, whole)
                mask = start + some < count - whole
                radam_block(p + i, g + i, m + i, v + i, slow + i, mask, c, rectified, l2, sync, T)


@triton.jit(do_not_specialize=["first_chunk"])
def slow_kernel(
    rows,
    scalars,
    chunks,
    first_chunk,
    T: tl.constexpr,
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
        alpha = tl.load((slot + COEFFICIENTS).to(tl.pointer_type(T)) + 9)
        p_word = tl.load(record + PARAM)
        slow_word = tl.load(record + SLOW_PARAM)
        p = p_word.to(tl.pointer_type(T))
        slow = slow_word.to(tl.pointer_type(T))
        lanes = tl.arange(0, BLOCK)
        if STRIDED:
            layout = tl.load(record + LAYOUT).to(tl.pointer_type(tl.int64))
            for start in range(0, count, BLOCK):
                index = begin + start + lanes
                p_at = p + strided_offset(layout, PARAM, index)
                slow_at = slow + strided_offset(layout, SLOW_PARAM, index)
                slow_block(p_at, slow_at, start + lanes < count, alpha, SWAP)
        else:
            head, whole = split(p_word, p_word ^ slow_word, count, T, BLOCK)
            p_wide = aligned(p_word, head, T)
            slow_wide = aligned(slow_word, head, T)
            for start in range(0, whole, BLOCK):
                i = begin + start + lanes
                slow_block(p_wide + i, slow_wide + i, None, alpha, SWAP)
            some = tl.arange(0, BLOCK // 2)
            for start in range(0, count - whole, BLOCK // 2):
                i = begin + around(start + some, head, whole)
                slow_block(p + i, slow + i, start + some < count - whole, alpha, SWAP)
