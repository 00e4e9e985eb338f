"""Where the Triton kernels find things: the tables of ``csrc/cuda/tables.h``, in 8-byte words."""

from __future__ import annotations

import triton.language as tl

# A tensor's record, in words (DeviceRow): the address of each stream, those of what is stored
# beside them, then these. GROUP has the group in its lower half, then, in 16 bits each, whether the
# arithmetic is float64 and the gradient's dtype; PLACE the parameter's place in its lower half.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, SLOW_PARAM = (tl.constexpr(i) for i in range(5))
OUTER_MOMENTUM_BUFFER, REST_OF = tl.constexpr(5), tl.constexpr(6)
NUMEL, STEP, LAYOUT, FIRST, SLICE, SCRATCH, GROUP, PLACE = (tl.constexpr(i) for i in range(12, 20))
ROW_WORDS, LOWER_HALF = tl.constexpr(20), tl.constexpr(0xFFFFFFFF)

# A tensor's scalars, in words (RowScalars): flags, the address of its gradient, then the
# coefficients, as float64, or as float32 in half of their words; then the keys of random bits.
SCALAR_WORDS, GRADIENT, COEFFICIENTS = tl.constexpr(18), tl.constexpr(1), tl.constexpr(2)
KEYS = tl.constexpr(16)
ACTIVE, RECTIFIED, L2, SYNC, OUTER, BOUNDED = (tl.constexpr(1 << i) for i in range(6))

# The inputs of a step, in words: the address of each tensor's gradient; then those of three numbers
# on the device (0: there is none), each with whether it is float64; then for each group its
# Hyperparameters and a learning rate on the device.
GRAD_SCALE, FOUND_INF, NORM, SIGNAL_WORDS = (tl.constexpr(i) for i in (0, 2, 4, 6))
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, RHO_THRESHOLD, ALPHA = (tl.constexpr(i) for i in range(7))
OUTER_MOMENTUM, LOW, HIGH, K, MAX_GRAD_NORM = (tl.constexpr(i) for i in range(7, 12))
DECOUPLED, MAXIMIZE, OUTER_NESTEROV, SEED = (tl.constexpr(i) for i in range(12, 16))
GROUP_LR, GROUP_WORDS = tl.constexpr(16), tl.constexpr(18)

# A gradient's dtype (DType of csrc/formats/formats.h): float32, or one of these.
FLOAT64, BFLOAT16, FLOAT16 = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
