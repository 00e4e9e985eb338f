"""The scalars of each tensor's step in Triton, as ``csrc/rule/schedule.h`` has them."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_codecs import Keys, mixed
from .triton_rule import Coefficients
from .triton_words import (
    ACTIVE,
    ALPHA,
    BETA1,
    BETA2,
    BOUNDED,
    COEFFICIENTS,
    DECOUPLED,
    EPS,
    FOUND_INF,
    GRAD_SCALE,
    GRADIENT,
    GROUP,
    GROUP_LR,
    GROUP_WORDS,
    HIGH,
    KEYS,
    L2,
    LOW,
    LOWER_HALF,
    LR,
    MAX_GRAD_NORM,
    MAXIMIZE,
    NORM,
    OUTER,
    OUTER_MOMENTUM,
    OUTER_MOMENTUM_BUFFER,
    OUTER_NESTEROV,
    PLACE,
    RECTIFIED,
    RHO_THRESHOLD,
    ROW_WORDS,
    SCALAR_WORDS,
    SEED,
    SIGNAL_WORDS,
    SLOW_PARAM,
    STEP,
    SYNC,
    WEIGHT_DECAY,
    K,
)


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
    outer_momentum = float64_at(group + OUTER_MOMENTUM, active)
    outer_nesterov = tl.load(group + OUTER_NESTEROV, mask=active, other=0).to(tl.float64)
    low = float64_at(group + LOW, active)
    high = float64_at(group + HIGH, active)
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
    outer = sync & (tl.load(record + OUTER_MOMENTUM_BUFFER, mask=inside, other=0) != 0)

    bounded = (low > float("-inf")) | (high < float("inf"))

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
        + tl.where(outer, OUTER, 0)
        + tl.where(bounded, BOUNDED, 0)
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
    write_scalar(slot, 10, outer_momentum, active, is_float64)
    write_scalar(slot, 11, outer_nesterov, active, is_float64)
    write_scalar(slot, 12, low, active, is_float64)
    write_scalar(slot, 13, high, active, is_float64)
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
        outer_momentum=tl.load(at + 10 * each),
        outer_nesterov=tl.load(at + 11 * each),
        low=tl.load(at + 12 * each),
        high=tl.load(at + 13 * each),
    )


@triton.jit
def keys_at(words):
    """What ``write_keys`` wrote."""
    at = words.to(tl.pointer_type(tl.uint32))
    return Keys(counter=tl.load(at), moments=tl.load(at + 1), param=tl.load(at + 2))
