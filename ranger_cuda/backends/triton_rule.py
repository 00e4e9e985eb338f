"""The formula in Triton, bit for bit: elements, no memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    outer_momentum: Any
    outer_nesterov: Any  # 1 or 0
    low: Any
    high: Any


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
def mean(sum, length):
    """Of a slice of gradients; which sum it is, ``csrc/rule/radam_lookahead.h`` says."""
    return divide(sum, length)


@triton.jit
def centralized(g, mean):
    """Gradient centralization (arXiv:2004.01461, equation (1))."""
    return g - mean


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


@triton.jit
def outer_step(p, slow, b, c):
    """The same with momentum (SNOO, arXiv:2510.15830, Algorithm 1): the new slow weight, and the
    new outer_momentum_buffer."""
    d = slow - p
    b = product(c.outer_momentum, b) + d
    u = tl.where(c.outer_nesterov != 0.0, d + product(c.outer_momentum, b), b)
    return slow - product(c.alpha, u), b


@triton.jit
def bounded(p, c):
    """Where a group's bounds leave a parameter; a NaN stays one."""
    return tl.where(p < c.low, c.low, tl.where(p > c.high, c.high, p))
