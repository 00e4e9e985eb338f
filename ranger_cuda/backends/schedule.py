"""Per-step scalars of RAdam and Lookahead, in float64 from the integer step.

The mirror of ``csrc/rule/schedule.h``: the same operations in the same order, so both return the
same bits. RAdam: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond",
ICLR 2020 (arXiv:1908.03265), Algorithm 2. Lookahead: Zhang et al., "Lookahead Optimizer: k
steps forward, 1 step back", NeurIPS 2019 (arXiv:1907.08610), Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from ..state.hyperparameters import Hyperparameters


class Schedule(NamedTuple):
    """What changes from step to step, for one parameter at its own step ``t >= 1``."""

    rectified: bool  # whether the variance of the adaptive learning rate is tractable
    step_size: float  # multiplies the update direction u
    decay: float  # multiplies the parameter: decoupled weight decay
    sync: bool  # whether this step ends a Lookahead cycle


class Coefficients(NamedTuple):
    """Every scalar of the update rule, each rounded once to the dtype of the arithmetic."""

    rectified: bool
    sync: bool
    grad_scale: float
    weight_decay: float  # added to the gradient (L2); 0 when decoupled or off
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    decay: float
    step_size: float
    alpha: float
    outer_momentum: float
    outer_nesterov: float  # 1 or 0
    low: float
    high: float


def ipow(base: float, exponent: int) -> float:
    """``base ** exponent`` by binary exponentiation: multiplications only, so that every
    device returns the same bits (``pow`` differs between C libraries)."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def schedule(hyper: Hyperparameters, step: int) -> Schedule:
    """The scalars of step ``t`` (Algorithm 2 of the RAdam paper, lines 7 to 13)."""
    t, lr = float(step), float(hyper.lr)
    beta1_t = ipow(hyper.beta1, step)
    beta2_t = ipow(hyper.beta2, step)
    rho_inf = 2.0 / (1.0 - hyper.beta2) - 1.0
    rho_t = rho_inf - 2.0 * t * beta2_t / (1.0 - beta2_t)
    rectified = rho_t > hyper.rho_threshold
    if rectified:
        r_t = math.sqrt(
            (rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t)
        )
        step_size = lr * r_t * math.sqrt(1.0 - beta2_t) / (1.0 - beta1_t)
    else:
        step_size = lr / (1.0 - beta1_t)
    decay = 1.0 - lr * hyper.weight_decay if hyper.decoupled_weight_decay else 1.0
    return Schedule(rectified, step_size, decay, hyper.k > 0 and step % hyper.k == 0)


def grad_scale(hyper: Hyperparameters, unscale: float, norm: float) -> float:
    """What gradients are multiplied by: loss unscale, clip coefficient and sign.

    Args:
        unscale: what brings the gradients to those of the loss itself.
        norm: of all gradients as they are. A NaN in it is not hidden, as in
            ``torch.nn.utils.clip_grad_norm_``.
    """
    scale = unscale
    if hyper.max_grad_norm < math.inf:
        coefficient = hyper.max_grad_norm / (norm * unscale + 1e-6)
        scale = scale if coefficient >= 1.0 else scale * coefficient
    return -scale if hyper.maximize else scale


def coefficients(
    hyper: Hyperparameters, step: int, grad_scale: float, dtype: torch.dtype
) -> Coefficients:
    """Round the scalars of step ``t`` to ``dtype`` (float32, or float64 for float64)."""
    now = schedule(hyper, step)
    exact = (
        grad_scale,
        0.0 if hyper.decoupled_weight_decay else hyper.weight_decay,
        hyper.beta1,
        1.0 - hyper.beta1,
        hyper.beta2,
        1.0 - hyper.beta2,
        hyper.eps,
        now.decay,
        now.step_size,
        hyper.alpha,
        hyper.outer_momentum,
        float(hyper.outer_nesterov),
        hyper.low,
        hyper.high,
    )
    return Coefficients(now.rectified, now.sync, *rounded(exact, dtype))


def rounded(values: Sequence[float], dtype: torch.dtype) -> list[float]:
    """``values``, each rounded once to ``dtype``."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype).tolist()
