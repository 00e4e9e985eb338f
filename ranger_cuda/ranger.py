"""Ranger: RAdam with Lookahead in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .step import algorithms
from .step.optimizer import FusedOptimizer
from .step.slow_weights import SlowWeights


class Ranger(SlowWeights, FusedOptimizer):
    """RAdam with Lookahead fused into the same step.

    RAdam: see :class:`RAdam`. Lookahead: Zhang et al., "Lookahead Optimizer: k steps forward, 1
    step back", NeurIPS 2019 (arXiv:1907.08610), Algorithm 1: every ``k`` steps of a parameter its
    slow weight moves the fraction ``alpha`` of the way to it, and it goes on from there. A
    parameter's cycle follows from its own step count, so a resumed run syncs where an
    uninterrupted one does.

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay, rho_threshold, maximize,
        backend, weight_rounding, state_dtype, max_grad_norm, amp_scaling, foreach, fused,
        capturable, differentiable: as for :class:`RAdam`, with Ranger's usual defaults (weight
            decay is decoupled).
        k: the Lookahead period, in optimizer steps; at least 1.
        alpha: the Lookahead interpolation factor, in [0, 1]. With 1 the result is RAdam's; with 0
            the parameter returns to its first value at each sync.

    ``k`` and ``alpha``, too, may be set for each parameter group, which has them as
    ``lookahead_k`` and ``lookahead_alpha``.

    State of a parameter: that of :class:`RAdam`, and ``slow_param`` (the parameter's shape). It
    starts as the parameter before its first update.

    Raises:
        ValueError: an argument is out of range; the message says what would be right.
        RuntimeError: the requested backend cannot run on this machine.
    """

    _algorithm = algorithms.RANGER

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        weight_decay: float = 0.0,
        *,
        k: int = 6,
        alpha: float = 0.5,
        decoupled_weight_decay: bool = True,
        rho_threshold: float = 4.0,
        maximize: bool = False,
        backend: str | None = None,
        weight_rounding: str = "exact",
        state_dtype: torch.dtype = torch.float32,
        max_grad_norm: float | None = None,
        amp_scaling: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "lookahead_k": k,
            "lookahead_alpha": alpha,
            "decoupled_weight_decay": decoupled_weight_decay,
            "rho_threshold": rho_threshold,
            "maximize": maximize,
            "weight_rounding": weight_rounding,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            state_dtype=state_dtype,
            amp_scaling=amp_scaling,
            differentiable=differentiable,
        )
