"""Gradient clipping by total norm, as one factor that the step multiplies gradients by."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from .tensors import DTensor


@torch.no_grad()
def total_norm(grads: Iterable[Tensor]) -> float:
    """The 2-norm of all gradients taken together, over all ranks for those of DTensors.

    A reduction: deterministic on one device and layout, and outside the numerical contract.
    """
    by_mesh: dict[Any, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_mesh[grad.device_mesh if isinstance(grad, DTensor) else None].append(grad.detach())
    squares = 0.0
    for same_mesh in by_mesh.values():
        norm = get_total_norm(same_mesh)
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return math.sqrt(squares)


def clip_coefficients(param_groups: list[dict[str, Any]], grad_scale: float) -> list[float]:
    """For each group, what brings the total norm down to its ``max_grad_norm``; 1 where it is less.

    The norm is that of all of the optimizer's gradients, as
    ``torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)`` takes it.

    Args:
        grad_scale: what the gradients are multiplied by before (a loss unscale).
    """
    limits = [group["max_grad_norm"] for group in param_groups]
    if all(limit is None for limit in limits):
        return [1.0] * len(limits)
    grads = (p.grad for group in param_groups for p in group["params"] if p.grad is not None)
    norm = total_norm(grads) * grad_scale
    return [1.0 if limit is None else _coefficient(limit, norm) for limit in limits]


def _coefficient(limit: float, norm: float) -> float:
    if math.isnan(norm):
        return norm  # as clip_grad_norm_: an infinite or NaN norm is not hidden
    return min(1.0, limit / (norm + 1e-6))
